"""How capacity passes through one layer, and the continuous limit of many residual layers.

After J. Donier, arXiv 1902.08572 and *Capacity allocation scaling* (arXiv 1903.04455), which state that propagation becomes a Markov rule
under total decoupling, and a forward equation in the limit of deep residual networks whose branches scale as depth^(-1/2). The formulas
are our derivation from those statements; bracketed numbers are equations of our specification.

Letters: J outputs of the layer, I inputs, K constraints.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capnas.errors import UsageError


def propagate_gated(constraints: Tensor, weight: Tensor, gate_cosines: Tensor) -> Tensor:
    """Capacity on the inputs of a gated linear layer with known gate statistics (20, our derivation), (I,) float64, with sum K.

    ``G = rho o (W W^T)``, ``C = V (V^T G V)^-1 V^T`` and ``kappa_i = sum_jj' C_jj' rho_jj' W_ji W_j'i``. Exact for white inputs and gates
    independent of them with unit second moment.

    Args:
        constraints: V (J, K), functions of the layer's output that training pins down; full column rank.
        weight: W (J, I), the matrix of the linear map: of a convolution (stride, padding, dilation, groups)
            ``torch.block_diag(*convolution(...).matrix())`` of `capnas.measures.convolution`, of a pooling, norm, sum or joint of such maps
            its Jacobian. J x J numbers are held, so that this is for small maps.
        gate_cosines: rho (J, J), gate Gram matrix with unit diagonal; all ones for a linear layer, the identity under total decoupling.

    Raises:
        UsageError: for shapes that do not fit.

    Example:
        >>> kappa = propagate_gated(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.eye(2))
        >>> [round(value, 6) for value in kappa.tolist()]
        [1.5, 0.5]
    """
    v, w, rho = _shapes(constraints, weight)[:2] + (gate_cosines.double(),)
    if rho.shape != (len(w), len(w)):
        raise UsageError(f"gate_cosines must have shape ({len(w)}, {len(w)}), got {tuple(gate_cosines.shape)}.")
    projector = _projector(v, rho * (w @ w.T))
    return torch.einsum("jk,ji,ki->i", projector * rho, w, w)


def propagate_partly(constraints: Tensor, weight: Tensor, decoupling: float) -> Tensor:
    """Capacity on the inputs under one scalar decoupling d (21, ours): (20) with ``rho = (1 - d) 1 1^T + d I``; (I,) float64, sum K.

    ``d = 0`` is the leverage of a linear layer, ``d = 1`` the Markov rule on the diagonal of C.

    Args:
        constraints: V (J, K).
        weight: W (J, I).
        decoupling: d in [0, 1]; use ``d_out`` of the activation.

    Raises:
        UsageError: for shapes that do not fit or d outside [0, 1].

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> [[round(x, 6) for x in propagate_partly(torch.ones(2, 1), weight, d).tolist()] for d in (0.0, 1.0)]
        [[0.8, 0.2], [0.666667, 0.333333]]
    """
    if not 0 <= decoupling <= 1:
        raise UsageError(f"decoupling must be in [0, 1], got {decoupling}.")
    count = len(weight)
    rho = torch.full((count, count), 1.0 - decoupling, dtype=torch.float64)
    rho.fill_diagonal_(1.0)
    return propagate_gated(constraints, weight, rho)


def markov_matrix(weight: Tensor, second_moment: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Transition probabilities of the Markov rule (22), which the paper states for total decoupling.

    ``P_ji = W_ji^2 s_i / (sum_i W_ji^2 s_i + b_j^2)``; the share of ``b_j^2`` leaves to the bias.

    Args:
        weight: W (J, I).
        second_moment: s (I,), ``E x_i^2``; ones when None.
        bias: b (J,); none when None.

    Returns:
        P (J, I) and the share (J,) that goes to the bias; each row of P plus its share is 1. A unit with neither weights nor bias gives
        all to the bias node.

    Example:
        >>> transition, leak = markov_matrix(torch.tensor([[1.0, 2.0]]), bias=torch.tensor([1.0]))
        >>> [round(value, 4) for value in transition[0].tolist()], round(leak.item(), 4)
        ([0.1667, 0.6667], 0.1667)
    """
    energy = weight.double().square()
    if second_moment is not None:
        energy = energy * second_moment.double()
    total = energy.sum(1) + (0 if bias is None else bias.double().square())
    transition = torch.where(total.unsqueeze(1) > 0, energy / total.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1), 0.0)
    return transition, 1 - transition.sum(1)


