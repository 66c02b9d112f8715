"""What each image size means for a network before anything is trained: whether it runs, its cost, layers past the border, unread pixels."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import optuna
from torch import nn

from capnas.devices import is_out_of_memory
from capnas.errors import CapnasError, UsageError
from capnas.graph.dataflow import INPUT, Trace
from capnas.graph.structure import structure
from capnas.graph.tracing import trace
from capnas.measures import borders, receptive
from capnas.measures.probing import FAILURES

Build = Callable[[int], nn.Module]
_FAILURES = (*FAILURES, CapnasError, MemoryError, optuna.TrialPruned)  # of a network, or of a space, at a size that it is not for
_WIDE = 160  # letters of an error that a refusal repeats


def are_sizes(sizes: Any) -> bool:
    """Whether these are image sizes to choose from: at least one, whole pixels, none twice.

    >>> are_sizes((28, 32)), are_sizes((28, 28)), are_sizes((12.5,)), are_sizes(()), are_sizes(28)
    (True, False, False, False, False)
    """
    whole = isinstance(sizes, Collection) and all(isinstance(size, Integral) and int(size) > 0 for size in sizes)
    return whole and len(set(sizes)) == len(sizes) > 0


@dataclass(frozen=True, kw_only=True)
class SizeSurvey:
    """What is known of a network at one image size before training.

    Attributes:
        size: pixels.
        macs: multiply-accumulates of one image; None where the network cannot run at this size.
        looking: layers that read neighbours, in the order of execution.
        unproductive: those past the border: they see nothing that their input has not seen (rule ``"strict"``).
        borderless: whether the rule on borders says nothing of this network, see `capnas.measures.borders.borderless`.
        unread: pixels of each axis that patches leave out at the far end, see `unread_pixels`.
        refusal: why the size is not trained, or "".
    """

    size: int
    macs: int | None = None
    looking: tuple[str, ...] = ()
    unproductive: tuple[str, ...] = ()
    borderless: bool = False
    unread: int = 0
    refusal: str = ""

    @property
    def note(self) -> str:
        """What to know of a size that is trained, in words, or "".

        >>> SizeSurvey(size=24, unread=8).note
        '8 of 24 px are not read along each axis: the patches do not fill the image'
        """
        return f"{self.unread} of {self.size} px are not read along each axis: the patches do not fill the image" if self.unread else ""


def survey_resolutions(
    build: Build,
    candidates: Sequence[int],
    *,
    in_chans: int,
    budget: int | None = None,
    limit: float = borders.UNUSABLE,
    refused: Mapping[int, str] | None = None,
) -> tuple[SizeSurvey, ...]:
    """Borders and cost of each size, without training and without data.

    Args:
        build: gives the network for a size.
        candidates: pixels.
        in_chans: channels of the images.
        budget: most multiply-accumulates of one image.
        limit: a size with more than this share of its looking layers past the border is refused, where a larger one is affordable.
        refused: by size, why it is ruled out already, such as images that do not fit into memory.

    Raises:
        UsageError: no sizes, no whole numbers, the same size twice, or no size that the network can run at within the budget.

    >>> net = lambda size: nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.Conv2d(4, 8, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> small, large = survey_resolutions(net, (8, 32), in_chans=1)
    >>> small.refusal.partition(":")[0], large.macs, large.refusal
    ('it cannot run at 8 px', 39600, '')
    """
    if not are_sizes(candidates):
        raise UsageError(f"candidates must be whole numbers from 1 on, different sizes in pixels, got {candidates}.")
    rows, whys = [], {}
    for size in sorted(map(int, candidates)):
        try:
            graph = trace(build(size), (1, in_chans, size, size))
        except _FAILURES as error:
            if is_out_of_memory(error):
                rows.append(SizeSurvey(size=size, refusal=f"it does not fit into memory at {size} px"))
                continue
            rows.append(SizeSurvey(size=size, refusal=f"it {_cannot_run(size, error)}"))
            continue
        report = structure(graph)
        whys[size] = borders.unusable(report.fields, size, limit=limit)
        over = budget is not None and report.macs > budget
        row = SizeSurvey(
            size=size,
            macs=report.macs,
            looking=borders.looking_layers(report.fields),
            unproductive=receptive.border_layers(report.fields, size),
            borderless=borders.borderless(report.fields),
            unread=unread_pixels(graph),
            refusal=(refused or {}).get(size) or (f"{report.macs:,} MACs are over the budget of {budget:,.0f}" if over else ""),
        )
        rows.append(row)
    affordable = [r for r in rows if not r.refusal]
    if not affordable:
        raise UsageError(f"no candidate can be used: {'; '.join(r.refusal for r in rows)}.")
    best = max((r.size for r in affordable if whys[r.size] is None), default=0)
    return tuple(dataclasses.replace(r, refusal=whys[r.size] or "") if r in affordable and r.size < best else r for r in rows)


def trace_size(model: nn.Module, in_chans: int, size: int) -> Trace:
    """The trace of a network for one image of ``size`` pixels.

    Raises:
        UsageError: it cannot run at this size; the text says why.
    """
    try:
        return trace(model, (1, in_chans, size, size))
    except FAILURES as error:
        if isinstance(error, CapnasError) or is_out_of_memory(error):
            raise
        raise UsageError(f"the network {_cannot_run(size, error)}; give another image size, or another network.") from error


def _cannot_run(size: int, error: BaseException) -> str:
    why = textwrap.shorten(str(error).rstrip("."), _WIDE, placeholder=" ...") or type(error).__name__
    return f"cannot run at {size} px: {why}"


def unread_pixels(graph: Trace) -> int:
    """Pixels at the far end of an axis that no patch covers: of layers that cut the image itself into patches side by side.

    >>> [unread_pixels(trace(nn.Conv2d(1, 4, 16, 16), (1, 1, size, size))) for size in (16, 24, 32)]
    [0, 8, 0]
    """
    images = {INPUT}
    left = 0
    for node in graph.nodes:
        if not node.inputs or node.inputs[0] not in images:
            continue
        if node.shape_only and node.shape == graph.input_shape:
            images.add(node.index)
        elif node.op.startswith("aten.convolution") and not node.attrs["transposed"]:
            kernel, stride = node.input_shapes[1][2:], tuple(node.attrs["stride"])
            if kernel == stride and not any(node.attrs["padding"]):
                left = max(left, *(pixels % step for pixels, step in zip(node.input_shapes[0][2:], stride)))
    return left
