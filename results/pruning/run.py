"""Pruning without fine-tuning against Torch-Pruning's importances at equal MACs, and after short fine-tuning.

    python results/pruning/run.py fashion --seeds 0 1           # train the models (kept in --models), prune, append to raw/
    python results/pruning/run.py cifar --cifar cifar10.zip     # CIFAR-10 as {train,test}/<class>/*.jpg in a zip; a subset of 9,000 + 2,000
    python results/pruning/run.py --derive-only                 # table.md from raw/

Every line of raw/ is one network: model, data, seed, method, kept MACs, accuracy on the test images. What is there is not computed again.
Rivals: each importance with the same ratio in all layers and with one global ranking (scope), the ratio found by bisection so that the MACs
are at most the target. ``renewed``: accuracy after batch norm statistics are measured again on the calibration images that capnas uses.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
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
from capnas.narrowing.calibration import norms_behind
from capnas.narrowing.correcting import correct
from capnas.projection import project_model
from capnas.saved import build_recipe, load_model, save_model
from capnas.training import TrainConfig, evaluate, train

HERE = Path(__file__).resolve().parent
RATIOS, ROUND = (0.75, 0.5, 0.25), 4
EPOCHS = {"fashion": 6, "cifar": 10}
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
labels and without a gradient step. Rivals are Torch-Pruning's importances, each in its better scope: one ratio for all layers, or one
global ranking. A dash is a network that was not computed, or that cannot be made (BN scale finds no batch norm in ConvNeXt).
The head of a column counts the seeds of the unpruned network in that table, of which the last may lack methods; a number without ± is of
one seed."""


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


class Bench:
    """One trained model, its images, and the lines known of it."""

    def __init__(self, data_name, data, model_name, seed, folder):
        self.data, self.fitting, self.key = data, {}, {"data": data_name, "model": model_name, "seed": seed}
        self.raw = HERE / "raw" / f"{data_name}-{model_name}-{seed}.jsonl"
        place = folder / f"{data_name}-{model_name}-{seed}"
        recipe = MODELS[model_name] | {"num_classes": data.num_classes, "in_chans": data.in_chans, "image_size": data.image_size}
        if not (place / "manifest.json").exists():
            model = build_recipe(recipe, seed=seed)
            start = time.process_time()
            result = train(model, data, TrainConfig(epochs=EPOCHS[data_name], seed=seed, device="cpu", record=False))
            save_model(model, place, recipe, extra={"status": result.status, "cpu_seconds": time.process_time() - start})
        self.model = load_model(place)
        self.images, self.labels = data.probe(1024, seed=0)
        self.shape = (1, *self.images.shape[1:])
        self.macs = count_cost(self.model, self.shape).macs

    @property
    def lines(self):  # read anew, as several processes may write
        return [json.loads(line) for line in self.raw.read_text().splitlines()] if self.raw.exists() else []

    def known(self, **what):
        return any(what.items() <= line.items() for line in self.lines)

    def note(self, **what):
        line = self.key | what
        with self.raw.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(line, flush=True)

    def accuracy(self, model):
        with self.data.final_evaluation() as opened:
            return evaluate(model, opened, "test", device="cpu")["accuracy"]

    def kept(self, model):
        return count_cost(model, self.shape).macs / self.macs

    def tuned(self, model, epochs):
        model = copy.deepcopy(model)
        settings = TrainConfig(epochs=epochs, lr=1e-3, warmup_epochs=0.1, seed=0, device="cpu", record=False)
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
    correct(model, {}, {}, norms_behind(model, bench.images[:2]), bench.images)
    return bench.accuracy(model)


def ours(bench, ratios=RATIOS):
    """capnas' networks by allocation and ratio."""
    missing = [(a, r) for a in ("loss", "saturation") for r in ratios if not bench.known(method=f"capnas {a}", ratio=r, epochs=0)]
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
                   without_refit=bare, survey_seconds=round(measured, 1), narrow_seconds=round(spent, 1), widths=plan.widths)  # fmt: skip


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


def finetuned(bench, epochs, best=None):
    """Everything at 50 % after fine-tuning; each rival in the scope that was better without; `best` bounds the number of methods."""
    import torch_pruning as tp

    if not bench.known(method="unpruned", epochs=epochs):
        bench.note(method="unpruned", scope="", ratio=1.0, kept=1.0, epochs=epochs, accuracy=bench.tuned(bench.model, epochs))
    before = defaultdict(list)
    for line in bench.lines:
        if line["ratio"] == 0.5 and line["epochs"] == (0 if best is None else 1) and line["accuracy"] is not None:
            before[line["method"]].append((line["accuracy"], line["scope"]))
    chosen = sorted(before, key=lambda m: -max(before[m])[0])[:best]
    found = None
    for method in chosen:
        if bench.known(method=method, ratio=0.5, epochs=epochs):
            continue
        scope = max(before[method])[1]
        if method.startswith("capnas"):
            found = found or survey(bench.model, bench.images)
            small = narrowed(bench.model, found, plan_widths(found, target_macs=0.5, round_to=ROUND, allocation=method.split()[1]))
        else:
            small = rival(bench, tp, method, scope, 0.5)[0]
        bench.note(method=method, scope=scope, ratio=0.5, kept=bench.kept(small), epochs=epochs, accuracy=bench.tuned(small, epochs))


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


