"""The policies of the papers, by name. A variant is `dataclasses.replace(PRESET, …)`."""

from dataclasses import replace

from twofold.views.policy import Policy

SIMCLR = Policy()
"""SimCLR on ImageNet: jitter of strength 1 (arXiv 2002.05709, appendix A)."""

SIMCLR_CIFAR = Policy(size=32, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)
"""SimCLR on CIFAR-10: jitter of strength ½, no blur (appendix B.9)."""

MOCO_V2 = Policy(area=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
"""MoCo v2 (arXiv 2003.04297 and its official code)."""

BYOL = (
    Policy(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0),
    Policy(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarize=0.2),
)
"""BYOL and Barlow Twins: the first view is always blurred; the second seldom, and at times solarized
(arXiv 2006.07733, appendix B)."""

MOCO_V3 = (replace(BYOL[0], area=(0.2, 1.0)), replace(BYOL[1], area=(0.2, 1.0)))
"""MoCo v3 of a ResNet: BYOL's, from larger crops (its official code, `--crop-min=.2`; transformers take BYOL's)."""

VICREG = replace(BYOL[0], blur=0.5, solarize=0.1)
"""VICReg: BYOL's, the same for both views (arXiv 2105.04906, appendix C.1; its official code has BYOL's pair)."""

_LEJEPA = replace(BYOL[0], blur=0.5, solarize=0.2)
LEJEPA = (replace(_LEJEPA, area=(0.3, 1.0)), replace(_LEJEPA, area=(0.05, 0.3), size=98))
"""LeJEPA's global and local view; the README of its official code recommends two of the one and six of the other."""

NONE = Policy(area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=0.0)
"""Nothing random: the largest central square, resized."""

PRESETS: dict[str, tuple[Policy, ...]] = {  # one policy a view
    "simclr": (SIMCLR, SIMCLR),
    "simclr-cifar": (SIMCLR_CIFAR, SIMCLR_CIFAR),
    "moco-v2": (MOCO_V2, MOCO_V2),
    "moco-v3": MOCO_V3,
    "byol": BYOL,
    "vicreg": (VICREG, VICREG),
    "lejepa": (LEJEPA[0], LEJEPA[0]),
    "none": (NONE, NONE),
}
