"""Open a study to run it: created or resumed, refused where its folder, its settings or its images are not those that it began with."""

from __future__ import annotations

import contextlib
import csv
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from capnas.candidates import Infeasible, build_candidate
from capnas.data import DataSpec, ImageData
from capnas.data.digest import digest_changes
from capnas.devices import resolve_device
from capnas.documents import plain
from capnas.errors import SpaceError, StudyError
from capnas.objective import Objective
from capnas.objective.claims import at_work, own_claim
from capnas.objective.evaluation import stored_with
from capnas.scoring import CAPACITY_WEIGHTS
from capnas.search.config import StudyConfig
from capnas.search.enqueuing import begun
from capnas.search.runs import count_finished, is_settled, open_run
from capnas.search.samplers import make_pruner
from capnas.search.storages import find_study, hide_password, open_storage
from capnas.spaces import space_name

ATTRIBUTE = "capnas:config"  # keys of the study's user attributes
SCORE = "capnas:capacity_score"  # the weights of its terms
DATA = "capnas:data"  # see data_facts
TIMED = "capnas:latency_device"  # the type of device on which latencies are measured
OPENER = "capnas:opener"  # claim of the process that opened it before its first trial


def check_folder(config: StudyConfig) -> None:
    """Look at a run's folder before anything in it is replaced.

    Raises:
        StudyError: it is that of the images or inside it, it holds another study, or its trials are lost and only their table is left.
    """
    folder = config.folder
    check_outside(folder, config.to_dict()["data"])
    if (folder / "study.toml").is_file():
        held = StudyConfig.from_toml((folder / "study.toml").read_text(encoding="utf-8", errors="replace"), out=str(folder)).to_dict()
        changes = {k: c for k, c in config.differences(held).items() if k in ("study", "storage", "space", "data")}
        if {"study", "storage"} & set(changes):
            advice = "Give another --out, or another --study without --out: its folder is then runs/STUDY."
            raise StudyError(f"{folder} holds another study: {'; '.join(changes.values())}. {advice}")
    rows = _finished_rows(folder / "trials.csv")
    if rows and not _n_stored(config):
        where = hide_password(config.storage) or folder / "journal.log"
        advice = "A new study would replace the table: bring them back to where they were, or give another --out."
        raise StudyError(f"{folder / 'trials.csv'} lists {rows} finished trials, but {where} holds none. {advice}")


def check_outside(folder: Path, source: object) -> None:
    """Refuse to put results among the images, which could then not be read any more.

    Args:
        folder: of the results.
        source: of the images, absolute where it is a folder.

    Raises:
        StudyError: the folder is that of the images or inside it.

    >>> check_outside(Path("runs/mine"), "fashion-mnist-12k")
    """
    images = Path(str(source))
    if images.is_absolute() and folder.resolve().is_relative_to(images.resolve()):
        raise StudyError(f"{folder} lies in the folder of the images, {images}, where it would be read as one of them: give another --out.")


def stored_config(run: str, storage: str | None = None) -> StudyConfig:
    """The settings of a study that somebody started.

    Args:
        run: its folder; with a storage, its name.
        storage: Optuna storage URL that holds it, where there is no folder here.

    Raises:
        StudyError: no such study is there, or the storage cannot be opened.
    """
    if storage is None:
        return open_run(run).config
    study = find_study(run, storage, Path())
    stored = None if study is None else study.user_attrs.get(ATTRIBUTE)
    if stored is None:
        raise StudyError(f"the storage holds no study of capnas named {run}; start it with capnas search --storage.")
    return replace(StudyConfig.from_dict(stored), storage=storage)


def discard(folder: Path, *, whole: bool) -> None:
    """Take back the files of a study that ended before its first trial, and the folder as well where it was made for them.

    To be asked only where no other process has opened the study.
    """
    with contextlib.suppress(OSError):
        for name in ("study.toml", "journal.log"):
            (folder / name).unlink(missing_ok=True)
        if whole:
            folder.rmdir()


