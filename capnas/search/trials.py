"""One trial of a run: find it, build its model again, write it as a script, train it to the end.

Everything here starts from stored trials. Nothing but `retrain_trial` trains, and nothing but `retrain_trial` reads the test split.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from torch import nn

from capnas.candidates import Candidate, Infeasible, build_candidate, build_model
from capnas.data import ImageData
from capnas.documents import json_text, read_json, write_whole
from capnas.errors import StudyError, UsageError, one_line
from capnas.objective.evaluation import Evaluation
from capnas.profile import Profile
from capnas.saved import MANIFEST, check_folder, save_model
from capnas.search.opening import DATA, data_changes, data_facts, data_record, input_record
from capnas.search.runs import RunResult
from capnas.search.standalone import standalone_script
from capnas.search.storages import locked
from capnas.spaces import load_space, space_spec
from capnas.training import retrain

RETRAINED = "retrained.json"
_BROKEN = ("failed", "interrupted")  # statuses of trials that may have ended before their network was there


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A trial and all that is needed to build its model.

    Attributes:
        run: the run it belongs to.
        number: of the trial.
        evaluation: what the search found out.
        space: the search space.
        candidate: the architecture, on the meta device.
        images: the images, where they were loaded already.
    """

    run: RunResult
    number: int
    evaluation: Evaluation
    space: Callable[..., Any]
    candidate: Candidate
    images: ImageData | None = None

    @functools.cached_property
    def data(self) -> ImageData:
        """The run's images, loaded when they are first asked for.

        Raises:
            StudyError: they have other classes or channels than in the search.
            DataError: they cannot be read.
        """
        return self.images or _images(self.run)

    @property
    def shape(self) -> dict[str, int]:
        """Sizes that the space takes: num_classes, in_chans, image_size."""
        return self.candidate.shape

    def model(self, seed: int | None = None) -> nn.Module:
        """The model with the weights that the search started from, or those of another seed.

        Raises:
            StudyError: the trial gives none.
        """
        start = (self.evaluation.seed or 0) if seed is None else seed
        try:
            return build_model(self.space, self.candidate.params, **self.shape, seed=start)
        except Infeasible as error:
            raise _no_network(self.run, self.number, self.evaluation, error) from error

    @property
    def recipe(self) -> dict[str, Any]:
        """What `capnas.saved.build_recipe` builds the architecture from, in plain JSON types."""
        return {"space": space_spec(self.space), "params": dict(self.evaluation.params)} | self.shape

    def script(self) -> str:
        """Python source that builds the model with timm and torch alone, see `capnas.search.standalone.standalone_script`."""
        title = f"Trial {self.number} of the study {self.run.config.name}, found by capnas."
        return standalone_script(self.space, self.candidate.params, **self.shape, guard=None, title=title)

    def summary(self) -> dict[str, Any]:
        """Number, status, values, parameters, metrics and what a final training gave, if there was one, in plain JSON types."""
        stored, finals = self.evaluation.to_dict(), {trial.number: dict(final) for trial, final in self.run.finals}
        return (
            {"study": self.run.config.name, "trial": self.number}
            | {
                name: stored[name]
                for name in ("status", "values", "params", "metrics", "n_params", "macs", "image_size", "hash", "seconds")
            }
            | {"final": finals.get(self.number)}
        )


