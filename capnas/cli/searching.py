"""`capnas search` and `capnas worker`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from capnas.cli.app import Blocks, Json, app, decimal, quiet, sizes, whole
from capnas.console import closing, no_value, out_json, pairs, remark, run_document, say, show_run
from capnas.errors import counted
from capnas.progress import Progress


@app.command()
def search(
    space: Annotated[str, typer.Argument(help="Name of a space (see capnas spaces), file.py:function or module:function.")],
    data: Annotated[
        str, typer.Option(help="A name, or a folder with one folder of images per class; --data-option image_size=64 sets their size.")
    ] = "fashion-mnist-12k",
    trials: Annotated[int, whole("Finished trials in all (with --gate best: trained ones); a larger number extends a study.")] = 30,
    timeout: Annotated[float | None, decimal("After so long no further trial begins; finals follow.", "SECONDS")] = None,
    epochs: Annotated[int, whole("Epochs of the short training.")] = 3,
    values: Annotated[
        str,
        typer.Option(
            help="What to optimize: combined (accuracy, losses and scores in one sum), or names such as accuracy,saturation_evenness,macs; "
            "latency is that of one image in milliseconds."
        ),
    ] = "combined",
    weights: Annotated[str | None, typer.Option(metavar="NAME=W,...", help="Weights of the scores in combined or principled.")] = None,
    max_macs: Annotated[int | None, whole("Most multiply-accumulates of a candidate for one image, e.g. 8e6 or 8M.")] = None,
    max_params: Annotated[int | None, whole("Most parameters of a candidate, e.g. 300k.")] = None,
    max_latency: Annotated[
        float | None, decimal("Most milliseconds of a candidate for one image, measured on --device (of a CPU one thread).", "MS")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            help="Which candidates are trained, judged by the untrained network: best:10% (the best tenth so far by capacity score), "
            'naswot:best:10%, combined:best:10% (by the terms known before training), or a bound such as "saturation_evenness>=0.5".'
        ),
    ] = None,
    pool: Annotated[int | None, whole("With --gate best: untrained candidates to measure before the first training.")] = None,
    resolutions: Annotated[str | None, typer.Option(metavar="PX,PX,...", help="Image sizes to search over.")] = None,
    blocks: Blocks = None,
    finalists: Annotated[int | None, whole("Train the N best again at the end, for longer, and name the one that does best.")] = None,
    final_epochs: Annotated[int | None, whole("Epochs of the finalists' training; default: four times --epochs.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random, nsga2, nsga3, gp, qmc or cmaes.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="median, hyperband or off.")] = "median",
    seed: Annotated[int, whole("Seed of everything random.")] = 0,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; default: a journal in the run's folder.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; default: made from space and data.")] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder; default: runs/STUDY.")] = None,
    workers: Annotated[int, whole("Worker processes on this machine.")] = 1,
    device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...; a study that measures latency keeps to the type of device.")
    ] = "auto",
    enqueue: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Architectures to try first: a JSON list of parameters, or what best --json prints.")
    ] = None,
    no_reuse: Annotated[
        bool, typer.Option("--no-reuse", help="Train every draw, even of an architecture trained before: initial weights may differ.")
    ] = False,
    train: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further training settings, e.g. lr=0.01.")] = None,
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further data settings, e.g. image_size=32.")] = None,
    json: Json = False,
) -> None:
    """Search for architectures; the same command resumes an interrupted search."""
    with quiet():
        from capnas.search import run_study
        from capnas.search.config import StudyConfig
        from capnas.search.enqueuing import read_parameters

        first = [] if enqueue is None else read_parameters(enqueue)
        config = StudyConfig(
            space=space,
            data=data,
            study=study,
            trials=trials,
            timeout=timeout,
            epochs=epochs,
            values=tuple(v.strip() for v in values.split(",")),
            weights=None if weights is None else pairs([weights], "--weights"),
            max_params=max_params,
            max_macs=max_macs,
            max_latency=max_latency,
            gate=gate,
            pool=pool,
            resolutions=None if resolutions is None else sizes(resolutions, "--resolutions"),
            blocks=blocks,
            finalists=finalists,
            final_epochs=final_epochs,
            sampler=sampler,
            pruner=pruner,
            seed=seed,
            storage=storage,
            out=out,
            workers=workers,
            device=device,
            reuse=not no_reuse,
            train=pairs(train or [], "--train"),
            data_options=pairs(data_option or [], "--data-option"),
        )
        start = f"searching {space} on {data}: {counted(trials, 'trial')}, {counted(epochs, 'epoch')}, optimizing "
        start += f"{', '.join(config.values)}, into {config.folder}"
        progress = Progress(total=trials, timeout=timeout, names=config.values, workers=workers, epochs=epochs)
        with progress:
            result = run_study(
                config,
                enqueue=first,
                on_start=lambda: say(start),
                on_trial=progress.on_trial,
                on_epoch=progress.on_epoch,
                on_final=progress.on_final,
            )
    if json:
        out_json(run_document(result))
        if not result.front:
            say(no_value(result))
    else:
        show_run(result)
    for line in closing(result):
        remark(line, json=json)
    if result.interrupted:
        say(f"Interrupted with {result.n_finished} of {trials} trials finished. Resume with: {_command()}")
        raise SystemExit(130)  # not typer.Exit: `main` says "interrupted" after that one
    if not result.finished and timeout is not None:
        say(f"Time is up with {result.n_finished} of {trials} trials finished. Go on with: {_command()}")
    if result.finished_before >= trials:
        say(f"The study was already finished ({counted(result.finished_before, 'trial')}); a larger --trials extends it.")


@app.command()
def worker(
    run: Annotated[str, typer.Argument(help="Folder of a run, or the name of a study in --storage.")],
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL of the study, if its folder is not on this machine.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to use instead of the study's; of its type where latency is measured.")] = None,
    json: Json = False,
) -> None:
    """Run trials of an existing study, alongside other workers on this or other machines, until all are done."""
    with quiet():
        from capnas.search import RunResult
        from capnas.search import worker as work
        from capnas.search.opening import stored_config
        from capnas.search.storages import find_study

        config = stored_config(run, storage)
        progress = Progress(total=config.trials, names=config.values, epochs=config.epochs)
        with progress:
            ran = work(config, device=device, on_trial=progress.on_trial, on_epoch=progress.on_epoch)
        study = None if config.finalists is None else find_study(config.name, config.storage, config.folder)
        owed = "" if study is None else RunResult(folder=config.folder, config=config, study=study).owed
    if json:
        out_json({"study": config.name, "ran": ran})
    else:
        typer.echo(f"ran {counted(ran, 'trial')} of {config.name}")
    if owed:
        remark(owed, json=json)


def _command() -> str:
    program = Path(sys.argv[0])
    start = ["python", "-m", "capnas"] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])
