"""Does a picture help a language model to say what people said of it? Flickr8k, a small decoder from scratch.

    python benchmarks/flickr8k_interleaved.py FLICKR8K/captions.csv --runs runs/interleaved
    python benchmarks/flickr8k_interleaved.py FLICKR8K/captions.csv --pictures 40 --epochs 1 --out /tmp/a.json  # tiny

A small Llama reads the 25 patches that a frozen EfficientNet-Lite0 makes of a picture of 160 pixels, and then one of
its captions; another of the same shape and seed reads the captions alone, as many epochs, steps and captions a step.
Measured on the 1,000 test pictures: what a token costs either of them, BLEU and CIDEr of what the first says against
the five captions of people, and what its likelihoods do to the twenty pictures that two aligned towers find for a
caption. How much the likelihood weighs there is chosen on validation pictures. What is measured is not measured again;
runs that were stopped go on. Captions and a sheet of pictures with theirs are left in the folder of runs.
"""

import argparse
import json
import math
import os
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from twofold.data.atomic import write_atomically
from twofold.data.documents import captioned
from twofold.data.sources import Source, open_source
from twofold.measure.captions import cider
from twofold.measure.embed import embed
from twofold.measure.likelihood import caption, reader_of
from twofold.measure.metrics import unit_rows
from twofold.models.bundle import Bundle
from twofold.train.align import Recipe, align
from twofold.train.interleave import Reading, cost, interleave, lay, without_pictures

RESULTS = Path(__file__).parent / "results" / "flickr8k_interleaved.json"
RECIPE = Reading(language="llama:tiny", size=160, length=256, batch=16, epochs=4)
BLIND = 6  # rows a step: without patches a row holds three times as many captions
TOP = 20  # pictures that are put in another order
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)  # of a nat beside the towers' logit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/flickr8k_interleaved"))
    parser.add_argument("--epochs", type=int, default=RECIPE.epochs)
    parser.add_argument("--language", default=RECIPE.language, help=f"default: {RECIPE.language}")
    parser.add_argument("--pictures", type=int, help="to learn from, and at most as many to validate and test on")
    parser.add_argument("--asked", type=int, default=1000, help="captions that are searched with")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    arguments = parser.parse_args()
    data = open_source(arguments.captions)
    train, val, test = (data.split(name) for name in ("train", "val", "test"))
    if arguments.pictures:
        train, val, test = (each.take(range(min(arguments.pictures, len(each)))) for each in (train, val, test))
    recipe = replace(RECIPE, epochs=arguments.epochs, language=arguments.language)
    runs, file = arguments.runs, Results(arguments.out, recipe, {"train": len(train), "val": len(val)})

    for name, blind in (("with pictures", False), ("words alone", True)):
        if name in file.held:
            continue
        learned, held, tested = map(captioned, (train, val, test))
        if blind:
            learned, held, tested = map(without_pictures, (learned, held, tested))
        own = replace(recipe, batch=BLIND) if blind else recipe
        done = interleave(learned, out=runs / name.replace(" ", "-"), recipe=own, held=held)
        model = reader_of(done.bundle)
        nats = cost(model, lay(model, tested, length=recipe.length).columns, batch=recipe.batch)
        row = {
            "test": {"nats_per_token": nats, "perplexity": math.exp(nats)},
            "validation": {"nats_per_token": done.cost},
            "steps": done.run.steps,
            "seconds": done.run.seconds,
            "parameters": sum(p.numel() for p in model.language.parameters()),
        }
        file.add(name, row)
        print(f"{name}: {nats:.3f} nats a token, perplexity {math.exp(nats):.1f}", flush=True)

    bundle = Bundle.load(runs / "with-pictures" / "bundle")
    if "saved by pictures" not in file.held:
        blind = Bundle.load(runs / "words-alone" / "bundle")
        file.add("saved by pictures", _saved(bundle, blind, test))
        print(file.held["saved by pictures"], flush=True)
    if "captions" not in file.held:
        file.add("captions", _captions(bundle, train, test, runs))
    if "reranking" not in file.held:
        aligned = align(data, out=runs / "towers", recipe=Recipe()).bundle
        file.add("reranking", _reranking(bundle, aligned, val, test, arguments.asked))
        print(json.dumps(file.held["reranking"], indent=1))


def _saved(bundle: Bundle, blind: Bundle, test: Source) -> dict[str, Any]:
    """Nats a token that the test pictures save, each caption by itself; intervals draw pictures."""
    assert test.texts is not None
    seeing, other = reader_of(bundle), reader_of(blind)
    saved, tokens = [], []
    for texts, patches in zip(test.texts, _patches(seeing, test), strict=True):
        with_it = seeing.likelihood(list(texts), patches.expand(len(texts), -1, -1))
        saved.append(float((with_it.nats - other.likelihood(list(texts)).nats).sum()))
        tokens.append(int(with_it.tokens.sum()))
    nats, count = np.array(saved), np.array(tokens)
    draws = np.random.default_rng(0).integers(len(nats), size=(2000, len(nats)))
    low, high = np.quantile(nats[draws].sum(1) / count[draws].sum(1), (0.025, 0.975))
    return {
        "nats a token": nats.sum() / count.sum(),
        "95 %": [low, high],
        "pictures that save": float((nats > 0).mean()),
    }


def _patches(model: Any, source: Source) -> torch.Tensor:
    """What the picture encoder makes of all pictures, [n, patches, dim]."""
    assert source.images is not None
    with torch.no_grad():
        ready = ([model.prepare(each) for each in source.images[at : at + 32]] for at in range(0, len(source), 32))
        return torch.cat([model.eye(model.batch(some)) for some in ready])


