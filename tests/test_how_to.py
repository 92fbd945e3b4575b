"""What the how-to pages show runs, top to bottom, on data like that which they speak of."""

import re
import shlex
import shutil
import sysconfig
import wave
from pathlib import Path

import numpy as np
import pytest

from twofold.cli import main

PAGES = Path(__file__).parents[1] / "docs" / "how-to"


def spoken(folder: Path) -> None:
    """Twelve tones of different heights in `clips/`, each with what it says, and a vector of another model."""
    (folder / "clips").mkdir()
    rows = ["id,speech,transcript,speaker,split"]
    for number in range(1, 13):
        wave_of = np.sin(np.arange(4800) * 0.02 * number)
        with wave.open(str(folder / "clips" / f"{number:04}.ogg"), "wb") as file:  # FFmpeg looks inside
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((wave_of * 9000).astype("<i2").tobytes())
        rows.append(f"{number},clips/{number:04}.ogg,tone number {number},anna,train")
    (folder / "spoken.csv").write_text("\n".join(rows) + "\n")
    np.save(folder / "dino.npy", np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32))


def code(folder: Path) -> None:
    """Some of the standard library in `src/`."""
    (folder / "src").mkdir()
    for module in ("bisect", "calendar", "cmd", "fnmatch", "glob", "heapq", "reprlib", "sched", "shlex", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib"), f"{module}.py"), folder / "src")


@pytest.mark.parametrize("page, data", [("any-modality", spoken), ("code-search", code)])
def test_a_page_runs_and_prints_what_it_says(page, data, tmp_path, monkeypatch, capsys):
    data(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    said = []
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL):
        if language == "python":
            exec(block, names)
            said += [
                line.split("  # ")[1] for line in block.splitlines() if line.startswith("print") and "  # " in line
            ]
        else:
            assert all(main(shlex.split(line)[1:]) == 0 for line in block.strip().splitlines())
    printed = capsys.readouterr().out
    assert said and all(line in printed for line in said)
