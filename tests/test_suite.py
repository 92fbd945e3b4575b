"""What a model is worth beside what else could be taken: on one data set, on several, away from home."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold.cli import main
from twofold.data.sources import Source
from twofold.errors import DataError, UsageError
from twofold.measure import labelled as module
from twofold.measure.clustering import adjusted_rand, clustering, normalised_information
from twofold.measure.labelled import against
from twofold.measure.metrics import nearest, paired
from twofold.measure.probes import few_labels, linear_probe
from twofold.measure.retrieval import retrieval, same_label
from twofold.measure.suite import elsewhere, read_suite, suite, task
from twofold.models.bundle import Bundle
from twofold.models.encoders import fingerprint, image_encoder
from twofold.models.layers import layer_of
from twofold.train.fine_tune import fine_tune

COLOURS = np.array([(220, 30, 30), (30, 200, 40), (40, 60, 220)])


@pytest.fixture(autouse=True)
def small_and_apart(tmp_path, monkeypatch):
    """One thread, a cache of its own, and a small network in the place of ImageNet's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "IMAGENET", "timm:resnet18/8@untrained")
    yield
    torch.set_num_threads(before)


def coloured(n: int = 48, *, noise: float = 30, seed: int = 0) -> Source:
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = [np.clip(draw.normal(0, noise, (16, 16, 3)) + COLOURS[label], 0, 255).astype(np.uint8) for label in labels]
    splits = ["train" if i < n // 2 else "test" for i in range(n)]
    names = ("red", "green", "blue")
    return Source("colours", [str(i) for i in range(n)], images=images, labels=labels, classes=names, splits=splits)


def bundle(seed: int = 0) -> Bundle:
    torch.manual_seed(seed)
    return Bundle({"image": image_encoder("timm:resnet18/4", size=16)})


# Figures.


def test_the_nearest_rows_are_those_of_the_whole_table():
    draw = torch.Generator().manual_seed(0)
    for n, q, k in ((2000, 11, 5), (64 * 41 + 7, 30, 20), (200, 30, 300)):
        bank, queries = (torch.randn(rows, 8, generator=draw) for rows in (n, q))
        found, whole = nearest(queries, bank, k, cells=n * 4), (queries @ bank.T).topk(min(k, n))
        assert torch.equal(found.rows, whole.indices)
        torch.testing.assert_close(found.cosines, whole.values)


def test_the_paired_test_is_mcnemars_and_sees_what_is_shared():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    one, other = np.repeat([1, 1, 0, 0], (40, 14, 5, 30)), np.repeat([1, 0, 1, 0], (40, 14, 5, 30))
    found = paired(one, other)
    assert found.gap.value == pytest.approx(9 / 89)
    assert found.p == pytest.approx(binomtest(5, 19).pvalue, abs=0.01)
    assert (found.sure, paired(one, one).sure, paired(one, one).p) == (found.gap.low > 0, False, 1)
    turned = paired(other, one)
    assert (turned.p, turned.gap.value) == (found.p, -found.gap.value)
    with pytest.raises(DataError, match="row by row"):
        paired(one, other[1:])


def test_items_find_others_of_their_label_as_queries_find_their_positives():
    draw = np.random.default_rng(0)
    y = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, -1] * 3)
    y[8::10] = [3, 3, 4]  # 4 is alone
    z = draw.normal(size=(30, 5)) + np.eye(5)[y % 5]
    z[7] = z[17]  # copies of one label
    found = same_label(z, y, ks=(1, 3), cells=90)
    kept = np.flatnonzero(y >= 0)
    asks = [i for i in kept if (y[kept] == y[i]).sum() > 1]
    for place, item in enumerate(asks):
        gallery = [j for j in kept if j != item]
        own = retrieval(z[[item]], z[gallery], [[n for n, j in enumerate(gallery) if y[j] == y[item]]], ks=(1, 3))
        assert found.ranks[place] == own.ranks[0]
        assert found.precisions[place] == pytest.approx(own.precisions[0])
    assert len(found.ranks) == len(asks) and found.gallery == len(kept) - 1
    point = same_label(np.ones((30, 5)), y)
    assert point.map.value < 0.3 and point.recall[1].value == 0, "ties with other labels count against"
    with pytest.raises(DataError, match="nothing to find"):
        same_label(z[:3], np.arange(3))


