"""Narrower networks: what width each coupled group of layers needs, channels removed, the layers that read them corrected.

The way: `survey` measures a trained network on calibration images and finds the streams that can be turned, `plan_widths` chooses a width
for every group, `narrowed` makes the network (a copy); `capnas.narrowing.pruning` does all of it for the command and reports accuracy,
cost and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capnas.errors import UsageError
from capnas.measures.narrowing import mixture
from capnas.measures.probing import cloned, untouched, unwrap_model
from capnas.narrowing.applying import Keep, around_classifier, change_widths, kept_channels
from capnas.narrowing.calibration import matrix, refitted, set_matrix
from capnas.narrowing.correcting import correct
from capnas.narrowing.groups import CoupledGroup
from capnas.narrowing.planning import Plan, plan_widths, read_widths
from capnas.narrowing.refusing import CannotNarrow
from capnas.narrowing.standardized import plain_convs
from capnas.narrowing.survey import Survey, survey
from capnas.narrowing.turning import turn_streams

__all__ = ["CannotNarrow", "CoupledGroup", "Plan", "Survey", "chosen_units", "narrowed", "plan_widths", "read_widths", "survey"]


def chosen_units(found: Survey, plan: Plan) -> Keep:
    """Which units stay: the last ones on each group's removal path; where a group grows, the most needed ones twice.

    Of a group whose stream is turned and narrowed, units are those of the turned stream.

    Raises:
        UsageError: the plan is of another network.
    """
    keep: dict[str, Sequence[int]] = {}
    planned = plan.widths
    if set(planned) != {g.name for g in found.groups}:
        raise UsageError("the plan names other groups than this network has.")
    for group, path, removal in zip(found.groups, found.paths, found.removals):
        units = planned[group.name] // group.unit_channels
        if units <= group.units:
            keep[group.name] = removal.kept(units)
        else:
            again = [path.order[-1 - i % group.units] for i in range(units - group.units)]
            keep[group.name] = sorted([*range(group.units), *again])
    return keep


def narrowed(model: nn.Module, found: Survey, plan: Plan, *, refit: bool = True, seed: int = 0) -> nn.Module:
    """A copy of the network in the planned widths, its dense layers refitted on the survey's images.

    Streams that can be turned are, if they are narrowed (`capnas.narrowing.turning`).

    Args:
        model: the surveyed network; not changed.
        found: its survey.
        plan: from `plan_widths`.
        refit: False only removes the channels, without correction, and adds no biases: fewer parameters than planned where there are any.
        seed: of the small noise that tells doubled channels apart where a group grows.

    Returns:
        In eval mode, on the model's device; of convolutions that standardize their weights the plain equals, see
        `capnas.narrowing.standardized`.
    """
    model, keep = plain_convs(unwrap_model(model)), chosen_units(found, plan)
    small = cloned(model).eval()
    fitted = {n: r for n, r in found.readings.items() if refitted(model.get_submodule(n))}
    if refit:
        for name in found.readings.keys() - fitted.keys():
            _mix(small, found, keep, name)
    turning, moments = [g for g in found.groups if g.name in found.turns and len(keep[g.name]) < g.units], found.norm_inputs
    if turning:
        fitted, moments = turn_streams(small, turning, found.turns, found.norms, fitted, found.images)
    change_widths(small, found.groups, keep)
    if plan.grows:
        _tell_apart(small, plan, seed)
    if refit:
        outputs = {n: kept_channels(found.groups, keep, n, "out", r.outputs.shape[1]) for n, r in fitted.items()}
        stay = {n: kept_channels(found.groups, keep, n, "both", len(m)).to(m.device) for n, (m, _) in moments.items()}
        before = {n: (mean[stay[n]], variance[stay[n]]) for n, (mean, variance) in moments.items()}
        correct(small, fitted, outputs, found.norms, found.images, before=before)
    _name_features(model, small, found.images[:1])
    return small


def _mix(model: nn.Module, found: Survey, keep: Keep, name: str) -> None:
    """A conv too wide to be refitted reads what is gone as a mixture of the channels that stay, the same at all kernel positions."""
    layer: Any = model.get_submodule(name)
    weight = matrix(layer).detach().unflatten(1, (layer.in_channels, -1)).clone()
    kept = kept_channels(found.groups, keep, name, "in", layer.in_channels).unique().to(weight.device)
    share = mixture(found.readings[name].covariance, kept)
    weight[:, kept] = torch.einsum("oct,ck->okt", weight, share.to(weight))
    with torch.no_grad():
        set_matrix(layer, weight)


def _name_features(model: nn.Module, small: nn.Module, example: Tensor) -> None:
    """Timm's ``num_features`` is the width of ``forward_features``; it goes stale where a head has layers of its own behind it."""
    for attribute in ("forward_features", "num_features"):
        if not hasattr(model, attribute):
            return
    with torch.no_grad(), untouched(model):
        features = [m.forward_features(example) for m in (model, small)]  # type: ignore[operator]
    if not all(isinstance(f, Tensor) for f in features):
        return  # several, each of a width of its own
    before, after = (tuple(f.shape) for f in features)
    axes = [i for i, size in enumerate(before) if size == model.num_features]
    if len(axes) == 1:
        for owner in around_classifier(small):
            if getattr(owner, "in_features", None) == model.num_features:
                owner.in_features = after[axes[0]]
        small.num_features = after[axes[0]]


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
