"""Real searches, nothing looked up: capnas, accuracy-only TPE and random at equal processor time, winners retrained alike.

    python results/search/real.py --runs FOLDER                        # space resnet on the embedded Fashion-MNIST images
    python results/search/real.py --runs FOLDER --case cifar10 --cifar ZIP   # space mbconv on a part of CIFAR-10 (JPEG, {train,test}/CLASS)
    python results/search/real.py --derive-only                        # real.md from raw/real.jsonl and raw/real_retrained.jsonl again
    python results/search/real.py --runs FOLDER --methods "capnas, gate" --seeds 0    # else all of `METHODS` but those of `EXTRA`

The committed rows are of --final-epochs 6, on CIFAR-10 of --final-epochs 10, and of
    --budget 450 --epochs 3 --retrainings 2 --test-images 10000 --methods capnas "TPE on accuracy" random
    the same on CIFAR-10 with --methods "capnas, gate by size"
    --budget 1000 --epochs 3 --retrainings 2 --test-images 10000 --seeds 0 1 2 3 4 5 --methods capnas "TPE on accuracy" random
    --budget 240
    --budget 900 --retrainings 3 --methods capnas "TPE on accuracy" random    # on CIFAR-10 --test-images 10000
Two trainings of a network differ, and a test split of 2,000 images has a standard error of 1.1 points at 55 %. Rows of one budget are
compared. `combined` is of today's weights in the first two, whose rows tell them; before, it was the accuracy after one epoch and four
untrained terms ("the four terms of before, without losses" in losses.py).

Each search has the same seconds of processor time (all threads; waiting for others does not count) under one limit on MACs, whatever it
spends them on. What is measured before training is charged to capnas and spared the others. The winner is the trial that the search
itself would name. Winners are trained from new weights with the same recipe on train and validation; each network is evaluated once on
the test split. Searches and retrainings are resumed where they stopped; FOLDER keeps the studies.
"""

import argparse
import json
import statistics
import time
import zipfile
from pathlib import Path

import optuna
import torch

from capnas.candidates import build_candidate, build_model
from capnas.data import load_data
from capnas.objective import Objective
from capnas.objective.claims import sweep
from capnas.objective.evaluation import Evaluation
from capnas.objective.targets import WEIGHTS
from capnas.profile import INITIALIZATIONS
from capnas.scoring import score
from capnas.search.export import write_environment
from capnas.search.runs import is_settled
from capnas.search.samplers import make_pruner, make_sampler
from capnas.search.storages import open_storage
from capnas.spaces import load_space
from capnas.training import TrainConfig, retrain

HERE = Path(__file__).resolve().parent
RAW, RETRAINED = HERE / "raw" / "real.jsonl", HERE / "raw" / "real_retrained.jsonl"
SEEDS = (0, 1, 2)
CASES = {
    "fashion": {"space": "resnet", "data": "fashion-mnist-12k", "max_macs": 4_000_000},
    "cifar10": {"space": "mbconv", "data": "6,000 training images of CIFAR-10", "max_macs": 4_000_000},
}
METHODS = {  # capnas: as released
    "capnas": {"sampler": "tpe", "values": ("combined",)},
    "capnas, gate by combined": {"sampler": "tpe", "values": ("combined",), "gate": "combined:best:20%", "pool": 80},
    "capnas, gate by size": {"sampler": "tpe", "values": ("combined",), "gate": "log2_macs:best:20%", "pool": 80},
    "capnas, gate": {"sampler": "tpe", "values": ("combined",), "gate": "best:20%", "pool": 80},
    "capnas, weights doubled": {"sampler": "tpe", "values": ("combined",), "weights": {name: 2 * w for name, w in WEIGHTS.items()}},
    "capnas, principled": {"sampler": "tpe", "values": ("principled",)},
    "TPE on accuracy": {"sampler": "tpe", "values": ("accuracy",)},
    "random": {"sampler": "random", "values": ("accuracy",)},
}
EXTRA = ("capnas, gate", "capnas, gate by size")  # tried on one seed, on one data set
STANDARD = tuple(name for name in METHODS if name not in EXTRA)


