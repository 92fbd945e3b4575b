"""The command line: one short function a verb. It reads flags, calls the library and prints what comes back.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 1 something the message says how to mend,
2 wrong usage, 130 interrupted.
"""

import dataclasses
import inspect
import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, arg

from twofold.errors import TwofoldError, UsageError, unknown

Data = Annotated[str, arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]
OnError = Literal["skip", "raise"]


def demo(*, out: Folder = Path("twofold-demo"), json: bool = False) -> None:
    """The main job on shipped data: 4,495 emoji and their names come to share a space, and are searched.

    Offline, about two minutes the first time. Ctrl-C at any point; the next call goes on from there.

    examples:
      twofold demo
      twofold demo --json > figures.json

    Args:
        out: where the model and the index go
        json: print one JSON object with every figure
    """
    from twofold.demo import demo

    figures = demo(out, quiet=json)
    if json:
        print(jsonlib.dumps(figures, ensure_ascii=False))


def align(
    pairs: Data,
    /,
    *,
    out: Folder,
    recipe: "OmitArgPrefixes[Recipe]",
    image: str = "efficientnet-lite0",
    text: str = "minilm",
    images: Annotated[Path | None, arg(metavar="DIR")] = None,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Bring pictures and their texts into one space: two frozen encoders, two small heads that learn in seconds.

    DATA is a manifest (CSV, JSONL, Parquet) with a picture and a text column, or "openmoji". Where it names splits,
    "train" is learned from and "test" is measured.

    examples:
      twofold align captions.csv --out runs/b
      twofold align captions.csv --out runs/c --objective clip --epochs 40

    Args:
        pairs: pictures with texts
        out: the run's folder; the bundle comes to lie in it
        image: the picture encoder
        text: the text encoder, "minilm" or "hf:FOLDER"
        images: where the manifest's pictures are, if not beside it
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.train.align import align

    source = open_source(pairs, images=images)
    done = align(source, out=out, image=image, text=text, recipe=recipe, on_error=on_error, quiet=json)
    figures = {
        "bundle": str(out / "bundle"),
        "fingerprint": done.bundle.fingerprint,
        "steps": done.run.steps,
        "seconds": done.run.seconds,
        "last": done.run.log[-1],
    }
    measured = None
    if source.splits is not None and "test" in source.splits:
        measured = evaluate(done.bundle, source, quiet=json)
    if json:
        _print_json({**figures, "evaluation": measured})
        return
    _print_skipped(done.skipped)
    last = done.run.log[-1]
    print(f"  loss {last['loss']:.3f} (chance {last['chance']:.3f}) after {done.run.steps:,} steps")
    if measured:
        _print_evaluation(measured)
    print(f"\n  {out / 'bundle'}\n  next: twofold index {pairs} --model {out} --out {out / 'index'}")


def evaluate(
    model: Annotated[Path, arg(metavar="MODEL")],
    /,
    *,
    data: Data,
    split: str = "test",
    limit: int | None = None,
    at: Literal["encoder", "head"] = "encoder",
    baselines: bool = False,
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Measure a model: kNN and linear probe where there are labels, recall both ways where there are captions.

    examples:
      twofold evaluate runs/a --data photos/ --baselines
      twofold evaluate runs/a --data photos/ --at head
      twofold evaluate runs/b --data captions.csv

    Args:
        model: a bundle, or the folder of a run
        data: labelled or captioned pictures with splits
        split: what is tested on; probes are fitted on "train"
        limit: fit the probes on the first so many items of "train"
        at: head: measure behind the head of the training, too; what it throws away, the encoder still has
        baselines: measure raw pixels and the untrained encoder too
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.data.sources import open_source
    from twofold.measure.evaluate import evaluate
    from twofold.models.bundle import Bundle

    measured = evaluate(
        Bundle.load(model, heads=at == "head"),
        open_source(data),
        split=split,
        limit=limit,
        at=at,
        baselines=baselines,
        on_error=on_error,
        quiet=json,
    )
    if json:
        _print_json(measured)
    else:
        _print_evaluation(measured)


def embed(
    data: Data,
    /,
    *,
    model: Annotated[str, arg(metavar="MODEL")] = "efficientnet-lite0",
    out: Annotated[Path, arg(metavar="FILE.npz")],
    modality: Literal["image", "text"] = "image",
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Turn pictures or texts into vectors: an NPZ with `ids` and `vectors`, float32 [n, d].

    examples:
      twofold embed photos/ --out photos.npz
      twofold embed captions.csv --model runs/b --modality text --out captions.npz

    Args:
        data: what to embed
        model: a bundle, the folder of a run, or the name of an encoder
        out: the file to write
        modality: which column to embed
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    import numpy as np

    from twofold.data.atomic import write_atomically
    from twofold.data.sources import open_source
    from twofold.measure.embed import embed

    done = embed(_model(model, modality), open_source(data), modality, on_error=on_error, quiet=json)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, ids=np.array(done.ids), vectors=done.matrix)

    write_atomically(out, write)
    if json:
        _print_json({"out": str(out), "items": len(done.ids), "dim": done.matrix.shape[1], "skipped": done.skipped})
    else:
        _print_skipped(done.skipped)
        print(f"  {len(done.ids):,} vectors of {done.matrix.shape[1]} in {out}")


def index(
    source: Data,
    /,
    *,
    model: Annotated[Path, arg(metavar="MODEL")],
    out: Folder,
    existing: Literal["keep", "prune", "replace"] = "keep",
    on_error: OnError = "skip",
    json: bool = False,
) -> None:
    """Make a collection searchable. Run it again after changes: only what is new is embedded.

    examples:
      twofold index photos/ --model runs/b --out photos.index
      twofold index photos/ --model runs/b --out photos.index --existing prune

    Args:
        source: what shall be found
        model: a bundle, or the folder of a run
        out: the index's folder
        existing: items that the index has and the source has not: keep or prune them; replace begins anew
        on_error: what to do with a picture that cannot be read
        json: print the result as JSON
    """
    from twofold.progress import Line
    from twofold.retrieve.index import index

    with Line("embed", unit="items", quiet=json) as line:
        built = index(source, model=model, out=out, existing=existing, on_error=on_error, progress=line.update)
    if json:
        _print_json(dataclasses.asdict(built))
        return
    _print_skipped(built.skipped)
    print(
        f"  {built.items:,} items in {out}: {built.added:,} added, {built.changed:,} changed, "
        f'{built.removed:,} removed, {built.embedded:,} embedded\n  next: twofold search {out} "a red heart"'
    )


def search(
    index: Annotated[Path, arg(metavar="INDEX")],
    text: Annotated[str | None, arg(metavar="WORDS")] = None,
    /,
    *,
    image: Annotated[Path | None, arg(metavar="FILE")] = None,
    id: str | None = None,
    minus: str | None = None,
    weight: float = 0.5,
    k: int = 10,
    where: tuple[str, ...] = (),
    json: bool = False,
) -> None:
    """Search an index with words, a picture, an item of it, or several of them together.

    examples:
      twofold search photos.index "a red boat at dusk"
      twofold search photos.index --image boat.jpg "in the snow"
      twofold search photos.index --id 1F496 --where group=symbols --k 5

    Args:
        index: the index's folder
        text: what to look for, in words
        image: a picture to look for the like of
        id: an item of the index to look for the like of
        minus: words to lead away from
        weight: the words' share where a picture or an item is given too, 0..1
        k: how many
        where: only items whose metadata are so: column=value
        json: print the result as JSON
    """
    from contextlib import closing

    from twofold.retrieve.index import Index
    from twofold.retrieve.store import parse_where

    wanted = parse_where(where)
    with closing(Index.open(index)) as opened:
        hits = opened.search(text, image=image, id=id, minus=minus, weight=weight, k=k, where=wanted)
    if json:
        _print_json([hit._asdict() for hit in hits])
    else:
        _print_hits(hits)


def methods(*, json: bool = False) -> None:
    """List the methods that `twofold train` knows, with the paper of each and what it learns from.

    examples:
      twofold methods

    Args:
        json: print the result as JSON
    """
    from twofold.methods import METHODS

    docs = {name: inspect.getdoc(sys.modules[method.__module__]) or "" for name, method in METHODS.items()}
    papers = {name: " ".join(doc.split("\n\n")[0].split()) for name, doc in docs.items()}
    if json:
        _print_json({name: {"paper": paper, "needs": METHODS[name].needs} for name, paper in papers.items()})
        return
    words = {"image": "pictures", "label": "labels", "text": "captions"}
    for needs in dict.fromkeys(tuple(method.needs) for method in METHODS.values()):
        print(f"\n  from {' and '.join(words[need] for need in needs)}")
        for name, paper in papers.items():
            if tuple(METHODS[name].needs) == needs:
                print(f"    {name:<8} {paper}")


def train(name: str, arguments: list[str]) -> None:
    """Train a method from scratch on pictures (and labels or texts). Called again, it goes on where it was stopped.

    examples:
      twofold train simclr photos/ --out runs/a
      twofold train simclr cifar10/ --out runs/c --encoder timm:resnet18 --small-stem --policy simclr-cifar
      twofold train triplet photos/ --out runs/d --mining batch-hard --per-class 4
      twofold train siglip captions.csv --out runs/b --temperature 0.1
      twofold train simclr tiles/ --out runs/e --policy views/proposed.toml --policy.hue 0.05

    """
    from twofold import runtime
    from twofold.data.sources import open_source
    from twofold.methods import METHODS
    from twofold.train.optim import Optimizer
    from twofold.train.train import Setting, train

    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind: Any = _options(METHODS[name])
    arguments, changes = _policy_changes(arguments)

    def verb(
        data: Data,
        /,
        *,
        out: Folder,
        setting: Annotated[Setting, arg(name="")] = Setting(),  # noqa: B008 — frozen
        optimizer: Optimizer = Optimizer(),  # noqa: B008 — frozen
        options: Annotated[kind, arg(name="")] = kind(),  # noqa: B008 — frozen
        json: bool = False,
    ) -> None:
        """
        Args:
            data: pictures, with labels or captions where the method needs them
            out: the run's folder; the bundle comes to lie in it
            json: print the result as JSON
        """
        done = train(
            name,
            open_source(data),
            out=out,
            setting=setting,
            optimizer=optimizer,
            options=vars(options),
            changes=changes,
            quiet=json,
        )
        if runtime.world()[0]:
            return  # of several processes the first speaks
        if json:
            figures = {"out": str(out), "steps": done.steps, "seconds": done.seconds, "last": done.log[-1]}
            _print_json(figures | ({"profile": done.profile.json()} if done.profile else {}))
        else:
            print(f"  {out / 'bundle'}\n  next: twofold evaluate {out} --data {data} --baselines")

    words = inspect.getdoc(sys.modules[METHODS[name].__module__]) or ""
    _call(verb, f"train {name}", arguments, description=f"{words}\n\n{_described(_train_doc())}")


def views(arguments: list[str]) -> None:
    """Look at what a policy makes of pictures; with --audit, measure what it destroys and propose a better one.

    Writes sheet.png (originals and their views) and ladder.png (each operation from off to full). --audit adds
    audit.html, audit.json and proposed.toml, a policy to train with. --compare trains briefly under each policy.

    --policy.FIELD VALUE changes a field of the policy, as in `--policy natural --policy.hue 0 --policy.area 0.3 1`.

    examples:
      twofold views photos/ --policy simclr
      twofold views tiles/ --policy simclr --size 96 --audit
      twofold views tiles/ --compare simclr views/proposed.toml

    """
    from twofold.train.compare_policies import SHORT

    arguments, changes = _policy_changes(arguments)

    def verb(
        data: Data,
        /,
        *,
        policy: str = "simclr",
        out: Folder = Path("views"),
        size: int | None = None,
        channels: int = 3,
        rows: int = 8,
        audit: bool = False,
        items: int = 512,
        views: int = 4,
        columns: tuple[str, ...] = (),
        model: Annotated[str | None, arg(metavar="MODEL")] = None,
        compare: Annotated[tuple[str, ...], arg(metavar="POLICY …")] = (),
        epochs: int = SHORT.epochs,
        seeds: int = 2,
        seed: int = 0,
        json: bool = False,
    ) -> None:
        """
        Args:
            data: pictures, with labels, captions or metadata columns if there are any
            policy: the name of a preset, or a .toml or .json file
            out: where the pages and pictures go
            size: pixels a side of a view as it will be trained; the policy's or the pictures' own where not given
            channels: of the pictures
            rows: pictures on the contact sheet
            audit: measure confusion, loss and shortcuts, for each operation and the whole
            items: pictures that the audit looks at
            views: of each picture and operation
            columns: metadata columns to probe for, and "label"; those of few values where not given
            model: what the audit sees with: a bundle, the folder of a run, or the name of an encoder
            compare: policies to train briefly under
            epochs: of each training
            seeds: trainings under each policy
            seed: another sample, and other views
            json: print the result as JSON
        """
        from twofold.data.sources import open_source
        from twofold.views import policies

        source = open_source(data)
        chosen = tuple(dataclasses.replace(one, **changes) for one in policies(policy))
        figures: dict[str, Any] = {}
        if not compare or audit:
            figures |= _sheets(source, chosen, out, size=size, channels=channels, rows=rows, seed=seed, quiet=json)
        if audit:
            from twofold.measure.policy_audit import audit as audited

            done = audited(
                chosen,
                source,
                encoder=_model(model, "image") if model else None,
                columns=columns or None,
                items=items,
                views=views,
                size=size,
                channels=channels,
                seed=seed,
                quiet=json,
            )
            figures |= {"audit": _write_audit(done, out)}
            if not json:
                _print_audit(done, out)
        if compare:
            from twofold.train.compare_policies import compare as compared

            setting = dataclasses.replace(SHORT, size=size or SHORT.size, channels=channels, epochs=epochs)
            result = compared(
                compare, source, out=out / "compare", setting=setting, seeds=range(seed, seed + seeds), quiet=json
            )
            figures |= {"compare": result}
            if not json:
                _print_comparison(result)
        if json:
            _print_json(figures)

    _call(verb, "views", arguments, description=_described(inspect.getdoc(views) or ""))


VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb for verb in (demo, views, train, align, evaluate, embed, index, search, methods)
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
        if verb in ("-h", "--help", "help"):
            print(_overview())
        elif verb == "--version":
            import twofold

            print(f"twofold {twofold.__version__}")
        elif verb not in VERBS:
            raise unknown("command", verb, VERBS)
        elif verb == "train":
            if not rest or rest[0].startswith("-"):
                print(f"{_described(_train_doc())}\n\n  twofold train METHOD --help says more. METHOD is one of:")
                methods()
            else:
                train(rest[0], rest[1:])
        elif verb == "views":
            views(rest)
        else:
            _call(VERBS[verb], verb, rest)
    except TwofoldError as error:
        print(f"twofold: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt as stopped:
        print(f"twofold: interrupted. {str(stopped) or 'The same command goes on from there.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `twofold … | head`
        sys.stderr.close()
    except SystemExit as exit:  # tyro has printed what was wrong, or the help
        return exit.code if isinstance(exit.code, int) else 2
    return 0


def _call(verb: Callable[..., None], name: str, arguments: list[str], *, description: str | None = None) -> None:
    """Read `arguments` as the signature of `verb` says, and call it."""
    if verb is align:
        # The recipe's class lives beside torch, which `twofold --help` need not wait for.
        from twofold.train.align import Recipe

        align.__annotations__["recipe"] = OmitArgPrefixes[Recipe]
        align.__kwdefaults__ = {**(align.__kwdefaults__ or {}), "recipe": Recipe()}
    tyro.cli(
        verb,
        prog=f"twofold {name}",
        args=arguments,
        description=description or _described(inspect.getdoc(verb) or ""),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _policy_changes(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """`--policy.FIELD VALUE` taken out of the arguments: a name and changes to what it stands for are two things."""
    if not any(argument.startswith("--policy.") for argument in arguments):
        return arguments, {}
    from twofold.views import Policy

    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Policy)}
    rest: list[str] = []
    changes: dict[str, Any] = {}
    left = [part for argument in arguments for part in (argument.split("=", 1) if _is_change(argument) else [argument])]
    while left:
        if not _is_change(argument := left.pop(0)):
            rest.append(argument)
            continue
        name = argument.removeprefix("--policy.").replace("-", "_")
        if name not in known:
            raise unknown("field of a policy", name, known)
        count = len(known[name]) or 3 if isinstance(known[name], tuple) else 1
        values, left = left[:count], left[count:]
        whole = isinstance(known[name], int) or name == "jpeg_quality"
        try:
            numbers = tuple(int(value) if whole else float(value) for value in values)
        except ValueError:
            numbers = ()
        if len(numbers) < count:
            takes = f"{count} numbers" if count > 1 else "a whole number" if whole else "a number"
            raise UsageError(f"{argument} takes {takes}; got {' '.join(values) or 'nothing'}.")
        changes[name] = numbers if isinstance(known[name], tuple) else numbers[0]
    return rest, changes


def _is_change(argument: str) -> bool:
    return argument.startswith("--policy.")


def _sheets(
    source: Any, policies: tuple, out: Path, *, size: int | None, channels: int, rows: int, seed: int, quiet: bool
) -> dict[str, Any]:
    """Write the contact sheet and the ladder; where they lie."""
    import numpy as np
    import torch

    from twofold import runtime
    from twofold.data.cache import decoded
    from twofold.measure.policy_audit import picture_side
    from twofold.views.sheet import contact_sheet, strength_ladder

    some = torch.randperm(len(source), generator=runtime.generator(seed, "sheet")).tolist()[:rows]
    few = source.take(some)
    side = size or min(max(policy.size for policy in policies), picture_side(few))
    pictures = decoded(few, side if side <= 64 else side * 8 // 7, channels=channels)
    images = torch.from_numpy(np.array(pictures.pixels))
    sized = [dataclasses.replace(policy, size=side) for policy in policies]
    out.mkdir(parents=True, exist_ok=True)
    paths = {"sheet": out / "sheet.png", "ladder": out / "ladder.png"}
    contact_sheet(sized, images, runtime.generator(seed, "views")).save(paths["sheet"])
    strength_ladder(sized[0], images[0], runtime.generator(seed, "ladder")).save(paths["ladder"])
    said = list(dict.fromkeys(map(str, sized)))
    if not quiet:
        _print_skipped(pictures.skipped)
        print("\n".join(f"  {policy}" for policy in said))
        print(f"  {paths['sheet']}\n  {paths['ladder']}")
    return {name: str(path) for name, path in paths.items()} | {"policies": said}


def _write_audit(done: Any, out: Path) -> dict[str, Any]:
    """Leave the page, the figures and the proposed policy in `out`; the figures."""
    from twofold.data.samples import ATTRIBUTION
    from twofold.measure.audit_page import page
    from twofold.views import files

    figures = plain(done.to_dict())
    notice = ATTRIBUTION if done.source.name == "openmoji" else ""
    (out / "audit.html").write_text(page(done, notice=notice), "utf-8")
    (out / "audit.json").write_text(jsonlib.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    files.write([policy.to_dict() for policy in dict.fromkeys(done.proposed)], out / "proposed.toml")
    return figures


def _described(doc: str) -> str:
    """A docstring without what tyro shows beside the flags."""
    return doc.split("\nArgs:")[0].rstrip()


def _train_doc() -> str:
    return inspect.getdoc(train) or ""


def _overview() -> str:
    lines = [f"  {name:<9} {(inspect.getdoc(verb) or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "twofold: train representations by comparing views, and search with them.",
            "",
            *lines,
            "",
            "twofold COMMAND --help says more; start with `twofold demo`.",
        ]
    )


def _options(method: type) -> type:
    """A dataclass of what a method's signature leaves to choose: its keyword-only numbers, words and heads."""
    from twofold.models.heads import Head

    hints = get_type_hints(getattr(method, "__init__"))  # noqa: B009 — a class's, not an instance's
    chosen = [
        (p.name, hints[p.name], dataclasses.field(default=p.default))
        for p in inspect.signature(method).parameters.values()
        if p.kind is p.KEYWORD_ONLY and (hints[p.name] in (int, float, bool, str, Head) or _is_literal(hints[p.name]))
    ]
    return dataclasses.make_dataclass(f"{method.__name__}Options", chosen, frozen=True)


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal


def _model(name: str, modality: str) -> Any:
    """A bundle by its folder or its run's, else an encoder by its name."""
    if Path(name).exists():
        from twofold.models.bundle import Bundle

        return Bundle.load(name)
    from twofold.models.encoders import image_encoder, text_encoder

    return image_encoder(name) if modality == "image" else text_encoder(name)


# -- Printing ---------------------------------------------------------------------------------------------------------


def _print_json(result: Any) -> None:
    print(jsonlib.dumps(plain(result), ensure_ascii=False))


def plain(result: Any) -> Any:
    """A result as JSON values: named tuples become objects, arrays lists, paths and other keys strings."""
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return plain(result._asdict())
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [plain(value) for value in result]
    if hasattr(result, "tolist"):
        return result.tolist()
    return str(result) if isinstance(result, Path) else result


def _print_skipped(skipped: list) -> None:
    for item in skipped[:5]:
        print(f"  skipped {item.id}: {item.reason}", file=sys.stderr)
    if len(skipped) > 5:
        print(f"  … {len(skipped)} items skipped in all", file=sys.stderr)


def _print_evaluation(measured: Any) -> None:
    from twofold.terminal import CONSOLE, evaluation_tables

    CONSOLE.print(*evaluation_tables(measured), sep="\n")


def _print_hits(hits: list) -> None:
    from twofold.terminal import CONSOLE, hits_table

    CONSOLE.print(hits_table(hits))


def _print_audit(done: Any, out: Path) -> None:
    from twofold.terminal import CONSOLE, audit_tables

    _print_skipped(done.skipped)
    CONSOLE.print(*audit_tables(done), sep="\n")
    for line in done.verdict:
        CONSOLE.print(f"  {line}", highlight=False, markup=False)
    print(f"  {out / 'audit.html'}\n  {out / 'proposed.toml'}")


def _print_comparison(result: Any) -> None:
    from twofold.terminal import CONSOLE, comparison_table

    CONSOLE.print(comparison_table(result))
