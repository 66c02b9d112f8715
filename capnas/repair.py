"""What to change in a network whose last layers have nothing left to do at an image size: layers to cut, strides to undo, a larger image.

The three remedies are the papers' (Richter et al., ICMLA 2021, arXiv 2106.12307; Shenk et al., arXiv 2006.08679): cutting the tail costs no
accuracy and saves its compute, slower growth of the receptive field or a larger image puts it to work. Naming the layers and predicting
the cost of each change is ours. The predictions hold for the border; what accuracy becomes, only training tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from torch import nn

from capnas.errors import UsageError
from capnas.graph.downsampling import Step, macs_without, steps, without
from capnas.graph.structure import structure
from capnas.graph.tracing import Trace
from capnas.measures.receptive import border_layers
from capnas.measures.resolution import looking_layers, smallest_productive
from capnas.recording import find_blocks


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change.

    Attributes:
        kind: ``"cut"`` layers, undo a ``"stride"``, or another image ``"size"``.
        layers: to cut, or whose stride becomes 1.
        text: in words.
        macs: multiply-accumulates of one image after it, predicted.
        params: parameters after it, predicted.
        unproductive: looking layers past the border after it.
        size: pixels after it.
    """

    kind: Literal["cut", "stride", "size"]
    layers: tuple[str, ...]
    text: str
    macs: int
    params: int
    unproductive: int
    size: int


def advise(model: nn.Module, graph: Trace, size: int, *, idle: Sequence[str]) -> tuple[Advice, ...]:
    """Changes that leave no layer idle, each with its predicted cost.

    Args:
        model: the network.
        graph: its trace for one image of `size`.
        size: pixels.
        idle: looking layers with nothing to do: past the border, or in a measured tail; empty gives no advice.

    Returns:
        At most one change of each kind, cutting first.

    >>> from capnas.graph.tracing import trace
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))
    >>> for advice in advise(net, trace(net, (1, 1, 12, 12)), 12, idle=("4",)):
    ...     print(advice.text)
    cut 4: 77.8 % of the MACs and 77.9 % of the parameters remain
    set the stride of 0 from 2 to 1: all 5 layers see new context, at 4.0 times the MACs
    use 15 px: all 5 layers see new context, at about 1.6 times the MACs
    """
    if not idle:
        return ()
    report = structure(graph)
    looking = looking_layers(report.fields)
    if unknown := set(idle) - set(looking):
        raise UsageError(f"idle layers must be among those that read neighbours, got {', '.join(sorted(unknown))}.")
    params = sum(p.numel() for p in model.parameters())
    found = [_cut(model, graph, size, looking, idle, report.macs, params), _undo(graph, size, params)]
    enough = smallest_productive(report.fields)
    if enough > size:
        macs = round(report.macs * (enough / size) ** 2)
        text = f"use {enough} px: all {len(looking)} layers see new context, at about {macs / report.macs:.1f} times the MACs"
        found.append(Advice(kind="size", layers=(), text=text, macs=macs, params=params, unproductive=0, size=enough))
    return tuple(a for a in found if a is not None)


def _cut(model: nn.Module, graph: Trace, size: int, looking: Sequence[str], idle: Sequence[str], macs: int, params: int) -> Advice | None:
    """Leave out whole blocks where the network has blocks, else single layers; the first of them always stays."""
    start = min(looking.index(name) for name in idle)
    gone, kept = set(looking[start:]), looking[:start]
    units = []
    for unit in find_blocks(model):
        inside = [name for name in looking if name == unit or name.startswith(unit + ".")]
        if inside and gone.issuperset(inside):
            units.append(unit)
    composite = any(any(model.get_submodule(u).children()) for u in find_blocks(model))
    if not composite:
        units = [name for name in looking if name in gone]
    if not units or not kept:
        return None

    def leaves(name: str) -> bool:
        return any(name == u or name.startswith(u + ".") for u in units)

    fewer = sum(n.flops for n in graph.nodes if leaves(n.module)) // 2
    lighter = sum(p.numel() for name, p in model.named_parameters() if leaves(name.rpartition(".")[0]))
    past = sum(not leaves(name) for name in border_layers(structure(graph).fields, size))
    share = f"{100 * (macs - fewer) / macs:.1f} % of the MACs and {100 * (params - lighter) / params:.1f} % of the parameters remain"
    text = f"cut {_names(units)}: {share}"
    return Advice(kind="cut", layers=tuple(units), text=text, macs=macs - fewer, params=params - lighter, unproductive=past, size=size)


def _undo(graph: Trace, size: int, params: int) -> Advice | None:
    """The cheapest one or two downsampling steps whose undoing leaves the fewest layers past the border."""
    now = structure(graph)
    before = len(border_layers(now.fields, size))
    every = steps(graph)
    best: tuple[int, int, tuple[Step, ...]] | None = None
    for count in (1, 2):
        for chosen in combinations(every, count):
            left = len(border_layers(structure(without(graph, chosen)).fields, size))
            if left < before and (best is None or (left, macs_without(graph, chosen)) < best[:2]):
                best = (left, macs_without(graph, chosen), chosen)
        if best is not None and best[0] == 0:
            break
    if best is None:
        return None
    left, macs, chosen = best
    names = tuple(name for step in chosen for name in step.layers)
    changes = " and ".join(f"the stride of {_names(step.layers)} from {step.stride} to 1" for step in chosen)
    count = len(looking_layers(now.fields))
    effect = f"all {count} layers see new context" if left == 0 else f"{left} instead of {before} of {count} layers see nothing new"
    text = f"set {changes}: {effect}, at {macs / now.macs:.1f} times the MACs"
    return Advice(kind="stride", layers=names, text=text, macs=macs, params=params, unproductive=left, size=size)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)})"
