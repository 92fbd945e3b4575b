"""Recall, intervals, chance levels and the four signs of collapse."""

import itertools
import math

import numpy as np
import pytest
import torch

from twofold.errors import DataError, UsageError
from twofold.measure.collapse import alignment, effective_rank, spread, uniformity
from twofold.measure.metrics import (
    Interval,
    accuracy,
    accuracy_chance,
    average_precision,
    bootstrap,
    first_ranks,
    ndcg,
    positive_ranks,
    recall_at_k,
    recall_chance,
    row_blocks,
    unit_rows,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Ranks and recall.


def test_ranks_of_a_small_table_worked_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.9, 0.1, 0.5, 0.3], [0.9, 0.1, 0.5, 0.3]])
    # The best of several positives counts, and a query's other positives are no rivals.
    assert first_ranks(scores, [[0], [1, 3], [3, 2]]).tolist() == [1, 3, 2]


def test_recall_is_the_share_of_queries_with_a_hit_and_not_of_positives_found():
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]])
    ranks = first_ranks(scores, [[0, 2], [2]])
    assert recall_at_k(ranks, 1).value == 0.5  # the first query counts fully although one positive of two is first
    assert recall_at_k(ranks, 3).value == 1.0


def test_a_positive_listed_twice_counts_once():
    scores = torch.tensor([[0.5, 0.9, 0.5]])
    assert first_ranks(scores, [[0, 0]]).tolist() == first_ranks(scores, [[0]]).tolist() == [3]


def test_ties_count_against_the_query_so_that_collapse_is_not_success():
    assert first_ranks(torch.ones(2, 5), [[0], [4, 2]]).tolist() == [5, 4]


def test_scores_that_differ_by_rounding_are_ties():
    assert first_ranks(torch.tensor([[0.5 + 1e-7, 0.5]]), [[0]]).tolist() == [2]


def test_first_ranks_equals_sorting():
    scores, generator = noise(20, 30), np.random.default_rng(0)
    positives = [generator.choice(30, generator.integers(1, 5), replace=False).tolist() for _ in range(20)]
    expected = []
    for row, own in zip(scores.tolist(), positives, strict=True):
        best = max(row[item] for item in own)
        expected.append(1 + sum(score > best for item, score in enumerate(row) if item not in own))
    assert first_ranks(scores, positives).tolist() == expected


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        ([[0], []], "Query 1 has no positive"),
        ([[0], [1, 3]], r"Query 1 has the positive 3; the gallery has rows 0\.\.2"),
        ([[-1], [0]], "Query 0 has the positive -1"),
        ([[0]], "2 queries, 1 lists"),
    ],
)
def test_positives_that_cannot_be_are_named(positives, message):
    with pytest.raises(DataError, match=message):
        first_ranks(torch.zeros(2, 3), positives)


def test_a_score_that_is_not_a_number_is_an_error_and_not_a_hit():
    with pytest.raises(DataError, match="Query 1 has scores that are not a number"):
        first_ranks(torch.tensor([[0.1, 0.2], [math.nan, 0.2]]), [[0], [0]])


# Chance.


def test_recall_chance_equals_the_count_of_all_choices():
    for gallery, positives, k in [(6, 1, 1), (6, 2, 3), (5, 5, 1), (7, 3, 6)]:
        choices = list(itertools.combinations(range(gallery), k))
        hits = sum(min(choice) < positives for choice in choices)  # items 0..positives-1 are the positives
        assert recall_chance(positives, gallery, k) == pytest.approx(hits / len(choices), abs=1e-15)


def test_recall_chance_of_one_positive_is_k_over_the_gallery():
    assert recall_chance(1, 100_000, 10) == pytest.approx(1e-4, rel=1e-12)
    assert recall_chance(1, 3, 10) == 1.0


def test_chance_accuracy_is_that_of_the_most_frequent_label():
    assert accuracy_chance(np.array([0, 1, 1, 2, -1, -1, -1])) == 0.5
    with pytest.raises(DataError, match="No item has a label"):
        accuracy_chance(np.array([-1]))


def test_accuracy_does_not_count_items_without_a_label():
    assert accuracy(np.array([0, 1, 1, 7]), np.array([0, 1, 2, -1])).value == pytest.approx(2 / 3)


# Intervals.


def test_an_interval_reads_well():
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_the_same_generator_gives_the_same_interval():
    values = noise(50)
    assert bootstrap(values, draw=draw(3)) == bootstrap(values, draw=draw(3)) != bootstrap(values, draw=draw(4))
    assert bootstrap(values) == bootstrap(values)


def test_the_interval_is_as_wide_as_theory_says():
    hits = torch.arange(400) < 120  # share 0.3: standard error sqrt(.3·.7/400) = 0.0229, half width 1.96 times that
    found = bootstrap(hits, resamples=4000)
    assert found.value == pytest.approx(0.3)
    assert found.value - found.low == pytest.approx(1.96 * 0.0229, rel=0.12)
    assert found.high - found.value == pytest.approx(1.96 * 0.0229, rel=0.12)


