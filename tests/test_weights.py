from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.graph.tracing import trace
from capnas.measures.excess import distance_to_init, group_norm_21
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
     (nn.Conv2d(2, 3, 3, padding="valid"), (2, 6, 5)), (nn.Conv3d(1, 2, 2, padding="valid"), (1, 3, 4, 5)),
     (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 4)), (nn.Linear(5, 7), (5,))],
    ids=["plain", "strided", "depthwise", "dilated", "circular", "valid", "valid 3-d", "transposed", "linear"],
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


std_conv = timm.layers.std_conv


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(std_conv.StdConv2d(4, 6, 3, padding=1), (4, 6, 6)), (std_conv.ScaledStdConv2d(4, 6, 3, padding=1), (4, 6, 6)),
     (std_conv.StdConv2dSame(2, 3, 3, stride=2), (2, 6, 6)), (std_conv.ScaledStdConv2dSame(2, 4, 3, stride=2, groups=2), (2, 6, 7)),
     (nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)), (2, 5, 5)),
     (nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)), (2, 4, 4))],
    ids=["standardised", "scaled", "standardised same", "scaled same", "spectral", "weight norm"],
)  # fmt: skip
def test_norm_is_that_of_the_weight_that_is_applied(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer)
    if hasattr(layer, "gain"):
        nn.init.uniform_(layer.gain, 0.5, 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = weight_norms(model, trace(model, (2, *shape)))["0"].value
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # in train mode too
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert found == pytest.approx(dense_norm(model.eval(), shape), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
     (nn.Conv2d(2, 3, 3, padding=(2, 1), dilation=2, stride=2, padding_mode="replicate"), (2, 7, 6)),
     (nn.Conv1d(2, 3, 4, padding="same", padding_mode="replicate"), (2, 7)),
     (nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 7)), (nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),
     (nn.Conv3d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 3, 4, 3)), (timm.layers.Conv2dSame(2, 3, 3, stride=2), (2, 6, 6))],
    ids=["reflect", "replicate", "replicate same", "circular same", "even same", "reflect 3d", "timm same"],
)  # fmt: skip
def test_norm_is_that_of_the_map_before_padding(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer)
    assert weight_norms(model, trace(model, (1, *shape)))["0"].value == pytest.approx(dense_norm(layer, shape), rel=1e-4)


def test_padding_outside_a_layer_is_no_part_of_it() -> None:
    model = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3, padding=1))
    assert weight_norms(model, trace(model, (1, 2, 4, 4)))["1"].value == pytest.approx(dense_norm(model[1], (2, 6, 6)), rel=1e-5)


def test_distance_and_radius_of_a_transposed_convolution_run_over_its_outputs() -> None:
    for groups in (1, 2):
        layer = nn.ConvTranspose2d(4, 2, 2, stride=2, groups=groups, bias=False)
        model = nn.Sequential(layer)
        nn.init.constant_(layer.weight, 3.0)
        start = InitialWeights.of(model)
        with torch.no_grad():
            layer.weight.add_(1.0)
        # by hand: to each of 2 outputs and 4 taps, a vector of ones from the 4 / groups inputs of its group
        expected = 2 * 4 * (4 / groups) ** 0.5
        assert start.distances(model) == {"0": pytest.approx(expected)}
        motion = start.motion(model, trace(model, (1, 4, 3, 3)))["0"]
        assert (motion.distance, motion.radius) == pytest.approx((expected, 3 * expected))
    plain = nn.ConvTranspose2d(3, 2, 2)
    held = InitialWeights.of(nn.Sequential(plain))
    nn.init.zeros_(plain.weight)
    assert held.distances(nn.Sequential(plain))["0"] == pytest.approx(group_norm_21(held.weights["0"].transpose(0, 1)))


def test_a_standardised_layer_moves_as_the_weight_that_it_applies() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(std_conv.StdConv2d(2, 3, 3))
    graph, start = trace(model, (1, 2, 5, 5)), InitialWeights.of(model)

    def standardised() -> torch.Tensor:
        flat = model[0].weight.detach().double().flatten(1)
        return ((flat - flat.mean(1, keepdim=True)) / flat.var(1, correction=0, keepdim=True).add(model[0].eps).sqrt()).view(3, 2, 3, 3)

    before = standardised()
    torch.testing.assert_close(start.weights["0"].double(), before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model[0].weight.mul_(5.0).add_(2.0)  # changes nothing that the layer does
    assert start.motion(model, graph)["0"].distance < 1e-2 < 1 < distance_to_init(5 * before + 2, before)
    with torch.no_grad():
        model[0].weight[0] = torch.arange(18.0).view(2, 3, 3)
    motion = start.motion(model, graph)["0"]
    assert motion.distance == pytest.approx(distance_to_init(standardised(), before), rel=1e-3)
    assert motion.radius == pytest.approx(group_norm_21(before), rel=1e-5)


class Adapted(nn.Linear):
    """A linear layer and a further product beside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.flip(-1)


class Gated(nn.Conv2d):
    """A weight that depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class Alone(nn.Linear):
    """Its product is no call of torch.nn.functional."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.mT


def test_a_layer_that_is_no_product_with_one_weight_has_no_norm() -> None:
    model = nn.Sequential(Gated(1, 1, 3), nn.Flatten(), Adapted(4, 4), nn.Linear(4, 4), Alone(4, 4))
    graph = trace(model, (1, 1, 4, 4))
    start = InitialWeights.of(model)
    assert list(weight_norms(model, graph)) == list(start.motion(model, graph)) == ["3"]
    assert "4" not in start.weights


def test_what_normalises_a_weight_is_no_norm_layer() -> None:
    class NormedLinear(nn.Linear):
        pass

    model = nn.Sequential(
        std_conv.StdConv2d(2, 2, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(32, 3)), nn.LayerNorm(3), NormedLinear(3, 2),
    )  # fmt: skip
    assert norm_layer_constants(model, trace(model, (1, 2, 6, 6))) == {"4": None}


def test_weights_of_a_compiled_model_have_the_names_from_before() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    compiled, shape = torch.compile(net, backend="eager"), (1, 1, 8, 8)
    graph = trace(compiled, shape)
    assert graph == trace(net, shape)
    assert weight_norms(compiled, graph) == weight_norms(net, graph)
    assert norm_layer_constants(compiled, graph) == norm_layer_constants(net, graph) != {}
    start = InitialWeights.of(compiled)
    assert start.distances(net) == start.distances(compiled) == {"0": 0.0, "3": 0.0}
    assert start.motion(compiled, graph) == start.motion(net, graph)
