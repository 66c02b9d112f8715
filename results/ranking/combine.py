"""Where the weights of `combined` come from: how accuracy after a short training, with the score and the MACs added, ranks final accuracy.

    python results/ranking/combine.py

Every pair of weights on raw/ of the spaces whose short trainings are known: 12 of 200 epochs on NAS-Bench-201, 12 of 108 on NAS-Bench-101,
1 of 6 on `mbconv`. Beside them, what the same signals hold at most: gradient-boosted trees fitted on the space itself, out of fold.
Writes combined.md and combined.json. Needs scikit-learn.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from run import columns, costs, records_of
from scipy.stats import rankdata, spearmanr
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import cross_val_predict

from capnas.objective.targets import WEIGHTS

HERE = Path(__file__).resolve().parent
SPACES = ("nasbench201", "nasbench101", "mbconv")
SCORE, MACS = (0.0, 0.02, 0.05, 0.1, 0.2), (0.0, 0.02, 0.04, 0.06)


def read(records):
    """Final accuracy, short accuracy as a share, capacity score and log2 MACs."""
    short = np.array([r["short_accuracy"] for r in records])
    final = np.array([r["accuracy"] for r in records])
    return final, short / (100 if short.max() > 1 else 1), columns(records)["capacity_score"], np.log2([costs(r)[1] for r in records])


def ranked(value, final):
    """Spearman over all and over the better half."""
    top = final >= np.median(final)
    return [float(spearmanr(value[i], final[i])[0]) for i in (slice(None), top)]


def ceiling(records, short):
    """What trees make of every signal, with or without the short training, of the space that they are fitted on; ten folds, unseen."""
    signals = {n: v for n, v in columns(records).items() if n not in ("combined", *(() if short else ("short_accuracy",)))}
    final = np.array([r["accuracy"] for r in records])
    trees = GradientBoostingRegressor(n_estimators=300, max_depth=4, learning_rate=0.05, subsample=0.7, random_state=0)
    return ranked(cross_val_predict(trees, np.stack(list(signals.values()), 1), rankdata(final), cv=10), final)


if __name__ == "__main__":
    measured = {space: records_of(space) for space in SPACES}
    data = {space: read(records) for space, records in measured.items()}
    rows = []
    for score, macs in product(SCORE, MACS):
        reached = {s: ranked(short + score * value + macs * size, final) for s, (final, short, value, size) in data.items()}
        rows.append({"score": score, "macs": macs, "reached": reached, "mean": float(np.mean(list(reached.values())))})
    lines = [f"| weight of the score | weight of log2 MACs | {' | '.join(f'{s}: all, better half' for s in SPACES)} | mean |",
             "| ---: | ---: |" + " --- |" * len(SPACES) + " ---: |"]  # fmt: skip
    for row in sorted(rows, key=lambda row: -row["mean"]):
        shipped = " (shipped)" if {"init_capacity_score": row["score"], "init_log2_macs": row["macs"]} == WEIGHTS else ""
        cells = [f"{a:.3f}, {b:.3f}" for a, b in row["reached"].values()]
        lines.append(f"| {row['score']:g} | {row['macs']:g}{shipped} | {' | '.join(cells)} | {row['mean']:.3f} |")
    lines += ["", "Gradient-boosted trees on every signal, fitted on the space itself (ten folds, each predicted by the others):", "",
              f"| signals | {' | '.join(f'{s}: all, better half' for s in SPACES)} |", "| --- |" + " --- |" * len(SPACES)]  # fmt: skip
    for label, short in (("untrained", False), ("untrained and the short training", True)):
        lines.append(f"| {label} | {' | '.join('{:.3f}, {:.3f}'.format(*ceiling(measured[s], short)) for s in SPACES)} |")
    (HERE / "combined.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "combined.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
