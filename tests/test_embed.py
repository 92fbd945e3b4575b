"""Embedding a source gives each item its own vectors, computes nothing twice, and survives what is broken."""

import io
import shutil
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from twofold.data.decode import decode, fit
from twofold.data.sources import Column, Source
from twofold.data.vectors import Vectors
from twofold.errors import DataError, DecodeError, FingerprintMismatch, UsageError
from twofold.measure import embed as module
from twofold.measure.embed import embed
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import (
    VectorEncoder,
    fingerprint,
    image_encoder,
    inference,
    mel_encoder,
    pixels,
    text_encoder,
)
from twofold.models.heads import mlp


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return image_encoder("timm:resnet18/4", small_stem=True).eval()


@pytest.fixture(scope="module")
def minilm():
    return text_encoder()


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)).save(out, "png")
    return out.getvalue()


def pictures(n: int = 6) -> Source:
    return Source("pictures", [f"item{i}" for i in range(n)], images=[png(i) for i in range(n)])


def computed(encoder) -> tuple[list[int], torch.utils.hooks.RemovableHandle]:
    """The sizes of the batches that go through the encoder from now on."""
    sizes: list[int] = []
    return sizes, encoder.register_forward_hook(lambda _, __, z: sizes.append(len(z)))


def test_rows_are_the_encoder_on_each_picture(encoder):
    source = pictures()
    done = embed(encoder, source, "image")
    assert done.ids == source.ids and done.kept.tolist() == list(range(6)) and done.skipped == []
    assert done.offsets.tolist() == list(range(7))
    with inference(encoder):
        expected = torch.cat([encoder(pixels([fit(decode(image), 32)])) for image in source.images])
    np.testing.assert_allclose(done.matrix, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_nothing_is_computed_twice_and_names_do_not_matter(encoder):
    sizes, hook = computed(encoder)
    try:
        first = embed(encoder, pictures(4), "image")
        more = Source("more", [*"abcdef"], images=[png(i) for i in (5, 3, 2, 1, 0, 5)])
        second = embed(encoder, more, "image")
    finally:
        hook.remove()
    assert sizes == [4, 1], "of six only one content is new"
    np.testing.assert_array_equal(second.matrix[1:5], first.matrix[[3, 2, 1, 0]])
    np.testing.assert_array_equal(second.matrix[0], second.matrix[5])


def test_a_head_is_applied_to_features_that_the_encoder_made_once(encoder, cache):
    tower = Tower(encoder, mlp(encoder.dim, 16, 8)).eval()
    features, embedded = (embed(model, pictures(), "image").matrix for model in (encoder, tower))
    assert features.shape == (6, 32) and embedded.shape == (6, 8)
    with inference(tower):
        np.testing.assert_allclose(tower.head(torch.from_numpy(features)).numpy(), embedded, rtol=1e-4, atol=1e-5)
    assert [path.name for path in (cache / "vectors").iterdir()] == [fingerprint(encoder)]


def test_a_bundle_embeds_what_its_encode_gives_but_for_length(encoder):
    bundle = Bundle({"image": Tower(encoder, mlp(encoder.dim, 16, 8))})
    source = pictures()
    z = embed(bundle, source, "image").matrix
    np.testing.assert_allclose(
        z / np.linalg.norm(z, axis=1, keepdims=True), bundle.encode(source.images), rtol=1e-4, atol=1e-5
    )


def test_broken_pictures_are_skipped_by_name_and_their_copies_too(encoder):
    broken = png(1)[:60]
    source = Source("mixed", [*"abcde"], images=[png(0), broken, png(2), b"", broken])
    done = embed(encoder, source, "image")
    assert done.ids == ["a", "c"] and done.kept.tolist() == [0, 2] and done.matrix.shape == (2, 32)
    assert [name for name, _ in done.skipped] == ["b", "d", "e"]
    assert dict(done.skipped)["d"] == "has no image" and dict(done.skipped)["b"] == dict(done.skipped)["e"]
    with pytest.raises(DecodeError, match="b: "):
        embed(encoder, source, "image", on_error="raise")
    nothing = embed(encoder, source.take([1, 3]), "image")
    assert nothing.matrix.shape == (0, 32) and nothing.offsets.tolist() == [0]


def test_every_caption_has_a_row_and_equal_captions_equal_ones(minilm):
    texts = [["a red boat", "a boat at dusk"], ["two dogs run on the grass"], [], ["a red boat"]]
    source = Source("captions", [*"abcd"], texts=texts)
    sizes, hook = computed(minilm)
    try:
        done = embed(minilm, source, "text")
    finally:
        hook.remove()
    assert sizes == [3], "three distinct captions"
    assert done.ids == ["a", "b", "d"] and done.kept.tolist() == [0, 1, 3] and done.offsets.tolist() == [0, 2, 3, 4]
    assert done.skipped == [("c", "has no text")]
    with inference(minilm):
        expected = minilm(minilm.inputs([text for own in texts for text in own]))
    np.testing.assert_allclose(done.matrix, expected.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="c has no text"):
        embed(minilm, source, "text", on_error="raise")


def test_ctrl_c_keeps_what_was_made_and_the_next_call_goes_on(encoder, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(encoder, pictures(9), "image", progress=stop)
    told = []
    done = embed(encoder, pictures(9), "image", progress=lambda *at: told.append(at))
    assert told == [(2, 5), (4, 5), (5, 5)], "four of nine were kept"
    np.testing.assert_array_equal(done.matrix, embed(encoder, pictures(9), "image").matrix)


def test_a_kill_costs_at_most_a_shard(encoder, monkeypatch, cache):
    """What is on disk after each batch is what a process that is killed there leaves."""
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module, "SHARD", 4)
    kept = []

    def look(done, total):
        kept.append(len(Vectors(cache / "vectors", fingerprint(encoder), encoder.dim)))

    embed(encoder, pictures(10), "image", progress=look)
    assert kept == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_the_fast_path_gives_the_same_rows_by_several_threads(encoder, monkeypatch, tmp_path):
    mixed = replace(pictures(21), images=[b"broken" if i in (5, 8, 9) else png(i) for i in range(21)])
    plain = embed(encoder, mixed, "image")
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(module, "APART", 2)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 3)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "other"))
    fast = embed(encoder, mixed, "image")
    assert list((tmp_path / "other" / "onnx").glob("*.onnx"))
    assert (fast.ids, fast.skipped) == (plain.ids, plain.skipped)
    np.testing.assert_allclose(fast.matrix, plain.matrix, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "third"))
    with pytest.raises(DecodeError, match="item5"):
        embed(encoder, mixed, "image", on_error="raise")

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(encoder, pictures(21), "image", progress=stop)
    assert len(Vectors(tmp_path / "third" / "vectors", fingerprint(encoder), encoder.dim)) >= 10
    np.testing.assert_allclose(embed(encoder, pictures(21), "image").matrix[:5], plain.matrix[:5], rtol=1e-4, atol=1e-5)


