"""A batch is a function of (seed, step)."""

import numpy as np
import pytest
import torch

from twofold import runtime
from twofold.data.loader import Batches, Choice, sharing
from twofold.errors import DataError, UsageError


def index(n=20, **options):
    return Batches({"at": np.arange(n)}, **{"batch": 4, "seed": 1, **options})


def epoch(batches, number, column="at"):
    steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
    return [value for step in steps for value in np.asarray(batches[step][column]).tolist()]


def test_an_epoch_visits_every_item_once_in_an_order_of_its_own():
    batches = index()
    first, second = epoch(batches, 0), epoch(batches, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != sorted(second) and first != epoch(index(seed=2), 0)
    assert batches.steps_per_epoch == 5 and index(23).steps_per_epoch == 5


def test_steps_may_be_asked_for_in_any_order():
    forward = {step: index()[step]["at"].tolist() for step in range(12)}
    backward = index()
    assert {step: backward[step]["at"].tolist() for step in reversed(range(12))} == forward


def test_columns_stay_together_and_keep_their_type(tmp_path):
    pixels = np.memmap(tmp_path / "p", np.uint16, "w+", shape=(8, 1, 2, 2))
    pixels[:] = np.arange(8)[:, None, None, None]
    columns = {
        "image": pixels,
        "feature": torch.arange(8.0)[:, None],
        "id": [str(number) for number in range(8)],
        "name": np.array([str(number) for number in range(8)]),
    }
    batch = Batches(columns, batch=4, seed=0)[1]
    assert batch["image"].dtype == torch.uint16 and batch["image"].shape == (4, 1, 2, 2)
    at = batch["feature"][:, 0].tolist()
    assert batch["image"][:, 0, 0, 0].tolist() == at
    assert batch["id"] == batch["name"] == [str(int(number)) for number in at]


def test_processes_share_out_the_batch_that_one_process_gets(monkeypatch):
    columns = {"at": np.arange(20), "text": [[f"{n}{c}" for c in "abc"] for n in range(20)]}
    whole = Batches(columns, batch=10, seed=3)[3]
    parts = []
    monkeypatch.setattr(runtime, "counts", lambda rows: [2, 3, 2, 3])
    for rank in range(4):
        monkeypatch.setattr(runtime, "world", lambda rank=rank: (rank, 4))
        parts.append(Batches(columns, batch=10, seed=3)[3])
    assert [len(part["at"]) for part in parts] == [2, 3, 2, 3]
    assert [value for part in parts for value in part["at"].tolist()] == whole["at"].tolist()
    assert [text for part in parts for text in part["text"]] == whole["text"]
    with pytest.raises(UsageError, match="each of the 4 processes needs an item"):
        Batches(columns, batch=3, seed=3)


# --- what is kept apart -----------------------------------------------------------------------------------------------


def batches_of(batches, number):
    return np.reshape(epoch(batches, number), (batches.steps_per_epoch, batches.batch))


def test_what_shares_a_name_never_meets_in_a_batch_and_is_visited_all_the_same():
    names = np.array(["a", "b", "a", "c", "a", "d", "b", "e", "f", "g", "h", "i"])
    batches = index(12, batch=4, apart=names)
    assert batches.steps_per_epoch == 3
    for number in range(50):
        visits = batches_of(batches, number)
        assert sorted(visits.flatten().tolist()) == list(range(12))
        assert all(len(set(names[batch])) == 4 for batch in visits)
    assert epoch(batches, 0) != epoch(batches, 1) != epoch(index(12, batch=4, apart=names, seed=2), 1)


def test_of_a_name_that_more_items_bear_than_there_are_batches_others_come_each_time():
    names = [0] * 30 + [1, 2, 3, 4, 5, 6]
    batches = index(36, batch=3, apart=names)
    # s batches hold min(30, s) + 6 items: as many as 3 s for s = 3, and fewer beyond
    assert batches.steps_per_epoch == 3
    count = np.zeros(36)
    for number in range(300):
        visits = batches_of(batches, number)
        assert all(len({names[item] for item in batch}) == 3 for batch in visits)
        count += np.bincount(visits.flatten(), minlength=36)
    assert (count[30:] == 300).all() and count[:30] == pytest.approx(30, abs=20)


def test_names_that_all_differ_change_nothing():
    assert epoch(index(23, apart=np.arange(23)), 2) == epoch(index(23), 2)


def test_sharing_links_what_has_an_entry_in_common_over_any_number_of_steps():
    texts = [["x", "y"], ["y"], ["z"], ["w", "q"], ["q"]]
    files = [["1"], ["2"], ["2"], ["3"], ["4"]]
    assert sharing(texts, files).tolist() == [0, 0, 0, 3, 3]
    assert sharing(texts).tolist() == [0, 0, 2, 3, 3]
    chain = [[f"{i}", f"{i + 1}"] for i in range(40)]
    assert set(sharing(chain[::-1]).tolist()) == {0}
    assert sharing([["1"], ["a"]], [["b"], ["1"]]).tolist() == [0, 1], "an entry of another column is another"


# --- how often --------------------------------------------------------------------------------------------------------


def test_a_share_is_the_part_of_the_epochs_in_which_an_item_is_visited():
    shares = np.array([1.0, 1.0, 0.5, 0.25, 0.1, 0.0] * 10)
    batches = index(60, batch=4, shares=shares)
    assert batches.steps_per_epoch == int(shares.sum()) // 4 == 7
    seen = []
    for number in range(200):
        visits = epoch(batches, number)
        assert len(set(visits)) == len(visits) == 28
        seen.append(np.bincount(batches._epoch(number), minlength=60))
    share = np.mean(seen, 0)
    assert (share[shares == 1] == 1).all() and (share[shares == 0] == 0).all()
    assert share == pytest.approx(shares, abs=0.015), "spread evenly, not drawn anew: a coin would stray by .1"
    other = index(60, batch=4, shares=shares, seed=5)
    assert set(other._epoch(0)) != set(batches._epoch(0))
    assert epoch(index(60, batch=4, shares=shares), 7) == epoch(batches, 7)


def test_shares_and_names_go_together():
    draw = np.random.default_rng(0)
    names, shares = draw.integers(0, 25, 80), draw.random(80)
    batches = Batches({"at": np.arange(80)}, batch=6, seed=0, apart=names, shares=shares)
    for number in range(40):
        visits = batches_of(batches, number)
        assert len(set(visits.flatten().tolist())) == visits.size
        assert all(len(set(names[batch])) == 6 for batch in visits)


def test_a_weighted_choice_draws_in_proportion_and_never_what_weighs_nothing():
    weights = np.array([1.0, 0.5, 0.0, 0.0, 0.25, 0.25])
    batches = Batches({"x": Choice(np.arange(6), np.array([0, 3, 6]), weights)}, batch=2, seed=0)
    count = np.bincount([int(x) for step in range(1500) for x in batches[step]["x"]], minlength=6) / 1500
    assert count == pytest.approx([2 / 3, 1 / 3, 0, 0, 0.5, 0.5], abs=0.04)
    assert count[2] == count[3] == 0


def test_columns_of_other_numbers_of_candidates_draw_apart():
    columns = {
        "view": Choice(np.tile(np.arange(4), 8), np.arange(9) * 4),
        "text": Choice(np.tile(np.arange(5), 8), np.arange(9) * 5),
    }
    batches = Batches(columns, batch=8, seed=0)
    met = {pair for step in range(100) for pair in zip(*(batches[step][n].tolist() for n in columns), strict=True)}
    assert len(met) == 20, "every view meets every text"


def test_of_several_captions_each_visit_draws_one():
    texts = [["a0", "a1", "a2"], ["b0"], ["c0", "c1"], ["d0"]]
    batches = Batches({"text": texts, "at": np.arange(4)}, batch=4, seed=0)
    seen = set()
    for step in range(60):
        batch = batches[step]
        assert all(text in texts[at] for text, at in zip(batch["text"], batch["at"].tolist(), strict=True))
        seen |= set(batch["text"])
    assert seen == {text for each in texts for text in each}


def test_a_choice_of_features_draws_what_the_captions_draw():
    texts = [["a0", "a1", "a2"], ["b0"], ["c0", "c1"], ["d0", "d1"]]
    flat = [text for each in texts for text in each]
    features = Choice(torch.arange(len(flat)), np.array([0, 3, 4, 6, 8]))
    batches = Batches({"text": texts, "feature": features}, batch=2, seed=0)
    for step in range(40):
        batch = batches[step]
        assert [flat[row] for row in batch["feature"].tolist()] == batch["text"]


def test_a_choice_is_uniform():
    batches = Batches({"x": Choice(np.arange(5), np.array([0, 5]))}, batch=1, seed=0)
    count = np.bincount([int(batches[step]["x"]) for step in range(1000)])
    assert count == pytest.approx(200, abs=50)


def test_too_few_items_and_columns_of_other_lengths_say_so():
    with pytest.raises(DataError, match="A batch of 64 needs as many items; there are 20"):
        index(batch=64)
    with pytest.raises(DataError, match="A batch of 4 needs as many distinct items; there are 3"):
        index(4, apart=[0, 0, 1, 2])
    with pytest.raises(DataError, match="there are 8, 3 of them in an epoch"):
        index(8, shares=[0.375] * 8)
    with pytest.raises(DataError, match=r"a number from 0 to 1; got 1\.5"):
        index(4, shares=[1, 1, 1.5, 1])
    with pytest.raises(DataError, match="Item 1 has no candidate"):
        Choice(np.arange(2), np.array([0, 1, 2]), np.array([1.0, 0.0]))
    with pytest.raises(DataError, match="one length"):
        Batches({"a": np.arange(3), "b": [1, 2]}, batch=1, seed=0)
    with pytest.raises(DataError, match="'text': Item 1 has no candidate"):
        Batches({"text": [["a"], []]}, batch=1, seed=0)
    with pytest.raises(DataError, match="Offsets must rise from 0 to at most 2"):
        Choice(np.arange(2), np.array([0, 3]))
    with pytest.raises(IndexError):
        index()[-1]


def by_class(classes, **options):
    columns = {"at": np.arange(len(classes)), "label": np.asarray(classes)}
    return Batches(columns, **{"batch": 8, "seed": 1, "each": 4, "classes": classes, **options})


def test_of_each_class_in_a_batch_there_are_several():
    classes = np.repeat(np.arange(10), 12)
    batches = by_class(classes, batch=24)
    assert batches.steps_per_epoch == 5
    for step in range(20):
        count = np.bincount(batches[step]["label"], minlength=10)
        assert not (count % 4).any() and (count > 0).sum() > 1
    for number in range(4):
        assert sorted(epoch(batches, number)) == list(range(120))
    assert epoch(batches, 0) != epoch(batches, 1) != epoch(by_class(classes, batch=24, seed=2), 1)
    runs = [frozenset(run) for number in range(4) for run in np.reshape(epoch(batches, number), (-1, 4)).tolist()]
    assert len(set(runs)) > 100, "the same items do not always come together"


def test_a_class_that_does_not_divide_is_filled_up_with_its_own():
    classes = [0] * 9 + [1] * 4 + [2] * 2 + [3]
    batches = by_class(classes, batch=4)
    assert batches.steps_per_epoch == 3 + 1 + 1 + 1
    visits = np.array([np.bincount(epoch(batches, number), minlength=16) for number in range(60)])
    assert (visits >= 1).all() and (visits[:, :13] <= 2).all()
    assert (visits[:, 13:15] == 2).all() and (visits[:, 15] == 4).all()
    assert visits[:, :9].mean(0) == pytest.approx(12 / 9, abs=0.25), "in the long run all items of a class alike"
    assert all(len(set(batches[step]["label"].tolist())) == 1 for step in range(60))


def test_batches_by_class_are_a_function_of_the_step_and_shared_out(monkeypatch):
    classes = np.arange(40) % 5
    forward = [by_class(classes)[step]["at"].tolist() for step in range(12)]
    backward = by_class(classes)
    assert [backward[step]["at"].tolist() for step in reversed(range(12))] == forward[::-1]
    parts = []
    monkeypatch.setattr(runtime, "counts", lambda rows: [2, 3, 3])
    for rank in range(3):
        monkeypatch.setattr(runtime, "world", lambda rank=rank: (rank, 3))
        parts += by_class(classes)[7]["at"].tolist()
    assert parts == forward[7]


def test_runs_that_make_no_batch_say_so():
    with pytest.raises(UsageError, match="batch=8 is not made of runs of each=3"):
        by_class([0, 1] * 8, each=3)
    with pytest.raises(UsageError, match="by class, or by what is kept apart"):
        by_class([0, 1] * 8, apart=range(16))
    with pytest.raises(DataError, match="one length"):
        Batches({"at": np.arange(3)}, batch=1, seed=0, classes=[0, 1])


# --- neighbours -------------------------------------------------------------------------------------------------------

CLANS = np.arange(96) % 16  # six items each
BESIDE = np.array(
    [[other for other in range(96) if CLANS[other] == CLANS[item] and other != item] for item in range(96)]
)


def met(batches, number):
    """How many of its clan an item has in its batch, on average over an epoch."""
    tables = np.array(epoch(batches, number)).reshape(-1, batches.batch)
    return np.mean([np.sum(CLANS[row] == CLANS[item]) - 1 for row in tables for item in row])


def test_neighbours_meet_and_the_epoch_visits_what_it_would_have():
    plain, near = index(96, batch=12), index(96, batch=12, beside=lambda: BESIDE, each=6)
    assert sorted(epoch(near, 0)) == sorted(epoch(near, 3)) == list(range(96)) and epoch(near, 0) != epoch(near, 1)
    assert met(plain, 0) < 1.2 and met(near, 0) > 3, "by chance 5 × 11/95"
    assert 0.6 < met(index(96, batch=12, beside=lambda: BESIDE, each=2), 0) - met(plain, 0) < 1.6
    nobody = index(96, batch=12, beside=lambda: np.full((96, 3), -1), each=6)
    batches = [sorted(each[step]["at"].tolist()) for each in (plain, nobody) for step in range(8)]
    assert sorted(batches[:8]) == sorted(batches[8:]), "without neighbours, batches are what they were"


def test_neighbours_that_are_kept_apart_do_not_meet_and_shares_stay_as_they_are():
    twins, shares = np.arange(96) // 32 * 16 + CLANS, np.where(np.arange(96) % 3, 1.0, 0.5)  # pairs of a clan
    options = {"apart": twins, "shares": shares, "batch": 12}
    plain, near = index(96, **options), index(96, beside=lambda: BESIDE, each=6, **options)
    for number in range(6):
        assert sorted(epoch(near, number)) == sorted(epoch(plain, number))
        for step in range(number * near.steps_per_epoch, (number + 1) * near.steps_per_epoch):
            batch = near[step]["at"].numpy()
            assert len({*twins[batch]}) == len(batch)
    assert met(near, 0) > 2 * met(plain, 0), "of three names a clan, at most two others"


def test_neighbours_are_those_of_the_epochs_beginning():
    now = [np.full((96, 5), -1)]
    batches = index(96, batch=12, beside=lambda: now[0], each=6)
    first = epoch(batches, 0)
    now[0] = torch.from_numpy(BESIDE)
    assert epoch(batches, 0) == first
    assert epoch(batches, 1) == epoch(index(96, batch=12, beside=lambda: BESIDE, each=6), 1)
    with pytest.raises(UsageError, match="not by both"):
        index(96, batch=12, beside=lambda: BESIDE, classes=CLANS)
