"""Feature-space saturation of a layer: how much of its width the data fills.

Shenk, Richter, Arpteg and Huss, 'Spectral analysis of latent representations' (arXiv 1907.08589) and Shenk et al.,
'Feature space saturation during training' (arXiv 2006.08679): the share of eigenvalues of a layer's output covariance needed to
explain a given share (99 %) of the variance. The published numbers stop one eigenvalue short, (k - 1) / D; ``legacy=True``
gives them, the default follows the definition. Effective rank and Simpson index come from the same covariance.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capnas.measures.moments import Moments, covariance
from capnas.measures.singular import EXACT_EIGENVALUES

THRESHOLD = 0.99


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenvalues of a covariance in descending order, negatives set to 0.

    Attributes:
        eigenvalues: (D,) or fewer, float64.
        width: D, the number of features.
        total: trace of the covariance.
        finite: False when the covariance held NaN or infinite entries (the eigenvalues are then empty).
    """

    eigenvalues: Tensor
    width: int
    total: float
    finite: bool = True

    @cached_property
    def shares(self) -> list[float]:
        """Share of the variance in the first k eigenvalues, for each k; empty without variance."""
        return _shares(self.eigenvalues, self.total)


def spectrum(cov: Tensor) -> Spectrum:
    """Spectrum of a covariance matrix (D, D); never raises on NaN or infinite entries.

    Where there are fewer samples than features, the Gram matrix of the centred samples over their number is the cheaper side: it has the
    same positive eigenvalues. Above 2,048 features the leading eigenvalues come from a randomized range finder of 2,048 directions
    (Halko et al., arXiv 0909.4061), so that no double-precision eigendecomposition is larger than that; the trace stays exact.

    Raises:
        ValueError: the matrix is not square.

    >>> spectrum(torch.diag(torch.tensor([1.0, 3.0]))).eigenvalues.tolist()
    [3.0, 1.0]
    """
    width = _square(cov)
    cov = cov.double()
    if not bool(torch.isfinite(cov).all()):
        return Spectrum(eigenvalues=cov.new_zeros(0), width=width, total=float("nan"), finite=False)
    total = float(cov.diagonal().clamp_min(0).sum())
    if width > EXACT_EIGENVALUES:
        basis = _leading_subspace(cov, EXACT_EIGENVALUES)
        cov = basis.T @ cov @ basis
    values = torch.linalg.eigvalsh(cov).flip(0).clamp_min(0)  # of the lower triangle
    return Spectrum(eigenvalues=values, width=width, total=total)


def intrinsic_dimension(eigenvalues: Tensor, threshold: float = THRESHOLD, total: float | None = None) -> int:
    """k, the smallest number of leading eigenvalues whose share of the variance reaches the threshold.

    Args:
        eigenvalues: (D,) in descending order, not negative.
        threshold: in (0, 1]; the authors found 0.97 to 0.9995 useful.
        total: the variance to explain; the sum of the eigenvalues when absent.

    Returns:
        k in 1..D; 0 when there is no variance (a dead layer).

    Raises:
        ValueError: the threshold is outside (0, 1].

    >>> intrinsic_dimension(torch.tensor([0.5, 0.3, 0.15, 0.03, 0.015, 0.005]))
    5
    >>> intrinsic_dimension(torch.zeros(4))
    0
    """
    _check(threshold)
    return _reach(_shares(eigenvalues.double(), float(eigenvalues.double().sum()) if total is None else total), threshold)


_DEAD = 1e-30  # variance below which a layer counts as constant


def _shares(eigenvalues: Tensor, total: float) -> list[float]:
    return (eigenvalues.cumsum(0) / total).tolist() if total > _DEAD else []


def _reach(shares: list[float], threshold: float) -> int:
    return min(bisect_left(shares, threshold) + 1, len(shares))


def saturation(cov: Tensor, threshold: float = THRESHOLD, *, legacy: bool = False) -> float:
    """Saturation k / D of a layer, from the covariance of its outputs.

    Shenk et al., arXiv 2006.08679: the proportion of eigenvalues needed to explain `threshold` of the variance.

    Args:
        cov: (D, D) covariance of the layer's outputs, see `capnas.measures.moments.covariance`.
        threshold: share of the variance to explain, in (0, 1].
        legacy: the published value (k - 1) / D, which counts the eigenvalues *before* the threshold is reached.

    Returns:
        A number in [0, 1]: 0 for a dead layer, 1 for a layer that needs every direction; NaN if `cov` is not finite.

    Raises:
        ValueError: the matrix is not square, or the threshold is outside (0, 1].

    >>> saturation(torch.eye(10))
    1.0
    >>> saturation(torch.diag(torch.tensor([100.0, 0.01, 0.0, 0.0])))
    0.25
    >>> saturation(torch.diag(torch.tensor([100.0, 0.01, 0.0, 0.0])), legacy=True)
    0.0
    """
    return saturation_of(spectrum(cov), threshold, legacy=legacy)


