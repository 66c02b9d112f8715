"""What the product does by default is what the committed studies support."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capnas.objective.gates import RANKED_BY
from capnas.objective.targets import PRINCIPLED, WEIGHTS
from capnas.scoring import CAPACITY_WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
RANKING = RESULTS / "ranking"
SPACES = ("nasbench201", "nasbench101", "macro")
ALL = (*SPACES, "timm", "mbconv")
COSTS = ("params", "macs")
BASELINES = ("naswot", "synflow", "zico", "snip", "grad_norm")
MEASURED = ("nasbench201-all", "nasbench101-all", "macro-all", "mbconv")  # with every baseline in the same run


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads((RANKING / "summary.json").read_text())


def test_the_tables_are_of_the_weights_that_are_shipped(summary: dict[str, Any]) -> None:
    assert summary["weights"] == dict(CAPACITY_WEIGHTS)
    assert summary["sum"] == dict(WEIGHTS)
    fitted = json.loads((RANKING / "fit.json").read_text())
    assert {term: weight for term, weight in fitted[0]["weights"].items() if weight} == dict(CAPACITY_WEIGHTS)


def test_the_score_is_never_below_the_costs_where_all_networks_are_of_like_size(summary: dict[str, Any]) -> None:
    for name in SPACES:
        signals = {signal: row["spearman"] for signal, row in summary["spaces"][name]["signals"].items()}
        assert signals["capacity_score"] > max(signals[cost] for cost in COSTS if cost in signals), name


def test_the_score_is_above_the_costs_on_average_over_all_spaces(summary: dict[str, Any]) -> None:
    signals = [summary["spaces"][name]["signals"] for name in ALL]
    mean = {name: statistics.mean(s[name]["spearman"] for s in signals) for name in ("capacity_score", *COSTS)}
    assert mean["capacity_score"] > max(mean[cost] for cost in COSTS) + 0.02


def test_the_room_between_blocks_is_what_the_score_needs_where_size_varies(summary: dict[str, Any]) -> None:
    for name in ("timm", "mbconv"):
        assert summary["spaces"][name]["signals"]["log2_activations"]["spearman"] > 0.3
    for name in ("nasbench201", "nasbench101"):
        assert "log2_activations" not in summary["spaces"][name]["signals"]  # the same for all cells


def test_the_score_is_above_every_baseline_on_each_space_where_all_were_measured(summary: dict[str, Any]) -> None:
    for space in MEASURED:
        signals = {name: row["spearman"] for name, row in summary["spaces"][space]["signals"].items()}
        assert signals["capacity_score"] > max(signals[name] for name in BASELINES), space


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


@pytest.mark.xfail(strict=True, reason="shipped weights rank 0.03 below the fitted ones: halved after bad searches, see combine.py")
def test_the_weights_of_the_sum_rank_as_well_as_the_best(combined: dict[str, Any]) -> None:
    assert combined["shipped"]["mean"] > max(row["mean"] for row in combined.values()) - 0.01


def test_the_sum_was_not_fitted_to_one_space(combined: dict[str, Any]) -> None:
    for left in ("nasbench201", "nasbench101", "mbconv"):
        row = combined[f"fitted on all but {left}"]
        unseen, alone = (statistics.mean(r["reached"][left]) for r in (row, combined["accuracy alone"]))
        assert unseen > alone + 0.1, left


@pytest.fixture(scope="module")
def unseen() -> dict[str, list[float]]:
    """Space to Spearman over all and over the better half, of the score's terms with weights fitted on the other spaces."""
    fits = {row["fitted_on"]: row for row in json.loads((RANKING / "fit.json").read_text()) if row["terms"] == "shipped terms"}
    for name in ALL:
        assert {term for term, weight in fits[f"all but {name}"]["weights"].items() if weight} == set(CAPACITY_WEIGHTS)
    return {name: fits[f"all but {name}"]["reached"][name] for name in ALL}


