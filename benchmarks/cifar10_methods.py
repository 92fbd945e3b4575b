"""What does each method learn on CIFAR-10 in three minutes of one CPU thread? Against pixels and an untrained encoder.

    python benchmarks/cifar10_methods.py CIFAR10_FOLDER                    # all methods, two seeds: an hour and a half
    python benchmarks/cifar10_methods.py CIFAR10_FOLDER --methods byol moco --seeds 0
    python benchmarks/cifar10_methods.py CIFAR10_FOLDER --limit 600 --epochs 1 --runs /tmp/a --out /tmp/a.json   # tiny

The folder holds train.parquet and test.parquet. Every method gets the same 10,000 training pictures, encoder with the
same first weights, views, batches and steps; what it has of its own stands in RECIPES. Measured once, after the last
epoch, on all 10,000 test pictures, none of them augmented; the probes' bank are the training pictures. Results are kept
run by run: what the file has is not measured again, and a run that was interrupted goes on. Several of these commands
may share one file.
"""

import argparse
import fcntl
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.cache import decoded
from twofold.data.loader import Batches
from twofold.data.sources import open_source
from twofold.measure.collapse import effective_rank
from twofold.measure.probes import knn_probe, linear_probe
from twofold.methods import METHODS, Method
from twofold.models.encoders import ImageEncoder, image_encoder, inference
from twofold.models.heads import Head
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR

RESULTS = Path(__file__).parent / "results" / "cifar10_methods.json"
ENCODER = "timm:resnet18/16"  # a quarter of the usual width, its ImageNet stem: 3 million multiply-adds a view
BATCH, EPOCHS, ITEMS = 256, 10, 10_000
OPTIMIZER = Optimizer(lr=3e-3, warmup=39)  # an epoch of warm-up
CURVE_EVERY, CURVE_BANK, CURVE_TEST = 2, 2_000, 1_000  # epochs; pictures of the quick look that draws the curve


class Recipe(NamedTuple):
    """What a method has of its own: heads of 512 for speed, and what a run of 390 steps asks for."""

    options: Mapping[str, Any]
    optimizer: Optimizer = OPTIMIZER


SMALL = Head(2, 512, 128)
RECIPES: dict[str, Recipe] = {
    "simclr": Recipe({"head": SMALL, "temperature": 0.2}),
    "dcl": Recipe({"head": SMALL, "temperature": 0.2}),
    # With momentum .999 the key encoder would be the mean of the last 1,000 steps, of which there are 390.
    "moco": Recipe({"head": Head(2, 512, 128, norm="none"), "queue": 4096, "momentum": 0.99}),
    "mocov3": Recipe({"head": Head(2, 512, 128, last_norm=True), "predictor": SMALL, "momentum": 0.97}),
    "byol": Recipe({"head": SMALL, "predictor": SMALL, "momentum": 0.97}),  # BYOL's own start for 40 epochs
    "simsiam": Recipe({"head": Head(3, 512, 512, last_norm=True), "predictor": Head(2, 128, 512)}),
    "barlow": Recipe({"head": Head(3, 512, 512)}),
    "vicreg": Recipe({"head": Head(3, 512, 512)}),
    "lejepa": Recipe({"head": Head(3, 512, 64), "directions": 256}),
    # These two see labels.
    "supcon": Recipe({"head": Head(2, 512, 128, norm="none")}),
    "triplet": Recipe({"head": Head(1, dim=128)}),
}


@dataclass(frozen=True)
class Part:
    """A split: pictures [n, 3, 32, 32] of uint8 and their labels."""

    pixels: torch.Tensor
    labels: np.ndarray

    def first(self, n: int) -> "Part":
        return Part(self.pixels[:n], self.labels[:n])


def load(folder: Path, split: str, limit: int) -> Part:
    source = open_source(folder).split(split)
    source = source.take(range(min(limit, len(source))))
    assert source.labels is not None
    return Part(torch.tensor(decoded(source, 32).pixels), source.labels)


def features(encoder: ImageEncoder, part: Part) -> np.ndarray:
    with inference(encoder):
        return torch.cat([encoder(pixels.float() / 255) for pixels in part.pixels.split(500)]).numpy()


def centred(part: Part, train: Part) -> np.ndarray:
    """Pixels around the training mean: cosines of raw ones mostly compare brightness."""
    pixels, mean = part.pixels.flatten(1).float(), train.pixels.flatten(1).float().mean(0)
    return (pixels - mean).numpy()


def encoder_of(method: Method) -> ImageEncoder:
    encoder = method.towers()["image"]
    assert isinstance(encoder, ImageEncoder)
    return encoder


def probed(train: Part, test: Part, train_z: np.ndarray, test_z: np.ndarray) -> dict[str, Any]:
    sets = train_z, train.labels, test_z, test.labels
    found = {"knn": knn_probe(*sets).accuracy, "linear": linear_probe(*sets).accuracy}
    return {name: {key: round(x, 4) for key, x in value._asdict().items()} for name, value in found.items()} | {
        "rank": round(effective_rank(test_z), 1)
    }


def make(name: str, seed: int, options: Mapping[str, Any]) -> Method:
    torch.manual_seed(runtime.seed_of(seed, "weights"))
    encoder = image_encoder(ENCODER, size=32)  # drawn first, so the same for every method
    return METHODS[name](encoder, policies=(SIMCLR_CIFAR, SIMCLR_CIFAR), **options)


