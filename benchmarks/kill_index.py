"""Does an index that was killed at a random moment and resumed equal the one that nobody disturbed? Item by item.

    python benchmarks/kill_index.py            # 20 kills, a few minutes on two cores

Each trial starts `twofold index` on an empty folder, kills it (SIGKILL) at a moment drawn between start and the end of
an undisturbed run, runs it again, and compares: ids, content keys, columns, vectors, and `twofold index --check`.
Trials that are in the results already are not run again.
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

import numpy as np
import torch
from PIL import Image

from twofold.data.vectors import Vectors
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.retrieve.check import check
from twofold.retrieve.index import read_head, read_items

RESULTS = Path(__file__).parent / "results" / "kill_index.json"
ITEMS, KILLS = 3000, 20


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


def content(out: Path) -> tuple[dict, np.ndarray]:
    head = read_head(out)
    items = dict(sorted(read_items(out, head).items()))
    return items, Vectors(out / "vectors", head.fingerprint, head.dim).get([item.key for item in items.values()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"trials (default: {KILLS})")
    given = parser.parse_args()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"trials": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home)
        assert start(home, home / "warm").wait() == 0  # fills the cache with the exported encoder
        began = time.monotonic()
        assert start(home, home / "whole").wait() == 0
        whole_s = time.monotonic() - began
        items, vectors = content(home / "whole")
        for seed in range(len(record["trials"]), given.kills):
            after = random.Random(seed).uniform(0, whole_s)
            out = home / f"trial{seed}"
            process = start(home, out)
            time.sleep(after)
            process.kill()
            killed = process.wait() == -9
            kept = len(list((out / "vectors").rglob("*.arrow"))) if out.exists() else 0
            published = (out / "index.json").exists()
            assert start(home, out).wait() == 0, f"trial {seed} did not resume"
            again, found = content(out)
            trial = {
                "seed": seed,
                "killed_after_s": round(after, 2),
                "killed": killed,
                "vector_files_then": kept,
                "published_then": published,
                "items_equal": again == items,
                "largest_difference_of_a_vector": float(np.abs(found - vectors).max()),
                "whole": check(out).whole,
            }
            record["trials"].append(trial)
            record |= {
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
                "versions": {name: version(name) for name in ("torch", "chromadb", "numpy")},
                "n": f"{ITEMS} pictures, undisturbed {whole_s:.1f} s",
            }
            RESULTS.write_text(json.dumps(record, indent=2) + "\n")
            print(trial, flush=True)
            shutil.rmtree(out)
    good = sum(t["items_equal"] and t["whole"] and t["largest_difference_of_a_vector"] < 1e-4 for t in record["trials"])
    print(f"{good} of {len(record['trials'])} equal. Written to {RESULTS}")


if __name__ == "__main__":
    main()
