"""How well training-free scores rank architectures whose trained accuracy is known, with every baseline proxy beside them.

    python results/ranking/run.py measure SPACE --data DIR [--count N] [--measures structure,proxies] [--seed S] [--label L]
                                                     [--images N] [--size PIXELS] [--mode train|eval] [--others] [--width N]
    python results/ranking/run.py second SPACE --data DIR [--others]
    python results/ranking/run.py baselines SPACE --data DIR [--count N]
    python results/ranking/run.py tables

SPACE: nasbench201, nasbench101, macro, timm, mbconv (draws of train.py), mobilenetv2 (widths times image sizes; no weight was ever
fitted on it). DIR holds the tables and the CIFAR-10 archive. `measure` appends one JSON line per architecture to raw/SPACE.jsonl (with the
seed and the label in its name where given) and goes on where it stopped.
With `--others` it draws from what raw/SPACE.jsonl does not hold: no weight was fitted on these rows (raw/SPACE-others.jsonl).
`second` reads the terms of both sums from a second draw of the weights of the same networks, on every second image where there are more
than a few (raw/SPACE-second.jsonl): a search takes the mean of `capnas.profile.INITIALIZATIONS` draws, and so do the tables, see
`records_of`; other signals are of the first.
`baselines` draws N rows of it and adds naswot and synflow of the same untrained networks on the same images: raw/SPACE-baselines.jsonl.
`tables` derives table.md and summary.json from what is there; files named `timed` tell the seconds of a space whose rows were not timed.
"""

import argparse
import functools
import json
import platform
import time
from pathlib import Path

import benchmarks
import numpy as np
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from capnas.measures.evenness import evenness
from capnas.measures.proxies import naswot, synflow
from capnas.measures.ranking import partial_spearman
from capnas.objective.gates import UNTRAINED
from capnas.objective.targets import WEIGHTS, known_before
from capnas.profile import at_default_initialization, profile_model
from capnas.profile.reading import some
from capnas.scoring import CAPACITY_WEIGHTS, SCORES, measures_for, score

HERE = Path(__file__).resolve().parent
# images of the probe batch and their size; None: the size that the table lists
IMAGES = {"timm": (16, None), "mobilenetv2": (16, None), "mbconv": (64, 24)}
OWN = ("timm", "mobilenetv2", "mbconv")  # initialized by their authors' rules: measured at torch's default, as a search measures
# terms of the sums that a draw of the weights changes
DRAWN = ("block_saturation_evenness", "saturation90_mean", "dimension", "block_saturation90_mean", "params_in_use")
WIDTHS = {"nasbench101": 64}  # channels of the first stage where not the published number: half of 128


