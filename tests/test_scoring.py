from __future__ import annotations

import math

import pytest

from capnas.errors import UsageError
from capnas.profile import LayerProfile, Profile
from capnas.scoring import SCORES, score


def profile(*saturations: float | None, blocks: tuple[float, ...] = ()) -> Profile:
    def rows(values: tuple[float | None, ...], reading: str) -> tuple[LayerProfile, ...]:
        return tuple(
            LayerProfile(name=str(i), kind="Conv2d", reading=reading, width=10, params=1, rows=100, rows_seen=100, saturation=v,  # type: ignore[arg-type]
                         effective_rank=None if v is None else 5 * v)
            for i, v in enumerate(values)
        )  # fmt: skip

    return Profile(layers=rows(saturations, "modules"), blocks=rows(blocks, "blocks"), skipped={}, mode="train")


def test_values_of_a_hand_made_profile() -> None:
    values = score(profile(0.8, 0.8, 0.1, 0.1, blocks=(0.5, 0.5)))
    assert values["saturation_mean"] == pytest.approx(0.45)
    assert values["tail_fraction"] == 0.5
    assert values["saturation_variation"] == pytest.approx(0.35 / 0.45)
    assert values["saturation_evenness"] == pytest.approx(1 - 0.35 / 0.9)
    assert values["rank_mean"] == pytest.approx(0.225)
    assert values["block_saturation_evenness"] == 1
    assert values["block_saturation_mean"] == 0.5


def test_what_a_profile_lacks_is_nan() -> None:
    assert math.isnan(score(profile(0.5))["block_saturation_mean"])
    assert math.isnan(score(profile(None))["saturation_evenness"])


def test_directions_ranges_and_meanings() -> None:
    values = score(profile(0.8, 0.5, 0.1, blocks=(0.2, 0.7)))
    read = {f"{prefix}{name}" for prefix in ("", "block_") for name in ("tail_fraction", "rank_mean")}
    for name, spec in SCORES.items():
        assert spec.name == name
        assert math.isnan(values[name]) == ("saturation" not in name and name not in read)
        assert spec.direction in ("maximize", "minimize")
        assert spec.low <= values[name] <= spec.high or math.isnan(values[name])
        assert len(spec.meaning) > 20
    assert SCORES["tail_fraction"].oriented(0.2) == -0.2
    assert SCORES["saturation_evenness"].oriented(0.2) == 0.2


def test_unknown_score_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'saturation_evenness'"):
        score(profile(0.5), ["saturation_eveness"])
