"""Several processes are one: gradients averaged over W processes, as data-parallel training does, against one process.

    python tests/test_exactness.py      # measures, and writes the figures into docs/exactness.md

Everything runs in float32, as training does. A ratio is ‖gradient of W processes‖ / ‖gradient of one‖.
"""

import inspect
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from twofold import objectives as o
from twofold.methods import METHODS, Method
from twofold.mining import Triplets, batch_hard, distance_weighted, semi_hard
from twofold.models.captioner import captioner
from twofold.models.encoders import ImageEncoder, image_encoder
from twofold.models.heads import Head
from twofold.models.norm import synchronised
from twofold.models.predictor import Blocks
from twofold.objectives.tiled import nearest
from twofold.runtime import gather, generator, share, world
from twofold.views import NONE

ROOT = Path(__file__).parents[1]
PAGE, PEERS = ROOT / "docs" / "exactness.md", ROOT / "benchmarks" / "results" / "exactness.json"
SIZES = (1, 2, 4)
ROWS = {"even": 16, "uneven": 11}  # over four processes 2, 3, 3 and 3
RATIO, COSINE = 1e-5, 1e-6  # how far from 1 they may be


# What is compared: objectives of two embedded views.


class Learned(nn.Module):
    """All that a loss may have a gradient for; the same weights every time."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tower, self.normed, self.target = (
                nn.Sequential(nn.Linear(6, 16), *between, nn.Linear(16, 8))
                for between in ([nn.Tanh()], [nn.BatchNorm1d(16), nn.ReLU()], [nn.Tanh()])
            )
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-1.5))

    def gradients(self) -> dict[str, Tensor]:
        """By what they belong to, each as one vector; what a loss does not have is left out."""
        towers = [p for module in (self.tower, self.normed, self.target) for p in module.parameters()]
        groups = {"tower": towers, "temperature": [self.log_scale], "bias": [self.bias]}
        found = {name: [p.grad.flatten() for p in group if p.grad is not None] for name, group in groups.items()}
        return {name: torch.cat(parts) for name, parts in found.items() if parts}


class Rows(NamedTuple):
    """Of each process, its own share."""

    x1: Tensor
    x2: Tensor
    labels: Tensor


def views(tower: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    return gather(tower(rows.x1)), gather(tower(rows.x2))


def labelled(learned: Learned, rows: Rows) -> tuple[Tensor, Tensor]:
    return torch.cat(views(learned.tower, rows)), gather(rows.labels).repeat(2)


def triplets(mine: Callable[[Tensor, Tensor], Triplets], z: Tensor, labels: Tensor) -> Tensor:
    return o.triplet_margin(*(z[at] for at in mine(z, labels)), margin=0.5)


def crossed(loss: Callable[[Tensor, Tensor], Tensor], learned: Learned, rows: Rows) -> Tensor:
    """Each view against the other's target, as BYOL, SimSiam and MoCo v3 do."""
    q1, q2 = views(learned.tower, rows)
    k1, k2 = (z.detach() for z in views(learned.target, rows))
    return loss(q1, k2) + loss(q2, k1)


