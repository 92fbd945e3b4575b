"""`twofold caption`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import Data, OnError, verb
from twofold.cli.show import print_json, print_skipped


@verb
def caption(
    data: Data,
    /,
    *,
    model: Annotated[Path, arg(metavar="MODEL")],
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    split: str | None = None,
    limit: int | None = None,
    prompt: str = "",
    beams: int = 1,
    most: int = 40,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Say what pictures show, by a model of `twofold interleave` or `twofold train coca`.

    examples:
      twofold caption photos/ --model runs/p
      twofold caption captions.csv --model runs/p --split test --beams 4 --out said.csv

    Args:
        data: pictures
        model: a bundle, or the folder of a run
        out: a CSV file with the columns id and caption; the terminal, if none is given
        split: the pictures of this split alone
        limit: the first so many pictures
        prompt: words behind the picture that the caption goes on from
        beams: texts that are followed at a time; 1, the only choice for coca, takes the likeliest word each time
        most: tokens of a caption
        images: where the manifest's pictures are, if not beside it
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.measure.likelihood import caption
    from twofold.models.bundle import Bundle

    source = open_source(data, images=images)
    source = source if split is None else source.split(split)
    source = source.take(range(min(limit or len(source), len(source))))
    said, skipped = caption(
        Bundle.load(model), source, prompt=prompt, beams=beams, most=most, on_error=on_error, quiet=json
    )
    if out is not None:
        from twofold.cli.show import write_csv

        write_csv(out, ("id", "caption"), said)
    if json:
        print_json({"captions": said, "skipped": skipped})
        return
    print_skipped(skipped)
    if out is not None:
        print(f"  {len(said):,} captions in {out}")
        return
    for one in said:
        print(f"{one.id}\t{one.caption}")
