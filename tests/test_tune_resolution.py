"""Resolution tuning: what is known before training, the short runs and their cost, the advice."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from tiny_space import images
from torch import nn

from capnas._timm import import_timm, timm
from capnas.candidates import Infeasible, count_cost
from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.graph.tracing import trace
from capnas.measures import resolution
from capnas.measures.resolution import SizeReading, recommend
from capnas.mixed_sizes import train_together
from capnas.repair import advise
from capnas.resolution import SizeRun, SizeSurvey, _advice, advise_resolution, ladder, survey_resolutions, tune_resolution
from capnas.size_survey import are_sizes, unread_pixels
from capnas.training import TrainConfig, TrainingResult, train

CONFIG = TrainConfig(batch_size=32, lr=1e-2, device="cpu")
LayerNorm2d = import_timm("timm.layers").LayerNorm2d


def net(size: int, depth: int = 3, stride: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, stride, 1), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(24, 3))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(size=16), validation=0.2, test=0.2)


def test_survey_tells_borders_cost_and_what_cannot_be_used() -> None:
    deep = lambda size: net(size, depth=9)  # noqa: E731
    found = {s.size: s for s in survey_resolutions(deep, (16, 6, 12, 3), in_chans=1, budget=500_000)}
    assert list(found) == [3, 6, 12, 16]
    for size, row in found.items():
        assert row.macs == count_cost(deep(size), (1, 1, size, size)).macs
        assert len(row.unproductive) == 9 - (size + 1) // 2  # layer n reads 2 n - 1 pixels
    assert found[3].refusal.startswith("7 of 9 layers see nothing new at 3 px")
    assert found[6].refusal.startswith("6 of 9 layers")
    assert found[12].refusal == ""
    assert "over the budget of 500,000" in found[16].refusal
    only = survey_resolutions(deep, (3, 6), in_chans=1)
    assert [s.refusal for s in only] == ["", ""]  # no larger size would do: the cheaper ones are not ruled out


def test_a_size_at_which_the_network_cannot_run_is_named() -> None:
    wide = lambda size: nn.Sequential(nn.Conv2d(1, 2, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # noqa: E731
    small, large = survey_resolutions(wide, (8, 16), in_chans=1)
    assert small.refusal.startswith("it cannot run at 8 px")
    assert small.macs is None
    assert large.refusal == ""
    with pytest.raises(UsageError, match="no candidate can be used: it cannot run at 8 px"):
        survey_resolutions(wide, (8,), in_chans=1)
    assert small.refusal.endswith("than actual input size")  # no word is cut
    with pytest.raises(UsageError, match=r"different sizes in pixels, got \(8, 8\)"):
        survey_resolutions(wide, (8, 8), in_chans=1)
    with pytest.raises(UsageError, match=r"candidates must be whole numbers from 1 on, .* got \(12\.5, 24\)"):
        survey_resolutions(wide, (12.5, 24), in_chans=1)  # type: ignore[arg-type]
    assert [s.size for s in survey_resolutions(wide, np.array([16, 12]).tolist(), in_chans=1)] == [12, 16]


def test_a_size_that_memory_cannot_hold_is_set_aside(data: ImageData) -> None:
    def large(size: int) -> nn.Module:
        if size == 24:
            raise MemoryError
        return net(size)

    found = survey_resolutions(large, (8, 24), in_chans=1)
    assert [s.refusal for s in found] == ["", "it does not fit into memory at 24 px"]
    reason = "the images do not fit into memory at 5000 px"
    tuned = tune_resolution(net, data, (8, 5000), epochs=4, config=CONFIG, refused={5000: reason})
    assert f"5000 px: not trained, {reason}" in tuned.recommendation.reasons
    assert {r.size for r in tuned.runs} == {8}
    assert tuned.macs_share <= 0.3  # of training the one size that could be


class Dictionary(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = net(size)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.net(x)}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (Dictionary, "the network at 8 px cannot be trained: its output is a dict; wrap it"),
        (lambda size: net(size)[:-2], r"its output has the shape \(2, 6, 4, 1\), expected logits"),
        (lambda size: nn.Sequential(net(size), nn.Linear(3, 2)), "it tells 2 classes apart and the images have 3"),
        (lambda size: net(size).half(), "it does not run on images of shape"),
        (net(8), "build must be a function of the size that gives a network, got a Sequential: lambda size: network"),
    ],
)
def test_what_cannot_be_trained_on_the_images_is_said_before_any_training(data: ImageData, build: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tune_resolution(build, data, (8, 12), config=CONFIG, on_start=lambda: pytest.fail("it trains"))


def test_images_may_be_given_as_load_data_takes_them() -> None:
    arrays, config = images(size=16), dataclasses.replace(CONFIG, seed=1)
    loaded = load_data(arrays, image_size=12)
    refused = {16: "it does not fit"}
    found, expected = (tune_resolution(net, given, (8, 12, 16), epochs=4, config=config, refused=refused) for given in (arrays, loaded))
    assert [r.reading for r in found.runs] == [r.reading for r in expected.runs]
    with pytest.raises(UsageError, match="candidates must be whole numbers from 1 on, different sizes in pixels, got 12"):
        tune_resolution(net, arrays, 12)  # type: ignore[arg-type]


def test_no_size_is_trained_for_longer_than_a_full_training(data: ImageData) -> None:
    build = lambda size: nn.Sequential(nn.Flatten(), nn.Linear(size * size, 3))  # noqa: E731
    found = tune_resolution(build, data, (6, 8, 12), epochs=3, share=1.0, pay=1.0, config=CONFIG)
    assert [(r.size, r.rung) for r in found.runs] == [(6, 1), (8, 1), (12, 1), (6, 2), (8, 2)]  # what 12 px leave would pay for two epochs
    assert max(r.epochs for r in found.readings) == 3
    assert tune_resolution(net, data, (6, 8, 12), epochs=2, share=1.0, config=CONFIG).shared.passes == 2  # two thirds would pay for four


def test_tuning_stays_within_its_share_and_tells_every_run(data: ImageData) -> None:
    told: list[SizeRun] = []
    passes: list[tuple[int, int]] = []
    sizes, before = (6, 8, 12, 16), torch.get_rng_state()
    tell: dict[str, Any] = {"on_start": lambda: passes.append((0, 16)), "on_run": told.append, "on_pass": lambda *n: passes.append(n)}
    found = tune_resolution(net, data, sizes, epochs=20, config=CONFIG, **tell)
    assert torch.equal(torch.get_rng_state(), before)
    assert tuple(told) == found.runs
    assert [r.size for r in found.runs if r.rung == 1] == list(sizes)
    assert len({r.size for r in found.runs if r.rung == 2}) == 2
    macs = {s.size: s.macs for s in found.surveys}
    alone = sum(r.epochs * macs[r.size] for r in found.runs)
    together = sum(seen * macs[size] for size, seen in found.shared.seen.items())
    assert together > alone / 2
    assert (found.shared.passes, found.shared.reason) == (16, "")
    assert passes == [(n, 16) for n in range(17)]
    assert found.macs_share == pytest.approx((alone + together) / (20 * sum(macs.values())))
    assert 0.2 < found.macs_share <= 0.3
    assert 0 < found.seconds_share < 1
    chosen = found.recommendation.size
    assert chosen in {r.size for r in found.runs if r.rung == 2}
    assert {r.epochs for r in found.readings if r.size == chosen} == {1, 1 + next(r.epochs for r in found.runs if r.rung == 2)}
    assert all(r.loss is not None for r in found.readings)
    assert len(found.last(chosen).saturations) == 3
    assert chosen == 6  # every size learns these stripes, and the cheapest will do
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_tuning_and_a_budget_is_kept(data: ImageData) -> None:
    runs = [tune_resolution(net, data, (6, 8, 12), epochs=4, config=CONFIG, budget=60_000) for _ in range(2)]
    assert [r.reading for r in runs[0].runs] == [r.reading for r in runs[1].runs]
    assert {r.size for r in runs[0].runs} == {6, 8}
    assert "over the budget" in runs[0].surveys[-1].refusal
    assert runs[0].recommendation.worth == runs[0].recommendation.fitted  # MACs within a budget cost nothing more
    assert runs[0].macs_share <= 0.3
    macs = {s.size: s.macs for s in runs[0].surveys}
    spent = sum(seen * macs[size] for size, seen in runs[0].shared.seen.items()) + sum(r.epochs * macs[r.size] for r in runs[0].runs)
    assert runs[0].macs_share == pytest.approx(spent / (4 * (macs[6] + macs[8])))  # what it refuses would not be trained


def test_each_size_goes_on_from_the_shared_weights_by_itself(data: ImageData) -> None:
    made: list[nn.Module] = []

    def build(size: int) -> nn.Module:
        made.append(net(size))
        return made[-1]

    found = tune_resolution(build, data, (8, 12), epochs=10, config=CONFIG)
    together = {size: net(size) for size in (8, 12)}
    assert found.shared.passes == train_together(together, data, CONFIG, passes=4).passes == 4
    alone = dataclasses.replace(CONFIG, epochs=found.runs[0].epochs, record=True)
    assert found.runs[0].reading.accuracy == train(copy.deepcopy(together[8]), data, alone, image_size=8).accuracy
    assert all(torch.equal(model[0].weight, net(8)[0].weight) for model in made)  # what build gave is as it was
    per_epoch = {r.size: r.seconds / r.epochs for r in found.runs}
    spent = found.shared.seconds + sum(r.seconds for r in found.runs)
    assert found.seconds_share == pytest.approx(spent / (10 * sum(per_epoch.values())))


def test_a_module_that_build_gives_again_and_again_is_not_trained(data: ImageData) -> None:
    mine = net(8).eval()
    before = copy.deepcopy(mine.state_dict())
    found = tune_resolution(lambda size: mine, data, (8, 12), epochs=10, config=CONFIG)
    assert not mine.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    other = tune_resolution(net, data, (8, 12), epochs=10, config=CONFIG)
    assert [r.reading for r in found.runs] == [r.reading for r in other.runs]


def test_sizes_left_out_are_named(data: ImageData) -> None:
    deep = lambda size: net(size, depth=9)  # noqa: E731
    found = tune_resolution(deep, data, (3, 10, 12, 14, 16), epochs=20, config=CONFIG, budget=600_000)
    assert len(found.left_out) == 3
    reasons = found.recommendation.reasons
    assert any(r.startswith("3 px: not trained, 7 of 9 layers see nothing new at 3 px") for r in reasons)
    assert any(r.startswith("16 px: not trained, ") and r.endswith("over the budget of 600,000") for r in reasons)
    (dropped,) = {10, 12, 14} - {r.size for r in found.runs if r.rung == 2}
    assert f"{dropped} px: dropped after round 1, it was worth less than the others" in reasons
    told = found.to_dict()
    assert (told["left_out"]["3"], told["shared"]["seen"]["12"]) == (found.left_out[3], found.shared.seen[12])
    macs = {s.size: s.macs for s in found.surveys if s.size < 16}  # of those that the budget would let one train, 3 px among them
    spent = sum(seen * macs[size] for size, seen in found.shared.seen.items()) + sum(r.epochs * macs[r.size] for r in found.runs)
    assert (found.macs_share, found.seconds_share) == (pytest.approx(spent / (20 * sum(macs.values()))), None)


def test_sizes_within_a_budget_are_trained_where_the_images_are_larger(data: ImageData) -> None:
    def strided(size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    assert data.image_size > 8
    found = tune_resolution(strided, data, (6, 8, data.image_size), epochs=20, config=CONFIG, budget=2000)
    assert "over the budget" in found.surveys[-1].refusal
    assert sorted(found.shared.seen) == [6, 8]


def test_a_budget_may_be_spent_whole() -> None:
    macs = survey_resolutions(net, (12,), in_chans=1)[0].macs
    assert macs is not None
    assert [s.refusal != "" for s in survey_resolutions(net, (8, 12, 16), in_chans=1, budget=macs)] == [False, False, True]


@pytest.mark.parametrize("error", [ValueError, AssertionError, ZeroDivisionError, Infeasible, optuna.TrialPruned])
def test_a_size_that_a_network_refuses_in_code_is_set_aside(error: type[Exception]) -> None:
    def build(size: int) -> nn.Module:
        if size == 8:
            raise error
        return net(size)

    small, large = survey_resolutions(build, (8, 16), in_chans=1)
    assert (small.refusal, large.refusal) == (f"it cannot run at 8 px: {error.__name__}", "")


def test_a_reason_that_is_a_sentence_ends_in_one_full_stop() -> None:
    def build(size: int) -> nn.Module:
        raise UsageError("it takes 32 px.")

    with pytest.raises(UsageError, match=r"8 px: it takes 32 px; it cannot run at 16 px: it takes 32 px\.$"):
        survey_resolutions(build, (8, 16), in_chans=1)


def test_the_limit_of_idle_layers_is_that_of_the_caller() -> None:
    deep = lambda size: net(size, depth=6)  # noqa: E731
    share = next(s for s in survey_resolutions(deep, (8, 64), in_chans=1, limit=1.0) if s.size == 8)
    idle = len(share.unproductive) / len(share.looking)
    assert 0 < idle < 0.5
    assert [bool(s.refusal) for s in survey_resolutions(deep, (8, 64), in_chans=1, limit=idle)] == [False, False]
    assert [bool(s.refusal) for s in survey_resolutions(deep, (8, 64), in_chans=1, limit=idle - 0.01)] == [True, False]


def test_a_size_is_a_positive_number() -> None:
    assert not are_sizes((0, 8))
    assert not are_sizes((-8,))


class Cutting(nn.Module):
    """Cuts images into patches in its own way."""

    def __init__(self, cut: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.cut, self.five, self.seven, self.up = cut, nn.Conv2d(1, 2, 5, 5), nn.Conv2d(1, 2, 7, 7), nn.ConvTranspose2d(1, 2, 5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cut(self, x)


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (lambda m, x: m.five(x), 3),
        (lambda m, x: m.five(x.reshape(1, 1, 18, 18)), 3),  # still the image
        (lambda m, x: m.five(x[:, :, :16, :16]), 0),  # what is cut off on purpose is no oversight
        (lambda m, x: m.up(x), 0),
        (lambda m, x: m.seven(x).mean() + m.five(x).mean(), 4),
        (lambda m, x: m.five(x.relu()), 0),  # no longer the image itself
        (lambda m, x: nn.functional.conv2d(x, m.five.weight, stride=4), 0),  # not side by side
        (lambda m, x: nn.functional.conv2d(x, m.seven.weight[:, :, :5], stride=(5, 7)), 4),
    ],
)
def test_unread_pixels_are_those_of_the_patches_of_the_image(cut: Any, left: int) -> None:
    assert unread_pixels(trace(Cutting(cut), (1, 1, 18, 18))) == left


def test_patches_with_padding_read_to_the_end() -> None:
    assert [unread_pixels(trace(nn.Conv2d(1, 4, 16, 16, padding=p), (1, 1, 24, 24))) for p in (0, 4)] == [8, 0]


def test_two_layers_that_look_around_are_too_few_to_leave_the_others_out(data: ImageData) -> None:
    found = tune_resolution(lambda size: net(size, depth=2), data, (8,), epochs=4, config=CONFIG)
    assert found.surveys[0].looking == ("0", "2")
    mixed = lambda size: nn.Sequential(nn.Conv2d(1, 6, 1), *net(size, depth=2)[2:3], nn.Flatten(), nn.Linear(6 * size**2, 3))  # noqa: E731
    assert tune_resolution(mixed, data, (8,), epochs=4, config=CONFIG).last(8).layers == ("0", "1")


def test_a_single_size_is_trained_for_its_saturations_only(data: ImageData) -> None:
    found = tune_resolution(net, data, (8, 12, 16), epochs=20, config=CONFIG, budget=60_000)
    assert [(r.size, r.epochs) for r in found.runs] == [(8, 1)]
    assert len(found.last(8).saturations) == 3
    assert found.last(8).layers == ("0", "2", "4")
    assert found.recommendation.reasons[0] == "nothing was compared: 8 px is the only size left"


def test_what_a_guess_gets_is_the_share_of_the_commonest_class() -> None:
    x = np.random.default_rng(0).integers(0, 256, (240, 12, 12), dtype=np.uint8)
    noise = load_data((x, np.arange(240) % 4 // 3), validation=0.2, test=0.2, augment=False)
    found = tune_resolution(net, noise, (8, 12), epochs=4, config=CONFIG)
    assert found.recommendation.reasons[0].startswith("no size is better than a guess (74.4 %)")  # 29 of 39


def tokens(size: int) -> nn.Module:
    given = {"patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2, "in_chans": 1, "num_classes": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=size, **given)


def test_a_network_without_border_is_told_and_so_are_pixels_that_no_patch_covers(data: ImageData) -> None:
    found = tune_resolution(tokens, data, (8, 12, 16, 20), epochs=6, config=CONFIG, refused={20: "too large"})
    assert [s.unread for s in found.surveys] == [0, 4, 0, 4]
    assert all(s.borderless for s in found.surveys)
    reasons = found.recommendation.reasons
    assert "no border: the network mixes all positions" in reasons
    assert "4 of 12 px are not read along each axis: the patches do not fill the image" in reasons
    assert not any("4 of 20 px" in reason for reason in reasons)
    fitted = found.recommendation.fitted
    assert found.surveys[0].macs == found.surveys[1].macs
    assert fitted[8] != fitted[12] or found.last(8).loss == found.last(12).loss
    padded = lambda size: nn.Sequential(nn.ZeroPad2d((0, 4, 0, 4)), nn.Conv2d(1, 4, 8, 8), nn.Flatten())  # noqa: E731
    assert survey_resolutions(padded, (12,), in_chans=1)[0].unread == 0
    assert not survey_resolutions(net, (8,), in_chans=1)[0].borderless


def test_a_tail_of_a_transformer_names_whole_blocks_to_cut() -> None:
    model = tokens(16)
    graph = trace(model, (1, 1, 16, 16))
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    (some,) = advise(model, graph, 16, idle=layers[-6:], layers=layers)
    assert some.layers == ("blocks.3",)  # two layers of the block before it are idle, and two are not
    shorter = copy.deepcopy(model)
    del shorter.blocks[3]
    cost = count_cost(shorter, (1, 1, 16, 16))
    assert (some.macs, some.params) == (cost.macs, cost.params)
    (most,) = advise(model, graph, 16, idle=layers[1:], layers=layers)
    assert most.layers == ("blocks.1", "blocks.2", "blocks.3")
    assert advise(model, graph, 16, idle=layers[-2:], layers=layers) == ()
    assert advise(torch.compile(model, backend="eager"), graph, 16, idle=layers[1:], layers=layers) == (most,)
    with pytest.raises(UsageError, match="among the given layers, got head"):
        advise(model, graph, 16, idle=("head",), layers=layers)


def test_sizes_that_cannot_share_weights_start_from_their_own(data: ImageData) -> None:
    def uneven(size: int) -> nn.Module:
        return nn.Sequential(net(size), nn.Linear(3, 3) if size == 8 else nn.Identity())

    found = tune_resolution(uneven, data, (8, 12), epochs=10, config=CONFIG)
    assert found.shared.reason == "the sizes cannot share weights: 1.weight is (3, 3) at 8 px and absent at 12 px"
    assert (found.shared.passes, {r.epochs for r in found.runs}) == (0, {3})
    assert found.macs_share == pytest.approx(0.3)


def test_a_training_that_fails_drops_its_size(data: ImageData) -> None:
    def broken(size: int) -> nn.Module:
        model = net(size)
        if size == 8:
            nn.init.constant_(model[0].weight, float("nan"))
        return model

    found = tune_resolution(broken, data, (8, 12), epochs=10, config=CONFIG)
    assert found.shared.reason.startswith("the training of shared weights ended: diverged")
    assert {r.status for r in found.runs if r.size == 8} == {"diverged"}
    assert found.recommendation.size == 12
    macs = {s.size: s.macs for s in found.surveys}
    spent = sum(r.epochs * macs[r.size] for r in found.runs if r.status == "complete")  # the other one ended in its first update
    assert found.macs_share == pytest.approx(spent / (10 * sum(macs.values())))
    with pytest.raises(UsageError, match="no size could be trained: diverged"):
        tune_resolution(broken, data, (8,), epochs=4, config=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "a share of 0.3 of 2 epochs does not pay for one epoch of every size: give at least 4 epochs"),
        ({"epochs": 1}, "a share of 0.3 of 1 epoch does not pay"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"share": 0.0}, r"share in \(0, 1\]"),
        ({"budget": 10}, "over the budget of 10"),
        ({"pay": float("nan")}, "pay must be the accuracy that a doubling of MACs has to bring, a number"),
        ({"config": TrainConfig(device="cuda:99"), "on_start": lambda: pytest.fail("it trains")}, "device 'cuda:99' is not here"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(data: ImageData, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tune_resolution(net, data, (8, 12), **{"epochs": 4, "config": CONFIG} | changes)


@pytest.mark.parametrize(("epochs", "passes"), [(5, 0), (8, 3)])
def test_passes_of_one_batch_that_begin_with_the_dearest_size_leave_an_epoch_of_every_size(
    data: ImageData, epochs: int, passes: int
) -> None:
    build = lambda size: net(size, stride=1 if size == 8 else 2)  # noqa: E731
    config = dataclasses.replace(CONFIG, batch_size=data.sizes["train"])
    found = tune_resolution(build, data, (8, 10, 12), epochs=epochs, config=config)
    assert (found.shared.passes, sorted({r.size for r in found.runs})) == (passes, [8, 10, 12])
    assert found.macs_share <= 0.3


def test_advice_predicts_fields_and_cost_of_the_changed_network() -> None:
    wide = lambda size: net(size, depth=6, stride=2)  # noqa: E731
    found = {a.kind: a for a in advise_resolution(wide, 12, in_chans=1)}
    assert list(found) == ["cut", "stride", "size"]
    undone, cut = net(12, depth=6, stride=1), net(12, depth=4, stride=2)
    assert found["stride"].layers == ("0",)
    assert found["stride"].macs == pytest.approx(count_cost(undone, (1, 1, 12, 12)).macs, rel=1e-3)
    assert found["cut"].layers == ("8", "10")
    cost = count_cost(cut, (1, 1, 12, 12))
    assert (found["cut"].macs, found["cut"].params) == (cost.macs, cost.params)
    assert survey_resolutions(lambda s: undone, (12,), in_chans=1)[0].unproductive == ()
    needed = found["size"].size
    assert [len(s.unproductive) for s in survey_resolutions(wide, (needed - 1, needed), in_chans=1)] == [1, 0]
    assert advise_resolution(wide, needed, in_chans=1) == ()


@pytest.mark.parametrize(("size", "layers", "left"), [(10, ("0", "1"), 1), (20, ("1",), 0)])
def test_the_strides_to_undo_are_the_cheapest_of_those_that_leave_least_idle(size: int, layers: tuple[str, ...], left: int) -> None:
    strided = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 2 if n == 0 else 1, 1) for n in range(5)))
    graph = trace(strided, (1, 1, size, size))
    found = {a.kind: a for a in advise(strided, graph, size, idle=("5",))}
    assert (found["stride"].layers, found["stride"].unproductive) == (layers, left)


def test_what_a_layer_keeps_from_a_call_with_gradients_hinders_no_advice() -> None:
    strided = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 2 if n == 0 else 1, 1) for n in range(5)))
    graph = trace(strided, (1, 1, 10, 10))
    expected = advise(strided, graph, 10, idle=("5",))
    strided[1].kept = {"weight": 2 * strided[1].weight}
    assert {"cut", "stride"} <= {a.kind for a in expected}
    assert advise(strided, graph, 10, idle=("5",)) == expected


def test_a_measured_tail_inside_the_border_asks_for_no_larger_image_and_leaves_the_first_layer() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))
    (cut,) = advise(chain, trace(chain, (1, 1, 15, 15)), 15, idle=("0", "1"))
    assert (cut.kind, cut.layers) == ("cut", ("1", "2", "3", "4"))


def staged(size: int, width: int = 4, blocks: int = 3, early: bool = False) -> nn.Module:
    """Blocks that double the width, a dense convolution as a head; with `early` a larger image gets another stride."""
    parts, inputs = [], 1
    for number in range(blocks):
        outputs = width * 2**number
        stride = 2 if early and size > 12 and number == 0 else 1
        parts.append(nn.Sequential(nn.Conv2d(inputs, outputs, 5, stride, 2), nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 5, 1, 2)))
        inputs = outputs
    head = (nn.BatchNorm2d(inputs), nn.AdaptiveAvgPool2d(2), nn.Conv2d(inputs, 6, 2), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(nn.Sequential(*parts), *head)


def test_a_cut_says_which_layers_have_to_be_made_anew_and_what_stays_idle() -> None:
    found = {a.kind: a for a in advise_resolution(staged, 10, in_chans=1)}
    assert found["cut"].layers == ("0.2",)  # the dense convolution 3 sees the whole map and is past the border too
    cost = count_cost(staged(10, blocks=2), (1, 1, 10, 10))
    assert (found["cut"].macs, found["cut"].params) == (cost.macs, cost.params)
    assert "; 1, 3 then read 8 instead of 16 channels and have to be made anew" in found["cut"].text
    left = survey_resolutions(lambda s: staged(s, blocks=2), (10,), in_chans=1)[0].unproductive
    assert found["cut"].unproductive == len(left) > 0
    assert found["cut"].text.endswith(f"; leaves {len(left)} idle")
    single = advise_resolution(lambda s: nn.Sequential(*staged(s, blocks=1)[0][0], *staged(s, width=4, blocks=1)[1:]), 5, in_chans=1)
    assert not any("5" in a.layers for a in single if a.kind == "cut")


def behind_a_cut(*middle: nn.Module, inputs: int = 8, widths: tuple[int, ...] = (4, 8)) -> nn.Module:
    convs = [nn.Conv2d(a, b, 3, 1, 1) for a, b in zip((1, *widths), widths)]
    return nn.Sequential(*convs, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 3))


def test_a_norm_over_the_channels_of_maps_is_made_anew_behind_a_cut() -> None:
    given, norm = behind_a_cut(LayerNorm2d(8)), LayerNorm2d(4)
    (cut,) = (a for a in advise(given, trace(given, (1, 1, 8, 8)), 8, idle=("1",), layers=("0", "1")) if a.kind == "cut")
    cost = count_cost(behind_a_cut(norm, inputs=4, widths=(4,)), (1, 1, 8, 8))
    assert (cut.macs, cut.params) == (cost.macs, cost.params)
    assert "; 2, 5 then read 4 instead of 8 channels" in cut.text


def test_groups_that_do_not_fit_behind_a_cut_have_no_predicted_cost_and_what_stays_idle_is_counted() -> None:
    given = behind_a_cut(nn.Conv2d(8, 16, 3, 1, 1, groups=8), inputs=16)
    assert survey_resolutions(lambda size: given, (2,), in_chans=1)[0].unproductive == ("1", "2")
    (cut,) = (a for a in advise(given, trace(given, (1, 1, 2, 2)), 2, idle=("1",), layers=("0", "1")) if a.kind == "cut")
    assert (cut.layers, cut.macs, cut.params, cut.unproductive) == (("1",), None, None, 1)
    assert cut.text.endswith("at a cost that cannot be predicted; leaves 1 idle")


def test_costs_are_those_of_the_network_as_it_would_be_built() -> None:
    early = lambda size: staged(size, early=True)  # noqa: E731
    size = next(a for a in advise_resolution(early, 12, in_chans=1) if a.kind == "size")
    there = survey_resolutions(early, (size.size,), in_chans=1)[0]
    assert (size.macs, size.unproductive) == (there.macs, len(there.unproductive))
    assert there.unproductive  # at that size the stem strides, and the formula for its size no longer holds
    assert f"{len(there.unproductive)} of {len(there.looking)} layers see nothing new still" in size.text

    def flat(size: int) -> nn.Module:
        convs = [nn.Conv2d(1, 2, 5, 2, 2), *(nn.Conv2d(2, 2, 5, 1, 2) for _ in range(4))]
        return nn.Sequential(*convs, nn.Flatten(), nn.LazyLinear(3))

    def built(size: int) -> nn.Module:
        model = flat(size)
        model(torch.zeros(1, 1, size, size))
        return model

    found = {a.kind: a for a in advise_resolution(built, 12, in_chans=1)}
    assert found["size"].macs == count_cost(built(found["size"].size), (1, 1, *[found["size"].size] * 2)).macs
    assert (found["stride"].macs, found["stride"].params) == (None, None)  # the head does not fit a larger map
    assert found["stride"].text.endswith("at a cost that cannot be predicted")
    (size,) = [a for a in advise(built(12), trace(built(12), (1, 1, 12, 12)), 12, idle=("4",)) if a.kind == "size"]
    assert size.macs is None


def test_a_stride_in_the_code_of_a_network_has_no_predicted_cost() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(1 if i == 0 else 2, 2, 3, 1, 1) for i in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, conv in enumerate(self.convs):
                x = nn.functional.max_pool2d(conv(x), 2) if number == 0 else conv(x)
            return x.mean((2, 3))

    found = {a.kind: a for a in advise_resolution(lambda size: Pooled(), 10, in_chans=1)}
    assert found["stride"].macs is None
    assert found["size"].macs == count_cost(Pooled(), (1, 1, *[found["size"].size] * 2)).macs


class Deaf(nn.Conv2d):
    """Strides by two whatever it is told."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, 2, self.padding)


