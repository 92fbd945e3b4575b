"""Many searches from a file, and what they found as a file."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twofold.data.atomic import write_atomically
from twofold.data.tables import READERS, read_text
from twofold.errors import DataError, TwofoldError, UsageError, unknown
from twofold.retrieve.filters import parse_where
from twofold.retrieve.retriever import Retriever
from twofold.retrieve.store import Hit

NUMBERS = {"weight": float, "spread": float, "k": int, "offset": int}
LISTS = ("like", "unlike", "where")
COLUMNS = ("id", "text", "image", "minus", *LISTS, *NUMBERS)


class Query(NamedTuple):
    """What one row of the file asks: arguments of `Retriever.search`, without those that it leaves empty."""

    id: str
    asked: dict[str, Any]


class Answered(NamedTuple):
    """A query's hits, best first; or why it has none."""

    query: str
    hits: list[Hit]
    error: str | None = None


def read_queries(path: Path | str) -> list[Query]:
    """The queries of a text file (one a line) or a table (CSV, TSV, JSONL, Parquet) with any of `COLUMNS`.

    `id` names a query, else its place in the file does, from 1. `like`, `unlike` and `where` are one value or a list;
    pictures lie beside the file. DataError names the query whose numbers cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path} to read queries from.")
    if path.suffix == ".txt":
        columns: dict[str, Any] = {"text": [line for line in read_text(path).splitlines() if line.strip()]}
    elif path.suffix in (kinds := (".csv", ".tsv", ".jsonl", ".parquet")):
        columns = READERS[path.suffix](path)[0]
    else:
        raise unknown("kind of file for queries", path.suffix, (".txt", *kinds))
    for name in columns:
        if name not in COLUMNS:
            raise unknown("column of queries", name, COLUMNS)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [_query(path, str(row.get("id") or number), row) for number, row in enumerate(rows, 1)]


def _query(path: Path, name: str, row: Mapping[str, Any]) -> Query:
    asked: dict[str, Any] = {}
    for column, cell in row.items():
        if column == "id" or cell is None or cell in ("", []):
            continue
        if column in NUMBERS:
            try:
                asked[column] = NUMBERS[column](cell)
            except (TypeError, ValueError):
                raise DataError(f"{path}, query {name}: {column} must be a number, got {cell!r}.") from None
        elif column in LISTS:
            asked[column] = [str(one) for one in cell] if isinstance(cell, list) else [str(cell)]
        else:
            asked[column] = path.parent / str(cell) if column == "image" else str(cell)
    if "where" in asked:
        try:
            asked["where"] = parse_where(asked["where"])
        except UsageError as error:
            raise DataError(f"{path}, query {name}: {error}") from error
    return Query(name, asked)


def answer(retriever: Retriever, query: Query, **otherwise: Any) -> Answered:
    """One query's hits, with the arguments `otherwise` where it says nothing itself; a query that fails says why."""
    try:
        return Answered(query.id, retriever.search(**{**otherwise, **query.asked}))
    except TwofoldError as error:
        return Answered(query.id, [], str(error))


def told(one: Answered) -> dict[str, Any]:
    """An answer as JSON values."""
    hits = [hit._asdict() | {"spaces": [place._asdict() for place in hit.spaces]} for hit in one.hits]
    return {"query": one.query, "hits": hits, "error": one.error}


def write_answers(path: Path, answers: Iterable[Answered]) -> None:
    """JSONL: a query with its hits a line. CSV: a hit a line, as query, rank, id, score, probability."""

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(told(one), ensure_ascii=False) + "\n" for one in answers)
                return
            table = csv.writer(file)
            table.writerow(("query", "rank", "id", "score", "probability"))
            for one in answers:
                for rank, hit in enumerate(one.hits, 1):
                    table.writerow((one.query, rank, hit.id, hit.score, hit.probability))

    check_output(path)
    write_atomically(path, write)


def check_output(path: Path) -> None:
    """UsageError where answers cannot be written as such a file."""
    if path.suffix not in (".csv", ".jsonl"):
        raise unknown("kind of file for answers", path.suffix, (".csv", ".jsonl"))
