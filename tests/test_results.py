"""What the product does by default is what the committed studies support."""

from __future__ import annotations

import ast
import csv
import importlib.util
import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from scripts import module_of
from torch import nn

from capnas.excess import read_study
from capnas.measures.ranking import spearman
from capnas.objective.gates import RANKED_BY
from capnas.objective.targets import LOSSES, PRINCIPLED, WEIGHTS
from capnas.profile import INITIALIZATIONS, profile_model
from capnas.scoring import CAPACITY_WEIGHTS, score
from capnas.search import open_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
STUDIES = RESULTS / "README.md"
RANKING = RESULTS / "ranking"
SPACES = ("nasbench201", "nasbench101", "macro")
SUMMED = {name: weight for name, weight in WEIGHTS.items() if name not in LOSSES}  # what a table can tell of `combined`
ALL = (*SPACES, "timm", "mbconv")
NAMES = dict(zip(ALL, ("NAS-Bench-201", "NAS-Bench-101", "NAS-Bench-Macro", "timm", "`mbconv`")))
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
        assert summary["spaces"][name]["signals"]["block_log2_activations"]["spearman"] > 0.3
    for name in ("nasbench201", "nasbench101"):
        assert "block_log2_activations" not in summary["spaces"][name]["signals"]  # the same for all cells


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
    assert {"init_" + name: weight for name, weight in shipped["weights"].items()} | dict.fromkeys(LOSSES, 1.0) == dict(WEIGHTS)
    assert shipped["mean"] > alone["mean"] + 0.15
    assert shipped["mean_behind"] < alone["mean_behind"] / 1.5


@pytest.mark.xfail(strict=True, reason="shipped weights rank 0.05 below the best fitted ones, which name worse networks: see combine.py")
def test_the_weights_of_the_sum_rank_as_well_as_the_best(combined: dict[str, Any]) -> None:
    assert combined["shipped"]["mean"] > max(row["mean"] for row in combined.values()) - 0.01


def test_the_weights_of_the_sum_name_as_good_a_network_as_the_best(combined: dict[str, Any]) -> None:
    assert combined["shipped"]["mean_behind"] < min(row["mean_behind"] for row in combined.values()) + 0.1


FAR = pytest.mark.xfail(strict=True, reason="weights fitted elsewhere weigh capacity_score too much for mbconv: 0.07 above accuracy alone")


@pytest.mark.parametrize("left", ["nasbench201", "nasbench101", pytest.param("mbconv", marks=FAR)])
def test_the_sum_was_not_fitted_to_one_space(combined: dict[str, Any], left: str) -> None:
    row = combined[f"fitted on all but {left}"]
    unseen, alone = (statistics.mean(r["reached"][left]) for r in (row, combined["accuracy alone"]))
    assert unseen > alone + 0.1


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
        assert unseen[name][0] > signals[name]["capacity_score"]["spearman"] - 0.05, name
    assert statistics.mean(r for r, _ in unseen.values()) > statistics.mean(s["macs"]["spearman"] for s in signals.values()) + 0.04


def test_every_term_of_the_sum_helps_the_others_and_no_other_does(combined: dict[str, Any]) -> None:
    best = combined["fitted on all"]["mean"]
    for name in SUMMED:
        assert combined[f"without {name.removeprefix('init_')}"]["mean"] < best - 0.002, name
    for choice in (c for c in combined if c.startswith("with ")):
        assert combined[choice]["mean"] < best + 0.01, choice


def test_the_preset_of_the_three_theories_is_the_best_choice_of_its_study() -> None:
    named = json.loads((RANKING / "principled.json").read_text())
    assert named["best on average"]["weights"] == named["shipped"]["weights"] == dict(PRINCIPLED)
    assert named["shipped"]["mean"] > named["accuracy alone"]["mean"]


def test_the_defaults_are_the_score() -> None:
    assert RANKED_BY == "capacity_score"
    assert {*SUMMED} == {"init_log2_macs", "init_" + RANKED_BY}


def table_row(document: Path, start: str) -> str:
    """The one row of a Markdown table that begins so."""
    rows = [line for line in document.read_text().splitlines() if line.startswith(f"| {start}")]
    assert len(rows) == 1, (document.name, start, len(rows))
    return rows[0]


def headline(question: str) -> str:
    """The one row of the table on the first page that begins so."""
    return table_row(ROOT / "README.md", question)


def section(heading: str) -> str:
    """What stands in the studies' text under a heading of the second level, with its subsections."""
    parts = [p for p in re.split(r"^## ", STUDIES.read_text(), flags=re.MULTILINE) if p.partition("\n")[0] == heading]
    assert len(parts) == 1, (heading, len(parts))
    return parts[0]


