"""Image data for a search: one call loads any source, one object hands out batches.

A data set has three splits. The search sees ``train`` and ``validation``; ``test`` is opened once, for the final evaluation.
Images are decoded and resized once into a tensor of bytes where they fit in memory, and go through timm's loader where they do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from capnas.decoding import decode, join, shape_of, total_bytes
from capnas.errors import DataError, UsageError, one_of
from capnas.images import Augment, carve, mean_std, normalise, resize, shift_and_flip, shifts_and_flips
from capnas.sources import EMBEDDED, find

__all__ = ["Augment", "DataSpec", "ImageData", "load_data"]

SPLITS = ("train", "validation", "test", "train+validation")
_TRAINING = ("train", "train+validation")
_GROUP_BYTES = 1 << 23


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything `load_data` was asked for; where the source is a name or a path, it is small, picklable and loads the same data anywhere.

    Example:
        >>> DataSpec(source="fashion-mnist-12k", image_size=16).load().image_size
        16
    """

    source: Any = EMBEDDED
    image_size: int | None = None
    in_chans: int | None = None
    validation: float = 0.1
    test: float = 0.2
    seed: int = 0
    max_unreadable: float = 0.01
    root: str | None = None
    download: bool = False
    memory_limit: int = 2 << 30
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must be the share of images to set aside, in (0, 1), got {getattr(self, name)}.")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable must be a share in [0, 1], got {self.max_unreadable}.")
        for name in ("image_size", "in_chans"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")

    def load(self) -> ImageData:
        """The data."""
        return _load(self)


@dataclass
class _Gate:
    open: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Labelled images in splits that never share an image; made by `load_data`.

    Attributes:
        name: the data set's name.
        num_classes: number of classes; labels are 0 to num_classes - 1.
        in_chans: channels C.
        image_size: stored height and width in pixels.
        class_names: in the order of the labels.
        mean: per channel, over train only; bytes count as 0..1, float arrays in their own units.
        std: likewise.
        sizes: images per split.
        unreadable: "name (reason)" of every image that was skipped.
        augment: what training batches get by default.
        spec: what the data was loaded from. A data set that came from a name or a path pickles as its spec alone and loads itself again.
        index: positions of each split in one numbering of all images.

    Example:
        >>> data = load_data("fashion-mnist-12k")
        >>> data.sizes
        {'train': 9000, 'validation': 1000, 'test': 2000}
        >>> x, y = next(data.batches("train", 64, epoch=0, seed=0))
        >>> x.shape, x.dtype, y.shape
        (torch.Size([64, 1, 28, 28]), torch.float32, torch.Size([64]))
    """

    name: str
    num_classes: int
    in_chans: int
    image_size: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unreadable: tuple[str, ...]
    augment: Augment
    spec: DataSpec
    index: dict[str, torch.Tensor] = field(repr=False)
    _images: torch.Tensor = field(repr=False)
    _labels: torch.Tensor = field(repr=False)
    _gate: _Gate = field(default_factory=_Gate, repr=False)
    _resized: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Images per split."""
        return {split: len(self.index[split]) for split in ("train", "validation", "test")}

    def __reduce__(self) -> Any:
        if isinstance(self.spec.source, (str, Path)):
            return DataSpec.load, (self.spec,)
        return _rebuild, ({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("_gate", "_resized")},)

    @contextlib.contextmanager
    def final_evaluation(self) -> Iterator[ImageData]:
        """Open the test split: a copy of the data that may read it until the block ends. Only the last step of a study has reason to.

        Example:
            >>> data = load_data("fashion-mnist-12k")
            >>> with data.final_evaluation() as opened:
            ...     sum(len(y) for _, y in opened.batches("test", 500))
            2000
        """
        gate = _Gate(open=True)
        try:
            yield dataclasses.replace(self, _gate=gate)
        finally:
            gate.open = False

    def steps(self, split: str, batch_size: int) -> int:
        """How many batches `batches` gives: for training the short last batch is left out, unless it is the only one."""
        n = len(self._positions(split))
        return max(n // batch_size, 1) if split in _TRAINING else -(-n // batch_size)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        augment: bool | Augment | None = None,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of one pass over a split.

        Args:
            split: "train", "validation", "test" or "train+validation". The test split needs `final_evaluation`.
            batch_size: images per batch B. Training drops the short last batch, unless it is the only one; evaluation keeps it.
            epoch: with ``seed`` decides the order and the augmentation of training splits; other splits keep their order.
            seed: see ``epoch``.
            augment: None or True is the data's own for training splits and nothing for others; False is none; or an `Augment`.
            device: where the batches go; augmentation and normalisation run there.
            image_size: another size in pixels, resized from the stored size once and kept.

        Yields:
            x (B, C, H, W) float32, normalised; y (B,) int64.

        Raises:
            UsageError: an unknown split, the test split outside `final_evaluation`, a size below 1.
        """
        positions = self._positions(split)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
        training = split in _TRAINING
        policy = (self.augment if augment in (None, True) else augment or None) if training or isinstance(augment, Augment) else None
        return self._batches(positions, batch_size, training, (seed, epoch), policy, torch.device(device), self._size(image_size))  # type: ignore[arg-type]

    def probe(
        self, n: int, *, seed: int = 0, device: str | torch.device = "cpu", image_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A fixed batch of n images of train (all of them if there are fewer), not augmented: x (n, C, H, W), y (n,).

        Example:
            >>> x, y = load_data("fashion-mnist-12k").probe(8, seed=1)
            >>> x.shape
            torch.Size([8, 1, 28, 28])
        """
        train = self.index["train"]
        chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:n]]
        x = self._at(self._size(image_size))[chosen].to(device)
        return normalise(x, self.mean, self.std), self._labels[chosen].to(device)

    def _positions(self, split: str) -> torch.Tensor:
        if split not in SPLITS:
            raise UsageError(one_of("split", split, SPLITS))
        if split == "test" and not self._gate.open:
            raise UsageError(
                "the test split is closed during a search; open it once: with data.final_evaluation() as opened: opened.batches('test', ...)."
            )
        return torch.cat([self.index[s] for s in split.split("+")])

    def _size(self, image_size: int | None) -> int:
        if image_size is not None and image_size < 1:
            raise UsageError(f"image_size must be at least 1, got {image_size}.")
        return image_size or self.image_size

    def _at(self, size: int) -> torch.Tensor:
        if size == self.image_size:
            return self._images
        if size not in self._resized:
            fresh = resize(self._images, size)
            held = sum(t.nbytes for t in list(self._resized.values()))
            if held + fresh.nbytes > self.spec.memory_limit:
                self._resized.clear()
            self._resized[size] = fresh
            return fresh
        return self._resized[size]

    def _batches(
        self,
        positions: torch.Tensor,
        batch_size: int,
        training: bool,
        seeds: tuple[int, int],
        policy: Augment | None,
        device: torch.device,
        size: int,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images = self._at(size)
        generator = torch.Generator().manual_seed((seeds[0] * 1_000_003 + seeds[1]) % (1 << 63))
        if training:
            positions = positions[torch.randperm(len(positions), generator=generator)]
            positions = positions[: max(len(positions) // batch_size * batch_size, min(batch_size, len(positions)))]
        draws = shifts_and_flips(len(positions), policy, size, generator) if policy else None
        # several batches are gathered at once: on few cores the calls cost more than the bytes
        group = max(_GROUP_BYTES // images[0].nbytes // batch_size, 1) * batch_size
        for start in range(0, len(positions), group):
            chosen = positions[start : start + group]
            x = images[chosen].to(device, non_blocking=True)
            y = self._labels[chosen].to(device, non_blocking=True)
            if draws is not None:
                x = shift_and_flip(x, draws[start : start + group].to(device, non_blocking=True))
            for part, target in zip(x.split(batch_size), y.split(batch_size)):
                yield normalise(part, self.mean, self.std), target


def _rebuild(fields: dict[str, Any]) -> ImageData:
    return ImageData(**fields)


def load_data(source: Any = EMBEDDED, **options: Any) -> ImageData:
    """Load labelled images from wherever they are.

    Args:
        source: one of
            - ``"fashion-mnist-12k"``, embedded: 10,000 + 2,000 test images, 28 x 28 grey;
            - ``"fashion-mnist"``: 60,000 + 10,000, from torchvision's folder under ``root``, Debian's dataset-fashion-mnist, or a download;
            - a name that `timm.data.create_dataset` takes: ``torch/cifar10``, ``hfds/...``, ``hfids/...``, ``tfds/...``, ``wds/...``;
            - a folder with a folder of images per class, or with ``train/`` and ``val/`` and/or ``test/`` that hold such folders;
            - a torch Dataset of (image, class), or a pair (images, labels) of arrays: (N, H, W), (N, H, W, C) or (N, C, H, W), bytes or floats;
            - a mapping from ``train``, ``val``, ``test`` to Datasets or pairs.
        **options: the fields of `DataSpec`:
            image_size: pixels; None keeps the native size (for files the median short side, at most 64).
            in_chans: 1 or 3 converts; None keeps.
            validation: share of train to carve for validation (0.1), stratified.
            test: share to carve for test (0.2) where the source brings no test images, stratified.
            seed: of the carving.
            max_unreadable: share of unreadable images that is tolerated (0.01).
            root, download: for named sets.
            memory_limit: bytes (2 GiB) up to which images are kept decoded in memory.
            mean, std: per channel, instead of those of train.
            augment: an `Augment` instead of the default.
            workers: decoding threads.

    Which images are what: the source's test split is kept as test. A folder, a named set or a mapping with only ``train`` and ``val`` keeps
    ``val`` as test, because it is the only held-out part, and validation is carved from train; with ``train``, ``val`` and ``test``, ``val`` is validation.

    Raises:
        DataError: missing, damaged or wrongly laid out data; the text says what was expected and found.
        UsageError: an option out of range or an unknown name.

    Example:
        >>> import numpy as np
        >>> x, y = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 4
        >>> load_data((x, y), validation=0.25, test=0.2).sizes
        {'train': 24, 'validation': 8, 'test': 8}
    """
    known = {f.name for f in dataclasses.fields(DataSpec)} - {"source"}
    for name in options:
        if name not in known:
            raise UsageError(one_of("option of load_data", name, known))
    if options.get("root") is not None:
        options["root"] = str(options["root"])
    return DataSpec(source=source, **options).load()


def _load(spec: DataSpec) -> ImageData:
    found = find(spec.source, root=spec.root, download=spec.download)
    channels, native = shape_of(found.parts["train"])
    size, in_chans = spec.image_size or native, spec.in_chans or channels
    if total_bytes(found, size, in_chans) > spec.memory_limit:
        raise DataError("larger than memory_limit")
    blocks = {split: decode(part, size, in_chans, workers=spec.workers) for split, part in found.parts.items()}
    unreadable = tuple(name for block in blocks.values() for name in block.unreadable)
    _judge_unreadable(unreadable, sum(len(b.labels) for b in blocks.values()) + len(unreadable), spec.max_unreadable)
    images, labels = join([b.images for b in blocks.values()]), torch.cat([b.labels for b in blocks.values()])
    ends = torch.tensor([len(b.labels) for b in blocks.values()]).cumsum(0).tolist()
    own = {split: torch.arange(end - len(blocks[split].labels), end) for split, end in zip(blocks, ends)}
    names = _classes({s: labels[i] for s, i in own.items()}, found.class_names)
    index = _splits(own, labels, spec)
    mean, std = mean_std(images, index["train"])
    return ImageData(
        name=found.name,
        num_classes=len(names),
        in_chans=in_chans,
        image_size=size,
        class_names=names,
        mean=spec.mean or mean,
        std=spec.std or std,
        unreadable=unreadable,
        augment=spec.augment or Augment(flip=found.flip),
        spec=spec,
        index=index,
        _images=images,
        _labels=labels,
    )


def _splits(own: dict[str, torch.Tensor], labels: torch.Tensor, spec: DataSpec) -> dict[str, torch.Tensor]:
    index = dict(own)
    if "test" not in index and "validation" in index:
        index["test"] = index.pop("validation")
    for split, share in (("test", spec.test), ("validation", spec.validation)):
        if split not in index:
            kept, carved = carve(labels[index["train"]], share, spec.seed)
            index["train"], index[split] = index["train"][kept], index["train"][carved]
    return index


def _classes(labels: dict[str, torch.Tensor], names: tuple[str, ...] | None) -> tuple[str, ...]:
    counts = labels["train"].bincount(minlength=len(names or ()))
    if len(counts) < 2:
        raise DataError(f"expected at least two classes, found {len(counts)}.")
    empty = (counts == 0).nonzero()[:, 0].tolist()
    if empty:
        raise DataError(
            f"expected train images of every class from 0 to {len(counts) - 1}, found none of {empty[:5]}; number the classes without gaps."
        )
    small = [c for c, n in enumerate(counts.tolist()) if n < 3]
    for split, y in labels.items():
        if len(y) and int(y.max()) >= len(counts):
            raise DataError(f"{split}: expected labels below {len(counts)}, the number of classes in train, found {int(y.max())}.")
    if small:
        raise DataError(f"expected at least 3 train images per class, to have one in each split, found fewer in class {small[:5]}.")
    if names is not None and len(names) != len(counts):
        raise DataError(f"expected labels below {len(names)}, the number of class names, found {len(counts) - 1}.")
    return names or tuple(str(c) for c in range(len(counts)))


def _judge_unreadable(unreadable: tuple[str, ...], total: int, limit: float) -> None:
    if not unreadable:
        return
    named = "; ".join(unreadable[:5]) + (f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else "")
    share = len(unreadable) / total
    if share > limit:
        raise DataError(
            f"{len(unreadable)} of {total} images ({share:.1%}) cannot be read, max_unreadable is {limit:.1%}: {named}. Repair or remove them, or raise max_unreadable."
        )
    warnings.warn(f"skipped {len(unreadable)} of {total} images that cannot be read: {named}", UserWarning, stacklevel=4)
