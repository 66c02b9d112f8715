"""Families of PyTorch's operations by base name, as the layer algebra and the receptive fields tell them apart.

Names are those of a `capnas.graph.tracing.Trace`. What is in no family acts on each unit by itself. Ours, no paper's.
"""

from __future__ import annotations

import re
from typing import Any

ACTIVATION = re.compile(
    "relu6?|leaky_relu|_?prelu(_kernel)?|rrelu.*|c?elu|selu|gelu|silu|mish|hardswish|hardtanh|hardsigmoid|sigmoid|tanh|softplus|softsign|"
    "threshold|abs|log_sigmoid.*"
)
NORM = re.compile("native_(batch|layer|group)_norm|_native_batch_norm_legit.*|.*rms_norm")
STATISTIC = re.compile("linalg_vector_norm|norm|(var|std)(_mean)?|r?sqrt|reciprocal")
REDUCTION = re.compile("mean|sum|nansum|amax|amin|max|min|logsumexp")
CONSTANT = re.compile("(zeros|ones|full|empty|rand|randn)_like|new_(zeros|ones|full|empty)|bernoulli")
PRODUCT = re.compile("mm|bmm|addmm|baddbmm|mv|matmul|linear")
SPLIT = re.compile("(unsafe_)?split(_with_sizes)?|chunk|unbind")
POOL = re.compile("(max|avg)_pool[123]d")  # anywhere in the name
BUFFERS = ("running_mean", "running_var", "indices", "index")  # arguments that are no weights


def base_name(op: str) -> str:
    """Name of an operation without its library, its overload and the mark of those that work in place.

    >>> base_name("aten.relu_.default"), ACTIVATION.fullmatch(base_name("aten.relu_.default")) is not None
    ('relu', True)
    """
    return (op.split(".")[1] if "." in op else op).rstrip("_")


def neighbours(base: str) -> int:
    """Units along each axis that one unit of an interpolated map is made of: 1 (nearest), 2 (linear) or 4 (cubic).

    >>> neighbours("upsample_bilinear2d"), neighbours("upsample_nearest2d")
    (2, 1)
    """
    return 2 if "linear" in base else 4 if "cubic" in base else 1


def each(value: Any, count: int) -> tuple[int, ...]:
    """An argument of a window along each of ``count`` axes, where it may be given once for all.

    >>> each(3, 2), each((3,), 2), each((3, 5), 2)
    ((3, 3), (3, 3), (3, 5))
    """
    return (value,) * count if not isinstance(value, (tuple, list)) else tuple(value) * (count if len(value) == 1 else 1)
