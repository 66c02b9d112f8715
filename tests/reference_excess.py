"""Slow re-derivations for excess capacity, and the reference file with the weights that its generator makes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def reference(shared: Path) -> dict:
    return json.loads((shared / "theory" / "excess_reference.json").read_text())


def drawn(shape: list[int], seed: int, scale: float = 1.0) -> Tensor:
    """Park-Miller numbers in (-1, 1) times a scale, float64."""
    values, state = [], seed
    for _ in range(math.prod(shape)):
        state = 16807 * state % 2147483647
        values.append(2 * state / 2147483647 - 1)
    return torch.tensor(values, dtype=torch.float64).reshape(shape) * scale


def matrix_by_loops(
    weight: np.ndarray, sides: list[int], *, stride: int, before: int, outputs: list[int], dilation: int, groups: int, mode: str
) -> np.ndarray:
    """The matrix of a convolution, entry by entry from its definition; no Fourier transform, no torch."""
    c_out, c_in_group = weight.shape[:2]
    dense = np.zeros((c_out, *outputs, c_in_group * groups, *sides))
    for o in range(c_out):
        group = o // (c_out // groups)
        for place in itertools.product(*map(range, outputs)):
            for tap in itertools.product(*map(range, weight.shape[2:])):
                cell = [stride * p + dilation * a - before for p, a in zip(place, tap)]
                if mode == "circular":
                    cell = [c % d for c, d in zip(cell, sides)]
                if all(0 <= c < d for c, d in zip(cell, sides)):
                    for i in range(c_in_group):
                        dense[(o, *place, group * c_in_group + i, *cell)] += weight[(o, i, *tap)]
    return dense.reshape(c_out * math.prod(outputs), -1)
