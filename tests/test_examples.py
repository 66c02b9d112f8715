from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ONE = ["--trials", "1"]
TOY = {"own_study.py": ONE, "own_space.py": [], "own_images.py": ONE, "own_training.py": ONE,
       "profile_timm_model.py": ["--images", "8"],
       "narrow_and_resize.py": ["--images", "300", "--epochs", "4"]}  # fmt: skip
SAYS = {"own_study.py": "MACs", "own_space.py": "feasible", "own_images.py": "complete", "own_training.py": "evenness",
        "profile_timm_model.py": "evenness",
        "narrow_and_resize.py": "recommended"}  # fmt: skip


def test_every_example_is_executed() -> None:
    assert set(TOY) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", TOY)
def test_example_runs(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(EXAMPLES / name), *TOY[name]], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert SAYS[name] in run.stdout
    if (done := re.search(r"(\d+) of (\d+) trials complete", run.stdout)) is not None:
        assert int(done[1]) > 0, run.stdout
