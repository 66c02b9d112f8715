"""One name for every way of writing the same network: a canonical hash of its dataflow graph.

A Merkle hash from the input to the output, over a graph in which dead code, copies and spellings of one view are gone, sums are
multisets (a + b + c in any order and bracketing) and products commute. Parameters are numbered by their place in the graph, not by their
names, so that two layers that share a weight differ from two layers with a weight each.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from capnas.graph.dataflow import INPUT, Node, Trace

_COPIES = frozenset({"detach", "alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg"})
_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"})
_NEUTRAL_AT_SAME_SHAPE = _VIEWS | {"expand", "slice", "narrow"}
_COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default", "aten.minimum.default"})

_Source = tuple[str, str | int]  # ("node", index), ("parameter", name), ("input", ""), ("constant", "")
_Edge = tuple[str, _Source]  # what the reader knows of the argument: its role, shape, port


class _Term(NamedTuple):
    label: str
    edges: tuple[_Edge, ...]
    ordered: bool


def architecture_hash(trace: Trace) -> str:
    """A canonical hash of the architecture, 32 hexadecimal digits; equal for networks that compute and train alike.

    It depends on the input shape, operations, their attributes, the shapes and sharing of parameters, and rates that act in training alone
    (drop rates, which eval mode hides: see `Trace.training_only`). It does not depend on names, the order in which branches are written,
    parts that no output reads, or the values of parameters, buffers and outside tensors (so not on the initialization either). Two
    isomorphic graphs may get different hashes where parameters are shared across symmetric branches, and so may two operations of torch for
    one thing (transpose and permute, a mean and pooling to one); two different ones never get the same.

    >>> from torch import nn
    >>> from capnas.graph.tracing import trace
    >>> one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.ReLU())
    >>> two = nn.ModuleDict({"c": nn.Conv2d(3, 8, 3), "a": nn.ReLU(inplace=True), "unused": nn.Linear(9, 9)})
    >>> two.forward = lambda x: two.a(two.c(x))
    >>> architecture_hash(trace(one, (1, 3, 8, 8))) == architecture_hash(trace(two, (1, 3, 8, 8)))
    True
    """
    terms, resolved = _canonical_terms(trace)
    ends = enumerate(zip(trace.output, trace.output_ports, trace.output_places))
    outputs = [(f"out{place}:{port}" + (f"{view}" if view else ""), resolved[i]) for place, (i, port, view) in ends]
    reached = _reached(terms, outputs)
    numbers = _parameter_numbers(terms, outputs, *_colours(terms, reached, outputs))
    final = _fold(terms, reached, {name: f"parameter {number}" for name, number in numbers.items()})
    hidden = sorted(_hidden_rates(trace, resolved, final))
    return _digest(str(trace.input_shape), *(f"{role} {final[source]}" for role, source in outputs), "training only", *hidden)


def _canonical_terms(trace: Trace) -> tuple[dict[int, _Term], dict[int, _Source]]:
    """The live operations in canonical form, and for every live node the term (or input, or parameter) that its value is."""
    live = trace.live()
    terms: dict[int, _Term] = {}
    known: dict[_Term, _Source] = {}  # what is computed twice is one term
    resolved: dict[int, _Source] = {INPUT: ("input", "")}
    for node in (n for n in trace.nodes if n.index in live):
        edges = [_edge(node, k, resolved) for k in range(len(node.inputs))]
        kind, views = _kind(node), [view for view in node.input_places if view]  # of memory that was written through another view
        if edges and not views and _is_identity(node, kind):
            resolved[node.index] = edges[0][1]
            continue
        if kind in _VIEWS and edges and not views and node.input_ports[0] == 0:
            source = edges[0][1]
            if source[0] == "node" and (before := terms[int(source[1])]).label.startswith("view "):
                edges = list(before.edges)
            term = _Term(f"view {node.shape}", tuple(edges), True)
        elif _is_sum(node) and not views:
            term = _sum(node, [source for _, source in edges], terms)
        else:
            op = ".".join([*node.op.split(".")[:1], kind, *node.op.split(".")[2:]])
            label = f"{op} {sorted(node.attrs.items())} {node.shape} {node.dtype}" + (f" {node.input_places}" if views else "")
            ordered = op not in _COMMUTATIVE or node.attrs.get("alpha", 1) != 1 or bool(views)
            term = _Term(label, tuple(edges if ordered else sorted(edges, key=str)), ordered)
        resolved[node.index] = known.setdefault(term, ("node", node.index))
        terms[node.index] = term
    return terms, resolved


def _kind(node: Node) -> str:
    """`Node.base`, but of a view that reads the bytes of one type as another, which is no rearrangement."""
    return "view as dtype" if node.op == "aten.view.dtype" else node.base


def _edge(node: Node, k: int, resolved: dict[int, _Source]) -> _Edge:
    producer, name = node.inputs[k], node.input_params[k]
    source: _Source
    if producer is not None:
        source = resolved[producer]
    else:
        source = ("parameter", name) if name is not None else ("constant", "")
    role = "" if _kind(node) in ("add", "mul", "maximum", "minimum") else node.input_names[k]
    return f"{role} {node.input_shapes[k]} {node.input_ports[k]}", source


def _is_identity(node: Node, kind: str) -> bool:
    if "training_only" in node.attrs:
        return False
    same = node.shape == node.input_shapes[0] and len(node.shapes) == 1 and node.input_ports[0] == 0
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(kind, "none")
    scalar = len(node.inputs) == 1 and node.attrs.get("other", "other") == neutral and node.attrs.get("rounding_mode") is None
    relayout = node.op == "aten.as_strided_.default"  # a change of memory layout
    return same and (relayout or kind in _COPIES or kind in _NEUTRAL_AT_SAME_SHAPE or scalar)


def _is_sum(node: Node) -> bool:
    plain = node.op in ("aten.add.Tensor", "aten.add_.Tensor") and len(node.inputs) == 2 and node.attrs.get("alpha", 1) == 1
    return plain and node.input_shapes == (node.shape, node.shape) and node.input_ports == (0, 0)


def _sum(node: Node, sources: list[_Source], terms: dict[int, _Term]) -> _Term:
    label, count = f"sum {node.shape} {node.dtype}", Counter[_Source]()
    for source in sources:
        inner = terms[int(source[1])] if source[0] == "node" else None
        if inner is not None and inner.label == label:
            for role, part in inner.edges:
                count[part] += int(role)
        else:
            count[source] += 1
    return _Term(label, tuple(sorted(((str(times), part) for part, times in count.items()), key=str)), False)


def _reached(terms: dict[int, _Term], outputs: Iterable[_Edge]) -> list[int]:
    """Indexes of the terms that the outputs still need (sums have absorbed some), in the order of execution."""
    seen: set[int] = set()
    stack = [source for _, source in outputs]
    while stack:
        kind, index = stack.pop()
        if kind == "node" and index not in seen:
            seen.add(int(index))
            stack += [source for _, source in terms[int(index)].edges]
    return sorted(seen)


def _fold(terms: dict[int, _Term], reached: Iterable[int], parameters: dict[str | int, str]) -> dict[_Source, str]:
    """Hash every term from its label and its arguments' hashes."""
    done: dict[_Source, str] = {("input", ""): "input", ("constant", ""): "constant"}
    for index in reached:
        term = terms[index]
        parts = [f"{role} {done.get(source) or parameters.get(source[1], 'parameter')}" for role, source in term.edges]
        done["node", index] = _digest(term.label, *(parts if term.ordered else sorted(parts)))
    return done