def open_study(config: StudyConfig) -> optuna.Study:
    """The study, created or resumed.

    Raises:
        StudyError: it exists with other settings, also as another process begins it, or its storage does not answer.
    """
    storage = open_storage(config.storage, config.folder)
    study = _create(config, storage)
    stored, empty = study.user_attrs.get(ATTRIBUTE), not begun(study)
    foreign = [d.name.lower() for d in study.directions] != config.directions
    if stored is None and (foreign or not empty):
        raise StudyError(f"the storage holds a study named {config.name} that is not of capnas; choose another name.")
    if stored is not None and (conflicts := config.conflicts(stored)):
        if not empty:
            advice = "Choose another name or folder, or repeat the settings that it has to resume it."
            raise StudyError(f"the study {config.name} exists with other settings: {'; '.join(conflicts)}. {advice}")
        if not opened_here(study) and at_work(study.user_attrs[OPENER]):
            raise StudyError(_begun_by_another(config, conflicts))
        optuna.delete_study(study_name=config.name, storage=storage)  # it failed before its first trial: nothing is lost
        study, stored = _create(config, storage), None
    if empty:
        study.set_user_attr(SCORE, dict(CAPACITY_WEIGHTS))
    elif config.rates_capacity and study.user_attrs.get(SCORE) != dict(CAPACITY_WEIGHTS) and count_finished(study) < config.trials:
        advice = "Choose another name or folder, or go on with the version of capnas that began it (environment.json)."
        raise StudyError(f"the study {config.name} has another definition of capacity_score: new trials would not be comparable. {advice}")
    if empty and ((opener := study.user_attrs.get(OPENER)) is None or not at_work(opener)):
        study.set_user_attr(OPENER, own_claim())
    if stored is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(config.values))
    if stored != config.to_dict():  # last: where a signal came before it, the rest is written anew
        study.set_user_attr(ATTRIBUTE, config.to_dict())
    return study


def opened_here(study: optuna.Study) -> bool:
    """Whether no other process opened a study without trials before this one did."""
    return study.user_attrs.get(OPENER, own_claim()) == own_claim()


def check_settings(study: optuna.Study, config: StudyConfig) -> None:
    """Look at the settings again before the first trial of a session: of two processes that began a study at once, one wrote them last.

    Raises:
        StudyError: they are not those of this session.
    """
    if conflicts := config.conflicts(study.user_attrs[ATTRIBUTE]):
        raise StudyError(_begun_by_another(config, conflicts))


def _begun_by_another(config: StudyConfig, conflicts: list[str]) -> str:
    what = f"another process is beginning the study {config.name} with other settings"
    return f"{what}: {'; '.join(conflicts)}. Choose another name or folder."


def data_facts(data: ImageData) -> dict[str, Any]:
    """What the architectures and the numbers of a study's trials depend on, in JSON values."""
    return {name: getattr(data, name) for name in ("name", "num_classes", "in_chans", "image_size", "sizes", "digest", "guess")}


def data_changes(stored: Mapping[str, Any], data: ImageData) -> list[str]:
    """How images differ from those of which `data_facts` were stored."""
    facts = {name: value for name, value in data_facts(data).items() if name not in ("digest", "guess")}
    changes = [f"{name} was {stored.get(name)}, now {value}" for name, value in facts.items() if stored.get(name) != value]
    return changes or digest_changes(stored.get("digest") or {}, data.digest)  # older studies have no digest, and no guess


def check_data(study: optuna.Study, objective: Objective) -> None:
    """Compare the images with those of the study's earlier trials; of the first trial's, keep what there is to compare.

    Raises:
        StudyError: they have changed.
    """
    stored, trials = study.user_attrs.get(DATA), [t for t in study.get_trials(deepcopy=False) if is_settled(t)]
    if stored is not None and trials:
        if changed := data_changes(stored, objective.data):
            advice = "New trials would not be comparable: restore the images, or give another --study."
            raise StudyError(
                f"the images {objective.data.name} have changed since the study {study.study_name} began: {'; '.join(changed)}. {advice}"
            )
        if "digest" not in stored:
            study.set_user_attr(DATA, data_facts(objective.data))
    elif not trials or any(stored_with(t).get("settings") == objective.settings for t in trials):
        study.set_user_attr(DATA, data_facts(objective.data))  # else of a study from before this was kept: nobody knows its images


