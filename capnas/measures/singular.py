"""Largest singular values: exact for batches of matrices, Krylov-accelerated power iteration for maps without a matrix.

Also all eigenvalues of matrices too wide for double precision.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

EXACT_EIGENVALUES = 2048  # widest matrix that is decomposed in full
SINGLE_DOUBT = 2e-6  # cumulative shares of float32 eigenvalues, scaled to the exact trace, were off by less for every decay tried
_EIGENVALUES_WORK = 2e8  # multiply-adds per eigendecomposition pass up to which all matrices of a batch are decomposed
_BASIS, _KEPT = 24, 6  # vectors of the Krylov basis, and those kept at a restart


def largest_singular_value(matrices: Tensor) -> float:
    """The largest singular value in a batch (B, rows, columns) of real or complex matrices, exact to rounding.

    When all eigenvalues would cost too much, a few Krylov steps find the leading matrix, one eigendecomposition gives its norm v, and a
    Cholesky factorisation of v^2 I - M^H M proves that another matrix stays below it; only those without the proof are decomposed as well.
    No eigendecomposition has a side above 2,048, see `largest_eigenvalue`.

    >>> round(largest_singular_value(torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [4.0, 0.0]]])), 6)
    5.0
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mH
    matrices = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    batch, side, _ = matrices.shape
    if batch == 1:
        return root(largest_eigenvalue(matrices[0] @ matrices[0].mH))
    if batch * side**3 <= _EIGENVALUES_WORK:
        return root(torch.linalg.eigvalsh(matrices @ matrices.mH).max())
    start = torch.ones(batch, side, dtype=matrices.dtype, device=matrices.device)
    rough, *_ = leading_eigenvalue(lambda v: (matrices @ (matrices.mH @ v[..., None]))[..., 0], start, tolerance=1e-2, max_steps=12)
    order = torch.argsort(rough, descending=True)
    best = largest_eigenvalue(matrices[order[0]] @ matrices[order[0]].mH)
    identity = torch.eye(side, dtype=matrices.dtype, device=matrices.device)
    for part in order[1:].split(max(1, int(2**24 // side**2))):
        gram = matrices[part] @ matrices[part].mH
        unproven = torch.linalg.cholesky_ex(best * (1 + 1e-12) * identity - gram)[1] > 0
        for block in gram[unproven]:
            if torch.linalg.cholesky_ex(best * (1 + 1e-12) * identity - block)[1] > 0:
                best = torch.maximum(best, largest_eigenvalue(block))
    return root(best)


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """The largest eigenvalue of a Hermitian positive semi-definite matrix (n, n) in double precision; shape ().

    Beyond a side of 2,048 it is iterated, and raised by the least power of ten from 1e-12 on, relatively, at which a Cholesky
    factorisation proves that no eigenvalue is larger.

    >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))).item()
    4.0
    """
    side = len(matrix)
    if side <= EXACT_EIGENVALUES:
        return torch.linalg.eigvalsh(matrix)[-1]
    start = torch.randn(1, side, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    found, *_ = leading_eigenvalue(lambda v: (matrix @ v[..., None])[..., 0], start, tolerance=1e-12, max_steps=2000)
    value, slack = found[0], 1e-12
    identity = torch.eye(side, dtype=matrix.dtype, device=matrix.device)
    while value > 0 and slack < 1 and torch.linalg.cholesky_ex(value * (1 + slack) * identity - matrix)[1] > 0:
        slack *= 10
    return value * (1 + slack)


def leading_eigenvalue(
    apply: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, max_steps: int, min_steps: int = 8
) -> tuple[Tensor, Tensor, int, bool]:
    """The largest eigenvalue of each of a batch of Hermitian positive maps on (B, n) vectors.

    Thick-restarted Lanczos with full orthogonalisation, all maps of the batch in step. Returns the Ritz values (B,), their error estimates
    min(residual, max(residual / 2, residual^2 / gap)) (B,), the steps taken, and whether no map of the batch can exceed the largest value
    by more than `tolerance`, relatively, by these estimates, after `min_steps` or n: a start that hardly holds the leading eigenvector
    shows the next one first, and nothing but further steps tells.

    >>> scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 1.0]], dtype=torch.float64)
    >>> value, error, steps, sure = leading_eigenvalue(lambda v: scales * v, torch.ones_like(scales), tolerance=1e-9, max_steps=9)
    >>> [round(x, 9) for x in value.tolist()], steps, sure
    ([3.0, 4.0], 3, True)
    """
    batch, n = start.shape
    length = min(_BASIS, n)
    basis = start.new_zeros(batch, length + 1, n)  # rows are the basis vectors
    basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    projected = torch.zeros(batch, length, length, dtype=torch.complex128 if start.is_complex() else torch.float64, device=start.device)
    size, steps, first = 0, 0, 0  # `first`: the first basis vector that the next product overlaps with by more than rounding
    floor = torch.finfo(start.dtype).eps
    while True:
        vector = apply(basis[:, size])
        steps += 1
        span, near = basis[:, : size + 1], basis[:, first : size + 1]
        overlap = (near.conj() @ vector[..., None])[..., 0]
        vector = vector - (near.mT @ overlap[..., None])[..., 0]
        column = (span.conj() @ vector[..., None])[..., 0]  # what rounding left
        vector = vector - (span.mT @ column[..., None])[..., 0]
        column[:, first:] += overlap
        column, first = column.to(projected.dtype), size
        projected[:, : size + 1, size] = column
        projected[:, size, : size + 1] = column.conj()
        size += 1
        ritz, vectors = torch.linalg.eigh(projected[:, :size, :size])
        residual = torch.linalg.vector_norm(vector, dim=1).double()
        top = ritz[:, -1].clamp_min(0)
        exhausted = residual <= 10 * floor * top  # an invariant subspace: a zero vector keeps the batch in step and changes no Ritz value
        direction = torch.where(exhausted[:, None], torch.zeros_like(vector), vector / residual.clamp_min(1e-300).to(vector.dtype)[:, None])
        distance = residual * vectors[:, -1, -1].abs()  # to an eigenvalue, not necessarily to the largest
        gap = (ritz[:, -1] - ritz[:, -2]).clamp_min(1e-300) if size > 1 else distance.clamp_min(1e-300)
        # the squared estimate is blind to a second eigenvalue that the basis has not told apart yet, the distance is not
        error = torch.where(exhausted, 0.0, torch.maximum(torch.minimum(distance, distance**2 / gap), distance / 2))
        late = steps >= min(min_steps, n) and size >= min(8, n)
        enough = late or bool(exhausted.all())  # early Ritz values may sit at a smaller eigenvalue
        converged = enough and bool((top + error <= top.max() * (1 + tolerance)).all())
        if converged or steps >= max_steps or bool(exhausted.all()):
            return top, error, steps, converged
        if size == length:
            kept = min(_KEPT, length - 1)
            leading = vectors[:, :, -kept:].to(basis.dtype)
            basis[:, :kept] = leading.mT @ basis[:, :length]
            projected.zero_()
            projected[:, torch.arange(kept), torch.arange(kept)] = ritz[:, -kept:].to(projected.dtype)
            size, first = kept, 0
        basis[:, size] = direction


def single_eigenvalues(cov: Tensor, total: float) -> Tensor:
    """All eigenvalues (D,) of a positive semi-definite matrix (D, D) from single precision, in descending order and in float64.

    They are scaled to the trace, `total`, above 0; those that are single-precision rounding of 0 are 0, so that a rank can be counted.

    >>> single_eigenvalues(torch.diag(torch.tensor([0.0, 4.0, 1.0], dtype=torch.float64)), 5.0).tolist()
    [4.0, 1.0, 0.0]
    """
    scaled = (cov * (len(cov) / total)).float()  # variances may lie outside of the range of float32
    values = _single(torch.linalg.eigvalsh, torch.linalg.svdvals, scaled).double().sort(descending=True).values.clamp_min(0)
    values = values * (total / values.sum())
    noise = math.sqrt(len(cov)) * torch.finfo(torch.float32).eps * values[0]
    rest = values.flip(0).cumsum(0).flip(0)
    return torch.where((values <= noise) & (rest <= SINGLE_DOUBT / 2 * total), 0.0, values)


def single_eigenvectors(cov: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """What a positive semi-definite matrix (D, D) gives along directions that are its eigenvectors to single precision.

    Args:
        cov: (D, D), float64.
        total: its trace, above 0.

    Returns:
        v^T M v (D,) in descending order, negatives set to 0, and the directions v, columns (D, D) orthonormal to double precision.

    >>> single_eigenvectors(torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64)), 5.0)[0].tolist()
    [4.0, 1.0]
    """
    scaled = ((cov + cov.T) * (len(cov) / (2 * total))).float()
    vectors = _single(lambda m: torch.linalg.eigh(m)[1], lambda m: torch.linalg.svd(m)[0], scaled).double()
    vectors = 1.5 * vectors - vectors @ (vectors.T @ vectors) / 2  # a Newton step towards the nearest orthonormal matrix
    values, order = (vectors * (cov @ vectors)).sum(0).sort(descending=True)
    return values.clamp_min(0), vectors[:, order]


def _single(solve: Callable[[Tensor], Tensor], slower: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """What a float32 solver gives, or, as these give up or return NaN on some large null spaces, what a slower one gives."""
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        found = solve(matrix)
        if bool(torch.isfinite(found).all()):
            return found
    return slower(matrix)


def root(value: Tensor) -> float:
    """Square root of an eigenvalue that rounding may have made negative.

    >>> root(torch.tensor(4.0)), root(torch.tensor(-1e-12))
    (2.0, 0.0)
    """
    return math.sqrt(max(float(value), 0.0))
