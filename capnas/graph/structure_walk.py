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
from dataclasses import dataclass, field, replace

from capnas.graph import operations
from capnas.graph.dataflow import INPUT, Node, Place, Trace
from capnas.measures import algebra, axes, receptive
from capnas.measures.algebra import PoolGain
from capnas.measures.axes import CHANNEL, Atom, Axis, Layout
from capnas.measures.receptive import Field

Extent = tuple[float, ...]
WHOLE = -1  # port of the memory that a node wrote a part of


@dataclass(frozen=True, kw_only=True)
class State:
    """What the walk knows of one tensor; a constant has no state."""

    layout: Layout
    fields: tuple[Field, ...]
    paths: float  # log2 K
    depth: int = 0
    shortest: int = 0  # weight layers on the shortest path from the input
    origin: int = INPUT  # node that computed the values, before views, norms and constants
    norm: int = INPUT  # last norm or constant since then
    mixing: bool = False  # weights that softmax made (heads may be mixed after it)
    statistic: bool = False  # a norm or a scale of the data, neutral as a factor


@dataclass(kw_only=True)
class Row:
    """Totals of one layer, see `capnas.graph.structure.LayerStructure`; ``seen``: extent, fields before and after, at each call."""

    kind: str
    own: float = 0.0
    compression: float | None = None
    bits: float = 0.0
    position_bits: float = 0.0
    paths: float = -math.inf
    calls: int = 0
    seen: list[tuple[tuple[float, ...], tuple[Field, ...], tuple[Field, ...]]] = field(default_factory=list)


