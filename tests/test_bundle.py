"""A bundle comes back as it was saved, or says which file is not."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from twofold.errors import BundleError, DecodeError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import (
    TextEncoder,
    VectorEncoder,
    fingerprint,
    image_encoder,
    inference,
    mel_encoder,
    read_text_encoder,
)
from twofold.models.heads import Standardize, mlp
from twofold.models.texts import bpe_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "boat", "dog", "on", "water"]


def small_text_encoder(folder) -> TextEncoder:
    """A BERT of one layer, 16 wide, that knows six words."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": 32, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    return read_text_encoder(folder, {"name": "small", "pooling": "mean"}, weights=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    torch.manual_seed(0)
    image = image_encoder("timm:resnet18/4", small_stem=True, how="pad")
    text = small_text_encoder(tmp_path_factory.mktemp("text") / "small")
    standard = Standardize(text.dim).measure(torch.randn(20, text.dim) + 2)
    head = nn.Sequential(standard, mlp(text.dim, 24, 8, norm="none", activation="gelu", dropout=0.2))
    return Bundle({"text": Tower(text, head), "image": Tower(image, mlp(image.dim, 24, 8))}, {"note": "naïve 🙂"})


@pytest.fixture
def saved(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def pictures(n: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (n, 40, 30, 3), np.uint8))


def same(one: Bundle, other: Bundle) -> bool:
    return all(np.array_equal(one.encode(x), other.encode(x)) for x in (pictures(), ["a red boat", "dog"]))


def test_it_comes_back_with_the_same_embeddings_meta_and_fingerprint(bundle, saved):
    again = Bundle.load(saved, device="cpu")
    assert same(bundle, again)
    assert (again.meta, again.dim, again.fingerprint) == (bundle.meta, 8, bundle.fingerprint)
    assert not any(p.requires_grad for tower in again.towers.values() for p in tower.parameters())


def test_it_can_be_saved_again_after_its_folder_is_gone(saved, tmp_path):
    again = Bundle.load(saved)
    shutil.rmtree(saved)
    again.save(tmp_path / "elsewhere")
    assert Bundle.load(tmp_path / "elsewhere").fingerprint == again.fingerprint


def test_a_run_folder_that_holds_one_will_do(saved):
    assert same(Bundle.load(saved.parent), Bundle.load(saved))


def test_embeddings_are_unit_rows_in_order_whatever_the_batch(bundle):
    z = bundle.encode(pictures(5), batch_size=2)
    assert z.shape == (5, 8) and z.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(z, np.concatenate([bundle.encode([picture]) for picture in pictures(5)]), atol=1e-5)
    assert bundle.encode([]).shape == (0, 8)


def test_a_picture_is_the_same_as_array_bytes_file_and_pil(bundle, tmp_path):
    array = pictures(1)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    forms = [array, (tmp_path / "a.png").read_bytes(), tmp_path / "a.png", Image.fromarray(array)]
    z = bundle.encode(forms)
    assert (z == z[0]).all()


def test_what_it_cannot_embed_is_told(bundle, tmp_path):
    with pytest.raises(UsageError, match="A file is a Path"):
        bundle.encode(["a red boat", tmp_path / "a.png"])
    with pytest.raises(DecodeError, match=r"nothing\.png: no such file"):
        bundle.encode([tmp_path / "nothing.png"])
    with pytest.raises(UsageError, match="no text tower, only image"):
        Bundle({"image": bundle.towers["image"]}).encode(["a red boat"])


def test_towers_of_different_spaces_are_no_bundle(bundle):
    image, text = bundle.towers["image"], bundle.towers["text"]
    with pytest.raises(UsageError, match=r"\[8, 16\]"):
        Bundle({"image": image, "text": text.encoder})
    with pytest.raises(UsageError, match="TextEncoder as its 'image' tower"):
        Bundle({"image": text})


def test_a_head_makes_another_encoder_and_no_head_does_not(bundle):
    tower = bundle.towers["image"]
    assert Tower(tower.encoder).fingerprint() == fingerprint(tower.encoder) != bundle.tower_fingerprint("image")
    assert bundle.fingerprint != Bundle({"image": tower}).fingerprint


def test_saving_during_training_changes_nothing_of_the_training(bundle, tmp_path):
    tower = Tower(image_encoder("timm:resnet18/4", small_stem=True)).train()
    before = torch.get_rng_state()
    Bundle({"image": tower}).save(tmp_path / "b")
    assert all(layer.training for layer in tower.modules()) and all(p.requires_grad for p in tower.parameters())
    Bundle.load(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def headed(tmp_path):
    torch.manual_seed(0)
    image = image_encoder("timm:resnet18/4", small_stem=True)
    bundle = Bundle({"image": image}, heads={"image": mlp(image.dim, 24, 8, last_norm=True)})
    bundle.save(tmp_path / "headed")
    return bundle, tmp_path / "headed"


def test_a_training_head_is_kept_apart_and_changes_nothing(headed):
    bundle, folder = headed
    assert bundle.fingerprint == Bundle({"image": bundle.towers["image"]}).fingerprint
    plain, whole = Bundle.load(folder, device="cpu"), Bundle.load(folder, device="cpu", heads=True)
    assert not plain.heads
    assert whole.heads["image"].encoder is whole.towers["image"].encoder
    assert whole.heads["image"].fingerprint() == bundle.heads["image"].fingerprint()
    assert (plain.dim, plain.fingerprint) == (whole.dim, whole.fingerprint) == (32, bundle.fingerprint)
    assert np.array_equal(plain.encode(pictures()), whole.encode(pictures()))
    (folder / "image.head.safetensors").unlink()
    assert Bundle.load(folder).fingerprint == bundle.fingerprint
    with pytest.raises(BundleError, match=r"image\.head\.safetensors is missing"):
        Bundle.load(folder, heads=True)


def test_a_changed_training_head_is_noticed(headed):
    folder = headed[1]
    content = bytearray((folder / "image.head.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "image.head.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"image\.head\.safetensors.*is not what was saved"):
        Bundle.load(folder, heads=True)


def test_a_bundle_from_before_there_were_training_heads_loads(headed):
    folder = headed[1]
    record = json.loads((folder / "bundle.json").read_text())
    del record["heads"]
    (folder / "bundle.json").write_text(json.dumps(record))
    assert Bundle.load(folder, heads=True).heads == {}


def test_a_training_head_needs_a_tower_without_one(bundle):
    with pytest.raises(UsageError, match="'image' is none"):
        Bundle({"image": bundle.towers["image"]}, heads={"image": mlp(8, 8, 8)})
    with pytest.raises(UsageError, match="'text' is none"):
        Bundle({"image": bundle.towers["image"]}, heads={"text": mlp(8, 8, 8)})


@pytest.mark.parametrize(
    "file", ["bundle.json", "image.safetensors", "text.safetensors", "text/vocab.txt", "text/config.json"]
)
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(BundleError, match=file.split("/")[0]):
        Bundle.load(saved)


@pytest.mark.parametrize("file", ["bundle.json", "image.safetensors", "text.safetensors", "text/config.json"])
def test_a_truncated_file_is_named(saved, file):
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match=file.split("/")[0]):
        Bundle.load(saved)


def test_one_changed_byte_of_the_weights_is_noticed(saved):
    content = bytearray((saved / "image.safetensors").read_bytes())
    content[-100] ^= 1
    (saved / "image.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"image\.safetensors.*is not what was saved"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"how": "pad"', '"how": "crop"'), ('"pooling": "mean"', '"pooling": "cls"'), ('"p": 0.2', '"p": 0.1')],
)
def test_an_edited_description_is_noticed(saved, before, after):
    text = (saved / "bundle.json").read_text()
    assert before in text
    (saved / "bundle.json").write_text(text.replace(before, after))
    with pytest.raises(BundleError, match="is not what was saved"):
        Bundle.load(saved)


def test_an_edited_vocabulary_is_noticed(saved):
    vocabulary = saved / "text" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("dog", "cat"))
    with pytest.raises(BundleError, match="is not what was saved"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"format": 1, "towers": {}, "meta": {}, "fingerprint": ""}', '{"format": 1, "towers": {"../x": {}}}'],
)
def test_json_that_is_no_bundle_is_told(saved, content):
    (saved / "bundle.json").write_text(content)
    with pytest.raises(BundleError, match=r"bundle\.json is damaged"):
        Bundle.load(saved)