def _colours(terms: dict[int, _Term], reached: list[int], outputs: Iterable[_Edge]) -> tuple[dict[_Source, str], dict[_Source, str]]:
    """What lies before each term, and what lies behind it: together they tell apart arguments whose order has no meaning."""
    before, readers = _fold(terms, reached, {}), dict[_Source, list[str]]()
    for role, source in outputs:
        readers.setdefault(source, []).append(role)
    behind: dict[_Source, str] = {}
    for index in reversed(reached):
        behind["node", index] = _digest(*sorted(readers.get(("node", index), [])))
        for place, (role, source) in enumerate(terms[index].edges):
            text = f"{behind['node', index]} {before['node', index]} {role} {place if terms[index].ordered else '*'}"
            readers.setdefault(source, []).append(text)
    return before, {**{source: _digest(*sorted(texts)) for source, texts in readers.items()}, **behind}


def _parameter_numbers(
    terms: dict[int, _Term], outputs: list[_Edge], before: dict[_Source, str], behind: dict[_Source, str]
) -> dict[str | int, int]:
    """Number the parameters by a walk back from the outputs that does not depend on names or the order of writing."""
    numbers: dict[str | int, int] = {}
    seen: set[_Source] = set()
    stack = [source for _, source in reversed(outputs)]
    while stack:
        source = stack.pop()
        if source in seen:
            continue
        seen.add(source)
        if source[0] == "parameter":
            numbers[source[1]] = len(numbers)
        elif source[0] == "node":
            term = terms[int(source[1])]
            edges = term.edges if term.ordered else sorted(term.edges, key=lambda e: (e[0], before.get(e[1], ""), behind.get(e[1], "")))
            stack += [part for _, part in reversed(edges)]
    return numbers


def _hidden_rates(trace: Trace, resolved: dict[int, _Source], final: dict[_Source, str]) -> Iterable[str]:
    """Rates that left no node, each with the last live value of the module (or else of its parent) that holds it."""
    for name, rates in trace.training_only.items():
        scope = name if name in trace.modules else name.rpartition(".")[0]
        inside = [
            n.index for n in trace.nodes if n.index in resolved and (not scope or n.module == scope or n.module.startswith(f"{scope}."))
        ]
        if inside:
            values = (final[resolved[i]] for i in reversed(inside) if resolved[i] in final)
            yield f"{rates} {next(values, '')}"


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()
