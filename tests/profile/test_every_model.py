"""Every measure on models of every kind, in both modes; each comes out as it went in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_profile import assert_same, noise, state
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from capnas.profile import MEASURES, profile_model


class Forward(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Counting(nn.Module):
    """Writes a buffer in every mode, in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        return x


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


def conv(*sizes: int, **options: int) -> nn.Module:
    return nn.Conv2d(*sizes, 3, padding=1, **options)  # type: ignore[arg-type]


def shared_module() -> nn.Module:
    layer = conv(8, 8)
    return nn.Sequential(conv(3, 8), nn.ReLU(), layer, nn.ReLU(), layer, *head(8))


def shared_weight() -> nn.Module:
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 8), *head(8))
    model[4].weight = model[2].weight  # type: ignore[union-attr]
    return model


def called_twice() -> nn.Module:
    return Forward(lambda m, x: m.head(m.body(m.body(m.stem(x)))), stem=conv(3, 8), body=nn.Sequential(conv(8, 8), nn.ReLU()),
                   head=nn.Sequential(*head(8)))  # fmt: skip


def unused() -> nn.Module:
    return Forward(lambda m, x: m.head(torch.relu(m.stem(x))), stem=conv(3, 8), never=conv(8, 8), head=nn.Sequential(*head(8)))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.SiLU(),
                         conv(8, 8, groups=2), nn.GELU(), *head(8))  # fmt: skip


def layer_norm() -> nn.Module:
    def forward(m: Forward, x: Tensor) -> Tensor:
        tokens = m.stem(x).flatten(2).transpose(1, 2)
        return m.head((tokens + m.mlp(tokens)).mean(1))

    mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    return Forward(forward, stem=nn.Conv2d(3, 8, 4, 4), mlp=mlp, head=nn.Linear(8, 4))


def in_place() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(inplace=True), conv(8, 8), nn.BatchNorm2d(8), nn.Hardswish(inplace=True), *head(8))


def parametrized() -> nn.Module:
    first, second = parametrizations.spectral_norm(conv(3, 8)), parametrizations.weight_norm(conv(8, 8))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *head(8))


def counting() -> nn.Module:
    return nn.Sequential(conv(3, 8), Counting(), nn.ReLU(), *head(8))


def frozen() -> nn.Module:
    model = in_place()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


MODELS = [shared_module, shared_weight, called_twice, unused, grouped, layer_norm, in_place, parametrized, counting, frozen]
LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda m: m, "bfloat16": lambda m: m.bfloat16(), "channels_last": lambda m: m.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
}  # fmt: skip


def build(kind: Callable[[], nn.Module], mode: str) -> nn.Module:
    torch.manual_seed(0)
    return kind().train(mode == "eval")  # the other mode than the one that is read


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_measures_leave_every_model_as_it_was(kind: Callable[[], nn.Module], layout: str, mode: str) -> None:
    model = LAYOUTS[layout](build(kind, mode))
    x, y = noise(8, 3, 12, 12).to(next(model.parameters()).dtype), torch.arange(8) % 4
    before, parameters = state(model), [id(p) for p in model.parameters()]
    profile = profile_model(model, x, y, measures=MEASURES, mode=mode)  # type: ignore[arg-type]
    assert_same(before, state(model))
    assert [id(p) for p in model.parameters()] == parameters
    assert model(x).shape == (8, 4), "it still runs"
    assert profile.measures == MEASURES
    rows = {row.name: row for row in profile.layers}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers - set(rows) == ({"never"} if kind is unused else set())
    assert layers - set(rows) <= set(profile.skipped)
    assert all(0 <= row.saturation <= 1 and row.norm > 0 for row in profile.layers)  # type: ignore[operator]
    assert all(row.capacity >= 0 if row.capacity is not None else row.name in profile.skipped for row in profile.layers)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_forward_that_raises_midway_leaves_the_model_as_it_was(measure: str, mode: str) -> None:
    def failing(m: Forward, x: Tensor) -> Tensor:
        x = m.body(x)
        if len(x) > 1:  # the trace, of one image, passes
            raise KeyError("midway")
        return m.head(x)

    body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), Counting())
    model = build(lambda: Forward(failing, body=body, head=nn.Sequential(*head(8))), mode)
    before = state(model)
    with pytest.raises(KeyError, match="midway"):
        profile_model(model, noise(8, 3, 12, 12), measures=("saturation", measure), mode=mode)  # type: ignore[arg-type]
    assert_same(before, state(model))
