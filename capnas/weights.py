"""Operator norms of a model's layers and how far training moved them: the plumbing of the excess-capacity measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas.graph.dataflow import Node, Trace
from capnas.layers import CONVS
from capnas.measures.applied_weights import applied_weight, is_norm, is_plain
from capnas.measures.excess import distance_to_init, group_norm_21, norm_layer_constant
from capnas.measures.operator_norms import OperatorNorm, linear_norm, operator_norm
from capnas.measures.probing import FAILURES, untouched, unwrap_model
from capnas.measures.slack import LayerMotion, capacity_slack

_NORM_OPS = ("batch_norm", "layer_norm", "group_norm")


def weight_norms(
    model: nn.Module, trace: Trace, *, bounded: bool = False, tolerance: float = 1e-4, weights: Mapping[str, Tensor] | None = None
) -> dict[str, OperatorNorm]:
    """Operator norm of every convolution and linear layer that the forward pass calls, at the input size that it sees.

    The convention of Graf et al. (arXiv 2202.08070) is cyclic padding; here each layer keeps the padding it was built with, because
    the constant should be that of the map that is used. Norm layers are maps of their own, see `norm_layer_constants`. A weight that the
    layer computes (standardisation, weight or spectral norm) counts as it is applied, `capnas.measures.applied_weights`.

    Args:
        model: any module; only read.
        trace: of the same model, see `capnas.graph.tracing.trace`.
        bounded: also find upper bounds of the norms of convolutions that are iterated; without, those are infinite and the value is
            certified from below alone.
        tolerance: relative error of those, see `capnas.measures.operator_norms.operator_norm`.
        weights: by module name, instead of the module's own.

    Returns:
        Module name to norm, in execution order; a module called at several sizes has its largest norm. A layer with code of its own whose
        map is not a product with one weight, as a random input tells, has none.

    >>> from capnas.graph.tracing import trace
    >>> layer = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    >>> _ = nn.init.constant_(layer[0].weight, 2.0)
    >>> round(weight_norms(layer, trace(layer, (1, 1, 4, 4)))["0"].value, 6)
    2.0
    """
    modules, given = dict(unwrap_model(model).named_modules()), weights or {}
    found: dict[str, OperatorNorm] = {}
    refused: set[str] = set()
    for node in trace.nodes:
        name = trace.owner(node)
        module = modules.get(name)
        if name in refused or not (
            (isinstance(module, nn.Linear) and name not in found) or (isinstance(module, CONVS) and node.op.startswith("aten.convolution"))
        ):
            continue
        weight = given[name] if name in given else applied_weight(module)
        call = _Call.of(module, node, trace)
        if weight is None or not (name in given or is_plain(module) or call.is_product(module, weight.detach())):
            refused.add(name)
            found.pop(name, None)
            continue
        norm = call.norm(weight.detach(), bounded, tolerance)
        if name not in found or norm.value > found[name].value:
            found[name] = norm
    return found


def norm_layer_constants(model: nn.Module, trace: Trace) -> dict[str, float | None]:
    """Lipschitz constant of every norm layer that the forward pass calls, counted as a map of its own; in execution order.

    Batch norm has that of its map in eval mode, max |gamma| / sqrt(running variance + eps), whatever mode the model is in. Layer, group
    and RMS norm, and batch and instance norm without running moments, divide by a spread of the sample or batch at hand: their slope has
    no useful bound for all inputs (max |gamma| / sqrt(eps)), and they have None, as has a norm whose moments are not finite. What
    normalises a weight is part of its layer, not a norm layer.

    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.BatchNorm1d(3, eps=3.0), nn.LayerNorm(3))
    >>> norm_layer_constants(net, trace(net, (2, 3)))
    {'0': 0.5, '1': None}
    """
    modules, fed = dict(unwrap_model(model).named_modules()), trace.fed()
    found: dict[str, float | None] = {}
    for node in trace.nodes:
        module: Any = modules.get(node.module)
        if node.index in fed and module is not None and (is_norm(module) or any(name in node.op for name in _NORM_OPS)):
            found.setdefault(node.module, None)
            variance = getattr(module, "running_var", None)
            if "batch_norm" in node.op and isinstance(variance, Tensor):
                constant = norm_layer_constant(module.weight, variance, module.eps)
                found[node.module] = constant if math.isfinite(constant) else None
    return found


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one traced call of a layer does to its input, but for the weight; `size` and `padding` are empty for a linear layer.

    Attributes:
        channels: of the input.
        size: its sides, before anything is padded.
        padding: cells before and after each axis, by the convolution or ahead of it.
        mode: what is padded.
        attrs: of the traced convolution.
    """

    channels: int
    size: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    mode: str = "zeros"
    attrs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, module: Any, node: Node, trace: Trace) -> _Call:
        if isinstance(module, nn.Linear):
            return cls(channels=module.in_features)
        (_, channels, *sides), own = node.input_shapes[0], node.attrs["padding"]
        before, mode = node.inputs[0], "zeros"
        flat: tuple[int, ...] = ()
        if module.padding_mode != "zeros" and not any(own):  # torch pads first and convolves the padded map
            mode, flat = module.padding_mode, tuple(module._reversed_padding_repeated_twice)
        elif not node.attrs["transposed"] and before is not None and before >= 0:
            pad = trace.nodes[before]
            if pad.module == node.module and pad.op.startswith("aten.constant_pad_nd") and len(pad.attrs["pad"]) <= 2 * len(sides):
                flat = tuple(pad.attrs["pad"])  # "same" padding, of torch with an even kernel and of timm with a stride
        flat = (0,) * (2 * len(sides)) if min(flat, default=0) < 0 else flat + (0,) * (2 * len(sides) - len(flat))
        pairs = [(flat[2 * i], flat[2 * i + 1]) for i in reversed(range(len(sides)))]  # torch counts axes from the last
        return cls(
            channels=channels, size=tuple(s - a - b for s, (a, b) in zip(sides, pairs)), mode=mode, attrs=node.attrs,
            padding=tuple((a + p, b + p) for (a, b), p in zip(pairs, own)),
        )  # fmt: skip

    def norm(self, weight: Tensor, bounded: bool, tolerance: float) -> OperatorNorm:
        if self.attrs is None:
            return linear_norm(weight, tolerance=tolerance)
        transposed = self.attrs["transposed"]
        return operator_norm(
            weight, self.size, stride=self.attrs["stride"], padding=self.attrs["padding"] if transposed else self.padding,
            dilation=self.attrs["dilation"], groups=self.attrs["groups"], padding_mode=self.mode, transposed=transposed,
            output_padding=self.attrs["output_padding"] if transposed else None, bounded=bounded, tolerance=tolerance,
        )  # fmt: skip

    def apply(self, weight: Tensor, x: Tensor) -> Tensor:
        """The product alone, by torch's operations."""
        if self.attrs is None:
            return F.linear(x, weight)
        a, padding = self.attrs, [0] * len(self.size)
        if a["transposed"]:
            padding = list(a["padding"])
        else:
            x = F.pad(x, [p for pair in reversed(self.padding) for p in pair], mode="constant" if self.mode == "zeros" else self.mode)
        return torch.convolution(x, weight, None, a["stride"], padding, a["dilation"], a["transposed"], a["output_padding"], a["groups"])

    def is_product(self, module: nn.Module, weight: Tensor) -> bool:
        """Whether the layer, less its value at 0, multiplies a random input with the weight and does nothing else."""
        try:
            with untouched(module), torch.no_grad():
                x = torch.randn(1, self.channels, *self.size, dtype=weight.dtype, device=weight.device)
                rest = module(x) - module(torch.zeros_like(x)) - self.apply(weight, x)
                return float(rest.norm()) <= 10 * torch.finfo(x.dtype).eps ** 0.5 * float(self.apply(weight, x).norm())
        except FAILURES:
            return False


