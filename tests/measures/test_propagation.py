"""Propagation through one layer and its deep limit, against sampled networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from capnas.errors import UsageError
from capnas.measures.convolution import convolution
from capnas.measures.decoupling import ACTIVATIONS, analytic_decoupling, residual_share
from capnas.measures.propagation import (
    diffuse,
    drift_and_diffusion,
    markov_matrix,
    propagate_gated,
    propagate_markov,
    propagate_partly,
    receptive_variance,
    residual_kernel,
)


def layer(units: int, inputs: int, constraints: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(units, inputs, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 2, inputs, dtype=torch.float64)
    return weight / weight.norm(dim=1, keepdim=True), torch.randn(units, constraints, generator=generator, dtype=torch.float64)


def sampled(functions: torch.Tensor, gates: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Leverage of the functions projected back to the inputs: mean of x * d/dx, a batch estimate that knows no formula of ours."""
    projected = functions @ torch.linalg.inv(functions.T @ functions / len(x))
    return ((((projected @ v.T) * gates) @ weight) * x).mean(0)


def variation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().sum() / (2 * b.sum()))


@pytest.mark.parametrize("gate", ["linear", "fast sine", "sign"])
def test_gated_rule_is_exact_for_gates_independent_of_the_input(gate: str) -> None:
    weight, v = layer(10, 16, 4)
    count, generator = 200_000, torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    if gate == "linear":
        gates = torch.ones(count, 10, dtype=torch.float64)
    elif gate == "fast sine":
        gates = 2**0.5 * torch.sin(50 * x @ weight.T)
    else:
        common = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        gates = torch.sign(common + torch.randn(count, 10, generator=generator, dtype=torch.float64))
    rho = gates.T @ gates / count
    scale = rho.diagonal().sqrt()
    rho = rho / scale.outer(scale)
    kappa = propagate_gated(v, weight, rho)
    assert kappa.sum().item() == pytest.approx(4)
    assert variation(sampled((gates * (x @ weight.T)) @ v, gates, x, weight, v), kappa) < 0.005


def test_partial_rule_is_between_leverage_and_markov() -> None:
    weight, v = layer(24, 16, 5)
    linear, markov = propagate_partly(v, weight, 0.0), propagate_partly(v, weight, 1.0)
    basis = torch.linalg.qr(weight.T @ v).Q
    torch.testing.assert_close(linear, basis.square().sum(1))
    # the rule (22) on the diagonal of C, whose rows are normalised weights
    gram = v.T @ (weight.square().sum(1, keepdim=True) * v)
    diagonal = (v @ torch.linalg.inv(gram) @ v.T).diagonal()
    torch.testing.assert_close(markov, propagate_markov(diagonal, weight)[0])
    for d in (0.0, 0.3, 1.0):
        kappa = propagate_partly(v, weight, d)
        assert kappa.sum().item() == pytest.approx(5)
        rho = (1 - d) * torch.ones(24, 24, dtype=torch.float64) + d * torch.eye(24, dtype=torch.float64)
        torch.testing.assert_close(kappa, propagate_gated(v, weight, rho))


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_one_activation_is_nearer_the_partial_rule_than_either_limit(name: str) -> None:
    weight, v = layer(48, 48, 8)
    x = torch.randn(40_000, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = (x @ weight.T).requires_grad_()
    post = ACTIVATIONS[name](z)
    (gates,) = torch.autograd.grad(post.sum(), z)
    centred = post.detach() - post.detach().mean(0)
    measured = sampled(centred @ v, gates, x, weight, v)
    measured = measured * 8 / measured.sum()
    partial, markov, linear = (variation(measured, propagate_partly(v, weight, d)) for d in (analytic_decoupling(name).out, 1.0, 0.0))
    assert partial < 0.04
    assert partial < linear < markov


def linear_maps() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)

    def kernel(inputs: int, outputs: int = 6) -> torch.Tensor:
        return torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64)

    conv, grouped, same, small = kernel(3), kernel(1), kernel(3, 3) / 4, kernel(3, 2)
    zeros, scale = torch.zeros(3, dtype=torch.float64), torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    return {
        "convolution": lambda x: F.conv2d(x, conv, padding=1),
        "stride": lambda x: F.conv2d(x, conv, stride=2, padding=1),
        "dilation": lambda x: F.conv2d(x, conv, padding=1, dilation=2),
        "groups": lambda x: F.conv2d(x, grouped, stride=2, padding=1, dilation=2, groups=3),
        "pooling": lambda x: F.avg_pool2d(x, 3, stride=1),
        "norm": lambda x: F.batch_norm(x, zeros, scale, scale, None),
        "residual": lambda x: x + F.conv2d(x, same, padding=1),
        "concat": lambda x: torch.cat([F.conv2d(x, small, padding=1), F.avg_pool2d(x, 3, stride=1, padding=1)], 1),
        "scaled channels": lambda x: x * scale.view(1, 3, 1, 1),
    }


