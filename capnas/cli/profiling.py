"""`capnas profile`: a network layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from capnas.cli.app import WEIGHTS, Blocks, Device, Json, Pretrained, app, decimal, quiet, seeding, whole
from capnas.console import duration, out_json, say, short, show_table

Cell = Callable[[Any], str]
_LEGEND = {
    "field": "field: pixels of the image that one output sees, by the paths that see least .. most",
    "C": "C, log2 P: complexity and compression by the layer algebra, see capnas scores (complexity, intrinsic_power)",
    "unproductive": "unproductive: past the border, where depth adds no context of the image; strict, toolbox: by which rule",
    "utilisation": "utilisation: capacity per parameter; over-wide: less than half of what the best used layers have",
}


@app.command()
def profile(
    target: Annotated[str, typer.Argument(help="A timm model, RUN:NUMBER or RUN:best for a trial, or the folder of a saved model.")],
    data: Annotated[str | None, typer.Option(help="Images for a timm model; default: fashion-mnist-12k.")] = None,
    image_size: Annotated[int | None, whole("Image size in pixels; default: the data's.")] = None,
    batch: Annotated[int, whole("Number of images to measure on.")] = 256,
    measures: Annotated[
        str, typer.Option(metavar="NAME,...", help="What to measure: saturation, structure, norms, capacity, proxies or all.")
    ] = "saturation,structure",
    mode: Annotated[str | None, typer.Option(help="train or eval; default: eval for trained weights, else train.")] = None,
    threshold: Annotated[float, decimal("Share of the variance that k explains.")] = 0.99,
    reading: Annotated[str, typer.Option(help="Rows to show: modules (single layers), blocks or both.")] = "both",
    blocks: Blocks = None,
    initial: Annotated[bool, typer.Option("--initial", help="Measure a trial's network as it was before training.")] = False,
    weights: Annotated[str | None, WEIGHTS] = None,
    pretrained: Pretrained = False,
    project: Annotated[
        float | None, decimal("Also the accuracy if every layer but the head keeps only this share of its variance.", "SHARE")
    ] = None,
    seed: Annotated[int, seeding("Seed of weights and of the choice of images.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show a network layer by layer: dimension, saturation, receptive field, complexity, norm, capacity, cost.

    Of a trial, what the search measured is shown as it is, whatever --batch and --seed say. A search keeps no weights: where they are
    needed, the trial is trained again as the search did.
    """
    with quiet():
        from capnas.profile import MEASURES
        from capnas.search.inspection import inspect_target

        found = inspect_target(
            target,
            data=data,
            image_size=image_size,
            batch=batch,
            mode=mode,  # type: ignore[arg-type]
            threshold=threshold,
            reading=reading,  # type: ignore[arg-type]
            measures=MEASURES if measures == "all" else [name.strip() for name in measures.split(",") if name.strip()],
            blocks=blocks,
            initial=initial,
            weights=weights,
            pretrained=pretrained,
            project=project,
            seed=seed,
            device=device,
            tell=lambda epoch, row: say(f"epoch {epoch}  loss {row['train_loss']:.4f}  ({duration(row['seconds'])})"),
        )
    out_json(found.to_dict()) if json else show_profile(found)


