"""Which modules of a network are read: its layers by their types, its blocks by how networks are built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from capnas.errors import UsageError

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MEASURED = (*CONVS, nn.Linear)
_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear)
PRODUCTS = dict(zip(MEASURED, _FUNCTIONS))  # what each kind of layer calls
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STAGE_CHILDREN = ("blocks", "layers", "cells", "stages", "units")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters without those of its children, by name: those that its weights are computed from are its own.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    >>> {name: tuple(p.shape) for name, p in own_parameters(layer).items()}
    {'bias': (2,), 'parametrizations.weight.original0': (2, 1), 'parametrizations.weight.original1': (2, 3)}
    """
    own = dict(module.named_parameters(recurse=False))
    if is_parametrized(module):
        own |= {f"parametrizations.{name}": p for name, p in module.parametrizations.named_parameters()}  # type: ignore[union-attr]
    return own


def unfilled(kind: type[nn.Module], **args: Any) -> Any:
    """A layer on the CPU whose weights are to be filled: none are drawn, which would move torch's generator.

    >>> unfilled(nn.Linear, in_features=3, out_features=2).weight.shape
    torch.Size([2, 3])
    """
    with torch.device("meta"):
        layer = kind(**args)
    return layer.to_empty(device="cpu")


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer holds its weight packed for integer products, as torch.ao's quantized layers do, and not as a parameter.

    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # torch will leave quantization to torchao, whose weights are parameters
    ...     is_quantized(nn.Linear(3, 2)), is_quantized(torch.ao.nn.quantized.dynamic.Linear(3, 2))
    (False, True)
    """
    # methods of the class there; on the module itself a parametrized weight would be computed, and so moved
    readers = any(inspect.isfunction(getattr(type(module), name, None)) for name in ("weight", "get_weight"))
    return readers and not any(True for _ in module.parameters()) and bool(module.state_dict())


def block_pattern(pattern: str) -> re.Pattern[str]:
    """What `find_blocks` takes, compiled.

    Raises:
        UsageError: it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise UsageError(f"blocks must be a regular expression, {pattern!r} is none: {error}.") from None


def has_block(pattern: str | None, modules: Iterable[str]) -> bool:
    """Whether one of the modules has a name asked for as blocks; all have where none is asked for.

    >>> has_block("stage.*", ["stem", "stage1"]), has_block("stage", ["stem", "stage1"]), has_block(None, [])
    (True, False, True)
    """
    return pattern is None or any(map(block_pattern(pattern).fullmatch, modules))


def find_blocks(model: nn.Module, pattern: str | None = None) -> Iterator[str]:
    """Names of a network's repeated units: residual blocks, inverted residuals, transformer blocks, cells.

    In this order: modules whose name full-matches `pattern`; the fine layer groups that timm's models (and any model with a
    ``group_matcher`` method like theirs) declare, or what these hold where they are whole stages; members of the model's lists of
    composite modules, without single layers beside deeper ones (a stem, a head, downsampling steps); members of one kind of a module
    (``block1``, ``block2``). Where the units are single layers (VGG), the activations are read, the last step of each
    conv-norm-activation unit.

    Raises:
        UsageError: `pattern` is no regular expression or matches no module.

    >>> list(find_blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))))
    ['0', '1']
    """
    modules = dict(model.named_modules())
    if pattern is not None:
        named = block_pattern(pattern)
        names = [n for n in modules if n and named.fullmatch(n)]
        if not names:
            raise UsageError(f"no module name full-matches the block pattern {pattern!r}; names look like {', '.join(list(modules)[1:6])}.")
    else:
        names = [u for n in _declared_units(model, modules) for u in _inside_stage(n, modules)] or _built_units(model, modules)
        if not any(has_parts(modules[n]) for n in names):
            activations = [n for n in names or modules if _is_activation(modules[n])]
            names = activations or [n for n, m in modules.items() if isinstance(m, MEASURED)]
    outer: list[str] = []
    for name in names:
        if not any(name.startswith(o + ".") for o in outer):
            outer.append(name)
    yield from outer


def block_widths(block: nn.Module) -> frozenset[int]:
    """Widths that the block's layers and norms can give to its output, to tell channels from positions."""
    found: set[int] = set()
    for module in block.modules():
        for attribute in ("out_channels", "out_features", "num_features"):
            value = getattr(module, attribute, None)
            if isinstance(value, int):
                found.add(value)
        shape = getattr(module, "normalized_shape", None)
        if isinstance(shape, tuple) and len(shape) == 1:
            found.add(shape[0])
    return frozenset(found)


