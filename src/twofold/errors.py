"""Every exception that twofold raises on purpose.

The command line prints these without a traceback and exits with `code`; anything else is a bug of ours and keeps its
traceback. A message says what happened, what was expected and what to do, and names the file, the step or the id.
"""

import difflib
from collections.abc import Iterable


class TwofoldError(Exception):
    """Something the user can mend; `code` is the exit status of the command line."""

    code = 1


class UsageError(TwofoldError):
    """A name, flag or combination that does not exist."""

    code = 2


class DataError(TwofoldError):
    """A source, manifest or item that cannot be used as it is."""


class DecodeError(DataError):
    """One item whose bytes do not decode to what was expected."""

    def __init__(self, item: str, reason: str):
        super().__init__(f"{item}: {reason}")
        self.item, self.reason = item, reason

    def __reduce__(self) -> tuple[type["DecodeError"], tuple[str, str]]:
        return type(self), (self.item, self.reason)  # so that another process can raise it


class TrainingError(TwofoldError):
    """Training that cannot go on: a loss that is not finite, a run folder of another configuration."""


class BundleError(TwofoldError):
    """A bundle or model that is missing, incomplete or damaged."""


class EmbedderError(TwofoldError):
    """A text embedder elsewhere that does not answer, or refuses to."""


class StoreError(TwofoldError):
    """An index that is missing, locked or damaged."""


class FingerprintMismatch(StoreError):
    """Vectors of one encoder meeting an index of another."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not among `choices`: says the nearest one, then all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"There is no {kind} {name!r}.{hint} Known: {', '.join(choices)}.")
