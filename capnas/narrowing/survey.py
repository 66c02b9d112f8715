"""Everything that is measured of a network before its widths are planned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from capnas.capacity import capacity_map
from capnas.errors import UsageError
from capnas.measures.narrowing import Reader, RemovalPath, factor, removal_path
from capnas.measures.saturation import THRESHOLD, intrinsic_dimension, spectrum
from capnas.narrowing.applying import narrowable
from capnas.narrowing.calibration import (
    NormInputs,
    Reading,
    matrix,
    norm_inputs,
    norms_behind,
    output_moments,
    read_layers,
    readable,
    refitted,
)
from capnas.narrowing.costs import NetworkCost
from capnas.narrowing.groups import CoupledGroup, Coupling, cannot_narrow, layers_of, shared_parameters
from capnas.narrowing.refusing import check_modules
from capnas.narrowing.standardized import plain_convs
from capnas.narrowing.turning import Turn, find_turns


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What calibration images tell about a network's coupled groups.

    Attributes:
        coupling: the groups, and the layers whose width is fixed.
        cost: of the network by widths.
        readings: of every plain dense layer, see `capnas.narrowing.calibration.read_layers`.
        norms: layers straight before a batch norm, and that norm.
        norm_inputs: mean and variance of what each batch norm reads on the images.
        needed: per group the units that hold `threshold` of the variance of each of its writers' outputs.
        saturation: per group needed / units, in [0, 1].
        paths: per group the order in which its units are best removed.
        turns: groups whose stream can be turned first, so that directions are removed and not channels (`capnas.narrowing.turning`).
        utilisation: per group the least capacity utilisation (36) of its writers, NaN where unknown.
        over_wide: groups of which a writer is flagged by (50).
        threshold: see ``needed``.
        images: the calibration images (N, C, H, W).
        gains: parameters of the network that plain convolutions in place of standardized ones do without.
    """

    coupling: Coupling
    cost: NetworkCost
    readings: Mapping[str, Reading]
    norms: Mapping[str, str]
    norm_inputs: Mapping[str, NormInputs]
    needed: tuple[float, ...]
    saturation: tuple[float, ...]
    paths: tuple[RemovalPath, ...]
    turns: Mapping[str, Turn]
    utilisation: tuple[float, ...]
    over_wide: tuple[bool, ...]
    threshold: float
    images: Tensor
    gains: int

    @property
    def groups(self) -> tuple[CoupledGroup, ...]:
        """The groups that can be narrowed, in the order of the network."""
        return self.coupling.groups

    @property
    def removals(self) -> tuple[RemovalPath, ...]:
        """Per group the path on which it is narrowed: that of its stream as it is turned, where it can be."""
        return tuple(self.turns[g.name].path if g.name in self.turns else p for g, p in zip(self.groups, self.paths))


