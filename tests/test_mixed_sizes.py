"""One set of weights at several image sizes: what is shared, which images come at which size, what cannot share."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_space import images
from torch import nn

from capnas.data import ImageData, load_data
from capnas.errors import UsageError
from capnas.mixed_sizes import MixedSizes, SharedSizes, difference, train_together
from capnas.training import TrainConfig, TrainingResult, evaluate, train

CONFIG = TrainConfig(batch_size=16, lr=1e-2, device="cpu")


def net(size: int = 0, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(24, 3)
        )


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data(images(size=16), validation=0.2, test=0.2)


def test_parameters_are_shared_and_statistics_are_not() -> None:
    networks = {size: net(seed=size) for size in (8, 16)}
    before = copy.deepcopy(networks[8].state_dict())
    shared = SharedSizes(networks)
    assert len(list(shared.parameters())) == 6
    for name, parameter in networks[16].named_parameters():
        assert parameter is networks[8].get_parameter(name)
        assert torch.equal(parameter, before[name])
    shared(torch.randn(4, 1, 16, 16)).sum().backward()
    assert networks[8][0].weight.grad is not None
    assert (int(networks[8][1].num_batches_tracked), int(networks[16][1].num_batches_tracked)) == (0, 1)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(shared.eval()(x), networks[8](x))


def test_a_copy_leaves_what_the_others_share() -> None:
    networks = {size: net() for size in (8, 16)}
    SharedSizes(networks)
    alone = copy.deepcopy(networks[16])
    with torch.no_grad():
        alone[0].weight.zero_()
    assert networks[16][0].weight.any()
    assert networks[16][0].weight is networks[8][0].weight


def test_a_parameter_that_a_network_uses_twice_stays_one() -> None:
    def twice() -> nn.Module:
        first, second = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)
        second.weight = first.weight
        return nn.Sequential(first, second)

    networks = {size: twice() for size in (8, 16)}
    assert len(list(SharedSizes(networks).parameters())) == 3
    assert networks[16][1].weight is networks[8][0].weight


def test_what_one_network_uses_twice_another_may_keep_apart() -> None:
    tied, apart = (nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)) for _ in range(2))
    tied[1].weight = tied[0].weight
    assert difference({8: tied, 16: apart}) == ""
    SharedSizes({8: tied, 16: apart})
    assert apart[1].weight is apart[0].weight is tied[0].weight


def test_networks_that_cannot_share_say_which_parameter() -> None:
    assert difference({8: net(), 16: net()}) == ""
    more = nn.Sequential(*net(), nn.Linear(3, 3))
    assert difference({8: net(), 16: more}) == "6.weight is absent at 8 px and (3, 3) at 16 px"
    with pytest.raises(UsageError, match=r"cannot share weights: 6\.weight is absent at 8 px"):
        SharedSizes({8: net(), 16: more})
    with pytest.raises(UsageError, match="one network at least"):
        difference({})


def test_sizes_take_turns(data: ImageData) -> None:
    mixed = MixedSizes.of(data, (8, 12, 16))
    seen: Counter[int] = Counter()
    for epoch in range(3):
        sizes = [x.shape[-1] for x, _ in mixed.batches("train", 16, epoch=epoch)]
        assert tuple(sizes) == mixed.order("train", 16, epoch)
        assert len(sizes) == mixed.steps("train", 16) == data.sizes["train"] // 16
        seen.update(sizes)
    assert max(seen.values()) - min(seen.values()) <= 1  # round and round across the passes
    for sizes, size in (((8, 12, 16), 16), ((8, 12), 32), ((8, 12, 16, 20), 16)):
        order = [s for epoch in range(3) for s in MixedSizes.of(data, sizes).order("train", size, epoch)]
        assert order == [sizes[n % len(sizes)] for n in range(len(order))]


def test_no_image_comes_twice_in_a_pass() -> None:
    x = np.repeat(np.arange(0, 240, dtype=np.uint8), 16 * 16).reshape(240, 16, 16)  # each image has its own grey
    plain = load_data((x, np.arange(240) % 3), validation=0.2, test=0.2, augment=False)
    mixed = MixedSizes.of(plain, (8, 12, 16))
    greys, other = (torch.cat([x[:, 0, 0, 0] for x, _ in mixed.batches("train", 16, epoch=epoch)]) for epoch in (0, 1))
    assert len(greys.unique()) == len(greys) == 16 * mixed.steps("train", 16)
    assert not torch.equal(greys, other)
    small = [{float(v) for x, _ in mixed.batches("train", 16, epoch=e) if x.shape[-1] == 8 for v in x[:, 0, 0, 0]} for e in (0, 1)]
    assert small[0] != small[1]  # no image stays at one size
    seeded = [{float(v) for x, _ in mixed.batches("train", 16, seed=s) if x.shape[-1] == 8 for v in x[:, 0, 0, 0]} for s in (0, 1, 0)]
    assert seeded[0] == seeded[2] != seeded[1]
    assert next(iter(mixed.batches("train", 16, seed=1 << 50)))[0].shape[-1] == 8  # however large


def test_validation_is_that_of_the_data(data: ImageData) -> None:
    mixed = MixedSizes.of(data, (8, 16))
    ours, theirs = (torch.cat([x for x, _ in d.batches("validation", 16, image_size=12)]) for d in (mixed, data))
    assert torch.equal(ours, theirs)


def test_validation_joined_to_train_takes_turns_too(data: ImageData) -> None:
    batches = list(MixedSizes.of(data, (8, 16)).batches("train+validation", 16, image_size=12))
    assert [x.shape[-1] for x, _ in batches] == [8, 16] * 6
    assert 16 * len(batches) == data.sizes["train"] + data.sizes["validation"]


def test_a_pickle_keeps_the_sizes(data: ImageData) -> None:
    mixed = MixedSizes.of(data, (8, 16))
    again = pickle.loads(pickle.dumps(mixed))
    assert isinstance(again, MixedSizes)
    for ours, theirs in zip(again.batches("train", 16, seed=3), mixed.batches("train", 16, seed=3), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_what_cannot_be_is_refused_before_the_first_batch(data: ImageData) -> None:
    mixed = MixedSizes.of(data, (8, 16))
    for split, batch_size, text in (("nonsense", 16, "split must be one of"), ("train", 0, "batch_size must be at least 1, got 0")):
        with pytest.raises(UsageError, match=text):
            mixed.batches(split, batch_size)


def test_shared_weights_are_trained_at_a_rate_that_does_not_fall(data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TrainConfig] = []

    def spy(model: nn.Module, images: ImageData, config: TrainConfig, **options: Any) -> TrainingResult:
        asked.append(config)
        return train(model, images, config, **options)

    monkeypatch.setattr("capnas.mixed_sizes.train", spy)
    train_together({size: net() for size in (8, 16)}, data, replace(CONFIG, epochs=9, schedule="cosine", record=True), passes=1)
    (config,) = asked
    assert (config.schedule, config.epochs, config.record, config.lr) == ("constant", 1, False, CONFIG.lr)


def test_training_together_teaches_all_sizes_and_tells_what_it_took(data: ImageData) -> None:
    networks, told = {size: net() for size in (8, 16)}, []
    before = torch.get_rng_state()
    run = train_together(networks, data, CONFIG, passes=8, on_pass=lambda *numbers: told.append(numbers))
    assert torch.equal(torch.get_rng_state(), before)
    assert told == [(n, 8) for n in range(1, 9)]
    assert (run.passes, run.reason) == (8, "")
    assert sum(run.seen.values()) == pytest.approx(8)
    assert run.seen[8] == pytest.approx(run.seen[16], abs=1 / 9)
    accuracies = [evaluate(networks[size], data, "validation", image_size=size)["accuracy"] for size in (8, 16)]
    assert min(accuracies) > 0.6  # chance is a third
    assert networks[8][0].weight is networks[16][0].weight


def test_training_together_says_why_it_did_not(data: ImageData) -> None:
    assert train_together({8: net()}, data, CONFIG, passes=3).reason == "there is one size only"
    pair = {size: net() for size in (8, 16)}
    assert train_together(pair, data, CONFIG, passes=0).reason == "the cost allowed leaves no pass for it"
    assert pair[8][0].weight is not pair[16][0].weight
    nn.init.constant_(pair[8][0].weight, float("nan"))
    failed = train_together(pair, data, CONFIG, passes=3)
    assert (failed.passes, dict(failed.seen)) == (0, {})
    assert failed.reason.startswith("the training of shared weights ended: diverged, the loss is nan")


# at 4 px the second convolution reads 2, its first tap none
@pytest.mark.parametrize(("sizes", "used"), [((10, 12), True), ((12, 4), False)])
def test_how_to_compute_is_asked_at_the_sizes_that_are_trained(data: ImageData, sizes: tuple[int, int], used: bool) -> None:
    def strided() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

    assert data.image_size not in sizes
    networks = {size: strided() for size in sizes}
    settings = replace(CONFIG, epochs=1, amp="on", record=False)
    found = train(SharedSizes(networks), MixedSizes.of(data, sizes), settings, evaluate_on=None)
    assert (found.status, found.amp) == ("complete", used)
