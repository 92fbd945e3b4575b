"""The pair losses against slow loops, numbers worked by hand, invariances and limits."""

import math

import pytest
import torch
from torch import Tensor

from twofold.objectives import (
    clip,
    clip_chance,
    dcl,
    dcl_chance,
    info_nce,
    info_nce_chance,
    nt_xent,
    nt_xent_chance,
    siglip,
    siglip_chance,
    sup_con,
    sup_con_chance,
)

# Each loss as a function of two [n, d]; the family's tests run over all of them.
LOSSES = {
    "nt_xent": lambda a, b: nt_xent(a, b, temperature=0.3),
    "dcl": lambda a, b: dcl(a, b, temperature=0.3),
    "info_nce": lambda a, b: info_nce(a, b, temperature=0.2),
    "info_nce with negatives": lambda a, b: info_nce(a, b, negatives=torch.eye(3, a.shape[-1]).to(a), temperature=0.2),
    "clip": lambda a, b: clip(a, b, scale=5.0),
    "siglip": lambda a, b: siglip(a, b, scale=5.0, bias=-1.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(n: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    return noise(n, d, seed=1).requires_grad_(), noise(n, d, seed=2).requires_grad_()


# Slow references: one anchor, one candidate at a time, straight from the papers.


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x.dot(y) / (x.dot(x).sqrt() * y.dot(y).sqrt())


def choose(answer: Tensor, others: list[Tensor]) -> Tensor:
    """−ln of the share of exp(answer) among all candidates."""
    return -(answer.exp() / (answer.exp() + sum(other.exp() for other in others))).log()


def slow_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    views, n = [*z1, *z2], len(z1)
    total = torch.zeros((), dtype=z1.dtype)
    for i, anchor in enumerate(views):
        partner = (i + n) % (2 * n)
        others = [cosine(anchor, views[j]) / temperature for j in range(2 * n) if j not in (i, partner)]
        total = total + choose(cosine(anchor, views[partner]) / temperature, others)
    return total / (2 * n)


def slow_info_nce(q: Tensor, k: Tensor, negatives: Tensor | None, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=q.dtype)
    for i, query in enumerate(q):
        rivals = [k[j] for j in range(len(k)) if j != i] if negatives is None else list(negatives)
        total = total + choose(
            cosine(query, k[i]) / temperature, [cosine(query, rival) / temperature for rival in rivals]
        )
    return total / len(q)


def slow_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return (slow_info_nce(a, b, None, 1 / scale) + slow_info_nce(b, a, None, 1 / scale)) / 2


def slow_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    total = torch.zeros((), dtype=a.dtype)
    for i in range(len(a)):
        for j in range(len(b)):
            logit = scale * cosine(a[i], b[j]) + bias
            total = total + (1 + (-logit if i == j else logit).exp()).log()
    return total / len(a)


def slow_dcl(z1: Tensor, z2: Tensor, temperature: Tensor) -> Tensor:
    views, n = [*z1, *z2], len(z1)
    total = torch.zeros((), dtype=z1.dtype)
    for i, anchor in enumerate(views):
        logits = [cosine(anchor, view) / temperature for view in views]
        total = total - logits[(i + n) % (2 * n)]
        total = total + sum(logits[j].exp() for j in range(2 * n) if j % n != i % n).log()
    return total / (2 * n)


def slow_sup_con(z: Tensor, labels: list[int], temperature: Tensor) -> Tensor:
    losses = []
    for i, anchor in enumerate(z):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        logits = {j: cosine(anchor, z[j]) / temperature for j in range(len(z)) if j != i}
        if positives:
            shares = [choose(logits[p], [logits[j] for j in logits if j != p]) for p in positives]
            losses.append(sum(shares) / len(positives))
    return sum(losses) / len(losses)


def same_value_and_gradients(fast, slow, inputs: list[Tensor]) -> None:
    value, reference = fast(*inputs), slow(*inputs)
    torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value, inputs), torch.autograd.grad(reference, inputs), rtol=1e-10, atol=1e-12
    )


def test_nt_xent_equals_the_loop_over_anchors():
    same_value_and_gradients(
        lambda a, b: nt_xent(a, b, temperature=0.3), lambda a, b: slow_nt_xent(a, b, 0.3), [*pair()]
    )


def test_dcl_equals_the_loop_over_anchors_and_trains_its_temperature():
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(lambda a, b, t: dcl(a, b, temperature=t), slow_dcl, [*pair(), temperature])


def test_sup_con_equals_the_loop_over_anchors_and_trains_its_temperature():
    labels = [3, 0, 3, -5, 0, 3]  # -5 is alone
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(
        lambda z, t: sup_con(z, torch.tensor(labels), temperature=t),
        lambda z, t: slow_sup_con(z, labels, t),
        [pair()[0], temperature],
    )


def test_info_nce_equals_the_loop_over_queries():
    same_value_and_gradients(
        lambda a, b: info_nce(a, b, temperature=0.2), lambda a, b: slow_info_nce(a, b, None, 0.2), [*pair()]
    )


def test_info_nce_with_negatives_equals_the_loop_over_queries():
    same_value_and_gradients(
        lambda a, b, m: info_nce(a, b, negatives=m, temperature=0.2),
        lambda a, b, m: slow_info_nce(a, b, m, 0.2),
        [*pair(), noise(5, 4, seed=3).requires_grad_()],
    )


def test_clip_equals_the_loop_in_both_directions_and_trains_its_scale():
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(lambda a, b, s: clip(a, b, scale=s), slow_clip, [*pair(), scale])


def test_siglip_equals_the_loop_over_pairs_and_trains_scale_and_bias():
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    same_value_and_gradients(lambda a, b, s, c: siglip(a, b, scale=s, bias=c), slow_siglip, [*pair(), scale, bias])


@every_loss
def test_gradients_agree_with_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, pair(4, 3))


