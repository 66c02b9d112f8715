"""Streams that linear layers alone write and read, turned so that a channel is a direction; the network computes the same.

Where nothing but norms of fixed moments, sums and views stands between the layers that write the channels x of a group and those that read
them, T x can stand in their place: writers put it out (T W), readers undo it (W T^-1). So it is at the linear bottlenecks of MobileNets and
EfficientNets (Sandler et al., arXiv 1801.04381). A subset of the channels loses more than the best directions of the same number; with T
from `capnas.measures.narrowing.principal_axes`, to remove a channel is to remove the direction that the readers miss least. Ashkboos et al.
(arXiv 2401.15024) cut streams of transformers at their principal components; batch norms, the choice by curvature and the trial that finds
such streams are ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from capnas.measures.narrowing import Reader, RemovalPath, principal_axes, removal_path, turned_reader
from capnas.measures.probing import cloned, untouched
from capnas.measures.singular import EXACT_EIGENVALUES
from capnas.narrowing.calibration import NormInputs, Reading, matrix, norm_inputs, refitted, set_matrix
from capnas.narrowing.groups import CoupledGroup, Port
from capnas.recording import hooked


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """Other coordinates of a stream.

    Attributes:
        axes: T (U, U); unit u becomes the coordinate that row u reads.
        back: its inverse.
        path: the order in which these coordinates are best removed.
    """

    axes: Tensor
    back: Tensor
    path: RemovalPath


def find_turns(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    readers: Sequence[Sequence[Reader]],
    readings: Mapping[str, Reading],
    norms: Mapping[str, str],
    example: Tensor,
) -> dict[str, Turn]:
    """The streams that can be turned, by group: each is tried on a copy, in which its readers and the network must put out what they did.

    Args:
        model: not changed.
        groups: of this model.
        readers: of each group, as `capnas.measures.narrowing.removal_path` takes them.
        readings: of the layers, see `capnas.narrowing.calibration.read_layers`.
        norms: layer to the batch norm straight behind it.
        example: (B, C, H, W) on the model's device.
    """
    modules = dict(model.named_modules())
    streams = [(g, given) for g, given in zip(groups, readers) if _may_turn(g, modules, readings, norms)]
    if not streams:
        return {}
    expected, found = _outputs(model, {"", *(p.module for g, _ in streams for p in g.readers())}, example), dict[str, Turn]()
    for group, given in streams:
        axes, back = principal_axes(*_as_read(given))
        trial = cloned(model, share=True).eval()
        turn_stream(trial, group, axes, back, norms)
        got = _outputs(trial, {"", *(p.module for p in group.readers())}, example)
        if all(_same(y, expected[name]) for name, y in got.items()):
            found[group.name] = Turn(axes=axes, back=back, path=removal_path([turned_reader(r, axes, back) for r in given]))
    return found


def _may_turn(group: CoupledGroup, modules: Mapping[str, Any], readings: Mapping[str, Reading], norms: Mapping[str, str]) -> bool:
    """Whether layers that are refitted in full alone hold the group's channels, and batch norms straight behind those that write them."""
    layers = {p.module for p in (*group.writers(), *group.readers())}
    if group.units > EXACT_EIGENVALUES or not layers <= readings.keys() or not all(refitted(modules[n]) for n in layers):
        return False
    behind = {norms.get(p.module) for p in group.writers()}
    return all(p.side == "in" or (p.positions.shape[1] == 1 and (p.side == "out" or _is_shift(p, modules, behind))) for p in group.ports)


def _is_shift(port: Port, modules: Mapping[str, Any], behind: Collection[str | None]) -> bool:
    """Whether it is a norm that a shift can stand for, with its scale in the layer before it."""
    norm: Any = modules.get(port.module)
    return port.module in behind and all(v is not None for v in (norm.running_mean, norm.weight, norm.bias))


def _as_read(readers: Sequence[Reader]) -> tuple[Tensor, Tensor]:
    """Covariance (U, U) of a stream, mean over its readers and their kernel positions, and what these make of it: the sum of W^T G W."""
    covariances, importances = list[Tensor](), list[Tensor]()
    for reader in readers:
        weight = reader.weight.double()
        curved = weight if reader.curvature is None else reader.curvature.double() @ weight
        for place in reader.columns.T:
            covariances.append(reader.covariance[place][:, place].double())
            importances.append(weight[:, place].T @ curved[:, place])
    return torch.stack(covariances).mean(0), torch.stack(importances).sum(0)


def turn_stream(model: nn.Module, group: CoupledGroup, axes: Tensor, back: Tensor, norms: Mapping[str, str]) -> None:
    """Put a stream into other coordinates, in place; a norm between its layers becomes a shift, its scale goes into the layer before it.

    Args:
        model: changed; parameters that it shares with a copy are replaced and not written.
        group: of this model.
        axes: T (U, U).
        back: its inverse.
        norms: layer to the batch norm straight behind it.
    """
    for port in group.writers():
        layer: Any = model.get_submodule(port.module)
        place, (scale, shift) = port.positions[:, 0], _behind(model, port, norms)
        bias = axes @ shift
        if port.module in norms:
            norm: Any = model.get_submodule(norms[port.module])
            for name, values in (("weight", 1.0), ("bias", bias), ("running_mean", 0.0), ("running_var", 1.0 - norm.eps)):
                _put(norm, name, place, values)
            bias = torch.zeros_like(bias)
        weight = matrix(layer).detach().double().clone()
        weight[place] = (axes * scale) @ weight[place]
        _replace(layer, weight)
        if layer.bias is not None:
            _put(layer, "bias", place, bias)
    for port in group.readers():
        layer = model.get_submodule(port.module)
        features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        weight = matrix(layer).detach().double().unflatten(1, (features, -1)).clone()
        for place in port.positions.T:
            weight[:, place] = torch.einsum("okt,ku->out", weight[:, place], back)
        _replace(layer, weight.flatten(1))


