"""What is tried before a group counts as one that can be narrowed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.narrowing import applying, narrowed, plan_widths, survey
from capnas.narrowing.applying import change_widths, narrowable
from capnas.narrowing.groups import CoupledGroup
from capnas.narrowing.pruning import Method, PruneConfig, make_plan
from capnas.narrowing.refusing import CannotNarrow
from capnas.saved import build_recipe


class NeverBoth(nn.Module):
    """Runs with the first or the second conv narrower, not with both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.a.out_channels < 8 and self.b.out_channels < 8:
            raise RuntimeError("both are narrow")
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def test_of_groups_that_fail_together_only_those_that_break_it_keep_their_width() -> None:
    model, x = NeverBoth().eval(), torch.randn(2, 3, 4, 4)
    found = narrowable(model, x)
    assert [g.name for g in found.groups] == ["a", "c"]
    assert found.fixed["b"] == "together with other groups without a channel it does not run (RuntimeError: both are narrow)"
    change_widths(model, found.groups, {g.name: range(3) for g in found.groups})
    assert model(x).shape == (2, 2)


@pytest.mark.parametrize("kind", [timm.layers.SimpleNorm2d, timm.layers.SimpleNorm2dFp32, timm.layers.GroupNorm1])
def test_norms_of_unbiased_variance_are_tried_by_another_order(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)).eval()
    assert [g.name for g in narrowable(model, torch.randn(2, 3, 4, 4)).groups] == ["0", "2"]


@pytest.mark.parametrize("kind", [nn.RMSNorm, timm.layers.RmsNorm, timm.layers.SimpleNorm])
def test_norms_that_hold_their_width_beside_their_weight_change_both(kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), kind(8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 3, 4, 4)
    change_widths(model, narrowable(model, x).groups, {"1": range(5)})
    assert model[2].normalized_shape == tuple(model[2].weight.shape) == (5,)
    assert model(x).shape == (2, 2)


def test_a_convnext_of_simple_norms_is_narrowed() -> None:
    args = {"num_classes": 5, "depths": [1, 1, 1, 1], "dims": [16, 24, 32, 40]}
    model = build_recipe({"timm": "convnext_zepto_rms", "args": args, "image_size": 32}).eval()
    found = {g.name for g in narrowable(model, torch.randn(2, 3, 32, 32)).groups}
    assert found == {"stem.0", *(f"stages.{i}.downsample.1" for i in (1, 2, 3)), *(f"stages.{i}.blocks.0.mlp.fc1" for i in range(4))}


class Cancelling(nn.Module):
    """Adds what is nothing but rounding: a mean of large products less the products of a mean."""

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.conv, self.large, self.same, self.head = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 2, 1), nn.Linear(24, 2), nn.Linear(24, 2)
        self.reverse = reverse
        with torch.no_grad():
            self.large.weight.mul_(1e5)
            self.same.weight.copy_(self.large.weight.flatten(1))
            self.same.bias.copy_(self.large.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).tanh()
        read = y.mean((2, 3))
        return self.head(read.flip(1) if self.reverse else read) + self.large(y).mean((2, 3)) - self.same(read)


class Single(Cancelling):
    """Runs in float32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def test_rounding_is_no_other_order() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert [g.name for g in narrowable(Cancelling().eval(), x).groups] == ["conv"]
    for model in (Cancelling(reverse=True), Single()):
        with pytest.raises(CannotNarrow, match="doubled channels change what is computed"):
            narrowable(model.eval(), x)


class Attention(nn.Module):
    """Plain heads, with a parameter that all of them share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.qkv, self.proj, self.share = nn.Linear(12, 36), nn.Linear(12, 12), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q + self.share, k, v).transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


class ReadingAttention(Attention):
    """Reads its weights itself."""

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


