"""From a profile to named scores, each with a direction, a range and a meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from capnas.documents import or_nan
from capnas.errors import UsageError, check_names
from capnas.measures import evenness
from capnas.profile import LayerProfile, Profile

Direction = Literal["maximize", "minimize"]
Statistic = Callable[[Iterable[float | None]], float]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One named number of a profile.

    Attributes:
        name: key in `SCORES` and in the mapping that `score` returns.
        direction: which way is better in a search.
        low: smallest value, or minus infinity.
        high: largest value, or infinity.
        meaning: one line for users.
        compute: the function of a profile; NaN where the profile lacks what it needs.
    """

    name: str
    direction: Direction
    low: float
    high: float
    meaning: str
    compute: Callable[[Profile], float]

    def oriented(self, value: float) -> float:
        """The value with higher meaning better."""
        return value if self.direction == "maximize" else -value


def _over(profile: Profile, *, reading: str, column: Callable[[LayerProfile], float | None], statistic: Statistic) -> float:
    return statistic([column(row) for row in profile.reading(reading)])  # type: ignore[arg-type]


def _saturation(row: LayerProfile) -> float | None:
    return row.saturation


def _saturation90(row: LayerProfile) -> float | None:
    return (row.saturations or {}).get("0.9")


def _rank_share(row: LayerProfile) -> float | None:
    return None if row.effective_rank is None else row.effective_rank / row.width


_PER_LAYER: tuple[tuple[str, Direction, float, Callable[[LayerProfile], float | None], Statistic, str], ...] = (
    ("saturation_mean", "maximize", 1, _saturation, evenness.mean, "mean saturation over {}: use of the width; cannot rank alone"),
    ("saturation_evenness", "maximize", 1, _saturation, evenness.evenness, "1 - Gini of saturation over {}: 1 when all work alike"),
    ("saturation_variation", "minimize", math.inf, _saturation, evenness.coefficient_of_variation,
     "coefficient of variation of saturation over {}: 0 when even"),
    ("tail_fraction", "minimize", 1, _saturation, evenness.tail_fraction,
     "share of trailing {} below a quarter of the largest saturation: where the work stops early"),
    ("saturation90_mean", "maximize", 1, _saturation90, evenness.mean, "mean over {} of saturation at threshold 0.9"),
    ("rank_mean", "maximize", 1, _rank_share, evenness.mean, "mean effective rank over width of {}: a saturation without a threshold"),
)  # fmt: skip


_CAPACITY: tuple[tuple[str, str], ...] = (
    ("capacity_balance", "capacity lies where the parameters are, 1 - half the summed share difference (ours, after Donier)"),
    ("depth_evenness", "effective number of blocks that hold the capacity, over their number (ours, after Donier)"),
    ("coverage", "effective share of the image that capacity reaches (ours, after Donier)"),
    ("propagation", "neither linear nor shattered: gradients differ between inputs, but not wholly (ours, after Donier)"),
    ("scaling", "residual branches together as strong as the stream, as depth to the power -1/2 gives (ours, after Donier)"),
    ("usage", "independent constraints per parameter (ours, after Donier)"),
    ("capacity_slack", "share of the a-priori class of weights that a short training left unused (ours, a proxy of excess capacity)"),
)
COSTS = ("params", "macs")  # known of every candidate, measured or not
SIZES = tuple(f"log2_{name}" for name in COSTS)  # so are these scores
_BASELINES = ("synflow", "naswot", "zico", "snip", "grad_norm")

# Weights of `capacity_score`, for every space: rounded from fits on three published benchmarks; the last term and its weight were chosen on
# spaces whose blocks differ in size (NAS-Bench-Macro, timm, `mbconv`), see results/ranking.
CAPACITY_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"block_saturation_evenness": 6.0, "saturation90_mean": 2.0, "dimension": 0.5, "shortest_depth": -0.02, "block_log2_activations": 1.0}
)

