"""Every family that can be narrowed, at small sizes: groups, costs, correction, export, save and load; and what cannot, with its reason."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from capnas._timm import timm
from capnas.candidates import count_cost
from capnas.errors import UsageError
from capnas.layers import MEASURED
from capnas.narrowing import narrowed, plan_widths, survey
from capnas.narrowing.applying import change_widths, narrowable
from capnas.narrowing.attention import has_plain_heads
from capnas.narrowing.costs import NetworkCost
from capnas.narrowing.groups import Coupling, layers_of
from capnas.narrowing.refusing import CannotNarrow
from capnas.saved import build_recipe, load_model, save_model
from capnas.spaces import load_space

WHOLE_HEADS = hasattr(timm.layers.Attention(4, num_heads=2), "attn_dim")  # before, timm tied the heads to the width of the stream
SIZES: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [8, 16, 24, 32]},
    "resnet50": {"channels": [8, 8, 16, 16], "layers": [1, 1, 2, 1]},
    "mobilenetv3_small_100": {},
    "regnety_002": {"depth": 6, "w0": 16, "wa": 30.0},
    "convnext_atto": {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 40]},
    "densenet121": {"growth_rate": 8, "block_config": [2, 2, 3, 2]},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
}


def recipe(name: str) -> dict[str, Any]:
    return {"timm": name, "args": {"num_classes": 5, "in_chans": 3, **SIZES.get(name, {})}, "image_size": 32}


def halve(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, float]:
    """Every group at half of its units, and the MACs that were expected of it."""
    found = narrowable(model, x)
    cost = NetworkCost.of(model, found.groups, (1, *x.shape[1:]))
    small = copy.deepcopy(model).eval()
    keep = {g.name: list(range(0, g.units, 2)) for g in found.groups}
    change_widths(small, found.groups, keep)
    units = torch.tensor([[float(len(keep[g.name])) for g in found.groups]], dtype=torch.float64)
    assert float(cost.total_macs(cost.units[None])) == pytest.approx(count_cost(model, (1, *x.shape[1:])).macs)
    return small, float(cost.total_macs(units))


SLOW = ("mobilenetv3_small_100", "regnety_002", "densenet121")  # their blocks are in the tests of the spaces and of single rules as well


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SIZES])
def test_timm_families(name: str, tmp_path: Path) -> None:
    model, x = build_recipe(recipe(name)).eval(), torch.randn(2, 3, 32, 32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small, macs = halve(model, x)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert count_cost(small, (1, 3, 32, 32)).macs == pytest.approx(macs)
    assert macs < (0.7 if WHOLE_HEADS else 0.75) * count_cost(model, (1, 3, 32, 32)).macs
    again = load_model(save_model(small, tmp_path / "m", recipe(name)))
    assert torch.equal(again(x), small(x))
    assert getattr(again, "head_hidden_size", again.num_features) == again.get_classifier().in_features


@pytest.mark.slow
def test_vgg11_bn() -> None:
    model, x = build_recipe(recipe("vgg11_bn")).eval(), torch.randn(2, 3, 32, 32)
    small, macs = halve(model, x)
    assert count_cost(small, (1, 3, 32, 32)).macs == pytest.approx(macs)


@pytest.mark.slow
def test_efficientnet_b0_surveyed_planned_and_narrowed() -> None:
    model, x = build_recipe(recipe("efficientnet_b0")).eval(), torch.randn(16, 3, 32, 32)
    found = survey(model, x)
    plan = plan_widths(found, target_macs=0.5)
    small = narrowed(model, found, plan)
    assert count_cost(small, (1, 3, 32, 32)).macs == plan.planned_macs <= 0.5 * plan.macs
    assert bool(torch.isfinite(small(x)).all())


@pytest.mark.parametrize("name", ["resnet", "vgg", "mbconv", "convnext", "regnet", "byobnet", "nasbench201"])
def test_architectures_of_our_spaces(name: str, tmp_path: Path) -> None:
    space, made = load_space(name), 0
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    while made < 1:
        trial = study.ask()
        try:
            model = space(trial, num_classes=5, in_chans=1, image_size=28).eval()
        except optuna.TrialPruned:
            continue
        made += 1
        x = torch.randn(2, 1, 28, 28)
        small, macs = halve(model, x)
        assert count_cost(small, (1, 1, 28, 28)).macs == pytest.approx(macs)
        shape = {"num_classes": 5, "in_chans": 1, "image_size": 28}
        saved = save_model(small, tmp_path / f"{made}", {"space": name, "params": dict(trial.params), **shape})
        assert torch.equal(load_model(saved)(x), small(x))


def test_grouped_convs_lose_whole_groups_and_attentions_whole_heads() -> None:
    grouped = narrowable(build_recipe(recipe("regnety_002")).eval(), torch.randn(2, 3, 32, 32))
    inner = next(g for g in grouped.groups if any(p.module == "s1.b1.conv2.conv" for p in g.ports))
    assert inner.unit_channels == 8
    assert {p.side for p in inner.ports if p.module == "s1.b1.conv2.conv"} == {"in", "out"}
    model = build_recipe(recipe("vit_tiny_patch16_224")).eval()
    tokens = narrowable(model, torch.randn(2, 3, 32, 32))
    if not WHOLE_HEADS:
        assert "it does not run" in tokens.fixed["blocks.0.attn.qkv"]
        pytest.skip("attentions of this version of timm have heads as wide as the stream alone")
    heads = tokens["blocks.0.attn.qkv"]
    assert (heads.units, heads.channels) == (3, 144)
    change_widths(model, tokens.groups, {"blocks.0.attn.qkv": [0, 2]})
    assert (model.blocks[0].attn.num_heads, model.blocks[0].attn.attn_dim) == (2, 32)
    assert any("token stream" in reason for reason in tokens.fixed.values())


def unlisted(model: nn.Module, coupling: Coupling) -> set[str]:
    """Layers that a plan would not name: in no group and without a reason."""
    modules = dict(model.named_modules())
    held = {name for g in coupling.groups for name in layers_of(g, modules)}
    return {n for n, m in modules.items() if isinstance(m, MEASURED)} - held - coupling.fixed.keys()


def test_heads_are_taken_out_of_plain_attentions_only() -> None:
    attention = timm.layers.Attention(16, num_heads=2)
    assert has_plain_heads(attention)
    assert not has_plain_heads(timm.layers.Attention(16, num_heads=1))
    attention.qkv = nn.Linear(16, 3 * 16 + 4)  # something more than q, k and v
    assert not has_plain_heads(attention)
    attention = timm.layers.Attention(16, num_heads=2)
    attention.gate = nn.Linear(16, 16)
    assert not has_plain_heads(attention)


def test_a_grouped_convolution_costs_by_its_outputs_alone() -> None:
    convs = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    small, expected = halve(net, torch.randn(1, 3, 8, 8))
    assert small[2].groups == 2
    assert count_cost(small, (1, 3, 8, 8)).macs == expected


def test_costs_of_layers_that_no_group_reaches() -> None:
    nothing, macs = torch.zeros(4, 1, dtype=torch.float64), torch.tensor([1.0, 5.0, 0.0, 9.0], dtype=torch.float64)
    outputs = nothing.clone()
    outputs[3] = 0.5
    cost = NetworkCost(names=("small", "large", "free", "narrowed"), macs=macs, params=macs, biases=macs, steady=macs, added=macs,
                       inputs=nothing, outputs=outputs, units=torch.ones(1, dtype=torch.float64))  # fmt: skip
    assert list(cost.fixed_macs().items()) == [("large", 5.0), ("small", 1.0)]


@pytest.mark.parametrize("name", ["skresnet18", "ghostnet_050", "vit_tiny_patch16_224"])
def test_every_layer_is_in_a_group_or_fixed_with_a_reason(name: str) -> None:
    model = build_recipe(recipe(name)).eval()
    found = narrowable(model, torch.randn(2, 3, 32, 32))
    assert unlisted(model, found) == set()
    if name == "skresnet18":
        why = "layer1.0.conv1.paths.0.conv holds only some of the channels that are coupled to it, as behind a split"
        assert found.fixed["conv1"] == why


def test_layers_that_are_not_called_or_not_read_by_plain_ones_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(96, 5))
    model[1].unused = nn.Linear(2, 2)
    found = survey(model.eval(), torch.randn(16, 3, 4, 4))
    assert unlisted(model, found.coupling) == set()
    assert found.coupling.fixed["1.unused"] == "the network does not call it"
    assert found.coupling.fixed["0"].startswith("no layer that reads it is a plain dense conv")


def test_removing_channels_that_do_nothing_changes_nothing() -> None:
    for name in ("resnet18", "densenet121"):
        model, x = build_recipe(recipe(name)).eval(), torch.randn(2, 3, 32, 32)
        found = narrowable(model, x)
        modules = dict(model.named_modules())
        with torch.no_grad():
            for group in found.groups:  # nobody listens to every second unit
                for port in group.readers():
                    weight = modules[port.module].weight
                    weight[:, port.positions[1::2].flatten()] = 0
        expected = model(x)
        change_widths(model, found.groups, {g.name: range(0, g.units, 2) for g in found.groups})
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_doubled_units_change_nothing() -> None:
    for name in ("regnety_002", "densenet121", "vit_tiny_patch16_224"):
        model, x = build_recipe(recipe(name)).eval(), torch.randn(2, 3, 32, 32)
        expected, found = model(x), narrowable(model, x)
        change_widths(model, found.groups, {g.name: sorted([*range(g.units), 0, 0, g.units - 1]) for g in found.groups})
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_layers_beside_shared_parameters_are_narrowed_and_the_shared_ones_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), Tied())
    model[4].a = nn.Conv2d(6, 4, 1)
    x = torch.randn(32, 3, 4, 4)
    found = survey(model.eval(), x)
    assert {g.name for g in found.groups} == {"0", "2"}
    small = narrowed(model, found, plan_widths(found, widths={"2": 4}))
    assert small[2].out_channels == small[4].a.in_channels == 4
    assert small[4].c.weight is small[4].b.weight
    assert torch.equal(small[4].b.weight, model[4].b.weight)
    with pytest.raises(UsageError, match=r"remain; layers of fixed width cost 0.29; a smaller"):  # 32 of 18 + 36 + 24 + 32
        plan_widths(found, target_macs=0.4)
    with pytest.raises(UsageError, match=r"remain; layers of fixed width cost 0.29, most of it 4.b, 4.c\.$"):  # no --round-to would help
        plan_widths(found, target_macs=0.01)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_tiny_patch16_224"])
def test_planned_parameters_are_those_of_the_narrowed_network(name: str) -> None:
    model, x = build_recipe(recipe(name)).eval(), torch.randn(4, 3, 32, 32)
    found = survey(model, x)
    for goal in ({"target_macs": 0.6}, {"widths": {}}):
        plan = plan_widths(found, round_to=4, **goal)
        assert plan.planned_params == sum(p.numel() for p in narrowed(model, found, plan).parameters())


class Shifted(nn.Module):
    """Has bare parameters of its own in its groups, one of several axes, and one in none; refitting gives a layer without bias one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.rand(8, 1, 1))
        self.places, self.other = nn.Parameter(torch.randn(1, 16, 2)), nn.Parameter(torch.randn(3, 4, 4))
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1, bias=False), nn.Linear(2, 2)
        self.norm = nn.LayerNorm((16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner((self.scale * self.conv(x + self.other) + self.shift).relu())
        return self.head(self.norm(x.flatten(2).transpose(1, 2) + self.places).relu().mean(1))


def test_planned_parameters_of_modules_with_bare_ones() -> None:
    model, x = Shifted().eval(), torch.randn(32, 3, 4, 4)
    found = survey(model, x)
    plan = plan_widths(found, widths={"conv": 5, "inner": 1})
    small = narrowed(model, found, plan)
    count = [sum(p.numel() for p in net.parameters()) for net in (small, narrowed(model, found, plan, refit=False))]
    assert {p.module for g in found.groups for p in g.ports if p.side == "param"} == {"shift", "scale", "places"}
    assert count == [plan.planned_params, plan.planned_params - 1]
    assert (small.places.shape, small.norm.weight.shape, small.norm.normalized_shape) == ((1, 16, 1), (16, 1), (16, 1))


def test_a_narrowed_network_can_be_exported() -> None:
    x = torch.randn(2, 3, 32, 32)
    small, _ = halve(build_recipe(recipe("resnet18")).eval(), x)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), small(x), rtol=1e-4, atol=1e-5)


