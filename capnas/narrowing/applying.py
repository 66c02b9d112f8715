"""Change widths: keep, remove or repeat the units of coupled groups, in place."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capnas._timm import import_timm
from capnas.errors import described
from capnas.layers import CONVS, MEASURED
from capnas.measures.probing import FAILURES, cloned
from capnas.narrowing.attention import has_plain_heads
from capnas.narrowing.groups import CoupledGroup, Coupling, Port, cannot_narrow, find_groups, layers_of
from capnas.narrowing.refusing import CannotNarrow, check_network, check_weights, differ
from capnas.narrowing.selecting import place_width, select
from capnas.projection import head_names

_SHARE, _SMALL_SHARE = 3, 16  # one unit of so many is doubled in a trial: of usual networks, of large ones
_LARGE = 30_000_000  # parameters
_UNBIASED_NORMS = tuple(kind for name, kind in vars(import_timm("timm.layers")).items() if name.startswith("SimpleNorm"))
_OTHER_ORDER = "its channels are read in another order, or together, than Torch-Pruning says: doubled channels change what is computed"
Keep = Mapping[str, Sequence[int]]  # group name -> units that stay, ascending; a unit named twice is doubled
Fate = tuple[object, int]  # of a position: the unit that it belongs to, and how often that stays


def narrowable(model: nn.Module, example: Tensor) -> Coupling:
    """The coupled groups whose units can really be removed: each is tried on a copy, what fails keeps its width with the reason.

    Args:
        model: not changed.
        example: (B, C, H, W) an input on the model's device.

    Raises:
        CannotNarrow: none can, or the network is no classifier that runs on the example: the text says why.
        MissingDependencyError: Torch-Pruning is not installed.
    """
    check_weights(model)
    check_network(model, example)
    modules = dict(model.named_modules())
    found = find_groups(model, example)
    if _failure(model, example, found.groups) is None:
        return found
    alone, fixed = _alone(model, example, found.groups), dict(found.fixed)
    kept, reasons = _together(model, example, [g for g in found.groups if g.name not in alone])
    for group in found.groups:
        if group.name in alone:
            fixed |= dict.fromkeys(layers_of(group, modules), alone[group.name])
        elif group.name in reasons:
            fixed |= dict.fromkeys(layers_of(group, modules), f"together with other groups {reasons[group.name]}")
    if not kept:
        raise cannot_narrow(model, fixed)
    return Coupling(groups=tuple(kept), fixed=fixed)


def _alone(model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup]) -> dict[str, str]:
    """Those that cannot be narrowed on their own, by name, and why; groups at the same place of other blocks mostly pass at once."""
    kinds: dict[str, list[CoupledGroup]] = defaultdict(list)
    for group in groups:
        kinds[re.sub(r"\d+", "", group.name)].append(group)
    found: dict[str, str | None] = {}
    for kind in kinds.values():
        if (reason := _failure(model, example, kind)) is not None:
            found |= {g.name: _failure(model, example, (g,)) if len(kind) > 1 else reason for g in kind}
    return {name: reason for name, reason in found.items() if reason is not None}


def _together(
    model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup], kept: Sequence[CoupledGroup] = ()
) -> tuple[Sequence[CoupledGroup], dict[str, str]]:
    """Those kept and what can be narrowed beside them, found by halving, and by name why the others cannot."""
    if not groups or (reason := _failure(model, example, (*kept, *groups))) is None:
        return (*kept, *groups), {}
    if len(groups) == 1:
        return kept, {groups[0].name: reason}
    half = len(groups) // 2
    kept, first = _together(model, example, groups[:half], kept)
    kept, second = _together(model, example, groups[half:], kept)
    return kept, first | second


def _failure(model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup]) -> str | None:
    """Why these groups cannot be narrowed at once, or None; where outputs differ, float64 tells rounding from another order."""
    reason = _trial_failure(model, example, groups)
    if reason != _OTHER_ORDER or example.dtype == torch.float64:
        return reason
    try:
        precise = cloned(model).eval().double()
        with torch.no_grad():
            precise(example.double())
    except FAILURES:
        return reason  # it does not run in float64
    return _trial_failure(precise, example.double(), groups)


def _trial_failure(model: nn.Module, example: Tensor, groups: Sequence[CoupledGroup]) -> str | None:
    """Why the network does not run without the last unit of each group, or computes something else with units doubled; or None."""
    trial = cloned(model, share=True).eval()
    generator = torch.Generator().manual_seed(0)
    share = _SMALL_SHARE if sum(p.numel() for p in model.parameters()) > _LARGE else _SHARE
    try:
        with torch.no_grad():
            expected = trial(example)
            change_widths(trial, groups, {g.name: range(g.units - 1) for g in groups})
            got = trial(example)
            if got.shape != expected.shape:
                return f"without a channel its output is {tuple(got.shape)} instead of {tuple(expected.shape)}"
            del trial
            averaged = [g for g in groups if _averaged(g, model)]
            for _ in range(2):  # two draws: a wrong order may map one to itself
                trial = cloned(model, share=True).eval()
                change_widths(trial, groups, {g.name: _doubled(g, model, share, generator) for g in groups})
                if differ(trial(example), expected):
                    return _OTHER_ORDER
                if averaged:
                    trial = cloned(model, share=True).eval()
                    permute_units(trial, groups, {g.name: torch.randperm(g.units, generator=generator) for g in averaged})
                    if differ(trial(example), expected):
                        return _OTHER_ORDER
    except FAILURES as error:
        return f"without a channel it does not run ({described(error)})"
    return None


def _averaged(group: CoupledGroup, model: nn.Module) -> bool:
    """Whether a norm or a response averages over the group's units; a group norm of several groups averages within each."""
    modules = dict(model.named_modules())
    ports = [(p.side, modules.get(p.module)) for p in group.ports]
    return any(side == "param" or isinstance(m, nn.LayerNorm) or (isinstance(m, nn.GroupNorm) and m.num_groups == 1) for side, m in ports)


