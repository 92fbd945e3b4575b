"""The towers of an open_clip folder are that model's, through open_clip's own loader, and survive in a bundle."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from twofold.errors import BundleError, UsageError
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import encoder, fingerprint, inference
from twofold.models.texts import learn_bpe

TEXTS = ["a red boat at dusk", "two dogs", "", "naïve café 🙂 " * 60]
SEEN = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
SIGHT = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
WORDS = {"width": 32, "layers": 1, "heads": 2, "context_length": 16}


def write_model(folder: Path, model: dict, tokenizer: object = None, config: dict | None = None) -> Path:
    """An untrained model as open_clip would have pushed it to the hub."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": SEEN}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
    text = dict(model["text_cfg"])
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    custom = model.get("custom_text") or "hf_model_name" in text
    made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(model["embed_dim"], model["vision_cfg"], text)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """CLIP with OpenAI's tokenizer, SigLIP on timm with a tokenizer of its own, CLIP with a text tower of BERT."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    bpe = learn_bpe(TEXTS, tokens=300)
    count = bpe.get_vocab_size()
    timm_sight = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    siglip = {**WORDS, "vocab_size": count, "hf_tokenizer_name": "timm/nowhere", "no_causal_mask": True}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bert = {"model_type": "bert", "vocab_size": count, "max_position_embeddings": 32, **shape}
    reading = {"hf_model_name": "owner/nowhere", "hf_tokenizer_name": "owner/nowhere", "context_length": 16}
    return {
        "clip": write_model(root / "clip", {"embed_dim": 24, "vision_cfg": SIGHT, "text_cfg": WORDS}),
        "siglip": write_model(
            root / "siglip",
            {
                "embed_dim": 24,
                "custom_text": True,
                "init_logit_bias": -10,
                "vision_cfg": timm_sight,
                "text_cfg": {**siglip, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}},
            },
            bpe,
        ),
        "bert": write_model(
            root / "bert", {"embed_dim": 24, "vision_cfg": SIGHT, "text_cfg": {**reading}}, bpe, config=bert
        ),
    }


def reference(folder: Path) -> nn.Module:
    """What open_clip itself makes of the folder; a text tower of transformers needs its configuration's place."""
    about = json.loads((folder / "open_clip_config.json").read_text())
    if "hf_model_name" in about["model_cfg"]["text_cfg"]:
        copy = folder.with_name(folder.name + "-reference")
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        about["model_cfg"]["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        (copy / "open_clip_config.json").write_text(json.dumps(about))
        folder = copy
    return open_clip.create_model(f"local-dir:{folder}").eval()


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_features_are_those_of_open_clip(folders, name):
    folder = folders[name]
    model, tokenizer = reference(folder), open_clip.get_tokenizer(f"local-dir:{folder}")
    sees, reads = (encoder(f"open_clip:{folder}", kind) for kind in ("image", "text"))
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(SEEN[key]).view(3, 1, 1) for key in ("mean", "std"))
    with inference(sees, reads), torch.no_grad():
        torch.testing.assert_close(sees(x), model.encode_image((x - mean) / std))
        torch.testing.assert_close(reads(reads.inputs(TEXTS)), model.encode_text(tokenizer(TEXTS)))
    assert (sees.kind, reads.kind, sees.dim, reads.dim, sees.size, sees.how) == ("image", "text", 24, 24, 32, "stretch")


@pytest.mark.parametrize("name", ["clip", "siglip", "bert"])
def test_a_bundle_needs_the_folder_no_more(folders, name, tmp_path):
    shutil.copytree(folders[name], tmp_path / "model")
    towers = {kind: encoder(f"open_clip:{tmp_path / 'model'}", kind) for kind in ("image", "text")}
    bundle = Bundle({**towers, "code": Tower(towers["text"], nn.Linear(24, 24))})
    bundle.save(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "model")
    again = Bundle.load(tmp_path / "bundle", device="cpu")
    assert again.fingerprint == bundle.fingerprint
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    for items, modality in (([picture], "image"), (TEXTS, "text"), (TEXTS, "code")):
        assert np.array_equal(again.encode(items, modality=modality), bundle.encode(items, modality=modality))
    read = encoder(f"local:{tmp_path / 'bundle'}@text")
    assert fingerprint(read) == fingerprint(towers["text"])


