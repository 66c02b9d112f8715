from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from capnas.measures.narrowing import (
    Reader,
    _Elimination,
    factor,
    gram,
    mixture,
    moved_norm,
    principal_axes,
    refit,
    removal_path,
    root,
    turned_reader,
)


def correlated(d: int, seed: int) -> Tensor:
    x = torch.randn(200, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x.T @ x / len(x)


def reader(units: int, b: int, outputs: int, seed: int) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    d = units * b + 1  # one column belongs to no unit
    gradient = torch.randn(50, outputs, generator=generator, dtype=torch.float64)
    return Reader(
        weight=torch.randn(outputs, d, generator=generator, dtype=torch.float64),
        covariance=correlated(d, seed),
        columns=torch.randperm(d - 1, generator=generator).reshape(units, b),
        curvature=gradient.T @ gradient / 50,
    )


def best_loss(r: Reader, gone: list[int], ridge: float) -> float:
    """1/2 tr(G dW A dW^T) at the best weights of the columns that stay, from the normal equations of those columns alone."""
    a = r.covariance.numpy() + (ridge * float(r.covariance.diagonal().mean()) + 1e-12) * np.eye(len(r.covariance))
    w, g = r.weight.numpy(), r.curvature.numpy()
    lost = np.zeros(len(a), bool)
    lost[r.columns[gone].flatten().numpy()] = True
    new = np.zeros_like(w)
    new[:, ~lost] = np.linalg.solve(a[np.ix_(~lost, ~lost)], a[~lost] @ w.T).T
    return 0.5 * float(np.trace(g @ (new - w) @ a @ (new - w).T))


@pytest.mark.parametrize("steps", [128, 3])
def test_losses_are_those_of_the_least_squares_fit_without_the_units(steps: int) -> None:
    readers = [reader(6, 2, 4, 1), reader(6, 1, 30, 2)]
    path = removal_path(readers, ridge=1e-3, steps=steps)
    assert sorted(path.order) == list(range(6))
    for n in range(1, 6) if steps > 6 else (2, 4, 5):
        expected = sum(best_loss(r, list(path.order[:n]), 1e-3) for r in readers)
        assert float(path.losses[n]) == pytest.approx(expected, rel=1e-6)
    assert bool((path.losses.diff() >= 0).all())


def test_units_leave_in_at_most_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []
    remove = _Elimination.remove
    monkeypatch.setattr(_Elimination, "remove", lambda self, units: (gone.append(len(units)), remove(self, units))[1])
    removal_path([reader(8, 1, 3, seed=1)], steps=3)
    assert gone == [3, 3, 1]  # the last stays


def test_each_unit_that_goes_is_the_cheapest_of_those_left() -> None:
    readers = [reader(5, 2, 4, 3)]
    path = removal_path(readers)
    for n in range(4):
        gone = list(path.order[:n])
        costs = {u: best_loss(readers[0], [*gone, u], 1e-3) for u in range(5) if u not in gone}
        assert min(costs, key=costs.__getitem__) == path.order[n]


def test_a_unit_that_others_span_costs_nothing_and_one_that_nobody_reads_neither() -> None:
    rows = torch.randn(400, 4, dtype=torch.float64)
    rows[:, 3] = rows[:, 0] - 2 * rows[:, 1]
    weight = torch.tensor([[1.0, 2.0, 0.0, 3.0]], dtype=torch.float64)
    path = removal_path([Reader(weight=weight, covariance=rows.T @ rows / 400, columns=torch.arange(4)[:, None])], ridge=1e-9)
    assert path.order[0] == 2
    assert float(path.losses[2]) < 1e-6
    assert float(path.losses[3]) > 0.1
    assert path.kept(1) == [path.order[-1]]
    assert path.kept(4) == [0, 1, 2, 3]


def test_readers_must_agree_on_their_units() -> None:
    with pytest.raises(ValueError, match=r"agree on their units, got \[6, 5\]"):
        removal_path([reader(6, 2, 4, 1), reader(5, 1, 3, 2)])
    with pytest.raises(ValueError, match="must be given"):
        removal_path([])


def test_mixture_is_the_least_squares_fit_of_each_channel_on_the_kept_ones() -> None:
    x = torch.randn(50, 5, dtype=torch.float64) + 1
    kept = torch.tensor([0, 3])
    expected = np.linalg.lstsq(x[:, kept].numpy(), x.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(mixture(x.T @ x / 50, kept, ridge=0.0).numpy(), expected, atol=1e-9)
    torch.testing.assert_close(gram(x, chunk=7), x.T @ x)


def test_root_squares_to_the_matrix() -> None:
    matrix = correlated(5, 0)
    torch.testing.assert_close(root(matrix) @ root(matrix), matrix)
    torch.testing.assert_close(factor(matrix).T @ factor(matrix), matrix)
    flat = torch.outer(torch.arange(4.0), torch.arange(4.0)).double()  # rank 1
    torch.testing.assert_close(factor(flat).T @ factor(flat), flat, atol=1e-6, rtol=1e-6)
    assert float(factor(torch.zeros(3, 3)).abs().max()) == 0


def test_wide_matrices_without_a_factor_are_lifted_and_never_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(8, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = rows.T @ rows - 1e-7 * torch.eye(40, dtype=torch.float64)  # what rounding leaves of a flat one
    sides: list[int] = []
    full = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sides.append(len(m)), full(m))[1])
    narrow = factor(matrix)
    assert sides == [40]
    monkeypatch.setattr("capnas.measures.narrowing.EXACT_EIGENVALUES", 12)
    monkeypatch.setattr("capnas.measures.saturation.EXACT_EIGENVALUES", 12)
    wide = factor(matrix)
    assert sides == [40]
    for found in (narrow, wide, root(matrix)):
        torch.testing.assert_close(found.T @ found, matrix, atol=1e-4, rtol=1e-4)
    assert float(factor(torch.zeros(40, 40)).abs().max()) == 0
    assert set(sides) == {40, 12}


def test_refit_is_least_squares_with_an_intercept() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 4, generator=generator) + 3, torch.randn(60, 2, generator=generator)
    weight, bias = refit(x, y, torch.zeros(2, 4), ridge=0.0)
    design = np.hstack([x.double().numpy(), np.ones((60, 1))])
    expected = np.linalg.lstsq(design, y.double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(np.hstack([weight.numpy(), bias.numpy()[:, None]]), expected, rtol=1e-5, atol=1e-7)


def test_refit_keeps_the_old_weights_where_samples_do_not_decide() -> None:
    prior = torch.tensor([[2.0, 5.0, -1.0]])
    x = torch.zeros(10, 3)
    x[:, 0] = torch.arange(10.0)
    weight, bias = refit(x, 4 * x[:, :1], prior)
    torch.testing.assert_close(weight[0, 1:], prior[0, 1:].double())
    assert float(weight[0, 0]) == pytest.approx(4, abs=0.01)
    same, _ = refit(torch.ones(10, 3), torch.ones(10, 1), prior)
    torch.testing.assert_close(same, prior.double())
    stiff, _ = refit(x, 4 * x[:, :1], prior, ridge=1e9)
    torch.testing.assert_close(stiff, prior.double(), rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(bias).all())


def test_losses_of_readers_of_one_and_of_several_columns_a_unit_add_up() -> None:
    one = Reader(weight=torch.tensor([[2.0, 1.0]]).sqrt(), covariance=torch.eye(2), columns=torch.tensor([[0], [1]]))
    weight = torch.tensor([[1.0, 0.0, 2.2, 0.0]]).sqrt()
    two = Reader(weight=weight, covariance=torch.eye(4), columns=torch.tensor([[0, 1], [2, 3]]))
    assert removal_path([one, two]).order == (0, 1)  # 1.0 + 0.5 against 0.5 + 1.1


def test_mixtures_of_kept_channels_that_are_the_same_are_finite() -> None:
    assert mixture(torch.ones(3, 3), torch.tensor([0, 1]))[2].tolist() == pytest.approx([0.5, 0.5], abs=1e-2)


@pytest.mark.parametrize("scale", [1e-10, 1e8])
def test_the_scale_of_the_inputs_has_no_say(scale: float) -> None:
    given, x = reader(5, 1, 3, seed=4), torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = removal_path([Reader(weight=given.weight, covariance=scale**2 * given.covariance, columns=given.columns)])
    plain = removal_path([Reader(weight=given.weight, covariance=given.covariance, columns=given.columns)])
    torch.testing.assert_close(scaled.losses / scale**2, plain.losses)
    assert scaled.order == plain.order
    targets, prior = x @ torch.ones(4, 2, dtype=torch.float64), torch.zeros(2, 4)
    weight, bias = refit(scale * x, targets, prior)
    expected = refit(x, targets, prior)
    torch.testing.assert_close((scale * weight, bias), expected)


def test_dead_inputs_are_mixed_from_nothing_and_cost_nothing() -> None:
    assert mixture(torch.zeros(2, 2), torch.tensor([1])).tolist() == [[0.0], [1.0]]
    dead = Reader(weight=torch.ones(1, 3), covariance=torch.zeros(3, 3), columns=torch.arange(3)[:, None])
    assert float(removal_path([dead]).losses[-1]) < 1e-9


def test_a_norm_moves_by_a_bounded_factor() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    still = torch.tensor([1e-9, 1e9])  # an input that no longer varies, and one that varies without bounds
    mean, variance = moved_norm((one, one), (zero, one), (zero, still), eps=0.0)
    assert variance.tolist() == pytest.approx([1 / 16, 16.0])
    assert mean.tolist() == pytest.approx([1 / 4, 4.0])
    _, variance = moved_norm((one, 1e-7 * one), (zero, one), (zero, still), eps=1e-3)
    assert variance.tolist() == pytest.approx([0.0, 15e-3], rel=1e-2)  # no variance is below 0


def test_sums_of_single_precision_rows_are_in_double() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) + 100
    torch.testing.assert_close(gram(x, chunk=100), x.double().T @ x.double(), rtol=1e-12, atol=0)