class Split(nn.Module):
    """Half of the channels go one way, half another, and meet again in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        return self.head(y.reshape(-1, 2, 2).transpose(1, 2).reshape(-1, 4))


class Reversed(nn.Module):
    """Reads its channels in reverse: it runs without one of them, but reads the wrong ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)).flip(1))


class Mirrored(nn.Module):
    """Adds its channels in reverse: a channel and its mirror image go together."""

    def __init__(self, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, width, 1), norm or nn.Identity(), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(y * y.flip(1) + y)


class Branching(nn.Module):
    """Takes a path by what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(2 * x if x.mean() > 10 else x)


class Selecting(nn.Module):
    """Averages the positions that are above zero, however many."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head(y[y > 0].mean()[None]) for y in self.conv(x)])


class Noisy(nn.Module):
    """Adds noise in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


class Tied(nn.Module):
    """Two convs that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x)).relu()).relu().mean((2, 3)))


class Bare(nn.Module):
    """Convolves with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.first).relu().mean((2, 3)) @ self.last.T


class Pair(nn.Module):
    """Gives its logits in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.net(x),)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))


def test_masks_of_infinity_are_no_broken_weights() -> None:
    net = plain()
    net.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert [g.name for g in narrowable(net.eval(), torch.randn(2, 3, 4, 4)).groups] == ["0"]