def test_the_score_was_not_fitted_to_one_space(unseen: dict[str, list[float]], summary: dict[str, Any]) -> None:
    signals = {name: summary["spaces"][name]["signals"] for name in ALL}
    for name in SPACES:
        for cost in (c for c in COSTS if c in signals[name]):
            assert unseen[name][0] > signals[name][cost]["spearman"] + 0.1, name
    for name in ALL:
        assert unseen[name][0] > signals[name]["capacity_score"]["spearman"] - 0.06, name
    assert statistics.mean(r for r, _ in unseen.values()) > statistics.mean(s["macs"]["spearman"] for s in signals.values()) + 0.04


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


def table_row(document: Path, start: str) -> str:
    """The one row of a Markdown table that begins so."""
    rows = [line for line in document.read_text().splitlines() if line.startswith(f"| {start}")]
    assert len(rows) == 1, (document.name, start, len(rows))
    return rows[0]


def check_says(text: str, template: str, *values: float) -> None:
    """Numbers stand in the text where the template has braces, and are the values, rounded to the digits that are shown."""
    assert template.count("{}") == len(values)
    pattern = "([-+]?[0-9][0-9,]*(?:[.][0-9]+)?)".join(map(re.escape, template.split("{}")))
    found = re.search(pattern, text)
    assert found is not None, f"{template!r} is not in {text!r}"
    for shown, value in zip(found.groups(), values, strict=True):
        digits = len(shown.partition(".")[2])
        assert abs(float(shown.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-9, f"{template!r}: shown {shown}, measured {value:.5f}"


def test_numbers_in_a_text_are_compared_as_they_are_rounded() -> None:
    check_says("MACs 0.70, of 1,000 cells", "MACs {}, of {} cells", 0.7049, 1000)
    with pytest.raises(AssertionError, match=r"shown 0\.70, measured 0\.70600"):
        check_says("MACs 0.70", "MACs {}", 0.706)
    with pytest.raises(AssertionError, match="is not in"):
        check_says("MACs 0.70", "params {}", 0.70)


def test_the_readme_tells_how_the_score_ranks(summary: dict[str, Any], unseen: dict[str, list[float]]) -> None:
    spaces = summary["spaces"]
    signals = {name: spaces[name]["signals"] for name in ALL}
    rho = {name: {signal: row["spearman"] for signal, row in found.items()} for name, found in signals.items()}
    cells, readme = rho["nasbench201"], ROOT / "README.md"
    check_says(table_row(readme, "rank untrained networks"),
               "NAS-Bench-201 | {} (better half {}) | synflow {}, naswot {}, parameters {} | {} cells",
               cells["capacity_score"], signals["nasbench201"]["capacity_score"]["top_half"], cells["published logsynflow"],
               cells["published naswot"], cells["params"], spaces["nasbench201"]["architectures"])  # fmt: skip
    check_says(table_row(readme, "the same, NAS-Bench-101"), "| {}, {} | MACs {}, {} | {} and {} networks",
               *(rho[name][signal] for signal in ("capacity_score", "macs") for name in ("nasbench101", "macro")),
               *(spaces[name]["architectures"] for name in ("nasbench101", "macro")))  # fmt: skip
    check_says(table_row(readme, "the same where size varies"), "| {}, {} | MACs {}, {}; naswot {} on `mbconv` | {} published rows",
               *(rho[name][signal] for signal in ("capacity_score", "macs") for name in ("timm", "mbconv")), rho["mbconv"]["naswot"],
               spaces["timm"]["architectures"])  # fmt: skip
    check_says(table_row(readme, "the same terms, weights fitted without"), "| {}, {}, {}, {}, {} | as shipped {}, {}, {}, {}, {} |",
               *(unseen[name][0] for name in ALL), *(rho[name]["capacity_score"] for name in ALL))  # fmt: skip


def test_the_results_tell_how_the_score_ranks(summary: dict[str, Any], unseen: dict[str, list[float]]) -> None:
    rho = {name: {signal: row["spearman"] for signal, row in summary["spaces"][name]["signals"].items()} for name in ALL}
    row = table_row(RESULTS / "README.md", "[ranking]")
    mean = {signal: statistics.mean(rho[name][signal] for name in ALL) for signal in ("capacity_score", "macs", "params")}
    check_says(row, "of {} with final accuracy (MACs {}, params {})", *mean.values())
    check_says(row, "NAS-Bench-201, {} cells: {} (params {}, naswot {}, synflow {}); NAS-Bench-101, {} graphs: {} (MACs {})",
               summary["spaces"]["nasbench201"]["architectures"],
               *(rho["nasbench201"][s] for s in ("capacity_score", "params", "published naswot", "published logsynflow")),
               summary["spaces"]["nasbench101"]["architectures"], *(rho["nasbench101"][s] for s in ("capacity_score", "macs")))  # fmt: skip
    check_says(row, "its listed size, {} (MACs {})", *(rho["timm"][s] for s in ("capacity_score", "macs")))
    check_says(row, "5,761 images, {} (MACs {}, naswot {}, synflow {})",
               *(rho["mbconv"][s] for s in ("capacity_score", "macs", "naswot", "synflow")))  # fmt: skip
    found = [{name: signal["spearman"] for name, signal in summary["spaces"][space]["signals"].items()} for space in MEASURED]
    means = [statistics.mean(signals[name] for signals in found) for name in ("capacity_score", *BASELINES, "macs")]
    check_says(table_row(ROOT / "README.md", "the five published proxies"),
               "| {} | naswot {}, synflow {}, zico {}, snip {}, grad_norm {}; MACs {}", *means)  # fmt: skip
    check_says(row, "`mbconv` {} rows; timm not) the score has {} on average, naswot {}, synflow {}, zico {}, snip {}, grad_norm {}",
               summary["spaces"]["mbconv"]["architectures"], *means[:-1])  # fmt: skip
    left_out = "NAS-Bench-201 {} / {}, NAS-Bench-101 {} / {}, Macro {} / {}, timm {} / {}, `mbconv` {} / {}"
    check_says(row, left_out, *(value for name in ALL for value in unseen[name]))


def test_the_texts_tell_how_the_sum_ranks(summary: dict[str, Any], combined: dict[str, Any]) -> None:
    names = ("nasbench201", "nasbench101", "mbconv", "nasbench201-1-epoch")
    shipped, alone = ([combined[choice]["reached"][name][0] for name in names] for choice in ("shipped", "accuracy alone"))
    check_says(table_row(ROOT / "README.md", "`combined` after"), "| {}, {}, {}; {} | accuracy alone {}, {}, {}; {} |", *shipped, *alone)
    text = (ROOT / "README.md").read_text()
    both = [combined[choice]["mean"] for choice in ("fitted on all", "capacity_score and MACs, fitted")]
    check_says(" ".join(text.split()), "fitted alike, {} against {} of", *both)
    before = json.loads((RANKING / "untrained.json").read_text())
    assert before["weights"] == dict(WEIGHTS)
    known = [before["spaces"]["timm"][name][0] for name in ("combined, untrained part", "capacity_score")]
    check_says(" ".join(text.split()), "timm {} against {}", *known)
    means = (combined[choice]["mean"] for choice in ("shipped", "accuracy alone"))
    check_says(table_row(RESULTS / "README.md", "[ranking]"), "mean over all and better halves {}, of accuracy alone {}", *means)


SEARCHES = RESULTS / "search" / "raw"
LIMITS = ("cheapest third", "cheaper two thirds", "all")  # on MACs, of the simulated steering


@pytest.fixture(scope="module")
def searches() -> dict[str, list[dict[str, Any]]]:
    """Looked-up searches by method, those of capnas with today's weights only."""
    rows = [json.loads(line) for line in (SEARCHES / "tabular.jsonl").read_text().splitlines()]
    weights: dict[str, dict[str, float]] = {
        "capnas: gate": dict(CAPACITY_WEIGHTS),
        "capnas: combined": dict(WEIGHTS),
        "capnas: gate + combined": {**CAPACITY_WEIGHTS, **WEIGHTS},
    }
    return {m: [r for r in rows if r["method"] == m and r.get("weights", {}) == weights.get(m, {})] for m in {r["method"] for r in rows}}


def regret(rows: list[dict[str, Any]], cost: float) -> float:
    """Mean regret of searches at a cost in mean trainings, from their tracks."""
    space = json.loads((SEARCHES / "tabular_space.json").read_text())

    def at(row: dict[str, Any]) -> float:
        score = space["score_seconds"].get(row["score"], 0.0) / space["unit_seconds"]
        return float(next((t[3] for t in reversed(row["track"]) if t[0] + t[1] * score <= cost), space["blind"]))

    return statistics.mean(map(at, rows))


def test_the_texts_tell_what_a_looked_up_search_saves(searches: dict[str, list[dict[str, Any]]]) -> None:
    names = ("capnas: gate + combined", "capnas: gate", "TPE", "TPE as capnas sets it", "TPE started by synflow")
    twenty = {name: regret(searches[name], 20) for name in names}
    counts = [len(searches[name]) for name in names]
    seeds = sorted({min(counts), max(counts)})
    row = table_row(ROOT / "README.md", "regret of a search at the cost of 20 trainings")
    rivals = "TPE on accuracy {} (at the cost of 100: {}), as capnas sets it {}, started by synflow {}"
    check_says(row, f"| {{}} (gate), {{}} (gate and combined) | {rivals} | looked up, {' to '.join(['{}'] * len(seeds))} seeds",
               twenty["capnas: gate"], twenty["capnas: gate + combined"], twenty["TPE"], regret(searches["TPE"], 100),
               twenty["TPE as capnas sets it"], twenty["TPE started by synflow"], *seeds)  # fmt: skip
    assert seeds[0] >= 20
    pools = {(r["pool"], r["trainings"], r["gate"], r["named_by"]): r["regret"] for r in json.loads((SEARCHES / "pools.json").read_text())}
    gates = [pools[400, 5, gate, "accuracy"] for gate in ("unseen", "capacity_score", "synflow")]
    text = " ".join((ROOT / "README.md").read_text().split())
    check_says(text, "{} points behind after 5 trainings, with the shipped weights {}, by synflow {}", *gates)
    row = table_row(RESULTS / "README.md", "[search]")
    check_says(row, "at the cost of 20 trainings gate and combined value have {}", twenty["capnas: gate + combined"])
    check_says(row, "the gate alone {}, TPE started by synflow {}", twenty["capnas: gate"], twenty["TPE started by synflow"])


def test_the_gate_saves_trainings_also_where_its_weights_were_fitted_elsewhere(searches: dict[str, list[dict[str, Any]]]) -> None:
    assert regret(searches["capnas: gate + combined"], 20) < regret(searches["TPE"], 100)
    pools = {(r["pool"], r["trainings"], r["gate"], r["named_by"]): r["regret"] for r in json.loads((SEARCHES / "pools.json").read_text())}
    for trainings in (5, 10):
        assert pools[400, trainings, "unseen", "accuracy"] < min(pools[400, trainings, "synflow", "accuracy"], 0.43)


def test_the_texts_tell_how_real_searches_ended() -> None:
    rows = [json.loads(line) for line in (SEARCHES / "real_retrained.jsonl").read_text().splitlines()]
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["method"]), []).append(100 * row["test_accuracy"])
    methods = ("capnas", "TPE on accuracy", "random")
    means = [statistics.mean(found[case, method]) for method in methods for case in ("fashion", "cifar10")]
    row = table_row(ROOT / "README.md", "real searches at equal processor time")
    check_says(row, "| {}, {} | TPE on accuracy {}, {}; random {}, {} |", *means)
    assert "three seeds each" in row
    assert {len(found[case, method]) for method in methods for case in ("fashion", "cifar10")} == {3}


