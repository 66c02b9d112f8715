"""Training: it learns, replays, measures, and ends with a reason where it cannot go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_space import images
from torch import nn

from capnas._timm import import_timm
from capnas.data import ImageData, load_data
from capnas.devices import is_out_of_memory, resolve_device, use_amp, use_channels_last
from capnas.errors import UsageError
from capnas.recording import Recorder
from capnas.training import TrainConfig, evaluate, retrain, train


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(), validation=0.2, test=0.2)


def net(classes: int = 3, seed: int = 0, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, classes),
    )  # fmt: skip


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 2, "batch_size": 16, "lr": 1e-2, "device": "cpu"} | changes)


def without_seconds(curve: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in curve]


def test_learns_and_reports(data: ImageData) -> None:
    model = net()
    result = train(model, data, config(epochs=3))
    assert result.status == "complete"
    assert result.reason == ""
    assert [row["epoch"] for row in result.curve] == [1, 2, 3]
    assert sum(row["seconds"] for row in result.curve) <= result.seconds
    assert result.accuracy == result.curve[-1]["accuracy"] > 0.8
    assert result.curve[-1]["train_loss"] < result.curve[0]["train_loss"]
    assert not model.training
    again = evaluate(model, data, "validation")
    assert again["accuracy"] == pytest.approx(result.accuracy)
    assert again["loss"] == pytest.approx(result.curve[-1]["val_loss"])
    assert (result.device, result.amp, result.channels_last) == ("cpu", use_amp("auto", torch.device("cpu"), model), True)


def test_saturation_of_the_last_epoch_in_both_modes(data: ImageData) -> None:
    model = net()
    result = train(model, data, config())
    assert result.profile is not None
    assert result.profile.mode == "eval"
    assert [row.name for row in result.profile.layers] == ["0", "4", "7"]
    assert result.profile.layers[0].rows_seen == data.sizes["validation"] * 64  # of the last evaluation alone
    values = result.profile.saturations()
    last = result.curve[-1]
    assert last["saturation_mean"] == pytest.approx(np.mean(values))
    assert 0 < last["saturation_evenness"] <= 1
    assert 0 < last["train_saturation_mean"] <= 1
    assert not any(m._forward_hooks for m in model.modules())
    assert train(net(), data, config(record=False)).profile is None


def test_a_model_without_norms_ends_in_eval_mode(data: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 3))
    train(model, data, config(epochs=1), evaluate_on=None)
    assert not model.training


def test_threshold_and_blocks_are_those_of_the_settings(data: ImageData) -> None:
    profile = train(net(), data, config(epochs=1, threshold=0.5, blocks="0|4")).profile
    assert profile is not None
    assert (profile.threshold, [row.name for row in profile.blocks]) == (0.5, ["0", "4"])


def test_images_are_shuffled_by_the_seed_and_anew_in_each_epoch(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    batches = ImageData.batches

    def record(self: ImageData, split: str, batch_size: int, **how: Any) -> Any:
        if split == "train":
            asked.append((how["epoch"], how["seed"]))
        return batches(self, split, batch_size, **how)

    monkeypatch.setattr(ImageData, "batches", record)
    train(net(), data, config(epochs=3, seed=5))
    assert asked == [(epoch, 5) for epoch in range(3) for _ in ("to train", "to measure the norms")]


def test_recording_changes_nothing_in_the_training(data: ImageData) -> None:
    with_recording, without = net(), net()
    train(with_recording, data, config())
    train(without, data, config(record=False))
    for a, b in zip(with_recording.state_dict().values(), without.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_replays_bit_for_bit_whatever_the_callers_random_state(data: ImageData) -> None:
    first = net()
    a = train(first, data, config(seed=3))
    second = net()
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    b = train(second, data, config(seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert without_seconds(a.curve) == without_seconds(b.curve)
    for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    c = train(net(), data, config(seed=4))
    assert without_seconds(c.curve) != without_seconds(a.curve)


def watched(data: ImageData, look: Callable[[torch.optim.Optimizer], Any], **changes: Any) -> list[Any]:
    """What `look` finds in the optimizer at each update of a training, after clipping and before the step."""
    seen: list[Any] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(look(self))
            return super().step(closure)

    optim = import_timm("timm.optim")
    optim._optim_factory.default_registry.register(optim.OptimInfo(name="watched", opt_class=Watched, description="for a test"))
    train(net(), data, config(**{"optimizer": "watched", "lr": 0.1, "record": False} | changes))
    return seen


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def test_warm_up_then_cosine_to_zero(data: ImageData) -> None:
    seen = watched(data, learning_rate, epochs=4, warmup_epochs=1.0)
    n = len(seen) // 4
    warm_up = [0.001 + t * (0.1 - 0.001) / n for t in range(n)]
    cosine = [0.05 * (1 + math.cos(math.pi * t / (4 * n))) for t in range(n, 4 * n)]
    assert n == data.sizes["train"] // 16
    assert seen == pytest.approx(warm_up + cosine)


def test_warm_up_ends_with_half_of_the_training(data: ImageData) -> None:
    seen = watched(data, learning_rate, epochs=2, warmup_epochs=5.0)
    half = len(seen) // 2
    assert seen[:half] == pytest.approx([0.001 + t * (0.1 - 0.001) / half for t in range(half)])
    assert seen[half:] == sorted(seen[half:], reverse=True)


@pytest.mark.parametrize(("epochs", "powers"), [(2, [0, 1]), (6, [0, 0, 1, 1, 2, 2])])
def test_step_schedule_falls_to_a_tenth_after_each_third(data: ImageData, epochs: int, powers: list[int]) -> None:
    seen = watched(data, learning_rate, schedule="step", epochs=epochs, batch_size=64, warmup_epochs=0.0)
    updates = data.sizes["train"] // 64
    assert updates > 1
    assert seen == pytest.approx([0.1 * 0.1**power for power in powers for _ in range(updates)])


def test_gradients_are_clipped_to_the_given_norm(data: ImageData) -> None:
    def norm(optimizer: torch.optim.Optimizer) -> float:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        return float(torch.cat(grads).norm())

    assert min(watched(data, norm, epochs=1, lr=1e-4, clip_grad=None)) > 0.05
    assert watched(data, norm, epochs=1, lr=1e-4, clip_grad=0.05) == pytest.approx([0.05] * (data.sizes["train"] // 16), rel=1e-3)
    assert watched(data, norm, epochs=1, lr=1e-4, clip_grad=1e3)[0] == watched(data, norm, epochs=1, lr=1e-4, clip_grad=None)[0]


def test_weight_decay_is_for_weights_of_two_or_more_axes(data: ImageData) -> None:
    def decays(optimizer: torch.optim.Optimizer) -> list[tuple[int, float]]:
        return sorted((p.ndim, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"])

    seen = watched(data, decays, epochs=1, batch_size=64, weight_decay=0.3)
    assert seen[0] == sorted((p.ndim, 0.3 if p.ndim > 1 else 0.0) for p in net().parameters())
    assert {ndim for ndim, _ in seen[0]} == {1, 2, 4}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_label_smoothing_is_in_the_loss(data: ImageData, smoothing: float) -> None:
    classes, model = 3, net(dropout=0.0)
    x, y = next(data.batches("train", 1000, epoch=0, seed=0))  # all of it: the first loss is that of the fresh weights
    with torch.no_grad():
        logits = copy.deepcopy(model).train()(x).double().numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = np.full((len(y), classes), smoothing / classes)
    wanted[np.arange(len(y)), y.numpy()] += 1 - smoothing
    result = train(model, data, config(epochs=1, batch_size=1000, label_smoothing=smoothing, amp="off", record=False))
    assert result.curve[0]["train_loss"] == pytest.approx(-(wanted * logs).sum(1).mean(), rel=1e-5)


def test_on_epoch_stops_with_its_reason(data: ImageData) -> None:
    calls = []

    def on_epoch(epoch: int, row: dict[str, Any], profile: Any) -> str | None:
        calls.append((epoch, row["accuracy"], profile is not None))
        return "hopeless" if epoch == 2 else None

    result = train(net(), data, config(epochs=5), on_epoch=on_epoch)
    assert (result.status, result.reason, len(result.curve)) == ("stopped", "hopeless", 2)
    assert [c[0] for c in calls] == [1, 2]
    assert all(c[2] for c in calls)


def test_not_a_number_is_a_status(data: ImageData) -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 10).log()

    result = train(nn.Sequential(net(), Log()), data, config())
    assert result.status == "diverged"
    assert result.reason == "the loss is nan in epoch 1, update 1"
    assert result.accuracy is None


def test_not_a_number_on_validation_alone_is_a_status(data: ImageData) -> None:
    class Lost(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.training else x * torch.nan

    result = train(nn.Sequential(net(), Lost()), data, config())
    assert result.status == "diverged"
    assert "nan" in result.reason
    assert "validation" in result.reason


def test_explosion_is_a_status(data: ImageData) -> None:
    result = train(net(), data, config(lr=1e4, optimizer="sgd", clip_grad=None, weight_decay=0.0, epochs=3))
    assert result.status == "diverged"
    assert "loss" in result.reason


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
              RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), MemoryError("no"),
              MemoryError()]
)  # fmt: skip
def test_out_of_memory_is_a_status(data: ImageData, error: BaseException) -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise error

    result = train(nn.Sequential(net(), Greedy()), data, config())
    assert result.status == "out_of_memory"
    assert result.reason == (str(error) or "MemoryError")


def test_out_of_memory_of_the_real_allocator(data: ImageData) -> None:
    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.empty(1 << 58).sum()

    assert train(nn.Sequential(net(), Greedy()), data, config()).status == "out_of_memory"


def test_other_errors_pass_and_leave_no_hooks(data: ImageData) -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not match")

    model = nn.Sequential(net(), Wrong())
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(model, data, config())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert not is_out_of_memory(RuntimeError("shapes"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_evaluate_matches_a_plain_loop_and_restores_the_mode(data: ImageData) -> None:
    model = net().train()
    found = evaluate(model, data, "validation", batch_size=7, amp="off")  # as the loop below
    assert model.training
    x, y = next(data.batches("validation", 1000))
    model.eval()
    with torch.no_grad():
        logits = model(x).double().numpy()
    assert evaluate(model, data, "validation", batch_size=7, amp="off") == found
    assert not model.training
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(shares[np.arange(len(y)), y.numpy()]).mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == y.numpy()).mean())


def test_retrain_uses_train_and_validation_and_reads_test_once(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []
    original = ImageData.batches

    def spy(self: ImageData, split: str, *args: Any, **kwargs: Any) -> Any:
        splits.append(split)
        return original(self, split, *args, **kwargs)

    monkeypatch.setattr(ImageData, "batches", spy)
    result, test = retrain(net(), data, config(epochs=3))
    assert splits == ["train+validation"] * 6 + ["test"]  # each epoch once more for the norms, as it has few updates
    assert test["accuracy"] > 0.8
    assert result.accuracy is None
    assert result.profile is not None
    assert result.profile.mode == "train"
    splits.clear()
    train(net(), data, config())
    assert set(splits) == {"train", "validation"}


def test_another_resolution_is_trained_and_evaluated_at(data: ImageData) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    seen = set()
    model.register_forward_pre_hook(lambda module, args: seen.add((module.training, *args[0].shape[2:])))
    result = train(model, data, config(epochs=1), image_size=12)
    assert seen == {(True, 12, 12), (False, 12, 12)}
    assert result.profile is not None
    assert result.profile.layers[0].rows_seen == data.sizes["validation"] * 100


def test_the_final_evaluation_is_at_the_size_that_was_trained(data: ImageData) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    seen = set()
    model.register_forward_pre_hook(lambda module, args: seen.add((module.training, *args[0].shape[2:])))
    retrain(model, data, config(epochs=1), image_size=12)
    assert seen == {(True, 12, 12), (False, 12, 12)}


def test_channels_last_and_bfloat16_train(data: ImageData) -> None:
    result = train(net(), data, config(epochs=3, amp="on", channels_last="on"))
    assert (result.status, result.amp, result.channels_last) == ("complete", True, True)
    assert result.accuracy is not None
    assert result.accuracy > 0.6


@pytest.mark.parametrize(("amp", "dtype"), [("on", torch.bfloat16), ("off", torch.float32)])
def test_an_evaluation_computes_in_the_precision_asked_for(data: ImageData, amp: str, dtype: torch.dtype) -> None:
    model, seen = net(), set()
    model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    evaluate(model, data, "validation", amp=amp)
    assert seen == {dtype}


def test_a_step_and_its_recording_stay_on_the_device_of_the_model(data: ImageData) -> None:
    """On torch's meta device, which refuses to be mixed with the CPU as a GPU does."""
    meta = torch.device("meta")
    model = net().to(meta)
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(model, train_interval=3) as recorder:
        for x, y in data.batches("train", 16, epoch=0, seed=0, device=meta, image_size=8):
            assert x.device == y.device == meta
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
    sums = [s for s in recorder._sums.values() if s.calls]
    assert len(sums) >= 3  # the layers, and the blocks among them
    for seen in sums:
        held = [seen.shift, *seen.kept, *(seen._recent or ()), *(seen._sums or ())]
        assert {t.device for t in held if t is not None} == {meta}
    assert any(seen._recent for seen in sums)


