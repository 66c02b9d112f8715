"""Data sets by name: the embedded one, Fashion-MNIST's files, and every name that timm's `create_dataset` takes."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capnas.data.images import as_images, as_labels
from capnas.data.sources import DatasetReader, Found, Pair, StreamReader, class_names, part
from capnas.errors import DataError, described

EMBEDDED = "fashion-mnist-12k"
_GIVE = "give root=DIR or download=True (in the command line --data-option root=DIR or --data-option download=true)"
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_STEMS = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_MIRROR_CHANGES_CLASS = {"mnist", "svhn", "emnist", "kmnist", "qmnist", "omniglot"}
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets tensorflow", "wds": "webdataset"}


# --- embedded and idx files ---------------------------------------------------------------------------------------------------------


def embedded() -> Found:
    """fashion-mnist-12k."""
    path = Path(__file__).parent.parent / "embedded" / f"{EMBEDDED}.npz"
    if not path.exists():
        raise DataError(f"expected the embedded data set at {path}, found nothing; install capnas again.")
    with np.load(path) as store:
        parts = {s: Pair(images=as_images(store[f"{s}_images"]), labels=as_labels(store[f"{s}_labels"])) for s in ("train", "test")}
    return Found(name=EMBEDDED, parts=parts, class_names=FASHION_CLASSES)


def cache_folder() -> Path:
    """Where data sets are downloaded to when no root is given: ``$XDG_CACHE_HOME/capnas`` or ``~/.cache/capnas``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capnas"


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an idx file, gzip or plain (header: two zero bytes, 8 for uint8, the number of axes, each size big-endian)."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3]))
        if raw[:3] != b"\0\0\x08" or len(raw) != 4 + 4 * len(shape) + int(np.prod(shape)):
            raise ValueError(f"header {raw[:4].hex()}, {len(raw)} bytes")
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path}: expected a whole idx file of bytes, found a damaged one ({error}); fetch it again.") from None
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def fashion_mnist(root: str | Path | None = None, download: bool = False) -> Found:
    """The 60,000 and 10,000 images, from torchvision's folder under ``root``, the files themselves, Debian's package, or a download."""
    base = Path(root).expanduser() if root is not None else cache_folder()
    folders = [base / "FashionMNIST" / "raw", base, *([] if root is not None else [DEBIAN_FASHION])]
    files = _fashion_files(folders)
    if not files and download:
        with _explained("fashion-mnist", "a download needs a network, once"):
            _timm_data().create_dataset("torch/fashion_mnist", root=str(base), split="train", download=True)
        files = _fashion_files(folders)
    if not files:
        raise DataError(
            f"fashion-mnist: expected {_FASHION_STEMS[0]} and its three companions (plain or .gz) in {' or '.join(map(str, folders))}, "
            f"found none; {_GIVE}, install Debian's dataset-fashion-mnist, or use the embedded fashion-mnist-12k."
        )
    train, train_labels, test, test_labels = (read_idx(f) for f in files)
    parts = {"train": part((train, train_labels), "fashion-mnist train"), "test": part((test, test_labels), "fashion-mnist test")}
    return Found(name="fashion-mnist", parts=parts, class_names=FASHION_CLASSES)


def _fashion_files(folders: list[Path]) -> list[Path]:
    for folder in folders:
        files = [p for stem in _FASHION_STEMS for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()]
        if {f.name.removesuffix(".gz") for f in files} == set(_FASHION_STEMS):
            return [next(f for f in files if f.name.startswith(stem)) for stem in _FASHION_STEMS]
    return []


def _timm_data() -> Any:
    from capnas._timm import import_timm

    return import_timm("timm.data")


@contextlib.contextmanager
def _explained(name: str, advice: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # timm and torchvision print advice; stdout belongs to the caller
            yield
    except (DataError, MemoryError):
        raise
    except ImportError as error:
        packages = _PACKAGES.get(name.partition("/")[0].lower(), error.name or "the missing package")
        raise DataError(f"data {name!r} needs a package that is not installed ({error}); pip install {packages}.") from error
    except Exception as error:  # each library below timm raises its own kinds
        raise DataError(f"data {name!r} cannot be opened: {described(error, 500)}; {advice}.") from error


def timm_named(name: str, root: str | Path | None = None, download: bool = False) -> Found:
    """A name that `timm.data.create_dataset` takes: ``torch/``, ``hfds/``, ``hfids/``, ``tfds/`` or ``wds/`` and the rest.

    torchvision's basic sets bring train and test. For the others the splits named train, validation and test are opened where they exist.

    Raises:
        DataError: a package, the files or the network are missing; the text repeats the library's reason and says what to install or give.
    """
    prefix, _, rest = name.partition("/")
    prefix = prefix.lower()
    base = str(Path(root).expanduser()) if root is not None else str(cache_folder()) if prefix == "torch" else None
    where = f"under {base}" if base else "in the cache of its library"
    advice = f"expected it {where}: check the name, or {_GIVE}"

    def open_split(split: str) -> Any:
        if prefix == "wds":
            importlib.import_module("webdataset")  # timm would say only that it is None
        if prefix == "wds" and base is None:
            raise FileNotFoundError("root is needed, the folder or address of the shards")
        return _timm_data().create_dataset(name, root=base, split=split, download=download)

    with _explained(name, advice):
        opened: dict[str, Any] = {"train": open_split("train")}
        if prefix == "torch":
            opened["test"] = open_split("validation")
    reasons = []
    for split in () if prefix == "torch" else ("validation", "test"):
        try:
            with _explained(name, advice):
                opened[split] = open_split(split)
        except DataError as error:
            reasons.append(str(error))
    if len(opened) == 1:
        warnings.warn(
            f"data {name!r}: no validation and no test split, both are carved from train ({reasons[0]})", UserWarning, stacklevel=2
        )
    parts = {s: StreamReader(d) if isinstance(d, torch.utils.data.IterableDataset) else DatasetReader(d) for s, d in opened.items()}
    flip = not set(re.split(r"[/:_]", rest.lower())) & _MIRROR_CHANGES_CLASS or "fashion" in rest.lower()
    return Found(name=name, parts=parts, class_names=class_names(opened["train"]), flip=flip)
