"""`capnas resolution`: which image size suits a network."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capnas.cli.app import Device, Json, app, decimal, quiet, seeding, sizes, whole
from capnas.console import SAW_VALIDATION, duration, out_json, pairs, say, short, show_table
from capnas.documents import json_text, write_whole
from capnas.errors import UsageError, check_names, counted

if TYPE_CHECKING:
    from capnas.resolution import SizeRun, SizeSurvey, Tuning

DOCUMENT, FIGURE = "resolution.json", "resolution.svg"


@app.command()
def resolution(
    target: Annotated[str, typer.Argument(help="A timm model, RUN:NUMBER or RUN:best for a trial, or the folder of a saved model.")],
    data: Annotated[str | None, typer.Option(help="Images; default: those of the run or the saved model, else fashion-mnist-12k.")] = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="PX,PX,...", help="Image sizes to compare; default: from half to twice the data's.")
    ] = None,
    budget: Annotated[int | None, whole("Most multiply-accumulates per image, e.g. 20M.", "MACS")] = None,
    epochs: Annotated[int, whole("Epochs of a full training at one size, which --share refers to.")] = 10,
    share: Annotated[float, decimal("Most that all runs may cost, as a share of training every size in full.")] = 0.3,
    pay: Annotated[
        float | None, decimal("Points of accuracy that a doubling of MACs has to bring; default: 0.25, with --budget 0.")
    ] = None,
    trained: Annotated[bool, typer.Option("--trained", help="Start every size from the trained weights of a saved model.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show borders, cost and advice only; nothing is trained.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help=f"Write {DOCUMENT} and {FIGURE}.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite these files.")] = False,
    seed: Annotated[int, seeding("Seed of weights, shuffling and augmentation, the same for every size.")] = 0,
    device: Device = "auto",
    train: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further training settings, e.g. batch_size=64; default: the run's.")
    ] = None,
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further data settings, e.g. validation=0.2.")] = None,
    json: Json = False,
) -> None:
    """Find the smallest image size at which all layers work and a larger one is not worth its compute."""
    chosen = None if candidates is None else sizes(candidates, "--candidates")
    if out is not None:
        from capnas.saved import check_folder

        check_folder(out)
    if out is not None and not force and (there := [n for n in (DOCUMENT, FIGURE) if (out / n).exists()]):
        raise UsageError(f"{out} holds {' and '.join(there)} already; --force overwrites them, or give another folder.")
    place = None if out is None else out.absolute()  # a space may change the working directory
    with quiet():
        from capnas.resolution import advise_resolution, ladder, survey_resolutions, tune_resolution
        from capnas.search.opening import check_outside
        from capnas.search.target import open_largest, open_target
        from capnas.training import TrainConfig

        options, given = pairs(data_option or [], "--data-option"), pairs(train or [], "--train")
        check_names("train", given, {f.name for f in fields(TrainConfig)} - {"epochs", "record", "seed", "device"})
        config = TrainConfig(seed=seed, device=device, **given)
        chosen = chosen or ladder(open_target(target, data=data, data_options=options).data.image_size)
        found, refused = open_largest(target, chosen, data=data, data_options=options)
        if place is not None:
            check_outside(place, found.data.spec.source)
        if trained and not found.trained:
            raise UsageError(
                f"--trained starts from the trained weights of a saved model, and {found.name} has none: "
                "give the folder of a trained model that capnas saved, or leave --trained out."
            )

        if trained and found.saw_validation:
            say(SAW_VALIDATION)

        def build(size: int) -> Any:
            return found.build(seed, image_size=size, trained=trained)

        if dry_run:
            surveys = survey_resolutions(build, chosen, in_chans=found.data.in_chans, budget=budget, refused=refused)
            advice = {
                s.size: advise_resolution(build, s.size, in_chans=found.data.in_chans) for s in surveys if s.unproductive and not s.refusal
            }
            document: dict[str, Any] = {"name": found.name, "surveys": surveys, "advice": advice}
        else:
            start = f"tuning the resolution of {found.name} on {found.data.name}: {', '.join(map(str, chosen))} px"
            asked = None if pay is None else pay / 100
            limits = {"share": share, "budget": budget, "pay": asked, "refused": refused}
            settings: dict[str, Any] = {"epochs": epochs, "config": replace(config, **{**found.train, **given}), **limits}
            tuning = tune_resolution(build, found.data, chosen, **settings, on_start=lambda: say(start), on_run=_tell, on_pass=_tell_pass)
            document = {"name": found.name, "data": found.data.name, **tuning.to_dict()}
    if out is not None and place is not None:
        _write(place, document, _survey_panels(surveys) if dry_run else _panels(tuning))
        say(f"written: {out / DOCUMENT}, {out / FIGURE}")
    if json:
        out_json(document)
    elif dry_run:
        _show_surveys(surveys)
        for size, changes in advice.items():
            typer.echo("\n".join([f"at {size} px:", *(f"  {a.text}" for a in changes)]))
    else:
        _show_tuning(tuning)


def _tell_pass(number: int, of: int) -> None:
    say(f"all sizes in turn, one set of weights: pass {number} of {of}")


def _tell(run: SizeRun) -> None:
    result = f"accuracy {run.reading.accuracy:.4f}" if run.reading is not None else f"{run.status}: {run.reason}"
    say(f"round {run.rung}  {run.size} px  {counted(run.epochs, 'epoch')}  {result}  ({duration(run.seconds)})")


def _show_surveys(surveys: tuple[SizeSurvey, ...]) -> None:
    show_table(
        ["size", "past the border", "first of them", "MACs", ""],
        [[f"{s.size} px", *_border(s), short(s.macs), s.refusal or s.note] for s in surveys],
        left=1,
    )
    if any(s.borderless for s in surveys):
        typer.echo("no border: the network mixes all positions")


def _border(survey: SizeSurvey) -> tuple[str, str]:
    if survey.macs is None:
        return "-", "-"
    if survey.borderless:
        return "no border", "-"
    return f"{len(survey.unproductive)} of {len(survey.looking)}", survey.unproductive[0] if survey.unproductive else "-"


_LEGEND = (
    "past the border: layers that add no context of the image; fitted: accuracy with most of its noise taken out; "
    "tail: last layers below a quarter of the greatest saturation"
)


def _show_tuning(tuning: Tuning) -> None:
    from capnas.measures.evenness import evenness, mean

    chosen = tuning.recommendation
    rows = []
    for survey in tuning.surveys:
        row = tuning.last(survey.size)
        mark = "chosen" if survey.size == chosen.size else survey.refusal or tuning.left_out.get(survey.size, survey.note)
        if row is None:
            rows.append([f"{survey.size} px", short(survey.macs), _border(survey)[0], *["-"] * 6, mark])
            continue
        tail = f"{row.tail} of {len(row.saturations)}"
        values = (short(mean(row.saturations)), short(evenness(row.saturations)), tail)
        accuracies = (short(row.accuracy), short(chosen.fitted.get(survey.size)))
        rows.append([f"{survey.size} px", short(survey.macs), _border(survey)[0], str(row.epochs), *accuracies, *values, mark])
    columns = ["size", "MACs", "past the border", "epochs", "accuracy", "fitted", "mean saturation", "evenness", "tail", ""]
    show_table(columns, rows, left=1)
    typer.echo(_LEGEND)
    shared = tuning.shared
    weights = f"one set of weights, {shared.passes} passes at all sizes in turn, then each size alone"
    if shared.reason:
        weights = f"each size from its own weights: {shared.reason}"
    cost = f"cost: {100 * tuning.macs_share:.0f} % of training every size for {counted(tuning.epochs, 'epoch')}"
    typer.echo("\n".join([f"recommended: {chosen.size} px", *(f"  {reason}" for reason in chosen.reasons), weights, cost]))
    if tuning.advice:
        typer.echo("\n".join(["a tail remains; instead of another size:", *(f"  {a.text}" for a in tuning.advice)]))
    elif not chosen.even:
        typer.echo("a tail remains, but no whole block lies in it: there is nothing to cut")


def _write(folder: Path, document: dict[str, Any], panels: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    from capnas.report.panels import line_panels

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / DOCUMENT, json_text(document))
    write_whole(folder / FIGURE, line_panels(panels, axis="pixels"))


def _survey_panels(surveys: tuple[SizeSurvey, ...]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    border = _border_line(surveys)
    macs = [(float(s.size), float(s.macs)) for s in surveys if s.macs is not None]
    return ({"idle layers (share)": border} if border else {}) | {"MACs": {"one image": macs}}


def _border_line(surveys: tuple[SizeSurvey, ...]) -> dict[str, list[tuple[float, float]]]:
    """The share of the layers past the border by size; nothing of a network without a border."""
    points = [(float(s.size), len(s.unproductive) / len(s.looking)) for s in surveys if s.looking and not s.borderless]
    return {"past the border": points} if points else {}


def _panels(tuning: Tuning) -> dict[str, dict[str, list[tuple[float, float]]]]:
    from capnas.measures.evenness import mean, tail_fraction

    last = [row for s in tuning.surveys if (row := tuning.last(s.size)) is not None]
    accuracy = {"measured": [(float(r.size), r.accuracy) for r in last]}
    tail = {"tail": [(float(r.size), tail_fraction(r.saturations)) for r in last]}
    return {
        "accuracy": accuracy | {"fitted": [(float(s), a) for s, a in tuning.recommendation.fitted.items()]},
        "mean saturation": {"measured": [(float(r.size), mean(r.saturations)) for r in last]},
        "idle layers (share)": tail | _border_line(tuning.surveys),
    }
