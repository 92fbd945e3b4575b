"""Is it learning, and if not, why not? A run's log, and what its encoders make of data, put into words and pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.sources import Source
from twofold.data.video import watch
from twofold.errors import DataError, TrainingError, UsageError
from twofold.measure import findings
from twofold.measure.collapse import Health, health
from twofold.measure.copies import loss_allowed, picture_groups, small
from twofold.measure.diagnosis import Verdict, diagnose, examined
from twofold.measure.embed import embed
from twofold.measure.hubness import Gap, gap
from twofold.measure.layout import layout
from twofold.measure.metrics import unit_rows
from twofold.measure.negatives import Microscope, of_bank, of_pairs, of_views
from twofold.measure.selection import judging, trusted, view_retrieval
from twofold.measure.shortcuts import shortcuts
from twofold.measure.structure import Comparison, Structure, compare_spaces, nearest, structure
from twofold.methods import METHODS, VJEPA, Method
from twofold.methods.facts import FACTS
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import inference
from twofold.progress import Line
from twofold.train.align import PAIRED, linked
from twofold.train.log import read_log
from twofold.train.masked import Predicted, as_rgb, predicted
from twofold.train.restored import leak, method_name, restored, views_of
from twofold.views import Policy
from twofold.views.sheet import contact_sheet

VIEWS, OF = 4, 256  # views of so many pictures, for alignment and LiDAR; two of them for the microscope
BATCH = 64  # pictures embedded at once
CLIPS = 32  # of which some is hidden
QUERIES, NEIGHBOURS = 8, 6  # of the sheet of neighbours
SIDE = 48  # pixels a side of a picture on the page
MAP = 300  # items on the map
SHEET = 3  # pictures on the sheet of the policy
ALIKE = 0.95  # of the positive's cosine: a negative that scores so much may be a false one
DEFAULT = 0.2  # the temperature of the microscope where the method has none
ORDER = ("bad", "warn", "good")


class Neighbours(NamedTuple):
    """An item and those whose embeddings lie nearest, with their cosines."""

    item: int
    nearest: list[tuple[int, float]]


class Side(NamedTuple):
    """What one tower makes of its column of the data; rows are those of the shown items."""

    name: str
    health: Health
    head: Health | None  # behind the training's head, where the loss is taken
    structure: Structure
    neighbours: list[Neighbours]
    places: Float[np.ndarray, "m 2"]  # on the map, 0..1, of the items `mapped`
    mapped: list[int]
    view_retrieval: float | None = None  # of pictures: by views that are the same for all encoders

    @property
    def promise(self) -> str:
        """What to set beside another run's on the same pictures where there are no labels, and how far to trust it."""
        if self.view_retrieval is None:
            return ""
        return f"view retrieval {self.view_retrieval:.2f}, to set beside other runs' on these pictures ({trusted()})"


class Against(NamedTuple):
    """Another encoder, on the same items."""

    name: str
    spaces: Comparison


class Shown(NamedTuple):
    """The items that were looked at: what a page shows of them."""

    ids: list[str]
    words: list[str]  # a caption, a class, or nothing
    thumbnails: UInt8[np.ndarray, "n h w 3"] | None


class Doctored(NamedTuple):
    """What was found. Everything from `shown` on takes data and is None or empty without."""

    name: str
    record: dict[str, Any]
    environment: dict[str, Any]
    log: list[dict[str, Any]]
    verdicts: list[Verdict]
    shown: Shown | None = None
    sides: Sequence[Side] = ()
    microscopes: Mapping[str, Microscope] = {}  # of a "batch" of views or "pairs", of a "queue", of the "corpus"
    gap: Gap | None = None  # between the two sides of pairs
    predicted: Predicted | None = None
    policy: UInt8[np.ndarray, "h w 3"] | None = None  # a sheet of views as the run saw them
    against: Against | None = None

    @property
    def worst(self) -> str:
        """good, warn or bad: the tone of the worst verdict."""
        return next((tone for tone in ORDER if any(v.tone == tone for v in self.verdicts)), "good")

    @property
    def figures(self) -> dict[str, Any]:
        """All but the log and the pictures."""
        painted = self.predicted and self.predicted._replace(painted=None)
        found = self._replace(predicted=painted)._asdict()
        return {name: value for name, value in found.items() if name not in ("log", "shown", "policy")}


