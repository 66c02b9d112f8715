"""The Markov sweep from the output of a traced network to its input: each operation hands its capacity to what it read.

After the propagation of arXiv 1902.08572, extended by us to the operations of image networks (equations 38 to 40 of our specification).
Everything runs at the shape of one sample, on second moments that `capnas.capacity.capture` read from a batch.

The sweep assumes total decoupling, d = 1, everywhere: what two units pass down never interferes, whatever decoupling was measured. One
ReLU layer is nearer linear than that; the rule comes out with depth, and fails on a linear network. Half the summed difference of shares
to the exact map (37), on small random networks with centred images: three ReLU convolutions 0.09, at slope 0.5 instead of ReLU 0.18,
linear 0.45; a two-block transformer 0.11 to 0.15 by pixels and 0.05 to 0.08 by patches, where an even map has 0.28 and 0.06 to 0.12.
Partial decoupling, (20) and (21), exists for one dense layer, in `capnas.measures.propagation`, not here. Decisions of ours:

* Normalisation, activations and copies pass capacity on unchanged; a norm's bias keeps ``beta^2 / (gamma^2 + beta^2)``.
* Of a product, what a softmax, a sigmoid or a norm of the data made is a gate and gets nothing, nor does a divisor; two equals share.
* An operation without a rule hands its capacity to its inputs by their second moments, and is listed as approximated.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from capnas.capacity.capture import squared_gains, squared_shift
from capnas.graph.dataflow import INPUT, Node, Trace
from capnas.graph.operations import ACTIVATION
from capnas.measures.capacity_push import inject, interpolation_squared, push, push_max_pool, push_maximum, push_ports

Port = tuple[int, int]

_UNFIT = (RuntimeError, TypeError, AttributeError, ValueError, KeyError)  # what an operation raises on maps that it was not made for
_FLOAT = torch.float32  # of the maps; sums are kept in double precision
_GATE = re.compile("_?softmax|_safe_softmax|sigmoid|hardsigmoid|linalg_vector_norm|norm|(var|std)(_mean)?|r?sqrt|reciprocal")
_NORM = re.compile("native_(batch|layer|group)_norm|cudnn_batch_norm|.*rms_norm")
_LINEAR = re.compile(
    "mean|sum|avg_pool[123]d|_?adaptive_avg_pool[123]d|_?upsample_.*|constant_pad_nd|(reflection|replication)_pad.*|cat|stack|"
    "pixel_(un)?shuffle|channel_shuffle|im2col|col2im|unfold|select_scatter|slice_scatter"
)
_INTERPOLATION = re.compile("_?upsample_(linear1d|bilinear2d|trilinear3d|bicubic2d|lanczos2d)(_aa)?")  # taps that weigh unalike
_MIX = re.compile("mm|bmm|addmm|baddbmm|mv|matmul|linear|convolution|einsum")
_UNARY = re.compile(
    f"{ACTIVATION.pattern}|{_GATE.pattern}|pow|square|exp|log|neg|clamp.*|(max|min)imum|round|erf|where|masked_fill|(native_)?dropout"
)
_MAX_POOL = re.compile(".*max_pool([23])d.*")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """``pixels`` (C, H, W) with sum ``total - bias``; ``approximated`` counts the operations without a rule of their own."""

    pixels: Tensor
    bias: float
    total: float
    carried: dict[str, float]
    approximated: dict[str, int]


class Sweeper:
    """State of one sweep; `run` gives the result.

    Args:
        model: holds the parameters that the trace names.
        trace: of one sample.
        moments: second moment of each traced value at one sample's shape, of the input under (-1, 0), and of argument j of node i under
            (i, -1 - j) where that is a tensor from outside the model's parameters, buffers and operations.
        selected: of max poolings indices (B, ...), else the share of samples in which an entry is selected; of two maps along axis 1.
        capacity: c_l by weight name.
        responses: per weight name and call, the flat map ``E sum_o (d f_o / d z)^2``.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        moments: Mapping[Port, Tensor],
        selected: Mapping[int, Tensor],
        capacity: Mapping[str, float],
        responses: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        self.trace, self.selected, self.capacity, self.responses = trace, selected, capacity, responses
        self.moments = dict(moments)
        self.tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self.fed = trace.fed()
        self._rearrange()
        self.gates = self._find_gates()
        self.waiting: dict[Port, Tensor] = {}
        self.bias, self.total = 0.0, 0.0
        self.carried: dict[str, float] = {}
        self.approximated: Counter[str] = Counter()

    def run(self) -> Sweep:
        """Sweep (40)."""
        nodes = [node for node in self.trace.nodes if node.index in self.fed]
        layers = {node.index: layer for node in nodes if (layer := self._layer(node)) is not None}
        calls = Counter(weight for weight, _ in layers.values())
        earlier = calls.copy()
        for node in reversed(nodes):
            given = {port: self.waiting.pop((node.index, port), None) for port in range(len(node.shapes))}
            parts = {port: k for port, k in given.items() if k is not None}
            if parts:
                self._pass(node, parts)
            if node.index in layers:
                weight, place = layers[node.index]
                earlier[weight] -= 1
                self._inject(node, weight, place, earlier[weight], calls[weight])
        pixels = self.waiting.get((INPUT, 0), torch.zeros(self.trace.input_shape, dtype=_FLOAT))
        listed = dict(sorted(self.approximated.items()))
        return Sweep(pixels=pixels[0].double(), bias=self.bias, total=self.total, carried=self.carried, approximated=listed)

    def _layer(self, node: Node) -> tuple[str, int] | None:
        """Name of the weight of a convolution or linear layer, and which input it is; a computed weight has its module's name."""
        if not _MIX.fullmatch(node.base):
            return None
        for j, (name, argument) in enumerate(zip(node.input_params, node.input_names)):
            if name is not None and name in self.capacity and argument != "bias":
                return name, j
        own = f"{node.module}.weight"
        computed = [j for j, i in enumerate(node.inputs) if i is not None and i not in self.fed]
        return (own, computed[-1]) if computed and own in self.capacity else None

    def _rearrange(self) -> None:
        """Second moments behind operations that only rearrange values."""
        for node in self.trace.nodes:
            if not node.shape_only or not node.inputs:
                continue
            try:
                out = self._call(node, {0: self._moment(node, 0)})
            except _UNFIT:
                continue
            self.moments |= {(node.index, port): part for port, part in enumerate([out] if isinstance(out, Tensor) else out)}

    def _find_gates(self) -> set[Port]:
        gates: set[Port] = set()
        for node in self.trace.nodes:
            data = [(node.inputs[j], node.input_ports[j]) for j in self._data(node)]
            if _GATE.fullmatch(node.base) or (data and all(port in gates for port in data)):
                gates.update((node.index, port) for port in range(max(1, len(node.shapes))))
        return gates

    def _data(self, node: Node) -> list[int]:
        """Which arguments depend on the input."""
        return [j for j, i in enumerate(node.inputs) if i in self.fed]

    def _values(self, node: Node, factors: list[int]) -> list[int]:
        """Factors of a product that are no gates; all where there are only gates."""
        return [j for j in factors if (node.inputs[j], node.input_ports[j]) not in self.gates] or factors

    def _moment(self, node: Node, j: int) -> Tensor:
        """Second moment of one argument, in its shape; a parameter's is its square."""
        index, name, shape = node.inputs[j], node.input_params[j], node.input_shapes[j]
        if index is None and name in self.tensors:
            return self.tensors[name].detach().cpu().to(_FLOAT).square().reshape(shape)
        found = self.moments.get((node.index, -1 - j), None if index is None else self.moments.get((index, node.input_ports[j])))
        if found is None:
            return torch.ones(shape, dtype=_FLOAT)
        # a view that was written in place may have another shape than the node that wrote it
        return found if tuple(found.shape) == tuple(shape) else found.mean().expand(shape)

    def _give(self, node: Node, j: int, k: Tensor) -> None:
        index = node.inputs[j]
        assert index is not None
        port = (index, node.input_ports[j])
        shape = self.trace.input_shape if index == INPUT else self.trace.nodes[index].shapes[port[1]]
        if tuple(k.shape) != tuple(shape):  # written through a view: the sum is what can be kept
            k = k.sum() * _share(self.moments.get(port, torch.ones(shape)).reshape(shape))
            self.approximated["write through a view"] += 1
        self.waiting[port] = k if port not in self.waiting else self.waiting[port] + k

    def _pass(self, node: Node, parts: dict[int, Tensor]) -> None:
        """Hand the capacity on a node's outputs to its data inputs."""
        amount = sum(float(k.double().sum()) for k in parts.values())
        self.carried[node.module] = max(self.carried.get(node.module, 0.0), amount)
        data = self._data(node)
        try:
            self._rule(node, parts, data, amount)
        except _UNFIT:
            self._fallback(node, data, amount)

    def _rule(self, node: Node, parts: dict[int, Tensor], data: list[int], amount: float) -> None:
        base = node.base
        k = parts.get(0)
        same = [j for j in data if tuple(node.input_shapes[j]) == tuple(node.shape)]
        if node.shape_only or _LINEAR.fullmatch(base):
            op: Any = lambda *s: self._call(node, dict(zip(data, s)))  # noqa: E731
            op = interpolation_squared(op, node.input_shapes[data[0]]) if _INTERPOLATION.fullmatch(base) else op
            shares, left = push_ports(parts, [self._moment(node, j) for j in data], op)
            self.bias += left
            for j, share in zip(data, shares):
                self._give(node, j, share)
        elif k is None:
            self.bias += amount  # capacity on a statistic only
        elif _MIX.fullmatch(base):
            self._mix(node, k, data)
        elif (pool := _MAX_POOL.fullmatch(base)) and node.index in self.selected and len(node.shape) == 2 + int(pool[1]):
            share = push_max_pool(k[0], self.selected[node.index].cpu(), node.input_shapes[data[0]][1:]).to(_FLOAT)
            self._give(node, data[0], share.unsqueeze(0))
        elif node.index in self.selected:
            chosen = push_maximum(k, self.selected[node.index].cpu(), node.attrs.get("dim", 1))
            for j, share in zip(data, [chosen] if "dim" in node.attrs else chosen.unbind(1)):
                self._give(node, j, share)
        elif base in ("add", "sub", "rsub") or (base == "lerp" and "weight" in node.attrs):
            self._add(node, k, {j: gain * self._moment(node, j) for j, gain in enumerate(squared_gains(node))}, offset=squared_shift(node))
        elif base in ("mul", "div"):
            self._multiply(node, k, list(range(len(node.inputs))), data)
        elif base == "addcmul":
            first, *factors = (self._moment(node, j) for j in range(3))
            product = (factors[0] * factors[1] * float(node.attrs.get("value", 1)) ** 2).expand(k.shape)
            self._multiply(node, self._add(node, k, {0: first}, product), [1, 2], [j for j in data if j > 0])
        elif _NORM.fullmatch(base) and same:
            leak = self._norm_leak(node)
            self._give(node, same[0], k * (1 - leak))
            self.bias += float((k * leak).sum())
        elif same and _UNARY.fullmatch(base) and (len(data) == 1 or "imum" not in base):
            self._give(node, same[-1 if base == "where" else 0], k)
        else:
            self._fallback(node, data, amount)

    def _add(self, node: Node, k: Tensor, terms: Mapping[int, Tensor], *product: Tensor, offset: float = 0.0) -> Tensor:
        """Divide capacity among the terms of a sum by their second moments; gives the last share, for the product in it if there is one."""
        shares, left = push(k, [*terms.values(), *product], lambda *s: sum(s[1:], s[0]).expand(k.shape), offset)
        data = self._data(node)
        self.bias += left + sum(float(share.sum()) for j, share in zip(terms, shares) if j not in data)
        for j, share in zip(terms, shares):
            if j in data:
                self._give(node, j, share)
        return shares[-1]

    def _multiply(self, node: Node, k: Tensor, factors: list[int], data: list[int]) -> None:
        """Element-wise product or quotient: all to the values, nothing to gates and to what divides them; equal factors share."""
        signal, divides = self._values(node, data), node.base == "div"
        moments = {j: self._moment(node, j) for j in factors}

        def product(j: int, s: Tensor) -> Tensor:
            return math.prod((moments[i] for i in factors if i != j and not divides), start=s).expand(k.shape)

        self._divide(node, k, signal[:1] if divides else signal, product)

    def _mix(self, node: Node, k: Tensor, data: list[int]) -> None:
        """Matrix products and convolutions: by squared weights, or by the second moments of the other factor; what is added as in sums."""
        added = next((j for j, a in enumerate(node.input_names) if a in ("bias", "self") and len(node.inputs) == 3), None)
        moments = {j: self._moment(node, j) for j in range(len(node.inputs)) if j != added}
        alpha, beta = (float(node.attrs.get(name, 1)) ** 2 for name in ("alpha", "beta"))
        offset = torch.zeros(()) if added is None else beta * self._moment(node, added)
        if added is not None and node.base == "convolution":
            offset = offset.view(-1, *[1] * (len(node.shape) - 2))
        if added in data:
            k, offset = self._add(node, k, {added: offset}, alpha * self._product(node, moments)), torch.zeros(())

        def product(j: int, s: Tensor) -> Tensor:
            return alpha * self._product(node, {**moments, j: s})

        self._divide(node, k, self._values(node, [j for j in data if j != added]), product, offset)

    def _divide(
        self, node: Node, k: Tensor, signal: list[int], product: Callable[[int, Tensor], Tensor], offset: Tensor | float = 0.0
    ) -> None:
        """Divide capacity evenly among factors of a product, which ``product`` gives with one of them replaced; to the bias without any."""
        for j in signal:
            (share,), left = push(k / len(signal), [self._moment(node, j)], partial(product, j), offset)
            self.bias += left
            self._give(node, j, share)
        if not signal:
            self.bias += float(k.sum())

    def _inject(self, node: Node, weight: str, place: int, call: int, calls: int) -> None:
        maps = self.responses.get(weight, {})
        amount = self.capacity[weight] / calls
        self.total += amount
        data = self._data(node)
        size = math.prod(node.shape)
        k = None
        if data and node.shape[0] == 1 and self._reads_once(node, data[0], place):
            alive = (self._moment(node, data[0]) > 0).to(_FLOAT)
            k = amount * alive / alive.sum().clamp_min(1)
            k = k if call in maps and bool(maps[call].any()) else None
        elif call in maps and maps[call].numel() == size and data:
            response = maps[call].cpu().reshape(node.shape)

            def op(s: Tensor, w: Tensor) -> Tensor:
                return self._product(node, {data[0]: s, place: w})

            k = inject(amount, torch.empty(node.input_shapes[place]), response, self._moment(node, data[0]), op)
        if k is None or not float(k.sum()) > 0:
            self.bias += amount  # nothing passes through the layer, or it is not on the way to the output
        else:
            self._give(node, data[0], k)

    def _reads_once(self, node: Node, j: int, place: int) -> bool:
        """Whether each weight meets exactly one entry of the input: a linear layer on one vector, a convolution over a whole map."""
        weight, channels = math.prod(node.input_shapes[place]), node.shape[-1] if node.base != "convolution" else node.shape[1]
        return weight == math.prod(node.input_shapes[j]) * channels and math.prod(node.shape) == channels

    def _product(self, node: Node, tensors: dict[int, Tensor]) -> Tensor:
        """The node without its bias, at other factors."""
        base = node.base
        first, second = (tensors[j] for j in sorted(tensors))
        if base == "convolution":
            a = node.attrs
            return torch.ops.aten.convolution.default(
                first, second, None, a["stride"], a["padding"], a["dilation"], a["transposed"], a["output_padding"], a["groups"]
            )
        return torch.nn.functional.linear(first, second) if base == "linear" else torch.matmul(first, second)

    def _call(self, node: Node, tensors: dict[int, Tensor]) -> Any:
        """Run a linear operation on other values of its data; constants enter by their second moments."""
        base = node.base
        if base in ("clone", "contiguous", "detach", "alias", "_to_copy", "to", "lift_fresh"):
            return next(iter(tensors.values())).clone()
        if base in ("view", "_unsafe_view", "as_strided"):
            return next(iter(tensors.values())).reshape(node.shape)
        name, _, overload = node.op.removeprefix("aten.").partition(".")
        op = getattr(getattr(torch.ops.aten, name.rstrip("_")), overload)
        takes_many = {a.name: "Tensor[]" in str(a.type) or "List[Tensor]" in str(a.type) for a in op._schema.arguments}
        values: dict[str, list[Tensor]] = {}
        for j, argument in enumerate(node.input_names):
            values.setdefault(argument, []).append(tensors[j] if j in tensors else self._moment(node, j))
        given = {argument: found if takes_many[argument] else found[0] for argument, found in values.items()}
        others = {key: list(v) if isinstance(v, tuple) else v for key, v in node.attrs.items() if key in takes_many and key != "dtype"}
        return op(**others | given)

    def _norm_leak(self, node: Node) -> Tensor:
        """Share that the bias of a normalisation keeps, broadcast to its output."""
        named = {a: j for j, a in enumerate(node.input_names)}
        if "bias" not in named:
            return torch.zeros(node.shape, dtype=_FLOAT)
        beta = self._moment(node, named["bias"])
        gamma = self._moment(node, named["weight"]) if "weight" in named else torch.ones_like(beta)
        gamma = gamma if bool(gamma.any()) else torch.ones_like(gamma)  # read as one, see `LayerTaps`
        leak = beta / (beta + gamma).clamp_min(torch.finfo(_FLOAT).tiny)
        return leak.expand(node.shape) if "layer" in node.base else leak.view(1, -1, *[1] * (len(node.shape) - 2)).expand(node.shape)

    def _fallback(self, node: Node, data: list[int], amount: float) -> None:
        self.approximated[node.op] += 1
        moments = [self._moment(node, j) for j in data]
        total = sum(float(m.sum()) for m in moments)
        if not total > 0:
            self.bias += amount
            return
        for j, moment in zip(data, moments):
            self._give(node, j, amount * moment / total)


def _share(moment: Tensor) -> Tensor:
    total = moment.sum()
    return moment / total if float(total) > 0 else torch.full_like(moment, 1 / moment.numel())
