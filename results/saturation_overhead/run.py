"""What recording costs a training step, and what sampling changes, with delve beside it in the same run.

    python results/saturation_overhead/run.py --tool bench_saturation_overhead.py [--reps 9]
    python results/saturation_overhead/run.py --table-only     # table.md from raw/ again

Needs delve (`pip install delve`) and the timing tool bench_saturation_overhead.py, which is not in the repository. A script in its place
has `build(name, width)`, `data(batch, size)` and `steps(model, optimizer, data, count)`, takes the options of the call in `measure`, and
writes what raw/ holds: medians and quartiles of the ratios to the bare step, repetition by repetition, in rotated order.

Each case times the bare step, delve and capnas interleaved on one thread (process CPU time and wall time), twelve steps a repetition, so
that each holds whole intervals of recording, and writes the raw output of the tool, with the number of repetitions, to raw/<case>.json;
`difference.json` holds, per layer, saturation from sampled positions beside that from every row of the same training run. `table.md` is
derived from both.

The C library gives freed memory back to the system at moments that depend on what else lies on the heap: the bare step of one and the same
model took from 0 to 19,000 page faults, run by run, which is up to a tenth of its time. So each case is timed twice: with the two variables
of `KEPT`, which leave memory with the process, for all three alike, and as the library does it.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CASES = {"vgg w32 b64": ("vgg", 64, 32), "resnet18 w16 b64": ("resnet18", 64, 16),
         "resnet18 w64 b32": ("resnet18", 32, 64), "mobile w16 b32": ("mobile", 32, 16)}  # fmt: skip
STEPS = 12  # of a repetition, and of the epoch whose saturation is compared
KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}
TARGETS = {"vgg": 1.05, "resnet18": 1.05, "mobile": 1.10}


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(tool, adapter, seeds=(0, 1, 2)):
    """Per case and layer: saturation from every row and its largest difference to the sampled value over lattice seeds."""
    rows = {}
    for case, (name, batch, width) in CASES.items():
        model = tool.build(name, width)
        data = tool.data(batch, 32)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        tool.steps(model, optimizer, data, 2)
        exact, sampled = adapter.CapnasEveryRow(model), [adapter.Capnas(model, seed) for seed in seeds]
        tool.steps(model, optimizer, data, STEPS)
        full, parts = exact.epoch_end(), [s.epoch_end() for s in sampled]
        for tracker in (exact, *sampled):
            tracker.detach()
        rows[case] = {layer: {"every_row": value, "sampled": [p[layer] for p in parts]} for layer, value in full.items()}
    return rows


def raw(case, variables):
    return HERE / "raw" / f"{case.replace(' ', '_')}{'' if variables else '-default'}.json"


def measure(tool_path, reps):
    adapter_path = HERE / "adapter.py"
    (HERE / "raw").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    rows = differences(load(tool_path, "tool"), load(adapter_path, "adapter"))
    (HERE / "raw" / "difference.json").write_text(json.dumps(rows, indent=1) + "\n")
    for case, (name, batch, width) in CASES.items():
        for variables in (KEPT, {}):
            out = raw(case, variables)
            command = [sys.executable, str(tool_path), "--impl", f"delve,{adapter_path}:Capnas", "--model", name, "--batch", str(batch),
                       "--width", str(width), "--threads", "1", "--steps", str(STEPS), "--reps", str(reps), "--no-memory",
                       "--json", str(out)]  # fmt: skip
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=os.environ | variables)
            result = json.loads(out.read_text())
            result |= {"steps": STEPS, "repetitions": reps}
            result["impl"] = {key.split(":")[-1].lower(): value for key, value in result["impl"].items()}
            out.write_text(json.dumps(result, indent=1) + "\n")
    environment = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    (HERE / "raw" / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def table():
    difference = json.loads((HERE / "raw" / "difference.json").read_text())
    lines = ["| model | capnas, CPU time | delve, CPU time | target | capnas [quartiles] | as the allocator does it: capnas [quartiles], "
             "delve | epoch end in steps, capnas / delve | layers | largest difference by sampling | repetitions |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for case, (name, _, _) in CASES.items():
        results = [json.loads(raw(case, variables).read_text()) for variables in (KEPT, {})]
        kept, usual = (result["impl"] for result in results)
        times = " and ".join(dict.fromkeys(str(result.get("repetitions", "not stored")) for result in results))
        own, peer, other = kept["capnas"]["cpu"], kept["delve"]["cpu"], usual["capnas"]["cpu"]
        worst = max(abs(s - v["every_row"]) for v in difference[case].values() for s in v["sampled"])
        lines.append(f"| {case} | {own['ratio_median']:.3f} | {peer['ratio_median']:.3f} | {TARGETS[name]:.2f} | {own['ratio_q1']:.3f} to "
                     f"{own['ratio_q3']:.3f} | {other['ratio_median']:.3f} [{other['ratio_q1']:.3f} to {other['ratio_q3']:.3f}], "
                     f"{usual['delve']['cpu']['ratio_median']:.3f} | {own['epoch_end_in_bare_steps']:.2f} / "
                     f"{peer['epoch_end_in_bare_steps']:.2f} | {kept['capnas']['layers']} | {worst:.4f} | {times} |")  # fmt: skip
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", type=Path, help="the side-by-side benchmark script")
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--table-only", action="store_true", help="derive table.md from raw/ again")
    arguments = parser.parse_args()
    if not arguments.table_only:
        if arguments.tool is None:
            parser.error("--tool PATH is needed: the timing tool bench_saturation_overhead.py; or --table-only")
        measure(arguments.tool.resolve(), arguments.reps)
    table()
