"""Miners against loops that look at every triplet."""

import math

import numpy as np
import pytest
import torch

from twofold.mining import Triplets, batch_all, batch_hard, distance_weighted, semi_hard, triplets

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, 2, 0, 1, 0])  # 3 is alone


def embeddings(n: int = len(LABELS), d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(z: torch.Tensor) -> np.ndarray:
    unit = (z / z.norm(dim=1, keepdim=True)).numpy()
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in unit] for a in unit])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MINERS = {
    "batch-all": batch_all,
    "batch-hard": batch_hard,
    "semi-hard": semi_hard,
    "distance-weighted": lambda z, labels: distance_weighted(z, labels, seeded()),
}
each_miner = pytest.mark.parametrize("mine", MINERS.values(), ids=MINERS)


def as_set(mined: Triplets) -> set[tuple[int, ...]]:
    listed = list(zip(*(part.tolist() for part in mined), strict=True))
    assert len(listed) == len(set(listed))
    return set(listed)


def pairs(labels: list[int]) -> list[tuple[int, int]]:
    """Anchor and positive, where the anchor has a negative too."""
    n = range(len(labels))
    return [(a, p) for a in n for p in n if a != p and labels[a] == labels[p] and set(labels) != {labels[a]}]


def negatives(labels: list[int], anchor: int) -> list[int]:
    return [n for n in range(len(labels)) if labels[n] != labels[anchor]]


@each_miner
def test_every_triplet_is_valid(mine):
    for seed in range(5):
        mined = mine(embeddings(seed=seed), LABELS)
        assert len(mined.anchor) > 0
        assert all(part.dtype == torch.int64 for part in mined)
        assert (mined.anchor != mined.positive).all()
        assert (LABELS[mined.anchor] == LABELS[mined.positive]).all()
        assert (LABELS[mined.anchor] != LABELS[mined.negative]).all()


@each_miner
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]])
def test_where_no_triplet_is_valid_there_is_none(mine, labels):
    mined = mine(embeddings(len(labels)), torch.tensor(labels, dtype=torch.int64))
    assert [part.shape for part in mined] == [(0,)] * 3


@each_miner
def test_blocks_of_anchors_find_what_one_table_finds(mine, monkeypatch):
    whole = mine(embeddings(), LABELS)
    monkeypatch.setattr(triplets, "BLOCK", 5 * len(LABELS))
    assert all(map(torch.equal, whole, mine(embeddings(), LABELS)))


@each_miner
def test_length_of_the_embeddings_does_not_matter_and_no_gradient_passes(mine):
    z = embeddings().requires_grad_()
    scaled = (z * torch.arange(1, len(LABELS) + 1)[:, None]).float()
    assert all(map(torch.equal, mine(z, LABELS), mine(scaled, LABELS)))


@each_miner
def test_autocast_does_not_coarsen_the_comparison(mine):
    z = embeddings(d=64).float()
    with torch.autocast("cpu", torch.bfloat16):
        mined = mine(z, LABELS)
    assert all(map(torch.equal, mined, mine(z, LABELS)))


@each_miner
def test_labels_of_another_length_are_refused(mine):
    with pytest.raises(ValueError, match=r"label for each row; got \(12, 4\) and \(11,\)"):
        mine(embeddings(), LABELS[1:])


def test_batch_all_lists_every_valid_triplet():
    labels = LABELS.tolist()
    assert as_set(batch_all(embeddings(), LABELS)) == {
        (a, p, n) for a, p in pairs(labels) for n in negatives(labels, a)
    }


def test_batch_all_with_a_margin_lists_those_that_violate_it():
    d = distances(embeddings()) ** 2
    every = as_set(batch_all(embeddings(), LABELS))
    violating = {(a, p, n) for a, p, n in every if d[a, p] - d[a, n] + 0.2 > 0}
    assert 0 < len(violating) < len(every)
    assert as_set(batch_all(embeddings(), LABELS, margin=0.2)) == violating


