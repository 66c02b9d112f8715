"""Searches of NAS-Bench-201 (CIFAR-10) with looked-up trainings: regret against simulated cost.

    python results/search/tabular.py --data FOLDER [--scores FILE]    # FOLDER holds nasbench201_cifar10_dev.csv.gz
    python results/search/tabular.py --data FOLDER --pools            # raw/pools.json again
    python results/search/tabular.py --data FOLDER --time-scores      # raw/score_seconds.jsonl again
    python results/search/tabular.py --derive-only                    # tabular.md and tabular.svg from raw/ again

A training of 12 epochs is looked up; its accuracy is all that a search sees of a cell. Reported is the 200-epoch test accuracy of the
cell that the search would name as its best, as regret below the best cell of the table. Every search runs the product's own objects:
the objective with its gate, pool, constraints and values, and Optuna's samplers and pruner; only training and scores are looked up.

Scores are those of the ranking study, the mean of two draws of the weights as in a search, or those of FILE.
Cost is simulated: 12 epochs take as long as a model of the published training times says (`seconds_of_training`), `capacity_score` takes
as long as these took on average, naswot and synflow the share of that which they took on the same cells in one process
(`time_scores`). It is shown in units of the table's mean training. Every method sees the same random cells first, seed by seed. A search
names the best cell by its latest accuracy, also one that a pruner stopped. Cells of one isomorphism class are one cell;
drawn again, its result is reused at no cost by every method. A pool counts drawn strings, for a gate and for TPE started by a proxy alike;
methods named `CLASSES` have pools of as many different classes. Where scores are of a part of the table, that part is the space: regret is
that below its best cell, and what a sampler draws outside it is drawn again (for TPE see `InTable`; evolution mutates on until it is
inside). The run can be stopped; run again it adds what is missing, also where weights or budgets have changed
since; rows of other weights stay and are not shown.

The weights of `capacity_score` and `combined` were fitted on NAS-Bench-201 among other spaces, so these searches are of a space that the
score knows; `pools` has rows of a fit without it. What a search saves is shown for as many trainings as it made, not beyond.
"""

import argparse
import contextlib
import json
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from capnas.search_spaces import nasbench201

from capnas.measures.proxies import naswot, synflow
from capnas.objective import Objective
from capnas.objective.gates import RANKED_BY
from capnas.objective.history import find_twin, take_over
from capnas.objective.targets import WEIGHTS, known_before, value_of
from capnas.profile import INITIALIZATIONS, profile_model
from capnas.scoring import CAPACITY_WEIGHTS, score
from capnas.search.export import write_environment
from capnas.search.samplers import make_sampler

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "ranking"))
from run import records_of  # noqa: E402

RAW, SPACE = HERE / "raw" / "tabular.jsonl", HERE / "raw" / "tabular_space.json"
TIMES, FITS = HERE / "raw" / "score_seconds.jsonl", HERE.parent / "ranking" / "fit.json"
SEEDS, BUDGET, SHORT = 100, 100, 25  # budgets in mean trainings; the short one where a score leads: such searches settle sooner
IDLE = 200  # draws in a row that cost nothing after which a search ends: a sampler may settle on cells that it knows
SUMMED = known_before(WEIGHTS)  # of combined; the table has no losses
UNSEEN = "unseen"  # capacity_score with weights of the other spaces
POOL, SHARE = 400, 5  # candidates measured ahead; percent of all seen that may be trained
OPERATIONS = nasbench201.OPERATIONS
KEYS = [f"op_{s}_{t}" for s, t in nasbench201.EDGES]


# Seconds of 200 epochs on CIFAR-10, least squares on the times published for all 15,625 cells (R^2 0.993); dead edges run there as well.
TIME = {"base": 709.8, "none": 0.0, "skip_connect": -37.8, "nor_conv_1x1": 346.5, "nor_conv_3x3": 456.6, "avg_pool_3x3": 166.4}


def seconds_of_training(arch):
    """Seconds of 12 epochs of a cell, see `TIME`."""
    return (TIME["base"] + sum(TIME[operation] for operation in nasbench201.parameters(arch).values())) * 12 / 200


