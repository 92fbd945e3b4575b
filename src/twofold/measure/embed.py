"""From a source to a matrix: every picture, text, sound, video or vector through an encoder once, and never again.

Vectors are kept by content and encoder. Another run, another order, more items or a name that changed cost nothing; a
run that was interrupted goes on where it stopped.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from twofold import runtime
from twofold.data.decode import OnError, Skipped, ahead
from twofold.data.sources import KINDS, Modality, Source, content_key
from twofold.data.vectors import Vectors
from twofold.errors import DataError, DecodeError, FingerprintMismatch, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ClipEncoder, Encoder, Inputs, device_of, fingerprint, inference, moved
from twofold.models.fast import Fast, accelerate
from twofold.models.tokens import Tokens
from twofold.progress import Line

BATCH = 64
APART = 8  # items that one of several threads takes: so few that what it makes of them stays in its core's cache
SHARD = 2048  # vectors made before they are written down: what a kill can cost
FEW = 512  # pictures, frames or texts; for fewer, exporting the encoder takes longer than running it as it is

Progress = Callable[[int, int], None]
Parts = Generator[tuple[list[int], np.ndarray], None, None]
Head = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a source's items, as the encoder gives them: not normalised.

    Rows `offsets[i]:offsets[i + 1]` of `matrix` belong to the item `ids[i]`, which is the source's item `kept[i]`: one
    row for a picture or sound, one for each of its texts.
    """

    ids: list[str]
    matrix: Float[np.ndarray, "m d"]
    offsets: Int[np.ndarray, "n_plus_1"]
    kept: Int[np.ndarray, "n"]
    skipped: list[Skipped]


def embed(
    model: Bundle | Tower | Encoder,
    source: Source,
    modality: Modality,
    *,
    vectors: Vectors | None = None,
    on_error: OnError = "skip",
    progress: Progress | None = None,
    quiet: bool = False,
) -> Embedded:
    """Embed a column of `source`, on the model's device; nothing goes through an encoder twice.

    `modality` is the column's name, "image", "text" or another one; of a bundle, the tower of that name embeds it.
    `vectors` keeps the embeddings. Without it, the user's cache keeps the encoder's features, and the head, which is
    small and has many versions, is applied each time. What cannot be decoded and items without a text are
    skipped and named, or raise with `on_error="raise"`. `progress(done, total)` counts what is to compute; without it,
    and unless `quiet`, a line on the terminal does.
    """
    tower = _tower(model, source, modality)
    features = Vectors(runtime.cache_dir() / "vectors", fingerprint(tower.encoder), tower.encoder.dim)
    contents, keys, owner = _contents(source, modality)  # of one picture or text each
    if vectors is not None:
        _check_fingerprint(vectors, tower)
        _apply_head(tower, features, vectors, keys)
    kept_in = features if vectors is None else vectors
    todo = kept_in.missing(keys)
    failed: list[Skipped] = []
    names = [source.ids[owner[index]] for index in todo]
    chosen = [contents[index] for index in todo]
    much = len(todo) * (tower.encoder.frames if isinstance(tower.encoder, ClipEncoder) else 1) >= FEW
    fast = accelerate(tower.encoder, runtime.cache_dir() / "onnx", threads=1) if much else None
    several = fast is not None and fast.engine == "onnxruntime"
    run = _runner(tower.encoder, fast)
    unit = f"{modality}s" if modality in ("image", "text") else "items"
    with Line("embed", unit=unit, quiet=quiet or progress is not None) as line:
        if tower.kind == "text":
            parts = _texts(tower.encoder, chosen, run, several=several)
        else:
            way = _by_several if several else _decoded
            parts = way(tower.encoder, chosen, names, run, on_error=on_error, failed=failed)
        head = partial(_headed, tower) if vectors is not None else None
        _keep(parts, [keys[index] for index in todo], kept_in, progress or line.update, head)

    rows = np.array([index for index, key in enumerate(keys) if key in kept_in], np.int64)
    kept, counts = np.unique(owner[rows], return_counts=True)
    reasons = dict(failed)
    broken = {keys[index]: reasons[name] for index, name in zip(todo, names, strict=True) if name in reasons}
    why = {owner[index]: broken[key] for index, key in enumerate(keys) if key in broken}
    why = {item: reason for item, reason in why.items() if not _lacks(source.column(modality).cells[item])}
    absent = np.setdiff1d(np.arange(len(source)), kept)
    skipped = [Skipped(source.ids[item], why.get(item, f"has no {modality}")) for item in absent]
    if skipped and on_error == "raise":
        raise DataError(f"{source.name}: {skipped[0].id} {skipped[0].reason}.")
    matrix = kept_in.get([keys[index] for index in rows])
    return Embedded(
        ids=[source.ids[item] for item in kept],
        matrix=_headed(tower, matrix) if vectors is None else matrix,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        kept=kept.astype(np.int64),
        skipped=skipped,
    )


