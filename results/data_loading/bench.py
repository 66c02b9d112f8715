"""Images per second of the in-memory path and of timm's loader, on the same image files, at the same size, with flip and shifted crop.

    python results/data_loading/bench.py [--out FILE] [--repeats N] [--folder FOLDER] [--size PIXELS] [--workers N ...]
    python results/data_loading/bench.py --table        # README.md from the JSON files beside this script

Without ``--folder`` the training images of the embedded set are written as PNG files, as a folder of classes, into a temporary
folder. Both paths read that folder through `load_data`; ``memory_limit=0`` sends it through `timm.data.create_loader`. A third
contender is timm without capnas, with workers that stay alive between epochs. One repeat times an epoch of each, turn by turn, so
that other work on the machine meets all alike; the ratio of a repeat compares neighbours in time. Reported: medians over repeats,
the one-off cost of decoding into memory, and after how many epochs it is earned back.
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
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from PIL import __version__ as pillow_version

from capnas._timm import import_timm, timm
from capnas.data import ImageData, load_data
from capnas.data.batching import Batches
from capnas.data.named import embedded

HERE = Path(__file__).resolve().parent
BATCH = 128


def write_embedded(root: Path) -> None:
    part = embedded().parts["train"]
    for i, (image, label) in enumerate(zip(part.images, part.labels.tolist())):
        folder = root / str(label)
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")


def timms_own(folder: Path, data: ImageData, workers: int) -> Callable[[int], Batches]:
    """timm's data set and loader without capnas, as a timm user writes it: workers that stay alive, flip and random resized crop."""
    timm_data = import_timm("timm.data")
    images = timm_data.create_dataset("", root=str(folder), split="train", input_img_mode="L" if data.in_chans == 1 else "RGB")
    shape = (data.in_chans, data.image_size, data.image_size)
    loader = timm_data.create_loader(
        images, shape, BATCH, is_training=True, scale=(0.77, 1.0), color_jitter=0.0, mean=data.mean, std=data.std, num_workers=workers,
        device=torch.device("cpu"),
    )  # fmt: skip
    return lambda number: iter(loader)


def through(data: ImageData) -> Callable[[int], Batches]:
    return lambda number: data.batches("train", BATCH, epoch=number)


def epoch(batches: Batches) -> float:
    """Images per second of one pass."""
    start, count = time.perf_counter(), 0
    for _, y in batches:
        count += len(y)
    return count / (time.perf_counter() - start)


def measure(folder: Path, size: int, workers: list[int], repeats: int) -> dict[str, object]:
    start = time.perf_counter()
    memory = load_data(folder, image_size=size)
    decoding = time.perf_counter() - start
    paths = {"memory": through(memory)}
    for n in workers:
        paths[f"timm_{n}_workers"] = through(load_data(folder, image_size=size, memory_limit=0, workers=n))
        paths[f"timm_alone_{n}_workers"] = timms_own(folder, memory, n)
    for path in paths.values():
        epoch(path(0))
    rows = []
    for repeat in range(repeats):
        row = {"load_average": os.getloadavg()[0]}
        row |= {name: epoch(path(repeat + 1)) for name, path in paths.items()}
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


def table() -> str:
    head = (
        "images",
        "size",
        "cores",
        "in memory",
        "through timm's loader",
        "timm alone",
        "ratio to the faster",
        "decoding once",
        "earned back",
    )
    lines = [
        "# Images per second: in memory and through timm's loader",
        "",
        "Made by `python results/data_loading/bench.py --table` from the JSON files here; bench.py says what is timed.",
        "Medians over repeats (for timm with the better number of workers); the ratio is the median of ratios of neighbouring epochs,",
        "with the lowest in brackets. The machine was shared with other work: compare within a row.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for path in sorted(HERE.glob("*.json")):
        r = json.loads(path.read_text())
        rate = r["images_per_second_median"]
        alone = max((n for n in rate if n.startswith("timm_alone")), key=rate.__getitem__)
        ours = max((n for n in rate if n != "memory" and "alone" not in n), key=rate.__getitem__)
        best = max((ours, alone), key=rate.__getitem__)
        cells = (
            r["source"],
            r["size"],
            r["environment"]["cores"],
            *(f"{rate[n]:,.0f}" for n in ("memory", ours, alone)),
            f"{r['ratio_memory_to_timm_median'][best]:.1f} ({r['ratio_memory_to_timm_lowest'][best]:.1f})",
            f"{r['decoding_once']['seconds']:.1f} s for {r['images']:,}",
            f"after {r['epochs_that_earn_the_decoding_back']:.1f} epochs",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "bench.json")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--name", help="what the JSON calls the images of --folder")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        (HERE / "README.md").write_text(table())
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not args.folder:
            write_embedded(folder)
        result = measure(folder, args.size, args.workers, args.repeats)
    source = (args.name or args.folder.name) if args.folder else "embedded fashion-mnist-12k, its 10,000 training images as PNG files"
    text = json.dumps({"source": source, "environment": environment(), **result}, indent=1)
    args.out.write_text(text + "\n")
    print(json.dumps({k: v for k, v in json.loads(text).items() if k != "repeats"}, indent=1))


if __name__ == "__main__":
    main()
