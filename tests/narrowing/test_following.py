"""Groups that Torch-Pruning alone would follow for minutes, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from capnas._timm import timm
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


class Mixed(nn.Module):
    """Two convs behind a mixing of channels whose widths Torch-Pruning cannot infer."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1), nn.Linear(5, 2)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(self.mix(x, self.first(x).relu())).relu()).mean((2, 3)))


def joined(x: Tensor, y: Tensor) -> Tensor:
    left, right = y.split(4, dim=1)
    return torch.cat([left, torch.cat([x[:, :1], right[:, 1:]], dim=1)], dim=1)


def reshaped(x: Tensor, y: Tensor) -> Tensor:
    y = y.flatten(2).reshape(-1, 8, 4, 4)
    return torch.cat([y.mean(1, keepdim=True), y[:, 1:]], dim=1)


def rotated(x: Tensor, y: Tensor) -> Tensor:
    left, right = y.split([4, 4], dim=1)
    return torch.cat([left.relu(), left.sigmoid() * right, right], dim=1)[:, :8]


def repeated(x: Tensor, y: Tensor) -> Tensor:
    return y[:, :, None].expand(-1, -1, 2, -1, -1).mean(2)


@pytest.mark.parametrize(
    ("mix", "names"),
    [
        (joined, {"second", "third"}),
        (reshaped, {"second", "third"}),
        (rotated, {"second", "third"}),
        (repeated, {"first", "second", "third"}),
    ],
)
def test_widths_that_cannot_be_inferred_leave_the_rest_of_the_network(mix: Callable[[Tensor, Tensor], Tensor], names: set[str]) -> None:
    rules = dict(vars(index_mapping))
    found = narrowable(Mixed(mix).eval(), torch.randn(2, 3, 4, 4))
    assert {g.name for g in found.groups} == names
    assert dict(vars(index_mapping)) == rules


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


class Gated(nn.Module):
    """Reads one of two parts of its channels twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, z = self.wide(x).split([4, 4], dim=1)
        return self.head(self.narrow(h * z.relu() + h).relu().mean((2, 3)))


def test_parts_of_a_split_that_are_read_twice_leave_the_rest_of_the_network() -> None:
    found = narrowable(Gated().eval(), torch.randn(2, 3, 4, 4))
    assert [g.name for g in found.groups] == ["narrow"]
    assert "split_sizes" in found.fixed["wide"]


class Multiplied(nn.Module):
    """A gated linear unit on tokens, behind an embedding of their positions or without one."""

    def __init__(self, embedded: bool) -> None:
        super().__init__()
        self.first, self.gated, self.head = nn.Linear(3, 6), timm.layers.GluMlp(6, 16), nn.Linear(6, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, 6)) if embedded else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gated(self.first(x.flatten(2).mT) + self.positions).mean(1))


@pytest.mark.parametrize("embedded", [False, True])
def test_the_halves_that_a_gated_linear_unit_multiplies_go_together(embedded: bool) -> None:
    inner = narrowable(Multiplied(embedded).eval(), torch.randn(2, 3, 4, 4))["gated.fc1"]
    places = {(p.module, p.side): p.positions.tolist() for p in inner.ports if p.positions.numel() > 1}
    assert places["gated.fc1", "out"] == [[i, i + 8] for i in range(8)]
    assert places["gated.fc2", "in"] == [[i] for i in range(8)]


@pytest.mark.parametrize("unit", [nn.GLU(1), lambda x: F.glu(x, dim=1)])
def test_a_gated_linear_unit_of_torch_is_followed_as_its_halves(unit: Callable[[Tensor], Tensor]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(unit(self.first(x))).mean((2, 3)))

    group = narrowable(Gated().eval(), torch.randn(2, 3, 8, 8))["first"]
    places = {(p.module, p.side): p.positions.tolist() for p in group.ports}
    assert places == {("first", "out"): [[i, i + 8] for i in range(8)], ("second", "in"): [[i] for i in range(8)]}
