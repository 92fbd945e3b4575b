"""What is asked for, in any form, becomes one unit vector; the store does the rest."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold.data.samples import openmoji
from twofold.errors import DecodeError, FingerprintMismatch, StoreError, UsageError
from twofold.measure.calibration import Calibration
from twofold.measure.hubness import Remedy
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder, text_encoder
from twofold.retrieve.retriever import Retriever
from twofold.retrieve.store import ExactStore


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """Real towers into 32 dimensions: a narrow ResNet with random weights, MiniLM under a random projection."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = image_encoder("timm:resnet18/4", size=32, small_stem=True)
        return Bundle({"image": image, "text": Tower(text_encoder("minilm"), nn.Linear(384, image.dim))})


@pytest.fixture(scope="module")
def items():
    return openmoji().take(range(0, 4400, 110))


@pytest.fixture(scope="module")
def vectors(bundle, items) -> np.ndarray:
    return bundle.encode(items.images)


@pytest.fixture(scope="module")
def retriever(bundle, items, vectors) -> Retriever:
    store = ExactStore(fingerprint=bundle.tower_fingerprint("image"), dim=bundle.dim)
    store.upsert(items.ids, vectors, [{"half": n % 2} for n in range(len(items))])
    return Retriever(bundle, store)


def ids(hits) -> list[str]:
    return [hit.id for hit in hits]


def ranking(items, vectors: np.ndarray, query: np.ndarray) -> list[str]:
    scores = np.round(vectors @ (query / np.linalg.norm(query)), 6)
    return [name for _, name in sorted(zip(-scores, items.ids, strict=True))]


def test_words_find_what_their_vector_is_nearest_to(retriever, bundle, items, vectors):
    hits = retriever.search("a red apple", k=7)
    words = bundle.encode(["a red apple"])[0]
    assert ids(hits) == ranking(items, vectors, words)[:7]
    assert hits[0].score == pytest.approx(float((vectors @ words).max()), abs=2e-6)


def test_a_picture_is_the_same_query_in_every_form(retriever, items, tmp_path):
    data = items.images[5]
    path = tmp_path / "query.png"
    path.write_bytes(data)
    picture = Image.open(io.BytesIO(data))
    array = np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")))[..., :3]
    answers = [retriever.search(image=form, k=5) for form in (path, str(path), data, picture, array)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].id == items.ids[5]
    assert answers[0][0].score == pytest.approx(1, abs=1e-5)


def test_an_item_finds_others_like_it_and_not_itself(retriever, items):
    hits = retriever.search(like=items.ids[5], k=6)
    with_itself = retriever.search(image=items.images[5], k=7)
    assert ids(hits) == ids(with_itself)[1:]
    assert len(retriever.search(like=items.ids[5], k=1000)) == len(items) - 1
    assert (
        ids(retriever.search(like=items.ids[5], k=3, where={"half": 0}))
        == [hit.id for hit in retriever.search(like=items.ids[5], k=1000) if hit.meta["half"] == 0][:3]
    )  # item 5 is in the other half


def test_a_combination_is_the_weighted_sum_of_unit_vectors(retriever, bundle, items, vectors):
    words, (like, picture) = bundle.encode(["smiling face"])[0], vectors[[3, 8]]
    both = (like + picture) / np.linalg.norm(like + picture)
    expected = {
        0.0: picture,
        0.25: 0.25 * words + 0.75 * picture,
        1.0: words,
    }
    for weight, query in expected.items():
        hits = retriever.search("smiling face", image=items.images[8], weight=weight, k=6)
        assert ids(hits) == ranking(items, vectors, query)[:6]
    hits = retriever.search("smiling face", image=items.images[8], like=items.ids[3], k=6)
    expected_ids = [name for name in ranking(items, vectors, words + both) if name != items.ids[3]]
    assert ids(hits) == expected_ids[:6]


def test_minus_leads_away_from_words(retriever, bundle, items, vectors):
    words, away = bundle.encode(["animal", "dog"])
    assert ids(retriever.search("animal", minus="dog", k=6)) == ranking(items, vectors, words - away / 2)[:6]
    unlike = retriever.search(like=items.ids[3], minus="dog", k=40)
    query = vectors[3] - away / 2
    assert [hit.score for hit in unlike][:3] == pytest.approx(
        sorted(np.delete(vectors, 3, axis=0) @ query / np.linalg.norm(query), reverse=True)[:3], abs=1e-5
    )


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        ({}, UsageError, "nothing to search for"),
        ({"minus": "dog"}, UsageError, "nothing to search for"),
        ({"text": " "}, UsageError, "empty"),
        ({"text": "a", "minus": ""}, UsageError, "empty"),
        ({"text": "a", "k": 0}, UsageError, "k must be at least 1"),
        ({"text": "a", "weight": 1.5}, UsageError, "weight is a share"),
        ({"text": "a", "where": {"half": {"$near": 1}}}, UsageError, r"\$near"),
        ({"like": "nobody"}, StoreError, "'nobody'"),
        ({"image": "missing.png"}, DecodeError, "missing.png"),
        ({"image": b"not a picture"}, DecodeError, "picture"),
    ],
)
def test_queries_that_ask_for_nothing_are_refused(retriever, query, error, message):
    with pytest.raises(error, match=message):
        retriever.search(**query)


