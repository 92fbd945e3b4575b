"""An index that stays open for many: warm, one search beside the other, and up to date when a build has ended."""

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from twofold.data.decode import Raw, area, thumbnail
from twofold.data.sources import FILED
from twofold.errors import BundleError, DecodeError, EmbedderError, StoreError
from twofold.retrieve.contents import THUMBNAIL, keep_thumbnail, thumbnail_place
from twofold.retrieve.corrected import Corrected, corrected
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.filters import compiled, matches
from twofold.retrieve.index import Index
from twofold.retrieve.modalities import MODALITY
from twofold.retrieve.part import Part
from twofold.retrieve.retriever import Retriever
from twofold.retrieve.store import Hit, Where

LARGE = 1600  # pixels of the longer side of a picture that is looked at alone
CHOICES = 60  # a column of more values than these gives no filter
PIXELS = 16_000_000  # of a picture to look for the like of, as far as they are decoded; 50 bytes of memory each
ALONE = 4_000_000  # pixels; pictures of more are looked for one after the other, so that one is in memory
LOOK = 2.0  # seconds between two looks whether the index was built anew


class Column(NamedTuple):
    """A column that a page can filter by: its values, most frequent first, with how many items have each."""

    name: str
    values: list[tuple[Any, int]]


class Found(NamedTuple):
    """The hits of a search, what to know of them, and whether a calibrated model thinks that none of them fits."""

    hits: list[Hit]
    notes: list[str]
    none_fits: bool


