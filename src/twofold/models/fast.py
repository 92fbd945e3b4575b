"""Encoders at the speed of the machine: ONNX Runtime on the CPU, checked against PyTorch before it is trusted."""

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.atomic import write_atomically
from twofold.models.clips import AT_ONCE, ClipEncoder, FrameTokens
from twofold.models.encoders import Encoder, ImageEncoder, TextEncoder, device_of, fingerprint, inference

log = logging.getLogger("twofold")

Inputs = Tensor | Mapping[str, Tensor]

TOLERANCE = 1e-4
"""How far the graph's features may be from PyTorch's, relative to the largest of them."""


@dataclass(frozen=True)
class Fast:
    """An encoder to embed much with; call it as the encoder itself. `reason` says why ONNX Runtime does not run it.

    ONNX Runtime may be called by several threads at once.
    """

    run: Callable[[Inputs], Tensor]
    engine: Literal["onnxruntime", "eager"]
    reason: str = ""

    def __call__(self, x: Inputs) -> Float[Tensor, "b dim"]:
        return self.run(x)


def accelerate(encoder: Encoder, cache: Path, *, threads: int | None = None) -> Fast:
    """The encoder in evaluation mode as an ONNX Runtime graph, kept in `cache` under its fingerprint.

    A call takes as many `threads` as PyTorch does, or as are given.

    The first call exports the graph (some seconds); each call compares it with PyTorch. Where the encoder is not on
    the CPU, or cannot be exported, or the graph disagrees, PyTorch runs, and `reason` and the log say why.
    """
    device = device_of(encoder)
    if device.type != "cpu":
        return Fast(_eager(encoder), "eager", f"the encoder is on {device}")
    if isinstance(encoder, ClipEncoder) and isinstance(encoder.tokens, FrameTokens):
        return _averaged(accelerate(encoder.tokens.picture, cache, threads=threads))
    if not isinstance(encoder, ImageEncoder | TextEncoder):
        return Fast(_eager(encoder), "eager", "no graph is made of such an encoder")
    path = cache / f"{fingerprint(encoder)}.onnx"
    for attempt in ("kept", "fresh"):
        try:
            if attempt == "fresh" or not path.is_file():
                _export(encoder, path)
            run = session(path, threads=threads)
            _compare(run, encoder)
            return Fast(run, "onnxruntime")
        except Exception as error:  # exporter and runtime raise about everything, and PyTorch is always there
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    log.warning("%s runs in PyTorch, slower than in ONNX Runtime: %s", encoder.spec["name"], reason)
    return Fast(_eager(encoder), "eager", reason)


def _averaged(picture: Fast) -> Fast:
    """Of clips what a picture encoder makes of their frames, averaged, as `ClipEncoder` does."""

    def run(x: Inputs) -> Tensor:
        assert isinstance(x, Tensor)
        frames = torch.cat([picture(some) for some in x.flatten(0, 1).split(AT_ONCE)])
        return frames.unflatten(0, x.shape[:2]).mean(1)

    return replace(picture, run=run)


def _eager(encoder: Encoder) -> Callable[[Inputs], Tensor]:
    sees = isinstance(encoder, ImageEncoder)
    if sees:
        encoder = copy.deepcopy(encoder).to(memory_format=torch.channels_last)

    def run(x: Inputs) -> Tensor:
        with inference(encoder):
            return encoder(x.contiguous(memory_format=torch.channels_last) if sees and isinstance(x, Tensor) else x)

    return run


class _Flat(nn.Module):
    """A text encoder with its tokens as two arguments: a graph has no dictionaries."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder({"input_ids": input_ids, "attention_mask": attention_mask})


def _export(encoder: ImageEncoder | TextEncoder, path: Path) -> None:
    module = _Flat(encoder).eval() if isinstance(encoder, TextEncoder) else encoder
    export_graph(module, examples(encoder, 2), path, output="features")


def export_graph(module: nn.Module, inputs: Mapping[str, Tensor], path: Path, *, output: str) -> None:
    """Write `module` as an ONNX graph; the batch is free, and so is the length of what has one."""
    axes: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if "input_ids" in inputs:
        axes[1] = torch.export.Dim.DYNAMIC
    variadic = type(module).forward.__code__.co_flags & 0x04  # forward(*inputs): their shapes come as one tuple
    shapes: Any = ((axes,) * len(inputs),) if variadic else (axes,) * len(inputs)
    with inference(module), warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program: Any = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=shapes,
        )
    write_atomically(path, lambda temporary: temporary.write_bytes(program.model_proto.SerializeToString()))


def session(path: Path, *, threads: int | None = None) -> Callable[[Inputs], Tensor]:
    """An ONNX graph, ready to run on the CPU; a call takes as many threads as PyTorch does, or as are given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    opened: Any = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(x: Inputs) -> Tensor:
        feeds = {name: value.numpy() for name, value in ({"pixels": x} if isinstance(x, Tensor) else x).items()}
        return torch.from_numpy(opened.run(None, feeds)[0])

    return run


def examples(encoder: ImageEncoder | TextEncoder, batch: int) -> dict[str, Tensor]:
    """Inputs of a graph by name; noise, always the same."""
    if isinstance(encoder, TextEncoder):
        return encoder.batch(["two", "a longer text than that", "and a third one"][:batch])
    draw = torch.Generator().manual_seed(0)
    return {"pixels": torch.rand(batch, encoder.channels, encoder.size, encoder.size, generator=draw)}


def _compare(run: Callable[[Inputs], Tensor], encoder: ImageEncoder | TextEncoder) -> None:
    """ValueError if `run` and the encoder differ, on another batch size than the graph was made with."""
    inputs = examples(encoder, 3)
    x: Inputs = inputs if isinstance(encoder, TextEncoder) else inputs["pixels"]
    with inference(encoder):
        expected = encoder(x)
    error = (run(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    if not error <= TOLERANCE:  # a NaN is no agreement either
        raise ValueError(f"the exported graph is off by {error:.1e} of the largest feature")
