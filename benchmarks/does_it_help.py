"""Does pretraining help on aerial scenes? Own pretraining and ImageNet's weights, against none; frozen and trained on.

    python benchmarks/does_it_help.py run RSSCN7_FOLDER --only "untrained" "own pretraining"    # resumable, row by row
    python benchmarks/does_it_help.py read

Own pretraining is SimCLR on the 2,240 training pictures, under the policy for satellite pictures. Everything is tested
once on the 560 test pictures. Fine-tuning trains encoder and classifier for five epochs; its learning rate is chosen on
a fifth of the training pictures, for every row from the same two.
"""

import argparse
import fcntl
import json
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from twofold import runtime
from twofold.cli.show import plain
from twofold.data.atomic import write_atomically
from twofold.data.sources import open_source
from twofold.measure.labelled import labelled
from twofold.measure.metrics import paired
from twofold.models.bundle import Bundle
from twofold.models.encoders import Encoder, image_encoder
from twofold.models.heads import Head
from twofold.train.compare import OPTIMIZER, SETTING
from twofold.train.fine_tune import fine_tune
from twofold.train.train import train

RESULTS = Path(__file__).parent / "results" / "does_it_help.json"
SMALL, EPOCHS, TUNED = replace(SETTING, size=40, policy="satellite"), 20, 5
SIDE = 48
ROWS = ("untrained", "own pretraining", "ImageNet weights", "ImageNet weights, 224 px")


def encoder_of(row: str, folder: Path, data: Any) -> Encoder:
    torch.manual_seed(runtime.seed_of(0, "weights"))
    if row == "own pretraining":
        setting = replace(SMALL, epochs=EPOCHS)
        options = {"head": Head(2, 512, 128), "temperature": 0.2}
        train("simclr", data, out=folder / "simclr", setting=setting, optimizer=OPTIMIZER, options=options)
        return Bundle.load(folder / "simclr").towers["image"].encoder
    if row == "untrained":
        return image_encoder(SMALL.encoder, size=SMALL.size)
    return image_encoder("efficientnet-lite0", size=None if "224" in row else SIDE)


def run(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    data = open_source(str(asked.folder))
    parts = data.split("train"), data.split("test")
    asked.runs.mkdir(parents=True, exist_ok=True)
    path = asked.runs / "lines.jsonl"
    done = {json.loads(line)["row"] for line in path.read_text().splitlines()} if path.exists() else set()
    for row in asked.only or ROWS:
        if row in done:
            continue
        started = time.monotonic()
        model = encoder_of(row, asked.runs, data)
        found = labelled({row: model}, parts, "image", quiet=True)[row]
        took = time.monotonic() - started
        if "224" not in row:
            found = found._replace(fine_tuned=fine_tune(model, *parts, epochs=TUNED, quiet=True))
        few = {**found.few.accuracy, **found.shares.accuracy}
        tuned = ["fine_tuned"] if found.fine_tuned is not None else []
        names = ["knn", "linear", *(str(k) for k in few), *tuned]
        intervals = {"knn": found.knn.accuracy, "linear": found.linear.accuracy, **few}
        intervals |= {"fine_tuned": found.fine_tuned.accuracy} if found.fine_tuned else {}
        line = {
            "row": row,
            "seconds": round(took),
            "with fine-tuning": round(time.monotonic() - started),
            "rate": found.fine_tuned and found.fine_tuned.l2,
            "intervals": plain(intervals),
            "spread": plain({**found.few.spread, **found.shares.spread}),
            "map": plain(found.found and found.found.map),
            "nmi": plain(found.clusters and found.clusters.nmi),
            "right": {name: found.right(name).tolist() for name in names},
        }
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line) + "\n")
        print(row, line["intervals"], flush=True)


def read(asked: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (asked.runs / "lines.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: ROWS.index(row["row"]))
    by = {row["row"]: row["right"] for row in rows}
    gaps = {}
    for one, other in (("own pretraining", "untrained"), ("ImageNet weights", "own pretraining")):
        if one in by and other in by:
            gaps[f"{one} − {other}"] = {
                name: plain(paired(by[one][name], by[other][name])) for name in by[one] if name in by[other]
            }
    frame = {
        "question": "RSSCN7: accuracy of frozen features, of few labels and fine-tuned, by where the weights come from",
        "machine": f"{platform.machine()}, 1 thread a row, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
        "n": {"train": 2240, "test": 560, "seeds": 1},
        "setting": {
            "encoder": SMALL.encoder,
            "size": SMALL.size,
            "epochs": EPOCHS,
            "fine-tuned epochs": TUNED,
            "Lite0": SIDE,
        },
        "results": [{key: value for key, value in row.items() if key != "right"} for row in rows],
        "paired differences": gaps,
    }
    write_atomically(asked.out, lambda path: path.write_text(json.dumps(frame, indent=1, ensure_ascii=False) + "\n"))
    for name, found in gaps.items():
        for probe, gap in found.items():
            print(f"{name:45} {probe:12} {gap['gap']} p {gap['p']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/does_it_help"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    verbs = parser.add_subparsers(required=True)
    running = verbs.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--only", nargs="*", choices=ROWS)
    running.set_defaults(run=run)
    verbs.add_parser("read").set_defaults(run=read)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
