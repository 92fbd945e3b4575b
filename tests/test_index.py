"""An index holds what its source holds, embeds nothing twice, and survives kills, damage and changes of model."""

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import twofold.retrieve.snapshot as module
from test_store import server
from twofold.cli import main
from twofold.data.samples import openmoji
from twofold.data.sources import Source, open_source
from twofold.errors import DataError, DecodeError, FingerprintMismatch, StoreError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.check import check
from twofold.retrieve.engines import Kept
from twofold.retrieve.explain import explain
from twofold.retrieve.index import Built, Index, index, search
from twofold.retrieve.store import Claim


def make_bundle(seed: int = 0, *, text: bool = False) -> Bundle:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
        return Bundle({"image": image} | ({"text": Tower(text_encoder("minilm"), nn.Linear(384, 32))} if text else {}))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return make_bundle()


@pytest.fixture(scope="module")
def both() -> Bundle:
    return make_bundle(text=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))


def paint(path: Path, seed: int) -> None:
    """A picture of its own for every seed: coarse coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(squares).resize((32, 32), Image.Resampling.NEAREST).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    for n in range(10):
        paint(tmp_path / "photos" / ("red" if n % 2 else "blue") / f"{n}.png", n)
    return tmp_path / "photos"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "photos.index"


def found_by(out: Path, picture: Path, **options) -> str:
    return search(out, image=picture, k=1, **options)[0].id


def assert_holds(out: Path, photos: Path, names: list[str]) -> None:
    """These items and no others, each found by its own picture."""
    with Index.open(out) as opened:
        assert opened.store.ids() == sorted(names)
        assert opened.audit() == []
        for name in names:
            hit = opened.search(image=photos / name, k=1)[0]
            assert (hit.id, hit.score) == (name, pytest.approx(1, abs=1e-5))


def names_in(photos: Path) -> list[str]:
    return list(open_source(photos).ids)


def test_a_folder_becomes_searchable(photos, bundle, out):
    bundle.save(out.with_name("model"))
    built = index(photos, model=out.with_name("model"), out=out)
    assert built == Built(items=10, embedded=10, added=10, changed=0, removed=0, absent=0, skipped=[])
    assert_holds(out, photos, names_in(photos))
    hit = search(out, image=photos / "red" / "3.png", k=3, where={"label": "red"})[0]
    assert hit.meta == {"label": "red", "image": str((photos / "red" / "3.png").resolve())}
    assert "red/3.png" not in [hit.id for hit in search(out, like="red/3.png", k=20)]
    assert len(search(out, like="red/3.png", k=20, where={"label": "blue"})) == 5


def test_hits_show_text_label_split_and_further_columns(both, out):
    source = openmoji().take(range(0, 4400, 200))
    Index.build(source, both, out)
    opened = Index.open(out)
    hits = opened.search("a fruit", k=5, where={"group": source.meta["group"][4]})
    i = source.ids.index(hits[0].id)
    assert hits[0].meta["text"] == source.texts[i][0]
    assert hits[0].meta["label"] == hits[0].meta["group"] == source.meta["group"][i] == source.meta["group"][4]
    assert hits[0].meta["split"] == source.splits[i]
    exact = Index.open(out, exact=True)
    for query in ({"text": "a fruit"}, {"like": source.ids[3]}, {"text": "sad", "image": source.images[2]}):
        assert [hit.id for hit in exact.search(**query, k=5)] == [hit.id for hit in opened.search(**query, k=5)]
    opened.close()


def state(folder: Path) -> dict[Path, int]:
    """Every file and when it was written; Chroma's, which it touches at each opening, by their names alone."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: 0 if "chroma" in path.parts else path.stat().st_mtime_ns for path in files}


