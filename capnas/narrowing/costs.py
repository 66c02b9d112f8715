"""Multiply-accumulates and parameters of a network as a function of the widths of its groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capnas.candidates import count_cost
from capnas.layers import MEASURED
from capnas.narrowing.groups import CoupledGroup
from capnas.narrowing.selecting import place_width, wide_axis


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkCost:
    """Cost by module: what it costs now times the shares of its inputs and outputs that stay.

    Attributes:
        names: L modules that cost anything.
        macs, params: (L,) of each now, for one image.
        biases: (L,) which of these parameters are biases of layers that also read a group: they go with the outputs alone.
        steady: (L,) which of them stay: an attention's own, as its positions, which all its heads share.
        added: (L,) biases that refitting gives to layers that have none and no batch norm straight behind.
        inputs, outputs: (L, G) share of a module's inputs (outputs) that one unit of each group is.
        units: (G,) units now.
    """

    names: tuple[str, ...]
    macs: Tensor
    params: Tensor
    biases: Tensor
    steady: Tensor
    added: Tensor
    inputs: Tensor
    outputs: Tensor
    units: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, groups: Sequence[CoupledGroup], input_shape: tuple[int, ...], *, added: Sequence[str] = ()
    ) -> NetworkCost:
        """Count a network, `input_shape` with B = 1; `added` names the layers that refitting gives a bias."""
        layers = count_cost(model, input_shape).layers
        modules = dict(model.named_modules())
        place = {name: i for i, name in enumerate(layers)}
        inputs, outputs = (torch.zeros(len(layers), len(groups), dtype=torch.float64) for _ in range(2))
        biases, gained, steady = (torch.zeros(len(layers), dtype=torch.float64) for _ in range(3))
        for j, group in enumerate(groups):
            for port in group.ports:
                name = port.module if port.side != "param" else port.module.rpartition(".")[0]
                if name not in place:
                    continue
                module, b = modules[name], port.positions.shape[1]
                if port.side == "in":
                    if getattr(module, "groups", 1) == 1:  # in grouped convs the inputs go with the outputs
                        inputs[place[name], j] += b / place_width(model, modules, name, "in")
                elif port.side == "param":  # the module's other parameters stay
                    value = model.get_parameter(port.module)
                    outputs[place[name], j] += value.numel() * b / value.shape[wide_axis(value)] / layers[name].params
                else:
                    outputs[place[name], j] += b / place_width(model, modules, name, "out")
                if port.side == "out" and name.endswith(".qkv"):  # the attention's own products shrink with its heads
                    attention = name.rpartition(".")[0]
                    if attention in place:
                        outputs[place[attention], j] = 1 / group.units
                        steady[place[attention]] = layers[attention].params
        for name, i in place.items():
            if isinstance(modules[name], MEASURED):
                biases[i] = 0 if modules[name].bias is None else modules[name].bias.numel()
                gained[i] = place_width(model, modules, name, "out") if name in added else 0
        return cls(
            names=tuple(layers),
            macs=torch.tensor([float(c.macs) for c in layers.values()], dtype=torch.float64),
            params=torch.tensor([float(c.params) for c in layers.values()], dtype=torch.float64),
            biases=biases,
            steady=steady,
            added=gained,
            inputs=inputs,
            outputs=outputs,
            units=torch.tensor([float(g.units) for g in groups], dtype=torch.float64),
        )

    def shares(self, units: Tensor) -> Tensor:
        """Share of each module's MACs that stays, (N, L), for units per group (N, G)."""
        change = units.to(self.units) - self.units
        return (1 + change @ self.inputs.T) * (1 + change @ self.outputs.T)

    def planned_params(self, units: Tensor) -> Tensor:
        """Parameters of each module, (N, L), for units per group (N, G)."""
        outputs = 1 + (units.to(self.units) - self.units) @ self.outputs.T
        return self.steady + self.shares(units) * (self.params - self.biases - self.steady) + outputs * (self.biases + self.added)

    def total_macs(self, units: Tensor) -> Tensor:
        """MACs of whole networks, (N,), for units per group (N, G)."""
        return self.shares(units) @ self.macs

    def total_params(self, units: Tensor) -> Tensor:
        """Parameters of whole networks, (N,), for units per group (N, G)."""
        return self.planned_params(units).sum(1)

    def fixed_macs(self) -> dict[str, float]:
        """MACs of the modules that no group reaches, the costliest first; those without any are left out."""
        unreached = (self.inputs.abs().sum(1) + self.outputs.abs().sum(1)) == 0
        found = {n: float(macs) for n, macs, free in zip(self.names, self.macs, unreached) if free and macs > 0}
        return dict(sorted(found.items(), key=lambda item: -item[1]))
