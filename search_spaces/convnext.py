"""Modernised conv nets on timm's ``ConvNeXt`` (Liu et al. 2022; response norm of V2, Woo et al. 2023): depthwise conv and MLP.

Late stages keep the resolution once it is down to 2x2 or 3x3; where timm dilates their depthwise kernels for that, they are set back to
dilation 1, because a dilated kernel reaches past the border of so small a map with all but its middle.
"""

from __future__ import annotations

import optuna
from timm.models.convnext import ConvNeXt
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    patches: tuple[int, ...] = (2, 4),
    depths: tuple[int, int] = (1, 3),
    widths: tuple[int, int] = (16, 40),
    layer_scale: float | None = None,
) -> nn.Module:
    """ConvNeXt: stem patch, activation, response norm; depth, width and depthwise kernel per stage.

    ``widths`` is the range of the first stage; that of stage i is i + 1 times as wide. Patch 1 keeps the full resolution (16 times
    the cost of patch 4), patch 2 is followed by a first stage at stride 2. Layer scale is off: at the published 1e-6 blocks sit out a short
    training.
    """
    patch = trial.suggest_categorical("patch", patches)
    act = trial.suggest_categorical("act", ["gelu", "relu", "silu"])
    grn = trial.suggest_categorical("grn", [False, True])
    depth = [trial.suggest_int(f"depth{i}", *depths) for i in range(4)]
    dims = [trial.suggest_int(f"width{i}", widths[0] * (i + 1), widths[1] * (i + 1), step=4 * (i + 1)) for i in range(4)]
    kernels = [trial.suggest_categorical(f"kernel{i}", [3, 5, 7]) for i in range(4)]
    output_stride = max((s for s in (8, 16, 32) if image_size // s >= 2), default=0)
    if not output_stride:
        raise optuna.TrialPruned(f"ConvNeXt reduces by at least 8, which leaves less than 2 px of {image_size}")

    model = ConvNeXt(
        depths=tuple(depth), dims=tuple(dims), kernel_sizes=tuple(kernels),
        patch_size=patch, output_stride=output_stride,
        use_grn=grn, ls_init_value=layer_scale, act_layer=act,
        num_classes=num_classes, in_chans=in_chans,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.dilation, module.padding = (1, 1), (module.kernel_size[0] // 2, module.kernel_size[1] // 2)
    return model