def images(case, archive, folder, test_images=2000):
    """The data of a case; of the archive every so many-th image is unpacked, the same for every seed."""
    if case == "fashion":
        return load_data("fashion-mnist-12k")
    target = Path(folder) / ("cifar10" if test_images == 2000 else f"cifar10-{test_images}")
    if not target.is_dir():
        with zipfile.ZipFile(archive) as file:
            for split, count in (("train", 6000), ("test", test_images)):
                names = sorted(n for n in file.namelist() if n.startswith(split + "/") and n.endswith(".jpg"))
                for name in names[:: len(names) // count]:
                    file.extract(name, target.with_suffix(".partial"))
        target.with_suffix(".partial").rename(target)
    return load_data(str(target), validation=0.15)


def judging(case, data, test_images):
    """The data for the retrainings: of Fashion-MNIST the same training images with all 10,000 test images, where these are asked for."""
    if case != "fashion" or test_images == 2000:
        return data
    every, rows = load_data("fashion-mnist"), torch.cat([data.index["train"], data.index["validation"]])
    parts = {"train": (data.pool, rows), "test": (every.pool, every.index["test"])}
    arrays = {name: (pool.images[i].squeeze(1).numpy(), pool.labels[i].numpy()) for name, (pool, i) in parts.items()}
    return load_data(arrays, mean=data.mean, std=data.std)


def search(case, method, seed, data, given):
    """One search until its processor time is spent; the finished study."""
    setting, how = CASES[case], METHODS[method]
    measured = any(how.get(name) for name in ("gate", "pool")) or how["values"] != ("accuracy",)
    objective = Objective(
        setting["space"],
        data,
        values=how["values"],
        weights=how.get("weights"),
        gate=how.get("gate"),
        pool=how.get("pool"),
        max_macs=setting["max_macs"],
        seed=seed,
        device="cpu",
        train=TrainConfig(epochs=given.epochs, record=measured),
        probe_images=64 if measured else 2,  # the others need no look at the untrained network
        initializations=INITIALIZATIONS if measured else 1,
    )
    folder = Path(given.runs) / f"{case}-{given.budget:g}-{method.replace(', ', '-').replace(' ', '_')}-{seed}"
    pruner = make_pruner("median", epochs=given.epochs)
    study = optuna.create_study(study_name="real", storage=open_storage(None, folder), directions=objective.directions,
                                pruner=pruner, load_if_exists=True)  # fmt: skip
    while (spent := study.user_attrs.get("seconds", 0.0)) < given.budget:
        start = time.process_time()
        sweep(study)
        if objective.selection is not None:
            objective.selection.queue_next(study)
        settled = sum(map(is_settled, study.get_trials(deepcopy=False)))
        study.sampler = make_sampler(how["sampler"], seed=seed, draws=(settled,), pool=how.get("pool", 0))
        study.optimize(objective, n_trials=1)
        study.set_user_attr("seconds", spent + time.process_time() - start)
    return study


def summary(case, method, seed, study, given):
    """What a search spent and found."""
    found = [e for t in study.trials if t.state.is_finished() and (e := Evaluation.of(t)) is not None]
    outcomes = {status: sum(e.status == status for e in found) for status in sorted({e.status for e in found})}
    if not any(e.status == "complete" for e in found):
        raise SystemExit(f"{case}, {method}, seed {seed}: no trial was trained within {given.budget:g} s; give a larger --budget.")
    best, how = Evaluation.of(study.best_trial), METHODS[method]
    return {
        "case": case, "method": method, "seed": seed, "budget": given.budget, "epochs": given.epochs,
        "processor_seconds": round(study.user_attrs["seconds"], 1), "outcomes": outcomes,
        "trained": sum(bool(e.curve) and e.status != "duplicate" for e in found), "params": dict(best.params), "n_params": best.n_params,
        "macs": best.macs, "accuracy": best.metrics["accuracy"], "values": dict(best.values),
        **({"weights": dict(how.get("weights") or WEIGHTS)} if "combined" in how["values"] else {}),
    }  # fmt: skip


def retrained(case, row, seed, data, given):
    """A winner from new weights, evaluated once on the test split, and the evenness of its profile then."""
    space, shape = load_space(CASES[case]["space"]), data.shape()
    candidate = build_candidate(space, optuna.trial.FixedTrial(row["params"]), **shape)
    config = TrainConfig(epochs=given.final_epochs, seed=seed, device="cpu")
    start = time.process_time()
    result, test = retrain(build_model(space, candidate.params, **shape, seed=seed), data, config)
    scores = score(result.profile)
    return {
        "case": case, "method": row["method"], "seed": row["seed"], "budget": given.budget, "retrained": seed, "epochs": given.final_epochs,
        "test_images": given.test_images, "status": result.status,
        "test_accuracy": test.get("accuracy"), "seconds": round(time.process_time() - start, 1),
        "evenness": scores["saturation_evenness"], "block_evenness": scores["block_saturation_evenness"],
    }  # fmt: skip


def read(path):
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path, row):
    """One more row, and the versions that gave it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_environment(HERE / "environment.json", device="cpu")


def run(given):
    """What is missing, seed after seed, so that every method has as many."""
    data = images(given.case, given.cifar, given.runs, given.test_images)
    final = judging(given.case, data, given.test_images)
    for seed in given.seeds:
        for method in given.methods:
            mine = (given.case, given.budget, method, seed)
            done = [r for r in read(RAW) if (r["case"], r["budget"], r["method"], r["seed"]) == mine]
            if not done:
                done = [summary(given.case, method, seed, search(given.case, method, seed, data, given), given)]
                append(RAW, done[0])
            again = {(r["case"], r["budget"], r["method"], r["seed"], r["retrained"]) for r in read(RETRAINED)}
            for weights in (100 * (i + 1) + seed for i in range(given.retrainings)):
                if (*mine, weights) not in again:
                    append(RETRAINED, retrained(given.case, done[0], weights, final, given))
            print(given.case, method, seed, "done", flush=True)


def derive():
    """real.md: one row a case, budget and method."""
    rows, final = read(RAW), read(RETRAINED)
    head = (
        "case",
        "seconds a search",
        "method",
        "seeds",
        "trained, measured a search",
        "winner's MACs",
        "test accuracy: mean (each seed)",
        "evenness: layers, blocks",
    )
    lines, notes = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)], []
    for case, budget in sorted({(r["case"], r["budget"]) for r in rows}, key=lambda c: (list(CASES).index(c[0]), c[1])):
        for method in METHODS:
            mine = [r for r in rows if (r["case"], r["budget"], r["method"]) == (case, budget, method)]
            again = [r for r in final if (r["case"], r["budget"], r["method"], r["status"]) == (case, budget, method, "complete")]
            if not mine or not again:
                continue
            seeds = sorted({r["seed"] for r in again})
            tests = [statistics.mean(r["test_accuracy"] for r in again if r["seed"] == seed) for seed in seeds]
            measured = statistics.mean(r["outcomes"].get("measured", 0) for r in mine)
            each = f"{statistics.mean(tests):.4f} ({', '.join(f'{t:.4f}' for t in tests)})"
            even = ", ".join(f"{statistics.mean(r[name] for r in again):.3f}" for name in ("evenness", "block_evenness"))
            cells = (case, f"{budget:g}", method, str(len(mine)), f"{statistics.mean(r['trained'] for r in mine):.1f}, {measured:.1f}",
                     f"{statistics.mean(r['macs'] for r in mine) / 1e6:.2f} M", each, even)  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            notes.append(f"{case}, {budget:g} s of processor time: space {CASES[case]['space']}, {CASES[case]['data']}, at most "
                         f"{CASES[case]['max_macs'] / 1e6:g} M MACs; {mine[0]['epochs']} epochs a trial; winners retrained for "
                         f"{again[0]['epochs']} epochs, {len(again) / len(seeds):g} times each, evaluated on "
                         f"{again[0]['test_images']:,} test images.")  # fmt: skip
    (HERE / "real.md").write_text("\n".join([*lines, "", *dict.fromkeys(notes)]) + "\n")
    print((HERE / "real.md").read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/search-real", help="folder for the studies")
    parser.add_argument("--case", choices=list(CASES), default="fashion")
    parser.add_argument("--cifar", help="zip archive of CIFAR-10 as JPEG")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of processor time a search")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--final-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(STANDARD))
    parser.add_argument("--retrainings", type=int, default=1, help="of each winner, from new weights each")
    parser.add_argument("--test-images", type=int, default=2000, help="2000 or 10000")
    parser.add_argument("--derive-only", action="store_true")
    options = parser.parse_args()
    if not options.derive_only:
        torch.set_num_threads(1)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        run(options)
    derive()
