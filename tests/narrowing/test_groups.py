"""Coupled groups by themselves: where their units lie, what is fixed and why, and that the network stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from capnas._timm import timm
from capnas.narrowing.applying import change_widths, narrowable
from capnas.narrowing.groups import (
    CLASSES,
    CoupledGroup,
    _group,
    _merged,
    cannot_narrow,
    find_groups,
    layers_of,
    run_order,
    shared_parameters,
)

IMAGES = torch.zeros(2, 3, 4, 4)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))


def reasons(*layers: nn.Module) -> dict[str, str]:
    """What is fixed in a chain of layers behind a conv of 8 channels, but for the classifier."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    return {name: why for name, why in narrowable(model, IMAGES).fixed.items() if why != CLASSES}


def test_units_are_in_the_order_of_the_first_layer_and_positions_ascend() -> None:
    found = find_groups(plain(), IMAGES)
    (group,) = found.groups
    assert [p.positions.tolist() for p in group.ports] == [
        [[i] for i in range(6)],
        [[i] for i in range(6)],
        torch.arange(96).view(6, 16).tolist(),
    ]
    assert dict(found.fixed) == {"4": CLASSES}


def test_a_layer_that_is_not_called_stays_frozen() -> None:
    model = plain()
    model[0].spare = nn.Linear(2, 2).requires_grad_(False)
    assert find_groups(model, IMAGES).fixed["0.spare"] == "the network does not call it"
    assert not model[0].spare.weight.requires_grad


@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_is_left_as_it_was(frozen: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), *plain()).requires_grad_(not frozen)
    model[2].eval()  # a norm that is kept while the rest is trained
    before, state = [m.training for m in model.modules()], {n: t.clone() for n, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert [g.name for g in find_groups(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))).groups] == ["1"]
    assert [m.training for m in model.modules()] == before
    assert all(p.requires_grad is not frozen for p in model.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


class Noisy(nn.Module):
    """Draws numbers whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.rand_like(x))


def test_numbers_that_a_network_draws_are_given_back() -> None:
    model, drawn = Noisy(), torch.get_rng_state()
    find_groups(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), drawn)


class Twice(nn.Module):
    """Calls its first layer again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.second(self.first(x)))


def test_a_layer_comes_where_it_is_called_first() -> None:
    assert list(run_order(Twice(), torch.zeros(1, 4))) == ["", "first", "second"]
    assert run_order(Twice(), torch.zeros(1, 4)) == {"": 0, "first": 1, "second": 2}


class Reader(nn.Module):
    """Its only reader is defined before it."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.one, self.head = nn.Conv2d(1, 6, 1), nn.Conv2d(3, 1, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reader(self.one(x).relu()).relu().mean((2, 3)))


def test_a_single_channel_stays_and_its_reader_is_narrowed() -> None:
    found = find_groups(Reader(), IMAGES)
    assert [g.name for g in found.groups] == ["reader"]
    assert dict(found.fixed) == {"one": "its channels can only be removed all together", "head": CLASSES}


class Gained(nn.Conv2d):
    """A conv with a further parameter."""

    def __init__(self) -> None:
        super().__init__(8, 8, 1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1))


class Added(nn.Module):
    """A depthwise conv and one that mixes channels, added to what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.deep(x))


