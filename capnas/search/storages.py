"""Open the storage of a study: a journal file that survives kills, or any storage of Optuna."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, journal

from capnas.errors import CapnasError, MissingDependencyError, StudyError, is_disk_full, one_line
from capnas.search.signals import whole

HIDDEN = "***"
GRACE = 10  # seconds after which the lock of a process that was killed is freed
RECORD = b'{"op_code":'  # how Optuna begins every record of a journal
_SQLITE = r"(sqlite(?:\+\w+)?:///)(?!file:)([^?]+)((?:\?.*)?)"  # a database in a file: what is before its path, the path, its settings
PATIENCE = 10.0  # seconds for a proxy to answer; a call on a dead one has no end or a message for programmers


def open_storage(url: str | None, folder: Path) -> Any:
    """The storage behind `StudyConfig.storage`.

    Raises:
        StudyError: it does not answer.
        MissingDependencyError: its driver is not installed.
    """
    try:
        if url is None or _is_journal(url):
            return Records(_journal(_journal_path(url, folder)))
        if match := re.fullmatch(r"grpc://([^:/]+):(\d+)", url):
            proxy = optuna.storages.GrpcStorageProxy(host=match[1], port=int(match[2]))
            proxy.wait_server_ready(timeout=PATIENCE)
            return proxy
        if "://" not in url:
            forms = (
                "a URL such as sqlite:///study.db, postgresql://user@host/name or grpc://host:port, or the path of a journal file, *.log"
            )
            raise StudyError(f"the storage {url or repr(url)} cannot be opened: expected {forms}.")
        return _database(url)
    except ImportError as error:
        known = str(url).startswith(("postgresql", "grpc"))
        advice = "pip install 'capnas[distributed]'" if known else "install the one that SQLAlchemy names for this database"
        raise MissingDependencyError(f"the storage {hide_password(url)} needs a driver: {advice} ({error}).") from error
    except CapnasError:
        raise
    except ConnectionError as error:
        raise StudyError(
            f"nothing answers at {hide_password(url)} within {PATIENCE:g} s: is the proxy of the storage running there?"
        ) from error
    except Exception as error:
        said = one_line(error, 300)
        if (match := re.fullmatch(_SQLITE, url or "")) and not (parent := Path(match[2]).parent).is_dir():
            said = f"there is no folder {parent}: make it, or name a file in another one."
        raise StudyError(f"the storage {hide_password(url) or folder} cannot be opened: {said}") from error


def find_study(name: str, url: str | None, folder: Path) -> optuna.Study | None:
    """A study to read; None where its storage holds none of this name. A file that is not there is not begun.

    Raises:
        StudyError, MissingDependencyError: see `open_storage`.
    """
    file = _journal_path(url, folder) if url is None or _is_journal(url) else _database_path(url)
    if file is not None and not file.is_file():
        return None
    try:
        return optuna.load_study(study_name=name, storage=open_storage(url, folder))
    except KeyError:
        return None


def _is_journal(url: str) -> bool:
    return url.endswith(".log") and "://" not in url


def _journal_path(url: str | None, folder: Path) -> Path:
    return folder / "journal.log" if url is None else Path(url)


def _database_path(url: str) -> Path | None:
    """The file of a database that is one, as far as its URL tells."""
    match = re.fullmatch(_SQLITE, url)
    return None if match is None else Path(match[2])


def _database(url: str) -> Any:
    """A storage of Optuna; of two processes that make its tables at once one fails, and finds them when it tries again."""
    for left in reversed(range(3)):
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:
            if not left or not re.search("already exists|unique constraint", str(error), re.IGNORECASE):
                raise
            time.sleep(0.5)


class Journal(journal.JournalFileBackend):
    """Optuna's journal in a file whose half records do no harm: a kill or a full disk in the middle of a write leaves them."""

    def __init__(self, path: Path, lock: Any) -> None:
        super().__init__(str(path), lock_obj=lock)
        self.path, self.lock = path, lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records: each is there whole afterwards or not at all.

        Raises:
            StudyError: the disk is full.
        """
        text, path = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode(), self.path
        try:
            with _held(self.lock):
                _cut(path)  # what another process left: a record written straight after it would be lost with it
                try:
                    with path.open("ab", buffering=0) as file:  # a buffer would be written once more when the file is closed
                        rest = memoryview(text)
                        while rest:
                            rest = rest[file.write(rest) :]
                        os.fsync(file.fileno())
                except BaseException:
                    with contextlib.suppress(OSError):
                        _cut(path)  # whole records stay: another process may have read them
                    raise
        except OSError as error:
            if is_disk_full(error):
                kept = "the finished trials are kept: make room, the same command resumes"
                raise StudyError(f"{path}: {error.strerror}; {kept}.") from error
            raise

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The records from this number on; half a record before a whole one, which older versions could leave, is taken out.

        Raises:
            StudyError: a line can be read neither as it is nor without its beginning.
        """
        number = log_number_from
        while True:
            try:
                for log in super().read_logs(number):
                    yield log
                    number += 1
                return
            except ValueError as error:
                if found := self._mend():
                    advice = "restore the file from a copy, or start anew"
                    raise StudyError(f"{self.path} is damaged in line {found[0]} ({found[1]}): {advice}.") from error

    def _mend(self) -> tuple[int, ValueError] | None:
        """Blank the half records before whole ones; the first line, from 1, that is damaged otherwise, and what is wrong with it.

        Blanks are as long as what they replace, so that nothing moves under another process that reads the file.
        """
        path, place, mended = self.path, 0, list[str]()
        damaged: tuple[int, ValueError] | None = None
        with _held(self.lock):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
                try:
                    json.loads(line)
                except ValueError as error:
                    if half := _half_record(line):
                        with path.open("r+b") as file:
                            file.seek(place)
                            file.write(b" " * half)
                        mended.append(str(number))
                    else:
                        damaged = damaged or (number, error)
                place += len(line) + 1
        if mended:
            lines = ", ".join(mended)
            warnings.warn(f"{path}: took out half a record that a failed write left, in line {lines}; whole ones are kept.", stacklevel=2)
        return damaged


