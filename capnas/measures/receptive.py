"""Receptive fields along one axis, and what they say of a layer at an input size.

A field is followed as an interval over all paths from the input: ``low`` over the path that sees least (skips), ``high`` over the one that
sees most (Richter et al., ICMLA 2021, arXiv 2106.12307, and rfa_toolbox). A layer of kernel k, stride s and dilation d does

    r_out = r_in + (k - 1) d j_in,   j_out = j_in s,   r_0 = j_0 = 1.

Norms, activations and 1x1 kernels leave r alone; an operation over the whole map makes it infinite. The rule on borders is soft: layers
past the border still gain a little in the authors' own probes, so it is a cost and not a filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from capnas.errors import UsageError, check_name

BorderRule = Literal["strict", "longest", "shortest", "longest_with_1x1", "shortest_with_1x1", "notebook", "toolbox"]
_RULES: tuple[BorderRule, ...] = get_args(BorderRule)


@dataclass(frozen=True, kw_only=True)
class Field:
    """Receptive field along one axis, in input pixels; the default is the input itself.

    Attributes:
        low: r_min, over the path that sees least.
        high: r_max, over the path that sees most; ``low <= high``, both may be infinite. It is the greatest of the single paths: where
            paths see pixels that are shifted against each other (a branch that halves and enlarges the map beside a 3x3), all of them
            together may span a pixel or more beyond it.
        jump: distance in the input between two neighbouring units.
    """

    low: float = 1.0
    high: float = 1.0
    jump: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LayerField:
    """A layer and the fields at its input and output, one entry for each image axis.

    Attributes:
        name: the layer.
        extent: span of the taps, ``(k - 1) d + 1``; infinite where the layer reads the whole axis.
        before: fields of its input.
        after: fields of its output.
        learned: whether it has weights (pooling has none).
    """

    name: str
    extent: tuple[float, ...]
    before: tuple[Field, ...]
    after: tuple[Field, ...]
    learned: bool = True

    @property
    def expands(self) -> bool:
        """Whether the layer reads more than one unit along some axis, but not all of one."""
        return any(1 < e < math.inf for e in self.extent) and self.finite

    @property
    def finite(self) -> bool:
        """Whether the output's largest field is finite on every axis."""
        return all(math.isfinite(f.high) for f in self.after)


def window(field: Field, kernel: int, stride: int = 1, dilation: int = 1) -> Field:
    """Field after a convolution or a pooling window. By the recursion of the papers.

    Raises:
        UsageError: for a kernel, a stride or a dilation below 1.

    >>> window(window(Field(), 3, stride=2), 3, dilation=2)
    Field(low=11.0, high=11.0, jump=2.0)
    """
    if min(kernel, stride, dilation) < 1:
        raise UsageError(f"kernel, stride and dilation must be >= 1, got {kernel}, {stride} and {dilation}.")
    grow = (kernel - 1) * dilation * field.jump
    return Field(low=field.low + grow, high=field.high + grow, jump=field.jump * stride)


