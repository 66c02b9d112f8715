from __future__ import annotations

import functools
import importlib.metadata
import pickle
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from cases import cnn_space
from torch import nn

from capnas import spaces
from capnas.errors import SpaceError
from capnas.spaces import SpaceRef, list_spaces, load_space, space_name, space_spec

SOURCE = '''
"""A file of spaces."""
import optuna
from torch import nn

LIMIT = 3

def _hidden(trial):
    pass

def space(trial, *, num_classes, in_chans, image_size):
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, num_classes))

def other(trial, num_classes, in_chans, image_size):
    return nn.Linear(trial.suggest_int("width", 1, 8), num_classes)

def wrong(trial, classes):
    return None
'''
SIZES = {"num_classes": 3, "in_chans": 1, "image_size": 4}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_by_function() -> None:
    assert load_space(cnn_space) is cnn_space
    assert space_name(cnn_space) == "cnn_space"
    assert space_spec(cnn_space) == "cases:cnn_space"
    assert load_space("cases:cnn_space").function is cnn_space


def test_by_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    plain, named = load_space("mine.py"), load_space("mine.py:other")
    assert load_space(Path("mine.py")) == plain
    assert (space_name(plain), space_spec(plain)) == ("mine", f"{file.resolve()}:space")
    assert (space_name(named), space_spec(named)) == ("other", f"{file.resolve()}:other")
    assert isinstance(plain(optuna.trial.FixedTrial({}), **SIZES)[1], nn.Linear)
    assert named(optuna.trial.FixedTrial({"width": 5}), **SIZES).in_features == 5
    monkeypatch.chdir("/")
    assert load_space(space_spec(plain)) == plain, "the text must work from any folder"


def test_by_installed_name_and_module() -> None:
    resnet = load_space("resnet")
    assert (space_name(resnet), space_spec(resnet)) == ("resnet", "resnet")
    by_module = load_space("capnas.search_spaces.resnet")
    assert by_module.function is resnet.function
    assert (space_name(by_module), space_spec(by_module)) == ("resnet", "capnas.search_spaces.resnet:space")
    assert space_name(resnet.function) == "resnet"
    assert space_spec(resnet.function) == "capnas.search_spaces.resnet:space"


def test_pickles_by_its_text_into_a_fresh_process(file: Path, tmp_path: Path) -> None:
    space = load_space(f"{file}:other")
    assert pickle.loads(pickle.dumps(space)) == space
    (tmp_path / "space.pickle").write_bytes(pickle.dumps(space))
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'space.pickle')!r}, 'rb')).name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "other\n", done.stderr


class Point:
    """Looks like an installed entry point."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def load(self) -> object:
        return importlib.metadata.EntryPoint(self.name, self.value, spaces.GROUP).load()


def test_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Point("theirs", "cases:cnn_space"), Point("broken", "absent_module:space"), Point("number", "cases:__name__")]
    monkeypatch.setattr(spaces, "entry_points", lambda group: points if group == "capnas.search_spaces" else [])
    theirs = load_space("theirs")
    assert isinstance(theirs, SpaceRef)
    assert (theirs.function, theirs.spec) == (cnn_space, "theirs")
    listed = list_spaces()
    assert listed["theirs"].startswith("A small residual network")
    assert "cannot be loaded: ModuleNotFoundError" in listed["broken"]
    with pytest.raises(SpaceError, match=r"the entry point broken = 'absent_module:space' cannot be loaded: ModuleNotFoundError"):
        load_space("broken")
    with pytest.raises(SpaceError, match=r"number is str, not a function space\(trial"):
        load_space("number")


def test_listing_names_every_installed_space_with_a_line() -> None:
    listed = list_spaces()
    assert {"resnet", "vgg", "byobnet", "mbconv", "convnext", "regnet", "vit", "nasbench201"} <= set(listed)
    assert all(listed.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "resnett",
            r"space must be one of byobnet, .*; got 'resnett'\. Did you mean 'resnet'\? A file is given as path/to/file.py:function",
        ),
        ("absent.py", r"there is no file .*absent\.py; a space is given as path/to/file.py:function"),
        ("absent_package.spaces:space", r"the module 'absent_package.spaces' of the space .* is not installed"),
        ("cases:cnn_spac", r"function must be one of cnn_space, small_cnn; got 'cnn_spac'\. Did you mean 'cnn_space'\?"),
        ("capnas.errors:CapnasError", r"capnas.errors:CapnasError must be callable as space\(trial, \*, num_classes"),
    ],
)
def test_what_is_not_found(spec: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        load_space(spec)


def test_what_is_wrong_in_a_file(file: Path) -> None:
    with pytest.raises(SpaceError, match=r"function must be one of other, space, wrong; got 'sapce'\. Did you mean 'space'"):
        load_space(f"{file}:sapce")
    with pytest.raises(SpaceError, match=r"mine\.py:wrong must be callable as space\(.*: missing a required argument: 'classes'"):
        load_space(f"{file}:wrong")
    with pytest.raises(SpaceError, match=r"mine\.py:LIMIT is int, not a function"):
        load_space(f"{file}:LIMIT")
    file.write_text("1 / 0")
    with pytest.raises(SpaceError, match=r"mine\.py fails when it is imported: ZeroDivisionError: division by zero"):
        load_space(str(file))
    file.write_text("")
    with pytest.raises(SpaceError, match=r"defines no function; write space\(trial"):
        load_space(str(file))


def test_functions_without_a_place_cannot_be_named() -> None:
    def nested(trial: object, *, num_classes: int, in_chans: int, image_size: int) -> None: ...

    for space in (nested, lambda trial, num_classes, in_chans, image_size: None, functools.partial(cnn_space)):
        assert load_space(space) is space
        with pytest.raises(SpaceError, match=r"cannot be found again in another process: give it a name at the top level"):
            space_spec(space)
