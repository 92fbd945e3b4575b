"""Which checkpoint is good, when there are no labels? Scores of embeddings alone against what probes with labels read.

    python benchmarks/selection.py train CIFAR10_FOLDER --part 0 2   # half of the runs; --minutes 10 stops in time
    python benchmarks/selection.py read                              # the correlations, from what has been measured

Runs on 4,000 pictures of CIFAR-10: methods × lengths × views × learning rates × temperatures, healthy, weak and broken.
Scores take 2,000 training pictures without labels, and four views of 512 of them. kNN and linear accuracy are those of
4,000 test pictures. The runs of ten epochs are looked at every second epoch as well: which checkpoint of one run?
Results are kept run by run; a run that was interrupted goes on.
"""

import argparse
import fcntl
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cifar10_methods import ENCODER, RECIPES, Part, encoder_of, features, load, make, plain
from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.errors import DataError, TrainingError
from twofold.measure.metrics import Interval
from twofold.measure.probes import knn_probe, linear_probe
from twofold.measure.selection import correlation, scores
from twofold.methods import Method
from twofold.models.encoders import inference
from twofold.models.heads import Head
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR, Policy

RESULTS = Path(__file__).parent / "results" / "selection.json"
ITEMS, TEST, BATCH = 4_000, 4_000, 128
SEEN, VIEWED, VIEWS = 2_000, 512, 4
RATE = 3e-3

POLICIES: dict[str, Policy] = {
    "simclr-cifar": SIMCLR_CIFAR,
    "crop alone": replace(SIMCLR_CIFAR, jitter=0.0, gray=0.0),
    "colour alone": replace(SIMCLR_CIFAR, area=(1.0, 1.0), aspect=(1.0, 1.0)),
}


@dataclass(frozen=True)
class Plan:
    method: str
    epochs: int = 5
    policy: str = "simclr-cifar"
    lr: float = RATE
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.method, f"{self.epochs} epochs"]
        words += [self.policy] * (self.policy != "simclr-cifar") + [f"lr {self.lr:g}"] * (self.lr != RATE)
        said = {name: value if isinstance(value, float | int) else "none" for name, value in self.options.items()}
        return ", ".join(words + [f"{name} {value}" for name, value in said.items()])


PLANS: list[Plan] = [
    plan
    for method in ("simclr", "moco", "byol", "barlow", "vicreg", "lejepa")
    for plan in (
        Plan(method, 10),
        Plan(method, 2),
        Plan(method),
        Plan(method, policy="crop alone"),
        Plan(method, policy="colour alone"),
        Plan(method, lr=0.1),
    )
] + [
    Plan("simclr", options={"temperature": 0.05}),
    Plan("simclr", options={"temperature": 1.0}),
    Plan("simclr", options={"temperature": 10.0}),
    Plan("moco", options={"temperature": 0.05}),
    Plan("moco", options={"temperature": 1.0}),
    Plan("byol", options={"predictor": Head(0, dim=128), "momentum": 0.0}),
    Plan("vicreg", options={"variance": 0.0, "covariance": 0.0}),
    Plan("simsiam"),
]


def seen(method: Method, part: Part, policies: Sequence[Policy]) -> dict[str, dict[str, float]]:
    """Scores of the encoder, by its own training's views and by views that are the same for all, and of the head."""
    encoder, head = encoder_of(method), method.heads()["image"]
    pixels, few = part.first(SEEN), part.pixels[:VIEWED]

    def views(policies: Sequence[Policy]) -> torch.Tensor:
        draw = runtime.generator("selection")
        with inference(encoder):
            drawn = [policies[k % len(policies)](few, draw) for k in range(VIEWS)]
            return torch.stack([encoder(view) for view in drawn], 1)

    own, same = views(policies), views([SIMCLR_CIFAR])
    plain_h = torch.from_numpy(features(encoder, pixels))
    with inference(head):
        headed, behind = head(plain_h), torch.stack([head(view) for view in own.unbind(1)], 1)
    return {
        "encoder, own views": scores(plain_h, own),
        "encoder, the same views": scores(plain_h, same),
        "head, own views": scores(headed, behind),
    }


def accuracies(method: Method, train: Part, test: Part) -> dict[str, float]:
    encoder = encoder_of(method)
    sets = features(encoder, train), train.labels, features(encoder, test), test.labels
    return {"kNN": knn_probe(*sets).accuracy.value, "linear": linear_probe(*sets).accuracy.value}


