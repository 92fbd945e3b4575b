"""The shipped sample: complete, attributed, and split so that no variant of an emoji crosses."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

import twofold.data.samples as samples
from twofold.data.decode import decode
from twofold.data.samples import ATTRIBUTION, openmoji
from twofold.data.sources import open_source


@pytest.fixture(scope="module")
def source():
    return openmoji()


def families_of(source, *names):
    place = {name: index for index, name in enumerate(source.meta["name"])}
    return {source.meta["family"][place[name]] for name in names}


def test_it_is_complete_and_opens_by_its_name(source):
    assert len(source) == len(open_source("openmoji")) == 4495
    assert decode(source.images[0]).shape == (96, 96, 3)
    assert source.texts[0][:2] == ["grinning face", "cheerful"]
    assert source.classes[source.labels[0]] == source.meta["group"][0] == "smileys-emotion"
    assert all(len(set(texts)) == len(texts) > 0 for texts in source.texts)


def test_it_is_attributed_where_it_lies():
    notice = (Path(samples.__file__).with_name("openmoji") / "ATTRIBUTION.txt").read_text("utf-8")
    for text in (notice, ATTRIBUTION):
        assert "CC BY-SA 4.0" in text and "All emojis designed by OpenMoji" in text


def test_a_skin_tone_variant_is_of_the_family_of_its_base(source):
    family = dict(zip(source.ids, source.meta["family"], strict=True))
    variants = [(code, base) for code, base in zip(source.ids, source.meta["skintone_of"], strict=True) if base]
    assert len(variants) == 2030
    assert all(family[code] == family[base] for code, base in variants)


@pytest.mark.parametrize(
    "names",
    [
        ("person running", "man running", "woman running: dark skin tone", "person running: facing right"),
        ("man: red hair", "woman: bald", "person: curly hair", "woman: blond hair", "man: beard", "person"),
        ("astronaut", "woman astronaut", "man astronaut: medium skin tone"),
        ("merman", "mermaid", "merperson"),
        ("prince", "princess", "person with crown"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("woman dancing", "man dancing"),
        ("old man", "old woman", "older person"),
        ("boy", "girl", "child"),
        ("kiss", "kiss: woman, woman", "kiss: woman, man, light skin tone, dark skin tone"),
        ("couple with heart", "couple with heart: man, man"),
        ("women holding hands", "men holding hands", "people holding hands"),
        ("family", "family: man, woman, girl, boy", "family: adult, child"),
        ("female doctor", "male doctor"),
        ("barista", "woman barista", "man barista"),
        ("handshake", "handshake: light skin tone, dark skin tone"),
        ("flag: France", "flag: St. Martin"),
    ],
)
def test_variants_of_one_emoji_are_one_family(source, names):
    assert len(families_of(source, *names)) == 1


@pytest.mark.parametrize(
    "names",
    [
        ("person", "child", "older person", "astronaut", "person running"),
        ("person running", "person walking", "person surfing"),
        ("red heart", "blue heart"),
        ("female sign", "male sign", "right arrow"),
        ("red hair", "curly hair", "light skin tone", "dark skin tone"),
        ("thumbs up", "thumbs down"),
        ("kiss", "couple with heart", "family", "people holding hands"),
    ],
)
def test_different_emoji_are_different_families(source, names):
    assert len(families_of(source, *names)) == len(names)


def test_no_drawing_name_or_family_lies_on_two_sides_of_the_split(source):
    sides = defaultdict(set)
    for image, name, family, split in zip(
        source.images, source.meta["name"], source.meta["family"], source.splits, strict=True
    ):
        for what in (image, name.lower(), family):
            sides[what].add(split)
    assert all(len(splits) == 1 for splits in sides.values())


def test_the_split_holds_eight_one_one_tenths_of_the_families(source):
    count = Counter(dict(zip(source.meta["family"], source.splits, strict=True)).values())
    shares = {split: count[split] / sum(count.values()) for split in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.02)
