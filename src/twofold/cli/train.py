"""`twofold train`."""

import dataclasses
import inspect
import sys
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from tyro.conf import arg

from twofold.cli.flags import Columns, Data, Folder, assigned, call, described
from twofold.cli.methods import methods
from twofold.cli.policies import policy_changes
from twofold.cli.show import print_json, print_report
from twofold.errors import unknown


def train(arguments: list[str]) -> None:
    """Train a method from scratch on pictures (and labels or texts). Called again, it goes on where it was stopped.

    examples:
      twofold train simclr photos/ --out runs/a
      twofold train simclr cifar10/ --out runs/c --encoder timm:resnet18 --small-stem --policy simclr-cifar
      twofold train triplet photos/ --out runs/d --mining batch-hard --per-class 4
      twofold train siglip captions.csv --out runs/b --temperature 0.1
      twofold train vjepa clips/ --out runs/f --encoder timm:vit_tiny_patch16_224/8x128x6 --size 64
      twofold train simclr tiles/ --out runs/e --policy views/proposed.toml --policy.hue 0.05

    """
    from twofold import runtime
    from twofold.data.sources import open_source
    from twofold.methods import METHODS
    from twofold.train.doctor_page import reported
    from twofold.train.optim import Optimizer
    from twofold.train.train import Setting
    from twofold.train.train import train as trained

    if not arguments or arguments[0].startswith("-"):
        print(f"{described(train)}\n\n  twofold train METHOD --help says more. METHOD is one of:")
        methods([])
        return
    name, *arguments = arguments
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind: Any = _options(METHODS[name])
    arguments, changes = policy_changes(arguments)

    def verb(
        data: Data,
        /,
        *,
        out: Folder,
        setting: Annotated[Setting, arg(name="")] = Setting(),  # noqa: B008 — frozen
        optimizer: Optimizer = Optimizer(),  # noqa: B008 — frozen
        options: Annotated[kind, arg(name="")] = kind(),  # noqa: B008 — frozen
        columns: Columns = (),
        report: bool = True,
        json: bool = False,
    ) -> None:
        """
        Args:
            data: pictures, with labels or captions where the method needs them, or videos
            out: the run's folder; the bundle comes to lie in it
            columns: which further columns are modalities, each of a kind: clip=video, or clip=video:4x4 of sheets
            report: look at the run when it ends, and write what `twofold doctor` says of it to DIR/doctor.html
            json: print the result as JSON
        """
        source = open_source(data, columns=assigned("columns", columns))
        done = trained(
            name,
            source,
            out=out,
            setting=setting,
            optimizer=optimizer,
            options=vars(options),
            changes=changes,
            quiet=json,
        )
        if runtime.world()[0]:
            return  # of several processes the first speaks
        verdict = reported(out, source, quiet=json) if report else None
        if json:
            figures = {"out": str(out), "steps": done.steps, "seconds": done.seconds, "last": done.log[-1]}
            print_json(figures | ({"profile": done.profile.json()} if done.profile else {}))
        else:
            said = f" --columns {' '.join(columns)}" if columns else ""
            print_report(verdict)
            print(f"  {out / 'bundle'}\n  next: twofold evaluate {out} --data {data}{said}")

    words = inspect.getdoc(sys.modules[METHODS[name].__module__]) or ""
    call(verb, f"train {name}", arguments, description=f"{words}\n\n{described(train)}")


def _options(method: type) -> type:
    """A dataclass of what a method's signature leaves to choose: its keyword-only numbers, words and heads."""
    from twofold.models.heads import Head
    from twofold.models.predictor import Blocks
    from twofold.views.masks import Rectangles

    plain = (int, float, bool, str, Head, Blocks, Rectangles)
    hints = get_type_hints(getattr(method, "__init__"))  # noqa: B009 — a class's, not an instance's
    chosen = [
        (p.name, hints[p.name], dataclasses.field(default=p.default))
        for p in inspect.signature(method).parameters.values()
        if p.kind is p.KEYWORD_ONLY and (hints[p.name] in plain or _is_literal(hints[p.name]))
    ]
    return dataclasses.make_dataclass(f"{method.__name__}Options", chosen, frozen=True)


def _is_literal(hint: Any) -> bool:
    return get_origin(hint) is Literal
