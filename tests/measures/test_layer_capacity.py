"""Capacity per layer: exact forms, their inequalities, and the Kronecker estimate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from capnas.errors import UsageError
from capnas.measures import layer_capacity
from capnas.measures.layer_capacity import (
    common_ridge,
    elasticity,
    exact_layer_capacity,
    kfac_capacity,
    kfac_spectrum,
    over_wide,
    population_ridge,
    scale_free,
    spectral_rank,
    utilisation,
)
from capnas.measures.pixel_map import parameter_scales, tangents

Parameters = dict[str, torch.Tensor]


def mlp(widths: tuple[int, ...], seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer{index}": torch.randn(out, inp, generator=generator, dtype=torch.float64) * (2 / inp) ** 0.5
        for index, (inp, out) in enumerate(pairwise(widths))
    }


def model(params: Parameters, x: torch.Tensor) -> torch.Tensor:
    for index, weight in enumerate(params.values()):
        x = weight @ x if index == 0 else weight @ torch.relu(x)
    return x


def samples(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def blocks(params: Parameters, count: int) -> dict[str, torch.Tensor]:
    return tangents(model, params, samples(count, params["layer0"].shape[1]), parameter_scales(params))


def factors(params: Parameters, count: int) -> dict[str, torch.Tensor]:
    x = samples(count, params["layer0"].shape[1])
    inputs, outputs, h = {}, {}, x
    for index, (name, weight) in enumerate(params.items()):
        inputs[name] = h if index == 0 else torch.relu(h)
        h = inputs[name] @ weight.T
        outputs[name] = h if h.requires_grad else h.requires_grad_()
    spectra = {name: torch.zeros(len(weight), len(weight), dtype=torch.float64) for name, weight in params.items()}
    for output in range(h.shape[1]):
        for name, slope in zip(params, torch.autograd.grad(h[:, output].sum(), list(outputs.values()), retain_graph=True)):
            spectra[name] += slope.T @ slope / count
    scales = parameter_scales(params)
    return {name: kfac_spectrum(inputs[name].detach().T @ inputs[name].detach() / count, spectra[name], scales[name]) for name in params}


@pytest.mark.parametrize("count", [10, 200])
def test_shares_sum_to_the_effective_dimension_between_marginal_and_solo(count: int) -> None:
    tangent = blocks(mlp((6, 7, 3)), count)
    found = exact_layer_capacity(tangent)
    rows, columns = count * 3, 6 * 7 + 7 * 3
    assert sum(found.share.values()) == pytest.approx(found.effective)
    assert 0 < found.effective <= min(rows, columns)
    for name in found.share:
        assert found.marginal[name] <= found.share[name] + 1e-9
        assert found.share[name] <= found.solo[name] + 1e-9
    whole = torch.cat(list(tangent.values()), 1).numpy()
    theta = whole @ whole.T
    slow = {
        name: float((torch.linalg.inv(torch.from_numpy(theta) + found.mu * torch.eye(rows)) @ block @ block.T).trace())
        for name, block in tangent.items()
    }
    assert found.share == pytest.approx(slow)
    assert found.mu == pytest.approx(1e-2 * theta.trace() / rows)


def test_invariant_to_rescaling_only_with_scale_free_tangents() -> None:
    params = mlp((6, 7, 3))
    moved = {"layer0": params["layer0"] * 3, "layer1": params["layer1"] / 3}
    free = [exact_layer_capacity(blocks(p, 60), mu=1e-2).share["layer0"] for p in (params, moved)]
    assert free[0] == pytest.approx(free[1], rel=1e-9)
    raw = [exact_layer_capacity(tangents(model, p, samples(60, 6))).share["layer0"] for p in (params, moved)]
    assert abs(raw[0] - raw[1]) > 1
    assert scale_free(torch.ones(2, 3), params["layer0"]).unique().item() == pytest.approx(params["layer0"].square().mean().sqrt().item())


def test_kronecker_estimate_is_exact_for_one_linear_layer() -> None:
    params = mlp((5, 3))
    count = 400
    exact = exact_layer_capacity(blocks(params, count), mu=0.3 * count)
    assert kfac_capacity(factors(params, count), mu=0.3)["layer0"] == pytest.approx(exact.share["layer0"], rel=1e-9)


def test_kronecker_estimate_is_near_the_solo_capacity() -> None:
    count = 300
    for widths in ((16, 12, 12, 4), (16, 32, 12, 4)):
        params = mlp(widths)
        spectra = factors(params, count)
        ridge = common_ridge(list(spectra.values()))
        exact = exact_layer_capacity(blocks(params, count), mu=ridge * count)
        for name, value in kfac_capacity(spectra).items():
            assert 0.95 < value / exact.solo[name] < 1.4, (widths, name)


def test_population_ridge_makes_capacity_independent_of_the_batch() -> None:
    params, found = mlp((6, 7, 3)), []
    for count in (400, 1600):
        tangent = blocks(params, count)
        found.append(exact_layer_capacity(tangent, mu=population_ridge(tangent, outputs=3, share=1e-2)).effective)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_grouped_factors_are_the_sum_over_groups() -> None:
    generator = torch.Generator().manual_seed(3)
    halves = [(torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(2)]
    grams = [(a.T @ a, b.T @ b) for a, b in halves]
    whole = kfac_spectrum(torch.stack([a for a, _ in grams]), torch.stack([b for _, b in grams]), 0.5)
    parts = torch.cat([kfac_spectrum(a, b, 0.5) for a, b in grams])
    torch.testing.assert_close(whole, parts)
    dense = torch.linalg.eigvalsh(torch.kron(grams[0][0], grams[0][1]).double()) * 0.25
    torch.testing.assert_close(kfac_spectrum(*grams[0], 0.5).sort().values, dense, atol=1e-4, rtol=1e-3)


def mostly_zero(seed: int, size: int = 256) -> torch.Tensor:
    """A Gram matrix of gradients of which few rows are not zero: MKL's float32 solver raises on 5 of the first 8 and gives NaN on 2."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 4, generator=generator) @ torch.randn(4, 2 * size, generator=generator)
    rows *= (torch.rand(size, 1, generator=generator) < 0.06).float()
    return rows @ rows.T


