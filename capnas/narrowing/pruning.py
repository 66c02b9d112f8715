"""The whole job of ``capnas prune``: survey, plan, narrow, fine-tune, and a report of what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capnas.candidates import count_cost
from capnas.data import ImageData, load_data
from capnas.devices import device_of, resolve_device
from capnas.errors import CapnasError, UsageError, check_name, check_names, check_types
from capnas.latency import latencies
from capnas.measures.evenness import evenness, mean
from capnas.measures.guessing import no_better_than_a_guess
from capnas.measures.probing import cloned, untouched
from capnas.measures.saturation import THRESHOLD
from capnas.narrowing import narrowed
from capnas.narrowing.applying import narrowable
from capnas.narrowing.costs import NetworkCost
from capnas.narrowing.lowrank import RankPlan, factorized, plan_ranks
from capnas.narrowing.planning import Allocation, Plan, check_division, check_growth, check_reach, check_target, check_widths, plan_widths
from capnas.narrowing.refusing import check_modules, check_network
from capnas.narrowing.standardized import plain_convs
from capnas.narrowing.survey import saturations, survey
from capnas.projection import head_names
from capnas.training import TrainConfig, TrainingResult, evaluate, train

Method = Literal["channels", "lowrank"]
FRESH = TrainConfig(record=False)  # of a network with fresh weights
FINETUNE = TrainConfig(lr=1e-3, warmup_epochs=0.1, record=False)
_LARGE = 10.0  # times the full network's largest output, from which the narrowed network's is named
_PIXELS = 2**23  # of calibration images in all: bounds the memory of the pass that runs them as one batch


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What to do to a network; exactly one of the three goals.

    Args:
        target_macs: share of the multiply-accumulates to keep, in (0, 1).
        lossless: share of each layer's variance that its planned width holds, in (0, 1).
        widths: channels by group.
        method: "channels" removes whole channels; "lowrank" splits layers in two by their eigenspaces.
        allocation: of a target, see `capnas.narrowing.planning.plan_widths`; for channels only.
        round_to: channels are a multiple of it; for channels only.
        images: for calibration, from train; fewer where they are large.
        finetune_epochs: passes over train after narrowing.
        train_epochs: passes before it, for a network without trained weights.
        train: further fields of `capnas.training.TrainConfig`, of both trainings.
        seed: of sampling and training.
        device: "auto", "cpu", "cuda", ...

    Raises:
        UsageError: a value out of its range, or not exactly one goal.
    """

    target_macs: float | None = None
    lossless: float | None = None
    widths: Mapping[str, int] | None = None
    method: Method = "channels"
    allocation: Allocation = "loss"
    round_to: int = 8
    images: int = 1024
    finetune_epochs: int = 0
    train_epochs: int = 0
    train: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        check_types(self)
        if sum(goal is not None for goal in (self.target_macs, self.lossless, self.widths)) != 1:
            raise UsageError("give exactly one goal: target_macs, lossless or widths (--target-macs, --lossless or --plan).")
        if self.target_macs is not None:
            check_target(self.target_macs)
        check_name("method", self.method, ("channels", "lowrank"))
        if self.method == "lowrank" and self.widths is not None:
            raise UsageError("a plan of widths is for the method channels; lowrank takes --target-macs or --lossless.")
        check_division(self.allocation, self.round_to)
        if self.method == "lowrank" and (self.allocation, self.round_to) != (PruneConfig.allocation, PruneConfig.round_to):
            raise UsageError(
                "allocation and round_to are for the method channels; lowrank gives every layer the ranks of one share of its variance."
            )
        if self.widths is not None and self.round_to not in (1, PruneConfig.round_to):  # 1 rounds nothing
            raise UsageError("a plan of widths is carried out as it is: leave out --round-to, or round the widths in the plan.")
        if self.target_macs is None and self.allocation != PruneConfig.allocation:
            raise UsageError("an allocation says how a target of MACs is divided: give --target-macs, or leave out --allocation.")
        if self.lossless is not None and not 0 < self.lossless < 1:
            raise UsageError(f"lossless is the share of the variance to keep, in (0, 1), got {self.lossless}.")
        if self.images < 16:
            raise UsageError(f"calibration needs at least 16 images, got {self.images}.")
        for name in ("finetune_epochs", "train_epochs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}.")
        check_names("train", self.train, {f.name for f in fields(TrainConfig)} - {"epochs", "record", "seed", "device"})
        self.training(FINETUNE, 1)

    def training(self, recipe: TrainConfig, epochs: int) -> TrainConfig:
        """A recipe with the settings that were given."""
        return replace(recipe, **self.train, epochs=epochs, seed=self.seed, device=self.device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pruned:
    """A narrowed network and what it cost.

    Attributes:
        model: in eval mode.
        plan: that it follows.
        report: plain JSON types: accuracy on validation (before, pruned, finetuned), whether each is no better than a guess, MACs, params,
            milliseconds per batch, mean and evenness of the layers' measured saturation before and after, the largest output on a batch
            of validation before and after.
    """

    model: nn.Module
    plan: Plan | RankPlan
    report: dict[str, Any]


def calibration_images(data: ImageData, count: int, image_size: int, *, seed: int, device: torch.device) -> Tensor:
    """Images of train without augmentation, as many as `count` and memory allow (N, C, H, W)."""
    fitting = max(16, _PIXELS // image_size**2)
    return data.probe(min(count, fitting), seed=seed, device=device, image_size=image_size)[0]


def propose(model: nn.Module, data: Any, config: PruneConfig, *, image_size: int | None = None) -> Plan | RankPlan:
    """The plan that `prune` would carry out; nothing is narrowed, and the network itself is not changed.

    Args:
        model: a classifier of the data's classes.
        data: what `capnas.load_data` takes; calibration images come from train.
        config: what is wanted.
        image_size: pixels, where not the data's.

    Raises:
        CannotNarrow, UsageError: as `prune`.
    """
    data = load_data(data)
    return make_plan(*_to_measure(model, data, config, image_size or data.image_size), config)[0]


def _to_measure(model: nn.Module, data: ImageData, config: PruneConfig, size: int) -> tuple[nn.Module, Tensor]:
    """A copy of the network on its device, in eval mode, and calibration images."""
    model, device = check_modules(model), resolve_device(config.device)
    full, images = cloned(model).to(device).eval(), calibration_images(data, config.images, size, seed=config.seed, device=device)
    check_network(full, images[:2], classes=data.num_classes)
    return full, images


def make_plan(model: nn.Module, images: Tensor, config: PruneConfig) -> tuple[Plan | RankPlan, Callable[[], nn.Module]]:
    """Plan, and the function that carries the plan out on a copy of the network.

    Args:
        model: trained, on the images' device; not changed.
        images: (N, C, H, W) for calibration.
        config: what is wanted.

    Raises:
        CannotNarrow, MissingDependencyError, UsageError: see `capnas.narrowing.survey.survey` and `capnas.narrowing.planning.plan_widths`.
    """
    threshold = config.lossless or THRESHOLD
    if config.method == "lowrank":
        ranks = plan_ranks(model, images, target_macs=config.target_macs, threshold=threshold)
        return ranks, lambda: factorized(model, ranks)
    found = survey(model, images, threshold=threshold, seed=config.seed)
    plan = plan_widths(
        found,
        target_macs=config.target_macs,
        lossless=config.lossless is not None,
        widths=config.widths,
        round_to=config.round_to,
        allocation=config.allocation,
    )
    return plan, lambda: narrowed(model, found, plan, seed=config.seed)


def pretrain(
    model: nn.Module, data: ImageData, config: PruneConfig, *, image_size: int, recipe: TrainConfig = FRESH,
    say: Callable[[str], None] | None = None,
) -> nn.Module:  # fmt: skip
    """Train a network before it is narrowed, by the recipe for as long as the config says: widths are planned from what trained layers do.

    Raises:
        UsageError: ``config.train_epochs`` is 0, the plan's widths are of another network, or the target is out of reach of any weights.
        CannotNarrow: this network cannot be narrowed, trained or not.
        CapnasError: the training did not complete.
    """
    if not config.train_epochs:
        raise UsageError(
            "this network has no trained weights, and widths are planned from trained layers: "
            "give --train-epochs N, or a timm model --pretrained or --weights FILE.safetensors."
        )
    example = data.probe(2, seed=config.seed, device=device_of(model), image_size=image_size)[0]
    check_network(model, example, classes=data.num_classes)  # before minutes of training, as all that follows
    if config.method == "channels":
        plain = plain_convs(model)
        groups = narrowable(plain, example).groups
        cost = NetworkCost.of(plain, groups, (1, *example.shape[1:]))
        if config.widths is not None:
            check_growth(cost, check_widths(groups, config.widths))
        if config.target_macs is not None:
            check_reach(cost, groups, config.target_macs, config.round_to)
    _train(model, data, config.training(recipe, config.train_epochs), image_size, "training", say)
    return model


def prune(
    model: nn.Module,
    data: Any,
    config: PruneConfig | None = None,
    *,
    image_size: int | None = None,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> Pruned:
    """Narrow a trained network and report; the network itself is not changed.

    Args:
        model: a classifier of the data's classes.
        data: what `capnas.load_data` takes; calibration images come from train, accuracies from validation; the test split
            stays closed.
        config: what is wanted.
        image_size: pixels, where not the data's.
        say: told of each step.
        settings: fields of `capnas.narrowing.pruning.PruneConfig` by name, beside ``config`` or in its place.

    Returns:
        The narrowed ``model``, which `capnas.save_model` keeps, with its ``plan`` and ``report``.

    Raises:
        CannotNarrow: this network cannot be narrowed; the text says why.
        UsageError: a setting that is not one or out of its range; a goal that cannot be reached.
        CapnasError: the narrowed network's outputs are not finite, or fine-tuning diverged.

    >>> import numpy as np
    >>> from capnas.data import load_data
    >>> data = load_data((np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 2))
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> small = prune(net, data, target_macs=0.5, round_to=1, device="cpu")
    >>> small.model[0].out_channels, small.report["macs"]["after"] <= 0.5 * small.report["macs"]["before"]
    (4, True)
    """
    check_names("setting", settings, {f.name for f in fields(PruneConfig)})
    config = PruneConfig(**settings) if config is None else replace(config, **settings)
    data = load_data(data)
    tell = say or (lambda text: None)
    device, size = resolve_device(config.device), image_size or data.image_size
    full, images = _to_measure(model, data, config, size)
    tell(f"measuring {type(model).__name__} on {len(images)} images of {data.name}")
    start = time.perf_counter()
    plan, carry_out = make_plan(full, images, config)
    tell(f"plan: {plan.goal}; {plan.planned_macs / plan.macs:.1%} of the MACs, {plan.planned_params / plan.params:.1%} of the parameters")
    if isinstance(plan, Plan) and plan.grows and not config.finetune_epochs:
        tell("groups that the plan widens start as copies of their most needed channels; --finetune-epochs N trains them apart")
    small = carry_out()
    seconds = time.perf_counter() - start
    shape = (1, *images.shape[1:])
    before, after = count_cost(full, shape), count_cost(small, shape)
    outputs = largest_outputs(full, small, next(iter(data.batches("validation", 256, device=device, image_size=size)))[0])
    if outputs["after"] > _LARGE * outputs["before"]:
        tell(f"warning: on validation images the narrowed network puts out up to {outputs['after']:.3g}, the full one "
             f"{outputs['before']:.3g}; give more images (--calibration) or a larger target, or fine-tune")  # fmt: skip
    saturation = {name: _saturation(m, images, config.lossless or THRESHOLD) for name, m in (("before", full), ("after", small))}
    accuracy = {name: evaluate(m, data, "validation", image_size=size)["accuracy"]
                for name, m in (("before", full), ("pruned", small))}  # fmt: skip
    tell(f"accuracy on validation: {accuracy['before']:.4f} before, {accuracy['pruned']:.4f} after narrowing, without training")
    curve: list[dict[str, Any]] = []
    if config.finetune_epochs:
        result = _train(small, data, config.training(FINETUNE, config.finetune_epochs), size, "fine-tuning", say)
        accuracy["finetuned"], curve = float(result.accuracy or 0.0), list(result.curve)
    times = {b: latencies([full, small], images[torch.arange(b) % len(images)]) for b in (1, 64)}
    report = {
        "data": data.name,
        "validation_images": data.sizes["validation"],
        "calibration_images": len(images),
        "accuracy": accuracy,
        "at_chance": {
            stage: no_better_than_a_guess(value, chance=data.guess, images=data.sizes["validation"]) for stage, value in accuracy.items()
        },
        "macs": {"before": before.macs, "after": after.macs},
        "params": {"before": before.params, "after": after.params},
        "saturation": saturation,
        "outputs": outputs,
        "latency_ms": {f"batch {b}": {"before": round(t[0], 3), "after": round(t[1], 3)} for b, t in times.items()},
        "device": str(device),
        "seconds": round(seconds, 1),
        "finetuning": curve,
    }
    return Pruned(model=small.eval(), plan=plan, report=report)


def largest_outputs(full: nn.Module, small: nn.Module, x: Tensor) -> dict[str, float]:
    """The largest absolute output of both networks on images that neither was corrected on, in eval mode.

    Args:
        full: as it was.
        small: narrowed.
        x: (B, C, H, W) on their device.

    Raises:
        CapnasError: the narrowed network's outputs are not finite.

    >>> largest_outputs(nn.Identity(), nn.ReLU(), torch.tensor([[-2.0, 1.0]]))
    {'before': 2.0, 'after': 1.0}
    """
    found = []
    for model in (full, small):
        with untouched(model), torch.no_grad():
            found.append(float(model(x).abs().max()))
    if not math.isfinite(found[1]):
        raise CapnasError(
            f"the narrowed network puts out NaN or infinity on images it was not corrected on (the full one at most {found[0]:.3g}): "
            "give more calibration images (--calibration) or a larger target."
        )
    return {"before": found[0], "after": found[1]}


def _saturation(model: nn.Module, images: Tensor, threshold: float) -> dict[str, float]:
    """Mean and evenness over all layers but the head, as measured."""
    heads = head_names(model)
    values = [v for name, v in saturations(model, images, threshold).items() if name not in heads]
    return {"mean": mean(values), "evenness": evenness(values)}


def _train(
    model: nn.Module, data: ImageData, settings: TrainConfig, image_size: int, what: str, say: Callable[[str], None] | None
) -> TrainingResult:
    def on_epoch(epoch: int, row: dict[str, Any], profile: Any) -> None:
        if say is not None:
            say(f"{what}: epoch {epoch}/{settings.epochs}, loss {row['train_loss']:.4f}, accuracy {row['accuracy']:.4f}")

    result = train(model, data, settings, image_size=image_size, on_epoch=on_epoch)
    if result.status != "complete":
        slower = f"; give a lower learning rate than {settings.lr:g}: --train lr={settings.lr / 10:g}"
        raise CapnasError(f"{what} ended as {result.status}: {result.reason}{slower if result.status == 'diverged' else ''}.")
    return result
