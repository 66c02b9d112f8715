"""Published bounds on dense ReLU networks: linear regions (Montufar; Serra et al.; Hinz & van de Geer), VC dimension (Harvey et al.)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capnas.errors import UsageError


def montufar_bound(widths: Sequence[int]) -> int:
    """Upper bound on the linear regions of a dense ReLU network (Montufar 2017): ``prod_l sum_{j <= d_l} binom(n_l, j)``.

    ``d_l = min(n_0, ..., n_l)``.

    Args:
        widths: ``n_0`` (input dimension), ``n_1``, ..., ``n_L``. For a convolution put ``c h' w'`` (valid, loose).

    Raises:
        UsageError: for widths below 1.

    >>> montufar_bound([2, 3, 3])
    49
    """
    _check_widths(widths)
    bound, least = 1, widths[0]
    for n in widths[1:]:
        least = min(least, n)
        bound *= sum(math.comb(n, j) for j in range(least + 1))
    return bound


def dimension_histogram(widths: Sequence[int], *, carried: bool | Sequence[bool] = False) -> dict[int, int]:
    """Regions counted by the dimension of their image (Hinz & van de Geer 2018).

    From ``{n_0: 1}``, every layer of width n lets an entry (d: c) add ``c binom(n, j)`` to key ``min(d, n - j)`` for j = 0..min(d, n).

    Args:
        widths: as in `montufar_bound`.
        carried: layers whose input is carried along by a skip connection (one flag, or one for each layer): they keep key d. A safe
            simplification of ours; Xie, Chen & Li (arXiv 2012.04428) treat skips properly.

    Raises:
        UsageError: for widths below 1, or a number of flags that is not the number of layers.

    >>> dimension_histogram([2, 2, 2])
    {2: 1, 1: 8, 0: 2}
    """
    _check_widths(widths)
    flags = [carried] * (len(widths) - 1) if isinstance(carried, bool) else list(carried)
    if len(flags) != len(widths) - 1:
        raise UsageError(f"carried needs one flag for each of the {len(widths) - 1} layers, got {len(flags)}.")
    histogram = {widths[0]: 1}
    for n, keep in zip(widths[1:], flags):
        following: dict[int, int] = {}
        for d, count in histogram.items():
            for j in range(min(d, n) + 1):
                key = d if keep else min(d, n - j)
                following[key] = following.get(key, 0) + count * math.comb(n, j)
        histogram = following
    return histogram


def region_bound(widths: Sequence[int], *, carried: bool | Sequence[bool] = False) -> int:
    """Upper bound on the linear regions of a dense ReLU network: the sum of `dimension_histogram`; without skips that of Serra et al. 2018.

    Raises:
        UsageError: see `dimension_histogram`.

    >>> region_bound([2, 2, 2]), region_bound([2, 2, 2], carried=True)
    (11, 16)
    """
    return sum(dimension_histogram(widths, carried=carried).values())


def vc_comparator(weights: int, layers: int) -> float:
    """``W L log2 W``, the order (not a value) of the VC dimension of a piecewise linear network (Harvey, Liaw & Mehrabian 2017).

    >>> vc_comparator(1024, 3)
    30720.0
    """
    return weights * layers * math.log2(weights) if weights > 0 else 0.0


def _check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 1 or min(widths) < 1:
        raise UsageError(f"widths must be the input dimension and the layers' widths, all >= 1, got {list(widths)}.")
