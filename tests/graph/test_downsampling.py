"""Downsampling undone on paper against networks that were really changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from capnas._timm import timm
from capnas.candidates import count_cost
from capnas.graph.downsampling import macs_without, steps, without
from capnas.graph.structure import structure
from capnas.graph.tracing import trace


def resnet(model: nn.Module) -> None:
    model.conv1.stride = (1, 1)
    model.maxpool.stride = 1


def regnet(model: nn.Module) -> None:
    for name in ("s1.b1.conv2.conv", "s1.b1.downsample.conv"):
        model.get_submodule(name).stride = (1, 1)
    model.stem.conv.stride = (1, 1)


@pytest.mark.parametrize(("name", "change"), [("resnet10t", None), ("resnet18", resnet), ("regnety_002", regnet)])
def test_fields_and_cost_are_those_of_the_changed_network(name: str, change: Callable[[nn.Module], None] | None) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    graph = trace(model, (1, 3, 64, 64))
    found = steps(graph)
    assert [s.jump for s in found] == [1, 2, 4, 8, 16]
    if change is None:
        assert without(graph, ()) == graph
        assert macs_without(graph, ()) == structure(graph).macs == count_cost(model, (1, 3, 64, 64)).macs
        return
    predicted = structure(without(graph, found[:2]))
    change(model)
    real = trace(model, (1, 3, 64, 64))
    assert [s.jump for s in steps(real)] == [1, 2, 4]
    actual = structure(real)
    fields = {name: layer.receptive_field for name, layer in actual.layers.items() if layer.kind == "conv"}
    assert {name: predicted.layers[name].receptive_field for name in fields} == fields
    assert macs_without(graph, found[:2]) == pytest.approx(actual.macs, rel=2e-3)  # gates on pooled maps do not grow


def test_dense_networks_and_odd_strides_have_no_steps() -> None:
    assert steps(trace(nn.Linear(8, 2), (1, 8))) == ()
    assert steps(trace(nn.Conv2d(3, 4, 3, stride=(2, 1)), (1, 3, 16, 16))) == ()
    assert steps(trace(nn.ConvTranspose2d(3, 4, 3, stride=2), (1, 3, 16, 16))) == ()
    pooled = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1, stride=2))
    assert [(s.jump, s.layers) for s in steps(trace(pooled, (1, 3, 16, 16)))] == [(1, ("0",))]
