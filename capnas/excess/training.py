"""Training under constraints: SGD whose weights are projected every few steps, and what a finished run is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capnas.data import ImageData
from capnas.data.images import normalise
from capnas.devices import resolve_device
from capnas.errors import UsageError, check_types
from capnas.excess.network import Limits, PaperNetwork
from capnas.measures.excess import distance_to_init, group_norm_21, margins
from capnas.measures.probing import seeded

_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every network of a study is trained: cross-entropy, SGD with momentum, a cosine schedule, no augmentation, as in the paper.

    Attributes:
        epochs: the paper takes 200.
        batch_size: images per step; the paper takes 256.
        lr: first learning rate; the paper takes 0.003.
        momentum: of SGD.
        weight_decay: of SGD.
        project_every: steps between projections.
        sweeps: of Dykstra's algorithm at each projection.
        final_sweeps: after the training.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    project_every: int = 15
    sweeps: int = 1
    final_sweeps: int = 15

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "batch_size", "project_every", "sweeps", "final_sweeps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (0 < self.lr < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            got = f"{self.lr}, {self.momentum} and {self.weight_decay}"
            raise UsageError(f"lr must be positive, momentum in [0, 1), weight_decay not negative; got {got}.")


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """One layer after a run.

    Attributes:
        name: of the module.
        weights: number of weights W.
        norm: s, upper bound on the operator norm, see `Operator.norm`.
        distance: b, the (2,1) distance to where the run started.
        norm_start: s at the start, after scaling to the constraint.
        radius: (2,1) norm of the weight at the start.
        norm_limit: the constraint on s, None of an unconstrained run and of the fixed classifier.
        distance_limit: the constraint on b, likewise.
    """

    name: str
    weights: int
    norm: float
    distance: float
    norm_start: float
    radius: float
    norm_limit: float | None = None
    distance_limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        seed: of weights and shuffling.
        lipschitz: factor on the norms of the unconstrained run of this seed; None: this is that run.
        distance: factor on its distances; None: likewise.
        status: "complete" or "diverged".
        train_error: share of all training images that are classified wrong, in [0, 1]; 1 where the training diverged.
        validation_error: likewise of validation.
        train_loss: cross-entropy of training; None where it diverged.
        margin: median margin of the training images that are classified right; None where none is.
        least_margin: the smallest margin of all; the paper's gamma, where it is positive.
        layers: in the order of the network, the classifier included.
        seconds: of the run.
    """

    seed: int
    lipschitz: float | None
    distance: float | None
    status: str
    train_error: float
    validation_error: float
    train_loss: float | None
    margin: float | None
    least_margin: float | None
    layers: tuple[LayerState, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Run:
        """The run of `to_dict`."""
        return cls(**{**row, "layers": tuple(LayerState(**layer) for layer in row["layers"])})


def train_run(
    network: PaperNetwork,
    data: ImageData,
    *,
    limits: Mapping[str, Limits] | None = None,
    factors: tuple[float, float] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    device: str = "auto",
    image_size: int | None = None,
) -> Run:
    """Train a fresh network of `paper_network` in place, under constraints or without, and measure it.

    Weights that exceed their Lipschitz constraint at the start are scaled down to it first; distances are measured from there. After the
    last step a longer projection and `pull_back` make every constraint hold as measured, before anything is evaluated.

    Args:
        network: ends trained, on the device.
        data: trains on "train", never augmented.
        limits: constraints by layer name, of all trained layers; None for none.
        factors: relative constraints, kept in the result.
        recipe: how.
        seed: of shuffling and dropout.
        device: "auto", "cpu", "cuda", ...
        image_size: in pixels, where it is not the data's.
    """
    begin, recipe, where = time.perf_counter(), recipe or Recipe(), resolve_device(device)
    model = network.model.to(where)
    if limits is not None:
        with torch.no_grad():
            for operator in network.trained:
                weight = network.weight(operator)
                weight.copy_(operator.start(weight, limits[operator.name]))
    start = {o.name: network.weight(o).detach().clone() for o in network.operators}
    with seeded(seed, [where]):
        finite = _descend(network, data, start, limits, recipe, seed, where, image_size)
    model.eval()
    if finite and limits is not None:
        _project(network, start, limits, sweeps=recipe.final_sweeps, exact=True)
    measured = _measure(model, data, where, image_size) if finite else _Measured(1.0, 1.0, None, None, None)
    layers = []
    for operator in network.operators:
        weight, init = network.weight(operator), start[operator.name]
        limit = None if limits is None or operator.fixed else limits[operator.name]
        layers.append(
            LayerState(
                name=operator.name,
                weights=weight.numel(),
                norm=operator.norm(weight) if finite else 0.0,
                distance=distance_to_init(weight, init) if finite else 0.0,
                norm_start=operator.norm(init),
                radius=group_norm_21(init),
                norm_limit=None if limit is None else limit.norm,
                distance_limit=None if limit is None else limit.distance,
            )
        )
    return Run(
        seed=seed,
        lipschitz=factors and factors[0],
        distance=factors and factors[1],
        status="complete" if finite else "diverged",
        train_error=measured.train_error,
        validation_error=measured.validation_error,
        train_loss=measured.train_loss,
        margin=measured.margin,
        least_margin=measured.least_margin,
        layers=tuple(layers),
        seconds=time.perf_counter() - begin,
    )


@dataclass(frozen=True)
class _Measured:
    train_error: float
    validation_error: float
    train_loss: float | None
    margin: float | None
    least_margin: float | None


def _descend(
    network: PaperNetwork,
    data: ImageData,
    start: Mapping[str, Tensor],
    limits: Mapping[str, Limits] | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    image_size: int | None,
) -> bool:
    """Whether the weights stayed finite."""
    weights = [network.weight(o) for o in network.trained]
    optimizer = torch.optim.SGD(weights, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    total, step = recipe.epochs * data.steps("train", recipe.batch_size), 0
    network.model.train()
    for epoch in range(recipe.epochs):
        for x, y in data.batches("train", recipe.batch_size, epoch=epoch, seed=seed, augment=False, device=device, image_size=image_size):
            optimizer.param_groups[0]["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / total))
            loss = nn.functional.cross_entropy(network.model(x).flatten(1), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if limits is not None and step % recipe.project_every == 0:
                if not _finite(weights):
                    return False
                _project(network, start, limits, sweeps=recipe.sweeps)
    return _finite(weights)


def _finite(weights: list[nn.Parameter]) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in weights)


@torch.no_grad()
def _project(network: PaperNetwork, start: Mapping[str, Tensor], limits: Mapping[str, Limits], *, sweeps: int, exact: bool = False) -> None:
    for operator in network.trained:
        weight = network.weight(operator)
        weight.copy_(operator.constrain(weight, start[operator.name], limits[operator.name], sweeps=sweeps, exact=exact))


@torch.no_grad()
def _measure(model: nn.Module, data: ImageData, device: torch.device, image_size: int | None) -> _Measured:
    found, losses = {}, []
    for split in ("train", "validation"):
        parts = []
        for x, y in every_image(data, split, device, image_size):
            logits = model(x).flatten(1).double()
            parts.append(margins(logits, y))
            if split == "train":
                losses.append(nn.functional.cross_entropy(logits, y, reduction="none"))
        found[split] = torch.cat(parts)
    train, right = found["train"], found["train"][found["train"] > 0]
    return _Measured(
        float((train <= 0).double().mean()),
        float((found["validation"] <= 0).double().mean()),
        float(torch.cat(losses).mean()),
        float(right.median()) if len(right) else None,
        float(train.min()),
    )


def every_image(data: ImageData, split: str, device: torch.device | str, image_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """All images of a split in their order, none left out and none augmented: x (B, C, H, W) normalised, y (B,)."""
    for chosen in data.index[split].split(_CHUNK):
        x, y = data.pool.take(chosen, image_size or data.image_size)
        yield normalise(x.to(device), data.mean, data.std), y.to(device)
