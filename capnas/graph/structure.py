"""Layer algebra and receptive fields of a whole network, from its dataflow graph alone: no weights, no data.

Definitions are those of `capnas.measures.algebra` (after Badias & Banerjee, reconstructed) and `capnas.measures.receptive`; how they are
carried through a graph, and what was decided where the definitions are silent, is said in `capnas.graph.structure_walk`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from capnas.graph.dataflow import Trace
from capnas.graph.leaf_totals import Totals
from capnas.graph.structure_walk import Walk
from capnas.measures import algebra, receptive
from capnas.measures.algebra import PoolGain
from capnas.measures.receptive import LayerField


@dataclass(frozen=True, kw_only=True)
class LayerStructure:
    """Structure of one layer: a convolution, a dense layer, a pooling, attention, or an activation that no linear layer feeds.

    Attributes:
        name: of the module that owns the weight (or that was running).
        kind: ``"conv"``, ``"linear"``, ``"pool"``, ``"attention"`` or ``"activation"``.
        complexity_bits: C_loc, bits, summed over calls.
        complexity_position_bits: C_pos, bits.
        log2_fan_in: log2 of the layer's own K (its fan-in r).
        log2_paths: log2 K from the model input to one unit of its output (the greatest over calls).
        log2_compression: log2 of ``m / r``, the local intrinsic power before clipping; None where the layer has no weights.
        field: receptive fields at its input and output, in whole pixels (rounded up), and the span of its taps, over all calls; None where
            the input has no image axes.
        calls: how many times it ran.
    """

    name: str
    kind: str
    complexity_bits: float
    complexity_position_bits: float
    log2_fan_in: float
    log2_paths: float
    log2_compression: float | None
    field: LayerField | None
    calls: int = 1

    @property
    def receptive_field(self) -> tuple[tuple[float, float], ...]:
        """(r_min, r_max) of the output along each image axis, in whole pixels; see `capnas.measures.receptive.in_pixels`."""
        return tuple((f.low, f.high) for f in self.field.after) if self.field else ()

    @property
    def jump(self) -> tuple[float, ...]:
        """Distance in the input between neighbouring units of the output, along each image axis (pixels held in channels too)."""
        return tuple(f.jump for f in self.field.after) if self.field else ()


@dataclass(frozen=True, kw_only=True)
class StructureReport:
    """Structure of a network.

    Attributes:
        layers: by name, in the order of the first call.
        complexity: C_loc of the network, bits.
        complexity_positions: C_pos, bits.
        log2_paths: log2 K of an output unit.
        log2_power: log2 P = log2 classes - log2 K.
        classes: size of the last axis of the output.
        weights: W, numbers in the parameters (and constant buffers) that the forward pass read; running statistics are not counted.
        macs: multiply-accumulates for one input.
        depth: L, weight layers on the longest path.
        shortest: weight layers on the shortest path: how deep the network is where every shortcut is taken.
    """

    layers: dict[str, LayerStructure]
    complexity: float
    complexity_positions: float
    log2_paths: float
    log2_power: float
    classes: int
    weights: int
    macs: int
    depth: int
    shortest: int

    @property
    def fields(self) -> list[LayerField]:
        """Convolutions, dense layers, pools and attention over a model input with image axes, in the order of execution."""
        return [x.field for x in self.layers.values() if x.field is not None and x.kind != "activation"]


def structure(trace: Trace, *, pool_gain: PoolGain = "paths", gates: bool = False) -> StructureReport:
    """Complexity, paths, power and receptive fields of a traced model.

    Args:
        trace: of `capnas.graph.tracing.trace`.
        pool_gain: what an average contributes to K; see `capnas.measures.algebra.pool_leaf`.
        gates: whether the field of gates and attention weights is merged into that of the map they act on.

    >>> from torch import nn
    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 10, 3))
    >>> report = structure(trace(net, (1, 3, 32, 32)))
    >>> round(report.layers["0"].complexity_bits, 3), report.layers["3"].receptive_field, report.layers["3"].complexity_bits
    (61.059, ((8.0, 8.0), (8.0, 8.0)), 0.0)
    >>> report.log2_paths == math.log2(27) + math.log2(4) + math.log2(576)
    True
    """
    walk = Walk(trace, pool_gain=pool_gain, gates=gates)
    ends = walk.ends
    last = trace.nodes[trace.output[0]] if trace.output and trace.output[0] >= 0 else None
    shape = last.shapes[trace.output_ports[0]] if last is not None else trace.input_shape
    paths = ends[0].paths if ends else -math.inf
    classes = shape[-1] if shape else 1
    return StructureReport(
        layers={name: _freeze(name, row) for name, row in walk.leaves.totals.items()},
        complexity=math.fsum(r.bits for r in walk.leaves.totals.values()),
        complexity_positions=math.fsum(r.position_bits for r in walk.leaves.totals.values()),
        log2_paths=paths,
        log2_power=algebra.log2_power(paths, classes),
        classes=classes,
        weights=sum(walk.weights.values()),
        macs=walk.macs,
        depth=max((s.depth for s in ends), default=0),
        shortest=min((s.shortest for s in ends), default=0),
    )


def _freeze(name: str, row: Totals) -> LayerStructure:
    place = None
    if row.seen and row.seen[0][0]:
        extents, befores, afters = zip(*row.seen)
        place = LayerField(
            name=name,
            extent=tuple(map(max, zip(*extents))),
            before=tuple(receptive.in_pixels(receptive.merge(f)) for f in zip(*befores)),
            after=tuple(receptive.in_pixels(receptive.merge(f)) for f in zip(*afters)),
            learned=row.kind in ("conv", "linear"),
        )
    return LayerStructure(
        name=name,
        kind=row.kind,
        complexity_bits=row.bits,
        complexity_position_bits=row.position_bits,
        log2_fan_in=row.own,
        log2_paths=row.paths,
        log2_compression=row.compression,
        field=place,
        calls=row.calls,
    )
