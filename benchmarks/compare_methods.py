"""Which method suits aerial scenes, and which chest X-rays, in eight epochs of a small network on two cores?

    python benchmarks/compare_methods.py rsscn7 FOLDER      # some minutes; interrupted, it goes on where it was
    python benchmarks/compare_methods.py xray FOLDER

What `twofold compare FOLDER` does with these settings: every method that pictures and their labels are enough for, the
same views, batches, steps and optimiser, measured on the split "test" once, after the last epoch.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from twofold.cli.compare import summary
from twofold.data.sources import open_source
from twofold.train.compare import OPTIMIZER, SETTING, compare
from twofold.train.compare_page import page

RESULTS = Path(__file__).parent / "results"
# Aerial scenes of seven kinds, and X-rays of chests with and without pneumonia; patches so that a side has 8 and 7.
SETTINGS = {
    "rsscn7": replace(SETTING, size=40, policy="satellite", epochs=8),
    "xray": replace(SETTING, size=28, channels=1, policy="xray", epochs=8),
}
TRANSFORMERS = {"rsscn7": "timm:vit_tiny_patch16_224/5x96x6", "xray": "timm:vit_tiny_patch16_224/4x96x6"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    name, setting = arguments.name, SETTINGS[arguments.name]
    out = arguments.runs / f"compare_{name}"
    transformer = TRANSFORMERS[name]
    done = compare(
        [], open_source(arguments.data), out=out, setting=setting, transformer=transformer, seeds=arguments.seeds
    )._replace(data=name)
    print("\n".join([*done.verdict, *done.caveats]))
    (out / "compare.html").write_text(page(done), "utf-8")
    figures = {
        "question": f"What {setting.epochs} epochs of each method are worth on {name}, by probes on held-out pictures",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
        "versions": {package: version(package) for package in ("torch", "timm", "twofold")},
        "n": {"train": done.items, "test": done.held_out, "seeds": len(arguments.seeds)},
        "setting": {**asdict(setting), "transformer": transformer, "optimizer": asdict(OPTIMIZER)},
        "results": summary(done),
    }
    (RESULTS / f"compare_{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
