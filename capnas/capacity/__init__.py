"""Capacity allocation of a network on a batch: how much each layer holds, where it sits in the image, how it is carried.

After J. Donier, arXiv 1902.04485, 1902.08572 and 1903.04455. The papers treat linear and one-dimensional models; the estimators for image
networks are our construction, see `capnas.measures.layer_capacity`, `capnas.measures.decoupling` and `capnas.capacity.sweep`. The model is
left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from capnas.capacity.capture import MomentReader, quiet
from capnas.capacity.exact import affordable, exact_capacity
from capnas.capacity.sweep import Sweeper
from capnas.capacity.taps import LayerTaps
from capnas.capacity.topology import activations_behind, layer_of, residual_shares
from capnas.errors import UsageError
from capnas.graph.dataflow import Trace
from capnas.graph.tracing import trace
from capnas.layers import MEASURED
from capnas.measures import capacity_scores
from capnas.measures.decoupling import Decoupling, coherent_error, gradient_pairs, pair_mean, shattering
from capnas.measures.layer_capacity import common_ridge, kfac_capacity, over_wide, utilisation
from capnas.measures.probing import gradable, tensor_of, unwrap_model

_NEAR_LINEAR = 0.5  # coherent share above which total decoupling is no approximation
_SHARERS = 16  # samples that a projection needs for its coherent share


@dataclass(frozen=True, kw_only=True)
class CapacityMap:
    """Capacity of one network in one state on one batch.

    Attributes:
        capacity: c_l per layer by module name in execution order: by `method`, what the layer alone could fit, or its share of what the
            network can.
        method: "k-fac", the estimate (35), or "exact", (34), where it was asked for and applies; the two are not to be compared.
        n_params: P_l, weight and bias; of a computed weight (weight or spectral norm), what it holds once computed.
        utilisation: u_l = c_l / P_l (36).
        over_wide: layers flagged by (50); confirm before shrinking.
        pixels: capacity per input entry (C, H, W) by the Markov sweep (40), sum = total capacity less ``bias``; None when not asked for or
            not possible. The sweep takes every unit as decoupled; see `near_linear`.
        unswept: why there are no pixels though they were asked for; else empty.
        bias: capacity that biases, position codes and layers off the input's way keep; None without pixels.
        coherent: S (24), share of the input gradient that is the same for all samples, averaged over projections.
        coherent_error: its standard error where it is 0, see `capnas.measures.decoupling.coherent_error`.
        residual: r_l of each residual addition (31), by the module that adds.
        decoupling: of each activation (42), by module; ``#1`` marks the second call.
        behind: the same of the first activation behind each convolution or linear layer, by the layer.
        skipped: parametrised layers without c_l, and why.
        approximated: operations that the sweep had no rule for, with their counts.
        revived: norms whose scale was all zero and was read as one, as timm's last norms of residual branches at initialization.
        mu: the common ridge, of sums over outputs and means over samples.
        samples: images in the batch.
        mode: "train": batch norm on batch statistics held constant; "eval": on its running statistics.
    """

    capacity: Mapping[str, float]
    method: Literal["exact", "k-fac"]
    n_params: Mapping[str, int]
    utilisation: Mapping[str, float]
    over_wide: tuple[str, ...]
    pixels: Tensor | None
    unswept: str = ""
    bias: float | None
    coherent: float
    coherent_error: float
    residual: Mapping[str, float]
    decoupling: Mapping[str, Decoupling]
    behind: Mapping[str, Decoupling]
    skipped: Mapping[str, str]
    approximated: Mapping[str, int]
    revived: tuple[str, ...]
    mu: float
    samples: int
    mode: Literal["train", "eval"]

    @property
    def total(self) -> float:
        """Sum of c_l."""
        return sum(self.capacity.values())

    @property
    def shattering(self) -> float:
        """Lambda = -ln S (24), with S no smaller than its standard error (ours): a lower bound where `shattered`."""
        return shattering(self.coherent, floor=self.coherent_error)

    @property
    def shattered(self) -> bool:
        """S is not above its standard error: the batch cannot tell it from 0."""
        return self.coherent <= self.coherent_error

    @property
    def near_linear(self) -> bool:
        """S > 0.5: most of the response is linear in the input, where the Markov sweep is not to be trusted for ``pixels``.

        Partial decoupling, (20) and (21), is there for one layer of any kind, `capnas.measures.propagation`; the exact map of a small
        network is `capnas.measures.pixel_map`. The mixture (41) with the leverage of the mean Jacobian is left out: it was further from
        that map than the sweep in four of six small networks with S of 0.7 to 1, of three convolutions on centred and on even images.
        """
        return self.coherent > _NEAR_LINEAR

    @property
    def residual_sum(self) -> float:
        """R (31), 0 without residual additions."""
        return sum(self.residual.values())

    def scores(self, groups: Sequence[Sequence[str]] | None = None) -> dict[str, float]:
        """The scores (43) to (48) by name; NaN where a network has nothing to score.

        Args:
            groups: blocks of one type, each a sequence of layer names, for the evenness over depth; every layer is a block when None.
        """
        values, counts = list(self.capacity.values()), [self.n_params[name] for name in self.capacity]
        usable = bool(values) and sum(values) > 0
        blocks = values if groups is None else [sum(self.capacity[name] for name in group) for group in groups]
        nan = math.nan
        return {
            "capacity_balance": capacity_scores.capacity_balance(values, counts) if usable else nan,
            "depth_evenness": capacity_scores.depth_evenness(blocks) if usable and sum(blocks) > 0 else nan,
            "coverage": capacity_scores.coverage(self.pixels.sum(0)) if self.pixels is not None and float(self.pixels.sum()) > 0 else nan,
            "propagation": capacity_scores.propagation(self.shattering) if math.isfinite(self.coherent) else nan,
            "scaling": capacity_scores.scaling(self.residual_sum) if self.residual else nan,
            "usage": capacity_scores.usage(values, counts) if usable else nan,
        }


@torch.inference_mode(False)  # gradients run here whatever surrounds the call
def capacity_map(
    model: nn.Module,
    inputs: Tensor,
    *,
    mode: Literal["train", "eval"] | None = None,
    projections: int = 4,
    rows: int = 512,
    pixels: bool = True,
    revive: bool = True,
    exact: bool | None = False,
    seed: int = 0,
    graph: Trace | None = None,
) -> CapacityMap:
    """Measure capacity allocation of any model that maps images to outputs.

    Args:
        model: on one device, with floating-point weights; a compiled one is read as it was before.
        inputs: (B, C, H, W) in floating point, at least two samples.
        mode: "train" (batch statistics, for networks at initialization) or "eval"; the model's own when absent. Dropout is off in both.
        projections: random projections of the outputs that stand for all of them, dealt over the samples where there are at least 32;
            with at most as many outputs, every sample sends back every output.
        rows: positions per layer call that its input factor is read from, half as many per projection for its output factor;
            capacities are comparable only at equal rows and batch.
        pixels: also sweep capacity down to the input.
        revive: read norms whose scale is still exactly zero as if it were one; otherwise their residual branches hold nothing.
        exact: c_l by (34), whose sum is the effective dimension of the batch, where it applies: to at most 2,048 parameters in all layers
            together and at least as many responses, samples times outputs; by (35) elsewhere, see ``method``. Where it is cheap, with at
            most 2^17 parameters times responses, if None. Off by default: scores compare networks, and the two read different things.
        seed: of projections and of the choice of rows.
        graph: the model's trace for one sample of the inputs' type, where it is already at hand.

    Raises:
        UsageError: fewer than two samples, outputs that do not depend on the input or are not finite, or a model of inference tensors.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> found = capacity_map(model, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> list(found.capacity), bool(0 < found.utilisation["0"] <= 1), tuple(found.pixels.shape)
    (['0', '3'], True, (1, 8, 8))
    >>> abs(float(found.pixels.sum()) + found.bias - found.total) < 1e-6 * found.total
    True
    """
    if inputs.ndim < 2 or len(inputs) < 2 or not inputs.is_floating_point():
        got = f"shape {tuple(inputs.shape)} of {inputs.dtype}"
        raise UsageError(f"capacity needs a floating-point batch (B, C, H, W) of at least two samples, got {got}.")
    chosen: Literal["train", "eval"] = mode or ("train" if model.training else "eval")
    model = unwrap_model(model)
    batch, (inputs,) = len(inputs), gradable(model, inputs)
    graph = graph or trace(model, (1, *inputs.shape[1:]), dtype=inputs.dtype)
    reader = MomentReader(graph, batch, seed=seed)
    tapped, (coherent, error) = _backward(model, inputs, chosen, projections, rows, revive, seed, reader)
    if not reader.complete:  # with gradients on, some operations take another path than they did in the trace
        reader = MomentReader(graph, batch, seed=seed)
        statistics = LayerTaps(model, batch, rows=0, batch_statistics=chosen == "train", revive=revive, seed=seed, reader=reader)
        statistics.watching = False
        with quiet(model, seed, grad=False), statistics, reader:
            model(inputs.clone())
    reader.moments[-1, 0] = inputs.detach().float().square().mean(0, keepdim=True)
    moments = {port: moment.cpu() for port, moment in reader.moments.items()}

    taps = tapped.taps
    spectra = {name: tap.spectrum() for name, tap in taps.items() if tap.responses}
    ridge = common_ridge(list(spectra.values())) if spectra else 0.0
    by_weight = kfac_capacity(spectra, mu=ridge)
    sizes = {weight: taps[weight].n_params for weight in by_weight}
    outputs = math.prod(graph.nodes[graph.output[0]].shapes[graph.output_ports[0]])
    exact = affordable(sizes, batch * outputs) if exact is None else exact
    found = exact_capacity(model, inputs, chosen, sizes, outputs, revive=revive, seed=seed) if exact else None
    if found is not None:
        by_weight, ridge = found
    names = {weight: layer_of(weight) for weight in by_weight}
    capacity = {names[weight]: value for weight, value in by_weight.items()}
    counts = {names[weight]: taps[weight].n_params for weight in by_weight}
    used = utilisation(capacity, counts)
    decoupling = reader.decoupling()
    sweeper = Sweeper(model, graph, moments, reader.selected, by_weight, {weight: tap.maps for weight, tap in taps.items()})
    sweep = sweeper.run() if pixels and reader.complete else None
    return CapacityMap(
        capacity=capacity,
        method="k-fac" if found is None else "exact",
        n_params=counts,
        utilisation=used,
        over_wide=over_wide(used),
        pixels=None if sweep is None else sweep.pixels,
        unswept="a batch runs other operations than the one sample that was traced" if pixels and sweep is None else "",
        bias=None if sweep is None else sweep.bias,
        coherent=coherent,
        coherent_error=error,
        residual=residual_shares(graph, sweeper.moments, set(taps)),
        decoupling=decoupling,
        behind=activations_behind(graph, {index: decoupling[name] for name, index in reader.places.items()}, set(taps)),
        skipped=_skipped(model, set(by_weight), {tap.bias for tap in taps.values()}),
        approximated={} if sweep is None else sweep.approximated,
        revived=tuple(tapped.revived),
        mu=ridge,
        samples=batch,
        mode=chosen,
    )


def _backward(
    model: nn.Module, inputs: Tensor, mode: str, projections: int, rows: int, revive: bool, seed: int, reader: MomentReader
) -> tuple[LayerTaps, tuple[float, float]]:
    """Layer factors, moments and the coherent share with its error, from one forward pass and as many backward passes as that needs."""
    batch = len(inputs)
    taps = LayerTaps(model, batch, rows=rows, batch_statistics=mode == "train", revive=revive, seed=seed, reader=reader)
    with quiet(model, seed, grad=True):
        leaf = inputs.detach().clone().requires_grad_()
        given = leaf.clone()
        with taps, reader:
            out = model(given)
        out = tensor_of(out)
        if not out.requires_grad or not bool(torch.isfinite(out).all()):
            raise UsageError("the model's outputs must be finite and depend on its input; check the weights and the batch.")
        pairs = _project(out, leaf, taps, projections, seed)
        if not pairs and taps.last_input is not None and taps.last_input.requires_grad:
            pairs = _project(taps.last_input, leaf, taps, projections, seed)  # a head that starts at zero: look through its inputs
    taps.last_input = None  # it would keep the whole graph
    shares = [pair_mean(p) for p in pairs]
    return taps, (sum(shares) / len(shares) if shares else math.nan, coherent_error(pairs))


def _project(out: Tensor, leaf: Tensor, taps: LayerTaps, projections: int, seed: int) -> list[Tensor]:
    """Send projections of the outputs back; the taps on the way read their gradients. Per group of samples that share a projection, their
    `gradient_pairs`, averaged over the projections that reach the input.

    With batch statistics as constants no sample's gradient holds another's, so the projections are dealt over the batch: one backward pass
    carries as many as leave `_SHARERS` samples to each.
    """
    batch = len(leaf)
    flat = out.reshape(batch, -1)
    outputs = flat.shape[1]
    if outputs <= projections:
        passes = torch.eye(outputs)[:, None]
    else:
        dealt = max(1, min(projections, batch // _SHARERS))
        count = -(-projections // dealt)
        passes = torch.randn(count, dealt, outputs, generator=torch.Generator().manual_seed(seed)) / count**0.5
    taps.projections = passes.shape[1]
    sharer = torch.arange(batch) * taps.projections // batch  # the projection of each sample
    found: list[list[Tensor]] = [[] for _ in range(taps.projections)]
    for directions in passes:
        (gradient,) = torch.autograd.grad((flat * directions[sharer].to(flat)).sum(), leaf, retain_graph=True)
        for i, pairs in enumerate(found):
            group = gradient[(sharer == i).to(gradient.device)]
            pairs += [gradient_pairs(group.flatten(1))] if bool(group.any()) else []
    return [torch.stack(pairs).mean(0) for pairs in found if pairs]


def _skipped(model: nn.Module, measured: set[str], biases: set[str | None]) -> dict[str, str]:
    """Every module that holds parameters without a capacity of their own, with the reason."""
    names = {id(p): name for name, p in model.named_parameters()}
    reasons: dict[str, str] = {}
    for place, module in model.named_modules():
        owner, _, part = f".{place}".partition(".parametrizations.")  # what a weight is computed from belongs to its layer
        owner = owner[1:]
        layer = model.get_submodule(owner)
        kind = type(layer).__name__
        for key, parameter in module.named_parameters(recurse=False):
            name = names[id(parameter)]
            shared = name != f"{place}.{key}".lstrip(".")
            if f"{owner}.weight" in measured or ((name in measured or name in biases) and not shared):
                continue
            if shared and isinstance(layer, MEASURED):
                reasons.setdefault(owner, f"{kind} shares {name}")
            elif (parameter.ndim >= 2 or part) and isinstance(layer, MEASURED):
                reasons[owner] = f"{kind} is not on the way from the input to the output, or runs inside a fused function"
            elif "norm" in kind.lower():
                reasons.setdefault(owner, f"{kind} rescales the layer before it")
            else:
                reasons.setdefault(owner or "model", f"{kind} holds {key}: only linear layers and convolutions are measured")
    return reasons
