"""The cell space of NAS-Bench-201 (Dong & Yang, ICLR 2020) in plain torch: six edges, five operations, 15,625 cells.

A cell has four nodes; the edge from node s to node t > s carries one operation; a node is the sum of its edges and node 0 is the
cell's input. The network: a 3x3 conv, three stages of ``cells`` cells at 1, 2 and 4 times ``channels`` with a residual block that halves
the resolution between them, batch norm, ReLU, average pool, linear layer. The published networks have cells=5 and channels=16; the
default here is one cell a stage, a fifth of the cost.

Nothing is computed for an edge that no signal passes: one with the operation "none", one from a node without live input, one to a node
that the output does not read. Its weights exist nevertheless, because the published parameter counts include them (``dead_weights=False``
leaves them out). The published networks run such edges; there a conv behind zeros adds its batch norm's learned shift, a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import optuna
import torch
from torch import nn

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from, to), in the order of the architecture string


def space(
    trial: optuna.Trial,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    cells: int = 1,
    channels: int = 16,
    dead_weights: bool = True,
) -> nn.Module:
    """NAS-Bench-201: one of five operations on each of the six edges of a cell.

    Decision ``op_s_t`` is the operation on the edge from node s to node t. The benchmark has 5 ``cells`` a stage and 16 ``channels`` in the
    first stage.
    """
    operations = {edge: trial.suggest_categorical(f"op_{edge[0]}_{edge[1]}", OPERATIONS) for edge in EDGES}
    if image_size < 8:
        raise optuna.TrialPruned(f"two halvings of {image_size} px leave less than 2 px, at least 8 px are needed")
    return CellNet(operations, num_classes=num_classes, in_chans=in_chans, cells=cells, channels=channels, dead_weights=dead_weights)


def architecture_string(params: Mapping[str, str]) -> str:
    """The benchmark's name of the cell with these trial parameters.

    >>> architecture_string(parameters("|avg_pool_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|none~1|nor_conv_3x3~2|"))
    '|avg_pool_3x3~0|+|none~0|skip_connect~1|+|nor_conv_1x1~0|none~1|nor_conv_3x3~2|'
    """
    nodes = ("|".join(f"{params[f'op_{s}_{t}']}~{s}" for s, target in EDGES if target == t) for t in (1, 2, 3))
    return "+".join(f"|{node}|" for node in nodes)


def parameters(architecture: str) -> dict[str, str]:
    """The trial parameters of a cell given by the benchmark's name, the inverse of ``architecture_string``.

    >>> parameters("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")["op_0_3"]
    'skip_connect'
    """
    params = {}
    for target, node in enumerate(architecture.split("+"), start=1):
        for edge in node.strip("|").split("|"):
            operation, _, source = edge.partition("~")
            params[f"op_{source}_{target}"] = operation
    expected = [f"op_{s}_{t}" for s, t in EDGES]
    if list(params) != expected or not set(params.values()) <= set(OPERATIONS):
        raise ValueError(f"expected |op~0|+|op~0|op~1|+|op~0|op~1|op~2| with operations of {', '.join(OPERATIONS)}; got {architecture!r}.")
    return params


def live_edges(operations: Mapping[tuple[int, int], str]) -> tuple[tuple[int, int], ...]:
    """The edges on a path from the cell's input to its output."""
    passing = [edge for edge in EDGES if operations[edge] != "none"]
    reached, read = {0}, {3}
    for s, t in passing:  # EDGES are in the order of their targets, so one sweep each way is enough
        reached |= {t} if s in reached else set()
    for s, t in reversed(passing):
        read |= {s} if t in read else set()
    return tuple((s, t) for s, t in passing if s in reached and t in read)


class CellNet(nn.Module):
    """The macro skeleton around one cell; ``stem``, ``blocks`` (cells and residual blocks), ``norm``, ``fc``."""

    def __init__(
        self,
        operations: Mapping[tuple[int, int], str],
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        cells: int = 5,
        channels: int = 16,
        dead_weights: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 4 * channels
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        blocks: list[nn.Module] = []
        for width in (channels, 2 * channels, 4 * channels):
            if width > channels:
                blocks.append(Reduction(width // 2, width))
            blocks += [Cell(operations, width, dead_weights=dead_weights) for _ in range(cells)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Sequential(nn.BatchNorm2d(self.num_features), nn.ReLU())
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> (B, num_classes) logits."""
        return self.fc(self.forward_features(x).mean((2, 3)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) images -> the last feature map, (B, num_features, H / 4, W / 4), rounded up."""
        return self.norm(self.blocks(self.stem(x)))

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Name patterns of the stem and of the repeated units, as timm's models have them."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc


class Cell(nn.Module):
    """One cell at a fixed width."""

    def __init__(self, operations: Mapping[tuple[int, int], str], width: int, *, dead_weights: bool = True) -> None:
        super().__init__()
        self.live = live_edges(operations)
        built = [edge for edge in EDGES if edge in self.live or (dead_weights and operations[edge].startswith("nor_conv"))]
        self.edges = nn.ModuleDict({f"{s}_{t}": _operation(operations[s, t], width) for s, t in built})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum the live edges into each node; a cell without a path gives zeros."""
        nodes = {0: x}
        for s, t in self.live:
            y = self.edges[f"{s}_{t}"](nodes[s])
            nodes[t] = nodes[t] + y if t in nodes else y
        return nodes[3] if 3 in nodes else torch.zeros_like(x)


class Reduction(nn.Module):
    """The residual block between two stages: half the resolution, twice the width."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.conv_a = _conv(width, out_width, 3, stride=2)
        self.conv_b = _conv(out_width, out_width, 3)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(width, out_width, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_width, ceil(H / 2), ceil(W / 2))."""
        return self.shortcut(x) + self.conv_b(self.conv_a(x))


def _conv(width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(width, out_width, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(out_width))


def _operation(name: str, width: int) -> nn.Module:
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _conv(width, width, 1 if name == "nor_conv_1x1" else 3)
