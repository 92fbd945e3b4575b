"""What a space holds together, against scikit-learn, closed forms and slow loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import linkage
from sklearn.metrics import normalized_mutual_info_score, silhouette_samples

from twofold.errors import DataError
from twofold.measure.structure import (
    between,
    borders,
    cka,
    clusters,
    compare_spaces,
    confusion,
    copies,
    hierarchy,
    hubs,
    naming_words,
    nearest,
    outliers,
    overlaps,
    silhouettes,
    strays,
    structure,
)


def cloud(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(each: int = 20, classes: int = 4, dim: int = 12, noise: float = 0.6, seed: int = 0):
    labels = np.repeat(np.arange(classes), each)
    return cloud(classes, dim, seed=seed)[labels] + noise * cloud(each * classes, dim, seed=seed + 1), labels


def plane(*degrees: float) -> torch.Tensor:
    turn = torch.tensor(degrees) * math.pi / 180
    return torch.stack([turn.cos(), turn.sin()], 1)


def test_nearest_is_what_sorting_all_cosines_finds():
    z = cloud(30, 5)
    u = F.normalize(z, dim=1)
    near = nearest(z, 7)
    for row in range(30):
        cosines = [(float(u[row] @ u[other]), other) for other in range(30) if other != row]
        assert near.rows[row].tolist() == [other for _, other in sorted(cosines, reverse=True)[:7]]
    assert nearest(cloud(4, 3)).rows.shape == (4, 3)


def test_silhouettes_are_those_of_scikit_learn():
    z, labels = groups()
    labels[5] = 9  # alone in its class
    labels = np.unique(labels, return_inverse=True)[1]
    expected = silhouette_samples(z.numpy(), labels, metric="cosine")
    np.testing.assert_allclose(silhouettes(z, labels), expected, atol=1e-6)
    partly = labels.copy()
    partly[:3] = -1
    some = silhouettes(z, partly)
    assert np.isnan(some[:3]).all()
    np.testing.assert_allclose(some[3:], silhouette_samples(z[3:].numpy(), labels[3:], metric="cosine"), atol=1e-6)
    with pytest.raises(DataError, match="one alone"):
        silhouettes(z, np.zeros(len(z), int))


def test_between_is_the_share_of_variance_that_class_means_explain():
    z, labels = groups()
    u = F.normalize(z, dim=1).double().numpy()
    within = sum(((u[labels == c] - u[labels == c].mean(0)) ** 2).sum() for c in range(4))
    assert between(z, labels) == pytest.approx(1 - within / ((u - u.mean(0)) ** 2).sum(), abs=1e-6)
    assert between(torch.eye(4).repeat_interleave(5, 0), np.repeat(np.arange(4), 5)) == pytest.approx(1)


def test_confusion_counts_whose_the_neighbours_are():
    z, labels = groups(noise=1.5)
    labels[::7] = -1
    near = nearest(z, 5)
    table = np.zeros((4, 4))
    for row in range(len(z)):
        for other in near.rows[row].tolist():
            if labels[row] >= 0 and labels[other] >= 0:
                table[labels[row], labels[other]] += 1
    np.testing.assert_allclose(confusion(near, labels), table / table.sum(1, keepdims=True))


def test_the_hierarchy_joins_what_is_alike_first():
    z = plane(0, 10, 90, 130, 5, 95)
    found = hierarchy(z, np.array([0, 1, 2, 3, 0, 2]))
    means = F.normalize(torch.stack([plane(2.5)[0], plane(10)[0], plane(92.5)[0], plane(130)[0]]), dim=1)
    expected = linkage(np.clip((1 - means @ means.T).double().numpy()[np.triu_indices(4, 1)], 0, 2), "average")
    assert [sorted(merge[:2]) for merge in found.merges] == [sorted(row[:2]) for row in expected.tolist()]
    np.testing.assert_allclose([merge[2] for merge in found.merges], expected[:, 2], atol=1e-6)
    assert found.merges[0][:2] in ((0, 1), (1, 0))
    assert found.merges[0][2] == pytest.approx(1 - math.cos(math.radians(7.5)), abs=1e-6)
    assert sorted(found.order) == [0, 1, 2, 3] and abs(found.order.index(0) - found.order.index(1)) == 1


def test_the_softest_border_lies_where_classes_meet():
    z = plane(0, 2, 4, 6, 9, 11, 13, 15, 90, 92, 94, 96)
    labels = np.repeat([0, 1, 2], 4)
    near = nearest(z, 4)
    softest = borders(z, near, labels)[0]
    assert (softest.first, softest.second) == (0, 1)
    # Of three others in its class, every item of 0 and 1 has one neighbour or more across.
    across = sum(labels[o] != labels[r] for r in range(8) for o in near.rows[r].tolist() if labels[o] < 2)
    assert softest.share == pytest.approx(across / (4 * 8))
    assert softest.pairs[0][:2] == (3, 4) and softest.pairs[0][2] == pytest.approx(math.cos(math.radians(3)), abs=1e-5)
    assert len({row for row, _, _ in softest.pairs}) == len(softest.pairs) == 4


def test_strays_hubs_outliers_and_copies_are_found():
    z, labels = groups(noise=0.2)
    labels[3] = 2  # lies among class 0
    z[50] = z[51]
    z[52] = 1.5 * z[51]  # a length is no difference
    near = nearest(z)
    assert [(s.row, s.own, s.other, s.share) for s in strays(near, labels)] == [(3, 2, 0, 1.0)]
    assert copies(z)[0] == [50, 51, 52]
    times = np.zeros(80, int)
    for row in near.rows.tolist():
        times[row] += 1
    assert hubs(near, count=3) == [(int(r), int(times[r])) for r in np.argsort(-times, kind="stable")[:3]]
    z[7] = -z.mean(0)
    assert outliers(nearest(z))[0][0] == 7


def test_no_chain_of_copies_leads_away():
    assert copies(plane(0, 2, 4), at=math.cos(math.radians(2.5))) == [[0, 1]]


def test_clusters_are_the_groups_that_are_there_and_words_name_them():
    z, labels = groups(noise=0.2)
    found = clusters(z)
    assert normalized_mutual_info_score(found, labels) == pytest.approx(1)
    nouns = ["cat", "boat", "tree", "car"]
    texts = [[f"a {nouns[label]} in the picture", f"the {nouns[label]}"] for label in labels]
    named = naming_words(texts, labels)
    assert [words[0] for words in named] == nouns
    assert all(set(words) == {noun} for words, noun in zip(named, nouns, strict=True)), "words of all name none"
    whole = structure(z, texts=texts)
    assert whole.found and sorted(group.name for group in whole.groups) == sorted(nouns)
    assert all(labels[group.exemplars[0]] == labels[group.exemplars[-1]] for group in whole.groups)
    one = structure(torch.ones(20, 3))
    assert one.between == pytest.approx(0, abs=1e-6) and len(one.copies[0]) == 20


def test_structure_by_labels_that_are_few_and_have_gaps():
    z, labels = groups(noise=0.3)
    labels = np.where(labels == 1, -1, labels)
    found = structure(z, labels, classes=["zero", "one", "two"])
    assert not found.found and [group.name for group in found.groups] == ["zero", "two", "3"]
    assert [group.size for group in found.groups] == [20, 20, 20]
    assert found.confusion.shape == (3, 3) and found.silhouette > 0.5
    assert (found.labels == -1).sum() == 20
    with pytest.raises(DataError, match="Eight items"):
        structure(z[:7])


def slow_cka(x, y):
    """By the definition of the unbiased estimate, over all sums of different indices (four of them)."""
    from itertools import permutations

    n = len(x)
    k, m = (np.asarray((z.double() - z.double().mean(0)) @ (z.double() - z.double().mean(0)).T) for z in (x, y))

    def hsic(k, m):
        pairs = sum(k[i, j] * m[i, j] for i, j in permutations(range(n), 2))
        threes = sum(k[i, j] * m[i, q] for i, j, q in permutations(range(n), 3))
        fours = sum(k[i, j] * m[q, r] for i, j, q, r in permutations(range(n), 4))
        return pairs / math.perm(n, 2) - 2 * threes / math.perm(n, 3) + fours / math.perm(n, 4)

    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_against_its_definition_and_what_it_must_not_see():
    x, y = cloud(9, 4), cloud(9, 6, seed=1) + F.pad(cloud(9, 4), (0, 2))
    assert cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-6)
    turned = 3 * x @ torch.linalg.qr(cloud(4, 4, seed=2))[0] + 5
    assert cka(x, turned) == pytest.approx(1, abs=1e-5)
    assert abs(cka(cloud(200, 400), cloud(200, 400, seed=1))) < 0.05, "of unrelated spaces wider than there are items"
    with pytest.raises(DataError, match="same four items"):
        cka(x, y[:5])


def test_two_spaces_side_by_side():
    z, labels = groups(noise=0.3)
    first, second = z + 2 * cloud(80, 12, seed=7), z.clone()
    second[0] = z[30]  # of another class now
    first[0] = z[0]
    found = compare_spaces(first, second, labels)
    a, b = nearest(first), nearest(second)
    slow = [len(set(p) & set(q)) / 10 for p, q in zip(a.rows.tolist(), b.rows.tolist(), strict=True)]
    np.testing.assert_allclose(overlaps(a, b), slow)
    assert found.overlap.value == pytest.approx(np.mean(slow)) and found.chance == pytest.approx(10 / 79)
    assert found.gain.value == pytest.approx(found.second.value - found.first.value) and found.gain.low > 0
    assert found.worse[0].row == 0 and found.better[0].second > found.better[0].first
    same = compare_spaces(z, 2 * z, labels)
    assert (same.overlap.value, same.gain.value, same.better, same.worse) == (1, 0, [], [])
    assert compare_spaces(first, second).measure.endswith("all cosines")
