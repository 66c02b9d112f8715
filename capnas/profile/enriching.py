"""Further measures of a profiled model: structure, operator norms, distances, capacity and the published baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from capnas.capacity import CapacityMap, capacity_map
from capnas.errors import DegenerateError, UsageError
from capnas.graph.dataflow import Trace
from capnas.graph.structure import StructureReport, structure
from capnas.graph.tracing import trace
from capnas.layers import MEASURED, is_quantized, own_parameters
from capnas.measures.probing import FAILURES, reason, untouched, unwrap_model
from capnas.measures.proxies import PROXIES, baseline_proxies
from capnas.measures.receptive import LayerField, border_layers, critical_layers, feasible_range
from capnas.profile.rows import FieldReport, Profile
from capnas.weights import InitialWeights, norm_layer_constants, weight_norms

# measure, column and name of what a row may lack
_COLUMNS = (("structure", "complexity", "complexity, receptive field"), ("norms", "norm", "norm"), ("capacity", "capacity", "capacity"))
_NO_PRODUCT = "computes something else than a product with one weight"
_CAPACITY_SCORES = ("capacity_balance", "depth_evenness", "coverage", "propagation", "scaling", "usage")
_NORM_TOLERANCE = 3e-4  # enough for a table, with a fifth less work than the 1e-4 of the excess measures


def enrich(
    profile: Profile,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    measures: Sequence[str],
    graph: Trace | None = None,
    start: InitialWeights | None = None,
    pixels: bool = True,
    exact_capacity: bool | None = None,
    seed: int = 0,
) -> Profile:
    """A profile with further measures of the same model in the same state.

    Args:
        profile: what is known already.
        model: the model in the state that was profiled; left untouched.
        inputs: one batch, as for `profile_model`; so are `targets`, `measures` and `seed`.
        targets: (B,) classes.
        measures: any of `MEASURES`.
        graph: the model's trace where it is already at hand, see `capnas.graph.tracing.trace`.
        start: the weights before training, for the distance of each layer and the score ``capacity_slack``.
        pixels: for "capacity", also sweep it down to the input, which only the score ``coverage`` needs.
        exact_capacity: as for `profile_model`.
        seed: of anything random.

    Raises:
        UsageError: a measure needs the graph and the model cannot be traced, or gradients and its weights allow none; the model is a
            ``torch.jit.ScriptModule``.
    """
    traced = [name for name in ("structure", "norms", "capacity") if name in measures] + ["start"] * (start is not None)
    model, without_capacity = unwrap_model(model), None
    if traced:
        try:
            graph = graph or trace(model, (1, *inputs.shape[1:]), dtype=inputs.dtype)
        except FAILURES as error:
            raise UsageError(f"{' and '.join(traced)} need the model's graph; {reason(error)}. Leave them out.") from error
    if "proxies" in measures:  # the largest in memory, before others leave theirs in pieces
        names = [name for name in PROXIES if name != "macs" or graph is None]
        baselines = baseline_proxies(model, inputs, targets, names=names)
        profile = profile.with_network(**{n: baseline.value for n, baseline in baselines.items()})
        profile = profile.with_flags(**{n: baseline.flag for n, baseline in baselines.items() if baseline.flag})
        if graph is not None:
            profile = profile.with_network(macs=sum(graph.macs.values()) / graph.input_shape[0])
    if traced and graph is not None:
        if "structure" in measures:
            averaged = structure(graph, pool_gain="averaging").log2_paths
            profile = with_structure(profile, structure(graph), graph.input_shape[2:]).with_network(log2_gain=averaged)
            profile = with_params(with_macs(profile, graph), model)
        if "norms" in measures:
            profile = with_norms(profile, model, graph)
        if "capacity" in measures:
            options: dict[str, Any] = {"mode": profile.mode, "pixels": pixels, "exact": exact_capacity, "seed": seed, "graph": graph}
            try:
                found = capacity_map(model, inputs, **options)
                profile, without_capacity = with_capacity(profile, found), found.skipped
            except DegenerateError as error:  # gradients that overflow, as of a constant batch through batch norms, cost only this
                profile = profile.with_flags(**dict.fromkeys(_CAPACITY_SCORES, f"capacity cannot be read: {error}"))
            if start is None and "capacity_slack" not in profile.network:
                profile = profile.with_flags(capacity_slack="needs a training from known weights: the trials of a search have it")
    if graph is not None:
        profile = with_reasons(profile, model, graph, without_capacity)
    return profile if start is None or graph is None else with_motion(profile, model, graph, start)


def with_structure(profile: Profile, report: StructureReport, image_size: tuple[int, ...] = ()) -> Profile:
    """The profile with the layer algebra's columns and network numbers, see `capnas.graph.structure.structure`.

    With the size of the images also what the receptive fields say of it.
    """
    rows = []
    whole = next((layer for layer in report.layers.values() if layer.kind in ("conv", "linear")), None)
    for row in profile.layers:
        found = report.layers.get(row.name) if row.name else whole  # a layer that is the whole model has no name
        if found is not None:
            row = replace(
                row, complexity=found.complexity_bits, log2_fan_in=found.log2_fan_in, log2_paths=found.log2_paths,
                log2_compression=found.log2_compression, receptive_field=found.receptive_field or None,
            )  # fmt: skip
        rows.append(row)
    network = {"complexity": report.complexity, "log2_paths": report.log2_paths, "intrinsic_power": report.log2_power}
    fields = report.fields if image_size else []
    return replace(profile, layers=tuple(rows), receptive=_fields(fields, image_size) if fields else profile.receptive).with_network(
        **network, depth=float(report.depth), shortest_depth=float(report.shortest)
    )


def with_params(profile: Profile, model: nn.Module) -> Profile:
    """The profile with the number of the model's parameters, as torch counts them; a flag names quantized layers, which it leaves out."""
    quantized = [name for name, module in model.named_modules() if is_quantized(module)]
    flag = f"quantized weights left out, as they are no parameters: {', '.join(quantized)}" if quantized else ""
    return profile.with_flags(params=flag).with_network(params=float(sum(p.numel() for p in model.parameters())))


