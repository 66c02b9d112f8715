"""Architecture search for Optuna, timm and PyTorch that looks inside each candidate."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
_PUBLIC: dict[str, str] = {}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import capnas`` and ``capnas --help`` load nothing heavy."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'capnas' has no attribute {name!r}; public names: {', '.join(__all__)}.")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
