"""A space that changes the working directory moves none of the files that are given relative to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_space import write_images

Run = Callable[..., tuple[int, str, str]]
SPACE = """
import os
from torch import nn
{first}
def space(trial, *, num_classes, in_chans, image_size):
    {then}
    width = trial.suggest_int("width", 8, 40)
    return nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""
LEAVES = "os.chdir(os.environ['ELSEWHERE'])"
NETWORK = f"""
import os
from torch import nn
{LEAVES}
def net(num_classes, in_chans, image_size):
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""
QUICK = ["--epochs", 1, "--device", "cpu", "--train", "batch_size=32", "--data-option", "image_size=8"]


@pytest.mark.parametrize(("first", "then", "workers"), [(LEAVES, "pass", 1), ("", LEAVES, 1), (LEAVES, "pass", 2)])
def test_relative_paths_stay_where_they_were_given(
    run: Run, first: str, then: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    write_images(here / "images")
    elsewhere.mkdir()
    (here / "mine.py").write_text(SPACE.format(first=first, then=then))
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))

    def there(*words: object) -> str:
        monkeypatch.chdir(here)
        code, out, err = run(*words)
        assert code == 0, err
        return out

    for trials in (1, 2):
        told = there("search", "mine.py", "--data", "images", "--out", "run", "--trials", trials, "--workers", workers, *QUICK)
        assert "capnas best run\n" in told
    assert {"study.toml", "journal.log", "environment.json", "trials.csv"} == set(os.listdir(here / "run"))
    assert f'data = "{here}/images"' in (here / "run" / "study.toml").read_text()
    if workers == 1:
        told = there("best", "run", "--retrain", "--epochs", 1, "--code", "code.py", "--device", "cpu", "--json")
        assert (here / json.loads(told)["retrained"]["model"] / "manifest.json").is_file()
        assert (here / "code.py").is_file()
        there("prune", "run:best", "--lossless", 0.9, "--train-epochs", 1, "--device", "cpu", "--out", "narrow")
        assert (here / "narrow" / "manifest.json").is_file()
        there("resolution", "run:best", "--candidates", 8, "--dry-run", "--device", "cpu", "--out", "sizes")
        assert (here / "sizes" / "resolution.json").is_file()
        (here / "net.py").write_text(NETWORK)
        small = ["--lipschitz", 1, "--distance", 0.5, "--seeds", 1, "--epochs", 1, "--train", "batch_size=32", "--device", "cpu"]
        there("excess", "net.py:net", "--data", "images", "--data-option", "image_size=8", "--out", "kept", *small)
        assert len((here / "kept" / "runs.jsonl").read_text().splitlines()) == 2
    assert not list(elsewhere.iterdir())
