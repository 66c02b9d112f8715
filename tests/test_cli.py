from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from PIL import Image
from tiny_space import FILE, images

from capnas.cli import main
from capnas.cli.app import app
from capnas.console import number
from capnas.errors import CapnasError
from capnas.scoring import SCORES
from capnas.search import StudyConfig, open_run
from capnas.search.target import open_target

Run = Callable[..., tuple[int, str, str]]
TINY = ["--train", "batch_size=16", "--pruner", "off", "--device", "cpu", "--data-option", "image_size=8", "--data-option", "augment=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 grey images of three classes as a folder of class folders."""
    root = tmp_path_factory.mktemp("images")
    x, y = images(120)
    for i, (image, label) in enumerate(zip(x, y)):
        (root / f"class{label}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"class{label}" / f"{i:04d}.png")
    return root


@pytest.fixture(scope="module")
def study(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.raises(SystemExit) as done:
        main(["search", FILE, "--data", str(folder), "--trials", "3e0", "--epochs", "1e0", "--out", str(out), "--seed", "1", *TINY])
    assert not done.value.code
    return out


def test_a_shell_completes_commands_and_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_CAPNAS_COMPLETE", "complete_bash")
    for words, found in (("capnas pr", "profile prune"), ("capnas search --sam", "--sampler")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
        code, out, err = run()
        assert (code, out.split(), err) == (0, found.split(), "")


def test_search_leaves_the_files_of_a_run(study: Path) -> None:
    assert {"study.toml", "journal.log", "environment.json", "trials.csv"} <= {p.name for p in study.iterdir()}
    assert len((study / "trials.csv").read_text().splitlines()) == 4


def test_the_same_command_resumes_and_a_finished_study_says_so(run: Run, study: Path, folder: Path) -> None:
    same = ["search", FILE, "--data", folder, "--epochs", "1", "--out", study, "--seed", "1", *TINY]
    code, _, err = run(*same, "--trials", "3")
    assert code == 0
    assert "already finished (3 trials)" in err
    code, out, _ = run(*same, "--trials", "4", "--json")
    assert code == 0
    assert json.loads(out)["finished"] == 4
    code, _, err = run(*same[: -len(TINY)], "--seed", "2", "--trials", "4", *TINY)
    assert code == 2
    assert re.search(r"^error: .*seed", err, re.MULTILINE)


def test_a_search_whose_time_is_up_says_how_to_go_on(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ["search", FILE, "--data", folder, "--epochs", "1", "--trials", "2", "--out", tmp_path / "run", *TINY]
    code, _, err = run(*words, "--timeout", "0.01")
    assert code == 0
    assert "Time is up with 1 of 2 trials finished. Go on with: " in err
    code, out, err = run(*words, "--timeout", "600", "--json")
    assert json.loads(out)["finished"] == 2
    assert "Time is up" not in err


def test_report_best_and_profile_of_a_run(run: Run, study: Path, tmp_path: Path) -> None:
    code, out, _ = run("report", study)
    assert code == 0
    assert "## Best" in out
    code, out, _ = run("report", study, "--html", tmp_path / "page.html", "--json")
    assert json.loads(out)["study"]["finished"] >= 3
    assert (tmp_path / "page.html").stat().st_size > 10_000
    code, out, _ = run("best", study, "--json")
    document = json.loads(out)
    assert set(document["params"]) == {"width", "depth", "kind"}
    code, out, _ = run("profile", f"{study}:{document['trial']}")
    assert code == 0
    assert "saturation" in out


def test_an_interrupt_says_how_to_resume_and_resuming_keeps_what_was_finished(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ["search", FILE, "--data", str(folder), "--trials", "400", "--epochs", "1", "--out", str(tmp_path / "run"), *TINY]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "capnas", *words]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, preexec_fn=listen
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("[2/400]"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, line + err
    told = re.search(r"Interrupted with (\d+) of 400 trials finished. Resume with: python -m capnas (.*)", err)
    assert told is not None, err
    assert shlex.split(told[2]) == words
    assert "Traceback" not in err
    finished = int(told[1])
    assert 2 <= finished < 400
    words[words.index("400")] = str(finished + 1)
    code, out, _ = run(*words, "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["finished_before"], document["finished"]) == (finished, finished + 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("start", ["runpy.run_module('capnas', run_name='__main__')", "{script}"])
def test_an_interrupt_while_capnas_is_imported_is_one_word(number: signal.Signals, start: str, tmp_path: Path) -> None:
    metadata = pytest.importorskip("tomllib").loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, function = metadata["scripts"]["capnas"].split(":")
    (tmp_path / "typer.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(5)\n")  # the first slow import
    code = start.format(script=f"from {module} import {function}; {function}()")
    command = [sys.executable, "-c", f"import runpy, signal, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['capnas', '--help']\n"
               f"signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interrupt_in_a_text_that_is_run_ends_with_the_same_status(tmp_path: Path) -> None:
    text = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    (tmp_path / "typer.py").write_text(f"exec({text!r})\n")  # the first slow import
    done = subprocess.run(
        [sys.executable, "-m", "capnas", "--help"], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_worker_joins_by_folder_or_by_storage(run: Run, folder: Path, tmp_path: Path) -> None:
    import optuna

    url = f"sqlite:///{tmp_path / 'studies.db'}"
    words = ["search", FILE, "--data", folder, "--epochs", "1", "--study", "shared", "--storage", url, "--out", tmp_path / "run", *TINY]
    assert run(*words, "--trials", "1")[0] == 0
    code, out, _ = run("worker", tmp_path / "run", "--json")
    assert (code, json.loads(out)) == (0, {"study": "shared", "ran": 0})
    study = optuna.load_study(study_name="shared", storage=url)
    study.set_user_attr("capnas:config", study.user_attrs["capnas:config"] | {"trials": 3})
    code, out, _ = run("worker", "shared", "--storage", url, "--json")
    assert (code, json.loads(out)["ran"]) == (0, 2)
    code, _, err = run("worker", "other", "--storage", url)
    assert code == 2
    assert "no study of capnas named other" in err


def test_finals_that_are_owed_are_told_by_every_command_that_goes_by_them(run: Run, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    assert run("search", FILE, "--data", folder, "--epochs", "1", "--out", place, *TINY, "--trials", "1")[0] == 0
    config = open_run(place).config
    (place / "study.toml").write_text(dataclasses.replace(config, finalists=1).to_toml(), encoding="utf-8")
    owed = "1 finalist is still to be trained: give the search command again."
    for words in (("worker", place), ("best", place), ("report", place)):
        assert owed in run(*words)[1]
        _, out, err = run(*words, "--json")
        assert owed in err
        assert json.loads(out).get("finals_left", 1) == 1
    assert owed not in run("best", place, "--trial", 0)[1]
    with pytest.warns(UserWarning, match=owed):
        open_target(f"{place}:best")


def test_the_list_of_spaces_is_one_document_whatever_a_space_prints(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> Any:
            print("a plugin says hello")
            return len

    monkeypatch.setattr("capnas.spaces._entry_points", lambda: {"loud": Point()})
    code, out, err = run("spaces", "--json")
    assert (code, "loud" in json.loads(out), "hello" in err) == (0, True, True)


def test_best_writes_a_script_that_needs_no_capnas(run: Run, study: Path, tmp_path: Path) -> None:
    script = tmp_path / "best.py"
    code, out, _ = run("best", study, "--code", script, "--json")
    assert code == 0
    wanted = json.loads(out)["n_params"]
    alone = f"import runpy, sys; sys.modules['capnas'] = None; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"parameters: {wanted}," in done.stdout


def test_settings_of_a_search_arrive_in_the_library(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[StudyConfig, Any]] = []

    def record(config: StudyConfig, *, enqueue: Any, **tell: Any) -> None:
        asked.append((config, enqueue))
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.search.run_study", record)
    (tmp_path / "first.json").write_text('[{"width": 4}]')
    given = {"data": "noise", "trials": 7, "epochs": 4, "max_macs": 9000, "max_params": 800, "gate": "naswot:best:20%", "pool": 12,
             "blocks": "layer.*", "sampler": "nsga2", "pruner": "off", "seed": 3, "storage": "sqlite:///s.db", "study": "name",
             "out": "here", "workers": 2, "device": "cpu"}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--values", "combined, macs", "--weights", "macs=1e-9", "--resolutions", "8,16", "--no-reuse", "--train", "lr=0.5"]
    words += ["--data-option", "image_size=8", "--enqueue", tmp_path / "first.json"]
    for more in (words, []):
        assert run("search", "vgg", *more)[2].splitlines()[-1] == "error: enough"
    (config, first), (plain, nothing) = asked
    assert config == StudyConfig(
        space="vgg", values=("combined", "macs"), weights={"macs": 1e-9}, resolutions=(8, 16), reuse=False, train={"lr": 0.5},
        data_options={"image_size": 8}, **given,  # type: ignore[arg-type]
    )  # fmt: skip
    assert (plain, first, nothing) == (StudyConfig(space="vgg"), [{"width": 4}], [])


def test_a_trial_and_its_retraining_are_those_asked_for(run: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, dict[str, Any]]] = []

    def record(found: Any, **settings: Any) -> None:
        asked.append((found.number, settings))
        raise CapnasError("enough")

    monkeypatch.setattr("capnas.search.trials.retrain_trial", record)
    for trial in (0, 1):
        words = ["best", study, "--trial", trial, "--retrain", "--epochs", 7, "--seed", 5, "--device", "cpu"]
        assert run(*words)[2].splitlines()[-1] == "error: enough"
    assert [n for n, _ in asked] == [0, 1]
    assert [asked[0][1][name] for name in ("epochs", "seed", "device")] == [7, 5, "cpu"]


@pytest.mark.parametrize("words", [["--epochs", "20"], ["--seed", "0"]])
def test_settings_of_a_retraining_that_is_not_asked_for_are_refused(run: Run, study: Path, words: list[str]) -> None:
    code, out, err = run("best", study, *words)
    assert (code, out) == (2, "")
    assert err == "error: --epochs and --seed are those of --retrain: give it as well, or leave them out.\n"


def test_a_run_that_cannot_be_written_to_is_not_retrained(run: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.search.trials.retrain", lambda *given, **more: pytest.fail("trained for nothing"))
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    code, out, err = run("best", study, "--retrain", "--epochs", 9, "--device", "cpu")
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert f"the folder {study} cannot be written to" in err


def test_retrain_evaluates_once_on_test(run: Run, study: Path) -> None:
    code, out, err = run("best", study, "--retrain", "--epochs", "2", "--device", "cpu", "--json")
    assert code == 0, err
    retrained = json.loads(out)["retrained"]
    assert 0 <= retrained["test_accuracy"] <= 1
    assert len(re.findall("epoch ./2", err)) == 2
    code, out, err = run("prune", retrained["model"], "--target-macs", "0.5", "--round-to", "1", "--dry-run", "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["target"] == retrained["model"]


@pytest.mark.parametrize(
    ("words", "says"),
    [(["search", "resnt"], "Did you mean 'resnet'"), (["search", "resnet", "--values", "acuracy"], "Did you mean 'accuracy'"),
     (["search", "resnet", "--max-macs", "8Q"], "8Q"), (["search", "resnet", "--sampler", "tpee"], "Did you mean 'tpe'"),
     (["search", "resnet", "--data", "nowhere/at/all", "--out", "runs/x"], "nowhere/at/all"), (["profile", "resnet81"], "resnet"),
     (["report", "no-such-run"], "no-such-run"), (["best", "no-such-run"], "no-such-run"), (["serch"], "serch"),
     (["search"], "space"), (["search", "resnet", "--weights", "saturation_evenness=much"], "much"),
     (["search", "resnet", "--device", "cuda:77"], "cuda")],
)  # fmt: skip
def test_errors_of_use_are_one_line_and_exit_2(
    run: Run, words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2, err
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in out + err


def test_debug_shows_the_traceback(run: Run) -> None:
    code, _, err = run("search", "resnt", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_spaces_and_version(run: Run) -> None:
    code, out, _ = run("spaces", "--json")
    assert code == 0
    assert {"resnet", "mbconv", "nasbench201"} <= set(json.dumps(json.loads(out)).replace('"', " ").replace(":", " ").split())
    assert run("--version")[1].strip().endswith("0.1.0")


def test_every_score_is_listed(run: Run) -> None:
    code, out, _ = run("scores", "--json")
    found = {row["score"]: row for row in json.loads(out)}
    assert (code, list(found)) == (0, list(SCORES))
    assert found["tail_fraction"]["direction"] == "minimize"
    assert [found[name]["measure"] for name in ("rank_mean", "complexity", "coverage", "naswot", "capacity_slack")] == [
        "saturation", "structure", "capacity", "proxies", "training"]  # fmt: skip
    code, out, err = run("scores")
    assert code == 0
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line.split()}
    assert shown["saturation_evenness"].startswith("higher 0 to 1 saturation 1 - Gini")
    assert shown["macs"].startswith("lower from 0 structure multiply-accumulates")
    assert shown["synflow"].startswith("higher any proxies baseline")
    assert "--values accuracy,NAME" in err


def test_every_whole_number_of_a_command_is_written_alike() -> None:
    seen = set()
    for command in app.registered_commands:
        assert command.callback is not None
        for name, kind in get_type_hints(command.callback, include_extras=True).items():
            plain, *options = get_args(kind) if hasattr(kind, "__metadata__") else (kind,)
            if int in (plain, *get_args(plain)):
                parse = options[0].parser
                assert (parse("1e1"), parse("10"), parse("2k")) == (10, 10, 2000)
                if name == "seed" and command.callback.__name__ != "search":  # StudyConfig tells it for a search
                    with pytest.raises(typer.BadParameter, match=r"a seed must be at least 0 and below 2\*\*32, got -1"):
                        parse("-1")
                else:
                    assert parse("-1") == -1
                seen.add(f"{command.callback.__name__} {name}")
    assert {"search trials", "search epochs", "search max_macs", "best trial", "prune calibration", "resolution budget"} <= seen


@pytest.mark.parametrize(("option", "text"), [("--trials", "1.5"), ("--epochs", "two"), ("--pool", "1e-1"), ("--seed", "inf")])
def test_what_is_no_whole_number_is_said_with_its_option(run: Run, option: str, text: str) -> None:
    code, _, err = run("search", FILE, option, text)
    assert code == 2
    says = f"error: Invalid value for '{option}': a whole number is written like 8000000, 8e6, 8M or 300k, got '{text}'."
    assert err.splitlines() == [f"{says} See capnas --help."]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8e6", 8_000_000),
        ("8M", 8_000_000),
        ("300k", 300_000),
        ("1.5G", 1_500_000_000),
        ("42", 42),
        ("-3", -3),
        ("12345678901234567891", 12345678901234567891),
    ],
)
def test_numbers(text: str, value: int) -> None:
    assert number(text) == value


@pytest.mark.parametrize(("run", "redirection", "code"), [("", ">&-", 0), ("nope", "2>&-", 2)])
def test_a_closed_stream_does_not_change_how_a_command_ends(run: str, redirection: str, code: int, study: Path) -> None:
    words = shlex.join([sys.executable, "-m", "capnas", "report", run or str(study), "--json"])
    assert subprocess.run(f"{words} {redirection}", shell=True, check=False, capture_output=True).returncode == code


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "capnas", "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0
    assert "search" in done.stdout


def test_an_unknown_option_is_told_in_whole_sentences(run: Run) -> None:
    assert run("search", FILE, "--zzz")[2].splitlines() == ["error: No such option: --zzz. See capnas --help."]
