"""How close is the kNN probe to what the matrix product alone takes? 50,000 rows of 512, 10,000 queries, two threads.

    python benchmarks/knn.py              # a minute and a half on two quiet cores
    python benchmarks/knn.py --bank 5000 --queries 500 --turns 1 --out /tmp/knn.json

In turns: the product of all queries with the bank in blocks of the size the probe uses and nothing else, the probe's
search for the 20 nearest, and the whole probe (normalisation, search, votes, interval). scikit-learn's brute search
must find the same neighbours. Memory is the most the process held beyond its inputs.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from twofold.data.atomic import write_atomically
from twofold.measure.metrics import nearest, row_blocks, unit_rows
from twofold.measure.probes import knn_probe

RESULTS = Path(__file__).parent / "results" / "knn.json"
K, WIDTH, CLASSES = 20, 512, 10


def peak(run: Callable[[], object]) -> float:
    """MiB that `run` takes at its most beyond what the process held before."""
    status = Path("/proc/self/status")

    def field(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return (field("VmHWM") - before) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(CLASSES, WIDTH))
    y, answers = (draw.integers(0, CLASSES, n) for n in (asked.bank, asked.queries))
    z, test = (
        (centres[labels] / 4 + draw.normal(size=(len(labels), WIDTH))).astype(np.float32) for labels in (y, answers)
    )
    bank, queries = unit_rows(z), unit_rows(test)

    def product() -> None:
        held = torch.empty(0)
        for block in row_blocks(len(queries), len(bank)):
            some = queries[block]
            held = held if len(held) == len(some) else torch.empty(len(some), len(bank))
            torch.mm(some, bank.T, out=held)

    runs = {
        "matrix product alone": product,
        "search": lambda: nearest(queries, bank, K),
        "probe": lambda: knn_probe(z, y, test, answers, k=K),
    }
    memory = {name: peak(run) for name, run in runs.items()}  # a first turn, which warms up
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.turns):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - started)
    started = time.perf_counter()
    few = min(1_000, asked.queries)  # scikit-learn takes its time
    reference = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(bank.numpy())
    expected = reference.kneighbors(queries[:few].numpy(), return_distance=False)
    sklearn = (time.perf_counter() - started) * asked.queries / few
    ours = nearest(queries[:few], bank, K).rows.numpy()
    same = float((np.sort(ours, 1) == np.sort(expected, 1)).mean())
    flops = 2 * asked.bank * asked.queries * WIDTH
    median = {name: statistics.median(values) for name, values in took.items()}
    rows = [
        {
            "what": name,
            "seconds": round(median[name], 3),
            "turns": [round(value, 3) for value in took[name]],
            "GFLOP/s": round(flops / median[name] / 1e9, 1),
            "of the product's rate": round(median["matrix product alone"] / median[name], 3),
            "MiB": round(memory[name]),
        }
        for name in runs
    ]
    rows.append({"what": f"scikit-learn, brute, from {few} queries", "seconds": round(sklearn, 1)})
    result = {
        "question": "kNN probe against the rate of the matrix product alone, float32",
        "machine": f"{platform.machine()}, {asked.threads} threads, no GPU",
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "twofold")},
        "n": {"bank": asked.bank, "queries": asked.queries, "width": WIDTH, "k": K, "turns": asked.turns},
        "same neighbours as scikit-learn": same,
        "results": rows,
    }
    write_atomically(asked.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
