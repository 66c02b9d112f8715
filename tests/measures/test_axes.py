from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capnas.measures.axes import (
    CHANNEL,
    Atom,
    Layout,
    broadcast,
    channels,
    entries,
    holds,
    input_layout,
    reach,
    rearrange,
    reshape,
    resize,
    slide,
    spacing,
    unknown,
)
from capnas.measures.receptive import Field, window

FIELDS = (Field(jump=2.0), Field(jump=2.0))


def positions(layout: Layout, image_axis: int) -> np.ndarray:
    """Witness: the image position that each entry of a tensor with this layout must hold."""
    flat = np.zeros(1)
    for atom in (a for axis in layout for a in axis):
        step = np.arange(atom.size) * (atom.step if image_axis in atom.axes else 0.0)
        flat = (flat[:, None] + step[None, :]).reshape(-1)
    return flat


windows = st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 3]), st.sampled_from([2, 3]), st.booleans())


@settings(max_examples=30, deadline=None)
@given(windows)
def test_layouts_hold_the_positions_that_the_same_views_of_an_image_hold(case: tuple[int, int, int, bool]) -> None:
    window, rows, columns, grid = case
    height, width = window * rows, window * columns
    layout = input_layout((1, 3, height, width))
    image = np.broadcast_to(np.arange(height)[:, None], (1, 3, height, width))
    outer, inner = ((window, rows), (window, columns)) if grid else ((rows, window), (columns, window))
    steps = [
        ("view", {}, (1, 3, *outer, *inner)),
        ("permute", {"dims": (0, 2, 4, 3, 5, 1)}, None),
        ("reshape", {}, (outer[0] * inner[0], outer[1] * inner[1], 3)),
    ]
    for op, attrs, shape in steps:
        image = image.transpose(attrs["dims"]) if op == "permute" else image.reshape(shape)
        after = rearrange(op, attrs, layout, image.shape)
        assert after is not None
        layout = after
        assert tuple(map(entries, layout)) == image.shape
        assert positions(layout, 0).tolist() == image.reshape(-1).tolist()


def test_windows_come_back_together() -> None:
    image = input_layout((2, 5, 8, 12))
    parts = reshape(image, (2, 5, 2, 4, 3, 4))
    assert [tuple(a.size for a in axis) for axis in parts] == [(2,), (5,), (2,), (4,), (3,), (4,)]
    assert reshape(parts, (2, 5, 8, 12)) == image


def test_maps_of_one_pixel_keep_their_axes() -> None:
    one = input_layout((1, 8, 1, 1))
    flat = reshape(one, (1, 8))
    assert holds(flat, 0)
    assert holds(flat, 1)
    assert [f.high for f in reach(FIELDS, flat, flat[1])] == [math.inf, math.inf]
    assert channels(flat) == 8


def test_reach_over_part_and_whole() -> None:
    tokens = reshape(input_layout((1, 3, 8, 8)), (1, 3, 64))
    assert [f.high for f in reach(FIELDS, tokens, tokens[2])] == [math.inf, math.inf]
    assert reach(FIELDS, tokens, tokens[1]) == FIELDS
    windowed = reshape(input_layout((1, 3, 8, 8)), (1, 3, 2, 4, 2, 4))
    assert [f.high for f in reach(FIELDS, windowed, (*windowed[3], *windowed[5]))] == [7.0, 7.0]
    assert [f.high for f in reach(FIELDS, windowed, (*windowed[2], *windowed[4]))] == [9.0, 9.0]  # a grid: two units four apart


def test_factors_with_a_gap_between_them_stay_apart() -> None:
    cut = (Atom(axes=(0,), size=2, step=4.0), Atom(axes=(0,), size=3))  # three of every four
    assert reshape((cut[:1], cut[1:]), (6,)) == (cut,)


def test_factors_of_one_entry_say_nothing() -> None:
    axis = (Atom(axes=(0,), size=1), Atom(axes=(1,), size=8, step=2.0))
    assert resize(axis, 4) == (Atom(axes=(1,), size=4, step=2.0),)
    assert spacing((Atom(axes=(0,), size=2, step=4.0), Atom(axes=(0,), size=1)), 0) == 4.0


