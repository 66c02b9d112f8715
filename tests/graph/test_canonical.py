from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable

import optuna
import pytest
import torch
from capnas.search_spaces.nasbench201 import Cell
from cases import Attention, CalledTwice, Functional, Residual, Shared, small_cnn
from torch import Tensor, nn

from capnas.candidates import Candidate, build_candidate
from capnas.graph.canonical import architecture_hash
from capnas.graph.tracing import trace
from capnas.spaces import load_space

SHAPE = (1, 6, 6, 6)


class Net(nn.Module):
    """Layers by name and a forward given as a function of them."""

    def __init__(self, forward: Callable, **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv(kernel: int = 3, groups: int = 1, bias: bool = True) -> nn.Module:
    return nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=groups, bias=bias)


def name(forward: Callable, shape: tuple[int, ...] = SHAPE, **layers: nn.Module) -> str:
    return architecture_hash(trace(Net(forward, **layers), shape))


def three(forward: Callable, drop: nn.Module | None = None) -> str:
    return name(forward, a=conv(1), b=conv(3), c=conv(5), act=nn.ReLU(), drop=drop or nn.Identity())


def written_halves(x: Tensor) -> tuple[Tensor, ...]:
    """Both halves of the channels, the first rectified in place: the other one is read from memory that was written since."""
    halves = x.chunk(2, 1)
    halves[0].relu_()
    return halves


