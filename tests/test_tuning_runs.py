"""What a tuning keeps of its short runs: saturations, losses, seconds, what was left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from capnas.measures.resolution import Recommendation, SizeReading
from capnas.mixed_sizes import SharedRun
from capnas.profile import LayerProfile, Profile
from capnas.resolution import SizeRun, Tuning, _advice, _left_out, _run, _saturations, _seconds_share
from capnas.size_survey import SizeSurvey
from capnas.training import TrainingResult


def profile(*values: float | None) -> Profile:
    rows = tuple(
        LayerProfile(name=f"l{i}", kind="Conv2d", reading="modules", width=4, params=1, rows=9, rows_seen=9, saturation=value)
        for i, value in enumerate(values)
    )
    return Profile(layers=rows, blocks=(), skipped={}, mode="eval")


def run(size: int, rung: int, *, epochs: int = 1, seconds: float = 0.0, trained: bool = True) -> SizeRun:
    reading = SizeReading(size=size, macs=1, accuracy=0.5, epochs=epochs) if trained else None
    status = "complete" if trained else "diverged"
    return SizeRun(size=size, rung=rung, epochs=epochs, reading=reading, seconds=seconds, status=status, reason="" if trained else "nan")


def test_three_layers_that_look_around_speak_for_the_network_and_else_all_but_the_head() -> None:
    read = profile(0.5, None, 0.25, math.nan, 0.75, 0.1)
    assert _saturations(read, ("l0", "l2", "l4")) == {"l0": 0.5, "l2": 0.25, "l4": 0.75}
    assert _saturations(read, ("l0", "l2")) == {"l0": 0.5, "l2": 0.25, "l4": 0.75}
    assert _saturations(read, ("l0", "l1", "l2")) == {"l0": 0.5, "l2": 0.25, "l4": 0.75}  # one of them has none
    assert _saturations(read, ("l4", "l2", "l0", "l5")) == {"l4": 0.75, "l2": 0.25, "l0": 0.5, "l5": 0.1}
    assert _saturations(profile(0.5, 0.1), ("l0", "l1")) == {"l0": 0.5}
    assert _saturations(None, ()) == {}


def test_a_reading_is_that_of_the_last_epoch_at_all_epochs_so_far() -> None:
    curve = ({"epoch": 1, "val_loss": 2.0}, {"epoch": 2, "val_loss": 1.0})
    result = TrainingResult(status="complete", curve=curve, accuracy=0.75, profile=profile(0.5, 0.1), seconds=3.0)
    found = _run(SizeSurvey(size=8, macs=10), 10, 2, 2, 5, result)
    assert found.reading == SizeReading(size=8, macs=10, accuracy=0.75, loss=1.0, epochs=5, saturations=(0.5,), layers=("l0",))
    assert (found.rung, found.epochs, found.seconds) == (2, 2, 3.0)
    assert _run(SizeSurvey(size=8), 10, 1, 2, 2, TrainingResult(status="diverged", accuracy=0.5)).reading is None


def test_seconds_are_shares_of_training_every_size_to_its_end() -> None:
    runs = [run(8, 1, epochs=2, seconds=4.0), run(16, 1, epochs=2, seconds=8.0), run(16, 2, epochs=3, seconds=15.0)]
    # two seconds an epoch at 8 px and five at 16 px as it was last; 3 + 27 seconds of 10 epochs of both
    assert _seconds_share(SharedRun(seconds=3.0), runs, (8, 16), 10) == pytest.approx(30 / 70)
    assert _seconds_share(SharedRun(), runs, (4, 8, 16), 10) is None  # nobody knows how long 4 px would take


def test_every_size_that_was_not_compared_last_has_its_reason() -> None:
    surveys = [SizeSurvey(size=64, refusal="it does not fit"), *(SizeSurvey(size=s, macs=s) for s in (8, 16, 32))]
    runs = [run(8, 1), run(16, 1, trained=False), run(32, 1), run(32, 2)]
    assert list(_left_out(surveys, runs).items()) == [
        (8, "dropped after round 1, it was worth less than the others"),
        (16, "its training ended in round 1: diverged, nan"),
        (64, "not trained, it does not fit"),
    ]


def test_the_last_reading_of_a_size_is_that_of_its_last_rung() -> None:
    choice = Recommendation(size=8, even=True, fitted={}, worth={}, reasons=())
    found = Tuning(
        surveys=(), shared=SharedRun(), runs=(run(8, 1), run(8, 2, epochs=3), run(8, 3, trained=False)), left_out={}, recommendation=choice,
        advice=(), epochs=9, macs_share=0.1, seconds_share=None,
    )  # fmt: skip
    assert found.last(8) == found.readings[1]
    assert (found.readings[1].epochs, found.last(9)) == (3, None)


def test_advice_is_on_the_layers_of_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("capnas.resolution.advise", lambda model, graph, size, **given: asked.update(given) or ())
    reading = SizeReading(size=8, macs=1, accuracy=0.5, epochs=1, saturations=(0.5, 0.6, 0.1, 0.05), layers=("a", "b", "c", "d"))
    build = lambda size: nn.Conv2d(1, 2, 3)  # noqa: E731
    assert _advice(build, SizeSurvey(size=8, macs=1), 1, reading) == ()
    assert (asked["idle"], asked["layers"]) == (("c", "d"), ("a", "b", "c", "d"))
    asked.clear()
    even = SizeReading(size=8, macs=1, accuracy=0.5, epochs=1, saturations=(0.5, 0.6), layers=("a", "b"))
    assert _advice(build, SizeSurvey(size=8, macs=1), 1, even) == ()
    assert asked == {}
