"""Speed and memory of a profile, as ratios to what it has to do anyway, all in one run.

    python results/profile_speed/run.py                  # about two minutes on idle cores
    python results/profile_speed/run.py --table-only     # table.md from raw/runs.jsonl again

Three questions: how long the full profile of resnet18 takes (64 images of 64 px); how the training-free scores of a search compare with
one naswot and one synflow evaluation of the same model (about a million parameters, 64 images of 32 px); and how much memory a profile
takes beside the forward and backward pass that it needs. Rounds alternate between the things compared, so that a busy machine slows all.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from capnas._timm import timm
from capnas.graph.tracing import trace
from capnas.measures.proxies import naswot, synflow
from capnas.profile import INITIALIZATIONS, MEASURES, enrich, profile_model

HERE = Path(__file__).resolve().parent
RAW = HERE / "raw" / "runs.jsonl"
CANDIDATES = {"resnet18, width 20": ("resnet18", {"channels": (20, 40, 80, 160)}), "mobilenetv3_small_075": ("mobilenetv3_small_075", {})}
SETS = {  # measures, and whether capacity is swept down to the pixels (for the score coverage)
    "saturation": (("saturation",), False),
    "saturation + structure": (("saturation", "structure"), False),
    "saturation + structure + capacity": (("saturation", "structure", "capacity"), False),
    "saturation + structure + capacity with coverage": (("saturation", "structure", "capacity"), True),
}
SEARCH = f"as a search measures {INITIALIZATIONS} draws of the weights"
SHAPE = (1, 3, 32, 32)
SEARCH_ROUNDS, FULL_ROUNDS, MEMORY_ROUNDS = 5, 3, 5


def build(name, options, size, images):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    return model, torch.randn(images, 3, size, size), torch.arange(images) % 10


def forward_backward(model, x, y):
    model.train()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    model.zero_grad(set_to_none=True)


def timed(what):
    wall, cpu = time.perf_counter(), time.process_time()
    what()
    return {"wall": round(time.perf_counter() - wall, 4), "cpu": round(time.process_time() - cpu, 4), "load": os.getloadavg()[0]}


def keep(row):
    with RAW.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def full(threads):
    torch.set_num_threads(threads)
    model, x, y = build("resnet18", {}, 64, 64)
    as_profiled = x.to(memory_format=torch.channels_last)  # the layout in which `profile_model` hands images on
    base = profile_model(model, x[:4], y[:4], measures=MEASURES, mode="train")
    for _ in range(FULL_ROUNDS):
        keep({"part": "full", "threads": threads, "what": "forward and backward"} | timed(lambda: forward_backward(model, x, y)))
        for measures in (MEASURES, MEASURES[:1]):
            row = timed(lambda measures=measures: profile_model(model, x, y, measures=measures, mode="train"))
            keep({"part": "full", "threads": threads, "what": "all" if len(measures) > 1 else measures[0]} | row)
        for measure in MEASURES[1:]:
            row = timed(lambda measure=measure: enrich(base, model, as_profiled, y, measures=(measure,)))
            keep({"part": "full", "threads": threads, "what": measure} | row)


def search():
    torch.set_num_threads(1)
    for label, (name, options) in CANDIDATES.items():
        model, x, y = build(name, options, 32, 64)
        params = sum(p.numel() for p in model.parameters())
        graph = trace(model, SHAPE)  # a search has it from the costs of the candidate
        both = lambda model=model, x=x: (naswot(model, x), synflow(model, x))  # noqa: E731
        works = {"naswot + synflow": both, "trace": partial(trace, model, SHAPE)}
        for key, (measures, pixels) in SETS.items():
            works[key] = partial(profile_model, model, x, y, measures=measures, mode="train", graph=graph, pixels=pixels)
        works[SEARCH] = partial(works["saturation + structure"], initialize=INITIALIZATIONS)
        for work in works.values():
            work()
        for _ in range(SEARCH_ROUNDS):
            for what, work in works.items():
                keep({"part": "search", "model": label, "params": params, "what": what} | timed(work))


def memory():
    for what in ("forward and backward", *MEASURES, "all") * MEMORY_ROUNDS:
        command = [sys.executable, __file__, "--peak", what]
        keep(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def peak(what):
    """Peak resident memory above that of the loaded model and batch, in a process of its own."""
    torch.set_num_threads(1)
    model, x, y = build("resnet18", {}, 64, 64)
    profile_model(model, x[:2, :, :32, :32], y[:2], measures=MEASURES, mode="train")  # libraries and caches
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the warm-up freed goes back, or the peak would hide in it
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the warm-up is forgotten
    before = high_water()
    if what == "forward and backward":
        forward_backward(model, x, y)
    else:
        profile_model(model, x, y, measures=MEASURES if what == "all" else (what,), mode="train")
    now = high_water()
    print(json.dumps({"part": "memory", "what": what, "mib": round((now - before) / 1024, 1), "base_mib": round(before / 1024, 1)}))


def high_water():
    """Peak resident memory in KiB, Linux only."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def table():
    rows = [json.loads(line) for line in RAW.read_text().splitlines()]
    environment = json.loads((HERE / "environment.json").read_text())
    loads = [row["load"] for row in rows if "load" in row]
    lines = [
        "# Speed and memory of a profile", "",
        f"torch {environment['torch']}, timm {environment['timm']}, two cores, load {min(loads):.1f} to {max(loads):.1f} from other work "
        "while this ran: wall-clock seconds are those of a busy machine, CPU seconds of the process are the fairer measure. Medians of "
        "the rounds, smallest in brackets.", "", "## Full profile of resnet18, 64 images of 64 px", "",
        "| what | threads | CPU s | wall s | x forward and backward (CPU) |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for threads in sorted({r["threads"] for r in rows if r["part"] == "full"}):
        part = [r for r in rows if r["part"] == "full" and r["threads"] == threads]
        base = middle([r["cpu"] for r in part if r["what"] == "forward and backward"])
        for what in dict.fromkeys(r["what"] for r in part):
            cpu, wall = ([r[key] for r in part if r["what"] == what] for key in ("cpu", "wall"))
            numbers = f"{middle(cpu):.2f} ({min(cpu):.2f}) | {middle(wall):.2f} ({min(wall):.2f})"
            lines.append(f"| {what} | {threads} | {numbers} | {middle(cpu) / base:.1f} |")
    lines += [
        "", "A measure alone includes its own trace of the model; `all` traces once.", "",
        "## Training-free scores, 64 images of 32 px, one thread", "",
        "As in a search, the trace of the model is at hand, since the costs of a candidate need it; its own time is the row `trace`.", "",
        "| model | params | scores | CPU s | wall s | x naswot + synflow (CPU) |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for label in dict.fromkeys(r["model"] for r in rows if r["part"] == "search"):
        part = [r for r in rows if r["part"] == "search" and r["model"] == label]
        base = middle([r["cpu"] for r in part if r["what"] == "naswot + synflow"])
        for what in dict.fromkeys(r["what"] for r in part):
            cpu, wall = ([r[key] for r in part if r["what"] == what] for key in ("cpu", "wall"))
            numbers = f"{middle(cpu):.3f} ({min(cpu):.3f}) | {middle(wall):.3f} ({min(wall):.3f}) | {middle(cpu) / base:.2f}"
            lines.append(f"| {label} | {part[0]['params']:,} | {what} | {numbers} |")
    memory_rows = [r for r in rows if r["part"] == "memory"]
    lines += ["", "## Peak memory, resnet18, 64 images of 64 px", "",
              f"Medians of {MEMORY_ROUNDS} processes, largest in brackets: how much of what is freed goes back to the system varies.", "",
              "| what | MiB above model and batch | x forward and backward |", "| --- | --- | --- |"]  # fmt: skip
    peaks = {what: [r["mib"] for r in memory_rows if r["what"] == what] for what in dict.fromkeys(r["what"] for r in memory_rows)}
    base = middle(peaks["forward and backward"]) if peaks else math.nan
    for what, mib in peaks.items():
        lines.append(f"| {what} | {middle(mib):.0f} ({max(mib):.0f}) | {middle(mib) / base:.2f} ({max(mib) / base:.2f}) |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


def middle(values):
    return statistics.median(values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--only", choices=("full", "search", "memory"))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="of the full profile; two only where two cores are free")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.peak)
        sys.exit()
    if not given.table_only:
        RAW.parent.mkdir(exist_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "cores": os.cpu_count()}
        (HERE / "environment.json").write_text(json.dumps(versions, indent=1) + "\n")
        if given.only is None and RAW.exists():
            RAW.unlink()
        if given.only in (None, "search"):
            search()
        if given.only in (None, "memory"):
            memory()
        if given.only in (None, "full"):
            for count in given.threads:
                full(count)
    table()