def check_device(study: optuna.Study, objective: Objective) -> None:
    """Where latency is measured, compare the type of the device with that of the study's earlier trials; of the first one's, keep it.

    Raises:
        StudyError: it is another one.
    """
    if not objective.times:
        return
    stored, here = study.user_attrs.get(TIMED), resolve_device(objective.train.device).type
    if stored not in (None, here) and begun(study):
        what = f"the study {study.study_name} measured latency on {stored}, and this session would on {here}"
        raise StudyError(f"{what}. They do not compare: give --device {stored}, or another --study.")
    if stored != here:
        study.set_user_attr(TIMED, here)


def check_architectures(study: optuna.Study, objective: Objective) -> None:
    """Compare what the space builds for the last complete trial with what it was, before a session adds trials.

    Raises:
        StudyError: the space has changed.
    """
    complete = (t for t in reversed(study.get_trials(deepcopy=False)) if t.state == TrialState.COMPLETE)
    trial, known = next(((t, s) for t in complete if (s := stored_with(t)).get("hash")), (None, {}))
    if trial is None:
        return
    shape = objective.data.shape(known.get("image_size"))
    try:
        built = build_candidate(objective.space, optuna.trial.FixedTrial(dict(known["params"])), **shape).hash
    except (Infeasible, SpaceError):
        built = None
    if built != known["hash"]:
        what = "no network" if built is None else "another architecture"
        raise StudyError(
            f"the space {space_name(objective.space)} has changed since the study {study.study_name} began: it builds {what} for trial "
            f"{trial.number}. New trials would not be comparable: restore the space, or give another --study."
        )


def _create(config: StudyConfig, storage: Any) -> optuna.Study:
    return optuna.create_study(
        study_name=config.name,
        storage=storage,
        directions=config.directions,
        sampler=optuna.samplers.RandomSampler(seed=config.seed),
        pruner=make_pruner(config.pruner if len(config.values) == 1 else "off", epochs=config.epochs),
        load_if_exists=True,
    )


def _finished_rows(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:  # a table that was edited since must not stop a resume
        rows = csv.DictReader(line.replace("\0", "") for line in file)
        return sum(row.get("status") != "interrupted" for row in rows)


def _n_stored(config: StudyConfig) -> int:
    study = find_study(config.name, config.storage, config.folder)
    return 0 if study is None else len(study.get_trials(deepcopy=False))


def data_record(data: ImageData) -> dict[str, Any] | None:
    """What loads the same images again, in JSON values, for a manifest; None for images that came as arrays.

    >>> from capnas.data import load_data
    >>> data_record(load_data("fashion-mnist-12k", image_size=16))
    {'source': 'fashion-mnist-12k', 'options': {'image_size': 16}}
    """
    if data.spec.source is None:
        return None
    usual = DataSpec(source=data.spec.source)
    chosen = {f.name: getattr(data.spec, f.name) for f in fields(DataSpec) if f.name not in ("source", "augment", "workers")}
    chosen["augment"] = False if data.spec.augment is False else None  # an `Augment` cannot be told in JSON
    return {"source": str(data.spec.source), "options": {k: v for k, v in chosen.items() if v != getattr(usual, k)}}


def input_record(data: ImageData, image_size: int) -> dict[str, Any]:
    """What a network of these images takes, in JSON values, for a manifest: whoever uses it elsewhere has to prepare images alike.

    Bytes count as 0..1 for ``mean`` and ``std``, float arrays in their own units; ``class_names`` are in the order of the outputs. Where
    images were framed as `capnas.data.framing.Framing` tells, its fields but for the mean are there too.

    >>> from capnas.data import load_data
    >>> record = input_record(load_data("fashion-mnist-12k"), 32)
    >>> record["image_size"], [round(m, 2) for m in record["mean"]], record["class_names"][:2]
    (32, [0.29], ['T-shirt/top', 'Trouser'])
    """
    names = ("in_chans", "mean", "std", "class_names")
    framed = {} if data.spec.framing is None else {name: v for name, v in vars(data.spec.framing).items() if name != "mean"}
    return plain({"image_size": image_size} | {name: getattr(data, name) for name in names} | framed)
