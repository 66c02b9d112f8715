"""Trains five linear architectures on five tasks and draws where each spends its capacity.

    python results/capacity_allocation/make_figure.py                 # trains, writes raw data and the figure
    python results/capacity_allocation/make_figure.py --figure-only   # redraws the figure from the raw data
    python results/capacity_allocation/make_figure.py --check         # fails when the committed figure is not the one the raw data gives

Raw data: allocation.json (a row per architecture and task), environment.json. Derived: allocation.svg, allocation.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import platform
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LENGTH = 64
REGIONS = ((0, 8), (8, 32), (32, 64))


def architectures() -> list:
    from capnas.measures.linear_architectures import diagonal_rnn, dilated_stack, window

    doubling = (1, 2, 4, 8, 16, 32)
    return [
        ("window", "one convolution, 20 taps", window(LENGTH, 20)),
        ("dilated_2", "dilated 1..32, 2 channels", dilated_stack(LENGTH, doubling, channels=2)),
        ("dilated_1", "dilated 1..32, 1 channel", dilated_stack(LENGTH, doubling)),
        ("two_cycles", "dilated 2 x (1..16), 1 channel", dilated_stack(LENGTH, doubling[:5] * 2)),
        ("diagonal_rnn", "diagonal recurrence, 10 states", diagonal_rnn(LENGTH, 10)),
    ]


def measure(seed: int, starts: int) -> list[dict]:
    from capnas.measures.linear_tasks import TASKS, linear_task, train_linear

    rows = []
    for key, title, architecture in architectures():
        for name in TASKS:
            began, task = time.perf_counter(), linear_task(name)
            fit = train_linear(architecture, task, starts=starts, seed=seed)
            row = {
                "architecture": key,
                "title": title,
                "task": name,
                "meaning": task.meaning,
                "n_params": architecture.n_params,
                "seed": seed,
                "starts": starts,
                "convention": "W",
                "relative_loss": fit.relative_loss,
                "stationarity": fit.stationarity,
                "converged": fit.converged,
                "tied": fit.tied,
                "degenerate": fit.degenerate,
                "rank": fit.rank,
                "generic_rank": fit.generic_rank,
                "total": float(fit.allocation.sum()),
                "allocation": [round(value, 9) for value in fit.allocation.tolist()],
                "theta": fit.theta.tolist(),
                "seconds": round(time.perf_counter() - began, 1),
            }
            rows.append(row)
            print(f"{key:13s} {name}  {regions(row)}  loss {fit.relative_loss:.3g}  rank {fit.rank}/{fit.generic_rank}", flush=True)
    return rows


def regions(row: dict) -> list[float]:
    return [round(sum(row["allocation"][start:stop]), 2) for start, stop in REGIONS]


def environment() -> dict:
    import numpy
    import scipy
    import torch

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }


def table(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["architecture", "task", "lags_0_7", "lags_8_31", "lags_32_63", "total", "generic_total", "relative_loss", "unique"])
    for row in rows:
        unique = "no" if row["degenerate"] else "yes"
        writer.writerow(
            [
                row["architecture"],
                row["task"],
                *regions(row),
                round(row["total"], 2),
                row["generic_rank"],
                f"{row['relative_loss']:.3g}",
                unique,
            ]
        )
    return out.getvalue()


def figure(rows: list[dict]) -> str:
    """A grid of small bar charts: an architecture per row, a task per column, capacity (0 to 1) over lag."""
    width, height, gap, left, top = 196, 74, 14, 150, 62
    keys, tasks = list(dict.fromkeys(row["architecture"] for row in rows)), list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["architecture"], row["task"]): row for row in rows}
    full_width, full_height = left + len(tasks) * (width + gap) + 6, top + len(keys) * (height + gap + 16) + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full_width} {full_height}" width="{full_width}" height="{full_height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#222">',
        f'<rect width="{full_width}" height="{full_height}" fill="#fff"/>',
        '<text x="8" y="20" font-size="15" font-weight="bold">Capacity spent on each of 64 lags after training (linear, exact)</text>',
    ]

    def text(x: float, y: float, content: str, extra: str = "") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" {extra}>{content}</text>')

    for column, task in enumerate(tasks):
        meaning = cells[keys[0], task]["meaning"]
        text(left + column * (width + gap), 48, f"<tspan font-weight='bold'>{task}</tspan> {meaning}", 'font-size="10"')
    for line, key in enumerate(keys):
        y = top + line * (height + gap + 16)
        first = cells[key, tasks[0]]
        head, _, tail = first["title"].partition(", ")
        text(8, y + 24, head, 'font-weight="bold"')
        text(8, y + 38, tail)
        text(8, y + 52, f"{first['n_params']} parameters", 'fill="#666"')
        for column, task in enumerate(tasks):
            x, row = left + column * (width + gap), cells[key, task]
            colour = "#9aa5b1" if row["degenerate"] else "#2b6cb0"
            parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="#f5f6f8"/>')
            for lag in (8, 32):
                at = x + width * lag / LENGTH
                parts.append(f'<line x1="{at:g}" x2="{at:g}" y1="{y}" y2="{y + height}" stroke="#c8ccd2" stroke-dasharray="2 2"/>')
            for lag, value in enumerate(row["allocation"]):
                tall = height * min(max(value, 0.0), 1.0)
                if tall > 0.05:
                    spot = f'x="{x + width * lag / LENGTH:.2f}" y="{y + height - tall:.2f}"'
                    size = f'width="{width / LENGTH - 0.5:.2f}" height="{tall:.2f}"'
                    parts.append(f'<rect {spot} {size} fill="{colour}"/>')
            near, middle, far = regions(row)
            note = f"{near:.1f} / {middle:.1f} / {far:.1f}" + (" *" if row["degenerate"] else "")
            text(x, y + height + 13, note)
            text(x + width, y + height + 13, f"loss {row['relative_loss']:.2g}", 'text-anchor="end" fill="#666"')
    base = full_height - 24
    text(
        8,
        base,
        "Bars: capacity 0 to 1 per lag, lag 0 at the left; below: capacity on lags 0-7 / 8-31 / 32-63; loss over that of the zero model.",
    )
    text(
        8,
        base + 16,
        "* grey: the optimum, hence the allocation, is not unique (equal optima, or a lower rank at zero loss) or not converged.",
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure-only", action="store_true", help="redraw from the stored raw data")
    parser.add_argument("--check", action="store_true", help="compare the stored figure and table with the raw data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", type=int, default=6)
    options = parser.parse_args()
    raw = FOLDER / "allocation.json"
    if not (options.figure_only or options.check):
        rows = measure(options.seed, options.starts)
        raw.write_text(json.dumps(rows, indent=1) + "\n")
        (FOLDER / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    rows = json.loads(raw.read_text())
    for name, content in (("allocation.svg", figure(rows)), ("allocation.csv", table(rows))):
        path = FOLDER / name
        if options.check and path.read_text() != content:
            raise SystemExit(f"{name} is not what the raw data gives; run with --figure-only and commit the result.")
        if not options.check:
            path.write_text(content)


if __name__ == "__main__":
    main()
