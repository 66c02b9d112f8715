"""Does `capnas resolution` find the right image size? An exhaustive sweep against its recommendation, and the published effects.

    python results/resolution/run.py                    # everything that is not in raw/ yet; about half an hour of one core a seed
    python results/resolution/run.py --only cifar       # jobs whose name starts so
    python results/resolution/run.py --table-only       # table.md and figure.svg from raw/ again

Needs two image sets that are not part of the project (see `images`): CIFAR-10 and the clothing photographs, as zip files of JPEGs in class
folders, cifar10_jpeg.zip and clothing_small_160.zip in $CAPNAS_SHARED/data. The table of MobileNetV2 is of the published accuracies that
the ranking study holds. A job is one line of a file in raw/; what is there is not computed again.
"""

import argparse
import io
import json
import os
import platform
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from networks import NETWORKS
from PIL import Image

from capnas.data import Augment, load_data
from capnas.graph.structure import structure
from capnas.graph.tracing import trace
from capnas.measures.borders import looking_layers
from capnas.measures.receptive import border_layers
from capnas.resolution import tune_resolution
from capnas.training import TrainConfig, train

HERE = Path(__file__).resolve().parent
RAW = HERE / "raw"
PUBLISHED = HERE.parent / "ranking" / "raw" / "mobilenetv2.jsonl"  # MobileNetV2's accuracies by width and size
SHARED = Path(os.environ.get("CAPNAS_SHARED", HERE.parents[2] / "shared"))
EPOCHS, BATCH = 10, 32
SIZES = {"cifar": (16, 24, 32, 48, 64), "clothing": (32, 48, 72, 112, 160)}
BUDGETS_AT = {"cifar": (64, 32), "clothing": (160, 72)}  # a recommendation may spend what one of these sizes costs
WIDTHS = {
    "cifar": {"short": 16, "vgg16": 8, "resnet18": 16},
    "clothing": {"short": 8, "vgg10": 8, "resnet18": 8},
}
SPLITS = {"cifar": (2000, 500, 3000), "clothing": (1600, 500, 1681)}
SEEDS = (0, 1, 2)