def test_a_head_applied_to_what_several_threads_made_is_the_tower_s(encoder, monkeypatch, tmp_path):
    tower = Tower(encoder, mlp(encoder.dim, 16, 8))
    features = torch.from_numpy(embed(encoder, pictures(9), "image").matrix)
    with inference(tower):
        expected = tower.head(features).numpy()
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "other"))
    made = embed(tower, pictures(9), "image", vectors=Vectors(tmp_path, tower.fingerprint(), 8)).matrix
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def test_deep_pictures_are_not_cut_to_8_bits(encoder):
    deep = np.random.default_rng(0).integers(0, 65536, (32, 32, 3), np.uint16)
    source = Source("deep", ["deep", "cut"], images=[deep, (deep // 257).astype(np.uint8)])
    one, other = embed(encoder, source, "image").matrix
    assert 0 < np.abs(one - other).max() < 0.1 * np.abs(one).max()


def test_vectors_of_another_encoder_are_refused(encoder, tmp_path):
    with pytest.raises(FingerprintMismatch, match="another"):
        embed(encoder, pictures(), "image", vectors=Vectors(tmp_path, "another", encoder.dim))
    own = Vectors(tmp_path, fingerprint(encoder), encoder.dim)
    embed(encoder, pictures(), "image", vectors=own)
    assert len(own) == 6


def test_what_does_not_fit_together_is_told(encoder, minilm):
    with pytest.raises(UsageError, match="does not embed texts"):
        embed(encoder, pictures(), "text")
    with pytest.raises(DataError, match="pictures has no texts"):
        embed(minilm, pictures(), "text")


def test_embedding_leaves_training_alone(encoder):
    try:
        encoder.train()
        before = fingerprint(encoder)
        embed(encoder, pictures(), "image")
        assert encoder.training and fingerprint(encoder) == before
    finally:
        encoder.eval()


# --- other kinds than pictures and texts ------------------------------------------------------------------------------


def wav(samples: np.ndarray) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def waves(*seeds: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).normal(0, 0.1, 800 * (seed + 1)).astype(np.float32) for seed in seeds]


def test_sounds_are_embedded_once_by_their_content(tmp_path):
    torch.manual_seed(0)
    hears = mel_encoder("mel:tiny", seconds=1).eval()
    sounds = waves(1, 2, 3)
    for name, samples in zip("abc", sounds, strict=True):
        (tmp_path / f"{name}.wav").write_bytes(wav(samples))
    files = [tmp_path / f"{name}.wav" for name in "abc"]
    shutil.copy(files[1], tmp_path / "copy.wav")
    source = Source("s", [*"abc"], columns={"speech": Column("audio", files)})
    sizes, hook = computed(hears)
    try:
        first = embed(hears, source, "speech", quiet=True)
        more = Source("t", [*"de"], columns={"audio": Column("audio", [tmp_path / "copy.wav", wav(waves(4)[0])])})
        second = embed(hears, more, "audio", quiet=True)
    finally:
        hook.remove()
    assert sizes == [3, 1] and np.array_equal(second.matrix[0], first.matrix[1])
    with inference(hears):
        expected = hears(hears.inputs(files)).numpy()
    np.testing.assert_allclose(first.matrix, expected, atol=1e-5)


def test_a_sound_that_is_none_is_skipped_by_name():
    hears = mel_encoder("mel:tiny", seconds=1)
    cells = [waves(1)[0], b"", b"nonsense", np.zeros(3, np.float32)]
    source = Source("s", [*"abcd"], columns={"speech": Column("audio", cells)})
    done = embed(hears, source, "speech", quiet=True)
    assert done.ids == ["a"] and [name for name, _ in done.skipped] == ["b", "c", "d"]
    assert dict(done.skipped)["d"].startswith("too short: 3 samples")
    with pytest.raises(DecodeError, match="b: empty"):
        embed(hears, source, "speech", on_error="raise", quiet=True)


def test_vectors_are_a_modality_and_a_head_may_stand_on_them():
    cells = [*np.random.default_rng(0).normal(size=(3, 4)), b"", np.full(4, np.inf)]
    source = Source("s", [*"abcde"], columns={"dino": Column("vector", cells)})
    done = embed(VectorEncoder(4), source, "dino", quiet=True)
    assert done.ids == [*"abc"] and [name for name, _ in done.skipped] == ["d", "e"]
    np.testing.assert_array_equal(done.matrix, np.stack(cells[:3]).astype(np.float32))
    tower = Tower(VectorEncoder(4), mlp(4, 8, 2)).eval()
    z = embed(Bundle({"dino": tower}), source, "dino", quiet=True).matrix
    with inference(tower):
        np.testing.assert_allclose(z, tower.head(torch.from_numpy(done.matrix)).numpy(), atol=1e-6)


def test_any_column_of_texts_has_several_an_item(minilm):
    source = Source("s", [*"ab"], texts=[["x"], ["y"]], columns={"code": Column("text", [["x", "def f()"], []])})
    done = embed(minilm, source, "code", quiet=True)
    assert done.ids == ["a"] and done.offsets.tolist() == [0, 2] and dict(done.skipped) == {"b": "has no code"}
    np.testing.assert_array_equal(done.matrix[0], embed(minilm, source, "text", quiet=True).matrix[0])


def test_a_column_of_another_kind_is_told(minilm):
    source = Source("s", ["a"], columns={"speech": Column("audio", waves(1))})
    with pytest.raises(UsageError, match=r"minilm does not embed speechs \(that column is audio\)"):
        embed(minilm, source, "speech")
    with pytest.raises(DataError, match="no modality 'voice'"):
        embed(minilm, source, "voice")
