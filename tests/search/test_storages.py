"""Opening storages, and a journal that a kill has torn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from capnas.errors import StudyError
from capnas.search import storages
from capnas.search.storages import hide_password, open_storage


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "trial')
    study = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    assert path.read_bytes() == whole
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    assert [t.state.name for t in again.trials] == ["COMPLETE"] * 4


def test_journal_elsewhere_and_empty_journal(tmp_path: Path) -> None:
    (tmp_path / "x.log").touch()
    optuna.create_study(storage=open_storage(str(tmp_path / "x.log"), tmp_path), study_name="s")
    assert (tmp_path / "x.log").stat().st_size > 0
    assert not (tmp_path / "journal.log").exists()


def test_the_lock_of_a_killed_process_is_freed_in_a_folder_named_relatively(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    lock = Path("run/journal.log.lock")
    lock.symlink_to("run/journal.log")  # leads nowhere, as one does that a process leaves with a relative path
    long_ago = time.time() - 60
    os.utime(lock, (long_ago, long_ago), follow_symlinks=False)
    storage = open_storage(None, Path("run"))
    assert not lock.is_symlink()
    for backend in (storage, open_storage("run/other.log", Path("run"))):
        assert backend._backend._lock.acquire()  # and is killed here: those who wait see how old it is
        assert all(link.exists() for link in Path("run").glob("*.lock"))
        backend._backend._lock.release()


class Clock:
    """Stands in for the module ``time``: sleeping passes the time, and what is to happen meanwhile happens."""

    def __init__(self, meanwhile: Callable[[float], None]) -> None:
        self.now, self.meanwhile = 1_000_000.0, meanwhile

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.meanwhile(self.now - 1_000_000.0)
        self.now += seconds


def dangling(folder: Path) -> Path:
    """A lock made when the clock starts, whose link leads nowhere."""
    lock = folder / "journal.log.lock"
    lock.symlink_to("no/such/journal.log")
    os.utime(lock, (1_000_000.0, 1_000_000.0), follow_symlinks=False)
    return lock


def test_a_fresh_dangling_lock_is_respected_for_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held = dangling(tmp_path), []
    clock = Clock(lambda passed: held.append((passed, lock.is_symlink())))
    monkeypatch.setattr(storages, "time", clock)
    open_storage(None, tmp_path)
    assert all(there for _, there in held)
    assert 9 < held[-1][0] <= 10
    assert not lock.is_symlink()


def test_a_fresh_dangling_lock_that_its_owner_releases_is_waited_for_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, waits = dangling(tmp_path), []

    def meanwhile(passed: float) -> None:
        waits.append(passed)
        if len(waits) == 2:
            lock.unlink()

    monkeypatch.setattr(storages, "time", Clock(meanwhile))
    open_storage(None, tmp_path)
    assert len(waits) == 2
    assert (tmp_path / "journal.log").is_file()


def test_a_storage_that_does_not_answer() -> None:
    with pytest.raises(StudyError, match=r"the storage sqlite:////no/such/folder/x.db cannot be opened: "):
        open_storage("sqlite:////no/such/folder/x.db", Path("."))
    with pytest.raises(StudyError, match=r"the storage nonsense cannot be opened: "):
        open_storage("nonsense", Path("."))


def test_passwords_are_hidden() -> None:
    assert hide_password(None) is None
    assert hide_password("sqlite:///x.db") == "sqlite:///x.db"
    assert hide_password("mysql://u:p@h:3306/d") == "mysql://u:***@h:3306/d"
