"""Does SimCLR learn something on CIFAR-10 in ten minutes on a CPU? kNN against raw pixels and the untrained encoder.

    python benchmarks/cifar10_simclr.py CIFAR10_FOLDER        # two seeds, about eight minutes each on two cores

The folder holds train.parquet and test.parquet. 10,000 training pictures, last epoch, 10,000 test pictures; the probes'
bank is the same 10,000 pictures, not augmented. Interrupted, it goes on where it was.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from twofold.data.sources import open_source
from twofold.measure.evaluate import evaluate
from twofold.models.bundle import Bundle
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, train

RESULTS = Path(__file__).parent / "results" / "cifar10_simclr.json"
ITEMS = 10_000
# A ResNet-18 of half the width with its ImageNet stem: 12 million multiply-adds a view, so that there are many epochs.
SETTING = Setting(encoder="timm:resnet18/32", size=32, policy="simclr-cifar", batch=512, epochs=24, limit=ITEMS)
OPTIMIZER = Optimizer(name="adamw", lr=2e-3, weight_decay=1e-4, warmup=38)
OPTIONS = {"temperature": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_simclr"))
    arguments = parser.parse_args()
    data = open_source(arguments.data)
    rows = []
    for seed in arguments.seeds:
        out = arguments.runs / str(seed)
        setting = Setting(**{**vars(SETTING), "seed": seed})
        run = train("simclr", data, out=out, setting=setting, optimizer=OPTIMIZER, options=OPTIONS)
        measured = evaluate(Bundle.load(out), data, limit=ITEMS, baselines=True)
        assert measured.labels is not None
        rows.append(
            {
                "seed": seed,
                "steps": run.steps,
                "seconds": round(run.log[-1]["seconds"]),
                "loss": run.log[-1]["loss"],
                "chance": run.log[-1]["chance"],
                "rank": run.log[-1]["rank"],
                **{
                    name: {"knn": probes.knn.accuracy._asdict(), "linear": probes.linear.accuracy._asdict()}
                    for name, probes in measured.labels.items()
                },
            }
        )
        for name, (knn, linear) in measured.labels.items():
            print(f"seed {seed} {name:<10} kNN {knn.accuracy}  linear {linear.accuracy}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {
                "question": "kNN (k 20, T .07) and linear accuracy on CIFAR-10's test pictures after SimCLR on 10,000 "
                "training pictures",
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
                "n": {"train": ITEMS, "test": 10_000, "seeds": len(rows)},
                "setting": {**vars(SETTING), **vars(OPTIMIZER), **OPTIONS},
                "results": rows,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
