"""Two kinds of data brought into one space: pictures and captions, speech and transcripts, code and its documentation.

As it comes, both encoders stay as they are: every item is embedded once, then two small heads learn in seconds. Either
encoder, or both, may be trained with its head, as a whole or by low-rank changes of its weights (LoRA).
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from twofold import runtime
from twofold.data.cache import decoded_sounds
from twofold.data.decode import OnError, Skipped
from twofold.data.loader import Batches, Choice, sharing
from twofold.data.sources import Modality, Source, content_key
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.embed import Embedded, embed
from twofold.measure.metrics import CELLS, TIE, row_blocks
from twofold.measure.negatives import of_pairs
from twofold.methods import CLIP, VSE, Method, SigLIP
from twofold.methods.negatives import Mining
from twofold.methods.pair import View
from twofold.models.base import Encoder, device_of, inference, moved
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import encoder
from twofold.models.heads import Standardize, mlp
from twofold.models.images import ImageEncoder
from twofold.models.sounds import MelEncoder, TransformersAudio
from twofold.progress import TERMINAL, Line
from twofold.train.hardness import hardness_of
from twofold.train.loop import Run, Watch, fit
from twofold.train.lora import low_rank
from twofold.train.mine import MEETING, miner, normalised, read_negatives
from twofold.train.optim import Optimizer
from twofold.train.viewed import pixels_of, viewed
from twofold.train.weights import Weights, read_weights
from twofold.views import policies

Objective = Literal["siglip", "clip", "triplet"]
Learns = Literal["", "from scratch", "tuned", "lora"]
SCALE = 25.0  # where SigLIP's scale ends on small data; from the paper's 10 it is still on its way when training ends
KNOWING = 0.1  # the rate of heads that start as the identity, as a part of `lr`
ROWS = 64  # items that an encoder takes at a time when they are only looked at
GROUP = 8  # items of a batch that are each other's mined negatives
LOOKED_AT = 512  # pairs whose negatives are looked at
PAIRED = 0.07  # the temperature of that, where an objective has none
SAMPLE = 1000  # pairs, to see whether two encoders share a space
TOWERS: Mapping[Modality, str] = {"image": "efficientnet-lite0", "text": "minilm"}


@dataclass(frozen=True)
class Recipe:
    """What learns, and how. docs/how-to/align.md has the measurements behind the defaults."""

    objective: Objective = "siglip"
    train: str = "none"  # beside the heads: "none", one tower by its name (the other is locked), "all", or "lora"
    dim: int = 512  # the common space; towers that share one already stay in theirs
    hidden: int = 1024  # width of the heads' hidden layer; 0 makes each head one linear map
    dropout: float = 0.5
    batch: int = 1024
    epochs: int = 60
    lr: float = 1e-3  # of the heads
    encoder_lr: float | None = None  # of encoders that are trained: 1e-5, LoRA 2e-4; those from scratch have `lr`
    rates: Mapping[Modality, float] = field(default_factory=dict)  # the same by tower, where they differ
    rank: int = 8  # of LoRA's changes
    weight_decay: float = 0.1
    views: int = 0  # random views of each picture whose encoder is frozen, embedded once, to draw from as well
    policy: str = "mae"  # what views of pictures are: a preset's name or a file
    chunk: int | None = None  # rows a trained encoder sees at a time: a batch that memory does not hold
    holdout: float = 0.0  # share of the pairs to validate on, where the data has no split "val"
    mine: int = 0  # epochs between minings by the model itself of what shall meet in a batch, guarded; 0: none
    patience: int = 15  # epochs without a better recall in validation, after which training stops
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise unknown("objective", self.objective, get_args(Objective))
        if self.views < 0:
            raise UsageError(f"views are further views of each picture, 0 or more; got {self.views}.")
        if self.mine < 0:
            raise UsageError(f"mine is the number of epochs between minings, 0 for none; got {self.mine}.")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"holdout is the share of the pairs that validate, below 1; got {self.holdout}.")


class Alignment(NamedTuple):
    """What `align` leaves: the bundle, the same bundle before training, the run, and what could not be read.

    `before` and `after` are the recall in validation (`agreement`); None where there was nothing to validate on.
    """

    bundle: Bundle
    untrained: Bundle
    run: Run
    skipped: list[Skipped]
    before: float | None = None
    after: float | None = None


class _Side(NamedTuple):
    """One modality: its encoder, that one's features of the training items, its head, and how the encoder learns."""

    encoder: Encoder
    features: Embedded
    head: nn.Module
    learns: Learns

    @property
    def tower(self) -> nn.Module:
        """What is trained: of a frozen encoder the head alone, which takes the features."""
        return Tower(self.encoder, self.head) if self.learns else self.head


