"""The walk by itself: what each operation does to the paths, the fields and the counts of a tensor, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas.graph.structure import StructureReport, structure
from capnas.graph.structure_walk import Walk
from capnas.graph.tensor_state import State
from capnas.graph.tracing import trace
from capnas.measures import axes

MAPS = (1, 4, 8, 8)


class Net(nn.Module):
    """Convolutions by size, and a forward pass given as a function of them."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.conv, self.point, self.strided = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 2, stride=2)
        self.dense, self.token = nn.Linear(4, 4), nn.Parameter(torch.zeros(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def end(body: Callable[..., Tensor], shape: tuple[int, ...] = MAPS, *, gates: bool = False) -> State:
    """What is known of the output."""
    (state,) = Walk(trace(Net(body), shape), gates=gates).ends
    return state


def report(body: Callable[..., Tensor], shape: tuple[int, ...] = MAPS) -> StructureReport:
    return structure(trace(Net(body), shape))


def highs(state: State) -> list[float]:
    return [f.high for f in state.fields]


def rows(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def test_a_parameter_counts_once_and_whole_and_running_statistics_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert structure(trace(model, MAPS)).weights == 4 * 4 * 9 + 4 + 4 + 4
    assert report(lambda m, x: F.linear(x, m.dense.weight[:2]), (3, 4)).weights == 16
    assert report(lambda m, x: x + m.dense.bias.expand(3, -1), (3, 4)).weights == 4


def test_padding_of_any_kind_adds_no_path_and_one_operation_at_most() -> None:
    kinds = "constant", "circular", "reflect", "replicate"
    graphs = [trace(Net(lambda m, x, kind=kind: m.point(F.pad(x, (1, 2, 1, 0), mode=kind))), MAPS) for kind in kinds]
    assert [(structure(g).log2_paths, len(g.nodes), highs(Walk(g).ends[0])) for g in graphs] == [(2, 2, [1, 1])] * 4
    layer = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    assert structure(trace(layer, MAPS)).log2_paths == math.log2(36)


def into(x: Tensor, *writes: tuple[slice, Tensor]) -> Tensor:
    for channels, value in writes:
        x[:, channels] = value
    return x


def added(x: Tensor, y: Tensor) -> Tensor:
    x[0, :3] += y[0, :3]
    return x


@pytest.mark.parametrize(
    ("body", "same"),
    [(lambda m, x: into(x.new_empty(1, 8, 8, 8), (slice(4), m.point(x)), (slice(4, 8), m.conv(x))),
      lambda m, x: torch.cat([m.point(x), m.conv(x)], 1)),
     (lambda m, x: into(x.new_zeros(1, 12, 8, 8), (slice(4), m.point(x)), (slice(4, 8), m.conv(x)), (slice(8, 12), x)),
      lambda m, x: torch.cat([m.point(x), m.conv(x), x], 1)),
     (lambda m, x: into(m.conv(x), (slice(1), m.point(x)[:, :1])), lambda m, x: torch.cat([m.point(x)[:, :1], m.conv(x)[:, 1:]], 1)),
     (lambda m, x: into(m.conv(x), (slice(4), m.point(x))), lambda m, x: m.point(x)),
     (lambda m, x: into(torch.relu(m.conv(x)), (slice(2, 2), x[:, :0])), lambda m, x: torch.relu(m.conv(x))),
     (lambda m, x: into(m.conv(x), (slice(1), 0)), lambda m, x: torch.cat([x.new_zeros(1, 1, 8, 8), m.conv(x)[:, 1:]], 1)),
     (lambda m, x: added(m.conv(x), m.point(x)), lambda m, x: torch.cat([m.conv(x)[:, :3] + m.point(x)[:, :3], m.conv(x)[:, 3:]], 1)),
     (lambda m, x: m.conv(x)[:, :3].add_(m.point(x)[:, :3]), lambda m, x: m.conv(x)[:, :3] + m.point(x)[:, :3])],
    ids=["halves", "thirds", "one channel", "all", "none", "zeros", "sum", "sum read itself"],
)  # fmt: skip
def test_values_written_into_a_tensor_take_the_place_of_those_there(body: Callable[..., Tensor], same: Callable[..., Tensor]) -> None:
    assert end(body).paths == pytest.approx(end(same).paths, abs=1e-12)
    assert axes.channels(end(lambda m, x: torch.relu(body(m, x))).layout) == axes.channels(end(same).layout)


@pytest.mark.parametrize(("clamp", "bits"), [((0, 6), 4), ((0, None), 4), ((-1, 1), 0), ((None, 1), 0)])
def test_a_clamp_at_zero_is_an_activation(clamp: tuple[float | None, float | None], bits: int) -> None:
    assert report(lambda m, x: m.conv(x).clamp(*clamp)).complexity == bits


@pytest.mark.parametrize("act", [F.leaky_relu, F.softshrink, F.hardshrink, torch.sin])
def test_activations_of_a_layer_cut_as_a_rectifier_does(act: Callable[[Tensor], Tensor]) -> None:
    assert report(lambda m, x: act(m.conv(x))).complexity == 4


def test_attention_counts_the_paths_of_its_values_and_a_product_of_two_maps_those_of_both() -> None:
    conv, point, terms = math.log2(36), math.log2(4), math.log2(4)
    attention = end(lambda m, x: rows(m.conv(x)).softmax(-1) @ m.point(x).flatten(2))
    assert attention.paths == pytest.approx(terms + point)
    for first, second in ((lambda t: t, lambda t: t), (lambda t: t.softmax(-1), lambda t: t.softmax(-2))):
        both = end(lambda m, x, f=first, g=second: f(rows(m.conv(x))) @ g(m.point(x).flatten(2)))
        assert both.paths == pytest.approx(terms + math.log2(2**conv + 2**point))
        assert highs(both) == [3, 3]


def test_attention_weights_widen_the_field_where_gates_are_asked_for() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return rows(m.conv(x)).softmax(-1) @ m.point(x).flatten(2)

    assert highs(end(body)) == [1, 1]
    assert highs(end(body, gates=True)) == [3, 3]


def test_two_activations_of_one_layer_behind_norms_are_two_rows() -> None:
    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    found = report(lambda m, x: sum(torch.relu(norm(y)) for y in [m.conv(x)] for norm in norms))
    assert [(row.kind, row.complexity_bits) for row in found.layers.values()] == [("conv", 4), ("activation", 4)]


def test_the_compression_of_a_grouped_layer_is_that_of_one_group() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    assert structure(trace(model, MAPS)).layers["0"].log2_compression == pytest.approx(math.log2(4 / (2 * 9)))


def test_pooling_to_one_position_along_an_axis_reads_all_of_it() -> None:
    assert highs(end(lambda m, x: F.adaptive_max_pool2d(x, (1, 4)))) == [math.inf, 2]


def test_pooling_steps_by_its_kernel_where_no_stride_is_given() -> None:
    assert [f.jump for f in end(lambda m, x: F.max_pool2d(x, 2)).fields] == [2, 2]
    wide = end(lambda m, x: F.max_pool2d(x, 2, stride=1, dilation=3))
    assert [(f.high, f.jump) for f in wide.fields] == [(4, 1)] * 2


@pytest.mark.parametrize(("reduce", "bits"), [(torch.sum, 0), (torch.mean, 0), (torch.amax, 63 * 4)])
def test_a_sum_and_a_mean_cut_nothing(reduce: Callable[..., Tensor], bits: float) -> None:
    found = report(lambda m, x: reduce(x, dim=(2, 3)))
    assert found.log2_paths == 6
    assert (found.complexity > 0) == (bits > 0)


def test_a_constant_beside_the_input_has_no_paths() -> None:
    assert end(lambda m, x: torch.cat([x, m.token], 1)).paths == -1  # the mean of 1 and 0


def test_the_shortest_way_is_that_of_the_least_layers() -> None:
    assert (end(lambda m, x: x + m.conv(m.point(x))).shortest, end(lambda m, x: x + m.conv(m.point(x))).depth) == (0, 2)
    assert end(lambda m, x: m.point(x) + m.conv(m.point(x))).shortest == 1
    assert end(lambda m, x: m.dense(m.dense(x)), (2, 4)).shortest == 2


def test_enlarging_one_axis_leaves_the_other() -> None:
    assert highs(end(lambda m, x: F.interpolate(x, (16, 8), mode="bilinear"))) == [2, 1]
    assert highs(end(lambda m, x: F.interpolate(x, (4, 8), mode="nearest-exact"))) == [1, 1]
    assert highs(end(lambda m, x: F.interpolate(x, (2, 8), mode="bilinear", antialias=True))) == [8, 1]


def test_what_the_data_are_divided_by_opens_no_paths() -> None:
    assert end(lambda m, x: x / m.conv(x)).paths == 0
    assert end(lambda m, x: x * m.conv(x)).paths == pytest.approx(math.log2(37))
    assert end(lambda m, x: x * x.norm(dim=1, keepdim=True)).paths == 0


def test_a_layer_that_reads_a_norm_of_the_data_gives_data() -> None:
    """The norm alone is neutral as a factor, what a dense layer makes of it is a gate."""
    found = end(lambda m, x: x * m.dense(x.norm(dim=0, keepdim=True)), (2, 4))
    assert found.paths == pytest.approx(math.log2(1 + 4))


def test_the_paths_of_a_layer_are_the_most_over_its_calls() -> None:
    found = report(lambda m, x: m.conv(m.conv(x)) + m.conv(x))
    assert found.layers["conv"].log2_paths == pytest.approx(2 * math.log2(36))
    assert found.layers["conv"].calls == 3


class Pooled(nn.Module):
    """Two operations without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(torch.relu(x), 2)


def test_two_kinds_of_operations_of_one_module_are_two_rows() -> None:
    found = structure(trace(nn.Sequential(Pooled()), MAPS))
    assert [(name, row.kind) for name, row in found.layers.items()] == [("0", "activation"), ("0 (pool)", "pool")]


def test_the_span_of_a_layer_over_windows_is_counted_in_units_of_its_input() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        y = m.strided(x).unflatten(3, (2, 2)).unflatten(2, (2, 2))  # windows of 2 x 2 units of 2 pixels
        tokens = y.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
        return (tokens @ tokens.transpose(-1, -2)).softmax(-1) @ tokens

    attention = next(row for row in report(body).layers.values() if row.kind == "attention")
    assert attention.field is not None
    assert attention.field.extent == (2, 2)
    assert attention.receptive_field == ((4, 4), (4, 4))
