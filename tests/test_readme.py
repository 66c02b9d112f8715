from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_fifteen_lines_run_as_they_stand(tmp_path: Path) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Objective" in b)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15
    script = tmp_path / "readme.py"
    script.write_text(block)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"^\d+ \[0\.\d+, 0\.\d+, \d+", run.stdout, re.MULTILINE), run.stdout


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^capnas [a-z]+ .*$", README, re.MULTILINE))))
def test_commands_and_options_exist(line: str) -> None:
    from typer.main import get_command

    from capnas.cli import app

    words = line.split("#")[0].split()
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in commands
    options = {name for parameter in commands[words[1]].params for name in parameter.opts}
    assert {word for word in words[2:] if word.startswith("--")} <= options


def test_every_command_is_listed() -> None:
    from typer.main import get_command

    from capnas.cli import app

    listed = set(re.findall(r"^\| `capnas ([a-z]+)", README, re.MULTILINE))
    assert listed == set(get_command(app).commands)  # type: ignore[attr-defined]


def test_values_named_in_the_readme_exist() -> None:
    from capnas.objective.targets import check_values

    for values in re.findall(r"--values ([\w,-]+)", README):
        assert check_values(values)


def test_the_profile_is_what_the_command_shows(tmp_path: Path) -> None:
    run = shutil.copytree(ROOT / "results" / "demo", tmp_path / "demo")
    environment = os.environ | {"COLUMNS": "120"}
    shown = subprocess.run(
        [sys.executable, "-m", "capnas", "profile", f"{run}:best"], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    ).stdout
    rows = [line.strip() for line in shown.splitlines()]
    told = README.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(told) == 5
    assert [line.strip() for line in told if line.strip() not in rows] == []
    assert "The last convolution uses 17 of its 96 directions" in " ".join(README.split())