def across(a: Tensor, b: Tensor) -> Tensor:
    """Each row of a against the row of b that is nearest to it but its own, and the other way around."""
    of_b, of_a = nearest(*(torch.nn.functional.normalize(z.detach(), dim=1) for z in (a, b)))
    return o.triplet_margin(a, b, b[of_b], margin=0.5) + o.triplet_margin(b, a, a[of_a], margin=0.5)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CASES: dict[str, Callable[[Learned, Rows], Tensor]] = {
    "nt_xent": lambda m, rows: o.nt_xent(*views(m.tower, rows), temperature=0.3),
    "nt_xent behind BatchNorm": lambda m, rows: o.nt_xent(*views(m.normed, rows), temperature=0.3),
    "dcl": lambda m, rows: o.dcl(*views(m.tower, rows), temperature=0.3),
    "sup_con": lambda m, rows: o.sup_con(*labelled(m, rows), temperature=0.3),
    "info_nce": lambda m, rows: o.info_nce(*views(m.tower, rows), temperature=0.2),
    "info_nce, queue": lambda m, rows: o.info_nce(
        *views(m.tower, rows), negatives=noise(32, 8, seed=3), temperature=0.2
    ),
    "info_nce, both ways (MoCo v3)": lambda m, rows: crossed(o.info_nce, m, rows),
    "clip": lambda m, rows: o.clip(*views(m.tower, rows), scale=m.log_scale.exp()),
    "siglip": lambda m, rows: o.siglip(*views(m.tower, rows), scale=m.log_scale.exp(), bias=m.bias),
    "triplet_margin, batch-hard": lambda m, rows: triplets(batch_hard, *labelled(m, rows)),
    "triplet_margin, semi-hard": lambda m, rows: triplets(semi_hard, *labelled(m, rows)),
    "triplet_margin, distance-weighted": lambda m, rows: triplets(
        lambda z, labels: distance_weighted(z, labels, generator(0)), *labelled(m, rows)
    ),
    "triplet_margin, nearest of the other side (VSE++)": lambda m, rows: across(*views(m.tower, rows)),
    "triplet_batch_all": lambda m, rows: o.triplet_batch_all(*labelled(m, rows), margin=0.5),
    "cosine_regression (BYOL)": lambda m, rows: crossed(o.cosine_regression, m, rows),
    "negative_cosine (SimSiam)": lambda m, rows: crossed(o.negative_cosine, m, rows),
    "barlow_twins": lambda m, rows: o.barlow_twins(*views(m.tower, rows)),
    "vicreg": lambda m, rows: o.vicreg(*views(m.tower, rows)).loss,
    "sigreg": lambda m, rows: o.sigreg(views(m.tower, rows)[0], noise(16, 8, seed=4)),
    "lejepa": lambda m, rows: o.lejepa(torch.stack(views(m.tower, rows)), noise(16, 8, seed=4)).loss,
}


def averaged(gradient: Tensor) -> Tensor:
    """Over the processes, as data-parallel training does."""
    if world()[1] > 1:
        torch.distributed.all_reduce(gradient)
    return gradient / world()[1]


def objective(name: str, rows: int) -> dict[str, Tensor]:
    learned, mine = Learned(), share(rows)
    x1, x2 = noise(rows, 6, seed=1), noise(rows, 6, seed=2)
    with synchronised(learned):
        CASES[name](learned, Rows(x1[mine], (x1 + x2)[mine], torch.arange(rows)[mine] % 4)).backward()
    return {group: averaged(gradient) for group, gradient in learned.gradients().items()}


# What is compared: whole methods, views and all.

STEPS, PICTURES, SIDE = 3, 11, 16
OPTIONS: dict[str, dict[str, Any]] = {  # beside small heads
    "moco": {"queue": 48, "momentum": 0.9, "shuffle": False},
    "vjepa, the future": {"frames": 4, "future": 0.5},
    "moco, shuffled keys, no BatchNorm": {"queue": 48, "momentum": 0.9},
    "lejepa": {"directions": 32},
    "vjepa": {"frames": 4},
}
IMAGES = [name for name, method in METHODS.items() if "text" not in method.needs]
WHOLE = [*IMAGES, "coca", *(name for name in OPTIONS if name not in METHODS)]


