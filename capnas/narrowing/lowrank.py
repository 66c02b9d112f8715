"""Layers in two: a conv or linear layer through the eigenspace of its own outputs.

Shenk et al. (arXiv 2006.08679) restrict a layer's outputs to the leading eigenvectors E of their covariance without loss. The projection
P (y - mu) + mu with P = E E^T is linear, and so is the layer: y = W x + b becomes E (E^T W) x + (P (b - mu) + mu), a layer of k outputs
followed by a pointwise one, exact for the projected outputs. It saves multiply-accumulates where k is small beside inputs and outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from capnas.errors import UsageError, described
from capnas.layers import MEASURED, unfilled
from capnas.measures.moments import Moments, covariance
from capnas.measures.probing import FAILURES, cloned, unwrap_model
from capnas.measures.saturation import THRESHOLD, Spectrum, intrinsic_dimension, leading_eigenvectors, spectrum
from capnas.narrowing.calibration import is_transposed, output_moments, pads_by_size, why_unreadable
from capnas.narrowing.groups import CLASSES, run_order, shared_parameters
from capnas.narrowing.planning import check_target
from capnas.narrowing.refusing import CannotNarrow, check_modules, check_network, differ, why_uncalled
from capnas.projection import head_names
from capnas.recording import LayerRecord


@dataclass(frozen=True, kw_only=True)
class LayerRank:
    """What becomes of one layer.

    Attributes:
        name: of the layer.
        width, needed, rank: outputs; intrinsic dimension; directions kept, equal to ``width`` where the layer stays whole.
        saturation: needed / width.
        kept: share of the variance of its outputs that the kept directions hold.
        macs, planned_macs, params, planned_params: of the layer.
    """

    name: str
    width: int
    needed: int
    rank: int
    saturation: float
    kept: float
    macs: int
    planned_macs: int
    params: int
    planned_params: int


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """A rank for every layer, like `capnas.narrowing.planning.Plan`; `moments` are those of each layer's outputs."""

    goal: str
    groups: tuple[LayerRank, ...]
    fixed: Mapping[str, str]
    macs: int
    planned_macs: int
    params: int
    planned_params: int
    moments: Mapping[str, Moments]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        head = {name: getattr(self, name) for name in ("goal", "macs", "planned_macs", "params", "planned_params")}
        return head | {"groups": [asdict(g) for g in self.groups], "fixed": dict(self.fixed)}


