"""Report of a run from its stored trials: numbers, tables in markdown, one self-contained page. Never trains anything.

Figures and the page need the extra ``report`` (plotly, jinja2); numbers and markdown need nothing more.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from capnas.documents import or_nan, write_whole
from capnas.errors import MissingDependencyError, counted, one_line
from capnas.measures.ranking import chance_level, partial_spearman, spearman
from capnas.objective.evaluation import Evaluation
from capnas.objective.finals import best_first, feasible
from capnas.objective.gates import UNTRAINED
from capnas.objective.targets import LATENCY, TOLD, direction_of, summed
from capnas.report.figures import figures
from capnas.scoring import COSTS, PROFILED
from capnas.search.export import read_environment
from capnas.search.runs import RunResult
from capnas.search.trials import read_retrained

_SETTINGS = (
    "space",
    "data",
    "values",
    "weights",
    "epochs",
    "sampler",
    "pruner",
    "max_params",
    "max_macs",
    "max_latency",
    "gate",
    "pool",
    "resolutions",
    "blocks",
    "reuse",
    "finalists",
    "final_epochs",
    "seed",
    "train",
    "data_options",
)
_EMPTY = "No trial has given a value yet; the outcomes say why."
_RETRAINED = ("trial", "epochs", "seed", "status", "test_accuracy", "test_images", "n_params", "macs")
_FINALS = ("trial", "epochs", "status", *TOLD, "seconds")
_FEW = 10  # complete trials below which nothing is said about correlations at equal size
_NOTES = {
    "Best trials": "Accuracy is on the validation split after the short training; it ranks candidates and is not the accuracy to quote.",
    "Finals": "The best trials trained again from their first weights, for longer; named as the best trial is the one with the "
    "highest accuracy less its losses on validation and in training. As the winner of several it is flattered: the test split tells.",
    "What went with accuracy": "Spearman rank correlations over complete trials that are no duplicates; partial: at equal parameters "
    "and MACs (partial rank correlation). Values below chance, in size, are what unrelated numbers give in 19 of 20 studies. "
    "`init_` is read before training; a score that the search rewards is not tested by it.",
    "Seconds by stage": "Wall-clock seconds of the trials that reached the stage, and of the trainings of finals.",
    "Retrained": "Trained anew on train and validation, evaluated once on the test split.",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report of a run.

    Attributes:
        run: as `capnas.open_run` or `capnas.run_study` gives it.
    """

    run: RunResult

    @classmethod
    def of(cls, run: RunResult) -> Report:
        """The report of a run."""
        return cls(run=run)

    def to_dict(self) -> dict[str, Any]:
        """All numbers in plain JSON types, see `summary`."""
        return summary(self.run)

    def to_markdown(self) -> str:
        """Headed tables."""
        data = self.to_dict()
        lines = [f"# {data['study']['name']}", "", _lead(data), "", _verdict(self.run), ""]
        for title, rows in tables(data).items():
            lines += [f"## {title}", "", *_markdown_table(rows), ""]
            lines += [_NOTES[title], ""] if title in _NOTES else []
        return "\n".join(lines)

    def figures(self) -> dict[str, Any]:
        """Plotly figures by title, see `capnas.report.figures.figures`."""
        return figures(self.run, self.to_dict()["correlations"])

    def write_html(self, path: str | Path) -> Path:
        """Write the report as one page that needs no network.

        Raises:
            MissingDependencyError: plotly or jinja2 is not installed.
        """
        data = self.to_dict()
        parts: list[dict[str, str]] = []
        for title, figure in figures(self.run, data["correlations"]).items():
            body = figure.to_html(full_html=False, include_plotlyjs=not parts, config={"displayModeBar": False, "responsive": True})
            parts.append({"title": title, "body": body})
        try:
            import jinja2
        except ModuleNotFoundError as error:
            raise MissingDependencyError("the page needs jinja2: pip install 'capnas[report]'.") from error
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.globals["cell"] = _cell
        template = environment.from_string((resources.files("capnas.report") / "report.html.j2").read_text(encoding="utf-8"))
        page = template.render(
            study=data["study"],
            lead=_lead(data),
            verdict=_verdict(self.run),
            cards=_cards(data),
            tables=tables(data),
            notes=_NOTES,
            figures=parts,
            layers=_layers(self.run),
            folder=shlex.quote(str(self.run.folder)),
        )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, page)
        return target


