"""Running studies: replay, resume, interrupt, kill, several workers, and what is left on disk."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import multiprocessing.util
import os
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from tiny_space import FILE, images, space, write_images
from torch import nn

from capnas.data import ImageData, load_data
from capnas.errors import CapnasError, SpaceError, StudyError, UsageError
from capnas.objective.claims import CLAIM
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.objective.finals import finalists, key_of, standing
from capnas.objective.stopping import MedianRule
from capnas.search import SCORE, RunResult, StudyConfig, open_run, run_study, worker
from capnas.search.export import trial_rows
from capnas.search.opening import DATA, TIMED, open_study, stored_config
from capnas.search.runs import is_finished
from capnas.search.trials import rebuild
from capnas.search.working import failures_in_a_row, make_objective, work

optuna.logging.set_verbosity(optuna.logging.CRITICAL)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(120), validation=0.2, test=0.2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "images")
    return folder


def config(folder: Path, **changes: Any) -> StudyConfig:
    given: dict[str, Any] = {
        "space": "tiny", "data": "stripes", "study": "tiny", "trials": 4, "epochs": 1, "values": ("accuracy", "macs"), "device": "cpu",
        "out": str(folder), "train": {"batch_size": 32, "lr": 0.01},
    }  # fmt: skip
    return StudyConfig(**given | changes)


def finished(result: RunResult) -> list[tuple[dict[str, Any], Any]]:
    return [(t.params, t.values) for t in result.study.get_trials() if is_finished(t)]


def test_a_trial_that_runs_is_no_row_of_the_table() -> None:
    study = optuna.create_study()
    for _ in range(2):
        Evaluation(status="complete", values={"accuracy": 0.5}).write(study.ask().set_user_attr)
    study.tell(0, 0.5)
    assert [(row["number"], row["value.accuracy"]) for row in trial_rows(study, ["accuracy"])] == [(0, 0.5)]


def test_same_seed_same_trials(tmp_path: Path, data: ImageData) -> None:
    a, b, c = (
        run_study(config(tmp_path / name, trials=13, seed=seed), space=space, data=data) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert len(finished(a)) == 13
    assert finished(a) == finished(b)
    assert finished(a) != finished(c)
    assert len({json.dumps(p) for p, _ in finished(a)}) > 3


@pytest.mark.parametrize("where", ["callback", "space"])
def test_stop_of_the_study_ends_a_session_which_goes_on_when_called_again(tmp_path: Path, data: ImageData, where: str) -> None:
    def stopping(trial: Any, **shape: int) -> nn.Module:
        if where == "space" and getattr(trial, "number", 0) == 1 and isinstance(trial, optuna.Trial) and trial.study.study_name == "tiny":
            trial.study.stop()
        return space(trial, **shape)

    told = optuna.study.MaxTrialsCallback(2, states=None) if where == "callback" else None
    asked = config(tmp_path, trials=3, finalists=1, final_epochs=1, study="tiny")
    first = run_study(asked, space=stopping, data=data, on_trial=told)
    assert (first.n_finished, first.interrupted, len(first.finals)) == (2, False, 1)
    assert "stop" not in vars(first.study)
    assert run_study(asked, space=space, data=data).n_finished == 3


@pytest.mark.parametrize(
    ("sampler", "values"), [("tpe", "combined"), ("tpe", "accuracy,macs"), ("nsga2", "accuracy,macs"), ("qmc", "accuracy")]
)
def test_interrupted_and_resumed_gives_the_trials_of_an_uninterrupted_study(
    tmp_path: Path, data: ImageData, sampler: str, values: str
) -> None:
    whole = run_study(config(tmp_path / "whole", trials=13, sampler=sampler, values=values.split(",")), space=space, data=data)
    again = config(tmp_path / "parts", trials=13, sampler=sampler, values=values.split(","))

    def stop(study: optuna.Study, trial: Any) -> None:
        if trial.number == 4:
            raise KeyboardInterrupt

    part = run_study(again, space=space, data=data, on_trial=stop)
    assert part.interrupted
    assert part.n_finished == 5
    resumed = run_study(again, space=space, data=data)
    assert not resumed.interrupted
    assert (resumed.finished_before, resumed.n_finished, resumed.finished) == (5, 13, True)
    assert finished(resumed) == finished(whole)


def test_interrupt_in_a_trial_abandons_that_one_only(tmp_path: Path, data: ImageData) -> None:
    calls = []

    def interrupting(trial: Any, **shape: Any) -> nn.Module:
        calls.append(trial.number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return space(trial, **shape)

    result = run_study(config(tmp_path, trials=5, sampler="random"), space=interrupting, data=data)
    assert result.interrupted
    states = [t.state for t in result.study.trials]
    assert states[-1] == TrialState.FAIL
    assert Evaluation.of(result.study.trials[-1]).status == "interrupted"  # type: ignore[union-attr]
    resumed = run_study(config(tmp_path, trials=5, sampler="random"), space=space, data=data)
    assert resumed.n_finished == 5
    whole = run_study(config(tmp_path / "whole", trials=5, sampler="random"), space=space, data=data)
    assert finished(resumed) == finished(whole)


def test_finished_says_so_and_trains_nothing_and_more_trials_extend_it(tmp_path: Path, data: ImageData) -> None:
    run_study(config(tmp_path), space=space, data=data)
    again = run_study(config(tmp_path), space="no such space", data=None)
    assert (again.finished_before, again.n_finished) == (4, 4)
    more = run_study(config(tmp_path, trials=6), space=space, data=data)
    assert (more.finished_before, more.n_finished) == (4, 6)
    assert open_run(tmp_path).config.trials == 6


def test_when_time_is_up_no_further_trial_begins_and_finals_follow(tmp_path: Path, data: ImageData) -> None:
    late = run_study(config(tmp_path, timeout=0.01, finalists=1, final_epochs=1), space=space, data=data)
    assert (late.n_finished, late.interrupted, len(late.finals), late.owed) == (1, False, 1, "")
    assert run_study(config(tmp_path, timeout=600.0), space=space, data=data).n_finished == 4  # another time is no other setting
    assert finished(run_study(config(tmp_path / "whole"), space=space, data=data)) == finished(late)


def test_other_settings_are_refused_and_named(tmp_path: Path, data: ImageData) -> None:
    run_study(config(tmp_path, trials=1), space=space, data=data)
    text = r"the study tiny exists with other settings: epochs was 1, now 2; max_macs was 'not set', now 9000. Choose another"
    with pytest.raises(StudyError, match=f"{text} name or folder, or repeat the settings that it has"):
        run_study(config(tmp_path, trials=1, epochs=2, max_macs=9000), space=space, data=data)
    (tmp_path / "study.toml").unlink()  # the storage remembers
    with pytest.raises(StudyError, match="seed was 0, now 5"):
        run_study(config(tmp_path, trials=1, seed=5), space=space, data=data)


def test_a_folder_that_holds_another_study_is_refused(tmp_path: Path, data: ImageData) -> None:
    run_study(config(tmp_path, trials=1), space=space, data=data)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(StudyError, match=r"holds another study: study was 'tiny', now 'foo'\. Give another --out, or another --study"):
        run_study(config(tmp_path, trials=1, study="foo"), space=space, data=data)
    with pytest.raises(StudyError, match=r"holds another study: storage was 'not set', now 'sqlite:.*x\.db'"):
        run_study(config(tmp_path, trials=1, storage=f"sqlite:///{tmp_path}/x.db"), space=space, data=data)
    with pytest.raises(StudyError, match=r"space was 'tiny', now 'other'; data was 'stripes', now 'noise'; study was 'tiny', now 'other-"):
        run_study(config(tmp_path, trials=1, study=None, space="other", data="noise"), space=space, data=data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("loss", [os.remove, lambda path: os.truncate(path, 0)])
def test_a_table_whose_trials_are_lost_is_not_replaced(tmp_path: Path, data: ImageData, loss: Any) -> None:
    run_study(config(tmp_path, trials=2), space=space, data=data)
    table = (tmp_path / "trials.csv").read_text()
    loss(tmp_path / "journal.log")
    for _ in range(2):
        with pytest.raises(StudyError, match=r"trials\.csv lists 2 finished trials, but .*journal\.log holds none\. .*bring them back"):
            run_study(config(tmp_path, trials=2), space=space, data=data)
    assert (tmp_path / "trials.csv").read_text() == table


def test_a_table_of_interrupted_trials_alone_is_replaced(tmp_path: Path, data: ImageData) -> None:
    (tmp_path / "trials.csv").write_text("number,status\n0,interrupted\n", encoding="utf-8")
    assert run_study(config(tmp_path, trials=1), space=space, data=data).n_finished == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trials.csv").write_text("number,status\n0,interrupted\n1,failed\n", encoding="utf-8")
    with pytest.raises(StudyError, match=r"trials\.csv lists 1 finished trials, but .* holds none"):
        run_study(config(tmp_path / "other", trials=1), space=space, data=data)


def test_images_that_changed_are_refused_before_a_new_trial(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    settings = config(tmp_path / "run", space=FILE, data=str(folder), trials=1, data_options={"image_size": 8, "in_chans": 1})
    run_study(settings)
    assert run_study(replace(settings, trials=2)).n_finished == 2
    (folder / "3").mkdir()
    for path in list((folder / "0").iterdir())[:20]:
        path.rename(folder / "3" / path.name)
    text = r"the images images have changed since the study tiny began: num_classes was 3, now 4.* would not be comparable: restore"
    (tmp_path / "run" / "environment.json").write_text("of the last session")
    with pytest.raises(StudyError, match=text):
        run_study(replace(settings, trials=3))
    assert (tmp_path / "run" / "environment.json").read_text() == "of the last session"
    assert open_run(tmp_path / "run").n_finished == 2
    assert run_study(replace(settings, trials=2)).finished_before == 2


@pytest.mark.parametrize("change", ["labels", "pixels"])
def test_images_relabelled_or_repainted_in_place_are_refused(tmp_path: Path, data: ImageData, change: str) -> None:
    x, y = images(120)
    other = load_data((x, 2 - y) if change == "labels" else (x[:, ::-1].copy(), y), validation=0.2, test=0.2)
    study = run_study(config(tmp_path, trials=1), space=space, data=data).study
    text = rf"have changed since the study tiny began: the {change} differ.* would not be comparable: restore the images, or give"
    with pytest.raises(StudyError, match=text):
        run_study(config(tmp_path, trials=2), space=space, data=other)
    study.set_user_attr(DATA, {k: v for k, v in study.user_attrs[DATA].items() if k != "digest"})  # of an older capnas
    assert run_study(config(tmp_path, trials=2), space=space, data=other).n_finished == 2
    with pytest.raises(StudyError, match=text):
        run_study(config(tmp_path, trials=3), space=space, data=data)


def test_latencies_of_two_types_of_device_do_not_meet_in_a_study(tmp_path: Path, data: ImageData) -> None:
    for folder, limit, refused in ((tmp_path / "timed", 1e6, True), (tmp_path / "untimed", None, False)):
        study = run_study(config(folder, trials=1, max_latency=limit), space=space, data=data).study
        assert study.user_attrs.get(TIMED) == ("cpu" if refused else None)
        study.set_user_attr(TIMED, "cuda")
        text = "the study tiny measured latency on cuda, and this session would on cpu.* give --device cuda, or another --study"
        with pytest.raises(StudyError, match=text) if refused else contextlib.nullcontext():
            run_study(config(folder, trials=2, max_latency=limit), space=space, data=data)


def test_a_study_of_unknown_images_goes_on(tmp_path: Path, data: ImageData) -> None:
    study = run_study(config(tmp_path, trials=1), space=space, data=data).study
    study.set_user_attr(DATA, None)
    other = load_data(images(90), validation=0.2, test=0.2)
    assert run_study(config(tmp_path, trials=2), space=space, data=other).study.user_attrs[DATA] is None
    assert run_study(config(tmp_path, trials=3), space=space, data=data).study.user_attrs[DATA]["sizes"] == data.sizes


def test_a_start_is_told_when_a_trial_begins_and_not_where_none_can(tmp_path: Path, data: ImageData) -> None:
    told: list[str] = []

    def run(folder: str, **changes: Any) -> None:
        run_study(
            config(tmp_path / folder, trials=1, **changes), space=space, data=data,
            on_start=lambda: told.append("start"), on_trial=lambda study, trial: told.append("trial"),
        )  # fmt: skip

    for _ in range(2):
        run("run", blocks="6")  # deeper candidates have it
        assert told == ["start", "trial"]
    with pytest.raises(UsageError, match=r"no module that runs in 1\d candidates drawn at random full-matches the block pattern 'stage'"):
        run("other", blocks="stage")
    assert told == ["start", "trial"]
    assert not (tmp_path / "other").exists()


def test_a_session_of_several_trials_starts_once(tmp_path: Path, data: ImageData) -> None:
    told: list[int] = []
    run_study(config(tmp_path, trials=2), space=space, data=data, on_start=lambda: told.append(1))
    assert told == [1]


def test_trainings_are_stopped_after_a_third_of_their_epochs_if_at_all(tmp_path: Path, data: ImageData) -> None:
    rules = [make_objective(config(tmp_path, epochs=12, pruner=pruner), space, data).stopping for pruner in ("median", "off")]
    assert rules == [MedianRule(warmup_epochs=4), None]  # the fifth is judged


def test_failures_in_a_row_are_those_of_the_session_and_of_no_signal() -> None:
    def ended(number: int, state: TrialState, status: str = "failed") -> optuna.trial.FrozenTrial:
        value = 1.0 if state == TrialState.COMPLETE else None
        attributes = {ATTRIBUTE: Evaluation(status=status).to_dict()}
        trial = optuna.trial.create_trial(state=state, value=value, user_attrs=attributes)
        trial.number = number
        return trial

    fail, done = TrialState.FAIL, TrialState.COMPLETE
    trials = [ended(0, fail), ended(1, done), ended(2, fail), ended(3, fail, "interrupted"), ended(4, fail), ended(5, TrialState.RUNNING)]
    assert [t.number for t in failures_in_a_row(trials, ())] == [2, 4]
    assert [t.number for t in failures_in_a_row(trials, (2,))] == [4]
    assert failures_in_a_row([*trials, ended(6, TrialState.PRUNED)], ()) == []


def test_each_epoch_is_told_while_a_trial_runs(tmp_path: Path, data: ImageData) -> None:
    told: list[tuple[int, int]] = []
    result = run_study(config(tmp_path, trials=2, epochs=2), space=space, data=data, on_epoch=lambda n, epoch, row: told.append((n, epoch)))
    assert told == [(t.number, row["epoch"]) for t, e in result.evaluations() for row in e.curve if e.duplicate_of is None]
    assert (0, 2) in told


@pytest.mark.parametrize("error", [ValueError("no such plot"), MemoryError("no room for the plot")])
def test_an_error_of_the_callback_ends_the_session_and_is_none_of_the_trial(tmp_path: Path, data: ImageData, error: Exception) -> None:
    def plot(number: int, epoch: int, row: dict[str, Any]) -> None:
        raise error

    settings = config(tmp_path, trials=1)
    with pytest.raises(type(error), match="plot"):
        run_study(settings, space=space, data=data, on_epoch=plot)
    assert [e.status for _, e in open_run(tmp_path).evaluations()] == ["interrupted"]
    result = run_study(settings, space=space, data=data)
    assert ([e.status for _, e in result.evaluations()], result.n_finished) == (["interrupted", "complete"], 1)


def test_errors_in_a_row_end_the_study_and_single_ones_do_not(tmp_path: Path, data: ImageData) -> None:
    def sometimes(trial: Any, **shape: Any) -> nn.Module:
        if trial.number in (1, 3, 4, 5):
            raise LookupError(f"no\nluck with {trial.number}")
        return space(trial, **shape)

    seen: list[str] = []

    def told(study: optuna.Study, trial: Any) -> None:
        seen.append(Evaluation.of(trial).status)  # type: ignore[union-attr]

    with pytest.raises(StudyError, match="3 trials in a row ended in an error, the last: LookupError: no luck with 5"):
        run_study(config(tmp_path, trials=20, sampler="random"), space=sometimes, data=data, on_trial=told)
    assert [s == "failed" for s in seen] == [False, True, False, True, True, True]
    assert [row["status"] for row in read_csv(tmp_path / "trials.csv")] == seen  # also a session that ends in an error leaves its files
    assert "torch" in json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))["packages"]

    def broken(trial: Any, **shape: Any) -> nn.Module | None:
        return None if trial.number else space(trial, **shape)

    with pytest.raises(SpaceError, match=r"must return a torch\.nn\.Module"):  # the first such error is enough
        run_study(config(tmp_path / "broken", trials=20), space=broken, data=data)
    assert len(read_csv(tmp_path / "broken" / "trials.csv")) == 2


def test_a_trial_drawn_after_the_last_one_is_marked_as_such(tmp_path: Path, data: ImageData) -> None:
    settings = config(tmp_path, trials=1)
    study, first = open_study(settings), optuna.trial.create_trial(values=[0.5, 1.0])
    objective = make_objective(settings, space, data)
    work(study, settings, objective, parallel=True, on_trial=None, on_start=lambda: study.add_trial(first))  # as another worker would
    late = study.trials[1]
    assert (late.state, late.user_attrs["capnas:status"]) == (TrialState.FAIL, "interrupted")
    assert CLAIM in late.system_attrs
    assert Evaluation.of(late).reason == "another worker drew this or the last trial first"  # type: ignore[union-attr]


def test_what_is_left_on_disk(tmp_path: Path, data: ImageData) -> None:
    result = run_study(config(tmp_path, trials=5, max_macs=40_000), space=space, data=data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["environment.json", "journal.log", "study.toml", "trials.csv"]
    rows = read_csv(tmp_path / "trials.csv")
    assert len(rows) == 5
    for row, (trial, found) in zip(rows, result.evaluations(), strict=True):
        assert int(row["number"]) == trial.number
        assert row["status"] == found.status
        assert row["param.width"] == str(trial.params["width"])
        if found.status == "complete":
            assert [float(row["value.accuracy"]), float(row["value.macs"])] == trial.values
            assert float(row["seconds.training"]) > 0
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])  # not all wheels name a build
    assert (environment["workers"], environment["device"]) == (1, "cpu")
    text = "".join((tmp_path / name).read_text() for name in ("environment.json", "study.toml", "trials.csv", "journal.log"))
    assert socket.gethostname() not in text
    assert str(Path.home()) not in text.replace(str(tmp_path), "")


def test_open_run_reads_everything(tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_study(config(tmp_path / "runs" / "tiny", trials=5), space=space, data=data)
    monkeypatch.chdir(tmp_path)
    opened = open_run("tiny")
    assert finished(opened) == finished(result)
    assert opened.config.to_dict() == result.config.to_dict()
    assert opened.best is not None
    assert opened.best.values[0] == max(t.values[0] for t in opened.front)
    assert opened.evaluation(opened.best.number).status == "complete"
    assert 0 < opened.n_complete == sum(e.status in ("complete", "duplicate") for _, e in opened.evaluations())
    with pytest.raises(StudyError, match="the study tiny has no finished trial 99; its trials: 0 to 4"):
        opened.evaluation(99)
    with pytest.raises(StudyError, match=r"tinny is not a run: no study.toml in it. Runs here: tiny"):
        open_run("tinny")
    os.remove(tmp_path / "runs" / "tiny" / "journal.log")
    with pytest.raises(StudyError, match=r"holds no journal.log: its trials are missing"):
        open_run("tiny")


def test_best_of_nothing(tmp_path: Path, data: ImageData) -> None:
    result = run_study(config(tmp_path, trials=2, max_macs=1), space=space, data=data)
    assert result.best is None
    assert result.front == []
    assert result.n_finished == 2


def test_the_best_of_a_front_has_the_best_first_value_and_came_first(tmp_path: Path) -> None:
    asked = config(tmp_path, values=("macs", "accuracy"))
    study = optuna.create_study(directions=asked.directions)
    study.add_trials([optuna.trial.create_trial(values=values) for values in ([9.0, 0.9], [5.0, 0.5], [5.0, 0.5], [7.0, 0.7])])
    found = RunResult(folder=tmp_path, config=asked, study=study)
    assert sorted(t.number for t in found.front) == [0, 1, 2, 3]
    assert found.best is not None
    assert found.best.number == 1


def test_a_database_as_storage(tmp_path: Path, data: ImageData) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    run_study(config(tmp_path / "run", storage=url, trials=2), space=space, data=data)
    assert run_study(config(tmp_path / "run", storage=url, trials=3), space=space, data=data).n_finished == 3
    assert not (tmp_path / "run" / "journal.log").exists()
    assert open_run(tmp_path / "run").n_finished == 3


def test_a_run_in_a_database_is_read_from_any_directory(tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_study(config(Path("run"), storage="sqlite:///study.db", trials=1), space=space, data=data)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert open_run(tmp_path / "run").n_finished == 1
    again = config(tmp_path / "run", storage=f"sqlite:///{tmp_path}/study.db", trials=2)
    assert run_study(again, space=space, data=data).n_finished == 2


def test_another_program_s_study_is_not_touched(tmp_path: Path, data: ImageData) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="tiny", storage=url, directions=["maximize", "minimize"]).add_trial(
        optuna.trial.create_trial(values=[1.0, 2.0])
    )
    with pytest.raises(StudyError, match="holds a study named tiny that is not of capnas"):
        run_study(config(tmp_path / "run", storage=url), space=space, data=data)


def test_worker_joins_a_study(tmp_path: Path, home: Path) -> None:
    settings = config(tmp_path, space=FILE, data=str(home / "images"), data_options={"image_size": 8, "in_chans": 1}, trials=3)
    assert worker(settings) == 3
    assert worker(settings) == 0
    assert open_run_of(settings) == 3


def test_a_worker_may_reach_the_storage_by_another_name(tmp_path: Path, home: Path) -> None:
    (tmp_path / "mounted").symlink_to(tmp_path)
    named: dict[str, Any] = {"space": FILE, "data": str(home / "images"), "data_options": {"image_size": 8, "in_chans": 1}}
    run_study(config(tmp_path / "run", storage=f"sqlite:///{tmp_path}/study.db", trials=1, **named))
    there = stored_config("tiny", f"sqlite:///{tmp_path}/mounted/study.db")
    assert worker(replace(there, trials=2)) == 1
    assert open_run(tmp_path / "run").n_finished == 2


def open_run_of(settings: StudyConfig) -> int:
    (settings.folder / "study.toml").write_text(settings.to_toml())
    return open_run(settings.folder).n_finished


def test_two_workers_reach_the_number_and_not_more(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    (tmp_path / "meeting").mkdir()
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    settings = config(
        tmp_path / "run", space=f"{FILE.removesuffix(':space')}:meeting_space", data=str(home / "images"), trials=9, workers=2,
        data_options={"image_size": 8, "in_chans": 1},
    )  # fmt: skip
    result = run_study(settings, on_trial=lambda study, trial: seen.append(trial.number))
    trials = result.study.get_trials()
    assert sum(map(is_finished, trials)) == 9
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials) == 9
    assert not any(t.state == TrialState.RUNNING for t in trials)
    assert sorted(seen) == [t.number for t in trials]
    assert len({t.system_attrs["capnas:claim"]["pid"] for t in trials if is_finished(t)}) == 2
    assert os.getpid() not in {t.system_attrs["capnas:claim"]["pid"] for t in trials if is_finished(t)}


def test_what_workers_draw_at_random_follows_from_seed_and_number(tmp_path: Path, data: ImageData) -> None:
    def drawn(folder: str, seed: int) -> list[dict[str, Any]]:
        settings = config(tmp_path / folder, sampler="random", max_macs=1, trials=6, seed=seed)
        settings.folder.mkdir()
        study = open_study(settings)
        work(study, settings, make_objective(settings, space, data), parallel=True, on_trial=None)
        return [t.params for t in study.trials]

    first = drawn("first", 0)
    assert first == drawn("again", 0)
    assert first != drawn("other", 1)
    assert len({tuple(params.items()) for params in first}) > 1


def test_workers_report_their_error_once(tmp_path: Path, data: ImageData) -> None:
    with pytest.raises(StudyError, match="several workers load space and data by name"):
        run_study(config(tmp_path, workers=2), space=space)
    with pytest.raises(SpaceError, match=r"there is no file .*nowhere.py"):
        run_study(config(tmp_path, space="nowhere.py", workers=2))
    with pytest.raises(CapnasError, match="nowhere"):
        run_study(config(tmp_path, space=FILE, data=str(tmp_path / "nowhere"), workers=2))
    assert list(tmp_path.iterdir()) == []  # nothing was run, nothing is left
    assert run_study(config(tmp_path, values=("accuracy",), trials=1), space=space, data=data).n_finished == 1


def test_any_error_and_the_warnings_of_workers_reach_the_parent(tmp_path: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sp.py").write_text(
        "import multiprocessing, warnings\n"
        "from tiny_space import space\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    import capnas.objective\n"
        "    warnings.warn('mind the\\n gap', RuntimeWarning)\n"
        "    def broken(*settings, **looked): raise LookupError('no\\n luck')\n"
        "    capnas.objective.fingerprint = broken\n"
    )
    settings = config(tmp_path / "run", space=str(tmp_path / "sp.py"), data=str(home / "images"), workers=2)
    with (
        pytest.warns(RuntimeWarning, match="^mind the gap$") as caught,
        pytest.raises(StudyError, match=r"^a worker ended with LookupError: no luck$"),
    ):
        run_study(settings)
    assert len(caught) == 1
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "run").exists()


def test_a_space_that_changed_between_two_sessions_is_told(tmp_path: Path, data: ImageData) -> None:
    def changed(layer: str, name: str = "width") -> Callable[..., nn.Module]:
        def space(trial: optuna.Trial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
            width = trial.suggest_int(name, 2, 4)
            stem = nn.Conv2d(in_chans, width, 3, stride=2 if image_size > data.image_size else 1)
            return nn.Sequential(stem, getattr(nn, layer)(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

        return space

    first = config(tmp_path, space="mine", trials=2, resolutions=(data.image_size + 4,))
    run_study(first, space=changed("ReLU"), data=data)
    more = replace(first, trials=3)
    for other, what in ((changed("SiLU"), "another architecture"), (changed("ReLU", "w"), "no network")):
        with pytest.raises(StudyError, match=f"^the space .* has changed since the study .* began: it builds {what} for trial 1. New"):
            run_study(more, space=other, data=data)
    assert open_run(first.folder).n_finished == 2
    assert run_study(more, space=changed("ReLU"), data=data).n_finished == 3


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        ("os.kill(os.getpid(), 9)", "a worker was killed by signal 9; the others do its work."),
        ("raise CapnasError('lost')", "a worker ended early and the others finished the trials: lost"),
    ],
)
def test_a_worker_that_ends_alone_is_told(tmp_path: Path, home: Path, ending: str, text: str) -> None:
    (tmp_path / "sp.py").write_text(
        "import multiprocessing, os, pathlib\n"
        "from tiny_space import space\n"
        "from capnas.errors import CapnasError\n"
        "if multiprocessing.parent_process() is not None:\n"
        "    try:\n"
        f"        pathlib.Path({str(tmp_path / 'first')!r}).touch(exist_ok=False)\n"
        "    except FileExistsError:\n"
        "        pass\n"
        "    else:\n"
        f"        {ending}\n"
    )
    settings = config(tmp_path / "run", space=str(tmp_path / "sp.py"), data=str(home / "images"), workers=2)
    with pytest.warns(RuntimeWarning) as caught:
        assert run_study(settings).n_finished >= settings.trials
    assert [str(w.message).replace(f"{tmp_path / 'sp.py'} fails when it is imported: CapnasError: ", "") for w in caught] == [text]


def test_errors_in_a_row_are_counted_over_all_workers(tmp_path: Path, home: Path) -> None:
    (tmp_path / "sp.py").write_text("def space(trial, *, num_classes, in_chans, image_size):\n    raise TypeError('always')\n")
    settings = config(tmp_path / "run", space=str(tmp_path / "sp.py"), data=str(home / "images"), workers=2, trials=3)
    text = r"trials in a row ended in an error, the last: TypeError: always. They count as finished and are not run again: once the"
    with pytest.raises(StudyError, match=text):
        run_study(settings)
    before = open_run(tmp_path / "run").n_finished
    assert 3 <= before <= 4
    with pytest.raises(StudyError, match=f"^3 {text}"):
        run_study(replace(settings, trials=20, workers=1))
    assert open_run(tmp_path / "run").n_finished == before + 3  # failures of an earlier session do not count


def test_a_data_set_that_is_not_there_leaves_no_run_behind(tmp_path: Path) -> None:
    settings = config(tmp_path, space=FILE, data="nowhere", workers=1)
    with pytest.raises(CapnasError, match="nowhere"):
        run_study(settings)
    assert not settings.folder.exists() or not any(settings.folder.iterdir())


@pytest.mark.parametrize("rated", [{"values": ("init_capacity_score",)}, {"values": ("combined",), "gate": "best:100%"}])
def test_a_study_of_another_capacity_score_is_finished_but_not_resumed(tmp_path: Path, data: ImageData, rated: dict[str, Any]) -> None:
    settings = config(tmp_path, trials=1, **rated)
    study = run_study(settings, space=space, data=data).study
    assert run_study(replace(settings, trials=2), space=space, data=data).n_finished == 2
    study.set_user_attr(SCORE, {"saturation90_mean": 3.0})
    assert run_study(replace(settings, trials=2), space=space, data=data).finished_before == 2
    with pytest.raises(StudyError, match="another definition of capacity_score"):
        run_study(replace(settings, trials=3), space=space, data=data)


@contextlib.contextmanager
def launched(folder: Path, trials: int, workers: int = 1, pause: float = 0.2) -> Iterator[subprocess.Popen[str]]:
    """A study in a process of its own."""
    script = Path(__file__).parent.parent / "tiny_space.py"
    command = [sys.executable, str(script), str(folder), str(trials), str(workers), str(pause)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def started(folder: Path, trials: int, workers: int = 1, pause: float = 0.2) -> Iterator[subprocess.Popen[str]]:
    """A study in a process of its own, after its first two trials."""
    with launched(folder, trials, workers, pause) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2):
            assert process.stdout.readline(), process.stderr.read()
        yield process


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def resume(folder: Path, home: Path, trials: int) -> RunResult:
    return run_study(
        StudyConfig(
            space=FILE, data=str(home / "images"), trials=trials, epochs=1, out=str(folder), study="tiny", device="cpu", sampler="random",
            values=("accuracy", "macs"), train={"batch_size": 32}, data_options={"image_size": 8, "in_chans": 1},
        )
    )  # fmt: skip


def test_killed_and_resumed_loses_no_finished_trial(home: Path) -> None:
    folder = home / "killed"
    with started(folder, 50) as process:
        process.kill()
    with (folder / "journal.log").open("a") as file:  # killed while writing
        file.write('{"op_code": 5, "worker_')
    before = finished(open_run(folder))
    assert len(before) >= 2
    trials = len(before) + 6  # a slow machine may have run some more before the kill
    result = resume(folder, home, trials)
    assert finished(result)[: len(before)] == before
    assert result.n_finished == trials
    assert not any(t.state == TrialState.RUNNING for t in result.study.get_trials())
    whole = resume(home / "whole", home, trials)
    assert finished(result) == finished(whole)


def test_kill_in_the_middle_of_a_trial_marks_it(home: Path) -> None:
    folder = home / "middle"
    script = f"""
