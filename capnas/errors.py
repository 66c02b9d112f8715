"""Errors that a user can act on: each message says what was expected, what came and what to do."""

from __future__ import annotations

_MANY = 30  # names, beyond which an error lists only the nearest


class CapnasError(Exception):
    """Base of every error that capnas raises on purpose; its text is one line for the user."""


class UsageError(CapnasError, ValueError):
    """An argument, option or name that cannot be used as given."""


class DataError(CapnasError):
    """A data set that is missing, unreadable, wrongly laid out or too damaged to train on."""


class SpaceError(CapnasError):
    """A search space that cannot be loaded or that breaks the space protocol."""


class StudyError(CapnasError):
    """A study or run folder that is missing, unreadable or contradicts the request."""


class MissingDependencyError(CapnasError, ImportError):
    """An optional package is needed; the text names the extra that installs it."""


def one_of(name: str, value: object, known: object) -> str:
    """The sentence for a name that is not among the known ones: all of them, or of many the nearest.

    >>> one_of("sampler", "tpee", ["tpe", "random"])
    "sampler must be one of random, tpe; got 'tpee'. Did you mean 'tpe'?"
    >>> one_of("values", "latency7", [f"latency{i}" for i in range(7)] + [f"score{i}" for i in range(30)])
    "values has no 'latency7' among its 37 names. Did you mean 'latency6', 'latency5' or 'latency4'?"
    """
    import difflib

    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    close = [repr(match) for match in difflib.get_close_matches(str(value), names, n=3)]
    if close and len(names) > _MANY:
        *others, last = close
        guess = f"{', '.join(others)} or {last}" if others else last
        return f"{name} has no {value!r} among its {len(names)} names. Did you mean {guess}?"
    return f"{name} must be one of {', '.join(names)}; got {value!r}." + (f" Did you mean {close[0]}?" if close else "")
