"""Embedding for an index in several processes comes to the same index as in one."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from twofold.cli import main
from twofold.data.sources import open_source
from twofold.errors import DecodeError, FingerprintMismatch, StoreError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder
from twofold.retrieve.bulk import Part, embed_part
from twofold.retrieve.index import Index
from twofold.retrieve.snapshot import claimed, read_head, read_items

CLI = [sys.executable, "-c", "import sys; from twofold.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of 41 pictures, one of which is damaged, a bundle, and the index that one process makes of them."""
    from PIL import Image

    root = tmp_path_factory.mktemp("bulk")
    draw = np.random.default_rng(0)
    (root / "photos").mkdir()
    for k in range(40):
        Image.fromarray(draw.integers(0, 255, (24, 24, 3), np.uint8)).save(root / "photos" / f"{k:02}.png")
    (root / "photos" / "torn.png").write_bytes((root / "photos" / "00.png").read_bytes()[:90])
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(root / "cache"))
        for name in ("bundle", "other"):
            torch.manual_seed(len(name))
            encoder = image_encoder("timm:resnet18/4", size=24, small_stem=True)
            Bundle({"image": Tower(encoder, nn.Linear(encoder.dim, 16))}).save(root / name)
        Index.build(open_source(str(root / "photos")), Bundle.load(root / "bundle"), root / "alone")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))  # a fresh one: nothing is embedded yet


def same(one: Path, other: Path) -> None:
    """Two indexes hold the same items with the same vectors, and answer alike."""
    heads = read_head(one), read_head(other)
    assert heads[0].fingerprint == heads[1].fingerprint
    assert read_items(one, heads[0]) == read_items(other, heads[1])
    with Index.open(one) as a, Index.open(other) as b:
        ids = sorted(a.store.ids())
        assert sorted(b.store.ids()) == ids
        np.testing.assert_allclose(a.store.vectors(ids), b.store.vectors(ids), atol=1e-6)


def parts(made: Path, out: Path, *more: str) -> list[subprocess.Popen]:
    command = [*CLI, "index", str(made / "photos"), "--model", str(made / "bundle"), "--out", str(out), *more]
    return [
        subprocess.Popen([*command, "--part", "auto", "--json"], env=os.environ | named, stdout=subprocess.PIPE)
        for named in ({"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"})
    ]


def test_two_processes_that_share_the_work_make_the_index_of_one(made, tmp_path, capsys):
    out = tmp_path / "index"
    told = [json.loads(process.communicate(timeout=300)[0]) for process in parts(made, out)]
    assert [one["part"] for one in told] == [{"number": 0, "of": 2}, {"number": 1, "of": 2}]
    assert [row["id"] for one in told for row in one["skipped"]] == ["torn.png"]
    assert not (out / "index.json").exists(), "parts make no index"
    assert main(["index", str(made / "photos"), "--model", str(made / "bundle"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["embedded"] == 0, "everything was there"
    same(made / "alone", out)


# In a process of its own: Ray leaves files open, which the tests' Python would complain of.
ON_RAY = """
import json, sys
from pathlib import Path
from twofold.data.sources import open_source
from twofold.errors import TwofoldError
from twofold.retrieve.bulk import embed_on_ray
made, out = map(Path, sys.argv[1:])
source, done, said = open_source(str(made / "photos")), [], []
skipped = embed_on_ray(source, made / "bundle", out, unit=8, progress=lambda *of: done.append(of))
for where, how in ((out.parent / "strict", {"on_error": "raise"}), (out, {"address": "auto"})):
    try:
        embed_on_ray(source, made / "bundle", where, **how)
    except TwofoldError as error:
        said.append(f"{type(error).__name__}: {error}")
import ray
print(json.dumps({"skipped": skipped, "done": done[-1], "said": said, "left": ray.is_initialized()}))
"""


def test_a_ray_cluster_makes_the_index_of_one_process(made, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "index"
    command = [sys.executable, "-c", ON_RAY, str(made), str(out)]
    here = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's workers else wait for whatever runs beside the tests
    done = subprocess.run(command, env=here, check=True, capture_output=True, timeout=600)
    told = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, _ in told["skipped"]] == ["torn.png"] and told["done"] == [41, 41]
    assert not told["left"], "what was started for this has ended"
    strict, nowhere = told["said"]
    assert strict.startswith("DecodeError") and "torn.png" in strict, "the worker's error itself"
    assert nowhere.startswith("UsageError: No Ray cluster answers at 'auto'")
    built = Index.build(open_source(str(made / "photos")), Bundle.load(made / "bundle"), out)
    assert built.embedded == 0
    same(made / "alone", out)


def test_a_killed_part_goes_on_from_what_it_had(made, tmp_path):
    out = tmp_path / "index"
    source, bundle = open_source(str(made / "photos")), Bundle.load(made / "bundle")
    other, killed = parts(made, out)
    while not list(out.glob("vectors/*/*.arrow")) and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    for process in (other, killed):
        process.communicate(timeout=300)
    for number in range(2):
        embed_part(source, bundle, out, Part(number, 2))
    Index.build(source, bundle, out)
    same(made / "alone", out)


def test_nobody_writes_the_index_while_parts_are_embedded(made, tmp_path):
    out, source, bundle = tmp_path / "index", open_source(str(made / "photos")), Bundle.load(made / "bundle")
    with claimed(out, shared=True):
        embed_part(source, bundle, out, Part(0, 2))  # another part may come in
        with pytest.raises(StoreError, match="wait until it is done"):
            Index.build(source, bundle, out)


def test_parts_of_another_model_are_refused(made, tmp_path):
    source, other = open_source(str(made / "photos")), Bundle.load(made / "other")
    with pytest.raises(FingerprintMismatch, match="was made by the encoder"):
        embed_part(source, other, made / "alone", Part(0, 2))
    embed_part(source, other, made / "alone", Part(0, 40), existing="replace")  # for an index that shall get it


def test_a_part_is_named_or_asked_for(monkeypatch):
    assert Part.read("2/8") == (2, 8)
    for wrong in ("8/8", "-1/8", "1", "1/", "a/b", ""):
        with pytest.raises(UsageError, match="is no part: 0/8 is the first of eight"):
            Part.read(wrong)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="neither is set"):
        Part.read("auto")


def test_an_error_of_two_arguments_comes_over_from_another_process():
    came = pickle.loads(pickle.dumps(DecodeError("a.png", "truncated")))
    assert type(came) is DecodeError and (came.item, came.reason, str(came)) == (
        "a.png",
        "truncated",
        "a.png: truncated",
    )
