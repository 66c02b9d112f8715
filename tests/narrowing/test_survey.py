"""What weighs a group: every layer that reads it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cases import small_cnn
from torch import nn

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.narrowing import narrowed, plan_widths, survey
from capnas.saved import build_recipe


class TwoReaders(nn.Module):
    """Its channels are read by a conv that hardly matters, and by another layer."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.conv, self.small, self.other, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), other, nn.Linear(2, 3)
        with torch.no_grad():
            self.head.weight *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).tanh()
        read = y.mean((2, 3)) if isinstance(self.other, nn.Linear) else y
        gone = self.other(read)
        return self.head(self.small(y).mean((2, 3))) + (gone if gone.dim() == 2 else gone.mean((2, 3)))


def test_a_group_is_weighed_by_all_that_read_it_or_keeps_its_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 3, 4, 4)
    plain, timms = TwoReaders(nn.Linear(8, 3)).eval(), TwoReaders(timm.layers.Linear(8, 3)).eval()
    timms.load_state_dict(plain.state_dict())
    assert torch.equal(survey(timms, x).paths[0].losses, survey(plain, x).paths[0].losses)  # the conv alone would say a millionth
    mixed = survey(TwoReaders(nn.Conv2d(8, 3, 3, padding=1, padding_mode="circular")).eval(), x)
    assert [g.name for g in mixed.groups] == ["small"]
    assert mixed.coupling.fixed["conv"].startswith("other reads it too, and is no plain dense conv or linear layer")


def test_a_group_goes_by_the_most_demanding_of_the_layers_that_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def saturations(model: nn.Module, images: torch.Tensor, threshold: float) -> dict[str, float]:
        asked.append(threshold)
        return {"0": 0.25, "1.conv": 0.75, "2.conv": 0.5}

    def capacity(model: nn.Module, images: torch.Tensor, **options: object) -> SimpleNamespace:
        assert (len(images), options) == (64, {"mode": "eval", "pixels": False})
        return SimpleNamespace(utilisation={"0": 0.6, "1.conv": 0.3, "2.conv": 0.9}, over_wide=("1.conv",))

    def unread(*given: object, **options: object) -> None:
        raise UsageError("it has no path for gradients.")

    module = sys.modules["capnas.narrowing.survey"]  # the package names a function so
    monkeypatch.setattr(module, "saturations", saturations)
    monkeypatch.setattr(module, "capacity_map", capacity)
    net, x = small_cnn(width=8, depth=2, drop=0.5).train(), torch.randn(80, 3, 6, 6)
    found = survey(torch.compile(net, backend="eager"), x, threshold=0.8)  # as it is used, and left as it was
    assert net.training
    assert {p.module for p in found.groups[0].writers()} == {"0", "1.conv", "2.conv"}
    assert (found.needed[0], found.saturation[0], found.utilisation[0], found.over_wide[0], asked) == (6, 0.75, 0.3, True, [0.8])
    monkeypatch.setattr(module, "capacity_map", unread)  # second evidence only
    row = plan_widths(survey(net, x, threshold=0.8), lossless=True).groups[0]
    assert (row.utilisation, row.over_wide, row.needed) == (None, False, 6)


def test_the_labels_of_the_curvature_are_drawn_by_the_seed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = torch.randn(8, 3, 4, 4)
    first, again, other = (survey(net, x, seed=seed).readings["4"].curvature for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_every_layer_that_reads_a_group_of_mobilenetv3_is_weighed() -> None:
    model, x = (
        build_recipe({"timm": "mobilenetv3_small_050", "args": {"num_classes": 5}, "image_size": 32}).eval(),
        torch.randn(16, 3, 32, 32),
    )
    found = survey(model, x)
    assert {p.module for g in found.groups for p in g.readers()} == found.readings.keys() - {"conv_stem"}
    head = found.coupling["conv_head"]
    assert [p.module for p in head.readers()] == ["classifier"]
    full = model(x).detach()
    small = narrowed(model, found, plan_widths(found, widths={"conv_head": 16}))
    off = (small(x) - full).detach().square().mean().sqrt()
    assert float(off) < 0.05 * float(full.std(0).mean())  # 16 images span 16 directions
