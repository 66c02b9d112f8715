from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from cases import small_cnn
from torch import nn

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.measures.narrowing import moved_norm
from capnas.narrowing import chosen_units, narrowed
from capnas.narrowing.calibration import input_rows, matrix, norm_inputs, norms_behind, output_rows, places, read_layers, readable, sampled
from capnas.narrowing.costs import NetworkCost
from capnas.narrowing.planning import check_growth, plan_widths, read_widths
from capnas.narrowing.survey import Survey, _readers, saturations, survey
from capnas.norms import measure_norms
from capnas.saved import build_recipe


def redundant(width: int = 6, reader: type[nn.Module] = nn.Conv2d) -> nn.Sequential:
    """A network whose hidden channels 3 to 5 are mixtures of 0 to 2 before a linear activation: half of them suffice."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), reader(width, 4, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[3:] = torch.einsum("ij,jchw->ichw", torch.randn(3, 3), net[0].weight[:3])
    net.train()(torch.randn(64, 2, 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, Survey]:
    net = redundant()
    return net, own_channels(survey(net, torch.randn(48, 2, 8, 8)))


def own_channels(found: Survey) -> Survey:
    """The survey without its turned streams, which would need no correction at all here; see test_turning.py."""
    return dataclasses.replace(found, turns={})


def test_a_conv_is_read_as_its_own_matrix_product() -> None:
    for conv in (
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.Conv2d(3, 5, (1, 3), dilation=(1, 2), padding=(0, 1)),
        nn.ConvTranspose2d(3, 5, (2, 3), stride=(2, 3), dilation=(1, 2), padding=(0, 1), output_padding=(1, 2)),
        nn.ConvTranspose2d(3, 5, 3, padding=2),
        nn.Conv2d(3, 5, 1),
    ):
        x = torch.randn(2, 3, 9, 8)
        y = conv(x)
        index = torch.tensor([0, 3, y[0, 0].numel() + 1, 2 * y[0, 0].numel() - 1])
        rows = input_rows(conv, x, index, places(conv, y)) @ matrix(conv).T + conv.bias
        torch.testing.assert_close(rows, output_rows(conv, y, index))
    same = timm.layers.Conv2dSame(3, 5, 3, stride=2)
    y = same(x)
    index = torch.arange(y[:, 0].numel())
    rows = input_rows(same, x, index, places(same, y)) @ matrix(same).T + same.bias
    torch.testing.assert_close(rows, output_rows(same, y, index))
    linear, tokens = nn.Linear(3, 2), torch.randn(2, 4, 3)
    index = torch.tensor([1, 7])
    torch.testing.assert_close(linear(input_rows(linear, tokens, index, (2, 4))), output_rows(linear, linear(tokens), index))


def test_what_can_be_read() -> None:
    assert readable(nn.Linear(2, 2))
    assert readable(nn.Conv2d(2, 2, 3, dilation=2))
    assert not readable(nn.Conv2d(2, 2, 3, groups=2))
    assert not readable(nn.Conv2d(2, 2, 3, padding="same"))
    assert not readable(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    head = build_recipe({"timm": "mobilenetv3_small_050", "args": {"num_classes": 3}, "image_size": 32}).get_classifier()
    assert type(head) is not nn.Linear
    assert readable(head)


def test_wide_layers_are_read_in_more_rows_as_memory_allows() -> None:
    assert len(sampled("a", 10**6, 16)) == 8192
    assert len(sampled("a", 10**6, 4096)) == 4 * 4096
    assert len(sampled("a", 10**6, 2**16)) == 2048
    assert sampled("a", 10, 16).tolist() == list(range(10))
    assert not readable(nn.Linear(4609, 2, device="meta"))


def test_layers_with_broken_outputs_have_no_saturation() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].bias.fill_(float("nan"))
    assert list(saturations(net, torch.randn(16, 2))) == ["0"]


def test_reading_leaves_the_model_alone_and_gives_the_curvature_of_the_loss() -> None:
    net = redundant()
    net[0].weight.requires_grad_(False)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    images = torch.randn(32, 2, 8, 8)
    read_layers(net.train(), ["2", "6"], images)
    assert net.training
    assert not net[0].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    # at the logits the expected curvature of cross-entropy is diag(p) - p p^T
    p = net.eval()(images).softmax(1).double()
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    draws = torch.stack([read_layers(net, ["6"], images, seed=s)["6"].curvature for s in range(40)]).mean(0)
    torch.testing.assert_close(draws, expected.detach(), atol=0.03, rtol=0)


def test_mixtures_go_for_nothing_once_the_readers_are_refitted(measured: tuple[nn.Module, Survey]) -> None:
    net, found = measured
    group = found.groups[0]
    assert (group.name, group.units) == ("0", 6)
    assert round(found.needed[0]) <= 3
    plan = plan_widths(found, widths={"0": 3}, round_to=1)
    assert plan.groups[0].loss < 0.01 * float(found.paths[0].losses[-1])
    x = torch.randn(40, 2, 8, 8)
    small, sliced = narrowed(net, found, plan), narrowed(net, found, plan, refit=False)
    assert small[0].out_channels == small[1].num_features == small[2].in_channels == 3
    wrong = (sliced(x) - net(x)).norm() / net(x).norm()
    assert (small(x) - net(x)).norm() / net(x).norm() < 0.1 * wrong


@pytest.mark.parametrize("bias", [True, False])
def test_what_removed_channels_always_put_out_goes_into_the_bias(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[0].weight[3:] = 0
        net[0].bias[3:] = 1.0
    found = survey(net, torch.randn(48, 2, 8, 8))
    small, x = narrowed(net, found, plan_widths(found, widths={"0": 3}, round_to=1)), torch.randn(40, 2, 8, 8)
    assert small[2].in_channels == 3
    torch.testing.assert_close(small[:3](x), net[:3](x), rtol=1e-4, atol=1e-4)


def test_depthwise_layers_count_with_the_group_that_they_are_narrowed_with() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()  # fmt: skip
    (row,) = plan_widths(survey(net, torch.randn(32, 2, 8, 8)), widths={"0": 3}, round_to=1).groups
    assert (row.params, row.planned_params) == (6 * 3 + 6 * 10, 3 * 3 + 3 * 10)
    assert (row.macs, row.planned_macs) == (64 * 12 + 36 * 54, 64 * 6 + 36 * 27)


def test_an_allocation_by_saturation_is_the_more_even_one(measured: tuple[nn.Module, Survey]) -> None:
    plans = [plan_widths(measured[1], target_macs=0.4, round_to=1, allocation=way) for way in ("saturation", "loss")]  # type: ignore[arg-type]
    even, other = (max(g.expected for g in p.groups) / min(g.expected for g in p.groups) for p in plans)
    assert even < other


def test_units_of_several_channels_are_not_broken() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()  # fmt: skip
    x = torch.randn(32, 2, 8, 8)
    found = survey(net, x)
    assert [(g.name, g.unit_channels) for g in found.groups] == [("0", 4)]
    assert found.saturation[0] == max(saturations(net, x)[name] for name in ("0", "1"))
    with pytest.raises(UsageError, match="must be a multiple of 4 channels, got 6"):
        plan_widths(found, widths={"0": 6})
    assert plan_widths(found, widths={"0": 4}).groups[0].needed == round(4 * found.needed[0])  # in channels
    wide = narrowed(net, found, plan_widths(found, widths={"0": 12}))
    with torch.no_grad():
        torch.testing.assert_close(wide(x), net(x), rtol=0, atol=0.003)  # but for the noise that tells doubled ones apart


class Told(nn.Sequential):
    """The network of `redundant` with a transposed conv that is told the size of its outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, output_size=(18, 17)) if isinstance(layer, nn.ConvTranspose2d) else layer(x)
        return x


