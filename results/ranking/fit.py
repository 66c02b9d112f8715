"""Where the weights of `capacity_score` come from: a random search over them on raw/, leaving one space out each time.

    python results/ranking/fit.py [--seconds 10]

Maximizes the sum over spaces of Spearman's correlation over all and over the better half. Writes fit.json and fit.md: for every left-out
space the weights that the others give and what they reach on it, beside the weights that capnas ships. `log2_activations` is the same for
all cells of NAS-Bench-201 and 101; its shipped weight was chosen on timm and `mbconv`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from run import costs, records_of
from scipy.stats import rankdata

from capnas.scoring import CAPACITY_WEIGHTS

HERE = Path(__file__).resolve().parent
SPACES = ("nasbench201", "nasbench101", "macro", "timm", "mbconv")
# what follows the terms of the score was tried and did not earn its place
TERMS = (*CAPACITY_WEIGHTS, "log2_macs", "log2_gain", "complexity", "block_saturation90_mean", "params_in_use")


class Ranking:
    """Spearman's correlation with one accuracy, over all and over its better half."""

    def __init__(self, records):
        accuracy = np.array([r["accuracy"] for r in records])
        self.terms = np.array([[np.log2(costs(r)[1]) if t == "log2_macs" else r["scores"][t] or 0.0 for t in TERMS] for r in records])
        self.groups = [np.arange(len(accuracy)), np.flatnonzero(accuracy >= np.median(accuracy))]
        self.ranks = [self._unit(accuracy[g]) for g in self.groups]

    @staticmethod
    def _unit(values):
        ranks = rankdata(values) - (len(values) + 1) / 2
        return ranks / max(np.sqrt(ranks @ ranks), 1e-12)

    def __call__(self, weights):
        value = self.terms @ weights
        return [float(self._unit(value[g]) @ r) for g, r in zip(self.groups, self.ranks)]


def search(spaces, seconds, seed=0, without=()):
    """Weights, scaled so that the first term counts as shipped; terms in `without` weigh nothing."""
    chance, start = np.random.default_rng(seed), time.process_time()
    mask = np.array([t not in without for t in TERMS], dtype=float)
    scale = np.mean([s.terms.std(0) for s in spaces], axis=0)
    best, found = -np.inf, None
    while time.process_time() - start < seconds:
        step = chance.normal(size=len(TERMS))
        weights = step if found is None or chance.random() < 0.05 else found + step * chance.choice([0.05, 0.2, 0.6]) * np.abs(found).mean()
        value = sum(sum(s(weights * mask / scale)) for s in spaces)
        if value > best:
            best, found = value, weights
    weights = found * mask / scale
    return weights * CAPACITY_WEIGHTS[TERMS[0]] / weights[0] if mask[0] else weights


def main(seconds):
    data = {s: Ranking(records_of(s)) for s in SPACES}
    shipped = np.array([CAPACITY_WEIGHTS.get(t, 0.0) for t in TERMS])
    rows = [{"fitted_on": "shipped", "weights": shipped}, {"fitted_on": "all", "weights": search(list(data.values()), seconds)}]
    rows += [{"fitted_on": f"all but {s}", "weights": search([data[o] for o in SPACES if o != s], seconds)} for s in SPACES]
    lines = ["| fitted on | " + " | ".join(TERMS) + " | " + " | ".join(f"{s}: all, better half" for s in SPACES) + " |",
             "| --- |" + " --- |" * (len(TERMS) + len(SPACES))]  # fmt: skip
    for row in rows:
        row["reached"] = {s: data[s](row["weights"]) for s in SPACES}
        row["weights"] = dict(zip(TERMS, row["weights"].tolist()))
        out = row["fitted_on"].removeprefix("all but ")
        cells = [f"{w:.3g}" for w in row["weights"].values()]
        cells += [f"{a:.3f}, {b:.3f}{' (left out)' if s == out else ''}" for s, (a, b) in row["reached"].items()]
        lines.append(f"| {row['fitted_on']} | " + " | ".join(cells) + " |")
    drop = ["", "Without one of the terms, the others as fitted on all spaces again:", "", "| without | " + " | ".join(SPACES) + " |",
            "| --- |" + " --- |" * len(SPACES)]  # fmt: skip
    for term in TERMS:
        found = search(list(data.values()), seconds, without=(term,))
        drop.append(f"| {term} | " + " | ".join(", ".join(f"{v:.3f}" for v in data[s](found)) for s in SPACES) + " |")
    (HERE / "fit.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "fit.md").write_text("\n".join(lines + drop) + "\n")
    print("\n".join(lines + drop))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    main(parser.parse_args().seconds)
