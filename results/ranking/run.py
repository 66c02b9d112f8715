"""How well training-free scores rank architectures whose trained accuracy is known, with every baseline proxy beside them.

    python results/ranking/run.py measure SPACE --data DIR [--count N] [--measures structure,proxies] [--seed S] [--label L]
                                                     [--images N] [--size PIXELS] [--mode train|eval]
    python results/ranking/run.py tables

SPACE: nasbench201, nasbench101, macro, timm, mbconv (draws of train.py). DIR holds the tables and the CIFAR-10 archive. `measure` appends
one JSON line per architecture to raw/SPACE.jsonl (with the seed and the label in its name where given) and goes on where it stopped;
`tables` derives table.md and summary.json from what is there.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import benchmarks
import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from capnas.measures.ranking import partial_spearman
from capnas.objective.targets import WEIGHTS
from capnas.profile import profile_model
from capnas.scoring import CAPACITY_WEIGHTS, SCORES, measures_for, score

HERE = Path(__file__).resolve().parent
IMAGES = {"timm": (16, None), "mbconv": (64, 24)}  # images of the probe batch and their size; None: the size that the table lists
OWN = ("timm", "mbconv")  # initialized by their authors' rules: measured at torch's default initialization, as a search measures
WIDTHS = {"nasbench101": 64}  # channels of the first stage where not the published number: half of 128 (raw/nasbench101-quarter: 32)


def measure(space, folder, count, measures, seed, label, images=None, size=None, mode="train"):
    torch.set_num_threads(1)
    rows = benchmarks.table(space, folder, count)
    images, size = (given or usual for given, usual in zip((images, size), IMAGES.get(space, (64, 32))))
    archive, probe = Path(folder) / "cifar10_jpeg.zip", {}
    path = HERE / "raw" / f"{'-'.join([space, *([f'seed{seed}'] if seed else []), *([label] if label else [])])}.jsonl"
    path.parent.mkdir(exist_ok=True)
    known = {(row["arch"], row.get("img_size")) for row in map(json.loads, path.open())} if path.exists() else set()
    names = [n for n in SCORES if set(measures_for([n])) <= {"saturation", *measures} and n != "capacity_slack"]
    with path.open("a") as out:
        for _, row in rows.iterrows():
            if (row["arch"], row.get("img_size")) in known:
                continue
            side = size or int(row["img_size"])
            if side not in probe:
                probe = {side: benchmarks.cifar(archive, images, seed, side)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = benchmarks.build(space, row, WIDTHS.get(space, side if space == "timm" else None))
            start = time.process_time()
            try:
                found = profile_model(model, *probe[side], mode=mode, measures=("saturation", *measures), seed=seed,
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
    environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    (HERE / "raw" / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def records_of(name):
    """The rows of raw/NAME.jsonl."""
    return [json.loads(line) for line in (HERE / "raw" / f"{name}.jsonl").open()]


def is_varied(name):
    """Whether a file holds a part of the cells measured with other settings, which sensitivity.py compares."""
    return name.startswith("nasbench201-") and not name.endswith(("-all", "-trained"))


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
    terms = {name.removeprefix("init_"): weight for name, weight in WEIGHTS.items()}
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
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(v), len(v)) for _ in range(draws)]
    low, high = np.nanquantile([spearmanr(v[i], accuracy[i])[0] for i in picks], [0.025, 0.975])
    return float(low), float(high)


def matched(v, accuracy, cost):
    """Share of pairs within 10 % of cost and with different accuracies that v orders rightly (ties count a half)."""
    i, j = np.triu_indices(len(v), 1)
    near = (np.abs(cost[i] - cost[j]) <= 0.1 * np.minimum(cost[i], cost[j])) & (accuracy[i] != accuracy[j])
    right = np.sign(v[i] - v[j])[near] * np.sign(accuracy[i] - accuracy[j])[near]
    return float((1 + right).mean() / 2) if near.any() else float("nan")


def judge(v, accuracy, params, cost):
    """All statistics of one signal in one space; None where it does not vary."""
    top, best = accuracy >= np.median(accuracy), accuracy >= np.quantile(accuracy, 0.9)
    found = {"spearman": spearmanr(v, accuracy)[0], "kendall": kendalltau(v, accuracy)[0],
             "top_half": spearmanr(v[top], accuracy[top])[0] if np.ptp(v[top]) else None,
             "top_tenth": spearmanr(v[best], accuracy[best])[0] if np.ptp(v[best]) else None,
             "given_params": partial_spearman(v, accuracy, [params]),
             "given_macs": None if cost is None else partial_spearman(v, accuracy, [cost]),
             "matched_pairs": matched(v, accuracy, params if cost is None else cost)}  # fmt: skip
    known = {name: None if value is None or not np.isfinite(value) else float(value) for name, value in found.items()}
    return known | {"interval": interval(v, accuracy)}


def tables():
    summary, lines = {"weights": dict(CAPACITY_WEIGHTS), "spaces": {}}, []
    names = sorted(path.stem for path in (HERE / "raw").glob("*.jsonl"))
    for space in (n for n in names if not n.endswith("-trained") and not is_varied(n)):
        records = records_of(space)
        accuracy = np.array([r["accuracy"] for r in records], dtype=float)
        found = columns(records)
        params, macs = found["params"], found.get("macs")
        rows = {name: judge(v, accuracy, params, macs) for name, v in found.items() if np.ptp(v) > 0}
        times = [r["seconds"] for r in records if "seconds" in r]  # not of the rows whose measuring was not timed
        seconds = float(np.mean(times)) if times else None
        summary["spaces"][space] = {"architectures": len(records), "seconds": seconds, "signals": rows}
        lines += [f"## {space}: {len(records)} architectures{'' if seconds is None else f', {seconds:.2f} CPU seconds each'}", "",
                  "| signal | Spearman [95 %] | Kendall | top half | top tenth | given params | given MACs | pairs of like cost |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["spearman"]):
            low, high = row["interval"]
            cells = ["" if row[n] is None else f"{row[n]:.3f}" for n in ("kendall", "top_half", "top_tenth", "given_params", "given_macs",
                                                                         "matched_pairs")]  # fmt: skip
            lines.append(f"| {name} | {row['spearman']:.3f} [{low:.3f}, {high:.3f}] | {' | '.join(cells)} |")
        lines.append("")
    (HERE / "table.md").write_text("\n".join(lines))
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("measure")
    run.add_argument("space", choices=("nasbench201", "nasbench101", "macro", "timm", "mbconv"))
    run.add_argument("--data", required=True)
    run.add_argument("--count", type=int)
    run.add_argument("--measures", default="structure,proxies")
    run.add_argument("--seed", type=int, default=0, help="of weights and images")
    run.add_argument("--label", help="of the file, for a smaller draw with more measures or other settings")
    run.add_argument("--images", type=int, help="of the probe batch")
    run.add_argument("--size", type=int, help="their side in pixels")
    run.add_argument("--mode", default="train", choices=("train", "eval"), help="state of the norms while measuring")
    commands.add_parser("tables")
    given = parser.parse_args()
    if given.command == "tables":
        tables()
    else:
        measure(given.space, given.data, given.count, tuple(given.measures.split(",")), given.seed, given.label, given.images, given.size,
                given.mode)  # fmt: skip