def test_batch_hard_takes_the_farthest_positive_and_the_nearest_negative():
    d, labels = distances(embeddings()), LABELS.tolist()
    expected = {
        (
            a,
            max((p for b, p in pairs(labels) if b == a), key=lambda p: d[a, p]),
            min(negatives(labels, a), key=lambda n: d[a, n]),
        )
        for a in {a for a, _ in pairs(labels)}
    }
    assert as_set(batch_hard(embeddings(), LABELS)) == expected


def test_semi_hard_takes_the_nearest_negative_beyond_the_positive():
    labels, fallbacks = LABELS.tolist(), 0
    for seed in range(5):
        z = embeddings(seed=seed)
        d, expected = distances(z), set()
        for a, p in pairs(labels):
            farther = [n for n in negatives(labels, a) if d[a, n] > d[a, p]]
            fallbacks += not farther
            chosen = (
                min(farther, key=lambda n: d[a, n]) if farther else max(negatives(labels, a), key=lambda n: d[a, n])
            )
            expected.add((a, p, chosen))
        assert as_set(semi_hard(z, LABELS)) == expected
    assert fallbacks


def test_semi_hard_by_hand():
    """On a circle: the anchor at 0°, its positive at 40°, negatives at 20°, 50° and 90°."""
    angle = torch.deg2rad(torch.tensor([0.0, 40, 20, 50, 90]))
    mined = semi_hard(torch.stack((angle.cos(), angle.sin()), 1), torch.tensor([0, 0, 1, 2, 3]))
    assert (0, 1, 3) in as_set(mined)  # 20° is too hard, 90° easier than it need be
    assert (1, 0, 4) in as_set(mined)  # seen from 40°: 10°, 20° and 50° away, and the positive 40°


@pytest.mark.parametrize("d", [2, 3, 8])
def test_distance_weighted_draws_negatives_as_the_formula_says(d):
    z, labels = embeddings(8, d, seed=4), [0, 0, 1, 2, 3, 4, 5, 6]
    distance = distances(z)[0]
    weight = np.zeros(8)
    for n in range(2, 8):
        if distance[n] < 1.4:
            cut = max(distance[n], 0.5)
            weight[n] = 1 / (cut ** (d - 2) * (1 - cut**2 / 4) ** ((d - 3) / 2))
    assert 2 <= (weight > 0).sum() < 6
    expected = weight / weight.sum()
    draw, rounds = seeded(1), 2000
    drawn = [distance_weighted(z, torch.tensor(labels), draw).negative[0].item() for _ in range(rounds)]
    seen = np.bincount(drawn, minlength=8) / rounds
    assert np.abs(seen - expected).max() < 4 * math.sqrt(0.25 / rounds)
    assert not seen[expected == 0].any()


def test_distance_weighted_draws_evenly_where_all_negatives_are_far():
    z = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [-1, 0, 0], [-1, 0.5, 0], [-1, 0, 0.9]])
    draw = seeded(2)
    drawn = [distance_weighted(z, torch.tensor([0, 0, 1, 2, 3]), draw).negative[0].item() for _ in range(900)]
    assert np.bincount(drawn, minlength=5)[2:] == pytest.approx(300, abs=60)


def test_distance_weighted_is_decided_by_its_generator():
    first, again, other = (distance_weighted(embeddings(), LABELS, seeded(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.negative, other.negative)
    assert as_set(first) != as_set(other)
    assert {(a, p) for a, p, _ in as_set(first)} == set(pairs(LABELS.tolist()))


def test_distance_weighted_survives_wide_and_collapsed_embeddings():
    """In 2,048 dimensions 1/q spans more than float32 does."""
    labels = torch.arange(64) // 4
    for z in (embeddings(64, 2048).float(), torch.ones(64, 2048), torch.zeros(64, 16)):
        mined = distance_weighted(z, labels, seeded())
        assert len(mined.anchor) == 64 * 3
        assert (labels[mined.anchor] != labels[mined.negative]).all()
