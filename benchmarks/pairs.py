"""How fast and how small is a step of the pair losses? Ours, the plain formula's and those of peers, in one run.

    python benchmarks/pairs.py                        # 4,096 pairs of 128, about two minutes on two cores
    python benchmarks/pairs.py --large                # ours with 65,536 pairs of 256, added to the record: minutes
    python benchmarks/pairs.py --batch 512 --seconds .2

A step is one forward and backward. The contenders take turns, so that a disturbance of the machine meets all of them;
a time is the median over the turns. Memory is what a fresh process, one for each contender, takes at its peak beyond
what it held with the embeddings made and one small step done: VmHWM, which Linux resets on request. Peers that are
not installed are left out; `pip install lightly open_clip_torch` brings both. Where there is a GPU, 262,144 pairs of
512 follow on it, with what its allocator peaked at and the time of the bare matrix products that the tiles need.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from twofold.objectives import clip, nt_xent, siglip

RESULTS = Path(__file__).parent / "results" / "pairs.json"
TURNS = 7
TEMPERATURE, SCALE, BIAS = 0.5, 1 / 0.07, -8.0
LARGE, HUGE = (65_536, 256), (262_144, 512)  # pairs and width: on a CPU, on a GPU

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of both sides, scale and bias


def plain_nt_xent(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = F.normalize(torch.cat((a, b)), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


def plain_clip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T + bias
    return -F.logsigmoid((2 * torch.eye(len(a), device=a.device) - 1) * logits).sum() / len(a)


# Imported where it is called: a process that measures memory should hold one library.


def lightly_nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)
    return lambda a, b, scale, bias: loss(a, b)


def open_clip_clip() -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda a, b, scale, bias: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale)


def open_clip_siglip() -> Loss:
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    return lambda a, b, scale, bias: loss(F.normalize(a, dim=1), F.normalize(b, dim=1), scale, bias)


LOSSES: dict[str, dict[str, Callable[[], Loss]]] = {
    "NT-Xent": {
        "twofold": lambda: lambda a, b, scale, bias: nt_xent(a, b, temperature=TEMPERATURE),
        "plain formula": lambda: plain_nt_xent,
        "lightly": lightly_nt_xent,
    },
    "CLIP": {
        "twofold": lambda: lambda a, b, scale, bias: clip(a, b, scale=scale),
        "plain formula": lambda: plain_clip,
        "open_clip": open_clip_clip,
    },
    "SigLIP": {
        "twofold": lambda: lambda a, b, scale, bias: siglip(a, b, scale=scale, bias=bias),
        "plain formula": lambda: plain_siglip,
        "open_clip": open_clip_siglip,
    },
}
TABLES = {"NT-Xent": 4 * 2, "CLIP": 4, "SigLIP": 3}  # matrix products of n × n × d; NT-Xent's are half of (2n)² each


def step(loss: Loss, batch: int, dim: int, device: str = "cpu") -> Callable[[], float]:
    """One forward and backward, ready to run, that gives the loss."""
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(batch, dim, device=device, generator=draw).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(number, device=device, requires_grad=True) for number in (SCALE, BIAS))

    def run() -> float:
        for x in (a, b, scale, bias):
            x.grad = None
        value = loss(a, b, scale, bias)
        value.backward()
        return value.item()

    return run


def installed(contender: str) -> bool:
    return contender in ("twofold", "plain formula") or find_spec(contender) is not None


def race(name: str, batch: int, dim: int, seconds: float) -> list[dict]:
    """Milliseconds of a step and its ratio to ours; `seconds` is what one turn of one contender takes at least."""
    steps = {who: step(make(), batch, dim) for who, make in LOSSES[name].items() if installed(who)}
    values = {who: run() for who, run in steps.items()}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for _ in range(TURNS):
        for who, run in steps.items():
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or not count:
                run()
                count += 1
            times[who].append(1000 * elapsed / count)
    ours = statistics.median(times["twofold"])
    return [
        {
            "contender": who,
            "ms": round(statistics.median(found), 2),
            "low": round(min(found), 2),
            "high": round(max(found), 2),
            "ratio": round(statistics.median(found) / ours, 2),
            "error": float(f"{abs(values[who] / values['plain formula'] - 1):.1e}"),
            "extra_mib": alone(name, who, batch, dim)["extra_mib"],
        }
        for who, found in times.items()
    ]


def alone(name: str, who: str, batch: int, dim: int) -> dict:
    """`measure_alone` in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, who, "--batch", str(batch), "--dim", str(dim)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure_alone(name: str, who: str, batch: int, dim: int) -> dict:
    """Seconds and peak memory of the first step of this size in this process."""
    loss = LOSSES[name][who]()
    step(loss, 64, dim)()  # what a library sets up once is not the step's
    run = step(loss, batch, dim)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
    before, start = resident("VmRSS"), time.perf_counter()
    run()
    return {"seconds": round(time.perf_counter() - start, 2), "extra_mib": round(resident("VmHWM") - before, 1)}


