"""What to change in a network whose last layers have nothing left to do at an image size: layers to cut, strides to undo, a larger image.

The three remedies are the papers' (Richter et al., ICMLA 2021, arXiv 2106.12307; Shenk et al., arXiv 2006.08679): cutting the tail costs no
accuracy and saves its compute, slower growth of the receptive field or a larger image puts it to work. Naming the layers and predicting
the cost of each change is ours: each is made on a copy without weights and traced. The predictions hold for the border and the cost; what
accuracy becomes, only training tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capnas.errors import CapnasError, UsageError
from capnas.graph.dataflow import Trace
from capnas.graph.downsampling import Step, macs_without, steps, without
from capnas.graph.structure import structure
from capnas.graph.tracing import trace
from capnas.layers import find_blocks, has_parts
from capnas.measures.borders import looking_layers, smallest_productive
from capnas.measures.probing import FAILURES, cloned, unwrap_model
from capnas.measures.receptive import border_layers
from capnas.recording import hooked

_FAILURES = (*FAILURES, CapnasError)  # of a changed network that does not run


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change.

    Attributes:
        kind: ``"cut"`` layers, undo a ``"stride"``, or another image ``"size"``.
        layers: to cut, or whose stride becomes 1.
        text: in words.
        macs: multiply-accumulates of one image after it; None where the changed network cannot be traced.
        params: parameters after it, or None.
        unproductive: looking layers past the border after it.
        size: pixels after it.
    """

    kind: Literal["cut", "stride", "size"]
    layers: tuple[str, ...]
    text: str
    macs: int | None
    params: int | None
    unproductive: int
    size: int


def advise(
    model: nn.Module,
    graph: Trace,
    size: int,
    *,
    idle: Sequence[str],
    layers: Sequence[str] | None = None,
    build: Callable[[int], nn.Module] | None = None,
) -> tuple[Advice, ...]:
    """Changes that leave fewer layers idle, each with its cost and with what it leaves idle.

    Args:
        model: the network; only read.
        graph: its trace for one image of `size`.
        size: pixels.
        idle: layers with nothing to do: past the border, or in a measured tail; empty gives no advice.
        layers: those that `idle` is taken from, in the order of execution; the ones that read neighbours where None.
        build: gives the network for another size; without it the model itself has to run there.

    Returns:
        At most one change of each kind, cutting first: whole blocks where the network has blocks, never its first one. A stride or a size
        is only advised where it brings layers back inside the border.

    Raises:
        UsageError: a layer in `idle` that is not among `layers`.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))
    >>> for advice in advise(net, trace(net, (1, 1, 12, 12)), 12, idle=("4",)):
    ...     print(advice.text)
    cut 4: 77.8 % of the MACs and 77.9 % of the parameters remain
    set the stride of 0 from 2 to 1: all 5 layers see new context, at 4.0 times the MACs
    use 15 px: all 5 layers see new context, at 1.8 times the MACs
    """
    if not idle:
        return ()
    model, report = unwrap_model(model), structure(graph)
    known = looking_layers(report.fields) if layers is None else tuple(layers)
    if unknown := set(idle) - set(known):
        among = "those that read neighbours" if layers is None else "the given layers"
        raise UsageError(f"idle layers must be among {among}, got {', '.join(sorted(unknown))}.")
    found = [_cut(model, graph, size, known, idle), _undo(model, graph, size)]
    enough = smallest_productive(report.fields)
    if enough > size:
        found.append(_enlarge(model, graph, enough, build))
    return tuple(a for a in found if a is not None)


def _cut(model: nn.Module, graph: Trace, size: int, layers: Sequence[str], idle: Sequence[str]) -> Advice | None:
    start = min(layers.index(name) for name in idle)
    gone = set(layers[start:]) - _dense(graph)
    blocks = list(find_blocks(model))
    if any(has_parts(model.get_submodule(block)) for block in blocks):
        inside = {b: [n for n in layers if n == b or n.startswith(b + ".")] for b in blocks[1:]}  # the first one always stays
        units = [block for block, names in inside.items() if names and gone.issuperset(names)]
    else:
        units = [name for name in layers[1:] if name in gone]
    if not units:
        return None
    macs, params = structure(graph).macs, sum(p.numel() for p in model.parameters())
    changed = cloned(model).to("meta").eval()
    for name in units:
        changed.set_submodule(name, _Passing())
    text = f"cut {_names(units)}"
    try:
        followers = _fit(changed, graph.input_shape)
        after = structure(trace(changed, graph.input_shape))
    except _FAILURES:
        past = sum(not any(n == u or n.startswith(u + ".") for u in units) for n in border_layers(structure(graph).fields, size))
        text += ": the layers behind do not fit then and have to be made anew, at a cost that cannot be predicted" + _left(past)
        return Advice(kind="cut", layers=tuple(units), text=text, macs=None, params=None, unproductive=past, size=size)
    lighter = sum(p.numel() for p in changed.parameters())
    text += f": {100 * after.macs / macs:.1f} % of the MACs and {100 * lighter / params:.1f} % of the parameters remain"
    for (was, now), names in followers.items():
        reads, has = ("reads", "has") if len(names) == 1 else ("read", "have")
        text += f"; {_names(names)} then {reads} {now} instead of {was} channels and {has} to be made anew"
    past = len(border_layers(after.fields, size))
    return Advice(kind="cut", layers=tuple(units), text=text + _left(past), macs=after.macs, params=lighter, unproductive=past, size=size)