class Records(JournalStorage):
    """Optuna's storage of a journal, which misses no record that a signal falls into."""

    def _sync_with_backend(self) -> None:
        with whole():  # Optuna counts a record as read before it has taken it in
            super()._sync_with_backend()


def _half_record(line: bytes) -> int:
    """The bytes of a half record, or of several, before the whole one that ends a line; 0 where the line is anything else.

    >>> _half_record(b'{"op_code":4,"trial_{"op_code":5,"worker_id":"w"}'), _half_record(b'{"op_code":4,"trial_')
    (20, 0)
    """
    if not (line.startswith(RECORD) or RECORD.startswith(line[: line.find(RECORD)])):
        return 0
    place = line.find(RECORD, 1)
    while place > 0:
        with contextlib.suppress(ValueError):
            if "worker_id" in json.loads(line[place:]):
                return place
        place = line.find(RECORD, place + 1)
    return 0


def _journal(path: Path) -> Journal:
    """The journal, first cut back to its last whole line: a process killed while writing leaves half of one, which nobody can read."""
    lock = _lock(path := path.absolute())  # the lock is a link to this path, read from beside the file
    if not _whole(path) and os.access(path.parent, os.W_OK):  # who may only read it passes over the half line
        with _held(lock):
            _cut(path)
    return Journal(path, lock)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others that ask for the same out while the block runs, for less than `GRACE` seconds; the file is made where there is none."""
    with _held(_lock(path.absolute())):
        yield


def _lock(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    _free_dangling(path)
    if not path.exists():  # that of another user may be read and not touched
        path.touch()  # before any lock: Optuna waits for ever for one whose link leads nowhere, which a killed process leaves
    return journal.JournalFileOpenLock(str(path)) if os.name == "nt" else journal.JournalFileSymlinkLock(str(path), grace_period=GRACE)


@contextlib.contextmanager
def _held(lock: Any) -> Iterator[None]:
    with whole():  # a signal at the wrong moment would leave the lock, and everybody waiting until it is freed
        lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _free_dangling(path: Path) -> None:
    """Remove a lock that leads nowhere once it is older than the time after which Optuna frees others."""
    lock = Path(f"{path}.lock")
    while lock.is_symlink() and not lock.exists():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.lstat().st_mtime > GRACE:
                lock.unlink()
            else:
                time.sleep(0.5)


def _whole(path: Path) -> bool:
    with path.open("rb") as file, contextlib.suppress(OSError):
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"
    return True


def _cut(path: Path) -> None:
    """Cut a file back to its last whole line; only under its lock."""
    if not _whole(path):
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def hide_password(url: str | None) -> str | None:
    """A storage URL without its password.

    >>> hide_password("postgresql://me:secret@db/capnas")
    'postgresql://me:***@db/capnas'
    >>> hide_password("postgresql://db/capnas?user=me&password=secret&sslmode=require")
    'postgresql://db/capnas?user=me&password=***&sslmode=require'
    """
    if url is None:
        return None
    shown = re.sub(r"(://[^:/]*):[^@]*@", rf"\1:{HIDDEN}@", url)  # as SQLAlchemy reads it: a user's name may hold an @
    return re.sub(r"([?&]\w*passw(?:or)?d=)[^&]*", rf"\g<1>{HIDDEN}", shown)


def absolute_storage(url: str | None) -> str | None:
    """A storage with the absolute path of its file, where it is one: it holds in every directory.

    >>> absolute_storage("sqlite:////x/study.db"), absolute_storage("grpc://db:1")
    ('sqlite:////x/study.db', 'grpc://db:1')
    """
    if url is not None and _is_journal(url):
        return os.path.abspath(url)
    match = re.fullmatch(_SQLITE, url or "")
    if match is None or "?" in (path := os.path.abspath(match[2])):  # from there on SQLAlchemy reads settings
        return url
    return f"{match[1]}{path}{match[3]}"


def in_memory(url: str | None) -> bool:
    """Whether a storage URL names a database that ends with its process.

    >>> [in_memory(url) for url in (None, "sqlite://", "sqlite:///:memory:", "sqlite:///study.db")]
    [False, True, True, False]
    """
    database = re.fullmatch(r"sqlite(?:\+\w+)?:/*([^?]*)\??(.*)", url or "")
    return database is not None and (database[1] in ("", ":memory:", "file::memory:") or "mode=memory" in database[2])
