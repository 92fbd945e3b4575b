"""Low-rank changes of a network's weights instead of the weights: LoRA (arXiv 2106.09685), by `peft`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from twofold import runtime
from twofold.errors import UsageError


@contextmanager
def low_rank(networks: Sequence[nn.Module], *, rank: int, seed: int = 0) -> Iterator[None]:
    """Inside, linear maps and ungrouped convolutions learn a change of this rank, and the networks nothing else.

    Afterwards the changes are part of the weights: the networks are what they were, and need no `peft`.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise UsageError("LoRA takes peft: pip install twofold[lora].") from error
    if rank < 1:
        raise UsageError(f"A change of rank 1 is the least there is; got rank={rank}.")
    wrapped: list[LoraModel] = []
    for network in networks:
        places = [place for place, layer in network.named_modules() if _changes(layer)]
        if not places:
            raise UsageError(f"{type(network).__name__} has no layer for low-rank changes; train it as a whole.")
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=places)
        with torch.random.fork_rng():
            torch.manual_seed(runtime.seed_of(seed, "low rank", len(wrapped)))
            wrapped.append(LoraModel(network, config, "default"))
    try:
        yield
    finally:
        for model in wrapped:
            model.merge_and_unload()


def _changes(layer: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weights of its output map without calling it: a change would not be seen.
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)
