from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from reference_excess import drawn, reference

from capnas.errors import UsageError
from capnas.measures.excess import distance_to_init, group_norm_21
from capnas.measures.operator_norms import linear_norm, operator_norm
from capnas.measures.projections import (
    crop,
    embed,
    project,
    project_distance,
    project_group_ball,
    project_lipschitz,
    project_radially,
    pull_back,
)


def circular(d: int):
    return lambda kernel: operator_norm(kernel, d, padding="same", padding_mode="circular").value


def group_norms(delta: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(delta, dim=1)


def test_reference_projections_onto_the_distance_ball(shared) -> None:
    cases = reference(shared)["projection_dist21"]
    assert len(cases) == 4
    for case in cases:
        delta = drawn(case["shape"], case["seed_delta"], case["scale"])
        near = project_group_ball(delta, case["radius"])
        assert group_norm_21(delta) == pytest.approx(case["norm21_before"], rel=1e-9)
        assert group_norm_21(near) == pytest.approx(case["norm21_after"], rel=1e-9)
        assert float((near - delta).norm()) == pytest.approx(case["fro_moved"], rel=1e-9)
        assert near.flatten()[:4].tolist() == pytest.approx(case["first4"], rel=1e-9, abs=1e-12)
        active = group_norms(near) > 0
        assert (int(active.sum()), active.numel()) == (case["active_groups"], case["total_groups"])
        shrunk = (group_norms(delta) - group_norms(near))[active]
        assert shrunk.tolist() == pytest.approx([case["lambda_"]] * len(shrunk), rel=1e-9)


def test_reference_projections_onto_the_lipschitz_ball(shared) -> None:
    cases = reference(shared)["projection_lipschitz"]
    assert len(cases) == 3
    for case in cases:
        weight, d, radius = drawn(case["shape"], case["seed"], case["scale"]), case["d"], case["radius"]
        grid = embed(weight, d)
        near = project_lipschitz(grid, radius)
        assert circular(d)(weight) == pytest.approx(case["spectral_before"], rel=1e-9)
        assert circular(d)(near) == pytest.approx(case["projected_full_grid_spectral"], rel=1e-9)
        assert float(near.norm()) == pytest.approx(case["projected_full_grid_fro"], rel=1e-9)
        assert float((near - grid).norm()) == pytest.approx(case["fro_moved"], rel=1e-9)
        assert group_norm_21(near) == pytest.approx(case["norm21_full_grid"], rel=1e-9)
        cut = crop(near, case["shape"][2:])
        assert circular(d)(cut) == pytest.approx(case["spectral_after_clipping_to_support"], rel=1e-9)
        assert group_norm_21(cut) == pytest.approx(case["norm21_clipped"], rel=1e-9)
        assert near.flatten()[:4].tolist() == pytest.approx(case["first4"], rel=1e-9, abs=1e-12)


def test_reference_dykstra_sweeps(shared) -> None:
    case = reference(shared)["dykstra"]
    init = drawn([8, 8, 3, 3], 11, 72**-0.5)
    norm = circular(8)(init)
    assert norm == pytest.approx(case["init_spectral_before_rescale"], rel=1e-9)
    init = init * (0.8 / norm)
    weight = init + drawn([8, 8, 3, 3], 12, 0.3)
    assert circular(8)(weight) == pytest.approx(case["start_lip"], rel=1e-9)
    assert distance_to_init(weight, init) == pytest.approx(case["start_dist21"], rel=1e-9)
    for row in case["sweeps"]:
        near = project(weight, init, distance=3.0, lipschitz=0.8, input_size=8, sweeps=row["sweeps"])
        assert circular(8)(near) == pytest.approx(row["lip"], rel=1e-9)
        assert distance_to_init(near, init) == pytest.approx(row["dist21"], rel=1e-9)
        assert float((near - weight).norm()) == pytest.approx(row["fro_moved"], rel=1e-9)
    held = project(weight, init, distance=3.0, lipschitz=0.8, input_size=8, sweeps=15, norm=circular(8))
    assert circular(8)(held) <= 0.8
    assert distance_to_init(held, init) <= 3.0
    assert circular(8)(held) > 0.79, "the last step gives away little"


@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (6, 1, 3, 3), (2, 2, 5)])
def test_distance_projection_is_the_nearest_point(shape: tuple[int, ...], radius: float) -> None:
    delta = drawn(list(shape), 6)
    near = project_group_ball(delta, radius)
    assert group_norm_21(near) == pytest.approx(min(radius, group_norm_21(delta)), abs=1e-12)
    residual = delta - near
    # optimal exactly when no point of the ball, so in particular no extreme one, correlates more with the residual
    assert float((residual * near).sum()) == pytest.approx(radius * float(group_norms(residual).max()), abs=1e-10)
    torch.testing.assert_close(project_group_ball(near, radius), near, atol=1e-12, rtol=0)


