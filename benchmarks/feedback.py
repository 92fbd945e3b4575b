"""Does feedback help, and whom? Clicks on 50 queries of Flickr8k's test split; recall on them, their like, the rest.

    python benchmarks/feedback.py FLICKR8K/captions.csv      # a minute a row on one core, embeddings not counted

A model is aligned as `twofold align` does it, and the 1,000 test pictures are indexed. Fifty captions of as many
pictures, drawn by a seed, are asked; of the ten best hits, the caption's own picture is clicked as right, the others as
wrong. `twofold align --feedback` learns from that. Recall is then taken on the captions that were asked, whose clicks
were trained on; on the other four captions of the same pictures, which nobody asked; and on the captions of the 950
other pictures, of which many were clicked as wrong. Intervals are of the difference, bootstrapped over pictures. The
index has no space of texts, in which a caption would find itself. The recipe was chosen on the validation split
(LOG.md), which also chooses the step that is kept.
"""

import argparse
import json
import os
import platform
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.sources import open_source
from twofold.learn import learn
from twofold.measure.embed import embed
from twofold.measure.metrics import bootstrap
from twofold.measure.retrieval import retrieval
from twofold.models.bundle import Bundle
from twofold.retrieve.corrected import change, corrected
from twofold.retrieve.feedback import Click, Feedback
from twofold.retrieve.index import Index
from twofold.train.align import Recipe, align
from twofold.train.feedback import Lesson

RESULTS = Path(__file__).parent / "results" / "feedback.json"
QUERIES, SHOWN = 50, 10
ROWS = [(model, clicks) for model in (0, 1) for clicks in (0, 1)]  # seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/feedback"))
    arguments = parser.parse_args()
    data = open_source(arguments.captions)
    test = data.split("test")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = results.setdefault("results", [])
    results |= {
        "question": f"recall after clicks on {QUERIES} of {sum(map(len, test.texts or ())):,} test captions",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU, shared with other work",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "chromadb", "twofold")},
        "lesson": asdict(Lesson()),
    }
    for model, clicks in ROWS:
        if any((row["model_seed"], row["clicks_seed"]) == (model, clicks) for row in rows):
            continue
        run = arguments.runs / f"model-{model}"
        if not (run / "bundle").exists():
            align(data, out=run, recipe=Recipe(seed=model))
        bundle, folder = Bundle.load(run), arguments.runs / f"clicks-{model}-{clicks}"
        index = folder / "index"
        Index.build(test, bundle, index, existing="replace", texts="none")
        Feedback(index).path.unlink(missing_ok=True)
        asked = click(index, test, clicks)
        done = learn(index, out=folder / "learnt", pairs=data, lesson=Lesson(seed=clicks))
        Index.build(test, done.bundle, index)
        with closing(Index.open(index)) as opened:
            changed = change(corrected(opened))
        before, after = ranks(bundle, test), ranks(done.bundle, test)
        row = {
            "model_seed": model,
            "clicks_seed": clicks,
            "found_right": changed.right,
            "validation": done.recall,
            "step": done.run.best,
            "corrected": changed._asdict(),
            "recall": {name: told(before[at], after[at], owners(test)[at]) for name, at in parts(test, asked).items()},
        }
        rows.append(row)
        words = json.dumps(results, indent=1) + "\n"
        write_atomically(RESULTS, lambda path, words=words: path.write_text(words))
        for name, found in row["recall"].items():
            figures = "  ".join(
                f"R@{k} {one['before']:.3f} → {one['after']:.3f}" for k, one in found.items() if k != "n"
            )
            print(f"model {model} clicks {clicks} {name} ({found['n']}): {figures}", flush=True)


def owners(test) -> np.ndarray:
    """The picture of each caption."""
    return np.repeat(np.arange(len(test)), [len(own) for own in test.texts])


def click(index: Path, test, seed: int) -> list[int]:
    """Ask one caption of each of 50 pictures and judge what is found; which captions, of all."""
    draw = runtime.generator(seed, "clicks")
    pictures = torch.randperm(len(test), generator=draw)[:QUERIES].tolist()
    feedback, first = Feedback(index), np.searchsorted(owners(test), np.arange(len(test)))
    asked = []
    with closing(Index.open(index)) as opened:
        for picture in pictures:
            place = int(torch.randint(len(test.texts[picture]), (1,), generator=draw))
            text = test.texts[picture][place]
            asked.append(int(first[picture]) + place)
            for hit in opened.search(text, k=SHOWN):
                feedback.add(Click(text, (), hit.id, hit.id == test.ids[picture]))
    return asked


def ranks(bundle: Bundle, test) -> np.ndarray:
    """Where each caption finds its picture among all test pictures, from 1."""
    pictures, texts = (embed(bundle, test, name, quiet=True).matrix for name in ("image", "text"))
    return retrieval(texts, pictures, [[owner] for owner in owners(test).tolist()]).ranks


def parts(test, asked: list[int]) -> dict[str, np.ndarray]:
    owner = owners(test)
    related = np.isin(owner, owner[asked])
    own = np.isin(np.arange(len(owner)), asked)
    return {"asked": own, "related, not asked": related & ~own, "rest": ~related}


def told(before: np.ndarray, after: np.ndarray, owner: np.ndarray) -> dict[str, Any]:
    """Recall before and after, and the interval of the difference; captions of one picture are drawn together."""
    found: dict[str, Any] = {"n": len(before)}
    for k in (1, 5, 10):
        gain = bootstrap((after <= k).astype(float) - (before <= k), groups=owner.tolist())
        found[str(k)] = {
            "before": float((before <= k).mean()),
            "after": float((after <= k).mean()),
            "gain": gain._asdict(),
        }
    return found


if __name__ == "__main__":
    main()
