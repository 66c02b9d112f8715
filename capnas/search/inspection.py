"""A network layer by layer, with costs beside measurements: a timm model, a trial of a run, or a model that capnas saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from capnas._timm import import_timm
from capnas.candidates import cost_of
from capnas.data import ImageData
from capnas.devices import resolve_device
from capnas.errors import StudyError, UsageError, check_name, check_names, counted, described, one_line
from capnas.measures.saturation import check_threshold
from capnas.profile import INITIALIZATIONS, MEASURES, Profile, at_default_initialization, enrich, profile_model, with_macs
from capnas.projection import ProjectionResult, project_model
from capnas.recording import Reading
from capnas.scoring import score
from capnas.search.runs import open_run
from capnas.search.target import Target, open_target
from capnas.search.trials import Rebuilt, parse_trial, rebuild
from capnas.size_survey import trace_size
from capnas.training import evaluate, train
from capnas.weights import InitialWeights

DEFAULT = ("saturation", "structure")  # what a forward pass and the graph tell, and a stored profile without training again
_CALIBRATION = 2048  # training images that give the eigenspaces of a projection

Tell = Callable[[int, dict[str, Any]], None]


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
        projection: accuracy on the eigenspaces, where asked for.
        more: what would give the layers more samples, for people.
    """

    name: str
    state: str
    profile: Profile
    macs: dict[str, int]
    n_params: int
    total_macs: int
    image_size: int
    in_chans: int
    projection: ProjectionResult | None = None
    more: str = "a larger --batch"

    @property
    def left_out(self) -> tuple[str, ...]:
        """Measures that the profile does not hold."""
        return tuple(name for name in MEASURES if name not in self.profile.measures)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the profile's, with ``macs`` in each row, and the scores."""
        profile = self.profile.to_dict()
        for row in (*profile["layers"], *profile["blocks"]):
            row["macs"] = self.macs.get(row["name"])
        scores = {name: value if value == value else None for name, value in score(self.profile).items()}
        head = {name: getattr(self, name) for name in ("name", "state", "n_params", "image_size", "in_chans", "left_out")}
        projection = None if self.projection is None else asdict(self.projection) | {"lost": self.projection.lost}
        return head | {"macs": self.total_macs, "scores": scores, "projection": projection, "profile": profile}


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A model in one state and what is known of it."""

    model: nn.Module
    name: str
    state: str
    data: ImageData
    image_size: int
    trained: bool
    profile: Profile | None = None
    start: InitialWeights | None = None
    blocks: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """How a network shall be read."""

    measures: tuple[str, ...]
    mode: Literal["train", "eval"] | None
    threshold: float
    reading: Reading
    blocks: str | None

    def is_held_by(self, profile: Profile) -> bool:
        """Whether a profile that a training left behind, which reads layers and blocks, was read so."""
        return self.mode in (None, profile.mode) and self.threshold == profile.threshold

    def part_of(self, profile: Profile) -> Profile:
        """The rows of such a profile that are asked for."""
        return replace(profile, layers=profile.layers * (self.reading != "blocks"), blocks=profile.blocks * (self.reading != "modules"))


def inspect_target(
    target: str,
    *,
    data: str | None = None,
    image_size: int | None = None,
    batch: int = 256,
    mode: Literal["train", "eval"] | None = None,
    threshold: float = 0.99,
    reading: Reading = "both",
    measures: Sequence[str] = DEFAULT,
    blocks: str | None = None,
    initial: bool = False,
    weights: str | Path | None = None,
    pretrained: bool = False,
    project: float | None = None,
    seed: int = 0,
    device: str = "auto",
    tell: Tell | None = None,
) -> Inspection:
    """Profile a timm model, a saved model or a trial; a trial's profile after training is the stored one where that is enough.

    A search keeps no weights. What needs those of a trial (norms, capacity, proxies, other blocks, another threshold or mode, a
    projection) trains it again as the search did.

    Args:
        target: a name that ``timm.create_model`` takes, ``RUN:NUMBER`` or ``RUN:best``, or the folder of a saved model.
        data: images for a timm or saved model, see `capnas.load_data`. A trial uses its run's.
        image_size: pixels, where not the data's; a trained trial is read at the size that it was trained at.
        batch: images; a profile that a training left behind is of the validation images.
        mode: "train" or "eval"; by default "eval" where the weights are trained.
        threshold: of the intrinsic dimension.
        reading: "modules", "blocks" or "both".
        measures: any of `capnas.profile.MEASURES`; saturation always.
        blocks: regular expression of the units to read as blocks, see `capnas.layers.find_blocks`; by default a trial's are its run's.
        initial: profile a trial's network before training instead.
        weights: a file for a timm model, see `load_weights`.
        pretrained: of a timm model, its own weights, see `capnas.search.target.open_target`.
        project: the share of variance of the eigenspaces that every layer but the head is projected on, in (0, 1].
        seed: of the weights and the choice of images.
        device: "auto", "cpu", "cuda", ...
        tell: called with the epoch and its row of the curve while a trial is trained again.

    Raises:
        UsageError: the target is none of these, a measure is unknown, no block has such a name, weights are missing or do not fit, or a
            trained trial is asked for at another size.
        StudyError: the run has no such trial, or the trial was never trained.
    """
    if batch < 1:
        raise UsageError(f"batch must be at least 1, got {batch}.")
    check_names("measures", measures, MEASURES)
    check_name("reading", reading, ("modules", "blocks", "both"))
    check_name("mode", mode or "eval", ("train", "eval"))
    check_threshold(threshold)
    if batch < 2 and "capacity" in measures:
        raise UsageError(f"batch must be at least 2 for capacity, got {batch}.")
    if project is not None and not 0 < project <= 1:
        raise UsageError(f"project must be a share of the variance in (0, 1], got {project}.")
    chosen = tuple(name for name in MEASURES if name in {"saturation", *measures})
    asked = _Asked(measures=chosen, mode=mode, threshold=threshold, reading=reading, blocks=blocks)
    trial = parse_trial(target)
    if trial is None:
        found = _model(target, data, image_size, weights, pretrained, seed)
        if initial and found.trained:
            raise UsageError(f"initial is for a trial of a run, and {found.name} has {found.state}: leave it out, or the weights.")
    elif data is not None or weights is not None or pretrained:
        text = "a trial uses the images of its run and weights trained as the search did: leave out data, weights and pretrained."
        raise UsageError(text)
    elif initial:
        found = _untrained(rebuild(open_run(trial[0]), trial[1]), image_size, seed)
    else:
        found = _trained(rebuild(open_run(trial[0]), trial[1]), asked, image_size, project is not None, device, tell)
    if project is not None and not found.trained:
        advice = "give a timm model its weights with --pretrained or --weights FILE.safetensors" if trial is None else "leave out --initial"
        raise UsageError(f"a projection says what a trained network loses, and {found.name} is not trained: {advice}.")
    where = resolve_device(device)
    model, size = found.model.to(where), found.image_size
    graph = trace_size(model, found.data.in_chans, size)
    x, y = found.data.probe(batch, seed=seed, device=where, image_size=size)
    profile, state = found.profile, found.state
    more = "a larger --batch" if len(x) == batch else "more images"
    if profile is not None and found.trained:
        more = "a search with more validation images"
    elif profile is None:
        using: Literal["train", "eval"] = mode or ("eval" if found.trained else "train")
        copies = 0 if found.trained else INITIALIZATIONS  # as a search measures its candidates
        profile = profile_model(
            model, x, y, threshold=threshold, reading=reading, blocks=blocks or found.blocks, mode=using, initialize=copies, seed=seed
        )  # fmt: skip
        if copies:
            model = at_default_initialization(model, seed=seed)
            state = f"{state} at torch's default initialization, saturations the mean of {copies} draws of its weights"
        state = f"{state}, {len(x)} images of {found.data.name}"
    exact = None if trial is None else False  # a trial's scores compare with those of its run
    profile = enrich(profile, model, x, y, measures=chosen, graph=graph, exact_capacity=exact, seed=seed, start=found.start)
    costed = with_macs(profile, graph)  # a stored profile may hold none
    cost = cost_of(model, graph)
    return Inspection(
        name=found.name,
        state=state,
        profile=profile,
        macs={row.name: row.macs or 0 for row in (*costed.layers, *costed.blocks)},
        n_params=cost.params,
        total_macs=cost.macs,
        image_size=size,
        in_chans=found.data.in_chans,
        projection=None if project is None else _project(model, found.data, project, size, seed, device),
        more=more,
    )


def _untrained(trial: Rebuilt, image_size: int | None, seed: int) -> _Network:
    """The trial's network before training, in any size."""
    return _Network(
        model=trial.model(seed), name=_named(trial), state="before training", data=trial.data,
        image_size=image_size or trial.candidate.image_size, trained=False, blocks=trial.run.config.blocks,
    )  # fmt: skip


