"""Which channels must go together: coupled groups of a network, their units and where each unit lives.

Torch-Pruning's dependency graph (Fang et al., arXiv 2301.12900) says which channels of which layers share a width. Here its answer is cut
into *units*, the least that can be removed: one channel of a residual stream and of all that reads or writes it, one whole group of a
grouped convolution, one head of an attention. All removal is then our own (`capnas.narrowing.applying`).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn

from capnas.errors import described
from capnas.graph.dispatch import GatedHalves
from capnas.layers import CONVS, MEASURED
from capnas.measures.probing import untouched
from capnas.narrowing.attention import has_plain_heads, head_units, is_attention
from capnas.narrowing.following import followed, forgiving, torch_pruning
from capnas.narrowing.refusing import CannotNarrow, why_uncalled
from capnas.projection import head_names
from capnas.recording import hooked

Side = Literal["out", "in", "both", "param"]
Atom = tuple[str, Side, int]
Units = Sequence[Sequence[Atom]]
CLASSES = "it gives the classes"
_ENDLESS = "its channels are sliced, joined or folded in more ways than can be followed"
_RULES = (*CONVS, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


@dataclass(frozen=True, kw_only=True)
class Port:
    """Where the units of a group live in one module.

    Attributes:
        module: qualified name; of a bare parameter its own.
        side: "out" or "in" of a conv or linear layer, "both" of a norm, depthwise conv or PReLU, "param" of a bare parameter (last axis).
        positions: (U, b) channel positions of each of U units, ascending.
    """

    module: str
    side: Side
    positions: Tensor = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class CoupledGroup:
    """Layers that share a width.

    Attributes:
        name: of the first layer that writes the shared channels.
        units: U, how many parts can be removed one by one.
        channels: width in channels of the first layer, a multiple of U.
        ports: all places.
    """

    name: str
    units: int
    channels: int
    ports: tuple[Port, ...]

    @property
    def unit_channels(self) -> int:
        """Channels of one unit."""
        return self.channels // self.units

    def writers(self) -> list[Port]:
        """The layers whose outputs are the shared channels."""
        return [p for p in self.ports if p.side == "out"]

    def readers(self) -> list[Port]:
        """The dense layers that read them."""
        return [p for p in self.ports if p.side == "in"]


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """The groups of a network in the order in which it runs them, and the layers that keep their width, with the reason."""

    groups: tuple[CoupledGroup, ...]
    fixed: Mapping[str, str]

    def __getitem__(self, name: str) -> CoupledGroup:
        return next(g for g in self.groups if g.name == name)


def find_groups(model: nn.Module, example: Tensor) -> Coupling:
    """Find the coupled groups of a network; the model is not changed.

    Args:
        model: on the example's device.
        example: (B, C, H, W) an input.

    Raises:
        MissingDependencyError: Torch-Pruning is not installed.
        CannotNarrow: nothing in this network can be narrowed; the text says why.

    >>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 2))
    >>> group, = find_groups(net, torch.randn(1, 1, 4, 4)).groups
    >>> group.name, group.units, [(p.module, p.side, p.positions.shape[1]) for p in group.ports]
    ('0', 6, [('0', 'out', 1), ('1', 'both', 1), ('4', 'in', 4)])
    """
    modules = dict(model.named_modules())
    order = run_order(model, example)
    heads = head_names(model)
    fixed: dict[str, str] = {h: CLASSES for h in heads if isinstance(modules[h], MEASURED)}
    attentions = {n: m for n, m in modules.items() if is_attention(m)}
    tied = shared_parameters(model)
    found: list[Units] = []
    for writer, units, whole in _dependency_groups(model, example):
        reason = _tied(units, tied) or _refusal(units, modules, heads, attentions) or (None if whole else _ENDLESS)
        if reason:
            for name in _written(units, modules) | {writer}:
                fixed.setdefault(name, reason)
        else:
            found.append(units)
    found += [head_units(n, m) for n, m in attentions.items() if has_plain_heads(m) and not {f"{n}.qkv", f"{n}.proj"} & tied.keys()]
    groups = []
    for atoms in _merged(found, modules):
        group = _group(atoms, order)
        if isinstance(group, CoupledGroup):
            groups.append(group)
            for name in layers_of(group, modules):
                fixed.pop(name, None)
        else:
            for name in _written(atoms, modules):
                fixed.setdefault(name, group)
    groups.sort(key=lambda g: order.get(g.name, len(order)))
    held = {name for g in groups for name in layers_of(g, modules)}
    alone = [n for n, m in modules.items() if isinstance(m, MEASURED) and n not in held and n not in fixed]
    fixed |= dict.fromkeys(alone, "Torch-Pruning follows none of its channels")
    fixed |= why_uncalled(model, example, [n for n in alone if n not in order])
    if not groups:
        raise cannot_narrow(model, fixed)
    return Coupling(groups=tuple(groups), fixed=dict(sorted(fixed.items(), key=lambda item: order.get(item[0], len(order)))))


def layers_of(group: CoupledGroup, modules: Mapping[str, nn.Module]) -> list[str]:
    """The conv and linear layers whose width is the group's, depthwise ones too, without those that read it alone."""
    return [p.module for p in group.ports if p.side != "in" and isinstance(modules.get(p.module), MEASURED)]


