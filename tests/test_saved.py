from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_space import FILE
from torch import nn

import capnas
from capnas.devices import resolve_device
from capnas.documents import write_whole
from capnas.errors import UsageError
from capnas.saved import MANIFEST, WEIGHTS, SavedModelError, build_recipe, load_model, read_manifest, save_model

SPACE = {"space": FILE, "params": {"width": 4, "depth": 2, "kind": "plain"}, "num_classes": 3, "in_chans": 1, "image_size": 8}
TIMM = {"timm": "resnet10t", "args": {"num_classes": 3, "in_chans": 1}, "image_size": 32}


def narrowed() -> nn.Module:
    """The space's network, its first conv 4 channels wide instead of 6, and its second one split in two."""
    model = build_recipe({**SPACE, "params": {"width": 6, "depth": 2, "kind": "plain"}}, seed=1)
    first, second = model[0], model[2]
    model[0] = nn.Conv2d(1, 4, 3, padding=1)
    model[2] = nn.Sequential(nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.Conv2d(2, 6, 1))
    assert (first.out_channels, second.in_channels) == (6, 6)
    return model.eval()


def test_a_model_is_loaded_to_the_device_that_the_other_calls_take(tmp_path: Path) -> None:
    save_model(build_recipe(SPACE), tmp_path / "m", SPACE)
    assert next(load_model(tmp_path / "m", device="auto").parameters()).device.type == resolve_device("auto").type
    with pytest.raises(UsageError, match="device 'cuda:99' is not here"):
        load_model(tmp_path / "m", device="cuda:99")


def test_a_space_given_by_a_relative_path_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(FILE.partition(":")[0]).parent)
    recipe = SPACE | {"space": "tiny_space.py"}
    saved = save_model(build_recipe(recipe), tmp_path / "model", recipe)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(load_model(saved).state_dict(), build_recipe(SPACE).state_dict(), rtol=0, atol=0)


def test_a_compiled_model_is_saved_as_it_was_before(tmp_path: Path) -> None:
    model, x = build_recipe(SPACE, seed=1).eval(), torch.randn(2, 1, 8, 8)
    again = load_model(save_model(torch.compile(model, backend="eager"), tmp_path / "m", SPACE))
    assert torch.equal(again(x), model(x))


def test_a_narrowed_and_split_network_comes_back(tmp_path: Path) -> None:
    model, x = narrowed(), torch.randn(2, 1, 8, 8)
    recipe = {**SPACE, "params": {"width": 6, "depth": 2, "kind": "plain"}}
    again = capnas.load_model(capnas.save_model(model, tmp_path / "m", recipe, extra={"accuracy": 0.5}))
    assert torch.equal(again(x), model(x))
    assert not again.training
    assert again[0].out_channels == 4
    manifest = json.loads((tmp_path / "m" / MANIFEST).read_text())
    assert manifest["extra"] == {"accuracy": 0.5}
    assert manifest["attributes"]["0"] == {"out_channels": 4}


def test_an_added_bias_and_buffers_come_back(tmp_path: Path) -> None:
    model = build_recipe(TIMM)
    model.layer1[0].conv1.bias = nn.Parameter(torch.randn(model.layer1[0].conv1.out_channels))
    model(torch.randn(2, 1, 32, 32))
    again, x = load_model(save_model(model, tmp_path, TIMM)), torch.randn(1, 1, 32, 32)
    assert torch.equal(again(x), model.eval()(x))


def test_equal_seeds_give_equal_weights_and_the_callers_generator_stays() -> None:
    state = torch.get_rng_state()
    a, b, c = build_recipe(TIMM, seed=3), build_recipe(TIMM, seed=3), build_recipe(TIMM, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.conv1[0].weight, b.conv1[0].weight)
    assert not torch.equal(a.conv1[0].weight, c.conv1[0].weight)


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    model = build_recipe(SPACE)
    save_model(model, tmp_path / "m", SPACE)
    with pytest.raises(UsageError, match="holds a saved model already"):
        save_model(model, tmp_path / "m", SPACE)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    save_model(model, tmp_path / "m", SPACE, force=True)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty and holds no saved model"):
        save_model(model, tmp_path / "other", SPACE, force=True)
    with pytest.raises(UsageError, match="is a file"):
        save_model(model, tmp_path / "other" / "notes.txt", SPACE, force=True)