def show_profile(found: Any) -> None:
    """A `capnas.search.inspection.Inspection`: tables of layers and blocks, what the fields say, and the scores."""
    taken = found.profile
    print(f"{found.name}, {found.state}, {taken.mode} mode, {found.image_size} px")
    print(f"parameters {short(found.n_params)}, MACs {short(found.total_macs)}")
    print(f"k: directions that hold {taken.threshold:.4g} of the variance; saturation: k / width; rank: directions weighted by their share")
    columns: dict[str, Cell] = {
        "kind": lambda r: r.kind, "width": lambda r: str(r.width), "k": lambda r: short(r.k), "saturation": lambda r: short(r.saturation),
        "rank": lambda r: short(r.effective_rank, 1), "samples": lambda r: short(r.rows) + ("*" if r.few_rows else ""),
        "params": lambda r: short(r.params), "MACs": lambda r: short(found.macs.get(r.name)),
    }  # fmt: skip
    _table("layer", taken.layers, columns, left=2)
    _table("layer", taken.layers, further := _further(taken))
    for line in (text for column, text in _LEGEND.items() if taken.layers and column in further):
        print(line)
    _table("block", taken.blocks, columns, left=2)
    if any(r.few_rows for r in (*taken.layers, *taken.blocks)):
        print(f"* fewer than 10 samples per feature: the saturation is a lower bound; {found.more} gives more")
    _say_fields(taken.receptive)
    _say_rest(found)
    show_table(["score", "value"], [[name, short(value)] for name, value in found.to_dict()["scores"].items() if value is not None])
    if (loss := found.projection) is not None:
        kept, width = (sum(sizes) for sizes in zip(*loss.kept.values()))
        print(f"projected on the eigenspaces of {loss.threshold:g} of the variance, {len(loss.kept)} layers, {kept} of {width} directions:")
        print(f"accuracy {loss.accuracy:.4f}, projected {loss.projected:.4f} ({loss.lost:.2f} points lost), "
              f"as many random directions {loss.random:.4f}")  # fmt: skip


def _further(taken: Any) -> dict[str, Cell]:
    """Columns of what was measured beyond saturation."""
    rows = taken.layers
    columns: dict[str, Cell] = {}
    if "structure" in taken.measures:
        columns |= {
            "field": lambda r: _field(r.receptive_field), "C": lambda r: short(r.complexity, 1),
            "log2 P": lambda r: short(r.log2_compression, 2),
        }  # fmt: skip
        if taken.receptive is not None:
            columns["unproductive"] = lambda r: _marks(r.name, taken.receptive)
    wanted: tuple[tuple[str, Cell], ...] = (
        ("norm", lambda r: short(r.norm, 3)), ("distance", lambda r: short(r.distance, 3)),
        ("capacity", lambda r: short(r.capacity, 1) + (" exact" if r.capacity_method == "exact" else "")),
        ("utilisation", lambda r: short(r.utilisation) + (" over-wide" if r.over_wide else "")),
        ("decoupling", lambda r: short(r.decoupling, 3)),
    )  # fmt: skip
    return columns | {name: cell for name, cell in wanted if any(getattr(r, name) is not None for r in rows)}


def _field(ranges: Sequence[tuple[float, float]] | None) -> str:
    """``3``, ``11..43`` or, where the axes differ, ``3x5``."""
    if ranges is None:
        return "-"
    axes = ["..".join(dict.fromkeys(_pixels(end) for end in pair)) for pair in ranges]
    return "x".join(axes if len(set(axes)) > 1 else axes[:1])


def _pixels(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:g}"


def _marks(name: str, report: Any) -> str:
    rules = [rule for rule, names in report.border.items() if name in names]
    return " ".join(rules) or ("critical" if name in report.critical else "")


def _table(first: str, rows: Sequence[Any], columns: Mapping[str, Cell], left: int = 1) -> None:
    if rows and columns:
        show_table([first, *columns], [[r.name, *(cell(r) for cell in columns.values())] for r in rows], left=left)


def _say_fields(report: Any) -> None:
    if report is None:
        return
    size = "x".join(map(str, dict.fromkeys(report.image_size)))
    print(f"critical at {size} px, own field beyond the image: {', '.join(report.critical) or 'none'}")
    meanings = {"strict": " (the papers', without 1x1 layers)", "toolbox": " (rfa_toolbox)"}
    for rule, names in report.border.items():
        print(f"unproductive by the {rule} rule{meanings.get(rule, '')}: {', '.join(names) or 'none'}")
    if report.feasible is not None:
        lower = f" ({_field([(low, low) for low, _ in report.functional])} by the functional bound)" if report.functional else ""
        print(f"feasible image sizes: {_field(report.feasible)} px{lower}")
        print("feasible: below, some layer sees nothing new; above, no unit sees the whole image; layers that read all of it do not count")


def _say_rest(found: Any) -> None:
    reasons = Counter(found.profile.skipped.values())
    if reasons:
        print("not measured: " + "; ".join(f"{count} x {reason}" for reason, count in reasons.items()))
    for name, text in found.profile.flags.items():
        print(f"{name}: {text}")
    if found.left_out:
        print(f"left out: {', '.join(found.left_out)}; add them with --measures all")
