"""The service answers as the retriever does, shows nothing that it should not, and no request brings it down."""

import io
import json
import logging
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from twofold.data.sources import Source, open_source
from twofold.errors import DataError, StoreError, UsageError
from twofold.measure.calibration import Calibration, direction
from twofold.models.bundle import Bundle, annotate
from twofold.models.encoders import image_encoder
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.index import Index
from twofold.serve import service as service_module
from twofold.serve.app import app
from twofold.serve.client import Client
from twofold.serve.keys import Keys
from twofold.serve.log import JsonLines


def paint(path: Path, seed: int) -> None:
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(squares).resize((640, 480), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x010F] = "the camera of Ann"
    picture.save(path, exif=exif)


@pytest.fixture(scope="module")
def home(tmp_path_factory, untrained) -> Path:
    """Twelve photographs in two folders, one of them by a link to a place outside, and their index."""
    root = tmp_path_factory.mktemp("home")
    os.environ["TWOFOLD_CACHE"] = str(root / "cache")
    for n in range(12):
        paint(root / "photos" / ("red" if n % 2 else "blue") / f"{n:02}.jpg", n)
    paint(root / "elsewhere" / "secret.jpg", 99)
    (root / "photos" / "red" / "link.jpg").symlink_to(root / "elsewhere" / "secret.jpg")
    Index.build(open_source(root / "photos"), untrained, root / "index")
    yield root
    del os.environ["TWOFOLD_CACHE"]


@pytest.fixture(scope="module")
def client(home):
    with TestClient(app(home / "index"), base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def opened(home):
    return Index.open(home / "index")


@pytest.fixture(scope="module")
def url(home, serving):
    with serving(home / "index") as address:
        yield address


def answered(response) -> list[tuple[str, float]]:
    assert response.status_code == 200, response.text
    return [(hit["id"], hit["score"]) for hit in response.json()["hits"]]


def search(client, **wanted):
    return client.post("/api/v1/search", json=wanted)


def with_picture(client, content: bytes, **wanted):
    return client.post("/api/v1/search/picture", files={"picture": ("x", content)}, data={"wanted": json.dumps(wanted)})


# -- searching


def test_words_items_and_filters_find_what_the_retriever_finds(client, opened):
    for wanted in (
        {"text": "a red square"},
        {"text": "a red square", "minus": "blue", "k": 5},
        {"like": ["red/03.jpg", "red/05.jpg"], "unlike": ["blue/02.jpg"]},
        {"text": "sky", "like": ["red/03.jpg"], "weight": 0.2, "spread": 0.4},
    ):
        expected = [(hit.id, hit.score) for hit in opened.search(**{"k": 24} | wanted)]
        assert answered(search(client, **wanted)) == expected
    assert {name for name, _ in answered(search(client, text="x", where=["label=red"]))} == {
        hit.id for hit in opened.search("x", k=20, where={"label": "red"})
    }


def test_a_picture_finds_itself_first(client, home):
    content = (home / "photos" / "red" / "05.jpg").read_bytes()
    assert answered(with_picture(client, content, k=1)) == [("red/05.jpg", pytest.approx(1, abs=1e-4))]


def test_pages_follow_each_other(client):
    whole = answered(search(client, text="square", k=13))
    first = search(client, text="square", k=5)
    rest = search(client, text="square", k=8, offset=5)
    assert answered(first) + answered(rest) == whole
    assert first.json()["more"] and not rest.json()["more"]


def test_facts_say_what_can_be_asked(client):
    facts = client.get("/api/v1/facts").json()
    assert (facts["items"], facts["asks"], facts["writes"]) == (13, ["image", "text"], True)
    assert facts["columns"] == {"label": [["red", 7], ["blue", 6]]}


def test_no_answer_holds_a_path_of_the_server(client, home, untrained, tmp_path):
    answers = [
        search(client, like=["red/03.jpg"], k=20),
        client.get("/api/v1/item", params={"id": "red/05.jpg"}),
        client.get("/api/v1/item", params={"id": "red/link.jpg"}),
        client.post("/api/v1/items", json={}),
        client.get("/api/v1/corrected"),
    ]
    assert not [answer.text for answer in answers if str(home) in answer.text]
    assert answers[1].json()["meta"] == {"image": "red/05.jpg", "label": "red"}
    assert answers[2].json()["meta"] == {"label": "red"}, "it leads out of the folder that was indexed"
    picture = home / "photos" / "red" / "05.jpg"
    meta = {"said": ["/shrug"], "from": [str(home / "elsewhere" / "secret.jpg")], "odd": ["/\0"]}
    Index.build(Source(str(home / "photos"), ["a"], images=[picture], meta=meta), untrained, tmp_path / "index")
    with TestClient(app(tmp_path / "index"), base_url="http://localhost") as other:
        told = other.get("/api/v1/item", params={"id": "a"}).json()["meta"]
    assert told == {"image": "red/05.jpg", "said": "/shrug", "odd": "/\0"}


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"url": "/api/v1/search", "content": '{"text": "x"}'}, 422, "Content-Type: application/json"),
        ({"url": "/api/v1/search", "content": "{bad", "headers": {"Content-Type": "application/json"}}, 422, "quotes"),
        ({"url": "/api/v1/searches"}, 404, "/openapi.json"),
        ({"url": "/api/v1/search", "method": "DELETE"}, 405, "/openapi.json"),
    ],
)
def test_a_request_that_is_none_is_told_what_to_send(client, request_, status, said):
    response = client.request(**{"method": "POST"} | request_)
    assert response.status_code == status and said in response.json()["error"]
    assert response.json()["request"] == response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("wanted", "status", "said"),
    [
        ({}, 422, "nothing to search for"),
        ({"text": "  "}, 422, "empty"),
        ({"text": "x", "k": 0}, 422, "greater than or equal to 1"),
        ({"text": "x", "colour": 1}, 422, "Extra inputs"),
        ({"text": "x", "where": ["label"]}, 422, "column=value"),
        ({"like": ["no such item"]}, 404, "no item 'no such item'"),
        ({"text": "x" * 10_001}, 422, "10000"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_reason(client, wanted, status, said):
    response = search(client, **wanted)
    assert response.status_code == status
    assert said in response.json()["error"]
    assert response.json()["request"] == response.headers["x-request-id"]


# -- hostile pictures


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="svg"),
        pytest.param(b"<script>alert(1)</script>", id="html"),
        pytest.param(jpeg()[:200], id="truncated"),
        pytest.param(png_header(60_000, 60_000), id="bomb"),
        pytest.param(png_header(10_000, 10_001), id="100 megapixels"),
        pytest.param(png_header(8_000, 8_000), id="64 megapixels"),
        pytest.param(b"%PDF-1.7 " + jpeg(), id="polyglot"),
        pytest.param(bytes(range(256)) * 40, id="noise"),
    ],
)
def test_a_hostile_picture_is_refused(client, content):
    response = with_picture(client, content)
    assert response.status_code == 422, response.text
    assert "picture" in response.json()["error"]