def built(space, row, side, seed, width=None):
    """An untrained network of a space, for images of `side` pixels where it comes from timm; `width` in the place of `WIDTHS`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return benchmarks.build(space, row, side if space == "timm" else width or WIDTHS.get(space))


def measure(space, folder, count, measures, seed, label, images=None, size=None, mode="train", others=False,
            width=None):  # fmt: skip
    torch.set_num_threads(1)
    fitted = [json.loads(line)["arch"] for line in (HERE / "raw" / f"{space}.jsonl").open()] if others else []
    rows = benchmarks.table(space, folder, count, without=fitted)
    images, size = (given or usual for given, usual in zip((images, size), IMAGES.get(space, (64, 32))))
    probe = functools.cache(lambda side: benchmarks.cifar(Path(folder) / "cifar10_jpeg.zip", images, seed, side))
    path = HERE / "raw" / f"{'-'.join([space, *([f'seed{seed}'] if seed else []), *([label] if label else [])])}.jsonl"
    path.parent.mkdir(exist_ok=True)
    known = {(row["arch"], row.get("img_size")) for row in map(json.loads, path.open())} if path.exists() else set()
    before = len(known)
    names = [n for n in UNTRAINED if set(measures_for([n])) <= {"saturation", *measures}]
    with path.open("a") as out:
        for _, row in rows.iterrows():
            if (row["arch"], row.get("img_size")) in known:
                continue
            side = size or int(row["img_size"])
            model = built(space, row, side, seed, width)
            x, y = probe(side)
            start = time.process_time()
            try:
                found = profile_model(model, x, y, mode=mode, measures=("saturation", *measures), seed=seed,
                                      initialize=space in OWN)  # fmt: skip
            except Exception as error:
                print(row["arch"], type(error).__name__, str(error)[:100], flush=True)
                continue
            seconds = time.process_time() - start
            values = {n: None if v != v or abs(v) == float("inf") else v for n, v in score(found, names).items()}
            keep = {k: row[k] for k in ("accuracy", "short_accuracy", "params", "macs", "gmacs", "flops", "c10_naswot", "c10_logsynflow",
                                        "unique", "img_size") if k in row}  # fmt: skip
            keep = {k: v.item() if hasattr(v, "item") else v for k, v in keep.items()}
            keep = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in keep.items()}
            blocks = [[r.saturation, *r.saturations.values(), r.effective_rank and r.effective_rank / r.width] for r in found.blocks]
            record = {"arch": row["arch"], **keep, "n_params": int(found.network["params"]), "n_macs": int(found.network["macs"]),
                      "seconds": round(seconds, 3), "scores": values,
                      "blocks": np.round(np.array(blocks, dtype=float), 4).tolist()}  # fmt: skip
            out.write(json.dumps(record) + "\n")
            out.flush()
            known.add((row["arch"], row.get("img_size")))
    if len(known) > before:  # else the versions are those of the rows that are there
        environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        (HERE / "raw" / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def unmeasured(space, folder, records, path):
    """Records that a file of rows does not hold yet, each with its network's row of the table, its side in pixels and the probe batch."""
    images, size = IMAGES.get(space, (64, 32))
    published = {key_of(r): r for _, r in benchmarks.table(space, folder).iterrows()}
    probe = functools.cache(lambda side: benchmarks.cifar(Path(folder) / "cifar10_jpeg.zip", images, 0, side)[0])
    known = {key_of(r) for r in map(json.loads, path.open())} if path.exists() else set()
    for record in records:
        if key_of(record) not in known and key_of(record) in published:
            side = size or int(record["img_size"])
            yield record, published[key_of(record)], side, probe(side)


def second(space, folder, others):
    """The terms of the sums that depend on the weights, from the next seed: of every row that the space holds."""
    torch.set_num_threads(1)
    name = space + "-others" * others
    path = HERE / "raw" / f"{name}-second.jsonl"
    for record, published, side, x in unmeasured(space, folder, records_of(name, draws=1), path):
        model = built(space, published, side, 1)
        start = time.process_time()
        found = profile_model(model, some(x), mode="train", measures=("saturation",), seed=1, initialize=space in OWN)
        row = {"seconds": round(time.process_time() - start, 3), "scores": score(found, DRAWN),
               "blocks": [round(r.saturation, 4) for r in found.blocks]}  # fmt: skip
        with path.open("a") as out:
            out.write(json.dumps({k: record[k] for k in ("arch", "img_size") if k in record} | row) + "\n")


def baselines(space, folder, count):
    """naswot and synflow alone, beside the scores that the rows of the space hold."""
    torch.set_num_threads(1)
    path, rows = HERE / "raw" / f"{space}-baselines.jsonl", records_of(space, draws=1)
    drawn = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
    for record, published, side, x in unmeasured(space, folder, drawn, path):
        model = built(space, published, side, 0)
        model = at_default_initialization(model, seed=0) if space in OWN else model
        start = time.process_time()
        found = {"naswot": naswot(model, x).value, "synflow": synflow(model, x[:1]).value}
        seconds = time.process_time() - start
        found = {name: value if np.isfinite(value) else None for name, value in found.items()}
        row = {k: v for k, v in record.items() if k != "seconds"} | {"scores": record["scores"] | found}
        with path.open("a") as out:
            out.write(json.dumps(row | {"proxy_seconds": round(seconds, 3)}) + "\n")


def key_of(record):
    return record["arch"], record.get("img_size")