def test_transposed_convolutions_are_refitted_at_the_size_that_they_are_told() -> None:
    net, x = Told(*redundant(reader=nn.ConvTranspose2d)).eval(), torch.randn(40, 2, 8, 8)
    found = own_channels(survey(net, torch.randn(48, 2, 8, 8)))
    assert found.readings["2"].places == (48, 18, 17)
    plan = plan_widths(found, widths={"0": 3}, round_to=1)
    small, sliced = narrowed(net, found, plan), narrowed(net, found, plan, refit=False)
    assert (small(x) - net(x)).norm() < 0.1 * (sliced(x) - net(x)).norm()


@pytest.mark.parametrize("reader", [nn.Conv2d, nn.ConvTranspose2d])
def test_layers_too_wide_to_be_refitted_read_mixtures(reader: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = redundant(reader=reader), torch.randn(48, 2, 8, 8)
    net[2].bias = None
    monkeypatch.setattr("capnas.narrowing.calibration.WIDEST", 20)
    monkeypatch.setattr("capnas.narrowing.calibration.REFITTED", 20)
    with torch.no_grad():
        net[1].bias.zero_()
        net[1].running_mean.zero_()  # mixtures without a constant
    found = survey(net, images)
    assert found.readings["2"].covariance.shape == (6, 6)
    plan = plan_widths(found, widths={"0": 3})
    x = torch.randn(40, 2, 8, 8)
    small, sliced = narrowed(net, found, plan), narrowed(net, found, plan, refit=False)
    wrong = (sliced(x) - net(x)).norm()
    assert (small(x) - net(x)).norm() < 0.5 * wrong
    assert plan.planned_params == sum(p.numel() for p in small.parameters())  # what is not refitted gets no bias
    weight, (read,) = net[2].weight.detach().double(), _readers(found.groups[0], dict(net.named_modules()), found.readings)
    weight = weight if reader is nn.Conv2d else weight.transpose(0, 1)
    kernels = torch.einsum("ocxy,op,pdxy->cd", weight, found.readings["2"].curvature, weight)
    torch.testing.assert_close(read.weight.T @ read.weight, kernels)


class Twice(nn.Module):
    """Calls a layer and its norm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.norm, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.again(self.norm(self.again(self.first(x).relu())).relu())).relu().mean((2, 3)))


def test_nothing_removed_nothing_changed(measured: tuple[nn.Module, Survey]) -> None:
    twice = Twice().eval()
    for net, found in (measured, (twice, survey(twice, torch.randn(48, 2, 8, 8)))):
        plan = plan_widths(found, widths={})
        assert plan.planned_macs == plan.macs
        assert all(g.planned == g.width for g in plan.groups)
        small, x = narrowed(net, found, plan), found.images
        torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
    assert set(found.readings) == {"first", "again", "head"}


def test_wider_plans_double_the_most_needed_units(measured: tuple[nn.Module, Survey]) -> None:
    net, found = measured
    plan = plan_widths(found, widths={"0": 8})
    assert plan.grows
    keep = chosen_units(found, plan)["0"]
    assert len(keep) == 8
    assert sorted(set(keep)) == list(range(6))
    wide, x = narrowed(net, found, plan), found.images
    assert wide[0].out_channels == 8
    assert (wide(x) - net(x)).norm() / net(x).norm() < 0.2
    first, second = (i for i, u in enumerate(keep) if u == next(u for u in keep if keep.count(u) > 1))
    assert not torch.equal(wide[0].weight[first], wide[0].weight[second])


def test_a_wider_layer_doubles_what_would_go_last_and_differs_a_little_by_its_seed(measured: tuple[nn.Module, Survey]) -> None:
    net, found = measured
    plan = plan_widths(found, widths={"0": 8})
    keep = list(chosen_units(found, plan)["0"])
    assert {u for u in keep if keep.count(u) == 2} == set(found.paths[0].order[-2:])
    nets = [narrowed(net, found, plan, refit=False, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (small[0].weight.detach() for small in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float((first - net[0].weight[keep]).detach().std() / first.std()) == pytest.approx(0.01, rel=0.3)
    assert torch.equal(nets[0][6].weight, net[6].weight)  # what is not widened gets no noise
    assert torch.equal(nets[0][2].weight, nets[2][2].weight)
    most = chosen_units(found, plan_widths(found, widths={"0": 13}))["0"]  # all twice, and the last one again
    assert {u: most.count(u) for u in range(6)} == dict.fromkeys(range(6), 2) | {found.paths[0].order[-1]: 3}
    with pytest.raises(UsageError, match="the plan names other groups than this network has"):
        chosen_units(found, dataclasses.replace(plan, groups=plan.groups[:1]))


def test_frozen_layers_stay_frozen_and_a_network_in_training_is_refitted_as_it_is_used(measured: tuple[nn.Module, Survey]) -> None:
    net, found = measured
    frozen = copy.deepcopy(net)
    frozen[0].requires_grad_(False)
    plan = plan_widths(found, widths={"0": 3})
    small, trained = narrowed(frozen, found, plan), narrowed(frozen.train(), found, plan)
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in trained.state_dict().items())
    assert not trained.training
    assert [small[0].weight.requires_grad, small[2].weight.requires_grad] == [False, True]


def test_goals_and_their_errors(measured: tuple[nn.Module, Survey], tmp_path) -> None:
    _, found = measured
    plan = plan_widths(found, target_macs=0.7, round_to=1)
    assert plan.planned_macs <= 0.7 * plan.macs
    lossless = plan_widths(found, lossless=True, round_to=1)
    assert all(g.planned >= g.needed for g in lossless.groups)
    path = tmp_path / "plan.json"
    path.write_text('{"plan": {"widths": {"0": 4}, "groups": [{"name": "7", "planned": 3}]}}')
    assert plan_widths(found, widths=read_widths(path)).widths["0"] == 4
    for text, reason in (
        ("[", "is not JSON"), ('{"widths": {"0": -1}}', "must hold"), ("{}", "must hold"), ('{"widths": {"0": true}}', "must hold"),
        ('{"widths": {"0": 0}}', "must hold"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_widths(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_widths(tmp_path / "none.json")
    with pytest.raises(UsageError, match="exactly one goal"):
        plan_widths(found, target_macs=0.5, lossless=True)
    for share in (0, 1, 1.5):
        with pytest.raises(UsageError, match=rf"share of MACs to keep, in \(0, 1\), got {share}\."):
            plan_widths(found, target_macs=share)
    with pytest.raises(
        UsageError, match=r"0.001 of the MACs cannot be reached: with every group at its least width 0.\d\d of them remain\.$"
    ):
        plan_widths(found, target_macs=0.001, round_to=1)
    with pytest.raises(UsageError, match=r"remain; a smaller --round-to allows narrower groups\.$"):
        plan_widths(found, target_macs=0.2, round_to=4)
    with pytest.raises(UsageError, match=r"0.001 of the MACs cannot be reached: .* remain\.$"):  # nor with a smaller one
        plan_widths(found, target_macs=0.001, round_to=4)
    unread = dict.fromkeys(("inputs", "outputs"), torch.zeros(4, 2, dtype=torch.float64))
    alone = dataclasses.replace(found.cost, names=("", *found.cost.names[1:]), **unread)
    with pytest.raises(UsageError, match=r"layers of fixed width cost 1.00, most of it the network itself, 2\.$"):
        plan_widths(dataclasses.replace(found, cost=alone), target_macs=0.5)
    tight = plan_widths(found, widths={"0": 1})
    assert tight.groups[0].expected == pytest.approx(found.needed[0]) != 1  # not clipped: one channel for more than one direction
    with pytest.raises(UsageError, match="a group of the plan must be one of 0, 2; got '7'"):
        plan_widths(found, widths={"7": 2})
    with pytest.raises(UsageError, match="the width of 0 must be a whole number of channels above 0, got True"):
        plan_widths(found, widths={"0": True})
    with pytest.raises(UsageError, match=r"would cost [\d,]+ times the MACs of now; give widths of at most 100 times"):
        plan_widths(found, widths={"0": 10_000_000})
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    linear = NetworkCost(  # of a layer with one output
        names=("0",), macs=none[0], params=one[0], biases=none[0], steady=none[0], added=none[0], inputs=none, outputs=one, units=one[0]
    )
    check_growth(linear, [100])
    with pytest.raises(UsageError, match="would cost 101 times the parameters of now"):
        check_growth(linear, [101])
    with pytest.raises(UsageError, match="allocation must be one of loss, saturation"):
        plan_widths(found, target_macs=0.5, allocation="best")  # type: ignore[arg-type]


def test_the_row_of_a_group_tells_its_loss_its_parameters_and_whether_it_would_grow(measured: tuple[nn.Module, Survey]) -> None:
    net, found = measured
    plan = plan_widths(found, widths={"0": 4})
    row, small = plan.groups[0], narrowed(net, found, plan)
    assert row.loss == float(found.paths[0].losses[2]) > 0
    assert row.planned_params == sum(p.numel() for n in (0, 1) for p in small[n].parameters())
    full = dataclasses.replace(found, saturation=(0.9, 0.89))
    assert [g.grow for g in plan_widths(full, lossless=True).groups] == [True, False]
    assert plan_widths(found, widths={}).groups[0].loss == 0


@pytest.mark.parametrize("round_to", [1, 4])
def test_a_printed_plan_is_edited_in_a_row_or_in_widths(measured: tuple[nn.Module, Survey], tmp_path, round_to: int) -> None:
    _, found = measured
    path, printed = tmp_path / "plan.json", plan_widths(found, target_macs=0.7, round_to=round_to).to_dict()
    before = printed["widths"]["0"]
    for row, width, expected in ((1, before, 1), (before, 1, 1), (1, 1, 1), (before, before, before)):
        printed["groups"][0]["planned"], printed["widths"]["0"] = row, width
        path.write_text(json.dumps({"plan": printed}))
        assert read_widths(path) == printed["widths"] | {"0": expected}
    printed["groups"][0]["planned"], printed["widths"]["0"] = 9, 10
    for expected in (printed["groups"][0]["expected"], 0, 5e-324):
        printed["groups"][0]["expected"] = expected
        path.write_text(json.dumps({"plan": printed}))
        with pytest.raises(UsageError, match="gives the group 0 two widths, 9 as its planned and 10 in widths: write the one"):
            read_widths(path)
    printed["groups"][0]["name"] = ["0"]  # no group's name
    path.write_text(json.dumps({"plan": printed}))
    assert read_widths(path) == printed["widths"]
    printed["groups"][0]["planned"] = True
    path.write_text(json.dumps({"plan": printed}))
    with pytest.raises(UsageError, match="whole numbers of channels above 0"):
        read_widths(path)


def test_saturations_of_wide_layers_need_no_more_eigenvalues_than_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 40)), torch.randn(200, 64)
    with torch.no_grad():
        net[0].weight.mul_(1.4 ** -torch.arange(40.0)[:, None])
    with torch.no_grad():
        values = torch.linalg.eigvalsh(torch.cov(net(x).double().T)).flip(0)
    shares = (0.99, float(values[:5].sum() / values.sum()) + 1e-4)  # of all, of which twelve hold 0.9997
    exact = [saturations(net, x, share) for share in shares]
    sides: list[int] = []
    full = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: (sides.append(len(m)), full(m))[1])
    monkeypatch.setattr("capnas.measures.saturation.EXACT_EIGENVALUES", 12)  # they hold the threshold of 0.99, and not nearly everything
    assert [saturations(net, x, share) for share in shares] == exact
    assert sides == [12, 12]
    assert saturations(net, x[:9])["0"] <= 8 / 40  # of the width, also where rows are fewer
    assert sides == [12, 12, 9]


def test_residual_streams_are_narrowed_as_one() -> None:
    net = small_cnn(width=8, depth=2).eval()
    found = survey(net, torch.randn(24, 3, 12, 12))
    stream = found.groups[0]
    assert {p.module for p in stream.writers()} == {"0", "1.conv", "2.conv"}
    plan = plan_widths(found, target_macs=0.5, round_to=1)
    small = narrowed(net, found, plan)
    assert small[0].out_channels == small[2].conv.in_channels == small[2].conv.out_channels == plan.widths["0"] < 8
    assert small(found.images).shape == (24, 3)


def test_norms_behind_their_layers() -> None:
    assert norms_behind(redundant(), torch.randn(2, 2, 8, 8)) == {"0": "1"}
    for inplace in (False, True):
        later = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=inplace), nn.BatchNorm2d(2))
        assert norms_behind(later, torch.randn(2, 1, 2, 2)) == {}
    between = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    assert norms_behind(copy.deepcopy(between), torch.randn(2, 1, 2, 2)) == {}


def batch_norm_net(running: float) -> nn.Sequential:
    """Outputs of a net whose norms think that its inputs vary `running` times as much as they do."""
    net = redundant()
    with torch.no_grad():
        net[1].running_var *= running
        net[1].running_mean += 0.3
    return net


@pytest.mark.parametrize("images", [16, 64])
@pytest.mark.parametrize("running", [1.0, 1e4])
def test_norms_far_from_the_images_stay_where_nothing_is_removed(running: float, images: int) -> None:
    net, x = batch_norm_net(running), torch.randn(images, 2, 8, 8)
    found = survey(net, x)
    small = narrowed(net, found, plan_widths(found, widths={}))
    torch.testing.assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small[1].running_var, net[1].running_var, rtol=1e-4, atol=0)


def test_norms_put_out_on_the_images_what_they_did() -> None:
    net, x = batch_norm_net(9.0), torch.randn(48, 2, 8, 8)
    found = own_channels(survey(net, x))
    small = narrowed(net, found, plan_widths(found, widths={"0": 3}, round_to=1))
    kept = chosen_units(found, plan_widths(found, widths={"0": 3}, round_to=1))["0"]
    before, after = net[:2](x)[:, kept], small[:2](x)
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.var((0, 2, 3)), before.var((0, 2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("eps", "moment"), [(1e-5, torch.var), (0.3, torch.mean)])
def test_a_norm_behind_a_refitted_layer_puts_out_on_the_images_what_it_did(eps: float, moment: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4, eps=eps), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    x = torch.randn(48, 2, 8, 8)
    net.train()(x)
    net.eval()
    found = survey(net, x)
    small = narrowed(net, found, plan_widths(found, widths={"0": 2}, round_to=1))
    assert not torch.allclose(small[:3](x).var((0, 2, 3)), net[:3](x).var((0, 2, 3)), rtol=0.1)
    torch.testing.assert_close(moment(small[:4](x), (0, 2, 3)), moment(net[:4](x), (0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_the_moments_of_a_norm_move_within_bounds() -> None:
    mean, variance = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.8, 0.8, 0.8])
    m, v = moved_norm((mean, variance), (mean + 1, variance), (mean + 1, variance))
    torch.testing.assert_close((m, v), (mean, variance))
    for now, factor in ((torch.zeros(3), 1 / 16), (variance * 1e3, 16.0)):
        _, v = moved_norm((mean, variance), (mean, variance), (mean, now))
        torch.testing.assert_close(v + 1e-5, (variance + 1e-5) * factor)
    wide = {"eps": 0.3}  # beside which the variance is small: what comes out has the variance that it had all the same
    _, v = moved_norm((mean, variance), (mean, variance), (mean, variance * 2), **wide)
    torch.testing.assert_close(variance * 2 / (v + 0.3), variance / (variance + 0.3))
    # what varies by rounding alone says nothing
    _, v = moved_norm((mean, variance), (mean, torch.zeros(3)), (mean, torch.full((3,), 1e-12)))
    torch.testing.assert_close(v, variance)


def test_norms_measured_anew_have_unit_outputs() -> None:
    net, x = batch_norm_net(1e4), torch.randn(48, 2, 8, 8)
    net[1].weight.data.fill_(1)
    net[1].bias.data.zero_()
    measure_norms(net, [x])
    torch.testing.assert_close(net[:2](x).var((0, 2, 3), unbiased=False), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_a_norm_that_is_called_twice_goes_by_its_first_call() -> None:
    norm = nn.BatchNorm2d(1)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x) * 5)

    x = torch.randn(8, 1, 2, 2)
    mean, variance = norm_inputs(Twice(), x)["norm"]
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))


@pytest.mark.slow
def test_a_deep_network_with_fresh_norms_is_narrowed_without_exploding() -> None:
    """Running variances of a few training steps are far above what late layers really vary by."""
    recipe = {"timm": "mobilenetv3_small_100", "args": {"num_classes": 10, "in_chans": 1}, "image_size": 32}
    model, images = build_recipe(recipe, seed=0).train(), torch.randn(32, 1, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    model.eval()
    found = survey(model, images)
    small, x = narrowed(model, found, plan_widths(found, target_macs=0.5)), torch.randn(8, 1, 32, 32)
    with torch.no_grad():
        together, alone = small(x), torch.cat([small(one) for one in x.split(1)])
        assert float(together.abs().max()) < 10 * float(model(x).abs().max())
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_a_layer_that_reads_no_image_is_left_out() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.question, self.ask, self.read = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.read(x.flatten(1) * self.ask(self.question))

    assert set(read_layers(Asks(), ["ask", "read"], torch.randn(8, 2, 2, 2))) == {"read"}


def test_a_layer_that_is_called_twice_is_read_at_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.mix(x.flatten(1)).relu())

    net, x = Twice(), torch.randn(16, 2, 2, 2)
    torch.testing.assert_close(read_layers(net, ["mix"], x)["mix"].outputs, net.mix(x.flatten(1)).detach())