def align(
    pairs: Source,
    *,
    out: Path | str,
    towers: Mapping[Modality, str] = TOWERS,
    recipe: Recipe = Recipe(),
    weights: Mapping[str, float] | Path | str | None = None,
    negatives: Path | str | None = None,
    on_error: OnError = "skip",
    log_to: str | None = None,
    quiet: bool = False,
) -> Alignment:
    """Learn to put what belongs together in one place; leaves a bundle in `out`/bundle.

    `towers` are two modalities of `pairs` and the names of their encoders. Where the data name splits, only "train" is
    learned from, and "val" chooses the epoch whose weights are kept. An item with several texts shows another one of
    them on each visit, and items that have a text or a file in common never come into one batch: nothing that belongs
    together is pushed apart. `weights`, by id or in a file (columns id and weight, text too for single texts), is the
    share of its visits that a pair keeps; 0 drops it. `negatives` is a file of `twofold mine`: items that are hard to
    tell apart by it meet in a batch. The same call goes on where an earlier one was stopped. `log_to` is that of `fit`.
    """
    _check_towers(towers, pairs, recipe)
    weighed = read_weights(weights) if isinstance(weights, Path | str) else Weights(weights or {})
    weighed.check(pairs)
    said, mute = with_texts(pairs, towers)
    train, held = parts(said, towers, recipe)
    train = train.take(np.flatnonzero(weighed.shares(train, towers)))
    with torch.random.fork_rng():  # an encoder from scratch draws its weights
        torch.manual_seed(runtime.seed_of(recipe.seed, "encoders"))
        encoders = {}
        for name, spec in towers.items():
            column = train.column(name)
            encoders[name] = encoder(spec, column.kind, column=column)
    learns = {name: _learns(name, spec, encoders[name], recipe) for name, spec in towers.items()}
    if recipe.mine:
        _check_mining(train, learns, negatives)
    train, features, skipped = embedded(train, encoders, on_error=on_error, quiet=quiet)
    shared = _share_a_space(features, linked(train, towers))
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(recipe.seed, "weights"))
        sides = {name: _side(encoders[name], features[name], learns[name], shared, recipe) for name in towers}
    untrained = _bundle(sides, {"untrained": True})
    columns = {name: _column(side, train, name, recipe, weighed, quiet=quiet) for name, side in sides.items()}
    mined = None if negatives is None else read_negatives(Path(negatives), train.ids)
    batches = pair_batches(
        columns,
        linked(train, towers),
        batch=recipe.batch,
        seed=recipe.seed,
        shares=weighed.shares(train, towers) if weighed else None,
        beside=(lambda: method.get_buffer("beside").cpu()) if recipe.mine else None if mined is None else lambda: mined,
        quiet=quiet,
    )
    watch, probes = None, {}
    if held is not None:
        validation, lost = _Validation.of(held, encoders, towers, sides, quiet=quiet)
        skipped += lost
        watch = Watch(validation, every=batches.steps_per_epoch, patience=recipe.patience, name="recall")
        probes = {"hardness": validation.hardness}

    tuned = [side.encoder for side in sides.values() if side.learns in ("tuned", "lora")]
    with (
        low_rank(tuned, rank=recipe.rank, seed=recipe.seed) if recipe.train == "lora" else nullcontext(),
        _statistics_kept(tuned),
    ):
        method = _method(sides, recipe, batches.batch, meeting=_mean_cosine(features) if shared else 0.0)
        if recipe.mine:
            every = recipe.mine * batches.steps_per_epoch
            method = Mining(method, items=len(train), k=MEETING, every=every, mine=miner(train, features))
        before = watch.score(method.eval()) if watch else None
        run = fit(
            method,
            batches,
            steps=recipe.epochs * batches.steps_per_epoch,
            out=out,
            optimizer=_optimizer(method, sides, recipe, shared, warmup=batches.steps_per_epoch),
            seed=recipe.seed,
            chunk=recipe.chunk,
            log_every=batches.steps_per_epoch,
            watch=watch,
            probes=probes,
            log_to=log_to,
            record={
                "data": pairs.name,
                "items": len(train),
                "towers": dict(towers),
                **{name: value for name, value in asdict(recipe).items() if name not in ("batch", "seed", "chunk")},
                **({"weights": weighed.key} if weighed else {}),
                **({"negatives": content_key(mined.numpy())} if mined is not None else {}),
            },
            quiet=quiet,
        )
    after = max((line["recall"] for line in run.log if "recall" in line), default=None)
    meta: dict[str, Any] = {"recipe": asdict(recipe), "data": pairs.name}
    core = _core(method)
    if isinstance(core, SigLIP):  # what makes of a cosine the probability of a pair, at the odds of a batch
        scale, bias = core.log_scale.detach().exp(), core.bias.detach()
        meta["siglip"] = {"scale": float(scale), "bias": float(bias), "batch": batches.batch}
    if before is not None and after is not None:
        meta["validation"] = {"before": before, "after": after, "step": run.best}
        if shared and after < before:
            _warn_of_forgetting(before, after, recipe)
    bundle = _bundle(sides, meta)
    bundle.save(Path(out) / "bundle")
    return Alignment(bundle, untrained, run, [*mute, *skipped], before, after)


