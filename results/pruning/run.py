"""Pruning without fine-tuning against Torch-Pruning's importances at equal MACs, and after short fine-tuning.

    python results/pruning/run.py fashion --seeds 0 1           # train the models (kept in --models), prune, append to raw/
    python results/pruning/run.py cifar --cifar cifar10.zip     # CIFAR-10 as {train,test}/<class>/*.jpg in a zip; a subset of 9,000 + 2,000
    python results/pruning/run.py --derive-only                 # table.md from raw/

Every line of raw/ is one network: model, data, seed, method, kept MACs, accuracy on the test images. What is there is not computed again,
except capnas' networks of a former way: batch norms renewed otherwise (no "norms": "moved" in the line), or MBConv narrowed by channels of
its streams (no "streams": "turned"). Their lines are replaced.
Rivals: each importance with the same ratio in all layers and with one global ranking (scope), the ratio found by bisection so that the MACs
are at most the target. ``renewed``: accuracy after batch norm statistics are measured again on the calibration images that capnas uses.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import functools
import io
import json
import os
import platform
import statistics
import time
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from capnas.candidates import count_cost
from capnas.data import load_data
from capnas.narrowing import narrowed, plan_widths, survey
from capnas.norms import measure_norms
from capnas.projection import project_model
from capnas.saved import build_recipe, load_model, save_model
from capnas.training import TrainConfig, evaluate, train

HERE = Path(__file__).resolve().parent
RATIOS, ROUND = (0.75, 0.5, 0.25), 4
EPOCHS = {"fashion": 6, "cifar": 10}
PLAIN = {"device": "cpu", "amp": "off", "record": False}  # float32, so that machines differ in the last digits alone
KEY = ("data", "model", "seed", "method", "scope", "ratio", "epochs")  # of which there is one line
RIVALS_TUNED = 3  # for five epochs, per model
_R4 = range(4)
MODELS = {
    "resnet18-narrow": {"space": "resnet", "params": {
        "stem_pool": False, "stem_width": 24, "block": "basic", "act": "relu", "avg_down": False, "attention": "none",
        **{f"depth{i}": 2 for i in _R4}, **{f"width{i}": 24 * (i + 1) for i in _R4}}},
    "vgg11_bn-narrow": {"space": "vgg", "params": {
        "stages": 4, "act": "relu", "head": 128, "depth0": 1, "depth1": 1, "depth2": 2, "depth3": 2,
        "width0": 16, "width1": 32, "width2": 64, "width3": 96}},
    "mbconv": {"space": "mbconv", "params": {
        "first_stride": 1, "stem_width": 16, "act": "silu", "head": 128, **{f"block{i}": "ir" for i in range(3)},
        **{f"depth{i}": 2 for i in range(3)}, **{f"kernel{i}": 3 for i in range(3)}, **{f"expansion{i}": 6 for i in range(3)},
        **{f"se{i}": 0.25 for i in range(3)}, "width0": 16, "width1": 32, "width2": 64}},
    "convnext": {"space": "convnext", "params": {
        "patch": 2, "act": "gelu", "grn": False, **{f"depth{i}": 2 for i in _R4}, **{f"width{i}": 24 * (i + 1) for i in _R4},
        **{f"kernel{i}": 5 for i in _R4}}},
}  # fmt: skip


NOTES = """\
2,000 test images (one standard error is about 0.8 points), 9,000 to train on. `capnas loss` narrows where the loss per MAC saved is least
(the default), `capnas saturation` makes saturation even; both refit what reads the removed channels on 1,024 training images, without
labels and without a gradient step, and move batch norms with their inputs. The row without refitting has the choice of channels alone;
rivals are not refitted either, and have a row with batch norms measured again. They are Torch-Pruning's importances, each in its better
scope: one ratio for all layers, or one global ranking. A dash is a network that was not computed, or that cannot be made (BN scale finds no
batch norm in ConvNeXt).
All rows of a column are of the seeds that its head counts: those of which the unpruned network and `capnas loss` were both computed. A cell
of fewer says so (n = 1). `kept MACs` is the range over the networks of a row: Torch-Pruning's widths are coarser, so that rivals at a
target keep somewhat fewer. Five epochs: both allocations of capnas and the three rivals that are best after one, by the mean over
seeds. What is fine-tuned on CIFAR-10, and for five epochs MBConv and ConvNeXt, starts from models trained again with the same recipe and
seeds, which are the same to 1.1 points (`before` in the lines of the unpruned networks); all methods of a column start from one model."""
AIMS = """\
Points, means over seeds, paired by seed. Lost: `capnas loss` at half the MACs without fine-tuning, at most 2. Rival: what the best rival
loses, at least twice as much (met by how much more than twice). No refit: what the plan of `capnas loss` loses when channels are only
removed, which no target is set for. Again: the same with the batch norms of the best rival of each seed
measured again. Ratios: the least margin of `capnas loss` over the best rival at 75, 50 and 25 %. Tuned: its margin over the best rival
after 1 and 5 epochs; within the spread over seeds (or one standard error, 0.8) counts as met. A dash: no rival of the same seeds."""
FORMER = """\
In this table the rows of capnas on {} are of networks whose batch norms were measured anew on the calibration images, as an earlier
version did; now their moments move with their inputs."""


@functools.cache
def images_of(name, archive):
    if name == "fashion":
        return load_data("fashion-mnist-12k")
    from PIL import Image

    def part(zipped, which, per_class):
        names = sorted(n for n in zipped.namelist() if f"{which}/" in n and n.endswith(".jpg"))
        classes = sorted({n.split("/")[-2] for n in names})
        x, y = [], []
        for label, kind in enumerate(classes):
            for n in [n for n in names if n.split("/")[-2] == kind][:per_class]:
                x.append(np.asarray(Image.open(io.BytesIO(zipped.read(n))).convert("RGB")))
                y.append(label)
        return np.stack(x), np.array(y)

    with zipfile.ZipFile(archive) as zipped:
        return load_data({"train": part(zipped, "train", 1000), "test": part(zipped, "test", 200)})


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path, lines):
    """The lines in place of the file's, of two of one network the later, at the place of the first."""
    unique = {tuple(line[k] for k in KEY): line for line in lines}
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in unique.values()))
    os.replace(partial, path)


