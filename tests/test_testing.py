from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from cases import Residual, cnn_space, small_cnn
from torch import nn

from capnas.errors import SpaceError
from capnas.spaces import list_spaces
from capnas.testing import check_space, draw

SIZES: dict[str, Any] = {"in_chans": 1, "image_size": 8, "num_classes": 3, "draws": 4}
counter = itertools.count()


def cnn(trial: optuna.Trial, sizes: dict[str, int], **options: Any) -> nn.Module:
    return small_cnn(sizes["num_classes"], sizes["in_chans"], width=trial.suggest_int("width", 4, 16, step=4), **options)


def test_report_of_a_good_space() -> None:
    report = check_space(cnn_space, **{**SIZES, "draws": 8})
    assert (report.name, report.draws) == ("cnn_space", 10)
    assert report.reasons == ("a wide stem needs fewer than 12 channels",), "the highest draw follows the decision that exists only there"
    assert report.feasible < report.draws
    assert 3 < report.distinct <= report.feasible
    smallest, largest = (small_cnn(3, 1, width, depth) for width, depth in ((4, 1), (12, 3)))
    assert report.n_params[0] == sum(p.numel() for p in smallest.parameters()), "all lowest is among the draws"
    assert report.n_params[1] <= sum(p.numel() for p in largest.parameters())
    assert report.macs[0] < report.macs[1]


def test_generators_and_logging_are_left_alone(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.INFO)
    check_space(cnn_space, **SIZES)
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    optuna.logging.set_verbosity(verbosity)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", sorted(list_spaces()))
def test_installed_spaces(name: str) -> None:
    report = check_space(name, num_classes=5, in_chans=1, image_size=28, draws=2)
    assert report.distinct > 1


def wrong_classes(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, {**sizes, "num_classes": 7})


def no_model(trial: optuna.Trial, **sizes: int) -> None:
    trial.suggest_int("width", 1, 2)


def asserts(trial: optuna.Trial, **sizes: int) -> nn.Module:
    assert trial.suggest_int("heads", 1, 3) < 3, "heads must divide the width"
    return cnn(trial, sizes)


def silent(trial: optuna.Trial, **sizes: int) -> nn.Module:
    if trial.suggest_int("heads", 1, 3) == 3:
        raise optuna.TrialPruned
    return cnn(trial, sizes)


def crashes(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, {}, width=2)


def rarely(trial: optuna.Trial, **sizes: int) -> nn.Module:
    if trial.suggest_float("x", 0, 1) > 0.05:
        raise optuna.TrialPruned("x is too large")
    return cnn(trial, sizes)


def python_random(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, sizes, depth=random.randint(1, 9))


def numpy_random(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, sizes, depth=np.random.randint(1, 9))


def torch_random(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, sizes, depth=int(torch.randint(1, 9, (), device="cpu")))