def doctor(
    run: Path | str,
    data: Source | None = None,
    *,
    against: Path | str | None = None,
    limit: int = 1000,
    temperature: float | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Doctored:
    """Examine a run by its log, and with `data` what its encoders make of at most `limit` items and their views.

    A bundle without a run, or an encoder by its name, is looked at by data alone. Views are those the run trained with.
    The microscope looks behind the training's head, at the run's temperature where it has one, else at `temperature` or
    .2. `against` is another run, bundle or encoder on the same items. Raises UsageError where there is nothing to
    examine.
    """
    place = Path(run)
    if (place / "run.json").exists():
        record = json.loads((place / "run.json").read_text())
        log = read_log(place / "log.jsonl")
        there = place / "environment.json"
        environment = json.loads(there.read_text()) if there.exists() else {}
        done = Doctored(place.resolve().name, record, environment, log, diagnose(log, record))
        if data is not None and not (place / "bundle").exists():
            raise UsageError(
                f"{place} has no bundle yet: training has not ended. Without --data its log can be examined."
            )
    else:
        if place.exists() and not (place / "bundle.json").exists():
            raise UsageError(
                f"{place} holds no run (no run.json) and no bundle. Give the folder that `twofold train --out` wrote."
            )
        done = Doctored(str(run), {}, {}, [], [])
        if data is None:
            raise UsageError(f"{run} has no log to examine, for it is no run: --data lets its embeddings be looked at.")
    if data is None:
        if against is not None:
            raise UsageError("Two encoders are compared on data: give --data.")
        return done
    runtime.keep_freed_memory()
    bundle = Bundle.of(run, heads=True)
    data = data.sample(limit)
    if "image" in bundle.towers and len(bundle.towers) == 1:
        done = _of_pictures(done, bundle, _method(place, done.record), data, temperature, seed, quiet)
    else:
        done = _of_towers(done, bundle, data, temperature, seed, quiet)
        if isinstance(method := _method(place, done.record), VJEPA):
            done = _of_clips(done, bundle, method, data, seed)
    if against is not None:
        done = done._replace(against=_against(done, bundle, data, against, quiet))
    return done._replace(verdicts=sorted(done.verdicts, key=lambda verdict: ORDER.index(verdict.tone)))


# -- One tower that sees ----------------------------------------------------------------------------------------------


def _of_pictures(
    done: Doctored,
    bundle: Bundle,
    method: Method | None,
    data: Source,
    temperature: float | None,
    seed: int,
    quiet: bool,
) -> Doctored:
    if data.images is None:
        raise DataError(f"The encoder of {done.name} sees; {data.name} has no pictures.")
    tower, head = bundle.towers["image"], bundle.heads.get("image")
    pixels, kept, z = _seen(tower, data, quiet)
    data = data.take(kept)
    few = pixels[:OF]
    name = method_name(done.record)
    policies = _views(done.record, name, int(tower.encoder.spec["size"]))
    draw = runtime.generator(seed, "doctor")
    looks = [policies[k % len(policies)] for k in range(VIEWS)]
    made = [_viewed((tower,) if head is None else (tower, head), look, few, draw) for look in looks]
    features, behind = [each[0] for each in made], [each[-1] for each in made]
    found = health(z, torch.stack(features, 1))
    headed = health(torch.cat(behind[:2]), torch.stack(behind, 1)) if head is not None else None

    groups = picture_groups(torch.cat([small(_floats(some)) for some in pixels.split(BATCH)]))
    at = temperature or _temperature(done.record) or DEFAULT
    same = {"copies": _same(groups[:OF])}
    if data.labels is not None:
        same["one label"] = _same(data.labels[:OF])
    batch = of_views(behind[0], behind[1], temperature=at, same=same, alike=ALIKE)
    microscopes = {"batch": batch}
    plain = z
    if head is not None:
        (plain,) = _viewed((head,), policies[0].only(), pixels, draw)
    own = torch.eye(len(plain), dtype=torch.bool)[: len(behind[0])]
    microscopes["corpus"] = of_bank(behind[0], behind[1], plain, temperature=at, alike=ALIKE, excluded=own)

    verdicts = [*done.verdicts, *examined(found)]
    norms = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in tower.modules())
    verdicts += findings.of_statistics(done.log, found, batchnorm=norms)
    trained_on = int(done.record.get("batch", 0))
    verdicts += findings.of_copies(groups, _taken_for_one(z), trained_on)
    contrasts = bool(name and FACTS[name].negatives and "label" not in METHODS[name].needs)
    if contrasts:
        verdicts += [*findings.of_negatives(batch), *findings.of_positives(batch, found)]
        verdicts += findings.of_shortcuts(shortcuts(policies, few, runtime.generator(seed, "shortcuts")), len(few))
    if name == "simclr":
        verdicts += findings.of_allowed(done.log, loss_allowed(groups, trained_on))
    hidden = None
    if method is not None:
        queue = getattr(method, "queue", None)
        if queue is not None:
            microscopes["queue"] = of_bank(behind[0], behind[1], queue.keys, temperature=at, alike=ALIKE)
        if contrasts:
            pair = looks[0](few, draw), looks[1](few, draw)
            leaks = leak(method, pair, batch=min(trained_on, len(few) // 2))
            verdicts += findings.of_leak(*leaks) if leaks is not None else []
        if name and FACTS[name].patches:
            hidden = predicted(method, policies[0](few[:BATCH], draw), seed=seed)
            verdicts += findings.of_predictions(hidden.by_distance, hidden.constant) if hidden else []
    return done._replace(
        verdicts=verdicts,
        shown=_shown(data, _thumbnails(pixels)),
        sides=[_side("image", z, data, found, headed, seed)._replace(view_retrieval=_promise(tower, few, seed))],
        microscopes=microscopes,
        predicted=hidden,
        policy=np.asarray(
            contact_sheet(policies, few[:SHEET], runtime.generator(seed, "sheet"), views=4).convert("RGB")
        )
        if name and FACTS[name].views
        else None,
    )


def _seen(tower: Tower, data: Source, quiet: bool) -> tuple[Tensor, np.ndarray, Float[Tensor, "n d"]]:
    """Pixels, the items that they are of, and the tower's embeddings."""
    size, channels = int(tower.encoder.spec["size"]), int(tower.encoder.spec["channels"])
    with Line("look", unit="images", quiet=quiet) as line:
        pixels, kept, _ = decoded(data, size, channels=channels, progress=line.update)
        if len(kept) < 8:
            raise DataError(f"{data.name} has {len(kept)} readable pictures; eight are the least to say anything of.")
        pictures = torch.tensor(pixels)
        parts = []
        for start in range(0, len(pictures), BATCH):
            parts.append(_encoded(tower, _floats(pictures[start : start + BATCH])))
            line.update(min(start + BATCH, len(pictures)), len(pictures))
    return pictures, kept, torch.cat(parts)


def _promise(tower: Tower, few: Tensor, seed: int) -> float:
    """View retrieval by the views that judge all encoders, not by those of the run."""
    judge = judging("simclr", int(tower.encoder.spec["size"]), few.shape[1])
    draw = runtime.generator(seed, "judge")
    first, second = (_viewed((tower,), judge, few, draw)[0] for _ in range(2))
    return view_retrieval(first, second)


def _method(place: Path, record: Mapping[str, Any]) -> Method | None:
    """The run's method; None where there is none that can be put together again from its record."""
    try:
        return restored(place, record)
    except TrainingError:
        return None


def _floats(pictures: Tensor) -> Float[Tensor, "b c h w"]:
    top = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(pictures.dtype, 1.0)
    return pictures.float() / top


def _encoded(tower: Tower, pictures: Tensor) -> Float[Tensor, "n d"]:
    with inference(tower), torch.no_grad():
        return torch.cat([tower(batch).float().cpu() for batch in pictures.split(BATCH)])


def _viewed(
    towers: Sequence[Tower], policy: Policy, pixels: Tensor, draw: torch.Generator
) -> list[Float[Tensor, "n d"]]:
    """What each tower makes of a view of each picture; no more than a batch of views is held."""
    parts: list[list[Tensor]] = [[] for _ in towers]
    for some in pixels.split(BATCH):
        view = policy(some, draw)
        for tower, made in zip(towers, parts, strict=True):
            made.append(_encoded(tower, view))
    return [torch.cat(made) for made in parts]


def _views(record: Mapping[str, Any], name: str, size: int) -> tuple[Policy, ...]:
    """The largest of the policies that the run trained with, at the encoder's size."""
    chosen = views_of(record, name)
    largest = max(policy.size for policy in chosen)
    return tuple(replace(policy, size=size) for policy in chosen if policy.size == largest)


def _temperature(record: Mapping[str, Any]) -> float | None:
    given = record.get("options", {}).get("temperature")
    if given is not None:
        return float(given)
    name = method_name(record)
    defaults = getattr(METHODS[name].__init__, "__kwdefaults__", None) if name else None
    value = (defaults or {}).get("temperature")
    return float(value) if isinstance(value, int | float) else None


def _same(values: np.ndarray) -> Tensor:
    """Which two items have one value, −1 being none."""
    own = torch.as_tensor(values)
    return ((own[:, None] == own) & (own >= 0)).fill_diagonal_(False)


def _taken_for_one(z: Tensor) -> float:
    """The share of items that have another at a cosine of nearly 1."""
    return float((nearest(z, 1).cosines[:, 0] >= findings.COPIES).float().mean())


# -- Towers of pairs, and of other kinds ------------------------------------------------------------------------------


def _of_towers(
    done: Doctored, bundle: Bundle, data: Source, temperature: float | None, seed: int, quiet: bool
) -> Doctored:
    names = [name for name in bundle.towers if name in data.modalities]
    if not names:
        raise DataError(
            f"{done.name} has towers for {', '.join(bundle.towers)}; {data.name} has {', '.join(data.modalities)}."
        )
    made = {name: embed(bundle, data, name, quiet=quiet) for name in names}
    kept = sorted(set.intersection(*(set(each.kept.tolist()) for each in made.values())))
    if len(kept) < 8:
        raise DataError(f"{data.name} has {len(kept)} items that all towers read; eight are the least.")
    rows = {}
    for name, each in made.items():  # the first text of an item stands for it
        rows[name] = torch.from_numpy(each.matrix[each.offsets[np.searchsorted(each.kept, kept)]])
    data = data.take(kept)
    verdicts, microscopes, apart = [*done.verdicts], {}, None
    sides = []
    for name in names:
        found = health(rows[name])
        verdicts += [verdict._replace(says=f"{name}: {verdict.says}") for verdict in examined(found)]
        sides.append(_side(name, rows[name], data, found, None, seed))
    if len(names) == 2:
        first, second = (rows[name] for name in names)
        apart = gap(first, second)
        few = slice(0, 2 * OF)
        sigmoid = "siglip" in bundle.meta or done.record.get("method") == "SigLIP"
        scales = [line["scale"] for line in done.log if "scale" in line]
        scales = scales or [each["scale"] for each in (bundle.meta.get("siglip"),) if each]
        at = temperature or (1 / scales[-1] if scales else PAIRED)
        same = {"one caption or file": _same(linked(data, names)[few])}
        if data.labels is not None:
            same["one label"] = _same(data.labels[few])
        seen = of_pairs(
            first[few],
            second[few],
            temperature=at,
            same=same,
            alike=ALIKE,
            loss="sigmoid" if sigmoid else "softmax",
        )
        microscopes["pairs"] = seen
        verdicts += [*findings.of_negatives(seen), *findings.of_sides(apart, seen, names)]
    return done._replace(
        verdicts=verdicts,
        shown=_shown(data, _pictured(data)),
        sides=sides,
        microscopes=microscopes,
        gap=apart,
    )


def _of_clips(done: Doctored, bundle: Bundle, method: VJEPA, data: Source, seed: int) -> Doctored:
    """What is hidden of a few clips, as they are embedded."""
    assert done.shown is not None
    encoder: Any = bundle.towers["video"].encoder
    ids = {each: row for row, each in enumerate(data.ids)}
    cells = data.column("video").cells
    clips = [encoder.prepare(cells[ids[each]], name=each) for each in done.shown.ids[:CLIPS]]
    hidden = predicted(method, encoder.batch(clips), seed=seed)
    if hidden is None:
        return done
    said = findings.of_predictions(hidden.by_distance, hidden.constant)
    return done._replace(predicted=hidden, verdicts=[*done.verdicts, *said])


def _pictured(data: Source) -> UInt8[np.ndarray, "n h w 3"] | None:
    """What items look like, clips by the frame in their middle; None where they cannot be seen."""
    if data.images is None and "video" in data.modalities.values():
        cells = data.column(data.only("video")).cells
        clips = [watch(clip, SIDE, name=each) for clip, each in zip(cells, data.ids, strict=True)]
        middle = torch.from_numpy(np.stack([clip[len(clip) // 2] for clip in clips]))
        return _thumbnails(_floats(middle.permute(0, 3, 1, 2)))
    if data.images is None:
        return None
    pixels, kept, _ = decoded(data, 2 * SIDE)
    shown = np.full((len(data), SIDE, SIDE, 3), 128, np.uint8)
    shown[kept] = _thumbnails(torch.tensor(pixels))
    return shown


# -- What both have ---------------------------------------------------------------------------------------------------


def _side(name: str, z: Tensor, data: Source, found: Health, head: Health | None, seed: int) -> Side:
    texts = data.texts if data.texts is not None else None
    lies = structure(z, data.labels, classes=data.classes, texts=texts, seed=seed)
    mapped = torch.randperm(len(z), generator=runtime.generator(seed, "map"))[:MAP].sort().values.tolist()
    places = layout(unit_rows(z[mapped]).numpy(), seed=seed)
    return Side(name, found, head, lies, _nearest(z, seed), places, mapped)


def _nearest(z: Tensor, seed: int) -> list[Neighbours]:
    near = nearest(z, NEIGHBOURS)
    chosen = torch.randperm(len(z), generator=runtime.generator(seed, "neighbours"))[:QUERIES].tolist()
    return [
        Neighbours(item, list(zip(near.rows[item].tolist(), near.cosines[item].tolist(), strict=True)))
        for item in chosen
    ]


def _against(done: Doctored, bundle: Bundle, data: Source, other: Path | str, quiet: bool) -> Against:
    """Both encoders on the items that they both read, by the tower of the first side."""
    name = done.sides[0].name
    second = Bundle.of(other, heads=True)
    if name not in second.towers:
        raise DataError(f"{other} has no {name} tower, only {' and '.join(second.towers)}: nothing to compare.")
    ids = {each: row for row, each in enumerate(data.ids)}
    data = data.take([ids[each] for each in (done.shown.ids if done.shown else data.ids)])
    made = [embed(each, data, name, quiet=quiet) for each in (bundle, second)]
    a, b = (torch.from_numpy(each.matrix[each.offsets[:-1]]) for each in made)
    return Against(Path(other).name, compare_spaces(a, b, data.labels))


def _shown(data: Source, thumbnails: UInt8[np.ndarray, "n h w 3"] | None) -> Shown:
    words = []
    for item in range(len(data)):
        said = data.texts[item][0] if data.texts is not None and data.texts[item] else ""
        if not said and data.labels is not None and data.labels[item] >= 0:
            k = int(data.labels[item])
            said = data.classes[k] if k < len(data.classes) else str(k)
        words.append(said)
    return Shown(list(data.ids), words, thumbnails)


def _thumbnails(pictures: Tensor) -> UInt8[np.ndarray, "n h w 3"]:
    side = min(SIDE, pictures.shape[-1])
    parts = [interpolate(_floats(some), size=(side, side), mode="area") for some in pictures.split(BATCH)]
    return as_rgb(torch.cat(parts))