def test_a_request_that_is_too_large_is_refused_before_it_is_read(home):
    with TestClient(app(home / "index", upload=10_000), base_url="http://localhost") as small:
        assert with_picture(small, b"x" * 20_000).status_code == 413

        def endless():  # without a content-length
            for _ in range(1000):
                yield b"x" * 1000

        response = small.post("/api/v1/search", content=endless(), headers={"content-type": "application/json"})
        assert response.status_code == 413


def test_many_requests_at_once_are_all_answered(url):
    found: list = []

    def ask() -> None:
        with Client(url) as mine:
            for _ in range(5):
                found.append([hit.id for hit in mine.search("a red square", k=3)])

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(one == found[0] for one in found)


# -- pictures


def test_pictures_are_shown_small_and_large_without_what_the_file_says(client):
    small, large = (client.get("/api/v1/picture", params={"id": "red/05.jpg", "large": big}) for big in (False, True))
    assert Image.open(io.BytesIO(small.content)).size == (320, 240)
    assert Image.open(io.BytesIO(large.content)).size == (640, 480)
    for response in (small, large):
        assert response.headers["content-type"] == "image/jpeg"
        assert b"Ann" not in response.content
    assert client.get("/api/v1/picture", params={"id": "red/05.jpg"}).content == small.content  # kept, and found again


def test_nothing_outside_the_indexed_folder_is_shown(client, home):
    assert search(client, like=["red/link.jpg"]).status_code == 200  # it was indexed
    assert client.get("/api/v1/picture", params={"id": "red/link.jpg"}).status_code == 404
    for id in ("../elsewhere/secret.jpg", "/etc/passwd", str(home / "elsewhere" / "secret.jpg"), "%2e%2e/secret"):
        assert client.get("/api/v1/picture", params={"id": id}).status_code == 404
    for path in ("/../app.py", "/web/../app.py", "/style.css/../../app.py", "//etc/passwd"):
        assert client.get(path).status_code == 404
    with TestClient(app(home / "index", roots=[home]), base_url="http://localhost") as wider:
        assert wider.get("/api/v1/picture", params={"id": "red/link.jpg"}).status_code == 200


