from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capnas._timm import timm
from capnas.measures.moments import Moments
from capnas.measures.saturation import Projection, random_projection
from capnas.profile import profile_model
from capnas.projection import head_names, project_model, projected


def plain_vgg(width: int = 8) -> nn.Module:
    """Eight 3x3 convolutions in four stages, pooled between, as in the published experiments at toy size."""
    layers: list[nn.Module] = []
    channels = 1
    for stage in range(4):
        for _ in range(2):
            out = width * 2 ** min(stage, 2)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def train_on_digits(size: int, epochs: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    if size != 8:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    x = (x - x.mean()) / x.std()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(seed)
    model = plain_vgg(16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * len(train) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    for step in range(steps):
        batch = train[torch.randint(len(train), (64,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval(), x[train], x[test], y[test]


def test_digits_survive_the_eigenspace_and_not_random_directions() -> None:
    model, train, x, y = train_on_digits(16, epochs=6)

    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = project_model(model, train.split(200), accuracy, threshold=0.99)
    assert result.accuracy > 0.9
    assert result.lost < 3
    assert result.random < 0.4
    assert len(result.kept) == 8
    assert any(k < width for k, width in result.kept.values())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert project_model(model, train.split(200), accuracy, threshold=1.0).lost == pytest.approx(0, abs=0.5)


@pytest.mark.slow
def test_deep_layers_saturate_only_when_the_digits_are_large() -> None:
    small, _, x8, _ = train_on_digits(8, epochs=12)
    large, _, x32, _ = train_on_digits(32, epochs=12)
    conv8 = 24
    narrow, wide = (next(r for r in profile_model(m, x).layers if r.name == str(conv8)) for m, x in ((small, x8), (large, x32)))
    assert narrow.saturation is not None
    assert wide.saturation is not None
    assert narrow.saturation < 0.15
    assert wide.saturation > 0.45


def test_projection_acts_on_channels_and_comes_off() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten())
    x = torch.randn(2, 1, 4, 4)
    plain = model(x)
    keep_first = Projection(basis=torch.eye(3)[:, :1], mean=torch.tensor([0.0, 5.0, 7.0]))
    with projected(model, {"0": keep_first}):
        seen = model(x).reshape(2, 3, 16)
        assert torch.allclose(model[0](x[0]), model[0](x)[0])  # one image without an axis for the batch
    torch.testing.assert_close(seen[:, 0], plain.reshape(2, 3, 16)[:, 0])
    assert (seen[:, 1] == 5).all()
    assert (seen[:, 2] == 7).all()
    assert torch.equal(model(x), plain)


def test_a_layer_whose_weight_is_used_without_a_call_is_projected_too() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x, self.wide.weight))

    model, x = Reads(), torch.randn(5, 4)
    with projected(model, {"wide": Projection(basis=torch.zeros(3, 0), mean=torch.ones(3))}):
        seen = model(x)
    assert torch.equal(seen, model.head(torch.ones(5, 3)))
    assert set(project_model(model, [x], lambda m: 0.0).kept) == {"wide"}


def test_a_compiled_model_is_projected_as_it_was_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(8, 1, 4, 4)
    expected, found = (project_model(m, [x], lambda m: float(m(x).mean())) for m in (model, torch.compile(model, backend="eager")))
    assert set(found.kept) == {"0"}
    assert found == expected


def test_heads() -> None:
    assert head_names(timm.create_model("resnet18")) == {"fc"}
    assert head_names(nn.Conv2d(1, 1, 1)) == set()
    both = nn.ModuleDict({"stem": nn.Linear(2, 2), "head": nn.Linear(2, 2), "head_dist": nn.Linear(2, 2)})
    both.get_classifier = lambda: (both["head"], both["head_dist"])  # as timm's distilled networks
    assert head_names(both) == {"head", "head_dist"}


def test_random_directions_are_others_for_each_layer_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def drawn(moments: Moments, k: int, seed: int) -> Projection:
        seeds.append(seed)
        return random_projection(moments, k, seed)

    monkeypatch.setattr("capnas.projection.random_projection", drawn)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    accuracies = iter((0.75, 0.5, 0.25))
    found = project_model(net, [torch.randn(20, 4)], lambda _: next(accuracies), seed=7)
    assert seeds == [7, 8]
    assert (found.lost, found.random) == (25.0, 0.25)
