"""The Markov rule through the operations of real networks: capacity on an operation's output becomes capacity on its inputs.

Every rule has one shape (equation 38 of our specification, after arXiv 1902.08572): with ``s`` the second moments of the inputs on a batch
and ``op_sq`` the operation with squared coefficients, ``k_in = s * op_sq^T (k_out / (op_sq(s) + b^2))``. The sum of capacity is conserved;
what the bias carries is returned beside it. Maps have no batch axis: ``(C, H, W)`` for images, ``(N, C)`` for tokens.

The papers treat one-dimensional stacks; the extension to strides, groups, pooling, attention and branches is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from capnas.errors import UsageError

SquaredOp = Callable[..., Tensor]


def push(
    capacity: Tensor, second_moments: Sequence[Tensor], op_sq: SquaredOp, bias_sq: Tensor | float = 0.0
) -> tuple[tuple[Tensor, ...], float]:
    """Capacity on the output of one operation to capacity on each of its inputs (38): ours, after Donier.

    Args:
        capacity: ``k_out``, of the shape of the output map, (C, H, W) or (N, C) or any other.
        second_moments: ``E x^2`` of each input, of the input's shape, non-negative.
        op_sq: linear non-negative map from the input second moments to that of the output: one of the builders here, or any function.
        bias_sq: squared bias, broadcastable to the output.

    Returns:
        ``k_in`` per input, in the input's shape and precision, and the capacity kept by the bias (and by outputs that no input reaches).
        The input sums and the bias add up to ``capacity.sum()``.

    Raises:
        UsageError: when ``op_sq`` does not give the shape of ``capacity``.

    Example:
        A residual addition splits by second moments.

        >>> (stream, branch), bias = push(torch.tensor([4.0]), [torch.tensor([3.0]), torch.tensor([1.0])], lambda s, b: s + b)
        >>> stream.item(), branch.item(), bias
        (3.0, 1.0, 0.0)
    """
    inputs = [moment.detach().requires_grad_() for moment in second_moments]
    with torch.enable_grad():
        raw = op_sq(*inputs)
        if raw.shape != capacity.shape:
            raise UsageError(f"capacity must have the output's shape {tuple(raw.shape)}, got {tuple(capacity.shape)}.")
        total = raw.detach() + bias_sq
        rate = torch.where(total > 0, capacity.to(raw.dtype) / total.clamp_min(torch.finfo(raw.dtype).tiny), 0.0)
        slopes = torch.autograd.grad(raw, inputs, rate, allow_unused=True)
    shares = tuple(torch.zeros_like(moment) if slope is None else moment.detach() * slope for moment, slope in zip(inputs, slopes))
    left = float(capacity.double().sum()) - sum(float(share.double().sum()) for share in shares)
    return shares, left


def push_ports(
    capacity: Mapping[int, Tensor], second_moments: Sequence[Tensor], op_sq: Callable[..., Any]
) -> tuple[tuple[Tensor, ...], float]:
    """`push` through an operation with several outputs, of which some carry capacity. Ours.

    Args:
        capacity: ``k_out`` by the number of the output.
        second_moments: as for `push`.
        op_sq: gives one tensor, or a sequence of them.

    Returns:
        As `push`, the shares of all outputs added up.

    Raises:
        UsageError: when an output has another shape than its capacity.

    Example:
        >>> (share,), bias = push_ports({1: torch.tensor([5.0])}, [torch.ones(3)], lambda s: s.split([2, 1]))
        >>> share.tolist(), bias
        ([0.0, 0.0, 5.0], 0.0)
    """
    shares, left = [torch.zeros_like(moment) for moment in second_moments], 0.0
    for port, k in capacity.items():

        def one(*s: Tensor, port: int = port) -> Tensor:
            out = op_sq(*s)
            return out if isinstance(out, Tensor) else out[port]

        found, lost = push(k, second_moments, one)
        shares = [share + part for share, part in zip(shares, found)]
        left += lost
    return tuple(shares), left


def conv_squared(weight: Tensor, **options: Any) -> SquaredOp:
    """Convolution in one or two dimensions with squared kernels; options ``stride``, ``padding``, ``dilation``, ``groups`` as in torch.

    Ours, of (38). Of a weight (C_out, C_in / groups, *kernel) the map from (C_in, *sides) to (C_out, *sides'), in float64.

    Raises:
        UsageError: for a weight without one or two kernel axes.

    >>> op = conv_squared(torch.full((1, 1, 2), 3.0), stride=2)
    >>> op(torch.ones(1, 4)).tolist()
    [[18.0, 18.0]]
    """
    kernel = weight.detach().double().square()
    apply = {3: F.conv1d, 4: F.conv2d}.get(kernel.ndim)
    if apply is None:
        raise UsageError(f"weight must have 3 or 4 axes (out, in, *kernel), got shape {tuple(weight.shape)}.")
    return lambda s: apply(s.to(torch.float64).unsqueeze(0), kernel, **options)[0]


def linear_squared(weight: Tensor) -> SquaredOp:
    """Linear layer on the last axis: ``s @ (W^2)^T``, for a weight (out, in) the map from (..., in) to (..., out) in float64. Ours (38).

    >>> linear_squared(torch.tensor([[1.0, 2.0]]))(torch.ones(3, 2)).tolist()
    [[5.0], [5.0], [5.0]]
    """
    kernel = weight.detach().double().square()
    return lambda s: F.linear(s.to(torch.float64), kernel)


def average_pool_squared(kernel: int | tuple[int, int], **options: Any) -> SquaredOp:
    """Average pooling of ``(C, H, W)``: squared taps ``1 / a^2`` (ours, 38); options as ``torch.nn.functional.avg_pool2d``.

    >>> average_pool_squared(2)(torch.ones(1, 2, 2)).item()
    0.25
    """
    area = kernel**2 if isinstance(kernel, int) else kernel[0] * kernel[1]

    def apply(s: Tensor) -> Tensor:
        # one kernel area for every window: at padded borders the taps weigh less, which the row normalisation of push undoes
        return F.avg_pool2d(s.unsqueeze(0), kernel, **options)[0] / area

    return apply


def interpolation_squared(op: Callable[[Tensor], Tensor], shape: Sequence[int]) -> SquaredOp:
    """Interpolation of the last axes, each on its own: squared coefficients of a linear, cubic or antialiased resize. Ours (38).

    Args:
        op: the interpolation, from (1, any channels, *sides) to (1, the same channels, *sides'); one number everywhere stays that number.
        shape: (B, C, *sides) of its input.

    Returns:
        A map from (B, C, *sides) to (B, C, *sides'), in the precision of what it is given.

    Example:
        >>> double = lambda x: F.interpolate(x, scale_factor=2, mode="linear", align_corners=False)
        >>> interpolation_squared(double, (1, 1, 2))(torch.tensor([[[1.0, 0.0]]])).tolist()
        [[[1.0, 0.5625, 0.0625, 0.0]]]
    """
    squares: list[Tensor] = []
    for axis, side in enumerate(shape[2:], start=2):
        cells = torch.eye(side).view(1, side, *(side if i == axis else 1 for i in range(2, len(shape)))).expand(1, side, *shape[2:])
        rows = op(cells.contiguous()).movedim(axis, 2)  # alike along the other axes
        squares.append(rows.reshape(side, rows.shape[2], -1)[..., 0].square())  # (side, side')

    def apply(s: Tensor) -> Tensor:
        for axis, square in enumerate(squares, start=2):
            s = (s.movedim(axis, -1) @ square.to(s)).movedim(-1, axis)
        return s

    return apply


def global_mean_squared(axes: tuple[int, ...] = (-2, -1)) -> SquaredOp:
    """Mean over whole axes: each tap weighs ``1 / n^2``. Ours (38).

    >>> global_mean_squared()(torch.ones(3, 2, 2)).tolist()
    [0.25, 0.25, 0.25]
    """

    def apply(s: Tensor) -> Tensor:
        count = 1
        for axis in axes:
            count *= s.shape[axis]
        return s.mean(axes) / count

    return apply


def scale_squared(gain: Tensor) -> SquaredOp:
    """Element-wise scaling ``gain * x`` with ``gain`` broadcastable to the map: normalisation layers, layer scale, gates (use E gain^2).

    The rule is the identity unless a bias takes its part: the gain cancels in the normalisation. Exact for batch norm
    in evaluation mode; for gates and layer norms, which depend on their input, an approximation of ours.

    >>> scale_squared(torch.tensor([2.0, 3.0]))(torch.ones(2)).tolist()
    [4.0, 9.0]
    """
    squared = gain.detach().double().square()
    return lambda s: squared * s


def attention_squared(probabilities: Tensor) -> SquaredOp:
    """Value path of attention per head: ``s'_q = sum_k E[A_qk^2] s_k``; queries and keys are gates and get nothing.

    Our extension: the papers treat no attention.

    Args:
        probabilities: A (B, heads, queries, keys) on a batch.

    Returns:
        A map from value second moments (heads, keys, D) to (heads, queries, D).

    Example:
        >>> attention_squared(torch.full((1, 1, 1, 2), 0.5))(torch.ones(1, 2, 3)).tolist()
        [[[0.5, 0.5, 0.5]]]
    """
    squared = probabilities.detach().double().square().mean(0)
    return lambda s: torch.einsum("hqk,hkd->hqd", squared, s.to(torch.float64))


def push_max_pool(capacity: Tensor, indices: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Max pooling: each output hands its capacity to the inputs it selected, by how often (38).

    Our extension: the papers treat no pooling.

    Args:
        capacity: (C, H', W'), or with any other number of pooled axes.
        indices: (B, C, H', W') from ``max_pool2d(..., return_indices=True)``, flat positions in H * W.
        input_shape: (C, H, W).

    Returns:
        (C, H, W) float64, with the sum of ``capacity``.

    Example:
        >>> values = torch.tensor([[[[1.0, 5.0], [0.0, 2.0]]]])
        >>> _, where = torch.nn.functional.max_pool2d(values, 2, return_indices=True)
        >>> push_max_pool(torch.ones(1, 1, 1), where, (1, 2, 2)).tolist()
        [[[0.0, 1.0], [0.0, 0.0]]]
    """
    channels, *sides = input_shape
    flat = indices.flatten(2).permute(1, 0, 2).flatten(1)  # (C, B * H' * W')
    share = (capacity.double().flatten(1) / len(indices)).repeat(1, len(indices))
    return torch.zeros(channels, math.prod(sides), dtype=torch.float64).scatter_add_(1, flat, share).view(channels, *sides)


def push_maximum(capacity: Tensor, chosen: Tensor, axes: int | Sequence[int]) -> Tensor:
    """Maximum or minimum along whole axes: each output hands its capacity to the entries it selected, by how often (38).

    Our extension: the papers treat no pooling.

    Args:
        capacity: the shape of ``chosen`` without the axes, or with one entry along them.
        chosen: share of the samples in which each entry is the one selected; sums to one over the axes.
        axes: along which is selected.

    Returns:
        The shape of ``chosen``, with the sum of ``capacity``.

    Example:
        >>> push_maximum(torch.tensor([4.0, 8.0]), torch.tensor([[0.25, 0.75], [0.0, 1.0]]), -1).tolist()
        [[1.0, 3.0], [0.0, 8.0]]
    """
    return one_along(capacity, chosen.shape, axes) * chosen


def one_along(values: Tensor, shape: Sequence[int], axes: int | Sequence[int]) -> Tensor:
    """What a reduction of a tensor of this shape along whole axes gave, with one entry along each of them. Ours (38).

    >>> one_along(torch.ones(2, 4), (2, 3, 4), -2).shape
    torch.Size([2, 1, 4])
    """
    reduced = {axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes)}
    return values.reshape([1 if axis in reduced else size for axis, size in enumerate(shape)])


def push_concat(capacity: Tensor, sizes: Sequence[int], axis: int = 0) -> tuple[Tensor, ...]:
    """Concatenation: each input takes its own slice back (ours, 38), of ``sizes`` along ``axis`` of a map (C, H, W) or (N, C), in float64.

    >>> [part.tolist() for part in push_concat(torch.tensor([1.0, 2.0, 3.0]), [1, 2])]
    [[1.0], [2.0, 3.0]]
    """
    return capacity.double().split(list(sizes), dim=axis)


def inject(
    layer_capacity: float, weight: Tensor, response: Tensor, second_moment: Tensor, op: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Where on its input map the capacity of one layer's parameters sits (39): each parameter's unit spread over the positions it reads.

    Ours. The capacity is split evenly over the weights. A weight without a signal (zero gradient or zero input everywhere) has no place;
    its part is spread over the other weights, so that the sum is conserved.

    Args:
        layer_capacity: c_l.
        weight: the layer's weight, only its shape matters.
        response: b, ``E sum_o (d f_o / d z)^2`` on the output map.
        second_moment: s, ``E x^2`` on the input map.
        op: ``op(s, w)`` the layer without bias, linear in both (the squares are not taken: the weights enter as tangents).

    Returns:
        Capacity on the input map, in its precision, sum ``layer_capacity`` (zeros when nothing passes through the layer at all).

    Example:
        >>> inject(2.0, torch.zeros(1, 2), torch.ones(1), torch.tensor([1.0, 1.0]), torch.nn.functional.linear).tolist()
        [1.0, 1.0]
    """
    moment = second_moment.detach().requires_grad_()
    b = response.detach().to(moment.dtype)
    tangent = torch.zeros_like(weight, dtype=moment.dtype).requires_grad_()
    with torch.enable_grad():
        (evidence,) = torch.autograd.grad((b * op(moment.detach(), tangent)).sum(), tangent)
        placed = evidence > 0
        if not bool(placed.any()):
            return torch.zeros_like(moment)
        per_weight = layer_capacity / float(placed.sum())
        rate = torch.where(placed, per_weight / evidence.clamp_min(torch.finfo(moment.dtype).tiny), 0.0)
        (slope,) = torch.autograd.grad((b * op(moment, rate)).sum(), moment)
    return moment.detach() * slope
