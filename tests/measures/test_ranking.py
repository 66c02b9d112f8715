"""Rank correlations against scipy, against the closed form of one control, and in degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from capnas.measures.ranking import chance_level, partial_spearman, spearman


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scipy_also_with_ties(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 25)).astype(float)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_one_control_agrees_with_the_closed_form(seed: int) -> None:
    x, y, z = np.random.default_rng(seed).normal(size=(3, 20))
    xy, xz, yz = spearman(x, y), spearman(x, z), spearman(y, z)
    assert partial_spearman(x, y, [z]) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-9)


def test_two_controls_agree_with_the_inverse_of_the_correlation_matrix() -> None:
    values = np.random.default_rng(0).normal(size=(4, 30))
    precision = np.linalg.inv(np.corrcoef(stats.rankdata(values, axis=1)))
    expected = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    assert partial_spearman(values[0], values[1], values[2:]) == pytest.approx(expected, abs=1e-9)


def test_only_order_counts() -> None:
    x, y, z = np.random.default_rng(1).normal(size=(3, 15))
    assert partial_spearman(np.exp(x), y**3, [2 * z + 5]) == partial_spearman(x, y, [z])
    assert partial_spearman(-x, y, [z]) == -partial_spearman(x, y, [z])


def test_a_score_that_only_measures_size_has_nothing_left() -> None:
    size = [1.0, 5.0, 2.0, 8.0, 4.0, 9.0]
    assert math.isnan(partial_spearman([v**2 for v in size], [3, 1, 4, 1, 5, 9], [size]))


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, math.nan, 3], [1, 2, 3]), ([], [])])
def test_no_answer_where_there_is_none(x: list[float], y: list[float]) -> None:
    assert math.isnan(spearman(x, y))


def test_chance_level_is_the_threshold_of_the_t_test() -> None:
    level = chance_level(20, controls=2)
    t = level * math.sqrt(16 / (1 - level**2))
    assert 2 * stats.t.sf(t, 16) == pytest.approx(0.05)
    assert math.isnan(chance_level(3, controls=1))
