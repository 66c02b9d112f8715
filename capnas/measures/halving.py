"""How much each stage of a race between candidates of different cost may train: successive halving with a shared start.

Successive halving is Jamieson and Talwalkar's (2016, arXiv 1502.07943); the shares of the stages are ours.
"""

from __future__ import annotations

from collections.abc import Sequence


def halving(count: int) -> tuple[int, ...]:
    """How many of `count` sizes each rung trains: successive halving (Jamieson and Talwalkar, 2016).

    >>> halving(6), halving(4), halving(2), halving(1)
    ((6, 3, 2), (4, 2), (2,), (1,))
    """
    rungs = [count]
    while rungs[-1] > 2:
        rungs.append((rungs[-1] + 1) // 2)
    return tuple(rungs)


def shared_passes(macs: Sequence[int], *, left: float, most: int) -> int:
    """Passes of a training shared between sizes (ours): for two thirds of what is left, and so that each size can follow alone.

    Args:
        macs: of each size, multiply-accumulates of one image; a pass takes their mean.
        left: what may be spent, MACs times epochs.
        most: bound on the answer.

    >>> [shared_passes([1, 2, 3], left=left, most=10) for left in (18.0, 9.0, 7.9)]
    [6, 1, 0]
    """
    spend = min(left * 2 / 3, left - sum(macs))
    return max(0, min(most, int(spend * len(macs) / sum(macs) + 1e-9)))


def rung_epochs(macs: Sequence[int], *, left: float, last: bool, most: int) -> int:
    """Epochs of the next rung: two thirds of what is left, all of it in the last rung or where two thirds pay for no epoch.

    Halving in its textbook form spends alike in every rung. Here the dearest sizes take most of the cost, and to drop them after a very
    short look saves most and errs most, so the first look gets the most.

    Args:
        macs: of the sizes still running, multiply-accumulates of one image.
        left: what may still be spent, MACs times epochs.
        last: whether no rung follows.
        most: bound on the answer.

    >>> [rung_epochs([1, 2, 3], left=left, last=last, most=9) for left, last in ((36.0, False), (36.0, True), (8.0, False), (5.0, False))]
    [4, 6, 1, 0]
    """
    every = left / sum(macs) + 1e-9
    return max(0, min(most, int(every if last else every * 2 / 3) or int(every)))
