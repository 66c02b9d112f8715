"""The application that commands register with, and the options that they share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from capnas import __version__
from capnas.console import number, say
from capnas.errors import UsageError, one_line

app = typer.Typer(
    help="Architecture search for Optuna, timm and PyTorch that looks inside each candidate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, progress to stderr.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Use timm's own weights; images are cropped, sized and normalized as in timm's evaluation of these."),
]
WEIGHTS: Any = typer.Option(
    metavar="FILE", help="Trained weights of a timm model: a safetensors file, or a checkpoint of timm's training or torch.save."
)
Run = Annotated[str, typer.Argument(help="A run's folder, or the name of a study under runs/.")]


def whole(about: str, metavar: str = "N") -> Any:
    """An option that is a whole number, written as `capnas.console.number` reads it."""
    return typer.Option(help=about, metavar=metavar, parser=_whole)


def _whole(given: object) -> int:
    try:
        return number(str(given))
    except UsageError as error:  # typer says of which option
        raise typer.BadParameter(str(error)) from None


def sizes(text: str, option: str) -> tuple[int, ...]:
    """Image sizes as they are written: 24,32,48."""
    try:
        found = tuple(number(part) for part in text.split(","))
    except UsageError:
        found = ()
    if not found or min(found) < 1 or len(set(found)) < len(found):
        raise UsageError(f"{option} takes different sizes in pixels, whole numbers such as 24,32,48, got {text!r}.")
    return found


def decimal(about: str, metavar: str | None = None) -> Any:
    """An option that is a number, written like 0.5."""
    return typer.Option(help=about, metavar=metavar or "<float>", parser=_decimal)


def _decimal(given: object) -> float:
    try:
        return float(str(given))
    except ValueError:
        raise typer.BadParameter(f"a number is written like 0.5 or 1e-3, got {str(given)!r}.") from None


def seeding(about: str) -> Any:
    """An option that is a seed, of the range that NumPy and torch share."""
    return typer.Option(help=about, metavar="N", parser=_seed)


def _seed(given: object) -> int:
    if not 0 <= (seed := _whole(given)) < 2**32:
        raise typer.BadParameter(f"a seed must be at least 0 and below 2**32, got {seed}.")
    return seed


Blocks = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Names of the modules to read as blocks, a regular expression; default: found by rule."),
]


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


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's log lines off (progress tells the same), warnings as one line each, and what a user's space prints on stderr."""
    import optuna

    def tell(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        say(f"warning: {one_line(message)}")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*is experimental.*")
        warnings.showwarning = tell
        yield