def _unbiased(group: CoupledGroup, model: nn.Module) -> bool:
    """Whether a norm divides by one less than the group's channels: all of them doubled, it puts out something else."""
    owners = (p.module.rpartition(".")[0] for p in group.ports if p.side == "param")
    return any(isinstance(model.get_submodule(owner), _UNBIASED_NORMS) for owner in owners)


def _beside(group: CoupledGroup, model: nn.Module) -> bool:
    """Whether a norm averages over the group's channels and others beside them, as behind a concatenation."""
    modules = dict(model.named_modules())
    norms = [p for p in group.ports if isinstance(modules.get(p.module), (nn.LayerNorm, nn.GroupNorm))]
    return any(p.positions.numel() < place_width(model, modules, p.module, p.side) for p in norms)


def _doubled(group: CoupledGroup, model: nn.Module, share: int, generator: torch.Generator) -> list[int]:
    """Units with a random one of `share` twice; averaged ones all twice, which leaves the average alone, or once and only permuted."""
    if _averaged(group, model):
        twice = share == _SHARE and not _unbiased(group, model) and not _beside(group, model)
        return sorted([*range(group.units)] * (2 if twice else 1))
    some = torch.randperm(group.units, generator=generator)[: max(1, group.units // share)]
    return sorted([*range(group.units), *some.tolist()])


def permute_units(model: nn.Module, groups: Sequence[CoupledGroup], orders: Mapping[str, Tensor]) -> None:
    """Put the units of groups into another order, in place; the network computes the same if all that read them are known.

    Args:
        model: changed.
        groups: of this model.
        orders: per group (U,) which unit comes to each place; groups that are not named keep theirs.

    >>> net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2)).eval()
    >>> x, bias = torch.randn(2, 1), net[0].bias
    >>> before, (group,) = net(x), find_groups(net, x).groups
    >>> permute_units(net, [group], {"0": torch.tensor([2, 0, 1])})
    >>> torch.allclose(net(x), before, atol=1e-6), torch.equal(net[0].bias, bias[[2, 0, 1]])
    (True, True)
    """
    modules = dict(model.named_modules())
    indices: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        for port in group.ports if group.name in orders else ():
            place = port.module, port.side
            if not (width := place_width(model, modules, *place)):
                continue  # an activation
            index = indices.setdefault(place, torch.arange(width))
            index[port.positions.flatten()] = port.positions[orders[group.name]].flatten()
    for (name, side), index in indices.items():
        select(model, modules, name, side, index, torch.ones(len(index)))


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
    places: dict[tuple[str, str], dict[int, Fate]] = defaultdict(dict)
    for group in groups:
        if len(keep.get(group.name, range(group.units))) == 0:
            raise CannotNarrow(f"group {group.name} must keep at least one of its {group.units} units.")
        for port in group.ports:
            places[port.module, port.side] |= _fates(group, port, keep)
    modules = dict(model.named_modules())
    head, attentions = _classifier(model), [m for m in modules.values() if has_plain_heads(m)]
    for (name, side), fates in places.items():
        index, often = _indices(place_width(model, modules, name, side), fates)
        select(model, modules, name, side, index, often)
    for module in attentions:
        module.num_heads = module.qkv.out_features // (3 * module.head_dim)
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.num_heads * module.head_dim
    if head is not None:
        name, before = head
        inside = getattr(model, "num_features", before) != before  # layers before a timm head, as VGG's, give its inputs
        for owner in around_classifier(model):
            for attribute in ("num_features", "head_hidden_size", "embed_dim", *(["in_features"] if inside else [])):
                if getattr(owner, attribute, None) == before:
                    setattr(owner, attribute, _inputs(modules[name]))


def around_classifier(model: nn.Module) -> list[nn.Module]:
    """The network and the modules of it that hold its classifier, as timm's heads do."""
    name = head[0] if (head := _classifier(model)) else ""
    return [model.get_submodule(".".join(name.split(".")[:depth])) for depth in range(name.count(".") + 1)]


def _classifier(model: nn.Module) -> tuple[str, int] | None:
    """The first layer of the classifier and its width, which timm's models and their heads name in attributes of their own."""
    names = head_names(model) if callable(getattr(model, "get_classifier", None)) else set()
    layers = ((n, m) for n, m in model.named_modules() if n in names and isinstance(m, MEASURED))
    return next(((name, _inputs(layer)) for name, layer in layers), None)


def _inputs(layer: Any) -> int:
    return int(layer.in_channels if isinstance(layer, CONVS) else layer.in_features)


def _fates(group: CoupledGroup, port: Port, keep: Keep) -> dict[int, Fate]:
    """What becomes of each position of a port."""
    often = Counter(keep.get(group.name, range(group.units)))
    return {p: ((group.name, unit), often[unit]) for unit, positions in enumerate(port.positions.tolist()) for p in positions}


def _indices(width: int, fates: Mapping[int, Fate]) -> tuple[Tensor, Tensor]:
    """Positions that stay, and how often each is there; neighbours of one unit are repeated together, those of no group stay."""
    kept, counts = list[int](), list[int]()
    for (_, often), run in itertools.groupby(range(width), key=lambda position: fates.get(position, (position, 1))):
        positions = list(run) * often
        kept += positions
        counts += [often] * len(positions)
    return torch.tensor(kept, dtype=torch.long), torch.tensor(counts, dtype=torch.float32)


def kept_channels(groups: Sequence[CoupledGroup], keep: Keep, module: str, side: str, width: int) -> Tensor:
    """Which of a module's channels stay, in order."""
    fates: dict[int, Fate] = {}
    for group in groups:
        for port in group.ports:
            if (port.module, port.side) == (module, side):
                fates |= _fates(group, port, keep)
    return _indices(width, fates)[0]
