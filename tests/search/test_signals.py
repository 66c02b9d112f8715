"""Ctrl-C and SIGTERM held back until what must not be left half done is done."""

import signal
import subprocess
import sys
import threading

import pytest

from capnas.search import signals
from capnas.search.signals import no_sigint, sigterm_interrupts, whole

BOTH = [signal.SIGINT, signal.SIGTERM]


def hold(*numbers: signal.Signals, done: list[signal.Signals]) -> None:
    """Raises the signals one after the other in a block that is to end whole."""
    with whole():
        for number in numbers:
            signal.raise_signal(number)
            done.append(number)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done: list[signal.Signals] = []
    with sigterm_interrupts() as go_on:
        before = [signal.getsignal(n) for n in BOTH]
        with pytest.raises(KeyboardInterrupt):
            hold(number, done=done)
        assert [signal.getsignal(n) for n in BOTH] == before
        if number == signal.SIGTERM:
            with pytest.raises(KeyboardInterrupt):
                go_on()
    assert done == [number]


@pytest.mark.parametrize("number", BOTH)
def test_the_second_signal_ends_a_block_that_hangs(number: signal.Signals) -> None:
    done: list[signal.Signals] = []
    with sigterm_interrupts(), pytest.raises(KeyboardInterrupt):
        hold(number, number, done=done)
    assert done == [number]


def test_a_sigterm_is_not_forgotten_over_a_ctrl_c() -> None:
    with sigterm_interrupts() as go_on:
        assert go_on()
        with pytest.raises(KeyboardInterrupt):
            hold(signal.SIGTERM, signal.SIGINT, done=[])
        with pytest.raises(KeyboardInterrupt):
            go_on()


def test_sigterm_ends_the_process_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_interrupts():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be held back here")
def test_ctrl_c_is_held_back_while_a_process_starts() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with no_sigint():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_an_ignored_signal_stays_ignored() -> None:
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole():
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_threads_beside_the_main_one_leave_the_signals_alone() -> None:
    seen: list[object] = []

    def run() -> None:
        with sigterm_interrupts() as go_on, whole():
            seen.append(signal.getsignal(signal.SIGINT))
            assert go_on()
            seen.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT), True]


def test_a_process_that_went_on_after_a_signal_in_a_text_that_it_ran_ends_as_it_asks() -> None:
    code = f"""
import runpy
try:
    with runpy.run_path({signals.__file__!r})["sigterm_interrupts"]():
        exec("import signal; signal.raise_signal(signal.SIGTERM)")
except KeyboardInterrupt:
    print("went on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
