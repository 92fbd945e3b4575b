"""Several models on several data sets, in one table: what features are worth elsewhere, and which are surely better.

A suite is a TOML file; paths are beside it:

    [[data]]
    name = "scenes"
    path = "rsscn7"
    split = "test"        # what is tested on; "test" where it is not said
    limit = 2000          # probes learn from so many items of "train"

    [[data]]
    name = "scenes in gray"
    path = "rsscn7_gray"
    fit = "scenes"        # out of domain: probes that learned on "scenes", asked about these pictures
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twofold.data.sources import Source, open_source
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.labelled import At, FineTune, Labels, against, kind_seen, labelled, measured_at, pixels, stand_ins
from twofold.measure.metrics import Difference, Interval
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import Encoder

FIELDS = {"name": str, "path": str, "split": str, "limit": int, "fit": str}


class Task(NamedTuple):
    """A data set: what probes learn from, and what they are asked; `fit` names the task that they learned on."""

    name: str
    train: Source
    test: Source
    fit: str | None = None


class Suite(NamedTuple):
    """Probes by data set and then by model, the models that were asked for first."""

    models: list[str]
    found: dict[str, dict[str, Labels]]
    shifts: dict[str, dict[str, Interval]]  # by task out of domain: linear accuracy there less that at home
    sizes: dict[str, tuple[int, int]]  # items of train and test

    def differences(self, data: str, probe: str = "linear") -> dict[tuple[str, str], Difference]:
        """Each model against all that stand behind it in the table, and each against every baseline."""
        labels = self.found[data]
        every = list(labels)
        pairs = [(one, other) for place, one in enumerate(self.models) for other in every[place + 1 :]]
        return {pair: against(labels[pair[0]], labels[pair[1]], probe) for pair in pairs}


def task(name: str, source: Source, *, split: str = "test", limit: int | None = None) -> Task:
    """A data set with labels and splits as a task."""
    if source.labels is None or source.splits is None:
        raise DataError(
            f"{source.name} has no {'labels' if source.labels is None else 'splits'}; models are compared by what "
            f"probes that learned on its split train read on {split}."
        )
    train = source.split("train")
    return Task(name, train.sample(limit), source.split(split))


def read_suite(path: Path | str) -> list[Task]:
    """The tasks of a suite file; UsageError names what is wrong in it."""
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}). Give a suite: a TOML file of [[data]].") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}.") from error
    if set(tables) - {"data"}:
        raise unknown("table", min(set(tables) - {"data"}), ["data"])
    rows: Any = tables.get("data")
    if not isinstance(rows, list) or not rows:
        raise UsageError(f'{path} names no data: each set is a [[data]] with name = "…" and path = "…".')
    made: dict[str, Task] = {}
    for number, row in enumerate(rows, 1):
        for field, value in row.items():
            if field not in FIELDS:
                raise unknown("field of [[data]]", field, FIELDS)
            if type(value) is not FIELDS[field]:
                raise UsageError(
                    f"{path}: {field} of [[data]] {number} is {value!r}; it takes {FIELDS[field].__name__}."
                )
        if not {"name", "path"} <= set(row) or row["name"] in made:
            raise UsageError(f"{path}: [[data]] {number} needs a name of its own and a path; got {dict(row)}.")
        where = row["path"] if row["path"] == "openmoji" else path.parent / row["path"]
        source, split = open_source(str(where)), row.get("split", "test")
        if "fit" not in row:
            made[row["name"]] = task(row["name"], source, split=split, limit=row.get("limit"))
            continue
        if row["fit"] not in made:
            raise unknown("data to fit on (it stands before)", row["fit"], made)
        made[row["name"]] = elsewhere(row["name"], made[row["fit"]], source, split=split)
    return list(made.values())


def elsewhere(name: str, home: Task, source: Source, *, split: str = "test") -> Task:
    """Items from another domain, with the labels of `home` by the names of their classes."""
    there = source if source.splits is None else source.split(split)
    if there.labels is None or not there.classes or not home.train.classes:
        raise DataError(f"{source.name}: labels go by the names of their classes, and one of the two has none.")
    number = {label: k for k, label in enumerate(home.train.classes)}
    mapped = np.array([number.get(label, -1) for label in there.classes])
    labels = np.where(there.labels >= 0, mapped[there.labels], -1)
    if (labels < 0).all():
        raise DataError(f"{source.name} and {home.name} share no class: {', '.join(there.classes[:5])} … are others.")
    return Task(name, home.train, _with_labels(there, labels, home.train.classes), home.name)


def _with_labels(source: Source, labels: np.ndarray, classes: Sequence[str]) -> Source:
    from dataclasses import replace

    return replace(source, labels=labels, classes=classes).take(np.flatnonzero(labels >= 0))


def suite(
    models: Mapping[str, Bundle],
    tasks: Sequence[Task],
    *,
    at: At = "encoder",
    attentive: bool = False,
    fine_tune: FineTune | None = None,
    baselines: bool = True,
    quiet: bool = False,
) -> Suite:
    """Every model on every task, beside what could have been taken instead.

    Untrained encoders stand once for models of one architecture. Embeddings come from the cache where they were made.
    """
    if not models or not tasks:
        raise UsageError("A suite takes a model and a data set at least.")
    found: dict[str, dict[str, Labels]] = {}
    asked: list[str] = []
    for each in tasks:
        rows: dict[str, Tower | Encoder] = {}
        naive: dict[str, Tower | Encoder] = {}
        specs: dict[str, str] = {}
        kind = None
        for name, bundle in models.items():
            own = kind_seen(bundle, each.test)
            if own is None or kind not in (None, own):
                raise UsageError(f"{name} and {each.name} ({each.test.name}) share neither pictures nor videos.")
            kind = own
            for part, model in measured_at(bundle, kind, at).items():
                rows[name if part == "trained" else f"{name} {part}"] = model
            if baselines:
                spec = str(bundle.tower(kind).encoder.spec)
                for label, model in stand_ins(bundle.tower(kind)).items():
                    if label == "untrained":
                        if spec in specs:
                            continue
                        specs[spec] = label = f"untrained {name}" if specs else "untrained"
                    naive[label] = model
        assert kind is not None
        modality, parts = each.test.only(kind), (each.train, each.test)
        asked = list(rows)
        how: Any = {"attentive": attentive, "fine_tune": fine_tune, "quiet": quiet}
        found[each.name] = labelled({**rows, **naive}, parts, modality, **how)
        if baselines:
            channels = int(next(iter(models.values())).tower(kind).encoder.spec["channels"])
            found[each.name] |= pixels(parts, modality, channels, "skip")
    return Suite(
        models=asked,
        found=found,
        shifts={
            each.name: {
                name: _apart(found[each.fit][name].linear.accuracy, labels.linear.accuracy)
                for name, labels in found[each.name].items()
            }
            for each in tasks
            if each.fit is not None
        },
        sizes={each.name: (len(each.train), len(each.test)) for each in tasks},
    )


def _apart(home: Interval, away: Interval) -> Interval:
    """`away` less `home`, of other items: their intervals put together as independent ones (MOVER)."""
    gap = away.value - home.value
    low = gap - math.hypot(away.value - away.low, home.high - home.value)
    high = gap + math.hypot(away.high - away.value, home.value - home.low)
    return Interval(gap, low, high)
