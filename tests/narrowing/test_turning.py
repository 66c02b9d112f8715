"""Streams of linear layers in other coordinates: the same network, and less lost when it is narrowed."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from capnas.narrowing import narrowed, plan_widths, survey
from capnas.narrowing.survey import Survey
from capnas.narrowing.turning import turn_streams
from capnas.recording import hooked
from capnas.saved import build_recipe

IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Bottlenecks(nn.Module):
    """A stream of six channels between layers: two writers and two readers, and what `between` does to it."""

    def __init__(self, between: nn.Module | None = None, *, norms: bool = True, bias: bool = False, transposed: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.Conv2d(8, 6, 1, bias=bias)
        if transposed:  # of the same outputs' shapes
            self.first, self.inner = nn.ConvTranspose2d(3, 6, 3, padding=1, bias=bias), nn.ConvTranspose2d(6, 8, 3, padding=1)
        self.first_norm, self.second_norm = (nn.BatchNorm2d(6) if norms else nn.Identity() for _ in range(2))
        self.inner, self.last, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 5, 1), nn.Linear(5 * 36, 4)
        self.between = between or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first_norm(self.first(x)))
        y = y + self.second_norm(self.second(self.inner(y).relu()))
        return self.head(self.last(y).relu().flatten(1))


def made(between: nn.Module | None = None, **options: bool) -> Bottlenecks:
    """In eval mode, its norms far from neutral."""
    torch.manual_seed(0)
    net = Bottlenecks(between, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    net.train()(2 * IMAGES + 1)
    return net.eval()


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norms": False, "bias": True}, {"norms": False}, {"transposed": True}], ids=str)
def test_a_turned_stream_computes_the_same_in_both_modes(options: dict[str, bool]) -> None:
    net = made(**options)
    net.first.weight.requires_grad_(False)
    found, state = survey(net, IMAGES), copy.deepcopy(net.state_dict())
    assert list(found.turns) == ["first"]
    turned = copy.deepcopy(net)
    readings, moments = turn_streams(turned, [found.coupling["first"]], found.turns, found.norms, found.readings, IMAGES)
    assert not torch.allclose(turned.first.weight, net.first.weight, atol=0.1)
    torch.testing.assert_close(turned(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-4)
    for name in ("first", "second"):  # what the readings say that writers put out
        outputs: dict[str, Tensor] = {}
        with hooked({name: lambda module, args, y, outputs=outputs: outputs.update(y=y)}, turned):
            turned(IMAGES)
        rows = outputs["y"].permute(0, 2, 3, 1).flatten(0, 2)[readings[name].index]
        torch.testing.assert_close(readings[name].outputs, rows, rtol=1e-4, atol=1e-4)
    assert [p.requires_grad for p in turned.parameters()] == [p.requires_grad for p in net.parameters()]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    if options.get("norms", True):  # a batch that has the moments of the images is seen as evaluation sees it
        assert {"first_norm", "second_norm"} <= moments.keys()
        torch.testing.assert_close(turned.train()(IMAGES), net(IMAGES), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("between", [nn.ReLU(), nn.SiLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.GroupNorm(1, 6)])
def test_streams_through_anything_else_keep_their_channels(between: nn.Module) -> None:
    found = survey(made(between), IMAGES)
    assert found.turns == {}
    assert found.removals == found.paths
    assert "first" in {g.name for g in found.groups}


@pytest.mark.parametrize("factor", [1e-9, 0.0])
def test_what_hardly_moves_the_outputs_is_not_taken_for_linear(factor: float) -> None:
    net = made(nn.ReLU())
    with torch.no_grad():
        net.head.weight *= factor  # they are the bias
    assert survey(net, IMAGES).turns == {}


def narrow_loss(net: nn.Module, found: Survey, width: int, **options: bool) -> tuple[float, float]:
    """Expected loss and mean square error of the outputs on other images."""
    plan, x = plan_widths(found, widths={"first": width}), torch.randn(200, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    small = narrowed(net, found, plan, **options)
    with torch.no_grad():
        return plan.groups[0].loss, float((small(x) - net(x)).square().mean())


def test_directions_are_cut_at_a_smaller_loss_than_channels() -> None:
    net = made()
    found = survey(net, IMAGES)
    own = dataclasses.replace(found, turns={})
    for width in (5, 4, 3):
        (expected, off), (expected_own, off_own) = (narrow_loss(net, f, width) for f in (found, own))
        assert expected < 0.8 * expected_own
        assert off < 0.8 * off_own


def test_a_stream_in_a_plane_is_cut_to_it_without_loss_or_refit() -> None:
    net = made()
    with torch.no_grad():
        basis = torch.randn(6, 2)
        for layer, norm in ((net.first, net.first_norm), (net.second, net.second_norm)):
            weights = basis @ torch.randn(2, layer.weight[0].numel())
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            layer.weight.copy_((weights / scale[:, None]).reshape(layer.weight.shape))
            norm.running_mean.zero_()
            norm.bias.zero_()
    found = survey(net, IMAGES)
    assert narrow_loss(net, found, 2, refit=False)[1] < 1e-8
    assert narrow_loss(net, dataclasses.replace(found, turns={}), 2, refit=False)[1] > 1e-4


def test_what_a_plan_leaves_or_widens_is_not_turned() -> None:
    net = made()
    found = survey(net, IMAGES)
    assert [plan_widths(found, widths={"first": width, "inner": 4}).groups[0].turned for width in (5, 6, 8)] == [True, False, False]
    small = narrowed(net, found, plan_widths(found, widths={"inner": 4}), refit=False)
    assert torch.equal(small.first.weight, net.first.weight)
    wide = narrowed(net, found, plan_widths(found, widths={"first": 8}), refit=False)
    twice = set(found.paths[0].order[-2:])
    counts = [sum(torch.allclose(row, own, atol=0.05) for row in wide.first.weight) for own in net.first.weight]
    assert counts == [2 if unit in twice else 1 for unit in range(6)]


def test_linear_bottlenecks_of_the_space_mbconv_are_turned() -> None:
    stages = {f"{name}{i}": value for i in range(3) for name, value in {
        "block": "ir", "depth": 1 + i % 2, "kernel": 3, "expansion": 3, "se": 0.25, "width": 8 << i}.items()}  # fmt: skip
    params = {"first_stride": 2, "stem_width": 16, "act": "silu", "head": 64, **stages}
    model = build_recipe({"space": "mbconv", "params": params, "num_classes": 4, "in_chans": 3, "image_size": 16}).eval()
    found = survey(model, torch.randn(32, 3, 16, 16))
    assert list(found.turns) == ["blocks.0.0.conv_pwl", "blocks.1.0.conv_pwl", "blocks.2.0.conv_pwl"]