class Tokens(nn.Module):
    """Two layers beside an attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attn, self.head = nn.Conv2d(3, 12, 1), attention, nn.Linear(8, 2)
        self.wide, self.narrow, self.last = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attn(x)
        return self.head(self.last(x + self.narrow(self.wide(x).relu())).mean(1))


def test_what_all_heads_share_stays() -> None:
    model, x = Tokens(Attention()).eval(), torch.randn(32, 3, 2, 2)
    found = survey(model, x)
    plan = plan_widths(found, widths={"attn.qkv": 24})
    small = narrowed(model, found, plan)
    assert small.attn.num_heads == 2
    assert plan.planned_params == sum(p.numel() for p in small.parameters())


def test_an_attention_whose_weights_are_read_without_a_call_is_said_to_be_so() -> None:
    found = narrowable(Tokens(ReadingAttention()).eval(), torch.randn(2, 3, 2, 2))
    assert found.fixed["attn.qkv"] == "the network reads its weights and does not call it"
    assert found.fixed["stem"] == "it writes the token stream, whose width positions, norms and heads of the whole network share"


def test_many_small_layers_of_fixed_width_are_not_named() -> None:
    circular = [nn.Conv2d(4, 4, 1, padding_mode="circular") for _ in range(12)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), *circular, nn.Flatten(), nn.Linear(16, 2)).eval()
    with pytest.raises(UsageError, match=r"at its least width 0\.\d\d of them remain; layers of fixed width cost 0\.\d\d\.$"):
        plan_widths(survey(model, torch.randn(32, 3, 2, 2)), target_macs=0.01, round_to=1)


class Head(nn.Module):
    """Knows its widths, around a classifier that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.num_features = 8, 6
        self.hidden, self.fc = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(x.mean((2, 3), keepdim=True)).relu()).flatten(1)


class Headed(nn.Module):
    """Names the widths of its features and of its classifier like timm's models."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features, self.head_hidden_size = 8, 6
        self.conv, self.head = nn.Conv2d(3, 8, 1), Head()

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(x))


def test_models_and_their_heads_know_their_new_widths() -> None:
    model, x = Headed().eval(), torch.randn(32, 3, 4, 4)
    found = survey(model, x)
    small = narrowed(model, found, plan_widths(found, widths={"conv": 5, "head.hidden": 3}))
    assert (small.num_features, small.head.in_features) == (5, 5) == (small.conv.out_channels, small.head.hidden.in_channels)
    assert (small.head_hidden_size, small.head.num_features) == (3, 3) == (small.head.hidden.out_channels, small.head.fc.in_channels)


def test_the_classifier_of_a_narrowed_mixer_can_be_replaced() -> None:
    sizes = {"num_classes": 3, "img_size": 8, "patch_size": 4, "num_blocks": 1, "embed_dim": 16, "mlp_ratio": 4}
    gated = timm.models.mlp_mixer
    model = gated.MlpMixer(**sizes, block_layer=gated.SpatialGatingBlock, mlp_layer=timm.layers.GatedMlp).eval()
    x = torch.randn(16, 3, 8, 8)
    found = survey(model, x)
    small = narrowed(model, found, plan_widths(found, widths={"stem.proj": 12}))
    assert (small.embed_dim, small.num_features, small.head.in_features) == (12, 12, 12)
    small.reset_classifier(5)
    assert small(x).shape == (16, 5)


def test_the_classifier_of_a_narrowed_vgg_can_be_replaced() -> None:
    model = timm.models.vgg.VGG(cfg=[8, "M"], num_classes=3, mlp_ratio=1 / 256).eval()  # 16 and 4,096 hidden units
    model.pre_logits.fc2 = nn.Conv2d(16, 24, 1)
    model.head = timm.layers.ClassifierHead(24, 3)
    model.head_hidden_size = 24
    x = torch.randn(16, 3, 14, 14)
    found = survey(model, x)
    small = narrowed(model, found, plan_widths(found, widths={"pre_logits.fc2": 12}))
    assert (small.num_features, small.head_hidden_size, small.head.in_features, small.head.fc.in_features) == (8, 12, 12, 12)
    small.reset_classifier(5)
    assert small(x).shape == (16, 5)


def test_features_of_several_branches_name_no_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Headed, "forward", lambda self, x: self.head(self.conv(x).relu()))
    monkeypatch.setattr(Headed, "forward_features", lambda self, x: [self.conv(x), x])
    model, x = Headed().eval(), torch.randn(32, 3, 4, 4)
    found = survey(model, x)
    small = narrowed(model, found, plan_widths(found, widths={"conv": 5}))
    assert (small.num_features, small.conv.out_channels) == (8, 5)


class KeyValue(Attention):
    """Heads of which the layer that is called ``qkv`` gives the keys and values alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, v = self.qkv(x).unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(k, k, v).transpose(1, 2).flatten(2))


def test_an_attention_of_another_layout_keeps_its_heads_beside_layers_that_are_narrowed() -> None:
    model, x = Tokens(KeyValue()).eval(), torch.randn(2, 3, 2, 2)
    found = narrowable(model, x)
    assert [g.name for g in found.groups] == ["wide"]
    assert found.fixed["attn.qkv"] == "an attention is narrowed by whole heads, and attn is no plain one of several heads side by side"
    change_widths(model, found.groups, {g.name: range(3) for g in found.groups})
    assert model.attn.num_heads == 3
    assert model(x).shape == (2, 2)


