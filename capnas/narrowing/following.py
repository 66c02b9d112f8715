"""Torch-Pruning's dependency graph, followed to an end where it would find none itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from capnas.errors import MissingDependencyError

_DETOURS = 10  # times that a group may pass each dependency of the network; those of ordinary networks pass it once


def torch_pruning() -> Any:
    """Torch-Pruning, or the advice to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(f"narrowing needs Torch-Pruning ({error}): pip install 'capnas[prune]'.") from error
    return torch_pruning


def followed(graph: Any, widest: int) -> Iterator[tuple[Any, bool]]:
    """The groups of a dependency graph, and whether each is whole.

    Where channels are sliced and joined block after block, each path brings another part of them and the paths multiply; where positions
    are folded into channels, a channel becomes thousands. Such a group is cut short, by steps and not by time: the same on every machine.

    Args:
        graph: a built ``torch_pruning.DependencyGraph``; changed.
        widest: channels of the network's widest layer, of which no group can hold more at one place.
    """
    mappings = {id(d.index_mapping): d.index_mapping for node in graph.module2node.values() for d in node.dependencies}
    limit, steps = _DETOURS * len(mappings), 0

    def count(indices: list[Any]) -> list[Any]:
        nonlocal steps
        steps += 1 if len(indices) <= widest else limit + 1
        return indices if steps <= limit else []  # without channels it goes no further

    for mapping in mappings.values():
        mapping.append(count)
    for group in graph.get_all_groups():
        yield group, steps <= limit
        steps = 0
