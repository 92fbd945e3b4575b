"""`twofold calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, OnError, assigned, verb
from twofold.cli.show import print_calibrated, print_json

if TYPE_CHECKING:
    from twofold.data.sources import Source


@verb
def calibrate(
    model: Annotated[Path, arg(metavar="MODEL")],
    /,
    *,
    data: Data,
    split: str = "val",
    queries: str | None = None,
    kind: Literal["platt", "isotonic", "siglip"] = "platt",
    cost: float = 0.05,
    remedy: Literal["none", "best", "centring", "qb-norm", "nnn"] = "none",
    diagram: Annotated[Path | None, arg(metavar="FILE.svg")] = None,
    between: Annotated[tuple[str, ...], arg(metavar="A B")] = (),
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Teach a model what its scores mean: hits get probabilities, and a search says when nothing matches.

    MODEL keeps the calibration; its vectors and fingerprint stay. An index has a model of its own in INDEX/model:
    calibrate that, or run `twofold index` again. Of an INDEX with a space of texts, it is the answer of both spaces
    that is calibrated: how much the texts weigh is fitted, too, and the index keeps it.

    examples:
      twofold calibrate runs/b --data captions.csv
      twofold calibrate runs/b --data captions.csv --cost 0.1 --diagram reliability.svg
      twofold calibrate photos.index/model --data captions.csv --remedy best
      twofold calibrate photos.index --data captions.csv

    Args:
        model: a bundle, the folder of a run, or an index
        data: pairs, of which one split was not trained on
        split: the held-out pairs
        queries: the modality that is searched with, if it is not text
        kind: a logistic curve, any rising curve, or SigLIP's own sigmoid at corrected odds
        cost: the share of queries with an answer that may be told "no good match"
        remedy: against hubs; best takes what gains most on the split, if anything does
        diagram: a reliability diagram to write
        between: which two modalities, where model and data share more
        columns: which further columns of the manifest are modalities, each of a kind: image, text, audio, video, vector
        images: where the manifest's files are, if not beside it
        on_error: what to do with a file that cannot be read
        json: print the result as JSON
    """
    from twofold.data.atomic import write_atomically
    from twofold.data.sources import open_source
    from twofold.errors import UsageError
    from twofold.measure.calibrate import calibrate, keep
    from twofold.measure.calibration import diagram as drawn
    from twofold.models.bundle import Bundle

    if (model / "index.json").is_file():
        if (queries, kind, remedy, diagram, between) != (None, "platt", "none", None, ()):
            raise UsageError("Of an index, --split, --cost and --json can be said; the others are for its model.")
        opened = open_source(data, images=images, columns=assigned("columns", columns))
        _calibrate_index(model, opened, split, cost, json)
        return
    done = calibrate(
        Bundle.load(model),
        open_source(data, images=images, columns=assigned("columns", columns)),
        split=split,
        queries=queries,
        kind=kind,
        cost=cost,
        remedy=remedy,
        between=between,
        on_error=on_error,
        quiet=json,
    )
    bundle = keep(model, done)
    if diagram is not None:
        raw = {} if done.raw is None else {"SigLIP's sigmoid, at training odds": done.raw.bins}
        curves = {**raw, str(done.calibration.kind): done.honesty.bins}
        page = drawn(curves, title=f"Hits of held-out queries ({split})")
        write_atomically(diagram, lambda path: path.write_text(page, "utf-8"))
    if json:
        record = done.calibration.record()
        if record["remedy"]:
            del record["remedy"]["vectors"]
        print_json(
            {
                "bundle": str(bundle),
                "way": done.way,
                "calibration": record,
                "honesty": done.honesty,
                "raw": done.raw,
                "tried": {remedy.kind: remedy.gain for remedy in done.tried},
                "skipped": done.skipped,
            }
        )
        return
    print_calibrated(done)
    print(f"\n  kept in {bundle}")
    if diagram is not None:
        print(f"  {diagram}")


def _calibrate_index(path: Path, data: "Source", split: str, cost: float, json: bool) -> None:
    from twofold.progress import Line
    from twofold.retrieve.fit_fusion import fit_fusion, keep
    from twofold.retrieve.index import Index

    with Index.open(path) as opened, Line("ask", unit="questions", quiet=json) as line:
        done = fit_fusion(opened, data, split=split, cost=cost, progress=line.update)
    kept = keep(path, done)
    if json:
        print_json({"index": str(path), "fusion": done.fusion.record(), "first": done.first, "honesty": done.honesty})
        return
    print(f"  {done.questions:,} questions; the item that is meant comes first:")
    for name, share in done.first.items():
        print(f"  {name:<8} {share}")
    print(f"  texts weigh {done.fusion.weight:.2f}, calibration error {done.honesty.ece}\n  kept in {kept}")
