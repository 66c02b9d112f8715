"""`capnas spaces`, `scores`, `report` and `best`: what there is and what came out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from capnas.cli.app import Device, Json, Run, app, quiet, seeding, whole
from capnas.console import at_chance, duration, guess, out_json, remark, say, show_best, show_table
from capnas.documents import write_whole
from capnas.errors import UsageError


@app.command()
def spaces(json: Json = False) -> None:
    """List the installed search spaces."""
    with quiet():
        from capnas.spaces import list_spaces

        found = list_spaces()
    if json:
        out_json(found)
    else:
        show_table(["space", "what is searched"], found.items(), left=2)
        say("Search one with: capnas search NAME. A file of your own: capnas search path/to/file.py:function")


@app.command()
def scores(json: Json = False) -> None:
    """List the scores: which way each is better, its range and its meaning."""
    with quiet():
        from capnas.scoring import SCORES, measure_of

        found = [
            {
                "score": score.name,
                "direction": score.direction,
                "low": score.low if math.isfinite(score.low) else None,
                "high": score.high if math.isfinite(score.high) else None,
                "measure": measure_of(score.name),
                "meaning": score.meaning,
            }
            for score in SCORES.values()
        ]
    if json:
        out_json(found)
        return
    for row in found:
        low, high = row["low"], row["high"]
        row["range"] = "any" if low is None else f"from {low}" if high is None else f"{low} to {high}"
        row["better"] = "higher" if row["direction"] == "maximize" else "lower"
    columns = ("score", "better", "range", "measure", "meaning")
    show_table(columns, ([str(row[name]) for name in columns] for row in found), left=len(columns))
    say("Search by them: capnas search SPACE --values accuracy,NAME (init_NAME for the untrained network); val_loss, train_loss, latency")
    say("(milliseconds of one image) and the sums combined and principled are values too. Show them: capnas profile MODEL --measures all")


@app.command()
def report(
    run: Run,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page with figures.")] = None,
    json: Json = False,
) -> None:
    """Print the tables of a run as Markdown, or write a page with figures; nothing is trained."""
    with quiet():
        from capnas.report import Report
        from capnas.search import open_run

        found = Report.of(open_run(run))
        owed = found.run.owed
        if html is not None:
            found.write_html(html)
    if json:
        out_json(found.to_dict() | ({} if html is None else {"html": str(html)}))
    else:
        typer.echo(found.to_markdown() if html is None else f"report: {html}")
    if owed and (json or html is not None):  # the markdown says it
        say(owed)


@app.command()
def best(
    run: Run,
    trial: Annotated[int | None, whole("Show this trial instead of the best.")] = None,
    code: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the Python code to a file instead of printing it.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train it longer on train + validation, test it once and keep the network.")
    ] = False,
    epochs: Annotated[int | None, whole("Epochs of --retrain; default: 20.")] = None,
    seed: Annotated[int | None, seeding("Seed of --retrain; default: 0.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show the best architecture: parameters, scores, and Python code that builds it with timm alone."""
    with quiet():
        from capnas.search import open_run
        from capnas.search.trials import rebuild, retrain_trial

        if not retrain and (epochs, seed) != (None, None):
            raise UsageError("--epochs and --seed are those of --retrain: give it as well, or leave them out.")
        epochs, seed = 20 if epochs is None else epochs, seed or 0
        place, opened = None if code is None else code.absolute(), open_run(run)  # a space may change the working directory
        found = rebuild(opened, "best" if trial is None else trial)
        script, document = found.script(), found.summary()
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, script)
        test = None
        if retrain:
            test = retrain_trial(
                found,
                epochs=epochs,
                seed=seed,
                device=device,
                on_epoch=lambda epoch, row: say(f"epoch {epoch}/{epochs}  loss {row['train_loss']:.4f}  ({duration(row['seconds'])})"),
            )
            if test.get("model") is not None:
                test = test | {"model": str(opened.folder / test["model"])}
        told = [document["metrics"].get("accuracy"), (document["final"] or {}).get("accuracy"), (test or {}).get("test_accuracy")]
        accuracy = next((a for a in reversed(told) if a is not None), None)  # of the longest training that there was
        split = "validation" if test is None or test["test_accuracy"] is None else "test"
        poor = guess(found.run, [accuracy], split)
    if json:
        out_json(document | {"at_chance": poor is not None, "code": script} | ({} if test is None else {"retrained": test}))
    else:
        show_best(document, test, script if code is None else f"code: {code}")
    if poor is not None:
        line = at_chance(f"its accuracy on {split}, {accuracy:.4f}, is no", **poor)
        remark(line, json=json)
    if trial is None and (owed := found.run.owed):
        remark(owed, json=json)
