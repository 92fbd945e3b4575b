"""The training loop: one for every method.

Batch order, views, dropout and learning rate of step t are derived from (seed, t), and from nothing that came before: a
run that is killed and started again ends with the very same weights.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning_fabric import Fabric
from torch import nn

from twofold import runtime
from twofold.data.atomic import write_atomically
from twofold.errors import TrainingError, UsageError
from twofold.measure.collapse import effective_rank, spread
from twofold.measure.diagnosis import collapse_in
from twofold.methods.base import Method, Out
from twofold.models.ema import Ema
from twofold.models.norm import synchronised
from twofold.progress import TERMINAL, Line
from twofold.train import checkpoint as checkpoints
from twofold.train.cached import chunked
from twofold.train.log import Log, read_log
from twofold.train.optim import Optimizer
from twofold.train.profile import Profile, Profiler
from twofold.train.trackers import tracked

CHECKPOINT, BEST, PROFILE = "checkpoint.safetensors", "best.safetensors", "profile.json"
RANK_ROWS = 512  # the rank of so many rows is logged; it is what a singular value decomposition costs little for


class StepBatches(Protocol):
    """Batches by step: `batches[step]` gives this process's rows of the global batch, the same ones every time."""

    batch: int

    def __getitem__(self, step: int, /) -> dict[str, Any]: ...


class Run(NamedTuple):
    """What `fit` leaves: the folder, the steps done, the log's lines, the seconds that this call took, its profile.

    `best` is the step whose weights the method ends with, where a `Watch` chose among them.
    """

    out: Path
    steps: int
    log: list[dict[str, Any]]
    seconds: float
    profile: Profile | None = None
    best: int | None = None


@dataclass(frozen=True)
class Watch:
    """Early stopping: `score` a method `every` so many steps, and end with the weights that scored highest.

    Training stops when `patience` scores in a row were no better than the best.
    """

    score: Callable[[Method], float]
    every: int
    patience: int
    name: str = "score"  # in the log

    def __post_init__(self) -> None:
        if self.every < 1 or self.patience < 1:
            raise UsageError(f"A watch looks every step or less often, and waits for one score at least; got {self}.")


class _Best:
    """The best score so far and the step it was taken in; what a resumed run has to know is in the file alone.

    A run that was killed behind its last checkpoint may find the best of a step that it has not yet come to again. It
    will come to the very same, so nothing that is done before then can differ.
    """

    def __init__(self, path: Path, watch: Watch):
        self.path, self.watch = path, watch
        self.score, self.step = -math.inf, 0
        if path.exists():
            saved = checkpoints.load(path)
            self.score, self.step = saved.score or 0.0, saved.step

    def consider(self, method: Method, score: float, step: int, *, write: bool) -> None:
        if score > self.score:
            self.score, self.step = score, step
            if write:
                checkpoints.save(self.path, method, None, step=step, score=score)

    def exhausted(self, step: int) -> bool:
        return step >= self.step + self.watch.patience * self.watch.every


