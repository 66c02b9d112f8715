"""Capacity allocation of a linear model: which input directions its parameters are spent on.

After J. Donier, *Capacity allocation analysis of neural networks: a tool for principled architecture design* (arXiv 1902.04485). Of that
paper we had the abstract and opening only: that total capacity is the number of independent parameters, that it can be broken down along
any partition of the input space, and that the spatial allocation is the partition along the canonical dimensions. The formulas below are
our derivation from those statements; the equation numbers in brackets are those of our specification.

A model ``y = phi(theta)^T x`` on zero-mean input of covariance ``Sigma`` (D, D) has the Jacobian ``J = d phi / d theta`` (D, P), or
(D, M, P) for M outputs. With ``Sigma = S S^T`` the *constraint matrix* is ``S^T J`` (3): training pins the whitened error to zero along its
columns and leaves the rest free. Capacity is measured by the orthogonal projector onto that column space.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from capnas.errors import UsageError, check_name

Convention = Literal["W", "C", "R", "O"]
"""How the covariance enters: whitened by the symmetric root, by the Cholesky factor, raw coordinates, oblique projector."""


def constraint_matrix(jacobian: Tensor, covariance: Tensor | None = None, *, convention: Convention = "W") -> Tensor:
    """The matrix whose columns are the directions pinned by training (our equation 3), float64, shape (D * M, P).

    The total capacity does not depend on the convention, the allocation does: ``"W"`` (default) takes the symmetric root of the
    covariance (component i of the whitened input stays closest to input i), ``"C"`` its Cholesky factor (attribution to innovations, for
    ordered time series), ``"R"`` raw coordinates ``Sigma J``. ``"O"`` uses the whitening of ``"W"`` here.

    Args:
        jacobian: (D, P), or (D, M, P) for M outputs (equation 11: the root acts on the input axis of every output).
        covariance: (D, D) symmetric positive semi-definite (positive definite for ``"C"``); the identity when None.
        convention: one of ``W``, ``C``, ``R``, ``O``.

    Raises:
        UsageError: for a shape that does not fit, values that are not finite, or a covariance that is not positive enough.

    Example:
        >>> constraint_matrix(torch.ones(2, 1), torch.diag(torch.tensor([4.0, 9.0]))).round(decimals=9).tolist()
        [[2.0], [3.0]]
    """
    _known(convention)
    tensor = _as_blocks(jacobian)
    if covariance is not None:
        tensor = torch.einsum("di,imp->dmp", _root(covariance, tensor.shape[0], convention), tensor)
    return tensor.flatten(0, 1)


def constraint_basis(
    jacobian: Tensor, covariance: Tensor | None = None, *, convention: Convention = "W", tolerance: float = 1e-9
) -> Tensor:
    """Orthonormal basis Q (D * M, K) of the constraints (our equation 4): left singular vectors above ``tolerance`` of the largest.

    Arguments as for :func:`constraint_matrix`; ``tolerance`` as for :func:`total_capacity`.

    Raises:
        UsageError: see :func:`constraint_matrix`.

    >>> constraint_basis(torch.tensor([[1.0, 2.0], [0.0, 0.0]])).abs().tolist()
    [[1.0], [0.0]]
    """
    left, _, _ = _constraints(jacobian, covariance, tolerance, convention)
    return left


def total_capacity(jacobian: Tensor, covariance: Tensor | None = None, *, mu: float = 0.0, tolerance: float = 1e-9) -> float:
    """Number of independent parameters: the rank of the constraint matrix (equation 4; the definition is the paper's).

    With ``mu > 0`` the soft count ``tr A (A + mu I)^-1``, ``A = J~ J~^T`` (equation 10, our extension), which tends to the rank as
    ``mu -> 0`` and is preferable near singular optima.

    Args:
        jacobian: (D, P) or (D, M, P).
        covariance: (D, D), the identity when None.
        mu: ridge, same unit as squared entries of the whitened Jacobian; 0 for the exact rank.
        tolerance: singular values below this share of the largest count as zero; so do those below the rounding of a Jacobian in single
            or half precision.

    Returns:
        A number in [0, min(D * M, P)]; a whole one when ``mu`` is 0.

    Raises:
        UsageError: see :func:`constraint_matrix`; and for a negative ``mu``.

    Example:
        Two parameters that only enter as a product count once.

        >>> total_capacity(torch.tensor([[3.0, 2.0], [6.0, 4.0]]))
        1.0
    """
    _, values, _ = _constraints(jacobian, covariance, tolerance)
    return float(_shrink(values, mu).sum())


def spatial_allocation(
    jacobian: Tensor, covariance: Tensor | None = None, *, convention: Convention = "W", mu: float = 0.0, tolerance: float = 1e-9
) -> Tensor:
    """Capacity spent on each input: the leverage scores of the constraints (equation 7), (D,) float64, summed over outputs (11).

    The values sum to :func:`total_capacity` (equation 6) and lie in [0, M] for M outputs (8), except under ``"O"``, the oblique projector
    ``J (J^T Sigma J)^-1 J^T Sigma``, whose diagonal can leave that interval. With ``mu > 0`` the projector is softened (10); the sum is
    then the soft total, for ``"R"`` with the ridge added in raw coordinates. The identification of the paper's spatial capacity with
    leverage scores, and of the default convention, is ours.

    Args:
        jacobian: (D, P) or (D, M, P).
        covariance: (D, D), the identity when None (all conventions then agree).
        convention: see :func:`constraint_matrix`; report which one was used.
        mu: ridge of the soft version.
        tolerance: as for :func:`total_capacity`.

    Raises:
        UsageError: see :func:`constraint_matrix`; and for a negative ``mu``.

    Example:
        Two equal inputs share the one parameter that multiplies their sum.

        >>> [round(value, 6) for value in spatial_allocation(torch.tensor([[1.0], [1.0], [0.0]])).tolist()]
        [0.5, 0.5, 0.0]
    """
    _known(convention)
    blocks = _as_blocks(jacobian)
    inputs, outputs, _ = blocks.shape
    left, values, right = _constraints(jacobian, covariance, tolerance, convention)
    weights = _shrink(values, mu)
    if convention == "O" and covariance is not None:
        root = _root(covariance, inputs, "W")
        back = torch.einsum("dmp,pk->dmk", blocks, right / values)
        forth = torch.einsum("di,imk->dmk", root, left.unflatten(0, (inputs, outputs)))
        return torch.einsum("dmk,dmk,k->d", back, forth, weights)
    return (left.square() @ weights).unflatten(0, (inputs, outputs)).sum(1)


def subspace_capacity(
    jacobian: Tensor,
    basis: Tensor,
    covariance: Tensor | None = None,
    *,
    convention: Literal["W", "C", "R"] = "W",
    mu: float = 0.0,
    tolerance: float = 1e-9,
) -> float:
    """Capacity of the input subspace spanned by ``basis`` (D, A): ``tr(B^T Q Q^T B)``, in [0, min(A M, K)] (our equations 5, 8, 11).

    Over the parts of any orthogonal decomposition of the input space the values sum to the total capacity (6).

    Args:
        jacobian: (D, P) or (D, M, P).
        basis: (D, A) with orthonormal columns, in the whitened coordinates of the convention.
        covariance: (D, D), the identity when None.
        convention: an orthogonal one, ``W``, ``C`` or ``R``.
        mu: ridge of the soft version.
        tolerance: as for :func:`total_capacity`.

    Raises:
        UsageError: when the columns of ``basis`` are not orthonormal, or the convention is the oblique one.

    Example:
        >>> round(subspace_capacity(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [0.0]])), 6)
        0.5
    """
    check_name("convention", convention, ("W", "C", "R"))
    inputs, outputs, _ = _as_blocks(jacobian).shape
    columns = basis.to(torch.float64)
    if columns.ndim != 2 or columns.shape[0] != inputs:
        raise UsageError(f"basis must have shape ({inputs}, A), got {tuple(basis.shape)}; pass one column per direction.")
    if not torch.allclose(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64), atol=1e-6):
        raise UsageError("basis must have orthonormal columns; pass torch.linalg.qr(basis).Q instead.")
    left, values, _ = _constraints(jacobian, covariance, tolerance, convention)
    inside = torch.einsum("da,dmk->amk", columns, left.unflatten(0, (inputs, outputs)))
    return float((inside.square() * _shrink(values, mu)).sum())


def parameter_leverage(jacobian: Tensor, covariance: Tensor | None = None, *, mu: float = 0.0, tolerance: float = 1e-9) -> Tensor:
    """Capacity held by each parameter (equation 9, ours), (P,) float64 in [0, 1], with sum the total capacity.

    Sum it over the parameters of a layer for that layer's capacity. Unlike the allocation over inputs it depends on how redundant
    parameters are scaled. Arguments as for :func:`total_capacity`.

    Raises:
        UsageError: see :func:`total_capacity`.

    >>> [round(value, 6) for value in parameter_leverage(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])).tolist()]
    [0.5, 0.5, 1.0]
    """
    _, values, right = _constraints(jacobian, covariance, tolerance)
    return right.square() @ _shrink(values, mu)


def _known(convention: str) -> None:
    check_name("convention", convention, get_args(Convention))


def _as_blocks(jacobian: Tensor) -> Tensor:
    if jacobian.ndim not in (2, 3):
        raise UsageError(f"jacobian must have shape (D, P) or (D, M, P), got {tuple(jacobian.shape)}.")
    tensor = jacobian.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError("jacobian must be finite, got NaN or infinite entries; evaluate it at parameters where the model is finite.")
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(1)


def _root(covariance: Tensor, inputs: int, convention: str) -> Tensor:
    matrix = covariance.detach().to("cpu", torch.float64)
    if matrix.shape != (inputs, inputs):
        raise UsageError(f"covariance must have shape ({inputs}, {inputs}) to match the jacobian, got {tuple(covariance.shape)}.")
    if not bool(torch.isfinite(matrix).all()):
        raise UsageError("covariance must be finite, got NaN or infinite entries; take it of finite inputs.")
    if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * float(matrix.abs().max())):
        raise UsageError("covariance must be symmetric; pass (C + C.T) / 2.")
    if convention == "R":
        return matrix
    if convention == "C":
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise UsageError("convention 'C' needs a positive definite covariance; add a small ridge or use convention 'W'.")
        return factor.T
    values, vectors = torch.linalg.eigh(matrix)
    if float(values[0]) < -1e-8 * float(values[-1].abs()):
        raise UsageError(f"covariance must be positive semi-definite, got the eigenvalue {float(values[0]):.3g}.")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _constraints(
    jacobian: Tensor, covariance: Tensor | None, tolerance: float, convention: Convention = "W"
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of the constraint matrix: left singular vectors, values and right ones of what is above the tolerance.

    The rounding of a Jacobian in less than float64 is the tolerance where that is more: it would count as constraints.
    """
    matrix = constraint_matrix(jacobian, covariance, convention=convention)
    if jacobian.is_floating_point() and jacobian.dtype != torch.float64:
        tolerance = max(tolerance, max(matrix.shape) * torch.finfo(jacobian.dtype).eps)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    keep = values > tolerance * values[:1].sum()
    return left[:, keep], values[keep], right[keep].T


def _shrink(values: Tensor, mu: float) -> Tensor:
    if mu < 0:
        raise UsageError(f"mu must be 0 or positive, got {mu}.")
    # the squares of kept values may overflow or vanish
    return values.square() / (values.square() + mu) if mu else torch.ones_like(values)
