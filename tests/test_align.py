"""Two kinds of data brought into one space, whatever learns, and what is wrong with the data said clearly."""

import io
import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from wave import open as wave_file

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold.cli import main
from twofold.data import cache
from twofold.data.audio import hear
from twofold.data.loader import Batches
from twofold.data.sources import Column, Source, open_source
from twofold.errors import DataError, UsageError
from twofold.mining import Known, hard_negatives
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import encoder, image_encoder
from twofold.train import align as module
from twofold.train.align import Recipe, agreement, align
from twofold.train.lora import low_rank
from twofold.train.weights import Weights, read_weights

SMALL = Recipe(batch=32, epochs=20, dim=16, hidden=64, dropout=0.1)
VECTORS = {"a": "vectors", "b": "vectors"}
READS = ""  # the name of a small text encoder: see `reads`


def vectors(n: int = 160, *, seed: int = 0, noise: float = 0.0, width: int = 12) -> Source:
    """Two linear pictures of one hidden thing; the first three quarters are for training, the rest validates."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(n, 8))
    sides = {name: hidden @ draw.normal(size=(8, wide)) for name, wide in (("a", 16), ("b", width))}
    cells = {name: list((x + noise * draw.normal(size=x.shape)).astype(np.float32)) for name, x in sides.items()}
    return Source(
        "made",
        [f"item{i}" for i in range(n)],
        columns={name: Column("vector", each) for name, each in cells.items()},
        splits=["train"] * (3 * n // 4) + ["val"] * (n - 3 * n // 4),
    )


def words(texts, **columns) -> Source:
    """Items with texts, and vectors for the other side."""
    draw = np.random.default_rng(1)
    cells = [draw.normal(size=4).astype(np.float32) for _ in texts]
    named = {"v": Column("vector", cells), **columns}
    return Source("made", [f"item{i}" for i in range(len(texts))], texts=texts, columns=named)


@pytest.fixture(scope="module", autouse=True)
def reads(tmp_path_factory):
    """A small text encoder, in a bundle: as good as a pretrained one, for what is tested here."""
    global READS
    torch.manual_seed(0)
    texts = Column("text", [["a text about a red thing, with light on the left, number 0123456789"] * 2])
    folder = tmp_path_factory.mktemp("reads")
    Bundle({"text": Tower(encoder("bpe:tiny", column=texts))}).save(folder / "bundle")
    READS = f"local:{folder / 'bundle'}"


@pytest.fixture
def no_training(monkeypatch):
    """`align` up to where training would begin; gives what `fit` was called with."""

    class Begun(Exception):
        pass

    seen = {}

    def fit(method, batches, **options):
        seen.update(method=method, batches=batches, **options)
        raise Begun

    monkeypatch.setattr(module, "fit", fit)

    def run(pairs, out, **options):
        with pytest.raises(Begun):
            align(pairs, out=out, quiet=True, **options)
        return seen

    return run


# --- what it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["siglip", "clip", "triplet"])
def test_any_two_modalities_come_into_one_space(objective, tmp_path):
    pairs = vectors()
    done = align(pairs, out=tmp_path, towers=VECTORS, recipe=replace(SMALL, objective=objective), quiet=True)
    assert done.after is not None and done.before is not None
    assert done.after > 2 * done.before and done.after > 0.5
    bundle = Bundle.load(tmp_path)
    assert (bundle.fingerprint, list(bundle.towers)) == (done.bundle.fingerprint, ["a", "b"])
    assert bundle.meta["validation"]["after"] == done.after
    held = pairs.split("val")
    a, b = (bundle.towers[name](torch.from_numpy(np.stack(held.column(name).cells))) for name in VECTORS)
    of = torch.arange(len(held))
    assert agreement(a, b, of, of) == pytest.approx(done.after, abs=1e-6), "the bundle holds the best weights"
    looked = [line for line in done.run.log if "hardest" in line]
    assert looked, "with each checkpoint the log says how hard the negatives are"
    assert all(line["positive"] <= 1 and -1 <= line["hardest"] <= 1 and 0 < line["sharing"] <= 1 for line in looked)


def test_agreement_is_the_mean_of_six_recalls():
    """By hand: three queries and a gallery of twelve, so that R@1, R@5 and R@10 differ."""
    first = torch.eye(12)
    second = torch.eye(12)[torch.tensor([0, 2, 1, *range(3, 12)])]  # two are swapped
    of = torch.arange(12)
    # Swapped ones have their partner tied with ten others at cosine 0, and one above: rank 12, beyond 10.
    assert agreement(first, second, of, of) == pytest.approx(10 / 12)
    assert agreement(first, first, of, of) == 1
    assert agreement(torch.ones(12, 3), torch.ones(12, 3), of, of) == 0, "a point is right about nothing"
    assert agreement(first, second, of // 3, of // 3) == 1, "every row of one number is a right answer"


def test_the_best_weights_of_training_are_kept_and_it_stops_when_nothing_is_gained(tmp_path):
    recipe = replace(SMALL, epochs=200, patience=3, lr=1e-2)
    done = align(vectors(), out=tmp_path, towers=VECTORS, recipe=recipe, quiet=True)
    scores = {line["step"]: line["recall"] for line in done.run.log if "recall" in line}
    assert done.run.steps < 200 * 3
    assert done.after == max(scores.values()) == scores[done.run.best]
    assert done.run.steps == done.run.best + 3 * 3


def test_without_a_split_to_validate_on_a_share_is_held_out_and_what_is_linked_stays_together(no_training, tmp_path):
    texts = [[f"text {i // 2}", f"other {i}"] for i in range(80)]  # two items share a text each
    towers = {"v": "vectors", "text": READS}
    seen = no_training(words(texts), tmp_path, towers=towers, recipe=replace(SMALL, batch=8, holdout=0.25))
    held = {*seen["watch"].score.source.ids}
    assert 8 < len(held) < 34
    assert all((f"item{2 * i}" in held) == (f"item{2 * i + 1}" in held) for i in range(40))
    with pytest.raises(DataError, match="leaves 0 to validate on"):
        align(words(texts), out=tmp_path, towers=towers, recipe=replace(SMALL, holdout=1e-9), quiet=True)
    seen = no_training(words(texts), tmp_path, towers=towers, recipe=replace(SMALL, batch=8))
    assert seen["watch"] is None


def test_stopped_and_started_again_it_ends_with_the_same_bundle(tmp_path, monkeypatch):
    recipe = replace(SMALL, epochs=8, dropout=0.3)
    whole = align(vectors(noise=0.1), out=tmp_path / "whole", towers=VECTORS, recipe=recipe, quiet=True)
    genuine = Batches.__getitem__

    def stops(self, step):
        if step == 13:
            raise KeyboardInterrupt  # as sudden as a kill
        return genuine(self, step)

    monkeypatch.setattr(Batches, "__getitem__", stops)
    with pytest.raises(KeyboardInterrupt):
        align(vectors(noise=0.1), out=tmp_path / "killed", towers=VECTORS, recipe=recipe, quiet=True)
    monkeypatch.undo()
    again = align(vectors(noise=0.1), out=tmp_path / "killed", towers=VECTORS, recipe=recipe, quiet=True)
    assert again.bundle.fingerprint == whole.bundle.fingerprint
    assert again.after == whole.after


# --- what belongs together is pushed apart by nothing -----------------------------------------------------------------


def test_items_with_a_text_or_a_file_in_common_never_meet_in_a_batch(no_training, tmp_path):
    texts = [
        [f"own {i}", ("a  Dog." if i % 2 else "A dog") if i % 10 == 0 or i % 10 == 5 else f"more {i}"]
        for i in range(40)
    ]
    pairs = words(texts)
    cells = list(pairs.column("v").cells)
    cells[1] = cells[2]  # the same vector at two items
    pairs = replace(pairs, columns={"v": Column("vector", cells)})
    seen = no_training(pairs, tmp_path, towers={"v": "vectors", "text": READS}, recipe=replace(SMALL, batch=5))
    linked = [{0, 5, 10, 15, 20, 25, 30, 35}, {1, 2}]
    row_of = {tuple(np.asarray(cell).tolist()): i for i, cell in enumerate(cells)}
    visited = set()
    for step in range(40):
        items = [row_of[tuple(row)] for row in seen["batches"][step]["v"].tolist()]
        visited |= set(items)
        assert all(len(group & set(items)) <= 1 for group in linked), items
    assert len(visited | {1, 2}) == 40
    assert seen["batches"].batch == 5


def test_a_batch_is_no_larger_than_what_differs(no_training, tmp_path):
    texts = [["cat"], ["dog"], ["cow"]] * 8
    seen = no_training(words(texts), tmp_path, towers={"v": "vectors", "text": READS})
    assert (seen["batches"].batch, seen["batches"].steps_per_epoch) == (3, 8)


def test_every_caption_of_an_item_is_shown(no_training, tmp_path):
    texts = [[f"{i} {k}" for k in range(3)] for i in range(12)]
    seen = no_training(words(texts), tmp_path, towers={"v": "vectors", "text": READS}, recipe=replace(SMALL, batch=6))
    rows = {tuple(row) for step in range(60) for row in seen["batches"][step]["text"].tolist()}
    assert len(rows) == 36


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_pair_is_seen_in_its_share_of_the_epochs(no_training, tmp_path):
    pairs = vectors()
    ids = pairs.split("train").ids
    weights = {ids[0]: 0.0, ids[1]: 0.5, ids[2]: 0.25}
    seen = no_training(pairs, tmp_path, towers=VECTORS, recipe=replace(SMALL, batch=8), weights=weights)
    batches = seen["batches"]
    cells = {tuple(cell.tolist()): id for id, cell in zip(ids, pairs.column("a").cells, strict=False)}
    epochs = 80
    count = dict.fromkeys(ids, 0)
    for step in range(epochs * batches.steps_per_epoch):
        for row in batches[step]["a"].tolist():
            count[cells[tuple(row)]] += 1
    full = batches.steps_per_epoch * 8 / (len(ids) - 3 + 0.75)  # what the last, partial batch leaves of an epoch
    assert count[ids[0]] == 0
    assert count[ids[1]] / epochs == pytest.approx(0.5 * full, abs=0.06)
    assert count[ids[2]] / epochs == pytest.approx(0.25 * full, abs=0.06)
    assert seen["record"]["weights"] == Weights(weights).key


def test_single_texts_have_weights_of_their_own(tmp_path, no_training):
    texts = [[f"good {i}", f"bad {i}"] for i in range(12)]
    table = tmp_path / "pairs.csv"
    rows = [f"item{i},bad {i},0,0.1" for i in range(12)] + ["item0,good 0,0,0.9"]
    table.write_text("\n".join(["id,text,weight,score", *rows]))
    weights = read_weights(table)
    pairs = words(texts)
    towers = {"v": "vectors", "text": READS}
    assert weights.shares(pairs, towers).tolist() == [0.0] + [1.0] * 11, "the other text gets the visits"
    seen = no_training(pairs, tmp_path, towers=towers, recipe=replace(SMALL, batch=3), weights=table)
    assert seen["record"]["items"] == 11
    text = seen["batches"].columns["text"]
    drawn = {row for step in range(50) for item in [np.arange(11)] for row in text.drawn(item, np.full(11, step / 50))}
    assert drawn == set(range(0, 22, 2)), "only the good ones"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("id,score\nitem0,1\n", "no column 'weight'"),
        ("id,weight\nitem0,much\n", "from 0 to 1"),
        ("id,weight\nitem0,1.5\n", r"'item0' has 1\.5"),
        ("id,weight\nelsewhere,0.5\n", "for instance 'elsewhere'"),
        ("id,weight\n" + "".join(f"item{i},0\n" for i in range(12)), "all weigh 0"),
    ],
)
def test_weights_that_cannot_be_used_say_why(table, says, tmp_path):
    path = tmp_path / "w.csv"
    path.write_text(table)
    pairs = words([[str(i)] for i in range(12)])
    with pytest.raises(DataError, match=says):
        align(pairs, out=tmp_path, towers={"v": "vectors", "text": READS}, weights=path, quiet=True)


# --- encoders that learn ----------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (230, 230, 230)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 small pictures of four colours and four ways of shading, each with two texts."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["image,caption,split"]
    slopes = {"left": (1, 0), "right": (-1, 0), "top": (0, 1), "bottom": (0, -1)}
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    for i in range(24):
        (colour, rgb), (side, (a, b)) = list(COLOURS.items())[i % 4], list(slopes.items())[i // 6]
        light = 1 - 0.4 * (a * x + b * y)[..., None]
        draw = np.random.default_rng(i).normal(0, 6, (32, 32, 3))
        Image.fromarray(np.clip(light * rgb + draw, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows += [f"{i}.png,{colour} with light on the {side} number {i},{'val' if i % 6 == 5 else 'train'}"]
        rows += [f"{i}.png,light on the {side} of {colour} number {i},{'val' if i % 6 == 5 else 'train'}"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    """A small network with BatchNorms in a bundle: as good as pretrained, for what is tested here."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    one = image_encoder("timm:resnet18/8", size=32, small_stem=True)
    for layer in one.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    Bundle({"image": Tower(one)}).save(folder / "bundle")
    return f"local:{folder / 'bundle'}"


