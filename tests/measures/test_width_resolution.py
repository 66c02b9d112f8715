"""Width against resolution: a grid from a cross."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from capnas.errors import UsageError
from capnas.measures.width_resolution import best_within, cross, predicted_grid


def test_a_grid_without_interaction_is_predicted_exactly() -> None:
    truth = {(w, r): 1 / (1 + math.exp(-(math.log(w) + 0.01 * r))) for w in (0.25, 0.5, 1.0) for r in (32, 64, 96)}
    for width, resolution in ((None, None), (0.5, 64), (1.0, 96)):
        known = {cell: truth[cell] for cell in cross(truth, width=width, resolution=resolution)}
        assert len(known) == 5
        assert predicted_grid(known) == pytest.approx(truth)


def test_what_is_no_cross_is_refused() -> None:
    with pytest.raises(UsageError, match="one width at every resolution"):
        predicted_grid({(0.5, 32): 0.5, (1.0, 64): 0.6})
    with pytest.raises(UsageError, match=r"in \(0, 1\) for log odds, got 1"):
        predicted_grid({(0.5, 32): 1.0})
    with pytest.raises(UsageError, match="no cell is within 1 MACs; the cheapest takes 2"):
        best_within({(0.5, 32): 0.5}, {(0.5, 32): 2}, 1)


def test_the_published_grid_of_mobilenet_v2(shared: Path) -> None:
    with (shared / "data" / "mobilenet_v2_width_x_resolution.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if float(r["width"]) <= 1]
    macs = {(float(r["width"]), int(r["resolution"])): float(r["macs_M"]) for r in rows}
    truth = {(float(r["width"]), int(r["resolution"])): float(r["top1"]) / 100 for r in rows}
    chosen = cross(truth)
    assert sum(macs[c] for c in chosen) / sum(macs.values()) < 0.16
    values = predicted_grid({c: truth[c] for c in chosen})
    regrets = [truth[best_within(truth, macs, b)] - truth[best_within(values, macs, b)] for b in macs.values()]
    assert max(regrets) < 0.0101
    assert sum(r <= 0.005 for r in regrets) >= 18
