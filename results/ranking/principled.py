"""Which scores, with which weights, make up `principled`: how well accuracy after a short training, with them added, ranks final accuracy.

    python results/ranking/principled.py

One saturation and one capacity-allocation score, each before training (``init_``) or after one epoch, and `capacity_slack` after the epoch,
every choice and every triple of weights, on two spaces: cells of NAS-Bench-201, accuracy after 12 epochs and after 200 as published, scores
after an epoch of the same cells at a fifth of the depth; draws of `mbconv`, accuracy after one epoch and of the same draws after six
(`train.py`). Writes principled.md and principled.json.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from combine import ranked
from run import columns, records_of, sized

from capnas.objective.targets import PRINCIPLED, WEIGHTS, known_before
from capnas.scoring import SCORES

HERE = Path(__file__).resolve().parent
SPACES = {"nasbench201": ("nasbench201", "nasbench201-all"), "mbconv": ("mbconv-trained", "mbconv")}  # final accuracies, scores before
SATURATION = ("saturation_evenness", "init_saturation_evenness", "init_block_saturation_evenness")
CAPACITY = ("capacity_balance", "depth_evenness", "init_capacity_balance", "init_depth_evenness")
SLACK = "capacity_slack"
SUMMED = known_before(WEIGHTS)  # no table has losses
GRID = (0.02, 0.05, 0.1, 0.2, 0.4)  # all three take part


def rows(name):
    return {r["arch"]: r for r in records_of(name)}


def read(space):
    """Final accuracy, short accuracy, and every score, higher expected better."""
    final, before = map(rows, SPACES[space])
    short = rows(f"{space}-1-epoch-trained")
    known = [a for a in short if a in final and a in before and short[a]["accuracy"] is not None]
    accuracy = [before[a]["short_accuracy"] / 100 if space == "nasbench201" else short[a]["accuracy"] for a in known]
    scores = {}
    for name in (*SATURATION, *CAPACITY, SLACK):
        plain = name.removeprefix("init_")
        values = [before[a]["scores"][plain] if plain != name else short[a]["after_training"][name] for a in known]
        scores[name] = np.array([SCORES[plain].oriented(v) for v in values], dtype=float)
    signals = sized(columns([before[a] for a in known]))
    scores |= {name: signals[name.removeprefix("init_")] for name in SUMMED}
    return np.array([final[a]["accuracy"] for a in known]), np.array(accuracy), scores


def reach(data, weights):
    reached = {}
    for space, (final, short, scores) in data.items():
        reached[space] = ranked(short + sum(weight * scores[name] for name, weight in weights.items()), final)
    return {"weights": weights, "reached": reached, "mean": float(np.mean(list(reached.values())))}


if __name__ == "__main__":
    data = {space: read(space) for space in SPACES}
    found = [
        reach(data, dict(zip((saturation, capacity, SLACK), weights)))
        for saturation, capacity in product(SATURATION, CAPACITY) for weights in product(GRID, repeat=3)
    ]  # fmt: skip
    named = {"accuracy alone": reach(data, {}), "shipped": reach(data, dict(PRINCIPLED)), "combined": reach(data, SUMMED),
             "the three after training, equal": reach(data, dict.fromkeys(("saturation_evenness", "capacity_balance", SLACK), 0.05)),
             "best on average": max(found, key=lambda row: row["mean"]),
             **{f"best on {space}": max(found, key=lambda row: sum(row["reached"][space])) for space in data}}  # fmt: skip
    for capacity in CAPACITY:
        named[f"best with {capacity}"] = max((r for r in found if capacity in r["weights"]), key=lambda row: row["mean"])
    lines = [f"| what is added to the short accuracy | weights | {' | '.join(f'{s}: all, better half' for s in data)} | mean |",
             "| --- | --- |" + " --- |" * len(data) + " ---: |"]  # fmt: skip
    for label, row in named.items():
        cells = [f"{a:.3f}, {b:.3f}" for a, b in row["reached"].values()]
        sums = ", ".join(f"{name} {weight:g}" for name, weight in row["weights"].items())
        lines.append(f"| {label} | {sums} | {' | '.join(cells)} | {row['mean']:.3f} |")
    lines += ["", "A score alone against final accuracy:", "", f"| score | {' | '.join(data)} |", "| --- |" + " --- |" * len(data)]
    for name in (*SATURATION, *CAPACITY, SLACK):
        cells = ["{:.3f}, {:.3f}".format(*ranked(scores[name], final)) for final, _, scores in data.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "; ".join(f"{space}: {len(final)} networks" for space, (final, *_) in data.items()) + "; every weight from "
              f"{', '.join(f'{w:g}' for w in GRID)}."]  # fmt: skip
    (HERE / "principled.json").write_text(json.dumps(named, indent=1) + "\n")
    (HERE / "principled.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
