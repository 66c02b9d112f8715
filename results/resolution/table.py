"""table.md and figure.svg from raw/."""

import json
import math
import statistics

import numpy as np

from capnas.measures import evenness
from capnas.measures.resolution import SizeReading, recommend
from capnas.measures.width_resolution import best_within, cross, predicted_grid
from capnas.report.panels import line_panels

POINTS = 100
VALIDATION = 500  # images of the short runs' accuracies, in both data sets


INTRO = """# Which image size?

Scale: small. Narrow networks (networks.py), ten epochs of batch 32, AdamW; CIFAR-10: 2,000 training, 500 validation and 3,000 test
images of the 60,000; clothing photographs: 1,600, 500 and 1,681. The short runs see the validation images, the sweep is judged on
the test images. A budget is what one image costs at one of the sizes: the dearest (all sizes are affordable) or the middle one.
Receptive fields of the last convolution: short 43 px, vgg10 181 px, vgg16 196 px, resnet18 139 to 435 px."""


def missing(full, tuned):
    """What the script has not come to yet, by seed: sweeps with both recommendations, and the published effects."""
    lines = []
    for seed in SEEDS:
        judged_here = [f["tuned"]["case"] for f in judged(full, tuned) if f["tuned"]["seed"] == seed]
        cases = [f"{d} {n}" for d, names in NETWORKS.items() for n in names]
        lacking = [case for case in cases if judged_here.count(case) < BUDGETS]
        there = {(r["network"], r["effect"]) for r in full if r["seed"] == seed and "effect" in r}
        lacking += [f"effect {network} {effect}" for network, effect in EFFECTS if (network, effect) not in there]
        if lacking:
            lines.append(f"Seed {seed} is incomplete: {', '.join(lacking)} missing; `run.py` again goes on.")
    return "\n".join(lines)


SEEDS, BUDGETS = (0, 1, 2), 2
EFFECTS = (("resnet18", "no early downsampling"), ("resnet18", "canvas"), ("vgg16", "canvas"))
NETWORKS = {"cifar": ("short", "vgg16", "resnet18"), "clothing": ("short", "vgg10", "resnet18")}


def write_all(folder, full, tuned, grid):
    full, tuned = once(full), once(tuned)
    parts = [INTRO, cases(full, tuned), missing(full, tuned), sweeps(full), effects(full), mobile(grid)]
    (folder / "table.md").write_text("\n\n".join(p for p in parts if p) + "\n")
    if full:
        (folder / "figure.svg").write_text(figure(full))


def once(rows):
    return list({row["job"]: row for row in rows}.values())


