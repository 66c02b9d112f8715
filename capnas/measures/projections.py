"""Projections onto the constraint sets of excess capacity: distance ball, Lipschitz ball, kernel support, and their intersection.

After Graf, Zeng, Rieck, Niethammer, Kwitt (NeurIPS 2022), as their published training code does it: Dykstra's algorithm on kernels embedded
in the grid of the image. Ours are the exact threshold by sorting, groups and dilation, and the final step that makes the constraints hold
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from capnas.errors import UsageError
from capnas.measures.convolution import Sizes, per_axis
from capnas.measures.excess import distance_to_init, group_norm_21

_CHORDS = 20
_GIVEN_AWAY = 1e-6  # share of a constraint that the final step may leave unused


def project_group_ball(delta: Tensor, radius: float) -> Tensor:
    """The nearest point with (2,1) group norm at most `radius` (Graf et al.): all groups shrink by one threshold, found by sorting (ours).

    Args:
        delta: (C_out, C_in / groups, *kernel) or (out, in); groups run along axis 1.
        radius: not negative.

    Raises:
        UsageError: for a negative radius.

    >>> project_group_ball(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 3.0)
    tensor([[1.8000, 2.4000],
            [0.0000, 0.0000]])
    """
    _check_radius("radius", radius)
    norms = torch.linalg.vector_norm(delta, dim=1, keepdim=True, dtype=torch.float64)  # in less, many groups or large ones are off
    if float(norms.sum()) <= radius:
        return delta
    ordered = norms.flatten().sort(descending=True).values
    thresholds = (ordered.cumsum(0) - radius) / torch.arange(1, len(ordered) + 1, device=delta.device, dtype=torch.float64)
    active = int((ordered > thresholds).sum().clamp_min(1))
    shrunk = (norms - thresholds[active - 1]).clamp_min(0)
    return delta * torch.where(norms > 0, shrunk / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0).to(delta.dtype)


def project_distance(weight: Tensor, init: Tensor, radius: float) -> Tensor:
    """The nearest weight within (2,1) distance `radius` of `init` (Graf et al.); shapes as for `project_group_ball`.

    Raises:
        UsageError: for a negative radius.

    >>> project_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.25)
    tensor([[1.2500, 0.0000]])
    """
    return init + project_group_ball(weight - init, radius)


def project_lipschitz(kernel: Tensor, radius: float, *, groups: int = 1) -> Tensor:
    """The nearest kernel on a periodic grid whose stride-1 circular convolution has norm at most `radius` (Graf et al., 2022).

    The singular values are clipped, frequency by frequency.

    Args:
        kernel: (C_out, C_in / groups, *grid), see `embed`; or (out, in), a matrix.
        radius: not negative.
        groups: channel groups, clipped on their own.

    Returns:
        The kernel on the full grid: in general its support is no longer that of a small kernel.

    Raises:
        UsageError: for a negative radius.

    >>> project_lipschitz(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 2.0)
    tensor([[2., 0.],
            [0., 1.]])
    """
    _check_radius("radius", radius)
    blocks = kernel.unflatten(0, (groups, -1))
    axes = tuple(range(3, blocks.dim()))
    spectrum = (torch.fft.fftn(blocks, dim=axes) if axes else blocks).movedim((1, 2), (-2, -1))
    u, values, v = torch.linalg.svd(spectrum, full_matrices=False)
    if float(values.max()) <= radius:
        return kernel
    clipped = ((u * values.clamp_max(radius)[..., None, :].to(u.dtype)) @ v).movedim((-2, -1), (1, 2))
    return (torch.fft.ifftn(clipped, dim=axes).real if axes else clipped).flatten(0, 1)


def embed(weight: Tensor, grid: Sizes, *, dilation: Sizes = 1) -> Tensor:
    """The kernel with its taps at the corner of a grid of zeros (C_out, C_in / groups, *grid), as Graf et al. do; norms stay as they are.

    Raises:
        UsageError: for a grid smaller than the dilated kernel.

    >>> embed(torch.ones(1, 1, 2), 4)
    tensor([[[1., 1., 0., 0.]]])
    """
    out = weight.new_zeros(*weight.shape[:2], *per_axis("grid", grid, weight.dim() - 2))
    out[_support(weight.shape[2:], out.shape[2:], dilation)] = weight
    return out


def crop(kernel: Tensor, taps: Sequence[int], *, dilation: Sizes = 1) -> Tensor:
    """The taps of a kernel on a grid, (C_out, C_in / groups, *taps); with `embed`, Graf et al.'s projection onto kernels of that support.

    Raises:
        UsageError: for a grid smaller than the dilated taps.

    >>> crop(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), (2,))
    tensor([[[1., 2.]]])
    """
    return kernel[_support(taps, kernel.shape[2:], dilation)]


def project(
    weight: Tensor,
    init: Tensor,
    *,
    distance: float | None = None,
    lipschitz: float | None = None,
    input_size: Sizes = (),
    dilation: Sizes = 1,
    groups: int = 1,
    sweeps: int = 15,
    norm: Callable[[Tensor], float] | None = None,
) -> Tensor:
    """Towards the nearest weight that meets both constraints, by sweeps of Dykstra's algorithm.

    Each sweep visits the distance ball, the Lipschitz ball and, for convolutions, the kernel support, with one correction per set. The
    support is last, so after finitely many sweeps the balls are met only nearly (by 3 % after the authors' 15, in the reference case). With
    `norm` a final step pulls the weight back along the line to `init` until both constraints hold as measured; this needs an `init` that
    meets them. The Lipschitz ball is that of the stride-1 circular operator on `input_size`: it bounds the strided one; for zero padding
    give the padded size, of which the layer is a compression.

    Args:
        weight: (C_out, C_in / groups, *kernel) or (out, in).
        init: the initial weight, same shape.
        distance: radius of the (2,1) ball around `init`, or None for no constraint.
        lipschitz: largest norm, or None for no constraint.
        input_size: input sides of a convolution; rounded up to a multiple that holds the kernel.
        dilation: of the convolution.
        groups: of the convolution.
        sweeps: 1 between training steps, 15 at the end, in the paper's code.
        norm: the operator norm of the layer, such as `lambda w: operator_norm(w, 32, padding=1).upper`.

    Raises:
        UsageError: for a negative radius, or an `init` outside of the constraint when `norm` is given.

    >>> moved = project(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2), distance=2.0, lipschitz=1.0, norm=lambda w: float(w.norm()))
    >>> round(float(moved.norm()), 6)
    1.0
    """
    if lipschitz is None:
        return weight if distance is None else project_distance(weight, init, distance)
    taps, limit = weight.shape[2:], lipschitz
    grid = _grid(taps, input_size, dilation)
    start, moved = (embed(t, grid, dilation=dilation) for t in (init, weight))
    sets: list[Callable[[Tensor], Tensor]] = [lambda k: project_lipschitz(k, limit, groups=groups)]
    if distance is not None:
        sets.insert(0, lambda k: project_distance(k, start, distance))
    if taps:
        sets.append(lambda k: embed(crop(k, taps, dilation=dilation), grid, dilation=dilation))
    moved = crop(_dykstra(moved, sets, sweeps), taps, dilation=dilation)
    return moved if norm is None else pull_back(moved, init, distance=distance, lipschitz=lipschitz, norm=norm)


def pull_back(
    weight: Tensor,
    init: Tensor,
    *,
    distance: float | None = None,
    lipschitz: float | None = None,
    norm: Callable[[Tensor], float],
) -> Tensor:
    """A point that meets both constraints as measured, on the line from `weight` to a point well inside of them; ours.

    It is not the nearest such point: use it after `project`, when little is missing. The inner point is `init` scaled down by half of what
    the distance allows, since an `init` that was itself scaled to the Lipschitz limit lies on the boundary. Norm and distance are convex
    along the line, so chords find the last point that holds; every point is measured before it is taken.

    Args:
        weight: (C_out, C_in / groups, *kernel) or (out, in).
        init: the initial weight, same shape.
        distance: radius of the (2,1) ball around `init`, or None for no constraint.
        lipschitz: largest norm, or None for no constraint.
        norm: the operator norm of the layer as a function of its weight.

    Raises:
        UsageError: when neither `init` nor `init` scaled down within the distance meets the Lipschitz constraint.

    >>> pull_back(torch.tensor([[4.0]]), torch.zeros(1, 1), lipschitz=1.0, norm=lambda w: float(w.abs().max())).round(decimals=4)
    tensor([[1.]])
    """

    def excess(point: Tensor) -> float:
        travelled = 0.0 if distance is None else _ratio(distance_to_init(point, init), distance)
        return travelled if lipschitz is None else max(travelled, _ratio(norm(point), lipschitz))

    at_weight = excess(weight)
    if at_weight <= 1:
        return weight
    share = 2.0 if distance is None else distance / max(group_norm_21(init), 1e-300)
    inner = next((p for p in (init * max(0.0, 1 - share / 2), init, init * max(0.0, 1 - share)) if excess(p) <= 1), None)
    if inner is None:
        reached = f"its norm is {norm(init):.6g}, lipschitz is {lipschitz}"
        raise UsageError(f"init must meet the constraint or reach it within the distance: {reached}; rescale init first.")
    step = weight - inner
    low, high, at_low, at_high = 0.0, 1.0, excess(inner), at_weight
    for _ in range(_CHORDS):
        if 1 - at_low <= _GIVEN_AWAY:
            break
        chord = low + (high - low) * (1 - at_low) / (at_high - at_low)
        for t in (chord, (chord + high) / 2):
            value = excess(inner + t * step)
            if value > 1:
                high, at_high = t, value
                break
            low, at_low = t, value
    return inner + low * step


def project_radially(
    weight: Tensor,
    init: Tensor,
    *,
    distance: float | None = None,
    lipschitz: float | None = None,
    norm: Callable[[Tensor], float] | None = None,
) -> Tensor:
    """Plain rescaling, the authors' cheap variant: the step from `init` to the distance ball, then the weight to the Lipschitz ball.

    The second step may leave the distance ball again; `pull_back` meets both.

    Args:
        weight: the weight.
        init: the initial weight, same shape.
        distance: radius of the (2,1) ball, or None.
        lipschitz: largest norm, or None.
        norm: the operator norm of the layer, needed with `lipschitz`.

    Raises:
        UsageError: for a negative radius, or `lipschitz` without `norm`.

    >>> project_radially(torch.tensor([[4.0]]), torch.tensor([[1.0]]), distance=1.5)
    tensor([[2.5000]])
    """
    if distance is not None:
        _check_radius("distance", distance)
        travelled = distance_to_init(weight, init)
        weight = init + (weight - init) * (distance / travelled) if travelled > distance else weight
    if lipschitz is not None:
        _check_radius("lipschitz", lipschitz)
        if norm is None:
            raise UsageError("lipschitz needs norm, the operator norm of the layer as a function of its weight.")
        measured = norm(weight)
        weight = weight * (lipschitz / measured) if measured > lipschitz else weight
    return weight


def _dykstra(weight: Tensor, sets: Sequence[Callable[[Tensor], Tensor]], sweeps: int) -> Tensor:
    """Sweeps of Dykstra's algorithm with one correction per set, towards the point of the intersection nearest to the weight."""
    corrections = [torch.zeros_like(weight) for _ in sets]
    for _ in range(sweeps):
        for i, nearest in enumerate(sets):
            shifted = weight + corrections[i]
            weight = nearest(shifted)
            corrections[i] = shifted - weight
    return weight


def _ratio(value: float, limit: float) -> float:
    return value / limit if limit > 0 else math.inf if value > 0 else 0.0


def _grid(taps: Sequence[int], input_size: Sizes, dilation: Sizes) -> tuple[int, ...]:
    spans = [e * (k - 1) + 1 for k, e in zip(taps, per_axis("dilation", dilation, len(taps)))]
    return tuple(-(-span // d) * d for span, d in zip(spans, per_axis("input_size", input_size, len(taps))))


def _support(taps: Sequence[int], grid: Sequence[int], dilation: Sizes) -> tuple[slice, ...]:
    steps = per_axis("dilation", dilation, len(taps))
    if len(grid) != len(taps) or any(e * (k - 1) >= d for k, e, d in zip(taps, steps, grid)):
        raise UsageError(f"the grid must hold the kernel; got grid {tuple(grid)} for {tuple(taps)} taps, {steps} apart.")
    return (slice(None), slice(None), *(slice(0, e * (k - 1) + 1, e) for k, e in zip(taps, steps)))


def _check_radius(name: str, radius: float) -> None:
    if not radius >= 0:
        raise UsageError(f"{name} must not be negative; got {radius}.")