SAME = {
    "names and order of definition": (
        name(lambda m, x: m.q(m.p(x)), p=conv(1), q=conv()),
        name(lambda m, x: m.a(m.b(x)), a=conv(), b=conv(1)),
    ),
    "order of summands": (three(lambda m, x: m.a(x) + m.b(x)), three(lambda m, x: m.b(x) + m.a(x))),
    "bracketing of a sum": (three(lambda m, x: (m.a(x) + m.b(x)) + m.c(x)), three(lambda m, x: m.b(x) + (m.c(x) + m.a(x)))),
    "sum() starts at zero": (three(lambda m, x: sum([m.a(x), m.b(x)])), three(lambda m, x: m.b(x) + m.a(x))),
    "order of factors": (three(lambda m, x: m.a(x) * m.b(x)), three(lambda m, x: m.b(x) * m.a(x))),
    "gate written first": (
        three(lambda m, x: m.a(x).mean((2, 3), True).sigmoid() * x),
        three(lambda m, x: x * m.a(x).mean((2, 3), True).sigmoid()),
    ),
    "dead code": (three(lambda m, x: m.a(x)), three(lambda m, x: (m.b(x), m.a(x))[1])),
    "in-place": (three(lambda m, x: m.a(x).relu()), three(lambda m, x: m.a(x).relu_())),
    "in-place sum": (three(lambda m, x: m.a(x).add_(x)), three(lambda m, x: x + m.a(x))),
    "copies": (three(lambda m, x: m.a(x)), three(lambda m, x: m.a(x.clone().detach()).contiguous() * 1)),
    "two spellings of a view": (three(lambda m, x: m.a(x).flatten(1)), three(lambda m, x: m.a(x).reshape(1, 36, 6).view(1, -1))),
    "functional or module": (three(lambda m, x: m.act(m.a(x))), three(lambda m, x: torch.relu(m.a(x)))),
    "drop rate of zero": (three(lambda m, x: m.drop(m.a(x)), nn.Dropout(0.0)), three(lambda m, x: m.a(x))),
    "computed twice or kept": (three(lambda m, x: m.a(x) + m.b(m.a(x))), three(lambda m, x: (lambda y: y + m.b(y))(m.a(x)))),
    "mirrored branches": (
        name(lambda m, x: m.c(m.a(x)) + (m.a(x) + m.b(x)), a=conv(), b=conv(), c=conv(1)),
        name(lambda m, x: (m.a(x) + m.b(x)) + m.c(m.b(x)), a=conv(), b=conv(), c=conv(1)),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_same_network_written_differently(case: str) -> None:
    assert SAME[case][0] == SAME[case][1]


DIFFERENT = [
    name(lambda m, x: m.a(x), a=conv()),
    name(lambda m, x: m.a(x), (1, 6, 8, 8), a=conv()),
    name(lambda m, x: m.a(x), a=conv(bias=False)),
    name(lambda m, x: m.a(x), a=conv(groups=2)),
    name(lambda m, x: m.a(x), a=conv(1)),
    name(lambda m, x: m.a(x), a=nn.Conv2d(6, 6, 3, padding=2, dilation=2)),
    name(lambda m, x: m.a(x) + m.a(x), a=conv()),
    name(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()),
    name(lambda m, x: m.a(m.a(x)), a=conv()),
    name(lambda m, x: m.b(m.a(x)), a=conv(), b=conv()),
    name(lambda m, x: m.a(x) * m.b(x), a=conv(), b=conv()),
    name(lambda m, x: m.a(x) - m.b(x), a=conv(), b=conv()),
    name(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(1)),
    name(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), a=conv(), b=conv(1)),
    name(lambda m, x: torch.add(m.b(x), m.a(x), alpha=2), a=conv(), b=conv(1)),
    name(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(), b=conv(1)),
    name(lambda m, x: torch.cat([m.b(x), m.a(x)], 1), a=conv(), b=conv(1)),
    name(lambda m, x: m.a(x) * 0.5, a=conv()),
    name(lambda m, x: m.a(x) * 0.25, a=conv()),
    name(lambda m, x: m.a(x).relu(), a=conv()),
    name(lambda m, x: m.a(x.relu()), a=conv()),
    name(lambda m, x: m.a(x).transpose(2, 3), a=conv()),
    name(lambda m, x: m.a(x).chunk(2, 1)[0], a=conv()),
    name(lambda m, x: m.a(x).chunk(2, 1)[1], a=conv()),
    name(lambda m, x: m.a(x).chunk(2, 1)[0].relu(), a=conv()),
    name(lambda m, x: m.a(x).chunk(2, 1)[1].relu(), a=conv()),
    name(lambda m, x: x + m.a(x), a=conv()),
    name(lambda m, x: x + m.d(m.a(x)), a=conv(), d=nn.Dropout(0.1)),
    name(lambda m, x: x + m.d(m.a(x)), a=conv(), d=nn.Dropout(0.2)),
    name(lambda m, x: x + m.a(m.d(x)), a=conv(), d=nn.Dropout(0.1)),
    name(lambda m, x: m.d(x) + m.a(x), a=conv(), d=nn.Dropout(0.1)),
    name(lambda m, x: torch.div(m.a(x), 1, rounding_mode="floor"), a=conv()),
    name(lambda m, x: written_halves(m.a(x))[1], a=conv()),
    *(name(lambda m, x, i=i: written_halves(m.a(x))[i].sigmoid(), a=conv()) for i in (0, 1)),
    *(name(lambda m, x, i=i: written_halves(m.a(x))[i].clone().tanh(), a=conv()) for i in (0, 1)),
    *(name(lambda m, x, i=i: torch.cat(written_halves(m.a(x))[:: 1 - 2 * i], 1), a=conv()) for i in (0, 1)),
    *(name(lambda m, x, i=i: written_halves(m.a(x))[0] + written_halves(m.a(x))[i], a=conv()) for i in (0, 1)),
    name(lambda m, x: m.d(m.b(m.c(m.a(x)))), a=conv(), b=conv(), c=Residual(6), d=nn.Dropout(0.1)),
    name(lambda m, x: m.b(m.c(m.d(m.a(x)))), a=conv(), b=conv(), c=Residual(6), d=nn.Dropout(0.1)),
]


def test_different_networks_differ() -> None:
    pairs = [(i, j) for i, j in itertools.combinations(range(len(DIFFERENT)), 2) if DIFFERENT[i] == DIFFERENT[j]]
    assert pairs == []


def test_hidden_drop_rate_of_fused_attention() -> None:
    plain, dropped = (architecture_hash(trace(Attention(drop=d), (1, 5, 8))) for d in (0.0, 0.1))
    assert plain != dropped

    def two(first: float, second: float) -> str:
        return architecture_hash(trace(nn.Sequential(Attention(drop=first), Attention(drop=second)), (1, 5, 8)))

    assert len({two(0.0, 0.1), two(0.1, 0.0), two(0.1, 0.1), two(0.0, 0.0)}) == 4


def test_hash_does_not_depend_on_weights_device_or_process() -> None:
    model = small_cnn(depth=2)
    value = architecture_hash(trace(model, (1, 3, 8, 8)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(1)
    assert architecture_hash(trace(model, (1, 3, 8, 8))) == value
    assert architecture_hash(trace(model.to("meta"), (1, 3, 8, 8))) == value
    assert architecture_hash(trace(CalledTwice(), (1, 6))) != architecture_hash(trace(Shared(), (1, 6)))
    # a fixed value: stored hashes must stay comparable from run to run (Python randomizes the hash of strings)
    assert architecture_hash(trace(nn.Identity(), (1, 2))) == architecture_hash(trace(nn.Sequential(), (1, 2)))
    assert len(architecture_hash(trace(Functional(), (1, 3, 16, 16)))) == 32


EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
SKIP, NONE, ONE, THREE, POOL = "skip_connect", "none", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"


def written_out(operations: tuple[str, ...]) -> str:
    """A cell as a formula, the smallest over all numberings of its convolutions: an independent witness by brute force."""
    nodes: dict[int, Counter] = {0: Counter({"x": 1})}
    for target in (1, 2, 3):
        nodes[target] = Counter()
        for (source, to), op in zip(EDGES, operations, strict=True):
            if to == target and op != NONE and nodes[source]:
                conv_edge = (source, to) if op in (ONE, THREE) else None
                term = (op, conv_edge, frozenset(nodes[source].items()))
                nodes[target].update(nodes[source] if op == SKIP else {term: 1})

    def convs(terms: Iterable) -> set:
        found = {t[1] for t in terms if t != "x" and t[1]}
        return found.union(*(convs(dict(t[2])) for t in terms if t != "x"))

    def formula(terms: Iterable, number: dict) -> str:
        parts = [f"{n}x" if t == "x" else f"{n}{t[0]}{number.get(t[1], '')}({formula(t[2], number)})" for t, n in terms]
        return "+".join(sorted(parts))

    edges = sorted(convs(nodes[3]))
    numberings = itertools.permutations(range(len(edges)))
    return min(formula(nodes[3].items(), dict(zip(edges, n, strict=True))) for n in numberings)


def cell(*operations: str) -> Candidate:
    trial = optuna.trial.FixedTrial({f"op_{s}_{t}": op for (s, t), op in zip(EDGES, operations, strict=True)})
    return build_candidate(load_space("nasbench201"), trial, num_classes=5, in_chans=3, image_size=16)


def test_cells_with_the_same_function() -> None:
    direct = cell(NONE, NONE, NONE, THREE, NONE, NONE).hash
    assert direct == cell(ONE, NONE, NONE, THREE, NONE, NONE).hash, "node 1 is read by nobody"
    assert direct == cell(NONE, POOL, NONE, THREE, NONE, NONE).hash, "node 2 is read by nobody"
    assert direct == cell(NONE, NONE, ONE, THREE, POOL, ONE).hash, "nodes 1 and 2 get nothing"
    assert direct == cell(SKIP, NONE, NONE, NONE, THREE, NONE).hash, "the same conv one node later"
    assert direct != cell(NONE, NONE, NONE, ONE, NONE, NONE).hash
    mirrored = cell(ONE, THREE, NONE, SKIP, POOL, SKIP).hash
    assert mirrored == cell(THREE, ONE, NONE, SKIP, SKIP, POOL).hash, "nodes 1 and 2 exchanged"
    assert mirrored != cell(THREE, ONE, NONE, SKIP, POOL, SKIP).hash


def test_cells_hash_alike_if_and_only_if_they_are_the_same_formula() -> None:
    generator = random.Random(0)
    few_convs = (SKIP, NONE, SKIP, NONE, POOL, ONE, THREE)  # so that equal cells are frequent
    cells = {tuple(generator.choice(few_convs) for _ in EDGES) for _ in range(150)}
    formulas: dict[str, set[str]] = {}
    with torch.device("meta"):
        for operations in cells:
            model = Cell(dict(zip(EDGES, operations, strict=True)), 4, dead_weights=False)
            formulas.setdefault(written_out(operations), set()).add(architecture_hash(trace(model, (1, 4, 6, 6))))
    assert len(formulas) < len(cells) - 20, "the sample must hold repetitions"
    assert all(len(hashes) == 1 for hashes in formulas.values())
    assert len(set.union(*formulas.values())) == len(formulas)
