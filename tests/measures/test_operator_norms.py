from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from reference_excess import drawn, matrix_by_loops, reference

from capnas.errors import UsageError
from capnas.measures import operator_norms
from capnas.measures.convolution import convolution
from capnas.measures.operator_norms import linear_norm, max_pool_constant, operator_norm, overlap_bound, ring_bound, unfolding_bound


def stride_of(case: dict) -> int:
    return case.get("stride", 2 if "s2" in case["name"] else 1)


def exact(case: dict, mode: str) -> float:
    return case.get(f"exact_{mode}", case.get(f"exact_{mode}_original_kernel"))


def reference_norm(case: dict, mode: str, **options):
    weight, k = drawn(case["shape"], case["seed"], case["scale"]), case["shape"][2]
    padding = "circular" if mode == "circular" else "zeros"
    return operator_norm(
        weight, case["d"], stride=stride_of(case), padding=k // 2, groups=case.get("groups", 1), padding_mode=padding, **options
    )


def test_generator_reproduces_its_check_values(shared) -> None:
    check = reference(shared)["generator"]["check"]
    assert drawn([4], check["seed"]).tolist() == pytest.approx(check["first4"], rel=1e-15)
    assert drawn([4], 42).tolist() == pytest.approx(check["seed_42_first4"], rel=1e-15)


@pytest.mark.parametrize("mode", ["circular", "zeros"])
@pytest.mark.parametrize("method", ["auto", "dense"])
def test_reference_convolutions_are_exact_to_1e_10(shared, mode: str, method: str) -> None:
    cases = reference(shared)["conv"]
    assert len(cases) == 15
    for case in cases:
        norm = reference_norm(case, mode, method=method)
        assert norm.value == pytest.approx(exact(case, mode), rel=1e-10), case["name"]
        assert norm.lower == norm.upper == norm.value


@pytest.mark.parametrize("mode", ["circular", "zeros"])
def test_reference_convolutions_by_iteration_stay_within_their_certificate(shared, mode: str) -> None:
    for case in reference(shared)["conv"]:
        single = reference_norm(case, mode, method="power", dtype=torch.float32)
        assert single.converged
        assert single.value == pytest.approx(exact(case, mode), rel=1e-4), case["name"]
        assert single.lower <= exact(case, mode) * (1 + 1e-6) <= single.upper * (1 + 2e-6)
        double = reference_norm(case, mode, method="power", tolerance=1e-12, max_steps=1000)
        assert double.value == pytest.approx(exact(case, mode), rel=1e-10), case["name"]