class Service:
    """What the routes of `app` do, without HTTP. Its methods may be called by many threads at once.

    `roots` are the folders whose pictures may be shown; the default is where the index was made from. A picture that
    lies elsewhere, or is reached by a link that leads out, is not.
    """

    def __init__(self, path: Path | str, *, roots: Sequence[Path | str] = ()):
        self.path = Path(path)
        self.feedback = Feedback(self.path)
        self._lock, self._laying, self._comparing, self._large = (threading.Lock() for _ in range(4))
        self.opened = Index.open(self.path)
        self._looked = time.monotonic()
        source = Path(self.opened.head.source)
        home = [source if source.is_dir() else source.parent] if source.exists() else []
        given = [Path(root) for root in roots] or home
        self.roots = [root.resolve() for root in given]
        towers = self.opened.towers.items()
        self._files = {*FILED, *(name for name, tower in towers if tower.kind != "text")}  # columns that name files
        self._columns: tuple[str, list[Column]] | None = None
        self._chosen: tuple[Index, frozenset[str], Retriever] | None = None
        self._corrected: tuple[tuple[str, int], list[Corrected]] | None = None
        if "text" in self.opened.bundle.towers or self.opened.head.texts:  # the first search shall not be the slow one
            with contextlib.suppress(EmbedderError):
                self.opened.search("warm", k=1)

    @property
    def index(self) -> Index:
        """The index as the last build left it. It may be opened here: ask for `opened` where nothing may take long."""
        with self._lock:
            due = time.monotonic() - self._looked > LOOK
            if due:  # one caller looks; the others go on with what is open
                self._looked = time.monotonic()
        if due:
            # A build in progress, or one that was killed, leaves the old state readable: that is served on.
            with contextlib.suppress(StoreError, BundleError):
                if self.opened.stale:
                    # Searches that still run on the old one hold it; its files are swept by the next build.
                    self.opened = Index.open(self.path)
        return self.opened

    def search(
        self,
        *,
        image: Raw | None = None,
        where: Where | None = None,
        within: Collection[str] | None = None,
        **wanted: Any,
    ) -> Found:
        """`Retriever.search` on the newest state.

        `within` leaves these items only, compared one by one with their own vectors. Where a text embedder elsewhere
        does not answer, the items' own space does, and a note says so.
        """
        asked = self.index.retriever if within is None else self._part(within)
        notes = []
        with self._room_for(image):
            try:
                hits = asked.search(image=image, where=where, **wanted)
            except EmbedderError as error:
                if wanted.get("via", "both") != "both" or "text" not in asked.bundle.towers:
                    raise
                hits = asked.search(image=image, where=where, **{**wanted, "via": "items"})
                notes = [f"The texts could not be asked; these are found without them. {error}"]
        none_fits = asked.no_good_match(hits)
        return Found([hit._replace(meta=self.told(hit.meta)) for hit in hits], notes, none_fits)

    def _room_for(self, image: Raw | None) -> contextlib.AbstractContextManager:
        """What to hold while a picture is looked for; DecodeError for one that is too large."""
        pixels = area(image, enough=LARGE) if isinstance(image, bytes) else 0
        if pixels > PIXELS:
            raise DecodeError("The picture", f"has {pixels:,} pixels; at most {PIXELS:,} are taken, of a JPEG more")
        return self._large if pixels > ALONE else contextlib.nullcontext()

    def _part(self, ids: Collection[str]) -> Retriever:
        """A search among some items; the last one is kept, since one who chose them asks more than once."""
        index, names = self.index, frozenset(ids)
        with self._lock:
            kept = self._chosen
        if kept is None or kept[0] is not index or kept[1] != names:
            kept = index, names, Retriever(index.bundle, Part(index.store, names), towers=index.towers)
            with self._lock:
                self._chosen = kept
        return kept[2]

    def browse(
        self, *, k: int, offset: int = 0, where: Where | None = None, within: Collection[str] | None = None
    ) -> list[Hit]:
        """Items in the order of their source, without a question, so without scores."""
        names, rule = None if within is None else frozenset(within), compiled(where)
        found = (
            Hit(id, 0.0, self.told(meta))
            for id, meta in self.index.items()
            if (names is None or id in names) and matches(rule, meta)
        )
        return list(itertools.islice(found, offset, offset + k))

    def item(self, id: str) -> dict[str, Any]:
        """An item's columns, as `told`; StoreError where there is none."""
        return self.told(self.index.store.meta([id])[0])

    def columns_of(self, ids: Collection[str]) -> dict[str, dict[str, Any]]:
        """The columns of those of `ids` that are there."""
        named = sorted(ids)
        with contextlib.suppress(StoreError):
            return dict(zip(named, map(self.told, self.index.store.meta(named)), strict=True)) if named else {}
        found = {}
        for name in named:  # one of them is gone
            with contextlib.suppress(StoreError):
                found[name] = self.item(name)
        return found

    def picture(self, id: str, *, large: bool = False) -> bytes | None:
        """An item's picture as JPEG, made anew from its pixels, so without what the file says of place and camera.

        None where it has none that may be shown: no picture, a file that is gone, or one outside the roots.
        """
        place, meta = thumbnail_place(self.path, id), self.index.store.meta([id])[0]
        file = self._file(meta.get("image"))
        if file is None:  # its source held the picture, or it is a clip, and the build kept a small one
            hidden = any(self._is_elsewhere(meta.get(name)) for name in self._files)
            return place.read_bytes() if place.exists() and not hidden else None
        if large:
            return thumbnail(file, LARGE, name=id)
        try:
            if place.stat().st_mtime >= file.stat().st_mtime:
                return place.read_bytes()
        except FileNotFoundError:
            pass
        content = thumbnail(file, THUMBNAIL, name=id)
        with contextlib.suppress(OSError):  # a full or read-only disk: shown all the same
            keep_thumbnail(place, content)
        return content

    def _file(self, named: object) -> Path | None:
        real = _absolute(named)
        return real if real is not None and real.is_file() and self._home(real) is not None else None

    def _home(self, real: Path) -> Path | None:
        return next((root for root in self.roots if real.is_relative_to(root)), None)

    def _is_elsewhere(self, named: object) -> bool:
        """Whether this is a file, or was one, that lies outside the roots."""
        real = _absolute(named)
        return real is not None and self._home(real) is None

    def told(self, meta: dict[str, Any]) -> dict[str, Any]:
        """An item's columns as others may see them: of a path, what leads on from one of the roots, or nothing."""
        shown = {}
        for name, value in meta.items():
            real = _absolute(value)
            if real is None:
                shown[name] = value
            elif (home := self._home(real)) is not None:
                shown[name] = real.relative_to(home).as_posix()
            elif name not in self._files and not real.exists():  # words that begin with a slash
                shown[name] = value
        return shown

    def columns(self) -> list[Column]:
        """What can be filtered by: columns of 2 to 60 values that at least two items share on average."""
        index = self.index
        if self._columns and self._columns[0] == index.head.snapshot:
            return self._columns[1]
        counts: dict[str, Counter] = {}
        for _, meta in index.items():
            for name, value in meta.items():
                if name in self._files:
                    continue
                held = counts.setdefault(name, Counter())
                if len(held) <= CHOICES:
                    held[value] += 1
        columns: list[Column] = []
        for name, held in counts.items():
            column = Column(name, held.most_common())
            same = any(column.values == other.values for other in columns)  # "label" often says what another one does
            if 2 <= len(held) <= CHOICES and held.total() >= 2 * len(held) and not same:
                columns.append(column)
        self._columns = index.head.snapshot, columns
        return columns

    def plane(self) -> tuple[list[str], np.ndarray]:
        """`Index.map`, made by one caller while the others wait for it."""
        with self._laying:
            return self.index.map()

    def words(self) -> list[str]:
        """The ids of items that are found by their words and have no picture."""
        written = {name for name, tower in self.opened.towers.items() if tower.kind == "text"}
        several = len(self.opened.towers) > 1
        if not several and not written:
            return []
        return [
            id
            for id, meta in self.index.items()
            if "image" not in meta and (not several or meta.get(MODALITY) in written)
        ]

    def judge(self, click: Click) -> None:
        """Keep what somebody said of a hit; StoreError for an item that is not there, or a disk that is full."""
        for name in (click.id, *click.like):
            self.item(name)
        try:
            self.feedback.add(click)
        except OSError as error:
            raise StoreError(f"What was said cannot be kept: {self.feedback.path}: {error.strerror}.") from error

    def corrected(self) -> list[Corrected]:
        """What the model that is served answers to judged questions, beside the one before it."""
        index = self.index
        with self._comparing:
            state = index.head.snapshot, self.feedback.size
            if self._corrected is None or self._corrected[0] != state:
                self._corrected = state, corrected(index)
            return self._corrected[1]

    def close(self) -> None:
        self.opened.close()


def _absolute(value: object) -> Path | None:
    """Where a value leads that is an absolute path; None for any other."""
    with contextlib.suppress(ValueError, OSError):  # of names that no file can have
        if isinstance(value, str) and Path(value).is_absolute():
            return Path(value).resolve()
    return None
