"""Layers that compute their weight, and what a profile says of layers without capacity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from capnas._timm import timm
from capnas.capacity import capacity_map
from capnas.profile import Profile, profile_model
from capnas.profile.enriching import enrich

Wrap = Callable[[nn.Module], nn.Module]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def network(first: Wrap = lambda layer: layer, second: Wrap = lambda layer: layer) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        first(nn.Conv2d(3, 6, 3, padding=1)), nn.ReLU(), second(nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)), nn.GELU(),
        nn.Flatten(), second(nn.Linear(384, 5)), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("first", "second"), [(spectral_norm, weight_norm), (weight_norm, spectral_norm)])
def test_a_computed_weight_is_read_as_it_is_applied(first: Wrap, second: Wrap, mode: str) -> None:
    model, plain, x = network(first, second).eval(), network(), noise(12, 3, 8, 8)
    with torch.no_grad():
        for a, b in zip(model, plain):
            if hasattr(b, "weight"):
                b.weight.copy_(a.weight)
                if b.bias is not None:
                    b.bias.copy_(a.bias)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found, expected = (capacity_map(m, x, mode=mode) for m in (model, plain))
    assert found.skipped == expected.skipped == {}
    assert list(found.capacity) == ["0", "2", "5", "7"]
    assert dict(found.capacity) == pytest.approx(dict(expected.capacity))
    assert dict(found.n_params) == dict(expected.n_params)
    torch.testing.assert_close(found.pixels, expected.pixels)
    assert found.bias == pytest.approx(expected.bias)
    assert dict(found.behind) == dict(expected.behind)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_standardised_convolutions_are_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU(), timm.layers.ScaledStdConv2d(8, 8, 3, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 2),
    )  # fmt: skip
    for mode in ("train", "eval"):
        found = capacity_map(model, noise(12, 3, 8, 8), mode=mode)
        assert list(found.capacity) == ["0", "3", "6"]
        assert list(found.skipped) == ["1"]
        assert found.approximated == {}
        assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)
        assert float(found.pixels.sum()) > 0.2 * found.total


def test_a_layer_can_be_the_whole_model() -> None:
    for layer in (nn.Linear(5, 3), weight_norm(nn.Linear(5, 3))):
        found = capacity_map(layer, noise(9, 5))
        assert list(found.capacity) == [""]
        assert found.skipped == {}
        assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)


def test_a_matrix_that_no_layer_owns_is_no_layer() -> None:
    class Idle(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Reuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.idle = nn.Linear(4, 4), Idle(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.idle(self.first(x)), torch.eye(4) + 0)

    model = Reuses()
    found, alone = capacity_map(model, noise(20, 4)), capacity_map(nn.Sequential(model.first), noise(20, 4))
    assert found.n_params == {"first": 20}
    assert list(found.skipped) == ["idle"]
    assert found.capacity["first"] == pytest.approx(alone.capacity["0"], rel=1e-4)


class Places(nn.Module):
    """Its position code comes from a constant through a layer, which the input never meets; a tied and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.code, self.tied = nn.Linear(6, 6), nn.Linear(2, 6), nn.Linear(6, 6)
        self.tied.weight = self.stem.weight
        self.norm, self.head, self.spare = nn.LayerNorm(6), nn.Linear(6, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.tied(torch.relu(self.stem(x) + self.code(torch.ones(1, 2, device=x.device))))))


def test_layers_without_capacity_are_named_in_the_profile() -> None:
    torch.manual_seed(0)
    model, x = Places(), noise(12, 6)
    before = profile_model(model, x, mode="eval", measures=("saturation",))
    after = profile_model(model, x, mode="eval", measures=("capacity",))
    assert [r.name for r in after.layers if r.capacity is None] == ["code", "tied"]
    assert {r.capacity_method for r in after.layers} == {None, "k-fac"}
    added = {name: reason for name, reason in after.skipped.items() if name not in before.skipped}
    assert added == {
        "code": "capacity: Linear is not on the way from the input to the output, or runs inside a fused function",
        "tied": "capacity: Linear shares stem.weight",
    }
    assert {name: after.skipped[name] for name in before.skipped} == before.skipped
    assert before.skipped["spare"] == "Linear was never called in the forward pass"
    stale = replace(after, skipped={**after.skipped, "stem": "capacity: of another state"})
    assert enrich(stale, model, x, measures=("capacity",)).skipped == after.skipped


def test_coherent_share_shattering_and_residual_sum_are_numbers_of_the_network() -> None:
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.head(x + F.relu(self.branch(x)))

    model, x = Residual(), noise(40, 2, 2, 2)
    profile, found = profile_model(model, x, mode="eval", measures=("capacity",)), capacity_map(model, x, mode="eval")
    network = profile.network
    expected = {"coherent": found.coherent, "shattering": -math.log(found.coherent), "residual_sum": sum(found.residual.values())}
    assert {name: network[name] for name in expected} == pytest.approx(expected)
    assert network["residual_sum"] > 0
    assert found.near_linear
    assert "coverage" in profile.flags
    assert f"{found.coherent:.2f}" in profile.flags["coverage"]
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict(), allow_nan=False))) == profile
    assert "coverage" not in profile_model(model, x, mode="eval", measures=("capacity",), pixels=False).flags
    deep = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())), nn.Linear(8, 2))
    shattered = profile_model(deep, noise(40, 8), mode="train", measures=("capacity",))
    assert shattered.network["coherent"] < 0.5
    assert shattered.network["residual_sum"] == 0
    assert "coverage" not in shattered.flags


class Twice(nn.Module):
    """Two residual additions, each with one convolution on its branch."""

    def __init__(self, conv: Callable[..., nn.Module], wrap: Wrap = lambda layer: layer) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(256, 2)
        self.branches = nn.ModuleList(wrap(conv(4, 4, 3, padding=1, bias=False)) for _ in range(2))
        self.sums = nn.ModuleList(Sum() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch, add in zip(self.branches, self.sums):
            x = add(x, F.relu(branch(x)))
        return self.head(x.flatten(1))


class Sum(nn.Module):
    def forward(self, stream: Tensor, branch: Tensor) -> Tensor:
        return stream + branch


@pytest.mark.parametrize(
    ("conv", "wrap"), [(timm.layers.StdConv2d, lambda layer: layer), (nn.Conv2d, weight_norm)], ids=["standardised", "weight norm"]
)
def test_a_branch_of_computed_weights_is_a_branch(conv: Callable[..., nn.Module], wrap: Wrap) -> None:
    torch.manual_seed(0)
    model, x = Twice(conv, wrap).eval(), noise(10, 3, 8, 8)
    expected, stream = {}, model.stem(x)
    for i, branch in enumerate(model.branches):  # r = E b^2 / (E b^2 + E s^2) by hand
        added = F.relu(branch(stream))
        b, s = (float(part.detach().double().square().mean()) for part in (added, stream))
        expected[f"sums.{i}"], stream = b / (b + s), stream + added
    assert dict(capacity_map(model, x, mode="eval", pixels=False).residual) == pytest.approx(expected, rel=1e-4)
