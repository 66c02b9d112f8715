from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capnas.measures import evenness as e

VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(VALUES)
def test_gini_equals_its_pairwise_definition(values: list[float]) -> None:
    total, count = sum(values), len(values)
    expected = 0.0 if total == 0 else sum(abs(a - b) for a in values for b in values) / (2 * count * total)
    assert e.gini(values) == pytest.approx(expected, abs=1e-9)


@given(VALUES, st.floats(0.01, 100))
def test_evenness_ignores_scale_and_order(values: list[float], scale: float) -> None:
    if sum(values) > 1e-6:
        assert e.evenness([scale * v for v in reversed(values)]) == pytest.approx(e.evenness(values), abs=1e-9)
        assert 0 <= e.evenness(values) <= 1


def test_degenerate_profiles() -> None:
    assert math.isnan(e.evenness([]))
    assert math.isnan(e.mean([None, float("nan")]))
    assert math.isnan(e.tail_fraction([]))
    assert math.isnan(e.gini([]))
    assert e.evenness([0.0, 0.0]) == 0
    assert math.isnan(e.coefficient_of_variation([0.0]))
    assert e.tail_length([0.0, 0.0]) == 0


def test_tail_counts_only_the_end() -> None:
    assert e.tail_length([0.01, 0.8, 0.01, 0.8]) == 0
    assert e.tail_length([0.8, 0.19, 0.01]) == 2
    assert e.tail_fraction([0.8, 0.19, 0.01, 0.1]) == 0.75


def test_published_pattern(shared: Path) -> None:
    figures = json.loads((shared / "theory" / "saturation_published.json").read_text())["figures"]
    plain = figures["ResNet18 Cifar10 32"]["saturation"]
    repaired = figures["ResNet18 without the first two downsamplings, CIFAR-10 32px (delve README), test 91.95%"]["saturation"]
    assert (len(plain), e.tail_length(plain), round(e.coefficient_of_variation(plain), 2)) == (17, 8, 0.83)
    assert (len(repaired), e.tail_length(repaired), round(e.coefficient_of_variation(repaired), 2)) == (17, 1, 0.38)
    assert e.mean(plain) == pytest.approx(e.mean(repaired), abs=0.01)
    assert e.evenness(repaired) > e.evenness(plain) + 0.2
