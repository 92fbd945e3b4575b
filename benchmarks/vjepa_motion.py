"""Does V-JEPA read motion? Emoji drift in eight directions, and no single frame tells which.

    python benchmarks/vjepa_motion.py                       # three seeds; some five minutes of one thread each
    python benchmarks/vjepa_motion.py --clips 64 --steps 2 --runs /tmp/a --out /tmp/a.json      # tiny

V-JEPA learns from clips without their labels, once as the paper has it and once with pixels beside its tokens. Then an
attentive probe of its tokens, and a linear one of their average, say which of eight directions a clip of other emoji
drifts in (chance .125), beside the same transformer of tubelets before it learned anything, and beside an ImageNet
network that sees each frame by itself: of its frames together, which have no order, a quarter can be right at most.
Results are kept run by run; what was interrupted goes on.
"""

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.data.loader import Batches
from twofold.data.samples import motion
from twofold.data.sources import Source
from twofold.measure.probes import Probe, attentive_probe, linear_probe
from twofold.methods import VJEPA
from twofold.models.clips import ClipEncoder, FrameTokens
from twofold.models.encoders import encoder, image_encoder, inference
from twofold.models.predictor import Blocks
from twofold.models.tokens import centred
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import IJEPA, Policy

RESULTS = Path(__file__).parent / "results" / "vjepa_motion.json"
ENCODER, SIZE, FRAMES, BATCH = "timm:vit_tiny_patch16_224/8x64x3", 32, 8, 32
STILL = Policy(**{**asdict(IJEPA), "size": SIZE, "area": (1.0, 1.0)})  # a crop would change the speed
OPTIONS: dict[str, Any] = {"predictor": Blocks(1, 64, 2), "frames": FRAMES, "stride": 1}
OPTIMIZER = Optimizer(lr=1e-3, weight_decay=0.05, warmup=100)
LEARNED = {"vjepa": 0.0, "vjepa+pixels": 1.0}  # the weight of the pixels' error


def pixels(source: Source) -> torch.Tensor:
    """All clips, [n, frames, 3, size, size] of uint8."""
    clips = [torch.from_numpy(frames) for frames in source.column("video").cells]  # type: ignore[arg-type]
    return torch.stack(clips).permute(0, 1, 4, 2, 3)


def make(seed: int, *, pixels: float = 0.0) -> VJEPA:
    torch.manual_seed(runtime.seed_of(seed, "weights"))
    picture = centred(image_encoder(ENCODER, size=SIZE))
    return VJEPA(picture, policies=(STILL,), pixels=pixels, **OPTIONS)


def tokens_of(model: Any, clips: torch.Tensor) -> torch.Tensor:
    with inference(model):
        return torch.cat([model(some.float() / 255) for some in clips.split(100)])


def probed(model: Any, parts: dict[str, Source]) -> dict[str, Any]:
    x = {name: tokens_of(model, pixels(part)) for name, part in parts.items()}
    y: dict[str, Any] = {name: part.labels for name, part in parts.items()}
    average = {name: tokens.mean(1) for name, tokens in x.items()}
    penalties = (1e-2, 1e-3, 1e-4)
    attentive = attentive_probe(x["train"], y["train"], x["test"], y["test"], epochs=10, l2=penalties)
    linear = linear_probe(average["train"], y["train"], average["test"], y["test"], l2=penalties)
    return {"attentive": interval(attentive), "linear": interval(linear)}


def interval(probe: Probe) -> dict[str, float]:
    return {name: round(value, 4) for name, value in probe.accuracy._asdict().items()}


def frames() -> FrameTokens:
    """An ImageNet network that sees a frame at a time, twice as large."""
    network: Any = encoder("efficientnet-lite0")

    class Larger(torch.nn.Module):
        dim = network.dim

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"))

    return FrameTokens(Larger())  # type: ignore[arg-type]


def learned(name: str, seed: int, train: Source, *, steps: int, out: Path) -> tuple[Any, dict[str, Any]]:
    method = make(seed, pixels=LEARNED[name])
    batches = Batches({"video": pixels(train)}, batch=min(BATCH, len(train)), seed=seed)
    run = fit(method, batches, steps=steps, out=out, optimizer=OPTIMIZER, seed=seed)
    last = {name: round(run.log[-1][name], 4) for name in ("loss", "target_variance", "rank")}
    towers: Any = method.towers()["video"]
    assert isinstance(towers, ClipEncoder)
    return towers.tokens, {"steps": run.steps, **last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=2000, help="to learn from (default: 2000)")
    parser.add_argument("--steps", type=int, default=400, help="default: 400")
    parser.add_argument("--models", nargs="+", default=["untrained", "frames", *LEARNED])
    parser.add_argument("--runs", type=Path, default=Path("runs/vjepa_motion"))
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"where the figures go (default: {RESULTS.name})")
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = motion(given.clips, max(8, given.clips // 2), frames=FRAMES, size=SIZE)
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
            rows.append({"model": name, "seed": key[1], **about, **probed(model, parts)})
            print(rows[-1], flush=True)
            record = {
                "question": "which of eight directions emoji drift in, read from frozen tokens (chance .125)",
                "machine": f"{platform.machine()}, one thread, no GPU",
                "versions": {package: version(package) for package in ("torch", "timm", "twofold")},
                "setting": setting,
                "results": rows,
            }
            text = json.dumps(record, indent=1) + "\n"
            write_atomically(given.out, lambda path, text=text: path.write_text(text))
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
