"""What the product does by default is what the committed studies support."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from capnas.objective.gates import RANKED_BY
from capnas.objective.targets import PRINCIPLED, WEIGHTS
from capnas.scoring import CAPACITY_WEIGHTS

RANKING = Path(__file__).resolve().parent.parent / "results" / "ranking"
SPACES = ("nasbench201", "nasbench101", "macro")
COSTS = ("params", "macs")


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads((RANKING / "summary.json").read_text())


def test_the_tables_are_of_the_weights_that_are_shipped(summary: dict[str, Any]) -> None:
    assert summary["weights"] == dict(CAPACITY_WEIGHTS)
    fitted = json.loads((RANKING / "fit.json").read_text())
    assert {term: weight for term, weight in fitted[0]["weights"].items() if weight} == dict(CAPACITY_WEIGHTS)


def test_the_score_is_never_below_the_costs_where_all_networks_are_of_like_size(summary: dict[str, Any]) -> None:
    for name in SPACES:
        signals = {signal: row["spearman"] for signal, row in summary["spaces"][name]["signals"].items()}
        assert signals["capacity_score"] > max(signals[cost] for cost in COSTS if cost in signals), name


def test_the_score_is_above_the_costs_on_average_over_all_spaces(summary: dict[str, Any]) -> None:
    signals = [summary["spaces"][name]["signals"] for name in (*SPACES, "timm", "mbconv")]
    mean = {name: statistics.mean(s[name]["spearman"] for s in signals) for name in ("capacity_score", *COSTS)}
    assert mean["capacity_score"] > max(mean[cost] for cost in COSTS) + 0.02


def test_the_room_between_blocks_is_what_the_score_needs_where_size_varies(summary: dict[str, Any]) -> None:
    for name in ("timm", "mbconv"):
        assert summary["spaces"][name]["signals"]["log2_activations"]["spearman"] > 0.3
    for name in ("nasbench201", "nasbench101"):
        assert "log2_activations" not in summary["spaces"][name]["signals"]  # the same for all cells


def test_the_score_is_above_every_baseline_on_average(summary: dict[str, Any]) -> None:
    cells, blocks = (summary["spaces"][name]["signals"] for name in ("nasbench201", "macro-proxies"))
    own = cells["capacity_score"]["spearman"] + blocks["capacity_score"]["spearman"]
    for published, ours in (("published naswot", "naswot"), ("published logsynflow", "synflow")):
        assert own > cells[published]["spearman"] + blocks[ours]["spearman"]


def test_every_term_of_the_score_is_a_signal_of_its_own_or_helps_the_others(summary: dict[str, Any]) -> None:
    signals = [summary["spaces"][space]["signals"] for space in SPACES]
    mean = {term: statistics.mean(s[term]["spearman"] for s in signals if term in s) for term in (*CAPACITY_WEIGHTS, "capacity_score")}
    assert mean["capacity_score"] == max(mean.values())


def test_the_sum_ranks_better_than_the_short_training_in_it(summary: dict[str, Any]) -> None:
    for name in ("nasbench201", "nasbench101", "mbconv"):
        signals = summary["spaces"][name]["signals"]
        for statistic in ("spearman", "top_half"):
            assert signals["combined"][statistic] > signals["short_accuracy"][statistic], name


@pytest.fixture(scope="module")
def combined() -> dict[str, Any]:
    return {row["choice"]: row for row in json.loads((RANKING / "combined.json").read_text())}


def test_the_weights_of_the_sum_are_those_of_its_study(combined: dict[str, Any]) -> None:
    shipped, alone = combined["shipped"], combined["accuracy alone"]
    assert {"init_" + name: weight for name, weight in shipped["weights"].items()} == dict(WEIGHTS)
    assert shipped["mean"] > alone["mean"] + 0.15
    assert shipped["mean_behind"] < min(row["mean_behind"] for row in combined.values()) + 0.1
    assert shipped["mean_behind"] < alone["mean_behind"] / 1.5


@pytest.mark.xfail(strict=True, reason="shipped weights rank 0.03 below the fitted ones: halved after a bad search, see combine.py")
def test_the_weights_of_the_sum_rank_as_well_as_the_best(combined: dict[str, Any]) -> None:
    assert combined["shipped"]["mean"] > max(row["mean"] for row in combined.values()) - 0.01


def test_the_sum_was_not_fitted_to_one_space(combined: dict[str, Any]) -> None:
    for left in ("nasbench201", "nasbench101", "mbconv"):
        row = combined[f"fitted on all but {left}"]
        unseen, alone = (statistics.mean(r["reached"][left]) for r in (row, combined["accuracy alone"]))
        assert unseen > alone + 0.1, left


def test_every_term_of_the_sum_helps_the_others_and_no_other_does(combined: dict[str, Any]) -> None:
    best = combined["fitted on all"]["mean"]
    for name in WEIGHTS:
        assert combined[f"without {name.removeprefix('init_')}"]["mean"] < best - 0.002, name
    for choice in (c for c in combined if c.startswith("with ")):
        assert combined[choice]["mean"] < best + 0.01, choice


def test_the_preset_of_the_three_theories_is_the_best_choice_of_its_study() -> None:
    named = json.loads((RANKING / "principled.json").read_text())
    assert named["best on average"]["weights"] == named["shipped"]["weights"] == dict(PRINCIPLED)
    assert named["shipped"]["mean"] > named["accuracy alone"]["mean"]


def test_the_defaults_are_the_score() -> None:
    assert RANKED_BY == "capacity_score"
    assert all(name.startswith("init_") for name in WEIGHTS)  # known before any training
