from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_space import images, write_images

from capnas.data import ImageData, load_data
from capnas.data.digest import digest_changes


def changes(a: ImageData, b: ImageData) -> list[str]:
    assert a.sizes == b.sizes
    return digest_changes(a.digest, b.digest)


def test_other_labels_pixels_or_splits_are_told_apart_and_the_same_are_not() -> None:
    x, y = images(120)

    def of(x: Any, y: Any, **options: Any) -> ImageData:
        return load_data((x, y), validation=0.2, test=0.2, **options)

    data = of(x, y)
    assert changes(data, of(x.copy(), torch.tensor(y))) == []
    noise = np.random.default_rng(0).integers(0, 3, x.shape, dtype=np.uint8)
    assert changes(data, of(np.minimum(x, 250) + noise, y)) == []  # as another decoder may give them
    assert changes(data, of(x, 2 - y)) == ["the labels differ", "the pixels differ"]  # other images are drawn into the splits
    assert changes(data, of(x[:, :, ::-1].copy(), y)) == ["the pixels differ"]
    y[[0, 1]] = y[[1, 0]]
    assert "the labels differ" in changes(data, of(x, y))


def test_pixels_of_validation_are_looked_at_and_a_tenth_of_a_standard_deviation_is_too_much() -> None:
    def of(shade: int) -> ImageData:
        parts = {name: images(60) for name in ("train", "test")}
        return load_data(parts | {"validation": (np.full((9, 8, 8), shade, np.uint8), np.arange(9) % 3)})

    assert changes(of(0), of(255)) == ["the pixels differ"]
    assert digest_changes({"pixels": [0.5]}, {"pixels": [0.6]}) == digest_changes({"pixels": [0.5]}, {"pixels": [0.5, 0.5]})
    assert digest_changes({"pixels": [0.5]}, {"pixels": [0.6]}) == ["the pixels differ"]


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_file_moved_to_another_class_is_told_wherever_the_images_are_kept(tmp_path: Path, memory_limit: int) -> None:
    folder = write_images(tmp_path / "images")
    before = load_data(folder, image_size=8, in_chans=1)
    assert changes(before, load_data(folder, image_size=8, in_chans=1, memory_limit=memory_limit, workers=0)) == []
    (folder / "0" / "60.png").rename(folder / "1" / "60.png")
    (folder / "1" / "61.png").rename(folder / "0" / "61.png")
    assert "the files differ" in changes(before, load_data(folder, image_size=8, in_chans=1, memory_limit=memory_limit, workers=0))


def test_other_labels_of_the_test_split_are_told() -> None:
    x, y = images(60)
    before, after = (load_data({"train": (x, y), "test": (x, (y + shift) % 3)}) for shift in (0, 1))
    assert changes(before, after) == ["the labels differ"]


def test_the_test_split_leaves_no_pixel_behind() -> None:
    def digest(shade: int) -> Any:
        x, y = images(60)
        return load_data({"train": (x, y), "test": (np.full((9, 8, 8), shade, np.uint8), np.arange(9) % 3)}).digest

    assert digest(0) == digest(255)