def read_by_all(ids: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def small(name: str) -> Method:
    """A method with its own policies on a network of two convolutions, and heads of its own shape but 16 wide.

    What masks patches is on a transformer of two blocks.
    """
    kind = METHODS[name.partition(",")[0]]
    defaults = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    heads = {key: replace(head, hidden=16, dim=8) for key, head in defaults.items() if isinstance(head, Head)}
    blocks = {key: Blocks(2, 32, 2) for key, shape in defaults.items() if isinstance(shape, Blocks)}
    policies = tuple(replace(policy, size=SIDE) for policy in defaults.get("policies", ()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "coca":
            picture = image_encoder("timm:vit_tiny_patch16_224/4x64x1", size=SIDE)
            seen = {"image": replace(NONE, size=SIDE), "text": read_by_all}
            return kind(captioner("coca:tiny", picture, ["one", "two"]), views=seen)
        if blocks:
            encoder = image_encoder("timm:vit_tiny_patch16_224/2x32x2", size=SIDE)
            return kind(encoder, policies=policies, **blocks, **OPTIONS.get(name, {}))
        layers: list[nn.Module] = []
        for before, after in ((3, 8), (8, 16)):
            norm = nn.Identity() if "no BatchNorm" in name else nn.BatchNorm2d(after)
            layers += [nn.Conv2d(before, after, 3, stride=2, bias=False), norm, nn.ReLU()]
        body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder = ImageEncoder(body, {"size": SIDE, "channels": 3, "how": "crop"}, mean=(0.5,) * 3, std=(0.25,) * 3)
        return kind(encoder, policies=policies, **heads, **OPTIONS.get(name, {}))


def trained(name: str) -> dict[str, Tensor]:
    """The gradient of the first of three steps, and all that the method holds after them."""
    method = small(name).train()
    learning = [p for p in method.parameters() if p.requires_grad]
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        pictures = torch.randint(256, (PICTURES, 3, 24, 24), generator=generator(step), dtype=torch.uint8)
        columns = {"image": pictures, "video": torch.stack((pictures, pictures.flip(-1)) * 2, 1)}
        columns["label"] = torch.arange(PICTURES) % 3
        lengths = 2 + torch.arange(PICTURES)[:, None] % 4  # so that no process has as many words as another
        columns["text"] = (torch.arange(2, 8) + columns["label"][:, None]) * (torch.arange(6) < lengths)
        batch = {name: column[share(PICTURES)] for name, column in columns.items()}
        with synchronised(method) if method.sync_batchnorm else nullcontext():
            method(batch, generator("views", step)).loss.backward()
        gradient = averaged(torch.cat([p.grad.flatten() for p in learning]))
        found.setdefault("gradient", gradient.clone())
        with torch.no_grad():
            for p, part in zip(learning, gradient.split([p.numel() for p in learning]), strict=True):
                p -= 0.05 * part.view_as(p)
                p.grad = None
        method.after_step((step + 1) / STEPS)
    return found | method.state_dict()


# Four processes, started once, for all of it.


def measured() -> dict[str, dict[str, Tensor]]:
    """What this world computes: gradients of every objective, and of every method where there are one or two of us."""
    found = {f"{name}/{kind}": objective(name, rows) for name in CASES for kind, rows in ROWS.items()}
    return found | ({name: trained(name) for name in WHOLE} if world()[1] <= 2 else {})


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for size in (size for size in SIZES if rank < size):
        torch.distributed.init_process_group("gloo", f"file://{folder}/{size}", rank=rank, world_size=size)
        found = measured()
        if rank == 0:
            torch.save(found, f"{folder}/{size}.pt")
        torch.distributed.destroy_process_group()


Measured = dict[int, dict[str, dict[str, Tensor]]]  # by the number of processes; 0 is a process without a group


def run(folder: Path) -> Measured:
    processes.get_context("forkserver").set_forkserver_preload(["twofold.methods"])  # one import of torch, not four
    processes.start_processes(one_process, (str(folder),), nprocs=max(SIZES), start_method="forkserver")
    return {0: measured()} | {size: torch.load(folder / f"{size}.pt", weights_only=True) for size in SIZES}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Measured:
    return run(tmp_path_factory.mktemp("exactness"))


class Deviation(NamedTuple):
    """|ratio − 1| of two gradients' norms, and 1 − their cosine."""

    ratio: float
    cosine: float


def deviation(several: Tensor, one: Tensor) -> Deviation:
    several, one = several.double(), one.double()
    ratio = several.norm() / one.norm()
    return Deviation(abs(ratio.item() - 1), 1 - (several @ one / (several.norm() * one.norm())).item())


def deviations(ran: Measured, name: str, size: int) -> dict[str, Deviation]:
    """By what the gradient belongs to, the larger of both batches'."""
    found: dict[str, Deviation] = {}
    for key in [f"{name}/{kind}" for kind in ROWS]:
        assert ran[size][key].keys() == ran[0][key].keys()
        for group, one in ran[0][key].items():
            worst = zip(found.get(group, (0, 0)), deviation(ran[size][key][group], one), strict=True)
            found[group] = Deviation(*map(max, worst))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_an_objectives_gradients_are_those_of_one_process(ran, name, size):
    for ratio, cosine in deviations(ran, name, size).values():
        assert ratio < RATIO
        assert cosine < COSINE


@pytest.mark.parametrize("name", WHOLE)
def test_a_method_trains_as_in_one_process(ran, name):
    several, one = ran[2][name], ran[0][name]
    ratio, cosine = deviation(several["gradient"], one["gradient"])
    assert ratio < RATIO
    assert cosine < COSINE
    assert several.keys() == one.keys()
    for key in one:  # weights, averages of weights, BatchNorm's statistics, the queue
        # Of the largest entry: in float32 a sum is as inexact as its terms, however little is left of them.
        allowed = max(1e-5, 1e-4 * one[key].abs().max().item())
        torch.testing.assert_close(several[key], one[key], rtol=0, atol=allowed, msg=lambda text, key=key: key + text)


def test_what_learns_a_temperature_or_a_bias_has_its_gradient_compared(ran):
    learned = {name: set(deviations(ran, name, 2)) - {"tower"} for name in CASES}
    assert {name: groups for name, groups in learned.items() if groups} == {
        "clip": {"temperature"},
        "siglip": {"temperature", "bias"},
    }


# The page: its tables are of what ran, and of what the peers' benchmark measured.


def bound(*values: float) -> str:
    """The power of ten that all values are below: what another machine will find too."""
    return next(f"< 1e-{digit}" for digit in (6, 5, 4, 3, 2, 1, 0) if max(values) < 10**-digit)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def objectives_table(ran: Measured) -> str:
    rows = []
    for name in CASES:
        found = [deviations(ran, name, size) for size in SIZES]
        for group in found[0]:
            rows.append([f"`{name}`", group, *(bound(*each[group]) for each in found)])
    return table(["objective", "gradient of", *(f"W = {size}" for size in SIZES)], rows)


def methods_table(ran: Measured) -> str:
    rows = [[name, bound(*deviation(ran[2][name]["gradient"], ran[0][name]["gradient"]))] for name in WHOLE]
    return table(["method", "W = 2"], rows)


def peers_table(record: Mapping[str, Any]) -> str:
    rows = [
        [row["package"], f"`{row['loss']}`", f"{row['tower']['ratio']:.3f}", f"{row['tower']['cosine']:.3f}"]
        + [f"{row[learned]['ratio']:.3f}" if learned in row else "–" for learned in ("temperature", "bias")]
        for row in record["results"]
    ]
    return table(["package", "loss", "ratio", "cosine", "temperature's ratio", "bias's ratio"], rows)


def block(name: str) -> re.Pattern[str]:
    """What stands between <!-- name --> and <!-- end -->."""
    return re.compile(rf"(?<=<!-- {name} -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


def written(name: str) -> str:
    return block(name).findall(PAGE.read_text())[0]


def structure(text: str) -> list[str]:
    """A table without its figures, and without figures above what the tests allow."""
    assert all(int(digit) >= 5 for digit in re.findall(r"< 1e-(\d)", text))
    return re.sub(r"< 1e-\d", "·", text).splitlines()


def test_the_page_names_every_objective_and_method_that_ran(ran):
    assert structure(written("objectives")) == structure(objectives_table(ran))
    assert structure(written("methods")) == structure(methods_table(ran))


def test_the_page_shows_the_peers_as_they_were_measured():
    assert written("peers") == peers_table(json.loads(PEERS.read_text()))


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ran = run(Path(folder))
    page = PAGE.read_text()
    for name, text in (
        ("objectives", objectives_table(ran)),
        ("methods", methods_table(ran)),
        ("peers", peers_table(json.loads(PEERS.read_text()))),
    ):
        page = block(name).sub(text, page)
    PAGE.write_text(page)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
