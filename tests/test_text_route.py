"""Words are answered by two spaces: the model's own and one of the items' texts. Both stay whole; hits say which."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from twofold.cli import main
from twofold.data.sources import Source
from twofold.errors import EmbedderError, FingerprintMismatch, UsageError
from twofold.measure.calibration import Calibration, direction
from twofold.models.bundle import Bundle, Tower, annotate
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.check import check, repair
from twofold.retrieve.fit_fusion import fit_fusion, keep
from twofold.retrieve.fusion import Fusion
from twofold.retrieve.index import Index, keep_fusion
from twofold.retrieve.snapshot import open_store, read_head
from twofold.retrieve.store import Place

NAMES = ["bank", "boat", "cat", "dog", "fish", "lamp", "moon", "road"]
TEXTS = {
    "bank": ["money is kept here", "a house of coins"],
    "boat": ["a vessel on the water", "sails in the wind"],
    "cat": ["a small animal that purrs"],
    "dog": ["a loyal animal that barks", "man's best friend"],
    "fish": ["it swims in the sea", "an animal with fins", "caught with a net"],
    "lamp": ["it gives light in a room"],
    "moon": ["it shines at night", "round and far away"],
    "road": [],
}


class Bags:
    """A text embedder that counts words, and what it was asked to embed."""

    name, dim = "bags", 64

    def __init__(self, fingerprint: str = "bags"):
        self.fingerprint = fingerprint
        self.documents: list[str] = []

    def embed_documents(self, texts, *, progress=None):
        self.documents += texts
        return self.embed_queries(texts)

    def embed_queries(self, texts):
        rows = np.full((len(texts), self.dim), 1e-3, np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[sum(word.encode()) % self.dim] += 1
        return rows


def source(names=NAMES, **texts) -> Source:
    draw = np.random.default_rng(0)
    pictures = {name: draw.integers(0, 256, (32, 32, 3), np.uint8) for name in NAMES}
    return Source(
        "things",
        list(names),
        images=[pictures[name] for name in names],
        texts=[{**TEXTS, **texts}[name] for name in names],
        meta={"length": [len(name) for name in names]},
    )


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        picture = image_encoder("timm:resnet18/4", size=32, small_stem=True)
        return Bundle({"image": picture, "text": Tower(text_encoder("minilm"), nn.Linear(384, 32))})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bags(monkeypatch) -> Bags:
    """Bags, also as what an index opens by its name."""
    embedder = Bags()
    monkeypatch.setattr("twofold.retrieve.index.text_embedder", lambda name: embedder)
    return embedder


@pytest.fixture
def out(tmp_path, bundle, bags) -> Path:
    Index.build(source(), bundle, tmp_path / "index", texts=bags)
    bags.documents.clear()
    return tmp_path / "index"


def texts_held(out: Path) -> dict[str, str]:
    head = read_head(out)
    store = open_store(out, head, head.spaces[1])
    held = {name: str(meta["@text"]) for name, meta in zip(store.ids(), store.meta(store.ids()), strict=True)}
    store.close()
    return held


def expected(texts=TEXTS) -> dict[str, str]:
    return {f"{n}@{name}": text for name, own in texts.items() for n, text in enumerate(own)}


# -- what is kept


def test_every_text_is_embedded_once_and_an_unchanged_index_is_left_alone(tmp_path, bundle):
    embedder = Bags()
    doubled = source(road=["it shines at night", "  ", "it shines at night"])
    built = Index.build(doubled, bundle, tmp_path / "index", texts=embedder)
    assert (built.texts, built.texts_embedded) == (14, 13)  # the moon's and the road's are one content
    assert sorted(embedder.documents) == sorted({text for own in TEXTS.values() for text in own})
    assert texts_held(tmp_path / "index") == expected({**TEXTS, "road": ["it shines at night"]})
    again = Index.build(doubled, bundle, tmp_path / "index", texts=embedder)
    assert (again.changed, again.texts_embedded, len(embedder.documents)) == (0, 0, 13)
    assert read_head(tmp_path / "index").snapshot == "0001"


def test_texts_that_change_come_and_go_with_their_items(out, bundle, bags):
    built = Index.build(source(cat=["it purrs", "a small animal that purrs"], dog=["man's best friend"]), bundle, out)
    assert (built.changed, built.embedded, bags.documents) == (2, 0, ["it purrs"])
    now = {**TEXTS, "cat": ["it purrs", "a small animal that purrs"], "dog": ["man's best friend"]}
    assert texts_held(out) == expected(now)
    Index.build(source(NAMES[:3], cat=now["cat"]), bundle, out)
    assert texts_held(out) == expected(now)  # kept, as their items are
    Index.build(source(NAMES[:3], cat=now["cat"]), bundle, out, existing="prune")
    assert texts_held(out) == expected({name: now[name] for name in NAMES[:3]})
    assert check(out).whole


def test_texts_of_another_embedder_are_refused_dropped_and_made_anew(out, bundle):
    with pytest.raises(FingerprintMismatch, match="--texts none, which drops them"):
        Index.build(source(), bundle, out, texts=Bags("other"))
    dropped = Index.build(source(), bundle, out, texts="none")
    assert (dropped.texts, dropped.embedded, len(read_head(out).spaces)) == (0, 0, 1)
    assert len(list((out / "vectors").iterdir())) == len(list((out / "chroma").iterdir())) == 1
    made = Index.build(source(), bundle, out, texts=Bags("other"))
    assert (made.texts, made.embedded, made.texts_embedded) == (13, 0, 13)


def test_an_index_whose_embedder_is_another_now_says_so_when_asked(out, monkeypatch):
    opened = Index.open(out)
    monkeypatch.setattr("twofold.retrieve.index.text_embedder", lambda name: Bags("newer"))
    with pytest.raises(FingerprintMismatch, match="newer"):
        opened.search("an animal")
    assert opened.search("an animal", via="items", k=2)
    opened.close()


def test_what_was_embedded_before_a_kill_is_not_embedded_again(tmp_path, bundle, monkeypatch):
    class Killed(Exception):
        pass

    def die(*_):
        raise Killed

    embedder = Bags()
    with monkeypatch.context() as patch:
        patch.setattr("twofold.retrieve.index.write_snapshot", die)
        with pytest.raises(Killed):
            Index.build(source(), bundle, tmp_path / "index", texts=embedder)
    assert Index.build(source(), bundle, tmp_path / "index", texts=embedder).texts_embedded == 0
    assert len(embedder.documents) == 13


def lose_vectors(out: Path) -> None:
    head = read_head(out)
    shutil.rmtree(out / "vectors" / head.spaces[1].fingerprint)


def lose_store(out: Path) -> None:
    shutil.rmtree(out / "chroma" / "0001-texts")


def swap_texts(out: Path) -> None:
    head = read_head(out)
    store = open_store(out, head, head.spaces[1], write=True)
    store.upsert(["0@dog", "1@dog"], store.vectors(["1@dog", "0@dog"]), store.meta(["0@dog", "1@dog"]))
    store.delete(["0@cat"])
    store.close()


DAMAGES = {
    lose_vectors: {"lost": 13},
    lose_store: {"store": 1},
    swap_texts: {"vector": 2, "missing": 1},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_texts_is_named_and_mended(out, damage):
    assert check(out).whole
    damage(out)
    assert {one.what: len(one.ids) for one in check(out).findings} == DAMAGES[damage]
    assert all(one.space == "texts" for one in check(out).findings)
    assert repair(out).after.whole
    assert texts_held(out) == expected()


# -- what is found


def places(hits) -> dict[str, dict[str, tuple]]:
    return {hit.id: {place.space: (place.rank, place.text) for place in hit.spaces} for hit in hits}


def test_a_hit_says_which_space_found_it_where_and_by_which_text(out, bags):
    opened = Index.open(out)
    hits = opened.search("caught with a net", k=8)
    looks = [hit.id for hit in opened.search("caught with a net", k=8, via="items")]
    words = opened.search("caught with a net", k=8, via="texts")
    assert words[0].spaces == (Place("texts", 1, pytest.approx(1, abs=1e-3), "caught with a net"),)
    assert {hit.id for hit in words} == {name for name in NAMES if TEXTS[name]}
    for name, found in places(hits).items():
        assert found["items"][0] == looks.index(name) + 1
        assert ("texts" in found) == bool(TEXTS[name])
    assert {name: found["texts"][0] for name, found in places(hits).items() if "texts" in found} == {
        hit.id: rank for rank, hit in enumerate(words, 1)
    }
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.id))
    assert all("@text" not in hit.meta for hit in (*hits, *words))
    opened.close()


def test_filters_pages_and_minus_hold_in_both_spaces(out):
    opened = Index.open(out)
    short = opened.search("an animal", k=8, where={"length": 3})
    assert {hit.id for hit in short} == {"cat", "dog"}
    whole = [hit.id for hit in opened.search("an animal", k=8)]
    assert [hit.id for start in range(0, 8, 3) for hit in opened.search("an animal", k=3, offset=start)] == whole
    away = opened.search("an animal that barks", k=8, via="texts", minus="barks loyal")
    assert opened.search("an animal that barks", k=8, via="texts")[0].id == "dog" != away[0].id
    opened.close()


def test_hits_of_both_spaces_differ_as_much_as_is_asked(out, monkeypatch):
    draw = np.random.default_rng(0)
    looks = {name: one / np.linalg.norm(one) for name in NAMES for one in [draw.normal(size=6)]}
    with closing(Index.open(out)) as opened:
        monkeypatch.setattr(opened.store, "vectors", lambda ids: np.stack([looks[id] for id in ids]))
        hits = opened.search("an animal with fins", k=8)
        names, scores = [hit.id for hit in hits], np.array([hit.score for hit in hits])
        alike = (vectors := np.stack([looks[name] for name in names])) @ vectors.T
        worth = (scores - scores.min()) / (scores.max() - scores.min())
        chosen = [0]
        while len(chosen) < 8:
            gain = 0.5 * worth - 0.5 * alike[:, chosen].max(1)
            chosen.append(max(set(range(8)) - set(chosen), key=lambda at: gain[at]))
        assert chosen != list(range(8))
        spread = opened.search("an animal with fins", k=8, spread=0.5)
        assert [hit.id for hit in spread] == [names[at] for at in chosen]
        assert spread[1].score == scores[chosen[1]]  # what is shown stays as it is


def test_what_is_not_words_alone_is_asked_in_the_items_own_space(out):
    opened = Index.open(out)
    for query in ({"like": "cat"}, {"text": "sea", "like": "cat"}, {"image": np.zeros((32, 32, 3), np.uint8)}):
        hits = opened.search(**query, k=3)
        assert len(hits) == 3 and all(hit.spaces == () for hit in hits)
        with pytest.raises(UsageError, match="answers words"):
            opened.search(**query, via="texts")
    opened.close()


def test_a_model_of_pictures_alone_is_searched_by_the_texts(tmp_path, bundle, bags):
    seeing = Bundle({"image": bundle.towers["image"]})
    Index.build(source(), seeing, tmp_path / "index", texts=bags)
    opened = Index.open(tmp_path / "index")
    assert opened.search("sails in the wind", k=1)[0].id == "boat"
    opened.close()
    Index.build(source(), seeing, tmp_path / "index", texts="none")
    opened = Index.open(tmp_path / "index")
    with pytest.raises(UsageError, match="no text tower"):
        opened.search("sails in the wind")
    with pytest.raises(UsageError, match="--texts minilm"):
        opened.search("sails in the wind", via="texts")
    opened.close()


def test_ranks_and_scores_are_fused_as_by_hand():
    items, texts = [("a", 0.9), ("b", 0.5)], [("b", 0.3), ("c", 0.2)]
    ranks = dict(Fusion("ranks", weight=0.25).scores(items, texts))
    assert ranks == pytest.approx({"a": 0.75, "b": 0.75 * 61 / 62 + 0.25, "c": 0.25 * 61 / 62}, abs=1e-6)
    scores = dict(Fusion("scores", weight=0.25).scores(items, texts))
    assert scores == pytest.approx({"a": 0.675 + 0.05, "b": 0.375 + 0.075, "c": 0.375 + 0.05}, abs=1e-6)
    standard = dict(Fusion("standard", weight=0.25).scores(items, texts))  # two scores stand at +1 and −1
    assert standard == pytest.approx({"a": 0.75 - 0.25, "b": -0.75 + 0.25, "c": -0.75 - 0.25}, abs=1e-6)
    assert dict(Fusion().scores([("a", 0.3)], [])) == {"a": 0}
    assert [name for name, _ in Fusion(weight=0).scores(items, texts)][:2] == ["a", "b"]
    assert [name for name, _ in Fusion("ranks", weight=1).scores(items, texts)][:2] == ["b", "c"]
    assert Fusion.read(Fusion("scores", 0.3).record()) == Fusion("scores", 0.3)


def test_the_exact_index_finds_the_same(out):
    exact, chroma = Index.open(out, exact=True), Index.open(out)
    found, expected = (opened.search("an animal", k=8) for opened in (chroma, exact))
    assert places(found) == places(expected)
    assert [(hit.id, hit.meta) for hit in found] == [(hit.id, hit.meta) for hit in expected]
    # A fused score is of standardised ones, so it tells two ways of adding up apart in its sixth digit.
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-4)
    chroma.close()


# -- what is fitted


def directions(texts):
    """One for each word, at random."""
    words = [[np.random.default_rng(list(word.encode())).normal(size=64) for word in text.split()] for text in texts]
    return np.array([np.sum(one, axis=0) for one in words], np.float32)


def test_a_fitted_fusion_has_probabilities_and_says_when_nothing_fits(tmp_path, bundle, bags, capsys):
    bags.embed_queries = directions
    draw = np.random.default_rng(0)
    names = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta", "kappa", "sigma") for b in "abcdef"]
    pairs = Source(
        "pairs",
        names,
        images=[draw.integers(0, 256, (32, 32, 3), np.uint8) for _ in names],
        texts=[[f"{name} seen", name] for name in names],
        splits=["val"] * len(names),
    )
    Index.build(pairs, bundle, tmp_path / "index", texts=bags)
    opened = Index.open(tmp_path / "index")
    assert opened.search("betac", k=3)[0].probability is None
    done = fit_fusion(opened, pairs)
    assert done.questions == len(names)
    assert done.first["texts"].value > 0.9 > 0.2 > done.first["items"].value
    assert done.first["fitted"].value >= done.first["texts"].value
    keep(opened, done)
    opened.close()
    opened = Index.open(tmp_path / "index")
    assert opened.retriever.fusion == done.fusion
    hits = opened.search("betac", k=3)
    assert hits[0].id == "betac" and hits[0].probability > 0.5 > hits[1].probability
    assert not opened.retriever.no_good_match(hits)
    assert opened.retriever.no_good_match(opened.search("zzz yyy xxx", k=3))
    assert main(["search", str(tmp_path / "index"), "zzz yyy xxx"]) == 0
    assert "no good match: 95%" in capsys.readouterr().err
    with pytest.raises(UsageError, match="Did you mean 'split'"):
        opened.search("betac", where={"spilt": "val"})
    opened.close()
    Index.build(pairs, bundle, tmp_path / "index", texts="none")
    Index.build(pairs, bundle, tmp_path / "index", texts=Bags("other"))
    assert Index.open(tmp_path / "index", exact=True).retriever.fusion == Fusion()  # it was fitted for another space


def test_who_keeps_an_index_is_told_what_its_probabilities_lack(out, capsys):
    with closing(Index.open(out)) as opened:
        assert opened.hints() == []  # the model has none either
    calibration = Calibration("platt", gallery=8, scale=1.0)
    annotate(out / "model", "calibration", direction("text", "image"), calibration.record())
    with closing(Index.open(out)) as opened:
        (hint,) = opened.hints()
        assert f"twofold calibrate {out} --data" in hint
        assert main(["search", str(out), "an animal"]) == 0 and hint in capsys.readouterr().err
        assert main(["search", str(out), "an animal", "--via", "items"]) == 0 and hint not in capsys.readouterr().err
        keep_fusion(out, Fusion("scores", 0.5, calibration))
    with closing(Index.open(out)) as opened:
        assert opened.hints() == []


def test_an_item_that_has_the_very_text_of_a_question_is_no_wrong_answer(tmp_path, bundle, bags):
    bags.embed_queries = directions
    draw = np.random.default_rng(0)
    names = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta") for b in "abcdef"]
    twins = [(name, n) for name in names for n in (1, 2)]
    pairs = Source(
        "twins",
        [f"{name}-{n}" for name, n in twins],
        images=[draw.integers(0, 256, (32, 32, 3), np.uint8) for _ in twins],
        texts=[[f"{name} seen{name}{n}", name] for name, n in twins],
        splits=["val"] * len(twins),
    )
    Index.build(pairs, bundle, tmp_path / "index", texts=bags)
    with closing(Index.open(tmp_path / "index")) as opened:
        done = fit_fusion(opened, pairs)
    assert done.questions == len(twins) and done.first["texts"].value > 0.9
    assert done.fusion.calibration.scale > 0


# -- the shipped embedder, the command line and the service


def test_the_command_line_takes_minilm_by_itself_and_says_where_hits_were_found(tmp_path, bundle, capsys):
    folder = tmp_path / "things"
    bundle.save(tmp_path / "model")
    rows = [{"id": name, "text": TEXTS[name]} for name in NAMES if TEXTS[name]]
    folder.mkdir()
    (folder / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = str(tmp_path / "index")
    made = ["index", str(folder / "things.jsonl"), "--model", str(tmp_path / "model"), "--out", index]
    assert main([*made, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 13
    head = read_head(Path(index))
    assert (head.texts.embedder, head.texts.dim) == ("minilm", 384)
    assert main(["search", index, "it purrs softly", "--via", "texts", "--k", "1"]) == 0
    said = capsys.readouterr().out
    assert "texts 1" in said and "a small animal that purrs" in said
    assert main(["search", index, "it purrs softly", "--json", "--k", "1"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    assert [place["space"] for place in hit["spaces"]] == ["items", "texts"]
    assert main(["search", index, "--explain"]) == 0
    assert "13 texts [384] by minilm (standard, weight 0.70, as it comes)" in capsys.readouterr().err
    assert main(["search", index, "a", "--via", "nowhere"]) == 2
    capsys.readouterr()
    assert main([*made, "--texts", "minilmm"]) == 2
    assert "minilm" in capsys.readouterr().err


def test_the_service_answers_without_the_texts_where_their_embedder_is_away(out, bags, monkeypatch):
    from fastapi.testclient import TestClient

    from twofold.serve.app import app

    with TestClient(app(out), base_url="http://localhost") as client:
        found = client.post("/api/v1/search", json={"text": "an animal", "k": 3}).json()
        assert found["notes"] == []
        assert [place["space"] for place in found["hits"][0]["spaces"]] == ["items", "texts"]
        facts = client.get("/api/v1/facts").json()
        assert [(space["name"], space["rows"]) for space in facts["spaces"]] == [("items", 8), ("texts", 13)]

        def away(texts):
            raise EmbedderError("nobody answers")

        monkeypatch.setattr(bags, "embed_queries", away)
        found = client.post("/api/v1/search", json={"text": "an animal", "k": 3}).json()
        assert (len(found["hits"]), len(found["notes"])) == (3, 1)
        assert "nobody answers" in found["notes"][0]
        assert client.post("/api/v1/search", json={"text": "an animal", "via": "texts"}).status_code == 503
