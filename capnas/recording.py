"""Record the outputs of a model's layers and blocks as streaming moments, with hooks that always come off.

Rows follow Shenk et al. (arXiv 2006.08679): the output of the conv or linear module itself, before normalization and activation;
channels (the last axis of token outputs) are features, and every sample and position is one row. Large maps are sampled on a
seeded lattice of positions, enough for the width. All state is kept here; nothing is written on the model. A layer that is not called but
whose weight the network multiplies with itself, as the attentions of BEiT and Swin v2 do, is read where that happens.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capnas.errors import UsageError, check_name
from capnas.layers import CONVS, MEASURED, PRODUCTS, block_widths, feature_axis, find_blocks
from capnas.measures.lattice import Lattice
from capnas.measures.moments import Moments, Scratch, Sums
from capnas.measures.probing import eagerly, first_tensor, unwrap_model

Reading = Literal["modules", "blocks", "both"]
Mode = Literal["train", "eval"]

_NOTHING = nullcontext()
_NARROW = 64  # features below which one dimension of k more or less shows
_FLOAT32_NOISE = 1e-13  # variance over squared mean below which float32 outputs are constant up to rounding


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What was seen of one layer or block in one mode.

    Attributes:
        name: qualified module name.
        kind: class name of the module.
        reading: "modules" or "blocks".
        width: D, the number of features.
        rows: rows used.
        rows_seen: rows (samples times positions) of the passes that were read.
        calls: forward calls read.
        positions: rows that one image gives in one call (height times width of a map, tokens of a sequence, 1 of a vector).
        finite: False when an output held NaN or infinite values, or ones whose squares overflow in its precision.
        mean: (D,) float64, of the rows used.
        spread: (D, D) float64, their scatter around the mean; (D, S), the centred rows themselves, where S is below D.
    """

    name: str
    kind: str
    reading: Literal["modules", "blocks"]
    width: int
    rows: int
    rows_seen: int
    calls: int
    positions: int
    finite: bool
    mean: Tensor
    spread: Tensor

    @property
    def moments(self) -> Moments:
        """Moments of the rows used."""
        scatter = self.spread if self.spread.shape[1] == self.width else self.spread @ self.spread.T
        return Moments(count=self.rows, mean=self.mean, scatter=scatter)

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D); where few rows were used, their Gram matrix over S, (S, S): its positive eigenvalues are the same."""
        return (self.spread if self.spread.shape[1] == self.width else self.spread.T @ self.spread) / max(self.rows, 1)


class Recorder:
    """Context manager that records layer outputs while a model runs, in training or evaluation.

    Args:
        model: any module; it is not changed, and its hooks are removed on exit, also after an error. A compiled one runs uncompiled inside,
            and its layers have the names that they have without ``torch.compile``. Copies of it, made or saved meanwhile, are not recorded.
        reading: "modules" (conv and linear outputs, the papers' convention), "blocks" (the repeated units of the network) or "both".
        blocks: a regular expression that full-matches the names of the units to read as blocks; found by `find_blocks` when absent.
        values_per_call: bound on the numbers copied from one layer in one forward call: `max(values_per_call, 3 * width**2)`, that is
            rows in inverse proportion to the width, and no fewer than 3 per feature; None uses every row.
        train_interval: in training mode a layer is read in every n-th forward pass of the model only, the first one always; one with no
            more rows a pass than features in all, and so is evaluation. Layers below 64 features take n times as many rows, or are
            read in every pass where they have not as many. A search takes 3.
        seed: of the lattice offsets.

    Raises:
        UsageError: unknown reading, an interval below 1, a pattern that matches no module, or a ``torch.jit.ScriptModule``.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> with Recorder(model) as recorder:
    ...     _ = model(torch.randn(8, 1, 8, 8))
    >>> [(r.name, r.moments.width, r.moments.count) for r in recorder.pop("train").values() if r.reading == "modules"]
    [('0', 4, 288), ('3', 2, 8)]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reading: Reading = "both",
        blocks: str | None = None,
        values_per_call: int | None = 2**17,
        train_interval: int = 1,
        seed: int = 0,
    ) -> None:
        check_name("reading", reading, ("modules", "blocks", "both"))
        if train_interval < 1:
            raise UsageError(f"train_interval must be 1 (every pass) or more, got {train_interval}.")
        self._given = model  # the user runs this one
        self.model = model = unwrap_model(model)
        self.values_per_call = values_per_call
        self.train_interval = train_interval
        self._passes = -1  # a model that is run by its parts only never counts, and every pass is read
        self._reads = True
        self._images: int | None = None  # of the running pass
        self._few: set[str] = set()
        self._positions: dict[tuple[str, str, str], int] = {}
        self._random = random.Random(seed)
        self._handles: list[Any] = []
        self._eagerly, self._pass = ExitStack(), ExitStack()
        self._sums: dict[tuple[str, str, str], Sums] = {}
        self._scratch = Scratch()
        modules = dict(model.named_modules())
        self.layers = [n for n, m in modules.items() if isinstance(m, MEASURED)] if reading != "blocks" else []
        self.blocks = list(find_blocks(model, blocks)) if reading != "modules" else []
        self._modules = modules
        self._direct: DirectProducts | None = None  # of a network without such products only in its first pass
        self._block_axis = {name: block_widths(modules[name]) for name in self.blocks}
        self._channels_last_maps = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def __enter__(self) -> Recorder:
        self._eagerly.enter_context(eagerly(self._given))
        self._handles.append(self.model.register_forward_pre_hook(_Hook(self._count)))
        self._handles.append(self.model.register_forward_hook(_Hook(self._ends), always_call=True))
        hooks = {name: self._hook(name, "modules") for name in self.layers}
        for name, hook in hooks.items():
            self._handles.append(self._modules[name].register_forward_hook(_Hook(hook)))
        self._direct = DirectProducts(self.model, hooks) if hooks else None
        for name in self.blocks:
            self._handles.append(self._modules[name].register_forward_hook(_Hook(self._hook(name, "blocks"))))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pass.close()  # open still where the pass was interrupted
        self._eagerly.close()

    def pop(self, mode: Mode) -> dict[str, LayerRecord]:
        """The records of one mode since the last pop, and a fresh start for that mode.

        Args:
            mode: "train" or "eval", the model's mode while it ran; the two are never mixed.

        Returns:
            Records in execution order, keyed by name, blocks as ``"block:" + name``.
        """
        check_name("mode", mode, ("train", "eval"))
        keys = [k for k in self._sums if k[0] == mode]
        return {("block:" if reading == "blocks" else "") + name: self._record((m, reading, name)) for m, reading, name in keys}

    def _count(self, model: nn.Module, args: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not the second run of a checkpointed forward
            self._passes += model.training
            self._reads = not model.training or self._passes % self.train_interval == 0
            first = first_tensor(args)
            self._images = first.shape[0] if first is not None and first.dim() else None
            if self._direct is not None and not self._direct.entered:
                self._pass.enter_context(self._direct)

    def _ends(self, model: nn.Module, args: Any, output: Any) -> None:
        self._pass.close()
        if output is not None and self._direct is not None and not self._direct.found:
            self._direct = None

    def _record(self, key: tuple[str, str, str]) -> LayerRecord:
        (_, reading, name), sums = key, self._sums.pop(key)
        mean, spread = sums.mean_and_spread()
        few = spread.shape[1] < sums.width
        variation = float(torch.linalg.vector_norm(spread).square() if few else spread.diagonal().sum())  # finite where every entry is
        level = sums.count * float(mean.square().sum())
        coarser = torch.finfo(sums.shift.dtype).eps / torch.finfo(torch.float32).eps  # type: ignore[union-attr]
        if variation <= _FLOAT32_NOISE * coarser**2 * level < math.inf:
            spread = torch.zeros_like(spread)
        return LayerRecord(name=name, kind=type(self._modules[name]).__name__, reading=reading, width=sums.width,  # type: ignore[arg-type]
                           rows=sums.count, rows_seen=sums.seen, calls=sums.calls, positions=self._positions.pop(key),
                           finite=math.isfinite(variation + level), mean=mean, spread=spread)  # fmt: skip

    def _hook(self, name: str, reading: str) -> Any:
        is_conv = isinstance(self._modules[name], CONVS)
        widths = self._block_axis.get(name, frozenset())
        lattices: dict[tuple[Any, Any], Lattice] = {}  # by shape and strides; one layer sees few

        def lattice_of(module: nn.Module, tensor: Tensor) -> Lattice:
            if reading == "modules":
                axis = -len(module.kernel_size) - 1 if is_conv else -1  # type: ignore[arg-type]
            else:
                axis = feature_axis(tensor, widths, self._channels_last_maps)
            width = tensor.shape[axis]
            rows = tensor.numel() // width
            budget = None if self.values_per_call is None else max(self.values_per_call // width, 3 * width)
            if width < _NARROW and budget is not None:  # as many rows in fewer passes take less time, where a pass has as many
                budget *= self.train_interval
            if rows <= width or (width < _NARROW and (budget is None or rows < 0.75 * budget)):
                self._few.add(name)
            return Lattice(tensor, axis, budget)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # gradient checkpointing runs the forward again inside the backward pass: that is the same batch, not a new one
            if not (self._reads or name in self._few) or torch._C._current_graph_task_id() != -1:
                return
            tensor = first_tensor(output)
            if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point() or tensor.numel() == 0:
                return
            device = tensor.device.type
            # as a rule no mode is on, and leaving none is not free
            modes = (_autocasts(device) and torch.is_autocast_enabled(device)) or torch.is_inference_mode_enabled()
            with _plainly(device) if modes else _NOTHING:
                tensor = tensor.detach()
                laid = tensor.shape, tensor.stride()
                lattice = lattices.get(laid) or lattices.setdefault(laid, lattice_of(module, tensor))
                key = ("train" if self.model.training else "eval", reading, name)
                width, rows = lattice.width, lattice.rows
                sums = self._sums.get(key)
                if sums is None or sums.width != width:
                    sums = self._sums[key] = Sums(width, self._scratch)
                self._positions[key] = max(1, rows // (self._images or tensor.shape[0]))
                sums.add(lattice.of(tensor, self._random), rows)

        return hook


def _nothing(*_: Any) -> None:
    """What a hook is in a copy."""


class _Hook(functools.partial[Any]):
    """A hook of one model: in a copy of the model, or in one from a file, it does nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


class DirectProducts(TorchFunctionMode):
    """Inside, the hooks of layers see the products with their weights that the network makes without calling them.

    Args:
        model: its layers are to be found by the weights that they hold as parameters.
        hooks: by name of the layer; called with it, no inputs and the product, for which what a hook returns stands.

    Attributes:
        entered: whether it is entered now.
        found: whether there was such a product.

    >>> net, seen = nn.Sequential(nn.Linear(2, 3)), []
    >>> with DirectProducts(net, {"0": lambda layer, inputs, output: seen.append(output.shape)}):
    ...     _ = nn.functional.linear(torch.ones(4, 2), net[0].weight), net(torch.ones(5, 2))
    >>> seen
    [torch.Size([4, 3])]
    """

    def __init__(self, model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.hooks, self.found, self.entered = hooks, False, False
        self._layers = {n: m for n, m in model.named_modules() if n and isinstance(m, MEASURED)}
        self._names: dict[tuple[Any, int], str] = {}  # by the kind of product and the weight
        self._running = 0  # layers, in one another
        self._handles: list[Any] = []

    def __enter__(self) -> DirectProducts:
        self._running, self.entered = 0, True
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(_Hook(self._step, 1)))
            self._handles.append(layer.register_forward_hook(_Hook(self._step, -1), always_call=True))
            product = next(PRODUCTS[kind] for kind in MEASURED if isinstance(layer, kind))
            if name in self.hooks and (weight := layer._parameters.get("weight")) is not None:
                self._names.setdefault((product, id(weight)), name)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.entered = False
        self._names.clear()
        while self._handles:
            self._handles.pop().remove()

    def _step(self, up: int, *_: Any) -> None:
        self._running += up

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if attention := func is F.multi_head_attention_forward:  # ends in the product with the weight of nn.MultiheadAttention's out_proj
            func, args, (output, *others) = F.linear, args[10:], output
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        name = None if self._running else self._names.get((func, id(weight)))
        if name is not None:
            self.found = True
            instead = self.hooks[name](self._layers[name], (), output)
            output = output if instead is None else instead
        return (output, *others) if attention else output


@contextmanager
def hooked(hooks: Mapping[str, Callable[..., Any]], model: nn.Module, *, before: bool = False) -> Iterator[None]:
    """Forward hooks (or pre-hooks) by module name that come off again; inputs given by name come to them as the others do.

    >>> net, seen = nn.Sequential(nn.ReLU()), []
    >>> with hooked({"0": lambda module, args, output: seen.append(output.item())}, net):
    ...     _ = net(torch.tensor([-1.0]))
    >>> _ = net(torch.tensor([2.0]))
    >>> seen
    [0.0]
    """
    handles: list[Any] = []
    try:
        for name, hook in hooks.items():
            module = model.get_submodule(name)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(functools.partial(_unnamed, hook), with_kwargs=True))
        with eagerly(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _unnamed(hook: Callable[..., Any], module: nn.Module, args: Any, named: Mapping[str, Any], *output: Any) -> Any:
    return hook(module, (*args, *named.values()), *output)


@contextmanager
def _plainly(device: str) -> Iterator[None]:
    """Outside autocast, and outside inference mode, since what is made inside cannot be written outside."""
    with torch.autocast(device, enabled=False) if _autocasts(device) else _NOTHING, torch.inference_mode(False):
        yield


_autocasts = functools.cache(torch.amp.is_autocast_available)  # other devices have no such mode to ask for
