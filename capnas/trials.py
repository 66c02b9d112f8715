"""One trial of a run: find it, build its model again, write it as a script, profile it, train it to the end.

Everything here starts from stored trials. Nothing but `retrain_trial` trains, and nothing but `retrain_trial` reads the test split.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from torch import nn

from capnas._timm import import_timm
from capnas.candidates import Candidate, LayerCost, build_candidate, build_model, count_cost
from capnas.data import ImageData, load_data
from capnas.devices import resolve_device
from capnas.errors import StudyError, UsageError
from capnas.evaluation import Evaluation
from capnas.profile import LayerProfile, Profile, profile_model
from capnas.recording import Reading
from capnas.runs import RunResult, open_run
from capnas.scoring import score
from capnas.spaces import load_space
from capnas.standalone import standalone_script
from capnas.training import retrain

RETRAINED = "retrained.json"


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """A trial and all that is needed to build its model.

    Attributes:
        run: the run it belongs to.
        number: of the trial.
        evaluation: what the search found out.
        space: the search space.
        data: the images.
        candidate: the architecture, on the meta device.
    """

    run: RunResult
    number: int
    evaluation: Evaluation
    space: Callable[..., Any]
    data: ImageData
    candidate: Candidate

    @property
    def shape(self) -> dict[str, int]:
        """Sizes that the space takes: num_classes, in_chans, image_size."""
        return {name: getattr(self.candidate, name) for name in ("num_classes", "in_chans", "image_size")}

    def model(self, seed: int | None = None) -> nn.Module:
        """The model with the weights that the search started from, or those of another seed."""
        start = (self.evaluation.seed or 0) if seed is None else seed
        return build_model(self.space, self.candidate.params, **self.shape, seed=start)

    def script(self) -> str:
        """Python source that builds the model with timm and torch alone, see `capnas.standalone.standalone_script`."""
        title = f"Trial {self.number} of the study {self.run.config.name}, found by capnas."
    XX

    def summary(self) -> dict[str, Any]:
        """Number, status, values, parameters and metrics in plain JSON types."""
        stored = self.evaluation.to_dict()
        return {"study": self.run.config.name, "trial": self.number} | {
            name: stored[name] for name in ("status", "values", "params", "metrics", "n_params", "macs", "image_size", "hash", "seconds")
        }


def rebuild(run: RunResult, which: int | Literal["best"] = "best", *, data: ImageData | None = None) -> Rebuilt:
    """A trial's architecture, checked against the hash that the search stored.

    Args:
        run: from `capnas.search.open_run`.
        which: the trial's number, or the best (of several values: the first one's best).
        data: the run's images, where they are loaded already.

    Raises:
        StudyError: no such trial, none with a value, or the space builds another architecture now than it did in the search.
    """
    if which == "best":
        best = run.best
        if best is None:
            raise StudyError(f"the study {run.config.name} has no trial with a value yet; see why with capnas report {run.folder}.")
        which = best.number
    evaluation = run.evaluation(which)
    space = load_space(run.config.space)
    data = data or load_data(run.config.data, **{"seed": run.config.seed} | dict(run.config.data_options))
    candidate = build_candidate(
        space,
        optuna.trial.FixedTrial(dict(evaluation.params)),
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        image_size=evaluation.image_size or data.image_size,
    )
    if evaluation.hash is not None and candidate.hash != evaluation.hash:
        raise StudyError(
            f"the space {run.config.space} has changed since the search: it builds another architecture for trial {which}. "
            "Use the version of the space that the search used."
        )
    candidate = dataclasses.replace(candidate, params=dict(evaluation.params))
    return Rebuilt(run=run, number=which, evaluation=evaluation, space=space, data=data, candidate=candidate)


def retrain_trial(
    found: Rebuilt, *, epochs: int = 20, seed: int = 0, device: str = "auto", on_epoch: Callable[[int, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Train a trial's architecture anew on train and validation, and evaluate it once on the test split.

    The result is kept in the run's folder (`RETRAINED`); the same trial, epochs and seed again return it without training, so that the
    test split is read once for each.

    Args:
        found: from `rebuild`.
        epochs: passes over the data; the other settings are those of the search.
        seed: of weights, shuffling and augmentation.
        device: see `capnas.training.TrainConfig`.
        on_epoch: called with the epoch (from 1) and its row of the curve.

    Returns:
        trial, epochs, seed, status, reason, test_accuracy, test_loss (None unless status is "complete"), seconds, curve.
    """
    path = found.run.folder / RETRAINED
    known = read_retrained(found.run)
    key = {"trial": found.number, "epochs": epochs, "seed": seed}
    for record in known:
        if key.items() <= record.items() and record["status"] == "complete":
            return record

    def tell(epoch: int, row: dict[str, Any], profile: Profile | None) -> None:
        if on_epoch is not None:
            on_epoch(epoch, row)

    config = dataclasses.replace(found.run.config.training(), epochs=epochs, seed=seed, device=device)
    result, test = retrain(found.model(seed), found.data, config, image_size=found.candidate.image_size, on_epoch=tell)
    record = key | {
        "status": result.status,
        "reason": result.reason,
        "test_accuracy": test.get("accuracy"),
        "test_loss": test.get("loss"),
        "test_images": found.data.sizes["test"],
        "n_params": found.candidate.n_params,
        "macs": found.candidate.macs,
        "seconds": round(result.seconds, 2),
        "device": result.device,
        "curve": list(result.curve),
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps([*known, record], indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
    return record


def read_retrained(run: RunResult) -> list[dict[str, Any]]:
    """The retrained architectures of a run, oldest first.

    Raises:
        StudyError: the file is damaged.
    """
    path = run.folder / RETRAINED
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} cannot be read: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A profile with the cost of each of its rows.

    Attributes:
        name: of the model or trial.
        state: in which state it was profiled.
        profile: the profile.
        macs: multiply-accumulates per row: of the layer, or of everything inside a block.
        n_params, total_macs: of the whole network, for one image.
        image_size, in_chans: of the images.
    """

    name: str
    state: str
    profile: Profile
    macs: dict[str, int]
    n_params: int
    total_macs: int
    image_size: int
    in_chans: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the profile's, with ``macs`` in each row, and the scores."""
        profile = self.profile.to_dict()
        for row in (*profile["layers"], *profile["blocks"]):
            row["macs"] = self.macs.get(row["name"])
        scores = {name: value if value == value else None for name, value in score(self.profile).items()}
        head = {name: getattr(self, name) for name in ("name", "state", "n_params", "image_size", "in_chans")}
        return head | {"macs": self.total_macs, "scores": scores, "profile": profile}


def inspect_target(
    target: str,
    *,
    data: str | None = None,
    image_size: int | None = None,
    batch: int = 256,
    mode: Literal["train", "eval"] = "train",
    threshold: float = 0.99,
    reading: Reading = "both",
    initial: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> Inspection:
    """Profile a timm model before training, or show the stored profile of a trial.

    Args:
        target: a name that ``timm.create_model`` takes, or ``RUN:NUMBER`` or ``RUN:best``.
        data: images for a timm model, see `capnas.load_data`; the embedded set by default. A trial uses its run's.
        image_size: pixels, where not the data's.
        batch: images.
        mode: "train" or "eval".
        threshold: of the intrinsic dimension.
        reading: "modules", "blocks" or "both".
        initial: profile a trial's network before training instead of showing what was stored.
        seed: of the weights and the choice of images.
        device: "auto", "cpu", "cuda", ...

    Raises:
        UsageError: the target is neither.
        StudyError: the run has no such trial, or the trial stored no profile.
    """
    if batch < 1:
        raise UsageError(f"batch must be at least 1, got {batch}.")
    place, colon, which = target.rpartition(":")
    if colon:
        if which != "best" and not which.isdigit():
            raise UsageError(f"a trial is given as RUN:NUMBER or RUN:best, got {target!r}.")
        found = rebuild(open_run(place), "best" if which == "best" else int(which))
        model, images, size = found.model(seed if initial else None), found.data, image_size or found.candidate.image_size
        name = f"trial {found.number} of {found.run.config.name}"
        if not initial:
            if found.evaluation.profile is None:
                reason = f"it ended as {found.evaluation.status}"
                raise StudyError(f"{name} stored no profile ({reason}); --initial profiles its network before training.")
            trained = f"after {len(found.evaluation.curve)} epochs of the search" if found.evaluation.curve else "before training"
            return _inspection(model, name, trained, found.evaluation.profile, found.data.in_chans, found.candidate.image_size)
    else:
        images = load_data(data or "fashion-mnist-12k", **({} if image_size is None else {"image_size": image_size}))
        size, name = image_size or images.image_size, target
        model = _timm_model(target, images, size, seed)
    where = resolve_device(device)
    x, y = images.probe(batch, seed=seed, device=where, image_size=size)
    profile = profile_model(model.to(where), x, y, threshold=threshold, reading=reading, mode=mode, seed=seed)
    return _inspection(model, name, f"before training, {len(x)} images of {images.name}", profile, images.in_chans, size)


def _inspection(model: nn.Module, name: str, state: str, profile: Profile, in_chans: int, image_size: int) -> Inspection:
    cost = count_cost(model, (1, in_chans, image_size, image_size))
    macs = {row.name: _macs(row, cost.layers) for row in (*profile.layers, *profile.blocks)}
    return Inspection(
        name=name,
        state=state,
        profile=profile,
        macs=macs,
        n_params=cost.params,
        total_macs=cost.macs,
        image_size=image_size,
        in_chans=in_chans,
    )


def _macs(row: LayerProfile, layers: dict[str, LayerCost]) -> int:
    inside = [name for name in layers if name == row.name or (row.reading == "blocks" and name.startswith(row.name + "."))]
    return sum(layers[name].macs for name in inside)


def _timm_model(name: str, data: ImageData, image_size: int, seed: int) -> nn.Module:
    import torch

    timm = import_timm()
    if not timm.is_model(name):
        raise UsageError(f"there is no timm model {name!r}{_near(name, timm.list_models())} A trial is given as RUN:NUMBER.")
    fixed = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=data.num_classes, in_chans=data.in_chans, **({"img_size": image_size} if fixed else {}))


def _near(name: str, known: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else "."
