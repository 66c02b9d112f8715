"""Run a model to score it and leave no trace: weights, buffers, gradients, modes, flags and random state come out as they went in."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capnas.errors import UsageError, described

Loss = Callable[[Tensor, Tensor], Tensor]

_PLAIN = (dict, OrderedDict, set)
# what a user's model may raise in a forward or backward pass: a score turns it into a flag, narrowing into a refusal
FAILURES = (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError, AttributeError, LookupError)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, where the model is what it returned; any other model as it is.

    Its names are those without ``_orig_mod.``. Run it within `eagerly`, since what it holds may be compiled too.

    Raises:
        UsageError: a model that TorchScript compiled, which takes no hooks, or what is no module.

    >>> net = nn.Linear(3, 2)
    >>> unwrap_model(torch.compile(net)) is net, unwrap_model(net) is net
    (True, True)
    """
    if not isinstance(model, nn.Module):
        built = f": build it first, as by timm.create_model({model!r})" if isinstance(model, str) else ""
        raise UsageError(f"the model must be a torch.nn.Module, got {type(model).__name__}{built}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "the model must be a torch.nn.Module in Python, got a torch.jit.ScriptModule, which takes no hooks. "
            "Give the module that it was scripted or traced from."
        )
    inner = model._modules.get("_orig_mod")
    return model if inner is None else unwrap_model(inner)


