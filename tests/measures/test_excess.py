from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference_excess import drawn, reference
from scipy.special import zeta

from capnas.errors import UsageError
from capnas.measures.excess import (
    Block,
    WeightLayer,
    capacity_bounds,
    chain,
    distance_to_init,
    filter_norm,
    group_norm_21,
    margins,
    norm_layer_constant,
    psi,
    simplex_classifier,
)
from capnas.measures.operator_norms import linear_norm, operator_norm


def plain(case: dict) -> tuple[Block, ...]:
    return chain(WeightLayer(norm=s, distance=b, weights=int(w)) for s, b, w in zip(case["lip"], case["dist21"], case["params"]))


def bounds_by_definition(c: np.ndarray, w: np.ndarray, n: int) -> tuple[float, float]:
    """Both bounds in plain arithmetic, term by term."""
    harmonic = sum(1 / m for m in range(1, n))
    norms = sum(math.ceil(x ** (2 / 3)) for x in c) ** 1.5
    club = 4 / n + 12 * harmonic / math.sqrt(n) * math.sqrt(math.log(2 * w.max())) * norms
    total = 0.0
    for x, count in zip(c, w):
        beta = math.ceil((len(c) * x) ** 2)
        if beta:
            total += 2 * count * (math.log(1 + beta) + zeta(1.5) ** (1 / 3) * zeta(1.5, 1 + 1 / beta) ** (2 / 3))
    return math.log10(club), math.log10(12 / math.sqrt(n) * math.sqrt(total))


def test_reference_distances(shared) -> None:
    for case in reference(shared)["distance"]:
        init = drawn(case["shape"], case["seed_init"], case["scale"])
        weight = init + drawn(case["shape"], case["seed_delta"], case["scale"])
        assert distance_to_init(weight, init) == pytest.approx(case["dist21"], rel=1e-10)
        assert filter_norm(weight - init) == pytest.approx(case["dist21_filter"], rel=1e-10)
        assert filter_norm((weight - init).reshape(1, -1)) == pytest.approx(case["dist_fro"], rel=1e-10), "of one filter: Frobenius"
        assert float((weight - init).abs().flatten(1).sum(1).max()) == pytest.approx(case["max_L1_filter"], rel=1e-10)
    for case in reference(shared)["conv"]:
        weight = drawn(case["shape"], case["seed"], case["scale"])
        assert group_norm_21(weight) == pytest.approx(case.get("norm21", case.get("norm21_original")), rel=1e-10)
        if "norm21_filter" in case:
            assert filter_norm(weight) == pytest.approx(case["norm21_filter"], rel=1e-10)
    for case in reference(shared)["linear"]:
        weight = drawn(case["shape"], case["seed"], case["scale"])
        assert group_norm_21(weight) == pytest.approx(case["norm21_rows"], rel=1e-10)
        assert filter_norm(weight.reshape(1, -1)) == pytest.approx(case["frobenius"], rel=1e-10)


def test_reference_psi(shared) -> None:
    for row in reference(shared)["bounds"]["psi_table"]:
        assert psi(row["b"]) == pytest.approx(row["psi_theorem"], rel=1e-12)


def test_reference_bounds_of_plain_networks(shared) -> None:
    cases = reference(shared)["bounds"]["cases"]
    assert len(cases) == 3
    for case in cases:
        bounds = capacity_bounds(plain(case), data_norm=case["norm_X_frobenius"], samples=case["n"], margin=case["gamma"])
        assert [10**c for c in bounds.constants] == pytest.approx(case["C_tilde"], rel=1e-9)
        assert 10**bounds.club == pytest.approx(case["club_theorem_with_ceil"], rel=1e-9)
        assert 10**bounds.spade == pytest.approx(case["spade_theorem"], rel=1e-9)
        assert 10**bounds.lipschitz == pytest.approx(math.prod(case["lip"]), rel=1e-9)


