"""Spectra too wide for double precision, and the numerical rank, against matrices whose eigenvalues are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capnas.measures import saturation as s
from capnas.measures import singular
from capnas.measures.moments import Moments, moments_of

WIDTH, EXACT = 120, 20
STEPS = torch.arange(1, WIDTH + 1, dtype=torch.float64)
DECAYS = {
    "flat": torch.linspace(1, 0.5, WIDTH, dtype=torch.float64),
    "slow": 1 / STEPS,
    "one far above": torch.cat([torch.tensor([1e4], dtype=torch.float64), torch.linspace(1, 0.5, WIDTH - 1, dtype=torch.float64)]),
    "fast": 0.5**STEPS,
    "beyond float32": 1e40 * torch.linspace(1, 0.5, WIDTH, dtype=torch.float64),
}
THRESHOLDS = (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999)


def turned(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues along random directions."""
    basis = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    cov = (basis * values) @ basis.T
    return (cov + cov.T) / 2


def known(values: Tensor, threshold: float) -> int:
    return int((values.cumsum(0) / values.sum() < threshold).sum()) + 1


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Twenty features count as too wide; what is decomposed is noted."""
    seen: list[tuple[int, torch.dtype]] = []
    for name in ("eigh", "eigvalsh"):
        full = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, full=full: (seen.append((len(m), m.dtype)), full(m))[1])
    monkeypatch.setattr(s, "EXACT_EIGENVALUES", EXACT)
    return seen


@pytest.mark.parametrize("decay", DECAYS)
def test_wide_intrinsic_dimensions_are_those_of_the_known_eigenvalues(decay: str, narrow: list) -> None:
    values, cov = DECAYS[decay], turned(DECAYS[decay])
    spec = s.spectrum(cov)
    for threshold in THRESHOLDS:
        k = known(values, threshold)
        assert s.saturation_of(spec, threshold) * WIDTH == pytest.approx(k), threshold
        assert s.saturation(cov, threshold) * WIDTH == pytest.approx(k), threshold
        assert s.intrinsic_dimension(spec.eigenvalues, threshold, spec.total) == k, threshold
        exact = (values.cumsum(0) / values.sum() - threshold).abs().min()
        assert s.threshold_margin(spec, threshold) == pytest.approx(float(exact), abs=2 * singular.SINGLE_DOUBT)
    assert not [side for side, dtype in narrow if dtype == torch.float64 and side > EXACT]
    assert (WIDTH, torch.float32) in narrow or decay == "fast"


def test_the_spectrum_of_a_layer_wider_than_2048() -> None:
    values = torch.linspace(1, 0.5, 2304, dtype=torch.float64)
    spec = s.spectrum(torch.diag(values))
    for threshold in THRESHOLDS:
        assert s.saturation_of(spec, threshold) == known(values, threshold) / 2304, threshold


@pytest.mark.parametrize("seed", range(4))
def test_leading_eigenvalues_that_stand_for_all_say_how_far_shares_may_be_off(seed: int, narrow: list) -> None:
    values = torch.cat([torch.linspace(2, 1, EXACT - 2, dtype=torch.float64), torch.full((10,), 2e-5, dtype=torch.float64)])
    spec = s.spectrum(turned(values, seed))
    assert len(spec.eigenvalues) == EXACT
    shares, exact = torch.tensor(spec.shares, dtype=torch.float64), (values.cumsum(0) / values.sum())[:EXACT]
    assert 1e-7 < spec.doubt < 1e-5
    assert bool((shares <= exact + 1e-12).all())
    assert bool((exact <= shares + spec.doubt + 1e-12).all())
    inside = (spec.shares[4] + float(exact[4])) / 2 + spec.doubt / 4
    assert s.threshold_margin(spec, inside) == 0  # between what was found and what may be: k is open
    assert s.threshold_margin(spec, 0.99) == pytest.approx(float((exact - 0.99).abs().min()), abs=2e-5)
    beyond = 1 - spec.doubt / 4
    assert s.intrinsic_dimension(spec.eigenvalues, beyond, spec.total) == EXACT < known(values, beyond)  # a bound, and flagged
    assert s.threshold_margin(spec, beyond) == 0
    low, high = (known(values, beyond + side * singular.SINGLE_DOUBT) for side in (-1, 1))
    assert EXACT < low <= round(s.saturation(turned(values, seed), beyond) * len(values)) <= high  # all eigenvalues, in single precision


def test_no_subspace_is_sought_where_none_can_hold_the_variance(narrow: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "_leading_subspace", None)
    assert s.saturation(turned(DECAYS["flat"])) * WIDTH == pytest.approx(known(DECAYS["flat"], 0.99))


@pytest.mark.parametrize("threshold", [0.5, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_wide_lossless_projection_keeps_its_share_with_the_fewest_directions(decay: str, threshold: float, narrow: list) -> None:
    values, cov = DECAYS[decay], turned(DECAYS[decay])
    project = s.lossless_projection(Moments(count=1, mean=torch.zeros(WIDTH, dtype=torch.float64), scatter=cov), threshold)
    k = project.basis.shape[1]
    torch.testing.assert_close(project.basis.T @ project.basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float((project.basis.T @ cov @ project.basis).trace() / values.sum()) >= threshold - 1e-9
    if threshold < 1:
        assert k == known(values, threshold)
    elif decay != "fast":  # which ends below what single precision can tell from 0
        assert k == WIDTH
    assert not [side for side, dtype in narrow if dtype == torch.float64 and side > EXACT]


def test_wide_eigenvectors_that_leading_ones_cannot_stand_for(narrow: list) -> None:
    values, cov = DECAYS["slow"], turned(DECAYS["slow"])
    found, vectors = s.leading_eigenvectors(cov)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close((vectors * found) @ vectors.T, cov, rtol=0, atol=1e-5)


@pytest.mark.parametrize("break_with", ["error", "not a number"])
def test_a_float32_solver_that_fails_is_replaced(break_with: str, narrow: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if break_with == "error":
            raise torch.linalg.LinAlgError("did not converge")
        return matrix[0] * float("nan")

    values, cov = DECAYS["flat"], turned(DECAYS["flat"])
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (fails(m), fails(m)))
    assert s.saturation(cov) * WIDTH == pytest.approx(known(values, 0.99))
    torch.testing.assert_close(s.leading_eigenvectors(cov)[0], values, rtol=1e-9, atol=1e-10)


def test_threshold_one_is_the_numerical_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 3, 9, 10):
        for _ in range(25):
            rows = torch.randn(200, rank, dtype=torch.float64, generator=generator)
            rows = rows @ torch.randn(rank, 10, dtype=torch.float64, generator=generator)
            cov = rows.T @ rows / 200
            assert s.saturation(cov, 1.0) * 10 == pytest.approx(rank)
            assert s.saturation(cov, 1.0, legacy=True) * 10 == pytest.approx(rank - 1)
            assert s.lossless_projection(moments_of(rows), 1.0).basis.shape == (10, rank)
    assert s.saturation(torch.zeros(3, 3), 1.0) == 0
    assert s.intrinsic_dimension(torch.tensor([3.0, 1.0, 1e-9]), 1.0) == 3


@pytest.mark.parametrize("rank", [5, EXACT, 70, WIDTH])
def test_threshold_one_is_the_numerical_rank_of_wide_layers(rank: int, narrow: list) -> None:
    values = torch.where(rank >= STEPS, torch.linspace(1, 0.5, WIDTH, dtype=torch.float64), 0.0)
    assert s.saturation(turned(values), 1.0) * WIDTH == pytest.approx(rank)
    moments = Moments(count=1, mean=torch.zeros(WIDTH, dtype=torch.float64), scatter=turned(values))
    project = s.lossless_projection(moments, 1.0)
    assert project.basis.shape == (WIDTH, rank)


def test_small_true_eigenvalues_are_not_taken_for_rounding() -> None:
    values = torch.cat([torch.tensor([1e6], dtype=torch.float64), torch.linspace(1, 0.5, WIDTH - 1, dtype=torch.float64)])
    found = singular.single_eigenvalues(turned(values), float(values.sum()))
    assert int((found > 0).sum()) >= WIDTH - 2  # what a millionth of the variance may hide
    assert float((found.cumsum(0) / found.sum() - values.cumsum(0) / values.sum()).abs().max()) < singular.SINGLE_DOUBT