def test_the_command_says_how_far_the_store_is(photos, bundle, out, capsys, monkeypatch):
    bundle.save(model := out.with_name("model"))
    monkeypatch.setattr(module, "TOLD", 3)
    told: list[tuple[int, int]] = []
    index(photos, model=model, out=out, filling=lambda *far: told.append(far))
    assert told == [(0, 10), (3, 10), (6, 10), (9, 10), (10, 10)]
    paint(photos / "red" / "new.png", 100)
    assert main(["index", str(photos), "--model", str(model), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert re.search(r"embed 1/1 · .* items/s · 0 s left\n  store 1/1 · .* rows/s · 0 s left", said)


def test_a_second_build_does_nothing(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    before = state(out)
    assert Index.build(open_source(photos), bundle, out) == Built(10, 0, 0, 0, 0, 0, [])
    assert state(out) == before


def test_only_what_changed_is_embedded_and_replaced(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    paint(photos / "red" / "1.png", 100)
    paint(photos / "green" / "new.png", 101)
    shutil.copy(photos / "red" / "3.png", photos / "green" / "again.png")
    built = Index.build(open_source(photos), bundle, out)
    assert (built.items, built.embedded, built.added, built.changed) == (12, 2, 2, 1)
    paint(photos.parent / "old.png", 1)
    hits = search(out, image=photos.parent / "old.png", k=1)
    assert hits[0].score < 0.9999
    assert found_by(out, photos / "red" / "1.png") == "red/1.png"
    assert {hit.id for hit in search(out, image=photos / "red" / "3.png", k=2)} == {"red/3.png", "green/again.png"}


def test_new_metadata_reach_the_store_without_embedding(photos, bundle, out):
    source = open_source(photos)
    Index.build(source, bundle, out)
    built = Index.build(
        Source("renamed", source.ids, images=source.images, meta={"year": list(range(2000, 2010))}), bundle, out
    )
    assert (built.embedded, built.changed) == (0, 10)
    hit = search(out, image=source.images[4], k=1, where={"year": 2004})[0]
    assert hit.id == source.ids[4]
    assert "label" not in hit.meta


def test_items_that_left_the_source_stay_until_pruned(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    gone = photos / "red" / "5.png"
    gone.rename(photos.parent / "5.png")
    built = Index.build(open_source(photos), bundle, out)
    assert (built.items, built.absent, built.removed) == (10, 1, 0)
    assert found_by(out, photos.parent / "5.png") == "red/5.png"
    built = Index.build(open_source(photos), bundle, out, existing="prune")
    assert (built.items, built.absent, built.removed) == (9, 0, 1)
    assert_holds(out, photos, names_in(photos))


def test_items_that_cannot_be_read_are_listed_and_taken_in_once_they_can(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    broken = photos / "red" / "1.png"
    for path in (broken, photos / "red" / "also.png", photos / "blue" / "also.png"):
        path.write_bytes(b"no picture")
    for _ in range(2):
        built = Index.build(open_source(photos), bundle, out)
        assert sorted(name for name, _ in built.skipped) == ["blue/also.png", "red/1.png", "red/also.png"]
        assert built.items == 9  # what red/1.png showed before is there no more
    with pytest.raises(DecodeError, match=r"also\.png"):
        Index.build(open_source(photos), bundle, out, on_error="raise")
    for n, path in enumerate((broken, photos / "red" / "also.png", photos / "blue" / "also.png")):
        paint(path, 200 + n)
    assert Index.build(open_source(photos), bundle, out).skipped == []
    assert_holds(out, photos, names_in(photos))


def test_a_source_without_a_readable_item_makes_no_index(tmp_path, bundle, out):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"nothing to search in.*a\.png"):
        Index.build(open_source(tmp_path / "photos"), bundle, out)
    with pytest.raises(StoreError, match="no index"):
        Index.open(out)


KILLED = """
    import os, signal, sys
    import twofold.measure.embed as embedding
    from twofold.retrieve import index, snapshot
    photos, model, out, when = sys.argv[1:]
    snapshot.CHUNK = snapshot.TOLD = embedding.BATCH = embedding.SHARD = 3
    from twofold.retrieve.store import ChromaStore
    upsert = ChromaStore.upsert

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def upsert_and_die(store, *items):
        upsert(store, *items)
        die()

    if when == "filling":
        ChromaStore.upsert = upsert_and_die
    index.index(photos, model=model, out=out, progress=lambda at, _: die() if when == "embedding" and at > 6 else None)
"""


def kill(photos: Path, bundle: Bundle, out: Path, when: str) -> None:
    bundle.save(model := out.with_name("model"))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), photos, model, out, when]
    assert subprocess.run(command).returncode == -9


def test_a_first_build_that_is_killed_goes_on_where_it_was(photos, bundle, out):
    kill(photos, bundle, out, "embedding")
    with pytest.raises(StoreError, match="no index"):
        Index.open(out)
    assert Index.build(open_source(photos), bundle, out).embedded == 4
    assert_holds(out, photos, names_in(photos))


def test_an_update_that_is_killed_leaves_the_old_index_and_goes_on(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    names = names_in(photos)
    for n in range(5):
        paint(photos / "green" / f"{n}.png", 100 + n)
    kill(photos, bundle, out, "filling")
    assert_holds(out, photos, names)
    assert Index.build(open_source(photos), bundle, out).embedded == 0
    assert_holds(out, photos, names_in(photos))


def test_who_searches_during_a_build_keeps_the_old_snapshot(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    reader = Index.open(out)
    assert not reader.stale
    shutil.rmtree(photos / "red")
    paint(photos / "blue" / "new.png", 100)
    Index.build(open_source(photos), bundle, out, existing="prune")
    assert reader.stale
    assert len(reader.search(image=photos / "blue" / "new.png", k=20)) == 10
    assert reader.search(like="red/1.png", k=20)
    assert_holds(out, photos, names_in(photos))
    assert len(list((out / "chroma").iterdir())) == 2
    reader.close()
    paint(photos / "blue" / "newer.png", 101)
    Index.build(open_source(photos), bundle, out)
    assert [path.name for path in (out / "chroma").iterdir()] == ["0003"]
    assert [path.name for path in (out / "items").iterdir()] == ["0003.jsonl"]


def test_another_model_is_refused_with_the_command_that_indexes_again(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    other = make_bundle(seed=1)
    other.save(model := out.with_name("other"))
    command = f"twofold index {photos} --model {model} --out {out} --existing replace"
    with pytest.raises(FingerprintMismatch, match=command):
        Index.open(out, model)
    with pytest.raises(FingerprintMismatch, match="--existing replace"):
        Index.build(open_source(photos), other, out)
    assert_holds(out, photos, names_in(photos))
    built = index(photos, model=model, out=out, existing="replace")
    assert (built.items, built.embedded) == (10, 10)
    assert_holds(out, photos, names_in(photos))
    Index.open(out, other).close()
    assert [path.name for path in (out / "vectors").iterdir()] == [other.tower_fingerprint("image")]


def test_another_text_tower_replaces_the_model_and_embeds_nothing(photos, bundle, both, out):
    Index.build(open_source(photos), bundle, out)
    with pytest.raises(UsageError, match="no text tower"):
        search(out, "red squares")
    assert bundle.tower_fingerprint("image") == both.tower_fingerprint("image")
    assert Index.build(open_source(photos), both, out).embedded == 0
    assert len(search(out, "red squares", k=3)) == 3


def test_texts_can_be_indexed_too(both, out):
    source = Source("captions", ["a", "b", "c"], texts=[["a dog"], ["a red house"], ["the sea at night"]])
    assert Index.build(source, both, out).items == 3
    hit = search(out, "the sea at night", k=1)[0]
    assert (hit.id, hit.meta) == ("c", {"text": "the sea at night"})
    built = Index.build(Source("captions", ["d"], texts=[["a dog", "the sea at night"]]), both, out)
    assert (built.items, built.embedded) == (4, 1)
    units = both.encode(["a dog", "the sea at night"])
    opened = Index.open(out)
    np.testing.assert_allclose(opened.store.vectors(["d"])[0], units.sum(0) / np.linalg.norm(units.sum(0)), atol=1e-5)
    opened.close()
    with pytest.raises(UsageError, match="index of texts"):
        Index.build(openmoji().take([0, 1]), both, out, modality="image")


@pytest.mark.parametrize("mend", ["rebuild", "build"])
@pytest.mark.parametrize("damage", ["gone", "not a database", "items lost"])
def test_a_damaged_store_is_made_again_from_the_vectors(photos, bundle, out, damage, mend):
    Index.build(open_source(photos), bundle, out)
    folder = out / "chroma" / "0001"
    if damage == "items lost":
        head = module.read_head(out)
        store = module.open_store(out, head, head.spaces[0], write=True)
        store.delete(["red/1.png"])
        store.close()
        opened = Index.open(out)
        assert opened.audit() == ["red/1.png"]
        opened.close()
    else:
        shutil.rmtree(out / "chroma") if damage == "gone" else (folder / "chroma.sqlite3").write_bytes(b"nonsense")
        with pytest.raises(StoreError, match=r"Index\.rebuild"):
            Index.open(out)
    if mend == "rebuild":
        Index.rebuild(out)
    else:
        paint(photos / "red" / "new.png", 100)
        assert Index.build(open_source(photos), bundle, out).embedded == 1
    assert_holds(out, photos, names_in(photos))


def test_damaged_vectors_are_embedded_again(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    shard = next((out / "vectors").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(StoreError, match="has lost the vectors of 10"):
        Index.rebuild(out)
    assert Index.build(open_source(photos), bundle, out).embedded == 10
    Index.rebuild(out)
    assert_holds(out, photos, names_in(photos))


def test_damaged_lists_are_named_with_what_to_do(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    (out / "items" / "0001.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(StoreError, match=r"0001\.jsonl is missing or damaged.*--existing replace"):
        Index.build(open_source(photos), bundle, out)
    assert Index.build(open_source(photos), bundle, out, existing="replace").embedded == 0
    assert_holds(out, photos, names_in(photos))
    (out / "index.json").write_text('{"format": 99}')
    with pytest.raises(StoreError, match=r"index\.json is damaged or of another version"):
        Index.open(out)


def test_one_build_at_a_time(photos, bundle, out):
    out.mkdir()
    claim = Claim(out / "twofold.lock")
    with pytest.raises(StoreError, match="being written by process"):
        Index.build(open_source(photos), bundle, out)
    claim.release()
    Index.build(open_source(photos), bundle, out)
    with Index.open(out), pytest.raises(StoreError, match="being read"):
        Claim(out / "chroma" / "0001" / "twofold.lock")
    Claim(out / "chroma" / "0001" / "twofold.lock").release()


SLOW = """
    import signal, sys, time
    import torch
    import twofold.retrieve.index as module
    from twofold.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin deaf to Ctrl-C

    def embed_slowly(*given):
        print("embedding", flush=True)
        time.sleep(60)

    if "--slowly" in sys.argv:
        module.embed_items = embed_slowly
    sys.exit(main([one for one in sys.argv[1:] if one != "--slowly"]))
"""


def test_a_second_writer_is_refused_by_the_command_and_ctrl_c_leaves_nothing_broken(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    bundle.save(model := out.with_name("model"))
    paint(photos / "blue" / "new.png", 100)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), "index", photos, "--model", model, "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--slowly"], **pipes) as first:
        try:
            assert first.stdout is not None and first.stdout.readline() == "embedding\n"
            second = subprocess.run(command, capture_output=True, text=True)
            assert second.returncode == 1
            assert f"is being written by process {first.pid}" in second.stderr and "Traceback" not in second.stderr
            assert_holds(out, photos, [name for name in names_in(photos) if name != "blue/new.png"])
            first.send_signal(signal.SIGINT)
            said = first.communicate(timeout=30)[1]
        finally:
            first.kill()
    assert first.returncode == 130 and "Traceback" not in said
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_holds(out, photos, names_in(photos))


def test_a_folder_of_other_things_is_left_alone(photos, bundle):
    with pytest.raises(StoreError, match="is no index: it holds blue"):
        Index.build(open_source(photos), bundle, photos)
    assert sorted(path.name for path in photos.iterdir()) == ["blue", "red"]
    with pytest.raises(StoreError, match="twofold index SOURCE --model MODEL --out"):
        Index.open(photos)


def test_unknown_choices_are_refused(photos, bundle, out):
    with pytest.raises(UsageError, match="'prune'"):
        Index.build(open_source(photos), bundle, out, existing="purge")
    with pytest.raises(UsageError, match="no text tower"):
        Index.build(Source("words", ["a"], texts=[["b"]]), bundle, out)


def test_an_item_whose_vector_and_picture_are_both_lost_is_named(photos, bundle, out):
    Index.build(open_source(photos), bundle, out)
    (photos / "red" / "1.png").unlink()
    shard = next((out / "vectors").rglob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged"):
        built = Index.build(open_source(photos), bundle, out)
    assert [(name, "damaged" in reason) for name, reason in built.skipped] == [("red/1.png", True)]
    assert (built.items, built.removed, built.absent) == (9, 1, 0)
    assert_holds(out, photos, names_in(photos))


@pytest.mark.parametrize("store", ["exact", "qdrant", "chroma server"])
def test_an_index_goes_over_to_another_store_and_back_and_keeps_its_choice(photos, bundle, out, store, tmp_path):
    Index.build(open_source(photos), bundle, out)
    kept = Kept({"exact": "exact", "qdrant": f"qdrant:{tmp_path / 'q'}"}.get(store) or f"chroma:{server()}")
    assert Index.build(open_source(photos), bundle, out, store=kept).embedded == 0
    assert_holds(out, photos, names_in(photos))
    assert check(out).whole and not list((out / "chroma").glob("*"))
    reader = Index.open(out)
    assert reader.head.store == kept and explain(reader).recall == 1
    paint(photos / "green" / "new.png", 101)
    (photos / "red" / "1.png").unlink()
    if store == "qdrant":
        reader.close()  # a folder of the local mode has one client at a time
    assert Index.build(open_source(photos), bundle, out, existing="prune").embedded == 1
    if store != "qdrant":
        assert len(reader.search(image=photos / "red" / "3.png", k=20)) == 10
        reader.close()
    assert_holds(out, photos, names_in(photos))
    with pytest.raises(FingerprintMismatch):
        Index.open(out, make_bundle(seed=1))
    Index.rebuild(out, store=Kept("chroma", {"ef_search": 50}))
    assert_holds(out, photos, names_in(photos))
    opened = Index.open(out)
    assert opened.store.parameters["ef_search"] == 50
    opened.close()


@pytest.mark.parametrize("wrong", ["qdrant", "exact:x", "chroma:localhost", "faiss"])
def test_a_store_that_does_not_exist_is_refused(wrong):
    with pytest.raises(UsageError):
        Kept(wrong)
    with pytest.raises(UsageError, match="setting"):
        Kept("chroma", {"ef": 3})
