"""What the structure walk knows of one tensor, and of one that is made of others without a layer; see `capnas.graph.structure_walk`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from capnas.graph import operations
from capnas.graph.dataflow import INPUT, Node
from capnas.measures import algebra, axes, receptive
from capnas.measures.axes import Atom, Layout
from capnas.measures.receptive import Field


@dataclass(frozen=True, kw_only=True)
class State:
    """What the walk knows of one tensor; a constant has no state.

    Attributes:
        layout: which axes hold the image.
        fields: receptive field along each image axis.
        paths: log2 K, paths from the input to one of its units; -inf of zeros.
        depth: weight layers on the longest path from the input.
        shortest: those on the shortest.
        origin: node that computed the values, before views, norms and constants.
        norm: last norm or constant since then.
        mixing: weights that softmax made (heads may be mixed after it).
        statistic: a norm or a scale of the data, neutral as a factor.
    """

    layout: Layout
    fields: tuple[Field, ...]
    paths: float
    depth: int = 0
    shortest: int = 0
    origin: int = INPUT
    norm: int = INPUT
    mixing: bool = False
    statistic: bool = False


def of_input(shape: Sequence[int]) -> State:
    """State of a model input (B, C, image axes...).

    >>> len(of_input((1, 3, 32, 32)).fields)
    2
    """
    return State(layout=axes.input_layout(shape), fields=(Field(),) * (len(shape) - 2), paths=0.0)


def joined(node: Node, layout: Layout, states: Sequence[State], paths: float) -> State:
    """State of a tensor whose units read several tensors: the widest of their fields, the longest and the shortest of their ways."""
    return State(
        layout=layout,
        fields=tuple(map(receptive.merge, zip(*(s.fields for s in states)))),
        paths=paths,
        depth=max(s.depth for s in states),
        shortest=min(s.shortest for s in states),
        origin=node.index,
    )


def concatenated(base: str, node: Node, given: Sequence[State | None]) -> State:
    """State after ``cat`` or ``stack``: the mean of K over the units, of which constants have 0."""
    data = [s for s in given if s is not None]
    if len(given) == 1 and base == "cat":
        return data[0]
    new = base == "stack"
    at = node.attrs.get("dim", 0) % len(node.shape)
    units = [1 if new else shape[at] if len(shape) > at else 0 for shape in node.input_shapes]
    paths = algebra.mean_fan_in([-math.inf if s is None else s.paths for s in given], units)
    full = [s for s in data if len(s.layout) == len(node.shape) - new]
    if full:
        known = {i for s in full if not new for a in s.layout[at] for i in a.axes}
        first = full[0].layout
        layout: Layout = (*first[:at], (Atom(axes=tuple(sorted(known)), size=node.shape[at]),), *first[at + (not new) :])
    else:
        layout = axes.unknown([s.layout for s in data], node.shape)
    return joined(node, layout, data, paths)


def elementwise(base: str, node: Node, given: Sequence[State | None], *, gates: bool) -> State:
    """State after an operation on each unit by itself: sums and products add K; divisors, statistics and constants leave it alone.

    Args:
        base: name of the operation.
        node: the operation.
        given: states of its arguments.
        gates: whether the field of a pooled factor is merged into that of the map that it multiplies.
    """
    data = [s for s in given if s is not None]
    layout = axes.broadcast([s.layout for s in data], node.shape)
    if base == "div" and given[0] is not None:
        data = [given[0]]
    elif not all(s.statistic for s in data):
        data = [s for s in data if not s.statistic]
    if len(data) == 1:
        norm = node.index if len(given) > 1 else data[0].norm
        paths = -math.inf if base == "mul" and node.attrs.get("other") == 0 else data[0].paths
        return replace(data[0], layout=layout, paths=paths, norm=norm)
    result = joined(node, layout, data, algebra.log2_add(s.paths for s in data))
    if base != "mul" or gates:
        return result
    a, b = data
    held = [(axes.holds(a.layout, i), axes.holds(b.layout, i)) for i in range(len(a.fields))]
    fields = [f if x and not y else g if y and not x else h for (x, y), f, g, h in zip(held, a.fields, b.fields, result.fields)]
    return replace(result, fields=tuple(fields))


def resized(base: str, node: Node, x: State) -> State:
    """State of an interpolated map."""
    sizes = node.shape[2:]
    factors = [after / before for after, before in zip(sizes, node.input_shapes[0][2:])]
    windows = [(factor, operations.neighbours(base, factor)) for factor in factors]
    layout, fields, _ = axes.slide(x.layout, x.fields, sizes, lambda f, i: (receptive.resampled(f, *windows[i]), 1.0))
    return replace(x, layout=layout, fields=fields, origin=node.index)
