from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_space import images
from torch import nn

from capnas.data import ImageData, load_data
from capnas.errors import StudyError, UsageError
from capnas.excess import ExcessStudy, Recipe, Run, _sample, excess_capacity, read_study
from capnas.measures.guessing import no_better_than_a_guess
from capnas.measures.resolution import SizeReading, recommend

RECIPE = Recipe(epochs=4, batch_size=16, lr=0.2, project_every=5, final_sweeps=2)


def net() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3))


def task(kind: str) -> ImageData:
    """Trivial: bright rows that give the class away. Hard: noise with labels that only memory can tell."""
    x, labels = images(60)
    if kind == "hard":
        x = np.random.default_rng(1).integers(0, 255, x.shape, dtype=np.uint8)
    return load_data((x, labels), in_chans=1, validation=0.2, test=0.2)


def measure(data: ImageData, **options: object) -> ExcessStudy:
    asked = {"lipschitz": (1.0, 0.5), "distance": (1.0, 0.3), "seeds": (0,), "recipe": RECIPE} | options
    return excess_capacity(net(), data, **asked)  # type: ignore[arg-type]


def test_a_trivial_task_leaves_more_capacity_to_spare_than_a_hard_one() -> None:
    grid = {"lipschitz": (0.6, 0.25), "distance": (0.6, 0.2), "hold": "train", "tolerance": 0.05, "full_grid": True}
    long = Recipe(epochs=30, batch_size=16, lr=0.2, project_every=10, final_sweeps=3)
    found = {kind: measure(task(kind), recipe=long, **grid).read(tolerance=0.05, hold="train") for kind in ("trivial", "hard")}
    assert found["trivial"].train_error == found["hard"].train_error == 0, "both can be fitted without constraints"
    assert found["trivial"].decades["club"] > found["hard"].decades["club"] + 0.2
    assert found["trivial"].decades["spade"] > found["hard"].decades["spade"]


def test_a_study_is_kept_resumed_and_widened(tmp_path: Path) -> None:
    data, trained, starts = task("trivial"), list[Run](), list[tuple[int, int]]()
    first = measure(data, out=tmp_path, on_run=trained.append, full_grid=True)
    assert [(r.lipschitz, r.distance) for r in trained] == [(None, None), (1.0, 0.3), (0.5, 1.0), (0.5, 0.3)]
    assert read_study(tmp_path) == first
    sample = first.header["sample"]
    header = first.header | {"sample": sample | {"data_norm": math.nextafter(sample["data_norm"], math.inf)}}
    (tmp_path / "study.json").write_text(json.dumps(header))  # as another number of threads, or another machine, sums the images
    measure(data, out=tmp_path, on_run=trained.append, full_grid=True)
    assert len(trained) == 4, "the same call trains nothing"

    runs = tmp_path / "runs.jsonl"
    runs.write_text(runs.read_text()[:-40])  # as a killed process leaves it
    resumed = measure(data, out=tmp_path, on_run=trained.append, full_grid=True)
    assert len(trained) == 5
    assert [r.layers for r in resumed.runs] == [r.layers for r in first.runs], "a run replays bit for bit"
    wider = measure(data, out=tmp_path, on_run=trained.append, full_grid=True, seeds=(0, 1))
    assert len(trained) == 9
    assert wider.read().seeds == (0, 1)
    measure(data, out=tmp_path, seeds=(2,), lipschitz=(0.5,), distance=(1.0,), on_start=lambda *n: starts.append(n))
    assert starts == [(0, 2)], "what is kept of other seeds and settings is none of it"
    with pytest.raises(StudyError, match=r"another recipe; give a new folder"):
        measure(data, out=tmp_path, recipe=Recipe(epochs=1))
    runs.write_text("{}\n" + runs.read_text())
    with pytest.raises(StudyError, match="line 1, is damaged"):
        read_study(tmp_path)
    with pytest.raises(StudyError, match=r"study\.json cannot be read: No such file or directory; expected the settings"):
        read_study(tmp_path / "nowhere")
    for other in ("[]", '{"model": "net"}'):
        (tmp_path / "study.json").write_text(other)
        with pytest.raises(StudyError, match=r"holds no excess-capacity study: its study\.json is another document"):
            measure(data, out=tmp_path)


def test_a_study_on_images_that_have_other_labels_since_is_refused(tmp_path: Path) -> None:
    (x, y), grid = images(60), {"lipschitz": (1.0,), "distance": (0.3,), "out": tmp_path}

    def given(labels: np.ndarray) -> ImageData:
        return load_data(dict.fromkeys(("train", "val", "test"), (x, labels)), in_chans=1)

    measure(given(y), **grid)
    with pytest.raises(StudyError, match="holds a study with another labelling; give a new folder"):
        measure(given((y + 1) % 3), **grid)
    header = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({key: value for key, value in header.items() if key != "labelling"}))
    assert len(measure(given((y + 1) % 3), **grid).runs) == 2  # an older study did not keep them


