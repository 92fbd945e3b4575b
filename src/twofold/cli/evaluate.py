"""`twofold evaluate`."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import Data, OnError, verb
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
    baselines: bool = False,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Measure a model: kNN and linear probe where there are labels, recall both ways where there are captions.

    examples:
      twofold evaluate runs/a --data photos/ --baselines
      twofold evaluate runs/a --data photos/ --at head
      twofold evaluate runs/b --data captions.csv

    Args:
        model: a bundle, or the folder of a run
        data: labelled or captioned pictures with splits
        split: what is tested on; probes are fitted on "train"
        limit: fit the probes on the first so many items of "train"
        at: head: measure behind the head of the training, too; what it throws away, the encoder still has
        baselines: measure raw pixels and the untrained encoder too
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.models.bundle import Bundle

    measured = evaluate(
        Bundle.load(model, heads=at == "head"),
        open_source(data),
        split=split,
        limit=limit,
        at=at,
        baselines=baselines,
        on_error=on_error,
        quiet=json,
    )
    if json:
        print_json(measured)
    else:
        print_evaluation(measured)
