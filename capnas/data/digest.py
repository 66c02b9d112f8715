"""What tells images from others of the same name and number, so that a study does not go on with labels or pixels that have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from capnas.data.batching import InMemory, Streamed
from capnas.data.images import normalise
from capnas.data.sources import FileReader, Pair, Reader

_LOOKED_AT = 64  # images
_TOLERANCE = 0.05  # standard deviations: decoders and resizing differ a little from machine to machine


def digest(
    parts: Mapping[str, Pair | Reader],
    pool: InMemory | Streamed,
    index: Mapping[str, torch.Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Any]:
    """A few hundred numbers in JSON values that other images, labels or splits hardly share.

    Args:
        parts: of the source.
        pool: all images.
        index: positions of train, validation and test.
        mean: per channel.
        std: per channel.

    Returns:
        labels: hash of all labels, split after split. files: hash of the paths below the data folder, sorted, with their classes; for
        folders only. pixels: means of the quarters of 64 images of train and validation, in standard deviations; in memory only.
    """
    found: dict[str, Any] = {"labels": _hash(pool.labels[index[split]].tolist() for split in ("train", "validation", "test"))}
    files = [(p.name(i), c) for p in parts.values() if isinstance(p, FileReader) for i, c in enumerate(p.classes)]
    if files:
        found["files"] = _hash(sorted(files))
    if isinstance(pool, InMemory):
        seen = torch.cat([index["train"], index["validation"]])  # test stays closed
        chosen = seen[torch.linspace(0, len(seen) - 1, min(len(seen), _LOOKED_AT)).long()]
        quarters = F.adaptive_avg_pool2d(normalise(pool.images[chosen], mean, std).mean(1), 2)
        found["pixels"] = [round(value, 2) for value in quarters.flatten().tolist()]
    return found


def digest_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two digests differs, as far as both know it.

    Example:
        >>> digest_changes({"labels": "a", "files": "b", "pixels": [0.5]}, {"labels": "c", "pixels": [0.51]})
        ['the labels differ']
    """
    changed = [f"the {key} differ" for key in ("labels", "files") if key in stored and key in now and stored[key] != now[key]]
    if "pixels" in stored and "pixels" in now:
        a, b = stored["pixels"], now["pixels"]
        if len(a) != len(b) or any(abs(x - y) > _TOLERANCE for x, y in zip(a, b)):
            changed.append("the pixels differ")
    return changed


def _hash(rows: Iterable[object]) -> str:
    out = hashlib.sha256()
    for row in rows:
        out.update(f"{row}\n".encode("utf-8", "surrogatepass"))
    return out.hexdigest()[:16]
