"""What torch executes, operation by operation, as nodes of a graph; `capnas.graph.tracing` runs a model under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from capnas.graph.dataflow import INPUT, Node, Place

_NOT_STRUCTURE = frozenset({"device", "layout", "pin_memory", "generator", "non_blocking", "memory_format"})
_ATEN = torch.ops.aten
# outputs as shaped as the input, without the decompositions by which torch finds that out: they would take most of a trace's time
_SHAPES: dict[Any, Callable[[Tensor], Any]] = {
    _ATEN.native_batch_norm.default: lambda x: (torch.empty_like(x), x.new_empty(0), x.new_empty(0)),  # in eval mode
    _ATEN.hardswish.default: torch.empty_like, _ATEN.hardswish_.default: lambda x: x,
    _ATEN.hardsigmoid.default: torch.empty_like, _ATEN.hardsigmoid_.default: lambda x: x,
}  # fmt: skip
_IGNORED = frozenset({"prim.device.default", "aten.sym_size.int", "aten.is_same_size.default"})


class GraphRecorder(TorchDispatchMode):
    """Follows tensors by identity, and by storage where a view was written or taken outside the dispatcher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.flops = flop_registry
        self.modules = {id(m): n for n, m in model.named_modules()}  # names
        self.calls: dict[str, int] = {}
        self.marked: set[str] = set()
        self.stack: list[str] = [""]
        self.nodes: list[Node] = []
        self.alive: list[Any] = []  # ids and storages must not be reused while we compare them
        self.made: dict[int, tuple[int, int]] = {}  # tensor -> producer, port
        self.owner: dict[int, tuple[int, int]] = {}  # storage -> producer, port that last made or wrote it
        self.written: dict[int, tuple[int, int]] = {}  # storage -> node that last wrote it in place, tensor that it wrote through
        self.named: dict[int, str] = {}  # parameter or buffer, or a view of one -> name
        self.named_storage: dict[int, str] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self.named[id(tensor)] = name
            self.named_storage.setdefault(_storage(tensor), name)
            self.alive.append(tensor)

    def producer(self, tensor: Tensor) -> tuple[int | None, int, Place | None]:
        """Who made a tensor, which output of it, and where the tensor lies if that is who wrote to another view of its memory."""
        storage = _storage(tensor)
        found = self.made.get(id(tensor)) or (None if id(tensor) in self.named else self.owner.get(storage))
        write = self.written.get(storage)
        if write is not None and write[1] != id(tensor) and (found is None or write[0] > found[0]):
            return write[0], 0, tuple(int(n) for n in (tensor.storage_offset(), *tensor.stride()))
        return (*found, None) if found is not None else (None, 0, None)

    def name(self, tensor: Tensor) -> str | None:
        """The parameter or buffer that a tensor is, or is a view of."""
        known = self.named.get(id(tensor))
        return known if known is not None or id(tensor) in self.made else self.named_storage.get(_storage(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = str(func)
        if op in _IGNORED:
            return func(*args, **kwargs)
        tensors, attrs, targets = _bind(func, args, kwargs)
        metas = [t.is_meta for _, t in tensors]
        if (any(metas) and not all(metas)) or any(id(t) not in self.made for t in targets):  # what the model owns must not be written
            args, kwargs = tree_map_only(Tensor, stand_in, (args, kwargs))
        rule = _SHAPES.get(func)
        out = rule(args[0]) if rule is not None and args else func(*args, **kwargs)
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if op == "aten.empty.memory_format" and outputs[0].numel() == 0:
            return out  # the reserve that every batch norm allocates and nobody reads
        if op == "aten.convolution.default" and outputs[0].numel() == 0 and args[0].numel() > 0:  # older torch asks on devices alone
            raise RuntimeError(f"Calculated output size {tuple(outputs[0].shape[2:])}: kernel size can't be greater than actual input size")
        node = self._node(func, tensors, outputs, attrs)
        count = self.flops.get(func._overloadpacket)
        self.nodes.append(node if count is None else replace(node, flops=int(count(*args, **kwargs, out_val=out))))
        self._follow(node, [t for _, t in tensors], targets, outputs)
        return out

    def _node(self, func: Any, tensors: list[tuple[str, Tensor]], outputs: list[Tensor], attrs: dict[str, Any]) -> Node:
        producers = [self.producer(t) for _, t in tensors]
        names = [self.name(t) for _, t in tensors]
        module = self.stack[-1]
        return Node(
            index=len(self.nodes),
            op=str(func),
            inputs=tuple(p for p, _, _ in producers),
            input_ports=tuple(port for _, port, _ in producers),
            input_places=tuple(place for *_, place in producers),
            input_params=tuple(names),
            input_names=tuple(n for n, _ in tensors),
            input_shapes=tuple(tuple(t.shape) for _, t in tensors),
            params=tuple(dict.fromkeys(n for n in names if n is not None)),
            module=module,
            call=max(0, self.calls.get(module, 1) - 1),
            shape=tuple(outputs[0].shape) if outputs else (),
            shapes=tuple(tuple(t.shape) for t in outputs),
            dtype=str(outputs[0].dtype).removeprefix("torch.") if outputs else "",
            attrs=attrs,
        )

    def _follow(self, node: Node, tensors: list[Tensor], targets: list[Tensor], outputs: list[Tensor]) -> None:
        """Note who made the outputs of a node and wrote to its targets."""
        for target in targets:
            self.written[_storage(target)] = (node.index, id(target))
            self.made[id(target)] = (node.index, 0)
        view_of = node.input_params[0] if len(tensors) == 1 and node.shape_only else None
        for port, tensor in enumerate(outputs):
            self._made(tensor, node.index, port)
            if view_of is not None:
                self.named[id(tensor)] = view_of
            elif targets:
                self.named.pop(id(tensor), None)
        self.alive += [outputs, tensors]

    def _made(self, tensor: Tensor, index: int, port: int) -> None:
        self.made[id(tensor)] = self.owner[_storage(tensor)] = (index, port)

    def start(self, x: Tensor) -> None:
        """Take a tensor as the input of the model."""
        self._made(x, INPUT, 0)
        self.alive.append(x)

    def enter(self, module: nn.Module) -> None:
        """A module of the model begins."""
        if (name := self.modules.get(id(module))) is not None:
            self.stack.append(name)
            self.calls[name] = self.calls.get(name, 0) + 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A module of the model ends; what to give in place of its output, or None."""
        if id(module) not in self.modules:
            return None
        output = self._mark(module, output) if any(output is a for a in args) else None
        self.stack.pop()
        return output

    def _mark(self, module: nn.Module, output: Tensor) -> Tensor | None:
        """Give a dropout that does nothing in eval mode a node at its place in the graph."""
        rates = _training_only(module)
        if not rates or "drop" not in type(module).__name__.lower():
            return None
        output = torch.ops.aten.alias(output)
        node = self.nodes[-1]
        self.nodes[-1] = replace(node, attrs={**node.attrs, "training_only": f"{type(module).__name__}({rates})"})
        self.marked.add(node.module)
        return output

    def unmarked(self, model: nn.Module) -> dict[str, str]:
        """Rates of modules that were called, or whose parent was, without leaving a node."""
        found = {}
        for name, module in model.named_modules():
            if (
                name not in self.marked
                and (name in self.calls or name.rpartition(".")[0] in self.calls)
                and (rates := _training_only(module))
            ):
                found[name] = rates
        return found


class CircularPadding(TorchFunctionMode):
    """Has circular padding recorded as the one operation that it is; torch takes it apart into writes to parts of a new tensor."""

    def __init__(self, recorder: GraphRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad:
            given = dict(zip(("input", "pad", "mode", "value"), args)) | kwargs
            if given.get("mode") == "circular":
                with _disable_current_modes():
                    return self.recorder.__torch_dispatch__(_ATEN._pad_circular.default, (), (given["input"], list(given["pad"])))
        return func(*args, **kwargs)


class GatedHalves(TorchFunctionMode):
    """Has a gated linear unit (``F.glu``, ``nn.GLU``) run as its parts: one half of an axis times the sigmoid of the other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.glu:
            return func(*args, **kwargs)
        given = dict(zip(("input", "dim"), args)) | kwargs
        value, gate = given["input"].chunk(2, given.get("dim", -1))
        return value * gate.sigmoid()


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor without values in the place of one with them."""
    return tensor if tensor.is_meta else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bind(func: Any, args: tuple, kwargs: dict) -> tuple[list[tuple[str, Tensor]], dict[str, Any], list[Tensor]]:
    """Split a call into its tensors with their schema names, its other arguments, and the tensors that it writes."""
    tensors: list[tuple[str, Tensor]] = []
    attrs: dict[str, Any] = {}
    targets: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args) and not argument.kwarg_only:
            value = args[place]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value
        many = isinstance(value, (list, tuple))
        found = [v for v in (value if many else [value]) if isinstance(v, Tensor)]
        if found:
            tensors += [(argument.name, t) for t in found]
            if argument.alias_info is not None and argument.alias_info.is_write:
                targets += found
            if many and len(found) < len(value):
                attrs[argument.name] = tuple(isinstance(v, Tensor) for v in value)  # which axes an index op indexes
        elif isinstance(value, (bool, int, float)) or ("Tensor" not in str(argument.type) and argument.name not in _NOT_STRUCTURE):
            attrs[argument.name] = _plain(value)
    if func is _ATEN.convolution.default:  # of padding="valid" torch gives one 0 for all axes
        axes = tensors[1][1].ndim - 2
        attrs |= {name: attrs[name] * axes for name in ("stride", "padding", "dilation", "output_padding") if len(attrs[name]) == 1}
    return tensors, attrs, targets


def _training_only(module: nn.Module) -> str:
    """The drop rates among a module's attributes, and all its numbers if it is a dropout; empty if none is above zero."""
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, (int, float)) and k not in ("training", "inplace")}
    rates = {k: v for k, v in numbers.items() if not isinstance(v, bool) and v and (k == "p" or "drop" in k or "survival" in k)}
    shown = numbers if rates and "drop" in type(module).__name__.lower() else rates
    return ", ".join(f"{k}={v!r}" for k, v in sorted(shown.items()) if not k.startswith("_"))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