def _behind(model: nn.Module, port: Port, norms: Mapping[str, str]) -> tuple[Tensor, Tensor]:
    """What the norm behind a writer makes of the writer's products: their factor and, with the writer's bias, the constant, (U,) each."""
    layer: Any = model.get_submodule(port.module)
    place = port.positions[:, 0].to(layer.weight.device)
    shift = torch.zeros(len(place), dtype=torch.float64, device=place.device) if layer.bias is None else layer.bias.detach().double()[place]
    if port.module not in norms:
        return torch.ones_like(shift), shift
    norm: Any = model.get_submodule(norms[port.module])
    mean, variance, weight, bias = (v.detach().double()[place] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    scale = weight / (variance + norm.eps).sqrt()
    return scale, (shift - mean) * scale + bias


def turned_outputs(model: nn.Module, port: Port, axes: Tensor, norms: Mapping[str, str], outputs: Tensor) -> Tensor:
    """What a writer puts out in other coordinates, (S, O), from what it puts out in its own; before `turn_stream`."""
    layer: Any = model.get_submodule(port.module)
    place, (scale, _) = port.positions[:, 0], _behind(model, port, norms)
    own = outputs[:, place].double()
    if port.module in norms and layer.bias is not None:  # the norm holds it from then on
        own = own - layer.bias.detach().double()[place]
    turned = outputs.clone()
    turned[:, place] = (own @ (axes * scale).T).to(outputs)
    return turned


def settle_norms(model: nn.Module, groups: Sequence[CoupledGroup], images: Tensor) -> dict[str, NormInputs]:
    """Give the norms of turned streams the moments of what they read, so that a training starts where evaluation stands.

    Args:
        model: changed; it computes the same in eval mode.
        groups: whose streams were turned.
        images: (N, C, H, W) on the model's device.

    Returns:
        What each batch norm reads on the images.
    """
    moments = norm_inputs(model, images)
    for port in (p for g in groups for p in g.ports if p.side == "both"):
        norm: Any = model.get_submodule(port.module)
        place = port.positions[:, 0]
        mean, variance = (v[place] for v in moments[port.module])
        bias = norm.bias.detach()[place] + mean
        for name, values in (("weight", (variance + norm.eps).sqrt()), ("bias", bias), ("running_mean", mean), ("running_var", variance)):
            _put(norm, name, place, values)
    return moments


def turn_streams(
    model: nn.Module,
    groups: Sequence[CoupledGroup],
    turns: Mapping[str, Turn],
    norms: Mapping[str, str],
    readings: Mapping[str, Reading],
    images: Tensor,
) -> tuple[dict[str, Reading], dict[str, NormInputs]]:
    """Turn the streams of several groups, in place.

    Args:
        model: changed; it computes the same in eval mode.
        groups: of this model, all of them in `turns`.
        turns: from `find_turns`.
        norms: layer to the batch norm straight behind it.
        readings: of the layers as they were.
        images: (N, C, H, W) of the readings.

    Returns:
        The readings with what the layers put out then, and what each batch norm reads.
    """
    found = dict(readings)
    for group in groups:
        turn = turns[group.name]
        for port in group.writers():
            outputs = turned_outputs(model, port, turn.axes, norms, found[port.module].outputs)
            found[port.module] = replace(found[port.module], outputs=outputs)
        turn_stream(model, group, turn.axes, turn.back, norms)
    return found, settle_norms(model, groups, images)


def _replace(layer: Any, weight: Tensor) -> None:
    """Another parameter with the weights of a `matrix`."""
    old = layer.weight
    layer.weight = nn.Parameter(torch.empty_like(old), requires_grad=old.requires_grad)
    with torch.no_grad():
        set_matrix(layer, weight.to(old))


def _put(module: Any, name: str, place: Tensor, values: Tensor | float) -> None:
    """Other values at some places of a parameter or buffer, which copies of the module may share."""
    old = getattr(module, name)
    new = old.detach().clone()
    new[place] = values.to(new) if isinstance(values, Tensor) else values
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _same(got: Tensor, expected: Tensor) -> bool:
    """Whether outputs differ by rounding alone, beside what they differ by from image to image: a bias may be most of them."""
    spread = float((expected - expected.mean(0)).abs().max())
    return spread > 0 and float((got - expected).abs().max()) <= 1e-3 * spread


def _outputs(model: nn.Module, names: Collection[str], x: Tensor) -> dict[str, Tensor]:
    """What each named layer puts out; of several calls the last."""
    found, labels = dict[str, Tensor](), {model.get_submodule(n): n for n in names}

    def note(module: nn.Module, args: Any, y: Tensor) -> None:
        found[labels[module]] = y

    with untouched(model), torch.no_grad(), hooked(dict.fromkeys(names, note), model):
        model(x)
    return found
