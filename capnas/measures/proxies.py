"""Training-free baselines to compare capacity scores with: synflow, naswot, zico, snip, grad_norm, parameters and multiply-accumulates.

Each is a short function of a model and one batch, after its paper. The model is left as it was found (`capnas.measures.probing`). No
function raises for what a model computes: a value that cannot be had is a NaN whose ``flag`` says why. Norms that use batch statistics run
in train mode (as the published codes do), everything else in eval mode, so that no dropout disturbs the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from capnas.errors import UsageError, check_name, check_names
from capnas.measures.activation_codes import CodeOverlap, all_finite
from capnas.measures.flows import flows
from capnas.measures.probing import FAILURES, Loss, gradable, reason, untouched, weight_gradients

_NO_LAYER = "no convolution or dense layer in the model"
_CANCELLED = "the model's own constants or computed weights, of both signs, cancel the flow"


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A score, or NaN and the reason.

    Attributes:
        value: the score; higher is predicted to be better.
        flag: empty, or why the value is NaN (or what limits it).
    """

    value: float
    flag: str = ""


def synflow(model: nn.Module, inputs: Tensor, *, variant: Literal["sum", "log"] = "sum") -> Proxy:
    """Synaptic flow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467; as a score: Abdelfattah et al., ICLR 2021, arXiv 2101.08134).

    With all parameters replaced by their magnitudes, norms by the identity and the input by ones, ``R`` is the sum of the outputs and the
    score is ``sum_w |w| dR/d|w|`` over the weights of convolutions and dense layers; the natural logarithm of that sum is returned. Of a
    layer that computes its weight (standardisation, weight or spectral norm) w is what it computes from its parameters, signs and all.

    Ours: every module that is a rectifier, smooth or clipped, is the identity, as a ReLU is on the positive signals here. R grows like the
    number of paths and passes 1e308; then, in double precision, the input and what is added to the signal (biases, position codes) are
    scaled by s and the output by s too, which scales a network of linear layers, sums and rectifiers by s^2 exactly (gates count as open).

    Args:
        model: any; the data do not matter, only their shape.
        inputs: a batch (B, ...); one sample of its shape is used.
        variant: ``"sum"``: ln of the sum. ``"log"``: the sum of ``|w| ln(1 + dR/d|w|)`` (Cavagnero et al., FreeREA, WACV 2023).

    Raises:
        UsageError: for an unknown variant.

    >>> net = nn.Linear(3, 2, bias=False)
    >>> round(math.exp(synflow(net, torch.zeros(1, 3)).value) / float(net.weight.detach().abs().sum()), 6)
    1.0
    """
    check_name("variant", variant, ("sum", "log"))
    flag = "the flow is not finite at any scale"
    for dtype in (torch.float64, torch.float32):  # a few models fix float32 inside
        for scale in (1.0, 1e-120, 1e-290) if dtype == torch.float64 else (1.0, 1e-15):
            try:
                found = flows(model, inputs, dtype, scale)
            except FAILURES as error:
                flag = reason(error)
                break
            if not found:
                return Proxy(value=math.nan, flag=_NO_LAYER)
            gradients = [g / scale**2 if variant == "log" else g for _, g in found]
            products = (w.detach() * (g.log1p() if variant == "log" else g) for (w, _), g in zip(found, gradients))  # all would be large
            total, size = map(sum, list(zip(*((float(t.sum()), float(t.abs_().sum())) for t in products))) or ((), ()))
            if math.isfinite(total) and variant == "log":
                return Proxy(value=total)
            if math.isfinite(size) and total > torch.finfo(dtype).eps ** 0.5 * size:  # more is left of both signs than rounding
                return Proxy(value=math.log(total) - 2 * math.log(scale))
            if math.isfinite(size):
                return Proxy(value=math.nan, flag=_CANCELLED if size > 0 else "no flow reaches the output")
            if math.isnan(total) and all(all_finite(g) for g in gradients):  # ln(1 + g) of a flow below -1
                flag = _CANCELLED
    return Proxy(value=math.nan, flag=flag)


