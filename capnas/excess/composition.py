"""A traced network as the theorem sees it: maps in a row, and branches that meet again in a sum or a concatenation.

Theorem 3.5 of Graf et al. (arXiv 2202.08070) takes networks built by composition and addition from weight layers without bias, maps
phi with phi(0) = 0 and a known Lipschitz constant. This module reads that structure from the dataflow graph and refuses, by name, what is
outside of it: attention, gates, biases, learned scales, norm layers. The paper's own networks have ReLU, max and average pooling;
other activations with phi(0) = 0, exact constants of average pooling and the true constant of overlapping max pooling are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from capnas.errors import UsageError
from capnas.graph.dataflow import INPUT, Node, Trace
from capnas.measures.excess import Block, WeightLayer
from capnas.measures.operator_norms import max_pool_constant


@dataclass(frozen=True, kw_only=True)
class Step:
    """One map that is not 1-Lipschitz as it is.

    Attributes:
        layer: name of the weight layer, "" for a map without weights.
        constant: Lipschitz constant of a map without weights.
    """

    layer: str = ""
    constant: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One map, or branches that run from one point of the network to the next.

    Attributes:
        branches: steps of each branch; an empty one is an identity shortcut.
        join: "add" or "concat".
    """

    branches: tuple[tuple[Step, ...], ...]
    join: str = "add"


@dataclass(frozen=True, kw_only=True)
class _Fork:
    branches: tuple[tuple[Step | _Fork, ...], ...]
    join: str


_Path = tuple["Step | _Fork", ...]

_SAME = frozenset(
    """
    view _unsafe_view reshape flatten unflatten squeeze unsqueeze permute transpose t contiguous clone detach alias slice narrow select
    split split_with_sizes chunk unbind _to_copy relu relu_ celu celu_ tanh tanh_
    """.split()  # noqa: SIM905 (one word a name reads better than quoted strings)
)
_ACTIVATIONS = {"gelu": 1.1290, "silu": 1.09984, "hardswish": 1.5, "mish": 1.08850}  # the largest slopes, rounded up
_WEIGHTED = ("convolution", "mm", "linear", "matmul")


def composition(trace: Trace) -> tuple[Stage, ...]:
    """The stages of a network from input to output.

    Args:
        trace: of `capnas.graph.tracing.trace`, of a network without norm layers and biases, see `capnas.excess.network.paper_network`.

    Raises:
        UsageError: an operation that the theorem does not cover, or a structure that `Block` does not (branches within branches, a layer
            used twice, several outputs); the text names the module.

    >>> from torch import nn
    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))
    >>> [(s.branches[0][0].layer, s.branches[0][0].constant) for s in composition(trace(net, (1, 3, 6, 6)))]
    [('0', 1.0), ('', 0.25), ('4', 1.0)]
    """
    if len(trace.output) != 1:
        raise UsageError(f"excess capacity needs a network with one output; this one has {len(trace.output)}.")
    fed = trace.fed()
    sources = {n.index: [i for i in n.inputs if i is not None and i in fed] for n in trace.nodes if n.index in fed}
    above = _dominators(sources)
    stages = tuple(s for part in _walk(trace, trace.output[0], INPUT, sources, above) if (s := _stage(part)) is not None)
    named = [step.layer for stage in stages for branch in stage.branches for step in branch if step.layer]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UsageError(f"excess capacity needs layers that are used once; {twice[0]} is used {named.count(twice[0])} times.")
    if not named:
        raise UsageError("excess capacity needs a network with weight layers; this one has none.")
    return stages


def blocks(stages: Sequence[Stage], layers: Mapping[str, WeightLayer]) -> tuple[Block, ...]:
    """The stages with the constants of their layers filled in, for the paper's `capnas.measures.excess.capacity_bounds`.

    >>> stage = Stage(branches=((Step(layer="a"),), ()))
    >>> blocks([stage], {"a": WeightLayer(norm=2.0, distance=1.0, weights=9)})[0].shortcut
    1.0
    """
    return tuple(_block(stage, layers) for stage in stages)


def _block(stage: Stage, layers: Mapping[str, WeightLayer]) -> Block:
    trained = [b for b in stage.branches if any(step.layer for step in b)]
    fixed = [math.prod(step.constant for step in b) for b in stage.branches if not any(step.layer for step in b)]
    shortcut = math.fsum(fixed) if stage.join == "add" else math.hypot(*fixed)
    if not trained:  # a map without weights: a factor
        return Block(branches=((WeightLayer(norm=shortcut),),))
    branches = (tuple(layers[s.layer] if s.layer else WeightLayer(norm=s.constant) for s in b) for b in trained)
    return Block(branches=tuple(branches), shortcut=shortcut, join=stage.join)


