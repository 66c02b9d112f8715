"""Line charts written by hand."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

from capnas.report.panels import COLOURS, line_panels


def test_points_keep_their_order_and_distances_on_a_logarithmic_axis() -> None:
    text = line_panels({"a & b": {"net": [(16, 0.0), (32, 0.5), (64, 1.0)], "other": [(16, math.nan), (64, 0.25)]}}, axis="pixels")
    root = ElementTree.fromstring(text)
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    points = [tuple(map(float, p.split(","))) for p in lines[0].attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.11)
    assert x1 > x0
    assert math.isclose(y0 - y1, y1 - y2, abs_tol=0.11)
    assert y2 < y1
    assert len(lines[1].attrib["points"].split()) == 1
    assert lines[0].attrib["stroke"] != lines[1].attrib["stroke"]
    assert "a &amp; b" in text
    assert "nan" not in text


def test_ticks_reach_over_the_greatest_value_and_panels_stand_in_rows() -> None:
    panels = {str(n): {"x": [(8, 10.0**n * 3)]} for n in range(-2, 2)}
    text = line_panels(panels, axis="px", columns=3)
    for top in (0.04, 0.4, 4, 40):
        assert f">{top:g}</text>" in text
    assert f">{40:g}</text>" in line_panels({"a tick itself": {"x": [(8, 40.0)]}}, axis="px")
    heights = {float(y) for y in re.findall(r"y=\"([\d.]+)\" font-weight", text)}
    assert len(heights) == 2
    assert ElementTree.fromstring(line_panels({"empty": {"x": []}}, axis="px")) is not None


def test_more_names_than_colours_and_ticks_than_room() -> None:
    lines = {f"net {n}": [(float(x), n / 10) for x in range(64, 96)] for n in range(len(COLOURS) + 1)}
    root = ElementTree.fromstring(line_panels({"accuracy": lines}, axis="pixels"))
    drawn = [e.attrib["stroke"] for e in root.iter() if e.tag.endswith("polyline")]
    assert drawn == [*COLOURS, COLOURS[0]]
    ticks = [float(e.attrib["x"]) for e in root.iter() if "middle" in e.attrib.get("text-anchor", "")]
    *ticks, _ = ticks  # the last is the name of the axis
    assert 2 < len(ticks) < 32
    assert all(b - a > 22 for a, b in pairwise(ticks))
    assert float(root.attrib["width"]) < 400  # one panel wide