def resident(field: str) -> float:
    """MiB of this process's memory: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def on_gpu(name: str) -> dict:
    """Ours at the size of `HUGE`: seconds, how many times the bare matrix products' time that is, and peak memory."""
    batch, dim = HUGE
    run = step(LOSSES[name]["twofold"](), batch, dim, "cuda")
    tile = torch.randn(8192, dim, device="cuda")

    def timed(work: Callable[[], object]) -> float:
        work()
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = timed(run)
    extra = torch.cuda.max_memory_allocated() - before
    floor = timed(lambda: [tile @ tile.T for _ in range(16)]) / 16 * TABLES[name] * (batch / len(tile)) ** 2
    return {"seconds": round(seconds, 2), "ratio": round(seconds / floor, 2), "extra_mib": round(extra / 2**20, 1)}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def compared(batch: int, dim: int, seconds: float, machine: str) -> dict:
    """The record of all contenders and, where there is a GPU, of ours on it."""
    for missing in sorted({who for each in LOSSES.values() for who in each if not installed(who)}):
        print(f"{missing} is not installed and left out; pip install lightly open_clip_torch", file=sys.stderr)
    peers = {"lightly": "lightly", "open_clip": "open_clip_torch"}
    record: dict = {
        "machine": machine,
        "versions": {
            "torch": version("torch"),
            **{name: version(package) for name, package in peers.items() if installed(name)},
        },
        "n": f"{batch} pairs of {dim}, float32, median of {TURNS} turns of {seconds:g} s",
        "losses": {name: race(name, batch, dim, seconds) for name in LOSSES},
    }
    if torch.cuda.is_available():
        record["gpu"] = {name: on_gpu(name) for name in LOSSES}
        record["gpu"]["n"] = f"{HUGE[0]} pairs of {HUGE[1]}, float32, one step, {torch.cuda.get_device_name()}"
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="pairs (default: 4096)")
    parser.add_argument("--dim", type=int, default=128, help="width of an embedding (default: 128)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of one contender's turn (default: 2)")
    parser.add_argument("--large", action="store_true", help=f"instead, add ours with {LARGE[0]} pairs of {LARGE[1]}")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    parser.add_argument("--alone", nargs=2, metavar=("LOSS", "WHO"), help="one step's time and memory, as JSON")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure_alone(*given.alone, given.batch, given.dim)))
        return
    machine = f"{processor()}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}"
    record: dict = json.loads(given.out.read_text()) if given.out.exists() else {}
    if given.large:
        record["large"] = {
            "machine": machine,
            "torch": version("torch"),
            "n": f"{LARGE[0]} pairs of {LARGE[1]}, float32, one step",
            **{name: alone(name, "twofold", *LARGE) for name in LOSSES},
        }
    else:
        record |= compared(given.batch, given.dim, given.seconds, machine)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=2) + "\n")
    for title, rows in record.get("losses", {}).items():
        table = Table("contender", "ms", "low … high", "ratio", "error", "extra MiB", title=title)
        for row in rows:
            cells = (row["ms"], f"{row['low']} … {row['high']}", f"{row['ratio']}×", f"{row['error']:.0e}")
            table.add_row(row["contender"], *map(str, cells), str(row["extra_mib"]))
        Console().print(table)
    for part in ("large", "gpu"):
        for name, found in record.get(part, {}).items():
            print(f"{part}: {name}: {found}")
    print(f"{record.get('n', 'Only --large')}. Written to {given.out}")


if __name__ == "__main__":
    main()
