"""What a user can do wrong ends with status 2 and one line that says what to do."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_space import FILE, write_images

from capnas.cli import main
from capnas.search import open_run, storages

Run = Callable[..., tuple[int, str, str]]
QUICK = ["--trials", "1", "--epochs", "1", "--pruner", "off", "--device", "cpu", "--train", "batch_size=64", "--max-params", "1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose only trial is over its budget, so that nothing is trained."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.raises(SystemExit) as done:
        main(["search", FILE, "--out", str(out), *QUICK])
    assert not done.value.code
    return out


def refused(run: Run, *words: object) -> str:
    """The one line of an error of use."""
    code, out, err = run(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("error: ")
    return err.rstrip("\n")


def test_what_cannot_start_says_one_line_and_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for words in (("nosuch",), (FILE, "--data", tmp_path / "nowhere"), (FILE, "--storage", "sqlite:////nowhere/x.db")):
        code, _, err = run("search", *words, "--out", out, *QUICK)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [("lr=abc", "lr must be a number, got 'abc'."), ("batch_size=abc", "batch_size must be a whole number, got 'abc'."),
     ("batch_size=2.5", "batch_size must be a whole number, got 2.5."), ("warmup_epochs=x", "warmup_epochs must be a number, got 'x'."),
     ("clip_grad=x", "clip_grad must be a number or none, got 'x'."), ("record=foo", "record must be true or false, got 'foo'."),
     ("weight_decay=true", "weight_decay must be a number, got True."), ("lr=1e400", "lr must be finite and not negative, got inf.")],
)  # fmt: skip
def test_training_settings_are_checked(run: Run, setting: str, says: str, tmp_path: Path) -> None:
    assert refused(run, "search", FILE, "--out", tmp_path / "run", "--train", setting) == f"error: {says}"


@pytest.mark.parametrize(
    ("option", "says"),
    [("image_size=abc", "image_size must be a whole number or none, got 'abc'."), ("validation=x", "validation must be a number, got 'x'."),
     ("seed=x", "seed must be a whole number, got 'x'."), ("seed=-1", "seed must be at least 0, got -1."),
     ("mean=0.5", "mean must be a list of numbers or none, got 0.5."), ("workers=-1", "workers must be at least 0, got -1."),
     ("memory_limit=1G", "memory_limit must be a whole number, got '1G'."), ("in_chans=7", "in_chans must be 1 or 3, got 7."),
     ("memory_limit=-1", "memory_limit must be at least 0, got -1."), ("download=maybe", "download must be true or false, got 'maybe'."),
     ("augment=foo", "augment must be true or false or Augment or none, got 'foo'.")],
)  # fmt: skip
def test_data_options_are_checked(run: Run, option: str, says: str, tmp_path: Path) -> None:
    assert refused(run, "search", FILE, "--out", tmp_path / "run", "--data-option", option, *QUICK) == f"error: {says}"


@pytest.mark.parametrize(
    ("pattern", "says"), [("(", "blocks must be a regular expression, '(' is none"), ("stage", "full-matches the block pattern 'stage'")]
)
def test_patterns_of_blocks_are_checked(run: Run, pattern: str, says: str, tmp_path: Path) -> None:
    some = [*QUICK[:-1], "9999", "--blocks", pattern]
    assert says in refused(run, "search", FILE, "--out", tmp_path / "run", *some)
    assert not (tmp_path / "run").exists()
    assert says in refused(run, "profile", "resnet10t", "--batch", 2, "--image-size", 32, "--device", "cpu", "--blocks", pattern)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_found_out_at_the_first_trial_is_one_line_too_and_leaves_no_folder(run: Run, tmp_path: Path, workers: int) -> None:
    (tmp_path / "wrong.py").write_text("from torch import nn\ndef space(trial, **shape):\n    return nn.Flatten()\n")
    start = ["--out", tmp_path / "run", "--workers", workers, *QUICK]
    faults = (
        ((FILE, "--blocks", "stage"), " candidates drawn at random full-matches the block pattern 'stage'; names look like 0, 1, 2"),
        ((tmp_path / "wrong.py",), "gives outputs of shape [(1, 784)] for an input of (1, 1, 28, 28); expected one of shape (1, 10)"),
        ((FILE, "--data", tmp_path / "nowhere"), "nowhere"),
    )
    for words, says in faults[: 1 if workers > 1 else None]:  # starting workers takes seconds
        assert says in refused(run, "search", *words, *start)
        assert not (tmp_path / "run").exists()


def test_images_that_changed_are_one_line(run: Run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    words = ["search", FILE, "--data", folder, "--out", tmp_path / "run", *QUICK[2:]]
    code, _, err = run(*words, "--trials", 1)
    assert (code, [line.split()[0] for line in err.splitlines()]) == (0, ["searching", "[1/1]"])
    shutil.rmtree(folder / "2")
    assert "the images images have changed since the study" in refused(run, *words, "--trials", 2)
    assert "the images images have changed since the study" in refused(run, *words, "--trials", 2, "--workers", 2)
    code, _, err = run(*words, "--trials", 1)
    assert (code, len(err.splitlines())) == (0, 1)
    assert "already finished" in err


def test_a_run_does_not_lie_in_its_images(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "images")
    monkeypatch.chdir(folder)
    for data, out in ((folder, folder), ("../images", folder / "run"), (".", "runs/x"), (folder, "../other/../images")):
        told = refused(run, "search", FILE, "--data", data, "--out", out, *QUICK)
        where = f"{out} lies in the folder of the images, {folder}, where it would be read as one of them"
        assert told == f"error: {where}: give another --out."
        assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "2"]
    words = ("--data", ".", "--image-size", 8, "--device", "cpu")
    for command in (("prune", "test_resnet", "--target-macs", 0.5, "--train-epochs", 1), ("excess", "test_resnet", "--epochs", 1)):
        assert f"mine lies in the folder of the images, {folder}, where" in refused(run, *command, *words, "--out", "mine")
    told = refused(run, "resolution", "test_resnet", "--data", folder, "--candidates", "8,12", "--dry-run", "--out", "mine")
    assert "images/mine lies in the folder of the images" in told
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "2"]
    assert run("search", FILE, "--data", folder, "--out", tmp_path, *QUICK)[0] == 0  # beside them is fine


def test_an_empty_name_is_no_folder_of_a_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "out is the run's folder, got an empty name" in refused(run, "search", FILE, "--out", "", *QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["abc", "", "28,", "28,28", "-8", "28.5"])
def test_resolutions_are_told_as_they_are_written(run: Run, given: str, tmp_path: Path) -> None:
    told = refused(run, "search", FILE, "--out", tmp_path / "run", f"--resolutions={given}", *QUICK)
    assert told == f"error: --resolutions takes different sizes in pixels, whole numbers such as 24,32,48, got {given!r}."


def test_a_storage_that_keeps_nothing(run: Run, tmp_path: Path) -> None:
    for url in ("sqlite://", "sqlite:///:memory:"):
        told = refused(run, "search", FILE, "--storage", url, "--out", tmp_path / "run", *QUICK)
        assert told.startswith(f"error: the storage {url} keeps nothing after the process ends; leave storage out, or name a file")
        assert not (tmp_path / "run").exists()


def test_a_setting_that_a_resolution_cannot_have_is_one_line(run: Run) -> None:
    words = ["resolution", "resnet10t", "--candidates", "8,12", "--device", "cpu"]
    for more, says in (
        (("--train", "lr=abc"), "lr must be a number, got 'abc'."),
        (("--train", "lrr=0.1"), "Did you mean 'lr'?"),
        (("--train", "seed=1"), "got 'seed'"),
        (("--share", "2"), "share in (0, 1], got 10 and 2.0."),
        (("--budget", "1e0"), "no candidate can be used"),
        (("--pay", "-1"), "pay"),
        (("--device", "cuda:77"), "cuda:77"),
    ):
        assert says in refused(run, *words, *more)


def test_numbers_without_end_are_refused(run: Run, tmp_path: Path) -> None:
    assert "got '1e400'" in refused(run, "search", FILE, "--out", tmp_path / "run", "--max-macs", "1e400")


def test_paths_that_cannot_be_written_are_named(run: Run, study: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for where, expected, words in (
        (file, "a folder", ("search", FILE, *QUICK, "--out", file)),
        (file / "x", "a folder", ("search", FILE, *QUICK, "--out", file / "x")),
        (file, "a folder", ("best", study, "--trial", 0, "--code", file / "y.py")),
        ("/proc/x", "a path that can be read or written", ("search", FILE, *QUICK, "--out", "/proc/x")),
        (tmp_path, "a file", ("report", study, "--html", tmp_path)),
        ("/proc/x", "a path that can be read or written", ("best", study, "--trial", 0, "--code", "/proc/x/y.py")),
    ):
        told = refused(run, *words)
        assert told.startswith(f"error: {where}: ")
        assert told.endswith(f"; expected {expected}, give another one")


def test_a_share_of_the_variance_is_checked_before_measuring(run: Run) -> None:
    told = refused(run, "profile", "resnet10t", "--threshold", "2", "--batch", "2", "--device", "cpu")
    assert told == "error: threshold must be in (0, 1], got 2.0."


def test_an_image_size_beyond_memory_is_one_line(run: Run) -> None:
    assert refused(run, "profile", "resnet10t", "--image-size", "16384") == (
        "error: not enough memory for this; take a smaller image size, batch or network (--debug shows where it ran out)"
    )


def test_a_proxy_that_does_not_answer(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="the driver comes with capnas[distributed]")
    monkeypatch.setattr(storages, "PATIENCE", 0.1)
    told = refused(run, "search", FILE, "--storage", "grpc://localhost:1", "--out", tmp_path / "run", *QUICK)
    assert told == "error: nothing answers at grpc://localhost:1 within 0.1 s: is the proxy of the storage running there?"


def test_a_request_that_is_no_utf8(run: Run, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_bytes(b'space = "\xff"\n')
    assert f"{tmp_path / 'study.toml'} is not UTF-8 text (invalid start byte at byte 9)" in refused(run, "report", tmp_path)


def test_a_damaged_journal_is_named_with_the_line(run: Run, study: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(study, tmp_path / "copy")
    lines = (copy / "journal.log").read_bytes().splitlines(keepends=True)
    for broken in (b'{"op_code": \x01}\n', b'{"op_code": "\xff"}\n'):
        (copy / "journal.log").write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
        told = refused(run, "report", copy)
        assert told.startswith(f"error: {copy / 'journal.log'} is damaged in line 3 (")
        assert told.endswith("restore the file from a copy, or start anew.")


def test_a_full_disk_is_one_line_that_says_what_is_kept(run: Run, study: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    copy = shutil.copytree(study, tmp_path / "copy")
    words = ["search", FILE, "--out", copy, *QUICK, "--trials", "3"]
    size, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal, script = copy / "journal.log", tmp_path / "x.py"
    code = ["best", copy, "--trial", "0", "--code", script]
    for given, room, place in ((words, journal.stat().st_size + 1200, journal), (code, 64, script)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
        try:
            status, out, err = run(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        told = err.splitlines()[-1]
        assert (status, out) == (2, ""), err
        assert told.startswith(f"error: {place}: File too large; "), err
        assert "make room" in told
        assert "finished trials are kept" in told
    assert not script.exists()
    assert run(*words)[0] == 0
    assert open_run(copy).n_finished == 3


def test_a_table_that_is_no_utf8_stops_no_resume(run: Run, study: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(study, tmp_path / "copy")
    with (copy / "trials.csv").open("ab") as file:
        file.write(b"\xff\0,\n")
    code, _, err = run("search", FILE, "--out", copy, *QUICK, "--trials", "2")
    assert code == 0, err
    assert b"\xff" not in (copy / "trials.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--values", ""), r"values must be one of \d+ names such as accuracy, val_loss, .*; got an empty name."),
     (("--values", "accuracy,"), r"values must be one of \d+ names such as accuracy, val_loss, .*; got an empty name."),
     (("--weights", "foo=1"), r"weights must be one of \d+ names such as .*; got 'foo'.")],
)  # fmt: skip
def test_names_unlike_all_others_are_told_few(run: Run, words: tuple[str, ...], says: str, tmp_path: Path) -> None:
    told = refused(run, "search", FILE, "--out", tmp_path / "run", *words)
    assert re.fullmatch(f"error: {says}", told)
    assert len(told) < 160


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x"])
def test_a_study_is_a_name(run: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused(run, "search", FILE, "--study", name)
    assert told.startswith(f"error: study must be the name of a folder under runs/, got {name!r}; give a name without slashes")
    assert not any(tmp_path.iterdir())


def test_the_name_of_a_study_with_a_folder_of_its_own_may_have_slashes(run: Run, tmp_path: Path) -> None:
    told = refused(run, "search", FILE, "--study", "team/x", "--out", tmp_path / "run", "--epochs", "0")
    assert told.startswith("error: epochs must be at least 1, got 0")


def test_an_interrupt_is_told_once_wherever_it_comes(run: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    stopped = replace(open_run(study), interrupted=True)
    monkeypatch.setattr("capnas.search.run_study", lambda config, **options: stopped)
    code, _, err = run("search", FILE, "--out", study, *QUICK)
    assert code == 130
    assert err.splitlines()[-1].startswith("Interrupted with 1 of 1 trials finished. Resume with: ")
    monkeypatch.setattr("capnas.search.open_run", stop)
    code, out, err = run("report", study)
    assert (code, out, err.strip()) == (130, "", "interrupted")