def masked() -> nn.Module:
    net = plain()
    l1_unstructured(net[0], "weight", 0.5)
    return net


def spectral(grad: bool) -> nn.Module:
    net = plain()
    torch.nn.utils.spectral_norm(net[0])
    with torch.set_grad_enabled(grad):
        net(torch.randn(2, 3, 4, 4))
    return net


def scripted() -> nn.Module:
    return torch.jit.script(plain())


def quantized() -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear

    net = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # making one warns in some releases of torch
        net[3] = Linear(net[3].in_features, net[3].out_features)
    return net


def broken() -> nn.Module:
    net = plain()
    net[1].running_var[2] = float("nan")
    return net


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Tied(), "this Tied: b.weight and c.weight are one parameter"),
        (Pair(), r"this Pair: its output is a tuple; wrap it so that it gives one tensor of logits \(B, classes\)"),
        (plain()[:2], r"its output has the shape \(2, 4, 4, 4\), expected logits \(2, classes\)"),
        (broken(), "1.running_var holds NaN; give weights of a training that did not diverge"),
        (plain().double(), "0.weight is torch.float64 and the images are torch.float32; give both one type, such as model.float()"),
        (nn.Sequential(nn.Conv2d(1, 4, 1)), r"it does not run on images of shape \(2, 3, 4, 4\) \(RuntimeError: "),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), "this Sequential: its only layer has a fixed width, it gives the classes"),
        (Bare(), "cannot narrow this Bare: none of its modules is a conv or linear layer"),
        (Split(), "cannot narrow this Split"),
        (Reversed(), "doubled channels change what is computed"),
        *((Mirrored(width), "doubled channels change what is computed") for width in (2, 4, 6, 7, 16)),  # the third ones of 3 n + 1 mirror
        (Mirrored(16, nn.GroupNorm(1, 16)), "doubled channels change what is computed"),
        (Branching(), r"this Branching: its path depends on the data \(RuntimeError: "),
        (Selecting(), r"this Selecting: its path depends on the data \(NotImplementedError: "),
        (Noisy(), "this Noisy: its outputs are random in eval mode"),
        (masked(), "0.weight is computed from other tensors; make it a parameter: torch.nn.utils.prune.remove for a mask, remove_spectral"),
        (spectral(grad=True), "0.weight is computed from other tensors"),
        (spectral(grad=False), "0.weight is computed from other tensors"),
        (scripted(), "it is a ScriptModule; give the network that it was scripted or traced from"),
        (quantized(), "3 is a quantized Linear; narrow the network first and quantize it after"),
    ],
)
def test_what_cannot_be_narrowed_says_why(model: nn.Module, reason: str) -> None:
    with pytest.raises(CannotNarrow, match=reason):
        narrowable(model.eval(), torch.randn(2, 3, 4, 4))


def test_a_wrong_order_is_found_in_large_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.narrowing.applying._LARGE", 10)
    for model in (Mirrored(16), Mirrored(16, nn.GroupNorm(1, 16))):
        with pytest.raises(CannotNarrow, match="doubled channels change what is computed"):
            narrowable(model.eval(), torch.randn(2, 3, 4, 4))


def test_a_network_that_misses_an_attribute_is_refused_as_one_that_fails() -> None:
    net = plain()
    net[0].forward = lambda x: net.missing(x)  # type: ignore[method-assign]
    with pytest.raises(CannotNarrow, match=r"it does not run on images of shape .*AttributeError: 'Sequential' object has no attribute"):
        narrowable(net.eval(), torch.randn(2, 3, 4, 4))
