"""One set of weights trained at several image sizes at once: each batch at another size, each size with its own batch statistics.

Weights shared between sizes with batch normalization kept apart are those of resolution-switchable networks (Wang et al., ECCV 2020, arXiv
2007.09558). They keep its affine parameters apart too and distil; here only the running statistics are a size's own. What the sizes have in
common is learned once and paid for once, so that a short training at each size starts from a mature network.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capnas.data import Augment, ImageData
from capnas.data.batching import Batches
from capnas.errors import UsageError
from capnas.training import TrainConfig, train


class SharedSizes(nn.Module):
    """Networks for several image sizes with the same parameters; a batch goes to the network of its size.

    Buffers stay each network's own: running statistics, and tables that depend on the size.

    Args:
        networks: by size in pixels, at least one; all but the first lose their own parameters to the first one's.

    Raises:
        UsageError: their parameters differ in names or shapes; see `difference`.

    >>> net = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> shared = SharedSizes({8: net(), 16: net()})
    >>> len(list(shared.parameters())), shared(torch.zeros(4, 1, 16, 16)).shape
    (4, torch.Size([4, 2]))
    """

    def __init__(self, networks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        if why := difference(networks):
            raise UsageError(f"these sizes cannot share weights: {why}.")
        self.networks = nn.ModuleDict({str(size): network for size, network in networks.items()})
        first, *others = self.networks.values()
        for name, parameter in first.named_parameters(remove_duplicate=False):
            path, _, key = name.rpartition(".")
            for other in others:
                setattr(other.get_submodule(path), key, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, size, size)."""
        return self.networks[str(x.shape[-1])](x)


def difference(networks: Mapping[int, nn.Module]) -> str:
    """Which parameter keeps networks for several sizes from sharing weights, or "".

    >>> difference({8: nn.Linear(64, 2), 16: nn.Linear(256, 2)})
    'weight is (2, 64) at 8 px and (2, 256) at 16 px'
    """
    if not networks:
        raise UsageError("sharing weights needs one network at least, got none.")
    shapes = {size: {n: tuple(p.shape) for n, p in net.named_parameters(remove_duplicate=False)} for size, net in networks.items()}
    first, *others = shapes
    for other in others:
        for name in {**shapes[first], **shapes[other]}:
            a, b = (shapes[size].get(name, "absent") for size in (first, other))
            if a != b:
                return f"{name} is {a} at {first} px and {b} at {other} px"
    return ""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedSizes(ImageData):
    """Images whose training batches take turns in size; a pass shows every image once, at one of the sizes.

    Attributes:
        turns: sizes in pixels in the order of the batches, round and round, across the passes.

    >>> from capnas.data import load_data
    >>> data = MixedSizes.of(load_data("fashion-mnist-12k"), (14, 28))
    >>> [x.shape[-1] for x, y in data.batches("train", 2000)]
    [14, 28, 14, 28]
    """

    turns: tuple[int, ...]

    @classmethod
    def of(cls, data: ImageData, sizes: tuple[int, ...]) -> MixedSizes:
        """The same images."""
        return cls(**_fields(data), turns=sizes)

    def __reduce__(self) -> Any:
        return MixedSizes.of, (ImageData(**_fields(self)), self.turns)

    def order(self, split: str, batch_size: int, epoch: int) -> tuple[int, ...]:
        """Sizes of the batches of a pass.

        >>> from capnas.data import load_data
        >>> MixedSizes.of(load_data("fashion-mnist-12k"), (14, 20, 28)).order("train", 2000, epoch=1)
        (20, 28, 14, 20)
        """
        count = self.steps(split, batch_size)
        return tuple(self.turns[(epoch * count + number) % len(self.turns)] for number in range(count))

    def shares(self, batch_size: int, passes: int) -> dict[int, float]:
        """By size, how many of so many passes from the first on are spent at it: its share of the batches.

        >>> from capnas.data import load_data
        >>> MixedSizes.of(load_data("fashion-mnist-12k"), (14, 20, 28)).shares(2000, passes=2)
        {14: 0.75, 20: 0.75, 28: 0.5}
        """
        seen = Counter(size for number in range(passes) for size in self.order("train", batch_size, number))
        return {size: count / self.steps("train", batch_size) for size, count in seen.items()}

    def training_shapes(self, image_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """As `ImageData.training_shapes`: those of the sizes that take turns, the images' own only if it is one of them."""
        return tuple((self.in_chans, size, size) for size in dict.fromkeys(self.turns))

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        epoch: int = 0,
        seed: int = 0,
        augment: bool | Augment | None = None,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
    ) -> Batches:
        """As `ImageData.batches`; for ``train`` and ``train+validation`` the sizes are those of `order` and ``image_size`` is ignored."""
        options: dict[str, Any] = {"epoch": epoch, "seed": seed, "augment": augment, "device": device}
        alike = super().batches(split, batch_size, image_size=image_size, **options)  # refuses what cannot be, and reads nothing yet
        return self._in_turn(split, batch_size, options) if "train" in split.split("+") else alike

    def _in_turn(self, split: str, batch_size: int, options: dict[str, Any]) -> Batches:
        epoch, positions = options["epoch"], self._positions(split)
        order = self.order(split, batch_size, epoch)
        generator = torch.Generator().manual_seed((options["seed"] * 1_000_003 + epoch) % (1 << 63))
        chunks = positions[torch.randperm(len(positions), generator=generator)].split(batch_size)
        passes = {}
        for size in dict.fromkeys(order):
            chosen = torch.cat([chunk for chunk, turn in zip(chunks, order) if turn == size])
            part = ImageData(**_fields(self) | {"index": {**self.index, "train": chosen}})
            passes[size] = part.batches("train", batch_size, image_size=size, **options)
        for size in order:
            yield next(passes[size])