def fit(
    method: Method,
    batches: StepBatches,
    *,
    steps: int,
    out: Path | str,
    optimizer: Optimizer = Optimizer(),  # noqa: B008 — frozen
    seed: int = 0,
    chunk: int | None = None,
    save_every: int = 100,
    log_every: int = 10,
    probes: Mapping[str, Callable[[Method], float | Mapping[str, float]]] = {},
    watch: Watch | None = None,
    record: Mapping[str, Any] = {},
    fabric: Fabric | None = None,
    profile: bool = False,
    stop_on_collapse: bool = False,
    log_to: str | None = None,
    quiet: bool = False,
) -> Run:
    """Train `method` for `steps` steps into the folder `out`, going on from the checkpoint that lies there.

    `out` receives run.json (what was asked for), environment.json (where it ran last), log.jsonl and
    checkpoint.safetensors; the method is trained in place.
    `chunk` runs the encoders over so many rows at a time, for batches that memory does not hold: `train.cached`.
    `probes` are evaluated where a checkpoint is written; what they find stands in that line of the log, by a probe's
    name or by the names it gives. `watch` stops early and keeps the best weights, which
    best.safetensors holds. `record` is what else run.json shall hold (JSON values), and what a resumed run must agree
    with. Several processes: pass a launched `fabric`; BatchNorm then sees the batch of all of them, unless the method
    says otherwise. `profile` tells where the time of the first steps goes, and writes it to profile.json. `log_to`,
    tensorboard:DIR, wandb:PROJECT or mlflow:URI, is told what the log is (`train.trackers`). Ctrl-C and SIGTERM finish
    the step, write a checkpoint and then interrupt.

    Raises TrainingError where the loss is not finite (the last good checkpoint, if there is one, stays), where a
    batch has too few rows to normalise by, where `out` holds a run that was asked for differently, and with
    `stop_on_collapse` as soon as the log shows one (`measure.diagnosis`).
    """
    out, started = Path(out), time.monotonic()
    if batches.batch < method.smallest_batch:
        raise UsageError(
            f"{type(method).__name__} compares the rows of a batch, which takes {method.smallest_batch}; "
            f"got {batches.batch}."
        )
    fabric = fabric or Fabric(accelerator=runtime.device().type, devices=1)
    missing = set(method.needs) - set(batches[0])
    if missing:
        raise TrainingError(
            f"{type(method).__name__} needs {sorted(missing)} in each batch; the data gives {sorted(batches[0])}."
        )
    asked = {
        **record,
        "method": method.name,
        "steps": steps,
        "batch": batches.batch,
        "seed": seed,
        "chunk": chunk,
        "optimizer": asdict(optimizer),
        **({"watch": [watch.name, watch.every, watch.patience]} if watch else {}),
    }
    _agree(out / "run.json", asked, write=fabric.is_global_zero)
    if fabric.is_global_zero:
        environment = json.dumps(runtime.environment(), indent=1) + "\n"
        write_atomically(out / "environment.json", lambda path: path.write_text(environment))
    runtime.keep_freed_memory()
    if not any(_overruns(layer) for layer in method.modules()):
        method.to(memory_format=torch.channels_last)  # convolutions take a half to a third of the time
    raw = optimizer.build(method)
    model, stepper = fabric.setup(method, raw)
    first = 0
    if (out / CHECKPOINT).exists():
        saved = checkpoints.load(out / CHECKPOINT)
        checkpoints.restore(saved, method, raw)
        if saved.scaler:
            fabric.strategy.precision.load_state_dict(saved.scaler)
        first = saved.step
    best = _Best(out / BEST, watch) if watch else None
    fabric.barrier()

    log = Log(out / "log.jsonl", step=first) if fabric.is_global_zero else None
    pending: list[torch.Tensor] = []  # losses since the last look at them: reading one waits for the device
    line = Line(
        method.name.lower(),
        unit="clips" if "video" in method.needs else "images" if set(method.needs) <= {"image", "label"} else "pairs",
        done=first,
        quiet=quiet or log is None,
    )
    profiler = Profiler(method) if profile and log is not None else None

    def kept() -> str:
        """What a run that fails leaves."""
        if not last_saved:
            return f"{out} holds no checkpoint: the first would have come with step {min(save_every, steps)}."
        return f"The checkpoint in {out} is of step {last_saved}."

    def looked(done: int) -> list[float]:
        """The losses since the last flush, which are to be finite before anybody measures the weights."""
        # What is not finite in one process is so in the sum: all of them stop here, and none waits for one that did.
        losses: list[float] = fabric.all_reduce(torch.stack(pending)).tolist()  # type: ignore[union-attr]
        for step, loss in enumerate(losses, start=done - len(losses) + 1):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"The loss is {loss} in step {step}. {kept()} Lower the learning rate (now {optimizer.lr}), "
                    "warm up longer, or clip the gradient (--optimizer.clip 1)."
                )
        return losses

    def flush(done: int, result: Out, rate: float, scored: Mapping[str, float], save: bool) -> None:
        """Look at the losses since the last flush; log the last one, and what `probes` find of weights to be saved."""
        losses = looked(done)
        pending.clear()
        probed = _probed(method, probes) if save and log is not None and probes else {}
        seen = result.z[:RANK_ROWS].detach()
        figures = {"loss": losses[-1], "chance": result.chance, "rank": effective_rank(seen), "spread": spread(seen)}
        figures |= scored
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        if log is not None:
            parts = {name: float(value) for name, value in result.parts.items()}
            for part in method.modules():
                if isinstance(part, Ema):
                    parts["ema_gap"] = part.gap()
            said = {"step": done, **figures, **parts, **probed, "lr": rate, "seconds": time.monotonic() - started}
            log.write(said)
            tell(said)
        line.update(done, steps, per_unit=batches.batch, figures=figures)
        if stop_on_collapse and (ill := fabric.broadcast(collapse_in(log.lines, asked) if log is not None else None)):
            raise TrainingError(
                f"Stopped in step {done}. {ill.says} {ill.evidence[0].upper()}{ill.evidence[1:]}. {ill.advice} {kept()}"
            )

    def stopping(done: int) -> bool:
        """Whether to stop after this step; several processes agree on it, and so ask each other less often."""
        if fabric.world_size == 1 or done == steps:
            return interrupted() or done == steps
        asked = torch.tensor(float(interrupted()))
        return done % log_every == 0 and bool(fabric.all_reduce(asked, reduce_op="sum"))

    def report(found: Profile) -> None:
        write_atomically(out / PROFILE, lambda path: path.write_text(json.dumps(found.json(), indent=1) + "\n"))
        if not quiet:
            TERMINAL.print(str(found), highlight=False, soft_wrap=True)

    def score(done: int) -> Mapping[str, float]:
        """The score of these weights, where one is due; the first process takes it for all."""
        if watch is None or best is None or not (done % watch.every == 0 or done == steps):
            return {}
        looked(done)
        scored = fabric.broadcast(_probed(method, {watch.name: watch.score}) if log is not None else {})
        best.consider(method, scored[watch.name], done, write=log is not None)
        return scored

    last_saved = done = first
    ends = first if best and best.exhausted(first) else steps  # a run that had stopped early does not go on
    method.train()
    with ExitStack() as around:
        if chunk is not None:
            around.enter_context(chunked(method, chunk))
        if fabric.world_size > 1 and method.sync_batchnorm:
            around.enter_context(synchronised(method))
        tell = around.enter_context(tracked(log_to if log is not None else None, out.resolve().name, asked))
        around.enter_context(line)
        interrupted = around.enter_context(_interruptible())
        around.enter_context(torch.random.fork_rng(enabled=True))
        for step in range(first, ends):
            with profiler.step() if profiler else nullcontext():
                torch.manual_seed(runtime.seed_of(seed, "step", step, runtime.world()[0]))
                rate = optimizer.schedule(raw, step, steps=steps)
                with runtime.part("load"):
                    batch = fabric.to_device(batches[step])
                with runtime.part("loss"), _enough_rows(method):
                    result: Out = model(batch, runtime.generator(seed, "views", step))
                with runtime.part("backward"):
                    fabric.backward(result.loss)
                with runtime.part("optimise"):
                    if optimizer.clip:
                        fabric.clip_gradients(model, stepper, max_norm=optimizer.clip)
                    stepper.step()
                    stepper.zero_grad()
                    method.after_step((step + 1) / steps)

                done = step + 1
                pending.append(result.loss.detach().float())
                scored = score(done)
                enough = best is not None and best.exhausted(done)
                stop = stopping(done) or enough
                save = stop or done % save_every == 0
                if save or scored or done == 1 or done % log_every == 0:  # step 1: what the untrained network gives
                    flush(done, result, rate, scored, save)
                if save:
                    last_saved = done
                if save and log is not None:
                    scaler = fabric.strategy.precision.state_dict()
                    checkpoints.save(out / CHECKPOINT, method, raw, step=done, scaler=scaler)
            if profiler and profiler.profile and (stop or profiler.complete):
                report(profiler.profile)
            if enough:
                break
            if stop and done < steps:
                raise KeyboardInterrupt(f"stopped after step {done}; the same command goes on from there")
    fabric.barrier()
    if best and best.step:
        checkpoints.restore(checkpoints.load(best.path), method, None)
    method.eval()
    found = profiler.profile if profiler else None
    if profiler and not found and not quiet:
        TERMINAL.print(f"  no profile: its first {profiler.warmup} steps are left out, and there were no more")
    log_lines = read_log(out / "log.jsonl")
    return Run(out, done, log_lines, time.monotonic() - started, found, best.step if best else None)


