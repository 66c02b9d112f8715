"""What a search optimizes: the value names with their directions, and the combined value.

Values are ``accuracy`` (on validation), ``val_loss``, ``train_loss`` (mean over the last epoch, as it trained), ``params``, ``macs``,
``latency`` (milliseconds of one image, see `capnas.latency`), every name of `capnas.scoring.SCORES`, the same with the prefix ``init_`` for
the structure before training, ``combined`` and ``principled``. The latter is the idea that capnas is built on: accuracy after a short
training with one capacity-allocation, one saturation and one excess-capacity score; ``principled-pareto`` stands for five values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from capnas.documents import or_nan
from capnas.errors import UsageError, check_name, check_names
from capnas.objective.gates import SUMS, UNTRAINED, BestShare
from capnas.scoring import COSTS, PROFILED, SCORES, Direction

INIT = "init_"
# Calibrated on short trainings, see results/ranking/combined.md and results/search/losses.md: an accuracy counts right answers of few
# images, where the losses weigh each answer and that of the training is of many more; and a short training undervalues size and what it
# can do with it.
WEIGHTS: Mapping[str, float] = {"train_loss": 1.0, "val_loss": 1.0, "init_log2_macs": 0.04, "init_capacity_score": 0.04}
_SCORES = (*PROFILED, *(INIT + name for name in UNTRAINED))
# One score of each theory, chosen and weighted on short trainings of two spaces, see results/ranking/principled.md.
PRINCIPLED: Mapping[str, float] = {"init_block_saturation_evenness": 0.05, "depth_evenness": 0.02, "capacity_slack": 0.02}
PARETO = ("accuracy", "depth_evenness", "saturation_evenness", "capacity_slack", "macs")
LOSSES = ("val_loss", "train_loss")
TOLD = ("accuracy", *LOSSES)  # what a training tells of itself
LEARNED = (*TOLD, *SUMS)  # values that a training tells, and that a longer one tells better
LATENCY = "latency"  # a cost of candidates that are looked at
_PLAIN = (*LOSSES, *COSTS, LATENCY)  # what is no score
NAMES = ("accuracy", *_PLAIN, *SUMS, *_SCORES)
_WORST = {"accuracy": 0.0, "combined": -10.0, "principled": 0.0, "params": 1e9, "macs": 1e11, LATENCY: 1e4} | dict.fromkeys(LOSSES, 100.0)
_FAR = 1e3  # stands for the worst of an unbounded score until one has been seen


def check_values(values: str | Sequence[str]) -> tuple[str, ...]:
    """The value names as a tuple.

    Raises:
        UsageError: None at all, one twice, or an unknown one.

    Example:
        >>> check_values("accuracy,macs"), check_values(["combined"])
        (('accuracy', 'macs'), ('combined',))
        >>> check_values("principled-pareto")[1:3]
        ('depth_evenness', 'saturation_evenness')
    """
    if not isinstance(values, str | Iterable):
        raise UsageError(f"values must be one or more different names, got {values!r}.")
    names = tuple(n.strip() for n in values.split(",")) if isinstance(values, str) else tuple(values)
    if names == ("principled-pareto",):
        return PARETO
    if not names or len(set(names)) < len(names):
        raise UsageError(f"values must be one or more different names, got {names}.")
    if "principled-pareto" in names:
        raise UsageError(f"principled-pareto is given alone: it stands for {', '.join(PARETO)}; got {', '.join(names)}.")
    check_names("values", names, (*NAMES, "principled-pareto"))
    if set(SUMS) <= set(names):
        raise UsageError("values may hold combined or principled, not both: they are sums of the same kind with one set of weights.")
    return names


def summed(names: Sequence[str], share: BestShare | None = None) -> set[str]:
    """The sums among the values and what a gate goes by.

    >>> summed(("accuracy", "macs"), BestShare(name="combined", share=0.1))
    {'combined'}
    """
    return {*SUMS} & {*names, *(() if share is None else (share.name,))}


def check_weights(
    weights: Mapping[str, float] | None, names: Sequence[str] = ("combined",), share: BestShare | None = None
) -> dict[str, float]:
    """The weights of the sum among the values or in the gate, see `summed`: given ones, else `PRINCIPLED` or `WEIGHTS`.

    Raises:
        UsageError: an unknown score, loss or cost, a weight that is not finite, or weights where nothing is a sum.
    """
    if not isinstance(weights, Mapping | None):
        raise UsageError(f"weights must be numbers by name, such as {{'tail_fraction': 0.1}}, got {weights!r}.")
    for name, weight in (weights or {}).items():
        check_name("weights", name, (*_PLAIN, *_SCORES))
        if not isinstance(weight, Real) or not math.isfinite(weight):
            raise UsageError(f"the weight of {name} must be a finite number, got {weight!r}.")
    sums = summed(names, share)
    if weights is not None and not sums:
        raise UsageError(f"weights are of the terms of {' or '.join(SUMS)}, and the search has neither: its values are {', '.join(names)}.")
    if weights is not None:
        return dict(weights)
    return dict(PRINCIPLED if "principled" in sums else WEIGHTS)


def terms(names: Sequence[str], weights: Mapping[str, float]) -> set[str]:
    """The values and, where one of them is a sum, its terms.

    >>> sorted(terms(("combined", "latency"), {"macs": 1e-9})), sorted(terms(("accuracy",), {}))
    (['combined', 'latency', 'macs'], ['accuracy'])
    """
    return {*names, *(weights if summed(names) else ())}


def wanted(names: Sequence[str], weights: Mapping[str, float]) -> set[str]:
    """Every score name that the values need, given the weights of a sum.

    >>> sorted(wanted(("combined", "macs"), {"init_naswot": 0.1}))
    ['init_naswot']
    """
    return terms(names, weights) & set(_SCORES)


def is_known_before(name: str) -> bool:
    """Whether a value or a term of a sum is known before a training: a cost, or a score of the untrained network.

    >>> [is_known_before(name) for name in ("macs", "latency", "init_rank_mean", "rank_mean", "accuracy")]
    [True, True, True, False, False]
    """
    return name.startswith(INIT) or name in (*COSTS, LATENCY)


def known_before(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of those terms of a sum that are known before a training.

    >>> known_before(WEIGHTS)
    {'init_log2_macs': 0.04, 'init_capacity_score': 0.04}
    """
    return {name: weight for name, weight in weights.items() if is_known_before(name)}