def _written(units: Units, modules: Mapping[str, nn.Module]) -> set[str]:
    """The conv and linear layers, depthwise ones too, that put out channels of these units."""
    return {name for unit in units for name, side, _ in unit if side != "in" and isinstance(modules.get(name), MEASURED)}


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Modules that own a parameter which another module owns too (and such parameters themselves), each with the words that say so.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> net[1].weight = net[0].weight
    >>> shared_parameters(net)["1"]
    '0.weight and 1.weight are one parameter'
    """
    owners: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)].append((name, f"{name}.{leaf}" if name else leaf))
    found: dict[str, str] = {}
    for places in owners.values():
        for module_name, full in places if len(places) > 1 else ():
            words = f"{places[0][1]} and {places[-1][1]} are one parameter"
            found.setdefault(module_name, words)
            found.setdefault(full, words)
    return found


def _tied(units: Units, tied: Mapping[str, str]) -> str | None:
    return next((tied[name] for name, _, _ in units[0] if name in tied), None)


def cannot_narrow(model: nn.Module, fixed: Mapping[str, str]) -> CannotNarrow:
    """The error of a network of which every layer is fixed, with at most three of the reasons."""
    alone = f"its only layer has a fixed width, {CLASSES}" if fixed else "none of its modules is a conv or linear layer"
    reasons = sorted(set(fixed.values()) - {CLASSES})[:3] or [alone]
    return CannotNarrow(f"cannot narrow this {type(model).__name__}: {'; '.join(reasons)}.")


def _dependency_groups(model: nn.Module, example: Tensor) -> Iterable[tuple[str, list[list[Atom]], bool]]:
    """Torch-Pruning's groups as units of atoms, named by their root layer, and whether each is whole."""
    tp, widest = torch_pruning(), max((max(p.shape, default=1) for p in model.parameters()), default=1)
    one_slope = [m for m in model.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]  # for all channels: has no width
    with warnings.catch_warnings(), untouched(model), torch.enable_grad(), GatedHalves(), forgiving():
        warnings.simplefilter("ignore")
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # whole numbers have no gradients
        for module in one_slope:
            module.requires_grad_(False)  # else what spreads the slope would be followed
        try:
            graph = tp.DependencyGraph().build_dependency(model, example, ignored_layers=one_slope, verbose=False)
            groups = list(followed(graph, widest))
        except Exception as error:
            why = f"Torch-Pruning cannot follow its channels ({described(error)})"
            raise CannotNarrow(f"cannot narrow this {type(model).__name__}: {why}.") from error
    parameters = {id(p): n for n, p in model.named_parameters()}
    modules = {id(m): n for n, m in model.named_modules()}
    for group, whole in groups:
        units: dict[int, list[Atom]] = defaultdict(list)
        for item in group:
            target = item.dep.target.module
            if id(target) in parameters:
                name, side = parameters[id(target)], "param"
            elif id(target) in modules:
                name, side = modules[id(target)], _side(target, item.dep.handler.__name__)
            else:
                continue
            for position, root in zip(item.idxs, item.root_idxs):
                units[root].append((name, side, position))  # type: ignore[arg-type]
        yield modules[id(group[0].dep.target.module)], [units[r] for r in sorted(units)], whole


def _side(module: nn.Module, handler: str) -> Side:
    if isinstance(module, MEASURED):
        if isinstance(module, CONVS) and module.groups == module.in_channels == module.out_channels > 1:
            return "both"
        return "in" if "in_channels" in handler else "out"
    return "both"