def test_the_authors_coded_bounds_differ_as_said_and_we_follow_the_theorem(shared) -> None:
    for case in reference(shared)["bounds"]["cases"]:
        n, w = case["n"], np.array(case["params"])
        bounds = capacity_bounds(plain(case), data_norm=case["norm_X_frobenius"], samples=n, margin=case["gamma"])
        c = 10 ** np.array(bounds.constants)

        def unceiled(c: np.ndarray, w: np.ndarray, growth: float, n: int = n) -> float:
            return 4 / n + 12 * growth / math.sqrt(n) * math.sqrt(math.log(2 * w.max())) * (c ** (2 / 3)).sum() ** 1.5

        club = unceiled(c, w, math.log(n))
        assert club == pytest.approx(case["club_as_coded_float64"], rel=1e-9)
        assert unceiled(c, w, sum(1 / m for m in range(1, n))) == pytest.approx(case["club_theorem_without_ceil"], rel=1e-9)
        sides, kernel = np.array([*case["d_in"], 1.0]), np.array(case["kernel"])
        outputs, taken = sides[1:], sides[:-1] * sides[1:] / kernel
        bartlett = unceiled(c * outputs**2 / kernel, w * taken**2, math.log(n))
        assert bartlett == pytest.approx(case["bartlett_as_coded_float64"], rel=1e-9)
        spade = 0.0
        for x, count in zip(c, w):
            beta = (len(c) * x) ** 2
            spade += 2 * count * (math.log(1 + beta) + (zeta(1.5) ** (1 / 3) * zeta(1.5, 1 + 1 / beta**2) if beta else 0.0))
        assert 12 / math.sqrt(n) * math.sqrt(spade) == pytest.approx(case["spade_as_coded_float64"], rel=1e-9)
        assert abs(10**bounds.club / club - 1) > 0.04, "ln n for the harmonic number, no ceiling"
        assert abs(10**bounds.spade / case["spade_as_coded_float64"] - 1) > 0.01, "another psi, no ceiling"


def readme_network() -> tuple[Block, ...]:
    """The residual network of the reference file: stem, 2 blocks in 4 stages each, fixed classifier; smaller kernels at sides 2 and 1."""

    def conv(c_out: int, c_in: int, k: int, norm: float = 0.8) -> WeightLayer:
        return WeightLayer(norm=norm, distance=90.0, weights=c_out * c_in * k * k)

    blocks = [*chain([conv(64, 3, 7, 2.0)])]
    width = 64
    for stage, (c, k) in enumerate(((64, 3), (128, 3), (256, 2), (512, 1))):
        first = {2: 3, 3: 2}.get(stage, k)  # a block that halves the image still sees the larger one in its first convolution
        joined = math.sqrt(2) if stage else 1.0
        blocks.append(Block(branches=((conv(c, width, first), conv(c, c, k)),), shortcut=joined))
        blocks.append(Block(branches=((conv(c, c, k), conv(c, c, k)),), shortcut=1.0))
        width = c
    return (*blocks, *chain([WeightLayer(norm=1.0, weights=5120)]))


def test_reference_bounds_of_the_residual_network(shared) -> None:
    (case,) = reference(shared)["residual_bound"]["cases"]
    network = readme_network()
    layers = [layer for block in network for branch in block.branches for layer in branch]
    assert len(layers) == case["L_total_layers"]
    assert sum(layer.weights for layer in layers[:-1]) == case["sum_params_without_fc"]
    assert max(layer.weights for layer in layers) == case["max_params"]
    bounds = capacity_bounds(network, data_norm=case["norm_X"], samples=case["n"], margin=case["gamma"])
    assert 10**bounds.lipschitz == pytest.approx(case["net_lipschitz_constraint"], rel=1e-9)
    assert 10 ** bounds.constants[0] == pytest.approx(case["C_tilde_conv1"], rel=1e-9)
    assert 10 ** bounds.constants[1] == pytest.approx(case["C_tilde_identity_block_layer"], rel=1e-9)
    assert 10 ** bounds.constants[5] == pytest.approx(case["C_tilde_downsample_block_layer"], rel=1e-9)
    assert bounds.constants[-1] == -math.inf, "the classifier is fixed"
    assert 10**bounds.club == pytest.approx(case["club"], rel=1e-9)
    assert 10**bounds.spade == pytest.approx(case["spade"], rel=1e-9)
    terms = 10 ** np.array(bounds.constants) * case["gamma"] * math.sqrt(case["n"]) / (4 * case["norm_X"])
    assert (terms ** (2 / 3)).sum() ** 1.5 == pytest.approx(case["residual_aware_spectral_complexity"], rel=1e-9)
    shares = sum((layer.distance / layer.norm) ** (2 / 3) for layer in layers)  # coded: as if there were no shortcuts
    assert 10**bounds.lipschitz * shares**1.5 == pytest.approx(case["naive_spectral_complexity_as_coded"], rel=1e-9)


