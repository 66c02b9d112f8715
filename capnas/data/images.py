"""Images as tensors: layout, size, channels, statistics, augmentation. Tensors in, tensors out; nothing is read from disk here.

Axis letters: N images, B images of a batch, C channels, H height, W width. Pixels are uint8, or float32 where bytes cannot hold the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from capnas.devices import one_thread
from capnas.errors import DataError, UsageError

_CHUNK = 1024
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"
RENUMBER = "renumber with np.unique(y, return_inverse=True)[1]"


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Training augmentation: a mirror image with probability one half and a crop shifted by up to ``shift`` pixels.

    Attributes:
        flip: mirror left to right; switch it off where this changes the class (digits, letters, road signs).
        shift: largest shift in pixels in each direction; None is an eighth of the size. The border is filled by reflection.

    Example:
        >>> Augment(flip=False).pixels(32)
        4
    """

    flip: bool = True
    shift: int | None = None

    def pixels(self, size: int) -> int:
        """The largest shift in pixels at this image size."""
        shift = size // 8 if self.shift is None else self.shift
        if not 0 <= shift < size:
            raise UsageError(f"shift must be at least 0 and smaller than the image ({size} pixels), got {shift}.")
        return shift


def as_images(array: Any, what: str = "images") -> torch.Tensor:
    """Any array of images as (N, C, H, W), uint8 where that loses nothing, float32 otherwise.

    Args:
        array: numpy or torch; (N, H, W) grey, (N, H, W, C) or (N, C, H, W) with 1, 3 or 4 channels; integers in 0..255 or finite floats.
            Of two readings the one with square images is taken. Floats that are whole multiples of 1/255 are kept as bytes.
        what: the name used in messages.

    Raises:
        DataError: another number of axes, no channel axis, integers out of range, NaN or infinite values.

    Example:
        >>> as_images(np.zeros((5, 8, 8, 3), np.uint8)).shape
        torch.Size([5, 3, 8, 8])
    """
    x = array.detach().cpu() if isinstance(array, torch.Tensor) else torch.as_tensor(_numeric(array, what))
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4:
        x = x.permute(0, 3, 1, 2) if _channels_last(x.shape, what) else x
    if x.ndim != 4 or 0 in x.shape:
        raise DataError(f"{what}: expected (N, H, W), (N, H, W, C) or (N, C, H, W) with nothing empty, found shape {tuple(x.shape)}.")
    if x.dtype == torch.uint8:
        return x.contiguous()
    if x.is_complex():
        raise DataError(f"{what}: expected real numbers, found {x.dtype}.")
    if not x.is_floating_point():
        x = x.long()  # torch finds no least of unsigned words
        low, high = int(x.min()), int(x.max())
        if low < 0 or high > 255:
            raise DataError(f"{what}: expected integer pixels in 0..255, found {low}..{high}; scale them, or give floats.")
        return x.to(torch.uint8).contiguous()
    x = x.float().contiguous()
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise DataError(f"{what}: expected finite numbers, found NaN or infinity in {bad} of {len(x)} images; remove or repair them.")
    return _bytes_if_exact(x)


def _numeric(array: Any, what: str) -> np.ndarray:
    try:
        x = np.asarray(array)
    except ValueError as error:
        raise DataError(f"{what}: expected one array of images of one size; {error}.") from None
    if x.dtype.kind not in "buif":
        raise DataError(f"{what}: expected numbers, found dtype {x.dtype}; for images of different sizes use a folder or a torch Dataset.")
    x = x.astype(x.dtype.newbyteorder("="), copy=False)
    return x.astype(np.int64) if x.dtype.kind == "u" and x.dtype.itemsize > 1 else x if x.flags.writeable else x.copy()


def _channels_last(shape: torch.Size, what: str) -> bool:
    known = (1, 3, 4)
    first, last = shape[1] in known, shape[3] in known
    if first == last:
        first, last = shape[2] == shape[3], shape[1] == shape[2]
    if first == last:
        raise DataError(f"{what}: expected 1, 3 or 4 channels on axis 1 or the last, found shape {tuple(shape)}; permute to (N, C, H, W).")
    return last


def _bytes_if_exact(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.uint8)
    for i in range(0, len(x), _CHUNK):
        scaled = x[i : i + _CHUNK] * 255
        rounded = scaled.round()
        if rounded.min() < 0 or rounded.max() > 255 or ((scaled - rounded).abs() > 1e-3 * rounded.clamp_max(1)).any():
            return x
        out[i : i + _CHUNK] = rounded.to(torch.uint8)
    return out


def as_labels(array: Any, what: str = "labels") -> torch.Tensor:
    """Class numbers as int64 (N,); DataError for anything that is not a flat array of integers from 0.

    Example:
        >>> as_labels([1, 0, 2.0])
        tensor([1, 0, 2])
    """
    try:
        y = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    except ValueError as error:
        raise DataError(f"{what}: expected one integer per image, counted from 0; {error}.") from None
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "buif":
        found = f"found shape {y.shape} of {y.dtype}"
        advice = "give y.argmax(1) of one-hot rows" if y.ndim > 1 else RENUMBER
        raise DataError(f"{what}: expected one integer per image, counted from 0 (no one-hot rows, no text), {found}; {advice}.")
    finite = bool(np.isfinite(y).all())
    whole = y.astype(np.int64) if finite else y
    if not finite or not np.array_equal(whole, y) or (len(y) and whole.min() < 0):
        wrong = y[~np.isin(y, np.arange(2**15))][0].item()
        advice = "each must be the number of a class" if wrong != wrong or wrong % 1 else RENUMBER
        raise DataError(f"{what}: expected integers from 0, found values such as {wrong!r}; {advice}.")
    return torch.from_numpy(whole)


