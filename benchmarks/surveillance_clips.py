"""Fight or no fight? What V-JEPA reads in two hundred clips of surveillance cameras, beside frames seen one by one.

    python benchmarks/surveillance_clips.py CLIPS_FOLDER              # three seeds; half an hour of one thread
    python benchmarks/surveillance_clips.py CLIPS_FOLDER --steps 2 --seeds 0 --runs /tmp/a --out /tmp/a.json  # tiny

The folder holds labels.csv and clips/, sheets of 16 frames. V-JEPA learns from the 192 training clips without their
labels: behind the paper's tubes, and from the first half of a clip what comes in the second; with and without pixels
beside its tokens. Then an attentive probe of its tokens, and a linear one of their average, learn from the same clips
with their labels, and answer for 48 clips of other cameras: beside the same transformer untrained, and beside an
ImageNet network that sees each frame by itself, three times as large. Rates and shapes are those that were chosen for
`vjepa_motion.py`, on emoji: nothing is chosen here. Intervals draw test clips, the seeds' answers for one of them
together. What was interrupted goes on.
"""

import argparse
import csv
import json
import platform
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.data.video import Sheet, watch
from twofold.measure.metrics import Interval, bootstrap
from twofold.measure.probes import attentive_probe, linear_probe
from twofold.methods import VJEPA
from twofold.models.clips import ClipEncoder, FrameTokens
from twofold.models.encoders import encoder, image_encoder, inference
from twofold.models.predictor import Blocks
from twofold.models.tokens import centred
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import IJEPA, Policy

RESULTS = Path(__file__).parent / "results" / "surveillance_clips.json"
ENCODER, SIZE, LARGE, FRAMES, BATCH = "timm:vit_tiny_patch16_224/8x64x3", 32, 96, 16, 16
CROP = Policy(**{**asdict(IJEPA), "size": SIZE})
OPTIONS: dict[str, Any] = {"predictor": Blocks(2, 64, 4), "frames": FRAMES, "stride": 1, "momentum": 0.99}
OPTIMIZER = Optimizer(lr=2e-3, weight_decay=0.05, warmup=50)
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)
LEARNED: dict[str, dict[str, float]] = {
    "future+pixels": {"future": 0.5, "pixels": 1.0},
    "future": {"future": 0.5},
    "tubes+pixels": {"pixels": 1.0},
    "tubes": {},
}
MODELS = ("frames", "untrained", *LEARNED)


class Clips:
    """A split: pixels [n, frames, 3, size, size] of uint8, labels, and from which video each was cut."""

    def __init__(self, folder: Path, split: str, size: int):
        with open(folder / "labels.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        clips = [watch(Sheet(folder / "clips" / row["filename"], 4, 4), size) for row in rows]
        self.pixels = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).contiguous()
        self.labels = np.array([int(row["label"]) for row in rows])
        self.sources = [row["source"] for row in rows]


def make(seed: int, **options: float) -> VJEPA:
    torch.manual_seed(runtime.seed_of(seed, "weights"))
    picture = centred(image_encoder(ENCODER, size=SIZE))
    return VJEPA(picture, policies=(CROP,), **OPTIONS, **options)


def tokens_of(model: Any, clips: torch.Tensor) -> torch.Tensor:
    with inference(model):
        return torch.cat([model(some.float() / 255) for some in clips.split(16)])


