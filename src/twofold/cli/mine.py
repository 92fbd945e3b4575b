"""`twofold mine`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from twofold.cli.flags import Columns, Data, OnError, again, assigned, call, described
from twofold.cli.show import print_json, print_skipped


def mine(arguments: list[str]) -> None:
    """Find hard negatives: for each picture the texts that a model confuses with its own, without those that fit too.

    Guards remove what may be another right answer: the same item or words, near-duplicates, pictures that look the
    same, and whatever scores too close to the right answer. How many each removed is told, with examples; --naive
    takes them all. FILE (.jsonl, .csv, .parquet) has the columns anchor, positive, negative_1 … that
    sentence-transformers trains with; FILE.ids beside it says which items they are, for `twofold align --negatives`.

    examples:
      twofold mine captions.csv --model runs/b --out hard.jsonl --count 30 --triplets
      twofold mine products.csv --model runs/b --out hard.csv --same brand
      twofold align captions.csv --out runs/c --objective clip --batch 16 --negatives hard.jsonl
      twofold mine --feedback photos.index --out clicks.jsonl

    With --feedback the negatives are not mined: they are what people found wrong among an index's hits.

    """
    if any(word.partition("=")[0] == "--feedback" for word in arguments):
        _from_feedback(arguments)
        return
    from twofold.data.sources import open_source
    from twofold.mining import NAIVE, Guards
    from twofold.models.bundle import Bundle
    from twofold.train.mine import MinedPairs, check_name, ids_path, write
    from twofold.train.mine import mine as mined

    def verb(
        data: Data,
        /,
        *,
        model: Annotated[Path, arg(metavar="MODEL")],
        out: Annotated[Path, arg(metavar="FILE")],
        guards: OmitArgPrefixes[Guards] = Guards(),  # noqa: B008 — frozen
        naive: bool = False,
        anchor: str = "image",
        against: str = "text",
        count: int = 5,
        depth: int = 100,
        by: tuple[str, ...] = (),
        triplets: bool = False,
        columns: Columns = (),
        images: Annotated[Path | None, arg(metavar="DIR")] = None,
        on_error: OnError = "skip",
        json: bool = False,
    ) -> None:
        """
        Args:
            data: the pairs; of named splits, "train" is mined
            model: a bundle, or the folder of a run
            out: the file of triplets or tuples
            naive: no guards: whatever is near is a negative
            anchor: the modality to mine for
            against: the modality to find negatives in; the same one for texts that have several
            count: negatives of each anchor
            depth: candidates that are looked at
            by: columns, and "label", whose equal values mean that two items are no negatives of each other
            triplets: one negative a row, and whatever there are; else rows that have all of them
            columns: further columns that are modalities, as NAME=KIND
            images: where the manifest's pictures are, if not beside it
            on_error: what to do with an item that cannot be read
            json: print the result as JSON
        """
        check_name(out)  # before an hour of mining
        source = open_source(data, images=images, columns=assigned("columns", columns))
        done = mined(
            source,
            Bundle.load(model),
            anchor=anchor,
            against=against,
            k=count,
            guards=NAIVE if naive else guards,
            same=by,
            depth=depth,
            on_error=on_error,
            quiet=json,
        )
        rows = write(done, out, triplets=triplets)
        if json:
            print_json({"out": out, "ids": ids_path(out), "rows": rows} | _told(done))
            return
        print_skipped(done.skipped)
        print(f"  {rows:,} rows in {out}; {done.mined.looked:,} candidates looked at")
        if done.mined.short:
            print(f"  {done.mined.short:,} of {len(done.asked):,} have fewer than {count}: look deeper with --depth")
        for name, removed in done.mined.removed.items():
            print(f"  {name:<24} {removed.candidates:>9,} removed, {removed.alone:,} by it alone")
            for example in removed.examples[:2]:
                print(f"    {_shown(done, example)}")
        print(f"  next: twofold align {again(data, images, columns)} --out runs/harder --negatives {out}")

    def _told(done: MinedPairs) -> dict:
        removed = {
            name: {**found._asdict(), "examples": [_shown(done, one) for one in found.examples]}
            for name, found in done.mined.removed.items()
        }
        skipped = [skip._asdict() for skip in done.skipped]
        return {"looked": done.mined.looked, "short": done.mined.short, "removed": removed, "skipped": skipped}

    def _shown(done: MinedPairs, example: object) -> str:
        one = example._asdict()  # type: ignore[attr-defined]
        query = done.anchors.written(done.asked[one["query"]], done.source)
        positive, candidate = (
            done.candidates.written(one[name], done.source)[:60] for name in ("positive", "candidate")
        )
        query = query if len(query) <= 40 else f"⋯{query[-39:]}"  # of a path, its end tells
        return f"{query}: {candidate!r} {one['score']:.3f} beside {positive!r} {one['positive_score']:.3f}"

    call(verb, "mine", arguments, description=described(mine))


def _from_feedback(arguments: list[str]) -> None:
    """Write what people said of an index's hits as hard negatives: anchor (what was asked), positive, negative.

    sentence-transformers trains with FILE as it is; FILE.ids beside it is for `twofold align --negatives`.

    examples:
      twofold mine --feedback photos.index --out clicks.jsonl
      twofold align captions.csv --out runs/c --negatives clicks.jsonl

    """
    from twofold.learn import export
    from twofold.train.mine import ids_path

    def verb(
        *,
        feedback: Annotated[Path, arg(metavar="INDEX")],
        out: Annotated[Path, arg(metavar="FILE")],
        json: bool = False,
    ) -> None:
        """
        Args:
            feedback: the index whose hits were judged
            out: the file of triplets
            json: print the result as JSON
        """
        rows = export(feedback, out)
        if json:
            print_json({"out": out, "ids": ids_path(out), "rows": rows})
        else:
            print(f"  {rows:,} rows in {out}, their ids in {ids_path(out)}")

    call(verb, "mine", arguments, description=described(_from_feedback))
