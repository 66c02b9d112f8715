"""Which process runs which trial, so that trials of killed processes are told from trials that are running.

Optuna's heartbeat works with relational storages only. Here each trial carries a claim: a digest of the host (its name is not
stored), the process id and the start of the process. A claim of this host is checked against its processes; one of another host
can only be judged by its age.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from capnas.objective.evaluation import Evaluation, stored_with

CLAIM = "capnas:claim"  # key of the trial's system attribute
STALE_AFTER = 6 * 3600.0  # seconds until a trial of another host counts as abandoned
GRACE = 30.0  # seconds that a process may take between creating a trial and claiming it
_QUERY, _DENIED, _ACTIVE = 0x1000, 5, 259  # Windows: PROCESS_QUERY_LIMITED_INFORMATION, ERROR_ACCESS_DENIED, STILL_ACTIVE

_mine: set[tuple[str, int]] = set()


@contextlib.contextmanager
def claimed(trial: Any) -> Iterator[None]:
    """Mark a trial of a study as run by this process while the block runs; other trials (``FixedTrial``) pass through."""
    if not isinstance(trial, optuna.Trial):
        yield
        return
    key = (trial.study.study_name, trial.number)
    outer = key in _mine  # claimed by who runs the study, until that one has told its end
    _mine.add(key)
    try:
        trial.storage.set_trial_system_attr(trial._trial_id, CLAIM, own_claim() | {"at": time.time()})
        yield
    finally:
        if not outer:
            _mine.discard(key)


def own_claim() -> dict[str, Any]:
    """The claim of this process, in JSON values."""
    return {"host": host(), "pid": os.getpid(), "started": started(os.getpid())}


def at_work(claim: Mapping[str, Any]) -> bool:
    """Whether the process of a claim is on this host and runs still."""
    return claim["host"] == host() and _exists(claim["pid"]) and started(claim["pid"]) == claim["started"]


@functools.cache
def host() -> str:
    """A digest that tells hosts, their boots and their process namespaces apart."""
    parts = [platform.node()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: str(os.stat("/proc/self/ns/pid").st_ino)):
        with contextlib.suppress(OSError):
            parts.append(read())
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where there is none that runs, or no /proc."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]  # a zombie has ended, and stays listed until its parent asks for that
    except (OSError, IndexError, ValueError):
        return None


def abandoned(trial: optuna.trial.FrozenTrial, study_name: str, *, stale_after: float = STALE_AFTER) -> str | None:
    """Why a RUNNING trial is not running any more, or None where it is or may be.

    Args:
        trial: a trial in state RUNNING.
        study_name: of its study.
        stale_after: seconds since its start after which a trial of another host is given up.
    """
    claim = trial.system_attrs.get(CLAIM)
    age = _age(trial) if claim is None or "at" not in claim else time.time() - claim["at"]  # databases keep times without their zone
    if claim is None:
        return f"no process claimed it within {GRACE:.0f} s" if age > GRACE else None
    if claim["host"] != host():
        return f"another host has not finished it in {stale_after:.0f} s" if age > stale_after else None
    if claim["pid"] == os.getpid() and claim["started"] == started(os.getpid()):
        return None if (study_name, trial.number) in _mine else "its process went on without it"
    if not at_work(claim):
        return "its process ended before it did"
    return None


def sweep(study: optuna.Study, *, stale_after: float = STALE_AFTER) -> list[int]:
    """End the trials whose process is gone, so that no sampler waits for them or avoids them.

    A trial of this host is judged by its process, one of another host by its age. Where the process got as far as storing a result,
    the trial gets it; else it fails and is marked "interrupted".

    Args:
        study: any study run by `capnas.Objective`.
        stale_after: seconds until a trial of another host is given up.

    Returns:
        The numbers of the trials that were ended.
    """
    ended = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        why = abandoned(trial, study.study_name, stale_after=stale_after)
        if why is None:
            continue
        stored = stored_with(trial)
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):  # another worker swept it first
            if not stored:
                write = functools.partial(study._storage.set_trial_user_attr, trial._trial_id)
                Evaluation(status="interrupted", reason=why, params=trial.params).write(write)
                study.tell(trial.number, state=TrialState.FAIL)
            elif stored["values"]:
                study.tell(trial.number, list(stored["values"].values()))
            else:
                failed = stored["status"] in ("failed", "interrupted")
                study.tell(trial.number, state=TrialState.FAIL if failed else TrialState.PRUNED)
            ended.append(trial.number)
    return ended


def local(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a RUNNING trial is this host's or too young to be anyone's: its end, good or bad, is worth waiting for."""
    claim = trial.system_attrs.get(CLAIM)
    return claim is None or claim["host"] == host()


def _age(trial: optuna.trial.FrozenTrial) -> float:
    start = trial.datetime_start
    if start is None:
        return 0.0
    return (datetime.datetime.now(start.tzinfo) - start).total_seconds()


def _exists(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C, to the process and those it started
        return _exists_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exists_on_windows(pid: int) -> bool:
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel.OpenProcess.restype = ctypes.c_void_p  # a handle is as wide as a pointer
    handle = kernel.OpenProcess(_QUERY, False, pid)
    if not handle:
        return bool(ctypes.get_last_error() == _DENIED)  # type: ignore[attr-defined]
    try:
        code = ctypes.c_ulong()
        return bool(kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))) and code.value == _ACTIVE
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
