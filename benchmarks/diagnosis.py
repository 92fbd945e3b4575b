"""Is each failure recognised, and is no healthy training called ill? Trainings made to fail on purpose, on CIFAR-10.

    python benchmarks/diagnosis.py CIFAR10_FOLDER --runs /tmp/diagnosis     # half an hour on one CPU thread, resumable

Every method trains as in cifar10_methods.py, healthy, for three epochs of 10,000 pictures; then each failure does. The
table holds what the log alone says: the verdicts, and the evidence of the worst. A failure is recognised where one of
its expected verdicts is among them; a false alarm is any verdict but a good one on a healthy training.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cifar10_methods import BATCH, ENCODER, OPTIMIZER, RECIPES, load, make
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.errors import TrainingError
from twofold.measure.diagnosis import diagnose
from twofold.methods import Method
from twofold.methods.base import Out
from twofold.models.heads import Head
from twofold.train.log import read_log
from twofold.train.loop import fit
from twofold.views import SIMCLR_CIFAR

RESULTS = Path(__file__).parent / "results" / "diagnosis.json"
EPOCHS, ITEMS = 3, 10_000


class Failure(NamedTuple):
    """How a training is made to fail, and which verdicts recognise it."""

    make: Callable[[int], Method]
    expected: tuple[str, ...]
    lr: float = OPTIMIZER.lr


def without_stop_gradient(seed: int) -> Method:
    method = make("simsiam", seed, RECIPES["simsiam"].options)

    def forward(batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        x1, x2 = (policy(batch["image"], draw) for policy in method.policies)
        h1, h2 = method.encoder(x1), method.encoder(x2)
        z1, z2 = method.head(h1), method.head(h2)
        cosine = nn.functional.cosine_similarity
        loss = -(cosine(method.predictor(z1), z2).mean() + cosine(method.predictor(z2), z1).mean()) / 2
        return Out(loss, z=torch.cat((h1, h2)))

    method.forward = forward  # type: ignore[method-assign]
    return method


def too_easy(seed: int) -> Method:
    """Two views that differ by a flip: colour and place give partners away."""
    method = make("simclr", seed, RECIPES["simclr"].options)
    view = replace(SIMCLR_CIFAR, area=(1.0, 1.0), aspect=(1.0, 1.0), jitter=0.0, gray=0.0, blur=0.0)
    method.policies = view, view
    return method


def changed(name: str, **options: Any) -> Callable[[int], Method]:
    return lambda seed: make(name, seed, {**RECIPES[name].options, **options})


COLLAPSED = ("collapsed", "thin sheet", "constant targets")
FAILURES: dict[str, Failure] = {
    "byol, no predictor, no slow target": Failure(changed("byol", predictor=Head(0, dim=128), momentum=0.0), COLLAPSED),
    "simsiam without stop-gradient": Failure(without_stop_gradient, COLLAPSED),
    "vicreg without its variance term": Failure(changed("vicreg", variance=0.0, covariance=0.0), COLLAPSED),
    "simclr, temperature 50": Failure(changed("simclr", temperature=50.0), ("temperature too high",)),
    "simclr, temperature 0.002": Failure(
        changed("simclr", temperature=0.002), ("temperature too low", "worse than chance")
    ),
    "simclr, learning rate 3": Failure(changed("simclr"), (*COLLAPSED, "rank fell", "stuck at chance"), lr=3.0),
    "triplet, batch-hard, learning rate 0.03": Failure(
        changed("triplet", mining="batch-hard", labels=False), (*COLLAPSED, "stuck at chance"), lr=0.03
    ),
    "simclr, views without crop and colour": Failure(too_easy, ("views too alike", "solved early")),
}


def verdicts(name: str, method: Method, folder: Path, data: torch.Tensor, labels: Any, lr: float) -> dict[str, Any]:
    batches = Batches({"image": data, "label": labels}, batch=BATCH, seed=0)
    ended = ""
    try:
        fit(
            method,
            batches,
            steps=EPOCHS * batches.steps_per_epoch,
            out=folder,
            optimizer=replace(OPTIMIZER, lr=lr),
            record={"options": OPTIONS.get(name, {})},
            log_every=5,
        )
    except TrainingError as error:
        ended = str(error)
    found = diagnose(read_log(folder / "log.jsonl"), json.loads((folder / "run.json").read_text()))
    lines = read_log(folder / "log.jsonl")
    return {
        "training": name,
        "verdicts": [v._asdict() for v in found],
        "stopped": ended,
        "log": lines[:: max(1, len(lines) // 12)],
    }


OPTIONS = {
    "simclr, temperature 50": {"temperature": 50.0},
    "simclr, temperature 0.002": {"temperature": 0.002},
    **{
        name: {"temperature": 0.2}
        for name in ("simclr", "simclr, learning rate 3", "simclr, views without crop and colour")
    },
    "moco": {"queue": 4096},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    part = load(asked.folder, "train", ITEMS)
    plans = {name: Failure(changed(name), (), RECIPES[name].optimizer.lr) for name in RECIPES} | FAILURES
    rows = []
    for name, plan in plans.items():
        if asked.only and name not in asked.only:
            continue
        folder = asked.runs / name.replace(" ", "-").replace(",", "")
        row = verdicts(name, plan.make(0), folder, part.pixels, torch.as_tensor(part.labels), plan.lr)
        said = [v["name"] for v in row["verdicts"] if v["tone"] != "good"]
        row["healthy"] = not plan.expected
        row["right"] = bool(set(said) & set(plan.expected)) if plan.expected else not said
        rows.append(row)
        print(f"{name:45} {'right' if row['right'] else 'WRONG'}  {said}", flush=True)
        result = {
            "question": __doc__.split("\n")[0] if __doc__ else "",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
            "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
            "setting": {"encoder": ENCODER, "batch": BATCH, "epochs": EPOCHS, "items": ITEMS},
            "results": rows,
        }
        write_atomically(asked.out, lambda path, result=result: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
