"""Are wrong captions found, and does training without them recover? Flickr8k with a fifth of its captions shuffled.

    python benchmarks/noisy_pairs.py FLICKR8K/captions.csv       # some ten minutes on two cores

Of the 30,000 training captions a fifth are exchanged among each other, so that none of them stays with its picture.
`twofold pairs` judges all of them; what it finds is compared with what was done. Then heads are trained on the clean
pairs, the noisy ones, and the noisy ones with its weights, each by the same recipe, and measured on the test split.
Seeds that are in the results already are not run again.
"""

import argparse
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import gettempdir

import numpy as np

from twofold.cli.show import plain
from twofold.data.sources import Source, open_source
from twofold.measure.evaluate import evaluate
from twofold.measure.metrics import Interval
from twofold.train.align import Recipe, align
from twofold.train.pairs import audit_pairs

RESULTS = Path(__file__).parent / "results" / "noisy_pairs.json"
SHARE = 0.2
JUDGES = Recipe(epochs=30)
RECIPE = Recipe()


def shuffled(source: Source, seed: int) -> tuple[Source, set[tuple[str, str]]]:
    """The source with a fifth of its captions exchanged, and which (id, text) are wrong now."""
    places = [(item, at) for item, texts in enumerate(source.texts or ()) for at in range(len(texts))]
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(places))[: round(SHARE * len(places))]
    chosen = chosen[np.argsort(chosen)]
    while True:  # an exchange in which everybody gets the caption of another picture
        order = draw.permutation(len(chosen))
        stays = [n for n, m in enumerate(order) if places[chosen[n]][0] == places[chosen[m]][0]]
        for n in stays:
            m = int(draw.integers(len(order)))
            order[n], order[m] = order[m], order[n]
        if all(places[chosen[n]][0] != places[chosen[m]][0] for n, m in enumerate(order)):
            break
    texts = [list(own) for own in source.texts or ()]
    old = [list(own) for own in texts]
    wrong = set()
    for n, m in enumerate(order):
        (item, at), (other, there) = places[chosen[n]], places[chosen[m]]
        texts[item][at] = old[other][there]
        if texts[item][at] not in old[item]:
            wrong.add((source.ids[item], texts[item][at]))
    return replace(source, texts=texts), wrong


def average_precision(right: np.ndarray) -> float:
    """Of a ranked list of hits and misses."""
    return float((np.cumsum(right) / np.arange(1, len(right) + 1))[right].mean())


def interval(right: np.ndarray, seed: int, draws: int = 200) -> Interval:
    """Average precision and its 95 % over resampled pairs."""
    draw = np.random.default_rng(seed)
    values = [average_precision(right[np.sort(draw.integers(0, len(right), len(right)))]) for _ in range(draws)]
    return Interval(average_precision(right), *np.quantile(values, (0.025, 0.975)))


def run(captions: Path, seed: int, folder: Path) -> dict:
    data = open_source(captions)
    clean, test = data.split("train"), data.split("test")
    noisy, wrong = shuffled(clean, seed)
    audit = audit_pairs(
        replace(noisy, splits=None), out=folder / "audit", recipe=replace(JUDGES, seed=seed), quiet=True
    )
    right = np.array([(pair.id, pair.text) in wrong for pair in audit.pairs])
    row: dict = {
        "wrong": int(right.sum()),
        "average_precision": interval(right, seed),
        "precision_at_10_percent": float(right[: len(right) // 10].mean()),
        "noise": audit.noise,
        "evidence": audit.evidence,
    }
    table = folder / "pairs.csv"
    from twofold.cli.pairs import write_csv

    write_csv(audit, table)
    recipe = replace(RECIPE, seed=seed)
    for name, source, weights in (("clean", clean, None), ("noisy", noisy, None), ("weighted", noisy, table)):
        bundle = align(
            replace(source, splits=None), out=folder / name, recipe=recipe, weights=weights, quiet=True
        ).bundle
        found = evaluate(bundle, replace(test, splits=["test"] * len(test)), quiet=True).paired
        row[name] = {way: {k: r.value for k, r in one.recall.items()} for way, one in found.items()}
    means = {
        name: np.mean([v for way in row[name].values() for v in way.values()])
        for name in ("clean", "noisy", "weighted")
    }
    row["mean_recall"] = {name: float(value) for name, value in means.items()}
    row["recovered"] = float((means["weighted"] - means["noisy"]) / (means["clean"] - means["noisy"]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="Flickr8k's captions.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path(gettempdir()) / "twofold-noisy-pairs", help="where runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {"seeds": {}}
    record |= {
        "question": "Flickr8k with a fifth of 30,000 training captions exchanged: are they found, does weighing help?",
        "machine": f"{platform.machine()}, {platform.system()}, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
    }
    for seed in given.seeds:
        if str(seed) not in record["seeds"]:
            record["seeds"][str(seed)] = plain(run(given.captions, seed, given.runs / str(seed)))
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
        print(seed, json.dumps(record["seeds"][str(seed)]))


if __name__ == "__main__":
    main()
