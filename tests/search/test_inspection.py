from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tiny_space import FILE, write_images
from torch import nn

from capnas._timm import timm
from capnas.errors import StudyError, UsageError
from capnas.profile import MEASURES, at_default_initialization
from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig
from capnas.search.inspection import inspect_target, load_weights
from capnas.search.target import open_target
from capnas.search.trials import rebuild, retrain_trial

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
    assert (found.profile.mode, found.state.partition(",")[0]) == ("train", "before training at torch's default initialization")
    assert found.macs["layer1.0.conv1"] == 8 * 8 * 9 * 64 * conv.width
    assert found.macs["fc"] == layers["fc"].params - 10  # a weight is used once
    assert sum(found.macs[name] for name in layers) == found.total_macs
    assert found.macs["layer1.0"] == found.macs["layer1.0.conv1"] + found.macs["layer1.0.conv2"]
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["profile"]["layers"][0]["macs"] == found.macs[found.profile.layers[0].name]


def test_an_untrained_model_is_read_at_the_default_initialization(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def spy(model: nn.Module, *, seed: int) -> nn.Module:
        seeds.append(seed)
        return at_default_initialization(model, seed=seed)

    monkeypatch.setattr("capnas.search.inspection.at_default_initialization", spy)
    inspect_target("resnet10t", batch=4, image_size=32, seed=3)
    assert seeds == [3]


def test_models_of_a_fixed_size_take_the_size_of_the_images() -> None:
    found = inspect_target("vit_tiny_patch16_224", batch=2, image_size=32, reading="blocks")
    assert found.image_size == 32
    assert found.profile.layers == ()
    assert len(found.profile.blocks) == 12


def test_a_trial_shows_what_the_search_stored_and_on_request_the_network_before_training(folder: Path) -> None:
    stored, fresh = inspect_target(f"{folder}:best"), inspect_target(f"{folder}:best", initial=True, device="cpu")
    assert stored.state == "after 1 epoch of the search"
    assert fresh.state.startswith("before training")
    assert [r.name for r in stored.profile.layers] == [r.name for r in fresh.profile.layers]
    assert [r.effective_rank for r in stored.profile.layers] != [r.effective_rank for r in fresh.profile.layers]
    others = [inspect_target(f"{folder}:best", blocks="0", initial=initial, device="cpu") for initial in (True, False)]
    assert [[r.name for r in found.profile.blocks] for found in others] == [["0"]] * 2 != [[r.name for r in stored.profile.blocks]] * 2
    assert [r.effective_rank for r in others[1].profile.layers] == [r.effective_rank for r in stored.profile.layers]


@pytest.mark.parametrize(
    ("target", "says"),
    [("resnet1t", "did you mean resnet"), ("runs/x:last", "RUN:NUMBER or RUN:best"), ("qqqqqqqq", "there is no timm model 'qqqqqqqq'")],
)
def test_what_is_neither_is_refused(target: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        inspect_target(target)


def test_a_trial_without_a_profile_says_why(folder: Path) -> None:
    number = next((t.number for t, e in open_run(folder).evaluations() if e.profile is None), None)
    assert number is not None
    with pytest.raises(StudyError, match=r"over_budget.*--initial"):
        inspect_target(f"{folder}:{number}")
    assert inspect_target(f"{folder}:{number}", initial=True, device="cpu").profile.layers


def test_what_was_not_measured_is_said_and_everything_can_be(folder: Path) -> None:
    cheap = inspect_target("resnet10t", batch=4, image_size=32)
    assert cheap.left_out == ("norms", "capacity", "proxies")
    assert cheap.profile.receptive is not None
    assert cheap.profile.receptive.image_size == (32, 32)
    stored = inspect_target(f"{folder}:best")
    assert stored.profile.measures == ("saturation", "structure")
    assert all(row.distance is None for row in stored.profile.layers)


def test_a_trial_is_trained_again_as_the_search_did_for_what_needs_its_weights(folder: Path) -> None:
    stored, told = inspect_target(f"{folder}:best"), []
    again = inspect_target(
        f"{folder}:best", measures=("norms",), project=0.99, device="cpu", tell=lambda epoch, row: told.append((epoch, row["accuracy"]))
    )
    assert again.state == "trained again for 1 epoch as in the search"
    assert [r.effective_rank for r in again.profile.layers] == [r.effective_rank for r in stored.profile.layers]
    assert all(row.norm > 0 and row.distance > 0 for row in again.profile.layers)
    found = again.projection
    assert found is not None
    assert found.accuracy == told[-1][1]
    assert 0 <= found.projected <= 1
    document = json.loads(json.dumps(again.to_dict(), allow_nan=False))
    assert document["projection"]["lost"] == pytest.approx(100 * (found.accuracy - found.projected))
    assert document["left_out"] == ["structure", "capacity", "proxies"]


def test_a_trial_is_read_as_asked_and_not_as_it_happens_to_be_stored(folder: Path) -> None:
    stored = inspect_target(f"{folder}:best")
    other = inspect_target(f"{folder}:best", threshold=0.5, reading="modules", mode="train", device="cpu")
    assert (stored.state, other.state.partition(",")[0]) == ("after 1 epoch of the search", "trained again for 1 epoch as in the search")
    assert (other.profile.threshold, other.profile.mode, other.profile.blocks) == (0.5, "train", ())
    assert sum(row.k for row in other.profile.layers) < sum(row.k for row in stored.profile.layers)
    assert inspect_target(f"{folder}:best", image_size=8, mode="eval").state == stored.state
    with pytest.raises(UsageError, match="was trained at 8 px and is read so; --initial profiles its network at 16"):
        inspect_target(f"{folder}:best", image_size=16)
    assert inspect_target(f"{folder}:best", image_size=16, initial=True).image_size == 16


def test_a_trial_that_was_stopped_is_trained_again_only_as_far(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rebuild(open_run(folder))
    row = dict(found.evaluation.curve[0])
    longer = dataclasses.replace(found.run, config=dataclasses.replace(found.run.config, epochs=3, blocks="0"))
    stopped = dataclasses.replace(found, run=longer, evaluation=dataclasses.replace(found.evaluation, status="stopped", curve=(row,)))
    monkeypatch.setattr("capnas.search.inspection.rebuild", lambda *_: stopped)
    told: list[int] = []
    again = inspect_target(f"{folder}:best", measures=("norms",), device="cpu", tell=lambda epoch, _: told.append(epoch))
    assert again.state == "trained again for 1 epoch as in the search"
    assert told == [1]
    assert [row.name for row in again.profile.blocks] == ["0"]


def test_an_untrained_trial_is_read_in_the_blocks_of_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rebuild(open_run(folder))
    run = dataclasses.replace(found.run, config=dataclasses.replace(found.run.config, blocks="0"))
    monkeypatch.setattr("capnas.search.inspection.rebuild", lambda *_: dataclasses.replace(found, run=run))
    assert [row.name for row in inspect_target(f"{folder}:best", initial=True, device="cpu").profile.blocks] == ["0"]


@pytest.mark.parametrize("asked", [{"threshold": 0.5}, {"mode": "train"}])
def test_one_thing_that_is_not_stored_so_is_enough_to_train_again(folder: Path, asked: dict[str, Any]) -> None:
    found = inspect_target(f"{folder}:best", device="cpu", **asked)
    assert found.state.startswith("trained again for 1 epoch as in the search")


def test_every_score_that_is_no_number_says_why(folder: Path, tmp_path: Path) -> None:
    trial = rebuild(open_run(folder))
    kept = retrain_trial(trial, epochs=1, device="cpu")["model"]
    for target, slack in ((f"{folder}:best", True), (str(folder / kept), False)):
        found = inspect_target(target, measures=MEASURES, batch=32, device="cpu")
        scores = found.to_dict()["scores"]
        assert {name for name, value in scores.items() if value is None} <= set(found.profile.flags)
        assert (scores["capacity_slack"] is not None) == slack != ("capacity_slack" in found.profile.flags)
    config = dataclasses.replace(
        open_run(folder).config, values=("accuracy", "capacity_slack"), weights=None, study="slack", out=str(tmp_path)
    )
    of_search = run_study(config).evaluation(trial.number)
    assert inspect_target(f"{folder}:{trial.number}", measures=MEASURES, device="cpu").profile.network["capacity_slack"] == pytest.approx(
        of_search.metrics["capacity_slack"]
    )


def test_weights_of_a_timm_model_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    model.fc.weight.data.fill_(0.5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = inspect_target("resnet10t", batch=4, image_size=32, weights=tmp_path / "w.safetensors", measures=("norms",))
    assert found.state.startswith("weights of w.safetensors")
    assert found.profile.mode == "eval"
    assert found.profile.layers[-1].norm == pytest.approx(0.5 * (10 * 512) ** 0.5, rel=1e-4)
    save_file({k: v for k, v in model.state_dict().items() if not k.startswith("fc")}, tmp_path / "headless.safetensors")
    with pytest.raises(UsageError, match=r"do not fit resnet10t for fashion-mnist-12k \(classes: 10, channels: 1\).*--data: .*fc\.weight"):
        inspect_target("resnet10t", batch=4, weights=tmp_path / "headless.safetensors")
    (tmp_path / "text.safetensors").write_text("no numbers")
    for bad in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(UsageError, match=r"must be a safetensors file.*save_file\(model.state_dict\(\), FILE\) writes one"):
            inspect_target("resnet10t", batch=4, weights=tmp_path / bad)
    with pytest.raises(UsageError, match=r"initial is for a trial of a run, and resnet10t has weights of w\.safetensors"):
        inspect_target("resnet10t", batch=4, weights=tmp_path / "w.safetensors", initial=True)


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("module.", None),
        ("_orig_mod.", ()),
        ("", ()),
        ("module.", ("state_dict",)),
        ("", ("model",)),
        ("", ("state_dict_ema", "state_dict")),
    ],
)
def test_weights_of_a_wrapped_model_or_a_checkpoint_are_those_of_the_model(tmp_path: Path, prefix: str, keys: tuple[str, ...]) -> None:
    from safetensors.torch import save_file

    found = open_target("resnet10t")
    trained, other = ({prefix + name: value for name, value in found.build(seed).state_dict().items()} for seed in (1, 2))
    if keys is None:
        save_file(trained, tmp_path / "w.bin")
    else:
        torch.save(dict(zip(keys, (trained, other))) | {"epoch": 3} if keys else trained, tmp_path / "w.bin")
    model = found.build(3)
    load_weights(model, found, tmp_path / "w.bin")
    torch.testing.assert_close(model.state_dict(), found.build(1).state_dict(), rtol=0, atol=0)


def test_a_checkpoint_that_would_run_code_or_holds_no_weights_is_refused(tmp_path: Path) -> None:
    found = open_target("resnet10t")
    model = found.build(1)
    for what, says in ((model, "cannot be read: .*weights_only"), ([1], "cannot be read: "), ({"a": 1}, "do not fit resnet10t")):
        torch.save(what, tmp_path / "w.pth")
        with pytest.raises(UsageError, match=says):
            load_weights(model, found, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"project": 0.99}, "what a trained network loses.*--weights FILE"),
        ({"batch": 1, "measures": ("capacity",)}, "batch must be at least 2 for capacity, got 1"),
        ({"project": 1.5}, r"share of the variance in \(0, 1\], got 1.5"),
        ({"measures": ("capasity",)}, "measures must be one of.*Did you mean 'capacity'"),
        ({"target": "convnext_atto", "image_size": 3}, "the network cannot run at 3 px: .*; give another image size"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        inspect_target(**{"target": "resnet10t", "batch": 4} | options)


def test_a_trial_takes_neither_data_nor_weights_and_is_not_projected_untrained(folder: Path) -> None:
    with pytest.raises(UsageError, match="uses the images of its run"):
        inspect_target(f"{folder}:best", data="fashion-mnist-12k")
    with pytest.raises(UsageError, match="leave out --initial"):
        inspect_target(f"{folder}:best", initial=True, project=0.9, device="cpu")


def test_a_saved_model_is_profiled_with_its_weights(tmp_path: Path) -> None:
    from capnas.saved import build_recipe, save_model

    recipe = {"timm": "resnet10t", "args": {"num_classes": 10, "in_chans": 1}, "image_size": 28}
    model = build_recipe(recipe)
    model.fc.weight.data.fill_(0.5)
    found = inspect_target(str(save_model(model, tmp_path / "model", recipe)), batch=4, measures=("norms",))
    assert found.profile.layers[-1].norm == pytest.approx(0.5 * (10 * 512) ** 0.5, rel=1e-4)
    assert found.state.startswith("trained weights")
    with pytest.raises(UsageError, match="a saved model has its own"):
        inspect_target(str(tmp_path / "model"), batch=4, weights=tmp_path / "model" / "model.safetensors")


def test_what_gives_more_samples_is_what_would(folder: Path, tmp_path: Path) -> None:
    stored = inspect_target(f"{folder}:best", device="cpu")
    assert stored.more == "a search with more validation images"
    assert inspect_target("resnet10t", batch=4, image_size=32).more == "a larger --batch"
    few = write_images(tmp_path / "images")
    assert inspect_target("resnet10t", data=str(few), batch=5000, image_size=32).more == "more images"


@pytest.mark.parametrize(("reading", "missing"), [("modules", "blocks"), ("blocks", "layers")])
def test_rows_of_one_kind_are_those_that_the_search_stored(folder: Path, reading: Any, missing: str) -> None:
    stored, found = (inspect_target(f"{folder}:best", reading=asked, device="cpu") for asked in ("both", reading))
    assert found.state == stored.state
    assert getattr(found.profile, missing) == ()
    kept = "layers" if missing == "blocks" else "blocks"
    assert getattr(found.profile, kept) == getattr(stored.profile, kept)


@pytest.mark.parametrize(
    ("wrong", "text"), [({"reading": "layers"}, "reading"), ({"mode": "test"}, "mode"), ({"threshold": 2.0}, "threshold")]
)
def test_how_to_read_is_checked_before_a_trial_is_trained_again(folder: Path, wrong: dict[str, Any], text: str) -> None:
    def tell(*_: Any) -> None:
        raise AssertionError("trained")

    with pytest.raises(UsageError, match=text):
        inspect_target(f"{folder}:best", measures=("norms",), tell=tell, **wrong)
