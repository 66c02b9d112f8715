"""What one forward pass is read for, by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas.capacity.capture import _ROWS, MomentReader, quiet
from capnas.capacity.taps import LayerTaps, _batch_norm
from capnas.graph.tracing import trace


class Twice(nn.Module):
    """Calls one activation two times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.last(self.act(self.conv(x))))


def read(model: nn.Module, x: Tensor) -> MomentReader:
    with quiet(model, 0, grad=False), MomentReader(trace(model, (1, *x.shape[1:])), len(x)) as reader:
        model(x)
    return reader


def test_each_call_of_an_activation_is_kept_under_its_own_name() -> None:
    reader = read(Twice(), torch.randn(4, 2, 5, 5))
    assert list(reader.activations) == ["act", "act#1"]
    assert reader.complete
    assert not MomentReader(trace(Twice(), (1, 2, 5, 5)), 4).complete


@pytest.mark.parametrize(("size", "rows"), [(8, 12 * 64), (20, _ROWS)])
def test_rows_are_drawn_where_there_are_many(size: int, rows: int) -> None:
    reader = read(Twice(), torch.randn(12, 2, size, size))
    assert [kept.shape for *_, kept, _ in reader.activations.values()] == [(rows, 3)] * 2


def test_an_activation_of_broken_numbers_is_left_out() -> None:
    x = torch.randn(4, 2, 5, 5)
    x[1, 0, 2, 3] = float("inf")
    assert not read(Twice(), x).activations


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_are_on_where_they_are_asked_for(grad: bool) -> None:
    with torch.set_grad_enabled(not grad), quiet(Twice(), 0, grad=grad):
        assert torch.is_grad_enabled() == grad


def test_statistics_of_the_batch_are_constants_of_a_batch_norm() -> None:
    x, weight, bias = torch.randn(8, 3, 4, 4, requires_grad=True), torch.rand(3), torch.randn(3)
    got = _batch_norm(F.batch_norm, {"input": x, "weight": weight, "bias": bias, "eps": 0.3})
    torch.testing.assert_close(got, F.batch_norm(x, None, None, weight, bias, training=True, eps=0.3))
    (gradient,) = torch.autograd.grad(got.sum(), x)
    scale = weight / (x.var((0, 2, 3), correction=0) + 0.3).sqrt()
    torch.testing.assert_close(gradient, scale.detach()[None, :, None, None].expand_as(x))


def test_taps_read_while_they_watch() -> None:
    model, x = Twice(), torch.randn(4, 2, 5, 5)
    with LayerTaps(model, 4, rows=16, batch_statistics=False) as taps:
        taps.watching = False
        model(x)
        assert not taps.taps
        taps.watching = True
        model(x)
    assert list(taps.taps) == ["conv.weight", "last.weight"]


class Failing(nn.Conv2d):
    """Computes its weight, and fails."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_a_layer_that_fails_leaves_its_name_to_none() -> None:
    model = Failing(2, 3, 1)
    with LayerTaps(model, 4, rows=16, batch_statistics=False) as taps:
        with pytest.raises(RuntimeError, match="no"):
            model(torch.randn(4, 2, 5, 5))
        assert taps.computed is None


class WideValues(nn.Module):
    """LeViT's attention: two heads whose values, `wide`, are wider than their keys, 4, and an activation behind."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.qkv, self.act, self.proj, self.wide = nn.Linear(6, 2 * (8 + wide)), nn.Hardswish(), nn.Linear(2 * wide, 6), wide

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, -1).split([4, 4, self.wide], 3)
        attn = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1)
        return self.proj(self.act((attn @ v.transpose(1, 2)).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("wide", [4, 8, 7])
@pytest.mark.parametrize("tokens", [2, 3, 5])  # fewer than a key has numbers, and more
def test_the_channels_of_an_activation_behind_attention_are_those_of_its_values(wide: int, tokens: int) -> None:
    reader = read(nn.Sequential(WideValues(wide), WideValues(wide)), torch.randn(3, tokens, 6))
    assert {kept.shape for *_, kept, _ in reader.activations.values()} == {(3 * tokens, 2 * wide)}
