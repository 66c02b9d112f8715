"""Where to compute and how: the device, the precision and the memory format behind "auto", and what lack of memory looks like."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from capnas.errors import UsageError
from capnas.measures.probing import untouched
from capnas.recording import hooked

SWITCHES = ("auto", "on", "off")
# the last two from cuBLAS and cuDNN, which ask for memory of their own
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "allocation_failed")


def resolve_device(device: str, *, float64: bool = True) -> torch.device:
    """The device behind "auto" or a name of torch.

    Args:
        device: "auto" or the name.
        float64: whether it has to compute in float64, as all measures and trainings do.

    Raises:
        UsageError: a device that torch does not know, that this machine lacks or that cannot do this.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {device!r}.') from None
    if float64 and found.type == "mps":  # sums of losses and moments are kept in float64
        raise UsageError(f'device {device!r} does not compute in float64, which capnas needs: use "cpu" or a CUDA device.')
    if found.type not in ("cpu", "mps") and (found.index or 0) >= (here := _count(found.type)):
        raise UsageError(f'device {device!r} is not here: torch sees {here} {found.type.upper()} devices; use "auto" or "cpu".')
    return found


def _count(kind: str) -> int:
    """How many devices of a kind there are; of kinds that torch knows by name alone, such as "meta", none."""
    try:
        backend = torch.get_device_module(kind)
    except RuntimeError:
        return 0
    return backend.device_count() if backend.is_available() else 0


def device_of(model: nn.Module) -> torch.device:
    """Where a model has its weights, or its buffers; the CPU where it has neither.

    >>> device_of(nn.Linear(2, 1)), device_of(nn.ReLU())
    (device(type='cpu'), device(type='cpu'))
    """
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def usable_cpus() -> int:
    """CPUs that this process may run on, where the system tells; else all of the machine.

    >>> 1 <= usable_cpus() <= (os.cpu_count() or 1)
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread of the CPU inside: sums are then the same to the last digit, however many it has outside.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_amp(switch: str, device: torch.device, model: nn.Module, *, trained_on: Iterable[tuple[int, ...]] = ()) -> bool:
    """Whether to compute in bfloat16: on CUDA devices that support it, on CPUs with bfloat16 arithmetic for models of dense convolutions.

    Measured on a CPU with AVX-512 BF16 at 28 px, per training epoch against float32: residual and VGG-like networks take a quarter less
    time, MBConv and ConvNeXt a tenth to a sixth more; CPUs without such arithmetic are slower throughout.

    Never on a CPU, asked for or not, for a training in which a strided convolution reads a map so small that some of its taps lie in the
    padding alone, as a 3x3 of stride 2 does on one pixel: with torch 2.13 their gradient in bfloat16 is whatever lay in memory.

    Args:
        switch: "auto", "on" or "off".
        device: where to compute.
        model: on that device.
        trained_on: each (C, H, W) that the images of a training have; none for inference.

    >>> deep = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1))
    >>> [use_amp("on", torch.device("cpu"), deep, trained_on=[(1, size, size)]) for size in (3, 5)]
    [False, True]
    """
    if switch != "off" and device.type == "cpu" and any(_leaves_taps(model, shape) for shape in trained_on):
        return False
    if switch != "auto":
        return switch == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and _is_dense(model) and any(probe() for probe in probes if probe)


def use_channels_last(switch: str, device: torch.device, model: nn.Module) -> bool:
    """Whether to store images channels last: on CUDA, and on CPUs for models of dense convolutions alone.

    Measured on an AVX2 CPU with networks of 8 to 96 channels at 28 px, per training epoch against channels first: residual and
    VGG-like networks take a quarter less time, those with depthwise convolutions up to a seventh more.

    Never on a CPU, asked for or not, for models with a strided 1x1 convolution of few input channels: with torch 2.13 the gradient
    of its weight writes past its memory in this format (seen below 8 channels; 16 is taken as the limit for wider vector units).
    Nor on any device for models with tensors of five axes, as of 3-d convolutions, which torch refuses to store so.
    """
    if any(t.ndim == 5 for t in (*model.parameters(), *model.buffers())):
        return False
    if device.type == "cpu" and any(_overruns(m) for m in _convs(model)):
        return False
    if switch != "auto":
        return switch == "on"
    return device.type == "cuda" or (device.type == "cpu" and _is_dense(model))


def _convs(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def _is_dense(model: nn.Module) -> bool:
    return {m.groups for m in _convs(model)} == {1}


def _leaves_taps(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether some tap of a strided convolution reads no pixel of the map that it is given."""
    strided = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1}
    found: list[bool] = []

    def look(conv: nn.Conv2d, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
        for size, count, kernel, stride, pad, step in zip(
            given[0].shape[-2:], out.shape[-2:], conv.kernel_size, conv.stride, padding, conv.dilation
        ):
            read = {tap for tap in range(kernel) for i in range(count) if 0 <= i * stride + tap * step - pad < size}
            found.append(stride > 1 and len(read) < kernel)

    if strided:
        first = next(model.parameters())
        with untouched(model), torch.no_grad(), hooked(dict.fromkeys(strided, look), model):
            model(torch.zeros((1, *shape), dtype=first.dtype, device=first.device))
    return any(found)


def _overruns(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and max(conv.stride) > 1 and conv.in_channels // conv.groups < 16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the allocator of the CPU.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    True
    >>> is_out_of_memory(RuntimeError("shapes do not match"))
    False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
