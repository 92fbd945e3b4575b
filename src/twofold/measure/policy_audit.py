"""What a policy costs, before a training run is spent on it: each operation alone and all together.

Views are embedded by an encoder that was not trained on them (the default one, or any bundle's). For the probes, a
thumbnail's colours stand beside its features: an ImageNet encoder has learned to overlook left and right. Four
questions are asked of each operation, and every answer has a 95 % interval over items:

    confusion   how often the nearest original of a changed view is another picture
    loss        how much less a probe reads from views than from originals: labels and columns, words of captions, and
                which member of a family of captions ("red heart", "blue heart", …) a view is of
    foreign     how well a probe tells changed views from originals, as an AUC: ½ where the data hold such pictures
    shortcuts   what betrays a view's partner without a look at its content, under the whole policy

Invariance to an operation is free where the data have it already. That is what the answers together tell: nothing is
lost, nobody is confused, and what comes out could have been an original.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.decode import Skipped, decode
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.columns import LEAST, Column, Family, columns_of, families_of, sample, words_of
from twofold.measure.metrics import TIE, Interval, bootstrap
from twofold.measure.shortcuts import shortcuts
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ImageEncoder, device_of, image_encoder, inference
from twofold.models.fast import accelerate
from twofold.progress import Line
from twofold.views import OPERATIONS, Policy

Verdict = Literal["free", "does nothing", "no price found", "costs", "costs much", "not free"]

BATCH, FEW = 64, 4096
THUMB = 8  # pixels a side of the thumbnail beside the encoder's features …
SHARE = 0.5  # … and the length of its vector, where that of the encoder's is 1
PENALTY = 0.1  # of the probes: ridge regression on features of length one
FOLDS = 5
CHANGED = 1.5 / 255  # a view in which no value differs more is not changed
SAME = 1e-3  # originals of a higher cosine than 1 − this are the same picture
PICTURE = 64  # pixels a side of the pictures that are kept for the page
CASES = 5
WORDS, READ = 16, 0.75  # a word is asked for if so many items have it, and the probe reads it with this AUC at least

SYMMETRIES = ("flip", "vflip", "turns")  # they rearrange pixels: data may have these invariances exactly
PRICE, DEAR = 0.02, 0.10  # falls that count if their interval allows it, and that are too much
CONFUSED, FOREIGN = 0.15, 0.65  # a free symmetry confuses fewer, and looks less foreign
OPEN = 0.15  # a shortcut that finds so many partners is open
CLOSERS = {
    "colour histogram": ("brightness", "contrast", "saturation", "hue"),
    "mean colour": ("brightness", "contrast", "saturation", "hue"),
    "thumbnail": ("crop",),
    "border": ("crop",),
    "JPEG traces": ("blur",),
}


class Loss(NamedTuple):
    """How much less views tell of something than originals do."""

    name: str  # the column, the word, or the family's pattern
    kind: Literal["column", "word", "family"]
    measure: Literal["accuracy", "AUC"]
    members: int  # items with a label, with the word, or of the family
    before: float  # on originals, cross-validated; of a family, where all are told apart, 1
    fall: Interval  # in the unit of `measure`; corrected for all columns, words or families, and all operations


class Case(NamedTuple):
    """A view that lies nearer to another picture than to its own."""

    item: int
    nearest: int
    family: str  # within which it was mistaken; "" for among all
    view: np.ndarray  # uint8 [h, w, 3]


class Finding(NamedTuple):
    """What one operation alone, or a whole policy, does to the pictures."""

    name: str
    setting: str
    changed: float  # share of the views that differ from their picture at all
    confusion: Interval | None  # share of the changed views, 0..1; None where nothing changes
    foreign: Interval | None  # AUC, ½..1
    losses: list[Loss]  # dearest first within each kind; of the words, the three that fall most
    cases: list[Case]
    verdict: Verdict = "no price found"

    @property
    def paid(self) -> list[Loss]:
        """The losses that are real and large enough to count, dearest first."""
        # Probes err both ways; a family's mistakes only add up, so that a share of them is never surely 0.
        least = {"column": 0.0, "word": 0.0, "family": PRICE}
        real = [loss for loss in self.losses if loss.fall.low > least[loss.kind] and loss.fall.value >= PRICE]
        return sorted(real, key=lambda loss: -loss.fall.value)


@dataclass(frozen=True, eq=False)
class Audit:
    """The audit of a policy on a sample of some data, and the policy that it proposes."""

    policies: tuple[Policy, ...]
    proposed: tuple[Policy, ...]
    whole: Finding
    better: Finding  # the proposed policy as a whole
    operations: list[Finding]  # in the policy
    candidates: list[Finding]  # not in the policy, tried all the same
    shortcuts: dict[str, Interval]  # top-1 among `among`, of the policy and of the proposed one
    shortcuts_left: dict[str, Interval]
    among: int
    verdict: list[str]
    source: Source  # the items that were looked at
    originals: np.ndarray  # uint8 [n, h, w, 3], small
    asked: dict[str, int]  # how many columns, words and families
    views: int
    encoder: str
    skipped: list[Skipped]

    def to_dict(self) -> dict[str, Any]:
        """All figures, as `json` takes them, without the pictures."""

        def told(finding: Finding) -> dict[str, Any]:
            shown = finding._asdict()
            ids = [{"view of": self.source.ids[c.item], "nearest": self.source.ids[c.nearest]} for c in finding.cases]
            intervals = {k: v and v._asdict() for k, v in shown.items() if k in ("confusion", "foreign")}
            losses = [loss._asdict() | {"fall": loss.fall._asdict()} for loss in finding.losses]
            return shown | intervals | {"losses": losses, "cases": ids}

        return {
            "data": self.source.name,
            "items": len(self.source),
            "views": self.views,
            "encoder": self.encoder,
            "asked": self.asked,
            "verdict": self.verdict,
            "policies": [policy.to_dict() for policy in self.policies],
            "proposed": [policy.to_dict() for policy in self.proposed],
            "whole": told(self.whole),
            "whole proposed": told(self.better),
            "operations": [told(finding) for finding in self.operations],
            "candidates": [told(finding) for finding in self.candidates],
            "shortcuts": {name: found._asdict() for name, found in self.shortcuts.items()},
            "shortcuts of proposed": {name: found._asdict() for name, found in self.shortcuts_left.items()},
            "shortcuts chance": 1 / self.among,
            "skipped": len(self.skipped),
        }


def audit(
    policies: Sequence[Policy],
    source: Source,
    *,
    encoder: Bundle | Tower | ImageEncoder | None = None,
    columns: Sequence[str] | None = None,
    items: int = 512,
    views: int = 4,
    size: int | None = None,
    channels: int = 3,
    seed: int = 0,
    quiet: bool = False,
) -> Audit:
    """Audit `policies` (one a view) on a sample of `items` pictures of `source`, with `views` views an item.

    `size` is the side of a view as it will be trained; where None, the policy's or the pictures' own, what is less. The
    sample favours rare words and classes (`columns.sample`). `encoder` is EfficientNet-Lite0 at 96 pixels by default,
    and embedding is what takes the time.
    """
    tower = _tower(encoder)
    source = source.take(sample(source, items, runtime.generator(seed, "sample")))
    if source.images is None:
        raise DataError(f"{source.name} has no pictures to make views of.")
    size = size or min(max(policy.size for policy in policies), picture_side(source))
    policies = tuple(replace(policy, size=size, mean=(), std=()) for policy in policies)
    stored = size if size <= 64 else size * 8 // 7
    pixels, kept, skipped = decoded(source, stored, channels=channels)
    images, source = torch.from_numpy(np.array(pixels)), source.take(kept)
    if len(source) < 2 * FOLDS:
        raise DataError(f"An audit needs {2 * FOLDS} pictures at least; {source.name} has {len(source)}.")

    found = shortcuts(policies, images, runtime.generator(seed, "shortcuts"))
    off = [name for name in SYMMETRIES if not _has(policies, name)]
    for name, top in found.items():
        off += [op for op in CLOSERS[name] if top.low > OPEN and op not in off and not _has(policies, op)]
    candidates = {name: _tried(policies[0], name) for name in off if _possible(name, channels)}
    owners = {name: next(p for p in policies if name in p.operations) for name in OPERATIONS if _has(policies, name)}

    eye = _Eye(tower, images, views, total=len(source) * (1 + views * (len(owners) + len(candidates) + 4)), quiet=quiet)
    with eye.line:
        probe = _Probe(eye, source, columns, looks=len(owners) + len(candidates))

        def look(name: str, *those: Policy) -> Finding:
            return probe.finding(name, those, runtime.generator(seed, "views", name))

        operations = [_judged(look(name, policy.only(name))) for name, policy in owners.items()]
        tried = [_judged(look(name, policy)) for name, policy in candidates.items()]
        proposed = _proposal(policies, operations, tried, found)
        left = shortcuts(proposed, images, runtime.generator(seed, "shortcuts"))
        whole, better = look("whole policy", *policies), look("proposed", *proposed)
    return Audit(
        policies=policies,
        proposed=proposed,
        whole=whole,
        better=better,
        operations=operations,
        candidates=tried,
        shortcuts=dict(found),
        shortcuts_left=dict(left),
        among=min(256, len(images)),
        verdict=_verdict(policies, proposed, operations, tried, found, left, whole, better),
        source=source,
        originals=eye.pictures,
        asked={"columns": len(probe.columns), "words": len(probe.words), "families": len(probe.families)},
        views=views,
        encoder=f"{tower.encoder.spec['name']} at {tower.encoder.spec['size']} px",
        skipped=skipped,
    )


# What is measured


class _Seen(NamedTuple):
    """Views as the audit sees them: v views of each of n items."""

    encoded: Float[np.ndarray, "n v e"]  # around the originals' mean, of length one
    features: Float[np.ndarray, "n v d"]  # the same beside a thumbnail
    changed: Bool[np.ndarray, "n v"]
    pictures: np.ndarray  # uint8 [n, v, h, w, 3]


class _Eye:
    """The frozen encoder and a thumbnail, over the same originals again and again."""

    def __init__(self, tower: Tower, images: Tensor, views: int, *, total: int, quiet: bool):
        self._tower, self._images, self.views = tower, images, views
        assert isinstance(tower.encoder, ImageEncoder)
        self._size, self._channels, self._device = tower.encoder.size, tower.encoder.channels, device_of(tower)
        few = total < FEW  # exporting the encoder would take longer than running it as it is
        self._encode: Callable = tower.encoder if few else accelerate(tower.encoder, runtime.cache_dir() / "onnx")
        self.line = Line("audit", unit="views", quiet=quiet)
        self._done, self._total = 0, total
        self._mean: list[np.ndarray] = []

    def originals(self, policy: Policy) -> _Seen:
        """The pictures untouched; all features are told around the mean of these."""
        bare = policy.only()
        plain, pictures, raw = [], [], []
        for start in range(0, len(self._images), BATCH):
            x = bare(self._images[start : start + BATCH], torch.Generator())
            plain.append(x)
            pictures.append(_small(x))
            raw.append(self._features(x))
        self._plain, self.pictures = plain, np.concatenate(pictures)
        both = [np.concatenate(part) for part in zip(*raw, strict=True)]
        self._mean = [part.mean(0) for part in both]
        encoded, features = self._joined(both)
        return _Seen(encoded[:, None], features[:, None], np.zeros((len(encoded), 1), bool), self.pictures[:, None])

    def views_of(self, policies: Sequence[Policy], draw: torch.Generator) -> _Seen:
        """`views` views of each picture, the policies taking turns."""
        encoded, features, changed, pictures = [], [], [], []
        for view in range(self.views):
            policy = policies[view % len(policies)]
            raw, own, shown = [], [], []
            for place, plain in enumerate(self._plain):
                x = policy(self._images[place * BATCH : (place + 1) * BATCH], draw)
                own.append(((x - plain).abs().amax((1, 2, 3)) > CHANGED).numpy())
                shown.append(_small(x))
                raw.append(self._features(x))
            both = self._joined([np.concatenate(part) for part in zip(*raw, strict=True)])
            encoded.append(both[0])
            features.append(both[1])
            changed.append(np.concatenate(own))
            pictures.append(np.concatenate(shown))
        return _Seen(*(np.stack(part, 1) for part in (encoded, features, changed, pictures)))

    def _features(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        shown = _of_channels(x, self._channels)
        if shown.shape[-1] != self._size:
            shown = F.interpolate(shown, (self._size, self._size), mode="bilinear", antialias=True)
        with inference(self._tower):
            z = self._tower.head(self._encode(shown.to(self._device))).float().cpu().numpy()
        self._done += len(x)
        self.line.update(self._done, self._total)
        return z, F.adaptive_avg_pool2d(x, THUMB).flatten(1).numpy()

    def _joined(self, both: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's features, and these beside the thumbnail: both around the originals' mean, of length one."""
        z, thumb = (_unit(part - mean) for part, mean in zip(both, self._mean, strict=True))
        return z, np.concatenate([z, SHARE * thumb], 1) / math.hypot(1, SHARE)