def test_a_picture_that_changed_is_shown_anew(home, client):
    file = home / "photos" / "blue" / "00.jpg"
    before = client.get("/api/v1/picture", params={"id": "blue/00.jpg"}).content
    paint(file, 1234)
    later = file.stat().st_mtime + 5
    os.utime(file, (later, later))
    assert client.get("/api/v1/picture", params={"id": "blue/00.jpg"}).content != before


# -- who may do what


def test_keys_open_what_their_scope_says(home, tmp_path):
    keys = Keys(tmp_path / "keys.json")
    reader, writer = keys.add("ann", "read"), keys.add("ben", "write")
    said = {"id": "red/01.jpg", "relevant": True, "text": "x"}
    with TestClient(app(home / "index", keys=Keys(tmp_path / "keys.json")), base_url="http://localhost") as client:
        for headers, search_status, feedback_status in (
            ({}, 401, 401),
            ({"Authorization": "Bearer wrong"}, 401, 401),
            ({"Authorization": f"Bearer {reader}"}, 200, 403),
            ({"Authorization": f"Bearer {writer}"}, 200, 204),
        ):
            assert client.post("/api/v1/search", json={"text": "x"}, headers=headers).status_code == search_status
            assert client.post("/api/v1/feedback", json=said, headers=headers).status_code == feedback_status
            assert client.get("/metrics", headers=headers).status_code == search_status
        assert client.get("/").status_code == client.get("/health").status_code == 200
        assert client.post("/api/v1/session", headers={"Authorization": "Bearer wrong"}).status_code == 401
        cookie = client.post("/api/v1/session", headers={"Authorization": f"Bearer {reader}"}).headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        assert client.get("/api/v1/facts").json()["writes"] is False  # by the cookie


def test_the_file_of_keys_holds_no_key(tmp_path):
    file = tmp_path / "keys.json"
    key = Keys(file).add("ann", "read")
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    with pytest.raises(UsageError, match="named 'ann'"):
        Keys(file).add("ann", "write")
    file.write_text('[{"name": "x", "scope": "all", "hash": "0"}]')
    with pytest.raises(DataError, match="no file of keys"):
        Keys(file)


