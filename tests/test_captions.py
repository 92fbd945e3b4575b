"""CIDEr-D against a number worked by hand, its limits, and a slow reading of the paper."""

import math
from itertools import pairwise

import pytest

from twofold.errors import DataError
from twofold.measure.captions import cider

REFERENCES = [
    ["a red dog runs over grass", "the dog runs"],
    ["two men play chess in the park", "men sit at a table"],
    ["a boat at dusk", "red boat on a lake at dusk"],
]


def test_one_word_of_two_pictures_worked_by_hand():
    """'red dog' beside 'dog': each word is of one picture of two, so all weigh log 2, which cancels.

    n = 1: (1·1) / (√2 · 1) = .7071; n = 2: the reference has no pair, so 0, as for 3 and 4. One word more than the
    reference: exp(−1/72). A quarter of the product, times 10.
    """
    found = cider(["red dog", "cat"], [["dog"], ["cat"]])
    assert found[0] == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))
    assert found[1] == pytest.approx(10 / 4)


def test_a_reference_itself_scores_ten_where_it_is_the_only_one_and_foreign_words_nothing():
    alone = [own[:1] for own in REFERENCES]
    assert cider([own[0] for own in alone], alone) == pytest.approx([10, 10, 10])
    assert cider(["nobody", "", "snow falls"], REFERENCES) == [0, 0, 0]
    # Case and punctuation do not count.
    assert cider(["a Red Dog, runs over grass!"] * 3, alone)[0] == pytest.approx(10)


def test_saying_a_word_again_and_again_gains_nothing():
    once, often = (cider([text, "x", "x"], REFERENCES)[0] for text in ("red dog", "red dog dog dog dog"))
    assert often < once


def test_what_every_picture_has_weighs_nothing():
    """'a' is said of all three pictures, so it is worth log(3/3)."""
    assert cider(["a", "a", "a"], REFERENCES) == [0, 0, 0]


def test_it_is_the_papers_formula():
    captions = ["a red dog runs in the park", "two men at a table in the park", "the boat on the red red lake"]

    def vector(text: str, n: int) -> dict[str, float]:
        words = text.split()
        grams = [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]
        return {
            gram: grams.count(gram)
            * math.log(3 / max(1, sum(any(f" {gram} " in f" {text} " for text in own) for own in REFERENCES)))
            for gram in grams
        }

    for caption, own, found in zip(captions, REFERENCES, cider(captions, REFERENCES), strict=True):
        expected = 0.0
        for n in (1, 2, 3, 4):
            for reference in own:
                c, s = vector(caption, n), vector(reference, n)
                dot = sum(min(c[gram], s.get(gram, 0)) * s.get(gram, 0) for gram in c)
                lengths = math.sqrt(sum(v * v for v in c.values()) * sum(v * v for v in s.values()))
                apart = len(caption.split()) - len(reference.split())
                expected += 10 / len(own) * math.exp(-(apart**2) / 72) * (dot / lengths if lengths else 0) / 4
        assert found == pytest.approx(expected)
        assert found > 0


def test_longer_or_shorter_captions_lose_more_the_farther_they_are():
    found = [cider([" ".join(["red dog", *["x"] * more]), "x"], [["red dog"], ["y"]])[0] for more in range(0, 9, 2)]
    assert all(shorter > longer for shorter, longer in pairwise(found))


def test_what_has_no_reference_is_refused():
    with pytest.raises(DataError, match="1 of them empty"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="2 captions and 1 sets"):
        cider(["a", "b"], [["a"]])