def weighted(scores, weights):
    """The sum of scores by name."""
    return sum(weight * scores[name] for name, weight in weights.items())


def unseen():
    """Weights of the terms of `capacity_score` as fitted on all spaces but this one."""
    rows = json.loads(FITS.read_text())
    fitted = next(r for r in rows if (r["fitted_on"], r["terms"]) == ("all but nasbench201", "shipped terms"))
    return {name: fitted["weights"][name] for name in CAPACITY_WEIGHTS}


class Table:
    """Everything that is looked up: one row per isomorphism class, and the class of every cell of the table."""

    def __init__(self, data, scores):
        cells = pd.read_csv(Path(data) / "nasbench201_cifar10_dev.csv.gz")
        first = cells.drop_duplicates("unique").set_index("unique")
        known = [row["scores"] | {"log2_macs": np.log2(row["n_macs"])} for row in scores]
        known = [values | {RANKED_BY: weighted(values, CAPACITY_WEIGHTS)} for values in known]  # today's weights
        terms = dict.fromkeys([RANKED_BY, *(term.removeprefix("init_") for term in SUMMED)])
        elsewhere = unseen()
        found = pd.DataFrame([{"arch": row["arch"], "seconds": row["seconds"], RANKED_BY: values[RANKED_BY],
                               UNSEEN: weighted(values, elsewhere),
                               "init": {"init_" + name: values[name] for name in terms}}
                              for row, values in zip(scores, known)])  # fmt: skip
        found["unique"] = found["arch"].map(cells.set_index("arch")["unique"])
        found = found.drop_duplicates("unique").set_index("unique")
        rows = first.join(found[[RANKED_BY, UNSEEN, "seconds", "init"]], how="inner")
        rows["c10_naswot"] = rows["c10_naswot"].clip(lower=-1e6)
        rows["training"] = [seconds_of_training(arch) for arch in rows["arch"]]
        self.rows = rows.rename(columns={"c10_naswot": "naswot", "c10_logsynflow": "synflow"}).to_dict("index")
        self.unique = {arch: unique for arch, unique in zip(cells["arch"], cells["unique"]) if unique in self.rows}
        self.best = float(rows["c10_200"].max())
        self.unit, timed = float(rows["training"].mean()), pd.DataFrame(read(TIMES))
        share = {name: timed[name].sum() / timed[RANKED_BY].sum() for name in (RANKED_BY, "naswot", "synflow")}
        self.seconds = {name: float(rows["seconds"].mean() * part) for name, part in share.items()}

    def cell(self, params):
        """The class of a cell given by its parameters and its row, or None where the table has no such cell."""
        unique = self.unique.get(nasbench201.architecture_string(params))
        return None if unique is None else (unique, self.rows[unique])

    def draw(self, chance, seen=None):
        """Parameters of a cell, each string of the table equally likely; drawn on while its class is in `seen`, which then has it."""
        strings = self.__dict__.setdefault("strings", list(self.unique))
        while (unique := self.unique[arch := strings[chance.integers(len(strings))]]) in (seen or ()):
            pass
        if seen is not None:
            seen.add(unique)
        return nasbench201.parameters(arch)


