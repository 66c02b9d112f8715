"""A lattice of positions of a map: enough rows for the width, spread over samples and positions, from a random offset."""

from __future__ import annotations

import math
import random

from torch import Tensor

_LEAST_SAMPLES = 16  # samples of a batch that are kept when positions are sampled


class Lattice:
    """Which samples and positions are read of tensors of one shape and one layout in memory.

    Args:
        tensor: one of them, at least two axes.
        axis: of the features; all axes after it are positions, those before it samples. Where it is the last one, all others are one
            axis of positions.
        budget: rows to read, about; more of maps, whose steps are lowered until they share no divisor with a line; None for all.

    Attributes:
        width: D, the number of features.
        rows: samples times positions.

    >>> import torch
    >>> maps = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    >>> Lattice(maps, 1, None).of(maps, random.Random(0)).shape, Lattice(maps, 1, 11).of(maps, random.Random(0)).shape
    (torch.Size([3, 2, 16]), torch.Size([3, 2, 5]))
    """

    def __init__(self, tensor: Tensor, axis: int, budget: int | None) -> None:
        self._axis = axis = axis % tensor.dim()
        self._last = axis == tensor.dim() - 1
        self.width = tensor.shape[axis]
        self.rows = tensor.numel() // self.width
        flat = self._flat(tensor)
        self._samples, _, self._positions = flat.shape
        self._strides = flat.stride() if flat.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() else None
        step = 1 if budget is None else max(1, round(self.rows / budget))
        # fewer samples, denser positions: strided reads cost whole cache lines
        self._skip = max(1, min(step, self._samples // _LEAST_SAMPLES))
        step, line = min(step // self._skip, self._positions), 1 if self._last else tensor.shape[-1]
        while step > 1 and math.gcd(step, line) > 1:  # a step that divides the map's width would read fixed columns only
            step -= 1
        self._step = step

    def of(self, tensor: Tensor, chance: random.Random) -> Tensor:
        """The rows to read, (D, samples, positions): a view, or part of a copy where the layout allows none."""
        flat = tensor if self._strides else self._flat(tensor)
        by_sample, by_feature, by_position = self._strides or flat.stride()
        first, start = chance.randrange(self._skip), chance.randrange(self._step)
        size = self.width, -(-(self._samples - first) // self._skip), -(-(self._positions - start) // self._step)
        strides = by_feature, by_sample * self._skip, by_position * self._step
        # one call instead of four views: in a training step each costs what a narrow layer's products cost
        return flat.as_strided(size, strides, flat.storage_offset() + first * by_sample + start * by_position)

    def _flat(self, tensor: Tensor) -> Tensor:
        """(samples, D, positions)."""
        if self._last:
            return tensor.reshape(1, -1, self.width).transpose(1, 2)
        return tensor.reshape(-1, self.width, math.prod(tensor.shape[self._axis + 1 :]))
