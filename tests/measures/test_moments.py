from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capnas.errors import UsageError
from capnas.measures.moments import Moments, Sums, covariance, merge, moments_of, update


def rows(count: int, width: int = 3, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean


def test_covariance_equals_numpy() -> None:
    x = rows(50, 5)
    np.testing.assert_allclose(covariance(moments_of(x.double())).numpy(), np.cov(x.double().numpy().T, bias=True), rtol=1e-12)


def test_float32_far_from_zero_keeps_its_digits() -> None:
    x = rows(20_000, 4, seed=1).double()
    far = (x + 1000).float()
    exact = np.cov(far.double().numpy().T, bias=True)
    np.testing.assert_allclose(covariance(moments_of(far)).numpy(), exact, atol=2e-5)
    naive = (far.T @ far / len(far)) - torch.outer(far.mean(0), far.mean(0))
    assert (naive.double() - torch.from_numpy(exact)).abs().max() > 1e-2  # what the shift is for


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), mean=st.floats(-1e3, 1e3))
def test_any_split_into_batches_gives_the_same_moments(sizes: list[int], mean: float) -> None:
    x = rows(sum(sizes), 3, mean).double()
    running = Moments.empty(3)
    for part in x.split(sizes):
        running = update(running, part)
    whole = moments_of(x)
    assert running.count == whole.count
    if running.count:
        torch.testing.assert_close(running.mean, whole.mean)
        torch.testing.assert_close(running.scatter, whole.scatter, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("count", [1, 7, 19, 20, 21, 60])
def test_rows_are_kept_while_they_are_the_cheaper_side_and_nothing_hangs_on_it(count: int) -> None:
    x = rows(count, 20, 5.0).double()
    sums = Sums(20)
    for part in x.split(7):
        sums.add(part.T.clone(), len(part))
    mean, spread = sums.mean_and_spread()
    assert spread.shape == (20, min(count, 20))
    whole = moments_of(x)
    torch.testing.assert_close(mean, whole.mean)
    torch.testing.assert_close(spread if count >= 20 else spread @ spread.T, whole.scatter)


@pytest.mark.parametrize("width", [3, 64, 65, 200])
def test_sums_of_any_strides_shapes_and_number_are_those_of_all_rows(width: int) -> None:
    x = rows(2**17 // 64 + 900, width, 3.0, seed=width)
    sums = Sums(width)
    for part in x.split([500, 37, 500, 37, len(x) - 1074]):
        sums.add(part.T.reshape(width, 1, -1), len(part))  # a view of transposed rows
    for _ in range(64):  # more rows than go into the float32 sums at once
        sums.add(x.T[:, None], len(x))
    mean, scatter = sums.mean_and_spread()
    whole = moments_of(x.double())
    assert sums.count == 65 * len(x)
    torch.testing.assert_close(mean, whole.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scatter / 65, whole.scatter, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(scatter, scatter.T)


def test_sums_of_many_rows_keep_the_digits_of_each_part() -> None:
    rows = torch.randn(2, 2**17, generator=torch.Generator().manual_seed(0))
    once, often = Sums(2), Sums(2)
    for sums, times in ((once, 1), (often, 20)):
        for _ in range(times):
            sums.add(rows, seen=rows.shape[1])
    torch.testing.assert_close(often.mean_and_spread()[1], 20 * once.mean_and_spread()[1], rtol=1e-12, atol=0)


def test_what_varies_by_its_last_digit_alone_has_no_scatter() -> None:
    level = torch.tensor(1000.0)
    rows = torch.stack([torch.stack([level, torch.nextafter(level, level + 1)]).repeat(8), torch.arange(16.0)], 1)
    found = moments_of(rows)
    assert found.scatter.tolist() == [[0.0, 0.0], [0.0, 340.0]]


def test_merge_is_associative_and_has_a_neutral_element() -> None:
    a, b, c = (moments_of(rows(n, 4, m, seed=n).double()) for n, m in ((5, 0), (9, 100), (3, -7)))
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    torch.testing.assert_close(left.scatter, right.scatter, rtol=1e-10, atol=1e-9)
    assert merge(Moments.empty(4), a) is a
    assert merge(a, Moments.empty(4)) is a


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = rows(500, 3).to(dtype)
    torch.testing.assert_close(moments_of(x).scatter, moments_of(x.float()).scatter)


def test_not_finite_gives_not_finite_and_no_exception() -> None:
    x = rows(5)
    x[0, 0] = float("inf")
    assert not torch.isfinite(moments_of(x).scatter).all()


def test_wrong_shapes_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"shape \(S, D\), got shape \(2, 3, 4\)"):
        moments_of(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="must have 3 features as the moments have, got 2"):
        update(Moments.empty(3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        merge(Moments.empty(3), Moments.empty(2))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e20, 1e35])
def test_no_scale_of_single_precision_overflows_or_vanishes(scale: float) -> None:
    x = rows(60, 4, mean=0.5).double() * scale
    expected = np.cov(x.float().double().numpy().T / scale, bias=True)
    np.testing.assert_allclose(covariance(moments_of(x.float())).numpy() / scale / scale, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("read", [moments_of, lambda x: update(Moments.empty(2), x)])
def test_whole_numbers_are_refused_in_words(read) -> None:
    with pytest.raises(UsageError, match=r"floating-point numbers, got torch.int64"):
        read(torch.ones(3, 2, dtype=torch.int64))
