"""Does a docstring find its function? Python's standard library, recall on packages that were not learned from.

    python benchmarks/code_docs.py      # ten minutes on one core, most of it embedding

The functions of the standard library that runs this, without its tests and its tutorials of widgets. Whole packages are
held out, by the hashes of their names: a tenth to choose the epoch, a fifth to measure. MiniLM reads both sides; it was
made for sentences, and its cosine as it comes is what heads on it are held against. `names hidden` measures the same
where each function is called `f`, by which no word of the docstring can match its name.
"""

import argparse
import json
import os
import platform
import re
import sysconfig
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from twofold.data.sources import Column, Source, content_key, open_source
from twofold.measure.evaluate import both_ways
from twofold.measure.matched import matched
from twofold.models.bundle import Bundle
from twofold.train.align import Recipe, align

RESULTS = Path(__file__).parent / "results" / "code_docs.json"
WITHOUT = ("test", "idlelib", "lib2to3", "turtledemo", "distutils", "tkinter")
TOWERS = {"text": "minilm", "code": "minilm"}
RECIPES = {
    "linear heads on MiniLM": Recipe(objective="clip", epochs=30, batch=512),
    "the same, SigLIP": Recipe(objective="siglip", epochs=30, batch=512),
}
SEEDS = (0, 1, 2)


def library(limit: int | None) -> Source:
    """The functions, by packages: what is called train, val and test shares no package."""
    found = open_source(f"python:{sysconfig.get_path('stdlib')}")
    package = [file.split("/")[0].removesuffix(".py") for file in found.meta["file"]]
    kept = [item for item, name in enumerate(package) if name not in WITHOUT][:limit]
    names = sorted({package[item] for item in kept}, key=content_key)
    tenth = max(1, len(names) // 10)
    held = dict.fromkeys(names[: 2 * tenth], "test") | dict.fromkeys(names[2 * tenth : 3 * tenth], "val")
    source = found.take(kept)
    return replace(source, splits=[held.get(package[item], "train") for item in kept])


def hidden(source: Source) -> Source:
    """The same with each function called f."""
    cells = []
    for name, (code,) in zip(source.ids, source.column("code").cells, strict=True):
        own = re.sub(r":\d+$", "", name).rpartition(":")[2].rpartition(".")[2]
        cells.append([re.sub(rf"\b{re.escape(own)}\b", "f", code)])
    return replace(source, columns={"code": Column("text", cells)})


def measured(bundle: Bundle, test: Source) -> dict[str, Any]:
    found = both_ways(matched(bundle, test, ("text", "code"), quiet=True))
    return {
        way: {
            "recall": {str(k): one._asdict() for k, one in each.recall.items()},
            "chance": {str(k): one for k, one in each.chance.items()},
            "median_rank": each.median_rank,
            "gallery": each.gallery,
        }
        for way, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="only so many functions, to try it out")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--runs", type=Path, default=Path(gettempdir()) / "twofold-code-docs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    source = library(given.limit)
    counts = {name: list(source.splits or ()).count(name) for name in ("train", "val", "test")}
    record: dict[str, Any] = {
        "question": "recall between docstrings and functions of packages that were not learned from; 95 % intervals",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "twofold")},
        "python": platform.python_version(),
        "functions": counts,
        "results": {},
    }
    tests = {"": source.split("test"), ", names hidden": hidden(source.split("test"))}
    for name, recipe in RECIPES.items():
        for seed in given.seeds:
            out = given.runs / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            done = align(source, out=out, towers=TOWERS, recipe=replace(recipe, seed=seed))
            for how, test in tests.items():
                if f"MiniLM as it comes{how}" not in record["results"]:
                    record["results"][f"MiniLM as it comes{how}"] = measured(done.untrained, test)
                record["results"][f"{name}{how} seed {seed}"] = measured(done.bundle, test)
    for name, row in record["results"].items():
        print(name, {way: "/".join(f"{o['value']:.3f}" for o in one["recall"].values()) for way, one in row.items()})
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
