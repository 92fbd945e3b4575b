"""A batch in chunks gives the gradients of the whole batch."""

import copy
import math
from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel

from twofold.errors import UsageError
from twofold.methods import BYOL, CLIP, SigLIP
from twofold.models.bundle import Tower
from twofold.models.encoders import ImageEncoder, TextEncoder
from twofold.models.heads import Head, mlp
from twofold.train.cached import chunked, encoders
from twofold.views import Policy

B, SIZE, CHUNK = 10, 16, 4
PARTS = math.ceil(B / CHUNK)
SPEC = {"size": SIZE, "channels": 3, "how": "crop"}


def pictures(body: nn.Module) -> ImageEncoder:
    return ImageEncoder(body, SPEC, mean=[0.5] * 3, std=[0.5] * 3)


def convolutions(norm: nn.Module) -> ImageEncoder:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return pictures(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 6, 3), *pool))


def transformer(drop: float) -> ImageEncoder:
    shape = {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    body = timm.models.VisionTransformer(**shape, proj_drop_rate=drop, attn_drop_rate=drop, drop_path_rate=drop)
    return pictures(body)


def words(drop: float) -> TextEncoder:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": drop, "attention_probs_dropout_prob": drop}
    body = BertModel(BertConfig(vocab_size=50, max_position_embeddings=8, **shape, **rates))
    return TextEncoder(body, None, {"pooling": "mean"}, files={})


def pair(method: type, seeing: ImageEncoder, drop: float) -> CLIP | SigLIP:
    """Heads with BatchNorm on both towers: they must see the whole batch."""
    reading = words(drop)
    towers = {"image": Tower(seeing, mlp(seeing.dim, 12, 8)), "text": Tower(reading, mlp(reading.dim, 12, 8))}
    return method(towers).train()


def batch() -> dict:
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(B, 8, dtype=torch.long)
    mask[::3, 5:] = 0
    ids = torch.randint(0, 50, (B, 8), generator=draw)
    return {"image": torch.rand(B, 3, SIZE, SIZE, generator=draw), "text": {"input_ids": ids, "attention_mask": mask}}


class InParts(nn.Module):
    """The reference: an encoder that sees its rows in parts, and keeps every one's graph."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim

    def forward(self, x):
        if isinstance(x, dict):
            parts = [dict(zip(x, each, strict=True)) for each in zip(*(v.tensor_split(PARTS) for v in x.values()))]  # noqa: B905
        else:
            parts = x.tensor_split(PARTS)
        return torch.cat([self.encoder(part) for part in parts])


def gradients(method: nn.Module, chunk: int | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of one step, and the state of the global generator after it."""
    torch.manual_seed(7)
    columns = batch()
    columns["image"] = columns["image"].to(next(method.parameters()).dtype)
    with chunked(method, chunk) if chunk else nullcontext():
        method(columns, torch.Generator()).loss.backward()
    found = {name.replace("encoder.encoder", "encoder"): p.grad for name, p in method.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found, torch.get_rng_state()


@pytest.mark.parametrize("method", [CLIP, SigLIP])  # a temperature; a temperature and a bias
@pytest.mark.parametrize("kind", ["convolutions", "transformer"])
def test_without_dropout_gradients_are_those_of_one_big_batch(method, kind):
    torch.manual_seed(0)
    seeing = convolutions(nn.GroupNorm(2, 8)) if kind == "convolutions" else transformer(0)
    whole = pair(method, seeing, drop=0).double()  # some gradients are 0 but for rounding: biases before a BatchNorm
    expected, got = gradients(copy.deepcopy(whole))[0], gradients(whole, CHUNK)[0]
    for name in expected:
        assert (expected[name] - got[name]).norm() <= 1e-9 * expected[name].norm() + 1e-12, name


@pytest.mark.parametrize("method", [CLIP, SigLIP])
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_drop_path_and_autocast_are_replayed_and_leave_no_trace_in_later_randomness(method, autocast):
    torch.manual_seed(0)
    ours = pair(method, transformer(0.3), drop=0.3)
    reference = copy.deepcopy(ours)
    for tower in reference.pair.towers.values():
        tower.encoder = InParts(tower.encoder)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (expected, state), (got, state_after) = gradients(reference), gradients(ours, CHUNK)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(state, state_after)


def test_nothing_of_the_encoder_is_kept_for_backward_and_no_more_than_a_chunk_runs_at_once():
    torch.manual_seed(0)
    method, seen = SigLIP({"image": convolutions(nn.GroupNorm(2, 8)), "text": nn.Linear(4, 6)}), []
    method.pair.towers["image"].body.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    columns = {"image": torch.rand(B, 3, SIZE, SIZE), "text": torch.rand(B, 4)}

    def kept() -> int:
        """Numbers that the graph holds, the pictures themselves aside."""
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out = method(columns, torch.Generator())
        out.loss.backward()
        pictures = columns["image"].untyped_storage().data_ptr()
        return sum(x.numel() for x in saved if x.untyped_storage().data_ptr() != pictures)

    whole = kept()
    with chunked(method, CHUNK):
        seen.clear()
        assert kept() < whole / 50
    assert seen == [4, 3, 3, 3, 3, 4]  # forward; then replayed, the last first


def test_batchnorm_in_an_encoder_counts_each_chunk_once():
    torch.manual_seed(0)
    ours = convolutions(nn.BatchNorm2d(8)).train()
    reference = copy.deepcopy(ours)
    method = SigLIP({"image": ours, "text": nn.Linear(4, 6)})
    x = torch.rand(B, 3, SIZE, SIZE)
    with chunked(method, CHUNK):
        method({"image": x, "text": torch.rand(B, 4)}, torch.Generator()).loss.backward()
    for part in x.tensor_split(PARTS):
        reference(part)
    assert int(ours.body[1].num_batches_tracked) == PARTS
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())


def test_a_target_that_follows_the_encoder_is_chunked_too_and_heads_are_not():
    policy = Policy(size=SIZE)
    small = Head(2, 16, 8)
    byol = BYOL(convolutions(nn.GroupNorm(2, 8)), policies=(policy, policy), head=small, predictor=small)
    assert len(encoders(byol)) == 2
    assert all(isinstance(encoder, ImageEncoder) for encoder in encoders(byol))
    clip = CLIP({"a": nn.Linear(2, 2), "b": words(0)})
    assert [type(encoder) for encoder in encoders(clip)] == [TextEncoder, nn.Linear]


def test_afterwards_the_encoder_is_what_it_was_and_a_copy_within_runs_on_its_own_weights():
    method = SigLIP({"image": convolutions(nn.GroupNorm(2, 8)), "text": nn.Linear(4, 6)})
    encoder, x = method.pair.towers["image"], torch.rand(B, 3, SIZE, SIZE)
    with chunked(method, CHUNK):
        twin = copy.deepcopy(encoder)
        nn.init.zeros_(twin.body[3].weight)
        assert not torch.equal(twin(x), encoder(x))
    assert "forward" not in vars(encoder)
    with pytest.raises(UsageError, match="chunk=0"), chunked(method, 0):
        pass
