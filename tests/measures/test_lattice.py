from __future__ import annotations

import random

import pytest
import torch

from capnas.measures.lattice import Lattice


def layouts() -> dict[str, tuple[torch.Tensor, int]]:
    maps = torch.arange(40 * 6 * 12 * 12.0).view(40, 6, 12, 12)
    return {
        "maps": (maps, 1),
        "channels last": (maps.contiguous(memory_format=torch.channels_last), 1),
        "part of a wider map": (torch.arange(40 * 9 * 144.0).view(40, 9, 12, 12)[:, 2:8], 1),
        "tokens": (maps.view(40, 6, 144).transpose(1, 2), -1),
        "windows that no view flattens": (maps[:, :, ::2, ::2].permute(0, 2, 3, 1), -1),
        "vectors": (torch.arange(240.0).view(40, 6), -1),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("budget", [None, 10_000, 700, 90, 1])
def test_rows_are_those_of_the_lattice_whatever_the_layout(layout: str, budget: int | None) -> None:
    tensor, axis = layouts()[layout]
    lattice = Lattice(tensor, axis, budget)
    found = lattice.of(tensor, random.Random(1))
    every = tensor.movedim(axis, 0).reshape(6, -1)
    assert (lattice.width, lattice.rows) == (6, every.shape[1])
    rows = found.reshape(6, -1)
    index = (every[0][None] == rows[0][:, None]).nonzero()[:, 1]
    assert len(index) == rows.shape[1]  # numbers occur once, so the first feature tells which rows were read
    assert torch.equal(rows, every[:, index])
    wanted = every.shape[1] if budget is None else min(budget, every.shape[1])
    assert rows.shape[1] >= 0.5 * wanted
    if layout not in ("maps", "channels last", "part of a wider map"):  # there steps are lowered until no divisor is shared with a line
        assert rows.shape[1] <= 2 * wanted + 6


def test_every_position_is_read_in_time_and_no_column_alone() -> None:
    tensor = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    lattice, chance = Lattice(tensor, 1, 32), random.Random(0)
    once = lattice.of(tensor, chance)[0].flatten()
    assert len({int(v) % 8 for v in once}) == 8
    seen = {float(v) for _ in range(60) for v in lattice.of(tensor, chance)[0].flatten()}
    assert seen == set(tensor[:, 0].flatten().tolist())


def test_every_sample_is_read_in_time() -> None:
    tensor = torch.arange(64.0)[:, None, None, None].expand(64, 3, 2, 2).contiguous()
    lattice, chance = Lattice(tensor, 1, 16), random.Random(0)
    assert {float(v) for _ in range(60) for v in lattice.of(tensor, chance)[0].flatten()} == set(range(64))


def test_the_same_seed_reads_the_same() -> None:
    tensor = torch.randn(40, 4, 9, 9)
    lattice = Lattice(tensor, 1, 100)
    assert torch.equal(lattice.of(tensor, random.Random(3)), lattice.of(tensor, random.Random(3)))
