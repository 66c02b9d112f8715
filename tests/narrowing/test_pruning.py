from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_space import FILE, images
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.prune import l1_unstructured

from capnas.candidates import count_cost
from capnas.data import Augment, ImageData, load_data
from capnas.errors import CapnasError, MissingDependencyError, UsageError
from capnas.narrowing import CannotNarrow, narrowed, pruning
from capnas.narrowing.planning import plan_widths
from capnas.narrowing.pruning import PruneConfig, calibration_images, pretrain, propose, prune
from capnas.narrowing.survey import saturations, survey
from capnas.saved import build_recipe
from capnas.training import evaluate

RECIPE = {"space": FILE, "params": {"width": 8, "depth": 3, "kind": "plain"}, "num_classes": 3, "in_chans": 1, "image_size": 8}
CALM: dict[str, Any] = {"device": "cpu", "images": 64}
SHORT: dict[str, Any] = CALM | {"round_to": 1}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(360), validation=0.2, test=0.2, augment=Augment(flip=False, shift=0))


@pytest.fixture(scope="module")
def trained(data: ImageData) -> torch.nn.Module:
    return pretrain(build_recipe(RECIPE), data, PruneConfig(target_macs=0.5, train_epochs=25, **SHORT), image_size=8)


def test_calibration_images_are_drawn_by_the_seed(data: ImageData) -> None:
    first, other = (calibration_images(data, 16, 8, seed=seed, device=torch.device("cpu")) for seed in (0, 1))
    assert torch.equal(first, data.probe(16, seed=0)[0])
    assert torch.equal(other, data.probe(16, seed=1)[0])
    assert not torch.equal(first, other)


def test_a_plan_tells_what_each_group_costs_and_loses() -> None:
    wise = nn.Conv2d(6, 6, 3, groups=6)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), wise, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    found = survey(net, torch.randn(64, 1, 8, 8))
    row = plan_widths(found, widths={"0": 2}).groups[0]
    layers = count_cost(net, (1, 1, 8, 8)).layers
    assert row.loss == float(found.paths[0].losses[4]) != float(found.paths[0].losses[2])  # of the four that go
    assert (row.macs, row.params) == tuple(getattr(layers["0"], what) + getattr(layers["2"], what) for what in ("macs", "params"))
    assert row.planned_macs == pytest.approx(row.macs / 3, abs=1)


def test_half_the_macs_keep_the_accuracy_and_the_network_is_left_alone(trained: torch.nn.Module, data: ImageData) -> None:
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    accuracy = evaluate(trained, data, "validation")["accuracy"]
    assert accuracy > 0.8
    said: list[str] = []
    result = prune(trained, data, PruneConfig(target_macs=0.5, finetune_epochs=1, **SHORT), say=said.append)
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    report = result.report
    assert report["macs"]["after"] <= 0.5 * report["macs"]["before"]
    assert report["macs"]["after"] == result.plan.planned_macs
    assert report["accuracy"]["before"] == pytest.approx(accuracy)
    assert report["accuracy"]["pruned"] > accuracy - 0.1
    assert set(report["accuracy"]) == {"before", "pruned", "finetuned"}
    assert all(t["after"] > 0 for t in report["latency_ms"].values())
    assert list(report["latency_ms"]) == ["batch 1", "batch 64"]
    assert any("without training" in line for line in said)
    assert not any("start as copies" in line or "warning" in line for line in said)
    assert set(report["saturation"]) == {"before", "after"}
    assert all(0 < value <= 1 for state in report["saturation"].values() for value in (state["mean"], state["evenness"]))
    assert report["saturation"]["after"]["mean"] > report["saturation"]["before"]["mean"]
    shares = saturations(trained, calibration_images(data, 64, 8, seed=0, device=torch.device("cpu")))
    assert shares.popitem()[0] == str(len(trained) - 1)  # of the head, which is left out
    assert report["saturation"]["before"]["mean"] == pytest.approx(sum(shares.values()) / len(shares))
    assert report["params"]["after"] == result.plan.planned_params
    assert 0 < report["outputs"]["after"] < 10 * report["outputs"]["before"]


