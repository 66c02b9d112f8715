"""How much `capacity_score` depends on what it is measured with: weights and images, batch, resolution, mode; threshold and reading.

    python results/ranking/sensitivity.py     # sensitivity.md from raw/

The other tables are of one draw of the weights. Raw: `run.py second SPACE` for the second; for the rest `run.py measure SPACE --count 150
--measures structure` with --seed, --images, --size, --mode and a --label each; fewer cells are the first of these. Thresholds and readings
(outputs of the blocks, or of every convolution and dense layer) are those that every row of the ranking study holds; readings before or
after a norm or an activation were not compared.
"""

import json
from pathlib import Path

import numpy as np
from run import averaged, columns, is_varied, key_of, records_of
from scipy.stats import spearmanr

from capnas.measures.evenness import evenness

HERE = Path(__file__).resolve().parent
SPACES = ("nasbench201", "nasbench101", "macro", "timm", "mbconv")
LAYERS = {"0.99": ("saturation_mean", "saturation_evenness"), "0.9": ("saturation90_mean", None), "effective rank": ("rank_mean", None)}
BLOCKS = ("0.99", "0.9", "0.95", None, "0.999", "effective rank")  # columns of the stored blocks; the fourth repeats the first


def ranked(values, accuracy):
    top = accuracy >= np.median(accuracy)
    return f"{spearmanr(values, accuracy)[0]:.3f} | {spearmanr(values[top], accuracy[top])[0]:.3f}"


def drawn():
    """What one draw of the weights gives, what another does, and what their mean does, by space; the mean is what a search ranks by."""
    yield "Draws of the weights, the same images: Spearman with final accuracy over all, better half. A search ranks by the mean of both."
    yield from ("", "| networks of | number | first | better half | second | better half | both | better half | one with the other |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for path in sorted((HERE / "raw").glob("*-second.jsonl")):
        again = {key_of(r): r for r in map(json.loads, path.open())}
        rows = [r for r in records_of(path.stem.removesuffix("-second"), draws=1) if key_of(r) in again]
        accuracy = np.array([r["accuracy"] for r in rows], dtype=float)
        other = [r | {"scores": r["scores"] | again[key_of(r)]["scores"]} for r in rows]
        sets = (rows, other, [averaged(r, again[key_of(r)]) for r in rows])
        scores = [columns(found)["capacity_score"] for found in sets]
        cells = " | ".join(ranked(values, accuracy) for values in scores)
        yield f"| {path.stem.removesuffix('-second').replace('-', ', ')} | {len(rows)} | {cells} | {spearmanr(*scores[:2])[0]:.3f} |"


if __name__ == "__main__":
    lines = [*drawn(), "",
             "Usual: seed 0, 64 images of 32 px, train mode, one draw. Spearman with final accuracy over all, better half; same cells.", "",
             "| measured with | networks | Spearman | better half | usual | better half | one with the other | CPU s each |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name in sorted(p.stem for p in (HERE / "raw").glob("*.jsonl") if is_varied(p.stem)):
        full, rows = ({r["arch"]: r for r in records_of(file, draws=1)} for file in (name.split("-")[0], name))
        cells = [arch for arch in rows if arch in full]
        accuracy = np.array([full[a]["accuracy"] for a in cells])
        usual, values = (columns([found[a] for a in cells])["capacity_score"] for found in (full, rows))
        seconds = np.mean([rows[a]["seconds"] for a in cells])
        both = f"{ranked(values, accuracy)} | {ranked(usual, accuracy)} | {spearmanr(values, usual)[0]:.3f}"
        lines.append(f"| {name.replace('-', ', ', 1)} | {len(cells)} | {both} | {seconds:.2f} |")
    lines += ["", "All rows of each space: mean and evenness of saturation by reading and threshold (blank: not kept).", "",
              "| space | read at | threshold | mean: Spearman | better half | evenness: Spearman | better half |",
              "| --- | --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for space in SPACES:
        rows = records_of(space, draws=1)
        accuracy = np.array([r["accuracy"] for r in rows], dtype=float)
        blocks = [np.nan_to_num(np.array(r["blocks"], dtype=float)) for r in rows]
        for column, threshold in enumerate(BLOCKS):
            if threshold is not None:
                mean, even = (np.array([f(b[:, column].tolist()) for b in blocks]) for f in (np.mean, evenness))
                lines.append(f"| {space} | blocks | {threshold} | {ranked(mean, accuracy)} | {ranked(np.nan_to_num(even), accuracy)} |")
        for threshold, names in LAYERS.items():
            cells = [ranked(np.array([r["scores"][n] for r in rows], dtype=float), accuracy) if n else " | " for n in names]
            lines.append(f"| {space} | layers | {threshold} | {' | '.join(cells)} |")
    (HERE / "sensitivity.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
