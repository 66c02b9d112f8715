from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn

from capnas.candidates import build_candidate
from capnas.errors import SpaceError
from capnas.search.standalone import standalone_script
from capnas.spaces import list_spaces, load_space

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


SPACES = """
import optuna
from torch import nn


def rewritten(trial: optuna.Trial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
    "Ein Umlaut vor der Stelle: ä, and a suggestion inside a suggestion's bounds."
    low = trial.suggest_int("low", 2, 4)
    width = trial.suggest_int(name=f"width_{low}", low=low, high=trial.suggest_int("high", 5, 9))
    if width > 90:
        raise optuna.TrialPruned(f"{width} is too wide")
    return _net(trial, width, num_classes, in_chans)


def _net(trial, width, num_classes, in_chans):
    act = {"relu": nn.ReLU, "gelu": nn.GELU}[trial.suggest_categorical("act", ["relu", "gelu"])]
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(width), act(), nn.Linear(width, num_classes))


if __name__ == "__main__":
    raise SystemExit("not when it is imported")
"""


HELD = """

class Held:
    def __init__(self, trial):
        self.trial = trial

    def low(self):
        return self.trial.suggest_int("low", 2, 4)
"""


def script_of(source: str, tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(source, encoding="utf-8")
    space = load_space(f"{path}:rewritten")
    params = {"low": 3, "high": 7, "width_3": 6, "act": "gelu"}
    script = standalone_script(space, params, num_classes=5, in_chans=1, image_size=4, guard=False)
    names: dict[str, Any] = {"__name__": "loaded"}
    exec(compile(script, "script", "exec"), names)
    network = names["build"]()
    assert network(torch.zeros(2, 1, 4, 4)).shape == (2, 5)
    assert type(network[2]).__name__ == "GELU"
    assert network[1].out_features == 6
    return script


def test_suggestions_become_look_ups_wherever_the_trial_goes(tmp_path: Path) -> None:
    script = script_of(SPACES, tmp_path)
    assert "optuna" not in script
    assert "suggest" not in script.replace("a suggestion inside a suggestion's bounds", "")
    assert "not when it is imported" not in script
    assert 'trial[f"width_{low}"]' in script
    assert "ValueError" in script


@pytest.mark.parametrize(
    "line",
    ['    trial.set_user_attr("seen", True)', "    print(trial.number)", "    optuna.logging.get_verbosity()"],
    ids=["attr", "number", "optuna"],
)
def test_what_asks_more_of_a_trial_gets_a_stand_in(tmp_path: Path, line: str) -> None:
    text = SPACES.replace("    if width > 90:", f"{line}\n    if width > 90:")
    assert "class Decisions(dict)" in script_of(text, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('low = trial.suggest_int("low", 2, 4)', 'low = Held(trial).low()'),
        ('low = trial.suggest_int("low", 2, 4)', 'low = trial.suggest_int("low", 2, 4)\n    assert trial.params["low"] == low'),
        ('low = trial.suggest_int("low", 2, 4)', 'low = trial.suggest_int("low", 2, 4)\n    assert not trial.should_prune()'),
    ],
    ids=["a trial in an object", "params", "should_prune"],
)  # fmt: skip
def test_what_suggests_in_another_way_gets_a_stand_in(tmp_path: Path, old: str, new: str) -> None:
    text = SPACES.replace(old, new) + (HELD if "Held" in new else "")
    assert "class Decisions(dict)" in script_of(text, tmp_path)


def test_suggestions_under_another_name_alone_get_a_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n\ndef space(trial, *, num_classes, in_chans, image_size):\n    pick = trial.suggest_int\n"
        '    return nn.Linear(pick("w", 2, 40), num_classes)\n'
    )
    script = standalone_script(load_space(path), {"w": 7}, num_classes=5, in_chans=1, image_size=4, guard=False)
    names: dict[str, Any] = {"__name__": "loaded"}
    exec(script, names)
    assert names["build"]().in_features == 7


@pytest.mark.parametrize(
    "call", ["helping_space.ask(trial)", "partial(helping_space.ask, trial)()", "[*map(helping_space.ask, [trial])][0]"]
)
def test_a_trial_that_another_module_asks_gets_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "helping_space.py").write_text('def ask(trial):\n    return trial.suggest_int("low", 2, 4)\n')
    monkeypatch.syspath_prepend(tmp_path)
    text = SPACES.replace('trial.suggest_int("low", 2, 4)', call)
    assert "class Decisions(dict)" in script_of(f"from functools import partial\nimport helping_space\n{text}", tmp_path)