def test_low_rank_and_lossless(trained: torch.nn.Module, data: ImageData) -> None:
    split = prune(trained, data, PruneConfig(target_macs=0.7, method="lowrank", **CALM))
    assert split.report["macs"]["after"] <= 0.7 * split.report["macs"]["before"]
    exact = prune(trained, data, PruneConfig(lossless=0.99, **SHORT))
    assert exact.report["accuracy"]["pruned"] > exact.report["accuracy"]["before"] - 0.1


def test_only_a_plan_that_grows_speaks_of_copies(trained: torch.nn.Module, data: ImageData) -> None:
    for width, expected in ((12, True), (4, False)):
        said: list[str] = []
        prune(trained, data, PruneConfig(widths={"0": width}, **SHORT), say=said.append)
        assert any("start as copies" in line for line in said) is expected


def test_outputs_that_explode_are_named_and_broken_ones_refused(
    trained: torch.nn.Module, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(factor: float) -> Any:
        def make(*args: Any, **options: Any) -> torch.nn.Module:
            small = narrowed(*args, **options)
            with torch.no_grad():
                small[-1].weight.mul_(factor)
            return small

        return make

    said: list[str] = []
    monkeypatch.setattr(pruning, "narrowed", spoilt(1e4))
    prune(trained, data, PruneConfig(target_macs=0.5, **SHORT), say=said.append)
    assert any("warning: on validation images the narrowed network puts out up to" in line for line in said)
    monkeypatch.setattr(pruning, "narrowed", spoilt(float("inf")))
    with pytest.raises(CapnasError, match="puts out NaN or infinity on images it was not corrected on"):
        prune(trained, data, PruneConfig(target_macs=0.5, **SHORT))


@pytest.mark.parametrize(
    ("goal", "size", "reason"),
    [
        ({"widths": {"layer1": 4}}, 8, "a group of the plan must be one of 0, 2, 4; got 'layer1'"),
        ({"widths": {"0": 10_000_000}}, 8, "times the MACs of now"),
        ({"target_macs": 0.001}, 8, r"0\.001 of the MACs cannot be reached: with every group at its least width 0\.\d\d of them remain"),
        ({"target_macs": 0.5}, 0, r"cannot narrow this Sequential: it does not run on images of shape \(2, 1, 2, 2\)"),
        ({"target_macs": 0.5, "method": "lowrank"}, 0, "cannot narrow this Sequential: it does not run"),
    ],
)
def test_what_cannot_come_true_is_refused_before_training(
    goal: dict[str, Any], size: int, reason: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "train", lambda *args, **options: pytest.fail("trained"))
    model = build_recipe(RECIPE) if size else nn.Sequential(nn.MaxPool2d(4), build_recipe(RECIPE))
    with pytest.raises(CapnasError, match=reason):
        pretrain(model, data, PruneConfig(**goal, train_epochs=1), image_size=size or 2)


def test_a_masked_network_is_refused_in_a_line(data: ImageData) -> None:
    masked = build_recipe(RECIPE)
    l1_unstructured(masked[0], "weight", 0.5)
    for method in ("channels", "lowrank"):
        with pytest.raises(CannotNarrow, match=r"0\.weight is computed from other tensors"):
            prune(masked, data, PruneConfig(target_macs=0.5, method=method, **CALM))


class Wrapped(torch.nn.Module):
    """A network that hands its logits on in some other way."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net, self.change = build_recipe(RECIPE), change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.net(x))


def broken(model: Any) -> torch.nn.Module:
    model[0].bias.data.fill_(-float("inf"))  # behind which its rectifier puts out zeros
    return model


@pytest.mark.parametrize("method", ["channels", "lowrank"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build_recipe(RECIPE).half(), "0.weight is torch.float16 and the images are torch.float32"),
        (lambda: Wrapped(lambda y: {"out": y}), "its output is a dict; wrap it"),
        (lambda: Wrapped(lambda y: y[:, :, None, None]), r"its output has the shape \(2, 3, 1, 1\), expected logits"),
        (lambda: Wrapped(lambda y: y[:, :2]), "it tells 2 classes apart and the images have 3"),
        (lambda: Wrapped(lambda y: y + torch.rand_like(y)), "its outputs are random in eval mode"),
        (lambda: Wrapped(lambda y: y + float("inf")), "its outputs are not finite on the images"),
        (lambda: broken(build_recipe(RECIPE)), "0.bias holds NaN or infinity; give weights of a training that did not diverge"),
        (lambda: torch.nn.Sequential(torch.nn.LazyConv2d(4, 3)), "0.weight has no shape yet; run the lazy network on one batch first"),
    ],
)
def test_what_is_no_classifier_of_the_images_is_refused_before_it_is_measured(make: Any, reason: str, method: Any, data: ImageData) -> None:
    with pytest.raises(CannotNarrow, match=reason):
        prune(make(), data, target_macs=0.5, method=method, **CALM)


def test_a_parametrized_weight_is_named_with_what_makes_it_a_parameter(data: ImageData) -> None:
    model = build_recipe(RECIPE)
    weight_norm(model[0])
    with pytest.raises(CannotNarrow, match=r"0\.weight is computed by a parametrization; .*remove_parametrizations\(.*\"0\"\), \"weight\""):
        prune(model, data, target_macs=0.5, **CALM)
    assert prune(model, data, target_macs=0.7, method="lowrank", **CALM).report["macs"]["after"] > 0
    remove_parametrizations(model[0], "weight")
    assert prune(model, data, target_macs=0.7, **CALM).report["macs"]["after"] > 0


def test_a_network_without_parameters_is_refused_in_a_line(data: ImageData) -> None:
    with pytest.raises(CapnasError, match="cannot narrow this Sequential"):
        prune(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 3)), torch.nn.Flatten()), data, target_macs=0.5, **CALM)


def test_images_may_be_given_as_load_data_takes_them(trained: torch.nn.Module, data: ImageData) -> None:
    arrays = images(360)
    found = prune(trained, arrays, target_macs=0.6, **SHORT)
    assert found.report["validation_images"] == load_data(arrays).sizes["validation"]
    assert propose(trained, arrays, PruneConfig(target_macs=0.6, **SHORT)).to_dict() == found.plan.to_dict()


@pytest.mark.parametrize("method", ["channels", "lowrank"])
def test_torch_s_generator_is_where_it_was_and_the_weights_can_be_saved(trained: torch.nn.Module, data: ImageData, method: Any) -> None:
    before = torch.get_rng_state()
    found = prune(trained, data, target_macs=0.7, method=method, finetune_epochs=1, **CALM)
    assert torch.equal(torch.get_rng_state(), before)
    assert safetensors.torch.save(found.model.state_dict())  # refuses tensors in another memory format


def test_all_that_is_drawn_goes_by_the_seed(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[str, int] = {}
    for name in ("survey", "narrowed", "calibration_images", "train"):

        def spy(name: str, real: Any, *args: Any, **options: Any) -> Any:
            seeds[name] = options["seed"] if name != "train" else args[2].seed
            return real(*args, **options)

        monkeypatch.setattr(pruning, name, partial(spy, name, getattr(pruning, name)))
    prune(build_recipe(RECIPE), data, target_macs=0.5, finetune_epochs=1, seed=7, **SHORT)
    assert seeds == dict.fromkeys(("calibration_images", "survey", "narrowed", "train"), 7)
    pretrain(build_recipe(RECIPE), data, PruneConfig(target_macs=0.5, train_epochs=1, seed=8, **SHORT), image_size=8)
    assert seeds["train"] == 8


def test_images_of_another_size_have_it_in_every_step(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[str, int]] = []
    for name in ("calibration_images", "evaluate", "train"):

        def spy(name: str, real: Any, *args: Any, **options: Any) -> Any:
            sizes.append((name, options["image_size"] if name != "calibration_images" else args[2]))
            return real(*args, **options)

        monkeypatch.setattr(pruning, name, partial(spy, name, getattr(pruning, name)))
    found = prune(build_recipe(RECIPE), data, target_macs=0.5, finetune_epochs=1, image_size=10, **SHORT)
    assert sizes == [("calibration_images", 10), ("evaluate", 10), ("evaluate", 10), ("train", 10)]
    assert found.report["macs"]["before"] == found.plan.macs == count_cost(build_recipe(RECIPE), (1, 1, 10, 10)).macs


@pytest.mark.parametrize("method", ["channels", "lowrank"])
def test_lossless_is_the_share_that_was_given(trained: torch.nn.Module, data: ImageData, method: Any) -> None:
    plans = [propose(trained, data, PruneConfig(lossless=share, method=method, **CALM)) for share in (0.5, 0.99)]
    assert [f"{share:g} of its variance" in plan.goal for plan, share in zip(plans, (0.5, 0.99))] == [True, True]
    few, many = ([group.needed for group in plan.groups] for plan in plans)
    assert sum(few) < sum(many)


def test_large_images_are_fewer(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(calibration_images(data, 50, 8, seed=0, device=torch.device("cpu"))) == 50
    monkeypatch.setattr(pruning, "_PIXELS", 23 * 8 * 8)
    assert len(calibration_images(data, 50, 8, seed=0, device=torch.device("cpu"))) == 23


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "exactly one goal: target_macs, lossless or widths"),
        ({"target_macs": 0.5, "lossless": 0.9}, "exactly one goal"),
        ({"target_macs": 0.5, "method": "magic"}, "method must be one of channels, lowrank"),
        ({"widths": {"0": 1}, "method": "lowrank"}, "a plan of widths is for the method channels"),
        ({"lossless": 1.5}, r"in \(0, 1\), got 1.5"),
        ({"target_macs": 0.5, "images": 2}, "at least 16 images, got 2"),
        ({"target_macs": 0.5, "finetune_epochs": -1}, "must not be negative"),
        ({"target_macs": 0.5, "train": {"lrr": 0.1}}, "Did you mean 'lr'"),
        ({"target_macs": 0.5, "train": {"lr": -1.0}}, "lr must be finite and not negative"),
        ({"target_macs": 0.5, "allocation": "bogus"}, "allocation must be one of loss, saturation; got 'bogus'"),
        ({"target_macs": 0.5, "round_to": 0}, "round_to must be at least 1, got 0"),
        ({"widths": {"0": 1}, "round_to": 4}, "carried out as it is: leave out --round-to"),
        ({"widths": {"0": 1}, "allocation": "saturation"}, "give --target-macs, or leave out --allocation"),
        ({"lossless": 0.9, "allocation": "saturation"}, "give --target-macs, or leave out --allocation"),
        ({"target_macs": "0.5"}, "target_macs must be a number or none, got '0.5'"),
        ({"target_macs": 0.5, "images": 64.5}, "images must be a whole number, got 64.5"),
        ({"target_macs": 0.5, "method": "lowrank", "round_to": 4}, "allocation and round_to are for the method channels"),
        ({"target_macs": 0.5, "method": "lowrank", "allocation": "saturation"}, "allocation and round_to are for the method channels"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        PruneConfig(**options)


def test_fresh_weights_are_trained_first(data: ImageData) -> None:
    with pytest.raises(UsageError, match=r"no trained weights.*give --train-epochs N"):
        pretrain(build_recipe(RECIPE), data, PruneConfig(target_macs=0.5), image_size=8)


def test_a_training_that_diverges_says_how_it_may_not(data: ImageData) -> None:
    config = PruneConfig(target_macs=0.5, train_epochs=1, train={"lr": 1e9, "warmup_epochs": 0, "clip_grad": None}, device="cpu")
    with pytest.raises(CapnasError, match=r"training ended as diverged: .*; give a lower learning rate than 1e\+09: --train lr=1e\+08\.$"):
        pretrain(build_recipe(RECIPE), data, config, image_size=8)


def test_without_torch_pruning_the_extra_is_named(trained: torch.nn.Module, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'capnas\[prune\]'"):
        prune(trained, data, PruneConfig(target_macs=0.5, **SHORT))


@pytest.mark.parametrize("method", ["channels", "lowrank"])
def test_a_compiled_network_is_narrowed_as_it_was_before(trained: torch.nn.Module, data: ImageData, method: Any) -> None:
    settings: dict[str, Any] = CALM | {"target_macs": 0.7, "method": method}
    expected, found = (prune(m, data, **settings) for m in (trained, torch.compile(trained, backend="eager")))
    assert found.plan.to_dict() == expected.plan.to_dict()
    assert found.model.state_dict().keys() == expected.model.state_dict().keys()
