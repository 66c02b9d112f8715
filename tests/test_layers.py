"""Along which axis the outputs of blocks are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from capnas.layers import feature_axis
from capnas.recording import Recorder


def unit(width: int = 4) -> nn.Module:
    """One conv-activation step."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())


class Pair(nn.Module):
    """Two steps in a branch each, concatenated."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(unit(width), unit(width)), nn.Sequential(unit(width), unit(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


@pytest.mark.parametrize(
    ("shape", "widths", "channels_last", "axis"),
    [
        ((2, 112, 16, 16), {16, 96}, False, 1),  # concatenated, as many positions as a layer has channels
        ((2, 112, 16, 16), {16, 96}, True, -1), ((2, 16, 16, 112), {96}, False, -1), ((2, 16, 16, 64), {16, 64}, False, -1),
        ((2, 64, 16, 16), {16, 64}, False, 1), ((2, 5, 16, 16), {5, 16}, False, 1), ((2, 16, 16, 16), {16}, False, 1),
        ((2, 16, 16, 16), {16}, True, -1), ((2, 5, 7, 16), {16}, False, -1), ((2, 16, 5, 7), {16}, False, 1),
    ],
)  # fmt: skip
def test_square_images_tell_channels_from_positions(shape: tuple[int, ...], widths: set[int], channels_last: bool, axis: int) -> None:
    assert feature_axis(torch.zeros(shape), frozenset(widths), channels_last) == axis


def test_concatenated_outputs_are_read_along_their_channels() -> None:
    model = nn.Sequential(Pair(8), nn.Conv2d(16, 8, 1), Pair(8))
    with Recorder(model, reading="blocks", blocks="0|2") as recorder:
        model(torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [(r.width, r.positions) for r in recorder.pop("train").values()] == [(16, 64), (16, 64)]
