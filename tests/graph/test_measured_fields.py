"""Fields and jumps of the walk against the pixels whose light arrives, for maps whose neighbours are not a whole stride apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from capnas.graph.structure import LayerStructure, structure
from capnas.graph.tracing import trace


def last_layer(net: nn.Module, size: int) -> LayerStructure:
    return list(structure(trace(net, (1, 1, size, size))).layers.values())[-1]


def reached(net: nn.Module, size: int) -> tuple[tuple[int, int], Tensor]:
    """Witness: the most rows and columns, first to last, whose light arrives at one output unit, and the first row for each unit."""
    for p in net.parameters():
        nn.init.uniform_(p, 0.5, 1.0)  # nothing cancels
    one_pixel = torch.eye(size * size).view(-1, 1, size, size)
    with torch.no_grad():
        out = net(one_pixel)
    lit = (out > 0).view(size, size, *out.shape[1:])
    rows, columns = (lit.any(1 - i).movedim(0, -1).int() for i in (0, 1))
    first, last = rows.argmax(-1), size - 1 - rows.flip(-1).argmax(-1)
    left, right = columns.argmax(-1), size - 1 - columns.flip(-1).argmax(-1)
    return (int((last - first).max()) + 1, int((right - left).max()) + 1), first


class ByHand(nn.Module):
    """Pixels into channels, or channels into pixels, by views as many models write it."""

    def __init__(self, factor: int, *, down: bool) -> None:
        super().__init__()
        self.factor, self.down = factor, down

    def forward(self, x: Tensor) -> Tensor:
        r, (b, c, h, w) = self.factor, x.shape
        if self.down:
            return x.view(b, c, h // r, r, w // r, r).permute(0, 1, 3, 5, 2, 4).reshape(b, c * r * r, h // r, w // r)
        return x.view(b, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // r**2, h * r, w * r)


def conv(kernel: int, inputs: int = 1, outputs: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False, **options)


BETWEEN = {  # nets, the field and the jump that are measured
    "shuffle": (nn.Sequential(conv(1, 1, 4), nn.PixelShuffle(2), conv(3)), 2, 0.5),
    "shuffle by hand": (nn.Sequential(conv(1, 1, 4), ByHand(2, down=False), conv(3)), 2, 0.5),
    "shuffle and pad": (nn.Sequential(conv(1, 1, 4), nn.PixelShuffle(2), nn.ZeroPad2d(1), conv(5)), 3, 0.5),
    "shuffle by three": (nn.Sequential(conv(3, 1, 9), nn.PixelShuffle(3), conv(3)), 4, 1 / 3),
    "unshuffle": (nn.Sequential(nn.PixelUnshuffle(2), conv(3, 4)), 6, 2),
    "unshuffle by hand": (nn.Sequential(ByHand(2, down=True), conv(3, 4)), 6, 2),
    "unshuffle, mixed later": (nn.Sequential(nn.PixelUnshuffle(2), conv(3, 4, 4, groups=4, stride=2), conv(1, 4)), 6, 4),
    "there and back": (nn.Sequential(nn.PixelUnshuffle(2), nn.ReLU(), nn.PixelShuffle(2), conv(3)), 3, 1),
    "nearest": (nn.Sequential(nn.Upsample(scale_factor=2), conv(2)), 2, 0.5),
    "transposed k2 s2": (nn.Sequential(nn.ConvTranspose2d(1, 1, 2, stride=2, bias=False), conv(2)), 2, 0.5),
    "transposed k4 s2": (nn.Sequential(nn.ConvTranspose2d(1, 1, 4, stride=2, bias=False), conv(3), conv(2)), 4, 0.5),
    "transposed k5 s3": (nn.Sequential(nn.ConvTranspose2d(1, 1, 5, stride=3, bias=False), conv(3)), 3, 1 / 3),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_fields_and_jumps_equal_what_is_measured(case: str) -> None:
    net, field, jump = BETWEEN[case]
    layer = last_layer(net, 24)
    seen, first = reached(net, 24)
    assert seen == (field, field)
    assert layer.receptive_field == ((field, field),) * 2
    edge = len(first[0]) // 4  # past the padding
    inside = first[0, edge:-edge, 2]
    steps = min(12, len(inside) - 1)  # over twelve units every phase comes round
    assert (inside[steps] - inside[0]).item() / steps == pytest.approx(jump)
    assert layer.jump == pytest.approx((jump, jump))


@pytest.mark.parametrize(
    ("net", "size", "field"),
    [
        (nn.Sequential(nn.Unfold(3, stride=3), nn.Linear(9, 1, bias=False)), 9, 7),  # the same place in every window
        (nn.Sequential(nn.Unfold(3, stride=2), nn.Conv1d(9, 1, 1, bias=False)), 9, 3),
        (nn.Sequential(nn.Unfold(2, dilation=3), nn.Conv1d(4, 1, 1, bias=False)), 9, 4),
        (nn.Sequential(nn.Unfold(3, stride=3), nn.Unflatten(2, (3, 3)), conv(2, 9)), 9, 6),
        (nn.Sequential(conv(1), nn.AdaptiveAvgPool2d(7), conv(1)), 9, 3),
        (nn.Sequential(conv(1), nn.AdaptiveMaxPool2d(3), conv(1)), 5, 3),
        (nn.Sequential(conv(1), nn.AdaptiveAvgPool2d(7), conv(1)), 5, 2),  # more windows than pixels
        (nn.Sequential(conv(1), nn.AdaptiveAvgPool2d(4), conv(1)), 8, 2),
        (nn.Sequential(nn.PixelUnshuffle(2), conv(3, 4, 4, groups=4)), 12, 5),  # each channel by itself
    ],
)
def test_windows_equal_what_is_measured(net: nn.Module, size: int, field: int) -> None:
    assert reached(net, size)[0] == (field, field)
    assert last_layer(net, size).receptive_field == ((field, field),) * 2


def test_fractions_do_not_add_up_over_layers() -> None:
    net = nn.Sequential(nn.Upsample(scale_factor=4), *(conv(2) for _ in range(9)))
    seen, _ = reached(net, 6)
    assert [x.receptive_field[0][1] for x in structure(trace(net, (1, 1, 6, 6))).layers.values()] == [2, 2, 2, 2, 3, 3, 3, 3, 4]
    assert seen == (4, 4)


def test_the_path_count_of_adaptive_pooling_is_that_of_its_narrowest_window() -> None:
    report = structure(trace(nn.AdaptiveAvgPool2d(7), (1, 1, 9, 9)))
    assert report.log2_paths == 2.0


class Gated(nn.Module):
    """The gate of ``nn.GLU`` in its parts."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.dim)
        return a * torch.sigmoid(b)


@pytest.mark.parametrize(
    ("before", "after", "dim", "shape", "paths"),
    [
        (nn.Linear(3, 8), nn.Linear(4, 4), -1, (1, 3), (3 + 3) * 4),
        (nn.Conv2d(4, 6, 3), nn.Conv2d(3, 2, 1), 1, (2, 4, 8, 8), (36 + 36) * 3),
        (nn.Identity(), nn.Conv2d(2, 2, 1), 1, (1, 4, 8, 8), 2 * 2),  # no layer before it
    ],
)
def test_gated_linear_units_are_a_split_an_activation_and_a_gate(
    before: nn.Module, after: nn.Module, dim: int, shape: tuple[int, ...], paths: int
) -> None:
    whole, parts = (structure(trace(nn.Sequential(before, gate, after), shape)) for gate in (nn.GLU(dim), Gated(dim)))
    assert whole == parts
    assert 2**whole.log2_paths == pytest.approx(paths)
    assert whole.complexity > 0
