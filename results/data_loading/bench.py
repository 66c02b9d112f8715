"""Images per second of the in-memory path and of timm's loader, on the same image files, at the same size, with flip and shifted crop.

    python results/data_loading/bench.py [--out FILE] [--repeats N] [--folder FOLDER] [--size PIXELS] [--workers N ...]

Without ``--folder`` the training images of the embedded set are written as PNG files, as a folder of classes, into a temporary
folder. Both paths read that folder through `load_data`; ``memory_limit=0`` sends it through `timm.data.create_loader`. One repeat
times an epoch of each, turn by turn, so that other work on the machine meets both alike; the ratio of a repeat compares neighbours
in time. Reported: medians over repeats, the one-off cost of decoding into memory, and after how many epochs it is earned back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from PIL import __version__ as pillow_version

from capnas._timm import timm
from capnas.data import ImageData, load_data
from capnas.named import embedded

HERE = Path(__file__).resolve().parent
BATCH = 128


def write_embedded(root: Path) -> None:
    part = embedded().parts["train"]
    for i, (image, label) in enumerate(zip(part.images, part.labels.tolist())):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")


def epoch(data: ImageData, number: int) -> tuple[float, int]:
    start, count = time.perf_counter(), 0
    for _, y in data.batches("train", BATCH, epoch=number):
        count += len(y)
    return time.perf_counter() - start, count


def measure(folder: Path, size: int, workers: list[int], repeats: int) -> dict[str, object]:
    start = time.perf_counter()
    memory = load_data(folder, image_size=size)
    decoding = time.perf_counter() - start
    paths = {"memory": memory, **{f"timm_{n}_workers": load_data(folder, image_size=size, memory_limit=0, workers=n) for n in workers}}
    for data in paths.values():
        epoch(data, 0)
    rows = []
    for repeat in range(repeats):
        row = {"load_average": os.getloadavg()[0]}
        for name, data in paths.items():
            seconds, count = epoch(data, repeat + 1)
            row[name] = count / seconds
        rows.append(row)
    rates = {name: statistics.median(r[name] for r in rows) for name in paths}
    ratios = {name: statistics.median(r["memory"] / r[name] for r in rows) for name in paths if name != "memory"}
    lowest = {name: min(r["memory"] / r[name] for r in rows) for name in ratios}
    best = max(ratios, key=lambda name: rates[name])
    total = sum(memory.sizes.values())
    saved = memory.sizes["train"] * (1 / rates[best] - 1 / rates["memory"])
    return {
        "images": total,
        "train_images": memory.sizes["train"],
        "size": size,
        "channels": memory.in_chans,
        "batch_size": BATCH,
        "images_per_second_median": rates,
        "ratio_memory_to_timm_median": ratios,
        "ratio_memory_to_timm_lowest": lowest,
        "decoding_once": {"seconds": decoding, "images_per_second": total / decoding},
        "epochs_that_earn_the_decoding_back": decoding / saved,
        "repeats": rows,
    }


def environment() -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "timm": timm.__version__,
        "pillow": pillow_version,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "bench.json")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not args.folder:
            write_embedded(folder)
        result = measure(folder, args.size, args.workers, args.repeats)
    source = args.folder.name if args.folder else "embedded fashion-mnist-12k, its 10,000 training images as PNG files"
    text = json.dumps({"source": source, "environment": environment(), **result}, indent=1)
    args.out.write_text(text + "\n")
    print(json.dumps({k: v for k, v in json.loads(text).items() if k != "repeats"}, indent=1))


if __name__ == "__main__":
    main()
