"""The audit, on drawn pictures whose symmetries and colours are known; columns, families and shortcuts by hand."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold import runtime
from twofold.cli import main
from twofold.data.sources import Source
from twofold.errors import UsageError
from twofold.measure import policy_audit
from twofold.measure.audit_page import page
from twofold.measure.columns import columns_of, families_of, sample, words_of
from twofold.measure.policy_audit import _halved, _held_out, _placements, _strength, audit, share
from twofold.measure.shortcuts import SHORTCUTS, shortcuts
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.train.compare_policies import SHORT, compare
from twofold.views import NONE, SIMCLR, Policy, policies

SIZE = 24
HUES = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "violet": (160, 60, 200)}
SHAPES = ("up", "down", "left", "right")


def drawn(word: str, colour: tuple[int, int, int], noise: np.random.Generator) -> np.ndarray:
    """A triangle on gray that points somewhere."""
    picture = np.full((SIZE, SIZE, 3), 200.0)
    for row in range(4, 20):
        half = (row - 4) // 2
        picture[row, 11 - half : 13 + half] = colour
    turned = np.rot90(picture, {"up": 0, "left": 1, "down": 2, "right": 3}[word])
    return np.clip(turned + noise.normal(0, 12, turned.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def triangles() -> Source:
    """96 triangles: "a red triangle up"; the direction is the label."""
    noise = np.random.default_rng(0)
    ids, images, texts, labels = [], [], [], []
    for i in range(96):
        hue, way = list(HUES)[i % 4], SHAPES[i // 4 % 4]
        ids.append(str(i))
        images.append(drawn(way, HUES[hue], noise))
        texts.append([f"{hue} triangle {way}"])
        labels.append(SHAPES.index(way))
    return Source("triangles", ids, images=images, texts=texts, labels=np.array(labels), classes=SHAPES)


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return image_encoder("timm:resnet18/8", size=SIZE, small_stem=True)


@pytest.fixture(scope="module")
def audited(triangles, encoder):
    policy = replace(SIMCLR, size=SIZE, flip=0.5, hue=0.5, saturation=0.0, gray=0.0, blur=0.0)
    return audit((policy, policy), triangles, encoder=encoder, items=96, views=2, quiet=True)


def finding(audited, name):
    return next(f for f in (*audited.operations, *audited.candidates) if f.name == name)


def fall(audited, operation, name):
    return next(loss for loss in finding(audited, operation).losses if loss.name == name).fall


def test_a_flip_costs_directions_and_a_hue_costs_colours(audited):
    assert fall(audited, "flip", "label").value > 0.1
    assert fall(audited, "flip", "label").low > 0
    assert finding(audited, "flip").verdict == "not free"
    assert max(loss.fall.value for loss in finding(audited, "hue").losses if loss.kind == "word") > 0.1
    assert fall(audited, "hue", "label").value < 0.1
    assert finding(audited, "brightness").confusion is not None


def test_the_proposal_drops_what_is_not_free_and_can_be_trained_with(audited, tmp_path):
    assert all("flip" not in policy.operations for policy in audited.proposed)
    assert all("turns" not in policy.operations for policy in audited.proposed)
    path = tmp_path / "proposed.toml"
    audited.proposed[0].save(path)
    assert policies(str(path)) == audited.proposed[:1]


def test_colour_operations_do_nothing_to_gray_pictures(encoder):
    noise = np.random.default_rng(0)
    images = [np.repeat(noise.integers(0, 255, (SIZE, SIZE, 1), np.uint8), 3, axis=2) for _ in range(12)]
    source = Source("gray", [str(i) for i in range(12)], images=images)
    done = audit(policies("simclr"), source, encoder=encoder, views=1, quiet=True)
    idle = {f.name for f in done.operations if f.verdict == "does nothing"}
    assert idle == {"saturation", "hue", "gray"}
    assert not set(done.proposed[0].operations) & idle


def test_pictures_of_one_channel_are_audited_without_colour(encoder):
    noise = np.random.default_rng(0)
    images = [noise.integers(0, 255, (SIZE, SIZE), np.uint8) for _ in range(12)]
    source = Source("one", [str(i) for i in range(12)], images=images)
    policy = SIMCLR.without("saturation", "hue", "gray")
    done = audit((policy,), source, encoder=encoder, channels=1, views=1, quiet=True)
    assert {f.name for f in done.operations} == set(policy.operations)
    with pytest.raises(UsageError, match="3 channels"):
        audit((SIMCLR,), source, encoder=encoder, channels=1, views=1, quiet=True)


def test_the_same_seed_gives_the_same_audit(triangles, encoder):
    policy = replace(NONE, size=SIZE, flip=0.5)
    one, other = (audit((policy,), triangles, encoder=encoder, items=40, views=1, quiet=True) for _ in range(2))
    assert one.to_dict() == other.to_dict()


def test_the_page_needs_nothing_but_itself(audited):
    html = page(audited, notice="pictures by <somebody>")
    assert "pictures by &lt;somebody&gt;" in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "http" not in html
    for each in (*audited.operations, audited.whole):
        assert each.name in html


def test_falls_are_corrected_for_all_that_was_asked(audited):
    probe = policy_audit._Probe.__new__(policy_audit._Probe)
    values = np.random.default_rng(0).normal(0.1, 1, 50)
    probe._looks = 1
    once = probe._corrected(values, 1)
    often = probe._corrected(values, 100)
    assert often.low < once.low < once.value < once.high < often.high


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0, 0.3085), (1, 10, 0.0025, 0.4450), (5, 10, 0.1871, 0.8129)]
)
def test_the_interval_of_a_share_is_clopper_and_pearsons(hits, n, low, high):
    """The table of the book; and 6 arrows of 14 are surely more than none, at any level that an audit asks for."""
    found = share(np.arange(n) < hits, level=0.95)
    assert found == pytest.approx((hits / n, low, high), abs=1e-4)
    assert share((np.arange(14) < 6).astype(float), level=0.9998).low > 0.05
    partly = share(np.array([0.5] * 4 + [0.0] * 6), level=0.95)  # counts as two
    assert partly.low == share((np.arange(10) < 2).astype(float), level=0.95).low


def test_the_interval_of_a_share_holds_at_its_level_whatever_the_share():
    n = 12
    found = [share((np.arange(n) < hits).astype(float), level=0.8) for hits in range(n + 1)]
    for truth in (0.03, 0.2, 0.5, 0.9):
        likely = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        assert sum(p for p, one in zip(likely, found, strict=True) if one.low <= truth <= one.high) >= 0.8


def test_ridge_predicts_held_out_rows_only():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = x @ np.array([[1.0], [0.0], [-2.0]]) + 4
    fold = np.arange(60) % policy_audit.FOLDS
    assert np.abs(_held_out(x, y, fold) - y).max() < 0.1
    noise = rng.normal(size=(60, 50))  # more columns than it takes to know every row by heart
    assert np.corrcoef(_held_out(noise, y, fold)[:, 0], y[:, 0])[0, 1] < 0.5


def test_placements_by_hand():
    scores = np.array([[3.0], [1.0], [2.0], [0.0], [2.0]])
    has = np.array([True, True, False, False, False])
    assert _placements(scores, has).tolist() == [1.0, 1 / 3]
    assert _placements(np.zeros((4, 1)), np.array([True, False, False, False])).tolist() == [0.5]


def test_half_of_an_operation():
    assert _strength(SIMCLR, "hue") == pytest.approx(0.4)
    assert _halved(SIMCLR, "hue").hue == pytest.approx(0.1)
    assert _halved(SIMCLR, "hue").jitter == SIMCLR.jitter
    assert _halved(SIMCLR, "flip").flip == 0.25
    assert _halved(SIMCLR, "crop").area == pytest.approx((0.54, 1.0))
    assert _halved(SIMCLR, "turns") == SIMCLR


# Columns, words and families


def test_families_are_captions_that_differ_in_one_word():
    texts = [[f"{word} heart", "love"] for word in ("red", "pink", "lime", "gold", "green", "blue", "teal", "brown")]
    (family,) = families_of([*texts, ["broken glass"], []])
    assert (family.pattern, family.items, family.words[1]) == ("… heart", list(range(8)), "pink")
    again = [[f"{text[0]} again"] for text in texts]
    assert len(families_of([*texts, *again])) == 1, "nearly the same words: one of the two is enough"


def test_words_and_columns_that_are_too_rare_are_not_asked():
    texts = [["red thing" if i < 8 else "blue thing"] for i in range(15)]
    assert list(words_of(texts)) == []  # 8 of 15 are red, but only 7 are not; everything is a thing
    assert list(words_of([*texts, ["blue thing"]])) == ["blue", "red"]
    meta = {"ward": ["a", "b"] * 10, "patient": [str(i) for i in range(20)], "same": ["x", "y"] * 10, "one": ["z"] * 20}
    source = Source("s", [str(i) for i in range(20)], images=[b""] * 20, meta=meta)
    assert [column.name for column in columns_of(source)] == ["ward"], "a column that says the same is not asked twice"
    with pytest.raises(UsageError, match="'ward'"):
        columns_of(source, ["wrad"])


def test_a_sample_keeps_what_is_rare():
    labels = np.array([0] * 900 + [1] * 20)
    source = Source("s", [str(i) for i in range(920)], images=[b""] * 920, labels=labels, classes=("often", "seldom"))
    chosen = sample(source, 60, runtime.generator(0))
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert (labels[chosen] == 1).sum() == 20
    assert np.array_equal(sample(source, 2000, runtime.generator(0)), np.arange(920))


# Shortcuts


def test_views_of_nothing_are_found_by_every_shortcut_and_noise_by_none():
    x = torch.rand(40, 3, 32, 32, generator=runtime.generator(0))
    tints = torch.rand(40, 3, 1, 1, generator=runtime.generator(1))
    same = shortcuts((replace(NONE, size=32),), (x + tints) / 2, runtime.generator(0))
    assert all(top.value == 1 for top in same.values())
    flat = torch.full((40, 3, 32, 32), 0.5)
    assert all(top.value == 0 for top in shortcuts((replace(NONE, size=32),), flat, runtime.generator(0)).values())


def test_crops_share_their_colours_until_jitter_takes_them():
    tints = torch.rand(64, 3, 1, 1, generator=runtime.generator(0))
    x = (tints + 0.1 * torch.rand(64, 3, 32, 32, generator=runtime.generator(1))).clamp(0, 1)
    crop = replace(SIMCLR, size=32).only("crop")
    jitter = replace(SIMCLR, size=32).only("crop", "brightness", "contrast", "saturation", "hue")
    open_, closed = (shortcuts((p, p), x, runtime.generator(0))["colour histogram"].value for p in (crop, jitter))
    assert open_ > 0.8 > 0.4 > closed


@pytest.mark.parametrize("name", SHORTCUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_shortcuts_take_any_channels(name, channels):
    found = SHORTCUTS[name](torch.rand(4, channels, 30, 30, generator=runtime.generator(0)))
    assert found.shape[0] == 4
    assert found.isfinite().all()


def test_mean_colour_and_histogram_by_hand():
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0] = 1
    assert SHORTCUTS["mean colour"](x).tolist() == [[1, 0, 0]]
    histogram = SHORTCUTS["colour histogram"](x)
    assert histogram.nonzero().tolist() == [[0, 5]]
    assert histogram[0, 5] == 1


# Comparison and command line


def test_policies_are_compared_and_a_second_call_trains_nothing(triangles, tmp_path):
    Policy(size=SIZE).only("crop").save(tmp_path / "crop.toml")
    setting = replace(SHORT, encoder="timm:resnet18/8", size=16, small_stem=True, batch=32, epochs=1)
    names = ["simclr", str(tmp_path / "crop.toml")]
    first = compare(names, triangles, out=tmp_path / "runs", setting=setting, seeds=(0,), quiet=True)
    assert [score.name for score in first.scores] == names
    assert first.held_out == 19
    assert first.steps == 2
    for score in first.scores:
        assert 0 <= score.retrieval.value <= 1
        assert score.knn is not None
        assert 1 <= score.rank[0] <= 64
    stamp = (tmp_path / "runs" / "crop-0" / "scores.json").stat().st_mtime_ns
    again = compare(names, triangles, out=tmp_path / "runs", setting=setting, seeds=(0,), quiet=True)
    assert again == first
    assert (tmp_path / "runs" / "crop-0" / "scores.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="different names"):
        compare(["simclr", "simclr"], triangles, out=tmp_path, setting=setting, quiet=True)


def test_the_command_writes_sheet_and_ladder(tmp_path, capsys):
    noise = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", image=noise.integers(0, 255, (12, 20, 20, 3), np.uint8))
    out = tmp_path / "out"
    command = ["views", str(tmp_path / "data.npz"), "--out", str(out), "--policy.hue", "0", "--policy.area", "0.5", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "area 0.5–1" in said
    assert "hue" not in said
    assert (out / "sheet.png").is_file()
    assert (out / "ladder.png").is_file()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--policy.heu", "0"], "Did you mean 'hue'"),
        (["--policy.area", "0.5"], "takes 2 numbers"),
        (["--policy.hue=red"], "takes a number"),
        (["--policy", "simcrl"], "Did you mean 'simclr'"),
        (["--policy.hue", "0.9"], "hue must be"),
    ],
)
def test_a_wrong_policy_is_refused_with_the_nearest(flags, says, capsys):
    assert main(["views", "openmoji", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "dtype", "policy"), [(13, np.uint16, "multispectral"), (1, np.uint8, "xray")])
def test_pictures_of_many_bands_or_one_are_trained_on_measured_and_embedded(tmp_path, capsys, channels, dtype, policy):
    """One band in three is bright: which, is the class. From arrays on disk to vectors that a file holds."""
    noise = np.random.default_rng(0)
    labels = np.arange(24) % 2
    bands = noise.integers(0, np.iinfo(dtype).max // 8, (24, 16, 16, channels)).astype(dtype)
    for picture, label in zip(bands, labels, strict=True):
        picture[8 * label : 8 * label + 8, ..., ::3] += np.iinfo(dtype).max // 2
    data, run, vectors = tmp_path / "bands", tmp_path / "run", tmp_path / "vectors.npz"
    data.mkdir()
    np.savez(data / "train.npz", images=bands[:16], labels=labels[:16])
    np.savez(data / "test.npz", images=bands[16:], labels=labels[16:])
    common = f"--out {run} --encoder timm:resnet18/8 --size 16 --small-stem --batch 8 --epochs 2".split()

    if channels > 3:
        assert main(["train", "simclr", str(data), *common, "--policy", policy]) == 1
        assert "has 13 channels, expected 3; --channels 13 takes it" in capsys.readouterr().err
    common += ["--channels", str(channels)]
    assert main(["train", "simclr", str(data), *common, "--policy", "simclr"]) == 2
    assert "--policy.hue 0" in capsys.readouterr().err
    assert main(["train", "simclr", str(data), *common, "--policy", policy, "--policy.area", "1e-4", "1e-3"]) == 2
    assert "less than one pixel" in capsys.readouterr().err

    assert main(["train", "simclr", str(data), *common, "--policy", policy]) == 0  # a refused run left nothing behind
    assert main(["evaluate", str(run), "--data", str(data), "--json"]) == 0
    assert main(["embed", str(data), "--model", str(run), "--out", str(vectors)]) == 0
    with np.load(vectors) as found:
        assert found["vectors"].shape == (24, 64) and found["vectors"].std(0).max() > 0
    assert Bundle.load(run).tower("image").encoder.channels == channels
