from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_excess import matrix_by_loops
from torch import Tensor, nn

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.excess import network as network_module
from capnas.excess.network import Limits, Operator, paper_network


def conv(size: int, stride: int = 1, pad: int = 1, dilation: int = 1, groups: int = 1, mode: str = "zeros") -> Operator:
    options = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (dilation, dilation), "groups": groups, "padding_mode": mode}
    return Operator(name="a", size=(size, size), options=options)


OPERATORS = {
    "plain": (conv(7), (6, 5, 3, 3)),
    "strided": (conv(8, stride=2), (6, 4, 3, 3)),
    "dilated": (conv(9, pad=2, dilation=2), (4, 4, 3, 3)),
    "depthwise": (conv(6, groups=6), (6, 1, 3, 3)),
    "tiny": (conv(2, stride=2), (6, 4, 3, 3)),
    "one by one": (conv(8, stride=2, pad=0), (6, 4, 1, 1)),
    "cyclic": (conv(8, stride=2, mode="circular"), (6, 4, 3, 3)),
    "uneven": (conv(7, stride=2, mode="circular"), (4, 3, 3, 3)),
    "linear": (Operator(name="a", options={}), (6, 9)),
}


def slow_norm(operator: Operator, weight: Tensor) -> float:
    """Largest singular value of the matrix, entry by entry."""
    array = weight.detach().double().numpy()
    if not operator.size:
        return float(np.linalg.svd(array, compute_uv=False)[0])
    (stride, _), (pad, _), (dilation, _) = (operator.options[k] for k in ("stride", "padding", "dilation"))
    sides = list(operator.size)
    outputs = [(d + 2 * pad - dilation * (weight.shape[2] - 1) - 1) // stride + 1 for d in sides]
    matrix = matrix_by_loops(
        array,
        sides,
        stride=stride,
        before=pad,
        outputs=outputs,
        dilation=dilation,
        groups=operator.options["groups"],
        mode=operator.options["padding_mode"],
    )
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


def slow_distance(weight: Tensor, init: Tensor) -> float:
    """The (2,1) norm of the difference by its definition."""
    difference = (weight - init).detach().double().numpy()
    groups = np.moveaxis(difference, 1, -1).reshape(-1, difference.shape[1])
    return sum(float(np.sqrt(sum(x * x for x in group))) for group in groups)


def drawn(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", OPERATORS)
def test_norm_bounds_the_padded_operator_and_not_by_much(case: str) -> None:
    operator, shape = OPERATORS[case]
    weight = drawn(shape, 1, 1.0)
    exact = slow_norm(operator, weight)
    assert exact * (1 - 1e-6) <= operator.norm(weight) <= 1.2 * exact


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("tight", ["both", "norm", "distance"])
@pytest.mark.parametrize("work", [2e8, 0.0], ids=["Dykstra", "radial"])
def test_constraints_hold_exactly_as_recomputed_by_loops(case: str, tight: str, work: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "_WORK", work)
    operator, shape = OPERATORS[case]
    init, weight = drawn(shape, 0, 0.1), drawn(shape, 1, 1.0)
    free_norm, free_distance = operator.norm(weight), slow_distance(weight, init)
    limits = Limits(norm=free_norm * (1.1 if tight == "distance" else 0.5), distance=free_distance * (1.1 if tight == "norm" else 0.5))
    start = operator.start(init, limits)
    moved = operator.constrain(weight, start, limits, sweeps=3, exact=True)
    assert slow_norm(operator, moved) <= limits.norm * (1 + 1e-6)
    assert slow_distance(moved, start) <= limits.distance * (1 + 1e-6)
    assert moved.shape == weight.shape
    used = max(operator.norm(moved) / limits.norm, slow_distance(moved, start) / limits.distance)
    assert used > 0.9, "the constraint should be met, not undercut"


def test_a_weight_within_the_limits_is_left_alone() -> None:
    operator, shape = OPERATORS["strided"]
    init, weight = drawn(shape, 0, 0.1), drawn(shape, 1, 1.0)
    limits = Limits(norm=1.01 * operator.norm(weight), distance=1.01 * slow_distance(weight, init))
    assert torch.equal(operator.constrain(weight, init, limits, sweeps=1, exact=True), weight)
    assert torch.equal(operator.start(init, limits), init)


def test_init_is_scaled_down_to_a_constraint_that_it_exceeds() -> None:
    operator, shape = OPERATORS["plain"]
    init = drawn(shape, 0, 1.0)
    start = operator.start(init, Limits(norm=0.3 * operator.norm(init), distance=1.0))
    assert slow_norm(operator, start) <= 0.3 * operator.norm(init)
    assert float(torch.nn.functional.cosine_similarity(start.flatten(), init.flatten(), dim=0)) == pytest.approx(1.0, abs=1e-6)


def test_network_of_the_class_keeps_activations_and_leaves_the_model_alone() -> None:
    held = [timm.layers.BatchNormAct2d(6), timm.layers.GroupNormAct(8, num_groups=2)]  # norm layers that hold the activations
    convs = [nn.Conv2d(3, 6, 3), held[0], nn.Conv2d(6, 8, 3), held[1]]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 5)).train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    paper = paper_network(model, in_chans=3, image_size=8, num_classes=5, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert paper.removed == ("1", "3", "6", "7")
    assert sorted(name for name, _ in paper.model.named_parameters()) == ["0.weight", "2.weight", "8.weight"]
    assert sum(isinstance(m, nn.ReLU) for m in paper.model.modules()) == 2
    again, other = (paper_network(model, in_chans=3, image_size=8, num_classes=5, seed=s) for s in (3, 4))
    first = paper.operators[0]
    assert torch.equal(paper.weight(first), again.weight(first))
    assert not torch.equal(paper.weight(first), other.weight(first))


@pytest.mark.parametrize("pad", [(1, 1), (2, 0)])
def test_cyclic_padding_is_part_of_the_layer_as_in_the_paper(pad: tuple[int, int]) -> None:
    own = nn.Conv2d(2, 4, (2 * pad[0] + 1, 2 * pad[1] + 1), padding=pad, padding_mode="circular")
    apart = nn.Sequential(nn.CircularPad2d((2, 1, 0, 1)), nn.Conv2d(4, 3, 2))
    model = nn.Sequential(own, nn.ReLU(), apart, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    paper = paper_network(model, in_chans=2, image_size=6, num_classes=2)
    for operator, layer, shape in zip(paper.operators, (paper.model[0], paper.model[2]), ((2, 6, 6), (4, 6, 6))):
        cells = shape[0] * 36
        matrix = layer.double()(torch.eye(cells, dtype=torch.float64).view(cells, *shape)).detach().reshape(cells, -1).numpy()
        assert operator.norm(paper.weight(operator)) == pytest.approx(np.linalg.svd(matrix, compute_uv=False)[0], rel=1e-9)


@pytest.mark.parametrize(("classes", "features"), [(2, 5), (3, 3), (4, 11), (10, 9)])
def test_fixed_classifier_is_a_simplex_that_features_of_either_kind_reach(classes: int, features: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, features, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))
    paper = paper_network(model, in_chans=1, image_size=6, num_classes=classes)
    rows = paper.weight(paper.operators[-1]).detach().double()
    expected = np.full((classes, classes), -1 / (classes - 1))
    np.fill_diagonal(expected, 1.0)
    assert np.allclose((rows @ rows.T).numpy(), expected, atol=1e-6)
    assert not paper.weight(paper.operators[-1]).requires_grad
    assert [o.fixed for o in paper.operators] == [False, True]
    if features >= classes:
        reached = rows.clamp_min(0) @ rows.T  # what is not negative of each vertex, as a feature vector
        assert reached.argmax(1).tolist() == list(range(classes))


@pytest.mark.parametrize(
    ("model", "classes", "what"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, "classifier of 3 outputs"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9)), 9, "at least 2 classes and 8 features"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3)), 3, "module 1 computes aten.sigmoid"),
        (nn.Sequential(nn.Conv2d(1, 4, 7), nn.Flatten(), nn.Linear(4, 3)), 3, "cannot run at 6 px: .*; give another image size"),
    ],
)
def test_networks_outside_of_the_class_are_refused(model: nn.Module, classes: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        paper_network(model, in_chans=1, image_size=6, num_classes=classes)


@pytest.mark.parametrize(
    ("name", "what"),
    [("vit_tiny_patch16_224", "attention or a gate"), ("convnext_atto", "learned scale")],
)
def test_timm_models_that_the_theory_cannot_take_are_refused_by_module(name: str, what: str) -> None:
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))
    with pytest.raises(UsageError, match=rf"module \S+ computes .*{what}.*Try a plain or residual CNN"):
        paper_network(model, in_chans=3, image_size=32, num_classes=4)