def test_information_and_rand_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for k in (2, 5):
        one, other = draw.integers(0, k, 60), draw.integers(0, 3, 60)
        other = np.where(draw.random(60) < 0.5, one % 3, other)
        assert normalised_information(one, other) == pytest.approx(metrics.normalized_mutual_info_score(one, other))
        assert adjusted_rand(one, other) == pytest.approx(metrics.adjusted_rand_score(one, other))
    assert normalised_information(one, 7 - one) == adjusted_rand(one, 7 - one) == 1


def test_clusters_are_the_labels_where_these_lie_apart_and_nothing_in_a_point():
    y = np.arange(60) % 3
    z = 9 * np.eye(3)[y] + np.random.default_rng(0).normal(size=(60, 3))
    found = clustering(z, np.where(y == 2, -1, y))
    assert (found.k, found.nmi.value, found.ari.value) == (2, 1, 1)
    assert set(found.clusters[y == 2]) == {-1}
    assert clustering(np.ones((60, 3)), y).nmi.value == 0


def test_a_tenth_of_the_labels_is_drawn_from_each_class_and_too_few_are_left_out():
    draw = np.random.default_rng(0)
    y, answers = np.repeat([0, 1], 100), np.arange(40) % 2
    z, test = (0.7 * np.eye(4)[labels] + draw.normal(size=(len(labels), 4)) for labels in (y, answers))
    found = few_labels(z, y, test, answers, shares=(0.01, 0.1, 1.0), draws=3)
    assert list(found.accuracy) == [0.1, 1.0], "one in a hundred would be one label"
    whole = linear_probe(z, y, test, answers).accuracy.value
    assert found.accuracy[1.0].value == pytest.approx(whole, abs=0.1) and found.accuracy[0.1].value <= whole + 0.1
    assert found.right[0.1].shape == (40,) and found.spread[0.1] > 0
    with pytest.raises(UsageError, match=r"shares in 0\.\.1"):
        few_labels(z, y, test, answers, shares=(2.0,))


def test_a_wide_matrix_of_few_rows_is_regressed_in_the_axes_of_its_rows():
    draw = np.random.default_rng(0)
    y = np.arange(30) % 3
    z, test = draw.normal(size=(30, 80)) + np.eye(3, 80)[y], draw.normal(size=(9, 80))
    reference = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=1 / (0.1 * 30), tol=1e-8, max_iter=999)
    mean, scale = z.mean(0), z.std(0)
    reference.fit((z - mean) / scale, y)
    (ours,) = module_regressions(z, y)
    shares = ours(torch.from_numpy(test).float()).softmax(1).numpy()
    np.testing.assert_allclose(shares, reference.predict_proba((test - mean) / scale), atol=2e-3)


def module_regressions(z, y):
    from twofold.measure.probes import _regressions

    return _regressions(torch.from_numpy(z).float(), torch.from_numpy(y), 3, [0.1])


# Layers.


@pytest.mark.parametrize(("name", "depth"), [("timm:resnet18/4", 5), ("timm:vit_tiny_patch16_224/4x12x2", 2)])
def test_an_encoder_ends_at_a_layer(name, depth):
    whole, x = image_encoder(name, size=16).eval(), torch.rand(2, 3, 16, 16)
    layers = [layer_of(whole, number).eval() for number in range(1, depth + 1)]
    assert len({fingerprint(layer) for layer in [whole, *layers]}) == depth + 1
    last = layers[-1](x)
    if "resnet" in name:
        torch.testing.assert_close(last, whole(x))
    with pytest.raises(UsageError, match=f"the layers 1 to {depth}; there is no layer:{depth + 1}"):
        layer_of(whole, depth + 1)


# Training on.


def test_fine_tuning_learns_what_an_untrained_encoder_does_not_know_and_leaves_it_alone():
    source = coloured(96)
    encoder = bundle().towers["image"].encoder
    before = fingerprint(encoder)
    found = fine_tune(encoder, source.split("train"), source.split("test"), epochs=8, quiet=True)
    assert fingerprint(encoder) == before
    assert found.accuracy.value > 0.9 > found.chance
    assert found.l2 in found.validation and len(found.predicted) == 48
    hidden = source.split("test")
    spoiled = fine_tune(
        encoder, source.split("train"), replace(hidden, labels=np.roll(hidden.labels, 1)), epochs=8, quiet=True
    )
    assert spoiled.predicted.tolist() == found.predicted.tolist(), "the test labels decide nothing"


# Suites.