def test_of_two_operands_the_clearer_one_counts() -> None:
    clear = input_layout((2, 3, 4, 4))
    for pair in ([clear, unknown([clear], (2, 3, 4, 4))], [unknown([clear], (2, 3, 4, 4)), clear]):
        assert broadcast(pair, (2, 3, 4, 4)) == clear


def test_class_tokens_and_uneven_views_blur_the_axes() -> None:
    tokens = reshape(input_layout((1, 3, 4, 4)), (1, 3, 16))
    with_class = resize(tokens[2], 17)
    assert with_class == (Atom(axes=(0, 1), size=17),)
    assert [f.high for f in reach(FIELDS, (with_class,), with_class)] == [math.inf, math.inf]
    uneven = reshape(input_layout((1, 3, 4, 5)), (4, 15))
    assert tuple(map(entries, uneven)) == (4, 15)
    assert uneven[1][0].axes == (-2, -1, 0, 1)


def test_strided_slices_and_broadcasts() -> None:
    layout = input_layout((1, 3, 8, 8))
    sliced = rearrange("slice", {"dim": 2, "start": 1, "step": 2}, layout, (1, 3, 4, 8))
    assert sliced is not None
    assert sliced[2] == (Atom(axes=(0,), size=4, step=2.0),)
    assert broadcast([input_layout((1, 3, 1, 1)), layout], (1, 3, 8, 8)) == layout
    assert broadcast([layout], (1, 3, 9, 9)) == unknown([layout], (1, 3, 9, 9))
    assert rearrange("unbind", {"dim": -1}, layout, (1, 3, 8)) == layout[:-1]
    expanded = rearrange("expand", {}, input_layout((1, 3)), (5, 1, 3))
    assert expanded is not None
    assert tuple(map(entries, expanded)) == (5, 1, 3)
    assert rearrange("relu", {}, layout, (1, 3, 8, 8)) is None


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3), (1, 1, 7), (3, 1, 2, 1, 5)])
def test_a_view_to_the_same_shape_changes_nothing(shape: tuple[int, ...]) -> None:
    assert tuple(map(entries, reshape(input_layout(shape), shape))) == shape
    assert reshape(reshape(input_layout(shape), (math.prod(shape),)), shape)[0][0].size == shape[0]


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [((3, 2), (3, 2), (1, 1)), ((2, 3), (1, 2), (2, 1)), ((1, 4), (2, 1), (1, 2))])
def test_patches_hold_the_positions_that_torch_unfolds(kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    rows = torch.arange(9.0)[:, None].expand(1, 2, 9, 8)
    patches = nn.functional.unfold(rows, kernel, dilation, 0, stride)
    attrs = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": (0, 0)}
    layout = rearrange("im2col", attrs, input_layout((1, 2, 9, 8)), patches.shape)
    assert layout is not None
    assert tuple(map(entries, layout)) == patches.shape
    assert positions(layout, 0).tolist() == patches.flatten().tolist()


def test_padded_patches_have_as_many_windows_as_torch_has() -> None:
    shape = nn.functional.unfold(torch.zeros(1, 2, 9, 8), 3, padding=1, stride=2).shape
    attrs = {"kernel_size": (3, 3), "stride": (2, 2), "dilation": (1, 1), "padding": (1, 1)}
    layout = rearrange("im2col", attrs, input_layout((1, 2, 9, 8)), shape)
    assert layout is not None
    assert tuple(map(entries, layout)) == shape
    tokens = input_layout((1, 2, 9, 8))
    flat = (*tokens[:2], (*tokens[2], *tokens[3]), ())  # an axis that holds both cannot be unfolded
    assert rearrange("im2col", attrs, flat, shape) == unknown([flat], shape)


@pytest.mark.parametrize("image_axis", [0, 1])
def test_pixels_and_channels_change_places_as_in_torch(image_axis: int) -> None:
    index = torch.arange(6.0).view((6, 1) if image_axis == 0 else (1, 6)).expand(1, 3, 6, 6)
    layout = input_layout((1, 3, 6, 6))
    channels_of = rearrange("pixel_unshuffle", {"downscale_factor": 3}, layout, (1, 27, 2, 2))
    assert channels_of is not None
    assert positions(channels_of, image_axis).tolist() == nn.functional.pixel_unshuffle(index, 3).flatten().tolist()
    assert rearrange("pixel_shuffle", {"upscale_factor": 3}, channels_of, (1, 3, 6, 6)) == layout
    finer = rearrange("pixel_shuffle", {"upscale_factor": 2}, input_layout((1, 4, 6, 6)), (1, 1, 12, 12))
    assert finer is not None
    enlarged = nn.functional.pixel_shuffle(index[:, :1].repeat(1, 4, 1, 1), 2)
    assert np.floor(positions(finer, image_axis)).tolist() == enlarged.flatten().tolist()


def test_steps_of_the_other_axes_are_counted_in_the_new_jump() -> None:
    unshuffled = rearrange("pixel_unshuffle", {"downscale_factor": 2}, input_layout((1, 1, 8, 8)), (1, 4, 4, 4))
    assert unshuffled is not None
    layout, fields, _ = slide(unshuffled, (Field(), Field()), (2, 2), lambda f, i: (window(f, 1, 2), 1.0))
    assert [f.jump for f in fields] == [4.0, 4.0]
    assert [f.high for f in reach(fields, layout, layout[1])] == [2.0, 2.0]  # the two pixels of a channel's offset


def test_a_strided_axis_keeps_its_steps_in_windows() -> None:
    (outer,), (inner,) = reshape(((Atom(axes=(0,), size=8, step=2.0),),), (2, 4))
    assert (outer.size, outer.step, inner.size, inner.step) == (2, 8.0, 4, 2.0)


def test_a_part_of_what_may_lie_along_either_axis_reaches_everywhere() -> None:
    blurred = unknown([((Atom(axes=(0,), size=4), Atom(axes=(1,), size=4)),)], (4, 4))
    assert [f.high for f in reach(FIELDS, blurred, blurred[0])] == [math.inf, math.inf]


def three(field: Field, number: int) -> tuple[Field, float]:
    return window(field, 3), 3.0


def test_a_window_over_what_holds_both_image_axes_widens_both() -> None:
    tokens = reshape(input_layout((1, 2, 4, 4)), (1, 2, 16))
    layout, fields, extent = slide(tokens, (Field(), Field()), (14,), three)
    assert [f.high for f in fields] == [3.0, 3.0]
    assert (extent, layout[2]) == ((3.0, 3.0), (Atom(axes=(0, 1), size=14),))


def test_a_window_over_an_axis_that_may_hold_channels_leaves_the_other_image_axis() -> None:
    mixed = ((Atom(axes=(CHANNEL, 0), size=12),), (Atom(axes=(1,), size=4),))
    layout, fields, extent = slide(mixed[::-1], (Field(), Field()), (10,), three)
    assert [f.high for f in fields] == [3.0, 1.0]
    assert (extent, layout[1]) == ((3.0, 1.0), (Atom(axes=(0,), size=10),))


def test_a_window_over_channels_leaves_channels() -> None:
    layout, fields, _ = slide(rearranged := input_layout((2, 8))[::-1], (), (2,), three)
    assert (layout, fields) == (rearranged, ())
    pooled, _, _ = slide(input_layout((2, 8)), (), (4,), three)
    assert channels(pooled) == 4
    folded = ((*input_layout((2, 3))[0], *input_layout((2, 3))[1]),)
    assert channels(slide(folded, (), (6,), three)[0]) == 3


def test_a_transposed_matrix_changes_its_axes() -> None:
    layout = input_layout((2, 3))
    assert rearrange("t", {}, layout, (3, 2)) == layout[::-1]


def test_repeated_maps_lie_one_behind_the_other() -> None:
    rows = torch.arange(4.0)[:, None].expand(1, 2, 4, 4)
    layout = rearrange("repeat", {}, input_layout((1, 2, 4, 4)), (1, 2, 8, 4))
    assert layout is not None
    assert positions(layout, 0).tolist() == rows.repeat(1, 1, 2, 1).flatten().tolist()


def test_a_strided_view_of_another_shape_is_not_followed() -> None:
    layout = input_layout((1, 3, 8, 8))
    assert rearrange("as_strided", {}, layout, (1, 3, 8, 8)) == layout
    assert rearrange("as_strided", {}, layout, (1, 3, 4, 8)) is None
