"""A bundle's towers in the forms of other libraries, each exact or refused.

onnx                    one graph a tower: pixels 0..1 [b, c, size, size], or input_ids and attention_mask [b, n], to
                        unit vectors [b, dim]; normalisation inside, batch and length free
timm                    the picture encoder without its head, as a folder for timm.create_model("local-dir:…")
sentence-transformers   the text tower with its head, as a folder for SentenceTransformer(…)
"""

import copy
import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from twofold.data.atomic import write_atomically
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.bundle import Bundle, Tower
from twofold.models.encoders import ImageEncoder, TextEncoder, inference
from twofold.models.fast import examples, export_graph, session
from twofold.models.heads import Standardize

Target = Literal["onnx", "timm", "sentence-transformers"]
TOLERANCE = 1e-4  # between what is exported and the bundle, in any number of a unit vector


class Dense(NamedTuple):
    """x ↦ activation(weight · x + bias): what a head becomes in evaluation mode."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, "out"]
    activation: type[nn.Module]


def export(bundle: Bundle, target: str, out: Path | str) -> list[Path]:
    """Write the bundle for another library; what was written. UsageError for what the target cannot hold exactly."""
    out = Path(out)
    if target not in get_args(Target):
        raise unknown("target of an export", target, get_args(Target))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. An export goes to a new or empty folder.")
    writers = {"onnx": _onnx, "timm": _timm, "sentence-transformers": _sentence_transformers}
    try:
        return writers[target](bundle, out)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # half an export is none
        raise


def folded(head: nn.Module, dim: int) -> list[Dense]:
    """A head on features of width `dim` as affine maps with activations between; [] where it is the identity.

    Statistics of BatchNorm and Standardize are constants once training is over, so they go into the maps. UsageError
    for layers that are not affine otherwise, such as LayerNorm.
    """
    start = (torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64))
    weight, bias = start
    stages: list[Dense] = []
    changed = False
    for layer in _flat(head):
        if isinstance(layer, nn.Identity | nn.Dropout):
            continue
        changed = True
        if isinstance(layer, nn.ReLU | nn.GELU):
            stages.append(Dense(weight.float(), bias.float(), type(layer)))
            width = len(bias)
            weight, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            changed = False
            continue
        scale, shift = _affine(layer)
        weight = scale @ weight if scale.ndim == 2 else scale[:, None] * weight
        bias = (scale @ bias if scale.ndim == 2 else scale * bias) + shift
    if changed:
        stages.append(Dense(weight.float(), bias.float(), nn.Identity))
    return stages


def _flat(head: nn.Module) -> list[nn.Module]:
    return [inner for layer in head for inner in _flat(layer)] if isinstance(head, nn.Sequential) else [head]


def _affine(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Matrix (or its diagonal) and shift of a layer in evaluation mode, in float64."""
    if isinstance(layer, nn.Linear):
        weight = layer.weight.detach().cpu().double()
        return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu().double()
    if isinstance(layer, Standardize):
        scale = 1 / layer.std.cpu().double()
        return scale, -layer.mean.cpu().double() * scale
    if isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None and layer.running_var is not None:
        scale = (layer.running_var.cpu().double() + layer.eps) ** -0.5
        if layer.affine:
            scale = scale * layer.weight.detach().cpu().double()
        shift = -layer.running_mean.cpu().double() * scale
        return scale, shift + layer.bias.detach().cpu().double() if layer.affine else shift
    raise UsageError(
        f"The head has a {type(layer).__name__}, which is no affine map; other libraries' dense layers cannot hold it. "
        "Export to onnx, which can."
    )


# -- ONNX -------------------------------------------------------------------------------------------------------------


class _Unit(nn.Module):
    """A tower that gives unit vectors, with tokens as two arguments: a graph has no dictionaries."""

    def __init__(self, tower: Tower):
        super().__init__()
        self.tower = tower

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(("input_ids", "attention_mask"), inputs, strict=True)) if len(inputs) > 1 else inputs[0]
        return nn.functional.normalize(self.tower(named), dim=1)


def _onnx(bundle: Bundle, out: Path) -> list[Path]:
    written = []
    for name, tower in bundle.towers.items():
        encoder = tower.encoder
        if not isinstance(encoder, ImageEncoder | TextEncoder):
            raise UsageError(f"Graphs are made of towers for pictures and texts; the {name} tower takes {tower.kind}s.")
        unit = _Unit(copy.deepcopy(tower).cpu().eval())
        path = out / f"{name}.onnx"
        try:
            export_graph(unit, examples(encoder, 2), path, output="vector")
        except (RuntimeError, ValueError, TypeError) as error:
            raise BundleError(f"No graph can be made of the {name} tower: {error}") from error
        inputs = examples(encoder, 3)  # of another batch size than the graph was made with
        with inference(unit):
            expected = unit(*inputs.values())
        off = float((session(path)(inputs) - expected).abs().max())
        if not off <= TOLERANCE:
            raise BundleError(
                f"The graph of the {name} tower is off by {off:.1e} in a number of a unit vector; not kept."
            )
        written.append(path)
        if isinstance(encoder, TextEncoder):
            written += _keep(encoder.files, out / name)
    return written


