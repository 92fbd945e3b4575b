"""Embedding beyond one process, and beyond one machine, for an index that one process then makes.

A unit of work is a slice of a source's contents: it is embedded into the index's vectors, which are kept by content, in
files that are complete or absent, and which any number of processes may add to at the same time (`data.vectors`). So a
unit may be done twice, by whichever process, in any order; one that is killed half-way loses its last file at most; and
what is there already is not done again. Three ways run them:

    Index.build              in this process, all of them
    embed_part(…, part)      every n-th of them, in n processes that need not know of each other (torchrun, SLURM, ssh)
    embed_on_ray(…)          as tasks of a Ray cluster, which tries again what a lost machine had begun

Machines share two folders: the index's and the data's. `Index.build` comes last, finds everything embedded, and writes.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from twofold.cluster import on_ray
from twofold.data.decode import OnError, Skipped
from twofold.data.sources import Modality, Source
from twofold.data.vectors import Joined
from twofold.errors import TwofoldError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.retrieve.contents import contents_of, embed_items
from twofold.retrieve.index import Existing, begun
from twofold.retrieve.modalities import towers_of
from twofold.retrieve.snapshot import Progress, claimed, item_vectors

UNIT = 2048  # contents of a unit: one file of vectors, about a minute on two cores


class Part(NamedTuple):
    """One of `of` processes that share the work, counted from 0."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> "Part":
        """ "2/8" is the third of eight; "auto" asks what torchrun or SLURM says to their processes."""
        if text == "auto":
            for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
                if rank in os.environ and size in os.environ:
                    text = f"{os.environ[rank]}/{os.environ[size]}"
                    break
            else:
                raise UsageError(
                    "--part auto reads RANK and WORLD_SIZE (torchrun) or SLURM_PROCID and SLURM_NTASKS (srun), and "
                    "neither is set. Say which part this is: --part 0/8 to --part 7/8."
                )
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            raise UsageError(f"{text!r} is no part: 0/8 is the first of eight, 7/8 the last; or auto.")
        return cls(int(number), int(of))


def embed_part(
    source: Source,
    bundle: Bundle,
    out: Path,
    part: Part,
    *,
    existing: Existing = "keep",
    modality: Modality | Sequence[Modality] | None = None,
    on_error: OnError = "skip",
    progress: Progress | None = None,
) -> list[Skipped]:
    """Embed every `part.of`-th content of a source, from `part.number` on, for the index `out`; returns what could not
    be.

    The parts are those of the source as it is, not of what is left to do: a process that starts later than another has
    the same part. `existing="replace"` embeds for an index that shall get another model. `progress(done, total)` counts
    the part's contents that have no vector yet.
    """
    with claimed(out, shared=True):
        _, towers, vectors = _space(source, bundle, out, modality, existing)
        mine = source.take(range(part.number, len(source), part.of))
        return embed_items(mine, towers, vectors, on_error, progress)[1]


def embed_on_ray(
    source: Source,
    model: Path,
    out: Path,
    *,
    address: str = "local",
    existing: Existing = "keep",
    modality: Modality | Sequence[Modality] | None = None,
    on_error: OnError = "skip",
    unit: int = UNIT,
    progress: Progress | None = None,
) -> list[Skipped]:
    """Embed a source for the index `out` on a Ray cluster; returns what could not be.

    `address` is as in `cluster.on_ray`. Every machine sees `out`, the model and the source's files under the same
    paths. A unit is a task, of one CPU or one GPU.
    """
    out, model = Path(out).resolve(), Path(model).resolve()
    with claimed(out, shared=True):
        chosen, _, vectors = _space(source, Bundle.load(model), out, modality, existing)
        contents = contents_of(source, chosen)
        at = [i for i, content in enumerate(contents) if content is not None]  # the build names the others
        todo = [at[n] for n in vectors.missing([vectors.key(*contents[i]) for i in at])]  # type: ignore[misc]
        units = [todo[start : start + unit] for start in range(0, len(todo), unit)]
        calls = {number: (items, model, out, chosen, existing, on_error) for number, items in enumerate(units)}
        skipped: list[Skipped] = []
        done = 0
        for number, found in on_ray(_unit, calls, shared=(source,), address=address):
            if isinstance(found, TwofoldError):
                raise found
            skipped += found
            done += len(units[number])
            if progress is not None:
                progress(done, len(todo))
    return skipped


@cache
def _loaded(model: Path) -> Bundle:
    """A worker process of Ray runs one unit after the other with the same model."""
    return Bundle.load(model)


def _unit(
    source: Source,
    items: Sequence[int],
    model: Path,
    out: Path,
    modalities: Sequence[Modality],
    existing: Existing,
    on_error: OnError,
) -> list[Skipped]:
    _, towers, vectors = _space(source, _loaded(model), out, modalities, existing)
    return embed_items(source.take(items), towers, vectors, on_error, None)[1]


def _space(
    source: Source, bundle: Bundle, out: Path, modality: Modality | Sequence[Modality] | None, existing: Existing
) -> tuple[Sequence[Modality], Mapping[Modality, Tower], Joined]:
    """The columns that are embedded, with what, and where their vectors are kept."""
    _, head = begun(source, bundle, out, modality, existing)
    return head.modalities, towers_of(bundle, head.modalities, head.frames), item_vectors(out, head)
