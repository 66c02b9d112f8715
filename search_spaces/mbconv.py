"""Mobile inverted bottlenecks on timm's ``EfficientNet`` (MnasNet, Tan et al. 2019; fused blocks of EfficientNetV2), stage by stage."""

from __future__ import annotations

import optuna
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    stages: int = 3,
    depths: tuple[int, int] = (1, 3),
    widths: tuple[int, int] = (8, 24),
    expansions: tuple[int, ...] = (1, 3, 6),
    heads: tuple[int, int] = (64, 192),
) -> nn.Module:
    """Inverted residuals: first stride, activation, head width; per stage block, expansion, kernel, depth, squeeze-excitation and width.

    ``widths`` are those of the first stage (multiples of 8) and double from stage to stage; ``heads`` is the range of the last 1x1 conv.
    """
    first_stride = trial.suggest_categorical("first_stride", [1, 2])
    stem_width = trial.suggest_int("stem_width", 8, widths[1], step=8)
    act = trial.suggest_categorical("act", ["relu", "silu", "hard_swish"])
    head = trial.suggest_int("head", *heads, step=64)
    size, arch = -(-image_size // 2), []
    for i in range(stages):
        stride = (2 if i else first_stride) if size >= 4 else 1  # stop reducing at 2x2
        size = -(-size // stride)
        block = trial.suggest_categorical(f"block{i}", ["ir", "er"])  # inverted residual, or with its depthwise and first 1x1 conv fused
        depth = trial.suggest_int(f"depth{i}", *depths)
        kernel = trial.suggest_categorical(f"kernel{i}", [3, 5]) if block == "ir" else 3
        expansion = trial.suggest_categorical(f"expansion{i}", expansions)
        se = trial.suggest_categorical(f"se{i}", [0.0, 0.25])
        width = trial.suggest_int(f"width{i}", widths[0] << i, widths[1] << i, step=8)
        arch.append([f"{block}_r{depth}_k{kernel}_s{stride}_e{expansion}_c{width}_se{se}"])

    return EfficientNet(
        decode_arch_def(arch),
        num_features=head,
        stem_size=stem_width,
        act_layer=act,
        num_classes=num_classes,
        in_chans=in_chans,
    )