# Worked by hand. Two pairs on the axes: partners have cosine 1, all others 0.


def test_nt_xent_of_two_aligned_orthogonal_pairs():
    # Each anchor: e / (e + 1 + 1).
    axes = torch.eye(2)
    assert nt_xent(axes, axes, temperature=1.0).item() == pytest.approx(0.551445, abs=1e-6)


def test_nt_xent_is_the_mean_over_2n_anchors_and_not_the_official_codes_sum_of_two_means():
    # Swapped views: the partner has cosine 0, one rival 1 and one 0, so each anchor pays ln(2 + e).
    axes = torch.eye(2)
    assert nt_xent(axes, axes.flip(0), temperature=1.0).item() == pytest.approx(math.log(2 + math.e), abs=1e-6)


def test_dcl_of_two_aligned_orthogonal_pairs_is_negative():
    # Two rivals at 0, the partner at 1: ln 2 - 1.
    axes = torch.eye(2)
    assert dcl(axes, axes, temperature=1.0).item() == pytest.approx(-0.306853, abs=1e-6)


def test_sup_con_leaves_out_the_anchor_that_is_alone():
    # The first two: e / (e + 1). The third has no positive; as a rival it counts.
    z, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    assert sup_con(z, labels, temperature=1.0).item() == pytest.approx(0.313262, abs=1e-6)


def test_sup_con_of_labels_that_name_the_pairs_is_nt_xent():
    a, b = pair()
    labels = torch.arange(6).repeat(2)
    torch.testing.assert_close(
        sup_con(torch.cat((a, b)), labels, temperature=0.3), nt_xent(a, b, temperature=0.3), rtol=1e-12, atol=0
    )


def test_info_nce_of_two_orthogonal_pairs():
    # At temperature 1/2: ln(1 + e^-2).
    axes = torch.eye(2)
    assert info_nce(axes, axes, temperature=0.5).item() == pytest.approx(0.126928, abs=1e-6)


def test_clip_averages_two_directions_that_differ():
    # b repeats one vector: every a is torn between two equals (ln 2); b's second row misses its a, ln(1 + e).
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    there, back = math.log(2), (math.log(1 + math.exp(-1)) + math.log(1 + math.e)) / 2
    assert clip(a, b, scale=1.0).item() == pytest.approx((there + back) / 2, abs=1e-6)


