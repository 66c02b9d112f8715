"""What capacity propagation needs to know of the operations of a model on a batch: second moments and the decoupling of activations.

Read in one forward pass, whose layers `capnas.capacity.taps` reads at the same time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from capnas.graph.dataflow import Node, Trace
from capnas.graph.tracing import unfused
from capnas.measures.activation_codes import all_finite
from capnas.measures.axes import CHANNEL, Atom, Layout, rearrange, resize, unknown
from capnas.measures.capacity_push import one_along
from capnas.measures.decoupling import Decoupling, gate_decoupling, output_decoupling
from capnas.measures.probing import untouched

ACTIVATIONS = frozenset((
    "relu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardtanh", "hardsigmoid", "sigmoid", "tanh",
    "softplus",
))  # fmt: skip
# names that only accelerators give to an operation: the trace, made on the meta device, has the general one
_GENERAL = {f"aten.{library}_batch_norm.default": "aten.native_batch_norm.default" for library in ("cudnn", "miopen")}
_EXTREMES = ("amax", "amin", "max", "min", "maximum", "minimum")
_CHANNEL_NORMS = ("native_batch_norm", "native_group_norm", "cudnn_batch_norm")
_ROWS, _PLACES = 4096, 16  # rows for the output decoupling, positions for the gate decoupling


def squared_gains(node: Node) -> tuple[float, ...]:
    """What a sum, difference or ``lerp`` multiplies the second moment of each of its tensors by.

    Torch's ``alpha`` squared for the second tensor of a sum; with ``weight`` w of a ``lerp``, (1 - w)^2 and w^2.
    """
    if node.base == "lerp":
        return (1 - node.attrs["weight"]) ** 2, node.attrs["weight"] ** 2
    scaled = "self" if node.base == "rsub" else "other"
    return tuple(float(node.attrs.get("alpha", 1)) ** 2 if name == scaled else 1.0 for name in node.input_names)


def squared_shift(node: Node) -> float:
    """Square of the number that a sum or difference adds to its only tensor, which takes capacity as a bias does; 0 of two tensors."""
    factor = 1 if node.base == "rsub" else node.attrs.get("alpha", 1)
    return float(factor * node.attrs.get("other", 0)) ** 2


@contextlib.contextmanager
def quiet(model: nn.Module, seed: int, *, grad: bool) -> Iterator[None]:
    """Eval mode, attention taken apart; caches, buffers, the random state and every module's mode put back."""
    with untouched(model, seed=seed), unfused(), torch.set_grad_enabled(grad):
        yield


def mean_square(values: Tensor, shape: Sequence[int], batch: int) -> Tensor | None:
    """Mean over the batch of the squares of values whose shape for one sample is known; the batch may be the outer part of any axis.

    None when no axis, or more than one, can hold the batch.

    >>> mean_square(torch.arange(4.0).view(4, 1), (2, 1), 2).flatten().tolist()
    [2.0, 5.0]
    """
    if tuple(values.shape) == tuple(shape):
        return values.detach().float().square()
    if values.ndim != len(shape):
        return None
    axes = [axis for axis, (full, one) in enumerate(zip(values.shape, shape)) if full != one]
    if len(axes) != 1 or values.shape[axes[0]] != batch * shape[axes[0]]:
        return None
    return mean_of_squares(values.detach().unflatten(axes[0], (batch, shape[axes[0]])).unbind(axes[0]))


def mean_of_squares(samples: Sequence[Tensor]) -> Tensor:
    """In float32."""
    total = samples[0].float().square()
    for sample in samples[1:]:  # one by one: no further map of the whole batch, and the sum stays in the cache
        total.addcmul_(sample, sample)
    return total.div_(len(samples))