def costs_before(names: Sequence[str], metrics: Mapping[str, float | None]) -> tuple[float, ...]:
    """The values that are known before a training, turned so that lower is better; NaN for one that is missing.

    >>> costs_before(("accuracy", "macs", "init_rank_mean"), {"accuracy": 0.9, "macs": 8, "init_rank_mean": 0.5})
    (8.0, -0.5)
    """
    known = [(name, or_nan(metrics.get(name))) for name in names if is_known_before(name)]
    return tuple(value if direction_of(name) == "minimize" else -value for name, value in known)


def ranking(share: BestShare | None, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that a share goes by: 1 for one score, for a sum those of its terms that are known before training.

    Args:
        share: the gate; nothing goes by anything without one.
        names: values of the search.
        weights: of the sum that the gate names.

    Raises:
        UsageError: a sum that knows nothing before training, or another one than among the values.

    Example:
        >>> ranking(BestShare(name="combined", share=0.1), ("accuracy",), {"init_naswot": 0.1, "rank_mean": 1.0, "macs": 1e-9})
        {'init_naswot': 0.1, 'macs': 1e-09}
    """
    if share is None:
        return {}
    if share.name not in SUMS:
        return {INIT + share.name: 1.0}
    if others := summed(names) - {share.name}:
        raise UsageError(f"the gate {share.name}:best and the value {others.pop()} are different sums: name the same one.")
    if not (known := known_before(weights)):
        raise UsageError(f"the gate {share.name}:best needs a weight of a score before training, named {INIT}..., or of a cost.")
    return known


def direction_of(name: str) -> Direction:
    """``"maximize"`` or ``"minimize"``.

    >>> direction_of("macs"), direction_of("tail_fraction"), direction_of("combined")
    ('minimize', 'minimize', 'maximize')
    """
    if name in ("accuracy", *SUMS):
        return "maximize"
    return "minimize" if name in _PLAIN else SCORES[name.removeprefix(INIT)].direction


def value_of(name: str, metrics: Mapping[str, float | None], weights: Mapping[str, float]) -> float:
    """One objective value from a trial's metrics; NaN where a metric is missing.

    ``combined`` and ``principled`` are the accuracy plus the weighted scores, losses and costs, each oriented so that higher is better
    (what is to be minimized counts negatively). Losses that nobody stored, as of a table of accuracies, are left out.

    >>> value_of("combined", {"accuracy": 0.9, "tail_fraction": 0.5}, {"tail_fraction": 0.1})
    0.85
    >>> value_of("combined", {"accuracy": 0.75, "macs": 2_000_000}, {"macs": 0.125e-6})
    0.5
    """
    if name not in SUMS:
        return or_nan(metrics.get(name))
    known = {term: weight for term, weight in weights.items() if term not in LOSSES or term in metrics}
    return or_nan(metrics.get("accuracy")) + weighted(metrics, known)


def why_no_value(names: Sequence[str], metrics: Mapping[str, float | None], weights: Mapping[str, float], *, profiled: bool) -> str:
    """Why a training that came to its end gives no value of some of the names, in words; "" where it gives all.

    Args:
        names: of the values.
        metrics: of the trial.
        weights: of a sum among the values.
        profiled: whether the training gave a profile, as far as it could.

    >>> why_no_value(("accuracy", "rank_mean"), {"accuracy": 0.5}, {}, profiled=True)
    'rank_mean came out not finite'
    >>> why_no_value(("rank_mean",), {"accuracy": 0.5}, {}, profiled=False).partition(":")[0]
    'the training told nothing of rank_mean'
    """
    missing = [name for name in names if not math.isfinite(value_of(name, metrics, weights))]
    needed = terms(missing, weights) - metrics.keys()
    if untold := sorted(needed & {*LOSSES, *(() if profiled else PROFILED)}):
        how = "scores are measured on the profile of its TrainingResult, losses are in its curve"
        return f"the training told nothing of {', '.join(untold)}: {how}"
    return f"{', '.join(missing)} came out not finite" if missing else ""


def weighted(metrics: Mapping[str, float | None], weights: Mapping[str, float]) -> float:
    """The sum of scores and costs, each oriented so that higher is better; NaN where one is missing.

    >>> weighted({"rank_mean": 0.5, "tail_fraction": 0.25}, {"rank_mean": 1.0, "tail_fraction": 2.0})
    0.0
    """
    return sum((w if direction_of(s) == "maximize" else -w) * or_nan(metrics.get(s)) for s, w in weights.items())


def worst_value(name: str, seen: Sequence[float], *, limit: float | None = None) -> float:
    """A bad but finite value for a trial without one: the worst seen in the study, or before any twice the limit or a bad one.

    It stays near to what the others get, since samplers and plots scale by it.

    >>> worst_value("accuracy", [0.5, 0.7]), worst_value("accuracy", []), worst_value("macs", [], limit=30_000)
    (0.5, 0.0, 60000.0)
    """
    finite = [v for v in seen if math.isfinite(v)]
    if finite:
        return min(finite) if direction_of(name) == "maximize" else max(finite)
    if limit is not None:
        return 2.0 * limit
    if name in _WORST:
        return _WORST[name]
    score = SCORES[name.removeprefix(INIT)]
    return max(score.low, -_FAR) if score.direction == "maximize" else min(score.high, _FAR)
