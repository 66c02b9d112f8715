"""The median rule for several values, by hand-made curves."""

from __future__ import annotations

import pytest

from capnas.errors import UsageError
from capnas.objective import stopping
from capnas.objective.stopping import MedianRule, Rival

RIVALS = [Rival(accuracy=(a, a + 0.1, a + 0.2), costs=(c,)) for a, c in ((0.2, 10.0), (0.4, 20.0), (0.6, 30.0))]


def verdict(curve: list[float], cost: float, **changes: int) -> str | None:
    return MedianRule(**{"warmup_epochs": 1, "min_rivals": 1} | changes).verdict(curve, RIVALS, costs=(cost,))


def test_compares_with_the_median_of_those_that_cost_no_more() -> None:
    assert verdict([0.1, 0.49], 30.0) is not None  # medians after epoch 2: 0.5 of all three
    assert verdict([0.1, 0.5], 30.0) is None
    assert verdict([0.1, 0.39], 20.0) is not None  # 0.4 of the two cheaper
    assert verdict([0.1, 0.41], 20.0) is None
    assert verdict([0.1, 0.29], 10.0) is not None
    assert verdict([0.0, 0.0], 9.0) is None  # the cheapest of all has nobody to lose against


def test_waits_for_epochs_and_rivals() -> None:
    assert verdict([0.0], 30.0) is None
    assert verdict([0.0], 30.0, warmup_epochs=0) is not None
    assert verdict([], 30.0, warmup_epochs=0) is None
    assert verdict([0.0, 0.0], 30.0, min_rivals=3) is not None
    assert verdict([0.0, 0.0], 30.0, min_rivals=4) is None


def test_the_best_epoch_counts_and_shorter_curves_do_not() -> None:
    assert verdict([0.55, 0.0], 30.0) is None
    short = [Rival(accuracy=(0.9,)), Rival(accuracy=(0.2, 0.3))]
    assert MedianRule(min_rivals=1).verdict([0.1, 0.31], short) is None
    assert MedianRule(min_rivals=1).verdict([0.1, 0.29], short) is not None


def test_several_costs_must_all_be_no_higher() -> None:
    rivals = [Rival(accuracy=(0.9, 0.9), costs=(1.0, 9.0))]
    rule = MedianRule(min_rivals=1)
    assert rule.verdict([0.1, 0.1], rivals, costs=(2.0, 8.0)) is None
    assert rule.verdict([0.1, 0.1], rivals, costs=(2.0, 9.0)) is not None


def test_refuses() -> None:
    with pytest.raises(UsageError, match="warmup_epochs must be at least 0, got -1"):
        MedianRule(warmup_epochs=-1)
    with pytest.raises(UsageError, match="min_rivals must be at least 1, got 0"):
        MedianRule(min_rivals=0)


def test_a_curve_that_holds_no_number_is_no_rival_and_stops_nobody() -> None:
    assert verdict([float("nan"), float("nan")], 15.0) is None
    stored = {"status": "complete", "settings": "s", "metrics": {"macs": 1.0}}
    told = [stored | {"curve": [{"accuracy": a}]} for a in (None, 0.5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capnas.objective.stopping.past", lambda *_: [(None, s) for s in told])
        assert [r.accuracy for r in stopping._rivals(None, ("val_loss", "macs"), "s")] == [(0.5,)]
