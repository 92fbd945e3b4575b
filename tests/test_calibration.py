"""Probabilities that hold: fits against slow references, odds by Bayes' rule, errors worked by hand, and keeping."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from twofold.cli import main
from twofold.data.sources import Column, Source
from twofold.errors import BundleError, DataError, UsageError
from twofold.measure.calibrate import calibrate, keep
from twofold.measure.calibration import (
    Calibration,
    Shown,
    brier,
    cross_validated,
    diagram,
    expected_error,
    fit_calibration,
    from_siglip,
    honesty,
    isotonic,
    platt,
    reliability,
    shown,
    threshold,
)
from twofold.measure.evaluate import evaluate
from twofold.measure.hubness import Remedy
from twofold.models.bundle import Bundle, Tower, annotate, kept_meta
from twofold.models.encoders import encoder, image_encoder
from twofold.terminal import calibration_tables, evaluation_tables


def outcomes(n: int = 4000, scale: float = 6.0, offset: float = -1.0, seed: int = 0):
    """Scores, and matches drawn with probability sigmoid(scale·score + offset)."""
    draw = np.random.default_rng(seed)
    scores = draw.normal(0, 0.5, n)
    return scores, draw.random(n) < 1 / (1 + np.exp(-scale * scores - offset))


def world(queries: int = 400, gallery: int = 400, noise: float = 1.2, d: int = 16, seed: int = 0):
    draw = np.random.default_rng(seed)
    items = draw.normal(size=(gallery, d)).astype(np.float32)
    owner = draw.integers(0, gallery, queries)
    return items[owner] + noise * draw.normal(size=(queries, d)).astype(np.float32), items, [[int(i)] for i in owner]


# SigLIP's sigmoid and the odds.


def test_siglips_own_sigmoid_worked_by_hand():
    # t = 10, b = −2, cosine .3: sigmoid(1) = .7311 at the odds of the batch.
    own = from_siglip(10.0, -2.0, batch=11)
    assert own.probability(0.3) == pytest.approx(0.731059, abs=1e-6)
    # In a gallery of 101 a false item is ten times as likely as in the batch: odds e¹ become e¹/10.
    odds = math.e / 10
    assert own.probability(0.3, gallery=101) == pytest.approx(odds / (1 + odds), abs=1e-9)


def test_odds_move_as_bayes_rule_says():
    # Scores of true pairs ~ N(1, 1), of false ones ~ N(0, 1): the likelihood ratio is exp(s − ½), exactly.
    for n in (2, 50, 10_000):
        calibration = Calibration("platt", gallery=2, scale=1.0, offset=-0.5)  # odds 1 : 1
        for s in (-1.0, 0.0, 2.5):
            true, false = math.exp(-((s - 1) ** 2) / 2), math.exp(-(s**2) / 2)
            assert calibration.probability(s, gallery=n) == pytest.approx(true / (true + (n - 1) * false), rel=1e-9)


def test_a_gallery_of_the_fits_own_size_changes_nothing_and_one_of_one_item_is_no_error():
    calibration = Calibration("platt", gallery=300, scale=3.0, offset=-2.0)
    assert calibration.probability(0.4, gallery=300) == pytest.approx(calibration.probability(0.4), abs=1e-15)
    assert calibration.probability(0.4) < calibration.probability(0.4, gallery=1) < 1


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_a_probability_never_falls_with_its_score(kind):
    scores, matches = outcomes(600)
    fitted = fit_calibration(Shown(scores[:, None], matches[:, None], 600, range(600)), kind=kind)
    curve = fitted.probability(np.linspace(-3, 3, 500))
    assert (np.diff(curve) >= 0).all()
    assert (curve > 0).all() and (curve < 1).all()


# Platt.


def test_platt_finds_the_curve_that_made_the_outcomes():
    scale, offset = platt(*outcomes(60_000))
    assert scale == pytest.approx(6, rel=0.05)
    assert offset == pytest.approx(-1, abs=0.06)


def test_platt_equals_plain_gradient_descent_on_its_loss():
    scores, matches = outcomes(200)
    true, false = int(matches.sum()), int((~matches).sum())
    targets = np.where(matches, (true + 1) / (true + 2), 1 / (false + 2))
    scale = offset = 0.0
    for _ in range(40_000):
        wrong = 1 / (1 + np.exp(-scale * scores - offset)) - targets
        scale, offset = scale - 4.0 * (wrong * scores).mean(), offset - 4.0 * wrong.mean()
    assert platt(scores, matches) == pytest.approx((scale, offset), rel=1e-6)


def test_platt_equals_scikit_learns_sigmoid():
    calibration = pytest.importorskip("sklearn.calibration")
    scores, matches = outcomes(500)
    a, b = calibration._sigmoid_calibration(scores, matches.astype(int))
    assert platt(scores, matches) == pytest.approx((-a, -b), rel=1e-3)


def test_separable_scores_have_a_finite_fit():
    scale, offset = platt(np.array([0.1, 0.2, 0.3, 0.8]), np.array([False, False, False, True]))
    assert 0 < scale < 100 and math.isfinite(offset)


def test_scores_that_say_nothing_get_the_base_rate():
    scale, offset = platt(np.full(98, 0.3), np.arange(98) < 49)
    assert 1 / (1 + math.exp(-0.3 * scale - offset)) == pytest.approx(0.5)


# Isotonic.


def slow_isotonic(y: np.ndarray) -> np.ndarray:
    """max over starts of min over ends of the mean between: the definition."""
    n = len(y)
    return np.array([max(min(y[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)])


def test_isotonic_is_the_nearest_rising_curve():
    scores, matches = outcomes(60, seed=3)
    order = np.argsort(scores)
    expected = slow_isotonic(matches[order].astype(float))
    at, logits = np.array(isotonic(scores, matches)).T
    found = 1 / (1 + np.exp(-np.interp(scores[order], at, logits)))
    inner = (expected > 0) & (expected < 1)
    assert inner.sum() > 20
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-12)
    assert (found[expected == 0] < 0.2).all() and (found[expected == 1] > 0.8).all()


def test_isotonic_equals_scikit_learn_where_it_is_not_certain():
    sklearn = pytest.importorskip("sklearn.isotonic")
    scores, matches = outcomes(2000, scale=2.0)
    expected = sklearn.IsotonicRegression().fit(scores, matches.astype(float)).predict(scores)
    at, logits = np.array(isotonic(scores, matches)).T
    found = 1 / (1 + np.exp(-np.interp(scores, at, logits)))
    inner = (expected > 0.05) & (expected < 0.95)
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-9)


def test_one_pair_at_the_foot_of_the_curve_does_not_lift_the_rest():
    # The lowest score is false: one pair that did not come true says at most 1/3, yet of the next hundred one is true.
    scores, matches = np.arange(102.0), np.zeros(102, bool)
    matches[[1, 101]] = True
    at, logits = np.array(isotonic(scores, matches)).T
    found = 1 / (1 + np.exp(-np.interp([0.0, 50.0, 101.0], at, logits)))
    assert found == pytest.approx([1 / 100, 1 / 100, 2 / 3])
    # And one at its head, true, does not fall below them.
    at, logits = np.array(isotonic(-scores, ~matches)).T
    assert 1 / (1 + np.exp(-np.interp([0.0, -50.0, -101.0], at, logits))) == pytest.approx([99 / 100, 99 / 100, 1 / 3])


def test_equal_scores_have_one_probability():
    (first, low), *_, (last, high) = isotonic(np.array([1.0, 1.0, 1.0, 1.0, 2.0]), np.array([1, 0, 0, 0, 1], bool))
    assert (first, last) == (1.0, 2.0)
    assert 1 / (1 + math.exp(-low)) == pytest.approx(0.25)
    assert 1 / (1 + math.exp(-high)) == pytest.approx(2 / 3)  # one pair that came true is held to 1 − 1/3


# How far promises hold.


def test_the_expected_error_worked_by_hand():
    # Two bins of two: promised .2 and none true, promised .7 and one of two true.
    promised, true = np.array([0.1, 0.3, 0.6, 0.8]), np.array([0, 0, 0, 1], bool)
    assert expected_error(promised, true, bins=2).value == pytest.approx((0.2 + 0.2) / 2)
    assert brier(promised, true).value == pytest.approx((0.01 + 0.09 + 0.36 + 0.04) / 4)
    first, second = reliability(promised, true, bins=2)
    assert (first.promised, first.true.value, first.pairs) == (pytest.approx(0.2), 0.0, 2)
    assert (second.promised, second.true.value) == (pytest.approx(0.7), 0.5)


def slow_error(promised: np.ndarray, true: np.ndarray, bins: int) -> float:
    order, n = sorted(range(len(promised)), key=lambda i: promised[i]), len(promised)
    total, start = 0.0, 0
    for number in range(bins):
        size = n // bins + (number < n % bins)
        rows = order[start : start + size]
        start += size
        total += abs(sum(promised[i] for i in rows) - sum(bool(true[i]) for i in rows))
    return total / n


def test_the_expected_error_equals_a_loop_over_bins():
    scores, matches = outcomes(1003)
    promised = 1 / (1 + np.exp(-3 * scores))
    found = expected_error(promised, matches, bins=15, resamples=50)
    assert found.value == pytest.approx(slow_error(promised, matches, 15), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_brier_equals_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    scores, matches = outcomes(300)
    promised = 1 / (1 + np.exp(-scores))
    assert brier(promised, matches).value == pytest.approx(metrics.brier_score_loss(matches, promised))


def test_true_promises_have_a_small_error_and_proud_ones_a_large_one():
    scores, matches = outcomes(20_000)
    honest, proud = (1 / (1 + np.exp(-k * (6 * scores - 1))) for k in (1, 4))
    assert expected_error(honest, matches, resamples=20).value < 0.012
    assert expected_error(proud, matches, resamples=20).low > 0.05


def test_pairs_of_one_picture_widen_the_interval():
    scores, matches = outcomes(300)
    promised = np.clip(1 / (1 + np.exp(-6 * scores)), 0, 1)
    five = [np.repeat(column, 5) for column in (promised, matches)]
    apart = expected_error(*five)
    together = expected_error(*five, groups=np.repeat(np.arange(300), 5).tolist())
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_promises_that_are_no_probabilities_are_refused():
    with pytest.raises(DataError, match=r"0\.\.1"):
        expected_error(np.array([1.2]), np.array([True]))
    with pytest.raises(DataError, match="got 2 and 1"):
        brier(np.array([0.1, 0.2]), np.array([True]))


def test_a_fit_makes_hits_of_other_queries_honest():
    asked, items, positives = world(1600, 200)
    half = len(asked) // 2
    val = shown(asked[:half], items, positives[:half])
    test = shown(asked[half:], items, positives[half:])
    proud = Calibration("siglip", gallery=200, scale=30.0, offset=-12.0)
    for kind in ("platt", "isotonic"):
        fitted = fit_calibration(val, kind=kind)
        assert honesty(fitted, test).ece.high < honesty(proud, test).ece.low / 2
        within, beyond = cross_validated(val, kind=kind).ece, honesty(fitted, test).ece
        assert within.value == pytest.approx(beyond.value, abs=0.02)


def test_at_the_odds_of_a_smaller_gallery_promises_hold_better_than_as_fitted():
    asked, items, positives = world(4000, 1000, d=32, noise=1.6)
    fitted = fit_calibration(shown(asked, items, positives))
    few = [row for row, own in enumerate(positives) if own[0] < 50]
    small = shown(asked[few], items[:50], [positives[row] for row in few])
    assert honesty(fitted, small, gallery=50).ece.value < honesty(fitted, small).ece.value / 2


# What is shown, and the threshold.


def test_what_is_shown_is_the_best_by_cosine_and_says_which_are_true():
    asked, items, positives = world(20, 12)
    positives[0] = [0, 5]
    found = shown(asked, items, positives, k=4)
    cosines = np.array([[q @ g / np.linalg.norm(q) / np.linalg.norm(g) for g in items] for q in asked])
    order = np.argsort(-cosines, axis=1)[:, :4]
    np.testing.assert_allclose(found.scores, np.take_along_axis(cosines, order, 1), atol=1e-6)
    assert found.matches.tolist() == [
        [item in own for item in row] for row, own in zip(order.tolist(), positives, strict=True)
    ]
    assert shown(asked, items, positives, k=100).scores.shape == (20, 12)


@pytest.mark.parametrize("cost", [0.0, 0.05, 0.1, 0.333])
def test_no_more_than_the_stated_cost_falls_below_the_threshold(cost):
    best = np.random.default_rng(0).normal(size=60)
    least = threshold(best, cost)
    assert (best < least).mean() <= cost
    higher = np.nextafter(least, np.inf)
    assert (best < higher).mean() > cost  # and it is the highest such score


def test_a_threshold_has_a_cost_below_one():
    with pytest.raises(UsageError, match="share of true queries"):
        threshold(np.zeros(3), 1.0)


def test_hits_of_one_kind_only_cannot_be_fitted():
    with pytest.raises(DataError, match="0 of the 8 pairs"):
        fit_calibration(Shown(np.zeros((4, 2)), np.zeros((4, 2), bool), 9, range(4)))
    with pytest.raises(UsageError, match="Did you mean 'platt'"):
        fit_calibration(Shown(np.zeros((4, 2)), np.ones((4, 2), bool), 9, range(4)), kind="plat")


# Keeping it.


def test_a_calibration_is_the_same_after_a_journey_through_json():
    scores, matches = outcomes(200)
    bank = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float16).astype(np.float32)
    held_out = Shown(scores[:, None], matches[:, None], 40, range(200))
    for kind in ("platt", "isotonic"):
        before = fit_calibration(held_out, kind=kind, remedy=Remedy("nnn", bank, strength=0.5, neighbours=3))
        after = Calibration.read(json.loads(json.dumps(before.record())))
        assert after.probability(0.2, gallery=9) == before.probability(0.2, gallery=9)
        assert (after.threshold, after.cost, after.gallery) == (before.threshold, before.cost, before.gallery)
        np.testing.assert_array_equal(after.remedy.vectors, bank)
        assert (after.remedy.strength, after.remedy.neighbours) == (0.5, 3)


@pytest.fixture
def pairs() -> Source:
    """Two columns of vectors, the second a noisy copy of the first; no encoder is needed to align them."""
    draw = np.random.default_rng(0)
    first = draw.normal(size=(240, 12)).astype(np.float32)
    second = first + 0.8 * draw.normal(size=first.shape).astype(np.float32)
    return Source(
        "pairs",
        [f"p{i}" for i in range(240)],
        columns={"left": Column("vector", list(first)), "right": Column("vector", list(second))},
        splits=["train"] * 100 + ["val"] * 140,
        meta={"third": [f"third {i % 3}" for i in range(240)]},
    )


@pytest.fixture
def bundle() -> Bundle:
    made = {name: encoder("vectors:12", kind="vector") for name in ("left", "right")}
    return Bundle(made, {"siglip": {"scale": 10.0, "bias": -5.0, "batch": 64}})


def test_a_bundle_keeps_its_calibration_and_its_fingerprint(bundle, pairs, tmp_path):
    folder = tmp_path / "run" / "bundle"
    bundle.save(folder)
    done = calibrate(bundle, pairs, queries="left", remedy="nnn", quiet=True)
    assert keep(tmp_path / "run", done) == folder
    keep(tmp_path / "run", calibrate(bundle, pairs, queries="right", kind="isotonic", quiet=True))
    loaded = Bundle.load(folder)
    assert loaded.fingerprint == bundle.fingerprint
    assert loaded.meta["siglip"] == bundle.meta["siglip"]
    kept = Calibration.of(loaded, "left", "right")
    assert kept.remedy.kind == "nnn"
    assert kept.probability(0.4, gallery=70) == pytest.approx(done.calibration.probability(0.4, gallery=70))
    assert Calibration.of(loaded, "right", "left").kind == "isotonic"
    assert Calibration.of(loaded, "left", "left") is None


def test_a_calibration_says_how_honest_it_is_and_what_was_tried(bundle, pairs):
    done = calibrate(bundle, pairs, queries="left", remedy="best", quiet=True)
    assert {remedy.kind for remedy in done.tried} == {"centring", "qb-norm", "nnn"}
    assert done.honesty.ece.value < done.raw.ece.value
    chosen = done.calibration.remedy
    assert chosen is None or chosen.gain.map.low > 0
    own = calibrate(bundle, pairs, queries="left", kind="siglip", quiet=True).calibration
    assert (own.scale, own.offset, own.gallery) == (10.0, -5.0, 64)


def test_what_cannot_be_calibrated_is_refused(bundle, pairs, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'left'"):
        calibrate(bundle, pairs, queries="lefty", quiet=True)
    with pytest.raises(DataError, match="bank of queries from the split train"):
        calibrate(bundle, pairs.split("val"), remedy="nnn", queries="left", quiet=True)
    with pytest.raises(UsageError, match="trained on promise too much"):
        calibrate(bundle, pairs, split="train", queries="left", quiet=True)
    with pytest.raises(UsageError, match="no scale and bias"):
        calibrate(Bundle(dict(bundle.towers)), pairs, queries="left", kind="siglip", quiet=True)
    with pytest.raises(DataError, match="pairs of two modalities"):
        calibrate(Bundle({"left": bundle.towers["left"]}), pairs, quiet=True)
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        annotate(tmp_path, "calibration", "way", {})
    assert kept_meta(tmp_path) is None


def test_a_damaged_calibration_is_named_and_how_to_mend_it(bundle):
    bundle.meta["calibration"] = {"left_to_right": {"kind": "platt", "knots": [], "remedy": None, "slope": 3}}
    with pytest.raises(BundleError, match=r"left_to_right cannot be read .* `twofold calibrate`"):
        Calibration.of(bundle, "left", "right")


def test_of_three_modalities_two_are_named(bundle, pairs):
    three = Bundle({**bundle.towers, "third": bundle.towers["left"]})
    data = replace(pairs, columns={**pairs.columns, "third": pairs.columns["right"]})
    with pytest.raises(UsageError, match="say between which two"):
        evaluate(three, data, split="val", quiet=True)
    with pytest.raises(UsageError, match="Did you mean 'third'"):
        evaluate(three, data, split="val", between=("left", "thirst"), quiet=True)
    named = evaluate(three, data, split="val", between=("left", "third"), quiet=True).paired
    assert named.keys() == {"left_to_third", "third_to_left"}
    expected = evaluate(bundle, pairs, split="val", quiet=True).paired["left_to_right"]
    assert named["left_to_third"].ranks.tolist() == expected.ranks.tolist()


def test_a_diagram_is_one_well_formed_svg_with_every_bin():
    from xml.etree import ElementTree

    scores, matches = outcomes(400)
    bins = reliability(1 / (1 + np.exp(-scores)), matches, bins=8)
    page = ElementTree.fromstring(diagram({"before <b>": bins, "after": bins}, title="a & b"))
    circles = [node for node in page.iter() if node.tag.endswith("circle")]
    assert len(circles) == 2 * (8 + 1)


# The command line, from pairs to a search that knows what its scores mean.


@pytest.fixture
def captioned(tmp_path):
    """72 noisy pictures of three colours, each with its colour as label and caption, in a manifest with splits."""
    colours = {"dark_red": (160, 20, 20), "green": (30, 200, 40), "blue": (40, 60, 220)}
    draw = np.random.default_rng(0)
    rows = ["image,caption,label,half,split"]
    for i in range(72):
        name = list(colours)[i % 3]
        pixels = np.clip(draw.normal(0, 20, (16, 16, 3)) + colours[name], 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,something {name},{name},half {i % 2},{('train', 'val', 'test')[i // 24]}")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "captions.csv"


def told(capsys, *arguments: object):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    done = capsys.readouterr()
    return json.loads(done.out), done.err


def test_pairs_calibrate_a_model_whose_index_then_tells_matches_from_none(captioned, tmp_path, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = image_encoder("timm:resnet18/8", size=16, small_stem=True)
        towers = {"image": image, "text": Tower(encoder("minilm"), nn.Linear(384, image.dim))}
    model, index = tmp_path / "model", tmp_path / "index"
    Bundle(towers).save(model)
    told(capsys, "index", captioned, "--model", model, "--out", index)
    svg = tmp_path / "reliability.svg"
    flags = ["--data", captioned, "--remedy", "nnn", "--cost", 0.5, "--diagram", svg]
    done, _ = told(capsys, "calibrate", model, *flags)
    assert done["calibration"]["remedy"]["kind"] == "nnn"
    assert done["way"] == "text_to_image"
    assert svg.read_text().startswith("<svg")
    told(capsys, "index", captioned, "--model", model, "--out", index)  # nothing new but what the model says of itself
    hits, said = told(capsys, "search", index, "something blue", "--k", 3, "--via", "items")
    assert all(0 < hit["probability"] < 1 for hit in hits)
    assert "ordered by nnn" in said
    assert ("no good match" in said) == (hits[0]["score"] < done["calibration"]["threshold"])
    assert main(["search", str(index), "something blue", "--via", "items"]) == 0
    assert "%" in capsys.readouterr().out
    measured, _ = told(capsys, "evaluate", model, "--data", captioned, "--by", "half", "--zero-shot", "a {} thing")
    assert set(measured["paired"]["image_to_text"]["by"]) == {"half 0", "half 1"}
    assert measured["zero_shot"]["by_class"].keys() == {"blue", "dark_red", "green"}
    assert measured["space"]["hubness"]["text_to_image"]["k"] == 10
    assert main(["evaluate", str(model), "--data", str(captioned), "--by", "halve"]) == 2
    assert "Did you mean 'half'?" in capsys.readouterr().err


def test_tables_fit_a_terminal_of_80_columns(bundle, pairs):
    """Every figure is there, none cut off."""
    folded = io.StringIO()
    console = Console(file=folded, width=80)
    found = evaluate(bundle, pairs, split="val", by="third", quiet=True)
    console.print(*evaluation_tables(found), sep="\n")
    done = calibrate(bundle, pairs, queries="left", remedy="best", quiet=True)
    console.print(*calibration_tables(done), sep="\n")
    assert "…" not in folded.getvalue()
    for word in ("left → right", "nDCG@10", "modality gap", "skewness", "nnn", "ECE", "no good match below", "third 1"):
        assert word in folded.getvalue()
