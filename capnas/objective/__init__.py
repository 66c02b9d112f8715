"""The objective of a search: one trial in stages, cheapest first, for any study, sampler, storage and pruner of Optuna.

Cost on the meta device (milliseconds), structure of the untrained network (about a second), short training with its saturation,
scores. Whatever happens, one user attribute of the trial (`capnas.objective.evaluation.ATTRIBUTE`) tells it all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import optuna
from torch import Tensor, nn

from capnas.candidates import Candidate, Infeasible, build_candidate, build_model
from capnas.data import load_data
from capnas.devices import is_out_of_memory, resolve_device
from capnas.errors import StudyError, UsageError, check_type, described, one_line
from capnas.graph.structure import structure
from capnas.latency import latencies
from capnas.layers import has_block
from capnas.measures.borders import unusable
from capnas.objective import targets
from capnas.objective.callbacks import EpochCallback, unwrapped
from capnas.objective.claims import claimed
from capnas.objective.evaluation import LOOKED, Evaluation, checked, fingerprint, recipe, timed
from capnas.objective.gates import UNTRAINED, Bound, best_share, parse_gate
from capnas.objective.history import VALUED, find_twin, ignores_pruned, take_over, worst_values
from capnas.objective.pool import GATE, MEASURED, Selection, check_pool
from capnas.objective.stopping import MedianRule, judging
from capnas.objective.targets import INIT, LATENCY, TOLD
from capnas.profile import enrich, profile_model
from capnas.scoring import COSTS, PROFILED, SIZES, measures_for, score, sizes
from capnas.size_survey import are_sizes
from capnas.spaces import load_space, space_name
from capnas.training import TrainConfig, TrainingResult, train
from capnas.weights import InitialWeights

_FEASIBLE = (*VALUED, "over_budget", MEASURED, "stopped")  # of the constraint "valid"; a budget and a share have their own constraints
_TURN = threading.RLock()  # torch has one random state a process: threads (n_jobs) take turns, or no seed would hold


class _Ended(Exception):
    """A trial that ends before its training, with this status and reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Objective:
    """Callable for ``study.optimize``: samples, builds, trains and scores one candidate.

    Args:
        space: a search space, or what `capnas.load_space` takes.
        data: what `capnas.load_data` takes.
        values: what to optimize, one value each, see `capnas.objective.targets`; ``"combined"`` is accuracy less losses plus scores.
        weights: of the losses and scores in ``combined``; defaults in `capnas.objective.targets.WEIGHTS`, see ``objective.weights``.
        epochs: of the short training.
        max_params: most parameters, or None.
        max_macs: most multiply-accumulates of one image, or None.
        max_latency: most milliseconds of one image, see `capnas.latency`, or None. Measured on ``device`` before the training.
        gate: which candidates are trained, judged by the untrained network; all if None. ``"best:10%"`` trains a candidate whose score is
            in the best tenth of those seen so far, ``"combined:best:10%"`` goes by the terms of that sum that are known before training,
            ``"log2_macs:best:10%"`` by size alone, for which nothing has to be measured; ``"saturation_evenness>=0.5"`` is a bound. See
            `capnas.objective.gates`. With a share, ``study.optimize`` counts every candidate, trained or not, `capnas.run_study` only
            the trained ones.
        pool: how many candidates are measured before the first training; the best of them are trained first. Needs a gate ``best``.
        resolutions: image sizes to search over, as the parameter ``image_size``. If a size leaves more than half of an architecture's
            layers past the receptive-field border and a larger one does not, the trial ends as "infeasible".
        blocks: regular expression of the units that are read as blocks, see `capnas.layers.find_blocks`. An architecture without such a
            unit ends as "infeasible".
        seed: of weights, shuffling and augmentation, the same for every candidate: with common random numbers, differences between
            candidates are less noisy than with a seed for each. Threads (``n_jobs``) take turns; processes run side by side.
        device: see `capnas.training.TrainConfig`.
        train: the training, as a `capnas.TrainConfig` or its fields by name; epochs, blocks, seed and device only where these are None.
        trainer: what trains a candidate in place, for recipes of your own; `capnas.training.train` where None. It is called as that is,
            with the model, the images, the `capnas.TrainConfig`, ``image_size`` and ``on_epoch``, and gives a
            `capnas.training.TrainingResult`: see ``examples/own_training.py``. Finals are trained by it as well. Sums and finals leave out
            losses that its curve does not tell. Twins are told by its name, of a `functools.partial` with what it fixes: give one that
            trains otherwise another name.
        stopping: the rule that stops hopeless trainings when there are several values (Optuna's pruners work with one only), or None.
        probe_images: size of the batch for the structure before training.
        initializations: draws of the untrained network's weights over which its saturations are means, see `capnas.profile_model`.
        reuse: whether an architecture that the study has trained before gets that result instead of a training. False trains every draw,
            for spaces that draw what the graph does not show, such as initial weights (a pool still counts equal graphs as one).

    Attributes:
        names: value names in order.
        directions: ``"maximize"`` or ``"minimize"`` for each: what ``optuna.create_study(directions=...)`` needs.
        on_epoch: None, or what is called after each epoch with the trial's number, the epoch and its row of the curve; errors of it pass.

    Raises:
        UsageError: an argument that cannot be used; the text says which and why.

    A candidate over a limit, unbuildable, gated or untrainable is pruned with a violated constraint, which TPE learns from.
    Samplers that ignore pruned trials (NSGA-II, NSGA-III, GP, CMA-ES) get the worst finite values instead, again with a violated
    constraint, so that no such trial counts as best.

    ``capnas.Evaluation.of(trial)`` reads what came of a trial; plots and dashboards find ``capnas:status``, ``capnas:accuracy``,
    ``capnas:params``, ``capnas:macs`` and, where it was measured, ``capnas:latency`` in its ``user_attrs``.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
        >>> objective = Objective("vgg", (images, np.arange(60) % 2), values=("accuracy", "macs"), max_macs=1, device="cpu")
        >>> objective.directions
        ['maximize', 'minimize']
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(directions=objective.directions)
        >>> study.optimize(objective, n_trials=1)
        >>> Evaluation.of(study.trials[0]).status
        'over_budget'
    """

    def __init__(
        self,
        space: Any,
        data: Any,
        *,
        values: str | Sequence[str] = ("combined",),
        weights: Mapping[str, float] | None = None,
        epochs: int | None = None,
        max_params: int | None = None,
        max_macs: int | None = None,
        max_latency: float | None = None,
        gate: str | Mapping[str, float] | None = None,
        pool: int | None = None,
        resolutions: Sequence[int] | None = None,
        blocks: str | None = None,
        seed: int | None = None,
        device: str | None = None,
        train: TrainConfig | Mapping[str, Any] | None = None,
        trainer: Callable[..., TrainingResult] | None = None,
        stopping: MedianRule | None = MedianRule(),  # noqa: B008
        probe_images: int = LOOKED["probe_images"],
        initializations: int = LOOKED["initializations"],
        reuse: bool = True,
    ) -> None:
        counts = (("probe_images", probe_images), ("initializations", initializations))
        limits = {"params": max_params, "macs": max_macs, LATENCY: max_latency}
        numbers = [(f"max_{name}", limit, Real) for name, limit in limits.items()] + [(name, given, Integral) for name, given in counts]
        for name, given, kind in numbers:
            if given is not None and not (isinstance(given, kind) and 0 < given < math.inf):
                finite = " and finite" * (given == math.inf)
                raise UsageError(f"{name} must be {'a whole number ' * (kind is Integral)}above 0{finite}, got {given!r}.")
        if resolutions is not None and not are_sizes(resolutions):
            raise UsageError(f"resolutions must be different sizes in pixels, got {resolutions!r}.")
        if stopping is not None and not hasattr(stopping, "verdict"):
            raise UsageError(f"stopping must be a rule such as MedianRule(), or None, got {stopping!r}.")
        check_type("reuse", reuse, bool)
        if trainer is not None and not callable(trainer):
            raise UsageError(f"trainer must be a function that trains a model, or None, got {trainer!r}.")
        self.names = targets.check_values(values)
        self.directions = [targets.direction_of(name) for name in self.names]
        share = best_share(gates := parse_gate(gate))
        check_pool(pool, share)
        self.bounds = [g for g in gates if isinstance(g, Bound)]
        self.weights = targets.check_weights(weights, self.names, share)
        ranked = targets.ranking(share, self.names, self.weights)
        needed = targets.wanted(self.names, self.weights)
        early = {n.removeprefix(INIT) for n in (*needed, *ranked) if n.startswith(INIT)} | {g.name for g in self.bounds}
        self._pixels = {"before": "coverage" in early, "after": "coverage" in needed}
        self.measures = {"before": measures_for(early), "after": measures_for(needed)}
        self._slack = "capacity_slack" in needed
        self.limits = {name: limit for name, limit in limits.items() if limit is not None}
        self.times = LATENCY in {*self.limits, *ranked, *targets.terms(self.names, self.weights)}
        self.resolutions = None if resolutions is None else tuple(map(int, resolutions))
        self.stopping, self.trainer = stopping, trainer
        self.probe_images, self.initializations, self.reuse = probe_images, int(initializations), reuse
        self.on_epoch: EpochCallback | None = None
        self.train = recipe(train, epochs=epochs, blocks=blocks, seed=seed, device=device)
        if unread := sorted(name for name in needed if not name.startswith(INIT) and not self.train.record):
            raise UsageError(f"{unread[0]} is measured during the training, and record=False switches that off: leave record on.")
        resolve_device(self.train.device)
        self.space: Callable[..., Any] = load_space(space)
        self.data = load_data(data)
        self.settings = fingerprint(self.train, self.data, trainer, **dict(counts))
        # a share by size alone needs no look at the network, unless bounds come first that do
        self._by_size = share is not None and not self.bounds and ranked.keys() <= {*COSTS, *(INIT + name for name in SIZES)}
        costs = tuple(n for n in self.names if n in COSTS or (n == LATENCY and not self._by_size)) if len(self.names) > 1 else ()
        chosen: dict[str, Any] = {"pool": pool or 0, "costs": costs, "settings": self.settings, "weights": ranked}
        self.selection = None if share is None else Selection(gate=share, **chosen)

    def __repr__(self) -> str:
        limits = "".join(f", max_{name}={limit}" for name, limit in self.limits.items())
        return f"Objective({space_name(self.space)!r}, {self.data.name!r}, values={self.names}{limits})"

    def __call__(self, trial: Any) -> float | tuple[float, ...]:
        """Evaluate one trial.

        Raises:
            optuna.TrialPruned: the candidate gives no value; the reason is the text and is stored.
            StudyError: the study's directions are not the objective's, or its sampler cannot be used.
            SpaceError: the space breaks its protocol.
        """
        self._check_directions(trial)
        found: dict[str, Any] = {"metrics": {}, "seconds": {}, "seed": self.train.seed, "settings": self.settings}
        with claimed(trial), _TURN, unwrapped():
            try:
                status, reason = self.stages(trial, found)
            except optuna.TrialPruned as error:  # of a trainer or a callback, as Optuna's own objectives raise it
                status, reason = "stopped", one_line(error, 500) or "TrialPruned"
            except BaseException as error:
                if not is_out_of_memory(error):
                    self._store(trial, found, "failed" if isinstance(error, Exception) else "interrupted", described(error, 500))
                    raise
                status, reason = "out_of_memory", one_line(error, 500) or type(error).__name__
            return self._settle(trial, found, status, reason)

    def stages(self, trial: Any, found: dict[str, Any]) -> tuple[str, str]:
        """All that happens between a draw and its values; what a subclass replaces that looks results up instead of training.

        Args:
            trial: asked for the decisions.
            found: fields of an `Evaluation`, filled in stage by stage: ``metrics``, ``seconds``, ``seed`` and ``settings`` are there.

        Returns:
            The status and the reason of the `Evaluation`.
        """
        try:
            candidate = self._cost(trial, found)
            model, batch = self._structure(trial, found, candidate)
        except _Ended as end:
            return end.status, end.reason
        except Infeasible as error:  # of shapes, or what shapes alone do not tell
            return "infeasible", str(error)
        return self._training(trial, found, candidate, model, batch)

    def _cost(self, trial: Any, found: dict[str, Any]) -> Candidate:
        """The first stage, on the meta device: what a candidate costs, and whether it is worth a look."""
        metrics = found["metrics"]
        with timed(found, "cost"):
            shape = self.shape(trial)
            found["image_size"] = shape["image_size"]
            candidate = build_candidate(self.space, trial, **shape)
            found |= {"hash": candidate.hash, "n_params": candidate.n_params, "macs": candidate.macs}
            metrics |= {"params": candidate.n_params, "macs": candidate.macs}
            over = [f"{metrics[n]:,} {n} are over the limit of {most:,.0f}" for n, most in self.limits.items() if metrics.get(n, 0) > most]
            if over:
                raise _Ended("over_budget", "; ".join(over))
            self._check_use(candidate)
            asked: dict[str, Any] = {"weights": self.weights, "epochs": self.train.epochs, "limits": self.limits}
            if self.reuse and (twin := find_twin(trial, found, names=self.names, **asked)) is not None:
                raise _Ended(*take_over(found, *twin))
            if self._by_size:
                metrics |= {INIT + name: value for name, value in sizes(metrics).items()}
                self._select(trial, found)
        return candidate

    def _structure(self, trial: Any, found: dict[str, Any], candidate: Candidate) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The second stage: latency and scores of the untrained network; it, and the batch that it was measured on."""
        metrics, device, seed = found["metrics"], resolve_device(self.train.device), self.train.seed
        with timed(found, "structure"):
            model = build_model(self.space, candidate.params, **candidate.shape, seed=seed).to(device)
            x, y = self.data.probe(self.probe_images, seed=seed, device=device, image_size=candidate.image_size)
            if self.times:
                metrics[LATENCY] = latencies([model], x[:1])[0]
                if metrics[LATENCY] > (limit := self.limits.get(LATENCY, math.inf)):
                    raise _Ended("over_budget", f"its latency of {metrics[LATENCY]:.4g} ms is over the limit of {limit:g}")
            found["profile"] = profile_model(
                model, x, y, measures=self.measures["before"], mode="train", threshold=self.train.threshold, blocks=self.train.blocks,
                initialize=self.initializations, graph=candidate.trace, pixels=self._pixels["before"], exact_capacity=False, seed=seed,
            )  # fmt: skip
            scores = score(found["profile"], UNTRAINED)
            metrics |= {INIT + name: value for name, value in scores.items()}
        if refusals := [text for gate in self.bounds if (text := gate.refusal(scores)) is not None]:
            raise _Ended("gated", "; ".join(refusals))
        if not self._by_size:
            self._select(trial, found)
        return model, (x, y)

    def _training(
        self, trial: Any, found: dict[str, Any], candidate: Candidate, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[str, str]:
        """The last two stages: a short training, and the scores of what came out."""
        metrics = found["metrics"]
        start = InitialWeights.of(model) if self._slack else None
        with timed(found, "training"):
            judge = judging(
                trial, found, names=self.names, weights=self.weights, epochs=self.train.epochs, rule=self.stopping, on_epoch=self.on_epoch
            )
            result = checked((self.trainer or train)(model, self.data, self.train, image_size=found["image_size"], on_epoch=judge))
        found["curve"] = result.curve
        if result.curve:
            metrics |= {name: result.curve[-1][name] for name in TOLD if name in result.curve[-1]}
        if (profile := result.profile) is not None:
            if result.status == "complete" and (self.measures["after"] != ("saturation",) or start is not None):
                with timed(found, "capacity"):
                    profile = enrich(
                        profile, model, *batch, measures=self.measures["after"], graph=candidate.trace, start=start,
                        pixels=self._pixels["after"], exact_capacity=False, seed=self.train.seed,
                    )  # fmt: skip
            found["profile"] = profile
            metrics |= score(profile, PROFILED)
        elif not self.train.record or result.status == "complete":
            found["profile"] = None  # that of the untrained network would pass for one of a training
        profiled = self.trainer is None or profile is not None  # capnas's own training gives none of a network without layers
        if result.status == "complete" and (why := targets.why_no_value(self.names, metrics, self.weights, profiled=profiled)):
            return "diverged", why
        return result.status, result.reason

    def _select(self, trial: Any, found: dict[str, Any]) -> None:
        """Ends a trial that the gate's share leaves out, where there is such a gate."""
        if self.selection is not None and (place := self.selection.judge(trial, found)) is not None:
            raise _Ended(MEASURED, place)

    def shape(self, trial: Any) -> dict[str, int]:
        """The sizes that the space takes; that of the images is a decision of the trial where there are several."""
        sizes = self.resolutions
        return self.data.shape(None if sizes is None else trial.suggest_categorical("image_size", list(sizes)))

    def _check_use(self, candidate: Candidate) -> None:
        """Ends the trial of an architecture without blocks of the name asked for, or that idles at its size but not at a larger one."""
        if not has_block(self.train.blocks, candidate.trace.modules[1:]):
            raise Infeasible(f"no module that runs full-matches the block pattern {self.train.blocks!r}")
        larger = [size for size in self.resolutions or () if size > candidate.image_size]
        fields = structure(candidate.trace).fields if larger else ()
        if any(unusable(fields, size) is None for size in larger) and (useless := unusable(fields, candidate.image_size)) is not None:
            raise Infeasible(useless)

    def _settle(self, trial: Any, found: dict[str, Any], status: str, reason: str) -> float | tuple[float, ...]:
        """Constraints first, then the attribute, then the values or the end: Optuna accepts neither after a trial ended."""
        blind, valued = ignores_pruned(trial), status in VALUED
        valid = status in _FEASIBLE and not (blind and status == "stopped")
        constraints = {n: found["metrics"].get(n, most) / most - 1 for n, most in self.limits.items()} | {"valid": -1.0 if valid else 1.0}
        if self.selection is not None:
            constraints |= {GATE: self.selection.violation(status, found.get("standing"))}
        for name in sorted(constraints.keys() - trial.constraints.keys()):  # a finished trial that is evaluated again keeps its own
            trial.set_constraint(name, constraints[name])
        if valued:
            found["values"] = {name: targets.value_of(name, found["metrics"], self.weights) for name in self.names}
        self._store(trial, found, status, reason)
        if self.selection is not None and isinstance(trial, optuna.Trial):
            self.selection.queue_next(trial.study)
        if not valued and not blind:
            raise optuna.TrialPruned(f"{status}: {reason}")
        given = found["values"] if valued else worst_values(trial, found["metrics"], names=self.names, limits=self.limits)
        return tuple(given.values()) if len(given) > 1 else next(iter(given.values()))

    def _store(self, trial: Any, found: Mapping[str, Any], status: str, reason: str) -> None:
        Evaluation(status=status, reason=reason, params=dict(trial.params), **found).write(trial.set_user_attr)

    def _check_directions(self, trial: Any) -> None:
        if isinstance(trial, optuna.Trial) and (given := [d.name.lower() for d in trial.study.directions]) != self.directions:
            raise StudyError(
                f"the study's directions are {given}, the objective's values {', '.join(self.names)} need {self.directions}: "
                "create the study with optuna.create_study(directions=objective.directions)."
            )
