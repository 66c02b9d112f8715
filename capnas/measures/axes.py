"""Which positions of the image each axis of a tensor holds, followed through views, permutations and cuts.

Tokens, windows, channels-last maps and flattened maps all hold the image in other axes than (B, C, H, W) does. A `Layout` gives, for each
axis of a tensor, its factors from the slowest to the fastest: batch, channel, or a stride of one image axis. A reduction or a matrix
product over an axis then tells how far it reaches in the image, which is all that the receptive field needs to know. Ours, no paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capnas.measures.receptive import Field, whole

BATCH = -2
CHANNEL = -1
_VIEW = re.compile("_?(unsafe_)?view(_as)?|_?reshape(_alias)?|(un)?flatten|(un)?squeeze")
_SAME = re.compile("roll|flip|clone|contiguous|_to_copy|alias|detach|lift_fresh(_copy)?|as_strided")
_CUT = re.compile("slice|narrow|(unsafe_)?split(_with_sizes)?|chunk|constant_pad_nd|_pad_circular|(reflection|replication)_pad[123]d")


@dataclass(frozen=True, kw_only=True)
class Atom:
    """One factor of an axis.

    Attributes:
        axes: image axes (0, 1, ...), `CHANNEL` or `BATCH`; several where they can no longer be told apart, none for a repeated value.
        size: number of entries.
        step: distance between neighbours, in units of the axis' jump.
    """

    axes: tuple[int, ...]
    size: int
    step: float = 1.0


Axis = tuple[Atom, ...]
Layout = tuple[Axis, ...]


def input_layout(shape: Sequence[int]) -> Layout:
    """Layout of a model input (B, C, image axes...).

    >>> [a.axes for (a,) in input_layout((2, 3, 32, 32))]
    [(-2,), (-1,), (0,), (1,)]
    """
    return tuple((Atom(axes=(i - 2,), size=n),) for i, n in enumerate(shape))


def entries(axis: Axis) -> int:
    """Number of entries of an axis.

    >>> entries(())
    1
    """
    return math.prod(a.size for a in axis)


def channels(layout: Layout) -> int:
    """Number of channels that a layout holds, over all its axes (1 if none).

    >>> channels(reshape(input_layout((1, 12, 4, 4)), (1, 3, 4, 16)))
    12
    """
    return math.prod(a.size for axis in layout for a in axis if CHANNEL in a.axes)


def holds(layout: Layout, image_axis: int) -> bool:
    """Whether some factor lies along the image axis (after global pooling none does).

    >>> holds(input_layout((1, 3, 8, 8)), 1)
    True
    """
    return any(image_axis in a.axes for axis in layout for a in axis)


def reshape(layout: Layout, shape: Sequence[int]) -> Layout:
    """Layout after a view, squeeze, unsqueeze or flatten to ``shape`` of as many entries.

    >>> windows = reshape(input_layout((1, 3, 8, 8)), (1, 3, 2, 4, 8))
    >>> [(a.size, a.step) for axis in windows[2:4] for a in axis]
    [(2, 4.0), (4, 1.0)]
    >>> reshape(windows, (1, 3, 8, 8)) == input_layout((1, 3, 8, 8))
    True
    """
    rest: list[Atom] = []
    for atom in (a for axis in layout for a in axis):
        outer = rest[-1] if rest else None
        if outer is not None and outer.axes == atom.axes and outer.step == atom.size * atom.step:
            rest[-1] = replace(atom, size=outer.size * atom.size)  # windows put together again
        else:
            rest.append(atom)
    result: list[Axis] = []
    for size in shape:
        axis: list[Atom] = []
        missing = size
        while missing > 1 and rest:
            atom = rest.pop(0)
            if missing % atom.size == 0:
                axis.append(atom)
                missing //= atom.size
            elif atom.size % missing == 0:
                inner = atom.size // missing
                axis.append(replace(atom, size=missing, step=atom.step * inner))
                rest.insert(0, replace(atom, size=inner))
                missing = 1
            else:
                return _blurred([*axis, atom, *rest], result, shape)
        if size == 1 and rest and rest[0].size == 1:
            axis.append(rest.pop(0))
        result.append(tuple(axis))
    if result and rest:
        result[-1] += tuple(rest)
    return tuple(result)


def _blurred(atoms: list[Atom], done: list[Axis], shape: Sequence[int]) -> Layout:
    axes = tuple(sorted({i for a in atoms for i in a.axes}))
    return (*done, *((Atom(axes=axes, size=n),) for n in shape[len(done) :]))


def unknown(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Layout after an operation that is not understood: every axis may hold anything.

    >>> unknown([input_layout((1, 3, 8, 8))], (5,))[0][0].axes
    (-2, -1, 0, 1)
    """
    return _blurred([a for layout in layouts for axis in layout for a in axis], [], shape)


