"""A network layer by layer, with costs beside measurements: a timm model before training, or a trial of a run."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from capnas._timm import import_timm
from capnas.candidates import LayerCost, count_cost
from capnas.data import ImageData, load_data
from capnas.devices import resolve_device
from capnas.errors import StudyError, UsageError
from capnas.profile import LayerProfile, Profile, profile_model
from capnas.recording import Reading
from capnas.scoring import score
from capnas.search.runs import open_run
from capnas.search.trials import rebuild


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
    timm = import_timm()
    if not timm.is_model(name):
        near = " or ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise UsageError(f"there is no timm model {name!r}{f'; did you mean {near}?' if near else '.'} A trial is given as RUN:NUMBER.")
    fixed = getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=data.num_classes, in_chans=data.in_chans, **({"img_size": image_size} if fixed else {}))
