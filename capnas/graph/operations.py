"""Families of PyTorch's operations by base name, as the layer algebra and the receptive fields tell them apart.

Names are `capnas.graph.dataflow.Node.base`. What is in no family acts on each unit by itself. Ours, no paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from capnas.measures.receptive import adaptive_kernel

ACTIVATION = re.compile(
    "relu6?|leaky_relu|_?prelu(_kernel)?|rrelu.*|c?elu|selu|gelu|silu|mish|hardswish|hardtanh|hardsigmoid|sigmoid|tanh|softplus|softsign|"
    "threshold|abs|log_sigmoid.*|(soft|hard)shrink|sin|cos"
)
NORM = re.compile("native_(batch|layer|group)_norm|_native_batch_norm_legit.*|.*rms_norm")
STATISTIC = re.compile("linalg_vector_norm|norm|(var|std)(_mean)?|r?sqrt|reciprocal")
REDUCTION = re.compile("mean|sum|nansum|amax|amin|max|min|logsumexp")
CONSTANT = re.compile("(zeros|ones|full|empty|rand|randn)_like|new_(zeros|ones|full|empty)|bernoulli")
PRODUCT = re.compile("mm|bmm|addmm|baddbmm|mv|matmul|linear")
SPLIT = re.compile("(unsafe_)?split(_with_sizes)?|chunk|unbind")
POOL = re.compile("(max|avg)_pool[123]d")  # anywhere in the name
RESIZE = re.compile("_?upsample_.*")
BUFFERS = ("running_mean", "running_var", "indices", "index")  # arguments that are no weights


def neighbours(base: str, factor: float) -> int:
    """Units along an axis that one unit of an interpolated map is made of: 1 (nearest), 2 (linear), 4 (cubic) or 6 (Lanczos).

    With antialiasing they are as many more as the map gets smaller; along an axis that keeps its size it is 1.

    Args:
        base: name of the operation.
        factor: size of the map after it over that before.

    >>> [neighbours(f"upsample_{kind}", 2.0) for kind in ("bilinear2d", "nearest2d")], neighbours("_upsample_bilinear2d_aa", 0.25)
    ([2, 1], 8)
    """
    taps = next((count for kind, count in (("linear", 2), ("cubic", 4), ("lanczos", 6)) if kind in base), 1)
    return 1 if factor == 1 else math.ceil(taps / factor) if base.endswith("_aa") and factor < 1 else taps


def pooling_window(
    base: str, attrs: Mapping[str, Any], before: Sequence[int], after: Sequence[int]
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...], int]:
    """Kernel, stride and dilation of a pooling along each axis, and the units that one window pools.

    Of an adaptive one the widest window is its kernel, and the units are those of the narrowest, such as the first.

    Args:
        base: name of the operation.
        attrs: its arguments by schema name.
        before: sizes of the map along the axes that are pooled.
        after: sizes of what is left of it.

    >>> pooling_window("max_pool2d_with_indices", {"kernel_size": (3,), "stride": ()}, (9, 9), (3, 3))
    ((3, 3), (3, 3), (1, 1), 9)
    >>> pooling_window("_adaptive_avg_pool2d", {}, (9, 8), (7, 4))[0]
    (3, 2)
    """
    dilation = each(attrs.get("dilation") or 1, len(after))
    if "adaptive" in base:
        ratios = tuple(i / o for i, o in zip(before, after))
        return tuple(map(adaptive_kernel, before, after)), ratios, dilation, math.prod(map(math.ceil, ratios))
    kernel = each(attrs["kernel_size"], len(after))
    return kernel, each(attrs.get("stride") or kernel, len(after)), dilation, math.prod(kernel)


def each(value: Any, count: int) -> tuple[int, ...]:
    """An argument of a window along each of ``count`` axes, where it may be given once for all.

    >>> each(3, 2), each((3,), 2), each((3, 5), 2)
    ((3, 3), (3, 3), (3, 5))
    """
    return (value,) * count if not isinstance(value, (tuple, list)) else tuple(value) * (count if len(value) == 1 else 1)