def images(name, canvas=None):
    """A seeded choice of images in three splits; `canvas` pastes them on a grey canvas of that many pixels."""
    archive = {"cifar": "cifar10_jpeg.zip", "clothing": "clothing_small_160.zip"}[name]
    with zipfile.ZipFile(SHARED / "data" / archive) as z:
        names = sorted(n for n in z.namelist() if n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        order = np.random.default_rng(0).permutation(len(names))[: sum(SPLITS[name])]
        x = np.stack([np.asarray(Image.open(io.BytesIO(z.read(names[i]))).convert("RGB")) for i in order])
    y = np.array([classes.index(names[i].split("/")[1]) for i in order])
    if canvas is not None:
        at = (canvas - x.shape[1]) // 2
        wide = np.full((len(x), canvas, canvas, 3), np.rint(x.mean((0, 1, 2))), np.uint8)
        wide[:, at : at + x.shape[1], at : at + x.shape[2]] = x
        x = wide
    a, b = SPLITS[name][0], sum(SPLITS[name][:2])
    return load_data({"train": (x[:a], y[:a]), "val": (x[a:b], y[a:b]), "test": (x[b:], y[b:])}, augment=Augment(flip=True))


def build(name, network, size, seed, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[network](10, 3, WIDTHS[name][network], **changes)


def config(seed):
    return TrainConfig(epochs=EPOCHS, batch_size=BATCH, seed=seed, device="cpu", channels_last="on")


def full(job, data, model, size, seed):
    """One full training: accuracy on the test split, image by image, and the profile."""
    report = structure(trace(model, (1, 3, size, size)))
    looking = looking_layers(report.fields)
    start = time.process_time()
    result = train(model, data, config(seed), image_size=size)
    cpu = time.process_time() - start
    hits = []
    with torch.inference_mode(), data.final_evaluation() as opened:
        for x, y in opened.batches("test", 256, image_size=size):
            hits += (model(x).argmax(1) == y).tolist()
    found = {row.name: row.saturation for row in result.profile.layers}
    write("full", job | {
        "size": size, "seed": seed, "macs": report.macs, "params": sum(p.numel() for p in model.parameters()), "status": result.status,
        "test_accuracy": sum(hits) / len(hits), "validation": [row["accuracy"] for row in result.curve],
        "saturations": [round(found[n], 4) for n in looking], "unproductive": len(border_layers(report.fields, size)),
        "field": [report.layers[looking[-1]].receptive_field[0][0], report.layers[looking[-1]].receptive_field[0][1]],
        "cpu_seconds": round(cpu, 2), "hits": np.packbits(hits).tobytes().hex(), "epochs": EPOCHS,
    })  # fmt: skip


def tune(job, data, name, network, seed, budget):
    start = time.process_time()
    found = tune_resolution(
        lambda size: build(name, network, size, seed), data, SIZES[name], epochs=EPOCHS, budget=budget, config=config(seed)
    )
    write("tuned", job | {"seed": seed, "budget": budget, "cpu_seconds": round(time.process_time() - start, 2)} | found.to_dict())


def jobs(seed):
    """Name -> what to run, sweeps before the recommendations that they judge."""
    for network in ("resnet18", "vgg", "short"):
        for name in SIZES:
            real = network if network != "vgg" else {"cifar": "vgg16", "clothing": "vgg10"}[name]
            case = {"case": f"{name} {real}", "data": name, "network": real}
            for size in SIZES[name]:
                yield f"{name} {real} {size} seed {seed}", "full", case, (size, {}, None)
            for limit in BUDGETS_AT[name]:
                yield f"{name} {real} tuned {limit} seed {seed}", "tuned", case, limit
    for network, changes, canvas in (("resnet18", {"early": False}, None), ("resnet18", {}, 64), ("vgg16", {}, 64)):
        kind = "canvas" if canvas else "no early downsampling"
        case = {"case": f"effect {network} {kind}", "data": "cifar", "network": network, "effect": kind}
        yield f"cifar effect {network} {kind} seed {seed}", "full", case, (canvas or 32, changes, canvas)


def run(only, seeds):
    torch.set_num_threads(1)
    loaded = {}
    for seed in seeds:
        for job_name, kind, case, what in jobs(seed):
            if not job_name.startswith(only) or job_name in {r["job"] for r in read(kind)}:
                continue
            name, network = case["data"], case["network"]
            canvas = what[2] if kind == "full" else None
            if (name, canvas) not in loaded:
                loaded[name, canvas] = images(name, canvas)
            data, job = loaded[name, canvas], {"job": job_name, **case}
            if kind == "full":
                size, changes, _ = what
                full(job, data, build(name, network, size, seed, **changes), size, seed)
            else:
                tune(job, data, name, network, seed, structure(trace(build(name, network, what, seed), (1, 3, what, what))).macs)
            print(time.strftime("%H:%M:%S"), job_name, flush=True)


def read(kind):
    path = RAW / f"{kind}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write(kind, row):
    RAW.mkdir(exist_ok=True)
    with (RAW / f"{kind}.jsonl").open("a") as f:
        f.write(json.dumps(row) + "\n")
    environment()


def environment():
    import capnas

    found = {"python": platform.python_version(), "torch": torch.__version__, "capnas": capnas.__version__, "machine": platform.machine()}
    found |= {"threads": 1, "epochs": EPOCHS, "batch_size": BATCH, "splits": SPLITS, "widths": WIDTHS, "sizes": SIZES, "seeds": SEEDS}
    (HERE / "environment.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose name starts so")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--table-only", action="store_true")
    given = parser.parse_args()
    if not given.table_only:
        run(given.only, given.seeds)
    from table import write_all

    write_all(HERE, read("full"), read("tuned"), PUBLISHED)
