"""`--policy.FIELD VALUE`: changes to the policy that `--policy` names."""

import dataclasses
from typing import Any

from twofold.errors import UsageError, unknown


def policy_changes(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
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
