"""Runs as folders: ``study.toml`` (the request), ``journal.log`` (the trials, unless another storage is given), and after each session
``environment.json`` and ``trials.csv``.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from capnas.errors import StudyError, counted
from capnas.objective.evaluation import Evaluation, stored_with
from capnas.objective.finals import RETRIED, best_first, front, held, winner
from capnas.objective.history import evaluated
from capnas.objective.pool import is_untrained
from capnas.search.config import StudyConfig
from capnas.search.storages import HIDDEN, find_study


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run as it stands.

    Attributes:
        folder: where its files are.
        config: what was asked for.
        study: Optuna's study.
        finished_before: trials that were finished before this session.
        interrupted: whether a signal ended this session.
    """

    folder: Path
    config: StudyConfig
    study: optuna.Study
    finished_before: int = 0
    interrupted: bool = False

    @property
    def n_finished(self) -> int:
        """Trials that count among those asked for, whatever came of them."""
        return count_finished(self.study)

    @property
    def n_complete(self) -> int:
        """Trials that trained to the end or share the result of one that did."""
        return sum(e.status in ("complete", "duplicate") for _, e in self.evaluations())

    @property
    def finished(self) -> bool:
        """Whether all trials that were asked for are finished."""
        return self.n_finished >= self.config.trials

    @property
    def front(self) -> list[FrozenTrial]:
        """The trials that no other is better than in every value, best first value first; with one value, the best. No duplicates."""
        return best_first(self.study, (t for t in front(self.study) if stored_with(t).get("status") != "duplicate"))

    @property
    def finals(self) -> list[tuple[FrozenTrial, Mapping[str, Any]]]:
        """The finalists that were trained so far, with what that gave, best first value first; see `capnas.objective.finals`."""
        return [(trial, final) for trial, final in self._finalists if final is not None]

    @property
    def n_finals_left(self) -> int:
        """How many finalists are still to be trained."""
        return sum(final is None for _, final in self._finalists)

    @property
    def owed(self) -> str:
        """What to say while finalists are still to be trained, or failed; empty before all trials are finished, and where none is."""
        left, failed = self.n_finals_left, sum(final["status"] in RETRIED for _, final in self.finals)
        if not self.finished or not left + failed:
            return ""
        if left:
            return f"{counted(left, 'finalist')} {'is' if left == 1 else 'are'} still to be trained: give the search command again."
        return f"{counted(failed, 'finalist')} failed: give the search command again to train {'it' if failed == 1 else 'them'} once more."

    def finals_document(self) -> dict[str, Any]:
        """What documents tell of the finals: those held, how many a run of finished trials still owes, whether they name the best."""
        return {
            "finals": [{"trial": trial.number, **final} for trial, final in self.finals],
            "finals_left": self.n_finals_left if self.finished else 0,
            "named_by_finals": self.named_by_finals,
        }

    @property
    def _finalists(self) -> list[tuple[FrozenTrial, Mapping[str, Any] | None]]:
        count = self.config.finalists
        return [] if count is None else held(self.study, count, self.config.finals_epochs)

    @property
    def best(self) -> FrozenTrial | None:
        """The winner of the finals, where all were held; else the trial of the front with the best first value; None without any."""
        return self._winner or next(iter(self.front), None)

    @property
    def named_by_finals(self) -> bool:
        """Whether `best` is the winner of the finals."""
        return self._winner is not None

    @property
    def _winner(self) -> FrozenTrial | None:
        count = self.config.finalists
        return None if count is None else winner(self.study, count, self.config.finals_epochs)

    def evaluations(self) -> list[tuple[FrozenTrial, Evaluation]]:
        """See `capnas.objective.history.evaluated`."""
        return evaluated(self.study)

    @property
    def n_known(self) -> int:
        """How many draws in a row, up to the last, were of architectures that the study had trained already."""
        last = reversed(self.evaluations())
        return len(list(itertools.takewhile(lambda found: found[1].status == "duplicate", last)))

    def evaluation(self, number: int) -> Evaluation:
        """The evaluation of one trial.

        Raises:
            StudyError: there is none with this number.
        """
        found = {t.number: e for t, e in self.evaluations()}
        if number not in found:
            last = f"0 to {max(found)}" if found else "none yet"
            raise StudyError(f"the study {self.config.name} has no finished trial {number}; its trials: {last}.")
        return found[number]


def is_settled(trial: FrozenTrial) -> bool:
    """Whether a trial ended by itself, with a value, pruned or by an error of its own, but not by a signal."""
    if trial.state == TrialState.FAIL:
        return stored_with(trial).get("status") == "failed"
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts among those asked for: it ended by itself; where a gate asks for a share, not before its training."""
    return is_settled(trial) and not is_untrained(trial)


def count_finished(study: optuna.Study) -> int:
    """How many trials of a study are finished, see `is_finished`."""
    return sum(map(is_finished, study.get_trials(deepcopy=False)))


def open_run(path: str | Path, *, storage: str | None = None) -> RunResult:
    """Open a run to read it.

    Args:
        path: the run's folder, or the name of a study under ``runs/``.
        storage: the storage URL with its password, where ``study.toml`` holds it without; else taken from ``CAPNAS_STORAGE``.

    Raises:
        StudyError: there is no run, or its trials cannot be read.
    """
    folders = [Path(path), Path("runs") / path]
    folder = next((f for f in folders if (f / "study.toml").is_file()), None)
    if folder is None:
        known = sorted(p.parent.name for p in Path("runs").glob("*/study.toml"))
        advice = f"Runs here: {', '.join(known)}." if known else "Start one with capnas search."
        raise StudyError(f"{shlex.quote(str(path))} is not a run: no study.toml in it. {advice}")
    try:
        text = (folder / "study.toml").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StudyError(f"{folder / 'study.toml'} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    config = StudyConfig.from_toml(text, out=str(folder))
    url = storage or os.environ.get("CAPNAS_STORAGE") if config.storage and HIDDEN in config.storage else config.storage
    if url is None and config.storage is not None:
        raise StudyError(f"the study is in {config.storage}: give the URL with its password as storage or in CAPNAS_STORAGE.")
    if url is None and not (folder / "journal.log").is_file():
        raise StudyError(f"{folder} holds no journal.log: its trials are missing.")
    if (study := find_study(config.name, url, folder)) is None:
        raise StudyError(f"the storage of {folder} holds no study named {config.name}.")
    config = replace(config, storage=url)  # with its password: a worker opens it again
    return RunResult(folder=folder, config=config, study=study, finished_before=count_finished(study))
