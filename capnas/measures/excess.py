"""Excess capacity: distances to initialization, the two capacity bounds of a network, norm layers as maps.

Graf, Zeng, Rieck, Niethammer, Kwitt, "On Measuring Excess Capacity in Neural Networks" (NeurIPS 2022, arXiv 2202.08070), called the paper
below. A weight layer is described by its Lipschitz constant s (`operator_norms`), its distance b to initialization in the (2,1) group norm
and its number of weights W; both bounds of Theorem 3.5 on the empirical Rademacher complexity follow from these. The bounds are vacuous as
absolute numbers: compare them, in decades.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import digamma, zeta
from torch import Tensor

from capnas.errors import UsageError, check_name

_EXACT = 36.0  # natural logarithm above which a double no longer tells a number from its ceiling
_ROUNDING = 1e-12  # relative, added before a ceiling: rounding errors may raise an upper bound, never lower it


@dataclass(frozen=True, kw_only=True)
class WeightLayer:
    """The constants of one layer.

    Attributes:
        norm: s, the Lipschitz constant of the layer: measured, or the constraint it was trained under.
        distance: b, the (2,1) distance to initialization; 0 for a fixed layer, which adds nothing to either bound but its norm.
        weights: W, number of weights. 0 marks a map without weights (pooling, a counted norm layer): a factor that is no layer of the
            theorem.
        name: for the reader.

    Raises:
        UsageError: for a constant that is negative or not finite.
    """

    norm: float
    distance: float = 0.0
    weights: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.norm < math.inf and 0 <= self.distance < math.inf and self.weights >= 0):
            raise UsageError(f"layer constants must be finite and not negative; got {self}.")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Parallel branches of layers from one input, joined: x -> g(x) + h_1(x) + h_2(x) + ...

    The paper has one branch and a fixed shortcut; several trained branches (a shortcut with weights) and concatenation are our extension,
    by the same covering argument: the constants of branches add, or add in squares when joined by concatenation.

    Attributes:
        branches: layers of each branch, from input to output.
        shortcut: Lip(g) of the fixed part: 1 for an identity, 0 for none.
        join: "add" or "concat".

    Raises:
        UsageError: for another join, or a shortcut that is negative or not finite.
    """

    branches: tuple[tuple[WeightLayer, ...], ...]
    shortcut: float = 0.0
    join: str = "add"

    def __post_init__(self) -> None:
        check_name("join", self.join, ("add", "concat"))
        if not 0 <= self.shortcut < math.inf:
            raise UsageError(f"shortcut must be finite and not negative; got {self.shortcut}.")


@dataclass(frozen=True, kw_only=True)
class CapacityBounds:
    """Bounds on the empirical Rademacher complexity and what they are made of, as base-10 logarithms.

    Attributes:
        club: first bound of Theorem 3.5, through the norms of the weights.
        spade: second bound of Theorem 3.5, through the number of weights.
        lipschitz: the product of block constants.
        constants: C of every weight layer in order, -inf where the distance is 0.
    """

    club: float
    spade: float
    lipschitz: float
    constants: tuple[float, ...]


def group_norm_21(weight: Tensor) -> float:
    """The (2,1) group norm: L2 over input channels (axis 1), then the plain sum over outputs and taps; section 3 of the paper.

    The weight has shape (C_out, C_in / groups, *kernel) or (out, in). Of a transposed convolution pass `weight.transpose(0, 1)`.

    >>> group_norm_21(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    7.0
    """
    return float(torch.linalg.vector_norm(weight.detach().double(), dim=1).sum())


def filter_norm(weight: Tensor) -> float:
    """The sum over outputs of the L2 norm of everything else, as in earlier bounds (Bartlett et al., 2017); for a weight (C_out, ...).

    No more than `group_norm_21`, no less than that over the square root of the number of taps.

    >>> filter_norm(torch.ones(2, 1, 2, 2))
    4.0
    """
    return float(torch.linalg.vector_norm(weight.detach().double().flatten(1), dim=1).sum())


