"""Running statistics of batch norms, measured anew where a training has too few updates to carry them along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from capnas.recording import hooked


def running_norms(model: nn.Module) -> list[str]:
    """Batch norms that keep running moments."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of (B, C, ...), with N and not N - 1 below, as a batch norm uses them.

    >>> [v.tolist() for v in channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))]
    [[2.0, 5.0], [1.0, 0.0]]
    """
    axes = [i for i in range(x.dim()) if i != 1]
    return x.mean(axes), x.var(axes, unbiased=False)


def measure_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the running mean and variance of every batch norm anew, in place, as the mean over batches.

    A running average forgets its first value by a tenth an update: after ten updates a third of it is still there, and what it has seen
    is of weights that have changed since, so that a network that has learned can be at chance in eval mode. (Known as precise batch
    norm: Wu and Johnson, arXiv 2105.07576, section 3. Here each layer reads what the layers before it give in eval mode.)

    Args:
        model: left in eval mode.
        batches: (B, C, H, W) each, on the model's device; of equal weight.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(1))
        >>> measure_norms(net, [torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)])
        >>> net[0].running_mean.item(), net[0].running_var.item()
        (2.0, 1.0)
    """
    seen: Counter[nn.Module] = Counter()

    def measure(module: Any, args: Any) -> None:
        seen[module] += 1
        for running, found in zip((module.running_mean, module.running_var), channel_moments(args[0].float())):
            running.lerp_(found.to(running.dtype), 1 / seen[module])

    model.eval()
    with torch.no_grad(), hooked(dict.fromkeys(running_norms(model), measure), model, before=True):
        for x in batches:
            model(x)
