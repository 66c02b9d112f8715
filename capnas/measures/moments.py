"""Streaming centred moments of layer outputs: update, merge, covariance.

Written as count, mean and centred scatter, which merge exactly (Chan, Golub and LeVeque, 1979), so that batches, workers and
resumed runs agree. Products are taken in the samples' own precision around a shift close to the mean and summed in float64:
a float32 mean-of-squares loses every digit once the mean is large beside the spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from capnas.errors import UsageError

_PANEL = 64  # features whose products are taken at once
_RECENT = 2**17  # rows after which products are added to the float64 sums
_ORDINARY = 1e-9, 1e9  # sizes whose squares single precision holds with room to spare
_MERGED = 16  # spacings of float64 that equal rows may seem to vary by once batches are merged


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and centred scatter of rows seen so far.

    Attributes:
        count: number of rows.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of outer products of rows minus their mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Moments of no rows at all, the neutral element of `merge`."""
        return cls(count=0, mean=torch.zeros(width, dtype=torch.float64), scatter=torch.zeros(width, width, dtype=torch.float64))

    @property
    def width(self) -> int:
        """Number of features D."""
        return self.mean.shape[0]

    def to(self, device: str | torch.device) -> Moments:
        """The same moments on another device."""
        return Moments(count=self.count, mean=self.mean.to(device), scatter=self.scatter.to(device))


def moments_of(samples: Tensor, shift: Tensor | None = None) -> Moments:
    """Moments of one batch of rows.

    Args:
        samples: (S, D), any floating type; half precision is raised to float32 before the product.
        shift: (D,) a point near the mean, subtracted before the product; the batch's own mean when absent.

    Returns:
        Moments in float64 on the samples' device. Non-finite samples give non-finite moments, never an exception. A feature that varies by
        less than the spacing of the numbers that are summed, float32 or float64, at its mean has no scatter: that is rounding.

    Raises:
        UsageError: samples that are not rows (S, D) of floating-point numbers.

    >>> m = moments_of(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> m.count, m.mean.tolist(), m.scatter.tolist()
    (2, [1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    _check_rows(samples)
    rows = samples.float() if samples.dtype in (torch.float16, torch.bfloat16) else samples
    if shift is None:
        shift = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
    centred = rows - shift.to(rows.dtype)
    scale = _scale_of(centred)
    scaled = centred if scale == 1 else centred * scale
    products = (scaled.T @ scaled).double() / scale**2
    found = from_shifted_sums(len(rows), shift.double(), centred.sum(0, dtype=torch.float64), products)
    return _less_rounding(found, torch.finfo(rows.dtype).eps)


def from_shifted_sums(count: int, shift: Tensor, total: Tensor, products: Tensor) -> Moments:
    """Moments from sums taken around a fixed shift.

    Args:
        count: number of rows n.
        shift: (D,) the point c that was subtracted from every row.
        total: (D,) the sum of (x - c).
        products: (D, D) the sum of (x - c)(x - c)^T.

    >>> from_shifted_sums(2, torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([[4.0]])).scatter.tolist()
    [[2.0]]
    """
    offset = total.double() / max(count, 1)
    scatter = torch.addr(products.double(), offset, offset, alpha=-count)
    return Moments(count=count, mean=shift.double() + offset, scatter=scatter)


class Scratch:
    """Memory that layers after one another copy their rows into, and a vector of ones to sum them with."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, kind: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`count` numbers, ones when first asked for; the memory of one kind is shared."""
        held = self._held.get((kind, dtype, device))
        if held is None or len(held) < count:
            held = self._held[kind, dtype, device] = torch.ones(count, dtype=dtype, device=device)
        return held[:count]