def records_of(name, draws=2):
    """The rows of raw/NAME.jsonl; with two draws, the terms of the sums are those of the mean profile where a second draw was read."""
    rows = [json.loads(line) for line in (HERE / "raw" / f"{name}.jsonl").open()]
    again = HERE / "raw" / f"{name.replace('-baselines', '').replace('-all', '')}-second.jsonl"
    if draws == 1 or not again.exists():
        return rows
    found = {key_of(r): r for r in map(json.loads, again.open())}
    return [averaged(row, found[key_of(row)]) if key_of(row) in found else row for row in rows]


def averaged(row, again):
    """A row with the terms of the sums as `capnas.profile.averaged` gives them."""
    a, b = row["scores"], again["scores"]
    means = {name: (a[name] + b[name]) / 2 for name in DRAWN}
    means["dimension"] = float(np.log2((2 ** a["dimension"] + 2 ** b["dimension"]) / 2))  # log2 of 1 + a sum
    means["block_saturation_evenness"] = evenness([(p[0] + q) / 2 for p, q in zip(row["blocks"], again["blocks"], strict=True)])
    return row | {"scores": a | means, "seconds": row.get("seconds", 0) + again["seconds"]}


def is_varied(name):
    """Whether a file holds a part of a space measured with other settings, which sensitivity.py compares."""
    return "-" in name and not name.endswith(("-all", "-trained", "-proxies", "-baselines", "-quarter", "-timed", "-others", "-second"))


def costs(record):
    """Parameters and MACs: published where the table has them, else those of the network that was measured."""
    macs = record.get("macs") or record.get("flops") or (record.get("gmacs") or 0) * 1e9 or record.get("n_macs")
    return float(record.get("params") or record["n_params"]), None if macs is None else float(macs)


def columns(records):
    """Signal name to an array over the records, higher expected better."""
    found = {}
    for name in records[0]["scores"]:
        values = [r["scores"].get(name) for r in records]
        if sum(v is not None for v in values) >= 0.9 * len(values):
            sign = 1 if SCORES[name].direction == "maximize" else -1
            low = min(sign * v for v in values if v is not None)
            found[name] = np.array([low if v is None else sign * v for v in values])
    terms = np.array([[r["scores"].get(n) or 0.0 for n in CAPACITY_WEIGHTS] for r in records])
    found["capacity_score"] = terms @ np.array(list(CAPACITY_WEIGHTS.values()))  # today's weights
    found["params"] = np.array([costs(r)[0] for r in records])
    if all(costs(r)[1] for r in records):
        found["macs"] = np.array([costs(r)[1] for r in records])
    parts = sized(found)
    terms = {name.removeprefix("init_"): weight for name, weight in known_before(WEIGHTS).items()}  # no table has losses
    if all(r.get("short_accuracy") is not None for r in records) and set(terms) <= set(parts):
        short = np.array([r["short_accuracy"] for r in records])
        found["combined"] = short / (100 if short.max() > 1 else 1) + sum(weight * parts[name] for name, weight in terms.items())
    for name in ("c10_naswot", "c10_logsynflow", "short_accuracy"):
        if all(name in r for r in records):
            values = np.array([np.nan if r[name] is None else r[name] for r in records], dtype=float)
            found[name.replace("c10_", "published ")] = np.where(np.isnan(values), np.nanmin(values), values)
    return found


def sized(found):
    """The signals and, where the costs are known, log2 of the MACs as a signal."""
    return found | ({"log2_macs": np.log2(found["macs"])} if "macs" in found else {})


def interval(v, accuracy, draws=200):
    """Bootstrapped 95 % interval of Spearman's correlation."""
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(v), len(v)) for _ in range(draws)]
    ranks = [rankdata(values[np.stack(picks)], axis=1) for values in (v, accuracy)]
    x, y = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):  # a draw in which the signal does not vary
        low, high = np.nanquantile((x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1)), [0.025, 0.975])
    return float(low), float(high)


