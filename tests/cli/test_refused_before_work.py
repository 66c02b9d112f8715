"""What cannot be done is told before anything is trained, and what a user's space prints or ends is kept apart from the document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_space import write_images

Run = Callable[..., tuple[int, str, str]]
SPACE = """
import os, sys
from torch import nn
print("imported")
if os.environ.get("ENDS") == "import": sys.exit(3)
def space(trial, *, num_classes, in_chans, image_size):
    print("asked")
    width = trial.suggest_int("width", 2, 4)
    if os.environ.get("ENDS") == "call": sys.exit(0)
    return nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def shapeless(): ...
def nothing(**shape): ...
"""


def refused(run: Run, *words: object) -> str:
    """The one line of an error of use."""
    code, out, err = run(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    return err.removeprefix("error: ").rstrip("\n")


def quick(folder: Path, *words: object) -> list[object]:
    """A search of one trial over its budget, so that nothing is trained."""
    (folder / "mine.py").write_text(SPACE)
    images = write_images(folder / "images")
    given: list[object] = ["search", folder / "mine.py", "--data", images, "--out", folder / "run", "--trials", 1, "--epochs", 1]
    return [*given, "--device", "cpu", "--max-params", 1, "--json", *words]


def test_what_a_space_prints_is_no_part_of_the_document(run: Run, tmp_path: Path) -> None:
    code, out, err = run(*quick(tmp_path))
    assert (code, json.loads(out)["finished"]) == (0, 1)
    assert "imported" in err
    assert "asked" in err


@pytest.mark.parametrize(("ends", "says"), [("import", "when it is imported: SystemExit: 3"), ("call", "ends the process (sys.exit)")])
def test_a_space_that_ends_the_process_is_told(run: Run, ends: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDS", ends)
    code, out, err = run(*quick(tmp_path))
    assert (code, out) == (2, ""), err
    assert says in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_are_told_before_the_work(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for command in (("prune", "resnet10t", "--target-macs", 0.5, "--train-epochs", 1), ("resolution", "resnet10t", "--candidates", "8,12")):
        for out in (file, file / "x" / "y"):
            told = refused(run, *command, "--device", "cpu", "--out", out)
            assert told == f"{out} must be a folder or a new one, and {file} is a file; give another one."
        with monkeypatch.context() as closed:
            closed.setattr("os.access", lambda place, mode: False)
            assert "cannot be written to" in refused(run, *command, "--device", "cpu", "--out", tmp_path / "x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_takes_no_folders_is_told_before_the_work(run: Run) -> None:
    for command in (("prune", "resnet10t", "--target-macs", 0.5, "--train-epochs", 1), ("resolution", "resnet10t", "--candidates", "8,12")):
        told = refused(run, *command, "--device", "cpu", "--out", "/proc/narrow")
        assert told.startswith("the folder /proc cannot be written to; make it writable, or give another one")


@pytest.mark.parametrize(
    ("words", "says"),
    [(("prune", "--target-macs", "50%"), "Invalid value for '--target-macs': a number is written like 0.5 or 1e-3, got '50%'."),
     (("profile", "--threshold", ""), "a number is written like 0.5 or 1e-3, got ''."),
     (("resolution", "--pay", "much"), "a number is written like 0.5 or 1e-3, got 'much'."),
     (("excess", "--tolerance", "1%"), "a number is written like 0.5 or 1e-3, got '1%'."),
     (("prune", "--seed", "1e30", "--lossless", "0.9"), "a seed must be at least 0 and below 2**32, got 10000"),
     (("profile", "--seed", "1e30"), "a seed must be"), (("resolution", "--seed", "1e30"), "a seed must be"),
     (("best", "--seed", "-1"), "a seed must be"),
     (("excess", "--seeds", "0"), "seeds must be at least 1, got 0."),
     (("excess", "--train", "lr=-1"), "weight_decay not negative; got -1, 0.9 and 0.0001."),
     (("prune", "--lossless", "0.9", "--out", "x", "--finetune-epochs", "-1"), "finetune_epochs must not be negative, got -1."),
     (("profile", "--batch", "1", "--measures", "capacity"), "batch must be at least 2 for capacity, got 1.")],
)  # fmt: skip
def test_numbers_are_refused_with_what_came(run: Run, words: tuple[str, ...], says: str) -> None:
    assert says in refused(run, words[0], "resnet10t", *words[1:])


def test_a_network_of_a_file_that_cannot_be_called(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SPACE)
    for function, says in (("shapeless", "fails when it is called with num_classes, in_chans and image_size: TypeError"),
                           ("nothing", "must return a torch.nn.Module, got NoneType.")):  # fmt: skip
        code, out, err = run("excess", f"{tmp_path / 'mine.py'}:{function}")
        assert (code, out) == (2, ""), err
        assert says in err.splitlines()[-1]


def test_lists_within_lists_are_no_plan(run: Run, tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100000)
    assert "deep.json is not JSON" in refused(run, "prune", "resnet10t", "--dry-run", "--plan", tmp_path / "deep.json")
    assert "deep.json is not JSON" in refused(run, "search", "resnet", "--out", tmp_path / "run", "--enqueue", tmp_path / "deep.json")


def test_images_that_are_gone_are_told_first(run: Run, tmp_path: Path) -> None:
    told = refused(run, "profile", "resnet10t", "--data", tmp_path / "gone")
    assert told.startswith(f"there is no folder {tmp_path / 'gone'}: bring the images back, or give another")
    told = refused(run, "profile", "resnet10t", "--data", "fashion-mnst")
    assert told.startswith("there is no folder 'fashion-mnst' here, and as a name data must be one of ")
    assert "Did you mean 'fashion-mnist'?" in told


def test_settings_without_a_space(run: Run, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("version = 1\n")
    assert "they hold no space; study.toml was cut or emptied: remove it" in refused(run, "report", tmp_path)
