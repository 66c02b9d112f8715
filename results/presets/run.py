"""A search with each preset of the three theories on real images: `principled` (one number) and `principled-pareto` (five values).

    python results/presets/run.py [--trials 14]     # about ten minutes of one core; run again it resumes
    python results/presets/run.py --derive-only     # table.md from the journals again

Raw: one folder a preset with study.toml, journal.log, trials.csv and environment.json.
"""

import argparse
import statistics
from pathlib import Path

import optuna

from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig

HERE = Path(__file__).resolve().parent
PRESETS = ("principled", "principled-pareto")
SHOWN = ("accuracy", "init_block_saturation_evenness", "saturation_evenness", "depth_evenness", "capacity_slack")
SETTING = {"space": "resnet", "data": "fashion-mnist-12k", "epochs": 2, "max_macs": 4_000_000, "seed": 0}


def row(name, number, evaluation):
    values = (f"{evaluation.metrics[m]:.3f}" if evaluation.metrics.get(m) is not None else "-" for m in SHOWN)
    return f"| {name} | {number} | {' | '.join(values)} | {evaluation.n_params:,} | {evaluation.macs:,} |"


def derive():
    """table.md: what each preset named beside the median of what it trained."""
    lines = [f"| preset, architecture | trial | {' | '.join(SHOWN)} | params | MACs |", "| --- |" + " ---: |" * (len(SHOWN) + 3)]
    notes = []
    for preset in PRESETS:
        if not (HERE / preset / "journal.log").exists():
            continue
        run = open_run(HERE / preset)
        done = [(t, e) for t, e in run.evaluations() if e.status == "complete"]
        front = {t.number for t in run.study.best_trials}
        if preset == "principled":
            best = max(done, key=lambda pair: pair[1].values["principled"])
            lines.append(row("principled: best", best[0].number, best[1]))
            most = max(done, key=lambda pair: pair[1].metrics["accuracy"])
            lines.append(row("principled: most accurate", most[0].number, most[1]))
        else:
            lines += [row("pareto front", t.number, e) for t, e in done if t.number in front]
        known = [[e.metrics[m] for _, e in done if e.metrics.get(m) is not None] for m in SHOWN]
        middle = (f"{statistics.median(values):.3f}" if values else "-" for values in known)
        lines.append(f"| {preset}: median of the trained |  | {' | '.join(middle)} |  |  |")
        named = "" if preset == "principled" else f", {len(front & {t.number for t, _ in done})} of these on the front"
        notes.append(f"{preset}: {run.n_finished} finished trials, {len(done)} trained to the end{named}.")
    text = "\n".join([*lines, "", *notes, f"Space {SETTING['space']}, {SETTING['data']}, {SETTING['epochs']} epochs a trial, at most "
                      f"{SETTING['max_macs'] / 1e6:g} M MACs, one seed; accuracy on validation."]) + "\n"  # fmt: skip
    (HERE / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--derive-only", action="store_true")
    given = parser.parse_args()
    if not given.derive_only:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for preset in PRESETS:
            run_study(StudyConfig(**SETTING, study=preset, values=(preset,), trials=given.trials, out=str(HERE / preset)))
    derive()
