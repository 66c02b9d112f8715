"""Gates as pure rules: bounds, shares, and the text that asks for them."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from capnas.errors import UsageError
from capnas.objective.gates import RANKED_BY, BestShare, Bound, Measured, Standing, best_share, parse_gate


def measured(score: float, *costs: float, key: str | None = None) -> Measured:
    return Measured(key=(key or repr((score, costs)), 32), score=score, costs=costs)


def test_a_share_trains_the_best_and_as_many_as_it_says() -> None:
    gate = BestShare(name="naswot", share=0.1)
    scores = random.Random(0).sample(range(1000), 95)
    seen = [measured(s) for s in scores]
    passing = [s for s in scores if gate.passes(gate.standing(measured(s), seen))]
    assert sorted(passing) == sorted(scores)[-10:]  # fewer than 9.5 are better than the tenth, not than the eleventh
    seventh = BestShare(name="naswot", share=0.07)  # times 100 more than 7, as floats are rounded
    assert [seventh.passes(Standing(better=better, rivals=100)) for better in (6, 7)] == [True, False]


def test_the_first_and_every_record_pass_and_equals_pass_together() -> None:
    gate = BestShare(name="naswot", share=0.01)
    assert gate.passes(gate.standing(measured(-5), []))
    assert gate.passes(gate.standing(measured(3), [measured(1), measured(2)]))
    assert not gate.passes(gate.standing(measured(1.5), [measured(1), measured(2)]))
    assert gate.passes(gate.standing(measured(2, key="a"), [measured(2, key="b"), measured(2, key="c")]))


def test_an_architecture_counts_once_and_is_not_its_own_rival() -> None:
    gate = BestShare(name="naswot", share=0.5)
    again = [measured(9, key="x")] * 5 + [measured(1, key="y")] * 3
    place = gate.standing(measured(5, key="y"), again)
    assert (place.better, place.rivals, place.share) == (1, 2, 0.5)
    assert not gate.passes(place)


def test_without_a_score_nobody_passes_and_nobody_is_beaten() -> None:
    gate = BestShare(name="naswot", share=1.0)
    assert not gate.passes(gate.standing(measured(math.nan), []))
    assert gate.passes(gate.standing(measured(-math.inf), []))
    assert gate.standing(measured(1), [measured(math.nan)]).better == 0


def test_with_costs_only_what_costs_no_more_is_a_rival() -> None:
    gate = BestShare(name="naswot", share=0.4)
    seen = [measured(10, 100, 5), measured(9, 50, 7), measured(8, 40, 4)]
    assert gate.passes(gate.standing(measured(1, 30, 9), seen))  # the cheapest in the first cost
    assert gate.standing(measured(1, 60, 9), seen).better == 2
    assert gate.standing(measured(1, 60, 6), seen).better == 1
    assert gate.standing(measured(1, 40, 4), seen).better == 1  # who costs the same is a rival


def test_a_strict_bound_shuts_at_its_limit_and_the_other_opens() -> None:
    shut = {sign: Bound(name="rank_mean", compare=sign, limit=0.5).refusal({"rank_mean": 0.5}) for sign in (">", "<", ">=", "<=")}
    assert shut[">"] == "rank_mean before training is 0.5, the gate asks for > 0.5"
    assert shut["<"] is not None
    assert shut[">="] is shut["<="] is None


@pytest.mark.parametrize("text", ["best:10%", " best : 10 % ", "best=0.1", "best:.1"])
def test_ways_to_ask_for_the_best_tenth(text: str) -> None:
    (gate,) = parse_gate(text)
    assert gate == BestShare(name=RANKED_BY, share=0.1)


def test_shares_and_bounds_together() -> None:
    gates = parse_gate("saturation_mean > 0.1, tail_fraction:best:25%")
    assert gates == (Bound(name="saturation_mean", compare=">", limit=0.1), BestShare(name="tail_fraction", share=0.25))
    assert best_share(gates) == gates[1]
    assert best_share(gates[:1]) is None
    assert parse_gate(None) == parse_gate("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "a gate is a comparison like saturation_evenness>=0.5 or a share like best:10%, got 'best'"),
        ("best:0%", r"the gate best needs a share above 0 and at most 1 \(100%\), got 0%"),
        ("best:10", r"the gate best needs a share above 0 and at most 1 \(100%\), got 10\."),
        ("best:ten", "the gate best needs a share like 10% or 0.1, got 'ten'"),
        ("naswott:best:10%", "gate has no 'naswott' among its .*Did you mean 'naswot'"),
        ("capacity_slack:best:10%", "gate has no 'capacity_slack' among its"),
        ("combined>=0.5", "the gate takes combined as a share only, combined:best:10%"),
        ("best:10%,naswot:best:5%", "a gate takes one share, got 'best:10%,naswot:best:5%'"),
        ("naswot>=nan", "the gate on naswot needs a number, got 'nan'"),
        ({"naswot": math.nan}, "the gate on naswot needs a number, got 'nan'"),
        (["best:10%"], r"a gate is a text like best:10% or .*, or bounds by score, got \['best:10%'\]"),
        (0.1, r"a gate is a text like best:10% or .*, or bounds by score, got 0\.1"),
    ],
)
def test_refuses(text: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_gate(text)