class LookedUp(Objective):
    """The product's objective with two stages looked up: the score before training and the training itself."""

    def __init__(self, table, *, scored=False, epochs=(12,), ranked_by=RANKED_BY, **settings):
        images = (np.arange(20 * 64).astype(np.uint8).reshape(20, 8, 8), np.arange(20) % 2)
        super().__init__(nasbench201.space, images, device="cpu", **settings)
        self.table, self.is_scored, self.rungs = table, scored, epochs
        self.training, self.scored, self.trained, self.best, self.track = 0.0, 0, set(), None, []
        self.seconds = table.seconds[ranked_by]  # of one score

    @property
    def spent(self):
        """Mean trainings."""
        return (self.training + self.scored * self.seconds) / self.table.unit

    def stages(self, trial, found):
        for key in KEYS:
            trial.suggest_categorical(key, OPERATIONS)
        unique, row = self.table.cell(trial.params)
        found |= {"hash": unique, "image_size": 32}
        asked = {"weights": self.weights, "epochs": self.train.epochs, "limits": self.limits}
        if (twin := find_twin(trial, found, names=self.names, **asked)) is not None:
            return take_over(found, *twin)
        if self.is_scored:
            self.scored += 1
            found["metrics"] |= row["init"]
        if self.selection is not None and (place := self.selection.judge(trial, found)) is not None:
            return "measured", place
        last = 0
        for epochs in self.rungs:
            self.training += row["training"] * (epochs - last) / 12
            last = epochs
            found["metrics"]["accuracy"] = row["c10_12" if epochs == 12 else "c10_200"] / 100
            if len(self.rungs) > 1:
                self.named(found["metrics"]["accuracy"], row)
                trial.report(found["metrics"]["accuracy"], epochs)
                if epochs < self.rungs[-1] and trial.should_prune():
                    return "stopped", ""
        self.trained.add(unique)
        return "complete", ""

    def named(self, value, row):
        """Keep the cell with the best value; the track gets the cost so far, trainings and regret whenever it changes."""
        if self.best is None or value > self.best:
            self.best = value
            regret = round(self.table.best - row["c10_200"], 4)
            self.track.append([round(self.training / self.table.unit, 4), self.scored, len(self.trained), regret])


class InTable(optuna.samplers.TPESampler):
    """TPE on the cells of a table: of its candidates the first 24 that the table has compete, as many as TPE always lets compete.

    Drawing again until a draw is in the table gives the same and takes many times as long where the table is a small part of the space.
    """

    def _compute_acquisition_func(self, samples, below, above):
        values = super()._compute_acquisition_func(samples, below, above)
        drawn = zip(*(samples[key].astype(int) for key in KEYS))
        there = np.array([self.table.cell({key: OPERATIONS[i] for key, i in zip(KEYS, row)}) is not None for row in drawn])
        return np.where(there & (there.cumsum() <= 24), values, -np.inf)


def inside(sampler, table):
    """A sampler of Optuna that draws from the table; others than TPE draw again outside this function."""
    if type(sampler) is optuna.samplers.TPESampler:
        sampler.__class__, sampler.table = InTable, table
        sampler._n_ei_candidates = round(24 * len(OPERATIONS) ** len(KEYS) / len(table.unique))
    return sampler


