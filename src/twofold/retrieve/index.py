"""An index: a folder that answers searches, made from a source and a bundle.

    index.json        which encoder, modality and snapshot; replaced as a whole, so a reader sees one state or the next
    model/            the bundle, so that the folder works on another machine
    vectors/          every vector made so far, by content: the truth, and why nothing is embedded twice
    items/0002.jsonl  what a snapshot holds: id, content key, metadata and texts of each item
    chroma/0002/      the same as a Chroma store; made from the two above, and made again where it is damaged
    chroma/0002-texts/  the items' texts as another one, where a text embedder has a space of its own (see `spaces`)
    fusion.json       how the answers of the two become one, where that was fitted
    feedback.jsonl    what people said of hits; corrected.json how these questions were answered before the last model
    thumbs/           small pictures: of items whose source holds their pictures (a table, arrays) from the build on, of
                      files when they are first asked for

A build writes a new snapshot beside the old one and then points index.json at it. Whoever searches meanwhile keeps the
old one, and a build that is killed leaves no trace but the vectors that it had finished.
"""

import contextlib
import json
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from twofold.data.atomic import write_atomically
from twofold.data.decode import OnError, Skipped, skip_report
from twofold.data.sources import Modality, Source, content_key, open_source
from twofold.data.vectors import Vectors
from twofold.errors import BundleError, DataError, FingerprintMismatch, StoreError, UsageError, unknown
from twofold.measure.layout import layout
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import TextEncoder, fingerprint
from twofold.retrieve.contents import embed_items, keep_thumbnails
from twofold.retrieve.corrected import keep_answers
from twofold.retrieve.engines import Kept
from twofold.retrieve.fusion import FUSION, Fusion
from twofold.retrieve.modalities import (
    MODALITY,
    default_modality,
    fingerprint_of,
    kinds_of,
    named,
    read_by_frames,
    towers_of,
)
from twofold.retrieve.retriever import Picture, Retriever
from twofold.retrieve.snapshot import (
    CHUNK,
    Head,
    Item,
    Progress,
    claimed,
    exact_store,
    healthy,
    index_id,
    item_vectors,
    mismatch,
    next_snapshot,
    now,
    open_store,
    publish,
    read_head,
    read_items,
    read_lines,
    write_snapshot,
)
from twofold.retrieve.spaces import Space, TextSpace, texts_of
from twofold.retrieve.store import Hit, Scalar, Store, Where
from twofold.retrieve.text_embedders import LocalEmbedder, TextEmbedder, text_embedder

Existing = Literal["keep", "prune", "replace"]


@dataclass(frozen=True)
class Built:
    """What a build did, in items; `embedded` counts contents, of which several items may share one."""

    items: int  # in the index now
    embedded: int
    added: int
    changed: int
    removed: int
    absent: int  # in the index, and not in the source
    skipped: list[Skipped]
    texts: int = 0  # in the space of texts now
    texts_embedded: int = 0


