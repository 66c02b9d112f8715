"""What calibration images tell about a network that is to be narrowed: how its layers are read, how much each output matters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas._timm import import_timm
from capnas.capacity.patches import unravel, windows
from capnas.measures.narrowing import gram
from capnas.measures.probing import untouched
from capnas.norms import channel_moments, running_norms
from capnas.recording import LayerRecord, Recorder, hooked

WIDEST = 2304  # input columns of a reader beyond which kernel positions are taken for independent
REFITTED = 4608  # input columns beyond which a reader is not refitted in full
_ROWS = 8192  # samples kept per layer, more where it is wider
_VALUES = 2**27  # numbers in the sampled inputs of one layer at most
NormInputs = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,) and (C,)
_timm_layers: Any = import_timm("timm.layers")
_LINEAR = (nn.Linear.forward, _timm_layers.Linear.forward)  # timm's casts where it is scripted; its standardized convs compute weights
_CONV = (nn.Conv2d.forward, _timm_layers.Conv2dSame.forward, nn.ConvTranspose2d.forward)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a dense layer of the full network read and wrote.

    Attributes:
        covariance: (D, D) of its sampled inputs; where D is beyond `WIDEST`, (C, C) second moments of its input channels about zero,
            kernel positions together.
        curvature: (O, O) second moment of the loss's gradient at its outputs, summed over positions, averaged over images.
        outputs: (S, O) at the sampled positions.
        index: (S,) which these are.
        places: shape of all positions.
    """

    covariance: Tensor
    curvature: Tensor
    outputs: Tensor
    index: Tensor
    places: tuple[int, ...]


def readable(module: nn.Module) -> bool:
    """Whether a layer's inputs can be laid out as rows: a plain linear layer, or a dense 2-d conv, transposed or not, padded with zeros.

    >>> readable(_timm_layers.Linear(2, 2)), readable(_timm_layers.Conv2dSame(2, 2, 3)), readable(_timm_layers.StdConv2d(2, 2, 3))
    (True, True, False)
    """
    return why_unreadable(module) is None


def why_unreadable(module: nn.Module) -> str | None:
    """Why a layer is not `readable`, or None.

    >>> print(why_unreadable(nn.Conv2d(2, 2, 3)), "|", why_unreadable(nn.Conv2d(2, 2, 3, groups=2)))
    None | it is a convolution in 2 groups
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return f"it is a {type(module).__name__}, neither a linear layer nor a 2-d convolution"
    if type(module).forward not in (_LINEAR if isinstance(module, nn.Linear) else _CONV):
        return f"it is a {type(module).__name__}, which computes its outputs in a way of its own"
    if isinstance(module, nn.Linear):
        return f"it reads {module.in_features} inputs, more than {REFITTED}" if module.in_features > REFITTED else None
    if module.groups > 1:
        return f"it is a convolution in {module.groups} groups"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"it pads by the rule {module.padding if module.padding_mode == 'zeros' else module.padding_mode!r}"
    return None


def pads_by_size(module: nn.Module) -> bool:
    """Whether a conv pads each image by its size, as timm's ``Conv2dSame`` does, which says itself that it pads nothing."""
    return isinstance(module, _timm_layers.Conv2dSame)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a transposed conv: its weight has inputs first, and it may be told the size of its outputs."""
    return isinstance(module, nn.ConvTranspose2d)


def matrix(module: Any) -> Tensor:
    """What a `readable` layer multiplies with its `input_rows`: its weights (O, D), features or channels times kernel positions."""
    weight: Tensor = module.weight
    return (weight.transpose(0, 1).flip(2, 3) if is_transposed(module) else weight).flatten(1)


def set_matrix(module: Any, values: Tensor) -> None:
    """Give a layer the weights of a `matrix`, in place."""
    weight: Tensor = module.weight
    if is_transposed(module):
        weight.copy_(values.reshape(-1, weight.shape[0], *weight.shape[2:]).flip(2, 3).transpose(0, 1))
    else:
        weight.copy_(values.reshape(weight.shape))


def refitted(module: nn.Module) -> bool:
    """Whether a `readable` layer is refitted in full; one that reads more columns has its weights mixed."""
    return matrix(module).shape[1] <= REFITTED


def sampled(name: str, total: int, width: int) -> Tensor:
    """Positions at which a layer is sampled, the same in the full and in the narrowed network."""
    rows = min(max(_ROWS, 4 * width), _VALUES // width)
    if total <= rows:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randperm(total, generator=generator)[:rows].sort().values


def places(module: nn.Module, y: Tensor) -> tuple[int, ...]:
    """Shape of a layer's output without its features or channels: the positions that it has, the images first."""
    return tuple(y.shape[:-1]) if isinstance(module, nn.Linear) else (y.shape[0], *y.shape[2:])


