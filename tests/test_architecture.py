"""The house keeps its shape: imports point down only, importing does nothing, and nothing is called utils."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import twofold

SRC = Path(twofold.__file__).parent

# From the ground up. A module may import from its own row and from the rows above it in this list.
ROWS = [
    {"errors"},
    {"runtime", "progress", "cluster"},
    {"objectives", "data", "views", "mining"},
    {"models"},
    {"methods", "measure"},
    {"retrieve", "train"},
    {"terminal"},
    {"demo", "learn", "serve"},
    {"cli"},
]
APART = [("objectives", ""), ("serve", "train"), ("retrieve", "train"), ("train", "retrieve"), ("data", "views")]
MODULES = [path for path in sorted(SRC.rglob("*.py")) if path != SRC / "__init__.py"]


def part(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The parts of twofold that a module imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "twofold":
            dotted = (node.module or "").split(".")
            found |= {dotted[1]} if len(dotted) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("twofold.")}
    return {name for name in found if not name.startswith("__")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down_only(path):
    level = {name: row for row, names in enumerate(ROWS) for name in names}
    own = part(path)
    assert own in level, f"{own} has no place in the house; give it a row"
    for name in imported(path) - {own}:
        assert level[name] <= level[own], f"{own} must not import {name}"
        assert not any(own == a and name.startswith(b) for a, b in APART), f"{own} and {name} stay apart"


def test_only_runtime_touches_torch_distributed():
    users = [path.name for path in MODULES if "torch.distributed" in path.read_text().replace('"""', "")]
    assert users == ["runtime.py"]


def test_no_file_is_a_drawer():
    assert not [path for path in MODULES if path.stem in ("utils", "helpers", "common", "misc")]


def test_importing_twofold_is_cheap_and_changes_nothing():
    script = """
import json, os, random, sys, time
before = dict(os.environ), random.getstate()
import twofold, twofold.cli
heavy = [m for m in ("torch", "timm", "transformers", "chromadb", "onnxruntime", "torchvision") if m in sys.modules]
print(json.dumps([heavy, (dict(os.environ), random.getstate()) == before]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], True]


def test_every_public_name_is_there():
    assert sorted(twofold._PUBLIC) == sorted(twofold.__all__)
    for name in twofold.__all__:
        assert getattr(twofold, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        twofold.nothing_such  # noqa: B018
