"""What a network would be with some of its downsampling steps undone: its receptive fields and its cost, without building it.

The authors' remedy for layers that see nothing new is to grow the receptive field more slowly, by strides that are set to 1 (ResNet18 on
CIFAR-10 at 32 px rises from 84.6 to 91.95 % without its first two downsamplings; Shenk et al., arXiv 2006.08679, and Richter et al.,
ICMLA 2021). Predicting fields and cost of every such change from one trace is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from capnas.graph.dataflow import INPUT, Node, Trace

_POOL = re.compile(r"aten\.(max|avg)_pool[123]d.*")
_COLLAPSE = re.compile(r"aten\.(mean|amax|amin|sum|_?adaptive_(avg|max)_pool[123]d).*")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A downsampling: every strided operation that reads maps of one spacing, the block's own and its shortcut's.

    Attributes:
        jump: spacing of the maps that it reads, in pixels of the input.
        stride: by which it divides them.
        layers: names of the modules.
    """

    jump: int
    stride: int
    layers: tuple[str, ...]


def steps(graph: Trace) -> tuple[Step, ...]:
    """The downsampling steps of a network from the input on.

    >>> from torch import nn
    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    >>> [(step.jump, step.stride, step.layers) for step in steps(trace(net, (1, 3, 32, 32)))]
    [(1, 2, ('0',)), (2, 2, ('2',))]
    """
    jumps = _jumps(graph)
    found: dict[tuple[int, int], dict[str, None]] = {}
    for node in graph.nodes:
        before = _first(node, jumps)
        if before is not None and (stride := _stride(node)) > 1:
            found.setdefault((before, stride), {})[node.module] = None
    return tuple(Step(jump=jump, stride=stride, layers=tuple(names)) for (jump, stride), names in sorted(found.items()))


def without(graph: Trace, undone: Collection[Step]) -> Trace:
    """The same graph with the strides of some steps set to 1, for `capnas.graph.structure.structure`'s receptive fields.

    Shapes and operation counts are left as they were: see `macs_without` for the cost.

    >>> from torch import nn
    >>> from capnas.graph.structure import structure
    >>> from capnas.graph.tracing import trace
    >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)), (1, 3, 32, 32))
    >>> [structure(g).layers["1"].receptive_field[0] for g in (graph, without(graph, steps(graph)))]
    [(7.0, 7.0), (5.0, 5.0)]
    """
    jumps, chosen = _jumps(graph), {(s.jump, s.stride) for s in undone}
    nodes = []
    for node in graph.nodes:
        if (_first(node, jumps), _stride(node)) in chosen:
            stride = node.attrs.get("stride") or node.attrs["kernel_size"]
            node = replace(node, attrs={**node.attrs, "stride": 1 if isinstance(stride, int) else (1,) * len(tuple(stride))})
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def macs_without(graph: Trace, undone: Collection[Step]) -> int:
    """Multiply-accumulates of one image with some steps undone: every map behind a step has ``stride ** 2`` times the positions.

    Right for convolutions and for layers applied to each token; attention over all tokens would grow by more.

    >>> from torch import nn
    >>> from capnas.graph.tracing import trace
    >>> net = lambda s: nn.Sequential(nn.Conv2d(3, 8, 3, s, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> graph = trace(net(2), (1, 3, 32, 32))
    >>> macs_without(graph, steps(graph)) == sum(n.flops for n in trace(net(1), (1, 3, 32, 32)).nodes) // 2
    True
    """
    jumps = _jumps(graph)
    total = 0
    for node in graph.nodes:
        after = jumps.get(node.index)
        growth = math.prod(s.stride**2 for s in undone if after is not None and s.jump < after)
        total += node.flops * growth
    return total // 2 // max(1, graph.input_shape[0])


def _jumps(graph: Trace) -> dict[int, int]:
    """Spacing of the maps that each node makes; nodes that keep no positions are missing."""
    found = {INPUT: 1} if len(graph.input_shape) > 2 else {}
    for node in graph.nodes:
        before = _first(node, found)
        if before is None or len(node.shape) < 3:
            continue
        if _COLLAPSE.fullmatch(node.op) and math.prod(node.shape[2:]) <= 1 < math.prod(node.input_shapes[0][2:]):
            continue
        found[node.index] = before * _stride(node)
    return found


def _first(node: Node, jumps: dict[int, int]) -> int | None:
    """Spacing of the coarsest map that the node reads."""
    return max((jumps[i] for i in node.inputs if i is not None and i in jumps), default=None)


def _stride(node: Node) -> int:
    """Of a convolution or a pooling window; 1 where the axes differ, for transposed convolutions and all else."""
    if node.op.startswith("aten.convolution") and not node.attrs.get("transposed"):
        stride = node.attrs["stride"]
    elif _POOL.fullmatch(node.op):
        stride = node.attrs.get("stride") or node.attrs["kernel_size"]
    else:
        return 1
    values = {stride} if isinstance(stride, int) else set(stride)
    return int(values.pop()) if len(values) == 1 else 1
