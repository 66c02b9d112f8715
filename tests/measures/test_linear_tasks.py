"""Trained linear architectures: the allocation table and its qualitative outcomes."""

from __future__ import annotations

import pytest
import torch

from capnas.errors import UsageError
from capnas.measures.linear_architectures import diagonal_rnn, dilated_allocation, dilated_stack, window
from capnas.measures.linear_tasks import LinearFit, linear_task, train_linear

SIZE = 64
BUILD = {
    "window": lambda: window(SIZE, 20),
    "wide": lambda: dilated_stack(SIZE, (1, 2, 4, 8, 16, 32), channels=2),
    "single": lambda: dilated_stack(SIZE, (1, 2, 4, 8, 16, 32)),
    "cycle": lambda: dilated_stack(SIZE, (1, 2, 4, 8, 16) * 2),
    "rnn": lambda: diagonal_rnn(SIZE, 10),
}
# lags < 8, 8 to 31, 32 and beyond; optima that are unique
TABLE = {
    ("window", "T1"): (8.0, 12.0, 0.0),
    ("window", "T2"): (8.0, 12.0, 0.0),
    ("window", "T3"): (8.0, 12.0, 0.0),
    ("window", "T4"): (8.0, 12.0, 0.05),
    ("window", "T5"): (8.0, 11.9, 0.13),
    ("wide", "T2"): (6.8, 7.9, 5.4),
    ("wide", "T4"): (7.2, 7.5, 5.3),
    ("single", "T1"): (3.6, 2.4, 1.0),
    ("single", "T2"): (3.9, 2.1, 1.0),
    ("single", "T4"): (4.0, 2.1, 0.89),
    ("single", "T5"): (3.9, 2.3, 0.83),
    ("cycle", "T1"): (5.4, 4.5, 0.05),
    ("cycle", "T2"): (5.5, 4.3, 0.28),
    ("cycle", "T3"): (0.27, 1.8, 8.0),
    ("cycle", "T4"): (5.9, 3.9, 0.28),
    ("cycle", "T5"): (4.1, 4.1, 0.77),
}
LOSS = {
    ("window", "T2"): 0.0204,
    ("wide", "T2"): 0.00008,
    ("single", "T2"): 0.0329,
    ("cycle", "T2"): 0.0147,
    ("window", "T3"): 0.50,
    ("single", "T3"): 0.50,
    ("cycle", "T3"): 0.475,
}
SLOW = {
    ("cycle", "T1"),
    ("single", "T5"),
    ("single", "T1"),
    ("cycle", "T3"),
    ("cycle", "T4"),
    ("cycle", "T5"),
    ("cycle", "T2"),
    ("wide", "T4"),
}


def fitted(model: str, task: str, **options) -> tuple[torch.Tensor, LinearFit]:
    architecture, problem = BUILD[model](), linear_task(task)
    fit = train_linear(architecture, problem, **options)
    return fit.allocation, fit


def regions(kappa: torch.Tensor) -> tuple[float, float, float]:
    return kappa[:8].sum().item(), kappa[8:32].sum().item(), kappa[32:].sum().item()


@pytest.mark.parametrize(
    ("model", "task"), [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else (), id="-".join(case)) for case in TABLE]
)
def test_allocation_at_the_optimum(model: str, task: str) -> None:
    kappa, fit = fitted(model, task, starts=6 if (model, task) in SLOW else 3)
    assert fit.converged
    assert not fit.degenerate
    assert fit.stationarity <= 1e-6 or fit.relative_loss <= 1e-20
    assert regions(kappa) == pytest.approx(TABLE[model, task], abs=0.3)
    if (model, task) in LOSS:
        assert fit.relative_loss == pytest.approx(LOSS[model, task], rel=0.06)


def test_window_is_flat_inside_and_empty_outside() -> None:
    kappa, _ = fitted("window", "T3", starts=1)
    torch.testing.assert_close(kappa, (torch.arange(SIZE) < 20).to(torch.float64), atol=1e-9, rtol=0)


