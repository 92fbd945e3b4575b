"""The losses of batch statistics against slow loops, numbers worked by hand, invariances, limits and processes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from processes import together
from twofold import runtime
from twofold.errors import UsageError
from twofold.methods import BarlowTwins, LeJEPA, VICReg
from twofold.models.encoders import image_encoder
from twofold.models.heads import Head
from twofold.objectives import (
    barlow_twins,
    barlow_twins_chance,
    lejepa,
    lejepa_chance,
    sigreg,
    sigreg_chance,
    vicreg,
    vicreg_chance,
)
from twofold.views import SIMCLR_CIFAR


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Each loss as a function of two views [n, d]; the family's tests run over all of them.
LOSSES = {
    "barlow_twins": lambda a, b: barlow_twins(a, b),
    "vicreg": lambda a, b: vicreg(a, b).loss,
    "sigreg": lambda a, b: sigreg(a, noise(7, a.shape[1])) + sigreg(b, noise(7, a.shape[1])),
    "lejepa": lambda a, b: lejepa(torch.stack((a, b, -a)), noise(7, a.shape[1])).loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
SHAPES = pytest.mark.parametrize(("n", "d"), [(9, 3), (3, 9)], ids=["more rows", "more dimensions"])


def pair(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    return noise(n, d, seed=1).requires_grad_(), (noise(n, d, seed=1) / 2 + noise(n, d, seed=2)).requires_grad_()


# Slow references: one entry of a matrix, one knot of an integral at a time, straight from the papers.


def mean(values: list) -> Tensor:
    return sum(values) / len(values)


def covariance(x: Tensor, y: Tensor, *, correction: int) -> Tensor:
    mx, my = mean([*x]), mean([*y])
    return sum((xi - mx) * (yi - my) for xi, yi in zip(x, y, strict=True)) / (len(x) - correction)


def slow_barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    total = torch.zeros((), dtype=z1.dtype)
    for i, x in enumerate(z1.T):
        for j, y in enumerate(z2.T):
            deviations = ((covariance(x, x, correction=0) + 1e-5) * (covariance(y, y, correction=0) + 1e-5)).sqrt()
            c = covariance(x, y, correction=0) / deviations
            total = total + ((c - 1) ** 2 if i == j else 0.0051 * c**2)
    return total


def slow_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    (n, d), total = z1.shape, torch.zeros((), dtype=z1.dtype)
    for i in range(n):
        for j in range(d):
            total = total + 25 * (z1[i, j] - z2[i, j]) ** 2 / (n * d)
    for z in (z1, z2):
        for i in range(d):
            std = (covariance(z[:, i], z[:, i], correction=1) + 1e-4).sqrt()
            total = total + 25 * torch.clamp(1 - std, min=0) / d / 2
            for j in range(d):
                if i != j:
                    total = total + covariance(z[:, i], z[:, j], correction=1) ** 2 / d
    return total


def slow_sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """The trapezoidal rule on 33 knots over [−3, 3]: what doubling that on [0, 3] must give."""
    statistics = []
    for direction in directions:
        x = [row.dot(direction) / direction.norm() for row in z]
        integral, knots = 0.0, [3 * k / 16 for k in range(-16, 17)]
        for t in knots:
            normal = math.exp(-t * t / 2)
            real, imaginary = mean([(t * xi).cos() for xi in x]), mean([(t * xi).sin() for xi in x])
            integral += (0.5 if abs(t) == 3 else 1) * 3 / 16 * normal * ((real - normal) ** 2 + imaginary**2)
        statistics.append(len(z) * integral)
    return mean(statistics)


def slow_lejepa(z: Tensor, directions: Tensor, global_views: int) -> Tensor:
    v, n, d = z.shape
    squares = [
        (z[k, i, j] - mean([z[g, i, j] for g in range(global_views)])) ** 2
        for k in range(v)
        for i in range(n)
        for j in range(d)
    ]
    return 0.95 * mean(squares) + 0.05 * mean([slow_sigreg(view, directions) for view in z])


def same_value_and_gradients(fast, slow, inputs: tuple[Tensor, ...]) -> None:
    value, reference = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, inputs), torch.autograd.grad(reference, inputs), rtol=1e-10, atol=1e-12
    )


@SHAPES
def test_barlow_twins_equals_the_loop_over_correlations(n, d):
    same_value_and_gradients(barlow_twins, slow_barlow_twins, pair(n, d))


@SHAPES
def test_vicreg_equals_the_loop_over_covariances(n, d):
    same_value_and_gradients(lambda a, b: vicreg(a, b).loss, slow_vicreg, pair(n, d))


def test_sigreg_equals_the_loop_over_directions_and_knots():
    directions = noise(3, 4, seed=3)
    same_value_and_gradients(lambda z: sigreg(z, directions), lambda z: slow_sigreg(z, directions), pair()[:1])


def test_lejepa_equals_the_loop_over_views():
    directions, z = noise(2, 3, seed=3), noise(3, 4, 3, seed=4).requires_grad_()
    same_value_and_gradients(
        lambda z: lejepa(z, directions, global_views=2).loss, lambda z: slow_lejepa(z, directions, 2), (z,)
    )


@every_loss
@SHAPES
def test_gradients_agree_with_finite_differences(loss, n, d):
    assert torch.autograd.gradcheck(loss, pair(n, d))


@pytest.mark.parametrize("d", [8, 9, 12], ids=["d < 2n", "d = 2n + 1", "d > 2n"])
def test_products_of_rows_give_the_same_as_the_matrix_of_correlations(d):
    def off_diagonal(z1: Tensor, z2: Tensor, correction: int) -> Tensor:
        matrix = z1.T @ z2 / (len(z1) - correction)
        return (matrix - matrix.diagonal().diag()).square().sum()

    def barlow_by_matrix(a: Tensor, b: Tensor) -> Tensor:
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
        return ((a * b).mean(0) - 1).square().sum() + 0.0051 * off_diagonal(a, b, 0)

    def covariances_by_matrix(a: Tensor, b: Tensor) -> Tensor:
        a, b = (z - z.mean(0) for z in (a, b))
        return (off_diagonal(a, a, 1) + off_diagonal(b, b, 1)) / d

    same_value_and_gradients(barlow_twins, barlow_by_matrix, pair(4, d))
    same_value_and_gradients(lambda a, b: vicreg(a, b).covariance, covariances_by_matrix, pair(4, d))


# Worked by hand.


def test_barlow_twins_of_two_views_that_swap_their_dimensions():
    # Two uncorrelated dimensions, swapped in the other view: c = [[0, 1], [1, 0]], so 1 + 1 + λ(1 + 1).
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow_twins(z, z.flip(1)).item() == pytest.approx(2.0102, abs=1e-4)
    assert barlow_twins(z, z.flip(1), off_diagonal=0.5).item() == pytest.approx(3.0, abs=1e-4)
    assert barlow_twins(z, z).item() == pytest.approx(0.0, abs=1e-6)


def test_vicregs_parts_of_two_rows():
    # z1: both columns ±0.3, so mean 0, variance 0.18 and covariance 0.18; z2 the same, shifted by 2.
    z1 = torch.tensor([[0.3, 0.3], [-0.3, -0.3]], dtype=torch.float64)
    loss, invariance, variance, covariance = vicreg(z1, z1 + 2)
    assert invariance.item() == pytest.approx(4.0)
    assert variance.item() == pytest.approx(1 - math.sqrt(0.1801))  # of each view 0.5756, and halved
    assert covariance.item() == pytest.approx(2 * 0.18**2)  # of each view two entries of 0.18², over d = 2
    assert loss.item() == pytest.approx(25 * 4 + 25 * (1 - math.sqrt(0.1801)) + 0.0648)


def test_sigreg_of_two_rows_on_three_knots():
    # x = ±1 along the axis: φₙ(t) = cos t. Knots 0, 1.5 and 3 with weights 1.5, 3 and 1.5 on each.
    z = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    middle = 3.0 * math.exp(-1.125) * (math.cos(1.5) - math.exp(-1.125)) ** 2
    end = 1.5 * math.exp(-4.5) * (math.cos(3.0) - math.exp(-4.5)) ** 2
    assert sigreg(z, torch.ones(1, 1), knots=3).item() == pytest.approx(2 * (middle + end))


def test_the_variance_term_stops_at_a_deviation_of_one():
    wide = 3 * torch.linalg.qr(noise(8, 2) - noise(8, 2).mean(0))[0] * math.sqrt(7)
    assert vicreg(wide, wide).variance.item() == 0
    assert vicreg(wide / 4, wide).variance.item() == pytest.approx(0.25 / 2, abs=1e-3)


# Invariances.


@every_loss
def test_the_order_of_the_samples_does_not_matter(loss):
    a, b = pair()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(loss(a[order], b[order]), loss(a, b), rtol=1e-12)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_the_views_are_interchangeable(name):
    a, b = pair()
    assert torch.allclose(LOSSES[name](a, b), LOSSES[name](b, a), rtol=1e-12)


def test_barlow_twins_does_not_see_scale_and_shift_of_a_dimension_in_either_view():
    a, b = pair()
    scale, shift = torch.tensor([1e3, 2e3, 5e2, 4e3]), torch.tensor([7.0, -3.0, 0.5, 100.0])
    wide = barlow_twins(1e3 * a, 1e3 * b)  # so wide that the 1e-5 beside the variance is nothing
    assert torch.allclose(barlow_twins(a * scale + shift, 1e3 * b), wide, rtol=1e-9)
    assert torch.allclose(barlow_twins(1e3 * a, b * scale + shift), wide, rtol=1e-9)


def test_vicreg_does_not_see_a_common_shift_and_variance_and_covariance_not_even_separate_ones():
    a, b = pair()
    shift = noise(4, seed=5)
    assert torch.allclose(vicreg(a + shift, b + shift).loss, vicreg(a, b).loss, rtol=1e-12)
    apart = vicreg(a + shift, b - shift)
    assert torch.allclose(torch.stack(apart[2:]), torch.stack(vicreg(a, b)[2:]), rtol=1e-12)


def test_sigreg_sees_neither_length_nor_sign_of_a_direction_and_turns_with_the_rows():
    z, directions = pair()[0], noise(5, 4, seed=3)
    rotation = torch.linalg.qr(noise(4, 4, seed=6))[0]
    for same in (sigreg(z, 3 * directions), sigreg(z, -directions), sigreg(z @ rotation, directions @ rotation)):
        assert torch.allclose(same, sigreg(z, directions), rtol=1e-12)


# Limits.


@every_loss
def test_collapsed_embeddings_have_finite_gradients_also_in_float32(loss):
    for point in (torch.zeros(8, 4), torch.full((8, 4), 0.3)):
        a, b = point.clone().requires_grad_(), point.clone().requires_grad_()
        value = loss(a, b)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (a, b)))


def test_collapse_costs_the_chance_level():
    point = torch.full((8, 5), 0.3, dtype=torch.float64)
    assert barlow_twins(point, point).item() == barlow_twins_chance(5) == 5
    assert vicreg(point, point).loss.item() == pytest.approx(vicreg_chance())
    assert vicreg_chance() == pytest.approx(24.75)
    assert vicreg(point, point, variance=4.0).loss.item() == pytest.approx(vicreg_chance(variance=4.0))
    zero, directions = torch.zeros(3, 8, 5, dtype=torch.float64), noise(4, 5)
    assert sigreg(zero[0], directions).item() == pytest.approx(sigreg_chance(8))
    assert lejepa(zero, directions).loss.item() == pytest.approx(lejepa_chance(8))
    # ∫ (1 − φ)² φ over all t is √(2π)(1 − √2 + 1/√3) = 0.409; beyond 3 lies 0.007 of it.
    assert sigreg_chance(100, knots=1001, reach=9.0) == pytest.approx(
        100 * math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3)), rel=1e-5
    )


def test_no_point_is_cheaper_for_sigreg_than_zero():
    for length in (0.1, 1.0, 3.0):
        point = torch.full((8, 5), length / math.sqrt(5))
        assert sigreg(point, noise(64, 5)) > sigreg_chance(8)


def test_unrelated_views_cost_barlow_twins_the_chance_level_and_the_noise_of_the_batch():
    a, b = noise(4000, 6, seed=1), noise(4000, 6, seed=2)
    assert barlow_twins(a, b).item() == pytest.approx(barlow_twins_chance(6), rel=0.05)


@pytest.mark.parametrize("n", [64, 512])
def test_sigreg_of_a_normal_cloud_is_near_its_expectation_and_of_every_other_cloud_larger(n):
    directions = noise(256, 8, seed=1)
    clouds = [noise(n, 8, seed=seed) for seed in range(10, 26)]
    normal = torch.stack([sigreg(cloud, directions) for cloud in clouds])
    # E|φₙ − φ|² = (1 − φ²)/n, so the expectation is ∫ (1 − φ²) φ = 1.05, whatever n.
    assert normal.mean().item() == pytest.approx(1.05, abs=0.2)
    z = clouds[0]
    worse = {
        "collapsed": torch.zeros_like(z),
        "shifted": z + 0.5,
        "small": z / 2,
        "large": z * 2,
        "two dimensions of eight": torch.cat((2 * z[:, :2], torch.zeros(n, 6)), 1),
        "heavy tails": z / noise(n, 1, seed=40).abs(),
        "two clusters": z / 4 + torch.sign(noise(n, 1, seed=41)),
    }
    for name, cloud in worse.items():
        assert sigreg(cloud, directions) > 2 * normal.max(), name


def test_sigreg_tells_the_uniform_from_the_normal_along_an_axis_though_mean_and_variance_agree():
    uniform = torch.linspace(-math.sqrt(3), math.sqrt(3), 1000, dtype=torch.float64)[:, None]
    normal = math.sqrt(2) * torch.erfinv(torch.linspace(-0.999, 0.999, 1000, dtype=torch.float64))[:, None]
    axis = torch.ones(1, 1)
    assert sigreg(normal, axis) < 0.1 < 2 < sigreg(uniform, axis)


def test_descending_sigreg_turns_a_flat_cloud_into_a_round_one():
    z = (noise(64, 3, dtype=torch.float32) * torch.tensor([1.0, 0.1, 0.0]) + 0.5).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    for step in range(600):  # a few rows fly out to 6 first; out there it hardly pulls, so they are long in coming back
        optimizer.zero_grad()
        sigreg(z, noise(16, 3, seed=step, dtype=torch.float32)).backward()
        optimizer.step()
    assert z.mean(0).abs().max() < 0.05
    assert (z.T.cov() - torch.eye(3)).abs().max() < 0.1


def test_local_views_go_to_the_mean_of_the_global_ones_which_is_not_held_fixed():
    z = torch.tensor([[[0.0], [0.0]], [[2.0], [2.0]], [[4.0], [4.0]]], requires_grad=True)
    found = lejepa(z, torch.ones(1, 1), global_views=2, weight=0.0)
    assert found.prediction.item() == pytest.approx((1 + 1 + 9) / 3)
    (gradient,) = torch.autograd.grad(found.loss, z)
    # The mean of 6 squares: 2(z − c)/6 of its own with c = 1, and through c, for global views, −Σ(z − c)/6 = −3/6.
    torch.testing.assert_close(gradient[:, 0, 0], torch.tensor([-5 / 6, -1 / 6, 1.0]))
    assert lejepa(z, torch.ones(1, 1), global_views=3, weight=0.0).prediction.item() == pytest.approx(8 / 3)


# Numerics.


@every_loss
def test_autocast_changes_neither_value_nor_type(loss):
    a, b = (x.detach().float() for x in pair(32, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(a, b))


@every_loss
def test_half_precision_embeddings_are_compared_in_float32(loss):
    a, b = (x.detach().bfloat16() for x in pair(32, 16))
    assert torch.equal(loss(a, b), loss(a.float(), b.float()))


@pytest.mark.parametrize("shape", [(256, 1024), (512, 32)], ids=["by rows", "by dimensions"])
def test_float32_is_precise_enough_where_the_diagonal_is_taken_off(shape):
    n, d = shape
    base = noise(n, d)
    if n > d:  # uncorrelated, so that what is left beside the diagonal is next to nothing
        base = torch.linalg.qr(base - base.mean(0))[0] * math.sqrt(n)
    a, b = base.requires_grad_(), base.detach() + 0.1 * noise(n, d, seed=9)
    for loss in (LOSSES["barlow_twins"], LOSSES["vicreg"]):
        single, double = loss(a.float(), b.float()), loss(a, b)
        assert single.item() == pytest.approx(double.item(), rel=1e-5, abs=1e-5)
        one, other = (torch.autograd.grad(value, a)[0] for value in (single, double))
        assert (one - other).norm() < 1e-4 * other.norm()


# Mistakes of the caller.


def test_a_batch_of_one_and_sizes_that_do_not_match_are_named():
    for name, loss in (("barlow_twins", barlow_twins), ("vicreg", vicreg)):
        with pytest.raises(ValueError, match=rf"{name} takes two views.*n ≥ 2.*\(1, 4\)"):
            loss(torch.zeros(1, 4), torch.zeros(1, 4))
        with pytest.raises(ValueError, match=r"\(6, 4\) and \(5, 4\)"):
            loss(torch.zeros(6, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"n ≥ 2; got \(1, 4\)"):
        sigreg(torch.zeros(1, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"directions \[k, 4\].*\(6, 4\).*\(3, 5\)"):
        sigreg(torch.zeros(6, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"first 3 are global.*\(2, 6, 4\)"):
        lejepa(torch.zeros(2, 6, 4), torch.ones(3, 4), global_views=3)


# The methods, where they do more than call their objective.

POLICY = replace(SIMCLR_CIFAR, size=16)
SMALL = Head(2, 16, 8)


def tiny():
    torch.manual_seed(0)
    return image_encoder("timm:resnet18/2", size=16, small_stem=True)


def pictures(n: int = 6) -> dict[str, Tensor]:
    return {"image": torch.rand(n, 3, 20, 20, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize(("kind", "objective"), [(BarlowTwins, barlow_twins), (VICReg, lambda a, b: vicreg(a, b).loss)])
def test_each_view_has_batchnorm_statistics_of_its_own(kind, objective):
    method, twin = (kind(tiny(), policies=(POLICY, POLICY), head=SMALL) for _ in range(2))
    twin.load_state_dict(method.state_dict())
    out = method(pictures(), runtime.generator(1))
    draw = runtime.generator(1)
    z1, z2 = (twin.head(twin.encoder(POLICY(pictures()["image"], draw))) for _ in range(2))
    assert torch.equal(out.loss, objective(z1, z2))
    assert out.z.shape == (12, method.encoder.dim)


def test_vicreg_and_lejepa_log_their_terms():
    vic = VICReg(tiny(), policies=(POLICY, POLICY), head=SMALL)(pictures(), runtime.generator(1))
    terms = [25 * vic.parts["invariance"], 25 * vic.parts["variance"], vic.parts["covariance"]]
    assert torch.allclose(sum(terms), vic.loss)
    le = LeJEPA(tiny(), policies=(POLICY, POLICY), head=SMALL, directions=9)(pictures(), runtime.generator(1))
    assert torch.allclose(0.95 * le.parts["prediction"] + 0.05 * le.parts["sigreg"], le.loss)
    assert not any(part.requires_grad for out in (vic, le) for part in out.parts.values())


def test_lejepa_takes_local_views_of_another_size():
    small = replace(POLICY, size=8)
    method = LeJEPA(tiny(), policies=(POLICY, POLICY, small, small, small), head=SMALL, directions=9)
    out = method(pictures(), runtime.generator(1))
    out.loss.backward()
    assert out.z.shape == (5 * 6, method.encoder.dim)
    assert out.chance == lejepa_chance(6)


def test_lejepa_draws_new_directions_each_step_and_the_same_for_the_same_draw():
    method = LeJEPA(tiny(), policies=(POLICY, POLICY), head=SMALL, directions=2).eval()
    losses = [method(pictures(), runtime.generator(step)).loss.item() for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("views", "global_views"), [(1, 1), (2, 3), (2, 0)])
def test_lejepa_refuses_fewer_than_two_views_or_global_ones_that_are_not_there(views, global_views):
    with pytest.raises(UsageError, match=f"got {views} policies and global_views={global_views}"):
        LeJEPA(tiny(), policies=(POLICY,) * views, head=SMALL, global_views=global_views)


# Two processes with three and five rows: gradients averaged as data-parallel training does, of gathered rows.


def gradient(name: str, x: Tensor, y: Tensor) -> Tensor:
    tower = noise(5, 4, seed=8).requires_grad_()
    return torch.autograd.grad(LOSSES[name](runtime.gather(x @ tower), runtime.gather(y @ tower)), tower)[0]


def averaged_gradients(folder: Path) -> None:
    rank = runtime.world()[0]
    rows, averaged = (slice(0, 3), slice(3, 8))[rank], {}
    for name in LOSSES:
        averaged[name] = gradient(name, noise(8, 5, seed=6)[rows], noise(8, 5, seed=7)[rows])
        torch.distributed.all_reduce(averaged[name])
        averaged[name] /= 2
    if rank == 0:
        torch.save(averaged, folder / "averaged.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    together(averaged_gradients, tmp_path)
    averaged = torch.load(tmp_path / "averaged.pt", weights_only=True)
    assert averaged.keys() == LOSSES.keys()
    for name, found in averaged.items():
        alone = gradient(name, noise(8, 5, seed=6), noise(8, 5, seed=7))
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
