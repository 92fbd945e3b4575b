"""How much single pairs count, as a table says it: what `twofold pairs` writes, or what anybody else does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float

from twofold.data.sources import Modality, Source, content_key
from twofold.data.tables import READERS
from twofold.errors import DataError


@dataclass(frozen=True)
class Weights:
    """The share of its visits that a pair keeps, 0..1; what is not named keeps them all, and 0 drops it.

    `texts` are of an item's text by (id, text), `items` of whole items by id. What a text of an item loses, its others
    gain: an item is seen as often as its best text deserves.
    """

    items: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[tuple[str, str], float] = field(default_factory=dict)
    name: str = "weights"  # for messages

    def __post_init__(self) -> None:
        for pair, weight in (*self.items.items(), *self.texts.items()):
            if not 0 <= weight <= 1:
                raise DataError(f"{self.name}: a weight is a number from 0 to 1; {pair!r} has {weight}.")

    def __bool__(self) -> bool:
        return bool(self.items or self.texts)

    @property
    def key(self) -> str:
        """What these weights are, as a hash: for a run to be known again."""
        return content_key(repr((sorted(self.items.items()), sorted(self.texts.items()))))

    def check(self, pairs: Source) -> None:
        """A DataError where ids are named that the data does not have: the weights of another data set."""
        strangers = {*self.items, *(id for id, _ in self.texts)} - set(pairs.ids)
        if strangers:
            raise DataError(
                f"{self.name} names {len(strangers):,} ids that {pairs.name} does not have, for instance "
                f"{min(strangers)!r}. Weigh the pairs of this data set."
            )

    def of_texts(self, source: Source, modality: Modality) -> Float[np.ndarray, "m"]:
        """Those of each of the texts of all items."""
        cells = source.column(modality).cells
        own = [self.texts.get((id, text), 1.0) for id, texts in zip(source.ids, cells, strict=True) for text in texts]
        return np.array(own, np.float64)

    def shares(self, source: Source, modalities: Mapping[Modality, object]) -> Float[np.ndarray, "n"]:
        """How many of its visits each item keeps: its own weight times that of its best text."""
        shares: np.ndarray = np.array([self.items.get(id, 1.0) for id in source.ids], np.float64)
        for modality in modalities:
            if self.texts and source.modalities[modality] == "text":
                starts = np.cumsum([0, *(len(own) for own in source.column(modality).cells)])[:-1]
                shares = shares * np.maximum.reduceat(self.of_texts(source, modality), starts)
        if len(shares) and not shares.any():
            raise DataError(f"{self.name} leaves none of the {len(source):,} items of {source.name}: all weigh 0.")
        return shares


def read_weights(path: Path | str) -> Weights:
    """The weights in a table with the columns id and weight; where it has a column text, too, of single texts."""
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in READERS:
        raise DataError(f"There is no table {path} of weights; expected one of {' '.join(READERS)}.")
    columns, _ = READERS[path.suffix.lower()](path)
    if missing := [name for name in ("id", "weight") if name not in columns]:
        raise DataError(f"{path} has no column {missing[0]!r}: its columns are {', '.join(columns)}.")
    ids = [str(id) for id in columns["id"]]
    try:
        weights = [float(weight) for weight in columns["weight"]]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: a weight is a number from 0 to 1 ({error}).") from error
    if "text" in columns:
        return Weights(texts=dict(zip(zip(ids, columns["text"], strict=True), weights, strict=True)), name=str(path))
    return Weights(items=dict(zip(ids, weights, strict=True)), name=str(path))
