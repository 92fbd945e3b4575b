"""What do hostile uploads cost `twofold serve`? Each kind several times, four at once; status, seconds and memory.

    twofold demo && python benchmarks/hostile_uploads.py twofold-demo/index

The server is the real command in a process of its own. Its memory is read before, after, and twenty times a second
meanwhile. An answer of 5xx, or one that does not come, ends the script with 1.
"""

import argparse
import io
import json
import platform
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from load import resident, served
from twofold.data.atomic import write_atomically

RESULTS = Path(__file__).parent / "results" / "hostile_uploads.json"
TIMES, AT_ONCE = 8, 4


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, colour: int = 2, *, rows: int | None = None, depth: int = 8) -> bytes:
    """A PNG of zeros that says it has this size; `rows` of them are there, all if none is said."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    squeeze = zlib.compressobj(1)
    line = b"\0" * (1 + width * channels * depth // 8)
    data = b"".join(squeeze.compress(line) for _ in range(height if rows is None else rows)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(side: int = 64, **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(out := io.BytesIO(), "JPEG", **options)
    return out.getvalue()


def deep_exif() -> bytes:
    """A JPEG whose EXIF directories point to themselves and to each other."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, 8) for tag in (0x8769, 0x8825, 0xA005))
    directory = struct.pack("<H", 3) + entries + struct.pack("<I", 8)
    block = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + directory
    plain = jpeg()
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


def long_exif() -> bytes:
    """As many segments of metadata as 2 MB hold."""
    plain, segment = jpeg(), b"\xff\xe1" + struct.pack(">H", 65_533 + 2) + b"Exif\0\0" + b"\xff" * 65_527
    return plain[:2] + 30 * segment + plain[2:]


def uploads() -> dict[str, bytes]:
    return {
        "empty": b"",
        "a script": b"<script>alert(1)</script>",
        "an SVG that asks for a file": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "noise": np.random.default_rng(0).bytes(1 << 20),
        "a truncated JPEG": jpeg(512)[:20_000],
        "a truncated PNG": noise_png(512)[:300_000],
        "a PNG of which most is missing": png(2000, 2000, rows=10),
        "a PDF with a JPEG behind": b"%PDF-1.7 " + jpeg(),
        "a JPEG with a ZIP behind": jpeg() + b"PK\x03\x04" + bytes(1000),
        "a bomb: 60,000 × 60,000": png(60_000, 60_000, rows=10),
        "100 megapixels, all there": png(10_000, 10_001),
        "80 megapixels with transparency": png(8_900, 9_000, 6),
        "49 megapixels of 16 bits": png(7_000, 7_000, 2, depth=16),
        "15 megapixels with transparency": png(5_000, 3_000, 6),
        "15 megapixels of 16 bits": png(5_000, 3_000, 2, depth=16),
        "4 megapixels with transparency, side by side": png(2_000, 1_999, 6),
        "a JPEG of 48 megapixels": large_jpeg(),
        "EXIF that points to itself": deep_exif(),
        "2 MB of EXIF": long_exif(),
        "a GIF of 200 frames": frames(),
        "21 MB": bytes(21 << 20),
    }


def large_jpeg() -> bytes:
    Image.new("RGB", (8_000, 6_000), "red").save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


def noise_png(side: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def frames() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (200, 100, 100), np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(out := io.BytesIO(), "GIF", save_all=True, append_images=others)
    return out.getvalue()


def asked(url: str, content: bytes) -> tuple[int, float]:
    started = time.perf_counter()
    try:
        status = httpx.post(
            f"{url}/api/v1/search/picture", files={"picture": ("x.jpg", content)}, data={"wanted": "{}"}, timeout=120
        ).status_code
    except httpx.HTTPError:  # the server may close the connection once it has refused what is too large
        status = 413 if len(content) > 20 << 20 else 599
    return status, time.perf_counter() - started


def measured(url: str, server: int) -> Iterator[dict[str, Any]]:
    for name, content in uploads().items():
        before, highest, over = resident(server), [0.0], threading.Event()

        def watch(highest: list[float] = highest, over: threading.Event = over) -> None:
            while not over.wait(0.05):
                highest[0] = max(highest[0], resident(server))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda _, content=content: asked(url, content), range(TIMES)))
        over.set()
        watcher.join()
        yield {
            "what": name,
            "bytes": len(content),
            "status": sorted({status for status, _ in answers}),
            "slowest, s": round(max(seconds for _, seconds in answers), 2),
            "MiB before": round(before),
            "at most": round(max(highest[0], before)),
            "after": round(resident(server)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with served(given.index) as (url, server):
        assert asked(url, jpeg())[0] == 200
        rows = []
        for row in measured(url, server):
            rows.append(row)
            print(row, flush=True)
        alive = asked(url, jpeg())[0] == 200
    record = {
        "question": "status, time and memory of `twofold serve` under hostile uploads",
        "machine": f"{platform.machine()}, 2 cores",
        "versions": {name: version(name) for name in ("pillow", "fastapi", "torch")},
        "n": f"each {TIMES} times, {AT_ONCE} at once",
        "uploads": rows,
        "answers afterwards": alive,
    }
    write_atomically(given.out, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    if not alive or any(status >= 500 for row in rows for status in row["status"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
