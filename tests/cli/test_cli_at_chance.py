"""Images that tell nothing about their classes: every command that trains says that its networks are no better than a guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_space import FILE

from capnas.cli.prune import guessed
from capnas.objective.finals import key_of
from capnas.search import open_run

Run = Callable[..., tuple[int, str, str]]
OPTIONS = ["--data-option", "image_size=8,in_chans=1,validation=0.4"]
GUESS = "better than a guess (50.0 %): "
LONGER = "train for more epochs, with a smaller batch_size or on more images"


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


def test_search_best_and_prune(run: Run, noise: Path, tmp_path: Path) -> None:
    short = ["--epochs", 1, "--device", "cpu"]
    search = ["search", FILE, "--data", noise, "--out", tmp_path / "run", "--trials", 1, "--train", "batch_size=16", *OPTIONS, *short]
    code, out, err = run(*search)
    assert code == 0, err
    assert ": 1 trial, 1 epoch, optimizing" in err
    assert out.splitlines()[-2:] == ["1 trial: 1 complete", f"no trial is {GUESS}{LONGER}"]
    code, out, err = run(*search, "--json")
    assert json.loads(out)["at_chance"]
    assert err.splitlines()[:2] == ["1 trial: 1 complete", f"no trial is {GUESS}{LONGER}"]
    assert "already finished (1 trial);" in err

    code, out, _ = run("best", tmp_path / "run")
    assert out.splitlines()[-1].startswith("its accuracy on validation, 0.")
    assert out.splitlines()[-1].endswith(f", is no {GUESS}{LONGER}")
    code, out, err = run("best", tmp_path / "run", "--retrain", "--json", *short)
    assert json.loads(out)["at_chance"]
    assert err.splitlines()[-1].startswith("its accuracy on test, 0.")

    prune = ["prune", f"{tmp_path / 'run'}:best", "--target-macs", 0.7, "--train-epochs", 1, "--round-to", 1, "--calibration", 16]
    code, out, err = run(*prune, "--out", tmp_path / "small", "--device", "cpu")
    assert code == 0, err
    assert f"after narrowing, is no {GUESS}the two say nothing of what narrowing costs; first {LONGER}" in out.splitlines()[-1]
    code, out, err = run(*prune, "--out", tmp_path / "small", "--device", "cpu", "--force", "--json")
    assert json.loads(out)["report"]["at_chance"] == {"before": True, "pruned": True}
    assert GUESS in err.splitlines()[-1]


def test_best_goes_by_the_accuracy_of_the_finals(run: Run, noise: Path, tmp_path: Path) -> None:
    search = ["search", FILE, "--data", noise, "--out", tmp_path / "run", "--trials", 1, "--epochs", 1, "--device", "cpu", *OPTIONS]
    assert run(*search, "--train", "batch_size=16", "--finalists", 1, "--final-epochs", 1)[0] == 0
    study = open_run(tmp_path / "run").study
    key = key_of(0, 1)
    study.set_user_attr(key, study.user_attrs[key] | {"status": "complete", "accuracy": 0.98})
    code, out, err = run("best", tmp_path / "run")
    assert code == 0, err
    assert "accuracy 0.9800 on validation after the 1 epoch of the finals" in out
    assert "better than a guess" not in out
    study.set_user_attr(key, study.user_attrs[key] | {"accuracy": 0.125})
    assert "its accuracy on validation, 0.1250, is no better than a guess" in run("best", tmp_path / "run")[1]


def test_progress_knows_of_several_workers(run: Run, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(config: object, *, on_trial: Any, **others: object) -> None:
        asked.append(on_trial.__self__.workers)
        raise KeyboardInterrupt

    monkeypatch.setattr("capnas.search.run_study", stop)
    for workers in (1, 2):
        assert run("search", FILE, "--data", noise, "--out", tmp_path / "run", "--workers", workers)[0] == 130
    assert asked == [1, 2]


def test_narrowing_that_leaves_nothing_but_a_guess() -> None:
    accuracy, well = {"before": 0.9, "pruned": 0.5}, {"before": False, "pruned": True}
    advice = f", is no {GUESS}keep more of it, or fine-tune it for more epochs (--finetune-epochs N)"
    assert guessed(accuracy, well, 0.5) == f"the narrowed network, with an accuracy of 0.5000 (0.9000 before){advice}"
    few = f", is not clearly {GUESS[:-2]} on 9 images: take more validation images to tell; {advice.partition(': ')[2]}"
    assert guessed(accuracy | {"pruned": 0.6}, well, 0.5, 9) == f"the narrowed network, with an accuracy of 0.6000 (0.9000 before){few}"
    assert guessed(accuracy, well, 0.5, 9).endswith(advice)  # not above it
    assert guessed(accuracy | {"finetuned": 0.8}, well | {"finetuned": False}, 0.5) == ""


def test_excess(run: Run, noise: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\ndef net(num_classes, in_chans, image_size):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * (image_size - 2)**2, num_classes))\n"
    )
    grid = ["--lipschitz", "0.5", "--distance", "1", "--seeds", 1, "--epochs", 1, "--device", "cpu", "--train", "final_sweeps=2"]
    code, out, err = run("excess", f"{tmp_path / 'nets.py'}:net", "--data", noise, *OPTIONS, *grid)
    assert code == 0, err
    assert out.splitlines()[-1].endswith(f" is no {GUESS}such an error holds under any constraint, so the decades mean nothing; {LONGER}")
    code, out, err = run("excess", f"{tmp_path / 'nets.py'}:net", "--data", noise, *OPTIONS, *grid, "--hold", "train", "--json")
    assert json.loads(out)["at_chance"]
    assert f"{GUESS}only the training error tells constraints apart; {LONGER}" in err.splitlines()[-1]
