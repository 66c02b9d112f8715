"""The reasons of a recommended image size in words; the rule itself is in `capnas.measures.resolution`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from capnas.measures.resolution import SizeReading


def comparison(
    final: Mapping[int, SizeReading],
    fitted: Mapping[int, float],
    values: Mapping[int, float],
    *,
    chosen: int,
    best: int,
    pay: float,
    guessed: float | None = None,
    images: int | None = None,
) -> list[str]:
    """Why neither the next smaller nor the next larger size, or why that cannot be said. Ours.

    Args:
        final: readings of the longest training by size in pixels, ascending.
        fitted: accuracy by size, of all sizes that were trained.
        values: worth by size: fitted accuracy minus the price of the MACs.
        chosen: the recommended size.
        best: that of most worth.
        pay: accuracy that a doubling of MACs has to bring.
        guessed: accuracy of a guess where no size is clearly better than that, else None.
        images: how many images the accuracies come from, where it is known.

    >>> from capnas.measures.resolution import SizeReading
    >>> final = {s: SizeReading(size=s, macs=s * s, accuracy=a, epochs=1) for s, a in ((16, 0.5), (32, 0.6))}
    >>> fitted = {16: 0.5, 32: 0.6}
    >>> comparison(final, fitted, fitted, chosen=32, best=32, pay=0.0)
    ['from 16 to 32 px the fitted accuracy changes by +10.0 points for 2.0 doublings of MACs (MACs are not priced): it pays']
    """
    if len(values) == 1:
        return [f"nothing was compared: {chosen} px is the only size left"]
    if guessed is not None:
        above = images is not None and any(r.accuracy > guessed for r in final.values())
        bar = f"{'clearly ' if above else ''}better than a guess ({100 * guessed:.1f} %)" + (f" on {images:,} images" if above else "")
        return [f"no size is {bar}, and accuracy cannot tell them apart: train for more epochs"]
    sizes = list(final)
    at = sizes.index(chosen)
    reasons = []
    for other in sizes[max(0, at - 1) : at + 2]:
        if other == chosen:
            continue
        low, high = sorted((chosen, other))
        gain = round(100 * (fitted[high] - fitted[low]), 1) + 0.0  # no minus nought
        step = f"from {low} to {high} px the fitted accuracy changes by {gain:+.1f} points {_cost(final[low], final[high], pay)}"
        if other > chosen and values[other] > values[chosen]:
            reasons.append(f"{step}: a larger size would pay")
        elif other > chosen:
            reasons.append(f"{step}: nothing is gained" if final[low].macs == final[high].macs else f"{step}: it has stopped paying")
        elif values[other] <= values[chosen]:
            reasons.append(f"{step}: it pays")
        else:
            tail = f"{final[best].tail} of {len(final[best].saturations)} layers"
            reasons.append(f"{step}: it hardly pays, but {best} px leave a tail of {tail}")
    return reasons


def _cost(low: SizeReading, high: SizeReading, pay: float) -> str:
    if low.macs == high.macs:
        return "at the same MACs"
    asked = f"{100 * pay:g} points a doubling are asked" if pay else "MACs are not priced"
    return f"for {math.log2(high.macs / low.macs):.1f} doublings of MACs ({asked})"
