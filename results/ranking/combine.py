"""Where the weights of `combined` come from: how well a short training and scores of the untrained network rank final accuracies.

    python results/ranking/combine.py

Of a table a training has an accuracy and no losses, so that the sum stands here without them; with them see ../search/losses.py, on short
trainings of our own. Spaces whose short trainings are known: 12 of 200 epochs on NAS-Bench-201, 12 of 108 on NAS-Bench-101, 1 of 6 on
`mbconv`, and one epoch of our own on 6,000 images for a hundred cells of NAS-Bench-201. Maximized is the mean over spaces of the
correlation with the ranks of final accuracy, over all and over the better half, by gradients; reported is Spearman's, and by how many
points of final accuracy the network that the value names among 20 drawn at random is behind the best of the space. Each space is left out
once (both samples of NAS-Bench-201 together), each term too. Shipped are less than the fitted weights: beside losses, and on networks
under a limit on MACs, less is better (../search/losses.md). The four terms were the default before; where only accuracies are known they
rank better by these weights, and name worse networks. Beside them, what the same signals hold at most: gradient-boosted trees fitted on
the space itself, out of fold. A gate `combined:best:...` ranks by the sum without the accuracy, before any training: that part alone is
shown beside `capacity_score` and the MACs, on all spaces of the ranking study; on the rows of the sum it and `capacity_score` stand in
the first table too, as choices without a training. Writes combined.md, combined.json and untrained.json. Needs scikit-learn.
"""

import json
from pathlib import Path

import numpy as np
import torch
from run import columns, records_of, sized
from scipy.stats import rankdata, spearmanr
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.model_selection import cross_val_predict

from capnas.objective.targets import WEIGHTS, known_before
from capnas.scoring import SCORES

HERE = Path(__file__).resolve().parent
SPACES = ("nasbench201", "nasbench101", "mbconv", "nasbench201-1-epoch")
SHIPPED = {name.removeprefix("init_"): weight for name, weight in known_before(WEIGHTS).items()}  # the rest are losses
TERMS = tuple(SHIPPED)
FOUR = {"log2_macs": 0.035, "block_saturation90_mean": 0.15, "params_in_use": 0.25, "shortest_depth": 0.003}  # the default before
TRIED = tuple(dict.fromkeys([*TERMS, *FOUR, "block_saturation_evenness", "dimension", "block_log2_activations"]))
BEFORE = ("combined, untrained part", "capacity_score", "macs")
NETWORKS = "networks"
ALONE = {"untrained part of shipped alone": SHIPPED, "capacity_score alone": {"capacity_score": 1.0}}


def records(space):
    """Rows with the short accuracy and the final one."""
    if not space.endswith("-1-epoch"):
        return records_of(space)
    known = {row["arch"]: row for row in records_of(space.removesuffix("-1-epoch"))}
    return [known[row["arch"]] | {"short_accuracy": row["short_accuracy"]} for row in records_of(f"{space}-trained")]


def ranked(value, final):
    """Spearman over all and over the better half."""
    top = final >= np.median(final)
    return [float(spearmanr(value[i], final[i])[0]) for i in (slice(None), top)]


class Ranking:
    """A space: short accuracy and oriented scores of its networks against the ranks of their final accuracy."""

    def __init__(self, space):
        found = self.records = records(space)
        short = np.array([r["short_accuracy"] for r in found], dtype=float)
        signals = sized(columns(found))
        self.final = np.array([r["accuracy"] for r in found], dtype=float)
        self.short = short / (100 if short.max() > 1 else 1)
        self.terms = np.stack([signals.get(name, np.zeros(len(found))) for name in TRIED], 1)
        top = np.flatnonzero(self.final >= np.median(self.final))
        self.groups = [np.arange(len(found)), top]

    def value(self, weights, trained=True):
        """The sum, or its part that is known before a training."""
        return self.short * trained + self.terms @ weights

    def __call__(self, weights, trained=True):
        return ranked(self.value(weights, trained), self.final)

    def behind(self, weights, trained=True, drawn=20, repeats=2000):
        """Points of final accuracy that the best of some random draws by this value is behind the best network, mean of the repeats."""
        value, chance = self.value(weights, trained), np.random.default_rng(0)
        named = [draw[np.argmax(value[draw])] for draw in (chance.choice(len(value), drawn, replace=False) for _ in range(repeats))]
        return float((self.final.max() - self.final[named]).mean() * (100 if self.final.max() <= 1 else 1))

    def tensors(self):
        """Short accuracy, scores and centred ranks of unit length, for all and for the better half."""
        for group in self.groups:
            ranks = torch.from_numpy(rankdata(self.final[group]))
            ranks = ranks - ranks.mean()
            yield torch.from_numpy(self.short[group]), torch.from_numpy(self.terms[group]), ranks / ranks.norm()