def measure(name: str, seed: int, train: Part, test: Part, *, epochs: int, out: Path) -> dict[str, Any]:
    """Train one method with one seed, or go on with it, and measure what it learned."""
    recipe = RECIPES[name]
    method = make(name, seed, recipe.options)
    columns: dict[str, Any] = {"image": train.pixels, "label": train.labels}
    batches = Batches(
        {column: columns[column] for column in method.needs}, batch=min(BATCH, len(train.labels)), seed=seed
    )
    bank, quick = train.first(CURVE_BANK), test.first(CURVE_TEST)

    def knn(method: Method) -> float:
        encoder = encoder_of(method)
        rows = features(encoder, bank), bank.labels, features(encoder, quick), quick.labels
        return knn_probe(*rows).accuracy.value

    run = fit(
        method,
        batches,
        steps=epochs * batches.steps_per_epoch,
        out=out,
        optimizer=recipe.optimizer,
        seed=seed,
        save_every=CURVE_EVERY * batches.steps_per_epoch,
        probes={"knn": knn},
        record={"encoder": ENCODER, "items": len(train.labels), "options": plain(recipe.options)},
    )
    trained = [line for line in run.log if "loss" in line]
    # Each call counts its seconds from its own start: what is between two lines of one call.
    paces = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(trained)]
    curve = [(line["step"] / batches.steps_per_epoch, line["knn"]) for line in run.log if "knn" in line]
    encoder = encoder_of(method)
    return {
        "method": name,
        "seed": seed,
        "labels": "label" in method.needs,
        "recipe": plain(recipe._asdict()),
        "steps": run.steps,
        "seconds_per_step": round(statistics.median([pace for pace in paces if pace > 0] or [0.0]), 3),
        **{key: round(trained[-1][key], 4) for key in ("loss", "chance") if key in trained[-1]},
        **probed(train, test, features(encoder, train), features(encoder, test)),
        "curve": [[round(epoch, 2), round(value, 3)] for epoch, value in curve],
    }


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return {key: plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


class Results:
    """The file of results, which several processes may fill: each row is put into what the file holds by then."""

    def __init__(self, path: Path, lock: Path, frame: Mapping[str, Any]):
        self.path, self.lock, self.frame = path, lock, dict(frame)
        lock.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        """What was measured under this very setting; SystemExit where the file is of another."""
        if not self.path.exists():
            return []
        held = json.loads(self.path.read_text())
        if held["setting"] != self.frame["setting"]:
            raise SystemExit(f"{self.path} is of another setting: {held['setting']}. Give another --out, or remove it.")
        return held["results"]

    def add(self, row: Mapping[str, Any]) -> None:
        with open(self.lock, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            key = row["method"], row["seed"]
            rows = [*(held for held in self.rows() if (held["method"], held["seed"]) != key), dict(row)]
            order = [*BASELINES, *RECIPES]
            rows.sort(key=lambda row: (order.index(row["method"]), row["seed"]))
            text = json.dumps({**self.frame, "results": rows}, indent=1) + "\n"
            write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def missing(self, method: str, seed: int) -> bool:
        recipe = plain(RECIPES[method]._asdict()) if method in RECIPES else None
        return (method, seed, recipe) not in [(row["method"], row["seed"], row.get("recipe")) for row in self.rows()]


BASELINES = ("pixels", "untrained")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("method", "kNN", "linear", "rank", "s/step", "kNN over the epochs, quick look", "seeds")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]

        def mean(*path: str, own: Sequence[Mapping[str, Any]] = own) -> str:
            values = [row[path[0]][path[1]] if len(path) == 2 else row[path[0]] for row in own if path[0] in row]
            digits = 3 if len(path) == 2 or path[0] != "rank" else 0
            return f"{statistics.mean(values):.{digits}f}" if values else ""

        curves = zip(*([value for _, value in row.get("curve", [])] for row in own), strict=True)
        curve = " ".join(f"{statistics.mean(values):.2f}" for values in curves)
        shown = f"{name} (labels)" if own[0].get("labels") else name
        cells = (mean("knn", "value"), mean("linear", "value"), mean("rank"), mean("seconds_per_step"), curve)
        table.add_row(shown, *cells, str(len(own)))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=int, default=ITEMS, help=f"pictures to train on (default: {ITEMS})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_methods"))
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, test = load(given.data, "train", given.limit), load(given.data, "test", given.limit)
    frame = {
        "question": "kNN (k 20, T .07) and linear accuracy on CIFAR-10's test pictures, last epoch, by method and seed",
        "machine": f"{platform.machine()}, {given.threads} thread(s), no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
        "n": {"train": len(train.labels), "test": len(test.labels)},
        "setting": {"encoder": ENCODER, "batch": BATCH, "epochs": given.epochs, "policy": asdict(SIMCLR_CIFAR)},
    }
    frame = json.loads(json.dumps(frame))  # tuples as JSON gives them back
    results = Results(given.out, given.runs / "lock", frame)
    for seed in given.seeds:
        if results.missing("pixels", 0):
            rows = (centred(part, train) for part in (train, test))
            results.add({"method": "pixels", "seed": 0, **probed(train, test, *rows)})
        if results.missing("untrained", seed):
            encoder = encoder_of(make("simclr", seed, RECIPES["simclr"].options))
            rows = (features(encoder, part) for part in (train, test))
            results.add({"method": "untrained", "seed": seed, **probed(train, test, *rows)})
        for name in given.methods:
            if results.missing(name, seed):
                out = given.runs / name / str(seed)
                results.add(measure(name, seed, train, test, epochs=given.epochs, out=out))
    show(results.rows())
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
