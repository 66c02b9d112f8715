"""Which image size suits a network: the point where accuracy stops paying for multiply-accumulates, the tail of its layers, the choice.

Tails are the papers' (Richter et al., ICMLA 2021, arXiv 2106.12307; Shenk et al., arXiv 2006.08679, see `capnas.measures.evenness`), as
are borders (`capnas.measures.borders`). The papers describe what a fitting resolution looks like and give no rule for choosing one. **The
rule here is ours**, four sentences:

1. *Pay*: every doubling of the multiply-accumulates (MACs) has to bring ``pay`` of accuracy. The size of the greatest
   ``accuracy - pay * log2(MACs)`` is where it stops doing so. Without a budget that is 0.0025, a quarter of a point; a budget says what
   is affordable, and MACs within it cost nothing more (see `price`).
2. *Even*: if that size leaves a low-saturation tail of more than an eighth of the layers and a larger one does not, and the larger one's
   worth by the first sentence is at most ``slack`` (0.005, or one standard error of the accuracy where that is more: less cannot be told
   from the accuracies) less, the smallest such size is chosen.
3. An accuracy only tells how many images were right, the cross-entropy on the same images also how nearly the others were. So each
   accuracy is replaced by the one that the cross-entropy predicts, on the line through all sizes. On 500 images of CIFAR-10 a difference
   between two sizes then had a standard error of 0.3 to 0.7 points over the images, where that of the accuracies was 1.4 to 2.3.
4. These grow with the epochs, so they are fitted: one level for each length of training plus one curve that is concave in log2(MACs), by
   weighted least squares. Between sizes of the same MACs a curve cannot tell: each keeps its own distance from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from capnas.errors import UsageError
from capnas.measures import evenness
from capnas.measures.guessing import no_better_than_a_guess, standard_error
from capnas.measures.resolution_reasons import comparison

PAY = 0.0025
SLACK = 0.005
EVEN_TAIL = 0.125  # separates the published even profiles (0 to 0.06) from those with a tail (0.38 to 0.52)


@dataclass(frozen=True, kw_only=True)
class SizeReading:
    """What a short training at one image size gave.

    Attributes:
        size: pixels.
        macs: multiply-accumulates of one image.
        accuracy: on held-out images, in [0, 1].
        epochs: passes over the data at this size alone so far; sizes compare at equal epochs only.
        loss: mean cross-entropy on the same images, in nats; None where it is not known.
        saturations: (L,) of the layers that look around, in the order of execution, in [0, 1]; see
            `capnas.measures.borders.looking_layers`.
        layers: (L,) their names; empty where they are not known.

    >>> reading = SizeReading(size=32, macs=10**6, accuracy=0.6, epochs=2, saturations=(0.5, 0.6, 0.4, 0.1))
    >>> reading.tail, reading.even
    (1, False)
    """

    size: int
    macs: int
    accuracy: float
    epochs: int
    loss: float | None = None
    saturations: tuple[float, ...] = ()
    layers: tuple[str, ...] = ()

    @property
    def tail(self) -> int:
        """Trailing layers below a quarter of the greatest saturation."""
        return evenness.tail_length(self.saturations)

    @property
    def even(self) -> bool:
        """Whether the tail is at most an eighth of the layers."""
        return not self.saturations or evenness.tail_fraction(self.saturations) <= EVEN_TAIL


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The chosen size.

    Attributes:
        size: pixels.
        even: whether its inference is spread evenly (no tail).
        fitted: fitted accuracy by size, at the level of the longest training.
        worth: fitted accuracy minus the price of the MACs, by size; the cheapest size pays nothing.
        reasons: in words.
    """

    size: int
    even: bool
    fitted: Mapping[int, float]
    worth: Mapping[int, float]
    reasons: tuple[str, ...]


