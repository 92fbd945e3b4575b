"""How near a caption is to what several people said of the same picture."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from twofold.errors import DataError

LENGTHS = range(1, 5)  # words of an n-gram
SIGMA = 6.0  # words that a caption may be longer or shorter before it costs 40 %

Grams = Counter[tuple[str, ...]]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0..10: how far it shares the references' n-grams, rare ones counting most.

    Cosine of n-gram counts weighted by log(pictures / pictures whose references have the n-gram), of which the caption
    is credited no more than a reference has, times exp(−(difference in words)² / 2·6²), averaged over references and
    n = 1..4, times 10 (arXiv 1411.5726, section 4 and 8; the official code multiplies by 10 and reports the mean over
    pictures, often ×100). How rare an n-gram is, these references say: with one picture alone everything is 0.

    Words are lower-case runs of letters, digits and apostrophes; the official code takes the Stanford tokenizer's,
    without punctuation, which splits a few more ("dog's" into "dog" and "'s").
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise DataError(
            f"CIDEr compares each caption with one reference or more; got {len(captions)} captions and "
            f"{len(references)} sets of references, {sum(not own for own in references)} of them empty."
        )
    known = [[_grams(text) for text in own] for own in references]
    pictures = Counter(gram for own in known for gram in set().union(*own))
    weight = {gram: math.log(len(known) / count) for gram, count in pictures.items()}
    unseen = math.log(len(known))
    return [_one(_grams(text), own, weight, unseen) for text, own in zip(captions, known, strict=True)]


def _one(said: Grams, own: Sequence[Grams], weight: dict[tuple[str, ...], float], unseen: float) -> float:
    total = 0.0
    for reference in own:
        apart = _words(said) - _words(reference)
        for n in LENGTHS:
            a, b = ({g: c * weight.get(g, unseen) for g, c in of.items() if len(g) == n} for of in (said, reference))
            shared = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
            length = math.hypot(*a.values()) * math.hypot(*b.values())
            total += shared / length * math.exp(-(apart**2) / (2 * SIGMA**2)) if length else 0.0
    return 10 * total / (len(own) * len(LENGTHS))


def _words(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _grams(text: str) -> Grams:
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())
    return Counter(tuple(words[at : at + n]) for n in LENGTHS for at in range(len(words) - n + 1))
