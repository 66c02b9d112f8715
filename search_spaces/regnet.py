"""Networks of the RegNet design space on timm's ``RegNet`` (Radosavovic et al. 2020): quantised linear widths, groups.

Block j is ``w0 * wm ** round(log(1 + wa * j / w0) / log(wm))`` wide, so the exponents 0 to 3 make the four stages that timm builds. The
slope ``wa`` is drawn through ``reach``, the last block's exponent before rounding, which makes nearly all draws have four stages.
The last stage keeps the resolution once it is down to 2x2; where timm dilates its kernels for that, they are set back to dilation 1.
"""

from __future__ import annotations

import optuna
from timm.models.regnet import RegNet, RegNetCfg, generate_regnet
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    depths: tuple[int, int] = (7, 12),
    widths: tuple[int, int] = (16, 32),
    group_sizes: tuple[int, ...] = (8, 16),
) -> nn.Module:
    """RegNet: depth, first width, width ratio of the stages and slope; group size, inner width, squeeze-excitation; stem.

    ``widths`` is the range of the first width w0 (multiples of 8). Fewer or more than four stages prune the trial.
    """
    depth = trial.suggest_int("depth", *depths)
    w0 = trial.suggest_int("w0", *widths, step=8)
    wm = trial.suggest_float("wm", 1.5, 2.2)
    reach = trial.suggest_float("reach", 2.6, 3.4)
    group_size = trial.suggest_categorical("group_size", group_sizes)
    bottle_ratio = trial.suggest_categorical("bottle_ratio", [0.5, 1.0])
    se_ratio = trial.suggest_categorical("se_ratio", [0.0, 0.25])
    stem_width = trial.suggest_int("stem_width", 16, 32, step=8)
    stem_stride = trial.suggest_categorical("stem_stride", [1, 2])
    wa = w0 * (wm**reach - 1) / (depth - 1)
    n_stages = generate_regnet(wa, w0, wm, depth, group_size)[1]
    if n_stages != 4:
        raise optuna.TrialPruned(f"w0={w0}, wa={wa:.2f}, wm={wm:.2f}, depth={depth} make {n_stages} stages, RegNet has 4")

    cfg = RegNetCfg(
        depth=depth, w0=w0, wa=wa, wm=wm,
        group_size=group_size, bottle_ratio=bottle_ratio, se_ratio=se_ratio, stem_width=stem_width,
    )  # fmt: skip
    output_stride = max((s for s in (16, 32) if -(-2 * image_size // (s * stem_stride)) >= 2), default=8)
    model = RegNet(cfg, output_stride=output_stride, num_classes=num_classes, in_chans=in_chans)
    model.stem.conv.stride = (stem_stride, stem_stride)  # timm's is always 2
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation = module.padding = (1, 1)
    return model
