"""Everything that a trial found out, in the one JSON attribute that is stored with it, and the few numbers that a dashboard shows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import methodcaller
from typing import Any

from optuna.trial import FrozenTrial

from capnas.data import ImageData
from capnas.documents import plain
from capnas.errors import StudyError, UsageError, check_name, check_names, check_type
from capnas.profile import INITIALIZATIONS, Profile
from capnas.training import TrainConfig, TrainingResult

ATTRIBUTE = "capnas"  # key of the trial's user attribute
SHOWN = ("accuracy", "params", "macs", "latency")  # metrics with an attribute of their own, beside ``capnas:status``
VERSION = 1
ENDS = ("complete", "stopped", "diverged", "out_of_memory")  # statuses of a training
LOOKED: Mapping[str, int] = {"probe_images": 64, "initializations": INITIALIZATIONS}  # how the untrained network is read, usually
STATUSES = (
    "complete", "duplicate", "stopped", "over_budget", "infeasible", "gated", "measured", "diverged", "out_of_memory", "failed",
    "interrupted",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one trial is and what came of it.

    Attributes:
        status: how it ended. "complete": trained and scored. "duplicate": the result of `duplicate_of`, not trained again.
            "stopped": ended early by the pruner or the median rule. "over_budget", "infeasible", "gated": ended before training.
            "measured": in the pool or outside the gate's share, not trained so far.
            "diverged", "out_of_memory": training could not go on. "failed": an error. "interrupted": by a signal.
        reason: why it is not complete, in words; else "".
        params: the trial's parameters: the whole genotype.
        values: the objective values by name, as given to Optuna; empty where the trial gave none.
        metrics: all numbers by name: accuracy, val_loss, params, macs, latency (where it is limited or a value), each score, and with
            prefix ``init_`` each score of the structure before training.
        curve: one dict per trained epoch (see `capnas.training.TrainingResult`).
        profile: layer profile after training, or before it where the trial got no further.
        seconds: wall-clock seconds by stage: cost, structure, training, capacity (of the trained network, where a value needs it).
        hash: canonical hash of the architecture.
        settings: fingerprint of data and training settings; equal hash, image_size and settings make a duplicate.
        n_params, macs: parameters and multiply-accumulates of one image.
        image_size: resolution in pixels.
        seed: of weights, shuffling and augmentation.
        duplicate_of: number of the trial whose result this is.
        standing: share of the candidates seen until then that had a better score before training; None without such a gate.
        version: of this format.

    Example:
        >>> found = Evaluation(status="over_budget", reason="too many MACs", params={"depth": 9}, macs=10**9)
        >>> Evaluation.from_dict(found.to_dict()) == found
        True
    """

    status: str
    reason: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    profile: Profile | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    hash: str | None = None
    settings: str | None = None
    n_params: int | None = None
    macs: int | None = None
    image_size: int | None = None
    seed: int | None = None
    duplicate_of: int | None = None
    standing: float | None = None
    version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; a number that is not finite becomes None."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        given["profile"] = None if self.profile is None else self.profile.to_dict()
        return plain(given)

    def attributes(self) -> dict[str, Any]:
        """What to store with the trial, by key: flat values for plots and dashboards, and last the whole, which is all that is read.

        >>> list(Evaluation(status="over_budget", metrics={"params": 9, "macs": 10**9}).attributes())
        ['capnas:status', 'capnas:params', 'capnas:macs', 'capnas']
        """
        whole = self.to_dict()
        shown = {"status": self.status} | {n: whole["metrics"][n] for n in SHOWN if whole["metrics"].get(n) is not None}
        return {f"{ATTRIBUTE}:{name}": value for name, value in shown.items()} | {ATTRIBUTE: whole}

    def write(self, write: Callable[[str, Any], None]) -> None:
        """Store `attributes` one by one, as ``evaluation.write(trial.set_user_attr)``."""
        for key, value in self.attributes().items():
            write(key, value)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Evaluation:
        """Read back what `to_dict` gave.

        Raises:
            StudyError: another version, an unknown status, or not an evaluation at all.
        """
        version = stored.get("version") if isinstance(stored, Mapping) else None
        if version is None:
            raise StudyError("this is not a stored evaluation: it has no version.")
        if version != VERSION:
            text = f"the evaluation has format version {version}, expected {VERSION}"
            raise StudyError(f"{text}; read it with the release of capnas that wrote it.")
        given = {f.name: stored[f.name] for f in fields(cls) if f.name in stored}
        if given.get("status") not in STATUSES:
            raise StudyError(f"the evaluation has the unknown status {given.get('status')!r}; known: {', '.join(STATUSES)}.")
        profile = given.get("profile")
        return cls(**given | {"curve": tuple(given.get("curve", ())), "profile": None if profile is None else Profile.from_dict(profile)})

    @classmethod
    def of(cls, trial: Any) -> Evaluation | None:
        """The evaluation stored with a trial of a study, or None where there is none."""
        stored = trial.user_attrs.get(ATTRIBUTE)
        return None if stored is None else cls.from_dict(stored)


