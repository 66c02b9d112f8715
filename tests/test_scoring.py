from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from capnas.search_spaces import nasbench201
from torch import nn

from capnas.documents import json_text
from capnas.errors import UsageError
from capnas.profile import LayerProfile, Profile, profile_model
from capnas.scoring import COSTS, SCORES, measure_of, measures_for, score


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
        assert math.isnan(values[name]) == (name.endswith("saturation90_mean") or ("saturation" not in name and name not in read))
        assert spec.direction in ("maximize", "minimize")
        assert spec.low <= values[name] <= spec.high or math.isnan(values[name])
        assert len(spec.meaning) > 20
    assert {name for name, spec in SCORES.items() if spec.low == -math.inf} == {
        "capacity_score", "log2_paths", "log2_gain", "intrinsic_power", "log10_lipschitz", "synflow", "zico"
    }  # logarithms, and sums of terms of either sign  # fmt: skip
    assert {name for name, spec in SCORES.items() if spec.direction == "minimize"} == {
        *(prefix + name for prefix in ("", "block_") for name in ("saturation_variation", "tail_fraction")),
        "shortest_depth", "intrinsic_power", "log10_lipschitz", *COSTS,
    }  # fmt: skip
    assert SCORES["tail_fraction"].oriented(0.2) == -0.2
    assert SCORES["saturation_evenness"].oriented(0.2) == 0.2


def test_unknown_score_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'saturation_evenness'"):
        score(profile(0.5), ["saturation_eveness"])


def untrained(channels: int = 8, cell: str = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|nor_conv_3x3~2|") -> Profile:
    operations = {(int(name[3]), int(name[5])): operation for name, operation in nasbench201.parameters(cell).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nasbench201.CellNet(operations, cells=2, channels=channels)
        return profile_model(model, torch.randn(16, 3, 16, 16), mode="train", measures=measures_for(["capacity_score"]))


def test_capacity_score_is_its_closed_form() -> None:
    found = untrained()
    use = np.array([row.saturations["0.99"] for row in found.blocks if row.saturations])
    even = 1 - np.abs(use[:, None] - use).sum() / (2 * len(use) ** 2 * use.mean())
    leading = np.array([row.saturations["0.9"] for row in found.layers if row.saturations])
    dimensions = sum(share * row.width for share, row in zip(leading, found.layers))
    handed_on = [8 * 16**2] * 2 + [16 * 8**2] * 3 + [32 * 4**2] * 3  # two cells, then twice a reduction with two cells
    room = (2 * 11 + 3 * 10 + 3 * 9) / 8
    expected = 6 * even + 2 * leading.mean() + 0.5 * math.log2(1 + dimensions) - 0.02 * (1 + 2 + 1) + room
    values = score(found, ["capacity_score", "block_log2_activations", "log2_activations"])
    assert values["capacity_score"] == pytest.approx(expected, rel=1e-9)
    assert values["block_log2_activations"] == pytest.approx(room, rel=1e-12)
    assert values["log2_activations"] == pytest.approx(math.log2(sum(handed_on)), rel=1e-12)
    assert found.network["shortest_depth"] == 4  # stem, two reductions by their 1x1 shortcuts, classifier; cells by their skips


def test_capacity_score_prefers_width_and_shortcuts_and_a_live_network() -> None:
    chain = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|none~0|none~1|nor_conv_3x3~2|"
    dead = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
    values = [score(p)["capacity_score"] for p in (untrained(16), untrained(8), untrained(8, chain), untrained(8, dead))]
    assert values == sorted(values, reverse=True)
    assert math.isfinite(values[-1])


def test_use_of_blocks_and_parameters_at_ninety_percent_is_its_closed_form() -> None:
    found = untrained()
    values = score(found, ["block_saturation90_mean", "params_in_use"])
    blocks = [row.saturations["0.9"] for row in found.blocks if row.saturations]
    assert values["block_saturation90_mean"] == pytest.approx(np.mean(blocks), rel=1e-12)
    layers = [(row.params, row.saturations["0.9"]) for row in found.layers if row.saturations]
    counts, shares = np.array(layers).T
    assert values["params_in_use"] == pytest.approx(np.average(shares, weights=counts), rel=1e-12)
    assert values["params_in_use"] != pytest.approx(shares.mean(), rel=1e-3)
    assert len(layers) == len(found.layers) > len(blocks) > 0


def test_parameters_of_layers_without_a_saturation_do_not_count() -> None:
    found = untrained()
    rest, last = found.layers[1:], found.layers[-1]
    without = replace(found, layers=(*rest, replace(last, saturations=None), replace(last, saturations={"0.9": math.nan})))
    counts = [row.params for row in rest]
    expected = np.average([row.saturations["0.9"] for row in rest if row.saturations], weights=counts)
    assert score(without, ["params_in_use"])["params_in_use"] == pytest.approx(expected, rel=1e-12)
    assert math.isnan(score(replace(found, layers=()), ["params_in_use"])["params_in_use"])


def test_an_average_counts_at_its_gain() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AvgPool2d(2), torch.nn.Conv2d(4, 4, 1))
    network = profile_model(model, torch.randn(2, 3, 8, 8), measures=("structure",)).network
    assert network["log2_paths"] == pytest.approx(math.log2(27 * 4 * 4))
    assert network["log2_gain"] == pytest.approx(math.log2(27 / 4 * 4))


def test_size_counts_in_doublings() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2))
    found = profile_model(model, torch.randn(5, 3, 8, 8), measures=("structure",))
    values = score(found, ["log2_macs", "log2_params"])
    assert values["log2_macs"] == pytest.approx(math.log2(36 * 4 * 27 + 2 * 4 * 36))
    assert values["log2_params"] == pytest.approx(math.log2(4 * 27 + 2 * 4 * 36 + 2))
    assert score(found, ["params", "macs"]) == {"params": 4 * 27 + 2 * 4 * 36 + 2, "macs": 36 * 4 * 27 + 2 * 4 * 36}
    assert {SCORES[name].direction for name in COSTS} == {"minimize"}
    assert measures_for(COSTS) == ("saturation", "structure")
    assert measures_for(["log10_lipschitz"]) == ("saturation", "norms")


