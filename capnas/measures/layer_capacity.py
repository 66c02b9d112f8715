"""Capacity of each layer of a trained or untrained network, from its tangents.

The linear theory's leverage of a parameter (after J. Donier, arXiv 1902.04485), summed over a layer and softened, on the network's tangent
features. The papers define total capacity as the number of independent parameters; the estimators below are our construction. Bracketed
numbers are equations of our specification.

Letters: R rows (samples times outputs), P_l parameters of layer l, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capnas.errors import DegenerateError, UsageError

_DOUBLE = 2048  # side above which float64 eigenvalues cost too much


@dataclass(frozen=True, kw_only=True)
class LayerCapacity:
    """Exact capacities by layer name (34): ``share`` sums to ``effective``; ``marginal <= share <= solo``."""

    share: dict[str, float]
    solo: dict[str, float]
    marginal: dict[str, float]
    effective: float
    mu: float


def scale_free(tangents: Tensor, weight: Tensor) -> Tensor:
    """Tangents times the root mean square of the layer's weights (33): rescaling a layer then leaves its capacity unchanged. Ours.

    Use the weight's scale for the layer's bias too.

    >>> scale_free(torch.ones(1, 2), torch.tensor([3.0, -3.0])).tolist()
    [[3.0, 3.0]]
    """
    return tangents * weight.detach().double().square().mean().sqrt().to(tangents.dtype)


def exact_layer_capacity(blocks: Mapping[str, Tensor], *, mu: float | None = None) -> LayerCapacity:
    """``c_l = tr((Theta + mu I)^-1 Theta_l)`` with ``Theta_l = T_l T_l^T`` (34), solved on the smaller of R x R and P x P. Ours.

    Use it only with at least about as many rows as parameters: with far fewer, Theta is close to a multiple of the identity and the shares
    only report gradient energy (the marginal values then vanish). Otherwise use :func:`kfac_capacity`.

    Args:
        blocks: per layer the tangents T_l (R, P_l), a row per sample and output, scaled by :func:`scale_free`.
        mu: ridge; ``1e-2 tr(Theta) / R`` when None, which measures capacity on this batch; :func:`population_ridge` for the population's.

    Raises:
        UsageError: without layers, for blocks of different row counts, or when all tangents are zero.

    Example:
        >>> found = exact_layer_capacity({"a": torch.eye(2), "b": torch.eye(2)}, mu=1e-9)
        >>> {name: round(value, 3) for name, value in found.share.items()}, round(found.solo["a"], 3), round(found.marginal["a"], 3)
        ({'a': 1.0, 'b': 1.0}, 2.0, 0.0)
    """
    layers, ridge = _prepared(blocks, mu)
    share = _shares(layers, ridge)
    effective = sum(share.values())
    solo = {name: float(_leverage(block, ridge).sum()) for name, block in layers.items()}
    marginal = {}
    for name in layers:
        rest = [block for other, block in layers.items() if other != name]
        marginal[name] = effective - (float(_leverage(torch.cat(rest, 1), ridge).sum()) if rest else 0.0)
    return LayerCapacity(share=share, solo=solo, marginal=marginal, effective=effective, mu=ridge)


def exact_shares(blocks: Mapping[str, Tensor], *, mu: float | None = None) -> dict[str, float]:
    """The ``share`` of :func:`exact_layer_capacity` alone, by layer name: one solve instead of one and two for each layer (34). Ours.

    Args:
        blocks: per layer the tangents T_l (R, P_l), as there.
        mu: ridge, as there.

    Raises:
        UsageError: as there.

    >>> {name: round(value, 3) for name, value in exact_shares({"a": torch.eye(2), "b": torch.eye(2)}, mu=1e-9).items()}
    {'a': 1.0, 'b': 1.0}
    """
    return _shares(*_prepared(blocks, mu))


def _prepared(blocks: Mapping[str, Tensor], mu: float | None) -> tuple[dict[str, Tensor], float]:
    """Checked tangents in float64, and the ridge."""
    if not blocks:
        raise UsageError("blocks must hold the tangents of at least one layer, got none.")
    layers = {name: block.detach().double() for name, block in blocks.items()}
    rows = {len(block) for block in layers.values()}
    if len(rows) != 1:
        raise UsageError(f"blocks must share their number of rows, got {sorted(rows)}.")
    energy = sum(float(block.square().sum()) for block in layers.values())
    if not (energy > 0 and math.isfinite(energy)):
        raise DegenerateError(f"tangents must be finite and not all zero, got total energy {energy}.")
    return layers, 1e-2 * energy / rows.pop() if mu is None else mu


def _shares(layers: Mapping[str, Tensor], ridge: float) -> dict[str, float]:
    parts = _leverage(torch.cat(list(layers.values()), 1), ridge).split([block.shape[1] for block in layers.values()])
    return {name: float(part.sum()) for name, part in zip(layers, parts)}


def population_ridge(blocks: Mapping[str, Tensor], outputs: int, *, share: float = 1e-3) -> float:
    """A ridge for :func:`exact_layer_capacity` that does not fade with the batch: ``share * tr(Theta) / outputs``. Ours.

    The default ridge of (34) is relative to one row, so that with many samples every direction that is not exactly zero counts as used.
    This one is relative to a sample mean: capacities converge as the batch grows, and the over-wide rule (50) is checked with it.

    >>> population_ridge({"a": torch.ones(4, 2)}, outputs=2)
    0.004
    """
    return share * sum(float(block.detach().double().square().sum()) for block in blocks.values()) / outputs


def kfac_spectrum(inputs: Tensor, responses: Tensor, weight_rms: float = 1.0) -> Tensor:
    """Eigenvalues of one layer's Kronecker-factored tangent covariance: ``rms^2 * eig_a(A) * eig_b(B)`` (35), float64, flat.

    The factors are those of Grosse and Martens (KFC, 2016).

    Args:
        inputs: A (..., a, a), per sample the sum over positions of ``patch patch^T`` (patch with a trailing 1 for a bias).
        responses: B (..., b, b), mean over samples and positions of ``sum_o g_o g_o^T`` with ``g_o = d f_o / d preactivation``. Leading
            axes are groups, equal in both. Eigenvalues are found in the precision given; float32 serves, as the ridge hides its rounding.
        weight_rms: root mean square of the layer's weights.

    Raises:
        UsageError: a factor holds NaN or infinite values.

    Example:
        >>> kfac_spectrum(torch.eye(2), 3 * torch.eye(1)).tolist()
        [3.0, 3.0]
    """
    left, right = (_eigenvalues(factor.detach()).double().clamp_min(0) for factor in (inputs, responses))
    return weight_rms**2 * (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten()


def common_ridge(spectra: Sequence[Tensor], *, share: float = 1e-3, top: int = 20) -> float:
    """The one ridge of all layers: ``share`` times the mean of the ``top`` largest eigenvalues over all layers (35). Ours.

    Raises:
        UsageError: without layers.

    >>> common_ridge([torch.tensor([4.0]), torch.tensor([2.0])])
    0.003
    """
    if not spectra:
        raise UsageError("spectra must hold at least one layer, got none.")
    largest = torch.cat([spectrum.topk(min(top, len(spectrum))).values for spectrum in spectra])
    return share * float(largest.topk(min(top, len(largest))).values.mean())


def kfac_capacity(spectra: Mapping[str, Tensor], *, mu: float | None = None) -> dict[str, float]:
    """``c_l = sum x / (x + mu)`` over a layer's eigenvalues (35): an estimate of the exact ``solo`` capacity, high by up to a third. Ours.

    Args:
        spectra: per layer the eigenvalues from :func:`kfac_spectrum`.
        mu: ridge, the same for all layers; :func:`common_ridge` when None.

    Returns:
        Capacity per layer in [0, P_l]; zeros when no layer has a tangent.

    Raises:
        UsageError: without layers and without a ridge.

    Example:
        >>> kfac_capacity({"a": torch.tensor([1.0, 1.0, 0.0])}, mu=1.0)
        {'a': 1.0}
    """
    ridge = common_ridge(list(spectra.values())) if mu is None else mu
    if ridge <= 0:
        return dict.fromkeys(spectra, 0.0)
    return {name: float((spectrum / (spectrum + ridge)).sum()) for name, spectrum in spectra.items()}


def utilisation(capacity: Mapping[str, float], n_params: Mapping[str, int]) -> dict[str, float]:
    """``u_l = c_l / P_l`` (36), in [0, 1]; layers without parameters are left out. Ours.

    >>> utilisation({"a": 3.0}, {"a": 4})
    {'a': 0.75}
    """
    return {name: value / n_params[name] for name, value in capacity.items() if n_params[name] > 0}


def over_wide(used: Mapping[str, float]) -> tuple[str, ...]:
    """Layers whose utilisation is below half of the best (50); of the upper quartile when there are more than eight layers. Ours.

    Extra channels add parameters but no independent constraint, as in the dense and dilated stacks of
    :mod:`capnas.measures.linear_architectures`. Provisional thresholds: confirm with :func:`elasticity` before shrinking.

    >>> over_wide({"a": 0.8, "b": 0.3, "c": 0.5})
    ('b',)
    """
    if not used:
        return ()
    values = torch.tensor(list(used.values()), dtype=torch.float64)
    reference = float(torch.quantile(values, 0.75) if len(values) > 8 else values.max())
    return tuple(name for name, value in used.items() if value < 0.5 * reference)


def elasticity(capacity: float, n_params: float, narrow_capacity: float, narrow_params: float) -> float:
    """``d ln c / d ln P`` between a layer and its narrower copy (50); below 0.6 the layer's width buys little capacity. Ours.

    Raises:
        UsageError: for a capacity or a number of parameters that is not positive, or two copies of one size.

    >>> round(elasticity(10.0, 100, 10.0, 50), 3)
    0.0
    """
    if not min(capacity, n_params, narrow_capacity, narrow_params) > 0 or n_params == narrow_params:
        given = f"capacities {capacity:g} and {narrow_capacity:g}, parameters {n_params:g} and {narrow_params:g}"
        raise UsageError(f"elasticity needs positive capacities and two different positive numbers of parameters; got {given}.")
    return math.log(capacity / narrow_capacity) / math.log(n_params / narrow_params)


def spectral_rank(matrix: Tensor) -> float:
    """Effective rank ``(sum eig)^2 / sum eig^2`` of a positive semi-definite factor (50), in [1, a]; 0 for the zero matrix. Ours.

    Evidence of width to spare when below 0.3 of the size of A_l or B_l (untested threshold).

    >>> spectral_rank(torch.eye(3))
    3.0
    """
    squares = float(matrix.detach().double().square().sum())
    return float(matrix.detach().double().trace()) ** 2 / squares if squares > 0 else 0.0


def _eigenvalues(factor: Tensor) -> Tensor:
    """Eigenvalues (..., a) of positive semi-definite matrices (..., a, a), in any order."""
    # float32 solvers give up, or return NaN, on a large null space, as where class tokens alone have gradients
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        found = torch.linalg.eigvalsh(factor)
        if bool(torch.isfinite(found).all()):
            return found
    if not bool(torch.isfinite(factor).all()):
        raise DegenerateError("the factors of a layer's tangents must be finite; check the weights and the batch.")
    return torch.linalg.eigvalsh(factor.double()) if factor.shape[-1] <= _DOUBLE else torch.linalg.svdvals(factor)


def _leverage(block: Tensor, mu: float) -> Tensor:
    """Diagonal of ``T^T (T T^T + mu I)^-1 T`` (P,), on the smaller side."""
    rows, columns = block.shape
    if columns == 0:
        return torch.zeros(0, dtype=torch.float64)
    if rows <= columns:
        gram = block @ block.T + mu * torch.eye(rows, dtype=torch.float64)
        return (block * torch.linalg.solve(gram, block)).sum(0)
    gram = block.T @ block
    return torch.linalg.solve(gram + mu * torch.eye(columns, dtype=torch.float64), gram).diagonal()
