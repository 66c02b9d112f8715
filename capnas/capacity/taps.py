"""What capacity propagation needs to know of the layers of a model on a batch: the factors of each, from inputs and output gradients.

One forward pass, with batch norm optionally on batch statistics, taps convolutions and linear layers for the backward passes after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from capnas.capacity.capture import MomentReader, mean_of_squares
from capnas.capacity.patches import LAYERS, arguments, groups_of, input_rows, unravel
from capnas.layers import MEASURED
from capnas.measures.layer_capacity import kfac_spectrum


@dataclass(kw_only=True)
class LayerTap:
    """One convolution or linear layer over all its calls."""

    weight: str
    bias: str | None
    n_params: int
    rms: float
    inputs: list[Tensor] = field(default_factory=list)  # per call (G, M, a), rows scaled so that their Gram is A
    responses: list[Tensor] = field(default_factory=list)  # per projection and call (G, M, b), rows whose Gram is its part of places * B
    places: int = 0  # positions of all calls over the batch: A sums over them, B is their mean
    maps: dict[int, Tensor] = field(default_factory=dict)  # per call, flat: E sum_o (d f_o / d z)^2 on one sample's output

    def spectrum(self) -> Tensor:
        """Eigenvalues of the layer's tangent covariance (35)."""
        return kfac_spectrum(_gram(self.inputs), _gram(self.responses) / self.places, self.rms)


class LayerTaps(TorchFunctionMode):
    """Reads inputs and output gradients of every convolution and linear layer, called as a module or as a function.

    A module that computes its weight (weight or spectral norm, standardisation) is read by the weight that it applies.

    With ``revive``, a norm whose scale starts at zero (timm's last norm of a residual branch) counts as scale one: what follows the first
    step of training is read, not the dead branch before it.

    With a ``reader``, linear layers run by the operations that it waits for.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        *,
        rows: int,
        batch_statistics: bool,
        revive: bool = True,
        seed: int = 0,
        reader: MomentReader | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.model, self.names = model, {id(p): name for name, p in model.named_parameters()}
        self.batch, self.rows, self.batch_statistics = batch, rows, batch_statistics
        self.revive = revive
        self.revived: list[str] = []
        self.last_input: Tensor | None = None
        self.taps: dict[str, LayerTap] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.watching = True
        self.projections = 1  # that one backward pass carries
        self.computed: str | None = None  # name for the weight of the running module, should it compute one
        self.handles: list[Any] = []

    def __enter__(self) -> LayerTaps:
        for name, module in self.model.named_modules():
            if isinstance(module, MEASURED):
                self.handles.append(module.register_forward_pre_hook(lambda *_, own=f"{name}.weight": self._runs(own)))
                self.handles.append(module.register_forward_hook(lambda *_: self._runs(None), always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self.handles:
            self.handles.pop().remove()

    def _runs(self, weight: str | None) -> None:
        self.computed = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            given = dict(zip(_NORMS[func], args)) | kwargs
            weight = given.get("weight")
            if self.revive and weight is not None and not bool(weight.detach().any()):
                self.revived.append(self.names.get(id(weight), "a computed scale"))
                given["weight"] = torch.ones_like(weight)
            return _batch_norm(func, given) if func is F.batch_norm and self.batch_statistics else func(**given)
        out = self._linear(*args, **kwargs) if func is F.linear else func(*args, **kwargs)
        if self.watching and func in LAYERS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.names.get(id(weight)) or self.computed
            if name is not None and isinstance(out, Tensor):
                self.computed = None  # one tap a call
                with _disable_current_modes(), torch.no_grad():
                    self.tap(name, weight, func, args, kwargs, out)
        return out

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """By the operations that the trace took: torch chooses by how rows lie in memory, and they may lie apart in a batch alone."""
        expected = "" if self.reader is None else self.reader.expected
        if bias is None or input.ndim < 3 or expected not in ("addmm", "mm"):
            return F.linear(input, weight, bias)
        if expected == "addmm":
            return F.linear(input.contiguous(), weight, bias)
        return F.linear(input.flatten(0, -2), weight).unflatten(0, input.shape[:-1]) + bias

    def tap(self, name: str, weight: Tensor, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        """Read one call: rows of its input now, its output's gradients at each backward pass."""
        given = arguments(func, args, kwargs)
        bias = given.get("bias")
        entry = self.taps.get(name)
        if entry is None:
            entry = self.taps[name] = LayerTap(
                weight=name,
                bias=None if bias is None else self.names.get(id(bias)),
                n_params=weight.numel() + (0 if bias is None else bias.numel()),
                rms=float(weight.detach().float().square().mean().sqrt()),
            )
        groups = groups_of(func, given)
        channel = out.ndim - 1 if func is F.linear else 1
        places = out.numel() // out.shape[channel]
        chosen = torch.randperm(places, generator=self.generator)[: self.rows].to(out.device)
        rows = input_rows(func, given, out.shape, chosen)
        self.last_input = given["input"]
        entry.inputs.append(rows * math.sqrt(places / (len(chosen) * self.batch)))
        entry.places += places
        call = len(entry.inputs) - 1

        def take(gradient: Tensor) -> None:
            flat = gradient.detach().float()
            wanted = self.rows // 2 * self.projections
            if places > wanted:  # drawn, as a lattice could meet only some columns
                picked = torch.randint(places, (wanted,), generator=self.generator).to(flat.device)
            else:
                picked = torch.arange(places, device=flat.device)
            part = flat.movedim(channel, -1)[unravel(picked, [n for axis, n in enumerate(flat.shape) if axis != channel])]
            part = part.reshape(len(part), groups, -1).transpose(0, 1)  # (G, rows, b)
            entry.responses.append(part * math.sqrt(places / part.shape[1]))
            square = mean_of_squares(flat.unflatten(0, (self.batch, -1)).unbind()).flatten()
            entry.maps[call] = entry.maps[call] + square if call in entry.maps else square

        if out.requires_grad and out.shape[0] % self.batch == 0:
            out.register_hook(take)


_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}


def _batch_norm(func: Any, given: dict[str, Any]) -> Tensor:
    """Batch statistics as constants: nothing is stored, and no gradient runs through them."""
    x = given["input"]
    with _disable_current_modes(), torch.no_grad():
        mean, variance = (moment.to(x.dtype) for moment in torch.batch_norm_update_stats(x.detach().float(), None, None, 0.0))
    return func(x, mean, variance, given.get("weight"), given.get("bias"), False, given.get("momentum") or 0.1, given.get("eps", 1e-5))


def _gram(parts: list[Tensor]) -> Tensor:
    """``X^T X``, or ``X X^T`` where that is smaller: the non-zero eigenvalues are the same.

    In float32, as the rows are: its rounding moves a capacity by less than 1e-4 of itself, far below the noise of drawn rows.
    """
    rows = torch.cat(parts, 1)
    return rows.transpose(1, 2) @ rows if rows.shape[2] <= rows.shape[1] else rows @ rows.transpose(1, 2)
