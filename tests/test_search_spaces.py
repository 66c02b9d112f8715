from __future__ import annotations

import ast
import csv
import gzip
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial
from torch import nn

import capnas._timm  # noqa: F401  (the spaces import timm directly)
from capnas.testing import check_space

NAMES = ("resnet", "vgg", "byobnet", "mbconv", "convnext", "regnet", "vit", "nasbench201")
SPACES = {name: import_module(f"capnas.search_spaces.{name}").space for name in NAMES}
nasbench201 = import_module("capnas.search_spaces.nasbench201")
BENCHMARK = "nasbench201_cifar10_dev.csv.gz"


@pytest.fixture(params=SPACES, name="space")
def _space(request: pytest.FixtureRequest) -> Any:
    return SPACES[request.param]


def ask(seed: int = 0) -> optuna.Trial:
    storage = optuna.storages.InMemoryStorage()
    number = storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE])
    return optuna.Study(storage.get_study_name_from_id(number), storage, sampler=optuna.samplers.RandomSampler(seed=seed)).ask()


def built(space: Any, trial: optuna.Trial, device: str = "meta", **sizes: Any) -> Any:
    try:
        with torch.device(device):
            return space(trial, **sizes)
    except NotImplementedError:  # RegNet of some versions of timm needs values while it is built
        with torch.device("cpu"):
            return space(trial, **sizes).to(device)


def draw(space: Any, seed: int, image_size: int = 28, in_chans: int = 1, device: str = "meta", **options: Any) -> tuple[Any, optuna.Trial]:
    """The first feasible draw from this seed on."""
    for again in range(5):
        trial = ask(seed + 1000 * again)
        try:
            return built(space, trial, device, num_classes=7, in_chans=in_chans, image_size=image_size, **options).eval(), trial
        except optuna.TrialPruned:
            continue
    raise AssertionError("five draws in a row are infeasible")


def cell(architecture: str, **options: Any) -> Any:
    trial = FixedTrial(nasbench201.parameters(architecture))
    return nasbench201.space(trial, num_classes=10, in_chans=3, image_size=32, **options)


# --- every space


def test_every_space_keeps_the_rules(space):
    report = check_space(space, in_chans=1, image_size=28, draws=2)
    assert report.feasible >= 3
    assert report.distinct == report.feasible
    assert 1e3 < report.n_params[0] < report.n_params[1] < 3e6
    assert 1e4 < report.macs[0] <= report.macs[1] < 150e6


