"""The exact pixel map: equal to the linear theory, complete, and the witness of the Markov sweep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from capnas.errors import UsageError
from capnas.measures.allocation import spatial_allocation
from capnas.measures.capacity_push import inject, push
from capnas.measures.layer_capacity import exact_layer_capacity
from capnas.measures.pixel_map import exact_pixel_map, parameter_scales, tangents

Parameters = dict[str, torch.Tensor]
WIDTH, SIDE = 8, 8
LAYERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "conv1": lambda s, w: F.conv2d(s, w, padding=1),
    "conv2": lambda s, w: F.conv2d(s, w, padding=1, stride=2),
    "conv3": lambda s, w: F.conv2d(s, w, padding=1, stride=2),
    "head": lambda s, w: F.linear(s.flatten(-3), w),
}


def network(seed: int) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv1": (WIDTH, 1, 3, 3), "conv2": (WIDTH, WIDTH, 3, 3), "conv3": (WIDTH, WIDTH, 3, 3), "head": (4, WIDTH * 4)}
    draw = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: weight * (2 / weight[0].numel()) ** 0.5 for name, weight in draw.items()}


def forward(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parameters, torch.Tensor], torch.Tensor]:
    def model(params: Parameters, x: torch.Tensor) -> torch.Tensor:
        for name in ("conv1", "conv2", "conv3"):
            x = activation(LAYERS[name](x, params[name]))
        return LAYERS["head"](x, params["head"])

    return model


def images(count: int, centred: bool, seed: int = 7) -> torch.Tensor:
    offset = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    envelope = torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / 6) if centred else torch.ones(SIDE, SIDE, dtype=torch.float64)
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * envelope


def markov_map(params: Parameters, x: torch.Tensor, activation: Callable, capacity: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sweep (40) by hand over a chain, and gradient energy times input variance as a baseline."""
    x = x.clone().requires_grad_()
    before, after, h = {}, {}, x
    for name, layer in LAYERS.items():
        before[name], after[name] = h, layer(h, params[name])
        if not after[name].requires_grad:
            after[name].requires_grad_()
        h = after[name] if name == "head" else activation(after[name])
    responses, energy = dict.fromkeys(LAYERS, torch.zeros(())), torch.zeros(())
    for output in range(h.shape[1]):
        *slopes, slope = torch.autograd.grad(h[:, output].sum(), [*after.values(), x], retain_graph=True)
        responses = {name: responses[name] + part.square().mean(0) for name, part in zip(LAYERS, slopes)}
        energy = energy + slope.square().mean(0)
    k = torch.zeros_like(responses["head"])
    for name in reversed(LAYERS):
        layer, moment = LAYERS[name], before[name].detach().square().mean(0)
        (k,), left = push(k, [moment], lambda s, layer=layer, name=name: layer(s, params[name].square()))
        assert abs(left) < 1e-8
        k = k + inject(capacity[name], params[name], responses[name], moment, layer)
    return k, energy * x.detach().square().mean(0)


def variation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a / a.sum() - b / b.sum()).abs().sum() / 2)


def test_map_of_a_linear_model_on_whitened_inputs_is_its_spatial_allocation() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    x = torch.linalg.qr(raw).Q * 60**0.5  # exactly white: X^T X / N = I
    weight = {
        "first.weight": torch.randn(3, 12, generator=generator, dtype=torch.float64),
        "second.weight": torch.randn(1, 3, generator=generator, dtype=torch.float64),
    }
    first = weight["first.weight"].clone()
    first[:, 6:] = 0
    weight["first.weight"] = first

    def frozen(params: Parameters, sample: torch.Tensor) -> torch.Tensor:
        return params["second.weight"] @ (first @ sample)

    second = {"second.weight": weight["second.weight"]}
    found = exact_pixel_map(frozen, second, x, mu=1e-10)
    torch.testing.assert_close(found.values.sum(0), spatial_allocation(first.T), atol=1e-9, rtol=0)
    assert found.effective == pytest.approx(3)

    def deep(params: Parameters, sample: torch.Tensor) -> torch.Tensor:
        return params["second.weight"] @ (params["first.weight"] @ sample)

    jacobian = torch.func.jacrev(lambda p: (p["second.weight"] @ p["first.weight"])[0])(weight)
    columns = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
    whole = exact_pixel_map(deep, weight, x, mu=1e-9)
    torch.testing.assert_close(whole.values.sum(0), spatial_allocation(columns), atol=1e-8, rtol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_map_of_a_piecewise_linear_network_is_complete(scaled: bool) -> None:
    params, x = {name: torch.nn.Parameter(p) for name, p in network(0).items()}, images(12, centred=True)  # as a module gives them
    scales = parameter_scales(params) if scaled else None
    found = exact_pixel_map(forward(torch.relu), params, x, scales=scales)
    assert found.values.sum().item() == pytest.approx(found.effective, rel=1e-9)
    assert abs(found.bias) < 1e-8
    exact = exact_layer_capacity(tangents(forward(torch.relu), params, x, scales))
    assert exact.effective == pytest.approx(found.effective, rel=1e-9)
    assert exact.mu == pytest.approx(found.mu)


def test_biases_take_the_remainder() -> None:
    params = {"w": torch.ones(3, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = exact_pixel_map(lambda p, s: (p["w"] @ s).unsqueeze(0) + p["b"], params, x, mu=1e-9)
    assert found.effective == pytest.approx(4)
    assert found.bias == pytest.approx(1, abs=1e-6)


def test_scaled_map_ignores_the_rescaling_of_relu_layers() -> None:
    params, x = network(1), images(8, centred=False)
    moved = {**params, "conv1": params["conv1"] * 3, "conv2": params["conv2"] / 3}
    maps = [exact_pixel_map(forward(torch.relu), p, x, scales=parameter_scales(p)).values for p in (params, moved)]
    torch.testing.assert_close(maps[0], maps[1])
    plain = [exact_pixel_map(forward(torch.relu), p, x).values for p in (params, moved)]
    assert (plain[0] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("activation", [torch.relu, torch.abs])
def test_markov_sweep_is_close_to_the_exact_map_and_beats_the_baselines(activation: Callable, centred: bool) -> None:
    params, x = network(0), images(100, centred)
    model, scales = forward(activation), parameter_scales(network(0))
    exact = exact_pixel_map(model, params, x, scales=scales).values.sum(0)
    capacity = exact_layer_capacity(tangents(model, params, x, scales)).share
    sweep, gradient = markov_map(params, x, activation, capacity)
    assert sweep.sum().item() == pytest.approx(sum(capacity.values()))
    distance = variation(exact, sweep)
    assert distance < 0.1
    if activation is torch.relu:
        assert distance < 0.7 * variation(exact, gradient)
    assert distance < 0.6 * variation(exact, torch.ones_like(exact))


def test_markov_sweep_fails_on_a_linear_network_as_it_must() -> None:
    params, x = network(0), images(60, centred=True)
    model, scales = forward(lambda z: z), parameter_scales(params := network(0))
    exact = exact_pixel_map(model, params, x, scales=scales).values.sum(0)
    sweep, _ = markov_map(params, x, lambda z: z, exact_layer_capacity(tangents(model, params, x, scales)).share)
    assert variation(exact, sweep) > 0.2


def test_model_without_parameters_in_play_is_refused() -> None:
    with pytest.raises(UsageError, match="do not depend on its parameters"):
        exact_pixel_map(lambda p, x: x * 0 * p["w"].sum(), {"w": torch.ones(1)}, torch.ones(2, 3))