def _by_outputs(module: Any, weight: Tensor) -> Tensor:
    """A weight with its outputs first, which a transposed convolution has second in each group."""
    if not getattr(module, "transposed", False):
        return weight
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """One copy of the weights of a model's convolutions and linear layers, taken before training.

    Of a layer that computes its weight (standardisation, weight or spectral norm) the copy, and so every distance and radius, is of the
    weight that it applies, as the theory's are, not of the parameters behind it.

    Attributes:
        weights: module name to weight; layers that share theirs share the copy, and one whose weight cannot be told has none. Of a layer
            that makes several products it is the weight of the first.
    """

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> InitialWeights:
        """Copy the weights as they are now."""
        copies: dict[int, Tensor] = {}
        held: dict[str, Tensor] = {}
        for name, module in unwrap_model(model).named_modules():
            weight = applied_weight(module) if isinstance(module, (*CONVS, nn.Linear)) else None
            if isinstance(weight, nn.Parameter):
                if id(weight) not in copies:
                    copies[id(weight)] = weight.detach().clone()
                held[name] = copies[id(weight)]
            elif weight is not None:
                held[name] = weight.clone()
        return cls(weights=held)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """(2,1) distance of each layer from where it began, `capnas.measures.excess.distance_to_init`, over its outputs."""
        model, found = unwrap_model(model), {}
        for name, before in self.weights.items():
            module = model.get_submodule(name)
            if (now := applied_weight(module)) is not None:
                found[name] = distance_to_init(_by_outputs(module, now), _by_outputs(module, before))
        return found

    def motion(self, model: nn.Module, trace: Trace) -> dict[str, LayerMotion]:
        """What a training did to each layer: norms before and after, distance, initial radius. Norm layers are left out."""
        model = unwrap_model(model)
        after, distances = weight_norms(model, trace), self.distances(model)
        initial = {name: weight for name, weight in self.weights.items() if name in after and name in distances}
        before = weight_norms(model, trace, weights=initial)
        return {
            name: LayerMotion(
                norm_start=before[name].value, norm_end=after[name].value, distance=distances[name],
                radius=group_norm_21(_by_outputs(model.get_submodule(name), weight)),
            )
            for name, weight in initial.items()
        }  # fmt: skip

    def slack(self, model: nn.Module, trace: Trace) -> float:
        """`capacity_slack` of the training so far, in [0, 1]."""
        return capacity_slack(list(self.motion(model, trace).values()))
