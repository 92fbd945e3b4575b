"""A model learns from what people said of its answers, and keeps what it knew.

Only the head of the words' tower learns: the items of an index keep their vectors, so that another model is in place at
once. Every step replays pairs that the model knows; of the steps, the one is kept that does best on what was said and
does not lose on pairs held out. docs/how-to/feedback.md has the measurements behind the defaults.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.loader import Choice
from twofold.data.sources import Modality, Source
from twofold.errors import DataError, UsageError
from twofold.measure.embed import Embedded, embed
from twofold.methods.base import Method
from twofold.methods.feedback import WithFeedback
from twofold.methods.siglip import SigLIP
from twofold.models.base import device_of, inference
from twofold.models.bundle import Bundle, Tower
from twofold.progress import TERMINAL
from twofold.train.align import Recipe, agreement, linked, pair_batches, parts, with_texts
from twofold.train.loop import Run, Watch, fit
from twofold.train.optim import Optimizer

SCALE = 25.0  # of a bundle that SigLIP did not train
EVERY = 5  # steps between two looks


class Question(NamedTuple):
    """Words that were asked, and the ids of items that were found right and wrong."""

    text: str
    right: Sequence[str]
    wrong: Sequence[str]


@dataclass(frozen=True)
class Lesson:
    """How much a model learns from feedback."""

    steps: int = 30
    lr: float = 3e-4
    batch: int = 512  # pairs replayed in each step
    wrong: float = 0.2  # what an item found wrong counts, beside one found right
    keep: float = 1000.0  # how strongly replayed texts are held where they were
    loss_allowed: float = 0.002  # of the recall in validation, 0..1, for the sake of what was said
    holdout: float = 0.1  # share of the pairs to validate on, where the data has no split "val"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0 or min(self.wrong, self.keep, self.loss_allowed) < 0:
            raise UsageError(f"Steps and rate are above 0, the rest not below; got {self}.")


class Learnt(NamedTuple):
    """The bundle, and before and after: recall on pairs held out (`agreement`), and the share of (right, wrong) pairs
    of items that are in the right order, 0..1; NaN where no question has both."""

    bundle: Bundle
    run: Run
    recall: tuple[float, float]
    ordered: tuple[float, float]

    @property
    def worse(self) -> bool:
        """Whether the rest lost more than was allowed, so that nothing learned was good enough."""
        return self.recall[1] < self.recall[0] - self.bundle.meta["feedback"]["loss_allowed"]


def learn_from(
    bundle: Bundle,
    questions: Sequence[Question],
    vectors: Mapping[str, Float[np.ndarray, "d"]],
    pairs: Source,
    *,
    modality: Modality,
    out: Path | str,
    lesson: Lesson = Lesson(),
    quiet: bool = False,
) -> Learnt:
    """Train the words' head of `bundle` on `questions` about items with these `vectors`; leaves a bundle in `out`.

    `pairs` are what the model learned from, or others that it should go on finding: of a split "train" is replayed,
    "val" (or a share) watches over it. A calibration of the old model is dropped: its scores are others now.
    """
    if not questions:
        raise UsageError("There is nothing to learn from: no question in words was judged.")
    if "text" not in bundle.towers or modality not in bundle.towers or modality == "text":
        raise UsageError(
            f"Feedback teaches the words' tower to find items of another modality; this index has {modality} items, "
            f"its model the towers {' and '.join(bundle.towers)}."
        )
    towers = {modality: "", "text": ""}
    if missing := [name for name in towers if name not in pairs.modalities]:
        raise DataError(f"{pairs.name} has no {missing[0]}: pairs to replay have both sides, as those of `align`.")
    train, held = parts(with_texts(pairs, towers)[0], towers, Recipe(holdout=lesson.holdout, seed=lesson.seed))
    assert held is not None or not lesson.holdout
    tower = bundle.tower("text")
    head = _learning(tower)
    train, sides = _sides(bundle, train, modality, quiet=quiet)
    batches = pair_batches(
        {modality: sides[modality].matrix, "text": Choice(sides["text"].matrix, sides["text"].offsets)},
        linked(train, towers),
        batch=lesson.batch,
        seed=lesson.seed,
        quiet=quiet,
    )
    kept = bundle.meta.get("siglip", {})
    bias = kept["bias"] + math.log(kept["batch"] - 1) if kept else 0.0  # what the odds of its batches leave of it
    siglip = SigLIP(
        {modality: nn.Identity(), "text": head},
        scale=kept.get("scale", SCALE),
        bias=bias - math.log(max(batches.batch - 1, 1)),
    )
    names = list(dict.fromkeys(name for one in questions for name in (*one.right, *one.wrong)))
    method = WithFeedback(
        siglip,
        _features(tower, [one.text for one in questions]),
        torch.from_numpy(np.stack([vectors[name] for name in names])),
        _judged(questions, names),
        wrong=lesson.wrong,
        keep=lesson.keep,
    )
    watch, recall = None, _Recall.of(bundle, held, modality, quiet=quiet) if held is not None else None
    before = recall(method.eval()) if recall else math.nan
    ordered = _ordered(method)
    if recall is not None:

        def score(method: Method) -> float:
            """How well what was said is kept; below 0, and the recall alone, where the rest has lost too much."""
            found = recall(method)
            assert isinstance(method, WithFeedback)
            return 1 / (1 + float(method.said(method.asked()))) if found >= before - lesson.loss_allowed else found - 1

        watch = Watch(score, every=EVERY, patience=lesson.steps, name="kept")
    run = fit(
        method,
        batches,
        steps=lesson.steps,
        out=out,
        optimizer=Optimizer(lr=lesson.lr, weight_decay=0.0, warmup=EVERY),
        seed=lesson.seed,
        log_every=EVERY,
        watch=watch,
        record={
            "lesson": asdict(lesson),
            "questions": len(questions),
            "judged": len(names),
            "model": bundle.fingerprint,
        },
        quiet=quiet,
    )
    after = recall(method) if recall else math.nan
    meta = {key: value for key, value in bundle.meta.items() if key != "calibration"}
    meta["feedback"] = {
        "questions": len(questions),
        "from": bundle.fingerprint,
        "recall": None if recall is None else [before, after],
        "loss_allowed": lesson.loss_allowed,
    }
    done = Bundle({**bundle.towers, "text": Tower(tower.encoder, head.eval().requires_grad_(False))}, meta)
    done.save(Path(out) / "bundle")
    learnt = Learnt(done, run, (before, after), (ordered, _ordered(method)))
    if learnt.worse and not quiet:
        TERMINAL.print(
            f"  The rest gets worse: recall on pairs held out was {before:.3f}, and is {after:.3f}. "
            "Learn less (--steps, --lr), or leave the model as it is.",
            soft_wrap=True,
        )
    return learnt


def _learning(tower: Tower) -> nn.Module:
    """A copy of the head that may change; a tower without one gets a linear map that changes nothing yet."""
    if not isinstance(tower.head, nn.Identity):
        return copy.deepcopy(tower.head).requires_grad_(True)
    linear = nn.Linear(tower.dim, tower.dim)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear)


def _sides(
    bundle: Bundle, source: Source, modality: Modality, *, quiet: bool
) -> tuple[Source, dict[Modality, Embedded]]:
    """The items that can be read: their vectors, and the features of their texts."""
    items = embed(bundle, source, modality, quiet=quiet)
    source = source.take(items.kept)
    return source, {modality: items, "text": embed(bundle.tower("text").encoder, source, "text", quiet=quiet)}


def _features(tower: Tower, texts: Sequence[str]) -> Float[Tensor, "q e"]:
    with inference(tower):
        return tower.encoder(tower.encoder.inputs(list(texts))).float().cpu()


def _judged(questions: Sequence[Question], names: Sequence[str]) -> Tensor:
    at = {name: place for place, name in enumerate(names)}
    judged = torch.zeros(len(questions), len(names), dtype=torch.int8)
    for row, one in enumerate(questions):
        judged[row, [at[name] for name in one.right]] = 1
        judged[row, [at[name] for name in one.wrong]] = -1
    return judged


@torch.no_grad()
def _ordered(method: WithFeedback) -> float:
    """Of the pairs of an item found right and one found wrong for a question, the share in that order."""
    scores = method.eval().asked() @ method.items.T
    before, total = 0, 0
    for row, judged in zip(scores, method.judged, strict=True):
        right, wrong = row[judged > 0], row[judged < 0]
        before += int((right[:, None] > wrong).sum())
        total += right.numel() * wrong.numel()
    return before / total if total else math.nan


class _Recall(NamedTuple):
    """A method → its recall on pairs held out."""

    modality: Modality
    items: Tensor
    texts: Tensor
    of_items: Tensor
    of_texts: Tensor

    @classmethod
    def of(cls, bundle: Bundle, held: Source, modality: Modality, *, quiet: bool) -> "_Recall":
        held, sides = _sides(bundle, held, modality, quiet=quiet)
        names = linked(held, (modality, "text"))
        rows = [torch.from_numpy(sides[name].matrix) for name in (modality, "text")]
        owners = [torch.from_numpy(np.repeat(names, np.diff(sides[name].offsets))) for name in (modality, "text")]
        return cls(modality, *rows, *owners)

    def __call__(self, method: Method) -> float:
        head = method.towers()["text"]
        with inference(head):
            device = device_of(head)
            texts = head(self.texts.to(device)).cpu()
        return agreement(self.items, texts, self.of_items, self.of_texts)
