"""What the border says of a network at an image size: which layers it speaks of, how many lie past it, where that is too many.

Borders are the papers' (Richter et al., ICMLA 2021, arXiv 2106.12307, see `capnas.measures.receptive`); the share of layers past one that
makes a size unusable is ours.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from capnas.errors import UsageError
from capnas.measures.receptive import LayerField, border_layers

UNUSABLE = 0.5  # the papers call the border soft, hence a half and not the first layer past it


def looking_layers(layers: Sequence[LayerField]) -> tuple[str, ...]:
    """Names of the learned layers that read neighbours, those that the border speaks of; empty for token mixers and dense networks. Ours.

    >>> from capnas.measures.receptive import Field, window
    >>> conv = LayerField(name="conv", extent=(3,), before=(Field(),), after=(window(Field(), 3),))
    >>> point = LayerField(name="point", extent=(1,), before=conv.after, after=conv.after)
    >>> looking_layers([conv, point])
    ('conv',)
    """
    return tuple(x.name for x in layers if x.expands and x.learned)


def borderless(layers: Sequence[LayerField]) -> bool:
    """Whether the rule on borders says nothing: fewer than three layers look around, and most of the learned layers see the whole image.

    Ours. So it is with transformers and mixers behind their patches: attention and token mixing join all positions at once.

    >>> from capnas.measures.receptive import Field, whole, window
    >>> everything = (whole(Field()),)
    >>> patches = LayerField(name="patches", extent=(4,), before=(Field(),), after=(window(Field(), 4, 4),))
    >>> mixed = [LayerField(name=str(i), extent=(1,), before=everything, after=everything) for i in range(4)]
    >>> borderless([patches, *mixed]), borderless([patches])
    (True, False)
    """
    learned = [x for x in layers if x.learned]
    everywhere = sum(all(math.isinf(f.high) for f in x.before) for x in learned)
    return len(looking_layers(layers)) < 3 and 2 * everywhere > len(learned)


def unproductive_share(layers: Sequence[LayerField], size: int) -> float:
    """Share of the looking layers that are past the border at an image size (rule ``"strict"``), in [0, 1]; 0 without such layers. Ours.

    Raises:
        UsageError: for a size below 1.

    >>> from capnas.measures.receptive import Field, window
    >>> fields = [Field(), window(Field(), 3), window(window(Field(), 3), 3)]
    >>> chain = [LayerField(name=str(i), extent=(3,), before=(a,), after=(b,)) for i, (a, b) in enumerate(zip(fields, fields[1:]))]
    >>> unproductive_share(chain, 2), unproductive_share(chain, 3)
    (0.5, 0.0)
    """
    looking = looking_layers(layers)
    return len(border_layers(layers, size)) / len(looking) if looking else 0.0


def smallest_productive(layers: Sequence[LayerField], share: float = 0.0) -> int:
    """Smallest image size at which at most `share` of the looking layers are past the border. Ours.

    >>> from capnas.measures.receptive import Field, window
    >>> fields = [Field(), window(Field(), 3), window(window(Field(), 3), 3)]
    >>> chain = [LayerField(name=str(i), extent=(3,), before=(a,), after=(b,)) for i, (a, b) in enumerate(zip(fields, fields[1:]))]
    >>> smallest_productive(chain), smallest_productive(chain, share=0.5)
    (3, 1)
    """
    finite = [f.high for x in layers if x.expands for f in (*x.before, *x.after) if math.isfinite(f.high)]
    most = math.ceil(max(finite, default=1.0))
    return 1 + bisect_left(range(1, most), True, key=lambda size: unproductive_share(layers, size) <= share)


def unusable(layers: Sequence[LayerField], size: int, *, limit: float = UNUSABLE) -> str | None:
    """Why a network cannot use an image size, or None: more than `limit` of its looking layers are past the border.

    The limit is ours.

    Args:
        layers: in the order of execution.
        size: pixels.
        limit: share of the looking layers, in [0, 1].

    Raises:
        UsageError: for a limit outside [0, 1], or a size below 1.

    >>> from capnas.measures.receptive import Field, window
    >>> fields = [Field(), window(Field(), 3), window(window(Field(), 3), 3)]
    >>> chain = [LayerField(name=str(i), extent=(3,), before=(a,), after=(b,)) for i, (a, b) in enumerate(zip(fields, fields[1:]))]
    >>> unusable(chain, 2, limit=0.4)
    '1 of 2 layers see nothing new at 2 px, from 1 on; the network needs 3 px'
    """
    if not 0 <= limit <= 1:
        raise UsageError(f"limit must be a share of the layers in [0, 1], got {limit}.")
    past = border_layers(layers, size)
    count = len(looking_layers(layers))
    if not past or len(past) <= limit * count:
        return None
    needed = smallest_productive(layers, limit)
    return f"{len(past)} of {count} layers see nothing new at {size} px, from {past[0]} on; the network needs {needed} px"
