"""One index of pictures, texts and clips: every item by what it has, hits of all in turn, and all upkeep goes on."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import nn

from test_video import clip, stored
from twofold.cli import main
from twofold.data.sources import Column, Source, open_source
from twofold.data.video import LONGEST, still, watch, windows
from twofold.errors import DataError, FingerprintMismatch, UsageError
from twofold.learn import learn
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder
from twofold.retrieve.bulk import Part, _unit, embed_part
from twofold.retrieve.check import check, repair
from twofold.retrieve.duplicates import duplicates
from twofold.retrieve.explain import explain
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.fit_fusion import fit_fusion
from twofold.retrieve.index import Index, index, search
from twofold.retrieve.modalities import FRAMES, found_by, left_out, towers_of
from twofold.retrieve.retriever import in_turn
from twofold.retrieve.snapshot import read_head
from twofold.retrieve.store import Hit, Place
from twofold.serve.app import app

ALL = "image,text,video"
WORDS = [
    "The red house by the river.\n\nIt was built by a miller.",
    "A dog sleeps in the sun.",
    "Rain falls on the harbour.",
    "Two ships leave at dawn.",
]


def paint(path: Path, seed: int) -> Path:
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(squares).resize((32, 32), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def things(tmp_path) -> Path:
    """Five pictures, four texts and three clips in one folder."""
    root = tmp_path / "things"
    for n in range(5):
        paint(root / "pictures" / f"{n}.png", n)
    for n, words in enumerate(WORDS):
        (root / "notes" / f"{n}.txt").parent.mkdir(exist_ok=True)
        (root / "notes" / f"{n}.txt").write_text(words)
    (root / "clips").mkdir()
    for n in range(3):
        (root / "clips" / f"{n}.mkv").write_bytes(stored(clip(n, frames=12)))
    return root


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "things.index"


@pytest.fixture
def made(things, out, untrained) -> Path:
    Index.build(open_source(things, kinds=("image", "text", "video")), untrained, out, modality=ALL, texts="none")
    return out


def modalities(hits: list[Hit]) -> list[str]:
    return [str(hit.meta["modality"]) for hit in hits]


# -- What is in it


def test_a_folder_of_pictures_texts_and_clips_becomes_one_index(things, out, untrained, tmp_path, capsys):
    untrained.save(model := tmp_path / "model")
    command = ["index", str(things), "--model", str(model), "--out", str(out), "--texts", "none", "--json"]
    assert main([*command, "--modality", ALL]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 12
    head = read_head(out)
    assert head.modalities == ("image", "text", "video") and head.frames == {"video": FRAMES}
    with Index.open(out) as opened:
        kinds = {name: meta["modality"] for name, meta in opened.items()}
        assert opened.audit() == []
    assert (kinds["pictures/0.png"], kinds["notes/0.txt"], kinds["clips/0.mkv"]) == ("image", "text", "video")
    assert main(command) == 0, "an index goes on with its modalities"
    again = json.loads(capsys.readouterr().out)
    assert (again["items"], again["embedded"], again["absent"], again["changed"]) == (12, 0, 0, 0)
    assert main([*command, "--modality", "image"]) == 2
    assert "not of images" in capsys.readouterr().err
    assert main([*command, "--modality", "image", "--existing", "replace"]) == 0
    assert json.loads(capsys.readouterr().out)["embedded"] == 0, "what has a vector keeps it"
    assert search(out, image=things / "pictures" / "3.png", k=1)[0].score == pytest.approx(1, abs=1e-5)


def test_each_vector_is_that_of_its_own_tower(things, made, untrained):
    with Index.open(made) as opened:
        picture, text, moving = opened.store.vectors(["pictures/1.png", "notes/0.txt", "clips/2.mkv"])
    np.testing.assert_allclose(picture, untrained.encode(things / "pictures" / "1.png"), atol=1e-5)
    paragraphs = untrained.encode(WORDS[0].split("\n\n")).sum(0)
    np.testing.assert_allclose(text, paragraphs / np.linalg.norm(paragraphs), atol=1e-5)
    frames = watch(things / "clips" / "2.mkv", 32)
    seen = untrained.encode(list(frames[[0, 2, 3, 5, 6, 8, 9, 11]]), normalize_embeddings=False).mean(0)
    np.testing.assert_allclose(moving, seen / np.linalg.norm(seen), atol=1e-4)


def test_frames_are_spread_over_all_of_a_clip():
    assert windows(np.array([12]), FRAMES, LONGEST)[0].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert windows(np.array([3]), FRAMES, LONGEST)[0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_a_manifest_of_mixed_rows_is_one_index_where_that_is_asked_for(things, out, untrained, tmp_path):
    manifest = things / "all.csv"
    manifest.write_text(
        "image,caption,video\n"
        "pictures/0.png,squares,\n"
        ",only words,\n"
        ",a moving blot,clips/1.mkv\n"
        "pictures/2.png,,clips/0.mkv\n"
        ",,\n"
    )
    alone = index(manifest, model=untrained, out=out)
    assert (read_head(out).modality, alone.items) == ("image", 2), "unasked, nothing else has its turn in every answer"
    assert left_out(open_source(manifest), ["image"]) == {"video": 1, "text": 1}
    built = index(manifest, model=untrained, out=out, modality="image,video,text", existing="replace")
    assert (built.items, [reason for _, reason in built.skipped]) == (4, ["has no image and no video and no text"])
    with Index.open(out) as opened:
        found = {name: meta["modality"] for name, meta in opened.items()}
    assert found == {"pictures/0.png": "image", "1": "text", "clips/1.mkv": "video", "pictures/2.png": "image"}


def test_where_every_row_has_a_picture_the_index_is_one_of_pictures(out, untrained, emoji):
    Index.build(emoji.take(range(10)), untrained, out)
    assert read_head(out).modality == "image" and not read_head(out).towers
    assert "modality" not in search(out, "a face", k=1)[0].meta


def test_the_order_that_is_given_decides(untrained, out, things):
    source = Source("both", ["a"], images=[things / "pictures" / "0.png"], texts=[["a dog"]])
    assert found_by(source, ["text", "image"]) == ["text"] and found_by(source, ["image", "text"]) == ["image"]
    Index.build(source, untrained, out, modality=["text", "image"], texts="none")
    with Index.open(out) as opened:
        np.testing.assert_allclose(opened.store.vectors(["a"])[0], untrained.encode("a dog"), atol=1e-5)


def test_clips_alone_are_read_by_a_picture_tower_too(things, out, untrained):
    pixels = np.asarray(Image.open(things / "pictures" / "3.png"))
    (things / "clips" / "still.mkv").write_bytes(stored(np.stack([pixels] * 5)))
    Index.build(open_source(things / "clips"), untrained, out)
    assert (read_head(out).modality, read_head(out).frames) == ("video", {"video": FRAMES})
    assert check(out).whole
    hit = search(out, image=things / "pictures" / "3.png", k=1)[0]
    assert (hit.id, hit.score) == ("still.mkv", pytest.approx(1, abs=1e-3))
    with pytest.raises(UsageError, match="neither a video tower nor a picture tower"):
        towers_of(Bundle({"text": untrained.towers["text"]}), ["video"], {"video": 8})


def test_a_model_that_cannot_read_a_modality_leaves_it_out_or_says_so(things, out):
    with torch.random.fork_rng():
        pictures = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
    source = open_source(things, kinds=("image", "text", "video"))
    built = Index.build(source, pictures, out, modality=["image", "video"], texts="none")
    assert read_head(out).modalities == ("image", "video") and built.items == 8
    with pytest.raises(UsageError, match="no text tower"):
        Index.build(source, pictures, out, modality=ALL, existing="replace")


def test_a_column_of_that_name_is_refused(things, untrained, out):
    source = open_source(things, kinds=("image", "text"))
    named = Source(source.name, source.ids, images=source.images, texts=source.texts, meta={"modality": ["x"] * 9})
    with pytest.raises(DataError, match="call it something else"):
        Index.build(named, untrained, out, modality="image,text")
    Index.build(named, untrained, out, modality="image")


# -- Searching


def test_hits_come_from_all_modalities_in_turn_and_a_filter_leaves_plain_cosines(made, untrained):
    with Index.open(made) as opened:
        hits = opened.search("a house", k=12)
        assert modalities(hits[:9]) == ["image", "text", "video"] * 3
        assert sorted(hit.id for hit in hits) == opened.store.ids()
        assert [hit.score for hit in hits] == sorted({hit.score for hit in hits}, reverse=True)
        for kind in ("image", "text", "video"):
            alone = opened.search("a house", k=12, where={"modality": kind})
            mine = [hit for hit in hits if hit.meta["modality"] == kind]
            assert [hit.id for hit in alone] == [hit.id for hit in mine]
            assert [hit.spaces for hit in mine] == [(Place(kind, n, one.score),) for n, one in enumerate(alone, 1)]
            cosines = opened.store.vectors([hit.id for hit in alone]) @ untrained.encode("a house")
            np.testing.assert_allclose([hit.score for hit in alone], cosines, atol=1e-4)
        assert opened.search("a house", k=3) + opened.search("a house", k=4, offset=3) == hits[:7]
        like = opened.search(like="clips/0.mkv", k=12)
        assert "clips/0.mkv" not in [hit.id for hit in like] and len(like) == 11
        assert modalities(like[:3]) == ["image", "text", "video"]
        some = opened.search("a house", where={"$or": [{"label": "notes"}, {"label": "clips"}]})
        assert set(modalities(some)) == {"text", "video"}
        assert len(opened.search("a house", k=5, spread=0.5, distinct=0.99)) == 5


def test_turns_are_even_ordered_and_the_same_on_every_page():
    counts = {"a": 4, "b": 1, "c": 3}
    lists = {name: [Hit(f"{name}{n}", 0.5 - n / 10, {}) for n in range(count)] for name, count in counts.items()}
    turned = in_turn(lists)
    assert [hit.id for hit in turned] == ["a0", "b0", "c0", "a1", "c1", "a2", "c2", "a3"]
    scores = [hit.score for hit in turned]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores) and scores[0] == 1
    assert in_turn({name: hits[:2] for name, hits in lists.items()}) == turned[:5]


def test_words_ask_the_texts_too_and_say_where_they_found(things, out, untrained):
    Index.build(open_source(things, kinds=("image", "text", "video")), untrained, out, modality=ALL)
    assert read_head(out).texts.rows == 5  # paragraphs
    hits = search(out, "It was built by a miller.", k=4)
    best = next(hit for hit in hits if hit.meta["modality"] == "text")
    assert best.id == "notes/0.txt"
    assert {place.space for place in best.spaces} == {"text", "items", "texts"}
    with Index.open(out) as opened, pytest.raises(DataError, match="come in turn"):
        fit_fusion(opened, open_source(things, kinds=("image", "text", "video")))


def test_the_terminal_shows_which_modality_found_what(made, capsys):
    assert main(["search", str(made), "a house", "--k", "3", "--explain"]) == 0
    said = capsys.readouterr()
    assert "image 1" in said.out and "text 1" in said.out and "video 1" in said.out
    assert "5 image, 4 text, 3 video (by 8 frames)" in said.err
    assert main(["search", str(made), "a house", "--where", "modality=text", "--json"]) == 0
    assert {hit["meta"]["modality"] for hit in json.loads(capsys.readouterr().out)} == {"text"}


# -- Upkeep


def test_an_item_that_gets_a_picture_is_found_by_it_from_then_on(untrained, out, things):
    def source(picture):
        return Source("s", ["a", "b"], images=[picture, things / "pictures" / "1.png"], texts=[["a dog"], []])

    Index.build(source(b""), untrained, out, modality=["image", "text"], texts="none")
    assert read_head(out).modality == "image,text"
    built = Index.build(source(things / "pictures" / "0.png"), untrained, out)
    assert (built.changed, built.embedded) == (1, 1)
    assert search(out, image=things / "pictures" / "0.png", k=1)[0].id == "a"
    assert read_head(out).modality == "image,text", "an index goes on with its modalities"


def test_what_is_gone_is_pruned_and_what_is_broken_is_named(things, made, untrained):
    (things / "notes" / "0.txt").unlink()
    (things / "clips" / "1.mkv").write_bytes(b"no clip")
    shutil.copy(things / "pictures" / "0.png", things / "pictures" / "again.png")
    built = Index.build(open_source(things, kinds=("image", "text", "video")), untrained, made, existing="prune")
    assert (built.items, built.added, built.removed, built.embedded) == (11, 1, 2, 0)
    assert [name for name, _ in built.skipped] == ["clips/1.mkv"]
    assert check(made).whole


def test_a_modality_may_be_gone_altogether(things, made, untrained):
    shutil.rmtree(things / "clips")
    built = Index.build(open_source(things, kinds=("image", "text", "video")), untrained, made, existing="prune")
    assert (built.items, built.removed, built.embedded) == (9, 3, 0)
    assert read_head(made).modality == ALL and check(made).whole
    assert set(modalities(search(made, "a house"))) == {"image", "text"}


def test_the_same_words_in_two_columns_have_the_vector_of_their_own_tower(untrained, out):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        title = Tower(untrained.towers["text"].encoder, nn.Linear(384, untrained.dim))
    bundle = Bundle({"text": untrained.towers["text"], "title": title})
    cells = Column("text", [["a dog"], []])
    source = Source("both", ["a", "b"], texts=[[], ["a dog"]], columns={"title": cells})
    Index.build(source, bundle, out, modality="text,title", texts="none")
    assert read_head(out).modality == "text,title"
    with Index.open(out) as opened:
        vectors = opened.store.vectors(["a", "b"])
        assert opened.audit() == []
    expected = [bundle.encode("a dog", modality=name) for name in ("title", "text")]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert check(out).whole


def test_another_model_is_refused_by_the_place_it_came_from(things, made, untrained, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
    other = Bundle({"image": image, "text": untrained.towers["text"]})
    with pytest.raises(FingerprintMismatch, match=r"\(image\).*\(video\).*--model MODEL"):
        Index.open(made, other)
    other.save(model := tmp_path / "other")
    with pytest.raises(FingerprintMismatch, match=f"--model {model} --out {made} --existing replace"):
        Index.build(open_source(things, kinds=("image", "text", "video")), Bundle.load(model), made)
    reads = Tower(untrained.towers["text"].encoder, nn.Linear(384, untrained.dim))
    text = Bundle({"image": untrained.towers["image"], "text": reads})
    with pytest.raises(FingerprintMismatch, match=r"encoder \w+ \(text\), this"):
        Index.open(made, text)


def test_every_modality_is_checked_and_mended(things, made):
    assert check(made).whole
    for mark in read_head(made).towers.values():
        shard = next((made / "vectors" / mark).glob("*.arrow"))
        shard.write_bytes(shard.read_bytes()[:-50])
        (things / "pictures" / "4.png").unlink(missing_ok=True)
        found = {one.what: one.ids for one in check(made).findings}
        assert found["lost"] and found["files"] == [shard.name]
        with pytest.warns(UserWarning, match="is damaged"):
            done = repair(made)
        assert done.after.whole and done.embedded
    assert [*done.after.findings] == [] and done.after.items == 11  # a picture was gone
    (made / "items" / f"{read_head(made).snapshot}.jsonl").write_text("{")
    assert [one.what for one in check(made).findings] == ["list"]
    assert repair(made).after.items == 11


def test_parts_and_units_of_ray_embed_what_one_process_does(things, made, untrained, tmp_path):
    source = open_source(things, kinds=("image", "text", "video"))
    out = tmp_path / "other"
    for number in range(3):
        assert embed_part(source, untrained, out, Part(number, 3), modality=ALL) == []
    assert Index.build(source, untrained, out, modality=ALL, texts="none").embedded == 0
    untrained.save(model := tmp_path / "model")
    third = tmp_path / "third"
    assert _unit(source, range(12), model, third, ("image", "text", "video"), "keep", "raise") == []
    assert Index.build(source, untrained, third, modality=ALL, texts="none").embedded == 0
    with Index.open(out) as one, Index.open(made) as other:
        np.testing.assert_allclose(one.store.vectors(one.store.ids()), other.store.vectors(one.store.ids()), atol=1e-5)


def test_a_clip_is_no_twin_of_its_frame_but_equal_files_are(things, out, untrained):
    Image.fromarray(still(things / "clips" / "0.mkv")).save(things / "pictures" / "frame.png")
    shutil.copy(things / "clips" / "1.mkv", things / "clips" / "1 again.mkv")
    shutil.copy(things / "notes" / "1.txt", things / "notes" / "1 again.txt")
    Index.build(open_source(things, kinds=("image", "text", "video")), untrained, out, modality=ALL, texts="none")
    groups = [[twin.id for twin in group] for group in duplicates(out)]
    assert sorted(groups) == [["clips/1 again.mkv", "clips/1.mkv"], ["notes/1 again.txt", "notes/1.txt"]]


def test_explain_map_and_feedback_go_on(made, tmp_path):
    with Index.open(made) as opened:
        assert explain(opened).recall == 1
        ids, places = opened.map()
        assert len(ids) == 12 and np.isfinite(places).all()
    Feedback(made).add(Click("a house", (), "notes/0.txt", True))
    with pytest.raises(UsageError, match="one modality"):
        learn(made, out=tmp_path / "learnt")


def test_an_index_of_before_still_opens(things, out, untrained):
    Index.build(open_source(things / "pictures"), untrained, out)
    said = json.loads((out / "index.json").read_text())
    old = {name: value for name, value in said.items() if name not in ("towers", "frames", "model")}
    (out / "index.json").write_text(json.dumps(old))
    assert search(out, image=things / "pictures" / "2.png", k=1)[0].id == "2.png"
    assert Index.build(open_source(things / "pictures"), untrained, out).embedded == 0
    assert check(out).whole


# -- Serving


def test_the_service_shows_a_frame_of_a_clip_and_no_path_of_the_server(things, made, tmp_path):
    with TestClient(app(made), base_url="http://localhost") as client:
        facts = client.get("/api/v1/facts").json()
        assert facts["modalities"] == {"image": "image", "text": "text", "video": "video"}
        assert [count for _, count in facts["columns"]["modality"]] == [5, 4, 3]
        found = client.post("/api/v1/search", json={"text": "a house", "k": 12})
        assert str(tmp_path) not in found.text
        metas = {hit["id"]: hit["meta"] for hit in found.json()["hits"]}
        assert metas["clips/0.mkv"]["video"] == "clips/0.mkv" and metas["pictures/0.png"]["image"] == "pictures/0.png"
        first = [place["space"] for hit in found.json()["hits"][:3] for place in hit["spaces"]]
        assert first == ["image", "text", "video"]
        shown = client.get("/api/v1/picture", params={"id": "clips/0.mkv"})
        assert shown.status_code == 200 and Image.open(io.BytesIO(shown.content)).size == (32, 32)
        assert client.get("/api/v1/picture", params={"id": "notes/0.txt"}).status_code == 404
        part = client.post("/api/v1/search", json={"text": "a", "within": ["notes/0.txt", "clips/1.mkv"]}).json()[
            "hits"
        ]
        assert [hit["id"] for hit in part] == ["notes/0.txt", "clips/1.mkv"]
        plane = client.get("/api/v1/map").json()
        assert sorted(plane["words"]) == [f"notes/{n}.txt" for n in range(4)]
        listed = client.post("/api/v1/items", json={"where": ["modality=video"]}).json()["hits"]
        assert [hit["id"] for hit in listed] == ["clips/0.mkv", "clips/1.mkv", "clips/2.mkv"]
    (tmp_path / "other").mkdir()
    with TestClient(app(made, roots=[tmp_path / "other"]), base_url="http://localhost") as client:
        assert client.get("/api/v1/picture", params={"id": "clips/0.mkv"}).status_code == 404
        told = client.get("/api/v1/item", params={"id": "clips/0.mkv"}).json()["meta"]
        assert told == {"label": "clips", "modality": "video"}


# -- Sources


def test_a_folder_of_several_kinds_has_an_item_for_each_file(things, untrained):
    source = open_source(things, kinds=("video", "text"))
    assert source.modalities == {"text": "text", "video": "video"} and len(source) == 7
    assert source.texts[source.ids.index("notes/0.txt")] == ["The red house by the river.", "It was built by a miller."]
    assert set(source.classes) == {"notes", "clips"}
    assert list(open_source(things).modalities) == ["image"], "nothing is taken unasked"
    with pytest.raises(UsageError, match="vector"):
        open_source(things, kinds=("image", "vector"))
    with pytest.raises(DataError, match="audio, text"):
        open_source(things / "clips", kinds=("audio", "text"))


def test_the_middle_frame_is_kept_of_any_clip(things):
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    assert abs(int(still(frames)[0, 0, 0]) - 20) <= 2
    assert still(frames[:2])[0, 0, 0] in (0, 1)
    assert still(things / "clips" / "0.mkv").shape == (32, 32, 3)


def test_clips_of_arrays_and_damaged_ones(out, untrained):
    clips = Column("video", [clip(1), b"", clip(2)[:1]])
    source = Source("arrays", ["a", "b", "c"], texts=[[], ["words"], []], columns={"video": clips})
    built = Index.build(source, untrained, out, modality="video,text", texts="none")
    assert read_head(out).modality == "video,text" and [name for name, _ in built.skipped] == ["c"]
    assert built.items == 2
