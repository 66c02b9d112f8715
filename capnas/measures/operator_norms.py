"""Lipschitz constants of single layers: the l2 -> l2 operator norm of linear and convolution layers, exact or certified.

Graf, Zeng, Rieck, Niethammer, Kwitt, "On Measuring Excess Capacity in Neural Networks" (NeurIPS 2022) need the norm s_i of every layer. The
stride-1 Fourier form is Sedghi, Gupta and Long's (ICLR 2019). The aliased form for strides, the patch and overlap bounds and the
certificates are our derivations, checked against explicit matrices. Where the authors' code departs from the operator (strides, zero
padding, kernels larger than the image) this follows the operator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from capnas.errors import UsageError, check_name
from capnas.measures.convolution import Convolution, Padding, Sizes, convolution, per_axis
from capnas.measures.singular import EXACT_EIGENVALUES, largest_singular_value, leading_eigenvalue, root

METHODS = ("auto", "patches", "fourier", "dense", "power")

_WORK = {"patches": 2.5e9, "fourier": 2e10, "dense": 3e8}  # multiply-adds of the Gram matrices that "auto" pays for an exact value
_BOUND_WORK = (2e9, 7e8)  # for the cheapest unfolding, for each further one
_SMALL, _SMALL_STEPS = 4096, 64  # cells up to which so many steps cost little: after 8 the norm of 1 in 250 random layers was missed


@dataclass(frozen=True, kw_only=True)
class OperatorNorm:
    """An operator norm and how it was found.

    Attributes:
        value: the norm; equals `lower`.
        lower: lower bound: the exact value, or the Rayleigh quotient of the last vector of the iteration (up to rounding).
        upper: upper bound: the exact value, or `overlap_bound` (loose: 1.6 to 2 times the norm for 3x3), with `tight` also `ring_bound`.
        method: "patches", "fourier" or "dense" (exact to rounding), or "power" (Krylov-accelerated power iteration).
        converged: whether the estimated relative error is within the tolerance; always true for the exact methods.
        steps: applications of A^T A; 0 for the exact methods.
    """

    value: float
    lower: float
    upper: float
    method: str
    converged: bool = True
    steps: int = 0


def linear_norm(weight: Tensor, *, method: str = "auto", tolerance: float = 1e-4, dtype: torch.dtype | None = None) -> OperatorNorm:
    """The largest singular value of a matrix of shape (out, in), the paper's s of a dense layer; arguments as for `operator_norm`.

    Raises:
        UsageError: for non-finite weights, an unknown method or one that does not apply.

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
    tight: bool = False,
    bounded: bool = True,
    dtype: torch.dtype | None = None,
) -> OperatorNorm:
    """The Lipschitz constant of x -> conv(x) in l2, without bias, for one input size: the paper's s (Sedghi et al., 2019, with strides).

    The method "auto" takes the first that applies: "patches" (no input cell is read twice: 1x1 kernels, patch embeddings, linear layers),
    where the norm is that of the flattened weight; "fourier" (circular padding and a stride that divides the side: the aliased blocks);
    "dense" (small: the explicit matrix); else, and where a side to be decomposed is above 2,048, "power", a thick-restarted Lanczos
    iteration on A^T A or A A^T with the true adjoint from a fixed start, per group in parallel.

    Args:
        weight: (C_out, C_in / groups, *kernel); of a transposed convolution (C_in, C_out / groups, *kernel) as in torch.
        input_size: input side or sides.
        stride: see `convolution`, as for `padding`, `dilation`, `groups` and `padding_mode`.
        padding: zero padding gives the norm of the zero-padded operator, which may be smaller than that of the circular one.
        dilation: step between taps.
        groups: the norm is the largest over the groups, which share no channel.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        transposed: take the transposed convolution, the adjoint of a convolution of equal norm.
        output_padding: extra output cells of a transposed convolution.
        method: "auto" or the method to use.
        tolerance: relative error at which "power" stops; from about 1e-6 down needs `dtype=torch.float64`.
        max_steps: limit of applications of A^T A.
        tight: pay for the closer upper bound of "power" where there is one (zero padding).
        bounded: False spares "power" its upper bound, which is then infinite.
        dtype: precision of "power", float32 or float64; by default that of `weight`, at least float32. The exact methods use float64.

    Raises:
        UsageError: for non-finite weights, unknown names, shapes that do not fit and a method that does not apply.

    >>> weight = torch.tensor([[[1.0, 2.0, 1.0]]])
    >>> operator_norm(weight, 8, padding=1, padding_mode="circular").value
    4.0
    >>> norm = operator_norm(weight, 8, padding=1)
    >>> norm.method, round(norm.value, 4)  # 2 + 2 cos(pi / 9)
    ('dense', 3.8794)
    """
    check_name("method", method, METHODS)
    if not bool(torch.isfinite(weight).all()):
        raise UsageError(
            "the weight must be finite to have a norm; got infinite or undefined entries, as after a diverged training: lower its rate."
        )
    weight, side = weight.detach(), input_size
    if transposed:
        side = _transposed_output(weight, input_size, stride, padding, dilation, output_padding or 0)
    conv = convolution(weight, side, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode)
    if transposed:  # extra output cells of a stride or more would be read by outputs that the transposed layer has no input for
        inputs = per_axis("input_size", input_size, len(conv.axes))
        conv = replace(conv, axes=tuple(replace(axis, outputs=n) for axis, n in zip(conv.axes, inputs)))
    chosen = _choose(conv) if method == "auto" else method
    if chosen == "patches" and not all(axis.disjoint for axis in conv.axes):
        raise UsageError("method 'patches' needs input cells that are read at most once; use 'auto'.")
    if chosen == "fourier" and not all(axis.periodic for axis in conv.axes):
        raise UsageError("method 'fourier' needs circular padding and a stride that divides the input side; use 'auto'.")
    scale = float(weight.abs().max()) or 1.0  # squares of the entries then neither overflow nor vanish
    conv = replace(conv, weight=weight.double() / scale)
    if chosen == "power":
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        norm = _iterated(replace(conv, weight=conv.weight.to(dtype)), tolerance, max_steps, bounded)
        upper = min(norm.upper, ring_bound(conv)) if tight and padding_mode == "zeros" else norm.upper
        return replace(norm, value=scale * norm.value, lower=scale * norm.lower, upper=scale * max(norm.value, upper))
    matrices = {
        "patches": lambda: conv.weight.flatten(1).unflatten(0, (groups, -1)),
        "fourier": conv.fourier_blocks,
        "dense": conv.matrix,
    }
    value = scale * largest_singular_value(matrices[chosen]())
    return OperatorNorm(value=value, lower=value, upper=value, method=chosen)


