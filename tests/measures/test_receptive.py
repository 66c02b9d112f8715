from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capnas.errors import UsageError
from capnas.measures.receptive import (
    Field,
    LayerField,
    adaptive_kernel,
    border_layers,
    critical_layers,
    feasible_range,
    in_pixels,
    merge,
    resampled,
    transposed_window,
    whole,
    window,
)

VGG = {
    "vgg11": [1, "M", 1, "M", 1, 1, "M", 1, 1, "M", 1, 1, "M"],
    "vgg13": [1, 1, "M"] * 5,
    "vgg16": [1, 1, "M", 1, 1, "M"] + [1, 1, 1, "M"] * 3,
    "vgg19": [1, 1, "M", 1, 1, "M"] + [1, 1, 1, 1, "M"] * 3,
}
RESNET = {
    "resnet18": ([2, 2, 2, 2], False, True),
    "resnet34": ([3, 4, 6, 3], False, True),
    "resnet50": ([3, 4, 6, 3], True, True),
    "resnet18_cifar_stem": ([2, 2, 2, 2], False, False),
    "resnet34_cifar_stem": ([3, 4, 6, 3], False, False),
}


def layer(name: str, field: Field, kernel: int, stride: int = 1, *, learned: bool = True) -> LayerField:
    after = window(field, kernel, stride)
    return LayerField(name=name, extent=(kernel, kernel), before=(field,) * 2, after=(after,) * 2, learned=learned)


def vgg_layers(net: str) -> list[LayerField]:
    layers, field = [], Field()
    for item in VGG[net]:
        name = f"conv{sum(x.learned for x in layers) + 1}" if item == 1 else "pool"
        layers.append(layer(name, field, 3 if item == 1 else 2, 1 if item == 1 else 2, learned=item == 1))
        field = layers[-1].after[0]
    return layers


