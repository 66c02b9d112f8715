"""A convolution as a linear operator on images: forward, true adjoint, explicit matrix, Fourier blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capnas.errors import UsageError, check_name, one_of

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int | tuple[int, int]]

_MODES = ("zeros", "circular", "reflect", "replicate")
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, kw_only=True, eq=False)
class Axis:
    """One spatial axis of a convolution.

    Attributes:
        size: input side.
        kernel: taps.
        stride: step between outputs.
        dilation: step between taps.
        before: cells padded before the first input cell.
        source: (size + padding,) input cell that each padded cell copies, -1 for a zero.
        outputs: output side, at most as many as the padded input has room for.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    source: np.ndarray
    outputs: int

    @property
    def reads(self) -> np.ndarray:
        """(outputs, kernel) input cell read by each tap of each output, -1 for a zero."""
        return self.source[self.stride * np.arange(self.outputs)[:, None] + self.dilation * np.arange(self.kernel)[None, :]]

    @property
    def unread(self) -> int:
        """Cells at the end of the padded input that no window reaches."""
        return len(self.source) - self.dilation * (self.kernel - 1) - 1 - (self.outputs - 1) * self.stride

    @property
    def zeros_alike(self) -> bool:
        """Whether the padding is of zeros and alike on both sides, which torch's own operations take."""
        alike = len(self.source) == self.size + 2 * self.before
        return alike and bool((self.source[: self.before] < 0).all()) and bool((self.source[self.before + self.size :] < 0).all())

    @property
    def periodic(self) -> bool:
        """Whether outputs sit at every stride-th cell of a ring, which is when a Fourier transform diagonalises the axis."""
        wraps = np.array_equal(self.source, (np.arange(len(self.source)) - self.before) % self.size)
        return wraps and self.size == self.outputs * self.stride

    @property
    def disjoint(self) -> bool:
        """Whether no input cell is read twice and some output reads only input cells: the axis cuts the input into patches."""
        reads = self.reads
        used = reads[reads >= 0]
        return len(np.unique(used)) == len(used) and bool((reads >= 0).all(axis=1).any())

    @property
    def readers(self) -> int:
        """The most (output, tap) pairs that read one input cell."""
        reads = self.reads
        return int(np.bincount(reads[reads >= 0], minlength=1).max()) if (reads >= 0).any() else 0

    @property
    def terms(self) -> int:
        """The most taps of one output that read input cells, times the most outputs that read one cell through one tap."""
        reads = self.reads
        repeats = max((int(np.bincount(tap[tap >= 0]).max()) for tap in reads.T if (tap >= 0).any()), default=0)
        return int((reads >= 0).sum(axis=1).max()) * repeats


