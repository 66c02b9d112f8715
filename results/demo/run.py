"""The demo study: 30 trials of the resnet space on the embedded images, the best and the median architecture retrained alike.

    python results/demo/run.py                 # search (about 15 minutes on two idle cores), retrain, tables and figures
    python results/demo/run.py --derive-only   # table.md, report.md and the figures from the raw files again

Raw: study.toml, journal.log and trials.csv (the trials), environment.json, retrained.json. Derived: table.md, report.md, *.svg.
"""

import argparse
import math
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path

import optuna

from capnas.report import Report
from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig
from capnas.search.trials import read_retrained, rebuild, retrain_trial

HERE = Path(__file__).resolve().parent
CONFIG = {"space": "resnet", "data": "fashion-mnist-12k", "study": "demo", "trials": 30, "epochs": 3, "values": ("combined",),
          "seed": 0}  # fmt: skip
EPOCHS, SEEDS = 10, (0, 1, 2, 3)


def chosen(run):
    """The best trial and the median one, by the value that was optimized, among those that trained to the end."""
    done = sorted((t for t, e in run.evaluations() if e.status == "complete"), key=lambda t: -t.values[0])
    return {"best": done[0].number, "median": done[len(done) // 2].number}


def svg(series, *, title, x_label, y_label, y_range):
    """A small chart: series is a list of (name, colour, points, how), "line", "dots" or "steps", each value held to the next."""
    width, height, left, top = 720, 320, 60, 50
    xs = [x for _, _, points, _ in series for x, _ in points]
    low, high = min(xs), max(xs)

    def place(x, y):
        across = (x - low) / ((high - low) or 1)
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return f"{left + across * (width - left - 20):.1f},{top + (1 - up) * (height - top - 45):.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/><text x="{left}" y="20" font-size="15">{title}</text>']  # fmt: skip
    for step in range(6):
        value = y_range[0] + (y_range[1] - y_range[0]) * step / 5
        x1, y1 = place(low, value).split(",")
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{width - 20}" y2="{y1}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y1) + 4}" text-anchor="end">{value:.2f}</text>')
    for position, (name, colour, points, how) in enumerate(series):
        if how != "dots":
            held = [(after, y) for (_, y), (after, _) in pairwise(points)] if how == "steps" else []
            path = " ".join(place(*p) for p in sorted([*points, *held]))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if how != "steps":
            places = [place(*p).split(",") for p in points]
            parts += [f'<circle cx="{x}" cy="{y}" r="3.2" fill="{colour}"/>' for x, y in places]
        parts.append(f'<text x="{left + position * 220}" y="40" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{x_label}: {low:g} to {high:g}</text>')
    parts.append(f'<text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})" text-anchor="middle">{y_label}</text></svg>')
    return "\n".join(parts) + "\n"


def derive(run):
    """Everything that is not raw, from what is."""
    (HERE / "report.md").write_text(Report.of(run).to_markdown())
    picks, records = chosen(run), read_retrained(run)
    head = ("architecture", "trial", "combined", "validation accuracy, 3 epochs", "saturation evenness", "params", "MACs",
            "test accuracy retrained, mean (each seed)")  # fmt: skip
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    curves = []
    for (name, number), colour in zip(picks.items(), ("#c4532f", "#2f6db5")):
        evaluation = run.evaluation(number)
        alike = [r for r in records if r["trial"] == number and r["epochs"] == EPOCHS and r["status"] == "complete"]
        scores = [r["test_accuracy"] for r in alike]
        each = f"{statistics.mean(scores):.4f} ({', '.join(f'{s:.4f}' for s in scores)})" if scores else "-"
        numbers = (evaluation.values["combined"], evaluation.metrics["accuracy"], evaluation.metrics["saturation_evenness"])
        shown = " | ".join(f"{value:.4f}" for value in numbers)
        rows.append(f"| {name} | {number} | {shown} | {evaluation.n_params:,} | {evaluation.macs:,} | {each} |")
        curves.append((f"{name}: trial {number}", colour, list(enumerate((r.saturation for r in evaluation.profile.layers), 1)), "line"))
    counts = Counter(evaluation.status for _, evaluation in run.evaluations())
    outcomes = ", ".join(f"{status} {count}" for status, count in counts.items())
    note = (f"Retrained alike: {EPOCHS} epochs on train and validation (10,000 images), seeds {', '.join(map(str, SEEDS))}, evaluated "
            f"once on the 2,000 test images. Outcomes of the {run.n_finished} trials: {outcomes}.")  # fmt: skip
    (HERE / "table.md").write_text("\n".join(rows) + "\n\n" + note + "\n")
    done = [(t.number, e.metrics["accuracy"]) for t, e in run.evaluations() if e.status == "complete"]
    best = [(n, max(a for m, a in done if m <= n)) for n, _ in done]
    low, high = min(a for _, a in done), max(a for _, a in done)
    step = max(math.ceil((high - low) / 4 * 100), 1) / 100  # ticks on whole hundredths
    low = math.floor(low / step) * step
    figure = svg([("best so far", "#c4532f", best, "steps"), ("trial", "#2f6db5", done, "dots")],
                 title="Validation accuracy after three epochs", x_label="trial", y_label="accuracy",
                 y_range=(low, low + 5 * step))  # fmt: skip
    (HERE / "accuracy.svg").write_text(figure)
    figure = svg(curves, title="Saturation through the network after three epochs", x_label="conv or linear layer in execution order",
                 y_label="saturation k / width", y_range=(0, 1))  # fmt: skip
    (HERE / "saturation.svg").write_text(figure)
    print((HERE / "table.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--derive-only", action="store_true")
    if not parser.parse_args().derive_only:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = run_study(StudyConfig(**CONFIG, out=str(HERE)))
        for seed in SEEDS:
            for number in chosen(study).values():
                retrain_trial(rebuild(study, number), epochs=EPOCHS, seed=seed)
    derive(open_run(HERE))