# -- What there is to learn from --------------------------------------------------------------------------------------


def _check_towers(towers: Mapping[Modality, str], pairs: Source, recipe: Recipe) -> None:
    if len(towers) != 2:
        raise UsageError(f"Alignment is between two modalities; got {len(towers)}: {', '.join(towers) or 'none'}.")
    if recipe.train not in ("none", "all", "lora", *towers):
        raise unknown("way to train", recipe.train, ("none", "all", "lora", *towers))
    if stray := set(recipe.rates) - set(towers):
        raise unknown("tower to give a rate", min(stray), towers)
    missing = [name for name in towers if name not in pairs.modalities]
    if missing:
        there = ", ".join(f"{name} ({kind})" for name, kind in pairs.modalities.items()) or "none"
        raise DataError(
            f"Alignment takes two sides, {' and '.join(towers)}; {pairs.name} has no {' and no '.join(missing)}. Its "
            f"modalities are {there}. Name two of them with --towers; --columns makes further columns modalities."
        )


def with_texts(pairs: Source, towers: Mapping[Modality, str]) -> tuple[Source, list[Skipped]]:
    """The items that have a text, without texts that are blank or stand twice at their item; and those that have none.

    Named are only items that are learned from or validate.
    """
    columns = {name: column for name in towers if (column := pairs.column(name)).kind == "text"}
    cells = {
        name: [list(dict.fromkeys(text for text in texts if text.strip())) for texts in column.cells]
        for name, column in columns.items()
    }
    full = [item for item in range(len(pairs)) if all(texts[item] for texts in cells.values())]
    if not full:
        raise DataError(
            f"{pairs.name} has {len(pairs):,} items, and none with a text that is not blank in {' and '.join(cells)}."
        )
    others = {name: column._replace(cells=cells[name]) for name, column in columns.items() if name != "text"}
    texts = cells.get("text", pairs.texts)
    mute = [
        Skipped(pairs.ids[item], f"has no {next(name for name, texts in cells.items() if not texts[item])}")
        for item in sorted({*range(len(pairs))}.difference(full))
        if pairs.splits is None or pairs.splits[item] in ("train", "val")
    ]
    return replace(pairs, texts=texts, columns={**pairs.columns, **others}).take(full), mute


