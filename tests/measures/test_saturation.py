from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recording import fill, load_models

from capnas.errors import UsageError
from capnas.measures import saturation as s
from capnas.measures.moments import Moments, covariance, moments_of, update


def slow_dimension(cov: np.ndarray, threshold: float) -> int:
    """The definition, one eigenvalue at a time."""
    values = sorted(np.linalg.eigvalsh(cov).clip(0), reverse=True)
    if sum(values) <= 0:
        return 0
    explained, k = 0.0, 0
    while explained / sum(values) < threshold and k < len(values):
        explained += values[k]
        k += 1
    return k


def random_covariance(width: int, rank: int, seed: int = 0) -> torch.Tensor:
    basis = torch.randn(width, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return basis @ torch.diag(0.6 ** torch.arange(rank, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_equals_the_definition(rank: int, threshold: float) -> None:
    cov = random_covariance(12, rank, rank)
    assert s.saturation(cov, threshold) == slow_dimension(cov.numpy(), threshold) / 12


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_scale_and_rotation_change_nothing(scale: float, seed: int) -> None:
    cov = random_covariance(8, 8, seed)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    turned = scale * rotation @ cov @ rotation.T
    if s.threshold_margin(s.spectrum(cov)) > 1e-6:
        assert s.saturation(turned) == s.saturation(cov)
    assert s.effective_rank(turned) == pytest.approx(s.effective_rank(cov))


def test_more_variance_to_explain_needs_no_fewer_directions() -> None:
    spec = s.spectrum(random_covariance(20, 20))
    values = [s.saturation_of(spec, t) for t in (0.5, 0.9, 0.99, 0.999, 1.0)]
    assert values == sorted(values)
    assert values[-1] == 1


def test_published_values_stop_one_eigenvalue_short() -> None:
    cov = random_covariance(10, 6)
    assert s.saturation(cov, legacy=True) == pytest.approx(s.saturation(cov) - 0.1)
    assert s.saturation(torch.zeros(4, 4), legacy=True) == 0


def test_dead_layer_is_zero_and_not_finite_is_nan() -> None:
    assert s.saturation(torch.zeros(5, 5)) == 0
    assert s.effective_rank(torch.zeros(5, 5)) == 0
    assert s.simpson_index(torch.zeros(5, 5)) == 0
    broken = torch.full((5, 5), float("nan"))
    assert np.isnan(s.saturation(broken))
    assert np.isnan(s.effective_rank(broken))


THRESHOLDS = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e-40, 1e-120, 1e60])
def test_outputs_of_any_scale_have_the_saturation_that_numpy_counts(scale: float) -> None:
    rows = np.random.default_rng(0).normal(size=(500, 20)) * np.logspace(0, -3, 20)
    shares = np.cumsum(np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2)
    counted = [int(np.argmax(shares >= t * shares[-1])) + 1 if t < 1 else 20 for t in THRESHOLDS]
    assert len(set(counted)) == len(THRESHOLDS)
    moments = moments_of(torch.from_numpy(scale * rows))
    cov = covariance(moments)
    assert [round(20 * s.saturation(cov, t)) for t in THRESHOLDS] == counted
    assert s.lossless_projection(moments, 0.99).basis.shape == (20, counted[3])
    assert s.effective_rank(cov) == pytest.approx(shares[-1] ** 2 / (np.diff(shares, prepend=0) ** 2).sum())
    assert s.threshold_margin(s.spectrum(cov)) == pytest.approx(np.abs(shares / shares[-1] - 0.99).min(), rel=1e-6)


@pytest.mark.parametrize("value", [0.1, -1234.567, 3e-5, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rounded", [False, True])
def test_constant_outputs_are_dead_in_every_precision_and_however_they_come(dtype: torch.dtype, value: float, rounded: bool) -> None:
    rows = torch.full((1037, 6), value, dtype=dtype) * torch.tensor([1, 0.7, -0.3, 0.011, 1, 0], dtype=dtype)
    if rounded:  # as products of equal rows are, whose sums ran in another order
        rows = rows.to(torch.promote_types(dtype, torch.float32))
        flips = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        rows = torch.where(flips & (rows != 0), torch.nextafter(rows, torch.zeros_like(rows)), rows)
    pieces = Moments.empty(6)
    for part in rows.split([1, 64, 300, 7, 665]):
        pieces = update(pieces, part)
    for moments in (moments_of(rows), pieces):
        assert s.spectrum(covariance(moments)).total == 0
        assert [s.saturation(covariance(moments), t) for t in THRESHOLDS] == [0] * len(THRESHOLDS)
        assert s.effective_rank(covariance(moments)) == 0
        assert s.lossless_projection(moments).basis.shape == (6, 0)
    varying = rows.clone()
    varying[::2, 1] *= 1.05
    assert s.saturation(covariance(moments_of(varying)), 0.999) == pytest.approx(1 / 6), "what moves is told from what does not"


def test_relatives_from_their_sums() -> None:
    shares = np.array([0.5, 0.3, 0.2])
    cov = torch.diag(torch.from_numpy(7 * shares))
    assert s.simpson_index(cov) == pytest.approx((shares**2).sum())
    assert s.effective_rank(cov) == pytest.approx(1 / (shares**2).sum())


def test_wide_covariance_is_not_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    cov = random_covariance(60, 10, 3)
    exact = s.saturation(cov)
    monkeypatch.setattr(s, "EXACT_EIGENVALUES", 20)
    spec = s.spectrum(cov)
    assert len(spec.eigenvalues) == 20
    assert s.saturation_of(spec) == exact


def test_wide_projection_is_not_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    full = torch.linalg.eigh
    monkeypatch.setattr("capnas.measures.saturation.EXACT_EIGENVALUES", 12)
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(len(m)), full(m))[1])
    rows = torch.randn(400, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.0 ** -torch.arange(40)
    projection = s.lossless_projection(moments_of(rows + 3), 0.99)
    assert sizes == [12]
    values = full((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 400)[0].flip(0)
    assert projection.basis.shape == (40, s.intrinsic_dimension(values, 0.99))
    lost = (projection(rows + 3) - rows - 3).square().sum() / (rows - rows.mean(0)).square().sum()
    assert lost < 0.01


def test_leading_eigenvectors_are_those_of_the_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    cov = random_covariance(60, 10, 3)
    exact = torch.linalg.eigh(cov)
    whole = s.leading_eigenvectors(cov)
    torch.testing.assert_close(whole[0], exact[0].flip(0).clamp_min(0))
    monkeypatch.setattr(s, "EXACT_EIGENVALUES", 20)
    values, vectors = s.leading_eigenvectors(cov)
    assert vectors.shape == (60, 20)
    torch.testing.assert_close(values[:10], whole[0][:10])
    torch.testing.assert_close((vectors * values) @ vectors.T, cov, atol=1e-6, rtol=1e-6)


def test_bad_arguments_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got 1.5"):
        s.saturation(torch.eye(2), 1.5)
    with pytest.raises(ValueError, match=r"square covariance, shape \(D, D\), got shape \(2, 3\)"):
        s.saturation(torch.zeros(2, 3))


def low_rank_rows(mean: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    signal = torch.randn(300, 4, dtype=torch.float64, generator=generator) @ torch.randn(4, 16, dtype=torch.float64, generator=generator)
    return signal + 0.05 * torch.randn(300, 16, dtype=torch.float64, generator=generator) + mean


def test_projection_is_centred_so_a_shift_changes_nothing() -> None:
    plain, shifted = low_rank_rows(0.0), low_rank_rows(3.0)
    residuals = [(s.lossless_projection(moments_of(x))(x) - x).norm() / (x - x.mean(0)).norm() for x in (plain, shifted)]
    assert residuals[0] == pytest.approx(float(residuals[1]), rel=1e-9)
    assert float(residuals[0]) ** 2 < 0.01


def test_projection_is_idempotent_keeps_the_mean_and_beats_random_directions() -> None:
    x = low_rank_rows(1.0)
    moments = moments_of(x)
    project = s.lossless_projection(moments)
    once = project(x)
    torch.testing.assert_close(project(once), once)
    torch.testing.assert_close(once.mean(0), x.mean(0))
    control = s.random_projection(moments, project.basis.shape[1])(x)
    assert (once - x).norm() < 0.2 * (control - x).norm()
    assert s.lossless_projection(Moments.empty(3)).basis.shape == (3, 0)


# --------------------------------------------------------- reference numbers


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict:
    return json.loads((shared / "theory" / "saturation_reference.json").read_text())


def test_reference_spectra(reference: dict) -> None:
    for case in reference["spectra"]:
        values = torch.tensor(sorted(case["eigenvalues"], reverse=True), dtype=torch.float64)
        k = s.intrinsic_dimension(values, case["delta"])
        assert k == case["textbook_k"], case
        assert max(k - 1, 0) == case["delve_idim"], case


def test_reference_projection_dimensions_and_residual(reference: dict) -> None:
    g = np.random.default_rng(5)
    x = g.standard_normal((256, 8)) @ g.standard_normal((8, 32)) + 0.05 * g.standard_normal((256, 32))
    x = torch.from_numpy(x.astype(np.float32)).double()
    for threshold, case in reference["pca_layers"]["per_delta"].items():
        project = s.lossless_projection(moments_of(x), float(threshold))
        assert project.basis.shape[1] == case["linear_textbook_k"], threshold
        if case["linear_in_dim"] != case["linear_textbook_k"]:
            continue
        # the reference tool forgets the mean; with the mean forgotten on purpose its residual comes out
        forgotten = x @ project.basis @ project.basis.T
        assert float(((forgotten - x) ** 2).sum() / (x**2).sum()) == pytest.approx(case["linear_residual"], rel=1e-7)
        assert float(((project(x) - x) ** 2).sum() / (x**2).sum()) <= case["linear_residual"]
    assert covariance(moments_of(x)).shape == (32, 32)


def test_reference_projection_of_a_shifted_input(reference: dict) -> None:
    g = np.random.default_rng(5)
    x = g.standard_normal((256, 8)) @ g.standard_normal((8, 32)) + 0.05 * g.standard_normal((256, 32))
    x = torch.from_numpy(x.astype(np.float32)).double() + 3
    project = s.lossless_projection(moments_of(x), 0.99)
    forgotten = x @ project.basis @ project.basis.T  # what the reference tool returns
    lost = float((forgotten - project(x)).norm() / x.norm())
    assert lost == pytest.approx(reference["pca_layers"]["shifted_input"]["relative_error_vs_P(x-mu)+mu"], rel=1e-4)


def images(count: int, seed: int) -> torch.Tensor:
    g = np.random.default_rng(seed)
    coarse = g.standard_normal((count, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    return torch.from_numpy((coarse + 0.1 * g.standard_normal((count, 3, 32, 32))).astype(np.float32))


def positions(maps: torch.Tensor) -> torch.Tensor:
    """Every sample and position of (B, D, H, W) as a row, (B H W, D), in float64."""
    return maps.movedim(1, -1).flatten(0, -2).double()


def test_reference_projection_of_a_convolution(shared: Path, reference: dict) -> None:
    with torch.no_grad():
        rows = positions(fill(load_models(shared).VGGLike(8)).eval().features[:3](images(16, 7)))  # type: ignore[attr-defined]
    moments, uncentred = moments_of(rows), rows.T @ rows / len(rows)
    for threshold, case in reference["pca_layers"]["per_delta"].items():
        project = s.lossless_projection(moments, float(threshold))
        assert project.basis.shape[1] == case["conv_textbook_k_centred"], threshold
        # the reference layer keeps the leading directions of the second moment, one fewer than the definition unless 0.02 are missing
        values = s.spectrum(uncentred).eigenvalues
        assert s.intrinsic_dimension(values, float(threshold)) == case["conv_textbook_k_uncentred"], threshold
        basis = torch.linalg.eigh(uncentred)[1].flip(1)[:, : case["conv_in_dim"]]
        residual = float((rows @ basis @ basis.T - rows).square().sum() / rows.square().sum())
        assert residual == pytest.approx(case["conv_residual"], rel=1e-4), threshold
        assert float((project(rows) - rows).square().sum() / rows.square().sum()) < residual


POOLED = {
    "channelwise": positions,
    "mean": lambda maps: maps.mean((2, 3)).double(),
    "max": lambda maps: maps.amax((2, 3)).double(),
    "median": lambda maps: maps.flatten(2).median(-1).values.double(),
    "nearest": lambda maps: positions(torch.nn.functional.interpolate(maps, size=8) if max(maps.shape[2:]) > 8 else maps),
}


@pytest.mark.parametrize("rows", POOLED)
def test_reference_reductions_of_a_map_to_rows(rows: str, shared: Path, reference: dict) -> None:
    expected = reference["interpolation_nearest_8"] if rows == "nearest" else reference["conv_method"][rows]
    model = fill(load_models(shared).VGGLike(8)).train()
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name.replace(".", "-"), out))
    with torch.no_grad():
        model(images(32, 1))
    assert set(outputs) == set(expected)
    for name, out in outputs.items():
        moments = moments_of(POOLED[rows](out) if out.dim() == 4 else out.double())
        assert moments.count == expected[name]["samples"], name
        published = s.saturation(covariance(moments), legacy=True) * moments.width
        assert round(published) == expected[name]["idim"], name


def test_all_of_the_variance_leaves_rounding_out() -> None:
    assert s.intrinsic_dimension(torch.tensor([0.1, 0.1, 0.1, 1e-14], dtype=torch.float64), 1.0) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_eigenvectors_are_double_whatever_the_matrix_is(dtype: torch.dtype) -> None:
    values, vectors = s.leading_eigenvectors(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype))
    assert values.dtype == vectors.dtype == torch.float64
    assert values.tolist() == pytest.approx([3.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("measure", [s.saturation, s.effective_rank])
def test_a_matrix_of_no_features_is_refused(measure) -> None:
    with pytest.raises(UsageError, match=r"got shape \(0, 0\)"):
        measure(torch.zeros(0, 0))
