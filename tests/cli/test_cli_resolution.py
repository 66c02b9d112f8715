"""`capnas resolution` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_space import FILE, images

from capnas.search import StudyConfig, run_study

Run = Callable[..., tuple[int, str, str]]
MODEL = "mobilenetv3_small_050"
TINY = ["--epochs", "4", "--device", "cpu", "--train", "batch_size=32", "--data-option", "augment=false", "--data-option", "in_chans=1"]


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


def test_a_trial_of_a_search_is_tuned_and_written(run: Run, folder: Path, tmp_path: Path) -> None:
    study = StudyConfig(
        space=FILE, data=str(folder), trials=1, epochs=1, out=str(tmp_path / "run"), study="tiny", device="cpu", sampler="random",
        train={"batch_size": 32}, data_options={"image_size": 12, "in_chans": 1},
    )  # fmt: skip
    run_study(study)
    out = tmp_path / "tuned"
    code, text, err = run("resolution", f"{study.folder}:best", "--candidates", "8,12", *TINY, "--epochs", "10", "--out", out)
    assert code == 0
    assert err.count("rung 1") == 2
    assert "one set of weights: pass 1 of 4" in err
    assert "one set of weights, 4 passes at all sizes in turn, then each size alone" in text
    document = json.loads((out / "resolution.json").read_text())
    chosen = document["recommendation"]["size"]
    assert f"recommended: {chosen} px" in text
    assert document["macs_share"] <= 0.3
    assert (out / "resolution.svg").read_text().startswith("<svg")
    code, _, err = run("resolution", f"{study.folder}:best", "--candidates", "8,12", *TINY, "--out", out)
    assert (code, "--force overwrites them" in err) == (2, True)


def test_own_candidates_and_a_budget(run: Run, folder: Path) -> None:
    code, out, _ = run("resolution", MODEL, "--data", folder, *TINY, "--budget", "580k", "--json")
    assert code == 0
    found = json.loads(out)
    assert [s["size"] for s in found["surveys"]] == [8, 12, 16, 24]
    assert all("over the budget of 580,000" in s["refusal"] for s in found["surveys"][1:])
    assert {r["size"] for r in found["runs"]} == {8}
    assert found["shared"] == {"passes": 0, "seen": {}, "seconds": 0.0, "reason": "there is one size only"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("resnet18", "--candidates", "28,28"), "different sizes in pixels"),
        ((MODEL, "--candidates", "12,16", "--epochs", "2"), "give at least 4 epochs"),
        (("resnet18", "--candidates", "24,x"), "whole number"),
        ((MODEL, "--candidates", "24", "--budget", "10"), "over the budget of 10"),
        (("resnet_18",), "there is no timm model"),
    ],
)
def test_errors_of_use(run: Run, folder: Path, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("resolution", *words, "--data", folder)
    assert code == 2
    assert message in err
    assert err.count("\n") <= 2