def table_of(text: str, head: str) -> dict[str, str]:
    """First cell to row of the one table of a text whose head begins with this cell."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(f"| {head} |")]
    assert len(starts) == 1, (head, len(starts))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[starts[0] + 2 :]))
    found = {row.split("|")[1].strip(): row for row in rows}
    assert len(found) == len(rows), head
    return found


Cell = float | str | tuple[Any, ...]  # a number, words, or a template with its numbers


def check_table(text: str, head: str, expected: Mapping[str, Sequence[Cell]]) -> None:
    """A table of the text has these rows and no others, and in their cells these words and numbers."""
    found = table_of(text, head)
    assert list(found) == list(expected), head
    for name, cells in expected.items():
        templates = [c if isinstance(c, str) else c[0] if isinstance(c, tuple) else "{}" for c in cells]
        numbers = [() if isinstance(c, str) else c[1:] if isinstance(c, tuple) else (c,) for c in cells]
        check_says(found[name], " | ".join(("", name, *templates, "")).strip(), *itertools.chain(*numbers))


def check_says(text: str, template: str, *values: float) -> None:
    """Numbers stand in the text where the template has braces, and are the values, rounded to the digits that are shown."""
    assert template.count("{}") == len(values)
    text, template = " ".join(text.split()), " ".join(template.split())
    pattern = "([-+]?[0-9][0-9,]*(?:[.][0-9]+)?)".join(map(re.escape, template.split("{}")))
    found = re.search(pattern, text)
    assert found is not None, f"{template!r} is not in {text!r}"
    for shown, value in zip(found.groups(), values, strict=True):
        digits = len(shown.partition(".")[2])
        assert abs(float(shown.replace(",", "")) - value) <= 0.5 * 10**-digits + 1e-9, f"{template!r}: shown {shown}, measured {value:.5f}"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_in_a_text_are_compared_as_they_are_rounded() -> None:
    check_says("MACs 0.70, of 1,000 cells", "MACs {}, of {} cells", 0.7049, 1000)
    with pytest.raises(AssertionError, match=r"shown 0\.70, measured 0\.70600"):
        check_says("MACs 0.70", "MACs {}", 0.706)
    with pytest.raises(AssertionError, match="is not in"):
        check_says("MACs 0.70", "params {}", 0.70)


def test_tables_in_a_text_are_compared_row_by_row() -> None:
    text = "| a | b | c | d |\n| --- | --- | --- | --- |\n| x | 0.70 | Taylor +1.5 | |\n| y | - | -2 (1 to 3) | |\n"
    right: dict[str, tuple[Cell, ...]] = {"x": (0.701, ("Taylor {}", 1.46), ""), "y": ("-", ("{} ({} to {})", -2, 1, 3), "")}
    check_table(text, "a", right)
    for wrong in ({"x": right["x"]}, right | {"y": ("-", ("{} ({} to {})", -2, 1, 4), "")}, right | {"x": (0.701, ("LAMP {}", 1.46), "")}):
        with pytest.raises(AssertionError):
            check_table(text, "a", wrong)


def test_every_study_has_a_row_with_a_short_answer() -> None:
    rows = re.findall(r"^\| \[(\w+)\]\(\1/\) \| (.+?) \| (.+) \| (`.+`) \|$", STUDIES.read_text(), re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(path.name for path in RESULTS.iterdir() if path.is_dir() and any(path.glob("*.py")))
    for study, _, answer, _ in rows:
        assert len(answer.split()) <= 50, study
        if f"[more](#{study})" in answer:
            assert section(study)
    headings = re.findall(r"^## (.+)$", STUDIES.read_text(), re.MULTILINE)
    assert headings == ["figures"] + [study for study, _, answer, _ in rows if answer.endswith(f": [more](#{study})")]


def test_links_of_the_studies_lead_somewhere() -> None:
    text = STUDIES.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert f"\n## {link[1:]}\n" in text if link.startswith("#") else (RESULTS / link).exists(), link


def test_the_readme_tells_how_the_score_ranks(summary: dict[str, Any], unseen: dict[str, list[float]]) -> None:
    spaces = summary["spaces"]
    signals = {name: spaces[name]["signals"] for name in ALL}
    rho = {name: {signal: row["spearman"] for signal, row in found.items()} for name, found in signals.items()}
    cells, readme = rho["nasbench201"], STUDIES
    check_says(table_row(readme, "rank untrained networks"),
               "NAS-Bench-201 | {} (better half {}) | synflow {}, naswot {}, parameters {} | {} cells",
               cells["capacity_score"], signals["nasbench201"]["capacity_score"]["top_half"], cells["published logsynflow"],
               cells["published naswot"], cells["params"], spaces["nasbench201"]["architectures"])  # fmt: skip
    check_says(table_row(readme, "the same, NAS-Bench-101"), "| {}, {} | MACs {}, {} | {} and {} networks",
               *(rho[name][signal] for signal in ("capacity_score", "macs") for name in ("nasbench101", "macro")),
               *(spaces[name]["architectures"] for name in ("nasbench101", "macro")))  # fmt: skip
    check_says(table_row(readme, "the same where size varies"), "| {}, {} | MACs {}, {}; naswot {}, {} | {} published rows",
               *(rho[name][signal] for signal in ("capacity_score", "macs") for name in ("timm", "mbconv")),
               spaces["timm-baselines"]["signals"]["naswot"]["spearman"], rho["mbconv"]["naswot"],
               spaces["timm"]["architectures"])  # fmt: skip
    apart = json.loads((RANKING / "differences.json").read_text())["spaces"]
    on_macs = [apart[name]["less"]["macs"] for name in ("timm", "mbconv")]
    check_says(table_row(readme, "the same where size varies"),
               "of {} models, each at its listed size (score less MACs {} [{}, {}], resampled by model); {} draws, short "
               "training ({} [{}, {}])",
               apart["timm"]["models"], on_macs[0]["difference"], *on_macs[0]["interval"],
               apart["mbconv"]["networks"], on_macs[1]["difference"], *on_macs[1]["interval"])  # fmt: skip
    fits = {row["fitted_on"]: row for row in json.loads((RANKING / "fit.json").read_text()) if row["terms"] == "every term"}
    left = {name: fits[f"all but {name}"]["reached"][name][0] for name in ALL}
    check_says(readme.read_text(), "the space left out is ranked at {} (timm) or {} (NAS-Bench-101)", left["timm"], left["nasbench101"])
    assert sorted(left, key=lambda name: left[name])[0] == "timm"
    check_says(section("ranking"), "NAS-Bench-101 is left out at {} and timm at {}", left["nasbench101"], left["timm"])
    check_says(table_row(readme, "the same terms, weights fitted without"), "| {}, {}, {}, {}, {} | as shipped {}, {}, {}, {}, {} |",
               *(unseen[name][0] for name in ALL), *(rho[name]["capacity_score"] for name in ALL))  # fmt: skip


def test_the_results_tell_how_the_score_ranks(summary: dict[str, Any], unseen: dict[str, list[float]]) -> None:
    rho = {name: {signal: row["spearman"] for signal, row in summary["spaces"][name]["signals"].items()} for name in ALL}
    networks = {name: summary["spaces"][name]["architectures"] for name in (*ALL, *MEASURED)}
    row, text = table_row(STUDIES, "[ranking]"), section("ranking")
    mean = {signal: statistics.mean(rho[name][signal] for name in ALL) for signal in ("capacity_score", "macs", "params")}
    check_says(row, "Spearman with final accuracy {} (MACs {}, params {})", *mean.values())
    check_says(row, "; naswot {} on timm:", summary["spaces"]["timm-baselines"]["signals"]["naswot"]["spearman"])
    check_says(row, "worse than MACs on `mbconv` ({} against {})", *(rho["mbconv"][signal] for signal in ("capacity_score", "macs")))
    apart = json.loads((RANKING / "differences.json").read_text())
    assert apart["weights"] == dict(CAPACITY_WEIGHTS)
    less = {name: found["less"] for name, found in apart["spaces"].items()}
    for name in SPACES:  # "better on three of five spaces"
        assert min(found["interval"][0] for found in less[name].values()) > 0
    on_timm, on_mbconv = (less[name]["macs"] for name in ("timm", "mbconv"))
    assert on_timm["interval"][0] < 0 < on_timm["interval"][1]
    check_says(text, "On timm it is level with MACs: {} [{}, {}] by a bootstrap of the {} models, whose rows depend on each other, and {} "
               "against {} in the better half", on_timm["difference"], *on_timm["interval"], apart["spaces"]["timm"]["models"],
               *on_timm["top_half"])  # fmt: skip
    check_says(text, "MACs alone are better by {} [{}, {}]", -on_mbconv["difference"], *(-end for end in reversed(on_mbconv["interval"])))
    check_says(text, "On `mbconv` it is so by {} [{}, {}] from synflow", less["mbconv"]["synflow"]["difference"],
               *less["mbconv"]["synflow"]["interval"])  # fmt: skip
    added = {tuple(found["added"]): {name: row[0] for name, row in found["left_out"].items()} for found in apart["added"]}
    alone = statistics.mean(added.pop(()).values())
    means = [statistics.mean(row.values()) for row in added.values()]
    assert {name for names in added for name in names} == {"log2_macs", "block_saturation90_mean", "params_in_use"}
    assert max(means) < alone + 0.001
    check_says(text, "the spaces left out have {} to {} on average, the shipped terms {}.", min(means), max(means), alone)
    check_says(text, "With log2 MACs, NAS-Bench-101 falls to {}, with all three to {}", added["log2_macs",]["nasbench101"],
               max(added.items(), key=lambda item: len(item[0]))[1]["nasbench101"])  # fmt: skip
    check_says(text, "of {} with final accuracy (MACs {}, params {})", *mean.values())
    for name in ("nasbench101", "macro", "timm"):  # computed apart from the other scores, on the same images
        assert summary["spaces"][f"{name}-baselines"]["architectures"] == networks[name]
        rho[name] |= {signal: summary["spaces"][f"{name}-baselines"]["signals"][signal]["spearman"] for signal in ("naswot", "synflow")}
    rho["nasbench201"] |= {proxy: rho["nasbench201"][f"published {column}"] for proxy, column in
                           (("naswot", "naswot"), ("synflow", "logsynflow"))}  # fmt: skip
    beside = summary["spaces"]["timm-baselines"]["signals"]
    both = [[beside[signal][part] for signal in ("naswot", "synflow")] for part in ("spearman", "top_half")]
    check_says(text, "naswot {} and synflow {} for all, {} and {} in the better half, the score {} and {}.", *both[0], *both[1],
               *(beside["capacity_score"][part] for part in ("spearman", "top_half")))  # fmt: skip
    check_table(text, "space", {
        NAMES[name]: (networks[name], *(rho[name][s] for s in ("capacity_score", "macs", "params")),
                      *(rho[name][signal] for signal in ("naswot", "synflow")), ("{}, {}", *unseen[name]))
        for name in ALL})  # fmt: skip
    models = {line["arch"].partition("@")[0] for line in lines_of(RANKING / "raw" / "timm.jsonl")}
    check_says(text, "{} published rows of {} ImageNet models, each with 16 images at its listed size;", networks["timm"], len(models))
    epochs = {line["epochs"] for line in lines_of(RANKING / "raw" / "mbconv-trained.jsonl")}
    check_says(text, "trained for {} epochs on 5,761 images", *epochs)
    found = [{name: signal["spearman"] for name, signal in summary["spaces"][space]["signals"].items()} for space in MEASURED]
    means = [statistics.mean(signals[name] for signals in found) for name in ("capacity_score", *BASELINES, "macs")]
    check_says(table_row(STUDIES, "the five published proxies"),
               "| {} | naswot {}, synflow {}, zico {}, snip {}, grad_norm {}; MACs {}", *means)  # fmt: skip
    check_says(text, "(NAS-Bench-201 {}, NAS-Bench-101 {}, Macro {}, `mbconv` {} rows; timm not) the score has {} on average, naswot {}, "
               "synflow {}, zico {}, snip {}, grad_norm {},", *(networks[space] for space in MEASURED), *means[:-1])  # fmt: skip
    proxies = {signal: statistics.mean(rho[name][signal] for name in ALL) for signal in ("naswot", "synflow")}
    assert all(rho[name]["capacity_score"] > max(rho[name][signal] for signal in proxies) for name in ALL)
    check_says(text, "It is above naswot and synflow on each space (on average {} and {})", *proxies.values())
    check_says(headline("rank untrained networks"), "mean of five spaces, on which the weights were fitted | {} | MACs {}, "
               "parameters {}, naswot {}, synflow {} |", *mean.values(), *proxies.values())  # fmt: skip
    before = []  # with the term that was shipped first
    for name in ("macro", "timm", "mbconv"):
        rows = lines_of(RANKING / "raw" / f"{name}.jsonl")
        scores = [r["scores"]["capacity_score"] - r["scores"]["block_log2_activations"] + r["scores"]["log2_activations"] for r in rows]
        before.append(spearman(scores, [r["accuracy"] for r in rows]))
    check_says(text, "(`log2_activations`), when that had been seen to give {}, {} and {} on them", *before)
    others = {name: summary["spaces"][f"{name}-others"] for name in SPACES}
    check_table(text, "other rows of", {
        NAMES[name]: (row["architectures"], ("{}, {}", *(row["signals"]["capacity_score"][part] for part in ("spearman", "top_half"))),
                      *(row["signals"][cost]["spearman"] for cost in ("macs", "params")))
        for name, row in others.items()})  # fmt: skip
    for name, row in others.items():
        assert row["architectures"] == len({r["arch"] for r in lines_of(RANKING / "raw" / f"{name}-others.jsonl")}
                                           - {r["arch"] for r in lines_of(RANKING / "raw" / f"{name}.jsonl")})  # fmt: skip
    ranked = [row["signals"][signal]["spearman"] for signal in ("capacity_score", "macs") for row in others.values()]
    check_says(headline("rows of NAS-Bench-201, 101 and Macro that no weight"), "| {}, {}, {} | MACs {}, {}, {} |", *ranked)
    check_says(table_row(STUDIES, "the same on other rows"), "| {}, {}, {} | MACs {}, {}, {} | {} cells, {} and {} networks", *ranked,
               *(row["architectures"] for row in others.values()))  # fmt: skip
    above = [(rho[name]["capacity_score"] - target, others[name]["signals"]["capacity_score"]["spearman"] - target)
             for name, target in (("nasbench201", 0.94), ("nasbench101", 0.80))]  # fmt: skip
    check_says(text, "0.94 on NAS-Bench-201 by {} (on the other 1,000 cells by {}) and 0.80 on NAS-Bench-101 by {} (on the other 300 "
               "graphs by {})", *above[0], *above[1])  # fmt: skip
    assert min(*above[0], *above[1]) >= 0
    check_says(text, "Never below MACs: on `mbconv` by {}, on MobileNetV2", rho["mbconv"]["macs"] - rho["mbconv"]["capacity_score"])


def test_the_texts_tell_how_the_score_ranks_what_nothing_was_chosen_on() -> None:
    cells, models = (lines_of(RESULTS / "unseen" / "raw" / f"{name}.jsonl") for name in ("cells", "torchvision"))
    found = json.loads((RESULTS / "unseen" / "table.json").read_text())
    known = {r["arch"] for path in (RANKING / "raw").glob("nasbench201*.jsonl") for r in lines_of(path)}
    assert found["cells"] == len(cells) == len({r["arch"] for r in cells} - known)
    assert found["torchvision"]["all"]["networks"] == len(models)
    assert not {r["params"] for r in models} & {r["n_params"] for r in lines_of(RANKING / "raw" / "timm.jsonl")}
    for name, part in [*found["datasets"].items(), ("all", found["torchvision"]["all"])]:
        rows = models if name == "all" else cells
        accuracy = [r["accuracy"] if name == "all" else statistics.mean(r["accuracies"][name]) for r in rows]
        today = [sum(weight * r["scores"][term] for term, weight in CAPACITY_WEIGHTS.items()) for r in rows]
        assert part["capacity_score"]["spearman"] == pytest.approx(spearman(today, accuracy))
        assert part["macs"]["spearman"] == pytest.approx(spearman([r["macs"] for r in rows], accuracy))

    text, signals = section("unseen"), ("capacity_score", "elsewhere", "naswot", "synflow", "macs")
    titles = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet-16-120"}
    parts = {titles[name]: part for name, part in found["datasets"].items()}
    check_table(text, "data set of the accuracy", {
        name: [("{}, {}", part[signal]["spearman"], part[signal]["top_half"]) for signal in signals] for name, part in parts.items()
    })  # fmt: skip
    check_table(text, "data set", {
        name: [*(("{}: {}", part[signal]["regret"][0], part[signal]["random_trainings"]) for signal in signals), part["random"]["regret"]]
        for name, part in parts.items()
    })  # fmt: skip
    for part in parts.values():
        rivals = [part[signal] for signal in signals[2:]]
        assert all(part["capacity_score"][key] > max(r[key] for r in rivals) for key in ("spearman", "top_half", "matched_pairs"))
        assert part["capacity_score"]["regret"][0] < min(r["regret"][0] for r in rivals)
    pairs = [part[signal]["matched_pairs"] for signal in ("capacity_score", "naswot", "synflow") for part in parts.values()]
    check_says(text, "in {}, {} and {} of all pairs, naswot in {}, {} and {}, synflow in {}, {} and {}.", *pairs)
    check_says(text, "Cells: {}, none of a class", len(cells))

    recipes = found["torchvision"]
    names = {"capacity_score": "`capacity_score`", "naswot": "naswot", "synflow": "synflow", "macs": "MACs", "params": "parameters"}
    check_table(text, "signal", {
        name: [("{}, {}", recipes[recipe][signal]["spearman"], recipes[recipe][signal]["top_half"]) for recipe in recipes]
        for signal, name in names.items()
    })  # fmt: skip
    check_says(text, "{} of families with one plain recipe (which these are was chosen by us), {} in all",
               *(part["networks"] for part in recipes.values()))  # fmt: skip
    for part in recipes.values():  # "above their costs and below naswot and synflow"
        order = [part[signal]["spearman"] for signal in ("macs", "capacity_score", "synflow", "naswot")]
        assert max(order[0], part["params"]["spearman"]) < order[1] < min(order[2:])
    ranked = [part[signal]["spearman"] for signal in ("capacity_score", "naswot", "synflow") for part in parts.values()]
    across = [recipes["all"][signal]["spearman"] for signal in ("capacity_score", "naswot", "macs")]
    check_says(table_row(STUDIES, "[unseen]"), "cells of NAS-Bench-201 at {}, {} and {} for CIFAR-10, CIFAR-100 and ImageNet-16-120 "
               "(naswot {}, {}, {}); other families, torchvision's, at {} (naswot {}, MACs {})", *ranked[:6], *across)  # fmt: skip
    check_says((ROOT / "README.md").read_text(), "networks of many families (torchvision's) it ranks at {}, naswot at {}", *across[:2])
    check_says(headline("further cells of NAS-Bench-201"), "| {}, {}, {} | naswot {}, {}, {}; synflow {}, {}, {} |", *ranked)


def test_the_texts_tell_how_the_score_ranks_a_space_that_it_was_not_fitted_on(summary: dict[str, Any]) -> None:
    space = summary["spaces"]["mobilenetv2"]
    rho = {name: signal["spearman"] for name, signal in space["signals"].items()}
    row = table_row(STUDIES, "the same on a space that no weight was fitted on")
    check_says(row, "| {} | MACs {}, naswot {}, synflow {} | {} published rows |",
               *(rho[name] for name in ("capacity_score", "macs", "naswot", "synflow")), space["architectures"])  # fmt: skip
    text = section("ranking")
    check_says(text, "MobileNetV2 at {} pairs", space["architectures"])
    check_says(text, "`capacity_score` {}, MACs {}, params {}, naswot {}, synflow {}, zico {}. Given MACs little is left of it ({}), and "
               "evenness of the blocks orders nothing there ({})",
               *(rho[name] for name in ("capacity_score", "macs", "params", "naswot", "synflow", "zico")),
               space["signals"]["capacity_score"]["given_macs"], rho["block_saturation_evenness"])  # fmt: skip
    check_says(text, "on MobileNetV2 by {}", rho["macs"] - rho["capacity_score"])


def test_the_results_tell_what_recording_costs() -> None:
    study = module_of(RESULTS / "saturation_overhead" / "run.py")
    found = []
    for case, (name, _, _) in study.CASES.items():
        kept, usual = (json.loads(study.raw(case, variables).read_text())["impl"] for variables in (study.KEPT, {}))
        ratios = [impl[tool]["cpu"]["ratio_median"] for impl in (kept, usual) for tool in ("capnas", "delve")]
        found.append((ratios[0], study.TARGETS[name], *ratios[1:]))
    names = ("VGG-like", "ResNet, 16 wide", "ResNet, 64 wide", "inverted residuals")
    check_table(section("saturation_overhead"), "network", dict(zip(names, found, strict=True)))
    own, delve = ([row[i] for row in found] for i in (0, 2))
    row = table_row(STUDIES, "[saturation_overhead]")
    check_says(row, "{} to {} of the bare step's CPU time for three networks (target 1.05) and {} for inverted residuals (target 1.10)",
               min(own[:3]), max(own[:3]), own[3])  # fmt: skip
    check_says(row, "delve, which reads modules only, {} to {}", min(delve), max(delve))
    check_says(headline("time of a training step"), "| {} to {} | delve {} to {} |", min(own), max(own), min(delve), max(delve))
    assert all(max(mine, default) <= target for mine, target, _, default, _ in found)
    check_says(row, "with memory as the allocator does it {} to {};", *(f(default for *_, default, _ in found) for f in (min, max)))
    usual = [100 * (row[3] - 1) for row in found]
    check_says(section("saturation_overhead"), "costs {} to {} % of a training step with memory kept by the process and {} to {} % with "
               "memory as the allocator does it, as users run it; all targets are met in both.",
               100 * (min(own) - 1), 100 * (max(own) - 1), min(usual), max(usual))  # fmt: skip
    stored = [json.loads(study.raw(case, variables).read_text()) for case in study.CASES for variables in (study.KEPT, {})]
    assert not any("repetitions" in result for result in stored)  # else the text says how many
    check_says(section("saturation_overhead"), "how many is not in these rows (the default is {})", 9)
    differences = json.loads((RESULTS / "saturation_overhead" / "raw" / "difference.json").read_text())
    worst = max(abs(s - layer["every_row"]) for case in differences.values() for layer in case.values() for s in layer["sampled"])
    check_says(section("saturation_overhead"), "move saturation by at most {} on any layer", worst)
    assert worst <= 0.02


def test_rows_of_two_draws_hold_what_a_search_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RANKING))  # the study's own modules
    study = module_of(RANKING / "run.py")
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(16, 24, 3)), nn.ReLU(), nn.Conv2d(24, 9, 3))
    x = nn.functional.avg_pool2d(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0)), 5, 1)
    read = partial(profile_model, model, mode="train", measures=("saturation",), blocks="[01]")
    first, second = read(x, initialize=1), read(x[::2], initialize=1, seed=1)
    row = {"scores": score(first, study.DRAWN), "blocks": [[r.saturation] for r in first.blocks], "seconds": 1}
    again = {"scores": score(second, study.DRAWN), "blocks": [r.saturation for r in second.blocks], "seconds": 2}
    assert study.averaged(row, again)["scores"] == pytest.approx(score(read(x, initialize=INITIALIZATIONS), study.DRAWN))
    assert study.averaged(row, again)["seconds"] == 3
    assert row["scores"] != pytest.approx(again["scores"], rel=1e-3)


def test_the_results_tell_what_the_score_is_sensitive_to() -> None:
    def number(row: str, column: int) -> float:
        return float(row.split("|")[column])

    drawn = table_of((RANKING / "sensitivity.md").read_text(), "networks of")
    cells, graphs = drawn.pop("nasbench201"), drawn.pop("nasbench101")
    check_says(section("ranking"), "ranked at {} by the first draw, at {} by the second and at {} by both (better half {}, {}, {}), "
               "NAS-Bench-101 at {}, {} and {}; in the other spaces both draws rank alike ({} or more)",
               *(number(cells, column) for column in (3, 5, 7, 4, 6, 8)), *(number(graphs, column) for column in (3, 5, 7)),
               min(number(row, 9) for name, row in drawn.items() if "others" not in name))  # fmt: skip
    assert len(drawn) == 7
    rows = table_of((RANKING / "sensitivity.md").read_text(), "measured with")
    other = rows.pop("nasbench201, eval")
    assert set(rows) == {f"nasbench201, {what}" for what in ("16-images", "16-px", "256-images", "seed1", "seed2")}
    check_says(section("ranking"), "({} or more with the usual setting)", min(number(row, 7) for row in rows.values()))
    check_says(section("ranking"), "Eval mode does not: {} with the usual setting, and {} with accuracy on {} cells, which train mode "
               "ranks at {}", *(number(other, column) for column in (7, 3, 2, 5)))  # fmt: skip


UNTRAINED = ("untrained part of shipped alone", "capacity_score alone")  # choices of the study of the sum


def test_the_texts_tell_how_the_sum_ranks(summary: dict[str, Any], combined: dict[str, Any]) -> None:
    names = ("nasbench201", "nasbench101", "mbconv", "nasbench201-1-epoch")
    shipped, alone = ([combined[choice]["reached"][name][0] for name in names] for choice in ("shipped", "accuracy alone"))
    check_says(table_row(STUDIES, "`combined` after"), "| {}, {}, {}; {} | accuracy alone {}, {}, {}; {}; without the "
               "training: the rest of the sum {}, {}, {}; {}, `capacity_score` {}, {}, {}; {} |", *shipped, *alone,
               *(combined[choice]["reached"][name][0] for choice in UNTRAINED for name in names))  # fmt: skip
    text = section("figures")
    columns = ("accuracy alone", *UNTRAINED, "shipped")
    means = {choice: combined[choice]["mean"] for choice in columns}
    check_says(text, "without losses, it ranks at {} and what it names is {} points behind the best, less than by any other choice",
               means["shipped"], combined["shipped"]["mean_behind"])  # fmt: skip
    assert combined["shipped"]["mean_behind"] == min(row["mean_behind"] for row in combined.values())
    check_says(text, "alone the untrained part of `combined` ranks at {} and `capacity_score` at {}, accuracy at {}",
               *(means[choice] for choice in (*UNTRAINED, "accuracy alone")))  # fmt: skip
    before = json.loads((RANKING / "untrained.json").read_text())
    assert before["weights"] == dict(WEIGHTS)
    known = [before["spaces"]["timm"][name][0] for name in ("combined, untrained part", "capacity_score")]
    check_says(" ".join(text.split()), "timm {} against {}", *known)
    text = section("ranking")
    left = [combined[f"fitted on all but {name.removesuffix('-1-epoch')}"] for name in names]
    labels = ("NAS-Bench-201, 12 of 200", "NAS-Bench-101, 12 of 108", "`mbconv`, 1 of 6", "NAS-Bench-201, one of our own")
    rows = {label: [("{}, {}", *row["reached"][name]) for row in (*(combined[choice] for choice in columns), fitted)]
            for label, name, fitted in zip(labels, names, left)}  # fmt: skip
    last = {"mean": [*means.values(), ""],
            "points behind the best, of what is named among 20": [*(combined[c]["mean_behind"] for c in columns), ""]}  # fmt: skip
    check_table(text, "space, epochs: all, better half", rows | last)
    assert combined["shipped"]["reached"][names[3]][0] < combined[UNTRAINED[0]]["reached"][names[3]][0]  # "adds nothing to the ranking"
    assert combined["shipped"]["reached"]["nasbench101"] < combined[UNTRAINED[1]]["reached"]["nasbench101"]
    trees = [float(n) for n in re.findall(r"\d\.\d+", table_row(RANKING / "combined.md", "untrained and the short training"))]
    fitted, former, doubled = (combined[c] for c in ("fitted on all", "four terms", "shipped, doubled"))
    check_says(text, "doubled they rank at {} and name networks {} points behind, fitted on all four spaces {} and {}.",
               *(row[key] for row in (doubled, fitted) for key in ("mean", "mean_behind")))  # fmt: skip
    check_says(text, "on these rows ({}; fitted {}) and name worse networks ({}; {}).",
               *(row[key] for key in ("mean", "mean_behind") for row in (former, combined["four terms, fitted"])))  # fmt: skip
    check_says(text, "Trees fitted on each space itself with every signal reach {}", statistics.mean(trees))
    rankings = {"`combined`, untrained part": "combined, untrained part", "`capacity_score`": "capacity_score"}
    check_table(text, "before any training", {
        label: [before["spaces"][name][signal][0] for name in ALL] for label, signal in rankings.items()})  # fmt: skip
    cells = combined["shipped"]["reached"]["nasbench201"]
    check_says(text, "0.975 by {}, and 0.90 of the better half by {}", 0.975 - cells[0], 0.90 - cells[1])
    check_says(text, "with every signal reach {} and {} out of fold", *trees[:2])
    theories = json.loads((RANKING / "principled.json").read_text())
    check_says(text, "{} on average against {} of the accuracy in it and {} of `combined`",
               *(theories[choice]["mean"] for choice in ("shipped", "accuracy alone", "combined")))  # fmt: skip


SEARCHES = RESULTS / "search" / "raw"
CLASSES = ", 400 classes"  # searches whose pool is of as many different classes
LIMITS = ("cheapest third", "cheaper two thirds", "all")  # on MACs, of the simulated steering


@pytest.fixture(scope="module")
def searches() -> dict[str, list[dict[str, Any]]]:
    """Looked-up searches by method, those of capnas with today's weights only."""
    rows = [json.loads(line) for line in (SEARCHES / "tabular.jsonl").read_text().splitlines()]
    weights: dict[str, dict[str, float]] = {
        "capnas: gate": dict(CAPACITY_WEIGHTS),
        "capnas: combined": SUMMED,
        "capnas: gate + combined": {**CAPACITY_WEIGHTS, **SUMMED},
    }
    weights |= {name + CLASSES: weights[name] for name in ("capnas: gate", "capnas: gate + combined")}
    return {m: [r for r in rows if r["method"] == m and r.get("weights", {}) == weights.get(m, {})] for m in {r["method"] for r in rows}}


