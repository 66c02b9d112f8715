"""Scores of capacity: limits, permutation and scale invariance, errors."""

from __future__ import annotations

import math

import pytest
import torch

from capnas.errors import UsageError
from capnas.measures.capacity_scores import (
    capacity_balance,
    coverage,
    depth_evenness,
    propagation,
    scaling,
    usage,
    utilisation_evenness,
)


def test_balance() -> None:
    assert capacity_balance([1, 1], [30, 10]) == pytest.approx(0.75)
    assert capacity_balance([3, 9, 6], [1, 3, 2]) == pytest.approx(1)
    assert capacity_balance([10, 0], [1, 1]) == capacity_balance([0, 20], [5, 5]) == pytest.approx(0.5)


def test_utilisation_evenness_is_one_minus_the_gini_of_the_parameters() -> None:
    used, counts = [0.9, 0.2, 0.5], [1, 3, 2]
    per_parameter = [0.9] + [0.2] * 3 + [0.5] * 2
    mean = sum(per_parameter) / 6
    gini = sum(abs(a - b) for a in per_parameter for b in per_parameter) / (2 * 36 * mean)
    assert utilisation_evenness(used, counts) == pytest.approx(1 - gini)
    assert utilisation_evenness([0.0, 0.0], [1, 1]) == 0


def test_depth_evenness() -> None:
    assert depth_evenness([5, 5, 5, 5]) == pytest.approx(1)
    assert depth_evenness([0, 7, 0, 0]) == pytest.approx(0.25)
    assert depth_evenness([1, 2, 3]) == pytest.approx(depth_evenness([30, 10, 20]))
    assert depth_evenness([1, 2, 3]) < 1


def test_coverage() -> None:
    flat, peak = torch.ones(4, 4), torch.zeros(4, 4)
    peak[1, 2] = 3
    assert coverage(flat) == pytest.approx(1)
    assert coverage(peak) == pytest.approx(1 / 16)
    assert coverage(peak - 0.5 * (peak == 0)) == pytest.approx(1 / 16)
    assert coverage(peak, target=peak) == pytest.approx(1)
    assert coverage(peak, target=flat) == pytest.approx(1 / 16)
    half = torch.cat([torch.ones(8), torch.zeros(8)])
    assert coverage(peak, control=half) == pytest.approx(1 / 8)


def test_propagation_loses_on_both_sides() -> None:
    assert propagation(13.9) == pytest.approx(0.18, abs=5e-3)
    assert propagation(-math.log(0.187)) == pytest.approx(0.64, abs=5e-3)
    assert propagation(0) == 0
    assert propagation(0.05) > propagation(0.01)
    assert propagation(0.05) > propagation(1.0)


def test_scaling_is_symmetric_in_the_logarithm() -> None:
    assert scaling(3.0) == pytest.approx(scaling(1 / 3))
    assert scaling(0.0) == scaling(0.001) == pytest.approx(0.01)
    assert scaling(2.0, reference=2.0) == 1


def test_usage() -> None:
    assert usage([3, 1], [4, 12]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity_balance([1.0], [1, 2]), "one value per layer, got 1 and 2"),
        (lambda: utilisation_evenness([0.5, 0.5], [1]), "used and n_params must have one value per layer, got 2 and 1"),
        (lambda: capacity_balance([0.0], [1]), "capacity must be non-negative finite values with a positive sum"),
        (lambda: depth_evenness([1.0, float("nan")]), "capacity must be non-negative"),
        (lambda: depth_evenness([]), "positive sum"),
        (lambda: coverage(torch.ones(2), target=torch.ones(3)), "target must have the shape"),
        (lambda: propagation(-1.0), "shattering must be 0 or positive"),
        (lambda: scaling(float("nan")), "residual_sum must be 0 or positive"),
        (lambda: usage([1.0], [0]), "n_params must have a positive sum"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
