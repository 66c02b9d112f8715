"""Linear capacity allocation: conservation, bounds, invariances, conventions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capnas.errors import UsageError
from capnas.measures.allocation import (
    constraint_basis,
    constraint_matrix,
    parameter_leverage,
    spatial_allocation,
    subspace_capacity,
    total_capacity,
)
from capnas.measures.linear_architectures import averaged_conv, dense_rnn, diagonal_rnn, dilated_stack, window

SIZE = 64
ARCHITECTURES = {
    "window": window(SIZE, 20),
    "dilated-2": dilated_stack(SIZE, (1, 2, 4, 8, 16, 32), channels=2),
    "dilated-1": dilated_stack(SIZE, (1, 2, 4, 8, 16, 32)),
    "two-cycle": dilated_stack(SIZE, (1, 2, 4, 8, 16) * 2),
    "diagonal-rnn": diagonal_rnn(SIZE, 4),
    "dense-rnn": dense_rnn(SIZE, 3),
    "averaged": averaged_conv(SIZE, 5),
}


def covariance(kind: str) -> torch.Tensor:
    distance = (torch.arange(SIZE).unsqueeze(0) - torch.arange(SIZE).unsqueeze(1)).abs().to(torch.float64)
    return {"white": (distance == 0).to(torch.float64), "ar": 0.9**distance, "power": (1 + distance) ** -0.8}[kind]


def fourier() -> torch.Tensor:
    time = torch.arange(SIZE, dtype=torch.float64)
    columns = [torch.ones(SIZE, dtype=torch.float64)]
    for k in range(1, SIZE // 2):
        columns += [torch.cos(2 * torch.pi * k * time / SIZE), torch.sin(2 * torch.pi * k * time / SIZE)]
    columns.append(torch.cos(torch.pi * time))
    return torch.stack([column / column.norm() for column in columns], 1)


def jacobian_of(name: str, seed: int = 3) -> torch.Tensor:
    architecture = ARCHITECTURES[name]
    return architecture.jacobian(architecture.start(torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("kind", ["white", "ar", "power"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_capacity_is_conserved_over_partitions_and_bounded(name: str, kind: str) -> None:
    jacobian, sigma = jacobian_of(name), covariance(kind)
    total = total_capacity(jacobian, sigma)
    for convention in ("W", "C", "R"):
        allocation = spatial_allocation(jacobian, sigma, convention=convention)
        assert allocation.sum().item() == pytest.approx(total, abs=1e-6)
        assert allocation.min() >= -1e-12
        assert allocation.max() <= 1 + 1e-9
        bands = fourier().split(7, dim=1)
        capacities = [subspace_capacity(jacobian, band, sigma, convention=convention) for band in bands]
        assert sum(capacities) == pytest.approx(total, abs=1e-6)
        assert all(-1e-12 <= c <= min(band.shape[1], total) + 1e-9 for c, band in zip(capacities, bands))
    assert spatial_allocation(jacobian, sigma, convention="O").sum().item() == pytest.approx(total, abs=1e-5)
    leverage = parameter_leverage(jacobian, sigma)
    assert leverage.sum().item() == pytest.approx(total, abs=1e-6)
    assert leverage.max() <= 1 + 1e-9


def test_allocation_matches_a_projector_written_out_in_numpy() -> None:
    jacobian, sigma = jacobian_of("dilated-1"), covariance("ar")
    values, vectors = np.linalg.eigh(sigma.numpy())
    white = vectors @ np.diag(np.sqrt(values)) @ vectors.T @ jacobian.numpy()
    projector = white @ np.linalg.pinv(white, rcond=1e-9)
    np.testing.assert_allclose(spatial_allocation(jacobian, sigma).numpy(), np.diag(projector), atol=1e-9)
    j, s = jacobian.numpy(), sigma.numpy()
    oblique = j @ np.linalg.pinv(j.T @ s @ j, rcond=1e-12) @ j.T @ s
    np.testing.assert_allclose(spatial_allocation(jacobian, sigma, convention="O").numpy(), np.diag(oblique), atol=1e-8)
    ridge = 0.3
    soft = white @ white.T @ np.linalg.inv(white @ white.T + ridge * np.eye(SIZE))
    np.testing.assert_allclose(spatial_allocation(jacobian, sigma, mu=ridge).numpy(), np.diag(soft), atol=1e-9)
    assert total_capacity(jacobian, sigma, mu=ridge) == pytest.approx(np.trace(soft), abs=1e-9)
    soft_oblique = j @ np.linalg.inv(j.T @ s @ j + ridge * np.eye(j.shape[1])) @ j.T @ s
    np.testing.assert_allclose(spatial_allocation(jacobian, sigma, convention="O", mu=ridge).numpy(), np.diag(soft_oblique), atol=1e-8)


def test_conventions_agree_on_white_input_and_differ_on_coloured() -> None:
    jacobian = jacobian_of("diagonal-rnn")
    reference = spatial_allocation(jacobian)
    for convention in ("W", "C", "R", "O"):
        torch.testing.assert_close(spatial_allocation(jacobian, covariance("white"), convention=convention), reference, atol=1e-9, rtol=0)
    coloured = spatial_allocation(jacobian, covariance("ar"))
    assert (coloured - spatial_allocation(jacobian, covariance("ar"), convention="C")).abs().sum() > 0.1


def test_invariant_to_reparametrisation_but_leverage_is_not() -> None:
    jacobian = jacobian_of("dilated-2")
    mixing = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spatial_allocation(jacobian @ mixing), spatial_allocation(jacobian), atol=1e-8, rtol=0)
    assert (parameter_leverage(jacobian @ mixing) - parameter_leverage(jacobian)).abs().max() > 0.05


def test_the_cholesky_factor_attributes_to_innovations() -> None:
    jacobian, sigma = jacobian_of("window"), covariance("ar")
    factor = np.linalg.cholesky(sigma.numpy())
    np.testing.assert_allclose(constraint_matrix(jacobian, sigma, convention="C").numpy(), factor.T @ jacobian.numpy(), atol=1e-12)


def test_soft_capacities_of_subspaces_add_up_to_the_soft_total() -> None:
    jacobian, sigma = jacobian_of("dilated-1"), covariance("ar")
    parts = [subspace_capacity(jacobian, band, sigma, mu=0.3) for band in fourier().split(7, dim=1)]
    assert sum(parts) == pytest.approx(total_capacity(jacobian, sigma, mu=0.3), abs=1e-9)


def test_the_rank_does_not_depend_on_the_unit_and_rounding_below_zero_is_zero() -> None:
    assert total_capacity(1e-12 * torch.eye(3, dtype=torch.float64)) == 3
    assert total_capacity(torch.eye(2), torch.diag(torch.tensor([1.0, -1e-10]))) == 1


def test_soft_total_tends_to_the_rank() -> None:
    jacobian = jacobian_of("dilated-1")
    totals = [total_capacity(jacobian, mu=mu) for mu in (1e-1, 1e-3, 1e-9)]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(total_capacity(jacobian), abs=1e-6)


def test_several_outputs_add_up() -> None:
    single = window(8, 3).jacobian(torch.ones(3, dtype=torch.float64))
    independent = torch.zeros(8, 2, 6, dtype=torch.float64)
    independent[:, 0, :3], independent[:, 1, 3:] = single, single
    assert total_capacity(independent) == 6
    torch.testing.assert_close(spatial_allocation(independent), 2 * spatial_allocation(single))
    tied = torch.stack([single, 2 * single], 1)
    assert total_capacity(tied) == 3
    torch.testing.assert_close(spatial_allocation(tied), spatial_allocation(single))
    sigma = covariance("ar")[:8, :8]
    assert spatial_allocation(tied, sigma, convention="O").sum().item() == pytest.approx(3)
    assert subspace_capacity(tied, torch.eye(8), sigma) == pytest.approx(3)


def test_degenerate_inputs() -> None:
    zero = torch.zeros(4, 2)
    assert total_capacity(zero) == 0
    assert spatial_allocation(zero).tolist() == [0.0] * 4
    assert constraint_basis(zero).shape == (4, 0)
    singular = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert total_capacity(torch.eye(4), singular) == 2
    assert spatial_allocation(torch.eye(4), singular, convention="O").tolist() == pytest.approx([1, 1, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total_capacity(torch.zeros(3)), r"shape \(D, P\) or \(D, M, P\), got \(3,\)"),
        (lambda: total_capacity(torch.full((2, 2), float("nan"))), "finite"),
        (lambda: total_capacity(torch.eye(2), torch.full((2, 2), float("nan"))), "covariance must be finite"),
        (lambda: total_capacity(torch.eye(2), torch.eye(3)), r"covariance must have shape \(2, 2\)"),
        (lambda: total_capacity(torch.eye(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: total_capacity(torch.eye(2), 1e-4 * torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: total_capacity(torch.eye(2), -torch.eye(2)), "positive semi-definite"),
        (lambda: total_capacity(torch.eye(2), mu=-1.0), "mu must be 0 or positive"),
        (lambda: spatial_allocation(torch.eye(2), torch.diag(torch.tensor([1.0, 0.0])), convention="C"), "positive definite"),
        (lambda: spatial_allocation(torch.eye(2), convention="Z"), "convention must be one of C, O, R, W; got 'Z'"),
        (lambda: subspace_capacity(torch.eye(2), torch.ones(2, 2)), "orthonormal"),
        (lambda: subspace_capacity(torch.eye(2), torch.ones(3, 1)), r"basis must have shape \(2, A\)"),
        (lambda: subspace_capacity(torch.eye(2), torch.eye(2), convention="O"), "convention must be one of C, R, W"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_rounding_of_single_precision_is_no_constraint() -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(60, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    assert total_capacity(jacobian) == total_capacity(jacobian.double(), tolerance=1e-5) == 3
    assert constraint_basis(jacobian).shape == (60, 3)
    for values in (spatial_allocation(jacobian), parameter_leverage(jacobian)):
        assert float(values.sum()) == pytest.approx(3)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_no_scale_is_too_small_or_large_to_count(scale: float) -> None:
    jacobian = scale * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert total_capacity(jacobian) == 4
    torch.testing.assert_close(spatial_allocation(jacobian), spatial_allocation(jacobian / scale))
