from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.candidates import count_cost
from capnas.narrowing import narrowed, plan_widths, survey
from capnas.narrowing.standardized import plain_convs
from capnas.saved import build_recipe, load_model, save_model

SPACE = """
import timm
from torch import nn

std, same = timm.layers.{0}, timm.layers.{1}

def space(trial, *, num_classes, in_chans, image_size):
    return nn.Sequential(
        std(in_chans, 16, 3, padding=1), nn.SiLU(), same(16, 24, 3, stride=2), nn.SiLU(), std(24, 24, 3, padding=1, groups=3),
        nn.SiLU(), std(24, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )
"""


def network(folder: Path, kinds: tuple[str, str]) -> tuple[nn.Module, dict[str, object]]:
    (folder / "standardized.py").write_text(SPACE.format(*kinds))
    recipe = {"space": f"{folder / 'standardized.py'}:space", "params": {}, "num_classes": 4, "in_chans": 3, "image_size": 9}
    model = build_recipe(recipe).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gain", "bias")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model, recipe


KINDS = [("StdConv2d", "StdConv2dSame"), ("ScaledStdConv2d", "ScaledStdConv2dSame")]


@pytest.mark.parametrize("kinds", KINDS)
def test_standardized_convolutions_are_narrowed_as_the_plain_ones_that_compute_the_same(kinds: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, recipe = network(tmp_path, kinds)
    x, state = torch.randn(64, 3, 9, 9), {n: t.clone() for n, t in model.state_dict().items()}
    found = survey(model, x)
    assert [g.name for g in found.groups] == ["0", "2", "6"]
    plan = plan_widths(found, widths={"0": 12, "2": 16, "6": 8})
    small = narrowed(model, found, plan)
    assert (small[0].out_channels, small[2].in_channels, small[4].groups, small[6].in_channels) == (12, 12, 2, 16)
    assert [type(m).__name__ for m in small if hasattr(m, "weight")] == ["Conv2d", "Conv2dSame", "Conv2d", "Conv2d", "Linear"]
    assert count_cost(small, (1, 3, 9, 9)).macs == plan.planned_macs
    assert sum(p.numel() for p in small.parameters()) == plan.planned_params
    assert sum(p.numel() for p in model.parameters()) == plan.params
    assert torch.equal(load_model(save_model(small, tmp_path / "m", recipe))(x), small(x))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [n for n, m in model.named_modules() if "Std" in type(m).__name__] == ["0", "2", "4", "6"]


@pytest.mark.parametrize("kinds", KINDS)
def test_readers_make_up_for_channels_that_are_there_twice(kinds: tuple[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = network(tmp_path, kinds)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[8:] = parameter[:8]  # half of the channels carry all
    x = torch.randn(64, 3, 9, 9)
    found = survey(model, x)
    small = narrowed(model, found, plan_widths(found, widths={"0": 8}))
    with torch.no_grad():
        got, expected = small(x), model(x)
    assert float((got - expected).norm() / (expected - expected.mean(0)).norm()) < 0.05


def test_a_layer_under_two_names_stays_one() -> None:
    layer = timm.layers.ScaledStdConv2d(4, 4, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    state = torch.get_rng_state()
    plain, x = plain_convs(model), torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    assert plain[0] is plain[2]
    assert plain_convs(layer) is layer
    assert torch.equal(plain(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_flags_and_dilations_are_kept_and_the_weights_are_copies() -> None:
    model = nn.Sequential(timm.layers.ScaledStdConv2d(3, 4, 3, dilation=2, padding=1), timm.layers.StdConv2d(4, 4, 1)).train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    plain, x = plain_convs(model), torch.randn(1, 3, 9, 9)
    assert torch.equal(plain(x), model(x))
    assert [layer.training for layer in plain] == [True, False]
    assert [layer.weight.requires_grad for layer in plain] == [False, True]
    with torch.no_grad():
        expected = plain(x)
        for parameter in model.parameters():
            parameter.add_(1)
        assert torch.equal(plain(x), expected)
