"""`capnas excess`: how much capacity a network has beyond what a task needs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from capnas.cli.app import Device, Json, app, decimal, quiet, whole
from capnas.console import LONGER, at_chance, duration, out_json, pairs, remark, say, short, show_table, time_left
from capnas.errors import UsageError, check_names, counted


@app.command()
def excess(
    model: Annotated[
        str, typer.Argument(help="A timm model, RUN:NUMBER or RUN:best for a trial, the folder of a saved model, or file.py:function.")
    ],
    data: Annotated[str | None, typer.Option(help="Images, a name or a folder; default: the run's, else fashion-mnist-12k.")] = None,
    image_size: Annotated[int | None, whole("Image size in pixels; default: the data's.")] = None,
    lipschitz: Annotated[str, typer.Option(metavar="F,F,...", help="Factors that limit the layers' norms.")] = "1,0.7,0.5,0.35",
    distance: Annotated[
        str, typer.Option(metavar="F,F,...", help="Factors that limit the distances to initialization.")
    ] = "1,0.5,0.25,0.125",
    full_grid: Annotated[bool, typer.Option("--full-grid", help="Also train settings tighter than one that failed.")] = False,
    seeds: Annotated[int, whole("Number of trainings per setting.")] = 3,
    epochs: Annotated[int, whole("Epochs of each training.")] = 20,
    tolerance: Annotated[float, decimal("How much the error may rise and still count as held, as a share of images.")] = 0.01,
    hold: Annotated[str, typer.Option(help="Which error has to hold: validation, train or both.")] = "validation",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep every training there; the same command resumes.")] = None,
    train: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further training settings, e.g. lr=0.05,batch_size=64,project_every=15.")
    ] = None,
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further data settings, e.g. validation=0.3.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure excess capacity: how many decades a network can give up of its capacity bound while its error holds.

    Trains a network for each seed and setting.
    """
    with quiet():
        from capnas.excess import excess_capacity
        from capnas.search.opening import check_outside
        from capnas.search.target import open_network

        if seeds < 1:
            raise UsageError(f"seeds must be at least 1, got {seeds}.")
        place = None if out is None else out.absolute()  # the file of a network may change the working directory
        options = pairs(data_option or [], "--data-option")
        network, images, size, name = open_network(model, data=data, image_size=image_size, data_options=options)
        if place is not None:
            check_outside(place, images.spec.source)
        recipe = _recipe(epochs, pairs(train or [], "--train"))
        told = _Trainings(f"{name} on {images.name}", recipe.epochs, keep=out is not None)
        factors = [_factors(text, option) for text, option in ((lipschitz, "--lipschitz"), (distance, "--distance"))]
        study = excess_capacity(
            network,
            images,
            lipschitz=factors[0],
            distance=factors[1],
            seeds=range(seeds),
            recipe=recipe,
            tolerance=tolerance,
            hold=hold,  # type: ignore[arg-type]
            full_grid=full_grid,
            image_size=size,
            device=device,
            name=name,
            out=place,
            on_start=told.start,
            on_run=told.tell,
        )
        reading = study.read(tolerance=tolerance, hold=hold)  # type: ignore[arg-type]
    document = {"study": study.header, "tolerance": tolerance, "hold": hold, "at_chance": study.at_chance, "reading": reading.to_dict()}
    document["layers"] = study.layers(reading.tightest["club"])
    out_json(document) if json else _show(document, study.header, reading)
    if study.at_chance:
        why = "only the training error tells constraints apart"
        if hold == "validation":
            why = "such an error holds under any constraint, so the decades mean nothing"
        accuracy, images = 1 - reading.validation_error, study.header["data"]["sizes"]["validation"]
        what = f"the unconstrained network's accuracy on validation, {accuracy:.4f}, is no"
        line = at_chance(what, study.chance, f"{why}; {LONGER}", accuracy=accuracy, images=images)
        remark(line, json=json)