import sys, os, signal; sys.path[:0] = [{str(Path(__file__).parent.parent)!r}, {str(Path(__file__).parent)!r}]
import tiny_space, capnas.objective as o
from test_search import resume
real, calls = o.train, []
def dying(*a, **k):
    calls.append(1)
    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
o.train = dying
from pathlib import Path
resume(Path({str(folder)!r}), Path({str(home)!r}), 9)
"""
    code = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True).returncode
    assert code == -signal.SIGKILL
    left = open_run(folder).study.get_trials()
    dead = left[-1]
    assert dead.state == TrialState.RUNNING
    result = resume(folder, home, 9)
    dead = result.study.get_trials()[dead.number]
    assert dead.state == TrialState.FAIL
    found = Evaluation.of(dead)
    assert found is not None
    assert (found.status, found.reason) == ("interrupted", "its process ended before it did")
    assert result.n_finished == 9


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signals_end_cleanly(home: Path, number: signal.Signals, workers: int) -> None:
    folder = home / f"signal-{number}-{workers}"
    with started(folder, 500, workers=workers, pause=0.1) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert "Traceback" not in err
    word, count = out.splitlines()[-1].split()
    assert word == "interrupted"
    opened = open_run(folder)
    assert opened.n_finished == int(count) < 500
    assert not any(t.state == TrialState.RUNNING for t in opened.study.get_trials())
    assert len(read_csv(folder / "trials.csv")) >= int(count)


def test_a_signal_that_a_space_swallows_ends_the_study_all_the_same(tmp_path: Path, data: ImageData) -> None:
    def deaf(trial: Any, **shape: int) -> nn.Module:
        if trial.number == 2:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        return space(trial, **shape)

    result = run_study(config(tmp_path / "run", trials=6, workers=1), space=deaf, data=data)
    assert result.interrupted
    assert result.n_finished == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_trial_is_being_drawn_leaves_none_running(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    ask = optuna.Study.ask

    def interrupted(self: optuna.Study, *args: Any, **kwargs: Any) -> optuna.Trial:
        trial = ask(self, *args, **kwargs)
        if trial.number == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # for the handler, which runs between two steps of the interpreter
        return trial

    monkeypatch.setattr(optuna.Study, "ask", interrupted)
    result = run_study(config(tmp_path / "run", trials=6, workers=1), space=space, data=data)
    assert result.interrupted
    assert [t.state for t in result.study.trials] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert result.n_finished == 2


@pytest.mark.parametrize(
    ("place", "before", "state", "status", "n_finished"),
    [
        ("optuna.Trial.set_constraint", True, TrialState.FAIL, "interrupted", 1),
        ("capnas.objective.Objective._store", True, TrialState.FAIL, "interrupted", 1),
        ("capnas.objective.Objective._store", False, TrialState.COMPLETE, "complete", 2),
        ("optuna.Study.tell", True, TrialState.COMPLETE, "complete", 2),
        ("optuna.Study.tell", False, TrialState.COMPLETE, "complete", 2),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_signal_while_a_trial_ends_leaves_it_what_it_has_stored(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, place: str, before: bool, state: TrialState, status: str, n_finished: int,
    alone: bool,
) -> None:  # fmt: skip
    real, waiting = pkgutil.resolve_name(place), [signal.SIGTERM]

    def interrupted(*given: Any, **more: Any) -> Any:
        now = waiting and any(getattr(g, "number", g) == 1 for g in given if isinstance(g, int | optuna.Trial))
        if now and before:
            signal.raise_signal(waiting.pop())
        result = real(*given, **more)
        if now and not before:
            signal.raise_signal(waiting.pop())
        return result

    monkeypatch.setattr(place, interrupted)
    settings = config(tmp_path, space=FILE, data=str(home / "images"), sampler="random", data_options={"image_size": 8, "in_chans": 1})
    if alone:
        assert run_study(settings).interrupted
    else:
        with pytest.raises(KeyboardInterrupt):
            worker(settings)
        (settings.folder / "study.toml").write_text(settings.to_toml())
    result = open_run(tmp_path)
    trial = result.study.trials[1]
    assert (trial.state, trial.user_attrs["capnas:status"], result.n_finished) == (state, status, n_finished)
    assert Evaluation.of(trial).status == status  # type: ignore[union-attr]


def is_worker(pid: str) -> bool:
    with contextlib.suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def importing(process: subprocess.Popen[str]) -> list[str]:
    """The ids of both workers of a study, as soon as they are there."""
    deadline = time.monotonic() + 120
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(workers := [pid for pid in children.read_text().split() if is_worker(pid)]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return workers


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="sees the workers start in /proc")
def test_ctrl_c_while_the_workers_import_ends_cleanly(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "importing"
    monkeypatch.setenv("IMPORTING", "300")  # seconds: until they are ended

    with launched(folder, 500, workers=2) as process:
        workers = importing(process)
        for pid in workers:  # a shell sends it to all of them, in any order
            os.kill(int(pid), signal.SIGINT)
        time.sleep(1.5)
        assert all(map(is_worker, workers))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.splitlines()[-1] == "interrupted 0"


@pytest.mark.skipif(os.name == "nt", reason="workers start in another way")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_worker_starts_ends_that_one_too(home: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    spawn, workers = multiprocessing.util.spawnv_passfds, list[int]()

    def interrupted(program: Any, words: Any, descriptors: Any) -> int:
        pid = spawn(program, words, descriptors)
        if "--multiprocessing-fork" in words:  # the tracker of resources is another one
            workers.append(pid)
            if len(workers) == 2:
                signal.raise_signal(number)  # before it is told what to do
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", interrupted)
    settings = config(home / f"starting-{number}", space=FILE, data=str(home / "images"), workers=2, data_options={"image_size": 8})
    result = run_study(settings)
    assert result.interrupted
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ChildProcessError):  # it was ended, and waited for
            os.waitpid(pid, os.WNOHANG)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="sees the workers start in /proc")
def test_workers_whose_parent_is_killed_while_they_import_leave_its_folder_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "left"
    monkeypatch.setenv("IMPORTING", "3")  # seconds: time to kill it and to remove the folder
    with launched(folder, 500, workers=2) as process:
        workers = importing(process)
        process.kill()
    shutil.rmtree(folder)
    deadline = time.monotonic() + 120
    while any(map(is_worker, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not folder.exists()


def test_workers_end_when_their_parent_is_killed(home: Path) -> None:
    folder = home / "orphans"
    with started(folder, 5000, workers=2) as process:
        process.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.3)
        running = [t for t in open_run(folder).study.get_trials() if t.state == TrialState.RUNNING]
        count = open_run(folder).n_finished
        time.sleep(0.7)
        if count == open_run(folder).n_finished and not running:
            break
    else:
        pytest.fail("the workers went on without their parent")


POOL = {"pool": 5, "gate": "log2_paths:best:30%", "trials": 5}


@pytest.mark.parametrize(("sampler", "values", "after"), [("tpe", "combined", "on_trial"), ("nsga2", "accuracy,macs", "on_epoch")])
def test_a_pool_is_the_same_after_an_interruption_and_only_trained_trials_count(
    tmp_path: Path, data: ImageData, sampler: str, values: str, after: str
) -> None:
    asked = partial(config, sampler=sampler, values=values.split(","), **POOL)
    states: list[TrialState] = []
    whole = run_study(asked(tmp_path / "whole"), space=space, data=data, on_trial=lambda _, trial: states.append(trial.state))
    assert states == [trial.state for trial in whole.study.trials]  # each had ended
    statuses = [e.status for _, e in whole.evaluations()]
    before = statuses[: statuses.index("complete")]
    assert before.count("measured") == 5
    assert set(before) == {"measured", "infeasible"}
    assert sum(s in ("complete", "duplicate") for s in statuses) == whole.n_finished == 5

    told = itertools.count(1)

    def interrupt(*_: Any) -> None:
        if next(told) == 3:  # in the pool, or while the third of its best is trained, which is queued anew
            raise KeyboardInterrupt

    again = asked(tmp_path / "parts")
    part = run_study(again, space=space, data=data, **{after: interrupt})
    assert part.interrupted
    resumed = run_study(again, space=space, data=data)
    ended = [[(t.params, t.values, e.status) for t, e in r.evaluations() if e.status != "interrupted"] for r in (whole, resumed)]
    assert ended[0] == ended[1]
    assert resumed.finished


@pytest.mark.slow
def test_two_workers_share_a_pool(tmp_path: Path, home: Path) -> None:
    asked = config(
        tmp_path / "two", space=FILE, data=str(home / "images"), workers=2, data_options={"image_size": 8, "in_chans": 1}, **POOL
    )  # fmt: skip
    result = run_study(asked)
    assert result.n_finished == 5
    found = [e for _, e in result.evaluations() if e.status != "interrupted"]
    assert sum(e.status == "measured" for e in found) >= 5
    trained = [(e.hash, e.image_size) for e in found if e.status == "complete"]
    assert len(set(trained)) == len(trained)


@pytest.mark.parametrize("preset", ["principled", "principled-pareto"])
def test_a_search_with_a_founding_preset_on_real_images(tmp_path: Path, preset: str) -> None:
    pool = load_data("fashion-mnist-12k").pool
    some = load_data((pool.images[::30].numpy(), pool.labels[::30].numpy()), validation=0.2, test=0.2)
    settings = StudyConfig(space="resnet", data="some of fashion-mnist-12k", values=preset, trials=2, epochs=1, seed=1, device="cpu",
                           study="preset", out=str(tmp_path / "run"))  # fmt: skip
    result = run_study(settings, data=some)
    trials = [(t, e) for t, e in open_run(tmp_path / "run").evaluations() if e.status == "complete"]
    assert result.n_finished == 2
    assert trials
    for trial, evaluation in trials:
        assert evaluation.profile is not None
        assert {"saturation", "capacity"} <= set(evaluation.profile.measures)
        assert 0 <= evaluation.metrics["capacity_slack"] <= 1
        assert list(trial.values) == list(evaluation.values.values())
        assert len(trial.values) == (1 if preset == "principled" else 5)


def test_finals_are_held_at_the_end_and_resumed(tmp_path: Path, data: ImageData) -> None:
    asked = config(tmp_path / "a", trials=12, seed=1, values="accuracy", finalists=2)
    told: list[tuple[int, int]] = []
    result = run_study(asked, space=space, data=data, on_final=lambda trial, record, left: told.append((trial.number, left)))
    finals = {trial.number: dict(final) for trial, final in result.finals}
    assert told == [(number, left) for number, left in zip(finals, (1, 0))]
    assert {final["epochs"] for final in finals.values()} == {4}
    assert result.best is not None
    assert standing(finals[result.best.number]) == max(map(standing, finals.values()))
    assert (result.n_finals_left, result.n_finished) == (0, 12)
    told.clear()
    again = run_study(asked, space=space, data=data, on_final=lambda trial, record, left: told.append((trial.number, left)))
    assert (told, again.best) == ([], result.best)
    assert open_run(tmp_path / "a").best == result.best
    more = run_study(
        replace(asked, finalists=3), space=space, data=data, on_final=lambda trial, record, left: told.append((trial.number, left))
    )
    assert [number for number, _ in told] == [trial.number for trial, _ in more.finals if trial.number not in finals]
    assert len(told) == 1


def test_without_finals_the_best_value_is_named(tmp_path: Path, data: ImageData) -> None:
    asked = config(tmp_path / "a", trials=12, seed=1, values="accuracy")
    plain = run_study(asked, space=space, data=data)
    assert plain.best is not None
    assert (plain.finals, plain.n_finals_left) == ([], 0)
    assert "finalists" not in (tmp_path / "a" / "study.toml").read_text()
    half = replace(plain, config=replace(asked, finalists=2))
    assert half.best == plain.best  # until they were held
    assert half.n_finals_left == 2
    first, second = finalists(plain.study, 2)
    for trial, accuracy in ((first, 0.1), (second, 0.2)):
        record = {
            "epochs": 4,
            "settings": "",
            "status": "complete",
            "accuracy": accuracy,
            "val_loss": 1.0,
            "train_loss": 1.0,
            "reason": "",
            "seconds": 1.0,
        }
        plain.study.set_user_attr(key_of(trial.number, 4), record)
    assert half.best == second != plain.best


def test_a_signal_in_the_finals_leaves_what_was_trained(tmp_path: Path, data: ImageData) -> None:
    asked = config(tmp_path / "a", trials=12, seed=1, values="accuracy", finalists=3)

    def stop(trial: optuna.trial.FrozenTrial, record: Any, left: int) -> None:
        raise KeyboardInterrupt

    result = run_study(asked, space=space, data=data, on_final=stop)
    assert (result.interrupted, len(result.finals), result.n_finals_left) == (True, 1, 2)
    assert run_study(asked, space=space, data=data).n_finals_left == 0


def test_finals_on_other_images_are_refused(tmp_path: Path, data: ImageData) -> None:
    run_study(config(tmp_path / "a", values="accuracy"), space=space, data=data)
    other = load_data(images(120, seed=5), validation=0.2, test=0.2)
    with pytest.raises(StudyError, match="images"):
        run_study(config(tmp_path / "a", values="accuracy", finalists=1), space=space, data=other)


def test_several_workers_leave_the_finals_to_the_one_that_started_them(home: Path, tmp_path: Path) -> None:
    asked = config(
        tmp_path / "a", space=FILE, data=str(home / "images"), trials=4, workers=2, values="accuracy", finalists=1,
        data_options={"validation": 0.2, "test": 0.2},
    )  # fmt: skip
    result = run_study(asked)
    assert len(result.finals) == 1
    assert result.best == result.finals[0][0]


def test_a_study_without_trials_that_another_program_made_for_other_directions_is_not_touched(tmp_path: Path, data: ImageData) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="tiny", storage=url, directions=["minimize", "maximize", "minimize"])
    with pytest.raises(StudyError, match="holds a study named tiny that is not of capnas"):
        run_study(config(tmp_path / "run", storage=url), space=space, data=data)
    assert study.trials == []
    assert study.user_attrs == {}


def test_the_device_of_a_worker_is_its_own(tmp_path: Path, home: Path) -> None:
    named: dict[str, Any] = {"space": FILE, "data": str(home / "images"), "data_options": {"image_size": 8, "in_chans": 1}}
    url = f"sqlite:///{tmp_path}/study.db"
    run_study(config(tmp_path / "run", storage=url, trials=1, device="auto", **named))
    assert worker(replace(stored_config("tiny", url), trials=2), device="cpu") == 1
    assert stored_config("tiny", url).device == "auto"


def test_a_trial_that_never_had_a_network_says_how_it_ended(tmp_path: Path, data: ImageData) -> None:
    def breaks(trial: Any, **sizes: int) -> nn.Module:
        raise KeyError(trial.suggest_int("w", 1, 2))

    run_study(config(tmp_path, trials=1), space=breaks, data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capnas.search.trials.load_space", lambda _: breaks)
        with pytest.raises(StudyError, match=r"trial 0 of tiny ended as failed \(KeyError: .*\): it has no network"):
            rebuild(open_run(tmp_path), 0)
