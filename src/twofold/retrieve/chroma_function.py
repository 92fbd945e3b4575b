"""A bundle as Chroma's embedding function: `client.create_collection(…, embedding_function=BundleFunction(folder))`."""

from pathlib import Path
from typing import Any

import numpy as np
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings, Images, Space
from chromadb.utils.embedding_functions import register_embedding_function

from twofold.errors import FingerprintMismatch
from twofold.models.bundle import Bundle


@register_embedding_function
class BundleFunction(EmbeddingFunction[Documents | Images]):
    """Embeds documents (texts) and images (arrays [h, w, c]) with the bundle in `folder`.

    Chroma keeps the folder's name and the fingerprint with the collection. Opened again with another model in that
    folder, it is refused (FingerprintMismatch): a score between the two would mean nothing.
    """

    def __init__(self, folder: Path | str, fingerprint: str | None = None):
        self.folder = str(folder)
        self.bundle = Bundle.load(folder)
        if fingerprint not in (None, self.bundle.fingerprint):
            raise FingerprintMismatch(
                f"{folder} holds the model {self.bundle.fingerprint}; the collection was filled by {fingerprint}. Put "
                "that model back, or embed the items into a new collection."
            )

    def __call__(self, input: Documents | Images) -> Embeddings:
        items: list[Any] = [item if isinstance(item, str) else np.asarray(item) for item in input]
        return list(self.bundle.encode(items))

    @staticmethod
    def name() -> str:
        return "twofold"

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "BundleFunction":
        return BundleFunction(config["folder"], config["fingerprint"])

    def get_config(self) -> dict[str, Any]:
        return {"folder": self.folder, "fingerprint": self.bundle.fingerprint}

    def default_space(self) -> Space:
        return "cosine"

    def supported_spaces(self) -> list[Space]:
        return ["cosine", "l2", "ip"]

    def validate_config_update(self, old_config: dict[str, Any], new_config: dict[str, Any]) -> None:
        if old_config["fingerprint"] != new_config["fingerprint"]:
            raise FingerprintMismatch("A collection keeps the model that filled it.")
