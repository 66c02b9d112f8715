"""Every propagation rule conserves capacity and equals its explicit transition matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from capnas.errors import UsageError
from capnas.measures.capacity_push import (
    attention_squared,
    average_pool_squared,
    conv_squared,
    global_mean_squared,
    inject,
    linear_squared,
    push,
    push_concat,
    push_max_pool,
    scale_squared,
)
from capnas.measures.propagation import propagate_markov

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=GENERATOR, dtype=torch.float64) + 0.01


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


OPS = {
    "linear": (linear_squared(randn(5, 7)), [(3, 7)]),
    "conv": (conv_squared(randn(6, 4, 3, 3)), [(4, 9, 8)]),
    "conv-stride-pad": (conv_squared(randn(6, 4, 3, 3), stride=2, padding=1), [(4, 9, 8)]),
    "conv-dilated": (conv_squared(randn(6, 4, 3, 3), dilation=2, padding=2), [(4, 9, 8)]),
    "conv-groups": (conv_squared(randn(6, 2, 3, 3), groups=2, padding=1), [(4, 9, 8)]),
    "conv-depthwise": (conv_squared(randn(4, 1, 5, 5), groups=4, padding=2), [(4, 9, 8)]),
    "conv-patches": (conv_squared(randn(6, 3, 4, 4), stride=4), [(3, 8, 8)]),
    "conv-1d": (conv_squared(randn(6, 4, 3), dilation=2), [(4, 9)]),
    "average-pool": (average_pool_squared(2), [(3, 8, 8)]),
    "average-pool-overlap": (average_pool_squared((3, 3), stride=2, padding=1, count_include_pad=False), [(3, 9, 9)]),
    "global-mean": (global_mean_squared(), [(3, 4, 5)]),
    "token-mean": (global_mean_squared((0,)), [(7, 5)]),
    "norm": (scale_squared(randn(4, 1, 1)), [(4, 3, 3)]),
    "residual": (lambda s, b: s + b, [(4, 3, 3), (4, 3, 3)]),
    "concat": (lambda *parts: torch.cat(parts), [(2, 3, 3), (4, 3, 3)]),
    "attention": (attention_squared(torch.softmax(randn(6, 2, 5, 5), -1)), [(2, 5, 3)]),
    "gate": (scale_squared(rand(4, 1, 1)), [(4, 3, 3)]),
}


def positive_output(name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    op, shapes = OPS[name]
    moments = [rand(*shape) for shape in shapes]
    return rand(*op(*moments).shape), moments


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_push_conserves_capacity(name: str, biased: bool) -> None:
    capacity, moments = positive_output(name)
    shares, left = push(capacity, moments, OPS[name][0], 0.3 if biased else 0.0)
    assert [share.shape for share in shares] == [moment.shape for moment in moments]
    assert all(bool((share >= 0).all()) for share in shares)
    assert sum(share.sum().item() for share in shares) + left == pytest.approx(capacity.sum().item())
    if biased:
        assert left > 1e-3
    else:
        assert abs(left) < 1e-9


@pytest.mark.parametrize("name", ["conv-stride-pad", "conv-groups", "conv-dilated", "average-pool-overlap", "attention", "linear"])
def test_push_equals_the_explicit_transition_matrix(name: str) -> None:
    op, (shape,) = OPS[name]
    capacity, (moment,) = positive_output(name)
    columns = []
    for index in range(moment.numel()):
        one = torch.zeros(moment.numel(), dtype=torch.float64)
        one[index] = 1
        columns.append(op(one.view(shape)).flatten())
    matrix = torch.stack(columns, 1)
    expected, left = propagate_markov(capacity.flatten(), matrix.sqrt(), moment.flatten(), torch.full((len(matrix),), 0.5).double())
    (share,), bias = push(capacity, [moment], op, 0.25)
    torch.testing.assert_close(share.flatten(), expected)
    assert bias == pytest.approx(left)


def test_silent_outputs_leave_their_capacity_to_the_bias() -> None:
    (share,), left = push(torch.ones(2), [torch.zeros(3)], linear_squared(torch.ones(2, 3)))
    assert share.tolist() == [0, 0, 0]
    assert left == 2
    (used, unused), left = push(torch.ones(2), [torch.ones(2), torch.ones(4)], lambda s, _: s)
    assert (used.sum().item(), unused.sum().item(), left) == (2, 0, 0)


def test_residual_split_and_concat() -> None:
    stream, branch, capacity = rand(3), rand(3), rand(3)
    (first, second), _ = push(capacity, [stream, branch], lambda s, b: s + b)
    torch.testing.assert_close(first, capacity * stream / (stream + branch))
    torch.testing.assert_close(second, capacity - first)
    left, right = push_concat(rand(5, 2), [2, 3])
    assert (left.shape, right.shape) == ((2, 2), (3, 2))


def test_max_pool_hands_capacity_to_the_selected_inputs() -> None:
    x = randn(8, 3, 7, 7)
    _, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    capacity = rand(3, 4, 4)
    share = push_max_pool(capacity, indices, (3, 7, 7))
    assert share.sum().item() == pytest.approx(capacity.sum().item())
    expected = torch.zeros(3, 49, dtype=torch.float64)
    for b in range(8):
        for c in range(3):
            for q in range(16):
                expected[c, indices[b, c].flatten()[q]] += capacity[c].flatten()[q] / 8
    torch.testing.assert_close(share.flatten(1), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_injection_places_each_weight_on_the_positions_it_reads(stride: int) -> None:
    weight, moment = randn(2, 3, 3), rand(3, 8)
    response = rand(2, 8 // stride)

    def op(s: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv1d(s.unsqueeze(0), w, stride=stride, padding=1)[0]

    found = inject(5.0, weight, response, moment, op)
    assert found.sum().item() == pytest.approx(5)
    per_weight, expected = 5.0 / weight.numel(), torch.zeros(3, 8, dtype=torch.float64)
    for o in range(2):
        for i in range(3):
            for u in range(3):
                reads = {p * stride + u - 1: float(response[o, p]) for p in range(8 // stride) if 0 <= p * stride + u - 1 < 8}
                total = sum(b * float(moment[i, q]) for q, b in reads.items())
                for q, b in reads.items():
                    expected[i, q] += per_weight * b * float(moment[i, q]) / total
    torch.testing.assert_close(found, expected)


def test_injection_skips_weights_without_signal_and_conserves() -> None:
    moment = torch.tensor([1.0, 0.0, 1.0])
    found = inject(3.0, torch.zeros(2, 3), torch.ones(2), moment, F.linear)
    assert found.tolist() == pytest.approx([1.5, 0, 1.5])
    assert inject(3.0, torch.zeros(2, 3), torch.zeros(2), moment, F.linear).tolist() == [0, 0, 0]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"output's shape \(2,\), got \(3,\)"):
        push(torch.ones(3), [torch.ones(4)], linear_squared(torch.ones(2, 4)))
    with pytest.raises(UsageError, match="3 or 4 axes"):
        conv_squared(torch.ones(2, 2))
