"""The request of a study: its text, and what it refuses."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capnas.data import load_data
from capnas.errors import StudyError, UsageError
from capnas.objective import Objective
from capnas.objective.stopping import MedianRule
from capnas.objective.targets import WEIGHTS
from capnas.search.config import StudyConfig
from capnas.search.samplers import first_judged
from capnas.search.working import make_objective
from capnas.training import TrainConfig


def full() -> StudyConfig:
    return StudyConfig(
        space="my spaces/net.py:build", data="torch/cifar10", study='a "quoted" ä \\ 😀', trials=7, epochs=2, values=("combined", "macs"),
        weights={"saturation_evenness": 0.1, "tail_fraction": 1e-5}, max_params=10**6, max_macs=10**8, gate="saturation_mean>=0.2",
        resolutions=(28, 32), blocks=r"layer\d\.\d", sampler="nsga2", pruner="off", seed=3, storage="sqlite:////x.db", workers=2,
        device="cpu", train={"lr": 0.01, "clip_grad": 1.0, "record": True}, data_options={"download": False, "root": "x"},
        reuse=False,
    )  # fmt: skip


def test_text_round_trip() -> None:
    assert StudyConfig.from_toml(full().to_toml()) == full()
    small = StudyConfig(space="resnet")
    assert StudyConfig.from_toml(small.to_toml(), out="o").folder.name == "o"
    assert StudyConfig.from_toml(small.to_toml()).to_dict() == small.to_dict()


def test_a_setting_of_none_is_none_when_it_is_read_again() -> None:
    asked = StudyConfig(space="resnet", train={"clip_grad": None, "lr": 0.01}, data_options={"image_size": None})
    read = StudyConfig.from_toml(asked.to_toml())
    assert (read.training().clip_grad, read.data_options) == (None, {"image_size": None})
    assert read.conflicts(asked.to_dict()) == []


def test_names_and_folders() -> None:
    assert StudyConfig(space="resnet").name == "resnet-fashion-mnist-12k"
    assert StudyConfig(space="some/net.py:space", data="/x/my images/").name == "net-my-images"
    assert StudyConfig(space="resnet").folder.parts == ("runs", "resnet-fashion-mnist-12k")
    assert StudyConfig(space="resnet", values="accuracy,macs").directions == ["maximize", "minimize"]  # type: ignore[arg-type]


def test_training_takes_the_further_fields() -> None:
    train = full().training()
    assert (train.lr, train.clip_grad, train.epochs, train.seed, train.device) == (0.01, 1.0, 2, 3, "cpu")
    assert train.blocks == r"layer\d\.\d"


def test_every_setting_reaches_the_objective() -> None:
    asked = replace(full(), space="resnet", data="fashion-mnist-12k", data_options={}, gate="best:25%", pool=8)
    made = make_objective(asked, data=load_data("fashion-mnist-12k"))
    assert (made.names, made.weights) == (("combined", "macs"), {"saturation_evenness": 0.1, "tail_fraction": 1e-5})
    assert (made.limits, made.resolutions, made.stopping) == ({"params": 10**6, "macs": 10**8}, (28, 32), None)
    assert made.selection is not None
    assert (made.selection.gate.share, made.selection.pool) == (0.25, 8)
    assert made.train == asked.training()
    rule = make_objective(replace(asked, pruner="median"), data=made.data).stopping
    assert rule == MedianRule(warmup_epochs=first_judged(2) - 1)


def test_passwords_are_not_written() -> None:
    config = StudyConfig(space="resnet", storage="postgresql+psycopg2://me:se:cret@db/x")
    assert "cret" not in config.to_toml()
    assert "postgresql+psycopg2://me:***@db/x" in config.to_toml()
    assert config.conflicts(config.to_dict()) == []
    queried = StudyConfig(space="resnet", storage=(url := "postgresql://db/x?user=me&password=secret"))
    assert "secret" not in queried.to_toml()
    assert queried.conflicts(queried.to_dict() | {"storage": url}) == []  # of a study from before passwords of a query were hidden


def test_paths_are_stored_absolute_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("pictures", "fashion-mnist", "torch", "root", "resnet"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sp.py").touch()
    monkeypatch.chdir(tmp_path)

    def stored(space: str, data: str, root: str) -> tuple[str, ...]:
        plain = StudyConfig(space=space, data=data, data_options={"root": root}).to_dict()
        return tuple(str(text).replace(str(tmp_path), "HERE") for text in (plain["space"], plain["data"], plain["data_options"]["root"]))

    assert stored("sp.py", "pictures/", "root") == ("HERE/sp.py", "HERE/pictures", "HERE/root")
    assert stored("./sp.py:make", "./torch", "nowhere") == ("HERE/sp.py:make", "HERE/torch", "nowhere")
    assert stored("resnet", "fashion-mnist", "/") == ("resnet", "fashion-mnist", "/")
    assert stored("no.py", "torch/cifar10", "../x") == ("no.py", "torch/cifar10", "../x")


def test_the_file_of_a_storage_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def stored(storage: str) -> str:
        config = StudyConfig(space="resnet", storage=storage)
        assert config.differences(config.to_dict() | {"storage": storage}) == {}  # as older studies hold it
        assert config.absolute().storage == config.to_dict()["storage"]
        return config.to_dict()["storage"].replace(str(tmp_path), "HERE")

    assert stored("sqlite:///x.db") == "sqlite:///HERE/x.db"
    assert stored("sqlite+pysqlite:///./sub/x.db?timeout=9") == "sqlite+pysqlite:///HERE/sub/x.db?timeout=9"
    assert stored("../x.log") == f"{tmp_path.parent}/x.log".replace(str(tmp_path), "HERE")
    for same in ("sqlite:////x.db", "/x.log", "postgresql://me@db/x", "grpc://db:1", "sqlite:///file:x?uri=true"):
        assert stored(same) == same


def test_a_relative_path_of_an_older_study_is_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"space": "sp.py:make", "data": "pictures", "study": "s", "data_options": {"root": "root"}}
    older = StudyConfig(**given).to_dict()
    for folder in ("pictures", "root"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sp.py").touch()
    assert StudyConfig(**given).to_dict()["data"] == str(tmp_path / "pictures")
    assert StudyConfig(**given).conflicts(older) == []
    text = "data was 'pictures', now 'other'; data_options was {'root': 'root'}, now {'root': '/'}"
    assert "; ".join(StudyConfig(**given | {"data": "other", "data_options": {"root": "/"}}).conflicts(older)) == text


def test_conflicts_ignore_what_may_change() -> None:
    stored = full().to_dict()
    changed = StudyConfig.from_dict(stored | {"trials": 99, "workers": 1, "device": "auto"})
    assert changed.conflicts(stored) == []
    older = {name: value for name, value in stored.items() if name != "blocks"}
    kept = {name: value for name, value in stored.items() if name != "reuse"}
    assert StudyConfig.from_dict(kept).reuse
    assert StudyConfig.from_dict(kept).to_dict() == kept
    assert full().conflicts(kept) == []
    assert full().conflicts(older) == [r"blocks was 'not set', now 'layer\\d\\.\\d'"]
    assert StudyConfig.from_dict(stored | {"sampler": "tpe"}).conflicts(stored) == ["sampler was 'nsga2', now 'tpe'"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sampler": "tp"}, "sampler must be one of .*Did you mean 'tpe'"),
        ({"pruner": "mean"}, "pruner must be one of hyperband, median, off; got 'mean'"),
        ({"sampler": "cmaes", "values": ("accuracy", "macs")}, "sampler cmaes works with one value, got 2: use tpe"),
        ({"pruner": "hyperband", "values": ("accuracy", "macs")}, "pruner hyperband works with one value, got 2: use median or off"),
        ({"storage": "sqlite://"}, "the storage sqlite:// keeps nothing after the process ends; leave storage out, or name a file"),
        ({"storage": "sqlite:///:memory:"}, "keeps nothing after the process ends"),
        ({"storage": "sqlite+pysqlite:///file:x?mode=memory&uri=true"}, "keeps nothing after the process ends"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"max_macs": 0}, "max_macs must be at least 1, got 0"),
        ({"max_macs": "8M"}, "max_macs must be a whole number or none, got '8M'"),
        ({"max_macs": 1.5}, "max_macs must be a whole number or none, got 1.5"),
        ({"trials": 2.5}, "trials must be a whole number, got 2.5"),
        ({"workers": 1.5}, "workers must be a whole number, got 1.5"),
        ({"space": None}, "space must be a text, got None"),
        ({"study": 5}, "study must be a text or none, got 5"),
        ({"study": ""}, "study must be the name of a folder under runs/, got ''; give a name without slashes, or a folder as out"),
        ({"study": "../x"}, "study must be the name of a folder under runs/, got '../x'"),
        ({"study": "..", "out": "x"}, "study must be the name of a folder under runs/, got '..'"),
        ({"timeout": 0.0}, "timeout must be seconds, above 0, got 0.0"),
        ({"timeout": float("nan")}, "timeout must be seconds, above 0, got nan"),
        ({"stale_after": -1}, "stale_after must be seconds, at least 0, got -1"),
        ({"stale_after": float("nan")}, "stale_after must be seconds, at least 0, got nan"),
        ({"values": 5}, "values must be one or more different names, got 5"),
        ({"weights": [1]}, r"weights must be values by name or none, got \[1\]"),
        ({"train": [1]}, r"train must be values by name, got \[1\]"),
        ({"seed": "1"}, "seed must be a whole number, got '1'"),
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*32, got -1"),
        ({"seed": 2**32}, r"seed must be at least 0 and below 2\*\*32, got 4294967296"),
        ({"values": ("acc",)}, "values must be one of"),
        ({"resolutions": ()}, r"resolutions must be different sizes in pixels, got \(\)"),
        ({"resolutions": (28, 28)}, r"resolutions must be different sizes in pixels, got \(28, 28\)"),
        ({"resolutions": (28.5,)}, r"resolutions must be a list of whole numbers or none, got \(28.5,\)"),
        ({"resolutions": 28}, "resolutions must be a list of whole numbers or none, got 28"),
        ({"train": {"lrate": 1}}, "train must be one of .*got 'lrate'"),
        ({"train": {"lr": -1}}, "lr must be finite and not negative, got -1"),
        ({"train": {"blocks": "x"}}, "train must be one of .*got 'blocks'"),
        ({"blocks": "["}, r"blocks must be a regular expression, '\[' is none: unterminated character set"),
        ({"gate": "nonsense"}, "a gate is a comparison"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ],
)
def test_refuses(change: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        StudyConfig(**{"space": "resnet"} | change)


def test_what_is_as_good_is_taken() -> None:
    config = StudyConfig(space="resnet", max_macs=8e6, resolutions=[32, 28], study="team/x", out=Path("o"))  # type: ignore[arg-type]
    assert (repr(config.max_macs), config.resolutions, config.folder.parts) == ("8000000", (32, 28), ("o",))
    assert StudyConfig.from_toml(config.to_toml(), out="o") == config
    assert StudyConfig(space=Path("a") / "b.py").name == "b-fashion-mnist-12k"  # type: ignore[arg-type]


def test_numbers_of_numpy_are_stored_as_those_of_python() -> None:
    given = {"seed": np.int64(3), "max_macs": np.int64(9), "weights": {"macs": np.float64(1e-9)}, "train": {"batch_size": np.int64(16)},
             "resolutions": np.array([8, 16])}  # fmt: skip
    same = {"seed": 3, "max_macs": 9, "weights": {"macs": 1e-9}, "train": {"batch_size": 16}, "resolutions": [8, 16]}
    stored, plain = (StudyConfig(space="resnet", **settings) for settings in (given, same))
    assert (json.dumps(stored.to_dict()), stored.to_toml()) == (json.dumps(plain.to_dict()), plain.to_toml())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 9", "the study has format version 9, expected 1"),
        ("version = 1\nspase = 'x'", "hold unknown fields: spase"),
        ("version = 1", "cannot be read: .*space"),
        ("version =", "cannot be read: "),
        ("", "cannot be read: they hold no version; study.toml was cut or emptied: remove it and give the capnas search command again"),
    ],
)
def test_refuses_texts(text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        StudyConfig.from_toml(text)


def test_a_name_of_bytes_that_are_no_text_is_refused() -> None:
    with pytest.raises(UsageError, match=r"study must be text that UTF-8 can write, got 'a\\udcff'"):
        StudyConfig(space="resnet", study="a\udcff")


def test_the_defaults_are_the_same_from_python_and_from_the_command() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(Objective).parameters.items()}
    config = StudyConfig(space="resnet")
    for name in ("values", "gate", "pool", "weights", "max_params", "max_macs", "resolutions", "blocks", "seed", "device", "reuse"):
        default = WEIGHTS if name == "weights" else getattr(TrainConfig(), name) if name in ("seed", "device") else given[name]
        assert getattr(config, name) == default, name
    assert given["seed"] is given["device"] is None
    assert config.values == ("combined",)
    assert given["weights"] is None
    assert config.gate is None


def test_the_weights_of_a_sum_are_stored_with_the_study() -> None:
    assert StudyConfig(space="resnet").to_dict()["weights"] == {
        "train_loss": 1.0, "val_loss": 1.0, "init_log2_macs": 0.04, "init_capacity_score": 0.04
    }  # fmt: skip
    assert "weights" not in StudyConfig(space="resnet", values=("accuracy",)).to_dict()
    gated = StudyConfig(space="resnet", values=("accuracy",), gate="combined:best:10%")
    assert gated.to_dict()["weights"] == StudyConfig(space="resnet").to_dict()["weights"]
    assert gated.rates_capacity  # which the sum holds
    assert StudyConfig(space="resnet", values=("accuracy",), gate="combined:best:10%", weights={"init_capacity_score": 1}).rates_capacity


def test_a_sum_without_further_terms_is_stored_as_that() -> None:
    alone = StudyConfig(space="vgg", weights={})
    assert alone.to_dict()["weights"] == {}
    assert StudyConfig.from_dict(alone.to_dict()).weights == {}
    assert StudyConfig.from_toml(alone.to_toml()).weights == {}
    assert "train" not in alone.to_dict()


def test_finals_are_checked_and_stored_only_where_asked_for() -> None:
    plain = StudyConfig(space="resnet")
    assert not {"finalists", "final_epochs"} & plain.to_dict().keys()
    asked = StudyConfig(space="resnet", finalists=3, epochs=2)
    assert asked.finals_epochs == 8
    assert StudyConfig.from_toml(asked.to_toml()) == replace(asked, study=asked.name)
    assert replace(asked, final_epochs=5).finals_epochs == 5
    for given, text in (
        ({"finalists": 0}, "finalists must be a whole number of at least 1, got 0"),
        ({"finalists": 2, "final_epochs": 0}, "final_epochs must be a whole number of at least 1, got 0"),
        ({"final_epochs": 9}, "say how many"),
        ({"finalists": 2, "values": "macs,accuracy"}, "the first value must be one of accuracy"),
    ):
        with pytest.raises(UsageError, match=text):
            StudyConfig(space="resnet", **given)


def test_finals_may_be_asked_for_when_a_study_is_resumed() -> None:
    plain = StudyConfig(space="resnet")
    assert replace(plain, finalists=3).conflicts(plain.to_dict()) == []
    assert plain.conflicts(replace(plain, finalists=3, final_epochs=4).to_dict()) == []


def test_what_study_toml_cannot_hold_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"study\.toml holds texts, numbers"):
        StudyConfig(space="resnet", data_options={"augment": object()})
    assert StudyConfig(space="resnet", data_options={"root": tmp_path}).to_dict()["data_options"] == {"root": str(tmp_path)}