def test_siglip_divides_by_n_and_not_by_its_square():
    # scale 2, bias -1: two positives at logit 1 and two negatives at logit -1, 4·ln(1 + 1/e) / 2.
    axes = torch.eye(2)
    assert siglip(axes, axes, scale=2.0, bias=-1.0).item() == pytest.approx(0.626523, abs=1e-6)


# What the losses must not care about.


@every_loss
def test_the_order_of_the_pairs_does_not_matter(loss):
    a, b = pair()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(loss(a[order], b[order]), loss(a, b))


@every_loss
def test_the_length_of_the_embeddings_does_not_matter(loss):
    a, b = pair()
    lengths = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 1e6]).double()[:, None]
    torch.testing.assert_close(loss(a * lengths, b * lengths.flip(0)), loss(a, b))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "info_nce with negatives"])
def test_a_rotation_of_both_sides_does_not_matter(name):
    a, b = pair()
    rotation = torch.linalg.qr(noise(4, 4, seed=5)).Q
    torch.testing.assert_close(LOSSES[name](a @ rotation, b @ rotation), LOSSES[name](a, b))


@pytest.mark.parametrize("name", ["nt_xent", "dcl", "clip", "siglip"])
def test_the_two_sides_can_be_swapped(name):
    a, b = pair()
    torch.testing.assert_close(LOSSES[name](b, a), LOSSES[name](a, b))


def test_neither_the_order_of_the_rows_nor_the_names_of_the_labels_matter_to_sup_con():
    z, labels = pair()[0], torch.tensor([0, 1, 0, 1, 2, 2])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(sup_con(z[order], 7 - labels[order]), sup_con(z, labels))


# Limits.


@pytest.mark.parametrize("n", [1, 2, 8, 300])
def test_collapsed_embeddings_score_the_chance_level(n):
    point = torch.ones(n, 3)
    assert nt_xent(point, point).item() == pytest.approx(nt_xent_chance(n), abs=1e-5)
    assert info_nce(point, point).item() == pytest.approx(info_nce_chance(n), abs=1e-5)
    queue = torch.ones(50, 3)
    assert info_nce(point, point, negatives=queue).item() == pytest.approx(info_nce_chance(1 + 50), abs=1e-5)
    assert clip(point, point, scale=100.0).item() == pytest.approx(clip_chance(n), abs=1e-4)
    labels = torch.arange(n).repeat(2) // 2
    assert sup_con(point.repeat(2, 1), labels).item() == pytest.approx(sup_con_chance(2 * n), abs=1e-5)
    if n > 1:
        assert dcl(point, point).item() == pytest.approx(dcl_chance(n), abs=1e-5)


@pytest.mark.parametrize("n", [2, 8, 300])
def test_siglips_chance_is_what_collapsed_embeddings_reach_with_the_best_bias(n):
    point = torch.ones(n, 3, dtype=torch.float64)
    best = -10.0 - math.log(n - 1)  # cancels the scale of 10 and leaves the logit -ln(n - 1)
    loss = {shift: siglip(point, point, scale=10.0, bias=best + shift).item() for shift in (-0.1, 0.0, 0.1)}
    assert loss[0.0] == pytest.approx(siglip_chance(n), rel=1e-9)
    assert loss[0.0] < min(loss[-0.1], loss[0.1])
    entropy = -(math.log(1 / n) / n + (1 - 1 / n) * math.log(1 - 1 / n))
    assert siglip_chance(n) == pytest.approx(n * entropy)


def test_siglips_chance_of_one_pair_is_zero():
    assert siglip_chance(1) == 0


def test_aligned_and_orthogonal_embeddings_cost_almost_nothing():
    axes = torch.eye(8)
    assert nt_xent(axes, axes, temperature=0.05) < 1e-6
    assert info_nce(axes, axes, temperature=0.05) < 1e-6
    assert info_nce(axes[:4], axes[:4], negatives=axes[4:], temperature=0.05) < 1e-6
    assert clip(axes, axes, scale=20.0) < 1e-6
    assert siglip(axes, axes, scale=40.0, bias=-20.0) < 1e-6


