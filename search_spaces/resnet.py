"""Residual networks on timm's ``ResNet`` (He et al. 2016): depth and width per stage, block, shortcut, stem.

The stem's first 3x3 conv halves the image; the max pool behind it halves it again and is a choice here (``stem_pool``), as images are
small. Late stages keep the resolution once it is down to 2x2; where timm dilates their kernels for that, they are set back to dilation 1,
because a dilated kernel reaches past the border of so small a map with all but its middle.
"""

from __future__ import annotations

import optuna
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    depths: tuple[int, int] = (1, 3),
    widths: tuple[int, int] = (16, 32),
    stems: tuple[int, int] = (16, 32),
) -> nn.Module:
    """ResNet: stem pool and width, block, shortcut, activation, squeeze-excitation; depth and width per stage.

    ``widths`` is the range of the first stage; that of stage i is i + 1 times as wide. There are four stages, as everywhere in timm.
    """
    stem_pool = trial.suggest_categorical("stem_pool", [False, True])
    stem_width = trial.suggest_int("stem_width", *stems, step=8)
    block = {"basic": BasicBlock, "bottleneck": Bottleneck}[trial.suggest_categorical("block", ["basic", "bottleneck"])]
    act = trial.suggest_categorical("act", ["relu", "silu"])
    avg_down = trial.suggest_categorical("avg_down", [False, True])
    attention = trial.suggest_categorical("attention", ["none", "se"])
    layers = [trial.suggest_int(f"depth{i}", *depths) for i in range(4)]
    width = [trial.suggest_int(f"width{i}", widths[0] * (i + 1), widths[1] * (i + 1), step=4 * (i + 1)) for i in range(4)]
    output_stride = max((s for s in (8, 16, 32) if -(-image_size * (1 if stem_pool else 2) // s) >= 2), default=0)
    if not output_stride:
        raise optuna.TrialPruned(f"the stem and timm's least reduction leave less than 2 px of {image_size} px")

    model = ResNet(
        block, tuple(layers),
        channels=tuple(w // 2 if block is Bottleneck else w for w in width),  # a bottleneck's output is 4 times its channels
        stem_type="deep", stem_width=stem_width // 2,
        avg_down=avg_down, act_layer=act, output_stride=output_stride,
        block_args={} if attention == "none" else {"attn_layer": attention},
        num_classes=num_classes, in_chans=in_chans,
    )  # fmt: skip
    if not stem_pool:
        model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = module.padding = (1, 1)
    return model
