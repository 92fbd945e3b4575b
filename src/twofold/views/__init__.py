"""Views: what the encoder shall not care about, declared and drawn in batches."""

from twofold.views.policy import OPERATIONS, Policy
from twofold.views.presets import (
    BYOL,
    DINO,
    IJEPA,
    LEJEPA,
    MAE,
    MOCO_V2,
    MOCO_V3,
    NONE,
    PRESETS,
    REASONS,
    SIMCLR,
    SIMCLR_CIFAR,
    VICREG,
    policies,
)

__all__ = [
    "BYOL",
    "DINO",
    "IJEPA",
    "LEJEPA",
    "MAE",
    "MOCO_V2",
    "MOCO_V3",
    "NONE",
    "OPERATIONS",
    "PRESETS",
    "REASONS",
    "SIMCLR",
    "SIMCLR_CIFAR",
    "VICREG",
    "Policy",
    "policies",
]
