"""The table of the resolution study: what it says is missing, and how many recommendations had sizes to compare."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "results" / "resolution"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resolution_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_missing_is_told_for_each_seed(table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [f"{data} {name}" for data, names in table.NETWORKS.items() for name in names]
    found = [{"tuned": {"case": case, "seed": seed}} for seed in table.SEEDS for case in cases for _ in range(2)]
    effects = [{"network": n, "effect": e, "seed": seed} for seed in table.SEEDS for n, e in table.EFFECTS]
    monkeypatch.setattr(table, "judged", lambda full, tuned: found)
    assert table.missing(effects, []) == ""
    found.remove({"tuned": {"case": "clothing short", "seed": 1}})
    effects.remove({"network": "vgg16", "effect": "canvas", "seed": 1})
    assert table.missing(effects, []) == ("Seed 1 is incomplete: clothing short, effect vgg16 canvas missing; `run.py` again goes on.")


def test_recommendations_without_a_comparison_are_counted_apart(table: ModuleType) -> None:
    def case(seed: int, regret: float, sizes: int) -> dict[str, Any]:
        numbers = {"regret": regret, "error": 0.1, "sweep": 0.0, "no dearer": 0.0, "random": 1.0, "macs": 30.0, "cpu": 20.0}
        return {"tuned": {"seed": seed, "runs": [{"size": size} for size in range(sizes)]}, **numbers}

    found = [case(0, 0.0, 1), case(0, 0.9, 3), case(0, 0.2, 2), case(1, 0.1, 2)]
    text = table.summary("All", found)
    assert "regret at most 0.5 points in 3 of 4 (2 of 3 of seed 0 alone; in 1 of these the border rule left one size" in text
    assert "nothing was compared: 2 of 3 of the others, 1 of 2 of seed 0)" in text
    assert "(2 of 2 of seed 0 alone), at most" in table.summary("All", [case(0, 0.1, 2)] * 2)
