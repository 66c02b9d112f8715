"""Linear one-dimensional architectures as maps from parameters to an impulse response, and their closed-form capacities.

These are the settings in which capacity allocation is exact (after arXiv 1902.04485, whose own architectures and figures we have not seen:
the choice here is ours). A response is ``phi`` (D,), indexed by lag; all maps are differentiable, so that ``torch.func.jacrev`` gives the
Jacobian that :mod:`capnas.measures.allocation` reads. Bracketed numbers are equations of our specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from capnas.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LinearArchitecture:
    """A linear causal model: ``response`` maps parameters (P,) to lags (D,); ``start`` draws P starting values."""

    name: str
    n_params: int
    length: int
    response: Callable[[Tensor], Tensor]
    start: Callable[[torch.Generator], Tensor]

    def jacobian(self, theta: Tensor) -> Tensor:
        """Derivative of the response by the parameters, (D, P)."""
        return torch.func.jacrev(self.response)(theta)


def window(length: int, width: int) -> LinearArchitecture:
    """One causal convolution over ``length`` lags with ``width`` taps, its parameters (ours); equal numbers: fully connected (12).

    >>> window(4, 2).response(torch.tensor([3.0, 5.0])).tolist()
    [3.0, 5.0, 0.0, 0.0]
    """

    def response(theta: Tensor) -> Tensor:
        return torch.nn.functional.pad(theta, (0, length - width))

    return LinearArchitecture(name=f"window {width}", n_params=width, length=length, response=response, start=_normal(width))


def dilated_stack(length: int, dilations: Sequence[int], *, channels: int = 1, kernel: int = 2) -> LinearArchitecture:
    """Causal convolutions in series, ``channels`` wide between one input and one output channel. Ours.

    Parameters are the layers in order, each (out, in, kernel) flattened. Lags beyond ``length`` are cut off. With all dilations 1 this is
    the dense stack of (13), with dilations 1, 2, 4, ... and kernel 2 the tensor train of (14).

    Args:
        length: D, lags of the response.
        dilations: of each layer, from the input on.
        channels: C of the layers between.
        kernel: taps of each layer.

    Raises:
        UsageError: without a layer.

    >>> dilated_stack(4, (1, 2)).response(torch.tensor([1.0, 10.0, 1.0, 100.0])).tolist()
    [1.0, 10.0, 100.0, 1000.0]
    """
    if not dilations:
        raise UsageError("dilations must name at least one layer, got an empty sequence.")
    widths = [1] + [channels] * (len(dilations) - 1) + [1]
    shapes = [(out, inp, kernel) for inp, out in pairwise(widths)]
    sizes = [out * inp * taps for out, inp, taps in shapes]

    def response(theta: Tensor) -> Tensor:
        signal = torch.zeros(1, length, dtype=theta.dtype)
        signal[0, 0] = 1.0
        for weight, shape, dilation in zip(theta.split(sizes), shapes, dilations):
            taps = weight.reshape(shape)
            shifted = [torch.nn.functional.pad(signal, (tap * dilation, 0))[:, :length] for tap in range(kernel)]
            signal = torch.einsum("oik,kin->on", taps, torch.stack(shifted))
        return signal[0]

    def start(generator: torch.Generator) -> Tensor:
        parts = [torch.randn(size, generator=generator, dtype=torch.float64) / shape[1] ** 0.5 for size, shape in zip(sizes, shapes)]
        return torch.cat(parts)

    name = f"dilated {','.join(map(str, dilations))} x{channels}"
    return LinearArchitecture(name=name, n_params=sum(sizes), length=length, response=response, start=start)


def diagonal_rnn(length: int, states: int) -> LinearArchitecture:
    """Diagonal linear recurrence ``phi_tau = sum_h b_h a_h^tau`` with poles ``a = tanh(u)``; parameters are u, then the gains b.

    Ours. The tanh keeps training stable and leaves the allocation unchanged, which no invertible reparametrisation affects (8).

    >>> theta = torch.cat([torch.tensor([0.5]).atanh(), torch.tensor([4.0])])
    >>> diagonal_rnn(3, 1).response(theta).tolist()
    [4.0, 2.0, 1.0]
    """

    def response(theta: Tensor) -> Tensor:
        poles, gains = torch.tanh(theta[:states]), theta[states:]
        # a running product, not a power: the derivative of a ** tau is undefined at a = 0
        powers = torch.cumprod(torch.cat([torch.ones(1, states, dtype=theta.dtype), poles.expand(length - 1, states)]), 0)
        return powers @ gains

    def start(generator: torch.Generator) -> Tensor:
        memory = length ** torch.rand(states, generator=generator, dtype=torch.float64)  # time constants from 1 to length
        signs = 1.0 - 2.0 * (torch.rand(states, generator=generator, dtype=torch.float64) < 0.5)
        gains = torch.randn(states, generator=generator, dtype=torch.float64) / states**0.5
        return torch.cat([torch.atanh(signs * torch.exp(-1 / memory)), gains])

    return LinearArchitecture(name=f"diagonal RNN {states}", n_params=2 * states, length=length, response=response, start=start)


def dense_rnn(length: int, states: int) -> LinearArchitecture:
    """Linear recurrence ``phi_tau = c^T A^tau b`` over D = ``length`` lags, of capacity min(D, 2 states) (16).

    Ours. The parameters (states^2 + 2 states,) are A (states, states) flattened, b (states,) and c (states,).

    >>> dense_rnn(3, 1).response(torch.tensor([0.5, 2.0, 2.0])).tolist()
    [4.0, 2.0, 1.0]
    """
    count = states * states + 2 * states

    def response(theta: Tensor) -> Tensor:
        matrix, vector, readout = theta[: states * states].reshape(states, states), theta[-2 * states : -states], theta[-states:]
        lags = []
        for _ in range(length):
            lags.append(readout @ vector)
            vector = matrix @ vector
        return torch.stack(lags)

    def start(generator: torch.Generator) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64) * 0.8 / states**0.5

    return LinearArchitecture(name=f"dense RNN {states}", n_params=count, length=length, response=response, start=start)


def averaged_conv(length: int, kernel: int) -> LinearArchitecture:
    """A convolution without padding followed by the mean over positions (17): all but one unit of its capacity sits on the borders. Ours.

    The parameters (kernel,) are the taps; the response (length,) is, for each cell, the sum of the taps that reach it over the positions.

    >>> averaged_conv(4, 2).response(torch.tensor([3.0, 6.0])).tolist()
    [1.0, 3.0, 3.0, 2.0]
    """

    def response(theta: Tensor) -> Tensor:
        positions = length - kernel + 1
        counts = torch.zeros(length, kernel, dtype=theta.dtype)
        for tap in range(kernel):
            counts[tap : tap + positions, tap] = 1 / positions
        return counts @ theta

    return LinearArchitecture(name=f"averaged conv {kernel}", n_params=kernel, length=length, response=response, start=_normal(kernel))


def stack_capacity(kernels: Sequence[int]) -> int:
    """Capacity of a one-channel stack of dense convolutions (13): taps minus scale redundancy, which is also its receptive field. Ours.

    >>> stack_capacity([3] * 6)
    13
    """
    return sum(kernels) - (len(kernels) - 1)


def tensor_train_capacity(levels: int, channels: int) -> int:
    """Capacity of a dilated stack of kernel 2 (14): the dimension of the manifold of tensor trains with capped ranks.

    The dimension formula is that of Holtz, Rohwedder and Schneider (2012).

    >>> [tensor_train_capacity(6, channels) for channels in (1, 2, 3, 4, 8)]
    [7, 20, 33, 48, 64]
    """
    ranks = [min(channels, 2**level, 2 ** (levels - level)) for level in range(levels + 1)]
    ranks[0] = ranks[-1] = 1
    return sum(2 * left * right for left, right in pairwise(ranks)) - sum(rank * rank for rank in ranks[1:-1])


def dilated_allocation(weights: Tensor) -> Tensor:
    """Allocation over the 2^L lags of a one-channel stack of kernel 2 and dilations 1, 2, 4, ... on white input (15). Ours.

    Args:
        weights: (L, 2) taps, the layer of dilation 1 first.

    Returns:
        (2^L,) float64, with sum L + 1.

    Example:
        >>> dilated_allocation(torch.ones(2, 2)).tolist()
        [0.75, 0.75, 0.75, 0.75]
    """
    squares = weights.to(torch.float64).square()
    shares = squares / squares.sum(1, keepdim=True)
    levels = torch.arange(len(weights))
    bits = (torch.arange(2 ** len(weights)).unsqueeze(1) >> levels) & 1
    chosen = shares[levels, bits]  # (2^L, L)
    # sum over layers of the product of the other layers' shares times (1 - own share): finite when a tap is zero
    others = torch.stack([torch.cat([chosen[:, :level], chosen[:, level + 1 :]], 1).prod(1) for level in range(len(weights))], 1)
    return chosen.prod(1) + (others * (1 - chosen)).sum(1)


def _normal(count: int) -> Callable[[torch.Generator], Tensor]:
    def start(generator: torch.Generator) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    return start
