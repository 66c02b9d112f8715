from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_excess import drawn, matrix_by_loops

from capnas.errors import UsageError
from capnas.measures.convolution import Convolution, convolution

CASES = {
    "plain": ((4, 3, 3, 3), 6, {"padding": 1}),
    "strided": ((4, 3, 3, 3), 7, {"padding": 1, "stride": 2}),
    "dilated": ((2, 2, 3, 3), 7, {"padding": 2, "dilation": 2}),
    "strided and dilated": ((2, 2, 3, 3), 8, {"padding": 1, "dilation": 2, "stride": 3}),
    "grouped": ((4, 2, 3, 3), 5, {"padding": 1, "groups": 2}),
    "depthwise": ((4, 1, 3, 3), 5, {"padding": 1, "groups": 4}),
    "even kernel": ((2, 3, 2, 2), 5, {"stride": 2}),
    "no padding": ((3, 2, 3, 3), 5, {}),
    "oblong": ((2, 2, 1, 3), (4, 6), {"padding": (0, 1), "stride": (2, 1)}),
    "circular": ((4, 3, 3, 3), 6, {"padding": 1, "padding_mode": "circular"}),
    "circular strided odd": ((4, 3, 3, 3), 7, {"padding": 1, "stride": 2, "padding_mode": "circular"}),
    "reflect": ((2, 2, 3, 3), 5, {"padding": 1, "padding_mode": "reflect"}),
    "replicate": ((2, 2, 3, 3), 4, {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    "side 1": ((3, 2, 3, 3), 1, {"padding": 1}),
    "side 2": ((3, 2, 3, 3), 2, {"padding": 1}),
    "sequence": ((3, 2, 4), 9, {"padding": 2, "stride": 2}),
    "volume": ((2, 2, 2, 3, 1), (3, 3, 2), {"padding": (1, 1, 0)}),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> tuple[torch.Tensor, object, dict, Convolution]:
    shape, size, options = CASES[request.param]
    weight = drawn(list(shape), 5)
    return weight, size, options, convolution(weight, size, **options)


def by_torch(weight: torch.Tensor, x: torch.Tensor, options: dict) -> torch.Tensor:
    options = dict(options)
    mode = options.pop("padding_mode", "zeros")
    axes = weight.dim() - 2
    layer = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[axes - 1]
    groups = options.get("groups", 1)
    conv = layer(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), bias=False, padding_mode=mode, dtype=torch.float64, **options
    )
    conv.weight.data = weight
    return conv(x).detach()


def test_forward_is_torchs(case) -> None:
    weight, _, options, conv = case
    x = torch.randn(2, *conv.input_shape, dtype=torch.float64)
    torch.testing.assert_close(conv.forward(x), by_torch(weight, x, options))


def test_adjoint_is_the_transpose(case) -> None:
    *_, conv = case
    x, y = torch.randn(3, *conv.input_shape, dtype=torch.float64), torch.randn(3, *conv.output_shape, dtype=torch.float64)
    assert conv.adjoint(y).shape == x.shape
    torch.testing.assert_close((conv.forward(x) * y).sum(), (x * conv.adjoint(y)).sum())


def test_matrix_acts_as_torch_on_basis_vectors(case) -> None:
    weight, _, options, conv = case
    columns = by_torch(weight, torch.eye(int(np.prod(conv.input_shape)), dtype=torch.float64).unflatten(1, conv.input_shape), options)
    blocks = torch.block_diag(*conv.matrix())
    torch.testing.assert_close(blocks, columns.flatten(1).T)


@pytest.mark.parametrize(("k", "d", "stride"), [(3, 5, 1), (5, 3, 1), (4, 2, 1), (3, 1, 1), (3, 6, 2), (5, 2, 2)])
def test_matrix_follows_the_definition_also_when_the_kernel_wraps_the_image_several_times(k: int, d: int, stride: int) -> None:
    weight = drawn([2, 2, k, k], 3)
    conv = convolution(weight, d, stride=stride, padding=k // 2, padding_mode="circular")
    outputs = list(conv.output_shape[1:])
    dense = matrix_by_loops(weight.numpy(), [d, d], stride=stride, before=k // 2, outputs=outputs, dilation=1, groups=1, mode="circular")
    np.testing.assert_allclose(conv.matrix()[0].numpy(), dense, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation", "groups"),
    [
        ((3, 2, 3, 3), 6, 1, 1, 1),
        ((3, 2, 3, 3), 6, 2, 1, 1),
        ((4, 2, 3, 3), (6, 9), 3, 2, 2),
        ((2, 2, 5), 4, 2, 1, 1),
        ((2, 1, 3, 2, 2), 4, 2, 1, 2),
        ((2, 3, 4, 4), 2, 1, 1, 1),
    ],
)
def test_fourier_blocks_hold_the_singular_values_of_the_matrix(shape, size, stride, dilation, groups) -> None:
    weight = drawn(list(shape), 7)
    conv = convolution(weight, size, stride=stride, dilation=dilation, groups=groups, padding="same", padding_mode="circular")
    assert all(axis.periodic for axis in conv.axes)
    exact = torch.linalg.svdvals(conv.matrix()).flatten()
    values = torch.linalg.svdvals(conv.fourier_blocks()).flatten()
    distance = (values[:, None] - exact[None, :]).abs()
    assert distance.min(dim=1).values.max() < 1e-12, "every Fourier value is one of the matrix"
    assert distance.min(dim=0).values.max() < 1e-12, "and conjugate frequencies aside none is lost"


def test_same_padding_keeps_the_side_and_pairs_pad_each_side_on_its_own() -> None:
    weight = drawn([1, 1, 4, 4], 2)
    x = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    same = convolution(weight, 5, padding="same")
    torch.testing.assert_close(same.forward(x), F.conv2d(F.pad(x, (1, 2, 1, 2)), weight))
    pairs = convolution(weight, 5, padding=((1, 2), (1, 2)))
    torch.testing.assert_close(pairs.forward(x), same.forward(x))
    assert convolution(weight, 5, padding="same", stride=2).output_shape == (1, 3, 3)
    assert convolution(weight, 5, padding="valid").output_shape == (1, 2, 2)


def test_axes_count_how_often_cells_are_read() -> None:
    axis = convolution(torch.ones(1, 1, 3), 8, stride=2, padding=1).axes[0]
    assert (axis.readers, axis.terms, axis.disjoint, axis.periodic) == (2, 3, False, False)
    assert convolution(torch.ones(1, 1, 2), 8, stride=2).axes[0].disjoint
    assert not convolution(torch.ones(1, 1, 2), 8, stride=2, padding=(2,), padding_mode="reflect").axes[0].disjoint
    assert not convolution(torch.ones(1, 1, 3), 1, stride=3, padding=1).axes[0].disjoint, "no tap but one ever sees a cell"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(2, 2)}, "non-empty with 3 to 5 dimensions"),
        ({"weight": torch.ones(0, 2, 3)}, "non-empty with 3 to 5 dimensions"),
        ({"groups": 3}, "groups must divide the 4 output channels; got 3"),
        ({"padding_mode": "zero"}, "Did you mean 'zeros'"),
        ({"padding": "sam"}, "Did you mean 'same'"),
        ({"padding": -1}, "none negative; got -1"),
        ({"padding": (1, 1, 1)}, "one number or pair per axis"),
        ({"stride": 0}, "stride must be a positive number"),
        ({"dilation": (1, 2, 3)}, "dilation must be a positive number or one per axis"),
        ({"input_size": 2}, "3 taps, 1 apart, do not fit the padded input of 2 cells"),
        ({"input_size": 2, "padding": 2, "padding_mode": "reflect"}, "reflect padding must be smaller than the input side 2"),
    ],
)
def test_unusable_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        convolution(**{"weight": torch.ones(4, 2, 3, 3), "input_size": 5, **arguments})