def resnet_layers(net: str) -> list[LayerField]:
    blocks, bottleneck, early = RESNET[net]
    layers = [layer("conv1", Field(), 7, 2) if early else layer("conv1", Field(), 3)]
    field = layers[-1].after[0]
    if early:
        layers.append(layer("maxpool", field, 3, 2, learned=False))
        field = layers[-1].after[0]
    for s, count in enumerate(blocks):
        for b in range(count):
            stride = 2 if s and not b else 1
            skip, kernels = window(field, 1, stride), [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
            for i, (k, t) in enumerate(kernels):
                layers.append(layer(f"layer{s + 1}.{b}.conv{i + 1}", field, k, t))
                field = layers[-1].after[0]
            field = merge([skip, field])
    return layers


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict:
    return json.loads((shared / "theory/saturation_reference.json").read_text())["receptive_field"]


@pytest.mark.parametrize("net", VGG)
def test_vgg_tables_and_borders(net: str, reference: dict) -> None:
    layers = vgg_layers(net)
    convs = [x for x in layers if x.learned]
    for x, row in zip(convs, reference[net]["layers"], strict=True):
        assert (x.name, x.before[0].high, x.after[1].low, x.after[0].jump) == (row["layer"], row["r_in"], row["r"], row["jump"])
    for size, border in reference[net]["border"].items():
        for rule in ("strict", "longest"):
            assert next(iter(border_layers(layers, int(size), rule)), None) == border, size
    for size, border in reference[net]["border_authors_notebook"].items():
        assert border_layers(layers, int(size), "notebook")[0] == border, size


@pytest.mark.parametrize("net", RESNET)
def test_resnet_tables_and_borders(net: str, reference: dict) -> None:
    convs = [x for x in resnet_layers(net) if x.learned]
    for x, row in zip(convs, reference[net]["layers"], strict=True):
        assert x.name == row["layer"]
        assert (x.before[0].low, x.before[0].high, x.after[0].low, x.after[0].high) == tuple(
            row[k] for k in ("r_in_min", "r_in_max", "r_min", "r_max")
        )
    # the reference counts every convolution of the main path, 1x1 too; the default rules leave 1x1 out, which basic blocks do not have
    for column, rule in (("border_shortest_path_all_after", "shortest"), ("border_longest_path", "longest")):
        assert len(reference[net][column]) == 5
        for size, border in reference[net][column].items():
            for named in (f"{rule}_with_1x1", rule)[: 1 if net == "resnet50" else 2]:
                assert next(iter(border_layers(convs, int(size), named)), None) == border, (size, named)


# by hand from the table: of the 1x1 layers past the border nothing is said, so each border moves on to the next 3x3
RESNET50_WITHOUT_1X1 = {
    "shortest": {16: "layer1.0.conv2", 32: "layer3.1.conv2", 64: "layer4.1.conv2", 128: None, 224: None},
    "longest": {16: "layer1.1.conv2", 32: "layer2.0.conv2", 64: "layer2.3.conv2", 128: "layer3.2.conv2", 224: "layer3.5.conv2"},
}


@pytest.mark.parametrize("rule", RESNET50_WITHOUT_1X1)
def test_pointwise_layers_are_never_border_layers(rule: str) -> None:
    layers = resnet_layers("resnet50")
    for size, border in RESNET50_WITHOUT_1X1[rule].items():
        named = border_layers(layers, size, rule)
        assert next(iter(named), None) == border, size
        assert all(n.endswith("conv2") for n in named)
        if rule == "shortest":
            assert border_layers(layers, size) == named


def test_infinite_layers_stay_out_with_1x1_layers_too() -> None:
    conv, point = layer("conv", Field(), 3), layer("point", window(Field(), 3), 1)
    head = LayerField(name="head", extent=(math.inf,) * 2, before=point.after, after=(whole(point.after[0]),) * 2)
    pool = layer("pool", point.after[0], 2, 2, learned=False)
    for rule in ("longest_with_1x1", "shortest_with_1x1"):
        assert border_layers([conv, point, pool, head], 2, rule) == (("point",) if rule == "longest_with_1x1" else ("conv", "point"))


def test_toolbox_lists_and_ranges(reference: dict) -> None:
    toolbox = reference["rfa_toolbox_1.7.0"]
    vgg = vgg_layers("vgg16")
    for size, convs in toolbox["vgg16_border_convs"].items():
        assert border_layers(vgg, int(size), "toolbox") == tuple(f"conv{i}" for i in convs), size
    assert feasible_range(vgg) == tuple(map(tuple, toolbox["vgg16_input_resolution_range"]))
    net = resnet_layers("resnet18")
    ranges = toolbox["resnet18_input_resolution_range"]
    assert feasible_range(net) == tuple(map(tuple, ranges["default"]))
    assert feasible_range(net, lower="functional") == tuple(map(tuple, ranges["lower_bound"]))
    assert feasible_range(resnet_layers("resnet50")) == ((75, 75), (427, 427))
    main = [x.name for x in net if x.learned]
    assert border_layers(net, 32, "toolbox") == tuple(main[10:])
    assert border_layers(net, 64, "toolbox") == tuple(main[-3:])
    assert border_layers(net, 224, "toolbox") == ()
    assert border_layers(resnet_layers("resnet18_cifar_stem"), 32, "toolbox") == ()


def seen_pixels(net: nn.Sequential, size: int) -> int:
    """Witness: the most input pixels, first to last, that one output unit depends on."""
    for p in net.parameters():
        nn.init.uniform_(p, 0.5, 1.0)
    x = torch.rand(1, 1, size, requires_grad=True)
    spans = [0]
    for unit in net(x)[0, 0]:
        (grad,) = torch.autograd.grad(unit, x, retain_graph=True)
        hit = grad[0, 0].nonzero().flatten()
        spans.append(int(hit[-1] - hit[0]) + 1 if len(hit) else 0)
    return max(spans)


def reached(spans: list[tuple[float, float]], kind: str, k: int, s: int, d: int) -> list[tuple[float, float]]:
    """Witness: first and last input pixel of each output unit, from the definition of the layer."""
    if kind == "up":
        count = (len(spans) - 1) * s + (k - 1) * d + 1
        reads = [[i for i in range(len(spans)) for t in range(k) if i * s + t * d == o] for o in range(count)]
    else:
        count = (len(spans) - (k - 1) * d - 1) // s + 1
        reads = [[o * s + t * d for t in range(k)] for o in range(count)]
    nothing = (math.inf, -math.inf)  # a unit between the taps of a transposed layer
    return [(min((spans[i][0] for i in r), default=nothing[0]), max((spans[i][1] for i in r), default=nothing[1])) for r in reads]


specs = st.tuples(st.sampled_from(["conv", "up"]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


early = specs.filter(lambda layer: layer[0] == "conv" or layer[3] == 1)  # dilated transposed layers shift what later layers read


@settings(max_examples=25, deadline=None)
@given(st.lists(early, min_size=1, max_size=2), specs)
def test_fields_equal_the_pixels_that_units_reach(stack: list[tuple[str, int, int, int]], last: tuple[str, int, int, int]) -> None:
    field, spans, coarse = Field(), [(float(i), float(i)) for i in range(80)], 1.0
    for kind, k, s, d in [*stack, last]:
        coarse = max(coarse, field.jump)
        field = transposed_window(field, k, s, d) if kind == "up" else window(field, k, s, d)
        spans = reached(spans, kind, k, s, d)
    seen = max(b - a + 1 for a, b in spans)
    if all(kind == "conv" for kind, *_ in stack):
        assert seen == field.high
    else:  # between the units of a transposed layer lie fractions of a pixel, and later layers may miss its widest phase
        assert seen < field.high + coarse


def test_fields_equal_the_pixels_that_gradients_reach() -> None:
    net = nn.Sequential(
        nn.Conv1d(1, 1, 3, stride=2, dilation=2, bias=False), nn.AvgPool1d(2), nn.ConvTranspose1d(1, 1, 5, stride=2, bias=False)
    )
    field = transposed_window(window(window(Field(), 3, 2, 2), 2, 2), 5, 2)
    assert seen_pixels(net, 61) == field.high == 15
    alike = nn.Sequential(nn.ConvTranspose1d(1, 1, 4, stride=2, dilation=2, bias=False))  # every tap falls on the same phase
    assert seen_pixels(alike, 21) == transposed_window(Field(), 4, 2, 2).high == 4


def test_linear_interpolation_against_gradients() -> None:
    net = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2, bias=False), nn.Upsample(scale_factor=2, mode="linear"))
    assert seen_pixels(net, 41) == resampled(window(Field(), 3, 2), 2.0, taps=2).high == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4))
