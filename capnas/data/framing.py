"""The squares that timm's evaluation cuts out of images: a size alone leaves open how much of an image is seen, and how it is resized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from capnas.errors import DataError, UsageError, check_name

_CHUNK = 256
_CHOICES = {"crop_mode": ("center", "squash", "border"), "interpolation": ("bilinear", "bicubic")}


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How timm's `create_transform` prepares an image for evaluation; the names are timm's.

    Attributes:
        crop_pct: the square's side over the side that the image is resized to, in [0.1, 2]; above 1 a black border is added.
        crop_mode: "center" resizes the short side and cuts the middle out, "squash" resizes both sides, "border" the long one and fills
            what is missing with `mean`.
        interpolation: "bilinear" or "bicubic".
        mean: per channel, bytes as 0..1; for "border" only.

    Raises:
        UsageError: another value, or "border" without a mean.

    Example:
        >>> Framing(crop_pct=0.5).tensors(torch.arange(16).view(1, 1, 4, 4).byte(), 2).tolist()
        [[[[5, 6], [9, 10]]]]
    """

    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.1 <= self.crop_pct <= 2:
            raise UsageError(f"crop_pct must be the share of an image's side to keep, in [0.1, 2], got {self.crop_pct}.")
        for name, known in _CHOICES.items():
            check_name(name, getattr(self, name), known)
        if self.crop_mode == "border" and self.mean is None:
            raise UsageError("crop_mode border fills what an image lacks with the mean: give mean, a number per channel, or another mode.")

    def transform(self, size: int) -> Callable[[Any], torch.Tensor]:
        """Timm's transform of a PIL image in grey or RGB to (C, size, size) in bytes."""
        from capnas._timm import import_timm

        fill = {} if self.mean is None else {"mean": self.mean}
        return import_timm("timm.data").create_transform(
            size, crop_pct=self.crop_pct, crop_mode=self.crop_mode, interpolation=self.interpolation, normalize=False, **fill
        )

    def tensors(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Images (N, C, H, W) as (N, C, size, size) by the same transform; dtype kept.

        Raises:
            DataError: a border is asked for around floats, or around images of other than 1 or 3 channels.
        """
        prepare = self.transform(size)
        if x.dtype == torch.uint8 and x.shape[1] in (1, 3):  # Pillow keeps bytes between its two passes, which torch does not
            return torch.stack([prepare(picture(image)) for image in x])
        if self.crop_mode == "border":
            raise DataError("crop_mode border is for images in bytes of 1 or 3 channels; take center or squash.")
        return torch.cat([prepare(part) for part in x.split(_CHUNK)])


def picture(x: torch.Tensor) -> Image.Image:
    """Bytes (C, H, W) of 1 or 3 channels as PIL has them.

    Example:
        >>> picture(torch.zeros(3, 4, 6, dtype=torch.uint8)).size
        (6, 4)
    """
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())
