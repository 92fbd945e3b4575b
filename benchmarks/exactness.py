"""Is training on four processes the training of one? Gradients of our losses and of other libraries', in one run.

    python benchmarks/exactness.py            # a minute, of which most is imports

Each loss gets the embeddings of its process's 8 of 32 pairs and does what its library has it do with the other
processes; parameter gradients are averaged, as data-parallel training does, and compared with the same loss of all 32
pairs in one process: ratio of norms and cosine. 1 and 1 are the same training. Peers that are not installed are left
out; `pip install lightly open_clip_torch pytorch-metric-learning` brings three. Of solo-learn and stable-pretraining
the losses alone are used, which `pip install --no-deps` is enough for, but for a few small packages that they import.
`python tests/test_exactness.py` then writes the figures into docs/exactness.md.
"""

import argparse
import importlib
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from rich.console import Console
from rich.table import Table
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "exactness.json"
SIZE, PAIRS, WIDTH, DIM = 4, 32, 24, 16
TEMPERATURE = 0.2


class Step(NamedTuple):
    """What one process holds: embeddings of its pairs and their numbers, and what is learned beside the towers."""

    a: Tensor
    b: Tensor
    pair: Tensor
    scale: Tensor
    bias: Tensor
    rank: int
    size: int


Loss = Callable[[Step], Tensor]


def ours() -> dict[str, Loss]:
    from twofold import objectives as o
    from twofold.runtime import gather

    return {
        "clip": lambda s: o.clip(gather(s.a), gather(s.b), scale=s.scale),
        "siglip": lambda s: o.siglip(gather(s.a), gather(s.b), scale=s.scale, bias=s.bias),
        "nt_xent": lambda s: o.nt_xent(gather(s.a), gather(s.b), temperature=TEMPERATURE),
        "dcl": lambda s: o.dcl(gather(s.a), gather(s.b), temperature=TEMPERATURE),
        "barlow_twins": lambda s: o.barlow_twins(gather(s.a), gather(s.b)),
        "vicreg": lambda s: o.vicreg(gather(s.a), gather(s.b)).loss,
    }


def open_clip() -> dict[str, Loss]:
    from open_clip.loss import ClipLoss, SigLipLoss

    def clip(**flags: bool) -> Loss:
        def loss(s: Step) -> Tensor:
            a, b = (torch.nn.functional.normalize(x, dim=1) for x in (s.a, s.b))
            return ClipLoss(rank=s.rank, world_size=s.size, **flags)(a, b, s.scale)

        return loss

    def siglip(s: Step) -> Tensor:
        a, b = (torch.nn.functional.normalize(x, dim=1) for x in (s.a, s.b))
        return SigLipLoss(rank=s.rank, world_size=s.size)(a, b, s.scale, s.bias)

    return {
        "ClipLoss()": clip(),
        "ClipLoss(local_loss=True)": clip(local_loss=True),
        "ClipLoss(gather_with_grad=True)": clip(gather_with_grad=True),
        "ClipLoss(local_loss=True, gather_with_grad=True)": clip(local_loss=True, gather_with_grad=True),
        "SigLipLoss()": siglip,
    }


def lightly() -> dict[str, Loss]:
    from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss

    return {
        "NTXentLoss(gather_distributed=True)": lambda s: NTXentLoss(TEMPERATURE, gather_distributed=True)(s.a, s.b),
        "DCLLoss(gather_distributed=True)": lambda s: DCLLoss(TEMPERATURE, gather_distributed=True)(s.a, s.b),
        "BarlowTwinsLoss(gather_distributed=True)": lambda s: BarlowTwinsLoss(gather_distributed=True)(s.a, s.b),
        "VICRegLoss()": lambda s: VICRegLoss()(s.a, s.b),
        "VICRegLoss(gather_distributed=True)": lambda s: VICRegLoss(gather_distributed=True)(s.a, s.b),
    }


def metric_learning() -> dict[str, Loss]:
    from pytorch_metric_learning.losses import NTXentLoss
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    def wrapped(efficient: bool) -> Loss:
        def loss(s: Step) -> Tensor:
            plain = NTXentLoss(TEMPERATURE)
            across = plain if s.size == 1 else DistributedLossWrapper(plain, efficient=efficient)
            return across(torch.cat((s.a, s.b)), s.pair.repeat(2))

        return loss

    return {f"DistributedLossWrapper(NTXentLoss(), efficient={on})": wrapped(on) for on in (False, True)}


