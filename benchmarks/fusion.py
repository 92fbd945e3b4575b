"""Do words find more with two spaces than with one? What a picture looks like, what is written of it, and both.

    python benchmarks/fusion.py FLICKR8K/captions.csv      # two alignments of some minutes each, then half a minute

Flickr8k: the fifth caption of a picture is the query; the first four are its texts. OpenMoji: an emoji's name is the
query; its tags are its texts, if it has any. The gallery is the split's own pictures. Kind and weight are chosen on the
validation split, by mean reciprocal rank, and reported on test: "standard" and "ranks" with one weight for both
collections, "scores" with a weight for each, as `twofold calibrate INDEX` fits it. 95 % intervals over queries.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from twofold.data.sources import Source, open_source
from twofold.measure.embed import embed
from twofold.measure.metrics import bootstrap
from twofold.models.bundle import Bundle
from twofold.retrieve.fusion import FUSION, Fusion, K
from twofold.retrieve.retriever import POOL
from twofold.retrieve.text_embedders import LocalEmbedder
from twofold.train.align import align

RESULTS = Path(__file__).parent / "results" / "fusion.json"
KINDS = ("standard", "ranks", "scores")
WEIGHTS = np.round(np.linspace(0, 1, 21), 2)


class Asked(NamedTuple):
    """What each query [q] scores with each item [n], in both spaces; an item without texts has −inf."""

    looks: np.ndarray
    texts: np.ndarray
    own: np.ndarray  # the item that is meant


def asked(bundle: Bundle, source: Source, query: int, documents: slice) -> Asked:
    """Queries are the items' texts at `query`, documents those at `documents`."""
    embedder = LocalEmbedder()
    pictures = unit(embed(bundle, source, "image", quiet=True).matrix)
    every = [list(texts) for texts in source.texts or ()]
    own = np.array([i for i, texts in enumerate(every) if len(texts) > max(query, 0)])
    words = [every[i][query] for i in own]
    owner = [i for i, texts in enumerate(every) for _ in texts[documents]]
    documents_of = unit(embedder.embed_documents([text for texts in every for text in texts[documents]]))
    cosines = unit(np.concatenate([embedder.embed_queries([word]) for word in words])) @ documents_of.T
    texts = np.full((len(words), len(source)), -np.inf, np.float32)
    for column, item in enumerate(owner):
        np.maximum(texts[:, item], cosines[:, column], out=texts[:, item])
    return Asked(np.asarray(bundle.encode(words)) @ pictures.T, texts, own)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ranks_of(scores: np.ndarray) -> np.ndarray:
    """Each item's place in each query's order, from 1; equal ones in the order of the items."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(1, scores.shape[1] + 1)[None].repeat(len(scores), 0), 1)
    return ranks


def fused(one: Asked, kind: str, weight: float) -> np.ndarray:
    """`Fusion.scores` of all queries at once, from pools of `POOL`."""
    total = np.zeros(one.looks.shape)
    for scores, share in ((one.looks, 1 - weight), (one.texts, weight)):
        ranks = ranks_of(scores)
        found = (ranks <= POOL) & np.isfinite(scores)
        if kind == "ranks":
            worth = np.where(found, (1 + K) / (ranks + K), 0)
        else:
            if kind == "standard":
                some = np.where(found, scores, np.nan)
                scores = (scores - np.nanmean(some, 1, keepdims=True)) / np.nanstd(some, 1, keepdims=True)
            floor = np.where(found, scores, np.inf).min(1, keepdims=True)
            worth = np.where(found, scores, floor)
        total += share * worth
    return total


def same_as_the_library(one: Asked, kind: str, weight: float) -> None:
    for query in range(0, len(one.own), max(1, len(one.own) // 20)):
        sides = []
        for scores in (one.looks[query], one.texts[query]):
            order = [i for i in np.argsort(-scores, kind="stable")[:POOL] if np.isfinite(scores[i])]
            sides.append([(str(i), float(scores[i])) for i in order])
        table = fused(one, kind, weight)[query]
        for name, score in Fusion(kind, weight).scores(*sides):  # type: ignore[arg-type]
            assert abs(score - table[int(name)]) < 1e-5, (name, score, table[int(name)])


def places(one: Asked, scores: np.ndarray) -> np.ndarray:
    """The rank of what is meant."""
    return ranks_of(np.where(np.isfinite(scores), scores, -9))[np.arange(len(one.own)), one.own]


def reciprocal(one: Asked, kind: str, weight: float) -> float:
    return float((1 / places(one, fused(one, kind, float(weight)))).mean())


def told(place: np.ndarray) -> dict:
    rows = {f"recall@{k}": bootstrap(place <= k)._asdict() for k in (1, 5, 10)}
    return rows | {"mean_reciprocal_rank": bootstrap(1 / place)._asdict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/fusion"))
    arguments = parser.parse_args()
    sets = {
        "flickr8k": (open_source(arguments.captions), 4, slice(0, 4)),
        "openmoji": (open_source("openmoji"), 0, slice(1, None)),
    }
    held: dict[str, dict[str, Asked]] = {}
    for name, (data, query, documents) in sets.items():
        run = arguments.runs / name
        bundle = Bundle.load(run) if (run / "bundle").is_dir() else align(data, out=run).bundle
        held[name] = {split: asked(bundle, data.split(split), query, documents) for split in ("val", "test")}
    curves = {
        name: {kind: [reciprocal(one["val"], kind, w) for w in WEIGHTS] for kind in KINDS} for name, one in held.items()
    }
    chosen = {}
    for kind in KINDS:
        together = np.mean([curve[kind] for curve in curves.values()], axis=0)
        chosen[kind] = {"weight": float(WEIGHTS[together.argmax()]), "mean_reciprocal_rank": round(together.max(), 4)}
    default = chosen["standard"]["weight"]
    rows = {}
    for name, one in held.items():
        fitted = float(WEIGHTS[int(np.argmax(curves[name]["scores"]))])
        test = one["test"]
        for kind in KINDS:
            same_as_the_library(test, kind, default)
        same_as_the_library(test, "scores", fitted)
        found = {
            "pictures alone": places(test, test.looks),
            "texts alone": places(test, test.texts),
            f"standard, weight {default:g}": places(test, fused(test, "standard", default)),
            f"scores, weight {fitted:g}": places(test, fused(test, "scores", fitted)),
            f"ranks, weight {chosen['ranks']['weight']:g}": places(
                test, fused(test, "ranks", chosen["ranks"]["weight"])
            ),
            "ranks, weight 0.5": places(test, fused(test, "ranks", 0.5)),
        }
        best = min(("pictures alone", "texts alone"), key=lambda way: -(1 / found[way]).mean())
        gains = {
            way: {
                f"recall@{k}": bootstrap((place <= k).astype(float) - (found[best] <= k))._asdict() for k in (1, 5, 10)
            }
            for way, place in found.items()
            if "weight" in way
        }
        rows[name] = {
            "queries": len(test.own),
            "gallery": test.looks.shape[1],
            "without_texts": int((~np.isfinite(test.texts[0])).sum()),
            "test": {way: told(place) for way, place in found.items()},
            "gain_over_best_single": {"single": best, **gains},
            "validation_mean_reciprocal_rank": {
                kind: dict(zip(map(str, WEIGHTS), np.round(curve, 4).tolist(), strict=True))
                for kind, curve in curves[name].items()
            },
        }
        for way, place in found.items():
            print(name, way, "R@1/5/10", "/".join(f"{(place <= k).mean():.3f}" for k in (1, 5, 10)), flush=True)
    about = {
        "question": "recall of one picture by words: by its look, by its other texts, by both; chosen on validation",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU, shared with other work",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
        "chosen_on_validation": chosen,
        "library_default": FUSION.record(),
        "results": rows,
    }
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
