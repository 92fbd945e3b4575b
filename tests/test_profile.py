"""A profile blames what is slow."""

import json
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from twofold import runtime
from twofold.data.loader import Batches
from twofold.methods import Out
from twofold.methods.base import Method
from twofold.train.loop import PROFILE, fit
from twofold.train.profile import ADVICE, PARTS, Clock, Profile
from twofold.views import Policy

NAP = 0.015  # longer than anything else in a step, on a busy machine too


@dataclass(frozen=True, kw_only=True)
class Drowsy(Policy):
    """Views that cost nothing but a nap."""

    nap: float = 0.0

    def parameters(self, *_):
        time.sleep(self.nap)

    def render(self, images, drawn):
        return images


class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(NAP)
        return gradient


class Slow(Method):
    """Slow in one part of a step."""

    def __init__(self, part: str):
        super().__init__()
        self.part, self.policy = part, Drowsy(size=4, blur=0.0, nap=NAP if part == "views" else 0.0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        if part == "forward":
            self.encoder[1].register_forward_hook(lambda *_: time.sleep(NAP))

    def forward(self, batch, draw):
        h = self.encoder(self.policy(batch["image"], draw))
        if self.part == "loss":
            time.sleep(NAP)
        if self.part == "communicate":
            with runtime.part("communicate"):
                time.sleep(NAP)
        return Out((Nap.apply(h) if self.part == "backward" else h).square().mean(), z=h)

    def after_step(self, progress):
        if self.part == "optimise":
            time.sleep(NAP)

    def towers(self):
        return {"image": self.encoder}


class Asleep(Batches):
    def __getitem__(self, step):
        time.sleep(NAP)
        return super().__getitem__(step)


@pytest.mark.parametrize("part", [part for part in PARTS if part != "other"])
def test_a_slow_part_is_blamed_and_all_parts_are_the_step(part, tmp_path):
    batches = (Asleep if part == "load" else Batches)({"image": torch.rand(8, 3, 4, 4)}, batch=4, seed=0)
    done = fit(Slow(part), batches, steps=30, out=tmp_path, profile=True, quiet=True)
    found = done.profile
    assert found.steps == 20
    assert sum(found.shares.values()) == pytest.approx(1)
    assert max(found.shares, key=found.shares.get) == part
    assert found.ms[part] >= 1000 * NAP
    assert found.blame == ("forward" if part == "backward" else part)
    assert ADVICE[found.blame] in str(found)
    assert json.loads((tmp_path / PROFILE).read_text()) == json.loads(json.dumps(found.json()))


def test_a_clock_counts_a_part_without_the_parts_inside_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    clock = Clock()
    started = time.perf_counter()
    with clock("other"):
        time.sleep(0.01)
        with clock("loss"), clock("views"):
            time.sleep(0.02)
        with clock("views"):
            time.sleep(0.01)
    whole = time.perf_counter() - started
    assert sum(clock.seconds.values()) == pytest.approx(whole, abs=1e-3)
    assert clock.seconds["views"] >= 0.03
    assert clock.seconds["loss"] < 0.005


def test_nothing_is_left_behind(tmp_path):
    method = Slow("none")
    batches = Batches({"image": torch.rand(8, 3, 4, 4)}, batch=4, seed=0)
    done = fit(method, batches, steps=7, out=tmp_path, profile=True, quiet=True)
    assert done.profile.steps == 2  # as many as there were after the first five
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in method.modules())
    assert runtime._clocks == []


def test_a_run_too_short_for_a_profile_says_so(tmp_path, capsys):
    batches = Batches({"image": torch.rand(8, 3, 4, 4)}, batch=4, seed=0)
    assert fit(Slow("none"), batches, steps=5, out=tmp_path, profile=True).profile is None
    printed = capsys.readouterr()
    assert "no profile: its first 5 steps are left out" in printed.out + printed.err


def test_forward_and_backward_are_the_network():
    ms = dict.fromkeys(PARTS, 1.0) | {"forward": 2.0, "backward": 2.0, "views": 3.0}
    assert Profile(1, ms).blame == "forward"
    assert Profile(1, ms | {"views": 5.0}).blame == "views"