def _trained(trial: Rebuilt, asked: _Asked, image_size: int | None, weights: bool, device: str, tell: Tell | None) -> _Network:
    """The trial's network as the search left it: its stored profile where that is what was asked for, else trained again."""
    size, stored = trial.candidate.image_size, trial.evaluation.profile
    if image_size not in (None, size):
        raise UsageError(f"{_named(trial)} was trained at {size} px and is read so; --initial profiles its network at {image_size}.")
    weights = weights or asked.blocks is not None or bool(set(asked.measures) - set(DEFAULT))
    enough = not weights and (stored is None or asked.is_held_by(stored))
    return _stored(trial, asked) if enough else _train_again(trial, asked, device, tell)


def _stored(trial: Rebuilt, asked: _Asked) -> _Network:
    """The trial's profile as the search left it; the model has the weights that the search started from."""
    epochs, profile = _epochs(trial), trial.evaluation.profile
    return _Network(
        model=trial.model(), name=_named(trial), state=f"after {counted(epochs, 'epoch')} of the search" if epochs else "before training",
        data=trial.data, image_size=trial.candidate.image_size, trained=epochs > 0, profile=profile and asked.part_of(profile),
    )  # fmt: skip


def _train_again(trial: Rebuilt, asked: _Asked, device: str, tell: Tell | None) -> _Network:
    """The trial's network after the training that the search gave it: the same weights on the same machine, none were kept."""
    epochs, name = _epochs(trial), _named(trial)
    if epochs == 0:
        raise StudyError(f"{name} was never trained in the search; --initial profiles its network before training.")
    model = trial.model()
    start = InitialWeights.of(model)

    def stop(epoch: int, row: dict[str, Any], profile: Profile | None) -> str | None:
        if tell is not None:
            tell(epoch, row)
        return "as far as the search went" if epoch == epochs else None

    config = trial.run.config.training()
    config = replace(config, device=device, blocks=asked.blocks or config.blocks, record=True)
    result = train(model, trial.data, config, image_size=trial.candidate.image_size, on_epoch=stop)
    if result.profile is None or len(result.curve) < epochs:
        raise StudyError(f"training {name} again ended as {result.status}: {result.reason}.")
    where = torch.device(result.device)
    start = InitialWeights(weights={n: w.to(where) for n, w in start.weights.items()})
    profile = result.profile if asked.is_held_by(result.profile) else None
    return _Network(
        model=model, name=name, state=f"trained again for {counted(epochs, 'epoch')} as in the search", data=trial.data,
        image_size=trial.candidate.image_size, trained=True, profile=profile, start=start, blocks=config.blocks,
    )  # fmt: skip