def test_models_stand_beside_each_other_and_away_from_home():
    home = task("home", coloured(seed=1))
    strange = replace(coloured(24, noise=90, seed=2), classes=("green", "blue", "violet"), splits=None)
    strange = replace(strange, labels=np.array([(1, 2, 0)[k] for k in (np.arange(24) % 3)]))  # red is nobody's: violet
    away = elsewhere("away", home, strange)
    assert len(away.test) == 16 and set(away.test.labels) == {1, 2}
    done = suite({"a": bundle(0), "b": bundle(1)}, [home, away], at="layer:2", quiet=True)
    assert done.models == ["a", "a layer:2", "b", "b layer:2"]
    rest = ["untrained", "ImageNet weights", "pixels", "colours"]
    assert list(done.found["home"]) == [*done.models, *rest], "one architecture has one untrained row"
    assert done.found["home"]["colours"].linear.accuracy.value == 1
    gap = done.shifts["away"]["a"]
    away_of, home_of = (done.found[name]["a"].linear.accuracy.value for name in ("away", "home"))
    assert gap.value == pytest.approx(away_of - home_of) and gap.low <= gap.value <= gap.high
    assert set(done.shifts) == {"away"}
    found = done.differences("home")
    assert ("a", "colours") in found and ("b", "a") not in found
    one = against(done.found["home"]["colours"], done.found["home"]["a"], "linear")
    assert one.gap.value == pytest.approx(1 - home_of)
    with pytest.raises(DataError, match="share no class"):
        elsewhere("x", home, replace(strange, classes=("p", "q", "r")))


def test_a_suite_file_says_what_is_wrong_in_it(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.stack(coloured().images), labels=coloured().labels)

    def said(text: str) -> str:
        (tmp_path / "suite.toml").write_text(text)
        with pytest.raises((UsageError, DataError)) as error:
            read_suite(tmp_path / "suite.toml")
        return str(error.value)

    assert "is no TOML" in said("[[data]")
    assert "names no data" in said("")
    assert "'patth'. Did you mean 'path'" in said('[[data]]\nname = "a"\npatth = "a.npz"')
    assert "limit of [[data]] 1 is 'all'; it takes int" in said('[[data]]\nname = "a"\npath = "a.npz"\nlimit = "all"')
    assert "needs a name of its own" in said('[[data]]\npath = "a.npz"')
    assert "no splits" in said('[[data]]\nname = "a"\npath = "a.npz"')
    assert "it stands before" in said('[[data]]\nname = "a"\npath = "a.npz"\nfit = "b"')
    with pytest.raises(UsageError, match="cannot be read"):
        read_suite(tmp_path / "nothing.toml")


def test_the_verb_measures_models_beside_each_other(tmp_path, capsys):
    for split, seed in (("train", 0), ("test", 1)):
        source = coloured(24, seed=seed)
        for image, label, name in zip(source.images, source.labels, source.ids, strict=True):
            folder = tmp_path / "data" / split / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture = __import__("PIL.Image").Image.fromarray(image)
            picture.save(folder / f"{name}.png")
    for name, seed in (("a", 0), ("b", 1)):
        bundle(seed).save(tmp_path / name)
    (tmp_path / "suite.toml").write_text(
        '[[data]]\nname = "home"\npath = "data"\n[[data]]\nname = "away"\npath = "data"\nfit = "home"\n'
    )
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["evaluate", *models, "--suite", str(tmp_path / "suite.toml"), "--no-baselines", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["found"]["away"]) == ["a", "b"]
    assert figures["shifts"]["away"]["a"]["value"] == 0, "the same pictures"
    assert main(["evaluate", *models, "--data", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("ImageNet weights", "points ahead of", "a − b", "NMI", "5 a class"))
    tuned = ["--fine-tune", "--epochs", "1", "--no-baselines"]
    assert main(["evaluate", models[0], "--data", str(tmp_path / "data"), *tuned]) == 0
    assert "fine-tuned" in capsys.readouterr().out
    assert main(["evaluate", *models, "--data", "x", "--suite", "y"]) == 2
    assert main(["evaluate", models[0], "--data", str(tmp_path / "data"), "--at", "layer:9"]) == 2
    assert "the layers 1 to 5" in capsys.readouterr().err
    capsys.readouterr()
    drawn = "timm:resnet18/4@untrained"
    assert main(["evaluate", drawn, models[0], "--data", str(tmp_path / "data"), "--no-baselines", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["found"].values()
    assert list(found) == [drawn, "a"], "an encoder goes by its whole name"
    assert main(["evaluate", "nothing", "--data", str(tmp_path / "data")]) == 1
    assert "nothing is no folder here" in (said := capsys.readouterr().err) and "no encoder 'nothing'" in said
