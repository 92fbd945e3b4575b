"""Gap and hubs against loops and numbers by hand; remedies against their papers' formulas in float64."""

import json

import numpy as np
import pytest

from twofold.errors import UsageError
from twofold.measure.hubness import Remedy, compared, gap, hubness, remedied, remedies
from twofold.measure.retrieval import retrieval


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hubby(n: int = 300, d: int = 24, seed: int = 0):
    """Queries that all lean one way, and items of which some lie in that way: these are hubs."""
    draw = np.random.default_rng(seed)
    lean = draw.normal(size=d)
    items = draw.normal(size=(n, d)) + np.where(np.arange(n)[:, None] < n // 6, 0.7, 0.0) * lean
    queries = items + 1.0 * draw.normal(size=(n, d)) + 0.7 * lean
    return queries.astype(np.float32), items.astype(np.float32), [[i] for i in range(n)]


# The gap.


def test_the_gap_worked_by_hand():
    # Means (1, 0) and (0, 1): √2 apart, and that is all of every squared distance of 2.
    found = gap(np.array([[1.0, 0], [3, 0]]), np.array([[0, 2.0]]))
    assert found.distance == pytest.approx(np.sqrt(2))
    assert found.share == pytest.approx(1)
    assert found.norms == pytest.approx((1, 1))


def test_one_cloud_has_no_gap():
    cloud = np.random.default_rng(0).normal(size=(50, 6))
    found = gap(cloud, 5 * cloud[::-1].copy())
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.share == pytest.approx(0, abs=1e-6)


def test_the_share_is_of_the_mean_squared_distance_between_any_two():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(30, 5)) + 1, draw.normal(size=(40, 5)) - 0.5
    squared = [np.sum((x - y) ** 2) for x in unit(a) for y in unit(b)]
    found = gap(a, b)
    assert found.share == pytest.approx(found.distance**2 / np.mean(squared), rel=1e-5)


# Hubs.


def test_occurrences_equal_a_loop_over_queries():
    queries, items, _ = hubby()
    found = hubness(queries, items, k=7, worst=3)
    counts = np.zeros(len(items))
    for query in unit(queries):
        counts[np.argsort(-(unit(items) @ query))[:7]] += 1
    mean, deviation = counts.mean(), counts.std()
    assert found.skewness == pytest.approx(np.mean(((counts - mean) / deviation) ** 3), rel=1e-9)
    assert found.anti_hubs == (counts == 0).mean()
    assert [count for _, count in found.hubs] == sorted(counts, reverse=True)[:3]
    assert all(counts[row] == count for row, count in found.hubs)
    assert found.mean == pytest.approx(counts.mean()) == pytest.approx(7)


def test_skewness_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    queries, items, _ = hubby(120)
    counts = np.bincount(np.argsort(-(unit(queries) @ unit(items).T), axis=1)[:, :5].ravel(), minlength=120)
    assert hubness(queries, items, k=5).skewness == pytest.approx(stats.skew(counts), rel=1e-9)


def test_one_item_that_everybody_finds_worked_by_hand():
    # Four queries, all nearest to item 0: occurrences 4, 0, 0, 0, whose skewness is 2/√3.
    items = np.eye(4)
    found = hubness(np.array([[1.0, 0.1, 0, 0]] * 4), items, k=1)
    assert found.hubs[0] == (0, 4)
    assert found.anti_hubs == 0.75
    assert found.skewness == pytest.approx(2 / np.sqrt(3))


def test_where_each_query_finds_its_own_item_there_are_no_hubs():
    found = hubness(np.eye(6), np.eye(6), k=1)
    assert (found.skewness, found.anti_hubs) == (0.0, 0.0)


# Remedies.


def test_nnn_is_the_cosine_less_alpha_times_the_mean_of_the_best_of_the_bank():
    queries, items, _ = hubby(40)
    bank = unit(np.random.default_rng(1).normal(size=(25, 24)))
    found = Remedy("nnn", bank.astype(np.float32), strength=0.6, neighbours=4).scores(queries, items)
    for q, query in enumerate(unit(queries)):
        for g, item in enumerate(unit(items)):
            best = sorted((item @ asked for asked in bank), reverse=True)[:4]
            assert found[q, g] == pytest.approx(query @ item - 0.6 * np.mean(best), abs=1e-5)


