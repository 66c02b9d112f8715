"""What a run leaves beside its trials: where it ran, and its trials as a table. Both are made from the storage and can be made again."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

import capnas
from capnas.devices import resolve_device, usable_cpus
from capnas.documents import json_text, read_json, write_whole
from capnas.errors import StudyError
from capnas.objective.history import evaluated

_PACKAGES = ("torch", "torchvision", "timm", "optuna", "numpy", "scipy")


def environment(*, workers: int = 1, device: str = "auto") -> dict[str, Any]:
    """Versions and hardware, without names of hosts, users or folders."""
    where = resolve_device(device)
    return {
        "capnas": capnas.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": usable_cpus(),
        "workers": workers,
        "threads": max(1, torch.get_num_threads() // workers),
        "device": where.type,
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
        "cuda": torch.version.cuda,
    }


def write_environment(path: Path, *, workers: int = 1, device: str = "auto") -> None:
    """Write `environment` as JSON."""
    write_whole(path, json_text(environment(workers=workers, device=device), indent=2))


def read_environment(path: Path) -> dict[str, Any]:
    """What `write_environment` wrote; empty where nothing is.

    Raises:
        StudyError: the file is damaged.
    """
    if not path.is_file():
        return {}
    expected = "versions and hardware as an object: remove it, the next session of the search writes it anew"
    return dict(read_json(path, expected, StudyError, dict))


def trial_rows(study: optuna.Study, names: Sequence[str]) -> list[dict[str, Any]]:
    """One flat row per ended trial: number, state, outcome, values, parameters, metrics, seconds.

    Args:
        study: run by `capnas.Objective`.
        names: value names in order.
    """
    rows = []
    for trial, found in evaluated(study):
        row: dict[str, Any] = {"number": trial.number, "state": trial.state.name, "status": found.status}
        row |= {f"value.{name}": found.values.get(name) for name in names}
        row |= {f"param.{name}": value for name, value in trial.params.items()}
        row |= {"image_size": found.image_size} | dict(found.metrics)
        row |= {f"seconds.{stage}": round(value, 4) for stage, value in found.seconds.items()}
        row |= {"hash": found.hash, "duplicate_of": found.duplicate_of, "epochs": len(found.curve), "reason": found.reason}
        rows.append(row)
    return rows


def write_trials(path: Path, study: optuna.Study, names: Sequence[str]) -> None:
    """Write `trial_rows` as CSV; columns in the order number, state, values, parameters, metrics, the rest."""
    rows = trial_rows(study, names)
    seen = dict.fromkeys(column for row in rows for column in row)
    first = ["number", "state", "status"]
    groups = [
        first,
        [c for c in seen if c.startswith("value.")],
        sorted(c for c in seen if c.startswith("param.")),
        [c for c in seen if "." not in c and c not in first],
        [c for c in seen if c.startswith("seconds.")],
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=[c for group in groups for c in group], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, table.getvalue())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or None)