class MomentReader(TorchDispatchMode):
    """Second moments of every computed value, at one sample's shape; run ``model(x)`` inside it.

    Operations that only rearrange are left out: a batch of one and a larger one may take different ones (a view, or a copy and a view),
    and what they give follows from what they read.
    """

    def __init__(self, trace: Trace, batch: int, *, seed: int = 0) -> None:
        super().__init__()
        self.trace, self.batch, self.place = trace, batch, 0
        self.nodes = [node for node in trace.nodes if not node.shape_only]
        self.fed = trace.fed()
        self.moments: dict[tuple[int, int], Tensor] = {}
        self.selected: dict[int, Tensor] = {}  # what maxima select: of poolings indices, else each entry's share of the samples
        self.activations: dict[str, tuple[Any, Any, Any, Tensor, Tensor]] = {}  # function, its other arguments, rows, maps
        self.places: dict[str, int] = {}  # activation -> its node
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def complete(self) -> bool:
        """Whether the run executed what the trace recorded, in its order; constants at the end may have come from a cache."""
        return all(node.index not in self.fed for node in self.nodes[self.place :])

    @property
    def expected(self) -> str:
        """Name of the operation that the trace has next, empty at its end."""
        return self.nodes[self.place].base if self.place < len(self.nodes) else ""

    def reached(self, op: str) -> Node | None:
        """The trace's next node if it is this operation; those before it may be missing that a model computes once and keeps."""
        for place in range(self.place, len(self.nodes)):
            node = self.nodes[place]
            if node.op == _GENERAL.get(op, op):
                self.place = place
                return node
            if node.index in self.fed:
                return None
        return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(func) == "aten._fused_rms_norm.default":  # one operation on accelerators, in the trace the steps that it is made of
            with self:
                return func.decompose(*args, **kwargs)
        node = self.reached(str(func))
        if node is None:
            return func(*args, **kwargs)
        if node.base in ACTIVATIONS and node.index in self.fed and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.keep(node, func, args, kwargs)
        self.read_outside(node, [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)])
        out = func(*args, **kwargs)
        self.place += 1
        for port, (tensor, shape) in enumerate(zip([t for t in tree_flatten(out)[0] if isinstance(t, Tensor)], node.shapes)):
            if tensor.is_floating_point():
                moment = mean_square(tensor, shape, self.batch)
                if moment is not None:
                    self.moments[node.index, port] = moment
            elif "max_pool" in node.base:
                self.selected[node.index] = tensor
        if node.base in _EXTREMES:
            self.read_extremes(node, args, out if isinstance(out, Tensor) else out[0])
        return out

    def read_extremes(self, node: Node, args: Any, out: Tensor) -> None:
        """How often each entry is what a maximum or minimum selects, along axes or of two maps, laid out along axis 1; equals share."""
        if "dim" in node.attrs:
            x, dim, shape = args[0], node.attrs["dim"], node.input_shapes[0]
        elif self.fed.issuperset(node.inputs) and node.input_shapes == (node.shape,) * 2:
            x, dim, shape = torch.stack(args[:2], 1), 1, (node.shape[0], 2, *node.shape[1:])
        else:
            return
        if dim == () or len(selected := one_along(out, x.shape, dim)) != len(x):
            return  # over the samples, too
        hits = (x == selected).float()
        share = mean_square((hits / hits.sum(dim, keepdim=True).clamp_min(1)).sqrt(), shape, self.batch)
        if share is not None:
            self.selected[node.index] = share

    def read_outside(self, node: Node, tensors: Sequence[Tensor]) -> None:
        """Second moments of constants that are no parameters, no buffers and not read as values; of argument j of node i: (i, -1 - j)."""
        for j, (tensor, name, producer) in enumerate(zip(tensors, node.input_params, node.inputs)):
            source = self.trace.source(producer)
            if name is None and tensor.is_floating_point() and source not in self.fed and (source, 0) not in self.moments:
                moment = mean_square(tensor, node.input_shapes[j], self.batch)
                if moment is not None:
                    self.moments[node.index, -1 - j] = moment

    def keep(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Keep what the decoupling of one activation needs: its input at some rows, and at some positions for all samples."""
        z = args[0].detach()
        channel = self.channel_axis(node, z.ndim)
        if channel == 0:  # the samples are not first
            return
        flat = z.movedim(channel, -1).reshape(len(z), -1, z.shape[channel]).float()  # (B, Q, D)
        if flat.shape[0] < 2 or flat.shape[2] < 2 or not all_finite(flat):
            return
        places = flat.shape[1]
        rows = flat.flatten(0, 1)
        if len(rows) > _ROWS:
            rows = rows[torch.randperm(len(rows), generator=self.generator)[:_ROWS].to(z.device)]
        at = torch.randperm(places, generator=self.generator)[: min(places, _PLACES)].to(z.device)
        plain = getattr(torch.ops.aten, func._overloadpacket.__name__.rstrip("_")).default  # the out-of-place form
        name = node.module if node.call == 0 else f"{node.module}#{node.call}"
        while name in self.activations:
            name += "'"
        self.places[name] = node.index
        self.activations[name] = (plain, args[1:], kwargs, rows.clone(), flat[:, at].clone())

    def decoupling(self) -> dict[str, Decoupling]:
        """Decoupling of each activation (42) by the name of its module; call it outside, gradients are off inside a dispatch mode."""
        found = {}
        for name, (function, args, kwargs, rows, maps) in self.activations.items():
            with torch.enable_grad():
                maps = maps.requires_grad_()
                (gates,) = torch.autograd.grad(function(maps, *args, **kwargs).sum(), maps)
            post = function(rows, *args, **kwargs)
            found[name] = Decoupling(out=output_decoupling(rows.cpu(), post.cpu()), gate=gate_decoupling(gates.transpose(1, 2).cpu()))
        return found

    def channel_axis(self, node: Node, ndim: int) -> int:
        """Where the units of the layer or norm behind an activation lie, followed through what rearranges them on the way.

        Convolutions, batch and group norms make channels second, linear layers and layer norms last; without any, images keep them second.
        """
        way: list[Node] = []
        index: int | None = node.inputs[0]
        while index is not None and index >= 0:
            before = self.trace.nodes[index]
            base, last = before.base, len(before.shape) - 1
            over_last = base == "native_layer_norm" and len(before.attrs.get("normalized_shape", ())) == 1
            if base == "convolution" or base in _CHANNEL_NORMS or base in ("addmm", "mm", "linear") or over_last:
                made = last if over_last or base in ("addmm", "mm", "linear") else 1
                layout: Layout = tuple((Atom(axes=(CHANNEL if i == made else i,), size=n),) for i, n in enumerate(before.shape))
                for step in reversed(way):
                    layout = rearrange(step.base, step.attrs, layout, step.shape) or (
                        # a product with wider values, or a pooling, has other sizes along the same axes
                        tuple(map(resize, layout, step.shape)) if len(layout) == len(step.shape) else unknown([layout], step.shape)
                    )
                held = [math.prod(a.size for a in axis if a.axes == (CHANNEL,)) for axis in layout]
                if len(held) == ndim and max(held) > 1:
                    return held.index(max(held))
                break
            way.append(before)
            index = next((i for i in before.inputs if i is not None), None)
        return 1 if ndim in (2, 4) else ndim - 1