def parts(pairs: Source, towers: Mapping[Modality, str], recipe: Recipe) -> tuple[Source, Source | None]:
    """What is learned from, and what validates: the split "val", else a share of what would be learned from."""
    train = pairs if pairs.splits is None else pairs.split("train")
    if pairs.splits is not None and "val" in pairs.splits:
        return train, pairs.split("val")
    if not recipe.holdout:
        return train, None
    _, name = np.unique(linked(train, towers), return_inverse=True)  # what is linked stays on one side
    draw = runtime.generator(recipe.seed, "holdout")
    held = torch.rand(int(name.max()) + 1, generator=draw).numpy()[name] < recipe.holdout
    if held.all() or not held.any():
        raise DataError(
            f"holdout={recipe.holdout} of {len(train):,} items leaves {held.sum():,} to validate on and "
            f"{(~held).sum():,} to learn from; both take some. Change the share, or name a split val."
        )
    return train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))


def linked(source: Source, modalities: Iterable[Modality]) -> Int[np.ndarray, "n"]:
    """A number an item: the same where items have a text (`normalised`) or a file in common."""
    columns: list[Sequence[Sequence]] = []
    for name in modalities:
        kind, cells = source.column(name)
        if kind == "text":
            columns.append([list(map(normalised, texts)) for texts in cells])
        else:
            columns.append([[key] for key in source.keys(name)])
    return sharing(*columns)


def embedded(
    source: Source, encoders: Mapping[Modality, Encoder], *, on_error: OnError, quiet: bool
) -> tuple[Source, dict[Modality, Embedded], list[Skipped]]:
    """The items that every encoder can read, and their features; what is trained later is read once here, too."""
    found = {name: embed(one, source, name, on_error=on_error, quiet=quiet) for name, one in encoders.items()}
    skipped = [skip for each in found.values() for skip in each.skipped]
    readable = np.full(len(source), len(found))
    for each in found.values():
        readable[each.kept] -= 1
    kept = np.flatnonzero(readable == 0)
    if len(kept) < 2:
        raise DataError(
            f"{source.name}: of {len(source):,} pairs {len(kept)} can be read on both sides; there must be two. "
            + (f"The first that cannot: {skipped[0].id} {skipped[0].reason}." if skipped else "")
        )
    return source.take(kept), {name: _of(each, kept) for name, each in found.items()}, skipped


def _of(embedded: Embedded, items: Int[np.ndarray, "n"]) -> Embedded:
    """The rows of some of the source's items, all of them embedded."""
    at = np.searchsorted(embedded.kept, items)
    counts = np.diff(embedded.offsets)[at]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows = np.repeat(embedded.offsets[at] - offsets[:-1], counts) + np.arange(offsets[-1])
    ids = [embedded.ids[item] for item in at]
    return Embedded(ids, embedded.matrix[rows], offsets, np.arange(len(items)), [])


def _column(side: _Side, source: Source, name: Modality, recipe: Recipe, weighed: Weights, *, quiet: bool) -> Any:
    """What a batch holds of this side: features, or where the encoder learns what it reads."""
    kind = source.column(name).kind
    if side.learns and kind == "image":
        assert isinstance(side.encoder, ImageEncoder)
        return pixels_of(side.encoder, source, name)
    if kind == "text":
        rows = _read_once(side.encoder, source, name, quiet=quiet) if side.learns else side.features.matrix
        return Choice(rows, side.features.offsets, weighed.of_texts(source, name) if weighed.texts else None)
    if kind == "image" and recipe.views:
        assert isinstance(side.encoder, ImageEncoder)
        seen = [side.features.matrix, *viewed(side.encoder, source, name, recipe.policy, recipe.views, quiet=quiet)]
        return Choice(np.stack(seen, 1).reshape(-1, side.encoder.dim), np.arange(len(source) + 1) * len(seen))
    return _read_once(side.encoder, source, name, quiet=quiet) if side.learns else side.features.matrix