def steadied(readings: Sequence[SizeReading]) -> tuple[float, ...]:
    """Accuracies as their cross-entropies predict them: on the least squares line through the readings of the same epochs. Ours.

    The line never rises with the loss: where accuracy and cross-entropy tell the opposite all sizes get the mean. Readings are left
    as they are where the loss of one of the same epochs is not known.

    >>> values = ((16, 0.4, 2.0), (32, 0.7, 1.5), (64, 0.6, 1.0))
    >>> [round(a, 6) for a in steadied([SizeReading(size=s, macs=s * s, accuracy=a, loss=c, epochs=1) for s, a, c in values])]
    [0.466667, 0.566667, 0.666667]
    """
    found = np.array([r.accuracy for r in readings])
    for epochs in {r.epochs for r in readings}:
        rung = [i for i, r in enumerate(readings) if r.epochs == epochs]
        losses = [r.loss for r in readings if r.epochs == epochs and r.loss is not None]
        if len(losses) < len(rung):
            continue
        above, centre = np.array(losses) - np.mean(losses), found[rung].mean()
        spread = float(above @ above)
        slope = min(0.0, float(above @ found[rung]) / spread) if spread > 0 else 0.0
        found[rung] = centre + slope * above
    return tuple(float(a) for a in found)


def fitted_accuracy(readings: Sequence[SizeReading]) -> dict[int, float]:
    """Accuracies without most of their noise: `steadied`, then a level for each number of epochs plus one curve, concave in log2(MACs).

    Ours: least squares weighted by the epochs (longer trainings say more), with the concavity as a constraint (non-negative hinges).

    Args:
        readings: several sizes, and several numbers of epochs of the same size where they were kept.

    Returns:
        By size in ascending order, at the level of the most epochs.

    Raises:
        UsageError: without readings.

    >>> line = [SizeReading(size=s, macs=s * s, accuracy=a, epochs=1) for s, a in ((16, 0.4), (32, 0.6), (64, 0.7))]
    >>> {size: round(value, 6) for size, value in fitted_accuracy(line).items()}
    {16: 0.4, 32: 0.6, 64: 0.7}
    """
    if not readings:
        raise UsageError("a fit needs one reading at least, got none.")
    macs = {r.size: r.macs for r in readings}
    sizes, levels = sorted(macs), sorted(set(macs.values()))
    lengths = sorted({r.epochs for r in readings})
    at = {size: math.log2(macs[size] / levels[0]) for size in sizes}
    knots = [math.log2(level / levels[0]) for level in levels[1:-1]]
    curve = {s: [at[s], -at[s], *(-max(0.0, at[s] - knot) for knot in knots)] for s in sizes}
    for same in ([s for s in sizes if macs[s] == level] for level in levels):
        for one in same[1:]:  # distances from the curve that add up to nothing over the sizes of the same MACs
            for s in sizes:
                away = float(s == one) - float(s == same[0])
                curve[s] += [away, -away]
    rows, targets = [], []
    for r, accuracy in zip(readings, steadied(readings)):
        weight = math.sqrt(r.epochs)
        rows.append([weight * v for v in [*(float(r.epochs == e) for e in lengths), *curve[r.size]]])
        targets.append(weight * accuracy)
    found, _ = nnls(np.array(rows), np.array(targets))
    level, shape = found[len(lengths) - 1], found[len(lengths) :]
    return {s: round(float(level + np.dot(shape, curve[s])), 9) for s in sizes}  # what is equal stays so


def price(pay: float | None, budget: int | None) -> float:
    """What a doubling of MACs has to bring: `pay` where it is given, else nothing within a budget and `PAY` without one. Ours.

    Raises:
        UsageError: for a ``pay`` that is negative or not finite.

    >>> price(None, None), price(None, 10**6), price(0.01, 10**6)
    (0.0025, 0.0, 0.01)
    """
    if pay is not None and not 0 <= pay < math.inf:
        got = f"{pay} ({100 * pay:g} points)"
        raise UsageError(f"pay must be the accuracy that a doubling of MACs has to bring, a number and not negative, got {got}.")
    return pay if pay is not None else PAY if budget is None else 0.0


