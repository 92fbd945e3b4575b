"""`twofold pairs`."""

import csv
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, Folder, OnError, again, assigned, verb
from twofold.cli.show import plain, print_json, print_skipped

if TYPE_CHECKING:
    from twofold.train.pairs import Audit


@verb
def pairs(
    data: Data,
    /,
    *,
    out: Folder,
    towers: Annotated[tuple[str, ...], arg(metavar="NAME=ENCODER …")] = (),
    model: Annotated[Path | None, arg(metavar="MODEL")] = None,
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    folds: int = 4,
    epochs: int = 30,
    seed: int = 0,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Find the pairs that do not belong together: captions of another picture, transcripts of another clip.

    Every pair is judged by heads that never saw it, by its neighbours and by the item's other texts. Writes pairs.csv,
    the least likely first, with a weight for `twofold align --weights`; pairs.html, to look at; and pairs.json.

    examples:
      twofold pairs captions.csv --out audit
      twofold pairs captions.csv --out audit --model runs/b
      twofold align captions.csv --out runs/c --weights audit/pairs.csv

    Args:
        data: the pairs: a manifest with two modalities; of named splits, "train" is judged
        out: where the table and the page go
        towers: two modalities and their encoders; image=efficientnet-lite0 text=minilm where not given
        model: take the encoders of this bundle or run instead
        columns: further columns that are modalities, as NAME=KIND
        images: where the manifest's pictures are, if not beside it
        folds: parts of the data, each judged by heads that learned from the others
        epochs: of each part's heads
        seed: another division into parts
        on_error: what to do with an item that cannot be read
        json: print the result as JSON
    """
    import dataclasses
    import json as jsonlib

    from twofold.data.atomic import write_atomically
    from twofold.data.samples import ATTRIBUTION
    from twofold.data.sources import open_source
    from twofold.errors import UsageError
    from twofold.train.align import TOWERS
    from twofold.train.pair_page import page
    from twofold.train.pairs import JUDGES, audit_pairs

    if model and towers:
        raise UsageError("--model brings its own encoders; leave out --towers.")
    source = open_source(data, images=images, columns=assigned("columns", columns))
    chosen = dict(assigned("towers", towers)) or dict(TOWERS)
    if model:
        from twofold.models.bundle import Bundle

        chosen = {name: f"local:{model}@{name}" for name in Bundle.load(model).towers}
    recipe = dataclasses.replace(JUDGES, epochs=epochs, seed=seed)
    audit = audit_pairs(source, out=out, towers=chosen, recipe=recipe, folds=folds, on_error=on_error, quiet=json)
    write_csv(audit, out / "pairs.csv")
    figures = plain(audit.to_dict())
    notice = ATTRIBUTION if data == "openmoji" else ""
    for name, content in (
        ("pairs.html", page(audit, notice=notice)),
        ("pairs.json", jsonlib.dumps(figures, indent=1, ensure_ascii=False) + "\n"),
    ):
        write_atomically(out / name, partial(Path.write_text, data=content, encoding="utf-8"))
    if json:
        print_json(figures)
        return
    print_skipped(audit.skipped)
    noise = audit.noise
    print(
        f"  {len(audit.pairs):,} pairs; about {100 * noise.value:.1f} % do not belong together "
        f"({100 * noise.low:.1f} to {100 * noise.high:.1f})"
    )
    for one in audit.pairs[:10]:
        print(f"  {100 * one.wrong:3.0f} %  {one.id}  {one.text[:70]!r}  {'; '.join(one.reasons[:2])}")
    given = again(data, images, columns)
    print(f"  {out / 'pairs.html'}\n  next: twofold align {given} --out runs/weighed --weights {out / 'pairs.csv'}")


def write_csv(audit: "Audit", path: Path) -> None:
    """The pairs as a table, worst first: what `align --weights` reads."""
    from twofold.data.atomic import write_atomically

    texts = any(one.text for one in audit.pairs)

    def write(place: Path) -> None:
        with open(place, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["id", *(["text"] if texts else []), "wrong", "weight", "rank", "among", "reasons"])
            for one in audit.pairs:
                text = [one.text] if texts else []
                rows.writerow([one.id, *text, one.wrong, one.weight, one.rank, one.among, "; ".join(one.reasons)])

    write_atomically(path, write)