class _Probe:
    """The questions, and what originals answer; `finding` asks them of views."""

    def __init__(self, eye: _Eye, source: Source, names: Sequence[str] | None, *, looks: int):
        self._eye, self._looks = eye, looks
        self.columns: list[Column] = columns_of(source, names)
        self.words = words_of(source.texts, WORDS)
        self.families: list[Family] = families_of(source.texts)
        n = len(source)
        self._fold = np.random.default_rng(0).permutation(n) % FOLDS
        self._originals: _Seen | None = None

    def finding(self, name: str, policies: Sequence[Policy], draw: torch.Generator) -> Finding:
        if self._originals is None:
            self._originals = self._eye.originals(policies[0])
            z = self._originals.encoded[:, 0]
            self._twins = z @ z.T > 1 - SAME
            self._answers = self._asked(self._originals.features)
        seen = self._eye.views_of(policies, draw)
        cosines = seen.encoded @ self._originals.encoded[:, 0].T
        margin, nearest = self._margins(cosines)
        changed = seen.changed
        owner = np.broadcast_to(np.arange(len(changed))[:, None], changed.shape)[changed]
        confused = margin[changed] > -TIE
        answers = self._asked(seen.features)
        return Finding(
            name=name,
            setting=str(policies[0]).partition(", ")[2],
            changed=float(changed.mean()),
            confusion=bootstrap(confused, groups=owner.tolist()) if changed.any() else None,
            foreign=self._foreign(seen) if changed.any() else None,
            losses=[
                *self._column_losses(answers),
                *self._word_losses(answers),
                *(losses := self._family_losses(cosines, changed)),
            ],
            cases=self._cases(seen, margin, nearest, cosines, losses),
        )

    def _margins(self, cosines: np.ndarray) -> tuple[Float[np.ndarray, "n v"], Int[np.ndarray, "n v"]]:
        """How much nearer the nearest other picture is than the own, and which it is; twins are not others."""
        n = len(cosines)
        own = cosines[np.arange(n), :, np.arange(n)]
        others = np.where(self._twins[:, None], -np.inf, cosines)
        nearest = others.argmax(2)
        return others.max(2) - own, nearest

    def _asked(self, features: Float[np.ndarray, "n v d"]) -> Float[np.ndarray, "n v k"]:
        """Each column's classes and each word, predicted for items that the probe was not fitted on."""
        n, v, _ = features.shape
        targets = [np.eye(len(c.classes) + 1)[c.values][:, :-1] for c in self.columns]  # −1: the last, which is cut
        targets += [has[:, None].astype(float) for has in self.words.values()]
        if not targets:
            return np.zeros((n, v, 0))
        y = np.repeat(np.concatenate(targets, 1), v, axis=0)
        return _held_out(features.reshape(n * v, -1), y, np.repeat(self._fold, v)).reshape(n, v, -1)

    def _column_losses(self, answers: np.ndarray) -> list[Loss]:
        losses: list[Loss] = []
        at = 0
        for name, values, classes in self.columns:
            here = slice(at, at := at + len(classes))
            known = values >= 0
            right = [(a[known][:, :, here].argmax(2) == values[known, None]).mean(1) for a in (self._answers, answers)]
            fall = self._corrected(right[0] - right[1], len(self.columns))
            losses.append(Loss(name, "column", "accuracy", int(known.sum()), float(right[0].mean()), fall))
        return sorted(losses, key=lambda loss: -loss.fall.value)

    def _word_losses(self, answers: np.ndarray, shown: int = 3) -> list[Loss]:
        first = answers.shape[2] - len(self.words)
        falls = []
        for place, (word, has) in enumerate(self.words.items(), first):
            before, after = (_placements(a[:, :, place], has) for a in (self._answers, answers))
            if before.mean() >= READ:
                falls.append((float((before - after).mean()), word, before, after))
        worst = sorted(falls, key=lambda fall: -fall[0])[:shown]
        return [
            Loss(
                word,
                "word",
                "AUC",
                members=len(before),
                before=float(before.mean()),
                fall=self._corrected(before - after, len(self.words)),
            )
            for _, word, before, after in worst
        ]

    def _family_losses(self, cosines: np.ndarray, changed: Bool[np.ndarray, "n v"]) -> list[Loss]:
        """Of the changed views: an arrow up is the same arrow when left and right are swapped."""
        losses = []
        for family in self.families:
            counts = changed[family.items].sum(1)
            mistaken = (self._mistaken(family, cosines, changed)[0] > -TIE).sum(1)
            if (asked := counts > 0).sum() >= LEAST:
                fall = share(mistaken[asked] / counts[asked], level=self._level(len(self.families)))
                losses.append(Loss(family.pattern, "family", "accuracy", int(asked.sum()), 1.0, fall))
        return sorted(losses, key=lambda loss: -loss.fall.value)

    def _mistaken(
        self, family: Family, cosines: np.ndarray, changed: Bool[np.ndarray, "n v"]
    ) -> tuple[Float[np.ndarray, "m v"], Int[np.ndarray, "m v"]]:
        """How much nearer the changed views of a family's items lie to another member, and to which; else −∞."""
        at = np.array(family.items)
        inside = np.where(self._twins[np.ix_(at, at)][:, None], -np.inf, cosines[at][:, :, at])
        margin = inside.max(2) - cosines[at, :, at]
        return np.where(changed[at], margin, -np.inf), at[inside.argmax(2)]

    def _corrected(self, falls: Float[np.ndarray, "n"], asked: int) -> Interval:
        """The mean; its interval holds at 95 % for all that is asked of all operations at once (Bonferroni)."""
        return bootstrap(falls, level=self._level(asked), resamples=1000 + 100 * asked * self._looks)

    def _level(self, asked: int) -> float:
        return 1 - 0.05 / (asked * self._looks)

    def _foreign(self, seen: _Seen) -> Interval:
        """AUC of a probe that tells changed views from originals, over items that it was not fitted on."""
        assert self._originals is not None
        originals = self._originals.features[:, 0]
        n = len(originals)
        item, view = seen.changed.nonzero()
        x = np.concatenate([originals, seen.features[item, view]])
        y = np.arange(len(x))[:, None] >= n
        score = _held_out(x, y.astype(float), np.concatenate([self._fold, self._fold[item]]))[:, 0]
        below = np.searchsorted(np.sort(score[:n]), score[n:], side="left")
        upto = np.searchsorted(np.sort(score[:n]), score[n:], side="right")
        return bootstrap((below + upto) / (2 * n), groups=item.tolist())

    def _cases(
        self, seen: _Seen, margin: np.ndarray, nearest: np.ndarray, cosines: np.ndarray, losses: list[Loss]
    ) -> list[Case]:
        """The worst mistakes, an item once: first of the families that lose most, then among all."""
        found: list[tuple[int, int, int, str]] = []
        patterns = [loss.name for loss in losses[:2] if loss.fall.low > 0]
        for family in (f for pattern in patterns for f in self.families if f.pattern == pattern):
            apart, other = self._mistaken(family, cosines, seen.changed)
            for row, view in _largest(apart, 2):
                found.append((family.items[row], view, int(other[row, view]), family.pattern))
        inside = np.where(seen.changed, margin, -np.inf)
        for item, view in _largest(inside, CASES):
            if len(found) < CASES and item not in [case[0] for case in found]:
                found.append((item, view, int(nearest[item, view]), ""))
        return [Case(item, other, family, seen.pictures[item, view]) for item, view, other, family in found]


