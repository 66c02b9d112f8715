from __future__ import annotations

import gzip
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capnas.data import load_data, named
from capnas.data.sources import Pair
from capnas.errors import DataError, UsageError

SCRIPT = Path(named.__file__).parent.parent / "embedded" / "make_fashion_mnist_12k.py"


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def small_fashion(folder: Path, packed: bool) -> None:
    folder.mkdir(parents=True)
    for part, n in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))


def test_embedded_set_is_stratified_and_balanced() -> None:
    parts = named.embedded().parts
    for split, per_class in (("train", 1000), ("test", 200)):
        part = parts[split]
        assert isinstance(part, Pair)
        assert part.images.shape == (10 * per_class, 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert part.labels.bincount().tolist() == [per_class] * 10


def test_embedded_set_is_what_its_script_makes(tmp_path: Path) -> None:
    if not named.DEBIAN_FASHION.is_dir():
        pytest.skip("the full Fashion-MNIST is not on this machine (Debian's dataset-fashion-mnist)")
    run = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "same arrays: True" in run.stdout
    with np.load(SCRIPT.parent / "fashion-mnist-12k.npz") as store:
        full = named.read_idx(named.DEBIAN_FASHION / "t10k-images-idx3-ubyte.gz")
        np.testing.assert_array_equal(full[store["test_positions"]], store["test_images"])


def test_licence_lies_beside_the_data() -> None:
    text = (SCRIPT.parent / "LICENSE-fashion-mnist").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


@pytest.mark.parametrize(("below", "packed"), [("FashionMNIST/raw", False), ("FashionMNIST/raw", True), ("", True)])
def test_fashion_mnist_finds_its_files(tmp_path: Path, below: str, packed: bool) -> None:
    small_fashion(tmp_path / "root" / below, packed)
    data = load_data("fashion-mnist", root=tmp_path / "root")
    assert data.sizes == {"train": 50, "validation": 10, "test": 20}
    assert data.class_names[9] == "Ankle boot"


def test_fashion_mnist_absent_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"expected train-images-idx3-ubyte .* found none; give root=DIR or download=True .*, install Debian"
    ):
        load_data("fashion-mnist", root=tmp_path)
    small_fashion(tmp_path / "raw", False)
    path = tmp_path / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="expected a whole idx file of bytes, found a damaged one"):
        load_data("fashion-mnist", root=tmp_path / "raw")
    path.write_bytes(gzip.compress(b"x" * 100)[:20])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte: expected a whole idx file"):
        load_data("fashion-mnist", root=tmp_path / "raw")


def test_torchvision_set_through_timm(tmp_path: Path) -> None:
    small_fashion(tmp_path / "FashionMNIST" / "raw", False)
    data = load_data("torch/fashion_mnist", root=tmp_path)
    assert data.sizes == {"train": 50, "validation": 10, "test": 20}
    assert data.augment.flip
    assert data.class_names[1] == "Trouser"
    direct = load_data("fashion-mnist", root=tmp_path)
    torch.testing.assert_close(data.probe(50), direct.probe(50))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "torch/cifar10",
            r"RuntimeError: Dataset not found .* expected it under .*: check the name, or give root=DIR or download=True "
            r"\(in the command line --data-option root=DIR or --data-option download=true\)",
        ),
        ("torch/nothing", "Unknown torchvision dataset nothing"),
        ("hfds/nothing", "pip install datasets|cannot be opened"),
        ("hfids/nothing", "pip install datasets|cannot be opened"),
        ("tfds/nothing", "pip install tensorflow-datasets tensorflow|cannot be opened"),
        ("wds/nothing", "pip install webdataset|cannot be opened"),
    ],
)
def test_missing_package_or_files(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=text):
        load_data(name, root=tmp_path)
    assert capsys.readouterr().out == ""  # stdout belongs to the caller


class FakeReader:
    """As timm's readers: items are (open file, class), one of them damaged."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Any, int]:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (index, 0, 0)).save(buffer, "png")
        return io.BytesIO(buffer.getvalue() if index else b"damaged"), index % 2

    def filename(self, index: int, *_: Any) -> str:
        return f"{index}.png"


def fake_timm(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Any]) -> None:
    def create_dataset(name: str, *, root: str | None, split: str, download: bool) -> Any:
        if split not in splits:
            raise ValueError(f"Unknown split {split}")
        return splits[split]

    monkeypatch.setattr(named, "_timm_data", lambda: SimpleNamespace(create_dataset=create_dataset))


def test_unreadable_items_of_timm_are_not_replaced_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.reader)

    fake_timm(
        monkeypatch,
        {"train": Dataset(reader=FakeReader(40)), "validation": Dataset(reader=FakeReader(11)), "test": Dataset(reader=FakeReader(9))},
    )
    with pytest.warns(UserWarning, match=r"skipped 3 of 60 images, which cannot be read: 0.png \(not an image\)"):
        data = load_data("hfds/pets", max_unreadable=0.1)
    assert data.sizes == {"train": 39, "validation": 10, "test": 8}
    assert data.class_names == ("cat", "dog")


def test_streams_are_decoded_once_and_what_they_leave_out_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self) -> int:
            return 41

        def __iter__(self) -> Any:
            return ((Image.new("L", (8, 8), i), i % 2) for i in range(40))

    fake_timm(monkeypatch, {"train": Stream()})
    with pytest.warns(UserWarning, match="hfids/pets|skipped") as caught:
        data = load_data("hfids/pets", max_unreadable=0.1)
    texts = [str(w.message) for w in caught]
    assert any(
        "no validation and no test split, both are carved from train (data 'hfids/pets' cannot be opened: ValueError" in t for t in texts
    )
    assert any("skipped 1 of 41 images" in t and "announced, not delivered" in t for t in texts)
    assert data.sizes == {"train": 28, "validation": 4, "test": 8}
    with (
        pytest.warns(UserWarning, match="no validation"),
        pytest.raises(DataError, match=r"streams .* must fit: raise it, or lower image_size"),
    ):
        load_data("hfids/pets", memory_limit=0)
    broken = [(Image.new("L", (8, 8)), 0)] * 3
    monkeypatch.setattr(Stream, "__iter__", lambda self: (broken[i] for i in range(9)))
    with pytest.warns(UserWarning, match="no validation"), pytest.raises(DataError, match=r"the stream breaks after 3 items \(IndexError"):
        load_data("hfids/pets")


@pytest.mark.parametrize(
    ("name", "flip"), [("hfds/ylecun/mnist", False), ("tfds/svhn_cropped", False), ("hfds/fashion_mnist", True), ("hfds/pets", True)]
)
def test_digits_are_not_mirrored(monkeypatch: pytest.MonkeyPatch, name: str, flip: bool) -> None:
    items = [(Image.new("L", (8, 8), i), i % 2) for i in range(8)]
    fake_timm(monkeypatch, {"train": items, "test": items})
    assert load_data(name).augment.flip is flip


def test_unknown_names() -> None:
    told = r"^there is no folder 'fashion-mnist-12' here, and as a name data must be one of .*Did you mean 'fashion-mnist-12k'\?$"
    with pytest.raises(UsageError, match=told):
        load_data("fashion-mnist-12")
    with pytest.raises(UsageError, match="data 'torch/image_folder' needs root"):
        load_data("torch/image_folder")
    with pytest.raises(DataError, match="expected a folder of images, found a file; unpack it"):
        load_data(__file__)
