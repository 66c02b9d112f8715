"""Two processes that begin a study at once: one of them is refused, and takes nothing from the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from tiny_space import images, space

import capnas.search
from capnas.data import ImageData, load_data
from capnas.errors import StudyError
from capnas.objective import claims
from capnas.search import StudyConfig, run_study
from capnas.search.opening import ATTRIBUTE, OPENER, SCORE, open_study, opened_here
from capnas.search.storages import Journal, open_storage


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(60), validation=0.2, test=0.2)


def config(folder: Path, **changes: Any) -> StudyConfig:
    given: dict[str, Any] = {"space": "tiny", "data": "stripes", "study": "tiny", "trials": 1, "epochs": 1, "values": ("macs",)}
    return StudyConfig(**given | {"device": "cpu", "out": str(folder)} | changes)


def test_a_study_that_another_process_begins_is_not_begun_anew_with_other_settings(tmp_path: Path, data: ImageData) -> None:
    (tmp_path / "run").mkdir()
    study = open_study(config(tmp_path / "run"))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        study.set_user_attr(OPENER, {"host": claims.host(), "pid": other.pid, "started": claims.started(other.pid)})
        journal = (tmp_path / "run" / "journal.log").read_bytes()
        text = "another process is beginning the study tiny with other settings: seed was 0, now 5"
        with pytest.raises(StudyError, match=text):
            run_study(config(tmp_path / "run", seed=5), space=space, data=data)
        assert (tmp_path / "run" / "journal.log").read_bytes().startswith(journal)
        assert not opened_here(open_study(config(tmp_path / "run")))  # with its settings it is joined
        other.kill()
    assert opened_here(open_study(config(tmp_path / "run")))
    assert run_study(config(tmp_path / "run", seed=5), space=space, data=data).n_finished == 1


def test_the_refused_one_of_two_leaves_the_folder_of_the_other(tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(mine: StudyConfig) -> optuna.Study:
        run_study(config(tmp_path / "run"), space=space, data=data)  # the other was quicker
        return open_study(mine)

    def once(mine: StudyConfig) -> optuna.Study:
        monkeypatch.setattr(capnas.search, "open_study", open_study)
        return late(mine)

    monkeypatch.setattr(capnas.search, "open_study", once)
    with pytest.raises(StudyError, match="exists with other settings: seed was 0, now 5"):
        run_study(config(tmp_path / "run", seed=5), space=space, data=data)
    assert run_study(config(tmp_path / "run", trials=2), space=space, data=data).finished_before == 1


def test_settings_that_another_process_wrote_over_are_noticed_before_the_first_trial(
    tmp_path: Path, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raced(mine: StudyConfig) -> optuna.Study:
        study = open_study(mine)
        study.set_user_attr(ATTRIBUTE, config(tmp_path, seed=7).to_dict())
        return study

    monkeypatch.setattr(capnas.search, "open_study", raced)
    with pytest.raises(StudyError, match="with other settings: seed was 7, now 0"):
        run_study(config(tmp_path / "run"), space=space, data=data)


@pytest.mark.parametrize(("text", "calls"), [("UNIQUE constraint failed: alembic_version", 2), ("no such host", 1)])
def test_tables_that_another_process_makes_meanwhile_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, calls: int
) -> None:
    get, asked = optuna.storages.get_storage, list[str]()

    def first_fails(url: str) -> Any:
        asked.append(url)
        if len(asked) == 1:
            raise ValueError(text)
        return get(url)

    monkeypatch.setattr(optuna.storages, "get_storage", first_fails)
    if calls == 1:
        with pytest.raises(StudyError, match=text):
            open_storage("sqlite://", tmp_path)
    else:
        open_storage("sqlite://", tmp_path)
    assert len(asked) == calls


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_signal_while_a_study_is_made_leaves_it_whole_or_to_be_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left, append = [writes], Journal.append_logs

    def interrupted(self: Journal, logs: list[dict[str, Any]]) -> None:
        append(self, logs)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append_logs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_study(config(tmp_path))
    assert writes < 5 or ATTRIBUTE in optuna.load_study(study_name="tiny", storage=open_storage(None, tmp_path)).user_attrs
    study = open_study(config(tmp_path))
    assert study.metric_names == ["macs"]
    assert {ATTRIBUTE, OPENER, SCORE} <= study.user_attrs.keys()