def test_adaptive_windows_are_those_of_torch(size: int, outputs: int, kernel: int) -> None:
    x = torch.rand(1, 1, size, requires_grad=True)
    reads = []
    for unit in nn.functional.adaptive_avg_pool1d(x, outputs)[0, 0]:
        (grad,) = torch.autograd.grad(unit, x, retain_graph=True)
        reads.append(grad[0, 0].nonzero().flatten().tolist())
    assert adaptive_kernel(size, outputs) == max(map(len, reads))
    pooled = replace(window(Field(), adaptive_kernel(size, outputs)), jump=size / outputs)
    spans = [reads[i + kernel - 1][-1] - reads[i][0] + 1 for i in range(outputs - kernel + 1)]
    assert all(span <= in_pixels(window(pooled, kernel)).high < window(pooled, kernel).high + 1 for span in spans)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3))
def test_pixels_behind_enlarged_maps_are_those_that_units_reach(stack: list[tuple[int, int]]) -> None:
    field, spans = Field(), [(float(i), float(i)) for i in range(40)]
    for factor, kernel in stack:
        field = window(resampled(field, factor), kernel)
        spans = reached([span for span in spans for _ in range(factor)], "conv", kernel, 1, 1)
    assert in_pixels(field).high == max(b - a + 1 for a, b in spans)
    assert in_pixels(field).low == in_pixels(field).high
    assert in_pixels(field).jump == field.jump


