"""Narrower networks: what width each coupled group of layers needs, channels removed, the layers that read them corrected.

The way: `survey` measures a trained network on calibration images, `plan_widths` chooses a width for every group, `narrowed` makes the
network (a copy); `capnas.narrowing.pruning` does all of it for the command and reports accuracy, cost and time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from capnas.errors import UsageError
from capnas.narrowing.applying import Keep, change_widths, kept_channels
from capnas.narrowing.correcting import correct
from capnas.narrowing.groups import CannotNarrow, CoupledGroup
from capnas.narrowing.planning import Plan, plan_widths, read_widths
from capnas.narrowing.survey import Survey, survey

__all__ = ["CannotNarrow", "CoupledGroup", "Plan", "Survey", "chosen_units", "narrowed", "plan_widths", "read_widths", "survey"]


def chosen_units(found: Survey, plan: Plan) -> Keep:
    """Which units stay: the last ones on each group's removal path; where a group grows, the most needed ones twice.

    Raises:
        UsageError: the plan is of another network.
    """
    keep: dict[str, Sequence[int]] = {}
    planned = plan.widths
    if set(planned) != {g.name for g in found.groups}:
        raise UsageError("the plan names other groups than this network has.")
    for group, path in zip(found.groups, found.paths):
        units = planned[group.name] // group.unit_channels
        if units <= group.units:
            keep[group.name] = path.kept(units)
        else:
            again = [path.order[-1 - i % group.units] for i in range(units - group.units)]
            keep[group.name] = sorted([*range(group.units), *again])
    return keep


def narrowed(model: nn.Module, found: Survey, plan: Plan, *, refit: bool = True, seed: int = 0) -> nn.Module:
    """A copy of the network in the planned widths, its dense layers refitted on the survey's images.

    Args:
        model: the surveyed network; not changed.
        found: its survey.
        plan: from `plan_widths`.
        refit: False only removes the channels, without correction.
        seed: of the small noise that tells doubled channels apart where a group grows.

    Returns:
        In eval mode, on the model's device.
    """
    keep = chosen_units(found, plan)
    small = copy.deepcopy(model).eval()
    change_widths(small, found.groups, keep)
    if plan.grows:
        _tell_apart(small, plan, seed)
    if refit:
        outputs = {n: kept_channels(found.groups, keep, n, "out", r.outputs.shape[1]) for n, r in found.readings.items()}
        correct(small, found.readings, outputs, found.norms, found.images)
    return small


def _tell_apart(model: nn.Module, plan: Plan, seed: int) -> None:
    """Doubled channels would stay equal for ever: noise of a hundredth of the weights' spread on the layers that write them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in plan.groups:
            if group.planned > group.width:
                for name in group.layers:
                    weight = getattr(dict(model.named_modules()).get(name), "weight", None)
                    if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                        noise = torch.randn(weight.shape, generator=generator).to(weight)
                        weight.add_(0.01 * weight.std() * noise)
