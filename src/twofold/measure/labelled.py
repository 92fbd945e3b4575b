"""How well labels follow from what a model makes of pictures or videos, beside what else could have been taken."""

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float

from twofold import runtime
from twofold.data.cache import decoded, decoded_clips
from twofold.data.decode import OnError
from twofold.data.sources import Kind, Modality, Source
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.baselines import IMAGENET, THUMBNAIL, colour_histogram, thumbnails
from twofold.measure.clustering import Clustering, clustering
from twofold.measure.embed import embed, tokens
from twofold.measure.metrics import Difference, paired
from twofold.measure.probes import FewShot, Probe, attentive_probe, few_labels, few_shot, knn_probe, linear_probe
from twofold.measure.retrieval import Retrieval, same_label
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import Encoder, ImageEncoder, encoder, fresh
from twofold.models.layers import layer_of

SHARES = (0.01, 0.1)  # of the labels, where that leaves two a class
PROBES = ("knn", "linear", "attentive", "fine_tuned")

At = str  # "encoder", "head", or "layer:3"


class Labels(NamedTuple):
    """How well labels follow from embeddings; what takes two items of a label, or another flag, is None without."""

    knn: Probe
    linear: Probe
    few: FewShot  # 1, 5 and 10 examples a class
    shares: FewShot  # linear probes of 1 % and 10 % of the labels
    found: Retrieval | None  # test items that look for others of their label
    clusters: Clustering | None  # of the test items
    answers: np.ndarray  # the test items' labels
    attentive: Probe | None = None
    fine_tuned: Probe | None = None

    def right(self, probe: str) -> Float[np.ndarray, "n"]:
        """By labelled test item, whether a probe of PROBES is right; of few labels, the share of draws ("5", "0.1")."""
        few = {str(k): hits for part in (self.few, self.shares) for k, hits in part.right.items()}
        if probe in few:
            return few[probe]
        read = getattr(self, probe) if probe in PROBES else None
        if read is None:
            raise unknown("probe", probe, [*(name for name in PROBES if getattr(self, name)), *few])
        return (read.predicted == self.answers)[self.answers >= 0].astype(float)


def against(one: Labels, other: Labels, probe: str = "linear") -> Difference:
    """How much more `one` reads than `other` on the same items; DataError where they are not the same."""
    if not np.array_equal(one.answers, other.answers):
        raise DataError("Paired tests take the same items; one encoder could not read all that the other could.")
    return paired(one.right(probe), other.right(probe))


class FineTune(Protocol):
    """Trains a copy of an encoder on the labels of the first source, and reads those of the second."""

    def __call__(self, encoder: Encoder, train: Source, test: Source, /, *, quiet: bool) -> Probe: ...


Features = tuple[np.ndarray, np.ndarray]  # one row an item, and the items' labels
IMAGENET_WEIGHTS = "ImageNet weights"


def kind_seen(bundle: Bundle, data: Source) -> Kind | None:
    """What of `data` with labels the bundle looks at: pictures, else videos."""
    kinds: tuple[Kind, ...] = ("image", "video")
    return next((kind for kind in kinds if kind in bundle.towers and kind in data.modalities.values()), None)


def measured_at(bundle: Bundle, seen: str, at: At) -> dict[str, Tower | Encoder]:
    """The bundle's tower, and what `at` asks for beside it."""
    tower = bundle.tower(seen)
    if at == "encoder":
        return {"trained": tower}
    if at == "head":
        if seen not in bundle.heads:
            raise UsageError(
                "This bundle has no training head to measure behind: its method has none, an older twofold saved it, "
                "or it was loaded without (Bundle.load(folder, heads=True))."
            )
        return {"trained": tower, "head": bundle.heads[seen]}
    number = at.removeprefix("layer:")
    if not at.startswith("layer:") or not number.isdecimal():
        raise UsageError(f"Features are measured at encoder, head or layer:N, such as layer:3; got {at!r}.")
    if not isinstance(tower.encoder, ImageEncoder):
        raise UsageError(f"Layers are told apart in encoders of pictures; this one is of {tower.kind}.")
    return {"trained": tower, at: layer_of(tower.encoder, int(number))}


