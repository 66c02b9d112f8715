"""A search space and images for tests of the search: a trial of it takes a few hundredths of a second."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from torch import nn

FILE = f"{Path(__file__).resolve()}:space"

if __name__ == "__mp_main__":  # a worker of a study of `main` imports this
    time.sleep(float(os.environ.get("IMPORTING", 0)))


def images(n: int = 240, classes: int = 3, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bright stripes at a class-dependent row on noise: learnable in a few epochs."""
    chance = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = chance.integers(0, 120, (n, size, size), dtype=np.uint8)
    for i, c in enumerate(y):
        x[i, 2 * c + 1] += 120
    return x, y


def space(trial: Any, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """One to three convs; ``kind`` changes no architecture, except that "bad" cannot be built with depth 3."""
    width = trial.suggest_int("width", 2, 8, step=2)
    depth = trial.suggest_int("depth", 1, 3)
    kind = trial.suggest_categorical("kind", ["plain", "bad"])
    if kind == "bad" and depth == 3:
        raise optuna.TrialPruned("depth 3 goes with plain only")
    layers: list[nn.Module] = []
    channels = in_chans
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * width, num_classes))


def meeting_space(trial: Any, **shape: int) -> nn.Module:
    """The same, but the first trials wait until two processes have one: each leaves its mark in the folder ``MEETING``."""
    if not isinstance(trial, optuna.Trial) or trial.study.study_name != "tiny":  # a look before it
        return space(trial, **shape)
    folder = Path(os.environ["MEETING"])
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return space(trial, **shape)


def write_images(folder: Path) -> Path:
    """The same images as a folder of PNG files."""
    from PIL import Image

    for number, (x, y) in enumerate(zip(*images(120))):
        (folder / str(y)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / str(y) / f"{number}.png")
    return folder


def main() -> None:
    """Run a study from the command line, for tests that kill it: folder, trials, workers, seconds to sleep per trial."""
    import torch

    from capnas.search import StudyConfig, run_study

    torch.set_num_threads(1)
    folder, trials, workers, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    data = Path(folder).parent / "images"
    config = StudyConfig(
        space=FILE, data=str(data), trials=trials, workers=workers, epochs=1, out=folder, study="tiny", device="cpu", sampler="random",
        values=("accuracy", "macs"), train={"batch_size": 32}, data_options={"image_size": 8, "in_chans": 1},
    )  # fmt: skip

    def told(study: Any, trial: Any) -> None:
        print(trial.number, trial.state.name, flush=True)
        time.sleep(pause)

    result = run_study(config, on_trial=told)
    print("interrupted" if result.interrupted else "ended", result.n_finished, flush=True)


if __name__ == "__main__":
    main()
