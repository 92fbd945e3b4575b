"""One index of pictures and texts: how should hits of two modalities be put in one order?

    python benchmarks/mixed_index.py RUN=CAPTIONS.csv RUN=openmoji    # bundles by `twofold align`, one a seed; seconds

Texts lie nearer to a question in words than any picture does, so plain cosines show texts alone. Each index holds the
pictures of some items and a text of the *others*, so an item is never in it twice. Three kinds of questions:

    words → picture     a text of an item whose picture is in the index
    words → text        another text of an item whose text is in it
    picture → text      the picture of an item whose text is in it

R@10 is among everything; `alone` is an index of the right modality only, which no mixture can be expected to reach.
`kept` is R@10 over that of `alone`, averaged over the three kinds: it is what the way of ordering was chosen by, on the
split val. `pictures` is the share of pictures among the first ten hits of words.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from twofold.data.sources import Source, open_source
from twofold.measure.embed import embed
from twofold.models.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "mixed_index.json"
DRAWS = 5  # of which items are pictures
SHARES = (0.5, 0.9, 0.1)  # of pictures in the index
POOL = 20


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cosine(q, x, seen, asked):
    return q @ x.T


def centred(q, x, seen, asked):
    """Each side less the mean of its modality in the index, unit again."""
    q = unit(q - x[seen == asked].mean(0))
    x = x.copy()
    for kind in (True, False):
        x[seen == kind] = unit(x[seen == kind] - x[seen == kind].mean(0))
    return q @ x.T


def offset(q, x, seen, asked):
    """The cosine less its mean over the items of the modality."""
    s = q @ x.T
    for kind in (True, False):
        s[:, seen == kind] -= s[:, seen == kind].mean(1, keepdims=True)
    return s


def standard(q, x, seen, asked):
    """The same in standard deviations over the modality."""
    s = offset(q, x, seen, asked)
    for kind in (True, False):
        s[:, seen == kind] /= s[:, seen == kind].std(1, keepdims=True)
    return s


def pooled(q, x, seen, asked):
    """In standard deviations over the nearest `POOL` of each modality."""
    s = q @ x.T
    for kind in (True, False):
        own = s[:, seen == kind]
        best = -np.sort(-own, 1)[:, :POOL]
        s[:, seen == kind] = (own - best.mean(1, keepdims=True)) / best.std(1, keepdims=True)
    return s


def ranks(q, x, seen, asked):
    """One of each modality in turn: reciprocal rank fusion of lists that share nothing."""
    s = q @ x.T
    for kind in (True, False):
        own = s[:, seen == kind]
        order = np.argsort(np.argsort(-own, 1), 1)
        s[:, seen == kind] = 1 / (61 + order + (0.5 if kind != asked else 0))
    return s


WAYS = {"cosine": cosine, "centred": centred, "offset": offset, "standard": standard, "pooled": pooled, "ranks": ranks}


def top(scores: np.ndarray, own: np.ndarray) -> float:
    right = scores[np.arange(len(own)), own]
    return float(((scores >= right[:, None]).sum(1) <= 10).mean())


def measured(pictures, asking, texts, share, draw):
    """`asking` and `texts` are two texts of each item; what each way makes of one draw of an index."""
    n = len(pictures)
    order = draw.permutation(n)
    a, b = order[: int(share * n)], order[int(share * n) :]
    x = np.concatenate([pictures[a], texts[b]])
    seen = np.arange(n) < len(a)
    kinds = {
        "words→picture": (asking[a], np.arange(len(a)), False, slice(0, len(a))),
        "words→text": (asking[b], np.arange(len(a), n), False, slice(len(a), n)),
        "picture→text": (pictures[b], np.arange(len(a), n), True, slice(len(a), n)),
    }
    alone = {name: top(q @ x[part].T, own - part.start) for name, (q, own, _, part) in kinds.items()}
    rows = {"alone": alone}
    for way, score in WAYS.items():
        row = {}
        first = []
        for name, (q, own, asked, _) in kinds.items():
            s = score(q, x, seen, asked)
            row[name] = top(s, own)
            if not asked:
                first.append(seen[np.argsort(-s, 1, kind="stable")[:, :10]].mean(1))
        row["pictures"] = float(np.concatenate(first).mean())
        row["kept"] = float(np.mean([row[name] / alone[name] for name in kinds]))
        rows[way] = row
    return rows


def vectors(bundle: Bundle, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each item with two texts: its picture, what is asked, and what is indexed."""
    two = source.take([i for i, texts in enumerate(source.texts or ()) if len(texts) > 1])
    pictures = unit(embed(bundle, two, "image", quiet=True).matrix)
    asking, texts = (np.asarray(bundle.encode([own[at] for own in two.texts])) for at in (-1, 0))
    return pictures, asking, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="RUN=DATA")
    arguments = parser.parse_args()
    results: dict = {}
    for given in arguments.sets:
        run, _, data = given.partition("=")
        bundle, source = Bundle.load(run), open_source(data)
        for split in ("val", "test"):
            them = vectors(bundle, source.split(split))
            for share in SHARES:
                draws = [measured(*them, share, np.random.default_rng(seed)) for seed in range(DRAWS)]
                table = {
                    way: {
                        name: [round(float(f([one[way][name] for one in draws])), 4) for f in (np.mean, np.std)]
                        for name in row
                    }
                    for way, row in draws[0].items()
                }
                name = f"{Path(data).parent.name or data}, {Path(run).name}, {split}, {share:.0%} pictures"
                results[name] = {"items": len(them[0]), "ways": table}
                print(name, len(them[0]))
                for way, row in table.items():
                    print(
                        f"  {way:<9}", *(f"{column} {mean:.3f}±{spread:.3f}" for column, (mean, spread) in row.items())
                    )
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "draws": DRAWS,
        "means and standard deviations over draws": results,
    }
    RESULTS.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
