"""What cannot be narrowed at all, said before anything is measured: kinds of modules, weights, outputs, paths that depend on the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from capnas.candidates import Cost, count_cost
from capnas.errors import CapnasError, described
from capnas.graph.tracing import needs_values
from capnas.layers import is_quantized
from capnas.measures.probing import FAILURES, untouched, unwrap_model, why_no_logits


class CannotNarrow(CapnasError):
    """A network, or a layer of it, whose width cannot be changed; the text says why."""


def check_modules(model: nn.Module) -> nn.Module:
    """Refuse modules that cannot be copied, read or changed; nothing is run.

    Returns:
        The model, of a compiled one what was compiled.

    Raises:
        CannotNarrow: a ScriptModule, a quantized or lazy module, or a weight that another module or a hook computes.

    >>> check_modules(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    if lazy := [name for name, tensor in model.named_parameters() if is_lazy(tensor)]:
        raise _refused(model, f"{lazy[0]} has no shape yet; run the lazy network on one batch first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise _refused(model, f"{name or 'it'} is a ScriptModule; give the network that it was scripted or traced from")
        if is_quantized(module):
            kind = type(module).__name__
            raise _refused(model, f"{name or 'it'} is a quantized {kind}; narrow the network first and quantize it after")
        for leaf, value in vars(module).items():
            derived = isinstance(value, Tensor) and (not value.is_leaf or {f"{leaf}_orig", f"{leaf}_v"} & module._parameters.keys())
            if derived:
                place = f"{name}.{leaf}" if name else leaf
                raise _refused(
                    model,
                    f"{place} is computed from other tensors; make it a parameter: torch.nn.utils.prune.remove for a mask, "
                    "remove_spectral_norm or remove_weight_norm for such a norm",
                )
    return unwrap_model(model)


def check_weights(model: nn.Module) -> None:
    """Refuse weights that a parametrization computes from others: whoever changes their width would have to change those.

    Raises:
        CannotNarrow: it says how to make them parameters.

    >>> check_weights(nn.Linear(2, 2))
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            leaf = next(iter(module.parametrizations))
            how = f'torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule("{name}"), "{leaf}") makes it a parameter'
            raise _refused(model, f"{name}.{leaf} is computed by a parametrization; {how}")


def check_network(model: nn.Module, example: Tensor, *, classes: int | None = None) -> Cost:
    """Refuse a network of which nothing could be measured.

    Args:
        model: not changed.
        example: (B, C, H, W) an input on the model's device.
        classes: that its outputs must tell apart at least; None where that is not known.

    Returns:
        Its cost.

    Raises:
        CannotNarrow: see `check_modules`; broken weights, weights of another type than the images, outputs that are no logits, too few or
            random, or a path that depends on the data.
    """
    check_modules(model)
    if (reason := _unfit(model, example, classes)) is not None:
        raise _refused(model, reason)
    return _fixed_cost(model, example)


def _fixed_cost(model: nn.Module, example: Tensor) -> Cost:
    """The cost of one image, of a network that executes the same operations for every image of a shape.

    Args:
        model: not changed.
        example: (B, C, H, W) an input.

    Raises:
        CannotNarrow: its cost cannot be counted from shapes, as where its path depends on the data.
    """
    try:
        return count_cost(model, (1, *example.shape[1:]))
    except FAILURES as error:
        why = "its path depends on the data" if needs_values(error) else "its cost cannot be counted"
        raise _refused(model, f"{why} ({described(error)})") from error


def why_uncalled(model: nn.Module, example: Tensor, names: Sequence[str]) -> dict[str, str]:
    """Of layers that a network does not call: whether it reads their weights itself, as some attentions do, or leaves them out.

    Args:
        model: not changed.
        example: (B, C, H, W) an input.
        names: of conv and linear layers that were not called.

    >>> class Read(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.read, self.left = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x @ self.read.weight
    >>> why_uncalled(Read(), torch.ones(1, 2), ["read", "left"])
    {'read': 'the network reads its weights and does not call it', 'left': 'the network does not call it'}
    """
    weights = {n: w for n in names if isinstance(w := model.get_submodule(n).weight, nn.Parameter)}
    wanted = [(w, w.requires_grad) for w in weights.values()]
    gradients: Sequence[Tensor | None] = ()
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with untouched(model, training=False), torch.enable_grad():
            if weights and (output := model(example)).requires_grad:
                gradients = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
    finally:
        for weight, state in wanted:
            weight.requires_grad_(state)
    read = {n for n, gradient in zip(weights, gradients) if gradient is not None}
    return {n: f"the network {'reads its weights and ' if n in read else ''}does not call it" for n in names}


def _refused(model: nn.Module, reason: str) -> CannotNarrow:
    return CannotNarrow(f"cannot narrow this {type(model).__name__}: {reason}.")


def _unfit(model: nn.Module, example: Tensor, classes: int | None) -> str | None:
    """Why nothing could be measured: broken weights, weights of another type than the images, outputs that are no logits; or None."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != example.dtype:
            return f"{name} is {tensor.dtype} and the images are {example.dtype}; give both one type, such as model.float()"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or infinity; give weights of a training that did not diverge"
    for name, buffer in model.named_buffers():
        if bool(torch.isnan(buffer).any()):  # not infinity, which masks hold
            return f"{name} holds NaN; give weights of a training that did not diverge"
    if (why := why_no_logits(model, example, classes)) is not None:
        return why
    with untouched(model), torch.no_grad():
        got, again = model(example), model(example)
    if not bool(torch.isfinite(got).all()):
        return "its outputs are not finite on the images"
    return "its outputs are random in eval mode: one image gives two; switch its noise off in eval mode" if differ(got, again) else None


def differ(got: Tensor, expected: Tensor) -> bool:
    """Whether outputs are further apart than rounding takes them."""
    return float((got - expected).abs().max()) > 1e-3 * float(expected.abs().max()) + 1e-6