def test_points_inside_are_left_alone() -> None:
    delta = drawn([4, 3, 3, 3], 6)
    assert project_group_ball(delta, 1e3) is delta
    assert project_lipschitz(delta, 1e3) is delta
    assert project(delta, 0 * delta, input_size=3) is delta
    zero = torch.zeros(2, 3)
    assert project_group_ball(zero, 0.0).equal(zero)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("grid", [(5, 4), (6,), ()])
def test_lipschitz_projection_is_the_nearest_point(grid: tuple[int, ...], groups: int) -> None:
    kernel, radius = drawn([4, 2, *grid], 3), 0.7
    near = project_lipschitz(kernel, radius, groups=groups)
    size = grid or 1
    norm = operator_norm(near if grid else near[..., None], size, groups=groups, padding="same", padding_mode="circular").value
    assert norm == pytest.approx(radius, rel=1e-10)
    residual = (kernel - near).unflatten(0, (groups, -1))
    axes = tuple(range(3, residual.dim()))
    spectrum = torch.fft.fftn(residual, dim=axes) if axes else residual
    nuclear = float(torch.linalg.svdvals(spectrum.movedim((1, 2), (-2, -1))).sum()) / max(1, int(np.prod(grid)))
    assert float(((kernel - near) * near).sum()) == pytest.approx(radius * nuclear, rel=1e-10), "duality of operator and nuclear norm"


def test_lipschitz_projection_of_a_grid_bounds_the_zero_padded_and_the_strided_layer() -> None:
    weight, d = drawn([3, 3, 3, 3], 2), 6
    near = project(weight, 0 * weight, lipschitz=0.5, input_size=d + 2, sweeps=300)
    for options in ({}, {"stride": 2}):
        assert operator_norm(near, d, padding=1, **options).value <= 0.5 * 1.01


