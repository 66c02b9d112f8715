from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capnas.errors import UsageError
from capnas.measures.region_bounds import dimension_histogram, montufar_bound, region_bound, vc_comparator


def test_region_bounds_of_the_reference(shared: Path) -> None:
    for case in json.loads((shared / "theory/layer_algebra_reference.json").read_text())["relu_regions"]:
        w = case["widths"]
        assert montufar_bound(w) == case["montufar2017_product"]
        assert region_bound(w) == case["serra2018"]
        assert dimension_histogram(w) == {int(k): v for k, v in case["dimension_histogram"].items()}
        assert region_bound(w, carried=True) == case["with_identity_skip_every_layer"]


def serra_sum(widths: list[int]) -> int:
    """Serra et al. 2018 as printed: a sum over tuples of numbers of active units."""
    total = 0
    for js in itertools.product(*(range(n + 1) for n in widths[1:])):
        free = widths[0]
        product = 1
        for n, j in zip(widths[1:], js):
            if j > min(free, n):
                break
            product *= math.comb(n, j)
            free = min(free, n - j)
        else:
            total += product
    return total


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_histogram_equals_the_sum_over_tuples_and_lies_below_the_product(widths: list[int]) -> None:
    assert region_bound(widths) == serra_sum(widths) <= montufar_bound(widths)
    assert region_bound(widths) <= region_bound(widths, carried=True)


def count_regions(widths: list[int], seed: int) -> int:
    """Regions of a random ReLU net on a fine grid of the plane: a lower count of the true number."""
    rng = np.random.default_rng(seed)
    side = np.linspace(-6, 6, 300)
    x = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    codes = []
    for a, b in itertools.pairwise(widths):
        z = x @ rng.normal(size=(a, b)) + rng.normal(size=b)
        codes.append(z > 0)
        x = np.maximum(z, 0)
    return len(np.unique(np.packbits(np.concatenate(codes, 1), axis=1), axis=0))


def test_bound_holds_for_sampled_networks_and_is_met_by_one_layer() -> None:
    counts = [count_regions([2, 3, 3], seed) for seed in range(4)]
    assert max(counts) <= region_bound([2, 3, 3])
    assert max(count_regions([2, 3], seed) for seed in range(12)) == region_bound([2, 3]) == 7


def test_a_network_without_weights_has_dimension_zero() -> None:
    assert vc_comparator(0, 3) == 0.0


def test_errors() -> None:
    with pytest.raises(UsageError, match=r"all >= 1, got \[2, 0\]"):
        region_bound([2, 0])
    with pytest.raises(UsageError, match="one flag for each of the 2 layers, got 1"):
        region_bound([2, 2, 2], carried=[True])
