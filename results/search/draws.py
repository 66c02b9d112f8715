"""What each signal is worth for choosing among candidates of the real searches: random draws, each trained shortly and then fully.

    python results/search/draws.py train --case fashion --draws 100
    python results/search/draws.py train --case cifar10 --cifar ZIP --draws 100
    python results/search/draws.py table                               # draws.md and draws.json from raw/ again

Draws are of the space, the data and the limit on MACs of real.py. For each: scores before training, accuracy on the validation images
after one epoch and the scores then, and, as a benchmark, the accuracy of the full training from new weights on 10,000 images that neither
the searches nor the final evaluations see. One JSON line a draw in raw/draws-CASE.jsonl; goes on where it stopped. The short training of a
search, 3 epochs with one seed for all draws, is that of losses.py (raw/losses.jsonl).
Draws of mbconv come from the same seeds as those of the ranking study (train.py there), so that many of them are architectures that the
weights of `combined` were fitted on; the table tells how many, and the correlations without them.
"""

import argparse
import io
import json
import time
import zipfile

import numpy as np
import optuna
import torch
from real import CASES, HERE, images, read
from scipy.stats import rankdata, spearmanr

from capnas.candidates import Infeasible, build_candidate, build_model
from capnas.data import load_data
from capnas.objective.gates import UNTRAINED
from capnas.objective.targets import TOLD, WEIGHTS, value_of
from capnas.profile import profile_model
from capnas.scoring import SCORES, measures_for, score
from capnas.spaces import load_space
from capnas.training import TrainConfig, evaluate, train

FRESH, POOL = 10_000, 10  # images of the benchmark; draws of which one is named
GATED, TRAINED = 14, 4  # draws of which a gate trains so many
EARLY = "combined, what it knows before training"
FINAL_EPOCHS = {"fashion": 6, "cifar10": 10}
RANKING, LOSSES = HERE.parent / "ranking" / "raw", HERE / "raw" / "losses.jsonl"
SHORT, ONE = "accuracy of the short training", "accuracy after one epoch, each draw with weights of its own"
EPOCHS = TrainConfig().epochs  # of the short training
MEASURES = ("saturation", "structure", "capacity")
NAMES = [n for n in UNTRAINED if set(measures_for([n])) <= {*MEASURES}]


