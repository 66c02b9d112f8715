"""From a profile to named scores, each with a direction, a range and a meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from capnas.errors import UsageError, one_of
from capnas.measures import evenness
from capnas.profile import LayerProfile, Profile

Direction = Literal["maximize", "minimize"]
Statistic = Callable[[Iterable[float | None]], float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One named number of a profile.

    Attributes:
        name: key in `SCORES` and in the mapping that `score` returns.
        direction: which way is better in a search.
        low: smallest value.
        high: largest value, or infinity.
        meaning: one line for users.
        compute: the function of a profile; NaN where the profile lacks what it needs.
    """

    name: str
    direction: Direction
    low: float
    high: float
    meaning: str
    compute: Callable[[Profile], float]

    def oriented(self, value: float) -> float:
        """The value with higher meaning better."""
        return value if self.direction == "maximize" else -value


def _over(profile: Profile, *, reading: str, column: Callable[[LayerProfile], float | None], statistic: Statistic) -> float:
    return statistic([column(row) for row in profile.reading(reading)])  # type: ignore[arg-type]


def _saturation(row: LayerProfile) -> float | None:
    return row.saturation


def _rank_share(row: LayerProfile) -> float | None:
    return None if row.effective_rank is None else row.effective_rank / row.width


_PER_LAYER: tuple[tuple[str, Direction, float, Callable[[LayerProfile], float | None], Statistic, str], ...] = (
    ("saturation_mean", "maximize", 1, _saturation, evenness.mean, "mean saturation over {}: use of the width; cannot rank alone"),
    ("saturation_evenness", "maximize", 1, _saturation, evenness.evenness, "1 - Gini of saturation over {}: 1 when all work alike"),
    ("saturation_variation", "minimize", math.inf, _saturation, evenness.coefficient_of_variation,
     "coefficient of variation of saturation over {}: 0 when even"),
    ("tail_fraction", "minimize", 1, _saturation, evenness.tail_fraction,
     "share of trailing {} below a quarter of the largest saturation: where the work stops early"),
    ("rank_mean", "maximize", 1, _rank_share, evenness.mean, "mean effective rank over width of {}: a saturation without a threshold"),
)  # fmt: skip


def _table() -> Mapping[str, Score]:
    rows = [
        Score(name=prefix + name, direction=direction, low=0, high=high, meaning=meaning.format(of),
              compute=partial(_over, reading=reading, column=column, statistic=statistic))
        for reading, prefix, of in (("modules", "", "layers"), ("blocks", "block_", "blocks"))
        for name, direction, high, column, statistic, meaning in _PER_LAYER
    ]  # fmt: skip
    return MappingProxyType({row.name: row for row in rows})


SCORES: Mapping[str, Score] = _table()


def score(profile: Profile, names: Sequence[str] | None = None) -> dict[str, float]:
    """Scores of a profile by name.

    Args:
        profile: from `profile_model`, from training or read back from a trial.
        names: which scores; all when absent.

    Returns:
        Name to value, NaN where the profile lacks what a score needs.

    Raises:
        UsageError: an unknown name.

    >>> import torch
    >>> from capnas.profile import profile_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> 0 < score(profile_model(model, torch.randn(64, 4)), ["saturation_evenness"])["saturation_evenness"] <= 1
    True
    """
    chosen = list(SCORES) if names is None else list(names)
    for name in chosen:
        if name not in SCORES:
            raise UsageError(one_of("score", name, SCORES))
    return {name: float(SCORES[name].compute(profile)) for name in chosen}
