"""Random views of pictures whose encoder is frozen: embedded once, they cost training nothing."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.sources import Modality, Source, content_key
from twofold.data.vectors import Vectors
from twofold.measure.embed import BATCH, FEW, SHARD
from twofold.models.encoders import ImageEncoder, device_of, fingerprint, inference
from twofold.models.fast import accelerate
from twofold.progress import Line
from twofold.views import policies


def viewed(
    encoder: ImageEncoder, source: Source, modality: Modality, policy: str, count: int, *, quiet: bool = False
) -> Iterator[Float[np.ndarray, "n d"]]:
    """The features of `count` random views of each picture; a picture always has the same ones.

    They are kept in the user's cache beside the features of the pictures themselves.
    """
    view = replace(policies(policy)[0], size=encoder.size)
    kept = Vectors(runtime.cache_dir() / "vectors", fingerprint(encoder), encoder.dim)
    pictures = source.keys(modality)
    names = [[content_key(f"{key} {number} {view.to_dict()}") for key in pictures] for number in range(count)]
    todo = [(item, number) for number in range(count) for item in kept.missing(names[number])]
    run = accelerate(encoder, runtime.cache_dir() / "onnx") if len(todo) >= FEW else encoder
    pixels, device = pixels_of(encoder, source, modality) if todo else np.empty(0), device_of(encoder)
    made: list[np.ndarray] = []
    with Line("views", unit="images", quiet=quiet) as line, inference(encoder):
        for start in range(0, len(todo), BATCH):
            some = todo[start : start + BATCH]
            views = [
                view(torch.from_numpy(np.array(pixels[item : item + 1])), runtime.generator(pictures[item], number))
                for item, number in some
            ]
            made.append(run(torch.cat(views).to(device)).float().cpu().numpy())
            done = start + len(some)
            if done == len(todo) or len(made) * BATCH >= SHARD:
                rows = np.concatenate(made)
                kept.append([names[number][item] for item, number in todo[done - len(rows) : done]], rows)
                made.clear()
            line.update(done, len(todo))
    for own in names:
        yield kept.get(own)


def pixels_of(encoder: ImageEncoder, source: Source, modality: Modality) -> np.ndarray:
    """The pictures a little larger than the encoder takes them, so that crops keep some detail to choose from."""
    cells = source.column(modality).cells
    pixels, kept, _ = decoded(
        replace(source, images=cells), encoder.size * 8 // 7, how=encoder.how, channels=encoder.channels
    )
    assert len(kept) == len(source)  # the encoder could read them all
    return pixels
