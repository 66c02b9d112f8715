from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from capnas._timm import timm
from capnas.capacity import capacity_map
from capnas.errors import UsageError
from capnas.measures.excess import distance_to_init
from capnas.measures.proxies import macs
from capnas.profile import MEASURES, Profile, at_default_initialization, enrich, profile_model, skipped_modules
from capnas.scoring import measures_for, score
from capnas.weights import InitialWeights


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def small_resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=4)


def state(model: nn.Module) -> dict:
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "grads": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) for m in model.modules()),
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict, after: dict) -> None:
    for key in before["tensors"]:
        assert torch.equal(before["tensors"][key], after["tensors"][key]), key
    assert torch.equal(before["random"], after["random"])
    for part in ("modes", "grads", "hooks", "attributes"):
        assert before[part] == after[part], part


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_leaves_the_model_untouched(mode: str) -> None:
    model = small_resnet().eval()
    model.layer1.train()  # a mixture of modes survives too
    before = state(model)
    profile_model(model, noise(4, 3, 32, 32), mode=mode)  # type: ignore[arg-type]
    assert_same(before, state(model))


def test_leaves_a_model_untouched_that_merges_weights_on_its_way_to_eval_mode() -> None:
    class Adapted(nn.Linear):
        def train(self, mode: bool = True) -> Adapted:
            if not mode:
                self.weight.data += 1.0  # as adapters do
            return super().train(mode)

    model = nn.Sequential(Adapted(3, 2))
    before = state(model)
    profile_model(model, noise(4, 3), mode="eval")
    assert_same(before, state(model))


def test_leaves_the_model_untouched_when_the_forward_raises() -> None:
    model = small_resnet()
    model.fc.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("midway")))
    before = state(model)
    with pytest.raises(RuntimeError, match="midway"):
        profile_model(model, noise(4, 3, 32, 32), mode="train")
    assert_same(before, state(model))


def test_both_readings_in_one_pass_in_execution_order() -> None:
    profile = profile_model(small_resnet(), noise(8, 3, 32, 32), mode="train")
    assert [row.name for row in profile.layers][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert profile.layers[-1].name == "fc"
    assert [row.name for row in profile.blocks] == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert {row.reading for row in profile.blocks} == {"blocks"}
    row = profile.layers[0]
    assert (row.kind, row.width, row.params) == ("Conv2d", 64, 64 * 3 * 49)
    assert row.saturation == row.k / 64
    assert row.few_rows is False
    assert profile.layers[-1].few_rows is True


def test_a_loader_gives_what_its_tensors_give() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(24, 1, 8, 8), torch.arange(24) % 3
    measures = ("saturation", "proxies")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    expected = profile_model(net, x.split(8), y, measures=measures).to_dict()
    assert profile_model(net, loader, measures=measures).to_dict() == expected
    assert profile_model(net, (x, y), measures=measures).to_dict() == profile_model(net, x, y, measures=measures).to_dict()
    assert profile_model(net, [x[:8], x[8:16]]).layers == profile_model(net, iter(x[:16].split(8))).layers


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "at least one, got none"),
        (np.zeros((4, 1, 8, 8), np.float32), "inputs must be tensors, .* got ndarray"),
        ([{"image": torch.zeros(4, 1, 8, 8)}], "got dict"),
        (torch.zeros(0, 1, 8, 8), r"at least one image, got one of shape \(0, 1, 8, 8\)"),
        (torch.zeros(1, 1, 3, 3), "two images or more, or mode='eval'"),
        ([torch.zeros(2, 1, 3, 3), torch.zeros(1, 1, 3, 3)], "two images or more, or mode='eval'"),
    ],
)
def test_inputs_that_cannot_be_read_are_refused(inputs: Any, says: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=says):
        profile_model(net, inputs, mode="train")


def test_batches_are_pooled() -> None:
    model, x = small_resnet().eval(), noise(8, 3, 32, 32)
    whole, parts = profile_model(model, x), profile_model(model, list(x.split(3)))
    assert [r.rows for r in whole.layers] == [r.rows for r in parts.layers]
    assert [r.k for r in whole.layers] == [r.k for r in parts.layers]