def _refusal(units: Units, modules: Mapping[str, nn.Module], heads: set[str], attentions: Mapping[str, nn.Module]) -> str | None:
    """Why a group keeps its width, or None."""
    places = {(name, side) for name, side, _ in units[0]}
    if any((f"{n}.qkv", "in") in places or (f"{n}.proj", "out") in places for n in attentions):
        return "it writes the token stream, whose width positions, norms and heads of the whole network share"
    for name, side in places:
        module = modules.get(name)
        if name in heads and side == "out":
            return CLASSES
        if attention := next((n for n in attentions if name in (f"{n}.qkv", f"{n}.proj")), None):
            if has_plain_heads(attentions[attention]):
                return "an attention is narrowed by whole heads"
            return f"an attention is narrowed by whole heads, and {attention} is no plain one of several heads side by side"
        if isinstance(module, MEASURED) and {n for n, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
            return f"{name} is a {type(module).__name__}, whose further parameters have no rule"
        if module is not None and side == "both" and not isinstance(module, _RULES) and any(True for _ in module.parameters(recurse=False)):
            return f"{name} is a {type(module).__name__}, which has no rule"
    return None


def _merged(found: Sequence[Units], modules: Mapping[str, nn.Module]) -> list[Units]:
    """Units that share atoms, or sit in one group of a grouped conv or group norm, become one; groups that share units become one."""
    atoms = DisjointSet(atom for units in found for unit in units for atom in unit)
    for units in found:
        for first, *rest in units:
            for other in rest:
                atoms.merge(first, other)
    for atom in list(atoms):
        name, side, position = atom
        module = modules.get(name)
        if isinstance(module, CONVS) and module.groups > 1 and side in ("in", "out"):
            wide, narrow = module.in_channels // module.groups, module.out_channels // module.groups
            block = position // (wide if side == "in" else narrow)
            for other in ((name, "in", block * wide), (name, "out", block * narrow)):
                atoms.add(other)
                atoms.merge(atom, other)
        elif isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            size = module.num_channels // module.num_groups
            atoms.add((name, side, position // size * size))
            atoms.merge(atom, (name, side, position // size * size))
    groups, place = DisjointSet(range(len(found))), dict[Atom, int]()
    for i, units in enumerate(found):
        for first, *_ in units:
            groups.merge(i, place.setdefault(atoms[first], i))
    members: dict[int, dict[Atom, list[Atom]]] = defaultdict(lambda: defaultdict(list))
    for atom in atoms:
        if (unit := atoms[atom]) in place:
            members[groups[place[unit]]][unit].append(atom)
    return [list(units.values()) for units in members.values()]


def _group(units: Units, order: Mapping[str, int]) -> CoupledGroup | str:
    """The group of these units, or why they are none."""
    places: dict[tuple[str, Side], list[list[int]]] = defaultdict(lambda: [[] for _ in units])
    for i, atoms in enumerate(units):
        for name, side, position in atoms:
            places[name, side][i].append(position)
    writers = [place for place in places if place[1] == "out"]
    if not writers:
        return "no conv or linear layer writes its channels"
    if len(units) < 2:
        return "its channels can only be removed all together"
    if uneven := [name for (name, _), positions in places.items() if len({len(p) for p in positions}) != 1]:
        first_of = min(uneven, key=lambda name: order.get(name, len(order)))
        return f"{first_of} holds only some of the channels that are coupled to it, as behind a split"
    first = min(writers, key=lambda place: order.get(place[0], len(order)))
    ranks = sorted(range(len(units)), key=lambda i: min(places[first][i]))
    ports = tuple(
        Port(module=name, side=side, positions=torch.tensor([sorted(positions[i]) for i in ranks]))
        for (name, side), positions in sorted(places.items(), key=lambda item: order.get(item[0][0], len(order)))
    )
    return CoupledGroup(name=first[0], units=len(units), channels=len(units) * len(places[first][0]), ports=ports)


def run_order(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Position of each module in a run of the network, by its name."""
    order: dict[str, int] = {}
    names = {m: n for n, m in model.named_modules()}

    def note(module: nn.Module, args: Any) -> None:
        order.setdefault(names[module], len(order))

    with untouched(model), torch.no_grad(), hooked(dict.fromkeys(names.values(), note), model, before=True):
        model(example)
    return order
