"""What every method keeps, whatever it computes. A new method is tested by being in METHODS."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from twofold import runtime
from twofold.data.loader import Batches
from twofold.methods import METHODS, Method, Out
from twofold.models.bundle import Bundle
from twofold.models.captioner import captioner
from twofold.models.encoders import Encoder, image_encoder
from twofold.models.heads import Head
from twofold.models.predictor import Blocks
from twofold.train.checkpoint import load
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR

DOCS = Path(__file__).parents[2] / "docs" / "methods"
N, BATCH, SIZE, WIDTH, FRAMES = 64, 16, 16, 24, 4
POLICY = replace(
    SIMCLR_CIFAR, size=SIZE, area=(0.5, 1.0), jitter=0.2, gray=0.0
)  # mild: there are few steps to learn in
pytestmark = pytest.mark.parametrize("name", METHODS)


def of_pictures(name: str) -> bool:
    return "text" not in METHODS[name].needs  # single ones, or clips of them


SAID = [f"blotch {number}" for number in range(8)]


def spoken(ids: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make(name: str) -> Method:
    """A small one of its kind, always with the same weights."""
    torch.manual_seed(0)
    if name == "coca":
        towers = captioner("coca:tiny", image_encoder("timm:resnet18/8", size=SIZE, small_stem=True), SAID)
        return METHODS[name](towers, views={"image": POLICY, "text": spoken})
    if not of_pictures(name):
        return METHODS[name]({"image": nn.Linear(WIDTH, 8), "text": nn.Linear(WIDTH, 8)})
    defaults = {key: p.default for key, p in inspect.signature(METHODS[name]).parameters.items()}
    heads = {key: replace(head, hidden=64, dim=32) for key, head in defaults.items() if isinstance(head, Head)}
    small = heads | {key: Blocks(2, 32, 2) for key, blocks in defaults.items() if isinstance(blocks, Blocks)}
    if len(small) == len(heads):
        encoder = image_encoder("timm:resnet18/8", size=SIZE, small_stem=True)
    else:  # what is masked are patches
        encoder = image_encoder("timm:vit_tiny_patch16_224/2x32x2", size=SIZE)
    short = {"queue": 4 * BATCH, "frames": FRAMES}
    small |= {key: value for key, value in short.items() if key in defaults}
    return METHODS[name](encoder, policies=(POLICY,) * len(defaults["policies"]), **small)


def batches(name: str, *, batch: int = BATCH) -> Batches:
    draw = torch.Generator().manual_seed(1)
    if of_pictures(name) or name == "coca":
        label = torch.arange(N) % 8
        coarse = torch.rand(8, 3, 2, 2, generator=draw)[label] + torch.rand(N, 3, 2, 2, generator=draw)
        pictures = nn.functional.interpolate(coarse / 2, SIZE, mode="bilinear")  # blotches that survive a crop
        image = (pictures * 255).byte()
        video = torch.stack([image.roll(frame, -1) for frame in range(FRAMES)], 1)
        text = 2 + label[:, None].expand(-1, 3)  # after its edge, as `make`'s vocabulary has any token
        columns = {"image": image, "video": video, "label": label, "text": text}
        return Batches({column: columns[column] for column in METHODS[name].needs}, batch=batch, seed=0)
    common = torch.randn(N, WIDTH, generator=draw)
    columns = {side: common + 0.1 * torch.randn(N, WIDTH, generator=draw) for side in METHODS[name].needs}
    return Batches(columns, batch=batch, seed=0)


def run(method: Method, name: str, seed: int = 0) -> Out:
    return method(batches(name)[0], runtime.generator(seed))


def test_the_loss_is_a_finite_scalar_beside_its_chance_level(name):
    out = run(make(name), name)
    assert out.loss.shape == ()
    assert out.loss.isfinite()
    assert out.z.ndim == 2
    assert math.isnan(out.chance) or out.chance > 0


def test_every_parameter_that_learns_gets_a_gradient(name):
    method = make(name)
    run(method, name).loss.backward()
    without = [key for key, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_the_generator_alone_decides_what_is_random(name):
    first, again = (run(make(name), name, seed=3) for _ in range(2))
    assert torch.equal(first.loss, again.loss)
    if of_pictures(name):
        assert not torch.equal(first.loss, run(make(name), name, seed=4).loss)


def test_it_learns(name, tmp_path):
    optimizer = Optimizer(lr=1e-2, warmup=4)
    done = fit(make(name), batches(name), steps=40, out=tmp_path, optimizer=optimizer, log_every=1, quiet=True)
    losses = [line["loss"] for line in done.log]
    first, last = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    chance = done.log[-1].get("chance")
    start = first if chance is None else max(first, chance)  # MoCo's first queue is random, easier than any real one
    assert last < start - 0.05 * abs(start)  # some are a negative cosine
    assert chance is None or last < chance


def test_stopped_and_started_again_it_ends_with_the_same_weights(name, tmp_path):
    def train(steps_before_stop: int | None, out: Path):
        class Stop(Batches):
            def __getitem__(self, step):
                if step == steps_before_stop:
                    raise KeyboardInterrupt  # as sudden as a kill: nothing is saved on the way out
                return super().__getitem__(step)

        source = batches(name)
        source.__class__ = Stop
        options = {"steps": 9, "out": out, "optimizer": Optimizer(lr=1e-2, warmup=3), "save_every": 2, "log_every": 1}
        try:
            return fit(make(name), source, quiet=True, **options)
        except KeyboardInterrupt:
            return fit(make(name), batches(name), quiet=True, **options)

    whole, stopped = train(None, tmp_path / "whole"), train(5, tmp_path / "stopped")
    one, other = (load(done.out / "checkpoint.safetensors").tensors for done in (whole, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    figures = [[{k: v for k, v in line.items() if k != "seconds"} for line in done.log] for done in (whole, stopped)]
    assert figures[0] == figures[1]
    assert [line["step"] for line in figures[0]] == list(range(1, 10))


def test_its_towers_make_a_bundle(name, tmp_path):
    method = make(name)
    if not all(isinstance(tower, Encoder) for tower in method.towers().values()):
        assert method.towers().keys() == set(method.needs)
        return
    bundle = Bundle(method.towers(), heads=method.heads())
    bundle.save(tmp_path / "bundle")
    again = Bundle.load(tmp_path / "bundle", heads=True)
    assert again.fingerprint == bundle.fingerprint
    assert again.heads.keys() == method.heads().keys()


def test_it_is_final_and_one_deep(name):
    assert METHODS[name].__bases__ == (Method,)


def test_its_signature_is_its_configuration(name):
    parameters = list(inspect.signature(METHODS[name]).parameters.values())
    assert len(parameters) <= 8
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[1:])


def test_its_page_states_the_defaults_of_the_paper(name):
    page = (DOCS / f"{name}.md").read_text()
    table = {row[0]: row[1] for line in page.splitlines() if (row := line.strip("| ").split(" | ")) and len(row) >= 2}
    for parameter in list(inspect.signature(METHODS[name]).parameters.values())[1:]:
        stated = table.get(f"`{parameter.name}`")
        if isinstance(parameter.default, int | float):  # True and False too
            assert stated is not None and float(eval(stated)) == parameter.default
        if isinstance(parameter.default, Head | Blocks):
            assert stated is not None and eval(stated.strip("`"), {"Head": Head, "Blocks": Blocks}) == parameter.default
