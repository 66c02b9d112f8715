"""Which layers the border speaks of, and the sizes that it rules out, against a search over all sizes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from capnas.errors import UsageError
from capnas.measures.borders import borderless, looking_layers, smallest_productive, unproductive_share, unusable
from capnas.measures.receptive import Field, LayerField, border_layers, whole, window


def chain(*layers: tuple[int, int]) -> list[LayerField]:
    found, field = [], Field()
    for number, (kernel, stride) in enumerate(layers):
        after = window(field, kernel, stride)
        found.append(LayerField(name=str(number), extent=(float(kernel),) * 2, before=(field, field), after=(after, after)))
        field = after
    return found


def test_smallest_productive_size_is_the_first_of_all_sizes_that_will_do() -> None:
    layers = chain((7, 2), (3, 2), (1, 1), (3, 1), (3, 2), (3, 1), (3, 1))
    assert looking_layers(layers) == ("0", "1", "3", "4", "5", "6")
    for share in (0.0, 0.2, 0.5, 1.0):
        slow = next(i for i in range(1, 500) if len(border_layers(layers, i)) <= share * 6)
        assert smallest_productive(layers, share) == slow
    assert looking_layers([replace(layers[0], learned=False), *layers[1:]]) == ("1", "3", "4", "5", "6")  # a pooling looks for nobody
    assert smallest_productive([]) == 1
    assert unproductive_share([], 1) == 0


def test_a_size_is_unusable_when_more_than_the_limit_is_past_the_border() -> None:
    layers = chain((3, 2), (3, 2), (3, 1), (3, 1))
    shares = {size: unproductive_share(layers, size) for size in range(1, 40)}
    assert set(shares.values()) == {0.0, 0.25, 0.5, 0.75}
    for size, limit in itertools.product(shares, (0.0, 0.3, 0.5, 1.0)):
        assert (unusable(layers, size, limit=limit) is not None) == (shares[size] > limit)
    assert unusable(layers, 2) == "3 of 4 layers see nothing new at 2 px, from 1 on; the network needs 3 px"
    with pytest.raises(UsageError, match=r"share of the layers in \[0, 1\], got 2"):
        unusable(layers, 8, limit=2)


def test_layers_that_see_everything_are_not_past_the_border() -> None:
    pooled = LayerField(name="gate", extent=(1.0, 1.0), before=(whole(Field()),) * 2, after=(whole(Field()),) * 2)
    layers = [*chain((3, 1)), pooled]
    assert looking_layers(layers) == ("0",)
    assert unusable(layers, 1) is None


def test_a_network_that_mixes_all_positions_has_no_border() -> None:
    everywhere = LayerField(name="mix", extent=(1.0, 1.0), before=(whole(Field()),) * 2, after=(whole(Field()),) * 2)
    assert borderless([*chain((16, 16)), *[everywhere] * 3])
    assert not borderless([*chain((3, 1), (3, 1)), everywhere])  # two convolutions and a classifier
    assert not borderless([*chain((3, 1), (3, 1), (3, 1)), *[everywhere] * 9])
    assert not borderless([])
    rows = LayerField(name="rows", extent=(1.0, 1.0), before=(whole(Field()), Field()), after=(whole(Field()), Field()))
    assert not borderless([*chain((16, 16)), *[rows] * 3])  # the columns are still apart
