"""`twofold index`."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, Folder, OnError, assigned, verb
from twofold.cli.show import print_checked, print_corrected, print_json, print_skipped, write_csv

if TYPE_CHECKING:
    from twofold.data.sources import Source
    from twofold.progress import Line
    from twofold.retrieve.engines import Kept

Existing = Literal["keep", "prune", "replace"]
Made = Annotated[Path | None, arg(metavar="INDEX")]


@verb
def index(
    source: Data | None = None,
    /,
    *,
    model: Annotated[Path | None, arg(metavar="MODEL")] = None,
    out: Folder | None = None,
    existing: Existing = "keep",
    texts: Annotated[str | None, arg(metavar="EMBEDDER")] = None,
    modality: Annotated[str | None, arg(metavar="COLUMN,…")] = None,
    part: Annotated[str | None, arg(metavar="I/N|auto")] = None,
    ray: Annotated[str | None, arg(metavar="ADDRESS")] = None,
    store: Annotated[str | None, arg(metavar="STORE")] = None,
    hnsw: Annotated[tuple[str, ...], arg(metavar="NAME=N …")] = (),
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    check: Made = None,
    repair: Made = None,
    duplicates: Made = None,
    corrected: Made = None,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    json: bool = False,
) -> None:
    """Make a collection searchable. Run it again after changes: only what is new is embedded.

    --check, --repair, --duplicates and --corrected are about an index that is there; --check ends with 1 where it finds
    anything.

    examples:
      twofold index photos/ --model runs/b --out photos.index
      twofold index photos/ --model runs/b --out photos.index --existing prune
      twofold index captions.csv --model runs/b --out captions.index --modality text --texts gemini
      twofold index things/ --model runs/b --out things.index --modality image,text,video
      twofold index photos/ --model runs/b --out photos.index --ray auto        # embeds on a Ray cluster
      srun -n 8 twofold index photos/ --model runs/b --out photos.index --part auto
      twofold index photos/ --model runs/b --out photos.index --store chroma:http://localhost:8000
      twofold index --check photos.index
      twofold index --duplicates photos.index --csv twice.csv
      twofold index --corrected photos.index

    Args:
        source: what shall be found
        model: a bundle, or the folder of a run
        out: the index's folder
        existing: items that the index has and the source has not: keep or prune them; replace begins anew
        texts: what embeds the items' texts into a space of their own: minilm, hf:/folder, gemini, gemini:1536 (asks
            Google and costs money), or none; an index goes on as it is, a new one takes minilm if there are texts
        modality: what items are found by: a column, or several, image,text,video, of which each item takes the first
            that it has; the default is the one that most items have and the model can embed. Of a folder, several take
            all files of these kinds. Clips of a model without a video tower are read by its picture tower
        part: embed this part of the source only, 0/8 to 7/8 or what torchrun and SLURM say (auto), and make no index:
            when all parts are done, the same command without --part makes it
        ray: embed on this Ray cluster: local, auto or ray://host:10001; machines share the folders
        store: what answers searches: chroma (embedded, the default), exact (every vector), chroma:URL (a server),
            qdrant:URL; the index remembers it, and another one is filled from its vectors
        hnsw: settings of its graph: max_neighbors (16), ef_construction (100), ef_search (100)
        columns: which further columns of the manifest are modalities, each of a kind: image, text, audio, video, vector
        images: where the manifest's files are, if not beside it
        on_error: what to do with a picture that cannot be read
        check: hold the parts of this index against each other; changes nothing
        repair: mend this index: embed what is lost again, drop what is gone, make its store anew
        duplicates: list the pictures that this index has twice, or nearly so
        corrected: show how this index answered judged questions before it got its last model, and how it does now
        csv: with --duplicates, a file for the list
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.errors import UsageError
    from twofold.progress import Line
    from twofold.retrieve.modalities import kinds_of, named

    about = {"check": check, "repair": repair, "duplicates": duplicates, "corrected": corrected}
    chosen = [name for name, one in about.items() if one]
    if len(chosen) > 1 or (chosen and (source is not None or model or out)):
        raise UsageError(f"--{chosen[0]} takes an index and goes alone: `twofold index --{chosen[0]} photos.index`.")
    if csv and not duplicates:
        raise UsageError("--csv is where --duplicates writes its list.")
    if check:
        _check(check, json)
    elif repair:
        _repair(repair, json)
    elif duplicates:
        _duplicates(duplicates, csv, json)
    elif corrected:
        _corrected(corrected, json)
    elif source is None or model is None or out is None:
        raise UsageError("Three things are needed: `twofold index SOURCE --model MODEL --out INDEX`.")
    else:
        kinds = kinds_of(named(modality) or _held(out))
        opened = open_source(source, images=images, columns=assigned("columns", columns), kinds=kinds)
        if part:
            _part(opened, model, out, part, existing, modality, on_error, json)
            return
        if ray:
            _on_ray(opened, model, out, ray, existing, modality, on_error, json)
        from twofold.retrieve.index import index
        from twofold.retrieve.modalities import left_out
        from twofold.retrieve.text_embedders import text_embedder

        kept = _kept(store, hnsw, out)
        with Line("embed", unit="items", quiet=json) as line:
            built = index(
                opened,
                model=model,
                out=out,
                modality=modality,
                existing=existing,
                on_error=on_error,
                texts=text_embedder(texts, say=_say) if texts not in (None, "none") else texts,
                store=kept,
                progress=line.update,
                filling=partial(_filling, line),
            )
        if json:
            print_json(dataclasses.asdict(built))
            return
        print_skipped(built.skipped)
        modalities = _held(out)
        for other, count in left_out(opened, modalities).items():
            print(
                f"  {count:,} more items have {other}; with a model that reads it: "
                f"--modality {','.join([*modalities, other])} --existing replace"
            )
        print(
            f"  {built.items:,} items in {out}: {built.added:,} added, {built.changed:,} changed, "
            f"{built.removed:,} removed, {built.embedded:,} embedded\n"
            + (
                f"  {built.texts:,} texts in a space of their own, {built.texts_embedded:,} embedded\n"
                if built.texts
                else ""
            )
            + f'  next: twofold search {out} "a red heart"'
        )


