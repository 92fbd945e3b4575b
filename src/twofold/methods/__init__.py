"""Every method by its name. To add one: a file here, a line below, a page in docs/methods.

METHODS are those that an encoder and a source of items are enough for. `Interleaved` stands beside them: it takes a
reader of pictures and texts, and its batches are rows of packed documents.
"""

from twofold.methods.barlow import BarlowTwins
from twofold.methods.base import Method, Out
from twofold.methods.byol import BYOL
from twofold.methods.clip import CLIP
from twofold.methods.coca import CoCa
from twofold.methods.dcl import DCL
from twofold.methods.ijepa import IJEPA
from twofold.methods.interleaved import Interleaved
from twofold.methods.lejepa import LeJEPA
from twofold.methods.mae import MAE
from twofold.methods.moco import MoCo
from twofold.methods.mocov3 import MoCoV3
from twofold.methods.siglip import SigLIP
from twofold.methods.simclr import SimCLR
from twofold.methods.simsiam import SimSiam
from twofold.methods.supcon import SupCon
from twofold.methods.triplet import Triplet
from twofold.methods.vicreg import VICReg
from twofold.methods.vjepa import VJEPA
from twofold.methods.vse import VSE

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "dcl": DCL,
    "supcon": SupCon,
    "moco": MoCo,
    "mocov3": MoCoV3,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "lejepa": LeJEPA,
    "mae": MAE,
    "ijepa": IJEPA,
    "vjepa": VJEPA,
    "triplet": Triplet,
    "clip": CLIP,
    "siglip": SigLIP,
    "coca": CoCa,
    "vse": VSE,
}

__all__ = [
    "BYOL",
    "CLIP",
    "DCL",
    "IJEPA",
    "MAE",
    "METHODS",
    "VJEPA",
    "VSE",
    "BarlowTwins",
    "CoCa",
    "Interleaved",
    "LeJEPA",
    "Method",
    "MoCo",
    "MoCoV3",
    "Out",
    "SigLIP",
    "SimCLR",
    "SimSiam",
    "SupCon",
    "Triplet",
    "VICReg",
]
