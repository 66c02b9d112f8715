"""Excess capacity of two small networks on an easy and a harder task of equal size and shape.

    python results/excess/run.py --cifar PATH             # about 15 core minutes; goes on where it stopped
    python results/excess/run.py --cifar PATH --fresh     # all of it again
    python results/excess/run.py --table-only             # table.md and figure.svg from raw/ again

PATH is CIFAR-10 as a folder, or a zip of one, with train/CLASS/*.jpg. The easy task is the embedded fashion-mnist-12k. Both are cut to
1,000 training and 9,000 validation images of ten classes, at 12 x 12 pixels in three channels, so that the networks are the same.
"""

import argparse
import functools
import io
import json
import os
import platform
import shutil
import statistics
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from networks import plain, residual
from PIL import Image

from capnas.data import load_data
from capnas.excess import Recipe, excess_capacity, read_study

HERE = Path(__file__).resolve().parent
NETWORKS = {"plain": plain, "residual": residual}
TASKS = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10"}
FACTORS = (1.0, 0.75, 0.55, 0.4, 0.3)  # on norms and on distances
RECIPE = Recipe(epochs=25, lr=0.1, batch_size=64, project_every=30)
SIZE, PER_CLASS, VALIDATION, TOLERANCE, SEEDS = 12, 1000, 0.9, 0.01, (0, 1, 2)


def cifar(path):
    """The first images of each class, by name: 1,000 for training and validation, 10 that stand in for a test split nobody opens."""
    if path.is_dir():
        files = {str(p.relative_to(path)): p.read_bytes for p in path.glob("train/*/*.jpg")}
    else:
        archive = zipfile.ZipFile(path)
        names = [n for n in archive.namelist() if "train/" in n and n.endswith(".jpg")]
        files = {n: (lambda n=n: archive.read(n)) for n in names}
    classes = defaultdict(list)
    for name in sorted(files):
        classes[Path(name).parent.name].append(name)
    parts = {"train": ([], []), "test": ([], [])}
    for label, members in enumerate(classes[c] for c in sorted(classes)):
        for number, name in enumerate(members[: PER_CLASS + 10]):
            images, labels = parts["train" if number < PER_CLASS else "test"]
            images.append(np.asarray(Image.open(io.BytesIO(files[name]())).convert("RGB")))
            labels.append(label)
    return {split: (np.stack(images), np.array(labels)) for split, (images, labels) in parts.items()}


def task(name, path):
    source = "fashion-mnist-12k" if name == "fashion" else cifar(path)
    return load_data(source, image_size=SIZE, in_chans=3, validation=VALIDATION)


