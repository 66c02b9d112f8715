"""How much each stage of the race between sizes may train."""

from __future__ import annotations

import itertools

from capnas.measures.halving import halving, rung_epochs, shared_passes


def test_each_rung_keeps_half_down_to_two() -> None:
    assert halving(5) == (5, 3, 2)
    assert halving(9) == (9, 5, 3, 2)


def test_epochs_spend_what_is_left_and_never_more() -> None:
    macs = [1, 2, 4, 8, 16]
    left = 0.3 * 20 * sum(macs)
    spent = []
    for last, kept in ((False, macs), (False, macs[2:]), (True, macs[3:])):
        epochs = rung_epochs(kept, left=left, last=last, most=20)
        spent.append(epochs)
        left -= epochs * sum(kept)
    assert spent == [4, 1, 1]
    assert 0 <= left < sum(macs[3:])
    assert rung_epochs([8], left=7.0, last=True, most=3) == 0
    assert rung_epochs([8], left=8.0, last=False, most=3) == 1  # two thirds pay for none
    assert rung_epochs([1], left=7.0, last=False, most=3) == 3


def test_shared_passes_take_two_thirds_and_leave_an_epoch_of_every_size() -> None:
    for macs, epochs in itertools.product(([1, 2, 4, 8, 16], [3, 5], [1, 1, 7]), range(1, 40)):
        left = 0.3 * epochs * sum(macs)
        passes = shared_passes(macs, left=left, most=epochs)
        mean = sum(macs) / len(macs)
        if passes:
            assert passes * mean <= left * 2 / 3 + 1e-6
            assert left - passes * mean >= sum(macs) - 1e-6
        if passes < epochs:
            assert (passes + 1) * mean > min(left * 2 / 3, left - sum(macs))
        assert 0 <= passes <= epochs
    assert shared_passes([1, 2, 4, 8, 16], left=0.3 * 10 * 31, most=10) == 10  # a pass costs a fifth of an epoch of every size
