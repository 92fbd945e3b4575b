"""A service from Python: what `Retriever` does, over HTTP."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from twofold.errors import StoreError, UsageError
from twofold.retrieve.store import Hit, Place, Via


class Client:
    """A connection to `twofold serve`; close it, or use it in a `with`.

    Errors are those of the service: UsageError for what it refuses, StoreError for what it cannot do at the moment.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, seconds: float = 30.0):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=seconds)
        self.url = url

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def search(
        self,
        text: str | None = None,
        *,
        image: Path | bytes | None = None,
        like: str | Sequence[str] = (),
        unlike: str | Sequence[str] = (),
        minus: str | None = None,
        weight: float = 0.5,
        k: int = 10,
        offset: int = 0,
        spread: float = 0.0,
        distinct: float | None = None,
        where: Sequence[str] = (),
        via: Via = "both",
    ) -> list[Hit]:
        """As `Retriever.search`; filters are words such as `group=flags`."""
        like, unlike = ([ids] if isinstance(ids, str) else list(ids) for ids in (like, unlike))
        wanted = {"text": text, "like": like, "unlike": unlike, "minus": minus, "weight": weight}
        wanted |= {"k": k, "offset": offset, "spread": spread, "distinct": distinct, "where": list(where), "via": via}
        if image is None:
            found = self._call("POST", "/api/v1/search", json=wanted)
        else:
            content = image if isinstance(image, bytes) else image.read_bytes()
            form = {"files": {"picture": ("picture", content)}, "data": {"wanted": json.dumps(wanted)}}
            found = self._call("POST", "/api/v1/search/picture", **form)
        return [Hit(**{**hit, "spaces": tuple(Place(**place) for place in hit["spaces"])}) for hit in found["hits"]]

    def item(self, id: str) -> dict[str, Any]:
        """An item's columns."""
        return self._call("GET", "/api/v1/item", params={"id": id})["meta"]

    def judge(self, id: str, relevant: bool, *, text: str | None = None, like: Sequence[str] = ()) -> None:
        """Say that a hit was what was meant, or was not."""
        self._call("POST", "/api/v1/feedback", json={"id": id, "relevant": relevant, "text": text, "like": list(like)})

    def corrected(self) -> dict[str, Any]:
        """Judged questions with the answers of the model before and now, and what these come to."""
        return self._call("GET", "/api/v1/corrected")

    def facts(self) -> dict[str, Any]:
        """What is served: items, modality, model, columns to filter by."""
        return self._call("GET", "/api/v1/facts")

    def _call(self, method: str, path: str, **options: Any) -> Any:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise StoreError(f"{self.url} does not answer ({error}). Is `twofold serve` running there?") from error
        if response.is_success:
            return response.json() if response.content else None
        try:
            said = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            said = response.text[:200]
        kind = StoreError if response.status_code in (404, 500, 502, 503, 504) else UsageError
        raise kind(f"{self.url}: {said}")
