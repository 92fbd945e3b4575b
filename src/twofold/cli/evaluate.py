"""`twofold evaluate`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import Columns, OnError, assigned, verb
from twofold.cli.show import print_evaluation, print_json, print_suite, print_unlabelled


@verb
def evaluate(
    models: Annotated[tuple[Path, ...], arg(metavar="MODEL …")],
    /,
    *,
    data: Annotated[str | None, arg(metavar="DATA")] = None,
    suite: Annotated[Path | None, arg(metavar="FILE")] = None,
    split: str = "test",
    limit: int | None = None,
    at: Annotated[str, arg(metavar="encoder|head|layer:N")] = "encoder",
    attentive: bool = False,
    fine_tune: bool = False,
    epochs: int = 10,
    baselines: bool = True,
    by: Annotated[str | None, arg(metavar="COLUMN")] = None,
    zero_shot: Annotated[tuple[str, ...], arg(metavar="TEMPLATE")] = (),
    between: Annotated[tuple[str, ...], arg(metavar="A B")] = (),
    columns: Columns = (),
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Measure models: what neighbours, linear probes and few labels read, what is found and clustered, recall both
    ways where there are pairs; beside raw pixels, colours, the encoder untrained and one with ImageNet's weights.

    examples:
      twofold evaluate runs/a --data photos/
      twofold evaluate runs/a runs/b --data photos/              # which is surely better, on the same pictures?
      twofold evaluate runs/a runs/b --data unlabelled/          # which promises more, by what needs no labels?
      twofold evaluate runs/a --data photos/ --fine-tune         # and when the encoder may learn along?
      twofold evaluate runs/a --suite suite.toml                 # several data sets, and away from home
      twofold evaluate runs/a --data photos/ --at layer:3
      twofold evaluate runs/c --data clips.csv --columns file=video --attentive
      twofold evaluate runs/b --data captions.csv --by group
      twofold evaluate runs/b --data photos/ --zero-shot "a photo of a {}" "a {} seen from above"

    Args:
        models: bundles, folders of runs, or encoders of pictures by name
        data: labelled or captioned pictures with splits, or labelled videos
        suite: several labelled data sets instead of --data: a TOML file of [[data]] with name, path and, for pictures
            of another domain, fit = the name of the set that probes learn from
        split: what is tested on; probes are fitted on "train"
        limit: fit the probes on so many items of "train", drawn at random
        at: head: measure behind the head of the training, too; what it throws away, the encoder still has. layer:3:
            measure at the third layer, too
        attentive: read the tokens of the encoder too, all of which are held in memory
        fine_tune: train a copy of each encoder on the labels too, its learning rate chosen on a fifth of them
        epochs: of --fine-tune
        baselines: leave out raw pixels, colours, the untrained encoder and ImageNet's weights
        by: recall for each value of this column too: label, split, or any other column of the data
        zero_shot: classify by the names of the classes, written into these sentences; several are averaged
        between: which two modalities, where model and data share more
        columns: which further columns of the manifest are modalities, each of a kind: image, text, audio, video, vector
        images: where the manifest's files are, if not beside it
        on_error: what to do with a file that cannot be read
        json: print the result as JSON
    """
    import functools

    from twofold.data.sources import open_source
    from twofold.errors import UsageError
    from twofold.measure.evaluate import evaluate
    from twofold.measure.suite import read_suite, task
    from twofold.measure.suite import suite as measured_suite
    from twofold.models.bundle import Bundle

    if (data is None) == (suite is None):
        raise UsageError("evaluate takes --data or --suite, one of them.")
    if not models:
        raise UsageError("evaluate takes a model: a bundle, the folder of a run, or the name of an encoder.")
    tuned = None
    if fine_tune:
        from twofold.train.fine_tune import fine_tune as tune

        tuned = functools.partial(tune, epochs=epochs)
    bundles = {name: Bundle.of(path, heads=at == "head") for name, path in zip(named(models), models, strict=True)}
    if suite is None and len(models) == 1:
        assert data is not None
        measured = evaluate(
            next(iter(bundles.values())),
            open_source(data, images=images, columns=assigned("columns", columns)),
            split=split,
            limit=limit,
            at=at,
            attentive=attentive,
            fine_tune=tuned,
            baselines=baselines,
            by=by,
            templates=zero_shot,
            between=between,
            on_error=on_error,
            quiet=json,
        )
        print_json(measured) if json else print_evaluation(measured)
        return
    if by or zero_shot or between:
        raise UsageError("--by, --zero-shot and --between measure one model on one data set.")
    if suite is not None:
        tasks = read_suite(suite)
    else:
        assert data is not None
        source = open_source(data, images=images, columns=assigned("columns", columns))
        if source.labels is None and "image" in source.modalities:
            from twofold.measure.selection import looked_at

            found = looked_at(bundles, source, limit=limit or 2000)
            print_json(found) if json else print_unlabelled(found)
            return
        tasks = [task(source.name, source, split=split, limit=limit)]
    done = measured_suite(bundles, tasks, at=at, attentive=attentive, fine_tune=tuned, baselines=baselines, quiet=json)
    print_json(done) if json else print_suite(done)


def named(models: tuple[Path, ...]) -> list[str]:
    """Models by the last part of their paths that tells them apart; encoders by their names."""
    places = [model.parts if model.exists() else (str(model),) for model in models]
    for parts in range(1, max(map(len, places), default=1) + 1):
        names = ["/".join(place[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [f"{model} ({number})" for number, model in enumerate(models, 1)]
