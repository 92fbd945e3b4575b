"""Qdrant as a store: a server or a cluster of them, reached through its official client (extra `qdrant`).

A collection's points carry the item's id and columns as they are (`id`, `meta`), and what filters ask for in a form
that means the same to every server: `has`, a list of words of column, kind and value, which are matched as keywords.
So 1 is 1.0, `True` is not 1 and "1" is no number, and a column may have any name.

Instead of a URL, `qdrant:FOLDER` is the client's local mode, an imitation in Python that compares with every vector. It
serves tests and a first look; it has not the server's speed nor its graph.
"""

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from twofold.errors import StoreError, UsageError
from twofold.retrieve.filters import All, Compares, Has, Rule, Scalar, Some, Where, kind_of
from twofold.retrieve.store import (
    Hit,
    _all_known,
    _check_writable,
    _checked,
    _checked_query,
    _hit,
    _other_encoder,
    _rank,
)

BATCH = 512  # points a request: vectors of 1,024 numbers are 10 MB of JSON then
NAMES = uuid.UUID("0f3a4c06-3d0e-4d5c-8d0f-6f0f6d0a2b11")  # of points; Qdrant's own ids are UUIDs


class QdrantStore:
    """A collection of a Qdrant; the server keeps order between its clients, so there is no lock here.

    `hnsw` has `max_neighbors`, `ef_construction` and `ef_search`, by the names that Chroma gives them.
    """

    def __init__(
        self,
        place: str,
        name: str,
        *,
        fingerprint: str,
        dim: int,
        write: bool = False,
        hnsw: Mapping[str, int] | None = None,
    ):
        self.place, self.fingerprint, self.dim = f"{place}, collection {name}", fingerprint, dim
        self._name, self._write, self._hnsw = name, write, dict(hnsw or {})
        self._served = place.startswith("http")  # local mode has no graph, and warns when one is mentioned
        with contextlib.ExitStack() as undo:
            with self._doing("open"):
                self._client = qdrant_client(place)
                undo.callback(self._client.close)
                if write and not self._client.collection_exists(name):
                    self._create()
                held = (self._client.get_collection(name).config.metadata or {}) if self._exists() else None
            if held is None:
                raise StoreError(f"There is no collection {name} in Qdrant at {place}.")
            wanted = {"fingerprint": fingerprint, "dim": dim}
            if any(held.get(key) != value for key, value in wanted.items()):
                raise _other_encoder(self.place, held, wanted)
            self._close = undo.pop_all().close

    def _exists(self) -> bool:
        return self._client.collection_exists(self._name)

    def _create(self) -> None:
        from qdrant_client import models

        graph = models.HnswConfigDiff(m=self._hnsw.get("max_neighbors"), ef_construct=self._hnsw.get("ef_construction"))
        self._client.create_collection(
            self._name,
            vectors_config=models.VectorParams(size=self.dim, distance=models.Distance.COSINE),
            hnsw_config=graph,
            metadata={"fingerprint": self.fingerprint, "dim": self.dim},
        )
        with contextlib.suppress(ValueError), _quiet():  # local mode needs no index, and says so
            self._client.create_payload_index(self._name, "has", models.PayloadSchemaType.KEYWORD)

    def upsert(self, ids: Sequence[str], vectors: Float[np.ndarray, "n d"], meta: Sequence[Mapping]) -> None:
        _check_writable(self.place, self._write)
        from qdrant_client import models

        vectors, rows = _checked(ids, vectors, meta, self.dim)
        with self._doing("write vectors"):
            for start in range(0, len(ids), BATCH):
                part = zip(ids[start : start + BATCH], vectors[start : start + BATCH], rows[start:], strict=False)
                points = [
                    models.PointStruct(
                        id=_point(name),
                        vector=vector.tolist(),
                        payload={"id": name, "meta": json.dumps(row), "has": sorted(_words(row)), **_numbers(row)},
                    )
                    for name, vector, row in part
                ]
                self._client.upsert(self._name, points=points, wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        _check_writable(self.place, self._write)
        from qdrant_client import models

        with self._doing("delete items"):
            for start in range(0, len(ids), BATCH):
                points = models.PointIdsList(points=[_point(name) for name in ids[start : start + BATCH]])
                self._client.delete(self._name, points_selector=points, wait=True)

    def query(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None = None) -> list[Hit]:
        from qdrant_client import models

        unit, wanted = _checked_query(vector, k, where, self.dim)
        ef = self._hnsw.get("ef_search") if self._served else None
        with self._doing("search"):
            found = self._client.query_points(
                self._name,
                query=unit.tolist(),
                limit=k,
                query_filter=_filter(wanted),
                search_params=models.SearchParams(hnsw_ef=max(ef, k)) if ef else None,
                with_payload=["id", "meta"],
            ).points
        return sorted((_hit(p.payload["id"], p.score, json.loads(p.payload["meta"])) for p in found), key=_rank)

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n d"]:
        found = {point.payload["id"]: point.vector for point in self._retrieved(ids, ["id"], vectors=True)}
        _all_known(ids, found)
        return np.array([found[name] for name in ids], np.float32).reshape(len(ids), self.dim)

    def meta(self, ids: Sequence[str]) -> list[dict[str, Scalar]]:
        found = {point.payload["id"]: point.payload["meta"] for point in self._retrieved(ids, ["id", "meta"])}
        _all_known(ids, found)
        return [dict(sorted(json.loads(found[name]).items())) for name in ids]

    def ids(self) -> list[str]:
        names, after = [], None
        with self._doing("list its ids"):
            while True:
                points, after = self._client.scroll(self._name, limit=4096, offset=after, with_payload=["id"])
                names += [point.payload["id"] for point in points]
                if after is None:
                    return sorted(names)

    def __len__(self) -> int:
        with self._doing("count its items"):
            return self._client.count(self._name, exact=True).count

    @property
    def parameters(self) -> dict[str, Any]:
        return {"space": "cosine", **(self._hnsw if self._served else {"local mode": "every vector"})}

    def close(self) -> None:
        self._close()

    def _retrieved(self, ids: Sequence[str], payload: list[str], *, vectors: bool = False) -> list[Any]:
        unique = list(dict.fromkeys(ids))
        points: list[Any] = []
        with self._doing("read items"):
            for start in range(0, len(unique), BATCH):
                some = [_point(name) for name in unique[start : start + BATCH]]
                points += self._client.retrieve(self._name, some, with_payload=payload, with_vectors=vectors)
        return points

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (StoreError, UsageError):
            raise
        except Exception as error:
            raise StoreError(
                f"Qdrant could not {what} in {self.place}: {type(error).__name__}: {error}. Is it running there, and "
                "does QDRANT_API_KEY hold its key, if it asks for one?"
            ) from error


def qdrant_client(place: str) -> Any:
    """A connection to the server at a URL, whose key may be in QDRANT_API_KEY; or the local mode in a folder."""
    import os

    try:
        import qdrant_client
    except ImportError:
        raise UsageError("Qdrant is reached through its client: pip install 'twofold[qdrant]'.") from None
    if place.startswith(("http://", "https://")):
        return qdrant_client.QdrantClient(url=place, api_key=os.environ.get("QDRANT_API_KEY"), timeout=60)
    return qdrant_client.QdrantClient(path=place)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _point(name: str) -> str:
    return str(uuid.uuid5(NAMES, name))


def _words(row: Mapping[str, Scalar]) -> Iterable[str]:
    for column, value in row.items():
        kind = kind_of(value)
        assert kind is not None  # `_checked` made scalars of them
        yield _word(column, *kind)


def _word(column: str, kind: str, value: Scalar) -> str:
    return json.dumps([column, kind, float(value) if kind == "number" else value])


def _numbers(row: Mapping[str, Scalar]) -> dict[str, float]:
    """The columns of numbers, by names that no server reads as a path."""
    return {_number(column): float(value) for column, value in row.items() if (kind_of(value) or ("",))[0] == "number"}


def _number(column: str) -> str:
    return f"number_{column.encode().hex()}"


def _filter(rule: Rule) -> Any:
    from qdrant_client import models

    if isinstance(rule, All | Some):
        if not rule.rules:
            nothing = models.Filter(must=[models.FieldCondition(key="has", match=models.MatchAny(any=[""]))])
            return models.Filter() if isinstance(rule, All) else nothing
        parts = [_filter(one) for one in rule.rules]
        return models.Filter(must=parts) if isinstance(rule, All) else models.Filter(should=parts)
    if isinstance(rule, Compares):
        bound = models.Range(**{rule.operator[1:]: rule.number})
        return models.Filter(must=[models.FieldCondition(key=_number(rule.column), range=bound)])
    return _has(rule)


def _has(rule: Has) -> Any:
    from qdrant_client import models

    words = sorted(_word(rule.column, *one) for one in rule.values) or [""]  # which no item has
    condition = models.FieldCondition(key="has", match=models.MatchAny(any=words))
    return models.Filter(must_not=[condition]) if rule.no else models.Filter(must=[condition])
