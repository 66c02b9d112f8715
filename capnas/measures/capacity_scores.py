"""Scores in [0, 1] read off the capacity of layers and pixels.

All are our own construction: the papers on capacity allocation (arXiv 1902.04485, 1902.08572, 1903.04455) propose no score. None is known
to predict accuracy before it is calibrated. Bracketed numbers are equations of our specification.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capnas.errors import UsageError


def capacity_balance(capacity: Sequence[float], n_params: Sequence[int]) -> float:
    """Capacity where the parameters are (43, ours): one minus the total variation between the shares of both, in [0, 1]; 1 is best.

    Raises:
        UsageError: for lists of different lengths, or values that are negative, not finite or all zero.

    >>> capacity_balance([1.0, 3.0], [10, 30]), capacity_balance([1.0, 0.0], [0, 10])
    (1.0, 0.0)
    """
    _check_lengths("capacity", capacity, n_params)
    q, p = _shares(capacity, "capacity"), _shares([float(count) for count in n_params], "n_params")
    return _clip(1 - 0.5 * float((q - p).abs().sum()))


def utilisation_evenness(used: Sequence[float], n_params: Sequence[int]) -> float:
    """Our alternative balance (43): one minus the parameter-weighted Gini coefficient of the utilisations; 1 is best.

    Raises:
        UsageError: for lists of different lengths, or numbers of parameters that are negative or all zero.

    >>> utilisation_evenness([0.5, 0.5], [1, 9])
    1.0
    """
    _check_lengths("used", used, n_params)
    weights = _shares([float(count) for count in n_params], "n_params")
    values = torch.tensor(list(used), dtype=torch.float64)
    mean = float(weights @ values)
    if mean <= 0:
        return 0.0
    gaps = (values.unsqueeze(0) - values.unsqueeze(1)).abs()
    return _clip(1 - float(weights @ gaps @ weights) / (2 * mean))


def depth_evenness(capacity: Sequence[float]) -> float:
    """Our score ``exp(H(q)) / L`` over blocks of one type (44): 1 when every block holds the same capacity, 1 / L when one holds all.

    Over layers of unlike type or width it discriminates poorly.

    Raises:
        UsageError: for values that are negative, not finite or all zero.

    >>> round(depth_evenness([2.0, 2.0, 2.0]), 6), depth_evenness([1.0, 0.0])
    (1.0, 0.5)
    """
    return _effective(_shares(capacity, "capacity"))


def coverage(pixel_map: Tensor, *, target: Tensor | None = None, control: Tensor | None = None) -> float:
    """Share of the input that the capacity covers, ``exp(H(k)) / pixels`` (45, ours); with a target map, one minus their total variation.

    Args:
        pixel_map: capacity per pixel, any shape; negative entries of the exact map count as 0.
        target: where the task's information is, same shape (a mean saliency, a centre prior).
        control: map of the same network with circular padding; the score is divided by the control's to remove border effects.

    Returns:
        A number in [0, 1].

    Raises:
        UsageError: for a map without positive entries, or a target of another number of entries or without a positive sum.

    Example:
        >>> round(coverage(torch.ones(2, 2)), 6), round(coverage(torch.tensor([[1.0, 0], [0, 0]])), 6)
        (1.0, 0.25)
    """

    def score(values: Tensor) -> float:
        shares = _shares(values.detach().double().clamp_min(0).flatten().tolist(), "pixel_map")
        if target is None:
            return _effective(shares)
        if target.numel() != len(shares):
            raise UsageError(f"target must have the shape of the map {tuple(values.shape)}, got {tuple(target.shape)}.")
        wanted = _shares(target.detach().double().flatten().tolist(), "target")
        return _clip(1 - 0.5 * float((shares - wanted).abs().sum()))

    return score(pixel_map) if control is None else _clip(score(pixel_map) / score(control))


def propagation(shattering: float) -> float:
    """Our score ``min(1, Lambda / 0.05) / (1 + Lambda / 3)`` (46): near-linear networks (Lambda about 0) and shattered ones both lose.

    Raises:
        UsageError: for a shattering that is negative or NaN.

    >>> round(propagation(13.9), 2), propagation(0.0)
    (0.18, 0.0)
    """
    if not shattering >= 0:
        raise UsageError(f"shattering must be 0 or positive, got {shattering}; see capnas.measures.decoupling.shattering.")
    return min(1.0, shattering / 0.05) / (1 + shattering / 3)


def scaling(residual_sum: float, reference: float = 1.0) -> float:
    """``exp(-|ln(R / R0)|)`` with R the sum of residual shares (47), clipped to [0.01, 100] first; 1 when R is the reference.

    The reference follows the paper's rule that residual branches scale as depth^(-1/2); the score is ours.

    Raises:
        UsageError: for a sum that is negative or NaN.

    >>> scaling(1.0), scaling(2.0), scaling(0.5)
    (1.0, 0.5, 0.5)
    """
    if not residual_sum >= 0:
        raise UsageError(f"residual_sum must be 0 or positive, got {residual_sum}.")
    ratio = min(max(residual_sum, 0.01), 100.0) / reference
    return min(ratio, 1 / ratio)


def usage(capacity: Sequence[float], n_params: Sequence[int]) -> float:
    """Our score ``sum c_l / sum P_l`` (48), clipped to [0, 1]: comparable only at the same batch, ridge rule and data.

    Raises:
        UsageError: without parameters.

    >>> usage([1.0, 2.0], [2, 4])
    0.5
    """
    total = sum(n_params)
    if total <= 0:
        raise UsageError(f"n_params must have a positive sum, got {total}.")
    return _clip(sum(capacity) / total)


def _check_lengths(name: str, values: Sequence[float], n_params: Sequence[int]) -> None:
    if len(values) != len(n_params):
        raise UsageError(f"{name} and n_params must have one value per layer, got {len(values)} and {len(n_params)}.")


def _shares(values: Sequence[float], name: str) -> Tensor:
    tensor = torch.tensor(list(values), dtype=torch.float64)
    if len(tensor) == 0 or not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()) or float(tensor.sum()) <= 0:
        raise UsageError(f"{name} must be non-negative finite values with a positive sum, got {list(values)[:6]}.")
    return tensor / tensor.sum()


def _effective(shares: Tensor) -> float:
    return _clip(math.exp(float(torch.special.entr(shares).sum())) / len(shares))


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)
