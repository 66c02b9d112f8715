"""Tuning the input resolution of a network: what each size means for its layers, short runs, a choice with reasons and advice.

First, without training: which layers are past the border at each size, and the cost. Then one training for all sizes: the same weights see
the images at one size after the other (`capnas.mixed_sizes`), for two thirds of what may be spent. A pass costs the mean over the sizes and
not their sum, so that these weights are nearly as mature as a full training makes them, where as many passes at each size alone would
be over after a tenth of it, while large images are still behind. From there each size goes on alone, by successive halving (Jamieson and
Talwalkar 2016, arXiv 1502.07943): all are trained for a short while with the same images, order and settings and a learning rate that
falls to its end, the sizes of least worth are dropped, the others go on for what is left. Sharing first and branching then is ours.

Networks whose parameters depend on the size (position embeddings, heads after flattening) cannot share: there successive halving starts
from each size's own weights and has all of the spend, and the result says so. The cost is bounded in advance by a share of what training
every size to the end would take, counted in multiply-accumulates. The rule of the choice is in `capnas.measures.resolution`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from capnas.data import ImageData, load_data
from capnas.devices import device_of, resolve_device
from capnas.errors import UsageError, counted
from capnas.graph.structure import structure
from capnas.measures import halving, receptive
from capnas.measures import resolution as rule
from capnas.measures.probing import cloned, why_no_logits
from capnas.measures.resolution import Recommendation, SizeReading
from capnas.mixed_sizes import MixedSizes, SharedRun, train_together
from capnas.profile import Profile
from capnas.repair import Advice, advise
from capnas.size_survey import Build, SizeSurvey, are_sizes, survey_resolutions, trace_size
from capnas.training import TrainConfig, TrainingResult, train

__all__ = ["SHARE", "Build", "SizeRun", "SizeSurvey", "Tuning", "advise_resolution", "ladder", "survey_resolutions", "tune_resolution"]

SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class SizeRun:
    """One rung of one size.

    Attributes:
        size: pixels.
        rung: from 1.
        epochs: of this rung.
        reading: what is known after it.
        seconds: wall-clock.
        status, reason: of `capnas.training.TrainingResult`.
    """

    size: int
    rung: int
    epochs: int
    reading: SizeReading | None
    seconds: float
    status: str = "complete"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What `tune_resolution` found.

    Attributes:
        surveys: every candidate, ascending.
        shared: the training that all sizes start from.
        runs: every short training of a size alone, in order.
        left_out: by size, why it is not among those compared last: refused, dropped after a round, or its training failed.
        recommendation: the choice, with reasons.
        advice: what to change where layers of the chosen size remain idle.
        epochs: length of a full training, of which the cost is a share.
        macs_share: cost over that of training every size for `epochs`, in multiply-accumulates.
        seconds_share: the same in seconds, each size's full training taken from its own seconds an epoch; None where one was not run.
    """

    surveys: tuple[SizeSurvey, ...]
    shared: SharedRun
    runs: tuple[SizeRun, ...]
    left_out: Mapping[int, str]
    recommendation: Recommendation
    advice: tuple[Advice, ...]
    epochs: int
    macs_share: float
    seconds_share: float | None

    @property
    def readings(self) -> tuple[SizeReading, ...]:
        """Of all rungs."""
        return tuple(r.reading for r in self.runs if r.reading is not None)

    def last(self, size: int) -> SizeReading | None:
        """The reading after a size's last rung."""
        return next((r for r in reversed(self.readings) if r.size == size), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = dataclasses.asdict(self)
        for part, key in (("recommendation", "fitted"), ("recommendation", "worth"), ("shared", "seen")):
            found[part][key] = {str(size): value for size, value in found[part][key].items()}
        found["left_out"] = {str(size): why for size, why in self.left_out.items()}
        return found


def ladder(size: int) -> tuple[int, ...]:
    """Candidates around an image size: from a half to twice of it in steps of one doubling of MACs, in multiples of 4.

    >>> ladder(28), ladder(64)
    ((16, 20, 28, 40, 56), (32, 44, 64, 92, 128))
    """
    return tuple(dict.fromkeys(max(4, 4 * math.floor(size * 2 ** (step / 2) / 4 + 0.5)) for step in range(-2, 3)))


def tune_resolution(
    build: Build,
    data: Any,
    candidates: Sequence[int],
    *,
    epochs: int = 10,
    share: float = SHARE,
    budget: int | None = None,
    pay: float | None = None,
    config: TrainConfig | None = None,
    refused: Mapping[int, str] | None = None,
    on_start: Callable[[], None] | None = None,
    on_run: Callable[[SizeRun], None] | None = None,
    on_pass: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Find the smallest size at which inference is spread evenly over the layers and accuracy has stopped paying for MACs.

    Args:
        build: gives the network for a size, the same weights at each call as far as shapes allow; what it gives is copied, not trained.
        data: images, loaded at the largest candidate that is not refused, so that none is resized twice; or what `capnas.load_data` takes,
            which is loaded so. Accuracies are those of the validation split.
        candidates: pixels.
        epochs: length of a full training, of which the cost is a share.
        share: most that all of it together may cost, as a share of training every size for `epochs`. Where a single size can be used there
            is nothing to compare, and one epoch is trained for its saturations.
        budget: most multiply-accumulates of one image.
        pay: accuracy that a doubling of MACs has to bring; `capnas.measures.resolution.price` where it is None.
        config: all other settings of the training; its seed is that of every size, its epochs are ignored.
        refused: by size, why it is ruled out already, such as images that do not fit into memory.
        on_start: called before the first training, when nothing stands against it.
        on_run: told of each short run.
        on_pass: told of each pass of the shared training: its number, and of how many.

    Raises:
        UsageError: as `survey_resolutions`; a network whose outputs are no logits of the images; a device that is not here; a share that
            does not pay for one epoch of every size; a ``pay`` that is negative or not finite; no size could be trained.

    >>> import numpy as np
    >>> from capnas.data import load_data
    >>> data = load_data((np.random.default_rng(0).integers(0, 256, (60, 12, 12), dtype=np.uint8), np.arange(60) % 2))
    >>> net = lambda size: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> found = tune_resolution(net, data, (6, 12), epochs=4, config=TrainConfig(batch_size=16, device="cpu"))
    >>> found.recommendation.size in (6, 12), found.macs_share <= 0.3
    (True, True)
    """
    if epochs < 1 or not 0 < share <= 1:
        raise UsageError(f"epochs must be at least 1 and share in (0, 1], got {epochs} and {share}.")
    if isinstance(build, nn.Module):
        raise UsageError(f"build must be a function of the size that gives a network, got a {type(build).__name__}: lambda size: network.")
    if not isinstance(data, ImageData):
        usable = [size for size in candidates if size not in (refused or {})] if are_sizes(candidates) else []
        data = load_data(data, image_size=max(usable, default=None))
    surveys = survey_resolutions(build, candidates, in_chans=data.in_chans, budget=budget, refused=refused)
    rows = {s.size: s for s in surveys if not s.refusal and s.macs is not None}
    macs = _macs(rows)
    possible = {s.size: s.macs for s in surveys if s.macs is not None and s.size not in (refused or {})}
    swept = {size: cost for size, cost in possible.items() if budget is None or cost <= budget}
    sweep = epochs * sum(swept.values())
    left = share * sweep
    base, pay = config or TrainConfig(), rule.price(pay, budget)
    resolve_device(base.device)
    networks = {size: cloned(build(size)) for size in rows}
    for size, network in networks.items():
        example = data.probe(2, device=device_of(network), image_size=size)[0]
        if (why := why_no_logits(network, example, data.num_classes)) is not None:
            raise UsageError(f"the network at {size} px cannot be trained: {why}.")
    costs, mixed = list(macs.values()), MixedSizes.of(data, tuple(macs))

    def rest(seen: Mapping[int, float]) -> float:
        return left - sum(passes * macs[size] for size, passes in seen.items())

    if halving.rung_epochs(costs, left=left, last=True, most=1) < 1:
        least = math.ceil(sum(costs) * epochs / left)
        of = f"a share of {share:g} of {counted(epochs, 'epoch')}"
        raise UsageError(f"{of} does not pay for one epoch of every size: give at least {least} epochs.")
    passes = halving.shared_passes(costs, left=left, most=epochs)
    while halving.rung_epochs(costs, left=rest(mixed.shares(base.batch_size, passes)), last=True, most=1) < 1:
        passes -= 1  # a few batches do not take turns evenly, and the first sizes may be the dearest
    if on_start is not None:
        on_start()
    shared = train_together(networks, data, base, passes=passes, on_pass=on_pass)
    left = rest(shared.seen)
    if shared.reason:
        networks = {size: cloned(build(size)) for size in rows}
    runs, left = _compare(rows, networks, data, base, most=epochs if len(rows) > 1 else 1, left=left, pay=pay, on_run=on_run)
    readings = [r.reading for r in runs if r.reading is not None]
    choice = rule.recommend(readings, budget=budget, pay=pay, images=data.sizes["validation"], chance=data.guess)
    left_out = _left_out(surveys, runs)
    notes = [s.note for s in surveys if s.note and not s.refusal]
    if rows[choice.size].borderless:
        notes.append("no border: the network mixes all positions")
    told = (*choice.reasons, *notes, *(f"{size} px: {why}" for size, why in left_out.items()))
    return Tuning(
        surveys=surveys,
        shared=shared,
        runs=tuple(runs),
        left_out=left_out,
        recommendation=dataclasses.replace(choice, reasons=told),
        advice=_advice(build, rows[choice.size], data.in_chans, next(r for r in reversed(readings) if r.size == choice.size)),
        epochs=epochs,
        macs_share=(share * sweep - left) / sweep,
        seconds_share=_seconds_share(shared, runs, swept, epochs),
    )


def _macs(rows: Mapping[int, SizeSurvey]) -> dict[int, int]:
    return {size: int(row.macs or 0) for size, row in rows.items()}


def _compare(
    rows: Mapping[int, SizeSurvey],
    networks: Mapping[int, nn.Module],
    data: ImageData,
    base: TrainConfig,
    *,
    most: int,
    left: float,
    pay: float,
    on_run: Callable[[SizeRun], None] | None,
) -> tuple[list[SizeRun], float]:
    """Successive halving: every size alone for some epochs, the better ones for more.

    Args:
        rows: of the sizes.
        networks: to start from; copied.
        data: the images.
        base: settings of the training.
        most: epochs of one size.
        left: multiply-accumulates that all of it may cost, in epochs of one image.
        pay: accuracy that a doubling of MACs has to bring.
        on_run: told of each.

    Returns:
        The trainings, and what is left of the cost.
    """
    macs, counts = _macs(rows), halving.halving(len(rows))
    models: dict[int, nn.Module] = {}
    runs: list[SizeRun] = []
    done, running = 0, tuple(rows)
    for rung, count in enumerate(counts, 1):
        if rung > 1:
            running = rule.survivors([r.reading for r in runs if r.reading is not None], count, pay)
            models = {size: models[size] for size in running}
        length = halving.rung_epochs([macs[s] for s in running], left=left, last=rung == len(counts), most=most - done)
        if length < 1 or (rung > 1 and len(running) < 2):
            break
        for size in running:
            if size not in models:
                models[size] = cloned(networks[size])  # it leaves what the others share
            settings = dataclasses.replace(base, epochs=length, seed=(base.seed + rung - 1) % 2**32, record=True)
            result = train(models[size], data, settings, image_size=size)
            runs.append(_run(rows[size], macs[size], rung, length, done + length, result))
            left -= macs[size] * len(result.curve)
            if on_run is not None:
                on_run(runs[-1])
        done += length
        running = tuple(r.size for r in runs if r.rung == rung and r.reading is not None)
        if not running:
            raise UsageError(f"no size could be trained: {runs[-1].status}, {runs[-1].reason}.")
    return runs, left


def advise_resolution(build: Build, size: int, *, in_chans: int) -> tuple[Advice, ...]:
    """What to change in a network whose layers are past the border at a size, without training; empty where none is.

    >>> deep = lambda size: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))
    >>> [(a.kind, a.layers) for a in advise_resolution(deep, 12, in_chans=1)]
    [('cut', ('4',)), ('stride', ('0',)), ('size', ())]
    """
    model = build(size)
    graph = trace_size(model, in_chans, size)
    return advise(model, graph, size, idle=receptive.border_layers(structure(graph).fields, size), build=build)


def _advice(build: Build, row: SizeSurvey, in_chans: int, reading: SizeReading) -> tuple[Advice, ...]:
    """Where a tail was measured, the tail decides what to cut; layers past the border that still work are left alone."""
    if reading.even:
        return ()
    model = build(row.size)
    graph = trace_size(model, in_chans, row.size)
    return advise(model, graph, row.size, idle=reading.layers[-reading.tail :], layers=reading.layers, build=build)


def _left_out(surveys: Sequence[SizeSurvey], runs: Sequence[SizeRun]) -> dict[int, str]:
    """Why each of these candidates is not among the sizes compared last."""
    ends, found = max(r.rung for r in runs), {s.size: f"not trained, {s.refusal}" for s in surveys if s.refusal}
    for size, run in {r.size: r for r in runs}.items():
        if run.reading is None:
            found[size] = f"its training ended in round {run.rung}: {run.status}, {run.reason}"
        elif run.rung < ends:
            found[size] = f"dropped after round {run.rung}, it was worth less than the others"
    return dict(sorted(found.items()))


def _run(row: SizeSurvey, macs: int, rung: int, length: int, total: int, result: TrainingResult) -> SizeRun:
    reading = None
    if result.status == "complete" and result.accuracy is not None:
        values = _saturations(result.profile, row.looking)
        reading = SizeReading(
            size=row.size,
            macs=macs,
            accuracy=result.accuracy,
            loss=result.curve[-1]["val_loss"],
            epochs=total,
            saturations=tuple(values.values()),
            layers=tuple(values),
        )
    return SizeRun(
        size=row.size, rung=rung, epochs=length, reading=reading, seconds=result.seconds, status=result.status, reason=result.reason
    )


def _saturations(profile: Profile | None, looking: Sequence[str]) -> dict[str, float]:
    """By name, of the layers that look around where there are three or more of them; else of all layers but the head."""
    if profile is None:
        return {}
    found = {row.name: row.saturation for row in profile.layers if row.saturation is not None and math.isfinite(row.saturation)}
    if len(looking) >= 3 and all(name in found for name in looking):
        return {name: found[name] for name in looking}
    return dict(list(found.items())[:-1])


def _seconds_share(shared: SharedRun, runs: Sequence[SizeRun], sizes: Collection[int], epochs: int) -> float | None:
    per_epoch = {r.size: r.seconds / r.epochs for r in runs}
    if not per_epoch.keys() >= set(sizes):
        return None
    return (shared.seconds + sum(r.seconds for r in runs)) / (epochs * sum(per_epoch.values()))
