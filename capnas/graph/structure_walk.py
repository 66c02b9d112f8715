"""The walk over a dataflow graph that carries the layer algebra and the receptive fields along; `capnas.graph.structure` makes its report.

Each tensor has log2 K (paths from the input to one of its units), the receptive field along each image axis, and the layout that says which
of its axes hold the image. Each leaf adds its complexity once. Decisions of ours, where the reconstruction is silent:

* Views, norms, activations, softmax, resampling and scaling by constants or by norms of the data leave K alone.
* Attention counts its value path: ``softmax(A) V`` over n tokens is an average of n, as a pooling. Without a softmax a product of two data
  matrices over n terms is ``n (K_A + K_B)``: the gate rule under a sum.
* A constant (class token, position code) has no path from the input, ``K = 0``; a concatenation takes the mean over units.
* Values written or computed in a part of a tensor replace those that were there; it has the mean over its units, as a concatenation.
* An activation belongs to the linear layer that it reads through views, norms and constants; otherwise it is a leaf of its own. Two
  activations of the same values cut at the same hyperplanes and count once. A layer called several times counts at each call.
* A transposed convolution has the mean fan-in of its output phases, ``r / stride^2``; adaptive pooling that of its narrowest window.
* A gated linear unit is its parts: a split, the activation of one half, the gate rule.
* Fields may end between pixels (upsampling, adaptive pooling): the walk carries the fractions, the report rounds them up once.
* Global pooling, attention over all tokens and dense layers on flattened maps make the field infinite; attention in windows widens it by
  the window. Where a map is multiplied by a pooled tensor (squeeze-excitation) or mixed by attention weights, the field of the weights
  themselves is left out unless ``gates`` is set. Pixels that a slice takes at an offset keep the field of the slice's origin.
"""

from __future__ import annotations

import math
from dataclasses import replace

from capnas.graph import operations
from capnas.graph.dataflow import INPUT, Node, Place, Trace
from capnas.graph.leaf_totals import Extent, Leaves
from capnas.graph.tensor_state import State, concatenated, elementwise, joined, of_input, resized
from capnas.measures import algebra, axes, receptive
from capnas.measures.algebra import PoolGain, Term
from capnas.measures.axes import CHANNEL, Atom, Axis, Layout
from capnas.measures.receptive import Field

WHOLE = -1  # port of the memory that a node wrote a part of