def propagate_markov(
    capacity: Tensor, weight: Tensor, second_moment: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, float]:
    """One Markov step (22): capacity (J,) on the outputs to capacity (I,) on the inputs, float64, and the amount taken by the bias.

    After Donier, reconstructed. Arguments as for :func:`markov_matrix`.

    >>> kappa, leak = propagate_markov(torch.ones(1), torch.tensor([[1.0, 1.0]]))
    >>> kappa.tolist(), leak
    ([0.5, 0.5], 0.0)
    """
    transition, leak = markov_matrix(weight, second_moment, bias)
    return capacity.double() @ transition, float(capacity.double() @ leak)


def residual_kernel(kernel: Tensor, strength: float, depth: int) -> Tensor:
    """One step of a residual layer with branch scale ``eps^2 = strength / depth`` (25): ``(delta + (lambda / L) p) / (1 + lambda / L)``.

    The scaling is the paper's (arXiv 1903.04455), the formula our derivation.

    Args:
        kernel: (2 u + 1,) squared branch weights over the offsets -u to u; normalised to sum 1 here.
        strength: lambda > 0.
        depth: L, the number of layers.

    Returns:
        Probabilities over the same offsets, (2 u + 1,) float64.

    Raises:
        UsageError: for a kernel that is not one-dimensional with an odd number of offsets.

    Example:
        >>> residual_kernel(torch.tensor([1.0, 0.0, 1.0]), 1.0, 1).tolist()
        [0.25, 0.5, 0.25]
    """
    if kernel.ndim != 1 or len(kernel) % 2 == 0:
        raise UsageError(f"kernel must be one-dimensional with an odd number of offsets, got shape {tuple(kernel.shape)}.")
    step = strength / depth
    centre = torch.zeros(len(kernel), dtype=torch.float64)
    centre[len(kernel) // 2] = 1.0
    return (centre + step * kernel.double() / kernel.double().sum()) / (1 + step)


def diffuse(capacity: Tensor, kernel: Tensor, strength: float, time: float = 1.0) -> Tensor:
    """Deep limit of the residual propagation on a ring (25, ours): ``d kappa / dt = lambda (p * kappa - kappa)`` solved exactly by Fourier.

    A jump process: whatever never jumps, a share ``exp(-lambda t)``, stays where it is.

    Args:
        capacity: (D,) over positions, circular.
        kernel: (2 u + 1,), as in :func:`residual_kernel`.
        strength: lambda.
        time: depth over total depth, in [0, 1].

    Returns:
        (D,) float64, with the sum of ``capacity``.

    Example:
        >>> spread = diffuse(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]), 1.0)
        >>> round(spread.sum().item(), 9), bool(spread[2] > 0.36)
        (1.0, True)
    """
    size, reach = len(capacity), len(kernel) // 2
    ring = torch.zeros(size, dtype=torch.float64)
    for offset, value in zip(range(-reach, reach + 1), kernel.double() / kernel.double().sum()):
        ring[offset % size] += value
    growth = torch.exp(strength * time * (torch.fft.fft(ring) - 1))
    return torch.fft.ifft(torch.fft.fft(capacity.double()) * growth).real


def drift_and_diffusion(kernel: Tensor, strength: float) -> tuple[float, float]:
    """Coefficients of the second-order limit (26, ours): ``m = lambda sum u p``, ``v = lambda sum u^2 p``, in offsets and squared offsets.

    The kernel (2 u + 1,) and the strength are those of :func:`residual_kernel`.

    >>> drift_and_diffusion(torch.tensor([1.0, 0.0, 1.0]), 2.0)
    (0.0, 2.0)
    """
    offsets = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    shares = kernel.double() / kernel.double().sum()
    return strength * float(offsets @ shares), strength * float(offsets.square() @ shares)


def receptive_variance(kernel_variance: Tensor, branch_share: Tensor | None = None) -> float:
    """Variance of the effective receptive field in squared pixels (27, ours): ``sum_l r_l sigma_l^2``; r_l = 1 for plain networks.

    Args:
        kernel_variance: (L,) variance of each layer's squared kernel over offsets, times the squared stride before it.
        branch_share: (L,) share of the branch in each residual sum; ones when None.

    Example:
        >>> round(receptive_variance(torch.full((4,), 2 / 3)), 3)
        2.667
    """
    shares = torch.ones_like(kernel_variance) if branch_share is None else branch_share
    return float((kernel_variance.double() * shares.double()).sum())


def _shapes(constraints: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    v, w = constraints.double(), weight.double()
    if v.ndim != 2 or w.ndim != 2 or len(v) != len(w):
        raise UsageError(f"constraints (J, K) and weight (J, I) must share J, got {tuple(constraints.shape)} and {tuple(weight.shape)}.")
    return v, w


def _projector(v: Tensor, gram: Tensor) -> Tensor:
    inner = v.T @ gram @ v
    return v @ torch.linalg.pinv(inner, hermitian=True) @ v.T