TUNED = Recipe(batch=6, epochs=2, dim=16, hidden=0, dropout=0.0, patience=9, encoder_lr=1e-2, weight_decay=0.0)


def moved(before: Bundle, after: Bundle, name: str) -> dict[str, torch.Tensor]:
    """What training changed of a tower's encoder, by parameter or buffer."""
    one, two = (bundle.towers[name].encoder.state_dict() for bundle in (before, after))
    assert one.keys() == two.keys()
    return {key: (two[key] - one[key]) for key in one if not torch.equal(one[key], two[key])}


@pytest.mark.parametrize("train", ["image", "text", "all"])
def test_what_is_said_is_trained_and_nothing_else(train, pictures, pretrained, tmp_path):
    towers = {"image": pretrained, "text": "bpe:tiny" if train != "image" else READS}
    recipe = replace(TUNED, train=train)
    done = align(open_source(pictures / "captions.csv"), out=tmp_path, towers=towers, recipe=recipe, quiet=True)
    for name in towers:
        changes = moved(done.untrained, done.bundle, name)
        assert bool(changes) == (train in ("all", name))
        assert not any("running" in key or "num_batches" in key for key in changes), "statistics are kept"
    assert Bundle.load(tmp_path).fingerprint == done.bundle.fingerprint


@pytest.mark.parametrize("train", ["image", "lora"])
def test_an_encoder_that_learns_is_stopped_and_started_like_any_other(
    train, pictures, pretrained, tmp_path, monkeypatch
):
    data, towers = open_source(pictures / "captions.csv"), {"image": pretrained, "text": READS}
    recipe = replace(TUNED, train=train, epochs=3)
    genuine = Batches.__getitem__

    def run(out: str, stop: int | None = None):
        def stops(self, step):
            if step == stop:
                signal.raise_signal(signal.SIGINT)  # finishes the step and writes a checkpoint
            return genuine(self, step)

        monkeypatch.setattr(Batches, "__getitem__", stops)
        return align(data, out=tmp_path / out, towers=towers, recipe=recipe, quiet=True)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop=5)
    assert run("killed").bundle.fingerprint == whole.bundle.fingerprint


