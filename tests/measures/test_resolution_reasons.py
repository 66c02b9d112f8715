"""What is said of a recommended image size."""

from __future__ import annotations

from capnas.measures.resolution import SizeReading
from capnas.measures.resolution_reasons import comparison

MACS = {16: 1000, 24: 1000, 32: 4000}


def said(fitted: dict[int, float], *, chosen: int, pay: float = 0.0, guessed: float | None = None) -> list[str]:
    final = {s: SizeReading(size=s, macs=MACS[s], accuracy=0.0, epochs=1, saturations=(0.5,)) for s in fitted}
    return comparison(final, fitted, fitted, chosen=chosen, best=chosen, pay=pay, guessed=guessed)


def test_changes_are_those_of_fitted_accuracies_for_what_they_cost() -> None:
    assert said({16: 0.5, 24: 0.4, 32: 0.6}, chosen=32, pay=0.01) == [
        "from 24 to 32 px the fitted accuracy changes by +20.0 points for 2.0 doublings of MACs (1 points a doubling are asked): it pays"
    ]
    assert said({16: 0.5, 24: 0.4, 32: 0.3}, chosen=16) == [
        "from 16 to 24 px the fitted accuracy changes by -10.0 points at the same MACs: nothing is gained"
    ]
    assert said({16: 0.3, 24: 0.4, 32: 0.4}, chosen=24) == [
        "from 16 to 24 px the fitted accuracy changes by +10.0 points at the same MACs: it pays",
        "from 24 to 32 px the fitted accuracy changes by +0.0 points for 2.0 doublings of MACs (MACs are not priced): "
        "it has stopped paying",
    ]
    (level,) = said({16: 0.4, 32: 0.39999}, chosen=16)
    assert "changes by +0.0 points" in level


def test_where_nothing_can_be_said_that_is_said() -> None:
    assert said({24: 0.4}, chosen=24) == ["nothing was compared: 24 px is the only size left"]
    (guess,) = said({16: 0.1, 32: 0.1}, chosen=16, guessed=0.125)
    assert guess.startswith("no size is better than a guess (12.5 %)")
