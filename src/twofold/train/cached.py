"""Large batches on small memory: the encoders run over a batch in chunks, and remember none of what they compute.

A loss that compares the samples of a batch needs all their features at once, but not all that led to them. So the
features are computed chunk by chunk without their intermediate results; backward computes these again, a chunk at a
time, with the same dropout (GradCache, arXiv 2101.06983, at the level of the encoder). Heads and loss see the whole
batch, and gradients are those of the whole batch: unlike in gradient accumulation, every negative counts.

It costs one more forward pass of the encoders. The exception to "those of the whole batch" is BatchNorm *inside* an
encoder: it normalises by its chunk (of all processes), and so its running statistics are those of chunks.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twofold import runtime
from twofold.errors import UsageError
from twofold.methods.base import Method
from twofold.models.base import Encoder
from twofold.models.captioner import Looker
from twofold.models.causal import Reader
from twofold.models.tokens import ClipTokens, Tokens

Rows = Tensor | Mapping[str, Tensor]


def encoders(method: Method) -> list[nn.Module]:
    """What is expensive in a method: its encoders, copies that follow them too; else whole towers."""
    found: list[nn.Module] = [part for part in method.modules() if isinstance(part, Encoder)]
    bare = [tower for tower in method.towers().values() if not any(part in found for part in tower.modules())]
    return list(dict.fromkeys(found + bare))


@contextmanager
def chunked(method: Method, chunk: int) -> Iterator[None]:
    """Inside, the method's encoders run over `chunk` rows at a time, and no activations of them are kept."""
    if chunk < 1:
        raise UsageError(f"A chunk has a row at least; got chunk={chunk}.")
    if any(isinstance(part, Tokens | ClipTokens | Reader) for part in method.modules()):
        raise UsageError(
            f"{type(method).__name__} compares no samples with each other, so a batch in chunks (--chunk {chunk}) has "
            "nothing to win. Take a smaller batch and a lower learning rate."
        )

    if any(isinstance(part, Looker) for part in method.modules()):
        raise UsageError(f"CoCa runs on whole batches: its towers give more than features. Leave out --chunk {chunk}.")

    def forward(encoder: nn.Module, x: Rows) -> Tensor:
        # A class's own forward: the instance's is this one.
        return torch.cat([_replayed(encoder, rows) for rows in _split(x, chunk, agreed=encoder.training)])

    patched = encoders(method)
    for encoder in patched:
        vars(encoder)["forward"] = MethodType(forward, encoder)
    try:
        yield
    finally:
        for encoder in patched:
            del vars(encoder)["forward"]


def _replayed(encoder: nn.Module, rows: Rows) -> Tensor:
    compute = MethodType(type(encoder).forward, encoder)
    if not torch.is_grad_enabled():
        return compute(rows)
    return checkpoint(compute, rows, use_reentrant=False, context_fn=lambda: (nullcontext(), _unremembered(encoder)))


@contextmanager
def _unremembered(module: nn.Module) -> Iterator[None]:
    """What the first pass wrote into buffers (running statistics) is not written a second time by its replay."""
    own = [(layer._buffers, dict(layer._buffers)) for layer in module.modules() if layer._buffers]
    for buffers, values in own:
        buffers.update({name: value if value is None else value.clone() for name, value in values.items()})
    try:
        yield
    finally:
        for buffers, values in own:
            buffers.update(values)


def _split(x: Rows, chunk: int, *, agreed: bool) -> list[Rows]:
    """Parts of at most `chunk` rows, as even as can be; where `agreed`, as many in every process.

    In training the parts' statistics meet, and no process must wait for a part that another, of fewer rows, has not.
    """
    tensors = {"": x} if isinstance(x, Tensor) else dict(x)
    rows = len(next(iter(tensors.values())))
    held = runtime.counts(rows) if agreed else [rows]
    count = max(1, min(math.ceil(max(held) / chunk), min(held)))
    parts = {name: value.tensor_split(count) for name, value in tensors.items()}
    if isinstance(x, Tensor):
        return list(parts[""])
    return [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
