from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from capnas._timm import import_timm, timm
from capnas.graph.structure import StructureReport, structure
from capnas.graph.tracing import trace
from capnas.measures import algebra, receptive
from capnas.measures.algebra import concat, gate, linear_leaf, pool_leaf, residual, series
from capnas.measures.region_bounds import vc_comparator

NETS = [
    *("alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("densenet121", "densenet169", "densenet201", "mobilenet_v2"),
]
FAMILIES = [
    ("vit_tiny_patch16_224", 224),
    ("swin_tiny_patch4_window7_224", 224),
    ("mixer_s32_224", 224),
    ("maxvit_rmlp_pico_rw_256", 256),
    ("edgenext_xx_small", 64),
    ("densenet121", 64),
    ("efficientnet_b0", 64),
    ("ghostnet_100", 64),
    ("convnextv2_atto", 64),
]


def report_of(model: nn.Module, shape: tuple[int, ...] = (1, 3, 32, 32), **options: Any) -> StructureReport:
    return structure(trace(model, shape), **options)


def timm_report(name: str, size: int, **options: Any) -> StructureReport:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    return report_of(model, (1, 3, size, size))


@pytest.fixture(scope="module")
def networks(shared: Path) -> dict[str, dict]:
    rows = json.loads((shared / "theory/layer_algebra_reference.json").read_text())["networks"]
    return {row["net"]: row for row in rows}


@pytest.fixture(scope="module")
def fields(shared: Path) -> dict:
    return json.loads((shared / "theory/saturation_reference.json").read_text())["receptive_field"]


@pytest.mark.parametrize("net", NETS)
def test_reference_networks_at_224_pixels(net: str, networks: dict[str, dict]) -> None:
    import_timm()
    from torchvision import models

    row = networks[net]
    with torch.device("meta"):
        model = getattr(models, net)(weights=None)
    graph = trace(model, (1, 3, 224, 224))
    report = structure(graph)
    rectified = [node.shape for node in graph.nodes if node.op.split(".")[1].startswith(("relu", "hardtanh"))]
    assert sum(map(math.prod, rectified)) == row["relu_units"]
    assert report.weights == row["params"] == sum(p.numel() for p in model.parameters())
    assert report.macs == row["macs"]
    assert report.depth == row["weight_layers_longest_path"]
    assert report.complexity == pytest.approx(row["C_loc_bits"], abs=5e-4)
    assert report.complexity_positions == pytest.approx(row["C_pos_bits"], abs=0.06)
    assert report.log2_paths == pytest.approx(row["log2_K"], abs=6e-5)
    assert report.log2_power == pytest.approx(row["log2_P"], abs=6e-5)
    assert vc_comparator(report.weights, report.depth) == pytest.approx(row["W_L_log2W"], rel=1e-9)
    assert report.complexity == pytest.approx(math.fsum(x.complexity_bits for x in report.layers.values()))


@pytest.mark.parametrize("net", ["vgg11", "vgg13", "vgg16", "vgg19"])
def test_receptive_fields_of_vgg(net: str, fields: dict) -> None:
    report = timm_report(net, 224)
    convs = [x for x in report.layers.values() if x.name.startswith("features.") and x.kind == "conv"]
    for layer, row in zip(convs, fields[net]["layers"], strict=True):
        assert layer.field is not None
        assert layer.receptive_field == ((row["r"], row["r"]),) * 2
        assert layer.field.before[0].low == row["r_in"]
        assert layer.jump == (row["jump"], row["jump"])
    names = [x.name for x in convs]
    for size, border in fields[net]["border"].items():
        flagged = [n for n in receptive.border_layers(report.fields, int(size)) if n in names]
        assert (flagged[0] if flagged else None) == (names[int(border.removeprefix("conv")) - 1] if border else None), size


@pytest.mark.parametrize(
    ("reference", "net", "options"),
    [
        ("resnet18", "resnet18", {}),
        ("resnet34", "resnet34", {}),
        ("resnet50", "resnet50", {}),
        ("resnet18_cifar_stem", "resnet18", {"small_stem": True}),
        ("resnet34_cifar_stem", "resnet34", {"small_stem": True}),
    ],
)
@pytest.mark.parametrize("size", [224, 32])  # at 32 px the last maps are one pixel wide
def test_receptive_fields_of_resnets(reference: str, net: str, options: dict, size: int, fields: dict) -> None:
    with torch.device("meta"):
        model = timm.create_model(net)
        if options:
            model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    report = report_of(model, (1, 3, size, size))
    for row in fields[reference]["layers"]:
        layer = report.layers[row["layer"]]
        assert layer.field is not None
        assert (layer.field.before[1].low, layer.field.before[1].high) == (row["r_in_min"], row["r_in_max"]), layer.name
        assert layer.receptive_field == ((row["r_min"], row["r_max"]),) * 2, layer.name
    # the reference counts the 1x1 layers of the main path (not of the shortcuts); the default rules count no 1x1 layer
    main = [report.layers[row["layer"]].field for row in fields[reference]["layers"]]
    wide = [row for row in fields[reference]["layers"] if row["r_max"] > row["r_in_max"]]
    for pixels, border in fields[reference]["border_shortest_path_all_after"].items():
        assert next(iter(receptive.border_layers(main, int(pixels), "shortest_with_1x1")), None) == border, pixels
        inside = [i for i, row in enumerate(wide) if row["r_min"] <= int(pixels)]
        past = tuple(row["layer"] for row in wide[inside[-1] + 1 if inside else 0 :])
        assert receptive.border_layers(report.fields, int(pixels)) == past, pixels
    for pixels, border in fields[reference]["border_longest_path"].items():
        assert next(iter(receptive.border_layers(main, int(pixels), "longest_with_1x1")), None) == border, pixels
        past = tuple(row["layer"] for row in wide if row["r_in_max"] > int(pixels))
        assert receptive.border_layers(report.fields, int(pixels), "longest") == past, pixels


def test_toolbox_rule_and_ranges_on_traced_models(fields: dict) -> None:
    toolbox = fields["rfa_toolbox_1.7.0"]
    resnet = timm_report("resnet18", 224)
    main = [row["layer"] for row in fields["resnet18"]["layers"]]
    assert receptive.border_layers(resnet.fields, 32, "toolbox") == tuple(main[10:])
    assert receptive.border_layers(resnet.fields, 64, "toolbox") == tuple(main[-3:])
    assert receptive.border_layers(resnet.fields, 224, "toolbox") == ()
    ranges = toolbox["resnet18_input_resolution_range"]
    assert receptive.feasible_range(resnet.fields) == tuple(map(tuple, ranges["default"]))
    assert receptive.feasible_range(resnet.fields, lower="functional") == tuple(map(tuple, ranges["lower_bound"]))


class Custom(nn.Module):
    """A block made of functional code; ``kind`` picks the joint."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "residual":
            return x + torch.relu(self.a(x))
        if self.kind == "concat":
            return torch.cat([x, self.a(x)], 1)
        if self.kind == "gate":
            return x * torch.sigmoid(self.b(x.mean((2, 3), keepdim=True)))
        if self.kind == "zero":
            return self.a(x) * 0 + x
        if self.kind == "twice":
            return self.a(torch.relu(self.a(x)))
        return self.a(torch.relu(x)) + self.b(torch.relu(x))  # "shared": both read the same half-spaces


def test_joints_follow_the_algebra() -> None:
    wide, narrow = linear_leaf(4, 4, kernel=9, positions=64), linear_leaf(4, 4, positions=1)
    cases = {
        "residual": residual(wide),
        "concat": concat([algebra.IDENTITY, linear_leaf(4, 4, kernel=9, activation=False)], [4, 4]),
        "gate": gate(algebra.IDENTITY, series(pool_leaf("average", 4, kernel=64), narrow)),
        "zero": algebra.IDENTITY,
        "twice": series(wide, linear_leaf(4, 4, kernel=9, activation=False)),
        "shared": series(
            algebra.activation_leaf(4, positions=64), algebra.add(*(linear_leaf(4, 4, kernel=k, activation=False) for k in (9, 1)))
        ),
    }
    for kind, term in cases.items():
        report = report_of(Custom(kind), (2, 4, 8, 8))
        assert report.log2_paths == pytest.approx(term.log2_fan_in), kind
        assert report.complexity == pytest.approx(term.complexity), kind
        assert report.complexity_positions == pytest.approx(term.complexity_positions), kind


class TwoThresholds(nn.Module):
    """Two activations of one convolution behind different norms or shifts, and a branch that nothing reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.dead = kind, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.shift = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        torch.relu(self.dead(x))
        x = self.conv(x)
        if self.kind == "norms":
            return torch.relu(self.a(x)) + torch.relu(self.b(x))
        if self.kind == "shift":
            return torch.relu(x) + torch.relu(x + self.shift)
        return torch.relu(x) + torch.sigmoid(x.flatten(2)).reshape(x.shape)


@pytest.mark.parametrize(("kind", "bits"), [("norms", 8.0), ("shift", 8.0), ("same", 4.0)])
def test_activations_count_by_their_half_spaces_and_dead_code_not_at_all(kind: str, bits: float) -> None:
    report = report_of(TwoThresholds(kind), (1, 4, 8, 8))
    assert report.complexity == bits
    assert "dead" not in report.layers
    assert report.macs == 36 * 4 * 36


@pytest.mark.parametrize(
    ("model", "settings", "attention", "mixing", "kind", "tokens"),
    [
        ("cait_xxs24_224", {"depth": 1, "depth_token_only": 1}, "blocks.0.attn", "proj_w", "linear", 196),
        ("efficientformerv2_s0", {"depths": (1, 1, 1, 1)}, "stages.3.blocks.0.token_mixer", "talking_head2", "conv", 49),
    ],
)
def test_heads_mixed_after_the_softmax_are_still_attention(
    model: str, settings: dict[str, Any], attention: str, mixing: str, kind: str, tokens: int
) -> None:
    layers = timm_report(model, 224, **settings).layers
    assert layers[attention].kind == "attention"
    assert layers[attention].log2_fan_in == math.log2(tokens)
    assert layers[f"{attention}.{mixing}"].kind == kind


def test_gates_are_left_out_of_the_field_unless_asked_for() -> None:
    net = nn.Sequential(Custom("gate"), nn.Conv2d(4, 4, 3))
    graph = trace(net, (1, 4, 8, 8))
    assert structure(graph).layers["1"].receptive_field == ((3, 3), (3, 3))
    assert structure(graph, gates=True).layers["1"].receptive_field == ((3, math.inf),) * 2
    assert structure(graph).layers["0.b"].receptive_field == ((math.inf, math.inf),) * 2


def test_layers_called_twice_and_averages() -> None:
    report = report_of(Custom("twice"), (1, 4, 8, 8))
    assert report.layers["a"].calls == 2
    assert report.layers["a"].receptive_field == ((3, 5), (3, 5))
    assert report.weights == 4 * 4 * 9 + 4
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3))
    assert report_of(net).log2_paths - report_of(net, pool_gain="averaging").log2_paths == pytest.approx(2 * math.log2(9))


