from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
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
        assert 1 / len(values) - 1e-9 <= e.evenness(values) <= 1


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


@pytest.fixture(scope="module")
def figures(shared: Path) -> dict:
    return json.loads((shared / "theory" / "saturation_published.json").read_text())["figures"]


def conv_layers(figure: dict) -> list[float | None]:
    """Saturations of the convolutions; the dense layers, which some figures show behind them, are not part of the summaries."""
    return figure["saturation"][: figure["summary"]["layers"]]


def bridged(values: list[float | None]) -> list[float]:
    """Layers that could not be read off a figure, on the line between their neighbours."""
    known = [i for i, v in enumerate(values) if v is not None]
    return np.interp(range(len(values)), known, [values[i] for i in known]).tolist()


def test_published_summaries_of_all_curves(figures: dict) -> None:
    assert len(figures) == 13
    for name, figure in figures.items():
        values, summary = conv_layers(figure), figure["summary"]
        assert e.mean(values) == pytest.approx(summary["mean_saturation"], abs=5.01e-4), name
        assert e.coefficient_of_variation(values) == pytest.approx(summary["coefficient_of_variation"], abs=5.01e-3), name
        # the summary counts every drawn layer, also one that could not be read; the function leaves absent layers out
        assert e.tail_length(bridged(values)) == summary["trailing_layers_below_quarter_of_max"], name
        unread = name == "ResNet34 border"  # by the definition 17 layers trail; one of them, between 0.024 and 0.024, is not readable
        assert e.tail_length(values) == summary["trailing_layers_below_quarter_of_max"] - unread, name


def test_a_quarter_of_the_maximum_separates_the_published_curves(figures: dict) -> None:
    tails = {name: e.tail_length(conv_layers(figure)) for name, figure in figures.items()}
    assert sorted(tails.values()) == [0, 0, 0, 1, 2, 5, 5, 5, 6, 7, 8, 16, 17]
    for family in ("ResNet18", "ResNet34", "VGG16"):
        accuracy: dict[bool, list[float]] = {True: [], False: []}
        for name, figure in figures.items():
            if name.startswith(family) and "90 epochs" not in name:  # the others were trained for 30
                accuracy[tails[name] >= 5].append(figure["test_accuracy"])
        assert max(accuracy[True]) < min(accuracy[False]), family


def test_published_pattern(figures: dict) -> None:
    plain = figures["ResNet18 Cifar10 32"]["saturation"]
    repaired = figures["ResNet18 without the first two downsamplings, CIFAR-10 32px (delve README), test 91.95%"]["saturation"]
    assert (len(plain), e.tail_length(plain), round(e.coefficient_of_variation(plain), 2)) == (17, 8, 0.83)
    assert (len(repaired), e.tail_length(repaired), round(e.coefficient_of_variation(repaired), 2)) == (17, 1, 0.38)
    assert e.mean(plain) == pytest.approx(e.mean(repaired), abs=0.01)
    assert e.evenness(repaired) > e.evenness(plain) + 0.2
