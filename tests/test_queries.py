"""Queries from a file are answered as each alone, and an index says how exact its own answers are."""

import csv
import json

import numpy as np
import pytest
import torch
from torch import nn

from twofold.cli import main
from twofold.data.samples import openmoji
from twofold.errors import DataError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.explain import explain
from twofold.retrieve.index import Index
from twofold.retrieve.queries import answer, read_queries
from twofold.retrieve.store import ExactStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
        bundle = Bundle({"image": image, "text": Tower(text_encoder("minilm"), nn.Linear(384, image.dim))})
    out = tmp_path_factory.mktemp("made") / "index"
    Index.build(openmoji().take(range(0, 4400, 110)), bundle, out)
    return out


@pytest.fixture
def index(folder):
    opened = Index.open(folder)
    yield opened
    opened.close()


def test_queries_of_a_file_are_answered_as_each_alone(index, folder, tmp_path, capsys):
    source = openmoji().take(range(0, 4400, 110))
    group, name = source.meta["group"][4], source.ids[3]
    (tmp_path / "a.png").write_bytes(source.images[5])
    alone = [
        index.search("a red apple", k=4),
        index.search(like=name, minus="dog", k=2),
        index.search("smile", image=source.images[5], weight=0.2, k=4, where={"group": group}),
    ]
    rows = [
        {"text": "a red apple"},
        {"id": "other", "like": [name], "minus": "dog", "k": 2},
        {"text": "smile", "image": "a.png", "weight": 0.2, "where": f"group={group}"},
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "asked.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(column for row in rows for column in row))
        table.writeheader()
        table.writerows([{**row, "like": name} if "like" in row else row for row in rows])
    for kind in ("jsonl", "csv"):
        answers = [answer(index.retriever, query, k=4) for query in read_queries(tmp_path / f"asked.{kind}")]
        assert [one.query for one in answers] == ["1", "other", "3"]
        assert [one.hits for one in answers] == alone

    command = ["search", str(folder), "--queries", str(tmp_path / "asked.csv"), "--k", "4", "--out"]
    assert main([*command, str(tmp_path / "found.csv")]) == 0
    found = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    wanted = [
        (query, str(rank), hit.id, str(hit.score))
        for query, hits in zip(("1", "other", "3"), alone, strict=True)
        for rank, hit in enumerate(hits, 1)
    ]
    assert [(row["query"], row["rank"], row["id"], row["score"]) for row in found] == wanted


def test_a_query_that_fails_is_named_and_the_others_are_answered(folder, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"id": "lost", "like": "nobody"}\n{"id": "fine", "text": "a dog"}\n')
    assert main(["search", str(folder), "--queries", str(asked), "--out", str(tmp_path / "found.jsonl")]) == 0
    lost, fine = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (lost["hits"], len(fine["hits"]), fine["error"]) == ([], 10, None)
    assert "'nobody'" in lost["error"]
    assert "query lost: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("q.csv", "txt\na dog\n", UsageError, "'text'"),
        ("q.csv", "text,k\na dog,many\n", DataError, "query 1: k must be a number, got 'many'"),
        ("q.jsonl", '{"id": "x", "text": "a", "where": "red"}', DataError, "query x: .*column=value"),
        ("q.xlsx", "", UsageError, "xlsx"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_queries(tmp_path / name)
    with pytest.raises(DataError, match="no file"):
        read_queries(tmp_path / "nowhere.csv")


def test_an_explanation_measures_recall_against_every_vector(index, folder, capsys):
    told = explain(index, queries=20)
    assert (told.items, told.dim, told.k, told.asked_with) == (40, index.head.dim, 10, "texts of items")
    assert told.recall == 1  # a graph of forty items finds all
    assert told.parameters["space"] == "cosine"
    assert main(["search", str(folder), "--explain", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["hits"], printed["explained"]["recall"]) == (None, 1)


def test_recall_is_the_share_of_the_nearest_that_a_store_still_has(index):
    ids = index.store.ids()
    kept = ids[::2]
    vectors = index.store.vectors(ids)
    half = ExactStore(fingerprint=index.head.fingerprint, dim=index.head.dim)
    half.upsert(kept, index.store.vectors(kept), [{}] * len(kept))
    chroma, index.store = index.store, half
    told = explain(index, queries=40)
    index.store = chroma
    texts = [meta["text"] for _, meta in index.items()]
    nearest = np.argsort(-(index.bundle.encode(texts) @ vectors.T), axis=1)[:, :10]
    assert told.recall == pytest.approx(np.mean(nearest % 2 == 0))
    assert told.recall < 0.9
