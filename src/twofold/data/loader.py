"""Batches by their number: a batch is a function of (seed, step) alone, so that resuming needs no replay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofold import runtime
from twofold.data.video import windows
from twofold.errors import DataError, UsageError

Column = np.ndarray | Tensor | Sequence


GRAIN = 1 << 20  # weights are counted in these parts, so that sums of them are exact
GOLDEN = 648_055  # of them: the golden ratio, odd so that no two of a million epochs are alike


@dataclass(frozen=True, eq=False)
class Choice:
    """A column that has several candidates an item, of which each visit draws one: captions, or their features.

    Item i's candidates are `rows[offsets[i]:offsets[i + 1]]`. `weights`, one a row, say how often a candidate is drawn
    beside the others of its item; one of weight 0 never is.
    """

    rows: Column
    offsets: np.ndarray  # int64 [n + 1], rising
    weights: np.ndarray | None = None  # float [rows], 0..1

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.asarray(self.offsets, np.int64))
        counts = np.diff(self.offsets)
        if len(self.offsets) == 0 or self.offsets[0] < 0 or self.offsets[-1] > len(self.rows):
            raise DataError(f"Offsets must rise from 0 to at most {len(self.rows)}, the number of rows.")
        if self.weights is not None:
            if len(self.weights) != len(self.rows):
                raise DataError(f"Each of {len(self.rows)} rows has a weight; got {len(self.weights)} of them.")
            object.__setattr__(self, "weights", _grains(self.weights))
            counts = np.diff(self._reached[self.offsets])
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

    @cached_property
    def _reached(self) -> np.ndarray:
        """Where each row's weight begins, in grains, when all are laid end to end."""
        assert self.weights is not None
        return np.concatenate([[0], np.cumsum(self.weights)])

    def drawn(self, items: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """One row of each item, by its noise in [0, 1)."""
        start, stop = self.offsets[items], self.offsets[items + 1]
        if self.weights is None:
            return start + _below(noise, stop - start)
        first, last = self._reached[start], self._reached[stop]
        return np.searchsorted(self._reached, first + _below(noise, last - first), side="right") - 1


@dataclass(frozen=True, eq=False)
class Windows:
    """A column of clips, of which each visit draws a part: `frames` of them, `stride` apart, from a random one on.

    Item i's frames are `rows[offsets[i]:offsets[i + 1]]`; where they are few, `data.video.windows` says what is taken.
    """

    rows: Column
    offsets: np.ndarray  # int64 [n + 1], rising
    frames: int
    stride: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def drawn(self, items: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The rows [b, frames] of each item, by its noise in [0, 1)."""
        start, stop = self.offsets[items], self.offsets[items + 1]
        return start[:, None] + windows(stop - start, self.frames, self.stride, noise)


class Batches:
    """Shuffled batches of columns that share their first axis; a new permutation in each epoch.

    Arrays and tensors come out as tensors of their own dtype (a tensor stays on its device), other sequences as lists.
    Of `Windows` each visit draws a part. Of a list of lists, and of a `Choice`, each visit draws one entry, the same
    number in all such columns of as many candidates. Under several processes, each gets its slice of the global batch.

    With `apart` (a name an item), no two items of one name ever meet in a batch: what is equal must not be a negative,
    and a batch without repeats needs no loss that knows of them. An epoch still visits every item, but for names that
    more items bear than an epoch has batches: of those it takes as many, other ones each time. With `shares` (0..1 an
    item), an item is visited in that share of the epochs. With `classes` (a label an item), items come in runs, `each`
    of a class; an epoch visits every item, and some again to fill up a class's last run. With `beside` (it gives [n, k]
    items, −1 for none), items meet in groups of up to `each`: one, and some that lie beside it by that table, as it is
    when an epoch begins. Which items an epoch visits, how often, and what is kept apart does not change by that.
    """

    def __init__(
        self,
        columns: Mapping[str, Column | Choice | Windows],
        *,
        batch: int,
        seed: int,
        apart: Sequence | np.ndarray | None = None,
        shares: Sequence[float] | np.ndarray | None = None,
        classes: Sequence | None = None,
        beside: Callable[[], np.ndarray | Tensor] | None = None,
        each: int = 1,
    ):
        self.columns = {name: _prepared(name, column) for name, column in columns.items()}
        lengths = {name: len(column) for name, column in self.columns.items()} | {
            name: len(column)
            for name, column in (("apart", apart), ("shares", shares), ("classes", classes))
            if column is not None
        }
        if len(set(lengths.values())) != 1:
            raise DataError(f"Columns must be of one length, one entry an item; they have {lengths or 'none'}.")
        items = next(iter(lengths.values()))
        if classes is not None and not (apart is None and shares is None and beside is None):
            raise UsageError("Batches go by class, or by what is kept apart, by shares and neighbours; not by both.")
        if each < 1 or (classes is not None and batch % each):
            raise UsageError(f"batch={batch} is not made of runs of each={each}. Make batch a multiple of it.")
        if batch < max(1, runtime.world()[1]):
            raise UsageError(f"batch={batch}: each of the {runtime.world()[1]} processes needs an item at least.")
        self.batch, self.seed, self.each = batch, seed, each
        self.beside, self._by_class = beside, classes is not None
        together = classes if apart is None else apart
        self._together: list[np.ndarray] = []  # columns of as many candidates draw as one: texts, and their features
        for column in self.columns.values():
            if not isinstance(column, Choice | Windows):
                continue
            if not any(np.array_equal(column.offsets, own) for own in self._together):
                self._together.append(column.offsets)
        self.members = _members(np.arange(items) if together is None else together)
        self._shares = None if shares is None else _grains(shares)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.steps_per_epoch = (
            self._steps()
            if classes is None
            else sum(-(-size // each) * each for size in np.diff(self.members.offsets).tolist()) // batch
        )
        if not self.steps_per_epoch:
            distinct = len(self.members) if apart is not None else items
            what = "items" if apart is None else "distinct items"
            raise DataError(
                f"A batch of {batch} needs as many {what}; there are {distinct}"
                + (f", {self._shares.sum() / GRAIN:.0f} of them in an epoch" if self._shares is not None else "")
                + ". Lower batch to that or less."
            )

    def __getitem__(self, step: int) -> dict[str, Any]:
        """This process's rows of the batch of this step; steps go on over the epochs without end."""
        if step < 0:
            raise IndexError(f"Steps count from 0, got {step}.")
        epoch, place = divmod(step, self.steps_per_epoch)
        mine = runtime.share(self.batch)
        items = self._epoch(epoch)[place * self.batch :][mine]
        draw = runtime.generator(self.seed, "choice", step)
        noise = runtime.uniform(len(items), max(1, len(self._together)), draw).numpy()
        batch = {}
        for name, column in self.columns.items():
            if isinstance(column, Choice | Windows):
                own = next(at for at, offsets in enumerate(self._together) if np.array_equal(offsets, column.offsets))
                batch[name] = _take(column.rows, column.drawn(items, noise[:, own]))
            else:
                batch[name] = _take(column, items)
        return batch

    @property
    def crowded(self) -> bool:
        """Whether some items have no place in an epoch because too many bear one name."""
        return not self._by_class and int(np.diff(self.members.offsets).max(initial=0)) > self.steps_per_epoch

    def _steps(self) -> int:
        """The most batches that every epoch can fill: a name's items that are more than these have no place."""
        weight = np.full(len(self.members.rows), GRAIN) if self._shares is None else self._shares
        visits = int(weight.sum()) // GRAIN
        of_name = np.add.reduceat(weight[np.asarray(self.members.rows)], self.members.offsets[:-1])
        most = np.sort(-(-of_name // GRAIN))[::-1]  # items of a name in one epoch, the largest first
        steps = visits // self.batch
        while steps and visits - np.maximum(most - steps, 0).sum() < steps * self.batch:
            steps -= 1
        return steps

    def _epoch(self, epoch: int) -> np.ndarray:
        """The items of an epoch in their order; the last epoch asked for is kept."""
        if self._order[0] != epoch:
            draw = runtime.generator(self.seed, "order", epoch)
            items = _runs(self.members, self.each, draw) if self._by_class else self._apart(epoch, draw)
            if self.beside is not None:
                items = self._gathered(items[: self.steps_per_epoch * self.batch], np.asarray(self.beside()), draw)
            self._order = (epoch, items)
        return self._order[1]

    def _apart(self, epoch: int, draw: torch.Generator) -> np.ndarray:
        """Items in batches of which none holds a name twice.

        Names come in random order and the items of a name side by side; dealt out one by one, like cards, to the
        batches of the epoch, no two of a name come to lie in one.
        """
        rows, offsets = np.asarray(self.members.rows), self.members.offsets
        if self._shares is not None:
            rows, offsets = self._admitted(epoch)
        order, count = _permutation(len(offsets) - 1, draw), np.diff(offsets)
        if (count == 1).all():
            return rows[order]
        named = np.repeat(np.argsort(order), count)  # each item's name, by its place in the order
        shuffled = _permutation(len(rows), draw)
        dealt = shuffled[np.argsort(named[shuffled], kind="stable")]
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(count[order]) - count[order], count[order])
        dealt = dealt[nth < self.steps_per_epoch][: self.steps_per_epoch * self.batch]
        return rows[dealt].reshape(self.batch, self.steps_per_epoch).T.reshape(-1)

    def _gathered(self, items: np.ndarray, beside: np.ndarray, draw: torch.Generator) -> np.ndarray:
        """The same items in other batches: what lies beside an item changes places with another of its batch.

        Batch by batch, an item that has not been moved yet fetches up to `each` − 1 of its neighbours, in random order,
        out of batches whose turn is still to come. None comes that bears a name of the batch, or whose place nobody of
        the batch may take. So late batches find few neighbours left: their order is shuffled in the end.
        """
        table = items.reshape(-1, self.batch).copy()
        names = np.empty(len(self.members.rows), np.int64)
        names[np.asarray(self.members.rows)] = np.repeat(np.arange(len(self.members)), np.diff(self.members.offsets))
        place = np.full(len(names), -1)
        place[table.ravel()] = np.arange(table.size)
        settled = place < 0  # what this epoch does not visit stays where it is
        there = [set(names[row].tolist()) for row in table]
        shuffled = np.argsort(runtime.uniform(len(beside), beside.shape[1], draw).numpy(), axis=1)
        for at, row in enumerate(table):
            last = self.batch - 1  # places from here on are free to give away
            for seed in range(self.batch):
                if seed > last:
                    break
                if settled[row[seed]]:
                    continue
                settled[row[seed]] = True
                own = beside[row[seed]]
                met = 1
                for other in own[shuffled[row[seed]]].tolist():
                    if met == self.each:
                        break
                    if other < 0 or settled[other]:
                        continue
                    batch, column = divmod(int(place[other]), self.batch)
                    if batch != at:
                        while last > seed and settled[row[last]]:
                            last -= 1
                        filler = int(row[last])
                        new, gone = int(names[other]), int(names[filler])
                        if last <= seed or new in there[at] or gone in there[batch]:
                            continue
                        there[at] ^= {new, gone}
                        there[batch] ^= {new, gone}
                        row[last], table[batch, column] = other, filler
                        place[other], place[filler] = place[filler], place[other]
                    settled[other] = True
                    met += 1
        return table[_permutation(len(table), draw)].ravel()

    def _admitted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The items that this epoch visits, name by name, and where each name begins.

        Shares are laid end to end, and a comb of teeth one apart is laid over them, shifted each epoch: an item is in
        where a tooth falls on its share. So every epoch has as many items (or one more), an item of share 1 is in
        each of them, and the epochs of any other are spread as evenly as the golden ratio spreads them.
        """
        assert self._shares is not None
        rows = np.asarray(self.members.rows)
        ends = np.cumsum(self._shares[rows])
        shift = (epoch * GOLDEN + runtime.seed_of(self.seed, "shares")) % GRAIN
        teeth = np.concatenate([[0], (ends + shift) // GRAIN - shift // GRAIN])
        names = np.repeat(np.arange(len(self.members)), np.diff(self.members.offsets))
        admitted = np.diff(teeth) > 0
        counts = np.bincount(names[admitted], minlength=len(self.members))
        return rows[admitted], np.concatenate([[0], np.cumsum(counts[counts > 0])])


def sharing(*columns: Sequence[Sequence]) -> np.ndarray:
    """A number an item (int64 [n]): the same where items share an entry of a column, directly or by way of others.

    Each column has a list of entries an item, such as the keys of its texts. What shares a number is `apart`.
    """
    names: dict[tuple[int, Any], int] = {}
    links = np.array(
        [
            (item, names.setdefault((place, entry), len(names)))
            for place, column in enumerate(columns)
            for item, entries in enumerate(column)
            for entry in entries
        ],
        np.int64,
    ).reshape(-1, 2)
    items, entries = links.T
    number = np.arange(len(columns[0]))
    while True:  # the least number goes from item to entry and back until all that are linked have it
        least = np.full(len(names), len(number))
        np.minimum.at(least, entries, number[items])
        after = number.copy()
        np.minimum.at(after, items, least[entries])
        if (after == number).all():
            return number
        number = after


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


def _grains(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 in whole grains; what is above 0 keeps one."""
    weights = np.asarray(weights, np.float64)
    if not ((weights >= 0) & (weights <= 1)).all():
        raise DataError(f"A weight is a number from 0 to 1; got {weights[~((weights >= 0) & (weights <= 1))][0]}.")
    return np.ceil(weights * GRAIN).astype(np.int64)


def _below(noise: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers below `counts`. A float32 just under 1 times a large count may round up to it: hence float64."""
    return (noise.astype(np.float64) * counts).astype(np.int64)


def _prepared(name: str, column: Column | Choice | Windows) -> Column | Choice | Windows:
    if isinstance(column, np.ndarray):
        return column if column.dtype.kind in "buif" else column.tolist()
    if isinstance(column, Tensor | Choice | Windows) or not len(column) or not isinstance(column[0], list | tuple):
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
