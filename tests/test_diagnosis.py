"""Figures of collapse against closed forms, the microscope against autograd, verdicts on runs that were made ill."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from twofold.cli import main
from twofold.data.loader import Batches
from twofold.errors import DataError, TrainingError, UsageError
from twofold.measure.collapse import (
    alpha_req,
    anisotropy,
    axes_holding,
    dead_units,
    health,
    lidar,
    spectrum,
    spread,
)
from twofold.measure.diagnosis import diagnose, examined
from twofold.measure.negatives import microscope, of_bank, of_pairs, of_views
from twofold.methods import METHODS
from twofold.models.encoders import ImageEncoder
from twofold.models.heads import Head
from twofold.objectives import nt_xent, nt_xent_chance
from twofold.train.log import read_log
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR

SIZE = 16


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_known_spectrum_gives_known_figures():
    q, _ = torch.linalg.qr(cloud(64, 16))
    q = torch.linalg.qr(q - q.mean(0))[0]  # orthonormal columns that sum to 0
    k = torch.arange(1, 17).float()
    z = q * k.pow(-1.0)  # eigenvalues k^−2
    torch.testing.assert_close(spectrum(z), k.pow(-2) / k.pow(-2).sum(), rtol=1e-3, atol=1e-6)
    assert alpha_req(z) == pytest.approx(2, abs=1e-3)
    assert axes_holding(spectrum(q)) == 15  # 14.4 equal ones hold 90 %
    assert axes_holding(spectrum(torch.ones(5, 3))) == 0


def test_anisotropy_is_the_mean_cosine_of_different_rows():
    z = cloud(20, 5) + 1
    u = torch.nn.functional.normalize(z, dim=1)
    cosines = (u @ u.T)[~torch.eye(20, dtype=torch.bool)]
    assert anisotropy(z) == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert anisotropy(torch.ones(4, 3)) == pytest.approx(1)
    assert spread(z) ** 2 == pytest.approx(1 - (u.mean(0) ** 2).sum().item(), abs=1e-5)


def test_lidar_counts_the_directions_that_tell_items_apart():
    means = torch.zeros(300, 1, 10)
    means[..., :3] = 5 * cloud(300, 1, 3, seed=1)
    views = means + 0.1 * cloud(300, 4, 10, seed=2)
    assert lidar(views) == pytest.approx(3, abs=0.1)
    turned = views @ torch.linalg.qr(cloud(10, 10, seed=3))[0] * 7
    assert lidar(turned, ridge=1e-4 * 49) == pytest.approx(lidar(views), rel=1e-3)  # of what units does not matter
    with pytest.raises(DataError, match="two or more views"):
        lidar(views[:, :1])


def test_health_of_a_point_and_of_a_sphere():
    point, sphere = health(torch.ones(50, 8)), health(cloud(500, 8))
    assert (point.spread, point.axes, point.dead) == (pytest.approx(0, abs=1e-5), 0, 1)
    assert point.rank == pytest.approx(1, abs=1e-3) and point.norm == pytest.approx(8**0.5)
    assert sphere.rank > 7.9 and sphere.dead == 0 and abs(sphere.anisotropy) < 0.01
    assert [v.name for v in examined(point)] == ["one point", "dead units"]
    assert [v.tone for v in examined(sphere)] == ["good"]
    assert dead_units(torch.tensor([[1.0, 2, 0], [1, 3, 0]])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_shares_of_the_gradient_are_those_of_autograd(temperature):
    z1, z2 = cloud(12, 6), cloud(12, 6, seed=1)
    z = nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T).requires_grad_()
    itself = torch.eye(24, dtype=torch.bool)
    partner = torch.arange(24).roll(12)
    logits = (s / temperature).masked_fill(itself, -math.inf)
    loss = nn.functional.cross_entropy(logits, partner)
    assert loss.item() == pytest.approx(nt_xent(z1, z2, temperature=temperature).item(), abs=1e-5)
    loss.backward()
    gradient = s.grad.clone()
    gradient[torch.arange(24), partner] = 0
    share = gradient / gradient.sum(1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(1)
    same = torch.zeros(12, 12, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True

    seen = of_views(z1, z2, temperature=temperature, same={"told": same})

    assert seen.now.effective == pytest.approx(entropy.exp().mean().item(), rel=1e-4)
    assert seen.now.hardest == pytest.approx(share.max(1).values.mean().item(), rel=1e-4)  # of 22, the hardest one
    assert seen.now.push == pytest.approx((gradient.sum() * temperature).item(), rel=1e-4)
    assert seen.now.suspects == pytest.approx(
        (gradient * same.repeat(2, 2)).sum().item() / gradient.sum().item(), rel=1e-4
    )
    assert (seen.anchors, seen.negatives, seen.suspects) == (24, 22, pytest.approx(8 / (24 * 22)))
    assert sum(seen.positive) == pytest.approx(1) and sum(seen.negative) == pytest.approx(1)
    assert seen.kinds == {"told": (pytest.approx(8 / (24 * 22)), pytest.approx(seen.now.suspects))}
    assert seen.agreement == pytest.approx(s.detach()[torch.arange(24), partner].median().item())
    others = s.detach().masked_fill(itself, -2)
    others[torch.arange(24), partner] = -2
    assert seen.hardness == pytest.approx(others.max(1).values.mean().item(), abs=1e-6)  # of 22, the hardest one


def test_shares_of_siglip_are_those_of_autograd_where_its_bias_is_at_rest():
    a, b = cloud(12, 6), cloud(12, 6) + 0.5 * cloud(12, 6, seed=1)
    seen = of_pairs(a, b, temperature=0.1, loss="sigmoid", same={"told": torch.eye(12).roll(1, 1).bool()})
    s = (nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T).double().requires_grad_()
    sign = 2 * torch.eye(12).double() - 1
    bias = torch.zeros((), dtype=torch.double, requires_grad=True)
    for _ in range(200):  # Newton's method on the convex loss
        loss = -nn.functional.logsigmoid(sign * (s.detach() / 0.1 + bias)).sum()
        (slope,) = torch.autograd.grad(loss, bias, create_graph=True)
        (bend,) = torch.autograd.grad(slope, bias)
        bias = (bias - 0.5 * slope / bend).detach().requires_grad_()
    assert abs(slope.item()) < 1e-6
    (gradient,) = torch.autograd.grad(-nn.functional.logsigmoid(sign * (s / 0.1 + bias)).sum(), s)
    gradient = gradient * (1 - torch.eye(12))
    share = gradient / gradient.sum(1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(1)
    assert seen.now.effective == pytest.approx(entropy.exp().mean().item(), rel=1e-3)
    assert seen.now.push == pytest.approx(gradient.sum(1).mean().item() * 0.1, rel=1e-3)
    told = gradient.roll(-1, 1).diagonal().sum() / gradient.sum()
    assert seen.kinds["told"][1] == pytest.approx(told.item(), rel=1e-3)


def test_a_queue_is_looked_at_as_info_nce_weighs_it():
    q, k, bank = cloud(6, 5), cloud(6, 5, seed=1), cloud(40, 5, seed=2)
    seen = of_bank(q, k, bank, temperature=0.2)
    u, w = (nn.functional.normalize(x, dim=1) for x in (q, bank))
    share = (u @ w.T / 0.2).softmax(1)
    assert seen.negatives == 40 and seen.anchors == 6
    entropy = -(share * share.log()).sum(1)
    assert seen.now.effective == pytest.approx(entropy.exp().mean().item(), rel=1e-4)
    own = torch.zeros(6, 40, dtype=torch.bool)
    own[:, 0] = True
    assert of_bank(q, k, bank, temperature=0.2, excluded=own).negatives == 39


def test_a_lower_temperature_gives_the_gradient_to_fewer_negatives():
    seen = of_views(cloud(64, 32), cloud(64, 32) + 0.3 * cloud(64, 32, seed=1), temperature=0.1)
    effective = [at.effective for at in seen.curve]
    assert effective == sorted(effective)
    assert effective[0] < 5 and effective[-1] > 0.95 * seen.negatives
    low, high = seen.suggested
    assert 0.01 < low < high < 2
    everywhere = of_views(torch.ones(8, 3), torch.ones(8, 3), temperature=0.1)
    assert everywhere.suggested is None and everywhere.now.effective == pytest.approx(14, rel=1e-5)


def test_suspects_are_what_lies_as_near_as_the_positive():
    z = torch.eye(6)
    z[1] = z[0]  # a copy
    seen = of_views(z, z, temperature=0.2, alike=0.95)
    assert seen.suspects == pytest.approx(4 * 2 / (12 * 10))
    assert {frozenset((a % 6, b % 6)) for a, b, _ in seen.suspected} == {frozenset((0, 1))}


def test_the_microscope_refuses_what_it_cannot_look_at():
    eye = torch.eye(3, dtype=torch.bool)
    with pytest.raises(UsageError, match="greater than 0"):
        microscope(torch.zeros(3, 3), eye, temperature=0)
    with pytest.raises(DataError, match="a positive and a negative"):
        microscope(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool), temperature=1)


def log_of(loss, *, chance=None, rank=60.0, spread=0.8, **parts):
    """Twenty lines whose figures go from the first to the second value, or stay."""

    def along(value, t):
        first, last = value if isinstance(value, tuple) else (value, value)
        return first + (last - first) * min(1, 4 * t)

    figures = {"loss": loss, "rank": rank, "spread": spread, **parts}
    lines = [{"step": 1 + 10 * k, **{name: along(v, k / 19) for name, v in figures.items()}} for k in range(20)]
    return [{**line, **({"chance": chance} if chance is not None else {})} for line in lines]


CHANCE = nt_xent_chance(128)
SIMCLR, BYOL = {"method": "SimCLR", "batch": 128, "optimizer": {"lr": 0.001}}, {"method": "BYOL", "batch": 128}


@pytest.mark.parametrize(
    ("log", "record", "name", "advice"),
    [
        (log_of(CHANCE, chance=CHANCE, spread=(0.8, 0.01), rank=1.2), SIMCLR, "collapsed", "learning rate"),
        (log_of(CHANCE, chance=CHANCE), SIMCLR, "stuck at chance", "views"),
        (
            log_of(CHANCE, chance=CHANCE),
            {**SIMCLR, "options": {"temperature": 50.0}},
            "temperature too high",
            "between 0.05 and 0.5",
        ),
        (
            log_of((100.0, 5.0), chance=CHANCE),
            {**SIMCLR, "options": {"temperature": 0.002}},
            "temperature too low",
            "Raise",
        ),
        (log_of((CHANCE, 9.0), chance=CHANCE), SIMCLR, "worse than chance", "Raise the temperature"),
        (log_of((CHANCE, 3.4), chance=CHANCE), SIMCLR, "solved early", "shortcuts"),
        (log_of(4.6, chance=CHANCE), SIMCLR, "views too alike", "shortcuts"),
        (log_of((CHANCE, 4.9), chance=CHANCE, rank=(60.0, 12.0)), SIMCLR, "rank fell", "learning rate"),
        (log_of((3.0, 0.01), rank=(60.0, 20.0)), BYOL, "collapsed", "predictor"),
        (log_of((3.0, 0.01), spread=(0.8, 0.001)), BYOL, "collapsed", "predictor"),
        (log_of((0.0, -0.99), rank=(60.0, 20.0)), {"method": "SimSiam"}, "collapsed", "stop-gradient"),
        (log_of(0.2, chance=0.2), {"method": "Triplet"}, "stuck at chance", "semi-hard"),
        (log_of((0.3, 0.01), target_variance=(1.0, 0.001)), {"method": "IJEPA"}, "constant targets", "--momentum"),
        (
            log_of((8.0, 6.0), chance=8.3, ema_gap=0.1),
            {"method": "MoCo", "steps": 191, "options": {"momentum": 0.999}},
            "target lags",
            "--momentum: 0.948",
        ),
    ],
)
def test_each_signature_has_its_verdict(log, record, name, advice):
    found = {verdict.name: verdict for verdict in diagnose(log, record)}
    assert name in found, found
    assert found[name].tone != "good" and advice in found[name].advice and found[name].evidence


@pytest.mark.parametrize(
    ("log", "record"),
    [
        (log_of((CHANCE, 4.9), chance=CHANCE, rank=(60.0, 40.0)), SIMCLR),
        (log_of((3.1, 1.7), rank=(64.0, 44.0)), BYOL),
        (log_of((0.0, -0.9), rank=(65.0, 39.0)), {"method": "SimSiam"}),
        (log_of((1.0, 0.4), rank=(4.0, 9.0), target_variance=(1.0, 0.6)), {"method": "MAE"}),
        (log_of((3.0, 1.0), chance=5.0, rank=(20.0, 7.0)), {"method": "SupCon"}),
        (
            log_of((8.0, 6.0), chance=8.3, ema_gap=0.1),
            {"method": "MoCo", "steps": 191, "options": {"momentum": 0.99}},
        ),
    ],
)
def test_healthy_courses_raise_no_alarm(log, record):
    assert [verdict.tone for verdict in diagnose(log, record)] == ["good"]


def test_a_short_log_says_so():
    assert [verdict.name for verdict in diagnose(log_of(1.0)[:3], SIMCLR)] == ["too short"]
    assert [verdict.name for verdict in diagnose([], {})] == ["too short"]


def course(name: str, folder, *, lr: float = 3e-3, steps: int = 60, stop: bool = False, **options) -> list[str]:
    """A real training of a small encoder on coloured noise; the names of its verdicts."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    coarse = torch.tensor(draw.integers(0, 256, (128, 3, 4, 4)), dtype=torch.float32)
    pixels = nn.functional.interpolate(coarse, SIZE, mode="bilinear").byte()
    body = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 48)),
    )
    spec = {"size": SIZE, "channels": 3, "how": "crop"}
    encoder = ImageEncoder(body, spec, mean=[0.5] * 3, std=[0.25] * 3)
    policy = replace(SIMCLR_CIFAR, size=SIZE)
    method = METHODS[name](encoder, policies=(policy, policy), **options)
    batches = Batches({"image": pixels, "label": torch.arange(128) % 4}, batch=64, seed=0)
    plain = {key: value for key, value in options.items() if isinstance(value, int | float | str)}
    fit(
        method,
        batches,
        steps=steps,
        out=folder,
        optimizer=Optimizer(lr=lr, warmup=5),
        record={"options": plain},
        log_every=5,
        stop_on_collapse=stop,
        quiet=True,
    )
    return [v.name for v in diagnose(read_log(folder / "log.jsonl"), json.loads((folder / "run.json").read_text()))]


