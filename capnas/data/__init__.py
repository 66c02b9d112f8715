"""Image data for a search: one call loads any source, one object hands out batches.

A data set has three splits. The search sees ``train`` and ``validation``; ``test`` is opened once, for the final evaluation.
Images are decoded and resized once into a tensor of bytes where they fit in memory, and go through timm's loader where they do not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from capnas.data.batching import Batches, InMemory, Request, Streamed
from capnas.data.decoding import shape_of
from capnas.data.digest import digest
from capnas.data.images import Augment, is_constant, mean_std, normalise
from capnas.data.loading import find, load_pool
from capnas.data.named import EMBEDDED
from capnas.data.spec import DataSpec
from capnas.data.splits import assign, check_classes
from capnas.errors import DataError, UsageError, check_name, check_names

__all__ = ["Augment", "DataSpec", "ImageData", "load_data"]

SPLITS = ("train", "validation", "test", "train+validation")
_TRAINING = ("train", "train+validation")
_NOT_AUGMENTED = Augment(flip=False, shift=0)


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
        digest: what other images, labels or splits hardly share (see `capnas.data.digest`).

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
    index: Mapping[str, torch.Tensor] = field(repr=False)
    pool: InMemory | Streamed = field(repr=False)
    digest: Mapping[str, Any] = field(repr=False)
    _gate: _Gate = field(default_factory=_Gate, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Images per split."""
        return {split: len(self.index[split]) for split in ("train", "validation", "test")}

    @property
    def guess(self) -> float:
        """What a network that names one class for every image gets on validation: the share of its commonest class, in (0, 1]."""
        labels = self.pool.labels[self.index["validation"]]
        return float(labels.bincount().max()) / len(labels)

    def __reduce__(self) -> Any:
        if self.spec.source is not None:
            return _load, (self.spec,)
        return functools.partial(ImageData, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "_gate"}), ()

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
    ) -> Batches:
        """Batches of one pass over a split.

        Args:
            split: "train", "validation", "test" or "train+validation". The test split needs `final_evaluation`.
            batch_size: images per batch B. Training drops the short last batch, unless it is the only one; evaluation keeps it.
            epoch: with ``seed`` decides the order and the augmentation of training splits; other splits keep their order.
            seed: see ``epoch``.
            augment: of training splits: None or True is the data's own, False is none, or an `Augment`. Other splits are never augmented.
            device: where the batches go; augmentation and normalisation run there.
            image_size: another size in pixels, resized from the stored size once and kept.

        Yields:
            x (B, C, H, W) float32, normalised; y (B,) int64.

        Raises:
            UsageError: an unknown split, the test split outside `final_evaluation`, a size below 1, another ``augment``.
        """
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
        training = split in _TRAINING
        policy = _policy(augment, self.augment)
        return self.pool.batches(
            Request(
                positions=self._positions(split),
                batch_size=batch_size,
                training=training,
                augment=policy if training and policy != _NOT_AUGMENTED else None,
                seed=(seed * 1_000_003 + epoch) % (1 << 63),
                device=torch.device(device),
                size=self._size(image_size),
                mean=self.mean,
                std=self.std,
            )
        )

    def training_shapes(self, image_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """Each (C, H, W) that the images of a training have; ``image_size`` as for `batches`."""
        size = self._size(image_size)
        return ((self.in_chans, size, size),)

    def shape(self, image_size: int | None = None) -> dict[str, int]:
        """Sizes that a search space takes: num_classes, in_chans and image_size, the stored one if not said."""
        return {"num_classes": self.num_classes, "in_chans": self.in_chans, "image_size": self._size(image_size)}

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
        x, y = self.pool.take(chosen, self._size(image_size))
        return normalise(x.to(device), self.mean, self.std), y.to(device)

    def _positions(self, split: str) -> torch.Tensor:
        check_name("split", split, SPLITS)
        if split == "test" and not self._gate.open:
            raise UsageError(
                "the test split is closed while searching; for the final evaluation: "
                "with data.final_evaluation() as opened: opened.batches('test', ...)."
            )
        return torch.cat([self.index[s] for s in split.split("+")])

    def _size(self, image_size: int | None) -> int:
        if image_size is not None and image_size < 1:
            raise UsageError(f"image_size must be at least 1, got {image_size}.")
        return image_size or self.image_size


def _policy(asked: bool | Augment | None, default: Augment) -> Augment:
    if isinstance(asked, Augment):
        return asked
    if not (asked is None or isinstance(asked, bool)):
        raise UsageError(f"augment must be True, False, None or an Augment, got {asked!r}.")
    return _NOT_AUGMENTED if asked is False else default


def load_data(source: Any = EMBEDDED, **options: Any) -> ImageData:
    """Load labelled images from wherever they are.

    Args:
        source: one of
            - ``"fashion-mnist-12k"``, embedded: 10,000 + 2,000 test images, 28 x 28 grey;
            - ``"fashion-mnist"``: 60,000 + 10,000, from torchvision's folder under ``root``, Debian's dataset-fashion-mnist, or a download;
            - a name that `timm.data.create_dataset` takes: ``torch/cifar10``, ``hfds/...``, ``hfids/...``, ``tfds/...``, ``wds/...``;
            - a folder with a folder of images per class, or with ``train/`` and ``val/`` and/or ``test/`` that hold such folders;
            - a torch Dataset of (image, class), or one of dicts with ``image`` or ``img`` and ``label``, as Hugging Face gives them;
            - a pair (images, labels) of arrays (see `capnas.data.images.as_images` for shapes);
            - a mapping from ``train``, ``val``, ``test`` to Datasets or pairs;
            - an `ImageData`, which is given back as it is: options are refused.
        **options: the fields of `DataSpec`:
            image_size: pixels; None keeps the native size (for files the median short side, at most 64).
                Where several sizes are searched, give the largest: `batches` resizes from the stored size.
            in_chans: 1 or 3 converts; None keeps.
            validation: share of train to carve for validation (0.1), stratified.
            test: share to carve for test (0.2) where the source brings no test images, stratified.
            seed: of the carving.
            max_unreadable: share of unreadable images that is tolerated (0.01).
            root, download: for named sets.
            memory_limit: bytes (2 GiB) up to which images are kept decoded in memory; 0 keeps none.
            mean, std: per channel, instead of those of train.
            crop_pct, crop_mode, interpolation: as timm's evaluation transform has them, see `capnas.data.framing.Framing`. With none of
                them the middle square is resized bilinearly, and large JPEGs are decoded at a coarser scale first.
            augment: of training batches: None or True mirrors and shifts, False does neither, or an `Augment`. Of the named sets those
                of digits and letters (MNIST, EMNIST, KMNIST, QMNIST, SVHN, Omniglot) are not mirrored; folders and arrays are,
                whatever they show: give ``Augment(flip=False)`` where a mirror image is another class.
            workers: threads that decode, or processes of timm's loader; None is the number of cores, at most 8.

    Which images are what: the source's test split is kept as test. Where there are only ``train`` and ``val`` (a folder, a named set or a
    mapping), ``val`` becomes test, because it is the only held-out part, and validation is carved from train. With ``train``, ``val`` and
    ``test``, ``val`` is validation. A class that val or test lacks is a warning, one that only they have an error. What does not fit in
    ``memory_limit`` is read by timm's loader in every pass, with the same methods; streams (``hfids/``, ``tfds/``, ``wds/``) have to fit.

    Raises:
        DataError: missing, damaged or wrongly laid out data; the text says what was expected and found.
        UsageError: an option of another kind or out of range, or an unknown name.

    Example:
        >>> import numpy as np
        >>> x, y = np.arange(40 * 8 * 8).reshape(40, 8, 8) / 255, np.arange(40) % 4
        >>> load_data((x, y), validation=0.25, test=0.2).sizes
        {'train': 24, 'validation': 8, 'test': 8}
    """
    check_names("option of load_data", options, {f.name for f in dataclasses.fields(DataSpec)} - {"source"})
    if isinstance(source, ImageData):
        if options:
            raise UsageError(f"{source.name} is loaded already, it takes no {next(iter(options))}: load it anew from its source.")
        return source
    return _load(DataSpec(source=source, **options | {"root": None if options.get("root") is None else str(options["root"])}))


def _load(spec: DataSpec) -> ImageData:
    found = find(spec.source, root=spec.root, download=spec.download)
    channels, native = shape_of(found.parts["train"])
    size, in_chans = spec.image_size or native, spec.in_chans or channels
    if in_chans not in (1, 3, channels):
        own = "" if channels in (1, 3) else f" or the {channels} of the images"
        raise UsageError(f"in_chans must be 1 or 3{own}, got {in_chans}.")
    for what, given in (("mean", spec.mean), ("std", spec.std)):
        if given is not None and len(given) != in_chans:
            raise UsageError(f"{what} must have one number for each of {in_chans} channels, got {len(given)}.")
    limits = {name: getattr(spec, name) for name in ("memory_limit", "max_unreadable", "workers", "seed", "framing")}
    loaded = load_pool(found, size, in_chans, **limits)
    names = check_classes(loaded.own, loaded.pool.labels, found.class_names)
    index = assign(loaded.own, loaded.pool.labels, test=spec.test, validation=spec.validation, seed=spec.seed)
    sample = torch.isin(loaded.sample, index["train"]).nonzero()[:, 0]
    if is_constant(loaded.images, sample):
        raise DataError(f"{found.name}: expected images that differ, found one value in all pixels of train; look at how they were made.")
    mean, std = mean_std(loaded.images, sample)
    mean, std = spec.mean or mean, spec.std or std
    return ImageData(
        name=found.name,
        num_classes=len(names),
        in_chans=in_chans,
        image_size=size,
        class_names=names,
        mean=mean,
        std=std,
        unreadable=loaded.unreadable,
        augment=_policy(spec.augment, Augment(flip=found.flip)),
        spec=spec if isinstance(spec.source, (str, Path)) else dataclasses.replace(spec, source=None),
        index=index,
        pool=loaded.pool,
        digest=digest(found.parts, loaded.pool, index, mean, std),
    )
