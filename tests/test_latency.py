"""Latency: what counts as a network's time and what does not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from capnas.latency import latencies

X = torch.randn(1, 1, 8, 8)


class Clocked(nn.Module):
    """Takes what it is told to take, by a clock of its own."""

    def __init__(self, clock: list[float], takes: list[float]) -> None:
        super().__init__()
        self.clock, self.takes, self.seen = clock, iter(takes), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += next(self.takes)
        self.seen.append((self.clock[0], torch.get_num_threads(), self.training, torch.is_grad_enabled()))
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("capnas.latency.time.thread_time", lambda: now[0])
    return now


def test_the_median_of_passes_in_turns_without_those_that_allocate(clock: list[float]) -> None:
    networks = [Clocked(clock, [9.0, 9.0, 0.5, 3.0, 1.0, 2.0, 0.25]), Clocked(clock, [9.0, 9.0, 0.125, 0.25, 0.5, 0.75, 1.0])]
    assert latencies(networks, X, passes=5) == [1000.0, 500.0]
    first, second = ([now for now, *_ in network.seen] for network in networks)
    assert all(a < b for a, b in zip(first, second))
    assert all(b < a for b, a in zip(second, first[1:]))


def test_after_its_seconds_three_passes_are_enough(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Clocked(clock, [1.0] * 5)
    assert latencies([network], X, seconds=-1.0) == [1000.0]
    assert len(network.seen) == 5


def test_one_thread_in_eval_mode_and_all_as_it_was(clock: list[float]) -> None:
    inner = Clocked(clock, [0.5] * 9)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), inner)
    inner.eval()  # a part that its owner keeps in another mode
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(threads + 1)
    try:
        latencies([network], X, passes=7)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert {row[1:] for row in inner.seen} == {(1, False, False)}
    assert [module.training for module in network.modules()] == [True, True, True, False]
    assert network[0].num_batches_tracked.item() == 0
    assert torch.equal(state, torch.get_rng_state())


def test_on_a_cpu_waiting_does_not_count_but_on_windows_which_counts_too_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.03)  # as where other processes have the processor
            return x

    assert 0 < latencies([Waiting()], X, passes=3)[0] < 15
    monkeypatch.setattr("capnas.latency.sys", SimpleNamespace(platform="win32"))
    assert latencies([Waiting()], X, passes=3)[0] > 29
