"""Errors that a user can act on: each message says what was expected, what came and what to do."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_MANY = 30  # names, beyond which an error lists only the nearest


class CapnasError(Exception):
    """Base of every error that capnas raises on purpose; its text is one line for the user."""


class UsageError(CapnasError, ValueError):
    """An argument, option or name that cannot be used as given."""


class DegenerateError(UsageError):
    """Numbers that a measure cannot be taken of: they overflowed, are not numbers or are all zero."""


class DataError(CapnasError):
    """A data set that is missing, unreadable, wrongly laid out or too damaged to train on."""


class SpaceError(CapnasError):
    """A search space that cannot be loaded or that breaks the space protocol."""


class StudyError(CapnasError):
    """A study or run folder that is missing, unreadable or contradicts the request."""


class MissingDependencyError(CapnasError, ImportError):
    """An optional package is needed; the text names the extra that installs it."""


def one_line(text: object, most: int | None = None) -> str:
    r"""A text without line breaks, cut off after so many characters.

    >>> one_line(ValueError("too small:\n  2"), 9)
    'too small'
    """
    return " ".join(str(text).split())[:most]


def described(error: BaseException, most: int | None = 160) -> str:
    r"""The kind of an error and the start of its text, in one line.

    >>> described(ValueError("too small:\n  2")), described(ValueError())
    ('ValueError: too small: 2', 'ValueError')
    """
    text = one_line(error, most)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because there is no room: on the disk, in the user's share of it, or below the largest size of a file.

    >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device")), is_disk_full(OSError(errno.EACCES, "Permission denied"))
    (True, False)
    """
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_types(settings: Any, *texts: str) -> None:
    """Refuse a field of a dataclass whose value is not of the declared kind; a number of NumPy becomes Python's, as torch needs it.

    Args:
        settings: the dataclass.
        texts: its fields that must be texts; where others are declared as texts or literals anything passes, since their own checks name
            the choices.

    Raises:
        UsageError: the first such field.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        check_type(name, value, kind, text=name in texts)
        if isinstance(value, Real) and hasattr(value, "item"):
            object.__setattr__(settings, name, value.item())


def check_type(name: str, value: Any, kind: Any, *, text: bool = False) -> None:
    """Refuse a value that is not of the declared kind.

    Args:
        name: of the argument.
        value: that was given.
        kind: a type, or several as in ``int | None``.
        text: whether ``str`` is a kind like others, see `check_types`.

    Raises:
        UsageError: it is none of these.

    >>> check_type("pool", 3, int | None)
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(isinstance(value, str) if k is str and text else _fits(value, k) for k in kinds):
        raise UsageError(f"{name} must be {' or '.join(map(_word, kinds))}, got {value!r}.")


def check_names(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is none of those known.

    Raises:
        UsageError: the first such name, with the nearest of those known.

    >>> check_names("train", {"lr": 0.1}, {"lr", "optimizer"})
    """
    for name in given:
        check_name(what, name, known)


def check_name(what: str, given: object, known: Collection[str]) -> None:
    """Refuse what is none of the names known.

    Raises:
        UsageError: with the nearest of those known.

    >>> check_name("sampler", "tpe", ("tpe", "random"))
    """
    if given not in known:
        raise UsageError(one_of(what, given, known))


def counted(number: int, what: str) -> str:
    """How many of something.

    >>> counted(1, "epoch"), counted(20, "epoch")
    ('1 epoch', '20 epochs')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first few of many, for a message.

    >>> listed(range(9), 3)
    '0, 1, 2 and 6 more'
    """
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", Mapping: "values by name", type(None): "none"
}  # fmt: skip


def _word(kind: Any) -> str:
    origin = get_origin(kind) or kind
    return f"a list of {_word(get_args(kind)[0]).partition(' ')[2]}s" if origin is tuple else _WORDS.get(origin) or kind.__name__


def _fits(value: Any, kind: Any) -> bool:
    if kind in (Any, str) or get_origin(kind) is Literal:
        return True
    if get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    kind = get_origin(kind) or kind
    return isinstance(value, {int: Integral, float: Real}.get(kind, kind))


def one_of(name: str, value: object, known: object) -> str:
    """The sentence for a name that is not among the known ones: all of them, or of many the nearest, else the first.

    >>> one_of("sampler", "tpee", ["tpe", "random"])
    "sampler must be one of random, tpe; got 'tpee'. Did you mean 'tpe'?"
    >>> one_of("values", "latency7", [f"latency{i}" for i in range(7)] + [f"score{i}" for i in range(30)])
    "values has no 'latency7' among its 37 names. Did you mean 'latency6', 'latency5' or 'latency4'?"
    >>> one_of("values", "", [f"score{i}" for i in range(40)])
    'values must be one of 40 names such as score0, score1, score2, score3, score4; got an empty name.'
    """
    import difflib

    given = [str(k) for k in known]  # type: ignore[attr-defined]
    names, came = sorted(given), repr(value) if value != "" else "an empty name"
    close = [repr(match) for match in difflib.get_close_matches(str(value), names, n=3)]
    if close and len(names) > _MANY:
        *others, last = close
        guess = f"{', '.join(others)} or {last}" if others else last
        return f"{name} has no {value!r} among its {len(names)} names. Did you mean {guess}?"
    choices = ", ".join(names) if len(names) <= _MANY else f"{len(names)} names such as {', '.join(given[:5])}"
    return f"{name} must be one of {choices}; got {came}." + (f" Did you mean {close[0]}?" if close else "")
