"""What `capnas.load_data` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from capnas.data.framing import Framing
from capnas.data.images import Augment
from capnas.data.named import EMBEDDED
from capnas.errors import UsageError, check_types

LARGEST = 2**14  # pixels; beyond, one image can fill the memory of a machine


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything `load_data` was asked for; where the source is a name or a path, it is small, picklable and loads the same data anywhere.

    Example:
        >>> DataSpec(source="fashion-mnist-12k", image_size=16).framing is None
        True
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
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    augment: bool | Augment | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} must be the share of images to set aside, in (0, 1), got {getattr(self, name)}.")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable must be a share in [0, 1], got {self.max_unreadable}.")
        for name, low in (("image_size", 1), ("in_chans", 1), ("seed", 0), ("memory_limit", 0), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, got {value}.")
        for name, above in (("mean", -math.inf), ("std", 0.0)):
            if not all(above < value < math.inf for value in getattr(self, name) or ()):
                what = "finite numbers" if name == "mean" else "positive numbers"
                raise UsageError(f"{name} must be {what}, one for each channel, got {getattr(self, name)}.")
        if self.image_size is not None and self.image_size > LARGEST:
            raise UsageError(f"image_size must be at most {LARGEST} pixels, got {self.image_size}.")
        _ = self.framing  # has checks of its own

    @property
    def framing(self) -> Framing | None:
        """How images become square, where anything is said of it."""
        given = {name: v for name in ("crop_pct", "crop_mode", "interpolation") if (v := getattr(self, name)) is not None}
        return Framing(**given, mean=self.mean) if given else None
