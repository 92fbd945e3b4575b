"""What users ship and load: trained towers with all that belongs to them, as a folder of safetensors and JSON.

    bundle.json           what each tower is, its fingerprint, and whatever is worth telling about it (`meta`)
    image.safetensors     the weights of a tower, one file a modality
    image.head.safetensors  those of the head it was trained with; nothing but measuring behind it needs them
    text/                 the small files of a tower: tokenizer, configuration

Loading needs no network and runs no code from the folder. A fingerprint stands for all that decides an embedding; it is
computed again from what was read, so a damaged or edited bundle does not load.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twofold import __version__, runtime
from twofold.data.atomic import sync_folder, write_atomically
from twofold.data.sources import AUDIO_SUFFIXES, KINDS, MAY_MOVE, VIDEO_SUFFIXES, Kind
from twofold.data.video import Sheet
from twofold.errors import BundleError, UsageError, unknown
from twofold.models import heads
from twofold.models.encoders import Encoder, device_of, encoder, fingerprint, inference, moved, read_encoder
from twofold.progress import Line

FORMAT = 2  # 1 had no kinds: a tower's name, image or text, was its kind
NAME = re.compile(r"\w[\w -]*")  # of a tower, and so of its files


class Tower(nn.Module):
    """An encoder, and the head that brings its features into the shared space; without a head, the features."""

    def __init__(self, encoder: Encoder, head: nn.Module | None = None):
        super().__init__()
        device = device_of(encoder)
        self.encoder = encoder
        self.head = nn.Identity() if head is None else head.to(device)
        with inference(self.head):
            self.dim: int = self.head(torch.zeros(1, encoder.dim, device=device)).shape[1]

    @property
    def kind(self) -> Kind:
        return self.encoder.kind

    @property
    def spec(self) -> dict[str, Any]:
        return {"encoder": self.encoder.spec, "head": heads.describe(self.head)}

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.encoder.files

    def forward(self, x: Any) -> Float[Tensor, "b dim"]:
        return self.head(self.encoder(x))

    def fingerprint(self) -> str:
        """Of all that decides an embedding. Without a head it is the encoder's own: their vectors are the same."""
        return fingerprint(self.encoder if isinstance(self.head, nn.Identity) else self)


class _Card:
    """Where sentence-transformers' evaluators leave their figures, which they also return; a bundle keeps none."""

    def set_evaluation_metrics(self, *_: Any) -> None:
        pass


