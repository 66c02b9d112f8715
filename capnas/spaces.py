"""Search spaces: plain functions of a trial, found by name, file, module or entry point.

A space needs nothing of capnas. ``space(trial, *, num_classes, in_chans, image_size) -> nn.Module`` asks the trial for its decisions,
raises ``optuna.TrialPruned(reason)`` for a combination that cannot be built, and returns the model. The trial's parameters are the whole
genotype.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from capnas.errors import SpaceError, described, one_of

if TYPE_CHECKING:
    import optuna
    from torch import nn

GROUP = "capnas.search_spaces"
_KEYWORDS = ("num_classes", "in_chans", "image_size")
_FORM = "space(trial, *, num_classes, in_chans, image_size) -> nn.Module"


class SearchSpace(Protocol):
    """What a search space is: a function with this signature."""

    def __call__(self, trial: optuna.trial.BaseTrial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        """Build the model that the trial's suggestions describe."""
        ...


@dataclass(frozen=True, kw_only=True)
class SpaceRef:
    """A space together with the text that loads it again, in a spawned worker as well: pickling keeps only ``spec``.

    Attributes:
        name: short, for tables and folder names.
        spec: what `load_space` takes; a file's path is absolute.
        function: the space itself.
    """

    name: str
    spec: str
    function: Callable[..., Any] = field(repr=False, compare=False)

    def __call__(self, trial: optuna.trial.BaseTrial, *, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        """Build the model that the trial's suggestions describe."""
        return self.function(trial, num_classes=num_classes, in_chans=in_chans, image_size=image_size)

    def __reduce__(self) -> tuple[Callable[[str], SearchSpace], tuple[str]]:
        return load_space, (self.spec,)


def load_space(spec: str | os.PathLike[str] | Callable[..., Any]) -> SearchSpace:
    """Find a search space.

    Args:
        spec: an installed name (``"resnet"``), a file (``"mine.py"``, also as a path, or ``"mine.py:function"``), a module
            (``"package.module:function"``), the name of an entry point in the group ``capnas.search_spaces``, or the function itself. An
            unnamed function is ``space``.

    Returns:
        The function itself if one was given, else a `SpaceRef`, which is called like it.

    Raises:
        SpaceError: nothing is found there, or what is found is not a space.

    >>> load_space("resnet")
    SpaceRef(name='resnet', spec='resnet')
    """
    importlib.import_module("capnas._timm")  # spaces import timm, which needs the guard
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if not isinstance(spec, str):
        return _checked(spec, getattr(spec, "__qualname__", repr(spec)))
    place, _, attribute = spec.rpartition(":") if not spec.endswith(".py") and ":" in spec else (spec, "", "")
    attribute = attribute or "space"
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        function = _attribute(_load_file(path), attribute, spec)
        return SpaceRef(
            name=path.stem if attribute == "space" else attribute, spec=f"{path}:{attribute}", function=_checked(function, spec)
        )
    if ":" in spec or "." in spec:
        function = _attribute(_import(place, spec), attribute, spec)
        name = place.rpartition(".")[2] if attribute == "space" else attribute
        return SpaceRef(name=name, spec=f"{place}:{attribute}", function=_checked(function, spec))
    if spec in _installed():
        function = _attribute(_import(f"{GROUP}.{spec}", spec), "space", spec)
        return SpaceRef(name=spec, spec=spec, function=_checked(function, spec))
    if spec in (points := _entry_points()):
        try:
            function = points[spec].load()
        except (Exception, SystemExit) as error:
            raise SpaceError(f"the entry point {spec} = {points[spec].value!r} cannot be loaded: {described(error, 500)}") from error
        return SpaceRef(name=spec, spec=spec, function=_checked(function, spec))
    raise SpaceError(
        f"{one_of('space', spec, [*_installed(), *points])} A file is given as path/to/file.py:function, a module as module:function."
    )


def list_spaces() -> dict[str, str]:
    """The spaces that `load_space` knows by name, each with the first line of its docstring (the built-in ones are read, not imported).

    >>> sorted(list_spaces())[:3]
    ['byobnet', 'convnext', 'mbconv']
    """
    lines = {name: _first_docstring_line(path) for name, path in _installed().items()}
    for name, point in _entry_points().items():
        try:
            lines.setdefault(name, (inspect.getdoc(point.load()) or "").partition("\n")[0])
        except (Exception, SystemExit) as error:
            lines[name] = f"(cannot be loaded: {described(error, 500)})"
    return dict(sorted(lines.items()))


def space_name(space: Callable[..., Any]) -> str:
    """A short name for tables and folders.

    >>> space_name(load_space("vit"))
    'vit'
    """
    if isinstance(space, SpaceRef):
        return space.name
    name = getattr(space, "__name__", type(space).__name__)
    return str(getattr(space, "__module__", name)).rpartition(".")[2] if name == "space" else name


def space_spec(space: Callable[..., Any]) -> str:
    """The text from which `load_space` finds this space again in another process.

    Raises:
        SpaceError: the function has no importable place (a lambda, a nested function, a partial, an interactive session).

    >>> space_spec(load_space("vit"))
    'vit'
    """
    if isinstance(space, SpaceRef):
        return space.spec
    name, module = getattr(space, "__qualname__", ""), sys.modules.get(getattr(space, "__module__", None) or "")
    if name.isidentifier() and module is not None and getattr(module, name, None) is space:
        file = getattr(module, "__file__", None)
        if module.__name__ != "__main__":
            return f"{module.__name__}:{name}"
        if file:
            return f"{Path(file).resolve()}:{name}"
    raise SpaceError(
        f"the space {name or space!r} cannot be found again in another process: give it a name at the top level of a module or file, "
        "or use one worker and a function."
    )


def _installed() -> dict[str, Path]:
    package = importlib.import_module(GROUP)
    return {
        info.name: Path(folder) / f"{info.name}.py"
        for folder in package.__path__
        for info in pkgutil.iter_modules([folder])
        if not info.name.startswith("_")
    }


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _first_docstring_line(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "space"]
    texts = [*map(ast.get_docstring, functions), ast.get_docstring(tree)]
    return next((text.partition("\n")[0] for text in texts if text), "")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpaceError(f"there is no file {path}; a space is given as path/to/file.py:function.")
    name = f"capnas_space_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpaceError(f"{path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself
        del sys.modules[name]
        raise SpaceError(f"{path} fails when it is imported: {described(error, 500)}") from error
    return module


def _import(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise SpaceError(
                f"the module {name!r} of the space {spec!r} is not installed; a file is given as path/to/file.py:function."
            ) from error
        raise SpaceError(f"the module {name!r} fails when it is imported: {described(error, 500)}") from error
    except (Exception, SystemExit) as error:
        raise SpaceError(f"the module {name!r} fails when it is imported: {described(error, 500)}") from error


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    if not hasattr(module, name):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__ and not n.startswith("_")]
        raise SpaceError(f"{one_of('function', name, own)} (in {spec!r})" if own else f"{spec!r} defines no function; write {_FORM} there.")
    return getattr(module, name)


def _checked(space: Any, label: str) -> SearchSpace:
    if not callable(space):
        raise SpaceError(f"{label} is {type(space).__name__}, not a function {_FORM}.")
    try:
        inspect.signature(space).bind(object(), **dict.fromkeys(_KEYWORDS, 1))
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise SpaceError(f"{label} must be callable as {_FORM}: {described(error, 500)}") from error
    return space