def test_a_script_says_what_else_it_needs(tmp_path: Path) -> None:
    def needs(source: str) -> str:
        return script_of(source, tmp_path).splitlines()[1]

    assert needs(SPACES) == "# It needs torch and timm. Run it to see its size, or import `build` from it."
    others = "\nimport os, numpy.linalg\n\ndef unused():\n    from einops.layers import torch\n"
    assert needs(SPACES + others).startswith("# It needs torch, timm, einops and numpy. Run it")
    asks_more = (SPACES + others).replace("    if width > 90:", "    print(trial.number)\n    if width > 90:")
    assert needs(asks_more).startswith("# It needs torch, timm, einops, numpy and optuna (the space asks more of it than suggestions).")


LOW = 'low = trial.suggest_int("low", 2, 4)'


@pytest.mark.parametrize(
    ("old", "new", "needs_optuna"),
    [
        (LOW, 'low = trial.suggest_int(*("low", 2, 4))', True),
        (LOW, 'low = [trial.suggest_int(f"low{n}"[:3], 2, 4) for n in [trial.suggest_int("high", 5, 9)]][0]', False),
        (LOW, 'low = trial.suggest_int("lo" + "w" * (trial.suggest_int("high", 5, 9) == 7), 2, 4)', True),
        ("import optuna\n", "import optuna as o\nimport optuna\n", True),
        ("import optuna\n", "import optuna; import optuna.trial\n", True),
        ("import optuna\n", "import optuna; FOUR = 4\n", False),
        (LOW, f"import optuna\n    {LOW}", False),
    ],
    ids=["unpacked", "asked beside", "asked inside", "renamed", "of a module", "in a line of two", "in the function"],
)
def test_what_a_script_keeps_of_optuna_it_names(tmp_path: Path, old: str, new: str, needs_optuna: bool) -> None:
    script = script_of(SPACES.replace(old, new), tmp_path)
    assert ("optuna" in script) is ("optuna" in script.splitlines()[1]) is needs_optuna


@pytest.mark.parametrize(("encoding", "first"), [("utf-8-sig", ""), ("latin-1", "# coding: latin-1")])
def test_a_space_in_another_encoding_is_read_as_python_reads_it(tmp_path: Path, encoding: str, first: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{first}{SPACES}", encoding=encoding)
    script = standalone_script(load_space(f"{path}:rewritten"), {}, num_classes=5, in_chans=1, image_size=4, guard=False)
    assert "Stelle: ä," in script


def test_options_of_a_partial_space_are_kept() -> None:
    space = functools.partial(load_space("vgg").function, heads=(7, 7))  # type: ignore[attr-defined]
    params = {"stages": 2, "act": "relu", "head": 32, "depth0": 1, "width0": 8, "depth1": 1, "width1": 16}
    script = standalone_script(space, params, num_classes=10, in_chans=1, image_size=28, guard=False)
    assert "heads=(7, 7))" in script


def test_a_space_without_a_source_is_refused() -> None:
    names: dict[str, Any] = {}
    exec("def space(trial, *, num_classes, in_chans, image_size): ...", names)
    with pytest.raises(SpaceError, match="put the space into a file"):
        standalone_script(names["space"], {}, num_classes=2, in_chans=1, image_size=8)


NAMED = """
from torch import nn
def build(width, in_chans, num_classes):
    return nn.Sequential(nn.Conv2d(in_chans, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def make(times):
    def space(trial, *, num_classes, in_chans, image_size):
        return build(times * trial.suggest_int("w", 1, 9), in_chans, num_classes)
    return space
def without_its_name(function):
    def wrapper(trial, **sizes):
        return function(trial, **sizes)
    return wrapper
def space(trial, *, num_classes, in_chans, image_size):
    return build(trial.suggest_int("w", 1, 9), in_chans, num_classes)
class Space:
    def __call__(self, trial, *, num_classes, in_chans, image_size):
        return build(3 * trial.suggest_int("w", 1, 9), in_chans, num_classes)
twice, wrapped, held = make(2), without_its_name(space), Space()
short = lambda trial, *, num_classes, in_chans, image_size: build(4 * trial.suggest_int("w", 1, 9), in_chans, num_classes)
"""


@pytest.mark.parametrize(("name", "width"), [("space", 2), ("twice", 4), ("wrapped", 2), ("held", 6), ("short", 8)])
def test_a_script_calls_the_space_by_its_name_in_its_file_and_hides_nothing_there(tmp_path: Path, name: str, width: int) -> None:
    (tmp_path / "named.py").write_text(NAMED)
    script = standalone_script(
        load_space(f"{tmp_path / 'named.py'}:{name}"), {"w": 2}, num_classes=3, in_chans=1, image_size=8, guard=False
    )
    names: dict[str, Any] = {}
    exec(script, names)
    assert names["build_0"]()[0].out_channels == width
    assert "optuna" not in script


def test_a_space_without_a_name_in_its_file_is_refused() -> None:
    def inner(trial: Any, **sizes: int) -> nn.Module:
        return nn.Flatten()

    with pytest.raises(SpaceError, match="has no name at the top level of its file"):
        standalone_script(inner, {}, num_classes=3, in_chans=1, image_size=8)
