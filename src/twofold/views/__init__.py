"""Views: what the encoder shall not care about, declared and drawn in batches."""

from twofold.views.policy import Policy
from twofold.views.presets import BYOL, LEJEPA, MOCO_V2, MOCO_V3, NONE, PRESETS, SIMCLR, SIMCLR_CIFAR, VICREG

__all__ = ["BYOL", "LEJEPA", "MOCO_V2", "MOCO_V3", "NONE", "PRESETS", "SIMCLR", "SIMCLR_CIFAR", "VICREG", "Policy"]
