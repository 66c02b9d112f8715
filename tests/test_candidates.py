from __future__ import annotations

import contextlib
import copy
import json
import random
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from cases import cnn_space, small_cnn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from capnas._timm import timm
from capnas.candidates import Infeasible, build_candidate, build_model, count_cost
from capnas.errors import SpaceError, StudyError

SIZES: dict[str, Any] = {"num_classes": 3, "in_chans": 1, "image_size": 8}
PARAMS = {"depth": 2, "width": 8}


def fixed(**params: object) -> optuna.trial.FixedTrial:
    return optuna.trial.FixedTrial(params)


@pytest.mark.parametrize(
    ("model", "gmacs"),
    [
        ("resnet18", 1.814),
        ("efficientnet_b0", 0.386),
        ("convnext_atto", 0.547),
        ("vit_tiny_patch16_224", 1.254),
        ("swin_tiny_patch4_window7_224", 4.491),
    ],
)
def test_published_costs_at_native_size(model: str, gmacs: float) -> None:
    with torch.device("meta"):
        net = timm.create_model(model)
    cost = count_cost(net, (1, 3, 224, 224))
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=6e-4)
    assert cost.params == sum(p.numel() for p in net.parameters())
    assert sum(c.params for c in cost.layers.values()) == cost.params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert cost.macs == counter.get_total_flops() // 2


def test_cost_by_layer_in_closed_form() -> None:
    cost = count_cost(small_cnn(num_classes=3, in_chans=1, width=4), (2, 1, 8, 8))
    layers = {name: (c.params, c.macs) for name, c in cost.layers.items()}
    assert layers == {"0": (40, 2 * 16 * 4 * 9), "1.conv": (144, 2 * 16 * 4 * 36), "1.norm": (8, 0), "5": (15, 2 * 12)}
    assert (cost.params, cost.macs) == (207, sum(macs for _, macs in layers.values()))


def test_shared_weights_count_once_and_calls_count_each() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    cost = count_cost(nn.Sequential(first, second, first), (1, 6))
    assert (cost.params, cost.macs) == (36, 3 * 36)
    assert {n: (c.params, c.macs) for n, c in cost.layers.items()} == {"0": (36, 72), "1": (0, 36)}


def test_candidate_is_what_the_real_model_is() -> None:
    candidate = build_candidate(cnn_space, fixed(**PARAMS), **SIZES)
    model = build_model(cnn_space, PARAMS, **SIZES, seed=1)
    assert candidate.params == PARAMS
    assert (candidate.num_classes, candidate.in_chans, candidate.image_size) == (3, 1, 8)
    assert candidate.n_params == sum(p.numel() for p in model.parameters()) == candidate.cost.params
    assert candidate.macs == count_cost(model, (1, 1, 8, 8)).macs
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.training
    assert candidate.hash == build_candidate(cnn_space, fixed(**PARAMS), **SIZES).hash
    assert candidate.hash != build_candidate(cnn_space, fixed(**PARAMS), **{**SIZES, "image_size": 10}).hash
    assert candidate == copy.deepcopy(candidate)
    json.dumps(candidate.params)


def test_works_with_a_study_and_stores_nothing_but_parameters() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    candidate = build_candidate(cnn_space, trial, **SIZES)
    assert candidate.params == trial.params == study.trials[0].params
    assert study.trials[0].user_attrs == {}


def test_seeds_and_global_generators() -> None:
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    one, again, other = (build_model(cnn_space, PARAMS, **SIZES, seed=s).state_dict() for s in (1, 1, 2))
    build_candidate(cnn_space, fixed(**PARAMS), **SIZES)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), str(np.random.get_state())) == state[1:]
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    with torch.device("meta"):
        assert build_model(cnn_space, PARAMS, **SIZES, seed=1)[0].weight.device.type == "cpu", "a user's default device does not reach it"


def test_pruned_by_the_space() -> None:
    params = {"depth": 3, "width": 12, "wide_stem": True}
    with pytest.raises(Infeasible, match=r"^a wide stem needs fewer than 12 channels$"):
        build_candidate(cnn_space, fixed(**params), **SIZES)
    with pytest.raises(Infeasible, match=r"^a wide stem needs fewer than 12 channels$"):
        build_model(cnn_space, params, **SIZES, seed=0)

    def silent(trial: object, **sizes: int) -> nn.Module:
        raise optuna.TrialPruned

    with pytest.raises(Infeasible, match=r"^pruned by the space without a reason$"):
        build_candidate(silent, fixed(), **SIZES)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("4 stages\n expected"), r"^AssertionError: 4 stages expected$"),
        (ValueError("width"), r"^ValueError: width$"),
        (RuntimeError(), r"^RuntimeError: no message$"),
    ],
)
@pytest.mark.parametrize("where", ["build", "forward"])
def test_failures_of_the_space_have_a_reason(error: Exception, reason: str, where: str) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    def space(trial: object, **sizes: int) -> nn.Module:
        if where == "build":
            raise error
        return Broken()

    with pytest.raises(Infeasible, match=reason):
        build_candidate(space, fixed(), **SIZES)


def test_shapes_that_do_not_fit_are_infeasible() -> None:
    def space(trial: object, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, 4, 3, stride=16), nn.Conv2d(4, num_classes, 7))

    with pytest.raises(Infeasible, match=r"RuntimeError: .*([Kk]ernel size|negative dimension)"):
        build_candidate(space, fixed(), **SIZES)


