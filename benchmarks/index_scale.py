"""How fast is an index made, how fast and how exactly does it answer, and what does it take? Beside chromadb by itself
and numpy's brute force, at 10,000, 100,000 and a million items.

    python benchmarks/index_scale.py FLICKR8K/captions.csv prepare --model runs/b   # the vectors; some minutes
    python benchmarks/index_scale.py FLICKR8K/captions.csv rate         # makes indexes of 8,000 pictures, in turns
    python benchmarks/index_scale.py FLICKR8K/captions.csv fill 100000  # fills every store; goes on where it stopped
    python benchmarks/index_scale.py FLICKR8K/captions.csv ask 100000   # asks them all, one after the other

Vectors are those of Flickr8k's 8,091 pictures, and of mixtures of two of them: the encoder's features are averages over
a picture, so a mixture is about what a collage would give; some noise is added, and the head brings it into the space
of the words. Questions are the fifth captions of the 1,000 test pictures (words among pictures: two cones), and 1,000
other mixtures (pictures among pictures). Each store is asked in a process of its own. Parts that are in the results
already are not run again, unless they are asked for with --again. The model is one of `flickr8k_align.py`: CLIP's
objective, batches of 512, seed 0.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.sources import Source, open_source
from twofold.measure.embed import APART, BATCH, embed
from twofold.models.bundle import Bundle
from twofold.models.encoders import inference
from twofold.models.fast import accelerate
from twofold.progress import Line
from twofold.retrieve.engines import Kept, engine
from twofold.retrieve.index import Index

RESULTS = Path(__file__).parent / "results" / "index_scale.json"
ITEMS, QUESTIONS, K = 1_000_000, 1_000, 10
THREADS = torch.get_num_threads()
STEP = 5_000  # items written at once, and between two looks at the clock
FINGERPRINT = "of-a-benchmark"

Ask = Callable[[np.ndarray], list[str]]


class Data(NamedTuple):
    """What lies in the benchmark's folder once it is prepared."""

    vectors: np.ndarray  # float32 [ITEMS, dim], unit rows, mapped; a collection of n items is the first n
    captions: list[str]  # of the 8,091 pictures, which the items bear again and again
    words: np.ndarray  # [QUESTIONS, dim]
    pictures: np.ndarray  # [QUESTIONS, dim]

    @staticmethod
    def of(home: Path) -> "Data":
        asked = np.load(home / "questions.npz")
        captions = json.loads((home / "captions.json").read_text("utf-8"))
        return Data(np.load(home / "vectors.npy", mmap_mode="r"), captions, asked["words"], asked["pictures"])

    def ids(self, start: int, stop: int) -> list[str]:
        return [f"{at:07}.jpg" for at in range(start, stop)]

    def meta(self, start: int, stop: int) -> list[dict[str, str]]:
        return [
            {"image": f"/home/somebody/photos/{at:07}.jpg", "text": self.captions[at % len(self.captions)]}
            for at in range(start, stop)
        ]


# -- Vectors and questions --------------------------------------------------------------------------------------------


def prepare(captions: Path, home: Path, model: Path) -> None:
    data = open_source(captions)
    bundle = Bundle.load(model)
    bundle.save(home / "model")
    tower = bundle.tower("image")
    features = embed(tower, data, "image").matrix  # the cache keeps the encoder's own
    texts = data.texts or ()
    test = [own for own, split in zip(texts, data.splits or (), strict=True) if split == "test"]
    words = np.asarray(bundle.encode([own[4] for own in test[:QUESTIONS]]))
    draw = np.random.default_rng(0)
    raw = embed(tower.encoder, data, "image").matrix
    spread = raw.std(0)

    def mixed(count: int) -> np.ndarray:
        one, other = draw.integers(0, len(raw), (2, count))
        share = draw.uniform(0.1, 0.5, (count, 1)).astype(np.float32)
        made = (1 - share) * raw[one] + share * raw[other]
        made += 0.1 * spread * draw.standard_normal(made.shape, np.float32)
        with inference(tower.head):
            return unit(tower.head(torch.from_numpy(made)).numpy())

    pictures = mixed(QUESTIONS)
    temporary = home / "vectors.tmp.npy"
    out = np.lib.format.open_memmap(temporary, "w+", np.float32, (ITEMS, bundle.dim))
    out[: len(features)] = unit(features)
    with Line("mix", unit="items") as line:
        for start in range(len(features), ITEMS, STEP):
            out[start : start + STEP] = mixed(min(STEP, ITEMS - start))
            line.update(start, ITEMS)
    out.flush()
    temporary.replace(home / "vectors.npy")
    (home / "captions.json").write_text(json.dumps([own[0] for own in texts]), "utf-8")
    np.savez(home / "questions.npz", words=unit(words), pictures=pictures)


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


