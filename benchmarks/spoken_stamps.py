"""Speech, its transcript and its picture: how far does a sound encoder come that starts from nothing?

    apt-get install tuxpaint-stamps-default        # GPL-2; 785 pictures, described and read aloud in many languages
    python benchmarks/spoken_stamps.py             # some hours on one core; stopped, it goes on where it was

Some 7,000 recordings of about a second, eight languages, mostly one voice each. Stamps that share a recording, a
picture or a description in any language are one group, and groups are held out: nothing that is measured was seen or
said in training. The sound encoder (`mel:tiny`, log-mel spectrograms and two layers) is trained. It is held against

* the transcript, in the spoken language, as counts of its letters and of their pairs and triples: a column of vectors,
* the picture, seen by a frozen EfficientNet-Lite0. One language is left out of this training: it is measured with
  stamps that were held out, too, and with those that were learned in other languages.

`length alone` ranks transcripts by how well their number of letters suits the duration, which needs no learning.
"""

import argparse
import json
import os
import platform
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np

from twofold.data.audio import RATE
from twofold.data.cache import decoded_sounds
from twofold.data.loader import sharing
from twofold.data.sources import Column, Source, content_key
from twofold.measure.evaluate import both_ways
from twofold.measure.matched import matched
from twofold.measure.retrieval import retrieval
from twofold.train.align import Recipe, align, normalised

STAMPS = Path("/usr/share/tuxpaint/stamps")
RESULTS = Path(__file__).parent / "results" / "spoken_stamps.json"
LANGUAGES = ("fr", "ru", "ro", "ca", "bg", "es", "be", "el")
LEFT_OUT = "ca"  # its nearest relatives, French, Spanish and Romanian, stay
WIDTH = 2048  # of the vectors of letters
SPEECH = Recipe(objective="clip", train="speech", batch=256, lr=1e-3, epochs=6, patience=8)


