"""Folders of images: which layouts are read, and what a wrong one is told."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from capnas.data.sources import SPLIT_NAMES, FileReader, Found, Pair, Reader
from capnas.errors import DataError, listed

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")

Identity = tuple[int, int]  # of a folder, by whichever name it is reached


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(t), "") if t.isdecimal() else (-1, t) for t in re.split(r"(\d+)", name.lower())]


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    entries = sorted((p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX"))), key=lambda p: (_natural(p.name), p.name))
    return [p for p in entries if p.is_dir()], [p for p in entries if p.is_file() and p.suffix.lower() in EXTENSIONS]


def _identity(folder: str | Path) -> Identity:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _way(folder: Path, above: Mapping[Identity, Path] | None = None) -> dict[Identity, Path]:
    """A folder and those that it lies in, to which no link inside it may lead."""
    way = dict(above or {})
    for place in (folder, *folder.resolve().parents):
        with contextlib.suppress(OSError):
            way.setdefault(_identity(place), place)
    return way


def _images(folder: Path, above: Mapping[Identity, Path]) -> list[Path]:
    """The images anywhere inside a folder, those of a folder that is linked to again once.

    Raises:
        DataError: a link leads back to a folder that it lies in, of those `above` or below.
    """
    found: list[Path] = []
    seen: set[Identity] = set()
    ways = {str(folder): dict(above)}
    for base, folders, files in os.walk(folder, followlinks=True):
        here, way = _identity(base), ways.pop(base)
        if here in way:
            advice = "its images would be read again and again, or in another class; take the link away"
            raise DataError(f"{base} leads back to {way[here]}, in which it lies: {advice}.")
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(base, name)), name))  # a folder goes by its own name, not by a link's
        ways |= {os.path.join(base, name): way | {here: Path(base)} for name in folders}
        found += [Path(base) / f for f in files if not f.startswith(".")]
    return sorted((p for p in found if p.suffix.lower() in EXTENSIONS), key=lambda p: (_natural(str(p)), str(p)))


def _are_splits(folders: list[Path]) -> bool:
    named = [f for f in folders if f.name.lower() in SPLIT_NAMES]
    # "train" may also be a class, beside "car" and "ship": then it holds images and no folders
    return bool(named) and (len(named) == len(folders) or any(_visible(f)[0] for f in named))


def read_folder(path: Path) -> Found:
    """A folder of class folders, or of ``train/`` with ``val/`` and/or ``test/`` that hold class folders.

    ``train/`` is trained on, and where there is no ``test/``, ``val/`` is kept for the final evaluation and the search's validation images
    are carved from train, as they are without ``val/``: see `capnas.data.splits.assign`. Other names of splits: training, valid,
    validation, eval, testing. Classes are the names of the folders in train, in natural order; a class that ``val/`` or ``test/`` lacks is
    warned of by `capnas.data.splits.check_classes`. Images may lie deeper inside. Hidden files and other files than images are ignored.

    Raises:
        DataError: loose images, no or one class, an empty class, a split without train, a class that train does not have, a link
            that leads back to a folder that it lies in.
    """
    folders, loose = _visible(path)
    splits: dict[str, Path] = {}
    for folder in folders if _are_splits(folders) else ():
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in splits:
            raise DataError(f"{path}: expected one folder per split, found both {splits[split].name}/ and {folder.name}/.")
        if split:
            splits[split] = folder
    if splits and "train" not in splits:
        raise DataError(f"{path}: expected train/ beside {', '.join(f.name + '/' for f in splits.values())}, found none.")
    others = [f for f in folders if f not in splits.values()] if splits else []
    extra = [f.name + "/" for f in others if _images(f, _way(path))] + [p.name for p in loose]
    if splits and extra:
        raise DataError(f"{path}: expected images only in train/, val/ and test/, found also {listed(extra)}; move them away.")
    _check_apart(path, list(splits.values()))
    splits = splits or {"train": path}
    class_names: tuple[str, ...] = ()
    parts: dict[str, Pair | Reader] = {}
    for split in sorted(splits, key=("train", "validation", "test").index):
        parts[split], class_names = _class_folders(splits[split], class_names, path)
    return Found(name=path.resolve().name, parts=parts, class_names=class_names)


def _check_apart(folder: Path, inside: list[Path]) -> None:
    """Refuse splits or classes that are one folder by two names, and so would share their images."""
    seen: dict[Identity, Path] = {}
    for place in inside:
        if (other := seen.setdefault(_identity(place), place)) is not place:
            raise DataError(f"{folder}: {other.name}/ and {place.name}/ are one folder; take the link away, or give each its own images.")


def _class_folders(folder: Path, known: tuple[str, ...], root: Path) -> tuple[FileReader, tuple[str, ...]]:
    folders, loose = _visible(folder)
    if loose:
        beside = f"beside {len(folders)} class folders" if folders else "and no folders"
        raise DataError(
            f"{folder}: expected one folder per class, found {len(loose)} image files {beside} ({listed([p.name for p in loose])})."
        )
    _check_apart(folder, folders)
    names = tuple(f.name for f in folders)
    if len(names) < 2 and not known:
        inside = f"; is the data set inside, in {folders[0]}?" if folders and _visible(folders[0])[0] else "."
        raise DataError(f"{folder}: expected at least two class folders, found {listed(names) or 'none'}{inside}")
    if known and set(names) - set(known):
        found = f"expected the classes of train ({listed(known)}), found also {listed(sorted(set(names) - set(known)))}"
        raise DataError(f"{folder}: {found}; add them to train or take them away.")
    paths: list[Path] = []
    classes: list[int] = []
    way = _way(folder, _way(root))
    for class_folder in folders:
        files = _images(class_folder, way)
        if not files:
            raise DataError(f"{class_folder}: expected images ({', '.join(EXTENSIONS)}), found none; add some or remove the empty class.")
        paths += files
        classes += [(known or names).index(class_folder.name)] * len(files)
    if not paths:
        raise DataError(f"{folder}: expected class folders with images, found none.")
    return FileReader(paths, classes, root), known or names
