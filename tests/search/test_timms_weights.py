"""The weights that timm has for its models, from a hub's cache on the disk: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_space import write_images

import capnas
from capnas._timm import timm
from capnas.errors import UsageError
from capnas.search.inspection import inspect_target
from capnas.search.target import open_target

Run = Callable[..., tuple[int, str, str]]
NAME = "test_resnet"
SHORT = ("--calibration", 32, "--device", "cpu", "--image-size", 32)


@pytest.fixture(autouse=True)
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights of 1,000 classes, where the hub's own code finds them."""
    from huggingface_hub import constants

    torch.manual_seed(5)
    state = timm.create_model(NAME, pretrained=False).state_dict()
    place = tmp_path / "hub" / f"models--{timm.get_pretrained_cfg(NAME).hf_hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, place / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def test_images_of_the_same_classes_meet_the_weights_as_they_are(known: dict[str, torch.Tensor]) -> None:
    labels = np.arange(3000) % 1000
    images = capnas.load_data((np.random.default_rng(0).integers(0, 256, (3000, 4, 4, 3), dtype=np.uint8), labels))
    found = open_target(NAME, data=images, pretrained=True)
    assert (found.trained, found.pretrained) == (True, True)
    model = found.build()
    assert not model.training
    assert all(torch.equal(value, known[name]) for name, value in model.state_dict().items())
    fresh = found.build(trained=False)
    assert fresh.training
    assert not torch.equal(fresh.fc.weight, known["fc.weight"])


def test_images_are_read_as_the_weights_expect_them_unless_said_otherwise(folder: Path, known: dict[str, torch.Tensor]) -> None:
    found = open_target(NAME, data=str(folder), pretrained=True)
    assert (found.image_size, found.data.image_size, found.data.in_chans) == (160, 160, 3)
    assert (found.data.mean, found.data.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    x, _ = found.data.probe(4)
    first = {round(float(i.sum())) for i in x}
    by_timm = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(NAME).to_dict()))
    assert first <= {round(float(by_timm(Image.open(p).convert("RGB")).sum())) for p in folder.glob("*/*.png")}
    assert not found.trained  # other classes
    model = found.build()
    assert torch.equal(model.conv1[0].weight, known["conv1.0.weight"])
    assert model.fc.out_features == found.data.num_classes
    grey = {"in_chans": 1, "mean": (0.2,), "std": (0.3,)}
    own = open_target(NAME, data=str(folder), image_size=16, data_options=grey, pretrained=True)
    assert (own.image_size, own.data.in_chans, own.data.mean) == (16, 1, (0.2,))


def test_a_profile_is_of_these_weights(folder: Path, known: dict[str, torch.Tensor]) -> None:
    found = inspect_target(NAME, data=str(folder), image_size=32, batch=16, measures=("norms",), pretrained=True)
    assert found.state.startswith("timm's weights, the head fresh, 16 images of")
    assert found.profile.mode == "eval"
    target = open_target(NAME, data=str(folder), image_size=32, data_options={"in_chans": 3})
    by_hand = timm.create_model(NAME, num_classes=target.data.num_classes).eval()
    by_hand.load_state_dict({name: value for name, value in known.items() if not name.startswith("fc.")}, strict=False)
    expected = capnas.profile_model(by_hand, torch.zeros(2, 3, 32, 32), measures=("norms",), mode="eval")
    norms = {row.name: row.norm for row in expected.layers if row.name != "fc"}
    assert len(norms) > 5
    assert {row.name: row.norm for row in found.profile.layers if row.name != "fc"} == pytest.approx(norms)


def test_a_network_with_a_fresh_head_is_narrowed_once_it_is_trained(run: Run, folder: Path, tmp_path: Path) -> None:
    words = ("prune", NAME, "--pretrained", "--data", folder, "--target-macs", 0.9, *SHORT)
    code, _, err = run(*words, "--out", tmp_path / "small")
    assert code == 2
    assert f"{NAME} has timm's weights with a fresh head for these classes: give --train-epochs N to train it first." in err
    code, _, err = run(*words, "--dry-run")
    assert code == 0, err
    assert "the widths are those of these weights" in err
    code, _, err = run(*words, "--train-epochs", 1, "--out", tmp_path / "small")
    assert code == 0, err
    again = json.loads((tmp_path / "small" / "manifest.json").read_text())["extra"]["data"]["options"]
    assert (again["mean"], again["in_chans"]) == ([0.5] * 3, 3)  # so that the narrowed network meets images as it knows them


def test_what_has_none_is_refused(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target, says in (("vit_tiny_patch16_18", "no timm model"), (f"{tmp_path}:best", "for a timm model given by its name")):
        with pytest.raises(UsageError, match=says):
            open_target(target, pretrained=True)
    code, _, err = run("profile", "resnet10t", "--pretrained", "--data", folder, "--image-size", 16)  # it is not in the cache
    assert code == 2
    assert err.splitlines()[-1].startswith("error: timm's weights of resnet10t cannot be loaded: ")
    assert "Traceback" not in err
    save_file({}, tmp_path / "w.safetensors")
    code, _, err = run("profile", NAME, "--pretrained", "--weights", tmp_path / "w.safetensors", "--data", folder, "--image-size", 16)
    assert code == 2
    assert "without pretrained" in err
    without = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(UsageError, match=f"timm has no weights of {without}"):
        open_target(without, data=str(folder), pretrained=True)