def bits(row):
    """Hit or miss of every test image; the last byte of the stored text is filled up with misses."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["hits"]), np.uint8))


def paired_error(a, b):
    """Standard error, in points, of the difference of two accuracies on the same images."""
    images = round(bits(a).sum() / a["test_accuracy"])
    gap = bits(a)[:images].astype(float) - bits(b)[:images]
    return POINTS * float(gap.std()) / math.sqrt(images)


def table(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *(f"| {' | '.join(map(str, r))} |" for r in rows)])


def judged(full, tuned):
    """One dict per recommendation whose sweep is complete."""
    for t in sorted(tuned, key=lambda t: (t["seed"], t["case"], -t["budget"])):
        sweep = {r["size"]: r for r in full if r["case"] == t["case"] and r["seed"] == t["seed"]}
        if {s["size"] for s in t["surveys"]} - set(sweep):
            continue
        allowed = [r for r in sweep.values() if r["macs"] <= t["budget"]]
        best, got = max(allowed, key=accuracy), sweep[again(t, budget=t["budget"])]
        by_validation = max(sorted(allowed, key=lambda r: r["macs"]), key=lambda r: r["validation"][-1])
        largest = max(allowed, key=lambda r: r["size"])
        yield {
            "tuned": t,
            "all": len(allowed) == len(sweep),
            "priced": sweep[again(t)],
            "best": best,
            "got": got,
            "regret": accuracy(best) - accuracy(got),
            "error": paired_error(best, got),
            "sweep": accuracy(best) - accuracy(by_validation),
            "no dearer": max(accuracy(r) for r in allowed if r["macs"] <= got["macs"]) - accuracy(got),
            "largest": accuracy(best) - accuracy(largest),
            "random": accuracy(best) - statistics.mean(map(accuracy, allowed)),
            "macs": POINTS * t["macs_share"],
            "cpu": POINTS * t["cpu_seconds"] / sum(r["cpu_seconds"] for r in allowed),
        }


def again(t, budget=None):
    """The recommendation from the stored short runs, so that it is always that of the rule as it stands; with the price where no budget."""
    readings = [SizeReading(**{**r["reading"], "saturations": tuple(r["reading"]["saturations"])}) for r in t["runs"] if r["reading"]]
    return recommend(readings, budget=budget, images=VALIDATION).size


def accuracy(row):
    return POINTS * row["test_accuracy"]


def cases(full, tuned):
    found = list(judged(full, tuned))
    if not found:
        return ""
    rows = []
    for f in found:
        t, got, best = f["tuned"], f["got"], f["best"]
        row = [
            t["case"],
            t["seed"],
            f"{t['budget'] / 1e6:.1f}M" + (" (all sizes)" if f["all"] else ""),
            f"{got['size']} px",
            f"{best['size']} px",
        ]
        row += [f"{accuracy(got):.1f}", f"{f['regret']:.2f} ± {f['error']:.2f}", f"{f['sweep']:.2f}"]
        row += [f"{f['no dearer']:.2f}", f"{f['random']:.1f}"]
        row += [f"{got['macs'] / 1e6:.1f}M / {best['macs'] / 1e6:.1f}M"]
        row += [f"{evenness.tail_length(got['saturations'])} of {len(got['saturations'])}", f"{f['macs']:.0f} %", f"{f['cpu']:.0f} %"]
        rows.append(row)
    head = ["case", "seed", "budget", "recommended", "best of the sweep", "its test accuracy", "regret", "regret of the sweep"]
    head += ["regret, no dearer size", "regret of a random size", "MACs, recommended / best", "tail there", "cost, MACs", "cost, CPU time"]
    parts = ["## Recommendation against the exhaustive sweep", "", table(head, rows), ""]
    parts += [summary("With all sizes affordable", [f for f in found if f["all"]])]
    parts += [summary("With the smaller budget", [f for f in found if not f["all"]])]
    parts += [NOTE, priced([f for f in found if f["all"]])]
    return "\n".join(parts)


NOTE = """
Regret: test accuracy of the best size within the budget minus that of the recommended size, both trained in full, in points, with the
paired standard error of that difference over the test images. "Regret of the sweep": of the size with the best validation accuracy at
the end of the full trainings, which is what the validation images tell at the full cost. "No dearer size": the same against sizes that
cost no more than the recommended one. The best of a sweep is the best of several noisy numbers, so that a perfect choice has a regret
above zero on average."""


def summary(name, found):
    if not found:
        return ""
    count, mean = len(found), lambda key: statistics.mean(f[key] for f in found)
    within = sum(f["regret"] <= 0.5 for f in found)
    swept = sum(f["sweep"] <= 0.5 for f in found)
    close = sum(f["regret"] <= max(0.5, 2 * f["error"]) for f in found)
    dearer = sum(f["no dearer"] <= 0.5 for f in found)
    fair = [f for f in found if len({r["size"] for r in f["tuned"]["runs"]}) > 1]
    lone = count - len(fair)
    first = [f for f in found if f["tuned"]["seed"] == SEEDS[0]]
    compared = [f for f in fair if f["tuned"]["seed"] == SEEDS[0]]
    left = f" ({near(first)} of seed {SEEDS[0]} alone"
    if lone:
        left += f"; in {lone} of these the border rule left one size and nothing was compared"
        left += f": {near(fair)} of the others, {near(compared)} of seed {SEEDS[0]}"
    left += ")"
    most = {key: f"{max(f[key] for f in found):.0f} %" for key in ("macs", "cpu")}
    less, error = beside_the_sweep(found)
    return (
        f"{name}: regret at most 0.5 points in {within} of {count}{left}, at most 0.5 points or two standard errors in {close}; "
        f"against sizes that cost no more than the recommended one at most 0.5 points in {dearer}. "
        f"The whole sweep, choosing by the validation accuracy at its end: at most 0.5 points in {swept}. "
        f"Mean regret {mean('regret'):.2f} points, of the sweep's own choice {mean('sweep'):.2f} (ours less this, mean over the cases and "
        f"its standard error: {less:+.2f} ± {error:.2f}), of a random size {mean('random'):.2f}. "
        f"Always the largest size affordable: at most 0.5 points in {near(found, 'largest')}, mean regret {mean('largest'):.2f}. "
        f"Cost at most {most['macs']} of the sweep in MACs, {most['cpu']} in CPU time."
    )


def near(found, what="regret"):
    return f"{sum(f[what] <= 0.5 for f in found)} of {len(found)}"


def beside_the_sweep(found):
    """Mean of the regret less that of the sweep's own choice, and its standard error over the cases."""
    less = [f["regret"] - f["sweep"] for f in found]
    return statistics.mean(less), statistics.stdev(less) / math.sqrt(len(less)) if len(less) > 1 else math.nan


