from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from reference_excess import matrix_by_loops
from tiny_space import images
from torch import nn

from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.excess import network, training
from capnas.excess.network import Limits, PaperNetwork, paper_network
from capnas.excess.training import Recipe, Run, every_image, train_run

RECIPE = Recipe(epochs=6, batch_size=32, lr=0.2, project_every=5)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(160), in_chans=1, validation=0.2, test=0.2)


def fresh(seed: int = 0) -> PaperNetwork:
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3))
    return paper_network(model, in_chans=1, image_size=8, num_classes=3, seed=seed)


@pytest.fixture(scope="module")
def free(data: ImageData) -> Run:
    return train_run(fresh(), data, recipe=RECIPE)


def test_a_layer_too_wide_to_be_clipped_is_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, weight = fresh().trained[1], torch.randn(8, 6, 3, 3)
    limits = Limits(norm=0.5 * operator.norm(weight), distance=1e9)
    clipped = operator.constrain(weight, weight, limits, sweeps=1)
    monkeypatch.setattr(network, "_WORK", 0)
    torch.testing.assert_close(operator.constrain(weight, weight, limits, sweeps=1), 0.5 * weight)
    assert float((clipped - weight).norm()) < 0.4 * float(weight.norm())


def test_a_run_follows_its_recipe(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    rates, projected, asked, batches = list[float](), list[tuple[Any, ...]](), list[tuple[Any, ...]](), ImageData.batches

    class Told(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    def given(self: ImageData, split: str, batch_size: int, **options: Any) -> Any:
        asked.append((split, batch_size, *(options[name] for name in ("epoch", "seed", "augment"))))
        return batches(self, split, batch_size, **options)

    def project(*_: Any, sweeps: int, exact: bool = False) -> None:
        projected.append((len(rates), sweeps, exact))

    monkeypatch.setattr(torch.optim, "SGD", Told)
    monkeypatch.setattr(ImageData, "batches", given)
    monkeypatch.setattr(training, "_project", project)
    limits = {operator.name: Limits(norm=1e9, distance=1e9) for operator in fresh().trained}
    recipe = Recipe(epochs=2, batch_size=32, lr=0.2, project_every=3, final_sweeps=4)
    train_run(fresh(), data, limits=limits, recipe=recipe, seed=5, device="cpu")
    total = 2 * data.steps("train", 32)
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * step / total)) for step in range(total)])
    assert projected == [*((step, 1, False) for step in range(3, total + 1, 3)), (total, 4, True)]
    assert asked == [("train", 32, epoch, 5, False) for epoch in (0, 1)]


def test_constraints_hold_after_training_as_recomputed_from_definitions(data: ImageData, free: Run) -> None:
    assert free.train_error < 0.2, "the task can be learnt"
    start = {name: w.clone() for name, w in fresh().model.state_dict().items()}
    limits = {s.name: Limits(norm=0.4 * s.norm, distance=0.3 * s.distance) for s in free.layers}
    network = fresh()
    run = train_run(network, data, limits=limits, factors=(0.4, 0.3), recipe=RECIPE)
    for name, stride, side in (("0", 1, 8), ("3", 2, 8)):
        weight = network.model.state_dict()[name + ".weight"]
        outputs = [side // stride] * 2
        numbers = {"stride": stride, "before": 1, "outputs": outputs, "dilation": 1, "groups": 1}
        exact, initial = (
            float(np.linalg.svd(matrix_by_loops(w.double().numpy(), [side, side], mode="zeros", **numbers), compute_uv=False)[0])
            for w in (weight, start[name + ".weight"])
        )
        assert exact <= limits[name].norm * (1 + 1e-6)
        scale = min(1.0, limits[name].norm / next(s.norm_start for s in free.layers if s.name == name))
        moved = (weight - scale * start[name + ".weight"]).double().numpy()
        travelled = sum(math.sqrt(sum(x * x for x in group)) for group in np.moveaxis(moved, 1, -1).reshape(-1, moved.shape[1]))
        assert travelled <= limits[name].distance * (1 + 1e-4)
        assert travelled > 0.5 * limits[name].distance or exact > 0.5 * limits[name].norm, "the constraint is at work"
        state = next(s for s in run.layers if s.name == name)
        assert exact <= state.norm * (1 + 1e-6) <= limits[name].norm * (1 + 2e-6)
        assert state.distance == pytest.approx(travelled, rel=1e-3)
        assert initial <= next(s.norm_start for s in free.layers if s.name == name) * (1 + 1e-6)
    head = next(s for s in run.layers if s.name == "6")
    assert (head.norm_limit, head.distance) == (None, 0.0)
    assert head.norm == pytest.approx(math.sqrt(3 / 2))


def test_errors_and_margins_are_those_of_the_network_that_is_left(data: ImageData) -> None:
    network = fresh()
    run = train_run(network, data, recipe=Recipe(epochs=1, batch_size=32, lr=0.05))
    for split, error in (("train", run.train_error), ("validation", run.validation_error)):
        wrong, gaps, losses = 0, [], []
        for x, y in every_image(data, split, "cpu"):
            logits = network.model(x).detach().double().numpy()
            for row, label in zip(logits, y.tolist()):
                others = np.delete(row, label).max()
                wrong += row[label] <= others
                gaps.append(row[label] - others)
                losses.append(math.log(np.exp(row).sum()) - row[label])
        assert len(gaps) == data.sizes[split], "no image is left out"
        assert error == pytest.approx(wrong / len(gaps))
        if split == "train":
            right = sorted(g for g in gaps if g > 0)
            assert run.margin == pytest.approx(right[(len(right) - 1) // 2])
            assert run.least_margin == pytest.approx(min(gaps))
            assert run.train_loss == pytest.approx(np.mean(losses))


def test_equal_logits_are_errors(data: ImageData) -> None:
    found = training._measure(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).apply(nullify), data, torch.device("cpu"), None)
    assert (found.train_error, found.validation_error, found.margin, found.least_margin) == (1.0, 1.0, None, 0.0)


def nullify(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.zeros_(parameter)


def test_limits_that_nothing_reaches_change_nothing_and_a_seed_replays(data: ImageData, free: Run) -> None:
    network, state = fresh(), torch.get_rng_state()
    wide = {s.name: Limits(norm=100 * s.norm, distance=100 * s.distance) for s in free.layers}
    again = train_run(network, data, limits=wide, recipe=RECIPE)
    assert torch.equal(state, torch.get_rng_state())
    assert [(s.norm, s.distance) for s in again.layers] == [(s.norm, s.distance) for s in free.layers]
    assert (again.train_error, again.margin) == (free.train_error, free.margin)
    other = train_run(fresh(), data, recipe=RECIPE, seed=1)
    assert [s.distance for s in other.layers] != [s.distance for s in free.layers]


def test_a_training_that_diverges_says_so(data: ImageData) -> None:
    run = train_run(fresh(), data, recipe=Recipe(epochs=2, batch_size=32, lr=1e9))
    assert (run.status, run.train_error, run.validation_error, run.margin) == ("diverged", 1.0, 1.0, None)


def test_a_run_comes_back_from_json_types(free: Run) -> None:
    assert Run.from_dict(free.to_dict()) == free


def test_recipes_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="project_every must be at least 1, got 0"):
        Recipe(project_every=0)
    with pytest.raises(UsageError, match="lr must be positive"):
        Recipe(lr=float("nan"))
