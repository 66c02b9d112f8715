"""A model as a folder without pickle: safetensors for the numbers, a JSON manifest that builds the modules again.

The manifest names a *recipe* (a timm model, or a search space and its parameters) and what the model's modules have other than the
recipe builds: widths, numbers of heads, added biases, layers split in two, plain convolutions for standardized ones, number types. Loading
builds the recipe, changes those modules, and reads the weights. Nothing is executed but timm's constructors or the space's own code.

The weights hold the manifest that they were saved with as well: where a process is killed between the two files, the model is the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capnas._timm import import_timm, timm
from capnas.candidates import build_model
from capnas.devices import resolve_device
from capnas.documents import read_json, write_whole
from capnas.errors import CapnasError, UsageError, one_line
from capnas.layers import unfilled
from capnas.measures.probing import unwrap_model
from capnas.spaces import load_space, space_spec

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
_FORMAT, _VERSION = "capnas-model", 1
_CONV2D_SAME: type[nn.Conv2d] = import_timm("timm.layers").Conv2dSame
_FACTORS: dict[str, type[nn.Module]] = {"Conv2d": nn.Conv2d, "Conv2dSame": _CONV2D_SAME, "Linear": nn.Linear}
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class SavedModelError(CapnasError):
    """A saved model that is missing, damaged or of another version."""


def build_recipe(recipe: Mapping[str, Any], *, seed: int = 0, image_size: int | None = None, pretrained: bool = False) -> nn.Module:
    """Build the architecture of a recipe with fresh weights, on the CPU, in training mode; torch's generator is put back.

    Args:
        recipe: ``{"timm": name, "args": {...}, "image_size": ...}``, where ``args`` go to ``timm.create_model``, or ``{"space": text for
            load_space, "params": {...}, "num_classes": ..., "in_chans": ..., "image_size": ...}``.
        seed: of the weights.
        image_size: pixels instead of the recipe's: a space may choose other strides for it; timm models with fixed inputs take it.
        pretrained: with timm's own weights, as ``timm.create_model`` loads them; of a timm model only.

    Raises:
        UsageError: the recipe is neither.
        Infeasible: the space cannot build it.

    >>> build_recipe({"timm": "resnet10t", "args": {"num_classes": 3, "in_chans": 1}, "image_size": 32}).num_classes
    3
    """
    size = image_size or recipe.get("image_size")
    if isinstance(recipe.get("timm"), str):
        args = dict(recipe.get("args", {}))
        if "img_size" in args:
            args["img_size"] = size or args["img_size"]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return timm.create_model(recipe["timm"], pretrained=pretrained, **args)
    if isinstance(recipe.get("space"), str):
        shape = {"num_classes": recipe["num_classes"], "in_chans": recipe["in_chans"], "image_size": int(size or 0)}
        return build_model(load_space(recipe["space"]), recipe["params"], **shape, seed=seed)
    raise UsageError(f"a recipe names a timm model under 'timm' or a search space under 'space', got the keys {sorted(recipe)}.")


def save_model(
    model: nn.Module, folder: str | Path, recipe: Mapping[str, Any], *, extra: Mapping[str, Any] | None = None, force: bool = False
) -> Path:
    """Write a model, narrowed or not, as a folder that `load_model` reads.

    Args:
        model: built from the recipe, its modules then narrowed, widened or split into low-rank factors; only read, a compiled one as
            it was before.
        folder: is made; a folder that is there already and not empty is refused.
        recipe: ``{"timm": name, "args": {...}, "image_size": ...}`` or ``{"space": text for `capnas.load_space`, "params": {...},
            "num_classes": ..., "in_chans": ..., "image_size": ...}``; see `capnas.saved.build_recipe`.
        extra: JSON values kept in the manifest under "extra": where the model comes from, how accurate it is.
        force: write over a model saved there before; other files in the folder stay.

    Returns:
        The folder.

    Raises:
        UsageError: the folder is in use, or the recipe does not build these modules (or ties weights that differ here), so that the model
            could not be loaded again.

    >>> import tempfile
    >>> recipe = {"timm": "resnet10t", "args": {"num_classes": 3}, "image_size": 32}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_model(build_recipe(recipe), Path(folder) / "model", recipe)
    ...     load_model(saved).num_classes
    3
    """
    from safetensors.torch import save

    place = Path(folder)
    check_free(place, force=force)
    model = unwrap_model(model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    differences = _differences(model, build_recipe(recipe))
    found_anywhere = {"space": space_spec(load_space(recipe["space"]))} if "space" in recipe else {}  # a file by its absolute path
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "recipe": dict(recipe) | found_anywhere,
        **differences,
        "extra": dict(extra or {}),
    }
    again = _assemble(json.loads(_text(document)))
    built = again.state_dict()
    shapes = {name: tuple(t.shape) for name, t in built.items()}
    wrong = {name for name in shapes.keys() | state.keys() if name not in state or shapes.get(name) != tuple(state[name].shape)}
    if not wrong:
        document["dtypes"] = {name: str(t.dtype).removeprefix("torch.") for name, t in state.items() if t.dtype != built[name].dtype}
        _retype(again, document["dtypes"])
        again.load_state_dict(state)
        loaded = again.state_dict()  # differs where the recipe has one parameter and the model two
        wrong = {name for name, t in state.items() if not torch.equal(_bits(loaded[name]), _bits(t))}
    if wrong:
        raise UsageError(f"the recipe does not build this model again: {', '.join(sorted(wrong)[:5])} would differ.")
    place.mkdir(parents=True, exist_ok=True)
    text = _text({"id": hashlib.sha256(_text(document).encode()).hexdigest()[:16], **document})
    for name, content in ((WEIGHTS, save(state, {_FORMAT: text})), (MANIFEST, text)):
        write_whole(place / name, content)
    return place


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: NaN equals itself."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def check_folder(place: Path) -> None:
    """Refuse a folder for results that cannot be made or written into, before the work that they come from.

    Raises:
        UsageError: it is a file, lies below one, or nobody here may write into what there is of it.

    >>> check_folder(Path("runs/of/tomorrow"))
    """
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"{place} must be a folder or a new one, and {there} is a file; give another one.")
    try:
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError
        with tempfile.TemporaryDirectory(dir=there):  # tells what the rights do not: /proc takes no folders
            pass
    except OSError as error:
        raise UsageError(f"the folder {there} cannot be written to; make it writable, or give another one than {place}.") from error


def check_free(folder: str | Path, *, force: bool = False) -> None:
    """Refuse a folder that holds something already, unless it is a saved model that may be overwritten.

    Raises:
        UsageError: it is a file or below one, a saved model (and not ``force``), a folder of other things or not to be written to.
    """
    place = Path(folder)
    check_folder(place)
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not (place / MANIFEST).is_file():
        raise UsageError(f"{place} is not empty and holds no saved model; give a new folder.")
    if not force:
        raise UsageError(f"{place} holds a saved model already; give another folder, or force (--force) to write over it.")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a saved model: that of its weights where the file beside them, which may be edited, was saved with others.

    Raises:
        SavedModelError: there is none, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise SavedModelError(f"{folder} is not a saved model: there is no {MANIFEST} in it.")
    document = read_json(path, "the manifest of a model saved by capnas", SavedModelError)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise SavedModelError(f"{path} is not the manifest of a model saved by capnas.")
    with contextlib.suppress(OSError, SafetensorError), safe_open(Path(folder) / WEIGHTS, "pt") as weights:
        theirs = json.loads((weights.metadata() or {}).get(_FORMAT, "{}"))
        document = document if theirs.get("id") in (None, document.get("id")) else theirs
    if document.get("version") != _VERSION:
        raise SavedModelError(f"{path} has version {document.get('version')}, this capnas reads version {_VERSION}.")
    if missing := [name for name in ("recipe", "replaced", "attributes", "shapes") if not isinstance(document.get(name), dict)]:
        raise SavedModelError(f"{path} was cut or edited, it holds no {missing[0]}: save the model again.")
    return document


def load_model(folder: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a model that capnas saved: its modules from the manifest, its weights from safetensors; nothing is unpickled.

    A recipe that names a search space by file runs that file.

    Args:
        folder: written by `save_model` or ``capnas prune``.
        device: where the weights go; "auto" is CUDA where there is one.

    Returns:
        The model in eval mode. How ``capnas prune`` and ``capnas best --retrain`` prepared its images (size, channels, mean, std, a crop if
        one was told) and the names of its classes stand in ``manifest.json``, under ``extra``, ``inputs``.

    Raises:
        SavedModelError: there is no saved model, or its weights do not fit its manifest.
        UsageError: the device is not here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_manifest(folder)
    model = _assemble(manifest)
    path = Path(folder) / WEIGHTS
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SavedModelError(f"{path} does not fit its manifest: {one_line(error, 300)}") from error
    return model.to(resolve_device(str(device), float64=False)).eval()


def _assemble(manifest: Mapping[str, Any]) -> nn.Module:
    """The modules of a manifest, with fresh weights where the recipe's own shapes stay."""
    model = build_recipe(manifest["recipe"])
    for name, steps in manifest["replaced"].items():
        model.set_submodule(name, _built(steps))
    for name, attributes in manifest["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    for name, shape in manifest["shapes"].items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = torch.zeros(shape, dtype=module._buffers[leaf].dtype)  # type: ignore[union-attr]
        else:
            setattr(module, leaf, nn.Parameter(torch.zeros(shape)))
    _retype(model, manifest.get("dtypes", {}))  # absent in manifests of earlier versions, whose weights are the recipe's type
    return model


def _built(step: Any) -> nn.Module:
    """The layer of a `_step`."""
    return nn.Sequential(*map(_built, step)) if isinstance(step, list) else unfilled(_FACTORS[step["kind"]], **step["args"])


def _retype(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give the named parameters and buffers their number type."""
    for name, dtype in dtypes.items():
        owner, _, leaf = name.rpartition(".")
        module, kind = model.get_submodule(owner), getattr(torch, dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = module._buffers[leaf].to(kind)  # type: ignore[union-attr]
        else:
            getattr(module, leaf).data = getattr(module, leaf).data.to(kind)


def _differences(model: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """What must be changed on the recipe's model to get this model's modules."""
    before, now = dict(plain.named_modules()), dict(model.named_modules())
    replaced: dict[str, Any] = {}
    for name, module in now.items():
        if name and name in before and type(before[name]) is not type(module):
            standardized = type(module) in (nn.Conv2d, _CONV2D_SAME) and isinstance(before[name], nn.Conv2d)
            if isinstance(module, nn.Sequential) or standardized:
                replaced[name] = _step(name, module)
    inside = tuple(f"{n}." for n in replaced)
    attributes: dict[str, dict[str, Any]] = {}
    for name, module in now.items():
        if name in before and name not in replaced:
            _check_alike(name, module, before[name])
            old = _plain(before[name])
            changed = {k: v for k, v in _plain(module).items() if k not in old or old[k] != v}
            if changed:
                attributes[name] = changed
    mine, recipes = ({n for n, _ in m.named_modules(remove_duplicate=False)} for m in (model, plain))
    if other := sorted(n for n in mine ^ recipes if not n.startswith(inside)):
        owner = "this model" if other[0] in mine else "the recipe's model"
        raise UsageError(f"the recipe does not build this model again: only {owner} has the module {other[0]}.")
    old_shapes = {n: tuple(t.shape) for n, t in plain.state_dict().items()}
    now_shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(inside)}
    shapes = {n: list(shape) for n, shape in now_shapes.items() if old_shapes.get(n) != shape}
    return {"replaced": replaced, "attributes": attributes, "shapes": shapes}


def _check_alike(name: str, module: nn.Module, plain: nn.Module) -> None:
    """Refuse what a manifest cannot tell: a module of another class, or another text such as a padding mode.

    Raises:
        UsageError: the module computes something else than the recipe's, which its weights would not show.
    """
    kind, expected = type(module).__qualname__, type(plain).__qualname__  # by name: a space's file is executed anew
    if kind != expected:
        raise UsageError(f"the recipe does not build this model again: {name or 'it'} is a {kind}, the recipe's is a {expected}.")
    for attribute, value in vars(plain).items():
        here = vars(module).get(attribute)
        if (isinstance(value, str) or isinstance(here, str)) and here != value:
            raise UsageError(
                f"the recipe does not build this model again: {name or 'its'} {attribute} is {here!r}, the recipe's is {value!r}; "
                "a manifest holds numbers only, so change the recipe."
            )


def _plain(module: nn.Module) -> dict[str, Any]:
    """The public attributes of a module that are numbers, None or rows of whole numbers: widths, heads, groups, sizes, a momentum."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "training"
        and (
            value is None
            or isinstance(value, bool | int)
            or (isinstance(value, float) and math.isfinite(value))
            or (isinstance(value, tuple | list) and all(isinstance(v, int) for v in value))
        )
    }


def _step(name: str, part: Any) -> dict[str, Any] | list[Any]:
    """A conv or linear layer as JSON; one that was split as its parts, each of which may be split again."""
    if isinstance(part, nn.Sequential):
        return [_step(name, each) for each in part]
    if type(part) in (nn.Conv2d, _CONV2D_SAME) and part.padding_mode == "zeros":
        args = {key: getattr(part, key) for key in _CONV} | {"bias": part.bias is not None}
    elif type(part) is nn.Linear:
        args = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
    else:
        kind = type(part).__name__ + (f" padded with {part.padding_mode!r}" if type(part) is nn.Conv2d else "")
        known = "Linear and, padded with zeros, Conv2d"
        raise UsageError(f"{name} holds a {kind}, which a manifest cannot describe; it can describe {known}.")
    return {"kind": type(part).__name__, "args": args}
