from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from PIL import Image
from tiny_space import FILE, images, write_images
from torch import nn

from capnas.data import load_data
from capnas.errors import StudyError, UsageError
from capnas.narrowing import narrowed, plan_widths, survey
from capnas.narrowing.lowrank import factorized, plan_ranks
from capnas.saved import build_recipe, save_model
from capnas.search import run_study
from capnas.search.config import StudyConfig
from capnas.search.inspection import inspect_target
from capnas.search.opening import data_record, input_record
from capnas.search.runs import open_run
from capnas.search.target import open_largest, open_network, open_target
from capnas.search.trials import rebuild, retrain_trial

optuna.logging.set_verbosity(optuna.logging.ERROR)
OPTIONS = {"image_size": 8, "in_chans": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    config = StudyConfig(
        space=FILE, data=str(write_images(root / "images")), study="tiny", trials=2, epochs=1, device="cpu", sampler="random",
        pruner="off", out=str(root / "tiny"), train={"batch_size": 32}, data_options=OPTIONS,
    )  # fmt: skip
    return run_study(config).folder


def test_a_trial_with_the_images_of_its_run(folder: Path) -> None:
    target = open_target(f"{folder}:best")
    assert (target.image_size, target.trained, target.data.num_classes, target.data.in_chans) == (8, False, 3, 1)
    assert target.build(seed=2)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert target.recipe["space"] == FILE
    with pytest.raises(StudyError, match="no finished trial 99"):
        open_target(f"{folder}:99")


def test_a_trial_keeps_the_split_of_its_run(folder: Path, tmp_path: Path) -> None:
    asked = replace(open_run(folder).config, out=str(tmp_path / "seeded"), trials=1, seed=5, data_options=OPTIONS | {"validation": 0.3})
    run = run_study(asked)
    found, own = open_target(f"{run.folder}:0").data, asked.images()
    assert set(found.index) == {"train", "validation", "test"}
    for split, chosen in own.index.items():
        torch.testing.assert_close(found.index[split], chosen)
    assert found.sizes["validation"] > open_target(f"{folder}:0").data.sizes["validation"]


def test_a_trial_on_other_images_with_more_classes(folder: Path) -> None:
    other = load_data(images(classes=3, n=90), validation=0.2, test=0.2)
    assert open_target(f"{folder}:0", data=other).build()(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    x, y = images(120)
    target = open_target(f"{folder}:0", data=load_data((x, [i % 5 for i in range(len(y))]), validation=0.2, test=0.2))
    assert target.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 5)


def test_a_saved_model_brings_weights_and_images(folder: Path, tmp_path: Path) -> None:
    trial = open_target(f"{folder}:0")
    model = trial.build(seed=5)
    save_model(model, tmp_path / "m", trial.recipe, extra={"data": data_record(trial.data)})
    target = open_target(str(tmp_path / "m"))
    assert target.trained
    assert target.data.image_size == 8
    assert target.data.name == trial.data.name
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(target.build()(x), model.eval()(x))
    assert not torch.equal(target.build(seed=6, trained=False).eval()(x), model(x))
    with pytest.raises(UsageError, match=r"takes images of 1 channels and knows 3 classes, but .* has 1 and 10"):
        open_target(str(tmp_path / "m"), data="fashion-mnist-12k")


def test_a_saved_model_is_used_as_it_says(folder: Path, tmp_path: Path) -> None:
    trial = open_target(f"{folder}:0")
    source = str(trial.data.spec.source)
    extra = {"trained": False, "data": {"source": source, "options": {"image_size": 16, "in_chans": 1}}}
    place = save_model(trial.build(), tmp_path / "m", trial.recipe | {"image_size": 12}, extra=extra)
    target = open_target(str(place))
    assert (target.trained, target.image_size, target.data.image_size) == (False, 12, 16)
    assert open_target(str(place), data=source, data_options={"image_size": None}).data.image_size == 8  # pixels of its files


def test_images_given_by_name_are_split_as_they_were_and_others_prepared_like_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_run(folder).config.data
    monkeypatch.chdir(Path(source).parent)
    given = {"image_size": 16, "in_chans": 1, "crop_pct": 0.8, "mean": (0.2,), "std": (0.3,)}
    plain = open_target("test_resnet", data="images", data_options=given | {"validation": 0.3, "seed": 5})
    record = data_record(plain.data)
    inputs = input_record(plain.data, 16)
    framed = {"crop_pct": 0.8, "crop_mode": "center", "interpolation": "bilinear"}
    assert inputs == {"image_size": 16, "in_chans": 1, "mean": [0.2], "std": [0.3], "class_names": list(plain.data.class_names)} | framed
    place = save_model(plain.build(), tmp_path / "m", plain.recipe, extra={"data": record, "retrained": {"seed": 0}, "inputs": inputs})
    own = [open_target(str(place), data=data) for data in (None, "images", f"{source}/")]
    monkeypatch.chdir(tmp_path)
    for same in (*own, open_target(str(place))):
        assert same.saw_validation
        assert (same.data.mean, same.data.spec.crop_pct) == ([0.2], 0.8)
        for split, chosen in plain.data.index.items():
            assert torch.equal(same.data.index[split], chosen)
    write_images(tmp_path / "others")
    other = open_target(str(place), data="others")
    assert not other.saw_validation
    assert (other.data.image_size, other.data.in_chans, other.data.mean, other.data.spec.crop_pct) == (16, 1, [0.2], 0.8)
    assert (other.data.spec.validation, other.data.spec.seed) == (0.1, 0)
    record["options"] = {k: v for k, v in record["options"].items() if k not in ("mean", "std")}  # those of its own images, then
    save_model(plain.build(), tmp_path / "m", plain.recipe, extra={"data": record, "inputs": inputs}, force=True)
    assert open_target(str(place), data="others").data.mean == (0.2,)
    trial = open_target(f"{folder}:0", data="others", data_options={"mean": (0.1,)})
    assert (trial.data.in_chans, trial.data.mean, trial.data.spec.source) == (1, (0.1,), str(tmp_path / "others"))
    same_split, run = open_target(f"{folder}:0", data=source).data.index, open_target(f"{folder}:0").data.index
    assert all(torch.equal(same_split[split], run[split]) for split in run)


def test_images_are_prepared_as_arrays_were_that_nobody_has_any_more(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (60, 20, 16), dtype=np.uint8), np.arange(60) % 10
    data = load_data((x, y), image_size=16, mean=(0.9,), std=(0.1,), crop_pct=0.8)
    plain = open_target("test_resnet", data=data)
    extra = {"data": data_record(data), "retrained": {"seed": 0}, "inputs": input_record(data, 16)}
    place = save_model(plain.build(), tmp_path / "m", plain.recipe, extra=extra)
    for i in range(60):
        (tmp_path / "rgb" / str(y[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).convert("RGB").save(tmp_path / "rgb" / str(y[i]) / f"{i}.png")
    for other in (None, str(tmp_path / "rgb")):
        found = open_target(str(place), data=other)
        assert not found.saw_validation
        assert (found.data.image_size, found.data.in_chans, found.data.mean, found.data.std) == (16, 1, (0.9,), (0.1,))
        assert found.data.spec.framing == data.spec.framing
    own = load_data((x, y), image_size=16, crop_pct=0.8)
    assert input_record(own, 16)["mean"] == list(own.mean)


def test_a_saved_model_may_leave_classes_and_channels_to_timm(tmp_path: Path) -> None:
    recipe = {"timm": "resnet10t", "args": {"num_classes": 10}, "image_size": 28}
    place = save_model(build_recipe(recipe), tmp_path / "m", recipe)
    assert open_target(str(place), data="fashion-mnist-12k", data_options={"in_chans": 3}).data.in_chans == 3
    with pytest.raises(UsageError, match=r"takes images of 3 channels and knows 10 classes, but .* has 1 and 10"):
        open_target(str(place), data="fashion-mnist-12k")
    place = save_model(build_recipe(every := {"timm": "resnet10t"}), tmp_path / "every", every)
    with pytest.raises(UsageError, match="of 3 channels and knows 1000 classes"):
        open_target(str(place), data="fashion-mnist-12k")


def test_a_trial_at_another_size(folder: Path) -> None:
    target = open_target(f"{folder}:0", image_size=12)
    assert (target.image_size, target.recipe["image_size"], target.data.image_size) == (12, 12, 12)


def test_images_are_loaded_at_the_largest_size() -> None:
    target, refused = open_largest("resnet10t", (16, 24, 20))
    assert (target.data.image_size, refused) == (24, {})


def test_images_of_a_given_size_that_do_not_fit_fit_at_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("capnas.search.target.load_data", full)
    with pytest.raises(MemoryError):
        open_largest("resnet10t", (16, 24), data_options={"image_size": 8})
    with pytest.raises(UsageError, match="do not fit into memory at 24 px; the images do not fit into memory at 16 px"):
        open_largest("resnet10t", (16, 24))


def test_a_retrained_trial_knows_the_validation_images_of_its_run(folder: Path) -> None:
    record = retrain_trial(rebuild(open_run(folder), 0), epochs=1, device="cpu")
    place = str(folder / record["model"])
    assert open_target(place).saw_validation
    assert not open_target(place, data=load_data(images(classes=3, n=90), validation=0.2, test=0.2)).saw_validation
    assert not open_target(f"{folder}:0").saw_validation
    assert open_target(f"{folder}:0").retrained == folder / record["model"]
    assert open_target(f"{folder}:1").retrained is None
    assert inspect_target(place, batch=8, device="cpu").state.startswith("weights trained on train and validation, ")


def test_a_network_with_a_fixed_input_is_built_for_the_images(tmp_path: Path) -> None:
    target = open_target("vit_tiny_patch16_224", image_size=32)
    assert target.recipe["args"]["img_size"] == 32
    assert target.build(image_size=48)(torch.zeros(1, 1, 48, 48)).shape == (1, 10)
    save_model(target.build(), tmp_path / "vit", target.recipe)
    with pytest.raises(UsageError, match="fixed input of 32 px, it cannot be used at 48 px"):
        open_target(str(tmp_path / "vit")).build(image_size=48)


def test_a_narrowed_model_is_built_anew_as_narrow_as_it_is(tmp_path: Path) -> None:
    recipe = {"timm": "resnet10t", "args": {"num_classes": 10, "in_chans": 1, "channels": (8, 16, 32, 64)}, "image_size": 28}
    model = build_recipe(recipe, seed=9).eval()
    found = survey(model, torch.randn(64, 1, 28, 28))
    small = narrowed(model, found, plan_widths(found, target_macs=0.4))
    save_model(small, tmp_path / "m", recipe)
    target = open_target(str(tmp_path / "m"))
    first, other = (target.build(seed, image_size=20, trained=False) for seed in (3, 4))
    torch.manual_seed(99)
    again = target.build(3, image_size=20, trained=False)  # whatever was drawn before
    state, plain = first.state_dict(), build_recipe(recipe, seed=3).state_dict()
    assert first.training
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in small.state_dict().items()}
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in state.items())
    changed = [n for n, t in state.items() if t.shape != plain[n].shape]
    for name, tensor in state.items():
        if name not in changed:
            assert torch.equal(tensor, plain[name])
        elif tensor.ndim > 1:
            assert not torch.equal(tensor, other.state_dict()[name])
            fans = [t[0].numel() for t in (plain[name], tensor)]
            assert float(tensor.std()) == pytest.approx(float(plain[name].std()) * (fans[0] / fans[1]) ** 0.5, rel=0.25)
        else:  # of normalizations
            assert tensor.unique().tolist() == plain[name].unique().tolist()
    assert any(state[n].ndim > 1 for n in changed)
    assert torch.equal(target.build()(torch.zeros(1, 1, 28, 28)), small.eval()(torch.zeros(1, 1, 28, 28)))


def test_a_bias_that_the_recipe_does_not_build_starts_at_zero(tmp_path: Path) -> None:
    recipe = {"timm": "resnet10t", "args": {"num_classes": 10, "in_chans": 1, "channels": (8, 16, 32, 64)}, "image_size": 28}
    model = build_recipe(recipe)
    model.layer1[0].conv1.bias = nn.Parameter(torch.ones(model.layer1[0].conv1.out_channels))
    save_model(model, tmp_path / "m", recipe)
    assert not open_target(str(tmp_path / "m")).build(trained=False).layer1[0].conv1.bias.any()


def test_a_factorized_model_is_built_anew_in_its_parts(tmp_path: Path) -> None:
    recipe = {"timm": "resnet10t", "args": {"num_classes": 10, "in_chans": 1, "channels": (8, 16, 32, 64)}, "image_size": 28}
    model = build_recipe(recipe, seed=9).eval()
    split = factorized(model, plan_ranks(model, torch.randn(64, 1, 28, 28), target_macs=0.8))
    save_model(split, tmp_path / "m", recipe)
    parts = set(split.state_dict()) - set(model.state_dict())
    target = open_target(str(tmp_path / "m"))
    fresh, other = (target.build(seed, trained=False).state_dict() for seed in (3, 4))
    assert parts
    assert fresh.keys() == split.state_dict().keys()
    assert not any(torch.equal(fresh[n], split.state_dict()[n]) or torch.equal(fresh[n], other[n]) for n in parts)


def test_a_narrowed_network_with_a_fixed_input_keeps_it(tmp_path: Path) -> None:
    target = open_target("vit_tiny_patch16_224", image_size=32)
    model = target.build()
    model.blocks[0].mlp.fc1 = torch.nn.Linear(192, 96)
    model.blocks[0].mlp.fc2 = torch.nn.Linear(96, 192)
    save_model(model, tmp_path / "vit", target.recipe)
    assert open_target(str(tmp_path / "vit")).build(trained=False)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    with pytest.raises(UsageError, match="narrowed with a fixed input of 32 px, it cannot be used at 48 px"):
        open_target(str(tmp_path / "vit")).build(image_size=48, trained=False)


def test_images_of_a_search_over_sizes_are_loaded_at_the_largest(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    for number in range(24):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (160, 160), dtype=np.uint8)).save(tmp_path / str(number % 2) / f"{number}.png")
    config = StudyConfig(space="vgg", data=str(tmp_path), resolutions=(32, 160))
    fine, plain = config.images(), replace(config, resolutions=None).images()
    assert (fine.image_size, plain.image_size) == (160, 64)
    assert fine.std[0] > 2 * plain.std[0]  # noise that a smaller image does not hold
    assert replace(config, data_options={"image_size": 48}).images().image_size == 48
    assert replace(config, resolutions=(16, 32)).images().image_size == 32


