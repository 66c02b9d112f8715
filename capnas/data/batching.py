"""Batches of a data set: from one tensor of bytes in memory, or through timm's loader, behind the same methods."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from capnas.data.decoding import fit, grey_or_rgb, opened, pixels_of
from capnas.data.framing import Framing, picture
from capnas.data.images import Augment, normalise, resize, shift_and_flip, shifts_and_flips
from capnas.data.sources import Reader
from capnas.devices import is_out_of_memory
from capnas.errors import DataError

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
NOT_STREAMED = "images larger than memory_limit must be bytes of 1 or 3 channels; raise memory_limit, or let the Dataset give PIL images."
_GROUP_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Request:
    """One pass over some images.

    Attributes:
        positions: which images, in the numbering of the data set.
        batch_size: images per batch.
        training: shuffle, and drop the short last batch unless it is the only one.
        augment: or None for none.
        seed: of the order and the augmentation.
        device: where the batches go.
        size: height and width in pixels.
        mean: per channel, taken out.
        std: per channel, divided by.
    """

    positions: torch.Tensor
    batch_size: int
    training: bool
    augment: Augment | None
    seed: int
    device: torch.device
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemory:
    """All images decoded: (N, C, S, S), with a copy per other size that was asked for, as far as ``memory_limit`` bytes reach."""

    images: torch.Tensor
    labels: torch.Tensor
    memory_limit: int
    resized: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def at(self, size: int) -> torch.Tensor:
        """All images at this size."""
        if size == self.images.shape[-1]:
            return self.images
        found = self.resized.get(size)
        if found is None:
            found = resize(self.images, size)
            if sum(t.nbytes for t in list(self.resized.values())) + found.nbytes > self.memory_limit:
                self.resized.clear()
            self.resized[size] = found
        return found

    def take(self, positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Some images (B, C, size, size), as stored, and their classes."""
        return self.at(size)[positions], self.labels[positions]

    def batches(self, request: Request) -> Batches:
        """See `capnas.data.ImageData.batches`."""
        images, positions, batch_size = self.at(request.size), request.positions, request.batch_size
        generator = torch.Generator().manual_seed(request.seed)
        if request.training:
            positions = positions[torch.randperm(len(positions), generator=generator)]
            positions = positions[: max(len(positions) // batch_size, 1) * batch_size]
        draws = shifts_and_flips(len(positions), request.augment, request.size, generator) if request.augment else None
        # several batches are gathered at once: on busy cores a call costs more than its bytes
        group = max(_GROUP_BYTES // images[0].nbytes // batch_size, 1) * batch_size
        for start in range(0, len(positions), group):
            chosen = positions[start : start + group]
            x = images[chosen].to(request.device, non_blocking=True)
            y = self.labels[chosen].to(request.device, non_blocking=True)
            if draws is not None:
                x = shift_and_flip(x, draws[start : start + group].to(request.device, non_blocking=True))
            yield from zip(normalise(x, request.mean, request.std).split(batch_size), y.split(batch_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Streamed:
    """Images that stay where they are and are decoded again in every pass, by timm's loader and its worker processes.

    Attributes:
        readers: the parts, numbered one after the other.
        labels: (N,) class of each image.
        in_chans: 1 or 3.
        workers: processes of timm's loader; 0 decodes in the caller's process.
        framing: as for `capnas.data.decoding.fit`; images of a training with augmentation are cropped at random instead.
    """

    readers: tuple[Reader, ...]
    labels: torch.Tensor
    in_chans: int
    workers: int
    framing: Framing | None = None

    def open(self, position: int) -> Image.Image:
        """One image as PIL gives it, in grey or RGB; raises what the reader raises."""
        for reader in self.readers:
            if position < len(reader):
                image = reader.read(position)[0]
                break
            position -= len(reader)
        with opened(image):
            return grey_or_rgb(as_pil(image), self.in_chans)

    def nearest(self, positions: torch.Tensor, index: int) -> tuple[Image.Image, int]:
        """The image at one of these positions and its class; of one that is unreadable those of the next that can be read."""
        for step in range(100):
            position = int(positions[(index + step) % len(positions)])
            try:
                return self.open(position), int(self.labels[position])
            except Exception as error:  # the check before training bounds how many there are
                if is_out_of_memory(error):
                    raise
        raise DataError("100 images in a row cannot be read; check the files.")

    def take(self, positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Some images (B, C, size, size), as bytes, and their classes; unreadable ones are replaced by the next."""
        found = (self.nearest(positions, i) for i in range(len(positions)))
        pixels, labels = zip(*((fit(image, size, self.in_chans, framing=self.framing), label) for image, label in found))
        return torch.stack(pixels), torch.tensor(labels)

    def batches(self, request: Request) -> Batches:
        """See `capnas.data.ImageData.batches`; the shifted crop becomes timm's random resized crop of the same extent."""
        from capnas._timm import import_timm

        timm_data, items = import_timm("timm.data"), Items(self, request.positions)
        augment, shape = request.augment, (self.in_chans, request.size, request.size)
        shift = augment.pixels(request.size) / request.size if augment else 0.0
        loader = timm_data.create_loader(
            items,
            input_size=shape,
            batch_size=min(request.batch_size, len(items)) if request.training else request.batch_size,
            is_training=request.training,
            scale=((1 - shift) ** 2, 1.0),
            hflip=0.5 if augment and augment.flip else 0.0,
            color_jitter=0.0,
            interpolation="bilinear",
            mean=request.mean,
            std=request.std,
            num_workers=self.workers,
            crop_pct=1.0,
            pin_memory=request.device.type == "cuda",
            device=request.device,
            persistent_workers=False,
        )
        if augment is None:  # timm's own no_aug squeezes images that are not square
            items.transform = (self.framing or Framing()).transform(request.size)
        yield from private_randomness(loader, request.seed)


class Items(torch.utils.data.Dataset):
    """Some images of a `Streamed` as timm's loader wants them; an unreadable one is replaced by the next that can be read."""

    def __init__(self, source: Streamed, positions: torch.Tensor) -> None:
        self.source, self.positions = source, positions
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source.nearest(self.positions, index)
        return self.transform(image), label


def as_pil(image: Any) -> Image.Image:
    """An item's image as PIL, arrays of bytes too; DataError for floats that bytes cannot hold."""
    found = pixels_of(image, deep=False)
    if isinstance(found, Image.Image):
        return found
    x = found[0]
    if x.is_floating_point() or len(x) not in (1, 3):
        raise DataError(NOT_STREAMED)
    return picture(x)


def private_randomness(batches: Any, seed: int) -> Batches:
    """The batches of a loader that draws from the global generators (torch, random, numpy): seeded for it, given back in between."""
    inner = _states(seed)
    with _swapped(inner):
        iterator = iter(batches)
    while True:
        with _swapped(inner):
            item = next(iterator, None)
        if item is None:
            return
        yield item


def _states(seed: int) -> list[Any]:
    return [
        torch.Generator().manual_seed(seed).get_state(),
        random.Random(seed).getstate(),
        np.random.RandomState(seed % (1 << 32)).get_state(),
    ]


@contextlib.contextmanager
def _swapped(inner: list[Any]) -> Iterator[None]:
    outer = _read()
    _write(inner)
    try:
        yield
    finally:
        inner[:] = _read()
        _write(outer)


def _read() -> list[Any]:
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()]


def _write(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
