"""Opening storages, and a journal that a kill has torn."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from capnas.errors import MissingDependencyError, StudyError
from capnas.search import storages
from capnas.search.config import StudyConfig
from capnas.search.opening import stored_config
from capnas.search.runs import open_run
from capnas.search.storages import absolute_storage, find_study, hide_password, in_memory, open_storage


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


@contextlib.contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """No file grows by more than so many bytes beyond the size of this one."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_no_half_record_and_harms_no_other_process(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    other = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    path = tmp_path / "journal.log"
    whole = path.read_bytes()
    with full_disk(path, 20), pytest.raises(StudyError, match=r"journal\.log: File too large; the finished trials are kept: make room"):
        study.set_user_attr("x", "y" * 50)
    assert path.read_bytes() == whole
    for writer in (other, study):
        writer.set_user_attr("z", 1)
        with path.open("ab") as file:  # killed while writing
            file.write(b'{"op_code":4,"trial')
        writer.set_user_attr("z", 2)
    assert optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").user_attrs == {"z": 2}


def test_half_a_record_before_a_whole_one_is_taken_out(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    path = tmp_path / "journal.log"
    for asked, half in enumerate((b'{"op_code":4,"tri', b'{"op', b'{"op_code":4,"tri{"op_code":8,"a'), 1):
        optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").ask()  # the study has not read this record
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines) + half)
        with path.open("ab") as file:
            file.write(b'{"op_code":2,"worker_id":"w","study_id":0,"user_attr":{"op":{"op_code":"%d"}}}\n' % len(half))
            file.write(b'{"op_code":2,"worker_id":"w","study_id":0,"user_attr":{"last":1}}\n')
        with pytest.warns(UserWarning, match=rf"took out half a record that a failed write left, in line {len(lines) + 1};"):
            assert study.user_attrs["op"] == {"op_code": str(len(half))}
        assert len(study.trials) == asked
        assert optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").user_attrs == study.user_attrs


# the second is no whole record, though it ends in one object
@pytest.mark.parametrize("line", [b"nonsense\n", b'{"op_code":4,"user_attr":{"op":{"op_code":5}\n'])
def test_damage_under_an_open_study_is_an_error_of_capnas(tmp_path: Path, line: bytes) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    lines = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(line + lines[-1])
    with pytest.raises(StudyError, match=rf"journal\.log is damaged in line {len(lines) + 1} \(Expecting .*restore the file from"):
        study.get_trials()


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
        assert backend._backend.lock.acquire()  # and is killed here: those who wait see how old it is
        assert all(link.exists() for link in Path("run").glob("*.lock"))
        assert backend._backend.lock.grace_period == storages.GRACE
        storages._free_dangling(backend._backend.path)
        assert Path(f"{backend._backend.path}.lock").is_symlink()  # which leads somewhere
        backend._backend.lock.release()


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


def test_a_database_may_have_the_ending_of_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_storage("sqlite:///study.log", Path(".")), optuna.storages._CachedStorage)
    assert [path.name for path in tmp_path.iterdir()] == ["study.log"]


def test_a_storage_that_does_not_answer() -> None:
    with pytest.raises(
        StudyError, match=r"the storage sqlite:////no/such/folder/x.db cannot be opened: there is no folder /no/such/folder: make it"
    ):
        open_storage("sqlite:////no/such/folder/x.db", Path("."))
    with pytest.raises(StudyError, match=r"the storage nonsense cannot be opened: "):
        open_storage("nonsense", Path("."))


def test_what_is_no_url_is_told_the_forms_of_a_storage() -> None:
    for given, named in (("study.db", "study.db"), ("", "''")):
        with pytest.raises(StudyError, match=rf"^the storage {named} cannot be opened: expected a URL such as sqlite:.*\*.log"):
            open_storage(given, Path("."))