def optuna_search(table, seed, *, sampler, budget=BUDGET, scored=False, warm=None, pruner=None, distinct=False, **settings):
    """One study on the simulated clock. Random draws (all of the random search, start-up trials, a pool) are cells of the table.

    A pool is of drawn strings, as a gate counts it, or with `distinct` of as many different classes.
    """
    objective = LookedUp(table, scored=scored, ranked_by=warm or RANKED_BY, **settings)
    chance, pool = np.random.default_rng([seed, 1]), settings.get("pool", 0)
    chosen = inside(sampler(seed) if callable(sampler) else make_sampler(sampler, seed=seed, trials=BUDGET, pool=pool), table)
    study = optuna.create_study(direction="maximize", sampler=chosen, pruner=pruner or optuna.pruners.NopPruner())
    startup = 10**9 if isinstance(chosen, optuna.samplers.RandomSampler) else max(10, pool)
    seen = set() if distinct else None
    if warm is not None:
        drawn = [table.draw(chance, seen) for _ in range(POOL)]  # the pool of a gate of this seed
        objective.scored += POOL
        ranked = {table.cell(p)[0]: p for p in sorted(drawn, key=lambda p: table.cell(p)[1][warm])}  # the last of equals stays: the best
        for params in list(reversed(ranked.values()))[: POOL * SHARE // 100]:
            study.enqueue_trial(params)
        startup = 0
    idle = settled = 0
    while (before := objective.spent) < budget and idle < IDLE:
        if settled < startup:
            study.enqueue_trial(table.draw(chance, seen))
        trial = study.ask()
        params = {key: trial.suggest_categorical(key, OPERATIONS) for key in KEYS}
        if (cell := table.cell(params)) is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            if isinstance(chosen, InTable):
                study.enqueue_trial(table.draw(chance))  # none of its candidates is in the table
            continue
        settled += 1
        try:
            value = objective(trial)
            study.tell(trial, value)
            if study.get_trials(deepcopy=False)[trial.number].constraints["valid"] < 0:
                objective.named(value, cell[1])
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        idle = idle + 1 if objective.spent == before else 0
    return objective


def evolution(table, seed, *, budget=BUDGET, population=20, sample=5):
    """Regularized evolution (Real et al., 2019): tournament of `sample` among the youngest `population`, one operation changed."""
    start, chance, members, seen = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2]), [], {}
    objective = LookedUp(table, scored=False, values="accuracy")
    idle = 0
    while objective.spent < budget and idle < IDLE:
        if len(members) < population:
            params = table.draw(start)
        else:
            rivals = [members[i] for i in chance.choice(population, sample, replace=False)]
            params = max(rivals, key=lambda m: m[0])[1]
            while True:  # on through cells that the table does not have
                key = KEYS[chance.integers(6)]
                params = params | {key: str(chance.choice([o for o in OPERATIONS if o != params[key]]))}
                if table.cell(params) is not None:
                    break
        unique, row = table.cell(params)
        idle = idle + 1 if unique in seen else 0
        if unique not in seen:
            objective.training += row["training"]
            objective.trained.add(unique)
            seen[unique] = row["c10_12"] / 100
            objective.named(seen[unique], row)
        members = [*members, (seen[unique], params)][-population:]
    return objective


def plain(sampler, **settings):
    """A sampler of Optuna as it comes."""
    return lambda seed: sampler(seed=seed, **settings)


CAPNAS = {"sampler": "tpe", "scored": True, "budget": SHORT}
GATED, COMBINED = {"gate": f"best:{SHARE}%", "pool": POOL}, {"values": "combined"}
TPE, RANDOM = plain(optuna.samplers.TPESampler), plain(optuna.samplers.RandomSampler)
METHODS = {
    "random": {"sampler": RANDOM, "values": "accuracy"},
    "TPE": {"sampler": TPE, "values": "accuracy"},
    "TPE as capnas sets it": {"sampler": "tpe", "values": "accuracy"},
    "NSGA-II": {"sampler": plain(optuna.samplers.NSGAIISampler, population_size=20), "values": "accuracy"},
    "successive halving": {
        "sampler": RANDOM,
        "values": "accuracy",
        "epochs": (12, 200),
        "pruner": optuna.pruners.SuccessiveHalvingPruner(min_resource=12, reduction_factor=4),
    },
    "regularized evolution": {},
    "TPE started by naswot": {"sampler": TPE, "values": "accuracy", "warm": "naswot", "budget": SHORT},
    "TPE started by synflow": {"sampler": TPE, "values": "accuracy", "warm": "synflow", "budget": SHORT},
    "capnas: gate": CAPNAS | GATED | {"values": "accuracy"},
    "capnas: combined": CAPNAS | COMBINED,
    "capnas: gate + combined": CAPNAS | GATED | COMBINED,
}
CLASSES = f", {POOL} classes"  # the same with a pool of as many different classes; not in the figure
METHODS |= {name + CLASSES: METHODS[name] | {"distinct": True}
            for name in ("TPE started by synflow", "capnas: gate", "capnas: gate + combined")}  # fmt: skip


def runs(table, method, seed):
    """One search."""
    if method == "regularized evolution":
        return evolution(table, seed)
    return optuna_search(table, seed, **METHODS[method])


def work(task):
    """One search in a process of its own; the table is read once by each process."""
    data, scores, method, seed = task
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    table = TABLES.setdefault((data, scores), None) or Table(data, scored(scores))
    TABLES[data, scores] = table
    found = runs(table, method, seed)
    return (
        {"method": method, "seed": seed, "classes": len(table.rows)}
        | settings_of(method)
        | {
            "training": round(found.training / table.unit, 3),
            "scored": found.scored,
            "trained": len(found.trained),
            "track": found.track,
        }
    )


