"""Line charts written by hand."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

from capnas.report.panels import COLOURS, line_panels


def test_points_keep_their_order_and_distances_on_a_logarithmic_axis() -> None:
    net, other = [(16, 0.0), (32, 0.5), (64, 1.0)], [(64, 0.25)]
    text = line_panels({"a & b": {"other": [(8, math.nan), *other], "net": net}}, axis="pixels")
    assert text == line_panels({"a & b": {"other": other, "net": net}}, axis="pixels")
    root = ElementTree.fromstring(text)
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    points = [tuple(map(float, p.split(","))) for p in lines[1].attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert math.isclose(x1 - x0, x2 - x1, abs_tol=0.11)
    assert x1 > x0
    assert math.isclose(y0 - y1, y1 - y2, abs_tol=0.11)
    assert y2 < y1
    assert len(lines[0].attrib["points"].split()) == 1
    assert lines[0].attrib["stroke"] != lines[1].attrib["stroke"]
    assert "a &amp; b" in text
    first, second = (float(e.attrib["x"]) for e in root.iter() if e.attrib.get("height") == "10")  # of the legend
    assert first < second


def test_ticks_reach_over_the_greatest_value_and_panels_stand_in_rows() -> None:
    panels = {str(n): {"x": [(8, 10.0**n * 3)]} for n in range(-2, 2)}
    text = line_panels(panels, axis="px", columns=3)
    for top in (0.04, 0.4, 4, 40):
        assert f">{top:g}</text>" in text
    for value, top in ((40.0, 40), (0.8 + 1e-12, 0.8), (0.9, 1), (1.0, 1), (0.0, 1)):
        drawn = line_panels({"a tick itself": {"x": [(8, value)]}}, axis="px")
        assert re.findall(r"text-anchor='end'>([\d.]+)<", drawn)[-1] == f"{top:g}"
    places = [(float(x), float(y)) for x, y in re.findall(r"x=\"([\d.]+)\" y=\"([\d.]+)\" font-weight", text)]
    assert [len({place[axis] for place in places}) for axis in (0, 1)] == [3, 2]
    root = ElementTree.fromstring(text)
    assert max(float(e.attrib["y"]) for e in root.iter() if e.tag.endswith("text")) < float(root.attrib["height"])
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
