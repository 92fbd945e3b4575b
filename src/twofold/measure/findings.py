"""What looking at pictures adds to a training's log: verdicts on copies, views, negatives, BatchNorm and two sides."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from twofold.measure.collapse import Health
from twofold.measure.diagnosis import Verdict
from twofold.measure.hubness import Gap
from twofold.measure.metrics import Interval
from twofold.measure.negatives import NEAR, Microscope
from twofold.measure.structure import COPIES

LAGS = 2.5  # times: how much less plain pictures may spread in evaluation than views did in training
SOME = 0.02  # of the items: so many copies are worth a word
BLURRED = 0.1  # of the items: so many may be one to an encoder that has seen little
AT_ONE = 0.98  # median cosine of two views: there is nothing left between them
SHORT = 0.3  # of the partners: what a colour histogram or a thumbnail must not find alone
LEAKS = 0.05  # of the partners: how many more are found where BatchNorm sees both in one batch
BELOW = 0.9  # of the loss that copies allow
RARE = 0.1  # of the negatives: where more are as near as the positive, that one does not stand out, and proves nothing
APART = 0.5  # of the mean squared distance between the two sides: how much the gap of their means may make


def of_statistics(log: Sequence[Mapping[str, Any]], found: Health, *, batchnorm: bool) -> list[Verdict]:
    """In training BatchNorm goes by the batch, afterwards by an average that may lag behind."""
    trained = [line["spread"] for line in log if "spread" in line][-1:]
    if not trained or not batchnorm or trained[0] < LAGS * found.spread:
        return []
    return [
        Verdict(
            "statistics lag",
            "warn",
            "The encoder sees less now than it did in training: BatchNorm's averages may lag behind its weights.",
            f"spread {trained[0]:.3f} of the last batch of views, {found.spread:.3f} of plain pictures in evaluation",
            "Train on with a falling learning rate, or start from a trained encoder. If it stays, plain pictures look "
            "unlike any view: weaken the policy.",
        )
    ]


def of_copies(groups: Int[np.ndarray, "n"] | None, one: float, batch: int) -> list[Verdict]:
    """`groups` number the pictures by what they look like; `one` is the share of items that the encoder takes for
    another one."""
    if groups is not None:
        sizes = np.bincount(groups)[groups]
        share, others = float((sizes > 1).mean()), float((sizes - 1).mean() / max(len(groups) - 1, 1))
        if share >= SOME:
            return [
                Verdict(
                    "duplicate data",
                    "warn",
                    "Pictures come more than once, as far as 32 pixels show: as negatives they tear apart what is one.",
                    f"{100 * share:.0f} % of {len(groups):,} pictures have a copy among them"
                    + (f"; a batch of {batch} holds {others * (batch - 1):.2g} copies of each" if batch > 1 else ""),
                    "Keep one of each (twofold index --duplicates lists them), or tell them apart by labels (supcon).",
                )
            ]
    if one < BLURRED:
        return []
    return [
        Verdict(
            "copies",
            "warn",
            "Some items are one to this encoder, though they do not look it.",
            f"{100 * one:.0f} % of items have another at a cosine of {COPIES} or more",
            "The encoder does not see what tells them apart: weaken the view that hides it, or train longer.",
        )
    ]


def of_allowed(log: Sequence[Mapping[str, Any]], allowed: float) -> list[Verdict]:
    """NT-Xent can fall no lower than copies in a batch let it, unless something beside the picture tells them apart."""
    losses = [line["loss"] for line in log if "loss" in line][-3:]
    if not losses or allowed < 0.1 or float(np.median(losses)) >= BELOW * allowed:
        return []
    return [
        Verdict(
            "below what copies allow",
            "bad",
            "Copies of a picture are told apart from it: something beside the picture gives partners away.",
            f"loss {float(np.median(losses)):.3f}; if copies could not be told apart it were {allowed:.3f} or more",
            "Look for what two views share and copies do not: one draw for both views, a crop's place, a border "
            "(twofold views DATA --policy P --audit: shortcuts).",
        )
    ]


def of_positives(seen: Microscope, found: Health) -> list[Verdict]:
    if seen.agreement < AT_ONE or seen.hardness > seen.agreement - 0.02:
        return []  # where strangers agree as well, it is a collapse
    return [
        Verdict(
            "positives at 1",
            "warn",
            "Two views of a picture have one embedding already: they teach nothing more.",
            f"median cosine of two views {seen.agreement:.3f}, of the hardest negatives {seen.hardness:.3f}",
            "Take stronger views (twofold views DATA --policy P draws them), or stop here.",
        )
    ]


def of_negatives(seen: Microscope) -> list[Verdict]:
    now = seen.now
    share = now.effective / seen.negatives
    says = (
        f"temperature {now.temperature:.3g}: {now.effective:.0f} of {seen.negatives:.0f} negatives share the gradient"
    )
    found = []
    suggested = seen.suggested
    if suggested and share < 0.02:
        found.append(
            Verdict(
                "few negatives",
                "warn",
                "A handful of negatives take nearly all of the gradient.",
                f"{says}; the hardest 1 % take {100 * now.hardest:.0f} %",
                f"Raise the temperature; {suggested[0]:.2g} to {suggested[1]:.2g} suits these embeddings.",
            )
        )
    heavy = {
        reason: (part, taken)
        for reason, (part, taken) in seen.kinds.items()
        if taken > 3 * part and taken > 0.2 and not (reason == NEAR and part > RARE)
    }
    if heavy:
        kinds = "; ".join(
            f"{reason}: {100 * part:.1f} % of the negatives, {100 * taken:.0f} % of the gradient"
            for reason, (part, taken) in heavy.items()
        )
        found.append(
            Verdict(
                "false negatives",
                "warn",
                "Much of the gradient pushes apart what may belong together.",
                kinds,
                "Raise the temperature, remove copies, or learn from labels where there are any (supcon).",
            )
        )
    return found


def of_shortcuts(found: Mapping[str, Interval], among: int) -> list[Verdict]:
    """Simple features that find a view's partner, by `measure.shortcuts`."""
    if not found:
        return []
    name, top = max(found.items(), key=lambda each: each[1].value)
    if top.low < SHORT:
        return []
    color = "colour" in name
    return [
        Verdict(
            "colour gives partners away" if color else "views too alike",
            "warn",
            f"A {name} alone finds a view's partner: the encoder need not look at what the picture shows.",
            f"{100 * top.value:.0f} % of partners among {among} pictures [{100 * top.low:.0f}, {100 * top.high:.0f}]",
            "Jitter colour and drop it now and then (--policy.jitter .8 --policy.gray .2)."
            if color
            else "Crop more (--policy.area .2 1), and see twofold views DATA --policy P --audit.",
        )
    ]


