"""What does a SimCLR view cost? Ours beside lightly, torchvision v2 and kornia, in one process on two threads.

    python benchmarks/views.py                    # a few minutes; writes benchmarks/results/views.json
    python benchmarks/views.py --repeats 3 --out /dev/null

Every library starts from the same uint8 pictures in memory, in the form it takes (lightly: PIL images; torchvision:
tensors, one at a time; kornia and ours: a batch), and ends with a float batch in [0, 1]. The libraries take turns
within a repeat, so that a busy moment of the machine hits all of them. Peers: `pip install twofold[bench]`.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twofold import runtime
from twofold.views import SIMCLR

LIBRARIES = ("twofold", "lightly", "torchvision", "kornia")
CASES = ((32, 32, 512, 128), (256, 224, 64, 32))  # source and view in pixels, batch, pictures for one-at-a-time peers


def ours(pictures: Tensor, size: int) -> Callable[[], Tensor]:
    policy, draw = replace(SIMCLR, size=size), runtime.generator(0)
    return lambda: policy(pictures, draw)


def lightly(pictures: Tensor, size: int) -> Callable[[], Tensor]:
    from lightly.transforms.simclr_transform import SimCLRViewTransform
    from torchvision.transforms.functional import to_pil_image

    view = SimCLRViewTransform(input_size=size, normalize=None)
    images = [to_pil_image(x) for x in pictures]
    return lambda: torch.stack([view(image) for image in images])


def torchvision(pictures: Tensor, size: int) -> Callable[[], Tensor]:
    from torchvision.transforms import v2

    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, SIMCLR.area, SIMCLR.aspect, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(window(size), SIMCLR.blur_sigma)], 0.5),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return lambda: torch.stack([view(x) for x in pictures])


def kornia(pictures: Tensor, size: int) -> Callable[[], Tensor]:
    import kornia.augmentation as K

    view = torch.nn.Sequential(
        K.RandomResizedCrop((size, size), SIMCLR.area, SIMCLR.aspect),
        K.RandomHorizontalFlip(0.5),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((window(size),) * 2, SIMCLR.blur_sigma, p=0.5),
    )
    return lambda: view(pictures / 255)


def window(size: int) -> int:
    return 2 * max(1, size // 20) + 1


def measure(source: int, size: int, batch: int, few: int, repeats: int) -> dict[str, dict]:
    pictures = torch.randint(0, 256, (batch, 3, source, source), dtype=torch.uint8, generator=runtime.generator(0))
    makers = {"twofold": ours, "lightly": lightly, "torchvision": torchvision, "kornia": kornia}
    runs, counts = {}, {}
    for name, make in makers.items():
        count = few if name in ("lightly", "torchvision") else batch
        try:
            runs[name], counts[name] = make(pictures[:count], size), count
        except ImportError as missing:
            print(f"{name} is missing ({missing}): pip install twofold[bench]")
            continue
        views = runs[name]()
        assert views.shape == (count, 3, size, size) and views.dtype == torch.float32, name
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: counts[name] / statistics.median(times) for name, times in seconds.items()}
    return {
        name: {
            "views_per_second": round(rate[name], 1),
            "ours_is_times_faster": round(rate["twofold"] / rate[name], 2),
            "views_per_repeat": counts[name],
            "fastest_and_slowest": [round(counts[name] / at(seconds[name]), 1) for at in (min, max)],
        }
        for name in runs
    }


def machine() -> dict:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": model[0].split(": ")[1] if model else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "views.json")
    args = parser.parse_args()

    torch.set_num_threads(2)
    result = {"machine": machine(), "versions": versions(), "n": args.repeats, "policy": "SimCLR", "cases": {}}
    for source, size, batch, few in CASES:
        case = f"{size} px from {source}"
        print(f"\n{case}, batch {batch}, median of {args.repeats}")
        result["cases"][case] = {"batch": batch, **measure(source, size, batch, few, args.repeats)}
        for name in LIBRARIES:
            if row := result["cases"][case].get(name):
                print(
                    f"  {name:12} {row['views_per_second']:>10.0f} views/s   1/{row['ours_is_times_faster']:g} of ours"
                )
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
