"""The looked-up searches of results/search, on a table that is made up here."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from capnas.search_spaces import nasbench201
from scripts import module_of

from capnas.scoring import CAPACITY_WEIGHTS

SCRIPT = Path(__file__).resolve().parents[2] / "results" / "search" / "tabular.py"
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def tabular() -> ModuleType:
    return module_of(SCRIPT)


@pytest.fixture(scope="module")
def table(tabular: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sixty cells whose accuracy after 12 and 200 epochs and whose scores have one order."""
    folder, chance = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    drawn = ({key: str(chance.choice(nasbench201.OPERATIONS)) for key in tabular.KEYS} for _ in range(60))
    cells = list(dict.fromkeys(map(nasbench201.architecture_string, drawn)))
    numbers = np.linspace(50, 90, len(cells))
    known = {"arch": cells, "unique": range(len(cells)), "c10_12": numbers, "c10_200": numbers + 5, "c10_naswot": numbers}
    pd.DataFrame(known | {"c10_logsynflow": numbers}).to_csv(folder / "nasbench201_cifar10_dev.csv.gz", index=False)
    terms = {*CAPACITY_WEIGHTS, *(name.removeprefix("init_") for name in tabular.WEIGHTS)}
    rows = [{"arch": arch, "seconds": 0.5, "n_macs": 1e6, "scores": dict.fromkeys(terms, number)} for arch, number in zip(cells, numbers)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tabular.Table(folder, tabular.read(folder / "scores.jsonl"))


@pytest.mark.parametrize("method", ["random", "TPE", "successive halving", "TPE started by synflow", "capnas: gate + combined"])
def test_a_search_looks_its_trainings_up_and_names_its_best_cell(tabular: ModuleType, table: Any, method: str) -> None:
    few = {"gate": "best:50%", "pool": 8} if "gate" in method else {}
    found = tabular.optuna_search(table, 0, **tabular.METHODS[method] | {"budget": 4} | few)
    assert 1 <= len(found.trained) <= len(table.rows)
    least = tabular.POOL if "synflow" in method else few.get("pool", 0)
    assert found.scored >= least
    assert (found.scored > 0) == (least > 0)
    regrets = [point[-1] for point in found.track]
    assert regrets == sorted(regrets, reverse=True)
    best = max(table.rows[unique]["c10_200"] for unique in found.trained)
    assert regrets[-1] == pytest.approx(table.best - best, abs=1e-3)


def test_evolution_pays_for_a_class_once(tabular: ModuleType, table: Any) -> None:
    found = tabular.evolution(table, 0, budget=6, population=4, sample=2)
    assert found.training == pytest.approx(sum(table.rows[unique]["training"] for unique in found.trained))
    assert found.track[-1][-1] <= found.track[0][-1]
