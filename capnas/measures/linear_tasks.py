"""Five linear regression tasks on 64 lags and the training of a linear architecture on them.

A stand-in of our own for the synthetic tasks of arXiv 1902.04485, which we have not seen. Training minimises the exact population loss
``e^T Sigma e`` (equation 1 of our specification), so that no sampling noise enters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import toeplitz
from scipy.optimize import least_squares
from torch import Tensor

from capnas.errors import UsageError, one_of
from capnas.measures.allocation import constraint_basis, spatial_allocation, total_capacity
from capnas.measures.linear_architectures import LinearArchitecture

TASKS = ("T1", "T2", "T3", "T4", "T5")
_AT_OPTIMUM = 1e-8  # share of the largest singular value: an optimizer's end point misses the rank of the optimum by some 1e-9


@dataclass(frozen=True, kw_only=True)
class LinearTask:
    """Input covariance (D, D) and the best linear predictor ``target`` (D,), float64."""

    name: str
    meaning: str
    covariance: Tensor
    target: Tensor

    def root(self) -> Tensor:
        """Symmetric square root of the covariance, (D, D) float64."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The best of several trainings of one architecture on one task.

    ``theta`` (P,) are the parameters; ``relative_loss`` is the loss over that of the zero model; ``stationarity`` is ``|Q^T e~| / |e~|``,
    zero at a true optimum (equation 2); ``allocation`` (D,) is the capacity of each lag at the optimum (7, convention W), ``rank`` its
    total and ``generic_rank`` that at a random point.
    ``tied``: another start reached the same loss with another allocation. ``degenerate`` marks an optimum whose allocation is not unique:
    tied, not converged, or with a vanishing error at a rank below the generic one.
    """

    theta: Tensor
    allocation: Tensor
    relative_loss: float
    stationarity: float
    rank: int
    generic_rank: int
    converged: bool
    tied: bool
    degenerate: bool


def linear_task(name: str, length: int = 64) -> LinearTask:
    """One of the tasks T1 to T5. Ours (section 6).

    T1 to T3 have white input and the targets exp(-tau / 8), 1 / (1 + tau) and ones at lags 0-3 and 48-51; T4 and T5 are the one-step
    prediction of a Gaussian process of autocovariance (1 + k)^-0.5 and 0.97^k cos(2 pi k / 20) + 0.1 [k = 0].

    Raises:
        UsageError: for another name.

    Example:
        >>> linear_task("T2").target[:3].tolist()[:2]
        [1.0, 0.5]
    """
    lag = np.arange(length + 1, dtype=np.float64)
    if name in ("T1", "T2", "T3"):
        meaning, target = {
            "T1": ("white input, exponential memory", np.exp(-lag / 8)),
            "T2": ("white input, power-law memory", 1 / (1 + lag)),
            "T3": ("white input, two blocks of lags", ((lag < 4) | ((lag >= 48) & (lag < 52))).astype(np.float64)),
        }[name]
        return LinearTask(
            name=name, meaning=meaning, covariance=torch.eye(length, dtype=torch.float64), target=torch.from_numpy(target[:length])
        )
    if name == "T4":
        meaning, autocovariance = "prediction of a long-memory process", (1 + lag) ** -0.5
    elif name == "T5":
        meaning, autocovariance = "prediction of a noisy oscillation", 0.97**lag * np.cos(2 * np.pi * lag / 20) + 0.1 * (lag == 0)
    else:
        raise UsageError(one_of("task", name, TASKS))
    covariance = toeplitz(autocovariance[:length])
    target = np.linalg.solve(covariance, autocovariance[1:])
    return LinearTask(name=name, meaning=meaning, covariance=torch.from_numpy(covariance), target=torch.from_numpy(target))


def train_linear(
    architecture: LinearArchitecture, task: LinearTask, *, starts: int = 6, seed: int = 0, max_evaluations: int = 500
) -> LinearFit:
    """Trust-region least squares on the whitened error from ``starts`` random points; the best end point is kept. Ours (section 6).

    Local optima and ties are possible (one-channel stacks on T3 have a continuum of equal optima); compare allocations within 0.3 per
    region, and only qualitatively where ``degenerate`` is set.

    Args:
        architecture: of P parameters and D lags.
        task: on D lags.
        starts: number of starting points.
        seed: of the starting points.
        max_evaluations: of the residual, from each start.

    Raises:
        UsageError: where no start gives a finite response.

    Example:
        >>> from capnas.measures.linear_architectures import window
        >>> fit = train_linear(window(8, 8), linear_task("T2", 8), starts=1)
        >>> fit.rank, round(fit.relative_loss, 9), [round(x, 3) for x in fit.theta.tolist()[:3]]
        (8, 0.0, [1.0, 0.5, 0.333])
    """
    root = task.root()
    generator = torch.Generator().manual_seed(seed)
    scale = float((root @ task.target).norm())

    def residual(theta: np.ndarray) -> np.ndarray:
        return (root @ (architecture.response(torch.from_numpy(theta)) - task.target)).numpy()

    def jacobian(theta: np.ndarray) -> np.ndarray:
        return (root @ architecture.jacobian(torch.from_numpy(theta))).numpy()

    points = [architecture.start(generator) for _ in range(starts)]
    generic = max(round(total_capacity(architecture.jacobian(point), task.covariance)) for point in points)
    ends = []
    for point in points:
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(residual(point.numpy())).all():
                continue
            fit = least_squares(
                residual, point.numpy(), jac=jacobian, x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=max_evaluations
            )
        ends.append(fit)
    if not ends:
        raise UsageError(f"no start of {architecture.name} gives a finite response; draw smaller starting values.")
    best = min(ends, key=lambda fit: fit.cost)
    theta = torch.from_numpy(best.x)
    error = torch.from_numpy(best.fun)
    basis = constraint_basis(architecture.jacobian(theta), task.covariance, tolerance=_AT_OPTIMUM)
    stationarity = float((basis.T @ error).norm() / error.norm()) if float(error.norm()) > 0 else 0.0
    relative_loss = float(error.square().sum()) / scale**2
    converged = stationarity <= 1e-6 or relative_loss <= 1e-20  # the angle of a vanished error is rounding noise
    rank = int(basis.shape[1])
    equal = [torch.from_numpy(fit.x) for fit in ends if fit.cost <= best.cost * (1 + 1e-6) + 1e-20 * scale**2]
    kappa, *others = (spatial_allocation(architecture.jacobian(point), task.covariance, tolerance=_AT_OPTIMUM) for point in (theta, *equal))
    others = [other for other in others if abs(float((other - kappa).sum())) < 0.5]  # beside a lower rank lies noise of the generic one
    tied = any(float((other - kappa).abs().sum()) > 0.3 for other in others)
    degenerate = tied or not converged or (relative_loss < 1e-4 and rank < generic)
    return LinearFit(
        theta=theta,
        allocation=kappa,
        relative_loss=relative_loss,
        stationarity=stationarity,
        rank=rank,
        generic_rank=generic,
        converged=converged,
        tied=tied,
        degenerate=degenerate,
    )
