"""What the command line shows: numbers short enough to read, tables, progress, and JSON for machines.

Results go to stdout and progress to stderr. Progress is one live line on a terminal and one plain line per trial elsewhere.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from capnas.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
WIDE = 160  # columns of a table that goes into a file or a pipe


def number(text: str) -> int:
    """A whole number written as 8000000, 8e6, 8_000_000, 8M, 1.5G or 300k.

    Raises:
        UsageError: anything else.

    >>> number("8M"), number("8e6"), number("300k"), number("28")
    (8000000, 8000000, 300000, 28)
    """
    match = re.fullmatch(r"\s*([\d_.]+(?:e[+-]?\d+)?)\s*([kmgbt]?)\s*", text.lower())
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else None
    except ValueError:
        value = None
    if value is None or value != int(value):
        raise UsageError(f"a whole number is written like 8000000, 8e6, 8M or 300k, got {text!r}.")
    return int(value)


def short(value: float | None, digits: int = 4) -> str:
    """A number for a table; whole numbers from a thousand on with a unit.

    >>> short(8123456), short(0.91234), short(300), short(None), short(float("nan"))
    ('8.12M', '0.9123', '300', '-', '-')
    """
    if value is None or value != value:
        return "-"
    if abs(value) >= 1000:
        for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f}{unit}"
    return (
        f"{value:d}"
        if isinstance(value, int)
        else f"{value:.{digits}f}".rstrip("0").rstrip(".")
        if value == int(value)
        else f"{value:.{digits}f}"
    )


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42.2), duration(200), duration(7500)
    ('42 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts (several to a text, with commas) as a mapping; values become numbers or truth values where they look like it.

    Raises:
        UsageError: a text without ``=``.

    >>> pairs(["lr=0.01,amp=off", "clip_grad=none"], "--train")
    {'lr': 0.01, 'amp': 'off', 'clip_grad': None}
    """
    found: dict[str, Any] = {}
    for part in (p.strip() for text in given for p in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} takes NAME=VALUE, got {part!r}.")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def out_json(document: Any) -> None:
    """One JSON document on stdout; what is not a finite number becomes null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def say(text: str) -> None:
    """A line of progress or advice on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1) -> None:
    """A table on stdout; the first ``left`` columns are texts, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)


class Progress:
    """Progress of a study, as a context manager: trials, best so far, time left.

    Args:
        total: trials of the whole study.
        done: trials that were finished before.
        names: of the values.
        directions: of the values.
    """

    def __init__(self, *, total: int, done: int, names: Sequence[str], directions: Sequence[str]) -> None:
        self.total, self.done, self.before = total, done, done
        self.names, self.directions = names, directions
        self.start = time.monotonic()
        self.best: tuple[float, int] | None = None
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Live

            columns = (
                SpinnerColumn(),
                TextColumn("trial"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task("", total=self.total, completed=self.done, state="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def known(self, number: int, value: float) -> None:
        """Take note of a first value, of this session or an earlier one."""
        sign = 1 if self.directions[0] == "maximize" else -1
        if self.best is None or sign * value > sign * self.best[0]:
            self.best = (value, number)

    def trial(self, number: int, status: str, values: Mapping[str, float], reason: str, seconds: float) -> None:
        """A trial ended; ``status`` "failed" and "interrupted" trials do not count."""
        if status != "interrupted":
            self.done += 1
        if values:
            self.known(number, next(iter(values.values())))
        what = ", ".join(f"{name} {short(value)}" for name, value in values.items()) or reason
        line = f"trial {number:>3}  {status:<11} {what}  ({duration(seconds)})"
        state = "  ".join(filter(None, (self._best(), self._left())))
        if self._live is None:
            say(f"[{self.done}/{self.total}] {line}" + (f"  {state}" if state else ""))
        else:
            self._live.console.print(line, highlight=False, markup=False)
            self._live.update(self._task, completed=self.done, state=state)

    def _best(self) -> str:
        return "" if self.best is None else f"best {self.names[0]} {short(self.best[0])} (trial {self.best[1]})"

    def _left(self) -> str:
        ran = self.done - self.before
        if ran == 0 or self.done >= self.total:
            return ""
        return f"about {duration((time.monotonic() - self.start) / ran * (self.total - self.done))} left"
