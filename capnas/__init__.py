"""Architecture search for Optuna, timm and PyTorch that looks inside each candidate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capnas.data import ImageData as ImageData
    from capnas.data import load_data as load_data
    from capnas.errors import CapnasError as CapnasError
    from capnas.narrowing.pruning import prune as prune
    from capnas.objective import Objective as Objective
    from capnas.objective.evaluation import Evaluation as Evaluation
    from capnas.profile import LayerProfile as LayerProfile
    from capnas.profile import Profile as Profile
    from capnas.profile import profile_model as profile_model
    from capnas.recording import Recorder as Recorder
    from capnas.report import Report as Report
    from capnas.resolution import tune_resolution as tune_resolution
    from capnas.saved import load_model as load_model
    from capnas.saved import save_model as save_model
    from capnas.scoring import SCORES as SCORES
    from capnas.scoring import score as score
    from capnas.search import run_study as run_study
    from capnas.search.config import StudyConfig as StudyConfig
    from capnas.search.runs import open_run as open_run
    from capnas.spaces import list_spaces as list_spaces
    from capnas.spaces import load_space as load_space
    from capnas.testing import check_space as check_space
    from capnas.training import TrainConfig as TrainConfig

__version__ = "0.1.0"
_PUBLIC = {
    # search
    "Objective": "capnas.objective",
    "Evaluation": "capnas.objective.evaluation",
    "TrainConfig": "capnas.training",
    "StudyConfig": "capnas.search.config",
    "run_study": "capnas.search",
    "open_run": "capnas.search.runs",
    "Report": "capnas.report",
    # spaces and data
    "load_space": "capnas.spaces",
    "list_spaces": "capnas.spaces",
    "check_space": "capnas.testing",
    "load_data": "capnas.data",
    "ImageData": "capnas.data",
    # looking inside a network
    "profile_model": "capnas.profile",
    "Profile": "capnas.profile",
    "LayerProfile": "capnas.profile",
    "Recorder": "capnas.recording",
    "score": "capnas.scoring",
    "SCORES": "capnas.scoring",
    # over-wide layers, the input size
    "prune": "capnas.narrowing.pruning",
    "tune_resolution": "capnas.resolution",
    # models as folders
    "save_model": "capnas.saved",
    "load_model": "capnas.saved",
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


def __dir__() -> list[str]:
    return sorted(__all__)
