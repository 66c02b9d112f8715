"""Run a study: one process or several, started, interrupted, killed and resumed, on any storage."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

import capnas.errors
from capnas.errors import CapnasError, StudyError
from capnas.objective import Objective
from capnas.objective.claims import local, sweep
from capnas.objective.evaluation import ATTRIBUTE as EVALUATION
from capnas.objective.evaluation import Evaluation
from capnas.objective.pool import superseded
from capnas.objective.stopping import MedianRule
from capnas.scoring import CAPACITY_WEIGHTS
from capnas.search.config import StudyConfig
from capnas.search.export import write_environment, write_trials
from capnas.search.runs import RunResult, is_finished, is_settled, open_run
from capnas.search.samplers import first_judged, make_pruner, make_sampler
from capnas.search.storages import open_storage
from capnas.spaces import load_space

__all__ = ["RunResult", "StudyConfig", "open_run", "run_study", "sweep", "worker"]

MAX_FAILURES = 3  # errors in a row, not merely bad candidates, after which a study gives up
ATTRIBUTE = "capnas:config"  # keys of the study's user attributes
SCORE = "capnas:capacity_score"  # the weights of its terms
_POLL = 0.3  # seconds

TrialCallback = Callable[[optuna.Study, FrozenTrial], None]


def run_study(config: StudyConfig, *, space: Any = None, data: Any = None, on_trial: TrialCallback | None = None) -> RunResult:
    """Run a study until it has ``config.trials`` finished trials, or resume one.

    The same call again resumes: finished trials are kept, those of killed processes are given up (`sweep`), and with one worker the
    trials are those that an uninterrupted study would have had. SIGINT (Ctrl-C) and SIGTERM abandon the running trials and return.

    Args:
        config: The study.
        space: The space itself, where ``config.space`` is only its name; needs one worker.
        data: The images themselves, where ``config.data`` is only their name; needs one worker.
        on_trial: Called with the study and each trial that ends, in this process.

    Returns:
        The run, also after a signal (``interrupted``) and when nothing was left to do (``finished_before == config.trials``).

    Raises:
        StudyError: The study exists with other settings (the text says which), its storage does not answer, or
            `MAX_FAILURES` trials in a row ended in an error.

    Example:
        >>> import tempfile, numpy as np
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> images = np.random.default_rng(0).integers(0, 256, (60, 16, 16), dtype=np.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = StudyConfig(space="vgg", data="noise", trials=2, max_macs=1, out=folder)
        ...     run_study(config, data=(images, np.arange(60) % 2)).n_finished
        2
    """
    if config.workers > 1 and not (space is None and data is None):
        raise StudyError("several workers load space and data by name: give names in the config, or use workers=1.")
    if space is None:
        load_space(config.space)  # its errors belong before anything is created
    folder, objective = config.folder, None
    if config.workers == 1 and not (folder / "study.toml").is_file():
        objective = _objective(config, space, data)  # those of the data as well
    folder.mkdir(parents=True, exist_ok=True)
    study = _open(config)
    before = _n_finished(study)
    (folder / "study.toml").write_text(config.to_toml(), encoding="utf-8")
    interrupted = False
    try:
        with _sigterm_interrupts():
            if before >= config.trials:
                pass
            elif config.workers == 1:
                _work(study, config, objective or _objective(config, space, data), parallel=False, on_trial=on_trial)
            else:
                _launch(study, config, on_trial)
    except KeyboardInterrupt:
        interrupted = True
    result = RunResult(folder=folder, config=config, study=study, finished_before=before, interrupted=interrupted)
    sweep(study, stale_after=config.stale_after)
    write_environment(folder / "environment.json", workers=config.workers, device=config.device)
    write_trials(folder / "trials.csv", study, config.values)
    return result


def worker(config: StudyConfig, *, device: str | None = None, on_trial: TrialCallback | None = None) -> int:
    """Run trials of a study beside other workers, on this or another machine, until it has ``config.trials`` finished trials.

    Args:
        config: That of the study; on another machine its ``storage`` must be one that both reach.
        device: Instead of ``config.device``.
        on_trial: Called with the study and each trial that ends.

    Returns:
        How many trials it ran.

    Raises:
        StudyError: See `run_study`.
    """
    config = replace(config, device=device or config.device)
    with _sigterm_interrupts():
        return _work(_open(config), config, _objective(config), parallel=True, on_trial=on_trial)


def _open(config: StudyConfig) -> optuna.Study:
    """The study, created or resumed; refused where it was asked for with other settings."""
    storage = open_storage(config.storage, config.folder)
    study = _create(config, storage)
    stored, empty = study.user_attrs.get(ATTRIBUTE), not study.get_trials(deepcopy=False)
    if stored is None and not empty:
        raise StudyError(f"the storage holds a study named {config.name} that is not of capnas; choose another name.")
    if stored is not None and (conflicts := config.conflicts(stored)):
        if not empty:
            raise StudyError(f"the study {config.name} exists with other settings: {'; '.join(conflicts)}. Choose another name or folder.")
        optuna.delete_study(study_name=config.name, storage=storage)  # it failed before its first trial: nothing is lost
        study, stored = _create(config, storage), None
    if empty:
        study.set_user_attr(SCORE, dict(CAPACITY_WEIGHTS))
    elif config.rates_capacity and study.user_attrs.get(SCORE) != dict(CAPACITY_WEIGHTS) and _n_finished(study) < config.trials:
        advice = "Choose another name or folder, or go on with the version of capnas that began it (environment.json)."
        raise StudyError(f"the study {config.name} has another definition of capacity_score: new trials would not compare. {advice}")
    if stored != config.to_dict():
        study.set_user_attr(ATTRIBUTE, config.to_dict())
    if stored is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(config.values))
    return study


def _create(config: StudyConfig, storage: Any) -> optuna.Study:
    return optuna.create_study(
        study_name=config.name,
        storage=storage,
        directions=config.directions,
        sampler=optuna.samplers.RandomSampler(seed=config.seed),
        pruner=make_pruner(config.pruner if len(config.values) == 1 else "off", epochs=config.epochs),
        load_if_exists=True,
    )


def _objective(config: StudyConfig, space: Any = None, data: Any = None) -> Objective:
    from capnas.data import load_data

    return Objective(
        config.space if space is None else space,
        load_data(config.data, **{"seed": config.seed} | dict(config.data_options)) if data is None else data,
        values=config.values,
        weights=config.weights,
        max_params=config.max_params,
        max_macs=config.max_macs,
        gate=config.gate,
        pool=config.pool,
        resolutions=config.resolutions,
        seed=config.seed,
        device=config.device,
        train=config.training(),
        stopping=None if config.pruner == "off" else MedianRule(warmup_epochs=first_judged(config.epochs) - 1),
    )


def _n_finished(study: optuna.Study) -> int:
    return sum(map(is_finished, study.get_trials(deepcopy=False)))


def _work(
    study: optuna.Study,
    config: StudyConfig,
    objective: Objective,
    *,
    parallel: bool,
    on_trial: TrialCallback | None,
    go_on: Callable[[], bool] = lambda: True,
) -> int:
    """Trials one after the other until the study is finished."""
    ran, failures, own = 0, 0, int.from_bytes(os.urandom(4), "big")
    while go_on():
        sweep(study, stale_after=config.stale_after)
        trials = study.get_trials(deepcopy=False)
        finished = sum(map(is_finished, trials))
        running = [t for t in trials if t.state == TrialState.RUNNING]
        if finished >= config.trials:
            break
        if finished + len(running) >= config.trials:
            if not any(map(local, running)):
                break  # the workers of other hosts see to the rest
            time.sleep(_POLL)
            continue
        settled = sum(map(is_settled, trials))
        draws = (settled, own, ran) if parallel else (settled,)
        study.sampler = make_sampler(
            config.sampler, seed=config.seed, draws=draws, trials=config.trials, pool=config.pool or 0, parallel=parallel
        )
        if objective.selection is not None:
            objective.selection.check(study)
            objective.selection.queue_next(study)
        number, error = _one(study, objective, config.trials)
        if on_trial is not None:
            on_trial(study, study.get_trials(deepcopy=False)[number])
        if isinstance(error, CapnasError):
            raise error
        failures = 0 if error is None else failures + 1
        if error is not None and failures == MAX_FAILURES:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise StudyError(f"{failures} trials in a row ended in an error, the last: {text}") from error
        ran += 1
    return ran


def _one(study: optuna.Study, objective: Objective, limit: int) -> tuple[int, Exception | None]:
    """Run one trial; its number and the error that ended it, if one did. Optuna's own loop would log each with a traceback."""
    trial = study.ask()
    try:
        earlier = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
        if superseded(trial) or sum(is_finished(t) or t.state == TrialState.RUNNING for t in earlier) >= limit:
            lost = Evaluation(status="interrupted", reason="another worker drew this or the last trial first", params=trial.params)
            trial.set_user_attr(EVALUATION, lost.to_dict())
            study.tell(trial, state=TrialState.FAIL)
            return trial.number, None
        values = objective(trial)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except Exception as error:
        study.tell(trial, state=TrialState.FAIL)
        return trial.number, error
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        study.tell(trial, values)  # interrupted in here, the trial gets its stored values from the next sweep
    return trial.number, None


def _launch(study: optuna.Study, config: StudyConfig, on_trial: TrialCallback | None) -> None:
    """Start the workers, watch their trials, and pass a signal on to them."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    threads = max(1, len(os.sched_getaffinity(0)) // config.workers if hasattr(os, "sched_getaffinity") else 1)
    children = [
        context.Process(target=_child, args=(config.to_dict(), config.storage, config.out, _device(config.device, i), threads, errors))
        for i in range(config.workers)
    ]
    told = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}

    def tell() -> None:
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in told:
                told.add(trial.number)
                if on_trial is not None:
                    on_trial(study, trial)

    try:
        with _environment(OMP_NUM_THREADS=str(threads)):
            for child in children:
                child.start()
        while any(child.is_alive() for child in children):
            tell()
            for child in children:
                child.join(_POLL / len(children))
        tell()
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            child.join(20)
            if child.is_alive():
                child.kill()
                child.join()
    if _n_finished(study) < config.trials:
        codes = [child.exitcode for child in children]
        if not errors.empty():
            kind, text = errors.get()
            raise getattr(capnas.errors, kind, StudyError)(text)
        if any(codes):
            raise StudyError(f"the workers ended early with exit codes {codes}; the finished trials are kept, the same command resumes.")


def _child(config: dict[str, Any], storage: str | None, out: str | None, device: str, threads: int, errors: Any) -> None:
    """The body of a worker process."""
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parent = multiprocessing.parent_process()
    settings = replace(StudyConfig.from_dict(config, out=out), storage=storage, device=device)
    try:
        with _sigterm_interrupts():
            study, objective = _open(settings), _objective(settings)
            _work(study, settings, objective, parallel=True, on_trial=None, go_on=lambda: parent is None or parent.is_alive())
    except KeyboardInterrupt:
        os._exit(130)
    except CapnasError as error:
        errors.put((type(error).__name__, str(error)))
        os._exit(1)


def _device(device: str, index: int) -> str:
    """One GPU per worker, in turn."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{index % torch.cuda.device_count()}"
    return device


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while the block runs; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _environment(**changes: str) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
