"""The plan: how wide each group shall be, in words and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from capnas.errors import UsageError, one_of
from capnas.measures.widths import Widths, equal_saturation, least_loss, needed_widths, width_choices
from capnas.narrowing.groups import CoupledGroup
from capnas.narrowing.survey import Survey

Allocation = Literal["loss", "saturation"]
ALLOCATIONS = ("loss", "saturation")
CEILING = 0.9  # saturation from which a group is named as one that could use more width


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What becomes of one group; widths in channels of its first layer.

    Attributes:
        name: of the group, its first layer.
        layers: all layers whose width changes with it.
        width, needed, planned: now; what the data needs (intrinsic dimension); in the plan.
        saturation: before; ``expected``: needed / planned, above 1 where the plan is narrower than the data needs.
        utilisation: capacity utilisation (36) of its least used layer; ``over_wide`` where flagged by (50).
        macs, planned_macs, params, planned_params: of the layers that write the group.
        loss: expected increase of the loss of one image, to second order, if this group alone is narrowed.
        grow: saturation at the ceiling: a candidate to grow.
    """

    name: str
    layers: tuple[str, ...]
    width: int
    needed: int
    planned: int
    saturation: float
    expected: float
    utilisation: float | None
    over_wide: bool
    macs: int
    planned_macs: int
    params: int
    planned_params: int
    loss: float
    grow: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A width for every group.

    Attributes:
        goal: what was asked for, in words.
        groups: in the order of the network.
        fixed: layers that keep their width, and why.
        macs, planned_macs, params, planned_params: of the whole network, for one image.
    """

    goal: str
    groups: tuple[GroupPlan, ...]
    fixed: Mapping[str, str]
    macs: int
    planned_macs: int
    params: int
    planned_params: int

    @property
    def widths(self) -> dict[str, int]:
        """Planned channels by group."""
        return {g.name: g.planned for g in self.groups}

    @property
    def grows(self) -> bool:
        """Whether any group becomes wider."""
        return any(g.planned > g.width for g in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `read_widths` takes them back."""
        return asdict(self) | {"widths": self.widths}


def plan_widths(
    found: Survey,
    *,
    target_macs: float | None = None,
    lossless: bool = False,
    widths: Mapping[str, int] | None = None,
    round_to: int = 8,
    allocation: Allocation = "loss",
) -> Plan:
    """Plan a width for every group, by exactly one of three goals.

    Args:
        found: from `capnas.narrowing.survey.survey`.
        target_macs: share of the multiply-accumulates to keep, in (0, 1).
        lossless: as wide as the survey's threshold of the variance needs.
        widths: channels by group; groups that are not named keep theirs; more than now is a wish to grow.
        round_to: channels are a multiple of it (of half of it in groups narrower than twice that, and so on).
        allocation: of a target: "loss" narrows where the loss per MAC saved is least, "saturation" makes needed / planned even.

    Raises:
        UsageError: not exactly one goal, a target that cannot be reached, or widths that do not fit the groups.
    """
    if (target_macs is not None) + lossless + (widths is not None) != 1:
        raise UsageError("give exactly one goal: a target of MACs, lossless, or a plan of widths.")
    check_division(allocation, round_to)
    options = [
        Widths(now=g.units, needed=n, choices=width_choices(g.units, g.unit_channels, round_to), losses=p.losses)
        for g, n, p in zip(found.groups, found.needed, found.paths)
    ]
    full = float(found.cost.macs.sum())
    if widths is not None:
        units, goal = check_widths(found.groups, widths), "the widths of a plan"
    elif lossless:
        units, goal = needed_widths(options), f"every group as wide as {found.threshold:g} of its variance needs"
    else:
        assert target_macs is not None
        check_target(target_macs)
        least = float(found.cost.total_macs(torch.tensor([[float(o.choices[0]) for o in options]], dtype=torch.float64)))
        if least > target_macs * full:
            raise UsageError(f"{target_macs:g} of the MACs cannot be reached: {_why_not(found, least / full, full, round_to)}.")
        allocate = least_loss if allocation == "loss" else equal_saturation
        units = allocate(options, found.cost.total_macs, target_macs * full)
        way = "least loss per MAC saved" if allocation == "loss" else "equal saturation"
        goal = f"{target_macs:g} of the MACs, by {way}"
    return _plan(found, units, goal)


