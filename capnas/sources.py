"""Where images come from: the embedded set, Fashion-MNIST's files, the names timm knows, folders, torch Datasets, arrays.

`find` turns any of them into a `Found`: up to three parts ("train", "validation", "test"), each an array pair or a reader of single images.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from capnas.errors import DataError, UsageError
from capnas.images import as_images, as_labels

EMBEDDED = "fashion-mnist-12k"
TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
_MIRROR_CHANGES_CLASS = ("mnist", "svhn", "emnist", "kmnist", "qmnist", "omniglot")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}


class Reader(Protocol):
    """Single images by number; `read` may fail on one image, which is then skipped and named."""

    threadsafe: bool

    def __len__(self) -> int: ...
    def read(self, index: int) -> tuple[Any, int]:
        """The image (PIL, array or tensor) and its class."""
        ...

    def name(self, index: int) -> str:
        """What a message calls this image."""
        ...

    def labels(self) -> torch.Tensor | None:
        """All classes without decoding an image, or None where only the items tell."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Images (N, C, H, W) and labels (N,) that are in memory already."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a source holds before decoding.

    Attributes:
        name: what reports call the data set.
        parts: "train" and, where the source brings them, "validation" and "test".
        class_names: in the order of the labels, or None where they are only numbers.
        flip: False where a mirror image would be another class (digits).
    """

    name: str
    parts: Mapping[str, Pair | Reader]
    class_names: tuple[str, ...] | None = None
    flip: bool = True


def find(source: Any, *, root: str | Path | None = None, download: bool = False) -> Found:
    """The parts of a source: see `capnas.data.load_data` for what may be given.

    Raises:
        DataError: missing, wrongly laid out or unusable data; the text says what was expected and found.
        UsageError: a name that is neither known nor a folder.
    """
    if isinstance(source, str) and source == EMBEDDED:
        return _embedded()
    if isinstance(source, str) and source == "fashion-mnist":
        return _fashion_mnist(root, download)
    if isinstance(source, str) and source in ("", "folder", "image_folder", "torch/image_folder", "torch/folder"):
        if root is None:
            raise UsageError(f"data {source!r} needs root, the folder of images.")
        return _path(Path(root))
    if isinstance(source, str) and source.partition("/")[0].lower() in TIMM_PREFIXES and "/" in source:
        return _timm(source, root, download)
    if isinstance(source, (str, os.PathLike)):
        return _path(Path(source).expanduser())
    if isinstance(source, Mapping):
        parts = {_split_name(k): _part(v, f"data[{k!r}]") for k, v in source.items()}
        if "train" not in parts or len(parts) < len(source):
            raise DataError(
                f"data: expected one entry 'train' and optionally 'val' and 'test', found {', '.join(map(str, source)) or 'none'}."
            )
        names = next((n for v in source.values() if (n := _class_names(v))), None)
        return Found(name="mapping", parts=parts, class_names=names)
    return Found(
        name="arrays" if isinstance(source, (tuple, list)) else type(source).__name__,
        parts={"train": _part(source, "data")},
        class_names=_class_names(source),
    )


def _split_name(key: object) -> str:
    if str(key) not in _SPLITS:
        raise DataError(f"data: a split is named train, val (valid, validation) or test, found {key!r}.")
    return _SPLITS[str(key)]


def _part(value: Any, what: str) -> Pair | Reader:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        images, labels = as_images(value[0], f"{what} images"), as_labels(value[1], f"{what} labels")
        if len(images) != len(labels):
            raise DataError(f"{what}: expected as many labels as images, found {len(images)} images and {len(labels)} labels.")
        return Pair(images=images, labels=labels)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (tuple, list, str, np.ndarray, torch.Tensor)):
        return DatasetReader(value)
    if isinstance(value, torch.utils.data.IterableDataset):
        return StreamReader(value)
    raise DataError(
        f"{what}: expected a name, a folder, a torch Dataset of (image, class) or a pair (images, labels), found {type(value).__name__}."
    )


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    if classes is None:
        mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
        classes = sorted(mapping, key=mapping.__getitem__) if mapping and sorted(mapping.values()) == list(range(len(mapping))) else None
    return tuple(str(c) for c in classes) if isinstance(classes, (list, tuple)) and classes else None


# --- embedded and idx files ---------------------------------------------------------------------------------------------------------


def _embedded() -> Found:
    path = Path(__file__).parent / "embedded" / f"{EMBEDDED}.npz"
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


def _fashion_mnist(root: str | Path | None, download: bool) -> Found:
    base = Path(root).expanduser() if root is not None else cache_folder()
    folders = [base / "FashionMNIST" / "raw", base / "raw", base, *([] if root is not None else [DEBIAN_FASHION])]
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

    def files() -> list[Path] | None:
        for folder in folders:
            hits = [next((p for p in (folder / s, folder / f"{s}.gz") if p.exists()), None) for s in stems]
            if all(hits):
                return [p for p in hits if p]
        return None

    paths = files()
    if paths is None and download:
        with _explained("fashion-mnist", "download it once with a network, or give root"):
            _timm_module().create_dataset("torch/fashion_mnist", root=str(base), split="train", download=True)
        paths = files()
    if paths is None:
        raise DataError(
            f"fashion-mnist: expected {stems[0]} and its three companions (plain or .gz) in one of {', '.join(map(str, folders))}, found none; "
            "give root, set download=True, install Debian's dataset-fashion-mnist, or use the embedded fashion-mnist-12k."
        )
    arrays = [read_idx(p) for p in paths]
    parts = {s: _part((arrays[2 * i], arrays[2 * i + 1]), f"fashion-mnist {s}") for i, s in enumerate(("train", "test"))}
    return Found(name="fashion-mnist", parts=parts, class_names=FASHION_CLASSES)


# --- names that timm knows ----------------------------------------------------------------------------------------------------------


def _timm_module() -> Any:
    from capnas._timm import import_timm

    return import_timm("timm.data")


@contextlib.contextmanager
def _explained(name: str, advice: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # timm and torchvision print advice; stdout belongs to the caller
            yield
    except DataError:
        raise
    except ImportError as error:
        package = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets tensorflow"}.get(
            name.partition("/")[0].lower(), ""
        )
        missing = package or str(getattr(error, "name", "") or error)
        raise DataError(f"data {name!r} needs a package that is not installed ({error}): pip install {missing}.") from error
    except Exception as error:  # each library below timm raises its own kinds
        raise DataError(
            f"data {name!r} cannot be opened: {type(error).__name__}: {str(error).strip() or 'no reason given'}; {advice}."
        ) from error


def _timm(name: str, root: str | Path | None, download: bool) -> Found:
    prefix, _, rest = name.partition("/")
    prefix = prefix.lower()
    if prefix == "wds":
        with _explained(name, ""):
            try:
                import webdataset  # noqa: F401
            except ImportError as error:
                raise DataError(f"data {name!r} needs a package that is not installed ({error}): pip install webdataset.") from error
    base = str(Path(root).expanduser()) if root is not None else (str(cache_folder()) if prefix == "torch" else None)
    create = _timm_module().create_dataset
    advice = f"expected it under {base or 'the cache of its library'}: give root, set download=True, or check the name and the network"

    def open_split(split: str) -> Any:
        return create(
            name, root=base, split=split, download=download, is_training=False, input_img_mode=None if prefix != "torch" else "RGB"
        )

    with _explained(name, advice):
        parts: dict[str, Any] = {"train": open_split("train")}
        if prefix == "torch":
            parts["test"] = open_split("validation")
    if prefix != "torch":
        for split in ("validation", "test"):
            with contextlib.suppress(DataError), _explained(name, advice):
                parts[split] = open_split(split)
    lowered = rest.lower()
    flip = not any(lowered.split("/")[-1] == m for m in _MIRROR_CHANGES_CLASS)
    found = {s: StreamReader(d) if isinstance(d, torch.utils.data.IterableDataset) else DatasetReader(d) for s, d in parts.items()}
    return Found(name=name, parts=found, class_names=_class_names(parts["train"]), flip=flip)


class DatasetReader:
    """A map-style torch Dataset of (image, class); timm's own are read below their habit of replacing unreadable images by the next."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.inner = getattr(dataset, "reader", None)
        self.threadsafe = False

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, int]:
        """Image and class of one item."""
        item = self.dataset[index] if self.inner is None else self.inner[index]
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(f"expected an item (image, class), found {type(item).__name__}")
        image, label = item[0], item[1]
        return (image if self.inner is None else Image.open(image)), int(label)

    def name(self, index: int) -> str:
        """The file name where the Dataset knows one."""
        if self.inner is not None:
            return str(self.inner.filename(index))
        return f"item {index}"

    def labels(self) -> torch.Tensor | None:
        """From the attributes that torchvision's and timm's data sets have."""
        for attribute in ("targets", "labels", "_labels"):
            values = getattr(self.dataset, attribute, None)
            if values is not None and len(values) == len(self):
                return as_labels(values)
        samples = getattr(self.inner, "samples", None)
        if samples is not None:
            return as_labels([s[1] for s in samples])
        targets = getattr(self.inner, "iter_targets", None)
        return as_labels(list(targets())) if targets is not None else None


