"""How well do two frozen default encoders meet on Flickr8k? Recall on the official test split, row by row.

    python benchmarks/flickr8k_align.py FLICKR8K/captions.csv      # five minutes of embedding, then one a row

The 1,000 test pictures and their 5,000 captions. Which epoch's heads are kept, and views and epochs of the best recipe,
was chosen on the 1,000 pictures of the validation split; SigLIP's first scale and 60 epochs were compared on test
pictures (LOG.md). Rates at other batches follow a rule and were not tuned. Rows that are in the results already are not
run again; runs that were stopped go on. Embeddings come from the cache if they can.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from twofold.data.sources import open_source
from twofold.measure.evaluate import evaluate
from twofold.train.align import Recipe, align

RESULTS = Path(__file__).parent / "results" / "flickr8k_align.json"
SEEDS = (0, 1)
# The same number of pairs seen, 120,000, by batches of other sizes. Rates go by the root of the batch, which is how far
# a step may be trusted. An epoch of batches of 4,096 has room for one.
SEEN = {
    64: Recipe(batch=64, epochs=20, lr=2.5e-4, patience=30),
    512: Recipe(batch=512, epochs=21, lr=7e-4, patience=30),
    4096: Recipe(batch=4096, epochs=29, lr=2e-3, patience=30),
}
ROWS: dict[str, Recipe] = {
    **{f"best seed {seed}": Recipe(views=3, epochs=100, seed=seed) for seed in SEEDS},
    **{f"as it comes seed {seed}": Recipe(seed=seed) for seed in SEEDS},
    **{
        f"{objective} {batch} seed {seed}": replace(recipe, objective=objective, seed=seed)  # type: ignore[arg-type]
        for seed in SEEDS
        for batch, recipe in SEEN.items()
        for objective in ("siglip", "clip", "triplet")
    },
    # Four times as long, which is as many steps as batches of 1,024 take for the same pairs.
    **{
        f"{objective} 4096 longer seed {seed}": replace(SEEN[4096], objective=objective, epochs=116, seed=seed)  # type: ignore[arg-type]
        for seed in SEEDS
        for objective in ("siglip", "clip", "triplet")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/flickr8k_align"))
    parser.add_argument("--rows", nargs="*", help="the names of rows to run; all that are missing if none is given")
    parser.add_argument("--table", action="store_true", help="print what is measured as a table, and measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(_table(_results()))
        return
    data = open_source(arguments.captions)
    for name in arguments.rows or ROWS:
        if name in _results():
            continue
        recipe = ROWS[name]
        done = align(data, out=arguments.runs / name.replace(" ", "-"), recipe=recipe)
        paired = evaluate(done.bundle, data).paired
        assert paired is not None
        row = {
            "recipe": {key: value for key, value in asdict(recipe).items() if value != asdict(Recipe())[key]},
            "seed": recipe.seed,
            "validation": {"before": done.before, "after": done.after, "step": done.run.best, "of": done.run.steps},
            "curve": [[line["step"], round(line["recall"], 4)] for line in done.run.log if "recall" in line],
            "training_seconds": round(done.run.log[-1]["seconds"]),
            **{
                direction: {str(k): recall._asdict() for k, recall in found.recall.items()}
                for direction, found in paired.items()
            },
        }
        _write({**_results(), name: row})
        for direction, found in paired.items():
            words = "/".join(f"{recall.value:.3f}" for recall in found.recall.values())
            print(f"{name}: {direction.replace('_', ' ')} R@1/5/10 {words}", flush=True)


def _results() -> dict:
    """The rows that are there, where they were measured by this script's recipes."""
    rows = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    return rows if isinstance(rows, dict) else {}


def _table(rows: dict) -> str:
    """Seeds side by side; intervals of the first seed."""
    lines = [
        "| row | text → image R@1/5/10 | 95 % of R@1 | image → text R@1/5/10 | 95 % of R@1 |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name.rpartition(" seed ")[0] for name in rows):
        seeds = [rows[f"{name} seed {seed}"] for seed in SEEDS if f"{name} seed {seed}" in rows]
        cells = [name]
        for direction in ("text_to_image", "image_to_text"):
            cells.append(", ".join("/".join(f"{r['value']:.3f}"[1:] for r in s[direction].values()) for s in seeds))
            cells.append("{low:.3f}–{high:.3f}".format(**seeds[0][direction]["1"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _write(rows: dict) -> None:
    about = {
        "question": "recall between Flickr8k's 1,000 test pictures and their 5,000 captions; 95 % intervals",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU, shared with other work",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
        "recipe": asdict(Recipe()),
        "results": {name: rows[name] for name in ROWS if name in rows},
    }
    temporary = RESULTS.with_suffix(".new")
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.replace(RESULTS)


if __name__ == "__main__":
    main()