def test_a_95_percent_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        found = bootstrap(noise(60, seed=seed), resamples=300, draw=draw(seed))
        covered += found.low <= 0 <= found.high
    assert 178 <= covered <= 198


def test_captions_of_one_picture_are_resampled_together():
    # 40 pictures, each with five captions that all hit or all miss: 40 coin flips and not 200.
    hits = (torch.arange(40) % 2).repeat_interleave(5)
    pictures = [f"picture {i // 5}" for i in range(200)]
    apart, together = bootstrap(hits, resamples=4000), bootstrap(hits, groups=pictures, resamples=4000)
    assert apart.value == together.value == 0.5
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.1)


def test_groups_of_one_are_no_groups():
    values = noise(30)
    assert bootstrap(values, groups=range(30), draw=draw()) == bootstrap(values, draw=draw())


def test_groups_of_several_sizes_average_values_and_not_groups():
    assert bootstrap([1.0, 1.0, 1.0, 0.0], groups=["a", "a", "a", "b"]).value == 0.75
    # Both groups, either twice: 0.75 half of the time, 1 and 0 a quarter each.
    middle = bootstrap([1.0, 1.0, 1.0, 0.0], groups=["a", "a", "a", "b"], level=0.2)
    assert (middle.low, middle.high) == (0.75, 0.75)


def test_equal_values_have_an_interval_without_width():
    assert bootstrap([1.0] * 9) == (1.0, 1.0, 1.0)


def test_bootstrap_says_what_it_cannot_do():
    with pytest.raises(DataError, match="nothing to average"):
        bootstrap([])
    with pytest.raises(DataError, match="got 2 and 3"):
        bootstrap([0.0, 1.0], groups=["a", "b", "c"])
    with pytest.raises(UsageError, match="0 < level < 1"):
        bootstrap([0.0], level=95)


# Rows.


def test_blocks_cover_every_row_once_within_the_budget():
    slices = list(row_blocks(10, 4, cells=12))
    assert [i for block in slices for i in range(10)[block]] == list(range(10))
    assert max(block.stop - block.start for block in slices) == 3
    assert [block.stop for block in row_blocks(2, 100, cells=12)] == [1, 2]


def test_a_row_that_is_not_finite_is_named():
    z = np.ones((4, 2), np.float32)
    z[2, 1] = np.nan
    with pytest.raises(DataError, match="Row 2 of the embeddings is not finite"):
        unit_rows(z)
    with pytest.raises(DataError, match=r"\[n, d\].*\(4,\)"):
        unit_rows(np.ones(4))


def test_read_only_and_half_precision_arrays_are_taken_as_they_come():
    z = noise(5, 3).numpy()
    expected = unit_rows(z)
    z.flags.writeable = False
    assert torch.equal(unit_rows(z), expected)
    torch.testing.assert_close(unit_rows(z.astype(np.float16)), expected, atol=1e-3, rtol=1e-2)


# Collapse.


def test_a_point_has_no_spread_no_uniformity_and_rank_1():
    z = torch.ones(20, 5) * torch.linspace(1, 9, 20)[:, None]  # one direction, several lengths
    assert spread(z) == pytest.approx(0, abs=1e-6)
    assert uniformity(z) == pytest.approx(0, abs=1e-5)
    assert effective_rank(z) == pytest.approx(1, abs=1e-3)


def test_embeddings_that_are_all_zero_have_rank_1_and_not_nan():
    assert effective_rank(torch.zeros(6, 4)) == pytest.approx(1, abs=1e-4)


def test_spread_is_1_where_directions_cancel_out():
    assert spread(torch.cat((torch.eye(4), -torch.eye(4)))) == pytest.approx(1)
    assert spread(noise(4000, 16)) == pytest.approx(1, abs=0.01)


def test_spread_of_two_directions_worked_by_hand():
    # Mean of the two axes (.5, .5); each lies √.5 from it.
    assert spread(torch.eye(2)) == pytest.approx(math.sqrt(0.5))


def test_effective_rank_worked_by_hand():
    # Singular values 3, 1: p = 3/4, 1/4.
    z = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(z) == pytest.approx(math.exp(entropy), abs=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_counts_equal_directions(rank):
    left, right = (torch.linalg.qr(noise(size, rank, seed=size)).Q for size in (50, 8))
    assert effective_rank(left @ right.T) == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)], ids=str)
def test_effective_rank_is_that_of_the_singular_values(shape):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, shape[1])
    p = (sigma := torch.linalg.svdvals(z.double())) / sigma.sum() + 1e-7
    assert effective_rank(z) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_effective_rank_finds_dimensional_collapse_that_spread_does_not_see():
    thin = noise(500, 2) @ noise(2, 64, seed=1)
    assert spread(thin) > 0.95
    assert effective_rank(thin) < 2.1 < 50 < effective_rank(noise(500, 64))