def summary(run: RunResult) -> dict[str, Any]:
    """The numbers of the report as one JSON-safe mapping.

    Returns:
        study: name, trials asked for and finished, and the settings.
        environment: versions and hardware, as the run stored them.
        named: number of the best trial, by the finals where they were held; None without any.
        named_by_finals: whether it is their winner.
        finals_left: how many finalists a run of finished trials has still to train.
        best: the Pareto set, or with one value the ten best trials and the one that is named; best first value first.
        outcomes: status, number of trials, the reason of the first such trial; one row per kind of reason.
        seconds: per stage, the finals the last, the number of trials, their sum and median.
        correlations: per score its Spearman correlation with accuracy, the partial one, what chance gives, and the number of trials.
        finals: the finalists with what their final training gave, best first value first; see `capnas.objective.finals`.
        retrained: see `capnas.search.trials.retrain_trial`, without curves.
        checklist: what a reader needs to judge the study (after Lindauer & Hutter 2020), question to answer.
    """
    rows, config = run.evaluations(), run.config.to_dict()
    retrained = [{k: v for k, v in record.items() if k != "curve"} for record in read_retrained(run)]
    data = {
        "study": {"name": run.config.name, "asked": run.config.trials, "finished": run.n_finished, "complete": run.n_complete}
        | {name: config[name] for name in _SETTINGS if name in config},
        "environment": read_environment(run.folder / "environment.json"),
        "named": None if run.best is None else run.best.number,
        **(finals := run.finals_document()),
        "best": [_trial_row(t, e) for t, e in _front(run)],
        "finals": [{name: final[name] for name in _FINALS} for final in finals["finals"]],
        "outcomes": _outcomes(rows),
        "seconds": _seconds(rows, finals["finals"]),
        "correlations": _correlations([e for _, e in rows if e.status == "complete"]),
        "retrained": retrained,
    }
    return data | {"checklist": _checklist(data)}