def test_exponential_memory_is_exactly_representable_by_one_channel() -> None:
    weights = torch.stack([torch.ones(6, dtype=torch.float64), torch.exp(-(2.0 ** torch.arange(6, dtype=torch.float64)) / 8)], 1)
    torch.testing.assert_close(BUILD["single"]().response(weights.flatten()), linear_task("T1").target)
    kappa, fit = fitted("single", "T1", starts=2)
    assert fit.relative_loss < 1e-20
    torch.testing.assert_close(kappa, dilated_allocation(weights), atol=1e-6, rtol=0)


def test_one_channel_has_tied_optima_on_two_blocks() -> None:
    _, fit = fitted("single", "T3", starts=3)
    assert fit.relative_loss == pytest.approx(0.5, abs=1e-6)
    assert fit.converged
    assert fit.tied
    assert fit.degenerate


def test_the_tied_optima_of_one_channel_hold_the_allocation_of_the_table() -> None:
    """Any weight r behind the last two steps gives the loss 0.5, by Cauchy and Schwarz: c (1, r, r, r^2) against (1, 0, 0, 1)."""
    task, found = linear_task("T3"), {}
    for r in (0.0, 0.1, 0.19, 0.4, 1.0, 3.0):
        weights = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 0], [1, r], [1, r]], dtype=torch.float64)
        weights[0] /= 1 + r**2  # the best amplitude
        error = BUILD["single"]().response(weights.flatten()) - task.target
        slope = BUILD["single"]().jacobian(weights.flatten()).T @ error
        assert float(error.square().sum() / task.target.square().sum()) == pytest.approx(0.5, abs=1e-12)
        assert float(slope.abs().max()) < 1e-12
        found[r] = regions(dilated_allocation(weights))
    assert found[0.0] == pytest.approx((4, 2, 1))
    assert found[0.19] == pytest.approx((3.8, 2.0, 1.2), abs=0.05)
    assert all(sum(kappa) == pytest.approx(7) for kappa in found.values())


def test_repeated_cycle_forgets_far_lags_and_wide_stack_reaches_them() -> None:
    cycle, _ = fitted("cycle", "T1", starts=2)
    single, _ = fitted("single", "T1", starts=2)
    assert regions(cycle)[2] < 0.2 < 0.8 < regions(single)[2]
    wide, fit = fitted("wide", "T3", starts=2)
    assert fit.relative_loss < 1e-10
    assert regions(wide)[2] > 0.4 * wide.sum().item()


@pytest.mark.parametrize(("task", "expected"), [("T1", (5.4, 4.6, 2.0)), ("T5", (7.9, 8.2, 3.9))])
def test_two_channel_stack_solves_the_task_and_spreads_over_all_lags(task: str, expected: tuple[float, float, float]) -> None:
    kappa, fit = fitted("wide", task, starts=1, seed=1, max_evaluations=60)  # a start that ends in the optimum of the table
    assert fit.degenerate
    assert fit.relative_loss < (1e-20 if task == "T1" else 1e-6)
    assert fit.generic_rank == 20
    assert kappa.sum().item() == pytest.approx(fit.rank)
    assert (fit.rank < 20) == (task == "T1")  # exactly representable: fewer parameters are needed than there are
    assert regions(kappa) == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("task", ["T4", "T5"])
def test_recurrence_predicts_processes_and_saturates_the_nearest_lags(task: str) -> None:
    kappa, fit = fitted("rnn", task, starts=1, max_evaluations=60)
    short, _ = fitted("window", task, starts=1)
    assert fit.degenerate
    assert fit.relative_loss < 1e-4
    assert kappa[:4].min() > 0.99
    assert kappa.sum().item() == pytest.approx(fit.rank)
    assert fit.rank <= 20  # two units for each of the ten states
    assert regions(kappa)[2] > 1 > regions(short)[2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["T1", "T2", "T3"])
def test_recurrence_saturates_the_nearest_lags(task: str) -> None:
    kappa, fit = fitted("rnn", task, max_evaluations=200)
    assert kappa[0] > 0.9
    if task == "T2":
        assert fit.relative_loss < 1e-5
        assert kappa[:3].min() > 0.98
    if task == "T3":
        assert fit.relative_loss < 0.46


def test_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="task must be one of T1, T2, T3, T4, T5; got 'T9'"):
        linear_task("T9")
