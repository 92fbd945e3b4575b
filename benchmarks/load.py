"""Does `twofold serve` hold under load? Sixteen clients at once for a minute, every kind of question, one process.

    twofold demo && python benchmarks/load.py twofold-demo/index
    python benchmarks/load.py photos.index --clients 4 --seconds 10 --out /tmp/load.json

Each client asks one question after the other, without a pause: words, words under a filter, items like another, a
picture uploaded as PNG, and a thumbnail. The server is the real command in a process of its own on this machine, which
it shares with the clients: they take a part of the same cores. Latency is what a client waits for the whole answer.
"""

import argparse
import asyncio
import collections
import io
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from twofold.data.atomic import write_atomically
from twofold.retrieve.index import Index

RESULTS = Path(__file__).parent / "results" / "load.json"
WORDS = ("a red heart", "time to sleep", "musical instrument", "it is raining", "flag of a country", "something to eat")


def asked(ids: list[str], filters: list[str], pictures: list[bytes], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A kind of question, and what httpx takes to ask it."""
    kind = draw.choice(["words", "words", "words and a filter", "like an item", "a picture", "a thumbnail"])
    search = {"method": "POST", "url": "/api/v1/search"}
    words = f"{draw.choice(WORDS)} {draw.randrange(1000)}"  # never the same text twice: nothing is answered from memory
    if kind == "words":
        return kind, search | {"json": {"text": words, "k": 24}}
    if kind == "words and a filter":
        return kind, search | {"json": {"text": words, "k": 24, "where": [draw.choice(filters)]}}
    if kind == "like an item":
        return kind, search | {"json": {"like": [draw.choice(ids)], "k": 24}}
    if kind == "a picture":
        files = {"picture": ("picture.png", draw.choice(pictures))}
        return kind, {"method": "POST", "url": "/api/v1/search/picture", "files": files, "data": {"wanted": "{}"}}
    return kind, {"method": "GET", "url": "/api/v1/picture", "params": {"id": draw.choice(ids)}}


async def client(url: str, number: int, until: float, questions: tuple, seen: list[tuple[str, float, str]]) -> None:
    draw = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < until:
            kind, question = asked(*questions, draw)
            start = time.monotonic()
            try:
                answer = await http.request(**question)
                wrong = "" if answer.is_success else f"{answer.status_code}: {answer.text[:200]}"
            except httpx.HTTPError as error:
                wrong = f"{type(error).__name__}: {error}"
            seen.append((kind, time.monotonic() - start, wrong))


async def crowd(url: str, clients: int, seconds: float, questions: tuple) -> list[tuple[str, float, str]]:
    seen: list[tuple[str, float, str]] = []
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(url, number, until, questions, seen) for number in range(clients)))
    return seen


def resident(process: int) -> float:
    """MiB of memory that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


@contextmanager
def served(index: Path) -> Iterator[tuple[str, int]]:
    """`twofold serve` of an index, ready: its address and its process."""
    command = [sys.executable, "-c", "import sys; from twofold.cli import main; sys.exit(main())"]
    server = subprocess.Popen(
        [*command, "serve", str(index), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        while httpx.get(f"{url}/ready", timeout=60).status_code != 200:
            time.sleep(0.1)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(30)


def summary(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = (float(x) for x in np.quantile(seconds, [0.5, 0.95, 0.99]))
    return {"n": len(seconds)} | {
        name: round(1000 * x)
        for name, x in (("p50 ms", p50), ("p95 ms", p95), ("p99 ms", p99), ("max ms", max(seconds)))
    }


def pictures(count: int = 40) -> list[bytes]:
    """PNG files of noise over a colour, 320 pixels a side."""
    from PIL import Image

    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        pixels = np.clip(draw.integers(0, 255, 3) + draw.normal(0, 20, (320, 320, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
        made.append(file.getvalue())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with Index.open(given.index) as index:
        items = list(index.items())
    column = "group" if "group" in items[0][1] else next(iter(items[0][1]))
    filters = [
        f"{column}={value}" for value, _ in collections.Counter(str(meta[column]) for _, meta in items).most_common(4)
    ]
    questions = [name for name, _ in items], filters, pictures()
    with served(given.index) as (url, server):
        asyncio.run(crowd(url, given.clients, min(3, given.seconds), questions))  # each kind has been asked once
        before = resident(server)
        start = time.monotonic()
        seen = asyncio.run(crowd(url, given.clients, given.seconds, questions))
        took = time.monotonic() - start
        after = resident(server)
    wrong = [said for _, _, said in seen if said]
    kinds = sorted({kind for kind, _, _ in seen})
    record = {
        "question": "latency and errors of `twofold serve` under clients that ask without a pause",
        "machine": f"{platform.machine()}, 2 cores for the server and its clients",
        "versions": {name: version(name) for name in ("torch", "chromadb", "fastapi", "uvicorn")},
        "n": {"items": len(items), "clients": given.clients, "seconds": round(took, 1)},
        "requests": len(seen),
        "a second": round(len(seen) / took, 1),
        "errors": len(wrong),
        "said": wrong[:5],
        "all": summary([seconds for _, seconds, _ in seen]),
        "kinds": {kind: summary([s for k, s, _ in seen if k == kind]) for kind in kinds},
        "MiB of the server": {"before": round(before), "after": round(after)},
    }
    write_atomically(given.out, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
