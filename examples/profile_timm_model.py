"""Look inside a timm model: which layers use their width, which are over-wide, where saturation falls off."""

import argparse

import capnas
from capnas._timm import timm  # as `import timm`, on every build of torch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="resnet18")
parser.add_argument("--images", type=int, default=64)
arguments = parser.parse_args()

images, labels = capnas.load_data("fashion-mnist-12k").probe(arguments.images, image_size=64)
model = timm.create_model(arguments.model, in_chans=1, num_classes=10)
profile = capnas.profile_model(model, images, labels, measures=("saturation", "capacity"), mode="train")

for row in profile.layers:
    flag = "  over-wide" if row.over_wide else ""
    print(f"{row.name:24s} width {row.width:5d}  saturation {row.saturation:.3f}  utilisation {row.utilisation or 0:.3f}{flag}")
for name in ("saturation_mean", "saturation_evenness", "tail_fraction", "capacity_balance"):
    print(f"{name:24s} {capnas.score(profile)[name]:.3f}   {capnas.SCORES[name].meaning}")
