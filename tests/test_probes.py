"""The probes against slow votes and scikit-learn, at chance, and blind to the test labels."""

import numpy as np
import pytest
import torch

from twofold.errors import DataError, UsageError
from twofold.measure import probes
from twofold.measure.metrics import row_blocks
from twofold.measure.probes import knn_probe, linear_probe


def clusters(n: int, seed: int, *, classes: int = 4, d: int = 12, apart: float = 0.7):
    centres = np.random.default_rng(99).normal(size=(classes, d))
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, n)
    return (apart * centres[y] + generator.normal(size=(n, d))).astype(np.float32), y


def slow_vote(bank, labels, query, k: int, temperature: float) -> int:
    cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
    votes: dict[int, float] = {}
    for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[labels[i]] = votes.get(labels[i], 0.0) + np.exp(cosines[i] / temperature)
    return max(sorted(votes), key=votes.__getitem__)


@pytest.fixture(autouse=True)
def one_thread():
    """Sets this small are slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


both = pytest.mark.parametrize("probe", [knn_probe, linear_probe])


# Neighbours.


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 0.5)])
def test_knn_equals_the_vote_taken_one_query_at_a_time(k, temperature):
    (bank, y), (queries, answers) = clusters(80, 1), clusters(40, 2)
    found = knn_probe(bank, y, queries, answers, k=k, temperature=temperature)
    expected = [slow_vote(bank.astype(float), y, query.astype(float), k, temperature) for query in queries]
    assert found.predicted.tolist() == expected
    assert found.accuracy.value == pytest.approx(np.mean(expected == answers))


def test_knn_in_blocks_is_knn(monkeypatch):
    (bank, y), (queries, answers) = clusters(80, 1), clusters(40, 2)
    whole = knn_probe(bank, y, queries, answers)
    monkeypatch.setattr(probes, "row_blocks", lambda n, m: row_blocks(n, m, cells=250))
    assert knn_probe(bank, y, queries, answers).predicted.tolist() == whole.predicted.tolist()


def test_knn_is_cosine_and_not_euclidean():
    bank, y = np.array([[10.0, 0.0], [0.0, 0.1]]), np.array([0, 1])
    query = np.array([[0.6, 0.5]])  # nearer to the short vector by distance, to the long one by angle
    assert knn_probe(bank, y, query, np.array([0]), k=1).predicted.tolist() == [0]


def test_near_neighbours_outvote_many_far_ones_only_at_a_low_temperature():
    bank = np.array([[1.0, 0.0], [0.5, 0.8], [0.5, -0.8]])
    y, query, answer = np.array([0, 1, 1]), np.array([[1.0, 0.0]]), np.array([0])
    assert knn_probe(bank, y, query, answer, k=3, temperature=0.07).accuracy.value == 1
    assert knn_probe(bank, y, query, answer, k=3, temperature=10).accuracy.value == 0


def test_votes_do_not_overflow_at_a_tiny_temperature():
    (bank, y), (queries, answers) = clusters(80, 1), clusters(40, 2)
    tiny = knn_probe(bank, y, queries, answers, k=20, temperature=1e-4)
    assert tiny.predicted.tolist() == knn_probe(bank, y, queries, answers, k=1).predicted.tolist()


def test_a_bank_smaller_than_k_votes_as_a_whole():
    (bank, y), (queries, answers) = clusters(9, 1), clusters(40, 2)
    expected = knn_probe(bank, y, queries, answers, k=9)
    assert knn_probe(bank, y, queries, answers, k=200).predicted.tolist() == expected.predicted.tolist()


# Linear.


@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_logistic_regression_agrees_with_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (z, y), (test, _) = clusters(150, 1), clusters(60, 2)
    mean, scale = z.mean(0), z.std(0)
    reference = linear_model.LogisticRegression(C=1 / (l2 * len(z)), tol=1e-8, max_iter=2000)
    reference.fit((z - mean) / scale, y)
    (ours,) = probes._regressions(torch.from_numpy(z), torch.from_numpy(y), 4, [l2])
    shares = ours(torch.from_numpy(test)).softmax(1).numpy()
    np.testing.assert_allclose(shares, reference.predict_proba((test - mean) / scale), atol=2e-3)


def test_a_warm_start_ends_where_a_cold_one_does():
    z, y = (torch.from_numpy(x) for x in clusters(100, 1))
    *_, warm = probes._regressions(z, y, 4, [1.0, 0.1, 0.01])
    (cold,) = probes._regressions(z, y, 4, [0.01])
    torch.testing.assert_close(warm(z).softmax(1), cold(z).softmax(1), atol=2e-3, rtol=0)


def test_the_penalty_is_the_one_that_validates_best_and_the_test_labels_cannot_change_it():
    train, val, (test, answers) = clusters(60, 1, d=40), clusters(80, 2, d=40), clusters(80, 3, d=40)
    found = linear_probe(*train, test, answers, val=val)
    assert found.validation[found.l2] == max(found.validation.values())
    assert len(set(found.validation.values())) > 1
    spoiled = linear_probe(*train, test, np.roll(answers, 1), val=val)
    assert (spoiled.l2, spoiled.validation) == (found.l2, found.validation)
    assert spoiled.predicted.tolist() == found.predicted.tolist()
    assert spoiled.accuracy.value < found.accuracy.value


def test_validation_rows_are_not_trained_on():
    train, val, (test, answers) = clusters(60, 1), clusters(30, 2), clusters(40, 3)
    found = linear_probe(*train, test, answers, val=val, l2=(0.01,))
    assert found.predicted.tolist() == linear_probe(*train, test, answers, val=train, l2=(0.01,)).predicted.tolist()


def test_equally_good_penalties_leave_the_strongest():
    train, val, test = clusters(60, 1, apart=5), clusters(30, 2, apart=5), clusters(30, 3, apart=5)
    found = linear_probe(*train, *test, val=val, l2=(1e-3, 0.1, 1e-2))
    assert (found.l2, set(found.validation.values())) == (0.1, {1.0})


def test_without_validation_a_fifth_of_the_training_rows_chooses_and_all_train():
    kept, held = probes._hold_out(50, torch.Generator().manual_seed(0))
    assert (len(kept), len(held)) == (40, 10)
    assert sorted(torch.cat((kept, held)).tolist()) == list(range(50))
    (z, y), test = clusters(50, 1), clusters(40, 2)
    found = linear_probe(z, y, *test, l2=(0.01,))
    assert found.predicted.tolist() == linear_probe(z, y, *test, val=(z, y), l2=(0.01,)).predicted.tolist()


def test_the_scale_of_a_feature_and_a_constant_feature_do_not_matter():
    (z, y), (test, answers) = clusters(100, 1), clusters(60, 2)
    found = linear_probe(z, y, test, answers)
    scales = np.logspace(-2, 2, z.shape[1], dtype=np.float32)

    def odd(x):
        return np.concatenate((x * scales + 3, np.full((len(x), 1), 700.1, np.float32)), axis=1)

    again = linear_probe(odd(z), y, odd(test), answers)
    assert again.accuracy.value == pytest.approx(found.accuracy.value, abs=0.04)
    assert again.l2 == found.l2


def test_the_linear_probe_runs_where_gradients_are_off():
    (z, y), test = clusters(50, 1, apart=3), clusters(40, 2, apart=3)
    with torch.no_grad():
        assert linear_probe(z, y, *test, l2=(0.01,)).accuracy.value > 0.9


# Both.


@both
def test_probes_read_clusters_and_score_chance_without_them(probe):
    clear = probe(*clusters(200, 1, apart=3), *clusters(200, 2, apart=3))
    assert clear.accuracy.value > 0.95
    blind = probe(*clusters(200, 1, apart=0), *clusters(200, 2, apart=0))
    assert blind.accuracy.low <= blind.chance + 0.03
    assert blind.accuracy.low < blind.accuracy.value < blind.accuracy.high
    assert blind.chance == np.bincount(clusters(200, 2)[1]).max() / 200


@both
def test_rows_without_a_label_are_predicted_but_neither_learnt_from_nor_counted(probe):
    (z, y), (test, answers) = clusters(80, 1, apart=3), clusters(40, 2, apart=3)
    found = probe(z[:60], y[:60], test, answers)
    hidden, some = np.where(np.arange(80) < 60, y, -1), np.where(np.arange(40) < 30, answers, -1)
    again = probe(z, hidden, test, some)
    assert again.predicted.tolist() == found.predicted.tolist()
    assert again.accuracy.value == np.mean((found.predicted == answers)[:30])


@both
def test_labels_need_not_be_consecutive_and_unseen_ones_are_misses(probe):
    (z, y), (test, answers) = clusters(80, 1, apart=3), clusters(40, 2, apart=3)
    found, spread = probe(z, y, test, answers), probe(z, 100 * y + 7, test, 100 * answers + 7)
    assert spread.predicted.tolist() == (100 * found.predicted + 7).tolist()
    assert spread.accuracy == found.accuracy
    assert probe(z, y, test, np.full(40, 77)).accuracy.value == 0


@both
def test_the_same_call_gives_the_same_result(probe):
    data = (*clusters(60, 1), *clusters(40, 2))
    one, two = probe(*data), probe(*data)
    assert one.accuracy == two.accuracy
    assert one.predicted.tolist() == two.predicted.tolist()


@both
def test_sets_that_do_not_fit_are_named(probe):
    (z, y), (test, answers) = clusters(20, 1), clusters(10, 2)
    with pytest.raises(DataError, match="train set has 20 embeddings and 19 labels"):
        probe(z, y[:19], test, answers)
    with pytest.raises(DataError, match="test set has 10 embeddings and 9 labels"):
        probe(z, y, test, answers[:9])
    with pytest.raises(DataError, match="test embeddings are 5 wide and those of training 12"):
        probe(z, y, test[:, :5], answers)
    with pytest.raises(DataError, match="No item of the train set has a label"):
        probe(z, np.full(20, -1), test, answers)


def test_settings_that_cannot_be_are_refused():
    (z, y), (test, answers) = clusters(20, 1), clusters(10, 2)
    for k, temperature in [(0, 0.07), (5, 0.0)]:
        with pytest.raises(UsageError, match="k ≥ 1 and temperature > 0"):
            knn_probe(z, y, test, answers, k=k, temperature=temperature)
    for l2 in [(), (0.0, 1.0)]:
        with pytest.raises(UsageError, match="at least one l2, all > 0"):
            linear_probe(z, y, test, answers, l2=l2)
    with pytest.raises(DataError, match=r"pass val="):
        linear_probe(z[:1], y[:1], test, answers)
