"""Run a study: one process or several, started, interrupted, killed and resumed, on any storage."""

from __future__ import annotations

import builtins
import contextlib
import functools
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import optuna
import torch

import capnas.errors
from capnas.devices import usable_cpus
from capnas.documents import write_whole
from capnas.errors import CapnasError, StudyError, one_line
from capnas.objective import Objective
from capnas.objective.callbacks import EpochCallback
from capnas.objective.claims import sweep
from capnas.objective.finals import FinalCallback, held, hold_finals, unsettled
from capnas.search.config import StudyConfig
from capnas.search.enqueuing import begun, check_parameters, enqueue_new
from capnas.search.export import write_environment, write_trials
from capnas.search.opening import ATTRIBUTE, SCORE, check_folder, discard, open_study, opened_here
from capnas.search.runs import RunResult, count_finished, open_run
from capnas.search.signals import no_sigint, sigterm_interrupts, whole
from capnas.search.working import (
    MAX_FAILURES,
    POLL,
    TrialCallback,
    check_candidates,
    check_entries,
    check_unchanged,
    ended,
    failures_in_a_row,
    make_objective,
    stoppable,
    work,
)
from capnas.spaces import load_space

__all__ = ["ATTRIBUTE", "SCORE", "RunResult", "StudyConfig", "open_run", "run_study", "sweep", "worker"]