_NETWORK: tuple[tuple[str, Direction, float, str], ...] = (
    ("complexity", "maximize", 0,
     "C of the layer algebra, bits: how finely the network can cut its input (after Badias & Banerjee, reconstructed)"),
    ("log2_paths", "maximize", -math.inf, "log2 of the paths from input to an output unit, the layer algebra's K (reconstructed)"),
    ("log2_gain", "maximize", -math.inf, "log2_paths with an average over n values counted at its gain 1/n instead of n paths (ours)"),
    ("shortest_depth", "minimize", 0, "weight layers on the shortest path: deep without shortcuts, gradients shatter (ours)"),
    ("intrinsic_power", "minimize", -math.inf,
     "log2 of the layer algebra's P: less is more compression on the way (after Badias & Banerjee, reconstructed)"),
    ("log10_lipschitz", "minimize", -math.inf,
     "log10 of the product of the operator norms of layers and batch norms; other norms left out"),
    ("synflow", "maximize", -math.inf, "baseline: log synaptic flow (Tanaka et al., 2020)"),
    ("naswot", "maximize", 0, "baseline: log-determinant of activation overlaps (Mellor et al., 2021)"),
    ("zico", "maximize", -math.inf, "baseline: inverse variation of gradients (Li et al., 2023)"),
    ("snip", "maximize", 0, "baseline: connection sensitivity (Lee et al., 2019)"),
    ("grad_norm", "maximize", 0, "baseline: sum of the layers' gradient norms (Abdelfattah et al., 2021)"),
    ("params", "minimize", 0, "parameters of the network, shared ones once: a cost"),
    ("macs", "minimize", 0, "multiply-accumulates of one image: a cost"),
)  # fmt: skip


def _dimension(profile: Profile) -> float:
    k = [row.width * or_nan(_saturation90(row)) for row in profile.layers if row.saturations]  # unknown in one, unknown in all
    return math.log2(1 + sum(k)) if k else math.nan


def _params_in_use(profile: Profile) -> float:
    layers = [(row.params, share) for row in profile.layers if (share := _saturation90(row)) is not None and math.isfinite(share)]
    total = sum(params for params, _ in layers)
    return sum(params * share for params, share in layers) / total if total else math.nan


def _activations(profile: Profile, *, blocks: Callable[[list[int]], float]) -> float:
    values = [row.width * row.positions for row in profile.blocks if row.positions is not None]
    return blocks(values) if values else math.nan


def _capacity_score(profile: Profile) -> float:
    return sum(weight * SCORES[name].compute(profile) for name, weight in CAPACITY_WEIGHTS.items())


def _log2_of_network(profile: Profile, *, name: str) -> float:
    value = profile.network.get(name)
    return math.log2(value) if value else math.nan


def _of_network(profile: Profile, *, name: str) -> float:
    return or_nan(profile.network.get(name))


