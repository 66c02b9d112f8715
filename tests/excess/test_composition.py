from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas.errors import UsageError
from capnas.excess.composition import Stage, Step, blocks, composition, from_json, to_json
from capnas.graph.tracing import trace
from capnas.measures.excess import Block, WeightLayer, capacity_bounds


class Called(nn.Module):
    """Modules a and b, combined by a function given."""

    def __init__(self, forward: Callable[[Called, Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b = nn.Conv2d(channels, channels, 1, bias=False)
        self.c = nn.Conv2d(channels, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def stages_of(model: nn.Module, shape: tuple[int, ...] = (1, 4, 6, 6)) -> tuple[Stage, ...]:
    return composition(trace(model, shape))


def behind(model: nn.Module, y: Tensor) -> Tensor:
    return model.b(F.relu(model.a(y))) + y


def layer(name: str) -> Step:
    return Step(layer=name)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.b(F.relu(m.a(x))), (Stage(branches=((layer("a"),),)), Stage(branches=((layer("b"),),)))),
        (lambda m, x: F.relu(x + m.b(F.relu(m.a(x)))), (Stage(branches=((), (layer("a"), layer("b")))),)),
        (lambda m, x: behind(m, F.relu(m.c(x))), (Stage(branches=((layer("c"),),)), Stage(branches=((layer("a"), layer("b")), ())))),
        (lambda m, x: m.a(x).add_(m.b(x)).relu_(), (Stage(branches=((layer("a"),), (layer("b"),))),)),
        (lambda m, x: (m.a(x) + m.b(x)) + (x + m.c(x)), (Stage(branches=((layer("a"),), (layer("b"),), (), (layer("c"),))),)),
        (lambda m, x: torch.cat([m.a(x), x, 0.5 * m.b(x)], 1),
         (Stage(branches=((layer("a"),), (), (layer("b"), Step(constant=0.5))), join="concat"),)),
        (lambda m, x: m.b(F.max_pool2d(F.gelu(m.a(x)), 3, 2)),
         (Stage(branches=((layer("a"),),)), Stage(branches=((Step(constant=1.129),),)), Stage(branches=((Step(constant=2.0),),)),
          Stage(branches=((layer("b"),),)))),
    ],
    ids=["plain", "identity shortcut", "behind a layer", "trained branches in place", "a sum of sums", "concatenation", "constants"],
)  # fmt: skip
def test_structure_of_small_networks(forward: Callable[..., Tensor], expected: tuple[Stage, ...]) -> None:
    found = stages_of(Called(forward))
    assert found == expected
    assert from_json(to_json(found)) == found


def test_bounds_of_a_residual_network_are_those_of_its_blocks_by_hand() -> None:
    found = stages_of(Called(lambda m, x: m.c(F.avg_pool2d(x + F.relu(m.b(F.relu(m.a(x)))), 2))))
    constants = {
        n: WeightLayer(norm=s, distance=b, weights=w) for n, s, b, w in (("a", 1.5, 2.0, 144), ("b", 0.7, 3.0, 16), ("c", 2.0, 1.0, 16))
    }
    by_hand = (
        Block(branches=((constants["a"], constants["b"]),), shortcut=1.0),
        Block(branches=((WeightLayer(norm=0.5),),)),
        Block(branches=((constants["c"],),)),
    )
    sample = {"data_norm": 50.0, "samples": 100, "margin": 2.0}
    ours, theirs = capacity_bounds(blocks(found, constants), **sample), capacity_bounds(by_hand, **sample)
    assert (ours.club, ours.spade, *ours.constants) == pytest.approx((theirs.club, theirs.spade, *theirs.constants), rel=1e-12)
    assert 10**ours.lipschitz == pytest.approx((1 + 1.5 * 0.7) * 0.5 * 2)


def test_maps_without_weights_side_by_side_add_up_in_squares() -> None:
    found = stages_of(Called(lambda m, x: m.b(torch.cat([x[:, :2], F.relu(x[:, 2:])], 1))))
    assert blocks(found[:1], {})[0].branches[0][0].norm == pytest.approx(math.sqrt(2))


def test_no_pair_of_images_moves_further_than_the_product_of_constants() -> None:
    model = Called(lambda m, x: F.adaptive_avg_pool2d(torch.cat([m.b(F.silu(m.a(x))), F.max_pool2d(x, 3, 1, 1)], 1), 3).flatten(1)).double()
    shape = (1, 4, 6, 6)
    norms = {}
    for name in ("a", "b"):
        module = model.get_submodule(name)
        columns = module(torch.eye(144, dtype=torch.float64).reshape(144, 4, 6, 6)).reshape(144, -1).detach().numpy()
        norms[name] = WeightLayer(norm=float(np.linalg.norm(columns, 2)), distance=1.0, weights=9)
    bound = 10 ** capacity_bounds(blocks(stages_of(model, shape), norms), data_norm=1.0, samples=1, margin=1.0).lipschitz
    generator = torch.Generator().manual_seed(0)
    steepest = 0.0
    for scale in (0.01, 1.0, 100.0):
        x = scale * torch.randn(50, 4, 6, 6, generator=generator, dtype=torch.float64)
        step = torch.randn(50, 4, 6, 6, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            moved = (model(x + step) - model(x)).flatten(1).norm(dim=1) / step.flatten(1).norm(dim=1)
        steepest = max(steepest, float(moved.max()))
    assert 0.05 * bound < steepest <= bound


@pytest.mark.parametrize(
    "pool",
    [lambda x: F.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
     lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True), lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
     lambda x: F.adaptive_avg_pool2d(x, 9), lambda x: x.mean((2, 3), keepdim=True), lambda x: x / 4,
     lambda x: F.pad(x, (1, -1)) / 2],
    ids=["pairs", "overlapping", "padding left out", "ceil", "global", "uneven", "upward", "mean", "scaled", "moved"],
)  # fmt: skip
def test_constants_of_linear_maps_are_their_operator_norms(pool: Callable[[Tensor], Tensor]) -> None:
    found = stages_of(Called(lambda m, x: m.b(pool(x)), channels=1), (1, 1, 7, 7))
    matrix = pool(torch.eye(49, dtype=torch.float64).reshape(49, 1, 7, 7)).reshape(49, -1).numpy()
    assert found[0].branches[0][0].constant == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)


