"""The rule that chooses an image size, from tables of numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from capnas.errors import UsageError
from capnas.measures.resolution import (
    SizeReading,
    fitted_accuracy,
    price,
    recommend,
    steadied,
    survivors,
    worth,
)

EVEN, TAILED = (0.5,) * 8, (0.6,) * 6 + (0.05,) * 2


def reading(size: int, accuracy: float, epochs: int = 1, saturations: tuple[float, ...] = EVEN) -> SizeReading:
    return SizeReading(size=size, macs=1000 * size * size, accuracy=accuracy, epochs=epochs, saturations=saturations)


def test_the_fit_is_the_constrained_least_squares_solution() -> None:
    chance = np.random.default_rng(0)
    sizes = (16, 24, 32, 48, 64)
    rows = [reading(s, float(chance.uniform(0.4, 0.8)), e) for e, kept in ((1, sizes), (3, sizes[2:])) for s in kept]
    x = np.array([math.log2((s / 16) ** 2) for s in sizes])

    def loss(values: np.ndarray) -> float:
        level, curve = values[:2], values[2:]
        return float(sum(r.epochs * (r.accuracy - level[int(r.epochs == 3)] - curve[sizes.index(r.size)]) ** 2 for r in rows))

    def convexity(values: np.ndarray) -> np.ndarray:
        slopes = np.diff(values[2:]) / np.diff(x)
        return -np.diff(slopes)

    start = np.r_[0.6, 0.6, np.zeros(5)]
    rules = [{"type": "ineq", "fun": convexity}, {"type": "eq", "fun": lambda v: v[2]}]
    slow = minimize(loss, start, constraints=rules, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})
    ours = fitted_accuracy(rows)
    assert list(ours) == list(sizes)
    np.testing.assert_allclose(list(ours.values()), slow.x[1] + slow.x[2:], atol=2e-4)
    slopes = np.diff(list(ours.values())) / np.diff(x)
    assert (np.diff(slopes) <= 1e-9).all()


def test_a_concave_curve_is_kept_and_levels_of_epochs_are_taken_out() -> None:
    truth = {16: 0.5, 32: 0.6, 64: 0.65}
    rows = [reading(s, a, 1) for s, a in truth.items()] + [reading(s, a + 0.1, 4) for s, a in truth.items() if s > 16]
    fitted = fitted_accuracy(rows)
    assert fitted == pytest.approx({s: a + 0.1 for s, a in truth.items()})
    one = fitted_accuracy([reading(32, 0.7)])
    assert one == pytest.approx({32: 0.7})


def test_worth_takes_the_price_off_each_doubling() -> None:
    rows = [reading(16, 0.5), reading(32, 0.6), reading(64, 0.62)]
    assert worth(rows, pay=0.02) == pytest.approx({16: 0.5, 32: 0.56, 64: 0.54})
    with pytest.raises(UsageError, match="not negative, got -1"):
        worth(rows, pay=-1)
    with pytest.raises(UsageError, match="one reading at least"):
        fitted_accuracy([])


def test_within_a_budget_macs_cost_nothing_more() -> None:
    rows = [reading(16, 0.5), reading(32, 0.6), reading(64, 0.601)]
    assert recommend(rows).size == 32
    free = recommend(rows, budget=10**8)
    assert free.size == 64
    assert "for 2.0 doublings of MACs (MACs are not priced): it pays" in free.reasons[0]
    assert recommend(rows, budget=10**8, pay=0.0025).size == 32
    assert recommend(rows, pay=0.0).size == 64
    assert (price(None, None), price(None, 1), price(0.5, 1)) == (0.0025, 0.0, 0.5)


def test_steadied_accuracies_lie_on_the_line_over_the_loss_of_the_same_epochs() -> None:
    chance = np.random.default_rng(1)
    sizes = (16, 24, 32, 48)
    losses = {e: chance.uniform(1, 3, 4) for e in (1, 3)}
    noise = {e: (-0.1 if e == 1 else 0.1) * losses[e] + chance.normal(0, 0.02, 4) for e in (1, 3)}
    rows = [
        SizeReading(size=s, macs=s, accuracy=float(0.5 + noise[e][i]), loss=float(losses[e][i]), epochs=e)
        for e in (1, 3)
        for i, s in enumerate(sizes)
    ]
    found = np.array(steadied(rows))
    for epochs in (1, 3):
        mine = [i for i, r in enumerate(rows) if r.epochs == epochs]
        x, y = np.array([rows[i].loss for i in mine]), np.array([rows[i].accuracy for i in mine])
        slope, level = np.polyfit(x, y, 1)
        np.testing.assert_allclose(found[mine], slope * x + level if slope < 0 else y.mean())
    assert len(set(found[:4])) == 4
    assert len(set(found[4:])) == 1  # accuracy that rises with the loss tells nothing


def test_the_loss_decides_where_accuracies_are_noise() -> None:
    rows = [replace(reading(s, a), loss=x) for s, a, x in ((16, 0.40, 2.0), (32, 0.48, 1.6), (64, 0.47, 1.5))]
    assert recommend(rows, pay=0.0).size == 64
    assert recommend([replace(r, loss=None) for r in rows], pay=0.0).size == 32
    partly = [*rows[:2], replace(rows[2], loss=None)]
    assert steadied(partly) == tuple(r.accuracy for r in partly)
    same = [replace(r, loss=1.0) for r in rows]
    assert steadied(same) == pytest.approx([0.45] * 3)
    assert recommend(same).size == 16


def test_a_larger_size_is_chosen_exactly_while_it_pays() -> None:
    for gain in (0.0, 0.004, 0.006, 0.05):
        rows = [reading(16, 0.5), reading(32, 0.6), reading(64, 0.6 + gain)]
        assert recommend(rows).size == (64 if gain > 2 * 0.0025 else 32)
        assert recommend(rows, pay=0.06).size == 16  # 2 doublings at 6 points cost more than 10 points
    assert recommend([reading(32, 0.6), reading(64, 0.5)]).size == 32


def test_a_tail_moves_the_choice_to_a_larger_size_that_costs_little_worth() -> None:
    rows = [reading(32, 0.6, saturations=TAILED), reading(64, 0.6)]
    near = recommend(rows, pay=0.001)
    assert (near.size, near.even) == (64, True)
    assert any("hardly pays, but 32 px leave a tail of 2 of 8 layers" in text for text in near.reasons)
    far = recommend(rows, pay=0.01)  # two doublings take two points, more than evenness may cost
    assert (far.size, far.even) == (32, False)
    assert any("a tail remains: 2 of 8" in text for text in far.reasons)
    assert recommend(rows, pay=0.01, images=500).size == 64  # 500 images cannot tell two points
    assert recommend(rows, pay=0.01, images=5000).size == 32
    assert recommend(rows, budget=10**8).size == 64  # worth the same, and no tail
    nowhere = recommend([reading(32, 0.6, saturations=TAILED), reading(64, 0.6, saturations=TAILED)], pay=0.001)
    assert nowhere.size == 32


def test_a_tail_of_one_layer_in_eight_is_none() -> None:
    assert reading(32, 0.6, saturations=(0.5,) * 7 + (0.01,)).even
    assert not reading(32, 0.6, saturations=(0.5,) * 6 + (0.01,)).even


def test_a_tail_never_moves_the_choice_to_a_smaller_size() -> None:
    assert recommend([reading(16, 0.6), reading(32, 0.604, saturations=TAILED)], pay=0.001).size == 32


def test_evenness_may_cost_one_standard_error_of_the_accuracy() -> None:
    rows = [reading(32, 0.6, saturations=TAILED), reading(64, 0.6)]
    assert recommend(rows, pay=0.015, images=500).size == 32  # 3 points; sqrt(0.6 * 0.4 / 500) is 2.2
    rows = [reading(16, 0.6), reading(32, 0.95, saturations=TAILED), reading(64, 0.965)]
    assert recommend(rows, pay=0.02, images=100).size == 32  # 2.5 points; 2.2 at an accuracy of 95 %, 2.9 at a worth of 91 %
    assert recommend(rows, pay=0.02, images=50).size == 64  # 3.1 points


def test_the_order_of_the_readings_says_nothing() -> None:
    even = [reading(s, 0.6) for s in (64, 16, 32)]
    assert recommend(even, pay=0.0).size == 16
    tailed = [reading(16, 0.6, saturations=TAILED), reading(64, 0.6), reading(32, 0.6)]
    assert recommend(tailed, pay=0.0).size == 32


def test_the_choice_is_among_the_longest_trainings_within_the_budget() -> None:
    rows = [reading(16, 0.6, 1), reading(32, 0.7, 1), reading(64, 0.7, 1), reading(32, 0.7, 3), reading(64, 0.8, 3)]
    assert recommend(rows).size == 64
    assert recommend(rows, pay=0.5).size == 32  # 16 px is worth more, and was dropped
    tight = recommend(rows, budget=1000 * 32 * 32, images=400)
    assert tight.size == 32
    assert any("over the budget of 1,024,000 MACs: 64 px" in text for text in tight.reasons)
    assert 64 not in {**tight.fitted, **tight.worth}
    assert any("standard error of 2.3 points" in text for text in tight.reasons)
    with pytest.raises(UsageError, match="no size is within 5 MACs; the cheapest takes 256,000"):
        recommend(rows, budget=5)
    for budget in (None, 5):
        with pytest.raises(UsageError, match="one reading at least, got none"):
            recommend([], budget=budget)


def test_between_sizes_of_the_same_macs_the_accuracies_decide() -> None:
    same = [SizeReading(size=s, macs=1000, accuracy=a, epochs=1) for s, a in ((16, 0.08), (24, 0.24))]
    assert fitted_accuracy(same) == pytest.approx({16: 0.08, 24: 0.24})
    found = recommend(same)
    assert found.size == 24
    assert found.reasons[0] == "from 16 to 24 px the fitted accuracy changes by +16.0 points at the same MACs: it pays"
    assert recommend([replace(r, accuracy=0.24 - i / 10) for i, r in enumerate(same)]).size == 16
    values = ((8, 500, 0.1), (32, 4000, 0.5), (40, 4000, 0.4), (48, 9000, 0.6))
    line = [SizeReading(size=s, macs=m, accuracy=a, epochs=1) for s, m, a in values]
    fitted = fitted_accuracy(line)
    assert fitted[32] - fitted[40] == pytest.approx(0.1)
    level = {r.size: a for r, a in zip(line, (0.1, 0.45, 0.45, 0.6))}
    assert (fitted[32] + fitted[40]) / 2 == pytest.approx(fitted_accuracy([replace(r, accuracy=level[r.size]) for r in line])[32])


def test_sizes_of_the_same_macs_are_told_apart_at_each_length_of_training() -> None:
    twice = [
        SizeReading(size=s, macs=1000, accuracy=a + gain, epochs=e)
        for e, gain, kept in ((1, 0.0, 3), (3, 0.2, 2))
        for s, a in ((16, 0.5), (20, 0.4), (24, 0.3))[:kept]
    ]
    fitted = fitted_accuracy(twice)
    assert fitted[16] - fitted[20] == pytest.approx(0.1)
    assert fitted[20] - fitted[24] == pytest.approx(0.1)


def test_few_images_that_are_all_right_leave_a_standard_error() -> None:
    perfect = recommend([reading(16, 1.0), reading(32, 1.0)], images=6)
    assert perfect.reasons[-1] == "an accuracy from 6 images has a standard error of 7.1 points"
    assert recommend([reading(16, 0.0), reading(32, 0.0)], images=6).reasons[-1] == perfect.reasons[-1]


def test_no_size_better_than_a_guess_is_said() -> None:
    rows = [reading(16, 0.11), reading(32, 0.09), reading(64, 0.12)]
    poor = recommend(rows, images=500, chance=0.1)
    rest = "and accuracy cannot tell them apart: train for more epochs"
    assert poor.reasons[0] == f"no size is clearly better than a guess (10.0 %) on 500 images, {rest}"
    below = recommend([reading(16, 0.1), rows[1]], images=500, chance=0.1)
    assert below.reasons[0] == f"no size is better than a guess (10.0 %), {rest}"
    assert not any("paying" in reason or "pays" in reason for reason in poor.reasons)
    assert "it pays" in recommend([*rows[:2], reading(64, 0.2)], images=500, chance=0.1).reasons[0]
    assert not any("guess" in reason for reason in recommend(rows, images=500).reasons)


def test_a_single_size_was_compared_with_nothing() -> None:
    assert recommend([reading(32, 0.5)]).reasons[0] == "nothing was compared: 32 px is the only size left"


@pytest.mark.parametrize("pay", [-0.1, math.nan, math.inf])
def test_a_price_that_is_no_number_is_refused(pay: float) -> None:
    for call in (price, recommend, worth):
        with pytest.raises(UsageError, match=f"a number and not negative, got {pay}"):
            price(pay, None) if call is price else call([reading(16, 0.5)], pay=pay)


def test_halving_keeps_the_sizes_of_most_worth_of_the_last_rung() -> None:
    rows = [reading(16, 0.3), reading(24, 0.5), reading(32, 0.6), reading(48, 0.61), reading(64, 0.61)]
    assert survivors(rows, 3) == (32, 48, 64)
    assert survivors(rows, 3, pay=0.05) == (24, 32, 48)
    assert survivors([*rows, reading(32, 0.62, 2), reading(64, 0.66, 2)], 5) == (32, 64)
