from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capnas.measures.widths import Widths, equal_saturation, least_loss, needed_widths, width_choices


def chain(units: Tensor) -> Tensor:
    """A stack of dense layers: each costs inputs times outputs."""
    padded = torch.cat([torch.ones(len(units), 1, dtype=units.dtype) * 4, units, torch.ones(len(units), 1, dtype=units.dtype) * 4], 1)
    return (padded[:, 1:] * padded[:, :-1]).sum(1)


def group(now: int, needed: float, growth: float = 2.0, step: int = 2) -> Widths:
    return Widths(now=now, needed=needed, choices=width_choices(now, 1, step), losses=torch.arange(float(now)) ** growth)


def cost_of(units: list[int]) -> float:
    return float(chain(torch.tensor([units], dtype=torch.float64)))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(4, 24), st.floats(0.05, 1.0)), min_size=1, max_size=5), st.floats(0.2, 0.95))
def test_both_ways_meet_the_target_with_allowed_widths_or_give_the_least(sizes: list[tuple[int, float]], share: float) -> None:
    groups = [group(now, share_needed * now) for now, share_needed in sizes]
    target = share * cost_of([g.now for g in groups])
    least = cost_of([g.choices[0] for g in groups])
    for way in (equal_saturation, least_loss):
        units = way(groups, chain, target)
        assert all(u in g.choices for u, g in zip(units, groups))
        assert cost_of(units) <= max(target, least) + 1e-9


def test_equal_saturation_is_even() -> None:
    groups = [Widths(now=64, needed=n, choices=tuple(range(1, 65))) for n in (4, 8, 16)]
    units = equal_saturation(groups, chain, 0.4 * cost_of([64] * 3))
    saturations = [g.needed / u for g, u in zip(groups, units)]
    assert max(saturations) / min(saturations) < 1.3
    assert cost_of([u + 1 for u in units]) > 0.4 * cost_of([64] * 3)


def test_least_loss_finds_the_best_widths_of_a_small_network() -> None:
    groups = [group(8, 4, 2.0, 1), group(8, 4, 1.5, 1), group(8, 4, 3.0, 1)]
    target = 0.5 * cost_of([8] * 3)

    def loss(units: list[int]) -> float:
        return sum(float(g.losses[g.now - u]) for g, u in zip(groups, units))

    best = min((c for c in itertools.product(range(1, 9), repeat=3) if cost_of(list(c)) <= target), key=lambda c: loss(list(c)))
    units = least_loss(groups, chain, target)
    assert loss(units) <= 1.15 * loss(list(best))


def test_a_width_that_is_just_enough_is_taken() -> None:
    assert needed_widths([Widths(now=8, needed=4.0, choices=(2, 4, 8)), Widths(now=8, needed=4.1, choices=(2, 4, 8))]) == [4, 8]
    assert needed_widths([Widths(now=8, needed=4 + 1e-12, choices=(2, 4, 8))]) == [4]  # a rounded share of the width


def test_least_loss_pays_for_no_more_than_the_target_asks() -> None:
    losses = torch.zeros(101)
    losses[10], losses[100] = 2.0, 10.0
    groups = [Widths(now=101, needed=1, choices=(1, 101), losses=losses), Widths(now=20, needed=1, choices=(10, 20), losses=losses)]
    assert least_loss(groups, lambda units: units.sum(1), 111.0) == [101, 10]  # the first saves more than is asked


def test_least_loss_jumps_over_a_bad_width_and_gives_back_what_is_left() -> None:
    cliff = Widths(now=4, needed=4, choices=(1, 2, 3, 4), losses=torch.tensor([0.0, 50.0, 51.0, 52.0]))
    flat = Widths(now=4, needed=4, choices=(1, 2, 3, 4), losses=torch.tensor([0.0, 30.0, 60.0, 90.0]))
    assert least_loss([cliff, flat], lambda u: u.sum(1), 5.0) == [1, 4]
    assert least_loss([cliff, flat], lambda u: u.sum(1), 8.0) == [4, 4]
    assert least_loss([cliff, flat], lambda u: u.sum(1), 1.0) == [1, 1]


def test_each_step_costs_what_it_adds_to_the_loss() -> None:
    first = Widths(now=3, needed=3, choices=(1, 2, 3), losses=torch.tensor([0.0, 1.0, 3.0]))
    second = Widths(now=2, needed=2, choices=(1, 2), losses=torch.tensor([0.0, 2.5]))
    assert least_loss([first, second], lambda u: u.sum(1), 3.0) == [1, 2]  # 1 and then 2 more, not 3


def test_what_is_left_of_the_target_is_given_back_to_the_last() -> None:
    jump = Widths(now=4, needed=4, choices=(1, 4), losses=torch.tensor([0.0, 9.0, 9.0, 1.0]))
    cheap = Widths(now=4, needed=4, choices=(3, 4), losses=torch.tensor([0.0, 0.1, 9.0, 9.0]))
    assert least_loss([jump, cheap], lambda u: u.sum(1), 5.0) == [1, 4]  # exactly the target


def test_losses_are_needed_for_the_way_by_loss() -> None:
    bare = Widths(now=4, needed=2, choices=(2, 4))
    with pytest.raises(ValueError, match="without losses"):
        least_loss([bare], lambda u: u.sum(1), 2.0)
    assert equal_saturation([bare], lambda u: u.sum(1), 2.0) == [2]


def test_choices_are_multiples_of_whole_channels() -> None:
    assert width_choices(16, 1, 8) == (8, 16)
    assert width_choices(12, 1, 8) == (4, 8, 12)
    assert width_choices(7, 1, 8) == (2, 4, 6, 7)
    assert width_choices(4, 16, 8) == (1, 2, 3, 4)
    assert width_choices(5, 1, 1) == (1, 2, 3, 4, 5)
    assert needed_widths([Widths(now=7, needed=6.5, choices=(2, 4, 6, 7)), Widths(now=8, needed=0, choices=(4, 8))]) == [7, 4]


def test_where_no_width_matters_no_more_goes_than_the_target_asks() -> None:
    groups = [Widths(now=32, needed=32, choices=tuple(range(4, 33, 4)), losses=torch.zeros(32))]
    assert least_loss(groups, lambda units: units.sum(1), 24.0) == [24]
