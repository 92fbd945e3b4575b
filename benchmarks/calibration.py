"""Do probabilities hold, is nonsense rejected, and what do remedies against hubs gain? Flickr8k, fitted on val only.

    twofold align FLICKR8K/captions.csv --out runs/b
    python benchmarks/calibration.py FLICKR8K/captions.csv runs/b [runs/of/another/seed …]

Curves, thresholds and remedies are fitted or chosen on the 1,000 validation pictures and measured on the 1,000 of test.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from twofold.data.sources import open_source
from twofold.measure.calibration import (
    Shown,
    diagram,
    expected_error,
    fit_calibration,
    from_siglip,
    honesty,
    shown,
    threshold,
)
from twofold.measure.hubness import compared, gap, hubness, remedied, remedies
from twofold.measure.matched import Matched, matched
from twofold.measure.retrieval import retrieval
from twofold.models.bundle import Bundle

RESULTS = Path(__file__).parent / "results" / "calibration.json"
WAYS = (("text", "image"), ("image", "text"))
COSTS = (0.05, 0.10)

# Nothing that a photograph shows: abstractions, documents, software, numbers, and no words at all.
NONSENSE = """
quarterly tax filing | the second law of thermodynamics | annual general meeting minutes | mortgage interest rates
terms and conditions apply | the square root of minus one | null pointer exception | pip install failed with exit code 1
return on investment | the categorical imperative | supply chain risk assessment | update your password
monetary policy of the central bank | a proof by induction | invoice number 20417 | non-disclosure agreement
the meaning of justice | subject to approval by the board | inflation adjusted earnings per share | SELECT * FROM users
quantum chromodynamics | kernel panic on boot | the doctrine of precedent | amortised time complexity
double-entry bookkeeping | privacy policy and cookie settings | gross domestic product per capita | error 404
the epistemology of testimony | compound interest formula | unit tests for the parser | limited liability company
intellectual property law | a recipe for sourdough starter | the ontological argument | subjunctive mood in Latin
data retention schedule | Bayesian inference with conjugate priors | warranty void if removed | a haiku about entropy
stochastic gradient descent | fiscal year end closing | the price of copper futures | seven times eight
declension of irregular nouns | merge conflict in main branch | pension contribution statement | Gödel incompleteness
tariff classification code | asdf qwer zxcv | lorem ipsum dolor sit amet | xkqj vvbn wprt | 3.14159265358979
the treaty of Westphalia | antitrust litigation | medication dosage leaflet | a letter of resignation
the Krebs cycle | customer churn rate | carbon offset accounting | plate tectonics | mitochondrial DNA sequence
regression to the mean | deferred tax assets | proportional representation | the passive voice | floating point rounding
""".replace("\n", "|").split("|")
NONSENSE = [query.strip() for query in NONSENSE if query.strip()]

# What a person might type, and what Flickr8k's test pictures do show.
PLAIN = """
a dog running | two dogs playing | dog in the snow | dog catching a frisbee | dog in water | children playing | a baby
a girl smiling | a boy jumping | kids in a pool | man on a bike | motorcycle race | a surfer | skateboarder
snowboarder | rock climbing | people at the beach | a soccer game | a football player | basketball | a man in red
woman with sunglasses | a crowd on the street | a person on a mountain | a swing | a ball in the grass | hiking
a boat on a lake | a bird | sledding
""".replace("\n", "|").split("|")
PLAIN = [query.strip() for query in PLAIN if query.strip()]


def measure(run: Path, data) -> dict:
    bundle = Bundle.load(run)
    own = bundle.meta["siglip"]
    train, val, test = (matched(bundle, data.split(name), ("image", "text"), quiet=True) for name in SPLITS)
    silly, plain = bundle.encode(NONSENSE), bundle.encode(PLAIN)
    result: dict = {"run": run.name, "siglip": own, "ways": {}}
    for queries, gallery in WAYS:
        way = f"{queries}_to_{gallery}"
        banks = train.sides[queries].matrix, train.sides[gallery].matrix
        tried = remedies(*sides(val, queries, gallery), banks=banks, groups=owners(val, queries), split="val")
        groups = owners(test, queries)
        before = retrieval(*sides(test, queries, gallery), groups=groups)
        found: dict = {"plain": {"recall": before.recall, "map": before.map}, "remedies": {}}
        for remedy in tried:
            after = remedied(remedy, *sides(test, queries, gallery), groups=groups)
            found["remedies"][remedy.kind] = {
                "strength": remedy.strength,
                "neighbours": remedy.neighbours,
                "gain_on_val": remedy.gain,
                "gain_on_test": compared(before, after, groups=groups, split="test"),
                "hubness": hubs(test, queries, gallery, remedy),
            }
        found["hubness"] = hubs(test, queries, gallery, None)
        found["calibration"] = {}
        nnn = next(remedy for remedy in tried if remedy.kind == "nnn")
        on_val, on_test, nnn_val, nnn_test = (
            shown(*sides(part, queries, gallery), groups=owners(part, queries), remedy=remedy)
            for remedy in (None, nnn)
            for part in (val, test)
        )
        sigmoid = from_siglip(own["scale"], own["bias"], batch=own["batch"])
        judged = {
            "siglip at training odds": honesty(sigmoid, on_test),
            "siglip at the gallery's odds": honesty(sigmoid, on_test, gallery=on_test.gallery),
            "platt": honesty(fit_calibration(on_val), on_test, gallery=on_test.gallery),
            "isotonic": honesty(fit_calibration(on_val, kind="isotonic"), on_test, gallery=on_test.gallery),
            "platt after nnn": honesty(fit_calibration(nnn_val), nnn_test, gallery=nnn_test.gallery),
        }
        found["calibration"] = {name: {"ece": each.ece, "brier": each.brier} for name, each in judged.items()}
        if queries == "text":
            curves = {name: judged[name].bins for name in ("siglip at training odds", "platt")}
            found["diagram"] = diagram(curves, title="Flickr8k test: ten best hits of each caption")
            found["noise_floor"] = floor(fit_calibration(on_val).probability(on_test.scores), on_test)
            found["galleries"] = galleries(bundle, data, test, fit_calibration(on_val))
            everything = test.sides["image"].matrix
            found["rejection"] = {
                name: rejection(on, at, *(best(asked, everything, remedy) for asked in (silly, plain)))
                for name, remedy, on, at in (("cosine", None, on_val, on_test), ("nnn", nnn, nnn_val, nnn_test))
            }
        result["ways"][way] = found
    result["gap"] = gap(test.sides["image"].matrix, test.sides["text"].matrix)
    return result


SPLITS = ("train", "val", "test")


def sides(pairs: Matched, queries: str, gallery: str):
    return pairs.sides[queries].matrix, pairs.sides[gallery].matrix, pairs.positives(queries, gallery)


def owners(pairs: Matched, side: str) -> list[int]:
    return pairs.sides[side].owner.tolist()


def hubs(pairs: Matched, queries: str, gallery: str, remedy) -> dict:
    found = hubness(pairs.sides[queries].matrix, pairs.sides[gallery].matrix, remedy=remedy)
    return {name: getattr(found, name) for name in ("k", "skewness", "anti_hubs", "chance", "hubs", "mean")}


def floor(promised: np.ndarray, held_out: Shown) -> float:
    """The ECE that these very promises would show if they were true, mean of 200 draws."""
    draw = np.random.default_rng(0)
    return float(
        np.mean(
            [expected_error(promised, draw.random(promised.shape) < promised, resamples=1).value for _ in range(200)]
        )
    )


def best(asked: np.ndarray, gallery: np.ndarray, remedy) -> np.ndarray:
    return shown(asked, gallery, [[0]] * len(asked), k=1, remedy=remedy).scores[:, 0]


def rejection(on_val: Shown, on_test: Shown, silly: np.ndarray, plain: np.ndarray) -> dict:
    """What falls below the threshold that costs so much on val: nonsense, captions of test, and plain short queries."""
    rows = {}
    for cost in COSTS:
        least = threshold(on_val.scores[:, 0], cost)
        order = np.argsort(-silly)
        rows[str(cost)] = {
            "threshold": least,
            "nonsense_rejected": float((silly < least).mean()),
            "nonsense": len(silly),
            "captions_rejected": float((on_test.scores[:, 0] < least).mean()),
            "right_first_hits_rejected": float((on_test.scores[:, 0] < least)[on_test.matches[:, 0]].mean()),
            "plain_rejected": float((plain < least).mean()),
            "plain": len(plain),
            "nonsense_kept": [NONSENSE[at] for at in order if silly[at] >= least][:8],
            "plain_lost": [PLAIN[at] for at in np.flatnonzero(plain < least)],
        }
    return rows


def galleries(bundle: Bundle, data, test: Matched, fitted) -> dict:
    """Test captions among 100, 1,000 and all 8,091 pictures: promises at the odds of the fit, and corrected."""
    rows = {}
    texts, images = test.sides["text"], test.sides["image"]
    others = matched(bundle, data, ("image", "text"), quiet=True)
    known = set(test.items.ids)
    strangers = others.sides["image"].matrix[[name not in known for name in others.items.ids]]
    for n in (100, 1000, len(strangers) + len(images.matrix)):
        kept = texts.owner < n
        gallery = images.matrix[:n] if n <= 1000 else np.concatenate([images.matrix, strangers])
        owner = texts.owner[kept].tolist()
        seen = shown(texts.matrix[kept], gallery, [[item] for item in owner], groups=owner)
        rows[str(n)] = {
            "as fitted": honesty(fitted, seen).ece,
            "at the gallery's odds": honesty(fitted, seen, gallery=n).ece,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--diagram", type=Path, help="write the first run's reliability diagram (SVG)")
    arguments = parser.parse_args()
    data = open_source(arguments.captions)
    rows = []
    for run in arguments.runs:
        row = measure(run, data)
        drawn = row["ways"]["text_to_image"].pop("diagram")
        if arguments.diagram and not rows:
            arguments.diagram.write_text(drawn)
        rows.append(row)
        RESULTS.write_text(json.dumps(report(rows), indent=1) + "\n")
        ece = {name: str(each["ece"]) for name, each in row["ways"]["text_to_image"]["calibration"].items()}
        print(run, json.dumps(ece, indent=1), flush=True)


def report(rows: list[dict]) -> dict:
    return {
        "question": "Flickr8k: probabilities, nonsense rejected, remedies for hubs; fitted on val, measured on test",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
        "pairs": "each query's ten best hits; one run a seed",
        "runs": [plain(row) for row in rows],
    }


def plain(value):
    """Named tuples as objects, numbers at six digits."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return round(float(value), 6) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main()