def distance_to_init(weight: Tensor, init: Tensor) -> float:
    """B = || K - K0 ||_{2,1} of a weight and its initial value (the paper's b), both (C_out, C_in / groups, *kernel) or (out, in).

    Raises:
        UsageError: for different shapes.

    >>> distance_to_init(torch.ones(1, 4), torch.zeros(1, 4))
    2.0
    """
    if weight.shape != init.shape:
        raise UsageError(f"weight and init must have one shape; got {tuple(weight.shape)} and {tuple(init.shape)}.")
    return group_norm_21(weight.detach().double() - init.detach().double())


def norm_layer_constant(gamma: Tensor | None, variance: Tensor, eps: float = 1e-5) -> float:
    """The Lipschitz constant of a norm layer counted on its own: max |gamma| / sqrt(variance + eps). Our extension.

    The paper's networks have no norm layers. Exact for batch norm in evaluation mode; times the norm of the layer before it, an upper bound
    of the two as one map. For layer, group or RMS norm pass the smallest variance (mean square) seen per sample: the result then bounds the
    local slope on the data seen, not the global one, which is max |gamma| / sqrt(eps).

    Args:
        gamma: (C,) scale, or None for 1.
        variance: (C,), or a shape that broadcasts with it.
        eps: added to the variance.

    >>> norm_layer_constant(torch.tensor([1.0, -6.0]), torch.tensor([1.0, 4.0]), eps=0.0)
    3.0
    """
    scale = torch.rsqrt(variance.detach().double() + eps)
    return float((scale if gamma is None else scale * gamma.detach().double()).abs().max())


def chain(layers: Iterable[WeightLayer]) -> tuple[Block, ...]:
    """A plain network: each layer a block without shortcut. The paper's case without residuals.

    >>> chain([WeightLayer(norm=2.0)])[0].shortcut
    0.0
    """
    return tuple(Block(branches=((layer,),)) for layer in layers)


def capacity_bounds(blocks: Sequence[Block], *, data_norm: float, samples: int, margin: float) -> CapacityBounds:
    """Both bounds of Theorem 3.5 for plain and residual networks, computed in logarithms so that no depth overflows.

    With C_ij = (4 / margin) (data_norm / sqrt n) (prod_{l != i} S_l) (prod_{k != j} s_ik) b_ij for layer j of block i, S_i = Lip(g_i) +
    prod_j s_ij:

        club   4/n + 12 H_{n-1} / sqrt n  *  sqrt(ln(2 max W))  *  (sum ceil(C^(2/3)))^(3/2)
        spade  12 / sqrt n  *  sqrt(sum 2 W (ln(1 + beta) + psi(beta))),  beta = ceil(L^2 C^2)

    The plain form is as stated in the paper's accompanying note; the residual C_ij and the closed form of psi are re-derived from its
    proof, the theorem's own wording for residual networks not being at hand. The authors' code drops the ceilings, takes ln n for H_{n-1}
    and another psi: its numbers differ.

    Args:
        blocks: the network from input to output; see `chain` and `Block`.
        data_norm: Frobenius norm of all n inputs stacked, normalised as they enter the network.
        samples: n.
        margin: gamma > 0 of the ramp loss; use one value for all networks that are compared, or the smallest training margin.

    Raises:
        UsageError: for a margin, norm or count that is not positive, or no weight layer.

    >>> layers = [WeightLayer(norm=1.5, distance=2.0, weights=108), WeightLayer(norm=0.8, distance=1.0, weights=144)]
    >>> bounds = capacity_bounds(chain(layers), data_norm=10.0, samples=100, margin=1.0)
    >>> [round(10**c, 6) for c in bounds.constants], round(10**bounds.lipschitz, 6)
    ([6.4, 6.0], 1.2)
    """
    if not (0 < margin < math.inf and 0 <= data_norm < math.inf and samples >= 1):
        raise UsageError(f"margin and samples must be positive, data_norm finite; got {margin}, {samples}, {data_norm}.")
    scale = _ln(4 / margin) + _ln(data_norm) - 0.5 * math.log(samples)
    factors = [_block_factor(block) for block in blocks]
    constants, weights = [], []
    for i, block in enumerate(blocks):
        others = sum(f for k, f in enumerate(factors) if k != i)
        for branch in block.branches:
            for j, layer in enumerate(branch):
                if layer.weights:
                    rest = sum(_ln(other.norm) for k, other in enumerate(branch) if k != j)
                    constants.append(_sum(scale, others, rest, _ln(layer.distance)))
                    weights.append(layer.weights)
    if not weights:
        raise UsageError("blocks must hold at least one layer with weights; got none.")
    return CapacityBounds(
        club=_club(constants, weights, samples) / math.log(10),
        spade=_spade(constants, weights, samples) / math.log(10),
        lipschitz=sum(factors) / math.log(10),
        constants=tuple(c / math.log(10) for c in constants),
    )


