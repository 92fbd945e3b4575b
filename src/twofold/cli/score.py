"""`twofold score`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import Data, OnError, verb
from twofold.cli.show import print_json, print_skipped


@verb
def score(
    data: Data,
    /,
    *,
    model: Annotated[Path, arg(metavar="MODEL")],
    out: Annotated[Path, arg(metavar="FILE")],
    split: str | None = None,
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """How likely are texts for their pictures? A second opinion on pairs, by a model of `interleave` or `train coca`.

    FILE has the columns id, text, nats (the logarithm of the text's probability behind its picture), tokens, and gain:
    how much likelier the text is behind its picture than behind others. Below 0, its picture speaks against it. Rows
    begin with the least gain.

    examples:
      twofold score captions.csv --model runs/p --out scores.csv

    Args:
        data: pictures with texts
        model: a bundle, or the folder of a run
        out: the CSV file to write
        split: the pairs of this split alone
        images: where the manifest's pictures are, if not beside it
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.cli.show import write_csv
    from twofold.data.sources import open_source
    from twofold.measure.likelihood import score
    from twofold.models.bundle import Bundle

    source = open_source(data, images=images)
    source = source if split is None else source.split(split)
    scored, skipped = score(Bundle.load(model), source, on_error=on_error, quiet=json)
    scored.sort(key=lambda one: one.gain)
    write_csv(out, ("id", "text", "nats", "tokens", "gain"), scored)
    against = sum(one.gain < 0 for one in scored)
    if json:
        print_json({"out": out, "texts": len(scored), "against": against, "skipped": skipped})
        return
    print_skipped(skipped)
    print(f"  {len(scored):,} texts in {out}; against {against:,} of them their picture speaks")
    for one in scored[:5]:
        print(f"  {one.gain:8.2f}  {one.id[:40]}: {one.text[:60]}")