def _read_once(one: Encoder, source: Source, name: Modality, *, quiet: bool) -> list:
    """The single things that an encoder which learns reads again and again: of sounds the waveforms, not the files."""
    kind, cells = source.column(name)
    if kind == "text":
        return [text for texts in cells for text in texts]
    if not isinstance(one, MelEncoder | TransformersAudio):
        return list(cells)
    with Line("hear", unit="sounds", quiet=quiet) as line:
        heard = decoded_sounds(source, name, one.rate, one.seconds, progress=line.update)
    assert len(heard.kept) == len(source)  # the encoder could read them all
    return heard.waves


def pair_batches(
    columns: Mapping[str, Any],
    links: Int[np.ndarray, "n"],
    *,
    batch: int,
    seed: int,
    shares: Float[np.ndarray, "n"] | None = None,
    beside: Callable[[], Int[Tensor, "n k"]] | None = None,
    quiet: bool = False,
) -> Batches:
    """Batches in which no two items are `linked`; as large as asked for, or as there are distinct items.

    With `beside`, each item's mined negatives, these meet in groups of up to GROUP.

    Says so where they are smaller, and where many pairs wait because what they share keeps them out.
    """
    distinct = len(np.unique(links))
    if distinct < 2:
        raise DataError(f"All {len(links):,} pairs share a text or a file: there is nothing to tell apart.")
    batches = Batches(
        columns, batch=min(batch, distinct), seed=seed, apart=links, shares=shares, beside=beside, each=GROUP
    )
    places = batches.steps_per_epoch * batches.batch
    if quiet or (batches.batch == min(batch, len(links)) and (places > 0.5 * len(links) or not batches.crowded)):
        return batches
    TERMINAL.print(
        f"  Pairs that share a text or a file never meet in a batch. Of {len(links):,} pairs, {distinct:,} differ: "
        f"a batch is of {batches.batch:,}, and an epoch has room for {places:,}. A smaller --batch has room for more.",
        soft_wrap=True,
    )
    return batches


# -- What learns ------------------------------------------------------------------------------------------------------


def _learns(name: Modality, spec: str, one: Encoder, recipe: Recipe) -> Learns:
    scratch = spec.startswith(("bpe:", "mel:")) or spec.endswith("@untrained")
    if recipe.train not in ("all", "lora", name) or not any(True for _ in one.parameters()):
        if scratch:
            raise UsageError(
                f"{spec} starts from random weights, and frozen it would stay there. Train it: --train {name}, or all."
            )
        return ""
    return "from scratch" if scratch else "lora" if recipe.train == "lora" else "tuned"


def _side(one: Encoder, features: Embedded, learns: Any, shared: bool, recipe: Recipe) -> _Side:
    width = features.matrix.shape[1]
    if shared:  # a linear map that starts as the identity: training begins at what the encoders know
        linear = nn.Linear(width, width)
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
        return _Side(one, features, nn.Sequential(linear), learns)
    if learns == "from scratch":  # its features have no statistics yet that will last
        return _Side(one, features, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, recipe.dim)), learns)
    return _Side(one, features, _head(features, recipe), learns)


def _head(features: Embedded, recipe: Recipe) -> nn.Sequential:
    """Standardised features, then one linear map or a hidden layer, dropout before each."""
    dim = features.matrix.shape[1]
    standard = Standardize(dim).measure(torch.from_numpy(features.matrix))
    if not recipe.hidden:
        return nn.Sequential(standard, nn.Dropout(recipe.dropout), nn.Linear(dim, recipe.dim))
    layers = mlp(dim, recipe.hidden, recipe.dim, norm="none", activation="gelu", dropout=recipe.dropout)
    return nn.Sequential(standard, nn.Dropout(recipe.dropout / 2), *layers)


def _method(sides: Mapping[Modality, _Side], recipe: Recipe, batch: int, *, meeting: float) -> Method:
    """`meeting` is the cosine at which rows that have nothing to do with each other meet before training."""
    towers = {name: side.tower for name, side in sides.items()}
    views = {name: _view(side.encoder, recipe) for name, side in sides.items() if side.learns}
    if recipe.objective == "triplet":
        return VSE(towers, views=views)
    if recipe.objective == "clip":
        return CLIP(towers, views=views)
    return SigLIP(towers, views=views, scale=SCALE, bias=-math.log(max(batch - 1, 1)) - SCALE * meeting)