def priced(found):
    """What is recommended where no budget is given, from the same short runs."""
    if not found:
        return ""
    rows = []
    for f in found:
        got, best = f["priced"], f["best"]
        regret = f"{accuracy(best) - accuracy(got):.2f} ± {paired_error(best, got):.2f}"
        rows.append((f["tuned"]["case"], f["tuned"]["seed"], f"{got['size']} px", regret, f"{POINTS * got['macs'] / best['macs']:.0f} %"))
    text = "The same short runs with each doubling of MACs priced at a quarter of a point; the best size is the best of all."
    return f"\n## Without a budget\n\n{text}\n\n" + table(("case", "seed", "recommended", "regret", "MACs, of the best size's"), rows)


def sweeps(full):
    rows = []
    for r in sorted(full, key=lambda r: (r["case"], r["seed"], r["size"])):
        if "effect" not in r:
            rows.append((r["case"], r["seed"], *profile(r)))
    return "## The sweep\n\n" + table(("case", "seed", *PROFILE), rows) if rows else ""


PROFILE = ("size", "MACs", "test accuracy", "mean saturation", "evenness", "CV", "tail", "past the border", "CPU s")


def profile(r):
    s = r["saturations"]
    levels = (evenness.mean(s), evenness.evenness(s), evenness.coefficient_of_variation(s))
    counts = (f"{evenness.tail_length(s)} of {len(s)}", f"{r['unproductive']} of {len(s)}", f"{r['cpu_seconds']:.0f}")
    return (f"{r['size']} px", f"{r['macs'] / 1e6:.2f}M", f"{accuracy(r):.1f}", *(f"{v:.2f}" for v in levels), *counts)


def effects(full):
    rows = []
    for r in sorted(full, key=lambda r: (r["network"], r["seed"], "effect" in r, r["size"])):
        if r["data"] == "cifar" and r["network"] != "short" and (r["size"] in (32, 64)):
            rows.append((r["network"], r["seed"], r.get("effect", "as it is"), *profile(r)))
    if not any("effect" in r for r in full):
        return ""
    parts = ["## The published effects on CIFAR-10", table(("network", "seed", "what", *PROFILE), rows), CHANGES, changes(full)]
    return "\n\n".join(parts)


CHANGES = "Change of the test accuracy against 32 px as it is, in points, with the paired standard error over the test images."


