"""What a data set is before decoding: parts ("train", "validation", "test") that are arrays, or readers of single images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from capnas.data.images import as_images, as_labels
from capnas.devices import is_out_of_memory
from capnas.errors import DataError, described, listed

SPLIT_NAMES = {
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
    def read(self, index: int) -> tuple[Any, Any]:
        """The image (PIL, array or tensor) and its class as it is given, for `capnas.data.images.as_label`."""
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


def from_python(source: Any) -> Found:
    """The parts of a torch Dataset, a pair (images, labels), or a mapping from split names to either.

    Example:
        >>> sorted(from_python({"train": ([[[0.5]]], [0]), "val": ([[[0.5]]], [0])}).parts)
        ['train', 'validation']
    """
    if not isinstance(source, Mapping):
        name = "arrays" if isinstance(source, (tuple, list)) else type(source).__name__
        return Found(name=name, parts={"train": part(source, "data")}, class_names=class_names(source))
    for key in source:
        if key not in SPLIT_NAMES:
            raise DataError(f"data: expected splits named train, val (or valid, validation) and test, found {key!r}.")
    parts = {SPLIT_NAMES[k]: part(v, f"data[{k!r}]") for k, v in source.items()}
    if "train" not in parts or len(parts) < len(source):
        raise DataError(f"data: expected one entry 'train' and at most one 'val' and one 'test', found {listed(source) or 'none'}.")
    train = next(v for k, v in source.items() if SPLIT_NAMES[k] == "train")
    return Found(name="mapping", parts=parts, class_names=class_names(train))


def part(value: Any, what: str) -> Pair | Reader:
    """One part given from Python: a pair of arrays or a torch Dataset; ``what`` names it in messages."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        images, labels = as_images(value[0], f"{what} images"), as_labels(value[1], f"{what} labels")
        if len(images) != len(labels):
            raise DataError(f"{what}: expected as many labels as images, found {len(images)} images and {len(labels)} labels.")
        return Pair(images=images, labels=labels)
    if isinstance(value, torch.utils.data.IterableDataset):  # before what has items: it inherits a __getitem__ that only raises
        if not hasattr(value, "__len__"):
            found = type(value).__name__
            raise DataError(f"{what}: expected a stream that knows its length (__len__), found {found} without; give it one, or a Dataset.")
        return StreamReader(value)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, (tuple, list, str, np.ndarray, torch.Tensor)):
        return DatasetReader(value)
    raise DataError(
        f"{what}: expected a name, a folder, a torch Dataset of (image, class) or a pair (images, labels), found {type(value).__name__}; "
        "items of a Dataset may be dicts with 'image' or 'img', and 'label'."
    )


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        key = next((key for key in ("image", "img") if key in item), None)
        if key is None or "label" not in item:
            keys = listed(map(repr, item)) or "none"
            advice = "a dict needs 'image' or 'img', and 'label'"
            raise TypeError(f"expected an item (image, class), found {type(item).__name__} with the keys {keys}; {advice}")
        return item[key], item["label"]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise TypeError(f"expected an item (image, class), found {type(item).__name__}")
    return item[0], item[1]


def _timm_reader(dataset: Any) -> Any:
    """What timm's data sets read files with; None of others, whose attribute of this name may be anything."""
    reader = getattr(dataset, "reader", None)
    return reader if callable(getattr(reader, "filename", None)) else None


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names that torchvision's and timm's data sets carry, in the order of the labels."""
    classes = getattr(dataset, "classes", None)
    if classes is None:
        mapping = getattr(_timm_reader(dataset), "class_to_idx", None)
        classes = sorted(mapping, key=mapping.__getitem__) if mapping and sorted(mapping.values()) == list(range(len(mapping))) else None
    return tuple(str(c) for c in classes) if isinstance(classes, (list, tuple)) and classes else None


class DatasetReader:
    """A map-style Dataset of (image, class), or of dicts with ``image`` or ``img`` and ``label``, as Hugging Face gives them.

    timm's own are read below their habit of replacing unreadable images by the next.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.inner = _timm_reader(dataset)
        self.threadsafe = False

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Any, Any]:
        """Image and class of one item."""
        if self.inner is not None:
            file, label = _pair(self.inner[index])
            return Image.open(file), label
        image, label = _pair(self.dataset[index])
        if isinstance(image, Image.Image):
            image.load()  # whoever converts it closes its file, and the Dataset may give the same image again
        return image, label

    def name(self, index: int) -> str:
        """The file name where the Dataset knows one."""
        if self.inner is not None:
            return str(self.inner.filename(index))
        return f"item {index}"

    def labels(self) -> torch.Tensor | None:
        """From attributes as torchvision's and timm's have; None without class numbers, or where the Dataset turns them into others."""
        if self.inner is None and getattr(self.dataset, "target_transform", None) is not None:
            return None
        for attribute in ("targets", "labels", "_labels"):
            values = getattr(self.dataset, attribute, None)
            if isinstance(values, Sized) and len(values) == len(self):
                with contextlib.suppress(DataError):  # names, perhaps, which the Dataset numbers in its items
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

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        items, count = iter(self.dataset), 0
        while True:
            try:
                pair = _pair(next(items))
            except StopIteration:
                return
            except Exception as error:  # a stream cannot go on behind an item that breaks it
                if is_out_of_memory(error):
                    raise
                reason = described(error, None)
                raise DataError(f"the stream breaks after {count} items ({reason}); repair it, or use a set with random access.") from error
            count += 1
            yield pair

    def read(self, index: int) -> tuple[Any, Any]:
        """Not possible: items come in the order of the stream."""
        raise DataError("a streamed data set has no random access; it must fit in memory_limit.")

    def name(self, index: int) -> str:
        """Its place in the stream."""
        return f"an image of the stream, counted as number {index}"

    def labels(self) -> torch.Tensor | None:
        """Unknown before reading."""
        return None


class FileReader:
    """Image files with a class each."""

    threadsafe = True

    def __init__(self, paths: list[Path], classes: list[int], root: Path) -> None:
        self.paths, self.classes, self.root = paths, classes, root

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Any, Any]:
        """Opens the file; it is decoded by whoever converts it."""
        return Image.open(self.paths[index]), self.classes[index]

    def name(self, index: int) -> str:
        """The path below the data folder."""
        return str(self.paths[index].relative_to(self.root))

    def labels(self) -> torch.Tensor | None:
        """One class per file."""
        return torch.tensor(self.classes, dtype=torch.int64)