def test_reference_constants(shared) -> None:
    constants = reference(shared)["constants"]
    for classes, norm in constants["simplex_classifier_lip"].items():
        assert linear_norm(simplex_classifier(int(classes), 256)).value == pytest.approx(norm, rel=1e-10)
    concat = Block(branches=((WeightLayer(norm=1.0),),), shortcut=1.0, join="concat")
    bounds = capacity_bounds([concat, *chain([WeightLayer(norm=1.0, weights=1)])], data_norm=1.0, samples=2, margin=1.0)
    assert 10**bounds.lipschitz == pytest.approx(constants["concat_of_two_1_lipschitz"], rel=1e-12)
    ones = torch.full((1, 1, 4, 6), 1 / 24, dtype=torch.float64)
    assert constants["global_avgpool_l2_lipschitz"] == "1/sqrt(H*W)"
    assert operator_norm(ones, (4, 6)).value == pytest.approx(1 / math.sqrt(24), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_bounds_agree_with_plain_arithmetic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, b, w = rng.uniform(0.3, 3, 5), rng.uniform(0.01, 4, 5), rng.integers(1, 1000, 5)
    n, gamma, data = 300, 0.7, 25.0
    layers = [WeightLayer(norm=a, distance=d, weights=int(c)) for a, d, c in zip(s, b, w)]
    bounds = capacity_bounds(chain(layers), data_norm=data, samples=n, margin=gamma)
    c = 4 / gamma * data / math.sqrt(n) * s.prod() * b / s
    assert [10**x for x in bounds.constants] == pytest.approx(c.tolist(), rel=1e-12)
    assert (bounds.club, bounds.spade) == pytest.approx(bounds_by_definition(c, w, n), abs=1e-12)

    residual = [Block(branches=((layers[0], layers[1]),), shortcut=1.5), Block(branches=((layers[2],), (layers[3], layers[4])))]
    bounds = capacity_bounds(residual, data_norm=data, samples=n, margin=gamma)
    first, second = 1.5 + s[0] * s[1], s[2] + s[3] * s[4]
    rest = np.array([second * s[1], second * s[0], first, first * s[4], first * s[3]])
    c = 4 / gamma * data / math.sqrt(n) * rest * b
    assert [10**x for x in bounds.constants] == pytest.approx(c.tolist(), rel=1e-12)
    assert (bounds.club, bounds.spade) == pytest.approx(bounds_by_definition(c, w, n), abs=1e-12)


def test_a_block_of_one_layer_without_shortcut_is_a_plain_layer_and_maps_without_weights_are_only_factors() -> None:
    layers = [WeightLayer(norm=1.3, distance=2.0, weights=50), WeightLayer(norm=0.7, distance=1.0, weights=20)]
    scale = {"data_norm": 10.0, "samples": 100, "margin": 1.0}
    bounds = capacity_bounds(chain(layers), **scale)
    joint = Block(branches=(tuple(layers),))
    assert capacity_bounds([joint], **scale) == pytest.approx(bounds) or capacity_bounds([joint], **scale).club == pytest.approx(
        bounds.club
    )
    pooled = capacity_bounds(chain([layers[0], WeightLayer(norm=2.0, name="max pool 3x3 / 2"), layers[1]]), **scale)
    assert pooled.lipschitz == pytest.approx(bounds.lipschitz + math.log10(2))
    assert pooled.constants == pytest.approx([c + math.log10(2) for c in bounds.constants])
    doubled = capacity_bounds(chain(layers), **{**scale, "margin": 0.5})
    assert (pooled.club, pooled.spade) == pytest.approx((doubled.club, doubled.spade)), "the pool is no layer: L stays 2"


@pytest.mark.parametrize("change", [{"norm": 1.7}, {"distance": 9.0}, {"weights": 5000}])
def test_bounds_grow_with_every_constant_of_a_layer(change: dict) -> None:
    layers = [WeightLayer(norm=1.3, distance=5.0, weights=600)] * 3
    more = [layers[0], replace(layers[1], **change), layers[2]]
    a, b = (capacity_bounds(chain(x), data_norm=30.0, samples=100, margin=1.0) for x in (layers, more))
    assert b.club > a.club
    assert b.spade > a.spade


def test_bounds_fall_with_the_margin_and_grow_with_the_data_norm() -> None:
    blocks = readme_network()
    a, b, c = (capacity_bounds(blocks, data_norm=d, samples=1000, margin=m) for d, m in ((1000.0, 1.0), (1000.0, 2.0), (3000.0, 1.0)))
    assert b.club < a.club < c.club
    assert b.spade < a.spade < c.spade


def test_very_deep_and_vanishing_networks_neither_overflow_nor_warn() -> None:
    deep = [WeightLayer(norm=50.0, distance=1e5, weights=10**7)] * 1000
    bounds = capacity_bounds(chain(deep), data_norm=1e4, samples=50000, margin=1e-6)
    assert 1690 < bounds.lipschitz < 1710
    assert 1700 < bounds.club < 1730
    assert 5 < bounds.spade < 8
    tiny = capacity_bounds(chain([WeightLayer(norm=1e-30, distance=1e-30, weights=10)] * 1000), data_norm=1.0, samples=10, margin=1.0)
    ones = bounds_by_definition(np.full(1000, 1e-3 - 1e-6), np.full(1000, 10), 10)
    assert (tiny.club, tiny.spade) == pytest.approx(ones), "every moved layer counts at least 1 in either sum"


def test_a_layer_of_norm_zero_stops_the_others_but_not_itself() -> None:
    layers = [WeightLayer(norm=0.0, distance=2.0, weights=5), WeightLayer(norm=3.0, distance=1.0, weights=5)]
    bounds = capacity_bounds(chain(layers), data_norm=1.0, samples=4, margin=4.0)
    assert bounds.lipschitz == -math.inf
    assert bounds.constants == (pytest.approx(math.log10(0.5 * 3.0 * 2.0)), -math.inf)


def test_without_any_distance_the_bounds_are_the_floor() -> None:
    bounds = capacity_bounds(chain([WeightLayer(norm=2.0, weights=9)]), data_norm=1.0, samples=40, margin=1.0)
    assert bounds.club == pytest.approx(math.log10(4 / 40))
    assert bounds.spade == -math.inf
    assert capacity_bounds(chain([WeightLayer(norm=2.0, distance=1.0, weights=9)]), data_norm=1.0, samples=1, margin=1.0).club > -math.inf


def test_psi_increases_from_0_to_its_supremum_and_bounds_the_series_it_stands_for() -> None:
    values = [psi(b) for b in (0, 1e-3, 0.5, 1, 2, 10, 1e3, 1e9)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] < zeta(1.5) < 2.7
    k = np.arange(1, 2_000_000)
    for b in (1, 50):
        series = float((k**-0.5 / (k + 1 / b)).sum())
        assert series < psi(b)
        assert psi(b) < 1.2 * series


def test_group_norm_of_a_depthwise_kernel_is_that_of_its_dense_expansion_and_filter_norm_is_never_larger() -> None:
    weight = drawn([4, 1, 3, 3], 8)
    dense = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    dense[range(4), range(4)] = weight[:, 0]
    assert group_norm_21(weight) == pytest.approx(group_norm_21(dense)) == pytest.approx(float(weight.abs().sum()))
    full = drawn([4, 3, 3, 3], 8)
    assert group_norm_21(full) / 3 <= filter_norm(full) <= group_norm_21(full)
    assert group_norm_21(full) == pytest.approx(np.sqrt((full.numpy() ** 2).sum(1)).sum())


def test_distance_is_a_metric_and_zero_at_initialization() -> None:
    a, b, c = (drawn([3, 2, 3, 3], seed) for seed in (1, 2, 3))
    assert distance_to_init(a, a) == 0
    assert distance_to_init(a, b) == distance_to_init(b, a) > 0
    assert distance_to_init(a, c) <= distance_to_init(a, b) + distance_to_init(b, c)
    half = a.bfloat16()
    assert distance_to_init(half, half) == 0
    with pytest.raises(UsageError, match=r"one shape; got \(3, 2, 3, 3\) and \(3, 2\)"):
        distance_to_init(a, a[..., 0, 0])


@pytest.mark.parametrize("affine", [True, False])
def test_a_counted_batch_norm_bounds_the_operator_norm_of_the_pair(affine: bool) -> None:
    conv, norm = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False).double(), torch.nn.BatchNorm2d(5, affine=affine).double().eval()
    norm.running_var.uniform_(0.2, 3)
    if affine:
        torch.nn.init.normal_(norm.weight)
    scale = (1.0 if norm.weight is None else norm.weight.detach()) / (norm.running_var + norm.eps).sqrt()
    pair = conv.weight.detach() * scale.reshape(-1, 1, 1, 1)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, pair, padding=1), norm(conv(x)).detach())
    counted = operator_norm(conv.weight, 6, padding=1).value * norm_layer_constant(norm.weight, norm.running_var, norm.eps)
    assert operator_norm(pair, 6, padding=1).value <= counted


