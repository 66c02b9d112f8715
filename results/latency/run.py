"""Is the latency that a search measures that of the network, also while other work shares the machine?

    python results/latency/run.py                  # a minute and a half; nothing else may run meanwhile
    python results/latency/run.py --table-only     # table.md from raw/runs.jsonl again

One image of 64 px through timm models on the CPU, by `capnas.latency.latencies` (processor time of one thread) and beside it by torch's own
`torch.utils.benchmark.Timer` (wall-clock time, one thread), in turns: with nothing else on the machine, and beside four processes that
multiply matrices all the time.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from capnas._timm import timm
from capnas.latency import latencies
from capnas.search.export import write_environment

HERE = Path(__file__).resolve().parent
RAW = HERE / "raw" / "runs.jsonl"
MODELS = ("resnet10t", "mobilenetv3_small_100", "convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224")
BUSY, REPEATS = 4, 7


def build(name):
    torch.manual_seed(0)
    size = {"img_size": 64} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **size).eval()


def multiply():
    torch.set_num_threads(1)
    a = torch.randn(256, 256)
    while True:
        a = torch.nn.functional.normalize(a @ a)


def by_timer(model, x):
    with torch.no_grad():
        return 1e3 * Timer("model(x)", globals={"model": model, "x": x}, num_threads=1).blocked_autorange(min_run_time=0.5).median


def measure():
    x = torch.randn(1, 3, 64, 64)
    models = {name: build(name) for name in MODELS}
    for busy in (0, BUSY):
        others = [multiprocessing.get_context("spawn").Process(target=multiply, daemon=True) for _ in range(busy)]
        for process in others:
            process.start()
        for repeat in range(-1, REPEATS):  # before the first, the others start and caches fill
            for name, model in models.items():
                row = {"capnas": round(latencies([model], x)[0], 4), "timer": round(by_timer(model, x), 4), "load": os.getloadavg()[0]}
                if repeat >= 0:
                    with RAW.open("a") as file:
                        file.write(json.dumps({"model": name, "busy": busy, "repeat": repeat} | row) + "\n")
        for process in others:
            process.terminate()
            process.join()


def table():
    rows = [json.loads(line) for line in RAW.read_text().splitlines()]
    environment = json.loads((HERE / "environment.json").read_text())
    lines = [
        "# Latency of one image, in milliseconds", "",
        f"torch {environment['packages']['torch']}, timm {environment['packages']['timm']}, two cores. Medians of {REPEATS} repeats,",
        f"smallest and largest in brackets; beside {BUSY} busy processes, and how many times the median without them that is.", "",
        "| model | capnas | Timer | capnas, busy | Timer, busy | capnas, times | Timer, times |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]  # fmt: skip
    for name in MODELS:
        cells, times = [], []
        for who in ("capnas", "timer"):
            alone, beside = ([r[who] for r in rows if r["model"] == name and r["busy"] == busy] for busy in (0, BUSY))
            cells.append([f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (alone, beside)])
            times.append(f"{statistics.median(beside) / statistics.median(alone):.2f}")
        lines.append(f"| {name} | {cells[0][0]} | {cells[1][0]} | {cells[0][1]} | {cells[1][1]} | {times[0]} | {times[1]} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    if not parser.parse_args().table_only:
        RAW.parent.mkdir(exist_ok=True)
        RAW.unlink(missing_ok=True)
        write_environment(HERE / "environment.json", device="cpu")
        measure()
    table()