def measured(plan: Plan, train: Part, test: Part, out: Path) -> dict[str, Any]:
    method = make(plan.method, 0, {**RECIPES[plan.method].options, **plan.options})
    method.policies = chosen = (POLICIES[plan.policy],) * 2  # type: ignore[assignment]
    batches = Batches({"image": train.pixels}, batch=BATCH, seed=0)
    each = batches.steps_per_epoch
    looks: dict[str, Callable[[Method], float]] = {}
    latest: dict[str, float] = {}

    def look(method: Method) -> float:
        latest.update(
            {
                f"{where}: {name}": value
                for where, of in seen(method, train, chosen).items()
                for name, value in of.items()
            }
        )
        latest.update(accuracies(method, train, test))
        return latest["kNN"]

    if plan.epochs == 10:
        looks["kNN"] = look
        for where in ("encoder, own views", "encoder, the same views", "head, own views"):
            for name in (
                "RankMe",
                "α-ReQ",
                "spread",
                "isotropy",
                "uniformity",
                "LiDAR",
                "alignment",
                "alignment + uniformity",
                "view retrieval",
            ):
                key = f"{where}: {name}"
                looks[key] = lambda method, key=key: latest[key]
        looks["linear"] = lambda method: latest["linear"]
    ended = ""
    log: list[dict[str, Any]] = []
    started = time.monotonic()
    try:
        run = fit(
            method, batches, steps=plan.epochs * each, out=out, seed=0, save_every=2 * each, probes=looks,
            optimizer=Optimizer(lr=plan.lr, warmup=20), record={"plan": plan.name}, quiet=True,
        )  # fmt: skip
        log = run.log
        found = {"scores": seen(method, train, chosen), "accuracy": accuracies(method, train, test)}
    except (TrainingError, DataError) as error:  # a loss, or weights, that are no numbers any more
        ended, found = str(error), {"scores": {}, "accuracy": {}}
    losses = [line["loss"] for line in log if "loss" in line][-3:]
    return {
        "name": plan.name,
        "method": plan.method,
        "epochs": plan.epochs,
        "policy": plan.policy,
        "lr": plan.lr,
        "options": plain(plan.options),
        "stopped": ended,
        "seconds": round(time.monotonic() - started, 1),
        "loss": sum(losses) / max(1, len(losses)),
        **found,
        "course": [line for line in log if "kNN" in line],
    }


def train(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * asked.minutes
    one, other = load(asked.folder, "train", ITEMS), load(asked.folder, "test", TEST)
    lines = asked.runs / "lines.jsonl"
    asked.runs.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["name"] for line in lines.read_text().splitlines()} if lines.exists() else set()
    mine = PLANS[asked.part[0] :: asked.part[1]]
    for number, plan in enumerate(mine):
        if plan.name in done:
            continue
        if time.monotonic() > until:
            raise SystemExit(f"{len(mine) - number} runs are left; the same command goes on.")
        row = measured(plan, one, other, asked.runs / plan.name.replace(", ", "-").replace(" ", "-"))
        with open(lines, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row) + "\n")
        print(
            f"{plan.name:50} kNN {row['accuracy'].get('kNN', 0):.3f}  {row['seconds']:.0f} s  {row['stopped']}",
            flush=True,
        )


def read(asked: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (asked.runs / "lines.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["scores"]]
    rows.sort(key=lambda row: [plan.name for plan in PLANS].index(row["name"]))
    methods = [row["method"] for row in rows]
    table: dict[str, dict[str, Any]] = {}
    for where in rows[0]["scores"]:
        for name in rows[0]["scores"][where]:
            values = [row["scores"][where][name] for row in rows]
            table[f"{where}: {name}"] = _correlations(values, rows, methods)
    courses = [{**line, "run": row["name"]} for row in rows for line in row["course"]]
    runs = [line["run"] for line in courses]
    for name, own in table.items():
        for probe in ("kNN", "linear"):
            reached = [line[probe] for line in courses]
            own[f"within runs, {probe}"] = correlation([line[name] for line in courses], reached, within=runs)
    # Losses of two methods are of different kinds.
    table["final loss"] = _correlations([-row["loss"] for row in rows], rows, methods, across=False)
    table["most epochs"] = _correlations([row["epochs"] for row in rows], rows, methods)
    frame = {
        "question": "Spearman correlation of label-free scores with kNN and linear accuracy, over trainings",
        "machine": f"{platform.machine()}, 1 thread a run, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "twofold")},
        "n": {"runs": len(rows), "train": ITEMS, "test": TEST, "seeds": 1},
        "setting": {"encoder": ENCODER, "batch": BATCH, "seen": SEEN, "views": [VIEWED, VIEWS]},
        "correlation": {name: {k: _rounded(v) for k, v in own.items()} for name, own in table.items()},
        "results": rows,
    }
    text = json.dumps(frame, indent=1, ensure_ascii=False) + "\n"
    write_atomically(asked.out, lambda path: path.write_text(text, "utf-8"))
    print(f"{'':48}{'across, kNN':>22}{'across, linear':>22}{'within a method, kNN':>24}{'within a run, kNN':>22}")
    for name, own in sorted(
        table.items(), key=lambda entry: -(entry[1].get("across, kNN") or Interval(-2, 0, 0)).value
    ):
        cells = [own.get(key) for key in ("across, kNN", "across, linear", "within methods, kNN", "within runs, kNN")]
        print(f"{name:48}" + "".join(f"{str(cell) if cell else '–':>22}" for cell in cells))


def _correlations(
    values: Sequence[float], rows: Sequence[dict[str, Any]], methods: Sequence[str], *, across: bool = True
) -> dict[str, Interval]:
    found = {}
    for probe in ("kNN", "linear"):
        right = [row["accuracy"][probe] for row in rows]
        if across:
            found[f"across, {probe}"] = correlation(values, right)
        found[f"within methods, {probe}"] = correlation(values, right, within=methods)
    return found


def _rounded(value: Interval) -> list[float]:
    return [round(float(x), 3) for x in value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/selection"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    verbs = parser.add_subparsers(required=True)
    training = verbs.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--part", type=int, nargs=2, default=[0, 1])
    training.add_argument("--minutes", type=float, default=600)
    training.set_defaults(run=train)
    verbs.add_parser("read").set_defaults(run=read)
    asked = parser.parse_args()
    asked.run(asked)


if __name__ == "__main__":
    main()
