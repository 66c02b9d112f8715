"""Feature-space saturation of a layer: how much of its width the data fills.

Shenk, Richter, Arpteg and Huss, 'Spectral analysis of latent representations' (arXiv 1907.08589) and Shenk et al.,
'Feature space saturation during training' (arXiv 2006.08679): the share of eigenvalues of a layer's output covariance needed to
explain a given share (99 %) of the variance. The published numbers stop one eigenvalue short, (k - 1) / D; ``legacy=True``
gives them, the default follows the definition. Effective rank and Simpson index come from the same covariance. None of them minds the
scale of the outputs: a layer is dead where its covariance is 0, as `capnas.measures.moments.covariance` makes it for constant outputs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from capnas.errors import UsageError
from capnas.measures.moments import Moments, covariance
from capnas.measures.singular import EXACT_EIGENVALUES, SINGLE_DOUBT, single_eigenvalues, single_eigenvectors

THRESHOLD = 0.99
_HELD = 1 - 1e-5  # share of the variance from which the leading eigenvalues stand for all of them
_RANK = 1e-12  # eigenvalues below this share of the largest are rounding
_NORMAL = torch.finfo(torch.float64).tiny  # a trace below it has no digits; rounding of a mean is for `covariance` to take off


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Eigenvalues of a covariance in descending order, negatives set to 0.

    Attributes:
        eigenvalues: (D,) or fewer, float64.
        width: D, the number of features.
        total: trace of the covariance.
        finite: False when the covariance held NaN or infinite entries (the eigenvalues are then empty).
        doubt: share of the variance by which a cumulative share may be off beyond the rounding of float64.
    """

    eigenvalues: Tensor
    width: int
    total: float
    finite: bool = True
    doubt: float = 0.0

    @cached_property
    def shares(self) -> list[float]:
        """Share of the variance in the first k eigenvalues, for each k; empty without variance."""
        return _shares(self.eigenvalues, self.total)


def spectrum(cov: Tensor, held: float = _HELD) -> Spectrum:
    """Spectrum of a covariance matrix (D, D); never raises on NaN or infinite entries.

    Where there are fewer samples than features, the Gram matrix of the centred samples over their number is the cheaper side: it has the
    same positive eigenvalues. No double-precision eigendecomposition is larger than 2,048. Above, the leading 2,048 eigenvalues come from a
    randomized range finder (Halko et al., arXiv 0909.4061) where its directions hold the share `held` of the exact trace: a cumulative
    share is then short by what they miss at most, as X1 X1^T + X2 X2^T, which has the eigenvalues of (X1 X2)^T (X1 X2), has leading sums
    no larger than those of both terms together (Ky Fan, 1949). Elsewhere all D come in single precision, two seconds for 4,096.

    Args:
        cov: (D, D).
        held: in (0, 1]; an intrinsic dimension at a threshold up to it is found, at one above it may only be bounded from below.

    Raises:
        UsageError: the matrix is not square.

    >>> spectrum(torch.diag(torch.tensor([1.0, 3.0]))).eigenvalues.tolist()
    [3.0, 1.0]
    """
    width = _square(cov)
    cov = cov.double()
    if not bool(torch.isfinite(cov).all()):
        return Spectrum(eigenvalues=cov.new_zeros(0), width=width, total=float("nan"), finite=False)
    total = _trace(cov)
    basis = _holding_subspace(cov, held) if width > EXACT_EIGENVALUES else None
    if width > EXACT_EIGENVALUES and basis is None:
        return Spectrum(eigenvalues=single_eigenvalues(cov, total), width=width, total=total, doubt=SINGLE_DOUBT)
    values = torch.linalg.eigvalsh(cov if basis is None else basis.T @ cov @ basis).flip(0).clamp_min(0)  # of the lower triangle
    missed = max(0.0, 1 - float(values.sum()) / total) if basis is not None and total > _NORMAL else 0.0
    return Spectrum(eigenvalues=values, width=width, total=total, doubt=missed)


