"""Text embedders: what turns texts into vectors for the text-only route, beside a bundle's own space.

minilm              all-MiniLM-L6-v2, installed with twofold: local, 384 numbers, English, the first 256 tokens
hf:/folder          a text encoder of transformers in a folder, with the prompts that sentence-transformers keeps for it
gemini, gemini:1536 Google's Gemini Embedding 2 over the network, 768 numbers unless said (128 to 3072); it costs money

A document and a query are told apart where a model wants that. The fingerprint stands for the model, the size and the
prompts, so vectors that cannot be compared never meet.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from twofold import runtime
from twofold.data.sources import Source, content_key
from twofold.data.vectors import Vectors
from twofold.errors import EmbedderError, UsageError, unknown
from twofold.measure.embed import embed
from twofold.models.encoders import TextEncoder, device_of, fingerprint, inference, moved, text_encoder

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


class TextEmbedder(Protocol):
    """Texts in, vectors out. What `embed_documents` has made is kept by content, so it is never made twice."""

    name: str  # that `text_embedder` opens it by
    dim: int
    fingerprint: str

    def embed_documents(self, texts: Sequence[str], *, progress: Progress | None = None) -> Float[np.ndarray, "n d"]:
        """The vectors of what shall be found; `progress(done, total)` counts what is to compute."""

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The vectors of what is asked."""


def text_embedder(name: str = "minilm", *, say: Say | None = None) -> TextEmbedder:
    """The text embedder of a name (see the top of this file). `say` is told what a request will cost and has cost."""
    if name == "minilm" or name.startswith("hf:"):
        return LocalEmbedder(name)
    if name == "gemini":
        return GeminiEmbedder(say=say)
    if re.fullmatch(r"gemini:\d{1,5}", name):
        return GeminiEmbedder(int(name.removeprefix("gemini:")), say=say)
    raise unknown("text embedder", name, ["minilm", "hf:/folder", "gemini", "gemini:1536"])


class LocalEmbedder:
    """A text encoder of this machine, or one that is in memory already.

    Its vectors are kept in the user's cache, where `align` and `embed` find and leave them, too.
    """

    def __init__(self, name: str = "minilm", encoder: TextEncoder | None = None):
        self.name = name
        self._encoder = encoder or text_encoder(name).to(runtime.device())
        self.dim = self._encoder.dim
        self._query, self._document = _prompts(name)
        mark = fingerprint(self._encoder)
        self.fingerprint = _joint(mark, self._query, self._document) if self._query or self._document else mark

    def embed_documents(self, texts: Sequence[str], *, progress: Progress | None = None) -> Float[np.ndarray, "n d"]:
        asked = [self._document + text for text in texts]
        source = Source("texts", [str(number) for number in range(len(asked))], texts=[[text] for text in asked])
        return embed(self._encoder, source, "text", progress=progress, quiet=True).matrix

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        with inference(self._encoder):
            inputs = self._encoder.batch([self._query + text for text in texts])
            return self._encoder(moved(inputs, device_of(self._encoder))).float().cpu().numpy()


def _prompts(name: str) -> tuple[str, str]:
    """What goes before a query and before a document, as sentence-transformers keeps it in a model's folder."""
    file = Path(name.removeprefix("hf:")).expanduser() / "config_sentence_transformers.json"
    kept = json.loads(file.read_text("utf-8")).get("prompts") or {} if name != "minilm" and file.is_file() else {}
    return kept.get("query") or "", kept.get("document") or kept.get("passage") or ""


