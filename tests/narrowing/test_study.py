"""The study of pruning: one line per network, rivals chosen once per model, means of the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import module_of

FOLDER = Path(__file__).resolve().parents[2] / "results" / "pruning"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return module_of(FOLDER / "run.py")


def line(method: str, seed: int, accuracy: float, **what: Any) -> dict[str, Any]:
    scope = "" if method in ("unpruned", "projection") or method.startswith("capnas") else "global"
    return {"data": "fashion", "model": "convnext", "seed": seed, "method": method, "scope": scope, "ratio": 0.5, "kept": 0.5, "epochs": 5,
            "accuracy": accuracy} | what  # fmt: skip


def test_a_network_has_one_line(study: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "raw.jsonl"
    study.write(path, [line("Taylor", 0, 0.1), line("LAMP", 0, 0.2), line("Taylor", 0, 0.3), line("Taylor", 0, 0.4, epochs=1)])
    assert [(x["method"], x["accuracy"]) for x in study.read(path)] == [("Taylor", 0.3), ("LAMP", 0.2), ("Taylor", 0.4)]
    for file in (FOLDER / "raw").glob("*.jsonl"):
        keys = [tuple(x[k] for k in study.KEY) for x in map(json.loads, file.read_text().splitlines())]
        assert len(keys) == len(set(keys)), file.name


def test_rivals_for_long_tuning_are_chosen_once_over_the_seeds(study: ModuleType) -> None:
    one = {"epochs": 1}
    lines = [line("unpruned", s, 0.9, ratio=1.0, **one) for s in (0, 1)]
    lines += [line("capnas loss", s, 0.9, **one) for s in (0, 1)]
    for method, first, second in (("Taylor", 0.8, 0.5), ("LAMP", 0.7, 0.7), ("FPGM", 0.6, 0.9)):
        lines += [line(method, 0, first, **one), line(method, 1, second, **one)]
    lines.append(line("random", 0, 0.99, **one))  # of one seed only
    assert study.best_rivals(lines, 2) == ["FPGM", "LAMP"]


def test_means_are_of_the_same_seeds(study: ModuleType) -> None:
    lines = [line("unpruned", s, a, ratio=1.0) for s, a in ((0, 0.80), (1, 0.82), (2, 0.90))]
    lines += [line("capnas loss", 0, 0.79), line("capnas loss", 1, 0.81), line("LAMP", 0, 0.70)]
    table = study.Table(lines, 0.5, 5)
    assert table.lost("convnext", "capnas loss")[0] == pytest.approx(1.0)
    assert table.best_rival("convnext") == (None, None)  # LAMP lacks a seed
    text = "\n".join(table.text())
    assert "| method | convnext (2 seeds) | kept MACs |" in text
    assert "| unpruned | 81.0 ± 1.4 | 1.00 |" in text
    assert "| LAMP | 70.0 (n = 1) | 0.50 to 0.50 |" in text


def test_the_committed_table_is_of_the_committed_lines(study: ModuleType) -> None:
    lines = [x for path in sorted((FOLDER / "raw").glob("*.jsonl")) for x in study.read(path)]
    text = study.derived(lines)
    assert text == (FOLDER / "table.md").read_text(encoding="utf-8")
    assert "| data | model | lost | no refit | rival | again | ratios | tuned 1 | tuned 5 |" in text
