"""The methods with a second network, or the same one twice: MoCo, MoCo v3, BYOL, SimSiam, and what they are made of."""

import math
from collections import deque
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor, nn

from twofold import runtime
from twofold.errors import UsageError
from twofold.measure.collapse import spread
from twofold.methods import BYOL, Method, MoCo, MoCoV3, SimSiam
from twofold.models.ema import Ema, rising
from twofold.models.heads import Head
from twofold.models.queue import Queue
from twofold.objectives import cosine_regression, negative_cosine
from twofold.views import NONE, Policy

SIZE, QUEUE = 4, 24
SAME = replace(NONE, size=SIZE)  # both views are the picture itself
OTHER = Policy(size=SIZE, area=(0.4, 1.0), jitter=0.0, gray=0.0, blur=0.0)
PLAIN = Head(2, 16, 8, norm="none")
METHODS: dict[str, tuple[type[Method], dict]] = {
    "moco": (MoCo, {"head": PLAIN, "queue": QUEUE}),
    "mocov3": (MoCoV3, {"head": PLAIN, "predictor": PLAIN, "temperature": 0.5}),
    "byol": (BYOL, {"head": PLAIN, "predictor": PLAIN}),
    "simsiam": (SimSiam, {"head": PLAIN, "predictor": PLAIN}),
}
every_method = pytest.mark.parametrize("name", METHODS)


class Linear(nn.Module):
    """An encoder of one map, with or without BatchNorm behind it."""

    dim = 12

    def __init__(self, norm: bool = False):
        super().__init__()
        self.map = nn.Linear(3 * SIZE * SIZE, self.dim)
        self.norm = nn.BatchNorm1d(self.dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.map((x - 0.5).flatten(1).to(self.map.weight.dtype)))


def make(name: str, *, norm: bool = False, policy: Policy = OTHER, **options) -> Method:
    torch.manual_seed(0)
    kind, defaults = METHODS[name]
    return kind(Linear(norm), policies=(policy, policy), **defaults | options).double()


def pictures(n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=draw)}


def step(method: Method, at: int, *, steps: int = 10, n: int = 6) -> Tensor:
    """One step of gradient descent on pictures that are new in each."""
    loss = method(pictures(n, seed=at), runtime.generator(at)).loss
    learning = [p for p in method.parameters() if p.requires_grad]
    for p, gradient in zip(learning, torch.autograd.grad(loss, learning), strict=True):
        p.data -= 0.1 * gradient
    method.after_step((at + 1) / steps)
    return loss.detach()


def two_views(method: Method, at: int = 0) -> list[Tensor]:
    """What `forward` draws from the same generator."""
    draw = runtime.generator(at)
    return [policy(pictures(seed=at)["image"], draw) for policy in method.policies]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x.dot(y) / (x.dot(x).sqrt() * y.dot(y).sqrt())


# The regressions.

REGRESSIONS = {"negative_cosine": negative_cosine, "cosine_regression": cosine_regression}
every_regression = pytest.mark.parametrize("loss", REGRESSIONS.values(), ids=REGRESSIONS)


def test_a_prediction_at_the_cosine_0_6_costs_minus_0_6_and_0_8():
    p, z = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [4.0, 3.0]])  # cosines 0.6 and 0.6
    assert negative_cosine(p, z).item() == pytest.approx(-0.6)
    assert cosine_regression(p, z).item() == pytest.approx(0.8)


def test_the_regression_is_the_squared_distance_of_unit_vectors():
    p, z = noise(5, 4, seed=1).requires_grad_(), noise(5, 4, seed=2).requires_grad_()
    slow = sum(sum((a / a.norm() - b / b.norm()) ** 2) for a, b in zip(p, z, strict=True)) / 5
    fast = cosine_regression(p, z)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(fast, [p, z]), torch.autograd.grad(slow, [p, z]))


@every_regression
def test_gradients_agree_with_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, (noise(4, 3, seed=1).requires_grad_(), noise(4, 3, seed=2).requires_grad_()))


