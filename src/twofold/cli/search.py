"""`twofold search`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from twofold.cli.flags import verb
from twofold.cli.show import print_hits, print_json, print_verdict


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
    where: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Search an index with words, a picture, an item of it, or several of them together.

    examples:
      twofold search photos.index "a red boat at dusk"
      twofold search photos.index --image boat.jpg "in the snow"
      twofold search photos.index --like 1F496 --where group=symbols --k 5

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
        where: only items whose metadata are so: column=value
        json: print the result as JSON
    """
    from contextlib import closing

    from twofold.retrieve.index import Index
    from twofold.retrieve.store import parse_where

    wanted = parse_where(where)
    with closing(Index.open(index)) as opened:
        hits = opened.search(
            text,
            image=image,
            like=like,
            unlike=unlike,
            minus=minus,
            weight=weight,
            k=k,
            offset=offset,
            spread=spread,
            where=wanted,
        )
        print_verdict(opened.retriever, hits, from_best=offset == 0)
    if json:
        print_json([hit._asdict() for hit in hits])
    else:
        print_hits(hits)
