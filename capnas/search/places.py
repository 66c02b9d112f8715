"""Names of images and spaces, and the paths among them, so that they mean the same in every directory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from capnas.data.named import EMBEDDED, TIMM_PREFIXES
from capnas.search.storages import absolute_storage, hide_password


def absolute_images(data: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Images and their options so that they hold in every directory: the paths of a folder that is there and of ``root`` are absolute.

    >>> absolute_images("fashion-mnist-12k", {"image_size": 16})
    ('fashion-mnist-12k', {'image_size': 16})
    """
    root = options.get("root")
    there = isinstance(root, str) and os.path.exists(os.path.expanduser(root))
    return _folder(data), dict(options) | ({"root": _absolute(str(root))} if there else {})


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def absolute_file(space: str) -> str:
    """A space, with the absolute path of its file where it is in one.

    >>> absolute_file("resnet"), absolute_file("no/such/file.py:space")
    ('resnet', 'no/such/file.py:space')
    """
    match = re.fullmatch(r"(.+\.py)(:\w+)?", space)
    return _absolute(match[1]) + (match[2] or "") if match and os.path.isfile(os.path.expanduser(match[1])) else space


def _folder(data: str) -> str:
    """The name of images, or the absolute path of their folder; a name comes first, as in `capnas.load_data`."""
    prefix, slash, _ = data.partition("/")
    named = data in ("", EMBEDDED, "fashion-mnist", "folder", "image_folder") or (slash and prefix.lower() in TIMM_PREFIXES)
    return _absolute(data) if not named and os.path.isdir(os.path.expanduser(data)) else data


def anywhere(key: str, value: Any) -> Any:
    """A setting to compare: older studies hold relative paths and passwords of a query, and a path that is gone is left as it was given.

    >>> anywhere("data", "images") == anywhere("data", os.path.abspath("images")), anywhere("seed", 3)
    (True, 3)
    """
    if key in ("space", "data") and isinstance(value, str):
        return _absolute(value)
    if key == "storage":
        return hide_password(absolute_storage(value))
    if key == "data_options" and isinstance(value, Mapping) and isinstance(value.get("root"), str):
        return {**value, "root": _absolute(value["root"])}
    return value
