"""What torch's default initialization reaches: modules with others inside, parametrized layers; what it does not, named."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from capnas._timm import timm
from capnas.measures.probing import seeded
from capnas.profile import at_default_initialization, profile_model


def marked(model: nn.Module) -> nn.Module:
    """The model with values that no initialization gives."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


def same(found: nn.Module, expected: nn.Module) -> None:
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "build",
    [
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 3, 3, bias=False)),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    ],
    ids=["weight norm", "without bias", "plain"],
)
def test_a_layer_starts_as_torch_builds_it(build: Callable[[], nn.Module]) -> None:
    with seeded(5):
        expected = build()
    same(at_default_initialization(marked(build()), seed=5), expected)


def test_attention_starts_as_torch_builds_it_but_for_the_bias_of_the_layer_inside() -> None:
    with seeded(5):
        expected = nn.MultiheadAttention(8, 2)
        inner = nn.Linear(8, 8)
    found = at_default_initialization(marked(nn.MultiheadAttention(8, 2)), seed=5)
    bound = math.sqrt(6 / (8 + 24))  # Glorot and Bengio's, for the stacked projections
    assert 0.9 * bound < float(found.in_proj_weight.detach().abs().max()) <= bound
    assert float(found.in_proj_bias.detach().abs().max()) == 0
    torch.testing.assert_close(found.out_proj.weight, expected.out_proj.weight)
    assert 0 < float(found.out_proj.bias.detach().abs().max()) <= 1 / math.sqrt(inner.in_features)


def test_a_spectral_norm_divides_a_default_weight() -> None:
    with seeded(5):
        plain = nn.Linear(6, 6)
    found = at_default_initialization(marked(parametrizations.spectral_norm(nn.Linear(6, 6))), seed=5)
    norm = found.parametrizations.weight.original
    # the estimate of the norm that divides it is from before
    torch.testing.assert_close(norm / norm.norm(), plain.weight / plain.weight.norm())
    torch.testing.assert_close(found.bias, plain.bias)


