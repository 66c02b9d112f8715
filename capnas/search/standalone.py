"""A found architecture as a Python script that builds it with timm and torch alone: no capnas, no Optuna.

The script is the space's own source with each decision looked up in a dictionary: ``trial.suggest_int("depth", 1, 3)`` becomes
``trial["depth"]``. What cannot be rewritten that way (a trial used for something else) gets a small stand-in for the trial instead.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import sys
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

from capnas.errors import SpaceError

Edit = tuple[int, int, bytes]  # from, to, new text

_SUGGEST = {"suggest_int", "suggest_float", "suggest_categorical", "suggest_uniform", "suggest_loguniform", "suggest_discrete_uniform"}
_NAME = "DECISIONS"

_GUARD = """
import importlib
import sys

import torch

try:  # a CPU build of torch beside a CUDA build of torchvision: declare the operators whose absence breaks `import timm`
    importlib.import_module("torchvision")
except RuntimeError:
    for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

_STAND_IN = '''\
class Decisions(dict):
    """Stands in for the trial: answers every suggestion with the decision of that name, and ignores what it is told."""

    number = 0

    @property
    def params(self):
        return dict(self)

    def suggest(self, name, *args, **kwargs):
        return self[name]

    def told(self, *args, **kwargs):
        pass

    def should_prune(self):
        return False

    suggest_int = suggest_float = suggest_categorical = suggest
    suggest_uniform = suggest_loguniform = suggest_discrete_uniform = suggest
    set_user_attr = set_constraint = report = told


'''


def standalone_script(
    space: Callable[..., Any],
    params: Mapping[str, Any],
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    title: str = "An architecture found by capnas.",
    guard: bool | None = None,
) -> str:
    """Python source of a script that defines ``build()``, which returns the model of these parameters with fresh weights.

    Where the space's own file has a ``build``, it is ``build_0()``; the script's first lines name it.

    Args:
        space: from `capnas.load_space`, or a function whose source file can be read.
        params: the trial's parameters.
        num_classes: outputs.
        in_chans: input channels.
        image_size: pixels.
        title: a line for the top of the script.
        guard: write the lines that make timm importable on CPU builds of torch; by default where this process needed them.

    Raises:
        SpaceError: the source of the space cannot be found, or does not name it at its top level.

    >>> from capnas.spaces import load_space
    >>> params = {"stages": 2, "act": "relu", "head": 32, "depth0": 1, "width0": 8, "depth1": 1, "width1": 16}
    >>> script = standalone_script(load_space("vgg"), params, num_classes=10, in_chans=1, image_size=28, guard=False)
    >>> "suggest" in script, "optuna" in script
    (False, False)
    >>> names = {}
    >>> exec(script, names)
    >>> names["build"]().features[0].out_channels
    8
    """
    function, options = _unwrapped(space)
    name, entry = _names(function)
    if guard is None:
        from capnas import _timm

        guard = _timm._library is not None
    trial = next(iter(inspect.signature(function).parameters), "")
    source, rewritten = _rewritten(_source_of(function), trial, _GUARD if guard else "")
    size = f"{in_chans}, {image_size}, {image_size}"
    given = {"num_classes": num_classes, "in_chans": in_chans, "image_size": image_size, **options}
    arguments = ", ".join([_NAME if rewritten else f"Decisions({_NAME})", *(f"{k}={v!r}" for k, v in given.items())])
    decisions = "".join(f"    {k!r}: {v!r},\n" for k, v in params.items())
    optuna = any(_imports_optuna(node) or _is_from(node, "optuna") for node in ast.walk(ast.parse(source)))
    needed = ["torch", "timm", *_further(source)] + ["optuna (the space asks more of it than suggestions)"] * optuna
    needs = f"{', '.join(needed[:-1])} and {needed[-1]}"
    return (
        f"# {title}\n# It needs {needs}. Run it to see its size, or import `{entry}` from it.\n\n"
        f"{source.strip()}\n\n\n{_NAME} = {{\n{decisions}}}\n\n\n{'' if rewritten else _STAND_IN}"
        f'def {entry}():\n    """The architecture with fresh weights: images ({size}) to {num_classes} logits."""\n'
        f"    return {name}({arguments})\n\n\n"
        f'if __name__ == "__main__":\n    import torch\n\n    model = {entry}().eval()\n'
        f"    output = model(torch.zeros(1, {size}))\n"
        '    print(f"parameters: {sum(p.numel() for p in model.parameters())}, output: {tuple(output.shape)}")\n'
    )


