"""Small models and search spaces as data; each test module picks what it needs by name."""

from __future__ import annotations

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Conv, norm, in-place activation, plus the identity."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)), inplace=True)


class CalledTwice(nn.Module):
    """One module, called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.mix(x))


class Shared(nn.Module):
    """The same module under two names, and a second linear layer that borrows its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = self.first
        self.third = nn.Linear(6, 6)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(x))


class Functional(nn.Module):
    """No submodules: parameters, functional convolution and pooling, a constant made on the way, and a branch that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3, 3, 3))
        self.register_buffer("scale", torch.ones(5, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        F.conv2d(x, self.weight, padding=2)
        y = F.max_pool2d(F.conv2d(x, self.weight, stride=2) * self.scale, 2)
        return (y + torch.arange(5.0).view(5, 1, 1)).mean((2, 3))


class InPlace(nn.Module):
    """Writes through views: the readers of the base must see the writes."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(x[:, 1])
        left, right = y.chunk(2, dim=1)
        left.relu_()
        return torch.cat([right, left], dim=1) + y.view(y.shape)


class Counts(nn.Module):
    """Writes its own buffer in every pass, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(x.sum(0))
        return x * self.count


class Attention(nn.Module):
    """Self-attention by the fused function."""

    def __init__(self, width: int = 8, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)


class Raises(nn.Module):
    """Fails midway, after a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.inner = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        self.inner(self.norm(x))
        raise KeyError("midway")


def small_cnn(num_classes: int = 3, in_chans: int = 3, width: int = 4, depth: int = 1, drop: float = 0.0) -> nn.Module:
    """Stem, residual blocks, head."""
    blocks = [Residual(width) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(width, num_classes)]
    return nn.Sequential(nn.Conv2d(in_chans, width, 3, stride=2, padding=1), *blocks, *head)


def cnn_space(trial: optuna.trial.BaseTrial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    """A small residual network: depth, width, and a gate that exists only for deep ones."""
    depth = trial.suggest_int("depth", 1, 3)
    width = trial.suggest_int("width", 4, 12, step=4)
    if depth == 3 and trial.suggest_categorical("wide_stem", [False, True]) and width == 12:
        raise optuna.TrialPruned("a wide stem needs fewer than 12 channels")
    return small_cnn(num_classes, in_chans, width, depth)
