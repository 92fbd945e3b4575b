"""The attentive probe reads what one token says, which an average over tokens does not show."""

import numpy as np
import pytest
import torch

from twofold import runtime
from twofold.errors import DataError, UsageError
from twofold.measure.probes import attentive_probe, linear_probe

N, TOKENS, DIM = 600, 8, 6


def one_speaks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose second column is ±1; the label is that of the one token that is marked in the first column."""
    draw = np.random.default_rng(seed)
    x = draw.normal(scale=0.3, size=(N, TOKENS, DIM)).astype(np.float32)
    said, who = draw.choice((-1, 1), (N, TOKENS)), draw.integers(TOKENS, size=N)
    x[:, :, 1] += said
    x[np.arange(N), who, 0] += 3
    return x, (said[np.arange(N), who] > 0).astype(np.int64)


TRAIN, TEST = one_speaks(0), one_speaks(1)


def probe(train=TRAIN, test=TEST, **options):
    return attentive_probe(*train, *test, **{"epochs": 80, "l2": (1e-2, 1e-4)} | options)


def test_it_finds_the_token_that_tells_where_the_average_does_not():
    averaged = linear_probe(TRAIN[0].mean(1), TRAIN[1], TEST[0].mean(1), TEST[1])
    found = probe()
    assert averaged.accuracy.value < 0.75
    assert found.accuracy.value > 0.95
    assert found.validation is not None and found.validation.keys() == {1e-2, 1e-4} and found.l2 in found.validation


def test_where_all_tokens_are_the_same_it_is_a_linear_probe():
    train, test = (
        (np.repeat(x[:, :1], TOKENS, 1), (x[:, 0] @ np.arange(DIM) > 3).astype(int)) for x, _ in (TRAIN, TEST)
    )
    linear = linear_probe(train[0].mean(1), train[1], test[0].mean(1), test[1])
    assert linear.accuracy.value > 0.9
    assert abs(probe(train, test).accuracy.value - linear.accuracy.value) < 0.03


def test_the_order_of_tokens_says_nothing():
    order = np.random.default_rng(2).permutation(TOKENS)
    again = probe(test=(TEST[0][:, order], TEST[1]))
    np.testing.assert_array_equal(probe().predicted, again.predicted)


def test_scale_and_offset_of_tokens_say_nothing():
    factor, offset = np.float32([1e3, 1, 1e-3, 5, 1, 1]), np.float32([0, 50, 0, 0, -7, 0])
    moved = [(x * factor + offset, y) for x, y in (TRAIN, TEST)]
    assert np.mean(probe(*moved).predicted == probe().predicted) > 0.99


def test_labels_of_minus_one_are_not_learnt_from_and_classes_keep_their_names():
    names = np.where(TRAIN[1] == 1, 7, 3)
    some = np.where(np.arange(N) % 2, names, -1)
    hidden = TRAIN[0].copy()
    hidden[some < 0] = 1e6  # would ruin any classifier
    found = probe((hidden, some), (TEST[0], np.where(TEST[1] == 1, 7, 3)))
    assert set(found.predicted) == {3, 7}
    assert found.accuracy.value > 0.9


def test_the_generator_decides_and_torchs_own_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (probe(draw=runtime.generator(1), epochs=2) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(first.predicted, again.predicted)


def test_validation_of_ones_own_chooses_and_nothing_is_held_out():
    found = probe(val=TEST)
    assert found.validation is not None
    assert found.validation[found.l2] == pytest.approx(found.accuracy.value)  # the very same probe, on the same rows


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="tokens, dim"):
        probe((TRAIN[0][:, 0], TRAIN[1]))
    with pytest.raises(DataError, match="wide"):
        probe(test=(TEST[0][:, :4], TEST[1]))
    with pytest.raises(UsageError, match="head"):
        probe(heads=0)
