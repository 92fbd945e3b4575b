"""Is it learning, and if not, why not? A run's log, and what its encoder makes of pictures, put into words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.collapse import Health, health
from twofold.measure.diagnosis import Verdict, diagnose, examined
from twofold.measure.metrics import unit_rows
from twofold.measure.negatives import Microscope, of_views
from twofold.methods import METHODS
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import inference
from twofold.progress import Line
from twofold.train.log import read_log
from twofold.train.train import _policies
from twofold.views import Policy

VIEWS, OF = 4, 256  # views of so many pictures, for alignment and LiDAR; two of them for the microscope
BATCH = 64  # pictures embedded at once
QUERIES, NEIGHBOURS = 10, 6  # of the sheet of neighbours
SIDE = 64  # pixels a side of a picture on the page
LAGS = 2.5  # times: how much less plain pictures may spread in evaluation than views did in training
COPIES = 0.999  # cosine from which two items are shown as copies


class Neighbours(NamedTuple):
    """An item and those whose embeddings lie nearest, with their cosines."""

    item: int
    nearest: list[tuple[int, float]]


class Doctored(NamedTuple):
    """What was found. Everything from `health` on takes pictures and is None or empty without."""

    name: str
    record: dict[str, Any]
    log: list[dict[str, Any]]
    verdicts: list[Verdict]
    health: Health | None = None
    head: Health | None = None  # behind the training's head, where the loss is taken
    microscope: Microscope | None = None
    neighbours: Sequence[Neighbours] = ()
    ids: Sequence[str] = ()
    thumbnails: UInt8[np.ndarray, "n h w 3"] | None = None  # of `ids`

    @property
    def worst(self) -> str:
        """good, warn or bad: the tone of the worst verdict."""
        return next(tone for tone in ("bad", "warn", "good") if any(v.tone == tone for v in self.verdicts))


def doctor(
    run: Path | str,
    data: Source | None = None,
    *,
    limit: int = 1000,
    temperature: float | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Doctored:
    """Examine a run by its log, and with `data` what its encoder makes of the first `limit` pictures and their views.

    Views are those the run trained with. The microscope looks behind the training's head, at the run's temperature
    where it has one, else at `temperature` or .2. Raises UsageError where the folder holds no run.
    """
    run = Path(run)
    if not (run / "run.json").exists():
        raise UsageError(f"{run} holds no run (no run.json). Give the folder that `twofold train --out` wrote.")
    record = json.loads((run / "run.json").read_text())
    log = read_log(run / "log.jsonl")
    verdicts = diagnose(log, record)
    done = Doctored(run.name, record, log, verdicts)
    if data is None:
        return done
    if not (run / "bundle").exists():
        raise UsageError(f"{run} has no bundle yet: training has not ended. Without --data its log can be examined.")
    bundle = Bundle.load(run / "bundle", heads=True)
    if "image" not in bundle.towers or "image" not in data.modalities.values():
        raise DataError(f"The doctor looks at pictures; {run} has towers for {', '.join(bundle.towers)}.")
    return _looked_at(done, bundle, data.take(range(min(limit, len(data)))), temperature, seed, quiet)


def _looked_at(
    done: Doctored, bundle: Bundle, data: Source, temperature: float | None, seed: int, quiet: bool
) -> Doctored:
    tower = bundle.towers["image"]
    head = bundle.heads.get("image")
    size, channels = int(tower.encoder.spec["size"]), int(tower.encoder.spec["channels"])
    with Line("look", unit="images", quiet=quiet) as line:
        pixels, kept, _ = decoded(data, size, channels=channels, progress=line.update)
        if len(kept) < 8:
            raise DataError(f"{data.name} has {len(kept)} readable pictures; eight are the least to say anything of.")
        pictures = torch.tensor(pixels)
        z = _encoded(tower, [_floats(pictures[at : at + BATCH]) for at in range(0, len(pictures), BATCH)])
        few = pictures[:OF]
        policies = _views(done.record, size)
        draw = runtime.generator(seed, "doctor")
        seen = [policies[k % len(policies)](few, draw) for k in range(VIEWS)]
        of_views_ = [_encoded(tower, view.split(BATCH)) for view in seen]
        behind = [_encoded(head, view.split(BATCH)) for view in seen] if head is not None else of_views_
    found = health(z, torch.stack(of_views_, 1))
    headed = health(torch.cat(behind[:2]), torch.stack(behind, 1)) if head is not None else None
    at = temperature or _temperature(done.record) or 0.2
    labels = data.take(kept).labels if data.labels is not None else None
    same = _copies(z[:OF])
    if labels is not None:
        own = torch.as_tensor(labels[:OF])
        same |= (own[:, None] == own) & (own >= 0)
    same.fill_diagonal_(False)
    negatives = of_views(behind[0], behind[1], temperature=at, same=same, alike=0.95)
    copies = _copies(z).fill_diagonal_(False)
    verdicts = [*done.verdicts, *examined(found), *_of_statistics(done.log, found, tower)]
    verdicts += [*_of_copies(copies), *_of_negatives(negatives, labels is not None)]
    verdicts.sort(key=lambda verdict: ("bad", "warn", "good").index(verdict.tone))
    return done._replace(
        verdicts=verdicts,
        health=found,
        head=headed,
        microscope=negatives,
        neighbours=_nearest(z, seed),
        ids=[data.ids[k] for k in kept],
        thumbnails=_thumbnails(pictures),
    )


def _floats(pictures: Tensor) -> Float[Tensor, "b c h w"]:
    top = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(pictures.dtype, 1.0)
    return pictures.float() / top


def _encoded(tower: Tower, batches: Any) -> Float[Tensor, "n d"]:
    with inference(tower), torch.no_grad():
        return torch.cat([tower(batch).float().cpu() for batch in batches])


def _views(record: Mapping[str, Any], size: int) -> tuple[Policy, ...]:
    """The policies that the run trained with, at the encoder's size; those of a method without views are SimCLR's."""
    name = next((name for name, kind in METHODS.items() if kind.__name__ == record.get("method")), "simclr")
    if record.get("policies"):
        chosen: tuple[Policy, ...] = tuple(Policy.from_dict(each) for each in record["policies"])
    else:
        chosen = _policies(name, record.get("policy"), {})
    largest = max(policy.size for policy in chosen)
    return tuple(replace(policy, size=size) for policy in chosen if policy.size == largest)


def _temperature(record: Mapping[str, Any]) -> float | None:
    given = record.get("options", {}).get("temperature")
    if given is not None:
        return float(given)
    kind = next((kind for kind in METHODS.values() if kind.__name__ == record.get("method")), None)
    defaults = getattr(kind.__init__, "__kwdefaults__", None) if kind is not None else None
    value = (defaults or {}).get("temperature")
    return float(value) if isinstance(value, int | float) else None


def _copies(z: Tensor) -> Tensor:
    u = unit_rows(z)
    return u @ u.T >= COPIES


def _of_statistics(log: Sequence[Mapping[str, Any]], found: Health, tower: Tower) -> list[Verdict]:
    """In training BatchNorm goes by the batch, afterwards by an average that may lag behind."""
    trained = [line["spread"] for line in log if "spread" in line][-1:]
    norms = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in tower.modules())
    if not trained or not norms or trained[0] < LAGS * found.spread:
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


def _of_copies(copies: Tensor) -> list[Verdict]:
    share = copies.any(1).float().mean().item()
    if share < 0.02:
        return []
    return [
        Verdict(
            "copies",
            "warn",
            "Some items are copies of others to this encoder.",
            f"{100 * share:.0f} % of items have another at a cosine of {COPIES} or more",
            "If they are copies (twofold index --duplicates), keep one of each: as negatives they tear apart what is "
            "one. If not, the encoder does not see what tells them apart.",
        )
    ]


def _of_negatives(seen: Microscope, labelled: bool) -> list[Verdict]:
    now = seen.now
    share = now.effective / seen.negatives
    says = f"temperature {now.temperature:g}: {now.effective:.0f} of {seen.negatives:.0f} negatives share the gradient"
    evidence = f"{says}; the hardest 1 % take {100 * now.hardest:.0f} %"
    found = []
    suggested = seen.suggested
    if suggested and share < 0.02:
        found.append(
            Verdict(
                "few negatives",
                "warn",
                "A handful of negatives take nearly all of the gradient.",
                evidence,
                f"Raise the temperature; {suggested[0]:.2g} to {suggested[1]:.2g} suits these embeddings.",
            )
        )
    if seen.suspects and now.suspects > 3 * seen.suspects and now.suspects > 0.2:
        kind = (
            "share a label, are copies, or are as near as the positive" if labelled else "are as near as the positive"
        )
        found.append(
            Verdict(
                "false negatives",
                "warn",
                "Much of the gradient pushes apart what may belong together.",
                f"{100 * seen.suspects:.1f} % of the negatives {kind}, and take {100 * now.suspects:.0f} % of the "
                "gradient",
                "Raise the temperature, remove copies, or learn from labels where there are any (supcon).",
            )
        )
    return found


def _nearest(z: Tensor, seed: int) -> list[Neighbours]:
    u = unit_rows(z)
    chosen = torch.randperm(len(u), generator=runtime.generator(seed, "neighbours"))[:QUERIES]
    scores = u[chosen] @ u.T
    scores[torch.arange(len(chosen)), chosen] = -2
    top = scores.topk(min(NEIGHBOURS, len(u) - 1))
    return [
        Neighbours(item, list(zip(rows, cosines, strict=True)))
        for item, rows, cosines in zip(chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _thumbnails(pictures: Tensor) -> UInt8[np.ndarray, "n h w 3"]:
    small = torch.nn.functional.interpolate(_floats(pictures), size=(SIDE, SIDE), mode="area")
    rgb = small[:, :3] if small.shape[1] >= 3 else small[:, :1].expand(-1, 3, -1, -1)
    return (rgb * 255).round().byte().permute(0, 2, 3, 1).numpy()