class Index:
    """An index opened for searching, to be used in a `with`; `Index.build` makes one or brings it up to date."""

    def __init__(
        self,
        path: Path,
        head: Head,
        bundle: Bundle,
        store: Store,
        texts: TextSpace | None = None,
        *,
        towers: Mapping[Modality, Tower],
    ):
        self.path, self.head, self.bundle, self.store, self.towers = path, head, bundle, store, towers
        self.retriever = Retriever(
            bundle, store, texts=texts, fusion=_kept_fusion(path, head), columns=self.columns, towers=towers
        )
        self.search = self.retriever.search
        self._annotated = _annotated(path)

    @classmethod
    def open(cls, path: str | Path, model: str | Path | Bundle | None = None, *, exact: bool = False) -> "Index":
        """Open an index with its own model, or with `model`, which must have made its vectors.

        `exact` compares with every vector in memory instead of asking Chroma.
        """
        path = Path(path)
        head = read_head(path)
        bundle = model if isinstance(model, Bundle) else Bundle.load(Path(model or path / "model"))
        while True:
            towers = towers_of(bundle, head.modalities, head.frames)
            prints = {name: tower.fingerprint() for name, tower in towers.items()}
            if prints != dict(head.prints):
                raise mismatch(path, head, bundle, prints)
            try:
                return _opened(path, head, bundle, towers, exact=exact)
            except StoreError as error:
                if (now := read_head(path)) == head:
                    raise StoreError(
                        f"{error} What it is made from is kept apart: Index.rebuild({str(path)!r}) makes it again, "
                        "as does the next `twofold index`."
                    ) from error
                head = now  # a build has ended since we read index.json, and swept away what that named

    def items(self) -> Iterator[tuple[str, dict[str, Scalar]]]:
        """Every item's id and columns, read from the disk one after the other."""
        for name, item in read_lines(self.path, self.head):
            yield name, item.meta

    def columns(self) -> list[str]:
        """The names of the items' columns, in the order in which they are met."""
        return list(dict.fromkeys(column for _, meta in self.items() for column in meta))

    def map(self) -> tuple[list[str], Float[np.ndarray, "n 2"]]:
        """Ids and where they lie on a plane of 0..1 (see `layout`); made once for each state of the index."""
        file = self.path / "map" / f"{self.head.snapshot}.npz"
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as kept:
            return kept["ids"].tolist(), kept["places"]
        ids = self.store.ids()
        vectors = self.store.vectors(ids)
        if len(self.head.modalities) > 1:  # else each would be an island of its own
            kinds = np.array([meta.get(MODALITY) for meta in self.store.meta(ids)])
            for kind in set(kinds):
                vectors[kinds == kind] -= vectors[kinds == kind].mean(0)
        places = layout(vectors).astype(np.float32)
        with contextlib.suppress(OSError):  # a full or read-only disk: laid out again the next time
            shutil.rmtree(file.parent, ignore_errors=True)
            write_atomically(file, lambda path: _save_map(path, ids, places))
        return ids, places

    @property
    def stale(self) -> bool:
        """Whether a build has ended or `calibrate` was run since this was opened; open the index again to see it."""
        return read_head(self.path) != self.head or _annotated(self.path) != self._annotated

    def hints(self) -> list[str]:
        """What whoever keeps this index may want to do, with the command for it."""
        if self.retriever.texts is None or self.retriever.fusion.calibration or self.retriever.calibration is None:
            return []
        return [
            "Words have no probabilities here: the model's calibration is for pictures alone, and this index asks its "
            f"texts, too. `twofold calibrate {self.path} --data PAIRS` gives it its own."
        ]

    def audit(self, limit: int = 1000) -> list[str]:
        """Ids that the store lost or does not find by their own vector, of `limit` tried; [] where all is well."""
        items = read_items(self.path, self.head)
        lost = set(items) ^ set(self.store.ids())
        tried = [name for name in items if name not in lost][:: max(1, len(items) // limit)]
        vectors = item_vectors(self.path, self.head)
        for name, vector in zip(tried, vectors.get([items[name].key for name in tried]), strict=True):
            hits = self.store.query(vector, 1)
            if not hits or hits[0].score < 1 - 1e-4:
                lost.add(name)
        return sorted(lost)

    def __enter__(self) -> "Index":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the stores, so that a later build may sweep its snapshot away."""
        self.store.close()
        if self.retriever.texts is not None:
            self.retriever.texts.close()

    @staticmethod
    def build(
        source: Source,
        bundle: Bundle,
        out: str | Path,
        *,
        modality: Modality | Sequence[Modality] | None = None,
        on_error: OnError = "skip",
        existing: Existing = "keep",
        texts: str | TextEmbedder | None = None,
        store: Kept | None = None,
        progress: Progress | None = None,
        filling: Progress | None = None,
    ) -> Built:
        """Make the index `out` of a source, or bring it up to date; only new contents are embedded.

        `existing` says what becomes of items that the index has and the source has not: they stay ("keep") or go
        ("prune"). "replace" begins anew, which is the only way to another model. After a kill, run it again: it goes
        on. `progress(done, total)` counts the contents to embed, and then the texts; `filling` the rows of each store.

        An item is found by the first of `modality` that it has: "image", or several, as a list or in a word,
        "image,text,video". If nothing is said, an index goes on with its own, and a new one takes what the model can
        embed and some item needs, texts last. Clips of a model without a video tower are read by its picture tower.

        `texts` embeds the items' texts into a space of their own, which answers words, too: a text embedder or its
        name, or "none". Without it, an index goes on as it is, and a new one takes "minilm" if its source has texts.
        `store` is what answers searches (see `engines`); an index remembers it, and a new one takes embedded Chroma.
        """
        out = Path(out)
        if existing not in ("keep", "prune", "replace"):
            raise unknown("choice of existing", existing, ("keep", "prune", "replace"))
        with claimed(out):
            was, head = begun(source, bundle, out, modality, existing, store)
            towers = towers_of(bundle, head.modalities, head.frames)
            kept = was if existing != "replace" else None
            embedder = _embedder(out, texts, kept, source)
            old = read_items(out, kept) if kept else {}
            vectors = item_vectors(out, head)
            before = len(vectors)
            found, skipped = embed_items(source, towers, vectors, on_error, progress)
            gone = [] if existing == "prune" else sorted(old.keys() - set(source.ids))
            absent = {name: old[name] for name in gone if old[name].key in vectors}
            lost = [name for name in gone if name not in absent]
            skipped += [Skipped(name, "its vector is damaged, and the source no longer has it") for name in lost]
            new = absent | found
            if not new:
                raise DataError(f"{source.name} gives nothing to search in. {skip_report(skipped, len(source))}")
            if was and was.bundle != head.bundle:
                _keep_answers(out)
            made = 0
            if embedder is None:
                new = {name: item._replace(texts=()) for name, item in new.items()}
            else:
                texts_of_source = {source.ids[i]: texts_of(source, i) for i in range(len(source))}
                new = {name: item._replace(texts=texts_of_source.get(name, item.texts)) for name, item in new.items()}
                made = _embed_texts(out, embedder, new, progress)
                head = replace(head, texts=_text_space(embedder, new))
            if was and new == old and (head.texts, head.store) == (was.texts, was.store) and healthy(out, was, old):
                head = replace(head, snapshot=was.snapshot, built=was.built)
            else:
                write_snapshot(out, head, new, was, old, filling)
            keep_thumbnails(out, source, found, old)
            publish(out, head, bundle, was)
        return Built(
            items=len(new),
            embedded=len(vectors) - before,
            added=len(new.keys() - old.keys()),
            changed=sum(new[name] != old[name] for name in new.keys() & old.keys()),
            removed=len(old.keys() - new.keys()),
            absent=len(absent),
            skipped=skipped,
            texts=head.texts.rows if head.texts else 0,
            texts_embedded=made,
        )

    @staticmethod
    def rebuild(
        path: str | Path,
        *,
        source: Source | None = None,
        without: Collection[str] = (),
        store: Kept | None = None,
        progress: Progress | None = None,
        filling: Progress | None = None,
    ) -> list[str]:
        """Make the store of an index again from its vectors, `without` some items; the ids that it lost.

        With `store` in another engine, or with other settings.

        A content whose vector is lost is embedded again where `source` has its item, and is dropped where `source` has
        it no more. Without `source` a lost vector is an error.
        """
        path = Path(path)
        with claimed(path):
            head = read_head(path)
            held = read_items(path, head)
            items = {name: item for name, item in held.items() if name not in without}
            vectors = item_vectors(path, head)
            vectors.drop(vectors.broken([item.key for item in items.values()]))
            lost = [name for name, item in items.items() if item.key not in vectors]
            if lost and source is None:
                raise StoreError(
                    f"{path} has lost the vectors of {len({items[name].key for name in lost})} contents; embed them "
                    f"again with `twofold index {head.source} --model {path / 'model'} --out {path}`."
                )
            if lost and source is not None:
                at = {name: i for i, name in enumerate(source.ids)}
                again = source.take(at[name] for name in lost if name in at)
                towers = towers_of(Bundle.load(path / "model"), head.modalities, head.frames)
                items |= embed_items(again, towers, vectors, "skip", progress)[0]
                items = {name: item for name, item in items.items() if item.key in vectors}
            if not items:
                raise StoreError(f"Nothing of {path} would be left. Delete it, or bring back {head.source}.")
            new = replace(head, snapshot=next_snapshot(head), built=now(), store=store or head.store, id=index_id(head))
            if head.texts is not None:
                kept_texts = Vectors(path / "vectors", head.texts.fingerprint, head.texts.dim)
                kept_texts.drop(kept_texts.broken([content_key(text) for text in _all_texts(items)]))
                if kept_texts.missing([content_key(text) for text in _all_texts(items)]):
                    _embed_texts(path, _embedder(path, None, head, None), items, progress)
                new = replace(new, texts=replace(head.texts, rows=sum(len(item.texts) for item in items.values())))
            write_snapshot(path, new, items, None, {}, filling)
            publish(path, new, None, head)
        return sorted(held.keys() - items.keys())


def index(
    source: str | Path | Source,
    *,
    model: str | Path | Bundle,
    out: str | Path,
    on_error: OnError = "skip",
    existing: Existing = "keep",
    texts: str | TextEmbedder | None = None,
    modality: Modality | Sequence[Modality] | None = None,
    store: Kept | None = None,
    progress: Progress | None = None,
    filling: Progress | None = None,
) -> Built:
    """Make a folder searchable, or bring its index up to date: `Index.build` by the names of things."""
    opened = source if isinstance(source, Source) else open_source(source, kinds=kinds_of(named(modality)))
    bundle = model if isinstance(model, Bundle) else Bundle.load(Path(model))
    return Index.build(
        opened,
        bundle,
        out,
        modality=modality,
        on_error=on_error,
        existing=existing,
        texts=texts,
        store=store,
        progress=progress,
        filling=filling,
    )


def search(
    index: str | Path,
    text: str | None = None,
    *,
    image: Picture | None = None,
    like: str | Sequence[str] = (),
    minus: str | None = None,
    k: int = 10,
    where: Where | None = None,
) -> list[Hit]:
    """Open an index and search it once (see `Retriever.search`); for several searches keep an `Index` open."""
    with Index.open(index) as opened:
        return opened.search(text, image=image, like=like, minus=minus, k=k, where=where)


def _save_map(path: Path, ids: list[str], places: Float[np.ndarray, "n 2"]) -> None:
    with open(path, "wb") as file:
        np.savez(file, ids=np.array(ids), places=places)


# -- Texts ------------------------------------------------------------------------------------------------------------


def _embedder(
    path: Path, texts: str | TextEmbedder | None, was: Head | None, source: Source | None
) -> TextEmbedder | None:
    """The embedder of the items' texts, if they are to have one; it must be the one that they have."""
    held = was.texts if was else None
    if texts is None and was is not None:
        texts = held.embedder if held else "none"
    if texts is None:
        texts = "minilm" if source is not None and "text" in source.modalities.values() else "none"
    if texts == "none":
        return None
    embedder = text_embedder(texts) if isinstance(texts, str) else texts
    if held is not None and held.fingerprint != embedder.fingerprint:
        raise FingerprintMismatch(
            f"The texts of {path} were embedded by {held.embedder} ({held.fingerprint}), not by {embedder.name} "
            f"({embedder.fingerprint}); a score between the two would mean nothing. Run `twofold index` with "
            f"--texts none, which drops them and nothing else, then with --texts {embedder.name}."
        )
    return embedder


def _all_texts(items: dict[str, Item]) -> list[str]:
    return list(dict.fromkeys(text for item in items.values() for text in item.texts))


def _text_space(embedder: TextEmbedder, items: dict[str, Item]) -> Space:
    rows = sum(len(item.texts) for item in items.values())
    return Space("texts", embedder.fingerprint, embedder.dim, rows, embedder.name)


def _embed_texts(path: Path, embedder: TextEmbedder | None, items: dict[str, Item], progress: Progress | None) -> int:
    """Vectors of every text of the items; how many were made."""
    assert embedder is not None
    texts = _all_texts(items)
    keys = [content_key(text) for text in texts]
    vectors = Vectors(path / "vectors", embedder.fingerprint, embedder.dim)
    todo = vectors.missing(keys)
    made = embedder.embed_documents([texts[at] for at in todo], progress=progress) if todo else np.empty(0)
    for start in range(0, len(todo), CHUNK):
        some = todo[start : start + CHUNK]
        vectors.append([keys[at] for at in some], made[start : start + CHUNK])
    return len(todo)


def keep_fusion(path: Path, fusion: Fusion) -> Path:
    """Write how the two spaces of an index are fused; it holds for the encoders that made them."""
    record = {"spaces": [space.fingerprint for space in read_head(path).spaces]} | fusion.record()
    write_atomically(path / "fusion.json", lambda file: file.write_text(json.dumps(record, indent=2) + "\n", "utf-8"))
    return path / "fusion.json"


def _kept_fusion(path: Path, head: Head) -> Fusion:
    try:
        record = json.loads((path / "fusion.json").read_text("utf-8"))
        fits = record["spaces"] == [space.fingerprint for space in head.spaces]
        return Fusion.read(record) if fits else FUSION
    except FileNotFoundError:
        return FUSION
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path / 'fusion.json'} is damaged ({type(error).__name__}: {error}). Delete it, or make it again with "
            f"`twofold calibrate {path} --data DATA`."
        ) from error


