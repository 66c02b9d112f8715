"""Resolution tuning: what is known before training, the short runs and their cost, the advice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_space import images
from torch import nn

from capnas.candidates import count_cost
from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.mixed_sizes import train_together
from capnas.resolution import SizeRun, advise_resolution, ladder, survey_resolutions, tune_resolution
from capnas.training import TrainConfig

CONFIG = TrainConfig(batch_size=32, lr=1e-2, device="cpu")


def net(size: int, depth: int = 3, stride: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, stride, 1), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(24, 3))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(size=16), validation=0.2, test=0.2)


def test_survey_tells_borders_cost_and_what_cannot_be_used() -> None:
    deep = lambda size: net(size, depth=9)  # noqa: E731
    found = {s.size: s for s in survey_resolutions(deep, (16, 6, 12, 3), in_chans=1, budget=500_000)}
    assert list(found) == [3, 6, 12, 16]
    for size, row in found.items():
        assert row.macs == count_cost(deep(size), (1, 1, size, size)).macs
        assert len(row.unproductive) == 9 - (size + 1) // 2  # layer n reads 2 n - 1 pixels
    assert found[3].refusal.startswith("7 of 9 layers see nothing new at 3 px")
    assert found[6].refusal.startswith("6 of 9 layers")
    assert found[12].refusal == ""
    assert "over the budget of 500,000" in found[16].refusal
    only = survey_resolutions(deep, (3, 6), in_chans=1)
    assert [s.refusal for s in only] == ["", ""]  # no larger size would do: the cheaper ones are not ruled out


def test_a_size_at_which_the_network_cannot_run_is_named() -> None:
    wide = lambda size: nn.Sequential(nn.Conv2d(1, 2, 9), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # noqa: E731
    small, large = survey_resolutions(wide, (8, 16), in_chans=1)
    assert small.refusal.startswith("it cannot run at 8 px")
    assert small.macs is None
    assert large.refusal == ""
    with pytest.raises(UsageError, match="no candidate can be used: it cannot run at 8 px"):
        survey_resolutions(wide, (8,), in_chans=1)
    with pytest.raises(UsageError, match=r"different sizes in pixels, got \(8, 8\)"):
        survey_resolutions(wide, (8, 8), in_chans=1)


def test_tuning_stays_within_its_share_and_tells_every_run(data: ImageData) -> None:
    told: list[SizeRun] = []
    passes: list[tuple[int, int]] = []
    sizes, before = (6, 8, 12, 16), torch.get_rng_state()
    found = tune_resolution(net, data, sizes, epochs=20, config=CONFIG, on_run=told.append, on_pass=lambda *n: passes.append(n))
    assert torch.equal(torch.get_rng_state(), before)
    assert tuple(told) == found.runs
    assert [r.size for r in found.runs if r.rung == 1] == list(sizes)
    assert len({r.size for r in found.runs if r.rung == 2}) == 2
    macs = {s.size: s.macs for s in found.surveys}
    alone = sum(r.epochs * macs[r.size] for r in found.runs)
    together = sum(seen * macs[size] for size, seen in found.shared.seen.items())
    assert together > alone / 2
    assert (found.shared.passes, found.shared.reason) == (16, "")
    assert passes == [(n, 16) for n in range(1, 17)]
    assert found.macs_share == pytest.approx((alone + together) / (20 * sum(macs.values())))
    assert 0.2 < found.macs_share <= 0.3
    assert 0 < found.seconds_share < 1
    chosen = found.recommendation.size
    assert chosen in {r.size for r in found.runs if r.rung == 2}
    assert {r.epochs for r in found.readings if r.size == chosen} == {1, 1 + next(r.epochs for r in found.runs if r.rung == 2)}
    assert all(r.loss is not None for r in found.readings)
    assert len(found.last(chosen).saturations) == 3
    assert chosen == 6  # every size learns these stripes, and the cheapest will do
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_same_seed_gives_the_same_tuning_and_a_budget_is_kept(data: ImageData) -> None:
    runs = [tune_resolution(net, data, (6, 8, 12), epochs=4, config=CONFIG, budget=60_000) for _ in range(2)]
    assert [r.reading for r in runs[0].runs] == [r.reading for r in runs[1].runs]
    assert {r.size for r in runs[0].runs} == {6, 8}
    assert "over the budget" in runs[0].surveys[-1].refusal
    assert runs[0].recommendation.worth == runs[0].recommendation.fitted  # MACs within a budget cost nothing more
    assert runs[0].macs_share <= 0.3


def test_each_size_goes_on_from_the_shared_weights_by_itself(data: ImageData) -> None:
    made: list[nn.Module] = []

    def build(size: int) -> nn.Module:
        made.append(net(size))
        return made[-1]

    found = tune_resolution(build, data, (8, 12), epochs=10, config=CONFIG)
    small, large = made[-2:]
    together = {size: net(size) for size in (8, 12)}
    assert found.shared.passes == train_together(together, data, CONFIG, passes=4).passes == 4
    assert small[0].weight is large[0].weight
    assert torch.equal(small[0].weight, together[8][0].weight)  # the runs alone trained copies
    assert not torch.equal(small[0].weight, net(8)[0].weight)
    per_epoch = {r.size: r.seconds / r.epochs for r in found.runs}
    spent = found.shared.seconds + sum(r.seconds for r in found.runs)
    assert found.seconds_share == pytest.approx(spent / (10 * sum(per_epoch.values())))


def test_sizes_that_cannot_share_weights_start_from_their_own(data: ImageData) -> None:
    def uneven(size: int) -> nn.Module:
        return nn.Sequential(net(size), nn.Linear(3, 3) if size == 8 else nn.Identity())

    found = tune_resolution(uneven, data, (8, 12), epochs=10, config=CONFIG)
    assert found.shared.reason == "the sizes cannot share weights: 1.weight is (3, 3) at 8 px and absent at 12 px"
    assert (found.shared.passes, {r.epochs for r in found.runs}) == (0, {3})
    assert found.macs_share == pytest.approx(0.3)


def test_a_training_that_fails_drops_its_size(data: ImageData) -> None:
    def broken(size: int) -> nn.Module:
        model = net(size)
        if size == 8:
            nn.init.constant_(model[0].weight, float("nan"))
        return model

    found = tune_resolution(broken, data, (8, 12), epochs=10, config=CONFIG)
    assert found.shared.reason.startswith("the training of shared weights ended: diverged")
    assert {r.status for r in found.runs if r.size == 8} == {"diverged"}
    assert found.recommendation.size == 12
    with pytest.raises(UsageError, match="no size could be trained: diverged"):
        tune_resolution(broken, data, (8,), epochs=4, config=CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "does not pay for one epoch of every size: give at least 4 epochs"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"share": 0.0}, r"share in \(0, 1\]"),
        ({"budget": 10}, "over the budget of 10"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(data: ImageData, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tune_resolution(net, data, (8, 12), **{"epochs": 4, "config": CONFIG} | changes)


def test_advice_predicts_fields_and_cost_of_the_changed_network() -> None:
    wide = lambda size: net(size, depth=6, stride=2)  # noqa: E731
    found = {a.kind: a for a in advise_resolution(wide, 12, in_chans=1)}
    assert list(found) == ["cut", "stride", "size"]
    undone, cut = net(12, depth=6, stride=1), net(12, depth=4, stride=2)
    assert found["stride"].layers == ("0",)
    assert found["stride"].macs == pytest.approx(count_cost(undone, (1, 1, 12, 12)).macs, rel=1e-3)
    assert found["cut"].layers == ("8", "10")
    cost = count_cost(cut, (1, 1, 12, 12))
    assert (found["cut"].macs, found["cut"].params) == (cost.macs, cost.params)
    assert survey_resolutions(lambda s: undone, (12,), in_chans=1)[0].unproductive == ()
    needed = found["size"].size
    assert [len(s.unproductive) for s in survey_resolutions(wide, (needed - 1, needed), in_chans=1)] == [1, 0]
    assert advise_resolution(wide, needed, in_chans=1) == ()


def test_candidates_by_themselves_span_two_doublings_either_way() -> None:
    assert ladder(32) == (16, 24, 32, 44, 64)
    assert ladder(4)[0] == 4
    assert len(set(ladder(5))) == len(ladder(5))