def _why_not(found: Survey, least: float, full: float, round_to: int) -> str:
    fixed = found.cost.fixed_macs() / full
    words = [f"with every group at its least width {least:.2f} of them remain"]
    if fixed >= 0.005:
        words.append(f"layers of fixed width cost {fixed:.2f}")
    if any(g.unit_channels < round_to for g in found.groups):
        words.append("a smaller --round-to allows narrower groups")
    return "; ".join(words)


def check_target(share: float) -> None:
    """Refuse a share of the multiply-accumulates to keep that is no share.

    Raises:
        UsageError: outside (0, 1).
    """
    if not 0 < share < 1:
        raise UsageError(f"the target is the share of MACs to keep, in (0, 1), got {share}.")


def check_division(allocation: str, round_to: int) -> None:
    """Refuse what does not say how a target is divided over groups.

    Raises:
        UsageError: an unknown allocation, or a multiple below 1.
    """
    if allocation not in ALLOCATIONS:
        raise UsageError(one_of("allocation", allocation, ALLOCATIONS))
    if round_to < 1:
        raise UsageError(f"round_to must be at least 1, got {round_to}.")


def read_widths(path: str | Path) -> dict[str, int]:
    """Widths by group from a JSON file: what ``--dry-run --json`` printed, or ``{"widths": {"layer1.0.conv1": 16}}``.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    place = Path(path)
    try:
        document = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the plan {place} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"the plan {place} is not JSON: {error}.") from error
    if isinstance(document, dict) and isinstance(document.get("plan"), dict):
        document = document["plan"]
    widths = document.get("widths") if isinstance(document, dict) else None
    if not isinstance(widths, dict) or not all(isinstance(w, int) and w > 0 for w in widths.values()):
        raise UsageError(f'the plan {place} must hold {{"widths": {{"layer": channels}}}} with whole numbers of channels above 0.')
    return widths


def check_widths(groups: Sequence[CoupledGroup], widths: Mapping[str, int]) -> list[int]:
    """Units of each group in a plan of widths.

    Args:
        groups: of the network.
        widths: channels by group; groups that are not named keep theirs.

    Raises:
        UsageError: a name that is no group, or a width that is no multiple of the group's unit.
    """
    known = {g.name: g for g in groups}
    for name, width in widths.items():
        if name not in known:
            raise UsageError(one_of("a group of the plan", name, known))
        if width % known[name].unit_channels or width < known[name].unit_channels:
            raise UsageError(f"the width of {name} must be a multiple of {known[name].unit_channels} channels, got {width}.")
    return [widths.get(g.name, g.channels) // g.unit_channels for g in groups]


def _plan(found: Survey, units: Sequence[int], goal: str) -> Plan:
    wide = torch.tensor([list(units)], dtype=torch.float64)
    shares, by_module = found.cost.shares(wide)[0], found.cost.planned_params(wide)[0]
    place = {name: i for i, name in enumerate(found.cost.names)}
    rows = []
    for i, (group, n) in enumerate(zip(found.groups, units)):
        own = [place[p.module] for p in group.ports if p.side in ("out", "both") and p.module in place]
        macs, params = found.cost.macs[own], found.cost.params[own]
        used = found.utilisation[i]
        rows.append(
            GroupPlan(
                name=group.name,
                layers=tuple(p.module for p in group.ports if p.side != "in"),
                width=group.channels,
                needed=round(found.needed[i] * group.unit_channels),
                planned=n * group.unit_channels,
                saturation=found.saturation[i],
                expected=found.needed[i] / n,
                utilisation=used if used == used else None,
                over_wide=found.over_wide[i],
                macs=round(float(macs.sum())),
                planned_macs=round(float((macs * shares[own]).sum())),
                params=round(float(params.sum())),
                planned_params=round(float(by_module[own].sum())),
                loss=float(found.paths[i].losses[group.units - n]) if n < group.units else 0.0,
                grow=found.saturation[i] >= CEILING,
            )
        )
    return Plan(
        goal=goal,
        groups=tuple(rows),
        fixed=dict(found.coupling.fixed),
        macs=round(float(found.cost.macs.sum())),
        planned_macs=round(float(found.cost.total_macs(wide))),
        params=round(float(found.cost.params.sum())),
        planned_params=round(float(found.cost.total_params(wide))),
    )
