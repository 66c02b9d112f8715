"""Ctrl-C and SIGTERM held back until what must not be left half done is done."""

import signal
import threading

import pytest

from capnas.search.signals import sigterm_interrupts, whole

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done = []

    def block() -> None:
        with whole():
            signal.raise_signal(number)
            done.append(True)

    with sigterm_interrupts() as go_on:
        before = [signal.getsignal(n) for n in BOTH]
        with pytest.raises(KeyboardInterrupt):
            block()
        assert [signal.getsignal(n) for n in BOTH] == before
        if number == signal.SIGTERM:
            with pytest.raises(KeyboardInterrupt):
                go_on()
    assert done


@pytest.mark.parametrize("number", BOTH)
def test_the_second_signal_ends_a_block_that_hangs(number: signal.Signals) -> None:
    sent = []

    def block() -> None:
        with whole():
            for place in range(3):
                sent.append(place)
                signal.raise_signal(number)

    with sigterm_interrupts(), pytest.raises(KeyboardInterrupt):
        block()
    assert sent == [0, 1]


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
    seen = []

    def run() -> None:
        with whole():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