@pytest.mark.parametrize("seed", range(8))
def test_factors_with_a_large_null_space_have_their_eigenvalues(seed: int) -> None:
    gram = mostly_zero(seed)
    exact = torch.linalg.eigvalsh(gram.double())
    found = kfac_spectrum(gram, torch.ones(1, 1)).sort().values
    torch.testing.assert_close(found, exact.clamp_min(0), rtol=1e-5, atol=1e-5 * float(exact.max()))


@pytest.mark.parametrize("largest", [2048, 100])
@pytest.mark.parametrize("silent", [True, False])
def test_factors_that_float32_cannot_solve_are_solved_in_float64_or_by_singular_values(
    silent: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, tried = torch.linalg.eigvalsh, []

    def stubborn(matrix: torch.Tensor) -> torch.Tensor:
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32 and matrix.shape[-1] > 1:
            if silent:
                return torch.full(matrix.shape[:-1], float("nan"))
            raise torch.linalg.LinAlgError("failed to converge")
        return solve(matrix)

    gram = mostly_zero(0)
    exact = solve(gram.double()).clamp_min(0)
    monkeypatch.setattr(torch.linalg, "eigvalsh", stubborn)
    monkeypatch.setattr(layer_capacity, "_DOUBLE", largest)
    found = kfac_spectrum(gram, torch.ones(1, 1)).sort().values
    assert (torch.float64 in tried) == (largest == 2048)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5 * float(exact.max()))
    with pytest.raises(UsageError, match="must be finite"):
        kfac_spectrum(torch.full((2, 2), float("nan")), torch.ones(1, 1))


@pytest.mark.parametrize(
    ("hidden", "flagged"), [((12, 12), ()), ((96, 12), ("layer0", "layer1")), ((12, 96), ("layer1", "layer2")), ((40, 40), ("layer1",))]
)
def test_over_wide_layers_are_those_that_touch_the_wide_one(hidden: tuple[int, int], flagged: tuple[str, ...]) -> None:
    params = mlp((16, *hidden, 4))
    tangent = blocks(params, 300)
    found = exact_layer_capacity(tangent, mu=population_ridge(tangent, outputs=4))
    used = utilisation(found.share, {name: weight.numel() for name, weight in params.items()})
    assert all(0 <= value <= 1 for value in used.values())
    assert over_wide(used) == flagged


def test_over_wide_rule_uses_the_upper_quartile_of_deep_networks() -> None:
    used = {f"l{i}": 0.4 for i in range(9)} | {"peak": 1.0, "low": 0.15}
    assert over_wide(used) == ("low",)
    assert over_wide({"a": 1.0, "b": 0.4}) == ("b",)
    assert over_wide({}) == ()


def test_small_pieces() -> None:
    assert elasticity(8.0, 64, 4.0, 32) == pytest.approx(1)
    assert spectral_rank(torch.diag(torch.tensor([1.0, 0.0]))) == 1
    assert spectral_rank(torch.zeros(2, 2)) == 0
    assert utilisation({"a": 1.0, "b": 0.0}, {"a": 4, "b": 0}) == {"a": 0.25}
    assert kfac_capacity({"a": torch.zeros(3)}) == {"a": 0.0}
    assert common_ridge([torch.ones(30), torch.zeros(5)]) == pytest.approx(1e-3)
    assert common_ridge([torch.tensor([4.0]), torch.tensor([2.0])]) == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_layer_capacity({}), "at least one layer"),
        (lambda: exact_layer_capacity({"a": torch.ones(2, 1), "b": torch.ones(3, 1)}), r"share their number of rows, got \[2, 3\]"),
        (lambda: exact_layer_capacity({"a": torch.zeros(2, 2)}), "not all zero"),
        (lambda: common_ridge([]), "at least one layer"),
        (lambda: kfac_capacity({}), "at least one layer"),
        (lambda: elasticity(0, 100, 1, 50), "positive capacities .*; got capacities 0 and 1, parameters 100 and 50"),
        (lambda: elasticity(2, 50, 1, 50), "two different positive numbers of parameters; got .* 50 and 50"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