def unfolding_bound(weight: Tensor) -> float:
    """Upper bound on the stride-1 norm for every input size: sqrt(k_h k_w) times the least spectral norm of four unfoldings.

    The unfoldings of (C_out, C_in, k_h, k_w) are (C_out k_h, C_in k_w), (C_out k_w, C_in k_h), (C_out, C_in k_h k_w) and (C_out k_h k_w,
    C_in). It holds where no tap reads an input cell twice: for zero padding, and for circular padding of at most dilation * (k - 1) cells
    an axis, both sides together, so that stride 1 gives no more outputs than inputs; then for strides too, which only drop outputs. Other
    paddings repeat cells, and `overlap_bound` counts them. Singla and Feizi, "Fantastic Four" (ICLR 2021, arXiv 1911.10258), for two axes;
    other numbers of axes are ours.

    >>> round(unfolding_bound(torch.ones(1, 1, 3, 3)), 6)
    9.0
    >>> twice = operator_norm(torch.ones(1, 1, 1), 2, padding=1, padding_mode="circular")  # one tap, four outputs of two cells
    >>> unfolding_bound(torch.ones(1, 1, 1)), round(twice.value, 4)
    (1.0, 1.4142)
    """
    kernel = weight.shape[2:]
    choices = product((True, False), repeat=len(kernel))
    return math.prod(kernel) ** 0.5 * min(_unfolded_norm(weight.detach().double()[None], rows) for rows in choices)