def rebuild(run: RunResult, which: int | Literal["best"] = "best", *, data: ImageData | None = None) -> Rebuilt:
    """A trial's architecture, checked against the hash that the search stored; images are loaded only where the run kept no shape.

    Args:
        run: from `capnas.search.open_run`.
        which: the trial's number, or the best (of several values: the first one's best).
        data: the run's images, where they are loaded already.

    Raises:
        StudyError: no such trial, none with a value, one without a network, other classes or channels than in the search, or the space
            builds another architecture now than it did then.
    """
    if which == "best":
        best = run.best
        if best is None:
            why = f"see why with capnas report {shlex.quote(str(run.folder))}"
            raise StudyError(f"the study {run.config.name} has no trial with a value yet; {why}.")
        which = best.number
    evaluation = run.evaluation(which)
    run = dataclasses.replace(run, folder=run.folder.absolute())  # a space may change the working directory
    space = load_space(run.config.space)
    known: Any = run.study.user_attrs.get(DATA)
    if data is not None:
        _check_shape(run, data)
    elif known is None:
        data = _images(run)
    sizes = known if data is None else data_facts(data)
    shape = {name: sizes[name] for name in ("num_classes", "in_chans")} | {"image_size": evaluation.image_size or sizes["image_size"]}
    try:
        candidate = build_candidate(space, optuna.trial.FixedTrial(dict(evaluation.params)), **shape)
    except Exception as error:  # a trial that never had a network tells nothing of the space
        if isinstance(error, Infeasible) or evaluation.status in _BROKEN:
            raise _no_network(run, which, evaluation, error) from error
        raise
    if evaluation.hash is not None and candidate.hash != evaluation.hash:
        raise StudyError(
            f"the space {run.config.space} has changed since the search: it builds another architecture for trial {which}. "
            "Use the version of the space that the search used."
        )
    candidate = dataclasses.replace(candidate, params=dict(evaluation.params))
    return Rebuilt(run=run, number=which, evaluation=evaluation, space=space, candidate=candidate, images=data)


def parse_trial(text: str) -> tuple[str, int | Literal["best"]] | None:
    """The run and the number of a trial given as ``RUN:NUMBER`` or ``RUN:best``; None for a text without a colon and for a folder.

    Raises:
        UsageError: what stands after the colon is neither.

    >>> parse_trial("runs/demo:best"), parse_trial("demo:12"), parse_trial("resnet18")
    (('runs/demo', 'best'), ('demo', 12), None)
    """
    place, colon, which = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return None
    if which != "best" and not which.isdecimal():
        raise UsageError(f"a trial is given as RUN:NUMBER or RUN:best, got {text!r}.")
    return place, "best" if which == "best" else int(which)


def _no_network(run: RunResult, number: int, evaluation: Evaluation, error: Exception) -> StudyError:
    if evaluation.status in ("infeasible", *_BROKEN):
        return StudyError(f"trial {number} of {run.config.name} ended as {evaluation.status} ({evaluation.reason}): it has no network.")
    return StudyError(f"trial {number} of {run.config.name}, {evaluation.status} in the search, gives no network now: {error}")


def _images(run: RunResult) -> ImageData:
    data = run.config.images()
    _check_shape(run, data)
    return data


def _check_shape(run: RunResult, data: ImageData) -> None:
    stored = run.study.user_attrs.get(DATA)
    if stored is not None and (stored["num_classes"], stored["in_chans"]) != (data.num_classes, data.in_chans):
        raise _other_images(run, data, data_changes(stored, data))


def _other_images(run: RunResult, data: ImageData, changes: list[str]) -> StudyError:
    text = f"the images {data.name} are not those of the search: {'; '.join(changes)}. Bring those of {run.config.data} back."
    return StudyError(text)


