"""Gates: who is trained after a look at the untrained network.

A bound, ``saturation_evenness>=0.5``, judges each candidate alone. A share, ``best:10%``, judges it among all candidates seen so far,
which needs no scale: a candidate is trained if fewer than a tenth of them score better. Drawing and measuring is nearly free beside
training, so a pool of candidates drawn ahead gives the first trainings a choice as well (`capnas.objective.pool`). A share goes by one
score, or by what a summed value knows before training: ``combined:best:10%``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from capnas.documents import or_nan
from capnas.errors import UsageError, check_name
from capnas.scoring import PROFILED, SCORES

UNTRAINED = tuple(name for name in PROFILED if name != "capacity_slack")  # which is a score of a training
SUMS = ("combined", "principled")  # values that are weighted sums; before training a share goes by their terms that are known then
RANKED_BY = "capacity_score"  # of ``best:10%``, where no score is named
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_BOUND = r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*"
_BEST = r"\s*(?:(\w+)\s*:\s*)?best\s*[:=]\s*([^%\s]+)\s*(%?)\s*"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A bound on one score of the structure before training."""

    name: str
    compare: str
    limit: float

    def refusal(self, scores: Mapping[str, float | None]) -> str | None:
        """Why the gate stays shut, or None; a score that is not finite does not pass."""
        value = or_nan(scores.get(self.name))
        if _COMPARE[self.compare](value, self.limit):
            return None
        return f"{self.name} before training is {value:.4g}, the gate asks for {self.compare} {self.limit:g}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A candidate as a share sees it.

    Attributes:
        key: of its architecture: two trials of one architecture are one candidate.
        score: higher is better.
        costs: lower is better; the costs among the search's values, in their order.
    """

    key: tuple[str | None, int | None]
    score: float
    costs: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Place of a candidate: how many of how many score better; the candidate itself is among the ``rivals``. Without a score it is last."""

    better: int
    rivals: int

    @property
    def share(self) -> float:
        """In [0, 1]: 0 for the best, 1 without a score."""
        return self.better / self.rivals


@dataclass(frozen=True, kw_only=True)
class BestShare:
    """Passes a candidate of which fewer than ``share`` of all candidates seen so far score better.

    With several values a candidate is compared with those that cost no more in each cost among them, as `capnas.objective.stopping`
    does: a small network need not score as high as a large one. The cheapest so far has no rivals and passes.

    Example:
        >>> gate = BestShare(name="naswot", share=0.25)
        >>> seen = [Measured(key=(str(i), 32), score=float(i)) for i in range(7)]
        >>> [gate.passes(gate.standing(Measured(key=("new", 32), score=s), seen)) for s in (9.0, 5.5, 4.5)]
        [True, True, False]
    """

    name: str
    share: float

    def standing(self, candidate: Measured, seen: Iterable[Measured]) -> Standing:
        """The candidate's place among those seen that cost no more, each architecture counted once."""
        others = (m for m in seen if m.key != candidate.key)
        rivals = {m.key: m.score for m in others if all(t <= o for t, o in zip(m.costs, candidate.costs, strict=True))}
        if math.isnan(candidate.score):
            return Standing(better=len(rivals) + 1, rivals=len(rivals) + 1)
        return Standing(better=sum(score > candidate.score for score in rivals.values()), rivals=len(rivals) + 1)

    def passes(self, standing: Standing) -> bool:
        """Whether a candidate of this place is trained."""
        return standing.share < self.share  # not better < share * rivals: 0.07 * 100 is above 7


def parse_gate(gate: str | Mapping[str, float] | None) -> tuple[Bound | BestShare, ...]:
    """Gates from text or from a mapping of scores to bounds in their good direction.

    Text is a list with commas of bounds, ``saturation_evenness>=0.5``, and at most one share, ``best:10%`` (by `RANKED_BY`) or
    ``naswot:best:10%`` (by the score named, or by the terms of ``combined`` or ``principled`` that are known before training);
    ``best=0.1`` is the same.

    Raises:
        UsageError: text that is neither, an unknown score, a bound that is no number, a share outside (0, 1], or two shares.

    Example:
        >>> parse_gate({"tail_fraction": 0.3}) == parse_gate("tail_fraction <= 0.3")
        True
        >>> parse_gate("naswot:best:10%, saturation_mean>0.1")
        (BestShare(name='naswot', share=0.1), Bound(name='saturation_mean', compare='>', limit=0.1))
    """
    if gate is None or gate == "":
        return ()
    if isinstance(gate, Mapping):
        good = {name: ">=" if name in SCORES and SCORES[name].direction == "maximize" else "<=" for name in gate}
        return tuple(_bound(name, good[name], str(limit)) for name, limit in gate.items())
    if not isinstance(gate, str):
        raise UsageError(f"a gate is a text like best:10% or saturation_evenness>=0.5, or bounds by score, got {gate!r}.")
    gates = tuple(_gate(part) for part in gate.split(","))
    if sum(isinstance(g, BestShare) for g in gates) > 1:
        raise UsageError(f"a gate takes one share, got {gate!r}: rank candidates by one score and use bounds for others.")
    return gates


def best_share(gates: Iterable[Bound | BestShare]) -> BestShare | None:
    """The share among gates, or None."""
    return next((gate for gate in gates if isinstance(gate, BestShare)), None)


def _gate(text: str) -> Bound | BestShare:
    if match := re.fullmatch(_BEST, text):
        return _best(match[1] or RANKED_BY, match[2], match[3])
    if match := re.fullmatch(_BOUND, text):
        return _bound(match[1], match[2], match[3])
    raise UsageError(f"a gate is a comparison like saturation_evenness>=0.5 or a share like best:10%, got {text.strip()!r}.")


def _best(name: str, text: str, percent: str) -> BestShare:
    share = _float(text, f"the gate best needs a share like 10% or 0.1, got {text + percent!r}.") / (100 if percent else 1)
    if not 0 < share <= 1:
        raise UsageError(f"the gate best needs a share above 0 and at most 1 (100%), got {text + percent}.")
    return BestShare(name=_known(name, SUMS), share=share)


def _bound(name: str, compare: str, text: str) -> Bound:
    if name in SUMS:
        raise UsageError(f"the gate takes {name} as a share only, {name}:best:10%: its scale before training is not that of the value.")
    _known(name)
    limit = _float(text, message := f"the gate on {name} needs a number, got {text!r}.")
    if math.isnan(limit):  # nothing would ever pass
        raise UsageError(message)
    return Bound(name=name, compare=compare, limit=limit)


def _known(name: str, sums: tuple[str, ...] = ()) -> str:
    check_name("gate", name, (*sums, *UNTRAINED))
    return name


def _float(text: str, message: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(message) from None
