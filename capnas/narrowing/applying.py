"""Change widths: keep, remove or repeat the units of coupled groups, in place."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capnas.layers import CONVS
from capnas.narrowing.groups import CannotNarrow, CoupledGroup, Coupling, cannot_narrow, find_groups
from capnas.profile import untouched

_FAILURES = (RuntimeError, ValueError, IndexError, AssertionError, TypeError)  # of a network that does not fit its input or its channels
_DOUBLED = 30_000_000  # parameters beyond which the network is not tried with doubled channels
Keep = Mapping[str, Sequence[int]]  # group name -> units that stay, ascending; a unit named twice is doubled


def narrowable(model: nn.Module, example: Tensor) -> Coupling:
    """The coupled groups whose units can really be removed: each is tried on a copy, what fails keeps its width with the reason.

    Args:
        model: not changed.
        example: (B, C, H, W) an input on the model's device.

    Raises:
        CannotNarrow: none can, or the network is no classifier that runs on the example: the text says why.
        MissingDependencyError: Torch-Pruning is not installed.
    """
    if (reason := _unfit(model, example)) is not None:
        raise CannotNarrow(f"cannot narrow this {type(model).__name__}: {reason}.")
    found = find_groups(model, example)
    if _failure(model, example, found.groups) is None:
        return found
    fine, fixed = [], dict(found.fixed)
    for group in found.groups:
        reason = _failure(model, example, (group,))
        if reason is None:
            fine.append(group)
        else:
            fixed[group.name] = reason
    if fine and (reason := _failure(model, example, tuple(fine))) is not None:
        raise cannot_narrow(model, fixed | {"": reason})
    if not fine:
        raise cannot_narrow(model, fixed)
    return Coupling(groups=tuple(fine), fixed=fixed)


def _unfit(model: nn.Module, example: Tensor) -> str | None:
    """Why nothing could be measured: broken weights, weights of another type than the images, outputs that are no logits; or None."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != example.dtype:
            return f"{name} is {tensor.dtype} and the images are {example.dtype}; give both one type, such as model.float()"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} holds NaN or infinity; give weights of a training that did not diverge"
    for name, buffer in model.named_buffers():
        if bool(torch.isnan(buffer).any()):  # not infinity, which masks hold
            return f"{name} holds NaN; give weights of a training that did not diverge"
    try:
        with untouched(model, training=False), torch.no_grad():
            got = model(example)
    except _FAILURES as error:
        return f"it does not run on images of shape {tuple(example.shape)} ({type(error).__name__}: {_one_line(error)})"
    if not isinstance(got, Tensor):
        return f"its output is a {type(got).__name__}; wrap it so that it gives one tensor of logits (B, classes)"
    if got.dim() != 2 or len(got) != len(example):
        return f"its output has the shape {tuple(got.shape)}, expected logits ({len(example)}, classes)"
    return None if bool(torch.isfinite(got).all()) else "its outputs are not finite on the images"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _failure(model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup]) -> str | None:
    """Why the network does not run without the last unit of each group, or computes something else with units doubled; or None."""
    trial = copy.deepcopy(model).eval()
    try:
        with torch.no_grad():
            expected = trial(example)
            change_widths(trial, groups, {g.name: range(g.units - 1) for g in groups})
            got = trial(example)
            if got.shape != expected.shape:
                return f"without a channel its output is {tuple(got.shape)} instead of {tuple(expected.shape)}"
            if sum(p.numel() for p in model.parameters()) > _DOUBLED:
                return None
            trial = copy.deepcopy(model).eval()
            change_widths(trial, groups, {g.name: _doubled(g, trial) for g in groups})
            gap = float((trial(example) - expected).abs().max())
    except _FAILURES as error:
        return f"without a channel it does not run ({type(error).__name__}: {_one_line(error)})"
    if gap > 1e-3 * float(expected.abs().max()) + 1e-6:
        return "its channels are read in another order, or together, than Torch-Pruning says: doubled channels change what is computed"
    return None


def _doubled(group: CoupledGroup, model: nn.Module) -> list[int]:
    """Units with every third one twice; all of them twice where a norm or a response averages over channels, which that leaves alone."""
    modules = dict(model.named_modules())
    averaged = any(p.side == "param" or isinstance(modules[p.module], (nn.LayerNorm, nn.GroupNorm)) for p in group.ports)
    return sorted([*range(group.units), *range(0, group.units, 1 if averaged else 3)])


