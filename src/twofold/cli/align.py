"""`twofold align`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from twofold.cli.flags import Columns, Data, Folder, OnError, again, assigned, call, described
from twofold.cli.show import print_evaluation, print_json, print_report, print_skipped


def align(arguments: list[str]) -> None:
    """Bring two kinds of data into one space: pictures and captions, speech and transcripts, code and documentation.

    DATA is a manifest (CSV, JSONL, Parquet) with a column for each side, or "openmoji". As it comes, both encoders are
    frozen and two small heads learn in seconds; --train says what else does. Where the data name splits, "train" is
    learned from, "val" chooses the epoch to keep, and "test" is measured.

    examples:
      twofold align captions.csv --out runs/b
      twofold align captions.csv --out runs/c --objective clip --epochs 40
      twofold align captions.csv --out runs/d --train text --rates text 2e-5
      twofold align code.jsonl --out runs/e --towers docs=minilm code=minilm --columns docs=text code=text
      twofold align captions.csv --out runs/f --weights pairs/pairs.csv
      twofold align --feedback photos.index --out runs/g

    With --feedback the model of an index learns from what people said of its hits; `twofold align --feedback --help`
    has the flags of that.

    """
    if any(word.partition("=")[0] == "--feedback" for word in arguments):
        _from_feedback(arguments)
        return
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.train.align import TOWERS, Recipe
    from twofold.train.align import align as aligned
    from twofold.train.doctor_page import reported

    def verb(
        pairs: Data,
        /,
        *,
        out: Folder,
        towers: Annotated[tuple[str, ...], arg(metavar="A=ENCODER B=ENCODER")] = (),
        recipe: OmitArgPrefixes[Recipe] = Recipe(),  # noqa: B008 — frozen
        columns: Columns = (),
        images: Annotated[Path | None, arg(metavar="DIR")] = None,
        weights: Annotated[Path | None, arg(metavar="FILE")] = None,
        negatives: Annotated[Path | None, arg(metavar="FILE")] = None,
        on_error: OnError = "skip",
        log_to: str | None = None,
        report: bool = True,
        json: bool = False,
    ) -> None:
        """Flags.

        Args:
            pairs: items with both sides
            out: the run's folder; the bundle comes to lie in it
            towers: the two modalities and their encoders, image=efficientnet-lite0 text=minilm if nothing is said
            columns: which further columns are modalities, each of a kind: image, text, audio, video, vector
            images: where the manifest's files are, if not beside it
            weights: a table with id and weight (and text), 0..1: the share of its visits that a pair keeps
            negatives: hard negatives, as `twofold mine` writes them: the items meet in a batch
            on_error: what to do with a file that cannot be read
            log_to: tensorboard:DIR, wandb:PROJECT or mlflow:URI are told what the log is
            report: look at the run when it ends, and write what `twofold doctor` says of it to DIR/doctor.html
            json: print the result as JSON
        """
        chosen = assigned("towers", towers) or TOWERS
        source = open_source(pairs, images=images, columns=assigned("columns", columns))
        done = aligned(
            source,
            out=out,
            towers=chosen,
            recipe=recipe,
            weights=weights,
            negatives=negatives,
            on_error=on_error,
            log_to=log_to,
            quiet=json,
        )
        verdict = reported(out, source, quiet=json) if report else None
        figures = {
            "bundle": str(out / "bundle"),
            "fingerprint": done.bundle.fingerprint,
            "steps": done.run.steps,
            "seconds": done.run.seconds,
            "last": done.run.log[-1],
            "validation": {"before": done.before, "after": done.after},
            "skipped": [skip._asdict() for skip in done.skipped],
        }
        measured = None
        if source.splits is not None and "test" in source.splits:
            measured = evaluate(done.bundle, source, between=tuple(chosen), quiet=json)
        if json:
            print_json({**figures, "evaluation": measured})
            return
        print_skipped(done.skipped)
        last = done.run.log[-1]
        print(f"  loss {last['loss']:.3f} (chance {last['chance']:.3f}) after {done.run.steps:,} steps")
        if done.after is not None:
            print(
                f"  recall in validation {done.after:.3f} (step {done.run.best:,}), before training {done.before:.3f}"
            )
        if measured:
            print_evaluation(measured)
        print_report(verdict)
        given = again(pairs, images, columns)
        print(f"\n  {out / 'bundle'}\n  next: twofold index {given} --model {out} --out {out / 'index'}")

    call(verb, "align", arguments, description=described(align))


def _from_feedback(arguments: list[str]) -> None:
    """Let the model of an index learn from what people said of its hits, without forgetting what it knew.

    Only the words' head learns, so the index keeps its vectors. Pairs are replayed: those of DATA, else those that the
    model or the index was made from. The step is kept that does best on what was said and loses nothing on pairs held
    out. Then `twofold index` takes the model over, and the page shows judged questions before and after.

    examples:
      twofold align --feedback photos.index --out runs/g
      twofold align captions.csv --feedback photos.index --out runs/g --steps 60
      twofold index photos/ --model runs/g --out photos.index

    """
    from twofold.data.sources import open_source
    from twofold.learn import learn
    from twofold.train.feedback import Lesson

    def verb(
        pairs: Data | None = None,
        /,
        *,
        feedback: Annotated[Path, arg(metavar="INDEX")],
        out: Folder,
        lesson: OmitArgPrefixes[Lesson] = Lesson(),  # noqa: B008 — frozen
        images: Annotated[Path | None, arg(metavar="DIR")] = None,
        json: bool = False,
    ) -> None:
        """Flags.

        Args:
            pairs: pairs to replay, if not those that the model or the index was made from
            feedback: the index whose hits were judged
            out: the run's folder; the bundle comes to lie in it
            images: where the manifest's files are, if not beside it
            json: print the result as JSON
        """
        source = None if pairs is None else open_source(pairs, images=images)
        done = learn(feedback, out=out, pairs=source, lesson=lesson, quiet=json)
        if json:
            print_json(
                {
                    "bundle": out / "bundle",
                    "fingerprint": done.bundle.fingerprint,
                    "step": done.run.best,
                    "validation": {"before": done.recall[0], "after": done.recall[1], "worse": done.worse},
                    "ordered": {"before": done.ordered[0], "after": done.ordered[1]},
                    "questions": done.bundle.meta["feedback"]["questions"],
                }
            )
            return
        print(f"  {done.bundle.meta['feedback']['questions']:,} judged questions; step {done.run.best} is kept")
        print(f"  right before wrong: {done.ordered[0]:.3f} → {done.ordered[1]:.3f} (these were learned from)")
        print(f"  recall on pairs held out: {done.recall[0]:.3f} → {done.recall[1]:.3f}")
        source_of = "SOURCE" if pairs is None else pairs
        print(f"\n  {out / 'bundle'}\n  next: twofold index {source_of} --model {out} --out {feedback}")
        print(f"        twofold index --corrected {feedback}")

    call(verb, "align", arguments, description=described(_from_feedback))
