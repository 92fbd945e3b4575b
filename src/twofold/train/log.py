"""What a run keeps of itself: a line of JSON every few steps."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Log:
    """Appends a run's figures to `path`. Opening it at `step` forgets whatever a killed run logged beyond that step."""

    def __init__(self, path: Path, *, step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [line for line in read_log(path) if line["step"] <= step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        os.replace(temporary, path)
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        self.lines.append(dict(line))
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
