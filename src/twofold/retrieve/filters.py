"""Filters: which items a search may find, by their columns. Written for people, as a mapping for programs.

    group=food-drink                     the column has this value; 2024 and true may be a number or a boolean, or text
    group="Food and drink"               quotes for values that hold words of the syntax; quoted is text, exactly
    year>=2020  year<2024  year!=2020    numbers are compared by value; != is also true of items without the column
    group in (objects, flags)            one of several; `not in` is its opposite
    group=flags and (year>2000 or not label=red)

As a mapping: `{"group": "flags", "year": {"$gte": 2020}}`, all of which must hold, with $in, $nin, $ne, $gt, $gte, $lt
and $lte, and `{"$or": [...]}`, `{"$and": [...]}`, `{"$not": {...}}` of mappings. Numbers compare by value (1 is 1.0);
`True` is not 1, and the text "1" is not the number. `not` turns round each comparison below it, so an item without a
column matches `!=` and `not in` of it and nothing else.
"""

import contextlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from twofold.errors import UsageError, unknown

Scalar = str | int | float | bool
Where = Mapping[str, Any]

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_TURNED = {"$gt": "$lte", "$gte": "$lt", "$lt": "$gte", "$lte": "$gt"}
OPERATORS = ("$in", "$nin", "$ne", *COMPARISONS)


@dataclass(frozen=True)
class Has:
    """The column's value is one of these, as (kind, value); or, with `no`, it is none of them, or there is no value."""

    column: str
    values: frozenset[tuple[str, Scalar]]
    no: bool = False

    def accepts(self, value: object) -> bool:
        """Whether this value of the column (None where it has none) will do."""
        return (kind_of(value) in self.values) != self.no


@dataclass(frozen=True)
class Compares:
    """The column is a number on this side of another one."""

    column: str
    operator: str  # one of COMPARISONS
    number: float

    def accepts(self, value: object) -> bool:
        kind = kind_of(value)
        return kind is not None and kind[0] == "number" and COMPARISONS[self.operator](kind[1], self.number)


@dataclass(frozen=True)
class All:
    """Every one of these holds; of none, that is so."""

    rules: tuple["Rule", ...] = ()


@dataclass(frozen=True)
class Some:
    """One of these holds at least."""

    rules: tuple["Rule", ...]


Rule = Has | Compares | All | Some


def matches(rule: Rule, meta: Mapping[str, Scalar]) -> bool:
    """Whether an item with these columns is one of those that are wanted."""
    if isinstance(rule, All):
        return all(matches(one, meta) for one in rule.rules)
    if isinstance(rule, Some):
        return any(matches(one, meta) for one in rule.rules)
    return rule.accepts(meta.get(rule.column))


def columns_of(rule: Rule) -> set[str]:
    """The columns that a filter looks at."""
    if isinstance(rule, All | Some):
        return set().union(*(columns_of(one) for one in rule.rules))
    return {rule.column}


def for_chroma(rule: Rule) -> dict | bool:
    """The rule in Chroma's grammar (one column a condition, one type of value a list); True is all, False nothing."""
    if isinstance(rule, Compares):
        condition = {rule.column: {rule.operator: rule.number}}
        if float(rule.number).is_integer():
            return condition
        # Chroma cuts 1.5 to 1 where it compares it with whole numbers: these get bounds of their own.
        below = int(np.floor(rule.number))
        reach, stop = ("$gte", "$gt") if rule.operator.startswith("$g") else ("$lte", "$lt")
        least, limit = (below + 1, below) if reach == "$gte" else (below, below + 1)
        return {"$and": [{"$or": [condition, {rule.column: {reach: least}}]}, {rule.column: {stop: limit}}]}
    if isinstance(rule, Has):
        lists: dict[type, list] = {}
        for _, value in rule.values:
            lists.setdefault(type(value), []).append(value)
        parts = [{rule.column: {"$nin" if rule.no else "$in": values}} for values in lists.values()]
        return _joined("$and" if rule.no else "$or", parts, empty=rule.no)
    some = isinstance(rule, Some)
    found = [for_chroma(one) for one in rule.rules]
    if some in found:  # one that is always true of several, or one that never is of all
        return some
    return _joined("$or" if some else "$and", [one for one in found if isinstance(one, dict)], empty=not some)