def intrinsic_dimension(eigenvalues: Tensor, threshold: float = THRESHOLD, total: float | None = None) -> int:
    """k, the smallest number of leading eigenvalues whose share of the variance reaches the threshold.

    Args:
        eigenvalues: (D,) in descending order, not negative.
        threshold: in (0, 1]; the authors found 0.97 to 0.9995 useful. At 1, k is the numerical rank, the number of eigenvalues above
            1e-12 of the largest: no rounded sum tells them from those that are 0.
        total: the variance to explain; the sum of the eigenvalues when absent.

    Returns:
        k in 1..D; 0 when there is no variance (a dead layer). Where the eigenvalues given hold less than the threshold of `total`, their
        number: a lower bound.

    Raises:
        UsageError: the threshold is outside (0, 1].

    >>> intrinsic_dimension(torch.tensor([0.5, 0.3, 0.15, 0.03, 0.015, 0.005]))
    5
    >>> intrinsic_dimension(torch.zeros(4))
    0
    """
    check_threshold(threshold)
    values = eigenvalues.double()
    return _reach(values, _shares(values, float(values.sum()) if total is None else total), threshold)


def _shares(eigenvalues: Tensor, total: float) -> list[float]:
    return (eigenvalues.cumsum(0) / total).tolist() if total > _NORMAL else []


def _reach(eigenvalues: Tensor, shares: list[float], threshold: float) -> int:
    if threshold == 1 and shares:
        return int((eigenvalues > _RANK * eigenvalues[0]).sum())
    return min(bisect_left(shares, threshold) + 1, len(shares))


def saturation(cov: Tensor, threshold: float = THRESHOLD, *, legacy: bool = False) -> float:
    """Saturation k / D of a layer, from the covariance of its outputs.

    Shenk et al., arXiv 2006.08679: the proportion of eigenvalues needed to explain `threshold` of the variance.

    Args:
        cov: (D, D) covariance of the layer's outputs, see `capnas.measures.moments.covariance`.
        threshold: share of the variance to explain, in (0, 1]; at 1, k is the numerical rank.
        legacy: the published value (k - 1) / D, which counts the eigenvalues *before* the threshold is reached.

    Returns:
        A number in [0, 1]: 0 for a dead layer, 1 for a layer that needs every direction; NaN if `cov` is not finite.

    Raises:
        UsageError: the matrix is not square, or the threshold is outside (0, 1].

    >>> saturation(torch.eye(10))
    1.0
    >>> saturation(torch.diag(torch.tensor([100.0, 0.01, 0.0, 0.0])))
    0.25
    >>> saturation(torch.diag(torch.tensor([100.0, 0.01, 0.0, 0.0])), legacy=True)
    0.0
    """
    return saturation_of(spectrum(cov, max(threshold, _HELD)), threshold, legacy=legacy)


def saturation_of(spec: Spectrum, threshold: float = THRESHOLD, *, legacy: bool = False) -> float:
    """Saturation (Shenk et al.) from a spectrum that is already there; several thresholds cost one decomposition.

    A lower bound where the eigenvalues hold less than the threshold; `threshold_margin` is 0 there.

    Raises:
        UsageError: the threshold is outside (0, 1].

    >>> s = spectrum(torch.diag(torch.tensor([0.9, 0.08, 0.02, 0.0])))
    >>> [saturation_of(s, t) for t in (0.85, 0.95, 0.99)]
    [0.25, 0.5, 0.75]
    """
    if not spec.finite:
        return float("nan")
    check_threshold(threshold)
    k = _reach(spec.eigenvalues, spec.shares, threshold)
    return max(k - 1, 0) / spec.width if legacy else k / spec.width


def threshold_margin(spec: Spectrum, threshold: float = THRESHOLD) -> float:
    """Distance of the threshold from the nearest cumulative share, less their doubt: near 0, k hangs on rounding and may be one off. Ours.

    It is 0 where the doubt of the spectrum leaves k open: k is then one bound of it.

    >>> round(threshold_margin(spectrum(torch.diag(torch.tensor([0.9, 0.08, 0.02])))), 6)
    0.01
    """
    if not spec.finite or not spec.total > _NORMAL:
        return float("nan")
    return max(0.0, min(abs(share - threshold) for share in spec.shares) - spec.doubt)