def test_the_first_batch_goes_with_its_own_targets() -> None:
    model, x, classes = small_resnet().eval(), noise(24, 3, 32, 32), torch.arange(24) % 4
    names = ("snip", "grad_norm", "zico")
    parts = profile_model(model, x.split([8, 16]), classes, measures=("proxies",)).network
    again = profile_model(model, x.split([8, 16]), classes[:8], measures=("proxies",)).network
    alone = profile_model(model, x[:8], classes[:8], measures=("proxies",)).network
    assert all(math.isfinite(alone[name]) for name in names)
    assert {n: parts[n] for n in names} == {n: alone[n] for n in names} == {n: again[n] for n in names}
    with pytest.raises(UsageError, match=r"one class per image, 24 for all batches or 8 for the first; got 16\. Give each image its own"):
        profile_model(model, x.split([8, 16]), classes[:16], measures=("proxies",))
    with pytest.raises(UsageError, match="one class per image, 24; got 23"):
        profile_model(model, x, classes[:23], measures=("proxies",))
    with pytest.raises(UsageError, match="inputs must be a batch or hold at least one, got none"):
        profile_model(model, [])


def test_a_constant_batch_costs_the_capacity_columns_only() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=4)  # through its batch norms gradients overflow
    found = profile_model(model, torch.zeros(8, 3, 32, 32), measures=("structure", "capacity"), mode="train")
    assert found.measures == ("saturation", "structure")
    assert {row.capacity for row in found.layers} == {None}
    assert all(row.saturation == 0 for row in found.layers)
    lacking = [name for name in score(found) if measures_for([name]) == ("saturation", "capacity")]
    assert len(lacking) == 6
    for name in lacking:
        assert math.isnan(score(found)[name])
        assert "capacity cannot be read: the factors of a layer's tangents must be finite" in found.flags[name]
    assert math.isfinite(score(found)["capacity_score"])  # which needs the graph alone


def test_what_was_not_measured_is_named() -> None:
    model = small_resnet()
    model.spare = nn.Linear(3, 3)
    model.scale = nn.Parameter(torch.ones(2))
    profile = profile_model(model, noise(4, 3, 32, 32))
    assert profile.skipped["spare"] == "Linear was never called in the forward pass"
    assert "rescales the layer before it" in profile.skipped["bn1"]
    assert "neither a convolution nor a linear layer" in profile.skipped[""]
    measured = {row.name for row in profile.layers}
    holders = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert measured | set(profile.skipped) == holders
    attention = nn.MultiheadAttention(4, 2)
    assert "never called" in skipped_modules(attention, set())["out_proj"]


def test_round_trip_through_json() -> None:
    model, x = small_resnet(), noise(4, 3, 32, 32)
    x[0, 0, 0, 0] = float("nan")
    for inputs in (noise(4, 3, 32, 32), x):
        profile = profile_model(model, inputs)
        stored = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
        assert json.dumps(Profile.from_dict(stored).to_dict()) == json.dumps(profile.to_dict())
    assert not profile.layers[0].finite
    stored["version"] = 99
    with pytest.raises(UsageError, match="profile version must be 1, got 99"):
        Profile.from_dict(stored)


def test_equal_profiles_for_equal_seeds_with_dropout() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    first, second = (profile_model(model, noise(64, 6), mode="train", seed=3) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert copy.deepcopy(first).saturations("modules") == first.saturations("modules")


def test_unknown_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="measures must be one of"):
        profile_model(small_resnet(), noise(1, 3, 32, 32), measures=("saturatoin",))
    with pytest.raises(UsageError, match=r"got 'norm'\. Did you mean 'norms'"):
        profile_model(small_resnet(), noise(1, 3, 32, 32), measures="norm")


