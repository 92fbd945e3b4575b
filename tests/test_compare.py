"""Methods compared on pictures of four colours: equal budgets, nothing done twice, words that the figures bear out."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from twofold.cli import main
from twofold.data.sources import Source
from twofold.errors import DataError, TrainingError, UsageError
from twofold.measure.baselines import colour_histogram, thumbnails
from twofold.measure.metrics import bootstrap
from twofold.measure.probes import few_shot
from twofold.methods import METHODS
from twofold.methods.facts import FACTS
from twofold.models.tokens import Tokens
from twofold.train import compare as module
from twofold.train.compare import (
    OPTIMIZER,
    PROBES,
    SETTING,
    Comparison,
    Row,
    ahead_of,
    compare,
    fitting,
    pace_of,
    variants_of,
    verdict,
)
from twofold.train.compare_page import page
from twofold.train.train import _method, picture_encoder, policies_of

TINY = replace(SETTING, encoder="timm:resnet18/4", size=16, batch=16, epochs=1)
TRANSFORMER = "timm:vit_tiny_patch16_224/4x12x1"


def coloured(n: int = 60) -> Source:
    draw = np.random.default_rng(0)
    colours = np.array([(220, 30, 30), (30, 200, 40), (40, 60, 220), (230, 220, 40)])
    labels = np.arange(n) % 4
    images = [np.clip(draw.normal(0, 30, (16, 16, 3)) + colours[label], 0, 255).astype(np.uint8) for label in labels]
    return Source("colours", [str(i) for i in range(n)], images=images, labels=labels)


# What is compared.


def test_every_method_has_its_facts_and_they_are_true():
    assert FACTS.keys() == METHODS.keys()
    for variant in variants_of(fitting(coloured()), TINY, OPTIMIZER, transformer=TRANSFORMER, items=60):
        chosen = policies_of(variant.method, variant.setting.policy, {})
        method = _method(
            variant.method,
            picture_encoder(variant.setting, of_clips=False),
            variant.setting,
            chosen,
            variant.options,
            None,
        )
        facts = FACTS[variant.method]
        assert hasattr(method, "target") == facts.momentum, variant.name
        assert any(isinstance(part, Tokens) for part in method.modules()) == facts.patches, variant.name


def test_methods_fit_where_the_data_have_what_they_learn_from():
    plain = replace(coloured(), labels=None)
    assert {"simclr", "mae"} <= set(fitting(plain))
    assert not {"supcon", "clip", "vjepa"} & set(fitting(plain))
    assert "supcon" in fitting(coloured())
    captioned = replace(plain, texts=[["a colour"]] * len(plain))
    assert "clip" in fitting(captioned)


def test_a_sweep_reaches_the_methods_that_have_the_option():
    sweep = {"temperature": ["0.1", "0.5"], "batch": ["8", "16"]}
    found = variants_of(["simclr", "byol"], TINY, OPTIMIZER, sweep=sweep, items=60)
    assert [variant.name for variant in found] == [
        *(f"simclr temperature={t} batch={b}" for t in ("0.1", "0.5") for b in ("8", "16")),
        *(f"byol batch={b}" for b in ("8", "16")),
    ]
    assert (found[1].options["temperature"], found[1].setting.batch) == (0.1, 16)
    assert "temperature" not in found[-1].options
    assert variants_of(["mae"], TINY, OPTIMIZER, sweep={"lr": ["0.1"]}, items=60)[0].optimizer.lr == 0.1
    with pytest.raises(UsageError, match=r"option to sweep 'temperture'. Did you mean 'temperature'"):
        variants_of(["simclr"], TINY, OPTIMIZER, sweep={"temperture": ["1"]}, items=60)
    with pytest.raises(UsageError, match="policy"):
        variants_of(["mae"], TINY, OPTIMIZER, sweep={"policy": ["byol"]}, items=60)
    with pytest.raises(UsageError, match="each one int; got 'many'"):
        variants_of(["simclr"], TINY, OPTIMIZER, sweep={"batch": ["many"]}, items=60)


# How it is measured.


def test_nothing_is_done_twice_and_what_fails_stops_no_other(tmp_path, monkeypatch):
    source, trained = coloured(), []
    train = module.train

    def counted(name, *arguments, **more):
        trained.append(name)
        if name == "byol" and len(trained) == 2:
            raise TrainingError("The loss is nan in step 1.")
        return train(name, *arguments, **more)

    monkeypatch.setattr(module, "train", counted)
    given = {"out": tmp_path, "setting": TINY, "transformer": TRANSFORMER, "quiet": True}
    first = compare(["simclr", "byol", "mae"], source, **given)
    assert trained == ["simclr", "byol", "mae"]
    assert first.failed == {"byol": "The loss is nan in step 1."}
    assert {row.name for row in first.rows} == {"simclr", "mae"}
    assert [row.name for row in first.baselines] == [
        "untrained",
        "untrained transformer",
        "raw pixels",
        "colours",
        "ImageNet weights",
    ]
    lines = (tmp_path / "compare.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 5
    (tmp_path / "compare.jsonl").write_text("\n".join(lines) + '\n{"name": "cut sh')

    again = compare(["simclr", "byol", "mae"], source, **given)
    assert trained == ["simclr", "byol", "mae", "byol"], "what failed is tried again, what is done is not"
    kept = {row.name: row for row in again.rows}
    assert all(kept[row.name] == row for row in first.rows)
    assert again.baselines == first.baselines
    assert all(row.steps == 3 and row.images_per_second and row.seconds for row in again.rows)
    assert json.loads((tmp_path / "compare.jsonl").read_text().splitlines()[-1])["name"] == "byol"

    colours = again.baselines[3]
    assert colours.accuracy["knn"].value > 0.9
    assert [row.accuracy["linear"].value for row in again.rows] == sorted(
        (row.accuracy["linear"].value for row in again.rows), reverse=True
    )
    html = page(again)
    assert not re.findall(r"(?:src|href)=\"(?!data:)|http", html)
    assert all(row.name in html for row in (*again.rows, *again.baselines))


def test_seconds_become_whole_epochs_and_stay_what_they_were(tmp_path, monkeypatch):
    variant = variants_of(["simclr"], TINY, OPTIMIZER, items=60)[0]
    monkeypatch.setattr(
        module, "_trained", lambda *_, **__: module.Run(tmp_path, steps=12, log=[], seconds=6.0)
    )  # half a second a step, four steps an epoch
    assert module._epochs(variant, coloured(64), tmp_path, 9.0) == 4
    assert module._epochs(variant, coloured(64), tmp_path, 0.1) == 1
    (tmp_path / "run.json").write_text('{"epochs": 7}')
    assert module._epochs(variant, coloured(64), tmp_path, 9.0) == 7


def test_the_pace_is_that_of_each_sitting():
    log = [(10, 5.0), (20, 7.0), (30, 9.0), (40, 6.0), (50, 7.0)]  # stopped after step 30
    assert pace_of([{"step": step, "seconds": seconds} for step, seconds in log]) == pytest.approx(30 / 5)
    assert pace_of([{"step": 3, "seconds": 1.5}]) == 2


def row(name: str, right: list[float], method: str | None = "simclr", **more) -> Row:
    hits = {probe: right for probe in PROBES}
    every = {
        "facts": FACTS[method] if method else None,
        "labelled": False,
        "accuracy": {probe: bootstrap(right) for probe in PROBES},
        "right": hits,
        "seeds": {probe: [float(np.mean(right))] for probe in PROBES},
        "rank": 9.0,
        "width": 16,
        "uniformity": -1.0,
        "images_per_second": 100.0,
    }
    return Row(name, method, **{**every, **more})


def test_the_verdict_compares_item_by_item():
    easy = [1.0] * 60
    one, other = (
        row("simclr", [*easy, *[1.0] * 30, *[0.0] * 10]),
        row("byol", [*easy, *[1.0] * 20, *[0.0] * 20], "byol"),
    )
    assert ahead_of(one, other).low > 0, "ten items that one gets and the other does not, and none the other way"
    shuffled = row("dcl", [*easy, *[0.0] * 11, *[1.0] * 29], "dcl", images_per_second=150.0)
    assert ahead_of(one, shuffled).low < 0 < ahead_of(one, shuffled).high
    start, imagenet = row("untrained", [*easy, *[0.0] * 40], None), row("ImageNet weights", [1.0] * 100, None)
    spoiled = row("vicreg", [*easy, *[0.0] * 40], "vicreg", rank=1.2)
    taught = row("supcon", [1.0] * 99 + [0.0], "supcon", labelled=True)
    done = Comparison(
        "data", [taught, one, shuffled, other, spoiled], [start, imagenet], {"mae": "no patches"}, 10, 100, 0.5, [], []
    )
    said = "\n".join(verdict(done))
    assert "supcon leads: a linear probe reads 99.0 %" in said
    assert "Of those that saw no labels, simclr leads" in said
    assert "Not surely behind it: dcl. " in said
    assert "dcl trains fastest, 1.5 times" in said
    assert "simclr is surely better than untrained: +30.0" in said
    assert "simclr is surely worse than ImageNet weights: −10.0" in said
    assert "Not surely better than what they began with: vicreg." in said
    assert "Close to collapse, by the effective rank of their features: vicreg (1.2 of 16)" in said
    assert "mae failed: no patches" in said


def test_without_labels_the_error_says_what_takes_none(tmp_path):
    with pytest.raises(DataError, match="views --compare"):
        compare(["simclr"], replace(coloured(), labels=None), out=tmp_path, quiet=True)


def test_the_verb_writes_a_page_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "IMAGENET", "timm:resnet18/4@untrained")  # for speed
    source = coloured()
    np.savez(tmp_path / "a.npz", images=np.stack(source.images), labels=source.labels)
    flags = ["--encoder", "timm:resnet18/4", "--size", "16", "--batch", "16", "--epochs", "1"]
    command = ["compare", "simclr", "--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "out"), *flags]
    assert main([*command, "--sweep", "temperature=0.1,0.5"]) == 0
    said = capsys.readouterr().out
    assert "simclr temperature=0.5" in said and "raw pixels" in said
    assert main([*command, "--sweep", "temperature=0.1,0.5", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert "right" not in figures["rows"][0]
    assert (tmp_path / "out" / "compare.html").is_file()


# Baselines and few examples.


def test_a_histogram_knows_colours_and_no_places():
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    found = colour_histogram(pixels)
    moved = pixels.reshape(4, 3, 64)[:, :, draw.permutation(64)].reshape(pixels.shape)
    np.testing.assert_array_equal(colour_histogram(moved), found)
    np.testing.assert_allclose((found**2).sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(colour_histogram(pixels.astype(np.uint16) * 257), found)
    white = colour_histogram(np.full((1, 3, 4, 4), 255, np.uint8))
    assert white.argmax() == 215 and white.sum() == 1
    assert colour_histogram(pixels[:, :1]).shape == (4, 32)
    with pytest.raises(DataError, match="pictures"):
        colour_histogram(pixels[0])


def test_thumbnails_of_the_test_are_around_the_mean_of_training():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    rows, mean = thumbnails(pixels)
    assert np.abs(rows.sum(0)).max() == 0
    np.testing.assert_array_equal(thumbnails(pixels[:1] + 1, mean)[0], rows[:1] + 1)


def test_few_shots_are_the_nearest_mean_of_a_draw():
    draw = np.random.default_rng(0)
    y, answers = np.arange(30) % 3, np.arange(24) % 3
    z = draw.normal(size=(30, 6)) + 2 * np.eye(3, 6)[y]
    test = draw.normal(size=(24, 6)) + 2 * np.eye(3, 6)[answers]
    found = few_shot(z, y, test, answers, shots=(2, 10), draws=5, draw=torch.Generator().manual_seed(3))

    def sphere(x):
        x = x - z.mean(0)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    same = torch.Generator().manual_seed(3)
    orders = [torch.rand(5, 10, generator=same).argsort(1).numpy() for _ in range(3)]
    for k in (2, 10):
        hits = []
        for number in range(5):
            means = [sphere(z)[y == c][orders[c][number, :k]].mean(0) for c in range(3)]
            nearest = [min(range(3), key=lambda c: np.linalg.norm(x - means[c])) for x in sphere(test)]
            hits.append(np.equal(nearest, answers))
        np.testing.assert_allclose(found.right[k], np.mean(hits, 0))
        assert found.spread[k] == pytest.approx(np.mean(hits, 1).std())
    assert found.spread[10] == 0, "ten rows a class are all that there are"
    assert found.accuracy[10].value >= found.accuracy[2].value
    hidden = few_shot(z, np.where(y == 2, -1, y), test, np.where(answers == 2, -1, answers), shots=(1,), draws=3)
    assert len(hidden.right[1]) == 16
    with pytest.raises(UsageError, match="shots and draws of 1 or more"):
        few_shot(z, y, test, answers, shots=(0,))


# In a process of its own: Ray leaves files open, which the tests' Python would complain of.
ON_RAY = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
import ray
from test_compare import TINY, TRANSFORMER, coloured
from twofold.cluster import on_ray
from twofold.train.compare import OPTIMIZER, _run, _Work, compare, variants_of
from twofold.views import policies

out, source = Path(sys.argv[1]), coloured()
given = {"setting": TINY, "transformer": TRANSFORMER, "quiet": True}
alone = compare(["simclr", "mae", "triplet"], source, out=out / "alone", **given)
spread = compare(["simclr", "mae", "triplet"], source, out=out / "ray", ray="local", **given)
again = compare(["simclr", "mae", "triplet"], source, out=out / "ray", ray="nowhere:1", **given)

never, batch = replace(TINY, epochs=100_000), replace(TINY, batch=1_000)
judge = policies("simclr")[0]
calls = {
    name: (_Work(variants_of(["simclr"], setting, OPTIMIZER, items=60)[0], out / name, judge, None),)
    for name, setting in {"never": never, "batch": batch}.items()
}
for name, why in on_ray(_run, calls, shared=(source, source)):
    while not (out / "never" / "log.jsonl").is_file():
        time.sleep(0.1)
    break  # as Ctrl-C does
print(json.dumps({
    "names": [[row.name for row in done.rows] for done in (alone, spread, again)],
    "right": [[row.right for row in done.rows] for done in (alone, spread, again)],
    "failed": [name, why],
    "left": ray.is_initialized(),
    "kept": [path.name for path in (out / "never").iterdir()],
}))
"""


def test_a_ray_cluster_gives_the_table_of_one_process_and_writes_checkpoints_when_stopped(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-c", ON_RAY, str(tmp_path)]
    here = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's workers else wait for whatever runs beside the tests
    done = subprocess.run(command, cwd=Path(__file__).parent, env=here, check=True, stdout=subprocess.PIPE, timeout=600)
    told = json.loads(done.stdout.splitlines()[-1])
    alone, spread, again = told["right"]
    assert told["names"][0] == told["names"][1] and alone == spread == again, "nothing was left to do for the third"
    name, why = told["failed"]
    assert name == "batch" and "1000" in why, "a training that fails stops no other, and says why"
    assert "checkpoint.safetensors" in told["kept"], "what runs when the comparison is stopped goes on from there"
    assert not told["left"], "what was started for this has ended"


def test_jobs_are_processes_and_a_cluster_has_its_own(tmp_path):
    with pytest.raises(UsageError, match="2 jobs are processes of this machine"):
        compare(["simclr"], coloured(), out=tmp_path, jobs=2, ray="local")