def _joined(operator: str, parts: list[dict], *, empty: bool) -> dict | bool:
    return empty if not parts else {operator: parts} if len(parts) > 1 else parts[0]


def kind_of(value: object) -> tuple[str, Scalar] | None:
    """What a value is compared as: numbers by value, apart from booleans and texts; None for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int | float):
        return "number", value
    return ("text", value) if isinstance(value, str) else None


def is_column(name: object) -> bool:
    return isinstance(name, str) and bool(name) and not name.startswith(("$", "#", "chroma:"))


# -- From a mapping ---------------------------------------------------------------------------------------------------


def compiled(where: Where | None) -> Rule:
    """The rule that a mapping means; UsageError where it means nothing."""
    return _compiled(where or {}, no=False)


def _compiled(where: object, *, no: bool) -> Rule:
    if not isinstance(where, Mapping):
        raise UsageError(f"A filter is a mapping of columns, such as {{'group': 'flags'}}; got {where!r}.")
    rules: list[Rule] = []
    for column, wanted in where.items():
        if column in ("$and", "$or"):
            if not isinstance(wanted, list | tuple) or not wanted:
                raise UsageError(f"{column} takes a list of filters; got {wanted!r}.")
            parts = tuple(_compiled(one, no=no) for one in wanted)
            rules.append(All(parts) if (column == "$and") != no else Some(parts))
        elif column == "$not":
            rules.append(_compiled(wanted, no=not no))
        elif not is_column(column):
            raise UsageError(f"No column is named {column!r}: not empty, and no $, # or chroma: in front.")
        elif isinstance(wanted, Mapping):
            if not wanted:
                raise UsageError(f"The filter on {column!r} says nothing: give it one of {', '.join(OPERATORS)}.")
            parts = tuple(_condition(column, operator, value, no) for operator, value in wanted.items())
            rules.append(Some(parts) if no else All(parts))
        else:
            rules.append(_has(column, [wanted], no))
    return Some(tuple(rules)) if no and len(rules) != 1 else rules[0] if len(rules) == 1 else All(tuple(rules))


def _condition(column: str, operator: str, value: Any, no: bool) -> Rule:
    if operator in COMPARISONS:
        kind = kind_of(value)
        if kind is None or kind[0] != "number":
            raise UsageError(f"The filter on {column!r} compares numbers; got {value!r}.")
        return Compares(column, _TURNED[operator] if no else operator, kind[1])  # type: ignore[arg-type]
    if operator == "$ne":
        return _has(column, [value], not no)
    if operator not in ("$in", "$nin"):
        raise unknown("filter operator", str(operator), OPERATORS)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{operator} on {column!r} takes a list of values; got {value!r}.")
    return _has(column, value, no != (operator == "$nin"))


def _has(column: str, values: Iterable[object], no: bool) -> Has:
    kinds = [kind_of(value) for value in values]
    if None in kinds:
        raise UsageError(f"The filter on {column!r} must be text, a number, a boolean or {{'$in': [...]}}.")
    return Has(column, frozenset(kind for kind in kinds if kind), no)


# -- From words -------------------------------------------------------------------------------------------------------

_SIGNS = {">": "$gt", ">=": "$gte", "<": "$lt", "<=": "$lte"}
_QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
_COLUMN = re.compile(rf"\s*({_QUOTED}|[^\s=<>!()\"',]+)")
_SIGN = re.compile(r"\s*(>=|<=|!=|==|=|>|<|not\s+in(?=[\s(])|in(?=[\s(]))", re.IGNORECASE)
_EXAMPLE = 'A filter reads column=value, e.g. group=food-drink or "year>=2020 and group in (flags, objects)"'


def parse_where(terms: Iterable[str]) -> Where:
    """The filter that words mean (see the top of this file). All terms must hold; a column of which several terms say
    nothing but `=` may have either value.
    """
    where: dict[str, Any] = {}
    others: list[Where] = []
    for term in terms:
        parsed = _Reader(term).read()
        column, wanted = next(iter(parsed.items()))
        if len(parsed) == 1 and isinstance(wanted, dict) and wanted.keys() == {"$in"}:
            where.setdefault(column, {"$in": []})["$in"] += wanted["$in"]
        else:
            others.append(parsed)
    if not others:
        return where
    if not where and len(others) == 1:
        return others[0]
    return {"$and": [*([where] if where else []), *others]}


class _Reader:
    """One term, read from left to right."""

    def __init__(self, term: str):
        self.term, self.at, self.depth = term, 0, 0

    def read(self) -> Where:
        found = self._either()
        if self.term[self.at :].strip():
            raise self._wrong(f"it goes on with {self.term[self.at :].strip()!r}")
        return found

    def _either(self) -> Where:
        parts = [self._both()]
        while self._word("or"):
            parts.append(self._both())
        return {"$or": parts} if len(parts) > 1 else parts[0]

    def _both(self) -> Where:
        parts = [self._one()]
        while self._word("and"):
            parts.append(self._one())
        return {"$and": parts} if len(parts) > 1 else parts[0]

    def _one(self) -> Where:
        if self._word("not"):
            return {"$not": self._one()}
        if self._taken(re.compile(r"\s*\(")):
            self.depth += 1
            inner = self._either()
            if not self._taken(re.compile(r"\s*\)")):
                raise self._wrong("a parenthesis is not closed")
            self.depth -= 1
            return inner
        return self._condition()

    def _condition(self) -> Where:
        column = self._taken(_COLUMN)
        sign = self._taken(_SIGN) if column else None
        if not column or not sign:
            raise self._wrong(f"{self.term[self.at :].strip() or 'nothing'!r} stands where one should be")
        name, sign = _unquoted(column), " ".join(sign.lower().split())
        if sign.endswith("in"):
            values = self._list()
            return {name: {"$nin" if sign == "not in" else "$in": values}}
        given = self._value(r"$")
        if sign in _SIGNS:
            try:
                return {name: {_SIGNS[sign]: _number(_unquoted(given))}}
            except ValueError:
                raise self._wrong(f"{sign} compares numbers, and {given!r} is none") from None
        return {name: {"$nin" if sign == "!=" else "$in": _meanings(given)}}

    def _list(self) -> list[Scalar]:
        if not self._taken(re.compile(r"\s*\(")):
            raise self._wrong("`in` takes values in parentheses: group in (flags, objects)")
        values: list[Scalar] = []
        self.depth += 1
        while True:
            values += _meanings(self._value(r","))
            if not self._taken(re.compile(r"\s*,")):
                break
        if not self._taken(re.compile(r"\s*\)")):
            raise self._wrong("a parenthesis is not closed")
        self.depth -= 1
        return values

    def _value(self, end: str) -> str:
        """A quoted value, or everything up to `and`, `or`, or what closes this part."""
        if quoted := self._taken(re.compile(rf"\s*({_QUOTED})(?=\s*(?:$|[),]|and\b|or\b))", re.IGNORECASE)):
            return quoted
        closed = r"|\s*\)" if self.depth else ""
        bare = self._taken(
            re.compile(rf"\s*(\S.*?)(?=\s+(?:and|or)\s|\s*$|\s*{end}{closed})", re.IGNORECASE | re.DOTALL)
        )
        if not bare:
            raise self._wrong("a value is missing")
        return bare

    def _word(self, word: str) -> bool:
        return self._taken(re.compile(rf"\s*{word}(?=[\s(])", re.IGNORECASE)) is not None

    def _taken(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.term, self.at)
        if found is None:
            return None
        self.at = found.end()
        return found[found.lastindex or 0]

    def _wrong(self, said: str) -> UsageError:
        return UsageError(
            f"{_EXAMPLE}; in {self.term!r} {said}. A value that holds and, or, commas or parentheses goes into quotes: "
            'group="Food and drink".'
        )


def _unquoted(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word[:1] in "\"'" and len(word) > 1 and word[-1] == word[0] else word


def _number(word: str) -> float:
    number = float(word)
    if not np.isfinite(number):
        raise ValueError
    return int(number) if number.is_integer() and abs(number) < 2**63 else number


def _meanings(word: str) -> list[Scalar]:
    """What a value may be: a quoted one is text, a bare one also the number or boolean that it reads as."""
    text = _unquoted(word)
    values: list[Scalar] = [text]
    if text == word:
        if text.lower() in ("true", "false"):
            values.append(text.lower() == "true")
        with contextlib.suppress(ValueError):
            values.append(_number(text))
    return values