def stable_pretraining() -> dict[str, Loss]:
    from stable_pretraining.losses import BarlowTwinsLoss, CLIPLoss, NTXEntLoss, VICRegLoss

    return {
        "CLIPLoss()": lambda s: CLIPLoss()(s.a, s.b, logit_scale=1 / s.scale),  # it divides by what it calls scale
        "NTXEntLoss()": lambda s: NTXEntLoss(TEMPERATURE)(s.a, s.b),
        "BarlowTwinsLoss()": lambda s: BarlowTwinsLoss()(s.a, s.b),
        "VICRegLoss()": lambda s: VICRegLoss()(s.a, s.b),
    }


def solo_learn() -> dict[str, Loss]:
    spec = find_spec("solo")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("solo")
    solo = ModuleType("solo")  # in place of its own, which imports all its trainers
    solo.__path__ = list(spec.submodule_search_locations)
    sys.modules["solo"] = solo
    losses = importlib.import_module("solo.losses")
    return {
        "barlow_loss_func": lambda s: losses.barlow_loss_func(s.a, s.b),
        "vicreg_loss_func": lambda s: losses.vicreg_loss_func(s.a, s.b),
    }


PACKAGES: dict[str, Callable[[], dict[str, Loss]]] = {
    "twofold": ours,
    "open_clip_torch": open_clip,
    "lightly": lightly,
    "pytorch-metric-learning": metric_learning,
    "stable-pretraining": stable_pretraining,
    "solo-learn": solo_learn,
}


def losses() -> dict[tuple[str, str], Loss]:
    """Of every package that is installed."""
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], Loss] = {}
    for package, load in PACKAGES.items():
        try:
            found |= {(package, name): loss for name, loss in load().items()}
        except ImportError as error:
            if processes.parent_process() is None:
                print(f"{package} is left out: {error}")
    return found


def gradients(loss: Loss, rank: int, size: int) -> dict[str, Tensor]:
    """Averaged over the processes: of both towers as one vector, of the temperature, of the bias."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(PAIRS, WIDTH, generator=draw)
    y = x + torch.randn(PAIRS, WIDTH, generator=draw)
    towers = [(torch.randn(WIDTH, DIM, generator=draw) / WIDTH**0.5).requires_grad_() for _ in range(2)]
    log_scale = torch.tensor(1 / TEMPERATURE).log().requires_grad_()
    bias = torch.tensor(-3.0, requires_grad=True)
    mine = slice(PAIRS * rank // size, PAIRS * (rank + 1) // size)
    a, b = x[mine] @ towers[0], y[mine] @ towers[1]
    loss(Step(a, b, torch.arange(PAIRS)[mine], log_scale.exp(), bias, rank, size)).backward()
    groups = {"tower": towers, "temperature": [log_scale], "bias": [bias]}
    found = {name: [p.grad.flatten() for p in group if p.grad is not None] for name, group in groups.items()}
    joined = {name: torch.cat(parts) for name, parts in found.items() if parts}
    if size > 1:
        for gradient in joined.values():
            dist.all_reduce(gradient)
            gradient /= size
    return joined


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=SIZE)
    found = {key: gradients(loss, rank, SIZE) for key, loss in losses().items()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def compared(several: Tensor, one: Tensor) -> dict[str, float]:
    several, one = several.double(), one.double()
    norms = several.norm(), one.norm()
    return {
        "ratio": round((norms[0] / norms[1]).item(), 5),
        "cosine": round((several @ one / (norms[0] * norms[1])).item(), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    alone = {key: gradients(loss, 0, 1) for key, loss in losses().items()}
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(one_process, (folder,), nprocs=SIZE)
        together = torch.load(Path(folder) / "found.pt", weights_only=True)
    results: list[dict[str, Any]] = [
        {"package": package, "loss": name}
        | {group: compared(together[package, name][group], one) for group, one in alone[package, name].items()}
        for package, name in alone
    ]
    record = {
        "question": f"gradients of {SIZE} processes, averaged, against one process with the whole batch",
        "machine": f"{platform.system()} {platform.machine()}, gloo",
        "versions": {name: version(name) for name in ("torch", *dict.fromkeys(row["package"] for row in results))},
        "n": {"processes": SIZE, "pairs": PAIRS, "dim": DIM},
        "results": results,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    table = Table("package", "loss", "ratio", "cosine", "temperature", "bias")
    for row in results:
        learned = (f"{row[name]['ratio']:.3f}" if name in row else "" for name in ("temperature", "bias"))
        tower = row["tower"]
        table.add_row(row["package"], row["loss"], f"{tower['ratio']:.3f}", f"{tower['cosine']:.3f}", *learned)
    Console(width=110).print(table)
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
