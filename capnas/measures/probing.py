"""Run a model to score it and leave no trace: weights, buffers, gradients, modes, flags and random state come out as they went in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

# what a user's model may raise in a forward or backward pass: a score turns it into a flag
FAILURES = (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError, AttributeError, LookupError)


def reason(error: Exception) -> str:
    """One short line for a failure of the model.

    >>> reason(ValueError("too small"))
    'the model failed: ValueError: too small'
    """
    return f"the model failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


@contextlib.contextmanager
def untouched(model: nn.Module, *, statistics: bool = False) -> Iterator[None]:
    """Eval mode and a fixed seed inside; modes, buffers, gradient flags and random state as before outside.

    Args:
        model: any.
        statistics: whether batch norms use the statistics of the batch (the published training-free scores do).

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> with untouched(net, statistics=True):
    ...     net(torch.randn(8, 2)).count_nonzero().item(), net[0].training, net[1].training
    (16, True, False)
    >>> net[0].num_batches_tracked.item(), net[1].training
    (0, True)
    """
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta]
    devices = {t.device.index or 0 for t in [*model.parameters(), *model.buffers()] if t.is_cuda}
    try:
        for module, _ in modes:
            module.training = statistics and isinstance(module, nn.modules.batchnorm._NormBase)
        with torch.random.fork_rng(devices=sorted(devices)):
            torch.manual_seed(0)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def linear_weights(model: nn.Module) -> list[Tensor]:
    """Weights of convolutions and dense layers, each once, parametrized ones by their originals.

    >>> [tuple(w.shape) for w in linear_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))]
    [(2, 3)]
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    found = [p for m in layers for n, p in m.named_parameters() if n != "bias" and p.is_floating_point()]
    return list({id(p): p for p in found}.values())


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output, whatever it is wrapped in.

    >>> first_tensor({"logits": (torch.ones(2), None)}).shape
    torch.Size([2])
    """
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def weight_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None,
    loss: Loss | None,
    *,
    seed: int = 0,
    forward: contextlib.AbstractContextManager[Any] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (weight, gradient of the loss in it) for `linear_weights`; random classes stand in for absent targets. Call it in `untouched`.

    The model runs inside the context ``forward``, for what else is read on the way.

    >>> [(w.shape == g.shape) for w, g in weight_gradients(nn.Linear(3, 2), torch.ones(4, 3), None, None)]
    [True]
    """
    weights = linear_weights(model)
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        with forward or contextlib.nullcontext():
            # never channels last, where oneDNN overruns a buffer for weights of strided 1x1 convolutions (uxlfoundation/oneDNN#6035)
            output = first_tensor(model(inputs.contiguous()))
        if targets is None:
            targets = torch.randint(output.shape[1], (len(inputs),), generator=torch.Generator().manual_seed(seed)).to(output.device)
        value = (loss or nn.functional.cross_entropy)(output, targets)
        found = torch.autograd.grad(value, weights, allow_unused=True) if weights else ()
    return [(w.detach(), torch.zeros_like(w) if g is None else g) for w, g in zip(weights, found)]