# -- The rate of indexing ---------------------------------------------------------------------------------------------


def rate(captions: Path, home: Path, pictures: int, turns: int) -> dict[str, Any]:
    """Pictures a second from files to a searchable index, beside what the encoder alone makes of ready tensors."""
    os.environ["TWOFOLD_CACHE"] = str(home / "cache")  # a fresh one: nothing has been embedded or hashed before
    bundle = Bundle.load(home / "model")
    files = open_source(captions.parent / "images")
    files = files.take(range(min(pictures, len(files))))
    held = [path.read_bytes() for path in files.images or ()]  # as a table has them: thumbnails are made with the index
    tower = bundle.tower("image")
    together, apart = (accelerate(tower.encoder, runtime.cache_dir() / "onnx", threads=n) for n in (None, 1))
    ready = tower.encoder.batch([tower.encoder.prepare(item, name="") for item in held[:BATCH]])
    ways: dict[str, Callable[[], float]] = {
        f"the encoder alone, {BATCH} at once": lambda: encoding(together, ready, pictures // 3, 1),
        f"the encoder alone, {APART} a thread": lambda: encoding(apart, ready[:APART], pictures // 3, THREADS),
        "from files": lambda: indexing(files, bundle, home),
        "from a table": lambda: indexing(replace(files, images=held), bundle, home),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            rates[name].append(way())
    found = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    *own, from_files, from_table = found.values()
    return {
        "encoder": f"{tower.encoder.spec['name']}, {together.engine}",
        "pictures": pictures,
        "pictures a second": found,
        "turns": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "of the encoder's rate, at its faster": {
            "from files": round(from_files / max(own), 3),
            "from a table, which makes thumbnails": round(from_table / max(own), 3),
        },
    }


def encoding(run: Callable, ready: torch.Tensor, pictures: int, threads: int) -> float:
    """Pictures a second of an encoder that has nothing else to do, called by so many threads."""

    def calls(_: int) -> None:
        for _ in range(pictures // threads // len(ready)):
            run(ready)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(calls, range(threads)))
    return pictures / (time.perf_counter() - started)


def indexing(source: Source, bundle: Bundle, home: Path) -> float:
    for folder in (home / "cache" / "vectors", home / "index"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (home / "cache").glob("files.sqlite*"):
        file.unlink()
    started = time.perf_counter()
    built = Index.build(source, bundle, home / "index", texts="none")
    took = time.perf_counter() - started
    assert built.items == len(source) and built.embedded > 0.99 * len(source), built  # some are there twice
    return len(source) / took


def command(captions: Path, home: Path) -> dict[str, Any]:
    """The same by the command, with all that a process does first: imports, the model, the export of the graph."""
    out = home / "by-command"
    for folder in (out, home / "command-cache"):
        shutil.rmtree(folder, ignore_errors=True)
    run = "import sys; from twofold.cli import main; sys.exit(main(sys.argv[1:]))"
    images, model = captions.parent / "images", home / "model"
    environment = os.environ | {"TWOFOLD_CACHE": str(home / "command-cache")}
    started = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-c", run, "index", images, "--model", model, "--out", out, "--json"],
        capture_output=True,
        check=True,
        env=environment,
    )
    items = json.loads(said.stdout)["items"]
    took = time.perf_counter() - started
    return {"items": items, "seconds": round(took, 1), "pictures a second": round(items / took, 1)}


# -- Stores -----------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """A way to keep vectors and find the nearest: `fill(folder, data, n, until)` says how many it holds now."""

    fill: Callable[[Path, Data, int, float], int]
    opened: Callable[[Path, Data, int], contextlib.AbstractContextManager[Ask]]


def ours(kept: Kept) -> Peer:
    def fill(folder: Path, data: Data, n: int, until: float) -> int:
        stores = engine(kept, folder, "")
        with contextlib.closing(stores.open("0001", fingerprint=FINGERPRINT, dim=data.words.shape[1], write=True)) as s:
            return filled(s.upsert, data, len(s), n, until)

    @contextlib.contextmanager
    def opened(folder: Path, data: Data, n: int) -> Iterator[Ask]:
        stores = engine(kept, folder, "")
        with contextlib.closing(stores.open("0001", fingerprint=FINGERPRINT, dim=data.words.shape[1])) as store:
            yield lambda vector: [hit.id for hit in store.query(vector, K)]

    return Peer(fill, opened)


def plain_chroma() -> Peer:
    def collection(folder: Path) -> Any:
        import chromadb

        client = chromadb.PersistentClient(str(folder), chromadb.Settings(anonymized_telemetry=False))
        return client.get_or_create_collection(
            "items", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
        )

    def fill(folder: Path, data: Data, n: int, until: float) -> int:
        items = collection(folder)
        return filled(lambda ids, vectors, meta: items.add(ids, vectors, meta), data, items.count(), n, until)

    @contextlib.contextmanager
    def opened(folder: Path, data: Data, n: int) -> Iterator[Ask]:
        items = collection(folder)
        yield lambda vector: items.query(query_embeddings=vector[None], n_results=K)["ids"][0]

    return Peer(fill, opened)


def brute_force() -> Peer:
    def fill(folder: Path, data: Data, n: int, until: float) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vectors.npy", data.vectors[:n])
        return n

    @contextlib.contextmanager
    def opened(folder: Path, data: Data, n: int) -> Iterator[Ask]:
        vectors, ids = np.load(folder / "vectors.npy", mmap_mode="r"), data.ids(0, n)

        def ask(vector: np.ndarray) -> list[str]:
            scores = vectors @ vector
            best = np.argpartition(scores, -K)[-K:]
            return [ids[at] for at in best[np.argsort(-scores[best])]]

        yield ask

    return Peer(fill, opened)


PEERS: dict[str, Peer] = {
    "twofold, chroma (the default)": ours(Kept("chroma")),
    "twofold, exact": ours(Kept("exact")),
    "chromadb by itself": plain_chroma(),
    "numpy, brute force": brute_force(),
}


def filled(upsert: Callable, data: Data, held: int, n: int, until: float) -> int:
    """Write items `held` to n, as far as there is time; how many there are then."""
    while held < n and time.time() < until:
        stop = min(held + STEP, n)
        upsert(data.ids(held, stop), np.asarray(data.vectors[held:stop]), data.meta(held, stop))
        held = stop
    return held


def fill(name: str, home: Path, n: int, until: float) -> dict[str, Any]:
    """Fill a store to n items, or as far as there is time; the seconds it took so far are kept beside it."""
    folder = place(home, name, n)
    note = folder.with_suffix(".json")
    known = json.loads(note.read_text()) if note.exists() else {"items": 0, "seconds": 0.0, "parts": []}
    if known["items"] < n:
        started, cpu = time.time(), time.process_time()
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = PEERS[name].fill(folder, Data.of(home), n, until)
        took = {"from": known["items"], "to": held, "seconds": round(time.time() - started, 1)}
        took["CPU seconds"] = round(time.process_time() - cpu, 1)
        known = {"items": held, "seconds": known["seconds"] + took["seconds"], "parts": [*known["parts"], took]}
        note.write_text(json.dumps(known))
    return known


def place(home: Path, name: str, n: int) -> Path:
    return home / str(n) / "".join(c if c.isalnum() else "-" for c in name)


def right(data: Data, n: int, questions: np.ndarray) -> np.ndarray:
    """The score of each question's K-th nearest item: what is found is right if it scores as much."""
    best = np.full((len(questions), K), -np.inf, np.float32)
    for start in range(0, n, 50_000):
        scores = questions @ data.vectors[start : min(start + 50_000, n)].T
        top = np.partition(scores, -K, axis=1)[:, -K:]
        best = np.partition(np.concatenate([best, top], 1), -K, axis=1)[:, -K:]
    return best.min(1)


def ask(name: str, home: Path, n: int, questions: int) -> dict[str, Any]:
    """Latency of one question after the other, recall, and memory; in a process that has done nothing else."""
    data, folder = Data.of(home), place(home, name, n)
    asked = {"words": data.words[:questions], "pictures": data.pictures[:questions]}
    before = memory()
    started = time.perf_counter()
    with PEERS[name].opened(folder, data, n) as find:
        find(data.pictures[-1])
        found: dict[str, Any] = {"opened and asked once, ms": round(1000 * (time.perf_counter() - started))}
        for vector in data.pictures[-20:]:
            find(vector)
        answers: dict[str, list[list[str]]] = {}
        for what, vectors in asked.items():
            took, answers[what] = [], []
            for vector in vectors:
                began = time.perf_counter()
                answers[what].append(find(vector))
                took.append(1000 * (time.perf_counter() - began))
            found[f"{what}, ms"] = {f"p{q}": round(float(np.percentile(took, q)), 2) for q in (50, 95, 99)}
        after = memory()
    found["MiB of memory"] = {kind: round(after[kind] - before[kind]) for kind in after}
    for what, vectors in asked.items():
        least = right(data, n, vectors)
        hits = [
            sum(float(data.vectors[int(id[:7])] @ vector) >= low - 1e-6 for id in ids)
            for vector, ids, low in zip(vectors, answers[what], least, strict=True)
        ]
        found[f"recall@{K} of {what}"] = round(sum(hits) / (K * len(hits)), 4)
    found["MiB on disk"] = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20)
    return found


def memory() -> dict[str, float]:
    """MiB of this process: its own, and pages of mapped files, which the system takes back where it needs them."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        kind: int(lines[field].split()[0]) / 1024
        for kind, field in (("own", "RssAnon"), ("of mapped files", "RssFile"))
    }


def alone(work: Callable, *given: Any) -> Any:
    """What `work` returns from a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


# -- The record -------------------------------------------------------------------------------------------------------


def kept() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(key: str, found: Any) -> None:
    record = {
        "question": "rate of indexing, latency, recall, memory and disk of stores",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "chromadb", "numpy")},
        "n": f"vectors [512] of a model aligned on Flickr8k, k = {K}; see the script's first lines",
        **{name: value for name, value in kept().items() if name not in ("question", "machine", "versions", "n")},
    }
    record[key] = found
    write_atomically(RESULTS, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps({key: found}, indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("part", choices=("prepare", "rate", "fill", "ask"))
    parser.add_argument("items", type=int, nargs="?", default=100_000)
    parser.add_argument("--home", type=Path, default=Path("runs/index_scale"))
    parser.add_argument("--model", type=Path, help="of `prepare`: a bundle of pictures and words")
    parser.add_argument("--only", nargs="*", default=list(PEERS), help="of these stores, which")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--pictures", type=int, default=8_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=540, help="of `fill`: when to stop for this time")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    given.home.mkdir(parents=True, exist_ok=True)
    if given.part == "prepare":
        if not given.model:
            parser.error("`prepare` takes --model, such as runs/flickr8k_align/clip-512-seed-0")
        prepare(given.captions, given.home, given.model)
    elif given.part == "rate":
        key = f"rate of {given.pictures} pictures"
        if given.again or key not in kept():
            keep(key, rate(given.captions, given.home, given.pictures, given.turns))
        if given.again or "command" not in kept():
            keep("command", command(given.captions, given.home))
    elif given.part == "fill":
        until = time.time() + given.seconds
        for name in given.only:
            print(name, alone(fill, name, given.home, given.items, until), flush=True)
    else:
        key = f"{given.items} items"
        for name in given.only:
            rows = kept().get(key, {})
            note = place(given.home, name, given.items).with_suffix(".json")
            filling = json.loads(note.read_text()) if note.exists() else {"items": 0}
            if filling["items"] < given.items:
                print(f"{name}: not filled with {given.items:,} items")
            elif given.again or name not in rows:
                found = alone(ask, name, given.home, given.items, given.questions)
                keep(key, rows | {name: {"filled in s": round(filling["seconds"]), **found}})


if __name__ == "__main__":
    main()