@dataclass(frozen=True, kw_only=True, eq=False)
class Convolution:
    """The linear map x -> conv(x), bias left out, of torch's convolution on one input size; build it with `convolution`.

    Attributes:
        weight: (C_out, C_in / groups, *kernel).
        groups: number of channel groups.
        axes: one `Axis` per spatial dimension.
    """

    weight: Tensor
    groups: int
    axes: tuple[Axis, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C_in, *input sides)."""
        return (self.weight.shape[1] * self.groups, *(axis.size for axis in self.axes))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(C_out, *output sides)."""
        return (self.weight.shape[0], *(axis.outputs for axis in self.axes))

    def forward(self, x: Tensor) -> Tensor:
        """A x for x of shape (B, *input_shape): (B, *output_shape)."""
        stride, dilation = [a.stride for a in self.axes], [a.dilation for a in self.axes]
        if all(axis.zeros_alike for axis in self.axes):
            y = _CONV[len(self.axes)](x, self.weight, None, stride, [a.before for a in self.axes], dilation, self.groups)
        else:
            for dim, axis in enumerate(self.axes, start=2):
                x = _gather(x, axis.source, dim)
            y = _CONV[len(self.axes)](x, self.weight, None, stride, 0, dilation, self.groups)
        for dim, axis in enumerate(self.axes, start=2):
            y = y.narrow(dim, 0, axis.outputs)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y for y of shape (B, *output_shape): (B, *input_shape)."""
        stride, dilation = [a.stride for a in self.axes], [a.dilation for a in self.axes]
        if all(axis.zeros_alike for axis in self.axes):
            pads, rest = [a.before for a in self.axes], [a.unread for a in self.axes]
            return _TRANSPOSED[len(self.axes)](y, self.weight, None, stride, pads, rest, self.groups, dilation)
        x = _TRANSPOSED[len(self.axes)](y, self.weight, None, stride, 0, 0, self.groups, dilation)
        for dim, axis in enumerate(self.axes, start=2):
            x = _scatter(x, axis, dim)
        return x

    def matrix(self) -> Tensor:
        """The explicit blocks, (groups, rows, columns): rows are C_out/groups x outputs, columns C_in/groups x inputs."""
        blocks = self.weight.unflatten(0, (self.groups, -1)).flatten(3)
        groups, rows, columns, _ = blocks.shape
        reads = _flat_reads(self.axes)
        outputs, inputs = reads.shape[0], int(np.prod([a.size for a in self.axes]))
        dense = blocks.new_zeros(outputs, inputs, groups, rows, columns)
        place, tap = np.nonzero(reads >= 0)
        index = torch.from_numpy(place * inputs + reads[place, tap]).to(dense.device)
        dense.view(outputs * inputs, groups, rows, columns).index_add_(0, index, blocks.movedim(-1, 0)[torch.from_numpy(tap)])
        return dense.permute(2, 3, 0, 4, 1).reshape(groups, rows * outputs, columns * inputs)

    def fourier_blocks(self) -> Tensor:
        """Complex blocks whose singular values together are those of A, (frequencies x groups, C_out/g, C_in/g x strides).

        Needs periodic axes. With stride s each block joins the s aliases of one frequency along the input channels and
        divides by the square root of s, once per axis. Blocks of conjugate frequencies, equal in norm, are left out.
        """
        kernel = self.weight
        for dim, axis in enumerate(self.axes, start=2):
            kernel = _embed(kernel, axis.dilation, axis.size, dim)
        spectrum = torch.fft.fftn(kernel.unflatten(0, (self.groups, -1)), dim=tuple(range(3, 3 + len(self.axes))))
        scale = 1.0
        for axis in self.axes:  # every pass turns the leading grid axis (position 3) into (frequency, alias), both moved to the back
            spectrum = spectrum.unflatten(3, (axis.stride, axis.outputs)).movedim((4, 3), (-2, -1))
            scale *= axis.stride
        n = len(self.axes)
        frequencies, aliases = [3 + 2 * i for i in range(n)], [4 + 2 * i for i in range(n)]
        spectrum = spectrum.narrow(frequencies[-1], 0, self.axes[-1].outputs // 2 + 1)
        spectrum = spectrum.permute(*frequencies, 0, 1, 2, *aliases).flatten(0, n).flatten(2)
        return spectrum / scale**0.5


def convolution(
    weight: Tensor,
    input_size: Sizes,
    *,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Convolution:
    """The operator of a 1-, 2- or 3-dimensional convolution.

    Args:
        weight: (C_out, C_in / groups, *kernel), cross-correlation as in torch. Its gradient is not followed.
        input_size: input side, one number or one per axis.
        stride: step between outputs, one number or one per axis.
        padding: one number or one per axis, both sides alike; or pairs (before, after), one per axis; or "same"
            (output side ceil(size / stride), the odd cell after) or "valid".
        dilation: step between taps, one number or one per axis.
        groups: channel groups.
        padding_mode: "zeros", "circular" (any padding, also more than the side), "reflect" or "replicate".

    Raises:
        UsageError: for shapes that do not fit together or a kernel larger than the padded input.

    >>> conv = convolution(torch.ones(1, 1, 3), 4, padding=1)
    >>> conv.matrix()[0].tolist()
    [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    spatial = weight.dim() - 2
    if spatial not in _CONV or 0 in weight.shape:
        expected = "non-empty with 3 to 5 dimensions (C_out, C_in/groups, *kernel)"
        raise UsageError(f"a convolution weight must be {expected}; got {tuple(weight.shape)}.")
    if groups < 1 or weight.shape[0] % groups:
        raise UsageError(f"groups must divide the {weight.shape[0]} output channels; got {groups}.")
    check_name("padding_mode", padding_mode, _MODES)
    sides, strides = per_axis("input_size", input_size, spatial), per_axis("stride", stride, spatial)
    dilations = per_axis("dilation", dilation, spatial)
    pads = _paddings(padding, weight.shape[2:], sides, strides, dilations)
    axes = tuple(_axis(*numbers, padding_mode) for numbers in zip(sides, weight.shape[2:], strides, dilations, pads))
    return Convolution(weight=weight.detach(), groups=groups, axes=axes)


def per_axis(name: str, value: Sizes, axes: int) -> tuple[int, ...]:
    """One positive number per axis.

    Raises:
        UsageError: for a number that is not positive, or another number of them than axes.

    >>> per_axis("stride", 2, 2), per_axis("stride", (1, 2), 2)
    ((2, 2), (1, 2))
    """
    values = (value,) * axes if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != axes or min(values, default=1) < 1:
        raise UsageError(f"{name} must be a positive number or one per axis ({axes}); got {value!r}.")
    return values


def _paddings(
    padding: Padding, kernel: Sequence[int], sides: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        spans = [e * (k - 1) + 1 for k, e in zip(kernel, dilations)]
        totals = [max((-(-d // s) - 1) * s + span - d, 0) for d, s, span in zip(sides, strides, spans)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if padding == "valid":
        return ((0, 0),) * len(sides)
    if isinstance(padding, str):
        raise UsageError(one_of("padding", padding, ("same", "valid")))
    entries = (padding,) * len(sides) if isinstance(padding, int) else tuple(padding)
    pairs = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in entries)
    if len(pairs) != len(sides) or min(map(min, pairs)) < 0:
        raise UsageError(f"padding must be a number, 'same', 'valid', or one number or pair per axis, none negative; got {padding!r}.")
    return pairs


def _axis(size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], mode: str) -> Axis:
    before, after = pads
    cells = np.arange(-before, size + after)
    if mode == "circular":
        source = cells % size
    elif mode == "replicate":
        source = cells.clip(0, size - 1)
    elif mode == "reflect":
        if max(before, after) >= size:
            raise UsageError(f"reflect padding must be smaller than the input side {size}; got {max(before, after)}.")
        source = np.where(cells < 0, -cells, np.where(cells >= size, 2 * (size - 1) - cells, cells))
    else:
        source = np.where((cells >= 0) & (cells < size), cells, -1)
    outputs = (len(cells) - dilation * (kernel - 1) - 1) // stride + 1
    if outputs < 1:
        fit = f"{kernel} taps, {dilation} apart, do not fit the padded input of {len(cells)} cells"
        raise UsageError(f"the kernel must fit the padded input; got {fit}: pad more or enlarge input_size.")
    return Axis(size=size, kernel=kernel, stride=stride, dilation=dilation, before=before, source=source, outputs=outputs)


def _gather(x: Tensor, source: np.ndarray, dim: int) -> Tensor:
    size = x.shape[dim]
    if len(source) == size:
        return x
    if (source >= 0).all():
        return x.index_select(dim, torch.from_numpy(source).to(x.device))
    before = int(np.argmax(source >= 0))
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [before, len(source) - size - before])


def _scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    source = axis.source[: x.shape[dim]]
    if len(source) == axis.size == len(axis.source):
        return x
    kept = np.nonzero(source >= 0)[0]
    out = x.new_zeros(*x.shape[:dim], axis.size, *x.shape[dim + 1 :])
    if len(kept):
        out.index_add_(dim, torch.from_numpy(source[kept]).to(x.device), x.narrow(dim, int(kept[0]), len(kept)))
    return out


def _flat_reads(axes: Sequence[Axis]) -> np.ndarray:
    reads = np.zeros((1, 1), dtype=np.int64)
    for axis in axes:
        own = axis.reads
        joint = reads[:, None, :, None] * axis.size + own[None, :, None, :]
        blank = (reads < 0)[:, None, :, None] | (own < 0)[None, :, None, :]
        reads = np.where(blank, -1, joint).reshape(reads.shape[0] * own.shape[0], -1)
    return reads


def _embed(kernel: Tensor, dilation: int, size: int, dim: int) -> Tensor:
    """The taps on a ring of `size` cells along one axis; taps that meet are added."""
    cells = torch.arange(kernel.shape[dim], device=kernel.device) * dilation % size
    return kernel.new_zeros(*kernel.shape[:dim], size, *kernel.shape[dim + 1 :]).index_add_(dim, cells, kernel)
