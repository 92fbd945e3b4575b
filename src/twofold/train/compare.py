"""Methods compared on a user's own pictures: each trained for the same budget, and read by the same probes.

Which method is best depends on the pictures, the encoder and the time there is; a table of ImageNet says little about
an archive of X-rays. Beside the methods stand those that learned nothing here: the same encoder untrained, raw pixels,
colours, and an encoder with ImageNet's labels behind it.
"""

import contextlib
import inspect
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twofold import runtime
from twofold.cluster import on_ray
from twofold.data.atomic import write_atomically
from twofold.data.sources import Source, content_key
from twofold.errors import DataError, TwofoldError, UsageError, unknown
from twofold.measure.baselines import IMAGENET, colour_histogram, thumbnails
from twofold.measure.collapse import alignment, effective_rank, uniformity
from twofold.measure.embed import embed
from twofold.measure.metrics import Interval, bootstrap, points
from twofold.measure.probes import few_shot, knn_probe, linear_probe
from twofold.measure.selection import correlation, view_retrieval
from twofold.methods import METHODS
from twofold.methods.facts import FACTS, Facts
from twofold.models.bundle import Bundle
from twofold.models.encoders import ImageEncoder, encoder, image_encoder
from twofold.models.heads import Head
from twofold.models.predictor import Blocks
from twofold.progress import TERMINAL
from twofold.train.compare_policies import OPTIMIZER, SHORT
from twofold.train.held_out import features, held_out, pictures
from twofold.train.log import read_log
from twofold.train.loop import Run
from twofold.train.optim import Optimizer
from twofold.train.train import Setting, train
from twofold.views import Policy, policies

SETTING = replace(SHORT, policy="simclr", batch=128)
TRANSFORMER = "timm:vit_tiny_patch16_224/8x96x6"  # about as fast as SHORT's network; for methods that hide patches
SHOTS = (1, 5, 10)
PROBES = ("linear", "knn", *(f"{k}-shot" for k in SHOTS))
TIMED = 12  # steps that tell how many fit into so many seconds
FASTER = 1.15  # times as fast is worth a word
THUMBNAIL = 32  # pixels a side, at most, of raw pixels
ENOUGH = 5  # trainings whose order says something of a score

SMALL = Head(2, 512, 128)
RECIPES: dict[str, dict[str, Any]] = {
    # Heads of 512, and averages that move within some hundred steps: the papers' are for some hundred thousand.
    "simclr": {"head": SMALL, "temperature": 0.2},
    "dcl": {"head": SMALL, "temperature": 0.2},
    "supcon": {"head": Head(2, 512, 128, norm="none")},
    "moco": {"head": Head(2, 512, 128, norm="none"), "momentum": 0.99},
    "mocov3": {"head": Head(2, 512, 128, last_norm=True), "predictor": SMALL, "momentum": 0.97},
    "byol": {"head": SMALL, "predictor": SMALL, "momentum": 0.97},
    "simsiam": {"head": Head(3, 512, 512, last_norm=True), "predictor": Head(2, 128, 512)},
    "barlow": {"head": Head(3, 512, 512)},
    "vicreg": {"head": Head(3, 512, 512)},
    "lejepa": {"head": Head(3, 512, 64), "directions": 256},
    "mae": {"decoder": Blocks(2, 96, 4)},
    "ijepa": {"predictor": Blocks(2, 96, 4), "momentum": 0.97},
}


class Row(NamedTuple):
    """A method's encoder, or one that learned nothing here, by what its features are worth on held-out pictures."""

    name: str
    method: str | None  # None: a baseline
    facts: Facts | None
    labelled: bool  # learned from labels of the training pictures
    accuracy: dict[str, Interval]  # "linear", "knn", "1-shot", …
    right: dict[str, list[float]]  # the same by held-out picture, the mean over seeds
    seeds: dict[str, list[float]]  # the same by seed
    rank: float  # effective rank of the features
    width: int
    uniformity: float
    alignment: float | None = None  # mean squared distance of two views, on the unit sphere
    view_retrieval: float | None = None  # how often a view is nearest to the other one of its picture
    images_per_second: float | None = None
    seconds: float | None = None  # of training, a seed
    memory: float | None = None  # MiB at the peak of training: the process's on a CPU, what was allocated on a GPU
    steps: int | None = None


