"""Triplet losses against loops, and the methods of triplets on pictures."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from processes import together
from twofold import runtime
from twofold.errors import UsageError
from twofold.methods.triplet import Triplet
from twofold.mining import batch_all, batch_hard, semi_hard
from twofold.models.encoders import image_encoder
from twofold.models.heads import Head
from twofold.objectives import triplet_batch_all, triplet_chance, triplet_margin
from twofold.runtime import generator
from twofold.views import SIMCLR_CIFAR

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, 2, 0])
MINING = ("batch-all", "batch-hard", "semi-hard", "distance-weighted")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hinge(a: torch.Tensor, p: torch.Tensor, n: torch.Tensor, margin: float) -> float:
    a, p, n = (x / x.norm() for x in (a, p, n))
    return max(0.0, ((a - p) ** 2).sum().item() - ((a - n) ** 2).sum().item() + margin)


def taken(z: torch.Tensor, mined) -> list[torch.Tensor]:
    return [z[rows] for rows in mined]


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_margin_is_the_mean_of_the_hinges(margin):
    a, p, n = noise(3, 20, 5)
    expected = sum(hinge(*rows, margin) for rows in zip(a, p, n, strict=True)) / 20
    assert triplet_margin(a, p, n, margin=margin).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_batch_all_is_the_mean_of_the_hinges_that_are_not_zero(margin):
    z = noise(len(LABELS), 5)
    hinges = [
        hinge(*z[list(rows)], margin) for rows in zip(*(part.tolist() for part in batch_all(z, LABELS)), strict=True)
    ]
    active = [value for value in hinges if value > 0]
    assert 0 < len(active) < len(hinges)
    assert triplet_batch_all(z, LABELS, margin=margin).item() == pytest.approx(sum(active) / len(active), rel=1e-12)


def test_batch_all_has_the_value_and_the_gradient_of_the_listed_triplets():
    z = noise(40, 8).requires_grad_()
    labels = torch.arange(40) % 7
    fast = triplet_batch_all(z, labels)
    slow = triplet_margin(*taken(z, batch_all(z, labels, margin=0.2)))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (fast, slow)), rtol=1e-9, atol=1e-12)


def test_batch_all_keeps_no_table_of_triplets():
    z, labels = noise(96, 4).requires_grad_(), torch.arange(96) % 6
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        triplet_batch_all(z, labels)
    assert max(kept) <= 96**2


def test_gradients_are_those_of_finite_differences():
    z = noise(len(LABELS), 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: triplet_batch_all(z, LABELS), z)
    rows = [z.detach()[part].clone().requires_grad_() for part in semi_hard(z, LABELS)]
    assert torch.autograd.gradcheck(triplet_margin, rows)


def test_by_hand():
    """At 0°, 60° and 90° squared distances from 0° are 1 and 2."""
    a, p, n = torch.tensor([[1.0, 0]]), torch.tensor([[0.5, math.sqrt(0.75)]]), torch.tensor([[0, 1.0]])
    assert triplet_margin(a, p, n, margin=1.2).item() == pytest.approx(0.2)
    assert triplet_margin(a, n, p).item() == pytest.approx(1.2)
    z = torch.cat((a, p, n))
    # Anchors 0° (1 − 2) and 60° (1 − 0.2679): only the second violates the margin of 0.2.
    assert triplet_batch_all(z, torch.tensor([0, 0, 1])).item() == pytest.approx(math.sqrt(3) - 1 + 0.2)


@pytest.mark.parametrize("margin", [0.2, 0.7])
def test_collapsed_embeddings_lose_the_margin(margin):
    z = torch.ones(len(LABELS), 3)
    assert triplet_batch_all(z, LABELS, margin=margin).item() == pytest.approx(triplet_chance(margin), abs=1e-6)
    for mine in (batch_hard, semi_hard):
        loss = triplet_margin(*taken(z, mine(z, LABELS)), margin=margin)
        assert loss.item() == pytest.approx(triplet_chance(margin), abs=1e-6)


def test_gradients_stay_finite_where_points_coincide():
    for z in (torch.ones(len(LABELS), 3), torch.zeros(len(LABELS), 3), torch.eye(3)[LABELS.clamp(max=2)]):
        z = z.clone().requires_grad_()
        for loss in (triplet_batch_all(z, LABELS), triplet_margin(*taken(z, batch_hard(z, LABELS)))):
            (gradient,) = torch.autograd.grad(loss, z)
            assert gradient.isfinite().all()


def test_without_a_triplet_there_is_nothing_to_lose():
    z = noise(4, 3).requires_grad_()
    for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
        for loss in (triplet_batch_all(z, labels), triplet_margin(*taken(z, semi_hard(z, labels)))):
            assert loss.item() == 0
            assert torch.autograd.grad(loss, z)[0].abs().max() == 0


def test_length_does_not_matter_and_half_precision_is_compared_in_float32():
    z = noise(len(LABELS), 16)
    loss = triplet_batch_all(z, LABELS)
    assert triplet_batch_all(7 * z, LABELS).item() == pytest.approx(loss.item(), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert triplet_batch_all(z.float(), LABELS).item() == pytest.approx(loss.item(), rel=1e-5)
    assert triplet_batch_all(z.bfloat16(), LABELS).dtype == torch.float32


def test_what_is_no_triplet_is_refused():
    with pytest.raises(ValueError, match=r"three \[t, d\] of the same shape; got \(2, 3\), \(2, 3\) and \(1, 3\)"):
        triplet_margin(noise(2, 3), noise(2, 3), noise(1, 3))
    with pytest.raises(ValueError, match=r"a label for each row; got \(3, 3\) and \(2,\)"):
        triplet_batch_all(noise(3, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="margin > 0; got 0"):
        triplet_batch_all(noise(2, 3), torch.arange(2), margin=0)


# -- The method -------------------------------------------------------------------------------------------------------


def small(**options) -> Triplet:
    torch.manual_seed(0)
    policy = replace(SIMCLR_CIFAR, size=16)
    encoder = image_encoder("timm:resnet18/4", size=16, small_stem=True).eval()
    return Triplet(encoder, policies=(policy, policy), head=Head(1, dim=8), **options)


def pictures(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=draw, dtype=torch.uint8)
    return {"image": images[rows], "label": torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])[rows]}


def test_without_labels_the_other_view_is_the_only_positive():
    labelled, alone = small(), small(labels=False)
    assert (labelled.needs, alone.needs) == (("image", "label"), ("image",))
    batch = pictures()
    own = {**batch, "label": torch.arange(8)}
    expected = labelled(own, generator(0)).loss
    assert torch.equal(alone({"image": batch["image"]}, generator(0)).loss, expected)
    assert not torch.equal(labelled(batch, generator(0)).loss, expected)


@pytest.mark.parametrize("mining", MINING)
def test_each_mining_learns_from_pictures(mining):
    method = small(mining=mining)
    out = method(pictures(), generator(0))
    out.loss.backward()
    assert out.loss > 0 and out.chance == 0.2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())


def test_what_cannot_be_is_refused_when_the_method_is_built():
    with pytest.raises(UsageError, match="Did you mean 'semi-hard'"):
        small(mining="semihard")
    with pytest.raises(UsageError, match="margin must be greater than 0; got 0"):
        small(margin=0)


def gradients(mining: str, rows: slice) -> list[torch.Tensor]:
    method = small(mining=mining)
    method(pictures(rows), generator(0)).loss.backward()
    return [p.grad for p in method.head.parameters()]


def one_process(folder: Path) -> None:
    rank = runtime.world()[0]
    averaged = {mining: gradients(mining, (slice(0, 3), slice(3, 8))[rank]) for mining in MINING}
    for each in averaged.values():
        for gradient in each:
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    if rank == 0:
        torch.save(averaged, folder / "averaged.pt")


def test_two_processes_mine_what_one_would(tmp_path):
    together(one_process, tmp_path)
    averaged = torch.load(tmp_path / "averaged.pt", weights_only=True)
    for mining in MINING:
        torch.testing.assert_close(averaged[mining], gradients(mining, slice(None)), rtol=1e-4, atol=1e-6)