class StreamReader:
    """An iterable data set: can only be read once from its beginning, so it has to fit in memory."""

    threadsafe = False

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for image, label, *_ in self.dataset:
            yield image, int(label)

    def read(self, index: int) -> tuple[Any, int]:
        """Not possible: items come in the order of the stream."""
        raise DataError("a streamed data set has no random access; it must fit in memory_limit.")

    def name(self, index: int) -> str:
        """Its place in the stream."""
        return f"item {index} of the stream"

    def labels(self) -> torch.Tensor | None:
        """Unknown before reading."""
        return None


# --- folders ------------------------------------------------------------------------------------------------------------------------


class FileReader:
    """Image files with a class each."""

    threadsafe = True

    def __init__(self, paths: list[Path], classes: list[int], root: Path) -> None:
        self.paths, self.classes, self.root = paths, classes, root

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Any, int]:
        """Opens the file; it is decoded by whoever converts it."""
        return Image.open(self.paths[index]), self.classes[index]

    def name(self, index: int) -> str:
        """The path below the data folder."""
        return str(self.paths[index].relative_to(self.root))

    def labels(self) -> torch.Tensor | None:
        """One class per file."""
        return torch.tensor(self.classes, dtype=torch.int64)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", name.lower())]


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    entries = sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__"))), key=lambda p: _natural(p.name))
    return [p for p in entries if p.is_dir()], [p for p in entries if p.is_file() and p.suffix.lower() in EXTENSIONS]


