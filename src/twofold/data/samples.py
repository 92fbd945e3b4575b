"""The data that comes with twofold: every emoji of OpenMoji, drawn, named and tagged; and clips in which they move."""

from pathlib import Path

import numpy as np

from twofold import runtime
from twofold.data.decode import decode, fit
from twofold.data.sources import Column, Source

ATTRIBUTION = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/)"
)

# Parts of an emoji's code that make it another person, not another thing.
_JOINERS, _GENDERS, _MIRRORED = {"200D", "FE0F"}, {"2640", "2642"}, {"27A1"}
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
_VARIATION = _JOINERS | _GENDERS | _MIRRORED | _SKIN_TONES | _HAIR
# man, woman, blond, bearded → person; boy, girl → child; old man, old woman → older person
_PERSON = {
    **dict.fromkeys(("1F468", "1F469", "1F471", "1F9D4"), "1F9D1"),
    **dict.fromkeys(("1F466", "1F467"), "1F9D2"),
    **dict.fromkeys(("1F474", "1F475"), "1F9D3"),
}
# What Unicode gave separate codes: person with crown, Santa Claus, dancer, pregnant person, room sign, holding hands,
# kiss, couple with heart; then OpenMoji's own: polar explorer, nuclear worker, gardener, doctor, nurse, barista.
_KIN = {
    **dict.fromkeys(("1F934", "1F478"), "1FAC5"),
    **dict.fromkeys(("1F936", "1F9D1-1F384"), "1F385"),
    **dict.fromkeys(("1F930", "1FAC3"), "1FAC4"),
    **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1-1F91D-1F9D1"),
    "1F57A": "1F483",
    "1F6BA": "1F6B9",
    "1F9D1-2764-1F48B-1F9D1": "1F48F",
    "1F9D1-2764-1F9D1": "1F491",
    "E2CA": "E2C9",
    "E2D8": "E2D7",
    "E341": "E340",
    "E301": "E300",
    "E303": "E302",
    **dict.fromkeys(("E186", "E187"), "E185"),
}


def openmoji() -> Source:
    """4,495 emoji of 96×96 pixels, each with its name and tags as texts and its group as label; CC BY-SA 4.0.

    `meta["family"]` is shared by the variants of one emoji (skin tones, genders, hair, mirror images) and by emoji of
    the same drawing or name. A family lies on one side of the split: 80 % train, 10 % val, 10 % test.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(Path(__file__).with_name("openmoji") / "openmoji.parquet").to_pydict()
    # The table calls a base emoji its own base; here it has none.
    codes = zip(table["id"], table["skintone_of"], strict=True)
    table["skintone_of"] = [None if base == code else base for code, base in codes]
    families = _families(table)
    classes = sorted(set(table["group"]))
    texts = [
        list(dict.fromkeys([name, *(tag.strip() for tag in (tags or "").split(",") if tag.strip())]))
        for name, tags in zip(table["name"], table["tags"], strict=True)
    ]
    meta = ("emoji", "name", "tags", "group", "subgroup", "skintone_of", "author")
    return Source(
        "openmoji",
        table["id"],
        images=table["image"],
        texts=texts,
        labels=np.array([classes.index(group) for group in table["group"]], np.int64),
        classes=classes,
        splits=[_split(family) for family in families],
        meta={**{column: table[column] for column in meta}, "family": families},
    )


def _families(table: dict[str, list]) -> list[str]:
    drawn: dict[bytes, str] = {}
    named: dict[str, str] = {}
    families = []
    for code, base, image, name in zip(*(table[c] for c in ("id", "skintone_of", "image", "name")), strict=True):
        family = named.setdefault(name.lower(), drawn.get(image) or _family(base or code))
        families.append(drawn.setdefault(image, family))
    return families


def _family(code: str) -> str:
    """The code without what only varies the person: `1F469-1F3FD-200D-1F680` → `1F9D1-1F680`, the astronaut."""
    first, *rest = code.split("-")
    parts = [_PERSON.get(part, part) for part in [first, *(part for part in rest if part not in _VARIATION)]]
    if len(parts) > 1 and set(parts) <= {"1F9D1", "1F9D2"}:  # adults and children: a family
        return "1F46A"
    return _KIN.get("-".join(parts), "-".join(parts))


def _split(family: str) -> str:
    tenth = runtime.seed_of("openmoji", family) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


# -- Motion -----------------------------------------------------------------------------------------------------------

DIRECTIONS = ("east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast")


def motion(
    train: int = 2000, test: int = 500, *, frames: int = 16, size: int = 32, side: int = 16, seed: int = 0
) -> Source:
    """Clips of an emoji, `side` pixels large, that drifts over a still ground in one of eight directions.

    It goes 1 or 2 pixels a frame (`meta["speed"]`), and its label is the direction. The same emoji drift in every
    direction, those of the test set are none of the training set's, and the canvas has no edge: what leaves on one side
    comes in on the other. So a single frame says nothing, and all frames without their order may tell a line but not
    which way along it, for a clip shown backwards is as likely as it is forwards: without their order, half of all
    cases can be right at most.
    """
    emoji = openmoji()
    splits, counts = ("train", "test"), {"train": train, "test": test}
    sprites = {split: _sprites(emoji.split(split), side) for split in splits}
    ids: list[str] = []
    clips: list[np.ndarray] = []
    labels: list[int] = []
    speeds: list[int] = []
    for split in splits:
        draw = np.random.default_rng(runtime.seed_of("motion", split, seed))
        for number in range(counts[split]):
            label, speed = number % len(DIRECTIONS), int(draw.integers(1, 3))
            sprite = sprites[split][int(draw.integers(len(sprites[split])))]
            clips.append(_drifting(sprite, label, speed, frames, size, draw))
            ids.append(f"{split}/{number}")
            labels.append(label)
            speeds.append(speed)
    return Source(
        "motion",
        ids,
        labels=np.array(labels, np.int64),
        classes=DIRECTIONS,
        splits=[name.partition("/")[0] for name in ids],
        columns={"video": Column("video", clips)},
        meta={"speed": speeds},
    )


def _sprites(emoji: Source, side: int) -> list[np.ndarray]:
    """Some emoji as [side, side, 4] in 0..1: what is white around them lets the ground through."""
    assert emoji.images is not None
    made = []
    for image in emoji.images[:: max(1, len(emoji) // 200)]:
        pixels = fit(decode(image), side).astype(np.float32) / 255
        cover = (1 - pixels.min(2, keepdims=True)).clip(0, 0.5) * 2
        made.append(np.concatenate([pixels, cover], 2))
    return made


def _drifting(
    sprite: np.ndarray, direction: int, speed: int, frames: int, size: int, draw: np.random.Generator
) -> np.ndarray:
    """One clip [frames, size, size, 3] of uint8."""
    coarse = draw.random((4, 4, 3), np.float32)
    ground = fit(coarse, size) * 0.6 + 0.2
    start, angle = draw.random(2) * size, direction * np.pi / 4
    pace = speed * np.array([-np.sin(angle), np.cos(angle)])  # rows count downwards
    side = sprite.shape[0]
    clip = np.empty((frames, size, size, 3), np.uint8)
    for time in range(frames):
        down, right = np.floor(start + time * pace).astype(int)
        rows, across = (down + np.arange(side)) % size, (right + np.arange(side)) % size
        frame, at = ground.copy(), np.ix_(rows, across)
        frame[at] = frame[at] * (1 - sprite[..., 3:]) + sprite[..., :3] * sprite[..., 3:]
        clip[time] = np.round(frame * 255)
    return clip
