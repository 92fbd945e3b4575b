"""Policies compared by what they teach: short trainings under each at an equal budget, measured on held-out pictures.

An audit says what a policy destroys; whether an encoder is better off without it, only a training can tell.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.sources import Source
from twofold.errors import UsageError
from twofold.measure.collapse import alignment, effective_rank, uniformity
from twofold.measure.metrics import Interval, bootstrap, first_ranks, unit_rows
from twofold.measure.probes import knn_probe
from twofold.models.bundle import Bundle
from twofold.models.encoders import ImageEncoder
from twofold.train.held_out import features, held_out, pictures
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, train
from twofold.views import Policy, policies

SHORT = Setting(encoder="timm:resnet18/16", size=64, batch=256, epochs=20, limit=4000)
"""A small encoder and so few epochs that a run takes minutes on a CPU."""

OPTIMIZER = Optimizer(name="adamw", lr=2e-3, weight_decay=1e-4, warmup=20)


class Scores(NamedTuple):
    """What one policy's encoders are worth on held-out pictures; each of the last four has one figure a seed."""

    name: str
    policy: str
    retrieval: Interval  # a view finds its original among all held-out originals, 0..1
    knn: Interval | None  # accuracy of the neighbours' vote, where there are labels
    retrieval_seeds: list[float]
    knn_seeds: list[float]
    rank: list[float]  # effective rank of the features
    alignment: list[float]  # mean squared distance of two views, on the unit sphere; 0 is best
    uniformity: list[float]


class Comparison(NamedTuple):
    """The policies' scores, and what they share."""

    scores: list[Scores]
    items: int  # trained on
    held_out: int
    steps: int
    chance: dict[str, float]  # of "retrieval", and of "knn" where there are labels


def compare(
    names: Sequence[str],
    source: Source,
    *,
    out: Path | str,
    setting: Setting = SHORT,
    optimizer: Optimizer = OPTIMIZER,
    options: Mapping[str, Any] = {"temperature": 0.2},
    seeds: Sequence[int] = (0, 1),
    quiet: bool = False,
) -> Comparison:
    """Train SimCLR under each policy (a preset's name or a file) for the same number of steps, and score the encoders.

    Retrieval and alignment are asked of the same views for all: drawn from every compared policy in turn, so that
    nobody is tested on home ground alone. Held out is the split "test", else "val", else a fifth of the items. Runs lie
    in `out`; the same call goes on where it was stopped.
    """
    if len(set(names)) < len(names) or not names:
        raise UsageError(f"Compare policies of different names; got {', '.join(names) or 'none'}.")
    trained, held = held_out(source)
    judges = [policy for name in names for policy in policies(name)]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    steps = 0
    for seed in seeds:
        for name in names:
            folder = Path(out) / f"{Path(name).stem}-{seed}"
            chosen = replace(setting, policy=name, seed=seed)
            run = train(
                "simclr", trained, out=folder, setting=chosen, optimizer=optimizer, options=options, quiet=quiet
            )
            steps = run.steps
            rows[name].append(_score(folder, trained, held, judges, chosen))
    labelled = "knn" in rows[names[0]][0]
    first = rows[names[0]][0]
    return Comparison(
        scores=[_summary(name, own) for name, own in rows.items()],
        items=min(len(trained), setting.limit or len(trained)),
        held_out=len(first["found"]),
        steps=steps,
        chance={"retrieval": 1 / len(first["found"])} | ({"knn": first["knn_chance"]} if labelled else {}),
    )


def _score(folder: Path, trained: Source, held: Source, judges: Sequence[Policy], setting: Setting) -> dict[str, Any]:
    """The figures of one run, kept beside it."""
    bundle = Bundle.load(folder)
    kept = folder / "scores.json"
    asked = {"fingerprint": bundle.fingerprint, "judges": [policy.to_dict() for policy in judges], "held": held.keys()}
    if kept.is_file() and (known := json.loads(kept.read_text("utf-8")))["asked"] == json.loads(json.dumps(asked)):
        return known["scores"]
    encoder = bundle.tower("image").encoder
    assert isinstance(encoder, ImageEncoder)
    shown = pictures(held, encoder.size, setting)
    images, labels = torch.from_numpy(np.array(shown.pixels)), held.take(shown.kept).labels
    plain, *views = (
        replace(policy, size=encoder.size, mean=(), std=()) for policy in (judges[0].only(), *judges)
    )  # fmt: skip
    draw = runtime.generator("judges")
    originals = features(encoder, plain, images, draw)
    found, pairs = [], []
    for policy in views:
        one, other = (features(encoder, policy, images, draw) for _ in range(2))
        ranks = first_ranks(unit_rows(one) @ unit_rows(originals).T, [[i] for i in range(len(one))])
        found.append((ranks == 1).double())
        pairs.append(alignment(one, other))
    scores: dict[str, Any] = {
        "found": torch.stack(found).mean(0).tolist(),
        "rank": effective_rank(originals),
        "uniformity": uniformity(originals),
        "alignment": float(np.mean(pairs)),
    }
    if labels is not None and trained.labels is not None:
        bank = trained.sample(setting.limit)
        known_pictures = pictures(bank, encoder.size, setting)
        z = features(encoder, plain, torch.from_numpy(np.array(known_pictures.pixels)), draw)
        bank_labels = bank.take(known_pictures.kept).labels
        assert bank_labels is not None
        probe = knn_probe(z, bank_labels, originals, labels)
        right = np.where(labels >= 0, (probe.predicted == labels).astype(float), np.nan)
        scores |= {"knn": right[labels >= 0].tolist(), "knn_chance": probe.chance}
    write_atomically(kept, lambda path: path.write_text(json.dumps({"asked": asked, "scores": scores}), "utf-8"))
    return scores


def _summary(name: str, rows: list[dict[str, Any]]) -> Scores:
    """Figures over seeds: an item's hits under all seeds are drawn together, and intervals are over items."""

    def over_items(key: str) -> Interval:
        return bootstrap(np.mean([row[key] for row in rows], axis=0))

    return Scores(
        name=name,
        policy=" | ".join(dict.fromkeys(str(policy).partition(", ")[2] for policy in policies(name))),
        retrieval=over_items("found"),
        knn=over_items("knn") if "knn" in rows[0] else None,
        retrieval_seeds=[float(np.mean(row["found"])) for row in rows],
        knn_seeds=[float(np.mean(row["knn"])) for row in rows if "knn" in row],
        rank=[row["rank"] for row in rows],
        alignment=[row["alignment"] for row in rows],
        uniformity=[row["uniformity"] for row in rows],
    )
