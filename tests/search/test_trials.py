from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from tiny_space import FILE, images

from capnas.data import ImageData, load_data
from capnas.errors import StudyError
from capnas.search import open_run, run_study
from capnas.search.config import StudyConfig
from capnas.search.runs import RunResult
from capnas.search.trials import RETRAINED, read_retrained, rebuild, retrain_trial

optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: ImageData) -> RunResult:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    config = StudyConfig(space=FILE, data="noise", study="tiny", trials=6, epochs=2, max_params=500, device="cpu", sampler="random",
                         pruner="off", out=str(folder), train={"batch_size": 32})  # fmt: skip
    run_study(config, data=data)
    return open_run(folder)


def test_best_is_the_trial_with_the_best_value(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    assert found.evaluation.values["combined"] == max(e.values["combined"] for _, e in run.evaluations() if e.values)
    assert found.candidate.n_params == found.evaluation.n_params == sum(p.numel() for p in found.model().parameters())


def test_model_has_the_weights_that_the_search_started_from(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    first, again, other = found.model(), found.model(), found.model(seed=found.evaluation.seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_a_trial_over_budget_can_be_rebuilt_too(run: RunResult, data: ImageData) -> None:
    number = next(t.number for t, e in run.evaluations() if e.status == "over_budget")
    assert rebuild(run, number, data=data).candidate.n_params > 500


def test_unknown_trial_and_empty_study_are_refused(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no finished trial 99"):
        rebuild(run, 99, data=data)
    config = StudyConfig(space=FILE, data="noise", trials=1, max_params=1, out=str(tmp_path), device="cpu")
    with pytest.raises(StudyError, match="no trial with a value yet"):
        rebuild(run_study(config, data=data), data=data)


def test_a_space_that_changed_since_the_search_is_noticed(run: RunResult, data: ImageData, tmp_path: Path) -> None:
    changed = tmp_path / "tiny_space.py"
    text = Path(FILE.rpartition(":")[0]).read_text()
    changed.write_text(text.replace("nn.AdaptiveAvgPool2d((4, 1))", "nn.AdaptiveMaxPool2d((4, 1))"))
    moved = dataclasses.replace(run, config=dataclasses.replace(run.config, space=f"{changed}:space"))
    with pytest.raises(StudyError, match="changed since the search"):
        rebuild(moved, data=data)


def test_retraining_reads_test_once_and_is_kept(run: RunResult, data: ImageData) -> None:
    found = rebuild(run, data=data)
    seen: list[int] = []
    record = retrain_trial(found, epochs=2, seed=3, device="cpu", on_epoch=lambda epoch, row: seen.append(epoch))
    assert seen == [1, 2]
    assert record["status"] == "complete"
    assert record["test_accuracy"] * data.sizes["test"] == pytest.approx(round(record["test_accuracy"] * data.sizes["test"]))
    assert retrain_trial(found, epochs=2, seed=3, on_epoch=lambda epoch, row: seen.append(epoch)) == record
    assert seen == [1, 2]
    retrain_trial(found, epochs=1, seed=3, device="cpu")
    assert [(r["epochs"], r["seed"]) for r in read_retrained(run)] == [(2, 3), (1, 3)]
    assert np.isfinite(json.loads((run.folder / RETRAINED).read_text())[0]["test_loss"])


def test_damaged_record_of_retraining_is_named(run: RunResult, tmp_path: Path) -> None:
    (tmp_path / RETRAINED).write_text("[{")
    with pytest.raises(StudyError, match=rf"{RETRAINED} cannot be read"):
        read_retrained(dataclasses.replace(run, folder=tmp_path))