def test_attention_and_token_layers() -> None:
    report = timm_report("vit_tiny_patch16_224", 224, depth=1)
    attention = report.layers["blocks.0.attn"]
    assert attention.kind == "attention"
    assert attention.log2_fan_in == math.log2(197)
    assert report.layers["blocks.0.attn.qkv"].receptive_field == ((16, 16), (16, 16))
    assert attention.receptive_field == ((math.inf, math.inf),) * 2
    assert report.layers["blocks.0.mlp.fc1"].complexity_position_bits == pytest.approx(
        197 * report.layers["blocks.0.mlp.fc1"].complexity_bits
    )
    windows = timm_report("swin_tiny_patch4_window7_224", 224, depths=(2, 1, 1, 1))
    assert windows.layers["layers.0.blocks.0.attn"].receptive_field == ((28, 28),) * 2  # 7 patches of 4 pixels
    merged = windows.layers["layers.1.downsample.reduction"]
    assert merged.jump == (8, 8)
    assert merged.receptive_field[0] == (8, 56)


@pytest.mark.parametrize(
    "cell",
    [
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|",
        "|none~0|+|nor_conv_1x1~0|skip_connect~1|+|avg_pool_3x3~0|none~1|nor_conv_3x3~2|",
        "|none~0|+|none~0|none~1|+|none~0|nor_conv_1x1~1|none~2|",
    ],
)
def test_cells_of_nas_bench_201_against_their_sums_of_products(cell: str) -> None:
    import optuna
    from capnas.search_spaces import nasbench201

    params = nasbench201.parameters(cell)
    net = nasbench201.space(optuna.trial.FixedTrial(params), num_classes=10, in_chans=3, image_size=32, cells=2)
    report = report_of(net, pool_gain="averaging")
    paths = 27.0
    for width in (16, 32, 64):
        if width > 16:
            paths *= (9 * width / 2) * (9 * width) + (width / 2) / 4  # the block that halves the map; its shortcut averages 2 x 2
        gain = {"none": 0.0, "skip_connect": 1.0, "avg_pool_3x3": 1 / 9, "nor_conv_1x1": float(width), "nor_conv_3x3": 9.0 * width}
        node = [1.0]
        for t in (1, 2, 3):
            node.append(sum(node[s] * gain[params[f"op_{s}_{t}"]] for s in range(t)))
        paths *= node[3] ** 2
    expected = math.log2(paths) if paths else -math.inf  # the mean over the last map and the dense layer: 64 / 64
    assert report.log2_paths == pytest.approx(expected, rel=1e-12)