def overlap_bound(conv: Convolution) -> float:
    """Upper bound on the norm of any convolution, from how often its cells are read; ours.

    Each spatial axis goes either to the columns of the unfolded weight (then every input cell is copied to at most `Axis.readers` places
    before the matrix acts) or to its rows (then at most `Axis.terms` products are added per output cell). The spectral norm of the unfolded
    weight times the square root of these counts bounds the norm. The least over the cheap unfoldings is returned, or the same with the
    Frobenius norm where all are dear.

    >>> round(overlap_bound(convolution(torch.ones(1, 1, 2), 4, stride=2)), 4)  # disjoint pairs: the exact value
    1.4142
    """
    blocks = conv.weight.unflatten(0, (conv.groups, -1))
    bound = math.inf
    choices = list(product((True, False), repeat=len(conv.axes)))
    counts = {rows: math.prod(a.terms if row else a.readers for a, row in zip(conv.axes, rows)) for rows in choices}
    for rows in sorted(counts, key=lambda rows: (_unfolded_side(blocks, rows), counts[rows])):
        side = _unfolded_side(blocks, rows)
        if side * blocks.numel() > _BOUND_WORK[bound < math.inf] or (bound < math.inf and side > 512):
            break
        bound = min(bound, counts[rows] ** 0.5 * _unfolded_norm(blocks, rows) * (1 + 10 * torch.finfo(blocks.dtype).eps))
    frobenius = torch.linalg.vector_norm(blocks.double().flatten(1), dim=1).max()
    return min(bound, min(counts.values()) ** 0.5 * float(frobenius))