def test_layer_norm_counted_at_the_smallest_variance_bounds_its_slope_on_the_data() -> None:
    layer = torch.nn.LayerNorm(6).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(20, 6, dtype=torch.float64)
    slopes = [torch.linalg.matrix_norm(torch.autograd.functional.jacobian(layer, row), 2) for row in x]
    constant = norm_layer_constant(layer.weight, x.var(1, unbiased=False).min().reshape(1), layer.eps)
    assert max(map(float, slopes)) <= constant


def test_margins_are_own_score_minus_best_other() -> None:
    logits, targets = torch.randn(30, 7), torch.randint(0, 7, (30,))
    slow = [float(row[y] - max(v for j, v in enumerate(row) if j != y)) for row, y in zip(logits, targets)]
    assert margins(logits, targets).tolist() == pytest.approx(slow)
    assert ((margins(logits, targets) > 0) == (logits.argmax(1) == targets)).all()


@pytest.mark.parametrize(("classes", "features"), [(2, 1), (2, 5), (10, 9), (10, 64)])
def test_simplex_classifier_is_a_regular_simplex_and_turns_nothing_up(classes: int, features: int) -> None:
    rows = simplex_classifier(classes, features).double()
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(rows @ rows.T, gram, atol=1e-6, rtol=0)
    assert linear_norm(rows).value == pytest.approx(math.sqrt(classes / (classes - 1)), rel=1e-6)


def test_unusable_input_is_named() -> None:
    layer = WeightLayer(norm=1.0, distance=1.0, weights=3)
    with pytest.raises(UsageError, match="finite and not negative; got WeightLayer"):
        WeightLayer(norm=math.nan)
    with pytest.raises(UsageError, match="finite and not negative"):
        WeightLayer(norm=1.0, distance=-1.0)
    with pytest.raises(UsageError, match="join must be one of add, concat; got 'sum'"):
        Block(branches=((layer,),), join="sum")
    with pytest.raises(UsageError, match="shortcut must be finite"):
        Block(branches=((layer,),), shortcut=-1.0)
    with pytest.raises(UsageError, match="margin and samples must be positive"):
        capacity_bounds(chain([layer]), data_norm=1.0, samples=5, margin=0.0)
    with pytest.raises(UsageError, match="at least one layer with weights"):
        capacity_bounds(chain([WeightLayer(norm=1.0)]), data_norm=1.0, samples=5, margin=1.0)
    with pytest.raises(UsageError, match="at least 2 classes and 9 features; got 5"):
        simplex_classifier(10, 5)