def _part(
    source: "Source",
    model: Path,
    out: Path,
    part: str,
    existing: Existing,
    modality: str | None,
    on_error: OnError,
    json: bool,
) -> None:
    from twofold.models.bundle import Bundle
    from twofold.progress import Line
    from twofold.retrieve.bulk import Part, embed_part

    mine = Part.read(part)
    with Line(f"embed {mine.number}/{mine.of}", unit="items", quiet=json) as line:
        skipped = embed_part(
            source, Bundle.load(model), out, mine,
            existing=existing, modality=modality, on_error=on_error, progress=line.update,
        )  # fmt: skip
    if json:
        print_json({"part": mine._asdict(), "skipped": skipped})
        return
    print_skipped(skipped)
    print(f"  part {mine.number} of {mine.of} is embedded; when all are: the same command without --part")


def _on_ray(
    source: "Source",
    model: Path,
    out: Path,
    address: str,
    existing: Existing,
    modality: str | None,
    on_error: OnError,
    json: bool,
) -> None:
    """Embed on a cluster; what could not be is named by the build that follows."""
    from twofold.progress import Line
    from twofold.retrieve.bulk import embed_on_ray

    with Line("embed on Ray", unit="items", quiet=json) as line:
        embed_on_ray(
            source, model, out,
            address=address, existing=existing, modality=modality, on_error=on_error, progress=line.update,
        )  # fmt: skip


def _held(out: Path) -> tuple[str, ...]:
    """The modalities of an index that is there already."""
    from twofold.retrieve.snapshot import read_head

    return read_head(out).modalities if (out / "index.json").exists() else ()


def _kept(store: str | None, hnsw: tuple[str, ...], out: Path) -> "Kept | None":
    """The store that is asked for; with settings alone, that of the index with these settings."""
    from twofold.errors import UsageError
    from twofold.retrieve.engines import Kept
    from twofold.retrieve.snapshot import read_head

    if store is None and not hnsw:
        return None
    if store is None:
        store = read_head(out).store.engine if (out / "index.json").exists() else "chroma"
    try:
        return Kept(store, {name: int(value) for name, value in assigned("hnsw", hnsw).items()})
    except ValueError:
        raise UsageError(f"--hnsw takes whole numbers, such as ef_search=200; got {' '.join(hnsw)}.") from None


def _filling(line: "Line", done: int, total: int) -> None:
    line.turn("store", unit="rows")
    line.update(done, total)


def _say(words: str) -> None:
    print(f"  {words}", file=sys.stderr)


def _check(path: Path, json: bool) -> None:
    from twofold.retrieve.check import check

    checked = check(path)
    print_json(checked.as_json()) if json else print_checked(checked)
    if not checked.whole:
        raise SystemExit(1)


def _repair(path: Path, json: bool) -> None:
    from twofold.progress import Line
    from twofold.retrieve.check import repair

    with Line("embed", unit="items", quiet=json) as line:
        done = repair(path, progress=line.update, filling=partial(_filling, line))
    if json:
        before, after = done.before.as_json(), done.after.as_json()
        print_json({"before": before, "embedded": done.embedded, "dropped": done.dropped, "after": after})
    else:
        print_checked(done.before)
        if not done.before.whole:
            print(f"  {done.embedded:,} items embedded again, {len(done.dropped):,} dropped; now:")
            print_checked(done.after)
    if not done.after.whole:
        raise SystemExit(1)


def _duplicates(path: Path, csv: Path | None, json: bool) -> None:
    from twofold.progress import Line
    from twofold.retrieve.duplicates import duplicates

    with Line("look", unit="pictures", quiet=json) as line:
        groups = duplicates(path, progress=line.update)
    if csv:
        rows = ((number, *twin) for number, group in enumerate(groups) for twin in group)
        write_csv(csv, ("group", "id", "kind", "bits", "cosine"), rows)
    if json:
        print_json(groups)
        return
    for group in groups[:10]:
        print(f"  {len(group)}×  " + "  ".join(f"{twin.id} ({twin.kind})" for twin in group[:6]))
    more = sum(len(group) - 1 for group in groups)
    print(f"  {len(groups):,} groups, {more:,} items more than there are pictures" + (f"; {csv}" if csv else ""))


def _corrected(path: Path, json: bool) -> None:
    from twofold.retrieve.corrected import change, corrected
    from twofold.retrieve.index import Index

    with Index.open(path) as opened:
        rows = corrected(opened)
    come = change(rows)
    if json:
        print_json({"change": come, "questions": [row._asdict() | {"ranks": row.ranks} for row in rows]})
    elif not rows:
        print(f"  {path} answers nothing that was judged with another model than before")
    else:
        print_corrected(rows, come)