def score_of(method):
    """What ranks candidates before training in a method, or None."""
    if method.startswith("capnas"):
        return RANKED_BY
    return METHODS[method].get("warm")


def settings_of(method):
    """What the result of a search depends on beside the table: other rows are run again."""
    ranked = CAPACITY_WEIGHTS if score_of(method) == RANKED_BY and "gate" in METHODS[method] else {}
    summed = SUMMED if METHODS[method].get("values") == "combined" else {}
    draws = {"draws": INITIALIZATIONS} if ranked or summed else {}
    return {"score": score_of(method), "budget": METHODS[method].get("budget", BUDGET), "weights": {**ranked, **summed}, **draws}


def is_of(row, classes):
    """Whether a stored search is one of today's settings."""
    mine = {"score": row["score"], "budget": row.get("budget", BUDGET), "weights": row.get("weights", {})}
    mine |= {"draws": row["draws"]} if "draws" in row else {}
    return row["method"] in METHODS and row["classes"] == classes and mine == settings_of(row["method"])


def read(path):
    """Rows of a file of JSON lines."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def scored(path):
    """Cells with their scores: of a file, or those of the ranking study."""
    return records_of("nasbench201") if path is None else read(path)


def search(data, scores, seeds, methods, processes):
    """Run what is missing, one JSON line a search."""
    table = Table(data, scored(scores))
    space = {"classes": len(table.rows), "cells": len(table.unique), "best": table.best, "unit_seconds": round(table.unit, 2),
             "score_seconds": {name: round(seconds, 4) for name, seconds in table.seconds.items()}, "score": RANKED_BY,
             "blind": round(table.best - float(np.mean([table.rows[u]["c10_200"] for u in table.unique.values()])), 4)}  # fmt: skip
    pool = classes_of_pools(table)
    space |= {"pool_classes": {"mean": float(np.mean(pool)), "least": min(pool), "most": max(pool)}}
    SPACE.write_text(json.dumps(space, indent=1) + "\n")
    done = {(row["method"], row["seed"]) for row in read(RAW) if is_of(row, len(table.rows))}
    tasks = [(data, scores, method, seed) for seed in range(seeds) for method in methods if (method, seed) not in done]
    with RAW.open("a") as file, get_context("spawn").Pool(processes) if processes > 1 else contextlib.nullcontext() as pool:
        for count, row in enumerate(map(work, tasks) if pool is None else pool.imap_unordered(work, tasks), start=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if count % 20 == 0:
                print(f"{count} of {len(tasks)}", file=sys.stderr, flush=True)
    if tasks:
        write_environment(HERE / "environment.json", workers=processes, device="cpu")


def time_scores(data, count=30):
    """Processor seconds of `capacity_score`, naswot and synflow of the same untrained cells, 64 images each, in raw/score_seconds.jsonl."""
    torch.set_num_threads(1)
    cells = pd.read_csv(Path(data) / "nasbench201_cifar10_dev.csv.gz").drop_duplicates("unique").sample(count + 1, random_state=0)
    images, targets, rows = torch.randn(64, 3, 32, 32), torch.arange(64) % 10, []
    how = {"mode": "train", "measures": ("saturation", "structure"), "initialize": INITIALIZATIONS}
    ways = {RANKED_BY: lambda model: score(profile_model(model, images, targets, **how)),
            "naswot": lambda model: naswot(model, images), "synflow": lambda model: synflow(model, images)}  # fmt: skip
    for arch in cells["arch"]:
        operations = {(int(k[3]), int(k[5])): v for k, v in nasbench201.parameters(arch).items()}
        model, row = nasbench201.CellNet(operations, cells=5, channels=16), {"arch": arch}
        for name, way in ways.items():
            start = time.process_time()
            way(model)
            row[name] = round(time.process_time() - start, 4)
        rows.append(row)
    TIMES.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))  # the first call of each pays for what is loaded then


GATES = {RANKED_BY: "shipped score", UNSEEN: "its terms fitted elsewhere", "untrained": "untrained part of combined", "synflow": "synflow"}


def pools(table, repeats=1000):
    """Mean regret of a share at random draws, without any sampler: pool, trainings, gate, what names the winner -> points.

    The gate ranks by one of `GATES`. Accuracy or ``combined`` names the winner; ``pool`` None trains what is drawn. A pool is of as many
    different classes; the pools of most searches are of as many drawn strings, see `classes_of_pools`.
    """
    unique = np.array(list(table.unique.values()))
    names = list(table.rows)
    place = {name: i for i, name in enumerate(names)}
    cells = np.array([place[u] for u in unique])
    short, final = (np.array([table.rows[n][key] for n in names]) for key in ("c10_12", "c10_200"))
    metrics = [table.rows[n]["init"] | {"accuracy": accuracy} for n, accuracy in zip(names, short / 100)]
    values = {"accuracy": short / 100, "combined": np.array([value_of("combined", row, WEIGHTS) for row in metrics])}
    gates = {name: np.array([table.rows[n][name] for n in names]) for name in (RANKED_BY, UNSEEN, "synflow")}
    gates["untrained"] = values["combined"] - values["accuracy"]
    chance, rows = np.random.default_rng(0), []
    plans = [(None, t) for t in (5, 10, 20, 50, 100)] + [(n, t) for n in (50, 100, 200, 400) for t in (5, 10, 20)] + [(None, POOL)]
    for pool, trainings in plans:
        regrets = {(gate, name): [] for gate in (gates if pool else [None]) for name in values}
        bounds = []  # of the best that was drawn
        for _ in range(repeats):
            drawn = np.array(list(dict.fromkeys(chance.permutation(cells)[: 4 * (pool or trainings)].tolist())))[: pool or trainings]
            bounds.append(table.best - final[drawn].max())
            chosen = {gate: drawn if gate is None else drawn[np.argsort(-gates[gate][drawn])][:trainings] for gate, _ in regrets}
            for (gate, name), found in regrets.items():
                trained = chosen[gate]
                found.append(table.best - final[trained[np.argmax(values[name][trained])]])
        for (gate, name), found in regrets.items():
            mean, low, high = interval(np.array(found)[:, None])[:, 0]
            rows.append({"pool": pool, "trainings": trainings, "gate": gate, "named_by": name, "regret": mean, "low": low, "high": high,
                         "best_drawn": float(np.mean(bounds))})  # fmt: skip
    (HERE / "raw" / "pools.json").write_text(json.dumps(rows, indent=1) + "\n")


def classes_of_pools(table):
    """How many different classes the pool of a search holds, of each seed: gates and the searches started by a proxy draw the same."""
    chances = (np.random.default_rng([seed, 1]) for seed in range(SEEDS))
    return [len({table.cell(table.draw(chance))[0] for _ in range(POOL)}) for chance in chances]


def pool_lines():
    """`pools` as a table."""
    rows = json.loads((HERE / "raw" / "pools.json").read_text())
    sizes = dict.fromkeys(r["pool"] for r in rows if r["pool"])
    best = ", ".join(f"{np.mean([r['best_drawn'] for r in rows if r['pool'] == size]):.2f} (pool {size})" for size in sizes)
    lines = ["", "The same table at random draws alone, 1,000 repeats: the best of the pool by the gate are trained. The second gate has "
             "the terms of the shipped score with weights that were fitted without this space (fit.md of the ranking study). A pool "
             f"is of as many different classes; the best of them has a mean regret of {best}, below which no gate can come.", "",
             "| pool | trainings | gate | named by accuracy | named by combined |", "| --- | ---: | --- | ---: | ---: |"]  # fmt: skip
    for alone, summed in zip(rows[::2], rows[1::2]):
        texts = [f"{r['regret']:.2f} ({r['low']:.2f}, {r['high']:.2f})" for r in (alone, summed)]
        lines.append(f"| {alone['pool'] or 'none'} | {alone['trainings']} | {GATES.get(alone['gate'], '')} | {' | '.join(texts)} |")
    return lines


def curve(row, space, grid, *, by):
    """Regret of one search on a grid of costs, or of numbers of trainings; a random cell's before the first result.

    NaN beyond the last training of the search.
    """
    regret = np.full(len(grid), space["blind"])
    for training, scored, trained, value in row["track"]:
        spent = training + scored * space["score_seconds"].get(row["score"], 0.0) / space["unit_seconds"]
        regret[grid >= (spent if by == "cost" else trained)] = value
    if by == "trainings":
        regret[grid > row["trained"]] = np.nan
    return regret


def interval(values, seed=0):
    """Mean of the seeds and its bootstrapped 95 % interval, (3, ...)."""
    values = np.asarray(values)
    picks = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    means = np.stack([values[p].mean(0) for p in picks])
    return np.stack([values.mean(0), *np.quantile(means, (0.025, 0.975), axis=0)])


def shown(spread, at):
    """Mean and interval at one place, blank where a seed has none."""
    mean, low, high = spread[:, at]
    return "" if np.isnan(mean) else f"{mean:.2f} ({low:.2f}, {high:.2f})"


def results():
    """What was searched, and of each method with today's settings the regrets by cost and by trainings, (seeds, grid), seeds in order."""
    space = json.loads(SPACE.read_text())
    rows = sorted((r for r in read(RAW) if is_of(r, space["classes"])), key=lambda r: r["seed"])
    grid = np.arange(1, BUDGET + 1)
    mine = {m: [r for r in rows if r["method"] == m] for m in METHODS}
    curves = {by: {m: np.array([curve(r, space, grid, by=by) for r in found]) for m, found in mine.items() if found}
              for by in ("cost", "trainings")}  # fmt: skip
    return space, {m: [r["trained"] for r in found] for m, found in mine.items()}, curves["cost"], curves["trainings"]