def test_an_edited_tokenizer_is_noticed(folders, tmp_path):
    Bundle({"text": encoder(f"open_clip:{folders['siglip']}", "text")}).save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "text" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("[PAD]", "[CLS]"))
    with pytest.raises(BundleError, match="is not what was saved"):
        Bundle.load(tmp_path / "bundle")


def test_which_half_and_which_weights_must_be_said():
    with pytest.raises(UsageError, match="two towers"):
        encoder("open_clip:ViT-B-32")
    with pytest.raises(UsageError, match=r"which weights\. There are: .*open_clip:ViT-B-32@laion2b_s34b_b79k"):
        encoder("open_clip:ViT-B-32", "image")
    with pytest.raises(UsageError, match="Did you mean 'ViT-B-16-SigLIP2-256'"):
        encoder("open_clip:ViT-B-16-SigLip2-256", "text")
    with pytest.raises(UsageError, match="Did you mean 'laion2b_s34b_b79k'"):
        encoder("open_clip:ViT-B-32@laion2b_s34b", "image")


def test_a_name_leads_to_its_repository_on_the_hub(monkeypatch, tmp_path, folders):
    """The cache of the hub is a folder, in which the tiny model is put under the large one's name."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--timm--ViT-B-16-SigLIP2-256"
    shutil.copytree(folders["siglip"], place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    for name in ("open_clip:ViT-B-16-SigLIP2-256", "open_clip:timm/ViT-B-16-SigLIP2-256"):
        read = encoder(name, "text")
        assert read.spec["name"] == "open_clip:ViT-B-16-SigLIP2-256"
        local = encoder(f"open_clip:{folders['siglip']}", "text")
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), local.parameters(), strict=True))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(BundleError, match=r"laion/CLIP-ViT-B-32-laion2B-s34B-b79K .* cannot be fetched"):
        encoder("open_clip:ViT-B-32@laion2b_s34b_b79k", "image")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"multimodal_cfg": {}}, "CoCa"),
        ({"vision_cfg": {**SIGHT, "image_size": [32, 48]}}, "square"),
        ({"vision_cfg": {**SIGHT, "timm_model_name": "hf-hub:someone/model"}}, "timm has no model"),
        ({"text_cfg": {**WORDS, "tokenizer_kwargs": {"trust_remote_code": True}}}, "asks for trust_remote_code"),
        ({"embed_dim": None}, "not a readable open_clip model"),
        ({"text_cfg": {**WORDS, "width": 16}}, "does not hold this model's weights"),
    ],
)
def test_what_would_be_got_wrong_or_run_code_is_refused(folders, tmp_path, change, told):
    shutil.copytree(folders["clip"], tmp_path / "model")
    path = tmp_path / "model" / "open_clip_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "model_cfg": {**about["model_cfg"], **change}}))
    kind = "text" if "text_cfg" in change else "image"
    with pytest.raises((BundleError, UsageError), match=told):
        encoder(f"open_clip:{tmp_path / 'model'}", kind)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused_without_asking(folders, tmp_path, file):
    shutil.copytree(folders["bert"], tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(BundleError, match="asks to run code of its own"):
        encoder(f"open_clip:{tmp_path / 'model'}", "text")


def test_missing_weights_are_named(folders, tmp_path):
    shutil.copytree(folders["clip"], tmp_path / "model")
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"open_clip_model\.safetensors is missing\. Only safetensors"):
        encoder(f"open_clip:{tmp_path / 'model'}", "image")