HEAD = Head(2, 64, 32)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("byol", {"head": Head(2, 64, 32, norm="none"), "predictor": Head(0, dim=32), "momentum": 0.0}, {"collapsed"}),
        ("simclr", {"head": HEAD, "temperature": 50.0}, {"temperature too high"}),
        ("simclr", {"head": HEAD, "temperature": 0.002}, {"temperature too low", "worse than chance"}),
    ],
)
def test_a_training_made_to_fail_is_recognised(tmp_path, name, options, expected):
    assert expected & set(course(name, tmp_path, **options))


def test_a_collapse_ends_the_training_where_that_was_asked_for(tmp_path):
    ill = {"head": Head(2, 64, 32, norm="none"), "predictor": Head(0, dim=32), "momentum": 0.0}
    with pytest.raises(TrainingError, match=r"Stopped in step \d+\. .*predictor.* holds no checkpoint"):
        course("byol", tmp_path, stop=True, **ill)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] < 60


@pytest.mark.parametrize("name", ["simclr", "byol", "barlow"])
def test_a_healthy_training_raises_no_alarm(tmp_path, name):
    options = {"predictor": HEAD, "momentum": 0.9, "lr": 1e-3} if name == "byol" else {}
    assert course(name, tmp_path, head=HEAD, **options) == ["learning"]


