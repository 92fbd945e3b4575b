"""The method of a run as its checkpoint has it: the parts that a bundle leaves behind, such as a queue or a decoder."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from twofold.errors import TrainingError, TwofoldError
from twofold.measure.metrics import Interval, bootstrap, unit_rows
from twofold.methods import METHODS, Method
from twofold.models.bundle import Bundle
from twofold.models.encoders import ImageEncoder
from twofold.train import checkpoint as checkpoints
from twofold.train.loop import CHECKPOINT
from twofold.train.train import Setting, picture_encoder, policies_of
from twofold.views import Policy


def method_name(record: Mapping[str, Any]) -> str:
    """The name in METHODS of a run's method; "" where it is none of them."""
    return next((name for name, kind in METHODS.items() if kind.__name__ == record.get("method")), "")


def restored(run: Path, record: Mapping[str, Any]) -> Method | None:
    """The method with the weights of the run's last checkpoint, in evaluation; None for pairs, whose bundle has all.

    Raises TrainingError where the checkpoint is of a method that was put together otherwise than `record` says.
    """
    name = method_name(record)
    if not name or "text" in METHODS[name].needs or not (run / CHECKPOINT).exists():
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            method = METHODS[name](
                _encoder(run, record, name), policies=views_of(record, name), **_options(record, name)
            )
        checkpoints.restore(checkpoints.load(run / CHECKPOINT), method, None)
    except (TwofoldError, TypeError) as error:
        raise TrainingError(f"The method of {run} could not be put together again: {error}") from error
    return method.eval().requires_grad_(False)


def views_of(record: Mapping[str, Any], name: str) -> tuple[Policy, ...]:
    """The policies that a run trained with; SimCLR's where it had none."""
    if record.get("policies"):
        return tuple(Policy.from_dict(each) for each in record["policies"])
    return policies_of(name or "simclr", record.get("policy"), {})


def _encoder(run: Path, record: Mapping[str, Any], name: str) -> ImageEncoder:
    if str(record.get("encoder", "")).startswith(("run:", "local:")):
        encoder: Any = (
            Bundle.load(run).towers["image"].encoder
        )  # of the same shape; its weights come from the checkpoint
        return encoder
    known = {field.name for field in fields(Setting)}
    setting = Setting(**{key: value for key, value in record.items() if key in known and key != "batch"})
    return picture_encoder(setting, of_clips="video" in METHODS[name].needs)


def _options(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    hints = get_type_hints(getattr(METHODS[name], "__init__"))  # noqa: B009 — a class's, not an instance's
    known = inspect.signature(METHODS[name]).parameters
    options = {}
    for key, value in record.get("options", {}).items():
        if key in known:
            hint: Any = hints[key]
            options[key] = (
                hint(**value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
            )
    return options


def leak(method: Any, views: tuple[torch.Tensor, torch.Tensor], *, batch: int) -> tuple[Interval, Interval] | None:
    """Whether BatchNorm gives partners away: in training mode, the share of views whose partner is found with both in
    one batch, and how much of it goes where the second views are normalised in other company.

    None without a BatchNorm or for fewer than two batches. The method's running averages are spoilt by it.
    """
    norms = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in method.modules())
    n = len(views[0]) // batch * batch
    if not norms or n < 2 * batch or not hasattr(method, "head"):
        return None
    keys: Any = getattr(method, "target", None) if hasattr(method, "queue") else None
    keys = keys or (lambda x: method.head(method.encoder(x)))
    first, second = (view[:n] for view in views)
    mixed = torch.arange(n).view(-1, batch).T.flatten()  # each batch has rows of all others
    method.train()
    with torch.no_grad():
        q = unit_rows(torch.cat([method.head(method.encoder(x)) for x in first.split(batch)]))
        together = unit_rows(torch.cat([keys(x) for x in second.split(batch)]))
        apart = unit_rows(torch.cat([keys(x) for x in second[mixed].split(batch)]))[mixed.argsort()]
    method.eval()
    found = [((q @ k.T).argmax(1) == torch.arange(n)).double() for k in (together, apart)]
    return bootstrap(found[0]), bootstrap(found[0] - found[1])
