"""Where the layers of a network stand to one another: which branch an addition adds, and which activation lies behind a layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capnas.capacity.capture import squared_gains
from capnas.graph.dataflow import INPUT, Trace
from capnas.measures.decoupling import Decoupling


def residual_shares(graph: Trace, moments: Mapping[tuple[int, int], Tensor], tapped: set[str]) -> dict[str, float]:
    """``r_l`` of every addition of two maps of one shape that come from the input (31); the branch is the side with more layers.

    Sums of sides that are equally deep are parallel branches, not residual.
    """
    fed, depth = graph.fed(), {INPUT: 0}
    found: dict[str, float] = {}
    for node in graph.nodes:
        data = [(i, p) for i, p in zip(node.inputs, node.input_ports) if i is not None and i in fed]
        weighs = any(n is not None for n in node.input_params) or f"{node.module}.weight" in tapped  # the latter if it is computed
        own = weighs and node.flops > 0
        depth[node.index] = max((depth.get(i, 0) for i, _ in data), default=0) + own
        if node.base != "add" or len(data) != 2 or len(node.input_shapes) != 2 or node.input_shapes[0] != node.input_shapes[1]:
            continue
        (stream, kept), (branch, scaled) = sorted(zip(data, squared_gains(node)), key=lambda side: depth.get(side[0][0], 0))
        if stream not in moments or branch not in moments or depth.get(stream[0], 0) == depth.get(branch[0], 0):
            continue
        s, b = kept * float(moments[stream].double().mean()), scaled * float(moments[branch].double().mean())
        name = node.module or "model"
        while name in found:
            name += "'"
        found[name] = b / (b + s) if b + s > 0 else 0.0
    return found


def activations_behind(graph: Trace, found: Mapping[int, Decoupling], tapped: set[str]) -> dict[str, Decoupling]:
    """The activations at these nodes by the layer before each: of those that feed it, the deepest, so the branch and not its shortcut."""
    nearest: dict[int, tuple[int, int, str]] = {}  # node -> depth and place of the nearest layer, its name
    behind: dict[str, Decoupling] = {}
    for node in graph.nodes:
        before = max((nearest[i] for i in node.inputs if i in nearest), default=None)
        summand = "self" if node.base in ("addmm", "baddbmm") else "bias"
        weights = [n for n, a in zip(node.input_params, node.input_names) if n is not None and a != summand]
        if not weights and f"{node.module}.weight" in tapped:  # a computed weight
            weights = [f"{node.module}.weight"]
        if weights and node.flops > 0:
            nearest[node.index] = (1 + (before[0] if before else 0), node.index, layer_of(weights[-1]))
        elif before is not None:
            nearest[node.index] = before
            if node.index in found:
                behind.setdefault(before[2], found[node.index])
    return behind


def layer_of(weight: str) -> str:
    """Module of a weight, ``""`` for the model itself; a weight by another name keeps it."""
    return f".{weight}".removesuffix(".weight").lstrip(".")