def test_settings_tighter_than_one_that_failed_are_spared() -> None:
    trained: list[Run] = []
    study = measure(
        task("hard"),
        distance=(1.0, 0.001),
        hold="train",
        tolerance=0.0,
        recipe=Recipe(epochs=15, batch_size=16, lr=0.2),
        on_run=trained.append,
    )
    assert (0.5, 0.001) not in {(r.lipschitz, r.distance) for r in trained}
    verdicts = {(s.lipschitz, s.distance): s.verdict for s in study.read(hold="train", tolerance=0.0).settings}
    assert verdicts[1.0, 0.001] == "failed"
    assert verdicts[0.5, 0.001] == "skipped"


def test_header_says_what_was_asked_and_the_model_is_left_alone() -> None:
    model, data, state = net(), task("trivial"), torch.get_rng_state()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    study = excess_capacity(model, data, lipschitz=(0.5,), distance=(1.0,), seeds=(4,), recipe=Recipe(epochs=1, batch_size=16), name="mine")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert json.loads(json.dumps(study.header)) == study.header
    assert (study.header["model"], study.header["grid"], study.header["seeds"]) == ("mine", [[0.5, 1.0]], [4])
    stacked = np.concatenate([x.double().numpy().ravel() for x in [data.probe(10**6)[0]]])
    assert study.header["sample"] == {"data_norm": pytest.approx(float(np.sqrt((stacked**2).sum()))), "samples": data.sizes["train"]}
    resized = data.probe(10**6, image_size=6)[0].double().norm()
    assert _sample(data, 6).data_norm == pytest.approx(float(resized))
    rows = study.layers(study.read(tolerance=0.99).tightest["club"])
    assert [r["name"] for r in rows] == ["0", "2", "5"]
    assert rows[0]["norm_limit"] == pytest.approx(0.5 * rows[0]["norm"])
    assert rows[2]["norm_limit"] is None


@pytest.mark.parametrize(("chance", "images"), [(0.1, 1000), (0.5, 24), (0.744, 39)])
def test_a_guess_is_what_it_is_to_the_choice_of_a_resolution(chance: float, images: int) -> None:
    for right in range(images + 1):
        rows = [SizeReading(size=size, macs=size, accuracy=right / images, epochs=1) for size in (1, 2)]
        words = "clearly better" if right / images > chance else "better"
        said = recommend(rows, images=images, chance=chance).reasons[0].startswith(f"no size is {words} than a guess (")
        assert no_better_than_a_guess(right / images, chance=chance, images=images) == said


def test_a_study_whose_unconstrained_network_only_guesses_says_so(tmp_path: Path) -> None:
    data, short = task("trivial"), {"lipschitz": (0.5,), "distance": (1.0,), "out": tmp_path}
    starts: list[tuple[int, int]] = []
    poor = measure(data, recipe=replace(RECIPE, epochs=1, lr=1e-6), on_start=lambda *n: starts.append(n), **short)
    assert starts == [(0, 2)]
    assert poor.at_chance
    assert not measure(data, recipe=replace(RECIPE, epochs=8), **short | {"out": None}).at_chance
    assert poor.chance == data.guess
    others = [replace(poor.runs[0], seed=seed, validation_error=0.0) for seed in range(1, 9)]
    assert replace(poor, runs=(*poor.runs, *others)).at_chance  # the study is of seed 0

    header = json.loads((tmp_path / "study.json").read_text())
    del header["chance"]  # as older studies are
    (tmp_path / "study.json").write_text(json.dumps(header))
    old = read_study(tmp_path)
    assert old.chance == pytest.approx(1 / 3)
    assert measure(data, recipe=replace(RECIPE, epochs=1, lr=1e-6), on_start=lambda *n: starts.append(n), **short) == poor
    assert len(starts) == 1, "nothing was left to train"


@pytest.mark.parametrize(
    ("options", "what"),
    [({"lipschitz": (1.5,)}, r"lipschitz takes factors in \(0, 1\]"), ({"distance": ()}, "distance takes factors"),
     ({"lipschitz": (1,), "distance": (1,)}, "needs a factor below 1"), ({"seeds": (1, 1)}, "different numbers"),
     ({"tolerance": -1}, "tolerance is a share"), ({"hold": "test"}, "hold must be one of")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_anything_is_trained(options: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        measure(task("trivial"), **options)