def _check_mining(train: Source, learns: Mapping[Modality, Learns], negatives: Path | str | None) -> None:
    if negatives is not None:
        raise UsageError(
            "Negatives are mined by the model itself (--mine) or come from a file (--negatives), not both."
        )
    first = next(iter(learns))
    kind, cells = train.column(first)
    if any(learns.values()) or (kind == "text" and any(len(texts) > 1 for texts in cells)):
        raise UsageError(
            f"A model that mines as it learns takes frozen encoders, whose features it knows, and one {first} an item. "
            "Mine with `twofold mine` instead, and give --negatives."
        )


def _core(method: Method) -> Method:
    """The objective itself, which mining may be around."""
    return method.method if isinstance(method, Mining) else method


def _view(one: Encoder, recipe: Recipe) -> View:
    """How what an encoder reads is shown to it while it learns: pictures as random views, all else as it is."""
    if isinstance(one, ImageEncoder):
        return replace(policies(recipe.policy)[0], size=one.size)

    def view(items: Sequence[Any], draw: torch.Generator) -> Any:
        return moved(one.inputs(items), device_of(one))

    return view


def _optimizer(
    method: Method, sides: Mapping[Modality, _Side], recipe: Recipe, shared: bool, *, warmup: int
) -> Optimizer:
    places = {id(module): place for place, module in method.named_modules()}
    usual = {"tuned": 1e-5, "lora": 2e-4, "from scratch": recipe.lr}
    factors = {}
    for name, side in sides.items():
        if shared:  # heads that start from what is known already have less far to go
            factors[places[id(side.head)] + "."] = KNOWING
        if side.learns:
            rate = recipe.rates.get(name, usual[side.learns] if recipe.encoder_lr is None else recipe.encoder_lr)
            factors[places[id(side.encoder)] + "."] = rate / recipe.lr
    return Optimizer(lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=warmup, factors=factors)


@contextmanager
def _statistics_kept(encoders: Sequence[Encoder]) -> Iterator[None]:
    """Inside, BatchNorms of pretrained encoders normalise by what they measured, over far more than our batches."""
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    norms = [layer for one in encoders for layer in one.modules() if isinstance(layer, kinds)]
    for layer in norms:
        vars(layer)["train"] = MethodType(lambda self, mode=True: nn.Module.train(self, False), layer)
    try:
        yield
    finally:
        for layer in norms:
            del vars(layer)["train"]


def _bundle(sides: Mapping[Modality, _Side], meta: Mapping[str, Any]) -> Bundle:
    """The towers as they are now; what goes on learning is copied."""
    return Bundle(
        {
            name: Tower(copy.deepcopy(side.encoder) if side.learns else side.encoder, copy.deepcopy(side.head))
            for name, side in sides.items()
        },
        meta,
    )


# -- What is worth knowing about it -----------------------------------------------------------------------------------


