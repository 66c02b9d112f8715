"""Synaptic flow: a network run on the magnitudes of its weights, past norms and rectifiers, and the gradients of its outputs."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from capnas.measures.applied_weights import WeightSwap, computing_layers, is_norm
from capnas.measures.probing import linear_weights, swapped, tensor_of, untouched

_IDENTITIES = re.compile(
    "(relu6?|leakyrelu|prelu|rrelu|c?elu|selu|(quick)?gelu(tanh)?|silu|swish|mish|hard_?(tanh|swish|mish))(me)?", re.IGNORECASE
)
_GATES = re.compile("(hard)?sigmoid(me)?", re.IGNORECASE)
_ADDED = re.compile("(bias|embed\\w*|tokens?|pos\\w*)$")


def flows(model: nn.Module, inputs: Tensor, dtype: torch.dtype, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Magnitudes of the weights of convolutions and dense layers, and their gradients of ``scale R``, input and biases at ``scale``.

    ``R`` is the sum of the outputs where all parameters are replaced by their magnitudes, norms and rectifiers by the identity and the
    input by ones (Tanaka et al., NeurIPS 2020, arXiv 2006.05467); `capnas.measures.proxies.synflow` says what of it is ours.

    Args:
        model: left as it is.
        inputs: a batch (B, ...); one sample of its shape is used.
        dtype: to compute in.
        scale: s; gates count as open where it is not 1.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> ((weight, gradient),) = flows(net, torch.zeros(1, 2), torch.float64, 1.0)
    >>> bool((weight >= 0).all()), gradient.tolist()
    (True, [[1.0, 1.0]])
    """
    computing = computing_layers(model)
    inside = {id(x) for layer in computing for x in (*layer.modules(), *layer.parameters())}
    weights = {id(p) for p in linear_weights(model)} - inside
    state: dict[int, Tensor] = {}
    flowing: list[Tensor] = []
    computed: dict[int, Tensor] = {}
    for name, p in model.named_parameters():
        size = p.detach().to(dtype) if p.is_floating_point() else p.detach()
        if size.is_floating_point() and (id(p) not in inside or _ADDED.search(name)):
            size = size.abs()
        state[id(p)] = size * scale if _ADDED.search(name) else size  # what is added to the signal is scaled with it
        if id(p) in weights:
            flowing.append(state[id(p)].requires_grad_(True))
    state |= {id(b): b.detach().to(dtype) if b.is_floating_point() else b.detach().clone() for b in model.buffers()}
    modules = [m for m in model.modules() if id(m) not in inside]
    handles = [m.register_forward_hook(_pass) for m in modules if is_norm(m) or _IDENTITIES.fullmatch(type(m).__name__)]
    handles += [m.register_forward_hook(_open) for m in modules if scale != 1 and _GATES.fullmatch(type(m).__name__)]

    def magnitude(layer: nn.Module, weight: Tensor) -> Tensor:
        if id(layer) not in computed:
            computed[id(layer)] = weight.detach().abs().requires_grad_(True)
            flowing.append(computed[id(layer)])
        return computed[id(layer)]

    try:
        swap = WeightSwap(computing, magnitude) if computing else contextlib.nullcontext()
        with untouched(model), swapped(model, state), torch.enable_grad(), swap:
            ones = torch.full((1, *inputs.shape[1:]), scale, dtype=dtype, device=inputs.device)
            out = tensor_of(model(ones))
            found = torch.autograd.grad(out.sum() * scale, flowing, allow_unused=True) if flowing else ()
    finally:
        for handle in handles:
            handle.remove()
    return [(w.detach(), torch.zeros_like(w) if g is None else g) for w, g in zip(flowing, found)]


def _pass(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0] if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and args[0].shape == output.shape else output


def _open(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return torch.ones_like(output) if isinstance(output, Tensor) else output