def test_a_model_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not build this model again"):
        save_model(nn.Linear(2, 3), tmp_path / "m", SPACE)
    for other in (nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))):
        with pytest.raises(UsageError, match="it is a Sequential, the recipe's is a ResNet"):
            save_model(other, tmp_path / "m", {"timm": "resnet10t", "args": {"num_classes": 3}})
    assert not (tmp_path / "m").exists()
    with pytest.raises(UsageError, match="under 'timm' or a search space"):
        build_recipe({"params": {}})


TIED = """
from torch import nn


class Net(nn.Module):
    def __init__(self, chans, classes):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(chans, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, padding_mode="zeros")
        self.act, self.head = nn.ReLU(), nn.Linear(4, classes)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.head(self.act(self.c(self.act(self.b(self.a(x))))).mean((2, 3)))


def space(trial, *, num_classes, in_chans, image_size):
    return Net(in_chans, num_classes)
"""


def test_what_the_recipe_would_build_otherwise_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(TIED)
    recipe = {**SPACE, "space": f"{tmp_path / 'tied.py'}:space", "params": {}}
    model, x = build_recipe(recipe).eval(), torch.randn(2, 1, 8, 8)
    assert torch.equal(load_model(save_model(model, tmp_path / "m", recipe))(x), model(x))
    apart = build_recipe(recipe)
    apart.c.weight = nn.Parameter(apart.b.weight.detach() + 1)
    with pytest.raises(UsageError, match=r"does not build this model again: b\.weight would differ"):
        save_model(apart, tmp_path / "n", recipe)
    for change, reason in (
        (lambda m: setattr(m.c, "padding_mode", "circular"), "c padding_mode is 'circular', the recipe's is 'zeros'"),
        (lambda m: setattr(m, "act", nn.GELU()), "act is a GELU, the recipe's is a ReLU"),
        (lambda m: setattr(m, "act", nn.Conv2d(4, 4, 1)), "act is a Conv2d, the recipe's is a ReLU"),
    ):
        other = build_recipe(recipe)
        change(other)
        with pytest.raises(UsageError, match=reason):
            save_model(other, tmp_path / "n", recipe)
    assert not (tmp_path / "n").exists()


def test_modules_without_weights_that_the_recipe_lacks_or_has_alone_are_refused(tmp_path: Path) -> None:
    more, fewer = build_recipe(SPACE), build_recipe(SPACE)
    place = len(more)
    more.append(nn.Softmax(1))
    with pytest.raises(UsageError, match=f"only this model has the module {place}"):
        save_model(more, tmp_path / "m", SPACE)
    activation = next(n for n, m in fewer.named_children() if isinstance(m, nn.ReLU))
    del fewer._modules[activation]
    with pytest.raises(UsageError, match=f"only the recipe's model has the module {activation}"):
        save_model(fewer, tmp_path / "m", SPACE)
    assert not (tmp_path / "m").exists()


