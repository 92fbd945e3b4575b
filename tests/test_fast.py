"""The fast path computes what PyTorch computes, or says why it stands aside."""

import logging

import numpy as np
import onnx
import pytest
import torch

from twofold.models import clips, fast
from twofold.models.encoders import VectorEncoder, fingerprint, image_encoder, inference, text_encoder, video_encoder
from twofold.models.fast import accelerate


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = image_encoder("timm:resnet18/4", small_stem=True, channels=4)
    encoder(torch.rand(16, 4, 32, 32))  # running statistics that are not the initial ones
    return encoder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


def features(encoder, x):
    with inference(encoder):
        return encoder(x)


def test_onnx_runtime_agrees_with_pytorch_on_any_batch(encoder, cache):
    encoder.train()
    quick = accelerate(encoder, cache)
    assert encoder.training, "it must not change the mode of an encoder that is being trained"
    assert (quick.engine, quick.reason) == ("onnxruntime", "")
    for batch in (1, 2, 7):
        x = torch.rand(batch, 4, 32, 32)
        expected = features(encoder, x)
        torch.testing.assert_close(quick(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_graph_is_made_once_and_again_for_other_weights(encoder, cache, monkeypatch):
    accelerate(encoder, cache)
    assert [path.name for path in cache.iterdir()] == [f"{fingerprint(encoder)}.onnx"]
    monkeypatch.setattr(fast, "_export", lambda *_: pytest.fail("it was there"))
    assert accelerate(encoder, cache).engine == "onnxruntime"


def test_clips_are_seen_frame_by_frame_by_the_graph_of_the_pictures(encoder, cache, monkeypatch):
    monkeypatch.setattr(fast, "AT_ONCE", 5)
    monkeypatch.setattr(clips, "AT_ONCE", 5)
    watching = video_encoder(encoder, frames=4, tubelet=None)
    quick = accelerate(watching, cache)
    assert quick.engine == "onnxruntime" and len(list(cache.iterdir())) == 1
    x = torch.rand(3, 4, 4, 32, 32)
    expected = torch.stack([features(encoder, clip).mean(0) for clip in x])
    for made in (quick(x), features(watching, x)):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("harm", ["truncated", "another weight"])
def test_a_damaged_graph_is_made_anew(encoder, cache, tmp_path, monkeypatch, harm):
    accelerate(encoder, cache)
    good = (cache / f"{fingerprint(encoder)}.onnx").read_bytes()
    path = tmp_path / f"{fingerprint(encoder)}.onnx"
    if harm == "truncated":
        path.write_bytes(good[: len(good) // 2])
    else:
        graph = onnx.load_from_string(good)
        weight = next(tensor for tensor in graph.graph.initializer if len(tensor.dims) == 4)
        weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * 1.01).tobytes()
        onnx.save(graph, path)
    monkeypatch.setattr(fast, "_export", lambda _, where: where.write_bytes(good))
    assert accelerate(encoder, tmp_path).engine == "onnxruntime"
    assert path.read_bytes() == good


def test_an_encoder_that_cannot_be_exported_runs_in_pytorch_and_says_why(encoder, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(fast, "_export", fail)
    with caplog.at_level(logging.WARNING, "twofold"):
        plain = accelerate(encoder, tmp_path)
    assert (plain.engine, plain.reason) == ("eager", "RuntimeError: no such operator")
    assert "timm:resnet18/4 runs in PyTorch" in caplog.text and "no such operator" in caplog.text
    x = torch.rand(3, 4, 32, 32)
    torch.testing.assert_close(plain(x), features(encoder, x), rtol=1e-4, atol=1e-5)


def test_a_graph_that_disagrees_is_not_trusted(encoder, cache, monkeypatch):
    accelerate(encoder, cache)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "TOLERANCE", 0.0)
        patch.setattr(fast, "_export", lambda *_: None)
        plain = accelerate(encoder, cache)
    assert plain.engine == "eager" and "off by" in plain.reason
    for wrong in (lambda x: torch.full((3, encoder.dim), np.nan), lambda x: features(encoder, x) * 1.001):
        with pytest.raises(ValueError, match="off by"):
            fast._compare(wrong, encoder)


def test_the_default_text_encoder_agrees_on_texts_of_any_length(cache):
    encoder = text_encoder()
    quick = accelerate(encoder, cache)
    assert quick.engine == "onnxruntime", quick.reason
    for texts in (["one"], ["a red boat at dusk", "x", "two dogs run " * 100]):
        tokens = encoder.inputs(texts)
        torch.testing.assert_close(quick(tokens), features(encoder, tokens), rtol=1e-4, atol=1e-4)


def test_vectors_run_in_pytorch_as_they_are(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(fast, "_export", fail)
    vectors = VectorEncoder(5)
    plain = accelerate(vectors, tmp_path)
    x = torch.rand(3, 5)
    assert plain.engine == "eager"
    torch.testing.assert_close(plain(x), vectors(x))