def test_no_bfloat16_where_a_gradient_would_be_left_unwritten(data: ImageData) -> None:
    convs = [nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    for size, used in ((8, True), (4, False), (2, False)):  # at 4 px the second convolution reads 2 of them, its first tap none
        assert train(model, data, config(epochs=1, amp="on"), image_size=size).amp is used
    one = nn.Conv2d(16, 24, 3, 2, 1, bias=False)
    one(torch.randn(8, 16, 1, 1)).sum().backward()
    assert one.weight.grad is not None
    assert (one.weight.grad != 0).sum() == 16 * 24  # what the others must be, as in float32: the middle tap alone reads the pixel
    assert not use_amp("on", torch.device("cpu"), one, trained_on=[(16, 1, 1)])
    assert use_amp("on", torch.device("cpu"), nn.Conv2d(16, 24, 3, 1, 1), trained_on=[(16, 1, 1)])


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    dense, depthwise = nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    assert [use_amp(s, cpu, depthwise) for s in ("on", "off")] == [True, False]
    for arithmetic in (True, False):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda has=arithmetic: has)
        assert [use_amp("auto", cpu, m) for m in (dense, depthwise, nn.Linear(2, 2))] == [arithmetic, False, False]
    assert [use_channels_last("auto", cpu, m) for m in (dense, depthwise, nn.Linear(2, 2))] == [True, False, False]
    assert use_channels_last("auto", torch.device("cuda"), depthwise)
    assert [use_channels_last(s, cpu, depthwise) for s in ("on", "off")] == [True, False]
    for narrow in (nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(64, 64, 1, stride=2, groups=8)):  # the format that overruns memory
        assert not any(use_channels_last(s, cpu, nn.Sequential(narrow)) for s in ("auto", "on"))
    assert use_channels_last("auto", cpu, nn.Sequential(nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 1)))
    with pytest.raises(UsageError, match='device must be "auto", "cpu", "cuda" or "cuda:N", got \'gpu\''):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="'mps' does not compute in float64"):
        resolve_device("mps")
    assert resolve_device("mps", float64=False).type == "mps"  # where a loaded model may run
    for name in ("cuda:99", "xpu:99", "meta"):
        with pytest.raises(UsageError, match=f"'{name}' is not here: torch sees \\d+ {name.partition(':')[0].upper()} devices"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0").index == 0
    with pytest.raises(UsageError, match="'cuda:1' is not here: torch sees 1 CUDA devices"):
        resolve_device("cuda:1")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": float("nan")}, "lr must be finite and not negative, got nan"),
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*32, got -1"),
        ({"seed": 2**32}, r"seed must be at least 0 and below 2\*\*32, got 4294967296"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"threshold": 0.0}, r"threshold must be in \(0, 1\], got 0.0"),
        ({"clip_grad": 0.0}, "clip_grad must be above 0 or None, got 0.0"),
        ({"schedule": "cosin"}, "schedule must be one of .* Did you mean 'cosine'"),
        ({"amp": "yes"}, "amp must be one of auto, off, on; got 'yes'"),
        ({"optimizer": "adamv"}, "optimizer has no 'adamv' among its .* names. Did you mean 'adam'"),
    ],
)
def test_refuses(change: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        TrainConfig(**change)


def test_evaluation_puts_back_the_mode_of_each_module(data: ImageData) -> None:
    model = net().train()
    frozen = next(module for module in model if not list(module.children()))
    frozen.eval()
    before = [module.training for module in model.modules()]
    evaluate(model, data, "validation")
    assert [module.training for module in model.modules()] == before


def test_networks_with_tensors_of_five_axes_are_trained_channels_first(data: ImageData) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep, self.head = nn.Conv2d(1, 16, 3), nn.Conv3d(1, 1, 3), nn.Linear(1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.deep(self.flat(x)[:, None]).mean((2, 3, 4)))

    assert not use_channels_last("on", torch.device("cpu"), Deep())
    assert train(Deep(), data, config(epochs=1)).status == "complete"