class Comparison(NamedTuple):
    """Methods by their linear accuracy, best first, what they are measured against, and what follows."""

    data: str
    rows: list[Row]
    baselines: list[Row]
    failed: dict[str, str]  # variant → why there is no encoder
    items: int  # trained on
    held_out: int
    chance: float
    verdict: list[str]
    caveats: list[str]


class Variant(NamedTuple):
    """One training of the comparison."""

    name: str
    method: str
    setting: Setting
    optimizer: Optimizer
    options: dict[str, Any]

    @property
    def labelled(self) -> bool:
        return "label" in METHODS[self.method].needs and self.options.get("labels", True)


def compare(
    methods: Sequence[str],
    source: Source,
    *,
    out: Path | str,
    setting: Setting = SETTING,
    optimizer: Optimizer = OPTIMIZER,
    transformer: str = TRANSFORMER,
    seconds: float | None = None,
    sweep: Mapping[str, Sequence[str]] = {},
    seeds: Sequence[int] = (0,),
    jobs: int = 1,
    ray: str | None = None,
    quiet: bool = False,
) -> Comparison:
    """Train each of `methods` (all that the data are enough for, where none is named) and measure what it learned.

    The budget is `setting.epochs`, or as many whole epochs as fit into `seconds` of training. Methods that hide patches
    take the encoder `transformer` and their own views. `sweep` gives options several values ("temperature", "batch",
    "policy", "lr", …), each combination a training of the methods that have them. Probes learn from the training
    pictures and are tested on the split "test", else "val", else on a fifth. Each run is a line of compare.jsonl in
    `out` as it ends; the same call goes on where it was stopped. A training that fails does not stop the others.
    `jobs` trainings run at a time, each in a process of its own with its share of the threads: what a network that is
    too small for all cores gains, and what `seconds` then says is seconds beside the others. `ray` is the address of a
    Ray cluster ("local", "auto", "ray://host:10001") that runs as many as it has CPUs, or GPUs; its machines see `out`
    and the pictures under the same paths.
    """
    if jobs < 1:
        raise UsageError(f"jobs is how many trainings run at a time, 1 or more; got {jobs}.")
    if ray and jobs > 1:
        raise UsageError(f"{jobs} jobs are processes of this machine; a Ray cluster runs as many as it has room for.")
    trained, held = _labelled(source)
    chosen = fitting(trained) if not methods else list(dict.fromkeys(methods))
    variants = variants_of(chosen, setting, optimizer, transformer=transformer, sweep=sweep, items=len(trained))
    # What views are asked to agree in is the same for all.
    judge = policies(setting.policy)[0] if setting.policy else policies("simclr")[0]
    data = content_key("\n".join([*trained.keys(), "held out", *held.keys()]))
    lines = _Lines(Path(out) / "compare.jsonl")
    plans = [variant._replace(setting=replace(variant.setting, seed=seed)) for seed in seeds for variant in variants]
    kept: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    asked = {number: _asked(plan, data, judge, seconds) for number, plan in enumerate(plans)}
    ready = {number: line for number, own in asked.items() if (line := lines.find(own)) is not None}
    todo = {
        number: _Work(plans[number], _folder(Path(out).resolve(), plans[number], asked[number]), judge, seconds)
        for number in asked
        if number not in ready
    }
    for number, done in _each(trained, held, todo, jobs=jobs, ray=ray, quiet=quiet):
        if isinstance(done, str):
            failed[plans[number].name] = done
        else:
            ready[number] = done
            lines.add({"name": plans[number].name, "asked": asked[number], **done})
        if not quiet:
            TERMINAL.print(_said(plans[number], done, len(ready) + len(failed), len(plans)), highlight=False)
    for number, plan in enumerate(plans):
        if number in ready:
            kept.setdefault(plan.name, []).append(ready[number])
    rows = [
        _row(variant.name, kept[variant.name], variant.method, labelled=variant.labelled)
        for variant in variants
        if variant.name in kept
    ]
    baselines = _baselines(variants, trained, held, data, judge, lines, quiet=quiet)
    rows.sort(key=lambda row: -row.accuracy["linear"].value)
    assert held.labels is not None
    chance = float(np.bincount(held.labels).max() / len(held))
    compared = Comparison(
        data=source.name,
        rows=rows,
        baselines=baselines,
        failed=failed,
        items=min(len(trained), setting.limit or len(trained)),
        held_out=len(held),
        chance=chance,
        verdict=[],
        caveats=_caveats(variants, seeds, seconds),
    )
    return compared._replace(verdict=verdict(compared))