def _lacks(cell: Any) -> bool:
    """Whether a table has nothing here, which is not the same as a file that holds nothing."""
    return isinstance(cell, bytes) and not cell


def tokens(
    encoder: Encoder, source: Source, modality: Modality, *, on_error: OnError = "skip", quiet: bool = False
) -> tuple[Float[np.ndarray, "n t d"], Int[np.ndarray, "n"]]:
    """What an encoder of videos, or a plain vision transformer, makes of each tubelet or patch, and of which items.

    They are computed anew each time, and are many: what `embed` gives is their average.
    """
    runtime.keep_freed_memory()
    look = encoder.tokens if isinstance(encoder, ClipEncoder) else Tokens(encoder)  # type: ignore[arg-type]
    device, failed = device_of(encoder), list[Skipped]()

    def run(x: Inputs) -> np.ndarray:
        with inference(encoder):
            return look(moved(x, device)).float().cpu().numpy()

    rows, made = list[int](), list[np.ndarray]()
    cells = source.column(modality).cells
    with Line("tokens", unit="items", quiet=quiet) as line:
        for at, found in _decoded(encoder, cells, source.ids, run, on_error=on_error, failed=failed):
            rows += at
            made.append(found)
            line.update(len(rows) + len(failed), len(cells))
    if not made:
        raise DataError(f"None of the {len(cells)} items of {source.name} could be read: {failed[0].reason}.")
    return np.concatenate(made), np.array(rows, np.int64)


def _tower(model: Bundle | Tower | Encoder, source: Source, modality: Modality) -> Tower:
    tower = model.tower(modality) if isinstance(model, Bundle) else model if isinstance(model, Tower) else Tower(model)
    kind = source.modalities.get(modality, modality)
    if tower.kind != kind and kind in KINDS:
        what = f" (that column is {kind})" if kind != modality else ""
        raise UsageError(f"{tower.encoder.spec['name']} does not embed {modality}s{what}; it is made for {tower.kind}.")
    return tower


def _check_fingerprint(vectors: Vectors, tower: Tower) -> None:
    if vectors.folder.name != (mark := tower.fingerprint()):
        raise FingerprintMismatch(
            f"{vectors.folder} keeps vectors of the encoder {vectors.folder.name}; this one is {mark}. Vectors of two "
            "encoders cannot be compared: use the encoder that made them, or another folder."
        )


def _apply_head(tower: Tower, features: Vectors, vectors: Vectors, keys: Sequence[str]) -> None:
    """Embeddings of what the encoder has seen before."""
    known = [keys[index] for index in vectors.missing(keys) if keys[index] in features]
    for start in range(0, len(known), SHARD):
        some = known[start : start + SHARD]
        vectors.append(some, _headed(tower, features.get(some)))