class Sums:
    """Shifted sums of batches of rows (D, S), updated in place: products in the rows' own precision, totals in float64.

    Rows that are fewer than the features are kept as they are, since samples are then the cheaper side; they take less than the sums would.

    Args:
        width: D, the number of features.
        scratch: memory to share with other layers.

    >>> sums = Sums(6)
    >>> sums.add(torch.arange(6.0)[:, None], seen=1)
    >>> sums.add(torch.ones(6, 1), seen=1)
    >>> mean, spread = sums.mean_and_spread()
    >>> spread.shape, (spread @ spread.T).trace().item()
    (torch.Size([6, 2]), 15.5)
    """

    def __init__(self, width: int, scratch: Scratch | None = None) -> None:
        self.width, self.count, self.seen, self.calls = width, 0, 0, 0
        self.kept: list[Tensor] = []
        self.shift: Tensor | None = None
        self._scratch = Scratch() if scratch is None else scratch
        self._rows = 0  # since the recent sums, in the rows' own precision, went into those in float64
        self._recent: tuple[Tensor, Tensor] | None = None  # total and products
        self._sums: tuple[Tensor, Tensor] | None = None
        self._views: dict[torch.Size, tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]] = {}

    def add(self, rows: Tensor, seen: int) -> None:
        """Take in rows (D, ...), of any strides and always as many axes; they are copied."""
        self.seen, self.calls, self.count = self.seen + seen, self.calls + 1, self.count + rows.numel() // self.width
        if self.shift is None:
            precise = torch.promote_types(rows.dtype, torch.float32)
            self.shift = rows.mean(tuple(range(1, rows.dim())), keepdim=True, dtype=precise)
        if self.count < self.width:  # never as many as features, so that the shape tells rows from a scatter
            self.kept.append((rows - self.shift).reshape(self.width, -1))
            return
        kept, self.kept = self.kept, []
        for part in kept:
            self._take(part, torch.zeros_like(part[:, :1]))
        self._take(rows, self.shift)

    def _take(self, rows: Tensor, shift: Tensor) -> None:
        if self._recent is None:
            self._recent = shift.new_zeros(self.width), shift.new_zeros(self.width, self.width)
        copy, flat, ones, panels = self._views.get(rows.shape) or self._views.setdefault(rows.shape, self._views_for(rows, shift.dtype))
        torch.sub(rows, shift, out=copy)
        self._recent[0].addmv_(flat, ones)
        for products, some, rest in panels:
            products.addmm_(some, rest)
        self._rows += flat.shape[1]
        if self._rows >= _RECENT:
            self._fold()

    def _views_for(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Memory for rows of this shape, the same as (D, S), S ones, and operands of the products, of which the upper half is enough.

        Made once: in a training step a handful of views costs what the products of a narrow layer cost.
        """
        copy = self._scratch.get("rows", like.numel(), dtype, like.device).view(like.shape)
        flat = copy.view(self.width, -1)
        ends = [slice(i, i + _PANEL) for i in range(0, self.width, _PANEL)]
        panels = [(self._recent[1][end, end.start :], flat[end], flat[end.start :].T) for end in ends]  # type: ignore[index]
        return copy, flat, self._scratch.get("ones", flat.shape[1], dtype, like.device), panels

    def _fold(self) -> None:
        """Add the recent sums to those in float64."""
        if self._recent is None or not self._rows:
            return
        if self._sums is None:
            self._sums = self._recent[0].to(torch.float64, copy=True), self._recent[1].to(torch.float64, copy=True)
        else:
            for whole, part in zip(self._sums, self._recent):
                whole.add_(part)
        for part in self._recent:
            part.zero_()
        self._rows = 0

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) of all rows, and (D, D) their scatter around it, or (D, S) the centred rows where they are few; all in float64."""
        shift = self.shift.reshape(-1)  # type: ignore[union-attr]
        if self.kept:
            rows, shift = torch.cat(self.kept, 1).double(), shift.double()
            offset = rows.mean(1, keepdim=True)
            return shift + offset[:, 0], rows - offset
        self._fold()
        total, upper = self._sums  # type: ignore[misc]
        moments = from_shifted_sums(self.count, shift, total, upper.triu() + upper.triu(1).T)
        return moments.mean, moments.scatter


def update(moments: Moments, samples: Tensor) -> Moments:
    """Moments after a further batch of rows, (S, D).

    Raises:
        UsageError: samples that are not rows of floating-point numbers, or of another width than the moments.

    >>> m = update(Moments.empty(1), torch.tensor([[1.0], [3.0]]))
    >>> update(m, torch.tensor([[5.0]])).mean.tolist()
    [3.0]
    """
    _check_rows(samples)
    if samples.shape[1] != moments.width:
        raise UsageError(f"samples must have {moments.width} features as the moments have, got {samples.shape[1]}.")
    return _less_rounding(merge(moments, moments_of(samples)), torch.finfo(torch.promote_types(samples.dtype, torch.float32)).eps)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of rows; associative and commutative up to rounding.

    Raises:
        UsageError: moments of different widths.

    >>> one, two = moments_of(torch.tensor([[1.0]])), moments_of(torch.tensor([[3.0]]))
    >>> merge(one, two).scatter.tolist()
    [[2.0]]
    """
    if a.width != b.width:
        raise UsageError(f"moments to merge must have one width, got {a.width} and {b.width}.")
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = a.count + b.count
    b = b.to(a.mean.device)
    gap = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(gap, gap) * (a.count * b.count / count)
    return Moments(count=count, mean=a.mean + gap * (b.count / count), scatter=scatter)


def covariance(moments: Moments) -> Tensor:
    """The covariance matrix (D, D) in float64, divided by n as in Shenk et al., arXiv 2006.08679 (not by n - 1).

    Of a feature whose spread is within the rounding of its mean in float64 it is 0, so that constant outputs have none at any scale.

    >>> covariance(moments_of(torch.tensor([[0.0], [2.0]]))).tolist()
    [[1.0]]
    >>> covariance(update(moments_of(torch.full((3, 1), 1e20)), torch.full((7, 1), 1e20))).tolist()
    [[0.0]]
    """
    return _less_rounding(moments, _MERGED * torch.finfo(torch.float64).eps).scatter / max(moments.count, 1)


def _less_rounding(moments: Moments, spacing: float) -> Moments:
    """Moments without the scatter of features whose standard deviation is below a spacing, relative to their mean."""
    still = moments.scatter.diagonal() < moments.count * (moments.mean * spacing).square()
    return replace(moments, scatter=moments.scatter.masked_fill(still[:, None] | still, 0.0)) if bool(still.any()) else moments


def _scale_of(centred: Tensor) -> float:
    """A power of two that brings numbers, whose squares would overflow or vanish in single precision, near 1; else 1."""
    size = float(centred.abs().amax()) if centred.numel() else 0.0
    if _ORDINARY[0] < size < _ORDINARY[1] or size == 0 or not math.isfinite(size):
        return 1.0
    return 2.0 ** max(-100, min(100, -round(math.log2(size))))


def _check_rows(samples: Tensor) -> None:
    if samples.dim() != 2:
        raise UsageError(f"samples must be rows of features, shape (S, D), got shape {tuple(samples.shape)}.")
    if not samples.is_floating_point():
        raise UsageError(f"samples must be floating-point numbers, got {samples.dtype}; pass samples.float().")
