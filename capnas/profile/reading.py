"""Profile a model on a batch and leave it as it was: weights, buffers, mode, gradients, hooks and random state."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from capnas.errors import UsageError, one_of
from capnas.graph.tracing import Trace, trace
from capnas.measures.probing import gradable, put_back, seeded
from capnas.measures.saturation import THRESHOLD
from capnas.profile.enriching import enrich
from capnas.profile.rows import MEASURES, Profile
from capnas.recording import LayerRecord, Reading, Recorder

_LAYER_SCALE = r"gamma(_\d)?|layer_scale\w*"


def profile_model(
    model: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    targets: Tensor | None = None,
    *,
    measures: Sequence[str] | None = None,
    threshold: float = THRESHOLD,
    reading: Reading = "both",
    blocks: str | None = None,
    mode: Literal["train", "eval"] | None = None,
    values_per_call: int | None = None,
    initialize: bool = False,
    graph: Trace | None = None,
    pixels: bool = True,
    exact_capacity: bool | None = None,
    seed: int = 0,
) -> Profile:
    """Profile a model on a batch of inputs, leaving the model untouched.

    Args:
        model: any module that maps the inputs to outputs.
        inputs: one batch (B, C, H, W) on the model's device, or an iterable of batches.
        targets: (B,) classes, for measures that need a loss.
        measures: any of `MEASURES`; "saturation" and, where the model can be traced, "structure" when absent. "saturation" is always
            read; "structure" adds the layer algebra and receptive fields from the traced graph, "norms" operator norms, "capacity"
            capacity allocation (one to four backward passes), "proxies" the published baselines synflow, naswot, zico, snip, grad_norm,
            params and macs.
        threshold: share of the variance that the intrinsic dimension explains.
        reading: "modules", "blocks" or "both".
        blocks: regular expression naming the units to read as blocks.
        mode: "train" (batch statistics, the reading for networks at initialization) or "eval"; the model's own mode when absent.
        values_per_call: bound on what is read per layer and batch, see `Recorder`; every row when absent.
        initialize: profile a copy at torch's default initialization instead, see `at_default_initialization`. Scores of untrained networks
            that are to be compared need one initialization; a search measures all its candidates so.
        graph: the model's trace where it is already at hand.
        pixels: for "capacity", also sweep it down to the input, which only the score ``coverage`` needs.
        exact_capacity: read capacity by its exact form (34) wherever that applies, to small networks, or by the estimate (35) alone; where
            it costs about as much as the rest of the profile when absent, see `capnas.capacity.capacity_map`. Each row names its method.
            The two are not to be compared: a search uses the estimate alone.
        seed: of the initialization, of position sampling and of anything random in the forward pass.

    Raises:
        UsageError: unknown measure, reading or block pattern, a threshold out of its range, or a model that was made in inference mode,
            where a measure needs gradients or the call is outside of that mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> profile = profile_model(model, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> [(row.name, row.k, row.width) for row in profile.layers]
    [('0', 4, 4), ('3', 2, 2)]
    """
    for measure in measures or ():
        if measure not in MEASURES:
            raise UsageError(one_of("measures", measure, MEASURES))
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold must be in (0, 1], got {threshold}.")
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    untraced = {}
    if measures is None:
        measures = ("saturation", "structure")
        try:
            graph = graph or trace(model, (1, *batches[0].shape[1:]), dtype=batches[0].dtype)
        except Exception as error:  # whatever a model's own code raises; saturation does not need the graph
            measures, untraced = ("saturation",), {"structure": f"the model cannot be traced: {type(error).__name__}: {error}"}
    model = at_default_initialization(model, seed=seed) if initialize else model
    if not torch.is_inference_mode_enabled():
        gradable(model)
    chosen: Literal["train", "eval"] = mode or ("train" if model.training else "eval")

    def record(given: Sequence[Tensor]) -> dict[str, LayerRecord]:
        with untouched(model, training=chosen == "train", seed=seed), torch.no_grad():
            with Recorder(model, reading=reading, blocks=blocks, values_per_call=values_per_call, seed=seed) as recorder:
                for batch in given:
                    model(batch)
            return recorder.pop(chosen)

    try:
        fast = [_channels_last(batch) for batch in batches]
        records, batches = record(fast), fast
    except RuntimeError:  # some models take a view of a map that this layout does not allow
        records = record(batches)
    profile = Profile.from_records(model, records, mode=chosen, threshold=threshold)
    profile = replace(profile, skipped={**profile.skipped, **untraced})
    return enrich(
        profile, model, batches[0], targets, measures=measures, graph=graph, pixels=pixels, exact_capacity=exact_capacity, seed=seed
    )  # fmt: skip


def _channels_last(batch: Tensor) -> Tensor:
    """Images in the layout in which processors convolve faster."""
    return batch.to(memory_format=torch.channels_last) if batch.ndim == 4 and batch.device.type == "cpu" else batch


@torch.inference_mode(False)  # else no gradient could run through the copy
def at_default_initialization(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy of a model whose layers start as torch starts them, whatever the model's authors chose.

    Every layer is reset by its own ``reset_parameters`` in the order of the modules. Norms that start at zero and layer scales that start
    small, both of which switch residual branches off, start at one. Other parameters (class tokens, position codes) stay. A model that lies
    on one device starts from numbers of the CPU's generator, so that all devices give the same weights.

    >>> layer = nn.utils.skip_init(nn.Linear, 4, 2)
    >>> first, second = (at_default_initialization(nn.Sequential(layer), seed=3) for _ in range(2))
    >>> bool((first[0].weight == second[0].weight).all()), float(first[0].weight.detach().abs().max()) <= 0.5
    (True, True)
    """
    fresh, devices = copy.deepcopy(model), {p.device for p in model.parameters()}
    if len(devices) == 1:
        fresh.cpu()
    with seeded(seed, devices), torch.no_grad():
        for module in fresh.modules():
            if callable(getattr(module, "reset_parameters", None)) and not any(module.children()):
                module.reset_parameters()  # type: ignore[operator]
            for name, parameter in module.named_parameters(recurse=False):
                if re.fullmatch(_LAYER_SCALE, name) and parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.fill_(1.0)
    return fresh.to(devices.pop()) if len(devices) == 1 else fresh


@contextmanager
def untouched(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Run a model in a mode and put back its buffers, every module's mode and the random state, also after an error.

    Weights are the caller's duty: do not step an optimizer inside.
    """
    with put_back(model, seed=seed):
        model.train(training)
        yield
