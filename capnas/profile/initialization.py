"""Networks as torch starts them, whatever their authors chose, so that untrained networks can be compared."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from capnas.measures.probing import FAILURES, cloned, seeded

_LAYER_SCALE = re.compile(r"(.*\.)?(gamma\d?|gamma_\w+|ls\d|layer_scale\w*(\.\w+)?)")
_GAIN = re.compile(r"(.*\.)?(skipinit_)?gain")


def at_default_initialization(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of a model whose layers start as torch starts them, whatever the model's authors chose.

    Every module without others inside is reset by its own ``reset_parameters`` in the order of the modules. Then, in the same order, so is
    every one with others inside and parameters of its own, by that method or ``_reset_parameters`` (of `nn.MultiheadAttention`), which
    changes no parameter of those inside, and every parametrized layer, through the right inverse of its parametrization. Norms and gains
    that start at zero and layer scales that start small, which switch residual branches off, start at one. Parameters that no such method
    sets stay: most class tokens and position codes, weights under the old ``weight_norm``; `profile_model` flags them. A model that lies on
    one device starts from numbers of the CPU's generator, so that all devices give the same weights.

    >>> layer = nn.utils.skip_init(nn.Linear, 4, 2)
    >>> first, second = (at_default_initialization(nn.Sequential(layer), seed=3) for _ in range(2))
    >>> bool((first[0].weight == second[0].weight).all()), float(first[0].weight.detach().abs().max()) <= 0.5
    (True, True)
    """
    fresh = copied(model)
    restart(fresh, seed)
    return fresh


@torch.inference_mode(False)  # else no gradient could run through the copy
def copied(model: nn.Module) -> nn.Module:
    """A copy whose weights may be drawn anew, see `restart`."""
    return cloned(model)


@torch.inference_mode(False)
def restart(fresh: nn.Module, seed: int) -> tuple[str, ...]:
    """Start a network in place, as `at_default_initialization` does, and name the parameters that nothing set.

    Started again, a copy has the weights of that seed; gains that are one by now count as set the first time alone.
    """
    devices = {p.device for p in fresh.parameters()}
    if len(devices) == 1:
        fresh.cpu()
    written: set[int] = set()
    with seeded(seed, devices), torch.no_grad():
        for module in fresh.modules():
            if callable(getattr(module, "reset_parameters", None)) and not any(module.children()):
                written |= _written(module, module.reset_parameters)  # type: ignore[arg-type]
        for module in fresh.modules():
            written |= _reset_around(module) if any(module.children()) else set()
        for name, parameter in fresh.named_parameters():
            scale = _LAYER_SCALE.fullmatch(name) and parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
            if scale or (_GAIN.fullmatch(name) and not parameter.any()):
                parameter.fill_(1.0)
                written.add(id(parameter))
    kept = tuple(name for name, parameter in fresh.named_parameters() if id(parameter) not in written)
    if len(devices) == 1:
        fresh.to(devices.pop())
    return kept


def _written(module: nn.Module, reset: Callable[[], object], recurse: bool = False) -> set[int]:
    """Ids of the module's parameters that a reset writes to, whatever it writes."""
    before = {id(p): p._version for p in module.parameters(recurse)}
    reset()
    return {id(p) for p in module.parameters(recurse) if p._version != before.get(id(p))}


def _reset_around(module: nn.Module) -> set[int]:
    """Reset the own parameters of a module with others inside, where it knows how; ids of those that were set."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    with contextlib.suppress(*FAILURES):  # methods of any author, and parametrizations without a right inverse
        if callable(reset) and parametrize.is_parametrized(module):
            return _written(module, lambda: _reset_parametrized(module, reset), recurse=True)
        if callable(reset) and any(True for _ in module.parameters(recurse=False)):
            inner = [(p, p.clone()) for child in module.children() for p in child.parameters()]
            try:
                return _written(module, reset)
            finally:
                for parameter, value in inner:  # set by their own modules, where the authors' choice does not count
                    parameter.copy_(value)
    return set()


def _reset_parametrized(module: nn.Module, reset: Callable[[], object]) -> None:
    with parametrize.cached():  # the reset writes into the computed tensors, which go back to what they are computed from
        reset()
        for name in module.parametrizations:  # type: ignore[union-attr]
            setattr(module, name, getattr(module, name))
