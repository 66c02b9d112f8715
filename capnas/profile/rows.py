"""The rows of a profile and the profile itself: plain values that go into a trial as JSON and come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from capnas.documents import plain
from capnas.errors import UsageError
from capnas.layers import MEASURED, is_quantized, own_parameters
from capnas.measures.probing import unwrap_model
from capnas.measures.saturation import THRESHOLD, effective_rank, intrinsic_dimension, saturation_of, spectrum, threshold_margin
from capnas.recording import LayerRecord

VERSION = 1
MEASURES = ("saturation", "structure", "norms", "capacity", "proxies")
FEW_ROWS = 10  # rows below this multiple of the width are flagged: they cap the rank
THRESHOLDS = (0.9, 0.95, 0.99, 0.999)


Range = tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """What was measured of one layer (reading "modules") or block (reading "blocks"); ``None`` where a measure does not apply.

    Attributes:
        name: qualified module name.
        kind: class of the module.
        reading: "modules" or "blocks".
        width: features D of the output.
        params: parameters of the module itself, with those that its weight is computed from (of everything inside, for a block).
        macs: multiply-accumulates for one image, of the same (measure "structure").
        rows: rows used; `rows_seen` passed, positions times samples.
        positions: rows that one image gives: height times width of a map, tokens of a sequence, 1 of a vector.
        k: intrinsic dimension at the profile's threshold, rounded where it is a mean over initializations.
        saturation: k / width, in [0, 1]; NaN when not finite.
        saturations: the same at further thresholds, keyed by the threshold as text.
        effective_rank: participation ratio of the spectrum, in [1, D].
        simpson: sum of squared variance shares, 1 / effective rank.
        margin: distance of the threshold from the nearest cumulative share; near 0, k may be one off.
        few_rows: fewer than 10 rows per feature were used: read the saturation as a lower bound.
        finite: False when the outputs held NaN or infinite values.
        complexity: C_loc of the layer algebra, bits (measure "structure").
        log2_fan_in: log2 of the layer's own path count K; `log2_paths` is that from the model input to one of its units.
        log2_compression: log2 of output over input units of one position, the layer's own intrinsic power P; above 0 it expands.
        receptive_field: (r_min, r_max) of its output along each image axis, in pixels; infinite values are stored as ``None``.
        norm: operator norm at the input size it sees (measure "norms"); `norm_method` says how it was found: "power" is a lower estimate
            that settled to 3e-4, certified from below only, the others are exact to rounding.
        distance: (2,1) distance of the weight from initialization, where the initial weights are known.
        capacity: c_l, what the layer could fit (measure "capacity", an estimate after Donier, see `capnas.capacity`).
        capacity_method: "k-fac" or "exact", see `capnas.capacity.CapacityMap`; the two are not to be compared.
        utilisation: u_l = c_l over the layer's parameters, in [0, 1]; `over_wide` where it is far below the others'.
        decoupling: of the first non-linearity behind the layer: the share of output variance that is not linear in its input (19b),
            in [0, 1] (measure "capacity"); `gate_decoupling` one minus the cosine between the gates of its units (19a).
    """

    name: str
    kind: str
    reading: Literal["modules", "blocks"]
    width: int
    params: int
    rows: int
    rows_seen: int
    macs: int | None = None
    positions: int | None = None
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
    log2_compression: float | None = None
    receptive_field: Range | None = None
    norm: float | None = None
    norm_method: str | None = None
    distance: float | None = None
    capacity: float | None = None
    capacity_method: str | None = None
    utilisation: float | None = None
    over_wide: bool | None = None
    decoupling: float | None = None
    gate_decoupling: float | None = None


@dataclass(frozen=True, kw_only=True)
class FieldReport:
    """What the receptive fields say of a network at one image size, after Richter et al. (arXiv 2106.12307).

    Attributes:
        image_size: pixels along each axis.
        critical: expanding layers whose own r_min exceeds the image.
        border: rule to the layers that it predicts to be unproductive; ``"strict"`` is the papers' rule without 1x1 layers and
            ``"toolbox"`` that of rfa_toolbox, see `capnas.measures.receptive.border_layers`.
        feasible: smallest and largest feasible image size along each axis; None where no field is finite.
        functional: the same with the toolbox's lower bound.
    """

    image_size: tuple[int, ...]
    critical: tuple[str, ...]
    border: Mapping[str, tuple[str, ...]]
    feasible: Range | None = None
    functional: Range | None = None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> FieldReport:
        """Inverse of ``dataclasses.asdict`` after a passage through JSON."""
        return cls(
            image_size=tuple(stored["image_size"]),
            critical=tuple(stored["critical"]),
            border={rule: tuple(names) for rule, names in stored["border"].items()},
            feasible=_range(stored.get("feasible")),
            functional=_range(stored.get("functional")),
        )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Per-layer and per-block measurements of one network in one state.

    Attributes:
        layers: conv and linear modules in execution order.
        blocks: repeated units in execution order.
        skipped: modules with weights that were not measured, name to reason, none where blocks alone were read; a reason for a layer with
            a row begins with the columns that the row lacks, as in "capacity: ...".
        mode: "train" or "eval", the model's mode while it was read.
        threshold: share of the variance that k explains.
        rows: how rows are formed, always "channelwise": every position of every sample.
        network: numbers of the whole network by name: ``params`` and ``macs`` (of one image), ``complexity``, ``log2_paths`` and
            ``intrinsic_power`` (log2 P) of the layer algebra after Badias & Banerjee (reconstructed), ``log10_lipschitz`` (sum of log10
            operator norms of layers and batch norms), capacity scores and the audit numbers `coherent`, `shattering` and `residual_sum`,
            baselines.
        receptive: critical and border layers and feasible image sizes (measure "structure"); None where it was not measured.
        flags: what limits a number of `network`, by its name: why it is NaN, or what it is short of.
        initializations: copies with different initial weights over which saturations are means, see `averaged`; 1 for one network.
    """

    layers: tuple[LayerProfile, ...]
    blocks: tuple[LayerProfile, ...]
    skipped: Mapping[str, str]
    mode: Literal["train", "eval"]
    threshold: float = THRESHOLD
    rows: str = "channelwise"
    network: Mapping[str, float] = field(default_factory=dict)
    receptive: FieldReport | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    initializations: int = 1

    def reading(self, name: Literal["modules", "blocks"]) -> tuple[LayerProfile, ...]:
        """The rows of one reading."""
        return self.blocks if name == "blocks" else self.layers

    def saturations(self, reading: Literal["modules", "blocks"] = "modules") -> list[float]:
        """Saturation per layer or block in execution order."""
        return [row.saturation for row in self.reading(reading) if row.saturation is not None]

    @property
    def measures(self) -> tuple[str, ...]:
        """Which of `MEASURES` the profile holds."""
        held = {
            "saturation": True,
            "structure": "complexity" in self.network,
            "norms": any(row.norm is not None for row in self.layers),
            "capacity": any(row.capacity is not None for row in self.layers),
            "proxies": "naswot" in self.network,
        }
        return tuple(name for name in MEASURES if held[name])

    def with_network(self, **numbers: float) -> Profile:
        """The same profile with further numbers of the whole network."""
        return replace(self, network={**self.network, **numbers})

    def with_flags(self, **texts: str) -> Profile:
        """The same profile with these flags of numbers in place of those that it has of them; an empty text is none."""
        others = {name: text for name, text in self.flags.items() if name not in texts}
        return replace(self, flags=others | {name: text for name, text in texts.items() if text})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe mapping; NaN becomes ``None``."""
        return {"version": VERSION, **plain(self)}

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
            values[reading] = tuple(_row_from({k: v for k, v in row.items() if k in known}) for row in values[reading])
        if values.get("receptive") is not None:
            values["receptive"] = FieldReport.from_dict(values["receptive"])
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def from_records(
        cls, model: nn.Module, records: Mapping[str, LayerRecord], *, mode: Literal["train", "eval"], threshold: float = THRESHOLD
    ) -> Profile:
        """Profile of what a `Recorder` saw, see `Recorder.pop`."""
        model = unwrap_model(model)
        rows = [_row(model, record, threshold) for record in records.values()]
        return cls(
            layers=tuple(r for r in rows if r.reading == "modules"),
            blocks=tuple(r for r in rows if r.reading == "blocks"),
            skipped=skipped_modules(model, {r.name for r in rows if r.reading == "modules"}),
            mode=mode,
            threshold=threshold,
        )


def averaged(profiles: Sequence[Profile]) -> Profile:
    """One profile of several copies of a network that differ in their weights: the first, with means over all.

    Averaged are the saturations, the intrinsic dimension (rounded), the effective rank and its inverse; the margin is the smallest, and a
    row is finite if all are, of few rows if any is. One copy's weights are a draw, of which scores of an untrained network shall not speak.
    A layer that a copy skipped, as some networks do at random while they train, is averaged over the others.

    Raises:
        UsageError: no profile.

    >>> row = LayerProfile(name="a", kind="Linear", reading="modules", width=4, params=4, rows=64, rows_seen=64, k=2, saturation=0.5)
    >>> pair = [Profile(layers=(r,), blocks=(), skipped={}, mode="train") for r in (row, replace(row, k=4, saturation=1.0))]
    >>> averaged(pair).layers[0].k, averaged(pair).layers[0].saturation, averaged(pair).initializations
    (3, 0.75, 2)
    """
    if not profiles:
        raise UsageError("profiles must be one or more, got none.")
    read = [{(r.name, r.reading): r for r in (*p.layers, *p.blocks)} for p in profiles]
    layers, blocks = (
        tuple(_mean([rows[key] for rows in read if (key := (row.name, row.reading)) in rows]) for row in of)
        for of in (profiles[0].layers, profiles[0].blocks)
    )
    return replace(profiles[0], layers=layers, blocks=blocks, initializations=len(profiles))


def _mean(rows: Sequence[LayerProfile]) -> LayerProfile:
    def of(column: str) -> float | None:
        values = [getattr(row, column) for row in rows]
        return None if None in values else math.fsum(values) / len(values)

    first, k, margins = rows[0], of("k"), [row.margin for row in rows]
    return replace(
        first, k=None if k is None else round(k), saturation=of("saturation"), effective_rank=of("effective_rank"), simpson=of("simpson"),
        saturations=first.saturations and {t: math.fsum((r.saturations or {})[t] for r in rows) / len(rows) for t in first.saturations},
        margin=None if None in margins else min(m for m in margins if m is not None),
        few_rows=any(row.few_rows for row in rows), finite=all(row.finite for row in rows),
    )  # fmt: skip


def skipped_modules(model: nn.Module, measured: set[str]) -> dict[str, str]:
    """Every module that holds parameters, or quantized weights, of its own and was not measured, with the reason."""
    reasons: dict[str, str] = {}
    within = {id(part) for m in model.modules() if is_parametrized(m) for part in m.parametrizations.modules()}  # type: ignore[union-attr]
    for name, module in model.named_modules():
        quantized = is_quantized(module)
        if name in measured or id(module) in within or not (quantized or any(p.numel() for p in own_parameters(module).values())):
            continue
        kind = type(module).__name__
        if quantized:
            reasons[name] = f"{kind} holds its weights quantized, not as parameters: profile the model before it was quantized"
        elif isinstance(module, MEASURED):
            reasons[name] = f"{kind} was never called in the forward pass"
        elif "norm" in kind.lower():
            reasons[name] = f"{kind} rescales the layer before it"
        else:
            reasons[name] = f"{kind} holds parameters but is neither a convolution nor a linear layer"
    return reasons


def _row(model: nn.Module, record: LayerRecord, threshold: float) -> LayerProfile:
    module = model.get_submodule(record.name)
    params = own_parameters(module).values() if record.reading == "modules" else module.parameters()
    cov = record.covariance
    spec, rank = replace(spectrum(cov), width=record.width), effective_rank(cov)
    return LayerProfile(
        name=record.name, kind=record.kind, reading=record.reading, width=spec.width, rows=record.rows, rows_seen=record.rows_seen,
        positions=record.positions,
        params=sum(p.numel() for p in params),
        k=intrinsic_dimension(spec.eigenvalues, threshold, spec.total) if spec.finite else None,
        saturation=saturation_of(spec, threshold),
        saturations={str(t): saturation_of(spec, t) for t in THRESHOLDS},
        effective_rank=rank, simpson=1 / rank if rank > 0 else rank, margin=threshold_margin(spec, threshold),
        few_rows=record.rows < FEW_ROWS * spec.width, finite=record.finite,
    )  # fmt: skip


def _row_from(stored: Mapping[str, Any]) -> LayerProfile:
    return LayerProfile(**{**stored, "receptive_field": _range(stored.get("receptive_field"))})


def _range(stored: Any) -> Range | None:
    """Pairs from JSON, where an infinite end is ``None``."""
    return None if stored is None else tuple((_end(low), _end(high)) for low, high in stored)


def _end(value: float | None) -> float:
    return math.inf if value is None else float(value)
