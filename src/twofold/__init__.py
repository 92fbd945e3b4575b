"""Two views of one thing, folded into one space: train representations by comparing views, and search with them."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public names and where they live; each is imported when it is first used, so that `import twofold` costs nothing.
_PUBLIC = {
    "BYOL": "methods",
    "BarlowTwins": "methods",
    "Batches": "data.loader",
    "Bundle": "models.bundle",
    "CLIP": "methods",
    "DCL": "methods",
    "Head": "models.heads",
    "IJEPA": "methods",
    "Index": "retrieve.index",
    "LeJEPA": "methods",
    "MAE": "methods",
    "METHODS": "methods",
    "MoCo": "methods",
    "MoCoV3": "methods",
    "Optimizer": "train.optim",
    "PRESETS": "views",
    "Policy": "views",
    "Recipe": "train.align",
    "Retriever": "retrieve.retriever",
    "SigLIP": "methods",
    "SimCLR": "methods",
    "SimSiam": "methods",
    "Source": "data.sources",
    "SupCon": "methods",
    "Triplet": "methods",
    "VICReg": "methods",
    "VJEPA": "methods",
    "align": "train.align",
    "decoded": "data.cache",
    "embed": "measure.embed",
    "evaluate": "measure.evaluate",
    "fit": "train.loop",
    "image_encoder": "models.encoders",
    "open_source": "data.sources",
    "text_encoder": "models.encoders",
}

__all__ = [
    "BYOL",
    "CLIP",
    "DCL",
    "IJEPA",
    "MAE",
    "METHODS",
    "PRESETS",
    "VJEPA",
    "BarlowTwins",
    "Batches",
    "Bundle",
    "Head",
    "Index",
    "LeJEPA",
    "MoCo",
    "MoCoV3",
    "Optimizer",
    "Policy",
    "Recipe",
    "Retriever",
    "SigLIP",
    "SimCLR",
    "SimSiam",
    "Source",
    "SupCon",
    "Triplet",
    "VICReg",
    "align",
    "decoded",
    "embed",
    "evaluate",
    "fit",
    "image_encoder",
    "open_source",
    "text_encoder",
]

if TYPE_CHECKING:
    from twofold.data.cache import decoded
    from twofold.data.loader import Batches
    from twofold.data.sources import Source, open_source
    from twofold.measure.embed import embed
    from twofold.measure.evaluate import evaluate
    from twofold.methods import (
        BYOL,
        CLIP,
        DCL,
        IJEPA,
        MAE,
        METHODS,
        VJEPA,
        BarlowTwins,
        LeJEPA,
        MoCo,
        MoCoV3,
        SigLIP,
        SimCLR,
        SimSiam,
        SupCon,
        Triplet,
        VICReg,
    )
    from twofold.models.bundle import Bundle
    from twofold.models.encoders import image_encoder, text_encoder
    from twofold.models.heads import Head
    from twofold.retrieve.index import Index
    from twofold.retrieve.retriever import Retriever
    from twofold.train.align import Recipe, align
    from twofold.train.loop import fit
    from twofold.train.optim import Optimizer
    from twofold.views import PRESETS, Policy


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'twofold' has no attribute {name!r}")
    return getattr(importlib.import_module(f"twofold.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
