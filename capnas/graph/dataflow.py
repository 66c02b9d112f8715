"""The dataflow graph as data: nodes, the graph, and the questions that its readers ask; no torch here."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from capnas.graph.operations import CONSTANT

Place = tuple[int, ...]
INPUT = -1  # the producer index that stands for the model input

_SHAPE_ONLY = frozenset(
    """
    view _unsafe_view reshape _reshape_alias flatten unflatten permute transpose transpose_ t t_ expand squeeze squeeze_
    unsqueeze unsqueeze_ clone contiguous detach detach_ alias lift_fresh lift_fresh_copy _to_copy to select slice narrow unbind
    split split_with_sizes unsafe_split unsafe_split_with_sizes chunk as_strided as_strided_ roll flip repeat movedim swapaxes
    view_as resolve_conj resolve_neg _pad_circular
    """.split()  # noqa: SIM905 (one word a name reads better than 47 quoted strings)
)

_COPYING = frozenset({"clone", "lift_fresh_copy", "_to_copy", "roll", "flip", "repeat", "_pad_circular"})  # those that make new memory


def is_shape_only(op: str) -> bool:
    """Whether an operation only rearranges, repeats, cuts or copies the values of one tensor, without arithmetic.

    >>> is_shape_only("aten.permute.default"), is_shape_only("aten.cat.default")
    (True, False)
    """
    parts = op.split(".")
    return len(parts) > 1 and parts[0] == "aten" and parts[1] in _SHAPE_ONLY


@dataclass(frozen=True, kw_only=True)
class Node:
    """One executed operation.

    The tuples that are named after inputs are aligned: one entry for each tensor argument, in the order of the operation's schema, lists of
    tensors flattened, absent optional tensors left out.

    Attributes:
        index: position in ``Trace.nodes``, which is the order of execution.
        op: overload name, e.g. ``"aten.convolution.default"``.
        inputs: index of the node that produced the argument; -1 is the model input; None is a parameter, a buffer or a tensor from outside.
        input_ports: which output of that node (0 unless it has several, as ``split`` has).
        input_params: name of the parameter or buffer that the argument is, or is a rearranged view of (``weight.t()``); None otherwise.
        input_names: the argument's name in the schema, e.g. ``("input", "weight", "bias")``.
        input_shapes: shapes of the arguments.
        input_places: offset and strides of an argument in its memory where another view of that was written last, and so stands as its
            producer; None elsewhere.
        params: the distinct names in ``input_params``; a shared parameter has one name, the first that ``named_parameters`` gives.
        module: qualified name of the innermost module running, ``""`` is the model itself; a shared module has one name.
        call: how many times that module had been called before (0 in its first call).
        shape: shape of the first output; ``()`` where there is none.
        shapes: shapes of all outputs.
        dtype: of the first output, e.g. ``"float32"``.
        attrs: the non-tensor arguments by schema name, defaults included (stride, padding, dilation, groups, dim, eps, ...), a number in
            the place of a tensor too (``other`` in ``x * 0.5``); devices and memory layouts are left out. Those of a convolution have one
            number for each axis.
        flops: of torch's flop registry (two for a multiply-accumulate), 0 for operations that it does not count.
    """

    index: int
    op: str
    inputs: tuple[int | None, ...]
    input_ports: tuple[int, ...]
    input_params: tuple[str | None, ...]
    input_names: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    input_places: tuple[Place | None, ...]
    params: tuple[str, ...]
    module: str
    call: int
    shape: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    attrs: dict[str, Any] = field(default_factory=dict)
    flops: int = 0

    @property
    def base(self) -> str:
        """Name of the operation without its library, its overload and the mark of those that work in place, e.g. ``"relu"``."""
        return self.op.split(".")[1].rstrip("_")

    @property
    def shape_only(self) -> bool:
        """See `is_shape_only`."""
        return is_shape_only(self.op)

    @property
    def writes(self) -> bool:
        """Whether the operation changes values of its first argument in place."""
        name = self.op.split(".")[1]
        in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")  # __ilshift__ is x <<= n, __lshift__ x << n
        return in_place and not self.shape_only


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The dataflow graph of one forward pass in eval mode.

    Attributes:
        nodes: operations in the order of execution.
        output: producing node of each output tensor (-1: the input is returned as it is); ``output_ports`` says which output of it.
        output_places: as ``Node.input_places``, of each output.
        input_shape: as given, batch axis first.
        modules: names of the modules in the order of their first call; what is missing was never called.
        training_only: module name -> rates that act in training alone and left no node, e.g. ``"dropout=0.1"`` of a fused attention.
            A called dropout or drop-path module does leave one: an alias with the attribute ``training_only``.
    """

    nodes: tuple[Node, ...]
    output: tuple[int, ...]
    output_ports: tuple[int, ...]
    output_places: tuple[Place | None, ...]
    input_shape: tuple[int, ...]
    modules: tuple[str, ...]
    training_only: dict[str, str] = field(default_factory=dict)

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of the whole batch by `owner`; ``""`` holds what no module but the model itself did."""
        flops: Counter[str] = Counter()
        for node in self.nodes:
            flops[self.owner(node)] += node.flops
        return {name: count // 2 for name, count in flops.items()}

    def owner(self, node: Node) -> str:
        """The module that did an operation: the one that ran, or a layer in it that is never called and whose weight it multiplies with."""
        inside = f"{node.module}." if node.module else ""
        layers = (n.removesuffix(".weight") for n in node.params if node.flops and n.startswith(inside) and n.endswith(".weight"))
        return next((name for name in layers if name not in self._called), node.module)

    @cached_property
    def _called(self) -> frozenset[str]:
        return frozenset(self.modules)

    def macs_inside(self, name: str) -> int:
        """Those of a module and of everything in it."""
        return sum(count for inner, count in self.macs.items() if inner == name or inner.startswith(name + "."))

    def live(self) -> frozenset[int]:
        """Indexes of the nodes that the output depends on; the others are dead code."""
        seen: set[int] = set()
        stack = [i for i in self.output if i >= 0]
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack.extend(j for j in self.nodes[i].inputs if j is not None and j >= 0)
        return frozenset(seen)

    def fed(self) -> frozenset[int]:
        """The model input and the nodes that depend on it, by index; the others work on constants and parameters alone, or on shapes."""
        seen = {INPUT}
        for node in self.nodes:
            if any(i in seen for i in node.inputs) and not CONSTANT.fullmatch(node.base):
                seen.add(node.index)
        return frozenset(seen)

    def source(self, index: int | None) -> int | None:
        """Follow shape-only nodes back to the operation that computed the values (-1: the input; None: no such node)."""
        while index is not None and index >= 0 and self.nodes[index].shape_only:
            index = self.nodes[index].inputs[0] if self.nodes[index].inputs else None
        return index

    def memory(self, index: int | None, shape: tuple[int, ...]) -> tuple[int | None, int]:
        """What made, or last wrote to, the tensor that a view of this producer and shape is taken of, and its number of entries."""
        for node in self._views(index):
            index, shape = node.inputs[0], node.input_shapes[0]
        return index, math.prod(shape)

    def writes_back(self, node: Node) -> bool:
        """Whether a node copies to a place of a memory what was computed there, as ``y[:2] += x`` does in the end."""
        views = self._views(node.inputs[0])
        source = views[-1].inputs[0] if views else node.inputs[0]
        if not node.op.startswith("aten.copy_") or source is None or source < 0 or node.inputs[1:] != (source,):
            return False
        before = self._views(self.nodes[source].inputs[0])
        return [(v.op, v.attrs) for v in views] == [(v.op, v.attrs) for v in before]

    def _views(self, index: int | None) -> list[Node]:
        """The views, the last one first, that lead from a memory to what a node gives."""
        views: list[Node] = []
        while index is not None and index >= 0 and (node := self.nodes[index]).shape_only and node.op.split(".")[1] not in _COPYING:
            views.append(node)
            index = node.inputs[0]
        return views
