"""Make up for removed channels: every dense layer refitted on what it now reads, batch norms moved along with their inputs.

One pass over the calibration images in the order of the layers: each layer's weights are replaced, by least squares towards what the full
network's layer put out, before it runs; so the next layer is fitted on the outputs that it will really get (after He, Zhang and Sun,
arXiv 1707.06168, who refit layer by layer; the whole-network pass and the ridge towards the old weights are ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capnas.measures.narrowing import moved_norm, refit
from capnas.narrowing.calibration import NormInputs, Reading, input_rows, matrix, set_matrix
from capnas.norms import channel_moments
from capnas.recording import hooked


def correct(
    model: nn.Module,
    readings: Mapping[str, Reading],
    kept_outputs: Mapping[str, Tensor],
    norms: Mapping[str, str],
    images: Tensor,
    *,
    before: Mapping[str, NormInputs],
) -> None:
    """Refit a narrowed network in place.

    Args:
        model: narrowed, in eval mode on the images' device.
        readings: of the full network, by layer.
        kept_outputs: per layer the output channels that stayed.
        norms: layer to the batch norm straight behind it.
        images: (N, C, H, W), the images of the readings.
        before: what each batch norm read in the full network, of the channels that stayed; its running mean and variance move by the
            difference (`capnas.measures.narrowing.moved_norm`).
    """

    def fit(name: str) -> Callable[..., None]:
        reading = readings[name]

        def hook(module: Any, args: Any) -> None:
            if name in done:
                return
            done.add(name)
            rows = input_rows(module, args[0], reading.index, reading.places)
            targets = reading.outputs[:, kept_outputs[name].to(reading.outputs.device)]
            weight, bias = refit(rows, targets, matrix(module))
            set_matrix(module, weight)
            if module.bias is not None:
                module.bias.copy_(bias)
            elif norms.get(name) not in before:  # a norm straight behind takes up the mean instead
                module.bias = nn.Parameter(bias.to(module.weight))

        return hook

    def move(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if name not in done:
                done.add(name)
                mean, variance = moved_norm(
                    (module.running_mean, module.running_var), before[name], channel_moments(args[0]), eps=module.eps
                )
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance)

        return hook

    done: set[str] = set()
    fits, moves = {n: fit(n) for n in readings}, {n: move(n) for n in before}
    with torch.no_grad(), hooked(fits, model, before=True), hooked(moves, model, before=True):
        model(images)
