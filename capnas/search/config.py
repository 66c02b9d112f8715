"""What a study is asked for, in plain values, and its text ``study.toml``."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from capnas.data import ImageData, load_data
from capnas.errors import StudyError, UsageError, check_names, check_types
from capnas.objective.finals import LONGER, check_finals
from capnas.objective.gates import best_share, parse_gate
from capnas.objective.pool import check_pool
from capnas.objective.targets import check_values, check_weights, direction_of, ranking, summed, wanted
from capnas.scoring import Direction
from capnas.search.places import absolute_file, absolute_images, anywhere
from capnas.search.samplers import check_sampler
from capnas.search.storages import absolute_storage, hide_password, in_memory
from capnas.size_survey import are_sizes
from capnas.training import TrainConfig

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

VERSION = 1
_NONE = "{}"  # of study.toml: TOML has no value for none, and some settings have a default that it is not
# may change when a study is resumed; the device to another type only where no latency is measured, see `capnas.search.opening.check_device`
_FREE = ("trials", "timeout", "workers", "device", "out", "stale_after", "reuse", "finalists", "final_epochs")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study in plain values; ``study.toml`` is its text.

    Args:
        space: name, ``file.py:function`` or ``module:function``, see `capnas.load_space`.
        data: name or folder, see `capnas.load_data`.
        study: name of the study and its folder; from space and data where None.
        trials: finished trials in all, over all sessions and workers. With a gate that asks for a share only trained ones
            count, not those that are too large, infeasible or merely measured.
        timeout: seconds after which a session begins no further trial: the running one ends, and finals follow. A worker counts from
            its own start.
        epochs, values, weights, max_params, max_macs, max_latency, gate, pool, resolutions, blocks, seed, device, reuse: see
            `capnas.Objective`.
        finalists: how many of the best trials are trained again at the end, for longer, and the best of which is named; none if not
            said. See `capnas.objective.finals`.
        final_epochs: of those trainings; four times ``epochs`` where None.
        sampler: one of tpe, random, nsga2, nsga3, gp, qmc, cmaes (cmaes with one value only).
        pruner: "median", "hyperband" (one value only) or "off".
        storage: None for a journal in the run's folder; else an Optuna storage URL, ``grpc://host:port``, or the path of a
            journal file (``*.log``). Not a database in memory, which no other process reaches and nobody after this one.
        out: the run's folder; ``runs/<study>`` where None. Not stored.
        workers: processes on this host.
        train: further fields of `capnas.training.TrainConfig`.
        data_options: further arguments of `capnas.load_data`.
        stale_after: seconds until an unfinished trial of another host is given up.

    Raises:
        UsageError: a field that cannot be used; the text says which and why.

    Example:
        >>> config = StudyConfig(space="resnet", values=("accuracy", "macs"), train={"lr": 0.01})
        >>> config.name, StudyConfig.from_toml(config.to_toml()).to_dict() == config.to_dict()
        ('resnet-fashion-mnist-12k', True)
    """

    space: str
    data: str = "fashion-mnist-12k"
    study: str | None = None
    trials: int = 30
    timeout: float | None = None
    epochs: int = 3
    values: tuple[str, ...] = ("combined",)
    weights: Mapping[str, float] | None = None
    max_params: int | None = None
    max_macs: int | None = None
    max_latency: float | None = None
    gate: str | None = None
    pool: int | None = None
    resolutions: tuple[int, ...] | None = None
    blocks: str | None = None
    finalists: int | None = None
    final_epochs: int | None = None
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    storage: str | None = None
    out: str | None = None
    workers: int = 1
    device: str = "auto"
    reuse: bool = True
    train: Mapping[str, Any] = field(default_factory=dict)
    data_options: Mapping[str, Any] = field(default_factory=dict)
    stale_after: float = 6 * 3600.0

    def __post_init__(self) -> None:
        """Refuse what cannot run, before anything is built."""
        self._convert()
        check_types(self, "space", "data", "study", "storage", "out")
        self._check_places()
        self._check_numbers()
        check_sampler(self.sampler, self.pruner, len(self.values))
        share = best_share(parse_gate(self.gate))
        check_pool(self.pool, share)
        weights = check_weights(self.weights, self.values, share)
        ranking(share, self.values, weights)
        if self.weights is None and summed(self.values, share):  # stored with the study: later defaults leave it alone
            object.__setattr__(self, "weights", weights)
        self.training()
        if self.finalists is not None:
            check_finals(self.finalists, self.finals_epochs, self.values)
        elif self.final_epochs is not None:
            raise UsageError("final_epochs needs finalists: say how many of them as well.")
        self.to_toml()  # refuses what cannot be written

    def _convert(self) -> None:
        """Keep what may be given in other types in the declared ones."""
        object.__setattr__(self, "values", check_values(self.values))
        if isinstance(self.resolutions, Sequence | np.ndarray) and not isinstance(self.resolutions, str):
            object.__setattr__(self, "resolutions", tuple(self.resolutions))
        for name in ("max_params", "max_macs"):  # 8e6 is a whole number as well
            if isinstance(value := getattr(self, name), float) and value.is_integer():
                object.__setattr__(self, name, int(value))
        for name in ("space", "data", "out"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))

    def _check_places(self) -> None:
        for name in ("space", "data", "study", "storage"):
            if any("\ud800" <= letter <= "\udfff" for letter in getattr(self, name) or ""):  # bytes of a command line that are no text
                raise UsageError(f"{name} must be text that UTF-8 can write, got {getattr(self, name)!r}: give it another name.")
        if self.out == "":
            raise UsageError("out is the run's folder, got an empty name; name one ('.' is where you are), or leave it out.")
        if in_memory(self.storage):
            advice = "leave storage out, or name a file as in sqlite:///study.db"
            raise UsageError(f"the storage {self.storage} keeps nothing after the process ends; {advice}.")
        if self.study is not None and (self.study in ("", "..") or (self.out is None and Path(self.study).name != self.study)):
            advice = "give a name without slashes, or a folder as out"
            raise UsageError(f"study must be the name of a folder under runs/, got {self.study!r}; {advice}.")

    def _check_numbers(self) -> None:
        for name in ("trials", "workers", "max_params", "max_macs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}.")
        for name, unit in (("timeout", "seconds"), ("max_latency", "milliseconds")):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UsageError(f"{name} must be {unit}, above 0, got {value}.")
        if self.max_latency == math.inf:
            raise UsageError("max_latency must be a finite number of milliseconds, got inf: leave it out for no limit.")
        if not self.stale_after >= 0:
            raise UsageError(f"stale_after must be seconds, at least 0, got {self.stale_after}.")
        if self.resolutions is not None and not are_sizes(self.resolutions):
            raise UsageError(f"resolutions must be different sizes in pixels, got {self.resolutions}.")

    @property
    def finals_epochs(self) -> int:
        """Of a final training."""
        return LONGER * self.epochs if self.final_epochs is None else self.final_epochs

    @property
    def name(self) -> str:
        """The study's name."""
        if self.study is not None:
            return self.study
        space = self.space.removesuffix(":space").replace(".py", "")
        return re.sub(r"[^\w.-]+", "-", f"{Path(space).name}-{Path(self.data).name}").strip("-")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name

    @property
    def directions(self) -> list[Direction]:
        """Of the values, in order."""
        return [direction_of(name) for name in self.values]

    def training(self) -> TrainConfig:
        """The training of one trial."""
        check_names("train", self.train, {f.name for f in fields(TrainConfig)} - {"epochs", "blocks", "seed", "device"})
        return TrainConfig(epochs=self.epochs, blocks=self.blocks, seed=self.seed, device=self.device, **self.train)

    def absolute(self) -> StudyConfig:
        """The same study with absolute paths, which hold also after a space has changed the working directory."""
        stored = self.to_dict()
        where = {"space": stored["space"], "data": stored["data"], "data_options": stored.get("data_options", {})}
        return replace(self, study=self.name, out=str(self.folder.absolute()), storage=absolute_storage(self.storage), **where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without those that are None, empty (but for ``weights``) or belong to one session (``out``).

        A password in the storage URL is hidden; paths of images, of a space's file and of a storage's are absolute, so that they hold in
        every directory.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "out"}
        given |= {"study": self.name, "storage": hide_password(absolute_storage(self.storage))}
        given["reuse"] = None if self.reuse else False  # older studies know no such setting
        given |= dict(zip(("data", "data_options"), absolute_images(self.data, self.data_options))) | {"space": absolute_file(self.space)}
        kept = {k: _plain(v) for k, v in given.items() if v is not None and (v != {} or k == "weights")}  # none is not the default ones
        return {"version": VERSION} | kept

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], *, out: str | None = None) -> StudyConfig:
        """Read back what `to_dict` gave.

        Raises:
            StudyError: another version or none, no space, or fields that this one does not know.
        """
        given = dict(stored)
        if (version := given.pop("version", None)) is None:
            raise _cut("version")
        if version != VERSION:
            raise StudyError(f"the study has format version {version}, expected {VERSION}; open it with the capnas that wrote it.")
        if unknown := given.keys() - {f.name for f in fields(cls)}:
            raise StudyError(f"the study's settings hold unknown fields: {', '.join(sorted(unknown))}.")
        if "space" not in given:
            raise _cut("space")
        return cls(**given | {"out": out})

    def to_toml(self) -> str:
        """The text of ``study.toml``."""
        plain = self.to_dict()
        tables = {k: v for k, v in plain.items() if isinstance(v, dict)}
        lines = [f"{k} = {_toml(v)}" for k, v in plain.items() if k not in tables]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{json.dumps(str(k))} = {_NONE if v is None else _toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str, *, out: str | None = None) -> StudyConfig:
        """Read back what `to_toml` gave.

        Raises:
            StudyError: no TOML, another version or unknown fields.
        """
        try:
            given = tomllib.loads(text)
            tables = {k: {n: None if v == {} else v for n, v in table.items()} for k, table in given.items() if isinstance(table, dict)}
            return cls.from_dict(given | tables, out=out)
        except (tomllib.TOMLDecodeError, TypeError) as error:
            raise StudyError(f"the study's settings cannot be read: {error}.") from error

    def images(self, **more: Any) -> ImageData:
        """The images of the study; at the largest of `resolutions` where there are some, unless ``data_options`` name an ``image_size``.

        Args:
            more: options of `capnas.load_data` that come before the study's own.

        Raises:
            DataError, UsageError: see `capnas.load_data`.
        """
        return load_data(self.data, **self.image_options | more)

    @property
    def image_options(self) -> dict[str, Any]:
        """What `images` gives to `capnas.load_data` besides their source."""
        largest = {} if self.resolutions is None else {"image_size": max(self.resolutions)}
        return {"seed": self.seed} | largest | dict(self.data_options)

    @property
    def rates_capacity(self) -> bool:
        """Whether a value or the gate holds `capacity_score`, whose definition may differ between versions."""
        names = wanted((*self.values, *(gate.name for gate in parse_gate(self.gate))), self.weights or {})
        return any(name.endswith("capacity_score") for name in names)

    def conflicts(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs from a stored study's settings and cannot be changed when it is resumed.

        The storage can: that of the study is the one it was found in, by whatever name a host calls it.
        """
        return [text for name, text in self.differences(stored).items() if name != "storage"]

    def differences(self, stored: Mapping[str, Any]) -> dict[str, str]:
        """`conflicts` by the setting that differs, and the storage."""
        ours = self.to_dict()
        keys = [k for k in dict.fromkeys([*stored, *ours]) if k not in _FREE]
        return {
            k: f"{k} was {stored.get(k, 'not set')!r}, now {ours.get(k, 'not set')!r}"
            for k in keys
            if anywhere(k, stored.get(k)) != anywhere(k, ours.get(k))
        }


def _plain(value: Any) -> Any:
    """The value with lists for tuples, texts for paths and Python's numbers for those of NumPy, which neither JSON nor TOML can write."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    raise UsageError(f"study.toml holds texts, numbers, truth values and lists of them, got {value!r}.")


def _cut(name: str) -> StudyError:
    advice = "study.toml was cut or emptied: remove it and give the capnas search command again, which writes it anew"
    return StudyError(f"the study's settings cannot be read: they hold no {name}; {advice}.")
