"""Models that torch has parametrized, quantized, compiled or scripted, and models that take other inputs than one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from capnas.errors import DegenerateError, UsageError
from capnas.profile import MEASURES, enrich, profile_model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Named(nn.Module):
    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return x["image"]


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_what_a_weight_is_computed_from_counts_to_its_layer(by: Any, bias: bool) -> None:
    model = plain()
    model[0] = by(nn.Conv2d(1, 8, 3, bias=bias))  # type: ignore[index]
    profile = profile_model(model, noise(4, 1, 8, 8))
    rows = {row.name: row.params for row in profile.layers}
    assert rows == {"0": (80 if by is parametrizations.weight_norm else 72) + 8 * bias, "4": 45}
    assert profile.network["params"] == sum(rows.values())
    assert dict(profile.skipped) == {}


def test_a_parametrized_layer_that_was_never_called_is_named_once() -> None:
    model = plain()
    model.spare = parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    model.forward = lambda x: model[4](model[3](model[2](model[0](x))))  # type: ignore[assignment, index]
    assert dict(profile_model(model, noise(4, 1, 8, 8)).skipped) == {"spare": "ParametrizedLinear was never called in the forward pass"}


@pytest.mark.filterwarnings("ignore:.*quant:DeprecationWarning", "ignore:.*quant:UserWarning")
def test_quantized_layers_are_named_and_parameters_counted_without_a_trace() -> None:
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})
    profile = profile_model(model, noise(4, 1, 8, 8))
    assert [row.name for row in profile.layers] == ["0"]
    assert profile.skipped["4"] == "Linear holds its weights quantized, not as parameters: profile the model before it was quantized"
    assert set(profile.skipped) == {"4", "structure"}
    assert dict(profile.network) == {"params": 80}
    assert profile.flags["params"] == "quantized weights left out, as they are no parameters: 4"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_the_profile_of_the_one_before(backend: str) -> None:
    x, y = noise(16, 1, 8, 8), torch.arange(16) % 5
    expected = profile_model(plain(), x, y, measures=MEASURES).to_dict()
    model, in_place = torch.compile(plain(), backend=backend), plain()
    in_place.compile(backend=backend)
    for compiled in (model, in_place):
        compiled(x)  # hooks that come after would be left out
        assert profile_model(compiled, x, y, measures=MEASURES).to_dict() == expected
    enriched = [enrich(profile_model(given, x), given, x, y, measures=MEASURES) for given in (model, plain())]
    assert enriched[0] == enriched[1]
    within = profile_model(nn.Sequential(model, nn.ReLU()), x)
    assert within.measures == ("saturation", "structure")
    assert [row.rows for row in within.layers] == [row["rows"] for row in expected["layers"]]


@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, noise(4, 1, 8, 8))])
def test_a_scripted_model_is_refused(script: Any) -> None:
    with pytest.raises(UsageError, match=r"torch\.nn\.Module in Python, got a torch\.jit\.ScriptModule.* Give the module that it was"):
        profile_model(script(plain()), noise(4, 1, 8, 8))


@pytest.mark.parametrize("measures", [None, ("norms",)])
@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        (Two(), noise(4, 1, 8, 8), r"images of shape \(1, 1, 8, 8\) as its only input; .*TypeError: .*missing 1 .*'y'\. Wrap a model of"),
        (Two(), (noise(4, 1, 8, 8), noise(4, 1, 8, 8)), "as its only input; the model failed: TypeError"),
        (Named(), noise(4, 1, 8, 8), r"as its only input; .*IndexError: .*\. Wrap a model of several or named inputs in a module"),
        (Named(), {"image": noise(4, 1, 8, 8)}, "inputs must be tensors, .* got dict. Wrap a model of several or named inputs"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), noise(4, 1, 8, 8), r"uninitialized: 0\.weight, 0\.bias\. Run the lazy model on one"),
    ],
)
def test_models_that_do_not_take_one_tensor_are_refused(model: nn.Module, inputs: Any, says: str, measures: Any) -> None:
    with pytest.raises(UsageError, match=says):
        profile_model(model, inputs, measures=measures)


def test_capacity_that_cannot_be_read_is_known_by_its_error_and_not_by_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Any:
        def capacity_map(*_: Any, **__: Any) -> Any:
            raise error

        return capacity_map

    x = noise(4, 1, 8, 8)
    monkeypatch.setattr("capnas.profile.enriching.capacity_map", failing(DegenerateError("in other words")))
    assert profile_model(plain(), x, measures=("capacity",)).flags["coverage"] == "capacity cannot be read: in other words"
    monkeypatch.setattr("capnas.profile.enriching.capacity_map", failing(UsageError("tangents must be finite, but not here")))
    with pytest.raises(UsageError, match="but not here"):
        profile_model(plain(), x, measures=("capacity",))


def test_reasons_stay_where_further_measures_need_no_graph() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Adapted(4, 4), nn.Linear(4, 2)), noise(8, 4)
    profile = profile_model(model, x, measures=("norms",))
    assert dict(profile.skipped) == {"1": "norm: Adapted computes something else than a product with one weight"}
    assert enrich(profile, model, x, torch.arange(8) % 2, measures=("proxies",)).skipped == profile.skipped