def as_label(label: Any) -> int:
    """The class number of one image: a whole number from 0, or an array or tensor of one; DataError for anything else.

    Example:
        >>> as_label(torch.tensor([2.0]))
        2
    """
    if type(label) is int and label >= 0:
        return label
    return int(as_labels([label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else label], "label")[0])


def resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """Square images of ``size`` pixels: the short side is resized (antialiased bilinear), the long side cropped in the middle; dtype kept.

    Example:
        >>> resize(torch.full((2, 3, 20, 30), 7, dtype=torch.uint8), 10).shape
        torch.Size([2, 3, 10, 10])
    """
    h, w = x.shape[-2:]
    if h != w:
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        x = x[..., top : top + side, left : left + side]
    if x.shape[-1] == size:
        return x.contiguous()
    out = torch.empty((*x.shape[:2], size, size), dtype=x.dtype)
    for i in range(0, len(x), _CHUNK):
        part = F.interpolate(x[i : i + _CHUNK].float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out[i : i + _CHUNK] = part if x.is_floating_point() else part.round_().clamp_(0, 255).to(x.dtype)
    return out


def to_channels(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Grey to RGB by repetition, RGB to grey by luma (ITU-R BT.601); DataError for any other change.

    Example:
        >>> to_channels(torch.ones(2, 1, 4, 4), 3).shape
        torch.Size([2, 3, 4, 4])
    """
    have = x.shape[1]
    if have == in_chans:
        return x
    if have == 1:
        return x.repeat(1, in_chans, 1, 1)
    if have == 3 and in_chans == 1:
        weights = torch.tensor(_LUMA).view(1, 3, 1, 1)
        out = torch.cat([(x[i : i + _CHUNK].float() * weights).sum(1, keepdim=True) for i in range(0, len(x), _CHUNK)])
        return out if x.is_floating_point() else out.round_().clamp_(0, 255).to(x.dtype)
    raise DataError(f"in_chans: images of {have} channels can be read as {have}{' or 1' if have == 3 else ''} channels, not as {in_chans}.")


def is_constant(x: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether each channel has one value, the same in every pixel of all images at ``index``: nothing tells such images apart.

    Example:
        >>> is_constant(torch.ones(3, 1, 2, 2), torch.tensor([0, 2]))
        True
    """
    first = x[index[0], :, :1, :1]
    return all(bool((x[part] == first).all()) for part in index.split(_CHUNK))


@one_thread()
def mean_std(x: torch.Tensor, index: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the images at ``index``: bytes count as 0..1, floats in their own units.

    They are part of what tells whether trials compare (`capnas.objective.evaluation.fingerprint`), and so summed by one thread.

    Example:
        >>> mean_std(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.tensor([0, 1]))
        ((0.5,), (0.5,))
    """
    unit = 1.0 if x.is_floating_point() else 255.0
    total, square = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
    shift = x[index[0]].double().mean((1, 2)) / unit  # keeps the squares small
    for part in index.split(_CHUNK):
        centred = x[part].double().div_(unit).sub_(shift.view(1, -1, 1, 1))
        total += centred.sum((0, 2, 3))
        square += centred.square_().sum((0, 2, 3))
    count = len(index) * x.shape[2] * x.shape[3]
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    std[std < 1e-6] = 1.0
    return tuple(float(v) for v in mean + shift), tuple(float(v) for v in std)


def shifts_and_flips(count: int, augment: Augment, size: int, generator: torch.Generator) -> torch.Tensor:
    """One draw per image: (N, 3) int64 of vertical shift, horizontal shift and mirror (0 or 1)."""
    p = augment.pixels(size)
    moves = torch.randint(-p, p + 1, (count, 2), generator=generator)
    mirror = torch.randint(0, 2, (count, 1), generator=generator) if augment.flip else torch.zeros(count, 1, dtype=torch.int64)
    return torch.cat([moves, mirror], 1)


def shift_and_flip(x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Each image moved and mirrored by its own row of ``draws`` (see `shifts_and_flips`), borders filled by reflection; one gather for all.

    Example:
        >>> shift_and_flip(torch.tensor([[[[1, 2, 3]]]]), torch.tensor([[0, 0, 1]])).tolist()
        [[[[3, 2, 1]]]]
    """
    b, c, h, w = x.shape
    rows = _reflect(torch.arange(h, device=x.device) + draws[:, :1], h)
    columns = _reflect(torch.arange(w, device=x.device) + draws[:, 1:2], w)
    columns = torch.where(draws[:, 2:] > 0, columns.flip(1), columns)
    flat = (rows[:, :, None] * w + columns[:, None, :]).view(b, 1, h * w)
    return x.reshape(b, c, h * w).gather(2, flat.expand(b, c, h * w)).view(b, c, h, w)


def _reflect(position: torch.Tensor, length: int) -> torch.Tensor:
    position = position.abs()
    return torch.where(position >= length, 2 * (length - 1) - position, position)


def normalise(x: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Float32 with mean and standard deviation taken out, channel by channel; bytes count as 0..1 (units of `mean_std`)."""
    unit = 1.0 if x.is_floating_point() else 255.0
    m, s = (torch.tensor(v, dtype=torch.float32, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    out = x.float() if not x.is_floating_point() else x.float().clone()
    return out.sub_(m * unit).mul_(1 / (s * unit))
