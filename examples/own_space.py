"""A search space is one function of a trial that returns a model; check_space tells whether it keeps the rules."""

import optuna
from torch import nn

import capnas


def space(trial: optuna.Trial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """Plain convolutions: how many stages, how wide, how large the kernel."""
    stages = trial.suggest_int("stages", 1, 4)
    if image_size >> stages < 2:
        raise optuna.TrialPruned(f"{stages} stages leave less than 2 px of {image_size}")
    kernel = trial.suggest_categorical("kernel", [3, 5])
    layers, channels = [], in_chans
    for stage in range(stages):
        width = trial.suggest_int(f"width_{stage}", 8, 32, step=8)
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


if __name__ == "__main__":
    report = capnas.check_space(space, in_chans=1, image_size=28, draws=4)
    print(f"{report.feasible} of {report.draws} draws are feasible, {report.distinct} architectures among them")
    print("search it with: capnas search examples/own_space.py")
