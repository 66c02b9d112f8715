"""Capacity per layer by the exact form (34), for networks that are small enough for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas.capacity.capture import quiet
from capnas.capacity.patches import arguments, groups_of, input_rows
from capnas.capacity.taps import LayerTaps
from capnas.measures.layer_capacity import exact_shares, population_ridge, scale_free
from capnas.measures.probing import tensor_of

PARAMS = 2048  # of all layers: one dense float64 solve of this size takes a second or two
_ROWS = 8 * PARAMS  # samples times outputs; the memory of the tangents
# parameters times responses where (34) takes about as long as the other measures of a profile: 10 to 40 ms for two dense layers on a core
_CHEAP = 2**17


class _Tangents(LayerTaps):
    """Keeps the arguments of every call of a layer, and its output's gradient at each backward pass."""

    def tap(self, name: str, weight: Tensor, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        """Nothing is drawn: (34) needs every position."""
        call = {"weight": name, "func": func, "given": arguments(func, args, kwargs), "shape": out.shape}
        if out.requires_grad and out.shape[0] % self.batch == 0:
            self.calls.append(call)
            out.register_hook(lambda gradient: call.update(slope=gradient.detach()))  # before an in-place activation moves the output

    def __enter__(self) -> _Tangents:
        self.calls: list[dict[str, Any]] = []
        super().__enter__()
        return self


def layer_tangents(model: nn.Module, inputs: Tensor, mode: str, *, revive: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Derivatives of each sample's outputs by each layer's weight and bias, times the weight's root mean square (33).

    Args:
        model: as for `capnas.capacity.capacity_map`, as are all arguments.
        inputs: (B, ...).
        mode: "train" holds the batch statistics constant.
        revive: read norms whose scale is zero as if it were one.
        seed: of anything random in the forward pass.

    Returns:
        Weight name to T_l (B * M, P_l) float32 for M outputs, sample by sample; layers that pass no gradient are left out.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> found = layer_tangents(model, x, "eval")["0.weight"] / model[0].weight.detach().square().mean().sqrt()
    >>> torch.testing.assert_close(found, x)
    """
    batch = len(inputs)
    taps = _Tangents(model, batch, rows=0, batch_statistics=mode == "train", revive=revive, seed=seed)
    parts: dict[str, list[Tensor | float]] = {}
    with quiet(model, seed, grad=True):
        leaf = inputs.detach().clone().requires_grad_()
        with taps:
            out = model(leaf.clone())
        flat = tensor_of(out).reshape(batch, -1)
        for index in range(flat.shape[1]):
            torch.autograd.grad(flat[:, index].sum(), leaf, retain_graph=True)
            for call in taps.calls:
                if (slope := call.pop("slope", None)) is not None:
                    of_layer = parts.setdefault(call["weight"], [0.0] * flat.shape[1])
                    of_layer[index] = of_layer[index] + _tangent(call, slope, batch)
    zeros = {name: next(t for t in found if isinstance(t, Tensor)) * 0 for name, found in parts.items()}
    return {name: torch.stack([zeros[name] + t for t in found], 1).flatten(0, 1).cpu() for name, found in parts.items()}


def _tangent(call: dict[str, Any], slope: Tensor, batch: int) -> Tensor:
    """(B, P_l): inputs times output gradients, summed over the positions of each sample."""
    func, given = call["func"], call["given"]
    groups, channel = groups_of(func, given), -1 if func is F.linear else 1
    slopes = slope.float().movedim(channel, -1).reshape(batch, -1, groups, slope.shape[channel] // groups)  # (B, Q, G, b)
    if "rows" not in call:  # the same for every output
        every = torch.arange(slopes.shape[0] * slopes.shape[1], device=slope.device)
        call["rows"] = input_rows(func, given, call["shape"], every).unflatten(1, (batch, -1))  # (G, B, Q, a)
    rows = call["rows"]
    return scale_free(torch.einsum("gnqa,nqgb->ngba", rows, slopes).flatten(1), given["weight"])


def affordable(sizes: Mapping[str, int], responses: int) -> bool:
    """Whether :func:`exact_capacity` costs about as much as the rest of a profile: parameters times responses of at most 2^17 (ours).

    Args:
        sizes: weight name to the number of parameters of every layer that is to have a capacity.
        responses: samples times outputs.

    >>> affordable({"0.weight": 100}, 1000), affordable({"0.weight": 1000}, 1000)
    (True, False)
    """
    return sum(sizes.values()) * responses <= _CHEAP


def exact_capacity(
    model: nn.Module, inputs: Tensor, mode: str, sizes: dict[str, int], outputs: int, *, revive: bool = True, seed: int = 0
) -> tuple[dict[str, float], float] | None:
    """``c_l`` (34) by weight name and its ridge over the number of samples, or None where the exact form does not apply.

    It applies with at most 2,048 parameters and at least as many responses, samples times outputs: with fewer the shares only report
    gradient energy. Samples beyond 16,384 responses are left out, though batch statistics see them. The ridge is `population_ridge`.

    Args:
        model: as for `layer_tangents`, as are the arguments that are not named here.
        inputs: (B, ...).
        mode: "train" or "eval".
        sizes: weight name to the number of parameters of every layer that is to have a capacity.
        outputs: of the model for one sample.
        revive: see there.
        seed: see there.

    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> found, mu = exact_capacity(nn.Sequential(nn.Linear(3, 2)), x, "eval", {"0.weight": 8}, 2)
    >>> round(found["0.weight"], 1), exact_capacity(nn.Linear(3, 2), x[:3], "eval", {"weight": 8}, 2)
    (8.0, None)
    """
    count = min(len(inputs), _ROWS // outputs)
    total = sum(sizes.values())
    if not 0 < total <= min(PARAMS, count * outputs):
        return None
    blocks = {name: block[: count * outputs] for name, block in layer_tangents(model, inputs, mode, revive=revive, seed=seed).items()}
    if set(blocks) != set(sizes) or not all(math.isfinite(e) and e > 0 for e in (float(b.square().sum()) for b in blocks.values())):
        return None  # a head that starts at zero hides the layers before it: the estimate looks through
    ridge = population_ridge(blocks, outputs)
    return exact_shares(blocks, mu=ridge), ridge / count