def ring_bound(conv: Convolution) -> float:
    """Upper bound on a zero-padded convolution: the norm on the least ring that holds the padded input; ours.

    The zero-padded operator is a compression of the one on the ring. Tighter than `overlap_bound` on all but tiny images (about 1 + 5 / d^2
    times the norm for 3x3), at the price of a Fourier value.

    Raises:
        UsageError: for another padding mode.

    >>> round(ring_bound(convolution(torch.tensor([[[1.0, 2.0, 1.0]]]), 8, padding=1)), 6)
    4.0
    """
    if any((axis.source < 0).sum() + axis.size != len(axis.source) for axis in conv.axes):
        raise UsageError("the ring bound needs zero padding; use overlap_bound.")
    sizes = [-(-len(axis.source) // axis.stride) * axis.stride for axis in conv.axes]
    stride, dilation = [a.stride for a in conv.axes], [a.dilation for a in conv.axes]
    weight, groups = conv.weight.double(), conv.groups
    ring = convolution(weight, sizes, stride=stride, padding="same", dilation=dilation, groups=groups, padding_mode="circular")
    return largest_singular_value(ring.fourier_blocks())


def max_pool_constant(kernel: Sizes, stride: Sizes, axes: int = 2) -> float:
    """The l2 Lipschitz constant of max pooling (ours): the square root of the most windows that share a cell, prod_axis ceil(k / s).

    Raises:
        UsageError: for a size that is not positive, or another number of sizes than axes.

    >>> max_pool_constant(2, 2), max_pool_constant(3, 2)
    (1.0, 2.0)
    """
    return math.prod(-(-k // s) for k, s in zip(per_axis("kernel", kernel, axes), per_axis("stride", stride, axes))) ** 0.5


def _choose(conv: Convolution) -> str:
    groups, rows, columns = conv.groups, conv.weight.shape[0] // conv.groups, conv.weight.shape[1]
    taps, inputs, outputs = (math.prod(sides) for sides in (conv.weight.shape[2:], conv.input_shape[1:], conv.output_shape[1:]))
    disjoint, periodic = all(axis.disjoint for axis in conv.axes), all(axis.periodic for axis in conv.axes)
    if disjoint and groups * _gram_work(rows, columns * taps) <= _WORK["patches"]:
        return "patches"
    # patches are periodic too, but their blocks would be the same weight in complex numbers, once per frequency
    if periodic and not disjoint and groups * outputs * _gram_work(rows, columns * inputs // outputs) <= _WORK["fourier"]:
        return "fourier"
    if groups * _gram_work(rows * outputs, columns * inputs) <= _WORK["dense"]:
        return "dense"
    return "power"


def _gram_work(rows: int, columns: int) -> float:
    return min(rows, columns) ** 2 * max(rows, columns) if min(rows, columns) <= EXACT_EIGENVALUES else math.inf


def _transposed_output(
    weight: Tensor, size: Sizes, stride: Sizes, padding: Padding, dilation: Sizes, output_padding: Sizes
) -> tuple[int, ...]:
    n = weight.dim() - 2
    paddings = (padding,) * n if isinstance(padding, int) else tuple(padding)
    if isinstance(padding, str) or not all(isinstance(p, int) for p in paddings):
        raise UsageError(f"padding of a transposed convolution must be one number or one for each axis; got {padding!r}.")
    extra = (output_padding,) * n if isinstance(output_padding, int) else tuple(output_padding)
    sides, strides = per_axis("input_size", size, n), per_axis("stride", stride, n)
    dilations = per_axis("dilation", dilation, n)
    per_side = zip(sides, strides, dilations, weight.shape[2:], extra, paddings)
    return tuple((d - 1) * s - 2 * p + e * (k - 1) + 1 + o for d, s, e, k, o, p in per_side)


def _iterated(conv: Convolution, tolerance: float, max_steps: int, bounded: bool) -> OperatorNorm:
    # with channels stored last images convolve faster, and a norm does not mind the order; of one channel torch gives garbage
    images = conv.groups == 1 and len(conv.axes) == 2 and conv.weight.shape[1] > 1
    if images:
        conv = replace(conv, weight=conv.weight.to(memory_format=torch.channels_last))
    wide = math.prod(conv.input_shape) > math.prod(conv.output_shape)  # iterate on the smaller side
    shape = conv.output_shape if wide else conv.input_shape
    first, second = (conv.adjoint, conv.forward) if wide else (conv.forward, conv.adjoint)
    if math.prod(conv.output_shape[1:]) * math.prod(conv.input_shape[1:]) <= 4 * math.prod(conv.weight.shape[2:]):
        matrix = conv.matrix()  # the explicit matrix is hardly larger than the weight, and one product with it is faster than a convolution
        matrix = matrix if wide else matrix.mT
        apply = lambda v: (matrix @ (matrix.mT @ v[..., None]))[..., 0]  # noqa: E731
    elif images:
        channels, *sides = shape
        apply = lambda v: second(first(v.reshape(1, *sides, channels).movedim(-1, 1))).movedim(1, -1).reshape(1, -1)  # noqa: E731
    else:
        apply = lambda v: second(first(v.reshape(1, *shape))).reshape(conv.groups, -1)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(conv.groups, math.prod(shape) // conv.groups, generator=generator, dtype=torch.float64)
    least = min(_SMALL_STEPS, max_steps) if start.numel() <= _SMALL else 8
    values, _, steps, converged = leading_eigenvalue(
        apply, start.to(conv.weight), tolerance=2 * tolerance, max_steps=max_steps, min_steps=least
    )
    value = root(values.max())
    upper = max(value, overlap_bound(conv)) if bounded else math.inf
    return OperatorNorm(value=value, lower=value, upper=upper, method="power", converged=converged, steps=steps)


def _unfolded_side(blocks: Tensor, rows: tuple[bool, ...]) -> int:
    _, c_out, c_in, *kernel = blocks.shape
    return min(c_out * math.prod(k for k, row in zip(kernel, rows) if row), c_in * math.prod(k for k, row in zip(kernel, rows) if not row))


def _unfolded_norm(blocks: Tensor, rows: tuple[bool, ...]) -> float:
    """The largest singular value over the groups of (groups, C_out, C_in, *kernel), each kernel axis sent to the rows or the columns."""
    to_rows, to_columns = [3 + i for i, row in enumerate(rows) if row], [3 + i for i, row in enumerate(rows) if not row]
    return largest_singular_value(blocks.permute(0, 1, *to_rows, 2, *to_columns).flatten(1, 1 + len(to_rows)).flatten(2))