def test_dykstra_meets_an_independent_optimiser() -> None:
    weight, init = np.array([[2.0, -1.0], [0.5, 1.5]]), np.array([[0.3, 0.0], [0.1, -0.2]])
    limits = {"distance": 1.2, "lipschitz": 0.9}
    constraints = [
        {"type": "ineq", "fun": lambda x: limits["distance"] - np.linalg.norm(x.reshape(2, 2) - init, axis=1).sum()},
        {"type": "ineq", "fun": lambda x: limits["lipschitz"] - np.linalg.norm(x.reshape(2, 2), 2)},
    ]
    best = scipy.optimize.minimize(
        lambda x: ((x - weight.ravel()) ** 2).sum(),
        init.ravel(),
        constraints=constraints,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    near = project(torch.from_numpy(weight), torch.from_numpy(init), sweeps=3000, **limits)
    np.testing.assert_allclose(near.numpy().ravel(), best.x, atol=2e-4)
    assert linear_norm(near).value == pytest.approx(0.9, abs=1e-6)


def test_dykstra_is_nearest_among_feasible_points_and_plain_alternation_is_not() -> None:
    init = drawn([4, 3, 3, 3], 1, 0.05)
    weight = init + drawn([4, 3, 3, 3], 2, 0.5)
    limits = {"distance": 1.5, "lipschitz": 0.5}
    near = project(weight, init, input_size=6, sweeps=1500, **limits)
    alternated = weight
    for _ in range(400):
        alternated = project(alternated, init, input_size=6, sweeps=1, **limits)
    assert float((near - weight).norm()) < float((alternated - weight).norm())
    for seed in range(3, 9):
        other = init + drawn([4, 3, 3, 3], seed, 0.5)
        feasible = project(other, init, input_size=6, sweeps=15, norm=circular(6), **limits)
        assert float(((weight - near) * (feasible - near)).sum()) <= 1e-3


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((6, 4, 3, 3), 7, {"padding": 1}),
        ((6, 4, 3, 3), 8, {"padding": 1, "stride": 2}),
        ((6, 1, 3, 3), 6, {"padding": 1, "groups": 6}),
        ((4, 2, 3, 3), 6, {"padding": 2, "dilation": 2, "groups": 2}),
        ((4, 2, 3, 3), 2, {"padding": 1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_the_norm_given_both_constraints_hold_as_measured(shape, size, options, dtype) -> None:
    init = drawn(list(shape), 1, 0.05).to(dtype)
    weight = init + drawn(list(shape), 2, 0.5).to(dtype)

    def norm(w: torch.Tensor) -> float:
        return operator_norm(w, size, **options).value

    shaped = {key: options[key] for key in ("dilation", "groups") if key in options}
    held = project(weight, init, distance=2.0, lipschitz=0.4, input_size=size, norm=norm, **shaped)
    assert held.shape == weight.shape
    assert held.dtype == dtype
    assert norm(held) <= 0.4
    assert distance_to_init(held, init) <= 2.0
    assert norm(held) > 0.3 or distance_to_init(held, init) > 1.9, "one of them binds"


def test_pull_back_stops_at_the_tighter_constraint_on_a_line() -> None:
    init = drawn([4, 3], 1, 0.1)
    weight = init + drawn([4, 3], 2)

    def norm(w: torch.Tensor) -> float:
        return linear_norm(w).value

    assert pull_back(weight, init, distance=100.0, lipschitz=100.0, norm=norm) is weight
    near = pull_back(weight, init, distance=1.0, lipschitz=100.0, norm=norm)
    assert distance_to_init(near, init) == pytest.approx(1.0, rel=1e-5)
    slim = pull_back(weight, init, distance=100.0, lipschitz=0.5, norm=norm)
    assert norm(slim) == pytest.approx(0.5, rel=1e-5)
    for point, inner in ((near, init * max(0.0, 1 - 0.5 / group_norm_21(init))), (slim, 0 * init)):
        shares = (point - inner) / (weight - inner)
        torch.testing.assert_close(shares, shares[0, 0].expand_as(shares))
    assert distance_to_init(near, init) <= 1
    assert norm(slim) <= 0.5


def test_pull_back_keeps_what_was_learnt_also_from_a_start_on_the_boundary() -> None:
    init = drawn([4, 3, 3, 3], 1)
    init *= 0.8 / circular(6)(init)
    weight = project(init + drawn([4, 3, 3, 3], 2), init, distance=3.0, lipschitz=0.8, input_size=6, sweeps=100)
    assert circular(6)(weight) > 0.8
    held = pull_back(weight, init, distance=3.0, lipschitz=0.8, norm=circular(6))
    assert float((held - weight).norm()) < 0.1 * float((weight - init).norm())


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-3])
def test_pull_back_ends_for_distances_below_rounding(distance: float) -> None:
    init = drawn([4, 3], 1).float()
    near = pull_back(init + 1.0, init, distance=distance, norm=lambda w: 0.0)
    assert distance_to_init(near, init) <= distance


def test_pull_back_to_norm_zero_needs_room_for_it() -> None:
    init = torch.eye(2)
    assert pull_back(init, init, lipschitz=0.0, norm=lambda w: linear_norm(w).value).equal(torch.zeros(2, 2))
    with pytest.raises(UsageError, match=r"its norm is 1, lipschitz is 0\.0; rescale init first"):
        pull_back(init, init, distance=1.0, lipschitz=0.0, norm=lambda w: linear_norm(w).value)


def test_a_start_outside_of_the_constraint_is_scaled_within_the_distance_or_refused() -> None:
    def norm(w: torch.Tensor) -> float:
        return linear_norm(w).value

    held = pull_back(torch.eye(2) * 4, torch.eye(2) * 2, distance=3.0, lipschitz=1.0, norm=norm)
    assert norm(held) <= 1
    assert distance_to_init(held, torch.eye(2) * 2) <= 3
    with pytest.raises(UsageError, match=r"its norm is 2, lipschitz is 1\.0; rescale init first"):
        pull_back(torch.eye(2) * 4, torch.eye(2) * 2, distance=1.5, lipschitz=1.0, norm=norm)


def test_distance_projection_moves_relative_to_the_start() -> None:
    init, weight = drawn([4, 3, 3, 3], 1), drawn([4, 3, 3, 3], 2)
    near = project_distance(weight, init, 0.5)
    assert distance_to_init(near, init) == pytest.approx(0.5)
    torch.testing.assert_close(project(weight, init, distance=0.5), near)


def test_radial_variant_rescales_to_both_balls_in_turn() -> None:
    init, weight = drawn([4, 3], 1, 0.1), drawn([4, 3], 2)
    assert project_radially(weight, init, distance=100.0, lipschitz=100.0, norm=lambda w: linear_norm(w).value).equal(weight)
    near = project_radially(weight, init, distance=0.5)
    assert distance_to_init(near, init) == pytest.approx(0.5)
    exact = project_group_ball(weight - init, 0.5)
    assert float((near - weight).norm()) > float((init + exact - weight).norm()), "radial is feasible, not nearest"
    slim = project_radially(weight, init, lipschitz=0.3, norm=lambda w: linear_norm(w).value)
    assert linear_norm(slim).value == pytest.approx(0.3)
    with pytest.raises(UsageError, match="lipschitz needs norm"):
        project_radially(weight, init, lipschitz=0.3)


def test_embedding_keeps_norm_and_distance_and_crop_undoes_it() -> None:
    weight = drawn([3, 2, 3, 3], 4)
    grid = embed(weight, 7, dilation=2)
    assert group_norm_21(grid) == pytest.approx(group_norm_21(weight))
    assert circular(7)(grid) == pytest.approx(
        operator_norm(weight, 7, dilation=2, padding="same", padding_mode="circular").value, rel=1e-12
    )
    assert crop(grid, (3, 3), dilation=2).equal(weight)
    with pytest.raises(UsageError, match=r"the grid must hold the kernel; got grid \(4, 4\) for \(3, 3\) taps, \(2, 2\) apart"):
        embed(weight, 4, dilation=2)


@pytest.mark.parametrize("call", [project_group_ball, project_lipschitz])
def test_negative_radii_are_refused(call) -> None:
    with pytest.raises(UsageError, match="radius must not be negative; got -1"):
        call(torch.ones(2, 2), -1.0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e25), (torch.float32, 1e-25), (torch.bfloat16, 1.0)])
def test_the_group_ball_is_met_in_every_precision_and_at_every_scale(dtype: torch.dtype, scale: float) -> None:
    delta = (scale * torch.randn(512, 16, 3, generator=torch.Generator().manual_seed(0))).to(dtype)
    projected = project_group_ball(delta, 50 * scale)
    assert projected.dtype == dtype
    assert group_norm_21(projected) == pytest.approx(50 * scale, rel=2 * torch.finfo(dtype).eps)