def _annotated(path: Path) -> list[int]:
    """When what `calibrate` writes was last written; 0 where it was not."""
    files = (path / "fusion.json", path / "model" / "bundle.json")
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def begun(
    source: Source,
    bundle: Bundle,
    path: Path,
    modality: Modality | Sequence[Modality] | None,
    existing: Existing,
    store: Kept | None = None,
) -> tuple[Head | None, Head]:
    """What index.json says, if there is an index, and what it shall say; refuses another model's vectors among its own.

    Items go by `modality`, by that of the index, or by the one that most items have and the bundle can embed.
    """
    was = read_head(path) if (path / "index.json").exists() else None
    modalities = named(modality) or (was.modalities if was else (default_modality(source, bundle),))
    head = _new_head(source, bundle, modalities, was, store)
    if was and existing != "replace":
        if was.modality != head.modality:
            raise UsageError(
                f"{path} is an index of {_plural(was)}, not of {_plural(head)}. Make that in another folder, or "
                "make this one again with --existing replace: what has a vector is not embedded again."
            )
        if was.fingerprint != head.fingerprint:
            raise mismatch(path, was, bundle, head.prints)
    return was, head


def _plural(head: Head) -> str:
    return " and ".join(f"{name}s" for name in head.modalities)


def _new_head(
    source: Source, bundle: Bundle, modalities: Sequence[Modality], was: Head | None, store: Kept | None
) -> Head:
    frames = read_by_frames(source, bundle, modalities, was.frames if was else {})
    towers = towers_of(bundle, modalities, frames)
    prints = {name: tower.fingerprint() for name, tower in towers.items()}
    if len(prints) > 1 and MODALITY in source.meta:
        raise DataError(
            f"{source.name} has a column {MODALITY!r}, in which an index of {', '.join(modalities)} says by what an "
            "item is found: call it something else."
        )
    return Head(
        fingerprint=fingerprint_of(prints),
        bundle=bundle.fingerprint,
        modality=",".join(modalities),
        dim=bundle.dim,
        snapshot=next_snapshot(was),
        source=source.name,
        built=now(),
        store=store or (was.store if was else Kept()),
        id=index_id(was),
        towers=prints if len(prints) > 1 else {},
        frames=frames,
        model=str(bundle.folder.resolve()) if bundle.folder else "",
    )