def _path(path: Path) -> Found:
    if path.is_file() and path.suffix == ".tar":
        return _tar(path)
    if not path.exists():
        known = f"{EMBEDDED}, fashion-mnist, {', '.join(p + '/NAME' for p in TIMM_PREFIXES)}"
        raise UsageError(f"data: {str(path)!r} is neither a known name nor an existing folder; expected {known}, or a folder of images.")
    if not path.is_dir():
        raise DataError(
            f"{path}: expected a folder of images, found a file; unpack it (train/ and val/ or test/, each with a folder per class)."
        )
    folders, loose = _visible(path)
    splits: dict[str, Path] = {}
    for folder in folders:
        split = _SPLITS.get(folder.name.lower())
        if split in splits:
            raise DataError(f"{path}: expected one folder per split, found both {splits[split].name}/ and {folder.name}/.")
        if split:
            splits[split] = folder
    if splits and "train" not in splits:
        raise DataError(f"{path}: expected train/ beside {', '.join(f.name + '/' for f in splits.values())}, found none.")
    if not splits:
        splits = {"train": path}
    elif loose or len(splits) < len(folders):
        extra = [f.name + "/" for f in folders if f not in splits.values()] + [p.name for p in loose]
        raise DataError(f"{path}: expected only train/, val/ and test/, found also {_some(extra)}; move them away.")
    class_names: tuple[str, ...] = ()
    parts: dict[str, Pair | Reader] = {}
    for split in sorted(splits, key=("train", "validation", "test").index):
        parts[split], class_names = _class_folders(splits[split], class_names, path)
    if "validation" in parts and "test" not in parts:
        parts["test"] = parts.pop("validation")  # the only held-out images: kept for the end
    return Found(name=path.resolve().name, parts=parts, class_names=class_names)


def _class_folders(folder: Path, known: tuple[str, ...], root: Path) -> tuple[FileReader, tuple[str, ...]]:
    folders, loose = _visible(folder)
    if loose:
        beside = f"beside {len(folders)} class folders" if folders else "and no folders"
        raise DataError(
            f"{folder}: expected one folder per class, found {len(loose)} image files {beside} ({_some([p.name for p in loose])})."
        )
    names = tuple(f.name for f in folders)
    if len(names) < 2 and not known:
        raise DataError(f"{folder}: expected at least two class folders, found {_some(names) or 'none'}.")
    if known and set(names) - set(known):
        raise DataError(f"{folder}: expected the classes of train ({_some(known)}), found also {_some(sorted(set(names) - set(known)))}.")
    paths: list[Path] = []
    classes: list[int] = []
    for class_folder in folders:
        files = sorted(
            (Path(base) / f for base, _, names_ in os.walk(class_folder, followlinks=True) for f in names_
             if Path(f).suffix.lower() in EXTENSIONS and not f.startswith(".")),
            key=lambda p: _natural(str(p)),
        )  # fmt: skip
        if not files:
            raise DataError(f"{class_folder}: expected images ({', '.join(EXTENSIONS)}), found none; add some or remove the empty class.")
        paths += files
        classes += [(known or names).index(class_folder.name)] * len(files)
    if not paths:
        raise DataError(f"{folder}: expected class folders with images, found none.")
    return FileReader(paths, classes, root), known or names


def _tar(path: Path) -> Found:
    with _explained(str(path), "expected a tar file with one folder of images per class"):
        dataset = _timm_module().create_dataset("", root=str(path))
    return Found(name=path.stem, parts={"train": DatasetReader(dataset)}, class_names=_class_names(dataset))


def _some(names: Any, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")
