"""Operator norms of a model's layers and how far training moved them: the plumbing of the excess-capacity measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from capnas.graph.tracing import Trace
from capnas.layers import CONVS
from capnas.measures.excess import distance_to_init, group_norm_21, norm_layer_constant
from capnas.measures.operator_norms import OperatorNorm, linear_norm, operator_norm
from capnas.measures.proxies import is_norm
from capnas.measures.slack import LayerMotion, capacity_slack

_NORM_OPS = ("batch_norm", "layer_norm", "group_norm")


def weight_norms(
    model: nn.Module, trace: Trace, *, bounded: bool = False, tolerance: float = 1e-4, weights: Mapping[str, Tensor] | None = None
) -> dict[str, OperatorNorm]:
    """Operator norm of every convolution and linear layer that the forward pass calls, at the input size that it sees.

    The convention of Graf et al. (arXiv 2202.08070) is cyclic padding; here each layer keeps the padding it was built with, because
    the constant should be that of the map that is used. Norm layers are maps of their own, see `norm_layer_constants`.

    Args:
        model: any module; only read.
        trace: of the same model, see `capnas.graph.tracing.trace`.
        bounded: also find upper bounds of the norms of convolutions that are iterated; without, those are infinite and the value is
            certified from below alone.
        tolerance: relative error of those, see `capnas.measures.operator_norms.operator_norm`.
        weights: by module name, instead of the module's own.

    Returns:
        Module name to norm, in execution order; a module called at several sizes has its largest norm.

    >>> from capnas.graph.tracing import trace
    >>> layer = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    >>> _ = nn.init.constant_(layer[0].weight, 2.0)
    >>> round(weight_norms(layer, trace(layer, (1, 1, 4, 4)))["0"].value, 6)
    2.0
    """
    modules, given = dict(model.named_modules()), weights or {}
    found: dict[str, OperatorNorm] = {}
    for node in trace.nodes:
        module = modules.get(node.module)
        if not isinstance(module, (*CONVS, nn.Linear)):
            continue
        weight = given[node.module] if node.module in given else _weight(module).detach()
        if isinstance(module, nn.Linear) and node.module not in found:
            found[node.module] = linear_norm(weight, tolerance=tolerance)
        elif isinstance(module, CONVS) and node.op.startswith("aten.convolution"):
            norm = _conv_norm(module, weight, node.input_shapes[0][2:], node.attrs, bounded, tolerance)
            if node.module not in found or norm.value > found[node.module].value:
                found[node.module] = norm
    return found


def norm_layer_constants(model: nn.Module, trace: Trace) -> dict[str, float | None]:
    """Lipschitz constant of every norm layer that the forward pass calls, counted as a map of its own; in execution order.

    Batch norm has that of its map in eval mode, max |gamma| / sqrt(running variance + eps), whatever mode the model is in. Layer, group
    and RMS norm, and batch and instance norm without running moments, divide by a spread of the sample or batch at hand: their slope has
    no useful bound for all inputs (max |gamma| / sqrt(eps)), and they have None, as has a norm whose moments are not finite.

    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.BatchNorm1d(3, eps=3.0), nn.LayerNorm(3))
    >>> norm_layer_constants(net, trace(net, (2, 3)))
    {'0': 0.5, '1': None}
    """
    modules = dict(model.named_modules())
    found: dict[str, float | None] = {}
    for node in trace.nodes:
        module: Any = modules.get(node.module)
        if module is not None and (is_norm(module) or any(name in node.op for name in _NORM_OPS)):
            found.setdefault(node.module, None)
            variance = getattr(module, "running_var", None)
            if "batch_norm" in node.op and isinstance(variance, Tensor):
                constant = norm_layer_constant(module.weight, variance, module.eps)
                found[node.module] = constant if math.isfinite(constant) else None
    return found


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


def _conv_norm(
    module: nn.Module, weight: Tensor, size: tuple[int, ...], attrs: Mapping[str, Any], bounded: bool, tolerance: float
) -> OperatorNorm:
    padding, mode = tuple(attrs["padding"]), "zeros"
    if getattr(module, "padding_mode", "zeros") == "circular":  # torch pads first and convolves the padded map
        padding, mode = tuple(cast(tuple[int, ...], module.padding)), "circular"
        size = tuple(s - 2 * p for s, p in zip(size, padding))
    return operator_norm(
        weight, size, stride=tuple(attrs["stride"]), padding=padding, dilation=tuple(attrs["dilation"]),
        groups=attrs["groups"], padding_mode=mode, transposed=attrs["transposed"],
        output_padding=tuple(attrs["output_padding"]) if attrs["transposed"] else None, bounded=bounded, tolerance=tolerance,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """One copy of the weights of a model's convolutions and linear layers, taken before training.

    Attributes:
        weights: module name to weight; layers that share theirs share the copy.
    """

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> InitialWeights:
        """Copy the weights as they are now."""
        live = {n: _weight(m) for n, m in model.named_modules() if isinstance(m, (*CONVS, nn.Linear))}
        copies = {id(w): w.detach().clone() for w in live.values()}
        return cls(weights={n: copies[id(w)] for n, w in live.items()})

    def distances(self, model: nn.Module) -> dict[str, float]:
        """(2,1) distance of each layer from where it began, `capnas.measures.excess.distance_to_init`."""
        modules = dict(model.named_modules())
        return {n: distance_to_init(_weight(modules[n]).detach(), w) for n, w in self.weights.items()}

    def motion(self, model: nn.Module, trace: Trace) -> dict[str, LayerMotion]:
        """What a training did to each layer: norms before and after, distance, initial radius. Norm layers are left out."""
        after, before = weight_norms(model, trace), weight_norms(model, trace, weights=self.weights)
        distances = self.distances(model)
        return {
            name: LayerMotion(
                norm_start=before[name].value, norm_end=after[name].value, distance=distances[name], radius=group_norm_21(weight)
            )
            for name, weight in self.weights.items()
            if name in after
        }

    def slack(self, model: nn.Module, trace: Trace, *, fit: float = 1.0) -> float:
        """`capacity_slack` of the training so far, in [0, 1]."""
        return capacity_slack(list(self.motion(model, trace).values()), fit=fit)
