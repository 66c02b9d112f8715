"""Small line charts over one axis as a self-contained SVG, written by hand: no plotting library, text that any page can show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2f6db5", "#c4532f", "#3a8f5c", "#8a5fb0", "#b08a2f", "#5c6b7a")
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 300, 200, 44, 34, 26

Line = Sequence[tuple[float, float]]


def line_panels(panels: Mapping[str, Mapping[str, Line]], *, axis: str, columns: int = 3) -> str:
    """Panels of lines over one logarithmic axis, a colour for each name throughout, with one legend.

    Args:
        panels: title -> name -> points (x, y); y from 0 upwards.
        axis: what x is.
        columns: panels side by side.

    >>> text = line_panels({"accuracy": {"net": [(32, 0.5), (64, 0.6)]}}, axis="pixels")
    >>> text.startswith("<svg"), text.count("<polyline"), "pixels" in text
    (True, 1, True)
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    rows = math.ceil(len(panels) / columns)
    width, height = min(columns, len(panels)) * (_WIDTH + _GAP) + _GAP, rows * (_HEIGHT + _GAP) + 16
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">']
    parts.append(f'<rect width="{width}" height="{height}" fill="#ffffff"/><g font-family="sans-serif" font-size="11" fill="#30363d">')
    at = float(_GAP)
    for name in names:
        parts.append(f'<rect x="{at:.0f}" y="8" width="10" height="10" fill="{colours[name]}"/>{_text(at + 14, 17, name)}')
        at += 30 + 6.2 * len(name)
    for place, (title, lines) in enumerate(panels.items()):
        x, y = _GAP + place % columns * (_WIDTH + _GAP), _TOP + place // columns * (_HEIGHT + _GAP)
        parts += _panel(x, y, title, lines, colours, axis)
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def _panel(x: float, y: float, title: str, lines: Mapping[str, Line], colours: Mapping[str, str], axis: str) -> list[str]:
    points = [p for line in lines.values() for p in line if math.isfinite(p[1])]
    if not points:
        return []
    ticks = sorted({p[0] for p in points})
    low, high = math.log2(ticks[0]), math.log2(ticks[-1])
    top = _nice(max(p[1] for p in points))
    left, bottom, wide, tall = x + _LEFT, y + _HEIGHT - 30, _WIDTH - _LEFT - 8, _HEIGHT - 52

    def place(px: float, py: float) -> tuple[float, float]:
        return left + (math.log2(px) - low) / ((high - low) or 1.0) * wide, bottom - py / top * tall

    parts = [_text(x + 4, y + 12, title, "font-weight='bold'")]
    for step in range(5):
        value = top * step / 4
        height = place(ticks[0], value)[1]
        parts.append(f'<line x1="{left}" x2="{left + wide}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e3e7eb"/>')
        parts.append(_text(left - 5, height + 4, f"{value:g}", "text-anchor='end'"))
    shown = -math.inf
    for tick in ticks:
        along = place(tick, 0)[0]
        if along - shown > 22:
            parts.append(_text(along, bottom + 14, f"{tick:g}", "text-anchor='middle'"))
            shown = along
    parts.append(_text(left + wide / 2, bottom + 27, axis, "text-anchor='middle'"))
    for name, line in lines.items():
        spots = [place(*p) for p in line if math.isfinite(p[1])]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colours[name]}"/>' for a, b in spots]
    return parts


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 2, 4, 6, 8, 10) if value <= step * unit * (1 + 1e-9))


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
