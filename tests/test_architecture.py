from __future__ import annotations

import ast
import itertools
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "capnas").rglob("*.py"))
HEAVY = {"torch", "timm", "optuna", "numpy", "scipy", "plotly", "torchvision"}


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"COLUMNS": "120"})
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_upper_rooms_import_lower_ones_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:]


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom capnas.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\nprint('loaded:', *sys.modules)"
    output = python(code)
    assert "search" in output
    loaded = set(output.rsplit("loaded:", 1)[1].split())
    assert not HEAVY & loaded


def test_public_names_are_deferred_and_all_there() -> None:
    code = "import sys, capnas\nprint('loaded:', *sys.modules)\nfor n in capnas.__all__: getattr(capnas, n)\nprint(len(capnas.__all__))"
    output = python(code)
    first, count = output.strip().rsplit("\n", 1)
    assert not HEAVY & set(first.split("loaded:")[1].split())
    assert 12 <= int(count) <= 24


def test_spaces_import_no_capnas() -> None:
    for path in (ROOT / "search_spaces").glob("*.py"):
        assert not any(words in path.read_text() for words in ("import capnas", "from capnas")), path.name


def test_a_space_is_one_function_of_10_to_40_lines() -> None:
    for path in (ROOT / "search_spaces").glob("[a-z]*.py"):
        parts = ast.parse(path.read_text()).body
        (space,) = [part for part in parts if isinstance(part, ast.FunctionDef) and part.name == "space"]
        assert 10 <= (space.end_lineno or 0) - space.lineno + 1 <= 40, path.name


def test_modules_stay_small() -> None:
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in MODULES}
    assert statistics.median(lines.values()) <= 220
    assert not {str(path): n for path, n in lines.items() if n > 352}


def test_functions_of_the_theories_say_whose_they_are() -> None:
    plumbing = {"activation_codes", "axes", "convolution", "moments", "probing", "singular"}  # state nothing of a theory
    source = re.compile(r"\b(ours?|reconstruct\w*|textbook|papers?|authors'?|et al|rfa_toolbox|delve|(19|20)\d\d)\b|arXiv", re.IGNORECASE)
    silent, seen = [], 0
    for path in (p for p in MODULES if p.parent.name == "measures" and p.stem not in plumbing):
        for part in ast.parse(path.read_text()).body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                seen += 1
                if not source.search(ast.get_docstring(part) or ""):
                    silent.append(f"{path.stem}.{part.name}")
    assert seen > 100
    assert not silent


def test_no_module_imports_timm_past_the_guard() -> None:
    for path in MODULES:
        if path.name not in ("_timm.py", "standalone.py"):
            text = path.read_text()
            assert not any(words in text for words in ("\nimport timm", "\nfrom timm")), path


def test_the_readme_shows_the_rooms_that_imports_are_checked_by() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [sorted(layer.split(" | ")) for layer in settings["layers"]]
    house = (ROOT / "README.md").read_text().partition("## The house\n")[2].partition("\n\nAn upper room")[0]
    shown = [[room.strip("/") for room in re.split(" {3,}", line.strip())[0].split()] for line in house.splitlines() if line.strip()]
    assert sorted(itertools.chain(*shown)) == sorted(itertools.chain(*layers))
    places = {room: i for i, layer in enumerate(layers) for room in layer}
    order = [min(places[room] for room in rooms) for rooms in shown]  # some layers share a line
    assert order == sorted(order)