def test_rates_are_of_single_encoders(pictures, pretrained, tmp_path):
    towers = {"image": pretrained, "text": "bpe:tiny"}
    recipe = replace(TUNED, train="all", rates={"image": 0.0})
    done = align(open_source(pictures / "captions.csv"), out=tmp_path, towers=towers, recipe=recipe, quiet=True)
    assert not moved(done.untrained, done.bundle, "image") and moved(done.untrained, done.bundle, "text")


def test_lora_changes_weights_by_its_rank_and_the_bundle_needs_no_peft(pictures, pretrained, tmp_path, monkeypatch):
    recipe = replace(TUNED, train="lora", rank=2)
    towers = {"image": pretrained, "text": READS}
    done = align(open_source(pictures / "captions.csv"), out=tmp_path, towers=towers, recipe=recipe, quiet=True)
    for name in towers:
        changes = {key: change for key, change in moved(done.untrained, done.bundle, name).items()}
        assert changes and all(key.endswith("weight") for key in changes)
        for key, change in changes.items():
            assert torch.linalg.matrix_rank(change.flatten(1), atol=1e-6) <= 2, key
    monkeypatch.setitem(sys.modules, "peft", None)
    assert Bundle.load(tmp_path).fingerprint == done.bundle.fingerprint
    with pytest.raises(UsageError, match=r"pip install twofold\[lora\]"), low_rank([nn.Linear(2, 2)], rank=1):
        pass


