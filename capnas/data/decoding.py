"""From readers of single images to tensors: decoded and resized once, by threads, in a fixed order; unreadable images are counted."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from capnas.data.framing import Framing
from capnas.data.images import as_images, as_label, resize, to_channels
from capnas.data.sources import Pair, Reader, StreamReader
from capnas.devices import is_out_of_memory, usable_cpus
from capnas.errors import DataError, described, listed

_SAMPLE = 48
_LARGEST_DEFAULT = 64
_DEEPEST = 65535  # of 16 bits
_AHEAD = 256
_SURVEY = 2000


@dataclass(frozen=True, kw_only=True)
class Block:
    """Decoded images of one part.

    Attributes:
        images: (N, C, S, S) uint8, or float32.
        labels: (N,) int64.
        unreadable: "name (reason)" of each image that was skipped.
    """

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: tuple[str, ...] = ()


def opened(image: Any) -> contextlib.AbstractContextManager[Any]:
    """Closes the file of a PIL image at the end of a ``with`` block; arrays have none."""
    return image if isinstance(image, Image.Image) else contextlib.nullcontext()


def pixels_of(image: Any, *, deep: bool = True) -> Image.Image | torch.Tensor:
    """An item's image as PIL, or as (1, C, H, W): arrays, tensors and PIL's floats (mode "F"), which Pillow would clip to bytes.

    Args:
        image: the item's.
        deep: whether integers of 16 bits come as floats, 65,535 as 1; else as PIL, of which `grey_or_rgb` keeps the upper byte.

    Raises:
        DataError: it is no image.
    """
    if isinstance(image, Image.Image) and image.mode.startswith("I") and deep:
        return as_images(np.asarray(image)[None] / np.float32(_DEEPEST), "image")
    if isinstance(image, Image.Image) and image.mode != "F":
        return image
    if not (hasattr(image, "__array__") or hasattr(image, "__array_interface__")):
        raise DataError(f"expected a PIL image, array or tensor, found {type(image).__name__}")
    return as_images((image if isinstance(image, torch.Tensor) else np.asarray(image))[None], "image")


def grey_or_rgb(image: Image.Image, in_chans: int) -> Image.Image:
    """A PIL image in bytes: grey for 1 channel, otherwise RGB."""
    if image.mode.startswith("I"):  # 16 bits in a PNG or TIFF, which Pillow would clip at 255: one scale, so that images compare
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if in_chans == 1 else "RGB")


def fit(image: Any, size: int, in_chans: int, *, deep: bool = True, framing: Framing | None = None) -> torch.Tensor:
    """One image as (C, size, size): the short side resized, the long side cropped in the middle (as `capnas.data.images.resize`).

    Args:
        image: a PIL image (uint8 comes out, float32 of floats and of 16 bits), or an array or tensor (H, W), (H, W, C) or (C, H, W).
        size: pixels.
        in_chans: 1 or 3 for PIL images; arrays may also keep their own number.
        deep: see `pixels_of`.
        framing: another way to make it square; JPEGs are then decoded in full.

    Example:
        >>> fit(Image.new("L", (40, 30), 9), 16, 3).shape
        torch.Size([3, 16, 16])
    """
    with opened(image):
        found = pixels_of(image, deep=deep)
        if isinstance(found, torch.Tensor):
            return squares(found, size, in_chans, framing)[0]
        if framing is None:
            found.draft("L" if in_chans == 1 else "RGB", (2 * size, 2 * size))
        plain = grey_or_rgb(found, in_chans)
    pixels = _middle(plain, size) if framing is None else framing.transform(size)(plain)
    return to_channels(pixels[None], in_chans)[0]


def _middle(plain: Image.Image, size: int) -> torch.Tensor:
    w, h = plain.size
    if (w, h) != (size, size):  # to whole pixels as timm's evaluation transform does, so that both paths agree
        w, h = int(size * w / min(w, h)), int(size * h / min(w, h))
        left, top = round((w - size) / 2), round((h - size) / 2)
        plain = plain.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(plain)).view(size, size, -1).permute(2, 0, 1)


def squares(x: torch.Tensor, size: int, in_chans: int, framing: Framing | None) -> torch.Tensor:
    """Images (N, C, H, W) as (N, in_chans, size, size); ``framing`` as for `fit`."""
    x = to_channels(x, in_chans)
    return resize(x, size) if framing is None else framing.tensors(x, size)


def shape_of(part: Pair | Reader) -> tuple[int, int]:
    """Native (channels, size) of a part, from a sample where it is not arrays; size is the median short side, for readers at most 64."""
    if isinstance(part, Pair):
        return part.images.shape[1], min(part.images.shape[-2:])
    channels, sides = [], []
    failed: list[str] = []
    for have, side in _sample(part, failed):
        channels.append(have)
        sides.append(side)
    if not sides:
        raise DataError(f"expected readable images, found none in a sample; the first: {failed[0] if failed else 'nothing there'}.")
    return max(channels), min(int(np.median(sides)), _LARGEST_DEFAULT)


def _sample(part: Reader, failed: list[str]) -> Iterator[tuple[int, int]]:
    if isinstance(part, StreamReader):
        reads = ((i, lambda image=image: image) for i, (image, _) in zip(range(_SAMPLE), part))
    else:
        chosen = sorted({round(i) for i in np.linspace(0, len(part) - 1, _SAMPLE)}) if len(part) else []
        reads = ((i, lambda i=i: part.read(i)[0]) for i in chosen)
    for index, read in reads:
        try:
            yield _channels_and_side(read())
        except Exception as error:
            failed.append(why_unreadable(part, index, error))


def _channels_and_side(image: Any) -> tuple[int, int]:
    with opened(image):
        found = pixels_of(image, deep=False)
        if isinstance(found, torch.Tensor):
            return found.shape[1], min(found.shape[-2:])
        return (1 if found.mode in ("L", "1", "LA") or found.mode.startswith("I") else 3), min(found.size)


def decode(part: Pair | Reader, size: int, in_chans: int, *, workers: int | None = None, framing: Framing | None = None) -> Block:
    """All images of a part at one size, in the order of the part.

    Args:
        part: arrays or a reader.
        size: pixels.
        in_chans: channels.
        workers: threads; None is the number of cores, at most 8.
        framing: see `fit`.
    """
    if isinstance(part, Pair):
        return Block(images=squares(part.images, size, in_chans, framing), labels=part.labels)
    images: list[torch.Tensor] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for item in _items(part, size, in_chans, workers, framing):
        if isinstance(item, str):
            unreadable.append(item)
        else:
            images.append(item[0])
            labels.append(item[1])
    if not images:
        raise DataError(f"expected readable images, found {len(unreadable)} unreadable and no other ({'; '.join(unreadable[:2])}).")
    return Block(images=join(images, torch.stack), labels=torch.tensor(labels), unreadable=tuple(unreadable))


def _items(
    part: Reader, size: int, in_chans: int, workers: int | None, framing: Framing | None
) -> Iterator[tuple[torch.Tensor, int] | str]:
    def one(index: int, item: tuple[Any, Any] | None = None) -> tuple[torch.Tensor, int] | str:
        try:
            image, label = part.read(index) if item is None else item
            pixels = fit(image, size, in_chans, framing=framing)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error...; a Dataset anything
            return why_unreadable(part, index, error)
        return pixels, label_of(part, index, label)

    if not isinstance(part, StreamReader):
        yield from _in_order(one, range(len(part)), workers if part.threadsafe else 1)
        return
    count = 0
    for count, item in enumerate(part, 1):
        yield one(count - 1, item)
    for index in range(count, len(part)):  # timm's streams leave out what they cannot decode
        yield f"{part.name(index)} (announced, not delivered)"


def label_of(part: Reader, index: int, label: Any) -> int:
    """The class of one item; DataError that names it for a wrong one, which is no unreadable image but ends the loading."""
    try:
        return as_label(label)
    except DataError as error:
        raise DataError(f"{part.name(index)}: {error}") from None


def why_unreadable(part: Reader, index: int, error: Exception) -> str:
    """An item that cannot be read: "name (reason)".

    Raises:
        MemoryError: memory ran out, which says nothing of the item.
    """
    if is_out_of_memory(error):
        raise MemoryError(f"memory ran out while {part.name(index)} was read") from error
    if isinstance(error, UnidentifiedImageError):
        return f"{part.name(index)} (not an image)"
    if isinstance(error, DataError):
        return f"{part.name(index)} ({str(error).rstrip('.')})"
    return f"{part.name(index)} ({described(error, None)})"


def _in_order(work: Callable[[int], Any], indexes: Sequence[int], workers: int | None) -> Iterator[Any]:
    threads = cores() if workers is None else workers
    if threads < 2:
        yield from map(work, indexes)
        return
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indexes), _AHEAD):  # bounded: map alone would queue a future per image
            yield from pool.map(work, indexes[start : start + _AHEAD])


def cores() -> int:
    """CPUs that may be used, at most 8: more do not help to decode."""
    return min(usable_cpus(), 8)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What can be known of a part that is too large to decode.

    Attributes:
        unreadable: "name (reason)" by number: empty files, files that are no images, and the damaged ones of the sample.
        sample: numbers of the images of the sample that could be decoded.
        images: these images (n, C, S, S).
        labels: their classes as the items give them, n.
        damaged: how many of the sample could be opened and not decoded.
    """

    unreadable: dict[int, str]
    sample: torch.Tensor
    images: torch.Tensor
    labels: tuple[Any, ...]
    damaged: int


