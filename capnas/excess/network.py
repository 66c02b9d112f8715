"""A network of the paper's class made from a model, its weight layers as operators, and the projection of a weight onto its constraints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from capnas.errors import UsageError
from capnas.excess.composition import Stage, circular_padding, composition
from capnas.graph.dataflow import Trace
from capnas.measures.convolution import convolution
from capnas.measures.excess import distance_to_init, simplex_classifier
from capnas.measures.operator_norms import linear_norm, operator_norm, ring_bound
from capnas.measures.probing import cloned, unwrap_model
from capnas.measures.projections import project, project_distance, project_radially, pull_back
from capnas.size_survey import trace_size

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # of the first are batch and instance norms
_TINY = 4  # sides up to which a convolution is small enough for its explicit matrix
_GRID = 8  # sides of the grid on which singular values are clipped; the last step measures on the full one
_ROUNDING = 1e-6
_WORK = 2e8  # cubes of matrix sides times frequencies up to which singular values are clipped


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The constraints of one layer: its Lipschitz constant and its (2,1) distance to initialization, at most."""

    norm: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A weight layer of a network as a linear map on the images that it sees.

    Attributes:
        name: of the module.
        size: input sides, () of a linear layer.
        options: stride, padding, its mode, dilation and groups of a convolution.
        fixed: whether it is the classifier, which is not trained.
    """

    name: str
    size: tuple[int, ...] = ()
    options: Mapping[str, Any]
    fixed: bool = False

    def norm(self, weight: Tensor) -> float:
        """An upper bound on the operator norm that is exact but for zero padding, and circular where the stride does not divide the side.

        With zeros it is the norm on the least ring that holds the padded image (about 1 + 5 / d^2 times the norm for 3x3 at side d), since
        the projection clips there and a bound of the theorem needs no less; images up to 4 pixels wide have the exact value. A circular one
        whose outputs do not tile the ring has the exact value where its matrix is small, else `overlap_bound`.
        """
        weight = weight.detach().double()
        if not self.size:
            return linear_norm(weight).value
        conv, around = convolution(weight, self.size, **self.options), self.options["padding_mode"] == "circular"
        if max(self.size) <= _TINY or all(axis.disjoint for axis in conv.axes) or around:
            exact = "fourier" if around and all(axis.periodic for axis in conv.axes) else "auto"
            return operator_norm(weight, self.size, **self.options, tight=True, method=exact).upper
        return ring_bound(conv)

    def start(self, weight: Tensor, limits: Limits) -> Tensor:
        """The initial weight, scaled down to the Lipschitz constraint where it exceeds it, as in the authors' code."""
        norm = self.norm(weight)
        return weight if norm <= limits.norm else weight * (limits.norm / norm * (1 - _ROUNDING))

    def constrain(self, weight: Tensor, init: Tensor, limits: Limits, *, sweeps: int, exact: bool = False) -> Tensor:
        """Towards the nearest weight within the limits, by sweeps of Dykstra's algorithm; with `exact` within them as measured.

        The singular values are clipped on a grid of 8 cells a side (or what holds the kernel), at a limit scaled by the ratio of the norm
        there to that of the layer, so that strided and padded layers are not constrained more than asked for. Ours, as is `exact`. Layers
        too wide for that on a CPU (more than about 150 channels on both sides) are rescaled instead, the authors' radial mode.
        """
        near = weight if distance_to_init(weight, init) <= limits.distance else project_distance(weight, init, limits.distance)
        norm = self.norm(near)
        if norm <= limits.norm and distance_to_init(near, init) <= limits.distance:
            return near
        moved = near
        if norm > limits.norm:
            grid = self._grid(weight)
            if math.prod(grid) * min(weight.shape[:2]) ** 2 * max(weight.shape[:2]) > _WORK:
                moved = project_radially(weight, init, distance=limits.distance, lipschitz=limits.norm, norm=self.norm)
            else:
                moved = self._clipped(weight, init, limits, near, norm, grid, sweeps)
        return pull_back(moved, init, distance=limits.distance, lipschitz=limits.norm, norm=self.norm) if exact else moved

    def _grid(self, weight: Tensor) -> tuple[int, ...]:
        spans = [e * (k - 1) + 1 for e, k in zip(self.options.get("dilation", ()), weight.shape[2:])]
        return tuple(max(span, min(_GRID, side + span - 1)) for span, side in zip(spans, self.size))

    def _clipped(
        self, weight: Tensor, init: Tensor, limits: Limits, near: Tensor, norm: float, grid: tuple[int, ...], sweeps: int
    ) -> Tensor:
        if not self.size:
            return project(weight, init, distance=limits.distance, lipschitz=limits.norm, sweeps=sweeps)
        shape: dict[str, Any] = {name: self.options[name] for name in ("dilation", "groups")}
        ratio = operator_norm(near, grid, padding="same", padding_mode="circular", **shape).upper / norm
        return project(weight, init, distance=limits.distance, lipschitz=limits.norm * ratio, input_size=grid, sweeps=sweeps, **shape)


