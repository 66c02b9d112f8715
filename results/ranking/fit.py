"""Where the weights of `capacity_score` come from: a random search over them on raw/, leaving one space out each time.

    python results/ranking/fit.py [--steps 2500]

Maximizes the sum over spaces of Spearman's correlation over all and over the better half, in a fixed number of steps, so that the same
rows give the same tables. Writes fit.json and fit.md: for every left-out space the weights that the others give and what they reach on
it, beside the weights that capnas ships, once with the shipped terms alone and once with every term that was tried.
`block_log2_activations` is the same for all cells of NAS-Bench-201 and 101; it and its shipped weight were chosen on the other three
spaces, the other four weights on the first three, so that each figure of the shipped weights is of a space that they were fitted on. The
shipped terms are searched from four seeds; the best on the spaces that are fitted counts, and the range of the four on the space left out
shows what a search leaves open.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from run import costs, records_of
from scipy.stats import rankdata

from capnas.scoring import CAPACITY_WEIGHTS

SEEDS = (0, 1, 2, 3)
HERE = Path(__file__).resolve().parent
SPACES = ("nasbench201", "nasbench101", "macro", "timm", "mbconv")
# what follows the terms of the score was tried and did not earn its place
TERMS = (*CAPACITY_WEIGHTS, "log2_activations", "log2_macs", "log2_gain", "complexity", "block_saturation90_mean", "params_in_use")


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


def search(spaces, steps, seed=0, without=()):
    """Weights, scaled so that the first term counts as shipped; terms in `without` weigh nothing."""
    chance = np.random.default_rng(seed)
    mask = np.array([t not in without for t in TERMS], dtype=float)
    scale = np.mean([s.terms.std(0) for s in spaces], axis=0)
    best, found = -np.inf, None
    for _ in range(steps):
        step = chance.normal(size=len(TERMS))
        weights = step if found is None or chance.random() < 0.05 else found + step * chance.choice([0.05, 0.2, 0.6]) * np.abs(found).mean()
        value = sum(sum(s(weights * mask / scale)) for s in spaces)
        if value > best:
            best, found = value, weights
    weights = found * mask / scale
    return weights * CAPACITY_WEIGHTS[TERMS[0]] / weights[0] if mask[0] else weights


def fitted(data, on, steps):
    """Weights of the shipped terms, fitted on some spaces: the best of several searches, and what each reaches on every space."""
    spaces, without = [data[s] for s in on], [t for t in TERMS if t not in CAPACITY_WEIGHTS]
    found = [search(spaces, steps, seed, without) for seed in SEEDS]
    best = max(found, key=lambda weights: sum(sum(s(weights)) for s in spaces))
    return best, [{s: data[s](weights) for s in SPACES} for weights in found]


def choices(data, steps):
    """What weights were fitted on, the terms that took part, the weights, and what other searches for them reach."""
    yield "shipped", "shipped terms", np.array([CAPACITY_WEIGHTS.get(t, 0.0) for t in TERMS]), []
    yield "all", "shipped terms", *fitted(data, SPACES, steps)
    for left in SPACES:
        yield f"all but {left}", "shipped terms", *fitted(data, [s for s in SPACES if s != left], steps)
    yield "all", "every term", search(list(data.values()), steps), []
    for left in SPACES:
        yield f"all but {left}", "every term", search([data[other] for other in SPACES if other != left], steps), []


def shown(row, space):
    """Spearman over all and over the better half; on the space left out also the range of the searches."""
    text = "{:.3f}, {:.3f}".format(*row["reached"][space])
    if row["fitted_on"] != f"all but {space}":
        return text
    ranges = [f"{min(v):.3f} to {max(v):.3f}" for v in zip(*(found[space] for found in row["searches"]))]
    return f"{text} (left out{'; ' if ranges else ''}{', '.join(ranges)})"


def table(rows):
    """Rows of `choices` with what they reach."""
    lines = ["| fitted on | " + " | ".join(TERMS) + " | " + " | ".join(f"{s}: all, better half" for s in SPACES) + " |",
             "| --- |" + " --- |" * (len(TERMS) + len(SPACES))]  # fmt: skip
    for row in rows:
        cells = [f"{w:.3g}" if w else "" for w in row["weights"].values()] + [shown(row, space) for space in SPACES]
        lines.append(f"| {row['fitted_on']}, {row['terms']} | " + " | ".join(cells) + " |")
    return lines


def main(steps):
    data = {s: Ranking(records_of(s)) for s in SPACES}
    rows = [{"fitted_on": on, "terms": terms, "weights": dict(zip(TERMS, weights.tolist())),
             "reached": {s: data[s](weights) for s in SPACES}, "searches": searches}
            for on, terms, weights, searches in choices(data, steps)]  # fmt: skip
    note = (f"Random search of {steps:,} steps; Spearman with final accuracy. Shipped terms: the best of {len(SEEDS)} searches on the "
            "spaces that are fitted, with the range of all on the space left out.")  # fmt: skip
    lines = [note, "", *table(rows)]
    lines += ["", "Without one of the terms, the others as fitted on all spaces again:", "", "| without | " + " | ".join(SPACES) + " |",
              "| --- |" + " --- |" * len(SPACES)]  # fmt: skip
    for term in TERMS:
        found = search(list(data.values()), steps, without=(term,))
        lines.append(f"| {term} | " + " | ".join(", ".join(f"{v:.3f}" for v in data[s](found)) for s in SPACES) + " |")
    (HERE / "fit.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "fit.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    main(parser.parse_args().steps)
