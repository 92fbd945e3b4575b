"""Optimisers against their formulas."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from twofold.errors import UsageError
from twofold.train.optim import LARS, Optimizer, warmup_cosine


def test_warmup_rises_evenly_to_the_peak_and_the_cosine_falls_to_zero():
    rates = [warmup_cosine(step, steps=20, warmup=4) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    assert warmup_cosine(20, steps=20, warmup=4) == pytest.approx(0)


def test_lars_is_its_formula():
    torch.manual_seed(0)
    matrix, bias = (
        nn.Parameter(torch.randn(3, 4, dtype=torch.float64)),
        nn.Parameter(torch.randn(4, dtype=torch.float64)),
    )
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0, "adapt": False}]
    optimizer = LARS(groups, lr=0.5, momentum=0.9)
    p, b = matrix.detach().clone(), bias.detach().clone()
    mu_p, mu_b = torch.zeros_like(p), torch.zeros_like(b)
    for step in range(3):
        gp, gb = torch.randn_like(p), torch.randn_like(b)
        matrix.grad, bias.grad = gp.clone(), gb.clone()
        optimizer.step()
        g = gp + 0.1 * p
        mu_p = 0.9 * mu_p + 1e-3 * p.norm() / g.norm() * g
        mu_b = 0.9 * mu_b + gb
        p, b = p - 0.5 * mu_p, b - 0.5 * mu_b
        torch.testing.assert_close(matrix.detach(), p, msg=f"step {step}")
        torch.testing.assert_close(bias.detach(), b)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_takes_a_plain_step_where_a_norm_is_zero(zero):
    p = nn.Parameter(torch.zeros(2, 2) if zero == "weight" else torch.ones(2, 2))
    p.grad = torch.zeros(2, 2) if zero == "gradient" else torch.ones(2, 2)
    LARS([p], lr=0.1).step()
    assert p.isfinite().all()
    assert torch.equal(p.detach(), torch.full((2, 2), -0.1) if zero == "weight" else torch.ones(2, 2))


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_biases_norms_and_temperatures_never_decay(name):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module.temperature = nn.Parameter(torch.tensor(2.0))
    optimizer = Optimizer(name=name, lr=0.1, weight_decay=0.5).build(module)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: decays[id(p)] for key, p in module.named_parameters()} == {
        "temperature": 0.0,
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_weight_decay_goes_from_first_to_last_where_there_is_any(name):
    chosen = Optimizer(name=name, lr=0.1, weight_decay=0.04, final_weight_decay=0.4)
    optimizer = chosen.build(nn.Linear(2, 2))
    seen = []
    for step in range(8):
        assert chosen.schedule(optimizer, step, steps=8) == optimizer.param_groups[0]["lr"]
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert [biases for _, biases in seen] == [0.0] * 8
    decay = [weights for weights, _ in seen]
    assert decay[0] == pytest.approx(0.04)
    assert decay[4] == pytest.approx(0.22)
    assert all(a < b for a, b in pairwise(decay))
    assert decay[-1] < 0.4


def test_weight_decay_stays_as_it_is_unless_told_where_to_go():
    chosen = Optimizer(weight_decay=0.05)
    optimizer = chosen.build(nn.Linear(2, 2))
    for step in range(5):
        chosen.schedule(optimizer, step, steps=5)
        assert optimizer.param_groups[0]["weight_decay"] == 0.05


def test_what_is_frozen_is_not_optimised():
    module = nn.Linear(3, 3)
    module.bias.requires_grad_(False)
    groups = Optimizer().build(module).param_groups
    assert sum(len(group["params"]) for group in groups) == 1


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_parts_of_a_method_have_rates_of_their_own_and_the_longest_start_wins(name):
    module = nn.ModuleDict({"image": nn.Linear(2, 2), "text": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    chosen = Optimizer(name=name, lr=0.1, warmup=3, factors={"text.": 0.01, "text.1.": 0.0})
    optimizer = chosen.build(module)
    for step in range(6):
        rate = chosen.schedule(optimizer, step, steps=6)
        rates = {id(p): group["lr"] / rate for group in optimizer.param_groups for p in group["params"]}
        wanted = {"image": 1.0, "text.0": 0.01, "text.1": 0.0}
        assert all(
            rates[id(p)] == pytest.approx(wanted[key.rpartition(".")[0]]) for key, p in module.named_parameters()
        )
    for group in optimizer.param_groups:
        assert all((p.ndim < 2) == (group["weight_decay"] == 0) for p in group["params"])
    with pytest.raises(UsageError, match="starts with 'sound'"):
        Optimizer(factors={"sound": 0.1}).build(module)
    with pytest.raises(UsageError, match="must not be negative"):
        Optimizer(factors={"text": -0.1})


def test_unknown_optimizers_and_impossible_rates_are_refused():
    with pytest.raises(UsageError, match="adam"):
        Optimizer(name="adam")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0"):
        Optimizer(lr=0)
    with pytest.raises(UsageError):
        Optimizer(lr=math.nan)
    with pytest.raises(UsageError, match="final_weight_decay"):
        Optimizer(final_weight_decay=-0.1)