def input_rows(module: Any, x: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Inputs of a layer at sampled output positions, (S, D): features of a linear layer, channels times kernel positions of a conv.

    Args:
        module: a `readable` layer.
        x: its input.
        index: (S,) which of its positions.
        shape: of all of them, see `places`.

    >>> conv = nn.Conv2d(1, 1, 3, padding=1)
    >>> input_rows(conv, torch.ones(1, 1, 2, 2), torch.tensor([0]), (1, 2, 2)).tolist()
    [[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]]
    """
    index = index.to(x.device)
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])[index]
    if pads_by_size(module):
        x = _timm_layers.pad_same(x, module.kernel_size, module.stride, module.dilation)
    given = {key: getattr(module, key) for key in ("stride", "padding", "dilation")}
    if is_transposed(module):  # as many further positions as it may be told to put out
        given["output_padding"] = tuple(max(pair) - 1 for pair in zip(module.stride, module.dilation))
    view = windows(x, module.kernel_size, given, transposed=is_transposed(module))
    image, row, column = unravel(index, shape)
    return view[image, :, row, column].flatten(1)


def output_rows(module: nn.Module, y: Tensor, index: Tensor) -> Tensor:
    """Outputs of a layer at sampled positions, (S, O)."""
    index = index.to(y.device)
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])[index]
    per_image = y.shape[2] * y.shape[3]
    return y.flatten(2)[index // per_image, :, index % per_image]


def read_layers(model: nn.Module, names: Sequence[str], images: Tensor, *, seed: int = 0) -> dict[str, Reading]:
    """Run a network in eval mode and read the named layers.

    The curvature is that of the network's own predictions (the true Fisher information: labels are drawn from its outputs), so that a
    network that fits its images perfectly has one too.

    Args:
        model: left as it is.
        names: of layers that are `readable`.
        images: (N, C, H, W) on the model's device; run as one batch.
        seed: of the labels drawn.
    """
    batch = max(4, min(64, 2**19 // images[0, 0].numel()))  # images per backward pass
    outputs: dict[str, Tensor] = {}
    indices: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    covariances: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            if name in outputs:
                return  # called again: the first call stands
            width, shapes[name] = matrix(module).shape[1], places(module, y)
            index = sampled(name, math.prod(shapes[name]), width)
            rows = input_rows(module, args[0], index, shapes[name])
            if width > WIDEST and not isinstance(module, nn.Linear):
                rows = rows.unflatten(1, (module.in_channels, -1)).transpose(1, 2).flatten(0, 1)
            else:
                rows = rows - rows.mean(0)
            covariances[name] = gram(rows) / len(rows)
            outputs[name], indices[name] = output_rows(module, y, index), index

        return hook

    curvatures: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            def fold(gradient: Tensor) -> None:
                rows = gradient.reshape(-1, gradient.shape[-1]) if isinstance(module, nn.Linear) else gradient.transpose(0, 1).flatten(1).T
                curvatures[name] = curvatures.get(name, 0) + (rows.T @ rows).double() / len(images)

            if y.requires_grad:  # else it does not depend on the images
                y.register_hook(fold)

        return hook

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    generator = torch.Generator().manual_seed(seed)
    try:
        model.requires_grad_(False)
        with untouched(model), torch.no_grad(), hooked({n: keep(n) for n in names}, model):
            model(images)
        with untouched(model), torch.enable_grad(), hooked({n: watch(n) for n in names}, model):
            for part in images.split(batch):
                logits = model(part.clone().requires_grad_(True))
                labels = torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
                F.cross_entropy(logits, labels, reduction="sum").backward()
    finally:
        for parameter, state in wanted:
            parameter.requires_grad_(state)
    read = (n for n in names if n in curvatures)
    return {
        n: Reading(covariance=covariances[n], curvature=curvatures[n], outputs=outputs[n], index=indices[n], places=shapes[n]) for n in read
    }


def norms_behind(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Conv or linear layers whose output goes straight into a batch norm, and that norm.

    >>> norms_behind(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()), torch.zeros(1, 1, 2, 2))
    {'0': '1'}
    """
    names = {m: n for n, m in model.named_modules()}
    made: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, str] = {}

    def note(module: nn.Module, args: Any, y: Tensor) -> None:
        made[id(y)] = (names[module], y, y._version)  # an activation in place changes the tensor and passes it on

    def look(module: nn.Module, args: Any) -> None:
        name, y, version = made.get(id(args[0]), ("", None, 0))
        if y is args[0] and y._version == version:
            found[name] = names[module]

    layers = {n: note for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    norms = {n: look for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    with untouched(model), torch.no_grad(), hooked(layers, model), hooked(norms, model, before=True):
        model(example)
    return found


def norm_inputs(model: nn.Module, images: Tensor) -> dict[str, NormInputs]:
    """What each batch norm with running moments reads over the images, run as one batch in eval mode; of several calls the first.

    >>> net = nn.Sequential(nn.BatchNorm2d(1))
    >>> [v.item() for v in norm_inputs(net, torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))["0"]]
    [2.0, 1.0]
    """
    found: dict[str, NormInputs] = {}
    names = {m: n for n, m in model.named_modules()}

    def look(module: nn.Module, args: Any) -> None:
        if names[module] not in found:
            found[names[module]] = channel_moments(args[0])

    with untouched(model), torch.no_grad(), hooked(dict.fromkeys(running_norms(model), look), model, before=True):
        model(images)
    return found


def output_moments(model: nn.Module, images: Tensor) -> dict[str, LayerRecord]:
    """What each conv and linear layer puts out over the images, in eval mode; layers with broken outputs or none are left out."""
    with untouched(model), torch.no_grad(), Recorder(model, reading="modules") as recorder:
        for part in images.split(256):
            model(part)
    return {name: record for name, record in recorder.pop("eval").items() if record.finite and record.moments.count}