# -- timm -------------------------------------------------------------------------------------------------------------


def _timm(bundle: Bundle, out: Path) -> list[Path]:
    encoder = bundle.tower("image").encoder
    if not isinstance(encoder, ImageEncoder):
        raise UsageError("timm takes networks for pictures; the image tower of this bundle is none of timm's.")
    body: Any = encoder.body
    name, _, width = encoder.spec["name"].removeprefix("timm:").removesuffix("@untrained").partition("/")
    if encoder.spec.get("small_stem") or (width and not width.isdecimal()) or not hasattr(body, "pretrained_cfg"):
        raise UsageError(f"{encoder.spec['name']} with its small stem or patches has no name in timm. Export to onnx.")
    arguments: dict[str, Any] = {"in_chans": encoder.channels}
    if width:
        arguments["channels"] = [int(width) * 2**stage for stage in range(4)]
    if body.pretrained_cfg.get("fixed_input_size"):
        arguments["img_size"] = encoder.size
    config = {
        "architecture": body.pretrained_cfg.get("architecture") or name,
        "num_classes": 0,
        "num_features": encoder.dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "mean": encoder.mean.flatten().tolist(),
            "std": encoder.std.flatten().tolist(),
            "input_size": [encoder.channels, encoder.size, encoder.size],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": 0,
            **{key: body.pretrained_cfg[key] for key in ("classifier", "first_conv") if key in body.pretrained_cfg},
        },
    }
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in body.state_dict().items()}
    write_atomically(out / "model.safetensors", partial(save_file, weights))
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(out / "config.json", partial(Path.write_text, data=text, encoding="utf-8"))
    _compare_timm(encoder, out)
    return [out / "config.json", out / "model.safetensors"]


def _compare_timm(encoder: ImageEncoder, folder: Path) -> None:
    import timm

    pixels = examples(encoder, 2)["pixels"]
    with inference(encoder), torch.random.fork_rng(devices=[]), torch.no_grad():
        made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        mean, std = encoder.mean.cpu(), encoder.std.cpu()
        expected = copy.deepcopy(encoder).cpu()(pixels)
        off = (made((pixels - mean) / std) - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    if not off <= TOLERANCE:
        raise BundleError(
            f"timm makes a network of {folder} that is off by {off:.1e} of the largest feature; not kept."
        )


# -- sentence-transformers --------------------------------------------------------------------------------------------


def _sentence_transformers(bundle: Bundle, out: Path) -> list[Path]:
    tower = bundle.tower("text")
    encoder = tower.encoder
    if not isinstance(encoder, TextEncoder):
        raise UsageError("sentence-transformers takes transformers' text models; this text tower is none.")
    stages = folded(tower.head, encoder.dim)
    written = _keep(encoder.files, out)
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in encoder.body.state_dict().items()}
    write_atomically(out / "model.safetensors", partial(save_file, weights, metadata={"format": "pt"}))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    mean = encoder.spec["pooling"] == "mean"
    files: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": encoder.spec["max_length"], "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.dim,
            "pooling_mode_mean_tokens": mean,
            "pooling_mode_cls_token": not mean,
        },
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    for stage in stages:
        place = f"{len(modules)}_Dense"
        modules.append((place, "Dense"))
        files[f"{place}/config.json"] = {
            "in_features": stage.weight.shape[1],
            "out_features": stage.weight.shape[0],
            "bias": True,
            "activation_function": _named(stage.activation),
        }
        layer = {"linear.weight": stage.weight.contiguous(), "linear.bias": stage.bias}
        write_atomically(out / place / "model.safetensors", partial(save_file, layer))
        written.append(out / place / "model.safetensors")
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    files["modules.json"] = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(modules)
    ]
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(out / name, partial(Path.write_text, data=text, encoding="utf-8"))
        written.append(out / name)
    (out / modules[-1][0]).mkdir(exist_ok=True)
    return [*written, out / "model.safetensors"]


def _named(activation: type[nn.Module]) -> str:
    """Where sentence-transformers finds an activation, as it writes it itself."""
    return f"{activation.__module__}.{activation.__name__}"


def _keep(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    for name, content in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=content))
    return [folder / name for name in files]
