"""The weight that a layer applies where that is no parameter (standardisation, weight and spectral norm, masks); what a norm layer is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capnas.layers import MEASURED, PRODUCTS
from capnas.measures.probing import FAILURES, untouched

_NORMS = re.compile("norm", re.IGNORECASE)
_STEPS = ("forward", "_conv_forward")  # of torch's layers, that a subclass may replace
_PRODUCTS = frozenset(PRODUCTS.values())


class _Found(Exception):
    """Ends a run that was only for the weight."""


class WeightSwap(TorchFunctionMode):
    """Inside, every product that runs within one of the layers takes the weight that ``swap(layer, weight)`` gives for its own. Ours.

    Args:
        layers: convolutions and linear layers, called as modules.
        swap: gets the layer and the weight as it would be applied.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with WeightSwap([layer], lambda layer, weight: torch.full_like(weight, 3.0)):
    ...     layer(torch.ones(1)).item()
    3.0
    """

    def __init__(self, layers: Iterable[nn.Module], swap: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.swap = tuple(layers), swap
        self.running: list[nn.Module] = []
        self.handles: list[Any] = []

    def __enter__(self) -> WeightSwap:
        for layer in self.layers:
            self.handles.append(layer.register_forward_pre_hook(lambda module, _: self.running.append(module)))
            self.handles.append(layer.register_forward_hook(lambda *_: self._leaves(), always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self.handles:
            self.handles.pop().remove()

    def _leaves(self) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.running and func in _PRODUCTS:
            if len(args) > 1:
                args = (args[0], self.swap(self.running[-1], args[1]), *args[2:])
            else:
                kwargs = {**kwargs, "weight": self.swap(self.running[-1], kwargs["weight"])}
        return func(*args, **kwargs)


def is_plain(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer runs by torch's own code and holds its weight as a parameter. Ours.

    >>> is_plain(nn.Linear(2, 2)), is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    (True, False)
    """
    kind = next((k for k in MEASURED if isinstance(layer, k)), None)
    return layer._parameters.get("weight") is not None and all(
        getattr(type(layer), step, None) is getattr(kind, step, None) and step not in vars(layer) for step in _STEPS
    )


def applied_weight(layer: nn.Module) -> Tensor | None:
    """The weight that a convolution or linear layer multiplies with in eval mode: the parameter, or what the layer computes. Ours.

    A layer that is not `is_plain` is called on a few ones up to its first product, which shows the weight; its state stays as it was.

    Args:
        layer: one of torch's convolutions or linear layers, or a subclass.

    Returns:
        The parameter itself or what the layer made of it, which may share its memory; None where the layer cannot be called alone on one
        sample or calls no product of `torch.nn.functional`.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    >>> bool((applied_weight(layer) == layer.weight).all())
    True
    """
    if is_plain(layer):
        return layer._parameters["weight"]
    held: list[Tensor] = []

    def keep(_: nn.Module, weight: Tensor) -> Tensor:
        held.append(weight)
        raise _Found

    like = next(layer.parameters(), None)
    try:
        with untouched(layer), torch.no_grad(), WeightSwap([layer], keep):
            layer(torch.ones(_small_shape(layer), dtype=None if like is None else like.dtype, device=None if like is None else like.device))
    except _Found:
        return held[0] if isinstance(held[0], nn.Parameter) else held[0].detach()
    except FAILURES:
        return None
    return None


def computing_layers(model: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers whose applied weight is not a parameter of theirs. Ours.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    >>> [layer is net[1] for layer in computing_layers(net)]
    [True]
    """
    found: list[nn.Module] = []
    for layer in (m for m in model.modules() if isinstance(m, MEASURED) and not is_plain(m)):
        weight, own = applied_weight(layer), layer._parameters.get("weight")
        same = own is not None and weight is not None and weight.shape == own.shape and torch.equal(weight, own.to(weight.dtype))
        found += [] if weight is None or same else [layer]
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer, by its class or, without children, by the name of its class; layers with weights are none. Ours.

    >>> is_norm(nn.LayerNorm(2)), is_norm(nn.Linear(2, 2))
    (True, False)
    """
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    named = bool(_NORMS.search(type(module).__name__)) and not isinstance(module, MEASURED) and not list(module.children())
    return isinstance(module, known) or named


def _small_shape(layer: Any) -> tuple[int, ...]:
    """One sample that the kernel and the padding of a layer fit."""
    if isinstance(layer, nn.Linear):
        return (1, layer.in_features)
    pads = [0] * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    return (1, layer.in_channels, *(d * (k - 1) + p + 2 for d, k, p in zip(layer.dilation, layer.kernel_size, pads)))
