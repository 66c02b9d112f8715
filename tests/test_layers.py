"""Which modules are blocks, where networks nest, branch or repeat them in unusual ways, and along which axis their outputs are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from capnas._timm import timm
from capnas.layers import feature_axis, find_blocks
from capnas.recording import Recorder


def unit(width: int = 4) -> nn.Module:
    """One conv-activation step."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())


class Pair(nn.Module):
    """Two steps in a branch each, concatenated."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(unit(width), unit(width)), nn.Sequential(unit(width), unit(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("cpubone_nano", {"ResidualBlock": 4, "CPUBoneBlock": 3}), ("rdnet_tiny", {"DenseBlock": 21}), ("crossvit_tiny_240", {"Block": 15}),
        ("hrnet_w18_small", {"Bottleneck": 5, "HighResolutionModule": 3}),
        ("inception_resnet_v2", {"Block35": 10, "Block17": 20, "Block8": 9}),
        ("inception_v3", {"InceptionA": 3, "InceptionB": 1, "InceptionC": 4, "InceptionD": 1, "InceptionE": 2}),
        ("davit_tiny", {"Sequential": 6}), ("convmixer_768_32", {"Sequential": 32}),  # units that are lists themselves
    ],
)  # fmt: skip
def test_blocks_of_nested_branched_and_unlisted_units(name: str, kinds: dict[str, int]) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this version of timm has no {name}")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=4)
    modules = dict(model.named_modules())
    assert Counter(type(modules[n]).__name__ for n in find_blocks(model)) == kinds


class Named(nn.Module):
    """Named parts, called by nobody."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.mark.parametrize(
    ("name", "kinds", "count"),
    [("efficientnet_b0", {"MBConv"}, 16), ("mobilenet_v2", {"InvertedResidual"}, 17), ("convnext_tiny", {"CNBlock"}, 18),
     ("swin_t", {"SwinTransformerBlock"}, 12), ("densenet121", {"_DenseLayer"}, 58), ("googlenet", {"Inception"}, 9),
     ("squeezenet1_0", {"Fire"}, 8), ("resnet18", {"BasicBlock"}, 8)],
)  # fmt: skip
def test_blocks_of_models_that_declare_none(name: str, kinds: set[str], count: int) -> None:
    from torchvision import models

    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    found = list(find_blocks(model))
    assert [type(model.get_submodule(n)).__name__ in kinds for n in found] == [True] * count


def test_blocks_that_are_attributes() -> None:
    pairs = {f"pair{i}": Deep() for i in range(3)}
    maps = {f"map{i}": Named(a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3)) for i in range(2)}
    assert list(find_blocks(Named(stem=linear(), **pairs, head=nn.Linear(4, 2)))) == list(pairs)
    assert list(find_blocks(Named(stem=linear(), one=Deep(), inner=Named(**pairs)))) == [f"inner.{name}" for name in pairs]
    assert list(find_blocks(Named(**maps, auxiliary1=Deep(), auxiliary2=Deep()))) == list(maps)
    assert list(find_blocks(Named(stages=nn.ModuleList([Deep()]), **pairs))) == ["stages.0"]  # a list says what is repeated


def test_a_single_layer_before_or_behind_the_units_is_none() -> None:
    def units(**children: nn.Module) -> list[str]:
        return list(find_blocks(Named(**children)))

    assert units(features=nn.Sequential(linear(), Deep(), linear(), Deep(), linear())) == ["features.1", "features.2", "features.3"]
    assert units(features=nn.Sequential(linear(), nn.Sequential(Deep(), Deep()), linear(), nn.Sequential(Deep()), Deep())) == [
        "features.1.0", "features.1.1", "features.3.0", "features.4"
    ]  # fmt: skip
    assert units(features=nn.Sequential(linear(), linear())) == ["features.0", "features.1"]
    assert units(blocks=nn.Sequential(linear(), Deep(), linear())) == ["blocks.0", "blocks.1", "blocks.2"]  # all of them, by its name
    assert units(dense=nn.ModuleDict({"one": Deep(), "two": Deep()})) == ["dense.one", "dense.two"]


def test_members_of_one_kind_are_blocks_where_nothing_is_listed() -> None:
    class Large(Named):
        pass

    def large() -> nn.Module:
        return Large(first=nn.Conv2d(4, 4, 3), second=nn.Conv2d(4, 4, 3))

    body = Named(a=large(), b=large(), step=nn.Conv2d(4, 4, 3))
    assert list(find_blocks(Named(stem=nn.Conv2d(3, 4, 3), body=body, head=nn.Linear(4, 2)))) == ["body.a", "body.b"]
    # no kind twice: the layers themselves
    assert list(find_blocks(Named(stem=nn.Conv2d(3, 4, 3), a=large()))) == ["stem", "a.first", "a.second"]


def test_single_layers_are_blocks_where_their_list_holds_others_or_nothing_is_larger() -> None:
    assert list(find_blocks(Named(stem=nn.Sequential(unit(), unit()), body=nn.Sequential(Pair(), Pair())))) == ["body.0", "body.1"]
    assert list(find_blocks(nn.Sequential(unit(), unit()))) == ["0", "1"]


@pytest.mark.parametrize(
    ("shape", "widths", "channels_last", "axis"),
    [
        ((2, 112, 16, 16), {16, 96}, False, 1),  # concatenated, as many positions as a layer has channels
        ((2, 112, 16, 16), {16, 96}, True, -1), ((2, 16, 16, 112), {96}, False, -1), ((2, 16, 16, 64), {16, 64}, False, -1),
        ((2, 64, 16, 16), {16, 64}, False, 1), ((2, 5, 16, 16), {5, 16}, False, 1), ((2, 16, 16, 16), {16}, False, 1),
        ((2, 16, 16, 16), {16}, True, -1), ((2, 5, 7, 16), {16}, False, -1), ((2, 16, 5, 7), {16}, False, 1),
    ],
)  # fmt: skip
def test_square_images_tell_channels_from_positions(shape: tuple[int, ...], widths: set[int], channels_last: bool, axis: int) -> None:
    assert feature_axis(torch.zeros(shape), frozenset(widths), channels_last) == axis


def test_concatenated_outputs_are_read_along_their_channels() -> None:
    model = nn.Sequential(Pair(8), nn.Conv2d(16, 8, 1), Pair(8))
    with Recorder(model, reading="blocks", blocks="0|2") as recorder:
        model(torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [(r.width, r.positions) for r in recorder.pop("train").values()] == [(16, 64), (16, 64)]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_layer_whose_weight_is_computed_is_no_block(norm: Callable[[nn.Module], nn.Module]) -> None:
    def net(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return nn.Sequential(wrap(nn.Conv2d(1, 4, 3)), nn.ReLU(), wrap(nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(16, 2)))

    assert list(find_blocks(net(norm))) == list(find_blocks(net(lambda layer: layer)))
