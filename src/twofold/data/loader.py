"""Batches by their number: a batch is a function of (seed, step) alone, so that resuming needs no replay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold import runtime
from twofold.errors import DataError, UsageError

Column = np.ndarray | Tensor | Sequence


@dataclass(frozen=True, eq=False)
class Choice:
    """A column that has several candidates an item, of which each visit draws one: captions, or their features.

    Item i's candidates are `rows[offsets[i]:offsets[i + 1]]`.
    """

    rows: Column
    offsets: np.ndarray  # int64 [n + 1], rising

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.asarray(self.offsets, np.int64))
        counts = np.diff(self.offsets)
        if len(self.offsets) == 0 or self.offsets[0] < 0 or self.offsets[-1] > len(self.rows):
            raise DataError(f"Offsets must rise from 0 to at most {len(self.rows)}, the number of rows.")
        if (counts < 1).any():
            item = int(np.argmax(counts < 1))
            raise DataError(f"Item {item} has no candidate to choose (no text?). Leave such items out.")

    @classmethod
    def of(cls, candidates: Sequence[Sequence]) -> "Choice":
        """The column of these lists: one list of candidates an item."""
        counts = [len(each) for each in candidates]
        return cls([row for each in candidates for row in each], np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def drawn(self, items: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """One row of each item, by its noise in [0, 1)."""
        start, stop = self.offsets[items], self.offsets[items + 1]
        return start + _below(noise, stop - start)


class Batches:
    """Shuffled batches of columns that share their first axis; a new permutation in each epoch.

    Arrays and tensors come out as tensors of their own dtype (a tensor stays on its device), other sequences as lists.
    Of a list of lists, and of a `Choice`, each visit draws one entry, the same number in all such columns of as many
    candidates. With `group`, an epoch visits one random item of each group, so that two items of one group (variants of
    one thing) never meet in a batch. With `classes` (a label an item), items come in runs, `each` of a class; an epoch
    visits every item, and some again to fill up a class's last run. Under several processes, each gets its slice of the
    global batch.
    """

    def __init__(
        self,
        columns: Mapping[str, Column | Choice],
        *,
        batch: int,
        seed: int,
        group: Sequence | None = None,
        classes: Sequence | None = None,
        each: int = 1,
    ):
        self.columns = {name: _prepared(name, column) for name, column in columns.items()}
        lengths = {name: len(column) for name, column in self.columns.items()} | {
            name: len(column) for name, column in (("group", group), ("classes", classes)) if column is not None
        }
        if len(set(lengths.values())) != 1:
            raise DataError(f"Columns must be of one length, one entry an item; they have {lengths or 'none'}.")
        items = next(iter(lengths.values()))
        if group is not None and classes is not None:
            raise UsageError("Batches go by group or by class, not by both; give one of them.")
        if each < 1 or batch % each:
            raise UsageError(f"batch={batch} is not made of runs of each={each}. Make batch a multiple of it.")
        together = group if classes is None else classes
        self.members = _members(np.arange(items) if together is None else together)
        self.batch, self.seed, self.each = batch, seed, None if classes is None else each
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        visits, what = len(self._epoch(0)), "items" if group is None else "groups"
        if batch < max(1, runtime.world()[1]):
            raise UsageError(f"batch={batch}: each of the {runtime.world()[1]} processes needs an item at least.")
        if visits < batch:
            raise DataError(
                f"A batch of {batch} needs as many {what}; there are {visits}. Lower batch to {visits} or less."
            )
        self.steps_per_epoch = visits // batch

    def __getitem__(self, step: int) -> dict[str, Any]:
        """This process's rows of the batch of this step; steps go on over the epochs without end."""
        if step < 0:
            raise IndexError(f"Steps count from 0, got {step}.")
        epoch, place = divmod(step, self.steps_per_epoch)
        mine = runtime.share(self.batch)
        items = self._epoch(epoch)[place * self.batch :][mine]
        noise = runtime.uniform(len(items), 1, runtime.generator(self.seed, "choice", step)).numpy()[:, 0]
        return {
            name: _take(column.rows, column.drawn(items, noise)) if isinstance(column, Choice) else _take(column, items)
            for name, column in self.columns.items()
        }

    def _epoch(self, epoch: int) -> np.ndarray:
        """The items of an epoch in their order; the last epoch asked for is kept."""
        if self._order[0] != epoch:
            draw = runtime.generator(self.seed, "order", epoch)
            if self.each is None:
                order = _permutation(len(self.members), draw)
                noise = torch.rand(len(self.members), generator=draw).numpy()
                items = np.asarray(self.members.rows)[self.members.drawn(order, noise)]
            else:
                items = _runs(self.members, self.each, draw)
            self._order = (epoch, items)
        return self._order[1]


def _runs(classes: Choice, each: int, draw: torch.Generator) -> np.ndarray:
    """All items, `each` of one class at a time: the classes are shuffled and cut into runs, and the runs shuffled."""
    runs = []
    for start, stop in pairwise(classes.offsets.tolist()):
        own = np.asarray(classes.rows)[start + _permutation(stop - start, draw)]
        runs.append(np.resize(own, (-(-len(own) // each), each)))  # the last run is filled up from the first
    every = np.concatenate(runs)
    return every[_permutation(len(every), draw)].reshape(-1)


def _permutation(n: int, draw: torch.Generator) -> np.ndarray:
    return torch.randperm(n, generator=draw).numpy()


def _members(group: Sequence | np.ndarray) -> Choice:
    """The items of each group as candidates."""
    _, codes, counts = np.unique(np.asarray(group), return_inverse=True, return_counts=True)
    return Choice(np.argsort(codes, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


def _below(noise: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers below `counts`. A float32 just under 1 times a large count may round up to it: hence float64."""
    return (noise.astype(np.float64) * counts).astype(np.int64)


def _prepared(name: str, column: Column | Choice) -> Column | Choice:
    if isinstance(column, np.ndarray):
        return column if column.dtype.kind in "buif" else column.tolist()
    if isinstance(column, Tensor | Choice) or not len(column) or not isinstance(column[0], list | tuple):
        return column
    try:
        return Choice.of(column)
    except DataError as error:
        raise DataError(f"Column {name!r}: {error}") from error


def _take(column: Column, rows: np.ndarray) -> Tensor | list:
    if isinstance(column, np.ndarray):
        return torch.from_numpy(np.asarray(column[rows]))
    if isinstance(column, Tensor):
        return column[torch.from_numpy(rows).to(column.device)]
    return [column[row] for row in rows]