def test_words_need_a_text_tower_and_pictures_an_image_tower(bundle, items):
    for kept, query in (("image", {"text": "dog"}), ("text", {"image": items.images[0]})):
        store = ExactStore(fingerprint=bundle.tower_fingerprint(kept), dim=bundle.dim)
        with pytest.raises(UsageError, match="tower"):
            Retriever(Bundle({kept: bundle.towers[kept]}), store).search(**query)


def test_parts_that_cancel_out_are_an_error(bundle):
    store = ExactStore(fingerprint=bundle.tower_fingerprint("image"), dim=bundle.dim)
    store.upsert(["opposite"], -bundle.encode(["dog"]), [{}])
    with pytest.raises(UsageError, match="cancel"):
        Retriever(bundle, store).search("dog", like="opposite")


def test_a_store_of_another_encoder_is_refused(bundle):
    with pytest.raises(FingerprintMismatch, match="no tower of this bundle"):
        Retriever(bundle, ExactStore(fingerprint="0123", dim=bundle.dim))


# Remedies and calibration.


@pytest.fixture(scope="module")
def nnn(bundle) -> Remedy:
    return Remedy("nnn", bundle.encode(["a dog", "a flag", "fruit", "a smiling face"]), strength=0.7, neighbours=2)


def calibrated(bundle: Bundle, calibration: Calibration) -> Bundle:
    return Bundle(bundle.towers, {"calibration": {"text_to_image": calibration.record()}})


def test_without_a_calibration_words_are_ordered_by_plain_cosines(retriever):
    hits = retriever.search("a red apple", k=3)
    assert retriever.remedy is retriever.calibration is None
    assert all(hit.probability is None for hit in hits)
    assert not retriever.no_good_match(hits)


def test_a_remedy_orders_words_by_its_scores_and_leaves_pictures_alone(retriever, bundle, items, vectors, nnn):
    remedied = Retriever(bundle, retriever.store, remedy=nnn)
    hits = remedied.search("a red apple", k=6)
    scores = nnn.scores(bundle.encode(["a red apple"]), vectors)[0]
    order = np.argsort(-scores, kind="stable")[:6]
    assert ids(hits) == [items.ids[row] for row in order]
    assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=2e-6)
    assert ids(hits) != ids(retriever.search("a red apple", k=6))
    for query in ({"image": items.images[5]}, {"like": items.ids[5]}, {"text": "dog", "minus": "cat"}):
        assert remedied.search(**query) == retriever.search(**query)
    assert all(hit.meta["half"] == 1 for hit in remedied.search("a red apple", where={"half": 1}))
    assert remedied.search("a red apple", where={"half": 7}) == []


def test_a_calibrated_bundle_gives_words_a_probability_at_the_odds_of_the_store(retriever, bundle, items):
    calibration = Calibration("platt", gallery=1000, scale=20.0, offset=-7.0, threshold=0.3)
    knowing = Retriever(calibrated(bundle, calibration), retriever.store)
    hits = knowing.search("a red apple", k=4)
    assert [hit._replace(probability=None) for hit in hits] == retriever.search("a red apple", k=4)
    expected = [calibration.probability(hit.score, gallery=len(items)) for hit in hits]
    assert [hit.probability for hit in hits] == pytest.approx(expected)
    assert all(hit.probability is None for hit in knowing.search(like=items.ids[3]))


def test_no_good_match_is_said_below_the_threshold_and_of_words_only(retriever, bundle, items):
    best = retriever.search("a red apple", k=1)[0].score
    for least, verdict in ((best - 1e-3, False), (best + 1e-3, True)):
        calibration = Calibration("platt", gallery=50, scale=20.0, offset=-7.0, threshold=least)
        knowing = Retriever(calibrated(bundle, calibration), retriever.store)
        assert knowing.no_good_match(knowing.search("a red apple")) is verdict
        assert not knowing.no_good_match(knowing.search(image=items.images[1]))
        assert not knowing.no_good_match([])


def test_a_calibration_holds_only_for_the_scores_it_was_fitted_on(retriever, bundle, nnn):
    kept = calibrated(bundle, Calibration("platt", gallery=50, scale=20.0, offset=-7.0, remedy=nnn))
    knowing = Retriever(kept, retriever.store)
    assert knowing.remedy.kind == "nnn"
    assert knowing.search("a red apple")[0].probability is not None
    plain = Retriever(kept, retriever.store, remedy=None)
    assert plain.search("a red apple") == retriever.search("a red apple")