def _opened(path: Path, head: Head, bundle: Bundle, towers: Mapping[Modality, Tower], *, exact: bool) -> Index:
    """An index with the stores of its spaces."""
    items = read_items(path, head) if exact else {}
    with contextlib.ExitStack() as undo:
        stores: list[Store] = []
        for space in head.spaces:
            stores.append(exact_store(path, head, space, items) if exact else open_store(path, head, space))
            undo.callback(stores[-1].close)
        texts = None
        if head.texts is not None:
            texts = TextSpace(stores[1], lambda: _asked_by(head.texts, bundle), items=len(stores[0]))
        opened = Index(path, head, bundle, stores[0], texts, towers=towers)
        undo.pop_all()
    return opened


def _asked_by(space: Space | None, bundle: Bundle) -> TextEmbedder:
    """The embedder of a space of texts; the bundle's own encoder where it is the same, so that it is in memory once."""
    assert space is not None
    for tower in bundle.towers.values():
        if isinstance(tower.encoder, TextEncoder) and fingerprint(tower.encoder) == space.fingerprint:
            return LocalEmbedder(space.embedder, tower.encoder)
    return text_embedder(space.embedder)


def _keep_answers(path: Path) -> None:
    """Before another model comes in: how the one that is there answers what people judged."""
    with contextlib.suppress(StoreError, FingerprintMismatch, BundleError), Index.open(path) as old:
        keep_answers(old)  # an index that cannot be opened any more has no answers to keep
