"""What a profile says of layers that compute their weight, of layers without a norm, and of a sweep that did not come about."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from capnas._timm import timm
from capnas.capacity import capacity_map
from capnas.profile import enrich, profile_model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Batched(nn.Module):
    """Runs another operation for a batch than for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x) if len(x) == 1 else torch.tanh(x))


class Blind(nn.Module):
    """Its only layer works on a constant, so that nothing is left for the input."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + self.code(torch.ones(1, 2))


def test_norms_of_standardised_layers_are_in_the_profile_and_no_norm_layer_is_said_to_be_left_out() -> None:
    torch.manual_seed(0)
    conv = timm.layers.StdConv2d(3, 4, 1)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    profile = profile_model(model, noise(8, 3, 5, 5), measures=("norms",))
    raw = conv.weight.detach().double().flatten(1)
    applied = (raw - raw.mean(1, keepdim=True)) / raw.var(1, correction=0, keepdim=True).add(conv.eps).sqrt()
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in (applied, model[4].weight.detach().double())]
    assert [row.norm for row in profile.layers] == pytest.approx(norms, rel=1e-5)
    assert profile.network["log10_lipschitz"] == pytest.approx(sum(map(math.log10, norms)), abs=1e-5)
    assert "log10_lipschitz" not in profile.flags


def test_a_layer_without_a_norm_is_named_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Adapted(4, 4), nn.Linear(4, 2))
    reason = "computes something else than a product with one weight"
    profile = profile_model(model, noise(8, 4), measures=("norms",))
    assert [row.norm is None for row in profile.layers] == [False, True, False]
    assert profile.flags["log10_lipschitz"] == f"layers left out, as each {reason}: 2"
    assert dict(profile.skipped) == {"2": f"norm: Adapted {reason}"}
    assert enrich(profile, model, noise(8, 4), measures=("capacity", "norms")).skipped == profile.skipped


def test_coverage_without_a_sweep_says_why() -> None:
    x = noise(16, 6)
    profile = profile_model(Batched(), x, measures=("capacity",))
    assert capacity_map(Batched(), x).pixels is None
    assert math.isnan(profile.network["coverage"])
    assert profile.flags["coverage"] == (
        "capacity cannot be swept down to the pixels: a batch runs other operations than the one sample that was traced"
    )
    assert "coverage" not in profile_model(Batched(), x, measures=("capacity",), pixels=False).flags
    blind = profile_model(Blind(), noise(16, 3), measures=("capacity",))
    assert math.isnan(blind.network["coverage"])
    assert blind.flags["coverage"] == "no capacity reaches the pixels"
