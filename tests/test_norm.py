"""BatchNorm over several processes is BatchNorm over all rows."""

import copy
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from processes import together
from twofold import runtime
from twofold.errors import UsageError
from twofold.models.norm import _normalise, synchronised

ROWS, SHARES = 11, (4, 7)


def network(dtype: torch.dtype, *, momentum: float | None = 0.1) -> nn.Sequential:
    """Every kind of BatchNorm that encoders and heads have, with weights of its own."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 5, 2, bias=False),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.ReLU(),
        BatchNormAct2d(5, momentum=momentum),
        nn.Flatten(),
        nn.BatchNorm1d(45, affine=False, track_running_stats=False),
        nn.Linear(45, 6, bias=False),
        nn.BatchNorm1d(6, momentum=momentum),
    )
    for layer in layers:
        if getattr(layer, "affine", False):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
    return layers.to(dtype)


def pictures(dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    # Means far from 0, and not the same in both processes: what E[x²] − E[x]² gets wrong in float32.
    return (torch.randn(ROWS, 3, 4, 4, generator=draw) + torch.arange(ROWS).view(-1, 1, 1, 1)).to(dtype) + 20


def loss(z: torch.Tensor) -> torch.Tensor:
    """Of all rows, which it compares."""
    return (z @ z.T).square().sum() + (z[:4] - z[-4:]).pow(3).sum()


def one_process(folder: Path) -> None:
    rank = runtime.world()[0]
    for dtype, momentum in ((torch.float64, 0.1), (torch.float64, None), (torch.float32, 0.1)):
        model = network(dtype, momentum=momentum)
        x = pictures(dtype).split(SHARES)[rank].requires_grad_()
        with synchronised(model):
            loss(runtime.gather(model(x))).backward()
            model(x.detach())
            model.eval()(x)  # no communication: a process may do this alone
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
            p.grad /= 2  # as data-parallel training does
        result = [p.grad for p in model.parameters()] + list(model.buffers()) + [runtime.gather(x.grad) / 2]
        torch.save(result, folder / f"{dtype}{momentum}{rank}")


def test_statistics_and_gradients_are_those_of_one_process_with_all_rows(tmp_path):
    together(one_process, tmp_path)
    for dtype, momentum in ((torch.float64, 0.1), (torch.float64, None), (torch.float32, 0.1)):
        model, x = network(dtype, momentum=momentum), pictures(dtype).requires_grad_()
        loss(model(x)).backward()
        model(x.detach())
        expected = [p.grad for p in model.parameters()] + list(model.buffers()) + [x.grad]
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        for rank in range(2):
            for one, two in zip(expected, torch.load(tmp_path / f"{dtype}{momentum}{rank}"), strict=True):
                assert (two - one).double().norm() <= tolerance * (1 + one.double().norm())


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (3, 4, 2, 3)])
def test_it_is_torchs_batchnorm_and_so_is_its_gradient(shape):
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4).double()
    x = (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2).requires_grad_()
    nn.init.normal_(layer.weight)
    other = copy.deepcopy(layer)
    torch.testing.assert_close(_normalise(layer, x), other(x))
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    assert torch.autograd.gradcheck(lambda x: _normalise(layer, x), x)


def test_half_precision_goes_in_and_out_and_float32_is_between():
    layer = nn.BatchNorm1d(2)
    x = torch.tensor([[1000.0, 1.0], [1001.0, 2.0]]).bfloat16() + 0
    assert _normalise(layer, x).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32


def test_afterwards_every_layer_is_what_it_was():
    model = network(torch.float32)
    before = [dict(vars(layer)) for layer in model]
    keys = list(model.state_dict())
    with synchronised(model):
        assert list(model.state_dict()) == keys
        assert [type(layer) for layer in model] == [type(layer) for layer in network(torch.float32)]
        twin = copy.deepcopy(model)
        twin[1].weight.data.zero_()
        assert twin(pictures(torch.float32)).shape == (ROWS, 6)  # a copy runs on its own weights
        assert model[1].weight.any()
    assert [dict(vars(layer)) for layer in model] == before


def test_a_norm_of_unknown_make_is_refused_and_nothing_is_changed():
    class Odd(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.BatchNorm1d(2), Odd(2))
    with pytest.raises(UsageError, match="Odd"), synchronised(model):
        pass
    assert "forward" not in vars(model[0])
