"""From a trial to an architecture, its cost and its name, in milliseconds; and from parameters to a real model.

A candidate is built on the meta device: no weights exist. The real model is built from the trial's parameters alone, when it is trained.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from capnas.devices import is_out_of_memory
from capnas.errors import CapnasError, SpaceError, StudyError, one_line
from capnas.graph.canonical import architecture_hash
from capnas.graph.dataflow import Trace
from capnas.graph.tracing import needs_values, trace
from capnas.measures.probing import unwrap_model
from capnas.spaces import space_name

__all__ = ["Candidate", "Cost", "Infeasible", "LayerCost", "architecture_hash", "build_candidate", "build_model", "cost_of", "count_cost"]

_OPTUNA = Path(optuna.__file__).parent


class Infeasible(CapnasError):
    """These parameters give no model; the text is the reason in one line."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Parameters that a module owns itself, and multiply-accumulates executed in it (not in its children)."""

    params: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs.

    Attributes:
        params: number of parameters, shared ones once, buffers not.
        macs: multiply-accumulates of one forward pass, half the FLOPs that torch counts; for the whole batch of the input shape.
        layers: module name -> its part, for the modules that own parameters or execute counted operations. Operations count where they
            run: those of functional attention in the attention module.
    """

    params: int
    macs: int
    layers: dict[str, LayerCost]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An architecture that can be built.

    Attributes:
        params: the trial's parameters: with the space and the sizes they are the whole genotype.
        num_classes: outputs.
        in_chans: channels of the images.
        image_size: their side in pixels.
        n_params: number of parameters.
        macs: multiply-accumulates for one image.
        hash: see `architecture_hash`.
        cost: the same by layer.
        trace: the dataflow graph for one image.
    """

    params: dict[str, Any]
    num_classes: int
    in_chans: int
    image_size: int
    n_params: int
    macs: int
    hash: str
    cost: Cost = field(repr=False, compare=False)
    trace: Trace = field(repr=False, compare=False)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes that the space took: num_classes, in_chans, image_size."""
        return {"num_classes": self.num_classes, "in_chans": self.in_chans, "image_size": self.image_size}


def cost_of(model: nn.Module, graph: Trace) -> Cost:
    """The cost of a model that has been traced already; see `count_cost`."""
    model, macs = unwrap_model(model), Counter(graph.macs)
    own = Counter({name: 0 for name, _ in model.named_modules()})
    for name, parameter in model.named_parameters():
        own[name.rpartition(".")[0]] += parameter.numel()
    layers = {n: LayerCost(params=own[n], macs=macs[n]) for n in own if own[n] or macs[n]}
    return Cost(params=own.total(), macs=macs.total(), layers=layers)


def count_cost(model: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Parameters and multiply-accumulates, in all and by layer, from shapes alone (nothing is computed, the model may be on meta).

    MACs are FLOPs / 2 with the FLOP formulas of ``torch.utils.flop_counter``: convolutions, matrix products and attention count; norms,
    activations, additions and pooling do not. Attention is counted decomposed, so that the result does not depend on the device.

    Args:
        model: any module that takes one tensor.
        input_shape: with the batch axis; with B = 1 the MACs are those of one image.

    >>> cost = count_cost(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), (1, 3, 8, 8))
    >>> cost.params, cost.macs, cost.layers["0"]
    (3106, 10656, LayerCost(params=216, macs=7776))
    """
    return cost_of(model, trace(model, input_shape))


def build_candidate(
    space: Callable[..., Any], trial: optuna.trial.BaseTrial, *, num_classes: int, in_chans: int, image_size: int
) -> Candidate:
    """Ask a space for one architecture and measure what can be known without weights.

    The space runs on the meta device; one that needs values while it builds (``.item()`` on a tensor) is built on the CPU instead, which
    is slower. torch's generator is put back afterwards.

    Args:
        space: see `capnas.spaces.SearchSpace`.
        trial: asked for the decisions.
        num_classes: outputs of the model.
        in_chans: channels of the images.
        image_size: their side in pixels.

    Raises:
        Infeasible: the space pruned the trial, or building or running the model raised an AssertionError, ValueError or RuntimeError.
        SpaceError: the space returns no model, one with lazy layers or with another output than (B, num_classes), or asks for what the
            trial cannot give or timm does not know.
        StudyError: the study's sampler cannot be used.

    >>> from capnas.spaces import load_space
    >>> trial = optuna.create_study().ask()
    >>> candidate = build_candidate(load_space("resnet"), trial, num_classes=10, in_chans=1, image_size=28)
    >>> candidate.params == trial.params, candidate.n_params > 0, len(candidate.hash)
    (True, True, 32)
    """
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "image_size": image_size}
    shape = (1, in_chans, image_size, image_size)
    with _reasons(space), torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"), _NoInitialization():
                model = _model(space, trial, sizes)
            graph = trace(model, shape)
        except (RuntimeError, ValueError, TypeError) as error:
            if not needs_values(error):
                raise
            with torch.device("cpu"):
                model = _model(space, trial, sizes)
            graph = trace(model, shape)
    shapes = [graph.nodes[i].shapes[port] if i >= 0 else shape for i, port in zip(graph.output, graph.output_ports)]
    if shapes != [(1, num_classes)]:
        raise SpaceError(
            f"the model of space {space_name(space)!r} gives outputs of shape {shapes} for an input of {shape}; "
            f"expected one of shape (1, {num_classes}): pass num_classes on to the model."
        )
    cost = cost_of(model, graph)
    return Candidate(
        params=dict(trial.params), n_params=cost.params, macs=cost.macs, hash=architecture_hash(graph), cost=cost, trace=graph, **sizes
    )