def tell(where, run):
    """A run that was trained just now, on the console and by the environment."""
    print(where, run.seed, run.lipschitz, run.distance, run.train_error, run.validation_error, f"{run.seconds:.1f} s", flush=True)
    environment = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
                   "cores": os.cpu_count(), "processor": platform.machine()}  # fmt: skip
    (HERE / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def train(path, networks, tasks, fresh):
    spent = time.process_time()
    for task_name in tasks:
        data = task(task_name, path)
        for name in networks:
            out = HERE / "raw" / f"{name}-{task_name}"
            model = NETWORKS[name](data.num_classes, data.in_chans, data.image_size)
            if fresh:
                shutil.rmtree(out, ignore_errors=True)
            excess_capacity(model, data, lipschitz=FACTORS, distance=FACTORS, seeds=SEEDS, recipe=RECIPE,
                            tolerance=TOLERANCE, full_grid=True, device="cpu", name=name, out=out,
                            on_run=functools.partial(tell, out.name))  # fmt: skip
    print(f"CPU seconds: {time.process_time() - spent:.0f}")


def best(found):
    return "none" if found is None else f"{found.lipschitz:g} / {found.distance:g}"


def spread(values):
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def unfinished(study):
    """Settings that are not trained with all seeds yet."""
    return [s for s in study.read(tolerance=TOLERANCE).settings if s.verdict == "skipped"]


def write_table():
    studies = {f.name: read_study(f) for f in sorted((HERE / "raw").iterdir()) if f.is_dir()}
    studies = {f"{n}-{t}": studies[f"{n}-{t}"] for n in NETWORKS for t in TASKS if f"{n}-{t}" in studies}
    first = next(iter(studies.values())).header
    recipe, sizes = first["recipe"], first["data"]["sizes"]
    lines = [
        "Derived from raw/ by `python results/excess/run.py --table-only`.", "",
        f"{sizes['train']:,} training and {sizes['validation']:,} validation images at {first['data']['image_size']} px, "
        f"{recipe['epochs']} epochs of SGD (lr {recipe['lr']}, batch {recipe['batch_size']}, "
        f"projection every {recipe['project_every']} steps), "
        f"{len(first['seeds'])} seeds, factors {', '.join(format(f, 'g') for f in FACTORS)} on norms and on distances. "
        "Error is the share of images, mean over seeds; 'alone' is the mean (lowest to highest) over seeds judged one by one.", "",
    ]  # fmt: skip
    open_ends = [f"{name} ({len(left)} settings)" for name, study in studies.items() if (left := unfinished(study))]
    if open_ends:
        lines += [f"**Not finished: {', '.join(open_ends)}. Their excess is a lower bound.** The command goes on.", ""]
    for hold, text in (("validation", "the validation error"), ("train", "the training error")):
        for tolerance in (TOLERANCE, 2 * TOLERANCE):
            head = ("network", "task", "train error", "validation error", "log10 club", "tightest held: norms / distances x",
                    "excess club", "alone", "at own margins", "excess spade", "excess Lipschitz", "slack decades")  # fmt: skip
            lines += [f"## Excess capacity in decades, {text} held within {tolerance:g}", ""]
            lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
            for name, study in studies.items():
                network, task_name = name.split("-")
                r = study.read(tolerance=tolerance, hold=hold)
                cells = (network, TASKS[task_name], f"{r.train_error:.3f}", f"{r.validation_error:.3f}", f"{r.unconstrained['club']:.2f}",
                         best(r.tightest["club"]), f"{r.decades['club']:.2f}", spread(r.per_seed["club"]), f"{r.own_decades['club']:.2f}",
                         f"{r.decades['spade']:.3f}", f"{r.decades['lipschitz']:.2f}", f"{r.slack_decades:.2f}")  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    lines += ["## Every setting: rise of the error over the unconstrained network, mean over seeds", "",
              "| network | task | norms x | distances x | train | validation | decades club |", "|---" * 7 + "|"]  # fmt: skip
    for name, study in studies.items():
        network, task_name = name.split("-")
        for s in study.read(tolerance=TOLERANCE).settings:
            rises = ["-" if v is None else f"{v:+.3f}" for v in (s.train_rise, s.validation_rise)]
            decades = s.verdict if s.decades is None else f"{s.decades['club']:.2f}"
            lines.append(f"| {network} | {TASKS[task_name]} | {s.lipschitz:g} | {s.distance:g} | {rises[0]} | {rises[1]} | {decades} |")
    lines += ["", f"## Layers: unconstrained, and in the tightest class that held the validation error within {TOLERANCE:g}", ""]
    lines.append("| network | task | layer | weights | s start | s | s limit | b | b limit | (2,1) norm at the start |")
    lines.append("|---" * 10 + "|")
    for name, study in studies.items():
        network, task_name = name.split("-")
        for row in study.layers(study.read(tolerance=TOLERANCE).tightest["club"]):
            numbers = (row[k] for k in ("norm_start", "norm", "norm_limit", "distance", "distance_limit", "radius"))
            lines.append(f"| {network} | {TASKS[task_name]} | {row['name']} | {row['weights']} | "
                         + " | ".join("-" if v is None else f"{v:.2f}" for v in numbers) + " |")  # fmt: skip
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    figure(studies)


def figure(studies):
    """Decades of the first bound against the rise of the validation error, one line of markers per study."""
    points = {name: [s for s in study.read(tolerance=TOLERANCE).settings if s.decades] for name, study in studies.items()}
    x_max = max(s.decades["club"] for p in points.values() for s in p)
    y_max = max(s.validation_rise for p in points.values() for s in p)
    wide, high, left, top = 640, 360, 60, 20
    colours = dict(zip(studies, ("#1b6ca8", "#d1495b", "#2a9d5c", "#b8860b")))
    place = lambda s: (left + 400 * s.decades["club"] / x_max, top + 290 * (1 - max(s.validation_rise, 0) / y_max))  # noqa: E731
    level = top + 290 * (1 - TOLERANCE / y_max)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
             f'<rect width="{wide}" height="{high}" fill="white"/>',
             f'<path d="M{left} {top}V{top + 290}H{left + 410}" fill="none" stroke="black"/>',
             f'<path d="M{left} {level:.0f}H{left + 410}" stroke="gray" stroke-dasharray="4 3"/>',
             f'<text x="{left + 415}" y="{level + 4:.0f}" fill="gray">tolerance {TOLERANCE:g}</text>',
             f'<text x="{left + 60}" y="{top + 325}">decades below the unconstrained bound (first bound)</text>',
             f'<text transform="translate(18 {top + 220}) rotate(-90)">rise of validation error</text>']  # fmt: skip
    parts += [f'<text x="{left + 400 * v / x_max:.0f}" y="{top + 306}" text-anchor="middle">{v:g}</text>'
              for v in (0, 0.5, 1, 1.5, 2) if v <= x_max]  # fmt: skip
    parts += [f'<text x="{left - 6}" y="{top + 290 * (1 - v / y_max) + 4:.0f}" text-anchor="end">{v:g}</text>'
              for v in (0, 0.05, 0.1, 0.15) if v <= y_max]  # fmt: skip
    for i, (name, settings) in enumerate(points.items()):
        for s in settings:
            x, y = place(s)
            title = f"{name}: norms x {s.lipschitz:g}, distances x {s.distance:g}, {s.validation_rise:+.4f}"
            mark = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colours[name]}" fill-opacity="0.75">'
            parts.append(f"{mark}<title>{title}</title></circle>")
        parts.append(f'<circle cx="490" cy="{top + 20 * i + 10}" r="5" fill="{colours[name]}"/>')
        parts.append(f'<text x="502" y="{top + 20 * i + 14}">{name.replace("-", ", ")}</text>')
    (HERE / "figure.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--networks", default="plain,residual")
    parser.add_argument("--tasks", default="fashion,cifar")
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that are there, of these networks and tasks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.table_only:
        if given.cifar is None and "cifar" in given.tasks:
            parser.error("--cifar PATH is needed: CIFAR-10 as a folder or a zip with train/CLASS/*.jpg")
        train(given.cifar, given.networks.split(","), given.tasks.split(","), given.fresh)
    write_table()
