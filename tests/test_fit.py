"""The loop: what survives kills, what stops it, and that several processes do what one does."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from inspect import signature
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from processes import start, together
from twofold import runtime
from twofold.data.loader import Batches
from twofold.errors import TrainingError, UsageError
from twofold.methods import CLIP, METHODS, Out, SigLIP, SimCLR
from twofold.methods.base import Method
from twofold.models.captioner import captioner
from twofold.models.encoders import ImageEncoder, image_encoder
from twofold.models.heads import Head
from twofold.models.predictor import Blocks
from twofold.train.checkpoint import load, save
from twofold.train.loop import BEST, CHECKPOINT, Watch, fit
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, _compiled, _fabric
from twofold.views import SIMCLR_CIFAR

N, WIDTH, SIZE = 64, 24, 16


def lines(out: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def without_times(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]


def assert_same_run(one: Path, two: Path) -> None:
    """Bit for bit: weights, optimiser, log."""
    expected, got = load(one / CHECKPOINT), load(two / CHECKPOINT)
    assert (expected.step, expected.scaler) == (got.step, got.scaler)
    assert expected.tensors.keys() == got.tensors.keys()
    for key in expected.tensors:
        assert torch.equal(expected.tensors[key], got.tensors[key]), key
    assert without_times(lines(one)) == without_times(lines(two))


# --- kills ------------------------------------------------------------------------------------------------------------


def train_simclr(out: Path, nap: float = 0.0) -> None:
    """With BatchNorm, dropout and random views to get wrong; `nap` leaves time for signals to come in mid-run."""

    class Naps(Batches):
        def __getitem__(self, step):
            time.sleep(nap)
            return super().__getitem__(step)

    torch.manual_seed(0)
    policy = replace(SIMCLR_CIFAR, size=SIZE)
    encoder = small(nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.2)))
    method = SimCLR(encoder, policies=(policy, policy), head=Head(2, 32, 16))
    optimizer = Optimizer(name="lars", lr=1e-2, warmup=4)
    batches = pictures(16)
    batches.__class__ = Naps
    fit(method, batches, steps=14, out=out, optimizer=optimizer, save_every=4, log_every=1, quiet=True)


def wait_for_step(process: BaseProcess, out: Path, step: int) -> None:
    limit = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < limit:
        if any(line["step"] >= step for line in lines(out)):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached, exit status {process.exitcode}")


def test_a_run_stopped_twice_in_mid_epoch_ends_with_the_very_same_weights(tmp_path):
    out = tmp_path / "stopped"
    for step, how in ((2, signal.SIGKILL), (7, signal.SIGINT)):  # before the first checkpoint, and between two
        process = start(train_simclr, out, 0.1)
        wait_for_step(process, out, step)
        os.kill(process.pid, how)
        process.join()
        assert process.exitcode != 0
    train_simclr(out)
    train_simclr(tmp_path / "whole")
    assert load(out / CHECKPOINT).step == 14
    assert_same_run(tmp_path / "whole", out)


# --- several processes ------------------------------------------------------------------------------------------------

CASES = [*METHODS, "simclr in chunks"]


def pictures(batch: int) -> Batches:
    pixels = torch.randint(0, 256, (48, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    clips = torch.stack((pixels, pixels.flip(-1)), 1)
    label = torch.arange(48) % 4
    columns = {"image": pixels, "video": clips, "label": label, "text": 2 + label[:, None].expand(-1, 3)}
    return Batches(columns, batch=batch, seed=0)


def small(norm: nn.Module) -> ImageEncoder:
    layers = [nn.Conv2d(3, 8, 3, stride=2), norm, nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.Flatten()]
    spec = {"size": SIZE, "channels": 3, "how": "crop"}
    return ImageEncoder(nn.Sequential(*layers), spec, mean=[0.5] * 3, std=[0.5] * 3)


def spoken(ids: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def learn(case: str, out: Path, fabric: Fabric | None = None) -> None:
    """A few steps of a small method of its kind; a batch of 15 is uneven over two processes."""
    torch.manual_seed(0)
    name, in_chunks = case.split()[0], "chunks" in case
    parameters = signature(METHODS[name]).parameters
    if name == "coca":
        towers = captioner("coca:tiny", image_encoder("timm:vit_tiny_patch16_224/4x16x1", size=SIZE), ["one", "two"])
        views = {"image": replace(SIMCLR_CIFAR, size=SIZE), "text": spoken}
        method, batches = METHODS[name](towers, views=views), pictures(15)
    elif "encoder" not in parameters:
        method, batches = METHODS[name](heads()), pairs(batch=15)
    else:
        sizes = {"hidden": 32, "dim": 16}
        shapes = {key: replace(p.default, **sizes) for key, p in parameters.items() if isinstance(p.default, Head)}
        if name == "moco":
            shapes |= {"queue": 40, "shuffle": False}  # shuffled, BatchNorm sees parts of a batch, on purpose
        if "frames" in parameters:
            shapes["frames"] = 2
        blocks = {key: Blocks(1, 16, 2) for key, p in parameters.items() if isinstance(p.default, Blocks)}
        encoder = small(nn.GroupNorm(2, 8) if in_chunks else nn.BatchNorm2d(8))
        if blocks:
            encoder = image_encoder("timm:vit_tiny_patch16_224/2x16x1", size=SIZE)
        policies = (replace(SIMCLR_CIFAR, size=SIZE),) * len(parameters["policies"].default)
        method, batches = METHODS[name](encoder, policies=policies, **shapes, **blocks), pictures(15)
    chunk = 4 if in_chunks and fabric else None
    optimizer = Optimizer(name="sgd", lr=1e-2, clip=1.0)
    fit(method, batches, steps=5, out=out, optimizer=optimizer, chunk=chunk, log_every=1, fabric=fabric, quiet=True)
    assert not [layer for layer in method.modules() if "forward" in vars(layer)]


def one_of_two(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for case in CASES:
        learn(case, folder / case, fabric)
    rank = fabric.global_rank
    with pytest.raises(TrainingError) as error:
        fit(Breaks(at=3, rank=1), pairs(), steps=9, out=folder / "nan", log_every=5, fabric=fabric, quiet=True)
    (folder / f"error{rank}").write_text(str(error.value))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    together(one_of_two, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case, two, tmp_path):
    learn(case, tmp_path)
    one, other = load(tmp_path / CHECKPOINT).tensors, load(two / case / CHECKPOINT).tensors
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
    for first, second in zip(lines(tmp_path), lines(two / case), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)


def test_a_loss_that_breaks_in_one_process_stops_all_in_the_same_step(two):
    told = [(two / f"error{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "The loss is nan in step 3" in told[0]


# --- one process ------------------------------------------------------------------------------------------------------


def pairs(batch: int = 16) -> Batches:
    draw = torch.Generator().manual_seed(1)
    return Batches({side: torch.randn(N, WIDTH, generator=draw) for side in ("image", "text")}, batch=batch, seed=0)


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"image": nn.Linear(WIDTH, 8), "text": nn.Linear(WIDTH, 8)}


class Breaks(Method):
    """Its loss is NaN from a given step on, in one process."""

    needs = ("image", "text")

    def __init__(self, at: int, rank: int = 0):
        super().__init__()
        self.inner, self.at, self.done = CLIP(heads()), at if runtime.world()[0] == rank else math.inf, 0

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
    with pytest.raises(TrainingError, match=r"The loss is nan in step 5\. .* is of step 4"):  # resumed: saved before
        fit(Breaks(at=1), pairs(), steps=20, out=tmp_path, save_every=4, log_every=10, quiet=True)
    assert load(tmp_path / CHECKPOINT).step == 4


def test_a_run_that_fails_before_its_first_checkpoint_says_that_there_is_none(tmp_path):
    with pytest.raises(TrainingError, match=r"The loss is nan in step 3\. .* holds no checkpoint: .* with step 4"):
        fit(Breaks(at=3), pairs(), steps=20, out=tmp_path, save_every=4, log_every=10, quiet=True)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("by", ["probes", "watch"])
def test_a_broken_loss_is_told_before_the_weights_are_measured(by, tmp_path):
    def measure(method: Method) -> float:
        raise AssertionError("measured")

    options: Any = {"probes": {"knn": measure}} if by == "probes" else {"watch": Watch(measure, every=4, patience=1)}
    with pytest.raises(TrainingError, match=r"The loss is nan in step 3\. "):
        fit(Breaks(at=3), pairs(), steps=20, out=tmp_path, save_every=4, log_every=10, quiet=True, **options)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_resumes_bit_for_bit(precision, tmp_path, monkeypatch):
    def train(out: Path, stop: int | None = None) -> None:
        class Stops(Batches):
            def __getitem__(self, step):
                if step == stop:
                    raise KeyboardInterrupt
                return super().__getitem__(step)

        torch.manual_seed(0)
        monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
        fabric = _fabric(Setting(precision=precision))
        plugin: Any = fabric.strategy.precision
        if plugin.scaler:  # grows twice within the run, and what it is after a stop depends on when it grew
            plugin.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        options = {"optimizer": Optimizer(lr=1e-2, clip=1.0), "save_every": 2, "log_every": 1, "fabric": fabric}
        policy = replace(SIMCLR_CIFAR, size=SIZE)
        method = SimCLR(small(nn.BatchNorm2d(8)), policies=(policy, policy), head=Head(2, 32, 16))
        source = pictures(16)
        source.__class__ = Stops
        fit(method, source, steps=8, out=out, quiet=True, **options)

    train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", stop=5)
    train(tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    scaler = load(tmp_path / "whole" / CHECKPOINT).scaler
    assert scaler.get("scale") == (None if precision == "bf16-mixed" else 256)


def test_mixed_precision_rounds_neither_pictures_nor_similarities(tmp_path, monkeypatch):
    class Looks(Method):
        def __init__(self):
            super().__init__()
            self.inner = CLIP(heads())

        def forward(self, batch, draw):
            out = self.inner(batch, draw)
            assert torch.is_autocast_enabled("cpu")
            assert [batch["image"].dtype, out.z.dtype, out.loss.dtype] == [torch.float32, torch.bfloat16, torch.float32]
            return out

        def towers(self):
            return self.inner.towers()

    monkeypatch.setattr(runtime, "device", lambda: torch.device("cpu"))
    looks, fabric = Looks(), _fabric(Setting(precision="bf16-mixed"))
    looks.needs = ("image", "text")
    fit(looks, pairs(), steps=1, out=tmp_path, fabric=fabric, quiet=True)


def test_compiling_leaves_names_as_they_are_and_ends_with_the_run():
    method = METHODS["byol"](small(nn.BatchNorm2d(8)), head=Head(1), predictor=Head(1, dim=128))
    keys = list(method.state_dict())
    with _compiled(method):
        assert list(method.state_dict()) == keys
        assert sum(module._compiled_call_impl is not None for module in method.modules()) == 2  # and the target
    assert not any(module._compiled_call_impl for module in method.modules())


def train_narrow(out: Path) -> None:
    """A ResNet whose shortcuts are narrower than a vector register: 8 channels, at a map that is 64 wide."""
    torch.manual_seed(0)
    encoder = image_encoder("timm:resnet18/8", size=64, small_stem=True)
    policy = replace(SIMCLR_CIFAR, size=64)
    method = SimCLR(encoder, policies=(policy, policy), head=Head(2, 32, 16))
    seen = []
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    fit(method, pictures(8), steps=2, out=out, quiet=True)
    assert seen and all(seen)


def test_narrow_strided_convolutions_do_not_crash_in_channels_last(tmp_path):
    process = start(train_narrow, tmp_path)
    process.join()
    assert process.exitcode == 0  # -SIGSEGV before


def test_a_chunk_too_small_for_batchnorm_is_named_with_what_to_do(tmp_path):
    policy = replace(SIMCLR_CIFAR, size=SIZE)
    encoder = small(nn.BatchNorm2d(8))
    encoder.body.append(nn.LazyBatchNorm1d())
    encoder(torch.rand(2, 3, SIZE, SIZE))
    method = METHODS["byol"](encoder, policies=(policy, policy))
    with pytest.raises(TrainingError, match=r"BYOL has a BatchNorm, .* larger chunk"):
        fit(method, pictures(4), steps=1, chunk=1, out=tmp_path, quiet=True)


def test_weight_decay_follows_its_schedule(tmp_path):
    """Zero gradients: what moves is decay alone, lr · decay(step) of each weight a step."""

    class Still(Method):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, batch, draw):
            return Out(0 * self.weight.sum(), z=torch.ones(2, 2))

        def towers(self):
            return {"image": self}

    still, optimizer = Still(), Optimizer(lr=0.1, weight_decay=0.4, final_weight_decay=0.04)
    fit(still, pictures(4), steps=6, out=tmp_path, optimizer=optimizer, quiet=True)
    left = 1.0
    for step in range(6):
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
        left *= 1 - rate * (0.04 + (0.4 - 0.04) * 0.5 * (1 + math.cos(math.pi * step / 6)))
    torch.testing.assert_close(still.weight.detach(), torch.full((2, 2), left))


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


# --- early stopping ---------------------------------------------------------------------------------------------------

SCORES = [0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.45, 0.9, 0.9]  # by look: the best is the fourth, if one waits for three


def told(method: Method) -> float:
    """The score of look k, whichever process or call it is: k is in the weights."""
    return SCORES[int(method.get_buffer("looks")) // 2 - 1]


def counting() -> Method:
    class Counts(CLIP):
        def after_step(self, progress):
            super().after_step(progress)
            self.looks += 1

    method = Counts(heads())
    method.register_buffer("looks", torch.zeros((), dtype=torch.long))
    return method


def watched(out: Path, *, stop: int | None = None, save_every: int = 100):
    class Stops(Batches):
        def __getitem__(self, step):
            if step == stop:
                raise KeyboardInterrupt  # as sudden as a kill
            return super().__getitem__(step)

    method, source = counting(), pairs()
    source.__class__ = Stops
    watch = Watch(told, every=2, patience=3, name="recall")
    return method, fit(method, source, steps=18, out=out, watch=watch, save_every=save_every, log_every=3, quiet=True)


def test_training_stops_when_the_score_no_longer_rises_and_ends_with_the_best_weights(tmp_path):
    method, run = watched(tmp_path)
    assert [(line["step"], line["recall"]) for line in run.log if "recall" in line] == [
        (2 * k, score) for k, score in enumerate(SCORES[:7], 1)
    ], "an equal score is no better one: the wait began with the first .5"
    assert (run.steps, run.best, int(method.looks)) == (14, 8, 8)
    assert all("loss" in line for line in run.log)
    best = load(tmp_path / BEST)
    assert (best.step, best.score) == (8, 0.5)
    assert load(tmp_path / CHECKPOINT).step == 14


@pytest.mark.parametrize("stop", [1, 7, 9, 13])
def test_a_watched_run_that_was_killed_ends_like_one_that_was_not(stop, tmp_path):
    """Killed before the best, between the best and its checkpoint, and behind both."""
    whole, run = watched(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        watched(tmp_path / "killed", stop=stop, save_every=6)
    again, resumed = watched(tmp_path / "killed", save_every=6)
    assert (run.steps, run.best) == (resumed.steps, resumed.best)
    for (key, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_watched_run_that_has_stopped_is_not_trained_further(tmp_path):
    watched(tmp_path)
    before = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    method, run = watched(tmp_path)
    assert (run.steps, run.best, int(method.looks)) == (14, 8, 8)
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == before


def test_a_batch_of_one_is_refused_where_rows_are_compared(tmp_path):
    with pytest.raises(UsageError, match="CLIP compares the rows of a batch, which takes 2; got 1"):
        fit(CLIP(heads()), pairs(batch=1), steps=1, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_watch_that_never_looks_is_refused():
    with pytest.raises(UsageError, match="every step or less often"):
        Watch(told, every=0, patience=1)


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
