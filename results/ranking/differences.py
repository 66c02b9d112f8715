"""How far `capacity_score` is above a cost or a proxy on the same rows: differences of Spearman correlations with intervals.

    python results/ranking/differences.py

Bootstrapped over what is independent: networks, on timm models with all their rows (77 models have 121 rows). Writes differences.json and
differences.md. A second table has the score with a further term: each weight is the best of a few on four spaces, by the mean Spearman
correlation over all and over the better half, and is judged on the space left out; the shipped terms keep their weights.
"""

import itertools
import json

import numpy as np
from run import HERE, columns, records_of, sized
from scipy.stats import rankdata, spearmanr

from capnas.scoring import CAPACITY_WEIGHTS

SPACES = ("nasbench201", "nasbench101", "macro", "timm", "mbconv")
RIVALS = ("macs", "params", "naswot", "synflow", "published naswot", "published logsynflow")
DRAWS = 2000
ADDED = {"log2_macs": (0, 0.1, 0.2, 0.4, 0.8), "block_saturation90_mean": (0, 1, 2, 4, 8), "params_in_use": (0, 1, 2, 4, 8)}
CHOICES = [*((name,) for name in ADDED), tuple(ADDED)]


def correlation(value, final):
    return float(spearmanr(value, final)[0])


def draws(models):
    """Rows of each bootstrap draw: models with replacement, each with all its rows."""
    chance, groups = np.random.default_rng(0), [np.flatnonzero(models == m) for m in dict.fromkeys(models)]
    for _ in range(DRAWS):
        yield np.concatenate([groups[i] for i in chance.integers(0, len(groups), len(groups))])


def ranked(value):
    ranks = rankdata(value)
    return (ranks - ranks.mean()) / ranks.std()


def differences(space):
    """Signal to the score's correlation less its own, with an interval, and both over the better half."""
    records = records_of(space)
    signals, final = columns(records), np.array([r["accuracy"] for r in records], dtype=float)
    models, top = np.array([r["arch"].partition("@")[0] for r in records]), final >= np.median(final)
    found = {"networks": len(records), "models": len(set(models)), "less": {}}
    picks = list(draws(models))
    for name in (n for n in RIVALS if n in signals):
        mine, other = signals["capacity_score"], signals[name]
        drawn = [float(((ranked(mine[i]) - ranked(other[i])) * ranked(final[i])).mean()) for i in picks]
        found["less"][name] = {
            "spearman": [correlation(mine, final), correlation(other, final)],
            "difference": correlation(mine, final) - correlation(other, final), "interval": np.quantile(drawn, [0.025, 0.975]).tolist(),
            "top_half": [correlation(mine[top], final[top]), correlation(other[top], final[top])],
        }  # fmt: skip
    return found


class Space:
    """The score and what may be added to it."""

    def __init__(self, name):
        records = records_of(name)
        signals, self.final = sized(columns(records)), np.array([r["accuracy"] for r in records], dtype=float)
        self.score, self.terms = signals["capacity_score"], {term: signals[term] for term in ADDED}
        self.top = self.final >= np.median(self.final)

    def __call__(self, weights):
        """Spearman over all and over the better half."""
        value = self.score + sum(weight * self.terms[name] for name, weight in weights.items())
        return [correlation(value[i], self.final[i]) for i in (slice(None), self.top)]


def added():
    """Terms that are added to what they reach: the weights that four spaces choose, judged on the fifth."""
    spaces, rows = {name: Space(name) for name in SPACES}, []
    for names in CHOICES:
        grid = [dict(zip(names, weights)) for weights in itertools.product(*(ADDED[name] for name in names))]
        reached = [{name: space(weights) for name, space in spaces.items()} for weights in grid]
        row = {"added": names, "weights": {}, "left_out": {}}
        for left in SPACES:
            best = max(range(len(grid)), key=lambda i: sum(sum(reached[i][name]) for name in SPACES if name != left))
            row["weights"][left], row["left_out"][left] = grid[best], reached[best][left]
        rows.append(row)
    return [{"added": (), "weights": {}, "left_out": {name: space({}) for name, space in spaces.items()}}, *rows]


def main():
    apart, terms = {space: differences(space) for space in SPACES}, added()
    lines = [f"Spearman with final accuracy of `capacity_score` less that of another signal, the same rows; bootstrapped 95 % interval of "
             f"{DRAWS:,} draws, on timm over models.", "",
             "| space | networks, models | signal | score, signal | difference [95 %] | better half: score, signal |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for space, row in apart.items():
        for name, found in row["less"].items():
            (low, high), (mine, other), half = found["interval"], found["spearman"], "{:.3f}, {:.3f}".format(*found["top_half"])
            lines.append(f"| {space} | {row['networks']}, {row['models']} | {name} | {mine:.3f}, {other:.3f} | "
                         f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}] | {half} |")  # fmt: skip
    grid = "; ".join(f"{name} {', '.join(map(str, weights))}" for name, weights in ADDED.items())
    lines += ["", "The shipped score with further terms, on the space left out. In brackets their weights, which the other four spaces "
              f"choose ({grid}). The shipped weights were fitted on all five.", "",
              f"| added | {' | '.join(f'{s}: all, better half' for s in SPACES)} | mean |",
              "| --- |" + " --- |" * len(SPACES) + " ---: |"]  # fmt: skip
    for row in terms:
        cells = ["{:.3f}, {:.3f}".format(*row["left_out"][s])
                 + (f" ({', '.join(f'{w:g}' for w in row['weights'][s].values())})" if row["added"] else "") for s in SPACES]  # fmt: skip
        mean = np.mean([v[0] for v in row["left_out"].values()])
        lines.append(f"| {', '.join(row['added']) or 'nothing'} | {' | '.join(cells)} | {mean:.3f} |")
    found = {"weights": dict(CAPACITY_WEIGHTS), "spaces": apart, "added": terms}
    (HERE / "differences.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "differences.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