def test_mistakes_are_not_infeasible() -> None:
    with pytest.raises(
        SpaceError, match=r"the space 'cnn_space' and its trial do not agree: The value of the parameter 'width' is not found"
    ):
        build_model(cnn_space, {"depth": 2}, **SIZES, seed=0)

    def typo(trial: object, **sizes: int) -> nn.Module:
        return undefined  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NameError, match="undefined"):
        build_candidate(typo, fixed(), **SIZES)
    with pytest.raises(SpaceError, match=r"the space 'nothing' must return a torch.nn.Module, got NoneType"):
        build_candidate(nothing, fixed(), **SIZES)
    with pytest.raises(
        SpaceError, match=r"space 'ignores_classes' gives outputs of shape \[\(1, 7\)\] .* expected one of shape \(1, 3\): pass num_classes"
    ):
        build_candidate(ignores_classes, fixed(), **SIZES)

    def exhausted(trial: object, **sizes: int) -> nn.Module:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        build_model(exhausted, {}, **SIZES, seed=0)


@pytest.mark.parametrize(
    ("name", "pretrained", "says"),
    [("resnet18x", False, r"Unknown model \(resnet18x\)"), ("resnet18.nope", True, r"\(nope\) for resnet18")],
)
def test_what_timm_does_not_know_is_a_mistake_of_the_space(name: str, pretrained: bool, says: str) -> None:
    def misspelt(trial: object, **sizes: int) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained)

    with pytest.raises(SpaceError, match=f"the space 'misspelt' asks timm for what it does not know: .*{says}; timm.list_models"):
        build_candidate(misspelt, fixed(), **SIZES)

    def own(trial: object, **sizes: int) -> nn.Module:
        raise RuntimeError("Unknown model (mine)")

    with pytest.raises(Infeasible, match="Unknown model"):
        build_candidate(own, fixed(), **SIZES)


@pytest.mark.parametrize("fails", [False, True])
def test_the_defaults_that_a_space_sets_stay_its_own(fails: bool) -> None:
    def space(trial: optuna.Trial, **sizes: int) -> nn.Module:
        net = cnn_space(trial, **sizes)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        if fails:
            raise ValueError("no such network")
        return net

    try:
        for build in (lambda: build_candidate(space, fixed(**PARAMS), **SIZES), lambda: build_model(space, PARAMS, **SIZES, seed=0)):
            with pytest.raises(Infeasible) if fails else contextlib.nullcontext():
                build()
            assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def test_lazy_layers_need_a_size() -> None:
    def lazy(trial: optuna.trial.BaseTrial, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(in_chans, 2, 3), nn.LazyBatchNorm2d(affine=False), nn.Flatten(), nn.LazyLinear(num_classes))
        if trial.suggest_categorical("called", [True, False]):
            model(torch.zeros(1, in_chans, image_size, image_size))
        return model

    text = "the space 'lazy' returns a model whose lazy layers have no size yet: call the model once on zeros in the space, or give sizes"
    for build in (build_candidate, lambda *a, **sizes: build_model(lazy, {"called": False}, **sizes, seed=0)):
        with pytest.raises(SpaceError, match=text):
            build(lazy, fixed(called=False), **SIZES)
    candidate = build_candidate(lazy, fixed(called=True), **SIZES)
    model = build_model(lazy, {"called": True}, **SIZES, seed=0)
    assert candidate.n_params == sum(p.numel() for p in model.parameters()) == 20 + 72 * 3 + 3


def test_what_optuna_refuses_is_not_the_spaces_fault() -> None:
    grid = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1]}))
    with pytest.raises(StudyError, match=r"^the sampler cannot be used: The parameter name, depth, is .* grid\. Choose another, such as"):
        build_candidate(cnn_space, grid.ask(), **SIZES)

    def chooses(trial: optuna.Trial, **sizes: int) -> nn.Module:
        return nn.Identity() if trial.suggest_categorical("block", ["a", "b"]) == "a" else nn.ReLU()

    study = optuna.create_study()
    study.enqueue_trial({"block": "foo"})
    text = r"^the space 'chooses' and its trial do not agree: parameter 'block': 'foo' not in \('a', 'b'\)\.$"
    with pytest.raises(SpaceError, match=text):
        build_candidate(chooses, study.ask(), **SIZES)

    class Foreign(optuna.samplers.RandomSampler):
        def sample_independent(self, *args: Any) -> Any:
            raise ValueError("numbers ran out")

    with pytest.raises(ValueError, match=r"^numbers ran out$"):
        build_candidate(chooses, optuna.create_study(sampler=Foreign()).ask(), **SIZES)


def nothing(trial: object, **sizes: int) -> None:
    return None


def ignores_classes(trial: object, **sizes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


@pytest.mark.parametrize("ask", ["item", "numpy", "tolist"])
def test_a_space_that_needs_values_is_built_on_the_cpu(ask: str) -> None:
    def space(trial: optuna.trial.BaseTrial, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        rates = torch.linspace(0, 0.1, trial.suggest_int("depth", 1, 3))
        value = {"item": lambda: rates[-1].item(), "numpy": lambda: rates.numpy()[-1], "tolist": lambda: rates.tolist()[-1]}[ask]()
        return small_cnn(num_classes, in_chans, drop=float(value))

    state = torch.get_rng_state()
    candidate = build_candidate(space, fixed(depth=2), **SIZES)
    assert any("Dropout(p=0.1" in str(n.attrs.get("training_only")) for n in candidate.trace.nodes)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_memory_is_taken() -> None:
    def huge(trial: object, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10**6), nn.Linear(10**6, 10**6), nn.Linear(10**6, num_classes))

    candidate = build_candidate(huge, fixed(), **SIZES)
    assert candidate.n_params == 65 * 10**6 + (10**6 + 1) * 10**6 + (10**6 + 1) * 3
    assert candidate.macs == 64 * 10**6 + 10**12 + 3 * 10**6