def transposed_window(field: Field, kernel: int, stride: int = 1, dilation: int = 1) -> Field:
    """Field after a transposed convolution, for the output phase that reads most input units.

    Output phase p reads the taps t with ``t d = p (mod s)``; their span in input units is at most about ``(k - 1) d / s``. A dilation
    above 1 also shifts the phases against each other, by up to as much: a later layer that reads several of them reaches further than
    is counted here. The papers treat no transposed layers; this rule is ours.

    Raises:
        UsageError: for a kernel, a stride or a dilation below 1.

    >>> transposed_window(Field(jump=4.0), 4, stride=2)
    Field(low=5.0, high=5.0, jump=2.0)
    >>> transposed_window(Field(jump=4.0), 2, stride=2)
    Field(low=1.0, high=1.0, jump=2.0)
    """
    if min(kernel, stride, dilation) < 1:
        raise UsageError(f"kernel, stride and dilation must be >= 1, got {kernel}, {stride} and {dilation}.")
    spans = [0]
    for phase in range(stride):
        taps = [t * dilation for t in range(kernel) if (t * dilation - phase) % stride == 0]
        spans.append((taps[-1] - taps[0]) // stride if taps else 0)
    grow = max(spans) * field.jump
    return Field(low=field.low + grow, high=field.high + grow, jump=field.jump / stride)


def resampled(field: Field, factor: float, taps: int = 1) -> Field:
    """Field after interpolation to ``factor`` times the size from ``taps`` neighbours (nearest 1, linear 2, cubic 4). Ours.

    >>> resampled(Field(jump=8.0), 2.0, taps=2)
    Field(low=9.0, high=9.0, jump=4.0)
    """
    grow = (taps - 1) * field.jump
    return Field(low=field.low + grow, high=field.high + grow, jump=field.jump / factor)


def adaptive_kernel(size: int, outputs: int) -> int:
    """Taps of the widest window of an adaptive pooling along one axis; torch's window i runs from floor(i n / m) to ceil((i + 1) n / m).

    The papers treat no adaptive pooling; this rule is ours.

    Args:
        size: n, positions that are pooled (>= 1).
        outputs: m, positions that are left (>= 1).

    Raises:
        UsageError: for a number below 1.

    >>> adaptive_kernel(8, 4), adaptive_kernel(9, 7), adaptive_kernel(5, 1)
    (2, 3, 5)
    """
    if min(size, outputs) < 1:
        raise UsageError(f"size and outputs must be >= 1, got {size} and {outputs}.")
    return max(-(-(i + 1) * size // outputs) - i * size // outputs for i in range(outputs))


def whole(field: Field) -> Field:
    """Field after an operation over the whole axis, infinite as in the papers: global pooling, attention, a dense layer on the flat map.

    >>> whole(Field(jump=8.0)).low
    inf
    """
    return replace(field, low=math.inf, high=math.inf)


def merge(fields: Sequence[Field]) -> Field:
    """Field of a sum or a concatenation: the least ``low``, the greatest ``high``, the jump of the first. Ours.

    Raises:
        UsageError: without fields.

    >>> merge([Field(low=11.0, high=11.0), Field(low=27.0, high=27.0)])
    Field(low=11.0, high=27.0, jump=1.0)
    """
    if not fields:
        raise UsageError("merge needs one field at least, got none.")
    return Field(low=min(f.low for f in fields), high=max(f.high for f in fields), jump=fields[0].jump)


def in_pixels(field: Field) -> Field:
    """Field in whole input pixels, rounded up; the jump stays as it is. Ours: the papers have no fractional jumps.

    Behind upsampling, transposed layers and adaptive pooling the recursion gives fractions of a pixel: a kernel of 2 on a map enlarged
    twice reads 1.5 pixels, one or two by where it lies. Rounded up it is the place that sees most (too much, by up to the jump of the map
    that was enlarged, where strides skip that place; too little by up to that less one where the map is coarser than the image, as its
    units are read as wholes). Round what is reported, not what a later layer starts from: roundings would add up.

    >>> in_pixels(window(resampled(Field(), 2.0), 2))
    Field(low=2.0, high=2.0, jump=0.5)
    """
    return replace(field, low=_ceil(field.low), high=_ceil(field.high))


def critical_layers(
    layers: Sequence[LayerField], image_size: int | tuple[int, ...], *, path: Literal["low", "high"] = "low"
) -> tuple[str, ...]:
    """Expanding layers whose own field exceeds the image on every axis (*critical*; some of them still see new context at their input).

    Args:
        layers: in the order of execution.
        image_size: pixels, one number or one for each axis.
        path: by r_min (as rfa_toolbox) or by r_max.

    Raises:
        UsageError: for another path, or an image size that is not positive or has another number of axes than the fields.

    >>> fields = [Field(), window(Field(), 3), window(window(Field(), 3), 3)]
    >>> chain = [LayerField(name=str(i), extent=(3,), before=(a,), after=(b,)) for i, (a, b) in enumerate(zip(fields, fields[1:]))]
    >>> critical_layers(chain, 4)
    ('1',)
    """
    check_name("path", path, ("low", "high"))
    return tuple(x.name for x in layers if x.expands and _every(x.after, image_size, lambda f, i: getattr(f, path) > i))


def border_layers(layers: Sequence[LayerField], image_size: int | tuple[int, ...], rule: BorderRule = "strict") -> tuple[str, ...]:
    """Expanding layers predicted to be unproductive at ``image_size``: they can add no context of the image that their input lacks.

    Layers with an infinite field are never named, and a condition must hold on every axis. The papers (arXiv 2106.12307), as we
    read them, count every convolution of the main path; leaving out 1x1 layers, which read no context, is our deviation and the default.
    It changes nothing on VGG and basic residual blocks. With bottlenecks the wording of the papers fails by r_min: the first 1x1 layer of
    a block reads the skip and has the r_min of the stem, so that the border of ResNet50 lies in its last block for 16 as for 64 pixels.

    Args:
        layers: in the order of execution; pooling layers may be among them.
        image_size: pixels, one number or one for each axis.
        rule: one of

            * ``"longest"``: from the first layer whose **input** has r_max > image;
            * ``"shortest"``: from the first layer on which **every** layer's own r_min > image;
            * ``"longest_with_1x1"``, ``"shortest_with_1x1"``: the same two over all convolutions, 1x1 too, which are the papers'
              rules, for sequential networks and with skips. Pass only the layers of the main path: a 1x1 shortcut would count as well;
            * ``"strict"``: ours, the papers' rules without 1x1 layers: ``"longest"`` where r_min = r_max everywhere, else ``"shortest"``;
            * ``"notebook"``: from the layer after the first with r_max > image, else the last (the authors' plotting code);
            * ``"toolbox"``: rfa_toolbox 1.7.0, layer by layer and **not strict**: image <= r_min of the input and image < own r_min, or an
              input map no larger than the kernel (our map size: image / jump, rounded up).

    Raises:
        UsageError: for an unknown rule, or an image size that is not positive or has another number of axes than the fields.

    >>> fields = [Field(), window(Field(), 3), window(window(Field(), 3), 3)]
    >>> chain = [LayerField(name=str(i), extent=(3,), before=(a,), after=(b,)) for i, (a, b) in enumerate(zip(fields, fields[1:]))]
    >>> border_layers(chain, 2), border_layers(chain, 3), border_layers(chain, 3, rule="toolbox")
    (('1',), (), ('0', '1'))
    """
    check_name("rule", rule, _RULES)
    convs = [x for x in layers if x.learned and (x.finite if rule.endswith("_with_1x1") else x.expands)]
    if rule == "toolbox":
        return tuple(x.name for x in convs if _toolbox(x, image_size))
    if rule == "strict":
        rule = "longest" if all(f.low == f.high for x in convs for f in (*x.before, *x.after)) else "shortest"
    start: int | None
    if rule in ("longest", "longest_with_1x1"):
        start = next((i for i, x in enumerate(convs) if _every(x.before, image_size, lambda f, i: f.high > i)), None)
    elif rule in ("shortest", "shortest_with_1x1"):
        inside = [i for i, x in enumerate(convs) if not _every(x.after, image_size, lambda f, i: f.low > i)]
        start = inside[-1] + 1 if inside else 0
    else:
        past = [i for i, x in enumerate(convs) if _every(x.after, image_size, lambda f, i: f.high > i)]
        start = min(past[0] + 1 if past else len(convs), len(convs) - 1)
    return tuple(x.name for x in convs[start:]) if start is not None and convs else ()


def feasible_range(
    layers: Sequence[LayerField], *, lower: Literal["largest", "functional"] = "largest"
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Smallest and largest feasible image size along each axis (rfa_toolbox); infinite fields are ignored.

    Below the smallest some layer is unproductive; above the largest no unit sees the whole image.

    Args:
        layers: all layers with a window, pooling included.
        lower: ``"largest"``: the largest r_min that a later layer can read. ``"functional"``: the largest r_min at the **input** of an
            expanding layer, or its kernel times its jump if that is more: the toolbox's ``lower_bound``.

    Returns:
        ``((low_h, low_w), (high_h, high_w))``, or None where no layer has a finite field.

    Raises:
        UsageError: for another ``lower``.

    >>> conv = LayerField(name="conv", extent=(3,), before=(Field(),), after=(window(Field(), 3),))
    >>> feasible_range([conv])
    ((3.0,), (3.0,))
    """
    check_name("lower", lower, ("largest", "functional"))
    finite = [x for x in layers if x.finite]
    if not finite:
        return None
    axes = range(len(finite[0].after))
    lows = []
    for a in axes:
        if lower == "largest":
            reads = [(x.after if x.learned else x.before)[a].low for x in finite]
        else:
            reads = [max(x.before[a].low, x.extent[a] * x.before[a].jump) for x in finite if x.expands]
        lows.append(max(reads, default=1.0))
    return tuple(lows), tuple(max(x.after[a].high for x in finite) for a in axes)


def _ceil(pixels: float) -> float:
    return float(math.ceil(pixels - 1e-6)) if math.isfinite(pixels) else pixels  # sums of thirds end beside whole numbers


def _toolbox(layer: LayerField, image_size: int | tuple[int, ...]) -> bool:
    small = all(math.ceil(i / f.jump) <= e for f, e, i in zip(layer.before, layer.extent, _sizes(image_size, len(layer.before))))
    seen = _every(layer.before, image_size, lambda f, i: i <= f.low) and _every(layer.after, image_size, lambda f, i: i < f.low)
    return small or seen


def _sizes(image_size: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    sizes = (image_size,) * axes if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != axes or min(sizes) < 1:
        raise UsageError(f"image_size must be one positive number or {axes} of them, got {image_size}.")
    return sizes


def _every(fields: Sequence[Field], image_size: int | tuple[int, ...], holds: Callable[[Field, int], bool]) -> bool:
    return all(holds(f, i) for f, i in zip(fields, _sizes(image_size, len(fields))))
