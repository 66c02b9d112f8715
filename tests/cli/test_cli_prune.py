from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_space import FILE, write_images

import capnas
from capnas.cli.prune import show_plan
from capnas.errors import CapnasError
from capnas.narrowing.pruning import PruneConfig
from capnas.saved import build_recipe, save_model
from capnas.training import TrainConfig, TrainingResult, evaluate, train

Run = Callable[..., tuple[int, str, str]]
RECIPE = {"space": FILE, "params": {"width": 8, "depth": 2, "kind": "plain"}, "num_classes": 3, "in_chans": 1, "image_size": 8}
SHORT = ["--round-to", "1", "--calibration", "48", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prune")
    options = {"source": str(write_images(root / "images")), "options": {"image_size": 8, "in_chans": 1}}
    return save_model(build_recipe(RECIPE), root / "model", RECIPE, extra={"data": options})


def test_plan_edit_prune_and_load(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, err = run("prune", saved, "--target-macs", "0.6", "--dry-run", "--json", *SHORT)
    assert code == 0, err
    document = json.loads(out)
    plan = document["plan"]
    assert plan["planned_macs"] <= 0.6 * plan["macs"]
    assert {"name", "width", "needed", "planned", "saturation", "expected", "macs", "params"} <= set(plan["groups"][0])
    plan["widths"]["0"] = 10  # wider than it is
    next(g for g in plan["groups"] if g["name"] == "2")["planned"] = 4  # either place may be edited
    (tmp_path / "plan.json").write_text(json.dumps(document))
    code, out, err = run("prune", saved, "--plan", tmp_path / "plan.json", "--out", tmp_path / "small", *SHORT)
    assert code == 0, err
    assert "accuracy on validation" in out
    assert "saturation, evenness" in out
    assert "groups that the plan widens start as copies" in err
    assert "saved:" in err
    model = capnas.load_model(tmp_path / "small")
    assert (model[0].out_channels, model[2].out_channels) == (10, 4)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert manifest["extra"]["report"]["accuracy"]["before"] >= 0
    assert manifest["extra"]["inputs"]["image_size"] == manifest["recipe"]["image_size"]
    assert manifest["extra"]["inputs"]["class_names"] == ["0", "1", "2"]
    code, out, err = run("prune", saved, "--target-macs", "0.6", "--out", tmp_path / "small", *SHORT)
    assert code == 2
    assert "force (--force) to write over it" in err
    again = ["prune", tmp_path / "small", "--lossless", "0.9", "--method", "lowrank", "--out", tmp_path / "small", "--force", *SHORT[2:]]
    code, out, err = run(*again)
    assert code == 0, err


def test_a_network_that_knows_the_validation_images_says_so_narrowed_too(run: Run, saved: Path, tmp_path: Path) -> None:
    extra = json.loads((saved / "manifest.json").read_text())["extra"] | {"retrained": {"epochs": 1}}
    known = save_model(build_recipe(RECIPE), tmp_path / "known", RECIPE, extra=extra)
    says = "the network was trained on the validation images too: accuracies on them are of images that it has seen"
    for source, out in ((known, "small"), (tmp_path / "small", "smaller"), (saved, "other")):
        code, text, err = run("prune", source, "--target-macs", "0.8", "--out", tmp_path / out, "--json", *SHORT)
        assert code == 0, err
        assert (says in err, json.loads(text)["report"]["saw_validation"]) == (out != "other", out != "other")
    assert run("prune", known, "--target-macs", "0.8", "--dry-run", *SHORT)[0] == 0
    err = run("resolution", known, "--trained", "--candidates", "8", "--epochs", "4", "--device", "cpu")[2]
    assert says in err
    assert says not in run("resolution", known, "--candidates", "8", "--dry-run")[2]


def test_trained_weights_are_not_trained_first(run: Run, saved: Path) -> None:
    says = "this network has weights and is not trained first: --train-epochs is not used"
    assert says in run("prune", saved, "--target-macs", "0.6", "--train-epochs", "1", "--dry-run", *SHORT)[2]
    assert says not in run("prune", saved, "--target-macs", "0.6", "--dry-run", *SHORT)[2]


def test_the_plan_is_shown_as_a_table(run: Run, saved: Path) -> None:
    code, out, err = run("prune", saved, "--target-macs", "0.6", "--dry-run", *SHORT)
    assert code == 0, err
    assert "0.6 of the MACs, by least loss per MAC saved" in out
    assert "6 keeps its width: it gives the classes" in err
    assert "widths go by the loss and not by equal saturation" in out
    assert "needed / planned" in out
    code, out, err = run("prune", saved, "--target-macs", "0.6", "--allocation", "saturation", "--dry-run", *SHORT)
    assert code == 0, err
    assert "widths go by the loss" not in out


def test_a_group_to_grow_that_is_over_wide_as_well_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"width": 8, "needed": 8, "planned": 8, "saturation": 1.0, "expected": 1.0, "utilisation": 0.2, "loss": 0.0, "grow": True}
    cost = {"macs": 9, "planned_macs": 9, "params": 9, "planned_params": 9}
    rows = [{"name": name, "layers": [name], "over_wide": wide, "turned": wide, **common, **cost}
            for name, wide in (("a", False), ("b", True))]  # fmt: skip
    for groups, told in ((rows, True), (rows[:1], False)):
        show_plan({"goal": "any", "groups": groups, "fixed": {}, **cost})
        out = capsys.readouterr().out
        assert f"candidates to grow (saturation at the ceiling): {'a, b' if told else 'a'}\n" in out
        assert ("evidence disagrees on b: the data fills its width (saturation)" in out) == told
        assert ("cut by directions and not by channels, as linear layers alone write and read them: b\n" in out) == told


def test_trained_weights_of_a_timm_model(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    data = write_images(tmp_path / "images")
    images = capnas.load_data(data, image_size=16)
    recipe = {"timm": "test_resnet", "args": {"num_classes": images.num_classes, "in_chans": images.in_chans}, "image_size": 16}
    model = build_recipe(recipe, seed=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = ["prune", "test_resnet", "--data", data, "--image-size", "16", "--target-macs", "0.9", "--calibration", "32", "--device", "cpu"]
    code, _, err = run(*words, "--out", tmp_path / "small")
    assert code == 2
    assert "or a timm model --pretrained or --weights FILE.safetensors" in err
    code, out, err = run(*words, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "small", "--json")
    assert code == 0, err
    accuracy = evaluate(model, images, "validation")["accuracy"]
    assert json.loads(out)["report"]["accuracy"]["before"] == pytest.approx(accuracy)
    assert sum(p.numel() for p in capnas.load_model(tmp_path / "small").parameters()) == json.loads(out)["plan"]["planned_params"]
    code, _, err = run("prune", tmp_path / "small", "--weights", tmp_path / "w.safetensors", "--target-macs", "0.9", "--dry-run")
    assert code == 2
    assert "weights are for a timm model given by its name" in err


def test_settings_arrive_in_the_library(run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[PruneConfig, int]] = []

    def record(model: Any, data: Any, config: PruneConfig, *, image_size: int) -> None:
        asked.append((config, image_size))
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.narrowing.pruning.propose", record)
    given = {"target_macs": 0.7, "method": "channels", "allocation": "saturation", "round_to": 2, "train_epochs": 3, "finetune_epochs": 4,
             "seed": 5, "device": "cpu"}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--calibration", 33, "--image-size", 12]
    for more in (words, ["--lossless", 0.9, "--method", "lowrank"]):
        assert run("prune", saved, "--dry-run", *more)[2].splitlines()[-1] == "error: enough"
    assert asked[0] == (PruneConfig(images=33, **given), 12)  # type: ignore[arg-type]
    assert asked[1] == (PruneConfig(lossless=0.9, method="lowrank"), 8)


def test_fresh_weights_are_those_of_the_seed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.nn.Module] = []

    def record(model: torch.nn.Module, *rest: Any, **settings: Any) -> None:
        asked.append(model)
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.narrowing.pruning.propose", record)
    assert run("prune", "test_resnet", "--target-macs", 0.7, "--seed", 5, "--dry-run", "--device", "cpu")[0] == 2
    wanted = build_recipe({"timm": "test_resnet", "args": {"num_classes": 10, "in_chans": 1}}, seed=5).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in asked[0].state_dict().items())


def test_a_folder_in_use_is_refused_before_anything_is_loaded(run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.search.target.open_target", lambda *given, **options: pytest.fail("it was opened"))
    code, _, err = run("prune", saved, "--target-macs", "0.6", "--out", saved, *SHORT)
    assert (code, "force (--force) to write over it" in err) == (2, True)


def test_errors_of_use(run: Run, saved: Path) -> None:
    for words, reason in (
        (["prune", saved, "--target-macs", "0.5"], "give --out DIR"),
        (["prune", saved, "--dry-run"], "exactly one goal: target_macs, lossless or widths"),
        (["prune", saved, "--target-macs", "0.5", "--lossless", "0.9", "--dry-run"], "exactly one goal"),
        (["prune", saved, "--plan", saved / "none.json", "--dry-run"], "cannot be read"),
    ):
        code, _, err = run(*words)
        assert code == 2
        assert reason in err


def test_a_trial_of_a_run_is_trained_first(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, trained = write_images(tmp_path / "images"), []

    def train_noted(model: torch.nn.Module, data: Any, config: TrainConfig, **settings: Any) -> TrainingResult:
        trained.append((config.epochs, config.batch_size, config.lr, config.label_smoothing))
        return train(model, data, config, **settings)

    monkeypatch.setattr("capnas.narrowing.pruning.train", train_noted)
    search = ["search", FILE, "--data", data, "--trials", "2", "--epochs", "1", "--out", tmp_path / "run", "--train", "batch_size=16",
              "--pruner", "off", "--device", "cpu", "--data-option", "image_size=8", "--data-option", "in_chans=1"]  # fmt: skip
    code, _, err = run(*search)
    assert code == 0, err
    code, out, err = run("prune", f"{tmp_path / 'run'}:best", "--target-macs", "0.7", "--dry-run", *SHORT)
    assert code == 0, err
    assert "by least loss" in out
    assert "the widths are those of random weights and will be others after training (--train-epochs N)" in err
    code, _, err = run("prune", f"{tmp_path / 'run'}:best", "--target-macs", "0.7", "--out", tmp_path / "none", *SHORT)
    assert code == 2
    assert "give --train-epochs N" in err
    assert not (tmp_path / "none").exists()
    winner = ["prune", f"{tmp_path / 'run'}:best", "--target-macs", "0.7", "--train-epochs", "1", "--json", *SHORT]
    code, out, err = run(*winner, "--out", tmp_path / "small")
    assert code == 0, err
    assert "it is trained first, 1 epoch on" in err
    assert json.loads(out)["report"]["macs"]["after"] > 0
    again = capnas.load_model(tmp_path / "small")
    assert again(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    more = ["--finetune-epochs", "1", "--train", "batch_size=24,label_smoothing=0.1", "--data-option", "validation=0.3"]
    code, out, err = run(*winner, "--out", tmp_path / "other", *more)
    assert code == 0, err
    assert trained == [(1, 16, 3e-3, 0.0), (1, 24, 3e-3, 0.1), (1, 24, 1e-3, 0.1)]  # the run's, unless others are given
