"""Attentions of which whole heads can be taken out: timm's plain ``Attention``.

In versions of timm whose attentions have no ``attn_dim`` all heads together must be as wide as the stream; there they stay, with that error
as their reason.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn


def is_attention(module: nn.Module) -> bool:
    """Whether a module has the linear layers ``qkv`` and ``proj``."""
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)


def has_plain_heads(module: Any) -> bool:
    """Whether heads can be taken out: timm's plain ``Attention``, heads side by side in q, k and v."""
    heads, width = getattr(module, "num_heads", None), getattr(module, "head_dim", None)
    if type(module).__name__ != "Attention" or not is_attention(module):
        return False
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 2:
        return False
    plain = isinstance(getattr(module, "norm", nn.Identity()), nn.Identity) and getattr(module, "gate", None) is None
    return plain and module.qkv.out_features == 3 * heads * width and module.proj.in_features == heads * width


def head_units(name: str, module: Any) -> list[list[tuple[str, Literal["out", "in"], int]]]:
    """Per head of an attention the places of its channels: module, side, position."""
    width, all_heads = module.head_dim, module.num_heads * module.head_dim
    units = []
    for head in range(module.num_heads):
        inside = range(head * width, (head + 1) * width)
        places: list[tuple[str, Literal["out", "in"], int]] = [(f"{name}.proj", "in", i) for i in inside]
        units.append([*((f"{name}.qkv", "out", part * all_heads + i) for part in range(3) for i in inside), *places])
    return units
