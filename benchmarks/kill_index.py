"""Does an index that was killed at a random moment and resumed equal the one that nobody disturbed? Item by item.

    python benchmarks/kill_index.py            # 20 kills, five minutes on two quiet cores

Undisturbed runs say how long one takes, and when it begins to write: at its first file of vectors. Each trial starts
`twofold index` on an empty folder and kills it (SIGKILL) at a random moment: of every second trial anywhere in the run,
of the others while it writes. These times are cut into equal parts, and each trial's moment is uniform in one of them,
so that none is left out. Then it is run again, and compared: ids, content keys, columns, vectors, and `twofold index
--check`. A run that was over before its moment counts for nothing and is tried again. Trials that are in the results
already are not run again.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from twofold.data.vectors import Vectors
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.retrieve.check import check
from twofold.retrieve.snapshot import read_head, read_items

RESULTS = Path(__file__).parent / "results" / "kill_index.json"
ITEMS, KILLS = 4000, 20


class Phases(NamedTuple):
    """Seconds from the start of a run until its first file of vectors, its store, its index.json, and its end."""

    writes: float
    stores: float
    publishes: float
    ends: float


def make(home: Path) -> None:
    """Pictures of coarse coloured squares, and a small untrained model."""
    (home / "photos").mkdir()
    draw = np.random.default_rng(0)
    for n in range(ITEMS):
        squares = draw.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(squares).resize((64, 64), Image.Resampling.NEAREST).save(home / "photos" / f"{n:05}.png")
    torch.manual_seed(0)
    Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)}).save(home / "model")


def start(home: Path, out: Path) -> subprocess.Popen:
    run = "import sys; from twofold.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "index", home / "photos", "--model", home / "model", "--out", out]
    environment = os.environ | {"TWOFOLD_CACHE": str(home / "cache")}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def there(out: Path) -> dict[str, Any]:
    """What of an index is on the disk."""
    return {
        "files of vectors": len(list((out / "vectors").rglob("*.arrow"))),
        "store": (out / "chroma").exists(),
        "published": (out / "index.json").exists(),
    }


def undisturbed(home: Path, out: Path) -> Phases:
    began, seen = time.monotonic(), dict[str, float]()
    process = start(home, out)
    while process.poll() is None:
        for what, is_there in there(out).items():
            if is_there:
                seen.setdefault(what, time.monotonic() - began)
        time.sleep(0.02)
    assert process.returncode == 0
    return Phases(*seen.values(), time.monotonic() - began)


def content(out: Path) -> tuple[dict, np.ndarray]:
    head = read_head(out)
    items = dict(sorted(read_items(out, head).items()))
    return items, Vectors(out / "vectors", head.fingerprint, head.dim).get([item.key for item in items.values()])


def killed(home: Path, out: Path, share: float, phases: Phases, *, writing: bool) -> tuple[dict[str, Any], Phases]:
    """A run killed after a share of an undisturbed one's time, or of its time of `writing`, from its first file on.

    And how long an undisturbed one is, where the run was over before.
    """
    while True:
        shutil.rmtree(out, ignore_errors=True)
        began, process = time.monotonic(), start(home, out)
        while writing and process.poll() is None and not there(out)["files of vectors"]:
            time.sleep(0.01)
        try:
            process.wait(share * (phases.ends - phases.writes * writing))
        except subprocess.TimeoutExpired:
            process.kill()
            after = time.monotonic() - began
            assert process.wait() == -9
            then = there(out)
            return {"killed after s": round(after, 2), "of s": round(phases.ends, 2), "then": then}, phases
        shrunk = (time.monotonic() - began) / phases.ends  # the machine has become faster
        phases = Phases(*(shrunk * seconds for seconds in phases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"trials (default: {KILLS})")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {"trials": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home)
        undisturbed(home, home / "warm")  # fills the cache with the exported encoder
        phases = undisturbed(home, home / "whole")
        items, vectors = content(home / "whole")
        record |= {
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "versions": {name: version(name) for name in ("torch", "chromadb", "numpy")},
            "n": f"{ITEMS} pictures, {given.kills} kills",
            "undisturbed, s": {name: round(value, 1) for name, value in phases._asdict().items()},
        }
        for seed in range(len(record["trials"]), given.kills):
            out = home / f"trial{seed}"
            share = (seed // 2 + random.Random(seed).random()) / -(-given.kills // 2)
            trial, phases = killed(home, out, share, phases, writing=bool(seed % 2))
            assert start(home, out).wait() == 0, f"trial {seed} did not resume"
            again, found = content(out)
            trial |= {
                "items equal": again == items,
                "largest difference of a vector": float(np.abs(found - vectors).max()),
                "whole": check(out).whole,
            }
            record["trials"].append({"seed": seed, **trial})
            given.out.write_text(json.dumps(record, indent=1) + "\n")
            print(trial, flush=True)
            shutil.rmtree(out)
    good = sum(t["items equal"] and t["whole"] and t["largest difference of a vector"] < 1e-4 for t in record["trials"])
    writing = sum(t["then"]["files of vectors"] > 0 for t in record["trials"])
    record["summary"] = {"trials": len(record["trials"]), "equal": good, "killed while writing": writing}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['summary']}. Written to {given.out}")


if __name__ == "__main__":
    main()