def effective_rank(cov: Tensor) -> float:
    """Participation ratio (tr Q)^2 / tr(Q^2) of a covariance (D, D), in [1, D]; 0 for a dead layer. No threshold, no eigenvalues.

    Listed beside saturation as a relative of the 'playground' demo's Simpson index; not a definition of the papers.

    Raises:
        UsageError: the matrix is not square.

    >>> effective_rank(torch.eye(4)), effective_rank(torch.diag(torch.tensor([1.0, 0.0])))
    (4.0, 1.0)
    """
    _square(cov)
    trace = float(cov.diagonal().double().sum())
    if not trace > _NORMAL:
        return float("nan") if trace != trace or bool(cov.isnan().any()) else 0.0
    shares = (cov.double() / trace).flatten()  # their squares neither overflow nor vanish
    return 1 / float(shares @ shares)


def simpson_index(cov: Tensor) -> float:
    """Textbook sum of squared variance shares of a covariance (D, D), 1 / effective rank, in [1/D, 1]: 1 for one direction; 0 if dead.

    Raises:
        UsageError: the matrix is not square.

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
    centred (the reference implementation drops the mean; on inputs far from 0 that alone changes the output by half). It keeps the
    threshold's share at any width.

    Args:
        moments: moments of the layer's outputs.
        threshold: share of the variance that the eigenspace keeps, in (0, 1]; at 1, k is the numerical rank.

    Raises:
        UsageError: the threshold is outside (0, 1].

    >>> from capnas.measures.moments import moments_of
    >>> rows = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    >>> lossless_projection(moments_of(rows))(rows).tolist()
    [[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]]
    """
    check_threshold(threshold)
    cov = covariance(moments)
    values, vectors = leading_eigenvectors(cov, max(threshold, _HELD))
    total = _trace(cov) if len(values) < len(cov) else None
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


def leading_eigenvectors(cov: Tensor, held: float = (1 + _HELD) / 2) -> tuple[Tensor, Tensor]:
    """Textbook eigenvalues (n,) in descending order, negatives set to 0, and eigenvectors (D, n) of a covariance, both float64.

    n is D; above 2,048 it is 2,048 where so many directions hold the share `held` of the trace, see `spectrum`. Elsewhere all D are found
    in single precision, made orthonormal in double, and given with the variances along them: half a minute for 4,096.

    Args:
        cov: (D, D).
        held: in (0, 1]; when absent above that of `spectrum`, so that there are no fewer vectors than eigenvalues there.

    >>> leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0])))[0].tolist()
    [3.0, 1.0]
    """
    cov = cov.double()
    subspace = _holding_subspace(cov, held) if len(cov) > EXACT_EIGENVALUES else None
    if len(cov) > EXACT_EIGENVALUES and subspace is None:
        return single_eigenvectors(cov, _trace(cov))
    cov = cov if subspace is None else subspace.T @ cov @ subspace
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    vectors = vectors if subspace is None else subspace @ vectors
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _holding_subspace(cov: Tensor, held: float) -> Tensor | None:
    """Orthonormal columns (D, 2,048) along which lies a share of the trace, rounding apart; None where those that were found hold less."""
    wanted = min(held, 1 - len(cov) * torch.finfo(torch.float64).eps) * _trace(cov)
    if math.sqrt(EXACT_EIGENVALUES) * float(torch.linalg.matrix_norm(cov)) < wanted:
        return None  # no subspace can: n eigenvalues sum to at most sqrt(n) times the root of their squares
    basis = _leading_subspace(cov, EXACT_EIGENVALUES)
    return basis if float((basis * (cov @ basis)).sum()) >= wanted else None


def _trace(cov: Tensor) -> float:
    return float(cov.diagonal().clamp_min(0).sum())


def _leading_subspace(cov: Tensor, size: int) -> Tensor:
    """Orthonormal columns (D, size) that hold nearly all of the leading eigenvectors (Halko et al., arXiv 0909.4061)."""
    generator = torch.Generator(device=cov.device).manual_seed(0)
    basis = torch.randn(len(cov), size, dtype=cov.dtype, device=cov.device, generator=generator)
    for _ in range(2):
        basis = torch.linalg.qr(cov @ basis)[0]
    return basis


def check_threshold(threshold: float) -> None:
    """Refuse what is no share of the variance, as delta is in Shenk et al. (arXiv 2006.08679).

    Raises:
        UsageError: outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be in (0, 1], got {threshold}.")


def _square(cov: Tensor) -> int:
    if cov.dim() != 2 or cov.shape[0] != cov.shape[1] or not cov.numel():
        raise UsageError(f"cov must be a square covariance, shape (D, D), got shape {tuple(cov.shape)}.")
    return cov.shape[0]