def plan_ranks(model: nn.Module, images: Tensor, *, target_macs: float | None = None, threshold: float = THRESHOLD) -> RankPlan:
    """A rank for every dense layer but the head: that of the threshold, or the ranks of one threshold for all that meet a target of MACs.

    One threshold for all is the even choice: every layer then loses the same share of its variance.

    Args:
        model: trained; not changed.
        images: (N, C, H, W) on the model's device.
        target_macs: share to keep, in (0, 1); without, ``threshold`` decides.
        threshold: share of the variance to keep, in (0, 1].

    Raises:
        CannotNarrow: no layer can be split, or see `capnas.narrowing.refusing`.
        UsageError: the target is out of reach.
    """
    model = check_modules(model)
    modules, heads, cost = dict(model.named_modules()), head_names(model), check_network(model, images[:2])
    records = output_moments(model, images)
    fixed = _unfit(model, heads, records, images[:2])
    names = [n for n, m in modules.items() if isinstance(m, MEASURED) and n in cost.layers and n not in fixed]
    whole = _irreplaceable(model, names, images[:2])
    names = [n for n in names if n not in whole]
    if whole and not names:
        raise CannotNarrow(f"cannot split this {type(model).__name__}: {next(iter(whole.values()))}.")
    if not names:
        raise CannotNarrow(f"cannot split this {type(model).__name__}: it has no plain dense conv or linear layer beside its head.")
    spectra = {n: spectrum(records[n].covariance) for n in names}

    def ranks(share: float) -> dict[str, int]:
        return {n: _needed(spectra[n], share, records[n].width) for n in names}

    def planned(rank: Mapping[str, int]) -> tuple[dict[str, int], int]:
        macs = {n: _factored(modules[n], cost.layers[n].macs, rank[n]) for n in names}
        return macs, cost.macs - sum(cost.layers[n].macs - min(macs[n], cost.layers[n].macs) for n in names)

    goal, share = f"every layer keeps {threshold:g} of its variance", threshold
    if target_macs is not None:
        check_target(target_macs)
        found = _largest_share(lambda tried: planned(ranks(tried))[1] <= target_macs * cost.macs)
        if found is None:
            raise UsageError(f"{target_macs:g} of the MACs cannot be reached by splitting layers; remove channels instead.")
        share = found
        goal = f"{target_macs:g} of the MACs: every layer keeps {share:.4g} of its variance"
    chosen = ranks(share)
    macs, total = planned(chosen)
    rows = []
    for name in names:
        layer, width, values = cost.layers[name], records[name].width, spectra[name].eigenvalues
        needed, split = _needed(spectra[name], threshold, width), macs[name] < layer.macs
        rank = chosen[name] if split else width
        params = _parameters(modules[name], rank) if split else layer.params
        rows.append(
            LayerRank(
                name=name,
                width=width,
                needed=needed,
                rank=rank,
                saturation=needed / width,
                kept=float(values[:rank].sum()) / max(spectra[name].total, 1e-30) if split else 1.0,
                macs=layer.macs,
                planned_macs=macs[name] if split else layer.macs,
                params=layer.params,
                planned_params=params,
            )
        )
    params = cost.params + sum(r.planned_params - r.params for r in rows)
    return RankPlan(
        goal=goal,
        groups=tuple(rows),
        fixed={n: reason for n in modules if (reason := (fixed | whole).get(n)) is not None},
        macs=cost.macs,
        planned_macs=total,
        params=cost.params,
        planned_params=params,
        moments={n: records[n].moments for n in names},
    )


def _unfit(model: nn.Module, heads: set[str], records: Mapping[str, LayerRecord], example: Tensor) -> dict[str, str]:
    """The conv and linear layers that cannot be split whatever their outputs, each with the reason."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MEASURED)}
    found = {n: "its outputs on the images are not finite" for n in layers if n not in records}
    places: dict[nn.Module | None, list[str]] = defaultdict(list)
    for owner, module in model.named_modules():
        for leaf, child in module._modules.items():
            places[child].append(f"{owner}.{leaf}" if owner else leaf)
    tied = {n: f"{' and '.join(places[m])} are one layer" for n, m in layers.items() if len(places[m]) > 1} | shared_parameters(model)
    for name, layer in layers.items():
        special = "pads each image by its size" if pads_by_size(layer) else "is a transposed convolution" if is_transposed(layer) else ""
        reason = f"it {special}" if special else why_unreadable(layer) or tied.get(name)
        if name in heads or reason:
            found[name] = CLASSES if name in heads else str(reason)
    order = run_order(model, example)
    return found | why_uncalled(model, example, [n for n in layers if n not in order and n not in heads])


def _irreplaceable(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, str]:
    """Layers that the network cannot do without, as where it reads their weights itself, each with what then happens."""
    trial, found = cloned(model).eval(), {}

    def fails() -> str | None:
        for module, leaf in kept:
            setattr(module, leaf, None)
        try:
            return "computes something else" if differ(trial(example), expected) else None
        except FAILURES as error:
            return f"fails ({described(error)})"

    layers = {name: trial.get_submodule(name) for name in names}
    # what modules computed at an earlier call, as for a size of images, and compute again where it is not there
    kept = [
        (m, leaf)
        for m in trial.modules()
        for leaf, value in (vars(m) | {n: m._buffers[n] for n in m._non_persistent_buffers_set}).items()
        if isinstance(value, Tensor)
    ]
    values = [getattr(m, leaf) for m, leaf in kept]
    with torch.no_grad():
        expected = trial(example)
        if kept and fails():  # constants
            for (module, leaf), value in zip(kept, values):
                setattr(module, leaf, value)
            kept = []
        for name, layer in layers.items():
            trial.set_submodule(name, nn.Sequential(layer, nn.Identity()))  # as a split layer is, and computes the same
        if fails() is None:
            return {}
        for name, layer in layers.items():
            trial.set_submodule(name, layer)
        for name, layer in layers.items():
            trial.set_submodule(name, nn.Sequential(layer, nn.Identity()))
            if (what := fails()) is not None:
                found[name] = f"with {name} in two parts the network {what}"
                trial.set_submodule(name, layer)
    return found


def _largest_share(fits: Callable[[float], bool]) -> float | None:
    """The largest share of variance at which a plan fits, by bisection; None where none does."""
    low, high = 1e-9, 1.0
    if not fits(low):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def factorized(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of the network whose layers are split as planned, in eval mode.

    >>> net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> flat = torch.randn(64, 1) @ torch.randn(1, 6)  # inputs, and so outputs, on a line
    >>> small = factorized(net, plan_ranks(net, flat))
    >>> [tuple(layer.weight.shape) for layer in small[0]], torch.allclose(small(flat), net(flat), atol=1e-5)
    ([(1, 6), (6, 1)], True)
    """
    small = cloned(unwrap_model(model)).eval()
    for row in plan.groups:
        if row.rank < row.width:
            small.set_submodule(row.name, split_layer(small.get_submodule(row.name), plan.moments[row.name], row.rank))
    return small