def test_a_network_whose_maps_have_their_channels_last_is_composed_alike() -> None:
    first, last = (
        stages_of(Called(lambda m, x, kept=kept: m.b(F.adaptive_avg_pool2d(m.a(x).contiguous(memory_format=kept), 1))))
        for kept in (torch.contiguous_format, torch.channels_last)
    )
    assert first == last


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.mish,
        F.elu,
        F.selu,
        F.celu,
        torch.tanh,
        F.relu6,
        lambda x: F.hardtanh(x, -2, 0),
        lambda x: F.elu(x, 2.5),
        lambda x: F.leaky_relu(x, 1.5),
        lambda x: F.leaky_relu(x, 0.1),
    ],
)
def test_constants_of_activations_are_their_steepest_slopes(activation: Callable[[Tensor], Tensor]) -> None:
    found = stages_of(Called(lambda m, x: m.b(activation(x))))
    constant = math.prod(step.constant for stage in found for step in stage.branches[0])
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64, requires_grad=True)
    values = activation(x)
    values.sum().backward()
    assert x.grad is not None
    steepest = float(x.grad.abs().max())
    assert steepest <= constant <= 1.001 * steepest
    assert float(activation(torch.zeros(1))) == 0


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        (lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), "product of two feature maps"),
        (lambda m, x: m.a(x) * m.scale, "learned scale"),
        (lambda m, x: m.a(x) + m.scale, "shift"),
        (lambda m, x: torch.add(x, m.b(x), alpha=3), r"aten\.add"),
        (lambda m, x: m.a(F.pad(x, (1, 1), value=1.0)), r"aten\.constant_pad_nd"),
        (lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True), r"aten\.add"),  # each value counts at many places
        (lambda m, x: torch.sigmoid(m.a(x)), "aten.sigmoid"),
        (lambda m, x: F.conv2d(x, m.a.weight * 2, padding=1), "weight that is computed"),
        (lambda m, x: F.conv2d(x, m.a.weight, m.scale.flatten()), "layer with a bias"),
        (lambda m, x: F.group_norm(m.a(x), 2), "norm layer"),
        (lambda m, x: F.hardtanh(m.a(x), 0.5, 1), "hardtanh"),
        (lambda m, x: torch.div(m.a(x), 2, rounding_mode="floor"), "rounded"),
        (lambda m, x: m.a(m.a(x)), "layers that are used once; a is used 2"),
        (lambda m, x: x + m.b(x + m.a(x)), "branches within branches"),
        (lambda m, x: F.relu(x), "weight layers; this one has none"),
        (lambda m, x: (m.a(x), m.b(x)), "one output"),
        (lambda m, x: m.a(x).repeat(1, 2, 1, 1), "aten.repeat"),
    ],
)  # fmt: skip
def test_what_the_theorem_does_not_cover_is_refused_by_name(forward: Callable[..., Tensor], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        stages_of(Called(forward))
