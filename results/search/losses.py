"""What the losses of a short training tell beside its accuracy: networks whose final accuracy is known, trained shortly as in a search.

    python results/search/losses.py measure --case fashion --epochs 1 3            # the draws of draws.py
    python results/search/losses.py measure --case cifar10 --epochs 1 3 --cifar ZIP
    python results/search/losses.py measure --case mbconv --epochs 6 --data DIR         # those of ../ranking/train.py, 1 of 6 epochs
    python results/search/losses.py measure --case nasbench201 --epochs 1 --data DIR
    python results/search/losses.py table                                          # losses.md and losses.json from raw/losses.jsonl again

Final accuracies: of the draws, after a training of their own on other weights, on 10,000 images that nothing else sees; of `mbconv` after
6 epochs, on 639 images; of NAS-Bench-201 as published, after 200 epochs. All short trainings of one case have the same seed, as in a
search; where more epochs are asked for than are made, the schedule is theirs. Compared are what a training tells, alone and with the terms
of `combined` that are known before it, in the terms' weights and others. Goes on where it stopped.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from real import CASES, HERE, images, read
from scipy.stats import spearmanr

from capnas.candidates import build_model
from capnas.objective.targets import INIT, TOLD, WEIGHTS, known_before, value_of
from capnas.scoring import SCORES
from capnas.spaces import load_space
from capnas.training import TrainConfig, train

sys.path.append(str(HERE.parent / "ranking"))
from combine import FOUR
from run import columns, records_of, sized

RAW = HERE / "raw" / "losses.jsonl"
RANKED = {"mbconv": ("mbconv", "mbconv-trained"), "nasbench201": ("nasbench201", "nasbench201-1-epoch-trained")}  # space, file of rows
ONE = ("mbconv",)  # cases whose training is stopped after its first epoch
FORMER = {INIT + name: weight for name, weight in FOUR.items()}
DRAWS, POOL = "draws", "pool"
LOSSES = {"train_loss": 1.0, "val_loss": 1.0}


def size_and_score(log2_macs, capacity_score):
    """Weights of the two terms that are known before a training."""
    return {f"{INIT}log2_macs": log2_macs, f"{INIT}capacity_score": capacity_score}


SUMS = {
    "accuracy": {},
    "accuracy - val_loss": {"val_loss": 1.0},
    "accuracy - train_loss": {"train_loss": 1.0},
    "accuracy - both losses": LOSSES,
    "the four terms of before, without losses": FORMER,
    "the four terms of before": LOSSES | FORMER,
    "combined": dict(WEIGHTS),
    "combined, without losses": size_and_score(0.04, 0.04),
    "combined, half the size": LOSSES | size_and_score(0.02, 0.04),
    "combined, twice the size": LOSSES | size_and_score(0.08, 0.04),
    "combined, half the score": LOSSES | size_and_score(0.04, 0.02),
    "combined, twice the score": LOSSES | size_and_score(0.04, 0.08),
    "combined, size alone": LOSSES | size_and_score(0.04, 0.0),
    "combined, score alone": LOSSES | size_and_score(0.0, 0.04),
}


def stored(case):
    """Rows of the networks of a case: identity, parameters, final accuracy and untrained scores, named as a trial names them."""
    if case in CASES:
        drawn = read(HERE / "raw" / f"draws-{case}.jsonl")
        rows = [r for r in drawn if r["status"] == ["complete"] * 2]
        untrained = [{INIT + name: value for name, value in r["scores"].items()} for r in rows]
        return [
            {"arch": f"draw {r['draw']}", "params_drawn": r["params_drawn"], "final": r["accuracy"], "scores": found}
            for r, found in zip(rows, untrained)
        ]
    known = {r["arch"]: r for r in records_of(case)}
    rows = [r for r in read(HERE.parent / "ranking" / "raw" / f"{RANKED[case][1]}.jsonl") if r["arch"] in known]
    signals = sized(columns([known[r["arch"]] for r in rows]))
    names = [name.removeprefix(INIT) for name in (*FORMER, *known_before(WEIGHTS))]
    # the columns hold what is better the higher; to turn twice is to turn back
    untrained = [{INIT + n: SCORES[n].oriented(float(signals[n][i])) for n in names} for i in range(len(rows))]
    return [
        {"arch": r["arch"], "params_drawn": r["params_drawn"], "final": known[r["arch"]]["accuracy"], "scores": found}
        for r, found in zip(rows, untrained)
    ]


def measure(given):
    torch.set_num_threads(1)
    if given.case in CASES:
        data, space = images(given.case, given.cifar, given.runs), load_space(CASES[given.case]["space"])
    else:
        from train import images as ranked

        data, space = ranked(given.data, 8000, 24), load_space(RANKED[given.case][0])
    shape = data.shape()
    done = {(r["case"], r["arch"], r["epochs"]) for r in read(RAW)}
    for row in stored(given.case):
        for epochs in given.epochs:
            if (given.case, row["arch"], epochs) in done:
                continue
            model = build_model(space, row["params_drawn"], **shape, seed=0)
            config = TrainConfig(epochs=epochs, seed=0, device="cpu", record=False)
            stop = (lambda epoch, told, profile: "stopped") if given.case in ONE else None
            curve = train(model, data, config, on_epoch=stop).curve
            told = {name: curve[-1][name] for name in TOLD}
            with RAW.open("a") as file:
                file.write(json.dumps({"case": given.case, "arch": row["arch"], "epochs": epochs, "trained": len(curve), **told}) + "\n")


def finals(case, rows, short=3, long=5, count=5):
    """What a short training names, and what finals of its best do, out of two thirds of the draws that had both trainings."""
    known = {r["arch"]: r for r in stored(case)}
    told = {(r["arch"], r["epochs"]): {n: r[n] for n in TOLD} for r in rows if r["case"] == case}
    draws = [arch for arch in known if (arch, short) in told and (arch, long) in told]
    final = np.array([100 * known[arch]["final"] for arch in draws])

    def values(epochs, weights):
        return np.array([value_of("combined", known[arch]["scores"] | told[arch, epochs], weights) for arch in draws])

    by = {"accuracy": values(short, {}), "combined": values(short, WEIGHTS)}
    longer, chance = values(long, LOSSES), np.random.default_rng(0)
    pools = [chance.choice(len(draws), 2 * len(draws) // 3, replace=False) for _ in range(5000)]
    found = {DRAWS: len(draws), POOL: len(pools[0]), "a random draw": float(np.mean([final[pool].mean() for pool in pools]))}
    for name, value in by.items():
        found[name] = float(np.mean([final[pool[value[pool].argmax()]] for pool in pools]))
        best = [pool[np.argsort(-value[pool])[:count]] for pool in pools]
        found[f"{name}, then finals"] = float(np.mean([final[five[longer[five].argmax()]] for five in best]))
    return found | {"the best of the pool": float(np.mean([final[pool].max() for pool in pools]))}


def table():
    """losses.md and losses.json."""
    rows, found = read(RAW), {}
    for case in (*CASES, *RANKED):
        known = {r["arch"]: r for r in stored(case)}
        for epochs in sorted({r["epochs"] for r in rows if r["case"] == case}):
            mine = [r for r in rows if (r["case"], r["epochs"]) == (case, epochs)]
            final = np.array([known[r["arch"]]["final"] for r in mine])
            metrics = [known[r["arch"]]["scores"] | {n: r[n] for n in TOLD} for r in mine]
            label = f"{case}, {mine[0]['trained']} of {epochs}" if mine[0]["trained"] < epochs else f"{case}, {epochs}"
            top = final >= np.median(final)
            found[label] = {"networks": len(mine)}
            for name, weights in SUMS.items():
                value = np.array([value_of("combined", m, weights) for m in metrics])
                found[label][name] = [round(float(spearmanr(value[i], final[i])[0]), 3) for i in (slice(None), top)]
    head = ["value", *(f"{label}: {got['networks']}" for label, got in found.items()), "mean"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * len(found) + " ---: |"]
    for name in SUMS:
        cells = [", ".join(f"{v:.2f}" for v in got[name]) for got in found.values()]
        mean = np.mean([got[name][0] for got in found.values()])
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.3f} |")
    text = (
        "Spearman with final accuracy, over all and over the better half, of what a short training tells and of sums with it. Columns:\n"
        "case, epochs of the training, networks. `fashion` and `cifar10` are draws under the limit on MACs of the real searches."
    )
    held = {case: finals(case, rows) for case in CASES}
    lines += ["", "Final accuracy, in points, of the draw named out of some (means over 5,000 pools): by a training of 3 epochs, or",
              "by finals, in which the best 5 by that value are trained for 5 epochs and compared by their accuracy less both losses.", "",
              f"| named by | {' | '.join(f'{case}: {got[DRAWS]} draws, pools of {got[POOL]}' for case, got in held.items())} |",
              "| --- |" + " ---: |" * len(held)]  # fmt: skip
    lines += [f"| {name} | {' | '.join(f'{got[name]:.2f}' for got in held.values())} |" for name in list(held["fashion"])[2:]]
    (HERE / "losses.md").write_text("\n".join([text, "", *lines]) + "\n")
    (HERE / "losses.json").write_text(json.dumps({"weights": SUMS, "spearman": found, "finals": held}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("measure", "table"))
    parser.add_argument("--case", choices=(*CASES, *RANKED))
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--cifar", help="zip archive of CIFAR-10 as JPEG")
    parser.add_argument("--data", type=Path, help="folder of the tables and the archive, for the networks of the ranking study")
    parser.add_argument("--runs", default="runs/search-real", help="folder for unpacked images")
    options = parser.parse_args()
    measure(options) if options.step == "measure" else table()
