"""Layer algebra after Badias & Banerjee (arXiv 2107.01081, IEEE TNNLS 2023), **reconstructed**.

Only the abstracts of the paper were available. From them comes the frame: two properties of the structure alone, a complexity (capacity)
and an intrinsic power (compression), local transfer functions at the leaves, and an algebra that composes them along the topology. The
definitions below are ours, and no value may be presented as the authors':

* complexity ``C`` (bits) counts linear regions: a leaf of m units that share one patch of r inputs cuts the patch space into at most
  ``Phi(m, r) = sum_{j <= min(m, r)} binom(m, j)`` regions (Zaslavsky 1975). It adds up.
* fan-in ``K`` counts the paths from inputs to one output unit (interior units, padding ignored): series multiplies, sum adds. The intrinsic
  power is ``P = classes / K``. Both are kept as log2, because K reaches 2^1500.

(sum, series) on K is a commutative semiring. C is additive but not distributive: count each leaf once and keep a shared prefix outside the
branches. Published bounds on dense ReLU networks are in `capnas.measures.region_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from capnas.errors import UsageError, check_name

PoolGain = Literal["paths", "averaging"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """Value of a layer, a branch or a network in the algebra, a reconstruction; the default is the identity.

    Attributes:
        complexity: C_loc, bits at one position (>= 0).
        complexity_positions: C_pos, the same over all output positions as if they were independent (an upper-type count).
        log2_fan_in: log2 K; 0 is one path, -inf is no path at all (a zero branch).
        weights: learned numbers, W.
        macs: multiply-accumulates of one input.
    """

    complexity: float = 0.0
    complexity_positions: float = 0.0
    log2_fan_in: float = 0.0
    weights: int = 0
    macs: int = 0


IDENTITY = Term()
ZERO = Term(log2_fan_in=-math.inf)


@lru_cache(maxsize=4096)
def log2_regions(units: int, inputs: int) -> float:
    """log2 of Phi(units, inputs), the most regions that hyperplanes of one layer cut its input space into (Zaslavsky 1975).

    Args:
        units: m, hyperplanes (>= 0).
        inputs: r, dimension of the space (>= 0).

    Raises:
        UsageError: for a negative argument.

    >>> log2_regions(10, 3) == math.log2(1 + 10 + 45 + 120), log2_regions(64, 576)
    (True, 64.0)
    """
    if units < 0 or inputs < 0:
        raise UsageError(f"units and inputs must be >= 0, got {units} and {inputs}.")
    if inputs >= units:
        return float(units)
    total = binomial = 1
    for j in range(1, inputs + 1):
        binomial = binomial * (units - j + 1) // j
        total += binomial
    return math.log2(total)


def linear_leaf(
    in_units: int, out_units: int, *, kernel: int = 1, groups: int = 1, positions: int = 1, activation: bool = True, bias: bool = False
) -> Term:
    """Transfer value of a convolution or dense layer, with the norm and the activation that follow it (reconstruction, section 2.2).

    ``r = in_units / groups * kernel``; ``C_loc = groups log2 Phi(out_units / groups, r)`` with a piecewise linear activation and 0 without
    one (smooth activations take the same value by convention); ``K = r``.

    Args:
        in_units: input channels, or input features.
        out_units: output channels, or output features.
        kernel: number of taps, ``k_h * k_w``; 1 for a dense layer.
        groups: as in a convolution; it must divide both widths.
        positions: output positions, ``h' * w'`` (tokens for a layer that works on each token).
        activation: whether a non-linearity reads this layer's output through neutral operations.
        bias: whether the layer has a bias of its own.

    Raises:
        UsageError: where groups do not divide the widths, or a size is not positive.

    >>> leaf = linear_leaf(3, 64, kernel=9, positions=32 * 32)
    >>> round(leaf.complexity, 4), round(leaf.log2_fan_in, 4), leaf.weights
    (61.059, 4.7549, 1728)
    """
    if min(in_units, out_units, kernel, groups, positions) < 1 or in_units % groups or out_units % groups:
        raise UsageError(
            f"a leaf needs positive sizes and groups that divide both widths, got in_units={in_units}, out_units={out_units}, "
            f"kernel={kernel}, groups={groups}, positions={positions}."
        )
    fan_in = in_units // groups * kernel
    bits = groups * log2_regions(out_units // groups, fan_in) if activation else 0.0
    return Term(
        complexity=bits,
        complexity_positions=bits * positions,
        log2_fan_in=math.log2(fan_in),
        weights=out_units * fan_in + (out_units if bias else 0),
        macs=out_units * fan_in * positions,
    )


def pool_leaf(kind: Literal["max", "average"], units: int, *, kernel: int, positions: int = 1, pool_gain: PoolGain = "paths") -> Term:
    """Transfer value of a pooling layer (reconstruction, section 2.2).

    Maximum: ``C_loc = units * log2 kernel`` (each unit has ``kernel`` linear pieces), ``K = kernel``.
    Average: ``C_loc = 0``, and K by ``pool_gain``.

    Args:
        kind: ``"max"`` or ``"average"``.
        units: channels.
        kernel: taps of the window, ``k_h * k_w`` (the whole map for global pooling).
        positions: output positions.
        pool_gain: ``"paths"`` counts the window's paths (``K = kernel``, the rule of section 2.3). ``"averaging"`` adds squared path gains:
            ``kernel`` paths of gain ``1 / kernel`` give ``K = kernel / kernel^2 = 1 / kernel``, so an average loses fan-in where learned
            weights (gain 1) win it. Our extension; it alters averages only.

    Raises:
        UsageError: for an unknown kind or gain, or a size that is not positive.

    >>> pool_leaf("max", 64, kernel=9).log2_fan_in == math.log2(9), pool_leaf("average", 64, kernel=4, pool_gain="averaging").log2_fan_in
    (True, -2.0)
    """
    check_name("kind", kind, ("max", "average"))
    if min(units, kernel, positions) < 1:
        raise UsageError(f"a pooling leaf needs positive sizes, got units={units}, kernel={kernel}, positions={positions}.")
    bits = units * math.log2(kernel) if kind == "max" else 0.0
    gain = math.log2(kernel) if kind == "max" else average_gain(kernel, pool_gain)
    return Term(complexity=bits, complexity_positions=bits * positions, log2_fan_in=gain)


def average_gain(taps: float, pool_gain: PoolGain = "paths") -> float:
    """log2 K of an average over ``taps`` units; see `pool_leaf`. Reconstructed.

    Raises:
        UsageError: for an unknown gain.

    >>> average_gain(9, "averaging") == -average_gain(9)
    True
    """
    check_name("pool_gain", pool_gain, ("paths", "averaging"))
    return math.log2(taps) if pool_gain == "paths" else -math.log2(taps)


def activation_leaf(units: int, *, positions: int = 1) -> Term:
    """An activation that no linear layer feeds (reconstruction, section 2.2): one hyperplane a channel, ``C_loc = units``, ``K = 1``.

    >>> activation_leaf(64, positions=49).complexity_positions
    3136.0
    """
    return Term(complexity=float(units), complexity_positions=float(units * positions))


def log2_add(values: Iterable[float]) -> float:
    """log2 of the sum of ``2^value``, without overflow; the empty sum is -inf. Textbook arithmetic.

    >>> log2_add([3.0, 3.0]), log2_add([1500.0, -math.inf]), log2_add([])
    (4.0, 1500.0, -inf)
    """
    values = list(values)
    top = max(values, default=-math.inf)
    return top if math.isinf(top) else top + math.log2(math.fsum(2.0 ** (v - top) for v in values))


def series(*terms: Term) -> Term:
    """One after the other (reconstruction, section 2.4): C, W and MACs add, K multiplies. No argument gives the identity.

    >>> series(linear_leaf(4, 8), linear_leaf(8, 2)).log2_fan_in
    5.0
    """
    return _with_fan_in(terms, math.fsum(t.log2_fan_in for t in terms) if all(t.log2_fan_in > -math.inf for t in terms) else -math.inf)


def add(*terms: Term) -> Term:
    """Branches whose outputs are summed (reconstruction, section 2.4): C (an upper count) and K add; without arguments the zero.

    >>> add(linear_leaf(4, 4), IDENTITY, ZERO).log2_fan_in == math.log2(5)
    True
    """
    return _with_fan_in(terms, log2_add(t.log2_fan_in for t in terms))


def residual(branch: Term) -> Term:
    """``x + A(x)`` (reconstruction, section 2.4): C of the branch, ``K = K_A + 1``.

    >>> conv = linear_leaf(64, 64, kernel=9)
    >>> residual(series(conv, conv)).log2_fan_in == math.log2(576**2 + 1)
    True
    """
    return add(IDENTITY, branch)


def concat(terms: Sequence[Term], units: Sequence[int]) -> Term:
    """Branches side by side (reconstruction, section 2.4): C adds, K is the mean over output units, exact where one layer reads them all.

    Args:
        terms: the branches.
        units: their output channels, one number each.

    Raises:
        UsageError: where the two lengths differ or no unit is left.

    >>> round(2 ** concat([IDENTITY, linear_leaf(4, 4)], [2, 2]).log2_fan_in, 9)
    2.5
    """
    if len(terms) != len(units) or sum(units) < 1 or min(units) < 0:
        raise UsageError(
            f"concat needs one number of units for each term and one unit at least, got {len(terms)} terms, units {list(units)}."
        )
    return _with_fan_in(terms, mean_fan_in([t.log2_fan_in for t in terms], units))


def mean_fan_in(log2_fan_ins: Sequence[float], units: Sequence[int]) -> float:
    """log2 of the mean of K over output units. Reconstructed (section 2.4).

    >>> round(2 ** mean_fan_in([1.0, 3.0, 3.0], [2, 1, 1]), 9)
    5.0
    """
    weighted = [k + math.log2(n) for k, n in zip(log2_fan_ins, units) if n > 0]
    return log2_add(weighted) - math.log2(sum(units))


def gate(*terms: Term) -> Term:
    """Branches whose outputs are multiplied (squeeze-excitation; reconstruction, section 2.4): C adds, ``K = K_A + K_B``, as for the sum.

    >>> gate(linear_leaf(2, 2), linear_leaf(6, 2)).log2_fan_in
    3.0
    """
    return add(*terms)


def _with_fan_in(terms: Sequence[Term], log2_fan_in: float) -> Term:
    return Term(
        complexity=math.fsum(t.complexity for t in terms),
        complexity_positions=math.fsum(t.complexity_positions for t in terms),
        log2_fan_in=log2_fan_in,
        weights=sum(t.weights for t in terms),
        macs=sum(t.macs for t in terms),
    )


def log2_power(log2_fan_in: float, classes: int) -> float:
    """Intrinsic power of a network, ``log2 P = log2 classes - log2 K`` (reconstruction, section 2.3). More negative compresses more.

    >>> log2_power(10.0, 8)
    -7.0
    """
    return math.log2(classes) - log2_fan_in


def log2_compression(units: int, inputs: float) -> float:
    """Local intrinsic power of a leaf (reconstruction, section 2.3), log2 of ``rho = m / r``; clip at 0 to count real compression only.

    >>> log2_compression(64, 128)
    -1.0
    """
    return math.log2(units / inputs)