def _headed(tower: Tower, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m e"]:
    """What the tower's head makes of its encoder's features."""
    device = device_of(tower)
    with inference(tower):
        parts = torch.from_numpy(features).split(SHARD)
        return torch.cat([tower.head(part.to(device)).float().cpu() for part in parts]).numpy()


def _contents(source: Source, modality: Modality) -> tuple[Sequence[Any], list[str], Int[np.ndarray, "m"]]:
    """The single things in a column, their keys, and the item that each belongs to."""
    kind, cells = source.column(modality)
    if kind != "text":
        return cells, source.keys(modality), np.arange(len(source))
    texts = [text for own in cells for text in own]
    owner = np.repeat(np.arange(len(source)), [len(own) for own in cells])
    return texts, [content_key(text) for text in texts], owner


def _runner(encoder: Encoder, fast: Fast | None) -> Callable[[Any], np.ndarray]:
    """What turns a batch of the encoder's inputs into features."""
    device = device_of(encoder)
    if fast is None or fast.engine != "onnxruntime":  # which has an arena of its own
        runtime.keep_freed_memory()

    def run(x: Inputs) -> np.ndarray:
        if fast is not None and fast.engine == "onnxruntime":
            return fast(x).numpy()
        with inference(encoder):
            return (fast or encoder)(moved(x, device)).float().cpu().numpy()

    return run


def _decoded(
    encoder: Encoder,
    items: Sequence[Any],
    names: Sequence[str],
    run: Callable,
    *,
    on_error: OnError,
    failed: list[Skipped],
) -> Parts:
    """Which items, and their features, batch by batch; threads decode what comes next meanwhile."""
    at: list[int] = []
    batch: list[Any] = []

    def prepare(item: Any, name: str) -> Any:
        return encoder.prepare(item, name=name)

    for index, prepared in ahead(items, prepare, on_error=on_error, names=names, skipped=failed):
        at.append(index)
        batch.append(prepared)
        if len(batch) == BATCH:
            yield at, run(encoder.batch(batch))
            at, batch = [], []
    if batch:
        yield at, run(encoder.batch(batch))


def _by_several(
    encoder: Encoder,
    items: Sequence[Any],
    names: Sequence[str],
    run: Callable,
    *,
    on_error: OnError,
    failed: list[Skipped],
) -> Parts:
    """The same where several threads may `run` at once: each decodes and encodes its own few, so that no core waits."""

    def work(some: range, _: str) -> tuple[list[int], np.ndarray, list[Skipped]]:
        at, prepared, broken = list[int](), list[Any](), list[Skipped]()
        for index in some:
            try:
                prepared.append(encoder.prepare(items[index], name=names[index]))
                at.append(index)
            except DecodeError as error:
                if on_error == "raise":
                    raise
                broken.append(Skipped(error.item, error.reason))
        return at, run(encoder.batch(prepared)) if prepared else np.empty((0, encoder.dim), np.float32), broken

    some = [range(start, min(start + APART, len(items))) for start in range(0, len(items), APART)]
    for _, (at, made, broken) in ahead(some, work, on_error="raise", workers=torch.get_num_threads()):
        failed += broken
        if at:
            yield at, made


def _texts(encoder: Encoder, texts: Sequence[str], run: Callable, *, several: bool) -> Parts:
    """Which texts, and their features, batch by batch; texts of one length together, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]

    def work(at: list[int], _: str) -> np.ndarray:
        return run(encoder.batch([texts[index] for index in at]))

    if several:
        yield from ((batches[index], made) for index, made in ahead(batches, work, workers=torch.get_num_threads()))
    else:
        yield from ((at, work(at, "")) for at in batches)


def _keep(parts: Parts, keys: Sequence[str], vectors: Vectors, tell: Progress, head: Head | None) -> None:
    """Write features down as they come, through a head: a shard at a time, and at the end, also if that is Ctrl-C."""
    made: list[tuple[list[int], np.ndarray]] = []
    done = written = 0

    def write() -> None:
        if made:
            features = np.concatenate([z for _, z in made])
            vectors.append([keys[index] for at, _ in made for index in at], head(features) if head else features)
            made.clear()

    with contextlib.closing(parts):
        try:
            for part in parts:
                made.append(part)
                done += len(part[0])
                tell(done, len(keys))
                if done - written >= SHARD:
                    write()
                    written = done
        finally:
            write()
