"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# the same examples in every run: a suite that fails now and then tells nothing
hypothesis.settings.register_profile("capnas", derandomize=True, deadline=None)
hypothesis.settings.load_profile("capnas")

# tiny networks gain nothing from threads, which wait for each other at every step: ten times the time where other work shares the cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and tests that raise it would fail

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and benchmark data that lies beside a development checkout."""
    folder = Path(os.environ.get("CAPNAS_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"REFERENCE FOLDER ABSENT: {folder.name}/ is not beside the checkout (set CAPNAS_SHARED to its path)")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command of the command line in this process: words to exit status, stdout and stderr."""
    from capnas.cli import main

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(w) for w in words])
        return int(done.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
