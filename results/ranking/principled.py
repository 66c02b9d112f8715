"""Where the weights of `principled` come from: how accuracy after one epoch, with the three scores added, ranks final accuracy.

    python results/ranking/principled.py

Every triple of weights on two spaces: cells of NAS-Bench-201, trained here for one epoch at a fifth of the published depth, against the
published accuracy after 200; draws of `mbconv`, trained for one epoch, against the same draws trained for six (`train.py`). The scores are
those after the epoch, as a search has them. Writes principled.md and principled.json.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from combine import ranked

from capnas.objective.targets import PRINCIPLED
from capnas.scoring import SCORES

HERE = Path(__file__).resolve().parent
FINAL = {"nasbench201": "nasbench201", "mbconv": "mbconv-trained"}
GRID = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)


def rows(name):
    return {r["arch"]: r for r in map(json.loads, (HERE / "raw" / f"{name}.jsonl").open())}


def read(space):
    """Final accuracy, accuracy after one epoch, and the scores after it, higher expected better."""
    final, short = rows(FINAL[space]), rows(f"{space}-1-epoch-trained")
    known = [a for a in short if a in final and short[a]["accuracy"] is not None and final[a]["accuracy"] is not None]
    scores = {n: np.array([SCORES[n].oriented(short[a]["after_training"][n]) for a in known]) for n in (*PRINCIPLED, "depth_evenness")}
    return np.array([final[a]["accuracy"] for a in known]), np.array([short[a]["accuracy"] for a in known]), scores


if __name__ == "__main__":
    data = {space: read(space) for space in FINAL}
    found = []
    for weights in product(GRID, repeat=len(PRINCIPLED)):
        reached = {}
        for space, (final, short, scores) in data.items():
            reached[space] = ranked(short + sum(w * scores[n] for w, n in zip(weights, PRINCIPLED)), final)
        found.append({"weights": dict(zip(PRINCIPLED, weights)), "reached": reached, "mean": float(np.mean(list(reached.values())))})
    best = {space: max(found, key=lambda row: sum(row["reached"][space])) for space in data}
    named = {"accuracy alone": found[0], "shipped": next((r for r in found if r["weights"] == PRINCIPLED), None),
             "best on average": max(found, key=lambda row: row["mean"]),
             **{f"best on {space}": row for space, row in best.items()}}  # fmt: skip
    for name in PRINCIPLED:  # each score alone, at its best
        alone = (r for r in found if all(w == 0 for n, w in r["weights"].items() if n != name))
        named[f"{name} alone, best on average"] = max(alone, key=lambda row: row["mean"])
    lines = [f"| weights | {' | '.join(PRINCIPLED)} | {' | '.join(f'{s}: all, better half' for s in data)} | mean |",
             "| --- |" + " ---: |" * len(PRINCIPLED) + " --- |" * len(data) + " ---: |"]  # fmt: skip
    for label, row in named.items():
        if row is not None:
            cells = [f"{a:.3f}, {b:.3f}" for a, b in row["reached"].values()]
            lines.append(f"| {label} | {' | '.join(f'{w:g}' for w in row['weights'].values())} | {' | '.join(cells)} | {row['mean']:.3f} |")
    lines += ["", "A score alone against final accuracy:", "", f"| score after one epoch | {' | '.join(data)} |"]
    lines.append("| --- |" + " --- |" * len(data))
    for name in next(iter(data.values()))[2]:
        cells = ["{:.3f}, {:.3f}".format(*ranked(scores[name], final)) for final, _, scores in data.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "; ".join(f"{space}: {len(final)} networks" for space, (final, *_) in data.items()) + "."]
    (HERE / "principled.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "principled.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
