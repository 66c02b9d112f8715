"""How wide each group of layers shall be, for a cost in all: by equal saturation, or by the least loss per cost saved.

Both are ours. The first takes the saturation papers (Shenk et al., arXiv 2006.08679) at their word: a layer needs k of its D directions,
so the widths that fit a budget are those at which k / D comes out even. The second spends loss where it buys most.

Letters: G groups, N candidate networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capnas.errors import UsageError

CostOf = Callable[[Tensor], Tensor]  # units per group, (N, G) -> cost of each network, (N,)


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What a group may be.

    Attributes:
        now: units U.
        needed: units that its data needs, 0 to U (the intrinsic dimension, in units).
        choices: numbers of units that are allowed, ascending, the last one ``now``.
        losses: (U,) loss with n units removed, see `capnas.measures.narrowing.RemovalPath`; None where only saturation decides.
    """

    now: int
    needed: float
    choices: tuple[int, ...]
    losses: Tensor | None = None


def width_choices(units: int, per_unit: int, round_to: int) -> tuple[int, ...]:
    """Numbers of units whose channels are a multiple of ``round_to``, and the present number. Ours.

    Groups narrower than twice ``round_to`` are rounded to half of it, and so on, so that they can be narrowed at all.

    >>> width_choices(24, 1, 8), width_choices(8, 1, 8), width_choices(3, 8, 8)
    ((8, 16, 24), (4, 8), (1, 2, 3))
    """
    step = max(1, round_to)
    while step > 1 and units * per_unit < 2 * step:
        step //= 2
    allowed = [n for n in range(1, units) if (n * per_unit) % step == 0]
    return (*allowed, units)


def needed_widths(groups: Sequence[Widths]) -> list[int]:
    """The least choice of each group that holds what its data needs. Ours.

    >>> needed_widths([Widths(now=16, needed=4.5, choices=(4, 8, 16))])
    [8]
    """
    return [next((c for c in g.choices if c >= g.needed - 1e-9), g.now) for g in groups]


def equal_saturation(groups: Sequence[Widths], cost: CostOf, target: float) -> list[int]:
    """Units per group at which needed / planned is as even as the choices allow, for a cost of at most ``target``. Ours.

    A group is as wide as its need divided by the common saturation s; s rises until the cost fits. Groups that would need more than they
    have keep what they have.

    Args:
        groups: in order.
        cost: of units per group.
        target: the largest cost.

    Returns:
        Units per group; the least choices where the target cannot be met.

    >>> groups = [Widths(now=16, needed=n, choices=tuple(range(1, 17))) for n in (4, 8)]
    >>> equal_saturation(groups, lambda units: units.sum(1), 18.0)
    [6, 12]
    """

    def at(saturation: float) -> list[int]:
        return needed_widths([Widths(now=g.now, needed=min(g.needed / saturation, g.now), choices=g.choices) for g in groups])

    def fits(units: list[int]) -> bool:
        return float(cost(torch.tensor([units], dtype=torch.float64))) <= target

    low, high = 1e-3, 1e3
    if fits(at(low)):
        return at(low)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return at(high)


def least_loss(groups: Sequence[Widths], cost: CostOf, target: float) -> list[int]:
    """Units per group for a cost of at most ``target``, narrowed step by step where the loss per cost saved is least. Ours.

    Each step looks at every narrower choice of every group, so that a group may jump over a width that is bad for it; what a step saves
    beyond the target does not count. In the end, what is left of the target widens groups again where that helps most.

    Args:
        groups: with ``losses``.
        cost: of units per group.
        target: the largest cost.

    Returns:
        Units per group; the least choices where the target cannot be met.

    Raises:
        UsageError: for a group without losses.

    >>> line = torch.arange(4.0)
    >>> groups = [Widths(now=4, needed=4, choices=(1, 2, 3, 4), losses=w * line) for w in (1.0, 10.0)]
    >>> least_loss(groups, lambda units: units.sum(1), 6.0)
    [2, 4]
    """
    moves = [(i, n) for i, g in enumerate(groups) for n in g.choices]
    units = torch.tensor([float(g.now) for g in groups], dtype=torch.float64)
    which, count = torch.tensor([m[0] for m in moves]), torch.tensor([float(m[1]) for m in moves], dtype=torch.float64)
    after = torch.tensor([_loss(groups[i], n) for i, n in moves], dtype=torch.float64)
    loss, spent = torch.zeros(len(groups), dtype=torch.float64), float(cost(units[None]))

    def changed(allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves that are allowed, what the network would cost after each, and how each changes the loss."""
        found = allowed.nonzero()[:, 0]
        tried = units.repeat(len(found), 1)
        tried[torch.arange(len(found)), which[found]] = count[found]
        return found, cost(tried), after[found] - loss[which[found]]

    while spent > target:
        found, costs, lost = changed(count < units[which])
        saved = (spent - costs).clamp_max(spent - target)
        price = torch.where(saved > 0, lost / saved, torch.inf)
        if not len(found) or not torch.isfinite(price).any():
            break
        best = int(torch.where(price == price.min(), costs, -torch.inf).argmax())  # where no width matters, the widest that will do
        units[which[found[best]]], loss[which[found[best]]], spent = count[found[best]], after[found[best]], float(costs[best])
    while True:
        found, costs, lost = changed(count > units[which])
        gain = torch.where((costs <= target) & (costs > spent), -lost / (costs - spent), -torch.inf)
        if not len(found) or not float(gain.max()) > 0:
            return [int(u) for u in units]
        best = int(gain.argmax())
        units[which[found[best]]], loss[which[found[best]]], spent = count[found[best]], after[found[best]], float(costs[best])


def _loss(group: Widths, units: int) -> float:
    if group.losses is None:
        raise UsageError("a group without losses cannot be narrowed by loss; plan by saturation instead.")
    return float(group.losses[group.now - units])
