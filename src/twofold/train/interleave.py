"""From documents of pictures and texts to a model that reads them: what `twofold interleave` does."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.decode import OnError, Raw, Skipped
from twofold.data.documents import PATCH, Documents, Shown, captioned, open_documents, packed
from twofold.data.loader import Batches
from twofold.data.sources import Kind, Source, open_source
from twofold.errors import DataError
from twofold.measure.embed import embed
from twofold.methods import Interleaved
from twofold.models.base import Encoder, device_of, inference
from twofold.models.bundle import Bundle
from twofold.models.causal import Eye, Reader, Sees, follows, reader
from twofold.objectives import next_token
from twofold.progress import Line
from twofold.train.loop import Run, Watch, fit
from twofold.train.optim import Optimizer

PRETRAINED = 5e-5  # the rate of a language model that has learned before


@dataclass(frozen=True)
class Reading:
    """What reads, and how it learns."""

    language: str = "llama:small"
    picture: str = "efficientnet-lite0"
    sees: Sees = "features"
    size: int | None = None  # pixels a side of a picture; the encoder's own where None
    learn_to_see: bool = False  # train the picture encoder as well; what sees patches always learns
    pixels: float = 0.0  # the weight of the next patch's error beside the next word's
    length: int = 256  # tokens of a row, into which documents are packed
    batch: int = 16  # rows
    epochs: int = 10
    lr: float = 1e-3
    language_lr: float | None = None  # `lr` from scratch, 5e-5 for a language model that has learned before
    weight_decay: float = 0.1
    patience: int = 3  # epochs without less cost in validation, after which training stops
    seed: int = 0


class Interleaving(NamedTuple):
    """What `interleave` leaves: the bundle, the run, and what could not be read.

    `cost` is what a token of a text costs in validation, in nats; None where there was nothing to validate on. `split`
    documents were longer than a row, and went on in another.
    """

    bundle: Bundle
    run: Run
    skipped: list[Skipped]
    cost: float | None
    split: int


def interleave(
    documents: Documents,
    *,
    out: Path | str,
    recipe: Reading = Reading(),
    held: Documents | None = None,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Interleaving:
    """Learn to predict what comes next in `documents`; leaves a bundle in `out`/bundle, as its tower of pictures.

    `held` chooses the epoch whose weights are kept. Where the picture encoder is frozen, pictures are encoded once and
    kept in the user's cache. The same call goes on where an earlier one was stopped.
    """
    with torch.random.fork_rng():  # what starts from scratch draws its weights
        torch.manual_seed(runtime.seed_of(recipe.seed, "weights"))
        model = reader(recipe.language, recipe.picture, sees=recipe.sees, size=recipe.size, texts=documents.texts)
        if recipe.sees == "features" and not recipe.learn_to_see:
            model.eye.freeze()
        method = Interleaved(model, pixels=recipe.pixels)
    model.to(runtime.device())
    laid = lay(model, documents, length=recipe.length, on_error=on_error, quiet=quiet)
    batches = Batches(laid.columns, batch=min(recipe.batch, len(laid.columns["tokens"])), seed=recipe.seed)
    watch, validation = None, None
    if held is not None:
        validation = lay(model, held, length=recipe.length, on_error=on_error, quiet=quiet)
        watch = Watch(
            lambda _: -cost(model, validation.columns, batch=recipe.batch),
            every=batches.steps_per_epoch,
            patience=recipe.patience,
            name="likelihood",
        )
    steps = recipe.epochs * batches.steps_per_epoch
    rate = recipe.language_lr or (recipe.lr if recipe.language.startswith("llama:") else PRETRAINED)
    run = fit(
        method,
        batches,
        steps=steps,
        out=out,
        optimizer=Optimizer(
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            warmup=min(100, steps // 10),
            clip=1.0,
            factors={"reader.language": rate / recipe.lr},
        ),
        seed=recipe.seed,
        watch=watch,
        record={
            "data": documents.name,
            "documents": len(laid.documents),
            **{name: value for name, value in asdict(recipe).items() if name not in ("batch", "seed")},
        },
        quiet=quiet,
    )
    found = None if validation is None else cost(model, validation.columns, batch=recipe.batch)
    meta = {"method": "interleaved", "data": documents.name, "recipe": asdict(recipe), "cost": found}
    bundle = Bundle(method.towers(), meta)
    bundle.save(Path(out) / "bundle")
    return Interleaving(bundle, run, [*laid.documents.skipped], found, laid.split)


def open_pages(
    path: Path | str, *, images: Path | None = None, on_error: OnError = "skip"
) -> tuple[Documents, Documents | None]:
    """What to learn from and what to validate on: documents, or the captions of a manifest, each behind its picture.

    Documents have no splits; of a manifest that has, "train" is learned from, and "val", where there is one, validates.
    """
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file() and path.read_bytes().lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"[":
        return open_documents(path, images=images, on_error=on_error), None
    source = open_source(path, images=images)
    if source.splits is None:
        return captioned(source), None
    held = captioned(source.split("val")) if "val" in source.splits else None
    return captioned(source.split("train")), held


# -- Documents as columns ---------------------------------------------------------------------------------------------


class Laid(NamedTuple):
    """Documents that can be read, as columns of rows for `Batches`; `split` of them were longer than a row."""

    columns: Mapping[str, Any]
    documents: Documents
    split: int


def lay(model: Reader, documents: Documents, *, length: int, on_error: OnError = "skip", quiet: bool = False) -> Laid:
    """Documents packed into rows, with the pixels of their pictures, or what a frozen eye sees in them."""
    used = sorted({part for parts in documents.parts for part in parts if isinstance(part, int)})
    content, kept = _pictures(model, [documents.pictures[at] for at in used], documents.name, on_error, quiet=quiet)
    row_of = {used[picture]: row for row, picture in enumerate(kept)}
    documents = documents.showing(row_of)
    if not len(documents):
        raise DataError(f"{documents.name}: no document is left that can be read: {documents.skipped[0].reason}.")
    rows = packed(documents, model.encode, length=length, cells=model.eye.cells, start=model.start, end=model.end)
    shown = Shown(content, [[row_of[picture] for picture in own] for own in rows.pictures])
    return Laid({"image": shown, "tokens": rows.tokens, "document": rows.document}, documents, rows.split)


def _pictures(
    model: Reader, pictures: Sequence[Path | bytes | np.ndarray], name: str, on_error: OnError, *, quiet: bool
) -> tuple[Any, Iterable[int]]:
    """What `Shown` takes, and which pictures it is of."""
    eye = model.eye
    if not pictures:
        return torch.zeros(0, eye.cells, eye.dim), []
    ids = [str(one) if isinstance(one, Path) else f"{name}, picture {at}" for at, one in enumerate(pictures)]
    source = Source(name, ids, images=pictures)
    if eye.frozen:
        found = embed(_Glance(eye), source, "image", on_error=on_error, quiet=quiet)
        return torch.from_numpy(found.matrix).unflatten(1, (eye.cells, eye.dim)), found.kept.tolist()
    encoder = eye.encoder
    with Line("decode", unit="images", quiet=quiet) as line:
        pixels, kept, _ = decoded(
            source,
            encoder.size,
            how=encoder.how,
            channels=encoder.channels,
            on_error=on_error,
            progress=line.update,
        )
    return pixels, kept.tolist()


class _Glance(Encoder):
    """An eye as an encoder whose features are all of its tokens, side by side: so they are kept as others are."""

    kind: ClassVar[Kind] = "image"

    def __init__(self, eye: Eye):
        super().__init__({"name": "eye", **eye.encoder.spec})
        self.eye, self.dim = eye, eye.cells * eye.dim

    def prepare(self, item: Raw, *, name: str = "") -> np.ndarray:
        return self.eye.encoder.prepare(item, name=name)

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
        return self.eye.encoder.batch(prepared)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
        return self.eye(x).flatten(1)


def cost(model: Reader, columns: Mapping[str, Any], *, batch: int) -> float:
    """What a token of the texts costs, in nats, their ends included: the logarithm of the perplexity."""
    nats, count, device = 0.0, 0, device_of(model)
    with inference(model):
        for start in range(0, len(columns["tokens"]), batch):
            rows = range(start, min(start + batch, len(columns["tokens"])))
            tokens, document = (
                torch.from_numpy(columns[name][rows.start : rows.stop]).to(device) for name in ("tokens", "document")
            )
            pictures = torch.cat([columns["image"][row] for row in rows]).to(device)
            asked = follows(document) & (tokens[:, 1:] != PATCH)
            logits = model.read(tokens, document, pictures).logits[:, :-1]
            nats += float(next_token(logits[asked], tokens[:, 1:][asked]).double().sum())
            count += int(asked.sum())
    return nats / max(count, 1)


def without_pictures(documents: Documents) -> Documents:
    """The same documents, their texts alone: for what a picture is worth."""
    blind = [tuple(part for part in parts if isinstance(part, str)) for parts in documents.parts]
    kept = [at for at, parts in enumerate(blind) if parts]
    return replace(documents, ids=[documents.ids[at] for at in kept], parts=[blind[at] for at in kept], pictures=[])
