"""Policies by name: for kinds of pictures, and the papers' own, with reasons. A variant is `replace(PRESET, …)`."""

from dataclasses import replace
from pathlib import Path

from twofold.errors import unknown
from twofold.views import files
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
(arXiv 2006.07733, appendix B; arXiv 2103.03230, section 2.2)."""

MOCO_V3 = (replace(BYOL[0], area=(0.2, 1.0)), replace(BYOL[1], area=(0.2, 1.0)))
"""MoCo v3 of a ResNet: BYOL's, from larger crops (its official code, `--crop-min=.2`; transformers take BYOL's)."""

VICREG = replace(BYOL[0], blur=0.5, solarize=0.1)
"""VICReg: BYOL's, the same for both views (arXiv 2105.04906, appendix C.1; its official code has BYOL's pair)."""

_LEJEPA = replace(BYOL[0], blur=0.5, solarize=0.2)
LEJEPA = (replace(_LEJEPA, area=(0.3, 1.0)), replace(_LEJEPA, area=(0.05, 0.3), size=98))
"""LeJEPA's global and local view; the README of its official code recommends two of the one and six of the other."""

DINO = (
    replace(BYOL[0], area=(0.4, 1.0)),
    replace(BYOL[1], area=(0.4, 1.0)),
    *(replace(BYOL[0], area=(0.05, 0.4), size=96, blur=0.5),) * 8,
)
"""DINO: BYOL's pair of global views and eight small local ones (arXiv 2104.14294, appendix E, and the defaults of its
official code, which resizes bicubically)."""

NONE = SIMCLR.only()
"""Nothing random: the largest central square, resized."""

MAE = replace(NONE, area=(0.2, 1.0), aspect=(3 / 4, 4 / 3), flip=0.5)
"""MAE: crop and flip, for masking makes the task (arXiv 2111.06377, section 4; its code resizes bicubically)."""

IJEPA = replace(NONE, area=(0.3, 1.0), aspect=(3 / 4, 4 / 3))
"""I-JEPA: a crop and nothing else (arXiv 2301.08243, and the configurations of its official code)."""

# solo-learn's recipes for CIFAR-10. Its blur knows no window; ours of 32 pixels has three taps.
SOLO_SIMCLR = replace(SIMCLR, size=32)
SOLO_MOCO_V2 = replace(MOCO_V2, size=32, area=(0.08, 1.0))
SOLO_BYOL = (
    replace(BYOL[0], size=32, blur=0.0),
    replace(BYOL[1], size=32, blur=0.0),
)

_MILD = replace(MOCO_V2, gray=0.0, blur=0.1, saturation=0.2, hue=0.02)  # what the kinds of pictures below start from
FINE_GRAINED = replace(_MILD, area=(0.4, 1.0), brightness=0.3, contrast=0.3)
PRODUCT = replace(_MILD, area=(0.5, 1.0), flip=0.0, rotation=5.0, jpeg=0.3)
SATELLITE = replace(_MILD, area=(0.3, 1.0), vflip=0.5, turns=0.75, brightness=0.3, contrast=0.3, hue=0.05, gray=0.1)
HISTOLOGY = replace(
    _MILD, area=(0.4, 1.0), vflip=0.5, turns=0.75, brightness=0.2, contrast=0.2, hue=0.04, gain=0.1, blur=0.3
)
XRAY = replace(
    _MILD.without("saturation", "hue"),
    area=(0.5, 1.0),
    aspect=(0.9, 1.1),
    flip=0.0,
    rotation=10.0,
    brightness=0.2,
    contrast=0.3,
    noise=(0.0, 0.03),
)
DOCUMENT = replace(
    _MILD.without("hue"), area=(0.5, 1.0), flip=0.0, rotation=3.0, shear=3.0, blur=0.3, noise=(0.0, 0.05), jpeg=0.5
)
EMOJI = replace(
    NONE, area=(0.6, 1.0), aspect=(0.85, 1.18), rotation=10.0, jitter=0.8, brightness=0.1, contrast=0.1, saturation=0.1
)
MULTISPECTRAL = replace(
    SATELLITE.without("saturation", "hue", "gray"), gain=0.1, offset=0.02, channel_drop=0.05, noise=(0.0, 0.02)
)

PRESETS: dict[str, tuple[Policy, ...]] = {  # one policy a view
    "natural": (MOCO_V2, MOCO_V2),
    "fine-grained": (FINE_GRAINED, FINE_GRAINED),
    "product": (PRODUCT, PRODUCT),
    "satellite": (SATELLITE, SATELLITE),
    "histology": (HISTOLOGY, HISTOLOGY),
    "xray": (XRAY, XRAY),
    "document": (DOCUMENT, DOCUMENT),
    "emoji": (EMOJI, EMOJI),
    "multispectral": (MULTISPECTRAL, MULTISPECTRAL),
    "none": (NONE, NONE),
    "simclr": (SIMCLR, SIMCLR),
    "simclr-cifar": (SIMCLR_CIFAR, SIMCLR_CIFAR),
    "moco-v2": (MOCO_V2, MOCO_V2),
    "moco-v3": MOCO_V3,
    "byol": BYOL,
    "barlow": BYOL,
    "vicreg": (VICREG, VICREG),
    "lejepa": (LEJEPA[0], LEJEPA[0]),
    "dino": DINO,
    "mae": (MAE,),
    "ijepa": (IJEPA,),
    "solo-simclr": (SOLO_SIMCLR, SOLO_SIMCLR),
    "solo-moco-v2": (SOLO_MOCO_V2, SOLO_MOCO_V2),
    "solo-byol": SOLO_BYOL,
    "solo-barlow": SOLO_BYOL,
}