def _fields(data: ImageData) -> dict[str, Any]:
    return {f.name: getattr(data, f.name) for f in dataclasses.fields(ImageData)}


@dataclass(frozen=True, kw_only=True)
class SharedRun:
    """What `train_together` did.

    Attributes:
        passes: over the images, each image at one size a pass; 0 where nothing was shared.
        seen: by size in pixels, how many of these passes were spent at it: the share of the batches.
        seconds: wall-clock.
        reason: why the sizes have no weights in common now, or "".
    """

    passes: int = 0
    seen: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""


def train_together(
    networks: Mapping[int, nn.Module],
    data: ImageData,
    config: TrainConfig,
    *,
    passes: int,
    on_pass: Callable[[int, int], None] | None = None,
) -> SharedRun:
    """Train networks for several image sizes in place as one set of weights, at a learning rate that does not fall.

    It stays high so that a training at one size can go on from there and let it fall. Networks that cannot share are left as they are,
    those of a training that failed are spoilt.

    Args:
        networks: by size in pixels.
        data: images.
        config: its epochs, schedule and record are ignored.
        passes: over the images.
        on_pass: told of each pass: its number, and of how many.

    >>> from capnas.data import load_data
    >>> data = load_data("fashion-mnist-12k")
    >>> nets = {size: nn.Sequential(nn.Flatten(), nn.Linear(size * size, 10)) for size in (4, 8)}
    >>> train_together(nets, data, TrainConfig(), passes=1).reason
    'the sizes cannot share weights: 1.weight is (10, 16) at 4 px and (10, 64) at 8 px'
    """
    if len(networks) < 2 or passes < 1:
        return SharedRun(reason="there is one size only" if len(networks) < 2 else "the cost allowed leaves no pass for it")
    if why := difference(networks):
        return SharedRun(reason=f"the sizes cannot share weights: {why}")

    def tell(number: int, *_: Any) -> None:
        if on_pass is not None:
            on_pass(number, passes)

    mixed = MixedSizes.of(data, tuple(networks))
    settings = dataclasses.replace(config, epochs=passes, schedule="constant", record=False)
    result = train(SharedSizes(networks), mixed, settings, evaluate_on=None, on_epoch=tell)
    reason = "" if result.status == "complete" else f"the training of shared weights ended: {result.status}, {result.reason}"
    passes = len(result.curve)
    return SharedRun(passes=passes, seen=mixed.shares(config.batch_size, passes), seconds=result.seconds, reason=reason)
