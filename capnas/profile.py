"""Profile of a network: one row per layer and per block, from what was recorded of it.

`profile_model` runs a model once on given inputs; training hands over what its recorder saw (`Profile.from_records`). Both leave
the model as it was: weights, buffers, mode, gradients, hooks and random state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capnas.capacity import CapacityMap, capacity_map
from capnas.errors import UsageError, one_of
from capnas.graph.structure import StructureReport, structure
from capnas.graph.tracing import Trace, trace
from capnas.measures.moments import covariance
from capnas.measures.proxies import PROXIES, baseline_proxies
from capnas.measures.saturation import THRESHOLD, Spectrum, effective_rank, intrinsic_dimension, saturation_of, spectrum, threshold_margin
from capnas.recording import MEASURED, LayerRecord, Reading, Recorder
from capnas.weights import weight_norms

VERSION = 1
FEW_ROWS = 10  # rows below this multiple of the width are flagged: they cap the rank
THRESHOLDS = (0.9, 0.95, 0.99, 0.999)
MEASURES = ("saturation", "structure", "norms", "capacity", "proxies")


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """What was measured of one layer (reading "modules") or block (reading "blocks"); ``None`` where a measure does not apply.

    Attributes:
        name: qualified module name.
        kind: class of the module.
        reading: "modules" or "blocks".
        width: features D of the output.
        params: parameters of the module itself (of everything inside, for a block).
        rows: rows used; `rows_seen` passed, positions times samples.
        k: intrinsic dimension at the profile's threshold.
        saturation: k / width, in [0, 1]; NaN when not finite.
        saturations: the same at further thresholds, keyed by the threshold as text.
        effective_rank: participation ratio of the spectrum, in [1, D].
        simpson: sum of squared variance shares, 1 / effective rank.
        margin: distance of the threshold from the nearest cumulative share; near 0, k may be one off.
        few_rows: fewer than 10 rows per feature were used: read the saturation as a lower bound.
        finite: False when the outputs held NaN or infinite values.
        complexity: C_loc of the layer algebra, bits (measure "structure").
        log2_fan_in: log2 of the layer's own path count K; `log2_paths` is that from the model input to one of its units.
        receptive_field: (smallest, largest) receptive field along each image axis, in pixels; infinite values are stored as ``None``.
        norm: operator norm at the input size it sees (measure "norms"); `norm_method` says how it was found.
        capacity: c_l, what the layer could fit (measure "capacity", an estimate after Donier, see `capnas.capacity`).
        utilisation: u_l = c_l over the layer's parameters, in [0, 1]; `over_wide` where it is far below the others'.
    """

    name: str
    kind: str
    reading: Literal["modules", "blocks"]
    width: int
    params: int
    rows: int
    rows_seen: int
    k: int | None = None
    saturation: float | None = None
    saturations: Mapping[str, float] | None = None
    effective_rank: float | None = None
    simpson: float | None = None
    margin: float | None = None
    few_rows: bool = False
    finite: bool = True
    complexity: float | None = None
    log2_fan_in: float | None = None
    log2_paths: float | None = None
    receptive_field: tuple[tuple[float, float], ...] | None = None
    norm: float | None = None
    norm_method: str | None = None
    capacity: float | None = None
    utilisation: float | None = None
    over_wide: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Per-layer and per-block measurements of one network in one state.

    Attributes:
        layers: conv and linear modules in execution order.
        blocks: repeated units in execution order.
        skipped: parametrised modules that were not measured, name to reason.
        mode: "train" or "eval", the model's mode while it was read.
        threshold: share of the variance that k explains.
        rows: how rows are formed, always "channelwise": every position of every sample.
        network: numbers of the whole network by name: ``complexity``, ``log2_paths`` and ``intrinsic_power`` (log2 P) of the layer
            algebra after Badias & Banerjee (reconstructed), ``log10_lipschitz`` (sum of log10 operator norms), capacity scores, baselines.
    """

    layers: tuple[LayerProfile, ...]
    blocks: tuple[LayerProfile, ...]
    skipped: Mapping[str, str]
    mode: Literal["train", "eval"]
    threshold: float = THRESHOLD
    rows: str = "channelwise"
    network: Mapping[str, float] = field(default_factory=dict)

    def reading(self, name: Literal["modules", "blocks"]) -> tuple[LayerProfile, ...]:
        """The rows of one reading."""
        return self.blocks if name == "blocks" else self.layers

    def saturations(self, reading: Literal["modules", "blocks"] = "modules") -> list[float]:
        """Saturation per layer or block in execution order."""
        return [row.saturation for row in self.reading(reading) if row.saturation is not None]

    def with_network(self, **numbers: float) -> Profile:
        """The same profile with further numbers of the whole network."""
        return replace(self, network={**self.network, **numbers})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe mapping; NaN becomes ``None``."""
        return {"version": VERSION, **_json_safe(asdict(self))}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Profile:
        """Inverse of `to_dict`.

        Raises:
            UsageError: stored by a version of capnas that wrote another format.
        """
        values = dict(stored)
        version = values.pop("version", None)
        if version != VERSION:
            raise UsageError(f"profile version must be {VERSION}, got {version!r}: read it with the capnas that wrote it.")
        known = {f.name for f in fields(LayerProfile)}
        for reading in ("layers", "blocks"):
            values[reading] = tuple(LayerProfile(**{k: v for k, v in row.items() if k in known}) for row in values[reading])
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def from_records(
        cls, model: nn.Module, records: Mapping[str, LayerRecord], *, mode: Literal["train", "eval"], threshold: float = THRESHOLD
    ) -> Profile:
        """Profile of what a `Recorder` saw, see `Recorder.pop`."""
        rows = [_row(model, record, threshold) for record in records.values()]
        return cls(
            layers=tuple(r for r in rows if r.reading == "modules"),
            blocks=tuple(r for r in rows if r.reading == "blocks"),
            skipped=skipped_modules(model, {r.name for r in rows if r.reading == "modules"}),
            mode=mode,
            threshold=threshold,
        )


def profile_model(
    model: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    targets: Tensor | None = None,
    *,
    measures: Sequence[str] = ("saturation",),
    threshold: float = THRESHOLD,
    reading: Reading = "both",
    blocks: str | None = None,
    mode: Literal["train", "eval"] | None = None,
    values_per_call: int | None = None,
    seed: int = 0,
) -> Profile:
    """Profile a model on a batch of inputs, leaving the model untouched.

    Args:
        model: any module that maps the inputs to outputs.
        inputs: one batch (B, C, H, W) on the model's device, or an iterable of batches.
        targets: (B,) classes, for measures that need a loss.
        measures: any of `MEASURES`. "saturation" is always read; "structure" adds the layer algebra and receptive fields from the traced
            graph, "norms" operator norms, "capacity" capacity allocation (a few backward passes), "proxies" the published baselines
            synflow, naswot, zico, snip, grad_norm, params and macs.
        threshold: share of the variance that the intrinsic dimension explains.
        reading: "modules", "blocks" or "both".
        blocks: regular expression naming the units to read as blocks.
        mode: "train" (batch statistics, the reading for networks at initialization) or "eval"; the model's own mode when absent.
        values_per_call: bound on what is read per layer and batch, see `Recorder`; every row when absent.
        seed: of position sampling and of anything random in the forward pass.

    Raises:
        UsageError: unknown measure, reading or block pattern.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> profile = profile_model(model, torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    >>> [(row.name, row.k, row.width) for row in profile.layers]
    [('0', 4, 4), ('3', 2, 2)]
    """
    for measure in measures:
        if measure not in MEASURES:
            raise UsageError(one_of("measures", measure, MEASURES))
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    chosen: Literal["train", "eval"] = mode or ("train" if model.training else "eval")
    with untouched(model, training=chosen == "train", seed=seed), torch.no_grad():
        with Recorder(model, reading=reading, blocks=blocks, values_per_call=values_per_call, seed=seed) as recorder:
            for batch in batches:
                model(batch)
        records = recorder.pop(chosen)
    profile = Profile.from_records(model, records, mode=chosen, threshold=threshold)
    return enrich(profile, model, batches[0], targets, measures=measures, seed=seed)


def enrich(
    profile: Profile,
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    measures: Sequence[str],
    graph: Trace | None = None,
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
        seed: of anything random.
    """
    if {"structure", "norms"} & set(measures):
        graph = graph or trace(model, (1, *inputs.shape[1:]))
        if "structure" in measures:
            profile = with_structure(profile, structure(graph))
        if "norms" in measures:
            profile = with_norms(profile, model, graph)
    if "capacity" in measures:
        profile = with_capacity(profile, capacity_map(model, inputs, mode=profile.mode, seed=seed))
    if "proxies" in measures:
        proxies = baseline_proxies(model, inputs, targets)
        profile = profile.with_network(**{name: proxies[name].value for name in PROXIES})
    return profile


def with_structure(profile: Profile, report: StructureReport) -> Profile:
    """The profile with the layer algebra's columns and network numbers, see `capnas.graph.structure.structure`."""
    rows = []
    for row in profile.layers:
        found = report.layers.get(row.name)
        if found is not None:
            row = replace(
                row, complexity=found.complexity_bits, log2_fan_in=found.log2_fan_in, log2_paths=found.log2_paths,
                receptive_field=found.receptive_field or None,
            )  # fmt: skip
        rows.append(row)
    network = {"complexity": report.complexity, "log2_paths": report.log2_paths, "intrinsic_power": report.log2_power}
    return replace(profile, layers=tuple(rows)).with_network(**network, depth=float(report.depth))


def with_capacity(profile: Profile, found: CapacityMap) -> Profile:
    """The profile with each layer's capacity and the network's capacity scores, see `capnas.capacity.capacity_map`."""
    rows = [
        replace(r, capacity=found.capacity[r.name], utilisation=found.utilisation.get(r.name), over_wide=r.name in found.over_wide)
        if r.name in found.capacity
        else r
        for r in profile.layers
    ]
    groups = [[name for name in found.capacity if name.startswith(block.name + ".")] for block in profile.blocks]
    scores = found.scores([g for g in groups if g] or None)
    return replace(profile, layers=tuple(rows)).with_network(**scores)


def with_norms(profile: Profile, model: nn.Module, graph: Trace) -> Profile:
    """The profile with the operator norm of each layer, see `capnas.weights.weight_norms`."""
    norms = weight_norms(model, graph)
    rows = [replace(r, norm=norms[r.name].value, norm_method=norms[r.name].method) if r.name in norms else r for r in profile.layers]
    log10 = sum(math.log10(n.value) for n in norms.values() if n.value > 0)
    return replace(profile, layers=tuple(rows)).with_network(log10_lipschitz=log10)


@contextmanager
def untouched(model: nn.Module, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Run a model in a mode and put back its buffers, every module's mode and the random state, also after an error.

    Weights are the caller's duty: do not step an optimizer inside.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()} if training else {}
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def skipped_modules(model: nn.Module, measured: set[str]) -> dict[str, str]:
    """Every module that holds parameters of its own and was not measured, with the reason."""
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own == 0 or name in measured:
            continue
        kind = type(module).__name__
        if isinstance(module, MEASURED):
            reasons[name] = f"{kind} was never called in the forward pass"
        elif "norm" in kind.lower():
            reasons[name] = f"{kind} rescales the layer before it"
        else:
            reasons[name] = f"{kind} holds parameters but is neither a convolution nor a linear layer"
    return reasons


def _row(model: nn.Module, record: LayerRecord, threshold: float) -> LayerProfile:
    module = model.get_submodule(record.name)
    spec = spectrum(covariance(record.moments)) if record.finite else Spectrum(
        eigenvalues=torch.zeros(0), width=record.moments.width, total=float("nan"), finite=False)  # fmt: skip
    rank = effective_rank(covariance(record.moments)) if record.finite else float("nan")
    return LayerProfile(
        name=record.name, kind=record.kind, reading=record.reading, width=spec.width, rows=record.moments.count, rows_seen=record.rows_seen,
        params=sum(p.numel() for p in module.parameters(recurse=record.reading == "blocks")),
        k=intrinsic_dimension(spec.eigenvalues, threshold, spec.total) if spec.finite else None,
        saturation=saturation_of(spec, threshold),
        saturations={str(t): saturation_of(spec, t) for t in THRESHOLDS},
        effective_rank=rank, simpson=1 / rank if rank > 0 else rank, margin=threshold_margin(spec, threshold),
        few_rows=record.moments.count < FEW_ROWS * spec.width, finite=record.finite,
    )  # fmt: skip


def _json_safe(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return copy.copy(value)