def test_qb_norm_orders_as_the_inverted_softmax_does():
    queries, items, _ = hubby(40)
    bank = unit(np.random.default_rng(1).normal(size=(25, 24)))
    beta = 15.0
    found = Remedy("qb-norm", bank.astype(np.float32), strength=beta).scores(queries, items)
    inverted = np.exp(beta * unit(queries) @ unit(items).T) / np.exp(beta * bank @ unit(items).T).sum(0)
    np.testing.assert_array_equal(np.argsort(-found, 1), np.argsort(-inverted, 1))
    np.testing.assert_allclose(found, np.log(inverted * len(bank)) / beta, atol=1e-5)


def test_centring_takes_each_sides_mean_off():
    queries, items, _ = hubby(40)
    means = np.stack([unit(queries).mean(0), unit(items).mean(0)])
    found = Remedy("centring", means.astype(np.float32)).scores(queries, items)
    np.testing.assert_allclose(found, unit(unit(queries) - means[0]) @ unit(unit(items) - means[1]).T, atol=1e-5)


def test_a_bank_that_likes_all_items_alike_changes_no_order():
    items = np.eye(8, dtype=np.float32)
    bank = np.full((3, 8), 1 / np.sqrt(8), np.float32)
    queries = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    plain = np.argsort(-(unit(queries) @ items.T), 1)
    for remedy in (Remedy("nnn", bank, strength=1.0, neighbours=2), Remedy("qb-norm", bank, strength=20.0)):
        np.testing.assert_array_equal(np.argsort(-remedy.scores(queries, items), 1), plain)


def test_what_a_remedy_gains_is_what_retrieval_measures_by_its_scores():
    queries, items, positives = hubby()
    bank = unit(hubby(seed=5)[0]).astype(np.float32)
    remedy = Remedy("nnn", bank, strength=0.5, neighbours=8)
    scores = remedy.scores(queries, items).astype(np.float64)
    ranks = [1 + sum(scores[i] > scores[i, i] + 1e-12) for i in range(len(items))]
    before, after = retrieval(queries, items, positives), remedied(remedy, queries, items, positives)
    assert after.ranks.tolist() == ranks
    gain = compared(before, after)
    assert gain.map.value == pytest.approx(after.map.value - before.map.value)
    assert gain.recall[1].value == pytest.approx(after.recall[1].value - before.recall[1].value)


def test_remedies_help_where_there_are_hubs_and_come_in_order_of_their_gain():
    queries, items, positives = hubby(400)
    banks = hubby(400, seed=5)[:2]
    lean = np.random.default_rng(0).normal(size=24)  # the same direction for the bank as for the queries
    banks = (np.random.default_rng(7).normal(size=(400, 24)) * 1.4 + 0.7 * lean, banks[1])
    found = remedies(queries, items, positives, banks=banks, split="val")
    gains = [remedy.gain.map.value for remedy in found]
    assert gains == sorted(gains, reverse=True)
    best = next(remedy for remedy in found if remedy.kind == "nnn")
    assert best.gain.map.low > 0
    assert best.gain.split == "val"
    assert hubness(queries, items, remedy=best).skewness < hubness(queries, items).skewness


def test_a_remedy_is_the_same_after_a_journey_through_json():
    queries, items, positives = hubby(60)
    for before in remedies(queries, items, positives, banks=hubby(80, seed=2)[:2], split="val"):
        after = Remedy.read(json.loads(json.dumps(before.record())))
        np.testing.assert_array_equal(after.scores(queries, items), before.scores(queries, items))
        assert after.gain == before.gain


def test_a_remedy_that_does_not_exist_is_named():
    queries, items, positives = hubby(10)
    with pytest.raises(UsageError, match="Did you mean 'nnn'"):
        remedies(queries, items, positives, banks=(queries, items), kinds=["nn"])
