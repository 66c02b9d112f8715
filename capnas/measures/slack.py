"""Capacity slack: cheap stand-ins for excess capacity, for one number per candidate in a search. Ours, not the paper's.

The excess capacity of Graf et al. (`capnas.measures.excess`) needs a grid of constrained trainings. A search can afford what one short
training, or one gradient, shows: how small a share of an a-priori class of weights the training needed. The class is the set of weights
within one *initial radius* r = || K0 ||_{2,1} of initialization, in every layer: as far as the layer's own initial size. Both numbers grow
with width and shrink with the learning rate and the length of the training, so compare candidates only under one recipe, and beside the
parameter count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capnas.errors import UsageError
from capnas.measures.excess import group_norm_21


@dataclass(frozen=True, kw_only=True)
class LayerMotion:
    """How a short training moved one layer.

    Attributes:
        norm_start: operator norm at initialization.
        norm_end: operator norm after the training.
        distance: (2,1) distance travelled, `distance_to_init`.
        radius: (2,1) norm of the initial weight, `group_norm_21`.
    """

    norm_start: float
    norm_end: float
    distance: float
    radius: float


def slack_decades(layers: Sequence[LayerMotion]) -> float:
    """Decades between the class of one initial radius and the smallest class that holds the trained weights.

    -log10( (sum (b/s)^(2/3))^(3/2) / (sum (r/s)^(2/3))^(3/2) * G ): the ratio of the sums of the paper's first bound (Theorem 3.5, leading
    term, one margin on both sides) at the distances b and at the radii r, and the growth G of the norms, the geometric mean over layers of
    max(1, s_end / s_start). The bound itself takes the product over layers; the mean keeps deep networks comparable with shallow ones.
    Layers whose final norm is 0 carry nothing and are left out.

    Returns:
        Positive when the training needed less than the class, 0 when it used it up, inf when no layer moved.

    Raises:
        UsageError: without a layer that has a norm, or with a value that is negative or not finite.

    >>> layer = LayerMotion(norm_start=1.0, norm_end=1.0, distance=0.5, radius=5.0)
    >>> round(slack_decades([layer, layer]), 6)
    1.0
    """
    for layer in layers:
        if not all(0 <= v < math.inf for v in (layer.norm_start, layer.norm_end, layer.distance, layer.radius)):
            raise UsageError(f"layer motion must be finite and not negative; got {layer}.")
    live = [layer for layer in layers if layer.norm_end > 0]
    if not live:
        raise UsageError("capacity slack needs at least one layer with a norm above 0; got none.")
    used = sum((layer.distance / layer.norm_end) ** (2 / 3) for layer in live)
    given = sum((layer.radius / layer.norm_end) ** (2 / 3) for layer in live)
    growing = [layer for layer in live if layer.norm_start > 0]
    growth = sum(math.log10(max(1.0, layer.norm_end / layer.norm_start)) for layer in growing) / max(len(growing), 1)
    if used == 0 or given == 0:
        return math.inf if used == 0 else -math.inf
    return 1.5 * (math.log10(given) - math.log10(used)) - growth


def capacity_slack(layers: Sequence[LayerMotion], *, fit: float = 1.0) -> float:
    """How much of the a-priori class a short training left unused, in [0, 1]; more is more excess capacity. Ours, a proxy.

    fit / (1 + 10^-decades) with `slack_decades`: 1 when the task was learnt without moving, 0.5 when it took as much as the initial radius,
    towards 0 when the weights left it far behind or nothing was learnt. Excess capacity only counts where the error holds, hence the
    factor.

    Args:
        layers: the trained weight layers; leave fixed ones out.
        fit: share of the task that the training solved, in [0, 1]: the training accuracy, or a margin relative to the spread of the logits.
            1 leaves it out, for use beside an accuracy objective.

    Raises:
        UsageError: see `slack_decades`; and for fit outside [0, 1].

    >>> moved = LayerMotion(norm_start=1.0, norm_end=1.0, distance=1.0, radius=1.0)
    >>> round(capacity_slack([moved]), 6), round(capacity_slack([moved], fit=0.5), 6)
    (0.5, 0.25)
    """
    if not 0 <= fit <= 1:
        raise UsageError(f"fit must be in [0, 1]; got {fit}.")
    return fit * _logistic(slack_decades(layers) * math.log(10))


def first_order_slack(weights: Sequence[Tensor], gradients: Sequence[Tensor], *, margin: float = 1.0) -> float:
    """Slack without training, in [0, 1]: the share of the class that a linearised network does not need to raise its mean margin. Ours.

    Within u initial radii of every layer the mean margin m grows, to first order, by at most u sum_i r_i || dm/dK_i ||_{2,inf}, since the
    largest group norm is dual to the sum of group norms. So u = margin / sum_i r_i || dm/dK_i ||_{2,inf} is the least share of the class
    that can bring `margin`, and the slack is 1 / (1 + u). It ignores curvature and interference between samples, hence is optimistic.

    Args:
        weights: initial weights, (C_out, C_in / groups, *kernel) or (out, in).
        gradients: gradients of the mean of `margins` over a batch, of the same shapes.
        margin: rise asked for, in units of the logits; the standard deviation of the initial logits makes the slack independent of their
            scale.

    Raises:
        UsageError: for a margin that is not positive, lists that do not match or gradients that are not finite.

    >>> weight, gradient = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.2]])
    >>> round(first_order_slack([weight], [gradient], margin=1.0), 6)  # u = 1 / (5 * 0.2)
    0.5
    """
    if not 0 < margin < math.inf:
        raise UsageError(f"margin must be positive; got {margin}.")
    if len(weights) != len(gradients) or any(w.shape != g.shape for w, g in zip(weights, gradients)):
        raise UsageError("weights and gradients must match in number and shapes; pass one gradient per weight.")
    reach = sum(
        group_norm_21(weight) * float(torch.linalg.vector_norm(gradient.detach().double(), dim=1).max())
        for weight, gradient in zip(weights, gradients)
    )
    if not math.isfinite(reach):
        raise UsageError("weights and gradients must be finite; the margin of the network overflows at initialization.")
    return reach / (reach + margin)


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