def test_a_trial_of_a_search_over_sizes_has_the_images_of_the_search(folder: Path, tmp_path: Path) -> None:
    asked = replace(open_run(folder).config, out=str(tmp_path / "sizes"), trials=1, resolutions=(8, 12), data_options={"in_chans": 1})
    target = open_target(f"{run_study(asked).folder}:0")
    assert (target.data.image_size, target.data.std) == (12, asked.images().std)
    assert target.image_size in (8, 12)
    assert open_target(f"{tmp_path / 'sizes'}:0", data_options={"image_size": 10}).data.image_size == 10


def test_what_is_no_target_says_what_is(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no timm model 'resnet1'; did you mean"):
        open_target("resnet1")
    with pytest.raises(UsageError, match="RUN:NUMBER or RUN:best"):
        open_target(f"{folder}:first")
    with pytest.raises(UsageError, match=r"holds no manifest\.json; a trial of a run is given as"):
        open_target(str(folder))


def test_a_record_of_data_keeps_that_nothing_is_augmented() -> None:
    plain = load_data("fashion-mnist-12k", image_size=8, augment=False)
    record = data_record(plain)
    assert record is not None
    assert record["options"] == {"image_size": 8, "augment": False}
    assert load_data(record["source"], **record["options"]).augment == plain.augment
    split = data_record(load_data("fashion-mnist-12k", image_size=8, validation=0.3))
    assert split is not None
    assert split["options"] == {"image_size": 8, "validation": 0.3}
    assert "augment" not in (data_record(load_data("fashion-mnist-12k")) or {})["options"]


def test_a_network_to_train_anew_is_fresh_or_of_a_function_beside_other_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text("WIDTH = 5\n")
    (tmp_path / "nets.py").write_text(
        "from sizes import WIDTH\nfrom torch import nn\n\n"
        "def wide(num_classes, in_chans, image_size):\n    return nn.Sequential(nn.Conv2d(in_chans, WIDTH, image_size), nn.Flatten())\n"
    )
    before = list(sys.path)
    network, data, size, name = open_network(f"{tmp_path / 'nets.py'}:wide", data=str(folder.parent / "images"), data_options=OPTIONS)
    assert (network[0].out_channels, network[0].kernel_size, data.image_size, size, name) == (5, (8, 8), 8, 8, "wide")  # type: ignore[index]
    with pytest.raises(UsageError, match=r"defines no function 'narrow'; write def narrow\(num_classes, in_chans, image_size\)"):
        open_network(f"{tmp_path / 'nets.py'}:narrow")
    assert sys.path == before
    network, _, size, name = open_network(f"{folder}:0")
    assert (network.training, size, name) == (True, 8, "trial 0 of tiny")
