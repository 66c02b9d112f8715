"""Latency: how long a network takes for its images, on the device where it stands."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from capnas.devices import one_thread
from capnas.measures.probing import untouched

_LEAST = 3  # passes of each network, however long they take
_WARM = 2  # passes that allocate and are not counted


def latencies(models: Sequence[nn.Module], x: Tensor, *, passes: int = 30, seconds: float = 1.0) -> list[float]:
    """Median milliseconds of a forward pass of each network in eval mode, measured in turns so that all see the same load.

    On a CPU it is the processor time of one thread: the time that other processes get does not count (that they share caches still tells,
    by 18 to 35 % with four of them on two cores, see results/latency), so that networks compare also while searches share a machine.
    On other devices, and on Windows, it is the time until the outputs are there, which others lengthen.

    Args:
        models: all on the device of ``x``; they and the number of threads stay as they are.
        x: one batch, as the networks take it; for the latency of one image ``(1, C, H, W)``.
        passes: of each network, after two that are not counted.
        seconds: for all together, after which no further pass begins once there are three of each.

    Returns:
        Milliseconds above 0, in the order of ``models``.

    Example:
        >>> small, large = nn.Linear(64, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(20)), nn.Linear(512, 8))
        >>> small_ms, large_ms = latencies([small], torch.randn(1, 64)) + latencies([large], torch.randn(1, 512))
        >>> 0 < small_ms < large_ms
        True
    """
    on_cpu = x.device.type == "cpu"
    # Windows counts the time of a thread in steps of 16 ms
    clock = time.thread_time if on_cpu and sys.platform != "win32" else time.perf_counter
    taken: list[list[float]] = [[] for _ in models]
    begin = time.perf_counter()
    with ExitStack() as stack, torch.no_grad():
        if on_cpu:
            stack.enter_context(one_thread())
        for model in models:
            stack.enter_context(untouched(model))
        for turn in range(_WARM + passes):
            if turn >= _WARM + _LEAST and time.perf_counter() - begin > seconds:
                break
            for model, times in zip(models, taken):
                _wait(x)
                start = clock()
                model(x)
                _wait(x)
                times.append(1e3 * (clock() - start))
    return [statistics.median(times[_WARM:]) for times in taken]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
