"""The exact capacity of every input entry on a batch, for small models: the witness of the cheap propagation rules.

The leverage of the samples in function space, projected back by ``x * d / dx`` (equation 37 of our specification). For a linear model on
whitened inputs it is the spatial allocation of arXiv 1902.04485; the extension to networks is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from capnas.errors import UsageError

Parameters = dict[str, Tensor]
Model = Callable[[Parameters, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PixelMap:
    """``values`` per sample and input entry, summed over outputs; the ``effective`` dimension; the ``bias`` share outside the input."""

    values: Tensor
    effective: float
    bias: float
    mu: float


def parameter_scales(params: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each parameter's layer (ours, 33), of tensors of any shape; a bias takes the scale of its module's weight.

    >>> parameter_scales({"fc.weight": torch.full((2, 2), 2.0), "fc.bias": torch.zeros(2)})
    {'fc.weight': 2.0, 'fc.bias': 2.0}
    """
    scales = {}
    for name, tensor in params.items():
        weight = params.get(name.removesuffix("bias") + "weight", tensor) if name.endswith("bias") else tensor
        scales[name] = float(weight.detach().double().square().mean().sqrt())
    return scales


def tangents(model: Model, params: Mapping[str, Tensor], inputs: Tensor, scales: Mapping[str, float] | None = None) -> dict[str, Tensor]:
    """Derivatives of every output by every parameter, per parameter name (B * M, P_l), float64, times the scales (33). Ours.

    Args:
        model: ``model(params, x)`` of one sample without batch axis, giving (M,) outputs; pure, as with ``torch.func.functional_call``.
        params: float64 tensors by name.
        inputs: (B, ...) samples.
        scales: factor per parameter; ones when None.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> tangents(lambda p, x: (p["w"] @ x).unsqueeze(0), {"w": torch.zeros(2)}, x, {"w": 10.0})["w"].tolist()
        [[10.0, 20.0], [30.0, 40.0]]
    """
    at = {name: tensor.detach() for name, tensor in params.items()}
    jacobians = torch.func.vmap(torch.func.jacrev(model), in_dims=(None, 0))(at, inputs.detach())
    factor = dict.fromkeys(params, 1.0) if scales is None else scales
    return {name: block.flatten(2).flatten(0, 1).double() * factor[name] for name, block in jacobians.items()}


def exact_pixel_map(
    model: Model, params: Mapping[str, Tensor], inputs: Tensor, *, mu: float | None = None, scales: Mapping[str, float] | None = None
) -> PixelMap:
    """Capacity of each input entry: ``sum_n x_n * d/dx_n < R_n, d f(x_n)/d theta >`` with ``R = (Theta + mu I)^-1 T`` held fixed (37).

    Ours. For piecewise linear networks without biases the entries sum to the effective dimension (Euler); what is missing otherwise is
    reported as ``bias``. LayerNorm, softmax and GELU must have their gates detached by the caller for the map to be conservative. Entries
    may be negative. Whiten the inputs for convention W of the linear theory; otherwise the map is its oblique form.

    Args:
        model: ``model(params, x)`` of one sample, giving (M,).
        params: tensors by name; float64 recommended.
        inputs: (B, ...) samples.
        mu: ridge; ``1e-2 tr(Theta) / (B M)`` when None.
        scales: :func:`parameter_scales` for a scale-free map; ones when None.

    Raises:
        UsageError: when every tangent is zero.

    Example:
        >>> x = torch.eye(3, dtype=torch.float64)
        >>> found = exact_pixel_map(lambda p, x: (p["w"] @ x).unsqueeze(0), {"w": torch.zeros(3, dtype=torch.float64)}, x, mu=1e-12)
        >>> [round(value, 6) for value in found.values.sum(0).tolist()]
        [1.0, 1.0, 1.0]
    """
    params, inputs = {name: tensor.detach() for name, tensor in params.items()}, inputs.detach()
    factor = dict.fromkeys(params, 1.0) if scales is None else dict(scales)
    blocks = tangents(model, params, inputs, factor)
    whole = torch.cat(list(blocks.values()), 1)  # (B M, P)
    energy = float(whole.square().sum())
    if not energy > 0:
        raise UsageError("the model's outputs do not depend on its parameters at these inputs; the map is undefined.")
    ridge = 1e-2 * energy / len(whole) if mu is None else mu
    if len(whole) <= whole.shape[1]:
        rows = torch.linalg.solve(whole @ whole.T + ridge * torch.eye(len(whole), dtype=torch.float64), whole)
    else:
        gram = whole.T @ whole
        rows = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), whole.T).T
    effective = float((rows * whole).sum())
    outputs = len(whole) // len(inputs)
    directions = {}
    for (name, tensor), part in zip(params.items(), rows.split([block.shape[1] for block in blocks.values()], 1)):
        directions[name] = (part * factor[name]).to(tensor.dtype).view(len(inputs), outputs, *tensor.shape)

    def pairing(x: Tensor, direction: Parameters) -> Tensor:
        def along(tangent: Parameters) -> Tensor:
            return torch.func.jvp(lambda p: model(p, x), (params,), (tangent,))[1]

        return torch.func.vmap(along)(direction).diagonal().sum()

    slopes = torch.func.vmap(torch.func.grad(pairing))(inputs, directions)
    values = (inputs * slopes).double()
    return PixelMap(values=values, effective=effective, bias=effective - float(values.sum()), mu=ridge)
