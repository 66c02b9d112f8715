"""Which image belongs to which split, and whether the classes can be trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from capnas.data.images import RENUMBER
from capnas.errors import DataError


def carve(labels: torch.Tensor, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified split of positions: (kept, carved), both sorted. A class of two or more images gives at least one and keeps one.

    Args:
        labels: (N,) class numbers.
        fraction: share of each class to carve, in (0, 1).
        seed: the same seed carves the same positions.

    Example:
        >>> kept, carved = carve(torch.tensor([0, 0, 0, 0, 1, 1]), 0.25, seed=0)
        >>> len(kept), len(carved)
        (4, 2)
    """
    generator = torch.Generator().manual_seed(seed)
    carved = torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        members = (labels == c).nonzero()[:, 0]
        take = min(max(round(len(members) * fraction), 1), len(members) - 1)
        carved[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return (~carved).nonzero()[:, 0], carved.nonzero()[:, 0]


def assign(own: Mapping[str, torch.Tensor], labels: torch.Tensor, *, test: float, validation: float, seed: int) -> dict[str, torch.Tensor]:
    """Positions of train, validation and test, which never share one: what the source brings, and carved from train what it does not.

    Args:
        own: positions of the source's parts: "train" and, if there are, "validation" and "test". Of train and validation alone,
            validation becomes test: it is the only held-out part, and stays untouched until the end.
        labels: (N,) class of every image.
        test: share of train to carve where there is no test part.
        validation: share of train to carve where there is no validation part.
        seed: of the carving.

    Example:
        >>> index = assign({"train": torch.arange(20)}, torch.arange(20) % 2, test=0.2, validation=0.25, seed=0)
        >>> {split: len(positions) for split, positions in index.items()}
        {'train': 12, 'test': 4, 'validation': 4}
    """
    index = dict(own)
    if "test" not in index and "validation" in index:
        index["test"] = index.pop("validation")
    for split, share in (("test", test), ("validation", validation)):
        if split not in index:
            kept, carved = carve(labels[index["train"]], share, seed)
            index["train"], index[split] = index["train"][kept], index["train"][carved]
    return index


def check_classes(own: Mapping[str, torch.Tensor], labels: torch.Tensor, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """The class names, after a check that there are two or more, none is empty in train and no split knows others.

    A class that validation or test lacks is none of its right answers: that is a warning which names it.

    Raises:
        DataError: with the classes and splits at fault; where labels start at 1 or leave numbers out, with what renumbers them.

    Example:
        >>> check_classes({"train": torch.arange(6)}, torch.tensor([0, 0, 0, 1, 1, 1]), None)
        ('0', '1')
    """
    train = labels[own["train"]]
    present = set(train.unique().tolist())
    known = len(names) if names else max(present, default=-1) + 1
    if (known if names else len(present)) < 2:
        raise DataError(f"expected at least two classes, found {len(names or present)}; a search needs something to tell apart.")
    advice = "labels start at 1: subtract 1" if min(present, default=0) == 1 and len(present) == max(present) else RENUMBER

    def called(classes: list[int]) -> str:
        return ", ".join((names[c] if names and c < len(names) else str(c)) for c in classes[:5]) + (", ..." if len(classes) > 5 else "")

    for split, positions in own.items():
        top = int(labels[positions].max()) if len(positions) else -1
        if top >= known:
            mend = f"; {advice}" if split == "train" else ""
            raise DataError(f"{split}: expected labels from 0 to {known - 1}, the classes of train, found {top}{mend}.")
    empty = [c for c in range(min(known, len(present) + 6)) if c not in present]  # labels may be huge: more than five are not told
    if empty:
        mend = "" if names else f": {advice}"
        raise DataError(
            f"train: expected images of every class from 0 to {known - 1}, found none of {called(empty)}; leave no class empty{mend}."
        )
    counts = train.bincount(minlength=known)
    for split in own:
        if lacking := (labels[own[split]].bincount(minlength=known) == 0).nonzero()[:, 0].tolist():
            text = f"{split}: expected images of every class of train, found none of {called(lacking)}; it is judged without them."
            warnings.warn(text, UserWarning, stacklevel=5)
    need = 1 + (len(own) < 3) + (len(own) < 2)
    scarce = (counts < need).nonzero()[:, 0].tolist()
    if scarce:
        raise DataError(f"train: expected at least {need} images of each class, to set some aside, found fewer of {called(scarce)}.")
    return names or tuple(str(c) for c in range(known))