def test_one_name_is_one_measure_and_all_are_all() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)), noise(8, 3, 8, 8)
    assert profile_model(model, x, measures="norms").measures == profile_model(model, x, measures=("norms",)).measures
    found = profile_model(model, x, measures="all")
    assert found.measures == MEASURES
    assert score(found, "naswot") == {"naswot": score(found)["naswot"]}


def test_a_name_is_no_model() -> None:
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, got str: build it first, as by timm\.create_model\('resnet18'\)\."):
        profile_model("resnet18", noise(1, 3, 32, 32))  # type: ignore[arg-type]


def test_structure_norms_and_proxies_in_one_call() -> None:
    model, x = small_resnet(), noise(8, 3, 32, 32)
    before = state(model)
    profile = profile_model(model, x, torch.arange(8) % 4, measures=MEASURES, mode="train")
    assert_same(before, state(model))
    stem = profile.layers[0]
    assert stem.receptive_field == ((7.0, 7.0), (7.0, 7.0))
    assert stem.complexity == pytest.approx(64.0, abs=0.01)
    assert stem.log2_fan_in == pytest.approx(torch.tensor(147.0).log2().item())
    assert stem.macs == stem.params * 16 * 16
    assert profile.network["macs"] == sum(row.macs or 0 for row in profile.layers)
    inside = [row.macs or 0 for row in profile.layers if row.name.startswith(profile.blocks[0].name + ".")]
    assert profile.blocks[0].macs == sum(inside) > 0
    explicit = torch.linalg.matrix_norm(model.fc.weight.detach().double(), 2)
    assert profile.layers[-1].norm == pytest.approx(float(explicit), rel=1e-4)
    assert profile.network["params"] == sum(p.numel() for p in model.parameters())
    assert {"complexity", "log2_paths", "intrinsic_power", "log10_lipschitz"} <= set(profile.network)
    assert all(row.capacity is not None and 0 < row.utilisation <= 1 for row in profile.layers)
    scores = ("capacity_balance", "depth_evenness", "coverage", "propagation", "scaling", "usage")
    assert all(0 <= profile.network[name] <= 1 for name in scores)
    assert {"synflow", "naswot", "zico", "snip", "grad_norm"} <= set(profile.network)
    stored = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert Profile.from_dict(stored).network == dict(profile.network)


def test_batch_norms_count_in_the_lipschitz_constant_and_other_norms_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(144, 2))
    nn.init.constant_(model[1].running_var, 1e-4 - 1e-5)  # the map of eval mode: times 100

    def measured() -> Profile:
        return profile_model(model, noise(8, 1, 8, 8), mode="train", measures=("norms",))

    profile = measured()
    layers = sum(math.log10(row.norm) for row in profile.layers)
    assert profile.network["log10_lipschitz"] == pytest.approx(layers + 2, abs=1e-3)
    assert profile.flags["log10_lipschitz"].endswith("no bound but by the data: 2 x GroupNorm")
    nn.init.zeros_(model[1].weight)
    assert measured().network["log10_lipschitz"] == pytest.approx(layers, abs=1e-3)
    model[2], model[3] = nn.Identity(), nn.Identity()
    assert "log10_lipschitz" not in measured().flags


@pytest.mark.parametrize("computed", [False, True], ids=["plain", "parametrized"])
def test_a_layer_that_is_the_whole_model_has_its_structure(computed: bool) -> None:
    model = nn.Conv2d(3, 8, 5, stride=2)
    inside = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2))
    if computed:
        for layer in (model, inside[0]):
            nn.utils.parametrizations.weight_norm(layer)
    found, expected = (profile_model(m, noise(4, 3, 16, 16), measures=("saturation", "structure")) for m in (model, inside))
    (row,), (beside,) = found.layers, expected.layers
    assert (row.complexity, row.log2_paths, row.log2_compression) == (beside.complexity, beside.log2_paths, beside.log2_compression)
    assert row.receptive_field == beside.receptive_field == ((5, 5), (5, 5))
    assert found.skipped == {}


def test_unmeasured_columns_stay_empty() -> None:
    profile = profile_model(small_resnet(), noise(2, 3, 32, 32), measures=("saturation",))
    assert profile.layers[0].norm is None
    assert profile.layers[0].complexity is None
    assert profile.network == {}