def regret(rows: list[dict[str, Any]], cost: float) -> float:
    """Mean regret of searches at a cost in mean trainings, from their tracks."""
    space = json.loads((SEARCHES / "tabular_space.json").read_text())

    def at(row: dict[str, Any]) -> float:
        score = space["score_seconds"].get(row["score"], 0.0) / space["unit_seconds"]
        return float(next((t[3] for t in reversed(row["track"]) if t[0] + t[1] * score <= cost), space["blind"]))

    return statistics.mean(map(at, rows))


def test_the_figure_of_the_searches_is_drawn_to_its_ticks(searches: dict[str, list[dict[str, Any]]]) -> None:
    drawing = (RESULTS / "search" / "tabular.svg").read_text()
    across = {float(t): float(x) for x, t in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)</text>', drawing)}
    up = {float(t): float(y) - 4 for y, t in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">([\d.]+)</text>', drawing)}
    names = [n for n in re.findall(r'y="[\d.]+">([^<]+)</text>', drawing) if n in searches]
    lines = re.findall(r'<polyline points="([^"]+)"', drawing)
    assert len(names) == len(lines) == len([m for m in searches if not m.endswith(CLASSES)])
    low, first, last = min(up), min(across), max(across)
    tall, wide = math.log(max(up) / low) / (up[low] - up[max(up)]), math.log(last / first) / (across[last] - across[first])
    for name, line in zip(names, lines):
        spots = [(float(x), float(y)) for x, y in (spot.split(",") for spot in line.split())]
        found = [y for x, y in spots if x <= across[20] + 0.1][-1]
        assert low * math.exp((up[low] - found) * tall) == pytest.approx(regret(searches[name], 20), rel=0.01), name
        spent = statistics.mean(r["training"] for r in searches[name])  # less what its scores cost
        assert first * math.exp((spots[-1][0] - across[first]) * wide) == pytest.approx(spent, rel=0.25), name


def test_the_texts_tell_what_a_looked_up_search_saves(searches: dict[str, list[dict[str, Any]]]) -> None:
    names = ("capnas: gate + combined", "capnas: gate", "TPE", "TPE as capnas sets it", "TPE started by synflow")
    twenty = {name: regret(searches[name], 20) for name in names}
    counts = [len(searches[name]) for name in names]
    seeds = sorted({min(counts), max(counts)})
    row = table_row(STUDIES, "regret of a search at the cost of 20 trainings")
    rivals = "TPE on accuracy {} (at the cost of 100: {}), as capnas sets it {}, started by synflow {}"
    check_says(row, f"| {{}} (gate), {{}} (gate and combined) | {rivals} | looked up, {' to '.join(['{}'] * len(seeds))} seeds a "
               "method; pools of 400 draws, with 400 different classes {}, {} and synflow {} |",
               twenty["capnas: gate"], twenty["capnas: gate + combined"], twenty["TPE"], regret(searches["TPE"], 100),
               twenty["TPE as capnas sets it"], twenty["TPE started by synflow"], *seeds,
               *(regret(searches[name + CLASSES], 20) for name in (*names[1::-1], names[-1])))  # fmt: skip
    row = headline("looked-up searches of NAS-Bench-201 at the cost of 20 trainings")
    check_says(row, "| {} points behind the best | TPE on accuracy {}, started by synflow {} |",
               *(twenty[name] for name in ("capnas: gate", "TPE", "TPE started by synflow")))  # fmt: skip
    assert {len(searches[name + CLASSES]) for name in (*names[:2], names[-1])} == set(seeds)
    assert seeds[0] >= 20
    pools = {(r["pool"], r["trainings"], r["gate"], r["named_by"]): r["regret"] for r in json.loads((SEARCHES / "pools.json").read_text())}
    gates = [pools[400, trained, gate, "accuracy"] for trained in (5, 20) for gate in ("unseen", "capacity_score", "synflow")]
    text = section("figures")
    space = json.loads((SEARCHES / "tabular_space.json").read_text())
    share, trained_all = 100 * 400 / space["classes"], pools[None, 400, None, "accuracy"]
    check_says(text, "of 400 random classes of cells, {} % of this table, it ends {} points behind after 5 trainings, with the "
               "shipped weights {}, by synflow {}; after 20 trainings {}, {} and {}. To train all 400 gives {}:",
               share, *gates, trained_all)  # fmt: skip
    row, text = table_row(STUDIES, "[search]"), section("search")
    check_says(row, "regret {} points at the cost of 20 trainings, TPE {};", twenty["capnas: gate"], twenty["TPE"])
    derived = table_of((RESULTS / "search" / "tabular.md").read_text(), "method")
    shown = {"gate": "capnas: gate", "gate and combined value": "capnas: gate + combined",
             "TPE started by synflow": "TPE started by synflow", "combined value": "capnas: combined",
             "TPE with the settings of capnas": "TPE as capnas sets it", "TPE": "TPE"}  # fmt: skip
    at_twenty = {label: [float(n) for n in re.findall(r"[\d.]+", derived[name].split("|")[6])] for label, name in shown.items()}
    check_table(text, "method | regret [95 %]", {
        label: (("{} [{}, {}]", regret(searches[name], 20), *at_twenty[label][1:]),) for label, name in shown.items()})  # fmt: skip
    gate = derived["capnas: gate"].split("|")
    check_says(text, "of plain TPE at the cost of 100 trainings, {} points, is reached with the gate after {} trainings at a cost of {} "
               "(400 untrained", regret(searches["TPE"], 100), float(gate[-2]), float(gate[-3]))  # fmt: skip
    assert min(r["scored"] for r in searches["capnas: gate"]) >= 400
    check_says(text, "Looked up: NAS-Bench-201, {} seeds a method", *seeds)
    less = {}  # than synflow: the mean from the searches, the interval from the table
    for name, kind in itertools.product(("capnas: gate + combined", "capnas: gate"), ("", CLASSES)):
        head, lines = f"- {name}{kind}, regret", (RESULTS / "search" / "tabular.md").read_text().splitlines()
        note = next(line for line in lines if line.startswith(head))
        interval = re.search(rf"\(([-+.\d]+), ([-+.\d]+)\) that of TPE started by synflow{kind} at cost 20", note)
        assert interval is not None
        ends = [regret(searches[n + kind], 20) for n in (name, "TPE started by synflow")]
        less.setdefault(kind, []).append([*ends, ends[0] - ends[1], *map(float, interval.groups())])
    check_says(text, "gate and combined {} ({}, {}), the gate alone {} ({}, {}).", *(n for row in less[""] for n in row[2:]))
    both, gate_alone = less[CLASSES]
    check_says(text, "with {} different classes on average. With pools of 400 different classes the gate has {}, gate and combined {}, TPE "
               "started by synflow {}: differences of {} ({}, {}) and {} ({}, {}).",
               space["pool_classes"]["mean"], gate_alone[0], both[0], both[1], *gate_alone[2:], *both[2:])  # fmt: skip
    assert abs(both[1] - twenty["capnas: gate"]) < 0.01  # "synflow with a pool of more classes does as well"
    made = [r["trained"] for name in ("capnas: gate", "capnas: gate + combined") for r in searches[name]]
    check_says(text, "Searches with the gate made {} to {} trainings within their budget.", min(made), max(made))
    check_says(text, "At random draws alone, pool 400, the best 5 trained, a gate by the same terms fitted on the other spaces is {} "
               "points behind, by the shipped weights {}, by synflow {}; the best 20 trained {}, {} and {}.", *gates)  # fmt: skip
    best = [r["best_drawn"] for r in json.loads((SEARCHES / "pools.json").read_text()) if r["pool"] == 400]
    check_says(text, "There the pool is 400 different classes, {} % of the table. Its best is {} behind, and to train all 400 gives {}:",
               share, statistics.mean(best), trained_all)  # fmt: skip
    note = next(line for line in lines if line.startswith("- capnas: combined, regret"))
    apart = re.search(r"less: .*; ([-+.\d]+) \(([-+.\d]+), ([-+.\d]+)\) that of TPE as capnas sets it at cost 20", note)
    assert apart is not None
    assert regret(searches["capnas: combined"], 20) - twenty["TPE as capnas sets it"] == pytest.approx(float(apart[1]), abs=0.006)
    check_says(text, "the combined value without it is little better than TPE on accuracy ({} [{}, {}] with the same settings)",
               *map(float, apart.groups()))  # fmt: skip


def test_the_gate_saves_trainings_also_where_its_weights_were_fitted_elsewhere(searches: dict[str, list[dict[str, Any]]]) -> None:
    assert regret(searches["capnas: gate + combined"], 20) < regret(searches["TPE"], 100)
    pools = {(r["pool"], r["trainings"], r["gate"], r["named_by"]): r["regret"] for r in json.loads((SEARCHES / "pools.json").read_text())}
    for trainings in (5, 10):
        assert pools[400, trainings, "unseen", "accuracy"] < min(pools[400, trainings, "synflow", "accuracy"], 0.43)


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def test_the_texts_tell_how_real_searches_ended() -> None:
    rows = [row for row in lines_of(SEARCHES / "real_retrained.jsonl") if row["budget"] == 240]
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["method"]), []).append(100 * row["test_accuracy"])
    methods = ("capnas", "TPE on accuracy", "random")
    means = [statistics.mean(found[case, method]) for method in methods for case in ("fashion", "cifar10")]
    row = table_row(STUDIES, "real searches at equal processor time (4 minutes)")
    check_says(row, "| {}, {} | TPE on accuracy {}, {}; random {}, {} |", *means)
    assert "three seeds each" in row
    assert {len(found[case, method]) for method in methods for case in ("fashion", "cifar10")} == {3}
    spent = [row for row in lines_of(SEARCHES / "real.jsonl") if row["budget"] == 240]
    shown = {"capnas (four terms)": "capnas", "`principled`": "capnas, principled", "TPE on accuracy": "TPE on accuracy",
             "random": "random", "capnas, weights doubled": "capnas, weights doubled",
             "capnas, gate by `combined`": "capnas, gate by combined",
             "capnas, gate by `capacity_score`, one seed": "capnas, gate"}  # fmt: skip
    assert set(shown.values()) == {method for _, method in found}
    expected: dict[str, list[Cell]] = {}
    for label, method in shown.items():
        expected[label] = [*{len(found[case, method]) for case in ("fashion", "cifar10")}]
        for case in ("fashion", "cifar10"):
            trained = [r["trained"] for r in spent if (r["case"], r["method"]) == (case, method)]
            expected[label] += [statistics.mean(found[case, method]), statistics.mean(trained)]
    text = section("search")
    check_table(text, "method | seeds", expected)
    first = {(r["case"], r["method"]): 100 * r["test_accuracy"] for r in rows if r["seed"] == 0}
    check_says(text, "with twice as large ones ended at {} on the test images", first["cifar10", "capnas, weights doubled"])
    check_says(text, "below the same seed without it ({}, {})", first["fashion", "capnas"], first["cifar10", "capnas"])
    assert all(first[case, "capnas, gate"] < first[case, "capnas"] for case in ("fashion", "cifar10"))
    check_says(text, "Standard errors over the seeds on CIFAR-10: capnas {}, TPE on accuracy {}, random {}.",
               *(standard_error(found["cifar10", method]) for method in methods))  # fmt: skip
    assert {row["test_images"] for row in rows} == {2000}
    spread = [max(values) - min(values) for values in found.values() if len(values) > 1]
    check_says(text, "spread of the seeds is {} to {} points", min(spread), max(spread))
    even = {key: statistics.mean(r["evenness"] for r in rows if (r["case"], r["method"]) == key) for key in found}
    for case, least in (("fashion", ("random", "TPE on accuracy")), ("cifar10", ("random",))):  # "on the first set only"
        assert {m for m in methods[1:] if even[case, m] < even[case, "capnas"]} == set(least), case


