"""What the runs of a study say: the bound of each constraint, which constraints hold the error, and the decades between.

Graf et al. (arXiv 2202.08070) define capacity as the bound of Theorem 3.5 and excess capacity as how far a class can be constrained a
priori while the error stays on a par with the unconstrained network. Their tolerance and grid were not at hand: ours are arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from capnas.errors import StudyError, UsageError, check_name
from capnas.excess.composition import Stage, blocks
from capnas.excess.training import LayerState, Run
from capnas.measures.excess import CapacityBounds, WeightLayer, capacity_bounds
from capnas.measures.slack import LayerMotion, capacity_slack, slack_decades

BOUNDS = ("club", "spade", "lipschitz")
HOLDS = ("validation", "train", "both")
Hold = Literal["validation", "train", "both"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the bounds need of the training images.

    Attributes:
        data_norm: Frobenius norm of all of them stacked, normalised as they enter the network.
        samples: their number.
    """

    data_norm: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One pair of relative constraints over all seeds.

    Attributes:
        lipschitz: factor on every layer's norm in the unconstrained run of the same seed.
        distance: factor on every layer's distance, likewise.
        verdict: "held", "failed", or "skipped" where not every seed was trained: a looser setting had failed, or the study goes on.
        train_rise: training error minus that of the unconstrained run, mean over seeds; None where nothing was trained, as below.
        validation_rise: likewise of validation.
        decades: per bound (`BOUNDS`; "lipschitz" is the product of the layers' constants): log10 of the unconstrained network's bound over
            the constrained class's, mean over seeds, both at the margin of the unconstrained network.
        own_decades: the same with each bound at its own network's margin. A class whose networks are only scaled down has decades by the
            first number and none by this one.
    """

    lipschitz: float
    distance: float
    verdict: str
    train_rise: float | None = None
    validation_rise: float | None = None
    decades: dict[str, float] | None = None
    own_decades: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Excess capacity of a study.

    Attributes:
        settings: in the order of the grid.
        tightest: per bound the setting that held with the most decades, None where none held.
        decades: per bound the excess capacity: decades of that setting, 0 where none held.
        own_decades: per bound the most decades at the networks' own margins of a setting that held, at least 0.
        per_seed: per bound the excess capacity of each seed judged alone, in the order of `seeds`.
        seeds: of the unconstrained runs.
        unconstrained: per bound log10 of the unconstrained networks' bound, mean over seeds.
        train_error: of the unconstrained networks, mean over seeds.
        validation_error: likewise.
        slack: the cheap stand-in of the unconstrained runs, `capnas.measures.slack.capacity_slack`, mean over seeds.
        slack_decades: likewise, `capnas.measures.slack.slack_decades`.
    """

    settings: tuple[Setting, ...]
    tightest: dict[str, Setting | None]
    decades: dict[str, float]
    own_decades: dict[str, float]
    per_seed: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    unconstrained: dict[str, float]
    train_error: float
    validation_error: float
    slack: float
    slack_decades: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def class_bounds(run: Run, stages: Sequence[Stage], sample: Sample, *, margin: float) -> dict[str, float]:
    """Log10 of both bounds of Theorem 3.5 and of the network's Lipschitz constant, for the class that a run was trained in.

    The constants are the constraints of a constrained run, whatever its weights made of them, and the measured ones of an unconstrained
    run: the smallest class of this form that holds it, which is known only after training.
    """
    layers = {s.name: WeightLayer(norm=_norm(s), distance=_distance(s), weights=s.weights, name=s.name) for s in run.layers}
    found: CapacityBounds = capacity_bounds(blocks(stages, layers), data_norm=sample.data_norm, samples=sample.samples, margin=margin)
    return {name: float(getattr(found, name)) for name in BOUNDS}


def _norm(state: LayerState) -> float:
    return state.norm if state.norm_limit is None else state.norm_limit


def _distance(state: LayerState) -> float:
    return state.distance if state.distance_limit is None else state.distance_limit


def holds(rises: Sequence[tuple[float, float]], *, tolerance: float, hold: Hold) -> bool:
    """Whether errors stay on a par (our rule): the mean rise over seeds is at most the tolerance, for training, validation or both.

    Args:
        rises: (training, validation) of each seed.
        tolerance: share of images, not negative.
        hold: what has to hold.

    >>> holds([(0.0, 0.02), (0.01, 0.0)], tolerance=0.01, hold="validation"), holds([(0.1, 0.0)], tolerance=0.01, hold="both")
    (True, False)
    """
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance is a share of images in [0, 1), got {tolerance}.")
    check_name("hold", hold, HOLDS)
    columns = {"train": (0,), "validation": (1,), "both": (0, 1)}[hold]
    return bool(rises) and all(_mean(r[c] for r in rises) <= tolerance + 1e-12 for c in columns)


def read(
    runs: Sequence[Run],
    stages: Sequence[Stage],
    sample: Sample,
    grid: Sequence[tuple[float, float]],
    *,
    tolerance: float = 0.01,
    hold: Hold = "validation",
) -> Reading:
    """Judge every setting of a grid and take the tightest that holds: the protocol reconstructed.

    Args:
        runs: unconstrained ones and, of each setting that was trained, one per seed.
        stages: of the network.
        sample: of the training images.
        grid: pairs of factors (lipschitz, distance).
        tolerance: largest rise of the error, a share of images.
        hold: whose error.

    Raises:
        StudyError: no unconstrained run, or one that learnt nothing.
    """
    free = {run.seed: run for run in runs if run.lipschitz is None}
    if not free:
        raise StudyError("the study has no unconstrained run yet.")
    for run in free.values():
        if run.status != "complete" or run.margin is None:
            how = f"ended as {run.status}" if run.status != "complete" else "classified no image of train right"
            raise StudyError(f"the unconstrained training of seed {run.seed} {how}: try a lower lr or more epochs.")
    margin = {seed: run.margin or 1.0 for seed, run in free.items()}
    base = {seed: class_bounds(run, stages, sample, margin=margin[seed]) for seed, run in free.items()}
    settings, alone = [], {seed: dict.fromkeys(BOUNDS, 0.0) for seed in free}
    for lipschitz, distance in grid:
        mine = {run.seed: run for run in runs if (run.lipschitz, run.distance) == (lipschitz, distance) and run.seed in free}
        if set(mine) != set(free):
            settings.append(Setting(lipschitz=lipschitz, distance=distance, verdict="skipped"))
            continue
        rises = {seed: rise(run, free[seed]) for seed, run in mine.items()}
        gained = {seed: _minus(base[seed], class_bounds(run, stages, sample, margin=margin[seed])) for seed, run in mine.items()}
        own = {s: _minus(base[s], class_bounds(run, stages, sample, margin=run.margin)) for s, run in mine.items() if run.margin}
        for seed in free:
            if holds([rises[seed]], tolerance=tolerance, hold=hold):
                alone[seed] = {b: max(alone[seed][b], gained[seed][b]) for b in BOUNDS}
        settings.append(
            Setting(
                lipschitz=lipschitz,
                distance=distance,
                verdict="held" if holds(list(rises.values()), tolerance=tolerance, hold=hold) else "failed",
                train_rise=_mean(r[0] for r in rises.values()),
                validation_rise=_mean(r[1] for r in rises.values()),
                decades={b: _mean(g[b] for g in gained.values()) for b in BOUNDS},
                own_decades={b: _mean(g[b] for g in own.values()) for b in BOUNDS} if len(own) == len(free) else None,
            )
        )
    held = [s for s in settings if s.verdict == "held"]
    tightest = {b: max(held, key=lambda s: (s.decades or {})[b], default=None) for b in BOUNDS}
    return Reading(
        settings=tuple(settings),
        tightest=tightest,
        decades={b: max(0.0, (t.decades or {})[b]) if (t := tightest[b]) else 0.0 for b in BOUNDS},
        own_decades={b: max([0.0, *((s.own_decades or {b: 0.0})[b] for s in held)]) for b in BOUNDS},
        per_seed={b: tuple(alone[seed][b] for seed in sorted(free)) for b in BOUNDS},
        seeds=tuple(sorted(free)),
        unconstrained={b: _mean(base[seed][b] for seed in free) for b in BOUNDS},
        train_error=_mean(run.train_error for run in free.values()),
        validation_error=_mean(run.validation_error for run in free.values()),
        slack=_mean(capacity_slack(_motion(run), fit=1 - run.train_error) for run in free.values()),
        slack_decades=_mean(slack_decades(_motion(run)) for run in free.values()),
    )


def rise(run: Run, free: Run) -> tuple[float, float]:
    """Training and validation error of a run minus those of the unconstrained one; ours."""
    return run.train_error - free.train_error, run.validation_error - free.validation_error


def _motion(run: Run) -> list[LayerMotion]:
    trained = [s for s in run.layers if s.distance > 0]
    return [LayerMotion(norm_start=s.norm_start, norm_end=s.norm, distance=s.distance, radius=s.radius) for s in trained]


def _minus(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: first[name] - second[name] for name in first}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
