"""The main job on shipped data, start to end: pictures and words come to share a space, and are searched."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twofold.data.samples import ATTRIBUTION, openmoji
from twofold.data.sources import Source
from twofold.measure.embed import embed
from twofold.measure.evaluate import Paired, evaluate
from twofold.models.bundle import Bundle
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.index import Index
from twofold.retrieve.store import Hit
from twofold.terminal import CONSOLE, recall_table
from twofold.train.align import Recipe, align

RECIPE = Recipe(batch=512, epochs=40)

# What is asked of the index: words, an emoji's picture by its id, or both.
QUERIES: tuple[dict[str, Any], ...] = (
    {"text": "something sweet"},
    {"text": "a red heart"},
    {"text": "it is raining"},
    {"like": "1F436"},  # dog face
    {"like": "1F34E", "text": "green"},  # red apple
)
SHOWN = 6  # hits a query


def demo(out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run the demo in the folder `out`, printing as it goes unless `quiet`; returns every figure it shows.

    Each stage keeps what it has done, so a demo that was stopped goes on from there.
    """
    started = time.monotonic()
    console = Console(quiet=True) if quiet else CONSOLE
    emoji = openmoji()
    sizes = {split: len(emoji.split(split)) for split in ("train", "val", "test")}
    families = len(set(emoji.meta["family"]))
    _heading(console, 1, "Data", f"{len(emoji):,} emoji in {families:,} families · " + _listed(sizes))
    console.print(f"  {ATTRIBUTION}", style="dim", highlight=False)

    _heading(console, 2, "Embed", "EfficientNet-Lite0 sees, MiniLM reads; both frozen, each item once")
    texts = spoken(emoji)
    seen = embed(image_encoder(), emoji, "image", quiet=quiet)
    read = embed(text_encoder(), texts, "text", quiet=quiet)
    console.print(
        f"  {len(seen.matrix):,} pictures and {len(read.matrix):,} texts have their features", highlight=False
    )

    _heading(console, 3, "Align", "two small heads, sigmoid loss, on the training families")
    aligned = align(texts, out=out, recipe=RECIPE, quiet=quiet)
    last = aligned.run.log[-1]
    console.print(
        f"  loss {last['loss']:.3f} after {aligned.run.steps:,} steps; chance is {last['chance']:.3f}", highlight=False
    )

    _heading(console, 4, "Evaluate", "names and pictures that neither head has seen; 95 % intervals")
    test = named(emoji.split("test"))
    recall = {
        name: _paired(bundle, test) for name, bundle in (("trained", aligned.bundle), ("untrained", aligned.untrained))
    }
    console.print(recall_table(recall))

    _heading(console, 5, "Index", "every emoji that a terminal can print, in an embedded Chroma")
    built = Index.build(printable(emoji), aligned.bundle, out / "index", existing="prune", texts="none")
    console.print(f"  {built.items:,} items in {out / 'index'}", highlight=False)

    _heading(console, 6, "Search", "scores are cosines: an order, not a probability")
    with Index.open(out / "index", aligned.bundle) as index:
        answers = [(_asked(query, emoji), index.search(**query, k=SHOWN)) for query in QUERIES]
    console.print(_answers(answers))

    seconds = time.monotonic() - started
    console.print(f"\n  {seconds:.0f} s in all. Next:", highlight=False)
    for command in (f'twofold search {out / "index"} "time to sleep"', "twofold align --help", "twofold --help"):
        console.print(f"    {command}", style="bold", highlight=False)
    return {
        "data": {"items": len(emoji), "families": families, "splits": sizes},
        "training": {"loss": last["loss"], "chance": last["chance"], "steps": aligned.run.steps},
        "recall": {name: _figures(paired) for name, paired in recall.items()},
        "index": {"path": str(out / "index"), "items": built.items, "embedded": built.embedded},
        "searches": [{"query": query, "hits": [_hit(hit) for hit in hits]} for query, hits in answers],
        "seconds": round(seconds, 1),
    }


def spoken(emoji: Source) -> Source:
    """Each emoji with two texts, its name and its tags, for training to alternate between."""
    texts = [
        [name, tags] if tags else [name] for name, tags in zip(emoji.meta["name"], emoji.meta["tags"], strict=True)
    ]
    return replace(emoji, texts=texts)


def named(emoji: Source) -> Source:
    """Each emoji with its name alone."""
    return replace(emoji, texts=[[name] for name in emoji.meta["name"]])


def _paired(bundle: Bundle, test: Source) -> Paired:
    measured = evaluate(bundle, replace(test, labels=None), quiet=True).paired
    assert measured is not None  # the test split has names
    return measured


def _asked(query: dict[str, str], emoji: Source) -> str:
    """The query as a person would put it."""
    at = emoji.ids.index(query["like"]) if "like" in query else None
    picture = None if at is None else f"picture of {emoji.meta['emoji'][at]}"
    words = f"“{query['text']}”" if "text" in query else None
    return " + ".join(part for part in (picture, words) if part)


def _answers(answers: list[tuple[str, list[Hit]]]) -> Table:
    made = Table(box=None, padding=(0, 2), pad_edge=True, show_header=False)
    made.add_column(no_wrap=True, style="bold")
    made.add_column()
    for query, hits in answers:
        made.add_row(query, "  ".join(str(hit.meta["emoji"]) for hit in hits))
        made.add_row("", "[dim]" + " · ".join(f"{hit.meta['name']} {hit.score:.2f}" for hit in hits) + "[/dim]")
    return made


def printable(emoji: Source) -> Source:
    """Without OpenMoji's own drawings, whose codes are for private use: no terminal has a glyph for them."""
    private = [any("\ue000" <= character <= "\uf8ff" for character in one) for one in emoji.meta["emoji"]]
    return emoji.take([at for at, own in enumerate(private) if not own])


def _heading(console: Console, number: int, what: str, about: str) -> None:
    console.print(f"\n[bold]{number}  {what}[/bold]  {about}", highlight=False)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())


def _figures(paired: Paired) -> dict[str, Any]:
    return {
        direction: {
            "recall": {str(k): found.recall[k]._asdict() for k in found.recall},
            "chance": {str(k): value for k, value in found.chance.items()},
            "median_rank": found.median_rank,
            "gallery": found.gallery,
        }
        for direction, found in paired.items()
    }


def _hit(hit: Hit) -> dict[str, Any]:
    return {"id": hit.id, "emoji": hit.meta["emoji"], "name": hit.meta["name"], "score": round(hit.score, 4)}