REASONS: dict[str, str] = {  # what each takes to be without meaning
    "natural": (
        "A photograph of a thing stays one of that thing when it is framed, lit or mirrored otherwise, or loses its "
        "colours. Where two of your classes differ in colour alone, or in left and right, take another."
    ),
    "fine-grained": (
        "Framing, light and the side a thing is seen from say nothing, but its colours and its small parts tell it "
        "from its relatives. So crops keep most of it, hue hardly moves, and it is never gray."
    ),
    "product": (
        "Lighting, a slightly tilted camera and compression differ between two pictures of one article. Colour, print"
        " and proportions are the article, so there are no flips, no grayscale and next to no hue."
    ),
    "satellite": (
        "Nothing on the ground knows which way is up, and sun and haze shade every pass anew. Colour still tells "
        "crops from concrete, so hue moves little; scale tells a car from a ship, so crops are not small."
    ),
    "histology": (
        "A slide has no up and no left, and stain and focus differ between laboratories. Cells are told apart by size"
        " and texture, so crops stay large and each channel moves by a tenth only."
    ),
    "xray": (
        "Exposure, noise and a few degrees of posture change from one picture of a patient to the next. The heart is "
        "on the left and lungs hang downwards, so there are no flips, and there is no colour to change."
    ),
    "document": (
        "Paper, light, scanner and compression are not the text, and pages lie a little askew. Letters mirrored, "
        "cropped to pieces or blurred away are other letters or none, so all that stays mild."
    ),
    "emoji": (
        "How large and how upright a drawing sits says little. Its colours (hearts, flags, skin) and its direction "
        "(arrows, hands) are its meaning, so there are no flips, and hue is left alone."
    ),
    "multispectral": (
        "Direction, illumination, calibration of single bands and a band that is missing are the sensor's, not the "
        "ground's. Ratios between bands are what they are measured for, so they move by a tenth."
    ),
    "none": (
        "Nothing is without meaning: every view is the largest central square. For embedding, and to start one's own."
    ),
    "simclr": (
        "Any part of a photograph from a twelfth up stands for the whole, in whatever colours. Made for ImageNet, "
        "whose classes are recognised by shape and texture; the strongest jitter of all."
    ),
    "simclr-cifar": (
        "SimCLR's for pictures of 32 pixels: half the jitter, for small classes lean on colour. No blur, which would "
        "leave nothing of so few pixels."
    ),
    "moco-v2": (
        "SimCLR's at half the jitter, from larger crops. Two views overlap more often, so that position and "
        "background are forgotten less."
    ),
    "moco-v3": (
        "BYOL's pair from larger crops. As there, blur and inverted light are asymmetric: one view is soft, the other"
        " at times solarized."
    ),
    "byol": (
        "As SimCLR, with less weight on colour: hue and saturation move half as far or less. Sharpness means nothing,"
        " as one view is always blurred, and inverted light is at times the same light."
    ),
    "barlow": (
        "BYOL's pair, which the paper takes over. Sharpness and inverted light mean nothing; two views never come "
        "from the same distribution."
    ),
    "vicreg": (
        "BYOL's strengths, averaged over the two views, so that both come from one distribution. Sharpness and, one "
        "time in ten, inverted light mean nothing."
    ),
    "lejepa": (
        "BYOL's strengths, from crops of three tenths and more. Local views, where a run has them, say that a part of"
        " a twentieth stands for the whole."
    ),
    "dino": (
        "A small part predicts the whole: eight local views of 5 to 40 % go with two global ones of 40 % and more. "
        "Texture and parts gain, what only the composition says loses."
    ),
    "mae": (
        "Only where the frame lies, and left and right. The task is made by masking, and reconstruction would suffer "
        "from changed colours."
    ),
    "ijepa": (
        "Only where the frame lies. The task is to predict blocks of the same picture, and no invariance to colour or"
        " mirroring is asked for."
    ),
    "solo-simclr": (
        "SimCLR's full jitter at 32 pixels, blur with it, as solo-learn trains it on CIFAR-10. Colour means less than"
        " in SimCLR's own recipe for CIFAR."
    ),
    "solo-moco-v2": (
        "MoCo v2's jitter at 32 pixels, from crops of a twelfth and more, as solo-learn trains it on CIFAR-10. Colour"
        " keeps some of its meaning."
    ),
    "solo-byol": (
        "BYOL's jitter at 32 pixels without its blur, as solo-learn trains it on CIFAR-10. One view in five of the "
        "second is solarized."
    ),
    "solo-barlow": "The same pair as solo-learn's BYOL. Sharpness keeps its meaning; inverted light at times has none.",
}


def policies(name: str) -> tuple[Policy, ...]:
    """The policies of a preset or of a file (.toml or .json), one a view."""
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).suffix in files.SUFFIXES:
        return tuple(Policy.from_dict(view) for view in files.read(Path(name)))
    raise unknown("policy", name, PRESETS)
