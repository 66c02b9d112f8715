from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from capnas._timm import timm
from capnas.candidates import count_cost
from capnas.errors import UsageError
from capnas.measures.moments import covariance, moments_of
from capnas.measures.saturation import lossless_projection
from capnas.narrowing.lowrank import _largest_share, factorized, plan_ranks, split_layer
from capnas.narrowing.refusing import CannotNarrow
from capnas.saved import build_recipe, load_model, save_model

RECIPE = {"timm": "resnet10t", "args": {"num_classes": 3, "in_chans": 1, "channels": [8, 12, 16, 24]}, "image_size": 32}


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 7), nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=False), nn.Conv2d(5, 7, 1), nn.Conv2d(5, 7, 3, dilation=2, padding=1)],
)
def test_a_split_layer_is_its_projected_outputs_exactly(layer: nn.Module) -> None:
    x = torch.randn(30, 5) if isinstance(layer, nn.Linear) else torch.randn(4, 5, 6, 6) + 2
    y = layer(x).detach()
    rows = y if y.dim() == 2 else y.movedim(1, -1).flatten(0, 2)
    moments = moments_of(rows)
    values = torch.linalg.eigvalsh(covariance(moments)).flip(0)
    share = float((values.cumsum(0) / values.sum())[1:3].mean())  # between two and three directions
    projection = lossless_projection(moments, share)
    assert projection.basis.shape[1] == 3
    expected = projection(rows)
    got = split_layer(layer, moments, 3)(x)
    got = got if got.dim() == 2 else got.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_wide_layers_are_split_without_their_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 2)).eval()
    with torch.no_grad():
        model[0].weight.mul_(1.7 ** -torch.arange(40.0)[:, None])
    x = torch.randn(200, 64)
    whole = plan_ranks(model, x, threshold=0.99).groups[0]
    sides: list[int] = []
    for name in ("eigh", "eigvalsh"):
        full = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, full=full: (sides.append(len(m)), full(m))[1])
    monkeypatch.setattr("capnas.measures.saturation.EXACT_EIGENVALUES", 12)
    plan = plan_ranks(model, x, threshold=0.99)
    assert (plan.groups[0].rank, plan.groups[0].kept) == (whole.rank, pytest.approx(whole.kept))
    assert whole.rank < whole.width == plan.groups[0].width
    small = factorized(model, plan)
    rows = model[0](x).detach()
    torch.testing.assert_close(small[0](x), lossless_projection(moments_of(rows), 0.99)(rows), rtol=1e-4, atol=1e-4)
    assert set(sides) == {12}
    most = plan_ranks(model, x, threshold=0.9999999).groups[0]  # twelve directions hold less: all are taken to be needed
    assert (most.needed, most.rank, most.kept) == (40, 40, 1.0)
    plan_ranks(model, x[:9])
    assert sides[-1] == 9  # samples are the cheaper side
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    dead = plan_ranks(model, x).groups[0]
    assert (dead.needed, dead.rank) == (1, 1)


def test_ranks_meet_the_target_and_the_model_comes_back(tmp_path: Path) -> None:
    model, x = build_recipe(RECIPE).eval(), torch.randn(8, 1, 32, 32)
    plan = plan_ranks(model, x, target_macs=0.6)
    small = factorized(model, plan)
    assert count_cost(small, (1, 1, 32, 32)).macs == pytest.approx(plan.planned_macs, rel=1e-3)
    assert plan.planned_macs <= 0.6 * plan.macs
    assert sum(p.numel() for p in small.parameters()) == plan.planned_params
    kept = [g.kept for g in plan.groups if g.rank < g.width]
    assert kept
    assert max(kept) < 1
    assert _largest_share(lambda share: share <= 0.7) == pytest.approx(0.7, abs=1e-11)
    again = load_model(save_model(small, tmp_path / "m", RECIPE))
    assert torch.equal(again(x), small(x))


def test_what_saves_nothing_stays_whole() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    plan = plan_ranks(model, torch.randn(8, 1, 2, 2))
    assert [(g.name, g.rank) for g in plan.groups] == [("0", 4)]  # one input: the second part would cost more than it saves
    assert factorized(model, plan)[0].weight.shape == (4, 1, 1, 1)
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(8, 1) * torch.arange(8.0)[:, None] @ torch.ones(1, 2)
    assert (plan_ranks(model, x).groups[0].needed, plan_ranks(model, x).groups[0].rank) == (1, 2)  # as dear in two: 2 + 2 of 2 x 2


class ReadsWeights(nn.Module):
    """Reads the weight of a layer that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x).relu()).relu()
        return self.head(x.to(self.b.weight.dtype))


def test_layers_whose_weights_the_network_reads_stay_whole() -> None:
    model, x = ReadsWeights().eval(), torch.randn(20, 1) @ torch.randn(1, 8)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    plan = plan_ranks(model, x, threshold=0.5)
    assert [(g.name, g.rank) for g in plan.groups] == [("a", 1)]
    assert plan.fixed["b"].startswith(
        "with b in two parts the network fails (AttributeError: 'Sequential' object has no attribute 'weight'"
    )
    assert bool(torch.isfinite(factorized(model, plan)(x)).all())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    model.a = nn.Identity()
    with pytest.raises(CannotNarrow, match="cannot split this ReadsWeights: with b in two parts"):
        plan_ranks(model, x)


class Kinds(nn.Module):
    """Layers that are not split, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.same, self.named = timm.layers.Conv2dSame(8, 8, 3), nn.Conv2d(8, 8, 3, padding="same")
        self.mirrored, self.standardized = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), timm.layers.StdConv2d(8, 8, 1)
        self.up, self.line, self.wide, self.broken = nn.ConvTranspose2d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.Linear(4609, 4), nn.Linear(8, 8)
        self.left, self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.standardized(self.mirrored(self.named(self.same(self.grouped(self.dense(x)))))))
        x = self.line(x.flatten(2)).mean(2) @ self.read.weight
        self.broken(x / 0)
        return self.head(x) + self.wide(x.new_ones(len(x), 4609))[:, :2]