def stamps(folder: Path, languages_of: Sequence[str], limit: int | None) -> Source:
    """Every recording, with its picture and what is said."""
    rows: list[tuple[str, str, Path, Path, str]] = []
    for text in sorted(folder.rglob("*.txt")):
        picture = text.with_suffix(".png")
        said = dict(re.findall(r"^([a-z]{2})\.utf8=(.+)$", text.read_text("utf-8", errors="replace"), re.MULTILINE))
        for language in languages_of:
            sound = text.with_name(f"{text.stem}_desc_{language}.ogg")
            if language in said and sound.is_file() and picture.is_file():
                stamp = text.relative_to(folder).with_suffix("").as_posix()
                rows.append((stamp, language, picture, sound, said[language].strip()))
    names, languages, pictures, sounds, texts = zip(*rows[:limit], strict=True)
    keys = {path: content_key(path.read_bytes()) for path in {*pictures, *sounds}}
    group = sharing(
        [[name] for name in names],
        [[keys[path]] for path in pictures],
        [[keys[path]] for path in sounds],
        [[(language, normalised(text))] for language, text in zip(languages, texts, strict=True)],
    )
    order = sorted(set(group.tolist()), key=lambda one: content_key(str(one)))
    held = dict.fromkeys(order[: len(order) // 5], "test") | dict.fromkeys(
        order[len(order) // 5 : len(order) * 3 // 10], "val"
    )
    return Source(
        str(folder),
        [f"{name}@{language}" for name, language in zip(names, languages, strict=True)],
        images=list(pictures),
        texts=[[text] for text in texts],
        splits=[held.get(one, "train") for one in group.tolist()],
        columns={
            "speech": Column("audio", list(sounds)),
            "letters": Column("vector", list(letters(texts))),
        },
        meta={"language": list(languages), "stamp": list(names)},
    )


def letters(texts: Sequence[str]) -> np.ndarray:
    """Log counts of single letters, pairs and triples, hashed into WIDTH columns; rows of length 1."""
    found = np.zeros((len(texts), WIDTH), np.float32)
    for row, text in zip(found, texts, strict=True):
        padded = f" {normalised(text)} "
        for n in (1, 2, 3):
            for at in range(len(padded) - n + 1):
                row[zlib.crc32(padded[at : at + n].encode()) % WIDTH] += 1
    found = np.log1p(found)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def within(bundle: Any, test: Source, other: str) -> dict[str, Any]:
    """Recall within each language, whose recordings and partners alone are the gallery, and over all queries."""
    row = {}
    for language in LANGUAGES:
        own = [item for item, spoken in enumerate(test.meta["language"]) if spoken == language]
        if len(own) > 1:
            row[language] = told(both_ways(matched(bundle, test.take(own), ("speech", other), quiet=True)))
    return row


def told(found: dict) -> dict[str, Any]:
    return {
        way: {
            "recall": {str(k): one._asdict() for k, one in each.recall.items()},
            "chance": {str(k): one for k, one in each.chance.items()},
            "median_rank": each.median_rank,
            "gallery": each.gallery,
        }
        for way, each in found.items()
    }


def by_length(train: Source, test: Source) -> dict[str, Any]:
    """Duration against number of letters, by a line fitted on the training part of the language."""
    row = {}
    heard = [(part, decoded_sounds(part, "speech", RATE, 30).waves) for part in (train, test)]
    for language in LANGUAGES:
        parts = []
        for part, waves in heard:
            own = [item for item, spoken in enumerate(part.meta["language"]) if spoken == language]
            seconds = np.array([len(waves[item]) / RATE for item in own])
            parts.append((seconds, np.array([float(len(part.texts[item][0])) for item in own])))  # type: ignore[index]
        if len(parts[1][0]) > 1 and len(parts[0][0]) > 1:
            slope, start = np.polyfit(parts[0][1], parts[0][0], 1)
            asked, answers = parts[1][0], parts[1][1] * slope + start
            # On a circle wide enough, nearer is more alike: cosine ranks as the difference does.
            angle = [np.stack([np.cos(x / 20), np.sin(x / 20)], 1).astype(np.float32) for x in (asked, answers)]
            own = [[at] for at in range(len(asked))]
            row[language] = told({"speech_to_letters": retrieval(angle[0], angle[1], own)})
    return row


def mean(row: dict[str, Any], way: str) -> str:
    """Over languages, weighed by their queries: R@1/5/10, and chance."""
    cells = []
    for what in ("recall", "chance"):
        for k in ("1", "5", "10"):
            values = [(each[way][what][k], each[way]["gallery"]) for each in row.values() if way in each]
            total = sum(n for _, n in values)
            cells.append(sum((v["value"] if what == "recall" else v) * n for v, n in values) / total)
    return "/".join(f"{cell:.3f}" for cell in cells[:3]) + ", by chance " + "/".join(f"{c:.3f}" for c in cells[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--limit", type=int, help="only so many recordings, to try it out")
    parser.add_argument("--epochs", type=int, default=SPEECH.epochs)
    parser.add_argument("--batch", type=int, default=SPEECH.batch)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--languages", nargs="+", default=LANGUAGES, choices=LANGUAGES)
    parser.add_argument("--only", nargs="+", default=["letters", "image"], choices=["letters", "image"])
    parser.add_argument("--runs", type=Path, default=Path(gettempdir()) / "twofold-spoken-stamps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    source = stamps(given.stamps, given.languages, given.limit)
    train, test = source.split("train"), source.split("test")
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"results": {}}
    record |= {
        "question": "recall between recordings of held-out stamps and their transcripts or pictures; 95 % intervals",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "av", "twofold")},
        "left_out": LEFT_OUT,
    }
    rows = record["results"]
    if "letters" in given.only:
        rows["length alone"] = by_length(train, test)
        print("length alone", mean(rows["length alone"], "speech_to_letters"), flush=True)
    kept = [item for item, spoken in enumerate(source.meta["language"]) if spoken != LEFT_OUT]
    parts = {"letters": (source, "vectors"), "image": (source.take(kept), "efficientnet-lite0")}
    for other, seed in product(given.only, given.seeds):
        if f"{other}, seed {seed}" in rows:
            continue
        (learned, spec), recipe = parts[other], replace(SPEECH, epochs=given.epochs, batch=given.batch, seed=seed)
        out = given.runs / f"{other}-{seed}"
        done = align(learned, out=out, towers={"speech": "mel:tiny", other: spec}, recipe=recipe)
        record.setdefault("learned", {})[other] = {
            "recordings": {name: list(learned.splits or ()).count(name) for name in ("train", "val", "test")},
            "languages": sorted(set(learned.meta["language"])),
            "speech": "mel:tiny",
            "recipe": {name: getattr(recipe, name) for name in ("objective", "batch", "epochs")},
        }
        found = {
            f"{other} untrained, seed {seed}": within(done.untrained, test, other),
            f"{other}, seed {seed}": within(done.bundle, test, other),
        }
        if other == "image":
            heard = set(learned.keys("speech"))  # some recordings stand under two languages
            own = zip(train.meta["language"], train.keys("speech"), strict=True)
            new = [item for item, (spoken, key) in enumerate(own) if spoken == LEFT_OUT and key not in heard]
            found[f"{LEFT_OUT} left out, known stamps, seed {seed}"] = within(done.bundle, train.take(new), other)
        rows |= found
        for name, row in found.items():
            for way in sorted({way for each in row.values() for way in each}):
                print(f"{name}, {way}: {mean(row, way)}", flush=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