def retrain_trial(
    found: Rebuilt, *, epochs: int = 20, seed: int = 0, device: str = "auto", on_epoch: Callable[[int, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train a trial's architecture anew on train and validation, and evaluate it once on the test split.

    The result is kept in the run's folder (`RETRAINED`), the trained network beside it as a folder that `capnas.load_model`, ``capnas
    prune`` and the other commands take. The same study, trial, architecture, labels, epochs and seed again return the result without
    training, so that the test split is read once for each.

    Args:
        found: from `rebuild`.
        epochs: passes over the data; the other settings are those of the search.
        seed: of weights, shuffling and augmentation.
        device: see `capnas.training.TrainConfig`.
        on_epoch: called with the epoch (from 1) and its row of the curve.

    Returns:
        study, trial, hash, epochs, seed, status, reason, test_accuracy, test_loss (None unless status is "complete"), seconds, curve,
        model: the network's folder inside that of the run; None where the training did not complete or the space does not build the
        same network twice, or of an earlier result whose folder is gone (``reason`` then says so).

    Raises:
        StudyError: the images are not those of the search, or the file of earlier results is damaged.
        UsageError: the run's folder cannot be written to.
    """
    path = found.run.folder / RETRAINED
    stored = found.run.study.user_attrs.get(DATA)
    if stored is not None and (changes := data_changes(stored, found.data)):
        raise _other_images(found.run, found.data, changes)
    candidate = found.candidate
    key = {"study": found.run.config.name, "trial": found.number, "hash": candidate.hash, "epochs": epochs, "seed": seed}
    sizes = {"test_images": found.data.sizes["test"], "n_params": candidate.n_params, "macs": candidate.macs}
    same = key | sizes | {"labels": found.data.digest.get("labels")}
    if (record := _find(read_retrained(found.run), same)) is not None:
        return _with_network(record, found.run.folder)
    check_folder(found.run.folder)

    def tell(epoch: int, row: dict[str, Any], profile: Profile | None) -> None:
        if on_epoch is not None:
            on_epoch(epoch, row)

    config = dataclasses.replace(found.run.config.training(), epochs=epochs, seed=seed, device=device)
    model = found.model(seed)
    result, test = retrain(model, found.data, config, image_size=found.candidate.image_size, on_epoch=tell)
    place, reason, known = None, result.reason, read_retrained(found.run)  # again: another process may have added to them meanwhile
    if (record := _find(known, same)) is not None:
        return _with_network(record, found.run.folder)
    if result.status == "complete":
        others = {r.get("model") for r in known}  # of another study or of a trial that was another architecture then: theirs stay
        name = f"retrained/trial-{found.number}-epochs-{epochs}-seed-{seed}"
        folder = next(n for i in itertools.count(1) if (n := f"{name}-{i}" if i > 1 else name) not in others)
        extra = {"target": f"trial {found.number} of {key['study']}", "data": data_record(found.data), "trained": True, "retrained": key}
        extra["inputs"] = input_record(found.data, found.candidate.image_size)
        try:
            save_model(model.cpu(), found.run.folder / folder, found.recipe, extra=extra, force=True)
            place = folder
        except (UsageError, OSError) as error:  # the test split has been read: what it said is kept
            reason = f"the trained network is not kept: {one_line(error)}"
    record = key | {
        "labels": same["labels"],
        "status": result.status,
        "reason": reason,
        "test_accuracy": test.get("accuracy"),
        "test_loss": test.get("loss"),
        **sizes,
        "seconds": round(result.seconds, 2),
        "device": result.device,
        "model": place,
        "curve": list(result.curve),
    }
    with locked(path):
        write_whole(path, json_text([*read_retrained(found.run), record]))
    return record


def _find(known: list[dict[str, Any]], same: dict[str, Any]) -> dict[str, Any] | None:
    """The first complete retraining of what is asked for; older ones know neither study, hash nor labels: the sizes tell."""
    complete = (record for record in known if record["status"] == "complete")
    return next((r for r in complete if all(r.get(name, value) == value for name, value in same.items())), None)


def _with_network(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A stored result, its network only where that is still there."""
    place = record.get("model")
    if place is None or (folder / place / MANIFEST).is_file():
        return record
    advice = "bring it back, or retrain with another seed"
    return record | {"model": None, "reason": f"the trained network is gone: {folder / place} holds no {MANIFEST}; {advice}."}


def read_retrained(run: RunResult) -> list[dict[str, Any]]:
    """The retrained architectures of a run, oldest first.

    Raises:
        StudyError: the file is damaged.
    """
    path = run.folder / RETRAINED
    if not path.is_file():
        return []
    expected = "a list of results as objects"
    records: list[Any] = read_json(path, expected, StudyError, list) if path.stat().st_size else []  # while the first is being written
    if not all(isinstance(record, dict) for record in records):
        raise StudyError(f"{path} holds a list of something else; expected {expected}.")
    return records