def fresh(case, data, archive):
    """Images for the benchmark, as the test split of a data set of their own."""
    if case == "fashion":
        full = load_data("fashion-mnist")
        known = {image.numpy().tobytes() for image in data.pool.images}
        pool = [(image.numpy(), int(label)) for image, label in zip(full.pool.images, full.pool.labels)]
        rows = [pool[i] for i in torch.cat([full.index["train"], full.index["validation"]]).tolist()]
        found = [(image, label) for image, label in rows if image.tobytes() not in known][-FRESH:]
        x, y = np.stack([image.squeeze(0) for image, _ in found]), np.array([label for _, label in found])
    else:
        from PIL import Image

        with zipfile.ZipFile(archive) as file:
            names = sorted(n for n in file.namelist() if n.startswith("train/") and n.endswith(".jpg"))
            taken = set(names[:: len(names) // 6000])  # as real.images
            names = [n for n in names if n not in taken][:: (len(names) - len(taken)) // FRESH][:FRESH]
            classes = sorted({n.split("/")[-2] for n in names})
            x = np.stack([np.asarray(Image.open(io.BytesIO(file.read(n))).convert("RGB")) for n in names])
            y = np.array([classes.index(n.split("/")[-2]) for n in names])
    return load_data({"train": (x[::10], y[::10]), "val": (x, y)}, mean=data.mean, std=data.std)


def drawn(space, number, shape, limit):
    """The first candidate of a seed that can be built and keeps the limit."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    while True:
        try:
            candidate = build_candidate(space, study.ask(), **shape)
        except Infeasible:
            continue
        if candidate.macs <= limit:
            return candidate


def accuracy(model, held_out):
    with held_out.final_evaluation() as opened:
        return evaluate(model, opened, "test")["accuracy"]


def run(given):
    case = CASES[given.case]
    data = images(given.case, given.cifar, given.runs)
    held_out = fresh(given.case, data, given.cifar)
    space, shape = load_space(case["space"]), data.shape()
    path = HERE / "raw" / f"draws-{given.case}.jsonl"
    for number in range(len(read(path)), given.draws):
        candidate = drawn(space, number, shape, case["max_macs"])
        model = build_model(space, candidate.params, **shape, seed=number)
        x, y = data.probe(64, seed=0)
        start = time.process_time()
        before = score(profile_model(model, x, y, measures=MEASURES, mode="train", initialize=True), NAMES)
        measured = time.process_time()
        short = train(model, data, TrainConfig(epochs=1, seed=number, device="cpu"))
        trained = time.process_time()
        after = score(short.profile, [n for n in NAMES if measures_for([n]) == ("saturation",)]) if short.profile else {}
        again = build_model(space, candidate.params, **shape, seed=1000 + number)
        plain = TrainConfig(epochs=FINAL_EPOCHS[given.case], seed=1000 + number, device="cpu", record=False)
        full = train(again, data, plain, split="train+validation", evaluate_on=None)
        row = {
            "draw": number, "params_drawn": dict(candidate.params), "params": candidate.n_params, "macs": candidate.macs,
            "status": [short.status, full.status], "short_accuracy": short.accuracy,
            "accuracy": accuracy(again, held_out), "scores": before, "scores_after": after,
            "seconds": {"measure": round(measured - start, 2), "short": round(trained - measured, 2),
                        "full": round(time.process_time() - trained, 2)},
        }  # fmt: skip
        row = json.loads(json.dumps(row), parse_constant=lambda _: None)  # no NaN in the file
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(number, candidate.macs, row["short_accuracy"], row["accuracy"], row["seconds"], flush=True)


INTRODUCTION = f"""\
Random draws under the limit on MACs of the searches. Spearman with the accuracy after the full training, on 10,000 images that nothing
else sees; and that accuracy, in points, of the draw that a signal names out of {POOL} (means over 5,000 pools)."""


def signals(rows):
    """Signal name to one value a draw, higher expected better; where all draws have one and it varies."""
    found = {SHORT: [r["short"]["accuracy"] for r in rows], ONE: [r["short_accuracy"] for r in rows], "macs": [r["macs"] for r in rows],
             "params": [r["params"] for r in rows], "combined": [combined(r) for r in rows],
             "accuracy less both losses": [combined(r) - combined(r, short=False) for r in rows],
             EARLY: [combined(r, short=False) for r in rows]}  # fmt: skip
    for label, part in (("", "scores"), ("after one epoch: ", "scores_after")):
        for name in rows[0][part]:
            found[label + name] = [None if r[part][name] is None else SCORES[name].oriented(r[part][name]) for r in rows]
    return {name: np.array(v) for name, v in found.items() if None not in v and np.ptp(v) > 0}


def combined(row, short=True):
    """The default value of a search, or what it knows before a training."""
    known = {f"init_{name}": value for name, value in row["scores"].items()} | {"macs": row["macs"], "params": row["params"]}
    return value_of("combined", known | (row["short"] if short else {"accuracy": 0.0}), WEIGHTS)


def pools_of(count, pool, draws):
    """Some draws out of all, in random order, so many times: (draws, pool)."""
    rng = np.random.default_rng(0)
    return np.stack([rng.choice(count, pool, replace=False) for _ in range(draws)])


def named_of(pools, values, accuracy):
    """Mean accuracy of the draw of each pool that a signal names."""
    return float(accuracy[pools[np.arange(len(pools)), values[pools].argmax(1)]].mean())


def picked(values, accuracy, pool=POOL, draws=5000):
    """Mean accuracy of the draw that a signal names out of some."""
    return named_of(pools_of(len(values), pool, draws), values, accuracy)


def gated(found, accuracy, draws=5000):
    """Mean accuracy of the draw named by a short training of the few that a gate lets through, by who is trained and what names it."""
    pools = pools_of(len(accuracy), GATED, draws)
    gates = {f"{TRAINED} random ones": pools[:, :TRAINED], f"all {GATED}": pools}
    for name in ("macs", EARLY, "capacity_score"):
        best = np.argsort(-found[name][pools], axis=1, kind="stable")[:, :TRAINED]
        gates[f"the best {TRAINED} by {name}"] = np.take_along_axis(pools, best, 1)
    return {gate: {value: named_of(who, found[value], accuracy) for value in (SHORT, "combined")} for gate, who in gates.items()}


def is_new(row, space):
    """Whether a draw is none of the rows of the ranking study, whose weights were fitted on these."""
    rows = read(RANKING / f"{space}-trained.jsonl")
    measured = {r["arch"] for r in read(RANKING / f"{space}.jsonl")}
    return row["params_drawn"] not in [r["params_drawn"] for r in rows if r["arch"] in measured]


def less(mine, other, accuracy, draws=10_000):
    """Difference of two signals' Spearman correlations with the accuracy, and its bootstrapped 95 % interval over the draws."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(accuracy), (draws, len(accuracy)))
    ranks = [rankdata(v[picks], axis=1) for v in (mine, other, accuracy)]
    a, b, c = ((r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True) for r in ranks)
    low, high = np.quantile(((a - b) * c).mean(1), [0.025, 0.975])
    return [float(spearmanr(mine, accuracy)[0] - spearmanr(other, accuracy)[0]), float(low), float(high)]


def table():
    lines, summary = [INTRODUCTION, ""], {}
    for case, setting in CASES.items():
        rows = [r for r in read(HERE / "raw" / f"draws-{case}.jsonl") if r["status"] == ["complete"] * 2]
        if not rows:
            continue
        told = {r["arch"]: {name: r[name] for name in TOLD} for r in read(LOSSES) if (r["case"], r["epochs"]) == (case, EPOCHS)}
        rows = [row | {"short": told[f"draw {row['draw']}"]} for row in rows]
        accuracy = np.array([r["accuracy"] for r in rows])
        best = picked(accuracy, accuracy)
        spread = f"Accuracy {100 * accuracy.min():.1f} to {100 * accuracy.max():.1f}, standard deviation {100 * accuracy.std(ddof=1):.2f}"
        lines += [f"## {case}: space {setting['space']}, {len(rows)} draws", "",
                  f"{spread}; the best of {POOL} has {100 * best:.1f}, a random one {100 * accuracy.mean():.1f}.", "",
                  f"| signal | Spearman [95 %] | named out of {POOL} |", "| --- | --- | --- |"]  # fmt: skip
        found = signals(rows)
        ranks = {name: spearmanr(v, accuracy)[0] for name, v in found.items()}
        named = {name: float(picked(v, accuracy)) for name, v in found.items()}
        summary[case] = {"draws": len(rows), "deviation": float(accuracy.std(ddof=1)), "spearman": {n: float(r) for n, r in ranks.items()},
                         "named": named,
                         "combined_less": {n: less(found["combined"], found[n], accuracy) for n in (SHORT, "macs")},
                         "gated": gated(found, accuracy)}  # fmt: skip
        new = np.array([is_new(r, setting["space"]) for r in rows])
        if not new.all():
            ranks_new = {name: float(spearmanr(v[new], accuracy[new])[0]) for name, v in found.items() if np.ptp(v[new]) > 0}
            summary[case]["new"] = {"draws": int(new.sum()), "spearman": ranks_new}
        for name in sorted(ranks, key=lambda n: -ranks[n]):
            low, high = interval(found[name], accuracy)
            lines.append(f"| {name} | {ranks[name]:.2f} [{low:.2f}, {high:.2f}] | {100 * named[name]:.2f} |")
        apart = "; ".join(f"{d:+.2f} [{low:+.2f}, {high:+.2f}] {n}" for n, (d, low, high) in summary[case]["combined_less"].items())
        lines += ["", f"Spearman of combined less that of another signal, the same draws, bootstrapped 95 % interval: {apart}."]
        lines += ["", f"Out of {GATED} draws a gate trains some for {EPOCHS} epochs; one of these is named (means over 5,000 pools):", "",
                  "| trained | named by accuracy | named by combined |", "| --- | --- | --- |"]  # fmt: skip
        for gate, by in summary[case]["gated"].items():
            lines.append(f"| {gate} | {100 * by[SHORT]:.2f} | {100 * by['combined']:.2f} |")
        if not new.all():
            alone = ", ".join(f"{n} {summary[case]['new']['spearman'][n]:.2f}" for n in ("combined", SHORT, "macs", "capacity_score"))
            lines += ["", f"{(~new).sum()} of these {len(rows)} draws are rows of the ranking study that the weights of combined and "
                          f"capacity_score were fitted on. Spearman over the {new.sum()} others: {alone}."]  # fmt: skip
        lines.append("")
    (HERE / "draws.md").write_text("\n".join(lines))
    (HERE / "draws.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(lines))


def interval(v, accuracy, draws=1000):
    """Bootstrapped 95 % interval of Spearman's correlation."""
    rng = np.random.default_rng(0)
    picks = (rng.integers(0, len(v), len(v)) for _ in range(draws))
    found = [spearmanr(v[i], accuracy[i])[0] for i in picks if np.ptp(v[i]) > 0]
    return np.quantile(found, [0.025, 0.975])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("--case", choices=list(CASES), default="fashion")
    parser.add_argument("--cifar", help="zip archive of CIFAR-10 as JPEG")
    parser.add_argument("--runs", default="runs/search-real", help="folder for unpacked images")
    parser.add_argument("--draws", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table() if options.command == "table" else run(options)