def test_a_newer_format_asks_for_an_update(saved):
    record = json.loads((saved / "bundle.json").read_text())
    (saved / "bundle.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(BundleError, match="Update twofold"):
        Bundle.load(saved)


def test_no_code_of_the_folder_runs(saved, tmp_path):
    """`auto_map` is how a transformers folder asks for its own code, and a kernel's name for code from the hub."""
    (saved / "text" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nModel = Config")
    config = json.loads((saved / "text" / "config.json").read_text())
    asked = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Config", None]}
    kernel = {"attn_implementation": {"": "someone/kernel"}}
    for evil in ({"auto_map": asked}, {"auto_map": asked, "model_type": "of-its-own"}, kernel):
        (saved / "text" / "config.json").write_text(json.dumps(config | evil))
        with pytest.raises(BundleError, match="text"):
            Bundle.load(saved)
    assert not (tmp_path / "ran").exists()


def test_it_replaces_a_bundle_and_nothing_else(bundle, saved, tmp_path):
    smaller = Bundle({"image": bundle.towers["image"]})
    smaller.save(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["bundle.json", "image.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"precious")
    with pytest.raises(BundleError, match="no bundle, so it is left as it is"):
        smaller.save(tmp_path / "photos")
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"precious"


def test_a_save_that_fails_leaves_the_bundle_that_was_there(bundle, saved, monkeypatch):
    other = Bundle({"image": bundle.towers["image"]})
    monkeypatch.setattr(
        "twofold.models.bundle.write_atomically", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        other.save(saved)
    assert Bundle.load(saved).fingerprint == bundle.fingerprint
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_a_save_that_was_killed_between_its_renames_loses_nothing(bundle, saved):
    saved.rename(saved.with_name(".bundle.old"))
    assert Bundle.load(saved).fingerprint == bundle.fingerprint
    Bundle({"image": bundle.towers["image"]}).save(saved)
    assert set(Bundle.load(saved).towers) == {"image"}
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_it_loads_without_a_network_and_without_method_code(saved):
    code = f"""
import socket, sys
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from twofold.models.bundle import Bundle
print(Bundle.load({str(saved)!r}, device="cpu").encode(["a red boat"]).shape)
assert not [name for name in sys.modules if name.startswith(("twofold.methods", "twofold.train", "chromadb"))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(1, 8)\n", done.stderr


def test_inference_on_a_loaded_bundle_is_repeatable(saved):
    bundle = Bundle.load(saved)
    with inference(bundle.towers["text"]):
        assert np.array_equal(bundle.encode(["a dog"]), bundle.encode(["a dog"]))


# --- any modality -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(bundle) -> Bundle:
    """Two towers that read, two that hear, one of vectors, under names of their own."""
    torch.manual_seed(0)
    text = bundle.towers["text"]
    return Bundle(
        {
            "code": Tower(bpe_encoder("bpe:tiny", ["def f(x):\n    return x", "x = f(1)"] * 3), nn.Linear(128, 8)),
            "docs": text,
            "speech": Tower(mel_encoder("mel:tiny", seconds=1), nn.Linear(128, 8)),
            "bird song": Tower(mel_encoder("mel:timm:resnet18/4", seconds=1), nn.Linear(32, 8)),
            "dino": Tower(VectorEncoder(5), nn.Linear(5, 8)),
        }
    )


def items() -> dict[str, list]:
    draw = np.random.default_rng(0)
    sounds = [draw.normal(0, 0.1, n).astype(np.float32) for n in (400, 9000, 30_000)]
    texts = ["def g(y):\n\treturn f(y)  # 🙂", "", "a red boat"]
    vectors = list(draw.normal(size=(3, 5)))
    return {"code": texts, "docs": texts, "speech": sounds, "bird song": sounds, "dino": vectors}


def test_towers_of_any_name_and_kind_come_back(several, tmp_path):
    several.save(tmp_path / "bundle")
    again = Bundle.load(tmp_path / "bundle", device="cpu")
    assert again.fingerprint == several.fingerprint
    kinds = {name: tower.kind for name, tower in again.towers.items()}
    assert kinds == {"code": "text", "docs": "text", "speech": "audio", "bird song": "audio", "dino": "vector"}
    for name, some in items().items():
        z = several.encode(some, modality=name)
        assert np.array_equal(again.encode(some, modality=name), z)
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)


def test_a_bundle_of_the_first_format_loads(saved, bundle):
    """It had no kinds; the fingerprints are what that version wrote."""
    record = json.loads((saved / "bundle.json").read_text())
    record["format"] = 1
    for about in record["towers"].values():
        del about["kind"]
    (saved / "bundle.json").write_text(json.dumps(record))
    assert same(Bundle.load(saved), bundle)


def test_an_item_goes_to_the_tower_of_its_kind_where_there_is_one_such(several, bundle, tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "a.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 8000), 900, np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    one = Bundle({"docs": bundle.towers["text"], "photo": bundle.towers["image"], "speech": several.towers["speech"]})
    for some, name in ((["a dog"], "docs"), (pictures(), "photo"), ([tmp_path / "a.wav"], "speech")):
        assert np.array_equal(one.encode(some), one.encode(some, modality=name))
    with pytest.raises(UsageError, match="several towers for text: say modality=code or modality=docs"):
        several.encode(["a dog"])
    with pytest.raises(UsageError, match="no image tower"):
        several.encode(pictures())
    with pytest.raises(UsageError, match="no video tower"):
        several.encode(pictures(), modality="video")


def test_a_name_that_is_no_file_name_or_another_kind_is_refused(bundle):
    for name in ("a/b", "../x", "a.head", "", "-x"):
        with pytest.raises(UsageError, match="cannot name a tower"):
            Bundle({name: bundle.towers["text"]})
    with pytest.raises(UsageError, match="TextEncoder as its 'audio' tower"):
        Bundle({"audio": bundle.towers["text"]})


@pytest.mark.parametrize(
    ("before", "after"),
    [('"kind": "vector"', '"kind": "audio"'), ('"seconds": 1', '"seconds": 2'), ('"dim": 5', '"dim": 6')],
)
def test_an_edited_tower_of_another_kind_is_noticed(several, tmp_path, before, after):
    several.save(tmp_path / "bundle")
    text = (tmp_path / "bundle" / "bundle.json").read_text()
    assert before in text
    (tmp_path / "bundle" / "bundle.json").write_text(text.replace(before, after))
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "bundle")
