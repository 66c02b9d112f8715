"""A stand-in accelerator in Python: its tensors wrap tensors of the CPU and refuse what an accelerator refuses.

An operation computes on the CPU and wraps the result. As on CUDA it raises where a tensor of the device meets one of the CPU (numbers in
0-dimensional tensors, indices and copies aside), where a CPU generator is to fill a tensor of the device, for products of integers, and
where a tensor is to become a NumPy array. It registers a backend for good: use it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
SEEDS: list[int] = []  # that the device's random state was set to
_aten = torch.ops.aten
_MOVES = {_aten.copy_.default, _aten._to_copy.default}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_NUMBERS_TOO = {"masked_fill", "masked_fill_", "fill", "fill_"}  # take a CPU number, beside the pointwise operations
_MARK = 0x5EED
_SIZED_LATER = [  # by torch's own rule empty tensors that the operation resizes
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.eye.default, _aten.eye.m, _aten.linspace.default,
    _aten.randperm.default, _aten.randperm.generator,
]  # fmt: skip
_NO_INTEGERS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "mv", "dot", "addmv"}  # which CUDA has no kernels for


class OwnGenerator(torch.Generator):
    """A generator of the device; torch forgets its class on the way to an operation, its seed shows it."""

    def manual_seed(self, seed: int) -> OwnGenerator:
        super().manual_seed((_MARK << 44) + seed)
        return self


class Pretend(torch.Tensor):
    """A tensor of the device; ``raw`` is the one of the CPU that holds its values."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False) -> Pretend:
        form = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **form, device=f"{NAME}:0", requires_grad=requires_grad)
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"Pretend({self.raw!r})"

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def new_tensor(self, values: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(values, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def pin_memory(self, *args: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin a tensor of the device: only dense CPU tensors can be pinned")

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Pretend) -> None:
        self.raw = value.raw
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    target = kwargs.get("device")
    on_device = target.type == NAME if target is not None else any(isinstance(t, Pretend) for t in tensors)
    if func not in _MOVES and any(isinstance(t, Pretend) for t in tensors):
        _refuse_mixed(func, name, args, kwargs)
    if name in _NO_INTEGERS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise RuntimeError(f'"{name}" not implemented for {tensors[0].dtype} on {NAME}')
    generator = kwargs.get("generator")
    if generator is not None and on_device and generator.initial_seed() >> 44 != _MARK:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    result = _ON_CPU.get(name, func)(*tree_map(_raw, args), **tree_map(_raw, kwargs))
    same = {id(t.raw): t for t in tensors if isinstance(t, Pretend)}
    stale = [t for t in same.values() if t.raw.shape != t.shape]
    if stale:
        raise NotImplementedError(f"{func} changes the shape of a tensor in place, which the stand-in cannot show")
    if name == "copy_":
        return args[0]
    if not on_device:
        return result
    return tree_map(lambda a: (same[id(a)] if id(a) in same else Pretend(a)) if isinstance(a, torch.Tensor) else a, result)


def _in_bfloat16(func: Any, args: Any) -> Any:
    with torch.autocast(NAME, enabled=False):
        return func(*tree_map(lambda a: a.bfloat16() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a, args))


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, _: bool) -> Any:
    """By the operation that CUDA takes: images are normalised by cuDNN."""
    if x.dim() > 2 and weight is not None and bias is not None:
        return _aten.cudnn_batch_norm(x.contiguous(), weight, bias, mean, variance, training, momentum, eps)[0]
    return _aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps)[0]


def _cudnn_batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float) -> Any:
    return *_aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, eps), torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(x: Any, slope: Any, weight: Any, mean: Any, variance: Any, *saved: Any) -> Any:
    center, scale, eps, _ = saved
    return _aten.native_batch_norm_backward(slope, x, weight, mean, variance, center, scale, True, eps, [True] * 3)


def _rms_norm_backward(slope: Any, x: Any, shape: Any, scale: Any, weight: Any, mask: Any) -> Any:
    axes, scaled = tuple(range(-len(shape), 0)), slope if weight is None else slope * weight
    found = scale * (scaled - x * scale.square() * (scaled * x).mean(axes, keepdim=True))
    return found, None if weight is None else (slope * x * scale).flatten(0, -len(shape) - 1).sum(0)


_ON_CPU = {  # what only CUDA has
    "cudnn_batch_norm": _cudnn_batch_norm,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    "_fused_rms_norm_backward": _rms_norm_backward,
}


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == NAME else value
    return value.raw if isinstance(value, Pretend) else value


def _refuse_mixed(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    numbers = torch.Tag.pointwise in func.tags or name in _NUMBERS_TOO
    for i, (argument, value) in enumerate(zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)])):
        value = kwargs.get(argument.name, value)
        if name in _INDEXED and i == 1 and isinstance(args[0], Pretend):
            continue  # indices and masks of the CPU are moved
        written = argument.alias_info is not None and argument.alias_info.is_write
        for t in tree_leaves(value):
            number = isinstance(t, torch.Tensor) and t.dim() == 0 and not written and (numbers or (name in _INDEXED and i == 2))
            if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) and not number:
                raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {NAME}:0 and {t.device}!")


class _Module:
    """What torch asks of a backend's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """What ``torch.manual_seed`` does to every accelerator."""
        SEEDS.append(seed)

    manual_seed = manual_seed_all

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Make ``device="pretend"`` work in this process.

    Raises:
        ImportError: This torch cannot have a backend in Python.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    for func in _SIZED_LATER:
        own.impl(func.name().removeprefix("aten::"), lambda *args, _func=func, **kwargs: _run(_func, args, kwargs), "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        own.impl("batch_norm", _batch_norm, key)
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for func in (_aten.conv2d.default, _aten.linear.default, _aten.matmul.default):
        own.impl(func.name().removeprefix("aten::"), lambda *args, _func=func: _in_bfloat16(_func, args), "AutocastPrivateUse1")
    own.impl("_fused_rms_norm", lambda *args: _run(_aten._fused_rms_norm.default, args, {}), "PrivateUse1")
    register.libraries = every, own  # type: ignore[attr-defined]  # which last as long as these objects
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects they are when a model moves, as on CUDA
    torch.autograd.set_multithreading_enabled(False)  # an error in a thread of the device would end the process
    make_tensor, make_generator = torch.tensor, torch.Generator

    def tensor(values: Any, *, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make_tensor(values, device=device, requires_grad=requires_grad, **kwargs)
        return make_tensor(values, **kwargs).to(device).requires_grad_(requires_grad)

    class Checked(type(make_generator)):  # type: ignore[misc]
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, make_generator)

    class Generator(make_generator, metaclass=Checked):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> Any:
            return OwnGenerator().manual_seed(0) if torch.device(device).type == NAME else make_generator(device)

    torch.tensor, torch.Generator = tensor, Generator  # type: ignore[misc, assignment]  # built inside torch, past the backend
