"""Plain stacks of 3x3 convs on timm's ``VGG`` (Simonyan & Zisserman 2015) with batch norm: stages, depth and width per stage, head width.

timm's head is 4096 wide whatever the body, so it is exchanged for the same kind of head in a searched width.
"""

from __future__ import annotations

import optuna
from timm.layers import ClassifierHead
from timm.models.vgg import VGG, ConvMlp
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    stages: tuple[int, int] = (2, 4),
    depths: tuple[int, int] = (1, 3),
    widths: tuple[int, int] = (8, 24),
    heads: tuple[int, int] = (32, 128),
) -> nn.Module:
    """VGG with batch norm: number of stages (a 2x2 max pool ends each), convs and width of each, activation, head width.

    ``widths`` are those of the first stage (multiples of 8) and double from stage to stage.
    """
    n_stages = trial.suggest_int("stages", *stages)
    act = {"relu": nn.ReLU, "silu": nn.SiLU}[trial.suggest_categorical("act", ["relu", "silu"])]
    hidden = trial.suggest_int("head", *heads, step=32)
    cfg: list[int | str] = []
    size, width = image_size, 0
    for i in range(n_stages):
        depth = trial.suggest_int(f"depth{i}", *depths)
        width = trial.suggest_int(f"width{i}", widths[0] << i, widths[1] << i, step=4 << i)
        pool = size >= 4  # stop halving at 2x2
        cfg += [width] * depth + ["M"] * pool
        size >>= pool

    model = VGG(cfg, num_classes=0, in_chans=in_chans, norm_layer=nn.BatchNorm2d, act_layer=act, mlp_ratio=1 / 4096)
    model.pre_logits = ConvMlp(width, hidden, kernel_size=min(size, 3), drop_rate=0.0, act_layer=act)
    model.head = ClassifierHead(hidden, num_classes)
    model.num_classes, model.head_hidden_size = num_classes, hidden
    return model
