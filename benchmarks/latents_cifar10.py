"""MAE, I-JEPA or SimCLR? What a small vision transformer learns of CIFAR-10 from each, in the same time of a core.

    python benchmarks/latents_cifar10.py CIFAR10_FOLDER                   # two seeds; about 50 minutes of a quiet core
    python benchmarks/latents_cifar10.py CIFAR10_FOLDER --methods ijepa --seeds 0
    python benchmarks/latents_cifar10.py CIFAR10_FOLDER --limit 300 --epochs 1 --runs /tmp/a --out /tmp/a.json   # tiny

The folder holds train.parquet and test.parquet. Each method trains the same encoder with the same first weights on the
same 10,000 pictures, in batches of the same size. A step of MAE, which computes a quarter of the patches once, costs
four tenths of a step of the others: so each has as many epochs as take about as long. What a method has of its own
stands in RECIPES. Measured once, after the last step, on all 10,000 test pictures, without augmentation: a linear probe
of the average of all tokens and an attentive probe of the tokens, of the last block and of the middle one; beside the
same encoder untrained, and centred pixels. Results are kept run by run; what was interrupted goes on.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cifar10_methods import Part, centred, load
from twofold import runtime, views
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.measure.collapse import effective_rank
from twofold.measure.probes import attentive_probe, linear_probe
from twofold.methods import IJEPA, MAE, Method, SimCLR
from twofold.models.encoders import ImageEncoder, image_encoder, inference
from twofold.models.heads import Head
from twofold.models.predictor import Blocks
from twofold.models.tokens import Tokens
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import Policy
from twofold.views.masks import Rectangles, random

RESULTS = Path(__file__).parent / "results" / "latents_cifar10.json"
ENCODER = "timm:vit_tiny_patch16_224/4x64x4"  # 64 patches of 4 × 4 pixels; 200,000 weights
BATCH, ITEMS = 64, 10_000
OPTIMIZER = Optimizer(lr=1e-3, weight_decay=0.05, warmup=156)  # an epoch of warm-up


class Recipe(NamedTuple):
    """What a method has of its own at this size, beside its defaults."""

    method: type[Method]
    policies: tuple[Policy, ...]
    epochs: int
    options: Mapping[str, Any] = {}
    optimizer: Optimizer = OPTIMIZER


def small(*policies: Policy) -> tuple[Policy, ...]:
    return tuple(replace(policy, size=32) for policy in policies)


_IJEPA = {"predictor": Blocks(1, 64, 2)}
_BLOCKS = {**_IJEPA, "blocks": Rectangles(least=16)}
_AT_RANDOM = {**_IJEPA, "momentum": 0.98, "share": 0.75, "pixels": 3.0}
RECIPES: dict[str, Recipe] = {
    "simclr": Recipe(SimCLR, small(views.SIMCLR_CIFAR) * 2, 7, {"head": Head(2, 512, 128), "temperature": 0.2}),
    "mae": Recipe(MAE, small(views.MAE), 17, {"decoder": Blocks(2, 64, 2)}),
    "ijepa": Recipe(IJEPA, small(views.IJEPA), 10, _BLOCKS),
    "ijepa+pixels": Recipe(IJEPA, small(views.IJEPA), 10, {**_BLOCKS, "pixels": 1.0}),
    "ijepa+pixels, at random": Recipe(IJEPA, small(views.IJEPA), 13, _AT_RANDOM),
}
BASELINES = ("pixels", "untrained")


def tokens_of(encoder: ImageEncoder, part: Part) -> list[torch.Tensor]:
    """The tokens [n, 64, dim] after the middle block and after the last."""
    model = Tokens(encoder)
    with inference(encoder):
        found = [
            model.layers(pixels.float() / 255, [model.depth // 2 - 1, model.depth - 1])
            for pixels in part.pixels.split(500)
        ]
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


def probed(encoder: ImageEncoder, train: Part, test: Part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, x, y in zip(("middle", "last"), tokens_of(encoder, train), tokens_of(encoder, test), strict=True):
        linear = linear_probe(x.mean(1), train.labels, y.mean(1), test.labels)
        attentive = attentive_probe(x, train.labels, y, test.labels, epochs=10, l2=(1e-2, 1e-3, 1e-4))
        found[name] = {"linear": interval(linear), "attentive": interval(attentive)}
    return found | {"rank": round(effective_rank(y.mean(1)), 1)}


def interval(probe: Any) -> dict[str, float]:
    return {name: round(value, 4) for name, value in probe.accuracy._asdict().items()}


def make(name: str, seed: int) -> Method:
    recipe = RECIPES[name]
    torch.manual_seed(runtime.seed_of(seed, "weights"))
    encoder = image_encoder(ENCODER, size=32)  # drawn first, so the same for every method
    kind: Callable[..., Method] = recipe.method
    return kind(encoder, policies=recipe.policies, **recipe.options)


def encoder_of(method: Method) -> ImageEncoder:
    encoder = method.towers()["image"]
    assert isinstance(encoder, ImageEncoder)
    return encoder


def measure(name: str, seed: int, train: Part, test: Part, *, epochs: int | None, out: Path) -> dict[str, Any]:
    """Train one method with one seed, or go on with it, and measure what it learned."""
    method, recipe = make(name, seed), RECIPES[name]
    batches = Batches({"image": train.pixels}, batch=min(BATCH, len(train.labels)), seed=seed)
    run = fit(
        method,
        batches,
        steps=(epochs or recipe.epochs) * batches.steps_per_epoch,
        out=out,
        optimizer=recipe.optimizer,
        seed=seed,
        record={"encoder": ENCODER, "items": len(train.labels), "recipe": plain(recipe)},
    )
    last = run.log[-1]
    watched = {key: round(last[key], 4) for key in ("loss", "chance", "target_variance") if key in last}
    return {
        "method": name,
        "seed": seed,
        "recipe": plain(recipe),
        "steps": run.steps,
        **watched,
        **probed(encoder_of(method), train, test),
        "core_seconds_a_step": core_seconds(method, batches),
    }


def core_seconds(method: Method, batches: Batches) -> float:
    """What a step forward and backward takes of a core, the fastest of five."""
    taken = []
    for step in range(5):
        started = time.process_time()
        method.train()(batches[step], runtime.generator("time")).loss.backward()
        taken.append(time.process_time() - started)
    return round(min(taken), 3)


def quarter() -> dict[str, Any]:
    """Seconds of a step forward and backward of an encoder that sees a quarter of 256 patches, beside all of them."""
    model = Tokens(image_encoder("timm:vit_tiny_patch16_224/4x192x12", size=64))
    x = torch.rand(16, 3, 64, 64, generator=runtime.generator("time"))
    keep, _ = random(16, model.cells, draw=runtime.generator("time"))
    seconds: dict[str, list[float]] = {"all": [], "quarter": []}
    for _ in range(6):
        for name, kept in (("all", None), ("quarter", keep)):
            started = time.process_time()
            model(x, kept).square().mean().backward()
            seconds[name].append(time.process_time() - started)
    best = {name: round(min(times), 3) for name, times in seconds.items()}
    return best | {
        "ratio": round(best["quarter"] / best["all"], 3),
        "encoder": "12 blocks of 192, 256 patches, batch 16",
    }


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, type):
        return value.__name__
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if is_dataclass(value):
        value = asdict(value)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table("", "linear", "attentive", "middle: linear", "attentive", "rank", "seeds")
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]

        def cell(layer: str, probe: str, own: Sequence[Mapping[str, Any]] = own) -> str:
            return " ".join(f"{row[layer][probe]['value']:.3f}" for row in own if probe in row.get(layer, {}))

        cells = [cell(layer, probe) for layer in ("last", "middle") for probe in ("linear", "attentive")]
        table.add_row(name, *cells, f"{statistics.mean(row['rank'] for row in own):.0f}", str(len(own)))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=int, default=ITEMS, help=f"pictures to train on (default: {ITEMS})")
    parser.add_argument("--epochs", type=int, help="default: what RECIPES says")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--runs", type=Path, default=Path("runs/latents_cifar10"))
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, test = load(given.data, "train", given.limit), load(given.data, "test", given.limit)
    setting = {"encoder": ENCODER, "batch": BATCH, "epochs": given.epochs, "train": len(train.labels)}
    held = json.loads(given.out.read_text()) if given.out.exists() else {"setting": setting, "results": []}
    if held["setting"] != setting:
        raise SystemExit(f"{given.out} is of another setting: {held['setting']}. Give another --out, or remove it.")
    rows: list[dict[str, Any]] = held["results"]

    def add(row: dict[str, Any]) -> None:
        rows[:] = [one for one in rows if (one["method"], one["seed"]) != (row["method"], row["seed"])] + [row]
        order = [*BASELINES, *RECIPES]
        rows.sort(key=lambda row: (order.index(row["method"]), row["seed"]))
        record = {
            "question": "accuracy of probes of frozen tokens on CIFAR-10's test pictures, after the last step",
            "machine": f"{platform.machine()}, {given.threads} thread(s), no GPU",
            "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
            "setting": setting,
            "seconds_of_a_quarter": held.get("seconds_of_a_quarter") or quarter(),
            "results": rows,
        }
        held.update(record)
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(given.out, lambda temporary: temporary.write_text(text))

    def missing(name: str, seed: int) -> bool:
        recipe = plain(RECIPES[name]) if name in RECIPES else None
        return (name, seed, recipe) not in [(row["method"], row["seed"], row.get("recipe")) for row in rows]

    for seed in given.seeds:
        if missing("pixels", 0):
            z = [centred(part, train) for part in (train, test)]
            linear = linear_probe(z[0], train.labels, z[1], test.labels, l2=(1.0, 0.1, 1e-2))
            found = {"last": {"linear": interval(linear)}, "rank": round(effective_rank(np.ascontiguousarray(z[1])), 1)}
            add({"method": "pixels", "seed": 0, **found})
        if missing("untrained", seed):
            add({"method": "untrained", "seed": seed, **probed(encoder_of(make("simclr", seed)), train, test)})
        for name in given.methods:
            if missing(name, seed):
                add(measure(name, seed, train, test, epochs=given.epochs, out=given.runs / name / str(seed)))
    show(rows)
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
