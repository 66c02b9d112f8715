"""Claims: which RUNNING trials are really running."""

from __future__ import annotations

import ctypes
import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from capnas.objective import claims
from capnas.objective.claims import CLAIM, GRACE, at_work, claimed, host, local, own_claim, started, sweep
from capnas.objective.evaluation import ATTRIBUTE, Evaluation


def study_with(claim: dict[str, Any] | None, age: float, evaluation: Evaluation | None = None) -> optuna.Study:
    study = optuna.create_study(study_name="s")
    start = datetime.datetime.now() - datetime.timedelta(seconds=age)
    trial = create_trial(state=TrialState.RUNNING, system_attrs={} if claim is None else {CLAIM: claim})
    trial.datetime_start = start
    if evaluation is not None:
        trial.user_attrs[ATTRIBUTE] = evaluation.to_dict()
    study._storage.create_new_trial(study._study_id, template_trial=trial)
    return study


def mine(**changes: Any) -> dict[str, Any]:
    return {"host": host(), "pid": os.getpid(), "started": started(os.getpid())} | changes


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("claim", "age", "reason"),
    [
        ("mine", 1, "its process went on without it"),
        ("dead", 1, "its process ended before it did"),
        ("reused", 1, "its process ended before it did"),
        ("parent", 10**6, None),
        ("elsewhere", 50, None),
        ("elsewhere", 200, "another host has not finished it in 100 s"),
        (None, 1, None),
        (None, GRACE + 5, f"no process claimed it within {GRACE:.0f} s"),
    ],
)
def test_who_is_abandoned(claim: str | None, age: float, reason: str | None) -> None:
    claims = {
        "mine": mine(), "dead": mine(pid=dead_pid()), "reused": mine(pid=os.getppid(), started="1"),
        "parent": mine(pid=os.getppid(), started=started(os.getppid())), "elsewhere": mine(host="other"), None: None,
    }  # fmt: skip
    study = study_with(claims[claim], age)
    assert sweep(study, stale_after=100) == ([0] if reason else [])
    trial = study.trials[0]
    if reason is None:
        assert trial.state == TrialState.RUNNING
    else:
        found = Evaluation.of(trial)
        assert found is not None
        assert (trial.state, found.status, found.reason) == (TrialState.FAIL, "interrupted", reason)
        assert trial.user_attrs["capnas:status"] == "interrupted"


@pytest.mark.parametrize(("ago", "hours", "given_up"), [(50, 9, False), (50, -9, False), (200, -9, True), (200, 9, True)])
def test_a_host_in_another_time_zone_is_given_the_same_time(ago: float, hours: float, given_up: bool) -> None:
    study = study_with(mine(host="other", at=time.time() - ago), ago + 3600 * hours)
    assert sweep(study, stale_after=100) == ([0] if given_up else [])


def test_a_claim_says_when_it_was_made() -> None:
    trial = optuna.create_study().ask()
    with claimed(trial):
        assert abs(trial.storage.get_trial_system_attrs(trial._trial_id)[CLAIM]["at"] - time.time()) < 60


def test_a_running_trial_of_this_process_is_left_alone() -> None:
    study = optuna.create_study(study_name="s")
    trial = study.ask()
    with claimed(trial):
        with claimed(trial):  # by the objective, inside the search
            pass
        assert sweep(study) == []
    assert sweep(study) == [0]


def test_trials_of_one_process_are_told_apart() -> None:
    study = optuna.create_study(study_name="s")
    first, second = study.ask(), study.ask()
    with claimed(first):
        with claimed(second):
            assert sweep(study) == []
        assert sweep(study) == [1]


def test_whose_end_is_worth_waiting_for() -> None:
    trials = [study_with(claim, 1).trials[0] for claim in (None, mine(pid=dead_pid()), mine(host="other"))]
    assert [local(t) for t in trials] == [True, True, False]


def test_a_process_at_work_is_of_this_host_and_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_work(own_claim())
    assert not at_work(own_claim() | {"host": "other"})
    monkeypatch.setattr("capnas.objective.claims.started", lambda pid: None)  # a system without /proc
    assert at_work(mine(started=None))
    assert not at_work(mine(pid=dead_pid(), started=None))

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.kill", forbidden)  # a process of another user
    assert at_work(mine(started=None))


@pytest.mark.skipif(not Path("/proc/self/comm").is_file(), reason="reads /proc")
def test_the_start_and_the_end_of_a_process_are_its_own_whatever_its_name() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = int(started(process.pid) or 0) / os.sysconf("SC_CLK_TCK")
        assert before - 1 <= ticks <= time.clock_gettime(time.CLOCK_BOOTTIME) + 1
        claim = mine(pid=process.pid, started=started(process.pid))
        assert at_work(claim)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # the kernel lists it until its parent asks for its end
        assert not at_work(claim)
    comm = Path("/proc/self/comm")
    name, own = comm.read_text(), started(os.getpid())
    try:
        comm.write_text("of) 1 2 3 4")
        assert started(os.getpid()) == own
    finally:
        comm.write_text(name)


@pytest.mark.parametrize(
    ("evaluation", "state"),
    [
        (Evaluation(status="complete", values={"accuracy": 0.5}), TrialState.COMPLETE),
        (Evaluation(status="diverged"), TrialState.PRUNED),
        (Evaluation(status="failed"), TrialState.FAIL),
        (Evaluation(status="interrupted"), TrialState.FAIL),
    ],
)
def test_a_result_that_was_stored_is_kept(evaluation: Evaluation, state: TrialState) -> None:
    study = study_with(mine(pid=dead_pid()), 1, evaluation)
    assert sweep(study) == [0]
    assert study.trials[0].state == state
    assert Evaluation.of(study.trials[0]) == evaluation
    if state == TrialState.COMPLETE:
        assert study.trials[0].values == [0.5]


def test_the_hosts_name_is_not_stored() -> None:
    import socket

    assert socket.gethostname() not in host()
    assert len(host()) == 16


@pytest.mark.parametrize(
    ("handle", "error", "code", "runs"),
    [(7, 0, 259, True), (7, 0, 1, False), (None, 87, 0, False), (None, 5, 0, True)],
    ids=["running", "ended", "unknown", "of another user"],
)
def test_on_windows_a_process_is_looked_up_and_gets_no_signal(
    monkeypatch: pytest.MonkeyPatch, handle: int | None, error: int, code: int, runs: bool
) -> None:
    def exit_code(of: Any, told: Any) -> int:
        told._obj.value = code
        return 1

    kernel = Mock(OpenProcess=Mock(return_value=handle), GetExitCodeProcess=exit_code)
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, **how: kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: error, raising=False)
    monkeypatch.setattr(claims, "os", SimpleNamespace(name="nt"))  # without kill, whose signal 0 is Ctrl-C there
    assert claims._exists(4711) is runs
    assert kernel.OpenProcess.call_args.args == (0x1000, False, 4711)
    assert [call.args[0].value for call in kernel.CloseHandle.call_args_list] == ([] if handle is None else [handle])
