from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from tiny_space import FILE, images, write_images
from torch import nn

from capnas.data import ImageData, load_data
from capnas.documents import json_text, write_whole
from capnas.errors import CapnasError, StudyError, UsageError
from capnas.saved import load_model
from capnas.search import open_run, run_study, trials
from capnas.search.config import StudyConfig
from capnas.search.opening import DATA
from capnas.search.runs import RunResult
from capnas.search.storages import locked
from capnas.search.target import open_target
from capnas.search.trials import RETRAINED, parse_trial, read_retrained, rebuild, retrain_trial
from capnas.training import TrainConfig, TrainingResult, evaluate

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: ImageData) -> RunResult:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = StudyConfig(space=FILE, data="noise", study="tiny", trials=6, epochs=2, max_params=500, device="cpu", sampler="random",
                         pruner="off", out=str(folder), train={"batch_size": 32})  # fmt: skip
    run_study(config, data=data)
    return open_run(folder)


def test_best_is_the_trial_with_the_best_value(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    assert found.evaluation.values["combined"] == max(e.values["combined"] for _, e in run.evaluations() if e.values)
    assert found.candidate.n_params == found.evaluation.n_params == sum(p.numel() for p in found.model().parameters())


def test_model_has_the_weights_that_the_search_started_from(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    first, again, other = found.model(), found.model(), found.model(seed=found.evaluation.seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    seeded = dataclasses.replace(found, evaluation=dataclasses.replace(found.evaluation, seed=found.evaluation.seed + 1)).model()
    assert all(torch.equal(a, b) for a, b in zip(seeded.parameters(), other.parameters()))


def test_a_trial_over_budget_can_be_rebuilt_too(run: RunResult, data: ImageData) -> None:
    number = next(t.number for t, e in run.evaluations() if e.status == "over_budget")
    assert rebuild(run, number, data=data).candidate.n_params > 500


def test_unknown_trial_and_empty_study_are_refused(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no finished trial 99"):
        rebuild(run, 99, data=data)
    config = StudyConfig(space=FILE, data="noise", trials=1, max_params=1, out=str(tmp_path), device="cpu")
    with pytest.raises(StudyError, match="no trial with a value yet"):
        rebuild(run_study(config, data=data), data=data)


def test_an_infeasible_trial_has_no_network(tmp_path: Path, data: ImageData) -> None:
    config = StudyConfig(space=FILE, data="noise", study="tiny", trials=1, epochs=1, out=str(tmp_path / "run"), device="cpu")
    run_study(config, data=data, enqueue=[{"width": 2, "depth": 3, "kind": "bad"}])
    text = r"^trial 0 of tiny ended as infeasible \(depth 3 goes with plain only\): it has no network\.$"
    with pytest.raises(StudyError, match=text):
        rebuild(open_run(tmp_path / "run"), 0)
    with pytest.raises(StudyError, match=text):
        open_target(f"{tmp_path / 'run'}:0", data=data)


def test_a_trial_by_run_and_number(tmp_path: Path) -> None:
    assert parse_trial("a:b:7") == ("a:b", 7)
    (tmp_path / "run:1").mkdir()
    assert parse_trial(str(tmp_path / "run:1")) is None
    for text in ("x:", "x:-1", "x:²", "x:last"):
        with pytest.raises(UsageError, match=f"a trial is given as RUN:NUMBER or RUN:best, got {text!r}"):
            parse_trial(text)


def test_a_space_that_changed_since_the_search_is_noticed(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    changed = tmp_path / "tiny_space.py"
    text = Path(FILE.rpartition(":")[0]).read_text()
    changed.write_text(text.replace("nn.AdaptiveAvgPool2d((4, 1))", "nn.AdaptiveMaxPool2d((4, 1))"))
    moved = dataclasses.replace(run, config=dataclasses.replace(run.config, space=f"{changed}:space"))
    with pytest.raises(StudyError, match="changed since the search"):
        rebuild(moved, data=data)


def test_retraining_reads_test_once_and_is_kept(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    seen: list[int] = []
    record = retrain_trial(found, epochs=2, seed=3, device="cpu", on_epoch=lambda epoch, row: seen.append(epoch))
    assert seen == [1, 2]
    assert record["status"] == "complete"
    assert record["test_accuracy"] * data.sizes["test"] == pytest.approx(round(record["test_accuracy"] * data.sizes["test"]))
    assert retrain_trial(found, epochs=2, seed=3, on_epoch=lambda epoch, row: seen.append(epoch)) == record
    assert seen == [1, 2]
    saved = load_model(run.folder / record["model"])
    with data.final_evaluation() as opened:
        assert evaluate(saved, opened, "test")["accuracy"] == pytest.approx(record["test_accuracy"])
    assert not torch.equal(next(saved.parameters()), next(found.model(3).parameters()))
    assert open_target(str(run.folder / record["model"]), data=data).trained
    retrain_trial(found, epochs=1, seed=3, device="cpu")
    assert [(r["epochs"], r["seed"]) for r in read_retrained(run)] == [(2, 3), (1, 3)]
    assert np.isfinite(json.loads((run.folder / RETRAINED).read_text())[0]["test_loss"])


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a run that was begun there with relative paths, seen from another directory."""
    write_images(tmp_path / "pictures")
    shutil.copy(FILE.rpartition(":")[0], tmp_path / "sp.py")
    monkeypatch.chdir(tmp_path)
    run_study(StudyConfig(space="sp.py", data="pictures", study="s", trials=1, epochs=1, device="cpu", pruner="off", out="run",
                          train={"batch_size": 32}, data_options={"image_size": 8, "in_chans": 1}))  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_run_is_read_from_another_directory(moved: Path) -> None:
    found = rebuild(open_run("../run"))
    assert (found.run.config.space, found.run.config.data) == (str(moved / "sp.py"), str(moved / "pictures"))
    assert retrain_trial(found, epochs=1, device="cpu")["status"] == "complete"


def test_a_trial_is_shown_without_its_images(moved: Path) -> None:
    shutil.rmtree(moved / "pictures")
    found = rebuild(open_run("../run"))
    assert found.shape == {"num_classes": 3, "in_chans": 1, "image_size": 8}
    assert found.run.best is not None
    assert found.summary()["values"] == {"combined": found.run.best.values[0]}
    assert "nn.Sequential" in found.script() or "Conv2d" in found.script()
    with pytest.raises(CapnasError, match=r"^there is no folder .*pictures: bring the images back"):
        retrain_trial(found, epochs=1)
    found.run.study.set_user_attr(DATA, None)  # an older run: only its images tell the shape
    with pytest.raises(CapnasError, match=r"^there is no folder .*pictures: bring the images back"):
        rebuild(open_run("../run"))


def test_a_trial_is_not_retrained_on_images_of_other_classes(moved: Path) -> None:
    shutil.rmtree(moved / "pictures" / "2")
    found = rebuild(open_run("../run"))
    with pytest.raises(StudyError, match=r"the images pictures are not those of the search: num_classes was 3, now 2; .*Bring those of"):
        retrain_trial(found, epochs=1)
    with pytest.raises(StudyError, match="not those of the search"):
        rebuild(open_run("../run"), data=load_data(moved / "pictures"))


def test_a_trial_is_not_retrained_on_images_that_changed(moved: Path) -> None:
    first = retrain_trial(rebuild(open_run("../run")), epochs=1, device="cpu")
    shutil.move(moved / "pictures" / "0" / "0.png", moved / "pictures" / "1" / "0.png")
    with pytest.raises(StudyError, match=r"the images pictures are not those of the search: .*differ.*Bring those of"):
        retrain_trial(rebuild(open_run("../run")), epochs=1, device="cpu")
    shutil.move(moved / "pictures" / "1" / "0.png", moved / "pictures" / "0" / "0.png")
    found = rebuild(open_run("../run"))
    assert retrain_trial(found, epochs=1) == first
    (moved / "run" / RETRAINED).write_text(json.dumps([first | {"labels": "others", "test_accuracy": -1.0}]))
    assert retrain_trial(found, epochs=1, device="cpu")["test_accuracy"] >= 0


def test_a_retraining_beside_another_loses_neither(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    inner: list[int] = []

    def meanwhile(seed: int) -> None:
        if seed not in inner:
            inner.append(seed)
            retrain_trial(found, epochs=1, seed=seed, device="cpu")

    first = retrain_trial(found, epochs=1, seed=1, device="cpu", on_epoch=lambda epoch, row: meanwhile(2))
    assert [record["seed"] for record in read_retrained(found.run)] == [2, 1]
    assert first["seed"] == 1
    same = retrain_trial(found, epochs=1, seed=3, device="cpu", on_epoch=lambda epoch, row: meanwhile(3))
    assert [record["seed"] for record in read_retrained(found.run)] == [2, 1, 3]  # the one that ended first stays
    assert same == read_retrained(found.run)[-1]
    assert not list(tmp_path.glob("*.lock"))


def test_retraining_waits_for_another_that_writes(run: RunResult, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    entered: list[Path] = []

    @contextlib.contextmanager
    def others(path: Path) -> Iterator[None]:
        with locked(path):
            entered.append(path)
            write_whole(path, json_text([{"status": "failed", "seed": 9}]))
            yield

    monkeypatch.setattr(trials, "locked", others)
    retrain_trial(found, epochs=1, device="cpu")
    assert entered == [tmp_path / RETRAINED]
    assert [record["seed"] for record in read_retrained(found.run)] == [9, 0]


def test_a_retrained_network_that_is_gone_is_not_named(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    record = retrain_trial(found, epochs=1, device="cpu")
    inputs = json.loads((tmp_path / record["model"] / "manifest.json").read_text())["extra"]["inputs"]
    assert (inputs["mean"], inputs["class_names"]) == (list(found.data.mean), list(found.data.class_names))
    (tmp_path / record["model"] / "manifest.json").unlink()
    again = retrain_trial(found, epochs=1, device="cpu")
    assert (again["model"], again["test_accuracy"]) == (None, record["test_accuracy"])
    assert re.fullmatch(r"the trained network is gone: .*retrained/trial.* holds no manifest\.json; .*with another seed\.", again["reason"])


def test_a_retraining_of_another_study_or_architecture_is_not_taken(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    record = retrain_trial(found, epochs=1, device="cpu")
    old = {name: value for name, value in record.items() if name not in ("study", "hash")}
    stale: dict[str, object]
    assert record["labels"] == data.digest["labels"]
    for stale in (*(record | {name: "other"} for name in ("study", "hash", "labels")), old | {"n_params": 7}):
        (tmp_path / RETRAINED).write_text(json.dumps([stale | {"test_accuracy": -1.0}]))
        again = retrain_trial(found, epochs=1, device="cpu")
        assert again["test_accuracy"] >= 0
        assert again["model"] == record["model"] + "-2"  # the network of the other stays
        assert len(read_retrained(found.run)) == 2
    (tmp_path / RETRAINED).write_text(json.dumps([old | {"test_accuracy": -1.0}]))
    assert retrain_trial(found, epochs=1, device="cpu")["test_accuracy"] == -1


def test_a_retraining_that_did_not_complete_is_tried_again(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    record = retrain_trial(found, epochs=1, device="cpu")
    (tmp_path / RETRAINED).write_text(json.dumps([record | {"status": "diverged", "test_accuracy": None}]))
    assert retrain_trial(found, epochs=1, device="cpu")["test_accuracy"] == record["test_accuracy"]
    assert [r["status"] for r in read_retrained(found.run)] == ["diverged", "complete"]


def test_a_retraining_shuffles_by_its_own_seed(run: RunResult, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainConfig] = []

    def diverges(
        model: nn.Module, data: ImageData, config: TrainConfig, *, image_size: int, **_: object
    ) -> tuple[TrainingResult, dict[str, float]]:
        assert image_size == 7
        assert torch.equal(next(model.parameters()), next(found.model(config.seed).parameters()))
        asked.append(config)
        return TrainingResult(status="diverged"), {}

    monkeypatch.setattr(trials, "retrain", diverges)
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    found = dataclasses.replace(found, candidate=dataclasses.replace(found.candidate, image_size=7))
    records = [retrain_trial(found, epochs=5, seed=seed, device="cpu") for seed in (0, 7)]
    assert [(c.seed, c.epochs, c.batch_size) for c in asked] == [(0, 5, 32), (7, 5, 32)]
    assert [(r["seed"], r["test_accuracy"], r["model"]) for r in records] == [(0, None, None), (7, None, None)]


@pytest.mark.parametrize(
    ("error", "text"),
    [(OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left"), (UsageError("it holds\nothers"), "it holds others")],
)
def test_a_full_disk_costs_the_network_and_not_what_the_test_split_said(
    run: RunResult, data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def full(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr(trials, "save_model", full)
    found = rebuild(dataclasses.replace(run, folder=tmp_path), data=data)
    record = retrain_trial(found, epochs=1, device="cpu")
    assert (record["status"], record["model"]) == ("complete", None)
    assert f"the trained network is not kept: {text}" in record["reason"]
    assert read_retrained(found.run) == [record]


@pytest.mark.parametrize("text", ["[{", "[1]", "3", "[" * 100000])
def test_damaged_record_of_retraining_is_named(run: RunResult, tmp_path: Path, text: str) -> None:
    (tmp_path / RETRAINED).write_text(text)
    with pytest.raises(StudyError, match=rf"{RETRAINED} (is not JSON|holds a (int|list of something else)).*expected a list of results"):
        read_retrained(dataclasses.replace(run, folder=tmp_path))
