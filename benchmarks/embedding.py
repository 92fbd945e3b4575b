"""How fast are the default encoders on this CPU, and by which engine? Pictures and texts a second, all in one run.

    python benchmarks/embedding.py            # batches of 32, about two minutes on two cores
    python benchmarks/embedding.py --seconds 1 --batch 4

Every engine gets the same batches and is compared with plain PyTorch (`error`, relative to the largest feature). The
engines take turns, so that a disturbance of the machine meets all of them; each rate is the median over the turns.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from twofold.data.samples import openmoji
from twofold.models.encoders import ImageEncoder, image_encoder, inference, text_encoder
from twofold.models.fast import accelerate

TURNS = 3
RESULTS = Path(__file__).parent / "results" / "embedding.json"


def folded(encoder: ImageEncoder) -> ImageEncoder:
    """A copy in channels-last memory whose BatchNorms are part of the convolutions before them."""
    encoder = copy.deepcopy(encoder).eval()
    for block in [module for module in encoder.modules() if list(module.named_children())]:
        convolution = None
        for name, layer in block.named_children():
            if isinstance(layer, nn.BatchNorm2d) and convolution is not None:
                setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), layer))
                # timm's BatchNorm layers carry the activation that follows.
                setattr(block, name, nn.Sequential(layer.drop, layer.act) if hasattr(layer, "act") else nn.Identity())
            convolution = name if isinstance(layer, nn.Conv2d) else None
    return encoder.to(memory_format=torch.channels_last)


def plain(module: Callable) -> Callable:
    """The module without gradients, on channels-last pictures."""

    def run(x: Tensor | dict) -> Tensor:
        with torch.no_grad():
            return module(x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) else x)

    return run


def measure(engines: dict[str, Callable], x: Tensor | dict, batch: int, seconds: float) -> list[dict]:
    """Rate, ratio to the first engine and error of each; `seconds` is what one turn of one engine takes at least."""
    expected = None
    rates: dict[str, list[float]] = {name: [] for name in engines}
    errors = {}
    for name, run in engines.items():
        z = run(x)  # also compiles
        expected = z if expected is None else expected
        errors[name] = ((z - expected).abs().max() / expected.abs().max()).item()
    for _ in range(TURNS):
        for name, run in engines.items():
            run(x)
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or not count:
                run(x)
                count += batch
            rates[name].append(count / elapsed)
    first = statistics.median(rates[next(iter(engines))])
    return [
        {
            "engine": name,
            "per_second": round(statistics.median(values), 1),
            "low": round(min(values), 1),
            "high": round(max(values), 1),
            "ratio": round(statistics.median(values) / first, 2),
            "error": float(f"{errors[name]:.1e}"),
        }
        for name, values in rates.items()
    ]


def pictures(batch: int, seconds: float, cache: Path) -> list[dict]:
    encoder = image_encoder().eval()
    x = torch.rand(batch, 3, encoder.size, encoder.size, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(copy.deepcopy(encoder))
    quick = accelerate(encoder, cache)
    assert quick.engine == "onnxruntime", quick.reason

    def eager(x: Tensor) -> Tensor:
        with inference(encoder):
            return encoder(x)

    def compiled_run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x)

    engines = {
        "PyTorch": eager,
        "channels-last, folded BatchNorm": plain(folded(encoder)),
        "torch.compile": compiled_run,
        "ONNX Runtime": quick,
    }
    return measure(engines, x, batch, seconds)


def texts(batch: int, seconds: float, cache: Path) -> list[dict]:
    encoder = text_encoder()
    names = [own[0] for own in openmoji().texts if len(own[0].split()) > 3]
    tokens = encoder.inputs(names[:batch])
    quick = accelerate(encoder, cache)
    assert quick.engine == "onnxruntime", quick.reason
    return measure({"PyTorch": plain(encoder), "ONNX Runtime": quick}, tokens, batch, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="least time of one engine's turn (default: 6)")
    parser.add_argument("--batch", type=int, default=32, help="pictures or texts in a batch (default: 32)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        encoders = {
            "efficientnet-lite0, 224 px": pictures(given.batch, given.seconds, Path(cache)),
            "minilm, emoji names": texts(given.batch, given.seconds, Path(cache)),
        }
    record = {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "onnxruntime")},
        "n": f"batch {given.batch}, median of {TURNS} turns of {given.seconds:g} s",
        "encoders": encoders,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    for title, rows in encoders.items():
        table = Table("engine", "per second", "low … high", "ratio", "error", title=title)
        for row in rows:
            cells = (row["per_second"], f"{row['low']} … {row['high']}", f"{row['ratio']}×", f"{row['error']:.0e}")
            table.add_row(row["engine"], *map(str, cells))
        Console().print(table)
    print(f"{record['machine']}; {record['n']}. Written to {given.out}")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