@dataclass(frozen=True, kw_only=True)
class PaperNetwork:
    """A network to which Theorem 3.5 of Graf et al. applies.

    Attributes:
        model: the modules, without norm layers and biases; the classifier is fixed.
        stages: how the layers are composed.
        operators: weight layers in the order of the stages, the classifier last.
        removed: names of the norm layers that were taken out.
    """

    model: nn.Module
    stages: tuple[Stage, ...]
    operators: tuple[Operator, ...]
    removed: tuple[str, ...]

    def weight(self, operator: Operator) -> nn.Parameter:
        """The weight of a layer, as it is trained."""
        return cast(nn.Parameter, self.model.get_submodule(operator.name).weight)

    @property
    def trained(self) -> tuple[Operator, ...]:
        """All layers but the classifier."""
        return tuple(o for o in self.operators if not o.fixed)


def paper_network(model: nn.Module, *, in_chans: int, image_size: int, num_classes: int, seed: int = 0) -> PaperNetwork:
    """A copy of a model in the paper's class: no norm layers, no biases, torch's default weights, a fixed simplex classifier.

    Graf et al. train without norm layers, from torch's initialization (kaiming_uniform_, a = sqrt 5), with a fixed classifier whose rows
    are the vertices of a simplex (its orientation is ours). Zero padding is kept where the paper pads cyclically, and so is cyclic padding
    (``padding_mode="circular"``): the constants are those of the map that is used.

    Args:
        model: a convolutional network, plain or residual; only read.
        in_chans: of the images.
        image_size: of the images, in pixels.
        num_classes: outputs.
        seed: of the weights.

    Raises:
        UsageError: the theorem does not cover the network, see `capnas.excess.composition.composition`, it has too few features, or it
            cannot run at this size.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    >>> paper = paper_network(net, in_chans=1, image_size=8, num_classes=3)
    >>> paper.removed, [o.name for o in paper.operators], [o.fixed for o in paper.operators]
    (('1',), ['0', '5'], [False, True])
    """
    model = cloned(unwrap_model(model))
    removed = tuple(name for name, module in model.named_modules() if name and isinstance(module, _NORMS))
    for name in removed:
        model.set_submodule(name, _without_norm(model.get_submodule(name)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                module.bias = None
                module.reset_parameters()
    graph = trace_size(model, in_chans, image_size)
    stages = composition(graph)
    last = next((s.branches[0][0].layer for s in reversed(stages) if len(s.branches) == 1), "")
    head = model.get_submodule(last) if last else None
    if head is None or graph.nodes[graph.output[0]].shape != (1, num_classes):
        raise UsageError(f"excess capacity needs a network that ends in a classifier of {num_classes} outputs, a weight layer of its own.")
    weight = cast(nn.Parameter, head.weight)
    with torch.no_grad():
        weight.copy_(_reachable_simplex(num_classes, weight[0].numel()).reshape(weight.shape))
    weight.requires_grad_(False)
    return PaperNetwork(model=model, stages=stages, operators=tuple(_operators(graph, stages, last)), removed=removed)


def _reachable_simplex(classes: int, features: int) -> Tensor:
    """The simplex turned so that features that are not negative, as behind a ReLU, can reach every vertex: features in groups, one a class.

    The paper leaves the orientation open. In that of `simplex_classifier` such features never choose the second class over the first.
    """
    if features < classes:
        return simplex_classifier(classes, features)
    each = features // classes
    groups = torch.zeros(classes, features)
    groups[:, : each * classes] = torch.eye(classes).repeat(1, each) / math.sqrt(each)
    return math.sqrt(classes / (classes - 1)) * (groups - groups.mean(0))


def _operators(graph: Trace, stages: tuple[Stage, ...], last: str) -> Iterator[Operator]:
    nodes = {n.module: n for n in graph.nodes if f"{n.module}.weight" in n.params and n.op.split(".")[1] not in ("t", "view")}
    for name in (step.layer for stage in stages for branch in stage.branches for step in branch if step.layer):
        node = nodes[name]
        if node.op.startswith("aten.convolution"):
            options: dict[str, Any] = {key: tuple(node.attrs[key]) for key in ("stride", "padding", "dilation")}
            options |= {"groups": int(node.attrs["groups"]), "padding_mode": "zeros"}
            if (around := circular_padding(graph, node)) is not None:
                cells = around.attrs["pad"]  # before and after each axis, the last one first
                options |= {"padding": tuple(zip(cells[-2::-2], cells[::-2])), "padding_mode": "circular"}
            size = (around or node).input_shapes[0][2:]
            yield Operator(name=name, size=size, options=options, fixed=name == last)
        else:
            yield Operator(name=name, options={}, fixed=name == last)


def _without_norm(module: nn.Module) -> nn.Module:
    """What a norm layer does besides: timm's hold an activation."""
    kept = [part for part in (getattr(module, "drop", None), getattr(module, "act", None)) if isinstance(part, nn.Module)]
    return nn.Sequential(*kept) if kept else nn.Identity()
