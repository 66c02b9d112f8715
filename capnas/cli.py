"""The command line. Each command reads its options, makes one call into the library and shows what came of it.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from capnas import __version__
from capnas.console import (
    Progress,
    duration,
    number,
    out_json,
    pairs,
    run_document,
    say,
    show_best,
    show_profile,
    show_run,
    show_table,
)
from capnas.errors import CapnasError

app = typer.Typer(
    help="Architecture search for Optuna, timm and PyTorch that looks inside each candidate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, progress on stderr.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Run = Annotated[str, typer.Argument(help="Folder of a run, or the name of a study under runs/.")]
Count = Annotated[str | None, typer.Option(metavar="N", help="Limit per candidate: 8e6, 8M, 300k.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"capnas {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Architecture search for Optuna, timm and PyTorch that looks inside each candidate."""


@app.command()
def search(
    space: Annotated[str, typer.Argument(help="Name of a space (see capnas spaces), file.py:function or module:function.")],
    data: Annotated[str, typer.Option(help="Data set: a name or a folder of images.")] = "fashion-mnist-12k",
    trials: Annotated[int, typer.Option(help="Finished trials in all; a larger number continues a study.")] = 30,
    epochs: Annotated[int, typer.Option(help="Of the short training.")] = 3,
    values: Annotated[str, typer.Option(help="What to optimize: combined, or names like accuracy,saturation_evenness,macs.")] = "combined",
    weights: Annotated[str | None, typer.Option(metavar="NAME=W,...", help="Weights of the scores in combined.")] = None,
    max_macs: Count = None,
    max_params: Count = None,
    gate: Annotated[str | None, typer.Option(help='Bound before training, such as "saturation_evenness>=0.5".')] = None,
    resolutions: Annotated[str | None, typer.Option(metavar="PX,PX,...", help="Image sizes to search jointly.")] = None,
    sampler: Annotated[str, typer.Option(help="tpe, random, nsga2, nsga3, gp, qmc or cmaes.")] = "tpe",
    pruner: Annotated[str, typer.Option(help="median, hyperband or off.")] = "median",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL; a journal in the run's folder without one.")] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; from space and data without one.")] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder; runs/STUDY without one.")] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    device: Device = "auto",
    train: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="More training settings: lr=0.01.")] = None,
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="More data settings: image_size=32.")] = None,
    json: Json = False,
) -> None:
    """Search for architectures; the same command again resumes."""
    with _quiet():
        from capnas.config import StudyConfig
        from capnas.search import run_study

        config = StudyConfig(
            space=space,
            data=data,
            study=study,
            trials=trials,
            epochs=epochs,
            values=tuple(v.strip() for v in values.split(",")),
            weights=None if weights is None else pairs([weights], "--weights"),
            max_params=None if max_params is None else number(max_params),
            max_macs=None if max_macs is None else number(max_macs),
            gate=gate,
            resolutions=None if resolutions is None else tuple(number(r) for r in resolutions.split(",")),
            sampler=sampler,
            pruner=pruner,
            seed=seed,
            storage=storage,
            out=out,
            workers=workers,
            device=device,
            train=pairs(train or [], "--train"),
            data_options=pairs(data_option or [], "--data-option"),
        )
        say(f"searching {space} on {data}: {trials} trials, {epochs} epochs, optimizing {', '.join(config.values)}, into {config.folder}")
        progress = Progress(total=trials, names=config.values, directions=config.directions)
        with progress:
            result = run_study(config, on_trial=progress.on_trial)
    if json:
        out_json(run_document(result))
    else:
        show_run(result)
    if result.interrupted:
        say(f"Interrupted with {result.n_finished} of {trials} trials finished. Resume with: {_command()}")
        raise typer.Exit(130)
    if result.finished_before >= trials:
        say(f"The study was finished before ({result.finished_before} trials); --trials with a larger number continues it.")


@app.command()
def worker(
    run: Annotated[str, typer.Argument(help="Folder of a run, or the name of a study in --storage.")],
    storage: Annotated[str | None, typer.Option(help="Optuna storage URL of the study, where there is no folder here.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of the study's.")] = None,
    json: Json = False,
) -> None:
    """Run trials of an existing study beside other workers, here or on another machine, until it has all of its trials."""
    with _quiet():
        from capnas.search import worker as work

        config = _config_of(run, storage)
        progress = Progress(total=config.trials, names=config.values, directions=config.directions)
        with progress:
            ran = work(config, device=device, on_trial=progress.on_trial)
    if json:
        out_json({"study": config.name, "ran": ran})
    else:
        typer.echo(f"ran {ran} trials of {config.name}")


@app.command()
def spaces(json: Json = False) -> None:
    """List the installed search spaces."""
    from capnas.spaces import list_spaces

    found = list_spaces()
    if json:
        out_json(found)
    else:
        show_table(["space", "what is searched"], found.items(), left=2)
        say("Search one with: capnas search NAME. A file of your own: capnas search path/to/file.py:function")


