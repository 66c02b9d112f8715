"""Decoupling: the analytic table, the measured estimators, and the coherent share of random networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from capnas.errors import UsageError
from capnas.measures.decoupling import (
    ACTIVATIONS,
    analytic_decoupling,
    coherent_error,
    coherent_share,
    gate_decoupling,
    gradient_pairs,
    output_decoupling,
    predicted_function_share,
    predicted_gradient_share,
    relu_gate_decoupling,
    residual_share,
    shattering,
)

TABLE = {
    "identity": (0, 0),
    "relu": (0.267, 0.500),
    "leaky_relu_0.1": (0.196, 0.401),
    "gelu": (0.277, 0.452),
    "silu": (0.202, 0.341),
    "hard_swish": (0.178, 0.303),
    "tanh": (0.070, 0.210),
    "sigmoid": (0.016, 0.048),
    "abs": (1, 1),
    "square": (1, 1),
    "sin": (0.149, 0.352),
}
SCALED = {
    ("tanh", 0.3): (0.004, 0.011),
    ("tanh", 3.0): (0.216, 0.627),
    ("tanh", 10.0): (0.314, 0.881),
    ("sin", 2.0): (0.853, 0.963),
    ("sin", 4.0): (1.000, 1.000),
}


@pytest.mark.parametrize("name", TABLE)
def test_analytic_table(name: str) -> None:
    found = analytic_decoupling(name)
    assert (found.out, found.gate) == pytest.approx(TABLE[name], abs=6e-4)


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_analytic_table_of_scaled_activations(name: str, scale: float) -> None:
    found = analytic_decoupling(lambda z: ACTIVATIONS[name](scale * z))
    assert (found.out, found.gate) == pytest.approx(SCALED[name, scale], abs=6e-4)


@pytest.mark.parametrize("name", ["hard_swish", "gelu", "elu", "relu6"])
def test_quadrature_agrees_with_adaptive_integration(name: str) -> None:
    def value(z: float) -> float:
        return float(ACTIVATIONS[name](torch.tensor(z, dtype=torch.float64)))

    def expect(function: Callable[[float], float]) -> float:
        return quad(lambda z: function(z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -9, 9, points=[-3, 0, 3, 6])[0]

    mean = expect(value)
    variance = expect(lambda z: (value(z) - mean) ** 2)
    assert analytic_decoupling(name).out == pytest.approx(1 - expect(lambda z: z * value(z)) ** 2 / variance, abs=1e-7)


def test_closed_forms_of_relu() -> None:
    # Var = 1/2 - 1/(2 pi), Cov = 1/2
    assert analytic_decoupling("relu").out == pytest.approx(1 - 0.25 / (0.5 - 1 / (2 * math.pi)), abs=1e-9)
    assert analytic_decoupling("relu").gate == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "squared_relu", "hard_swish", "mish", "selu"])
def test_measured_estimators_agree_with_quadrature(name: str) -> None:
    z = torch.randn(40_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    post = ACTIVATIONS[name](z)
    (gates,) = torch.autograd.grad(post.sum(), z)
    expected = analytic_decoupling(name)
    assert output_decoupling(z.detach(), post.detach()) == pytest.approx(expected.out, abs=0.01)
    assert gate_decoupling(gates) == pytest.approx(expected.gate, abs=0.01)


def test_relu_gates_of_correlated_units() -> None:
    generator = torch.Generator().manual_seed(1)
    for rho in (-0.5, 0.0, 0.6, 0.9):
        pair = torch.randn(100_000, 2, generator=generator, dtype=torch.float64)
        pair[:, 1] = rho * pair[:, 0] + math.sqrt(1 - rho**2) * pair[:, 1]
        measured = gate_decoupling((pair > 0).double())
        assert measured == pytest.approx(float(relu_gate_decoupling(torch.tensor(rho))), abs=0.01)


def test_fast_gate_estimator_equals_the_double_loop() -> None:
    gates = torch.rand(50, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gates[:, 2, 1] = 0  # dead at one position
    values = gates.numpy()
    means = []
    for q in range(3):
        live = [j for j in range(6) if np.sqrt((values[:, j, q] ** 2).mean()) > 1e-6]
        cosines = [
            (values[:, i, q] * values[:, j, q]).mean() / np.sqrt((values[:, i, q] ** 2).mean() * (values[:, j, q] ** 2).mean())
            for i in live
            for j in live
            if i != j
        ]
        means.append(1 - np.mean(cosines))
    assert gate_decoupling(gates) == pytest.approx(np.mean(means), abs=1e-12)


def test_estimators_ignore_scale_and_handle_dead_units() -> None:
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(3))
    post = torch.relu(z)
    scaled = output_decoupling(z * 7 + 2, post * 0.1 - 3)
    assert scaled == pytest.approx(output_decoupling(z, post), abs=1e-6)
    dead = torch.cat([post, torch.zeros(500, 1)], 1)
    assert output_decoupling(torch.cat([z, z[:, :1]], 1), dead) == pytest.approx(output_decoupling(z, post), abs=1e-9)
    assert math.isnan(output_decoupling(z, torch.zeros_like(z)))
    assert math.isnan(gate_decoupling(torch.zeros(5, 3)))
    assert math.isnan(gate_decoupling(torch.ones(5, 1)))


def test_gates_that_oppose_each_other_reach_the_end_of_the_range_of_the_live_units() -> None:
    simplex = torch.eye(3, dtype=torch.float64) - 1 / 3  # three gates, of which each pair has the cosine -1/2
    for dead in (0, 4):
        gates = torch.cat([simplex, torch.zeros(3, dead, dtype=torch.float64)], 1)
        assert gate_decoupling(gates) == pytest.approx(1 + 1 / (3 - 1))


def test_coherent_share_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(4)
    direction = torch.randn(40, generator=generator)
    shares = [coherent_share(direction + 2 * torch.randn(8, 40, generator=generator)) for _ in range(400)]
    energy = float(direction.square().sum())
    assert np.mean(shares) == pytest.approx(energy / (energy + 4 * 40), abs=0.02)
    noise = [coherent_share(torch.randn(8, 40, generator=generator)) for _ in range(400)]
    assert abs(np.mean(noise)) < 0.01


def test_coherent_share_is_the_bias_corrected_share_of_the_mean() -> None:
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double() + 1
    energy = rows.square().sum(1).mean()
    corrected = (rows.mean(0).square().sum() - energy / 9) / energy * 9 / 8
    assert coherent_share(rows) == pytest.approx(float(corrected))


def test_error_of_the_coherent_share_is_its_spread_over_batches() -> None:
    generator = torch.Generator().manual_seed(4)
    scale = torch.linspace(0.1, 1, 40)  # directions of unlike strength
    batches = [[gradient_pairs(scale * torch.randn(8, 40, generator=generator)) for _ in range(3)] for _ in range(600)]
    for groups in (1, 3):  # of other samples
        shares = [np.mean([float(p.sum()) / 56 for p in batch[:groups]]) for batch in batches]
        errors = [coherent_error(batch[:groups]) for batch in batches]
        assert np.mean(np.square(errors)) == pytest.approx(np.var(shares), rel=0.15)
    assert math.isnan(coherent_error([]))
    assert shattering(-0.1, floor=coherent_error(batches[0])) == pytest.approx(-math.log(coherent_error(batches[0])))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_share_of_a_normalised_relu_network_halves_per_layer(depth: int) -> None:
    width, shares = 256, []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(width, width, generator=generator).requires_grad_()
        h = x
        for _ in range(depth):
            z = h @ torch.randn(width, width, generator=generator) / width**0.5
            h = torch.relu((z - z.mean(0).detach()) / z.std(0).detach())
        for _ in range(4):
            (gradient,) = torch.autograd.grad((h @ torch.randn(width, generator=generator)).sum(), x, retain_graph=True)
            shares.append(coherent_share(gradient))
    assert np.mean(shares) == pytest.approx(2.0**-depth, rel=0.1)
    assert predicted_gradient_share([analytic_decoupling("relu").gate] * depth) == pytest.approx(2.0**-depth)
    assert shattering(float(np.mean(shares))) == pytest.approx(depth * math.log(2), abs=0.11)


def test_predictions_and_residual_share() -> None:
    assert predicted_gradient_share([0.5] * 4, [0.5] * 4) == pytest.approx(0.75**4)
    assert predicted_function_share([0.2671] * 8) == pytest.approx(0.7329**8)
    assert residual_share(torch.full((2, 2), 3.0), torch.full((2, 2), 4.0)) == pytest.approx(9 / 25)
    assert residual_share(torch.zeros(2), torch.zeros(2)) == 0
    assert shattering(1.2) == 0
    assert shattering(-0.1) == pytest.approx(-math.log(1e-6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predicted_gradient_share([0.5, 0.5], [1.0]), "one value per layer, got 2 and 1"),
        (lambda: analytic_decoupling("rely"), "activation must be one of .* Did you mean 'relu'"),
        (lambda: analytic_decoupling(torch.zeros_like), "returned a constant"),
        (lambda: analytic_decoupling(lambda z: 0 * z), "must not be constant"),
        (lambda: output_decoupling(torch.zeros(2, 3), torch.zeros(3, 2)), r"one shape \(S, D\)"),
        (lambda: output_decoupling(torch.zeros(1, 3), torch.zeros(1, 3)), "at least two samples"),
        (lambda: gate_decoupling(torch.zeros(3)), r"gates must have shape"),
        (lambda: coherent_share(torch.zeros(1, 3)), "at least two samples"),
        (lambda: coherent_share(torch.zeros(4, 3)), "must not all be zero"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
