"""Profile a model on a batch and leave it as it was: weights, buffers, mode, gradients, hooks and random state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from capnas.errors import CapnasError, UsageError, check_names, listed
from capnas.graph.dataflow import Trace
from capnas.graph.tracing import trace
from capnas.measures.probing import gradable, reason, untouched, unwrap_model
from capnas.measures.saturation import THRESHOLD, check_threshold
from capnas.profile.enriching import enrich, with_params
from capnas.profile.initialization import copied, restart
from capnas.profile.rows import MEASURES, Profile, averaged
from capnas.recording import LayerRecord, Reading, Recorder

INITIALIZATIONS = 2  # of a candidate in a search: which weights are drawn is most of the noise of its saturations (results/ranking)
FEWEST_IMAGES = 16  # that a copy after the first reads at least, where there are as many
_WRAP = "Wrap a model of several or named inputs in a module that takes one tensor."


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
            True is one. Scores of untrained networks compare only if all are initialized alike: a search measures all its candidates
            this way, with `INITIALIZATIONS` copies. Copies have the seeds from `seed` on. The first reads all images, the others every
            second one, which costs half and averages over the draw as well (all, if that would leave fewer than `FEWEST_IMAGES`).
            Saturations are means over the copies, see `capnas.profile.averaged`, other measures are of the first. The flag
            ``initialization`` names the parameters that kept their values.
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
    check_names("measures", measures or (), MEASURES)
    check_threshold(threshold)
    if not isinstance(initialize, Integral) or initialize < 0:
        raise UsageError(f"initialize must be a number of copies, 0 or more, got {initialize!r}.")
    model = unwrap_model(model)
    _check_initialized(model)
    batches, targets = _labelled(inputs, targets)
    untraced: dict[str, str] = {}
    kept: tuple[str, ...] = ()
    others: list[Profile] = []
    if measures is None:
        measures = ("saturation", "structure")
        try:
            graph = graph or trace(model, (1, *batches[0].shape[1:]), dtype=batches[0].dtype)
        except Exception as error:  # whatever a model's own code raises; saturation does not need the graph
            measures, untraced = ("saturation",), {"structure": f"the model cannot be traced: {type(error).__name__}: {error}"}
    chosen: Literal["train", "eval"] = mode or ("train" if model.training else "eval")
    read = partial(_read, mode=chosen, threshold=threshold, reading=reading, blocks=blocks, values_per_call=values_per_call)
    try:
        if initialize:
            model = copied(model)
            kept = restart(model, seed + initialize - 1)
            for later in range(seed + initialize - 1, seed, -1):  # down to the first, which stays for the other measures
                others.append(read(model, [some(batch) for batch in batches], seed=later)[0])
                restart(model, later - 1)
        profile, fast = read(model, batches, seed=seed)
        profile = averaged([profile, *others]) if others else profile
    except CapnasError:
        raise
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        if unfit := _unfit(model, batches, chosen, error):
            raise UsageError(unfit) from error
        raise
    flags = {"initialization": f"no reset sets {listed(kept, 4)}, which kept the values the model came with"} if kept else {}
    unread = {} if reading == "blocks" else profile.skipped  # layers that nobody asked for are not skipped
    profile = replace(profile, skipped={**unread, **untraced}, flags=flags)
    if untraced:
        profile = with_params(profile, model)
    first = _channels_last(batches[0]) if fast else batches[0]
    return enrich(
        profile, model, first, targets, measures=measures, graph=graph, pixels=pixels, exact_capacity=exact_capacity, seed=seed
    )  # fmt: skip


def _read(
    model: nn.Module, batches: Sequence[Tensor], *, mode: Literal["train", "eval"], threshold: float, seed: int, **recording: Any
) -> tuple[Profile, bool]:
    """The profile of what a `Recorder` sees of the batches, and whether the model takes images in the fast layout."""

    def record(images: Sequence[Tensor]) -> dict[str, LayerRecord]:
        with untouched(model, training=mode == "train", seed=seed), torch.no_grad():
            with Recorder(model, seed=seed, **recording) as recorder:
                for batch in images:
                    model(batch)
            return recorder.pop(mode)

    if not torch.is_inference_mode_enabled():
        gradable(model)
    try:
        records, fast = record([_channels_last(batch) for batch in batches]), True
    except RuntimeError:  # some models take a view of a map that this layout does not allow
        records, fast = record(batches), False
    return Profile.from_records(model, records, mode=mode, threshold=threshold), fast


def some(batch: Tensor) -> Tensor:
    """What a copy after the first reads of a batch: every second image, or all where that would leave few.

    >>> len(some(torch.zeros(64, 1, 2, 2))), len(some(torch.zeros(16, 1, 2, 2)))
    (32, 16)
    """
    return batch[::2] if len(batch) >= 2 * FEWEST_IMAGES else batch


def _channels_last(batch: Tensor) -> Tensor:
    """Images in the layout in which processors convolve faster; of one channel torch's float32 convolutions give garbage there."""
    fast = batch.ndim == 4 and batch.shape[1] > 1 and batch.device.type == "cpu"
    return batch.to(memory_format=torch.channels_last) if fast else batch


def _check_initialized(model: nn.Module) -> None:
    lazy = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if is_lazy(tensor)]
    if lazy:
        advice = "Run the lazy model on one batch first."
        raise UsageError(f"parameters must have a shape, these are uninitialized: {listed(lazy, 4)}. {advice}")


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
    own = targets is None
    if (targets := pairs[0][1] if own else targets) is None:
        return batches, None
    targets = torch.as_tensor(targets)
    targets = targets if targets.is_floating_point() else targets.long()
    first, count = len(batches[0]), sum(map(len, batches))
    if not own and len(targets) not in (first, count):
        expected = f"{count}" if len(batches) == 1 else f"{count} for all batches or {first} for the first"
        raise UsageError(f"targets must hold one class per image, {expected}; got {len(targets)}. Give each image its own.")
    return batches, targets[:first]


def _is_pair(item: Any) -> bool:
    """Whether it is images and a class of each."""
    if not (isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, Tensor) for part in item)):
        return False
    return item[1].ndim == 1 and item[0].ndim > 1 and not item[1].is_floating_point()
