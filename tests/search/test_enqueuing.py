"""Studies that begin with architectures that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from test_search import config, data, home  # noqa: F401
from tiny_space import FILE, space
from torch import nn

from capnas.data import ImageData
from capnas.errors import StudyError, UsageError
from capnas.objective.evaluation import ATTRIBUTE, Evaluation
from capnas.search import RunResult, open_run, run_study
from capnas.search.enqueuing import ENQUEUED, check_parameters, enqueue_new, read_parameters, unasked

KNOWN = [{"width": 6, "depth": 3, "kind": "plain"}, {"width": 2, "depth": 1, "kind": "bad"}]


def drawn(result: RunResult) -> list[dict[str, Any]]:
    return [t.params for t in result.study.get_trials()]


def test_known_architectures_come_first_and_once(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    first = run_study(config(tmp_path, trials=1), space=space, data=data, enqueue=KNOWN)
    assert drawn(first) == [KNOWN[0], {}]
    for trials in (3, 4):
        result = run_study(config(tmp_path, trials=trials), space=space, data=data, enqueue=[*KNOWN, KNOWN[0]])
        assert result.n_finished == trials
    assert drawn(result)[:2] == KNOWN
    assert [ENQUEUED in t.user_attrs for t in result.study.get_trials()] == [True, True, False, False]


def test_one_given_twice_is_enqueued_once() -> None:
    study = optuna.create_study()
    assert enqueue_new(study, [KNOWN[0], KNOWN[0], KNOWN[1]]) == 2
    assert len(study.get_trials()) == 2


def test_what_a_sampler_drew_already_is_not_enqueued(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    before = drawn(run_study(config(tmp_path, trials=2), space=space, data=data))
    assert drawn(run_study(config(tmp_path, trials=3), space=space, data=data, enqueue=[*before, KNOWN[0]])) == [*before, KNOWN[0]]


def test_one_that_was_interrupted_is_enqueued_again(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    def interrupting(trial: Any, **shape: int) -> nn.Module:
        if isinstance(trial, optuna.Trial) and ENQUEUED in trial.user_attrs:
            raise KeyboardInterrupt
        return space(trial, **shape)

    assert run_study(config(tmp_path, trials=1), space=interrupting, data=data, enqueue=KNOWN[:1]).interrupted
    result = run_study(config(tmp_path, trials=1), space=space, data=data, enqueue=KNOWN[:1])
    assert [t.state for t in result.study.get_trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    assert drawn(result)[1] == KNOWN[0]


def test_a_study_that_never_began_keeps_no_queue(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    url = f"sqlite:///{tmp_path}/study.db"
    for storage in (None, url):
        with pytest.raises(UsageError, match="full-matches the block pattern 'stage'"):
            run_study(config(tmp_path / "run", blocks="stage", storage=storage), space=space, data=data, enqueue=KNOWN)
        assert not (tmp_path / "run").exists()
    assert drawn(run_study(config(tmp_path / "run", trials=1, storage=url), space=space, data=data, enqueue=KNOWN[1:])) == KNOWN[1:]


def test_enqueued_trials_that_fail_in_a_row_end_the_study(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    def failing(trial: Any, **shape: int) -> nn.Module:
        raise LookupError("no luck")

    known = [{"width": width} for width in (2, 4, 6, 8)]
    with pytest.raises(StudyError, match="3 trials in a row ended in an error"):
        run_study(config(tmp_path, trials=9), space=failing, data=data, enqueue=known)
    assert open_run(tmp_path).n_finished == 3


def test_a_name_that_the_space_does_not_ask_for_is_told(tmp_path: Path, data: ImageData) -> None:  # noqa: F811
    with pytest.warns(UserWarning, match=r"^trial 0 was enqueued with dpth, which the space does not ask for\.$"):
        result = run_study(config(tmp_path, trials=2), space=space, data=data, enqueue=[{"width": 2, "depth": 1, "dpth": 3}])
    assert drawn(result)[0].items() >= {"width": 2, "depth": 1}.items()


@pytest.mark.parametrize(
    ("entry", "says"),
    [({"kind": "odd"}, r"parameter 'kind': 'odd' not in \('plain', 'bad'\)"), ({"width": None}, "parameter 'width': 'None' is not a valid"),
     ({"image_size": 9}, r"'9' not in \(8, 12\)")],
)  # fmt: skip
def test_an_entry_that_cannot_be_meant_is_told_before_any_trial(tmp_path: Path, data: ImageData, entry: Any, says: str) -> None:  # noqa: F811
    one = config(tmp_path / "run", resolutions=(8, 12), trials=1)
    for before in (0, 1):
        with pytest.raises(UsageError, match=r"^entry 2 to enqueue, \{.*\}, cannot be tried: .*" + says):
            run_study(replace(one, trials=9), space=space, data=data, enqueue=[KNOWN[1], entry])
        assert (tmp_path / "run").exists() == before
        assert len(drawn(run_study(one, space=space, data=data))) == 1


@pytest.mark.parametrize(
    ("status", "names"), [("over_budget", ["depth", "width"]), ("infeasible", []), ("failed", []), ("interrupted", [])]
)
def test_what_ended_while_it_was_built_may_not_have_asked_for_all(status: str, names: list[str]) -> None:
    attributes = {ENQUEUED: {"width": 4, "depth": 1}, ATTRIBUTE: Evaluation(status=status).to_dict()}
    assert unasked(optuna.trial.create_trial(state=TrialState.PRUNED, user_attrs=attributes)) == names


def test_two_workers_share_the_queue(tmp_path: Path, home: Path) -> None:  # noqa: F811
    known = [*KNOWN, {"width": 8, "depth": 2, "kind": "bad"}]
    settings = config(tmp_path / "run", space=FILE, data=str(home / "images"), trials=4, workers=2,
                      data_options={"image_size": 8, "in_chans": 1})  # fmt: skip
    trials = run_study(settings, enqueue=known).study.get_trials()
    assert [t.params for t in trials[:3]] == known
    assert sum(ENQUEUED in t.user_attrs for t in trials) == 3
    assert open_run(tmp_path / "run").n_finished == 4


@pytest.mark.parametrize(
    ("document", "found"),
    [(KNOWN, KNOWN), ({"study": "s", "trial": 3, "params": KNOWN[0]}, KNOWN[:1]), ([{"params": KNOWN[0], "values": {}}, KNOWN[1]], KNOWN)],
)
def test_a_file_of_parameters(tmp_path: Path, document: object, found: object) -> None:
    (tmp_path / "known.json").write_text(json.dumps(document))
    assert read_parameters(tmp_path / "known.json") == found


@pytest.mark.parametrize(
    ("text", "says"),
    [("[", "known.json is not JSON: Expecting value"), ("[]", "known.json lists no parameters to enqueue; expected a list like"),
     ('{"width": 2}', "lists no parameters to enqueue; expected a list like"), ("3", "lists no parameters to enqueue; expected"),
     ("[3]", "known.json holds no parameters; expected a list like"), ('[{"width": 2}, {}]', "entry 2 of "),
     ('[{"width": [2]}]', """what capnas best --json prints, got {'width': [2]}.""")],
)  # fmt: skip
def test_a_file_of_something_else_is_one_line(run: Any, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "known.json").write_text(text)
    code, out, err = run("search", FILE, "--out", tmp_path / "run", "--enqueue", tmp_path / "known.json")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert says in err
    assert not (tmp_path / "run").exists()


def test_none_is_a_value_and_a_number_of_numpy_is_one_of_python() -> None:
    (found,) = check_parameters([{"norm": None, "width": np.int64(4)}])
    assert json.dumps(found) == '{"norm": null, "width": 4}'


def test_a_file_that_is_not_there_is_one_line(run: Any, tmp_path: Path) -> None:
    code, _, err = run("search", FILE, "--out", tmp_path / "run", "--enqueue", tmp_path / "no.json")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {tmp_path / 'no.json'} cannot be read: No such file or directory; expected parameters to enqueue: a")