def test_a_part_with_another_padding_is_refused(tmp_path: Path) -> None:
    model = narrowed()
    model[2][0].padding_mode = "circular"
    with pytest.raises(UsageError, match=r"2 holds a Conv2d padded with 'circular', .* can describe Linear and, padded with zeros, Conv2d"):
        save_model(model, tmp_path / "m", {**SPACE, "params": {"width": 6, "depth": 2, "kind": "plain"}})
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_number_types_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = build_recipe(TIMM).to(dtype).eval(), torch.randn(1, 1, 32, 32, dtype=dtype)
    model.conv1[0].float()  # of mixed types, too
    again = load_model(save_model(model, tmp_path / "m", TIMM))
    assert {n: t.dtype for n, t in again.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    model.conv1[0].to(dtype)
    again = load_model(save_model(model, tmp_path / "n", TIMM))
    assert torch.equal(again(x), model(x))


def test_manifests_without_number_types_are_read(tmp_path: Path) -> None:
    folder = save_model(build_recipe(SPACE), tmp_path / "m", SPACE)
    document = json.loads((folder / MANIFEST).read_text())
    assert document.pop("dtypes") == {}
    (folder / MANIFEST).write_text(json.dumps(document))
    assert next(load_model(folder).parameters()).dtype == torch.float32


def test_a_model_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (build_recipe(SPACE, seed=seed) for seed in (1, 2))

    def killed_before(last: str) -> None:
        def write(path: Path, content: str | bytes) -> None:
            if path.name == last:
                raise KeyboardInterrupt
            write_whole(path, content)

        monkeypatch.setattr("capnas.saved.write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            save_model(new, tmp_path, SPACE, extra={"accuracy": 2}, force=True)

    save_model(old, tmp_path, SPACE, extra={"accuracy": 1})
    for last, model, accuracy in ((WEIGHTS, old, 1), (MANIFEST, new, 2)):
        killed_before(last)
        assert read_manifest(tmp_path)["extra"] == {"accuracy": accuracy}
        torch.testing.assert_close(load_model(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)
    monkeypatch.undo()
    edited = save_model(new, tmp_path, SPACE, extra={"accuracy": 3}, force=True) / MANIFEST
    edited.write_text(edited.read_text().replace('"accuracy": 3', '"accuracy": 4'))
    assert read_manifest(tmp_path)["extra"] == {"accuracy": 4}


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SavedModelError, match="is not a saved model"):
        load_model(tmp_path)
    folder = save_model(build_recipe(SPACE), tmp_path / "m", SPACE)
    good = (folder / MANIFEST).read_text()
    damaged = {
        good.replace('"version": 1', '"version": 9'): "has version 9, this capnas reads version 1",
        "{": "is not JSON",
        "[]": "not the manifest",
        good.replace('"recipe"', '"dish"'): "was cut or edited, it holds no recipe: save the model again",
        good.replace('"shapes": {}', '"shapes": 3'): "holds no shapes",
    }
    for content, message in damaged.items():
        (folder / MANIFEST).write_text(content)
        with pytest.raises(SavedModelError, match=message):
            load_model(folder)
    (folder / MANIFEST).write_text(good)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(SavedModelError, match="does not fit its manifest"):
        load_model(folder)


def test_a_recipe_is_built_for_the_size_asked_for(tmp_path: Path) -> None:
    vit = {"timm": "vit_tiny_patch16_224", "args": {"num_classes": 2, "img_size": 32, "depth": 1}, "image_size": 32}
    assert [build_recipe(vit, image_size=size).patch_embed.grid_size for size in (None, 64)] == [(2, 2), (4, 4)]
    (tmp_path / "sized.py").write_text(
        "from torch import nn\n\n\ndef space(trial, *, image_size, **_):\n    return nn.Linear(image_size, 2)\n"
    )
    sized = {**SPACE, "space": f"{tmp_path / 'sized.py'}:space", "params": {}}
    assert [build_recipe(sized, image_size=size).in_features for size in (None, 16)] == [8, 16]


def test_a_model_with_fewer_weights_than_its_recipe_is_refused(tmp_path: Path) -> None:
    model = build_recipe(TIMM)
    model.layer1[0].conv1.weight = None
    with pytest.raises(UsageError, match=r"does not build this model again: layer1\.0\.conv1\.weight would differ"):
        save_model(model, tmp_path / "m", TIMM)


def test_weights_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    model = build_recipe(SPACE)
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    again = load_model(save_model(model, tmp_path / "m", SPACE))
    assert torch.equal(again[0].weight.isnan(), model[0].weight.isnan())


def test_fractions_of_a_module_come_back(tmp_path: Path) -> None:
    model = build_recipe(SPACE)
    model[1].slope = 0.25  # as the eps of a norm
    assert load_model(save_model(model, tmp_path / "m", SPACE))[1].slope == 0.25


def test_a_batch_norm_that_averages_all_it_has_seen_comes_back_so(tmp_path: Path) -> None:
    model = build_recipe(TIMM)
    model.bn1.momentum = None
    again = load_model(save_model(model, tmp_path / "m", TIMM))
    assert (again.bn1.momentum, again.layer1[0].bn1.momentum) == (None, 0.1)


def test_tuples_and_new_numbers_of_a_module_come_back(tmp_path: Path) -> None:
    model = build_recipe(TIMM)
    model.layer1[0].conv1.padding, model.layer1[0].conv1.dilation = (2, 2), (2, 2)
    model.added = 3
    model.unbounded = float("inf")  # no number of JSON
    again, x = load_model(save_model(model, tmp_path / "m", TIMM)), torch.randn(1, 1, 32, 32)
    assert again.layer1[0].conv1.dilation == (2, 2)
    assert again.added == 3
    assert not hasattr(again, "unbounded")
    assert torch.equal(again(x), model.eval()(x))


def test_a_linear_layer_split_in_two_comes_back_beside_one_of_like_name(tmp_path: Path) -> None:
    (tmp_path / "pair.py").write_text(
        "from torch import nn\n\n\ndef space(trial, *, num_classes, **_):\n"
        "    return nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(10)), nn.Linear(64, num_classes))\n"
    )
    recipe = {**SPACE, "space": f"{tmp_path / 'pair.py'}:space", "params": {}}
    model, x = build_recipe(recipe).eval(), torch.randn(2, 1, 8, 8)
    model[1] = nn.Sequential(nn.Linear(64, 3, bias=False), nn.Linear(3, 48))
    model[2] = nn.Linear(48, 64)
    model[10], model[11] = nn.Linear(64, 40), nn.Linear(40, 3)  # "1" begins the names of both
    again = load_model(save_model(model, tmp_path / "m", recipe))
    assert torch.equal(again(x), model(x))
    assert (again[1][0].bias, again[10].out_features) == (None, 40)


def test_a_layer_split_twice_comes_back(tmp_path: Path) -> None:
    model = narrowed()
    model[2][0] = nn.Sequential(nn.Conv2d(4, 1, 3, padding=1, bias=False), nn.Conv2d(1, 2, 1))
    before = torch.get_rng_state()
    again = load_model(save_model(model, tmp_path / "m", SPACE))
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))
    assert again[2][0][0].padding == (1, 1)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UsageError, match="cannot be written to; make it writable"):
        save_model(build_recipe(SPACE), tmp_path / "m", SPACE)


def test_a_document_of_another_program_is_no_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"version": 1}')
    with pytest.raises(SavedModelError, match="not the manifest of a model saved by capnas"):
        load_model(tmp_path)


def test_padding_by_name_that_a_manifest_cannot_tell_is_refused_and_rows_may_be_lists(tmp_path: Path) -> None:
    recipe = {"timm": "test_resnet.r160_in1k", "in_chans": 3, "num_classes": 2}
    for place, (attribute, value) in enumerate((("padding", "same"), ("dilation", [2, 2]))):
        model = build_recipe(recipe).eval()
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.stride == (1, 1))
        setattr(conv, attribute, value)
        if attribute == "padding":
            with pytest.raises(UsageError, match="padding is 'same', the recipe's is"):
                save_model(model, tmp_path / str(place), recipe)
        else:
            save_model(model, tmp_path / str(place), recipe)
            x = torch.randn(1, 3, 32, 32)
            torch.testing.assert_close(load_model(tmp_path / str(place))(x), model(x))