def test_every_score_asks_for_the_measure_that_gives_it() -> None:
    """Of an empty profile everything is unknown; ``capacity_slack`` is known after a training alone."""
    assert COSTS == ("params", "macs")
    assert {name: measure_of(name) for name in ("log2_macs", "log2_params", "grad_norm", "usage", "capacity_slack")} == {
        "log2_macs": "structure", "log2_params": "structure", "grad_norm": "proxies", "usage": "capacity", "capacity_slack": "training"
    }  # fmt: skip
    assert measures_for(["capacity_slack"]) == ("saturation",)
    assert {name for name in SCORES if measure_of(name) == "proxies"} == {"synflow", "naswot", "zico", "snip", "grad_norm"}


def test_the_size_of_a_network_without_weights_is_no_number() -> None:
    free = replace(profile(0.5), network={"params": 0.0, "macs": 0.0})
    assert all(math.isnan(value) for value in score(free, ["log2_params", "log2_macs"]).values())


def test_a_model_is_no_profile() -> None:
    with pytest.raises(UsageError, match=r"score takes a profile, got Linear: capnas\.profile_model\(model, inputs\) gives one"):
        score(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_score_that_a_layer_without_numbers_spoils_is_so_after_storing_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        net[2].weight.fill_(math.inf)
    profile = profile_model(net, torch.randn(8, 1, 6, 6))
    for found in (profile, Profile.from_dict(json.loads(json_text(profile.to_dict())))):
        assert math.isnan(score(found)["dimension"])
        assert math.isnan(score(found)["capacity_score"])