LONGER = {"cifar10": ("CIFAR-10", 10_000), "fashion": ("Fashion-MNIST", 2_000)}  # test images


def ended(
    budget: int, case: str, names: dict[str, str], images: int, retrainings: int = 3
) -> tuple[dict[str, tuple[Cell, ...]], dict[str, list[float]], float]:
    """Rows of the table of real searches, by method the mean test accuracy of each seed's winner, and how trainings of one winner vary."""
    networks, spent = ([row for row in lines_of(SEARCHES / f"{name}.jsonl") if (row["budget"], row["case"]) == (budget, case)]
                       for name in ("real_retrained", "real"))  # fmt: skip
    assert {row["test_images"] for row in networks} == {images}
    assert {row["status"] for row in networks} == {"complete"}
    seeds = sorted(set.intersection(*({row["seed"] for row in networks if row["method"] == method} for method in names)))
    assert {row["seed"] for row in networks} == set(seeds)
    groups = {(m, s): [100 * r["test_accuracy"] for r in networks if (r["method"], r["seed"]) == (m, s)] for m in names for s in seeds}
    assert {len(group) for group in groups.values()} == {retrainings}
    each = {method: [statistics.mean(groups[method, seed]) for seed in seeds] for method in names}
    expected: dict[str, tuple[Cell, ...]] = {}
    for method, name in names.items():
        mine, again = ([row for row in rows if row["method"] == method] for rows in (spent, networks))
        expected[name] = (
            ("{} ± {}", statistics.mean(each[method]), standard_error(each[method])),
            (", ".join("{}" for _ in seeds), *each[method]),
            statistics.mean(row["trained"] for row in mine),
            statistics.mean(row["macs"] for row in mine) / 1e6,
            ("{}, {}", *(statistics.mean(row[name] for row in again) for name in ("evenness", "block_evenness"))),
        )
    return expected, each, statistics.mean(statistics.stdev(group) for group in groups.values())


@pytest.mark.parametrize("case", list(LONGER))
def test_the_texts_tell_how_longer_real_searches_ended(case: str) -> None:
    (data, images), names = LONGER[case], {"capnas": "capnas (four terms)", "TPE on accuracy": "TPE on accuracy", "random": "random"}
    expected, each, deviation = ended(900, case, names, images)
    seeds = each["capnas"]
    text = section("search").partition(f"### Real trainings: 900 s of processor time a search, {data}\n")[2].partition("\n### ")[0]
    check_table(text, "method", expected)
    mean = {method: statistics.mean(values) for method, values in each.items()}
    best = sum(max(values) == values[0] for values in zip(*each.values()))
    widest = max(max(values) - min(values) for values in each.values())
    check_says(text, "differ by a standard deviation of {} points on average, winners of one method from seed to seed by up to {}",
               deviation, widest)  # fmt: skip
    place = list(LONGER)[::-1].index(case)  # in the headline Fashion-MNIST comes first
    found = re.findall(r"[\d.]+ ± [\d.]+, [\d.]+ ± [\d.]+", headline("real searches of 15 minutes"))
    told = " ".join(pair.split(", ")[place] for pair in found)
    check_says(told, "{} ± {} {} ± {} {} ± {}", *itertools.chain.from_iterable((mean[m], standard_error(each[m])) for m in names))
    row = table_row(STUDIES, f"the same at 15 minutes, {data}")
    check_says(row, "| {} ± {} | TPE on accuracy {} ± {}; random {} ± {} |",
               *itertools.chain.from_iterable((mean[method], standard_error(each[method])) for method in names))  # fmt: skip
    check_says(row, "spread up to {} points", widest)
    assert ("two seeds", "three seeds")[len(seeds) - 2] in row
    limits = " ".join((ROOT / "README.md").read_text().split())
    difference = abs(mean["capnas"] - mean["TPE on accuracy"])
    check_says(limits, "{} points above it on `mbconv`" if case == "cifar10" else "{} below it on `resnet`", difference)
    if case == "cifar10":
        above = [mean["capnas"] - mean[method] for method in ("TPE on accuracy", "random")]
        check_says(text, "capnas is {} points above TPE on accuracy and {} above random on average, and the best of the three on {} of {}",
                   *above, best, len(seeds))  # fmt: skip
    else:
        below = [mean[method] - mean["capnas"] for method in ("TPE on accuracy", "random")]
        check_says(text, "capnas is {} points below TPE on accuracy and {} below random on average, and the best of the three on {} of {}",
                   *below, best, len(seeds))  # fmt: skip


TODAY = {"fashion": "`resnet`, Fashion-MNIST", "cifar10": "`mbconv`, CIFAR-10"}


def test_the_texts_tell_how_real_searches_of_todays_sum_ended() -> None:
    names = {"capnas": "capnas (`combined`)", "TPE on accuracy": "TPE on accuracy", "random": "random"}
    spent = [row for row in lines_of(SEARCHES / "real.jsonl") if row["budget"] == 450]
    assert all(row["weights"] == dict(WEIGHTS) for row in spent if row["method"] == "capnas")
    assert {row["epochs"] for row in spent} == {3}
    text = section("search").partition("### Real trainings: 450 s of processor time a search\n")[2].partition("\n### ")[0]
    rows: dict[str, list[Cell]] = {}
    all_means, all_errors, deviations = {}, {}, {}
    for case, label in TODAY.items():
        expected, each, deviations[case] = ended(450, case, names, 10_000, retrainings=2)
        rows |= {f"{label}: {name}": list(cells) for name, cells in expected.items()}
        means = all_means[case] = {method: statistics.mean(values) for method, values in each.items()}
        all_errors[case] = {method: standard_error(values) for method, values in each.items()}
        best = sum(max(values) == values[0] for values in zip(*each.values()))
        apart = [means["capnas"] - means[method] for method in ("TPE on accuracy", "random")]
        widest = max(max(values) - min(values) for values in each.values())
        check_says(text, label + ": {} points over TPE on accuracy, {} over random, the best of the three on {} of {} seeds; "
                   "winners of one method differ by up to {} points from seed to seed, trainings of one winner by a standard deviation of "
                   "{}",
                   *apart, best, len(each["capnas"]), widest, deviations[case])  # fmt: skip
        networks = [r for r in lines_of(SEARCHES / "real_retrained.jsonl") if (r["budget"], r["case"]) == (450, case)]
        layers = {method: statistics.mean(r["evenness"] for r in networks if r["method"] == method) for method in names}
        assert (layers["capnas"] > layers["TPE on accuracy"]) == (case == "cifar10")  # "on CIFAR-10 they are, on Fashion-MNIST not"
    check_table(text, "data: method", rows)
    found, gated, _ = ended(450, "cifar10", {"capnas": "capnas", "capnas, gate by size": "by size"}, 10_000, retrainings=2)
    own, large = gated["capnas"], gated["capnas, gate by size"]
    check_says(text, "capnas ends on `mbconv` at {} ± {} ({}, {}, {}; on the other processor, see below), {} points below itself without a "
               "gate: its winners are large ({} M MACs), but it trains {} networks instead of {}", statistics.mean(large),
               standard_error(large), *large, statistics.mean(own) - statistics.mean(large), found["by size"][3], found["by size"][2],
               found["capnas"][2])  # fmt: skip
    trained = [r["trained"] for r in sorted(spent, key=lambda r: r["seed"]) if (r["case"], r["method"]) == ("fashion", "capnas")]
    check_says(text, "({} networks trained on Fashion-MNIST, {} and {} in the others)", *trained)
    limits = " ".join((ROOT / "README.md").read_text().split())
    check_says(limits, "the default sum ends {} (`resnet`) and {} points (`mbconv`) above TPE on accuracy alone",
               *(means["capnas"] - means["TPE on accuracy"] for means in all_means.values()))  # fmt: skip
    row = table_row(STUDIES, "real searches at equal processor time (450 s)")
    told = "| {} ± {}, {} ± {} | TPE on accuracy {} ± {}, {} ± {}; random {} ± {}, {} ± {} |"
    check_says(row, told, *(f[case][method] for method in names for case in TODAY for f in (all_means, all_errors)))
    row = headline("real searches of 450 s")
    check_says(row, "| {} ± {}, {} ± {} | TPE on accuracy {} ± {}, {} ± {}; random {} ± {}, {} ± {} |",
               *(f[case][method] for method in names for case in TODAY for f in (all_means, all_errors)))  # fmt: skip