def change_widths(model: nn.Module, groups: Sequence[CoupledGroup], keep: Keep) -> None:
    """Keep the named units of each group, in place; groups that are not named keep all.

    A unit named n times is repeated, and what reads it divides its weights by n, so that a widened network computes the same (exactly
    so unless a layer norm averages over the channels).

    Args:
        model: changed.
        groups: of this model.
        keep: per group the units that stay, ascending.

    >>> net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2))
    >>> group, = find_groups(net, torch.randn(2, 1)).groups
    >>> change_widths(net, [group], {"0": [0, 2]})
    >>> net[0].out_features, net[1].weight.shape
    (2, torch.Size([2, 2]))
    """
    counts: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    blocks: dict[tuple[str, str], dict[int, tuple[str, int]]] = defaultdict(dict)
    for group in groups:
        kept = Counter(keep.get(group.name, range(group.units)))
        if not kept:
            raise CannotNarrow(f"group {group.name} must keep at least one of its {group.units} units.")
        for port in group.ports:
            for unit, positions in enumerate(port.positions.tolist()):
                for position in positions:
                    counts[port.module, port.side][position] = kept[unit]
                    blocks[port.module, port.side][position] = (group.name, unit)
    modules = dict(model.named_modules())
    head = _classifier(model)
    for (name, side), count in counts.items():
        if side == "param":
            _param(model, name, count, blocks[name, side])
        else:
            _module(modules[name], side, count, blocks[name, side])
    for module in modules.values():
        if hasattr(module, "num_heads") and isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "head_dim"):
            module.num_heads = module.qkv.out_features // (3 * module.head_dim)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.num_heads * module.head_dim
    if head is not None:
        layer, before = head
        for attribute in ("num_features", "head_hidden_size"):
            if getattr(model, attribute, None) == before:
                setattr(model, attribute, layer.in_features)


def _classifier(model: nn.Module) -> tuple[nn.Linear, int] | None:
    """The classifier and its width, which timm's models name in attributes of their own."""
    getter = getattr(model, "get_classifier", None)
    layer = getter() if callable(getter) else None
    return (layer, layer.in_features) if isinstance(layer, nn.Linear) else None


def _indices(width: int, count: Mapping[int, int], block: Mapping[int, tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Positions that stay, and how often each is there; neighbours of one unit are repeated together."""
    kept: list[int] = []
    position = 0
    while position < width:
        end = position + 1
        while end < width and position in block and block.get(end) == block[position]:
            end += 1
        kept += list(range(position, end)) * count.get(position, 1)
        position = end
    index = torch.tensor(kept, dtype=torch.long)
    return index, torch.tensor([count.get(i, 1) for i in kept], dtype=torch.float32)


def kept_channels(groups: Sequence[CoupledGroup], keep: Keep, module: str, side: str, width: int) -> Tensor:
    """Which of a module's channels stay, in order."""
    count: dict[int, int] = {}
    block: dict[int, tuple[str, int]] = {}
    for group in groups:
        kept = Counter(keep.get(group.name, range(group.units)))
        for port in group.ports:
            if (port.module, port.side) == (module, side):
                for unit, positions in enumerate(port.positions.tolist()):
                    count |= dict.fromkeys(positions, kept[unit])
                    block |= dict.fromkeys(positions, (group.name, unit))
    return _indices(width, count, block)[0]


def _take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    return tensor.detach().index_select(axis, index.to(tensor.device)).clone()


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = value


def _param(model: nn.Module, name: str, count: Mapping[int, int], block: Mapping[int, tuple[str, int]]) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, leaf)
    axis = max(i for i, size in enumerate(value.shape) if size > 1)
    _set(module, leaf, _take(value, axis, _indices(value.shape[axis], count, block)[0]))


def _module(module: Any, side: str, count: Mapping[int, int], block: Mapping[int, tuple[str, int]]) -> None:
    conv = isinstance(module, CONVS)
    if side == "both" and not conv:
        return _norm(module, count, block)
    transposed = conv and getattr(module, "transposed", False)
    if side == "both":
        index, _ = _indices(module.out_channels, count, block)
        _set(module, "weight", _take(module.weight, 0, index))
        module.in_channels = module.out_channels = module.groups = len(index)
    elif side == "out":
        index, _ = _indices(module.out_channels if conv else module.out_features, count, block)
        _set(module, "weight", _take(module.weight, 1 if transposed else 0, index))
        setattr(module, "out_channels" if conv else "out_features", len(index))
    else:
        width = module.in_channels if conv else module.in_features
        index, often = _indices(width, count, block)
        if conv and module.groups > 1:  # whole groups: each keeps its inputs
            module.groups = len(index) * module.groups // width
        else:
            axis = 0 if transposed else 1
            weight = _take(module.weight, axis, index)
            shape = [1] * weight.dim()
            shape[axis] = len(index)
            _set(module, "weight", weight / often.to(weight).reshape(shape))
        setattr(module, "in_channels" if conv else "in_features", len(index))
        return None
    if module.bias is not None:
        _set(module, "bias", _take(module.bias, 0, index))
    return None


def _norm(module: Any, count: Mapping[int, int], block: Mapping[int, tuple[str, int]]) -> None:
    layer_norm = isinstance(module, nn.LayerNorm)
    attribute = next((a for a in ("num_features", "num_channels") if isinstance(getattr(module, a, None), int)), None)
    if not layer_norm and attribute is None:
        return  # an activation: no width of its own
    index, _ = _indices(module.normalized_shape[-1] if layer_norm else getattr(module, str(attribute)), count, block)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name, None) is not None:
            _set(module, name, _take(getattr(module, name), -1, index))
    if layer_norm:
        module.normalized_shape = (*module.normalized_shape[:-1], len(index))
    else:
        setattr(module, str(attribute), len(index))
