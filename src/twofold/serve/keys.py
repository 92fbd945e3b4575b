"""API keys: a file of their hashes, each with what its holder may do."""

import hashlib
import hmac
import json
import secrets
import time
from pathlib import Path
from typing import Literal, get_args

from twofold.data.atomic import write_atomically
from twofold.errors import DataError, UsageError

Scope = Literal["read", "write"]  # who may write may read


class Keys:
    """The keys that a service accepts. A key is 256 random bits, so a plain hash of it gives nothing away."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._scopes: dict[str, Scope] = {}
        if not self.path.exists():
            return
        try:
            for row in json.loads(self.path.read_text("utf-8")):
                if row["scope"] not in get_args(Scope):
                    raise ValueError(f"scope {row['scope']!r}")
                self._scopes[row["hash"]] = row["scope"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is no file of keys ({type(error).__name__}: {error}).") from error

    def __len__(self) -> int:
        return len(self._scopes)

    def add(self, name: str, scope: Scope) -> str:
        """Make a key, keep its hash, and return it: it is not seen again."""
        rows = json.loads(self.path.read_text("utf-8")) if self.path.exists() else []
        if any(row["name"] == name for row in rows):
            raise UsageError(f"{self.path} has a key named {name!r}. Choose another name, or delete its line.")
        key = secrets.token_urlsafe(32)
        rows.append({"name": name, "scope": scope, "hash": _hash(key), "made": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path, lambda path: path.write_text(text, "utf-8"))
        self.path.chmod(0o600)
        self._scopes[rows[-1]["hash"]] = scope
        return key

    def scope(self, key: str) -> Scope | None:
        """What the holder of a key may do; None for a key that is none of these."""
        given = _hash(key)
        return next((scope for held, scope in self._scopes.items() if hmac.compare_digest(held, given)), None)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