def remembers(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return cnn(trial, sizes, depth=1 + next(counter) % 7)


def tuple_choices(trial: optuna.Trial, **sizes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        depth, _ = trial.suggest_categorical("depths", [(1, 2), (2, 2)])
    return cnn(trial, sizes, depth=depth)


def unserialisable(trial: optuna.Trial, **sizes: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act = trial.suggest_categorical("act", [nn.ReLU, nn.SiLU])
    return nn.Sequential(cnn(trial, sizes), act())


def infinite(trial: optuna.Trial, **sizes: int) -> nn.Module:
    trial.suggest_categorical("most", [float("inf"), 6.0])
    return cnn(trial, sizes)


def asks_more_when_rebuilt(trial: optuna.Trial, **sizes: int) -> nn.Module:
    if isinstance(trial, optuna.trial.FixedTrial):
        trial.suggest_int("more", 1, 2)
    return cnn(trial, sizes)


def asks_less_when_rebuilt(trial: optuna.Trial, **sizes: int) -> nn.Module:
    if not isinstance(trial, optuna.trial.FixedTrial):
        trial.suggest_int("more", 1, 2)
    return cnn(trial, sizes)


class Unseeded(nn.Linear):
    """Its weights do not come from torch's generator."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            generator = torch.Generator()
            generator.seed()
            for parameter in self.parameters():  # what is left as it was allocated may be equal by chance
                parameter.copy_(torch.rand(parameter.shape, generator=generator, device="cpu"))


def unseeded_weights(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return nn.Sequential(cnn(trial, sizes), Unseeded(3, 3))


def needs_large_batches(trial: optuna.Trial, **sizes: int) -> nn.Module:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise ValueError("not\nin training")
            return x

    return nn.Sequential(cnn(trial, sizes), Picky())


def fails_between(trial: optuna.Trial, **sizes: int) -> nn.Module:
    return needs_large_batches(trial, **sizes) if 1 < trial.suggest_int("heads", 1, 99) < 99 else cnn(trial, sizes)


def mixes_batch(trial: optuna.Trial, **sizes: int) -> nn.Module:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(0, keepdim=True)

    return nn.Sequential(cnn(trial, sizes), Mean())


def detached(trial: optuna.Trial, **sizes: int) -> nn.Module:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0

    return nn.Sequential(cnn(trial, sizes), Zero())


def lighter_when_counted(trial: optuna.Trial, **sizes: int) -> nn.Module:
    model = cnn(trial, sizes)
    return model if next(model.parameters()).is_meta else nn.Sequential(model, nn.Identity(), nn.Linear(3, 3))


BROKEN: list[tuple[Callable, str]] = [
    (wrong_classes, r"breaks 1 rule.*the right output: .*outputs of shape \[\(1, 7\)\]"),
    (no_model, r"breaks 1 rule.*must return a torch.nn.Module, got NoneType"),
    (asserts, r"breaks 1 rule.*must raise optuna.TrialPruned: AssertionError: heads must divide the width.*; {'heads': 3}"),
    (silent, r"breaks 1 rule.*optuna.TrialPruned needs a reason: {'heads': 3}"),
    (crashes, r"breaks 1 rule.*building must not fail: KeyError: 'num_classes'; {}"),
    (rarely, r"breaks 1 rule.*at least half of the random draws must be feasible: 0 of 4 are; reasons: \['x is too large'\]"),
    (python_random, r"must not draw from global generators: random was used in the lowest draw"),
    (numpy_random, r"must not draw from global generators: numpy.random was used in the lowest draw"),
    (torch_random, r"the same parameters must give the same architecture: a rebuild differs \(does the space use a global generator"),
    (remembers, r"the same parameters must give the same architecture: a rebuild differs .*or remember earlier calls\?\); {'width': 4}"),
    (tuple_choices, r"breaks 1 rule.*JSON-safe: {'depths': \(1, 2\), 'width': 4} comes back as {'depths': \[1, 2\], 'width': 4}"),
    (unserialisable, r"JSON-safe: Object of type type is not JSON serializable"),
    (infinite, r"breaks 1 rule.*JSON-safe: Out of range float values are not JSON compliant.*; {'most': inf, 'width': 4}"),
    (asks_more_when_rebuilt, r"breaks .*the same architecture: a rebuild fails: .*'more' is not found"),
    (asks_less_when_rebuilt, r"breaks 1 rule.*the same architecture: a rebuild differs .*; {'more': 1, 'width': 4}"),
    (unseeded_weights, r"breaks 1 rule.*the same seed must give the same weights: 1.weight, 1.bias differ"),
    (needs_large_batches, r"breaks 1 rule.*a real forward and backward pass must work: ValueError: not in training"),
    (fails_between, r"breaks 1 rule.*must work: ValueError: not in training; {'heads': \d+"),
    (mixes_batch, r"breaks 1 rule.*must work: .*batch"),
    (detached, r"breaks 1 rule.*no parameter gets a gradient"),
    (lighter_when_counted, r"breaks 1 rule.*the real model must be the one that was counted"),
]


@pytest.mark.parametrize(("space", "message"), BROKEN, ids=[s.__name__ for s, _ in BROKEN])
def test_each_broken_rule_is_named(space: Callable, message: str) -> None:
    states = random.getstate(), str(np.random.get_state())
    with pytest.raises(SpaceError, match=message) as error:
        check_space(space, **SIZES)
    assert (random.getstate(), str(np.random.get_state())) == states
    assert f"the space {space.__name__!r} breaks" in str(error.value)


def test_half_of_the_draws_at_random_are_enough() -> None:
    middle = sum(draw("random", seed).suggest_float("x", 0, 1) for seed in (2, 3)) / 2

    def half(trial: optuna.Trial, **sizes: int) -> nn.Module:
        if trial.suggest_float("x", 0, 1) > middle:
            raise optuna.TrialPruned("x is too large")
        return cnn(trial, sizes)

    report = check_space(half, **{**SIZES, "draws": 2})
    assert (report.draws, report.feasible) == (4, 2)


def test_one_draw_at_random_is_the_least() -> None:
    def never(trial: optuna.Trial, **sizes: int) -> nn.Module:
        raise optuna.TrialPruned("not today")

    with pytest.raises(SpaceError, match="at least half of the random draws must be feasible: 0 of 1 are; reasons"):
        check_space(never, **{**SIZES, "draws": 0})


def test_several_broken_rules_are_all_named() -> None:
    def space(trial: optuna.Trial, **sizes: int) -> nn.Module:
        random.random()
        return wrong_classes(trial, **sizes)

    with pytest.raises(SpaceError, match=r"breaks 2 rules: .*global generators.* \| .*right output"):
        check_space(space, **SIZES)


def test_what_is_not_a_space() -> None:
    with pytest.raises(SpaceError, match=r"must be callable as space\(trial"):
        check_space(Residual)
    with pytest.raises(SpaceError, match=r"Did you mean 'regnet'"):
        check_space("regnets")
