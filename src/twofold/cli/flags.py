"""How a verb's flags are read from its signature."""

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from twofold.errors import UsageError

Data = Annotated[str, arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]
OnError = Literal["skip", "raise"]
Columns = Annotated[tuple[str, ...], arg(metavar="NAME=KIND …")]


Verb = Callable[[list[str]], None]


def verb(function: Callable[..., None]) -> Verb:
    """A function as a command: its signature says which flags there are, its docstring what they mean."""

    @functools.wraps(function)
    def command(arguments: list[str]) -> None:
        call(function, function.__name__, arguments)

    return command


def call(function: Callable[..., None], name: str, arguments: list[str], *, description: str | None = None) -> None:
    """Read `arguments` as the signature of `function` says, and call it."""
    tyro.cli(
        function,
        prog=f"twofold {name}",
        args=arguments,
        description=description or described(function),
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def described(function: Callable[..., Any]) -> str:
    """A function's docstring without what tyro shows beside the flags."""
    return (inspect.getdoc(function) or "").split("\nArgs:")[0].rstrip()


def again(data: str, images: Path | None = None, columns: tuple[str, ...] = ()) -> str:
    """DATA as the next command takes it, with what this one was told about it."""
    said = [*(["--images", str(images)] if images else []), *(["--columns", *columns] if columns else [])]
    return shlex.join([data, *said])


def assigned(flag: str, words: tuple[str, ...]) -> dict[str, str]:
    """{"image": "minilm"} of the words image=minilm."""
    if wrong := [word for word in words if not all(word.partition("="))]:
        raise UsageError(f"--{flag} takes NAME=VALUE, such as text=minilm; got {wrong[0]!r}.")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def model_of(name: str, source: Any, modality: str) -> Any:
    """A bundle by its folder or its run's, else an encoder by its name for a column of `source`."""
    if Path(name).exists():
        from twofold.models.bundle import Bundle

        return Bundle.load(name)
    import torch

    from twofold import runtime
    from twofold.models.encoders import encoder

    torch.manual_seed(0)  # of an encoder without trained weights: the same vectors the next time
    column = source.column(modality)
    return encoder(name, column.kind, column=column).to(runtime.device())
