"""Retrieval against a loop over queries, at chance, and in blocks."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twofold.errors import DataError, UsageError
from twofold.measure.retrieval import retrieval


def captioned(pictures: int = 12, captions: int = 5, d: int = 8, seed: int = 0):
    """Pictures, noisy captions of each, and who belongs to whom in both directions."""
    generator = np.random.default_rng(seed)
    images = generator.normal(size=(pictures, d)).astype(np.float32)
    owner = np.repeat(np.arange(pictures), captions)
    texts = images[owner] + 0.9 * generator.normal(size=(len(owner), d)).astype(np.float32)
    return images, texts, owner, [np.flatnonzero(owner == i).tolist() for i in range(pictures)]


def slow_ranks(queries, gallery, positives) -> list[int]:
    ranks = []
    for query, own in zip(queries.astype(float), positives, strict=True):
        cosines = [query @ item / np.linalg.norm(query) / np.linalg.norm(item) for item in gallery.astype(float)]
        order = sorted(range(len(gallery)), key=lambda item: -cosines[item])
        ranks.append(1 + min(order.index(item) for item in own))
    return ranks


@pytest.mark.parametrize("cells", [1, 40, 2**24])
def test_both_directions_equal_the_loop_whatever_the_block(cells):
    images, texts, owner, captions_of = captioned()
    for queries, gallery, positives in [(texts, images, [[i] for i in owner]), (images, texts, captions_of)]:
        found = retrieval(queries, gallery, positives, cells=cells)
        expected = np.array(slow_ranks(queries, gallery, positives))
        assert found.ranks.tolist() == expected.tolist()
        assert found.median_rank == np.median(expected)
        assert {k: interval.value for k, interval in found.recall.items()} == {
            k: pytest.approx((expected <= k).mean()) for k in (1, 5, 10)
        }
        assert found.gallery == len(gallery)


def test_no_table_of_scores_is_larger_than_the_cells_allowed():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    with Watch():
        retrieval(x, x, [[i] for i in range(300)], cells=3000)
    assert 2000 < largest <= 3000


def test_a_copy_of_the_gallery_finds_itself():
    x = np.random.default_rng(0).normal(size=(30, 16))
    found = retrieval(3 * x, x, [[i] for i in range(30)])
    assert found.recall[1] == (1.0, 1.0, 1.0)
    assert found.median_rank == 1


def test_unrelated_embeddings_score_the_chance_level():
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(3000, 16)), generator.normal(size=(60, 16))
    positives = [generator.choice(60, size, replace=False).tolist() for size in generator.integers(1, 6, 3000)]
    found = retrieval(queries, gallery, positives, draw=torch.Generator().manual_seed(0))
    for k, interval in found.recall.items():
        assert interval.low - 0.01 <= found.chance[k] <= interval.high + 0.01


def test_chance_averages_over_queries_with_one_and_with_two_positives():
    # Gallery of 4: one positive 1/4; two positives 1/2; listing one twice adds nothing.
    found = retrieval(np.eye(4)[:3], np.eye(4), [[0], [1, 2], [2, 2]], ks=(1,))
    assert found.chance == {1: pytest.approx((1 / 4 + 1 / 2 + 1 / 4) / 3)}


def test_a_collapsed_encoder_does_not_score():
    assert retrieval(np.ones((6, 4)), np.ones((6, 4)), [[i] for i in range(6)], ks=(1, 5)).recall[5].value == 0


def test_a_rotation_of_both_sides_does_not_matter():
    images, texts, owner, _ = captioned()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0].astype(np.float32)
    positives = [[i] for i in owner]
    turned = retrieval(texts @ rotation, images @ rotation, positives)
    assert turned.ranks.tolist() == retrieval(texts, images, positives).ranks.tolist()


def test_captions_grouped_by_picture_widen_the_interval():
    # All five captions of a picture are the same: 80 decisions look like 400.
    images, _, owner, _ = captioned(pictures=80)
    same = (images + 1.2 * np.random.default_rng(3).normal(size=images.shape))[owner]
    positives = [[i] for i in owner]
    apart, together = (retrieval(same, images, positives, groups=groups).recall[1] for groups in (None, owner))
    assert apart.value == together.value
    assert together.high - together.low > 1.7 * (apart.high - apart.low)


def test_what_does_not_fit_is_named():
    x = np.eye(4)
    with pytest.raises(DataError, match="widths 4 and 3"):
        retrieval(x, x[:, :3], [[0]] * 4)
    with pytest.raises(DataError, match="4 queries, 3 lists"):
        retrieval(x, x, [[0]] * 3)
    with pytest.raises(DataError, match="Query 2 has no positive"):
        retrieval(x, x, [[0], [1], [], [3]], cells=4)
    with pytest.raises(UsageError, match="every k ≥ 1"):
        retrieval(x, x, [[0]] * 4, ks=(0, 1))
    with pytest.raises(DataError, match="Row 1 of the embeddings is not finite"):
        retrieval(x, np.where(np.arange(4)[:, None] == 1, np.nan, x), [[0]] * 4)


def test_all_positives_count_for_map_and_ndcg_whatever_the_block():
    images, texts, _, captions_of = captioned()
    cosines = np.array([[i @ t / np.linalg.norm(i) / np.linalg.norm(t) for t in texts] for i in images.astype(float)])
    precisions, gains = [], []
    for row, own in zip(cosines, captions_of, strict=True):
        ranks = sorted(1 + int((row > row[item]).sum()) for item in own)
        precisions.append(np.mean([(place + 1) / rank for place, rank in enumerate(ranks)]))
        ideal = sum(1 / np.log2(1 + place) for place in range(1, len(own) + 1))
        gains.append(sum(1 / np.log2(1 + rank) for rank in ranks if rank <= 10) / ideal)
    for cells in (1, 200, 2**24):
        found = retrieval(images, texts, captions_of, cells=cells)
        assert found.map.value == pytest.approx(np.mean(precisions))
        assert found.ndcg.value == pytest.approx(np.mean(gains))
        assert found.precisions == pytest.approx(precisions)


def test_groups_of_queries_are_measured_against_the_whole_gallery():
    images, texts, owner, _ = captioned()
    positives = [[i] for i in owner]
    by = [None if i == 0 else "odd" if i % 2 else "even" for i in owner]
    found = retrieval(texts, images, positives, by=by, groups=owner)
    assert list(found.by) == ["even", "odd"]
    for name, part in found.by.items():
        rows = [row for row, group in enumerate(by) if group == name]
        alone = retrieval(texts[rows], images, [positives[row] for row in rows], groups=owner[rows])
        assert part.ranks.tolist() == alone.ranks.tolist() == found.ranks[rows].tolist()
        assert part.recall == alone.recall
        assert part.chance == alone.chance
        assert part.gallery == len(images)
    with pytest.raises(DataError, match="60 queries, 3 groups"):
        retrieval(texts, images, positives, by=["a", "b", "c"])


def test_a_penalty_is_taken_off_the_cosines_of_its_item():
    # Cosines of the query .8 and .6; with .3 off the first, the second leads.
    query, gallery = np.array([[0.8, 0.6]]), np.eye(2)
    assert retrieval(query, gallery, [[1]], ks=(1,)).ranks.tolist() == [2]
    assert retrieval(query, gallery, [[1]], ks=(1,), penalty=np.array([0.3, 0.0])).ranks.tolist() == [1]