def winner_of(row: Mapping[str, Any]) -> tuple[str, float, str, int]:
    """Which search a row of the real searches is of."""
    return row["case"], row["budget"], row["method"], row["seed"]


def test_the_texts_tell_how_real_searches_of_1000_s_ended() -> None:
    names = {"capnas": "capnas (`combined`)", "TPE on accuracy": "TPE on accuracy", "random": "random"}
    spent = [row for row in lines_of(SEARCHES / "real.jsonl") if row["budget"] == 1000]
    assert all(row["weights"] == dict(WEIGHTS) for row in spent if row["method"] == "capnas")
    assert ({row["epochs"] for row in spent}, {row["case"] for row in spent}) == ({3}, set(TODAY))
    text = section("search").partition("### Real trainings: 1,000 s of processor time a search\n")[2].partition("\n### ")[0]
    rows: dict[str, list[Cell]] = {}
    each: dict[str, dict[str, list[float]]] = {}
    for case, label in TODAY.items():
        expected, each[case], deviation = ended(1000, case, names, 10_000, retrainings=2)
        rows |= {f"{label}: {name}": list(cells) for name, cells in expected.items()}
        means = {method: statistics.mean(values) for method, values in each[case].items()}
        apart = [means["capnas"] - means[method] for method in ("TPE on accuracy", "random")]
        leads = sum(max(values) == values[0] for values in zip(*each[case].values()))
        widest = max(max(values) - min(values) for values in each[case].values())
        check_says(text, label + ": {} points over TPE on accuracy, {} over random, the best of the three on {} of {} seeds; "
                   "winners of one method differ by up to {} points from seed to seed, trainings of one winner by a standard deviation of "
                   "{}", *apart, leads, len(each[case]["capnas"]), widest, deviation)  # fmt: skip
        even = [[cells[-1][place] for cells in expected.values()] for place in (1, 2)]  # of layers and of blocks
        # "The layers ... on CIFAR-10 only, the blocks in neither space"
        assert [row[0] > row[1] for row in even] == [case == "cifar10", False]
    check_table(text, "data: method", rows)
    others_of = ("TPE on accuracy", "random")
    assert max(each["cifar10"]["random"]) == max(map(max, each["cifar10"].values()))  # "one of six drew the best network of all"
    ends = [f(each[case][method]) for case in TODAY for f, method in ((min, "capnas"), *((max, other) for other in others_of))]
    check_says(text, "Single seeds overlap: on Fashion-MNIST the worst of capnas ({}) is below the best of both others ({}, {}), on "
               "CIFAR-10 too ({} below {} and {})", *ends)  # fmt: skip
    assert ends[0] < min(ends[1:3])
    assert ends[3] < min(ends[4:])
    trained = {case: [r["trained"] for r in sorted(spent, key=lambda r: r["seed"]) if (r["case"], r["method"]) == (case, "capnas")]
               for case in TODAY}  # fmt: skip
    check_says(text, "({} networks trained on Fashion-MNIST, {} to {} in the others; {} and {} on CIFAR-10 in its last two, {} to {} "
               "before)",
               trained["fashion"][0], *(f(trained["fashion"][1:]) for f in (min, max)),
               *trained["cifar10"][-2:], *(f(trained["cifar10"][:-2]) for f in (min, max)))  # fmt: skip
    scored = {key: statistics.mean(r["test_accuracy"] for r in again) for key, again in itertools.groupby(
        sorted(lines_of(SEARCHES / "real_retrained.jsonl"), key=winner_of), winner_of)}  # fmt: skip
    winners: dict[tuple[int, str], list[float]] = {}
    for r in lines_of(SEARCHES / "real.jsonl"):
        if r["case"] == "cifar10" and r["budget"] in (450, 1000) and r["method"] in names:
            winners.setdefault((r["macs"], json.dumps(r["params"], sort_keys=True)), []).append(scored[winner_of(r)])
    rho = spearman([macs for macs, _ in winners], list(map(statistics.mean, winners.values())))
    check_says(text, "Spearman of MACs with test accuracy {}, over the {} different winners of these and of the 450 s", rho, len(winners))
    sums = [r["values"]["combined"] for r in sorted(spent, key=lambda r: r["seed"]) if (r["case"], r["method"]) == ("cifar10", "capnas")]
    assert spearman(sums, each["cifar10"]["capnas"]) == 1  # "in the order of their `combined`"
    told = [f(each[case][method]) for method in names for case in TODAY for f in (statistics.mean, standard_error)]
    check_says(table_row(STUDIES, "[search]"), "in real searches of 1,000 s on average: test accuracy {} and {}, TPE on accuracy {} "
               "and {}, random {} and {}, best on {} of 12 seeds:", *told[::2], sum(
                   max(values) == values[0] for case in TODAY for values in zip(*each[case].values())))  # fmt: skip
    for row in (table_row(STUDIES, "the same at 1,000 s"), headline("real searches of 1,000 s")):
        check_says(row, "| {} ± {}, {} ± {} | TPE on accuracy {} ± {}, {} ± {}; random {} ± {}, {} ± {} |", *told)
    gains = {(m, case): [ours - theirs for ours, theirs in zip(each[case]["capnas"], each[case][m])] for m in others_of for case in TODAY}
    above, certain = map(statistics.mean, gains.values()), [statistics.mean(g) / standard_error(g) for g in gains.values()]
    first = " ".join((ROOT / "README.md").read_text().split())
    check_says(first, "In those of 1,000 s it ends {} and {} above TPE on accuracy and {} and {} above random ones", *above)
    check_says(first, "by {} to {} standard errors of these differences over six seeds", min(certain), max(certain))
    check_says(text, "in their own standard errors, {} and {} over TPE on accuracy and {} and {} over random ones", *certain)
    for (method, case), gain in gains.items():  # "by more than their standard errors together" on Fashion-MNIST alone
        together = standard_error(each[case]["capnas"]) + standard_error(each[case][method])
        assert (statistics.mean(gain) > together) == (case == "fashion")


def test_the_texts_tell_what_the_real_searches_of_both_spaces_say_together() -> None:
    """Pairs of one seed, of the longest searches alone: those of 450 s are how they began."""
    scored = {key: 100 * statistics.mean(r["test_accuracy"] for r in again) for key, again in itertools.groupby(
        sorted(lines_of(SEARCHES / "real_retrained.jsonl"), key=winner_of), winner_of)}  # fmt: skip
    text, first = section("search"), " ".join((ROOT / "README.md").read_text().split())
    pairs = [(case, 1000, seed) for case in TODAY for seed in range(6)]
    told = []
    for method in ("TPE on accuracy", "random"):
        gains = [scored[case, budget, "capnas", seed] - scored[case, budget, method, seed] for case, budget, seed in pairs]
        told += [statistics.mean(gains), standard_error(gains), sum(gain > 0 for gain in gains)]
    check_says(text, "Over the twelve pairs of searches of one seed and space capnas is {} ± {} points above TPE on accuracy (better in "
               "{}) and {} ± {} above random ones (better in {})", *told)  # fmt: skip
    check_says(first, "over twelve pairs of searches of 1,000 s `combined` ends {} ± {} points above TPE on accuracy, and {} ± {} above "
               "random search", *told[:2], *told[3:5])  # fmt: skip


def test_the_texts_tell_what_evenness_gains() -> None:
    study = json.loads((RESULTS / "evenness" / "evenness.json").read_text())
    row, text = table_row(STUDIES, "[evenness]"), section("evenness")
    readings = {"blocks": "block_saturation_evenness", "layers": "saturation_evenness"}
    there = {(r["space"], r["reading"]): [g[0] for g in r["gains"]] for r in study["there"]}
    gains = [there[space, readings["blocks"]] for space in SPACES]
    few, many = ([g[group] for g in gains] for group in (0, 2))
    check_says(text, "by {} to {} points among the cheapest third and {} to {} among the dearest", min(few), max(few), min(many), max(many))
    medians = {(r["space"], r["reading"]): r["medians"] for r in study["there"]}
    middle = [medians[space, readings["blocks"]] for space in SPACES]
    check_says(row, "evener half is {} to {} points better on NAS-Bench-201, 101 and Macro (by medians {} to {})",
               min(map(min, gains)), max(map(max, gains)), min(map(min, middle)), max(map(max, middle)))  # fmt: skip
    few, many = ([m[group] for m in middle] for group in (0, 2))
    check_says(text, "raise these means: by medians it is {} to {} and {} to {}.", min(few), max(few), min(many), max(many))
    assert all(m < g for ms, gs in zip(middle, gains) for m, g in zip(ms, gs))
    costs, other, blocks = ([-g for g in found["timm", readings[what]]]
                            for found, what in ((there, "layers"), (medians, "layers"), (medians, "blocks")))  # fmt: skip
    check_says(text, "evenness of the layers goes with {} to {} points less (by medians {} to {}), that of the blocks by medians with {} "
               "to {} less", *(f(some) for some in (costs, other, blocks) for f in (min, max)))  # fmt: skip
    check_table(text, "space | blocks: cheapest", {
        NAMES[space]: [("{} ({})", *pair) for reading in readings.values() for pair in zip(there[space, reading], medians[space, reading])]
        for space in ALL})  # fmt: skip
    found = {(r["space"], r["reading"], r["limit"]): r["gains"] for r in study["steered"]}
    steered = {key: {weight: gain[0] for weight, gain in gains.items()} for key, gains in found.items()}
    weights = ("0.05", "0.2", "1.0")
    like = [steered[s, readings["blocks"], m][w] for s in ("nasbench201", "nasbench101") for m in LIMITS for w in weights]
    check_says(text, "{} to {} points on NAS-Bench-201 and 101", min(like), max(like))
    check_says(row, "gains at most {} points on NAS-Bench-201 and 101", max(like))
    check_table(text, "space, evenness of", {
        f"{NAMES[space]}, {label}": [steered[space, reading, "all"][w] for w in weights]
        for label, reading in readings.items() for space in ("nasbench201", "nasbench101", "mbconv")})  # fmt: skip
    intervals = [found["mbconv", readings["blocks"], "all"][w] for w in weights]
    check_says(text, "intervals at these three weights reach from {} to {}.", min(i[1] for i in intervals), max(i[2] for i in intervals))
    most = max(LIMITS, key=lambda limit: steered["mbconv", readings["blocks"], limit]["0.2"])
    assert most == "cheaper two thirds"
    check_says(text, "two thirds of its networks: {} [{}, {}]", *found["mbconv", readings["blocks"], most]["0.2"])
    check_says(text, "of the layers costs at weight 1 without a limit: {} on NAS-Bench-201 and {} on `mbconv`",
               *(steered[s, readings["layers"], "all"]["1.0"] for s in ("nasbench201", "mbconv")))  # fmt: skip


PICTURES = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10"}
NETWORKS = {"resnet18-narrow": "ResNet", "vgg11_bn-narrow": "VGG", "mbconv": "MBConv", "convnext": "ConvNeXt"}


