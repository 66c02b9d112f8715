"""How far a non-linearity decouples its outputs, and how much of a network's response stays coherent.

J. Donier, *Capacity allocation through neural network layers* (arXiv 1902.08572) names "layer decoupling", the degree to which an
activation decouples its outputs, but the formula was not available to us. The two definitions below are our reconstruction: ``d_out``, the
share of output variance that no linear map of the input explains, for propagating functions; and ``d_gate``, one minus the mean cosine
between derivative gates of different units, for propagating gradients. Bracketed numbers are equations of our specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capnas.errors import UsageError, check_name

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: Mapping[str, Activation] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "leaky_relu_0.1": lambda z: F.leaky_relu(z, 0.1),
    "prelu": lambda z: F.leaky_relu(z, 0.25),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "mish": F.mish,
    "hard_swish": F.hardswish,
    "hard_sigmoid": F.hardsigmoid,
    "hard_tanh": F.hardtanh,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "squared_relu": lambda z: F.relu(z).square(),
    "abs": torch.abs,
    "square": torch.square,
    "sin": torch.sin,
}
"""Activations by name, as timm and torch write them; ``prelu`` at its initial slope, ``leaky_relu`` at torch's slope 0.01."""


@dataclass(frozen=True, kw_only=True)
class Decoupling:
    """``out``: variance of the output not linear in the input (19b), in [0, 1]; ``gate``: one minus the cosine between gates (19a).

    Gates that oppose each other have a negative cosine: ``gate`` is in [0, 2], and in [0, 1 + 1 / (D - 1)] for D live units.
    """

    out: float
    gate: float


def analytic_decoupling(activation: str | Activation) -> Decoupling:
    """Decoupling of an activation at pre-activations ``z ~ N(0, 1)``, weakly correlated across units. Ours (19a), (19b).

    ``d_out = 1 - Cov(a, z)^2 / (Var a Var z)`` (19b) and ``d_gate = 1 - (E a')^2 / E a'^2`` (19a), by Gauss-Legendre quadrature on short
    panels, exact to about 1e-6 for smooth functions and for kinks at multiples of one eighth.

    Args:
        activation: a name of :data:`ACTIVATIONS`, or an element-wise differentiable function.

    Raises:
        UsageError: for an unknown name, or an activation that is constant.

    Example:
        >>> relu = analytic_decoupling("relu")
        >>> round(relu.out, 3), round(relu.gate, 3)
        (0.267, 0.5)
        >>> round(analytic_decoupling(lambda z: torch.tanh(3 * z)).gate, 3)
        0.627
    """
    if isinstance(activation, str):
        check_name("activation", activation, ACTIVATIONS)
        return _named(activation)
    return _integrate(activation)


@cache
def _named(name: str) -> Decoupling:
    return _integrate(ACTIVATIONS[name])


def _integrate(function: Activation) -> Decoupling:
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = torch.arange(-12, 12, 0.125, dtype=torch.float64).unsqueeze(1)
    z = (edges + 0.0625 * (torch.from_numpy(nodes) + 1)).flatten().requires_grad_()
    density = torch.exp(-z.detach().square() / 2) / math.sqrt(2 * math.pi) * (0.0625 * torch.from_numpy(weights)).repeat(len(edges))
    with torch.enable_grad():
        value = function(z)
        if not value.requires_grad:
            raise UsageError("activation must be a differentiable function of its input; it returned a constant.")
        (slope,) = torch.autograd.grad(value.sum(), z)
    value, z = value.detach(), z.detach()
    mean = (density * value).sum()
    variance = (density * (value - mean).square()).sum()
    energy = (density * slope.square()).sum()
    if float(variance) <= 0 or float(energy) <= 0:
        raise UsageError("activation must not be constant; its decoupling is undefined.")
    out = 1 - (density * value * z).sum().square() / variance
    gate = 1 - (density * slope).sum().square() / energy
    return Decoupling(out=_unit(out), gate=_unit(gate))