def test_a_page_elsewhere_cannot_call_it_by_a_name_of_its_own(client):
    refused = client.get("/api/v1/facts", headers={"Host": "evil.example"})
    assert refused.status_code == 400 and "--hosts" in refused.json()["error"]
    for name in ("localhost:8000", "LOCALHOST", "[::1]:8000", "127.0.0.1"):
        assert client.get("/api/v1/facts", headers={"Host": name}).status_code == 200
    for name in ("localhost.evil.example", "evil.example#localhost", ""):
        assert client.get("/api/v1/facts", headers={"Host": name}).status_code == 400
    assert client.get("/health", headers={"Host": "10.1.2.3:8000"}).status_code == 200  # probes ask by address
    response = client.options(
        "/api/v1/search", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert "access-control-allow-origin" not in response.headers


# -- feedback


def test_feedback_is_on_the_disk_and_the_last_word_counts(client, home):
    Feedback(home / "index").path.unlink(missing_ok=True)
    for id, relevant in (("red/01.jpg", True), ("red/03.jpg", True), ("blue/02.jpg", False), ("red/03.jpg", False)):
        response = client.post("/api/v1/feedback", json={"id": id, "relevant": relevant, "text": "a red one"})
        assert response.status_code == 204
    (judged,) = Feedback(home / "index").judged()
    assert (judged.text, judged.positives, judged.negatives) == (
        "a red one",
        ["red/01.jpg"],
        ["blue/02.jpg", "red/03.jpg"],
    )
    assert Feedback(home / "index").triplets() == [
        ("a red one", "red/01.jpg", "blue/02.jpg"),
        ("a red one", "red/01.jpg", "red/03.jpg"),
    ]
    assert client.post("/api/v1/feedback", json={"id": "nobody", "relevant": True}).status_code == 404


def test_a_click_that_was_cut_short_costs_that_click_only(tmp_path):
    feedback = Feedback(tmp_path)
    feedback.add(Click("a", (), "1", True))
    with open(feedback.path, "ab") as file:
        file.write(b'{"text": "b", "like"')
    feedback.add(Click("c", ("7",), "2", False))
    assert [(click.text, click.like, click.id, click.relevant) for click in feedback] == [
        ("a", (), "1", True),
        ("c", ("7",), "2", False),
    ]


# -- watching over it


def test_every_request_is_counted_and_logged_with_its_id(client, caplog):
    with caplog.at_level(logging.INFO, "twofold.serve"):
        response = search(client, text="x")
    line = json.loads(JsonLines().format(caplog.records[-1]))
    assert line["level"] == "info" and line["time"][:2] == "20"
    assert (line["request"], line["status"], line["path"]) == (response.headers["x-request-id"], 200, "/api/v1/search")
    assert 'twofold_request_seconds_count{route="/api/v1/search",status="200"}' in client.get("/metrics").text
    assert "twofold_items 13.0" in client.get("/metrics").text
    assert client.get("/ready").text == "ready\n"


def test_a_failure_is_one_line_of_the_log_with_its_traceback(home, caplog, monkeypatch):
    with TestClient(app(home / "index"), base_url="http://localhost", raise_server_exceptions=False) as client:
        monkeypatch.setattr(client.app.state.service, "item", lambda _: 1 // 0)
        response = client.get("/api/v1/item", params={"id": "x"})
    assert response.status_code == 500 and "log" in response.json()["error"]
    (line,) = (json.loads(JsonLines().format(one)) for one in caplog.records if one.levelname == "ERROR")
    assert line["request"] == response.json()["request"] and "ZeroDivisionError" in line["traceback"]


def test_a_new_build_is_served_without_a_restart(home, tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "LOOK", 0.0)
    for n in range(3):
        paint(tmp_path / "photos" / f"{n}.jpg", n)
    bundle = Bundle.load(home / "index" / "model")
    Index.build(open_source(tmp_path / "photos"), bundle, tmp_path / "index")
    with TestClient(app(tmp_path / "index"), base_url="http://localhost") as client:
        assert len(answered(search(client, text="x"))) == 3
        paint(tmp_path / "photos" / "3.jpg", 3)
        Index.build(open_source(tmp_path / "photos"), bundle, tmp_path / "index")
        assert len(answered(search(client, text="x"))) == 4
        assert search(client, text="x").json()["hits"][0]["probability"] is None
        calibration = Calibration("platt", gallery=4, scale=1.0)
        annotate(tmp_path / "index" / "model", "calibration", direction("text", "image"), calibration.record())
        assert search(client, text="x").json()["hits"][0]["probability"] is not None
        with torch.random.fork_rng():
            other = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
        other.save(tmp_path / "index" / "model")  # as a build leaves it for a moment
        assert len(answered(search(client, text="x"))) == 4
        Index.build(open_source(tmp_path / "photos"), other, tmp_path / "index", existing="replace")
        assert client.get("/api/v1/facts").json()["asks"] == ["image"]


def test_the_map_has_a_place_for_every_item(client):
    plane = client.get("/api/v1/map").json()
    assert len(plane["ids"]) == len(plane["x"]) == len(plane["y"]) == 13
    assert all(0 <= value <= 1 for value in plane["x"] + plane["y"])
    assert client.get("/api/v1/map").json() == plane


def test_the_page_and_its_parts_are_there_and_ask_for_nothing_elsewhere(client):
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "javascript"),
        ("/map.js", "javascript"),
        ("/style.css", "text/css"),
    ):
        response = client.get(path)
        assert response.status_code == 200 and kind in response.headers["content-type"]
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "https://" not in response.text


# -- from Python


def test_the_client_is_a_retriever(url, opened, home):
    with Client(url) as client:
        own = [hit._replace(meta={**hit.meta, "image": hit.id}) for hit in opened.search("a red square", k=4)]
        assert client.search("a red square", k=4) == own  # with paths from the source's root
        assert client.search(image=home / "photos" / "red" / "05.jpg", k=1)[0].id == "red/05.jpg"
        assert client.item("red/05.jpg")["label"] == "red"
        client.judge("red/05.jpg", True, text="five")
        with pytest.raises(UsageError, match="nothing to search for"):
            client.search()
        with pytest.raises(StoreError, match="no item"):
            client.item("nobody")
    with pytest.raises(StoreError, match="Is `twofold serve` running there"), Client("http://127.0.0.1:9") as nobody:
        nobody.facts()
