"""Policies as files: TOML or JSON, one table of fields for one policy, a list of them under `view` for one a view."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold.errors import DataError, UsageError

SUFFIXES = (".toml", ".json")


def read(path: Path) -> list[dict[str, Any]]:
    """The fields of each policy in a file."""
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8")
        whole = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Expected a policy in TOML or JSON.") from None
    except ValueError as error:
        raise DataError(f"{path} is no {path.suffix[1:].upper()}: {error}.") from None
    views = whole.get("view", [whole]) if isinstance(whole, dict) else None
    if not isinstance(views, list) or not views or not all(isinstance(view, dict) for view in views):
        raise DataError(f"{path} holds no policy: expected its fields, or a list `view` of such tables.")
    return views


def write(views: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write what `read` reads."""
    _check_suffix(path)
    if path.suffix == ".json":
        text = json.dumps(views[0] if len(views) == 1 else {"view": views}, indent=2) + "\n"
    else:  # numbers and lists of numbers read the same in both
        tables = ["".join(f"{name} = {json.dumps(value)}\n" for name, value in view.items()) for view in views]
        text = tables[0] if len(tables) == 1 else "\n".join(f"[[view]]\n{table}" for table in tables)
    path.write_text(text, encoding="utf-8")


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise UsageError(f"A policy is kept as {' or '.join(SUFFIXES)}; got {path}.")
