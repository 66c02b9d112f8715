"""Profile of 25 timm families with every measure: what is measured, what is skipped and why, and how long it takes.

    python results/profiles/run.py                  # a few minutes on two idle cores, one thread; measures what raw/families.jsonl lacks
    python results/profiles/run.py --fresh          # measures everything again
    python results/profiles/run.py --table-only     # table.md from raw/families.jsonl again

Each model is built as timm builds it, untrained, for ten classes and small images, and profiled in train mode on one batch of noise.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path

import torch

from capnas._timm import timm
from capnas.profile import MEASURES, enrich, profile_model

HERE = Path(__file__).resolve().parent
RAW = HERE / "raw" / "families.jsonl"
FAMILIES = {name: {} for name in (
    "resnet18", "resnet50", "vgg11_bn", "densenet121", "regnety_002", "efficientnet_b0", "mobilenetv3_small_100", "mobilenetv4_conv_small",
    "mobileone_s0", "repvgg_a0", "convnext_atto", "convnextv2_atto", "poolformer_s12", "ghostnet_100", "starnet_s1", "hgnet_tiny",
    "gernet_s", "edgenext_xx_small", "fastvit_t8",
)}  # fmt: skip
SIZED = ("vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "maxvit_rmlp_pico_rw_256",
         "efficientformerv2_s0")  # fmt: skip
FAMILIES |= {name: {"img_size": 64} for name in SIZED}
FAMILIES["swin_tiny_patch4_window7_224"] |= {"window_size": 4}
SIZE, BATCH = 64, 16


def measure(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    y = torch.arange(BATCH) % 10
    row = {"model": name, "params": sum(p.numel() for p in model.parameters()), "seconds": {}, "cpu_seconds": {}, "errors": {}}
    profile = None
    for measure_name in MEASURES:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            if profile is None:
                profile = profile_model(model, x, y, mode="train")
            else:
                profile = enrich(profile, model, x, y, measures=(measure_name,))
        except Exception as error:  # the table says so
            row["errors"][measure_name] = f"{type(error).__name__}: {error}"[:200]
            continue
        row["seconds"][measure_name] = round(time.perf_counter() - wall, 3)
        row["cpu_seconds"][measure_name] = round(time.process_time() - cpu, 3)
    row |= {"layers": len(profile.layers), "blocks": len(profile.blocks), "skipped": dict(profile.skipped)}
    for column in ("complexity", "receptive_field", "norm", "capacity", "decoupling"):
        row[f"with_{column}"] = sum(getattr(r, column) is not None for r in profile.layers)
    row["network"] = {k: v for k, v in profile.network.items() if v == v}
    row["saturation_mean"] = sum(profile.saturations()) / len(profile.layers)
    return row


def table(rows):
    head = ("model", "params", "layers", "blocks", "C", "field", "norm", "c_l", "decoupling", "norm layers skipped", "other skipped",
            *(f"s {m}" for m in MEASURES), "s in all", "errors")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        norms = sum("rescales" in reason for reason in row["skipped"].values())
        seconds = [f"{row['cpu_seconds'][m]:.2f}" if m in row["cpu_seconds"] else "-" for m in MEASURES]
        filled = [row[f"with_{column}"] for column in ("complexity", "receptive_field", "norm", "capacity", "decoupling")]
        errors = "; ".join(f"{k}: {v}" for k, v in row["errors"].items()) or "none"
        rowless = sum(not reason.startswith("capacity: ") for reason in row["skipped"].values())
        counts = (row["layers"], row["blocks"], *filled, norms, rowless - norms)
        cells = (row["model"], f"{row['params']:,}", *counts, *seconds, f"{sum(row['cpu_seconds'].values()):.2f}", errors)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = Counter(reason for row in rows for reason in row["skipped"].values())
    environment = json.loads((HERE / "environment.json").read_text())
    load = ", ".join(f"{low:.0f} to {high:.0f}" for low, high in [(min(r["load"] for r in rows), max(r["load"] for r in rows))])
    longer = sum(sum(r["seconds"].values()) for r in rows) / sum(sum(r["cpu_seconds"].values()) for r in rows)
    note = (
        f"{BATCH} images of {SIZE} px of noise, train mode, untrained weights, one thread, torch {environment['torch']}, timm "
        f"{environment['timm']}. The columns C to decoupling count the layers that have a value. Seconds are CPU seconds "
        "of the process, each measure beyond those before it (structure, norms and capacity trace the model each time here); the machine "
        f"had two cores and a load of {load}; wall-clock seconds (in raw/families.jsonl) are {longer:.2f} times as many in all."
    )
    skipped = "\n".join(f"- {count} x {reason}" for reason, count in reasons.most_common())
    parts = [f"# Profile of {len(rows)} families", note, "\n".join(lines), "Skipped modules over all models, by reason:", skipped]
    (HERE / "table.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    given = parser.parse_args()
    RAW.parent.mkdir(exist_ok=True)
    if given.fresh and not given.table_only:
        RAW.unlink(missing_ok=True)
    done = [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.exists() else []
    if not given.table_only:
        torch.set_num_threads(1)
        environment = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "threads": 1}
        for family, options in FAMILIES.items():
            if family in {row["model"] for row in done}:
                continue
            row = measure(family, options) | {"load": os.getloadavg()[0]}
            done.append(row)
            with RAW.open("a") as file:
                file.write(json.dumps(row) + "\n")
            (HERE / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
            print(family, row["cpu_seconds"], row["errors"] or "", flush=True)
    table(sorted(done, key=lambda row: list(FAMILIES).index(row["model"])))
