"""Classes by their names: prompts, averages, ties, and agreement with scikit-learn's accuracy."""

import numpy as np
import pytest

from twofold.data.samples import openmoji
from twofold.errors import DataError, UsageError
from twofold.measure.zero_shot import prototypes, sentences, zero_shot
from twofold.models.bundle import Bundle
from twofold.models.encoders import text_encoder


def test_a_name_is_written_into_every_template():
    assert sentences(["traffic_light", "dog "], ["a {}", "{} at night"]) == [
        ["a traffic light", "traffic light at night"],
        ["a dog", "dog at night"],
    ]


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_template_has_one_place_for_the_name(template):
    with pytest.raises(UsageError, match=r"has one \{\} for"):
        sentences(["dog"], [template])


def test_several_templates_are_the_mean_of_unit_vectors_made_unit():
    bundle = Bundle({"text": text_encoder("minilm")})
    templates = ["a drawing of a {}", "{}"]
    found = prototypes(bundle, ["cat", "red_heart"], templates)
    for row, name in zip(found, ["cat", "red heart"], strict=True):
        one, other = bundle.encode([f"a drawing of a {name}"])[0], bundle.encode([name])[0]
        mean = (one + other) / np.linalg.norm(one + other)
        np.testing.assert_allclose(row, mean, atol=1e-5)


def test_names_alone_tell_groups_of_words_apart():
    """Real words through the real encoder: emoji by their names, classes by theirs."""
    emoji = openmoji()
    chosen = [i for i, group in enumerate(emoji.meta["group"]) if group in ("food-drink", "flags")][::12]
    names = [emoji.meta["name"][i] for i in chosen]
    labels = np.array([int(emoji.meta["group"][i] == "flags") for i in chosen])
    bundle = Bundle({"text": text_encoder("minilm")})
    vectors = prototypes(bundle, ["food or drink", "flag of a country"], ["{}", "a picture of {}"])
    found = zero_shot(bundle.encode(names), labels, ["food", "flag"], vectors, templates=["{}", "a picture of {}"])
    assert found.accuracy.value > 0.9 > found.chance
    assert found.templates == ["{}", "a picture of {}"]


def test_accuracy_is_scikit_learns_and_items_without_a_label_do_not_count():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    classes = draw.normal(size=(6, 10))
    labels = draw.integers(-1, 6, 200)
    items = classes[labels] + 1.5 * draw.normal(size=(200, 10))
    found = zero_shot(items, labels, list("abcdef"), classes)
    known = labels >= 0
    cosines = items @ (classes / np.linalg.norm(classes, axis=1, keepdims=True)).T
    assert found.accuracy.value == pytest.approx(metrics.accuracy_score(labels[known], cosines[known].argmax(1)))
    top5 = metrics.top_k_accuracy_score(labels[known], cosines[known], k=5, labels=range(6))
    assert found.top5.value == pytest.approx(top5)
    recalls = metrics.recall_score(labels[known], cosines[known].argmax(1), average=None)
    assert list(found.by_class.values()) == pytest.approx(recalls.tolist())


def test_an_encoder_that_collapsed_to_a_point_classifies_nothing():
    assert zero_shot(np.ones((4, 3)), np.array([0, 1, 0, 1]), ["a", "b"], np.ones((2, 3))).accuracy.value == 0


def test_without_labels_there_is_nothing_to_classify():
    with pytest.raises(DataError, match="nothing to classify"):
        zero_shot(np.eye(2), np.array([-1, -1]), ["a", "b"], np.eye(2))
