"""How well do two frozen default encoders meet on Flickr8k? Recall on the official test split, by objective and seed.

    python benchmarks/flickr8k_align.py FLICKR8K/captions.csv      # five minutes of embedding, then one a row

The 1,000 test pictures and their 5,000 captions; nothing is chosen on them. Embeddings come from the cache if they can.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

from twofold.data.sources import open_source
from twofold.measure.evaluate import evaluate
from twofold.train.align import Recipe, align

RESULTS = Path(__file__).parent / "results" / "flickr8k_align.json"
ROWS = [("siglip", 0), ("siglip", 1), ("clip", 0), ("clip", 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/flickr8k_align"))
    arguments = parser.parse_args()
    data = open_source(arguments.captions)
    rows = []
    for objective, seed in ROWS:
        recipe = Recipe(objective=objective, seed=seed)  # type: ignore[arg-type]
        done = align(data, out=arguments.runs / f"{objective}-{seed}", recipe=recipe)
        paired = evaluate(done.bundle, data).paired
        assert paired is not None
        recalls = {
            direction: {str(k): recall._asdict() for k, recall in found.recall.items()}
            for direction, found in paired._asdict().items()
        }
        last = done.run.log[-1]
        rows.append({"objective": objective, "seed": seed, "training_seconds": round(last["seconds"]), **recalls})
        words = "/".join(f"{recall.value:.3f}" for recall in paired.text_to_image.recall.values())
        print(
            f"{objective} seed {seed}: text → image R@1/5/10 {words}, {last['seconds']:.0f} s of training", flush=True
        )
        RESULTS.write_text(
            json.dumps(
                {
                    "question": "recall between Flickr8k's 1,000 test pictures and their 5,000 captions",
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
                    "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
                    "recipe": vars(Recipe()),
                    "results": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