class Bundle:
    """Towers by modality ("image", "text", "speech", …) into one space, and `meta`: what is worth telling, as JSON.

    A modality is the name of a column, and the tower's `kind` what such a column holds. A modality that is called like
    a kind is of that kind.

    `heads` are what a method put on the towers for training only. They are kept for measuring behind them, as towers of
    their own that share their encoder, and have no part in embedding or in the fingerprint.
    """

    def __init__(
        self,
        towers: Mapping[str, Any],
        meta: Mapping[str, Any] | None = None,
        *,
        heads: Mapping[str, nn.Module] = {},
    ):
        self.towers = {
            name: tower if isinstance(tower, Tower) else Tower(tower) for name, tower in sorted(towers.items())
        }
        self.meta = dict(meta or {})
        for name, tower in self.towers.items():
            if not NAME.fullmatch(name):
                raise UsageError(f"{name!r} cannot name a tower: letters, digits, '_', '-' and spaces can.")
            if name in KINDS and tower.kind != name:
                raise UsageError(f"A bundle has no place for a {type(tower.encoder).__name__} as its {name!r} tower.")
        widths = {tower.dim for tower in self.towers.values()}
        if len(widths) != 1:
            raise UsageError(f"The towers of a bundle share one space; these have {sorted(widths)} dimensions.")
        self.dim: int = widths.pop()
        self.folder: Path | None = None  # that it was loaded from
        for name in heads:
            if name not in self.towers or not isinstance(self.towers[name].head, nn.Identity):
                raise UsageError(f"A training head stands on a tower that has no head itself; {name!r} is none.")
        self.heads = {name: Tower(self.towers[name].encoder, head) for name, head in sorted(heads.items())}

    @property
    def fingerprint(self) -> str:
        """128 bits in hex over all that decides an embedding. It reads every weight (0.1 s for 100 MB): keep it."""
        return _joint({name: tower.fingerprint() for name, tower in self.towers.items()})

    def tower_fingerprint(self, modality: str) -> str:
        return self.tower(modality).fingerprint()

    def tower(self, modality: str) -> Tower:
        """The tower of a modality, or a UsageError that says which there are."""
        if modality not in self.towers:
            raise UsageError(f"This bundle has no {modality} tower, only {' and '.join(self.towers)}.")
        return self.towers[modality]

    def encode(
        self,
        items: Any,
        *,
        modality: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool | None = False,
        normalize_embeddings: bool = True,
        convert_to_tensor: bool = False,
        convert_to_numpy: bool = True,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        precision: str | None = "float32",
    ) -> Any:
        """Unit vectors of texts (str), pictures (Path, bytes, PIL image or array [h, w, c]) or other items.

        A list gives a matrix [n, d], one item its vector [d]; NumPy, or a tensor with `convert_to_tensor`. Names and
        defaults are those of sentence-transformers, so that what takes its models takes a bundle, but for
        `normalize_embeddings`, which is on. `prompt` is put before each text; `truncate_dim` keeps the first numbers.

        `modality` names the tower; without it, texts go to the one that reads, files of sounds to the one that hears,
        files, folders and arrays [t, h, w, c] of frames to the one that watches, and all else to the one that sees. An
        item that cannot be decoded raises its DecodeError. `measure.embed` is for data sets: it keeps what it made.
        """
        if prompt_name is not None:
            raise UsageError(f"A bundle keeps no prompts, so there is none named {prompt_name!r}; give prompt=….")
        if precision not in (None, "float32"):
            raise unknown("precision", precision, ["float32"])
        one = not isinstance(items, list | tuple) and not (isinstance(items, np.ndarray) and items.dtype.kind in "UO")
        listed = [items] if one else [str(item) if isinstance(item, np.str_) else item for item in items]
        if len({isinstance(item, str) for item in listed}) > 1:
            raise UsageError("Texts and pictures came in one list; encode them apart. A file is a Path, not a str.")
        if prompt and listed and isinstance(listed[0], str):
            listed = [prompt + text for text in listed]
        z = self._encoded(listed, modality, batch_size, quiet=not show_progress_bar)[:, :truncate_dim]
        if normalize_embeddings:
            z = nn.functional.normalize(z, dim=1)
        z = z[0] if one else z
        return z if convert_to_tensor or not convert_to_numpy else z.cpu().numpy()

    encode_query = encode_document = encode  # for both sides of a search alike
    similarity_fn_name = "cosine"
    model_card_data = _Card()

    @staticmethod
    def similarity(a: Any, b: Any) -> Float[Tensor, "n m"]:
        """Cosines of each row of `a` with each of `b`, as sentence-transformers' models have it."""
        a, b = (nn.functional.normalize(torch.atleast_2d(torch.as_tensor(each)), dim=1) for each in (a, b))
        return a @ b.T

    def _encoded(self, items: list, modality: str | None, batch: int, *, quiet: bool) -> Float[Tensor, "n d"]:
        if not items:
            return torch.zeros(0, self.dim)
        tower = self.tower(modality or self._modality_of(items[0]))
        device = device_of(tower)
        parts = []
        with Line("encode", unit="items", quiet=quiet) as line:
            for start in range(0, len(items), batch):
                some = items[start : start + batch]
                with inference(tower):
                    parts.append(tower(moved(tower.encoder.inputs(some), device)).float())
                line.update(start + len(some), len(items))
        return torch.cat(parts)

    def _modality_of(self, item: Any) -> str:
        """The tower for an item of which nothing else is said: the one of its kind."""
        suffix = item.suffix.lower() if isinstance(item, Path) else ""
        moves = isinstance(item, Sheet) or suffix in VIDEO_SUFFIXES or (isinstance(item, np.ndarray) and item.ndim == 4)
        if suffix in MAY_MOVE or (isinstance(item, Path) and item.is_dir()):
            moves = any(tower.kind == "video" for tower in self.towers.values())
        kind = "text" if isinstance(item, str) else "video" if moves else "image"
        kind = "audio" if kind == "image" and suffix in AUDIO_SUFFIXES else kind
        fit = [name for name, tower in self.towers.items() if tower.kind == kind]
        if kind in fit or not fit:
            return kind
        if len(fit) > 1:
            raise UsageError(f"This bundle has several towers for {kind}: say modality={' or modality='.join(fit)}.")
        return fit[0]

    def save(self, folder: Path | str) -> None:
        """Write the bundle whole or not at all. A bundle that is there is replaced; any other folder is left alone."""
        folder = Path(folder)
        fresh, old = _beside(folder, "new"), _beside(folder, "old")
        if old.exists() and not folder.exists():  # a save was killed between its two renames
            old.rename(folder)
        if folder.exists() and not _replaceable(folder):
            raise BundleError(f"{folder} exists and is no bundle, so it is left as it is. Choose another place.")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        try:
            self._write(fresh)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path) -> None:
        described: dict[str, Any] = {}
        for name, tower in self.towers.items():
            _write_weights(folder / f"{name}.safetensors", tower)
            for file, content in tower.files.items():
                write_atomically(folder / name / file, partial(Path.write_bytes, data=content))
            described[name] = {"kind": tower.kind, **tower.spec, "dim": tower.dim, "fingerprint": tower.fingerprint()}
        for name, tower in self.heads.items():
            _write_weights(folder / f"{name}.head.safetensors", tower.head)
        record = {
            "format": FORMAT,
            "twofold": __version__,
            "fingerprint": _joint({name: about["fingerprint"] for name, about in described.items()}),
            "towers": described,
            "heads": {
                name: {"head": tower.spec["head"], "fingerprint": tower.fingerprint()}
                for name, tower in self.heads.items()
            },
            "meta": self.meta,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / "bundle.json", lambda path: path.write_text(text, "utf-8"))

    @classmethod
    def of(cls, name: Path | str, *, heads: bool = False) -> "Bundle":
        """What commands take as a model: the folder of a bundle or run, else an encoder of pictures by its name."""
        if Path(name).exists() or (":" not in str(name) and os.sep in str(name)):
            return cls.load(name, heads=heads)
        with torch.random.fork_rng():
            torch.manual_seed(runtime.seed_of("untrained"))  # a name may ask for weights that are drawn
            try:
                return cls({"image": encoder(str(name), "image").to(runtime.device())})
            except UsageError as error:
                if ":" in str(name):
                    raise
                raise BundleError(f"{name} is no folder here of a bundle or run. {error}") from error

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str | None = None, heads: bool = False) -> "Bundle":
        """Read a bundle's folder, or that of a run with one in `bundle/`, onto the best device, ready to embed.

        The training heads, which may be larger than their towers, stay on the disk unless `heads` asks for them.
        BundleError names the file that is missing, damaged, or not what was saved.
        """
        given = Path(folder)
        places = [place for whole in (given, given / "bundle") for place in (whole, _beside(whole, "old"))]
        found = next((place for place in places if (place / "bundle.json").is_file()), None)
        if found is None:
            raise BundleError(f"{given} holds no bundle.json. Give the folder of a bundle, or of a run that finished.")
        path = found / "bundle.json"
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["format"] > FORMAT:
                raise BundleError(f"{path} was written by twofold {record['twofold']}. Update twofold to read it.")
            towers = {name: _read_tower(found, name, about) for name, about in record["towers"].items()}
            bundle = cls(towers, record["meta"])
            bundle.folder = given
            if heads:
                kept = record.get("heads", {})
                bundle.heads = {name: _read_head(found, name, towers[name], about) for name, about in kept.items()}
            prints = {name: about["fingerprint"] for name, about in record["towers"].items()}
            if _joint(prints) != record["fingerprint"]:
                raise ValueError("its fingerprints do not agree")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, UsageError) as error:
            raise BundleError(f"{path} is damaged ({type(error).__name__}: {error}). Copy the bundle again.") from error
        for tower in (*bundle.towers.values(), *bundle.heads.values()):
            tower.eval().requires_grad_(False).to(device or runtime.device())
        return bundle