def matched(v, accuracy, cost):
    """Share of pairs within 10 % of cost and with different accuracies that v orders rightly (ties count a half)."""
    i, j = np.triu_indices(len(v), 1)
    near = (np.abs(cost[i] - cost[j]) <= 0.1 * np.minimum(cost[i], cost[j])) & (accuracy[i] != accuracy[j])
    right = np.sign(v[i] - v[j])[near] * np.sign(accuracy[i] - accuracy[j])[near]
    return float((1 + right).mean() / 2) if near.any() else float("nan")


def judge(v, accuracy, params, cost):
    """All statistics of one signal in one space; None where it does not vary."""
    parts = {"top_half": accuracy >= np.median(accuracy), "top_tenth": accuracy >= np.quantile(accuracy, 0.9)}
    found = {"spearman": spearmanr(v, accuracy)[0], "kendall": kendalltau(v, accuracy)[0]}
    for name, part in parts.items():
        varies = np.ptp(v[part]) > 0
        found[name] = spearmanr(v[part], accuracy[part])[0] if varies else None
        found[f"{name}_kendall"] = kendalltau(v[part], accuracy[part])[0] if varies else None
    found |= {"given_params": partial_spearman(v, accuracy, [params]),
              "given_macs": None if cost is None else partial_spearman(v, accuracy, [cost]),
              "given_both": None if cost is None else partial_spearman(v, accuracy, [params, cost]),
              "matched_pairs": matched(v, accuracy, params if cost is None else cost)}  # fmt: skip
    known = {name: None if value is None or not np.isfinite(value) else float(value) for name, value in found.items()}
    top = parts["top_half"]
    return known | {"interval": interval(v, accuracy),
                    "top_half_interval": None if known["top_half"] is None else interval(v[top], accuracy[top])}  # fmt: skip


def number(value):
    return "" if value is None else f"{value:.3f}"


def ranged(value, spread):
    """A number with its interval."""
    return "" if value is None else f"{value:.3f} [{spread[0]:.3f}, {spread[1]:.3f}]"


def timing(space, records):
    """Processor seconds an architecture, of how many; those of a timed sample where the rows themselves were not timed."""
    times = [r["seconds"] for r in records if "seconds" in r]
    if not times and (HERE / "raw" / f"{space}-timed.jsonl").exists():
        times = [r["seconds"] for r in records_of(f"{space}-timed")]
    return (float(np.mean(times)), len(times)) if times else (None, 0)


SHORT = {  # scores after a training: file, then rows with the final accuracies and the scores before it
    "nasbench201, 1 epoch": ("nasbench201-1-epoch-trained", "nasbench201-all", "accuracy after 200 epochs"),
    "mbconv, 1 epoch": ("mbconv-1-epoch-trained", "mbconv", "accuracy after 6 epochs"),
    "mbconv, 6 epochs": ("mbconv-trained", "mbconv", "accuracy after the same 6 epochs"),
}


def after_training():
    """Scores after a short training beside the same before any: how they rank the final accuracy."""
    found = {}
    for label, (file, before, target) in SHORT.items():
        untrained = {r["arch"]: r for r in records_of(before)}
        rows = [r for r in records_of(file) if r["status"] == "complete" and r["arch"] in untrained]
        accuracy = np.array([untrained[r["arch"]]["accuracy"] for r in rows])
        top, signals = accuracy >= np.median(accuracy), {}
        for name in rows[0]["after_training"]:
            if name == "accuracy" and file == f"{before}-trained":
                continue  # the accuracy that is ranked
            pair = {"after": [r["after_training"][name] for r in rows], "before": [untrained[r["arch"]]["scores"].get(name) for r in rows]}
            for when, values in pair.items():
                if None not in values:
                    v = np.array(values)
                    signals.setdefault(name, {})[when] = {"spearman": float(spearmanr(v, accuracy)[0]), "interval": interval(v, accuracy),
                                                          "top_half": float(spearmanr(v[top], accuracy[top])[0])}  # fmt: skip
        found[label] = {"architectures": len(rows), "target": target, "signals": signals}
    return found