@app.command()
def profile(
    target: Annotated[str, typer.Argument(help="A timm model, or RUN:NUMBER or RUN:best for a trial.")],
    data: Annotated[str | None, typer.Option(help="Images for a timm model; fashion-mnist-12k without.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels; the data's without.")] = None,
    batch: Annotated[int, typer.Option(help="Images.")] = 256,
    mode: Annotated[str, typer.Option(help="train or eval.")] = "train",
    threshold: Annotated[float, typer.Option(help="Share of the variance that k explains.")] = 0.99,
    reading: Annotated[str, typer.Option(help="modules, blocks or both.")] = "both",
    initial: Annotated[bool, typer.Option("--initial", help="Measure a trial's network before training instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and choice of images.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show width, intrinsic dimension k, saturation and cost of each layer and block."""
    with _quiet():
        from capnas.inspection import inspect_target

        found = inspect_target(
            target,
            data=data,
            image_size=image_size,
            batch=batch,
            mode=mode,  # type: ignore[arg-type]
            threshold=threshold,
            reading=reading,  # type: ignore[arg-type]
            initial=initial,
            seed=seed,
            device=device,
        )
    out_json(found.to_dict()) if json else show_profile(found)


@app.command()
def report(
    run: Run,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained page with figures.")] = None,
    json: Json = False,
) -> None:
    """Tables of a run in markdown, and a page with figures; nothing is trained."""
    with _quiet():
        from capnas.report import Report
        from capnas.search import open_run

        found = Report.of(open_run(run))
        if html is not None:
            found.write_html(html)
    if json:
        out_json(found.to_dict() | ({} if html is None else {"html": str(html)}))
    else:
        typer.echo(found.to_markdown() if html is None else f"report: {html}")


@app.command()
def best(
    run: Run,
    trial: Annotated[int | None, typer.Option(help="Another trial than the best.")] = None,
    code: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the Python code to a file instead of showing it.")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train it longer on train + validation, evaluate it once on test.")] = False,
    epochs: Annotated[int, typer.Option(help="Of --retrain.")] = 20,
    seed: Annotated[int, typer.Option(help="Of --retrain.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Show the best architecture: parameters, scores, and Python code that builds it with timm alone."""
    with _quiet():
        from capnas.search import open_run
        from capnas.trials import rebuild, retrain_trial

        found = rebuild(open_run(run), "best" if trial is None else trial)
        script, document = found.script(), found.summary()
        if code is not None:
            code.parent.mkdir(parents=True, exist_ok=True)
            code.write_text(script, encoding="utf-8")
        test = None
        if retrain:
            test = retrain_trial(
                found,
                epochs=epochs,
                seed=seed,
                device=device,
                on_epoch=lambda epoch, row: say(f"epoch {epoch}/{epochs}  loss {row['train_loss']:.4f}  ({duration(row['seconds'])})"),
            )
    if json:
        out_json(document | {"code": script} | ({} if test is None else {"retrained": test}))
        return
    show_best(document, test, script if code is None else f"code: {code}")


def _config_of(run: str, storage: str | None) -> Any:
    """The settings of a study, from its folder or from its storage."""
    from dataclasses import replace

    import optuna

    from capnas.config import StudyConfig
    from capnas.errors import StudyError
    from capnas.search import ATTRIBUTE, open_run
    from capnas.storages import open_storage

    if storage is None:
        return open_run(run).config
    try:
        stored = optuna.load_study(study_name=run, storage=open_storage(storage, Path())).user_attrs.get(ATTRIBUTE)
    except KeyError:
        stored = None
    if stored is None:
        raise StudyError(f"the storage holds no study of capnas named {run}; start it with capnas search --storage.")
    return replace(StudyConfig.from_dict(stored), storage=storage)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log lines off (progress tells the same), warnings as one line each."""
    import optuna

    def one_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*is experimental.*")
        warnings.showwarning = one_line
        yield


def _command() -> str:
    program = Path(sys.argv[0])
    start = ["python", "-m", "capnas"] if program.name == "__main__.py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 1 after an unexpected error, 2 after an error of use, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = app(args=[a for a in given if a != "--debug"], prog_name="capnas", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        code = 130
    except CapnasError as error:
        code = _failed(str(error), debug, status=2)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its help is on the screen
            code = 2
        elif hasattr(error, "format_message"):  # an error of click, which some releases of typer carry under another name
            code = _failed(error.format_message(), debug, hint=" See capnas --help.", status=2)
        else:
            text = f"{type(error).__name__}: {error}"
            code = _failed(text, debug, hint=" (not expected: --debug shows where it comes from)", status=1)
    raise SystemExit(code if isinstance(code, int) else 0)


def _failed(text: str, debug: bool, *, status: int, hint: str = "") -> int:
    if debug:
        traceback.print_exc()
    else:
        say(f"error: {' '.join(text.split())}{hint}")
    return status