def tables(data: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables of a `summary` by title, each a list of rows with the same keys."""
    settings = {k: v for k, v in data["study"].items() if k in _SETTINGS}
    environment = {k: v for k, v in data["environment"].items() if v is not None and k != "packages"} | data["environment"].get(
        "packages", {}
    )
    found = {
        "Best trials": data["best"],
        "Finals": data["finals"],
        "Retrained": [{k: r[k] for k in _RETRAINED} for r in data["retrained"]],
        "Outcomes": data["outcomes"],
        "Seconds by stage": data["seconds"],
        "What went with accuracy": data["correlations"],
        "To judge this study": [{"question": k, "answer": v} for k, v in data["checklist"].items()],
        "Settings": [{"setting": k, "value": _text(v)} for k, v in settings.items()],
        "Environment": [{"what": k, "value": _text(v)} for k, v in environment.items()],
    }  # fmt: skip
    return {title: rows for title, rows in found.items() if rows}


def _lead(data: Mapping[str, Any]) -> str:
    study, (spent, what) = data["study"], _spent(data)
    unit = f"; {LATENCY} in milliseconds of one image" if any(LATENCY in row for row in data["best"]) else ""
    return (
        f"Space {Path(study['space']).name} on {Path(study['data']).name}: {study['finished']} of {study['asked']} trials finished, "
        f"{study['complete']} with a value, in {spent / 60:.1f} minutes of {what}; {counted(study['epochs'], 'epoch')} each, "
        f"sampler {study['sampler']}, seed {study['seed']}, optimizing {', '.join(study['values'])}{_sum(study)}{unit}."
    )


def _spent(data: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds in all, and on what."""
    return sum(row["sum"] for row in data["seconds"]), "trials and finals" if data["finals"] else "trials"


def _verdict(run: RunResult) -> str:
    if run.best is None:
        return _EMPTY
    how = "the winner of the finals" if run.named_by_finals else f"by {run.config.values[0]}"
    return f"The best is trial {run.best.number}, {how}. {run.owed}".strip()


def _sum(study: Mapping[str, Any]) -> str:
    """What the sum among the values is made of, each term with the sign that it counts with."""
    if not (names := summed(study["values"])):
        return ""
    signed = {term: weight if direction_of(term) == "maximize" else -weight for term, weight in study.get("weights", {}).items()}
    terms = "".join(f" {'-' if weight < 0 else '+'} {abs(weight):g} {term}" for term, weight in signed.items())
    return f"; {names.pop()} is accuracy{terms}"


def _cards(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    if data["named"] is None:
        return []
    best: Mapping[str, Any] = next((row for row in data["best"] if row["trial"] == data["named"]), {"trial": data["named"]})
    cards = [
        (name, _cell(best[name]))
        for name in dict.fromkeys([*data["study"]["values"], "accuracy", "params", "macs"])
        if best.get(name) is not None
    ]
    final = [r for r in data["retrained"] if r["trial"] == best["trial"] and r["status"] == "complete"]
    cards += [
        (f"accuracy on validation, {counted(row['epochs'], 'epoch')}", _cell(row["accuracy"]))
        for row in data["finals"]
        if row["trial"] == best["trial"] and row["status"] == "complete"
    ]
    if final:
        longest = max(r["epochs"] for r in final)
        tests = [r["test_accuracy"] for r in final if r["epochs"] == longest]
        cards.append((f"test accuracy, {counted(longest, 'epoch')}, mean of {len(tests)}", _cell(statistics.mean(tests))))
    return [("best trial", str(best["trial"])), *cards]


def _front(run: RunResult) -> list[tuple[FrozenTrial, Evaluation]]:
    """With several values the Pareto set; with one the ten best trials and the one that is named. Duplicates are left out."""
    found = {t.number: (t, e) for t, e in run.evaluations() if t.values and e.status == "complete" and feasible(t)}
    shown = run.front if len(run.config.values) > 1 else best_first(run.study, (t for t, _ in found.values()))[:10]
    if run.best is not None and run.best.number not in {t.number for t in shown}:  # what finals name may be no. 11 or later
        shown.append(run.best)
    return [found[t.number] for t in shown if t.number in found]


def _trial_row(trial: FrozenTrial, found: Evaluation) -> dict[str, Any]:
    metrics = {
        name: found.metrics.get(name) for name in ("accuracy", "saturation_mean", "saturation_evenness", "block_saturation_evenness")
    }
    sizes = {"params": found.n_params, "macs": found.macs, "pixels": found.image_size, "seconds": round(sum(found.seconds.values()), 1)}
    timed = {LATENCY: found.metrics[LATENCY]} if LATENCY in found.metrics else {}
    return {"trial": trial.number} | dict(found.values) | metrics | timed | sizes


def _outcomes(rows: Sequence[tuple[FrozenTrial, Evaluation]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for _, found in rows:
        kind = re.sub(r"\d[\d,._]*(?:e[+-]?\d+)?", "N", found.reason)
        groups[found.status, kind if found.status != "over_budget" else ""].append(found.reason)
    listed = [{"outcome": s, "trials": len(r), "reason (of the first)": r[0] or "-"} for (s, _), r in groups.items()]
    return sorted(listed, key=lambda row: -row["trials"])


def _seconds(rows: Sequence[tuple[FrozenTrial, Evaluation]], finals: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    stages: dict[str, list[float]] = defaultdict(list)
    for _, found in rows:
        for stage, seconds in found.seconds.items():
            stages[stage].append(seconds)
    for final in finals:
        stages["finals"].append(final["seconds"])
    return [{"stage": s, "trials": len(v), "sum": round(sum(v), 2), "median": round(statistics.median(v), 3)} for s, v in stages.items()]


def _correlations(complete: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Strongest first; scores that are nowhere missing only."""
    accuracy = [or_nan(e.metrics.get("accuracy")) for e in complete]
    controls = [[float(e.n_params or 0) for e in complete], [float(e.macs or 0) for e in complete]]
    found = []
    for name in (*COSTS, LATENCY, *PROFILED, *(f"init_{s}" for s in UNTRAINED)):
        values = [or_nan(e.metrics.get(name)) for e in complete]
        alone = spearman(values, accuracy)
        if math.isnan(alone):
            continue
        partial = math.nan if name in COSTS or len(complete) < _FEW else partial_spearman(values, accuracy, controls)
        level = chance_level(len(complete))
        row = {"score": name, "spearman": round(alone, 3), "partial": None if math.isnan(partial) else round(partial, 3)}
        found.append(row | {"chance": None if math.isnan(level) else round(level, 3), "trials": len(complete)})
    return sorted(found, key=lambda row: -abs(row["spearman"]))


def _checklist(data: Mapping[str, Any]) -> dict[str, str]:
    study, tested = data["study"], [r for r in data["retrained"] if r["status"] == "complete"]
    seeds = sorted({r["seed"] for r in tested})
    spent, what = _spent(data)
    random = study["sampler"] == "random"
    return {
        "Same training for all candidates?": (
            f"yes: {counted(study['epochs'], 'epoch')}, the settings below, one seed for weights and order"
        ),
        "Seeds of the search?": f"one ({study['seed']}): repeat with other --seed to see the spread",
        "Random search as a baseline?": "this study is one" if random else "not part of this run: the same command with --sampler random",
        "Final networks trained to the end?": f"yes: {len(tested)}, seeds {', '.join(map(str, seeds))}"
        if tested
        else "no: capnas best --retrain",
        "Test split unseen by the search?": "yes: opened by the final evaluation only",
        "Cost?": f"{spent / 3600:.2f} hours of {what}"
        + (f" on {data['environment'].get('cpu')}" if data["environment"].get("cpu") else ""),
        "To repeat it?": "study.toml, seed and versions are in the run's folder; equal numbers need the same number of threads",
    }


def _layers(run: RunResult) -> dict[str, Any] | None:
    best = run.best
    found = None if best is None else Evaluation.of(best)
    if best is None or found is None or found.profile is None:
        return None
    columns = ("name", "kind", "width", "k", "saturation", "effective_rank", "rows", "params")
    rows = [{c: getattr(row, c) for c in columns} for row in (*found.profile.blocks, *found.profile.layers)]
    return {"trial": best.number, "rows": rows, "mode": found.profile.mode, "threshold": found.profile.threshold}


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0])
    body = (f"| {' | '.join(one_line(_cell(row.get(name))).replace('|', '/') for name in names)} |" for row in rows)
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(names), *body]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
    return str(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