def trained_lines(found):
    lines = ["## Scores after a short training", "",
             "| training | architectures | signal | after: Spearman [95 %] | after: top half | untrained: Spearman | untrained: top half |",
             "| --- | ---: | --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for label, row in found.items():
        for name, signal in row["signals"].items():
            after, before = signal["after"], signal.get("before", {"spearman": None, "top_half": None})
            lines.append(f"| {label}; {row['target']} | {row['architectures']} | {name} | {ranged(after['spearman'], after['interval'])} | "
                         f"{number(after['top_half'])} | {number(before['spearman'])} | {number(before['top_half'])} |")  # fmt: skip
    return [*lines, ""]


def tables():
    summary, lines = {"weights": dict(CAPACITY_WEIGHTS), "sum": dict(WEIGHTS), "spaces": {}}, []
    names = sorted(path.stem for path in (HERE / "raw").glob("*.jsonl"))
    rest = ("kendall", "top_half", "top_half_kendall", "top_tenth", "top_tenth_kendall", "given_params", "given_macs", "given_both",
            "matched_pairs")  # fmt: skip
    for space in (n for n in names if not n.endswith(("-trained", "-timed", "-second")) and not is_varied(n)):
        records = records_of(space)
        accuracy = np.array([r["accuracy"] for r in records], dtype=float)
        found = columns(records)
        params, macs = found["params"], found.get("macs")
        rows = {name: judge(v, accuracy, params, macs) for name, v in found.items() if np.ptp(v) > 0}
        seconds, timed = timing(space, records)
        summary["spaces"][space] = {"architectures": len(records), "seconds": seconds, "timed": timed, "signals": rows}
        cost = "" if seconds is None else f", {seconds:.2f} CPU seconds each" + ("" if timed == len(records) else f" (mean of {timed})")
        lines += [f"## {space}: {len(records)} architectures{cost}", "",
                  "| signal | Spearman [95 %] | Kendall | top half [95 %] | its Kendall | top tenth | its Kendall | given params "
                  "| given MACs | given both | pairs of like cost |", "| --- |" + " --- |" * (len(rest) + 1)]  # fmt: skip
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["spearman"]):
            cells = [ranged(row[n], row["top_half_interval"]) if n == "top_half" else number(row[n]) for n in rest]
            lines.append(f"| {name} | {ranged(row['spearman'], row['interval'])} | {' | '.join(cells)} |")
        lines.append("")
    summary["after_training"] = after_training()
    lines += trained_lines(summary["after_training"])
    (HERE / "table.md").write_text("\n".join(lines))
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("measure")
    run.add_argument("space", choices=benchmarks.SPACES)
    run.add_argument("--data", required=True)
    run.add_argument("--count", type=int)
    run.add_argument("--measures", default="structure,proxies")
    run.add_argument("--seed", type=int, default=0, help="of weights and images")
    run.add_argument("--label", help="of the file, for a smaller draw with more measures or other settings")
    run.add_argument("--images", type=int, help="of the probe batch")
    run.add_argument("--size", type=int, help="their side in pixels")
    run.add_argument("--mode", default="train", choices=("train", "eval"), help="state of the norms while measuring")
    run.add_argument("--others", action="store_true", help="rows that no weight was fitted on")
    run.add_argument("--width", type=int, help="channels of the first stage, not of timm and MobileNetV2 (raw/nasbench101-quarter: 32)")
    again = commands.add_parser("second")
    again.add_argument("space", choices=benchmarks.SPACES)
    again.add_argument("--data", required=True)
    again.add_argument("--others", action="store_true", help="of raw/SPACE-others.jsonl")
    few = commands.add_parser("baselines")
    few.add_argument("space", choices=benchmarks.SPACES)
    few.add_argument("--data", required=True)
    few.add_argument("--count", type=int, default=100)
    commands.add_parser("tables")
    given = parser.parse_args()
    if given.command == "tables":
        tables()
    elif given.command == "second":
        second(given.space, given.data, given.others)
    elif given.command == "baselines":
        baselines(given.space, given.data, given.count)
    else:
        measure(given.space, given.data, given.count, tuple(given.measures.split(",")), given.seed,
                given.label or ("others" if given.others else None), given.images, given.size, given.mode, given.others,
                given.width)  # fmt: skip
