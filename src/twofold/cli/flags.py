"""How a verb's flags are read from its signature."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

Data = Annotated[str, arg(metavar="DATA")]
Folder = Annotated[Path, arg(metavar="DIR")]
OnError = Literal["skip", "raise"]


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


def model_of(name: str, modality: str) -> Any:
    """A bundle by its folder or its run's, else an encoder by its name."""
    if Path(name).exists():
        from twofold.models.bundle import Bundle

        return Bundle.load(name)
    from twofold.models.encoders import image_encoder, text_encoder

    return image_encoder(name) if modality == "image" else text_encoder(name)
