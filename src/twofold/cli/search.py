"""`twofold search`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from twofold.cli.flags import verb
from twofold.cli.show import print_hints, print_hits, print_json, print_verdict

if TYPE_CHECKING:
    from twofold.retrieve.queries import Query
    from twofold.retrieve.retriever import Retriever


@verb
def search(
    index: Annotated[Path, arg(metavar="INDEX")],
    text: Annotated[str | None, arg(metavar="WORDS")] = None,
    /,
    *,
    image: Annotated[Path | None, arg(metavar="FILE")] = None,
    like: tuple[str, ...] = (),
    unlike: tuple[str, ...] = (),
    minus: str | None = None,
    weight: float = 0.5,
    k: int = 10,
    offset: int = 0,
    spread: float = 0.0,
    distinct: float | None = None,
    via: Literal["both", "items", "texts"] = "both",
    where: tuple[str, ...] = (),
    queries: Annotated[Path | None, arg(metavar="FILE")] = None,
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
    explain: bool = False,
    json: bool = False,
) -> None:
    """Search an index with words, a picture, an item of it, or several of them together.

    examples:
      twofold search photos.index "a red boat at dusk"
      twofold search photos.index --image boat.jpg "in the snow"
      twofold search photos.index --like 1F496 --where group=symbols --k 5
      twofold search photos.index --queries asked.csv --out found.jsonl
      twofold search photos.index --explain

    Args:
        index: the index's folder
        text: what to look for, in words
        image: a picture to look for the like of
        like: items of the index to look for the like of
        unlike: items to lead away from
        minus: words to lead away from
        weight: the words' share where a picture or an item is given too, 0..1
        k: how many
        offset: how many to pass over first
        spread: how much the hits shall differ from each other, 0..1
        distinct: leave out hits whose cosine with a better one is at least this, 1 for what is the same
        via: which spaces words are asked in, where the index has one of its texts, too
        where: only items whose metadata are so: column=value
        queries: many searches: a .txt with one a line, or a table (.csv, .jsonl) with columns named like the flags
        out: where the answers to --queries go, .csv or .jsonl; standard output if nothing is said
        explain: say how the index is searched, and how much of what is nearest it finds, as measured now
        json: print the result as JSON
    """

    from twofold.errors import UsageError
    from twofold.retrieve.explain import explain as explained
    from twofold.retrieve.filters import parse_where
    from twofold.retrieve.index import Index
    from twofold.retrieve.queries import check_output, read_queries

    named = {"minus": minus, "weight": weight, "k": k, "offset": offset, "spread": spread, "where": parse_where(where)}
    named |= {"distinct": distinct, "via": via}
    one = text is not None or image is not None or bool(like)
    if queries is not None:
        if one or unlike or explain:
            raise UsageError("--queries says what to look for: give it without words, pictures, items and --explain.")
        asked = read_queries(queries)
        if out is not None:
            check_output(out)
        with Index.open(index) as opened:
            _answer_all(opened.retriever, asked, named, out, json)
        return
    if out is not None:
        raise UsageError("--out is where the answers to --queries go; there are no --queries.")
    if not one and not explain:
        raise UsageError(f'There is nothing to search for: `twofold search {index} "a red boat"`, --image or --like.')
    with Index.open(index) as opened:
        hits = None
        if one or not explain:
            hits = opened.search(text, image=image, like=like, unlike=unlike, **named)  # type: ignore[arg-type]
            print_verdict(opened.retriever, hits, from_best=offset == 0)
            if hits and hits[0].spaces:
                print_hints(opened.hints())
        how = explained(opened) if explain else None
    if json:
        found = None if hits is None else [hit._asdict() for hit in hits]
        print_json(found if how is None else {"hits": found, "explained": asdict(how)})
        return
    if how is not None:
        print("\n".join(f"  {line}" for line in how.lines()), file=sys.stderr)
    if hits is not None:
        print_hits(hits)


def _answer_all(retriever: "Retriever", asked: list["Query"], named: dict, out: Path | None, json: bool) -> None:
    """Search for each, and show or write what was found; those that fail are named, and the others are answered."""
    from twofold.progress import Line
    from twofold.retrieve.queries import answer, told, write_answers

    answers = []
    with Line("search", unit="queries", quiet=json) as line:
        for number, query in enumerate(asked, 1):
            answers.append(answer(retriever, query, **named))
            line.update(number, len(asked))
    failed = [one for one in answers if one.error]
    for one in failed:
        print(f"  query {one.query}: {one.error}", file=sys.stderr)
    if out is not None:
        write_answers(out, answers)
    if json:
        print_json([told(one) for one in answers])
    elif out is None:
        for one in answers:
            print_json(told(one))
    else:
        print(f"  {len(asked) - len(failed):,} of {len(asked):,} queries answered in {out}")
