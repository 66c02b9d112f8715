from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from capnas.errors import StudyError, UsageError
from capnas.excess.composition import Stage, Step
from capnas.excess.reading import Reading, Sample, class_bounds, holds, read
from capnas.excess.training import LayerState, Run
from capnas.measures.slack import LayerMotion, capacity_slack

STAGES = tuple(Stage(branches=((Step(layer=name),),)) for name in ("a", "b", "c", "head"))
SAMPLE = Sample(data_norm=1e7, samples=100)  # so large that ceilings and 4/n vanish beside the rest
GRID = [(1.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.5, 0.1)]


def layers(lipschitz: float | None = None, distance: float | None = None) -> tuple[LayerState, ...]:
    rows = []
    for name, s, b in (("a", 2.0, 5.0), ("b", 3.0, 4.0), ("c", 1.5, 9.0)):
        limits = {} if lipschitz is None or distance is None else {"norm_limit": s * lipschitz, "distance_limit": b * distance}
        rows.append(LayerState(name=name, weights=100, norm=s, distance=b, norm_start=1.0, radius=20.0, **limits))
    return (*rows, LayerState(name="head", weights=40, norm=1.05, distance=0.0, norm_start=1.05, radius=9.0))


def run(factors: tuple[float, float] | None, train: float, validation: float, *, seed: int = 0, margin: float = 2.0) -> Run:
    return Run(
        seed=seed, lipschitz=factors and factors[0], distance=factors and factors[1], status="complete", train_error=train,
        validation_error=validation, train_loss=0.1, margin=margin, least_margin=-1.0, layers=layers(*(factors or (None, None))),
        seconds=1.0,
    )  # fmt: skip


def study(rises: dict[tuple[float, float], float], **options: object) -> Reading:
    runs = [run(None, 0.1, 0.2), *(run(pair, 0.1 + r, 0.2 + r) for pair, r in rises.items())]
    return read(runs, STAGES, SAMPLE, GRID, **options)  # type: ignore[arg-type]


def test_decades_have_their_closed_form() -> None:
    reading = study({(0.5, 0.1): 0.0})
    # C_i = const * (product of the other norms) * b_i: two of the three trained norms, and the distance
    assert reading.decades["club"] == pytest.approx(2 * math.log10(2) + 1, abs=1e-4)
    assert reading.decades["lipschitz"] == pytest.approx(3 * math.log10(2))
    assert 0 < reading.decades["spade"] < 0.1 * reading.decades["club"]
    assert reading.tightest["club"] is not None
    assert (reading.tightest["club"].lipschitz, reading.tightest["club"].distance) == (0.5, 0.1)


def test_bound_of_a_class_is_that_of_its_constraints_and_grows_with_them() -> None:
    pairs = [(0.1, 0.1), (0.1, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0)]
    found = [class_bounds(run(pair, 0, 0), STAGES, SAMPLE, margin=1.0) for pair in pairs]
    for name in ("club", "spade"):
        assert all(a[name] < b[name] for a, b in itertools.pairwise(found))
    assert found[-1] == class_bounds(run(None, 0, 0), STAGES, SAMPLE, margin=1.0), "factors of 1 are the unconstrained class"
    shrunk = replace(run((0.5, 0.5), 0, 0), layers=tuple(replace(s, norm=0.01, distance=0.01) for s in layers(0.5, 0.5)))
    assert class_bounds(shrunk, STAGES, SAMPLE, margin=1.0)["lipschitz"] < found[2]["lipschitz"]  # the classifier has no constraint
    fixed = replace(shrunk, layers=(*shrunk.layers[:-1], layers()[-1]))
    assert class_bounds(fixed, STAGES, SAMPLE, margin=1.0) == found[2], "what the weights made of their class does not count"