def circular_padding(trace: Trace, node: Node) -> Node | None:
    """The circular padding that a convolution reads and nothing else does, which is one map with it: the paper's layers; else None."""
    before = node.inputs[0] if _kind(node) == "convolution" and not any(node.attrs["padding"]) else None
    if before is None or before == INPUT or _kind(trace.nodes[before]) != "_pad_circular":
        return None
    return trace.nodes[before] if sum(n.inputs.count(before) for n in trace.nodes) == 1 else None


def _dominators(sources: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, int]]:
    """For each node the last one that every way from the input passes before it, and how many such there are."""
    above = {INPUT: (INPUT, 0)}
    for index, producers in sources.items():
        common = producers[0]
        for other in producers[1:]:
            while common != other:
                if above[common][1] >= above[other][1]:
                    common = above[common][0]
                else:
                    other = above[other][0]
        above[index] = (common, above[common][1] + 1)
    return above


def _walk(trace: Trace, end: int, start: int, sources: Mapping[int, Sequence[int]], above: Mapping[int, tuple[int, int]]) -> _Path:
    """The maps between two values of the network, the first of which every way to the second passes."""
    steps: list[Step | _Fork] = []
    while end != start:
        node = trace.nodes[end]
        if len(sources[end]) > 1:
            start_of_fork, join = above[end][0], _join(node)
            parts = [_walk(trace, i, start_of_fork, sources, above) for i in sources[end]]
            steps.append(_Fork(branches=tuple(b for p in parts for b in _spliced(p, join)), join=join))
            end = start_of_fork
        else:
            step = _step(node)
            if step.layer or step.constant != 1.0:
                steps.append(step)
            around = circular_padding(trace, node)
            end = sources[end if around is None else around.index][0]
    return tuple(reversed(steps))


def _spliced(path: _Path, join: str) -> Sequence[_Path]:
    """The branches of (a + b) in (a + b) + c; else the path itself."""
    return path[0].branches if len(path) == 1 and isinstance(path[0], _Fork) and path[0].join == join else [path]


def _stage(part: Step | _Fork) -> Stage | None:
    if isinstance(part, Step):
        return Stage(branches=((part,),))
    branches = []
    for branch in part.branches:
        if any(isinstance(step, _Fork) for step in branch):
            near = next((s.layer for b in part.branches for s in b if isinstance(s, Step) and s.layer), "the input")
            raise UsageError(f"excess capacity takes branches in a row, not branches within branches, as near {near}.")
        branches.append(tuple(step for step in branch if isinstance(step, Step)))
    return Stage(branches=tuple(branches), join=part.join)


def _kind(node: Node) -> str:
    return node.op.split(".")[1]


def _join(node: Node) -> str:
    kind = _kind(node)
    if kind in ("add", "add_") and node.attrs.get("alpha", 1) == 1 and set(node.input_shapes) == {node.shape}:
        return "add"
    if kind == "cat":
        return "concat"
    product = kind.rstrip("_") in ("mul", "bmm", "mm", "matmul", "baddbmm")
    raise _outside(node, "a product of two feature maps (attention or a gate)" if product else node.op)


def _step(node: Node) -> Step:
    kind = _kind(node)
    if kind in _WEIGHTED:
        return _weight_step(node, kind)
    relayout = kind.rstrip("_") == "as_strided" and node.shape == node.input_shapes[0]  # a global pooling of channels-last maps
    if kind in _SAME or relayout or (kind == "cat" and len(node.inputs) == 1):
        return Step()
    if kind.rstrip("_") in _ACTIVATIONS:
        return Step(constant=_ACTIVATIONS[kind.rstrip("_")])
    if kind.rstrip("_") == "hardtanh" and node.attrs["min_val"] <= 0 <= node.attrs["max_val"]:
        return Step()
    if kind.rstrip("_") == "leaky_relu":
        return Step(constant=max(1.0, abs(float(node.attrs["negative_slope"]))))
    if kind.rstrip("_") == "elu":  # SELU too: scale x above zero, scale alpha (exp(input_scale x) - 1) below
        alpha, scale, inner = (abs(float(node.attrs[name])) for name in ("alpha", "scale", "input_scale"))
        return Step(constant=scale * max(1.0, alpha * inner))
    if (pool := _POOLS.get(kind)) is not None:
        return Step(constant=pool(node))
    if node.attrs.get("rounding_mode") is not None:
        raise _outside(node, "a quotient that is rounded")
    if kind.rstrip("_") in ("mul", "div") and isinstance(node.attrs.get("other"), int | float) and len(node.inputs) == 1:
        factor = abs(float(node.attrs["other"]))
        return Step(constant=factor if kind.startswith("mul") else 1 / factor)
    if kind == "constant_pad_nd" and not node.attrs.get("value", 0):
        return Step()
    if "norm" in kind:
        raise _outside(node, "a norm layer")
    if kind == "addmm":
        raise _outside(node, "a layer with a bias")
    if kind.rstrip("_") in ("add", "sub", "mul", "div"):
        raise _outside(node, "a learned or fixed shift" if kind.startswith(("add", "sub")) else "a learned scale")
    raise _outside(node, node.op)