def fitting(source: Source) -> list[str]:
    """The methods that pictures, and the labels or texts that there are, are enough for."""
    there = {"image"} | ({"label"} if source.labels is not None else set()) | ({"text"} if source.texts else set())
    return [name for name, method in METHODS.items() if set(method.needs) <= there]


def variants_of(
    methods: Sequence[str],
    setting: Setting,
    optimizer: Optimizer,
    *,
    transformer: str = TRANSFORMER,
    sweep: Mapping[str, Sequence[str]] = {},
    items: int,
) -> list[Variant]:
    """Every method with every combination of those options of the sweep that it has."""
    found, used = list[Variant](), set[str]()
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        own = {name: values for name, values in sweep.items() if _has(method, name)}
        used |= own.keys()
        for values in itertools.product(*own.values()):
            change = dict(zip(own, values, strict=True))
            found.append(_variant(method, change, setting, optimizer, transformer, items))
    if lost := [name for name in sweep if name not in used]:
        there = {name for method in methods for name in inspect.signature(METHODS[method]).parameters}
        raise unknown("option to sweep", lost[0], {"batch", "policy", "lr", *there} - {"encoder", "towers", "policies"})
    if not found:
        raise UsageError("There is no method to compare; name some, or bring data that one of them can learn from.")
    return found


def _has(method: str, option: str) -> bool:
    if option == "policy":
        return FACTS[method].views
    return option in ("batch", "lr") or option in inspect.signature(METHODS[method]).parameters


