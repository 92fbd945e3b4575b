"""What a training's log, and the embeddings it ended with, say about its health: a signature, its evidence, the knob.

Each rule here was calibrated on trainings that were made to fail on purpose, and on healthy ones of every method, which
must raise no alarm: benchmarks/diagnosis.py.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from twofold.measure.collapse import Health
from twofold.methods import METHODS
from twofold.methods.facts import FACTS
from twofold.models.ema import rising

POINT = 0.03  # spread of directions: below it all of them are one, up to noise
SHEET = 0.01  # effective rank over width: below it embeddings lie in a thin sheet
THIN = 0.1  # the same, where two axes hold nearly all of the variance: others may be small and tell much
STUCK = 0.01  # of the way from chance to the best possible loss: what a run has to come off it
ROOM = 0.25  # nats between chance and the best possible: with less, all negatives weigh alike
COLD = 2.0  # times chance: where a first loss is higher than this, few negatives carry it
SOLVED = 0.95  # of the way from chance to the best possible
EASY = 0.2  # of that way: what an untrained network must not have come already
FELL = 0.4  # of its own highest: a rank below has fallen
AGREED = 0.9  # views that agree so well have nothing left to learn from each other
SANK = 0.5  # of its own highest: with views that agree, such a rank says that they agree on nothing
ENOUGH = 5  # lines of a log: with fewer nothing is said
VARIANCE = 0.05  # of a target that is normalised to 1
HELD = 0.5  # of a slow copy's weights: as much of its start it should not still hold in the end


class Verdict(NamedTuple):
    """One finding: what it is called, how bad, what it says, by what evidence, and what to do."""

    name: str
    tone: Literal["good", "warn", "bad"]
    says: str
    evidence: str
    advice: str = ""


def diagnose(log: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[Verdict]:
    """What the lines of log.jsonl say, worst first; `record` is run.json. Never empty: good news is a verdict too."""
    lines = [line for line in log if "loss" in line]
    if len(lines) < ENOUGH:
        return [
            Verdict(
                "too short",
                "warn",
                "Too little was logged to say anything.",
                f"{len(lines)} lines of {ENOUGH}",
                "Train on: a line is logged every ten steps.",
            )
        ]
    course = _Course(lines, record)
    alarms = (_one_point, _agreed, _no_targets, _hot, _at_chance, _worse_than_chance, _cold)
    rules = (*alarms, _easy, _solved, _sheet, _rank_fell, _target_lags)
    found: list[Verdict] = []
    for rule in rules:
        verdict = rule(course, {each.name for each in found})
        if verdict is not None:
            found.append(verdict)
    if not any(verdict.tone == "bad" for verdict in found):
        found.append(_well(course))
    return sorted(found, key=lambda verdict: ("bad", "warn", "good").index(verdict.tone))


def collapse_in(log: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Verdict | None:
    """The verdict for which a training may be given up, if the log so far shows one."""
    fatal = ("collapsed", "constant targets")
    return next((verdict for verdict in diagnose(log, record) if verdict.name in fatal), None)


def examined(health: Health) -> list[Verdict]:
    """What embeddings of plain items, without views, look like."""
    found: list[Verdict] = []
    width = min(health.n, health.width)
    if health.spread < POINT:
        found.append(
            Verdict(
                "one point",
                "bad",
                "All items have the same embedding.",
                f"spread {health.spread:.4f}, mean cosine {health.anisotropy:.4f}",
                "Nothing can be read from it; see what the training's own log says.",
            )
        )
    elif health.rank < max(2.0, SHEET * width) or (health.axes <= 2 and health.rank < THIN * width):
        found.append(
            Verdict(
                "thin sheet",
                "bad",
                "The embeddings use few of their dimensions.",
                f"effective rank {health.rank:.1f} of {min(health.n, health.width)}; "
                f"{_axes(health)} 90 % of the variance",
                "Compare with the encoder before training; weigh a penalty on redundancy (barlow, vicreg, lejepa), "
                "richer views, or a lower learning rate.",
            )
        )
    if health.dead > 0.5:
        found.append(
            Verdict(
                "dead units",
                "warn",
                f"{100 * health.dead:.0f} % of the units are the same for every item.",
                f"{round(health.dead * health.width)} of {health.width}",
                "Lower the learning rate or warm up longer; the units that are left carry everything.",
            )
        )
    if health.anisotropy > 0.9 and health.spread >= POINT:
        found.append(
            Verdict(
                "one direction",
                "warn",
                "One direction is common to all items; plain cosines hardly tell them apart.",
                f"mean cosine of two items {health.anisotropy:.3f}",
                "Subtract the mean before comparing; a linear probe does not mind.",
            )
        )
    if not found:
        found.append(
            Verdict(
                "spread out",
                "good",
                "The embeddings are spread out.",
                f"effective rank {health.rank:.0f} of {min(health.n, health.width)}, {_axes(health)} 90 % "
                f"of the variance, mean cosine {health.anisotropy:.2f}",
            )
        )
    return found


def _axes(health: Health) -> str:
    return "1 axis holds" if health.axes == 1 else f"{health.axes} axes hold"


class _Course:
    """A log, and what follows from it."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], record: Mapping[str, Any]):
        self.lines, self.record = lines, record
        self.method = str(record.get("method", ""))
        self.name = next((name for name, kind in METHODS.items() if kind.__name__ == self.method), "")
        self.batch = int(record.get("batch", 0))
        self.options = record.get("options", {})
        self.rate = record.get("optimizer", {}).get("lr")
        self.loss, self.chance = self.end("loss"), lines[-1].get("chance")
        self.floor = self._floor()

    @property
    def started_trained(self) -> bool:
        return str(self.record.get("encoder", "")).startswith(("run:", "local:"))

    def of(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if isinstance(line.get(name), int | float)]

    def start(self, name: str) -> float | None:
        values = self.of(name)
        return median(values[: max(1, len(values) // 10)]) if values else None

    def end(self, name: str) -> float | None:
        values = self.of(name)
        return median(values[-max(3, len(values) // 10) :]) if values else None

    def option(self, name: str) -> float | None:
        """What the run was given, or the default of its method."""
        if name in self.options:
            return self.options[name]
        parameters = inspect.signature(METHODS[self.name]).parameters if self.name else {}
        value = parameters[name].default if name in parameters else None
        return value if isinstance(value, int | float) else None

    @property
    def temperature(self) -> float | None:
        learned = self.end("scale")
        if learned:
            return 1 / learned
        return self.option("temperature")

    def _floor(self) -> float | None:
        """The least loss of a softmax over negatives: positives at cosine 1, all else spread as evenly as can be."""
        if self.chance is None or self.temperature is None or self.name not in SOFTMAX:
            return None
        others = max(round(math.exp(self.chance)) - 1, 1)  # chance is ln of the candidates
        return math.log1p(others * math.exp((-1 / others - 1) / self.temperature))

    @property
    def way(self) -> float | None:
        """How far the loss has come from chance (0) to the best possible (1)."""
        if self.loss is None or self.chance is None:
            return None
        floor = self.floor if self.floor is not None else 0.0
        return (self.chance - self.loss) / max(self.chance - floor, 1e-9)


SOFTMAX = ("simclr", "moco", "clip")  # their chance level is ln of the number of candidates


def _one_point(run: _Course, found: set[str]) -> Verdict | None:
    spread = run.end("spread")
    if spread is None or spread >= POINT:
        return None
    start = run.start("spread") or 0.0
    evidence = f"spread of directions {start:.3f} → {spread:.4f} (0 is one point)"
    if run.loss is not None and run.chance is not None and abs(run.loss - run.chance) < 0.02 * abs(run.chance):
        evidence += f"; loss {run.loss:.3f} at {_level(run)}"
    return Verdict(
        "collapsed", "bad", "The encoder gives every item the same embedding.", evidence, _against_collapse(run)
    )


def _agreed(run: _Course, found: set[str]) -> Verdict | None:
    """Collapse behind the head: there the views agree whatever they show, and the encoder's dimensions follow."""
    if run.loss is None or "collapsed" in found:
        return None
    variance = run.end("variance")
    agreement = {
        "simsiam": -run.loss,  # the mean cosine of prediction and target
        "byol": 1 - run.loss / 4,  # two terms of 2 − 2 cos
        "vicreg": variance if variance is not None else 0.0,  # how far each dimension falls short of deviation 1
    }.get(run.name, 0.0)
    ranks = run.of("rank")
    if agreement < AGREED or not ranks or median(ranks[-3:]) >= SANK * max(ranks):
        return None
    what = "variance missing" if run.name == "vicreg" else "mean cosine of prediction and target"
    return Verdict(
        "collapsed",
        "bad",
        "The views agree because everything does: behind the head all items have become one.",
        f"{what} {agreement:.3f}; effective rank of the features {max(ranks):.1f} → {median(ranks[-3:]):.1f}",
        _against_collapse(run),
    )


def _against_collapse(run: _Course) -> str:
    slower = f"lower the learning rate (now {run.rate:g}) or warm up longer" if run.rate else "lower the learning rate"
    own = {
        "byol": "Keep the predictor deeper than one layer, BatchNorm in the heads and a slow target (--momentum); "
        f"then {slower}",
        "simsiam": f"Keep the predictor and the stop-gradient, and BatchNorm in the heads; then {slower}",
        "triplet": "The hardest negatives pull everything together before anything is learned: start with --mining "
        f"semi-hard or batch-all, or {slower}",
        "vicreg": f"Raise the weight of the variance term; then {slower}",
        "vse": f"Start without the hardest negatives (--warmup); then {slower}",
    }
    if run.name in own:
        return own[run.name] + "."
    if run.name and FACTS[run.name].patches:
        return f"Raise --momentum, hide larger blocks, and {slower}."
    return slower[0].upper() + slower[1:] + "; clip the gradient (--optimizer.clip 1)."


def _no_targets(run: _Course, found: set[str]) -> Verdict | None:
    variance = run.end("target_variance")
    if variance is None or variance >= VARIANCE or "collapsed" in found:
        return None
    return Verdict(
        "constant targets",
        "bad",
        "What is to be predicted has become the same for every patch and picture.",
        f"variance of the targets {run.start('target_variance'):.3f} → {variance:.4f}",
        _against_collapse(run),
    )


def _level(run: _Course) -> str:
    words = {"simclr": "ln(2N − 1)", "clip": "ln N", "mocov3": "ln N", "moco": "ln(K + 1)", "triplet": "the margin"}
    name = words.get(run.name)
    return f"its chance level{f', {name} =' if name else ''} {run.chance:.3f}"


def _hot(run: _Course, found: set[str]) -> Verdict | None:
    if run.floor is None or run.chance is None or run.chance - run.floor >= ROOM:
        return None
    return Verdict(
        "temperature too high",
        "bad",
        "At this temperature all negatives weigh alike, and the loss hardly says anything.",
        f"temperature {run.temperature:g}: between chance, {run.chance:.3f}, and the best possible, {run.floor:.3f}, "
        f"lie {run.chance - run.floor:.3f} nats",
        "Take a temperature between 0.05 and 0.5.",
    )


def _at_chance(run: _Course, found: set[str]) -> Verdict | None:
    if run.way is None or abs(run.way) >= STUCK or {"collapsed", "temperature too high"} & found:
        return None
    return Verdict(
        "stuck at chance",
        "bad",
        "The loss is what embeddings would get that know nothing.",
        f"loss {run.loss:.3f} at {_level(run)}; spread {run.end('spread') or math.nan:.3f}",
        _against_collapse(run)
        if run.name == "triplet"
        else "Look at the views (twofold views DATA --policy P): do two of one picture still show the same thing? Then "
        f"change the learning rate (now {run.rate:g}) by a factor of three either way."
        if run.rate
        else "Look at the views, then at the learning rate.",
    )


def _worse_than_chance(run: _Course, found: set[str]) -> Verdict | None:
    if run.way is None or run.loss is None or run.chance is None or run.floor is None:
        return None
    if run.loss < 1.1 * run.chance or "collapsed" in found:
        return None
    return Verdict(
        "worse than chance",
        "bad",
        "The loss ends above what embeddings would get that know nothing: a few negatives carry it.",
        f"loss {run.loss:.3f}, {_level(run)}; temperature {run.temperature:g}",
        "Raise the temperature (0.05 to 0.5 is usual), or lower the learning rate.",
    )


def _cold(run: _Course, found: set[str]) -> Verdict | None:
    first = run.start("loss")
    if run.floor is None or first is None or run.chance is None or first < COLD * run.chance:
        return None
    if {"worse than chance", "collapsed"} & found:
        return None
    return Verdict(
        "temperature too low",
        "bad",
        "At this temperature the hardest negative of each anchor takes all of the gradient, false ones first.",
        f"the loss began at {first:.1f}, {first / run.chance:.1f} times chance; temperature {run.temperature:g}",
        "Raise the temperature: 0.05 to 0.5 is usual. twofold doctor RUN --data D draws who gets the gradient at each.",
    )


def _easy(run: _Course, found: set[str]) -> Verdict | None:
    """An untrained network knows next to nothing: what it finds partners by is not what the pictures show."""
    first = run.lines[0]
    fresh = first.get("step") == 1 and not run.started_trained
    if not fresh or run.floor is None or run.chance is None or run.name != "simclr" or found:
        return None  # a queue begins with random keys, far from everything
    come = (run.chance - first["loss"]) / max(run.chance - run.floor, 1e-9)
    if come < EASY:
        return None
    return Verdict(
        "views too alike",
        "warn",
        "Before it learned anything, the network told most partners from strangers: something simple gives them away.",
        f"loss {first['loss']:.3f} in step 1, {100 * come:.0f} % of the way from {_level(run)} to the best possible",
        "See what is left open (twofold views DATA --policy P --audit: shortcuts); crop and jitter colour, both.",
    )


def _solved(run: _Course, found: set[str]) -> Verdict | None:
    if run.floor is None or run.chance is None or run.name == "clip" or "temperature too low" in found:
        return None
    half = [line["loss"] for line in run.lines[: len(run.lines) // 2]]
    done = (run.chance - median(half[-3:])) / max(run.chance - run.floor, 1e-9)
    if done < SOLVED:
        return None
    return Verdict(
        "solved early",
        "warn",
        "The positives are found without fault halfway through: the task teaches nothing more.",
        f"the loss had come {100 * done:.0f} % of the way from chance to the best possible by the middle",
        "Look for what gives partners away (twofold views DATA --policy P --audit: shortcuts), take stronger views, "
        "a larger batch or queue, or stop here.",
    )


def _sheet(run: _Course, found: set[str]) -> Verdict | None:
    rank, start = run.end("rank"), run.start("rank")
    if rank is None or start is None or rank >= 2 or "collapsed" in found:
        return None
    return Verdict(
        "thin sheet",
        "bad",
        "The embeddings lie along one line.",
        f"effective rank {start:.1f} → {rank:.1f}",
        _against_collapse(run),
    )


def _rank_fell(run: _Course, found: set[str]) -> Verdict | None:
    ranks = run.of("rank")
    end = run.end("rank")
    if end is None or {"collapsed", "thin sheet"} & found or run.name in ("supcon", "triplet"):
        return None  # labels have no more dimensions than classes
    highest = max(ranks[0], *(median(ranks[i : i + 3]) for i in range(max(1, len(ranks) - 2))))
    if end >= FELL * highest:
        return None
    return Verdict(
        "rank fell",
        "warn",
        "The embeddings lose dimensions while the loss is minimised.",
        f"effective rank {highest:.1f} at its highest, {end:.1f} in the end",
        "Probe an earlier checkpoint against the last; lower the learning rate, or add what keeps dimensions apart "
        "(barlow, vicreg, lejepa).",
    )


def _target_lags(run: _Course, found: set[str]) -> Verdict | None:
    """A copy that is slow for the length of the training makes targets of an untrained network."""
    momentum, gap = run.option("momentum"), run.end("ema_gap")
    steps, last = int(run.record.get("steps", 0)), int(run.lines[-1]["step"])
    if momentum is None or gap is None or run.started_trained:
        return None
    patches = FACTS[run.name].patches if run.name else False
    held = 1.0
    for step in range(1, last + 1):
        if run.name == "moco":
            held *= momentum
        elif patches:
            held *= momentum + (1 - momentum) * step / steps
        else:
            held *= rising(momentum, step / steps)
    if held < HELD:
        return None
    return Verdict(
        "target lags",
        "warn",
        "The slow copy that makes the targets is mostly the untrained network still.",
        f"with --momentum {momentum:g}, {100 * held:.0f} % of its weights after {last} steps are what they began as; "
        f"the encoder lies {gap:.3f} of its own length away",
        f"Train longer, or lower --momentum: {_momentum_for(last):.3g} suits {steps} steps.",
    )


def _momentum_for(steps: int) -> float:
    """A momentum whose memory is a tenth of the training."""
    return max(0.0, 1 - 10 / max(steps, 11))


def _well(run: _Course) -> Verdict:
    parts = []
    if run.way is not None and run.loss is not None:
        parts.append(f"loss {run.start('loss'):.3f} → {run.loss:.3f}, {_level(run)}")
    for name in ("spread", "rank", "target_variance"):
        first, last = run.start(name), run.end(name)
        if first is not None and last is not None:
            parts.append(f"{name.replace('_', ' ')} {first:.3g} → {last:.3g}")
    return Verdict("learning", "good", "No sign of collapse.", "; ".join(parts))
