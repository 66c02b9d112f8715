from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from capnas.errors import UsageError
from capnas.measures.excess import WeightLayer, capacity_bounds, chain, distance_to_init, group_norm_21, margins
from capnas.measures.operator_norms import linear_norm
from capnas.measures.slack import LayerMotion, capacity_slack, first_order_slack, slack_decades

LAYERS = [
    LayerMotion(norm_start=1.0, norm_end=1.2, distance=0.5, radius=5.0),
    LayerMotion(norm_start=2.0, norm_end=1.5, distance=2.0, radius=8.0),
    LayerMotion(norm_start=0.7, norm_end=0.9, distance=0.1, radius=3.0),
]


def test_decades_are_those_between_two_bounds_of_the_theorem_where_norms_stay() -> None:
    still = [replace(layer, norm_start=layer.norm_end) for layer in LAYERS]

    def club(distances: list[float]) -> float:
        layers = [WeightLayer(norm=m.norm_end, distance=b, weights=100) for m, b in zip(still, distances)]
        return capacity_bounds(chain(layers), data_norm=1e6, samples=100, margin=1e-9).club  # so large that ceilings and 4/n vanish

    decades = club([m.radius for m in still]) - club([m.distance for m in still])
    assert slack_decades(still) == pytest.approx(decades, abs=1e-6)


def test_growth_counts_by_its_geometric_mean_and_shrinking_norms_earn_nothing() -> None:
    still = [replace(layer, norm_start=layer.norm_end) for layer in LAYERS]
    growth = math.log10(1.2 * 0.9 / 0.7) / 3
    assert slack_decades(still) - slack_decades(LAYERS) == pytest.approx(growth)
    assert slack_decades([*still, *still]) == pytest.approx(slack_decades(still)), "depth alone changes nothing"


@pytest.mark.parametrize("change", [{"distance": 3.0}, {"norm_start": 0.1}, {"radius": 1.0}])
def test_slack_falls_with_distance_and_growth_and_with_a_smaller_class(change: dict[str, float]) -> None:
    worse = [replace(LAYERS[0], **change), *LAYERS[1:]]
    assert capacity_slack(worse) < capacity_slack(LAYERS)


def test_slack_has_its_stated_range_and_landmarks() -> None:
    layer = LayerMotion(norm_start=1.0, norm_end=1.0, distance=0.0, radius=1.0)
    assert capacity_slack([layer]) == 1.0
    assert capacity_slack([replace(layer, distance=1.0)]) == pytest.approx(0.5)
    assert capacity_slack([replace(layer, distance=9.0)]) == pytest.approx(0.1)
    assert capacity_slack([replace(layer, distance=1e300, radius=1e-300)]) == pytest.approx(0.0, abs=1e-300)
    assert capacity_slack([replace(layer, distance=1.0, radius=0.0)]) == 0.0
    assert capacity_slack(LAYERS, fit=0.5) == pytest.approx(capacity_slack(LAYERS) / 2)
    dead = LayerMotion(norm_start=1.0, norm_end=0.0, distance=1.0, radius=1.0)
    assert capacity_slack([*LAYERS, dead]) == capacity_slack(LAYERS)


def test_slack_does_not_depend_on_the_unit_of_a_layer() -> None:
    scaled = [
        LayerMotion(norm_start=7 * m.norm_start, norm_end=7 * m.norm_end, distance=7 * m.distance, radius=7 * m.radius) for m in LAYERS[:1]
    ]
    assert slack_decades([*scaled, *LAYERS[1:]]) == pytest.approx(slack_decades(LAYERS))


def test_a_longer_training_leaves_less() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    layers = [model[0], model[2]]
    init = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    slack = []
    for step in range(200):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 20, 199):
            motions = [
                LayerMotion(
                    norm_start=linear_norm(w0).value,
                    norm_end=linear_norm(layer.weight).value,
                    distance=distance_to_init(layer.weight, w0),
                    radius=group_norm_21(w0),
                )
                for layer, w0 in zip(layers, init)
            ]
            slack.append(capacity_slack(motions))
    assert 1 > slack[0] > slack[1] > slack[2] > 0


def test_first_order_share_is_the_least_for_a_linear_network() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5).double(), torch.randint(0, 2, (40,))  # two classes: margins are linear in the weight
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    mean = margins(x @ weight.T, y).mean()
    (gradient,) = torch.autograd.grad(mean, weight)
    weight, mean = weight.detach(), mean.detach()
    margin = 0.8
    slack = first_order_slack([weight], [gradient], margin=margin)
    share = 1 / slack - 1
    best = torch.zeros_like(gradient)
    row = int(gradient.norm(dim=1).argmax())
    best[row] = gradient[row] / gradient[row].norm() * share * group_norm_21(weight)  # all the distance on the steepest group
    assert float(margins(x @ (weight + best).T, y).mean() - mean) == pytest.approx(margin), "the share reaches the margin"
    for _ in range(100):
        step = torch.randn_like(gradient)
        step *= share * group_norm_21(weight) / group_norm_21(step)
        assert float(margins(x @ (weight + step).T, y).mean() - mean) <= margin + 1e-12, "and no other step of its length passes it"


def test_first_order_slack_grows_with_gradients_and_falls_with_the_margin() -> None:
    weights, gradients = [torch.randn(3, 4), torch.randn(2, 3, 3, 3)], [torch.randn(3, 4), torch.randn(2, 3, 3, 3)]
    base = first_order_slack(weights, gradients)
    assert 0 < base < 1
    assert first_order_slack(weights, [2 * g for g in gradients]) > base
    assert first_order_slack(weights, gradients, margin=2.0) < base
    assert first_order_slack([2 * w for w in weights], [g / 2 for g in gradients]) == pytest.approx(base), "a scale moved between layers"
    assert first_order_slack(weights, [0 * g for g in gradients]) == 0.0


def test_unusable_input_is_named() -> None:
    with pytest.raises(UsageError, match="at least one layer with a norm above 0"):
        capacity_slack([])
    with pytest.raises(UsageError, match="finite and not negative; got LayerMotion"):
        slack_decades([replace(LAYERS[0], distance=math.nan)])
    with pytest.raises(UsageError, match=r"fit must be in \[0, 1\]; got 1.5"):
        capacity_slack(LAYERS, fit=1.5)
    with pytest.raises(UsageError, match="margin must be positive; got 0"):
        first_order_slack([torch.ones(1, 1)], [torch.ones(1, 1)], margin=0)
    with pytest.raises(UsageError, match="must match in number and shapes"):
        first_order_slack([torch.ones(1, 1)], [torch.ones(1, 2)])
    with pytest.raises(UsageError, match="weights and gradients must be finite"):
        first_order_slack([torch.ones(1, 1)], [torch.full((1, 1), math.nan)])
