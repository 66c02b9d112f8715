"""The plan: how wide each group shall be, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch

from capnas.documents import read_json
from capnas.errors import UsageError, check_name
from capnas.measures.widths import Widths, equal_saturation, least_loss, needed_widths, width_choices
from capnas.narrowing.costs import NetworkCost
from capnas.narrowing.groups import CoupledGroup
from capnas.narrowing.survey import Survey

Allocation = Literal["loss", "saturation"]
ALLOCATIONS = ("loss", "saturation")
LARGEST = 100  # times the MACs or parameters of now, beyond which widths are taken for a mistake
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
        turned: directions go and not channels, see `capnas.narrowing.turning`.
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
    turned: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A width for every group.

    Attributes:
        goal: what was asked for, in words.
        groups: in the order of the network.
        fixed: layers that keep their width, and why.
        macs, planned_macs, params, planned_params: of the whole network, for one image; planned with the biases that refitting gives
            to layers that have none, without which ``refit=False`` of `capnas.narrowing.narrowed` has fewer parameters.
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
        raise UsageError("give exactly one goal: target_macs, lossless or widths.")
    check_division(allocation, round_to)
    options = [
        Widths(now=g.units, needed=n, choices=width_choices(g.units, g.unit_channels, round_to), losses=p.losses)
        for g, n, p in zip(found.groups, found.needed, found.removals)
    ]
    full = float(found.cost.macs.sum())
    if widths is not None:
        units, goal = check_widths(found.groups, widths), "the widths of a plan"
        check_growth(found.cost, units)
    elif lossless:
        units, goal = needed_widths(options), f"every group as wide as {found.threshold:g} of its variance needs"
    else:
        assert target_macs is not None
        check_reach(found.cost, found.groups, target_macs, round_to)
        allocate = least_loss if allocation == "loss" else equal_saturation
        units = allocate(options, found.cost.total_macs, target_macs * full)
        way = "least loss per MAC saved" if allocation == "loss" else "equal saturation"
        goal = f"{target_macs:g} of the MACs, by {way}"
    return _plan(found, units, goal)


def check_reach(cost: NetworkCost, groups: Sequence[CoupledGroup], target: float, round_to: int) -> None:
    """Refuse a share of the multiply-accumulates to keep that is no share, or that narrowing every group as far as it goes does not meet.

    Args:
        cost: of the network as it is.
        groups: that can be narrowed.
        target: share to keep.
        round_to: channels are a multiple of it.

    Raises:
        UsageError: it says how much remains, and what keeps it.
    """
    check_target(target)
    if (least := _least(cost, groups, round_to)) <= target:
        return
    words = [f"with every group at its least width {least:.2f} of them remain"]
    fixed, helps = cost.fixed_macs(), _least(cost, groups, 1) <= target
    if (share := sum(fixed.values()) / float(cost.macs.sum())) >= 0.005:
        large = [n or "the network itself" for n, m in fixed.items() if m >= sum(fixed.values()) / 10][:3]
        words.append(f"layers of fixed width cost {share:.2f}" + ("" if helps or not large else f", most of it {', '.join(large)}"))
    if helps:
        words.append("a smaller --round-to allows narrower groups")
    raise UsageError(f"{target:g} of the MACs cannot be reached: {'; '.join(words)}.")


def _least(cost: NetworkCost, groups: Sequence[CoupledGroup], round_to: int) -> float:
    """Share of the MACs that remains with every group at its least width."""
    least = [[float(width_choices(g.units, g.unit_channels, round_to)[0]) for g in groups]]
    return float(cost.total_macs(torch.tensor(least, dtype=torch.float64))) / float(cost.macs.sum())


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
    check_name("allocation", allocation, ALLOCATIONS)
    if round_to < 1:
        raise UsageError(f"round_to must be at least 1, got {round_to}.")


def read_widths(path: str | Path) -> dict[str, int]:
    """Widths by group from a JSON file: what ``--dry-run --json`` printed, or ``{"widths": {"layer1.0.conv1": 16}}``.

    What was printed names each width twice, as ``planned`` of a group and in ``widths``: either may be edited.

    Raises:
        UsageError: there is no such file, it holds something else, or a width was edited to two values.
    """
    place = Path(path)
    document = read_json(place, "a plan, as --dry-run --json prints it", UsageError)
    if isinstance(document, dict) and isinstance(document.get("plan"), dict):
        document = document["plan"]
    widths = document.get("widths") if isinstance(document, dict) else None
    rows = document.get("groups", []) if isinstance(document, dict) else None
    named = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
    given = [*widths.values(), *(row["planned"] for row in named if "planned" in row)] if isinstance(widths, dict) else []
    if not isinstance(widths, dict) or not all(_is_width(w) for w in given):
        raise UsageError(f'the plan {place} must hold {{"widths": {{"layer": channels}}}} with whole numbers of channels above 0.')
    return widths | {
        name: _edited(row, widths[name], place) for row in named if isinstance(name := row.get("name"), str) and name in widths
    }


def _is_width(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _edited(row: Mapping[str, Any], width: int, place: Path) -> int:
    """A group's width, named in its row and in ``widths``: where the two differ, the one that is not what was planned.

    What was planned follows from the row's other numbers: saturation is needed / width, and expected is needed / planned.
    """
    written = row.get("planned", width)
    if written == width:
        return width
    numbers = [row.get(name) for name in ("saturation", "width", "expected")]
    saturation, now, expected = (float(n) if isinstance(n, int | float) else 0.0 for n in numbers)
    if min(saturation, now, expected) > 0:
        before = [w for w in (written, width) if abs(saturation * now / expected - w) <= 0.5]
        if before:
            return int(width if before[0] == written else written)
    raise UsageError(
        f"the plan {place} gives the group {row['name']} two widths, {written} as its planned and {width} in widths: "
        'write the one that is meant in "widths" and take "groups" out.'
    )


def check_widths(groups: Sequence[CoupledGroup], widths: Mapping[str, int]) -> list[int]:
    """Units of each group in a plan of widths.

    Args:
        groups: of the network.
        widths: channels by group; groups that are not named keep theirs.

    Raises:
        UsageError: a name that is no group, or a width that is no whole number above 0 or no multiple of the group's unit.
    """
    known = {g.name: g for g in groups}
    for name, width in widths.items():
        check_name("a group of the plan", name, known)
        if not _is_width(width):
            raise UsageError(f"the width of {name} must be a whole number of channels above 0, got {width!r}.")
        if width % known[name].unit_channels:
            raise UsageError(f"the width of {name} must be a multiple of {known[name].unit_channels} channels, got {width}.")
    return [widths.get(g.name, g.channels) // g.unit_channels for g in groups]


def check_growth(cost: NetworkCost, units: Sequence[int]) -> None:
    """Refuse widths that would make a network of another order of size, before it is built.

    Args:
        cost: of the network as it is.
        units: planned of each group.

    Raises:
        UsageError: more than `LARGEST` times the MACs or parameters of now.
    """
    wide = torch.tensor([list(units)], dtype=torch.float64)
    for what, now, planned in (("MACs", cost.macs, cost.total_macs(wide)), ("parameters", cost.params, cost.total_params(wide))):
        times = float(planned) / max(float(now.sum()), 1.0)
        if times > LARGEST:
            raise UsageError(f"the plan's network would cost {times:,.0f} times the {what} of now; give widths of at most {LARGEST} times.")


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
                loss=float(found.removals[i].losses[group.units - n]) if n < group.units else 0.0,
                grow=found.saturation[i] >= CEILING,
                turned=n < group.units and group.name in found.turns,
            )
        )
    return Plan(
        goal=goal,
        groups=tuple(rows),
        fixed=dict(found.coupling.fixed),
        macs=round(float(found.cost.macs.sum())),
        planned_macs=round(float(found.cost.total_macs(wide))),
        params=round(float(found.cost.params.sum())) + found.gains,
        planned_params=round(float(found.cost.total_params(wide))),
    )