class Apart(Attention):
    """No one layer gives q, k and v, as in timm's TNT."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv
        self.qk, self.v = nn.Linear(12, 24), nn.Linear(12, 12)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.qk(x), self.v(x)], dim=2)


class Convolved(Attention):
    """A convolution gives them, as in timm's Visformer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(12, 36, 1)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x.transpose(1, 2)).transpose(1, 2)


Apart.__name__ = Convolved.__name__ = "Attention"  # as timm's are called


@pytest.mark.parametrize("kind", [Apart, Convolved], ids=["two layers", "a convolution"])
def test_an_attention_without_a_linear_layer_for_all_three_keeps_no_other_from_being_narrowed(kind: type[Attention]) -> None:
    assert "wide" in [g.name for g in narrowable(Tokens(kind()).eval(), torch.randn(2, 3, 2, 2)).groups]


class Remembering(Attention):
    """Computes a bias once in eval mode and keeps it, as timm's LeViT and TinyViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.randn(12)), {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.kept.setdefault("bias", 2 * self.bias))


@pytest.mark.parametrize("method", ["channels", "lowrank"])
def test_what_an_attention_keeps_from_a_pass_with_gradients_hinders_nothing(method: Method) -> None:
    model, x = Tokens(Remembering()).eval(), torch.randn(32, 3, 2, 2)
    make_plan(model, x, PruneConfig(target_macs=0.9, method=method, round_to=1 if method == "channels" else 8))
    assert model.attn.kept == {}
    model(x)  # with gradients
    plan, carry_out = make_plan(model, x, PruneConfig(target_macs=0.9, method=method, round_to=1 if method == "channels" else 8))
    small = carry_out()
    assert plan.planned_macs <= 0.9 * plan.macs
    assert bool(torch.isfinite(small(x)).all())
    assert set(model.attn.kept) == {"bias"}


class Scaled(nn.Module):
    """Holds constants in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.head = nn.Linear(12, 16), nn.Linear(16, 2)
        self.constants = {"mean": torch.tensor(0.5), "deviation": torch.tensor(2.0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x.flatten(1) - self.constants["mean"]) / self.constants["deviation"]
        return self.head(self.wide(x).relu())


@pytest.mark.parametrize("method", ["channels", "lowrank"])
def test_constants_in_a_dictionary_stay(method: Method) -> None:
    model, x = Scaled().eval(), torch.randn(32, 3, 2, 2)
    small = make_plan(model, x, PruneConfig(target_macs=0.5, method=method, round_to=1 if method == "channels" else 8))[1]()
    assert small.constants == model.constants
    assert small(x).shape == (32, 2)


class Joined(nn.Module):
    """A norm averages over two layers' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(12, 8), nn.Linear(12, 6), nn.LayerNorm(14), nn.Linear(14, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(self.norm(torch.cat([self.a(x), self.b(x)], dim=1)).relu())


def test_layers_that_a_norm_averages_over_together_are_narrowed_beside_one_that_is_not() -> None:
    found = narrowable(nn.Sequential(Joined(), nn.Linear(2, 2)).eval(), torch.randn(2, 3, 2, 2))
    assert [g.name for g in found.groups] == ["0.a", "0.b", "0.head"]
    model = Joined().eval()
    model.b.register_parameter("scale", nn.Parameter(torch.ones(1)))  # has no rule: keeps its width
    assert [g.name for g in narrowable(model, torch.randn(2, 3, 2, 2)).groups] == ["a"]


class Block(nn.Module):
    """Two layers; one of them cannot be narrowed in a block that counts."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.counts = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 8, 1), counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).relu()
        if self.counts and y.shape[1] < 6:
            raise RuntimeError("too narrow")
        return x + self.c(self.b(y).relu())


def test_groups_at_the_same_place_of_all_blocks_are_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, trial = [], applying._trial_failure

    def count(model: nn.Module, example: torch.Tensor, groups: Sequence[CoupledGroup]) -> str | None:
        tried.append(len(groups))
        return trial(model, example, groups)

    monkeypatch.setattr(applying, "_trial_failure", count)
    blocks = [Block(i == 2) for i in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    found = narrowable(model, torch.randn(2, 3, 4, 4))
    assert [g.name for g in found.groups] == ["0", "1.a", "1.b", "2.a", "2.b", "3.b", "4.a", "4.b"]
    assert tried == [9, 1, 4, 1, 1, 1, 1, 4, 8]  # all; by place; each at the place that fails; all that are left
