"""Convolutions that standardize their weights, turned into plain ones that compute the same.

The standardization of a kernel runs over the channels that it reads (Qiao et al., arXiv 1903.10520; scaled by a gain: Brock et al.,
arXiv 2101.08692): without one of them all its other weights would change, and no least-squares solution has mean zero and a given norm.
The weight that is applied is free of both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from capnas._timm import import_timm
from capnas.measures.applied_weights import applied_weight
from capnas.measures.probing import cloned

_timm_layers: Any = import_timm("timm.layers")
_KINDS = tuple(getattr(_timm_layers, f"{scaled}StdConv2d{same}") for scaled in ("", "Scaled") for same in ("", "Same"))


def plain_convs(model: nn.Module) -> nn.Module:
    """A network that computes the same with a plain convolution for each of timm's standardized ones; itself where it has none.

    Args:
        model: not changed.

    Returns:
        A copy, its layers named as before; the weights are those that were applied, without mean zero and norm from then on.

    >>> import torch
    >>> net = nn.Sequential(_timm_layers.ScaledStdConv2d(3, 4, 3), nn.ReLU())
    >>> plain, x = plain_convs(net), torch.randn(1, 3, 8, 8)
    >>> type(plain[0]).__name__, torch.equal(plain(x), net(x)), plain_convs(plain) is plain
    ('Conv2d', True, True)
    """
    names = [n for n, m in model.named_modules(remove_duplicate=False) if n and isinstance(m, _KINDS)]
    if not names:
        return model
    model, made = cloned(model), {}
    for name in names:
        layer = model.get_submodule(name)
        if layer not in made:
            made[layer] = _plain(layer)
        model.set_submodule(name, made[layer])
    return model


def _plain(layer: Any) -> nn.Module:
    same = getattr(layer, "same_pad", False)
    settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    kind = _timm_layers.Conv2dSame if same else nn.Conv2d
    plain = kind(layer.in_channels, layer.out_channels, layer.kernel_size, **settings, bias=False, device="meta")  # draws no numbers
    weight = applied_weight(layer)
    assert weight is not None
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    plain.bias = layer.bias
    return plain.train(layer.training)
