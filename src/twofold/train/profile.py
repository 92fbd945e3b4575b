"""Where a training step's time goes, and what to do about it.

Parts of a step are timed where they happen: the loop names its own, `Policy` names the views and `runtime` the
communication; the method's modules are the network, and what is left of the method's forward pass is the loss. A part's
time is without that of the parts inside it, so together they are the step.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from twofold import runtime

PARTS = ("load", "views", "forward", "loss", "communicate", "backward", "optimise", "other")
ADVICE = {
    "load": "Batches come too slowly: keep the data on a local disk, or on a device with memory for all of it.",
    "views": "Drawing views holds it up: take a policy without blur, smaller views (--size), or more cores.",
    "forward": "That is the network, forward and backward, as it should be. Less of it: a smaller --encoder or --size; "
    "faster, on a GPU: --precision bf16-mixed, --compile.",
    "loss": "The loss outweighs the network: take a narrower head, or a smaller batch.",
    "communicate": "Processes wait for one another: give each more rows (--batch), or take fewer of them (--devices).",
    "optimise": "Updating the weights outweighs computing them: a larger --batch does it less often.",
    "other": "Logging and checkpoints hold it up: --save-every more steps.",
}


@dataclass(frozen=True)
class Profile:
    """Milliseconds that an average of `steps` steps spends in each part."""

    steps: int
    ms: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of a step; they sum to 1."""
        whole = sum(self.ms.values())
        return {part: ms / whole for part, ms in self.ms.items()}

    @property
    def blame(self) -> str:
        """The part that takes most; "forward" stands for the network, forward and backward."""
        shares = self.shares
        shares["forward"] += shares.pop("backward")
        return max(shares, key=lambda part: shares[part])

    def __str__(self) -> str:
        head = f"  a step takes {sum(self.ms.values()):.1f} ms (average of {self.steps})"
        rows = [f"    {part:<12}{ms:8.1f} ms {self.shares[part]:7.1%}" for part, ms in self.ms.items()]
        return "\n".join([head, *rows, f"  {ADVICE[self.blame]}"])

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "shares": self.shares, "blame": self.blame, "advice": ADVICE[self.blame]}


class Profiler:
    """Times some steps of a method after the first few, which are slow for reasons of their own."""

    def __init__(self, method: nn.Module, *, warmup: int = 5, steps: int = 20):
        self.method, self.clock, self.warmup = method, Clock(), warmup
        self._first, self._last, self._seen = warmup + 1, warmup + steps, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """What the loop does in one step."""
        self._seen += 1
        if self._first <= self._seen <= self._last:
            with _watched(self.method, self.clock), self.clock("other"):
                yield
        else:
            yield

    @property
    def complete(self) -> bool:
        return self._seen == self._last

    @property
    def profile(self) -> Profile | None:
        """What the steps so far give; None while all of them were the first few."""
        steps = min(self._seen, self._last) - self._first + 1
        if steps < 1:
            return None
        return Profile(steps, {part: 1000 * seconds / steps for part, seconds in self.clock.seconds.items()})


class Clock:
    """Seconds by part, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def enter(self, part: str) -> None:
        self._turn()
        self._open.append(part)

    def leave(self) -> None:
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the innermost part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a kernel's time shall not be that of whoever waits for it
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def _watched(method: nn.Module, clock: Clock) -> Iterator[None]:
    """Inside, parts are timed by `clock`, and the method's modules are "forward"."""
    with ExitStack() as hooks, runtime.measured_by(clock):
        for child in method.children():
            hooks.callback(child.register_forward_pre_hook(lambda *_: clock.enter("forward")).remove)
            hooks.callback(child.register_forward_hook(lambda *_: clock.leave(), always_call=True).remove)
        yield