def naswot(model: nn.Module, inputs: Tensor) -> Proxy:
    """Overlap of activation patterns (Mellor et al., ICML 2021, arXiv 2006.04647): ``ln det K_H``, ``K_H[i, j] = N - hamming(c_i, c_j)``.

    ``c_i`` is the binary code of input i: for each of N rectifier units whether its input is positive. All rectifiers count, functional
    ones too; smooth ones (GELU, SiLU, ...) by the sign of their input, which is our extension. Gates (sigmoid, tanh) do not.

    Args:
        model: any.
        inputs: a batch (B, ...), B >= 2. Values are comparable only at one B.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> naswot(net, torch.eye(2)).value > 0, naswot(net, torch.ones(2, 2)).flag
    (True, 'singular kernel: some inputs share all their codes')
    """
    counter = CodeOverlap(len(inputs))
    try:
        with untouched(model, statistics=True), torch.no_grad(), counter:
            model(inputs)
    except FAILURES as error:
        return Proxy(value=math.nan, flag=reason(error))
    return _log_determinant(counter)


def grad_norm(model: nn.Module, inputs: Tensor, targets: Tensor | None = None, *, loss: Loss | None = None) -> Proxy:
    """Sum over layers of the Euclidean norm of the loss's gradient in the weight (Abdelfattah et al., ICLR 2021, arXiv 2101.08134).

    Args:
        model: any; convolutions and dense layers count.
        inputs: a batch (B, ...).
        targets: for the loss; without them random classes stand in (seed 0).
        loss: ``loss(output, targets)``, a mean over the batch; cross-entropy by default.

    >>> grad_norm(nn.Linear(3, 2), torch.zeros(4, 3)).value
    0.0
    """
    return _of_gradients(model, inputs, targets, loss, _norm)


def snip(model: nn.Module, inputs: Tensor, targets: Tensor | None = None, *, loss: Loss | None = None) -> Proxy:
    """Connection sensitivity, the sum of ``|w dL/dw|`` (Lee et al., ICLR 2019, arXiv 1810.02340; as a score: arXiv 2101.08134).

    Arguments as for `grad_norm`.

    >>> snip(nn.Linear(3, 2), torch.zeros(4, 3)).value
    0.0
    """
    return _of_gradients(model, inputs, targets, loss, _sensitivity)


def zico(model: nn.Module, inputs: Tensor, targets: Tensor | None = None, *, loss: Loss | None = None, parts: int = 2) -> Proxy:
    """Inverse coefficient of variation of gradients (Li et al., ICLR 2023, arXiv 2301.11300): ``sum_l ln sum_w mean |g_w| / std g_w``.

    Mean and (population) standard deviation run over batches: here over ``parts`` equal parts of one batch. As in the authors' code the
    deviation is that of the signed gradient, and weights or layers without deviation are left out.

    Args:
        model: any; convolutions and dense layers count.
        inputs: a batch (B, ...), B >= parts.
        targets: as for `grad_norm`.
        loss: as for `grad_norm`.
        parts: how many gradients to compare, at least 2.

    Raises:
        UsageError: for less than two parts.

    >>> zico(nn.Linear(3, 2), torch.arange(12.0).reshape(4, 3)).flag
    ''
    """
    if parts < 2:
        raise UsageError(f"parts must be at least 2, got {parts}.")
    if len(inputs) < parts:
        return Proxy(value=math.nan, flag=f"{len(inputs)} inputs do not make {parts} parts")
    size = len(inputs) // parts
    try:
        with untouched(model, statistics=True):
            ends = [(i * size, (i + 1) * size) for i in range(parts)]
            found = [
                weight_gradients(model, inputs[a:b], None if targets is None else targets[a:b], loss, seed=i)
                for i, (a, b) in enumerate(ends)
            ]
    except FAILURES as error:
        return Proxy(value=math.nan, flag=reason(error))
    total, layers = 0.0, 0
    for layer in zip(*found):
        gradients = [g if g.dtype == torch.float64 else g.float() for _, g in layer]
        if not all(all_finite(g) for g in gradients):
            return Proxy(value=math.nan, flag="a gradient is not finite")
        size, deviation = sum(g.abs() for g in gradients), _deviation(gradients)
        ratio = float(torch.where(deviation > 0, size / deviation, 0.0).sum(dtype=torch.float64)) / parts
        if ratio > 0:
            total, layers = total + math.log(ratio), layers + 1
    return Proxy(value=total) if layers else Proxy(value=math.nan, flag="no gradient varies between the parts")


def params(model: nn.Module) -> Proxy:
    """Number of parameters, shared ones once. Textbook.

    >>> params(nn.Linear(3, 2)).value
    8.0
    """
    return Proxy(value=float(sum(p.numel() for p in model.parameters())))