def survey(model: nn.Module, images: Tensor, *, threshold: float = THRESHOLD, seed: int = 0) -> Survey:
    """Measure a trained network on calibration images; the network is left as it is.

    Convolutions that standardize their weights count and are measured as the plain ones that they become (`plain_convs`).

    Args:
        model: a classifier on the images' device.
        images: (N, C, H, W), some hundreds to two thousand, run as one batch.
        threshold: share of the variance in the intrinsic dimension, in (0, 1].
        seed: of sampling.

    Raises:
        CannotNarrow: no layer's width can be changed, or the network cannot be read, see `capnas.narrowing.refusing`; the text says why.
        MissingDependencyError: Torch-Pruning is not installed.
    """
    given = check_modules(model)
    model = plain_convs(given)
    coupling = narrowable(model, images[:2])
    modules = dict(model.named_modules())
    tied = shared_parameters(model)  # refitting one layer would change the other
    readings = read_layers(model, [n for n, m in modules.items() if readable(m) and n not in tied], images, seed=seed)
    fixed, groups, read = dict(coupling.fixed), list[CoupledGroup](), list[list[Reader]]()
    for group in coupling.groups:
        readers = _readers(group, modules, readings)
        unread = _unread(group, modules, readings)
        if readers and not unread:
            groups.append(group)
            read.append(readers)
        else:
            reason = "no layer that reads it is a plain dense conv or linear layer that could be refitted"
            if readers:
                reason = f"{unread[0]} reads it too, and is no plain dense conv or linear layer that could be weighed and refitted"
            fixed |= dict.fromkeys(layers_of(group, modules), reason)
    if not groups:
        raise cannot_narrow(model, fixed)
    needed = _needed(model, groups, images, threshold)
    try:
        capacity = capacity_map(model, images[:64], mode="eval", pixels=False)
        utilisation, wide = capacity.utilisation, capacity.over_wide
    except UsageError:  # second evidence only: a network that it cannot read is narrowed without it
        utilisation, wide = {}, ()
    norms, moments = norms_behind(model, images[:2]), norm_inputs(model, images)
    added = [n for n in readings if refitted(modules[n]) and modules[n].bias is None and norms.get(n) not in moments]
    writers = [[p.module for p in g.writers()] for g in groups]
    used = [[utilisation[w] for w in names if w in utilisation] for names in writers]
    return Survey(
        coupling=Coupling(groups=tuple(groups), fixed=fixed),
        cost=NetworkCost.of(model, groups, (1, *images.shape[1:]), added=added),
        readings=readings,
        norms=norms,
        norm_inputs=moments,
        needed=tuple(needed),
        saturation=tuple(n / g.units for n, g in zip(needed, groups)),
        paths=tuple(map(removal_path, read)),
        turns=find_turns(model, groups, read, readings, norms, images[:2]),
        utilisation=tuple(min(values, default=float("nan")) for values in used),
        over_wide=tuple(any(w in wide for w in names) for names in writers),
        threshold=threshold,
        images=images,
        gains=sum(p.numel() for p in given.parameters()) - sum(p.numel() for p in model.parameters()),
    )


def _unread(group: CoupledGroup, modules: Mapping[str, nn.Module], readings: Mapping[str, Reading]) -> list[str]:
    """Dense layers that read the group and were not read; a grouped conv loses inputs only with the outputs that they alone make."""
    return [p.module for p in group.readers() if p.module not in readings and getattr(modules[p.module], "groups", 1) == 1]


def _readers(group: CoupledGroup, modules: Mapping[str, nn.Module], readings: Mapping[str, Reading]) -> list[Reader]:
    found = []
    for port in group.readers():
        if port.module not in readings:
            continue
        reading, weight = readings[port.module], matrix(modules[port.module]).detach()
        taps = int(math.prod(getattr(modules[port.module], "kernel_size", ())))
        if len(reading.covariance) == weight.shape[1]:
            columns = (port.positions[:, :, None] * taps + torch.arange(taps)).flatten(1)
            reader = Reader(weight=weight, covariance=reading.covariance, columns=columns, curvature=reading.curvature)
        else:  # kernel positions taken for independent: each is an output of its own
            products = sum(w.double().T @ reading.curvature @ w.double() for w in weight.unflatten(1, (-1, taps)).unbind(2))
            reader = Reader(weight=factor(cast(Tensor, products)), covariance=reading.covariance, columns=port.positions)
        found.append(reader)
    return found


def saturations(model: nn.Module, images: Tensor, threshold: float = THRESHOLD) -> dict[str, float]:
    """Share of its outputs that each conv and linear layer needs for a share of their variance, in [0, 1], in eval mode.

    Args:
        model: left as it is.
        images: (N, C, H, W) on the model's device.
        threshold: share of the variance, in (0, 1].

    >>> net = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 2))
    >>> saturations(net, torch.randn(32, 1))
    {'0': 0.25, '1': 0.5}
    """
    found = {}
    for name, record in output_moments(model, images).items():
        values = spectrum(record.covariance, threshold)
        found[name] = intrinsic_dimension(values.eigenvalues, threshold, values.total) / record.width
    return found


def _needed(model: nn.Module, groups: list[CoupledGroup], images: Tensor, threshold: float) -> list[float]:
    """Units that each group's data needs: of several writers the most demanding one's, in their own widths."""
    shares = saturations(model, images, threshold)
    return [g.units * max((shares[p.module] for p in g.writers() if p.module in shares), default=1.0) for g in groups]