def test_collapse_numbers_do_not_change_with_the_coordinate_system():
    z, other = noise(40, 6), noise(40, 6, seed=1)
    rotation = torch.linalg.qr(noise(6, 6, seed=2)).Q
    for number in (spread, effective_rank, uniformity):
        assert number(z @ rotation) == pytest.approx(number(z), rel=1e-4)
        assert number(z * 7) == pytest.approx(number(z), rel=1e-4)
    assert alignment(z @ rotation, other @ rotation) == pytest.approx(alignment(z, other), rel=1e-4)


def test_uniformity_equals_the_loop_over_pairs_also_in_blocks(monkeypatch):
    z = noise(9, 4)
    u = z / z.norm(dim=1, keepdim=True)
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(9) for j in range(9) if i != j]
    expected = math.log(sum(pairs) / len(pairs))
    assert uniformity(z) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("twofold.measure.collapse.row_blocks", lambda n, m: row_blocks(n, m, cells=20))
    assert uniformity(z) == pytest.approx(expected, abs=1e-5)


def test_rows_of_zeros_are_one_point():
    assert uniformity(torch.zeros(5, 3)) == pytest.approx(0, abs=1e-6)
    assert spread(torch.zeros(5, 3)) == 0


def test_uniformity_of_opposite_points_and_of_a_wide_sphere():
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8, abs=1e-2)
    assert uniformity(noise(500, 512)) == pytest.approx(-4, abs=0.05)
    with pytest.raises(DataError, match="at least two"):
        uniformity(torch.ones(1, 3))


def test_alignment_runs_from_0_to_4():
    z = noise(10, 4)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-6)
    assert alignment(z, -z) == pytest.approx(4, rel=1e-5)
    assert alignment(torch.eye(2), torch.eye(2).flip(0)) == pytest.approx(2)
    with pytest.raises(DataError, match=r"\(10, 4\) and \(9, 4\)"):
        alignment(z, z[:9])


# All positives.


def slow_order(scores: list[float], own: list[int]) -> list[int]:
    """The ranks of a query's positives where every tie goes to the other items."""
    order = sorted(range(len(scores)), key=lambda item: (-scores[item], item in own))
    return [1 + place for place, item in enumerate(order) if item in own]


def test_ranks_of_all_positives_equal_sorting_with_ties_against_them():
    scores = (noise(40, 25) * 2).round() / 2  # many ties
    generator = np.random.default_rng(0)
    positives = [generator.choice(25, generator.integers(1, 7), replace=False).tolist() for _ in range(40)]
    found = positive_ranks(scores, positives)
    for query, own in enumerate(positives):
        assert found.rank[found.query == query].tolist() == slow_order(scores[query].tolist(), own)
        assert found.place[found.query == query].tolist() == list(range(1, len(own) + 1))
    assert found.rank[found.place == 1].tolist() == first_ranks(scores, positives).tolist()


def test_average_precision_and_ndcg_worked_by_hand():
    # Positives at ranks 1 and 3 of four: (1/1 + 2/3)/2, and (1 + 1/log₂4)/(1 + 1/log₂3).
    found = positive_ranks(torch.tensor([[0.9, 0.8, 0.7, 0.1]]), [[0, 2]])
    assert average_precision(found).item() == pytest.approx((1 + 2 / 3) / 2)
    assert ndcg(found).item() == pytest.approx(1.5 / (1 + 1 / math.log2(3)))
    assert ndcg(found, k=2).item() == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_average_precision_and_ndcg_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, generator = noise(30, 50), np.random.default_rng(1)
    positives = [generator.choice(50, generator.integers(1, 20), replace=False).tolist() for _ in range(30)]
    found = positive_ranks(scores, positives)
    truth = np.array([[item in own for item in range(50)] for own in positives])
    expected = [metrics.average_precision_score(t, s) for t, s in zip(truth, scores.numpy(), strict=True)]
    assert average_precision(found).tolist() == pytest.approx(expected)
    expected = [metrics.ndcg_score(t[None], s[None], k=10) for t, s in zip(truth, scores.numpy(), strict=True)]
    assert ndcg(found).tolist() == pytest.approx(expected)


def test_with_one_positive_average_precision_is_one_over_its_rank():
    scores = noise(20, 30)
    found = positive_ranks(scores, [[i] for i in range(20)])
    assert average_precision(found).tolist() == pytest.approx((1 / found.rank.double()).tolist())


def test_a_collapsed_encoder_has_no_precision():
    found = positive_ranks(torch.ones(1, 100), [[3, 50]])
    assert found.rank.tolist() == [99, 100]
    assert ndcg(found).item() == 0