def test_functional_transposed_and_vector_models() -> None:
    up = report_of(nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ConvTranspose2d(8, 4, 4, stride=2)), (1, 3, 33, 33))
    assert up.layers["1"].receptive_field == ((7, 7), (7, 7))
    assert up.layers["1"].jump == (2, 2)
    assert up.layers["1"].log2_fan_in == math.log2(8 * 16 / 4)
    dense = report_of(nn.Sequential(nn.Linear(10, 3), nn.ReLU(), nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2)), (5, 10))
    assert dense.complexity == pytest.approx(3 + 7.459431618637297)
    assert dense.layers["0"].receptive_field == ()
    assert receptive.feasible_range(dense.fields) is None
    assert receptive.border_layers(dense.fields, 32) == ()
    nothing = report_of(nn.Identity(), (1, 3, 8, 8))
    assert (nothing.complexity, nothing.log2_paths, nothing.layers) == (0.0, 0.0, {})


def test_batch_size_and_weights_do_not_matter() -> None:
    net = timm.create_model("resnet18", channels=(4, 4, 4, 4), num_classes=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    one, four = report_of(net), report_of(net, (4, 3, 32, 32))
    assert one == four
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("name", "size"), FAMILIES)
def test_families_give_sane_values(name: str, size: int) -> None:
    report = timm_report(name, size)
    assert 1e3 < report.complexity < report.complexity_positions or size == 64
    assert report.depth < report.log2_paths < 2000
    assert report.log2_power == pytest.approx(math.log2(1000) - report.log2_paths)
    for layer in report.layers.values():
        assert layer.complexity_bits >= 0
        assert layer.field is not None
        assert all(f.low <= f.high and 1 <= f.jump <= 64 for f in (*layer.field.before, *layer.field.after)), layer
    assert receptive.feasible_range(report.fields) is not None
    for rule in get_args(receptive.BorderRule):
        assert set(receptive.border_layers(report.fields, 32, rule)) <= set(report.layers)  # type: ignore[arg-type]
