"""The table of the resolution study: what it says is missing, and how many recommendations had sizes to compare."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import module_of

FOLDER = Path(__file__).resolve().parent.parent / "results" / "resolution"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return module_of(FOLDER / "table.py")


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
        numbers = {"regret": regret, "error": 0.1, "sweep": 0.0, "no dearer": 0.0, "random": 1.0, "largest": 2 * regret}
        numbers |= {"macs": 30.0, "cpu": 20.0}
        return {"tuned": {"seed": seed, "runs": [{"size": size} for size in range(sizes)]}, **numbers}

    found = [case(0, 0.0, 1), case(0, 0.9, 3), case(0, 0.2, 2), case(1, 0.1, 2)]
    text = table.summary("All", found)
    assert "regret at most 0.5 points in 3 of 4 (2 of 3 of seed 0 alone; in 1 of these the border rule left one size" in text
    assert "nothing was compared: 2 of 3 of the others, 1 of 2 of seed 0)" in text
    assert "Always the largest size affordable: at most 0.5 points in 3 of 4, mean regret 0.60." in text
    assert "(2 of 2 of seed 0 alone), at most" in table.summary("All", [case(0, 0.1, 2)] * 2)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "raw" / f"{name}.jsonl").read_text().splitlines()]


def test_the_table_is_derived_from_what_is_committed(table: ModuleType, tmp_path: Path) -> None:
    published = FOLDER.parent / "ranking" / "raw" / "mobilenetv2.jsonl"
    table.write_all(tmp_path, rows("full"), rows("tuned"), published)
    for name in ("table.md", "figure.svg"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text(), name
    assert "## Width against resolution, MobileNetV2" in (FOLDER / "table.md").read_text()


def test_a_table_is_left_alone_where_published_accuracies_are_missing(table: ModuleType, tmp_path: Path) -> None:
    lines = (FOLDER.parent / "ranking" / "raw" / "mobilenetv2.jsonl").read_text().splitlines()
    (tmp_path / "table.md").write_text("as it was")
    with pytest.raises(FileNotFoundError):
        table.write_all(tmp_path, [], [], tmp_path / "none.jsonl")
    others = [line for line in lines if not ('"mobilenetv2-0.5"' in line and '"img_size": 96' in line)]
    (tmp_path / "some.jsonl").write_text("\n".join(others))
    with pytest.raises(ValueError, match=r"lacks cells of MobileNetV2: \[\(0\.5, 96\)\]"):
        table.write_all(tmp_path, [], [], tmp_path / "some.jsonl")
    assert (tmp_path / "table.md").read_text() == "as it was"
