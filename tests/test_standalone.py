from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optuna

from capnas.candidates import build_candidate
from capnas.spaces import list_spaces, load_space
from capnas.standalone import standalone_script

optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_scripts_build_the_same_networks_with_timm_alone(tmp_path: Path) -> None:
    shape = {"num_classes": 10, "in_chans": 3, "image_size": 32}
    expected = []
    for name in sorted(list_spaces()):
        space = load_space(name)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
        candidate = build_candidate(space, study.ask(), **shape)
        (tmp_path / f"{name}.py").write_text(standalone_script(space, candidate.params, **shape), encoding="utf-8")
        expected.append(f"parameters: {candidate.n_params}, output: (1, 10)")
    runner = (
        "import runpy, sys\nfrom pathlib import Path\nsys.modules['capnas'] = sys.modules['optuna'] = None\n"
        "for path in sorted(Path('.').glob('*.py')): runpy.run_path(str(path), run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", runner], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == expected