def test_a_journal_of_another_user_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    path = tmp_path / "journal.log"
    path.write_bytes(path.read_bytes() + b'{"op_code":4,"trial')  # its owner is writing
    before = path.read_bytes()

    def refuse(*given: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    for call in ("symlink", "truncate"):
        monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(os, "access", lambda place, mode: mode == os.R_OK)
    again = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    assert [t.state.name for t in again.trials] == ["COMPLETE"] * 2
    assert path.read_bytes() == before


def test_passwords_are_hidden() -> None:
    assert hide_password(None) is None
    assert hide_password("sqlite:///x.db") == "sqlite:///x.db"
    assert hide_password("mysql://u:p@h:3306/d") == "mysql://u:***@h:3306/d"
    assert hide_password("redis://:p@h") == "redis://:***@h"
    assert hide_password("postgresql://me@server:p@h/d") == "postgresql://me@server:***@h/d"
    assert hide_password("mysql://h/d?passwd=p&sslpassword=q&port=1") == "mysql://h/d?passwd=***&sslpassword=***&port=1"


@pytest.mark.parametrize("url", ["sqlite:///file::memory:?cache=shared&uri=true", "sqlite:///file:x?mode=memory&uri=true"])
def test_databases_in_memory_have_many_names(url: str) -> None:
    assert in_memory(url)


def test_a_proxy_is_reached_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    proxy = SimpleNamespace(wait_server_ready=asked.update)
    monkeypatch.setattr(optuna.storages, "GrpcStorageProxy", lambda **given: asked.update(given) or proxy)
    assert open_storage("grpc://db.here:13000", Path()) is proxy
    assert asked == {"host": "db.here", "port": 13000, "timeout": storages.PATIENCE}


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("postgresql+psycopg2://me:p@db/x", r"pip install 'capnas\[distributed\]'"),
        ("mysql://db/x", "install the one that SQLAlchemy names"),
    ],
)
def test_a_driver_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, url: str, advice: str) -> None:
    def get_storage(url: str) -> None:
        raise ImportError("No module named 'driver'")

    monkeypatch.setattr(optuna.storages, "get_storage", get_storage)
    with pytest.raises(MissingDependencyError, match=rf"needs a driver: {advice}.*\(No module named 'driver'\)") as caught:
        open_storage(url, Path())
    assert ":p@" not in str(caught.value)


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, place: str) -> Iterator[None]:
    """Ctrl-C before the first call of what is at this place."""
    real, waiting = pkgutil.resolve_name(place), [signal.SIGINT]

    def called(*given: Any, **more: Any) -> Any:
        if waiting:
            signal.raise_signal(waiting.pop())
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, called)
        yield


@pytest.mark.parametrize("place", ["optuna.storages.journal._file.uuid.uuid4", "os.fsync"])
def test_a_signal_while_a_record_is_written_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    with interrupted(monkeypatch, place), pytest.raises(KeyboardInterrupt):  # the lock is released under a fresh name
        study.set_user_attr("x", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["journal.log"]
    assert optuna.load_study(storage=open_storage(None, tmp_path), study_name="s").user_attrs == {"x": 1}


def test_a_signal_while_records_are_read_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    other = optuna.load_study(storage=open_storage(None, tmp_path), study_name="s")
    other.add_trials([optuna.trial.create_trial(value=value) for value in (0.0, 1.0)])
    place = "optuna.storages.journal._storage.JournalStorageReplayResult._apply_create_trial"
    with interrupted(monkeypatch, place), pytest.raises(KeyboardInterrupt):
        study.get_trials()
    assert [t.value for t in study.get_trials()] == [0.0, 1.0]


def test_a_worker_on_a_run_takes_the_password_from_where_the_run_was_opened_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, kept = "postgresql://me:secret@db/x", optuna.storages.InMemoryStorage()
    monkeypatch.setattr(storages, "_database", {url: kept}.__getitem__)
    optuna.create_study(study_name="s", storage=kept)
    (tmp_path / "study.toml").write_text(StudyConfig(space="resnet", study="s", storage=url).to_toml())
    monkeypatch.setenv("CAPNAS_STORAGE", url)
    assert stored_config(str(tmp_path), None).storage == url
    assert "secret" not in stored_config(str(tmp_path), None).to_toml()


@pytest.mark.parametrize("form", ["{}/gone/study.log", "sqlite:///{}/gone.db", "sqlite+pysqlite:///{}/gone.db?timeout=9"])
def test_a_file_that_is_gone_is_not_begun_by_who_only_reads(form: str, tmp_path: Path) -> None:
    gone = form.format(tmp_path)
    with pytest.raises(StudyError, match="the storage holds no study of capnas named x"):
        stored_config("x", gone)
    (tmp_path / "study.toml").write_text(StudyConfig(space="resnet", storage=gone).to_toml())
    with pytest.raises(StudyError, match="holds no study named resnet-fashion-mnist-12k"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]


def test_a_study_of_another_name_is_not_found(tmp_path: Path) -> None:
    optuna.create_study(storage=open_storage(None, tmp_path), study_name="s")
    assert find_study("other", None, tmp_path) is None
    found = find_study("s", None, tmp_path)
    assert found is not None
    assert found.study_name == "s"


def test_a_path_that_a_url_cannot_hold_stays_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("plain", f"sqlite:///{tmp_path}/plain/x.db"), ("what?", "sqlite:///x.db")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert absolute_storage("sqlite:///x.db") == expected


@pytest.mark.parametrize(
    ("said", "failures", "tries"),
    [
        ("table studies already exists", 1, 2),
        ("UNIQUE constraint failed: version_info", 2, 3),
        ("table studies already exists", 9, 3),
        ("disk I/O error", 1, 1),
    ],
)
def test_a_database_whose_tables_another_process_makes_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, said: str, failures: int, tries: int
) -> None:
    calls: list[str] = []

    def get_storage(url: str) -> str:
        calls.append(url)
        if len(calls) <= failures:
            raise RuntimeError(said)
        return "opened"

    monkeypatch.setattr(optuna.storages, "get_storage", get_storage)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with contextlib.nullcontext() if tries > failures else pytest.raises(StudyError, match=f"cannot be opened: {said}"):
        assert open_storage("sqlite:///x.db", Path()) == "opened"
    assert len(calls) == tries
