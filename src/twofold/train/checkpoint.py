"""A run's last complete step on disk: everything that resuming needs, as one safetensors file.

Written beside its place, synced and renamed, so a kill or a full disk leaves the checkpoint before. Reading one
executes nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.data.atomic import write_atomically
from twofold.errors import TrainingError


class Checkpoint(NamedTuple):
    step: int  # steps done
    tensors: dict[str, Tensor]
    scaler: dict[str, Any]  # of float16's gradients; empty in other precisions
    score: float | None = None  # why these weights were kept, where they were the best so far


def save(
    path: Path,
    method: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    step: int,
    scaler: Mapping[str, Any] = {},
    score: float | None = None,
) -> None:
    """The state of `method`, `optimizer` (None: weights alone) and gradient scaler (numbers) after `step` steps."""
    tensors = {f"method.{name}": value for name, value in method.state_dict().items()}
    for name, state in (_optimizer_state(method, optimizer) if optimizer else {}).items():
        tensors |= {f"optimizer.{name}/{key}": value for key, value in state.items()}
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    metadata = {"step": json.dumps(step), "scaler": json.dumps(dict(scaler)), "score": json.dumps(score)}
    write_atomically(path, lambda temporary: save_file(own, temporary, metadata))


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; TrainingError names a file that is not one."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            scaler, score = metadata.get("scaler", "{}"), metadata.get("score", "null")
            return Checkpoint(json.loads(metadata["step"]), tensors, json.loads(scaler), json.loads(score))
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{path} is not a readable checkpoint ({error}). Remove it to start this run again."
        ) from error


def restore(checkpoint: Checkpoint, method: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put a checkpoint back into the method and the optimiser that it was saved from; None: into the method alone."""
    weights = _under(checkpoint.tensors, "method.")
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"The checkpoint belongs to another model: {error}") from error
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in _under(checkpoint.tensors, "optimizer.").items():
        parameter, key = name.rsplit("/", 1)
        states.setdefault(parameter, {})[key] = value
    for name, weight in method.named_parameters():
        if optimizer and name in states:
            optimizer.state[weight] = {
                # As the weights lie in memory; but AdamW counts its steps on the CPU whatever their device.
                key: value if key == "step" else torch.empty_like(weight).copy_(value)
                for key, value in states[name].items()
            }


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _optimizer_state(method: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        for name, p in method.named_parameters()
        if p in optimizer.state
    }