class Walk:
    """One pass over the live nodes of a trace.

    Attributes:
        leaves: their totals.
        ends: states of the outputs that depend on the input.
        weights: sizes of the parameters read, by name.
        macs: multiply-accumulates for one input.
    """

    def __init__(self, trace: Trace, *, pool_gain: PoolGain = "paths", gates: bool = False) -> None:
        self.trace, self.gain, self.gates = trace, pool_gain, gates
        self.batch = max(1, trace.input_shape[0])
        self.states: dict[tuple[int | None, int], State] = {(INPUT, 0): of_input(trace.input_shape)}
        self.names: dict[int | None, str | None] = {}  # constant node -> parameter that it was computed from
        self.filled: dict[int | None, int] = {}  # node that wrote to a memory -> units there that have values by then
        self.leaves = Leaves(self.batch)
        self.sizes, self.weights = dict[str, int](), dict[str, int]()
        live = trace.live()
        for index in sorted(live):
            self._visit(trace.nodes[index])
        self.ends = [s for end in zip(trace.output, trace.output_ports, trace.output_places) if (s := self._state(*end)) is not None]
        self.macs = sum(trace.nodes[i].flops for i in live) // 2 // self.batch

    def _visit(self, node: Node) -> None:
        base = node.base
        for name, argument, shape in zip(node.input_params, node.input_names, node.input_shapes):
            if name is not None and argument not in operations.BUFFERS:
                self.sizes.setdefault(name, math.prod(shape))  # as it is, before a slice or an expansion
                if not node.shape_only:
                    self.weights[name] = self.sizes[name]
        given = list(map(self._state, node.inputs, node.input_ports, node.input_places, node.input_shapes))
        data = [s for s in given if s is not None]
        if not data or operations.CONSTANT.fullmatch(base):
            self.names[node.index] = next((n for i in range(len(node.inputs)) if (n := self._name_of(i, node))), None)
            return
        self.states[node.index, 0] = state = self._apply(base, node, given, data)
        for port in range(1, len(node.shapes) if operations.SPLIT.fullmatch(base) else 1):
            self.states[node.index, port] = replace(state, layout=axes.cut(state.layout, node.shapes[port]))
        if node.writes:
            self.states[node.index, WHOLE] = self._written(node, given[0], state)

    def _apply(self, base: str, node: Node, given: list[State | None], data: list[State]) -> State:
        x = data[0]
        if base == "convolution":
            return self._convolution(node, given[0] or x)
        if operations.PRODUCT.fullmatch(base):
            return self._product(base, node, given)
        if operations.ACTIVATION.fullmatch(base) or (base in ("clamp", "clamp_min") and node.attrs.get("min") == 0):
            return self._activation(node, x)
        if operations.POOL.search(base):
            return self._pool(base, node, x)
        if operations.NORM.fullmatch(base):
            return replace(x, norm=node.index)
        if "softmax" in base:
            return replace(x, mixing=True, origin=node.index)
        reduced = operations.REDUCTION.fullmatch(base) and len(data) == 1 and node.shape != node.input_shapes[0]
        if reduced or operations.STATISTIC.fullmatch(base):
            return self._reduction(base, node, x)
        if base in ("cat", "stack"):
            return concatenated(base, node, given)
        if operations.RESIZE.fullmatch(base):
            return resized(base, node, x)
        if base.startswith("_fft"):
            spread = axes.reach(x.fields, x.layout, tuple(a for axis in x.layout for a in axis))
            return replace(x, layout=axes.unknown([x.layout], node.shape), fields=spread, origin=node.index)
        if len(data) == 1 and (moved := axes.rearrange(base, node.attrs, x.layout, node.shape)) is not None:
            return replace(x, layout=moved)
        if base in ("copy", "fill", "zero"):
            new = given[1] if len(given) > 1 else None
            return replace(x, paths=-math.inf) if new is None else elementwise(base, node, [new], gates=self.gates)
        return elementwise(base, node, given, gates=self.gates)

    # leaves

    def _convolution(self, node: Node, x: State) -> State:
        weight, kernel = node.input_shapes[1], node.input_shapes[1][2:]
        groups, transposed = node.attrs["groups"], node.attrs["transposed"]
        in_units, out_units = (weight[0], weight[1] * groups) if transposed else (weight[1] * groups, weight[0])
        stride, dilation = operations.each(node.attrs["stride"], len(kernel)), operations.each(node.attrs["dilation"], len(kernel))
        rule = receptive.transposed_window if transposed else receptive.window
        alone = groups == in_units == out_units  # each channel by itself: pixels held in channels stay apart
        mixed = x.fields if alone else axes.reach(x.fields, x.layout, x.layout[1])
        layout, fields, extent = axes.slide(
            x.layout, mixed, node.shape[2:], lambda f, i: (rule(f, kernel[i], stride[i], dilation[i]), (kernel[i] - 1.0) * dilation[i] + 1)
        )
        layout = (layout[0], layout[1] if alone else _channels(out_units), *layout[2:])
        leaf = algebra.linear_leaf(in_units, out_units, kernel=math.prod(kernel), groups=groups)
        if transposed:  # the taps are spread over stride^2 phases: the mean fan-in of an output unit
            leaf = replace(leaf, log2_fan_in=math.log2(in_units / groups * math.prod(kernel) / math.prod(stride)))
        after = replace(x, layout=layout, fields=fields, mixing=x.mixing and math.prod(kernel) == 1)
        return self._linear("conv", node, 1, x, after, leaf, out_units, groups, extent)

    def _product(self, base: str, node: Node, given: list[State | None]) -> State:
        left, right = (0, 1) if base == "linear" else (len(given) - 2, len(given) - 1)
        a, b, shape_a, shape_b = given[left], given[right], node.input_shapes[left], node.input_shapes[right]
        terms = shape_a[-1]
        if a is not None and b is not None:
            return self._data_product(node, a, b, terms)
        if a is not None:
            units = shape_b[0] if base == "linear" else shape_b[-1] if len(shape_b) > 1 else 1
            new = (_channels(units),) if len(shape_b) > 1 else ()
            return self._dense(node, right, a, a.layout[-1], (*a.layout[:-1], *new), terms, units)
        if b is not None:
            units = shape_a[-2] if len(shape_a) > 1 else 1
            rows = b.layout[-2] if len(shape_b) > 1 else b.layout[-1]
            return self._dense(node, left, b, rows, (*b.layout[:-2], _channels(units), *b.layout[-1:]), terms, units)
        return replace(next(s for s in given if s is not None), origin=node.index)  # the data enter through the added term alone

    def _dense(self, node: Node, weight: int, x: State, mixed: Axis, layout: Layout, in_units: int, out_units: int) -> State:
        after = replace(x, layout=layout, fields=axes.reach(x.fields, x.layout, mixed))
        return self._linear("linear", node, weight, x, after, algebra.linear_leaf(in_units, out_units), out_units)

    def _data_product(self, node: Node, a: State, b: State, terms: int) -> State:
        value, mixed, other = (b, b.layout[-2], a) if a.mixing and not b.mixing else (a, a.layout[-1], b)
        attention = a.mixing != b.mixing
        gain = algebra.average_gain(terms, self.gain) if attention else math.log2(terms)
        paths = gain + (value.paths if attention else algebra.log2_add([a.paths, b.paths]))
        fields = axes.reach(value.fields, value.layout, mixed)
        if self.gates or not attention:
            second = other.fields if attention else axes.reach(b.fields, b.layout, b.layout[-2])
            fields = tuple(map(receptive.merge, zip(fields, second)))
        after = replace(joined(node, (*a.layout[:-1], b.layout[-1]), [a, b], paths), fields=fields)
        if attention:
            self.leaves.call(node.module, "attention", gain, value, after)
        return after

    def _linear(
        self, kind: str, node: Node, weight: int, x: State, after: State, leaf: Term, units: int, groups: int = 1, extent: Extent = ()
    ) -> State:
        """A convolution or dense layer: ``after`` has the layout and the fields, the leaf the rest but its positions."""
        own = leaf.log2_fan_in
        after = replace(
            after, paths=x.paths + own, depth=x.depth + 1, shortest=x.shortest + 1, origin=node.index, norm=INPUT, statistic=False
        )
        name = (self._name_of(weight, node) or "").split(".parametrizations.")[0].rpartition(".")[0] or node.module
        totals = self.leaves.call(name, kind, own, x, after, extent)
        totals.compression = math.log2(units // groups) - own
        leaf = replace(leaf, complexity_positions=leaf.complexity * math.prod(node.shape) / (self.batch * units))
        self.leaves.waiting[node.index] = totals, leaf
        return after

    def _activation(self, node: Node, x: State) -> State:
        self.leaves.activation(node, x)
        return replace(x, origin=node.index, norm=INPUT)

    def _pool(self, base: str, node: Node, x: State) -> State:
        lead = len(x.layout) - int(base[base.index("pool") + 4])
        sizes, before = node.shape[lead:], node.input_shapes[0][lead:]
        kernel, stride, dilation, taps = operations.pooling_window(base, node.attrs, before, sizes)

        def rule(f: Field, i: int) -> tuple[Field, float]:
            if "adaptive" in base and sizes[i] == 1:
                return receptive.whole(f), math.inf
            after = receptive.window(f, kernel[i], 1, dilation[i])
            return replace(after, jump=f.jump * stride[i]), (kernel[i] - 1.0) * dilation[i] + 1

        layout, fields, extent = axes.slide(x.layout, x.fields, sizes, rule)
        return self._pooled("max" if "max" in base else "average", node, x, layout, fields, extent, taps)

    def _reduction(self, base: str, node: Node, x: State) -> State:
        dims, every = node.attrs.get("dim"), range(len(x.layout))
        named = [dims] if isinstance(dims, int) else dims or every
        gone = {i % len(every) for i in named} if node.shape != node.input_shapes[0] else set()
        keep = len(node.shape) == len(x.layout)
        layout: Layout = tuple(() if i in gone else a for i, a in enumerate(x.layout) if keep or i not in gone)
        taken = tuple(a for i in sorted(gone) for a in x.layout[i])
        fields = axes.reach(x.fields, x.layout, taken)
        if operations.STATISTIC.fullmatch(base):
            return replace(x, layout=layout, fields=fields, statistic=True, origin=node.index)
        kind = "average" if base == "mean" else "sum" if "sum" in base else "max"
        return self._pooled(kind, node, x, layout, fields, (), axes.entries(taken))

    def _pooled(self, kind: str, node: Node, x: State, layout: Layout, fields: tuple[Field, ...], extent: Extent, taps: int) -> State:
        units = axes.channels(layout)
        positions = self.leaves.positions(node, units)
        leaf = algebra.pool_leaf("average" if kind == "average" else "max", units, kernel=taps, positions=positions, pool_gain=self.gain)
        after = replace(x, layout=layout, fields=fields, paths=x.paths + leaf.log2_fan_in, origin=node.index, norm=INPUT)
        totals = self.leaves.call(node.module, "pool", leaf.log2_fan_in, x, after, extent)
        if kind != "sum":
            totals.add(leaf)
        return after

    # memory

    def _state(self, producer: int | None, port: int, place: Place | None, shape: tuple[int, ...] | None = None) -> State | None:
        """State of a tensor, or where another view of its memory was written, of all of that memory in the tensor's shape."""
        state = self.states.get((producer, port))
        if state is None or place is None:
            return state
        state = self.states.get((producer, WHOLE), state)
        return state if shape is None else replace(state, layout=axes.cut(state.layout, shape))

    def _written(self, node: Node, old: State | None, new: State) -> State:
        (source, whole), part = self.trace.memory(node.inputs[0], node.input_shapes[0]), math.prod(node.input_shapes[0])
        if self.trace.writes_back(node) and source in self.filled:
            self.filled[node.index] = self.filled[source]
            return self.states[source, WHOLE]
        kept = min(self.filled.get(source, 0 if old is None else whole), whole - part)
        self.filled[node.index] = kept + part
        data = [new] if old is None or not kept else [old, new]
        paths = algebra.mean_fan_in([s.paths for s in data], [kept, part][-len(data) :])
        base = self.states.get((source, WHOLE)) or self.states.get((source, 0), new)
        return joined(node, base.layout, data, paths)

    def _name_of(self, place: int, node: Node) -> str | None:
        return node.input_params[place] or self.names.get(node.inputs[place])


def _channels(units: int) -> Axis:
    return (Atom(axes=(CHANNEL,), size=units),)
