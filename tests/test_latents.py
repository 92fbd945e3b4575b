"""The methods that predict what a mask hides: MAE pixels, I-JEPA and V-JEPA the tokens of a target that follows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twofold import runtime
from twofold.errors import UsageError
from twofold.methods import IJEPA, MAE, VJEPA
from twofold.methods.vjepa import LONG, SHORT, alike
from twofold.models.encoders import image_encoder
from twofold.models.predictor import Blocks
from twofold.models.tokens import ClipTokens, Tokens, patches, tubelets
from twofold.objectives import latent_regression, masked_pixels, masked_pixels_chance, token_variance
from twofold.train.loop import fit
from twofold.views import NONE, SIMCLR_CIFAR
from twofold.views.masks import ahead, multiblock, random, taken

SIZE, SHAPE = 16, Blocks(1, 16, 2)
SAME = (replace(NONE, size=SIZE),)


def encoder():
    torch.manual_seed(0)
    return image_encoder("timm:vit_tiny_patch16_224/4x16x2", size=SIZE)


def mae(**options) -> MAE:
    return MAE(encoder(), policies=SAME, decoder=SHAPE, **options)


def ijepa(**options) -> IJEPA:
    return IJEPA(encoder(), policies=SAME, predictor=SHAPE, **options)


def pictures(n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"image": torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Objectives


def test_masked_pixels_is_the_error_against_each_patch_normalised_with_unbiased_variance():
    p, pixels = noise(2, 3, 4, seed=1), 0.2 * noise(2, 3, 4, seed=2) + 0.5
    for sample in range(2):
        errors = []
        for mine, patch in zip(p[sample], pixels[sample], strict=True):
            mean = sum(patch) / 4
            variance = sum((value - mean) ** 2 for value in patch) / 3
            errors += [(a - (b - mean) / (variance + 1e-6) ** 0.5) ** 2 for a, b in zip(mine, patch, strict=True)]
        torch.testing.assert_close(masked_pixels(p, pixels)[sample], sum(errors) / 12)


def test_painting_every_patch_in_its_mean_costs_the_chance_level_and_a_flat_patch_nothing():
    pixels = noise(5, 7, 48)
    costs = masked_pixels(torch.zeros_like(pixels), pixels)
    torch.testing.assert_close(costs, torch.full_like(costs, masked_pixels_chance(48)), rtol=1e-4, atol=0)
    assert masked_pixels(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.3)).item() < 1e-6


def test_brightness_and_contrast_of_a_patch_are_not_asked_for():
    p, pixels = noise(2, 3, 48, seed=1), 100 * noise(2, 3, 48, seed=2)
    torch.testing.assert_close(masked_pixels(p, pixels), masked_pixels(p, 3 * pixels + 50), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_latent_regression_is_smooth_l1_against_normalised_tokens(beta):
    p, h = 2 * noise(3, 2, 4, 6, seed=1), noise(3, 2, 4, 6, seed=2)
    normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    e = (p - normal).abs()
    expected = torch.where(e < beta, e**2 / (2 * beta or 1), e - beta / 2)
    torch.testing.assert_close(latent_regression(p, h, beta=beta), expected.flatten(1).mean(1))
    assert torch.autograd.gradcheck(lambda p: latent_regression(p, h, beta=beta), p.requires_grad_())


def test_token_variance_is_one_for_unrelated_tokens_and_zero_where_all_are_the_same():
    assert token_variance(noise(40, 50, 32)).item() == pytest.approx(1, abs=0.02)
    same = noise(1, 1, 32).expand(40, 50, 32)
    assert token_variance(same).item() < 1e-12
    assert token_variance(same * torch.linspace(1, 9, 40).view(-1, 1, 1)).item() < 1e-6  # they differ in length alone


@pytest.mark.parametrize("loss", [masked_pixels, latent_regression])
def test_shapes_that_do_not_fit_are_named(loss):
    for wrong in ((noise(2, 3, 4), noise(2, 3, 5)), (noise(4), noise(4)), (noise(0, 3, 4), noise(0, 3, 4))):
        with pytest.raises(ValueError, match="two \\[n, …, d\\]"):
            loss(*wrong)


def test_they_compute_in_float32_at_least():
    p, h = noise(2, 3, 8, seed=1), 300 * noise(2, 3, 8, seed=2)
    for loss in (masked_pixels, latent_regression):
        assert loss(p.bfloat16(), h.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(loss(p.bfloat16(), h.bfloat16()).double(), loss(p, h), rtol=0.1, atol=0.02)


# MAE


def test_maes_loss_is_of_the_hidden_patches_alone():
    method, batch = mae(), pictures()
    x = method.tokens.standard(batch["image"] / 255)
    keep, hidden = random(6, 16, share=0.75, draw=after_views(method, batch))
    pixels = patches(x, (4, 4))
    painted = method.decoder(method.tokens(batch["image"] / 255, keep), keep, hidden)
    expected = masked_pixels(painted, taken(pixels, hidden)).mean()
    out = method(batch, runtime.generator(0))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.z, method.tokens(batch["image"] / 255, keep).mean(1))
    assert out.z.shape == (6, 16) and out.chance == 47 / 48


def after_views(method, batch) -> torch.Generator:
    draw = runtime.generator(0)
    method.policies[0](batch["image"], draw)
    return draw


def test_mae_sees_a_quarter_and_the_share_can_be_another():
    seen = []
    for share in (0.75, 0.5):
        method = mae(share=share)
        method.tokens.register_forward_hook(lambda _, given, __: seen.append(given[1].shape))
        method(pictures(), runtime.generator(0))
    assert seen == [(6, 4), (6, 8)]


def test_what_is_painted_is_what_is_seen_and_where_hidden_what_the_decoder_says():
    method, x = mae(), pictures()["image"] / 255
    true = method.tokens.standard(x)

    class Perfect(torch.nn.Module):
        def forward(self, seen, keep, hidden):
            parts = taken(patches(true, (4, 4)), hidden)
            return (parts - parts.mean(-1, keepdim=True)) / parts.std(-1, keepdim=True)

    method.decoder = Perfect()
    seen, painted = method.paint(x, runtime.generator(0))
    torch.testing.assert_close(painted, x, rtol=1e-4, atol=1e-5)
    grey = (patches(seen, (4, 4)) == 0.5).all(-1)
    assert grey.sum(1).tolist() == [12] * 6
    assert torch.equal(patches(seen, (4, 4))[~grey], patches(x, (4, 4))[~grey])


# I-JEPA


def test_ijepas_targets_are_the_targets_tokens_of_the_whole_picture_without_gradient():
    method, batch = ijepa(), pictures()
    with torch.no_grad():
        for p in method.target.parameters():
            p += 0.1 * torch.randn_like(p)  # so that target and encoder differ
    x = batch["image"] / 255
    keep, hidden = multiblock(6, (4, 4), draw=after_views(method, batch))
    h = method.target(x)
    expected = F.smooth_l1_loss(
        method.predictor(method.tokens(x, keep), keep, hidden), F.layer_norm(taken(h, hidden), (16,))
    )
    out = method(batch, runtime.generator(0))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.z, h.mean(1))
    torch.testing.assert_close(out.z, method.towers()["image"](x))  # what is watched is what is kept
    out.loss.backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None for p in method.tokens.parameters())


def test_the_target_follows_with_a_momentum_that_rises_to_one_in_a_line():
    method = ijepa(momentum=0.9)
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        with torch.no_grad():
            for p in method.tokens.parameters():
                p += 1
        before = [p.clone() for p in method.target.parameters()]
        method.after_step(progress)
        for now, was, own in zip(method.target.parameters(), before, method.tokens.parameters(), strict=True):
            torch.testing.assert_close(now, momentum * was + (1 - momentum) * own)


def test_a_target_that_says_the_same_everywhere_shows_in_the_log():
    method = ijepa()
    healthy = method(pictures(), runtime.generator(0)).parts["target_variance"]
    with torch.no_grad():
        method.target.copy.encoder.body.norm.weight.zero_()
        method.target.copy.encoder.body.norm.bias.normal_()
    collapsed = method(pictures(), runtime.generator(0)).parts["target_variance"]
    assert healthy > 0.1
    assert collapsed < 1e-6


def test_ijepas_pixels_are_maes_error_of_the_same_blocks_beside_the_tokens():
    method, batch = ijepa(pixels=0.5), pictures()
    x = batch["image"] / 255
    keep, hidden = multiblock(6, (4, 4), draw=after_views(method, batch))
    answers = method.predictor(method.tokens(x, keep), keep, hidden)
    assert answers.shape[-1] == 16 + 48
    tokens = latent_regression(answers[..., :16], taken(method.target(x), hidden)).mean()
    pixels = masked_pixels(answers[..., 16:], taken(patches(method.tokens.standard(x), (4, 4)), hidden)).mean()
    out = method(batch, runtime.generator(0))
    torch.testing.assert_close(out.loss, tokens + 0.5 * pixels)
    torch.testing.assert_close(out.parts["pixels"], pixels.detach())
    out.loss.backward()
    assert method.predictor.answer.weight.grad[16:].abs().sum() > 0


def test_a_share_hides_the_patches_that_mae_hides_and_asks_for_them_in_one_part():
    method, batch = ijepa(share=0.75, pixels=1.0), pictures()
    x = batch["image"] / 255
    keep, hidden = random(6, 16, share=0.75, draw=after_views(method, batch))
    assert (keep.shape, hidden.shape) == ((6, 4), (6, 1, 12))
    answers = method.predictor(method.tokens(x, keep), keep, hidden)
    tokens = latent_regression(answers[..., :16], taken(method.target(x), hidden)).mean()
    pixels = masked_pixels(answers[..., 16:], taken(patches(method.tokens.standard(x), (4, 4)), hidden)).mean()
    torch.testing.assert_close(method(batch, runtime.generator(0)).loss, tokens + pixels)


@pytest.mark.parametrize("method", [mae, ijepa])
def test_a_batch_in_chunks_is_refused_since_no_samples_are_compared(method, tmp_path):
    class Batches:
        batch = 6

        def __getitem__(self, step: int) -> dict[str, Tensor]:
            return pictures()

    with pytest.raises(UsageError, match="compares no samples"):
        fit(method(), Batches(), steps=1, out=tmp_path, chunk=2, quiet=True)


def test_what_cannot_be_is_refused_when_it_is_built():
    with pytest.raises(UsageError, match="momentum"):
        ijepa(momentum=1.0)
    with pytest.raises(UsageError, match="pixels weighs"):
        ijepa(pixels=-1.0)
    with pytest.raises(UsageError, match="Of 16 patches"):
        mae(share=1.0)(pictures(), runtime.generator(0))
    with pytest.raises(UsageError, match="Of 16 patches"):
        ijepa(share=0.99)(pictures(), runtime.generator(0))
    with pytest.raises(UsageError, match="plain vision transformer"):
        MAE(image_encoder("timm:resnet10t", size=32))


# V-JEPA


def vjepa(**options) -> VJEPA:
    torch.manual_seed(0)
    picture = image_encoder("timm:vit_tiny_patch16_224/2x16x2", size=SIZE)
    return VJEPA(picture, policies=SAME, predictor=SHAPE, **{"frames": 4} | options)


def clips(n: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, 4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_token_of_a_clip_is_a_patch_of_a_tubelets_frames():
    model = vjepa().tokens
    assert (model.grid, model.cells) == ((2, 8, 8), 128)
    x = clips() / 255
    found = tubelets(x, model.grid)
    torch.testing.assert_close(found[1, 64 + 8 + 3], x[1, 2:4, :, 2:4, 6:8].flatten())


def test_a_still_clip_starts_as_the_picture_that_it_shows():
    """Before time has a position, the tokens of a clip in which nothing moves are those of the picture."""
    torch.manual_seed(0)
    picture = image_encoder("timm:vit_tiny_patch16_224/2x16x2", size=SIZE)
    model, x = ClipTokens(picture, frames=4), clips()[:, 0] / 255
    model.places.copy_(Tokens(picture).encoder.body.pos_embed[0].repeat(2, 1))
    still = model(x[:, None].expand(-1, 4, -1, -1, -1)).unflatten(1, (2, 64))
    torch.testing.assert_close(still[:, 0], Tokens(picture)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(still[:, 1], still[:, 0], rtol=1e-4, atol=1e-5)


def test_hidden_tubelets_change_nothing_of_what_is_seen():
    method = vjepa()
    keep, _ = SHORT(3, method.tokens.grid, draw=runtime.generator(0))
    x = clips() / 255
    other = torch.rand_like(x)
    seen = torch.zeros(3, 128, dtype=torch.bool).scatter(1, keep, True).view(3, 2, 8, 8)
    frames = seen.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, None]
    changed = torch.where(frames, x, other)
    assert not torch.equal(x, changed)
    torch.testing.assert_close(method.tokens(x, keep), method.tokens(changed, keep))


def test_vjepas_loss_is_the_mean_l1_behind_both_masks():
    method, batch = vjepa(), {"video": clips()}
    draw = runtime.generator(0)
    x, losses = alike(method.policies[0], batch["video"], draw), []
    for mask in (SHORT, LONG):
        keep, hidden = mask(3, method.tokens.grid, draw=draw)
        target = F.layer_norm(taken(method.target(x), hidden), (16,))
        losses.append((method.predictor(method.tokens(x, keep), keep, hidden) - target).abs().mean())
    torch.testing.assert_close(method(batch, runtime.generator(0)).loss, sum(losses) / 2)


def test_vjepas_pixels_are_those_of_the_tubes_both_frames_normalised_as_one_patch():
    method, batch = vjepa(pixels=2.0), {"video": clips()}
    draw = runtime.generator(0)
    x, losses = alike(method.policies[0], batch["video"], draw), []
    true = tubelets(method.tokens.standard(x), (2, 8, 8))
    for mask in (SHORT, LONG):
        keep, hidden = mask(3, method.tokens.grid, draw=draw)
        answers = method.predictor(method.tokens(x, keep), keep, hidden)
        tokens = latent_regression(answers[..., :16], taken(method.target(x), hidden), beta=0.0)
        losses.append((tokens + 2 * masked_pixels(answers[..., 16:], taken(true, hidden))).mean())
    assert answers.shape[-1] == 16 + 2 * 12
    torch.testing.assert_close(method(batch, runtime.generator(0)).loss, sum(losses) / 2)


def test_of_the_future_nothing_is_seen_and_all_of_it_is_asked_for():
    method, batch = vjepa(future=0.5, pixels=1.0), {"video": clips()}
    draw = runtime.generator(0)
    x = alike(method.policies[0], batch["video"], draw)
    past, later = (torch.arange(64).expand(3, -1) + start for start in (0, 64))
    answers = method.predictor(method.tokens(x, past), past, later[:, None])[:, 0]
    tokens = latent_regression(answers[..., :16], method.target(x)[:, 64:], beta=0.0)
    true = tubelets(method.tokens.standard(x), (2, 8, 8))[:, 64:]
    expected = (tokens + masked_pixels(answers[..., 16:], true)).mean()
    torch.testing.assert_close(method(batch, runtime.generator(0)).loss, expected)
    seen = x.clone()
    seen[:, 2:] = torch.rand_like(seen[:, 2:])
    torch.testing.assert_close(method.tokens(seen, past), method.tokens(x, past))


@pytest.mark.parametrize(("share", "seen"), [(0.25, 6), (0.5, 4), (0.7, 2), (0.99, 1)])
def test_the_future_begins_where_its_share_of_the_clip_does(share, seen):
    keep, hidden = ahead(2, (8, 3, 5), share=share, draw=runtime.generator(0))
    assert keep.tolist() == 2 * [[*range(15 * seen)]]
    assert hidden.tolist() == 2 * [[[*range(15 * seen, 120)]]]


def test_all_frames_of_a_clip_are_seen_alike_and_clips_differently():
    still = clips(6)[:, :1].expand(-1, 4, -1, -1, -1)
    policy = replace(SIMCLR_CIFAR, size=SIZE)
    x = alike(policy, still, runtime.generator(0))
    assert all(torch.equal(x[:, 0], x[:, frame]) for frame in range(1, 4))
    torch.testing.assert_close(x[:, 0], policy(still[:, 0], runtime.generator(0)))


def test_what_no_clip_can_be_is_refused():
    with pytest.raises(UsageError, match="5 frames and tubelets of 2"):
        vjepa(frames=5)
    with pytest.raises(UsageError, match="future is the share"):
        vjepa(future=1.0)
    with pytest.raises(UsageError, match="two tubelets of time or more"):
        vjepa(frames=2, future=0.5)({"video": clips()[:, :2]}, runtime.generator(0))
    with pytest.raises(UsageError, match="class token"):
        VJEPA(image_encoder("timm:vit_tiny_patch16_224", size=16, pretrained=False), policies=SAME, predictor=SHAPE)
