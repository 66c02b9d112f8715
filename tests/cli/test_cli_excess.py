from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_space import write_images

from capnas.errors import CapnasError

Run = Callable[..., tuple[int, str, str]]
NET = """
from torch import nn

def small(num_classes, in_chans, image_size):
    side = (image_size + 1) // 2
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1),
                         nn.Flatten(), nn.Linear(4 * side * side, num_classes))

def gated(num_classes, in_chans, image_size):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(in_chans, 4, 3)
        def forward(self, x):
            y = self.conv(x)
            return y * y.sigmoid()
    return nn.Sequential(Gate(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

broken = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network and images that it learns."""
    root = tmp_path_factory.mktemp("excess")
    (root / "nets.py").write_text(NET)
    write_images(root / "images")
    return root


@pytest.fixture
def words(folder: Path) -> list[object]:
    data = ["--data", folder / "images", "--data-option", "in_chans=1,validation=0.2", "--device", "cpu", "--image-size", 8]
    training = ["--epochs", 3, "--seeds", 1, "--train", "lr=0.2,batch_size=16,final_sweeps=2", "--tolerance", 0.5]
    return ["excess", f"{folder / 'nets.py'}:small", *data, *training, "--lipschitz", "1,0.5", "--distance", "0.5"]


def test_tables_and_json_tell_the_same_and_a_second_call_resumes(run: Run, words: list[object], tmp_path: Path) -> None:
    code, out, err = run(*words, "--out", tmp_path / "study")
    assert code == 0
    assert err.count("seed 0") == 3, "one line of progress per training"
    header, *lines = err.splitlines()
    assert re.fullmatch(r"excess capacity of small on \w+: up to 3 trainings of 3 epochs", header)
    assert [line.partition(" ")[0] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]
    assert ["left at most" in line for line in lines] == [True, True, False]
    assert "norm layers taken out, as in the paper's networks: 1" in out
    code, text, err = run(*words, "--out", tmp_path / "study", "--json")
    assert (code, err) == (0, "")
    document = json.loads(text)
    reading = document["reading"]
    assert [(s["lipschitz"], s["distance"], s["verdict"]) for s in reading["settings"]] == [(1.0, 0.5, "held"), (0.5, 0.5, "held")]
    assert reading["tightest"]["club"]["lipschitz"] == 0.5
    assert reading["decades"]["club"] == pytest.approx(reading["settings"][1]["decades"]["club"])
    assert f"{reading['decades']['club']:.2f}" in out
    assert [layer["name"] for layer in document["layers"]] == ["0", "3", "5"]
    first = document["layers"][0]
    assert first["norm_reached"] <= first["norm_limit"] * (1 + 1e-6) == pytest.approx(0.5 * first["norm"], rel=1e-5)
    assert first["distance_reached"] <= first["distance_limit"] * (1 + 1e-4)
    assert document["study"]["recipe"]["lr"] == 0.2
    assert len((tmp_path / "study" / "runs.jsonl").read_text().splitlines()) == 3


def test_settings_arrive_in_the_library(run: Run, words: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []

    class Study:
        def read(self, **settings: Any) -> None:
            judged.append(settings)
            raise CapnasError("enough")

    def record(network: Any, data: Any, **settings: Any) -> Study:
        asked.append(settings | {"pixels": data.image_size})
        return Study()

    monkeypatch.setattr("capnas.excess.excess_capacity", record)
    more = ["--seeds", 4, "--tolerance", 0.2, "--hold", "both", "--full-grid", "--out", tmp_path / "out"]
    for extra in (more, []):
        assert run(*words, *extra)[2].splitlines()[-1] == "error: enough"
    given, plain = asked
    assert (given["lipschitz"], given["distance"], given["image_size"], given["pixels"]) == ([1.0, 0.5], [0.5], 8, 8)
    assert (list(given["seeds"]), given["tolerance"], given["hold"], given["full_grid"]) == ([0, 1, 2, 3], 0.2, "both", True)
    assert (given["recipe"].epochs, given["recipe"].lr, given["device"], given["out"]) == (3, 0.2, "cpu", tmp_path / "out")
    assert (plain["hold"], plain["full_grid"], plain["out"]) == ("validation", False, None)
    assert judged == [{"tolerance": 0.2, "hold": "both"}, {"tolerance": 0.5, "hold": "validation"}]


def test_what_is_kept_is_counted_and_what_is_not_is_said(run: Run, words: list[object], tmp_path: Path) -> None:
    words[words.index("--epochs") + 1] = 1
    words[-3] = "0.5"  # one setting
    code, _, err = run(*words)
    assert code == 0, err
    assert err.splitlines()[0].endswith(": up to 2 trainings of 1 epoch")
    assert err.splitlines()[1] == "nothing is kept: --out DIR keeps every training, and the same command again goes on where it stopped"
    assert run(*words, "--out", tmp_path)[0] == 0
    words[-1] = "0.5,0.25"
    code, _, err = run(*words, "--out", tmp_path)
    header, line, *rest = err.splitlines()
    assert header.endswith(": up to 3 trainings of 1 epoch, 2 kept from before")
    assert line.startswith("[3/3] seed 0")
    assert not rest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "{folder}/nets.py:gated"}, "module 0 computes a product of two feature maps (attention or a gate)"),
        ({1: "{folder}/nets.py:broken"}, "defines no function 'broken'"),
        ({1: "{folder}/nets.py"}, "nets.py names no function; a network is given as path/to/file.py:function"),
        ({1: "{folder}/none.py:small"}, "there is no file"),
        ({1: "no_such_model"}, "there is no timm model 'no_such_model'"),
        ({"--lipschitz": "1,x"}, "--lipschitz takes numbers in (0, 1]"),
        ({"--distance": "2"}, "distance takes factors in (0, 1]"),
        ({"--train": "rate=1"}, "training setting must be one of"),
        ({"--tolerance": "2"}, "tolerance is a share of images"),
        ({"--hold": "test"}, "hold must be one of both, train, validation"),
        ({"--device": "cuda:77"}, "cuda:77"),
        ({"--seeds": "0"}, "seeds must be at least 1, got 0"),
    ],
)
def test_errors_of_use_end_with_status_2_and_say_what_to_do(
    run: Run, words: list[object], folder: Path, change: dict[object, str], message: str
) -> None:
    given = [str(w) for w in words]
    for key, value in change.items():
        if isinstance(key, int):
            given[key] = value.format(folder=folder)
        elif key in given:
            given[given.index(str(key)) + 1] = value
        else:
            given += [str(key), value]
    code, out, err = run(*given)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
