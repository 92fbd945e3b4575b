"""The data that comes with twofold: every emoji of OpenMoji, drawn, named and tagged."""

from pathlib import Path

import numpy as np

from twofold import runtime
from twofold.data.sources import Source

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
