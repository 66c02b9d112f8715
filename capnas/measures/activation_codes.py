"""Binary codes of a network's rectifiers on a batch: whose input is positive for which sample (Mellor et al., arXiv 2006.04647)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_RECTIFIERS = re.compile("relu6?|leaky_relu|_?prelu(_kernel)?|rrelu.*|c?elu|selu|gelu|silu|mish|hardswish|threshold")
_CLIPS = re.compile("clamp|clamp_min|hardtanh")  # rectifiers where they cut at zero


class CodeOverlap(TorchDispatchMode):
    """Adds up, over all rectifiers that run inside it, how many codes each two samples share.

    Attributes:
        kernel: (B, B) shared codes of each two samples.
        units: rectified units of one sample.
        finite: False after a value that is not.

    >>> with CodeOverlap(2) as codes:
    ...     _ = torch.relu(torch.tensor([[1.0, -1.0, 2.0], [1.0, 1.0, -2.0]]))
    >>> codes.kernel.tolist(), codes.units
    ([[3.0, 1.0], [1.0, 3.0]], 3)
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.units, self.finite = samples, 0, True
        self.kernel = np.zeros((samples, samples))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1].rstrip("_") if "." in str(func) else ""
        if _RECTIFIERS.fullmatch(name) or (_CLIPS.fullmatch(name) and _cuts_at_zero(name, args, kwargs or {})):
            self.add(args[0])
        return func(*args, **(kwargs or {}))

    def add(self, x: Tensor) -> None:
        """Count one rectifier's input, (n B, ...); of another first axis it is no map of the samples and is left out."""
        if x.ndim < 2 or x.shape[0] % self.samples:
            return  # not one entry a sample: a rectified weight or table
        codes = x.detach().reshape(self.samples, -1)
        self.finite &= all_finite(codes)
        for part in codes.split(1 << 14, dim=1):  # fits a cache; float32 sums of signs are exact up to 2^24
            signs = (part > 0).to(torch.float32).mul_(2).sub_(1)
            self.kernel += ((signs @ signs.T).double().cpu().numpy() + part.shape[1]) / 2
        self.units += codes.shape[1]


def _cuts_at_zero(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the lower bound of a clip is zero, given as a number or as a tensor of them."""
    low = args[1] if len(args) > 1 else kwargs.get("min_val" if name == "hardtanh" else "min", -1.0)
    return low is not None and not torch.as_tensor(low).any()


def all_finite(tensor: Tensor) -> bool:
    """Whether all entries, of any shape, are finite, without a tensor of flags: a NaN or an infinity shows in the extremes.

    >>> all_finite(torch.tensor([1.0, math.inf])), all_finite(torch.zeros(0))
    (False, True)
    """
    return not tensor.numel() or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(tensor))