def resize(axis: Axis, size: int, step: int = 1) -> Axis:
    """An axis after a cut, a padding or a concatenation along it.

    >>> resize((Atom(axes=(0,), size=8),), 4, step=2)
    (Atom(axes=(0,), size=4, step=2.0),)
    """
    if entries(axis) == size:
        return axis
    real = [a for a in axis if a.size > 1] or list(axis)
    if len(real) == 1:
        return (replace(real[0], size=size, step=real[0].step * step),)
    return (Atom(axes=tuple(sorted({i for a in axis for i in a.axes})), size=size),)


def cut(layout: Layout, shape: Sequence[int]) -> Layout:
    """Layout of a part of a tensor: `resize` along every axis, `unknown` for another number of axes.

    >>> [axis[0].size for axis in cut(input_layout((1, 4, 8, 8)), (1, 2, 8, 8))]
    [1, 2, 8, 8]
    """
    return tuple(map(resize, layout, shape)) if len(layout) == len(shape) else unknown([layout], shape)


def broadcast(layouts: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """Layout of an element-wise operation: for each axis that of the operand of full size that tells most; `unknown` if one does not fit.

    >>> broadcast([(), input_layout((1, 3, 8, 8))], (1, 3, 8, 8)) == input_layout((1, 3, 8, 8))
    True
    """
    if any(entries(axis) not in (1, n) for layout in layouts for axis, n in zip(reversed(layout), reversed(shape))):
        return unknown(layouts, shape)
    result: list[Axis] = []
    for back, size in zip(range(len(shape), 0, -1), shape):
        found = [layout[-back] for layout in layouts if back <= len(layout) and entries(layout[-back]) == size]
        result.append(max(found, key=lambda axis: sum(len(a.axes) == 1 for a in axis), default=(Atom(axes=(), size=size),)))
    return tuple(result)


def reach(fields: Sequence[Field], layout: Layout, reduced: Axis) -> tuple[Field, ...]:
    """Fields after an operation that mixes all entries of ``reduced`` (factors of ``layout``): a mean, a matrix product, attention.

    A part of an image axis widens the field by its span; all of it, or an axis that cannot be told apart, makes the field infinite.

    >>> tokens = reshape(input_layout((1, 3, 8, 8)), (1, 3, 2, 4, 8))
    >>> [f.high for f in reach([Field(), Field()], tokens, tokens[3])], [f.high for f in reach([Field(), Field()], tokens, tokens[4])]
    ([4.0, 1.0], [1.0, inf])
    """
    result = []
    for i, field in enumerate(fields):
        parts = [a for a in reduced if i in a.axes]
        every = [a for axis in layout for a in axis if i in a.axes]
        if not parts:
            result.append(field)
        elif any(len(a.axes) > 1 for a in parts) or entries(tuple(parts)) >= entries(tuple(every)):
            result.append(whole(field))
        else:
            grow = sum((a.size - 1) * a.step for a in parts) * field.jump
            result.append(replace(field, low=field.low + grow, high=field.high + grow))
    return tuple(result)


def spacing(axis: Axis, image_axis: int) -> float:
    """Distance between neighbours along an image axis within one axis of the tensor, in jumps.

    >>> spacing((Atom(axes=(0,), size=4, step=2.0),), 0)
    2.0
    """
    return min((a.step for a in axis if image_axis in a.axes and a.size > 1), default=1.0)


Sliding = Callable[[Field, int], tuple[Field, float]]


def slide(
    layout: Layout, fields: Sequence[Field], sizes: Sequence[int], rule: Sliding
) -> tuple[Layout, tuple[Field, ...], tuple[float, ...]]:
    """Slide a window along the last axes of a tensor.

    Args:
        layout: of the input.
        fields: of the input, one for each image axis.
        sizes: of the output along those last axes.
        rule: from the field along an image axis and the number of the window axis to the field after the window and the span of its taps.

    Returns:
        The output's layout, its fields, and the span along each image axis (1 where the window does not lie).

    >>> from capnas.measures.receptive import window
    >>> tall = lambda f, i: (window(f, 3 - 2 * i, 2 - i), 3.0 - 2 * i)  # 3 x 1, stride 2 x 1
    >>> _, fields, extent = slide(input_layout((1, 3, 8, 8)), [Field(), Field()], (4, 8), tall)
    >>> [(f.high, f.jump) for f in fields], extent
    ([(3.0, 2.0), (1.0, 1.0)], (3.0, 1.0))
    """
    after, extent, lead = list(fields), [1.0] * len(fields), len(layout) - len(sizes)
    moved: list[Axis] = []
    for number, (axis, size) in enumerate(zip(map(_finer, layout[lead:]), sizes)):
        found = tuple(sorted({i for a in axis for i in a.axes if i >= 0}))
        for i in found:
            start = replace(after[i], jump=after[i].jump * spacing(axis, i))
            after[i], extent[i] = rule(start, number)
        moved.append((Atom(axes=found, size=size),) if found else resize(axis, size))
    jumps = [old.jump / new.jump for old, new in zip(fields, after)]  # steps of the axes left alone are counted in the new jumps
    left = (tuple(replace(a, step=a.step * math.prod(jumps[i] for i in a.axes if i >= 0)) for a in axis) for axis in layout[:lead])
    return (*left, *moved), tuple(after), tuple(extent)


def _finer(axis: Axis) -> Axis:
    """An image axis with the channels that lie between its pixels as one factor of a finer step."""
    image, inner = axis[:1], axis[1:]
    if not inner or len(image[0].axes) != 1 or image[0].axes[0] < 0 or any(a.axes not in ((), (CHANNEL,)) for a in inner):
        return axis
    return (replace(image[0], size=entries(axis), step=image[0].step / entries(inner)),)


def _shuffled(layout: Layout, factor: int) -> Layout:
    """``(..., C r r, H, W)`` to ``(..., C, H r, W r)``."""
    keep, *offsets = reshape((layout[-3],), (entries(layout[-3]) // factor**2, factor, factor))
    image = [reshape((a + b,), (entries(a) * factor,))[0] for a, b in zip(layout[-2:], offsets)]
    return (*layout[:-3], keep, *map(_finer, image))


def _unshuffled(layout: Layout, factor: int) -> Layout:
    """``(..., C, H r, W r)`` to ``(..., C r r, H, W)``."""
    (rows, down), (columns, right) = (reshape((a,), (entries(a) // factor, factor)) for a in layout[-2:])
    return (*layout[:-3], (*layout[-3], *down, *right), rows, columns)


def _patches(layout: Layout, attrs: Mapping[str, Any], shape: Sequence[int]) -> Layout:
    """``(..., C, H, W)`` to ``(..., C kh kw, L)``: each of L windows with its pixels as channels."""
    taps, places = [], []
    for n, axis in enumerate(layout[-2:]):
        kernel, stride, dilation, padding = (attrs[k][n] for k in ("kernel_size", "stride", "dilation", "padding"))
        found = tuple(sorted({i for a in axis for i in a.axes}))
        if len(found) != 1:
            return unknown([layout], shape)
        step, count = spacing(axis, found[0]), (entries(axis) + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        taps.append(Atom(axes=found, size=kernel, step=step * dilation))
        places.append(Atom(axes=found, size=count, step=step * stride))
    return (*layout[:-3], (*layout[-3], *taps), tuple(places))


def rearrange(op: str, attrs: Mapping[str, Any], layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Layout after an operation that moves, repeats or cuts values without arithmetic; None where it is not one.

    Args:
        op: base name, e.g. ``"permute"``.
        attrs: its other arguments by schema name.
        layout: of the input.
        shape: of the (first) output.

    >>> rearrange("transpose", {"dim0": 1, "dim1": -1}, input_layout((1, 3, 8, 8)), (1, 8, 8, 3))[3]
    (Atom(axes=(-1,), size=3, step=1.0),)
    """
    if _VIEW.fullmatch(op):
        return reshape(layout, shape)
    if op == "permute":
        return tuple(layout[i] for i in attrs["dims"])
    if op in ("transpose", "t"):
        order = list(range(len(layout)))
        i, j = (attrs["dim0"], attrs["dim1"]) if op == "transpose" else (0, -1)
        order[i], order[j] = order[j], order[i]
        return tuple(layout[i] for i in order)
    if op in ("select", "unbind"):
        gone = attrs["dim"] % len(layout)
        return tuple(a for i, a in enumerate(layout) if i != gone)
    if op in ("expand", "repeat"):
        padded = ((),) * (len(shape) - len(layout)) + tuple(layout)
        return tuple(a if entries(a) == n else (Atom(axes=(), size=n // entries(a)), *a) for a, n in zip(padded, shape))
    if op == "pixel_shuffle":
        return _shuffled(layout, attrs["upscale_factor"])
    if op == "pixel_unshuffle":
        return _unshuffled(layout, attrs["downscale_factor"])
    if op == "im2col":
        return _patches(layout, attrs, shape)
    if _CUT.fullmatch(op) and len(shape) == len(layout):
        return tuple(resize(a, n, attrs.get("step") or 1) for a, n in zip(layout, shape))
    if _SAME.fullmatch(op) and tuple(map(entries, layout)) == tuple(shape):
        return layout
    return None