def test_the_log_begins_with_what_the_untrained_network_gives(tmp_path):
    course("simclr", tmp_path, steps=10, head=HEAD)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 5, 10]
    assert all(0 < line["spread"] < 1 < line["rank"] for line in lines)


def test_the_doctor_looks_at_a_run_and_its_pictures(tmp_path, capsys):
    run = tmp_path / "run"
    small = ["--encoder", "timm:resnet18/4", "--size", "32", "--small-stem", "--head.hidden", "32", "--head.dim", "16"]
    asked = [
        "train",
        "simclr",
        "openmoji",
        "--out",
        str(run),
        *small,
        "--batch",
        "16",
        "--epochs",
        "3",
        "--limit",
        "64",
    ]
    assert main(asked) == 0
    capsys.readouterr()
    assert main(["doctor", str(run), "--data", "openmoji", "--limit", "60", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (side,) = found["sides"]
    assert side["health"]["n"] == 60 and side["head"]["width"] == 16 and side["health"]["lidar"] > 1
    assert found["microscopes"]["batch"]["anchors"] == 120 and found["microscopes"]["corpus"]["negatives"] == 59
    assert found["microscopes"]["batch"]["now"]["temperature"] == 0.5
    assert found["environment"]["torch"] == torch.__version__.split("+")[0]
    page = (run / "doctor.html").read_text()
    assert (
        page.count("<svg") >= 6
        and "data:image/webp;base64" in page
        and "http://" not in page
        and "https://" not in page.rsplit("<footer>", 1)[0]
    )
    assert main(["doctor", str(run), "--out", str(tmp_path / "a.md")]) == 0
    said = capsys.readouterr().out
    assert "learning" in said or "too short" in said
    assert (tmp_path / "a.md").read_text().startswith("# SimCLR — run")


def test_the_doctor_refuses_a_folder_that_holds_no_run(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) != 0
    assert "holds no run" in capsys.readouterr().err
