"""Excess capacity of a network on a task: train it, tighten constraints on its layers over a grid, keep those that hold the error.

The procedure of Graf, Zeng, Rieck, Niethammer, Kwitt, "On Measuring Excess Capacity in Neural Networks" (NeurIPS 2022, arXiv 2202.08070).
The paper's: the network class (no norm layers, no biases, fixed classifier, torch's initialization), the two constraints per layer
(Lipschitz constant and (2,1) distance to initialization), projected SGD by Dykstra's algorithm, the bounds. Ours: constraints relative to
the unconstrained run of the same seed, the tolerance, the staircase that spares settings tighter than one that failed, and constraints
that hold exactly at the end.

It costs a training per setting and seed. `capnas.measures.slack` is the cheap stand-in for a search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from capnas.data import ImageData
from capnas.devices import resolve_device
from capnas.documents import json_text, read_json, write_whole
from capnas.errors import StudyError, UsageError
from capnas.excess.composition import from_json, to_json
from capnas.excess.network import Limits, paper_network
from capnas.excess.reading import BOUNDS, HOLDS, Hold, Reading, Sample, Setting, holds, read, rise
from capnas.excess.training import LayerState, Recipe, Run, every_image, train_run
from capnas.measures.guessing import no_better_than_a_guess

__all__ = [
    "BOUNDS", "DISTANCES", "HOLDS", "LIPSCHITZ", "ExcessStudy", "Hold", "LayerState", "Reading", "Recipe", "Run", "Setting",
    "excess_capacity", "read_study",
]  # fmt: skip

LIPSCHITZ = (1.0, 0.7, 0.5, 0.35)
DISTANCES = (1.0, 0.5, 0.25, 0.125)
HEADER, RUNS = "study.json", "runs.jsonl"
_KEPT = {"model", "data", "sample", "recipe", "grid", "seeds", "removed_norms", "composition"}
_LATER = ("chance", "labelling")  # what headers of older studies do not hold


@dataclass(frozen=True, kw_only=True)
class ExcessStudy:
    """The runs of one network on one task.

    Attributes:
        header: what was asked for, in plain JSON types: model, data, what a guess gets on it, a hash of its labels, sample, recipe, grid,
            composition of the network.
        runs: all of them, the unconstrained ones first.
    """

    header: dict[str, Any]
    runs: tuple[Run, ...]

    def read(self, *, tolerance: float = 0.01, hold: Hold = "validation") -> Reading:
        """Excess capacity at this tolerance, see `capnas.excess.reading.read`; nothing is trained."""
        stages, sample = from_json(self.header["composition"]), Sample(**self.header["sample"])
        runs = [run for run in self.runs if run.seed in self.header["seeds"]]
        return read(runs, stages, sample, [(a, b) for a, b in self.header["grid"]], tolerance=tolerance, hold=hold)

    @property
    def chance(self) -> float:
        """Accuracy of a guess on validation: the share of the commonest class, or of one class where the study did not keep that."""
        return float(self.header.get("chance") or 1 / self.header["data"]["num_classes"])

    @property
    def at_chance(self) -> bool:
        """Whether the unconstrained networks, mean over seeds, are no better than a guess on validation, see `no_better_than_a_guess`.

        Their validation error then holds under any constraint, and the decades found so mean nothing.
        """
        errors = [run.validation_error for run in self.runs if run.lipschitz is None and run.seed in self.header["seeds"]]
        images = self.header["data"]["sizes"]["validation"]
        return bool(errors) and no_better_than_a_guess(1 - math.fsum(errors) / len(errors), chance=self.chance, images=images)

    def layers(self, setting: Setting | None = None) -> list[dict[str, Any]]:
        """One row per layer, means over seeds: s and b of the unconstrained runs, and in a setting their limits and what was reached."""
        seeds = self.header["seeds"]
        free = [run for run in self.runs if run.lipschitz is None and run.seed in seeds]
        asked = setting and (setting.lipschitz, setting.distance)
        tight = [run for run in self.runs if (run.lipschitz, run.distance) == asked and run.seed in seeds]
        rows = []
        for i, state in enumerate(free[0].layers):
            row = {"name": state.name, "weights": state.weights, "norm": _mean(free, i, "norm"), "distance": _mean(free, i, "distance")}
            row |= {"norm_start": _mean(free, i, "norm_start"), "radius": _mean(free, i, "radius")}
            row |= {"norm_limit": _mean(tight, i, "norm_limit"), "norm_reached": _mean(tight, i, "norm")}
            rows.append(row | {"distance_limit": _mean(tight, i, "distance_limit"), "distance_reached": _mean(tight, i, "distance")})
        return rows


def _mean(runs: Sequence[Run], layer: int, what: str) -> float | None:
    values = [getattr(run.layers[layer], what) for run in runs]
    return None if not values or None in values else math.fsum(values) / len(values)


def excess_capacity(
    model: nn.Module,
    data: ImageData,
    *,
    lipschitz: Sequence[float] = LIPSCHITZ,
    distance: Sequence[float] = DISTANCES,
    seeds: Sequence[int] = (0, 1, 2),
    recipe: Recipe | None = None,
    tolerance: float = 0.01,
    hold: Hold = "validation",
    full_grid: bool = False,
    image_size: int | None = None,
    device: str = "auto",
    name: str = "",
    out: str | Path | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> ExcessStudy:
    """Train the unconstrained network and the grid of constrained ones; ``.read()`` of the result gives the excess capacity.

    Args:
        model: a plain or residual convolutional network; only its architecture counts, see `capnas.excess.network.paper_network`.
        data: images; the test split stays closed.
        lipschitz: factors in (0, 1] on the norm of each layer in the unconstrained run of the same seed.
        distance: factors in (0, 1] on its distance to initialization. The grid is every pair but (1, 1).
        seeds: of weights and shuffling; results are means over them.
        recipe: how every network is trained.
        tolerance: rise of the error that still counts as holding it, a share of images. Only matters here to the settings that are spared.
        hold: "validation", "train" or "both".
        full_grid: train also the settings that are tighter, in both constraints, than one that failed.
        image_size: in pixels, where it is not the data's.
        device: "auto", "cpu", "cuda", ...
        name: of the model, for reports.
        out: folder that keeps every run as it ends; the same call goes on where it stopped.
        on_start: called once before the first training, with the number of runs that `out` holds already and of those that there can be at
            most: settings that are spared are among these.
        on_run: called with every run that was trained.

    Raises:
        UsageError: a network that the theorem does not cover, or an argument out of range.
        StudyError: `out` holds another study; the unconstrained network learnt nothing.
    """
    recipe, size = recipe or Recipe(), image_size or data.image_size
    grid = _grid(lipschitz, distance)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different numbers, at least one, got {list(seeds)}.")
    holds([], tolerance=tolerance, hold=hold)

    def fresh(seed: int) -> Any:
        return paper_network(model, **data.shape(size), seed=seed)

    network = fresh(seeds[0])
    header = {
        "model": name or type(model).__name__,
        "data": {"name": data.name, "image_size": size, "in_chans": data.in_chans, "num_classes": data.num_classes, "sizes": data.sizes},
        "chance": data.guess,
        "labelling": data.digest["labels"],
        "sample": asdict(_sample(data, size)),
        "recipe": asdict(recipe),
        "grid": [list(pair) for pair in grid],
        "seeds": list(seeds),
        "removed_norms": list(network.removed),
        "composition": to_json(network.stages),
    }
    header = json.loads(json.dumps(header))
    store = None if out is None else Path(out)
    runs = [] if store is None else _open(store, header)
    asked_for = [(seed, *pair) for seed in seeds for pair in ((None, None), *grid)]
    there = len({(r.seed, r.lipschitz, r.distance) for r in runs} & set(asked_for))
    kept = len(runs)

    def run(seed: int, factors: tuple[float, float] | None, limits: dict[str, Limits] | None) -> Run:
        asked = factors or (None, None)
        known = next((r for r in runs if r.seed == seed and (r.lipschitz, r.distance) == asked), None)
        if known is not None:
            return known
        if len(runs) == kept:
            resolve_device(device)  # its error comes before any word of a start
            if on_start is not None:
                on_start(there, len(asked_for))
        done = train_run(fresh(seed), data, limits=limits, factors=factors, recipe=recipe, seed=seed, device=device, image_size=image_size)
        runs.append(done)
        if store is not None:
            with (store / RUNS).open("a", encoding="utf-8") as file:
                file.write(json_text(done.to_dict(), indent=None))
        if on_run is not None:
            on_run(done)
        return done

    free = {seed: run(seed, None, None) for seed in seeds}
    study = ExcessStudy(header=header, runs=tuple(runs))
    study.read()  # an unconstrained network that learnt nothing ends the study here
    failed: list[tuple[float, float]] = []
    for pair in grid:
        if not full_grid and any(a >= pair[0] and b >= pair[1] for a, b in failed):
            continue
        rises = [rise(run(seed, pair, _limits(free[seed], *pair)), free[seed]) for seed in seeds]
        if not holds(rises, tolerance=tolerance, hold=hold):
            failed.append(pair)
    return ExcessStudy(header=header, runs=tuple(runs))


def read_study(folder: str | Path) -> ExcessStudy:
    """The study that `excess_capacity` left in a folder, as far as it came.

    Raises:
        StudyError: there is none, or its files are damaged.
    """
    folder = Path(folder)
    header = read_json(folder / HEADER, "the settings of an excess-capacity study", StudyError)
    if not isinstance(header, dict) or not header.keys() >= _KEPT:
        raise StudyError(f"{folder} holds no excess-capacity study: its {HEADER} is another document.")
    lines = (folder / RUNS).read_text(encoding="utf-8", errors="replace").splitlines() if (folder / RUNS).is_file() else []
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            runs.append(Run.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise StudyError(f"{folder / RUNS}, line {number}, is damaged: {error}.") from error
    return ExcessStudy(header=header, runs=tuple(runs))  # a last line that was cut off is trained again


def _grid(lipschitz: Sequence[float], distance: Sequence[float]) -> list[tuple[float, float]]:
    for what, factors in (("lipschitz", lipschitz), ("distance", distance)):
        if not factors or not all(0 < f <= 1 for f in factors):
            raise UsageError(f"{what} takes factors in (0, 1], at least one, got {list(factors)}.")
    ordered = [sorted(set(map(float, factors)), reverse=True) for factors in (lipschitz, distance)]
    pairs = [(a, b) for a in ordered[0] for b in ordered[1] if (a, b) != (1.0, 1.0)]
    if not pairs:
        raise UsageError("the grid needs a factor below 1; got 1 for both constraints.")
    return pairs


def _limits(free: Run, lipschitz: float, distance: float) -> dict[str, Limits]:
    return {s.name: Limits(norm=lipschitz * s.norm, distance=distance * s.distance) for s in free.layers}


def _sample(data: ImageData, image_size: int) -> Sample:
    squares = [float(x.double().square().sum()) for x, _ in every_image(data, "train", "cpu", image_size)]
    return Sample(data_norm=math.sqrt(math.fsum(squares)), samples=data.sizes["train"])


def _alike(one: Any, other: Any) -> bool:
    """Whether settings are the same, up to the last digits of a number: those of a sum over images follow from threads and machine."""
    if isinstance(one, float):
        return isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-9)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _open(folder: Path, header: dict[str, Any]) -> list[Run]:
    """The runs that are there, after a check that they are of the same study."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / HEADER).exists():
        write_whole(folder / HEADER, json_text(header))
        return []
    found = read_study(folder)
    known = {key for key in header if key in found.header or key not in _LATER} - {"grid", "seeds"}  # a study may be widened
    differ = [key for key in header if key in known and not _alike(header[key], found.header.get(key))]
    if differ:
        raise StudyError(f"{folder} holds a study with another {', '.join(differ)}; give a new folder or the options of that study.")
    write_whole(folder / HEADER, json_text(header))
    write_whole(folder / RUNS, "".join(json_text(r.to_dict(), indent=None) for r in found.runs))  # without a cut-off line
    return list(found.runs)