def _epochs(trial: Rebuilt) -> int:
    """How many the search trained it for."""
    if trial.evaluation.profile is None:
        reason = f"it ended as {trial.evaluation.status}"
        raise StudyError(f"{_named(trial)} stored no profile ({reason}); --initial profiles its network before training.")
    return len(trial.evaluation.curve)


def _named(trial: Rebuilt) -> str:
    return f"trial {trial.number} of {trial.run.config.name}"


def _model(target: str, data: str | None, image_size: int | None, weights: str | Path | None, pretrained: bool, seed: int) -> _Network:
    found = open_target(target, data=data, image_size=image_size, pretrained=pretrained)
    model, trained = found.build(seed), found.trained or pretrained
    state = "weights trained on train and validation" if found.saw_validation else "trained weights" if trained else "before training"
    if pretrained:
        state = "timm's weights" + ("" if found.trained else ", the head fresh")
    if weights is not None:
        load_weights(model, found, weights)
        state, trained = f"weights of {Path(weights).name}", True
    return _Network(model=model, name=found.name, state=state, data=found.data, image_size=found.image_size, trained=trained)


def load_weights(model: nn.Module, found: Target, weights: str | Path) -> None:
    """Put trained weights into a timm model, in place.

    Args:
        model: built by the target.
        found: a timm model given by its name.
        weights: a safetensors file of its state dict, or a checkpoint as timm's training and ``torch.save`` write them.

    Raises:
        UsageError: the target has weights of its own or is no timm model, or the file cannot be read or does not fit.
    """
    path, name = Path(weights), found.name
    if "timm" not in found.recipe or found.trained or found.pretrained:
        raise UsageError("weights are for a timm model given by its name, without pretrained; a saved model has its own.")
    state = _read_weights(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        images, first = found.data, one_line(error, 300)
        shape = f"classes: {images.num_classes}, channels: {images.in_chans}"
        wanted = f"give a model of their architecture, and the images of these weights as --data: {first}"
        says = f"the weights in {path} do not fit {name} for {images.name} ({shape}); {wanted}."
        raise UsageError(says) from None


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, without what DataParallel and torch.compile add to its names; of two in a checkpoint, the averaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    models = import_timm("timm.models")
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        with contextlib.suppress(SafetensorError):  # under any name
            return models.clean_state_dict(load_file(str(path)))
        return models.load_state_dict(str(path), weights_only=True)  # which runs no code of the file
    except Exception as error:  # of pickle, of torch, of a file that holds something else
        how = "safetensors.torch.save_file(model.state_dict(), FILE) writes one"
        what = "weights must be a safetensors file, or a checkpoint of tensors and plain values"
        raise UsageError(f"{what}; {path} cannot be read: {described(error, 300)}; {how}.") from None


def _project(model: nn.Module, data: ImageData, share: float, size: int, seed: int, device: str) -> ProjectionResult:
    """On the validation split, with eigenspaces of training images."""
    x, _ = data.probe(_CALIBRATION, seed=seed, device=resolve_device(device), image_size=size)

    def accuracy(network: nn.Module) -> float:
        return evaluate(network, data, "validation", amp="off", channels_last="off", image_size=size)["accuracy"]

    return project_model(model, x.split(256), accuracy, threshold=share, seed=seed)
