"""What a bundle is worth on data it did not see: neighbours and a linear probe where there are labels, recall where
there are captions."""

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.decode import OnError
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.embed import embed
from twofold.measure.probes import Probe, knn_probe, linear_probe
from twofold.measure.retrieval import Retrieval, retrieval
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ImageEncoder, image_encoder

THUMBNAIL = 32  # pixels a side of the pictures that the pixel baseline compares


class Labels(NamedTuple):
    """How well labels follow from embeddings: by neighbours and by a linear map."""

    knn: Probe
    linear: Probe


class Paired(NamedTuple):
    """Retrieval in both directions between pictures and their texts."""

    text_to_image: Retrieval
    image_to_text: Retrieval


class Evaluation(NamedTuple):
    """`labels` by what was embedded ("trained", "head", the baselines); None where there are no labels or no texts."""

    labels: dict[str, Labels] | None
    paired: Paired | None


def paired(images: np.ndarray, texts: np.ndarray, offsets: np.ndarray) -> Paired:
    """Retrieval between images [n, d] and texts [m, d], where texts offsets[i]:offsets[i+1] belong to image i."""
    owner = np.repeat(np.arange(len(images)), np.diff(offsets))
    own = [range(start, stop) for start, stop in pairwise(offsets.tolist())]
    return Paired(
        text_to_image=retrieval(texts, images, [[item] for item in owner.tolist()], groups=owner.tolist()),
        image_to_text=retrieval(images, texts, own),
    )


def evaluate(
    bundle: Bundle,
    data: Source,
    *,
    split: str = "test",
    limit: int | None = None,
    at: Literal["encoder", "head"] = "encoder",
    baselines: bool = False,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> Evaluation:
    """Measure `bundle` on one split of `data` (on all of it where it names none, if no labels need a training split).

    Labelled pictures: a kNN and a linear probe are fitted on the split "train" (its first `limit` items) and tested on
    `split`; `at="head"` measures behind the training head as well, where the loss was taken (the bundle must have been
    loaded with its heads); `baselines` adds raw pixels and the same encoder untrained. Captioned pictures: recall both
    ways.
    """
    if at == "head" and "image" not in bundle.heads:
        raise UsageError(
            "This bundle has no training head to measure behind: its method has none, an older twofold saved it, or it "
            "was loaded without (Bundle.load(folder, heads=True))."
        )
    labels = pairs = None
    if data.labels is not None and data.splits is not None and "image" in bundle.towers:
        train, tested = data.split("train"), data.split(split)
        parts = (train.take(range(min(limit or len(train), len(train)))), tested)
        tower = bundle.towers["image"]
        models: dict[str, Tower | ImageEncoder] = {"trained": tower}
        if at == "head":
            models["head"] = bundle.heads["image"]
        if baselines:
            models["untrained"] = _untrained(tower)
        labels = {
            name: _probes(*(_embedded(model, part, on_error=on_error, quiet=quiet) for part in parts))
            for name, model in models.items()
        }
        if baselines:
            labels["pixels"] = _probes(*_pixels(parts, int(tower.encoder.spec["channels"]), on_error))
    if data.texts is not None and {"image", "text"} <= set(bundle.towers):
        tested = data if data.splits is None else data.split(split)
        tested = tested.take([item for item, texts in enumerate(tested.texts or ()) if texts])
        images = embed(bundle.towers["image"], tested, "image", on_error=on_error, quiet=quiet)
        texts = embed(bundle.towers["text"], tested.take(images.kept), "text", quiet=quiet)
        pairs = paired(images.matrix, texts.matrix, texts.offsets)
    if labels is None and pairs is None:
        raise DataError(
            f"There is nothing to evaluate on in {data.name}: it takes labels with the splits train and {split}, or "
            f"captions and a bundle with an image and a text tower (this one has {', '.join(bundle.towers)})."
        )
    return Evaluation(labels, pairs)


Features = tuple[np.ndarray, np.ndarray]  # one row an item, and the items' labels


def _probes(train: Features, test: Features) -> Labels:
    return Labels(knn=knn_probe(*train, *test), linear=linear_probe(*train, *test))


def _embedded(tower: Tower | ImageEncoder, source: Source, *, on_error: OnError, quiet: bool) -> Features:
    done = embed(tower, source, "image", on_error=on_error, quiet=quiet)
    assert source.labels is not None
    return done.matrix, source.labels[done.kept]


def _pixels(parts: tuple[Source, Source], channels: int, on_error: OnError) -> list[Features]:
    """Thumbnails of both parts around the first one's mean: cosines of raw pixels mostly compare brightness."""
    features = []
    mean: Any = 0
    for place, part in enumerate(parts):
        pixels, kept, _ = decoded(part, THUMBNAIL, channels=channels, on_error=on_error)
        rows = pixels.reshape(len(pixels), -1).astype(np.float32)
        mean = mean if place else rows.mean(0)
        assert part.labels is not None
        features.append((rows - mean, part.labels[kept]))
    return features


def _untrained(tower: Tower) -> ImageEncoder:
    """The tower's encoder as it was before anything was learned."""
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of("untrained"))
        return image_encoder(**tower.encoder.spec, pretrained=False)
