"""Arrays of your own as the data of a whole study: here the 8 x 8 digits of scikit-learn, or noise where it is not installed."""

import argparse
import tempfile

import numpy as np

import capnas

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--trials", type=int, default=4)
arguments = parser.parse_args()

try:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images * 15.9).astype(np.uint8), digits.target
except ModuleNotFoundError:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (600, 8, 8), dtype=np.uint8), np.arange(600) % 10

data = capnas.load_data((images, labels), image_size=16, augment=False)
with tempfile.TemporaryDirectory() as folder:
    how = {"epochs": 2, "values": ("combined",), "max_macs": 8e6}
    config = capnas.StudyConfig(space="vgg", data="digits", trials=arguments.trials, out=folder, **how)
    run = capnas.run_study(config, data=data)
    print(f"{run.n_complete} of {run.n_finished} trials complete")
    if run.best is not None:
        print(f"best: trial {run.best.number}, {run.best.values[0]:.3f}, {run.best.params}")