class Stubborn(nn.Sequential):
    """Pools where its stem may not stride."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem, *others = self
        x = stem(x) if stem.stride == (2, 2) else nn.functional.max_pool2d(stem(x), 2)
        return nn.Sequential(*others)(x)


@pytest.mark.parametrize(
    ("chain", "stem", "advised"), [(nn.Sequential, nn.Conv2d, True), (nn.Sequential, Deaf, True), (Stubborn, nn.Conv2d, False)]
)
def test_a_stride_that_does_not_go_away_has_no_predicted_cost_or_is_not_advised(
    chain: type[nn.Sequential], stem: type[nn.Conv2d], advised: bool
) -> None:
    build = lambda size: chain(stem(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))  # noqa: E731
    found = {a.kind: a for a in advise_resolution(build, 12, in_chans=1)}
    assert ("stride" in found) == advised
    assert not advised or (found["stride"].macs is None) == (stem is Deaf)


def test_a_convolution_behind_the_pooling_may_be_cut() -> None:
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    (cut,) = advise(pooled, trace(pooled, (1, 1, 8, 8)), 8, idle=("2",), layers=("0", "2"))
    assert (cut.kind, cut.layers) == ("cut", ("2",))


def test_candidates_by_themselves_span_two_doublings_either_way() -> None:
    assert ladder(32) == (16, 24, 32, 44, 64)
    assert ladder(3)[0] == 4
    assert len(set(ladder(5))) == len(ladder(5))


def test_networks_that_keep_what_they_compute_between_calls_are_tuned(data: ImageData) -> None:
    def called(size: int) -> nn.Module:
        network = net(size)
        network.bias_cache = {"seen": 2 * next(network.parameters())}  # of a pass with gradients: no copy can be made of it
        return network

    found = tune_resolution(called, data, (6, 8), epochs=20, config=CONFIG)
    assert found.shared.passes
    assert {r.size for r in found.runs} == {6, 8}


def test_advice_is_on_the_layers_of_the_tail() -> None:
    def deep(size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), *(nn.Conv2d(2, 2, 3, 1, 1) for _ in range(4)))

    names = ("0", "1", "2", "3", "4")
    reading = SizeReading(size=12, macs=1, accuracy=0.5, epochs=1, saturations=(0.5, 0.5, 0.5, 0.5, 0.01), layers=names)
    assert next((a.kind, a.layers) for a in _advice(deep, SizeSurvey(size=12), 1, reading)) == ("cut", ("4",))


def test_images_come_in_another_order_in_each_round(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def trains(model: nn.Module, data: ImageData, config: TrainConfig, *, image_size: int) -> TrainingResult:
        seen.append((image_size, config.seed))
        curve = ({"val_loss": 1.0},) * config.epochs
        return TrainingResult(status="complete", accuracy=0.5 + image_size / 100, curve=curve, seconds=1.0)

    asked: dict[str, Any] = {}
    monkeypatch.setattr("capnas.resolution.train", trains)
    monkeypatch.setattr(resolution, "recommend", lambda found, **given: asked.update(given) or recommend(found, **given))
    tune_resolution(net, data, (6, 8, 10, 12), epochs=20, config=CONFIG, budget=10**6, pay=0.01)
    assert asked == {"budget": 10**6, "pay": 0.01, "images": data.sizes["validation"], "chance": data.guess}
    first, second = ([seed for _, seed in part] for part in (seen[:4], seen[4:]))
    assert (set(first), set(second)) == ({CONFIG.seed}, {CONFIG.seed + 1})
