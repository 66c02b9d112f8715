"""What a command works on: a timm model, a trial of a run, a model that capnas saved or a function, with the images that go with it."""

from __future__ import annotations

import difflib
import math
import runpy
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from capnas._timm import timm
from capnas.data import ImageData, load_data
from capnas.data.named import EMBEDDED
from capnas.devices import is_out_of_memory
from capnas.errors import StudyError, UsageError, described
from capnas.saved import MANIFEST, build_recipe, load_model, read_manifest
from capnas.search.places import absolute_images
from capnas.search.runs import open_run
from capnas.search.trials import parse_trial, read_retrained, rebuild

_SHAPE = ("num_classes", "in_chans")
_NOTHING: Mapping[str, Any] = {}
_PREPARED = ("image_size", "in_chans", "mean", "std", "crop_pct", "crop_mode", "interpolation")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A network and its images.

    Attributes:
        name: for people.
        data: the images.
        image_size: pixels at which the network is used.
        trained: whether there are trained weights: only a saved model has any, a trial keeps its architecture alone.
        recipe: JSON values from which `capnas.saved.build_recipe` builds the architecture.
        folder: of a saved model, else None.
        saw_validation: whether its weights were trained on the validation images too, as `capnas.search.trials.retrain_trial` does:
            accuracies on them are then of images that it has seen.
        retrained: of a trial, the folder of the network that `capnas.search.trials.retrain_trial` kept of it last; None without one.
        pretrained: whether it has timm's own weights. With images of other classes than theirs its head is fresh, and `trained` False.
        train: of a trial, the settings of `capnas.training.TrainConfig` that its search was given.
    """

    name: str
    data: ImageData
    image_size: int
    trained: bool
    recipe: dict[str, Any]
    folder: Path | None = None
    saw_validation: bool = False
    retrained: Path | None = None
    pretrained: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, *, image_size: int | None = None, trained: bool = True) -> nn.Module:
        """The network on the CPU: its trained weights where there are any, in eval mode; else fresh ones, in training mode.

        Args:
            seed: of fresh weights.
            image_size: pixels to build for instead of the target's: matters to networks with fixed inputs and to spaces that choose
                strides by it; a saved model keeps its modules where its trained weights are asked for or where it was narrowed.
            trained: False for fresh weights in any case. A narrowed model stays as narrow as it is.

        Raises:
            UsageError: trained weights of a network with a fixed input, or a narrowed one, are asked for at another size, or timm's cannot
                be loaded.
        """
        if self.pretrained and trained:
            return self._with_timms_weights(seed, image_size or self.image_size)
        trained = trained and self.trained and self.folder is not None
        if self.folder is None or not (trained or _narrowed(self.folder)):
            return build_recipe(self.recipe, seed=seed, image_size=image_size or self.image_size)
        size = self.recipe.get("args", {}).get("img_size")
        if size is not None and image_size not in (None, size):
            how = "trained" if trained else "narrowed"
            raise UsageError(f"{self.name} was {how} with a fixed input of {size} px, it cannot be used at {image_size} px.")
        return load_model(self.folder) if trained else _renewed(self.folder, build_recipe(self.recipe, seed=seed), seed)

    def _with_timms_weights(self, seed: int, image_size: int) -> nn.Module:
        try:
            return build_recipe(self.recipe, seed=seed, image_size=image_size, pretrained=True).eval()
        except Exception as error:  # of timm, of its hub, of the network
            how = "save them on a machine that can and give the file as weights"
            raise UsageError(f"timm's weights of {self.name} cannot be loaded: {described(error, 300)}; {how}.") from error


def _narrowed(folder: Path) -> bool:
    """Whether a saved model has other modules than its recipe builds."""
    manifest = read_manifest(folder)
    return any(manifest[part] for part in ("replaced", "attributes", "shapes"))


def _renewed(folder: Path, plain: nn.Module, seed: int) -> nn.Module:
    """A narrowed model with fresh weights, in training mode.

    What has the shape that the recipe builds gets the recipe's own fresh values. A tensor of another shape is drawn from a normal
    distribution of the same mean and spread; of a matrix or a kernel the spread follows the fan-in, so that its outputs are as large.

    Args:
        folder: of the saved model.
        plain: its recipe's model with fresh weights.
        seed: of what is drawn.
    """
    model, fresh = load_model(folder), plain.state_dict()
    replaced = tuple(f"{name}." for name in read_manifest(folder)["replaced"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for name, module in model.named_modules():
            if name.startswith(replaced):
                module.reset_parameters()  # a convolution or a linear layer
        for name, tensor in model.state_dict().items():
            old = fresh.get(name)
            if name.startswith(replaced) or not tensor.is_floating_point():
                continue
            if old is None:
                tensor.zero_()  # a bias that narrowing added
            elif old.shape == tensor.shape:
                tensor.copy_(old)
            else:
                fan = [t[0].numel() if name.endswith("weight") else 1 for t in (old, tensor)]
                tensor.normal_(float(old.double().mean()), float(old.double().std(correction=0)) * math.sqrt(fan[0] / fan[1]))
    return model.train()


def open_target(
    text: str,
    *,
    data: str | ImageData | None = None,
    image_size: int | None = None,
    data_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> Target:
    """Find out what a command shall work on.

    Args:
        text: a name that ``timm.create_model`` takes; ``RUN:NUMBER`` or ``RUN:best``, a trial of a run; or the folder of a model that
            capnas saved.
        data: images, see `capnas.load_data`, or loaded ones. Without: the run's, those the saved model was made with, or the embedded set.
            These are split as they were. Others are sized, cropped and normalized as these were told to be.
        image_size: pixels; without, the trial's or the saved model's, else the data's.
        data_options: further arguments of `capnas.load_data`.
        pretrained: with timm's own weights. Images are then prepared as in timm's evaluation of these (channels, size, crop, interpolation,
            normalization), unless said otherwise.

    Raises:
        UsageError: the text is none of these, or ``pretrained`` is asked for what is no timm model or one without weights.
        StudyError: the run or the trial is missing.
        DataError: the images cannot be read.

    >>> target = open_target("resnet10t")
    >>> target.name, target.image_size, target.trained, target.recipe["args"]
    ('resnet10t', 28, False, {'num_classes': 10, 'in_chans': 1})
    """
    options = {} if image_size is None else {"image_size": image_size}
    options |= dict(data_options or {})
    if pretrained and (Path(text).is_dir() or parse_trial(text) is not None):
        raise UsageError("pretrained is for a timm model given by its name; a trial and a saved model have weights of their own.")
    if Path(text).is_dir() and (Path(text) / MANIFEST).is_file():
        return _saved(Path(text), data, image_size, options)
    if (trial := parse_trial(text)) is not None:
        return _trial(*trial, data, image_size, options)
    if Path(text).is_dir():
        raise UsageError(f"the folder {text} holds no {MANIFEST}; a trial of a run is given as {text}:best or {text}:NUMBER.")
    return _timm(text, data, image_size, options, pretrained)


def open_network(
    text: str, *, data: str | ImageData | None = None, image_size: int | None = None, data_options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, ImageData, int, str]:
    """A network with fresh weights, for what trains it anew.

    Args:
        text: ``file.py:function``, where ``function(num_classes, in_chans, image_size)`` returns a network, or see `open_target`.
        data: see `open_target`.
        image_size: see `open_target`.
        data_options: see `open_target`.

    Returns:
        The network on the CPU, its images, their size in pixels and its name.

    Raises:
        UsageError: the file is missing, fails or has no such function; else as `open_target`.
    """
    place, _, function = (text, "", "") if text.endswith(".py") else text.rpartition(":")
    if not place.endswith(".py"):
        target = open_target(text, data=data, image_size=image_size, data_options=data_options)
        return target.build(trained=False), target.data, target.image_size, target.name
    options = ({} if image_size is None else {"image_size": image_size}) | dict(data_options or {})
    if isinstance(data, str):
        data, options = absolute_images(data, options)  # the file may change the working directory
    build = _function(Path(place), function)
    images, _ = _images_of(EMBEDDED, {}, data, options)
    size = image_size or images.image_size
    try:
        network = build(**images.shape(size))
    except (Exception, SystemExit) as error:
        how = f"fails when it is called with num_classes, in_chans and image_size: {type(error).__name__}: {error}"
        raise UsageError(f"{text} {how}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{text} must return a torch.nn.Module, got {type(network).__name__}.")
    return network, images, size, function


def _function(path: Path, name: str) -> Callable[..., nn.Module]:
    if not path.is_file() or not name:
        what = f"{path} names no function" if path.is_file() else f"there is no file {path}"
        raise UsageError(f"{what}; a network is given as path/to/file.py:function.")
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        found = runpy.run_path(str(path)).get(name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if not callable(found):
        raise UsageError(
            f"{path} defines no function {name!r}; write def {name}(num_classes, in_chans, image_size) that returns a network."
        )
    return cast(Callable[..., nn.Module], found)


def open_largest(
    text: str, sizes: Collection[int], *, data: str | ImageData | None = None, data_options: Mapping[str, Any] | None = None
) -> tuple[Target, dict[int, str]]:
    """A target whose images are loaded at the largest of several sizes at which they fit into memory.

    Args:
        text: see `open_target`.
        sizes: pixels, at least one.
        data: see `open_target`.
        data_options: see `open_target`; an ``image_size`` among them is the size of the images in any case.

    Returns:
        The target, and by size why larger ones are refused.

    Raises:
        UsageError: the images fit at none of the sizes; else as `open_target`.
    """
    refused: dict[int, str] = {}
    for size in sorted(sizes, reverse=True):
        try:
            return open_target(text, data=data, image_size=size, data_options=data_options), refused
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or "image_size" in (data_options or {}):
                raise
            refused[size] = f"the images do not fit into memory at {size} px"
    raise UsageError(f"no size can be used: {'; '.join(refused.values())}.")


def _timm(name: str, data: str | ImageData | None, image_size: int | None, options: dict[str, Any], pretrained: bool) -> Target:
    if not timm.is_model(name):
        near = " or ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        advice = "A trial is given as RUN:NUMBER or RUN:best, a saved model as its folder."
        raise UsageError(f"there is no timm model {name!r}{f'; did you mean {near}?' if near else '.'} {advice}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if pretrained:
        if config is None or not config.has_weights:
            raise UsageError(f"timm has no weights of {name}: timm.list_pretrained() lists those that it has; or give a file as weights.")
        prepared = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
        channels, _, pixels = prepared.pop("input_size")
        options = {"in_chans": channels, "image_size": pixels} | prepared | options
    images, _ = _images_of(EMBEDDED, {}, data, options)
    size = image_size or images.image_size
    args: dict[str, Any] = {"num_classes": images.num_classes, "in_chans": images.in_chans}
    if getattr(config, "fixed_input_size", False):
        args["img_size"] = size
    return Target(
        name=name, data=images, image_size=size, trained=pretrained and images.num_classes == config.num_classes,
        recipe={"timm": name, "args": args, "image_size": size}, pretrained=pretrained,
    )  # fmt: skip


def _trial(
    place: str, which: int | Literal["best"], data: str | ImageData | None, image_size: int | None, options: dict[str, Any]
) -> Target:
    run = open_run(place)
    if which == "best" and run.owed:
        warnings.warn(f"the best of {run.config.name} may change: {run.owed}", stacklevel=2)
    images, _ = _images_of(run.config.data, run.config.image_options, data, options)
    try:
        found = rebuild(run, which, data=images)
    except StudyError:
        if data is None:
            raise
        found = rebuild(run, which)  # other classes or channels make another hash: check with the run's own images
    size = image_size or found.candidate.image_size
    recipe = found.recipe | images.shape(size)
    same = {"study": run.config.name, "trial": found.number, "hash": found.candidate.hash}
    kept = [run.folder / r["model"] for r in read_retrained(run) if r.get("model") and all(r.get(k) == v for k, v in same.items())]
    retrained = next((folder for folder in reversed(kept) if (folder / MANIFEST).is_file()), None)
    name = f"trial {found.number} of {run.config.name}"
    train = {name: value for name, value in run.config.train.items() if name != "record"}  # whether to measure is the command's
    return Target(name=name, data=images, image_size=size, trained=False, recipe=recipe, retrained=retrained, train=train)


def _saved(folder: Path, data: str | ImageData | None, image_size: int | None, options: dict[str, Any]) -> Target:
    manifest = read_manifest(folder)
    recipe, extra = manifest["recipe"], manifest.get("extra", {})
    known = extra.get("data") or {}
    shape = {k: (_timm_shape(recipe["timm"]) | recipe.get("args", {}) if "timm" in recipe else recipe)[k] for k in _SHAPE}
    size = recipe.get("image_size")
    inputs = {k: tuple(v) if isinstance(v, list) else v for k, v in (extra.get("inputs") or {}).items() if k in _PREPARED}
    images, own = _images_of(known.get("source"), known.get("options") or {}, data, options, like={"image_size": size} | inputs)
    size = image_size or size or images.image_size
    if shape != {"num_classes": images.num_classes, "in_chans": images.in_chans}:
        raise UsageError(
            f"the model in {folder} takes images of {shape['in_chans']} channels and knows {shape['num_classes']} classes, "
            f"but {images.name} has {images.in_chans} and {images.num_classes}; give its own data with --data."
        )
    trained = extra.get("trained", True)
    saw = trained and bool(extra.get("retrained")) and own
    return Target(name=str(folder), data=images, image_size=size, trained=trained, recipe=recipe, folder=folder, saw_validation=saw)


def _timm_shape(name: str) -> dict[str, int]:
    """Classes and channels of a timm model that is created without a word of them."""
    config = timm.get_pretrained_cfg(name)
    return {"num_classes": config.num_classes, "in_chans": config.input_size[0]}


def _images_of(
    source: str | None,
    recorded: Mapping[str, Any],
    data: str | ImageData | None,
    options: dict[str, Any],
    *,
    like: Mapping[str, Any] = _NOTHING,
) -> tuple[ImageData, bool]:
    """The images asked for, prepared ``like``, and whether they are those of a source, which are then read and split as recorded.

    Images of no source came as arrays: nobody has them any more, and the embedded set stands in for them.
    """
    if isinstance(data, ImageData):
        return data, False
    known, recorded = absolute_images(source or EMBEDDED, recorded)
    given, options = absolute_images(known if data is None else data, options)
    if source and given == known:
        return load_data(known, **recorded | options), True
    prepared = {name: value for name, value in recorded.items() if name in _PREPARED}
    return load_data(given, **{**like, **prepared, **options}), False