def _factors(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes numbers in (0, 1] with commas, like 1,0.7,0.5; got {text!r}.") from None


def _recipe(epochs: int, given: dict[str, Any]) -> Any:
    from dataclasses import fields

    from capnas.excess import Recipe

    known = {f.name for f in fields(Recipe)}
    check_names("training setting", given, known)
    return Recipe(**{"epochs": epochs} | given)


class _Trainings:
    """Lines of progress: a header before the first training, then one line a training."""

    def __init__(self, what: str, epochs: int, *, keep: bool) -> None:
        self.what, self.epochs, self.keep = what, epochs, keep
        self.begin, self.there, self.ran, self.most = time.monotonic(), 0, 0, 0

    def start(self, there: int, most: int) -> None:
        self.begin, self.there, self.most = time.monotonic(), there, most
        kept = f", {there} kept from before" if there else ""
        say(f"excess capacity of {self.what}: up to {counted(most, 'training')} of {counted(self.epochs, 'epoch')}{kept}")
        if not self.keep:
            say("nothing is kept: --out DIR keeps every training, and the same command again goes on where it stopped")

    def tell(self, run: Any) -> None:
        self.ran += 1
        what = "unconstrained" if run.lipschitz is None else f"norms x {run.lipschitz:g}, distances x {run.distance:g}"
        errors = f"error train {run.train_error:.4f}, validation {run.validation_error:.4f}" if run.status == "complete" else run.status
        done = self.there + self.ran
        left = time_left(time.monotonic() - self.begin, self.ran, self.most - done)
        line = f"[{done}/{self.most}] seed {run.seed}  {what}: {errors}  ({duration(run.seconds)})"
        say(line + (f"  {left} at most" if left else ""))


def _show(document: dict[str, Any], header: dict[str, Any], reading: Any) -> None:
    images, plural = header["data"], "s" if len(reading.seeds) > 1 else ""
    print(f"excess capacity of {header['model']} on {images['name']}, {images['image_size']} px, {len(reading.seeds)} seed{plural}")
    if header["removed_norms"]:
        print(f"norm layers taken out, as in the paper's networks: {len(header['removed_norms'])}")
    print(f"unconstrained: error train {reading.train_error:.4f}, validation {reading.validation_error:.4f}")
    rows = [
        [f"{s.lipschitz:g}", f"{s.distance:g}", s.verdict, short(s.train_rise), short(s.validation_rise),
         *(short(part and part[name], 2) for part in (s.decades, s.own_decades) for name in ("club", "spade"))]
        for s in reading.settings
    ]  # fmt: skip
    columns = ["norms x", "distances x", "error", "train rise", "validation rise", "club", "spade", "club, own margin", "spade, own margin"]
    show_table(columns, rows, title="decades below the unconstrained bound", left=3)
    if document["layers"]:
        layers = [[r["name"], short(r["weights"]), *(short(r[k], 3) for k in _LAYER_COLUMNS)] for r in document["layers"]]
        show_table(
            ["layer", "weights", *_LAYER_COLUMNS.values()], layers, title="layers, unconstrained and in the tightest class that held"
        )
    bounds = [
        [name, short(reading.unconstrained[name], 2), short(reading.unconstrained[name] - reading.decades[name], 2),
         short(reading.decades[name], 2), short(min(reading.per_seed[name]), 2) + " - " + short(max(reading.per_seed[name]), 2),
         short(reading.own_decades[name], 2)]
        for name in reading.decades
    ]  # fmt: skip
    show_table(["log10 of", "unconstrained", "tightest", "excess", "seeds alone", "own margins"], bounds, title="excess capacity, decades")
    print(f"held: {document['hold']} error within {document['tolerance']:g} of the unconstrained one, mean over seeds")
    print(f"capacity slack, the cheap stand-in: {reading.slack:.4f} ({reading.slack_decades:.2f} decades)")


_LAYER_COLUMNS = {
    "norm": "s", "norm_limit": "s limit", "norm_reached": "s reached",
    "distance": "b", "distance_limit": "b limit", "distance_reached": "b reached",
}  # fmt: skip