def test_border_and_critical_layers_and_feasible_sizes_are_named() -> None:
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(9)])
    profile = profile_model(model, noise(2, 1, 20, 20), measures=("structure",))
    found = profile.receptive
    assert [row.receptive_field for row in profile.layers] == [((3.0 + 2 * i,) * 2,) * 2 for i in range(9)]
    assert found is not None
    assert found.image_size == (20, 20)
    assert found.critical == found.border["strict"] == found.border["toolbox"] == ()
    assert found.feasible == ((19.0, 19.0), (19.0, 19.0))
    small = profile_model(nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(9)]), noise(2, 1, 15, 15), measures=("structure",))
    assert small.receptive is not None
    assert small.receptive.critical == ("7", "8")
    assert small.receptive.border == {"strict": ("8",), "toolbox": ("7", "8")}
    stored = json.loads(json.dumps(small.to_dict(), allow_nan=False))
    assert Profile.from_dict(stored) == small


def test_feasible_sizes_are_pairs_of_an_axis() -> None:
    profile = profile_model(nn.Sequential(nn.Conv2d(1, 1, (1, 3)), nn.Conv2d(1, 1, (1, 3))), noise(2, 1, 8, 8), measures=("structure",))
    assert profile.receptive is not None
    assert profile.receptive.feasible == ((1.0, 1.0), (5.0, 5.0))
    assert profile.receptive.functional == ((1.0, 1.0), (3.0, 5.0))


def test_ten_rows_a_feature_are_enough() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    assert [profile_model(model, noise(n, 4)).layers[0].few_rows for n in (19, 20)] == [True, False]


def test_infinite_fields_come_back_from_json() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    profile = profile_model(model, noise(2, 1, 8, 8), measures=("structure",))
    assert profile.layers[-1].receptive_field == ((math.inf, math.inf), (math.inf, math.inf))
    again = Profile.from_dict(json.loads(json.dumps(profile.to_dict(), allow_nan=False)))
    assert again.layers[-1].receptive_field == profile.layers[-1].receptive_field
    assert again.receptive == profile.receptive


def test_the_first_format_is_still_read() -> None:
    row = {"name": "0", "kind": "Linear", "reading": "modules", "width": 2, "params": 6, "rows": 4, "rows_seen": 4, "saturation": 0.5,
           "receptive_field": [[3.0, None]]}  # fmt: skip
    old = {"version": 1, "layers": [row], "blocks": [], "skipped": {}, "mode": "train", "threshold": 0.99, "rows": "channelwise"}
    profile = Profile.from_dict(old)
    assert profile.receptive is None
    assert profile.layers[0].distance is None
    assert profile.layers[0].receptive_field == ((3.0, math.inf),)
    assert Profile.from_dict(old | {"later": 1, "layers": [row | {"later": 1}]}) == profile


def test_decoupling_belongs_to_the_layer_before_the_activation() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.norm, self.last, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
            self.act = nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.last(torch.relu(self.norm(self.conv(x))))
            return self.head(self.act(self.shortcut(x) + y).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Block(), noise(16, 3, 8, 8)
    rows = {r.name: r for r in profile_model(model, x, measures=("capacity",), mode="train").layers}
    by_activation = capacity_map(model, x.to(memory_format=torch.channels_last), mode="train").decoupling["act"]
    assert rows["conv"].decoupling == pytest.approx(0.267, abs=0.05)  # of a rectifier on normal values
    assert (rows["last"].decoupling, rows["last"].gate_decoupling) == (by_activation.out, by_activation.gate)
    assert (rows["shortcut"].decoupling, rows["head"].decoupling) == (None, None)
    assert rows["conv"].gate_decoupling == pytest.approx(0.5, abs=0.15)


def test_distance_from_known_initial_weights_only() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), noise(8, 4)
    start = InitialWeights.of(model)
    before = profile_model(model, x)
    assert [r.distance for r in before.layers] == [None, None]
    with torch.no_grad():
        model[0].weight += 1
    after = enrich(before, model, x, measures=(), start=start)
    assert [r.distance for r in after.layers] == [pytest.approx(distance_to_init(model[0].weight.detach(), start.weights["0"])), 0.0]