def test_a_queue_that_already_holds_the_keys_costs_ln_2_despite_perfect_alignment():
    keys, old = torch.eye(16)[:4], torch.eye(16)[4:]
    for i in range(4):
        one = keys[i : i + 1]
        assert info_nce(one, one, negatives=old) < 0.006
        polluted = info_nce(one, one, negatives=torch.cat((old, one)))
        assert polluted.item() == pytest.approx(math.log(2), abs=1e-4)


def test_given_negatives_replace_those_of_the_batch():
    point, far = torch.ones(8, 3), -torch.ones(2, 3)
    assert info_nce(point, point, negatives=far) < 1e-6  # in the batch the eight would be indistinguishable


# Numerics.


@pytest.mark.parametrize("worst", [False, True], ids=["aligned", "opposed"])
def test_a_temperature_of_0_005_does_not_overflow_float32(worst):
    a = noise(8, 4, dtype=torch.float32).requires_grad_()
    b = -a if worst else a
    for loss in (
        nt_xent(a, b, temperature=0.005),
        dcl(a, b, temperature=0.005),
        sup_con(torch.cat((a, b)), torch.arange(8).repeat(2), temperature=0.005),
        info_nce(a, b, temperature=0.005),
        info_nce(a, b, negatives=b, temperature=0.005),
        clip(a, b, scale=200.0),
        siglip(a, b, scale=200.0, bias=-10.0),
    ):
        (gradient,) = torch.autograd.grad(loss, a, retain_graph=True)
        assert loss.isfinite() and gradient.isfinite().all()


@every_loss
def test_autocast_changes_neither_value_nor_type(loss):
    a, b = (x.detach().float() for x in pair(32, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(a, b)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(a, b))


@every_loss
def test_half_precision_embeddings_are_compared_in_float32(loss):
    a, b = (x.detach().bfloat16() for x in pair(32, 64))
    assert torch.equal(loss(a, b), loss(a.float(), b.float()))


def test_towers_of_two_precisions_meet():
    a, b = (x.detach().float() for x in pair())
    assert clip(a.bfloat16(), b, scale=10.0).dtype == torch.float32


# Mistakes of the caller.


@every_loss
def test_sizes_that_do_not_match_are_both_named(loss):
    with pytest.raises(ValueError, match=r"\(6, 4\) and \(5, 4\)"):
        loss(torch.zeros(6, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"\(4,\) and \(4,\)"):
        loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="n ≥ 1"):
        loss(torch.zeros(0, 4), torch.zeros(0, 4))


def test_negatives_of_another_width_are_named():
    with pytest.raises(ValueError, match=r"\[m, 4\].*\(6, 4\).*\(9, 3\)"):
        info_nce(torch.ones(6, 4), torch.ones(6, 4), negatives=torch.ones(9, 3))


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_a_temperature_or_scale_that_is_not_positive_is_refused(value):
    x = torch.eye(2)
    for loss, message in [
        (lambda: nt_xent(x, x, temperature=value), "nt_xent needs temperature > 0; got"),
        (lambda: dcl(x, x, temperature=value), "dcl needs temperature > 0; got"),
        (lambda: sup_con(x, torch.zeros(2).long(), temperature=value), "sup_con needs temperature > 0; got"),
        (lambda: info_nce(x, x, temperature=value), "info_nce needs temperature > 0; got"),
        (lambda: clip(x, x, scale=value), "clip needs scale > 0; got"),
        (lambda: siglip(x, x, scale=value, bias=0.0), "siglip needs scale > 0; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss()


def test_dcl_of_one_pair_has_nothing_to_push_away_from():
    with pytest.raises(ValueError, match="n ≥ 2"):
        dcl(torch.ones(1, 3), torch.ones(1, 3))


def test_sup_con_without_any_positive_is_refused():
    with pytest.raises(ValueError, match=r"no two rows of one label among 3"):
        sup_con(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match=r"\(3, 3\), \(2,\)"):
        sup_con(torch.eye(3), torch.zeros(2).long())
