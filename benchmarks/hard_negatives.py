"""Do hard negatives help, and do guards keep false ones out? Recall by who meets whom in a batch, three seeds.

    python benchmarks/hard_negatives.py FLICKR8K/captions.csv      # an hour on one core, embeddings not counted

Heads over frozen default encoders, as `twofold align` trains them with CLIP, in batches that are a small part of the
data. A first model is trained on batches by chance (`none`) and mines; others of the same seed start anew with what was
mined: items that are hard to tell apart meet, pictures and texts alike, in groups of eight. `by chance` are groups of
other items; `refreshed` mines by itself, each epoch anew. All visit the same items as often, in as many steps.

Size of groups and number of candidates were chosen on Flickr8k's validation pictures, seeds 100 to 102 (`--split val`).
OpenMoji's skin tones tell what of the mined is false: variants of one emoji differ in them alone.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.cache import decoded
from twofold.data.loader import Batches, Choice
from twofold.data.sources import Source, open_source
from twofold.measure.embed import embed
from twofold.measure.retrieval import retrieval
from twofold.methods import CLIP, Method
from twofold.methods.negatives import Mining
from twofold.mining import NAIVE, Guards, Known, Mined, hard_negatives, perceptual_hashes
from twofold.models.encoders import encoder
from twofold.models.heads import Standardize, mlp
from twofold.train.align import linked
from twofold.train.loop import fit
from twofold.train.mine import DEEP, DEPTH, normalised
from twofold.train.optim import Optimizer

RESULTS = Path(__file__).parent / "results" / "hard_negatives.json"
COUNTED, K, GROUP, EVERY = 5, 30, 8, 1  # negatives whose truth is counted, those mined to meet; epochs between minings
HEADS = {"hidden": 512, "dim": 256}
PASSES = {16: 4, 64: 10}  # epochs by the size of a batch: 1,500 and 930 steps of Flickr8k's 6,000 pictures


@dataclass(frozen=True, eq=False)
class Part:
    """One split: features of pictures and texts, and what guards may know."""

    source: Source
    images: Tensor
    texts: Tensor
    offsets: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.images)), np.diff(self.offsets))

    def positives(self) -> list[range]:
        return [range(*pair) for pair in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)]


def part(data: Source, split: str) -> Part:
    source = data.split(split)
    images = embed(encoder("efficientnet-lite0"), source, "image")
    source = source.take(images.kept)
    texts = embed(encoder("minilm"), source, "text")
    return Part(source, torch.from_numpy(images.matrix), torch.from_numpy(texts.matrix), texts.offsets)


def known(train: Part, heads: nn.ModuleDict) -> Known:
    """What `twofold mine` knows without being told: items, words, files, hashes, and the pictures of the texts."""
    owner = torch.from_numpy(train.owner)
    words = [normalised(text) for texts in train.source.texts or () for text in texts]
    files = train.source.keys("image")
    pixels = torch.from_numpy(np.array(decoded(train.source, 32).pixels))
    return Known(
        same={"item": train.owner.tolist(), "text": words, "picture file": [files[i] for i in train.owner]},
        alike={"image": embedded(heads["image"], train.images)[owner]},
        prints=perceptual_hashes(pixels)[owner],
    )


@torch.no_grad()
def embedded(head: nn.Module, x: Tensor) -> Tensor:
    head.eval()
    return nn.functional.normalize(head(x), dim=1)


def mined(train: Part, heads: nn.ModuleDict, guards: Guards, depth: int = DEEP) -> Mined:
    images, texts = embedded(heads["image"], train.images), embedded(heads["text"], train.texts)
    about = Known() if guards == NAIVE else known(train, heads)
    return hard_negatives(images, texts, train.positives(), k=K, guards=guards, known=about, depth=depth)


def items_of(train: Part, rows: Tensor) -> Tensor:
    """The items that rows of texts belong to; −1 stays."""
    return torch.where(rows < 0, rows, torch.from_numpy(train.owner)[rows])


def trained(
    train: Part,
    batch: int,
    seed: int,
    out: Path,
    beside: Tensor | None = None,
    mine: Callable[[Method], Tensor] | None = None,
) -> nn.ModuleDict:
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(seed, "weights"))
        heads = nn.ModuleDict({"image": head(train.images), "text": head(train.texts)})
    method: Method = CLIP(dict(heads.items()))
    batches = Batches(
        {"image": train.images.numpy(), "text": Choice(train.texts.numpy(), train.offsets)},
        batch=batch,
        seed=seed,
        apart=linked(train.source, ("image", "text")),
        beside=(lambda: method.get_buffer("beside")) if mine else None if beside is None else lambda: beside,
        each=GROUP,
    )
    if mine is not None:
        every = EVERY * batches.steps_per_epoch
        method = Mining(method, items=len(train.images), k=K, every=every, mine=mine)
    fit(
        method,
        batches,
        steps=PASSES[batch] * batches.steps_per_epoch,
        out=out,
        optimizer=Optimizer(lr=1e-3, weight_decay=0.1, warmup=batches.steps_per_epoch),
        seed=seed,
        log_every=batches.steps_per_epoch,
        quiet=True,
    )
    return heads


def head(features: Tensor) -> nn.Sequential:
    """As `twofold align --hidden 512 --dim 256` builds it."""
    standard = Standardize(features.shape[1]).measure(features)
    layers = mlp(features.shape[1], HEADS["hidden"], HEADS["dim"], norm="none", activation="gelu", dropout=0.5)
    return nn.Sequential(standard, nn.Dropout(0.25), *layers)


def by_chance(train: Part, seed: int) -> Tensor:
    draw = runtime.generator(seed, "random negatives")
    return torch.randint(len(train.images), (len(train.images), K), generator=draw)


def measured(test: Part, heads: nn.ModuleDict) -> dict[str, Any]:
    images, texts = embedded(heads["image"], test.images).numpy(), embedded(heads["text"], test.texts).numpy()
    owner = test.owner
    own = [list(range(start, end)) for start, end in pairwise(test.offsets.tolist())]
    found = {
        "text_to_image": retrieval(texts, images, [[item] for item in owner.tolist()], groups=owner.tolist()),
        "image_to_text": retrieval(images, texts, own),
    }
    return {
        direction: {str(k): recall._asdict() for k, recall in one.recall.items()} for direction, one in found.items()
    }


def told(found: Mined) -> dict[str, Any]:
    return {
        "looked_at": found.looked,
        "queries_with_fewer": found.short,
        "removed": {name: one._asdict() | {"examples": None} for name, one in found.removed.items()},
    }


def named(test: Part) -> Part:
    """Each emoji with its name alone: tags are shared by many."""
    first = torch.from_numpy(test.offsets[:-1])
    return Part(test.source, test.images, test.texts[first], np.arange(len(first) + 1))


def variants(source: Source) -> dict[str, list[int]]:
    """Emoji by what they are without their skin tone, where there are several."""
    base = [of or code for of, code in zip(source.meta["skintone_of"], source.ids, strict=True)]
    members: dict[str, list[int]] = {}
    for item, code in enumerate(base):
        members.setdefault(code, []).append(item)
    return {code: items for code, items in members.items() if len(items) > 1}


def false_ones(train: Part, negatives: Tensor) -> dict[str, int]:
    """Of the hardest COUNTED that were mined, those of another skin tone of the same emoji, or of its wider family."""
    owner, family = train.owner, train.source.meta["family"]
    base = [of or code for of, code in zip(train.source.meta["skintone_of"], train.source.ids, strict=True)]
    rows = [(item, row) for item, own in enumerate(negatives[:, :COUNTED].tolist()) for row in own if row >= 0]
    pairs = [(item, int(owner[row])) for item, row in rows]
    words = [normalised(text) for texts in train.source.texts or () for text in texts]
    own_words = [{normalised(text) for text in texts} for texts in train.source.texts or ()]
    return {
        "negatives": len(pairs),
        "skin_tone_variants": sum(base[a] == base[b] and a != b for a, b in pairs),
        "same_family": sum(family[a] == family[b] for a, b in pairs),
        "own_words": sum(words[row] in own_words[item] for item, row in rows),
    }


def measure(
    name: str, train: Part, test: Part, batch: int, seed: int, folder: Path, keep: Callable[[str, dict], bool]
) -> None:
    """All ways to mine; `keep` is given each row, and asked with an empty one whether it is needed."""
    first = trained(train, batch, seed, folder / "none")
    found: dict[str, Callable[[], Mined]] = {
        "naive": lambda: mined(train, first, NAIVE),
        "guarded": lambda: mined(train, first, Guards()),
        "guarded, 100 deep": lambda: mined(train, first, Guards(), depth=DEPTH),
    }
    if name == "openmoji":
        found["family rule"] = lambda: by_family(train, first)

    def again(method: Method) -> Tensor:
        return items_of(train, mined(train, nn.ModuleDict(method.towers()), Guards()).negatives)

    for how in ("none", "by chance", *found, "refreshed"):
        if not keep(how, {}):
            continue
        of = found[how]() if how in found else None
        if of is not None:
            heads = trained(train, batch, seed, folder / how, items_of(train, of.negatives))
        elif how == "by chance":
            heads = trained(train, batch, seed, folder / how, by_chance(train, seed))
        else:
            heads = first if how == "none" else trained(train, batch, seed, folder / how, mine=again)
        row: dict[str, Any] = {"recall": measured(test, heads)}
        if of is not None:
            row["mining"] = told(of) | (false_ones(train, of.negatives) if name == "openmoji" else {})
        keep(how, row)


def by_family(train: Part, heads: nn.ModuleDict) -> Mined:
    """Mined by what is known of the items alone: the same item, words, file or family."""
    family = [train.source.meta["family"][item] for item in train.owner]
    same = {**known(train, heads).same, "family": family}
    images, texts = embedded(heads["image"], train.images), embedded(heads["text"], train.texts)
    rules = Guards(share=None, bits=None, near=None)
    return hard_negatives(images, texts, train.positives(), k=K, guards=rules, known=Known(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--data", nargs="+", default=["flickr8k"], choices=["openmoji", "flickr8k"])
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--batches", type=int, nargs="+", default=[*PASSES], choices=[*PASSES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", help="only these ways to mine, in the order of the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/hard_negatives"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = {
        "question": "recall on held-out pictures by how those that meet in a batch were mined",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "twofold")},
        "setting": {
            "epochs by batch": PASSES,
            "mined": K,
            "group": GROUP,
            "candidates": DEEP,
            "refreshed_epochs": EVERY,
            "heads": HEADS,
        },
        "guards": vars(Guards()),
    }
    for name in arguments.data:
        data = open_source("openmoji" if name == "openmoji" else arguments.captions)
        train, test = part(data, "train"), part(data, arguments.split)
        test = named(test) if name == "openmoji" else test
        for batch, seed in product(arguments.batches, arguments.seeds):
            row = f"{name}, batch {batch}, seed {seed}"

            def keep(how: str, found: dict, row: str = row) -> bool:
                written = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
                there = written.setdefault("results", {}).setdefault(row, {})
                if not found:
                    return how not in there and how in (arguments.ways or [how])
                there[how] = found
                words = json.dumps(written | about, indent=1) + "\n"
                write_atomically(arguments.out, lambda path: path.write_text(words))
                ways = ("/".join(f"{one['value']:.3f}" for one in way.values()) for way in found["recall"].values())
                print(f"{row} {how}: text → image, image → text {', '.join(ways)}", flush=True)
                return True

            measure(name, train, test, batch, seed, arguments.runs / f"{name}-{batch}-{seed}", keep)


if __name__ == "__main__":
    main()