def worth(readings: Sequence[SizeReading], pay: float = PAY) -> dict[int, float]:
    """Fitted accuracy minus ``pay`` for each doubling of MACs over the cheapest size. Ours.

    Raises:
        UsageError: for a ``pay`` that is negative or not finite, or without readings.

    >>> line = [SizeReading(size=s, macs=s * s, accuracy=a, epochs=1) for s, a in ((16, 0.4), (32, 0.6), (64, 0.7))]
    >>> {size: round(value, 6) for size, value in worth(line, pay=0.05).items()}
    {16: 0.4, 32: 0.5, 64: 0.5}
    """
    pay = price(pay, None)
    macs = {r.size: r.macs for r in readings}
    least = min(macs.values(), default=1)
    return {size: value - pay * math.log2(macs[size] / least) for size, value in fitted_accuracy(readings).items()}


def survivors(readings: Sequence[SizeReading], keep: int, pay: float = PAY) -> tuple[int, ...]:
    """The sizes of most worth among those with the most epochs, in ascending order: what a rung of successive halving keeps. Ours.

    Raises:
        UsageError: for a ``pay`` that is negative or not finite, or without readings.

    >>> rung = [SizeReading(size=s, macs=s * s, accuracy=a, epochs=1) for s, a in ((16, 0.4), (32, 0.6), (64, 0.61))]
    >>> survivors(rung, 2)
    (32, 64)
    """
    values = worth(readings, pay)
    last = max(r.epochs for r in readings)
    running = [r.size for r in readings if r.epochs == last]
    return tuple(sorted(sorted(running, key=lambda size: values[size], reverse=True)[:keep]))


def recommend(
    readings: Sequence[SizeReading],
    *,
    budget: int | None = None,
    pay: float | None = None,
    slack: float = SLACK,
    images: int | None = None,
    chance: float | None = None,
) -> Recommendation:
    """The smallest size at which inference is spread evenly and accuracy has stopped paying for MACs; our rule, in the module's text.

    Args:
        readings: of every size and every number of epochs; the choice is among those of the most epochs.
        budget: most MACs of one image.
        pay: accuracy that a doubling of MACs has to bring; None is `price`.
        slack: worth that evenness may cost.
        images: how many images the accuracies come from, for their standard error.
        chance: accuracy of a guess, in [0, 1]: the share of the commonest class. Sizes none of which is above it by two standard errors
            are not said to pay or not to pay.

    Raises:
        UsageError: no readings, no size within the budget, or a ``pay`` that is negative or not finite.

    >>> rung = [SizeReading(size=s, macs=s * s, accuracy=a, epochs=1) for s, a in ((16, 0.4), (32, 0.6), (64, 0.601))]
    >>> recommend(rung).size, recommend(rung, budget=300).size
    (32, 16)
    """
    allowed = [r for r in readings if budget is None or r.macs <= budget]
    if readings and not allowed:
        raise UsageError(f"no size is within {budget:,.0f} MACs; the cheapest takes {min(r.macs for r in readings):,}.")
    pay = price(pay, budget)
    values, fitted = worth(allowed, pay), fitted_accuracy(allowed)
    last = max(r.epochs for r in allowed)
    final = {r.size: r for r in sorted(allowed, key=lambda r: r.size) if r.epochs == last}
    best = max(final, key=lambda size: values[size])
    chosen = best
    error = standard_error(final[best].accuracy, images=images) if images else 0.0
    if not final[best].even:
        chosen = next((s for s in final if s > best and final[s].even and values[s] >= values[best] - max(slack, error)), best)
    row = final[chosen]
    guessed = None
    if chance is not None and all(no_better_than_a_guess(r.accuracy, chance=chance, images=images) for r in final.values()):
        guessed = chance
    reasons = comparison(final, fitted, values, chosen=chosen, best=best, pay=pay, guessed=guessed, images=images)
    if row.saturations:
        said = "inference is spread evenly" if row.even else "a tail remains"
        reasons.append(f"{said}: {row.tail} of {len(row.saturations)} layers are below a quarter of the greatest saturation")
    if budget is not None and (over := sorted({r.size for r in readings if r.macs > budget})):
        reasons.append(f"over the budget of {budget:,.0f} MACs: {', '.join(map(str, over))} px")
    if images:
        reasons.append(f"an accuracy from {images:,} images has a standard error of {100 * error:.1f} points")
    return Recommendation(size=chosen, even=row.even, fitted=fitted, worth=values, reasons=tuple(reasons))
