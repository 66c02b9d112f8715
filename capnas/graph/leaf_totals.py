"""Totals of a network's leaves as the walk meets them; `capnas.graph.structure_walk` says what counts as one, and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from capnas.graph.dataflow import Node
from capnas.graph.tensor_state import State
from capnas.measures import algebra, axes
from capnas.measures.algebra import Term
from capnas.measures.receptive import Field

Extent = tuple[float, ...]


@dataclass(kw_only=True)
class Totals:
    """Totals of one layer, see `capnas.graph.structure.LayerStructure`; ``seen``: extent, fields before and after, at each call."""

    kind: str
    own: float = 0.0
    compression: float | None = None
    bits: float = 0.0
    position_bits: float = 0.0
    paths: float = -math.inf
    calls: int = 0
    seen: list[tuple[Extent, tuple[Field, ...], tuple[Field, ...]]] = field(default_factory=list)

    def add(self, leaf: Term) -> None:
        """Add the complexity of a leaf."""
        self.bits += leaf.complexity
        self.position_bits += leaf.complexity_positions


class Leaves:
    """The leaves by name, in the order of the first call.

    Args:
        batch: number of inputs that the traced tensors hold.

    Attributes:
        totals: by name.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.totals: dict[str, Totals] = {}
        self.waiting: dict[int, tuple[Totals, Term]] = {}  # linear layers whose activation has not come yet
        self.cut: set[tuple[int, int]] = set()  # origin and norm of the values that an activation has read

    def positions(self, node: Node, units: int) -> int:
        """Positions of one input at which a node has its units."""
        return max(1, math.prod(node.shape) // (self.batch * units))

    def call(self, name: str, kind: str, own: float, before: State, after: State, extent: Extent = ()) -> Totals:
        """Note one call of a leaf.

        Args:
            name: of the module; one that has leaves of several kinds has a row for each.
            kind: see `capnas.graph.structure.LayerStructure`.
            own: log2 of the leaf's own K.
            before: what it reads.
            after: what it gives.
            extent: span of its taps along each image axis; by how much the fields grow where it is not said.
        """
        key = name or kind
        if key in self.totals and self.totals[key].kind != kind:
            key = f"{key} ({kind})"
        found = self.totals.setdefault(key, Totals(kind=kind))
        found.own, found.paths, found.calls = own, max(found.paths, after.paths), found.calls + 1
        ends = _in_place(before), _in_place(after)
        found.seen.append((extent or tuple(1.0 if f.high == g.high else (g.high - f.high) / f.jump + 1 for f, g in zip(*ends)), *ends))
        return found

    def activation(self, node: Node, x: State) -> None:
        """Count the cuts of an activation, for the linear layer that it reads or for itself; of the same values once."""
        if (x.origin, x.norm) in self.cut:
            return
        self.cut.add((x.origin, x.norm))
        if x.origin in self.waiting:
            found, leaf = self.waiting.pop(x.origin)
        else:
            units = axes.channels(x.layout)
            leaf = algebra.activation_leaf(units, positions=self.positions(node, units))
            found = self.call(node.module, "activation", 0.0, x, x)
        found.add(leaf)


def _in_place(state: State) -> tuple[Field, ...]:
    """The fields with their jumps between neighbouring units as the tensor holds them, such as the tokens of a window."""
    return tuple(replace(f, jump=f.jump * axes.spacing(sum(state.layout, ()), i)) for i, f in enumerate(state.fields))
