"""`twofold align`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from twofold.cli.flags import Data, Folder, OnError, call, described
from twofold.cli.show import print_evaluation, print_json, print_skipped


def align(arguments: list[str]) -> None:
    """Bring pictures and their texts into one space: two frozen encoders, two small heads that learn in seconds.

    DATA is a manifest (CSV, JSONL, Parquet) with a picture and a text column, or "openmoji". Where it names splits,
    "train" is learned from and "test" is measured.

    examples:
      twofold align captions.csv --out runs/b
      twofold align captions.csv --out runs/c --objective clip --epochs 40

    """
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.train.align import Recipe
    from twofold.train.align import align as aligned

    def verb(
        pairs: Data,
        /,
        *,
        out: Folder,
        recipe: OmitArgPrefixes[Recipe] = Recipe(),  # noqa: B008 — frozen
        image: str = "efficientnet-lite0",
        text: str = "minilm",
        images: Annotated[Path | None, arg(metavar="DIR")] = None,
        on_error: OnError = "skip",
        json: bool = False,
    ) -> None:
        """
        Args:
            pairs: pictures with texts
            out: the run's folder; the bundle comes to lie in it
            image: the picture encoder
            text: the text encoder, "minilm" or "hf:FOLDER"
            images: where the manifest's pictures are, if not beside it
            on_error: what to do with a picture that cannot be read
            json: print the result as JSON
        """
        source = open_source(pairs, images=images)
        done = aligned(source, out=out, image=image, text=text, recipe=recipe, on_error=on_error, quiet=json)
        figures = {
            "bundle": str(out / "bundle"),
            "fingerprint": done.bundle.fingerprint,
            "steps": done.run.steps,
            "seconds": done.run.seconds,
            "last": done.run.log[-1],
        }
        measured = None
        if source.splits is not None and "test" in source.splits:
            measured = evaluate(done.bundle, source, quiet=json)
        if json:
            print_json({**figures, "evaluation": measured})
            return
        print_skipped(done.skipped)
        last = done.run.log[-1]
        print(f"  loss {last['loss']:.3f} (chance {last['chance']:.3f}) after {done.run.steps:,} steps")
        if measured:
            print_evaluation(measured)
        print(f"\n  {out / 'bundle'}\n  next: twofold index {pairs} --model {out} --out {out / 'index'}")

    call(verb, "align", arguments, description=described(align))
