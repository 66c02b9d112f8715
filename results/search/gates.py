"""What a gate saves on networks that no weight was fitted on: the best of a pool by a score are trained, the most accurate one is named.

    python results/search/gates.py

The rows of the ranking study that were measured after the weights were fixed: other cells of NAS-Bench-201, other graphs of NAS-Bench-101,
other networks of NAS-Bench-Macro. Beside the shipped weights are those fitted without a single row of the space, MACs, parameters and,
where the table has them, the published naswot and synflow. `mbconv`, where the score is weak, has no such rows: only the weights fitted
without the space do not know it. The short training names the network (12 of 200 epochs, 12 of 108, 1 of 6); the table of Macro has none,
there a full one does. Reported is the mean of 2,000 repeats: points of final accuracy behind the best of the rows, and how many random
trainings, by their exact mean, name as good a network. Nothing is charged for the scores. Writes gates.md and gates.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.special import gammaln

from capnas.scoring import CAPACITY_WEIGHTS

HERE = Path(__file__).resolve().parent
RANKING = HERE.parent / "ranking"
sys.path.append(str(RANKING))
from run import columns, records_of  # noqa: E402

SPACES = {"nasbench201": "NAS-Bench-201", "nasbench101": "NAS-Bench-101", "macro": "NAS-Bench-Macro", "mbconv": "`mbconv`"}
KNOWN = ("mbconv",)  # whose rows the shipped weights were fitted on
GATES = {"capacity_score": "`capacity_score`", "elsewhere": "its terms, fitted without the space", "macs": "MACs", "params": "parameters",
         "published naswot": "published naswot", "published logsynflow": "published synflow"}  # fmt: skip
POOL, KNOWN_POOL, TRAININGS, REPEATS = 100, 50, (5, 10), 2000


def elsewhere(space, records):
    """The sum of the terms with weights that were fitted on all spaces but this one."""
    rows = json.loads((RANKING / "fit.json").read_text())
    fitted = next(r for r in rows if (r["fitted_on"], r["terms"]) == (f"all but {space}", "shipped terms"))
    return np.array([sum(fitted["weights"][name] * (r["scores"].get(name) or 0.0) for name in CAPACITY_WEIGHTS) for r in records])


def of_random(regret, order, count):
    """Expected regret of the highest by `order` among `count` different rows drawn at random, exactly; of equals the later row counts."""
    rank = np.arange(1, len(regret) + 1)
    highest = np.where(rank >= count, np.exp(binom_log(rank - 1, count - 1) - binom_log(len(regret), count)), 0.0)
    return float(highest @ regret[np.argsort(order, kind="stable")])


def binom_log(n, k):
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)


def mean_and_interval(values):
    """Mean, and a 95 % interval of it by its standard error."""
    half = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) + shift) for shift in (0, -half, half)]


def judged(space):
    records, size = (records_of(space), KNOWN_POOL) if space in KNOWN else (records_of(f"{space}-others"), POOL)
    signals = columns(records) | {"elsewhere": elsewhere(space, records)}
    final = np.array([r["accuracy"] for r in records])
    final = final * (100 if final.max() <= 1 else 1)
    short = signals.get("short_accuracy", final)
    regret, chance = final.max() - final, np.random.default_rng(0)
    drawn = [chance.permutation(len(final)) for _ in range(REPEATS)]

    def named(trained):
        return regret[trained[np.argmax(short[trained])]]

    alone = [of_random(regret, short, n) for n in range(1, len(final) + 1)]
    rows = []
    for trainings in TRAININGS:
        for gate in (g for g in GATES if g in signals):
            found = [named(pool[np.argsort(-signals[gate][pool])][:trainings]) for pool in (order[:size] for order in drawn)]
            mean = mean_and_interval(found)
            as_good = next((n for n, r in enumerate(alone, 1) if r <= mean[0]), None)
            rows.append({"space": space, "trainings": trainings, "gate": gate, "regret": mean, "random_trainings": as_good})
        rows.append({"space": space, "trainings": trainings, "gate": None, "regret": [alone[trainings - 1]], "random_trainings": trainings})
    return {"networks": len(final), "pool": size, "short": "short_accuracy" in signals, "pool_best": of_random(regret, final, size),
            "all_of_pool": alone[size - 1], "rows": rows}  # fmt: skip


def cells(row, most):
    """Regret and as many random trainings, as two cells of the table."""
    mean, *ends = row["regret"]
    spread = f" ({ends[0]:.2f}, {ends[1]:.2f})" if ends else ""
    return f"{mean:.2f}{spread} | {row['random_trainings'] or f'more than {most}'}"


def main():
    found = {space: judged(space) for space in SPACES}
    (HERE / "gates.json").write_text(json.dumps(found, indent=1) + "\n")
    head = " | ".join(f"best {t} trained | as many random ones" for t in TRAININGS)
    lines = [
        f"The best of a pool of random networks are trained, means of {REPEATS:,} repeats. Points behind the best of the rows, in brackets "
        "the 95 % interval of the mean; then the number of random trainings that name as good a network on average.",
        "",
    ]
    for space, name in SPACES.items():
        part = found[space]
        how = "a short training" if part["short"] else "a full training"
        known = "; the shipped weights were fitted on these" if space in KNOWN else ""
        lines += [f"## {name}: {part['networks']:,} networks, pools of {part['pool']}, {how} names{known}", ""]
        lines += [f"The best of a pool is {part['pool_best']:.2f} behind; training it all names one {part['all_of_pool']:.2f} behind.", ""]
        lines += [f"| gate | {head} |", "| --- |" + " ---: | ---: |" * len(TRAININGS)]
        for gate in [*GATES, None]:
            if mine := [r for r in part["rows"] if r["gate"] == gate]:
                lines.append(f"| {GATES.get(gate, 'none')} | {' | '.join(cells(r, part['networks']) for r in mine)} |")
        lines.append("")
    (HERE / "gates.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