class Bench:
    """One trained model, its images, and the lines known of it."""

    def __init__(self, data_name, data, model_name, seed, folder):
        self.data, self.fitting, self.key = data, {}, {"data": data_name, "model": model_name, "seed": seed}
        self.raw = HERE / "raw" / f"{data_name}-{model_name}-{seed}.jsonl"
        place = folder / f"{data_name}-{model_name}-{seed}"
        recipe = MODELS[model_name] | data.shape()
        if not (place / "manifest.json").exists():
            model = build_recipe(recipe, seed=seed)
            start = time.process_time()
            result = train(model, data, TrainConfig(epochs=EPOCHS[data_name], seed=seed, **PLAIN))
            save_model(model, place, recipe, extra={"status": result.status, "cpu_seconds": time.process_time() - start})
        self.model = load_model(place)
        self.images, self.labels = data.probe(1024, seed=0)
        self.shape = (1, *self.images.shape[1:])
        self.macs = count_cost(self.model, self.shape).macs
        self.rule = {"norms": "moved"} if any(isinstance(m, nn.BatchNorm2d) for m in self.model.modules()) else {}
        self.rule |= {"streams": "turned"} if MODELS[model_name]["space"] == "mbconv" else {}  # alone has streams of linear layers

    @property
    def lines(self):  # read anew, as several processes may write
        return read(self.raw)

    def known(self, **what):
        return any(what.items() <= line.items() for line in self.lines)

    def note(self, **what):
        """Add a line, or replace the one of the same network."""
        line = self.key | what
        folder = os.open(self.raw.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # other processes may write the same file
            write(self.raw, [*self.lines, line])
        finally:
            os.close(folder)
        print(line, flush=True)

    def accuracy(self, model):
        with self.data.final_evaluation() as opened:
            return evaluate(model, opened, "test", amp="off")["accuracy"]

    def kept(self, model):
        return count_cost(model, self.shape).macs / self.macs

    def tuned(self, model, epochs):
        model = copy.deepcopy(model)
        settings = TrainConfig(epochs=epochs, lr=1e-3, warmup_epochs=0.1, seed=0, **PLAIN)
        train(model, self.data, settings, evaluate_on=None)
        return self.accuracy(model)


def importances(tp):
    made = tp.importance
    return {
        "group magnitude": made.GroupMagnitudeImportance(p=2),
        "BN scale": made.BNScaleImportance(),
        "Taylor": made.GroupTaylorImportance(),
        "LAMP": made.LAMPImportance(p=2),
        "FPGM": made.FPGMImportance(p=2),
        "activation": made.ActivationImportance(),
        "random": made.RandomImportance(),
    }


def rival(bench, tp, name, scope, ratio):
    """Torch-Pruning's network with the most MACs that are at most the target, by bisection over its ratio.

    With one ratio for all layers the widths do not depend on the importance: the ratio that fits is found once.
    """
    low, high, best = max(0.0, 0.75 - ratio**0.5), min(0.98, 1.3 - ratio**0.5), None
    known = bench.fitting.get(ratio) if scope == "layer" else None
    for _ in range(6 if known is None else 1):
        middle = (low + high) / 2 if known is None else known
        model = copy.deepcopy(bench.model).eval()
        importance = importances(tp)[name]
        torch.manual_seed(bench.key["seed"])
        if name == "Taylor":
            nn.functional.cross_entropy(model(bench.images), bench.labels).backward()
        if name == "activation":
            with importance.compute_importance(model), torch.no_grad():
                model(bench.images)
        pruner = tp.pruner.BasePruner(model, bench.images[:1], importance=importance, pruning_ratio=middle, round_to=ROUND,
                                      ignored_layers=[model.get_classifier()], global_pruning=scope == "global")  # fmt: skip
        pruner.step()
        kept = bench.kept(model)
        if kept <= ratio:
            high = middle
            if best is None or kept > best[1]:
                best = (model, kept)
                if scope == "layer":
                    bench.fitting[ratio] = middle
        else:
            low = middle
    return best


def renewed(bench, model):
    model = copy.deepcopy(model)
    measure_norms(model, [bench.images])
    return bench.accuracy(model)


def ours(bench, ratios=RATIOS):
    """capnas' networks by allocation and ratio."""
    missing = [(a, r) for a in ("loss", "saturation") for r in ratios
               if not bench.known(method=f"capnas {a}", ratio=r, epochs=0, **bench.rule)]  # fmt: skip
    if not missing:
        return
    start = time.process_time()
    found = survey(bench.model, bench.images)
    measured = time.process_time() - start
    for allocation, ratio in missing:
        plan = plan_widths(found, target_macs=ratio, round_to=ROUND, allocation=allocation)
        start = time.process_time()
        small = narrowed(bench.model, found, plan)
        spent = time.process_time() - start
        bare = bench.accuracy(narrowed(bench.model, found, plan, refit=False)) if allocation == "loss" else None
        bench.note(method=f"capnas {allocation}", scope="", ratio=ratio, kept=bench.kept(small), epochs=0, accuracy=bench.accuracy(small),
                   without_refit=bare, survey_seconds=round(measured, 1), narrow_seconds=round(spent, 1), widths=plan.widths,
                   **bench.rule)  # fmt: skip


def rivals(bench, scopes, ratios=RATIOS):
    import torch_pruning as tp

    for scope in scopes:
        for ratio in sorted(ratios, key=lambda r: abs(r - 0.5)):
            for name in importances(tp):
                if bench.known(method=name, scope=scope, ratio=ratio, epochs=0):
                    continue
                try:
                    best = rival(bench, tp, name, scope, ratio)
                    reason = "no ratio meets the target"
                except Exception as error:
                    best, reason = None, f"{type(error).__name__}: {error}"[:200]
                if best is None:
                    bench.note(method=name, scope=scope, ratio=ratio, epochs=0, accuracy=None, reason=reason)
                else:
                    model, kept = best
                    bench.note(method=name, scope=scope, ratio=ratio, kept=kept, epochs=0, accuracy=bench.accuracy(model),
                               renewed=renewed(bench, model) if ratio == 0.5 else None)  # fmt: skip


def best_rivals(lines, count=RIVALS_TUNED):
    """The rivals that are best after one epoch, by their mean over seeds; only those that were tuned for each seed."""
    found, seeds = defaultdict(dict), {line["seed"] for line in rows_of(lines, method="unpruned", epochs=1)}
    for line in rows_of(lines, epochs=1, ratio=0.5):
        if line["accuracy"] is not None:
            found[line["method"]][line["seed"]] = line["accuracy"]
    means = {m: statistics.mean(a.values()) for m, a in found.items() if not m.startswith("capnas") and len(a) == len(seeds)}
    return sorted(means, key=lambda m: -means[m])[:count]


def finetuned(bench, epochs):
    """Everything at 50 % after fine-tuning, each rival in the scope that was better without; beyond one epoch the best rivals only."""
    import torch_pruning as tp

    if not bench.known(method="unpruned", epochs=epochs):
        bench.note(method="unpruned", scope="", ratio=1.0, kept=1.0, epochs=epochs, before=bench.accuracy(bench.model),
                   accuracy=bench.tuned(bench.model, epochs))  # fmt: skip
    scopes = defaultdict(list)
    for line in bench.lines:
        if line["ratio"] == 0.5 and line["epochs"] == 0 and line["accuracy"] is not None:
            scopes[line["method"]].append((line["accuracy"], line["scope"]))
    rivals = [m for m in scopes if not m.startswith("capnas")]
    if epochs > 1:
        files = bench.raw.parent.glob(f"{bench.key['data']}-{bench.key['model']}-*.jsonl")
        rivals = best_rivals([line for file in files for line in read(file)])  # once per model, so that seeds can be paired
    found = None
    for method in ("capnas loss", "capnas saturation", *rivals):
        mine = method.startswith("capnas")
        rule = bench.rule if mine else {}
        if bench.known(method=method, ratio=0.5, epochs=epochs, **rule):
            continue
        scope = max(scopes[method])[1]
        if mine:
            found = found or survey(bench.model, bench.images)
            small = narrowed(bench.model, found, plan_widths(found, target_macs=0.5, round_to=ROUND, allocation=method.split()[1]))
        else:
            small = rival(bench, tp, method, scope, 0.5)[0]
        found_at = {"scope": scope, "ratio": 0.5, "kept": bench.kept(small)}
        bench.note(method=method, **found_at, epochs=epochs, accuracy=bench.tuned(small, epochs), **rule)


def lossless(bench):
    if bench.known(method="projection"):
        return
    found = project_model(bench.model, bench.images.split(256), bench.accuracy, threshold=0.99)
    bench.note(method="projection", scope="", ratio=1.0, epochs=0, accuracy=found.projected, before=found.accuracy, random=found.random,
               directions=sum(k for k, _ in found.kept.values()), width=sum(d for _, d in found.kept.values()))  # fmt: skip


def rows_of(lines, **what):
    return [line for line in lines if what.items() <= line.items()]


def best_scope(lines):
    """Per model, seed and method the better of the scopes."""
    best = {}
    for line in lines:
        key = (line["model"], line["seed"], line["method"])
        if line["accuracy"] is not None and (key not in best or line["accuracy"] > best[key]["accuracy"]):
            best[key] = line
    return best


def cell(values, count=None):
    values = [100 * v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" + (f" (n = {len(values)})" if len(values) < (count or 0) else "")


def methods_of(lines):
    own = ["capnas loss", "capnas saturation"]
    return own + sorted({line["method"] for line in lines} - {"unpruned", "projection", *own})


def unpruned(lines, epochs):
    """Accuracy of the network itself by model and seed; without fine-tuning it stands beside its projection."""
    wanted, value = ("unpruned", "accuracy") if epochs else ("projection", "before")
    return {(line["model"], line["seed"]): line[value] for line in rows_of(lines, method=wanted, epochs=epochs)}


class Table:
    """Methods by model at one share of the MACs and one length of fine-tuning, all at the same seeds of a model."""

    def __init__(self, lines, ratio, epochs):
        self.at = rows_of(lines, ratio=ratio, epochs=epochs)
        self.epochs, self.ratio, self.base = epochs, ratio, unpruned(lines, epochs)
        self.found = best_scope(self.at)
        self.models = [m for m in MODELS if rows_of(lines, model=m)]
        self.seeds = {m: sorted(s for (n, s) in self.base if n == m and (m, s, "capnas loss") in self.found) for m in self.models}

    def rows(self, model, method):
        return [self.found[model, s, method] for s in self.seeds[model] if (model, s, method) in self.found]

    def values(self, model, method):
        return [line["accuracy"] for line in self.rows(model, method)]

    def again(self, model):
        """Per seed the best rival with its batch norms measured again."""
        return [max((x.get("renewed") or 0 for x in rows_of(self.at, model=model, seed=s)), default=0) or None for s in self.seeds[model]]

    def lost(self, model, method, what="accuracy"):
        """Points lost against the unpruned network, the mean over the seeds that both have, and those points."""
        rows = [line for line in self.rows(model, method) if line.get(what) is not None]
        pairs = [100 * (self.base[model, line["seed"]] - line[what]) for line in rows]
        return (round(statistics.mean(pairs), 6), pairs) if pairs else (None, [])

    def best_rival(self, model):
        """Name and mean points lost of the rival that loses least, of those computed for every seed."""
        rivals = [m for m in methods_of(self.at)[2:] if len(self.rows(model, m)) == len(self.seeds[model])]
        lost = {m: self.lost(model, m)[0] for m in rivals if self.seeds[model]}
        return min(lost.items(), key=lambda item: item[1], default=(None, None))

    def text(self):
        what = "without fine-tuning" if not self.epochs else f"after {self.epochs} epoch{'s' * (self.epochs > 1)} of fine-tuning"
        counts = {m: len(self.seeds[m]) for m in self.models}
        header = " | ".join(f"{m} ({n} seed{'s' * (n != 1)})" for m, n in counts.items())
        text = [f"### {self.ratio:.0%} of the MACs, {what}", "", f"| method | {header} | kept MACs |", "|---|---|" + "---|" * len(counts)]

        def row(name, cells, kept="-"):
            text.append(f"| {name} | " + " | ".join(cells) + f" | {kept} |")

        row("unpruned", [cell([self.base[m, s] for s in self.seeds[m]]) for m in self.models], "1.00")
        for method in methods_of(self.at):
            kept = [line["kept"] for m in self.models for line in self.rows(m, method)]
            span = f"{min(kept):.2f} to {max(kept):.2f}" if kept else "-"
            row(method, [cell(self.values(m, method), counts[m]) for m in self.models], span)
        if not self.epochs:
            if self.ratio == 0.5:
                row("best rival, batch norms measured again", [cell(self.again(m), counts[m]) for m in self.models])
            row("capnas loss, no refitting",
                [cell([x["without_refit"] for x in self.rows(m, "capnas loss")], counts[m]) for m in self.models])  # fmt: skip
        own = [x for m in self.models for name in methods_of([]) for x in self.rows(m, name)]
        former = sorted({x["model"] for x in own if x["model"] != "convnext" and x.get("norms") != "moved"})  # ConvNeXt has no batch norm
        return [*text, "", *([FORMER.format(" and ".join(former)), ""] if former else [])]


def targets(lines):
    """What was aimed at, and by how much it was met or missed."""

    def verdict(met, by):
        return f"{'met' if met else 'missed'} by {abs(by):.{1 if abs(by) >= 0.05 else 2}f}"

    def points(value):
        return f"{round(value, 1) + 0.0:.1f}"  # no minus before a zero

    head = "| data | model | lost | no refit | rival | again | ratios | tuned 1 | tuned 5 |"
    text = ["## Targets", "", AIMS, "", head, "|---|" + "---|" * 8]
    for data in sorted({line["data"] for line in lines}, reverse=True):
        here = rows_of(lines, data=data)
        tables = {r: Table(here, r, 0) for r in RATIOS}
        half = tables[0.5]
        for model in half.models:
            own, (_, other) = half.lost(model, "capnas loss")[0], half.best_rival(model)
            if other is None:
                continue  # its rivals are not measured yet
            again = [100 * (half.base[model, s] - a) for s, a in zip(half.seeds[model], half.again(model)) if a is not None]
            rivals = {ratio: t.best_rival(model)[1] for ratio, t in tables.items() if t.seeds[model]}
            margins = [rival - tables[r].lost(model, "capnas loss")[0] for r, rival in rivals.items() if rival is not None]
            bare = half.lost(model, "capnas loss", "without_refit")[0]
            cells = [f"{points(own)}, {verdict(own <= 2, 2 - own)}", "-" if bare is None else points(bare)]
            cells.append(f"{points(other)}, {verdict(other >= 2 * own, other - 2 * own)}")
            least = statistics.mean(again) if again else None
            cells.append("-" if least is None else f"{points(least)}, {verdict(least >= 2 * own, least - 2 * own)}")
            cells.append(verdict(min(margins) > 0, min(margins)))
            for epochs in (1, 5):
                tuned = Table(here, 0.5, epochs)
                rival_name, rival_lost = tuned.best_rival(model)
                if rival_name is None:
                    cells.append("-")
                    continue
                mean, lost = tuned.lost(model, "capnas loss")
                spread = max([0.8, *(statistics.stdev(p) for p in (lost, tuned.lost(model, rival_name)[1]) if len(p) > 1)])
                margin = rival_lost - mean
                cells.append(f"{round(margin, 1) + 0.0:+.1f} over {rival_name}, {'met' if margin >= -spread else 'missed'}")
            text.append(f"| {data} | {model} | " + " | ".join(cells) + " |")
    lost = [(100 * (x["before"] - x["accuracy"]), x) for x in rows_of(lines, method="projection")]
    over = [f"{x['data']} {x['model']} seed {x['seed']} by {by - 1:.1f}" for by, x in lost if round(by, 6) >= 1]
    text += ["", f"Under 1 point lost on the 99 % eigenspaces, of each model and seed: met by {len(lost) - len(over)} of {len(lost)}"
             + (f"; missed: {', '.join(over)}." if over else "."), ""]  # fmt: skip
    return text


def derived(lines):
    """The text of table.md."""
    text = ["# Pruning: accuracy on test images, in points of one hundred (mean ± standard deviation over seeds)", "", NOTES, ""]
    text += targets(lines)
    for data in sorted({line["data"] for line in lines}, reverse=True):
        here = rows_of(lines, data=data)
        text += [f"## {data}", ""]
        for epochs in sorted({line["epochs"] for line in here}):
            for ratio in RATIOS:
                if rows_of(here, ratio=ratio, epochs=epochs):
                    text += Table(here, ratio, epochs).text()
        text += ["### Every layer but the head on its 99 % eigenspace", ""]
        text += ["| model | seed | before | projected | lost | random | directions |", "|---|---|---|---|---|---|---|"]
        for line in rows_of(here, method="projection"):
            before, after, chance = (100 * line[k] for k in ("before", "accuracy", "random"))
            directions = f"{line['directions']} of {line['width']}"
            values = f"{before:.1f} | {after:.1f} | {before - after:.1f} | {chance:.1f} | {directions}"
            text.append(f"| {line['model']} | {line['seed']} | {values} |")
        text.append("")
    return "\n".join(text)


def derive():
    lines = [line for path in sorted((HERE / "raw").glob("*.jsonl")) for line in read(path)]
    (HERE / "table.md").write_text(derived(lines), encoding="utf-8")


def environment(path):
    """Note the versions that lines were computed with."""
    import timm
    import torch_pruning

    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    versions |= {"torch_pruning": torch_pruning.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps(versions, indent=1) + "\n")


def arguments(text):
    """A parser with what chooses trained models, see `benches`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=["fashion", "cifar"], default="fashion")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/pruning-models"), help="where trained models are kept")
    return parser


def benches(args):
    """The trained models of these arguments, one by one, in one thread."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = images_of(args.data, args.cifar)
    for seed in args.seeds:
        for name in args.models:
            yield Bench(args.data, data, name, seed, args.folder)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--scopes", nargs="+", choices=["layer", "global"], default=["layer", "global"])
    steps = ["ours", "rivals", "one", "five"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps[:2], help="one, five: epochs of fine-tuning at 50 %%")
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=RATIOS)
    parser.add_argument("--derive-only", action="store_true")
    args = parser.parse_args()
    if not args.derive_only:
        for bench in benches(args):
            if "ours" in args.steps:
                lossless(bench)
                ours(bench, args.ratios)
            if "rivals" in args.steps:
                rivals(bench, args.scopes, args.ratios)
            if "one" in args.steps:
                finetuned(bench, 1)
        if "five" in args.steps:  # the rivals are chosen over all seeds
            for bench in benches(args):
                finetuned(bench, 5)
        environment(HERE / "environment.json")
    derive()


if __name__ == "__main__":
    main()
