from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from capnas._timm import timm
from capnas.measures.applied_weights import WeightSwap, applied_weight, computing_layers, is_norm, is_plain


class Doubled(nn.Conv1d):
    """Replaces an inner step of torch's forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


class Raises(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not alone")


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=8)


def test_the_applied_weight_is_what_the_forward_pass_multiplies_with() -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(4, 4))
    with torch.no_grad():
        normed.weight_g.mul_(2)  # the attribute is stale until the next forward pass
    for layer in (pruned(), normed, nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), timm.layers.Linear(4, 4), nn.Linear(4, 4)):
        layer.train()
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        found = applied_weight(layer)
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
        assert layer.training
        with torch.no_grad():
            matrix = (layer.eval()(torch.eye(4)) - layer(torch.zeros(1, 4))).T  # one column for each basis vector
        torch.testing.assert_close(found.detach(), matrix, rtol=1e-5, atol=1e-6)
    double = Doubled(2, 3, 3, padding=4, padding_mode="reflect")
    assert torch.equal(applied_weight(double), 2 * double.weight.detach())


def test_a_weight_that_is_a_parameter_is_handed_over_itself() -> None:
    for layer in (nn.Conv2d(2, 2, 3), timm.layers.Conv2dSame(2, 2, 3, stride=2), timm.layers.Linear(2, 2)):
        assert applied_weight(layer) is layer.weight
    assert is_plain(nn.ConvTranspose1d(1, 1, 2))
    assert not is_plain(Doubled(1, 1, 1))
    own = nn.Linear(2, 2)
    own.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_plain(own)
    assert applied_weight(own) is None
    assert applied_weight(Raises(2, 2)) is None


def test_layers_that_compute_are_told_from_layers_with_code_of_their_own() -> None:
    net = nn.Sequential(nn.Linear(4, 4), timm.layers.Linear(4, 4), pruned(), Raises(4, 4), Doubled(1, 1, 1), timm.layers.StdConv2d(2, 2, 1))
    assert [layer in (net[2], net[4], net[5]) for layer in computing_layers(net)] == [True] * 3


def test_a_swap_ends_with_its_context_also_after_an_error() -> None:
    inner, net = Raises(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    seen = []
    with WeightSwap([net[1]], lambda layer, weight: seen.append(layer) or weight):
        net(torch.ones(1, 2))
    net(torch.ones(1, 2))
    assert seen == [net[1]]
    with pytest.raises(ValueError, match="not alone"), WeightSwap([inner], lambda layer, weight: weight) as swap:
        inner(torch.ones(1, 2))
    assert swap.running == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (inner, *net))


def test_a_layer_with_a_weight_is_no_norm_whatever_its_name() -> None:
    class WeightNormConv2d(nn.Conv2d):
        pass

    class RootNorm(nn.Module):
        pass

    assert not is_norm(WeightNormConv2d(1, 1, 1))
    assert is_norm(RootNorm())