@pytest.mark.parametrize("name", list(linear_maps()))
def test_partial_rule_holds_for_every_linear_map_of_images(name: str) -> None:
    generator, samples, image = torch.Generator().manual_seed(5), 30_000, (3, 5, 5)
    op = linear_maps()[name]
    weight = torch.func.jacrev(lambda x: op(x.view(1, *image)).flatten())(torch.zeros(75, dtype=torch.float64))
    units = len(weight)
    v = torch.randn(units, 4, generator=generator, dtype=torch.float64)
    common = torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    gates = torch.sign(common + torch.randn(samples, units, generator=generator, dtype=torch.float64))
    x = torch.randn(samples, 75, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    made = (gates * op(leaf.view(-1, *image)).flatten(1)) @ v  # the witness knows no matrix
    projected = (made @ torch.linalg.inv(made.T @ made / samples)).detach()
    (slope,) = torch.autograd.grad((made * projected).sum(), leaf)
    measured = (slope * x).mean(0)
    d = 1 - float((gates.T @ gates / samples).fill_diagonal_(0).sum()) / (units * (units - 1))
    kappa = propagate_partly(v, weight, d)
    assert kappa.sum().item() == pytest.approx(4)
    assert variation(measured, kappa) < 0.02
    disjoint = name in ("norm", "scaled channels")  # each output reads one input of its own: every rule gives the same
    assert (min(variation(measured, propagate_partly(v, weight, limit)) for limit in (0.0, 1.0)) > 0.03) is not disjoint


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 3)])
def test_the_matrix_of_a_convolution_is_its_jacobian(stride: int, dilation: int, groups: int) -> None:
    kernel = torch.randn(6, 3 // groups, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = convolution(kernel, (5, 5), stride=stride, padding=1, dilation=dilation, groups=groups)
    expected = torch.func.jacrev(lambda x: F.conv2d(x.view(1, 3, 5, 5), kernel, None, stride, 1, dilation, groups).flatten())(
        torch.zeros(75, dtype=torch.float64)
    )
    torch.testing.assert_close(torch.block_diag(*found.matrix()), expected)


def test_markov_matrix_conserves_capacity_and_feeds_the_bias() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, moment, bias = torch.randn(5, 7, generator=generator), torch.rand(7, generator=generator), torch.randn(5, generator=generator)
    weight[2], bias[2] = 0, 0
    transition, leak = markov_matrix(weight, moment, bias)
    torch.testing.assert_close(transition.sum(1) + leak, torch.ones(5, dtype=torch.float64))
    assert leak[2] == 1
    slow = [[float(weight[j, i] ** 2 * moment[i]) for i in range(7)] for j in range(5)]
    expected = slow[1][4] / (sum(slow[1]) + float(bias[1] ** 2))
    assert transition[1, 4].item() == pytest.approx(expected)
    capacity = torch.rand(5, generator=generator)
    kappa, lost = propagate_markov(capacity, weight, moment, bias)
    assert kappa.sum().item() + lost == pytest.approx(capacity.sum().item())


def test_many_residual_steps_tend_to_the_forward_equation() -> None:
    kernel, strength = torch.tensor([1.0, 2.0, 5.0]), 1.7
    start = torch.zeros(21, dtype=torch.float64)
    start[10] = 1
    limit = diffuse(start, kernel, strength)
    gaps = []
    for depth in (20, 200):
        step, kappa = residual_kernel(kernel, strength, depth), start
        for _ in range(depth):
            kappa = sum(step[i] * kappa.roll(i - 1) for i in range(3))
        gaps.append(variation(kappa, limit))
    assert gaps[1] < 0.2 * gaps[0] < 0.02
    drift, diffusion = drift_and_diffusion(kernel, strength)
    offsets = torch.arange(21, dtype=torch.float64) - 10
    mean = float(limit @ offsets)
    assert mean == pytest.approx(drift, abs=1e-3)
    assert float(limit @ offsets.square()) - mean**2 == pytest.approx(diffusion, abs=5e-3)
    assert diffuse(start, torch.tensor([1.0, 0.0, 1.0]), 3.0)[10] > torch.exp(torch.tensor(-3.0))
    torch.testing.assert_close(diffuse(start, kernel, strength, 0.0), start)


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_receptive_field_of_a_plain_network_grows_with_its_depth(depth: int) -> None:
    width, length, shares = 64, 65, []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 1, length, generator=generator).requires_grad_()
        h = x
        for level in range(depth):
            inputs = 1 if level == 0 else width
            kernel = torch.randn(width, inputs, 3, generator=generator) * (2 / (3 * inputs)) ** 0.5
            z = torch.nn.functional.conv1d(h, kernel, padding=1)
            h = torch.relu(z - z.mean((0, 2), keepdim=True).detach())
        readout = torch.randn(16, width, generator=generator)
        (gradient,) = torch.autograd.grad((h[:, :, length // 2] * readout).sum(), x)
        shares.append(gradient.square().mean((0, 1)))
    energy = torch.stack(shares).mean(0).double()
    offsets = torch.arange(length, dtype=torch.float64) - length // 2
    variance = float((energy @ offsets.square()) / energy.sum())
    assert variance == pytest.approx(receptive_variance(torch.full((depth,), 2 / 3)), rel=0.1)


def test_receptive_field_of_residual_networks_weighs_branches() -> None:
    shares = torch.tensor([residual_share(torch.full((4,), 0.5), torch.ones(4))] * 3)
    assert receptive_variance(torch.full((3,), 2.0), shares) == pytest.approx(3 * 2 * 0.2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: propagate_gated(torch.eye(2), torch.eye(3), torch.eye(3)), "must share J"),
        (lambda: propagate_gated(torch.eye(2), torch.eye(2), torch.eye(3)), r"gate_cosines must have shape \(2, 2\)"),
        (lambda: propagate_partly(torch.eye(2), torch.eye(2), 1.5), r"decoupling must be in \[0, 1\], got 1.5"),
        (lambda: residual_kernel(torch.ones(4), 1.0, 3), "odd number of offsets"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
