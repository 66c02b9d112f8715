"""Profile of 25 timm families with every measure: what is measured, what is skipped and why, and how long it takes.

    python results/profiles/run.py                  # a few minutes on two idle cores, one thread
    python results/profiles/run.py --table-only     # table.md from families.json again

Each model is built as timm builds it, untrained, for ten classes and small images, and profiled in train mode on one batch of noise.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from capnas._timm import timm
from capnas.profile import MEASURES, profile_model

HERE = Path(__file__).resolve().parent
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
    row = {"params": sum(p.numel() for p in model.parameters()), "seconds": {}, "errors": {}}
    for measure_name in MEASURES:
        start = time.perf_counter()
        try:
            profile = profile_model(model, x, y, measures=tuple({"saturation", measure_name}), mode="train")
        except Exception as error:  # the table says so
            row["errors"][measure_name] = f"{type(error).__name__}: {error}"[:200]
            continue
        row["seconds"][measure_name] = round(time.perf_counter() - start, 3)
        if measure_name == "saturation":
            base = row["seconds"][measure_name]
            row |= {"layers": len(profile.layers), "blocks": len(profile.blocks), "skipped": dict(profile.skipped)}
            row["saturation_mean"] = sum(profile.saturations()) / len(profile.layers)
        else:
            row["seconds"][measure_name] = round(max(0.0, row["seconds"][measure_name] - base), 3)
        filled = {"structure": "complexity", "norms": "norm", "capacity": "capacity"}.get(measure_name)
        if filled:
            row[f"with_{measure_name}"] = sum(getattr(r, filled) is not None for r in profile.layers)
    return row


def table(rows):
    head = ("model", "params", "layers", "blocks", "with structure", "with norm", "with capacity", "norm layers skipped", "other skipped",
            *(f"s {m}" for m in MEASURES), "errors")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name, row in rows.items():
        norms = sum("rescales" in reason for reason in row["skipped"].values())
        seconds = (f"{row['seconds'][m]:.2f}" if m in row["seconds"] else "-" for m in MEASURES)
        filled = (row.get(f"with_{m}", "-") for m in ("structure", "norms", "capacity"))
        errors = "; ".join(f"{k}: {v}" for k, v in row["errors"].items()) or "none"
        counts = (row["layers"], row["blocks"], *filled, norms, len(row["skipped"]) - norms)
        cells = (name, f"{row['params']:,}", *counts, *seconds, errors)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    note = (f"{BATCH} images of {SIZE} px, train mode, one thread. Seconds of a measure are those beyond the saturation pass. Reasons for "
            "every skipped module are in families.json.")  # fmt: skip
    (HERE / "table.md").write_text("\n".join(lines) + f"\n\n{note}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-only", action="store_true")
    if not parser.parse_args().table_only:
        torch.set_num_threads(1)
        found = {}
        for family, options in FAMILIES.items():
            found[family] = measure(family, options)
            print(family, found[family]["seconds"], found[family]["errors"] or "", flush=True)
        environment = {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__, "threads": 1}
        (HERE / "families.json").write_text(json.dumps({"environment": environment, "families": found}, indent=1) + "\n")
    table(json.loads((HERE / "families.json").read_text())["families"])
