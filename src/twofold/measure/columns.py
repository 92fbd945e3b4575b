"""What the data say about each picture, as columns that a probe can be asked for: labels, metadata, words, families.

A family is a set of items whose captions are the same but for one word: "red heart", "blue heart", "green heart". What
that word names is exactly what tells their pictures apart, and nobody had to write it down for us.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from twofold.data.sources import Source
from twofold.errors import unknown

LEAST = 8  # members that a class, a word or a family must have
MOST = 40  # distinct values of a metadata column that is taken for classes


class Column(NamedTuple):
    """A classification of the items: a number for each, −1 where it has none."""

    name: str
    values: Int[np.ndarray, "n"]
    classes: list[str]


class Family(NamedTuple):
    """Items whose first captions are the same but for one word."""

    pattern: str  # "… heart"
    items: list[int]
    words: list[str]  # what each has in place of the dots


def columns_of(source: Source, names: Sequence[str] | None = None) -> list[Column]:
    """The labels ("label"), and each metadata column of few distinct values; or those asked for.

    Values of fewer than eight items count as none, and a column needs two that have more and that cover half of the
    items, unless it was asked for.
    """
    there = {name: _numbered(name, column) for name, column in source.meta.items() if _hashable(column)}
    if source.labels is not None:
        classes = list(source.classes) or [str(k) for k in range(int(source.labels.max()) + 1)]
        values = [classes[k] if k >= 0 else None for k in source.labels.tolist()]
        there = {"label": _numbered("label", values), **there}
    if names is not None:
        for name in names:
            if name not in there:
                raise unknown("column", name, there)
        return [there[name] for name in names]
    chosen: list[Column] = []
    for column in there.values():
        useful = 2 <= len(column.classes) <= MOST and (column.values >= 0).mean() >= 0.5
        if useful and not any(_same(column, other) for other in chosen):
            chosen.append(column)
    return chosen


def words_of(texts: Sequence[Sequence[str]] | None, least: int = LEAST) -> dict[str, Bool[np.ndarray, "n"]]:
    """Which items have a word in their captions, for every word that at least `least` have and as many have not."""
    own = [set(words_in(" ".join(each))) for each in texts or ()]
    counts = Counter(word for words in own for word in words)
    kept = sorted(word for word, count in counts.items() if least <= count <= len(own) - least and len(word) > 1)
    return {word: np.array([word in words for words in own]) for word in kept}


def families_of(texts: Sequence[Sequence[str]] | None, least: int = LEAST) -> list[Family]:
    """The families of at least `least` items, largest first; of several items of one caption the first is taken.

    Of families with nearly the same words ("person … light skin tone", "person … dark skin tone") the largest stays.
    """
    found: dict[tuple, dict[str, int]] = defaultdict(dict)
    for item, each in enumerate(texts or ()):
        tokens = words_in(each[0]) if each else []
        for place, word in enumerate(tokens if len(tokens) > 1 else ()):
            found[*tokens[:place], None, *tokens[place + 1 :]].setdefault(word, item)
    kept: dict[tuple, dict[str, int]] = {}
    for key, own in sorted(found.items(), key=lambda pair: -len(pair[1])):
        alike = (len(own.keys() & other) / len(own.keys() | other) for other in kept.values())
        if len(own) >= least and not any(share > 0.5 for share in alike):
            kept[key] = own
    return [
        Family(" ".join("…" if token is None else token for token in key), list(own.values()), list(own))
        for key, own in kept.items()
    ]


def sample(source: Source, items: int, draw: torch.Generator) -> Int[np.ndarray, "m"]:
    """So many items in which rare words and classes are not lost: families first, then of what there is least.

    Families share at most half of the sample, small ones whole. A random sample of a collection in which half of the
    items are variants of a few would be half variants, and hold two of its forty arrows.
    """
    if len(source) <= items:
        return np.arange(len(source))
    families = [family.items for family in families_of(source.texts)]
    most = next((m for m in range(items, LEAST, -1) if sum(min(len(own), m) for own in families) <= items // 2), LEAST)
    chosen: dict[int, None] = {}  # a set that remembers its order
    for own in families:
        some = torch.randperm(len(own), generator=draw).tolist()[:most]
        chosen |= {own[k]: None for k in some if len(chosen) < items // 2}
    groups = [has.nonzero()[0] for has in words_of(source.texts, 2 * LEAST).values()]
    for column in columns_of(source):
        groups += [(column.values == k).nonzero()[0] for k in range(len(column.classes))]
    groups = groups or [np.arange(len(source))]
    order = [group[torch.randperm(len(group), generator=draw).numpy()].tolist() for group in groups]
    member = defaultdict(list)
    for g, group in enumerate(groups):
        for item in group.tolist():
            member[item].append(g)
    held = np.zeros(len(groups))
    for item in chosen:
        held[member[item]] += 1
    while len(chosen) < items and np.isfinite(held).any():
        g = int(held.argmin())
        while order[g] and order[g][-1] in chosen:
            order[g].pop()
        if order[g]:
            chosen[item := order[g].pop()] = None
            held[member[item]] += 1
        else:
            held[g] = np.inf  # all of its items are in
    rest = torch.randperm(len(source), generator=draw).tolist()  # items of no word and no class
    chosen |= {item: None for item in [item for item in rest if item not in chosen][: max(0, items - len(chosen))]}
    return np.array(sorted(list(chosen)[:items]))


def _numbered(name: str, column: Sequence) -> Column:
    counts = Counter(str(value) for value in column if value not in (None, ""))
    classes = sorted(value for value, count in counts.items() if count >= LEAST)
    numbers = {value: number for number, value in enumerate(classes)}
    return Column(name, np.array([numbers.get(str(value), -1) for value in column]), classes)


def _hashable(column: Sequence) -> bool:
    return all(isinstance(value, str | int | float | bool | None) for value in column)


def _same(one: Column, other: Column) -> bool:
    pairs = set(zip(one.values.tolist(), other.values.tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def words_in(text: str) -> list[str]:
    return re.findall(r"[\w-]+(?:['’]\w+)*", text.lower())
