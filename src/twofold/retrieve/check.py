"""Is an index whole? Its parts are held against each other and against the files it was made from, and mended."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from twofold.data.sources import open_source
from twofold.data.vectors import ByContent
from twofold.errors import StoreError, TwofoldError
from twofold.models.bundle import Bundle
from twofold.retrieve.index import Index
from twofold.retrieve.modalities import fingerprint_of, kinds_of, towers_of
from twofold.retrieve.snapshot import (
    CHUNK,
    Head,
    Progress,
    item_vectors,
    open_store,
    read_head,
    read_items,
    rows_of,
    store_name,
    vectors_of,
)
from twofold.retrieve.spaces import Row, Space

What = Literal[
    "model", "list", "files", "lost", "broken", "gone", "store", "missing", "extra", "vector", "columns", "unfound"
]
CLOSE = 1e-3  # that a unit vector of the store may be off, in any number


class Finding(NamedTuple):
    """Something that is not as it should be, the ids (or files) that it concerns, and what that means."""

    what: What
    ids: list[str]
    said: str
    space: str = "items"  # or "texts"


@dataclass(frozen=True)
class Checked:
    """What an index says of itself, and what does not hold."""

    path: Path
    items: int
    contents: int  # vectors that are kept
    dim: int
    fingerprint: str
    findings: list[Finding]

    @property
    def whole(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        rows = [one._asdict() | {"count": len(one.ids)} for one in self.findings]
        return asdict(self) | {"path": str(self.path), "whole": self.whole, "findings": rows}


@dataclass(frozen=True)
class Repaired:
    """What a repair did, in items; `after` is the index checked again."""

    before: Checked
    embedded: int
    dropped: list[str]
    after: Checked


def check(path: str | Path, *, tried: int = 1000) -> Checked:
    """Hold an index's model, list, vectors, files and store against each other; nothing is changed.

    Every vector is compared with the one that the store holds, and `tried` items are searched for by their own.
    StoreError where there is no index, or no telling what it should be.
    """
    path = Path(path)
    head = read_head(path)
    vectors = item_vectors(path, head, aside=False)
    columns, findings = _model(path, head)
    findings += _found("files", vectors.damaged, "files of vectors are damaged; what only they hold is lost")
    try:
        items = read_items(path, head)
    except StoreError as error:
        findings.append(Finding("list", [f"items/{head.snapshot}.jsonl"], str(error)))
        return Checked(path, 0, len(vectors), head.dim, head.fingerprint, findings)
    gone = [name for name, item in items.items() if any(_is_gone(item.meta.get(column)) for column in columns)]
    findings += _found("gone", gone, "items name a file that is no longer there")
    for space in head.spaces:
        rows, them = rows_of(space, items), space.name
        own = vectors_of(path, head, space, aside=False)
        if space.name != "items":
            findings += _found("files", own.damaged, "files of vectors are damaged; what only they hold is lost", them)
        broken = set(own.broken([row.key for row in rows.values()]))
        findings += _found("lost", [n for n, row in rows.items() if row.key not in own], f"{them} have no vector", them)
        findings += _found(
            "broken",
            [n for n, row in rows.items() if row.key in broken],
            f"{them} have a vector without direction",
            them,
        )
        sound = {name: row for name, row in rows.items() if row.key in own and row.key not in broken}
        findings += _store(path, head, space, rows, sound, own, tried)
    return Checked(path, len(items), len(vectors), head.dim, head.fingerprint, findings)


def repair(path: str | Path, *, progress: Progress | None = None, filling: Progress | None = None) -> Repaired:
    """Mend what `check` finds: embed lost vectors again, drop items whose file is gone, make the store again.

    What an index was made from is opened only where something must come from there; where it cannot be, nothing is
    dropped or changed, since a disk may just not be mounted. `progress` and `filling` are those of `Index.build`.
    """
    before = check(path)
    path, found = before.path, {one.what: one.ids for one in before.findings if one.space == "items"}
    if before.whole:
        return Repaired(before, 0, [], before)
    head = read_head(path)
    if "model" in found:
        raise StoreError(
            f"{path / 'model'} is missing, damaged or another one. Put the model back that made this index: "
            f"`twofold index {head.source} --model {_there(head.model)} --out {path}`; contents that have a vector are "
            "not embedded again."
        )
    source = None
    if found.keys() & {"list", "lost", "broken", "gone"}:
        try:
            source = open_source(head.source, kinds=kinds_of(head.modalities))
        except (TwofoldError, OSError) as error:
            raise StoreError(
                f"{path} cannot be mended without what it was made from, and nothing was changed: {error}"
            ) from error
    if source is not None and "list" in found:
        bundle = Bundle.load(path / "model")
        built = Index.build(
            source, bundle, path, modality=head.modalities, existing="replace", progress=progress, filling=filling
        )
        return Repaired(before, built.embedded, [], check(path))
    gone = set(found.get("gone", ()))
    dropped = Index.rebuild(path, source=source, without=gone, progress=progress, filling=filling)
    again = {*found.get("lost", ()), *found.get("broken", ())} - set(dropped)
    return Repaired(before, len(again), dropped, check(path))


def _there(model: str) -> str:
    """Where the model was, if it still is there."""
    return model if model and Path(model).exists() else "MODEL"


def _found(what: What, ids: Iterable[str], said: str, space: str = "items") -> list[Finding]:
    ids = sorted(ids)
    return [Finding(what, ids, said, space)] if ids else []


def _model(path: Path, head: Head) -> tuple[set[str], list[Finding]]:
    """The columns that name an item's files, and what is wrong with the model."""
    try:
        bundle = Bundle.load(path / "model")
        towers = towers_of(bundle, head.modalities, head.frames)
    except (TwofoldError, OSError) as error:
        return {"image"}, [Finding("model", ["model"], str(error))]
    columns = {"image", *(name for name, tower in towers.items() if tower.kind != "text")}
    made = fingerprint_of({name: tower.fingerprint() for name, tower in towers.items()})
    if (made, bundle.dim) == (head.fingerprint, head.dim):
        return columns, []
    said = f"it is {made} [{bundle.dim}]; the vectors are of {head.fingerprint} [{head.dim}]"
    return columns, [Finding("model", ["model"], said)]