def split_layer(layer: nn.Module, moments: Moments, rank: int) -> nn.Sequential:
    """A dense conv or linear layer as two, through the leading eigenvectors of its outputs' covariance; exact for the projected outputs.

    Args:
        layer: not changed.
        moments: of its outputs, (D,).
        rank: k, at most D and 2,048.
    """
    module = cast(Any, layer)
    vectors = leading_eigenvectors(covariance(moments))[1][:, :rank].contiguous().to(module.weight.device)
    mean = moments.mean.to(module.weight.device)
    bias = torch.zeros_like(mean) if module.bias is None else module.bias.detach().double()
    constant = vectors @ (vectors.T @ (bias - mean)) + mean
    squeezed = (vectors.T @ module.weight.detach().double().flatten(1)).unflatten(1, module.weight.shape[1:])
    if isinstance(layer, nn.Linear):
        first: Any = unfilled(nn.Linear, in_features=layer.in_features, out_features=rank, bias=False)
        second: Any = unfilled(nn.Linear, in_features=rank, out_features=layer.out_features)
    else:
        settings = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        first = unfilled(nn.Conv2d, in_channels=module.in_channels, out_channels=rank, bias=False, **settings)
        second = unfilled(nn.Conv2d, in_channels=rank, out_channels=module.out_channels, kernel_size=1)
    with torch.no_grad():
        first.weight.copy_(squeezed)
        second.weight.copy_(vectors.reshape(second.weight.shape))
        second.bias.copy_(constant)
    return nn.Sequential(first, second).to(module.weight)


def _needed(found: Spectrum, share: float, width: int) -> int:
    """Directions of a layer that hold a share of its variance; all of them where those that were found hold less."""
    partial = len(found.eigenvalues) < found.width
    if partial and found.shares and found.shares[-1] < share:
        return width
    return max(1, intrinsic_dimension(found.eigenvalues, share, found.total))


def _factored(module: Any, macs: int, rank: int) -> int:
    """MACs of the split layer: its first part shrinks with the rank, its second adds rank x outputs per position."""
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    inputs = module.weight[0].numel()
    return round(macs * rank * (inputs + outputs) / (inputs * outputs))


def _parameters(module: Any, rank: int) -> int:
    outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    return int(rank * (module.weight[0].numel() + outputs) + outputs)