def test_the_texts_tell_what_narrowed_networks_keep() -> None:
    study = module_of(RESULTS / "pruning" / "run.py")
    lines = [line for path in sorted((RESULTS / "pruning" / "raw").glob("*.jsonl")) for line in lines_of(path)]
    row, text = table_row(STUDIES, "[pruning]"), section("pruning")
    of = {data: study.rows_of(lines, data=data) for data in PICTURES}
    at = {(data, ratio): study.Table(of[data], ratio, 0) for data in PICTURES for ratio in study.RATIOS}
    both = [(data, model) for data in PICTURES for model in NETWORKS]

    def mean(values: Sequence[float]) -> float:
        assert len(values) == 3
        return 100 * statistics.mean(values)

    half: dict[tuple[str, str], list[float]] = {}
    for data, model in both:
        table = at[data, 0.5]
        base = [table.base[model, seed] for seed in table.seeds[model]]
        again = [b - a for b, a in zip(base, table.again(model))]
        half[data, model] = [mean(base), mean(table.values(model, "capnas loss")), table.lost(model, "capnas loss")[0],
                             table.lost(model, "capnas loss", "without_refit")[0], table.best_rival(model)[1], mean(again)]  # fmt: skip
        assert len(table.lost(model, "capnas loss", "without_refit")[1]) == 3
    check_table(text, "data, network | unpruned", {f"{PICTURES[d]}, {NETWORKS[m]}": half[d, m] for d, m in both})
    for name, data in (("accuracy lost at half the MACs, no fine-tuning", "fashion"), ("the same on CIFAR-10", "cifar")):
        four = [half[data, model] for model in NETWORKS]
        figures = [values[what] for what in (2, 3, 4, 5) for values in four]
        says = "| {}, {}, {}, {} points; without the refit {}, {}, {}, {} |"
        check_says(table_row(STUDIES, name), says, *figures[:8])
        found = re.search(r"\| [^|]*?(\d+), (\d+), (\d+), ([\d.]+); with batch norms measured again (\d+), (\d+), (\d+), ([\d.]+) \|",
                          table_row(STUDIES, name))  # fmt: skip
        assert found is not None
        assert [float(v) for v in found.groups()] == [round(v, i % 4 // 3) for i, v in enumerate(figures[8:])]
    spans = [(min(values), max(values)) for what in (2, 4, 3) for d in PICTURES for values in [[half[d, m][what] for m in NETWORKS]]]
    worse = [sum(half[key][3] > half[key][rival] for key in both) for rival in (4, 5)]
    check_says(text, "loses more than the best rival in {} of the {} cases, and more than the best with batch norms measured again in {}.",
               worse[0], len(both), worse[1])  # fmt: skip
    share = [100 * (x["before"] - x["accuracy"]) for x in study.rows_of(lines, method="projection")]
    met = [sum(round(lost, 6) < 1 for lost in share), len(share)]
    check_says(row, "lose {} to {} points on Fashion-MNIST and {} to {} on CIFAR-10 (target 2, missed by MBConv), the best rival {} to "
               "{} and {} to {}; without refitting {} to {} and {} to {};", *itertools.chain(*spans))  # fmt: skip
    row = headline("points lost at half the MACs")
    check_says(row, "| {} to {}, {} to {} | best of Torch-Pruning {} to {}, {} to {};", *itertools.chain(*spans[:4]))
    assert [key for key in both if half[key][2] > 2] == [("cifar", "mbconv")]
    margins = {(d, m, r): at[d, r].best_rival(m)[1] - at[d, r].lost(m, "capnas loss")[0] for d, m in both for r in study.RATIOS}
    closest = min(margins, key=lambda key: margins[key])
    assert closest[:2] == ("cifar", "convnext")
    check_says(text, "on all eight, by {} points in the closest case (ConvNeXt on CIFAR-10)", margins[closest])
    kept: dict[float, list[float]] = {0.5: [], 0.25: []}
    for (_, ratio), table in at.items():
        rivals = study.methods_of(table.at)[2:]
        assert len(rivals) == 7
        if ratio in kept:
            kept[ratio] += [line["kept"] for model in NETWORKS for rival in rivals for line in table.rows(model, rival)]
    check_says(text, "keep {} to {} of the MACs at half and {} to {} at a quarter", *(f(v) for v in kept.values() for f in (min, max)))

    lost = {key: sorted(100 * (x["before"] - x["accuracy"]) for x in study.rows_of(of[key[0]], method="projection", model=key[1]))
            for key in both}  # fmt: skip
    check_says(text, "is met by {} of {}:", *met)
    check_says(text, "{} of {} lose 1 point or more on their 99 % eigenspaces", met[1] - met[0], met[1])
    missing = {key for key in both if round(lost[key][-1], 6) >= 1}
    assert missing == {("fashion", "mbconv"), ("cifar", "mbconv"), ("cifar", "vgg11_bn-narrow")}
    check_says(text, "MBConv {} to {} points on Fashion-MNIST and {} to {} on CIFAR-10, VGG on CIFAR-10 {}, {} and {}.",
               *(lost[data, "mbconv"][i] for data in PICTURES for i in (0, -1)), *lost["cifar", "vgg11_bn-narrow"])  # fmt: skip

    tuned: dict[str, list[Cell]] = {}
    ahead: dict[int, list[float]] = {1: [], 5: []}
    for data, model in both:
        cells = tuned.setdefault(f"{PICTURES[data]}, {NETWORKS[model]}", [])
        for epochs in (1, 5):
            table = study.Table(of[data], 0.5, epochs)
            rival = table.best_rival(model)[0]
            ahead[epochs].append(mean(table.values(model, "capnas loss")) - mean(table.values(model, rival)))
            base = [table.base[model, seed] for seed in table.seeds[model]]
            cells += [mean(table.values(model, "capnas loss")), (f"{rival} {{}}", mean(table.values(model, rival))), mean(base)]
    check_table(text, "data, network | 1 epoch: capnas", tuned)
    check_says(text, "after one epoch by up to {} points and after five by up to {}; in the closest case (ConvNeXt on CIFAR-10, five "
               "epochs) it is {} behind", max(ahead[1]), max(ahead[5]), -min(ahead[5]))  # fmt: skip
    assert ahead[5].index(min(ahead[5])) == both.index(("cifar", "convnext"))
    targets = (RESULTS / "pruning" / "table.md").read_text().partition("## Targets")[2].partition("\nUnder 1 point")[0]
    last = [line.split("|")[8:10] for line in targets.splitlines() if line.startswith(("| fashion", "| cifar"))]
    assert len(last) == len(both)
    assert all(cell.strip().endswith(", met") for cells in last for cell in cells)


def test_the_texts_tell_what_the_refit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RESULTS / "pruning"
    monkeypatch.setitem(sys.modules, "run", module_of(folder / "run.py"))  # which the study imports by this name
    study = module_of(folder / "ablation.py")
    lines = [line for path in sorted((folder / "raw_ablation").glob("*.jsonl")) for line in lines_of(path)]
    gains, rivals, text = study.gains(lines), study.best_of_rivals(lines), section("pruning")
    both = [(data, model) for data in PICTURES for model in NETWORKS]
    assert list(gains) == both
    assert all(len(points) == 3 for by in gains.values() for points in by.values())
    mean = {factor: {key: statistics.mean(by[factor]) for key, by in gains.items()} for factor in study.FACTORS}
    clear = {factor: {key for key, by in gains.items() if not study.within(by[factor])} for factor in study.FACTORS}

    lost: dict[str, list[Cell]] = {}
    best: dict[tuple[str, str], float] = {}
    for data, model in both:
        here = study.rows_of(lines, data=data, model=model)
        whole = statistics.mean(study.by_seed(study.rows_of(here, method="unpruned")).values())
        kept = [statistics.mean(study.by_seed(study.of_choice(here, widths, choice), what).values())
                for widths, choice, what in (("loss", "capnas", "accuracy"), ("loss", "capnas", "without_refit"),
                                             ("uniform", "capnas", "accuracy"), *(("loss", c, "accuracy") for c in study.CHOICES[1:]),
                                             ("uniform", "random", "accuracy"))]  # fmt: skip
        own = [rows for (d, m, _), rows in rivals.items() if (d, m) == (data, model)]
        assert len(own) == len(study.RIVALS) - (model == "convnext")  # BN scale finds no batch norm
        best[data, model] = max(statistics.mean(study.by_seed(rows).values()) for rows in own)
        assert kept[0] - best[data, model] == pytest.approx(mean["Torch-Pruning"][data, model])
        best[data, model] = whole - best[data, model]
        lost[f"{PICTURES[data]}, {NETWORKS[model]}"] = [*(whole - k for k in kept), best[data, model]]
    check_table(text, "data, network | capnas | without the refit", lost)

    def spans(*factors: str) -> list[float]:
        return [end(mean[factor].values()) for factor in factors for end in (min, max)]

    hard = [(data, "mbconv") for data in PICTURES]
    residual = ("cifar", "resnet18-narrow")
    check_says(text, "adds {} to {} points to capnas' networks, and {} to {} to random channels in uniform widths, over which channels and "
               "widths together are then {} to {} points ahead (mean {})", *spans("refit", "refit of the simplest", "both"),
               statistics.mean(mean["both"].values()))  # fmt: skip
    assert clear["refit"] == clear["refit of the simplest"] == set(both)
    group, chance, wide = (mean[f] for f in ("channels: group magnitude", "channels: random", "widths"))
    bare = [statistics.mean(study.by_seed(study.of_choice(lines_at, "loss", study.CHOICES[i]), "without_refit").values())
            for key in hard for lines_at in [study.rows_of(lines, data=key[0], model=key[1])] for i in (0, 1)]  # fmt: skip
    check_says(text, "with the refit {} and {} points, both within a standard error, without it {} and {}.",
               *(mean["streams"][key] for key in hard), bare[0] - bare[1], bare[2] - bare[3])  # fmt: skip
    assert not clear["streams"]
    assert {key for key in both if any(gains[key]["streams"])} == set(hard)
    check_says(text, "ahead of group magnitude for MBConv alone ({} and {} points) and within {} of it elsewhere; of random channels for "
               "MBConv ({} and {}) and ResNet on CIFAR-10 ({}).", *(group[key] for key in hard),
               max(abs(group[key]) for key in both if key not in hard), *(chance[key] for key in (*hard, residual)))  # fmt: skip
    check_says(text, "ahead of uniform ones for MBConv and ResNet on CIFAR-10 ({} and {}).", wide[hard[1]], wide[residual])
    assert clear["channels: group magnitude"] == set(hard)
    assert clear["channels: random"] == {*hard, residual}
    assert clear["widths"] == {hard[1], residual}
    ahead = [hard[0], hard[1], residual]
    assert clear["Torch-Pruning"] == set(ahead)
    behind, level = [mean["Torch-Pruning"][key] for key in ahead], len(both) - len(ahead)
    kept = [line["kept"] for rows in rivals.values() for line in rows]
    says = "ahead for MBConv on both sets ({} and {} points) and ResNet on CIFAR-10 ({}) and within the spread in the other {} cases."
    check_says(text, "lose {} points at most and keep {} to {} of the MACs.", max(best.values()), min(kept), max(kept))
    check_says(text, says, *behind, level)
    check_says(text, "level with capnas in {} of the {} cases (below)", level, len(both))
    says = "the best rival is level with capnas in {} of the {} cases, and {}, {} and {} points behind in three ([measured](pruning/"
    check_says(section("figures"), says, level, len(both), *sorted(behind))
    check_says(table_row(STUDIES, "[pruning]"), "rivals refitted alike {} at most:", max(best.values()))
    check_says(headline("points lost at half the MACs"), "; refitted as here {} at most |", max(best.values()))

    measured = [line for path in sorted((folder / "raw").glob("*.jsonl")) for line in lines_of(path)]
    tables = {data: sys.modules["run"].Table(study.rows_of(measured, data=data), 0.5, 0) for data in PICTURES}
    assert {tables[data].best_rival(model)[0] for data, model in both} == set(study.RIVALS)
    for data, model in both:  # nothing is better than the default beyond the spread
        here = study.rows_of(lines, data=data, model=model)
        default = study.by_seed(study.rows_of(here, scope="loss", method="capnas"))
        others = [study.of_choice(here, widths, choice) for widths, choice in itertools.product(study.WIDTHS, study.CHOICES)]
        for other in map(study.by_seed, others + [rows for key, rows in rivals.items() if key[:2] == (data, model)]):
            points = [default[seed] - other[seed] for seed in default]
            assert statistics.mean(points) > 0 or study.within(points), (data, model)


def test_the_texts_tell_how_near_the_recommended_sizes_are() -> None:
    study, raw = module_of(RESULTS / "resolution" / "table.py"), RESULTS / "resolution" / "raw"
    full, tuned = (study.once(lines_of(raw / f"{name}.jsonl")) for name in ("full", "tuned"))
    found = list(study.judged(full, tuned))
    row, text = table_row(STUDIES, "[resolution]"), section("resolution")
    groups = [[f for f in found if f["all"] == everything] for everything in (False, True)]

    def near(cases: list[dict[str, Any]]) -> tuple[str, int, int]:
        return "{} of {}", sum(f["regret"] <= 0.5 for f in cases), len(cases)

    def largest(cases: list[dict[str, Any]]) -> tuple[str, int, int]:
        return "{} of {}", sum(f["largest"] <= 0.5 for f in cases), len(cases)

    def by_seed(cases: list[dict[str, Any]]) -> tuple[Any, ...]:
        parts = [[f for f in cases if f["tuned"]["seed"] == seed] for seed in study.SEEDS]
        assert {len(part) for part in parts} == {6}
        return "{}, {}, {} of {}", *(near(part)[1] for part in parts), 6

    compared = [[f for f in group if len({r["size"] for r in f["tuned"]["runs"]}) > 1] for group in groups]
    misses = [sorted(f["regret"] for f in group if f["regret"] > 0.5) for group in groups]
    check_table(text, "recommendations, three seeds", {
        "within 0.5 points of the best": [near(group) for group in groups],
        "the same, by seed": [by_seed(group) for group in groups],
        "where the border rule leaves more than one size to compare": [near(group) for group in compared],
        "within 0.5 points or two standard errors": [
            ("{} of {}", sum(f["regret"] <= max(0.5, 2 * f["error"]) for f in group), len(group)) for group in groups],
        "misses, points": [(", ".join(["{}"] * len(some)), *some) for some in misses],
        "mean regret, points": [statistics.mean(f["regret"] for f in group) for group in groups],
        "the sweep's own choice by validation accuracy: within 0.5 points": [
            ("{} of {}", sum(f["sweep"] <= 0.5 for f in group), len(group)) for group in groups],
        "mean regret of the sweep's own choice": [statistics.mean(f["sweep"] for f in group) for group in groups],
        "regret less that of the sweep's own choice, mean and its standard error": [
            ("{} ± {}", *study.beside_the_sweep(group)) for group in groups],
        "always the largest size affordable: within 0.5 points": [largest(group) for group in groups],
        "the same where the border rule leaves more than one size to compare": [largest(group) for group in compared],
        "mean regret of the largest size affordable": [statistics.mean(f["largest"] for f in group) for group in groups],
        "mean regret of a random size": [statistics.mean(f["random"] for f in group) for group in groups],
    })  # fmt: skip
    assert all(abs(mean) < 2 * error for mean, error in map(study.beside_the_sweep, groups))  # "within the spread of the cases"
    row_of_all = headline("image sizes within 0.5 points of the best")
    counts = [what(group)[1] for what in (near, largest) for group in groups]
    check_says(row_of_all, "| {} and {} of {} | the largest affordable {} and {} |", *counts[:2], len(groups[0]), *counts[2:])
    check_says((ROOT / "README.md").read_text(), "points of the best in {} of {} cases with a budget and in {} of {} with all sizes "
               "affordable; the largest size affordable, which takes no training, in {} and in {}.",
               counts[0], len(groups[0]), counts[1], len(groups[1]), *counts[2:])  # fmt: skip
    most = [max(f[key] for f in found) for key in ("macs", "cpu")]
    check_says(text, "at most {} % of the sweep's MACs and {} % of its CPU time", *most)
    check_says(row, "within 0.5 points of the best in {} of {} cases with a budget at the middle size (the largest size affordable: {}), "
               "in {} of {} with all sizes affordable (the largest: {}; greatest miss {}), at no more than {} % of the sweep's MACs",
               *near(groups[0])[1:], largest(groups[0])[1], *near(groups[1])[1:], largest(groups[1])[1], misses[1][-1],
               most[0])  # fmt: skip
    runs = {(r["network"], r["seed"], r.get("effect", "as it is"), r["size"]): study.accuracy(r) for r in full if r["data"] == "cifar"}
    effects: dict[str, list[Cell]] = {}
    changes = {"64 px": ("as it is", 64), "no early downsampling": ("no early downsampling", 32), "a canvas of 64 px": ("canvas", 64)}
    for label, (what, size) in changes.items():
        effects[label] = []
        for network in ("vgg16", "resnet18"):
            points = [runs[key] - runs[(*key[:2], "as it is", 32)] for s in study.SEEDS if (key := (network, s, what, size)) in runs]
            effects[label].append(("{}, {}, {}", *points) if points else "-")
    check_table(text, "change", effects)


def test_the_texts_tell_what_the_presets_name(tmp_path: Path) -> None:
    row, text = table_row(STUDIES, "[presets]"), section("presets")
    done, finished, fronts = {}, {}, {}
    for preset in ("principled", "principled-pareto"):
        run = open_run(shutil.copytree(RESULTS / "presets" / preset, tmp_path / preset))
        done[preset] = {t.number: e for t, e in run.evaluations() if e.status == "complete"}
        finished[preset], fronts[preset] = run.n_finished, {t.number for t in run.study.best_trials}
    one = done["principled"]
    best = max(one, key=lambda number: one[number].values["principled"])
    assert best == max(one, key=lambda number: one[number].metrics["accuracy"])
    names = ("accuracy", "saturation_evenness", "capacity_slack")
    middle = {name: statistics.median(e.metrics[name] for e in one.values() if e.metrics.get(name) is not None) for name in names}
    above = one[best].metrics["accuracy"] - middle["accuracy"]
    even = [one[best].metrics["saturation_evenness"], middle["saturation_evenness"]]
    front = [len(fronts["principled-pareto"] & set(done["principled-pareto"])), len(done["principled-pareto"])]
    check_says(row, "{} above the median but less even in its layers ({} against {})", above, *even)
    check_says(row, "keeps {} of {} trials on its front", *front)
    assert len(set(finished.values())) == 1
    check_says(text, "run end to end, {} trials each", finished["principled"])
    check_says(text, "`principled`, {} trained: the best sum is also the most accurate trial, {} above the median of its trials, less even "
               "in its layers than they are ({} against {}) and with like slack ({})",
               len(one), above, *even, middle["capacity_slack"])  # fmt: skip
    check_says(text, "with like slack ({})", one[best].metrics["capacity_slack"])
    check_says(text, "`principled-pareto`, {} trained: {} of {} trials stay on the front", front[1], *front)


def test_the_texts_tell_what_capacity_is_in_excess() -> None:
    row, text = table_row(STUDIES, "[excess]"), section("excess")
    studies = [read_study(RESULTS / "excess" / "raw" / f"{network}-{task}") for network in ("plain", "residual") for task in PICTURES]

    assert all(setting.verdict != "skipped" for study in studies for setting in study.read(tolerance=0.01).settings)
    derived = (RESULTS / "excess" / "table.md").read_text().split("\n## Excess capacity in decades, ")[1:]
    parts = {part.partition("\n")[0]: part for part in derived}
    expected: dict[str, list[Cell]] = {}
    for hold in ("validation", "train"):
        for points in (1, 2):
            readings = [study.read(tolerance=points / 100, hold=hold) for study in studies]
            seeds = [r.per_seed["club"] for r in readings]
            name = f"{'training' if hold == 'train' else hold} error, {points} point{'s' * (points > 1)}"
            expected[name] = [("{} ({} to {})", r.decades["club"], min(s), max(s)) for r, s in zip(readings, seeds)]
            part = parts[f"the {'training' if hold == 'train' else hold} error held within {points / 100:g}"]
            lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith(("| plain", "| residual"))]
            assert [float(line.split("|")[7]) for line in lines] == pytest.approx([r.decades["club"] for r in readings], abs=0.005), name
            if name == "validation error, 1 point":
                spared = (r.decades["club"] for r in readings)
                means = [statistics.mean(alone) for alone in seeds]
                check_says(row, "the plain network spares {} against {} and the residual {} against {}; in both networks the ranges over "
                           "the seeds meet (means {} and {}, {} and {})", *spared, *means)  # fmt: skip
                check_says(text, "means over the seeds alone: plain {} and {}, residual {} and {})", *means)
                for one, other in (seeds[:2], seeds[2:]):
                    assert min(one) < max(other) + 0.005
                    assert min(other) < max(one) + 0.005
    check_table(text, "what holds", expected)
    two = [study.read(tolerance=0.02) for study in studies]
    assert max(two[3].per_seed["club"]) < min(two[2].per_seed["club"])  # "for the residual network they no longer meet"
    assert max(two[0].per_seed["club"]) > min(two[1].per_seed["club"]) - 0.005
    for reading in two:
        assert all(s.verdict == "failed" for s in reading.settings if max(s.lipschitz, s.distance) <= 0.4)


def test_the_texts_tell_what_a_profile_costs() -> None:
    rows = lines_of(RESULTS / "profile_speed" / "raw" / "runs.jsonl")
    row, text = table_row(STUDIES, "[profile_speed]"), section("profile_speed")

    def of(key: str, **what: Any) -> list[float]:
        return [r[key] for r in rows if what.items() <= r.items()]

    two = of("wall", part="full", threads=2, what="all")
    base = statistics.median(of("cpu", part="full", threads=2, what="forward and backward"))
    everything = statistics.median(of("cpu", part="full", threads=2, what="all"))
    check_says(text, "a full profile still costs {} times the CPU time of a forward and backward pass", everything / base)
    check_says(text, "{} s on two cores in the median of three, {} at best, {} on one core", statistics.median(two), min(two),
               statistics.median(of("wall", part="full", threads=1, what="all")))  # fmt: skip
    check_says(text, "where a forward and backward pass takes {} s",
               statistics.median(of("wall", part="full", threads=2, what="forward and backward")))  # fmt: skip
    at_hand, own, seconds, searched = [], [], [], []
    study = module_of(RESULTS / "profile_speed" / "run.py")
    for model in dict.fromkeys(r["model"] for r in rows if r["part"] == "search"):
        cpu = {what: statistics.median(of("cpu", part="search", model=model, what=what))
               for what in ("naswot + synflow", "trace", "saturation + structure", study.SEARCH)}  # fmt: skip
        searched.append(cpu[study.SEARCH] / cpu["naswot + synflow"])
        seconds.append(cpu["saturation + structure"] + cpu["trace"])
        at_hand.append(cpu["saturation + structure"] / cpu["naswot + synflow"])
        own.append(seconds[-1] / cpu["naswot + synflow"])
    check_says(text, "with the trace at hand, {} and {} times one naswot and one synflow (target 2); a network as it is {} and {} times, "
               "with its own trace {} and {} times, under {} s.", *searched, *at_hand, *own, 0.13)  # fmt: skip
    assert max(seconds) < 0.13
    memory = statistics.median(of("mib", part="memory", what="forward and backward"))
    peaks = [mib / memory for mib in of("mib", part="memory", what="all")]
    assert len(peaks) == 5
    peak = statistics.median(peaks)
    check_says(text, "{} times that of the forward and backward pass, at most {} of five", peak, max(peaks))
    check_says(row, "{} s on two cores (target 5) and {} times the peak memory of a forward and backward pass (target 2); `capacity_score` "
               "of two networks, as a search reads it, {} and {} times one naswot and one synflow (target 2)",
               statistics.median(two), peak, *searched)  # fmt: skip
    assert statistics.median(two) < 5
    assert max(*own, *searched, *peaks) < 2


def test_the_rows_of_the_small_studies_tell_what_came_out() -> None:
    again = json.loads((RESULTS / "demo" / "retrained.json").read_text())
    tests, costs = ({r["trial"]: [s[key] for s in again if s["trial"] == r["trial"]] for r in again} for key in ("test_accuracy", "macs"))
    each = "{}, {}, {} and {}"
    check_says(table_row(STUDIES, "[demo]"), f"({{}} M, {{}} M): {{}} test accuracy against {{}}, four seeds each ({each}; {each})",
               *(c[0] / 1e6 for c in costs.values()), *map(statistics.mean, tests.values()), *itertools.chain(*tests.values()))  # fmt: skip

    files = [json.loads((RESULTS / "data_loading" / f"{name}.json").read_text()) for name in ("bench", "photographs")]
    rates = [{k: v for k, v in f["images_per_second_median"].items() if k != "memory"} for f in files]
    faster = [max(rate, key=lambda k: rate[k]) for rate in rates]
    check_says(table_row(STUDIES, "[data_loading]"), "{} times as fast on the embedded set, {} times on photographs",
               *(f["ratio_memory_to_timm_median"][k] for f, k in zip(files, faster)))  # fmt: skip
    for f, k in zip(files, faster):
        check_says(table_row(STUDIES, "[data_loading]"), "(in the slowest repeat {} times for each)", f["ratio_memory_to_timm_lowest"][k])

    families = lines_of(RESULTS / "profiles" / "raw" / "families.jsonl")
    assert not any(f["errors"] for f in families)
    lacking = Counter({f["model"].partition("_")[0]: f["layers"] - f["with_complexity"] for f in families})
    assert all(f["with_complexity"] == f["with_receptive_field"] == f["with_capacity"] for f in families)
    check_says(table_row(STUDIES, "[profiles]"), "all {} with every measure; {} layers that only make position codes ({} in maxvit, one in "
               "edgenext)", len(families), sum(lacking.values()), lacking["maxvit"])  # fmt: skip
    assert lacking["edgenext"] == 1

    with (RESULTS / "capacity_allocation" / "allocation.csv").open() as file:
        trained = list(csv.DictReader(file))
    free = [r for r in trained if r["architecture"] != "window"]  # of 20 taps, all among the first 32 lags
    early = sum(float(r["lags_0_7"]) + float(r["lags_8_31"]) > float(r["total"]) / 2 for r in free)
    low = sum(float(r["total"]) < float(r["generic_total"]) for r in trained)
    check_says(table_row(STUDIES, "[capacity_allocation]"), "in {} of the {} trainings that could choose, more than half of it into the "
               "first 32 of 64 lags (a {}-tap window cannot); of all {} the total is below that of generic weights in {}, and in {} the "
               "allocation is not unique", early, len(free), 20, len(trained), low,
               sum(r["unique"] == "no" for r in trained))  # fmt: skip


def test_versions_are_those_of_the_rows_where_nothing_is_measured_again(tmp_path: Path) -> None:
    copy = shutil.copytree(RESULTS / "profiles", tmp_path / "profiles")
    stored = copy / "environment.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"torch": "0.1"}))
    subprocess.run([sys.executable, str(copy / "run.py")], check=True, cwd=ROOT)
    assert json.loads(stored.read_text())["torch"] == "0.1"
    assert "torch 0.1," in (copy / "table.md").read_text()


def test_the_texts_tell_what_latencies_are() -> None:
    rows = lines_of(RESULTS / "latency" / "raw" / "runs.jsonl")

    def median(who: str, model: str, busy: int) -> float:
        return statistics.median(row[who] for row in rows if (row["model"], row["busy"]) == (model, busy))

    models = list(dict.fromkeys(row["model"] for row in rows))
    assert {len([r for r in rows if (r["model"], r["busy"]) == (model, busy)]) for model in models for busy in (0, 4)} == {7}
    assert len(models) == 5
    assert max(abs(median("capnas", model, 0) / median("timer", model, 0) - 1) for model in models) < 0.05
    times = {who: [median(who, model, 4) / median(who, model, 0) for model in models] for who in ("capnas", "timer")}
    row = table_row(STUDIES, "[latency]")
    check_says(row, "beside four busy processes on two cores {} to {} times that, the timer {} to {} times",
               *(f(times[who]) for who in ("capnas", "timer") for f in (min, max)))  # fmt: skip
    told = [100 * (f(times["capnas"]) - 1) for f in (min, max)]
    for text in ((ROOT / "README.md").read_text(), (ROOT / "capnas" / "latency.py").read_text()):
        check_says(" ".join(text.split()), "by {} to {} %", *told)


DERIVED = {
    "pruning/run.py": ("table.md", "--derive-only"),
    "pruning/ablation.py": ("ablation.md", "--table-only"),
    **{f"{study}/run.py": ("table.md", "--table-only") for study in ("excess", "latency", "profile_speed", "saturation_overhead")},
}


@pytest.mark.parametrize("script", list(DERIVED))
def test_the_tables_are_those_of_the_rows(script: str, tmp_path: Path) -> None:
    (study, _, name), (table, option) = script.partition("/"), DERIVED[script]
    copy = shutil.copytree(RESULTS / study, tmp_path / study)
    (copy / table).unlink()
    subprocess.run([sys.executable, str(copy / name), option], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert (copy / table).read_text() == (RESULTS / study / table).read_text()


def gates() -> dict[str, dict[str, Any]]:
    return json.loads((RESULTS / "search" / "gates.json").read_text())


def test_the_texts_tell_what_a_gate_saves_on_new_networks() -> None:
    found, text = gates(), section("search")

    def of(space: str, gate: str | None, trainings: int = 5) -> tuple[float, Any]:
        rows = [r for r in found[space]["rows"] if (r["gate"], r["trainings"]) == (gate, trainings)]
        return (rows[0]["regret"][0], rows[0]["random_trainings"]) if rows else (math.nan, None)

    def cell(space: str, gate: str) -> Cell:
        points, alike = of(space, gate)
        if math.isnan(points):
            return "-"
        return ("{}: {}", points, alike) if alike else ("{}: more than {}", points, found[space]["networks"])

    shown = ("capacity_score", "elsewhere", "macs", "published logsynflow")
    heads = {"nasbench201": "NAS-Bench-201, 1,000", "nasbench101": "NAS-Bench-101, 300", "macro": "NAS-Bench-Macro, 300",
             "mbconv": "`mbconv`, 100, pools of 50"}  # fmt: skip
    assert all(f", {found[space]['networks']:,}" in head for space, head in heads.items())
    check_table(text, "networks", {head: [*(cell(space, gate) for gate in shown), of(space, None)[0]] for space, head in heads.items()})
    new = list(heads)[:3]
    assert [found[space]["pool"] for space in heads] == [100, 100, 100, 50]
    check_says(text, "A pool of 100 has a best network that is {}, {} and {} points behind, and training all of it names one {}, {} and {} "
               "behind", *(found[s]["pool_best"] for s in new), *(found[s]["all_of_pool"] for s in new))  # fmt: skip
    row = headline("train the best 5 of 100 untrained draws")
    check_says(row, "| as good as {}, {} and {} random trainings | best 5 by MACs: {}, {}, {} |",
               *(of(s, gate)[1] for gate in ("capacity_score", "macs") for s in new))  # fmt: skip
    scored, costs, alone = ([of(s, gate) for s in new] for gate in ("capacity_score", "macs", None))
    row = table_row(STUDIES, "the best 5 of 100 untrained draws are trained")
    check_says(row, "| {}, {}, {}; as good as {}, {} and {} random trainings | MACs {}, {}, {}; five random trainings {}, {}, {} | {}, {} "
               "and {} networks, 2,000 pools; by weights fitted without the space {}, {}, {} |",
               *(r for r, _ in scored), *(n for _, n in scored), *(r for r, _ in costs), *(r for r, _ in alone),
               *(found[s]["networks"] for s in new), *(of(s, "elsewhere")[0] for s in new))  # fmt: skip


def test_what_a_gate_saves_is_found_again_by_drawing() -> None:
    records = lines_of(RANKING / "raw" / "nasbench101-others.jsonl")
    score = [sum(weight * r["scores"][term] for term, weight in CAPACITY_WEIGHTS.items()) for r in records]
    best, chance = max(r["accuracy"] for r in records), random.Random(1)
    sums = {"capacity_score": 0.0, None: 0.0}
    for _ in range(1000):
        pool = chance.sample(range(len(records)), 100)
        for gate, trained in (("capacity_score", sorted(pool, key=lambda i: -score[i])[:5]), (None, pool[:5])):
            named = max(trained, key=lambda i: records[i]["short_accuracy"])
            sums[gate] += (best - records[named]["accuracy"]) / 1000
    rows = {r["gate"]: r["regret"] for r in gates()["nasbench101"]["rows"] if r["trainings"] == 5}
    mean, low, high = rows["capacity_score"]
    assert abs(sums["capacity_score"] - mean) < 2.5 * (high - low)
    assert sums[None] == pytest.approx(rows[None][0], abs=0.2)


def test_the_texts_tell_what_chooses_among_draws() -> None:
    found = json.loads((RESULTS / "search" / "draws.json").read_text())
    text, study = (ROOT / "README.md").read_text(), section("search")
    rho = {case: study["spearman"] for case, study in found.items()}
    names = ("accuracy of the short training", "combined", "macs", "capacity_score")
    early = "combined, what it knows before training"
    check_table(study, "draws", {
        f"{found[case]['draws']} of `{space}`": [("{} points", 100 * found[case]["deviation"]), *(rho[case][n] for n in (*names, early))]
        for case, space in (("fashion", "resnet"), ("cifar10", "mbconv"))})  # fmt: skip
    assert all(rho[case]["combined"] > rho[case][names[0]] for case in rho)
    named = [100 * found[case]["named"][n] for case in ("cifar10", "fashion") for n in ("combined", names[0], "macs")]
    check_says(
        study, "Out of ten draws of `mbconv` it names one of {}, accuracy one of {}, MACs one of {}; of `resnet` {}, {} and {}.", *named
    )
    less = [found[case]["combined_less"][n] for n in (names[0], "macs") for case in ("fashion", "cifar10")]
    check_says(study, "`combined` less short training {} [{}, {}] and {} [{}, {}], less MACs {} [{}, {}] and {} [{}, {}].",
               *itertools.chain(*less))  # fmt: skip
    assert [low < 0 < high for _, low, high in less] == [True, True, False, False]  # "beyond MACs, and not clearly beyond the accuracy"
    new, every = found["cifar10"]["new"], found["cifar10"]["draws"]
    assert "new" not in found["fashion"]
    apart = [rho[case]["accuracy less both losses"] for case in ("fashion", "cifar10")]
    check_says(study, "The accuracy less both losses alone has {} and {}", *apart)
    one = "accuracy after one epoch, each draw with weights of its own"
    check_says(study, "an accuracy after one epoch of weights of its own {} and {}", *(rho[case][one] for case in ("fashion", "cifar10")))
    check_says(study, "{} of the {} draws of `mbconv` are architectures of the ranking study, which the weights were fitted on. Over the "
               "{} others `combined` has {}, the short training {}, MACs {}, `capacity_score` {}.",
               every - new["draws"], every, new["draws"],
               *(new["spearman"][n] for n in ("combined", *names[:1], *names[2:])))  # fmt: skip
    check_says(headline("rank random networks under a limit on MACs"), "| {}, {} (`combined`) | its accuracy alone {}, {}; MACs {}, {} |",
               *(rho[case][n] for n in ("combined", names[0], "macs") for case in ("fashion", "cifar10")))  # fmt: skip
    says = "({} on {} draws of `resnet`, {} on {} of `mbconv`), by what `combined` knows before a training at {} and {}, by MACs at {} and"
    told = [x for case, draws in (("fashion", found["fashion"]["draws"]), ("cifar10", every)) for x in (rho[case]["capacity_score"], draws)]
    check_says(text, says + " {}. There a search is better without a gate", *told,
               *(rho[case][name] for name in (early, "macs") for case in ("fashion", "cifar10")))  # fmt: skip
    gates = ("the best 4 by macs", "all 14", "4 random ones", f"the best 4 by {early}", "the best 4 by capacity_score")
    told = [100 * found[case]["gated"][gate]["combined"] for gate in gates for case in ("fashion", "cifar10")]
    check_says(study, "Out of 14 draws the 4 of most MACs are trained: `combined` names one of {} (`resnet`) and {} (`mbconv`), after all "
               "14 trainings one of {} and {}, of 4 random ones {} and {}, of the best 4 by what it knows before a training {} and {}, by "
               "`capacity_score` {} and {}.", *told)  # fmt: skip


def test_a_gate_leaves_the_best_few_of_each_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "real", module_of(SEARCHES.parent / "real.py"))  # which the study imports by this name
    draws = module_of(SEARCHES.parent / "draws.py")
    accuracy = numpy.arange(20.0)
    found = {"macs": accuracy, draws.EARLY: -accuracy, "capacity_score": accuracy, draws.SHORT: accuracy, "combined": -accuracy}
    got = draws.gated(found, accuracy, draws=4000)
    best, worst = got["the best 4 by macs"], got[f"the best 4 by {draws.EARLY}"]
    assert best[draws.SHORT] == got["all 14"][draws.SHORT] == pytest.approx(14 / 15 * 21 - 1, abs=0.1)  # the greatest of 14 out of 1 to 20
    assert best["combined"] == pytest.approx(11 / 15 * 21 - 1, abs=0.15)  # their fourth greatest
    assert worst["combined"] == got["all 14"]["combined"] == pytest.approx(1 / 15 * 21 - 1, abs=0.1)
    assert got["4 random ones"][draws.SHORT] == pytest.approx(4 / 5 * 21 - 1, abs=0.15)


def test_the_studies_run_in_the_environment_of_the_tests() -> None:
    beside = {path.stem for path in RESULTS.rglob("*.py")} | {"delve"}  # a study's own modules; the peer that one study asks for by name
    for path in sorted(RESULTS.rglob("*.py")):
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "capnas"]
            for root in {name.partition(".")[0] for name in names} - beside:
                assert importlib.util.find_spec(root), f"{path.name} imports {root}, which the dev extra does not bring"