def _weight_step(node: Node, kind: str) -> Step:
    weights = [p for p in node.params if p.rpartition(".")[2] == "weight"]
    if "bias" in node.input_names:
        raise _outside(node, "a layer with a bias")
    if len(weights) != 1 or node.params != (weights[0],) or weights[0] != f"{node.module}.weight" or node.attrs.get("transposed", False):
        raise _outside(node, "a transposed convolution" if node.attrs.get("transposed") else "a weight that is computed or borrowed")
    return Step(layer=node.module)


def _max_pool(node: Node) -> float:
    kernel, stride = node.attrs["kernel_size"], node.attrs.get("stride") or node.attrs["kernel_size"]
    if set(node.attrs.get("dilation", (1,))) != {1}:
        raise _outside(node, "a dilated pooling")
    axes = len(node.shape) - 2
    windows, steps = (tuple(v) * axes if len(v) == 1 else tuple(v) for v in (kernel, stride))
    return max_pool_constant(windows, steps, axes)


def _mean(node: Node) -> float:
    return 1 / math.sqrt(math.prod(node.input_shapes[0]) / math.prod(node.shape))


def _average_pool(node: Node) -> float:
    """Average pooling is separable: the product over axes of the norm of its windows as a matrix."""
    axes = len(node.shape) - 2
    numbers = {}
    for name in ("kernel_size", "stride", "padding"):
        given = tuple(node.attrs.get(name) or (node.attrs["kernel_size"] if name == "stride" else (0,)))
        numbers[name] = given * axes if len(given) == 1 else given
    if node.attrs.get("divisor_override") is not None:
        raise _outside(node, "an average pooling with a divisor of its own")
    constant = 1.0
    for size, outputs, kernel, stride, pad in zip(node.input_shapes[0][2:], node.shape[2:], *numbers.values()):
        windows = [(i * stride - pad, min(i * stride - pad + kernel, size + pad)) for i in range(outputs)]
        constant *= _windows_norm(size, windows, padded=node.attrs.get("count_include_pad", True))
    return constant


def _adaptive_pool(node: Node) -> float:
    constant = 1.0
    for size, outputs in zip(node.input_shapes[0][2:], node.shape[2:]):
        constant *= _windows_norm(size, [(i * size // outputs, -(-(i + 1) * size // outputs)) for i in range(outputs)], padded=False)
    return constant


def _windows_norm(size: int, windows: Sequence[tuple[int, int]], *, padded: bool) -> float:
    matrix = np.zeros((len(windows), size))
    for row, (first, last) in zip(matrix, windows):
        inside = slice(max(first, 0), min(last, size))
        row[inside] = 1 / (last - first if padded else inside.stop - inside.start)
    return float(np.linalg.norm(matrix, 2))


_POOLS: dict[str, Callable[[Node], float]] = {
    "max_pool2d_with_indices": _max_pool,
    "mean": _mean,
    "avg_pool2d": _average_pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
}


def _outside(node: Node, what: str) -> UsageError:
    where = f"module {node.module}" if node.module else "the network"
    reason = "the theorem takes weight layers without bias, sums, concatenations, pooling and activations that keep zero"
    return UsageError(f"excess capacity is not defined for this network: {where} computes {what}; {reason}. Try a plain or residual CNN.")


def to_json(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Plain JSON types; `from_json` reads them back.

    >>> stages = (Stage(branches=((Step(layer="a"), Step(constant=2.0)), ())),)
    >>> from_json(to_json(stages)) == stages
    True
    """
    return [{"join": s.join, "branches": [[step.layer or step.constant for step in b] for b in s.branches]} for s in stages]


def from_json(stages: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """See `to_json`."""
    return tuple(
        Stage(
            branches=tuple(tuple(Step(layer=s) if isinstance(s, str) else Step(constant=float(s)) for s in b) for b in stage["branches"]),
            join=stage["join"],
        )
        for stage in stages
    )
