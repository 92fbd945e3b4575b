"""Every method by its name. To add one: a file here, a line below, a page in docs/methods."""

from twofold.methods.base import Method, Out
from twofold.methods.clip import CLIP
from twofold.methods.siglip import SigLIP
from twofold.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "clip": CLIP,
    "siglip": SigLIP,
}

__all__ = ["CLIP", "METHODS", "Method", "Out", "SigLIP", "SimCLR"]
