"""The command line, run as a user runs it, on pictures and captions that the test draws."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from twofold.cli import VERBS, main
from twofold.cli.flags import again
from twofold.data.sources import open_source
from twofold.errors import DataError
from twofold.methods import METHODS
from twofold.models.encoders import image_encoder
from twofold.models.heads import Head
from twofold.progress import Line
from twofold.retrieve.store import Hit
from twofold.terminal import hits_table
from twofold.train.train import Setting, _method, policies_of, train
from twofold.views import PRESETS

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}


def test_the_next_command_says_what_this_one_was_told_of_the_data():
    assert again("a.csv") == "a.csv"
    assert again("my a.csv", Path("b c"), ("t=text",)) == "'my a.csv' --images 'b c' --columns t=text"


def test_what_takes_longer_than_a_second_each_has_a_rate_of_its_own(monkeypatch, capsys):
    now = iter((0.0, 4.0))
    monkeypatch.setattr("twofold.progress.time.monotonic", lambda: next(now))
    Line("judge", unit="folds").update(1, 4)
    assert "judge 1/4 · 0.25 folds/s · 12 s left" in capsys.readouterr().err


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """96 noisy pictures of four colours, each with two captions, in a manifest with splits."""
    folder = tmp_path_factory.mktemp("captioned")
    draw = np.random.default_rng(0)
    rows = ["image,caption,split,number"]
    for i in range(96):
        name = list(COLOURS)[i % 4]
        noise = draw.normal(0, 20, (32, 32, 3))
        Image.fromarray(np.clip(noise + COLOURS[name], 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        split = "test" if i >= 72 else "train"
        rows += [f"{i}.png,a {name} thing,{split},{i}", f"{i}.png,something {name},{split},{i}"]
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Folders of pictures: splits at the top, then labels."""
    folder = tmp_path_factory.mktemp("labelled")
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = draw.normal(0, 40, (16, 16, 3))
                picture = np.clip(noise + colour, 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{i}.png")
    (folder / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    return folder


def told(capsys, *arguments: object) -> dict | list:
    """What a command with --json prints."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pictures_and_captions_are_aligned_indexed_and_found(captioned, tmp_path, capsys):
    run, index = tmp_path / "run", tmp_path / "index"
    aligned = told(
        capsys, "align", captioned / "captions.csv", "--out", run, "--epochs", 20, "--batch", 24, "--hidden", 64
    )
    assert aligned["bundle"] == str(run / "bundle")
    found = aligned["evaluation"]["paired"]["text_to_image"]
    assert found["recall"]["10"]["value"] > 3 * found["chance"]["10"] or found["recall"]["10"]["value"] == 1

    measured = told(capsys, "evaluate", run, "--data", captioned / "captions.csv")
    assert measured["paired"]["text_to_image"]["recall"] == found["recall"]

    built = told(capsys, "index", captioned / "captions.csv", "--model", run, "--out", index)
    assert (built["items"], built["skipped"]) == (96, [])
    hits = told(capsys, "search", index, "something blue", "--k", 5)
    assert len(hits) == 5
    assert all("blue" in hit["meta"]["text"] for hit in hits)
    hits = told(capsys, "search", index, "--like", hits[0]["id"], "--where", "split=test", "--k", 3)
    assert all(hit["meta"]["split"] == "test" for hit in hits)
    hits = told(capsys, "search", index, "--image", captioned / "0.png", "--k", 1)
    assert "red" in hits[0]["meta"]["text"]

    assert main(["search", str(index), "a green thing", "--k", "2"]) == 0
    assert "a green thing" in capsys.readouterr().out
    again = told(capsys, "index", captioned / "captions.csv", "--model", run, "--out", index)
    assert (again["added"], again["changed"], again["embedded"]) == (0, 0, 0)


def test_simclr_is_trained_measured_and_embeds(labelled, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--encoder", "timm:resnet18/8", "--size", 16, "--small-stem", "--policy", "simclr-cifar", "--batch", 16]
    command = ["train", "simclr", labelled, "--out", run, *flags, "--epochs", 2, "--temperature", 0.2]
    done = told(capsys, *command)
    assert done["steps"] == 8
    assert done["last"]["chance"] == pytest.approx(np.log(31))
    record = json.loads((run / "run.json").read_text())
    assert record["options"]["temperature"] == 0.2
    assert record["encoder"] == "timm:resnet18/8"
    assert told(capsys, *command)["last"] == done["last"], "the same command again finds the run complete"

    measured = told(capsys, "evaluate", run, "--data", labelled)["labels"]
    assert measured.keys() == {"trained", "untrained", "ImageNet weights", "pixels", "colours"}
    assert measured["colours"]["few"]["accuracy"]["5"]["value"] > 0.5, "labels are colours"
    assert measured["pixels"]["knn"]["accuracy"]["value"] > 0.5
    assert main(["evaluate", str(run), "--data", str(labelled)]) == 0
    assert "trained" in capsys.readouterr().out
    behind = told(capsys, "evaluate", run, "--data", labelled, "--at", "head", "--no-baselines")["labels"]
    assert behind.keys() == {"trained", "head"}
    assert behind["trained"] == measured["trained"]
    assert behind["head"]["knn"]["accuracy"]["value"] > 0.3

    out = tmp_path / "vectors.npz"
    told(capsys, "embed", labelled, "--model", run, "--out", out)
    with np.load(out) as arrays:
        assert arrays["vectors"].shape == (88, 64)
        assert len(set(arrays["ids"])) == 88


def test_siglip_trains_both_towers(captioned, tmp_path, capsys):
    flags = ["--encoder", "timm:resnet18/8", "--size", 16, "--small-stem", "--batch", 24, "--epochs", 1, "--space", 16]
    done = told(capsys, "train", "siglip", captioned / "captions.csv", "--out", tmp_path / "run", *flags)
    assert done["steps"] == 18, "there are four captions: a batch is of four, as equal ones never meet"
    assert (tmp_path / "run" / "bundle" / "text.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "options", "chance"),
    [
        ("supcon", ["--per-class", 4, "--head.hidden", 16], np.log(31)),
        ("triplet", ["--mining", "batch-hard", "--margin", 0.3], 0.3),
        ("triplet", ["--no-labels"], 0.2),
    ],
)
def test_methods_learn_from_the_labels_of_folders(labelled, tmp_path, capsys, method, options, chance):
    flags = ["--encoder", "timm:resnet18/8", "--size", 16, "--small-stem", "--batch", 16, "--epochs", 1, *options]
    done = told(capsys, "train", method, labelled, "--out", tmp_path / "run", *flags)
    assert done["steps"] == 4
    assert done["last"]["chance"] == pytest.approx(chance)
    assert (tmp_path / "run" / "bundle" / "image.head.safetensors").is_file()


def test_items_without_a_label_are_left_out_or_missed(labelled, tmp_path, capsys):
    source = open_source(labelled).split("train")
    some = np.where(np.arange(len(source)) % 2, source.labels, -1)
    setting = Setting(encoder="timm:resnet18/4", size=16, small_stem=True, batch=8, epochs=1)

    def run(labels, **options):
        train("supcon", dataclasses.replace(source, splits=None, labels=labels), out=tmp_path, quiet=True, **options)

    run(some, setting=setting)
    assert json.loads((tmp_path / "run.json").read_text())["items"] == 32
    with pytest.raises(DataError, match=r"supcon learns from labels; .* has none.*one subfolder a class.*simclr"):
        run(None, setting=setting)
    with pytest.raises(DataError, match=r"the 10 labelled items .* are all of one"):
        run(np.zeros_like(source.labels), setting=dataclasses.replace(setting, limit=10))
    assert main(["train", "simclr", str(labelled), "--out", str(tmp_path / "x"), "--per-class", "4"]) == 2
    assert "for methods that learn from labels" in capsys.readouterr().err


def test_a_method_draws_the_views_of_its_own_paper_unless_told():
    seen = []
    for policy in (None, "simclr-cifar"):
        setting = Setting(encoder="timm:resnet18/4", size=16, small_stem=True, policy=policy)
        encoder = image_encoder(setting.encoder, size=16, small_stem=True)
        heads = {"head": Head(2, 8, 8), "predictor": Head(2, 8, 8)}
        seen.append(_method("byol", encoder, setting, policies_of("byol", policy, {}), heads, None).policies)
    assert seen[0] == tuple(dataclasses.replace(policy, size=16) for policy in PRESETS["byol"])
    assert seen[1] == tuple(dataclasses.replace(policy, size=16) for policy in PRESETS["simclr-cifar"])


@pytest.mark.parametrize("verb", [*VERBS, *(f"train {method}" for method in METHODS)])
def test_help_has_examples(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"twofold {verb.split()[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("serach x y", "Did you mean 'search'?"),
        ("train simclear data --out x", "Did you mean 'simclr'?"),
        ("train simclr openmoji --out x --policy natrual", "policy 'natrual'"),
        ("train simclr openmoji --out x --encoder timm:resnet81", "timm:resnet18"),
        ("train simclr openmoji --out x --temperature 0", "temperature must be greater than 0; got 0.0"),
        ("train dcl openmoji --out x --temperature -1", "temperature must be greater than 0; got -1.0"),
        ("train supcon openmoji --out x --temperature 0", "temperature must be greater than 0; got 0.0"),
        ("train triplet openmoji --out x --margin 0", "margin must be greater than 0; got 0.0"),
        ("train triplet openmoji --out x --mining semihard", "semi-hard"),
        ("search nowhere --k ten", "--k"),
        ("align openmoji --out x --objektive clip", "objective"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_the_nearest(command, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    streams = capsys.readouterr()
    assert says in streams.out + streams.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("evaluate nowhere --data openmoji", "nowhere"),
        ("search nowhere words", "nowhere"),
        ("align nowhere.csv --out x", "nowhere.csv"),
    ],
)
def test_what_is_missing_exits_with_1_and_is_named(command, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 1
    assert says in capsys.readouterr().err


def test_an_index_is_not_searched_with_another_model(captioned, tmp_path, capsys):
    small = ["--batch", 24, "--hidden", 16, "--epochs", 1]
    for name, seed in (("a", 0), ("b", 1)):
        told(capsys, "align", captioned / "captions.csv", "--out", tmp_path / name, "--seed", seed, *small)
    source, index = captioned / "captions.csv", tmp_path / "index"
    told(capsys, "index", source, "--model", tmp_path / "a", "--out", index)
    assert main(["index", str(source), "--model", str(tmp_path / "b"), "--out", str(index)]) == 1
    assert "--existing replace" in capsys.readouterr().err
    told(capsys, "index", source, "--model", tmp_path / "b", "--out", index, "--existing", "replace")


def test_a_hit_with_a_long_text_takes_one_line_and_keeps_its_brackets():
    long = Hit("a.jpg", 0.5, {"text": "a [bold]dog[/]\n\nruns " + "and runs " * 100})
    with (console := Console(width=80, file=io.StringIO())).capture() as shown:
        console.print(hits_table([long, Hit("b" * 60, 0.4, {"text": "short"}, probability=0.5)]))
    first, *others = shown.get().splitlines()[1:]
    assert "0.500" in first and "a [bold]dog[/]" in first and "…" in first
    assert "and runs" not in "".join(others) and "b" * 20 in others[0]


def test_methods_are_listed(capsys):
    listed = told(capsys, "methods")
    assert listed.keys() == METHODS.keys()
    assert listed["supcon"]["needs"] == ["image", "label"] and "arXiv 2004.11362" in listed["supcon"]["paper"]
    assert main(["methods"]) == 0
    words = capsys.readouterr().out.split("from pictures and labels")
    assert "simclr" in words[0] and "triplet" in words[1]
    assert main(["--version"]) == 0
    assert main([]) == 0