def less(mine, other, seed=0):
    """Difference of two columns of regrets, over the seeds that both have."""
    both = min(len(mine), len(other))
    mean, low, high = interval(mine[:both] - other[:both], seed)
    return f"{mean:+.2f} ({low:+.2f}, {high:+.2f})"


def derive():
    """tabular.md and tabular.svg."""
    space, trained, cost, number = results()
    goal = cost["TPE"][:, -1].mean()
    marks = (5, 10, 20, 30, 50, 100)
    head = ["method", "seeds", "trainings of a search", *(f"at cost {c}" for c in marks), "at 20 trainings",
            f"cost to reach {goal:.2f}", f"trainings to reach {goal:.2f}"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for m in cost:
        spread, made = interval(cost[m]), trained[m]
        cells = [shown(spread, c - 1) if c <= METHODS[m].get("budget", BUDGET) else "" for c in marks]
        firsts = [next((str(i + 1) for i, r in enumerate(c.mean(0)) if r <= goal + 1e-9), "not reached") for c in (cost[m], number[m])]
        lines.append(f"| {m} | {len(made)} | {min(made)} to {max(made)} | {' | '.join(cells)} | {shown(interval(number[m]), 19)} | "
                     f"{' | '.join(firsts)} |")  # fmt: skip
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in space["score_seconds"].items())
    notes = [
        f"Regret in points of 200-epoch test accuracy below the best cell ({space['best']:.2f} %), mean over seeds and "
        f"bootstrapped 95 % interval. The table: {space['classes']:,} classes ({space['cells']:,} cells) of NAS-Bench-201, CIFAR-10, one "
        f"of the spaces that the score and the sum were fitted on. Cost in mean trainings of 12 epochs ({space['unit_seconds']:.0f} s), "
        f"scores included: {seconds} each. capnas ranks by {space['score']} before training. Pool {POOL} draws of a string, the "
        f"same seed by seed for a gate and for TPE started by a proxy, {space['pool_classes']['mean']:.0f} different classes on average "
        f"({space['pool_classes']['least']} to {space['pool_classes']['most']}), or of {POOL} different ones; share {SHARE} %. Cells are "
        f"blank beyond the budget, or where a seed has made fewer than 20 trainings (of 200 epochs in successive halving). A search that "
        f"finds nothing new in {IDLE} draws ends and keeps its result.",
        "",
    ]
    for m in cost:
        if m.startswith("capnas"):
            started = "TPE started by synflow" + (CLASSES if m.endswith(CLASSES) else "")
            rivals = "; ".join(f"{less(cost[m][:, 19], cost[other][:, c - 1])} that of {other} at cost {c}"
                               for other, c in (("TPE", 100), ("TPE as capnas sets it", 20), (started, 20)))  # fmt: skip
            notes.append(f"- {m}, regret at cost 20 less: {rivals}.")
    (HERE / "tabular.md").write_text("\n".join([*lines, "", *notes, *pool_lines()]) + "\n")
    drawn = {m: interval(c) for m, c in cost.items() if not m.endswith(CLASSES)}
    (HERE / "tabular.svg").write_text(figure(drawn, np.arange(1, BUDGET + 1)))
    print((HERE / "tabular.md").read_text())


