"""`twofold evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, OnError, assigned, verb
from twofold.cli.show import print_evaluation, print_json


@verb
def evaluate(
    model: Annotated[Path, arg(metavar="MODEL")],
    /,
    *,
    data: Data,
    split: str = "test",
    limit: int | None = None,
    at: Literal["encoder", "head"] = "encoder",
    attentive: bool = False,
    baselines: bool = False,
    by: Annotated[str | None, arg(metavar="COLUMN")] = None,
    zero_shot: Annotated[tuple[str, ...], arg(metavar="TEMPLATE")] = (),
    between: Annotated[tuple[str, ...], arg(metavar="A B")] = (),
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Measure a model: neighbours, linear and few-shot probes of labels, recall both ways where there are pairs.

    examples:
      twofold evaluate runs/a --data photos/ --baselines
      twofold evaluate runs/a --data photos/ --at head
      twofold evaluate runs/c --data clips.csv --columns file=video --attentive
      twofold evaluate runs/b --data captions.csv --by group
      twofold evaluate runs/b --data photos/ --zero-shot "a photo of a {}" "a {} seen from above"

    Args:
        model: a bundle, or the folder of a run
        data: labelled or captioned pictures with splits, or labelled videos
        split: what is tested on; probes are fitted on "train"
        limit: fit the probes on the first so many items of "train"
        at: head: measure behind the head of the training, too; what it throws away, the encoder still has
        attentive: read the tokens of the encoder too, all of which are held in memory
        baselines: measure raw pixels, colours and the untrained encoder too
        by: recall for each value of this column too: label, split, or any other column of the data
        zero_shot: classify by the names of the classes, written into these sentences; several are averaged
        between: which two modalities, where model and data share more
        columns: which further columns of the manifest are modalities, each of a kind: image, text, audio, video, vector
        images: where the manifest's files are, if not beside it
        on_error: what to do with a file that cannot be read
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.models.bundle import Bundle

    measured = evaluate(
        Bundle.load(model, heads=at == "head"),
        open_source(data, images=images, columns=assigned("columns", columns)),
        split=split,
        limit=limit,
        at=at,
        attentive=attentive,
        baselines=baselines,
        by=by,
        templates=zero_shot,
        between=between,
        on_error=on_error,
        quiet=json,
    )
    if json:
        print_json(measured)
    else:
        print_evaluation(measured)