def _captions(bundle: Bundle, train: Source, test: Source, runs: Path) -> dict:
    """BLEU-4 and CIDEr of captions with four beams, of the likeliest words, and of any training caption, as a floor."""
    assert test.texts is not None and train.texts is not None
    references = [list(own) for own in test.texts]
    rows: dict[str, Any] = {}
    for beams in (1, 4):
        said, _ = caption(bundle, test, beams=beams, most=30)
        texts = [one.caption for one in said]
        rows[f"{beams} beam{'s' * (beams > 1)}"] = _near(texts, references)
        if beams > 1:
            (runs / "captions.json").write_text(json.dumps([one._asdict() for one in said], indent=1))
            _sheet(test, texts, runs / "captions.png")
            rows["said first"] = [one._asdict() for one in said[:8]]
    rows["another picture's"] = _near([train.texts[at % len(train)][0] for at in range(len(test))], references)
    rows["a person, 4 references"] = _near([own[0] for own in references], [own[1:] for own in references])
    print({name: row for name, row in rows.items() if isinstance(row, dict)}, flush=True)
    return rows


def _near(texts: list[str], references: list[list[str]]) -> dict[str, float]:
    from sacrebleu import corpus_bleu

    columns = [[own[place].lower() for own in references] for place in range(len(references[0]))]
    bleu = corpus_bleu([text.lower() for text in texts], columns)
    near = np.mean(cider(texts, references))
    return {"bleu4": round(bleu.score, 2), "brevity": round(bleu.bp, 3), "cider": round(float(near), 3)}


def _sheet(test: Source, texts: list[str], file: Path, across: int = 4, down: int = 5, side: int = 240) -> None:
    assert test.images is not None
    sheet = Image.new("RGB", (across * (side + 10), down * (side + 60)), "white")
    draw = ImageDraw.Draw(sheet)
    for at, number in enumerate(np.linspace(0, len(test) - 1, across * down).astype(int)):
        x, y = at % across * (side + 10), at // across * (side + 60)
        with Image.open(test.images[number]) as picture:
            sheet.paste(picture.convert("RGB").resize((side, side)), (x, y))
        words, line = texts[number].split(), ""
        for word in [*words, ""]:
            if not word or len(line) + len(word) > 38:
                draw.text((x + 2, y + side + 2), line, fill="black")
                y, line = y + 12, ""
            line += word + " "
    sheet.save(file)


def _reranking(bundle: Bundle, towers: Bundle, val: Source, test: Source, asked: int) -> dict:
    """R@1 of a picture by its first caption: the towers' order, and that of their logit and `weight` times nats."""
    found = {name: _first(bundle, towers, source, asked) for name, source in (("val", val), ("test", test))}
    chosen = max(WEIGHTS, key=lambda weight: _hits(*found["val"], weight).mean())
    before, after = (_hits(*found["test"], weight) for weight in (0.0, chosen))
    alone = _hits(*found["test"], math.inf)
    rng = np.random.default_rng(0)
    draws = rng.integers(len(before), size=(2000, len(before)))
    gain = (after - before)[draws].mean(1)
    return {
        "of": len(before),
        "pictures": len(test),
        "top": TOP,
        "weight chosen on validation": chosen,
        "validation R@1 by weight": {str(weight): float(_hits(*found["val"], weight).mean()) for weight in WEIGHTS},
        "R@1 of the towers": float(before.mean()),
        "R@1 reranked": float(after.mean()),
        "R@1 by likelihood alone": float(alone.mean()),
        "gain": float((after - before).mean()),
        "gain 95 %": [float(edge) for edge in np.quantile(gain, (0.025, 0.975))],
        "ceiling: within the top": float((found["test"][2]).any(1).mean()),
    }


def _first(bundle: Bundle, towers: Bundle, source: Source, asked: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each query its top pictures' logits, nats, and which one is its own; each [asked, TOP]."""
    assert source.texts is not None
    model = reader_of(bundle)
    images = embed(towers.tower("image"), source, "image")
    texts = embed(towers.tower("text"), source, "text")
    assert texts.offsets is not None
    queries = unit_rows(texts.matrix[texts.offsets[:-1]][:asked])
    logits = (25.0 * queries @ unit_rows(images.matrix).T).numpy()
    top = np.argsort(-logits, axis=1)[:, :TOP]
    patches = _patches(model, source)
    nats = np.empty(top.shape)
    for row, own in enumerate(top):
        nats[row] = model.likelihood([source.texts[row][0]] * TOP, patches[own]).nats.numpy()
    own = top == np.arange(len(queries))[:, None]
    return np.take_along_axis(logits, top, 1), nats, own


def _hits(logits: np.ndarray, nats: np.ndarray, own: np.ndarray, weight: float) -> np.ndarray:
    scores = nats if weight == math.inf else logits + weight * nats
    return np.take_along_axis(own, scores.argmax(1)[:, None], 1)[:, 0].astype(float)


class Results:
    """What was measured so far, in a file; of another recipe it is refused."""

    def __init__(self, path: Path, recipe: Reading, pictures: dict[str, int]):
        self.path, self.setting = path, {"recipe": asdict(recipe), "pictures": pictures}
        kept = json.loads(path.read_text()) if path.exists() else {**self.setting, "results": {}}
        if {name: kept[name] for name in self.setting} != self.setting:
            raise SystemExit(f"{path} is of another recipe. Give another --out, or remove it.")
        self.held: dict[str, Any] = kept["results"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.held[name] = row
        record = {
            "question": "what a picture is worth to a small causal language model on Flickr8k's captions, from scratch",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, no GPU",
            "versions": {each: version(each) for each in ("torch", "timm", "transformers", "sacrebleu", "twofold")},
            **self.setting,
            "results": self.held,
        }
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
