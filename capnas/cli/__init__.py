"""The command line. Each command reads its options, makes one call into the library and shows what came of it.

Nothing heavy is imported before a command runs, so that help is instant.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from capnas.cli.app import app
from capnas.console import say
from capnas.errors import CapnasError, is_disk_full, one_line

# isort: split
# in the order in which help lists the commands
from capnas.cli import searching as searching  # isort: skip
from capnas.cli import profiling as profiling  # isort: skip
from capnas.cli import looking as looking  # isort: skip
from capnas.cli import excess as excess  # isort: skip
from capnas.cli import resolution as resolution  # isort: skip
from capnas.cli import prune as prune  # isort: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0, 1 after an unexpected error, 2 after an error of use, 130 after Ctrl-C."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it: the work does not depend on what is shown
            setattr(sys, name, io.StringIO())
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = app(args=[a for a in given if a != "--debug"], prog_name="capnas", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C, without a word
            say("interrupted")
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        code = 130
    except CapnasError as error:
        code = _failed(str(error), debug, status=2)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        if is_disk_full(error):
            text = f"{place}{error.strerror}; make room and give the same command again (a search resumes: its finished trials are kept)"
            code = _failed(text, debug, status=2)
        else:
            text = f"{place}{error.strerror}; expected {_expected(error)}, give another one"
            code = _failed(text, debug, status=2) if place else _unexpected(error, debug)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its help is on the screen
            code = 2
        elif hasattr(error, "format_message"):  # an error of click, which some releases of typer carry under another name
            code = _failed(f"{error.format_message().rstrip('.')}.", debug, hint=" See capnas --help.", status=2)
        else:
            code = _unexpected(error, debug)
    raise SystemExit(code if isinstance(code, int) else 0)


def _expected(error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):  # a file is where a folder was to be made, or above it
        return "a folder"
    return "a file" if isinstance(error, IsADirectoryError) else "a path that can be read or written"


def _unexpected(error: Exception, debug: bool) -> int:
    if _out_of_memory(error):
        text = "not enough memory for this; take a smaller image size, batch or network"
        return _failed(text, debug, hint=" (--debug shows where it ran out)", status=2)
    return _failed(f"{type(error).__name__}: {error}", debug, hint=" (not expected: --debug shows where it comes from)", status=1)


def _out_of_memory(error: Exception) -> bool:
    if not isinstance(error, MemoryError | RuntimeError):
        return False  # torch is slow to load
    from capnas.devices import is_out_of_memory

    return is_out_of_memory(error)


def _failed(text: str, debug: bool, *, status: int, hint: str = "") -> int:
    if debug:
        traceback.print_exc()
    else:
        say(f"error: {one_line(text)}{hint}")
    return status