def test_the_texts_tell_what_losses_add() -> None:
    found = json.loads((RESULTS / "search" / "losses.json").read_text())
    assert found["weights"]["combined"] == dict(WEIGHTS)
    rho, text = found["spearman"], section("search")
    shown = ("accuracy", "accuracy - both losses", "the four terms of before, without losses", "the four terms of before", "combined")
    labels = {
        "fashion, 1": "`resnet` on Fashion-MNIST, 1 epoch", "fashion, 3": "the same, 3 epochs", "fashion, 5": "the same, 5 epochs",
        "cifar10, 1": "`mbconv` on CIFAR-10, 1 epoch", "cifar10, 3": "the same draws, 3 epochs", "cifar10, 5": "the same draws, 5 epochs",
        "mbconv, 1 of 6": "`mbconv` of the ranking study, 1 of 6 epochs", "nasbench201, 1": "NAS-Bench-201, one epoch of our own",
    }  # fmt: skip
    assert rho.keys() == labels.keys()
    mean = {name: statistics.mean(row[name][0] for row in rho.values()) for name in found["weights"]}
    rows = {label: [rho[key]["networks"], *(rho[key][name][0] for name in shown)] for key, label in labels.items()}
    check_table(text, "networks, training", rows | {"mean": ["", *(mean[name] for name in shown)]})
    assert mean["combined"] > max(mean[name] for name in shown[:-1])
    assert mean["combined"] > max(mean.values()) - 0.01  # the defaults are what the table supports
    below = sum(row["the four terms of before, without losses"][0] < row["accuracy"][0] for row in rho.values())
    assert below == 5
    held = found["finals"]["fashion"]
    assert found["finals"]["cifar10"]["the best of the pool"] - found["finals"]["cifar10"]["combined"] < 0.05  # "or nearly so"
    check_says(
        text,
        "Out of {} draws of `resnet` `combined` names one of {} by its 3 epochs, accuracy one of {}; the best has {}. Finals, "
        "in which the best 5 are trained for 5 epochs, name one of {} after the accuracy and of {} after `combined`",
        held["pool"],
        *(held[name] for name in ("combined", "accuracy", "the best of the pool", "accuracy, then finals", "combined, then finals")),
    )
    moved = [abs(mean[name] - mean["combined"]) for name in mean if name.startswith("combined, half") or name.startswith("combined, twice")]
    check_says(text, "Halving or doubling a weight moves the mean by at most {}.", max(moved))


def test_losses_are_read_as_the_table_says() -> None:
    """One column by hand: the raw rows, the draws' final accuracies and Spearman's correlation from its definition."""
    rows = [r for r in lines_of(SEARCHES / "losses.jsonl") if (r["case"], r["epochs"]) == ("cifar10", 3)]
    final = {f"draw {r['draw']}": r["accuracy"] for r in lines_of(SEARCHES / "draws-cifar10.jsonl")}
    value = [r["accuracy"] - r["val_loss"] - r["train_loss"] for r in rows]
    ranks = [[sorted(values).index(v) for v in values] for values in (value, [final[r["arch"]] for r in rows])]
    n = len(rows)
    rho = 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks)) / (n * (n * n - 1))
    shown = json.loads((RESULTS / "search" / "losses.json").read_text())["spearman"]["cifar10, 3"]
    assert n == shown["networks"]
    assert rho == pytest.approx(shown["accuracy - both losses"][0], abs=0.005)  # ties apart
