"""The lossless-eigenspace experiment: project every layer but the head on its eigenspace and see what accuracy is lost.

Shenk et al., arXiv 2006.08679, claim that a trained network's layers can be restricted to the eigenspace that holds 99 % of the
variance without loss. The projection here is centred, P (x - mu) + mu, with P from the same centred covariance as saturation;
the control keeps the same number of random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capnas.layers import CONVS
from capnas.measures.probing import untouched, unwrap_model
from capnas.measures.saturation import THRESHOLD, Projection, lossless_projection, random_projection
from capnas.recording import DirectProducts, Recorder, hooked


@dataclass(frozen=True, kw_only=True)
class ProjectionResult:
    """Accuracy with and without projection, in [0, 1].

    Attributes:
        accuracy: of the network as it is.
        projected: with every layer but the head on its lossless eigenspace.
        random: with the same number of random directions per layer.
        threshold: share of the variance that each eigenspace keeps.
        kept: layer name to (k, width).
    """

    accuracy: float
    projected: float
    random: float
    threshold: float
    kept: Mapping[str, tuple[int, int]]

    @property
    def lost(self) -> float:
        """Accuracy lost by the projection, in points of one hundred."""
        return 100 * (self.accuracy - self.projected)


def head_names(model: nn.Module) -> set[str]:
    """Names of the classifier's modules: what timm's ``get_classifier`` returns, else the last linear layer.

    >>> head_names(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    {'2'}
    """
    names = {module: name for name, module in model.named_modules()}
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        heads = head if isinstance(head, (tuple, list)) else [head]
        found = {names[m] for h in heads if isinstance(h, nn.Module) for m in h.modules() if m in names}
        if found:
            return found
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {linear[-1]} if linear else set()


@contextmanager
def projected(model: nn.Module, projections: Mapping[str, Projection]) -> Iterator[None]:
    """Replace the outputs of named conv and linear layers by their projection while the context lasts (Shenk et al.).

    >>> layer = nn.Sequential(nn.Linear(2, 2))
    >>> flat = Projection(basis=torch.zeros(2, 0), mean=torch.tensor([3.0, 4.0]))
    >>> with projected(layer, {"0": flat}):
    ...     layer(torch.randn(1, 2)).tolist()
    [[3.0, 4.0]]
    """

    def hook(projection: Projection) -> Callable[..., Tensor]:
        def apply(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if isinstance(module, CONVS):
                axis = output.dim() - len(module.kernel_size) - 1
                return projection(output.movedim(axis, -1)).movedim(-1, axis)
            return projection(output)

        return apply

    hooks = {name: hook(p) for name, p in projections.items()}
    with hooked(hooks, model), DirectProducts(model, hooks):
        yield


def project_model(
    model: nn.Module,
    calibration: Iterable[Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> ProjectionResult:
    """Measure what the network loses when every layer but the head keeps only its eigenspace, after Shenk et al.

    Args:
        model: a trained classifier; left untouched.
        calibration: batches (B, C, H, W) on the model's device that give each layer's covariance, in eval mode.
        evaluate: accuracy in [0, 1] of the model passed to it.
        threshold: share of the variance to keep, in (0, 1].
        seed: of the random control.
    """
    model = unwrap_model(model)
    head = head_names(model)
    with untouched(model), torch.no_grad():
        with Recorder(model, reading="modules", values_per_call=None) as recorder:
            for batch in calibration:
                model(batch)
        records = {n: r for n, r in recorder.pop("eval").items() if n not in head and r.finite}
        eigenspaces = {n: lossless_projection(r.moments, threshold) for n, r in records.items()}
        controls = {n: random_projection(r.moments, eigenspaces[n].basis.shape[1], seed + i) for i, (n, r) in enumerate(records.items())}
        base = evaluate(model)
        with projected(model, eigenspaces):
            kept = evaluate(model)
        with projected(model, controls):
            random = evaluate(model)
    sizes = {name: (p.basis.shape[1], p.basis.shape[0]) for name, p in eigenspaces.items()}
    return ProjectionResult(accuracy=base, projected=kept, random=random, threshold=threshold, kept=sizes)
