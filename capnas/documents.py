"""Documents that outlive the process: JSON's own types, and files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from capnas.errors import CapnasError


def plain(value: Any) -> Any:
    """The value in JSON's own types: what is not a finite number becomes None, a dataclass or mapping a dictionary, a tuple a list.

    Anything else becomes its text.

    >>> plain({"a": (1, float("nan")), 2: Path("b")})
    {'a': [1, None], '2': 'b'}
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return plain(value.item()) if getattr(value, "ndim", None) == 0 else str(value)  # a scalar of NumPy or torch


def or_nan(value: float | None) -> float:
    """A number as `plain` left it: NaN where it is None.

    >>> or_nan(None), or_nan(2)
    (nan, 2.0)
    """
    return math.nan if value is None else float(value)


def json_text(document: Any, *, indent: int | None = 1) -> str:
    r"""`plain` as JSON text with a line's end.

    >>> json_text({"a": float("inf")}, indent=None)
    '{"a": null}\n'
    """
    return json.dumps(plain(document), indent=indent, allow_nan=False) + "\n"


def read_json(path: str | Path, expected: str, error: type[CapnasError], of: type = object) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        expected: what it should hold and, where that helps, what to do otherwise: the end of the error.
        error: the kind of it.
        of: Python's type of such a document.

    Raises:
        CapnasError: of that kind; the file cannot be read, is not JSON or holds a document of another type.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}; expected {expected}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON: {problem}; expected {expected}.") from problem
    if not isinstance(document, of):
        raise error(f"{path} holds a {type(document).__name__}; expected {expected}.")
    return document


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a process that is killed, finds the old content or the new one and never a part.

    Args:
        path: in a folder that exists; an older file is replaced, also behind a link, and keeps its mode; a device or pipe is written to.
        content: text is written as UTF-8, its line ends as they are.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not (path.is_file() or path.is_dir()):  # such as /dev/stdout, which must not become a file
        path.write_bytes(data)
        return
    place = Path(os.path.realpath(path))
    partial = place.parent / f"{place.name}.{os.getpid()}.partial"
    try:
        partial.write_bytes(data)
        if place.is_file():
            shutil.copymode(place, partial)
        os.replace(partial, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):  # a write that fails names no file, and the partial one is no one's business
            error.filename, error.filename2 = str(path), None
        raise