def cell(values):
    values = [100 * v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def derive():
    lines = [json.loads(line) for path in sorted((HERE / "raw").glob("*.jsonl")) for line in path.read_text().splitlines()]
    text = ["# Pruning: accuracy on test images, in points of one hundred (mean ± standard deviation over seeds)", "", NOTES, ""]
    for data in sorted({line["data"] for line in lines}, reverse=True):
        here = rows_of(lines, data=data)
        models = [m for m in MODELS if rows_of(here, model=m)]
        seeds = {m: sorted({line["seed"] for line in rows_of(here, model=m)}) for m in models}
        methods = ["capnas loss", "capnas saturation"]
        methods += sorted({line["method"] for line in here} - {"unpruned", "projection", *methods})
        text += [f"## {data}", ""]
        for epochs in sorted({line["epochs"] for line in here}):
            for ratio in RATIOS:
                at = rows_of(here, ratio=ratio, epochs=epochs)
                if not at:
                    continue
                what = "without fine-tuning" if not epochs else f"after {epochs} epoch{'s' * (epochs > 1)} of fine-tuning"
                found = best_scope(at)
                name = "projection" if not epochs else "unpruned"
                base = {(line["model"], line["seed"]): line["accuracy" if epochs else "before"] for line in rows_of(here, method=name)
                        if epochs in (0, line["epochs"])}  # fmt: skip
                counts = {m: sum((m, s) in base for s in seeds[m]) for m in models}
                header = " | ".join(f"{m} ({n} seed{'s' * (n > 1)})" for m, n in counts.items())
                text += [f"### {ratio:.0%} of the MACs, {what}", "", f"| method | {header} |", "|---|" + "---|" * len(models)]
                text.append("| unpruned | " + " | ".join(cell([base.get((m, s)) for s in seeds[m]]) for m in models) + " |")
                for method in methods:
                    cells = [cell([found[m, s, method]["accuracy"] for s in seeds[m] if (m, s, method) in found]) for m in models]
                    text.append(f"| {method} | " + " | ".join(cells) + " |")
                if not epochs:
                    if ratio == 0.5:
                        again = {m: [max((x.get("renewed") or 0 for x in rows_of(at, model=m, seed=s)), default=0) or None
                                     for s in seeds[m]] for m in models}  # fmt: skip
                        text.append("| best rival, batch norms measured again | " + " | ".join(cell(again[m]) for m in models) + " |")
                    bare = {m: [found[m, s, "capnas loss"] for s in seeds[m] if (m, s, "capnas loss") in found] for m in models}
                    cells = [cell([line["without_refit"] for line in bare[m]]) for m in models]
                    text.append("| capnas loss, no refitting | " + " | ".join(cells) + " |")
                kept = {kind: [line["kept"] for line in at if line.get("kept") and line["method"].startswith("capnas") == kind]
                        for kind in (True, False)}  # fmt: skip
                words = [f"{'capnas' if mine else 'rivals'} {min(kept[mine]):.2f} to {max(kept[mine]):.2f}" for mine in kept if kept[mine]]
                text += ["", f"Share of the MACs really kept (widths are whole multiples of {ROUND}): {', '.join(words)}.", ""]
        text += ["### Every layer but the head on its 99 % eigenspace", ""]
        text += ["| model | seed | before | projected | lost | random | directions |", "|---|---|---|---|---|---|---|"]
        for line in rows_of(here, method="projection"):
            before, after, chance = (100 * line[k] for k in ("before", "accuracy", "random"))
            directions = f"{line['directions']} of {line['width']}"
            values = f"{before:.1f} | {after:.1f} | {before - after:.1f} | {chance:.1f} | {directions}"
            text.append(f"| {line['model']} | {line['seed']} | {values} |")
        text.append("")
    (HERE / "table.md").write_text("\n".join(text), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=["fashion", "cifar"], default="fashion")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scopes", nargs="+", choices=["layer", "global"], default=["layer", "global"])
    steps = ["ours", "rivals", "one", "five"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps[:2], help="one, five: epochs of fine-tuning at 50 %%")
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=RATIOS)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/pruning-models"), help="where trained models are kept")
    parser.add_argument("--derive-only", action="store_true")
    args = parser.parse_args()
    if not args.derive_only:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        data = images_of(args.data, args.cifar)
        for seed in args.seeds:
            for name in args.models:
                bench = Bench(args.data, data, name, seed, args.folder)
                if "ours" in args.steps:
                    lossless(bench)
                    ours(bench, args.ratios)
                if "rivals" in args.steps:
                    rivals(bench, args.scopes, args.ratios)
                if "one" in args.steps:
                    finetuned(bench, 1)
                if "five" in args.steps:
                    finetuned(bench, 5, best=3)
        import timm
        import torch_pruning

        versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
        versions |= {"torch_pruning": torch_pruning.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        (HERE / "environment.json").write_text(json.dumps(versions, indent=1) + "\n")
    derive()


if __name__ == "__main__":
    main()
