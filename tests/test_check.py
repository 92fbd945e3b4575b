"""A check finds each kind of damage and names it; a repair mends it; the same picture twice is found."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from twofold.cli import main
from twofold.data.sources import open_source
from twofold.data.vectors import Vectors
from twofold.errors import StoreError
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder
from twofold.retrieve.check import check, repair
from twofold.retrieve.duplicates import duplicates
from twofold.retrieve.index import Index
from twofold.retrieve.snapshot import read_head, read_items
from twofold.retrieve.store import ChromaStore


def paint(path: Path, seed: int) -> None:
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(squares).resize((64, 64), Image.Resampling.NEAREST).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Eight pictures and their index."""
    home = tmp_path_factory.mktemp("made")
    for n in range(8):
        paint(home / "photos" / f"{n}.png", n)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bundle = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
    bundle.save(home / "model")
    Index.build(open_source(home / "photos"), bundle, home / "index")
    return home


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A copy whose index names the pictures of the copy."""
    shutil.copytree(made, tmp_path / "home")
    home = tmp_path / "home"
    Index.build(open_source(home / "photos"), Bundle.load(home / "model"), home / "index")
    head = json.loads((home / "index" / "index.json").read_text())
    (home / "index" / "index.json").write_text(json.dumps(head | {"source": str(home / "photos")}))
    return home


def found(home: Path) -> dict[str, list[str]]:
    return {one.what: one.ids for one in check(home / "index").findings}


def opened(home: Path) -> ChromaStore:
    head = read_head(home / "index")
    folder = home / "index" / "chroma" / head.snapshot
    return ChromaStore(folder, fingerprint=head.fingerprint, dim=head.dim, write=True)


def kept(home: Path) -> Vectors:
    head = read_head(home / "index")
    return Vectors(home / "index" / "vectors", head.fingerprint, head.dim)


def in_store(change):
    def damage(home: Path) -> None:
        store = opened(home)
        change(store)
        store.close()

    return damage


def swap_vectors(store: ChromaStore) -> None:
    store.upsert(["1.png", "2.png"], store.vectors(["2.png", "1.png"]), store.meta(["1.png", "2.png"]))


def change_columns(store: ChromaStore) -> None:
    store.upsert(["1.png"], store.vectors(["1.png"]), [{"image": "elsewhere"}])


def add_one(store: ChromaStore) -> None:
    store.upsert(["stray"], np.ones((1, store.dim)), [{}])


def without_direction(home: Path) -> None:
    """A file of vectors, whole and rightly named, in which one vector is zero."""
    vectors, key = kept(home), read_items(home / "index", read_head(home / "index"))["1.png"].key
    vectors.drop([key])
    vectors._write([key], np.zeros((1, vectors.dim), np.float32))


def cut_shard(home: Path) -> None:
    shard = next((home / "index" / "vectors").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-50])


def cut_list(home: Path) -> None:
    next((home / "index" / "items").iterdir()).write_text('{"id": "1.png"')


def drop_vector(home: Path) -> None:
    kept(home).drop([read_items(home / "index", read_head(home / "index"))["1.png"].key])


ALL = [f"{n}.png" for n in range(8)]
DAMAGES = {
    "an item left the store": (in_store(lambda store: store.delete(["1.png"])), {"missing": ["1.png"]}, ALL),
    "a stray item in the store": (in_store(add_one), {"extra": ["stray"]}, ALL),
    "vectors swapped in the store": (in_store(swap_vectors), {"vector": ["1.png", "2.png"]}, ALL),
    "columns changed in the store": (in_store(change_columns), {"columns": ["1.png"]}, ALL),
    "no store": (lambda home: shutil.rmtree(home / "index" / "chroma"), {"store"}, ALL),
    "a vector lost": (drop_vector, {"lost": ["1.png"]}, ALL),
    "a vector without direction": (without_direction, {"broken": ["1.png"]}, ALL),
    "a file of vectors cut short": (cut_shard, {"files", "lost"}, ALL),
    "the list cut short": (cut_list, {"list"}, ALL),
    "a picture gone": (lambda home: (home / "photos" / "1.png").unlink(), {"gone": ["1.png"]}, ALL[:1] + ALL[2:]),
}


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_and_mended(home, damage):
    assert found(home) == {}
    harm, named, left = DAMAGES[damage]
    harm(home)
    now = found(home)
    assert now == named if isinstance(named, dict) else now.keys() == named
    assert found(home) == now  # looking changes nothing
    done = repair(home / "index")
    assert done.after.findings == [] and done.dropped == sorted(set(ALL) - set(left))
    index = Index.open(home / "index")
    assert index.store.ids() == left
    for name in left:
        assert index.search(image=home / "photos" / name, k=1)[0].id == name
    index.close()


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_nothing_is_dropped_while_the_source_is_away(home):
    cut_shard(home)
    (home / "photos").rename(home / "unmounted")
    with pytest.raises(StoreError, match="cannot be mended without what it was made from, and nothing was changed"):
        repair(home / "index")
    (home / "unmounted").rename(home / "photos")
    assert repair(home / "index").embedded == 8


def test_another_model_in_the_folder_is_found_and_not_mended(home):
    other = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
    shutil.rmtree(home / "index" / "model")
    other.save(home / "index" / "model")
    assert found(home).keys() == {"model"}
    with pytest.raises(StoreError, match="Put the model back"):
        repair(home / "index")


def test_the_command_reports_in_words_and_json_and_by_its_status(home, capsys):
    index = str(home / "index")
    assert main(["index", "--check", index]) == 0
    assert "8 items" in (said := capsys.readouterr().out) and "whole" in said
    (home / "photos" / "1.png").unlink()
    assert main(["index", "--check", index, "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["findings"]
    assert (row["what"], row["count"], row["ids"]) == ("gone", 1, ["1.png"])
    assert main(["index", "--check", index]) == 1
    assert "gone: 1 items name a file that is no longer there: 1.png" in capsys.readouterr().out
    assert main(["index", "--repair", index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == ["1.png"]
    assert main(["index", "--check", index, "--out", index]) == 2
    assert main(["index", index]) == 2


# -- the same picture twice


def test_copies_and_other_encodings_are_found_and_other_colours_are_not(home, tmp_path, capsys):
    photos = home / "photos"
    shutil.copy(photos / "1.png", photos / "again.png")
    Image.open(photos / "1.png").resize((48, 48), Image.Resampling.BILINEAR).save(photos / "small.jpg", quality=90)
    Image.fromarray(255 - np.asarray(Image.open(photos / "2.png"))).save(photos / "negative.png")
    Index.build(open_source(photos), Bundle.load(home / "model"), home / "index")
    (group,) = duplicates(home / "index")
    assert [(twin.id, twin.kind) for twin in group] == [
        ("1.png", "first"),
        ("again.png", "same"),
        ("small.jpg", "near"),
    ]
    assert group[2].bits <= 6 and 0.9 <= group[2].cosine <= 1
    assert [len(group) for group in duplicates(home / "index", cosine=1.1)] == [2]
    assert main(["index", "--duplicates", str(home / "index"), "--csv", str(tmp_path / "twice.csv"), "--json"]) == 0
    assert [[twin["id"] for twin in one] for one in json.loads(capsys.readouterr().out)] == [[t.id for t in group]]
    with open(tmp_path / "twice.csv", newline="") as file:
        assert [(row["group"], row["id"]) for row in csv.DictReader(file)] == [("0", twin.id) for twin in group]


# -- no room


def test_a_full_disk_is_said_clearly_and_the_build_goes_on_once_there_is_room(home):
    """A limit on the size of files stands for the disk: Chroma's files are larger than it, the vectors' are not."""
    for n in range(8, 40):
        paint(home / "photos" / f"{n}.png", n)
    script = """
        import resource, sys
        from twofold.cli import main
        source, model, out, limit, *more = sys.argv[1:]
        import chromadb, twofold.retrieve.index, torch
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        sys.exit(main(["index", source, "--model", model, "--out", out, "--json", *more]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), home / "photos", home / "model"]
    environment = os.environ | {"TWOFOLD_CACHE": str(home / "cache")}
    # a new index of the exact store has nothing larger than its copy of the model, which is written last
    for out, limit, more in (("index", 100_000, ()), ("new", 20_000, ("--store", "exact"))):
        tried = [*command, home / out, str(limit), *more]
        done = subprocess.run(tried, capture_output=True, text=True, env=environment)
        assert done.returncode == 1, done.stderr
        assert "its disk is full, a quota on it is used up" in done.stderr and "Traceback" not in done.stderr
    assert check(home / "index").items == 8 and found(home) == {}
    assert Index.build(open_source(home / "photos"), Bundle.load(home / "model"), home / "new").embedded == 0
    assert check(home / "new").items == 40 and check(home / "new").whole
    Index.build(open_source(home / "photos"), Bundle.load(home / "model"), home / "index")
    assert check(home / "index").items == 40 and found(home) == {}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # of this process
