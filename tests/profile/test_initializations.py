"""Profiles that are means over several draws of the initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capnas.errors import UsageError
from capnas.profile import INITIALIZATIONS, Profile, at_default_initialization, averaged, profile_model
from capnas.profile.reading import FEWEST_IMAGES
from capnas.scoring import score


def noise(*shape: int) -> Tensor:
    """Smooth, so that layers do not use all of their width."""
    return F.avg_pool2d(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), 5, 1, 2)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)
    )


@pytest.mark.parametrize(("images", "step"), [(2 * FEWEST_IMAGES, 2), (2 * FEWEST_IMAGES - 1, 1)], ids=["half", "few"])
def test_saturations_are_means_over_copies_of_which_the_first_reads_all_images(images: int, step: int) -> None:
    x = noise(images, 3, 8, 8)
    copies = [at_default_initialization(net(), seed=seed) for seed in (5, 6, 7)]
    alone = [profile_model(c, x[:: step if i else 1], mode="train", seed=5 + i) for i, c in enumerate(copies)]
    found = profile_model(net(), x, mode="train", initialize=3, seed=5)
    assert found.initializations == 3
    assert found.saturations() == pytest.approx([math.fsum(values) / 3 for values in zip(*(p.saturations() for p in alone))])
    ranks = [math.fsum(row.effective_rank for row in rows) / 3 for rows in zip(*(p.layers for p in alone))]
    assert [row.effective_rank for row in found.layers] == pytest.approx(ranks)
    assert alone[0].saturations() != alone[1].saturations()


def test_what_cannot_be_set_again_is_named_however_many_copies() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain, self.codes = nn.Conv2d(3, 4, 3), nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.layer(x) + self.codes

    flags = [profile_model(Gained(), noise(8, 3, 8, 8), mode="train", initialize=n).flags["initialization"] for n in (1, 3)]
    assert flags == ["no reset sets codes, which kept the values the model came with"] * 2


def test_other_measures_see_the_first_copy() -> None:
    x, y = noise(16, 3, 8, 8), torch.arange(16) % 4
    measures = ("saturation", "structure", "norms", "capacity", "proxies")
    one, two = (profile_model(net(), x, y, measures=measures, mode="train", initialize=n) for n in (1, 2))
    assert two.network == pytest.approx(one.network, nan_ok=True)
    assert [row.capacity for row in two.layers] == pytest.approx([row.capacity for row in one.layers])
    assert two.saturations() != one.saturations()


def test_one_copy_is_what_true_asks_for_and_the_model_is_left_alone() -> None:
    model, x = net(), noise(64, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    plain, said = (profile_model(model, x, mode="train", initialize=n) for n in (1, True))
    assert plain == said
    assert plain.initializations == 1
    assert max(plain.saturations()[:2]) < 1
    profile_model(model, x, mode="train", initialize=INITIALIZATIONS)
    assert all(bool((before[name] == value).all()) for name, value in model.state_dict().items())
    assert bool((torch.random.get_rng_state() == state).all())


def test_draws_of_the_weights_differ_less_in_their_mean() -> None:
    """The standard deviation over seeds of a mean of four is about half of that of one."""
    x = noise(16, 3, 8, 8)

    def spread(copies: int) -> float:
        found = [score(profile_model(net(), x, mode="train", initialize=copies, seed=100 * s), "saturation_mean") for s in range(12)]
        return float(torch.tensor([f["saturation_mean"] for f in found]).std())

    assert spread(4) < 0.8 * spread(1)


def test_means_are_of_what_the_weights_decide() -> None:
    x = noise(32, 3, 8, 8)
    first, second = (profile_model(net(), x, mode="train", initialize=1, seed=s) for s in (0, 1))
    found = averaged([first, second])
    for a, b, row in zip(first.layers, second.layers, found.layers):
        pairs = ((a.effective_rank, b.effective_rank, row.effective_rank), (a.simpson, b.simpson, row.simpson))
        assert all(mean == pytest.approx((u + v) / 2) for u, v, mean in pairs if u and v)
        assert a.saturations
        assert b.saturations
        assert row.saturations == pytest.approx({t: (a.saturations[t] + b.saturations[t]) / 2 for t in a.saturations})
        assert row.k == round((a.k + b.k) / 2)
        assert row.margin == min(a.margin, b.margin)
    assert Profile.from_dict(found.to_dict()) == found
    broken = replace(second, layers=(replace(second.layers[0], finite=False, saturation=math.nan, few_rows=True), *second.layers[1:]))
    row = averaged([first, broken]).layers[0]
    assert (row.finite, row.few_rows) == (False, True)
    assert math.isnan(row.saturation or 0)


def test_a_layer_that_a_copy_skipped_is_averaged_over_the_others() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x if self.training and torch.rand(()) < 0.5 else self.b(x)

    x = noise(8, 3, 8, 8)
    ran = [len(profile_model(Skipping(), x, mode="train", measures=("saturation",), initialize=1, seed=s).layers) for s in range(8)]
    assert set(ran) == {1, 2}
    first = ran.index(2)
    found = profile_model(Skipping(), x, mode="train", measures=("saturation",), initialize=8 - first, seed=first)
    assert [row.name for row in found.layers] == ["a", "b"]
    rows = [profile_model(Skipping(), x, mode="train", measures=("saturation",), initialize=1, seed=s).layers for s in range(first, 8)]
    values = [r[1].saturation for r in rows if len(r) == 2]
    assert found.layers[1].saturation == pytest.approx(math.fsum(values) / len(values))


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(UsageError, match="profiles must be one or more, got none"):
        averaged([])
    for wrong in (-1, 1.5):
        with pytest.raises(UsageError, match="initialize must be a number of copies, 0 or more"):
            profile_model(net(), noise(16, 3, 8, 8), initialize=wrong)  # type: ignore[arg-type]
