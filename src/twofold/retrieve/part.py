"""Some of an index's items, searched alone: what was chosen on the map."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from twofold.errors import StoreError
from twofold.retrieve.store import ExactStore, Hit, Scalar, Store, Where


class Part:
    """A store that finds some items of another one, each compared with the query; examples may be any of the whole."""

    def __init__(self, whole: Store, ids: Collection[str]):
        self.whole, self.fingerprint, self.dim = whole, whole.fingerprint, whole.dim
        names = list(dict.fromkeys(ids))
        self._chosen = ExactStore(fingerprint=whole.fingerprint, dim=whole.dim)
        if names:
            self._chosen.upsert(names, whole.vectors(names), whole.meta(names))

    def query(self, vector: Float[np.ndarray, "d"], k: int, where: Where | None = None) -> list[Hit]:
        return self._chosen.query(vector, k, where)

    def vectors(self, ids: Sequence[str]) -> Float[np.ndarray, "n d"]:
        return self.whole.vectors(ids)

    def meta(self, ids: Sequence[str]) -> list[dict[str, Scalar]]:
        return self.whole.meta(ids)

    def ids(self) -> list[str]:
        return self._chosen.ids()

    def __len__(self) -> int:
        return len(self.whole)  # what probabilities are for, as with filters

    def upsert(self, ids: Sequence[str], vectors: Float[np.ndarray, "n d"], meta: Sequence[Mapping]) -> None:
        raise StoreError("A part of a store is read only; change the whole.")

    def delete(self, ids: Sequence[str]) -> None:
        raise StoreError("A part of a store is read only; change the whole.")

    @property
    def parameters(self) -> dict[str, Any]:
        return self.whole.parameters

    def close(self) -> None:
        pass
