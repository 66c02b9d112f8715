"""Images as timm's evaluation prepares them: against timm's own transform, wherever the images are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capnas._timm import import_timm
from capnas.data import load_data
from capnas.data.framing import Framing
from capnas.errors import DataError, UsageError
from capnas.objective.evaluation import fingerprint
from capnas.training import TrainConfig

MEAN, STD = (0.48, 0.46, 0.41), (0.23, 0.22, 0.25)
SIDES = ((90, 64), (40, 61), (24, 24), (320, 240))
FRAMINGS = [
    {"crop_pct": 0.875, "interpolation": "bicubic"},
    {"crop_pct": 0.9},
    {"interpolation": "bilinear"},
    {"crop_pct": 1.15, "crop_mode": "center", "interpolation": "bicubic"},
    {"crop_mode": "squash", "interpolation": "bicubic"},
    {"crop_pct": 0.8, "crop_mode": "border"},
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(16):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels.resize(SIDES[i // 2 % 4]).save(root / "ab"[i % 2] / f"{i}.jpg")
    return root


def by_timm(image: Any, framing: dict[str, Any]) -> torch.Tensor:
    plain = {"crop_pct": 1.0, "interpolation": "bilinear"}
    return import_timm("timm.data").create_transform(32, **plain | framing, mean=MEAN, std=STD)(image)  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize("framing", FRAMINGS, ids=str)
def test_files_meet_timms_evaluation_transform(photographs: Path, framing: dict[str, Any], memory_limit: int) -> None:
    data = load_data(photographs, image_size=32, validation=0.5, mean=MEAN, std=STD, memory_limit=memory_limit, workers=0, **framing)
    files = sorted(photographs.glob("*/*.jpg"), key=lambda p: (p.parent.name, int(p.stem)))
    for split, x in (("validation", next(data.batches("validation", 16))[0]), ("train", data.probe(16)[0])):
        expected = [by_timm(Image.open(files[int(i)]), framing) for i in data.index[split]]
        found = sorted(x, key=lambda image: float(image.sum()))  # a probe has an order of its own
        torch.testing.assert_close(found, sorted(expected, key=lambda image: float(image.sum())), atol=1e-5, rtol=0)
    assert {len(i) for i in data.index.values()} == {6, 4}


@pytest.mark.parametrize("framing", FRAMINGS, ids=str)
def test_arrays_do(framing: dict[str, Any]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 44, 57, 3), dtype=np.uint8)
    data = load_data((pixels, np.arange(40) % 2), image_size=32, mean=MEAN, std=STD, **framing)
    expected = torch.stack([by_timm(Image.fromarray(pixels[int(i)]), framing) for i in data.index["validation"]])
    torch.testing.assert_close(next(data.batches("validation", 40))[0], expected, atol=1e-5, rtol=0)
    floats = Framing(**framing | {"crop_mode": "center"}).tensors(torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2) / 255, 32)
    assert (floats.dtype, floats.shape) == (torch.float32, (4, 3, 32, 32))


def test_trials_on_images_framed_otherwise_are_no_twins() -> None:
    arrays = np.random.default_rng(1).integers(0, 256, (40, 12, 14, 3), dtype=np.uint8), np.arange(40) % 2
    framings: tuple[dict[str, Any], ...] = ({}, {"crop_pct": 0.8}, {"crop_pct": 0.9}, {"crop_pct": 0.9, "crop_mode": "squash"})
    loaded = [load_data(arrays, mean=MEAN, std=STD, **framing) for framing in framings]
    assert len({fingerprint(TrainConfig(), data) for data in loaded}) == len(framings)


def test_framing_that_cannot_be_had_is_refused() -> None:
    arrays = np.zeros((9, 4, 4, 3), np.uint8), np.arange(9) % 2
    for given, says in (
        ({"crop_pct": 87.5}, r"crop_pct must be the share of an image's side to keep, in \[0.1, 2\], got 87.5"),
        ({"crop_mode": "squish"}, "crop_mode must be one of border, center, squash; got 'squish'. Did you mean 'squash'"),
        ({"interpolation": 3}, "interpolation must be one of bicubic, bilinear; got 3"),
        ({"crop_mode": "border"}, "give mean, a number per channel, or another mode"),
        ({"crop_mode": "border", "mean": (0.5, 0.5)}, "mean must have one number for each of 3 channels, got 2"),
    ):
        with pytest.raises(UsageError, match=says):
            load_data(arrays, **given)
    with pytest.raises(DataError, match="crop_mode border is for images in bytes of 1 or 3 channels"):
        load_data((arrays[0] / 7 + 0.1, arrays[1]), crop_mode="border", mean=MEAN)