class Scaled(nn.Module):
    """A module of another author that owns parameters beside a layer, and would start that layer in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tokens, self.codes = nn.Linear(4, 4), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.tokens, 1, 2)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.tokens


def test_a_module_with_layers_inside_sets_its_own_parameters_only() -> None:
    found = at_default_initialization(nn.Sequential(marked(Scaled()), nn.Linear(4, 2)), seed=3)
    plain = at_default_initialization(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)), seed=3)
    assert 1 <= float(found[0].tokens.detach().min()) <= float(found[0].tokens.detach().max()) <= 2
    assert bool((found[0].codes == 7).all())
    torch.testing.assert_close(found[0].layer.weight, plain[0][0].weight)
    torch.testing.assert_close(found[1].weight, plain[1].weight)  # what the module draws comes after the layers


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_kept_its_values_is_flagged_by_name() -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # else the computed weight holds a graph, and nothing could copy it
        model = nn.Sequential(marked(Scaled()), nn.Linear(4, 4), weight_norm(nn.Linear(4, 2)))
    flags = profile_model(model, x, initialize=True, measures=("saturation",)).flags
    assert flags["initialization"] == "no reset sets 0.codes, 2.weight_g, 2.weight_v, which kept the values the model came with"
    assert "initialization" not in profile_model(model, x, measures=("saturation",)).flags
    assert "initialization" not in profile_model(model[1:2], x, initialize=True, measures=("saturation",)).flags
    four = profile_model(nn.Sequential(*[Scaled() for _ in range(4)]), x, initialize=True, measures=("saturation",))
    assert "0.codes, 1.codes, 2.codes, 3.codes, which" in four.flags["initialization"]
    model = nn.Sequential(*[Scaled() for _ in range(7)])
    assert "6.codes" not in (said := profile_model(model, x, initialize=True, measures=("saturation",)).flags["initialization"])
    assert "0.codes, 1.codes, 2.codes, 3.codes and 3 more, which" in said


@pytest.mark.parametrize("values", [[0.5], [0.1, 0.2, 0.3, 0.4]], ids=["one number", "numbers that differ"])
def test_only_small_alike_values_are_a_layer_scale(values: list[float]) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.tensor(values))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    fresh = at_default_initialization(nn.Sequential(nn.Linear(4, 4), Named()))
    assert fresh[1].gamma.tolist() == torch.tensor(values).tolist()


@pytest.mark.parametrize("fails", ["a method that fails", "a parametrization without inverse"])
def test_a_reset_that_fails_leaves_the_parameter_and_names_it(fails: str) -> None:
    class Broken(Scaled):
        def reset_parameters(self) -> None:
            raise TypeError("needs more")

    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    layer: nn.Module = Broken()
    if fails != "a method that fails":
        layer = nn.Linear(4, 4)
        nn.utils.parametrize.register_parametrization(layer, "weight", Squared())
    before = copy.deepcopy(layer.state_dict())
    flags = profile_model(nn.Sequential(layer), torch.randn(8, 4), initialize=True, measures=("saturation",)).flags
    name = "0.tokens" if fails == "a method that fails" else "0.parametrizations.weight.original"
    assert name in flags["initialization"]
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())  # the model itself is left alone


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_networks_of_plain_layers_start_as_before(name: str) -> None:
    """Layer by layer, in the order of the modules, from one generator: nothing else draws a number."""
    model = timm.create_model(name, num_classes=4)
    expected = copy.deepcopy(model)
    with seeded(2), torch.no_grad():
        for module in expected.modules():
            if hasattr(module, "reset_parameters") and not any(module.children()):
                module.reset_parameters()
    for module in expected.modules():
        if hasattr(module, "gamma"):
            nn.init.ones_(module.gamma)
    same(at_default_initialization(model, seed=2), expected)
    assert "initialization" not in profile_model(model, torch.randn(2, 3, 32, 32), initialize=True, measures=("saturation",)).flags


def test_norms_with_an_activation_inside_start_at_one_too() -> None:
    model = timm.create_model("regnety_002", num_classes=4)
    assert float(model.s1.b1.conv3.bn.weight.detach().abs().max()) == 0
    assert any(model.s1.b1.conv3.bn.children())
    assert bool((at_default_initialization(model).s1.b1.conv3.bn.weight == 1).all())


def test_position_biases_of_window_attention_start_from_the_seed() -> None:
    shape = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    models = [timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape) for _ in range(2)]
    if not hasattr(models[0].layers[0].blocks[0].attn, "reset_parameters"):
        pytest.skip("in this version of timm nothing resets them: they are flagged as kept")
    same(*(at_default_initialization(model, seed=1) for model in models))


class Holding(nn.Module):
    """Parameters under the names given."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def test_scales_and_gains_that_switch_a_branch_off_start_at_one_under_every_name() -> None:
    small = torch.full((4,), 1e-6)
    scales = Holding(gamma=small, gamma1=small, gamma_2=small, gamma_xca=small, ls1=small, layer_scale_1=small)
    gains = Holding(gain=torch.zeros(4, 1, 1, 1), skipinit_gain=torch.tensor(0.0))
    model = nn.Module()
    model.scales, model.gains, model.layer_scale1 = scales, gains, Holding(scale=small)
    model.others = Holding(scale=small, gain=small, bias=torch.zeros(4), temperature=small, beta=small)
    fresh = at_default_initialization(model)
    assert all(bool((p == 1).all()) for part in (fresh.scales, fresh.gains, fresh.layer_scale1) for p in part.parameters())
    same(fresh.others, model.others)


@pytest.mark.parametrize("options", [{}, {"skipinit": True}])
def test_residual_branches_without_norms_are_on(options: dict[str, bool]) -> None:
    model = timm.models.nfnet.NormFreeNet(
        timm.models.nfnet.NfCfg(depths=(1, 1, 1, 1), channels=(16, 16, 16, 16), stem_type="3x3", stem_chs=8, num_features=16, **options)
    )
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = profile_model(model, x, initialize=True, measures=("saturation",))
    assert all(row.saturation for row in found.layers)
    branch = dict(at_default_initialization(model).named_modules())["stages.1.0"]
    maps = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    on = branch(maps)
    with torch.no_grad():
        branch.conv2.weight.neg_()
    assert not torch.allclose(branch(maps), on)


class Remembering(nn.Module):
    """Computes a tensor once in eval mode and keeps it, as the attentions of timm's LeViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept.setdefault("weight", 2 * self.layer.weight)


def test_what_a_network_keeps_from_a_call_with_gradients_is_not_of_the_weights_it_starts_from() -> None:
    model, x = marked(Remembering()).eval(), torch.ones(2, 4)
    model(x)
    fresh = at_default_initialization(model, seed=5)
    torch.testing.assert_close(fresh(x), 2 * x @ fresh.layer.weight)
    assert set(model.kept) == {"weight"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("called", [False, True])
def test_weights_that_the_old_weight_norm_computed_with_gradients_are_copied(called: bool) -> None:
    model, x = nn.Sequential(weight_norm(nn.Linear(4, 3))), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    if called:
        model(x)
    fresh = at_default_initialization(model)
    torch.testing.assert_close(fresh(x) - fresh[0].bias, model(x) - model[0].bias)  # no reset sets its weight
    profile = profile_model(model, x, initialize=2, measures="saturation")
    assert "0.weight_g" in profile.flags["initialization"]