def test_the_texts_tell_what_evenness_gains() -> None:
    study = json.loads((RESULTS / "evenness" / "evenness.json").read_text())
    row = table_row(RESULTS / "README.md", "[evenness]")
    gains = {r["space"]: [g[0] for g in r["gains"]] for r in study["there"] if r["reading"] == "block_saturation_evenness"}
    few, many = ([gains[space][group] for space in SPACES] for group in (0, 2))
    check_says(row, "by {} to {} points among the cheapest third and {} to {} among the dearest", min(few), max(few), min(many), max(many))
    steered = {(r["space"], r["reading"], r["limit"]): r["gains"] for r in study["steered"]}
    weights = ("0.05", "0.2", "1.0")
    like = [steered[s, "block_saturation_evenness", m][w][0] for s in ("nasbench201", "nasbench101") for m in LIMITS for w in weights]
    check_says(row, "{} to {} points on NAS-Bench-201 and 101", min(like), max(like))
    check_says(row, "on `mbconv` {}, {} and {} at weights 0.05, 0.2 and 1",
               *(steered["mbconv", "block_saturation_evenness", "all"][w][0] for w in weights))  # fmt: skip
    check_says(row, "of the layers {} on NAS-Bench-201 and {} on `mbconv` at weight 1",
               *(steered[s, "saturation_evenness", "all"]["1.0"][0] for s in ("nasbench201", "mbconv")))  # fmt: skip