def test_nine_draws_in_ten_are_feasible_different_and_of_the_promised_size(space):
    sizes, params, draws = [], set(), 20
    for seed in range(draws):
        trial = ask(seed)
        try:
            model = built(space, trial, num_classes=10, in_chans=1, image_size=28)
        except optuna.TrialPruned:
            continue
        sizes.append(sum(p.numel() for p in model.parameters()))
        params.add(tuple(sorted((k, str(v)) for k, v in trial.params.items())))
    assert len(sizes) >= 0.9 * draws
    assert len(params) == len(sizes)
    assert 3e4 < sorted(sizes)[len(sizes) // 2] < 1e6


@pytest.mark.parametrize(("image_size", "in_chans"), [(16, 1), (32, 3), (40, 3), (64, 3)])
def test_other_images_are_classified_and_never_shrink_below_two_pixels(space, image_size, in_chans):
    for seed in range(3):
        device = "cpu" if seed == 0 else "meta"
        model, _ = draw(space, seed, image_size, in_chans, device)
        images = torch.zeros(2, in_chans, image_size, image_size, device=device)
        with torch.no_grad():
            assert model(images).shape == (2, 7)
            last = model.forward_features(images)
        assert last.shape[0] == 2
        assert last.shape[-2:].numel() >= 4 if space is not SPACES["vit"] else last.shape[1] >= 16  # a map, or tokens


def test_the_decisions_are_the_same_at_every_resolution(space):
    """Optuna refuses categorical choices that change between trials, and samplers lose track of ranges that do."""
    small, large = draw(space, 3, 28)[1], draw(space, 3, 64)[1]
    common = small.distributions.keys() & large.distributions.keys()
    assert common
    assert all(small.distributions[name] == large.distributions[name] for name in common)


def test_models_name_their_repeated_units_and_their_classifier(space):
    model, _ = draw(space, 0)
    patterns = model.group_matcher(coarse=False)
    blocks = patterns["blocks"] if isinstance(patterns["blocks"], str) else [p for p, _ in patterns["blocks"]]
    names = [name for name, _ in model.named_parameters()]
    assert any(re.match(pattern, name) for pattern in ([blocks] if isinstance(blocks, str) else blocks) for name in names)
    assert model.get_classifier().out_features == 7


def test_spaces_stand_alone(space):
    source = Path(space.__code__.co_filename).read_text(encoding="utf-8")
    modules = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert modules <= {"__future__", "collections", "optuna", "timm", "torch"}


# --- one by one


@pytest.mark.parametrize(
    ("name", "params", "sizes", "reason"),
    [
        ("regnet", {"depth": 7, "w0": 16, "wm": 2.2, "reach": 1.1, "group_size": 8}, {}, "make 2 stages, RegNet has 4"),
        ("convnext", {}, {"image_size": 12}, "leaves less than 2 px of 12"),
        ("resnet", {"stem_pool": True}, {"image_size": 8}, "leave less than 2 px of 8"),
        ("vit", {"grid": 7}, {"image_size": 37}, "no patch size divides 37 px into 7 to 14 patches a side"),
        ("nasbench201", {}, {"image_size": 6}, "leave less than 2 px, at least 8 px"),
    ],
)
def test_what_cannot_be_built_says_why(name, params, sizes, reason):
    """The rest of the parameters are a random draw's."""
    full = {**draw(SPACES[name], 0)[1].params, **params}
    with pytest.raises(optuna.TrialPruned, match=reason):
        SPACES[name](LooseTrial(full), **{"num_classes": 10, "in_chans": 3, "image_size": 28, **sizes})


def test_a_group_size_that_does_not_divide_the_inner_width_is_infeasible():
    params = {**draw(SPACES["byobnet"], 0)[1].params, "depth0": 1, "type0_0": "bottle", "width0_0": 24, "ratio0_0": 1.0, "group0_0": 16}
    with pytest.raises(optuna.TrialPruned, match="inner width 24 is no multiple of group size 16"):
        SPACES["byobnet"](LooseTrial(params), num_classes=10, in_chans=3, image_size=28, group_sizes=(0, 16))


class LooseTrial(FixedTrial):
    """Answers a decision that the parameters leave out, or answer out of its range, without complaint."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._params.get(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, **_: Any) -> int:
        return self._params.get(name, low)

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return self._params.get(name, low)


@pytest.mark.parametrize("name", ["resnet", "regnet", "convnext"])
@pytest.mark.parametrize("image_size", [16, 28, 64])
def test_late_stages_keep_the_resolution_without_dilated_kernels(name, image_size):
    for seed in range(3):
        model, _ = draw(SPACES[name], seed, image_size)
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] % 2]
        assert {m.dilation for m in convs} == {(1, 1)}


def test_vgg_has_a_narrow_head():
    model, trial = draw(SPACES["vgg"], 1)
    assert max(p.shape[0] for p in model.parameters()) <= 192
    assert model.get_classifier().in_features == trial.params["head"]


def test_resnet_widths_are_those_of_the_stages_for_both_blocks():
    base = draw(SPACES["resnet"], 0)[1].params | {f"depth{i}": 1 for i in range(4)} | {"stem_pool": False}
    for block, factor in (("basic", 1), ("bottleneck", 2)):
        with torch.device("meta"):
            model = SPACES["resnet"](FixedTrial({**base, "block": block}), num_classes=10, in_chans=1, image_size=28)
            out = model.forward_features(torch.zeros(1, 1, 28, 28))
        assert out.shape == (1, factor * base["width3"], 2, 2)


def test_spaces_grow_by_arguments():
    for name, options in {"resnet": {"widths": (64, 128)}, "convnext": {"widths": (96, 128)}, "vit": {"depths": (12, 12)}}.items():
        small, large = (sum(p.numel() for p in draw(SPACES[name], 0, 64, 3, **o)[0].parameters()) for o in ({}, options))
        assert large > 1.5 * small, name


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_vit_has_a_class_token_only_where_it_is_read(pool):
    params = {**draw(SPACES["vit"], 0)[1].params, "pool": pool}
    model = SPACES["vit"](FixedTrial(params), num_classes=10, in_chans=1, image_size=28)
    assert (model.cls_token is not None) == (pool == "token")


def test_vit_divides_the_image_evenly():
    for image_size, grid, patches in ((28, 4, 4), (28, 7, 7), (32, 4, 4), (32, 7, 8), (40, 7, 8), (64, 7, 8), (30, 4, 5)):
        params = {**draw(SPACES["vit"], 0)[1].params, "grid": grid}
        with torch.device("meta"):
            model = SPACES["vit"](FixedTrial(params), num_classes=10, in_chans=3, image_size=image_size)
        assert model.patch_embed.grid_size == (patches, patches)


# --- NAS-Bench-201


def test_published_cells_have_the_published_number_of_parameters(shared):
    with gzip.open(shared / "data" / BENCHMARK, "rt") as file:
        rows = list(csv.DictReader(file))
    for row in rows[::200]:
        with torch.device("meta"):
            model = cell(row["arch"], cells=5, channels=16)
        assert sum(p.numel() for p in model.parameters()) == int(row["params"]), row["arch"]
    for row in rows:
        assert nasbench201.architecture_string(nasbench201.parameters(row["arch"])) == row["arch"]


def test_dead_weights_can_be_left_out():
    """One nor_conv_3x3 at 4 channels is 9 * 16 + 8 parameters, at 8 and 16 channels 9 * 64 + 16 and 9 * 256 + 32."""
    dead = "|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|skip_connect~2|"
    full, live = (sum(p.numel() for p in cell(dead, channels=4, dead_weights=keep).parameters()) for keep in (True, False))
    assert full - live == 152 + 592 + 2336


def test_operations_are_computed_on_live_edges_only():
    model = cell("|nor_conv_3x3~0|+|none~0|none~1|+|nor_conv_1x1~0|none~1|nor_conv_3x3~2|", channels=4)
    called = []
    for name, module in model.named_modules():
        if re.fullmatch(r"blocks\.\d+\.edges\.\d_\d", name):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.randn(2, 3, 16, 16))
    assert called == [f"blocks.{i}.edges.0_3" for i in (0, 2, 4)]


def test_a_cell_without_a_path_says_the_same_of_every_image():
    model = cell("|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|none~2|", channels=4)
    logits = model(torch.randn(3, 3, 16, 16))
    assert logits.unique(dim=0).shape[0] == 1
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert model.fc.bias.grad.abs().sum() > 0


def test_a_cell_is_the_sum_over_all_edges():
    """A second derivation that runs every edge, with "none" as zeros, node after node."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        picks = torch.randint(5, (6,), generator=generator).tolist()
        operations = {edge: nasbench201.OPERATIONS[i] for edge, i in zip(nasbench201.EDGES, picks)}
        model = nasbench201.Cell(operations, 4).eval()
        x = torch.randn(2, 4, 9, 9, generator=generator)
        nodes = [x]
        for target in (1, 2, 3):
            terms = []
            for source in range(target):
                edge, name = nodes[source], operations[source, target]
                if name == "none":
                    terms.append(torch.zeros_like(edge))
                elif name == "skip_connect":
                    terms.append(edge)
                elif name == "avg_pool_3x3":
                    ones = torch.ones(4, 1, 3, 3)
                    inside = nn.functional.conv2d(torch.ones_like(edge), ones, padding=1, groups=4)
                    terms.append(nn.functional.conv2d(edge, ones, padding=1, groups=4) / inside)
                else:
                    weight = model.edges[f"{source}_{target}"][1].weight
                    assert weight.shape[2] == (3 if name == "nor_conv_3x3" else 1)
                    y = nn.functional.conv2d(edge.clamp(min=0), weight, padding=weight.shape[2] // 2)
                    terms.append(y / (1 + 1e-5) ** 0.5)  # a fresh batch norm in eval mode
            nodes.append(torch.stack(terms).sum(0))
        torch.testing.assert_close(model(x), nodes[3])


def test_the_network_has_three_stages_of_cells_with_residual_blocks_between():
    model = cell("|skip_connect~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|", cells=2, channels=4)
    kinds = [type(block).__name__ for block in model.blocks]
    assert kinds == ["Cell", "Cell", "Reduction", "Cell", "Cell", "Reduction", "Cell", "Cell"]
    assert model.forward_features(torch.zeros(1, 3, 15, 15)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "|none~0|+|none~0|none~1|",
        "|conv~0|+|none~0|none~1|+|none~0|none~1|none~2|",
        "|none~1|+|none~0|none~1|+|none~0|none~1|none~2|",
    ],
)
def test_wrong_names_of_cells_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected \|op~0\|\+\|op~0\|op~1\|\+"):
        nasbench201.parameters(wrong)
