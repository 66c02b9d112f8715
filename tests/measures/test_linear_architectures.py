"""Closed forms of the linear architectures against the exact capacity of their Jacobians."""

from __future__ import annotations

import pytest
import torch

from capnas.errors import UsageError
from capnas.measures.allocation import spatial_allocation, total_capacity
from capnas.measures.linear_architectures import (
    averaged_conv,
    dense_rnn,
    diagonal_rnn,
    dilated_allocation,
    dilated_stack,
    stack_capacity,
    tensor_train_capacity,
    window,
)

SIZE = 64
AR = 0.9 ** (torch.arange(SIZE).unsqueeze(0) - torch.arange(SIZE).unsqueeze(1)).abs().to(torch.float64)


def allocation(architecture, theta, **options) -> torch.Tensor:
    return spatial_allocation(architecture.jacobian(theta), **options)


def draw(architecture, seed: int = 1) -> torch.Tensor:
    return architecture.start(torch.Generator().manual_seed(seed))


def regions(kappa: torch.Tensor) -> list[float]:
    return [kappa[:8].sum().item(), kappa[8:32].sum().item(), kappa[32:].sum().item()]


def test_response_of_a_dilated_stack_is_the_impulse_response_of_torch_convolutions() -> None:
    architecture = dilated_stack(SIZE, (1, 3, 2), channels=3, kernel=2)
    theta = draw(architecture)
    signal = torch.zeros(1, 1, SIZE, dtype=torch.float64)
    signal[0, 0, 0] = 1
    for weight, (out, inp), dilation in zip(theta.split([6, 18, 6]), [(3, 1), (3, 3), (1, 3)], (1, 3, 2)):
        kernel = weight.reshape(out, inp, 2).flip(-1)
        signal = torch.nn.functional.conv1d(torch.nn.functional.pad(signal, (dilation, 0)), kernel, dilation=dilation)
    torch.testing.assert_close(architecture.response(theta), signal[0, 0])


def test_window_and_fully_connected() -> None:
    assert allocation(window(SIZE, SIZE), torch.ones(SIZE, dtype=torch.float64)).tolist() == pytest.approx([1.0] * SIZE)
    kappa = allocation(window(SIZE, 5), torch.ones(5, dtype=torch.float64))
    assert kappa.tolist() == pytest.approx([1.0] * 5 + [0.0] * 59)


@pytest.mark.parametrize(("channels", "params"), [(1, 18), (4, 216)])
def test_width_of_a_dense_stack_is_wasted(channels: int, params: int) -> None:
    architecture = dilated_stack(SIZE, (1,) * 6, channels=channels, kernel=3)
    assert architecture.n_params == params
    assert total_capacity(architecture.jacobian(draw(architecture))) == 13 == stack_capacity([3] * 6)


@pytest.mark.parametrize(
    ("levels", "channels", "capacity"), [(4, 1, 5), (4, 2, 12), (5, 3, 24), (6, 1, 7), (6, 2, 20), (6, 3, 33), (6, 4, 48), (6, 8, 64)]
)
def test_dilated_stack_is_a_tensor_train(levels: int, channels: int, capacity: int) -> None:
    architecture = dilated_stack(SIZE, tuple(2**level for level in range(levels)), channels=channels)
    assert tensor_train_capacity(levels, channels) == capacity
    assert total_capacity(architecture.jacobian(draw(architecture))) == capacity


def test_allocation_of_a_one_channel_dilated_stack_has_a_closed_form() -> None:
    architecture = dilated_stack(SIZE, (1, 2, 4, 8, 16, 32))
    theta = draw(architecture)
    torch.testing.assert_close(dilated_allocation(theta.reshape(6, 2)), allocation(architecture, theta), atol=1e-10, rtol=0)
    equal = dilated_allocation(torch.ones(6, 2))
    assert equal.tolist() == pytest.approx([7 / 64] * 64)
    halved = dilated_allocation(torch.tensor([[1.0, 0.5]] * 6))
    assert halved[[0, 1, 3, 63]].tolist() == pytest.approx([0.65536, 0.4096, 0.16384, 0.0016], abs=5e-6)
    assert halved[:8].sum().item() == pytest.approx(2.432, abs=5e-4)
    one_sided = dilated_allocation(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert one_sided.sum().item() == pytest.approx(3)
    assert torch.isfinite(one_sided).all()


@pytest.mark.parametrize(("length", "states"), [(64, 1), (64, 3), (5, 3)])
def test_recurrences_hold_two_units_per_state(length: int, states: int) -> None:
    for architecture in (dense_rnn(length, states), diagonal_rnn(length, states)):
        assert total_capacity(architecture.jacobian(draw(architecture))) == min(length, 2 * states), architecture.name


def test_diagonal_recurrence_of_two_poles() -> None:
    architecture = diagonal_rnn(SIZE, 2)
    theta = torch.cat([torch.tensor([0.5, 0.9], dtype=torch.float64).atanh(), torch.ones(2, dtype=torch.float64)])
    kappa = allocation(architecture, theta)
    assert kappa.sum().item() == pytest.approx(4)
    assert kappa[:4].tolist() == pytest.approx([0.9590, 0.4788, 0.3628, 0.2104], abs=5e-5)
    assert regions(kappa) == pytest.approx([2.6465, 1.2201, 0.1334], abs=5e-5)
    for convention, expected in {
        "W": [0.8357, 0.2976, 0.3032, 0.2617],
        "R": [0.6407, 0.2973, 0.1972, 0.2081],
        "C": [0.9920, 0.4625, 0.3589, 0.2053],
    }.items():
        coloured = allocation(architecture, theta, covariance=AR, convention=convention)
        assert coloured[:4].tolist() == pytest.approx(expected, abs=5e-5), convention


def test_average_pooling_moves_capacity_to_the_borders() -> None:
    architecture = averaged_conv(SIZE, 5)
    kappa = allocation(architecture, torch.ones(5, dtype=torch.float64))
    assert kappa.sum().item() == pytest.approx(5)
    assert (kappa[:4].sum() + kappa[-4:].sum()).item() == pytest.approx(4.0345, abs=5e-5)
    assert kappa[4:-4].sum().item() == pytest.approx(0.9655, abs=5e-5)


def test_empty_stack_is_refused() -> None:
    with pytest.raises(UsageError, match="at least one layer"):
        dilated_stack(8, ())