class Walk:
    """One pass over the live nodes of a trace.

    Attributes:
        rows: leaves by name, in the order of the first call.
        ends: states of the outputs that depend on the input.
        weights: sizes of the parameters read, by name.
        macs: multiply-accumulates for one input.
    """

    def __init__(self, trace: Trace, *, pool_gain: PoolGain = "paths", gates: bool = False) -> None:
        self.gain, self.gates = pool_gain, gates
        self.batch = max(1, trace.input_shape[0])
        self.states: dict[tuple[int | None, int], State] = {
            (INPUT, 0): State(layout=axes.input_layout(trace.input_shape), fields=(Field(),) * (len(trace.input_shape) - 2), paths=0.0)
        }
        self.names: dict[int | None, str | None] = {}  # constant node -> parameter that it was computed from
        self.rows: dict[str, Row] = {}
        self.waiting: dict[int, tuple[Row, float, float]] = {}  # linear layers whose activation has not come yet
        self.counted: set[tuple[int, int]] = set()
        self.trace, self.filled = trace, dict[int | None, int]()  # node that wrote to a memory -> units there that have values by then
        self.sizes, self.weights = dict[str, int](), dict[str, int]()
        live = trace.live()
        for index in sorted(live):
            self._visit(trace.nodes[index])
        self.ends = [s for end in zip(trace.output, trace.output_ports, trace.output_places) if (s := self._state(*end)) is not None]
        self.macs = sum(trace.nodes[i].flops for i in live) // 2 // self.batch

    def _visit(self, node: Node) -> None:
        base = operations.base_name(node.op)
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

    def _state(self, producer: int | None, port: int, place: Place | None, shape: tuple[int, ...] | None = None) -> State | None:
        """State of a tensor, or where another view of its memory was written, of all of that memory in the tensor's shape."""
        state = self.states.get((producer, port))
        if state is None or place is None:
            return state
        state = self.states.get((producer, WHOLE), state)
        return state if shape is None else replace(state, layout=axes.cut(state.layout, shape))

    def _apply(self, base: str, node: Node, given: list[State | None], data: list[State]) -> State:
        x = data[0]
        if base == "convolution":
            return self._convolution(node, given[0] or x)
        if operations.PRODUCT.fullmatch(base):
            return self._product(base, node, given)
        if operations.ACTIVATION.fullmatch(base) or (base in ("clamp", "clamp_min") and node.attrs.get("min") == 0):
            return self._activation(node, x)
        if base == "glu":
            return self._gated_half(node, x)
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
            return self._concat(base, node, given, data)
        if operations.RESIZE.fullmatch(base):
            return self._resize(base, node, x)
        if base.startswith("_fft"):
            spread = axes.reach(x.fields, x.layout, tuple(a for axis in x.layout for a in axis))
            return replace(x, layout=axes.unknown([x.layout], node.shape), fields=spread, origin=node.index)
        if len(data) == 1 and (moved := axes.rearrange(base, node.attrs, x.layout, node.shape)) is not None:
            return replace(x, layout=moved)
        if base in ("copy", "fill", "zero"):
            new = given[1] if len(given) > 1 else None
            return replace(x, paths=-math.inf) if new is None else self._pointwise(base, node, [new], [new])
        return self._pointwise(base, node, given, data)

    # leaves

    def _convolution(self, node: Node, x: State) -> State:
        weight, kernel = node.input_shapes[1], node.input_shapes[1][2:]
        groups, transposed = node.attrs["groups"], node.attrs["transposed"]
        in_units, out_units = (weight[0], weight[1] * groups) if transposed else (weight[1] * groups, weight[0])
        stride, dilation = operations.each(node.attrs["stride"], len(kernel)), operations.each(node.attrs["dilation"], len(kernel))
        # the taps of a transposed layer are spread over stride^2 phases: the mean fan-in of an output unit
        own = math.log2(in_units / groups * math.prod(kernel) / (math.prod(stride) if transposed else 1))
        rule = receptive.transposed_window if transposed else receptive.window
        alone = groups == in_units == out_units  # each channel by itself: pixels held in channels stay apart
        mixed = x.fields if alone else axes.reach(x.fields, x.layout, x.layout[1])
        layout, fields, extent = axes.slide(
            x.layout, mixed, node.shape[2:], lambda f, i: (rule(f, kernel[i], stride[i], dilation[i]), (kernel[i] - 1.0) * dilation[i] + 1)
        )
        layout = (layout[0], layout[1] if alone else (Atom(axes=(CHANNEL,), size=out_units),), *layout[2:])
        bits = algebra.linear_leaf(in_units, out_units, kernel=math.prod(kernel), groups=groups).complexity
        after = State(layout=layout, fields=fields, paths=x.paths + own, depth=x.depth + 1, shortest=x.shortest + 1, origin=node.index)
        return self._linear("conv", node, 1, x, after, extent, (own, bits, out_units, groups))

    def _product(self, base: str, node: Node, given: list[State | None]) -> State:
        left, right = (0, 1) if base == "linear" else (len(given) - 2, len(given) - 1)
        a, b, shape_a, shape_b = given[left], given[right], node.input_shapes[left], node.input_shapes[right]
        terms = shape_a[-1]
        if a is not None and b is not None:
            return self._data_product(node, a, b, terms)
        if a is not None:
            units = shape_b[0] if base == "linear" else shape_b[-1] if len(shape_b) > 1 else 1
            new: tuple[Axis, ...] = ((Atom(axes=(CHANNEL,), size=units),),) if len(shape_b) > 1 else ()
            return self._dense(node, right, a, a.layout[-1], (*a.layout[:-1], *new), terms, units)
        if b is not None:
            units = shape_a[-2] if len(shape_a) > 1 else 1
            rows = b.layout[-2] if len(shape_b) > 1 else b.layout[-1]
            layout = (*b.layout[:-2], (Atom(axes=(CHANNEL,), size=units),), *b.layout[-1:])
            return self._dense(node, left, b, rows, layout, terms, units)
        return replace(next(s for s in given if s is not None), origin=node.index)  # the data enter through the added term alone

    def _data_product(self, node: Node, a: State, b: State, terms: int) -> State:
        value, mixed, other = (b, b.layout[-2], a) if a.mixing and not b.mixing else (a, a.layout[-1], b)
        attention = a.mixing != b.mixing
        gain = algebra.average_gain(terms, self.gain) if attention else math.log2(terms)
        paths = gain + (value.paths if attention else algebra.log2_add([a.paths, b.paths]))
        fields = axes.reach(value.fields, value.layout, mixed)
        if self.gates or not attention:
            second = other.fields if attention else axes.reach(b.fields, b.layout, b.layout[-2])
            fields = tuple(map(receptive.merge, zip(fields, second)))
        after = replace(self._joined(node, (*a.layout[:-1], b.layout[-1]), [a, b], paths), fields=fields)
        if attention:
            self._row(node.module, "attention", gain, value, after)
        return after

    def _dense(self, node: Node, weight: int, x: State, mixed: Axis, layout: Layout, in_units: int, out_units: int) -> State:
        fields, own = axes.reach(x.fields, x.layout, mixed), math.log2(in_units)
        after = replace(x, layout=layout, fields=fields, paths=x.paths + own, depth=x.depth + 1, shortest=x.shortest + 1, origin=node.index,
                        norm=INPUT, statistic=False)  # fmt: skip
        bits = algebra.log2_regions(out_units, in_units)
        return self._linear("linear", node, weight, x, after, (), (own, bits, out_units, 1))

    def _linear(
        self, kind: str, node: Node, weight: int, x: State, after: State, extent: Extent, leaf: tuple[float, float, int, int]
    ) -> State:
        own, bits, units, groups = leaf
        name = (self._name_of(weight, node) or "").split(".parametrizations.")[0].rpartition(".")[0] or node.module
        row = self._row(name, kind, own, x, after, extent)
        row.compression = math.log2(units // groups) - own
        self.waiting[node.index] = (row, bits, bits * math.prod(node.shape) / (self.batch * units))
        return after

    def _activation(self, node: Node, x: State) -> State:
        key = (x.origin, x.norm)
        if key not in self.counted:
            self.counted.add(key)
            if x.origin in self.waiting:
                row, bits, position_bits = self.waiting.pop(x.origin)
            else:
                units = axes.channels(x.layout)
                leaf = algebra.activation_leaf(units, positions=max(1, math.prod(node.shape) // (self.batch * units)))
                row, bits, position_bits = self._row(node.module, "activation", 0.0, x, x), leaf.complexity, leaf.complexity_positions
            row.bits += bits
            row.position_bits += position_bits
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
        positions = max(1, math.prod(node.shape) // (self.batch * units))
        leaf = algebra.pool_leaf("average" if kind == "average" else "max", units, kernel=taps, positions=positions, pool_gain=self.gain)
        after = replace(x, layout=layout, fields=fields, paths=x.paths + leaf.log2_fan_in, origin=node.index, norm=INPUT)
        row = self._row(node.module, "pool", leaf.log2_fan_in, x, after, extent)
        if kind == "max":
            row.bits += leaf.complexity
            row.position_bits += leaf.complexity_positions
        return after

    # joints

    def _concat(self, base: str, node: Node, given: list[State | None], data: list[State]) -> State:
        if len(given) == 1 and base == "cat":
            return data[0]
        at = node.attrs.get("dim", 0) % len(node.shape)
        units = [1 if base == "stack" else shape[at] if len(shape) > at else 0 for shape in node.input_shapes]
        paths = algebra.mean_fan_in([-math.inf if s is None else s.paths for s in given], units)
        full = [s for s in data if len(s.layout) == len(node.shape) - (base == "stack")]
        if not full:
            layout = axes.unknown([s.layout for s in data], node.shape)
        else:
            known = sorted({i for s in full if base == "cat" for a in s.layout[at] for i in a.axes})
            rest = full[0].layout[:at], full[0].layout[at + (base == "cat") :]
            layout = (*rest[0], (Atom(axes=tuple(known), size=node.shape[at]),), *rest[1])
        return self._joined(node, layout, data, paths)

    def _joined(self, node: Node, layout: Layout, data: list[State], paths: float) -> State:
        fields = tuple(map(receptive.merge, zip(*(s.fields for s in data))))
        depth, shortest = max(s.depth for s in data), min(s.shortest for s in data)
        return State(layout=layout, fields=fields, paths=paths, depth=depth, shortest=shortest, origin=node.index)

    def _written(self, node: Node, old: State | None, new: State) -> State:
        (source, whole), part = self.trace.memory(node.inputs[0], node.input_shapes[0]), math.prod(node.input_shapes[0])
        if self.trace.stands(node) and source in self.filled:
            self.filled[node.index] = self.filled[source]
            return self.states[source, WHOLE]
        kept = min(self.filled.get(source, 0 if old is None else whole), whole - part)
        self.filled[node.index] = kept + part
        data = [new] if old is None or not kept else [old, new]
        paths = algebra.mean_fan_in([s.paths for s in data], [kept, part][-len(data) :])
        base = self.states.get((source, WHOLE)) or self.states.get((source, 0), new)
        return self._joined(node, base.layout, data, paths)

    def _gated_half(self, node: Node, x: State) -> State:
        half = replace(x, layout=axes.cut(x.layout, node.shape))  # nn.GLU: one half of an axis times the activation of the other
        return self._joined(node, half.layout, [half, self._activation(node, half)], algebra.log2_add([x.paths, x.paths]))

    def _resize(self, base: str, node: Node, x: State) -> State:
        factors = [after / before for after, before in zip(node.shape[2:], node.input_shapes[0][2:])]
        windows = [(factor, operations.neighbours(base, factor)) for factor in factors]
        layout, fields, _ = axes.slide(x.layout, x.fields, node.shape[2:], lambda f, i: (receptive.resampled(f, *windows[i]), 1.0))
        return replace(x, layout=layout, fields=fields, origin=node.index)

    def _pointwise(self, base: str, node: Node, given: list[State | None], data: list[State]) -> State:
        layout = axes.broadcast([s.layout for s in data], node.shape)
        if base == "div" and given[0] is not None:
            data = [given[0]]
        elif any(s.statistic for s in data) and not all(s.statistic for s in data):
            data = [s for s in data if not s.statistic]
        if len(data) == 1:
            norm = node.index if len(given) > 1 else data[0].norm
            paths = -math.inf if base == "mul" and node.attrs.get("other") == 0 else data[0].paths
            return replace(data[0], layout=layout, paths=paths, norm=norm)
        joined = self._joined(node, layout, data, algebra.log2_add(s.paths for s in data))
        if base == "mul" and not self.gates:
            a, b = data
            held = [(axes.holds(a.layout, i), axes.holds(b.layout, i)) for i in range(len(a.fields))]
            fields = [f if x and not y else g if y and not x else h for (x, y), f, g, h in zip(held, a.fields, b.fields, joined.fields)]
            joined = replace(joined, fields=tuple(fields))
        return joined

    # records

    def _name_of(self, place: int, node: Node) -> str | None:
        return node.input_params[place] or self.names.get(node.inputs[place])

    def _row(self, name: str, kind: str, own: float, x: State, after: State, extent: Extent = ()) -> Row:
        key = name or kind
        if key in self.rows and self.rows[key].kind != kind:
            key = f"{key} ({kind})"
        row = self.rows.setdefault(key, Row(kind=kind))
        row.own, row.paths, row.calls = own, max(row.paths, after.paths), row.calls + 1
        ends = _placed(x), _placed(after)
        row.seen.append((extent or tuple(1.0 if f.high == g.high else (g.high - f.high) / f.jump + 1 for f, g in zip(*ends)), *ends))
        return row


def _placed(state: State) -> tuple[Field, ...]:
    return tuple(replace(f, jump=f.jump * axes.spacing(sum(state.layout, ()), i)) for i, f in enumerate(state.fields))
