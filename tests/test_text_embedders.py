"""Text embedders: the local one, and Gemini's against a server on this machine that speaks its REST protocol."""

import http.server
import json
import threading
from collections.abc import Callable

import numpy as np
import pytest

from twofold import runtime
from twofold.data.vectors import Vectors
from twofold.errors import EmbedderError, UsageError
from twofold.models.encoders import text_encoder
from twofold.retrieve.text_embedders import MODEL, GeminiEmbedder, LocalEmbedder, text_embedder

KEY = "a-very-secret-key"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))


class Google(http.server.ThreadingHTTPServer):
    """Answers batchEmbedContents as Google does; `troubles` are what the next requests meet instead."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[dict] = []
        self.paths: list[str] = []
        self.keys: list[str] = []
        self.troubles: list[tuple[int, dict, dict]] = []
        self.reply: Callable[[dict], dict] = self.embeddings

    def embeddings(self, body: dict) -> dict:
        rows = [
            self.vector(one["content"]["parts"][0]["text"], one["outputDimensionality"]) for one in body["requests"]
        ]
        return {"embeddings": [{"values": row} for row in rows], "usageMetadata": {"promptTokenCount": 7 * len(rows)}}

    @staticmethod
    def vector(text: str, dim: int) -> list[float]:
        return np.random.default_rng(list(text[-40:].encode())).normal(size=dim).tolist()

    @property
    def texts(self) -> list[str]:
        return [part["text"] for body in self.asked for one in body["requests"] for part in one["content"]["parts"]]


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Google

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.paths.append(self.path)
        self.server.keys.append(self.headers["x-goog-api-key"])
        code, headers, said = self.server.troubles.pop(0) if self.server.troubles else (200, {}, None)
        if said is None and len(body["requests"]) > 100:
            code, said = 400, error(400, "at most 100 requests can be in one batch", "INVALID_ARGUMENT")
        content = json.dumps(self.server.reply(body) if said is None else said).encode()
        self.send_response(code)
        for name, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def error(code: int, message: str, status: str, **details) -> dict:
    return {"error": {"code": code, "message": message, "status": status, "details": [details] if details else []}}


@pytest.fixture
def google(monkeypatch):
    with Google() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GOOGLE_API_KEY", "another-one")  # which the client would take by itself
        yield server
        server.shutdown()


class Patience(list):
    """What was waited for, in seconds, without waiting; and what was said."""

    def __init__(self):
        self.said: list[str] = []

    def embedder(self, dim: int = 128) -> GeminiEmbedder:
        return GeminiEmbedder(dim, say=self.said.append, sleep=self.append)


def test_each_text_is_a_content_of_its_own_with_its_task_in_the_text(google):
    embedder = Patience().embedder()
    found = embedder.embed_documents(["a dog", "a boat"])
    asked = embedder.embed_queries(["who barks?"])
    assert google.texts == [
        "title: none | text: a dog",
        "title: none | text: a boat",
        "task: search result | query: who barks?",
    ]
    for body in google.asked:
        for one in body["requests"]:
            assert one.keys() == {"content", "model", "outputDimensionality"}  # no taskType
            assert (one["model"], one["outputDimensionality"]) == (f"models/{MODEL}", 128)
    assert all(path.endswith(f"/models/{MODEL}:batchEmbedContents") for path in google.paths)
    assert set(google.keys) == {KEY}
    expected = np.array([google.vector(text, 128) for text in google.texts])
    np.testing.assert_allclose(
        np.concatenate([found, asked]), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6
    )
    assert embedder.tokens == 21 and embedder.cost == pytest.approx(21 * 0.2 / 1e6)


def test_many_texts_go_in_hundreds_and_none_is_paid_twice(google):
    texts = [f"text {n}" for n in range(250)]
    first, patience = Patience().embedder().embed_documents(texts[:150]), Patience()
    assert [len(body["requests"]) for body in google.asked] == [100, 50]
    told: list[tuple[int, int]] = []
    again = patience.embedder().embed_documents(texts + texts[:5], progress=lambda *at: told.append(at))
    assert [len(body["requests"]) for body in google.asked] == [100, 50, 100]
    np.testing.assert_array_equal(again[:150], first)
    np.testing.assert_array_equal(again[250:], first[:5])
    assert (told, len(set(google.texts))) == ([(100, 100)], 250)
    before, after = patience.said
    assert "100 texts go to Google" in before and "150 are known" in before and "$0.20 a million" in before
    assert "100 of 100 texts came back: 700 tokens, $0.0001" in after


def test_what_came_back_before_an_interruption_is_kept(google):
    texts = [f"text {n}" for n in range(250)]

    def stop(done, total):
        if done == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Patience().embedder().embed_documents(texts, progress=stop)
    google.asked.clear()
    Patience().embedder().embed_documents(texts)
    assert sorted(google.texts) == sorted(f"title: none | text: {text}" for text in texts[200:])


def test_long_texts_make_small_requests(google):
    Patience().embedder().embed_documents([letter * 400_000 for letter in "abcde"])
    assert [len(body["requests"]) for body in google.asked] == [2, 2, 1]


def test_a_busy_server_is_waited_for_as_it_asks(google):
    google.troubles = [
        (429, {"Retry-After": "7"}, error(429, "quota", "RESOURCE_EXHAUSTED")),
        (429, {}, error(429, "quota", "RESOURCE_EXHAUSTED", **{"@type": "RetryInfo", "retryDelay": "2.5s"})),
        (503, {}, error(503, "overloaded", "UNAVAILABLE")),
        (500, {}, error(500, "internal", "INTERNAL")),
    ]
    patience = Patience()
    assert patience.embedder().embed_queries(["a"]).shape == (1, 128)
    assert list(patience) == [7, 2.5, 4, 8]
    assert sum("busy" in said for said in patience.said) == 4


def test_patience_ends(google):
    google.troubles = [(503, {}, error(503, "overloaded", "UNAVAILABLE"))] * 20
    patience = Patience()
    with pytest.raises(EmbedderError, match=r"after 8 attempts .*503.*goes on from there"):
        patience.embedder().embed_queries(["a"])
    assert list(patience) == [1, 2, 4, 8, 16, 32, 64]
    google.troubles = [(429, {"Retry-After": "86400"}, error(429, "per day", "RESOURCE_EXHAUSTED"))]
    with pytest.raises(EmbedderError, match="asks for 86400 s of patience"):
        patience.embedder().embed_queries(["a"])


def test_a_refused_key_is_neither_tried_again_nor_shown(google):
    google.troubles = [(400, {}, error(400, f"API key {KEY} not valid.", "INVALID_ARGUMENT"))]
    patience = Patience()
    with pytest.raises(EmbedderError, match="Check the key in GEMINI_API_KEY") as caught:
        patience.embedder().embed_documents(["a"])
    assert KEY not in str(caught.value) + "".join(patience.said) and len(google.asked) == 1
    assert caught.value.__cause__ is None and not list(patience)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda body: {"embeddings": [{"values": [1.0] * 128}]}, "1 vectors .* for 2 texts"),
        (lambda body: {"embeddings": [{"values": [1.0] * 64}] * 2}, r"\[64\] numbers for 2 texts; expected one of 128"),
        (lambda body: {"embeddings": [{"values": [0.0] * 128}] * 2}, "without direction"),
        (lambda body: {}, "0 vectors"),
    ],
)
def test_an_answer_of_another_shape_is_not_kept(google, reply, said):
    google.reply = reply
    embedder = Patience().embedder()
    with pytest.raises(EmbedderError, match=said):
        embedder.embed_documents(["a", "b"])
    assert len(Vectors(runtime.cache_dir() / "vectors", embedder.fingerprint, 128)) == 0


def test_nobody_there_and_no_key_are_said(google, monkeypatch):
    google.server_close()
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", "http://127.0.0.1:9")
    patience = Patience()
    with pytest.raises(EmbedderError, match=r"does not answer, after 8 attempts .*Connect"):
        patience.embedder().embed_queries(["a"])
    monkeypatch.setenv("GEMINI_API_KEY", " ")
    with pytest.raises(EmbedderError, match="needs a key in the environment variable GEMINI_API_KEY"):
        patience.embedder().embed_queries(["a"])


def test_model_size_and_prompts_are_in_the_fingerprint(monkeypatch):
    here = GeminiEmbedder(768).fingerprint
    assert text_embedder("gemini").fingerprint == here != text_embedder("gemini:1536").fingerprint
    for name in ("MODEL", "QUERY", "DOCUMENT"):
        with monkeypatch.context() as patch:
            patch.setattr(f"twofold.retrieve.text_embedders.{name}", "another {text}")
            assert GeminiEmbedder(768).fingerprint != here
    for name in ("gemini:64", "gemini:4000", "gemini:many", "gemeni"):
        with pytest.raises(UsageError):
            text_embedder(name)


def test_the_local_embedder_gives_documents_and_queries_the_vectors_of_its_encoder():
    encoder = text_encoder("minilm").eval()
    embedder = LocalEmbedder("minilm", encoder)
    texts = ["a dog barks", "the sea", "a dog barks"]
    documents, queries = embedder.embed_documents(texts), embedder.embed_queries(texts)
    np.testing.assert_allclose(documents, queries, atol=1e-5)
    kept = Vectors(runtime.cache_dir() / "vectors", embedder.fingerprint, 384)
    assert len(kept) == 2
    cosines = documents @ embedder.embed_queries(["a puppy"])[0] / np.linalg.norm(documents, axis=1)
    assert cosines[0] > cosines[1]


def test_prompts_of_a_folder_go_before_queries_and_documents(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    prompts = {"query": "task: search result | query: ", "document": "title: none | text: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    encoder = text_encoder("minilm").eval()
    prompted, plain = LocalEmbedder(f"hf:{folder}", encoder), LocalEmbedder("minilm", encoder)
    np.testing.assert_allclose(
        prompted.embed_documents(["a dog"]), plain.embed_queries(["title: none | text: a dog"]), atol=1e-5
    )
    np.testing.assert_allclose(
        prompted.embed_queries(["a dog"]), plain.embed_queries(["task: search result | query: a dog"]), atol=1e-5
    )
    assert prompted.fingerprint != plain.fingerprint
