"""`twofold index`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Data, Folder, OnError, verb
from twofold.cli.show import (
    print_json,
    print_skipped,
)


@verb
def index(
    source: Data,
    /,
    *,
    model: Annotated[Path, arg(metavar="MODEL")],
    out: Folder,
    existing: Literal["keep", "prune", "replace"] = "keep",
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Make a collection searchable. Run it again after changes: only what is new is embedded.

    examples:
      twofold index photos/ --model runs/b --out photos.index
      twofold index photos/ --model runs/b --out photos.index --existing prune

    Args:
        source: what shall be found
        model: a bundle, or the folder of a run
        out: the index's folder
        existing: items that the index has and the source has not: keep or prune them; replace begins anew
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.progress import Line
    from twofold.retrieve.index import index

    with Line("embed", unit="items", quiet=json) as line:
        built = index(source, model=model, out=out, existing=existing, on_error=on_error, progress=line.update)
    if json:
        print_json(dataclasses.asdict(built))
        return
    print_skipped(built.skipped)
    print(
        f"  {built.items:,} items in {out}: {built.added:,} added, {built.changed:,} changed, "
        f'{built.removed:,} removed, {built.embedded:,} embedded\n  next: twofold search {out} "a red heart"'
    )
