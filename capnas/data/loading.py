"""From a source to images that can be batched: found, decoded into memory where they fit, checked and left in place where they do not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from capnas.data import folders, named
from capnas.data.batching import NOT_STREAMED, InMemory, Streamed
from capnas.data.decoding import Block, Survey, cores, decode, join, judge_unreadable, label_of, survey, why_unreadable
from capnas.data.framing import Framing
from capnas.data.sources import Found, Pair, Reader, StreamReader, from_python
from capnas.errors import DataError, UsageError, one_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """Images ready to be batched, before splits are carved.

    Attributes:
        pool: all images, numbered part after part.
        own: numbers of each part of the source.
        unreadable: "name (reason)" of what was skipped.
        sample: numbers of the images whose pixels are in ``images``.
        images: pixels for statistics: all of them in memory, a sample otherwise.
    """

    pool: InMemory | Streamed
    own: Mapping[str, torch.Tensor]
    unreadable: tuple[str, ...]
    sample: torch.Tensor
    images: torch.Tensor


def find(source: Any, *, root: str | None = None, download: bool = False) -> Found:
    """The parts of any source that `capnas.data.load_data` takes.

    Raises:
        DataError: missing, wrongly laid out or unusable data.
        UsageError: a name that is neither known nor a folder.

    Example:
        >>> sorted(find("fashion-mnist-12k").parts)
        ['test', 'train']
    """
    if not isinstance(source, (str, os.PathLike)):
        return from_python(source)
    name = str(source)
    if name == named.EMBEDDED:
        return named.embedded()
    if name == "fashion-mnist":
        return named.fashion_mnist(root, download)
    if name in ("", "folder", "image_folder", "torch/folder", "torch/image_folder"):
        if root is None:
            raise UsageError(f"data {name!r} needs root, the folder of images.")
        name = root
    elif isinstance(source, str) and name.partition("/")[0].lower() in named.TIMM_PREFIXES and "/" in name:
        return named.timm_named(name, root, download)
    path = Path(name).expanduser()
    if path.is_dir():
        return folders.read_folder(path)
    if path.is_file():
        raise DataError(f"{path}: expected a folder of images, found a file; unpack it.")
    if path.is_absolute():
        raise UsageError(f"there is no folder {path}: bring the images back, or give another folder or a name such as {named.EMBEDDED}.")
    known = (named.EMBEDDED, "fashion-mnist", *(f"{prefix}/NAME" for prefix in named.TIMM_PREFIXES))
    raise UsageError(f"there is no folder {name!r} here, and as a name {one_of('data', name, known)}")


def load_pool(
    found: Found,
    size: int,
    in_chans: int,
    *,
    memory_limit: int,
    max_unreadable: float,
    workers: int | None,
    seed: int,
    framing: Framing | None = None,
) -> Loaded:
    """Decode everything into memory if its bytes fit in ``memory_limit`` (arrays always do), survey it otherwise.

    Raises:
        DataError: too many unreadable images; images that neither fit nor can be read one by one.
    """
    parts = found.parts
    arrays = all(isinstance(p, Pair) for p in parts.values())
    needed = sum(len(p.labels) if isinstance(p, Pair) else len(p) for p in parts.values()) * in_chans * size * size
    if arrays or needed <= memory_limit:
        blocks = {split: decode(part, size, in_chans, workers=workers, framing=framing) for split, part in parts.items()}
        return _decoded(blocks, memory_limit, max_unreadable)
    readers = {s: p for s, p in parts.items() if not isinstance(p, (Pair, StreamReader))}
    if len(readers) < len(parts) or in_chans not in (1, 3):
        raise DataError(
            f"memory_limit is {memory_limit:,} bytes and the images need {needed:,} at {size} pixels; arrays, streams and images of other "
            "than 1 or 3 channels must fit: raise it, or lower image_size."
        )
    surveys = {split: survey(r, size, in_chans, seed=seed, workers=workers, framing=framing) for split, r in readers.items()}
    return _streamed(readers, surveys, in_chans, max_unreadable, workers, framing)


def _decoded(blocks: Mapping[str, Block], memory_limit: int, max_unreadable: float) -> Loaded:
    unreadable = tuple(name for block in blocks.values() for name in block.unreadable)
    judge_unreadable(unreadable, sum(len(b.labels) for b in blocks.values()) + len(unreadable), max_unreadable)
    images, labels = join([b.images for b in blocks.values()]), torch.cat([b.labels for b in blocks.values()])
    own = _numbered({split: len(block.labels) for split, block in blocks.items()})
    pool = InMemory(images=images, labels=labels, memory_limit=memory_limit)
    return Loaded(pool=pool, own=own, unreadable=unreadable, sample=torch.arange(len(images)), images=images)


def _streamed(
    readers: Mapping[str, Reader],
    surveys: Mapping[str, Survey],
    in_chans: int,
    max_unreadable: float,
    workers: int | None,
    framing: Framing | None,
) -> Loaded:
    own = _numbered({split: len(reader) for split, reader in readers.items()})
    unreadable: list[str] = []
    labels, seen = [], []
    expected = 0.0
    for split, reader in readers.items():
        found = surveys[split]
        if found.images.is_floating_point():
            raise DataError(NOT_STREAMED)
        estimate = len(found.unreadable) - found.damaged + len(reader) * found.damaged / (len(found.sample) + found.damaged)
        known, told = reader.labels(), [label_of(reader, i, label) for i, label in zip(found.sample.tolist(), found.labels)]
        # what a Dataset has as attributes is not always what its items give, which is what counts
        labels.append(known if known is not None and known[found.sample].tolist() == told else _labels(reader, found.unreadable))
        expected += max(estimate, len(found.unreadable))
        start = int(own[split][0])
        seen.append((found.sample + start, found.images))
        own[split] = torch.tensor([start + i for i in range(len(reader)) if i not in found.unreadable])
        unreadable += found.unreadable.values()
    total = sum(len(r) for r in readers.values())
    judge_unreadable(unreadable, total, max_unreadable, share=expected / total)
    pool = Streamed(
        readers=tuple(readers.values()),
        labels=torch.cat(labels),
        in_chans=in_chans,
        workers=cores() if workers is None else workers,
        framing=framing,
    )
    sample, images = (torch.cat(list(t)) for t in zip(*seen))
    return Loaded(pool=pool, own=own, unreadable=tuple(unreadable), sample=sample, images=images)


def _labels(reader: Reader, unreadable: dict[int, str]) -> torch.Tensor:
    """The class of each item, which only the items tell; one that cannot be read is added to `unreadable` and counts as of class 0."""
    labels = [0] * len(reader)
    for i in range(len(reader)):
        if i not in unreadable:
            try:
                label = reader.read(i)[1]
            except Exception as error:
                unreadable[i] = why_unreadable(reader, i, error)
            else:
                labels[i] = label_of(reader, i, label)
    return torch.tensor(labels)


def _numbered(counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
    ends = torch.tensor(list(counts.values())).cumsum(0).tolist()
    return {split: torch.arange(end - n, end) for (split, n), end in zip(counts.items(), ends)}
