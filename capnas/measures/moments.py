"""Streaming centred moments of layer outputs: update, merge, covariance.

Written as count, mean and centred scatter, which merge exactly (Chan, Golub and LeVeque, 1979), so that batches, workers and
resumed runs agree. Products are taken in the samples' own precision around a shift close to the mean and summed in float64:
a float32 mean-of-squares loses every digit once the mean is large beside the spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        Moments in float64 on the samples' device. Non-finite samples give non-finite moments, never an exception.

    Raises:
        ValueError: samples that are not rows (S, D).

    >>> m = moments_of(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    >>> m.count, m.mean.tolist(), m.scatter.tolist()
    (2, [1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """
    _check_rows(samples)
    rows = samples.float() if samples.dtype in (torch.float16, torch.bfloat16) else samples
    if shift is None:
        shift = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
    centred = rows - shift.to(rows.dtype)
    return from_shifted_sums(len(rows), shift.double(), centred.sum(0, dtype=torch.float64), (centred.T @ centred).double())


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


class Sums:
    """Shifted sums of batches of rows (D, S), updated in place: float32 products, float64 totals.

    Rows that are fewer than the features are kept as they are, since samples are then the cheaper side; they take less than the sums would.

    >>> sums = Sums(6)
    >>> sums.add(torch.arange(6.0)[:, None], seen=1)
    >>> sums.add(torch.ones(6, 1), seen=1)
    >>> mean, spread = sums.mean_and_spread()
    >>> spread.shape, (spread @ spread.T).trace().item()
    (torch.Size([6, 2]), 15.5)
    """

    def __init__(self, width: int) -> None:
        self.width, self.count, self.seen, self.calls = width, 0, 0, 0
        self.kept: list[Tensor] = []
        self.shift: Tensor | None = None
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, rows: Tensor, seen: int) -> None:
        """Take in rows (D, S), a fresh copy that may be overwritten."""
        self.seen, self.calls, self.count = self.seen + seen, self.calls + 1, self.count + rows.shape[1]
        if self.shift is None:
            self.shift = rows.mean(1, keepdim=True)
        self.kept.append(rows.sub_(self.shift))
        if self.count >= self.width:  # never as many as features, so that the shape tells rows from a scatter
            self.fold()

    def fold(self) -> None:
        """Add the kept rows to the sums."""
        for rows in self.kept:
            double = torch.float64 if rows.device.type != "mps" else torch.float32
            total, products = rows.sum(1), rows @ rows.T
            self.total = total.to(double) if self.total is None else self.total.add_(total)
            self.products = products.to(double) if self.products is None else self.products.add_(products)
        self.kept.clear()

    def mean_and_spread(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) of all rows, and (D, D) their scatter around it, or (D, S) the centred rows where they are few; all in float64."""
        if self.kept:
            rows, shift = torch.cat(self.kept, 1).double(), self.shift.double()  # type: ignore[union-attr]
            offset = rows.mean(1, keepdim=True)
            return (shift + offset)[:, 0], rows - offset
        moments = from_shifted_sums(self.count, self.shift[:, 0], self.total, self.products)  # type: ignore[index, arg-type]
        return moments.mean, moments.scatter


def update(moments: Moments, samples: Tensor) -> Moments:
    """Moments after a further batch of rows, (S, D).

    Raises:
        ValueError: samples that are not rows, or of another width than the moments.

    >>> m = update(Moments.empty(1), torch.tensor([[1.0], [3.0]]))
    >>> update(m, torch.tensor([[5.0]])).mean.tolist()
    [3.0]
    """
    _check_rows(samples)
    if samples.shape[1] != moments.width:
        raise ValueError(f"samples must have {moments.width} features as the moments have, got {samples.shape[1]}.")
    return merge(moments, moments_of(samples))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets of rows; associative and commutative up to rounding.

    Raises:
        ValueError: moments of different widths.

    >>> one, two = moments_of(torch.tensor([[1.0]])), moments_of(torch.tensor([[3.0]]))
    >>> merge(one, two).scatter.tolist()
    [[2.0]]
    """
    if a.width != b.width:
        raise ValueError(f"moments to merge must have one width, got {a.width} and {b.width}.")
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = a.count + b.count
    b = b.to(a.mean.device)
    gap = b.mean - a.mean
    scatter = a.scatter + b.scatter + torch.outer(gap, gap) * (a.count * b.count / count)
    return Moments(count=count, mean=a.mean + gap * (b.count / count), scatter=scatter)


def covariance(moments: Moments) -> Tensor:
    """The covariance matrix (D, D) in float64, divided by n as in Shenk et al., arXiv 2006.08679 (not by n - 1).

    >>> covariance(moments_of(torch.tensor([[0.0], [2.0]]))).tolist()
    [[1.0]]
    """
    return moments.scatter / max(moments.count, 1)


def _check_rows(samples: Tensor) -> None:
    if samples.dim() != 2:
        raise ValueError(f"samples must be rows of features, shape (S, D), got shape {tuple(samples.shape)}.")
