"""Lipschitz constants of single layers: the l2 -> l2 operator norm of linear and convolution layers, exact or certified.

Graf, Zeng, Rieck, Niethammer, Kwitt, "On Measuring Excess Capacity in Neural Networks" (NeurIPS 2022) need the norm s_i of every layer. The stride-1
Fourier form is Sedghi, Gupta and Long's (ICLR 2019). The aliased form for strides, the patch and overlap bounds and the certificates are our derivations,
checked against explicit matrices. Where the authors' code departs from the operator (strides, zero padding, kernels larger than the image) this follows
the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from capnas.errors import UsageError, one_of
from capnas.measures.convolution import Convolution, Padding, Sizes, convolution, per_axis

METHODS = ("auto", "patches", "fourier", "dense", "power")

_EXACT_WORK = 6e8  # multiply-adds of the Gram matrices that "auto" pays for an exact value outside of Fourier blocks
_FOURIER_WORK = 2e10
_ALL_EIGENVALUES_WORK = 2e8
_BOUND_WORK = 3e9
_BASIS = 24
_KEPT = 6


@dataclass(frozen=True, kw_only=True)
class OperatorNorm:
    """An operator norm and how it was found.

    Attributes:
        value: The norm; equals `lower`.
        lower: Lower bound: the exact value, or the Rayleigh quotient of the last vector of the iteration (up to rounding).
        upper: Upper bound: the exact value, or the smallest of the Frobenius and unfolding bounds (loose, up to the kernel side).
        method: "patches", "fourier" or "dense" (exact to rounding), or "power" (Krylov-accelerated power iteration).
        converged: Whether the estimated relative error is within the tolerance; always true for the exact methods.
        steps: Applications of A^T A; 0 for the exact methods.
    """

    value: float
    lower: float
    upper: float
    method: str
    converged: bool = True
    steps: int = 0


def linear_norm(weight: Tensor, *, method: str = "auto", tolerance: float = 1e-4, dtype: torch.dtype | None = None) -> OperatorNorm:
    """The largest singular value of a matrix of shape (out, in); arguments as for `operator_norm`.

    >>> linear_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]])).value
    5.0
    """
    return operator_norm(weight[..., None], 1, method=method, tolerance=tolerance, dtype=dtype)


def operator_norm(
    weight: Tensor,
    input_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sizes | None = None,
    method: str = "auto",
    tolerance: float = 1e-4,
    max_steps: int = 400,
    dtype: torch.dtype | None = None,
) -> OperatorNorm:
    """The Lipschitz constant of x -> conv(x) in l2, without bias, for one input size.

    "auto" takes the first that applies: "patches" (no input cell is read twice: 1x1 kernels, patch embeddings, linear layers), where the norm is that of the
    flattened weight; "fourier" (circular padding and a stride that divides the side: the aliased blocks); "dense" (small: the explicit matrix); else "power",
    a thick-restarted Lanczos iteration on A^T A or A A^T with the true adjoint from a fixed start, per group in parallel.

    Args:
        weight: (C_out, C_in / groups, *kernel); of a transposed convolution (C_in, C_out / groups, *kernel) as in torch.
        input_size: Input side or sides.
        stride: See `convolution`, as for `padding`, `dilation`, `groups` and `padding_mode`.
        padding: Zero padding gives the norm of the zero-padded operator, which may be smaller than that of the circular one.
        dilation: Step between taps.
        groups: The norm is the largest over the groups, which share no channel.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        transposed: Take the transposed convolution, the adjoint of a convolution of equal norm.
        output_padding: Extra output cells of a transposed convolution.
        method: "auto" or the method to use.
        tolerance: Relative error at which "power" stops; from about 1e-6 down needs `dtype=torch.float64`.
        max_steps: Limit of applications of A^T A.
        dtype: Precision of "power", float32 or float64; by default that of `weight`, at least float32. The exact methods use float64.

    Raises:
        UsageError: for non-finite weights, unknown names, shapes that do not fit and a method that does not apply.

    >>> weight = torch.tensor([[[1.0, 2.0, 1.0]]])
    >>> operator_norm(weight, 8, padding=1, padding_mode="circular").value
    4.0
    >>> norm = operator_norm(weight, 8, padding=1)
    >>> norm.method, round(norm.value, 4)  # 2 + 2 cos(pi / 9)
    ('dense', 3.8794)
    """
    if method not in METHODS:
        raise UsageError(one_of("method", method, METHODS))
    if not bool(torch.isfinite(weight).all()):
        raise UsageError("the weight has non-finite entries, so it has no operator norm; stop the training earlier or lower the learning rate.")
    weight = weight.detach()
    if transposed:
        input_size = _transposed_output(weight, input_size, stride, padding, dilation, output_padding or 0)
    conv = convolution(weight, input_size, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode)
    chosen = _choose(conv) if method == "auto" else method
    if chosen == "power":
        return _iterated(conv, tolerance, max_steps, dtype or torch.promote_types(weight.dtype, torch.float32))
    exact = Convolution(weight=weight.double(), groups=groups, axes=conv.axes)
    if chosen == "patches" and all(axis.disjoint for axis in conv.axes):
        value = largest_singular_value(exact.weight.flatten(1).unflatten(0, (groups, -1)))
    elif chosen == "fourier" and all(axis.periodic for axis in conv.axes):
        value = largest_singular_value(exact.fourier_blocks())
    elif chosen == "dense":
        value = largest_singular_value(exact.matrix())
    else:
        need = "input cells that are read once" if chosen == "patches" else "circular padding and a stride that divides the input side"
        raise UsageError(f"method {chosen!r} needs {need}; use 'auto'.")
    return OperatorNorm(value=value, lower=value, upper=value, method=chosen)


def largest_singular_value(matrices: Tensor) -> float:
    """The largest singular value in a batch (B, rows, columns) of real or complex matrices, exact to rounding.

    When all eigenvalues would cost too much, a few Krylov steps find the leading matrix, one eigendecomposition gives its norm v, and a Cholesky factorisation
    of v^2 I - M^H M proves that another matrix stays below it; only those without the proof are decomposed as well.

    >>> round(largest_singular_value(torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [4.0, 0.0]]])), 6)
    5.0
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mH
    matrices = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    batch, side, _ = matrices.shape
    if batch == 1 or batch * side**3 <= _ALL_EIGENVALUES_WORK:
        return _root(torch.linalg.eigvalsh(matrices @ matrices.mH).max())
    start = torch.ones(batch, side, dtype=matrices.dtype, device=matrices.device)
    rough, *_ = _leading_eigenvalue(lambda v: (matrices @ (matrices.mH @ v[..., None]))[..., 0], start, tolerance=1e-2, max_steps=12)
    order = torch.argsort(rough, descending=True)
    best = _gram_eigenvalue(matrices[order[0]])
    identity = torch.eye(side, dtype=matrices.dtype, device=matrices.device)
    for part in order[1:].split(max(1, int(2**24 // side**2))):
        gram = matrices[part] @ matrices[part].mH
        unproven = torch.linalg.cholesky_ex(best * (1 + 1e-12) * identity - gram)[1] > 0
        for block in gram[unproven]:
            if torch.linalg.cholesky_ex(best * (1 + 1e-12) * identity - block)[1] > 0:
                best = torch.maximum(best, torch.linalg.eigvalsh(block)[-1])
    return _root(best)


def unfolding_bound(weight: Tensor) -> float:
    """Upper bound on the stride-1 norm for every input size: sqrt(k_h k_w) times the least spectral norm of four unfoldings.

    The unfoldings of (C_out, C_in, k_h, k_w) are (C_out k_h, C_in k_w), (C_out k_w, C_in k_h), (C_out, C_in k_h k_w) and (C_out k_h k_w, C_in). It holds for
    zero and circular padding, and for strides, which only drop outputs; not for circular padding of an image smaller than the kernel.

    >>> round(unfolding_bound(torch.ones(1, 1, 3, 3)), 6)
    9.0
    """
    kernel = weight.shape[2:]
    return math.prod(kernel) ** 0.5 * min(_unfolded_norm(weight.double()[None], rows) for rows in product((True, False), repeat=len(kernel)))


def overlap_bound(conv: Convolution) -> float:
    """Upper bound on the norm of any convolution from how often cells are read; ours, never above `unfolding_bound` times 1 for zero padding.

    Each spatial axis goes either to the columns (then every input cell is copied to at most `Axis.readers` places before the matrix acts) or to the rows
    (then at most `Axis.terms` products are added per output cell); the spectral norm of the unfolded weight times the square root of these counts bounds the
    norm, and the least over the cheap unfoldings is returned, at most the Frobenius norm of the operator.
    """
    blocks = conv.weight.double().unflatten(0, (conv.groups, -1))
    bound = math.inf
    for rows in sorted(product((True, False), repeat=len(conv.axes)), key=lambda r: _unfolded_side(blocks, r)):
        side = _unfolded_side(blocks, rows)
        if side * blocks.numel() > _BOUND_WORK and bound < math.inf:
            break
        count = math.prod(axis.terms if row else axis.readers for axis, row in zip(conv.axes, rows))
        bound = min(bound, count**0.5 * _unfolded_norm(blocks, rows))
    return bound


def max_pool_constant(kernel: Sizes, stride: Sizes, axes: int = 2) -> float:
    """The l2 Lipschitz constant of max pooling: the square root of the most windows that share a cell, prod_axis ceil(k / s).

    >>> max_pool_constant(2, 2), max_pool_constant(3, 2)
    (1.0, 2.0)
    """
    return math.prod(-(-k // s) for k, s in zip(per_axis("kernel", kernel, axes), per_axis("stride", stride, axes))) ** 0.5


def _choose(conv: Convolution) -> str:
    groups, rows, columns = conv.groups, conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    taps, inputs, outputs = (math.prod(sides) for sides in (conv.weight.shape[2:], conv.input_shape[1:], conv.output_shape[1:]))
    if all(axis.disjoint for axis in conv.axes) and groups * _gram_work(rows, columns * taps) <= _EXACT_WORK:
        return "patches"
    if all(axis.periodic for axis in conv.axes) and groups * outputs * _gram_work(rows, columns * inputs // outputs) <= _FOURIER_WORK:
        return "fourier"
    if groups * _gram_work(rows * outputs, columns * inputs) <= _EXACT_WORK:
        return "dense"
    return "power"


def _gram_work(rows: int, columns: int) -> int:
    return min(rows, columns) ** 2 * max(rows, columns)


def _transposed_output(weight: Tensor, size: Sizes, stride: Sizes, padding: Padding, dilation: Sizes, output_padding: Sizes) -> tuple[int, ...]:
    n = weight.dim() - 2
    if not isinstance(padding, int):
        raise UsageError(f"padding of a transposed convolution must be one number; got {padding!r}.")
    extra = (output_padding,) * n if isinstance(output_padding, int) else tuple(output_padding)
    sides, strides, dilations = per_axis("input_size", size, n), per_axis("stride", stride, n), per_axis("dilation", dilation, n)
    return tuple((d - 1) * s - 2 * padding + e * (k - 1) + 1 + o for d, s, e, k, o in zip(sides, strides, dilations, weight.shape[2:], extra))


def _iterated(conv: Convolution, tolerance: float, max_steps: int, dtype: torch.dtype) -> OperatorNorm:
    conv = Convolution(weight=conv.weight.to(dtype), groups=conv.groups, axes=conv.axes)
    wide = math.prod(conv.input_shape) > math.prod(conv.output_shape)  # iterate on the smaller side
    shape = conv.output_shape if wide else conv.input_shape
    first, second = (conv.adjoint, conv.forward) if wide else (conv.forward, conv.adjoint)
    if math.prod(conv.output_shape[1:]) * math.prod(conv.input_shape[1:]) <= 4 * math.prod(conv.weight.shape[2:]):
        matrix = conv.matrix()  # the explicit matrix is hardly larger than the weight, and one product with it is faster than a convolution
        matrix = matrix if wide else matrix.mT
        apply = lambda v: (matrix @ (matrix.mT @ v[..., None]))[..., 0]  # noqa: E731
    else:
        apply = lambda v: second(first(v.reshape(1, *shape))).reshape(conv.groups, -1)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(conv.groups, math.prod(shape) // conv.groups, generator=generator, dtype=torch.float64)
    values, _, steps, converged = _leading_eigenvalue(apply, start.to(conv.weight), tolerance=2 * tolerance, max_steps=max_steps)
    value = _root(values.max())
    return OperatorNorm(value=value, lower=value, upper=max(value, overlap_bound(conv)), method="power", converged=converged, steps=steps)


def _leading_eigenvalue(apply: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, int, bool]:
    """The largest eigenvalue of each of a batch of Hermitian positive maps on (B, n) vectors, by thick-restarted Lanczos with full orthogonalisation.

    Returns the Ritz values (B,), their error estimates min(residual, residual^2 / gap) (B,), the steps taken, and whether no map of the batch can exceed the
    largest value by more than `tolerance`, relatively, by these estimates.
    """
    batch, n = start.shape
    length = min(_BASIS, n)
    basis = start.new_zeros(batch, length + 1, n)  # rows are the basis vectors
    basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    projected = torch.zeros(batch, length, length, dtype=torch.complex128 if start.is_complex() else torch.float64, device=start.device)
    size, steps = 0, 0
    floor = torch.finfo(start.dtype).eps
    while True:
        vector = apply(basis[:, size])
        steps += 1
        span = basis[:, : size + 1]
        column = (span.conj() @ vector[..., None])[..., 0]
        vector = vector - (span.mT @ column[..., None])[..., 0]
        again = (span.conj() @ vector[..., None])[..., 0]
        vector = vector - (span.mT @ again[..., None])[..., 0]
        column = (column + again).to(projected.dtype)
        projected[:, : size + 1, size] = column
        projected[:, size, : size + 1] = column.conj()
        size += 1
        ritz, vectors = torch.linalg.eigh(projected[:, :size, :size])
        residual = torch.linalg.vector_norm(vector, dim=1).double()
        top = ritz[:, -1].clamp_min(0)
        exhausted = residual <= 10 * floor * top  # an invariant subspace: a zero vector keeps the batch in step and changes no Ritz value
        direction = torch.where(exhausted[:, None], torch.zeros_like(vector), vector / residual.clamp_min(1e-300).to(vector.dtype)[:, None])
        error = residual * vectors[:, -1, -1].abs()
        gap = (ritz[:, -1] - ritz[:, -2]).clamp_min(1e-300) if size > 1 else error.clamp_min(1e-300)
        error = torch.where(exhausted, 0.0, torch.minimum(error, error**2 / gap))
        enough = size >= min(8, n) or bool(exhausted.all())  # early Ritz values may sit at a smaller eigenvalue
        converged = enough and bool((top + error <= top.max() * (1 + tolerance)).all())
        if converged or steps >= max_steps or bool(exhausted.all()):
            return top, error, steps, converged
        if size == length:
            kept = min(_KEPT, length - 1)
            leading = vectors[:, :, -kept:].to(basis.dtype)
            basis[:, :kept] = leading.mT @ basis[:, :length]
            projected.zero_()
            projected[:, torch.arange(kept), torch.arange(kept)] = ritz[:, -kept:].to(projected.dtype)
            size = kept
        basis[:, size] = direction


def _unfolded_side(blocks: Tensor, rows: tuple[bool, ...]) -> int:
    _, c_out, c_in, *kernel = blocks.shape
    return min(c_out * math.prod(k for k, row in zip(kernel, rows) if row), c_in * math.prod(k for k, row in zip(kernel, rows) if not row))


def _unfolded_norm(blocks: Tensor, rows: tuple[bool, ...]) -> float:
    """The largest singular value over the groups of (groups, C_out, C_in, *kernel), each kernel axis sent to the rows or the columns."""
    to_rows, to_columns = [3 + i for i, row in enumerate(rows) if row], [3 + i for i, row in enumerate(rows) if not row]
    unfolded = blocks.permute(0, 1, *to_rows, 2, *to_columns)
    return largest_singular_value(unfolded.flatten(1, 1 + len(to_rows)).flatten(2))


def _gram_eigenvalue(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix @ matrix.mH)[-1]


def _root(value: Tensor) -> float:
    return math.sqrt(max(float(value), 0.0))