def of_leak(together: Interval, gain: Interval) -> list[Verdict]:
    """How many partners are found where BatchNorm sees both views in one batch, and how many more that are."""
    if gain.low < LEAKS:
        return []
    return [
        Verdict(
            "the batch gives partners away",
            "warn",
            "BatchNorm tells a key by the company it was normalised in: part of what was learned is the batch.",
            f"partners found with both views in one batch {100 * together.value:.0f} %, "
            f"{100 * gain.value:.0f} points fewer [{100 * gain.low:.0f}, {100 * gain.high:.0f}] with keys mixed anew",
            "Larger batches; several processes with --shuffle (moco); a head with another norm (--head.norm none).",
        )
    ]


def of_sides(found: Gap, seen: Microscope, names: Sequence[str]) -> list[Verdict]:
    """Two towers into one space."""
    if found.share < APART or seen.agreement - seen.hardness > 0:
        return []
    return [
        Verdict(
            "sides apart",
            "warn",
            f"{names[0].capitalize()} and {names[1]} lie in two cones, and most of what parts a pair is the gap.",
            f"the means lie {found.distance:.2f} apart, {100 * found.share:.0f} % of the mean squared distance; median "
            f"cosine of a pair {seen.agreement:.2f}",
            "Scores of one side against the other stay in order: compare them with each other, never with cosines "
            "within a side. twofold calibrate --remedies tries centring.",
        )
    ]


def of_predictions(by_distance: Sequence[tuple[float, float, int]], constant: float) -> list[Verdict]:
    """`by_distance`: how far a patch lies from what was seen, its error, how many; `constant`: what the mean costs."""
    count = sum(n for _, _, n in by_distance)
    error = sum(each * n for _, each, n in by_distance) / max(count, 1)
    if not count or not math.isfinite(error) or error < 0.97 * constant:
        return []
    return [
        Verdict(
            "predicts the mean",
            "warn",
            "What is hidden is predicted no better than by the mean of all.",
            f"error {error:.3f}, of the mean {constant:.3f}",
            "Train longer, or raise the learning rate; hide less, or smaller blocks (--share, --blocks.scale).",
        )
    ]