def _overruns(layer: nn.Module) -> bool:
    """Whether oneDNN would write past its memory for this layer's gradient, were channels last.

    It does for 1×1 convolutions with a stride and fewer channels than a vector register holds, 16 at most: the process
    dies, or goes on with wrong gradients (oneDNN's issue 6035, torch 2.15).
    """
    narrow = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels < 16
    return narrow and layer.kernel_size == (1, 1) and layer.stride != (1, 1)


@contextmanager
def _enough_rows(method: Method) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):  # torch's words
            raise
        raise TrainingError(
            f"{type(method).__name__} has a BatchNorm, which needs two rows to normalise by, and got one. "
            "Take a larger batch (--batch), or a larger chunk where one is set (--chunk)."
        ) from error


def _agree(path: Path, record: dict[str, Any], *, write: bool) -> None:
    """Write what was asked for; where something else was asked for before, refuse and say what differs."""
    if path.exists():
        before = json.loads(path.read_text())
        differs = [
            f"{key} {before.get(key)!r} → {value!r}" for key, value in record.items() if before.get(key) != value
        ]
        if differs:
            raise TrainingError(
                f"{path.parent} holds another run: {'; '.join(differs)}. Give another --out, or remove that folder."
            )
    if write:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n"))


def _probed(method: Method, probes: Mapping[str, Callable[[Method], float | Mapping[str, float]]]) -> dict[str, float]:
    method.eval()
    values: dict[str, float] = {}
    with torch.no_grad():
        for name, probe in probes.items():
            found = probe(method)
            values |= found if isinstance(found, Mapping) else {name: float(found)}
    method.train()
    return values


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM came; a second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            signal.default_int_handler(number, None)
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