def _is_gone(named: object) -> bool:
    return isinstance(named, str) and Path(named).is_absolute() and not Path(named).exists()


def _store(
    path: Path, head: Head, space: Space, rows: dict[str, Row], sound: dict[str, Row], vectors: ByContent, tried: int
) -> list[Finding]:
    """What a space's store lacks, has too much, or holds otherwise than the list and the vectors say."""
    name, them = store_name(head, space), space.name
    try:
        store = open_store(path, head, space)
    except StoreError as error:
        return [Finding("store", [f"{head.store.engine} {name}"], str(error), them)]
    try:
        held = set(store.ids())
        both = [name for name in sound if name in held]
        other, unlike, unfound = list[str](), list[str](), list[str]()
        for start in range(0, len(both), CHUNK):
            names = both[start : start + CHUNK]
            truth = vectors.get([sound[name].key for name in names])
            truth /= np.linalg.norm(truth, axis=1, keepdims=True)
            off = ~(np.abs(store.vectors(names) - truth).max(1) <= CLOSE)  # NaN is off, too
            other += [name for name, is_off in zip(names, off, strict=True) if is_off]
            meta = zip(names, store.meta(names), strict=True)
            unlike += [name for name, columns in meta if columns != sound[name].meta]
        some = both[:: max(1, len(both) // tried)]
        for name, vector in zip(some, vectors.get([sound[name].key for name in some]), strict=True):
            hits = store.query(vector, 1)
            if not hits or hits[0].score < 1 - 1e-4:
                unfound.append(name)
    except StoreError as error:
        return [Finding("store", [f"{head.store.engine} {name}"], str(error), them)]
    finally:
        store.close()
    return [
        *_found("missing", rows.keys() - held, f"{them} are not in the store", them),
        *_found("extra", held - rows.keys(), f"{them} of the store are not in the list", them),
        *_found("vector", other, f"{them} have another vector in the store", them),
        *_found("columns", unlike, f"{them} have other columns in the store", them),
        *_found("unfound", set(unfound) - set(other), f"of {len(some)} tried are not found by their own vector", them),
    ]