def _undo(model: nn.Module, graph: Trace, size: int) -> Advice | None:
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
    left, _, chosen = best
    names = tuple(name for step in chosen for name in step.layers)
    made = _unstrided(model, graph, names)
    if made is not None and (left := len(border_layers(structure(made).fields, size))) >= before:
        return None
    changes = " and ".join(f"the stride of {_names(step.layers)} from {step.stride} to 1" for step in chosen)
    count = len(looking_layers(now.fields))
    effect = f"all {count} layers see new context" if left == 0 else f"{left} instead of {before} of {count} layers see nothing new"
    macs = None if made is None else structure(made).macs
    params = None if made is None else sum(p.numel() for p in model.parameters())
    text = f"set {changes}: {effect}, {_times(macs, now.macs)}"
    return Advice(kind="stride", layers=names, text=text, macs=macs, params=params, unproductive=left, size=size)


def _enlarge(model: nn.Module, graph: Trace, enough: int, build: Callable[[int], nn.Module] | None) -> Advice:
    """The network at a larger size, as it is built for that."""
    now, made = structure(graph), None
    count, past, params = len(looking_layers(now.fields)), 0, None
    try:
        larger = model if build is None else build(enough)
        made = structure(trace(larger, (*graph.input_shape[:2], enough, enough)))
    except _FAILURES:
        macs = None
    else:
        macs, params = made.macs, sum(p.numel() for p in larger.parameters())
        count, past = len(looking_layers(made.fields)), len(border_layers(made.fields, enough))
    effect = f"{past} of {count} layers see nothing new still" if past else f"all {count} layers see new context"
    text = f"use {enough} px: {effect}, {_times(macs, now.macs)}"
    return Advice(kind="size", layers=(), text=text, macs=macs, params=params, unproductive=past, size=enough)


def _unstrided(model: nn.Module, graph: Trace, names: Sequence[str]) -> Trace | None:
    """The trace of a copy with these modules' strides set to 1; None where that is not possible, or the layers behind do not fit then."""
    changed = cloned(model).to("meta")
    for name in names:
        module: Any = changed.get_submodule(name)
        stride = getattr(module, "stride", None)
        if stride is None:
            return None  # a pooling in the code of the network
        module.stride = 1 if isinstance(stride, int) else (1,) * len(stride)
    try:
        made = trace(changed, graph.input_shape)
    except _FAILURES:
        return None
    return None if any(set(names) & set(step.layers) for step in steps(made)) else made


class _Passing(nn.Module):
    """In the place of a block that is cut: the input as it is."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _fit(model: nn.Module, shape: tuple[int, ...]) -> dict[tuple[int, int], list[str]]:
    """Give layers that meet another number of channels than they were made for the right one, in place, on the meta device.

    Returns:
        (channels before, channels now) -> names of these layers, in the order of execution.
    """
    found: dict[tuple[int, int], list[str]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            was = _width(module)
            last = isinstance(module, nn.Linear) or (isinstance(module, nn.LayerNorm) and "2d" not in type(module).__name__)
            now = args[0].shape[-1 if last else 1]
            if now != was:
                found.setdefault((was, now), []).append(name)
                _widen(module, was, now)

        return hook

    kinds = (nn.Linear, nn.LayerNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)
    watched = {n: watch(n) for n, m in model.named_modules() if isinstance(m, kinds)}
    with torch.no_grad(), hooked(watched, model, before=True):
        model(torch.empty(shape, device="meta"))
    return found


def _width(module: Any) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[-1]
    return int(module.num_features if isinstance(module, nn.modules.batchnorm._BatchNorm) else module.in_channels)


def _widen(module: Any, was: int, now: int) -> None:
    if isinstance(module, nn.Linear):
        module.in_features = now
        module.weight = nn.Parameter(torch.empty(module.out_features, now, device="meta"))
        return
    each = True  # a value for each channel: norms and depthwise convolutions
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (*module.normalized_shape[:-1], now)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = now
    elif module.groups == 1:
        each, module.in_channels = False, now
        module.weight = nn.Parameter(torch.empty(module.out_channels, now, *module.kernel_size, device="meta"))
    elif module.groups == was == module.out_channels:
        module.groups = module.in_channels = module.out_channels = now
    else:
        raise UsageError(f"a convolution in {module.groups} groups cannot read {now} instead of {was} channels.")
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)] if each else []:
        if tensor.ndim:
            shape = (now, *tensor.shape[1:]) if tensor.shape[0] == was else (*tensor.shape[:-1], now)
            made = torch.empty(shape, device="meta")
            setattr(module, name, nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made)


def _dense(graph: Trace) -> set[str]:
    """Convolutions that read the whole of their map at once: dense layers of a head, which nothing replaces."""
    return {
        node.module
        for node in graph.nodes
        if node.op.startswith("aten.convolution")
        and not any(node.attrs["padding"])
        and node.input_shapes[1][2:] == node.input_shapes[0][2:]
        and max(node.input_shapes[0][2:], default=1) > 1
    }


def _left(past: int) -> str:
    return f"; leaves {past} idle" if past else ""


def _times(macs: int | None, before: int) -> str:
    return "at a cost that cannot be predicted" if macs is None else f"at {macs / before:.1f} times the MACs"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)})"
