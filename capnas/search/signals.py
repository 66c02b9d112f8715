"""Ctrl-C and SIGTERM while a study runs: one end for both, at a moment that leaves nothing half done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[Callable[[], bool]]:
    """Treat SIGTERM as Ctrl-C while the block runs; only the main thread may ask for that.

    What is yielded is to be asked between trials: it raises what code with a bare ``except`` (an import, a space) may have swallowed.
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def go_on() -> bool:
        if asked:
            raise KeyboardInterrupt
        return True

    if threading.current_thread() is not threading.main_thread():
        yield go_on
        return
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield go_on
    finally:
        signal.signal(signal.SIGTERM, old)
        exec("")  # after an interrupt in a text given to exec, as for a dataclass, Python would end by SIGINT in spite of who caught it


@contextlib.contextmanager
def no_sigint() -> Iterator[None]:
    """Hold Ctrl-C back while the block runs; what starts in it never gets one, so that only its parent ends it, also while it imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended; the second one ends it, should it hang. For the main thread alone."""
    held: list[signal.Signals] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(signal.Signals(number))
        if len(held) > 1:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    old = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if main and callable(handler := signal.getsignal(number))}
    try:
        for number in old:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