def test_layers_that_are_left_out_have_a_reason_each() -> None:
    plan = plan_ranks(Kinds().eval(), torch.randn(16, 1, 6, 6))
    assert [g.name for g in plan.groups] == ["dense"]
    assert plan.fixed == {
        "grouped": "it is a convolution in 4 groups",
        "same": "it pads each image by its size",
        "named": "it pads by the rule 'same'",
        "mirrored": "it pads by the rule 'reflect'",
        "standardized": "it is a StdConv2d, which computes its outputs in a way of its own",
        "up": "it is a transposed convolution",
        "line": "it is a Conv1d, neither a linear layer nor a 2-d convolution",
        "wide": "it reads 4609 inputs, more than 4608",
        "broken": "its outputs on the images are not finite",
        "left": "the network does not call it",
        "read": "the network reads its weights and does not call it",
        "head": "it gives the classes",
    }


class Shared(nn.Module):
    """One layer in two places, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.first, self.tied, self.other = (nn.Linear(8, 8) for _ in range(4))
        self.again, self.head = self.first, nn.Linear(8, 2)
        self.other.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.plain, self.first, self.again, self.tied, self.other):
            x = layer(x).tanh()
        return self.head(x)


def test_shared_layers_stay_whole_and_the_costs_are_those_planned() -> None:
    model = Shared().eval()
    plan = plan_ranks(model, torch.randn(64, 8), threshold=0.5)
    assert [g.name for g in plan.groups] == ["plain"]
    assert plan.fixed["first"] == "first and again are one layer"
    assert plan.fixed["tied"] == plan.fixed["other"] == "tied.weight and other.weight are one parameter"
    small = factorized(model, plan)
    assert plan.planned_macs == count_cost(small, (1, 8)).macs < plan.macs
    assert plan.planned_params == sum(p.numel() for p in small.parameters())


class Positions(nn.Module):
    """Computes positions at its first call, where a layer's weight lies, as timm's ConViT does."""

    def __init__(self, constant: bool = False) -> None:
        super().__init__()
        self.scale, self.head, self.constant = nn.Linear(8, 8), nn.Linear(8, 2), constant
        if constant:
            self.positions = torch.arange(8.0)
        else:
            self.register_buffer("positions", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.positions is None and not self.constant:
            self.positions = torch.arange(8.0, device=self.scale.weight.device)
        return self.head(self.scale(x) + self.positions)


def test_a_layer_that_is_read_at_the_first_call_alone_stays_whole() -> None:
    torch.manual_seed(0)
    line = torch.randn(64, 1) @ torch.randn(1, 8)
    model = nn.Sequential(nn.Linear(8, 8), Positions(), nn.ReLU(), nn.Linear(2, 2)).eval()
    model(line)  # the positions are there from here on
    plan = plan_ranks(model, line)
    assert {g.name for g in plan.groups} == {"0", "1.head"}
    assert "in two parts the network fails (AttributeError" in plan.fixed["1.scale"]
    assert {g.name for g in plan_ranks(Positions(constant=True).eval(), line).groups} == {"scale"}


def test_errors() -> None:
    with pytest.raises(CannotNarrow, match="no plain dense conv or linear layer beside its head"):
        plan_ranks(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.randn(4, 1, 2, 2))
    masked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    l1_unstructured(masked[0], "weight", 0.5)
    with pytest.raises(CannotNarrow, match=r"0\.weight is computed from other tensors"):
        plan_ranks(masked, torch.randn(9, 4))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(UsageError, match=r"0.01 of the MACs cannot be reached by splitting"):
        plan_ranks(model, torch.randn(9, 8), target_macs=0.01)
    with pytest.raises(UsageError, match=r"in \(0, 1\), got 2"):
        plan_ranks(model, torch.randn(9, 8), target_macs=2)


def test_a_target_may_leave_less_than_half_of_the_variance() -> None:
    net, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(200, 32)
    plan = plan_ranks(net, x, target_macs=0.2)
    assert (plan.groups[0].rank, plan.planned_macs) == (2, 2 * 64 + 64)  # of 1,088
    assert plan.groups[0].kept < 0.5
    whole = plan_ranks(nn.Sequential(*net, nn.Dropout(0.5)).train(), x)  # two layers would cost more than one
    assert plan.groups[0].needed == whole.groups[0].needed > 2
    assert (whole.groups[0].rank, whole.planned_macs, whole.planned_params) == (32, whole.macs, whole.params)


def test_a_network_in_double_precision_is_split_in_it() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double(), torch.randn(64, 8, dtype=torch.float64)
    small = factorized(net, plan_ranks(net, x, target_macs=0.6))
    assert isinstance(small[0], nn.Sequential)
    assert small(x).dtype == torch.float64
