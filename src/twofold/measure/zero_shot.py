"""Which class a picture shows, by nothing but the classes' names: zero-shot classification (arXiv 2103.00020, §3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from twofold.errors import DataError, UsageError
from twofold.measure.metrics import Interval, Matrix, accuracy_chance, bootstrap, unit_rows
from twofold.measure.retrieval import retrieval
from twofold.models.bundle import Bundle


class ZeroShot(NamedTuple):
    """How well labels follow from names."""

    accuracy: Interval
    top5: Interval
    chance: float  # of the most frequent class, as an answer to everything
    by_class: dict[str, float]  # accuracy within each class that occurs
    templates: list[str]


def sentences(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """For each class its name in every template; `_` in names is read as a space."""
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise UsageError(
                f'A prompt template has one {{}} for the class\'s name, "a photo of a {{}}"; got {template!r}.'
            )
    return [[template.replace("{}", name.replace("_", " ").strip()) for template in templates] for name in classes]


def prototypes(bundle: Bundle, classes: Sequence[str], templates: Sequence[str]) -> Float[np.ndarray, "c d"]:
    """A unit vector for each class: the mean of its sentences' unit vectors, made unit again (as CLIP's authors do)."""
    written = sentences(classes, templates)
    vectors = bundle.encode([text for own in written for text in own])
    return unit_rows(vectors.reshape(len(classes), len(templates), -1).mean(1)).numpy()


def zero_shot(
    items: Matrix,
    labels: Int[np.ndarray, "n"],
    classes: Sequence[str],
    vectors: Float[np.ndarray, "c d"],
    *,
    templates: Sequence[str] = (),
) -> ZeroShot:
    """Accuracy of the nearest class vector, and of the five nearest. Items labelled −1 do not count, and a tie counts
    as wrong: an encoder that maps everything to one point knows nothing."""
    labels = np.asarray(labels)
    kept = np.flatnonzero(labels >= 0)
    if len(kept) == 0:
        raise DataError("No item has a label, so there is nothing to classify.")
    own = labels[kept]
    found = retrieval(unit_rows(items)[kept], vectors, [[int(label)] for label in own], ks=(1, 5))
    right = found.ranks == 1
    return ZeroShot(
        accuracy=bootstrap(right),
        top5=found.recall[5],
        chance=accuracy_chance(own),
        by_class={classes[k]: float(right[own == k].mean()) for k in np.unique(own).tolist()},
        templates=list(templates),
    )
