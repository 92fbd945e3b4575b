"""Does V-JEPA read motion? Emoji drift in eight directions, and no single frame tells which.

    python benchmarks/vjepa_motion.py                       # three seeds; some forty minutes of one thread
    python benchmarks/vjepa_motion.py --clips 64 --steps 2 --runs /tmp/a --out /tmp/a.json      # tiny

V-JEPA learns from clips without their labels: behind the paper's tubes, and from the first half of a clip what comes in
the second; each with and without pixels beside its tokens. Then an attentive probe of its tokens, and a linear one of
their average, say which of eight directions a clip of other emoji drifts in (chance .125), beside the same transformer
of tubelets before it learned anything, and beside an ImageNet network that sees each frame by itself: of its frames
together, which have no order, half can be right at most. Intervals draw test clips, the seeds' answers for one of
them together. Steps, rates and shapes were chosen on emoji of OpenMoji's validation split. Results are kept run by run;
what was interrupted goes on.
"""

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.data.samples import motion
from twofold.data.sources import Source
from twofold.measure.metrics import Interval, bootstrap
from twofold.measure.probes import attentive_probe, linear_probe
from twofold.methods import VJEPA
from twofold.models.clips import ClipEncoder, FrameTokens
from twofold.models.encoders import encoder, image_encoder, inference
from twofold.models.predictor import Blocks
from twofold.models.tokens import centred
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import IJEPA, Policy

RESULTS = Path(__file__).parent / "results" / "vjepa_motion.json"
ENCODER, SIZE, FRAMES, BATCH = "timm:vit_tiny_patch16_224/8x64x3", 32, 8, 16
STILL = Policy(**{**asdict(IJEPA), "size": SIZE, "area": (1.0, 1.0)})  # a crop would change the speed
OPTIONS: dict[str, Any] = {"predictor": Blocks(2, 64, 4), "frames": FRAMES, "stride": 1, "momentum": 0.99}
OPTIMIZER = Optimizer(lr=2e-3, weight_decay=0.05, warmup=50)
LEARNED: dict[str, dict[str, float]] = {
    "future+pixels": {"future": 0.5, "pixels": 1.0},
    "future": {"future": 0.5},
    "tubes+pixels": {"pixels": 1.0},
    "tubes": {},
}
MODELS = ("untrained", "frames", *LEARNED)


def pixels(source: Source) -> torch.Tensor:
    """All clips, [n, frames, 3, size, size] of uint8."""
    clips = [torch.from_numpy(frames) for frames in source.column("video").cells]  # type: ignore[arg-type]
    return torch.stack(clips).permute(0, 1, 4, 2, 3)


def make(seed: int, **options: float) -> VJEPA:
    torch.manual_seed(runtime.seed_of(seed, "weights"))
    picture = centred(image_encoder(ENCODER, size=SIZE))
    return VJEPA(picture, policies=(STILL,), **OPTIONS, **options)


def tokens_of(model: Any, clips: torch.Tensor) -> torch.Tensor:
    with inference(model):
        return torch.cat([model(some.float() / 255) for some in clips.split(20)])


