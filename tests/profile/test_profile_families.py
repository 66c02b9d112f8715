"""Every measure on the families of timm that a profile promises, narrow where their constructors take it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.profile import MEASURES, Profile, profile_model

THIN, FEW = (8, 16, 24, 32), (1, 1, 2, 1)
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": (8, 8, 16, 16)}, "resnet50": {"channels": (8, 8, 16, 16), "layers": (1, 1, 1, 1)},
    "densenet121": {"growth_rate": 8, "block_config": (4, 4, 4, 4)}, "regnety_002": {}, "efficientnet_b0": {}, "mobilenetv3_small_100": {},
    "mobilenetv4_conv_small": {}, "repvgg_a0": {}, "ghostnet_100": {}, "hgnet_tiny": {}, "gernet_s": {}, "poolformer_s12": {},
    "convnext_atto": {"dims": THIN, "depths": FEW}, "convnextv2_atto": {"dims": THIN, "depths": FEW},
    "starnet_s1": {"base_dim": 8, "depths": FEW}, "edgenext_xx_small": {"dims": THIN, "depths": (2, 2, 2, 2)},
    "fastvit_t8": {"embed_dims": (24, 48, 96, 192), "layers": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 48, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 24, "depths": FEW}, "mixer_s32_224": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)},
    "efficientformerv2_s0": {"img_size": 64, "embed_dims": THIN, "depths": (1, 1, 1, 2)},
    "mobileone_s0": {}, "vgg11_bn": {},
}  # fmt: skip
SLOW = ("mobileone_s0", "vgg11_bn")
WIDE_IMAGES = ("fastvit", "edgenext", "starnet")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in FAMILIES])
def test_every_measure_of_every_family(name: str) -> None:
    torch.manual_seed(0)
    options = FAMILIES[name]
    model = timm.create_model(name, num_classes=4, **options)
    size = 64 if "img_size" in options or name.startswith(WIDE_IMAGES) else 32
    images, classes = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    profile = profile_model(model, images, classes, measures=MEASURES, mode="train")
    assert profile.measures == MEASURES
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers <= {row.name for row in profile.layers} | set(profile.skipped)
    for row in profile.layers:
        columns = (row.saturation, row.macs, row.complexity, row.norm, row.capacity, row.utilisation)
        assert None not in columns or row.name in profile.skipped, row.name
        assert 0 <= (row.saturation or 0) <= 1
        assert (row.norm is None) or 0 <= row.norm < math.inf
        assert 0 <= (row.utilisation or 0) <= 1
    missing = {n for n, value in profile.network.items() if not math.isfinite(value) and n not in profile.flags}
    assert not missing
    assert profile.blocks
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))).to_dict() == profile.to_dict()