def _table() -> Mapping[str, Score]:
    rows = [
        Score(name=prefix + name, direction=direction, low=0, high=high, meaning=meaning.format(of),
              compute=partial(_over, reading=reading, column=column, statistic=statistic))
        for reading, prefix, of in (("modules", "", "layers"), ("blocks", "block_", "blocks"))
        for name, direction, high, column, statistic, meaning in _PER_LAYER
    ]  # fmt: skip
    rows += [
        Score(name=name, direction="maximize", low=low, high=high, meaning=meaning, compute=compute)
        for name, low, high, compute, meaning in (
            ("capacity_score", -math.inf, math.inf, _capacity_score,
             "rank of an untrained network: even and high use of width, dimensions, shortcuts, room behind each block (ours)"),
            ("params_in_use", 0, 1, _params_in_use,
             "share of the layers' parameters in use: saturation at threshold 0.9, each layer counted by its parameters (ours)"),
            ("dimension", 0, math.inf, _dimension, "log2 of 1 + the dimensions that hold 90 % of the variance, summed over layers"),
            ("block_log2_activations", 0, math.inf, partial(_activations, blocks=lambda n: math.fsum(map(math.log2, n)) / len(n)),
             "mean over blocks of log2 of the numbers that each hands on for one image, positions times width: its room (ours)"),
            ("log2_activations", 0, math.inf, partial(_activations, blocks=lambda n: math.log2(sum(n))),
             "log2 of the numbers that all blocks hand on for one image, which is mostly those of the largest maps (ours)"),
        )
    ]  # fmt: skip
    rows += [
        Score(name=name, direction="maximize", low=0, high=1, meaning=meaning, compute=partial(_of_network, name=name))
        for name, meaning in _CAPACITY
    ]
    rows += [
        Score(name=name, direction=direction, low=low, high=math.inf, meaning=meaning, compute=partial(_of_network, name=name))
        for name, direction, low, meaning in _NETWORK
    ]
    rows += [
        Score(name=f"log2_{name}", direction="maximize", low=0, high=math.inf, meaning=f"baseline: log2 of {meaning}, the size alone",
              compute=partial(_log2_of_network, name=name))
        for name, meaning in (("params", "the parameters"), ("macs", "the multiply-accumulates of one image"))
    ]  # fmt: skip
    return MappingProxyType({row.name: row for row in rows})


SCORES: Mapping[str, Score] = _table()
PROFILED = tuple(name for name in SCORES if name not in COSTS)  # what only a profile tells


def sizes(costs: Mapping[str, float]) -> dict[str, float]:
    """The scores of size alone, which need no look at the network: log2 of each of `COSTS`, NaN of none.

    >>> sizes({"params": 1024, "macs": 0})
    {'log2_params': 10.0, 'log2_macs': nan}
    """
    return {size: math.log2(costs[name]) if costs[name] else math.nan for size, name in zip(SIZES, COSTS)}


def measures_for(names: Iterable[str]) -> tuple[str, ...]:
    """The measures of `capnas.profile.profile_model` that the named scores need; "saturation" always.

    >>> measures_for(["saturation_mean", "naswot", "coverage"])
    ('saturation', 'capacity', 'proxies')
    """
    wanted = set(names)
    needs = {
        "structure": ("capacity_score", "complexity", "log2_paths", "log2_gain", "shortest_depth", "intrinsic_power", "log2_params",
                      "log2_macs", *COSTS),
        "norms": ("log10_lipschitz",),
        "capacity": tuple(name for name, _ in _CAPACITY if name != "capacity_slack"),
        "proxies": _BASELINES,
    }  # fmt: skip
    return ("saturation", *(measure for measure, scores in needs.items() if wanted & set(scores)))


def measure_of(name: str) -> str:
    """Where a score comes from: the measure of a profile that it needs, or "training" where only a training tells it.

    >>> measure_of("coverage"), measure_of("rank_mean"), measure_of("capacity_slack")
    ('capacity', 'saturation', 'training')
    """
    return "training" if name == "capacity_slack" else measures_for([name])[-1]


def score(profile: Profile, names: str | Sequence[str] | None = None) -> dict[str, float]:
    """Scores of a profile by name.

    Args:
        profile: from `profile_model`, from training or read back from a trial.
        names: which scores, or one; all when absent.

    Returns:
        Name to value, NaN where the profile lacks what a score needs.

    Raises:
        UsageError: an unknown name, or what is no profile.

    >>> import torch
    >>> from capnas.profile import profile_model
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> 0 < score(profile_model(model, torch.randn(64, 4)), ["saturation_evenness"])["saturation_evenness"] <= 1
    True
    """
    if not isinstance(profile, Profile):
        raise UsageError(f"score takes a profile, got {type(profile).__name__}: capnas.profile_model(model, inputs) gives one.")
    chosen = list(SCORES) if names is None else [names] if isinstance(names, str) else list(names)
    check_names("score", chosen, SCORES)
    return {name: float(SCORES[name].compute(profile)) for name in chosen}
