"""Does an even profile of saturation cost accuracy or gain it, and at which MACs? From the rows of the ranking study, nothing is trained.

    python results/evenness/run.py

Twofold. Architectures of a space are cut into thirds by MACs; within each third the evener half of every ten neighbours in MACs is compared
with the less even half. And steering is simulated: of 20 architectures drawn at random under a limit on MACs, the one that short accuracy
names is compared with the one that short accuracy plus a weight times evenness (of the untrained network) names, by final accuracy; on the
spaces whose short trainings are known. Intervals are of other architectures in the place of these (bootstrapped, in the first part within
each ten). Writes table.md, evenness.json and evenness.svg.
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
LIKE = 10  # neighbours in MACs that are compared: a third of a space spans several times its least MACs
LIMITS = {"cheapest third": 1 / 3, "cheaper two thirds": 2 / 3, "all": 1.0}  # limits on MACs, as quantiles of the space
WEIGHTS, DRAWN = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), 20  # of evenness, beside accuracy as a fraction; architectures of one simulated search
STEERED = ("nasbench201", "nasbench101", "mbconv")  # short accuracy known
FEW = (0.05, 0.2, 1.0)  # weights in the figure


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


def neighbours(macs):
    """Places of architectures, about `LIKE` of like MACs at a time."""
    return np.array_split(np.argsort(macs, kind="stable"), max(1, len(macs) // LIKE))


def difference(accuracy, even, groups, middle=np.mean):
    """Accuracy of the evener half of each group less that of the other, in points; means of halves and over groups, or medians of both."""
    found = []
    for near in groups:
        high = even[near] >= np.median(even[near])
        if not high.all():
            found.append(middle(accuracy[near][high]) - middle(accuracy[near][~high]))
    return middle(found) if found else np.nan


def gain(accuracy, even, macs, chance, draws=1000):
    """`difference` of `neighbours` by the mean, with a bootstrapped 95 % interval."""
    groups = neighbours(macs)
    spread = [difference(accuracy, even, [near[chance.integers(len(near), size=len(near))] for near in groups]) for _ in range(draws)]
    return [float(difference(accuracy, even, groups)), *(float(q) for q in np.nanquantile(spread, (0.025, 0.975)))]


def steered(short, final, even, weights, chance, searches):
    """Final accuracy of what the sum names less that of what short accuracy names, points, mean over searches; one number a weight."""
    drawn = chance.integers(len(final), size=(searches, DRAWN))
    alone = final[np.take_along_axis(drawn, short[drawn].argmax(1)[:, None], 1)[:, 0]]
    summed = short[drawn] + np.multiply.outer(weights, even[drawn])  # (weights, searches, DRAWN)
    named = final[np.take_along_axis(drawn[None], summed.argmax(2)[..., None], 2)[..., 0]]
    return (named - alone).mean(1)


def steering(searches=4000, samples=300):
    """Space, reading and limit to the gain of each weight of evenness, with a 95 % interval."""
    chance, found = np.random.default_rng(1), []
    for space in STEERED:
        accuracy, macs, readings = rows(space)
        short = np.array([json.loads(line)["short_accuracy"] for line in (RAW / f"{space}.jsonl").open()], dtype=float)
        short = short / (100 if short.max() > 1 else 1)
        for reading in (r for r in readings if r != "trained"):
            for limit, share in LIMITS.items():
                ok = np.flatnonzero(macs <= np.quantile(macs, share))
                parts, even = (short[ok], accuracy[ok]), np.nan_to_num(readings[reading][ok])
                gains = steered(*parts, even, np.array(WEIGHTS), chance, searches)
                spread = []
                for _ in range(samples):
                    again = chance.integers(len(ok), size=len(ok))
                    spread.append(steered(*(p[again] for p in parts), even[again], np.array(WEIGHTS), chance, searches // 10))
                low, high = np.quantile(spread, (0.025, 0.975), axis=0)
                found.append({"space": space, "reading": reading, "limit": limit, "architectures": len(ok),
                              "macs": float(macs[ok].max()) * (1e9 if macs.max() < 1e6 else 1), "drawn": DRAWN,
                              "gains": {str(w): [float(v) for v in row] for w, row in zip(WEIGHTS, zip(gains, low, high))}})  # fmt: skip
    return found


def study():
    """Space and reading to the gains in the three groups and the partial correlation."""
    chance, found = np.random.default_rng(0), []
    for space in SPACES:
        accuracy, macs, readings = rows(space)
        edges = np.quantile(macs, (1 / 3, 2 / 3))
        group = np.searchsorted(edges, macs, side="right")
        for reading, even in readings.items():
            ok = np.isfinite(even)
            thirds = [ok & (group == g) for g in range(3)]
            gains = [gain(accuracy[third], even[third], macs[third], chance) for third in thirds]
            medians = [float(difference(accuracy[t], even[t], neighbours(macs[t]), np.median)) for t in thirds]
            spans = [macs[third][near].max() / macs[third][near].min() for third in thirds for near in neighbours(macs[third])]
            partial = partial_spearman(even[ok], accuracy[ok], [macs[ok]])
            found.append({"space": space, "reading": reading, "architectures": int(ok.sum()), "partial": float(partial), "gains": gains,
                          "medians": medians, "span": float(np.median(spans))})  # fmt: skip
    return found


def table(found):
    lines = [
        f"| space | evenness of | architectures | partial correlation given MACs | {' | '.join(GROUPS)} |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(GROUPS),
    ]
    for row in found:
        cells = [f"{g:+.2f} [{low:+.2f}, {high:+.2f}], {m:+.2f}" for (g, low, high), m in zip(row["gains"], row["medians"])]
        head = (SPACES[row["space"]], READINGS[row["reading"]], str(row["architectures"]), f"{row['partial']:.2f}")
        lines.append(f"| {' | '.join((*head, *cells))} |")
    spans = [row["span"] for row in found]
    note = (f"Last three columns: mean accuracy of the evener half less that of the less even half, in points, among {LIKE} neighbours in "
            f"MACs at a time (their greatest MACs are {min(spans):.2f} to {max(spans):.2f} times their least, medians over the tens of a "
            "space), mean over a third of the space, with bootstrapped 95 % intervals; then the same by medians, of each half and over the "
            "tens, which a few networks of very low accuracy do not move. Evenness is 1 - Gini of saturation.")  # fmt: skip
    return "\n".join([*lines, "", note]) + "\n"


def steering_table(found):
    lines = ["", f"Simulated steering, {DRAWN} architectures drawn under a limit on MACs; the one that accuracy + w x evenness names less "
             "the one that accuracy names, both after the short training, in points of final accuracy:", "",
             f"| space | evenness of | MACs | architectures | {' | '.join(f'w = {w:g}' for w in WEIGHTS)} |",
             "| --- | --- | --- | ---: |" + " ---: |" * len(WEIGHTS)]  # fmt: skip
    for row in found:
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["gains"][str(w)]) for w in WEIGHTS]
        limit = f"at most {row['macs'] / 1e6:,.1f} M ({row['limit']})"
        lines.append(f"| {SPACES[row['space']]} | {READINGS[row['reading']]} | {limit} | {row['architectures']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def panel(found, names, title, span, step, top):
    """One line of points a row: a value and its interval in each of the colours, on a scale of -span to span."""
    width, left, line = 900, 330, 26
    bottom = top + 50 + line * len(found)
    parts = [f'<text x="10" y="{top + 20}" font-size="15">{title}</text>']

    def x(value):
        return left + (min(max(value, -span), span) + span) / (2 * span) * (width - left - 20)

    for tick in range(-span, span + 1, step):
        stroke = "#ddd" if tick else "#888"
        parts.append(f'<line x1="{x(tick):.1f}" y1="{top + 48}" x2="{x(tick):.1f}" y2="{bottom}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:+d}</text>')
    for i, (name, colour) in enumerate(zip(names, COLOURS)):
        at = left + 130 * i
        parts.append(f'<circle cx="{at}" cy="{top + 36}" r="4" fill="{colour}"/><text x="{at + 10}" y="{top + 40}">{name}</text>')
    for i, (label, gains) in enumerate(found):
        y = top + 64 + line * i
        parts.append(f'<text x="10" y="{y + 4}">{label}</text>')
        for j, ((value, low, high), colour) in enumerate(zip(gains, COLOURS)):
            at = y - 6 + 6 * j
            parts.append(f'<line x1="{x(low):.1f}" y1="{at}" x2="{x(high):.1f}" y2="{at}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x(value):.1f}" cy="{at}" r="3.5" fill="{colour}"/>')
    return parts, bottom + 30


def figure(found, steered_rows):
    """What is there, by group of MACs, above what steering gives, by weight of evenness."""
    there = [(f"{SPACES[r['space']]}: {READINGS[r['reading']]}", r["gains"]) for r in found]
    then = [(f"{SPACES[r['space']]}: {READINGS[r['reading']].split(',')[0]}, {r['limit']}", [r["gains"][str(w)] for w in FEW])
            for r in steered_rows]  # fmt: skip
    above, middle = panel(there, GROUPS, "Accuracy of the evener half less the other, points, at like MACs", 12, 4, 0)
    title = f"Steering: best of {DRAWN} by accuracy + w x evenness less the best by accuracy, points, under a limit on MACs"
    below, end = panel(then, [f"w = {w:g}" for w in FEW], title, 6, 2, middle)
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {end}" font-family="sans-serif" font-size="12">',
            f'<rect width="900" height="{end}" fill="white"/>']  # fmt: skip
    return "\n".join([*head, *above, *below, "</svg>"]) + "\n"


COLOURS = ("#86bfe0", "#2f6db5", "#1b2f52")

if __name__ == "__main__":
    rows_found, steered_found = study(), steering()
    (HERE / "evenness.json").write_text(json.dumps({"there": rows_found, "steered": steered_found}, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows_found) + steering_table(steered_found))
    (HERE / "evenness.svg").write_text(figure(rows_found, steered_found))
    print((HERE / "table.md").read_text())
