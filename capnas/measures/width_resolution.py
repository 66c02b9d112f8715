"""Width against resolution within a budget: a whole grid predicted from one row and one column. The rule is ours.

Training every width at every resolution is dear. The rule trains a cross, by default the narrowest width at every resolution and every
width at the coarsest resolution, which together are the cheapest row and column, and predicts the other cells by adding effects in
log odds, ``logit p(w, r) = logit p(w, r0) + logit p(w0, r) - logit p(w0, r0)``: no interaction between width and resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from capnas.errors import UsageError

Cell = tuple[float, int]


def cross(cells: Mapping[Cell, float], *, width: float | None = None, resolution: int | None = None) -> tuple[Cell, ...]:
    """The cells of one row and one column of a grid of (width, resolution). Ours.

    Args:
        cells: the grid; only its keys are read.
        width: of the row, the narrowest by default.
        resolution: of the column, the coarsest by default.

    >>> cross({(w, r): 0.0 for w in (0.5, 1.0) for r in (96, 128)})
    ((0.5, 96), (0.5, 128), (1.0, 96))
    """
    row = min(w for w, _ in cells) if width is None else width
    column = min(r for _, r in cells) if resolution is None else resolution
    return tuple(cell for cell in cells if cell[0] == row or cell[1] == column)


def predicted_grid(known: Mapping[Cell, float]) -> dict[Cell, float]:
    """Accuracy of every cell from the accuracies of a cross. Ours.

    Args:
        known: accuracy in (0, 1) by (width, resolution): a full row and a full column, see `cross`.

    Raises:
        UsageError: the cells form no cross, or an accuracy is outside (0, 1).

    >>> grid = predicted_grid({(0.5, 96): 0.5, (0.5, 128): 0.6, (1.0, 96): 0.6})
    >>> round(grid[1.0, 128], 4)
    0.6923
    """
    if bad := [p for p in known.values() if not 0 < p < 1]:
        raise UsageError(f"accuracies must be in (0, 1) for log odds, got {bad[0]}.")
    widths, sizes = sorted({w for w, _ in known}), sorted({r for _, r in known})
    corner = next(
        ((w, r) for w in widths for r in sizes if all((w, s) in known for s in sizes) and all((v, r) in known for v in widths)), None
    )
    if corner is None:
        raise UsageError("the known cells must hold one width at every resolution and one resolution at every width.")
    odds = {cell: math.log(p / (1 - p)) for cell, p in known.items()}
    base = odds[corner]
    return {(w, r): _share(odds[w, corner[1]] + odds[corner[0], r] - base) for w in widths for r in sizes}


def best_within(values: Mapping[Cell, float], macs: Mapping[Cell, float], budget: float) -> Cell:
    """The cell of greatest value among those within a budget of MACs. Ours.

    Raises:
        UsageError: no cell is within the budget.

    >>> best_within({(0.5, 96): 0.5, (1.0, 96): 0.6}, {(0.5, 96): 10, (1.0, 96): 40}, budget=20)
    (0.5, 96)
    """
    allowed = [cell for cell in values if macs[cell] <= budget]
    if not allowed:
        raise UsageError(f"no cell is within {budget:,.0f} MACs; the cheapest takes {min(macs.values()):,}.")
    return max(allowed, key=lambda cell: values[cell])


def _share(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))