def survey(part: Reader, size: int, in_chans: int, *, seed: int = 0, workers: int | None = None, framing: Framing | None = None) -> Survey:
    """Open every file of a part and decode a random sample of 2,000; ``framing`` as for `fit`."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(part), generator=generator)[:_SURVEY].sort().values.tolist()

    def opens(index: int) -> str:
        try:
            with part.read(index)[0]:
                return ""
        except Exception as error:
            return why_unreadable(part, index, error)

    def decodes(index: int) -> tuple[torch.Tensor, Any] | str:
        try:
            image, label = part.read(index)
            return fit(image, size, in_chans, deep=False, framing=framing), label  # what is streamed is read as bytes
        except Exception as error:
            return why_unreadable(part, index, error)

    bad: dict[int, str] = {}
    if part.threadsafe:
        bad = {i: text for i, text in zip(range(len(part)), _in_order(opens, range(len(part)), workers)) if text}
    sample = [i for i in sample if i not in bad]
    decoded = list(_in_order(decodes, sample, workers if part.threadsafe else 1))
    good = {i: x for i, x in zip(sample, decoded) if not isinstance(x, str)}
    bad |= {i: x for i, x in zip(sample, decoded) if isinstance(x, str)}
    if not good:
        raise DataError(f"expected readable images, found none in a sample of {len(sample)} ({next(iter(bad.values()), 'empty')}).")
    pixels, labels = zip(*good.values())
    return Survey(
        unreadable=bad,
        sample=torch.tensor(list(good)),
        images=join(list(pixels), torch.stack),
        labels=labels,
        damaged=len(sample) - len(good),
    )


def judge_unreadable(unreadable: Sequence[str], total: int, limit: float, *, share: float | None = None) -> None:
    """One warning that names unreadable images, or DataError where their share (given where it is an estimate) is over the limit."""
    if not unreadable:
        return
    known = share is None
    share = len(unreadable) / total if share is None else share
    if share > limit:
        raise DataError(
            f"{len(unreadable)} of {total} images cannot be read ({'' if known else 'an estimated '}{share:.1%}, "
            f"max_unreadable is {limit:.1%}): {listed(unreadable)}; repair or remove them, or raise max_unreadable."
        )
    warnings.warn(f"skipped {len(unreadable)} of {total} images, which cannot be read: {listed(unreadable)}", UserWarning, stacklevel=6)


def join(blocks: list[torch.Tensor], how: Any = torch.cat) -> torch.Tensor:
    """Concatenate (or stack) images; if some are floats, bytes become floats of 0..1."""
    if any(b.is_floating_point() for b in blocks):
        blocks = [b if b.is_floating_point() else b.float() / 255 for b in blocks]
    return blocks[0] if how is torch.cat and len(blocks) == 1 else how(blocks)