def macs(model: nn.Module, inputs: Tensor) -> Proxy:
    """Multiply-accumulates of one sample of the inputs' shape: half of torch's flop count (textbook), attention included.

    >>> macs(nn.Linear(3, 2), torch.zeros(5, 3)).value
    6.0
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with untouched(model), FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            sample = torch.empty((1, *inputs.shape[1:]), dtype=inputs.dtype, device=inputs.device)
            with FlopCounterMode(display=False) as counter:
                model(sample)
    except FAILURES as error:
        return Proxy(value=math.nan, flag=reason(error))
    return Proxy(value=counter.get_total_flops() / 2)


PROXIES = ("synflow", "naswot", "zico", "snip", "grad_norm", "params", "macs")


@torch.inference_mode(False)  # gradients run here whatever surrounds the call
def baseline_proxies(
    model: nn.Module, inputs: Tensor, targets: Tensor | None = None, *, loss: Loss | None = None, names: Sequence[str] = PROXIES
) -> dict[str, Proxy]:
    """Several baselines in one call, by name. From the papers named at each.

    Raises:
        UsageError: for an unknown name, or a model that was made in inference mode.

    >>> sorted(baseline_proxies(nn.Linear(3, 2), torch.zeros(4, 3), names=["params", "macs"]))
    ['macs', 'params']
    """
    check_names("names", names, PROXIES)
    inputs, *rest = gradable(model, inputs, *([] if targets is None else [targets]))
    targets = rest[0] if rest else None
    shared = _in_one_pass(model, inputs, targets, loss) if len(_SHARED & set(names)) > 1 else {}
    rules: dict[str, Callable[[], Proxy]] = {
        "synflow": lambda: synflow(model, inputs),
        "naswot": lambda: naswot(model, inputs),
        "zico": lambda: zico(model, inputs, targets, loss=loss),
        "snip": lambda: snip(model, inputs, targets, loss=loss),
        "grad_norm": lambda: grad_norm(model, inputs, targets, loss=loss),
        "params": lambda: params(model),
        "macs": lambda: macs(model, inputs),
    }
    return {name: shared[name] if name in shared else rules[name]() for name in names}


_SHARED = {"naswot", "snip", "grad_norm"}


def _in_one_pass(model: nn.Module, inputs: Tensor, targets: Tensor | None, loss: Loss | None) -> dict[str, Proxy]:
    """The scores that one forward and backward pass gives together; none where the model fails, each alone then says how."""
    counter = CodeOverlap(len(inputs))
    try:
        with untouched(model, statistics=True):
            pairs = weight_gradients(model, inputs, targets, loss, forward=counter)
    except FAILURES:
        return {}
    return {"naswot": _log_determinant(counter), "snip": _sum_of(pairs, _sensitivity), "grad_norm": _sum_of(pairs, _norm)}


def _log_determinant(codes: CodeOverlap) -> Proxy:
    if not codes.units:
        return Proxy(value=math.nan, flag="no rectifier in the model")
    if not codes.finite:
        return Proxy(value=math.nan, flag="an activation is not finite")
    sign, value = np.linalg.slogdet(codes.kernel)
    if sign <= 0 or not math.isfinite(value) or np.linalg.matrix_rank(codes.kernel) < codes.samples:
        return Proxy(value=math.nan, flag="singular kernel: some inputs share all their codes")
    return Proxy(value=float(value))


def _of_gradients(
    model: nn.Module, inputs: Tensor, targets: Tensor | None, loss: Loss | None, term: Callable[[Tensor, Tensor], float]
) -> Proxy:
    try:
        with untouched(model, statistics=True):
            pairs = weight_gradients(model, inputs, targets, loss)
    except FAILURES as error:
        return Proxy(value=math.nan, flag=reason(error))
    return _sum_of(pairs, term)


def _sum_of(pairs: Sequence[tuple[Tensor, Tensor]], term: Callable[[Tensor, Tensor], float]) -> Proxy:
    if not pairs:
        return Proxy(value=math.nan, flag=_NO_LAYER)
    value = math.fsum(term(w, g) for w, g in pairs) if all(all_finite(g) for _, g in pairs) else math.nan
    return Proxy(value=value, flag="" if math.isfinite(value) else "a gradient is not finite")


def _sensitivity(weight: Tensor, gradient: Tensor) -> float:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return float((weight.to(wide) * gradient.to(wide)).abs_().sum(dtype=torch.float64))


def _norm(weight: Tensor, gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _deviation(gradients: Sequence[Tensor]) -> Tensor:
    """Population standard deviation; half the distance for two, which is exact where they are close."""
    if len(gradients) == 2:
        return (gradients[0] - gradients[1]).abs_().div_(2)
    return torch.stack(list(gradients)).double().std(0, correction=0)
