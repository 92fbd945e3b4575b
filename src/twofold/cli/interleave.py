"""`twofold interleave`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from twofold.cli.flags import Data, Folder, OnError, call, described
from twofold.cli.show import print_json, print_skipped


def interleave(arguments: list[str]) -> None:
    """Teach a language model to read pictures among its words: pages of both in any order, or captioned pictures.

    DATA is JSONL, a document a line, [{"text": "Day one."}, {"image": "harbour.jpg"}, …]; or a manifest with captions.
    What comes out captions (`twofold caption`), says how likely a text is (`twofold score`), and embeds pictures.

    examples:
      twofold interleave pages.jsonl --out runs/p
      twofold interleave captions.csv --out runs/q --size 160 --epochs 5
      twofold interleave pages.jsonl --out runs/r --language hf:HuggingFaceTB/SmolLM2-135M --length 512
      twofold interleave pages.jsonl --out runs/s --picture timm:vit_tiny_patch16_224/16 --sees patches --pixels 1

    """
    from twofold.train.interleave import Reading, open_pages
    from twofold.train.interleave import interleave as interleaved

    def verb(
        data: Data,
        /,
        *,
        out: Folder,
        recipe: OmitArgPrefixes[Reading] = Reading(),  # noqa: B008 — frozen
        images: Annotated[Path | None, arg(metavar="DIR")] = None,
        on_error: OnError = "skip",
        json: bool = False,
    ) -> None:
        """
        Args:
            data: documents, or a manifest of pictures with captions; of named splits "train", "val" chooses the epoch
            out: the run's folder; the bundle comes to lie in it
            images: where the pictures are, if not beside the file
            on_error: what to do with documents that are empty, and pictures that cannot be read
            json: print the result as JSON
        """
        documents, held = open_pages(data, images=images, on_error=on_error)
        done = interleaved(documents, out=out, recipe=recipe, held=held, on_error=on_error, quiet=json)
        last = done.run.log[-1]
        if json:
            figures = {"bundle": out / "bundle", "steps": done.run.steps, "seconds": done.run.seconds, "last": last}
            print_json({**figures, "cost": done.cost, "split": done.split, "skipped": done.skipped})
            return
        print_skipped(done.skipped)
        if done.split:
            print(f"  {done.split:,} documents are longer than {recipe.length} tokens and were split: see --length")
        if done.cost is not None:
            print(f"  a token costs {done.cost:.3f} nats in validation")
        print(f"\n  {out / 'bundle'}\n  next: twofold caption photos/ --model {out}")

    call(verb, "interleave", arguments, description=described(interleave))
