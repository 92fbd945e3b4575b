"""What is exported is loaded by the other library itself, and gives the same vectors."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold.cli import main
from twofold.errors import BundleError, FingerprintMismatch, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import image_encoder, text_encoder
from twofold.models.export import export, folded
from twofold.models.heads import Standardize, mlp

TEXTS = ["a red boat", "two dogs on a beach at dusk, one of them running", "x"]


def trained_head(dim: int, out: int) -> nn.Sequential:
    """As `align` leaves one: standardised features, dropout, a hidden layer; and a BatchNorm with a past."""
    torch.manual_seed(1)
    head = nn.Sequential(
        Standardize(dim).measure(torch.randn(50, dim) * 3 + 1), nn.Dropout(0.2), *mlp(dim, 16, out, activation="gelu")
    )
    for _ in range(5):
        head(torch.randn(30, dim) * 2)
    return head.eval()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image, text = image_encoder("timm:resnet18/4", size=32), text_encoder("minilm")
        bundle = Bundle(
            {"image": Tower(image, trained_head(image.dim, 24)), "text": Tower(text, trained_head(384, 24))}
        )
    for tower in bundle.towers.values():
        tower.eval().requires_grad_(False)
    return bundle


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def test_a_folded_head_is_the_head():
    head = trained_head(10, 7).double()
    x = torch.randn(20, 10, dtype=torch.float64)
    y = x
    stages = folded(head, 10)
    for weight, bias, activation in stages:
        y = activation()(y @ weight.double().T + bias.double())
    assert len(stages) == 2
    torch.testing.assert_close(y, head(x), atol=1e-5, rtol=1e-5)
    assert folded(nn.Sequential(nn.Identity(), nn.Dropout(0.1)), 5) == []
    with pytest.raises(UsageError, match="LayerNorm"):
        folded(nn.Sequential(nn.LayerNorm(5)), 5)


def test_onnx_runtime_gives_the_bundles_vectors(bundle, picture, tmp_path):
    import onnxruntime

    export(bundle, "onnx", tmp_path / "graphs")
    session = onnxruntime.InferenceSession(tmp_path / "graphs" / "image.onnx")
    pixels = picture.transpose(2, 0, 1)[None].repeat(3, 0).astype(np.float32) / 255
    (found,) = session.run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, bundle.encode([picture] * 3), atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "graphs" / "text.onnx")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tmp_path / "graphs" / "text")(TEXTS, padding=True, return_tensors="np")
    (found,) = session.run(None, {name: tokens[name] for name in ("input_ids", "attention_mask")})
    np.testing.assert_allclose(found, bundle.encode(TEXTS), atol=1e-5)


def test_timm_makes_the_backbone(bundle, picture, tmp_path):
    import timm

    export(bundle, "timm", tmp_path / "backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    facts = timm.data.resolve_model_data_config(network)
    pixels = timm.data.create_transform(**facts, is_training=False)(Image.fromarray(picture))[None]
    encoder = bundle.towers["image"].encoder
    with torch.no_grad():
        expected = encoder(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)
        torch.testing.assert_close(network(pixels), expected, atol=1e-5, rtol=1e-4)


def test_sentence_transformers_loads_the_text_tower(bundle, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    export(bundle, "sentence-transformers", tmp_path / "text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sentence_transformers.SentenceTransformer(str(tmp_path / "text"), device="cpu", local_files_only=True)
    np.testing.assert_allclose(model.encode(TEXTS), bundle.encode(TEXTS), atol=1e-5)
    assert model.max_seq_length == bundle.towers["text"].encoder.spec["max_length"]


def test_its_evaluators_take_a_bundle(bundle):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    corpus = {str(n): text for n, text in enumerate(TEXTS)}
    evaluator = InformationRetrievalEvaluator(
        {f"q{n}": text for n, text in corpus.items()},
        corpus,
        {f"q{n}": {n} for n in corpus},
        mrr_at_k=[1],
        ndcg_at_k=[1],
        accuracy_at_k=[1],
        precision_recall_at_k=[1],
        map_at_k=[1],
        show_progress_bar=False,
    )
    assert evaluator(bundle)["cosine_accuracy@1"] == 1.0


def test_encode_follows_sentence_transformers(bundle, picture, tmp_path):
    matrix = bundle.encode(TEXTS, batch_size=1)
    assert bundle.encode(TEXTS[0]).shape == (24,)
    np.testing.assert_allclose(bundle.encode(TEXTS[0]), matrix[0], atol=1e-6)
    np.testing.assert_array_equal(bundle.encode(np.array(TEXTS)), bundle.encode(TEXTS))
    assert isinstance(bundle.encode(TEXTS, convert_to_tensor=True), torch.Tensor)
    Image.fromarray(picture).save(tmp_path / "a.png")
    alone = bundle.encode(Image.fromarray(picture))
    assert alone.shape == (24,) and (bundle.encode([tmp_path / "a.png"])[0] == alone).all()
    assert (bundle.encode(picture) == alone).all()
    raw = bundle.encode(TEXTS, normalize_embeddings=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), bundle.encode(TEXTS), atol=1e-6)
    assert (bundle.encode(["b"], prompt="a ") == bundle.encode(["a b"])).all()
    assert bundle.encode(TEXTS, truncate_dim=5).shape == (3, 5)
    np.testing.assert_allclose(bundle.similarity(raw, raw).numpy(), matrix @ matrix.T, atol=1e-5)
    with pytest.raises(UsageError, match="no prompts"):
        bundle.encode(TEXTS, prompt_name="query")
    with pytest.raises(UsageError, match="precision"):
        bundle.encode(TEXTS, precision="int8")


def test_chroma_keeps_and_checks_the_model(bundle, picture, tmp_path):
    import chromadb

    from twofold.retrieve.chroma_function import BundleFunction

    bundle.save(tmp_path / "model")
    client = chromadb.PersistentClient(tmp_path / "store", chromadb.config.Settings(anonymized_telemetry=False))
    items = client.create_collection("items", embedding_function=BundleFunction(tmp_path / "model"))
    items.add(ids=["a", "b", "c"], documents=TEXTS)
    items.add(ids=["p"], images=[picture])
    assert items.query(query_texts=[TEXTS[1]], n_results=1)["ids"] == [["b"]]
    assert items.query(query_images=[picture], n_results=1)["ids"] == [["p"]]
    again = client.get_collection("items")  # by what Chroma kept
    assert again.query(query_texts=[TEXTS[1]], n_results=1)["ids"] == [["b"]]
    config = BundleFunction(tmp_path / "model").get_config()
    with pytest.raises(FingerprintMismatch, match="was filled by"):
        BundleFunction.build_from_config(config | {"fingerprint": "0" * 32})
    client.close()


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(bundle, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"target of an export 'onyx'.*'onnx'"):
        export(bundle, "onyx", tmp_path / "x")
    small = Bundle({"image": image_encoder("timm:resnet18/4", size=32, small_stem=True)})
    with pytest.raises(UsageError, match="no name in timm"):
        export(small, "timm", tmp_path / "x")
    with pytest.raises(UsageError, match="no text tower"):
        export(small, "sentence-transformers", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    small.save(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "full")]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "full" / "mine").exists()
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(tmp_path / "y"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "y" / "image.onnx")]


def test_a_graph_that_differs_is_not_kept(bundle, tmp_path, monkeypatch):
    from twofold.models import export as module

    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(BundleError, match="is off by"):
        export(bundle, "onnx", tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()
