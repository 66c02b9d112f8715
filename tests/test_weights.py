from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.graph.tracing import trace
from capnas.measures.excess import distance_to_init
from capnas.weights import InitialWeights, norm_layer_constants, weight_norms


def dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """Largest singular value of the layer as an explicit matrix, by applying it to every basis vector."""
    size = int(np.prod(shape))
    with torch.no_grad():
        bias = layer(torch.zeros(1, *shape))
        columns = (layer(torch.eye(size).reshape(size, *shape)) - bias).reshape(size, -1)
    return float(np.linalg.svd(columns.double().numpy(), compute_uv=False)[0])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6)), (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 7, 7)),
     (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 6)), (nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 7, 7)),
     (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
     (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 4)), (nn.Linear(5, 7), (5,))],
    ids=["plain", "strided", "depthwise", "dilated", "circular", "transposed", "linear"],
)  # fmt: skip
def test_norm_is_that_of_the_map_that_is_used(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer)
    assert weight_norms(model, trace(model, (2, *shape)))["0"].value == pytest.approx(dense_norm(layer, shape), rel=1e-3)


def test_every_layer_of_a_timm_model_in_order() -> None:
    model = timm.create_model("resnet18", channels=(8, 8, 16, 16), layers=(1, 1, 1, 1), num_classes=4)
    norms = weight_norms(model, trace(model, (2, 3, 32, 32)))
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(norms) == sorted(layers)
    assert next(iter(norms)) == "conv1"
    assert all(n.value > 0 for n in norms.values())


def test_motion_of_a_training_leaves_the_weights_where_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    graph = trace(model, (2, 1, 6, 6))
    start = InitialWeights.of(model)
    assert start.distances(model) == {"0": 0.0, "2": 0.0}
    assert start.slack(model, graph) == 1.0
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    moved = {k: v.clone() for k, v in model.state_dict().items()}
    motion = start.motion(model, graph)
    assert all(torch.equal(moved[k], v) for k, v in model.state_dict().items())
    assert motion["2"].norm_end == pytest.approx(3 * motion["2"].norm_start, rel=1e-4)
    assert motion["2"].distance == pytest.approx(2 * motion["2"].radius, rel=1e-5)
    assert motion["0"].distance == pytest.approx(distance_to_init(3 * start.weights["0"], start.weights["0"]))
    assert 0 < start.slack(model, graph) < 0.5


def test_upper_bounds_of_iterated_norms_are_paid_for_on_request() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    graph = trace(model, (1, 16, 14, 14))
    plain, bounded = weight_norms(model, graph)["0"], weight_norms(model, graph, bounded=True)["0"]
    assert plain.method == bounded.method == "power"
    assert plain.value == bounded.value
    assert plain.upper == float("inf")
    assert bounded.value < bounded.upper < 3 * bounded.value


def test_parametrized_layers_have_a_norm_and_a_motion() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    graph, start = trace(model, (2, 4)), InitialWeights.of(model)
    expected = float(np.linalg.svd(model[0].weight.detach().double().numpy(), compute_uv=False)[0])
    assert weight_norms(model, graph)["0"].value == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3)
    motion = start.motion(model, graph)["0"]
    assert (motion.norm_start, motion.norm_end) == pytest.approx((expected, 3 * expected), rel=1e-5)


def test_norm_layers_have_the_constant_of_their_map_in_eval_mode_or_none() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch, self.live, self.broken = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)
            self.group, self.rms, self.unused = nn.GroupNorm(2, 4), nn.RMSNorm(4), nn.BatchNorm1d(4)
            self.tracked = nn.InstanceNorm1d(4, track_running_stats=True)  # reshapes before it divides

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.batch(self.rms(self.group(self.broken(self.live(self.batch(x))))))
            return self.tracked(x[..., None].expand(-1, -1, 2))

    model = Norms()
    torch.nn.init.uniform_(model.batch.weight, -3, 3)
    torch.nn.init.uniform_(model.batch.running_var, 0.1, 5)
    torch.nn.init.constant_(model.broken.running_var, float("nan"))
    found = norm_layer_constants(model, trace(model, (2, 4)))
    batch, tracked = found.pop("batch"), found.pop("tracked")
    assert found == dict.fromkeys(("live", "broken", "group", "rms"))
    assert tracked == pytest.approx(1, abs=1e-5)
    assert batch == pytest.approx(dense_norm(model.batch.eval(), (4,)), rel=1e-6)


def test_layers_that_share_a_weight_share_its_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    held = InitialWeights.of(model).weights
    assert held["0"] is held["1"]
    assert held["2"] is not held["0"]
