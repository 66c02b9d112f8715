"""Profile a model on a batch and leave it as it was: weights, buffers, mode, gradients, hooks and random state."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from capnas.errors import CapnasError, UsageError, one_of
from capnas.graph.tracing import Trace, trace
from capnas.measures.probing import FAILURES, cloned, gradable, reason, seeded, untouched, unwrap_model
from capnas.measures.saturation import THRESHOLD
from capnas.profile.enriching import enrich, with_params
from capnas.profile.rows import MEASURES, Profile, averaged
from capnas.recording import LayerRecord, Reading, Recorder

INITIALIZATIONS = 2  # of a candidate in a search: which weights are drawn is most of the noise of its saturations (results/ranking)
_WRAP = "Wrap a model of several or named inputs in a module that takes one tensor."
_LAYER_SCALE = re.compile(r"(.*\.)?(gamma\d?|gamma_\w+|ls\d|layer_scale\w*(\.\w+)?)")
_GAIN = re.compile(r"(.*\.)?(skipinit_)?gain")


def profile_model(
    model: nn.Module,
    inputs: Tensor | Iterable[Tensor | Sequence[Tensor]],
    targets: Tensor | None = None,
    *,
    measures: str | Sequence[str] | None = None,
    threshold: float = THRESHOLD,
    reading: Reading = "both",
    blocks: str | None = None,
    mode: Literal["train", "eval"] | None = None,
    values_per_call: int | None = None,
    initialize: int = 0,
    graph: Trace | None = None,
    pixels: bool = True,
    exact_capacity: bool | None = None,
    seed: int = 0,
) -> Profile:
    """Profile a model on a batch of inputs, leaving the model untouched.

    Args:
        model: any module that maps one tensor of inputs to outputs; a compiled one is read as it was before.
        inputs: one batch (B, C, H, W) on the model's device, a pair of a batch and its classes (B,), or an iterable of either, such as a
            ``DataLoader``, which is kept in memory. Saturation pools them all; every other measure sees the first batch only.
        targets: (B,) classes, for measures that need a loss: of the first batch, or of all batches in order; those of the pairs if absent.
        measures: any of `MEASURES`, or "all"; "saturation" and, where the model can be traced, "structure" when absent. "saturation" is
            always read; "structure" adds the layer algebra and receptive fields from the traced graph, "norms" operator norms, "capacity"
            capacity allocation (one to four backward passes), "proxies" the published baselines synflow, naswot, zico, snip, grad_norm,
            params and macs.
        threshold: share of the variance that the intrinsic dimension explains.
        reading: "modules", "blocks" or "both".
        blocks: regular expression naming the units to read as blocks.
        mode: "train" (batch statistics, the reading for networks at initialization) or "eval"; the model's own mode when absent.
        values_per_call: bound on what is read per layer and batch, see `Recorder`; every row when absent.
        initialize: how many copies at torch's default initialization to profile instead of the model, see `at_default_initialization`;
            True is one. Scores of untrained networks that are to be compared need one way to start them; a search measures all its
            candidates so, with `INITIALIZATIONS`. Several copies are of the seeds from `seed` on; saturations are means over them, see
            `capnas.profile.averaged`, other measures are of the first. The flag ``initialization`` names the parameters that kept their
            values.
        graph: the model's trace where it is already at hand.
        pixels: for "capacity", also sweep it down to the input, which only the score ``coverage`` needs.
        exact_capacity: read capacity by its exact form (34) wherever that applies, to small networks, or by the estimate (35) alone; where
            it costs about as much as the rest of the profile when absent, see `capnas.capacity.capacity_map`. Each row names its method.
            The two are not to be compared: a search uses the estimate alone.
        seed: of the initialization, of position sampling and of anything random in the forward pass.

    Raises:
        UsageError: unknown measure, reading or block pattern, a threshold out of its range, inputs that are no tensors or no images,
            targets that are not one an image, one image for batch norms in train mode, a model that takes other inputs, has
            uninitialized parameters, is a ``torch.jit.ScriptModule`` or no module at all, or one that was made in inference mode, where a
            measure needs gradients or the call is outside of that mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> profile = profile_model(model, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> [(row.name, row.k, row.width) for row in profile.layers]
    [('0', 4, 4), ('3', 2, 2)]
    """
    if isinstance(measures, str):
        measures = MEASURES if measures == "all" else (measures,)
    for measure in measures or ():
        if measure not in MEASURES:
            raise UsageError(one_of("measures", measure, MEASURES))
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be in (0, 1], got {threshold}.")
    if not isinstance(initialize, Integral) or initialize < 0:
        raise UsageError(f"initialize must be a number of copies, 0 or more, got {initialize!r}.")
    model = unwrap_model(model)
    _check_initialized(model)
    batches, targets = _labelled(inputs, targets)
    untraced: dict[str, str] = {}
    kept: tuple[str, ...] = ()
    if measures is None:
        measures = ("saturation", "structure")
        try:
            graph = graph or trace(model, (1, *batches[0].shape[1:]), dtype=batches[0].dtype)
        except Exception as error:  # whatever a model's own code raises; saturation does not need the graph
            measures, untraced = ("saturation",), {"structure": f"the model cannot be traced: {type(error).__name__}: {error}"}
    chosen: Literal["train", "eval"] = mode or ("train" if model.training else "eval")

    def read(network: nn.Module, seed: int) -> tuple[Profile, bool]:
        """The network's profile, and whether it takes images in the fast layout."""

        def record(images: Sequence[Tensor]) -> dict[str, LayerRecord]:
            with untouched(network, training=chosen == "train", seed=seed), torch.no_grad():
                with Recorder(network, reading=reading, blocks=blocks, values_per_call=values_per_call, seed=seed) as recorder:
                    for batch in images:
                        network(batch)
                return recorder.pop(chosen)

        if not torch.is_inference_mode_enabled():
            gradable(network)
        try:
            records, fast = record([_channels_last(batch) for batch in batches]), True
        except RuntimeError:  # some models take a view of a map that this layout does not allow
            records, fast = record(batches), False
        return Profile.from_records(network, records, mode=chosen, threshold=threshold), fast

    try:
        if initialize:
            others = [read(_restarted(model, s)[0], s)[0] for s in range(seed + 1, seed + initialize)]
            model, kept = _restarted(model, seed)
            profile, fast = read(model, seed)
            profile = averaged([profile, *others])
        else:
            profile, fast = read(model, seed)
    except CapnasError:
        raise
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        if unfit := _unfit(model, batches, chosen, error):
            raise UsageError(unfit) from error
        raise
    flags = {"initialization": f"no reset sets {_listed(kept)}, which kept the values the model came with"} if kept else {}
    unread = {} if reading == "blocks" else profile.skipped  # layers that nobody asked for are not skipped
    profile = replace(profile, skipped={**unread, **untraced}, flags=flags)
    if untraced:
        profile = with_params(profile, model)
    first = _channels_last(batches[0]) if fast else batches[0]
    return enrich(
        profile, model, first, targets, measures=measures, graph=graph, pixels=pixels, exact_capacity=exact_capacity, seed=seed
    )  # fmt: skip


def _channels_last(batch: Tensor) -> Tensor:
    """Images in the layout in which processors convolve faster; of one channel torch's float32 convolutions give garbage there."""
    fast = batch.ndim == 4 and batch.shape[1] > 1 and batch.device.type == "cpu"
    return batch.to(memory_format=torch.channels_last) if fast else batch


def _check_initialized(model: nn.Module) -> None:
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        raise UsageError(f"parameters must have a shape, these are uninitialized: {_listed(lazy)}. Run the lazy model on one batch first.")


def _unfit(model: nn.Module, batches: Sequence[Tensor], mode: str, error: Exception) -> str | None:
    """What to do where the model does not take the batches; None where it fails for another reason."""
    normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if isinstance(error, ValueError) and mode == "train" and normed and min(map(len, batches)) == 1:
        return "batch norms in train mode need more than one value a channel: give two images or more, or mode='eval'."
    shape = (1, *batches[0].shape[1:])
    try:
        trace(model, shape, dtype=batches[0].dtype)
    except type(error):  # no image of that shape will do
        return f"the model must take images of shape {shape} as its only input; {reason(error)}. {_WRAP}"
    except Exception:  # whatever a model's own code raises: the inputs are not known to be at fault
        return None
    return None


def _labelled(inputs: Tensor | Iterable[Tensor | Sequence[Tensor]], targets: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The batches, and the classes of the first."""
    given: list[Any] = [inputs] if isinstance(inputs, Tensor | Mapping) or _is_pair(inputs) else list(inputs)
    if not given:
        raise UsageError("inputs must be a batch or hold at least one, got none.")
    pairs: list[tuple[Any, Tensor | None]] = [(item[0], item[1]) if _is_pair(item) else (item, None) for item in given]
    batches = [images for images, _ in pairs]
    for images in batches:
        if not isinstance(images, Tensor):
            kind = type(images).__name__
            raise UsageError(f"inputs must be tensors, or pairs of images and classes as a DataLoader gives them, got {kind}. {_WRAP}")
        if images.ndim == 0 or len(images) == 0:
            raise UsageError(f"every batch must hold at least one image, got one of shape {tuple(images.shape)}.")
    if targets is None:
        return batches, pairs[0][1]
    first, count = len(batches[0]), sum(map(len, batches))
    if len(targets) not in (first, count):
        expected = f"{count}" if len(batches) == 1 else f"{count} for all batches or {first} for the first"
        raise UsageError(f"targets must hold one class per image, {expected}; got {len(targets)}. Give each image its own.")
    return batches, targets[:first]


def _is_pair(item: Any) -> bool:
    """Whether it is images and a class of each."""
    if not (isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)):
        return False
    return item[1].ndim == 1 and item[0].ndim > 1 and not item[1].is_floating_point()


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
    return _restarted(model, seed)[0]


@torch.inference_mode(False)  # else no gradient could run through the copy
def _restarted(model: nn.Module, seed: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The copy at the default initialization, and the names of the parameters that nothing set."""
    fresh, devices = cloned(model), {p.device for p in model.parameters()}
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
    return (fresh.to(devices.pop()) if len(devices) == 1 else fresh), kept


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
