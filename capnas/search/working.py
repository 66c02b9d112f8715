"""What one process does for a study: trials one after the other, until there are enough or too many of them fail."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from capnas.candidates import Infeasible, build_candidate
from capnas.errors import CapnasError, SpaceError, StudyError, UsageError
from capnas.layers import has_block
from capnas.objective import Objective
from capnas.objective.claims import claimed, local, sweep
from capnas.objective.evaluation import Evaluation, stored_with
from capnas.objective.pool import superseded
from capnas.objective.stopping import MedianRule
from capnas.search.config import StudyConfig
from capnas.search.enqueuing import unasked
from capnas.search.opening import check_architectures, check_data, check_device, check_settings
from capnas.search.runs import is_finished, is_settled
from capnas.search.samplers import first_judged, make_sampler
from capnas.search.signals import whole
from capnas.testing import draw

MAX_FAILURES = 3  # errors in a row, not merely bad candidates, after which a study gives up
POLL = 0.3  # seconds between two looks at what others do
_DRAWS = 16  # candidates to look at before a search is refused for all of them

TrialCallback = Callable[[optuna.Study, FrozenTrial], None]


def make_objective(config: StudyConfig, space: Any = None, data: Any = None) -> Objective:
    """The objective of a study; the space and the images are loaded by their names in its settings, unless they are given."""
    return Objective(
        config.space if space is None else space,
        config.images() if data is None else data,
        values=config.values,
        weights=config.weights,
        max_params=config.max_params,
        max_macs=config.max_macs,
        max_latency=config.max_latency,
        gate=config.gate,
        pool=config.pool,
        resolutions=config.resolutions,
        seed=config.seed,
        device=config.device,
        train=config.training(),
        reuse=config.reuse,
        stopping=None if config.pruner == "off" else MedianRule(warmup_epochs=first_judged(config.epochs) - 1),
    )


def work(
    study: optuna.Study,
    config: StudyConfig,
    objective: Objective,
    *,
    parallel: bool,
    on_trial: TrialCallback | None,
    on_start: Callable[[], None] | None = None,
    before: Collection[int] | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Run trials one after the other until the study is finished, or the time of its settings is up.

    Args:
        study: from `capnas.search.opening.open_study`.
        config: its settings.
        objective: see `make_objective`.
        parallel: whether other workers may be at work.
        on_trial: called with the study and each trial that ends.
        on_start: called before the first trial, after all that could refuse it.
        before: numbers of the trials that ended before the session, whose failures do not count; those ended by now where None.
        go_on: asked before each trial.

    Returns:
        How many trials it ran.

    Raises:
        StudyError: the images, the space or the device of its latencies have changed, or `MAX_FAILURES` trials in a row, of whichever
            worker, ended in an error.
        SpaceError, UsageError: see `check_candidates`.
    """

    def sampler(*draws: int) -> BaseSampler:
        pool = config.pool or 0
        return make_sampler(config.sampler, seed=config.seed, draws=draws, trials=config.trials, pool=pool, parallel=parallel)

    ran, own, error = 0, int.from_bytes(os.urandom(4), "big"), None
    before = ended(study) if before is None else before
    end = time.monotonic() + (math.inf if config.timeout is None else config.timeout)
    while go_on() and time.monotonic() < end:
        sweep(study, stale_after=config.stale_after)
        trials = study.get_trials(deepcopy=False)
        if len(failed := failures_in_a_row(trials, before)) >= MAX_FAILURES:
            raise StudyError(
                f"{len(failed)} trials in a row ended in an error, the last: {_reason(failed[-1])}. They count as finished and are not run "
                "again: once the cause is fixed, ask for that many more --trials, or start afresh with another --study."
            ) from error
        finished = sum(map(is_finished, trials))
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if finished >= config.trials:
            break
        if finished + len(running) >= config.trials:
            if not any(map(local, running)):
                break  # the workers of other hosts see to the rest
            time.sleep(POLL)
            continue
        if ran == 0:
            check_unchanged(study, config, objective)
            check_device(study, objective)
            check_candidates(objective, seed=config.seed)
        settled = sum(map(is_settled, trials))
        study.sampler = sampler(settled, own, ran) if parallel else sampler(settled)
        if objective.selection is not None:
            objective.selection.check(study)
            objective.selection.queue_next(study)
        if ran == 0 and on_start is not None:
            on_start()
        try:
            number, error = _one(study, objective, config.trials, sampler if parallel else None)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                sweep(study, stale_after=config.stale_after)  # its trial ends with what it has stored, wherever a signal fell
            raise
        trial = study.get_trials(deepcopy=False)[number]
        if names := unasked(trial):
            warnings.warn(f"trial {number} was enqueued with {', '.join(names)}, which the space does not ask for.", stacklevel=2)
        if on_trial is not None:
            on_trial(study, trial)
        if error is not None and (isinstance(error, CapnasError) or stored_with(trial).get("status") == "interrupted"):
            raise error  # where it was interrupted, that of a callback
        ran += 1
    return ran