def test_versions_are_those_of_the_rows_where_nothing_is_measured_again(tmp_path: Path) -> None:
    copy = shutil.copytree(RESULTS / "profiles", tmp_path / "profiles")
    stored = copy / "environment.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"torch": "0.1"}))
    subprocess.run([sys.executable, str(copy / "run.py")], check=True, cwd=ROOT)
    assert json.loads(stored.read_text())["torch"] == "0.1"
    assert "torch 0.1," in (copy / "table.md").read_text()


def test_the_texts_tell_what_chooses_among_draws() -> None:
    found = json.loads((RESULTS / "search" / "draws.json").read_text())
    text, row = " ".join((ROOT / "README.md").read_text().split()), table_row(RESULTS / "README.md", "[search]")
    rho = {case: study["spearman"] for case, study in found.items()}
    names = ("accuracy of the short training", "combined", "macs", "capacity_score")
    fashion, cifar = (found[case] for case in ("fashion", "cifar10"))
    check_says(row, "{} of `resnet` differ by a standard deviation of {} points, and the short training ranks them at {}, `combined` "
               "at {}, MACs at {}, `capacity_score` at {}; {} of `mbconv` by {} points: {}, {}, {}, {} (",
               fashion["draws"], 100 * fashion["deviation"], *(rho["fashion"][n] for n in names),
               cifar["draws"], 100 * cifar["deviation"], *(rho["cifar10"][n] for n in names))  # fmt: skip
    early = "combined, what it knows before training"
    check_says(row, "before a training has {} and {}", rho["fashion"][early], rho["cifar10"][early])
    check_says(text, "a full training gives at {} and {}, the short training alone at {} and {}, `capacity_score` at {} and {}: there gate "
               "by `combined:best:10%` ({} and {})",
               *(rho[case][n] for n in ("combined", names[0], "capacity_score", early) for case in ("fashion", "cifar10")))  # fmt: skip


def test_the_studies_run_in_the_environment_of_the_tests() -> None:
    beside = {path.stem for path in RESULTS.rglob("*.py")} | {"delve"}  # a study's own modules; the peer that one study asks for by name
    for path in sorted(RESULTS.rglob("*.py")):
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "capnas"]
            for root in {name.partition(".")[0] for name in names} - beside:
                assert importlib.util.find_spec(root), f"{path.name} imports {root}, which the dev extra does not bring"
