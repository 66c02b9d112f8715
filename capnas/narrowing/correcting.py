"""Make up for removed channels: every dense layer refitted on what it now reads, batch norms measured again.

One pass over the calibration images in the order of the layers: each layer's weights are replaced, by least squares towards what the full
network's layer put out, before it runs; so the next layer is fitted on the outputs that it will really get (after He, Zhang and Sun,
arXiv 1707.06168, who refit layer by layer; the whole-network pass and the ridge towards the old weights are ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capnas.measures.narrowing import refit
from capnas.narrowing.calibration import Reading, hooked, input_rows


def correct(
    model: nn.Module,
    readings: Mapping[str, Reading],
    kept_outputs: Mapping[str, Tensor],
    norms: Mapping[str, str],
    images: Tensor,
    *,
    ridge: float = 1e-3,
    renew_norms: bool = True,
) -> None:
    """Refit a narrowed network in place, in eval mode.

    Args:
        model: narrowed, on the images' device.
        readings: of the full network, by layer.
        kept_outputs: per layer the output channels that stayed.
        norms: layer to the batch norm straight behind it.
        images: (N, C, H, W), the images of the readings.
        ridge: see `capnas.measures.narrowing.refit`.
        renew_norms: measure the mean and variance of every batch norm again on the refitted outputs.
    """

    def fit(name: str) -> Callable[..., None]:
        reading = readings[name]

        def hook(module: Any, args: Any) -> None:
            if name in done:
                return
            done.add(name)
            rows = input_rows(module, args[0], reading.index)
            targets = reading.outputs[:, kept_outputs[name].to(reading.outputs.device)]
            weight, bias = refit(rows, targets, module.weight.flatten(1), ridge=ridge)
            module.weight.copy_(weight.reshape(module.weight.shape))
            if module.bias is not None:
                module.bias.copy_(bias)
            elif name in norms:
                model.get_submodule(norms[name]).running_mean -= bias.float()  # type: ignore[operator]
            else:
                module.bias = nn.Parameter(bias.to(module.weight))

        return hook

    def renew(module: Any, args: Any) -> None:
        x = args[0]
        axes = [i for i in range(x.dim()) if i != 1]
        module.running_mean.copy_(x.mean(axes))
        module.running_var.copy_(x.var(axes, unbiased=False))

    done: set[str] = set()
    norm_names = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    fits, renewals = {n: fit(n) for n in readings}, dict.fromkeys(norm_names, renew) if renew_norms else {}
    with torch.no_grad(), hooked(fits, model, before=True), hooked(renewals, model, before=True):
        model(images)
