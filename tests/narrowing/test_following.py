"""Groups that Torch-Pruning alone would follow for minutes, or for ever."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from capnas.narrowing.applying import narrowable
from capnas.narrowing.following import followed


class Partial(nn.Module):
    """A block that adds its input to a part of its wider output, as those of ReXNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.wide, self.narrow = inputs, nn.Conv2d(inputs, 8, 1), nn.Conv2d(8, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x).relu())
        return torch.cat([y[:, : self.inputs] + x, y[:, self.inputs :]], dim=1)


def test_streams_that_are_sliced_and_joined_over_and_over_keep_their_width_and_the_rest_is_narrowed() -> None:
    widths = list(range(4, 4 + 2 * 13, 2))
    blocks = [Partial(*pair) for pair in pairwise(widths)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 2)).eval()
    found = narrowable(model, torch.randn(2, 3, 4, 4))
    assert [g.name for g in found.groups] == [f"{i + 1}.wide" for i in range(len(blocks))]
    assert "its channels are sliced, joined or folded in more ways than can be followed" in found.fixed.values()


class Dependency:
    def __init__(self, factor: int) -> None:
        self.index_mapping = [lambda indices: indices * factor]


class Node:
    def __init__(self, factor: int) -> None:
        self.dependencies = [Dependency(factor)]


class Graph:
    """Two groups: the first follows its dependency over and over, the second once."""

    def __init__(self, factor: int) -> None:
        self.module2node = {"a": Node(factor)}
        self.steps = 0

    def get_all_groups(self):  # type: ignore[no-untyped-def]
        for limit in (10_000, 1):
            indices, steps = [1, 2], 0
            while indices and steps < limit:
                for mapping in self.module2node["a"].dependencies[0].index_mapping:
                    indices = mapping(indices)
                steps += 1
            self.steps = max(self.steps, steps)
            yield limit


@pytest.mark.parametrize(("factor", "steps"), [(1, 11), (2, 4)])  # ten times; 4, 8, 16, 32 channels of 16
def test_a_group_ends_at_too_many_steps_or_channels_and_the_next_begins_anew(factor: int, steps: int) -> None:
    graph = Graph(factor)
    assert list(followed(graph, widest=16)) == [(10_000, False), (1, True)]
    assert graph.steps == steps
