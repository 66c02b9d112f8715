"""Batch norms whose running statistics a training is too short to carry along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_space import images
from torch import nn

from capnas.data import load_data
from capnas.norms import measure_norms
from capnas.training import TrainConfig, retrain, train


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(16, 3))


def test_each_norm_has_the_mean_moments_of_the_batches() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    x = torch.randn(24, 1, 5, 5)
    measure_norms(net, x.split(8))
    parts = [net[0](part).detach() for part in x.split(8)]
    torch.testing.assert_close(net[1].running_mean, torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([p.var((0, 2, 3), unbiased=False) for p in parts]).mean(0))
    measure_norms(net, [x])
    torch.testing.assert_close(net(x).detach().mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x).detach().var((0, 2, 3), unbiased=False), torch.ones(2), atol=1e-2, rtol=0)
    assert not net.training
    assert not any(m._forward_pre_hooks for m in net)


def test_norms_without_running_moments_are_left_out_and_others_are_summed_in_single_precision() -> None:
    net = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.BatchNorm2d(1))
    measure_norms(net, [torch.randn(8, 1, 4, 4)])
    assert net[0].running_mean is None
    x = (torch.randn(8, 1, 4, 4) + 3).bfloat16()
    measure_norms(net[1:], [x])
    torch.testing.assert_close(net[1].running_mean, x.float().mean().reshape(1))
    torch.testing.assert_close(net[1].running_var, x.float().var(unbiased=False).reshape(1))


@pytest.mark.parametrize("again", [train, retrain])
def test_after_an_epoch_of_few_updates_the_norms_are_those_of_the_weights(again: Any) -> None:
    data, net = load_data(images(), validation=0.2, test=0.2), network()
    again(net, data, TrainConfig(epochs=1, batch_size=32, device="cpu", amp="off", lr=0.05))
    split = "train" if again is train else "train+validation"
    batches = data.batches(split, 32, epoch=0, seed=0, device=torch.device("cpu"))
    expected = torch.stack([net[0](x).detach().mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(net[1].running_mean, expected)


def test_with_many_updates_the_running_averages_stay() -> None:
    data, net = load_data(images(), validation=0.2, test=0.2), network()
    train(net, data, TrainConfig(epochs=1, batch_size=4, device="cpu"))
    assert int(net[1].num_batches_tracked) >= 20
    kept = net[1].running_mean.clone()
    measure_norms(net, (x for x, _ in data.batches("train", 4, epoch=0, seed=0, device=torch.device("cpu"))))
    assert not torch.allclose(kept, net[1].running_mean)


def test_the_measured_images_are_no_rows_of_the_profile() -> None:
    data = load_data(images(), validation=0.2, test=0.2)
    result = train(network(), data, TrainConfig(epochs=1, batch_size=32, device="cpu"))
    assert result.profile is not None
    assert [layer.rows_seen for layer in result.profile.layers if layer.name == "5"] == [data.sizes["validation"]]


def test_a_norm_that_is_called_by_keyword_is_measured_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(input=x)

    net = Named()
    measure_norms(net, [torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)])
    assert (net.norm.running_mean.item(), net.norm.running_var.item()) == (2.0, 1.0)
