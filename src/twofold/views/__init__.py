"""Views: what the encoder shall not care about, declared and drawn in batches."""

from twofold.views.policy import Policy
from twofold.views.presets import BYOL, MOCO_V2, NONE, PRESETS, SIMCLR, SIMCLR_CIFAR

__all__ = ["BYOL", "MOCO_V2", "NONE", "PRESETS", "SIMCLR", "SIMCLR_CIFAR", "Policy"]
