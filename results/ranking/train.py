"""Random draws of a search space trained alike, as a benchmark of our own: one JSON line a draw, resumable.

    python results/ranking/train.py SPACE --data DIR [--draws 100] [--images 8000] [--epochs 6] [--image-size 24] [--label L]

SPACE: mbconv, or nasbench201 for the same cells as `run.py measure` at the size of the product's space. DIR holds the tables and the
CIFAR-10 archive of JPEG files. The accuracy is that of the validation split after the last epoch: 639 images, a standard error of 2 points
where the draws of mbconv differ by a standard deviation of 3.9, so that no signal can correlate with it beyond about 0.86. `run.py measure`
then scores the same draws before training. A label goes into the name of the file, for another recipe.
"""

import argparse
import json
import time
from pathlib import Path

import benchmarks
import optuna
import torch
from capnas.search_spaces import nasbench201

from capnas import Objective, load_data
from capnas.objective.evaluation import Evaluation

HERE = Path(__file__).resolve().parent
VALUES = ("accuracy", "capacity_balance", "depth_evenness", "saturation_evenness", "capacity_slack")


def images(folder, count, size):
    """CIFAR-10 training images as bytes: a tenth of four fifths validates, the last fifth is the test split, which is not looked at."""
    x, y = benchmarks.cifar(Path(folder) / "cifar10_jpeg.zip", count, 1, size, raw=True)
    cut = count * 4 // 5
    return load_data({"train": (x[:cut], y[:cut]), "val": (x[cut:], y[cut:])})


def main(given):
    torch.set_num_threads(1)
    path = HERE / "raw" / f"{given.space}{f'-{given.label}' if given.label else ''}-trained.jsonl"
    path.parent.mkdir(exist_ok=True)
    done = sum(1 for _ in path.open()) if path.exists() else 0
    data = images(given.data, given.images, given.image_size)
    objective = Objective(given.space, data, values=VALUES, epochs=given.epochs, seed=0, max_macs=given.max_macs)
    cells = None if given.space == "mbconv" else list(benchmarks.table(given.space, given.data, given.draws)["arch"])
    for number in range(done, given.draws):
        study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.RandomSampler(seed=number))
        if cells:
            study.enqueue_trial(nasbench201.parameters(cells[number]))
        start = time.process_time()
        study.optimize(objective, n_trials=1)
        found = Evaluation.of(study.trials[0])
        record = {"arch": cells[number] if cells else f"draw {number}", "params_drawn": found.params, "status": found.status,
                  "reason": found.reason, "accuracy": found.metrics.get("accuracy"),
                  "short_accuracy": (found.curve[0]["accuracy"] if found.curve else None),
                  "after_training": {n: found.metrics.get(n) for n in VALUES},
                  "init_capacity_score": found.metrics.get("init_capacity_score"),
                  "params": found.n_params, "macs": found.macs, "train_seconds": round(time.process_time() - start, 1),
                  "epochs": given.epochs, "images": given.images, "image_size": given.image_size}  # fmt: skip
        with path.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(number, found.status, record["accuracy"], record["macs"], record["train_seconds"], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", choices=("mbconv", "nasbench201"))
    parser.add_argument("--label")
    parser.add_argument("--data", required=True)
    for name, default in (("draws", 100), ("images", 8000), ("epochs", 6), ("image-size", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max-macs", type=float, default=1e9)
    main(parser.parse_args())