class Attending(nn.Module):
    """torch's attention over the places of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attn(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


def test_layers_without_a_rule_are_fixed() -> None:
    assert reasons(Gained())["1"] == "1 is a Gained, whose further parameters have no rule"
    without = reasons(Attending(), Added())
    assert without.pop("1.attn.out_proj") == "the network reads its weights and does not call it"
    assert without == dict.fromkeys(("0", "2.deep", "2.mix"), "1.attn is a MultiheadAttention, which has no rule")


def test_depthwise_layers_are_of_the_group_and_those_that_multiply_channels_write_their_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1, groups=8), nn.Flatten(), nn.Linear(64, 2))
    found = find_groups(model, IMAGES)
    (group,) = found.groups
    sides = {(p.module, p.side): p.positions.shape[1] for p in group.ports}
    assert sides == {("0", "out"): 1, ("1", "both"): 1, ("2", "in"): 1, ("2", "out"): 2, ("4", "in"): 8}
    assert layers_of(group, dict(model.named_modules())) == ["0", "1", "2"]


def test_group_norms_lose_whole_groups_and_the_others_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)).eval()
    images = torch.randn(2, 3, 4, 4)
    (group,) = narrowable(model, images).groups
    assert (group.units, group.unit_channels) == (4, 3)
    without = copy.deepcopy(model)
    without[4].weight.data.unflatten(1, (4, 48))[:, [0, 2]] = 0
    change_widths(model, [group], {"0": [1, 3]})
    assert (model[1].num_groups, model[1].num_channels) == (2, 6)
    torch.testing.assert_close(model(images), without(images))


@pytest.mark.parametrize("kind", [nn.PReLU, partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)])
def test_numbers_by_channel_go_with_their_channels(kind: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8), nn.Flatten(), nn.Linear(128, 2)).eval()
    for _, numbers in (*model[1].named_parameters(), *model[1].named_buffers()):
        numbers.data.copy_(torch.arange(1, 9) / 8 if numbers.shape else numbers)
    images = torch.randn(2, 3, 4, 4)
    (group,) = narrowable(model, images).groups
    without = copy.deepcopy(model)
    without[3].weight.data.unflatten(1, (8, 16))[:, [0, 2, 5]] = 0
    change_widths(model, [group], {"0": [1, 3, 4, 6, 7]})
    torch.testing.assert_close(model(images), without(images))
    assert repr(model[1]) == repr(kind(5)), "it says its width"


@pytest.mark.parametrize(("groups", "units"), [(1, 8), (2, 2), (8, 8)])
def test_transposed_convolutions_lose_channels_and_whole_groups(groups: int, units: int) -> None:
    up = nn.ConvTranspose2d(8, 8 if groups == 8 else 4, 2, stride=2, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), up, nn.ReLU(), nn.Flatten(), nn.Linear(up.out_channels * 64, 2)).eval()
    images = torch.randn(2, 3, 4, 4)
    first = narrowable(model, images)["0"]
    assert first.units == units
    without, kept = copy.deepcopy(model), [[0, *range(2, 8)], [1], [0, *range(2, 8)]][(1, 2, 8).index(groups)]
    gone = sorted(set(range(units)) - set(kept))
    change_widths(model, [first], {"0": kept})
    if groups == 1:
        without[1].weight.data[gone] = 0  # it reads them
    else:
        without[4].weight.data.unflatten(1, (units, -1))[:, gone] = 0
    torch.testing.assert_close(model(images), without(images))
    assert model[0].out_channels == model[1].in_channels == len(kept) * 8 // units


class Sloped(nn.Module):
    """Two layers of different widths before one activation of a single slope."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head, self.act = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(96, 2), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))).flatten(1))


def test_a_slope_of_all_channels_couples_nothing() -> None:
    found = narrowable(Sloped().eval(), torch.randn(2, 3, 4, 4))
    assert [[(p.module, p.side) for p in g.ports] for g in found.groups] == [
        [("first", "out"), ("second", "in")],
        [("second", "out"), ("head", "in")],
    ]


def test_lists_of_units_that_overlap_become_one_group() -> None:
    first = [[("a", "out", 0)], [("a", "out", 1), ("b", "in", 0)]]
    second = [[("b", "in", 0)], [("b", "in", 1), ("c", "out", 0)]]
    (units,) = _merged([first, second], {})  # type: ignore[list-item]
    assert sorted(map(sorted, units)) == [[("a", "out", 0)], [("a", "out", 1), ("b", "in", 0)], [("b", "in", 1), ("c", "out", 0)]]


def test_units_come_in_the_order_of_their_first_writer() -> None:
    units = [[("b", "in", 3), ("a", "out", 1), ("b", "in", 2)], [("b", "in", 1), ("a", "out", 0), ("b", "in", 0)]]
    found = _group(units, {"a": 0, "b": 1})  # type: ignore[arg-type]
    assert isinstance(found, CoupledGroup)
    assert [(p.module, p.positions.tolist()) for p in found.ports] == [("a", [[0], [1]]), ("b", [[0, 1], [2, 3]])]


class Attentions(nn.Module):
    """Two attentions on one stream."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 12, 1), *(timm.layers.Attention(12, num_heads=3) for _ in range(2))
        self.last, self.head = nn.Linear(12, 8), nn.Linear(8, 2)
        if tied:
            self.b.proj.weight = self.a.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.a(x)
        return self.head(self.last(x + self.b(x)).mean(1))


def test_heads_of_attentions_that_share_a_parameter_stay() -> None:
    alone, tied = (find_groups(Attentions(tied=tied), IMAGES) for tied in (False, True))
    assert [g.name for g in alone.groups] == ["a.qkv", "b.qkv", "last"]
    assert not {"a.qkv", "b.qkv"} & alone.fixed.keys()
    assert [g.name for g in tied.groups] == ["last"]
    assert {tied.fixed["a.proj"], tied.fixed["b.proj"]} == {"a.proj.weight and b.proj.weight are one parameter"}


def test_a_parameter_of_two_names_in_one_module_is_shared() -> None:
    layer = nn.Linear(2, 2)
    layer.other = layer.weight
    assert shared_parameters(layer)["weight"] == "weight and other are one parameter"
    assert shared_parameters(nn.Linear(2, 2)) == {}


def test_three_reasons_are_told_at_most() -> None:
    error = cannot_narrow(nn.Identity(), {"a": "d", "b": "c", "c": "b", "d": "a", "head": CLASSES})
    assert str(error) == "cannot narrow this Identity: a; b; c."


def test_whole_numbers_among_the_parameters_are_no_obstacle() -> None:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)
            self.order = nn.Parameter(torch.arange(4), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x))[:, :, self.order].mean((2, 3)))

    net = Ordered().eval()
    assert "first" in {group.name for group in narrowable(net, torch.randn(2, 3, 8, 8)).groups}
    assert not net.order.requires_grad
