"""Torch-Pruning's dependency graph, followed to an end where it would find none itself or would fail."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from capnas.errors import MissingDependencyError

_DETOURS = 10  # times that a group may pass each dependency of the network; those of ordinary networks pass it once
_FRAIL = ("update_concat_index_mapping", "update_reshape_index_mapping")
_REPEATED = "update_expand_index_mapping"
_SPLIT = "update_split_index_mapping"
_NEGATIVE = 2**63  # an axis counted from the end, as autograd keeps it


def torch_pruning() -> Any:
    """Torch-Pruning, or the advice to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(f"narrowing needs Torch-Pruning ({error}): pip install 'capnas[prune]'.") from error
    return torch_pruning


@contextmanager
def forgiving() -> Iterator[None]:
    """While this lasts, Torch-Pruning passes channels as they are where it divides by or adds a width that it could not infer.

    So it does at a split of which it counts more parts than it knows the sizes of. What it then follows wrongly is found where each group
    is tried. Its rule for repeated heads is left out: it forgets whose channels it maps. So does its merging of all paths to a layer, which
    keeps one channel of several that meet there, as the two halves that a gated linear unit multiplies: paths stay apart instead. A split
    behind an embedding of tokens or positions, which it takes for one of tokens, is one of channels if its axis is counted from the end.
    """
    from torch_pruning.dependency import index_mapping
    from torch_pruning.dependency.group import Group

    def forgive(rule: Callable[..., None]) -> Callable[..., None]:
        def apply(graph: Any, node: Any) -> None:
            with suppress(IndexError, TypeError, ZeroDivisionError):
                rule(graph, node)

        return apply

    def split(graph: Any, node: Any) -> None:
        if len(getattr(node.module, "offsets", None) or ()) > len(node.outputs):
            node.enable_index_mapping |= getattr(node.grad_fn, "_saved_dim", 0) > _NEGATIVE
            rules[_SPLIT](graph, node)

    instead = {_REPEATED: lambda graph, node: None, _SPLIT: split}
    names = (*_FRAIL, _REPEATED, _SPLIT)
    rules = {name: getattr(index_mapping, name) for name in names if hasattr(index_mapping, name)}  # not in every version
    merge = Group.add_and_merge
    try:
        for name, rule in rules.items():
            setattr(index_mapping, name, instead.get(name) or forgive(rule))
        Group.add_and_merge = Group.add_dep
        yield
    finally:
        for name, rule in rules.items():
            setattr(index_mapping, name, rule)
        Group.add_and_merge = merge


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
