"""Is each failure recognised, and is no healthy training called ill? Trainings made to fail on purpose.

    python benchmarks/diagnosis.py cifar10/ --runs /tmp/diagnosis    # a quarter of an hour of one CPU thread, resumable
    python benchmarks/diagnosis.py rsscn7/ --runs /tmp/diagnosis     # the same on aerial scenes

Every method that learns something from pictures in so short a time trains as in cifar10_methods.py and
latents_cifar10.py, healthy, for sixty steps; then each failure does. Then the doctor reads the log, and looks at 256
pictures that were trained on. The table holds its verdicts, and the evidence of the worst. A failure is recognised
where one of its expected verdicts is among them; a false alarm is any verdict but a good one on a healthy training.
Thresholds were set on CIFAR-10, but for one: benchmarks/results/diagnosis_rsscn7.json showed it to be wrong.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import latents_cifar10
from cifar10_methods import BATCH, ENCODER, OPTIMIZER, RECIPES, Part, load, make, plain
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.data.sources import Source
from twofold.errors import TrainingError
from twofold.methods import Method
from twofold.methods.base import Out
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.models.heads import Head
from twofold.train.doctor import doctor
from twofold.train.hardness import SAMPLE, hardness
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR

RESULTS = Path(__file__).parent / "results"
STEPS, ITEMS, LOOKED_AT = 60, 10_000, 256
COPIED = 64  # pictures of which each comes again and again
WARMUP = 15  # steps
SLOW = {"momentum": 0.95}  # with .99, half of a slow copy would still be its start after so few steps
OPTIONS = {
    name: {**recipe.options, **(SLOW if "momentum" in recipe.options else {})} for name, recipe in RECIPES.items()
}


class Plan(NamedTuple):
    """A training: how its method is made, and which verdicts recognise what is wrong; none, if it is healthy."""

    make: Callable[[int], Method]
    expected: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}  # of the method, as far as the doctor has to know them
    optimizer: Optimizer = replace(OPTIMIZER, warmup=WARMUP)
    batch: int = BATCH
    steps: int = STEPS
    encoder: str = ENCODER
    copies: bool = False  # train on copies of few pictures


def without_stop_gradient(seed: int) -> Method:
    method = make("simsiam", seed, OPTIONS["simsiam"])

    def forward(batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x1, x2 = (policy(batch["image"], draw) for policy in method.policies)
        h1, h2 = method.encoder(x1), method.encoder(x2)
        z1, z2 = method.head(h1), method.head(h2)
        cosine = nn.functional.cosine_similarity
        loss = -(cosine(method.predictor(z1), z2).mean() + cosine(method.predictor(z2), z1).mean()) / 2
        return Out(loss, z=torch.cat((h1, h2)))

    method.forward = forward  # type: ignore[method-assign]
    return method


def with_one_draw(seed: int) -> Method:
    """Both views of a picture are drawn with the same numbers: they differ between pictures, copies or not."""
    method = make("simclr", seed, OPTIONS["simclr"])
    ordinary = method.forward
    first, _ = method.policies

    def forward(batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        noise = draw.get_state()

        def again(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
            draw.set_state(noise)
            return first(images, draw)

        method.policies = first, again
        out = ordinary(batch, draw)
        method.policies = first, first
        return out

    method.forward = forward  # type: ignore[method-assign]
    return method


def with_views(**changes: Any) -> Callable[[int], Method]:
    def made(seed: int) -> Method:
        method = make("simclr", seed, OPTIONS["simclr"])
        view = replace(SIMCLR_CIFAR, **changes)
        method.policies = view, view
        return method

    return made


def changed(name: str, **options: Any) -> Callable[[int], Method]:
    return lambda seed: make(name, seed, {**OPTIONS[name], **options})


def healthy(name: str) -> Plan:
    return Plan(changed(name), (), OPTIONS[name], replace(RECIPES[name].optimizer, warmup=WARMUP))


def of_patches(name: str, expected: tuple[str, ...] = (), *, lr: float = 1e-3, **changes: Any) -> Plan:
    """A quarter of the batch for four times the steps, and for I-JEPA a momentum that fits them."""
    recipe = latents_cifar10.RECIPES[name]
    options = {**recipe.options, **({"momentum": 0.97} if name == "ijepa" else {}), **changes}

    def made(seed: int) -> Method:
        torch.manual_seed(seed)
        kind: Callable[..., Method] = recipe.method
        return kind(image_encoder(latents_cifar10.ENCODER, size=32), policies=recipe.policies, **options)

    optimizer = replace(latents_cifar10.OPTIMIZER, lr=lr, warmup=40)
    return Plan(made, expected, options, optimizer, latents_cifar10.BATCH, 4 * STEPS, latents_cifar10.ENCODER)


COLLAPSED = ("collapsed", "thin sheet", "constant targets")
ALIKE = ("views too alike", "solved early", "positives at 1")
SIMCLR = {"head": OPTIONS["simclr"]["head"], "temperature": 0.2}
FAILURES: dict[str, Plan] = {
    "byol, no predictor, no slow target": Plan(
        changed("byol", predictor=Head(0, dim=128), momentum=0.0),
        COLLAPSED,
        {**OPTIONS["byol"], "predictor": Head(0, dim=128), "momentum": 0.0},
    ),
    "simsiam without stop-gradient": Plan(without_stop_gradient, COLLAPSED, OPTIONS["simsiam"]),
    "vicreg without its variance term": Plan(
        changed("vicreg", variance=0.0, covariance=0.0),
        COLLAPSED,
        {**OPTIONS["vicreg"], "variance": 0.0, "covariance": 0.0},
    ),
    "ijepa in 240 steps": of_patches("ijepa", COLLAPSED),  # its probes are no better than untrained: LOG.md
    "ijepa, no slow target, learning rate 0.01": of_patches("ijepa", COLLAPSED, momentum=0.0, lr=1e-2),
    "simclr, temperature 50": Plan(
        changed("simclr", temperature=50.0), ("temperature too high",), {**SIMCLR, "temperature": 50.0}
    ),
    "simclr, temperature 0.002": Plan(
        changed("simclr", temperature=0.002),
        ("temperature too low", "worse than chance"),
        {**SIMCLR, "temperature": 0.002},
    ),
    "simclr, learning rate 3": Plan(
        changed("simclr"),
        (*COLLAPSED, "rank fell", "stuck at chance"),
        SIMCLR,
        replace(OPTIMIZER, lr=3.0, warmup=WARMUP),
    ),
    "triplet, batch-hard, learning rate 0.03": Plan(
        changed("triplet", mining="batch-hard", labels=False),
        (*COLLAPSED, "stuck at chance"),
        {**OPTIONS["triplet"], "mining": "batch-hard", "labels": False},
        replace(OPTIMIZER, lr=0.03, warmup=WARMUP),
    ),
    "simclr, views without crop and colour": Plan(
        with_views(area=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.0, gray=0.0, blur=0.0), ALIKE, SIMCLR
    ),
    "simclr, crops without colour": Plan(
        with_views(jitter=0.0, gray=0.0), ("colour gives partners away", *ALIKE), SIMCLR
    ),
    "moco, momentum 0.9999": Plan(
        changed("moco", momentum=0.9999), ("target lags",), {**OPTIONS["moco"], "momentum": 0.9999}
    ),
    "simclr, 64 pictures and their copies": Plan(changed("simclr"), ("duplicate data",), SIMCLR, copies=True),
    "simclr, copies, both views from one draw": Plan(
        with_one_draw, ("below what copies allow", "positives at 1"), SIMCLR, copies=True, steps=2 * STEPS
    ),
}
HEALTHY = {name: healthy(name) for name in RECIPES} | {"mae": of_patches("mae")}


def trained(plan: Plan, folder: Path, part: Part, data: str) -> str:
    """Train in `folder`, or go on there, and leave a bundle; what stopped it, if anything did."""
    method = plan.make(0)
    batches = Batches({"image": part.pixels, "label": torch.as_tensor(part.labels)}, batch=plan.batch, seed=0)
    policies: Sequence[Any] = method.policies
    looks = {}
    if "image" in method.heads():
        at = float(plan.options.get("temperature", 0.2))
        looks = {"hardness": hardness(part.pixels[:SAMPLE], policies, temperature=at)}
    record = {
        "data": data,
        "items": len(part.labels),
        "encoder": plan.encoder,
        "size": 32,
        "options": {name: plain(value) for name, value in plan.options.items()},
        "policies": [policy.to_dict() for policy in policies],
    }
    ended = ""
    try:
        fit(
            method,
            batches,
            steps=plan.steps,
            out=folder,
            optimizer=plan.optimizer,
            record=json.loads(json.dumps(record)),
            probes=looks,
            save_every=plan.steps // 6,
            log_every=plan.steps // 18,
            quiet=True,
        )
    except TrainingError as error:
        ended = str(error)
    if not (folder / "bundle").exists():
        Bundle(method.towers(), {"method": type(method).__name__}, heads=method.heads()).save(folder / "bundle")
    return ended


def source_of(part: Part, name: str) -> Source:
    """What the doctor looks at: the first of the pictures that were trained on."""
    few = part.first(LOOKED_AT)
    pictures = [np.ascontiguousarray(picture.permute(1, 2, 0).numpy()) for picture in few.pixels]
    return Source(name, [f"{name}-{k}" for k in range(len(pictures))], images=pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--train-only", action="store_true", help="leave the diagnosis for later")
    parser.add_argument("--out", type=Path, help="default: results/diagnosis_NAME.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    name = asked.folder.resolve().name
    out = asked.out or RESULTS / f"diagnosis_{name}.json"
    part = load(asked.folder, "train", ITEMS)
    order = np.random.default_rng(0).permutation(len(part.labels))  # rsscn7 comes class by class
    part = Part(part.pixels[order], part.labels[order])
    again = np.random.default_rng(1).integers(COPIED, size=len(part.labels))
    copies = Part(part.pixels[again], part.labels[again])
    plans = HEALTHY | FAILURES
    judged = {row["training"]: row for row in json.loads(out.read_text())["results"]} if out.exists() else {}
    for title, plan in plans.items():
        if asked.only and title not in asked.only:
            continue
        folder = asked.runs / name / title.replace(" ", "-").replace(",", "")
        shown = copies if plan.copies else part
        ended = trained(plan, folder, shown, name)
        if asked.train_only:
            print(f"{title:45} {ended}", flush=True)
            continue
        done = doctor(folder, source_of(shown, name), quiet=True)
        said = [v.name for v in done.verdicts if v.tone != "good"]
        right = bool(set(said) & set(plan.expected)) if plan.expected else not said
        judged[title] = {
            "training": title,
            "healthy": not plan.expected,
            "expected": plan.expected,
            "right": right,
            "verdicts": [v._asdict() for v in done.verdicts],
            "stopped": ended,
            "log": done.log[:: max(1, len(done.log) // 12)],
        }
        print(f"{title:45} {'right' if right else 'WRONG'}  {said}", flush=True)
        result = {
            "question": __doc__.split("\n")[0] if __doc__ else "",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
            "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
            "setting": {"data": name, "encoder": ENCODER, "batch": BATCH, "steps": STEPS, "items": len(part.labels)},
            "results": [judged[each] for each in plans if each in judged],
        }
        write_atomically(out, lambda path, result=result: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