def probed(x: dict[str, torch.Tensor], y: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Accuracies, and of each test clip whether the answer was right."""
    mean = {name: tokens.mean(1) for name, tokens in x.items()}
    draw = runtime.generator(seed, "probe")
    found = {
        "attentive": attentive_probe(x["train"], y["train"], x["test"], y["test"], epochs=40, l2=PENALTIES, draw=draw),
        "linear": linear_probe(mean["train"], y["train"], mean["test"], y["test"], l2=PENALTIES, draw=draw),
    }
    return {
        name: {
            "accuracy": round(probe.accuracy.value, 4),
            "right": "".join(str(int(hit)) for hit in probe.predicted == y["test"]),
        }
        for name, probe in found.items()
    }


def learned(name: str, seed: int, train: Clips, *, steps: int, out: Path) -> tuple[Any, dict[str, Any]]:
    method = make(seed, **LEARNED[name])
    batches = Batches({"video": train.pixels}, batch=BATCH, seed=seed)
    run = fit(method, batches, steps=steps, out=out, optimizer=OPTIMIZER, seed=seed)
    tower = method.towers()["video"]
    assert isinstance(tower, ClipEncoder)
    return tower.tokens, {name: round(run.log[-1][name], 4) for name in ("loss", "target_variance", "rank")}


def summary(rows: list[dict[str, Any]], labels: np.ndarray) -> dict[str, Any]:
    """Of each model the mean over seeds, an interval over test clips, and its gaps to what learned nothing."""

    def right(model: str, probe: str) -> np.ndarray:
        return np.mean([[int(hit) for hit in row[probe]["right"]] for row in rows if row["model"] == model], axis=0)

    found: dict[str, Any] = {"chance": round(max(labels.mean(), 1 - labels.mean()), 4)}
    for model in dict.fromkeys(row["model"] for row in rows):
        for probe in ("attentive", "linear"):
            cell: dict[str, Any] = {"accuracy": told(bootstrap(right(model, probe)))}
            cell["seeds"] = [row[probe]["accuracy"] for row in rows if row["model"] == model]
            for other in ("untrained", "frames") if model in LEARNED else ():
                if any(row["model"] == other for row in rows):
                    cell[f"above {other}"] = told(bootstrap(right(model, probe) - right(other, probe)))
            found.setdefault(model, {})[probe] = cell
    return found


def told(value: Interval) -> dict[str, float]:
    return {name: round(number, 4) for name, number in value._asdict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="default: 800")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runs", type=Path, default=Path("runs/surveillance_clips"))
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = {name: Clips(given.data, name, SIZE) for name in ("train", "test")}
    assert not set(parts["train"].sources) & set(parts["test"].sources), "A video stands in both splits."
    setting = {"encoder": ENCODER, "size": SIZE, "frames": FRAMES, "batch": BATCH, "steps": given.steps}
    held = json.loads(given.out.read_text()) if given.out.exists() else {"setting": setting, "results": []}
    if held["setting"] != setting:
        raise SystemExit(f"{given.out} is of another setting: {held['setting']}. Give another --out, or remove it.")
    rows: list[dict[str, Any]] = held["results"]
    labels = {name: part.labels for name, part in parts.items()}

    @cache
    def frames() -> dict[str, torch.Tensor]:
        network = FrameTokens(encoder("efficientnet-lite0"))  # type: ignore[arg-type]
        return {name: tokens_of(network, Clips(given.data, name, LARGE).pixels) for name in parts}

    for seed in given.seeds:
        for name in given.models:
            if (name, seed) in [(row["model"], row["seed"]) for row in rows]:
                continue
            about: dict[str, Any] = {}
            if name == "frames":
                x = frames()
            else:
                model = make(seed).tokens
                if name in LEARNED:
                    place = given.runs / name / str(seed)
                    model, about = learned(name, seed, parts["train"], steps=given.steps, out=place)
                x = {split: tokens_of(model, part.pixels) for split, part in parts.items()}
            row = probed(x, labels, seed)
            rows.append({"model": name, "seed": seed, **about, **row})
            rows.sort(key=lambda row: (MODELS.index(row["model"]), row["seed"]))
            record = {
                "question": "fight or no fight, of 48 clips from other cameras, read from frozen tokens",
                "machine": f"{platform.machine()}, one thread, no GPU",
                "versions": {package: version(package) for package in ("torch", "timm", "twofold")},
                "setting": setting,
                "test clips": len(labels["test"]),
                "summary": summary(rows, labels["test"]),
                "results": rows,
            }
            text = json.dumps(record, indent=1) + "\n"
            write_atomically(given.out, lambda path, text=text: path.write_text(text))
            print(name, seed, about, {probe: row[probe]["accuracy"] for probe in ("attentive", "linear")}, flush=True)
    print(json.dumps(summary(rows, labels["test"]), indent=1))
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
