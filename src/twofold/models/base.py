"""What all encoders share: from items of one kind to features, whatever the kind and whoever wrote the network."""

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.sources import Kind

Inputs = Tensor | dict[str, Tensor]


class Encoder(nn.Module, ABC):
    """A network from items of one `kind` to features of width `dim`, with what belongs to it.

    `inputs(items)` decodes or tokenizes, and forward takes what comes out; how many other items came along changes
    nothing. `spec` says in JSON how to build the encoder again, without weights; `files` are the small files that it
    needs for that (configuration, tokenizer), verbatim.
    """

    kind: ClassVar[Kind]
    dim: int

    def __init__(self, spec: Mapping[str, Any], files: Mapping[str, bytes] = {}):
        super().__init__()
        self.spec, self.files = dict(spec), dict(files)

    @abstractmethod
    def prepare(self, item: Any, *, name: str = "") -> Any:
        """One item, decoded; a DecodeError with `name` where it cannot be. Threads may call it at the same time."""

    @abstractmethod
    def batch(self, prepared: Sequence[Any]) -> Inputs:
        """Prepared items as the tensors that forward takes, on the CPU."""

    @abstractmethod
    def forward(self, x: Any) -> Float[Tensor, "b dim"]: ...

    def inputs(self, items: Sequence[Any]) -> Inputs:
        """Items as the tensors that forward takes, on the CPU."""
        return self.batch([self.prepare(item) for item in items])


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """The inputs of an encoder on another device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@contextmanager
def inference(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every layer is in the mode it was in."""
    modes = [(layer, layer.training) for module in modules for layer in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():  # not inference_mode: what a layer caches meanwhile must still serve training
            yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; one without any is on the CPU."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def fingerprint(module: nn.Module) -> str:
    """128 bits, in hex, over all that decides what a module with a `spec` computes: spec, `files`, weights."""
    digest = hashlib.blake2b(json.dumps(module.spec, sort_keys=True).encode(), digest_size=16)
    for name, content in sorted(getattr(module, "files", {}).items()):
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
