"""Networks whose every block has its own type, width and inner width, on timm's ``ByobNet`` ("bring your own blocks")."""

from __future__ import annotations

import optuna
from timm.layers import make_divisible
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

BLOCKS = ("basic", "bottle", "dark", "edge", "rep", "one")


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    stages: int = 3,
    depths: tuple[int, int] = (1, 3),
    widths: tuple[int, int] = (16, 40),
    group_sizes: tuple[int, ...] = (0, 1, 8),
) -> nn.Module:
    """ByobNet: stem, first stride, attention; per block its type, width, inner width (ratio) and the group size of bottlenecks.

    ``widths`` is the range of the first stage's blocks (multiples of 8); that of stage i is i + 1 times as wide. Group size 0 is a dense
    conv, 1 a depthwise one.
    """
    stem = trial.suggest_categorical("stem", ["3x3", "7x7", "deep"])
    stem_width = trial.suggest_int("stem_width", widths[0], widths[0] + 16, step=8)
    first_stride = trial.suggest_categorical("first_stride", [1, 2])
    attention = trial.suggest_categorical("attention", ["none", "se", "eca"])
    act = trial.suggest_categorical("act", ["relu", "silu"])
    size, blocks = -(-image_size // (4 if stem == "deep" else 2)), []  # the deep stem has two strided convs
    for i in range(stages):
        stride = (first_stride if i == 0 else 2) if size >= 4 else 1  # stop reducing at 2x2
        size = -(-size // stride)
        stage = []
        for j in range(trial.suggest_int(f"depth{i}", *depths)):
            kind = trial.suggest_categorical(f"type{i}_{j}", BLOCKS)
            width = trial.suggest_int(f"width{i}_{j}", widths[0] * (i + 1), widths[1] * (i + 1), step=8 * (i + 1))
            ratio = 1.0 if kind in ("rep", "one") else trial.suggest_categorical(f"ratio{i}_{j}", [0.25, 0.5, 1.0, 2.0])
            group = trial.suggest_categorical(f"group{i}_{j}", group_sizes) if kind == "bottle" else 0
            stage.append(ByoBlockCfg(kind, d=1, c=width, s=stride, gs=group, br=ratio))
        blocks.append(tuple(stage))
    for block in (block for stage in blocks for block in stage if block.gs):
        if make_divisible(block.c * block.br) % block.gs:
            raise optuna.TrialPruned(f"inner width {make_divisible(block.c * block.br)} is no multiple of group size {block.gs}")

    attn = None if attention == "none" else attention
    cfg = ByoModelCfg(blocks=tuple(blocks), stem_type=stem, stem_pool="", stem_chs=stem_width, attn_layer=attn, act_layer=act)
    return ByobNet(cfg, num_classes=num_classes, in_chans=in_chans)
