from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from capnas.cli import main
from capnas.cli.profiling import _field, _marks, show_profile
from capnas.errors import CapnasError
from capnas.profile import FieldReport
from capnas.projection import ProjectionResult
from capnas.search.inspection import Inspection, inspect_target


@pytest.fixture(scope="module")
def found() -> Inspection:
    return inspect_target("resnet10t", batch=4, image_size=32, reading="modules")


def test_every_measure_has_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["profile", "resnet10t", "--image-size", "32", "--batch", "4", "--measures", "all", "--device", "cpu"])
    assert not done.value.code
    out = capsys.readouterr().out
    for word in ("saturation", "field", "log2 P", "unproductive", "norm", "capacity", "utilisation", "decoupling", "naswot"):
        assert word in out, word
    assert "distance" not in out.split("score")[0]  # nothing was trained
    assert "left out" not in out
    assert "123..199" in out
    assert "feasible image sizes: 123..199 px (96 by the functional bound)\nfeasible: below, some layer sees nothing new;" in out


def test_what_is_left_out_is_said_with_the_fields_and_the_skipped(found: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    show_profile(found)
    out = capsys.readouterr().out
    assert "left out: norms, capacity, proxies" in out
    assert "unproductive by the strict rule (the papers', without 1x1 layers): layer2.0.conv2, layer3.0.conv1" in out
    assert "unproductive by the toolbox rule (rfa_toolbox): layer3.0.conv2" in out
    assert "not measured: 14 x BatchNorm2d rescales the layer before it" in out


def test_an_exact_capacity_is_told_from_an_estimate(found: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    first, second, *_ = found.profile.layers
    rows = tuple(dataclasses.replace(r, capacity=3.0, capacity_method=how) for r, how in ((first, "exact"), (second, "k-fac")))
    show_profile(dataclasses.replace(found, profile=dataclasses.replace(found.profile, layers=rows)))
    assert capsys.readouterr().out.count("3 exact") == 1


def test_a_projection_is_told_with_its_control(found: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    loss = ProjectionResult(accuracy=0.9, projected=0.89, random=0.1, threshold=0.99, kept={"a": (3, 8), "b": (2, 4)})
    show_profile(dataclasses.replace(found, projection=loss))
    out = capsys.readouterr().out
    assert "2 layers, 5 of 12 directions" in out
    assert "accuracy 0.9000, projected 0.8900 (1.00 points lost), as many random directions 0.1000" in out


def test_json_of_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["profile", "resnet10t", "--image-size", "32", "--batch", "4", "--json", "--device", "cpu"])
    assert not done.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["left_out"] == ["norms", "capacity", "proxies"]
    assert document["profile"]["receptive"]["border"]["toolbox"][0] == "layer3.0.conv2"
    assert document["projection"] is None


def test_settings_arrive_in_the_library(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def record(target: str, **settings: Any) -> None:
        asked.append({"target": target} | settings)
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.search.inspection.inspect_target", record)
    given = {"data": "noise", "image_size": 16, "batch": 5, "mode": "eval", "threshold": 0.9, "reading": "blocks", "blocks": "layer.*",
             "weights": "w.safetensors", "project": 0.8, "seed": 7, "device": "cpu"}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    for more in ([*words, "--initial", "--pretrained", "--measures", "norms, capacity"], []):
        assert run("profile", "resnet10t", *more)[2].splitlines()[-1] == "error: enough"
    asked[0].pop("tell")
    assert asked[0] == given | {"target": "resnet10t", "initial": True, "pretrained": True, "measures": ["norms", "capacity"]}
    plain = [asked[1][name] for name in ("mode", "threshold", "reading", "blocks", "initial", "project", "seed")]
    assert plain == [None, 0.99, "both", None, False, None, 0]


def test_an_unknown_measure_is_an_error_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["profile", "resnet10t", "--measures", "saturation,nroms"])
    assert done.value.code == 2
    assert "Did you mean 'norms'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranges", "text"),
    [(None, "-"), (((3.0, 3.0),) * 2, "3"), (((11.0, 43.0),) * 2, "11..43"), (((3.0, 3.0), (5.0, 7.0)), "3x5..7"),
     (((19.0, float("inf")),), "19..inf")],
)  # fmt: skip
def test_fields_are_short(ranges: tuple | None, text: str) -> None:
    assert _field(ranges) == text


def test_marks_name_the_rules() -> None:
    report = FieldReport(image_size=(8, 8), critical=("a", "b"), border={"strict": ("a",), "toolbox": ("a",)})
    assert [_marks(name, report) for name in "abc"] == ["strict toolbox", "critical", ""]


def test_words_of_the_tables_are_told(found: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    show_profile(found)
    out = capsys.readouterr().out
    for word in ("k: ", "field: ", "C, log2 P: ", "unproductive: "):
        assert sum(line.startswith(word) for line in out.splitlines()) == 1, word
    assert "utilisation: " not in out  # no such column


def test_layers_that_nobody_asked_for_are_not_missed(capsys: pytest.CaptureFixture[str]) -> None:
    show_profile(inspect_target("resnet10t", batch=4, image_size=32, reading="blocks"))
    assert "not called itself" not in capsys.readouterr().out