def agreement(
    first: Float[Tensor, "m d"], second: Float[Tensor, "k d"], of_first: Int[Tensor, "m"], of_second: Int[Tensor, "k"]
) -> float:
    """Recall in one number: the mean of R@1, R@5 and R@10, both ways, by cosine; 0..1.

    Rows that bear the same number are each other's right answers; each query's best one counts, ties against it.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    found = []
    for queries, gallery, asks, answers in ((first, second, of_first, of_second), (second, first, of_second, of_first)):
        for block in row_blocks(len(queries), len(gallery), CELLS):
            scores = queries[block] @ gallery.T
            right = asks[block, None] == answers
            best = scores.masked_fill(~right, -math.inf).amax(1, keepdim=True)
            ranks = 1 + (scores.masked_fill(right, -math.inf) >= best - TIE).sum(1)
            found.append(torch.stack([(ranks <= k).float() for k in (1, 5, 10)]).mean(0) / (2 * len(queries)))
    return float(torch.cat(found).sum())


@dataclass(frozen=True, eq=False)
class _Validation:
    """A method → its recall on held-out pairs, whose features are computed once where the encoder is frozen."""

    source: Source
    features: Mapping[Modality, Embedded]
    names: Int[np.ndarray, "n"]
    sides: Mapping[Modality, _Side]

    @classmethod
    def of(
        cls,
        held: Source,
        encoders: Mapping[Modality, Encoder],
        towers: Mapping[Modality, str],
        sides: Mapping[Modality, _Side],
        *,
        quiet: bool,
    ) -> tuple["_Validation", list[Skipped]]:
        held, features, skipped = embedded(held, encoders, on_error="skip", quiet=quiet)
        return cls(held, features, linked(held, towers), sides), skipped

    def __call__(self, method: Method) -> float:
        towers, rows = method.towers(), []
        for name in self.sides:
            z = self._embedding(name, towers[name])
            owner = torch.from_numpy(np.repeat(self.names, np.diff(self.features[name].offsets)))
            rows.append((z, owner.to(z.device)))
        (first, of_first), (second, of_second) = rows
        return agreement(first, second, of_first, of_second)

    @cached_property
    def _read(self) -> dict[Modality, list]:
        learn = {name: side.encoder for name, side in self.sides.items() if side.learns}
        return {name: _read_once(one, self.source, name, quiet=True) for name, one in learn.items()}

    def hardness(self, method: Method) -> Mapping[str, float]:
        """A probe for `fit`: how hard the negatives of the first pairs are, of a text that is their item's first."""
        towers = method.towers()
        first, second = (
            self._embedding(name, towers[name], self.features[name].offsets[:-1][:LOOKED_AT]).cpu()
            for name in self.sides
        )
        if len(first) < 2:
            return {}
        core = _core(method)
        scale = getattr(core, "log_scale", None)
        seen = of_pairs(
            first,
            second,
            temperature=PAIRED if scale is None else 1 / float(scale.detach().exp()),
            loss="sigmoid" if isinstance(core, SigLIP) else "softmax",
        )
        return hardness_of(seen)

    def _embedding(
        self, name: Modality, tower: nn.Module, rows: Int[np.ndarray, "m"] | None = None
    ) -> Float[Tensor, "m d"]:
        """Of all of a side's rows, or of some."""
        device = next(tower.parameters()).device
        chosen = np.arange(len(self.features[name].matrix)) if rows is None else rows
        with inference(tower):
            if not self.sides[name].learns:
                return tower(torch.from_numpy(self.features[name].matrix[chosen]).to(device)).float()
            one, items = self.sides[name].encoder, [self._read[name][row] for row in chosen]
            parts = (one.inputs(items[start : start + ROWS]) for start in range(0, len(items), ROWS))
            return torch.cat([tower(moved(part, device)).float() for part in parts])


def _share_a_space(features: Mapping[Modality, Embedded], names: Int[np.ndarray, "n"]) -> bool:
    """Whether two encoders agree before anything is learned: both towers of a CLIP, or one text encoder twice.

    The right answer then comes early, on average in the first quarter of a gallery; by chance it is in the middle.
    """
    first, second = features.values()
    if first.matrix.shape[1] != second.matrix.shape[1]:
        return False
    n = min(len(names), SAMPLE)
    a, b = (torch.from_numpy(each.matrix[each.offsets[:n]]).float() for each in (first, second))
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    other = torch.from_numpy(names[:n, None] != names[:n])
    above = ((scores >= scores.diagonal()[:, None]) & other).sum(1) / other.sum(1).clamp(min=1)
    return bool(above.mean() + 2 * above.std() / math.sqrt(n) < 0.25)


def _mean_cosine(features: Mapping[Modality, Embedded]) -> float:
    """Of all rows of one side with all of the other: the product of the means."""
    first, second = (F.normalize(torch.from_numpy(each.matrix), dim=1).mean(0) for each in features.values())
    return float(first @ second)


def _warn_of_forgetting(before: float, after: float, recipe: Recipe) -> None:
    TERMINAL.print(
        f"  Training made it worse: recall in validation was {before:.3f} before and is {after:.3f} at its best. These "
        f"encoders shared a space already. Lower --lr (now {recipe.lr:g}) and --encoder-lr, train less, or use them as "
        "they are.",
        soft_wrap=True,
    )