@contextlib.contextmanager
def stoppable(study: optuna.Study, go_on: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Take ``study.stop()`` for the wish to begin no further trial while the block runs; Optuna refuses it outside its own loop.

    Args:
        study: that callbacks and spaces see.
        go_on: what says otherwise whether to go on.

    Yields:
        Whether to go on.

    >>> study = optuna.create_study()
    >>> with stoppable(study, lambda: True) as go_on:
    ...     study.stop()
    ...     go_on()
    False
    """
    asked: list[bool] = []
    study.stop = functools.partial(asked.append, True)  # type: ignore[method-assign]
    try:
        yield lambda: go_on() and not asked
    finally:
        del study.stop  # that of this object; its class has one still


def check_unchanged(study: optuna.Study, config: StudyConfig, objective: Objective) -> None:
    """Refuse to go on with a study on other images, or with a space that builds other networks than it did.

    Raises:
        StudyError: the text says what has changed.
    """
    check_settings(study, config)
    check_data(study, objective)
    check_architectures(study, objective)


def check_candidates(objective: Objective, *, seed: int) -> None:
    """Build candidates at random until one can be searched, so that what no trial can mend is said before the first one.

    Raises:
        SpaceError: the space returns no model, or one of another output than the classes.
        UsageError: None of those that can be built calls a module of the name asked for as blocks.
    """
    pattern, shape = objective.train.blocks, objective.data.shape(max(objective.resolutions or [objective.data.image_size]))
    built: list[tuple[str, ...]] = []
    for place in range(_DRAWS):
        try:
            built.append(build_candidate(objective.space, draw("random", seed + place), **shape).trace.modules[1:])  # without the model
        except Infeasible:
            continue
        except SpaceError:
            raise
        except Exception:  # it counts as a failed trial, and other draws may do
            return
        if has_block(pattern, built[-1]):
            return
    if built:
        raise UsageError(
            f"no module that runs in {len(built)} candidates drawn at random full-matches the block pattern {pattern!r}; "
            f"names look like {', '.join(built[-1][:5])}."
        )


def check_entries(objective: Objective, entries: Iterable[Mapping[str, Any]], *, seed: int) -> None:
    """Build the architectures that a study is to begin with, so that one which cannot be meant is told before any trial.

    One that the space prunes, or that is an error in it, is left to its trial, as is a number out of its range, which Optuna takes.

    Args:
        objective: see `make_objective`; `check_candidates` has nothing against it.
        entries: parameters; what they leave out is drawn at random.
        seed: of these draws.

    Raises:
        UsageError: a value is none that its parameter can have.
    """
    for place, entry in enumerate(entries, 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna gives them again when the trial runs
                trial = draw("random", seed, entry)
                build_candidate(objective.space, trial, **objective.shape(trial))
        except (SpaceError, ValueError) as error:
            raise UsageError(f"entry {place} to enqueue, {str(entry)[:200]}, cannot be tried: {error}") from error
        except Exception:
            continue


def ended(study: optuna.Study) -> frozenset[int]:
    """Numbers of the trials that ended, however they did."""
    return frozenset(t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished())


def failures_in_a_row(trials: list[FrozenTrial], before: Collection[int]) -> list[FrozenTrial]:
    """The ended trials, but for those of the numbers `before`, after the last one that ended without an error of its own."""
    new = (t for t in trials if t.state.is_finished() and t.number not in before)
    own = [t for t in new if t.state != TrialState.FAIL or stored_with(t).get("status") != "interrupted"]
    return list(itertools.takewhile(lambda t: t.state == TrialState.FAIL, reversed(own)))[::-1]


def _reason(trial: FrozenTrial) -> str:
    return str(stored_with(trial).get("reason", "an error that left no text"))[:300]


def _one(
    study: optuna.Study, objective: Objective, limit: int, sampler: Callable[[int], BaseSampler] | None
) -> tuple[int, Exception | None]:
    """Run one trial; its number and the error that ended it, if one did. Optuna's own loop would log each with a traceback."""
    with contextlib.ExitStack() as claim:
        with whole():  # a trial that no process claims is left running when its own is gone
            trial = study.ask()
            claim.enter_context(claimed(trial))
        return trial.number, _ended(study, trial, objective, limit, sampler)


def _ended(
    study: optuna.Study, trial: optuna.Trial, objective: Objective, limit: int, sampler: Callable[[int], BaseSampler] | None
) -> Exception | None:
    """Bring a trial to its end, and tell the study of it; the error that ended it, if one did."""
    try:
        if sampler is not None:  # what is drawn without regard to other trials then depends on seed and number, not on who draws it
            study.sampler = sampler(trial.number)
        earlier = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
        if superseded(trial) or sum(is_finished(t) or t.state == TrialState.RUNNING for t in earlier) >= limit:
            lost = Evaluation(status="interrupted", reason="another worker drew this or the last trial first", params=trial.params)
            lost.write(trial.set_user_attr)
            study.tell(trial, state=TrialState.FAIL)
            return None
        values = objective(trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except Exception as error:
        study.tell(trial, state=TrialState.FAIL)
        return error
    else:
        study.tell(trial, values)
    return None