def psi(b: float) -> float:
    """The term beside ln(1 + b) in the second bound.

    zeta(3/2, 1)^(1/3) zeta(3/2, 1 + 1/b)^(2/3) with Hurwitz zeta functions, and 0 at 0.
    Increasing and below zeta(3/2) = 2.6124. The paper states that psi(0) = 0, psi increases and psi < 2.7; the closed form is our
    reconstruction.

    >>> psi(0.0), round(psi(1.0), 6), round(psi(float("inf")), 6)
    (0.0, 1.89375, 2.612375)
    """
    return float(zeta(1.5, 1.0) ** (1 / 3) * zeta(1.5, 1.0 + 1.0 / b) ** (2 / 3)) if b > 0 else 0.0


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """The margin of each sample, v_y - max_{j != y} v_j; its least value over the training set is the gamma of the paper's comparison.

    Args:
        logits: (B, classes).
        targets: (B,) class indices.

    >>> margins(torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([0, 1]))
    tensor([ 1., -4.])
    """
    own = logits.gather(1, targets[:, None])[:, 0]
    return own - logits.scatter(1, targets[:, None], -math.inf).amax(1)


def simplex_classifier(classes: int, features: int) -> Tensor:
    """The fixed classifier of the paper, (classes, features): the rows are the vertices of a regular simplex.

    They have unit norm; the operator norm is sqrt(C / (C - 1)). In float64.

    Raises:
        UsageError: for fewer than classes - 1 features.

    >>> rows = simplex_classifier(3, 4)
    >>> (rows @ rows.T).round(decimals=4).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    if classes < 2 or features < classes - 1:
        raise UsageError(
            f"a simplex of {classes} vertices needs at least 2 classes and {max(classes - 1, 1)} features; got {features} features."
        )
    rows = torch.zeros(classes, features, dtype=torch.float64)
    for k in range(1, classes):  # column k separates vertex k from those before it (Helmert's matrix)
        rows[:k, k - 1], rows[k, k - 1] = 1 / math.sqrt(k * (k + 1)), -math.sqrt(k / (k + 1))
    return rows * math.sqrt(classes / (classes - 1))


def _ln(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _sum(*terms: float) -> float:
    return -math.inf if -math.inf in terms else sum(terms)


def _branch_norm(branch: Sequence[WeightLayer]) -> float:
    return _sum(*(_ln(layer.norm) for layer in branch))


def _block_factor(block: Block) -> float:
    """Ln S of a block."""
    parts = np.array([_ln(block.shortcut), *map(_branch_norm, block.branches)])
    return float(np.logaddexp.reduce(parts) if block.join == "add" else np.logaddexp.reduce(2 * parts) / 2)


def _ceiled(x: float) -> float:
    """Logarithm of ceil(e^x): at least 0, however small a number that is not 0."""
    if x == -math.inf or x > _EXACT:
        return x
    return math.log(max(1, math.ceil(math.exp(x) * (1 + _ROUNDING))))


def _club(constants: Sequence[float], weights: Sequence[int], samples: int) -> float:
    total = float(np.logaddexp.reduce([_ceiled(2 / 3 * c) for c in constants]))
    harmonic = float(digamma(samples) + np.euler_gamma)
    growth = _sum(_ln(12 * harmonic), -0.5 * math.log(samples), 0.5 * math.log(math.log(2 * max(weights))), 1.5 * total)
    return float(np.logaddexp(math.log(4 / samples), growth))


def _spade(constants: Sequence[float], weights: Sequence[int], samples: int) -> float:
    total = 0.0
    for constant, count in zip(constants, weights):
        beta = _ceiled(2 * (constant + math.log(len(constants))))
        total += 2 * count * (float(np.logaddexp(0.0, beta)) + psi(math.exp(min(beta, 700.0))))
    return _sum(math.log(12), -0.5 * math.log(samples), 0.5 * _ln(total))
