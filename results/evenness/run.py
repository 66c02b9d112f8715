"""Does an even profile of saturation cost accuracy or gain it, and at which MACs? From the rows of the ranking study, nothing is trained.

    python results/evenness/run.py

Architectures of a space are cut into three groups of MACs; within each the evener half is compared with the less even one. Writes
table.md, evenness.json and evenness.svg. What a search does that is steered to evenness is another question, see results/search.
"""

import json
from pathlib import Path

import numpy as np

from capnas.measures.ranking import partial_spearman

HERE = Path(__file__).resolve().parent
RAW = HERE.parent / "ranking" / "raw"
SPACES = {"nasbench201": "NAS-Bench-201", "nasbench101": "NAS-Bench-101", "macro": "NAS-Bench-Macro", "timm": "timm on ImageNet",
          "mbconv": "mbconv, short training"}  # fmt: skip
READINGS = {"block_saturation_evenness": "blocks, untrained", "saturation_evenness": "layers, untrained", "trained": "layers, trained"}
GROUPS = ("few MACs", "medium", "many MACs")


def rows(space):
    """Accuracy in points, MACs and evenness by reading; evenness after the training where it was kept."""
    found = [json.loads(line) for line in (RAW / f"{space}.jsonl").open()]
    trained = {}
    if (path := RAW / f"{space}-trained.jsonl").exists():
        kept = [json.loads(line) for line in path.open()]
        trained = {r["arch"]: r["after_training"]["saturation_evenness"] for r in kept if r["status"] == "complete"}
    accuracy = np.array([r["accuracy"] for r in found], dtype=float)
    macs = np.array([r.get("macs") or r.get("flops") or r.get("gmacs") or r.get("n_macs") for r in found], dtype=float)
    readings = {name: np.array([r["scores"][name] for r in found], dtype=float) for name in READINGS if name in found[0]["scores"]}
    if trained:
        readings["trained"] = np.array([trained[r["arch"]] for r in found], dtype=float)
    return accuracy * (100 if accuracy.max() <= 1 else 1), macs, readings


def gain(accuracy, even, chance, draws=1000):
    """Mean accuracy of the evener half less that of the other, in points, with a bootstrapped 95 % interval."""
    high = even >= np.median(even)

    def difference(i):
        a, h = accuracy[i], high[i]
        return a[h].mean() - a[~h].mean() if h.any() and not h.all() else np.nan

    spread = [difference(chance.integers(len(accuracy), size=len(accuracy))) for _ in range(draws)]
    return [float(difference(np.arange(len(accuracy)))), *(float(q) for q in np.nanquantile(spread, (0.025, 0.975)))]


def study():
    """Space and reading to the gains in the three groups and the partial correlation."""
    chance, found = np.random.default_rng(0), []
    for space in SPACES:
        accuracy, macs, readings = rows(space)
        edges = np.quantile(macs, (1 / 3, 2 / 3))
        group = np.searchsorted(edges, macs, side="right")
        for reading, even in readings.items():
            ok = np.isfinite(even)
            gains = [gain(accuracy[ok & (group == g)], even[ok & (group == g)], chance) for g in range(3)]
            partial = partial_spearman(even[ok], accuracy[ok], [macs[ok]])
            found.append({"space": space, "reading": reading, "architectures": int(ok.sum()), "partial": float(partial), "gains": gains})
    return found


def table(found):
    lines = [
        f"| space | evenness of | architectures | partial correlation given MACs | {' | '.join(GROUPS)} |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(GROUPS),
    ]
    for row in found:
        cells = [f"{g:+.2f} [{low:+.2f}, {high:+.2f}]" for g, low, high in row["gains"]]
        head = (SPACES[row["space"]], READINGS[row["reading"]], str(row["architectures"]), f"{row['partial']:.2f}")
        lines.append(f"| {' | '.join((*head, *cells))} |")
    note = ("Last three columns: mean accuracy of the evener half less that of the less even half, in points, among architectures of like "
            "MACs (thirds of the space), with bootstrapped 95 % intervals. Evenness is 1 - Gini of saturation.")  # fmt: skip
    return "\n".join([*lines, "", note]) + "\n"


def figure(found):
    """One line of points a space and reading: gain of the evener half by group of MACs."""
    width, left, line = 900, 250, 26
    height = 70 + line * len(found)
    span = 12.0
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/>',
             '<text x="10" y="20" font-size="15">Accuracy of the evener half less the other, points, at like MACs</text>']  # fmt: skip

    def x(value):
        return left + (min(max(value, -span), span) + span) / (2 * span) * (width - left - 20)

    for tick in range(-12, 13, 4):
        parts.append(f'<line x1="{x(tick):.1f}" y1="48" x2="{x(tick):.1f}" y2="{height - 20}" stroke="{"#888" if not tick else "#ddd"}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:+d}</text>')
    for i, (name, colour) in enumerate(zip(GROUPS, COLOURS)):
        parts.append(f'<circle cx="{left + 130 * i}" cy="36" r="4" fill="{colour}"/><text x="{left + 10 + 130 * i}" y="40">{name}</text>')
    for i, row in enumerate(found):
        y = 64 + line * i
        parts.append(f'<text x="10" y="{y + 4}">{SPACES[row["space"]]}: {READINGS[row["reading"]]}</text>')
        for j, ((value, low, high), colour) in enumerate(zip(row["gains"], COLOURS)):
            at = y - 6 + 6 * j
            parts.append(f'<line x1="{x(low):.1f}" y1="{at}" x2="{x(high):.1f}" y2="{at}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x(value):.1f}" cy="{at}" r="3.5" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


COLOURS = ("#86bfe0", "#2f6db5", "#1b2f52")

if __name__ == "__main__":
    rows_found = study()
    (HERE / "evenness.json").write_text(json.dumps(rows_found, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows_found))
    (HERE / "evenness.svg").write_text(figure(rows_found))
    print(table(rows_found))