def relu_gate_decoupling(correlation: Tensor) -> Tensor:
    """Decoupling of two ReLU gates whose pre-activations have this correlation: ``arccos(rho) / pi`` (19a), in [0, 1]. Ours.

    Any shape; entry by entry. Correlations are clipped to [-1, 1].

    >>> relu_gate_decoupling(torch.tensor([1.0, 0.0, -1.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return torch.arccos(correlation.clamp(-1, 1)) / math.pi


def output_decoupling(pre: Tensor, post: Tensor) -> float:
    """Measured ``d_out``: one minus the squared correlation of input and output per unit, weighted by output variance (42), in [0, 1].

    Our reconstruction, as the module's text says; the weighting by variance is ours too.

    Args:
        pre: (S, D) pre-activations, rows are samples (and positions).
        post: (S, D) outputs of the same units.

    Returns:
        The weighted mean over units; NaN when no output varies.

    Raises:
        UsageError: when the shapes differ or there are fewer than two rows.

    Example:
        >>> z = torch.linspace(-1, 1, 101).unsqueeze(1)
        >>> abs(output_decoupling(z, 3 * z + 1)) < 1e-9, round(output_decoupling(z, z.square()), 6)
        (True, 1.0)
    """
    if pre.ndim != 2 or pre.shape != post.shape:
        raise UsageError(f"pre and post must have one shape (S, D), got {tuple(pre.shape)} and {tuple(post.shape)}.")
    if len(pre) < 2:
        raise UsageError(f"decoupling needs at least two samples, got {len(pre)}.")
    z, a = pre.double(), post.double()
    z, a = z - z.mean(0), a - a.mean(0)
    var_z, var_a = z.square().mean(0), a.square().mean(0)
    explained = (z * a).mean(0).square() / (var_z * var_a).clamp_min(torch.finfo(torch.float64).tiny)
    total = var_a.sum()
    return _unit((var_a * (1 - explained)).sum() / total) if float(total) > 0 else math.nan


def gate_decoupling(gates: Tensor, *, dead: float = 1e-6) -> float:
    """Measured ``d_gate``: one minus the mean cosine between the gates of different units (19a, 42).

    Our reconstruction. Costs O(S D): the sum over pairs is read off the square of the sum. Units whose gate has a root mean square below
    ``dead`` are left out.

    Args:
        gates: (S, D) derivatives ``act'(z)`` of D units over S samples at one position, or (S, D, Q) at Q positions, averaged.
        dead: threshold below which a unit counts as dead.

    Returns:
        A number in [0, 1 + 1 / (D - 1)] for D live units, the fewest of any position that has two; NaN where none has.

    Raises:
        UsageError: for gates of another number of axes.

    Example:
        >>> gate_decoupling(torch.ones(8, 5))
        0.0
        >>> gate_decoupling(torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 0.0]]))  # two live units that oppose each other
        2.0
    """
    if gates.ndim not in (2, 3):
        raise UsageError(f"gates must have shape (S, D) or (S, D, Q), got {tuple(gates.shape)}.")
    values = gates.double() if gates.ndim == 3 else gates.double().unsqueeze(2)
    size = values.square().mean(0).sqrt()  # (D, Q)
    alive = size >= dead
    unit = torch.where(alive, values / size.clamp_min(dead), torch.zeros((), dtype=torch.float64))
    count = alive.sum(0).double()  # (Q,)
    usable = count >= 2
    if not bool(usable.any()):
        return math.nan
    pairs = (unit.sum(1).square().mean(0) - count) / (count * (count - 1)).clamp_min(1)
    return float((1 - pairs[usable]).mean().clamp_min(0))


def coherent_share(gradients: Tensor) -> float:
    """Share S of the response that is one gradient for all samples, ``|E g|^2 / E |g|^2`` without the bias of a finite sample (24, ours).

    Args:
        gradients: (S, D) input gradients of one scalar output, a row per sample; batch statistics detached.

    Returns:
        About 1 for a linear model, 0 for shattered gradients; the unbiased estimate may fall slightly below 0.

    Raises:
        UsageError: with fewer than two samples, or when every gradient is zero.

    Example:
        >>> coherent_share(torch.ones(4, 3))
        1.0
    """
    return pair_mean(gradient_pairs(gradients))


def pair_mean(pairs: Tensor) -> float:
    """S (24, ours) from the (N, N) pairs of :func:`gradient_pairs`: their mean over different samples.

    >>> pair_mean(gradient_pairs(torch.ones(4, 3)))
    1.0
    """
    return float(pairs.sum()) / (len(pairs) * (len(pairs) - 1))


def gradient_pairs(gradients: Tensor) -> Tensor:
    """``g_i . g_j / E |g|^2`` between the gradients of different samples, (S, S) float64 with a zero diagonal; their mean is S (24, ours).

    Args:
        gradients: (S, D), as for :func:`coherent_share`.

    Raises:
        UsageError: as there.

    >>> gradient_pairs(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if gradients.ndim != 2 or len(gradients) < 2:
        raise UsageError(f"gradients must have shape (S, D) with at least two samples, got {tuple(gradients.shape)}.")
    rows = gradients.double()
    products = rows @ rows.T
    energy = products.diagonal().mean()
    if not float(energy) > 0:
        raise UsageError("gradients must not all be zero or NaN; the coherent share is undefined.")
    return (products / energy).fill_diagonal_(0)


def coherent_error(pairs: Sequence[Tensor]) -> float:
    """Standard error of S on a finite batch when nothing is coherent, the floor below which S cannot be told from 0 (24, ours).

    S is the mean of ``a_ij = g_i . g_j / E |g|^2`` over the pairs of N samples. Of shattered gradients the ``a_ij`` have mean 0 and are
    uncorrelated between pairs, so ``Var S = 2 E a^2 / (N (N - 1))``, with E a^2 read off the same pairs. Projections of the same samples
    are not independent: their pairs are averaged before they are squared. M groups of other samples are, and divide the variance by M.

    Args:
        pairs: for each group of samples the (N, N) pairs of :func:`gradient_pairs`, averaged over the projections that it sent back.

    Returns:
        A number above 0, about ``(2 / (M N (N - 1) r))^(1/2)`` at r effective directions of the gradients; NaN without groups.

    >>> round(coherent_error([gradient_pairs(torch.ones(4, 3))]), 3)
    0.408
    """
    spread = [2 * float(p.square().sum()) / (len(p) * (len(p) - 1)) ** 2 for p in pairs]
    return math.sqrt(sum(spread)) / len(spread) if spread else math.nan


def shattering(share: float, *, floor: float = 1e-6) -> float:
    """``Lambda = -ln S`` (24), 0 for a linear response and large for a shattered one; S is clipped to [floor, 1] (ours).

    A measured S is only known down to its `coherent_error`: with that as the floor Lambda is a lower bound where S is not above it.

    >>> round(shattering(0.25), 3)
    1.386
    """
    return -math.log(min(max(share, floor), 1.0)) + 0.0


def predicted_gradient_share(gate: Sequence[float], branch_share: Sequence[float] | None = None) -> float:
    """``prod_l (1 - r_l d_gate,l)`` (23, ours), with ``r_l = 1`` for layers without a skip. It assumes independent gates: measure S too.

    Args:
        gate: (L,) d_gate of each layer, in [0, 1].
        branch_share: (L,) r_l, see `residual_share`; ones when None.

    Raises:
        UsageError: where the two lengths differ.

    >>> predicted_gradient_share([0.5, 0.5]), predicted_gradient_share([0.5, 0.5], [0.5, 0.5])
    (0.25, 0.5625)
    """
    shares = [1.0] * len(gate) if branch_share is None else branch_share
    if len(shares) != len(gate):
        raise UsageError(f"gate and branch_share must have one value per layer, got {len(gate)} and {len(shares)}.")
    return math.prod(1 - r * d for r, d in zip(shares, gate))


def predicted_function_share(out: Sequence[float]) -> float:
    """``prod_l (1 - d_out,l)`` for plain networks (23, ours), from d_out (L,) of each layer.

    >>> predicted_function_share([0.5, 0.5])
    0.25
    """
    return math.prod(1 - d for d in out)


def residual_share(branch: Tensor, stream: Tensor) -> float:
    """``r_l = E|branch|^2 / (E|branch|^2 + E|stream|^2)`` of one residual addition (31), in [0, 1]; its sum over depth R should be O(1).

    Ours. Both are tensors of any shape, whose entries are averaged; 0 where both are zero.

    >>> residual_share(torch.ones(2, 3), torch.ones(2, 3))
    0.5
    """
    b, s = float(branch.double().square().mean()), float(stream.double().square().mean())
    return b / (b + s) if b + s > 0 else 0.0


def _unit(value: Tensor) -> float:
    return float(value.clamp(0, 1))
