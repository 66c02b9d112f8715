"""Open the storage of a study: a journal file that survives kills, or any storage of Optuna."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage, journal

from capnas.errors import CapnasError, MissingDependencyError, StudyError

HIDDEN = "***"
GRACE = 10  # seconds after which the lock of a process that was killed is freed
PATIENCE = 10.0  # seconds for a proxy to answer; a call on a dead one has no end or a message for programmers


def open_storage(url: str | None, folder: Path) -> Any:
    """The storage behind `StudyConfig.storage`.

    Raises:
        StudyError: it does not answer.
        MissingDependencyError: its driver is not installed.
    """
    try:
        if url is None or url.endswith(".log"):
            return JournalStorage(_journal(folder / "journal.log" if url is None else Path(url)))
        if match := re.fullmatch(r"grpc://([^:/]+):(\d+)", url):
            proxy = optuna.storages.GrpcStorageProxy(host=match[1], port=int(match[2]))
            proxy.wait_server_ready(timeout=PATIENCE)
            return proxy
        return optuna.storages.get_storage(url)
    except ImportError as error:
        known = str(url).startswith(("postgresql", "grpc"))
        advice = "pip install capnas[distributed]" if known else "install the one that SQLAlchemy names for this database"
        raise MissingDependencyError(f"the storage {hide_password(url)} needs a driver: {advice} ({error}).") from error
    except CapnasError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # only a journal holds JSON
        path = folder / "journal.log" if url is None else Path(url)
        raise StudyError(f"{path} is damaged in line {_damaged(path)} ({error}): restore the file from a copy, or start anew.") from error
    except ConnectionError as error:
        raise StudyError(
            f"nothing answers at {hide_password(url)} within {PATIENCE:g} s: is the proxy of the storage running there?"
        ) from error
    except Exception as error:
        raise StudyError(f"the storage {hide_password(url) or folder} cannot be opened: {' '.join(str(error).split())[:300]}") from error


def _journal(path: Path) -> journal.JournalFileBackend:
    """Optuna's journal, first cut back to its last whole line: a process killed while writing leaves half of one, which nobody can read."""
    path = path.absolute()  # the lock is a link to this path, read from beside the file
    path.parent.mkdir(parents=True, exist_ok=True)
    _free_dangling(path)
    path.touch()  # before any lock: Optuna waits for ever for one whose link leads nowhere, which a killed process leaves
    lock = journal.JournalFileOpenLock(str(path)) if os.name == "nt" else journal.JournalFileSymlinkLock(str(path), grace_period=GRACE)
    if not _whole(path):
        lock.acquire()
        try:
            text = path.read_bytes()
            if not text.endswith(b"\n"):
                with path.open("r+b") as file:
                    file.truncate(text.rfind(b"\n") + 1)
        finally:
            lock.release()
    return journal.JournalFileBackend(str(path), lock_obj=lock)


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


def _damaged(path: Path) -> int:
    """The number of the first line that is no JSON, from 1."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError:
            return number
    return len(lines)


def hide_password(url: str | None) -> str | None:
    """A storage URL without its password.

    >>> hide_password("postgresql://me:secret@db/capnas")
    'postgresql://me:***@db/capnas'
    """
    return None if url is None else re.sub(r"(://[^:/@]*):[^@]*@", rf"\1:{HIDDEN}@", url)


def in_memory(url: str | None) -> bool:
    """Whether a storage URL names a database that ends with its process.

    >>> [in_memory(url) for url in (None, "sqlite://", "sqlite:///:memory:", "sqlite:///study.db")]
    [False, True, True, False]
    """
    database = re.fullmatch(r"sqlite(?:\+\w+)?:/*([^?]*)\??(.*)", url or "")
    return database is not None and (database[1] in ("", ":memory:", "file::memory:") or "mode=memory" in database[2])