def kept_meta(folder: Path | str) -> dict[str, Any] | None:
    """What the bundle in `folder` tells about itself, without loading it; None where there is none to read."""
    try:
        return json.loads((Path(folder) / "bundle.json").read_text("utf-8"))["meta"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def annotate(folder: Path | str, name: str, key: str, value: Any) -> Path:
    """Put `value` at meta[name][key] of a bundle on disk, or of a run's; weights and fingerprint stay.

    Returns the bundle's folder.
    """
    given = Path(folder)
    found = next((place for place in (given, given / "bundle") if (place / "bundle.json").is_file()), None)
    if found is None:
        raise BundleError(f"{given} holds no bundle.json. Give the folder of a bundle, or of a run that finished.")
    path = found / "bundle.json"
    try:
        record = json.loads(path.read_text("utf-8"))
        record["meta"].setdefault(name, {})[key] = value
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged ({type(error).__name__}: {error}). Copy the bundle again.") from error
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda fresh: fresh.write_text(text, "utf-8"))
    return found


def _read_tower(folder: Path, name: str, about: Mapping[str, Any]) -> Tower:
    with torch.random.fork_rng(devices=[]):  # layers draw weights that the saved ones replace
        if not NAME.fullmatch(name):
            raise UsageError(f"there is no tower {name!r}")
        encoder = read_encoder(about.get("kind", name), about["encoder"], folder / name)
        tower = Tower(encoder, heads.build(about["head"]))
    path = folder / f"{name}.safetensors"
    _read_weights(path, tower)
    if tower.fingerprint() != about["fingerprint"]:
        raise BundleError(
            f"{path}, or what belongs to it in {folder / name} and bundle.json, is not what was saved: its fingerprint "
            f"is {tower.fingerprint()} instead of {about['fingerprint']}. Copy the bundle again."
        )
    return tower


def _read_head(folder: Path, name: str, tower: Tower, about: Mapping[str, Any]) -> Tower:
    with torch.random.fork_rng(devices=[]):
        headed = Tower(tower.encoder, heads.build(about["head"]))
    path = folder / f"{name}.head.safetensors"
    _read_weights(path, headed.head)
    if headed.fingerprint() != about["fingerprint"]:
        raise BundleError(f"{path}, or what bundle.json says of it, is not what was saved. Copy the bundle again.")
    return headed


def _write_weights(path: Path, module: nn.Module) -> None:
    weights = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in module.state_dict().items()
    }
    write_atomically(path, partial(save_file, weights))


def _read_weights(path: Path, module: nn.Module) -> None:
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise BundleError(f"{path} is missing. Copy the bundle again, all of its files.") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} is damaged ({error}). Copy the bundle again.") from error


def _joint(fingerprints: Mapping[str, str]) -> str:
    return hashlib.blake2b(json.dumps(fingerprints, sort_keys=True).encode(), digest_size=16).hexdigest()


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "bundle.json").is_file() or not any(folder.iterdir()))
