"""What training minimises: pure functions of tensors that know no device, process or log."""

from twofold.objectives.pairs import (
    clip,
    clip_chance,
    info_nce,
    info_nce_chance,
    nt_xent,
    nt_xent_chance,
    siglip,
    siglip_chance,
)

__all__ = [
    "clip",
    "clip_chance",
    "info_nce",
    "info_nce_chance",
    "nt_xent",
    "nt_xent_chance",
    "siglip",
    "siglip_chance",
]
