"""What a convolution or linear layer reads: its arguments by name, and the rows of its input that its outputs are products of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
LAYERS: dict[Any, tuple[str, ...]] = {
    F.linear: _PLAIN,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _PLAIN),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}


def arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of one of `LAYERS` by name.

    >>> sorted(arguments(F.conv2d, ("x", "w"), {"stride": 2}))
    ['input', 'stride', 'weight']
    """
    return dict(zip(LAYERS[func], args)) | dict(kwargs)


def groups_of(func: Any, given: Mapping[str, Any]) -> int:
    """Groups of a convolution, 1 for a linear layer."""
    return 1 if func is F.linear else int(given.get("groups", 1))


def input_rows(func: Any, given: Mapping[str, Any], out_shape: Sequence[int], chosen: Tensor) -> Tensor:
    """What the layer multiplies with its weight at chosen places of its output: (G, M, a) float32, a trailing 1 where it has a bias.

    Args:
        func: one of `LAYERS`.
        given: its `arguments`.
        out_shape: of its output.
        chosen: (M,) places, counted over the output's axes without its channels, the batch outermost.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> input_rows(F.linear, {"input": x, "weight": torch.ones(4, 3), "bias": torch.ones(4)}, (2, 4), torch.tensor([1])).tolist()
    [[[3.0, 4.0, 5.0, 1.0]]]
    """
    x = given["input"].detach()
    if func is F.linear:
        rows = x.flatten(0, -2)[chosen].unsqueeze(1)
    else:
        rows = _patches(x, given["weight"], given, out_shape, chosen, transposed=LAYERS[func] is _TRANSPOSED)
    rows = rows.unflatten(-1, (groups_of(func, given), -1)).movedim(-2, 0).flatten(2).float()
    return rows if given.get("bias") is None else torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def _patches(x: Tensor, weight: Tensor, given: Mapping[str, Any], out_shape: Sequence[int], chosen: Tensor, *, transposed: bool) -> Tensor:
    """The input patches (M, taps, C) that a convolution reads at chosen positions of its flattened output (B, positions)."""
    view = windows(x, weight.shape[2:], given, transposed=transposed).movedim(1, -1)  # whole runs where channels are stored last
    return view[unravel(chosen, [out_shape[0], *out_shape[2:]])].flatten(1, -2)


def windows(x: Tensor, kernel: Sequence[int], given: Mapping[str, Any], *, transposed: bool = False) -> Tensor:
    """What a convolution reads at each position of its output, a view (B, C, *positions, *taps).

    A transposed convolution reads windows of its input with zeros between the cells; its taps come in reverse.

    Args:
        x: (B, C, *size) its input.
        kernel: sizes of its kernel.
        given: any of ``stride``, ``padding``, ``dilation`` and ``output_padding``.
        transposed: whether it is a transposed one.

    >>> windows(torch.tensor([[[1.0, 2.0]]]), [2], {"stride": 2}, transposed=True)[0, 0].tolist()
    [[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
    """
    axes = len(kernel)
    stride, dilation = (_tuple(given.get(key, 1), axes) for key in ("stride", "dilation"))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    padding = given.get("padding", 0)
    if transposed:
        extra = _tuple(given.get("output_padding", 0), axes)
        spread = x.new_zeros(*x.shape[:2], *(s * (n - 1) + 1 for s, n in zip(stride, x.shape[2:])))
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
        sides = [(r - 1 - p, r - 1 - p + e) for r, p, e in zip(reach, _tuple(padding, axes), extra)]
        x, stride = spread, (1,) * axes
    elif isinstance(padding, str):
        total = [(r - 1) if padding == "same" else 0 for r in reach]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _tuple(padding, axes)]
    view = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for axis in range(axes):
        view = view.unfold(2 + axis, reach[axis], stride[axis])  # taps go to the end, in order
    return view[tuple([slice(None)] * (2 + axes) + [slice(None, None, d) for d in dilation])]


def unravel(flat: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Places in a flattened array (M,) as one index (M,) for each axis.

    >>> [index.tolist() for index in unravel(torch.tensor([0, 5]), (2, 3))]
    [[0, 1], [0, 2]]
    """
    places: list[Tensor] = []
    for size in reversed(shape):
        places.insert(0, flat % size)
        flat = torch.div(flat, size, rounding_mode="floor")
    return tuple(places)


def _tuple(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