def saturation_of(spec: Spectrum, threshold: float = THRESHOLD, *, legacy: bool = False) -> float:
    """Saturation (Shenk et al.) from a spectrum that is already there; several thresholds cost one decomposition.

    Raises:
        ValueError: the threshold is outside (0, 1].

    >>> s = spectrum(torch.diag(torch.tensor([0.9, 0.08, 0.02, 0.0])))
    >>> [saturation_of(s, t) for t in (0.85, 0.95, 0.99)]
    [0.25, 0.5, 0.75]
    """
    if not spec.finite:
        return float("nan")
    _check(threshold)
    k = _reach(spec.shares, threshold)
    return max(k - 1, 0) / spec.width if legacy else k / spec.width


def threshold_margin(spec: Spectrum, threshold: float = THRESHOLD) -> float:
    """Distance of the threshold from the nearest cumulative share: near 0, k hangs on rounding and may be one off. Ours.

    >>> round(threshold_margin(spectrum(torch.diag(torch.tensor([0.9, 0.08, 0.02])))), 6)
    0.01
    """
    if not spec.finite or not spec.total > _DEAD:
        return float("nan")
    return min(abs(share - threshold) for share in spec.shares)


def effective_rank(cov: Tensor) -> float:
    """Participation ratio (tr Q)^2 / tr(Q^2) of a covariance (D, D), in [1, D]; 0 for a dead layer. No threshold, no eigenvalues.

    Listed beside saturation as a relative of the 'playground' demo's Simpson index; not a definition of the papers.

    Raises:
        ValueError: the matrix is not square.

    >>> effective_rank(torch.eye(4)), effective_rank(torch.diag(torch.tensor([1.0, 0.0])))
    (4.0, 1.0)
    """
    _square(cov)
    flat = cov.double().flatten()
    squared, trace = float(flat @ flat), float(cov.diagonal().sum())
    if trace != trace or squared != squared:
        return float("nan")
    return trace * trace / squared if trace > _DEAD else 0.0


def simpson_index(cov: Tensor) -> float:
    """Textbook sum of squared variance shares of a covariance (D, D), 1 / effective rank, in [1/D, 1]: 1 for one direction; 0 if dead.

    Raises:
        ValueError: the matrix is not square.

    >>> simpson_index(torch.eye(4))
    0.25
    """
    rank = effective_rank(cov)
    return 1 / rank if rank > 0 else rank


@dataclass(frozen=True, kw_only=True)
class Projection:
    """An orthogonal projection of a layer's outputs around their mean.

    Attributes:
        basis: (D, k) orthonormal columns, float64.
        mean: (D,) float64.
    """

    basis: Tensor
    mean: Tensor

    def __call__(self, samples: Tensor) -> Tensor:
        """P (x - mu) + mu for rows (..., D), in the samples' own type."""
        basis, mean = self.basis.to(samples), self.mean.to(samples)
        return (samples - mean) @ basis @ basis.T + mean


def lossless_projection(moments: Moments, threshold: float = THRESHOLD) -> Projection:
    """Projection on the lossless eigenspace: the first k eigenvectors, centred.

    Shenk et al. train through P x with P = E_k E_k^T; centred here, P (x - mu) + mu, because the covariance that chooses k is
    centred (the reference implementation drops the mean; on inputs far from 0 that alone changes the output by half).

    Args:
        moments: moments of the layer's outputs.
        threshold: share of the variance that the eigenspace keeps, in (0, 1].

    Raises:
        ValueError: the threshold is outside (0, 1].

    >>> from capnas.measures.moments import moments_of
    >>> rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> lossless_projection(moments_of(rows))(rows).tolist()
    [[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]
    """
    cov = covariance(moments)
    values, vectors = leading_eigenvectors(cov)
    total = float(cov.diagonal().clamp_min(0).sum()) if len(values) < len(cov) else None
    k = intrinsic_dimension(values, threshold, total)
    return Projection(basis=vectors[:, :k].contiguous(), mean=moments.mean)


def random_projection(moments: Moments, k: int, seed: int = 0) -> Projection:
    """The control of the projection experiment: k random orthonormal directions around the same mean. In the papers' code.

    >>> random_projection(Moments.empty(3), 2).basis.shape
    torch.Size([3, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(moments.width, k, dtype=torch.float64, generator=generator)
    return Projection(basis=torch.linalg.qr(directions)[0].to(moments.mean.device), mean=moments.mean)


def leading_eigenvectors(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Textbook eigenvalues (n,) in descending order, negatives set to 0, and eigenvectors (D, n) of a covariance; n is D, at most 2,048.

    >>> leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0])))[0].tolist()
    [3.0, 1.0]
    """
    subspace = _leading_subspace(cov, EXACT_EIGENVALUES) if len(cov) > EXACT_EIGENVALUES else None
    cov = cov if subspace is None else subspace.T @ cov @ subspace
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    vectors = vectors if subspace is None else subspace @ vectors
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _leading_subspace(cov: Tensor, size: int) -> Tensor:
    """Orthonormal columns (D, size) that hold nearly all of the leading eigenvectors (Halko et al., arXiv 0909.4061)."""
    generator = torch.Generator(device=cov.device).manual_seed(0)
    basis = torch.randn(len(cov), size, dtype=cov.dtype, device=cov.device, generator=generator)
    for _ in range(2):
        basis = torch.linalg.qr(cov @ basis)[0]
    return basis


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}.")


def _square(cov: Tensor) -> int:
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"cov must be a square covariance, shape (D, D), got shape {tuple(cov.shape)}.")
    return cov.shape[0]