def _variant(
    method: str, change: dict[str, str], setting: Setting, optimizer: Optimizer, transformer: str, items: int
) -> Variant:
    options = dict(RECIPES.get(method, {}))
    if method == "moco":
        options["queue"] = 2 ** max(4, min(12, (items // 2).bit_length() - 1))
    if FACTS[method].patches:
        setting = replace(setting, encoder=transformer, small_stem=False, policy=None)
    for name, word in change.items():
        if name == "lr":
            optimizer = replace(optimizer, lr=_number(name, word, float))
        elif name == "batch":
            setting = replace(setting, batch=_number(name, word, int))
        elif name == "policy":
            setting = replace(setting, policy=word)
        else:
            default = inspect.signature(METHODS[method]).parameters[name].default
            options[name] = word if isinstance(default, str) else _number(name, word, type(default))
    said = "".join(f" {name}={Path(word).stem if name == 'policy' else word}" for name, word in change.items())
    return Variant(method + said, method, setting, optimizer, options)


def _number(name: str, word: str, kind: Any) -> Any:
    try:
        if kind not in (bool, int, float):
            raise ValueError
        return {"true": True, "false": False}[word.lower()] if kind is bool else kind(word)
    except (ValueError, KeyError) as error:
        one = kind.__name__ if kind in (bool, int, float) else "number or word"
        raise UsageError(f"A sweep of {name} takes values that are each one {one}; got {word!r}.") from error


def _labelled(source: Source) -> tuple[Source, Source]:
    """The two parts, the second without items that have no label."""
    if source.labels is None or source.images is None:
        raise DataError(
            f"{source.name} has no pictures with labels, and methods are compared by how well their features tell "
            "labels apart. A few hundred labelled pictures are enough; `twofold views --compare` takes none."
        )
    trained, held = held_out(source)
    assert held.labels is not None and trained.labels is not None
    held = held.take(np.flatnonzero(held.labels >= 0))
    if len(held) < 2 or len(np.unique(trained.labels[trained.labels >= 0])) < 2:  # type: ignore[index]
        raise DataError(f"{source.name}: probes need labels of two classes to learn from, and two items to test on.")
    return trained, held


def _asked(variant: Variant, data: str, judge: Policy, seconds: float | None) -> dict[str, Any]:
    """All that decides a run's figures, as JSON gives it back."""
    aside = ("devices", "save_every", "profile", "on_error", *(["epochs"] if seconds else []))
    plain = {name: asdict(value) if is_dataclass(value) else value for name, value in variant.options.items()}  # type: ignore[arg-type]
    asked = {
        "method": variant.method,
        "setting": {name: value for name, value in asdict(variant.setting).items() if name not in aside},
        "policy": [policy.to_dict() for policy in policies(variant.setting.policy)] if variant.setting.policy else None,
        "optimizer": asdict(variant.optimizer),
        "options": plain,
        "data": data,
        "judge": judge.to_dict(),
        "seconds": seconds,
    }
    return json.loads(json.dumps(asked))


class _Lines:
    """compare.jsonl: what has been measured, and is not measured again."""

    def __init__(self, path: Path):
        self.path, self._known = path, read_log(path)

    def find(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        return next((line for line in self._known if line["asked"] == asked), None)

    def add(self, line: dict[str, Any]) -> None:
        self._known.append(line)
        text = "".join(json.dumps(each) + "\n" for each in self._known)
        write_atomically(self.path, lambda path: path.write_text(text, "utf-8"))


class _Work(NamedTuple):
    """All that a run takes beside the data, for another process too."""

    variant: Variant
    folder: Path
    judge: Policy
    seconds: float | None


def _folder(out: Path, plan: Variant, asked: Mapping[str, Any]) -> Path:
    return out / f"{plan.method}-{content_key(json.dumps(asked, sort_keys=True))[:8]}"


def _each(
    trained: Source, held: Source, todo: Mapping[int, _Work], *, jobs: int, ray: str | None, quiet: bool
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Each run's line as it ends, or why there is none."""
    if ray is not None and todo:
        calls = {number: (work,) for number, work in todo.items()}
        for number, done in on_ray(_run, calls, shared=(trained, held), address=ray):
            yield number, str(done) if isinstance(done, TwofoldError) else done
        return
    if jobs == 1 or len(todo) < 2:
        for number, work in todo.items():
            yield number, _run(trained, held, work, quiet=quiet)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    method = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in the middle of their work
    pool = ProcessPoolExecutor(min(jobs, len(todo)), method, initializer=torch.set_num_threads, initargs=(threads,))
    try:
        running = {pool.submit(_run, trained, held, work): number for number, work in todo.items()}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:  # Ctrl-C reaches the processes too, and each of them writes its checkpoint
        pool.shutdown(cancel_futures=True)


def _said(plan: Variant, done: Mapping[str, Any] | str, number: int, of: int) -> str:
    name = f"  {number}/{of} {plan.name}, seed {plan.setting.seed}: "
    if isinstance(done, str):
        return name + f"failed: {done}"
    linear, knn = (float(np.mean(done["right"][probe])) for probe in ("linear", "knn"))
    return name + f"linear {linear:.3f}, kNN {knn:.3f}, rank {done['rank']:.1f}, {done['seconds']:.0f} s"


def _run(trained: Source, held: Source, work: _Work, *, quiet: bool = True) -> dict[str, Any] | str:
    """Train, if that has not been done, and measure; why not, where a training fails."""
    variant, folder, judge, seconds = work
    setting = variant.setting
    try:
        if seconds is not None:
            setting = replace(setting, epochs=_epochs(variant, trained, folder, seconds))
        with _peak() as peak:
            run = _trained(variant, trained, folder, setting, quiet=quiet)
        picture = Bundle.load(folder).tower("image").encoder
        assert isinstance(picture, ImageEncoder)
        agreed = _agreement(picture, held, setting, judge)
        seen = _measured(*_seen(picture, trained, held, setting), agreed)
    except TwofoldError as error:
        return str(error)
    pace = pace_of(run.log)
    return {
        **seen,
        "steps": run.steps,
        "images_per_second": setting.batch * pace,
        "seconds": run.steps / pace,
        "memory": peak.get("MiB"),
    }


def _trained(variant: Variant, source: Source, out: Path | str, setting: Setting, *, quiet: bool) -> Run:
    return train(
        variant.method,
        source,
        out=out,
        setting=setting,
        optimizer=variant.optimizer,
        options=variant.options,
        quiet=quiet,
    )


def _epochs(variant: Variant, trained: Source, folder: Path, seconds: float) -> int:
    """As many whole epochs as fit; what was once begun keeps its number, however busy the machine is now."""
    if (folder / "run.json").is_file():
        return json.loads((folder / "run.json").read_text("utf-8"))["epochs"]
    setting = variant.setting
    some = replace(setting, limit=min(TIMED * setting.batch, setting.limit or len(trained)), epochs=1)
    with TemporaryDirectory() as aside:
        run = _trained(variant, trained, aside, some, quiet=True)
    step = run.seconds / run.steps
    epoch = max(1, min(len(trained), setting.limit or len(trained)) // setting.batch)
    return max(1, int(seconds / (step * epoch)))


def pace_of(log: Sequence[Mapping[str, Any]]) -> float:
    """Steps a second, between lines of one sitting: the clock of a run that goes on starts anew."""
    lines = [line for line in log if "seconds" in line]
    spans = [(b["step"] - a["step"], b["seconds"] - a["seconds"]) for a, b in pairwise(lines)]
    spans = [(steps, took) for steps, took in spans if took > 0 and steps > 0]
    if not spans:  # a single line; the first steps are slow
        spans = [(lines[-1]["step"], lines[-1]["seconds"])]
    return sum(steps for steps, _ in spans) / max(sum(took for _, took in spans), 1e-9)


@contextlib.contextmanager
def _peak() -> Iterator[dict[str, float]]:
    """Gives a dict that holds, afterwards, the most memory there was inside, in MiB; nothing where none can tell."""
    found: dict[str, float] = {}
    gpu = runtime.device().type == "cuda"
    counted = gpu
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        runtime.give_memory_back()
        with contextlib.suppress(OSError):  # other than Linux
            Path("/proc/self/clear_refs").write_text("5")
            counted = True
    yield found
    if gpu:
        found["MiB"] = torch.cuda.max_memory_allocated() / 2**20
    elif counted:
        status = Path("/proc/self/status").read_text().splitlines()
        found["MiB"] = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10


Part = tuple[np.ndarray | Tensor, np.ndarray]  # features, and labels


def _seen(picture: ImageEncoder, trained: Source, held: Source, setting: Setting) -> tuple[Part, Part]:
    """Features of both parts, without augmentation."""
    plain = replace(policies("none")[0], size=picture.size, mean=(), std=())
    parts = []
    for part in (trained.sample(setting.limit), held):
        shown = pictures(part, picture.size, setting)
        z = features(picture, plain, torch.from_numpy(np.array(shown.pixels)), runtime.generator("plain"))
        parts.append((z, _labels(part, shown.kept)))
    return parts[0], parts[1]


def _labels(part: Source, kept: np.ndarray) -> np.ndarray:
    assert part.labels is not None
    return part.labels[kept]


def _agreement(picture: ImageEncoder, held: Source, setting: Setting, judge: Policy) -> dict[str, float]:
    """What needs no label: how two views of the held-out pictures agree, the same views for every encoder of a size."""
    judge = replace(judge, size=picture.size, mean=(), std=())
    images = torch.from_numpy(np.array(pictures(held, picture.size, setting).pixels))
    draw = runtime.generator("judges")
    one, other = (features(picture, judge, images, draw) for _ in range(2))
    return {"alignment": alignment(one, other), "view_retrieval": view_retrieval(one, other)}


def _measured(bank: Part, test: Part, more: Mapping[str, float] | None = None) -> dict[str, Any]:
    """A line of compare.jsonl: hits by item, for they are compared item by item."""
    (z, y), (queries, answers) = bank, test
    few = few_shot(z, y, queries, answers, shots=SHOTS)
    right = {
        "linear": linear_probe(z, y, queries, answers).predicted == answers,
        "knn": knn_probe(z, y, queries, answers).predicted == answers,
        **{f"{k}-shot": few.right[k] for k in SHOTS},
    }
    return {
        "right": {name: [round(float(each), 4) for each in hits] for name, hits in right.items()},
        "rank": effective_rank(queries),
        "width": int(queries.shape[1]),
        "uniformity": uniformity(queries),
        **(more or {}),
    }


def _row(name: str, lines: list[dict[str, Any]], method: str | None = None, *, labelled: bool = False) -> Row:
    """Figures over seeds: the hits of an item under all seeds are drawn together, and intervals are over items."""
    right = {probe: np.mean([line["right"][probe] for line in lines], axis=0) for probe in PROBES}

    def mean(key: str) -> Any:
        values = [line.get(key) for line in lines]
        return None if None in values else float(np.mean(values))  # type: ignore[arg-type]

    return Row(
        name=name,
        method=method,
        facts=FACTS[method] if method else None,
        labelled=labelled,
        accuracy={probe: bootstrap(hits) for probe, hits in right.items()},
        right={probe: hits.tolist() for probe, hits in right.items()},
        seeds={probe: [float(np.mean(line["right"][probe])) for line in lines] for probe in PROBES},
        rank=mean("rank"),
        width=lines[0]["width"],
        uniformity=mean("uniformity"),
        alignment=mean("alignment"),
        view_retrieval=mean("view_retrieval"),
        images_per_second=mean("images_per_second"),
        seconds=mean("seconds"),
        memory=mean("memory"),
        steps=lines[0].get("steps"),
    )


def _baselines(
    variants: Sequence[Variant],
    trained: Source,
    held: Source,
    data: str,
    judge: Policy,
    lines: _Lines,
    *,
    quiet: bool,
) -> list[Row]:
    """The encoders with the weights that the first seed's trainings began with, pixels, colours and ImageNet's."""
    rows = []
    settings = {variant.setting.encoder: variant.setting for variant in variants}
    first = next(iter(settings.values()))
    for spec, setting in settings.items():
        those: dict[str, Any] = {
            "baseline": "untrained",
            "encoder": spec,
            "size": setting.size,
            "channels": setting.channels,
        }
        those |= {"small_stem": setting.small_stem, "limit": setting.limit, "data": data, "judge": judge.to_dict()}

        def untrained(setting: Setting = setting) -> dict[str, Any]:
            picture = _untrained(setting)
            return _measured(*_seen(picture, trained, held, setting), _agreement(picture, held, setting, judge))

        kind = " transformer" if len(settings) > 1 and spec.startswith("timm:vit") else ""
        rows.append(_baseline(f"untrained{kind}", those, lines, untrained))
    bank = trained.sample(first.limit)
    side = min(THUMBNAIL, first.size or THUMBNAIL)
    known: dict[str, Any] = {
        "baseline": "pixels",
        "size": side,
        "channels": first.channels,
        "limit": first.limit,
        "data": data,
    }

    def pixels() -> dict[str, Any]:
        one, other = (pictures(part, side, first) for part in (bank, held))
        z, mean = thumbnails(one.pixels)
        return _measured((z, _labels(bank, one.kept)), (thumbnails(other.pixels, mean)[0], _labels(held, other.kept)))

    def colours() -> dict[str, Any]:
        shown = [(part, pictures(part, side, first)) for part in (bank, held)]
        one, other = ((colour_histogram(own.pixels), _labels(part, own.kept)) for part, own in shown)
        return _measured(one, other)

    def imagenet() -> dict[str, Any]:
        model = encoder(IMAGENET, "image").to(runtime.device())
        done = ((embed(model, part, "image", quiet=quiet), part) for part in (bank, held))
        one, other = ((found.matrix, _labels(part, found.kept)) for found, part in done)
        return _measured(one, other)

    rows.append(_baseline("raw pixels", known, lines, pixels))
    rows.append(_baseline("colours", {**known, "baseline": "colours"}, lines, colours))
    rows.append(_baseline("ImageNet weights", {**known, "baseline": IMAGENET, "size": None}, lines, imagenet))
    return rows


def _baseline(name: str, known: dict[str, Any], lines: _Lines, measure: Callable[[], dict[str, Any]]) -> Row:
    line = lines.find(known)
    if line is None:
        line = measure()
        lines.add({"name": name, "asked": known, **line})
    return _row(name, [line])


def _untrained(setting: Setting) -> ImageEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(runtime.seed_of(setting.seed, "weights"))
        return image_encoder(
            setting.encoder, size=setting.size, channels=setting.channels, small_stem=setting.small_stem
        ).to(runtime.device())


def ahead_of(one: Row, other: Row, probe: str = "linear") -> Interval:
    """How much more `one` gets right than `other`, on the same held-out pictures; a paired bootstrap."""
    return bootstrap(np.subtract(one.right[probe], other.right[probe]))


def verdict(done: Comparison) -> list[str]:
    """What the figures say, in words; "surely" means that a paired 95 % interval does not hold 0."""
    if not done.rows:
        return ["No training gave an encoder: " + "; ".join(f"{name}: {why}" for name, why in done.failed.items())]
    best = done.rows[0]
    said = [*_leads(done.rows, f"{best.name} leads", done.chance)]
    free = [row for row in done.rows if not row.labelled]
    if best.labelled and free:
        said += _leads(free, f"Of those that saw no labels, {free[0].name} leads", done.chance)
        best = free[0]
    naive = {row.name: row for row in done.baselines}
    for base in done.baselines:
        if base.name.startswith("untrained") and base is not _start(best, naive):
            continue
        gap = ahead_of(best, base)
        how = "better than" if gap.low > 0 else "worse than" if gap.high < 0 else "other than"
        sure = "surely" if gap.low > 0 or gap.high < 0 else "not surely"
        said.append(f"{best.name} is {sure} {how} {base.name}: {points(gap)} points of linear accuracy.")
    idle = [row.name for row in done.rows if ahead_of(row, _start(row, naive)).low <= 0]
    if idle:
        said.append(f"Not surely better than what they began with: {', '.join(idle)}. Longer, or not at all.")
    thin = [f"{row.name} ({row.rank:.1f} of {row.width})" for row in done.rows if row.rank < 2]
    if thin:
        said.append(f"Close to collapse, by the effective rank of their features: {', '.join(thin)}.")
    said += _without_labels(done)
    return said + [f"{name} failed: {why}" for name, why in done.failed.items()]


def _without_labels(done: Comparison) -> list[str]:
    """What the score that needs no labels would have chosen, and whether it went with accuracy here."""
    rows = [row for row in done.rows if row.view_retrieval is not None]
    if len(rows) < ENOUGH:
        return []
    by_score = [float(row.view_retrieval or 0) for row in rows]
    value, low, high = correlation(by_score, [row.accuracy["knn"].value for row in rows])
    best, went = rows[int(np.argmax(by_score))], f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return [
        f"Without labels, view retrieval would have chosen {best.name} (kNN {_share(best.accuracy['knn'])}). Over "
        f"these {len(rows)} trainings its rank correlation with kNN is {went}."
    ]


def _leads(rows: Sequence[Row], lead: str, chance: float) -> list[str]:
    """The first of `rows`, which of them are not surely behind it, and which to search with."""
    best, *rest = rows
    said = [f"{lead}: a linear probe reads {_share(best.accuracy['linear'])} of labels (chance {100 * chance:.1f} %)."]
    close = [row for row in rest if ahead_of(best, row).low <= 0]
    if close:
        names = ", ".join(row.name for row in close)
        said.append(f"Not surely behind it: {names}. Choose among these by cost and needs.")
        fast = max([best, *close], key=lambda row: row.images_per_second or 0)
        times = (fast.images_per_second or 0) / (best.images_per_second or 1)
        if times > FASTER:
            said.append(f"Of these, {fast.name} trains fastest, {times:.1f} times as fast as {best.name}.")
    elif rest:
        said.append(f"Surely ahead of the next, {rest[0].name}, by {points(ahead_of(best, rest[0]))} points.")
    near = max(rows, key=lambda row: row.accuracy["knn"].value)
    if near is not best and ahead_of(near, best, "knn").low > 0:
        said.append(f"To search with, {near.name}: its neighbours vote better, {_share(near.accuracy['knn'])}.")
    return said


def _start(row: Row, naive: Mapping[str, Row]) -> Row:
    """The encoder that a method began with."""
    hidden = row.facts is not None and row.facts.patches and "untrained transformer" in naive
    return naive["untrained transformer" if hidden else next(iter(naive))]


def _caveats(variants: Sequence[Variant], seeds: Sequence[int], seconds: float | None) -> list[str]:
    budget = (
        f"{seconds:g} seconds"
        if seconds
        else f"{variants[0].setting.epochs} epoch{'s' * (variants[0].setting.epochs > 1)}"
    )
    said = [
        f"A budget of {budget} favours methods that learn fast; what a long training ends with, it does not say.",
        "Intervals are over held-out pictures"
        + (
            ", with one training each: another seed moves figures too."
            if len(seeds) == 1
            else f", each averaged over {len(seeds)} trainings."
        ),
        "One optimiser and learning rate for all, and heads and momenta for short runs; --sweep tries others.",
    ]
    encoders = {variant.setting.encoder for variant in variants}
    if len(encoders) > 1:
        said.append(f"Encoders differ: methods that hide patches need a transformer ({', '.join(sorted(encoders))}).")
    if names := [variant.name for variant in variants if variant.labelled]:
        said.append(f"{', '.join(names)} saw the labels of the training pictures; the others did not.")
    return said


def _share(value: Interval) -> str:
    return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
