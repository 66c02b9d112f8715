from __future__ import annotations

import pytest
import torch

from capnas.measures import singular
from capnas.measures.singular import largest_eigenvalue, largest_singular_value, leading_eigenvalue, root


def matrices(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 3, 9), (4, 1, 1), (1, 1, 6)])
def test_is_the_largest_of_all_singular_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch = matrices(*shape, dtype=dtype)
    assert largest_singular_value(batch) == pytest.approx(float(torch.linalg.svdvals(batch).max()), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_pruning_by_cholesky_loses_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(singular, "_EIGENVALUES_WORK", 0)
    for seed in range(20):
        batch = matrices(40, 12, 15, seed=seed, dtype=dtype)
        assert largest_singular_value(batch) == pytest.approx(float(torch.linalg.svdvals(batch).max()), rel=1e-13)


def test_pruning_finds_a_leading_matrix_that_the_rough_iteration_ranks_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(singular, "_EIGENVALUES_WORK", 0)
    hidden = torch.block_diag(*[torch.tensor([[5.0, -4.0], [-4.0, 5.0]])] * 2)  # 9 is hidden from the start of all ones, which only sees 1
    batch = torch.stack([3 * torch.eye(4), hidden, 2 * torch.eye(4)])
    assert largest_singular_value(batch) == pytest.approx(9.0, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_wide_matrices_are_iterated_and_certified_from_above(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    batch = matrices(3, 30, 40, dtype=dtype)
    truth = [float(torch.linalg.svdvals(matrix)[0]) for matrix in batch]
    hidden = torch.block_diag(*[torch.tensor([[5.0, -4.0], [-4.0, 5.0]], dtype=dtype)] * 15)
    sides, full = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: (sides.append(m.shape[-1]), full(m))[1])
    monkeypatch.setattr(singular, "EXACT_EIGENVALUES", 20)
    monkeypatch.setattr(singular, "_EIGENVALUES_WORK", 0)
    assert largest_singular_value(batch[:1]) == pytest.approx(truth[0], rel=1e-10)
    assert largest_singular_value(batch) == pytest.approx(max(truth), rel=1e-10)
    found = float(largest_eigenvalue(hidden))
    assert 9 <= found < 9 * (1 + 1e-9)
    assert float(largest_eigenvalue(0 * hidden)) == 0
    assert sides == []
    # an iteration cut short is too low: the proof lifts it
    monkeypatch.setattr(singular, "leading_eigenvalue", lambda *args, **options: (torch.tensor([8.9], dtype=torch.float64), None, 1, False))
    assert 9 <= float(largest_eigenvalue(hidden)) < 10


def test_zero_matrices_have_norm_zero() -> None:
    assert largest_singular_value(torch.zeros(3, 4, 5)) == 0.0


@pytest.mark.parametrize("n", [1, 2, 5, 23, 24, 25, 60])
def test_iteration_agrees_with_eigenvalues_through_restarts_and_exhaustion(n: int) -> None:
    factors = matrices(4, n, n, seed=n)
    grams = factors @ factors.mT
    values, errors, _, converged = leading_eigenvalue(
        lambda v: (grams @ v[..., None])[..., 0], matrices(4, n, seed=1), tolerance=1e-12, max_steps=2000
    )
    exact = torch.linalg.eigvalsh(grams)[:, -1]
    assert converged
    assert values.max() == pytest.approx(float(exact.max()), rel=1e-10)
    assert (values <= exact * (1 + 1e-12)).all(), "Ritz values are lower bounds"
    assert (exact - values <= 3 * errors + 1e-9 * exact).all()


def test_iteration_of_a_low_rank_or_zero_map_ends_early() -> None:
    vector = matrices(1, 30)
    values, _, steps, converged = leading_eigenvalue(
        lambda v: (v * vector).sum(1, keepdim=True) * vector, matrices(1, 30, seed=2), tolerance=1e-10, max_steps=100
    )
    assert (converged, steps < 6) == (True, True)
    assert float(values) == pytest.approx(float(vector.square().sum()), rel=1e-10)
    zero, _, steps, converged = leading_eigenvalue(torch.zeros_like, matrices(2, 30), tolerance=1e-10, max_steps=100)
    assert (zero.tolist(), steps, converged) == ([0.0, 0.0], 1, True)


def test_iteration_says_when_it_did_not_converge() -> None:
    spectrum = torch.linspace(0.999, 1.0, 500, dtype=torch.float64)
    _, _, steps, converged = leading_eigenvalue(lambda v: spectrum * v, matrices(1, 500), tolerance=1e-9, max_steps=10)
    assert (steps, converged) == (10, False)


def test_root_of_a_rounded_zero_is_zero() -> None:
    assert root(torch.tensor(-1e-18)) == 0.0