def test_only_settings_that_hold_count() -> None:
    reading = study({(1.0, 0.5): 0.005, (0.5, 1.0): 0.05, (0.5, 0.5): 0.009})
    assert [s.verdict for s in reading.settings] == ["held", "failed", "held", "skipped"]
    assert reading.tightest["club"] == reading.settings[2]
    assert reading.settings[1].validation_rise == pytest.approx(0.05)
    none = study({(1.0, 0.5): 0.05, (0.5, 1.0): 0.05})
    assert none.decades == {"club": 0.0, "spade": 0.0, "lipschitz": 0.0}
    assert none.tightest["spade"] is None


def test_more_tolerance_never_gives_less() -> None:
    rises = {(1.0, 0.5): 0.001, (0.5, 1.0): 0.02, (0.5, 0.5): 0.03, (0.5, 0.1): 0.2}
    decades = [study(rises, tolerance=t).decades["club"] for t in (0.0, 0.001, 0.02, 0.03, 0.2)]
    assert decades == sorted(decades)
    assert decades[0] == 0 < decades[1] < decades[-1]


def test_errors_are_compared_over_seeds_and_each_seed_is_also_judged_alone() -> None:
    runs = [run(None, 0.1, 0.2, seed=0), run(None, 0.1, 0.3, seed=1), run((1.0, 0.5), 0.1, 0.23, seed=0)]
    assert read(runs, STAGES, SAMPLE, GRID).settings[0].verdict == "skipped", "a setting counts once it has all seeds"
    runs.append(run((1.0, 0.5), 0.1, 0.28, seed=1))
    reading = read(runs, STAGES, SAMPLE, GRID)
    assert reading.settings[0].verdict == "held"
    assert reading.settings[0].validation_rise == pytest.approx(0.005)
    assert reading.per_seed["club"] == pytest.approx((0.0, math.log10(2)), abs=1e-4)
    assert reading.seeds == (0, 1)
    assert reading.validation_error == pytest.approx(0.25)
    motion = [LayerMotion(norm_start=s.norm_start, norm_end=s.norm, distance=s.distance, radius=s.radius) for s in layers()[:-1]]
    assert reading.slack == pytest.approx(capacity_slack(motion, fit=0.9))


def test_scaling_a_network_down_has_no_decades_at_its_own_margin() -> None:
    runs = [run(None, 0.1, 0.2), run((0.5, 0.5), 0.1, 0.2, margin=2.0 / 8)]  # three layers halved, the margin too
    reading = read(runs, STAGES, SAMPLE, GRID)
    assert reading.decades["club"] == pytest.approx(3 * math.log10(2), abs=1e-4)
    assert reading.own_decades["club"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(("hold", "verdict"), [("validation", "held"), ("train", "failed"), ("both", "failed")])
def test_whose_error_has_to_hold(hold: str, verdict: str) -> None:
    runs = [run(None, 0.0, 0.2), run((1.0, 0.5), 0.05, 0.2)]
    assert read(runs, STAGES, SAMPLE, GRID, hold=hold).settings[0].verdict == verdict  # type: ignore[arg-type]


def test_a_diverged_training_fails_and_a_diverged_start_ends_the_study() -> None:
    gone = replace(run((1.0, 0.5), 1.0, 1.0), status="diverged", margin=None, train_loss=None)
    reading = read([run(None, 0.1, 0.2), gone], STAGES, SAMPLE, GRID)
    assert (reading.settings[0].verdict, reading.settings[0].own_decades) == ("failed", None)
    with pytest.raises(StudyError, match="seed 0 ended as diverged: try a lower lr"):
        read([replace(run(None, 1.0, 1.0), status="diverged", margin=None)], STAGES, SAMPLE, GRID)
    with pytest.raises(StudyError, match="no unconstrained run"):
        read([], STAGES, SAMPLE, GRID)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"tolerance is a share of images in \[0, 1\), got 1.5"):
        holds([], tolerance=1.5, hold="train")
    with pytest.raises(UsageError, match="hold must be one of both, train, validation; got 'test'"):
        holds([], tolerance=0.1, hold="test")  # type: ignore[arg-type]