def stand_ins(tower: Tower) -> dict[str, Tower | Encoder]:
    """What else could have been taken: the encoder untrained, and of pictures in colour one with ImageNet's weights."""
    found: dict[str, Tower | Encoder] = {"untrained": _untrained(tower)}
    if isinstance(tower.encoder, ImageEncoder) and tower.encoder.channels == 3:
        found[IMAGENET_WEIGHTS] = encoder(IMAGENET, "image").to(runtime.device())
    return found


def labelled(
    models: Mapping[str, Tower | Encoder],
    parts: tuple[Source, Source],
    modality: Modality,
    *,
    attentive: bool = False,
    fine_tune: FineTune | None = None,
    on_error: OnError = "skip",
    quiet: bool = False,
) -> dict[str, Labels]:
    """Probes of each model's embeddings of (train, test); what was once embedded comes from the cache.

    A head and a layer have no tokens, and nothing to train on from, so neither has the two probes that are asked for.
    """
    found = {}
    for name, model in models.items():
        own = _probes(*(_embedded(model, part, modality, on_error=on_error, quiet=quiet) for part in parts))
        whole = not name.startswith(("head", "layer"))
        if attentive and whole and name != IMAGENET_WEIGHTS:
            read = [_tokens(model, part, modality, on_error=on_error, quiet=quiet) for part in parts]
            own = own._replace(attentive=attentive_probe(*read[0], *read[1]))
        if fine_tune is not None and whole:
            network = model.encoder if isinstance(model, Tower) else model
            own = own._replace(fine_tuned=fine_tune(network, *parts, quiet=quiet))
        found[name] = own
    return found


def _probes(train: Features, test: Features) -> Labels:
    z, y = test
    counts = np.unique(y[y >= 0], return_counts=True)[1]
    return Labels(
        knn=knn_probe(*train, *test),
        linear=linear_probe(*train, *test),
        few=few_shot(*train, *test),
        shares=few_labels(*train, *test, shares=SHARES),
        found=same_label(z, y) if len(counts) and counts.max() > 1 else None,
        clusters=clustering(z, y) if len(counts) > 1 else None,
        answers=y,
    )


def _embedded(
    tower: Tower | Encoder, source: Source, modality: Modality, *, on_error: OnError, quiet: bool
) -> Features:
    done = embed(tower, source, modality, on_error=on_error, quiet=quiet)
    assert source.labels is not None
    return done.matrix, source.labels[done.kept]


def _tokens(tower: Tower | Encoder, source: Source, modality: Modality, *, on_error: OnError, quiet: bool) -> Features:
    encoder = tower.encoder if isinstance(tower, Tower) else tower
    assert isinstance(encoder, Encoder) and source.labels is not None
    found, kept = tokens(encoder, source, modality, on_error=on_error, quiet=quiet)
    return found, source.labels[kept]


def pixels(parts: tuple[Source, Source], modality: Modality, channels: int, on_error: OnError) -> dict[str, Labels]:
    """What thumbnails know, as they are and by their colours alone."""
    found, of = [], []
    for part in parts:
        if part.modalities[modality] == "video":
            frames, offsets, kept, _ = decoded_clips(part, modality, THUMBNAIL, channels=channels, on_error=on_error)
            means = np.stack([frames[start:stop].mean(0) for start, stop in pairwise(offsets)])
            seen = means if frames.dtype.kind == "f" else means.round().astype(frames.dtype)
        else:
            seen, kept, _ = decoded(part, THUMBNAIL, channels=channels, on_error=on_error)
        assert part.labels is not None
        found.append(seen)
        of.append(part.labels[kept])
    train, mean = thumbnails(found[0])
    test, _ = thumbnails(found[1], mean)
    return {
        "pixels": _probes((train, of[0]), (test, of[1])),
        "colours": _probes((colour_histogram(found[0]), of[0]), (colour_histogram(found[1]), of[1])),
    }


def _untrained(tower: Tower) -> Encoder:
    """The tower's encoder as it was before anything was learned."""
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of("untrained"))
        return fresh(tower.encoder)
