"""Code and what is said of it: the functions of a folder of Python, each with its docstring, as pairs.

Files are parsed, never imported: no code of theirs runs.
"""

import ast
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

from twofold.data.sources import Column, Source, content_key
from twofold.data.tables import read_text
from twofold.errors import DataError

FOREIGN = {"site-packages", "dist-packages", "node_modules"}  # what others wrote, wherever it was installed
TENTH = 10  # of the files, one such part tests and one validates


def open_functions(root: Path | str) -> Source:
    """The functions and methods below a folder that have a docstring and do something, as text and "code".

    The code stands without its docstring, comments and decorators as they are. An id is file and qualified name;
    `meta` has the file and the line. A tenth of the files, by the hashes of their names, is the split "test", another
    one "val": what is held out comes from files that were not learned from. Files that are no Python are left out.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"There is no folder {root} of Python files.")
    rows: list[tuple[str, str, str, str, int]] = []
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        try:
            text = read_text(path)
            with warnings.catch_warnings(action="ignore"):  # of escapes that a later Python will refuse
                tree = ast.parse(text)
        except (DataError, SyntaxError, ValueError, RecursionError):
            continue
        lines = text.splitlines()
        for qualified, node in _functions(tree):
            doc, code = ast.get_docstring(node, clean=False), _code(node, lines)
            if doc and doc.strip() and code:
                rows.append((f"{name}:{qualified}", cleandoc(doc), code, name, node.lineno))
    if not rows:
        raise DataError(f"{root} holds no Python function that has a docstring.")
    ids, docs, codes, files, starts = zip(*rows, strict=True)
    return Source(
        f"python:{root}",
        _unique(ids, starts),
        texts=[[doc] for doc in docs],
        columns={"code": Column("text", [[code] for code in codes])},
        splits=_splits(files),
        meta={"file": list(files), "line": list(starts)},
    )


def _files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in FOREIGN and not name.startswith(".")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, Any]]:
    """All functions with their qualified names, those within classes and functions as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield within + child.name, child
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _functions(child, f"{within}{child.name}." if named else within)  # type: ignore[attr-defined]


def _code(node: Any, lines: Sequence[str]) -> str:
    """The lines of a function without its docstring; nothing, where that is all it has."""
    said, rest = node.body[0], node.body[1:]
    if not rest or node.lineno == said.lineno or said.end_lineno == rest[0].lineno:
        return ""
    first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    kept = [*lines[first - 1 : said.lineno - 1], *lines[said.end_lineno : node.end_lineno]]
    return re.sub(r"\n\s*\n+", "\n", textwrap.dedent("\n".join(kept)).strip())


def _unique(ids: Sequence[str], lines: Sequence[int]) -> list[str]:
    """The ids; of those that come again (a property's setter, a branch for another system), with their line."""
    first = {one: place for place, one in reversed(list(enumerate(ids)))}
    return [one if first[one] == place else f"{one}:{lines[place]}" for place, one in enumerate(ids)]


def _splits(files: Sequence[str]) -> list[str]:
    order = sorted(set(files), key=content_key)
    few = len(order) // TENTH
    held = {**dict.fromkeys(order[:few], "test"), **dict.fromkeys(order[few : 2 * few], "val")}
    return [held.get(file, "train") for file in files]