def stored_with(trial: FrozenTrial) -> Mapping[str, Any]:
    """What an evaluation left with a trial, in JSON types and of any version; empty where nothing is.

    >>> import optuna
    >>> dict(stored_with(optuna.trial.create_trial(values=[0.5])))
    {}
    """
    stored = trial.user_attrs.get(ATTRIBUTE)
    return stored if isinstance(stored, Mapping) else {}


def recipe(train: TrainConfig | Mapping[str, Any] | None, **own: Any) -> TrainConfig:
    """The training of a trial: settings with an argument of their own, where they are given, before those of ``train``.

    Raises:
        UsageError: no training, or a setting that it does not have or cannot use.

    >>> recipe({"lr": 0.1, "seed": 3}, epochs=2, seed=None) == TrainConfig(lr=0.1, seed=3, epochs=2)
    True
    """
    if not isinstance(train, TrainConfig):
        check_type("train", train, TrainConfig | Mapping | None)
        check_names("train", train or {}, {f.name for f in fields(TrainConfig)})
        train = TrainConfig(**train or {})
    return dataclasses.replace(train, **{name: value for name, value in own.items() if value is not None})


def checked(result: Any) -> TrainingResult:
    """What a trainer gave, where a trial can be judged by it.

    Raises:
        UsageError: it is no `TrainingResult`, ended in no known way, or is complete without an accuracy.

    >>> checked(TrainingResult(status="complete", curve=({"accuracy": 0.5},))).status
    'complete'
    """
    if not isinstance(result, TrainingResult):
        raise UsageError(f"trainer must give a capnas.training.TrainingResult, got {type(result).__name__}.")
    check_name("status of a trainer's TrainingResult", result.status, ENDS)
    if result.status == "complete" and not (result.curve and all("accuracy" in row for row in result.curve)):
        raise UsageError("a trainer's complete TrainingResult needs a curve with the accuracy on validation in every row.")
    return result


def _called(trainer: Callable[..., Any]) -> str:
    if isinstance(trainer, functools.partial):  # whose own name is that of all of them
        return f"{_called(trainer.func)} {trainer.args} {sorted(trainer.keywords.items())}"
    return f"{trainer.__module__}.{getattr(trainer, '__qualname__', type(trainer).__qualname__)}"


def fingerprint(train: TrainConfig, data: ImageData, trainer: Callable[..., Any] | None = None, **looked: int) -> str:
    """Of all that decides the outcome of a trial besides the architecture; where it runs does not count.

    Args:
        train: the training.
        data: the images.
        trainer: who trains, by its name (of a `functools.partial` with what it fixes), where it is not `capnas.training.train`.
        looked: how the untrained network is read, by name; only what is not usual (`LOOKED`) counts, so that earlier trials keep theirs.
    """
    how = {k: v for k, v in dataclasses.asdict(train).items() if k not in ("device", "amp", "channels_last")}
    images = {"name": data.name, "sizes": dict(data.sizes), "mean": list(data.mean), "std": list(data.std)}
    images |= {key: value for key, value in data.digest.items() if key != "pixels"}  # which may differ a little on another machine
    if (framing := data.spec.framing) is not None:
        images["framing"] = dataclasses.asdict(framing)
    unusual: dict[str, Any] = {name: number for name, number in looked.items() if number != LOOKED[name]}
    if trainer is not None:
        unusual["trainer"] = _called(trainer)
    text = json.dumps([how, images, *([unusual] if unusual else [])], sort_keys=True, default=methodcaller("item"))  # a number of NumPy
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def timed(found: dict[str, Any], stage: str) -> Iterator[None]:
    """Write how long the block took into the seconds of what becomes an evaluation."""
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"][stage] = time.perf_counter() - start