@every_regression
def test_neither_length_nor_order_matter_and_half_precision_is_compared_in_float32(loss):
    p, z = noise(6, 4, seed=1), noise(6, 4, seed=2)
    lengths, order = torch.logspace(-3, 6, 6, dtype=torch.float64)[:, None], torch.randperm(6)
    torch.testing.assert_close(loss(p * lengths, z / lengths), loss(p, z))
    torch.testing.assert_close(loss(p[order], z[order]), loss(p, z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(p.bfloat16(), z.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, loss(p.bfloat16().float(), z.bfloat16().float()))


def test_their_ends_are_perfect_and_opposite_and_the_middle_is_unrelated():
    p, unrelated = noise(2000, 200, seed=1), noise(2000, 200, seed=2)
    for z, expected in ((p, -1), (-p, 1), (unrelated, 0)):
        assert negative_cosine(p, z).item() == pytest.approx(expected, abs=0.01)
        assert cosine_regression(p, z).item() == pytest.approx(2 + 2 * expected, abs=0.02)


def test_a_collapse_looks_perfect_to_them_and_only_the_spread_tells():
    point = torch.ones(8, 3)
    assert negative_cosine(point, point).item() == pytest.approx(-1)
    assert cosine_regression(point, point).item() == pytest.approx(0, abs=1e-6)
    assert spread(point) == pytest.approx(0, abs=1e-3) and spread(noise(8, 3)) > 0.5


@every_regression
def test_shapes_that_do_not_match_are_both_named(loss):
    with pytest.raises(ValueError, match=r"\(4, 8\) and \(4, 6\)"):
        loss(torch.zeros(4, 8), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="n ≥ 1"):
        loss(torch.zeros(0, 4), torch.zeros(0, 4))


# The moving average.


def test_the_average_is_the_recursion_by_hand():
    online = nn.Linear(3, 2).double()
    ema = Ema(online)
    expected = online.weight.detach().clone()
    for t in range(5):
        online.weight.data = noise(2, 3, seed=t)
        ema.update(online, 0.9)
        expected = 0.9 * expected + 0.1 * noise(2, 3, seed=t)
    torch.testing.assert_close(ema.copy.weight.detach(), expected, rtol=1e-12, atol=0)


def test_momentum_1_leaves_the_copy_alone_and_momentum_0_takes_everything_over():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = Ema(first)
    ema.update(second, 1.0)
    assert torch.equal(ema.copy.weight, first.weight)
    ema.update(second, 0.0)
    assert torch.equal(ema.copy.weight, second.weight) and torch.equal(ema.copy.bias, second.bias)


def test_batchnorm_has_its_scale_averaged_and_keeps_its_own_statistics():
    online = nn.BatchNorm1d(2)
    ema = Ema(online)
    ema(torch.tensor([[0.0, 2.0], [2.0, 6.0]]))  # means 1 and 4, of which a tenth is taken
    online(torch.full((2, 2), 100.0) * torch.tensor([[1.0], [3.0]]))
    online.weight.data.fill_(3.0)
    ema.update(online, 0.5)
    assert ema.copy.weight.tolist() == [2.0, 2.0]
    torch.testing.assert_close(ema.copy.running_mean, torch.tensor([0.1, 0.4]))
    assert ema.copy.num_batches_tracked == 1


def test_the_copy_never_learns_and_follows_the_mode_of_its_owner():
    ema = Ema(nn.BatchNorm1d(2))
    assert not any(p.requires_grad for p in ema.parameters())
    assert ema.eval().copy.training is False and ema.train().copy.training is True


def test_the_momentum_rises_from_its_base_by_half_a_cosine():
    assert rising(0.996, 0.0) == pytest.approx(0.996, abs=1e-15)
    assert rising(0.996, 0.5) == pytest.approx(0.998, abs=1e-15)
    assert rising(0.996, 1.0) == 1.0
    assert rising(0.9, 1 / 3) == pytest.approx(1 - 0.1 * 0.75)  # cos 60° = ½


# The queue.


def test_the_queue_forgets_the_oldest_first_and_goes_round_at_any_batch_size():
    queue = Queue(5, 3).double()
    expected = deque(queue.keys.clone(), maxlen=5)
    for t, n in enumerate((2, 2, 3, 5, 1, 4)):
        rows = noise(n, 3, seed=t)
        queue.push(rows)
        expected.extend(rows / rows.norm(dim=1, keepdim=True))
        oldest_first = queue.keys.roll(-int(queue.pointer), 0)
        torch.testing.assert_close(oldest_first, torch.stack(list(expected)))


def test_the_queue_starts_as_random_directions_of_the_weights_seed():
    def start(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Queue(500, 16).keys

    torch.testing.assert_close(start(0).norm(dim=1), torch.ones(500))
    assert start(0).mean(0).norm() < 0.1  # about 1/√500
    assert torch.equal(start(0), start(0)) and not torch.equal(start(0), start(1))


def test_a_batch_longer_than_the_queue_is_refused():
    with pytest.raises(UsageError, match=r"queue of 5 cannot take the 6 keys.*Make it 6 or longer"):
        Queue(5, 3).push(torch.randn(6, 3))
    with pytest.raises(UsageError, match="at least one key"):
        Queue(0, 3)


# MoCo.


def test_aligned_views_cost_almost_nothing_and_not_ln_2():
    moco = make("moco", policy=SAME, head=Head(2, 64, 128, norm="none"), queue=64, temperature=0.07)
    losses = [moco(pictures(8, seed=t), runtime.generator(t)).loss.item() for t in range(3)]
    assert max(losses) < 0.006


def test_a_positive_enters_the_queue_after_its_loss():
    moco = make("moco")
    for t in range(6):
        moco(pictures(seed=t), runtime.generator(t))
        keys = nn.functional.normalize(moco.fresh, dim=1)
        assert (keys @ moco.queue.keys.T).max() < 1 - 1e-6
        moco.after_step(0.0)
        torch.testing.assert_close((keys @ moco.queue.keys.T).max(dim=1).values, torch.ones(6).double())


def test_forward_leaves_the_queue_alone():
    moco = make("moco").eval()
    before = deepcopy(moco.state_dict())
    losses = [moco(pictures(), runtime.generator(0)).loss for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    assert all(torch.equal(before[key], value) for key, value in moco.state_dict().items())


def test_mocos_loss_and_gradients_are_those_of_a_slow_loop_at_every_step():
    moco = make("moco", momentum=0.5)
    for t in range(5):  # the queue goes round in four
        x_q, x_k = two_views(moco, t)
        with torch.no_grad():
            keys, old = moco.target(x_k), moco.queue.keys.clone()
        slow = torch.zeros((), dtype=torch.float64)
        for q, k in zip(moco.head(moco.encoder(x_q)), keys, strict=True):
            logits = torch.stack([cosine(q, k), *(cosine(q, other) for other in old)]) / 0.2
            slow = slow - (logits[0] - logits.exp().sum().log()) / len(keys)
        learning = [*moco.encoder.parameters(), *moco.head.parameters()]
        expected = torch.autograd.grad(slow, learning)
        loss = moco(pictures(seed=t), runtime.generator(t)).loss
        torch.testing.assert_close(loss, slow, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, learning, retain_graph=True), expected)
        step(moco, t)


def test_the_key_encoder_moves_as_if_it_moved_at_the_head_of_each_step():
    moco = make("moco", momentum=0.9)
    weight = moco.encoder.map.weight
    paper = weight.detach().clone()
    for t in range(4):
        paper = 0.9 * paper + 0.1 * weight.detach()  # before this step's keys, from the weights of the last step
        torch.testing.assert_close(moco.target.copy[0].map.weight.detach(), paper, rtol=1e-12, atol=1e-14)
        step(moco, t)
    assert not torch.allclose(paper, weight)


def test_version_1_is_a_matter_of_parameters():
    moco = MoCo(Linear(), head=Head(1, 1, 128), temperature=0.07, queue=8)
    assert [type(layer) for layer in moco.head] == [nn.Linear] and moco.queue.keys.shape == (8, 128)


def test_batchnorm_is_synchronised_unless_the_keys_are_shuffled():
    assert not make("moco").sync_batchnorm
    assert make("moco", shuffle=False).sync_batchnorm
    assert all(make(name).sync_batchnorm for name in ("mocov3", "byol", "simsiam"))


# MoCo v3.


def test_mocov3_finds_each_views_key_and_counts_both_directions():
    method = make("mocov3")
    x1, x2 = two_views(method)
    q = [method.predictor(method.head(method.encoder(x))) for x in (x1, x2)]
    k = [method.target(x) for x in (x1, x2)]
    slow = 0.0
    for queries, keys in ((q[0], k[1]), (q[1], k[0])):
        for i in range(6):
            logits = torch.stack([cosine(queries[i], key) for key in keys]) / 0.5
            slow = slow - 2 * 0.5 * (logits[i] - logits.exp().sum().log()) / 6
    torch.testing.assert_close(method(pictures(), runtime.generator(0)).loss, slow)


def test_keys_in_one_point_score_the_chance_level():
    for method, chance in ((make("moco"), math.log(1 + QUEUE)), (make("mocov3"), 4 * 0.5 * math.log(6))):
        method.target.copy[1][-1].weight.data.zero_()  # what is left is the bias, whatever the picture
        if isinstance(method, MoCo):
            method.queue.push(method.target.copy[1][-1].bias.expand(QUEUE, -1))
        out = method(pictures(), runtime.generator(0))
        assert out.loss.item() == pytest.approx(out.chance) == chance


# BYOL.


def test_byols_target_starts_with_a_projector_of_its_own_and_the_encoders_weights():
    byol = make("byol")
    encoder, head = byol.target.copy
    assert torch.equal(encoder.map.weight, byol.encoder.map.weight)
    for own, other in zip(head.parameters(), byol.head.parameters(), strict=True):
        assert not torch.equal(own, other)


def test_byol_predicts_each_view_from_the_other():
    byol = make("byol")
    x1, x2 = two_views(byol)
    p = [byol.predictor(byol.head(byol.encoder(x))) for x in (x1, x2)]
    z = [byol.target(x) for x in (x1, x2)]
    slow = sum(4 - 2 * cosine(p[0][i], z[1][i]) - 2 * cosine(p[1][i], z[0][i]) for i in range(6)) / 6
    out = byol(pictures(), runtime.generator(0))
    torch.testing.assert_close(out.loss, slow)
    assert 0 <= out.loss <= 8 and math.isnan(out.chance)


def test_the_target_follows_with_the_momentum_of_the_step():
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        byol = make("byol", momentum=0.9)
        before = byol.target.copy[1][0].weight.clone()
        byol.after_step(progress)
        expected = momentum * before + (1 - momentum) * byol.head[0].weight
        torch.testing.assert_close(byol.target.copy[1][0].weight, expected.detach(), rtol=1e-12, atol=1e-14)


# SimSiam.


def test_simsiams_gradient_is_that_of_targets_which_are_constants():
    method = make("simsiam")
    x1, x2 = two_views(method)
    learning = list(method.parameters())

    def gradient(stop: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = [method.head(method.encoder(x)) for x in (x1, x2)]
        p = [method.predictor(each) for each in z]
        if stop:
            z = [each.detach() for each in z]
        loss = -sum(cosine(p[0][i], z[1][i]) + cosine(p[1][i], z[0][i]) for i in range(6)) / 12
        return loss.detach(), torch.autograd.grad(loss, learning)

    out = method(pictures(), runtime.generator(0))
    found = torch.autograd.grad(out.loss, learning)
    value, expected = gradient(stop=True)
    torch.testing.assert_close(out.loss.detach(), value)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[0], gradient(stop=False)[1][0])
    assert -1 <= out.loss <= 1 and math.isnan(out.chance)


# All of them.


@every_method
def test_gradients_flow_through_the_online_network_alone(name):
    method = make(name)
    method(pictures(), runtime.generator(0)).loss.backward()
    for key, p in method.named_parameters():
        assert (p.grad is None) == key.startswith("target."), key


@every_method
def test_the_state_holds_all_that_the_next_step_depends_on(name):
    first, second = make(name, norm=True), make(name, norm=True)
    for t in range(3):
        step(first, t)
    second.load_state_dict(deepcopy(first.state_dict()))
    for t in range(3, 6):
        assert torch.equal(step(first, t), step(second, t))
    one, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    if name != "simsiam":
        assert "target.copy.0.norm.running_mean" in one
    if name == "moco":
        assert {"queue.keys", "queue.pointer"} <= one.keys()


@pytest.mark.parametrize("name", ["moco", "mocov3", "byol"])
def test_the_target_keeps_statistics_of_its_own_views(name):
    method = make(name, norm=True)
    for t in range(3):
        step(method, t)
    assert not torch.allclose(method.target.copy[0].norm.running_mean, method.encoder.norm.running_mean, rtol=1e-6)


@pytest.mark.parametrize("name", ["mocov3", "byol", "simsiam"])
def test_batchnorm_sees_one_view_at_a_time(name):
    method = make(name, norm=True)
    for x in two_views(method):
        method.encoder(x)
    expected = method.encoder.norm.running_mean.clone()
    method = make(name, norm=True)
    method(pictures(), runtime.generator(0))
    torch.testing.assert_close(method.encoder.norm.running_mean, expected)


@pytest.mark.parametrize("name", ["moco", "mocov3", "byol"])
@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_a_momentum_outside_0_to_1_is_refused(name, momentum):
    with pytest.raises(UsageError, match="momentum"):
        make(name, momentum=momentum)


@pytest.mark.parametrize("name", ["moco", "mocov3"])
@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(name, temperature):
    with pytest.raises(UsageError, match="temperature"):
        make(name, temperature=temperature)


# Several processes, with rows that do not divide evenly.

VARIANTS = {**{name: (name, {}) for name in METHODS}, "moco without shuffling": ("moco", {"shuffle": False})}
ROWS = 7


def states() -> dict[str, Tensor]:
    """State and loss of each variant after three steps, gradients averaged over processes."""
    found = {}
    for variant, (name, options) in VARIANTS.items():
        method = make(name, **options)
        for t in range(3):
            mine = {"image": pictures(ROWS, seed=t)["image"][runtime.share(ROWS)]}
            loss = method(mine, runtime.generator(t)).loss
            loss.backward()
            for p in (p for p in method.parameters() if p.requires_grad):
                p.data -= 0.1 * runtime.total(p.grad) / runtime.world()[1]
                p.grad = None
            method.after_step((t + 1) / 3)
        found |= {f"{variant}: {key}": value for key, value in method.state_dict().items()}
        found[f"{variant}: loss"] = loss.detach()
    return found


def shuffled_keys() -> tuple[Tensor, Tensor]:
    """The keys of an encoder with BatchNorm, with and without shuffling: other rows share its statistics."""
    x = pictures(8)["image"][runtime.share(8)] / 255
    x = x[..., :SIZE, :SIZE]
    first, second = (make("moco", norm=True, shuffle=shuffle) for shuffle in (True, False))
    return first.keys(x, runtime.generator(3)), second.keys(x, runtime.generator(3))


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save((states(), shuffled_keys()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does_and_shuffled_keys_come_back_in_order(tmp_path):
    processes.spawn(one_process, (str(tmp_path),), nprocs=2)
    (first, keys), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first, states(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(*keys)
    torch.testing.assert_close(*shuffled_keys())  # one process has nothing to shuffle
