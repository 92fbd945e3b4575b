"""The engine of the pair losses: tables cut into tiles give what the whole table gives, and are never there at once."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twofold.objectives import clip, dcl, info_nce, nt_xent, siglip, sup_con, tiled
from twofold.objectives.tiled import hardest, log_sum_exp, log_sum_exp_both_ways, softplus_sum


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Every loss as a function of two [n, d] and of one number that learns; `strength` 0.5..2 is a mild temperature.
LOSSES = {
    "nt_xent": lambda a, b, strength: nt_xent(a, b, temperature=0.3 / strength),
    "dcl": lambda a, b, strength: dcl(a, b, temperature=0.3 / strength),
    "sup_con": lambda a, b, strength: sup_con(
        torch.cat((a, b)), torch.arange(2 * len(a)) % 4, temperature=1 / strength
    ),
    "info_nce": lambda a, b, strength: info_nce(a, b, temperature=0.3 / strength),
    "info_nce with negatives": lambda a, b, strength: info_nce(
        a, b, negatives=noise(9, a.shape[1], seed=3).to(a), temperature=0.3 / strength
    ),
    "clip": lambda a, b, strength: clip(a, b, scale=4 * strength),
    "siglip": lambda a, b, strength: siglip(a, b, scale=4 * strength, bias=-2 * strength),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def inputs(n: int = 7, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    strength = torch.tensor(1.2, dtype=dtype)
    return tuple(
        x.requires_grad_() for x in (noise(n, d, seed=1, dtype=dtype), noise(n, d, seed=2, dtype=dtype), strength)
    )


def value_and_gradients(loss, *x: Tensor) -> list[Tensor]:
    value = loss(*x)
    return [value.detach(), *torch.autograd.grad(value, x)]


# The engine against the whole table.


def whole_table(x: Tensor, y: Tensor, skip: tuple[int, ...]) -> Tensor:
    table = (x[:, None] * y).sum(2)
    for i in range(len(x)):
        for j in range(len(y)):
            if j - i in skip:
                table[i, j] = -math.inf
    return table


@pytest.fixture(params=[1, 2, 3, 5, 100], ids=lambda side: f"side {side}")
def side(request, monkeypatch) -> int:
    monkeypatch.setattr(tiled, "_side", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("bound", [30.0, math.inf], ids=["one exponential", "own maxima"])
@pytest.mark.parametrize("skip", [(), (0,), (0, 4, -4), (-2, 3)], ids=str)
def test_sums_equal_those_of_the_whole_table(side, skip, bound):
    x, y = noise(8, 3, seed=1).requires_grad_(), noise(6, 3, seed=2).requires_grad_()
    to_x, to_y = noise(8, seed=3), noise(6, seed=4)

    def weighed(across: Tensor, down: Tensor) -> Tensor:
        return (across * to_x).sum() + (down * to_y).sum()

    table = whole_table(x, y, skip)
    expected = [table.logsumexp(1), table.logsumexp(0)]
    found = log_sum_exp_both_ways(x, y, skip=skip, bound=bound)
    torch.testing.assert_close(list(found), expected)
    torch.testing.assert_close(
        torch.autograd.grad(weighed(*found), (x, y)), torch.autograd.grad(weighed(*expected), (x, y))
    )
    rows = log_sum_exp(x, y, skip=skip, bound=bound)
    torch.testing.assert_close(
        torch.autograd.grad((rows * to_x).sum(), (x, y)),
        torch.autograd.grad((whole_table(x, y, skip).logsumexp(1) * to_x).sum(), (x, y)),
    )
    bias = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        value_and_gradients(lambda *of: softplus_sum(of[0], of[1], bias=of[2], skip=skip, bound=bound), x, y, bias),
        value_and_gradients(lambda *of: (whole_table(of[0], of[1], skip) + of[2]).exp().log1p().sum(), x, y, bias),
    )


@pytest.mark.parametrize("bound", [30.0, math.inf], ids=["one exponential", "own maxima"])
def test_rows_that_meet_each_other_have_the_sums_of_the_whole_table(side, bound):
    x, to_x = noise(8, 3).requires_grad_(), noise(8, seed=3)
    for skip in ((0,), (0, 4, -4)):
        found, expected = log_sum_exp(x, skip=skip, bound=bound), whole_table(x, x, skip).logsumexp(1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad((found * to_x).sum(), x), torch.autograd.grad((expected * to_x).sum(), x)
        )


@every_loss
def test_the_size_of_the_tiles_does_not_matter(loss, side, monkeypatch):
    found = value_and_gradients(loss, *inputs())
    monkeypatch.undo()
    torch.testing.assert_close(found, value_and_gradients(loss, *inputs()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "siglip"])
def test_one_exponential_or_a_maximum_for_each_row_and_column_are_the_same(name, monkeypatch):
    loss = LOSSES[name]
    found = value_and_gradients(loss, *inputs())
    monkeypatch.setattr(tiled, "SAFE", 0.1)
    torch.testing.assert_close(found, value_and_gradients(loss, *inputs()), rtol=1e-12, atol=1e-13)


@every_loss
def test_temperature_scale_and_bias_may_learn(loss, monkeypatch):
    monkeypatch.setattr(tiled, "_side", lambda device: 3)
    assert torch.autograd.gradcheck(loss, inputs(5))


@every_loss
def test_a_number_and_a_tensor_are_the_same_temperature(loss):
    a, b, _ = inputs()
    torch.testing.assert_close(loss(a, b, torch.tensor(1.2).double()), loss(a, b, 1.2))


@every_loss
def test_float32_is_as_exact_as_float32_can_be(loss, monkeypatch):
    monkeypatch.setattr(tiled, "_side", lambda device: 33)
    found = value_and_gradients(loss, *inputs(200, 16, torch.float32))
    reference = value_and_gradients(
        loss, *(x.detach().double().requires_grad_() for x in inputs(200, 16, torch.float32))
    )
    for single, double in zip(found, reference, strict=True):
        assert (single - double).abs().max() <= 2e-6 * double.abs().max()


@every_loss
def test_a_graph_that_is_kept_gives_the_same_gradients_twice(loss):
    a, b, strength = inputs()
    value = loss(a, b, strength)
    first = torch.autograd.grad(value, (a, b, strength), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, (a, b, strength))))


@every_loss
def test_no_gradient_is_made_for_what_needs_none(loss):
    a, b, strength = inputs()
    full = torch.autograd.grad(loss(a, b, strength), (a, strength))
    alone = torch.autograd.grad(loss(a, b.detach(), strength), (a, strength))
    torch.testing.assert_close(alone, full)
    with torch.no_grad():
        assert not loss(a, b, strength).requires_grad


# Numerics.


def test_rows_of_very_different_size_keep_their_own_maximum():
    # Products from -90 000 to 90 000: one shift for all would leave most rows without a term.
    x = (noise(9, 4) * torch.tensor([1e-3, 300.0, 1.0]).double().repeat(3)[:, None]).float().requires_grad_()
    y = noise(11, 4, seed=5).float() * 300
    expected = whole_table(x.double(), y.double(), ()).logsumexp(1)
    found = log_sum_exp(x, y, skip=())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-3)
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()


def test_softplus_of_huge_logits_is_the_logit():
    x = torch.tensor([[100.0, 0.0], [-100.0, 0.0]], requires_grad=True)
    y = torch.tensor([[3.0, 0.0]])
    total = softplus_sum(x, y, bias=torch.tensor(5.0), skip=())
    assert total.item() == pytest.approx(305.0)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], torch.tensor([[3.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("bound", [30.0, math.inf])
def test_nothing_to_sum_is_minus_infinity_and_has_no_gradient(bound):
    x, y = (noise(1, 3, seed=seed).requires_grad_() for seed in (1, 2))
    for found in (log_sum_exp(x, bound=bound), log_sum_exp(x, y, bound=bound), log_sum_exp(x, y[:0], bound=bound)):
        assert found.item() == -math.inf
    assert torch.equal(torch.autograd.grad(log_sum_exp(x, bound=bound).sigmoid().sum(), x)[0], torch.zeros(1, 3))


@every_loss
@pytest.mark.parametrize("n", [2, 3])
def test_tiny_batches_have_finite_gradients(loss, n):
    a, b, strength = inputs(n)
    if loss is LOSSES["sup_con"]:
        a, b = torch.cat((a, a)), torch.cat((b, b))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss(a, b, strength), (a, b, strength)))


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip"])
def test_one_pair_alone_costs_nothing(name):
    a, b, strength = inputs(1)
    loss = LOSSES[name](a, b, strength)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (a, b, strength)))


@every_loss
def test_backward_under_autocast_is_exact_too(loss, monkeypatch):
    monkeypatch.setattr(tiled, "_side", lambda device: 10)
    expected = value_and_gradients(loss, *inputs(32, 16, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(loss, *inputs(32, 16, torch.float32))
    assert all(map(torch.equal, found, expected))


# Memory.


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor) and not x._is_view():
                self.entries = max(self.entries, x.numel())
        return found


@every_loss
def test_no_table_of_all_pairs_is_ever_there(loss, monkeypatch):
    monkeypatch.setattr(tiled, "_side", lambda device: 32)
    a, b, strength = inputs(300, 4, torch.float32)
    with Largest() as largest:
        loss(a, b, strength).backward()
    assert largest.entries <= 600 * 4


@every_loss
@pytest.mark.parametrize("n", [32, 700])
def test_what_waits_for_backward_is_less_than_four_times_the_embeddings(loss, n):
    d, held = 24, {}

    def hold(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    a, b, _ = inputs(n, d, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
        value = loss(a, b, 1.2)
    assert 0 < sum(held.values()) < 4 * (2 * n) * d * 4
    value.backward()


# The hardest rows.


def slow_hardest(z: Tensor, labels: Tensor) -> tuple[list[int], list[int]]:
    positive, negative = [], []
    for i in range(len(z)):
        same = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        other = [j for j in range(len(z)) if labels[j] != labels[i]]
        positive.append(min(same, key=lambda j: z[i].dot(z[j]).item(), default=-1))
        negative.append(max(other, key=lambda j: z[i].dot(z[j]).item(), default=-1))
    return positive, negative


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0, 0, 1], [0] * 8, list(range(8))], ids=["mixed", "one", "all"])
def test_hardest_is_what_the_loop_finds(side, labels):
    z, labels = noise(8, 3), torch.tensor(labels)
    positive, negative = hardest(z, labels)
    assert (positive.tolist(), negative.tolist()) == slow_hardest(z, labels)


def test_hardest_worked_by_hand():
    # On a circle at 0°, 10°, 90° and 180°: of label 0 the rows at 0° and 90°.
    angle = torch.tensor([0.0, 10.0, 90.0, 180.0]).deg2rad()
    positive, negative = hardest(torch.stack((angle.cos(), angle.sin()), 1), torch.tensor([0, 1, 0, 1]))
    assert positive.tolist() == [2, 3, 0, 1]
    assert negative.tolist() == [1, 0, 1, 2]