def with_macs(profile: Profile, graph: Trace) -> Profile:
    """The profile with the multiply-accumulates of each layer and of everything inside each block, for one image."""
    images, macs = graph.input_shape[0], graph.macs
    return replace(
        profile,
        layers=tuple(replace(row, macs=macs.get(row.name, 0) // images) for row in profile.layers),
        blocks=tuple(replace(row, macs=graph.macs_inside(row.name) // images) for row in profile.blocks),
    ).with_network(macs=sum(macs.values()) / images)


def _fields(fields: Sequence[LayerField], image_size: tuple[int, ...]) -> FieldReport:
    ranges = {}
    lowers: tuple[Literal["largest", "functional"], ...] = ("largest", "functional")
    for lower in lowers:
        found = feasible_range(fields, lower=lower)
        ranges[lower] = None if found is None else tuple(zip(*found))
    return FieldReport(
        image_size=image_size, critical=critical_layers(fields, image_size), feasible=ranges["largest"], functional=ranges["functional"],
        border={"strict": border_layers(fields, image_size), "toolbox": border_layers(fields, image_size, "toolbox")},
    )  # fmt: skip


def with_capacity(profile: Profile, found: CapacityMap) -> Profile:
    """The profile with each layer's capacity and the network's capacity scores, see `capnas.capacity.capacity_map`.

    ``network`` gains ``coherent`` (S), ``shattering`` (-ln S) and ``residual_sum`` (R, 0 without residual additions) too, which are no
    scores; ``flags`` says where the network is too linear for the sweep behind ``coverage``, or has none, too shattered for
    ``propagation``, and without sums for ``scaling``.
    """
    rows = []
    for row in profile.layers:
        if row.name in found.capacity:
            used, wide = found.utilisation.get(row.name), row.name in found.over_wide
            row = replace(row, capacity=found.capacity[row.name], capacity_method=found.method, utilisation=used, over_wide=wide)
        if (behind := found.behind.get(row.name)) is not None:
            row = replace(row, decoupling=behind.out, gate_decoupling=behind.gate)
        rows.append(row)
    groups = [[name for name in found.capacity if name.startswith(block.name + ".")] for block in profile.blocks]
    scores = found.scores([g for g in groups if g] or None)
    audit = {"coherent": found.coherent, "shattering": found.shattering, "residual_sum": found.residual_sum}
    return replace(profile, layers=tuple(rows)).with_flags(**_limits(found)).with_network(**scores, **audit)


def _limits(found: CapacityMap) -> dict[str, str]:
    """What limits the capacity scores, by the name of the score; empty where nothing does."""
    flags = {"coverage": "", "propagation": "", "scaling": ""}
    if found.unswept:
        flags["coverage"] = f"capacity cannot be swept down to the pixels: {found.unswept}"
    elif found.pixels is not None and not float(found.pixels.sum()) > 0:
        flags["coverage"] = "no capacity reaches the pixels"
    elif found.near_linear and found.pixels is not None:
        measured = [of.out for of in found.decoupling.values() if math.isfinite(of.out)]
        mean = f" and a mean decoupling of {sum(measured) / len(measured):.2f}" if measured else ""
        flags["coverage"] = (
            f"assumes full decoupling (S = 0, decoupling 1), measured were S = {found.coherent:.2f}{mean}: most of the response is linear"
        )
    if found.shattered:
        flags["propagation"] = f"S is within the noise of {found.samples} images, {found.coherent_error:.1g}: propagation is a bound"
    elif math.isnan(found.coherent):
        flags["propagation"] = "no gradient reaches the input"
    if not found.residual:
        flags["scaling"] = "the network has no residual additions, whose shares R it compares with 1"
    return flags


def with_reasons(profile: Profile, model: nn.Module, graph: Trace, without_capacity: Mapping[str, str] | None = None) -> Profile:
    """The profile whose ``skipped`` says of every layer which columns of the measures taken it lacks, and why.

    By the graph it also says of layers that were never called which other module or function uses the weight.

    Args:
        profile: with its measures.
        model: the model that was profiled.
        graph: its trace.
        without_capacity: reasons by layer, where capacity was measured just now, see `capnas.capacity.CapacityMap`.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    used, run = {name for node in graph.nodes for name in node.params}, {node.module for node in graph.nodes}
    rows, skipped = {row.name: row for row in profile.layers}, dict(profile.skipped)
    for name in profile.skipped.keys() - rows.keys():
        module = modules.get(name)
        if isinstance(module, MEASURED) and (read := [n for p in own_parameters(module).values() if (n := names[id(p)]) in used]):
            skipped[name] = f"{type(module).__name__} is not called itself: another module or function uses {' and '.join(read)}"
    for name, row in rows.items():
        skipped.pop(name, None)
        lacking = [label for measure, column, label in _COLUMNS if measure in profile.measures and getattr(row, column) is None]
        parts = []
        if "norm" in lacking and name in run:
            lacking.remove("norm")
            parts = [f"norm: {row.kind} {_NO_PRODUCT}"]
        if lacking:
            given = without_capacity if without_capacity is not None and row.capacity is None else {}
            parts.insert(0, f"{', '.join(lacking)}: {given.get(name) or _why_absent(name, row.kind, modules[name], names)}")
        if parts:
            skipped[name] = "; ".join(parts)
    return replace(profile, skipped=skipped)


def _why_absent(name: str, kind: str, module: nn.Module, names: Mapping[int, str]) -> str:
    own = {f"{name}.{key}".lstrip("."): names[id(p)] for key, p in own_parameters(module).items()}
    shared = [first for here, first in own.items() if first != here]
    if not own:
        return f"{kind} has no parameters of its own"
    return f"{kind} shares {shared[0]}" if shared else f"{kind} is not on the way from the input to the output"


def with_norms(profile: Profile, model: nn.Module, graph: Trace) -> Profile:
    """The profile with the operator norm of each layer, see `capnas.weights.weight_norms`, and the sum of their logarithms.

    Norms are exact to rounding, or, where ``norm_method`` is "power", lower estimates: iterated until two estimates of the distance to the
    true value stay below 3e-4 of it, which is no upper bound; ``weight_norms(..., bounded=True)`` computes one. ``log10_lipschitz`` counts
    batch norms as maps of their own, see `capnas.weights.norm_layer_constants`; the flag of that name tells which other norm layers, and
    which layers without a norm, it leaves out. Constants of 0, as of a batch norm that starts at 0, are left out too.
    """
    with untouched(model):  # parametrized weights move where they are read in train mode
        norms, counted = weight_norms(model, graph, tolerance=_NORM_TOLERANCE), norm_layer_constants(model, graph)
    rows = [replace(r, norm=norms[r.name].value, norm_method=norms[r.name].method) if r.name in norms else r for r in profile.layers]
    log10 = sum(math.log10(constant) for constant in [*(n.value for n in norms.values()), *counted.values()] if constant)
    late = [name for name, norm in norms.items() if not norm.converged]
    kinds = Counter(type(model.get_submodule(name)).__name__ for name, constant in counted.items() if constant is None)
    said = [f"norms that did not settle to {_NORM_TOLERANCE:g}: {', '.join(late)}"] if late else []
    run = {node.module for node in graph.nodes}
    if none := [row.name for row in rows if row.name in run and row.name not in norms]:
        said.append(f"layers left out, as each {_NO_PRODUCT}: {', '.join(none)}")
    if kinds:
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        said.append(f"norm layers left out, as their slope has no bound but by the data: {listed}")
    return replace(profile, layers=tuple(rows)).with_flags(log10_lipschitz="; ".join(said)).with_network(log10_lipschitz=log10)


def with_motion(profile: Profile, model: nn.Module, graph: Trace, start: InitialWeights) -> Profile:
    """The profile with each layer's (2,1) distance from initialization, and the score ``capacity_slack`` of the training since."""
    with untouched(model):
        distances, slack = start.distances(model), start.slack(model, graph)
    rows = tuple(replace(r, distance=distances.get(r.name, r.distance)) for r in profile.layers)
    return replace(profile, layers=rows).with_flags(capacity_slack="").with_network(capacity_slack=slack)
