from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from capnas.candidates import build_candidate
from capnas.spaces import list_spaces, load_space
from capnas.standalone import standalone_script

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.mark.parametrize("name", sorted(list_spaces()))
def test_script_builds_the_same_network_with_timm_alone(name: str, tmp_path: Path) -> None:
    space = load_space(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    shape = {"num_classes": 10, "in_chans": 3, "image_size": 32}
    candidate = build_candidate(space, study.ask(), **shape)
    script = tmp_path / "found.py"
    script.write_text(standalone_script(space, candidate.params, **shape), encoding="utf-8")
    alone = f"import runpy, sys; sys.modules['capnas'] = sys.modules['optuna'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"parameters: {candidate.n_params}, output: (1, 10)" in done.stdout