@contextlib.contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run what ``torch.compile`` or ``Module.compile`` compiled in a model as it is written inside, in all threads.

    A compiler takes hooks and dispatch modes as part of the model, or leaves out those that came after it.

    >>> net = nn.Linear(3, 2)
    >>> net.compile()
    >>> with eagerly(net):
    ...     net(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """
    if all("_orig_mod" not in m._modules and m._compiled_call_impl is None for m in model.modules()):
        yield  # the stance imports the compiler, which takes seconds
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks", UserWarning)
        yield


def reason(error: Exception) -> str:
    """One short line for a failure of the model.

    >>> reason(ValueError("too small"))
    'the model failed: ValueError: too small'
    """
    return f"the model failed: {described(error)}"


@contextlib.contextmanager
def untouched(model: nn.Module, *, training: bool = False, statistics: bool = False, seed: int = 0) -> Iterator[None]:
    """One mode for all modules and a fixed seed inside; modes, buffers, gradient flags and random state as before outside, error or not.

    So are dictionaries of a module's own, in which some attentions keep tensors from one call in eval mode to the next.

    Weights are the caller's duty: do not step an optimizer inside.

    Args:
        model: any.
        training: train mode; else eval mode.
        statistics: whether batch norms use the statistics of the batch in eval mode too (the published training-free scores do).
        seed: of anything random inside.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> with untouched(net, statistics=True):
    ...     net(torch.randn(8, 2)).count_nonzero().item(), net[0].training, net[1].training
    (16, True, False)
    >>> net[0].num_batches_tracked.item(), net[1].training
    (0, True)
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    modes = [(m, m.training) for m in modules]
    flags = [(p, p.requires_grad) for p in parameters]
    tables = [m._buffers for m in modules]
    buffers = [(held, k, b, None if b.is_meta else b.clone()) for held in tables for k, b in held.items() if b is not None]
    memory = [(held, dict(held)) for _, held in _dictionaries(modules)]
    try:
        with seeded(seed, (t.device for t in [*parameters, *(b for _, _, b, _ in buffers)])), eagerly(model):
            for module in modules:  # not by model.train, where some models merge or freeze weights
                module.training = training or (statistics and isinstance(module, nn.modules.batchnorm._NormBase))
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for kept, content in memory:
            kept.clear()
            kept.update(content)
        with torch.no_grad():
            for held, key, buffer, before in buffers:
                held[key] = buffer
                if before is not None:
                    buffer.data.copy_(before)  # unseen by autograd: a graph of the caller's own may hold the buffer


def _dictionaries(modules: Iterable[nn.Module]) -> list[tuple[str, dict[Any, Any]]]:
    """The dictionaries that modules hold in attributes of their own, with the names of these."""
    return [(name, held) for m in modules for name, held in vars(m).items() if type(held) is dict and not name.startswith("_")]


def cloned(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A copy of a network without the tensors that its modules keep in dictionaries from one call to the next.

    They are computed from weights: those of a pass with gradients cannot be copied, those of other weights or widths are wrong. Without
    gradients they look like constants, and are told from these by a name with "cache" in it, as in timm.

    Args:
        model: not changed.
        share: whether the copy has the same parameters, for one that has others put in their place.

    >>> net = nn.Linear(2, 2)
    >>> net.kept, net.cache, net.mean = {"weight": 2 * net.weight}, {"bias": torch.ones(2)}, {"x": torch.zeros(2)}
    >>> copied = cloned(net)
    >>> copied.kept, copied.cache, copied.mean, cloned(net, share=True).weight is net.weight
    ({}, {}, {'x': tensor([0., 0.])}, True)
    """

    def kept(name: str, value: Any) -> bool:
        return isinstance(value, Tensor) and ("cache" in name or not value.is_leaf)

    memo: dict[int, Any] = {
        id(held): {key: value for key, value in held.items() if not kept(name, value)}
        for name, held in _dictionaries(model.modules())
        if any(kept(name, value) for value in held.values())
    }
    # a module holds some ten empty containers, for hooks above all: most of what a copy of many small modules takes time for
    memo |= {id(held): type(held)() for m in model.modules() for held in vars(m).values() if type(held) in _PLAIN and not held}
    # computed weights in attributes, as the old weight and spectral norm keep them, are made anew at the next call
    memo |= {id(v): v.detach().clone() for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf}
    if share:
        memo |= {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def seeded(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """A fixed seed inside, on the CPU and these devices alone (``torch.manual_seed`` would reseed all); on CPU and CUDA as before outside.

    So are the generators of Python and NumPy, which a network of someone's own may draw from.

    >>> with seeded(1):
    ...     first = torch.rand(1)
    >>> with seeded(1):
    ...     torch.equal(first, torch.rand(1))
    True
    """
    places = set(devices)
    cuda = sorted({torch.cuda.current_device() if d.index is None else d.index for d in places if d.type == "cuda"})
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for index in cuda:
                torch.cuda.default_generators[index].manual_seed(seed)
            for kind in {d.type for d in places} - {"cpu", "cuda", "meta"}:
                torch.get_device_module(kind).manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def swapped(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters and buffers inside, wherever they are shared; the model's own outside.

    Args:
        model: any.
        replacements: ``id`` of a parameter or buffer to what stands in for it.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> with swapped(net, {id(net.weight): torch.full((1, 1), 3.0)}):
    ...     net(torch.ones(1)).item()
    3.0
    >>> isinstance(net.weight, nn.Parameter)
    True
    """
    tables: list[dict[str, Any]] = [held for m in model.modules() for held in (m._parameters, m._buffers)]
    places = [(held, key, tensor) for held in tables for key, tensor in held.items() if id(tensor) in replacements]
    try:
        for held, key, tensor in places:
            held[key] = replacements[id(tensor)]
        yield
    finally:
        for held, key, tensor in places:
            held[key] = tensor


def gradable(model: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, as copies where they come from inference mode; call it outside that mode, which ``torch.inference_mode(False)`` leaves.

    Raises:
        UsageError: the model itself was made in inference mode, so that no gradient can run through its weights.

    >>> with torch.inference_mode():
    ...     x = torch.ones(2)
    >>> x.is_inference(), gradable(nn.Identity(), x)[0].is_inference()
    (True, False)
    """
    if any(t.is_inference() for t in [*model.parameters(), *model.buffers()]):
        raise UsageError(
            "the model was made under torch.inference_mode(): its weights take no gradient, and outside of it no change. "
            "Build or load it outside."
        )
    return tuple(t.clone() if t.is_inference() else t for t in tensors)


def linear_weights(model: nn.Module) -> list[Tensor]:
    """Weights of convolutions and dense layers, each once, parametrized ones by their originals.

    >>> [tuple(w.shape) for w in linear_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))]
    [(2, 3)]
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    found = [p for m in layers for n, p in m.named_parameters() if n != "bias" and p.is_floating_point()]
    return list({id(p): p for p in found}.values())


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in tuples, lists and dictionaries, or None where they hold none.

    >>> first_tensor({"aux": None, "logits": (torch.ones(2), None)}).shape
    torch.Size([2])
    """
    return output if isinstance(output, Tensor) else next(tensors_in(output), None)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dictionaries and in subclasses of these, in order.

    >>> [len(t) for t in tensors_in({"logits": (torch.ones(2), None), "aux": torch.ones(3)})]
    [2, 3]
    """
    if isinstance(output, Tensor):
        yield output
        return
    for part in output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ():
        yield from tensors_in(part)


def tensor_of(output: Any) -> Tensor:
    """The first tensor of what a model puts out.

    Raises:
        UsageError: it holds none.

    >>> tensor_of((None, torch.ones(2))).shape
    torch.Size([2])
    """
    if (found := first_tensor(output)) is None:
        raise UsageError(f"the model must put out a tensor, alone or in tuples, lists and dictionaries; got {type(output).__name__}.")
    return found


def why_no_logits(model: nn.Module, images: Tensor, classes: int | None = None) -> str | None:
    """Why what a model puts out in eval mode is no logits of the images, or None.

    Args:
        model: left as it is.
        images: (B, C, H, W) on its device.
        classes: how many the images have; None where that is not known.

    >>> why_no_logits(nn.Flatten(), torch.zeros(2, 1, 1, 3), 4)
    'it tells 3 classes apart and the images have 4'
    """
    try:
        with untouched(model), torch.no_grad():
            got = model(images)
    except FAILURES as error:
        return f"it does not run on images of shape {tuple(images.shape)} ({described(error)})"
    if not isinstance(got, Tensor):
        return f"its output is a {type(got).__name__}; wrap it so that it gives one tensor of logits (B, classes)"
    if got.dim() != 2 or len(got) != len(images):
        return f"its output has the shape {tuple(got.shape)}, expected logits ({len(images)}, classes)"
    fewer = classes is not None and got.shape[1] < classes
    return f"it tells {got.shape[1]} classes apart and the images have {classes}" if fewer else None


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

    Raises:
        UsageError: no inputs, of which torch makes a loss of NaN and gradients of 0.

    >>> [(w.shape == g.shape) for w, g in weight_gradients(nn.Linear(3, 2), torch.ones(4, 3), None, None)]
    [True]
    """
    if not len(inputs):
        raise UsageError("the batch holds no inputs.")
    weights = linear_weights(model)
    for weight in weights:
        weight.requires_grad_(True)
    with torch.enable_grad():
        with forward or contextlib.nullcontext():
            # never channels last, where oneDNN overruns a buffer for weights of strided 1x1 convolutions (uxlfoundation/oneDNN#6035)
            output = tensor_of(model(inputs.contiguous()))
        if targets is None:
            targets = torch.randint(output.shape[1], (len(inputs),), generator=torch.Generator().manual_seed(seed)).to(output.device)
        value = (loss or nn.functional.cross_entropy)(output, targets)
        found = torch.autograd.grad(value, weights, allow_unused=True) if weights else ()
    return [(w.detach(), torch.zeros_like(w) if g is None else g) for w, g in zip(weights, found)]
