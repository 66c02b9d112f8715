"""Short training of a candidate, with its layer saturation measured while it trains, and the longer final training.

Optimizer, schedule and loss are timm's. Everything random (shuffling, augmentation, dropout) follows from ``TrainConfig.seed``
inside a forked generator, so that a training on the CPU replays bit for bit with the same number of threads and leaves the
caller's random state alone. A training that cannot go on says so in its result and never raises for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capnas._timm import import_timm
from capnas.data import ImageData
from capnas.devices import SWITCHES, device_of, is_out_of_memory, resolve_device, use_amp, use_channels_last
from capnas.errors import UsageError, check_name, check_types
from capnas.layers import block_pattern
from capnas.measures.evenness import evenness, mean
from capnas.measures.probing import seeded
from capnas.measures.saturation import check_threshold
from capnas.norms import measure_norms, running_norms
from capnas.profile import Profile
from capnas.recording import Recorder

SCHEDULES = ("cosine", "poly", "step", "constant", "none")
MAX_LOSS = 100.0  # far above ln(classes): a step beyond it is an explosion, not a bad start
_FEW_UPDATES = 20  # in an epoch, below which running averages of batch norms lag behind the weights

EpochCallback = Callable[[int, dict[str, Any], "Profile | None"], "str | None"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a candidate is trained.

    Args:
        epochs: passes over the training split, at least 1.
        batch_size: images per update.
        optimizer: any name of ``timm.optim.create_optimizer_v2``.
        lr: learning rate at which the schedule starts and the warm-up ends.
        weight_decay: applied to weights of two or more axes only (timm's grouping).
        schedule: one of cosine, poly, step, constant, none; stepped per update.
        warmup_epochs: linear warm-up in place of the schedule's first epochs, as timm's is; at most half the training, may be a fraction.
        label_smoothing: in [0, 1).
        clip_grad: largest gradient norm, or None.
        seed: of shuffling, augmentation and dropout, in [0, 2**32). The weights of the model are the caller's.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        amp: bfloat16 autocast: "auto" (where it is faster, see `capnas.devices.use_amp`), "on" or "off".
        channels_last: memory format: "auto", "on" or "off".
        record: measure saturation while training.
        threshold: share of the variance in the definition of saturation, in (0, 1].
        blocks: regular expression of the units that are read as blocks, see `capnas.layers.find_blocks`.

    Raises:
        UsageError: a value of another kind or out of its range; the text says which.

    Example:
        >>> TrainConfig(epochs=2).optimizer
        'adamw'
    """

    epochs: int = 3
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.0
    clip_grad: float | None = 5.0
    seed: int = 0
    device: str = "auto"
    amp: str = "auto"
    channels_last: str = "auto"
    record: bool = True
    threshold: float = 0.99
    blocks: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        check_types(self)
        for name, low in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} must be at least {low}, got {getattr(self, name)}.")
        for name in ("lr", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{name} must be finite and not negative, got {value}.")
        if not 0 <= self.seed < 2**32:  # the bounds of NumPy's seeds
            raise UsageError(f"seed must be at least 0 and below 2**32, got {self.seed}.")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        check_threshold(self.threshold)
        if self.blocks is not None:
            block_pattern(self.blocks)
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UsageError(f"clip_grad must be above 0 or None, got {self.clip_grad}.")
        check_name("schedule", self.schedule, SCHEDULES)
        optimizers = import_timm("timm.optim").list_optimizers()
        check_name("optimizer", self.optimizer, optimizers)
        for name in ("amp", "channels_last"):
            check_name(name, getattr(self, name), SWITCHES)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a training gave.

    Attributes:
        status: "complete", "stopped" (by ``on_epoch``), "diverged" or "out_of_memory".
        reason: why it did not complete, else "".
        curve: one dict per finished epoch: epoch (from 1), train_loss, lr, seconds, and where measured val_loss, accuracy,
            saturation_mean and saturation_evenness over the layers, in eval mode plain, in train mode with the prefix ``train_``.
        accuracy: on the evaluation split after the last finished epoch, in [0, 1]; None without one.
        profile: of the last finished epoch: of the evaluation (fixed weights), or of the training where nothing was evaluated.
        seconds: wall-clock time of the whole call.
        device, amp, channels_last: what "auto" became.
    """

    status: str
    reason: str = ""
    curve: tuple[dict[str, Any], ...] = ()
    accuracy: float | None = None
    profile: Profile | None = None
    seconds: float = 0.0
    device: str = "cpu"
    amp: bool = False
    channels_last: bool = False


class _Diverged(Exception):
    """The loss is not a number or beyond reason; the text says which."""


def _format(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x


def evaluate(
    model: nn.Module,
    data: ImageData,
    split: str,
    *,
    batch_size: int = 256,
    amp: str = "auto",
    channels_last: str = "auto",
    image_size: int | None = None,
) -> dict[str, float]:
    """Accuracy in [0, 1] and mean cross-entropy over a split, in eval mode, on the model's device; the mode of each module is put back.

    Raises:
        UsageError: ``split`` is "test" outside ``data.final_evaluation()``.
    """
    where = device_of(model)
    last = use_channels_last(channels_last, where, model)
    loss_sum = torch.zeros((), dtype=torch.float64, device=where)
    right = torch.zeros((), dtype=torch.int64, device=where)
    seen = 0
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=use_amp(amp, where, model)):
            for x, y in data.batches(split, batch_size, device=where, image_size=image_size):
                logits = model(_format(x, last)).float()
                loss_sum += nn.functional.cross_entropy(logits, y, reduction="sum").double()
                right += (logits.argmax(1) == y).sum()
                seen += len(y)
    finally:
        for module in training:
            module.training = True
    return {"accuracy": int(right) / max(seen, 1), "loss": float(loss_sum) / max(seen, 1)}


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    image_size: int | None = None,
    on_epoch: EpochCallback | None = None,
    split: str = "train",
    evaluate_on: str | None = "validation",
) -> TrainingResult:
    """Train a model in place on ``split``, evaluating on ``evaluate_on`` after each epoch; after one of fewer than 20 updates the
    running statistics of batch norms are measured anew first (`capnas.norms.measure_norms`).

    Args:
        model: ends trained, on ``config.device``, in eval mode.
        data: images.
        config: how.
        image_size: resolution, where it is not the data set's.
        on_epoch: called with the epoch (from 1), its row of the curve and its profile; a text returned ends the training as "stopped".
        split: "train" or "train+validation".
        evaluate_on: "validation", or None.

    Returns:
        Always a result: divergence and lack of memory are statuses, with the reason. Other errors pass through.
    """
    start = time.perf_counter()
    device = resolve_device(config.device)
    amp, last = False, use_channels_last(config.channels_last, device, model)
    curve: list[dict[str, Any]] = []
    profile: Profile | None = None
    status, reason = "complete", ""
    with seeded(config.seed, [device]):
        try:
            model.to(device)
            amp = use_amp(config.amp, device, model, trained_on=data.training_shapes(image_size))
            if last:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            for row, profile in _epochs(model, data, config, device, amp, last, image_size, split, evaluate_on):
                curve.append(row)
                if on_epoch is not None and (said := on_epoch(len(curve), row, profile)) is not None:
                    status, reason = "stopped", said
                    break
        except _Diverged as error:
            status, reason = "diverged", str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            status, reason = "out_of_memory", str(error).partition("\n")[0][:300] or type(error).__name__
    if status == "out_of_memory" and device.type == "cuda":
        torch.cuda.empty_cache()
    model.to(memory_format=torch.contiguous_format if last else torch.preserve_format).eval()  # type: ignore[call-overload]
    return TrainingResult(
        status=status,
        reason=reason,
        curve=tuple(curve),
        accuracy=curve[-1].get("accuracy") if curve else None,
        profile=profile,
        seconds=time.perf_counter() - start,
        device=str(device),
        amp=amp,
        channels_last=last,
    )


def retrain(
    model: nn.Module, data: ImageData, config: TrainConfig, *, image_size: int | None = None, on_epoch: EpochCallback | None = None
) -> tuple[TrainingResult, dict[str, float]]:
    """The final training: on train and validation together, then one evaluation on the test split, the only one in a study.

    Args:
        model: fresh, not the one of the search; ends trained.
        data: images.
        config: usually more epochs than in the search; ``replace(config, epochs=20)``.
        image_size: resolution, where it is not the data set's.
        on_epoch: see `train`; there is no accuracy in its rows, nothing is held out.

    Returns:
        The training and, where it completed, the test split's accuracy and loss; else an empty dict.
    """
    result = train(model, data, config, image_size=image_size, on_epoch=on_epoch, split="train+validation", evaluate_on=None)
    if result.status != "complete":
        return result, {}
    with data.final_evaluation() as opened:
        return result, evaluate(model, opened, "test", amp=config.amp, channels_last=config.channels_last, image_size=image_size)


def _epochs(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    device: torch.device,
    amp: bool,
    channels_last: bool,
    image_size: int | None,
    split: str,
    evaluate_on: str | None,
) -> Iterator[tuple[dict[str, Any], Profile | None]]:
    """One row of the curve and one profile per epoch."""
    updates = data.steps(split, config.batch_size)
    optimizer = import_timm("timm.optim").create_optimizer_v2(model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
    schedule, _ = import_timm("timm.scheduler").create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        decay_epochs=max(1, config.epochs // 3),
        warmup_epochs=min(config.warmup_epochs, config.epochs / 2),
        warmup_lr=config.lr / 100,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    smoothing = config.label_smoothing
    loss_of = import_timm("timm.loss").LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    watching = Recorder(model, blocks=config.blocks, seed=config.seed, train_interval=3) if config.record else contextlib.nullcontext()
    with watching as recorder:
        for epoch in range(config.epochs):
            start = time.perf_counter()
            model.train()
            total, batches = torch.zeros((), dtype=torch.float64, device=device), 0
            for x, y in data.batches(split, config.batch_size, epoch=epoch, seed=config.seed, device=device, image_size=image_size):
                if len(y) < 2:  # batch norm cannot train on a single row
                    continue
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    loss = loss_of(model(_format(x, channels_last)).float(), y)
                if device.type == "cpu" or batches % 16 == 0:  # reading a loss waits for the device
                    _check(loss.item(), f"in epoch {epoch + 1}, update {batches + 1}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if config.clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                total += loss.detach()
                batches += 1
                if schedule is not None:
                    schedule.step_update(epoch * updates + batches)
            row = {"epoch": epoch + 1, "train_loss": float(total) / max(batches, 1), "lr": optimizer.param_groups[0]["lr"]}
            _check(row["train_loss"], f"in epoch {epoch + 1}")
            if batches < _FEW_UPDATES and running_norms(model):
                again = data.batches(split, config.batch_size, epoch=epoch, seed=config.seed, device=device, image_size=image_size)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    measure_norms(model, (_format(x, channels_last) for x, y in again if len(y) > 1))
                if recorder is not None:
                    recorder.pop("eval")  # these were training images
            if evaluate_on is not None:
                switches: dict[str, Any] = {"amp": "on" if amp else "off", "channels_last": "on" if channels_last else "off"}
                measured = evaluate(model, data, evaluate_on, image_size=image_size, **switches)
                _check(measured["loss"], f"on {evaluate_on} after epoch {epoch + 1}")
                row |= {"val_loss": measured["loss"], "accuracy": measured["accuracy"]}
            profile = None if recorder is None else _read(recorder, config.threshold, row)
            row["seconds"] = time.perf_counter() - start
            yield row, profile


def _read(recorder: Recorder, threshold: float, row: dict[str, Any]) -> Profile | None:
    """Profile of what was recorded since the last epoch, the eval mode's where there was one; its summary goes into the row."""
    profile: Profile | None = None
    for mode, prefix in (("train", "train_"), ("eval", "")):
        records = recorder.pop(mode)  # type: ignore[arg-type]
        if not records:
            continue
        profile = Profile.from_records(recorder.model, records, mode=mode, threshold=threshold)  # type: ignore[arg-type]
        values = profile.saturations("modules")
        row |= {f"{prefix}saturation_mean": mean(values), f"{prefix}saturation_evenness": evenness(values)}
    return profile


def _check(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise _Diverged(f"the loss is {loss} {where}")
    if loss > MAX_LOSS:
        raise _Diverged(f"the loss exploded to {loss:.3g} {where} (limit {MAX_LOSS:g})")