def build_model(
    space: Callable[..., Any], params: Mapping[str, Any], *, num_classes: int, in_chans: int, image_size: int, seed: int
) -> nn.Module:
    """Build the model of these parameters with real weights, on the CPU, in training mode.

    The weights are the space's own initialization, drawn from torch's generator seeded with ``seed``: equal seeds give equal weights. The
    generator is put back afterwards.

    Args:
        space: see `capnas.spaces.SearchSpace`.
        params: of a trial of this space.
        num_classes: outputs of the model.
        in_chans: channels of the images.
        image_size: their side in pixels.
        seed: of the weights.

    Raises:
        Infeasible: these parameters give no model.
        SpaceError: a parameter that the space asks for is missing, the space returns no model or one with lazy layers, or timm does not
            know one that it asks for.
    """
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "image_size": image_size}
    with _reasons(space), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return _model(space, optuna.trial.FixedTrial(dict(params)), sizes)


class _NoInitialization(TorchDispatchMode):
    """Skip in-place filling of tensors without values; its shape rules would take half of the time of a candidate."""

    filling = frozenset(
        f"aten.{op}_" for op in ("normal", "uniform", "fill", "zero", "copy", "clamp", "mul", "add", "div", "sub", "erfinv")
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta and str(func._overloadpacket) in self.filling:
            return args[0]
        return func(*args, **(kwargs or {}))


def _model(space: Callable[..., Any], trial: optuna.trial.BaseTrial, sizes: dict[str, int]) -> nn.Module:
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        model = space(trial, **sizes)
    finally:  # what a space sets for itself must not reach the training
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
    if not isinstance(model, nn.Module):
        raise SpaceError(f"the space {space_name(space)!r} must return a torch.nn.Module, got {type(model).__name__}.")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        advice = "call the model once on zeros in the space, or give sizes"
        raise SpaceError(f"the space {space_name(space)!r} returns a model whose lazy layers have no size yet: {advice}.")
    return model


@contextlib.contextmanager
def _reasons(space: Callable[..., Any]) -> Iterator[None]:
    """Turn what a space may raise into Infeasible, but not what Optuna raises (parameters that do not fit, a lost storage)."""
    try:
        yield
    except optuna.TrialPruned as error:
        raise Infeasible(one_line(error) or "pruned by the space without a reason") from error
    except SystemExit as error:
        advice = "raise optuna.TrialPruned(reason) for what cannot be built"
        raise SpaceError(f"the space {space_name(space)!r} ends the process (sys.exit): {advice}.") from error
    except (AssertionError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        if _unknown_to_timm(error):
            text = f"the space {space_name(space)!r} asks timm for what it does not know: {one_line(error).rstrip('.')}"
            raise SpaceError(f"{text}; timm.list_models() and timm.list_pretrained() list what it knows.") from error
        places = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not any(place.is_relative_to(_OPTUNA) for place in places):
            raise Infeasible(f"{type(error).__name__}: {one_line(error) or 'no message'}") from error
        if not isinstance(error, ValueError) or not places[-1].is_relative_to(_OPTUNA):
            raise
        if any(place.is_relative_to(_OPTUNA / "samplers") for place in places):
            text = f"the sampler cannot be used: {one_line(error).rstrip('.')}. Choose another, such as optuna.samplers.TPESampler."
            raise StudyError(text) from error
        raise SpaceError(f"the space {space_name(space)!r} and its trial do not agree: {_parameter(error)}{one_line(error)}") from error


def _unknown_to_timm(error: BaseException) -> bool:
    """Whether timm refused the name of a model or of its weights, which no parameter mends; it has no error of its own for that."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_by = str(frame.f_globals.get("__name__"))
    return raised_by.startswith("timm.") and str(error).startswith(("Unknown model (", "Invalid pretrained tag ("))


def _parameter(error: BaseException) -> str:
    """The name of the parameter that was asked for when Optuna raised, where its text lacks it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    name = next((f.f_locals.get("name") for f in frames if f.f_code.co_name.startswith("suggest_")), None)
    return "" if name is None or repr(name) in str(error) else f"parameter {name!r}: "
