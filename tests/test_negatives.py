"""Hard negatives are the hardest that no guard objects to; guards spare what is right as well, and say how much."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from twofold.cli import main
from twofold.data.samples import openmoji
from twofold.errors import DataError, UsageError
from twofold.mining import NAIVE, Guards, Known, hard_negatives, perceptual_hashes
from twofold.objectives import clip, siglip
from twofold.train.mine import read_negatives


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def vectors(*angles: float) -> torch.Tensor:
    """Unit vectors of the plane at these angles, in degrees."""
    turn = torch.tensor(angles) * torch.pi / 180
    return torch.stack([turn.cos(), turn.sin()], 1)


def slow(queries, corpus, positives, k, allowed):
    """The k best of each query that `allowed` says may be one, by sorting everything."""
    table = F.normalize(queries, dim=1) @ F.normalize(corpus, dim=1).T
    found = []
    for query, own in enumerate(positives):
        rows = sorted(range(len(corpus)), key=lambda row: -float(table[query, row]))
        good = [row for row in rows if row not in own and allowed(query, row, table)]
        found.append((good + [-1] * k)[:k])
    return found


def test_naive_mining_takes_the_nearest_that_is_no_positive(draw):
    queries, corpus = torch.randn(9, 6, generator=draw), torch.randn(40, 6, generator=draw)
    positives = [[4 * query, 4 * query + 1] for query in range(9)]
    mined = hard_negatives(queries, corpus, positives, k=3, guards=NAIVE)
    assert mined.negatives.tolist() == slow(queries, corpus, positives, 3, lambda *_: True)
    assert mined.removed == {} and mined.looked == 27 and mined.short == 0


def test_the_share_guard_keeps_below_the_positive_also_where_that_scores_less_than_nothing():
    queries = vectors(0, 0)
    corpus = vectors(60, 62, 75, 120, 100, 100.5, 140, 170)  # cosines .5, .47, .26, −.5, −.17, −.18, −.77, −.98
    guards = Guards(same=False, near=None, bits=None, share=0.9, zero=0.0)
    mined = hard_negatives(queries, corpus, [[0], [4]], k=1, guards=guards)
    # Query 0: below .45. Query 1, whose positive scores −.174: below −.174 − .0174 = −.191, so not at −.182.
    assert mined.negatives.tolist() == [[2], [3]]
    assert mined.removed["near the positive"].candidates == 1 + 4
    # 95 % of a negative score is above it: that rule, without the distance, would have taken the candidate at −.170.


@pytest.mark.parametrize(
    ("guards", "allowed"),
    [
        (Guards(same=False, bits=None, share=None, near=0.9), "near"),
        (Guards(same=False, bits=None, share=None, near=None, margin=0.3), "margin"),
        (Guards(same=False, bits=None, share=0.8, zero=0.0, near=None), "share"),
        (Guards(same=False, bits=None, share=None, near=None, skip=2), "skip"),
    ],
)
def test_guards_against_a_slow_reference(draw, guards, allowed):
    queries, corpus = torch.randn(8, 4, generator=draw), torch.randn(60, 4, generator=draw)
    positives = [[query, query + 8] for query in range(8)]
    unit = F.normalize(corpus, dim=1)

    def may(query, row, table):
        best = max(float(table[query, own]) for own in positives[query])
        if allowed == "near":
            return all(float(unit[row] @ unit[own]) < 0.9 for own in positives[query])
        if allowed == "margin":
            return float(table[query, row]) <= best - 0.3
        if allowed == "share":
            return float(table[query, row]) <= best - 0.2 * abs(best)
        others = [other for other in range(60) if other not in positives[query]]
        return sum(float(table[query, other]) > float(table[query, row]) for other in others) >= 2

    mined = hard_negatives(queries, corpus, positives, k=4, guards=guards)
    assert mined.negatives.tolist() == slow(queries, corpus, positives, 4, may)


def test_what_equals_a_positive_in_a_column_is_spared_and_counted():
    queries, corpus = vectors(0), vectors(0, 5, 10, 15, 20)
    known = Known(same={"text": ["a", "a", "b", None, "a"], "label": [1, 2, 1, 1, None]})
    guards = Guards(near=None, bits=None, share=None)
    mined = hard_negatives(queries, corpus, [[0]], k=2, guards=guards, known=known)
    assert mined.negatives.tolist() == [[-1, -1]]
    assert (mined.removed["same text"].candidates, mined.removed["same text"].alone) == (2, 2)
    assert (mined.removed["same label"].candidates, mined.removed["same label"].alone) == (2, 2)
    example = mined.removed["same text"].examples[0]
    assert (example.query, example.positive, example.candidate) == (0, 0, 1)
    assert mined.short == 1


def test_an_index_may_propose_the_candidates(draw):
    queries, corpus = torch.randn(6, 8, generator=draw), torch.randn(50, 8, generator=draw)
    positives = [[query] for query in range(6)]
    exact = hard_negatives(queries, corpus, positives, k=3)

    def search(asked, n):
        return (asked @ F.normalize(corpus, dim=1).T).topk(min(n, 50), dim=1).indices.numpy()

    assert torch.equal(hard_negatives(queries, corpus, positives, k=3, search=search).negatives, exact.negatives)

    def blind(asked, n):
        return np.full((len(asked), n), -1)

    assert hard_negatives(queries, corpus, positives, k=3, search=blind).short == 6
    with pytest.raises(DataError, match="rows of the corpus"):
        hard_negatives(queries, corpus, positives, k=3, search=lambda asked, n: np.full((len(asked), n), 50))


@pytest.mark.parametrize("wrong", [{"near": 2.0}, {"share": -0.1}, {"bits": 65}, {"skip": -1}])
def test_guards_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="Guards take"):
        Guards(**wrong)


def test_a_picture_is_like_itself_after_small_changes_and_unlike_others():
    pictures = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    large = F.interpolate(pictures.float(), 32, mode="bilinear").round().to(torch.uint8)
    brighter = (large.float() * 0.9 + 20).clamp(0, 255).to(torch.uint8)
    one, other = (F.normalize(perceptual_hashes(each), dim=1) for each in (large, brighter))
    cosines = one @ other.T
    assert cosines.diagonal().min() > 1 - 6.5 / 32  # six of 64 places
    assert cosines.fill_diagonal_(-1).max() < 1 - 6.5 / 32


# -- in the losses


@pytest.mark.parametrize("debias", [0.0, 0.1])
def test_clip_with_mined_negatives_against_the_dense_formula(draw, debias):
    a, b = (torch.randn(7, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    more = torch.randn(9, 5, generator=draw, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ours = clip(a, b, scale=scale, negatives=more, debias=debias)
    gradients = torch.autograd.grad(ours, (a, b, more, scale))
    table = scale * F.normalize(a, dim=1) @ F.normalize(torch.cat((b, more)), dim=1).T

    def entropy(rows, n):
        own = torch.arange(7)
        if not debias:
            return F.cross_entropy(rows, own)
        e = rows.exp()
        positive = e[own, own]
        rest = (e.sum(1) - positive) / (n - 1)  # eq. 7 of arXiv 2007.00224, positives as samples of the right ones
        wrong = (n - 1) * torch.maximum((rest - debias * positive) / (1 - debias), (-scale).exp())
        return -(positive / (positive + wrong)).log().mean()

    dense = (entropy(table, 16) + entropy(table[:, :7].T, 7)) / 2
    torch.testing.assert_close(ours, dense)
    for mine, reference in zip(gradients, torch.autograd.grad(dense, (a, b, more, scale)), strict=True):
        torch.testing.assert_close(mine, reference)


def test_siglip_with_mined_negatives_against_the_dense_formula(draw):
    a, b = (torch.randn(6, 5, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(2))
    more = torch.randn(4, 5, generator=draw, dtype=torch.float64).requires_grad_()
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (7.0, -2.0))
    table = scale * F.normalize(a, dim=1) @ F.normalize(torch.cat((b, more)), dim=1).T + bias
    signs = 2 * torch.eye(6, 10, dtype=torch.float64) - 1
    dense = -F.logsigmoid(signs * table).sum() / 6
    ours = siglip(a, b, scale=scale, bias=bias, negatives=more)
    torch.testing.assert_close(ours, dense)
    inputs = (a, b, more, scale, bias)
    for mine, reference in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True):
        torch.testing.assert_close(mine, reference)


# -- the command


def test_mined_tuples_are_for_sentence_transformers_and_for_align(tmp_path, capsys):
    emoji = openmoji().take(range(0, 4400, 60))
    rows = ["id,image,text"]
    for id, image, text in zip(emoji.ids, emoji.images, emoji.texts, strict=True):
        (tmp_path / f"{id}.png").write_bytes(image)
        rows.append(f'{id},{id}.png,"{text[0]}"')
    data = tmp_path / "emoji.csv"
    data.write_text("\n".join(rows) + "\n")
    run = ["--out", str(tmp_path / "run"), "--epochs", "1", "--hidden", "0"]
    assert main(["align", str(data), *run]) == 0
    out = tmp_path / "hard.csv"
    assert main(["mine", str(data), "--model", str(tmp_path / "run"), "--out", str(out), "--count", "2"]) == 0
    said = capsys.readouterr().out
    assert "near the positive" in said and "--negatives" in said
    with out.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["anchor", "positive", "negative_1", "negative_2"]
    name = dict(zip((f"{id}.png" for id in emoji.ids), (text[0] for text in emoji.texts), strict=True))
    for row in table:
        own = name[row["anchor"].rsplit("/", 1)[-1]]
        assert row["positive"] == own and own not in (row["negative_1"], row["negative_2"])
    negatives = read_negatives(out, emoji.ids)
    assert negatives.shape[0] == len(emoji) and negatives.max() < len(emoji)
    again = ["--out", str(tmp_path / "harder"), "--epochs", "1", "--hidden", "0", "--negatives", str(out), "--json"]
    assert main(["align", str(data), *again]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] >= 1