def _unwrapped(space: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    function = getattr(space, "function", space)
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        options, function = {**function.keywords, **options}, function.func
    return function, options


def _names(function: Callable[..., Any]) -> tuple[str, str]:
    """What a space is called in its own file, and what the script may call its function there without hiding another."""
    top = getattr(function, "__globals__", None) or vars(sys.modules[type(function).__module__])
    name = next((n for n, value in top.items() if value is function), None)
    if name is None:
        raise SpaceError(f"the space {function!r} has no name at the top level of its file, by which a script can call it; give it one.")
    return name, next(n for n in ("build", *(f"build_{i}" for i in range(len(top) + 1))) if n not in top)


def _source_of(function: Callable[..., Any]) -> str:
    try:
        path = inspect.getsourcefile(function if inspect.isfunction(function) else type(function))
        if path is None:
            raise OSError("no file")
        with tokenize.open(path) as file:  # as Python reads it: by its mark or its line of an encoding
            return file.read()
    except (OSError, TypeError) as error:
        raise SpaceError(f"the source of the space {function!r} cannot be read ({error}); put the space into a file.") from error


class _Text:
    """A source in bytes, and where its nodes stand."""

    def __init__(self, source: str) -> None:
        self.raw = source.encode()
        self.starts = [0, *itertools.accumulate(map(len, self.raw.splitlines(keepends=True)))]  # of each line

    def span(self, node: Any) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def lines(self, node: Any) -> tuple[int, int]:
        return self.starts[node.lineno - 1], self.starts[node.end_lineno]


def _rewritten(source: str, trial: str, guard: str) -> tuple[str, bool]:
    """The source without its trial, and True; or nearly as it is, and False where something else is asked of the trial or of Optuna."""
    tree, text = ast.parse(source), _Text(source)
    always = _frame(tree, text, guard)
    edits, trials, known = _without_trial(tree, text, trial)
    whole = not _asks_more(tree, trials, known)
    return _edited(text.raw, always + edits if whole else always), whole


def _frame(tree: ast.Module, text: _Text, guard: str) -> list[Edit]:
    """Edits that are right in any case: what runs as a script is left out, the guard comes behind the docstring."""
    edits: list[Edit] = []
    top = 0
    for statement in tree.body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test).startswith("__name__"):
            edits.append((*text.lines(statement), b""))
        elif (statement is tree.body[0] and isinstance(statement, ast.Expr)) or _is_from(statement, "__future__"):
            top = text.lines(statement)[1]
    return [*edits, (top, top, guard.encode())]


def _without_trial(tree: ast.Module, text: _Text, trial: str) -> tuple[list[Edit], set[str], set[int]]:
    """Edits that take the trial and Optuna out; the names of trials, and the ids of the nodes that the edits take care of."""
    edits: list[Edit] = []
    trials, known = {trial}, set[int]()
    alone = {id(s): place for s in tree.body if b";" not in text.raw[slice(*(place := text.lines(s)))]}
    node: Any
    for node in ast.walk(tree):
        if (label := _label(node)) is not None:
            trials.add(node.func.value.id)
            known.add(id(node.func))
            edits.append((*text.span(node), node.func.value.id.encode() + b"[" + text.raw[slice(*text.span(label))] + b"]"))
        elif isinstance(node, ast.Import) and [(a.name, a.asname) for a in node.names] == [("optuna", None)]:
            known.add(id(node))
            edits.append((*alone[id(node)], b"") if id(node) in alone else (*text.span(node), b"pass"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "optuna.TrialPruned":
            known.add(id(node.value))
            edits.append((*text.span(node), b"ValueError"))
        elif isinstance(node, ast.arg) and node.annotation is not None and "optuna" in ast.unparse(node.annotation):
            known.update(id(inner) for inner in ast.walk(node.annotation))
            edits.append((*text.span(node.annotation), b"dict"))
    return edits, trials, known


def _asks_more(tree: ast.Module, trials: set[str], known: set[int]) -> bool:
    """Whether anything is asked of the trial or of Optuna beside what is `known`, or the trial is handed to code that is not here."""
    here = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    plain: set[int] = set()  # names of the trial whose use is plain: asked, or handed to a function of this source
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in here:  # what it asks is in this source
            plain.update(id(given) for given in (*node.args, *(k.value for k in node.keywords)))
        elif isinstance(node, ast.Attribute):
            plain.add(id(node.value))
    for node in ast.walk(tree):
        optuna_left = (_imports_optuna(node) or (isinstance(node, ast.Name) and node.id == "optuna")) and id(node) not in known
        owner = node.value if isinstance(node, ast.Attribute) else None
        of_trial = isinstance(owner, ast.Name) and owner.id in trials
        suggests = isinstance(node, ast.Attribute) and node.attr in _SUGGEST  # of whomever, called or handed on
        trial_left = (of_trial or suggests) and id(node) not in known
        handed_on = isinstance(node, ast.Name) and node.id in trials and id(node) not in plain  # to other modules, as far as one can tell
        if optuna_left or trial_left or handed_on or _is_from(node, "optuna"):
            return True
    return False


def _further(source: str) -> list[str]:
    """The packages and modules that a script imports beside torch, timm, Optuna and what comes with Python."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "").partition(".")[0])
    return sorted(found - {"torch", "timm", "optuna"} - sys.stdlib_module_names)


def _is_from(node: ast.AST, package: str) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package


def _imports_optuna(node: ast.AST) -> bool:
    return isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "optuna" for alias in node.names)


def _label(node: Any) -> Any:
    """The label of ``name.suggest_...(label, ...)``; None of anything else, and of a label that is unpacked or suggests itself."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SUGGEST):
        return None
    label = next((k.value for k in node.keywords if k.arg == "name"), None) or next(iter(node.args), None)
    if not isinstance(node.func.value, ast.Name) or label is None or isinstance(label, ast.Starred):
        return None
    return None if any(isinstance(inner, ast.Attribute) and inner.attr in _SUGGEST for inner in ast.walk(label)) else label


def _edited(raw: bytes, edits: list[Edit]) -> str:
    """The edits made from last to first; one inside another is dropped."""
    outer = [e for e in edits if not any(o is not e and o[0] <= e[0] and e[1] <= o[1] for o in edits)]
    for low, high, new in sorted(outer, reverse=True):
        raw = raw[:low] + new + raw[high:]
    return raw.decode()