def test_reference_fourier_values_include_strides_and_kernels_larger_than_the_image(shared) -> None:
    seen = 0
    for case in reference(shared)["conv"]:
        if "fft_stride1_circular_on_d" not in case:
            continue
        weight = drawn(case["shape"], case["seed"], case["scale"])
        k, d = case["shape"][2], case["d"]
        assert weight.flatten()[:4].tolist() == pytest.approx(case["first4"], rel=1e-14)
        circular = {"padding": k // 2, "padding_mode": "circular", "method": "fourier"}
        assert operator_norm(weight, d, **circular).value == pytest.approx(case["fft_stride1_circular_on_d"], rel=1e-10)
        if stride_of(case) > 1 and "fft_aliased_stride_formula" in case:
            stride = 4 if case["name"].startswith("s4") else 2
            value = operator_norm(weight, d, stride=stride, **circular).value
            assert value == pytest.approx(case["fft_aliased_stride_formula"], rel=1e-10), case["name"]
            seen += 1
        assert unfolding_bound(weight) == pytest.approx(case["upper_bound_4_unfoldings"], rel=1e-10)
        assert float(weight.norm()) == pytest.approx(case["frobenius"], rel=1e-12)
    assert seen == 6


def test_reference_forward_passes(shared) -> None:
    cases = [case for case in reference(shared)["conv"] if "forward_check" in case]
    assert len(cases) == 11
    for case in cases:
        check = case["forward_check"]
        weight, x = drawn(case["shape"], case["seed"], case["scale"]), drawn(check["input_shape"], check["input_seed"])
        conv = convolution(weight, case["d"], stride=case["stride"], padding=case["shape"][2] // 2, padding_mode="circular")
        assert float(conv.forward(x).norm()) == pytest.approx(check["output_l2"], rel=1e-10), case["name"]
        assert float((conv.matrix()[0] @ x.flatten()).norm()) == pytest.approx(check["output_l2"], rel=1e-10), case["name"]


def test_the_authors_stride_1_value_is_not_the_norm_of_a_strided_layer_and_we_follow_the_layer(shared) -> None:
    strided = {case["name"]: case for case in reference(shared)["conv"] if "official_over_exact_circular" in case and case["stride"] > 1}
    for name in ("s2_k3_d8", "s2_k3_d6", "s2_k5_d8", "s4_k7_d16", "s2_k3_d7_odd", "s2_k3_d4_wide"):
        case = strided[name]
        weight, k = drawn(case["shape"], case["seed"], case["scale"]), case["shape"][2]
        side = -(-case["d"] // case["stride"])
        theirs = operator_norm(weight, side, padding=k // 2, padding_mode="circular").value  # stride 1 on the output grid
        ours = operator_norm(weight, case["d"], stride=case["stride"], padding=k // 2, padding_mode="circular").value
        assert theirs == pytest.approx(case["official_lip_converged"], rel=1e-9)
        assert theirs / ours == pytest.approx(case["official_over_exact_circular"], rel=1e-9)
        assert theirs > 1.1 * ours


def test_the_authors_replace_kernels_larger_than_the_image_and_we_keep_them(shared) -> None:
    cases = {case["name"]: case for case in reference(shared)["conv"]}
    for name in ("official_truncates_k3_on_2x2", "official_truncates_k3_on_2x2_stride2"):
        case = cases[name]
        corner = drawn(case["shape"], case["seed"], case["scale"])[..., :2, :2]
        options = {"stride": stride_of(case), "padding": "same", "padding_mode": "circular"}
        assert operator_norm(corner, 2, **options).value == pytest.approx(case["exact_circular_rewritten_kernel"], rel=1e-10)
        theirs = operator_norm(corner, 2 // stride_of(case), padding="same", padding_mode="circular").value
        assert theirs == pytest.approx(case["official_lip_converged"], rel=1e-9)
        assert reference_norm(case, "circular").value > 1.2 * case["exact_circular_rewritten_kernel"]
    case = cases["official_folds_k3_on_1x1"]
    folded = drawn(case["shape"], case["seed"], case["scale"]).sum((2, 3))
    assert linear_norm(folded).value == pytest.approx(case["exact_circular_rewritten_kernel"], rel=1e-10)
    assert linear_norm(folded).value == pytest.approx(reference_norm(case, "circular").value, rel=1e-12), (
        "for circular padding folding is right"
    )
    assert reference_norm(case, "zeros").value < 0.4 * linear_norm(folded).value


def test_reference_linear_layers(shared) -> None:
    for case in reference(shared)["linear"]:
        weight = drawn(case["shape"], case["seed"], case["scale"])
        assert linear_norm(weight).value == pytest.approx(case["exact_spectral"], rel=1e-10)
        assert linear_norm(weight, method="power", tolerance=1e-12).value == pytest.approx(case["exact_spectral"], rel=1e-10)


SHAPES = {
    "zeros": ((5, 3, 3, 3), 6, {"padding": 1}),
    "strided": ((5, 3, 3, 3), 7, {"padding": 1, "stride": 2}),
    "dilated": ((3, 2, 3, 3), 7, {"padding": 2, "dilation": 2}),
    "grouped": ((4, 2, 3, 3), 5, {"padding": 1, "groups": 2}),
    "depthwise": ((5, 1, 3, 3), 6, {"padding": 1, "groups": 5}),
    "circular, stride does not divide": ((3, 3, 3, 3), 7, {"padding": 1, "stride": 3, "padding_mode": "circular"}),
    "circular, kernel wraps": ((3, 2, 5, 5), 3, {"padding": 2, "padding_mode": "circular"}),
    "patches": ((6, 3, 2, 2), 6, {"stride": 2}),
    "patches with gaps": ((6, 3, 2, 2), 7, {"stride": 3, "padding": 1}),
    "side 1": ((4, 3, 3, 3), 1, {"padding": 1}),
    "side 2": ((4, 3, 3, 3), 2, {"padding": 1}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("method", ["auto", "dense", "power"])
def test_norm_is_that_of_the_matrix_written_out_by_loops(name: str, method: str) -> None:
    shape, d, options = SHAPES[name]
    weight = drawn(list(shape), 11)
    conv = convolution(weight, d, **options)
    dense = matrix_by_loops(
        weight.numpy(),
        [d, d],
        stride=options.get("stride", 1),
        before=options.get("padding", 0),
        outputs=list(conv.output_shape[1:]),
        dilation=options.get("dilation", 1),
        groups=options.get("groups", 1),
        mode=options.get("padding_mode", "zeros"),
    )
    truth = float(scipy.linalg.svdvals(dense)[0])
    norm = operator_norm(weight, d, method=method, tolerance=1e-12, max_steps=2000, **options)
    assert norm.value == pytest.approx(truth, rel=1e-10)
    assert norm.lower * (1 - 1e-10) <= truth <= norm.upper * (1 + 1e-10)
    assert truth <= overlap_bound(conv) * (1 + 1e-10)
    if "padding_mode" not in options:
        assert truth <= ring_bound(conv) * (1 + 1e-12)
        assert truth <= unfolding_bound(weight) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("shape", "size", "options", "method"),
    [
        ((8, 4, 1, 1), 32, {}, "patches"),
        ((8, 4, 1, 1), 32, {"stride": 2, "padding_mode": "circular"}, "patches"),
        ((8, 3, 4, 4), 32, {"stride": 4}, "patches"),
        ((8, 4, 3, 3), 16, {"padding": 1, "padding_mode": "circular"}, "fourier"),
        ((8, 4, 3, 3), 16, {"padding": 1, "stride": 2, "padding_mode": "circular"}, "fourier"),
        ((8, 4, 3, 3), 5, {"padding": 1, "stride": 2, "padding_mode": "circular"}, "dense"),
        ((8, 4, 3, 3), 5, {"padding": 1}, "dense"),
        ((16, 16, 3, 3), 32, {"padding": 1}, "power"),
    ],
)
def test_auto_takes_the_cheapest_exact_method_and_says_so(shape, size, options, method) -> None:
    norm = operator_norm(torch.randn(*shape), size, **options)
    assert (norm.method, norm.converged) == (method, True)
    assert (norm.steps > 0) == (norm.upper > norm.lower) == (method == "power")


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [
        ((1400, 1400), None, {}),
        ((1400, 1400, 1, 1), 1, {}),
        ((2300, 2300, 3), 1, {"padding": 1, "padding_mode": "circular"}),
        ((2100, 2100, 3), 2, {"padding": 1, "padding_mode": "circular"}),
    ],
    ids=["linear", "pointwise", "one cell", "two cells"],
)
def test_wide_layers_are_iterated_and_not_decomposed(shape, size, options, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = convolution(torch.empty(shape if size else (*shape, 1), device="meta"), size or 1, **options)
    assert operator_norms._choose(conv) == "power"


def test_only_what_is_no_patch_goes_by_fourier_whatever_its_size() -> None:
    periodic = {"padding": 1, "padding_mode": "circular"}
    assert operator_norms._choose(convolution(torch.empty(1600, 1600, 3, device="meta"), 2, **periodic)) == "fourier"
    weight = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0))
    norm = linear_norm(weight)
    assert norm.method == "power"
    assert norm.converged
    assert norm.value == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=2e-4)


def test_single_precision_iteration_on_a_real_size_agrees_with_double_and_its_bounds_enclose_it() -> None:
    weight = torch.randn(24, 16, 3, 3)
    fast = operator_norm(weight, 20, padding=1, tight=True)
    slow = operator_norm(weight, 20, padding=1, method="power", tolerance=1e-11, max_steps=3000, dtype=torch.float64)
    assert fast.method == "power"
    assert fast.value == pytest.approx(slow.value, rel=1e-4)
    assert fast.lower <= slow.value * (1 + 1e-6)
    assert slow.value <= fast.upper <= 1.1 * slow.value, "the ring bound is close on 20 cells"
    assert operator_norm(weight, 20, padding=1).upper > 1.3 * slow.value, (
        "the overlap bound is not, so the test above is one of the ring bound"
    )


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (8, 2, 5, 5), (3, 9, 1, 7), (2, 5, 3)])
def test_overlap_bound_is_the_unfolding_bound_or_better(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(drawn(list(shape), 3))  # as a layer holds it
    padding = tuple(k // 2 for k in shape[2:])
    flat = unfolding_bound(weight)
    assert overlap_bound(convolution(weight, 16, padding=padding)) == pytest.approx(flat, rel=1e-10)
    assert overlap_bound(convolution(weight, 2, padding=padding)) < 0.9 * flat, "on two cells few taps meet"
    assert overlap_bound(convolution(weight, 16, padding=padding, stride=2)) < 0.98 * flat, "a stride shares fewer cells"


def test_iteration_is_deterministic_and_leaves_the_generator_alone() -> None:
    weight = torch.randn(16, 16, 3, 3)
    state = torch.get_rng_state()
    assert operator_norm(weight, 32, padding=1) == operator_norm(weight, 32, padding=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_iteration_cut_short_is_reported() -> None:
    norm = operator_norm(torch.randn(16, 16, 3, 3), 16, padding=1, method="power", max_steps=3)
    assert (norm.converged, norm.steps) == (False, 3)
    assert norm.lower < norm.upper


def test_closed_forms() -> None:
    d = 9
    assert operator_norm(torch.tensor([[[1.0, 2.0, 1.0]]]), d, padding=1).value == pytest.approx(
        2 + 2 * math.cos(math.pi / (d + 1)), rel=1e-12
    )
    mean = torch.full((1, 1, 5, 5), 1 / 25)
    assert operator_norm(mean, 5).value == pytest.approx(1 / 5, rel=1e-6), "global average pooling: 1 / sqrt(H W)"
    assert operator_norm(mean, 5, padding=2, padding_mode="circular").value == pytest.approx(1.0, rel=1e-6)
    assert operator_norm(torch.eye(7)[:, :, None, None], 4).value == 1.0


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "stride": 2, "method": "power"}]
)
def test_scaling_permutation_and_triangle(options: dict) -> None:
    a, b = drawn([4, 3, 3, 3], 1), drawn([4, 3, 3, 3], 2)

    def norm(weight: torch.Tensor) -> float:
        return operator_norm(weight, 6, tolerance=1e-12, **options).value

    assert norm(-2.5 * a) == pytest.approx(2.5 * norm(a), rel=1e-10)
    assert norm(a[[2, 0, 3, 1]][:, [1, 2, 0]]) == pytest.approx(norm(a), rel=1e-9)
    assert norm(a + b) <= norm(a) + norm(b)
    assert norm(torch.cat([a, b])) <= math.hypot(norm(a), norm(b)) + 1e-9
    assert norm(torch.cat([a, b])) >= max(norm(a), norm(b)) - 1e-9


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["dense", "power"])
def test_extreme_scales_neither_overflow_nor_vanish(scale: float, method: str) -> None:
    weight = torch.randn(3, 3, 3, 3)
    norm, base = (operator_norm(weight * s, 6, padding=1, method=method).value for s in (scale, 1.0))
    assert norm == pytest.approx(scale * base, rel=1e-5)


@pytest.mark.parametrize("options", [{"method": "dense"}, {"method": "power"}, {"padding_mode": "circular", "method": "fourier"}, {}])
def test_zero_kernel_has_norm_zero(options: dict) -> None:
    norm = operator_norm(torch.zeros(3, 2, 3, 3), 4, padding=1, **options)
    assert (norm.value, norm.lower, norm.upper, norm.converged) == (0.0, 0.0, 0.0, True)


def test_depthwise_norm_is_the_largest_channel_and_that_of_the_dense_expansion() -> None:
    weight = drawn([5, 1, 3, 3], 9)
    dense = torch.zeros(5, 5, 3, 3, dtype=torch.float64)
    dense[range(5), range(5)] = weight[:, 0]
    grouped = operator_norm(weight, 7, padding=1, stride=2, groups=5).value
    assert grouped == pytest.approx(operator_norm(dense, 7, padding=1, stride=2).value, rel=1e-10)
    assert grouped == pytest.approx(max(operator_norm(weight[i : i + 1], 7, padding=1, stride=2).value for i in range(5)), rel=1e-10)


def test_strided_norm_lies_between_the_stride_1_norm_and_its_half_for_stride_2() -> None:
    for seed in range(1, 6):
        weight = drawn([4, 3, 3, 3], seed)
        dense, strided = (operator_norm(weight, 8, stride=s, padding=1, padding_mode="circular").value for s in (1, 2))
        assert dense / 2 <= strided * (1 + 1e-12) <= dense * (1 + 2e-12)


@pytest.mark.parametrize(("stride", "padding", "extra", "groups"), [(2, 1, 1, 1), (3, 0, 0, 1), (2, 1, 0, 2)])
def test_transposed_convolution(stride: int, padding: int, extra: int, groups: int) -> None:
    weight = drawn([4, 3, 3, 3], 4)
    basis = torch.eye(4 * 25, dtype=torch.float64).view(-1, 4, 5, 5)
    images = torch.nn.functional.conv_transpose2d(basis, weight, None, stride, padding, extra, groups)
    truth = float(torch.linalg.matrix_norm(images.flatten(1), 2))
    for method in ("auto", "power"):
        norm = operator_norm(
            weight, 5, stride=stride, padding=padding, output_padding=extra, groups=groups, transposed=True, method=method, tolerance=1e-12
        )
        assert norm.value == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("extra", [(0, 0), (1, 0), (2, 2)])
@pytest.mark.parametrize("method", ["auto", "power"])
def test_transposed_convolution_with_extra_cells_of_a_stride_or_more(extra: tuple[int, int], method: str) -> None:
    layer = torch.nn.ConvTranspose2d(2, 3, 3, stride=(1, 2), padding=1, dilation=3, output_padding=extra, bias=False).double()
    with torch.no_grad():
        images = layer(torch.eye(2 * 4 * 5, dtype=torch.float64).view(-1, 2, 4, 5))
    norm = operator_norm(
        layer.weight, (4, 5), stride=(1, 2), padding=1, dilation=3, output_padding=extra, transposed=True, method=method, tolerance=1e-12,
        tight=True,
    )  # fmt: skip
    truth = float(np.linalg.svd(images.flatten(1).numpy(), compute_uv=False)[0])
    assert norm.value == pytest.approx(truth, rel=1e-10)
    assert truth <= norm.upper * (1 + 1e-12)


def test_transposed_convolution_by_hand() -> None:
    found = operator_norm(torch.ones(1, 1, 3), 4, stride=1, dilation=2, transposed=True, output_padding=1)
    rows = [[1, 0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1, 0, 1, 0]]
    assert found.value == pytest.approx(float(np.linalg.svd(np.array(rows, dtype=float), compute_uv=False)[0]), rel=1e-12)


def norm_by_loops(
    weight: torch.Tensor, size: list[int], stride: list[int], padding: list[int], mode: str = "zeros", groups: int = 1
) -> float:
    outputs = [(d + 2 * p - k) // s + 1 for d, p, k, s in zip(size, padding, weight.shape[2:], stride)]
    cells = [[(o * s - p + np.arange(k)) for o in range(n)] for n, s, p, k in zip(outputs, stride, padding, weight.shape[2:])]
    c_out, c_in = weight.shape[:2]
    dense = np.zeros((c_out, *outputs, c_in * groups, *size))
    for o, *place in np.ndindex(c_out, *outputs):
        for i, *tap in np.ndindex(c_in, *weight.shape[2:]):
            read = [cells[a][place[a]][tap[a]] for a in range(len(size))]
            if mode == "replicate":
                read = [min(max(r, 0), d - 1) for r, d in zip(read, size)]
            elif mode == "circular":
                read = [r % d for r, d in zip(read, size)]
            if all(0 <= r < d for r, d in zip(read, size)):
                dense[(o, *place, o // (c_out // groups) * c_in + i, *read)] += float(weight[(o, i, *tap)])
    return float(np.linalg.svd(dense.reshape(c_out * math.prod(outputs), -1), compute_uv=False)[0])


def test_iteration_over_one_input_channel_is_right_in_single_precision() -> None:
    for seed in range(4):
        weight = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        norm = operator_norm(weight, (7, 5), stride=(1, 3), padding=(3, 0), method="power")
        assert norm.value == pytest.approx(norm_by_loops(weight, [7, 5], [1, 3], [3, 0]), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "size", "padding", "mode", "groups", "seeds"),
    [((3, 2, 2), [8], [3], "replicate", 1, (2705, 1939)), ((8, 1, 5, 5), [7, 7], [2, 2], "zeros", 8, (107, 139)),
     ((4, 2, 3), [12], [0], "zeros", 1, (21, 307, 285))],
    ids=["replicate", "depthwise", "plain"],
)  # fmt: skip
def test_iteration_of_a_small_layer_does_not_settle_on_a_smaller_singular_value(shape, size, padding, mode, groups, seeds) -> None:
    for seed in seeds:  # of the first thousands, those whose start holds the leading vector least
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norm = operator_norm(weight, size, padding=padding, padding_mode=mode, groups=groups, method="power")
        assert norm.converged
        assert norm.value == pytest.approx(norm_by_loops(weight, size, [1] * len(size), padding, mode, groups), rel=1.1e-4), seed


def test_unfolding_bound_holds_where_no_tap_reads_a_cell_twice_and_not_elsewhere() -> None:
    generator = np.random.default_rng(0)
    checked = 0
    while checked < 150:
        axes = int(generator.integers(1, 3))
        kernel, size, padding = ([int(generator.integers(low, high)) for _ in range(axes)] for low, high in ((1, 6), (1, 8), (0, 3)))
        mode = ("zeros", "circular")[checked % 2]
        fits = all(d + 2 * p >= k for d, p, k in zip(size, padding, kernel))
        if not fits or (mode == "circular" and any(2 * p >= k for p, k in zip(padding, kernel))):
            continue
        weight = torch.from_numpy(generator.normal(size=(2, 1, *kernel)))
        strides = [int(generator.integers(1, 3)) for _ in range(axes)]
        assert norm_by_loops(weight, size, strides, padding, mode) <= unfolding_bound(weight) * (1 + 1e-12)
        checked += 1
    weight = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    norm = norm_by_loops(weight, [5, 8], [2, 2], [2, 2], "circular")  # along the side of 8, six outputs read four cells
    assert (norm, unfolding_bound(weight)) == pytest.approx((2, 2**0.5))
    wide = convolution(weight, (5, 8), stride=2, padding=2, padding_mode="circular")
    assert norm <= overlap_bound(wide) * (1 + 1e-12)


@pytest.mark.parametrize(("k", "s"), [(2, 2), (3, 2), (3, 1), (1, 2)])
def test_max_pool_constant_is_reached_and_never_passed(k: int, s: int) -> None:
    generator = np.random.default_rng(0)
    base = torch.zeros(1, 1, 12, 12, dtype=torch.float64)

    def ratio(x: torch.Tensor, y: torch.Tensor) -> float:
        pooled = [torch.nn.functional.max_pool2d(v, k, s) for v in (x, y)]
        return float((pooled[0] - pooled[1]).norm() / (x - y).norm())

    constant = max_pool_constant(k, s)
    spikes = base.clone()
    spikes[0, 0, 6, 6] = 1.0
    assert ratio(base, spikes) == pytest.approx(constant)
    for _ in range(50):
        x, y = (torch.from_numpy(generator.normal(size=(1, 1, 12, 12))) for _ in range(2))
        assert ratio(x, y) <= constant


def test_reference_pool_and_classifier_constants(shared) -> None:
    constants = reference(shared)["constants"]
    assert constants["maxpool_l2_lipschitz_2d"] == "ceil(k/s)"
    assert [max_pool_constant(k, s) for k, s in ((2, 2), (3, 2), (3, 1), (5, 2))] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd"}, "method must be one of auto, dense, fourier, patches, power; got 'svd'"),
        ({"method": "fourier"}, "needs circular padding and a stride that divides"),
        ({"method": "fourier", "stride": 4, "padding": 1, "padding_mode": "circular"}, "needs circular padding and a stride that divides"),
        ({"method": "patches"}, "needs input cells that are read at most once"),
        ({"transposed": True, "padding": "same"}, "padding of a transposed convolution must be one number"),
    ],
)
def test_unusable_methods_are_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        operator_norm(torch.ones(2, 2, 3, 3), 6, **options)


def test_non_finite_weights_are_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(UsageError, match="the weight must be finite"):
            linear_norm(torch.tensor([[1.0, bad]]))


def test_ring_bound_needs_zero_padding() -> None:
    with pytest.raises(UsageError, match="needs zero padding"):
        ring_bound(convolution(torch.ones(1, 1, 3), 6, padding=1, padding_mode="circular"))