def fit(spaces, terms):
    """Weights of TRIED, zero beside `terms`, that maximize the mean correlation with the ranks."""
    groups = [tensors for space in spaces for tensors in space.tensors()]
    scale = torch.tensor(np.mean([s.terms.std(0) for s in spaces], axis=0))
    mask = torch.tensor([float(name in terms) for name in TRIED], dtype=torch.float64) / scale
    steps = torch.full((len(TRIED),), 0.02, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([steps], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        values = [short + scores @ (steps * mask) for short, scores, _ in groups]
        total = -sum(((v - v.mean()) @ ranks) / (v - v.mean()).norm() for v, (_, _, ranks) in zip(values, groups))
        total.backward()
        return total

    optimizer.step(loss)
    return (steps * mask).detach().numpy()


def ceiling(space, short):
    """What trees make of every signal, with or without the short training, of the space that they are fitted on; ten folds, unseen."""
    signals = {n: v for n, v in columns(space.records).items() if n not in ("combined", *(() if short else ("short_accuracy",)))}
    trees = GradientBoostingRegressor(n_estimators=300, max_depth=4, learning_rate=0.05, subsample=0.7, random_state=0)
    return ranked(cross_val_predict(trees, np.stack(list(signals.values()), 1), rankdata(space.final), cv=10), space.final)


def choices(data):
    """Name of a choice to its weights of TRIED."""

    def given(weights):
        return np.array([weights.get(name, 0.0) for name in TRIED])

    everything = list(data.values())
    yield "accuracy alone", given({})
    for label, factor in (("shipped", 1), ("shipped, halved", 0.5), ("shipped, doubled", 2)):
        yield label, given({name: weight * factor for name, weight in SHIPPED.items()})
    for label, weights in ALONE.items():
        yield label, given(weights)
    yield "four terms", given(FOUR)
    yield "fitted on all", fit(everything, TERMS)
    for left in ("nasbench201", "nasbench101", "mbconv"):
        yield f"fitted on all but {left}", fit([s for name, s in data.items() if not name.startswith(left)], TERMS)
    for term in TERMS:
        yield f"without {term}", fit(everything, [name for name in TERMS if name != term])
    yield "four terms, fitted", fit(everything, FOUR)
    for extra in TRIED[len(TERMS) :]:
        yield f"with {extra}", fit(everything, (*TERMS, extra))


def untrained():
    """How the part of the sum that is known before training ranks final accuracy, beside `capacity_score` and the MACs of the same rows."""
    found = {}
    for space in ("nasbench201", "nasbench101", "macro", "timm", "mbconv"):
        rows = records_of(space)
        signals, final = sized(columns(rows)), np.array([r["accuracy"] for r in rows], dtype=float)
        signals["combined, untrained part"] = sum(weight * signals[name] for name, weight in SHIPPED.items())
        found[space] = {NETWORKS: len(rows)} | {name: ranked(signals[name], final) for name in BEFORE}
    return found


def untrained_lines(found):
    lines = ["", "Before any training, Spearman with final accuracy over all and over the better half:", "",
             f"| ranked by | {' | '.join(f'{space}: {row[NETWORKS]}' for space, row in found.items())} | mean |",
             "| --- |" + " --- |" * len(found) + " ---: |"]  # fmt: skip
    for name in BEFORE:
        cells = ["{:.3f}, {:.3f}".format(*row[name]) for row in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {np.mean([row[name] for row in found.values()]):.3f} |")
    return lines


def main():
    data, rows = {space: Ranking(space) for space in SPACES}, []
    lines = [f"| choice | {' | '.join(TRIED)} | {' | '.join(f'{s}: all, better half; behind' for s in SPACES)} | mean | mean behind |",
             "| --- |" + " ---: |" * len(TRIED) + " --- |" * len(SPACES) + " ---: | ---: |"]  # fmt: skip
    for name, weights in choices(data):
        trained = name not in ALONE
        reached = {s: ranking(weights, trained) for s, ranking in data.items()}
        behind = {s: ranking.behind(weights, trained) for s, ranking in data.items()}
        mean, points = float(np.mean(list(reached.values()))), float(np.mean(list(behind.values())))
        rows.append({"choice": name, "weights": {t: float(w) for t, w in zip(TRIED, weights) if w}, "reached": reached, "mean": mean,
                     "behind": behind, "mean_behind": points})  # fmt: skip
        cells = [f"{w:.3g}" if w else "" for w in weights] + [f"{a:.3f}, {b:.3f}; {behind[s]:.2f}" for s, (a, b) in reached.items()]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.3f} | {points:.2f} |")
    lower = [name for name in TRIED if SCORES[name].direction == "minimize"]
    lines += ["", f"Weights of scores with higher meaning better; {', '.join(lower)} counts negatively. "
              "Alone: ranked by these terms without the short training.", "",
              "Gradient-boosted trees on every signal, fitted on the space itself (ten folds, each predicted by the others):", "",
              f"| signals | {' | '.join(f'{s}: all, better half' for s in SPACES)} |", "| --- |" + " --- |" * len(SPACES)]  # fmt: skip
    for label, short in (("untrained", False), ("untrained and the short training", True)):
        lines.append(f"| {label} | {' | '.join('{:.3f}, {:.3f}'.format(*ceiling(data[s], short)) for s in SPACES)} |")
    before = untrained()
    lines += untrained_lines(before)
    (HERE / "untrained.json").write_text(json.dumps({"weights": dict(WEIGHTS), "spaces": before}, indent=1) + "\n")
    (HERE / "combined.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "combined.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
