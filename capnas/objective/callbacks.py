"""Calling a user's ``on_epoch`` from within a training: its errors end the session and are no results of the candidate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from optuna import TrialPruned

from capnas.errors import described

EpochCallback = Callable[[int, int, dict[str, Any]], None]  # the trial's number, the epoch and its row of the curve


class CallbackError(BaseException):
    """An error of a callback, which neither a training nor a trial may take for one of the candidate.

    Attributes:
        error: what the callback raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(f"on_epoch ended with {described(error)}")
        self.error = error


def tell(on_epoch: EpochCallback | None, number: int, epoch: int, row: dict[str, Any]) -> None:
    """Call ``on_epoch``, if there is one; its errors become a `CallbackError`, but ``optuna.TrialPruned``, which is a word to the trial."""
    try:
        if on_epoch is not None:
            on_epoch(number, epoch, row)
    except TrialPruned:
        raise
    except Exception as error:
        raise CallbackError(error) from error


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Let what a callback raised come out of the block as it was, instead of as a `CallbackError`."""
    try:
        yield
    except CallbackError as held:
        raise held.error from held.error.__cause__