def run_study(
    config: StudyConfig,
    *,
    space: Any = None,
    data: Any = None,
    enqueue: Sequence[Mapping[str, Any]] = (),
    on_start: Callable[[], None] | None = None,
    on_trial: TrialCallback | None = None,
    on_epoch: EpochCallback | None = None,
    on_final: FinalCallback | None = None,
) -> RunResult:
    """Run a study until it has ``config.trials`` finished trials or ``config.timeout`` is over; then hold its finals, if it has any.

    The same call again resumes: finished trials are kept, those of killed processes are given up (`sweep`), and with one worker the
    trials are those that an uninterrupted study would have had. SIGINT (Ctrl-C) and SIGTERM abandon the running trials and return.

    Args:
        config: the study.
        space: the space itself, where ``config.space`` is only its name; needs one worker.
        data: the images themselves, where ``config.data`` is only their name; needs one worker.
        enqueue: parameters of architectures to begin with, before the sampler draws any; each becomes a trial once, also over several
            sessions. What a dictionary leaves out is drawn.
        on_start: called once before the first trial, when space, images and storage are there and nothing stands against it.
        on_trial: called with the study and each trial that ends, in this process. As in Optuna's callbacks, ``study.stop()`` ends the
            session when the running trials have ended; finals follow.
        on_epoch: called after each epoch of a trial, with its number, the epoch and its row of the curve; with one worker only, but in
            the finals always. As of any callback, an error of it ends the session and passes through; the trial does not count.
        on_final: called with each finalist and what its training gave, see `capnas.objective.finals.hold_finals`.

    Returns:
        The run, also after a signal (``interrupted``) and when nothing was left to do (``finished_before >= config.trials``).

    Raises:
        StudyError: the study exists with other settings, images or latencies of another device (the text says which), its folder
            holds another study, its storage does not answer, or `MAX_FAILURES` trials in a row ended in an error.
        SpaceError, UsageError: no trial can do what is asked for, see `capnas.search.working.check_candidates`, or one to begin with
            cannot be tried.

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
    check_folder(config)
    shown, config = config.folder, config.absolute()  # a space may change the working directory
    first = check_parameters(enqueue)
    if space is None:
        load_space(config.space)  # its errors belong before anything is created
    folder, objective = config.folder, functools.cache(functools.partial(make_objective, config, space, data))
    made = not folder.exists()
    fresh = not any((folder / name).exists() for name in ("study.toml", "journal.log"))
    if config.workers == 1 and not (folder / "study.toml").is_file():
        objective()  # those of the data as well
    folder.mkdir(parents=True, exist_ok=True)
    try:
        study = open_study(config)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty: another process may have begun a study in it
        raise
    before = count_finished(study)
    write_whole(folder / "study.toml", config.to_toml())
    known = len(begun(study))
    interrupted, start = False, time.monotonic()
    try:
        with sigterm_interrupts() as go_on, stoppable(study, go_on) as wanted:
            if first and before < config.trials:
                check_candidates(objective(), seed=config.seed)
                check_entries(objective(), first, seed=config.seed)
                sweep(study, stale_after=config.stale_after)  # a killed one is enqueued again
                enqueue_new(study, first)
            if before >= config.trials:
                pass
            elif config.workers == 1:
                objective().on_epoch = on_epoch
                work(study, config, objective(), parallel=False, on_start=on_start, on_trial=on_trial, go_on=wanted)
            else:
                _launch(study, config, on_start, on_trial, wanted)
            over = not wanted() or (config.timeout is not None and time.monotonic() - start >= config.timeout)
            if config.finalists is not None and (over or count_finished(study) >= config.trials):
                _hold_finals(study, config, objective, on_epoch=on_epoch, on_final=on_final, go_on=go_on)
    except KeyboardInterrupt:
        interrupted = True
    except Exception:
        if fresh and opened_here(study) and not begun(study):
            discard(folder, whole=made)
        with contextlib.suppress(Exception):  # the first error is the one to tell
            if len(begun(study)) > known:  # a session that was refused leaves the files of the last one
                _leave(study, config)
        raise
    _leave(study, config)
    return RunResult(folder=shown, config=config, study=study, finished_before=before, interrupted=interrupted)


def _leave(study: optuna.Study, config: StudyConfig) -> None:
    """What a session leaves beside its trials, however it ended."""
    sweep(study, stale_after=config.stale_after)
    write_environment(config.folder / "environment.json", workers=config.workers, device=config.device)
    write_trials(config.folder / "trials.csv", study, config.values)


def _hold_finals(study: optuna.Study, config: StudyConfig, objective: Callable[[], Objective], **how: Any) -> None:
    """The finals of a study whose trials are finished; images are loaded only where somebody is still to be trained."""
    count, epochs = config.finalists or 0, config.finals_epochs
    if any(unsettled(final) for _, final in held(study, count, epochs)):
        check_unchanged(study, config, objective())
        hold_finals(study, objective(), count=count, epochs=epochs, **how)


def worker(
    config: StudyConfig, *, device: str | None = None, on_trial: TrialCallback | None = None, on_epoch: EpochCallback | None = None
) -> int:
    """Run trials of a study beside other workers, on this or another machine, until it has ``config.trials`` finished trials.

    Args:
        config: that of the study; on another machine its ``storage`` must be one that both reach.
        device: instead of ``config.device``.
        on_trial: called with the study and each trial that ends.
        on_epoch: see `run_study`.

    Returns:
        How many trials it ran.

    Raises:
        StudyError: see `run_study`.
    """
    with sigterm_interrupts() as go_on:
        study = open_study(config)
        config = replace(config, device=device or config.device)  # of this worker alone: not kept with the study
        objective = make_objective(config)
        objective.on_epoch = on_epoch
        with stoppable(study, go_on) as wanted:
            return work(study, config, objective, parallel=True, on_trial=on_trial, go_on=wanted)


def _launch(
    study: optuna.Study,
    config: StudyConfig,
    on_start: Callable[[], None] | None,
    on_trial: TrialCallback | None,
    go_on: Callable[[], bool],
) -> None:
    """Start the workers, watch their trials, and pass a signal or the wish to stop on to them."""
    context = multiprocessing.get_context("spawn")
    messages, enough = context.SimpleQueue(), context.Event()
    before = ended(study)
    threads = max(1, usable_cpus() // config.workers)
    children = [
        context.Process(
            target=_child,
            args=(config.to_dict(), config.storage, config.out, _device(config.device, i), threads, before, messages, enough),
        )
        for i in range(config.workers)
    ]
    told, lost = set(before), set[int]()
    heard: dict[tuple[str, str, str], None] = {}  # each once, whoever sent it

    def tell() -> None:
        _hear(messages, heard, on_start)
        for i, child in enumerate(children):
            killed = (child.exitcode or 0) < 0 and i not in lost
            if killed and (any(other.is_alive() for other in children) or count_finished(study) >= config.trials):
                lost.add(i)
                text = f"a worker was killed by signal {-(child.exitcode or 0)}; the others do its work."
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in told:
                told.add(trial.number)
                if on_trial is not None:
                    on_trial(study, trial)

    try:
        with whole(), _environment(OMP_NUM_THREADS=str(threads)), no_sigint():  # a worker half started is known to nobody
            for child in children:
                child.start()
        while any(child.is_alive() for child in children):
            tell()
            if not go_on():
                enough.set()
            for child in children:
                child.join(POLL / len(children))
        tell()
    finally:
        _end(children)
    errors = [(name, text) for kind, name, text in heard if kind == "error"]
    if count_finished(study) < config.trials or len(failures_in_a_row(study.get_trials(deepcopy=False), before)) >= MAX_FAILURES:
        for name, text in errors:
            raise getattr(capnas.errors, name, StudyError)(text)
        codes = [child.exitcode for child in children]
        if any(codes):
            raise StudyError(f"the workers ended early with exit codes {codes}; the finished trials are kept, the same command resumes.")
    for _, text in errors:
        warnings.warn(f"a worker ended early and the others finished the trials: {text}", RuntimeWarning, stacklevel=2)


def _hear(messages: Any, heard: dict[tuple[str, str, str], None], on_start: Callable[[], None] | None) -> None:
    """Take what workers sent to `heard`, and pass on what is new there: their start and their warnings."""
    while not messages.empty():
        kind, name, text = message = messages.get()
        if message in heard:
            continue
        heard[message] = None
        if kind == "warning":
            warnings.warn(text, getattr(builtins, name), stacklevel=2)
        elif kind == "start" and on_start is not None:
            on_start()


def _end(children: Sequence[BaseProcess]) -> None:
    """End those that were started and still run, by force where they do not heed the signal."""
    started = [child for child in children if child.pid is not None]
    for child in started:
        if child.is_alive():
            child.terminate()
    for child in started:
        child.join(20)
        if child.is_alive():
            child.kill()
            child.join()


def _child(
    config: dict[str, Any],
    storage: str | None,
    out: str | None,
    device: str,
    threads: int,
    before: frozenset[int],
    messages: Any,
    enough: Any,
) -> None:
    """The body of a worker process; its start, its warnings and its error go to the parent, each short enough to be written at once."""

    def send(kind: str, name: str, text: object) -> None:
        messages.put((kind, name, one_line(text, 900)))

    def warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        send("warning", next(c.__name__ for c in category.__mro__ if c.__module__ == "builtins"), message)

    warnings.showwarning = warn
    sys.stdout = sys.stderr  # what a space prints is no part of the document that the parent writes
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # killed while this one imported: by now the folder may be gone, or another's
        return
    settings = replace(StudyConfig.from_dict(config, out=out), storage=storage)
    try:
        with sigterm_interrupts() as go_on:
            study = open_study(settings)
            settings = replace(settings, device=device)
            objective = make_objective(settings)
            with stoppable(study, lambda: go_on() and not enough.is_set() and (parent is None or parent.is_alive())) as wanted:
                work(
                    study, settings, objective, parallel=True, on_start=lambda: send("start", "", ""), on_trial=None, before=before,
                    go_on=wanted,
                )  # fmt: skip
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        name = type(error).__name__
        send("error", name, error if isinstance(error, CapnasError) else f"a worker ended with {name}: {error}")
        os._exit(1)


def _device(device: str, index: int) -> str:
    """One GPU per worker, in turn."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{index % torch.cuda.device_count()}"
    return device


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