def changes(full):
    """What each published remedy did to the accuracy, seed by seed."""
    found = {(r["network"], r["seed"], r.get("effect", "as it is"), r["size"]): r for r in full if r["data"] == "cifar"}
    rows = []
    for network in ("vgg16", "resnet18"):
        for what, size in (("as it is", 64), ("no early downsampling", 32), ("canvas", 64)):
            cells = []
            for seed in SEEDS:
                before, after = found.get((network, seed, "as it is", 32)), found.get((network, seed, what, size))
                both = before is not None and after is not None
                cells.append(f"{accuracy(after) - accuracy(before):+.1f} ± {paired_error(after, before):.1f}" if both else "-")
            if set(cells) != {"-"}:
                name = {"as it is": "32 to 64 px", "canvas": "32 px on a canvas of 64 px"}.get(what, what)
                rows.append((network, name, *cells))
    return table(("network", "change", *(f"seed {seed}" for seed in SEEDS)), rows)


def mobile(path):
    """Published MACs and accuracies of MobileNetV2, as the ranking study holds them; every width up to 1 at every size, or an error."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells = {(float(r["arch"].partition("-")[2]), r["img_size"]): r for r in rows}
    cells = {(width, size): r for (width, size), r in cells.items() if width <= 1}  # above 1 there is one resolution only
    grid = {(width, size) for width, _ in cells for _, size in cells}
    if not cells or grid != set(cells):
        raise ValueError(f"{path} lacks cells of MobileNetV2: {sorted(grid - set(cells)) or 'all'}")
    macs, truth = {cell: r["macs"] / 1e6 for cell, r in cells.items()}, {cell: r["accuracy"] / 100 for cell, r in cells.items()}
    trained = cross(truth)
    values = predicted_grid({c: truth[c] for c in trained})
    cost = sum(macs[c] for c in trained) / sum(macs.values())
    rules = {
        "ours: cross of the cheapest row and column": values,
        "the most MACs": macs,
        "the widest": {c: c[0] + c[1] * 1e-6 for c in macs},
        "the finest": {c: c[1] + c[0] * 1e-6 for c in macs},
    }
    budgets = sorted(macs.values())
    lines = []
    for name, score in rules.items():
        regrets = [POINTS * (truth[best_within(truth, macs, b)] - truth[best_within(score, macs, b)]) for b in budgets]
        small = sum(r <= 0.5 for r in regrets)
        lines.append((name, f"{statistics.mean(regrets):.2f}", f"{max(regrets):.1f}", f"{small} of {len(regrets)}"))
    chosen = []
    for b in budgets:
        cells = (best_within(values, macs, b), best_within(truth, macs, b))
        chosen.append((f"{b:.0f}M", *(f"{w:g} at {r} px, {POINTS * truth[w, r]:.1f}" for w, r in cells)))
    text = (
        f"A budget at the MACs of each of the {len(macs)} cells, regret in points of ImageNet top-1. "
        f"The cross takes {POINTS * cost:.0f} % of the MACs of the whole grid to train."
    )
    rules_table = table(("rule", "mean regret", "greatest", "at most 0.5"), lines)
    return "\n\n".join(["## Width against resolution, MobileNetV2", text, rules_table, table(("budget", "our choice", "best"), chosen)])


def figure(full):
    panels = {}
    for data in sorted({r["data"] for r in full}):
        rows = [r for r in full if r["data"] == data and "effect" not in r]
        networks = list(dict.fromkeys(r["network"] for r in rows))
        for title, of in (
            ("test accuracy", lambda r: r["test_accuracy"]),
            ("mean saturation", lambda r: evenness.mean(r["saturations"])),
            ("tail (share of layers)", lambda r: evenness.tail_fraction(r["saturations"])),
        ):
            panels[f"{data}: {title}"] = {
                n: [(s, statistics.mean(of(r) for r in rows if r["network"] == n and r["size"] == s))
                    for s in sorted({r["size"] for r in rows if r["network"] == n})] for n in networks
            }  # fmt: skip
    return line_panels(panels, axis="pixels", columns=3)
