"""One side of a module with other channels: those of an index, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from capnas.layers import CONVS


def _take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    return tensor.detach().index_select(axis, index.to(tensor.device))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = value


def place_width(model: nn.Module, modules: Mapping[str, Any], name: str, side: str) -> int:
    """Positions of a module's side, or of a bare parameter's last wide axis."""
    if side == "param":
        value = model.get_parameter(name)
        return value.shape[wide_axis(value)]
    module = modules[name]
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, CONVS):
        return module.in_channels if side == "in" else module.out_channels
    return int(getattr(module, _norm_width(module), 0))


def wide_axis(value: Tensor) -> int:
    """The axis of a bare parameter that holds its channels: the last that is wider than one."""
    return max(i for i, size in enumerate(value.shape) if size > 1)


def _norm_width(module: nn.Module) -> str:
    """The attribute with the width of a norm or a PReLU; "" of an activation, which has none."""
    return next((a for a in ("num_features", "num_channels", "num_parameters") if isinstance(getattr(module, a, None), int)), "")


def select(model: nn.Module, modules: Mapping[str, Any], name: str, side: str, index: Tensor, often: Tensor) -> None:
    """Make the positions of one side of a module those of `index`, each of which is there so `often`."""
    if side == "param":
        place, _, leaf = name.rpartition(".")
        value, owner = model.get_parameter(name), cast(Any, model.get_submodule(place))
        if getattr(owner, "normalized_shape", None) == tuple(value.shape):  # of a norm that is no layer norm, as nn.RMSNorm
            owner.normalized_shape = (len(index),)
        _set(owner, leaf, _take(value, wide_axis(value), index))
    elif side == "both" and not isinstance(modules[name], CONVS):
        _norm(modules[name], index)
    else:
        _layer(modules[name], side, index, often)


def _layer(module: Any, side: str, index: Tensor, often: Tensor) -> None:
    conv = isinstance(module, CONVS)
    transposed = conv and getattr(module, "transposed", False)
    if side == "in":
        width = module.in_channels if conv else module.in_features
        if conv and module.groups > 1:  # whole groups: each keeps its inputs
            module.groups = len(index) * module.groups // width
            if transposed:
                _set(module, "weight", _take(module.weight, 0, index))
        else:
            axis = 0 if transposed else 1
            weight = _take(module.weight, axis, index)
            shape = [1] * weight.dim()
            shape[axis] = len(index)
            _set(module, "weight", weight / often.to(weight).reshape(shape))
        setattr(module, "in_channels" if conv else "in_features", len(index))
        return
    if side == "both":
        _set(module, "weight", _take(module.weight, 0, index))
        module.in_channels = module.out_channels = module.groups = len(index)
    else:
        if not transposed or module.weight.shape[1] == module.out_channels:  # else one of several groups, all of which have its outputs
            _set(module, "weight", _take(module.weight, 1 if transposed else 0, index))
        setattr(module, "out_channels" if conv else "out_features", len(index))
    if module.bias is not None:
        _set(module, "bias", _take(module.bias, 0, index))


def _norm(module: Any, index: Tensor) -> None:
    layer_norm = isinstance(module, nn.LayerNorm)
    if not layer_norm and not _norm_width(module):
        return  # an activation: no width of its own
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            _set(module, name, _take(getattr(module, name), -1, index))
    if layer_norm:
        module.normalized_shape = (*module.normalized_shape[:-1], len(index))
    else:
        width = _norm_width(module)
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:  # whole groups
            module.num_groups = len(index) * module.num_groups // module.num_channels
        setattr(module, width, len(index))
