from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from tiny_space import FILE, write_images

from capnas.errors import StudyError, UsageError
from capnas.search import run_study
from capnas.search.config import StudyConfig
from capnas.search.inspection import inspect_target

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    data = str(write_images(root / "images"))
    config = StudyConfig(
        space=FILE,
        data=data,
        study="tiny",
        trials=4,
        epochs=1,
        max_params=300,
        device="cpu",
        sampler="random",
        pruner="off",
        out=str(root / "tiny"),
        train={"batch_size": 32},
        data_options={"image_size": 8, "in_chans": 1},
    )
    return run_study(config).folder


def test_a_timm_model_with_the_cost_of_each_row() -> None:
    found = inspect_target("resnet10t", batch=4, image_size=32)
    layers = {row.name: row for row in found.profile.layers}
    conv = layers["layer1.0.conv1"]
    assert found.macs["layer1.0.conv1"] == 8 * 8 * 9 * 64 * conv.width
    assert found.macs["fc"] == layers["fc"].params - 10  # a weight is used once
    assert sum(found.macs[name] for name in layers) == found.total_macs
    assert found.macs["layer1.0"] == found.macs["layer1.0.conv1"] + found.macs["layer1.0.conv2"]
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["profile"]["layers"][0]["macs"] == found.macs[found.profile.layers[0].name]


def test_models_of_a_fixed_size_take_the_size_of_the_images() -> None:
    found = inspect_target("vit_tiny_patch16_224", batch=2, image_size=32, reading="blocks")
    assert found.image_size == 32
    assert found.profile.layers == ()
    assert len(found.profile.blocks) == 12


def test_a_trial_shows_what_the_search_stored_and_on_request_the_network_before_training(folder: Path) -> None:
    stored, fresh = inspect_target(f"{folder}:best"), inspect_target(f"{folder}:best", initial=True, device="cpu")
    assert stored.state.startswith("after 1 epoch")
    assert fresh.state.startswith("before training")
    assert [r.name for r in stored.profile.layers] == [r.name for r in fresh.profile.layers]
    assert [r.effective_rank for r in stored.profile.layers] != [r.effective_rank for r in fresh.profile.layers]


@pytest.mark.parametrize(
    ("target", "says"),
    [("resnet1t", "did you mean resnet"), ("runs/x:last", "RUN:NUMBER or RUN:best"), ("qqqqqqqq", "there is no timm model 'qqqqqqqq'")],
)
def test_what_is_neither_is_refused(target: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        inspect_target(target)


def test_a_trial_without_a_profile_says_why(folder: Path) -> None:
    from capnas.search.runs import open_run

    number = next((t.number for t, e in open_run(folder).evaluations() if e.profile is None), None)
    assert number is not None
    with pytest.raises(StudyError, match=r"over_budget.*--initial"):
        inspect_target(f"{folder}:{number}")
    assert inspect_target(f"{folder}:{number}", initial=True, device="cpu").profile.layers