def test_default_initialization_forgets_the_authors_own() -> None:
    model = timm.create_model("resnet18", num_classes=4, in_chans=1)
    assert float(model.layer1[0].bn2.weight.detach().abs().sum()) == 0  # timm switches residual branches off at the start
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    fresh = at_default_initialization(model, seed=3)
    assert bool((fresh.layer1[0].bn2.weight == 1).all())
    assert float(fresh.conv1.weight.detach().abs().max()) <= 1 / 7  # torch: uniform within 1 / sqrt(fan in)
    assert bool((torch.random.get_rng_state() == state).all())
    again = at_default_initialization(timm.create_model("resnet18", num_classes=4, in_chans=1), seed=3)
    assert all(bool((a == b).all()) for a, b in zip(fresh.state_dict().values(), again.state_dict().values()))
    assert all(bool((before[name] == value).all()) for name, value in model.state_dict().items())


def test_default_initialization_switches_layer_scales_on() -> None:
    model = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    assert float(model.stages[0].blocks[0].gamma.detach().max()) < 1e-3
    assert bool((at_default_initialization(model).stages[0].blocks[0].gamma == 1).all())


def test_profile_at_the_default_initialization_does_not_depend_on_the_weights() -> None:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def saturation(scale: float, **options: bool) -> float | None:
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        with torch.no_grad():
            model[0].weight[1:] *= scale
        return profile_model(model, x, mode="train", **options).layers[0].saturation

    assert saturation(1e-6) != saturation(1.0)
    assert saturation(1e-6, initialize=True) == saturation(1.0, initialize=True)


def test_the_sweep_to_the_pixels_can_be_left_out() -> None:
    model, x = small_resnet(), noise(8, 3, 32, 32)
    full, short = (profile_model(model, x, measures=("capacity",), mode="train", pixels=pixels) for pixels in (True, False))
    assert short.network["coverage"] != short.network["coverage"]  # not a number
    assert {k: v for k, v in short.network.items() if k != "coverage"} == {k: v for k, v in full.network.items() if k != "coverage"}


def test_a_profile_has_what_the_capacity_score_needs_unless_the_model_cannot_be_traced() -> None:
    class Moody(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.abs().sum()) > 0 else x

    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    assert math.isfinite(score(profile_model(nn.Sequential(*layers), noise(16, 1, 8, 8)))["capacity_score"])
    found = profile_model(Moody(*layers), noise(16, 1, 8, 8))
    assert "cannot be traced" in found.skipped["structure"]
    assert math.isnan(score(found)["capacity_score"])
    assert found.layers[0].saturation is not None
    with pytest.raises(UsageError, match=r"structure and norms need the model's graph; the model failed: RuntimeError: .* Leave them out"):
        profile_model(Moody(*layers), noise(16, 1, 8, 8), measures=("saturation", "structure", "norms"))


def test_profiles_models_that_view_their_maps() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).view(len(x), -1))  # a view that no channels-last map allows

    x = noise(12, 3, 8, 8)
    profile = profile_model(Views(), x, torch.arange(12) % 2, measures=MEASURES, mode="train")
    assert profile.measures == MEASURES
    assert profile.network["macs"] == macs(Views(), x).value == 4 * 27 * 64 + 512


def test_images_of_one_channel_are_read_right_in_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 4, stride=(1, 3), padding=(3, 0), bias=False))  # outputs one cell wide
    x = torch.randn(64, 1, 7, 5)
    weight = model[0].weight.detach().double().numpy()
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (3, 3), (0, 0)))
    rows = np.stack([np.einsum("bihw,oihw->bo", padded[:, :, top : top + 4, :4], weight) for top in range(10)], 1).reshape(-1, 3)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    (layer,) = profile_model(model, x, measures=["saturation"]).layers
    assert layer.effective_rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
