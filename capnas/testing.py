"""The conformance test for search spaces: run it on your own space before you search it."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from capnas.candidates import Candidate, Infeasible, build_candidate, build_model
from capnas.errors import CapnasError, SpaceError, counted, described
from capnas.measures.probing import seeded
from capnas.spaces import load_space, space_name

_GLOBAL_SEEDS = (11, 12, 13)  # under which a space must make the same model of the same parameters
_Breach = tuple[str, str]  # rule, what was seen


@dataclass(frozen=True, kw_only=True)
class SpaceReport:
    """What `check_space` saw of a space that keeps the rules.

    Attributes:
        name: of the space.
        draws: number of draws: all decisions lowest, all highest, and the random ones.
        feasible: how many of them gave a model.
        reasons: why the others did not, without repetition.
        distinct: number of different architectures among the feasible draws.
        n_params: smallest and largest number of parameters.
        macs: smallest and largest number of multiply-accumulates for one image.
    """

    name: str
    draws: int
    feasible: int
    reasons: tuple[str, ...]
    distinct: int
    n_params: tuple[int, int]
    macs: tuple[int, int]


def check_space(
    space: str | Callable[..., Any], *, num_classes: int = 10, in_chans: int = 3, image_size: int = 32, draws: int = 8, seed: int = 0
) -> SpaceReport:
    """Check that a search space keeps the rules that searching, resuming and rebuilding rely on.

    Two extreme draws (every decision the lowest or first, every decision the highest or last, following conditional decisions as they come
    up) and ``draws`` random ones are built on the meta device, run, rebuilt from their parameters, and checked:

    - the model maps (B, in_chans, image_size, image_size) to (B, num_classes), in a real forward and backward pass too (at the extremes and
      the first random draw), and gradients reach a parameter;
    - ``FixedTrial(params)`` gives the same architecture again, also when the parameters went through JSON and whatever the global seeds;
    - the same seed gives the same weights;
    - the space leaves the generators of Python and NumPy alone (torch's is put back by whoever builds);
    - a draw that cannot be built raises ``optuna.TrialPruned`` with a reason, and at least half of the random draws can be built.

    Args:
        space: whatever `capnas.spaces.load_space` takes.
        num_classes: outputs of the models.
        in_chans: channels of the images.
        image_size: their side in pixels.
        draws: number of random draws; less than 1 is 1.
        seed: of the random draws.

    Raises:
        SpaceError: naming every rule that is broken, with the parameters of the first draw that breaks it.

    >>> report = check_space("vgg", in_chans=1, image_size=28, draws=2)
    >>> report.draws, report.feasible, report.n_params[0] < report.n_params[1]
    (4, 4, True)
    """
    loaded, draws = load_space(space), max(1, draws)
    sizes = {"num_classes": num_classes, "in_chans": in_chans, "image_size": image_size}
    broken: dict[str, str] = {}
    reasons: list[str] = []
    found: list[tuple[int, Candidate]] = []
    for place, pick in enumerate(["lowest", "highest", *["random"] * draws]):
        trial = draw(pick, seed + place)
        try:
            with _alone(broken, f"the {pick} draw"):
                candidate = build_candidate(loaded, trial, **sizes)
        except Infeasible as error:
            if not isinstance(error.__cause__, optuna.TrialPruned):
                _note(broken, "a draw that cannot be built must raise optuna.TrialPruned", f"{error}; {dict(trial.params)}")
            elif not str(error.__cause__).strip():
                _note(broken, "optuna.TrialPruned needs a reason", str(dict(trial.params)))
            reasons.append(str(error))
        except SpaceError as error:
            _note(broken, "the space must return a model of the right output", str(error))
        except Exception as error:
            _note(broken, "building must not fail", f"{type(error).__name__}: {error}; {dict(trial.params)}")
        else:
            found.append((place, candidate))
            breach = _rebuilding(loaded, candidate, sizes) or (_running(loaded, candidate, sizes) if place <= 2 else None)
            if breach is not None:
                _note(broken, *breach)
    feasible = sum(place >= 2 for place, _ in found)
    if not broken and 2 * feasible < draws:
        _note(broken, "at least half of the random draws must be feasible", f"{feasible} of {draws} are; reasons: {sorted(set(reasons))}")
    if broken:
        texts = " | ".join(f"{rule}: {detail}" for rule, detail in broken.items())
        raise SpaceError(f"the space {space_name(loaded)!r} breaks {counted(len(broken), 'rule')}: {texts}")
    candidates = [candidate for _, candidate in found]
    return SpaceReport(
        name=space_name(loaded),
        draws=2 + draws,
        feasible=len(found),
        reasons=tuple(dict.fromkeys(reasons)),
        distinct=len({c.hash for c in candidates}),
        n_params=(min(c.n_params for c in candidates), max(c.n_params for c in candidates)),
        macs=(min(c.macs for c in candidates), max(c.macs for c in candidates)),
    )


class _Picker(optuna.samplers.BaseSampler):
    """Answers every question with an end of its range, or at random."""

    def __init__(self, pick: str, seed: int) -> None:
        self.pick = pick
        self.random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        end = 0 if self.pick == "lowest" else -1
        if self.pick == "random":
            return self.random.sample_independent(study, trial, param_name, param_distribution)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[end]
        assert isinstance(param_distribution, (FloatDistribution, IntDistribution))
        return (param_distribution.low, param_distribution.high)[end]


def draw(pick: str, seed: int, known: Mapping[str, Any] | None = None) -> optuna.Trial:
    """A trial of no stored study, whose decisions, but for those known, are all the "lowest" or first, the "highest" or last, or "random".

    >>> draw("lowest", 0, {"width": 4}).suggest_int("width", 1, 8)
    4
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # not a line for each draw
    try:
        study = optuna.create_study(sampler=_Picker(pick, seed))
        study.enqueue_trial(dict(known or {}))
        return study.ask()
    finally:
        optuna.logging.set_verbosity(verbosity)


def _rebuilding(space: Callable[..., Any], candidate: Candidate, sizes: dict[str, int]) -> _Breach | None:
    """Params -> JSON -> params -> the same architecture, under several global seeds."""
    rule = "the parameters must be JSON-safe"
    try:
        params = json.loads(json.dumps(candidate.params, allow_nan=False))
    except (TypeError, ValueError) as error:
        return rule, f"{error}; {candidate.params}"
    if params != candidate.params:
        return rule, f"{candidate.params} comes back as {params}"
    rule = "the same parameters must give the same architecture"
    for seed in _GLOBAL_SEEDS:
        try:
            with seeded(seed):
                again = build_candidate(space, optuna.trial.FixedTrial(params), **sizes)
        except CapnasError as error:
            return rule, f"a rebuild fails: {error}; {params}"
        if (again.hash, again.n_params, again.params) != (candidate.hash, candidate.n_params, params):
            return rule, f"a rebuild differs (does the space use a global generator, or remember earlier calls?); {params}"
    return None


def _running(space: Callable[..., Any], candidate: Candidate, sizes: dict[str, int]) -> _Breach | None:
    """Real weights: the same seed twice, one forward pass, one backward pass."""
    where = str(candidate.params)
    rule = "the real model must be the one that was counted"
    try:
        model, again = (build_model(space, candidate.params, **sizes, seed=0) for _ in range(2))
    except CapnasError as error:
        return rule, f"building it fails: {error}; {where}"
    one, two = model.state_dict(), again.state_dict()
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in two.items()}:
        return rule, f"two builds have different weights; {where}"
    if (n_params := sum(p.numel() for p in model.parameters())) != candidate.n_params:
        return rule, f"it has {n_params} parameters, {candidate.n_params} were counted; {where}"
    if differ := [name for name in one if not torch.equal(one[name], two[name])]:
        return "the same seed must give the same weights", f"{', '.join(differ[:3])} differ; {where}"
    rule = "a real forward and backward pass must work"
    images = torch.randn(2, sizes["in_chans"], *2 * [sizes["image_size"]], generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]):
            logits = model.train()(images)
            torch.nn.functional.cross_entropy(logits, torch.zeros(2, dtype=torch.long)).backward()
    except Exception as error:
        return rule, f"{described(error, None)}; {where}"
    if tuple(logits.shape) != (2, sizes["num_classes"]):
        return rule, f"2 images give an output of shape {tuple(logits.shape)}; {where}"
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()):
        return rule, f"no parameter gets a gradient; {where}"
    return None


@contextlib.contextmanager
def _alone(broken: dict[str, str], where: str) -> Iterator[None]:
    before = random.getstate(), _numpy_state()
    numpy = np.random.get_state()
    try:
        yield
    finally:
        for name, old, new in zip(("random", "numpy.random"), before, (random.getstate(), _numpy_state()), strict=True):
            if old != new:
                _note(broken, "the space must not draw from global generators", f"{name} was used in {where}")
        random.setstate(before[0])
        np.random.set_state(numpy)


def _numpy_state() -> str:
    return repr([part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()])


def _note(broken: dict[str, str], rule: str, detail: str) -> None:
    """Remember the first breach of a rule."""
    broken.setdefault(rule, detail)