def share(parts: Float[np.ndarray, "n"], *, level: float) -> Interval:
    """The mean of numbers in [0, 1] that are mostly 0 or 1, in the interval of Clopper and Pearson (Biometrika 1934).

    A bootstrap of few items ends at 0 or 1 at any level that many questions ask for: of 14 arrows 6 may be mistaken for
    others, and one resample in 3,000 has none of these.
    """
    n, total = len(parts), float(parts.sum())
    tail = (1 - level) / 2
    low = _least(math.floor(total + TIE), n, tail)
    return Interval(total / n, low, 1 - _least(n - math.ceil(total - TIE), n, tail))


def _least(hits: int, n: int, tail: float) -> float:
    """The share of which n draws give `hits` or more with probability `tail`; 0 for no hits."""
    if hits == 0:
        return 0.0
    k = torch.arange(hits, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    low, high = 0.0, hits / n
    for _ in range(50):
        middle = (low + high) / 2
        likely = (ways + k * math.log(middle) + (n - k) * math.log1p(-middle)).exp().sum()
        low, high = (low, middle) if likely > tail else (middle, high)
    return low


def _held_out(
    x: Float[np.ndarray, "r d"], y: Float[np.ndarray, "r k"], fold: Int[np.ndarray, "r"]
) -> Float[np.ndarray, "r k"]:
    """Ridge regression of y on x, predicted for each fold from the others; the penalty counts per 512 rows."""
    rows, targets = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    answer = torch.empty_like(targets)
    for k in range(FOLDS):
        held = torch.from_numpy(fold == k)
        mean, level = rows[~held].mean(0), targets[~held].mean(0)
        a, b = rows[~held] - mean, targets[~held] - level
        gram = a.T @ a + PENALTY * len(a) / 512 * torch.eye(a.shape[1], dtype=a.dtype)
        weights = torch.cholesky_solve(a.T @ b, torch.linalg.cholesky(gram))
        answer[held] = (rows[held] - mean) @ weights + level
    return answer.numpy()


def _placements(scores: Float[np.ndarray, "n v"], has: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """For each item that has the word: the share of those without it that score lower. Their mean is the AUC."""
    shares = []
    for score in scores.T:
        without = np.sort(score[~has])
        below = np.searchsorted(without, score[has], side="left") + np.searchsorted(without, score[has], side="right")
        shares.append(below / (2 * len(without)))
    return np.mean(shares, axis=0)


def _largest(table: Float[np.ndarray, "n v"], count: int) -> list[tuple[int, int]]:
    """Row and column of the largest entries above 0, each row once."""
    best = table.argmax(1)
    rows = sorted(range(len(table)), key=lambda row: -table[row, best[row]])[:count]
    return [(row, int(best[row])) for row in rows if table[row, best[row]] > -TIE]


# What follows from it


def _judged(finding: Finding) -> Finding:
    return finding._replace(verdict=_verdict_of(finding))


def _verdict_of(finding: Finding) -> Verdict:
    if finding.confusion is None or finding.foreign is None:
        return "does nothing"
    dearest = max((loss.fall.value for loss in finding.paid), default=0.0)
    if finding.name in SYMMETRIES:
        confuses, foreign = finding.confusion.value >= CONFUSED, finding.foreign.value >= FOREIGN
        if dearest or (confuses and foreign):
            return "not free"
        return "no price found" if confuses or foreign else "free"
    return "costs much" if dearest >= DEAR else "costs" if dearest else "no price found"


def _proposal(
    policies: tuple[Policy, ...], operations: list[Finding], tried: list[Finding], found: Any
) -> tuple[Policy, ...]:
    """Without what does nothing or costs much, with less of what costs; symmetries that are free come in."""
    free = {finding.name for finding in (*operations, *tried) if finding.verdict in ("free", "no price found")}
    for finding in operations:
        if finding.verdict in ("does nothing", "not free") or (
            finding.verdict == "costs much" and finding.name != "crop"
        ):
            policies = tuple(policy.without(finding.name) for policy in policies)
        elif finding.verdict in ("costs", "costs much"):
            policies = tuple(_halved(policy, finding.name) for policy in policies)
    for finding in tried:
        if finding.verdict == "free":
            policies = tuple(_tried(policy, finding.name, alone=False) for policy in policies)
    for name, top in found.items():
        closing = [op for op in CLOSERS[name] if op in free] if top.low > OPEN else []
        for op in closing:
            policies = tuple(policy.scaled(op, 0.8) if _strength(policy, op) < 0.8 else policy for policy in policies)
    return policies


def _tried(policy: Policy, name: str, *, alone: bool = True) -> Policy:
    """The policy with an operation it has not, as one would first try it: half of all views, turns all four ways."""
    strength = 0.75 if name == "turns" else 0.5
    return (policy.only() if alone else policy).scaled(name, strength)


def _halved(policy: Policy, name: str) -> Policy:
    """Half of an operation's strength, or of its probability if that is all it has."""
    if name not in policy.operations:
        return policy
    chance = OPERATIONS[name].chance
    halved = policy.scaled(name, _strength(policy, name) / 2)
    return replace(halved, **{chance: getattr(policy, chance)}) if chance not in (None, name) else halved


def _strength(policy: Policy, name: str) -> float:
    """An operation's strength from 0 (off) to 1 (full), as `Policy.scaled` counts it."""
    chance, weakest, strongest = OPERATIONS[name]
    if name not in policy.operations:
        return 0.0
    if not weakest:
        return float(getattr(policy, str(chance)))
    ends = [(np.ravel(getattr(policy, f)), np.ravel(weakest[f]), np.ravel(strongest[f])) for f in weakest]
    now, low, high = (np.concatenate(part) for part in zip(*ends, strict=True))
    moved = low != high
    return float(np.clip(((now - low)[moved] / (high - low)[moved]).max(), 0, 1))


def _has(policies: Sequence[Policy], name: str) -> bool:
    return any(name in policy.operations for policy in policies)


def _possible(name: str, channels: int) -> bool:
    return channels == 3 or name not in ("saturation", "hue", "gray")


# In words


def points(loss: Loss) -> str:
    """A loss in words: "… heart −41 points"."""
    name = {"column": loss.name, "word": f"the word “{loss.name}”", "family": f"“{loss.name}”"}[loss.kind]
    return f"{name} −{100 * loss.fall.value:.0f} points"


def price(finding: Finding) -> str:
    """What an operation does, in a sentence."""
    if finding.confusion is None or finding.foreign is None:
        return "changes none of these pictures"
    parts = [f"{100 * finding.confusion.value:.0f} % of its views lie nearer to another picture"]
    parts += [", ".join(points(loss) for loss in finding.paid[:3])] if finding.paid else ["nothing measurable is lost"]
    if finding.name in SYMMETRIES:
        alike = "the data hold such pictures" if finding.foreign.value < FOREIGN else "the data hold no such pictures"
        parts.append(f"{alike} (AUC {finding.foreign.value:.2f})")
    return "; ".join(parts)


def sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _verdict(
    policies: tuple[Policy, ...],
    proposed: tuple[Policy, ...],
    operations: list[Finding],
    tried: list[Finding],
    found: Any,
    left: Any,
    whole: Finding,
    better: Finding,
) -> list[str]:
    both = [*operations, *tried]
    lines = []
    if nothing := [f.name for f in both if f.verdict == "does nothing"]:
        lines.append(f"Does nothing to these pictures: {', '.join(nothing)}.")
    if free := [f.name for f in both if f.verdict == "free"]:
        lines.append(f"Free, the data have this symmetry: {', '.join(free)}.")
    lines += [f"Not free: {f.name}. {sentence(price(f))}." for f in both if f.verdict == "not free"]
    lines += [
        f"{sentence(f.verdict)}: {f.name}. {sentence(price(f))}." for f in operations if f.verdict.startswith("costs")
    ]
    open_before = [f"{name} ({100 * top.value:.0f} %)" for name, top in found.items() if top.low > OPEN]
    open_after = [f"{name} ({100 * top.value:.0f} %)" for name, top in left.items() if top.low > OPEN]
    lines.append(f"Shortcuts open now: {', '.join(open_before) or 'none'}; under the proposed policy: "
                 f"{', '.join(open_after) or 'none'}.")  # fmt: skip
    assert whole.confusion is not None
    after = f"{100 * better.confusion.value:.0f} %" if better.confusion else "none"
    lines.append(
        f"Of the whole policy's views {100 * whole.confusion.value:.0f} % lie nearer to another picture, "
        f"of the proposed one's {after}."
    )
    changes = dict.fromkeys(one.diff(other) for one, other in zip(policies, proposed, strict=True))
    lines.append(f"Proposed: {' | '.join(change or 'no change' for change in changes)}.")
    return lines


# Pictures


def _tower(encoder: Bundle | Tower | ImageEncoder | None) -> Tower:
    if encoder is None:
        encoder = image_encoder(size=96)
    if isinstance(encoder, Bundle):
        return encoder.tower("image")
    return encoder if isinstance(encoder, Tower) else Tower(encoder)


def picture_side(source: Source) -> int:
    """The shorter side of the first picture that can be read."""
    for image, name in zip(source.images or (), source.ids, strict=True):
        try:
            return min(decode(image, channels=None, name=name).shape[:2])
        except DataError:
            continue
    raise DataError(f"None of the {len(source)} pictures of {source.name} that were drawn could be read.")


def _of_channels(x: Float[Tensor, "b c h w"], channels: int) -> Float[Tensor, "b d h w"]:
    """The pictures for an encoder of so many channels: three of them, or one repeated, stand for others."""
    if x.shape[1] == channels:
        return x
    if channels == 3:
        return x[:, :3] if x.shape[1] > 3 else x[:, :1].expand(-1, 3, -1, -1)
    raise UsageError(f"The encoder takes {channels} channels and the pictures have {x.shape[1]}. Give another encoder.")


def _small(x: Float[Tensor, "b c h w"]) -> np.ndarray:
    """Small pictures to show, uint8 [b, h, w, 3]."""
    side = min(PICTURE, x.shape[-1])
    small = F.interpolate(_of_channels(x, 3), (side, side), mode="bilinear", antialias=True)
    return (255 * small).round().clamp_(0, 255).byte().permute(0, 2, 3, 1).numpy()


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