COLOURS = ("#999999", "#2f6db5", "#7b5ea7", "#b8a13a", "#4f8f5b", "#4bb0c4", "#86bfe0", "#c4532f", "#e0924b", "#8c1c13", "#d98c8c")


def figure(spreads, grid):
    """Mean regret against cost, both on a logarithmic scale; every search keeps what it has named until it names another."""
    width, height, left, top, right, bottom = 860, 460, 60, 40, 220, 50
    low, high = 0.2, 6.0

    def x(cost):
        return left + np.log(cost) / np.log(grid[-1]) * (width - left - right)

    def y(regret):
        return top + (np.log(high) - np.log(np.clip(regret, low, high))) / (np.log(high) - np.log(low)) * (height - top - bottom)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/>',
             f'<text x="{left}" y="22" font-size="15">NAS-Bench-201, CIFAR-10: regret of the named cell against cost</text>']  # fmt: skip
    for tick in (0.2, 0.5, 1, 2, 5):
        parts.append(f'<line x1="{left}" y1="{y(tick):.1f}" x2="{width - right}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for tick in (1, 2, 5, 10, 20, 50, 100):
        parts.append(f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
    for row, ((name, spread), colour) in enumerate(zip(spreads.items(), COLOURS)):
        within = grid[grid <= METHODS[name].get("budget", BUDGET)]
        ends = np.repeat(within, 2)[1:]  # a value holds from its cost to the next
        mean, least, most = (list(zip(map(x, ends), map(y, np.repeat(v[: len(within)], 2)))) for v in spread)
        band = " ".join(f"{a:.1f},{b:.1f}" for a, b in [*least, *most[::-1]])
        parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.12"/>')
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in mean)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = top + 14 + 20 * row
        parts.append(
            f'<line x1="{width - right + 12}" y1="{at - 4}" x2="{width - right + 32}" y2="{at - 4}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{width - right + 38}" y="{at}">{name}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">cost, mean trainings of 12 epochs</text>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle">regret, points of test accuracy</text></svg>'
    )
    return "\n".join(parts) + "\n"


TABLES = {}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of nasbench201_cifar10_dev.csv.gz")
    parser.add_argument("--scores", help="JSON lines: arch, the score, seconds; those of the ranking study when absent")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", default=";".join(METHODS), help="some of them, with semicolons between")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pools", action="store_true", help="only what pools of random draws give (raw/pools.json), then derive")
    parser.add_argument("--time-scores", action="store_true", help="only the seconds of the scores (raw/score_seconds.jsonl), then stop")
    parser.add_argument("--derive-only", action="store_true")
    given = parser.parse_args()
    if given.time_scores:
        sys.exit(time_scores(given.data))
    if given.pools:
        pools(Table(given.data, scored(given.scores)))
    elif not given.derive_only:
        pools(Table(given.data, scored(given.scores)))
        search(given.data, given.scores, given.seeds, [m for m in METHODS if m in given.methods.split(";")], given.processes)
    derive()
