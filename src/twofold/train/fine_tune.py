"""What labels make of an encoder that may change: a short supervised training that starts from its weights."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from twofold import runtime
from twofold.data.cache import decoded
from twofold.data.loader import Batches
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure.metrics import accuracy, accuracy_chance
from twofold.measure.probes import Probe
from twofold.methods.base import Method, Out
from twofold.models.encoders import Encoder, ImageEncoder, device_of, inference
from twofold.runtime import gather
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import Policy, policies

BATCH = 128
RATES = (3e-3, 3e-4)  # for weights that must move, and for weights that are good already


class Classifier(Method):
    """Cross-entropy of a linear layer on normalised features; encoder and layer learn together.

    The layer starts at 0, so the first gradients teach it alone. Features are normalised as MAE's linear probe has
    them (arXiv 2111.06377, appendix A.1), for encoders differ in scale by orders of magnitude.
    """

    needs = ("image", "label")

    def __init__(self, encoder: ImageEncoder, *, policy: Policy, classes: int):
        super().__init__()
        self.encoder, self.policy, self.classes = encoder, policy, classes
        self.norm, self.layer = nn.BatchNorm1d(encoder.dim, affine=False), nn.Linear(encoder.dim, classes)
        nn.init.zeros_(self.layer.weight)

    def forward(self, batch: Mapping[str, Any], draw: torch.Generator) -> Out:
        h = self.encoder(self.policy(batch["image"], draw))
        scores, y = gather(self.layer(self.norm(h))), gather(torch.as_tensor(batch["label"]).to(h.device))
        return Out(cross_entropy(scores, y), z=h, chance=float(np.log(self.classes)))

    def towers(self) -> dict[str, nn.Module]:
        return {"image": self.encoder}


def fine_tune(
    encoder: Encoder,
    train: Source,
    test: Source,
    *,
    epochs: int = 10,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    quiet: bool = False,
) -> Probe:
    """Train a copy of `encoder` and a linear layer on the labels of `train`, and read those of `test`.

    Each learning rate trains on four fifths; the one that reads the other fifth best trains on all, and its last epoch
    counts. AdamW, a warm-up of a tenth and half a cosine; views are crops of .3 to 1 of a picture and nothing else, for
    a flip may change what a picture shows. `validation` of the answer is the accuracy by rate.
    """
    if not isinstance(encoder, ImageEncoder):
        raise UsageError(f"Fine-tuning trains encoders of pictures; this one is of {encoder.kind}.")
    if epochs < 1 or not rates or not min(rates) > 0:
        raise UsageError(f"fine_tune takes an epoch or more and rates > 0; got {epochs} and {tuple(rates)}.")
    if train.labels is None or test.labels is None:
        raise DataError(f"{train.name} has no labels to learn from.")
    pixels, y = _labelled(train, encoder)
    classes, y = np.unique(y, return_inverse=True)
    shown, _, answers = _pictures(test, encoder)
    best, validation = rates[0], None
    if len(rates) > 1:
        order = torch.randperm(len(y), generator=runtime.generator("fine-tune", seed)).numpy()
        kept, held = order[len(y) // 5 :], order[: len(y) // 5]
        if len(held) == 0:
            raise DataError("A fifth of the labels chooses the learning rate; there are fewer than five.")
        validation = {}
        for rate in rates:
            read = _trained(encoder, pixels[kept], y[kept], len(classes), epochs, rate, seed, quiet=quiet)
            validation[rate] = float((read(pixels[held]) == y[held]).mean())
        best = max(rates, key=validation.__getitem__)
    predicted = classes[_trained(encoder, pixels, y, len(classes), epochs, best, seed, quiet=quiet)(shown)]
    return Probe(accuracy(predicted, answers), accuracy_chance(answers), predicted, best, validation)


def _trained(encoder: ImageEncoder, pixels: np.ndarray, y: np.ndarray, classes: int, epochs: int, rate: float,
             seed: int, *, quiet: bool) -> Any:  # fmt: skip
    """What pictures are predicted to be, once trained."""
    size = encoder.size
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(seed, "fine-tune"))
        policy = replace(policies("ijepa")[0], size=size, mean=(), std=())
        method = Classifier(copy.deepcopy(encoder).requires_grad_(True), policy=policy, classes=classes)
        method.to(device_of(encoder))
    batches = Batches({"image": pixels, "label": y}, batch=min(BATCH, len(y)), seed=seed)
    steps = epochs * batches.steps_per_epoch
    how = Optimizer(name="adamw", lr=rate, weight_decay=0.05, warmup=max(1, steps // 10))
    with TemporaryDirectory() as folder:
        fit(method, batches, steps=steps, out=Path(folder), optimizer=how, seed=seed, save_every=steps, quiet=quiet)
    plain = replace(policies("none")[0], size=size, mean=(), std=())

    def read(pictures: np.ndarray) -> np.ndarray:
        found = []
        with inference(method):
            for some in torch.from_numpy(pictures).split(BATCH):
                h = method.encoder(plain(some, runtime.generator("plain")).to(device_of(method)))
                found.append(method.layer(method.norm(h)).argmax(1).cpu().numpy())
        return np.concatenate(found)

    return read


def _pictures(source: Source, encoder: ImageEncoder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, at a size that leaves crops something to choose from, the items they are of, and their labels."""
    side = encoder.size if encoder.size <= 64 else encoder.size * 8 // 7
    found = decoded(source, side, channels=encoder.channels)
    assert source.labels is not None
    return np.array(found.pixels), found.kept, source.labels[found.kept]


def _labelled(source: Source, encoder: ImageEncoder) -> tuple[np.ndarray, np.ndarray]:
    pixels, _, y = _pictures(source, encoder)
    if not (y >= 0).any():
        raise DataError(f"No picture of {source.name} that learning starts from has a label.")
    return pixels[y >= 0], y[y >= 0]
