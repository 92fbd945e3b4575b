"""Vision transformers as tokens: what is not kept is not computed; positions, patches, and the predictor over them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from twofold import runtime
from twofold.errors import UsageError
from twofold.models.bundle import Bundle
from twofold.models.encoders import ImageEncoder, image_encoder
from twofold.models.predictor import Blocks, Predictor, sincos
from twofold.models.tokens import Tokens, patches
from twofold.views.masks import random, taken

SIZE = 32


def tokens(name: str = "timm:vit_tiny_patch16_224/4x32x3", **options) -> Tokens:
    torch.manual_seed(0)
    return Tokens(image_encoder(name, **{"size": SIZE, "pretrained": False} | options)).eval()


def pictures(n: int = 3, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def flops(run, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:vit_tiny_patch16_224/4x32x3", {}),
        ("timm:vit_tiny_patch16_224/16", {"size": 48, "channels": 1}),
        ("timm:vit_tiny_patch16_224", {"size": 64, "channels": 13}),  # a class token, learned positions
        ("timm:vit_small_patch14_reg4_dinov2", {"size": 28}),  # registers too
    ],
)
def test_what_is_hidden_changes_nothing_of_what_is_seen(name, options):
    model = tokens(name, **options)
    x = pictures(channels=model.encoder.channels, size=model.encoder.size)
    keep, hidden = random(3, model.cells, share=0.5, draw=runtime.generator(0))
    noise = patches(torch.rand_like(x), model.patch)
    pixels = patches(x, model.patch).scatter(1, hidden[:, 0, :, None].expand(-1, -1, noise.shape[2]), noise)
    back = pixels.view(3, *model.grid, *model.patch, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
    assert not torch.equal(x, back)
    torch.testing.assert_close(model(x, keep), model(back, keep))


def test_all_patches_kept_are_the_tokens_that_timm_computes():
    model, x = tokens("timm:vit_tiny_patch16_224", size=48), pictures(size=48)
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    own = model.encoder.body.forward_features(model.standard(x))[:, 1:]
    torch.testing.assert_close(model(x), own)
    torch.testing.assert_close(model(x, order), taken(own, order))
    torch.testing.assert_close(model.layers(x, [11])[0], own)


def test_a_transformer_in_patches_gives_the_average_of_its_tokens():
    model, x = tokens(), pictures()
    assert (model.grid, model.patch, model.dim, model.depth, model.cells) == ((8, 8), (4, 4), 32, 3, 64)
    torch.testing.assert_close(model(x).mean(1), model.encoder(x))
    assert [layer.shape for layer in model.layers(x, [0, 2])] == [(3, 64, 32)] * 2
    torch.testing.assert_close(model.layers(x, [2])[0], model(x))


def test_masked_patches_are_never_computed():
    """At a quarter of 256 patches, all that blocks do per token is a quarter, and attention a sixteenth."""
    model, x = tokens("timm:vit_tiny_patch16_224/4x64x4", size=64), pictures(2, size=64)
    keep, _ = random(2, 256, share=0.75, draw=runtime.generator(0))
    n, d, depth, b = 256, 64, 4, 2

    def blocks(n: int) -> int:
        return b * depth * (24 * n * d * d + 4 * n * n * d)  # qkv, projection, MLP; then QKᵀ and its product with V

    embedding = b * 2 * n * d * 4 * 4 * 3
    assert flops(model, x) == blocks(n) + embedding
    assert flops(model, x, keep) == blocks(n // 4) + embedding
    assert flops(model, x, keep) / flops(model, x) < 0.22


def test_patches_are_the_pixels_of_each_cell_row_by_row():
    x = pictures(2, channels=2, size=12)
    found = patches(x, (4, 6))
    assert found.shape == (2, 6, 48)
    torch.testing.assert_close(found[1, 3], x[1, :, 4:8, 6:12].permute(1, 2, 0).flatten())


def test_positions_are_different_and_near_ones_alike():
    for grid in ((8, 8), (4, 6, 6), (50,)):
        places = nn.functional.normalize(sincos(grid, 48), dim=1)
        cosines = places @ places.T
        assert (cosines - torch.eye(len(places))).max() < 0.9999
        assert cosines[0, 1] > cosines[0, grid[-1] - 1]
    x = sincos((3, 5), 8)  # by hand: row 2, column 4, two waves an axis
    expected = [f(at * w) for at in (2, 4) for f in (np.sin, np.cos) for w in (1, 1e-2)]
    torch.testing.assert_close(x[14], torch.tensor(expected, dtype=torch.float32))


def test_the_encoder_travels_in_a_bundle(tmp_path):
    encoder = tokens("timm:vit_tiny_patch16_224/8x32x2").encoder
    Bundle({"image": encoder}).save(tmp_path / "bundle")
    again = Bundle.load(tmp_path / "bundle").towers["image"].encoder
    assert isinstance(again, ImageEncoder)
    torch.testing.assert_close(again(pictures()), encoder(pictures()))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_tiny_patch16_224/5", "4 pixels"),  # 5 does not divide 32
        ("timm:vit_tiny_patch16_224/4x32", "six blocks"),
        ("timm:vit_tiny_patch16_224/0", "4 pixels"),
        ("timm:resnet18/4x32x2", "no width"),
    ],
)
def test_a_shape_that_is_none_is_an_error_that_says_how_to_write_one(name, says):
    with pytest.raises(UsageError, match=says):
        image_encoder(name, size=SIZE)


@pytest.mark.parametrize(
    "name", ["timm:resnet10t", "timm:vit_pe_core_tiny_patch16_384", "timm:swin_tiny_patch4_window7_224"]
)
def test_what_is_no_plain_transformer_is_refused_and_one_is_named(name):
    size = {"size": 64} if name == "timm:resnet10t" else {}
    with pytest.raises(UsageError, match="plain vision transformer, such as timm:vit_tiny_patch16_224/4"):
        Tokens(image_encoder(name, pretrained=False, **size))


# The predictor


def predictor(grid=(4, 4), depth: int = 2) -> Predictor:
    torch.manual_seed(0)
    return Predictor(Blocks(depth, 32, 2), dim=12, out=5, grid=grid).eval()


def seen(n: int = 2, kept: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:kept] for i in range(n)])
    return torch.randn(n, kept, 12, generator=torch.Generator().manual_seed(9)), keep


def test_parts_are_predicted_apart_from_each_other():
    model, (x, keep) = predictor(), seen()
    hidden = torch.randint(16, (2, 3, 4), generator=torch.Generator().manual_seed(5))
    together = model(x, keep, hidden)
    assert together.shape == (2, 3, 4, 5)
    for part in range(3):
        torch.testing.assert_close(together[:, part], model(x, keep, hidden[:, part : part + 1])[:, 0])


def test_the_order_of_what_is_seen_and_of_what_is_asked_says_nothing():
    model, (x, keep) = predictor(), seen()
    hidden, order = torch.tensor([[[1, 5, 9]], [[0, 2, 15]]]), torch.tensor([4, 0, 5, 2, 1, 3])
    first = model(x, keep, hidden)
    torch.testing.assert_close(first, model(x[:, order], keep[:, order], hidden))
    torch.testing.assert_close(first[:, :, [2, 0, 1]], model(x, keep, hidden[:, :, [2, 0, 1]]))


def test_the_place_that_is_asked_for_and_those_seen_matter():
    model, (x, keep) = predictor(), seen()
    answers = model(x, keep, torch.arange(16).expand(2, 1, 16))
    assert torch.pdist(answers[0, 0]).min() > 1e-3
    assert not torch.allclose(answers, model(x, keep.roll(1, 1), torch.arange(16).expand(2, 1, 16)), atol=1e-3)


def test_blocks_that_cannot_be_are_refused():
    for wrong in ((0, 32, 2), (2, 32, 3), (2, 0, 1)):
        with pytest.raises(UsageError, match="heads"):
            Blocks(*wrong)
    with pytest.raises(UsageError, match="width of 6"):
        sincos((2, 2, 2), 4)
