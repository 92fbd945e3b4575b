"""Functions and their docstrings: what is read of Python files, and what is not."""

import pytest

from twofold.data.sources import open_source
from twofold.errors import DataError

MODULE = '''
"""A module."""
import os


@cached  # once
def area(width, height):
    """The area of a rectangle.

    In square metres.
    """
    # both are lengths
    return width * height


class Box:
    @property
    def lid(self):
        """What closes it."""
        return self._lid

    @lid.setter
    def lid(self, lid):
        """Close it with something else."""
        self._lid = lid

    def silent(self):
        return 1

    def only_said(self):
        """There is nothing to it."""

    def short(self): """On one line."""; return 2

    async def outer(self):
        """Outside."""
        def inner():
            r"""Inside \\d."""
            return "é"
        return inner
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "box.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b'def f():\n    """caf\xe9"""\n    return 1\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(MODULE, encoding="utf-8")
    return tmp_path


def test_functions_come_with_their_docstrings_and_without_them_in_the_code(folder):
    source = open_source(f"python:{folder}")
    assert source.modalities == {"text": "text", "code": "text"}
    assert list(source.ids) == [
        "a/box.py:area",
        "a/box.py:Box.lid",
        "a/box.py:Box.lid:23",
        "a/box.py:Box.outer",
        "a/box.py:Box.outer.inner",
    ]
    assert source.texts[0] == ["The area of a rectangle.\n\nIn square metres."]
    code = [texts[0] for texts in source.column("code").cells]
    assert code[0] == "@cached  # once\ndef area(width, height):\n    # both are lengths\n    return width * height"
    assert code[4] == 'def inner():\n    return "é"'
    assert source.meta["line"][0] == 7
    assert not any("closes" in text or "Outside" in text for text in code)


def test_what_is_held_out_comes_from_other_files(tmp_path):
    for number in range(30):
        function = f'def f{number}():\n    """Number {number}."""\n    return {number}\n'
        (tmp_path / f"m{number}.py").write_text(function * 2)
    source = open_source(f"python:{tmp_path}")
    assert [list(source.splits).count(name) for name in ("train", "val", "test")] == [48, 6, 6]
    split_of = dict(zip(source.meta["file"], source.splits, strict=True))
    assert all(split_of[file] == split for file, split in zip(source.meta["file"], source.splits, strict=True))
    assert list(open_source(f"python:{tmp_path}").splits) == list(source.splits)


def test_a_folder_without_functions_says_so(tmp_path):
    with pytest.raises(DataError, match="holds no Python function that has a docstring"):
        open_source(f"python:{tmp_path}")
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        open_source("python:nowhere")