def probed(model: Any, parts: dict[str, Source]) -> dict[str, Any]:
    """Accuracies, and of each test clip whether the answer was right."""
    x = {name: tokens_of(model, pixels(part)) for name, part in parts.items()}
    y: dict[str, Any] = {name: part.labels for name, part in parts.items()}
    average = {name: tokens.mean(1) for name, tokens in x.items()}
    penalties = (1e-2, 1e-3, 1e-4)
    found = {
        "attentive": attentive_probe(x["train"], y["train"], x["test"], y["test"], epochs=10, l2=penalties),
        "linear": linear_probe(average["train"], y["train"], average["test"], y["test"], l2=penalties),
    }
    return {
        name: {
            "accuracy": round(probe.accuracy.value, 4),
            "right": "".join(str(int(hit)) for hit in probe.predicted == y["test"]),
        }
        for name, probe in found.items()
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each model the mean over seeds, an interval over test clips, and its gaps to what learned nothing."""

    def right(model: str, probe: str) -> np.ndarray:
        return np.mean([[int(hit) for hit in row[probe]["right"]] for row in rows if row["model"] == model], axis=0)

    found: dict[str, Any] = {"chance": 0.125}
    models = dict.fromkeys(row["model"] for row in rows)
    for model in models:
        for probe in ("attentive", "linear"):
            cell: dict[str, Any] = {"accuracy": told(bootstrap(right(model, probe)))}
            cell["seeds"] = [row[probe]["accuracy"] for row in rows if row["model"] == model]
            for other in ("untrained", "frames") if model in LEARNED else ():
                if other in models:
                    cell[f"above {other}"] = told(bootstrap(right(model, probe) - right(other, probe)))
            found.setdefault(model, {})[probe] = cell
    return found


def told(value: Interval) -> dict[str, float]:
    return {name: round(number, 4) for name, number in value._asdict().items()}


def frames() -> FrameTokens:
    """An ImageNet network that sees a frame at a time, twice as large."""
    network: Any = encoder("efficientnet-lite0")

    class Larger(torch.nn.Module):
        dim = network.dim

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"))

    return FrameTokens(Larger())  # type: ignore[arg-type]


def learned(name: str, seed: int, train: Source, *, steps: int, out: Path) -> tuple[Any, dict[str, Any]]:
    method = make(seed, **LEARNED[name])
    batches = Batches({"video": pixels(train)}, batch=min(BATCH, len(train)), seed=seed)
    run = fit(method, batches, steps=steps, out=out, optimizer=OPTIMIZER, seed=seed)
    last = {name: round(run.log[-1][name], 4) for name in ("loss", "target_variance", "rank")}
    towers: Any = method.towers()["video"]
    assert isinstance(towers, ClipEncoder)
    return towers.tokens, {"steps": run.steps, **last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=4000, help="to learn from; a quarter to test (default: 4000)")
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--runs", type=Path, default=Path("runs/vjepa_motion"))
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = motion(given.clips, max(8, given.clips // 4), frames=FRAMES, size=SIZE, side=SIZE)
    parts = {name: source.split(name) for name in ("train", "test")}
    setting = {"encoder": ENCODER, "clips": given.clips, "steps": given.steps, "frames": FRAMES, "batch": BATCH}
    held = json.loads(given.out.read_text()) if given.out.exists() else {"setting": setting, "results": []}
    if held["setting"] != setting:
        raise SystemExit(f"{given.out} is of another setting: {held['setting']}. Give another --out, or remove it.")
    rows: list[dict[str, Any]] = held["results"]
    for seed in given.seeds:
        for name in given.models:
            key = (name, 0 if name == "frames" else seed)
            if key in [(row["model"], row["seed"]) for row in rows]:
                continue
            about: dict[str, Any] = {}
            if name in LEARNED:
                place = given.runs / name / str(seed)
                model, about = learned(name, seed, parts["train"], steps=given.steps, out=place)
            else:
                model = frames() if name == "frames" else make(seed).tokens
            row = probed(model, parts)
            rows.append({"model": name, "seed": key[1], **about, **row})
            rows.sort(key=lambda row: (MODELS.index(row["model"]), row["seed"]))
            record = {
                "question": "which of eight directions emoji drift in, read from frozen tokens (chance .125)",
                "machine": f"{platform.machine()}, one thread, no GPU",
                "versions": {package: version(package) for package in ("torch", "timm", "twofold")},
                "setting": setting,
                "test clips": len(parts["test"]),
                "summary": summary(rows),
                "results": rows,
            }
            text = json.dumps(record, indent=1) + "\n"
            write_atomically(given.out, lambda path, text=text: path.write_text(text))
            print(*key, about, {probe: row[probe]["accuracy"] for probe in ("attentive", "linear")}, flush=True)
    print(json.dumps(summary(rows), indent=1))
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
