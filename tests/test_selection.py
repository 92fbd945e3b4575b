"""Scores without labels, and correlations of ranks, against scipy and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from twofold.cli import main
from twofold.errors import DataError
from twofold.measure.selection import TRUST, correlation, ranks, scores, spearman, trusted, view_retrieval
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder


def test_ranks_and_correlation_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 6, 40), draw.normal(size=40)
    np.testing.assert_allclose(ranks(x) + 1, stats.rankdata(x))
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_within_groups_only_what_differs_inside_them_counts():
    x, y, group = [1, 2, 3, 11, 12, 13], [30, 20, 10, 300, 200, 100], list("aaabbb")
    assert spearman(x, y) > 0.5, "b is ahead of a in both"
    assert spearman(x, y, within=group) == pytest.approx(-1)
    assert spearman([*x, 99], [*y, 999], within=[*group, "alone"]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_an_interval_is_wide_where_runs_are_few_and_holds_the_value():
    draw = np.random.default_rng(1)
    x = draw.normal(size=200)
    y = x + draw.normal(size=200)
    few, many = (correlation(x[:n], y[:n], resamples=300) for n in (12, 200))
    assert few.high - few.low > 2 * (many.high - many.low)
    assert many.low < many.value < many.high
    with pytest.raises(DataError, match="each run"):
        spearman([1, 2], [1])


def test_a_view_finds_its_own_picture_and_a_point_finds_nothing():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(50, 8, generator=draw)
    assert view_retrieval(z, 3 * z) == 1
    assert view_retrieval(z, z.roll(1, 0)) == 0
    assert view_retrieval(torch.ones(50, 8), torch.ones(50, 8)) == 0
    near = torch.eye(4) + torch.tensor([[0, 2.0, 0, 0]] + [[0.0] * 4] * 3)  # the first looks like the second
    assert view_retrieval(near, torch.eye(4)) == 0.75


def test_every_score_is_higher_for_what_is_spread_out_and_agrees():
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(200, 16, generator=draw)
    thin = z.clone()
    thin[:, 2:] *= 0.01
    pairs = {}
    for name, each in (("good", z), ("thin", thin)):
        views = torch.stack([each + 0.1 * torch.randn(200, 16, generator=draw) for _ in range(2)], 1)
        pairs[name] = scores(each, views)
    good, bad = pairs["good"], pairs["thin"]
    for name in ("RankMe", "uniformity", "LiDAR", "view retrieval", "alignment + uniformity"):
        assert good[name] > bad[name], name
    assert scores(z).keys() < good.keys()


def test_what_is_promised_of_a_score_is_what_was_measured():
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "selection.json"
    measured = json.loads(results.read_text())["correlation"]
    for name, trust in TRUST.items():
        own = measured[f"encoder, the same views: {name}"]
        assert np.allclose(trust.across, own["across, kNN"], atol=0.0051), name
        assert np.allclose(trust.within, own["within methods, kNN"], atol=0.0051), name
    assert "do not choose by it" in trusted("LiDAR") and "do not" not in trusted()


def test_models_are_ordered_by_pictures_without_labels(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 255, (96, 2, 2, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=pictures)
    for name, seed in (("fresh", 0), ("point", 1)):
        torch.manual_seed(seed)
        encoder = image_encoder("timm:resnet18/4", size=16)
        if name == "point":
            for weight in encoder.body.parameters():
                weight.data.zero_()
            encoder.body.layer4[-1].bn2.bias.data.fill_(1.0)
        Bundle({"image": encoder}).save(tmp_path / name)
    models = [str(tmp_path / name) for name in ("point", "fresh")]
    assert main(["evaluate", *models, "--data", str(tmp_path / "a.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["fresh", "point"], found
    assert found["point"]["view retrieval"] == 0 < found["fresh"]["view retrieval"]
    assert main(["evaluate", *models, "--data", str(tmp_path / "a.npz")]) == 0
    said = capsys.readouterr().out
    assert "most promising: fresh" in said and "rank correlation with kNN 0.90" in said
