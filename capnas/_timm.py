"""Import timm on every build of torch.

A CPU build of torch beside the registry's (CUDA) torchvision wheel fails at ``import torchvision`` with
``operator torchvision::nms does not exist``, and takes timm with it. Only on exactly this failure the missing
operators are declared (without kernels: detection ops stay unavailable, nothing here uses them) and the import is repeated.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_MISSING = "operator torchvision::nms does not exist"
_library: Any = None  # the declarations live as long as this object


def _declare_operators() -> None:
    global _library
    import torch

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for op in ("nms", "qnms"):
        _library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _forget_half_imported() -> None:
    for name in [m for m in sys.modules if m.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]


def import_timm(module: str = "timm") -> ModuleType:
    """Import ``timm`` or one of its modules, e.g. ``import_timm("timm.data")``.

    >>> import_timm("timm.layers").__name__
    'timm.layers'
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
        _forget_half_imported()
        _declare_operators()
    return importlib.import_module(module)


timm = import_timm()