def test_along_principal_axes_each_removal_costs_half_an_eigenvalue_and_no_choice_of_channels_costs_less() -> None:
    drawn = reader(6, 1, 5, seed=3)
    given = Reader(weight=drawn.weight, covariance=drawn.covariance, curvature=drawn.curvature, columns=torch.arange(7)[:, None])
    assert given.curvature is not None
    importance = given.weight.T @ given.curvature @ given.weight
    axes, back = principal_axes(given.covariance, importance)
    torch.testing.assert_close(axes @ back, torch.eye(7, dtype=torch.float64))
    turned = turned_reader(given, axes, back)
    torch.testing.assert_close(turned.covariance, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-3)  # but for what is added
    x = torch.randn(20, 7, dtype=torch.float64)
    torch.testing.assert_close(x @ axes.T @ turned.weight.T, x @ given.weight.double().T)
    path, channels = (removal_path([r], ridge=1e-9) for r in (turned, given))
    # the eigenvalues of A M, which is not symmetric, by another routine
    eigenvalues = np.sort(np.linalg.eigvals((given.covariance.double() @ importance.double()).numpy()).real)
    np.testing.assert_allclose(path.losses, [0, *np.cumsum(eigenvalues[:-1]) / 2], rtol=1e-3, atol=1e-6)
    assert path.order[-1] == 0  # the first axis matters most
    assert (path.losses[2:6] < 0.9 * channels.losses[2:6]).all()  # five outputs of seven inputs: two directions are free


def test_a_turned_reader_of_several_kernel_positions_reads_turned_units_at_each() -> None:
    given, axes = reader(3, 4, 2, seed=5), torch.randn(3, 3, dtype=torch.float64)
    turned = turned_reader(given, axes, axes.inverse())
    rows = torch.randn(50, 13, dtype=torch.float64)
    moved = rows.clone()
    for kernel in range(4):
        moved[:, given.columns[:, kernel]] = rows[:, given.columns[:, kernel]] @ axes.T
    torch.testing.assert_close(moved @ turned.weight.T, rows @ given.weight.double().T)
    spread = turned_reader(Reader(weight=given.weight, covariance=rows.T @ rows, columns=given.columns), axes, axes.inverse()).covariance
    torch.testing.assert_close(spread, moved.T @ moved)
