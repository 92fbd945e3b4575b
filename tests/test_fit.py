"""The loop: what survives kills, what stops it, and that several processes do what one does."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from twofold.data.loader import Batches
from twofold.errors import TrainingError
from twofold.methods import CLIP, Out, SigLIP
from twofold.methods.base import Method
from twofold.train.checkpoint import load, save
from twofold.train.loop import CHECKPOINT, fit
from twofold.train.optim import Optimizer

N, WIDTH = 64, 24

# A run of SimCLR in a process of its own, with a BatchNorm, dropout and random views to get wrong.
SCRIPT = """
import sys, time
from dataclasses import replace
import torch
from twofold.data.loader import Batches
from twofold.methods import SimCLR
from twofold.models.encoders import image_encoder
from twofold.models.heads import Head
from twofold.train.loop import fit
from twofold.train.optim import Optimizer
from twofold.views import SIMCLR_CIFAR

torch.set_num_threads(1)
torch.manual_seed(0)
encoder = image_encoder("timm:resnet10t", size=16)
encoder.body.drop_rate = 0.2
policy = replace(SIMCLR_CIFAR, size=16)
method = SimCLR(encoder, policies=(policy, policy), head=Head(2, 32, 16))
pixels = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
batches = Batches({"image": pixels}, batch=16, seed=0)
fit(method, batches, steps=int(sys.argv[2]), out=sys.argv[1], optimizer=Optimizer(name=sys.argv[3], lr=1e-2, warmup=4),
    save_every=4, log_every=1, quiet=True)
"""


def start(script: Path, *arguments: object) -> subprocess.Popen:
    with open(script.with_suffix(".err"), "a") as err:
        return subprocess.Popen([sys.executable, script, *map(str, arguments)], stderr=err)


def finish(process: subprocess.Popen, script: Path) -> None:
    assert process.wait() == 0, script.with_suffix(".err").read_text()


def lines(out: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if any(line["step"] >= step for line in lines(out)):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached, exit status {process.poll()}")


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]


def test_a_run_stopped_twice_in_mid_epoch_ends_with_the_very_same_weights(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    whole = start(script, tmp_path / "whole", 14, "lars")

    out = tmp_path / "stopped"
    for step, how in ((2, signal.SIGKILL), (7, signal.SIGINT)):  # before the first checkpoint, and between two
        process = start(script, out, 14, "lars")
        wait_for_step(process, out, step)
        process.send_signal(how)
        assert process.wait() != 0
    finish(start(script, out, 14, "lars"), script)
    finish(whole, script)

    expected, got = load(tmp_path / "whole" / CHECKPOINT), load(out / CHECKPOINT)
    assert expected.step == got.step == 14
    assert expected.tensors.keys() == got.tensors.keys()
    assert all(torch.equal(expected.tensors[key], got.tensors[key]) for key in expected.tensors)
    assert without_times(lines(tmp_path / "whole")) == without_times(lines(out))


PAIRS = """
import sys, torch
from lightning_fabric import Fabric
from torch import nn
from twofold.data.loader import Batches
from twofold.methods import METHODS
from twofold.train.loop import fit
from twofold.train.optim import Optimizer

torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=int(sys.argv[2]), strategy="ddp" if sys.argv[2] != "1" else "auto")
fabric.launch()
torch.manual_seed(0)
draw = torch.Generator().manual_seed(1)
common = torch.randn(64, 24, generator=draw)
columns = {side: common + torch.randn(64, 24, generator=draw) for side in ("image", "text")}
method = METHODS[sys.argv[3]]({"image": nn.Linear(24, 8), "text": nn.Linear(24, 8)})
batches = Batches(columns, batch=16, seed=0)
fit(method, batches, steps=12, out=sys.argv[1], optimizer=Optimizer(lr=1e-2), log_every=1, fabric=fabric, quiet=True)
"""


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_two_processes_learn_what_one_learns(name, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(PAIRS)
    for world in (1, 2):
        finish(start(script, tmp_path / str(world), world, name), script)
    one, two = (load(tmp_path / str(world) / CHECKPOINT).tensors for world in (1, 2))
    for key in one:
        if key.startswith("method."):
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
    for first, second in zip(lines(tmp_path / "1"), lines(tmp_path / "2"), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)


def pairs(batch: int = 16) -> Batches:
    draw = torch.Generator().manual_seed(1)
    return Batches({side: torch.randn(N, WIDTH, generator=draw) for side in ("image", "text")}, batch=batch, seed=0)


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"image": nn.Linear(WIDTH, 8), "text": nn.Linear(WIDTH, 8)}


class Breaks(Method):
    """Its loss is NaN from a given step on."""

    needs = ("image", "text")

    def __init__(self, at: int):
        super().__init__()
        self.inner, self.at, self.done = CLIP(heads()), at, 0

    def forward(self, batch, draw):
        out = self.inner(batch, draw)
        self.done += 1
        return out._replace(loss=out.loss * math.nan) if self.done >= self.at else out

    def towers(self):
        return self.inner.towers()


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"The loss is nan in step 7\. .* is of step 4"):
        fit(Breaks(at=7), pairs(), steps=20, out=tmp_path, save_every=4, log_every=10, quiet=True)
    saved = load(tmp_path / CHECKPOINT)
    assert saved.step == 4
    assert all(value.isfinite().all() for value in saved.tensors.values() if value.is_floating_point())


def test_another_configuration_in_the_same_folder_is_refused_and_named(tmp_path):
    fit(CLIP(heads()), pairs(), steps=2, out=tmp_path, quiet=True)
    with pytest.raises(TrainingError, match="steps 2 → 3"):
        fit(CLIP(heads()), pairs(), steps=3, out=tmp_path, quiet=True)


def test_a_batch_without_what_the_method_needs_is_named(tmp_path):
    columns = {"image": torch.randn(N, WIDTH)}
    with pytest.raises(TrainingError, match=r"CLIP needs \['text'\]"):
        fit(CLIP(heads()), Batches(columns, batch=8, seed=0), steps=1, out=tmp_path, quiet=True)


def test_a_run_that_is_complete_is_not_trained_further(tmp_path):
    first, again = SigLIP(heads()), SigLIP(heads())
    fit(first, pairs(), steps=5, out=tmp_path, quiet=True)
    fit(again, pairs(), steps=5, out=tmp_path, quiet=True)
    for (key, one), two in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


def test_a_damaged_checkpoint_is_named(tmp_path):
    fit(CLIP(heads()), pairs(), steps=2, out=tmp_path, quiet=True)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match=CHECKPOINT):
        fit(CLIP(heads()), pairs(), steps=2, out=tmp_path, quiet=True)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    method = CLIP(heads())
    optimizer = Optimizer().build(method)
    save(tmp_path / CHECKPOINT, method, optimizer, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / CHECKPOINT, method, optimizer, step=2)
    monkeypatch.undo()
    assert load(tmp_path / CHECKPOINT).step == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_probes_are_logged_where_a_checkpoint_is_written(tmp_path):
    seen = []

    def probe(method: Method) -> float:
        seen.append(method.training)
        return 0.5

    done = fit(CLIP(heads()), pairs(), steps=4, out=tmp_path, save_every=2, probes={"probe": probe}, quiet=True)
    assert [line["step"] for line in done.log if "probe" in line] == [2, 4]
    assert seen == [False, False]


def test_the_global_random_state_is_left_as_it_was(tmp_path):
    method = CLIP(heads())
    before = torch.get_rng_state()
    fit(method, pairs(), steps=2, out=tmp_path, quiet=True)
    assert torch.equal(before, torch.get_rng_state())


def test_out_carries_what_is_watched():
    out = CLIP(heads())(pairs()[0], torch.Generator())
    assert isinstance(out, Out)
    assert out.chance == pytest.approx(math.log(16))
    assert float(out.parts["scale"]) == pytest.approx(1 / 0.07, rel=1e-5)
