"""Train a small timm network, narrow it to half its MACs, save it without pickle, load it again, and ask which image size suits it."""

import argparse
import tempfile
from pathlib import Path

import torch

import capnas
from capnas.saved import build_recipe
from capnas.training import evaluate, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=2000)
parser.add_argument("--epochs", type=int, default=10)
arguments = parser.parse_args()

x, y = capnas.load_data("fashion-mnist-12k").probe(arguments.images, seed=0)
# few images, so that this is short: `probe` gives them normalized, and arrays of pixels hold bytes
pixels = (x - x.min()) / (x.max() - x.min()) * 255
data = capnas.load_data((pixels.squeeze(1).to(torch.uint8).numpy(), y.numpy()))
recipe = {"timm": "resnet10t", "args": {"num_classes": 10, "in_chans": 1, "channels": (16, 32, 64, 128)}, "image_size": 28}
model = build_recipe(recipe, seed=0)
train(model, data, capnas.TrainConfig(epochs=arguments.epochs))

small = capnas.prune(model, data, target_macs=0.5, images=500)
with tempfile.TemporaryDirectory() as folder:
    capnas.save_model(small.model, Path(folder) / "narrow", recipe)
    again = capnas.load_model(Path(folder) / "narrow")
for name, network in (("trained", model), ("half the MACs", again)):
    print(f"{name:14s} accuracy {evaluate(network, data, 'validation')['accuracy']:.3f}")
print(small.plan.widths)

tuning = capnas.tune_resolution(lambda size: build_recipe(recipe, seed=0, image_size=size), data, (20, 28), epochs=arguments.epochs)
print(f"recommended: {tuning.recommendation.size} px")
print("\n".join(tuning.recommendation.reasons))