def _joint(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


# -- Gemini -----------------------------------------------------------------------------------------------------------

MODEL = "gemini-embedding-2"
QUERY = "task: search result | query: {text}"  # this model takes its task in the text, not as a task_type
DOCUMENT = "title: none | text: {text}"
PRICE = 0.20  # US dollars for a million tokens of text, list price of 2026; Google's page is what counts
REQUEST = 100  # texts of one request, at most; more are refused
CHARACTERS = 1_000_000  # of one request: it may have 4 MiB
ATTEMPTS = 8
LONGEST = 120.0  # seconds between two of them
WAITS = {408, 429, 500, 502, 503, 504}  # try again; all other refusals are final


class GeminiEmbedder:
    """Google's Gemini Embedding 2 by its official client (`pip install twofold[gemini]`), the key in GEMINI_API_KEY.

    Texts of documents and of queries are sent to Google. Every answer is written to the user's cache as it comes, so a
    text is paid for once, whatever is interrupted and however many indexes hold it. Busy servers and rate limits are
    waited for as long as they ask, or twice as long each time; EmbedderError where they stay so, or the key is refused.
    """

    def __init__(self, dim: int = 768, *, say: Say | None = None, sleep: Callable[[float], None] = time.sleep):
        if not 128 <= dim <= 3072:
            raise UsageError(f"{MODEL} gives 128 to 3072 numbers (768, 1536 and 3072 are advised); got {dim}.")
        self.name, self.dim = f"gemini:{dim}", dim
        self.fingerprint = _joint(MODEL, str(dim), QUERY, DOCUMENT)
        self.tokens = 0  # sent so far; estimated where the answer does not say
        self._say, self._sleep = say or (lambda _: None), sleep
        self._client: Any = None

    @property
    def cost(self) -> float:
        """US dollars so far, at `PRICE`."""
        return self.tokens * PRICE / 1e6

    def embed_documents(self, texts: Sequence[str], *, progress: Progress | None = None) -> Float[np.ndarray, "n d"]:
        kept = Vectors(runtime.cache_dir() / "vectors", self.fingerprint, self.dim)
        asked = [DOCUMENT.format(text=text) for text in texts]
        keys = [content_key(text) for text in asked]
        todo = kept.missing(keys)
        if todo:
            self._connected()  # a key that is missing is told before what it costs
            tokens = sum(_tokens(asked[at]) for at in todo)
            self._say(
                f"{len(todo):,} texts go to Google ({MODEL}), {len(set(keys)) - len(todo):,} are known: about "
                f"{tokens:,} tokens, {_dollars(tokens)} at ${PRICE:.2f} a million"
            )
        before, done = self.tokens, 0
        try:
            for part in _requests([asked[at] for at in todo]):
                some = todo[part]
                kept.append([keys[at] for at in some], self._embedded([asked[at] for at in some]))
                done += len(some)
                if progress:
                    progress(done, len(todo))
        finally:
            if done:
                spent = self.tokens - before
                self._say(f"{done:,} of {len(todo):,} texts came back: {spent:,} tokens, {_dollars(spent)}")
        return kept.get(keys)

    def embed_queries(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        asked = [QUERY.format(text=text) for text in texts]
        parts = [self._embedded(asked[part]) for part in _requests(asked)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _embedded(self, texts: list[str]) -> Float[np.ndarray, "n d"]:
        """One request: a unit vector for each text."""
        from google.genai import types

        # A plain list of strings would come back as one vector: each is a content of its own.
        contents = [types.Content(parts=[types.Part(text=text)]) for text in texts]
        config = types.EmbedContentConfig(output_dimensionality=self.dim)
        answer = self._patiently(
            lambda client: client.models.embed_content(model=MODEL, contents=contents, config=config)
        )
        vectors = [one.values or [] for one in answer.embeddings or []]
        if [len(one) for one in vectors] != [self.dim] * len(texts):
            sizes = sorted({len(one) for one in vectors})
            raise EmbedderError(
                f"Gemini sent {len(vectors)} vectors of {sizes} numbers for {len(texts)} texts; expected one of "
                f"{self.dim} each. Nothing of this answer is kept. Is the installed google-genai very old or new?"
            )
        z = np.array(vectors, np.float32)
        lengths = np.linalg.norm(z, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise EmbedderError("Gemini sent a vector without direction (zero or not finite); nothing of it is kept.")
        usage = answer.usage_metadata
        self.tokens += (usage and usage.prompt_token_count) or sum(map(_tokens, texts))
        return z / lengths

    def _patiently(self, ask: Callable[[Any], Any]) -> Any:
        """The answer, after waiting where the server says that it is busy or that this is too much at once."""
        client = self._connected()
        from google.genai import errors

        for attempt in range(1, ATTEMPTS + 1):
            wait = min(2.0 ** (attempt - 1), LONGEST)
            try:
                return ask(client)
            except errors.APIError as error:
                said = f"{error.code} {error.status or ''}: {error.message or 'no reason given'}"
                if error.code not in WAITS:
                    raise EmbedderError(f"Gemini refuses: {self._without_key(said)} {_advice(error)}") from None
                wait = _asked_to_wait(error) or wait
            except Exception as error:
                if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
                    raise
                said = f"{type(error).__name__} {error}"
            said = self._without_key(said)
            if attempt == ATTEMPTS or wait > LONGEST:
                tried = f"after {attempt} attempts" if attempt > 1 else f"and asks for {wait:.0f} s of patience"
                raise EmbedderError(
                    f"Gemini does not answer, {tried} ({said}). What came back is kept; the same command goes on from "
                    "there."
                ) from None
            self._say(f"Gemini is busy ({said}); again in {wait:.0f} s")
            self._sleep(wait)

    def _connected(self) -> Any:
        key = os.environ.get("GEMINI_API_KEY", "").strip()
        if not key:
            raise EmbedderError(
                "Gemini needs a key in the environment variable GEMINI_API_KEY (https://aistudio.google.com/apikey). "
                "The text embedder minilm needs none."
            )
        if self._client is None:
            try:
                from google import genai
                from google.genai import types
            except ImportError:
                raise EmbedderError("The client of Gemini is not installed: pip install 'twofold[gemini]'.") from None
            # One attempt: waiting is done here, where Retry-After is heeded.
            options = types.HttpOptions(timeout=60_000, retry_options=types.HttpRetryOptions(attempts=1))
            self._client = genai.Client(api_key=key, vertexai=False, http_options=options)
        return self._client

    def _without_key(self, said: str) -> str:
        key = os.environ.get("GEMINI_API_KEY", "").strip()
        return said.replace(key, "(the key)") if key else said


def _requests(texts: Sequence[str]) -> list[slice]:
    """Neighbouring texts that go into one request."""
    parts, start, size = list[slice](), 0, 0
    for at, text in enumerate(texts):
        if at > start and (at - start == REQUEST or size + len(text) > CHARACTERS):
            parts.append(slice(start, at))
            start, size = at, 0
        size += len(text)
    return [*parts, slice(start, len(texts))] if texts else []


def _tokens(text: str) -> int:
    """About how many tokens a text is: four characters each, Google's rule of thumb."""
    return len(text) // 4 + 1


def _dollars(tokens: int) -> str:
    return f"${tokens * PRICE / 1e6:.4f}"


def _asked_to_wait(error: Any) -> float | None:
    """The seconds that the server asks to wait for: Retry-After, else RetryInfo in the body."""
    headers = getattr(error.response, "headers", None) or {}
    for said in (headers.get("retry-after"), *_retry_delays(error.details)):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*s?\s*", said or "")
        if found:
            return float(found[1])
    return None


def _retry_delays(details: Any) -> list[str]:
    listed = ((details.get("error") or {}).get("details") or []) if isinstance(details, dict) else []
    return [one["retryDelay"] for one in listed if isinstance(one, dict) and "retryDelay" in one]


def _advice(error: Any) -> str:
    if error.code in (401, 403) or "API key" in (error.message or ""):
        return "Check the key in GEMINI_API_KEY and what it is allowed to do."
    return "The request was not repeated; what came back before is kept."
