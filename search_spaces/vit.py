"""Vision transformers on timm's ``VisionTransformer`` (Dosovitskiy et al. 2021): patches, heads times head width, depth, MLP ratio."""

from __future__ import annotations

import optuna
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    depths: tuple[int, int] = (2, 6),
    heads: tuple[int, int] = (2, 4),
    head_dims: tuple[int, int] = (8, 24),
    grids: tuple[int, ...] = (4, 7),
) -> nn.Module:
    """ViT: patches a side, depth, number and width of heads, MLP ratio, pooling, query-key norm, activation.

    The patch size is the largest divisor of the image size that gives at least ``grid`` patches a side; the width is heads x head width.
    """
    grid = trial.suggest_categorical("grid", grids)
    depth = trial.suggest_int("depth", *depths)
    num_heads = trial.suggest_int("heads", *heads)
    head_dim = trial.suggest_int("head_dim", *head_dims, step=8)
    mlp_ratio = trial.suggest_categorical("mlp_ratio", [1.0, 2.0, 3.0, 4.0])
    pool = trial.suggest_categorical("pool", ["token", "avg"])
    qk_norm = trial.suggest_categorical("qk_norm", [False, True])
    act = trial.suggest_categorical("act", ["gelu", "relu", "silu"])
    patch_size = max((p for p in range(1, image_size // grid + 1) if image_size % p == 0), default=0)
    if not patch_size or image_size // patch_size > 2 * grid:
        raise optuna.TrialPruned(f"no patch size divides {image_size} px into {grid} to {2 * grid} patches a side")

    return VisionTransformer(
        img_size=image_size, patch_size=patch_size,
        embed_dim=num_heads * head_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
        global_pool=pool, class_token=pool == "token", qk_norm=qk_norm, act_layer=act,
        num_classes=num_classes, in_chans=in_chans,
    )  # fmt: skip