def feature_axis(tensor: Tensor, widths: frozenset[int], channels_last_maps: bool) -> int:
    """Axis of the features of a block output; the widths that the block can give decide where they tell channels from positions.

    Tokens (B, N, D) or, where the widths say so, sequences (B, D, L); maps (B, D, H, W) or, where the widths say so, (B, H, W, D). What
    a block concatenates is as wide as none of its layers, and its positions may number as one of them: two equal axes are a square image.

    >>> import torch
    >>> [feature_axis(torch.zeros(shape), frozenset({16, 96}), False) for shape in [(2, 112, 16, 16), (2, 5, 7, 16), (2, 7, 7, 112)]]
    [1, -1, -1]
    """
    if tensor.dim() < 3:
        return -1
    first, last = tensor.shape[1] in widths, tensor.shape[-1] in widths
    if tensor.dim() == 3:
        return 1 if first and not last else -1
    if first and not last:
        return 1
    if tensor.dim() == 4 and tensor.shape[1] != tensor.shape[3]:
        if tensor.shape[2] == tensor.shape[3] and not channels_last_maps:
            return 1
        if tensor.shape[1] == tensor.shape[2]:
            return -1
    return -1 if (last and not first) or channels_last_maps else 1


def _declared_units(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    matcher = getattr(model, "group_matcher", None)
    groups = matcher(coarse=False) if callable(matcher) else {}
    blocks = groups.get("blocks") or [] if isinstance(groups, dict) else []
    patterns = [blocks] if isinstance(blocks, str) else [p for p, position in blocks if position is None]
    return [n for n, m in modules.items() if any(re.fullmatch(p, n) for p in patterns) and not isinstance(m, nn.Identity)]


def _inside_stage(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """The blocks of a declared unit that is a whole stage; the unit itself otherwise."""
    unit, inner = modules[name], getattr(modules[name], "blocks", None)
    if isinstance(inner, _LISTS) and any(map(_composite, inner.children())):
        units = [f"{name}.blocks.{child}" for child, m in inner.named_children() if _composite(m)]
        return [u for n in units for u in _inside_stage(n, modules)]
    if isinstance(unit, nn.Sequential):
        if any(map(_is_stage, unit)):
            return list(_listed_units(unit, name + "."))
        alike = len({type(m) for m in unit}) == 1 or name.rpartition(".")[0] == "stages"
        if alike and all(map(_composite, unit)):
            return [f"{name}.{child}" for child, _ in unit.named_children()]
    return [name]


def _built_units(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The units of a model that declares none: members of its lists; where these are single layers, members of one kind."""
    listed = _without_steps(list(_listed_units(model, "")), modules)
    return listed if any(_depth(modules[n]) > 1 for n in listed) else _repeated_kinds(model, "") or listed


def _listed_units(module: nn.Module, prefix: str) -> Iterator[str]:
    for child, inner in module.named_children():
        name = f"{prefix}{child}"
        if isinstance(module, _LISTS) and _composite(inner) and not _is_stage(inner):
            if not _is_beside(inner, list(module.children())) or prefix[:-1].rpartition(".")[2] in _STAGE_CHILDREN:
                yield name
        elif _composite(inner):
            yield from _listed_units(inner, name + ".")


def _is_beside(member: nn.Module, members: list[nn.Module]) -> bool:
    """Whether a member of a list is a single layer beside stages, or before or behind deeper units: a stem, a head, a downsampling step."""
    if _depth(member) > 1:
        return False
    if any(map(_is_stage, members)):
        return True
    neighbour = {id(members[0]): members[1:2], id(members[-1]): members[-2:-1]}.get(id(member), [])
    return any(type(m) is not type(member) and _depth(m) > 1 for m in neighbour)


def _without_steps(names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The units without those of lists of single layers, branches and transitions, of kinds that other units are made of."""
    large = [n for n in names if _depth(modules[n]) > 1]
    parts = {type(part) for n in large for part in modules[n].modules() if part is not modules[n]}
    lists = {n.rpartition(".")[0] for n in names if n in large or type(modules[n]) not in parts}
    return [n for n in names if n.rpartition(".")[0] in lists]


def _repeated_kinds(module: nn.Module, prefix: str) -> list[str]:
    """Members of several layers, no lists, of a module that holds one kind of them more than once."""
    members = {f"{prefix}{n}": m for n, m in module.named_children() if not isinstance(m, _LISTS) and _depth(m) > 1}
    if len({type(m) for m in members.values()}) < len(members):
        maps = [n for n, m in members.items() if not any(isinstance(part, nn.Linear) for part in m.modules())]
        return maps or list(members)  # linear layers beside members without: auxiliary classifiers
    return [u for n, m in module.named_children() if _depth(m) > 1 for u in _repeated_kinds(m, f"{prefix}{n}.")]


def _depth(module: nn.Module) -> int:
    """How many layers with weights a module holds."""
    return sum(isinstance(m, MEASURED) for m in module.modules())


def _is_stage(module: nn.Module) -> bool:
    if isinstance(module, _LISTS):
        return any(map(_composite, module.children()))
    return any(n in _STAGE_CHILDREN and isinstance(m, _LISTS) and any(map(_composite, m.children())) for n, m in module.named_children())


def _composite(module: nn.Module) -> bool:
    return has_parts(module) and any(isinstance(m, MEASURED) for m in module.modules())


def has_parts(module: nn.Module) -> bool:
    """Whether a module is made of others; a layer whose weight is computed, as by a weight norm, holds what computes it and is none.

    >>> has_parts(nn.Sequential(nn.ReLU())), has_parts(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    (True, False)
    """
    return any(module.children()) and not isinstance(module, MEASURED)


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__.endswith("modules.activation") or "layers.activations" in type(module).__module__
