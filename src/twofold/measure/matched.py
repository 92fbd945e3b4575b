"""Two modalities of one source, embedded, and who belongs to whom."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.errors import DataError, UsageError, unknown
from twofold.measure.embed import embed
from twofold.models.bundle import Bundle


@dataclass(frozen=True)
class Side:
    """The embeddings of one modality, one row a picture, a text, a sound …; `owner` is each row's item."""

    matrix: Float[np.ndarray, "m d"]
    owner: Int[np.ndarray, "m"]


@dataclass(frozen=True)
class Matched:
    """Two sides of the same `items`, by their modality. Rows of one item belong together; several are several right
    answers."""

    items: Source
    sides: dict[Modality, Side]
    skipped: list[Skipped] = field(default_factory=list)  # what lacks one of them, or cannot be read

    def positives(self, queries: Modality, gallery: Modality) -> list[list[int]]:
        """The gallery's rows that belong to each query."""
        rows: list[list[int]] = [[] for _ in range(len(self.items))]
        for row, item in enumerate(self.sides[gallery].owner.tolist()):
            rows[item].append(row)
        return [rows[item] for item in self.sides[queries].owner.tolist()]


def matched(
    bundle: Bundle, data: Source, modalities: Sequence[Modality], *, on_error: OnError = "skip", quiet: bool = False
) -> Matched:
    """Embed two columns of `data` with the bundle's towers of their names; items that lack one of them are left out."""
    first, second = modalities
    done = {
        modality: embed(bundle, data, modality, on_error=_skip(data, modality, on_error), quiet=quiet)
        for modality in modalities
    }
    kept = np.intersect1d(done[first].kept, done[second].kept)
    if len(kept) == 0:
        raise DataError(f"{data.name} has no item with both {first} and {second}.")
    sides = {}
    for modality, found in done.items():
        owner = np.repeat(found.kept, np.diff(found.offsets))
        rows = np.isin(owner, kept)
        sides[modality] = Side(found.matrix[rows], np.searchsorted(kept, owner[rows]))
    skipped = {skip.id: skip for found in done.values() for skip in found.skipped}
    return Matched(data.take(kept), sides, list(skipped.values()))


def pair_of(bundle: Bundle, data: Source, between: Sequence[Modality] = ()) -> tuple[Modality, Modality] | None:
    """The two modalities that both the bundle and the data have, or those of them that `between` names; None where
    they share fewer than two."""
    shared = [name for name in bundle.towers if name in data.modalities]
    for name in between:
        if name not in shared:
            raise unknown("modality that model and data share", name, shared)
    if between and len(set(between)) != 2:
        raise UsageError(f"Pairs are of two modalities; got {' and '.join(between)}.")
    if not between and len(shared) > 2:
        raise UsageError(f"Model and data share {', '.join(shared)}: say between which two, as --between or between=.")
    first, second = (*(between or shared), "", "")[:2]
    return (first, second) if second else None


def _skip(data: Source, modality: Modality, on_error: OnError) -> OnError:
    """An item without a text is no error, a picture that cannot be read may be one."""
    return "skip" if data.modalities[modality] == "text" else on_error
