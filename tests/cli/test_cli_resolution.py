"""`capnas resolution` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_space import FILE, images

from capnas.candidates import count_cost
from capnas.data import load_data
from capnas.errors import CapnasError
from capnas.search import StudyConfig, run_study
from capnas.training import TrainConfig

Run = Callable[..., tuple[int, str, str]]
MODEL = "mobilenetv3_small_050"
TINY = ["--epochs", "4", "--device", "cpu", "--train", "batch_size=32", "--data-option", "augment=false", "--data-option", "in_chans=1"]

GREY = ["--data-option", "in_chans=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i, (image, label) in enumerate(zip(*images(120, size=12))):
        (root / f"class{label}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"class{label}" / f"{i:04d}.png")
    return root


def test_a_dry_run_needs_no_training(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.resolution.train", None)
    code, out, _ = run("resolution", "resnet18", "--candidates", "16,28", "--dry-run", "--json", "--data", folder)
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    assert [(s["size"], len(s["unproductive"]), bool(s["refusal"])) for s in found["surveys"]] == [(16, 16, True), (28, 7, False)]
    assert [a["kind"] for a in found["advice"]["28"]] == ["cut", "stride", "size"]
    assert found["advice"]["28"][0]["layers"] == ["layer3.1", "layer4.0", "layer4.1"]
    code, out, _ = run("resolution", MODEL, "--candidates", "12", "--dry-run", "--data", folder)
    assert "at 12 px:\n  cut" in out


def test_a_trial_of_a_search_is_tuned_and_written(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = StudyConfig(
        space=FILE, data=str(folder), trials=1, epochs=1, out=str(tmp_path / "run"), study="tiny", device="cpu", sampler="random",
        train={"batch_size": 32, "lr": 0.01}, data_options={"image_size": 12, "in_chans": 1},
    )  # fmt: skip
    run_study(study)
    out = tmp_path / "tuned"
    code, text, err = run("resolution", f"{study.folder}:best", "--candidates", "8,12", *TINY, "--epochs", "10", "--out", out)
    assert code == 0
    assert err.count("round 1") == 2
    assert "1 epoch  accuracy" in err
    assert "one set of weights: pass 1 of 4" in err
    assert "one set of weights, 4 passes at all sizes in turn, then each size alone" in text
    document = json.loads((out / "resolution.json").read_text())
    chosen = document["recommendation"]["size"]
    assert f"recommended: {chosen} px" in text
    assert document["macs_share"] <= 0.3
    assert (out / "resolution.svg").read_text().startswith("<svg")
    code, _, err = run("resolution", f"{study.folder}:best", "--candidates", "8,12", *TINY, "--out", out)
    assert (code, "--force overwrites them" in err) == (2, True)
    asked: list[TrainConfig] = []
    monkeypatch.setattr("capnas.resolution.tune_resolution", lambda *given, config, **settings: asked.append(config) or 1 / 0)
    run("resolution", f"{study.folder}:best", "--candidates", "8,12", "--train", "batch_size=24")
    assert [(config.batch_size, config.lr) for config in asked] == [(24, 0.01)]  # the run's, unless others are given


def test_a_dry_run_writes_what_it_says(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("resolution", "resnet18", "--candidates", "16,28", "--dry-run", "--data", folder, "--out", tmp_path)
    assert (code, f"written: {tmp_path / 'resolution.json'}, {tmp_path / 'resolution.svg'}" in err) == (0, True)
    document = json.loads((tmp_path / "resolution.json").read_text())
    assert [s["size"] for s in document["surveys"]] == [16, 28]
    figure = (tmp_path / "resolution.svg").read_text()
    assert "past the border" in figure
    assert "MACs" in figure


def test_a_network_without_border_says_so(run: Run, folder: Path) -> None:
    code, out, _ = run("resolution", "vit_tiny_patch16_224", "--candidates", "24,32", "--dry-run", "--data", folder)
    assert code == 0
    assert out.count("no border") == 3
    assert "no border: the network mixes all positions" in out
    assert "8 of 24 px are not read" in out


def test_the_figure_of_a_network_without_border_shows_none(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("resolution", "vit_tiny_patch16_224", "--candidates", "32", "--data", folder)
    for place, more in (("looked", ("--dry-run",)), ("tuned", TINY)):
        assert run(*words, *more, "--out", tmp_path / place)[0] == 0
        assert "past the border" not in (tmp_path / place / "resolution.svg").read_text()


def test_a_narrowed_model_is_tuned_as_narrow_as_it_is(run: Run, folder: Path, tmp_path: Path) -> None:
    from capnas.narrowing import narrowed, plan_widths, survey
    from capnas.saved import build_recipe, save_model

    recipe = {"timm": "resnet10t", "args": {"num_classes": 3, "in_chans": 1, "channels": (8, 16, 32, 64)}, "image_size": 32}
    model = build_recipe(recipe).eval()
    found = survey(model, torch.randn(64, 1, 32, 32))
    small = narrowed(model, found, plan_widths(found, target_macs=0.5))
    save_model(small, tmp_path / "narrow", recipe)
    code, out, _ = run("resolution", tmp_path / "narrow", "--candidates", "32", "--dry-run", "--json", "--data", folder, *GREY)
    assert code == 0
    macs = json.loads(out)["surveys"][0]["macs"]
    assert macs == count_cost(small, (1, 1, 32, 32)).macs < 0.6 * count_cost(model, (1, 1, 32, 32)).macs


def test_sizes_that_are_dropped_are_marked(run: Run, folder: Path) -> None:
    code, out, _ = run("resolution", MODEL, "--data", folder, *TINY, "--candidates", "16,20,28", "--epochs", "20")
    assert code == 0
    assert out.count("dropped after round 1") == 2  # in its row and among the reasons


def test_own_candidates_and_a_budget(run: Run, folder: Path) -> None:
    code, out, _ = run("resolution", MODEL, "--data", folder, *TINY, "--budget", "580k", "--json")
    assert code == 0
    found = json.loads(out)
    assert [s["size"] for s in found["surveys"]] == [8, 12, 16, 24]
    assert all("over the budget of 580,000" in s["refusal"] for s in found["surveys"][1:])
    assert {r["size"] for r in found["runs"]} == {8}
    assert found["shared"] == {"passes": 0, "seen": {}, "seconds": 0.0, "reason": "there is one size only"}


def test_settings_arrive_in_the_units_of_the_library(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def record(build: Any, data: Any, sizes: tuple[int, ...], **settings: Any) -> None:
        asked.append({"sizes": sizes} | settings)
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.resolution.tune_resolution", record)
    words = ["resolution", MODEL, "--data", folder, "--candidates", "12,16", "--device", "cpu"]
    for more in (["--pay", 1, "--share", 0.2, "--epochs", 7, "--budget", "3M", "--seed", 5, "--train", "batch_size=9"], []):
        assert run(*words, *more)[2].splitlines()[-1] == "error: enough"
    given, plain = asked
    assert (given["sizes"], given["pay"], given["share"], given["epochs"], given["budget"]) == ((12, 16), 0.01, 0.2, 7, 3_000_000)
    assert (given["config"].seed, given["config"].batch_size, given["config"].device) == (5, 9, "cpu")
    assert (plain["pay"], plain["share"], plain["epochs"], plain["budget"], plain["config"].seed) == (None, 0.3, 10, None, 0)


def test_a_size_whose_images_do_not_fit_into_memory_is_named(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: Any, **options: Any) -> Any:
        if options.get("image_size", 0) > 1000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 250000000000 bytes.")
        return load_data(source, **options)

    monkeypatch.setattr("capnas.search.target.load_data", load)
    words = ["resolution", MODEL, "--dry-run", "--json", "--data", folder]
    code, out, _ = run(*words, "--candidates", "28,5000")
    assert code == 0
    refusals = {s["size"]: s["refusal"] for s in json.loads(out)["surveys"]}
    assert refusals == {28: "", 5000: "the images do not fit into memory at 5000 px"}
    code, _, err = run(*words, "--candidates", "5000")
    assert (code, "no size can be used: the images do not fit into memory at 5000 px." in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resnet18", "--candidates", "28,28"), "different sizes in pixels"),
        ((MODEL, "--candidates", "12,16", "--epochs", "2"), "give at least 4 epochs"),
        (("resnet18", "--candidates", "24,x"), "whole number"),
        ((MODEL, "--candidates", "24", "--budget", "10"), "over the budget of 10"),
        (("resnet_18",), "there is no timm model"),
        (("resnet18", "--candidates", ""), "--candidates takes different sizes in pixels, whole numbers such as 24,32,48, got ''"),
        (("resnet18", "--candidates", "24,"), "such as 24,32,48, got '24,'"),
        (("resnet18", "--candidates", "0,-4"), "such as 24,32,48, got '0,-4'"),
        (("resnet18", "--candidates", "28", "--trained"), "the trained weights of a saved model, and resnet18 has none"),
        ((MODEL, "--candidates", "28", "--pay", "nan"), "a number and not negative, got nan"),
        ((MODEL, "--candidates", "28", "--dry-run", "--train", "batchsize=9"), "Did you mean 'batch_size'"),
    ],
)
def test_errors_of_use(run: Run, folder: Path, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("resolution", *words, "--data", folder)
    assert code == 2
    assert message in err
    assert err.count("\n") <= 2
