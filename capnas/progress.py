"""Progress of a search on stderr: one live line on a terminal and one plain line per trial elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from capnas.console import duration, say, short, time_left, with_unit
from capnas.errors import counted


class Progress:
    """Progress of a study, as a context manager: trials, best so far, time left. Give `on_trial`, `on_epoch` and
    `on_final` to `capnas.run_study`.

    Args:
        total: trials of the whole study.
        names: of the values.
        workers: processes whose trials are told here, some time after they end. Of several, only trials told so far count.
        epochs: of a trial.
        timeout: seconds after which no further trial begins.
    """

    def __init__(
        self,
        *,
        total: int,
        names: Sequence[str],
        workers: int = 1,
        epochs: int = 1,
        timeout: float | None = None,
    ) -> None:
        self.total, self.names, self.workers, self.epochs = total, names, workers, epochs
        self.timeout = math.inf if timeout is None else timeout
        self.start, self.began, self.ran = time.monotonic(), datetime.now(), 0
        self._told: set[int] = set()
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Live

            columns = (SpinnerColumn(), TextColumn("trials"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn())
            self._live = Live(*columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task("", total=self.total, state="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def on_epoch(self, number: int, epoch: int, row: dict[str, Any]) -> None:
        """A trial has trained another epoch, a finalist of as many as its row holds; shown on a terminal until the next one."""
        if self._live is not None:
            state = f"trial {number}: epoch {epoch}/{row.get('epochs', self.epochs)}"  # short: a line has 80 columns
            self._live.update(self._task, state=state)

    def on_trial(self, study: Any, trial: Any) -> None:
        """A trial of the study ended."""
        from capnas.objective.evaluation import Evaluation
        from capnas.search.runs import is_finished

        self._told.add(trial.number)
        trials = [t for t in study.get_trials(deepcopy=False) if self._counts(t)]
        finished = sum(map(is_finished, trials))
        self.ran += is_finished(trial)
        if (found := Evaluation.of(trial)) is None:
            return
        shown = {**found.values} | {n: a for n in ("accuracy",) if found.values and (a := found.metrics.get(n)) is not None}
        what = ", ".join(f"{with_unit(name)} {short(value)}" for name, value in shown.items()) or found.reason
        line = f"trial {trial.number:>3}  {found.status:<11} {what}  ({duration(sum(found.seconds.values()))})"
        left = time_left(time.monotonic() - self.start, self.ran, self.total - finished, within=self.timeout)
        state = "  ".join(filter(None, (self._best(study, trials), left)))
        if self._live is None:
            say(f"[{finished}/{max(finished, self.total)}] {line}" + (f"  {state}" if state else ""))
        else:
            self._live.console.print(line, highlight=False, markup=False)
            self._live.update(self._task, completed=finished, state=state)

    def on_final(self, trial: Any, final: Mapping[str, Any], left: int) -> None:
        """A finalist was trained."""
        from capnas.objective.targets import TOLD

        values = ", ".join(f"{name} {short(final[name])}" for name in TOLD)
        what = values if final["status"] == "complete" else final["reason"]
        line = f"trial {trial.number:>3}  {final['status']:<11} {what}  ({counted(final['epochs'], 'epoch')}, {duration(final['seconds'])})"
        if self._live is None:
            say(f"[final] {line}  {left} left")
        else:
            self._live.console.print(f"final {line}", highlight=False, markup=False)
            self._live.update(self._task, state=f"finals: {left} left")

    def _counts(self, trial: Any) -> bool:
        """Whether a trial was told, or never will be: it ended before the start, or in another process beside the only one here."""
        end = trial.datetime_complete
        return self.workers == 1 or trial.number in self._told or (end is not None and end < self.began)

    def _best(self, study: Any, trials: Sequence[Any]) -> str:
        from capnas.objective.finals import best_first, front

        best = next(iter(best_first(study, front(study, trials))), None)
        return "" if best is None else f"best {with_unit(self.names[0])} {short(best.values[0])} (trial {best.number})"