def test_views_of_a_frozen_encoder_are_embedded_once_and_drawn(pictures, pretrained, tmp_path, no_training):
    data, towers = open_source(pictures / "captions.csv"), {"image": pretrained, "text": READS}
    recipe = replace(SMALL, batch=6, views=2)
    columns = [no_training(data, tmp_path, towers=towers, recipe=recipe)["batches"].columns["image"] for _ in range(2)]
    assert np.array_equal(columns[0].rows, columns[1].rows)
    rows = columns[0].rows.reshape(20, 3, -1)
    plain = no_training(data, tmp_path, towers=towers, recipe=replace(recipe, views=0))["batches"].columns["image"]
    assert np.array_equal(rows[:, 0], plain)
    assert all(len({tuple(view) for view in views.tolist()}) == 3 for views in rows)


def test_an_encoder_from_scratch_must_learn(tmp_path):
    with pytest.raises(UsageError, match="--train text, or all"):
        align(
            words([[str(i)] for i in range(9)]), out=tmp_path, towers={"v": "vectors", "text": "bpe:tiny"}, quiet=True
        )


# --- encoders that share a space --------------------------------------------------------------------------------------


def alike(n: int = 120) -> Source:
    draw = np.random.default_rng(3)
    common = draw.normal(size=(n, 16))
    sides = {name: list((common + 0.8 * draw.normal(size=(n, 16))).astype(np.float32)) for name in VECTORS}
    columns = {name: Column("vector", cells) for name, cells in sides.items()}
    splits = ["train"] * (n // 2) + ["val"] * (n - n // 2)
    return Source("made", [str(i) for i in range(n)], columns=columns, splits=splits)


def test_encoders_that_agree_already_start_from_what_they_know(tmp_path):
    pairs = alike()
    done = align(pairs, out=tmp_path, towers=VECTORS, recipe=replace(SMALL, epochs=3, lr=1e-4), quiet=True)
    a, b = (torch.from_numpy(np.stack(pairs.split("val").column(name).cells)) for name in VECTORS)
    of = torch.arange(len(a))
    assert done.before == pytest.approx(agreement(a, b, of, of), abs=1e-6), "before training: the encoders as they are"
    assert done.before > 0.5


def test_training_that_makes_them_worse_is_said(tmp_path, capsys):
    recipe = replace(SMALL, epochs=4, lr=3.0, batch=8)
    done = align(alike(), out=tmp_path, towers=VECTORS, recipe=recipe, quiet=True)
    assert done.after < done.before
    assert "Training made it worse" in capsys.readouterr().err
    align(vectors(), out=tmp_path / "other", towers=VECTORS, recipe=replace(recipe, lr=10.0), quiet=True)
    assert not capsys.readouterr().err, "towers that never shared a space have nothing to forget"


def test_a_sound_encoder_learns_from_files_that_are_decoded_once(tmp_path, monkeypatch):
    said = torch.eye(8)[torch.arange(48) % 8].numpy()
    for item in range(48):
        wave = np.sin(2 * np.pi * (300 * 1.4 ** (item % 8) + item) * np.arange(3200 + 80 * item) / 16_000)
        (tmp_path / f"{item}.wav").write_bytes(wav(wave))
    columns = {"speech": Column("audio", [tmp_path / f"{item}.wav" for item in range(48)])}
    columns["v"] = Column("vector", list(said + 0.01 * np.arange(48, dtype=np.float32)[:, None]))
    pairs = Source("tones", [str(i) for i in range(48)], columns=columns, splits=["train"] * 32 + ["val"] * 16)
    recipe = Recipe(objective="clip", train="speech", batch=8, epochs=8, dim=16, hidden=0)
    heard = []
    monkeypatch.setattr(cache, "hear", lambda sound, **how: heard.append(sound) or hear(sound, **how))
    done = align(pairs, out=tmp_path / "run", towers={"speech": "mel:tiny", "v": "vectors"}, recipe=recipe, quiet=True)
    assert len(heard) == 48 and done.after > done.before + 0.1


def wav(wave: np.ndarray) -> bytes:
    out = io.BytesIO()
    with wave_file(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((wave * 2**14).astype(np.int16).tobytes())
    return out.getvalue()


# --- data that cannot be used -----------------------------------------------------------------------------------------


def test_one_sided_data_says_what_is_missing_and_what_there_is(tmp_path):
    with pytest.raises(DataError, match=r"image and text; made has no image. Its modalities are text \(text\), v"):
        align(words([["a"], ["b"]]), out=tmp_path)
    with pytest.raises(DataError, match="has no speech"):
        align(words([["a"], ["b"]]), out=tmp_path, towers={"speech": "mel:small", "text": "minilm"})
    with pytest.raises(UsageError, match="between two modalities; got 3"):
        align(words([["a"]]), out=tmp_path, towers={"image": "minilm", "text": READS, "v": "vectors"})
    with pytest.raises(UsageError, match="Did you mean 'text'"):
        align(words([["a"]]), out=tmp_path, towers={"v": "vectors", "text": READS}, recipe=Recipe(train="texts"))


def test_blank_captions_are_left_out_and_only_blank_ones_are_refused(tmp_path, no_training):
    texts = [["", "  \n", "said"], ["   "], [], ["twice", "twice"], ["a"], ["b"]]
    seen = no_training(words(texts), tmp_path, towers={"v": "vectors", "text": READS}, recipe=replace(SMALL, batch=2))
    assert seen["record"]["items"] == 4
    assert np.diff(seen["batches"].columns["text"].offsets).tolist() == [1, 1, 1, 1]
    with pytest.raises(DataError, match="6 items, and none with a text that is not blank in text"):
        align(words([[" "]] * 6), out=tmp_path, towers={"v": "vectors", "text": READS}, quiet=True)


def test_a_caption_of_ten_thousand_characters_is_read_as_far_as_the_encoder_reads(tmp_path):
    texts = [[("long words " * 1000)[:10_000]], *([f"text {i}"] for i in range(11))]
    recipe = replace(SMALL, batch=4, epochs=1)
    done = align(words(texts), out=tmp_path, towers={"v": "vectors", "text": READS}, recipe=recipe, quiet=True)
    assert math.isfinite(done.run.log[-1]["loss"])
    assert np.isfinite(done.bundle.encode([texts[0][0]])).all()


def test_missing_files_are_skipped_and_named_or_refused(pictures, pretrained, tmp_path):
    table = tmp_path / "captions.csv"
    rows = (pictures / "captions.csv").read_text().replace("split", "set").replace("\n3.png", "\nlost.png")
    table.write_text(rows)
    recipe = replace(SMALL, batch=8, epochs=1)
    data, towers = open_source(table, images=pictures), {"image": pretrained, "text": READS}
    done = align(data, out=tmp_path / "run", towers=towers, recipe=recipe, quiet=True)
    assert [skip.id for skip in done.skipped] == ["lost.png"]
    with pytest.raises(DataError, match=r"lost\.png"):
        align(data, out=tmp_path / "other", towers=towers, recipe=recipe, on_error="raise", quiet=True)
    table.write_text(rows.replace(".png", ".gone"))
    with pytest.raises(DataError, match="none of its 24 pictures exist"):
        open_source(table, images=pictures)


def test_ids_that_stand_twice_and_tables_that_are_not_utf8_are_named_by_row(pictures, tmp_path, capsys):
    table = tmp_path / "captions.csv"
    table.write_text("id,image,caption\n1,0.png,one\n1,1.png,other\n")
    assert main(["align", str(table), "--images", str(pictures), "--out", str(tmp_path / "run")]) == 1
    assert "rows 1 and 2 are both '1' but differ in image" in capsys.readouterr().err
    table.write_bytes("image,caption\n0.png,Café\n".encode("cp1252"))
    assert main(["align", str(table), "--images", str(pictures), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "line 2 is not UTF-8" in said and "iconv" in said
    assert not (tmp_path / "run").exists()


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_names_towers_and_columns(tmp_path, capsys):
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(48, 4))
    (tmp_path / "v.npy").parent.mkdir(exist_ok=True)
    np.save(tmp_path / "left.npy", hidden @ draw.normal(size=(4, 8)))
    np.save(tmp_path / "right.npy", hidden @ draw.normal(size=(4, 6)))
    rows = [f"{i},{'val' if i % 4 == 3 else 'train'}" for i in range(48)]
    (tmp_path / "table.csv").write_text("\n".join(["id,split", *rows]))
    flags = ["--towers", "left=vectors", "right=vectors", "--batch", "12", "--epochs", "3", "--hidden", "8"]
    columns = ["--columns", f"left={tmp_path / 'left.npy'}", f"right={tmp_path / 'right.npy'}"]
    command = ["align", str(tmp_path / "table.csv"), "--out", str(tmp_path / "run"), *flags]
    assert main([*command, *columns, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 9 and 0 < told["validation"]["after"] <= 1
    assert main([*command, "--columns", "left"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def mined_before(folder: Path, ids: list[str]) -> Path:
    """A file in which each item's negative is the item before."""
    (folder / "hard.jsonl").write_text("".join('{"anchor": "", "positive": "", "negative_1": ""}\n' for _ in ids))
    named = [{"anchor_id": id, "positive_id": id, "negative_1_id": ids[i - 1]} for i, id in enumerate(ids)]
    (folder / "hard.ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    return folder / "hard.jsonl"


@pytest.mark.parametrize("objective", ["siglip", "triplet"])
def test_mined_negatives_meet_with_their_partners(objective, tmp_path, no_training):
    pairs = vectors()
    train = pairs.split("train")
    hard, recipe = mined_before(tmp_path, list(train.ids)), replace(SMALL, batch=12, objective=objective)
    row = {cells.tobytes(): item for item, cells in enumerate(np.stack(train.column("a").cells))}
    met = []
    for negatives in (hard, None):
        batches = no_training(pairs, tmp_path, towers=VECTORS, recipe=recipe, negatives=negatives)["batches"]
        seen = [[row[cells.tobytes()] for cells in batches[step]["a"].numpy()] for step in range(10)]
        assert sorted(item for batch in seen for item in batch) == list(range(120)), "an epoch visits each once"
        met.append(sum((item - 1) % 120 in batch for batch in seen for item in batch))
    assert met[0] > 40 and met[1] < 22, "half of them can: who was fetched fetches nobody"


def test_with_mined_negatives_the_scale_and_bias_are_kept_for_calibration(tmp_path):
    pairs = vectors()
    hard, recipe = mined_before(tmp_path, list(pairs.split("train").ids)), replace(SMALL, epochs=2, mine=1)
    done = align(pairs, out=tmp_path / "run", towers=VECTORS, recipe=recipe, quiet=True)
    assert done.bundle.meta["siglip"]["scale"] > 0 and "hardest" in done.run.log[-1]
    with pytest.raises(UsageError, match="not both"):
        align(pairs, out=tmp_path, towers=VECTORS, recipe=recipe, negatives=hard, quiet=True)


def test_a_model_mines_its_own_negatives_as_it_learns(tmp_path, no_training):
    pairs = vectors()
    seen = no_training(pairs, tmp_path, towers=VECTORS, recipe=replace(SMALL, mine=2))
    method, train = seen["method"], pairs.split("train")
    assert method.every == 2 * seen["batches"].steps_per_epoch and (method.beside < 0).all()
    first, second = (
        tower(torch.from_numpy(np.stack(train.column(name).cells))) for name, tower in method.eval().towers().items()
    )
    own = [[item] for item in range(len(train))]
    known = Known(same={"item": range(len(train))}, alike={"a": first})
    found = hard_negatives(first, second, own, k=30, known=known, depth=400)
    assert torch.equal(method.mine(method), found.negatives) and (found.negatives >= 0).any()
    with pytest.raises(UsageError, match="takes frozen encoders"):
        texts = words([[f"a thing {i}", f"the thing {i}"] for i in range(40)])
        towers = {"v": "vectors", "text": "bpe:tiny"}
        align(texts, out=tmp_path, towers=towers, recipe=replace(SMALL, mine=2, train="text"), quiet=True)


def test_a_run_that_mines_and_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    pairs, recipe = vectors(), replace(SMALL, mine=1, epochs=4)
    whole = align(pairs, out=tmp_path / "whole", towers=VECTORS, recipe=recipe, quiet=True)
    genuine = Batches.__getitem__

    def stops(self, step):
        if step == 8:  # in the third epoch, after two minings
            signal.raise_signal(signal.SIGINT)
        return genuine(self, step)

    monkeypatch.setattr(Batches, "__getitem__", stops)
    with pytest.raises(KeyboardInterrupt):
        align(pairs, out=tmp_path / "killed", towers=VECTORS, recipe=recipe, quiet=True)
    monkeypatch.undo()
    again = align(pairs, out=tmp_path / "killed", towers=VECTORS, recipe=recipe, quiet=True)
    assert again.bundle.fingerprint == whole.bundle.fingerprint
    unmined = align(pairs, out=tmp_path / "not", towers=VECTORS, recipe=replace(recipe, mine=0), quiet=True)
    assert unmined.bundle.fingerprint != whole.bundle.fingerprint


def test_an_encoder_in_chunks_learns_what_it_learns_at_once(pictures, pretrained, tmp_path):
    data, towers, losses = open_source(pictures / "captions.csv"), {"image": pretrained, "text": READS}, []
    for chunk in (None, 2):
        recipe = replace(TUNED, train="image", chunk=chunk, encoder_lr=1e-3, policy="none")
        done = align(data, out=tmp_path / str(chunk), towers=towers, recipe=recipe, quiet=True)
        losses.append([line["loss"] for line in done.run.log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][1]
