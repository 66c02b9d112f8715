"""Architecture search for Optuna, timm and PyTorch that looks inside each candidate."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    # search
    "Objective": "capnas.objective",
    "Evaluation": "capnas.evaluation",
    "StudyConfig": "capnas.config",
    "run_study": "capnas.search",
    "open_run": "capnas.search",
    # spaces
    "load_space": "capnas.spaces",
    "list_spaces": "capnas.spaces",
    "check_space": "capnas.testing",
    # data and training
    "load_data": "capnas.data",
    "TrainConfig": "capnas.training",
    # looking inside
    "profile_model": "capnas.profile",
    "Profile": "capnas.profile",
    "LayerProfile": "capnas.profile",
    "Recorder": "capnas.recording",
    "score": "capnas.scoring",
    "SCORES": "capnas.scoring",
    # errors
    "CapnasError": "capnas.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import capnas`` and ``capnas --help`` load nothing heavy."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'capnas' has no attribute {name!r}; public names: {', '.join(__all__)}.")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