def test_infinite_fields_and_whole_pixels_are_not_rounded() -> None:
    assert in_pixels(whole(Field())) == whole(Field())
    assert in_pixels(Field(low=3.0, high=2 + 1 / 3 + 1 / 3 + 1 / 3 + 1e-12)) == Field(low=3.0, high=3.0)


def test_infinite_fields_stay_out_of_borders_and_ranges() -> None:
    conv = layer("conv", Field(), 3)
    head = LayerField(name="head", extent=(math.inf,) * 2, before=conv.after, after=(whole(conv.after[0]),) * 2)
    late = LayerField(name="late", extent=(3, 3), before=head.after, after=head.after)
    assert border_layers([conv, head, late], 2, "toolbox") == ("conv",)
    assert critical_layers([conv, head, late], 2) == ("conv",)
    assert feasible_range([conv, head, late]) == ((3, 3), (3, 3))
    assert feasible_range([head]) is None
    assert border_layers([], 32, "notebook") == ()


def test_a_strided_layer_needs_its_kernel_at_the_jump_that_it_reads() -> None:
    assert feasible_range([layer("stem", Field(), 7, 2)], lower="functional") == ((7, 7), (7, 7))
    assert feasible_range([layer("deep", Field(jump=4.0), 7, 2)], lower="functional") == ((28, 28), (25, 25))
    assert merge([Field(jump=2.0), Field(jump=4.0)]).jump == 2.0
    assert merge([Field(low=27.0, high=27.0), Field(low=11.0, high=31.0)]) == Field(low=11.0, high=31.0)
    first = layer("first", Field(), 3)
    second = layer("second", first.after[0], 3)
    point = layer("point", second.after[0], 1)
    assert feasible_range([first, second, point], lower="functional") == ((3, 3), (5, 5))  # a 1x1 layer asks for nothing
    assert feasible_range([point], lower="functional") == ((1, 1), (5, 5))


def test_axes_are_kept_apart() -> None:
    wide = LayerField(name="wide", extent=(1, 5), before=(Field(), Field()), after=(Field(), window(Field(), 5)))
    assert wide.expands
    assert critical_layers([wide], 4) == ()
    assert critical_layers([wide], (0 + 1, 4)) == ()
    assert feasible_range([wide]) == ((1, 5), (1, 5))
    seen = Field(low=5.0, high=5.0)
    deep = LayerField(name="deep", extent=(1, 3), before=(seen, seen), after=(seen, window(seen, 3)))
    assert border_layers([deep], 5, "toolbox") == ()  # its own field has to be larger on every axis
    assert border_layers([deep], 4, "toolbox") == ("deep",)


def test_a_layer_that_reads_all_of_one_axis_is_not_followed_along_the_other() -> None:
    rows = LayerField(name="rows", extent=(math.inf, 3), before=(Field(), Field()), after=(whole(Field()), window(Field(), 3)))
    assert not rows.finite
    assert not rows.expands
    assert feasible_range([rows]) is None


def test_errors() -> None:
    rules = "longest, longest_with_1x1, notebook, shortest, shortest_with_1x1, strict, toolbox"
    with pytest.raises(UsageError, match=f"rule must be one of {rules}; got 'tools'"):
        border_layers([], 32, "tools")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lower must be one of functional, largest"):
        feasible_range([], lower="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="path must be one of high, low"):
        critical_layers([], 3, path="x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kernel, stride and dilation must be >= 1, got 0, 1 and 1"):
        window(Field(), 0)
    with pytest.raises(UsageError, match="kernel, stride and dilation must be >= 1, got 2, 0 and 1"):
        transposed_window(Field(), 2, 0)
    with pytest.raises(UsageError, match="size and outputs must be >= 1, got 4 and 0"):
        adaptive_kernel(4, 0)
    with pytest.raises(UsageError, match="merge needs one field"):
        merge([])
    with pytest.raises(UsageError, match="image_size must be one positive number or 2 of them, got \\(1, 2, 3\\)"):
        border_layers([layer("a", Field(), 3)], (1, 2, 3))
    with pytest.raises(UsageError, match="image_size must be one positive number or 2 of them, got 0"):
        critical_layers([layer("a", Field(), 3)], 0)
