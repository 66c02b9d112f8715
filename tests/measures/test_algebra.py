from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from capnas.errors import UsageError
from capnas.measures.algebra import (
    IDENTITY,
    ZERO,
    Term,
    activation_leaf,
    add,
    concat,
    gate,
    linear_leaf,
    log2_add,
    log2_compression,
    log2_power,
    log2_regions,
    pool_leaf,
    residual,
    series,
)
from capnas.measures.ranking import spearman

terms = st.builds(
    Term,
    complexity=st.floats(0, 1e5),
    complexity_positions=st.floats(0, 1e8),
    log2_fan_in=st.one_of(st.floats(-20, 1500), st.just(-math.inf)),
    weights=st.integers(0, 10**9),
    macs=st.integers(0, 10**12),
)


def same(a: Term, b: Term) -> None:
    assert a.complexity == pytest.approx(b.complexity, rel=1e-12)
    assert a.complexity_positions == pytest.approx(b.complexity_positions, rel=1e-12)
    assert a.log2_fan_in == pytest.approx(b.log2_fan_in, rel=1e-11, abs=1e-10)
    assert (a.weights, a.macs) == (b.weights, b.macs)


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict:
    return json.loads((shared / "theory/layer_algebra_reference.json").read_text())


def test_leaf_cases_of_the_reference(reference: dict) -> None:
    for case in reference["leaf"]:
        positions = (case["spatial_in"] // case["stride"]) ** 2
        leaf = linear_leaf(
            case["c_in"], case["c_out"], kernel=case["k"] ** 2, groups=case["groups"], positions=positions, activation=case["relu"]
        )
        assert leaf.complexity == pytest.approx(case["C_loc_bits"], rel=1e-12), case["leaf"]
        assert leaf.complexity_positions == pytest.approx(case["C_pos_bits"], rel=1e-12), case["leaf"]
        assert leaf.log2_fan_in == pytest.approx(case["log2_K"], rel=1e-12), case["leaf"]
        assert leaf.weights == case["params_no_bias"]
        assert log2_compression(case["c_out"] // case["groups"], case["fan_in_r"]) == pytest.approx(math.log2(case["rho_local"]))


def test_residual_and_concat_of_the_reference(reference: dict) -> None:
    case = reference["residual_K_test"]
    assert residual(Term(log2_fan_in=case["branch_log2K"][0])).log2_fan_in == pytest.approx(case["sum_log2K"], rel=1e-14)
    case = reference["concat_K_test"]
    (c_a, k_a), (c_b, k_b) = case["identity"], case["branch"]
    both = concat([Term(log2_fan_in=k_a), Term(log2_fan_in=k_b)], [c_a, c_b])
    assert both.log2_fan_in == pytest.approx(case["log2K"], rel=1e-14)


def test_rank_correlations_of_the_reference(reference: dict) -> None:
    rows = reference["networks"]
    top1 = [row["top1"] for row in rows]
    assert len(reference["spearman_kendall_with_top1"]) == 7
    for name, expected in reference["spearman_kendall_with_top1"].items():
        values = [row[name] for row in rows]
        assert [spearman(values, top1), kendalltau(values, top1).statistic] == pytest.approx(expected, abs=5.001e-4), name


@given(terms, terms, terms)
def test_series_is_associative_with_a_neutral_element(a: Term, b: Term, c: Term) -> None:
    same(series(series(a, b), c), series(a, series(b, c)))
    same(series(a, b, c), series(series(a, b), c))
    same(series(IDENTITY, a), a)
    same(series(a, IDENTITY), a)
    assert series(a, ZERO).log2_fan_in == -math.inf


@given(terms, terms, terms)
def test_sum_and_gate_commute_and_associate(a: Term, b: Term, c: Term) -> None:
    for op in (add, gate):
        same(op(a, b), op(b, a))
        same(op(op(a, b), c), op(a, op(b, c)))
    same(add(a, ZERO), a)


@given(terms, terms, terms, st.integers(1, 512), st.integers(1, 512), st.integers(1, 512))
def test_concat_commutes_and_associates(a: Term, b: Term, c: Term, m: int, n: int, k: int) -> None:
    same(concat([a, b], [m, n]), concat([b, a], [n, m]))
    same(concat([concat([a, b], [m, n]), c], [m + n, k]), concat([a, concat([b, c], [n, k])], [m, n + k]))


@given(terms, terms, terms)
def test_a_shared_prefix_distributes_over_the_sum_for_the_fan_in(a: Term, b: Term, c: Term) -> None:
    outside, inside = series(a, add(b, c)), add(series(a, b), series(a, c))
    assert outside.log2_fan_in == pytest.approx(inside.log2_fan_in, rel=1e-11, abs=1e-10)
    assert outside.complexity <= inside.complexity  # C is not distributive: the prefix would count twice


@given(terms)
def test_a_residual_never_lowers_fan_in_or_complexity(a: Term) -> None:
    both = residual(a)
    assert both.log2_fan_in >= max(0.0, a.log2_fan_in) - 1e-12
    assert both.complexity == a.complexity


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([2, 3, 4]), st.sampled_from([1, 9, 25]), st.integers(1, 50))
def test_grouping_lowers_weights_and_fan_in_but_complexity_only_where_the_patch_is_narrow(
    c_in: int, c_out: int, groups: int, kernel: int, positions: int
) -> None:
    plain = linear_leaf(c_in * groups, c_out * groups, kernel=kernel, positions=positions)
    grouped = linear_leaf(c_in * groups, c_out * groups, kernel=kernel, groups=groups, positions=positions)
    assert grouped.weights * groups == plain.weights
    assert grouped.log2_fan_in == pytest.approx(plain.log2_fan_in - math.log2(groups))
    if c_in * kernel >= c_out:
        assert grouped.complexity == plain.complexity
    else:
        assert grouped.complexity < plain.complexity


def test_stride_changes_only_the_positions() -> None:
    dense, strided = linear_leaf(16, 16, kernel=9, positions=64), linear_leaf(16, 16, kernel=9, positions=16)
    assert dense.complexity == strided.complexity
    assert dense.log2_fan_in == strided.log2_fan_in
    assert dense.complexity_positions == 4 * strided.complexity_positions
    assert dense.macs == 4 * strided.macs


def test_pools_and_activations() -> None:
    pool = pool_leaf("max", 64, kernel=9, positions=56 * 56)
    assert pool.complexity == pytest.approx(64 * math.log2(9))
    assert pool.complexity_positions == pytest.approx(64 * math.log2(9) * 3136)
    assert pool_leaf("average", 64, kernel=9).complexity == 0
    assert pool_leaf("average", 64, kernel=9).log2_fan_in == math.log2(9)
    assert pool_leaf("average", 64, kernel=9, pool_gain="averaging").log2_fan_in == -math.log2(9)
    assert pool_leaf("max", 64, kernel=9, pool_gain="averaging") == pool_leaf("max", 64, kernel=9)  # only averages lose gain
    assert activation_leaf(7, positions=3) == Term(complexity=7.0, complexity_positions=21.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_log2_regions_against_the_plain_sum(m: int, r: int) -> None:
    assert log2_regions(m, r) == pytest.approx(math.log2(sum(math.comb(m, j) for j in range(min(m, r) + 1))), rel=1e-14)


def test_extremes_stay_finite() -> None:
    assert log2_regions(4096, 100) < 4096
    assert log2_add([1500.0, 1500.0]) == 1501.0
    assert series(*[linear_leaf(2048, 2048, kernel=9)] * 150).log2_fan_in == pytest.approx(150 * math.log2(2048 * 9))
    assert series() == IDENTITY
    assert add() == ZERO
    assert log2_power(0.0, 1) == 0.0


def test_errors() -> None:
    with pytest.raises(UsageError, match="groups that divide both widths, got in_units=3"):
        linear_leaf(3, 4, groups=2)
    with pytest.raises(UsageError, match="units and inputs must be >= 0, got -1 and 2"):
        log2_regions(-1, 2)
    with pytest.raises(UsageError, match=r"kind must be one of average, max; got 'min'"):
        pool_leaf("min", 3, kernel=4)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"pool_gain must be one of averaging, paths; got 'path'. Did you mean 'paths'"):
        pool_leaf("average", 3, kernel=4, pool_gain="path")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="positive sizes, got units=0"):
        pool_leaf("max", 0, kernel=4)
    with pytest.raises(UsageError, match="one number of units for each term"):
        concat([IDENTITY], [1, 2])


def test_a_bias_is_one_weight_an_output() -> None:
    assert [linear_leaf(3, 5, kernel=4, bias=bias).weights for bias in (False, True)] == [60, 65]
