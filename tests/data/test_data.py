from __future__ import annotations

import itertools
import multiprocessing
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capnas.data import Augment, ImageData, load_data
from capnas.data.batching import InMemory
from capnas.data.decoding import judge_unreadable
from capnas.data.splits import carve, check_classes
from capnas.errors import DataError, UsageError


@pytest.fixture(scope="module")
def embedded() -> ImageData:
    return load_data()


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty smooth images of each of three classes, in a folder."""
    root = tmp_path_factory.mktemp("pets")
    rng = np.random.default_rng(0)
    for name, i in itertools.product(("cat", "dog", "emu"), range(30)):
        (root / name).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24 + i % 3, 20)).save(root / name / f"{i}.png")
    return root


def every(data: ImageData, split: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*data.batches(split, 64, **options))
    return torch.cat(x), torch.cat(y)


# --- splits ---------------------------------------------------------------------------------------------------------------------------


def test_splits_never_overlap_and_are_stratified(embedded: ImageData) -> None:
    parts = {split: set(positions.tolist()) for split, positions in embedded.index.items()}
    assert {s: len(p) for s, p in parts.items()} == embedded.sizes == {"train": 9000, "validation": 1000, "test": 2000}
    for a, b in itertools.combinations(parts.values(), 2):
        assert not a & b
    assert every(embedded, "validation")[1].bincount().tolist() == [100] * 10
    assert len(every(embedded, "train+validation", augment=False)[1]) == 9984  # whole batches of 64 from 10,000


def test_images_of_the_splits_are_different_images() -> None:
    x = np.arange(200, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    data = load_data((x, np.arange(200) % 4), mean=(0.0,), std=(1 / 255,))
    with data.final_evaluation() as opened:
        seen = [set(every(opened, s)[0].mean((1, 2, 3)).round().int().tolist()) for s in ("validation", "test")]
    train = set(torch.cat([x for x, _ in data.batches("train", 1, augment=False)]).mean((1, 2, 3)).round().int().tolist())
    assert sorted([*train, *seen[0], *seen[1]]) == list(range(200))


def test_no_search_call_can_read_the_test_split(embedded: ImageData) -> None:
    for call in (lambda: embedded.batches("test", 8), lambda: embedded.steps("test", 8)):
        with pytest.raises(UsageError, match=r"the test split is closed while searching; .* with data.final_evaluation\(\) as opened"):
            call()
    signs = np.where(np.arange(4) % 2, 1.0, -1.0) * np.ones((40, 4, 1))
    marked = load_data({"train": (signs, np.arange(40) % 2), "test": (np.full((9, 4, 4), 255.0), np.arange(9) % 2)})
    for split in ("train", "validation", "train+validation"):
        assert every(marked, split)[0].abs().unique().numel() == 1
    assert marked.probe(99)[0].abs().unique().numel() == 1
    assert marked.mean == (0.0,)


def test_the_test_split_closes_again_even_after_an_error(embedded: ImageData) -> None:
    kept = []

    def mishap() -> None:
        with embedded.final_evaluation() as opened:
            kept.append(opened)
            assert len(every(opened, "test")[1]) == 2000
            embedded.batches("test", 8)

    for _ in range(2):
        with pytest.raises(UsageError, match="closed while searching"):
            mishap()
    with pytest.raises(UsageError, match="closed while searching"):
        kept[0].batches("test", 8)


def test_another_seed_sets_other_images_aside() -> None:
    arrays = np.random.default_rng(0).random((60, 6, 6)), np.arange(60) % 3
    first, again, other = (load_data(arrays, seed=seed).index for seed in (1, 1, 2))
    for split in ("validation", "test"):
        assert torch.equal(first[split], again[split])
        assert not torch.equal(first[split], other[split])


def test_a_guess_names_the_commonest_class_of_validation() -> None:
    labels = np.repeat([0, 1, 2], [24, 12, 4])
    data = load_data((np.random.default_rng(0).random((40, 6, 6)), labels), validation=0.25, test=0.25)
    assert data.guess == pytest.approx(6 / 10, abs=0.11)
    assert data.guess == max(np.bincount(data.pool.labels[data.index["validation"]])) / data.sizes["validation"]


def test_carving_is_seeded() -> None:
    labels = torch.arange(1000) % 7
    same, other = carve(labels, 0.3, 1), carve(labels, 0.3, 2)
    assert torch.equal(carve(labels, 0.3, 1)[1], same[1])
    assert not torch.equal(same[1], other[1])
    assert torch.equal(torch.cat(same).sort().values, torch.arange(1000))
    assert all(abs(n - 43) <= 1 for n in labels[same[1]].bincount().tolist())


def test_a_class_of_two_gives_one_and_keeps_one() -> None:
    kept, carved = carve(torch.tensor([0, 0, 1] + [2] * 50), 0.01, 0)
    assert torch.tensor([0, 0, 1])[carved[carved < 3]].tolist() == [0]
    assert len(kept) == 51


def test_val_beside_test_is_validation_and_alone_is_test() -> None:
    def pair(n: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(n * 16, dtype=np.uint8).reshape(n, 4, 4), np.arange(n) % 2

    assert load_data({"train": pair(40), "val": pair(10), "test": pair(6)}).sizes == {"train": 40, "validation": 10, "test": 6}
    assert load_data({"train": pair(40), "val": pair(10)}).sizes == {"train": 36, "validation": 4, "test": 10}


# --- batches --------------------------------------------------------------------------------------------------------------------------


def test_batches_repeat_by_seed_and_epoch(embedded: ImageData) -> None:
    def first(**options: Any) -> torch.Tensor:
        return next(embedded.batches("train", 64, **options))[0]

    assert torch.equal(first(epoch=2, seed=5), first(epoch=2, seed=5))
    assert not torch.equal(first(epoch=2, seed=5), first(epoch=3, seed=5))
    assert not torch.equal(first(epoch=2, seed=5), first(epoch=2, seed=6))
    assert not torch.equal(first(epoch=1, seed=0), first(epoch=0, seed=1))  # seeds next to each other share no pass


def test_an_epoch_visits_every_image_once_whatever_the_grouping(embedded: ImageData) -> None:
    y = torch.cat([y for _, y in embedded.batches("train", 1000, augment=False)])
    assert y.bincount().tolist() == [900] * 10
    small = torch.cat([x for x, _ in embedded.batches("train", 450, epoch=1)])
    large = torch.cat([x for x, _ in embedded.batches("train", 9000, epoch=1)])
    assert torch.equal(small, large)


def test_normalised_with_the_statistics_of_train(embedded: ImageData) -> None:
    x = torch.cat([x for x, _ in embedded.batches("train", 9000, augment=False)])
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-4
    own = load_data(mean=(0.5,), std=(0.5,))
    assert next(own.batches("validation", 100))[0].min() == -1


def test_last_batch(embedded: ImageData) -> None:
    assert [len(y) for _, y in embedded.batches("validation", 300)] == [300, 300, 300, 100]
    assert [len(y) for _, y in embedded.batches("train", 4000)] == [4000, 4000]
    assert [len(y) for _, y in embedded.batches("train", 10000)] == [9000]
    for split, size in (("validation", 300), ("train", 4000), ("train", 10000), ("train+validation", 300)):
        assert embedded.steps(split, size) == sum(1 for _ in embedded.batches(split, size))


def test_augmentation_is_for_training_only(embedded: ImageData) -> None:
    plain = every(embedded, "train", augment=False)[0]
    assert torch.equal(plain, every(embedded, "train", augment=Augment(flip=False, shift=0))[0])
    assert not torch.equal(plain, every(embedded, "train")[0])
    assert torch.equal(every(embedded, "train", augment=True)[0], every(embedded, "train")[0])
    assert torch.equal(every(embedded, "validation", augment=True)[0], every(embedded, "validation", augment=False)[0])


def test_augmentation_is_chosen_at_loading(pets: Path) -> None:
    none = Augment(flip=False, shift=0)
    grey = (np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3)
    assert load_data(grey).augment == load_data(grey, augment=True).augment == Augment()
    assert load_data(grey, augment=Augment(shift=1)).augment == Augment(shift=1)
    for data in (load_data(grey, augment=False), load_data(pets, image_size=12, memory_limit=0, workers=0, augment=False)):
        assert data.augment == none
        assert torch.equal(every(data, "train")[0], every(data, "train", augment=False)[0])
        assert not torch.equal(every(data, "train")[0], every(data, "train", augment=Augment(shift=0))[0])
    with pytest.raises(UsageError, match=r"augment must be True, False, None or an Augment, got 'foo'"):
        data.batches("train", 4, augment="foo")  # type: ignore[arg-type]


def test_another_size_is_resized_once_and_forgotten_over_the_limit() -> None:
    data = load_data((torch.randint(0, 256, (30, 1, 16, 16)), torch.arange(30) % 2), memory_limit=30 * 400)
    x, _ = data.probe(6, image_size=20)
    assert x.shape == (6, 1, 20, 20)
    assert next(data.batches("train", 4, image_size=12))[0].shape == (4, 1, 12, 12)
    assert list(data.pool.resized) == [12]  # type: ignore[union-attr]
    assert data.pool.at(12) is data.pool.at(12)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="image_size must be at least 1, got 0"):
        data.batches("train", 4, image_size=0)


def test_probe_is_fixed_and_from_train(embedded: ImageData) -> None:
    x, y = embedded.probe(16, seed=3)
    assert torch.equal(x, embedded.probe(16, seed=3)[0])
    assert not torch.equal(x, embedded.probe(16, seed=4)[0])
    train = every(embedded, "train", augment=False)[0].flatten(1)
    assert sum(bool((train == image).all(1).any()) for image in x.flatten(1)) >= 14  # an epoch leaves out 40 images
    assert y.dtype == torch.int64


def test_bad_requests(embedded: ImageData) -> None:
    with pytest.raises(UsageError, match=r"split must be one of .* got 'validate'. Did you mean 'validation'"):
        embedded.batches("validate", 4)
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        embedded.batches("train", 0)
    assert load_data(embedded) is embedded
    with pytest.raises(UsageError, match="fashion-mnist-12k is loaded already, it takes no image_size: load it anew from its source"):
        load_data(embedded, image_size=14)
    with pytest.raises(UsageError, match=r"option of load_data must be one of .* got 'imgsize'"):
        load_data(imgsize=3)
    for options, text in (
        ({"validation": 0}, r"validation must be the share of images to set aside, in \(0, 1\), got 0"),
        ({"test": 1.0}, "test must be the share"),
        ({"max_unreadable": 2}, r"max_unreadable must be a share in \[0, 1\], got 2"),
        ({"in_chans": 0}, "in_chans must be at least 1"),
        ({"image_size": 1_000_000}, "image_size must be at most 16384 pixels, got 1000000"),
        ({"mean": (0.5, 0.5)}, "mean must have one number for each of 1 channels, got 2"),
        ({"mean": (float("nan"),)}, r"mean must be finite numbers, one for each channel, got \(nan,\)"),
        ({"std": (0.0,)}, r"std must be positive numbers, one for each channel, got \(0\.0,\)"),
    ):
        with pytest.raises(UsageError, match=text):
            load_data(**options)  # type: ignore[arg-type]


def test_channels_and_size_at_loading() -> None:
    data = load_data(in_chans=3, image_size=14)
    x, _ = data.probe(4)
    assert x.shape == (4, 3, 14, 14)
    assert torch.equal(x[:, 0], x[:, 2])


# --- from Python ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hwc", "chw", "float", "torch"])
def test_arrays_of_every_kind_give_the_same(kind: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    y = np.arange(60) % 3
    given: Any = {
        "hwc": x,
        "chw": x.transpose(0, 3, 1, 2),
        "float": x / 255,
        "torch": torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255,
    }[kind]
    data = load_data((given, y))
    reference = load_data((x, y))
    torch.testing.assert_close(data.probe(60), reference.probe(60))
    assert data.sizes == {"train": 42, "validation": 6, "test": 12}


def test_floats_keep_their_units() -> None:
    x = torch.randn(60, 2, 8, 8) * 5 + 3
    data = load_data((x, torch.arange(60) % 3))
    assert data.in_chans == 2
    assert data.mean[0] == pytest.approx(float(x[data.index["train"], 0].mean()), abs=1e-5)


class Shapes(torch.utils.data.Dataset):
    classes = ("dark", "light")

    def __init__(self, item: str = "pil", broken: tuple[int, ...] = ()) -> None:
        self.item, self.broken = item, broken

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            raise OSError("damaged")
        pixels = np.full((10 + index % 2, 10, 3), index % 2 * 200 + index, np.uint8)
        image = {"pil": Image.fromarray(pixels), "array": pixels, "tensor": torch.from_numpy(pixels).permute(2, 0, 1).float() / 255}[
            self.item
        ]
        return image, torch.tensor(index % 2)


@pytest.mark.parametrize("item", ["pil", "array", "tensor"])
def test_torch_datasets(item: str) -> None:
    data = load_data(Shapes(item))
    assert (data.class_names, data.image_size, data.in_chans, data.name) == (("dark", "light"), 10, 3, "Shapes")
    torch.testing.assert_close(data.probe(40), load_data(Shapes()).probe(40))
    x, y = data.probe(40)
    assert (x[y == 1].mean() > x[y == 0].mean()).all()


def test_items_that_are_no_pairs() -> None:
    class Mappings(Shapes):
        def __getitem__(self, index: int) -> Any:
            return {"image": super().__getitem__(index)}

    with pytest.raises(DataError, match=r"found none in a sample; .* \(TypeError: expected an item \(image, class\), found dict") as caught:
        load_data(Mappings())
    assert "found dict with the keys 'image'; a dict needs 'image' or 'img', and 'label'" in str(caught.value)


@pytest.mark.parametrize("key", ["image", "img"])
def test_dicts_of_hugging_face_are_items(key: str) -> None:
    items = [{key: image, "label": int(label), "id": 7} for image, label in map(Shapes().__getitem__, range(40))]

    class Stream(torch.utils.data.IterableDataset):
        __len__ = items.__len__
        __iter__ = items.__iter__

    class Dataset:
        __len__, __getitem__ = items.__len__, items.__getitem__

    for source in (Dataset(), Stream()):
        torch.testing.assert_close(load_data(source).probe(40), load_data(Shapes()).probe(40))
    del Stream.__len__
    with pytest.raises(DataError, match=r"data: expected a stream that knows its length \(__len__\), found Stream without; give"):
        load_data(Stream())


class Items:
    """A Dataset of the images of `Shapes` with labels of one's own."""

    def __init__(self, *labels: Any, image: Any = None) -> None:
        self.given, self.image = labels, image or Shapes()

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> Any:
        return self.image[index][0], self.given[index % len(self.given)]


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ((0, 1.7), r"item 1: label: expected integers from 0, found values such as 1\.7; each must be the number of a class"),
        ((0, torch.tensor(0.5)), r"item 1: .* such as 0\.5;"),
        ((0, -1), "item 1: label: expected integers from 0, found values such as -1; renumber with"),
        (("cat", "dog"), r"item 0: .* no text\), found shape \(1,\) of <U3; renumber with np\.unique\(y, return_inverse=True\)\[1\]"),
        ((np.eye(2)[0], np.eye(2)[1]), r"item 0: .*no one-hot rows.* found shape \(1, 2\) of float64; give y\.argmax\(1\)"),
        ((None, 0), "item 0: .* of object"),
        (([0, [1]], 0), "item 0: label: expected one integer per image"),
    ],
)
def test_wrong_labels_of_a_dataset_are_no_unreadable_images(labels: tuple[Any, ...], text: str, memory_limit: int) -> None:
    with pytest.raises(DataError, match=f"^{text}"):
        load_data(Items(*labels), max_unreadable=1.0, memory_limit=memory_limit, workers=0)


def test_items_that_hold_no_image_are_unreadable() -> None:
    none = [(None, 0)] * 40
    with pytest.raises(DataError, match=r"found none in a sample; .* item 0 \(expected a PIL image, array or tensor, found NoneType\)"):
        load_data(Items(0, 1, image=none))
    some = [(None, 0), *(Shapes()[i] for i in range(1, 40))]
    with pytest.warns(UserWarning, match=r"skipped 1 of 40 .*: item 0 \(expected a PIL image, array or tensor, found NoneType\)"):
        assert sum(load_data(Items(0, 1, image=some), max_unreadable=0.1).sizes.values()) == 39


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ((np.zeros((5, 4, 4)), np.zeros(4)), "as many labels as images, found 5 images and 4 labels"),
        ((np.zeros((9, 4, 4)), np.zeros(9, int)), "expected at least two classes, found 1"),
        ((np.zeros((9, 4, 4)), np.arange(9) % 3 * 2), "images of every class from 0 to 4, found none of 1, 3; leave no class empty"),
        ((np.zeros((9, 4, 4)), np.arange(9) % 3 + 1), "0 to 3, found none of 0; leave no class empty: labels start at 1: subtract 1"),
        ((np.zeros((9, 4, 4)), np.arange(9) % 3 * 2 + 1), "0 to 5, found none of 0, 2, 4; leave no class empty: renumber with"),
        ((np.zeros((9, 4, 4)), np.arange(9) % 3 * 10), r"found none of 1, 2, 3, 4, 5, \.\.\.; .*: renumber with np\.unique\(y, return_inv"),
        (
            (np.zeros((9, 4, 4)), np.arange(9) % 3 + 10**15),
            r"found none of 0, 1, 2, 3, 4, \.\.\.; .*: renumber with np\.unique\(y, return_inv",
        ),
        ((np.zeros((9, 4, 4)), np.ones(9, int)), "expected at least two classes, found 1"),
        ((np.zeros((9, 4, 4)), np.arange(9) % 3 - 1), r"found values such as -1; renumber with np\.unique\(y, return_inverse=True\)\[1\]"),
        ((np.full((9, 4, 4), 0.3), np.arange(9) % 3), "arrays: expected images that differ, found one value in all pixels of train"),
        ((np.zeros((4, 4, 4)), [0, 0, 0, 1]), "at least 3 images of each class, to set some aside, found fewer of 1"),
        (
            {"train": (np.zeros((9, 4, 4)), np.arange(9) % 3), "test": (np.zeros((2, 4, 4)), [0, 3])},
            "test: expected labels from 0 to 2, .* found 3",
        ),
        (
            {"train": (np.zeros((9, 4, 4)), np.arange(9) % 3), "dev": (np.zeros((2, 4, 4)), [0, 3])},
            "splits named train, val .* found 'dev'",
        ),
        ({"test": (np.zeros((9, 4, 4)), np.arange(9) % 3)}, "expected one entry 'train' .* found test"),
        (np.zeros((9, 4, 4)), r"a torch Dataset of \(image, class\) or a pair \(images, labels\), found ndarray"),
        (3, "found int"),
    ],
)
def test_unusable_sources(source: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_data(source)


def test_labels_that_begin_at_1_beside_names() -> None:
    with pytest.raises(DataError, match="train: expected labels from 0 to 1, the classes of train, found 2; labels start at 1: subtract 1"):
        check_classes({"train": torch.arange(6)}, torch.arange(6) % 2 + 1, ("cat", "dog"))


# --- folders --------------------------------------------------------------------------------------------------------------------------


def test_folder(pets: Path) -> None:
    data = load_data(pets, image_size=12)
    assert data.class_names == ("cat", "dog", "emu")
    assert data.sizes == {"train": 66, "validation": 6, "test": 18}
    assert data.unreadable == ()
    assert load_data(str(pets)).image_size == 20
    assert load_data("folder", root=pets, image_size=12, workers=1).probe(9)[0].equal(data.probe(9)[0])


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_a_class_that_val_or_test_lacks_is_warned_of_and_val_alone_is_the_test_split(pets: Path, tmp_path: Path, memory_limit: int) -> None:
    def given(*splits: str) -> ImageData:
        root = tmp_path / "-".join(splits)
        for split in splits:
            shutil.copytree(pets, root / split)
        shutil.rmtree(root / splits[-1] / "dog")
        text = f"^{'test' if 'test' in splits else 'validation'}: expected images of every class of train, found none of dog; it is judged"
        with pytest.warns(UserWarning, match=text) as caught:
            data = load_data(root, image_size=12, memory_limit=memory_limit, workers=0)
        assert (len(caught), caught[0].filename) == (1, __file__)
        return data

    data = given("train", "val")
    assert data.class_names == ("cat", "dog", "emu")
    assert data.sizes == {"train": 81, "validation": 9, "test": 60}
    with data.final_evaluation() as opened:
        assert every(opened, "test")[1].unique().tolist() == [0, 2]
    assert every(data, "validation")[1].unique().tolist() == [0, 1, 2]
    assert given("train", "test").sizes == {"train": 81, "validation": 9, "test": 60}
    assert given("train", "val", "test").sizes == {"train": 90, "validation": 90, "test": 60}


def test_large_files_default_to_64_pixels(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("L", (90, 80), i).save(tmp_path / name / f"{i}.jpg")
    data = load_data(tmp_path)
    assert (data.image_size, data.in_chans) == (64, 1)


def damage(root: Path, target: Path, count: int) -> Path:
    """A copy of a folder with ``count`` more files that cannot be read."""
    shutil.copytree(root, target)
    whole = (root / "cat" / "0.png").read_bytes()
    kinds = (b"", b"no image at all", whole[: len(whole) // 2])
    for i in range(count):
        (target / "cat" / f"bad{i}.png").write_bytes(kinds[i % 3])
    return target


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_unreadable_images_are_skipped_counted_and_named(pets: Path, tmp_path: Path, memory_limit: int) -> None:
    root = damage(pets, tmp_path / "damaged", 3)
    with pytest.warns(
        UserWarning, match=r"skipped 3 of 93 images, which cannot be read: cat.bad0.png \(not an image\), cat.bad1"
    ) as caught:
        data = load_data(root, max_unreadable=0.05, image_size=12, memory_limit=memory_limit, workers=0)
    assert len(caught) == 1
    assert sum(data.sizes.values()) == 90
    assert {name.split(" ")[0] for name in data.unreadable} == {"cat/bad0.png", "cat/bad1.png", "cat/bad2.png"}
    with pytest.raises(
        DataError, match=r"3 of 93 images cannot be read \((an estimated )?3.2%, max_unreadable is 1.0%\): .* raise max_unreadable"
    ):
        load_data(root, image_size=12, memory_limit=memory_limit, workers=0)


def test_a_class_with_nothing_readable_is_empty(pets: Path, tmp_path: Path) -> None:
    root = damage(pets, tmp_path / "damaged", 0)
    (root / "fox").mkdir()
    (root / "fox" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped 1 of 91"), pytest.raises(DataError, match="found none of fox; leave no class empty"):
        load_data(root, max_unreadable=0.5)


def test_damage_in_a_sample_stands_for_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.data.decoding._SURVEY", 20)
    for i in range(40):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 50).save(path)
        if i // 2 % 2:
            path.write_bytes(path.read_bytes()[:200])  # it opens and cannot be decoded
    with pytest.raises(DataError, match=r"of 40 images cannot be read \(an estimated [456]\d\.\d%, max_unreadable is 35\.0%\)"):
        load_data(tmp_path, max_unreadable=0.35, image_size=8, memory_limit=0, workers=0)


def test_a_share_of_unreadable_images_up_to_the_limit_is_skipped() -> None:
    with pytest.warns(UserWarning, match="skipped 1 of 10 images"):
        judge_unreadable(["a.png (not an image)"], 10, 0.1)


def test_dataset_items_that_fail_are_unreadable() -> None:
    with pytest.warns(UserWarning, match=r"skipped 2 of 40 images, which cannot be read: item 3 \(OSError: damaged\), item 7"):
        assert sum(load_data(Shapes(broken=(3, 7)), max_unreadable=0.1).sizes.values()) == 38


class Halved(Shapes):
    """A Dataset with an attribute of classes that its items turn into others, as torchvision's ``target_transform`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.targets, self.target_transform = [4 + i % 6 for i in range(len(self))], lambda y: y % 2


@pytest.mark.parametrize("memory_limit", [2 << 30, 0])
def test_classes_are_those_of_the_items_wherever_the_images_are_kept(memory_limit: int) -> None:
    data = load_data(Halved(), memory_limit=memory_limit, workers=0)
    assert data.pool.labels.tolist() == [int(Halved()[i][1]) for i in range(40)]
    for attribute in ([i // 2 % 2 for i in range(40)], ["dark", "light"] * 20, 40):
        dataset = Shapes()
        dataset.labels = attribute  # type: ignore[attr-defined]
        assert load_data(dataset, memory_limit=memory_limit, workers=0).pool.labels.tolist() == [0, 1] * 20


def test_streamed_items_that_fail_are_unreadable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capnas.data.decoding._SURVEY", 20)
    with pytest.warns(UserWarning, match=r"skipped 2 of 40 images, which cannot be read: item [37] \(OSError: damaged\), item"):
        data = load_data(Shapes(broken=(3, 7)), max_unreadable=0.2, memory_limit=0, workers=0)
    assert sum(data.sizes.values()) == 38
    assert {3, 7}.isdisjoint(torch.cat(list(data.index.values())).tolist())


def test_odd_modes_are_read(tmp_path: Path) -> None:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
    for name in "ab":
        (tmp_path / name).mkdir()
        for mode in modes:
            image = (
                Image.fromarray(np.full((9, 9), 40000, np.uint16))
                if mode == "I;16"
                else Image.new("RGB", (9, 9), (200, 100, 50)).convert(mode)
            )
            options = {"transparency": bytes(range(256))} if mode == "P" else {}
            image.save(tmp_path / name / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}", **options)
    data = load_data(tmp_path, validation=0.2)
    assert sum(data.sizes.values()) == 16
    assert data.in_chans == 3
    deep = data.pool.images.mean((1, 2, 3))  # type: ignore[union-attr]
    assert ((deep - 40000 / 65535).abs() < 1e-6).sum() == 2
    streamed, read = load_data(tmp_path, validation=0.2, memory_limit=0, workers=0), data.probe(16)
    torch.testing.assert_close(streamed.probe(16)[1], read[1])
    byte = 1 / 255 / min(data.std)  # a stream holds bytes: the upper ones of 16 bits
    torch.testing.assert_close(streamed.probe(16)[0], read[0], atol=byte, rtol=0.02)


def test_of_12_bits_in_16_nothing_is_lost_and_dark_images_stay_dark(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 6, 6)).astype(np.uint16)
    values[:10] //= 256
    for i, pixels in enumerate(values):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / str(i % 2) / f"{i:02}.png")
    data = load_data(tmp_path, image_size=6)
    found = (data.pool.images * 65535).round().flatten(1).sort().values  # type: ignore[union-attr]
    wanted = torch.from_numpy(values.astype(np.float32)).flatten(1).sort().values
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted.tolist()))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_pil_s_floats_keep_their_units(tmp_path: Path, scale: float) -> None:
    x = np.random.default_rng(0).random((30, 8, 8), dtype=np.float32) * scale
    images = [Image.fromarray(pixels) for pixels in x]
    for i, image in enumerate(images):
        (tmp_path / str(i // 10)).mkdir(exist_ok=True)
        image.save(tmp_path / str(i // 10) / f"{i}.tif")
    for source in (tmp_path, Items(*np.arange(30) // 10, image=[(image,) for image in images])):
        data = load_data(source)
        assert data.in_chans == 1
        torch.testing.assert_close(data.probe(30), load_data((x, np.arange(30) // 10)).probe(30))
    with pytest.raises(DataError, match="images larger than memory_limit must be bytes of 1 or 3 channels"):
        load_data(tmp_path, memory_limit=0, workers=0)


# --- what does not fit in memory ------------------------------------------------------------------------------------------------------


def test_timms_loader_gives_the_same_data_by_the_same_interface(pets: Path) -> None:
    memory = load_data(pets, image_size=12)
    stream = load_data(pets, image_size=12, memory_limit=0, workers=0)
    assert stream.sizes == memory.sizes
    needed = 90 * 3 * 12 * 12
    kept = [isinstance(load_data(pets, image_size=12, memory_limit=limit, workers=0).pool, InMemory) for limit in (needed - 1, needed)]
    assert kept == [False, True]
    assert all(torch.equal(stream.index[s], memory.index[s]) for s in memory.index)
    np.testing.assert_allclose((stream.mean, stream.std), (memory.mean, memory.std), atol=1e-9)
    a, b = every(memory, "validation"), every(stream, "validation")
    assert torch.equal(a[1], b[1])
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(memory.probe(5), stream.probe(5))
    sums = [sorted(float(i.sum()) for x, _ in d.batches("train", 22, augment=False) for i in x) for d in (memory, stream)]
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-3)
    assert [len(y) for _, y in stream.batches("train", 30)] == [30, 30]
    assert [len(y) for _, y in stream.batches("train", 100, image_size=9)] == [66]
    with pytest.raises(UsageError, match="closed while searching"):
        stream.batches("test", 4)


def test_timms_loader_repeats_by_seed_and_leaves_global_randomness(pets: Path) -> None:
    stream = load_data(pets, image_size=12, memory_limit=0, workers=0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    first = every(stream, "train", epoch=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    torch.rand(3), random.random()
    assert torch.equal(first[0], every(stream, "train", epoch=1)[0])
    assert not torch.equal(first[0], every(stream, "train", epoch=2)[0])


def test_timms_loader_with_worker_processes(pets: Path) -> None:
    stream = load_data(pets, image_size=12, memory_limit=0, workers=1)
    assert len(every(stream, "validation")[1]) == 6


@pytest.mark.parametrize("item", ["pil", "array"])
def test_torch_dataset_through_timms_loader(item: str) -> None:
    stream = load_data(Shapes(item), memory_limit=0, workers=0)
    assert stream.sizes == {"train": 28, "validation": 4, "test": 8}
    assert every(stream, "validation")[0].shape == (4, 3, 10, 10)
    kept = stream.pool.labels
    assert torch.equal(kept, torch.arange(40) % 2)


def test_statistics_are_those_of_train_behind_another_part() -> None:
    bright = Items(*range(2), image=[(np.full((10, 10, 3), 255, np.uint8),)] * 40)
    memory, stream = (load_data({"test": bright, "train": Shapes()}, memory_limit=limit, workers=0) for limit in (2 << 30, 0))
    assert stream.mean == pytest.approx(memory.mean)
    assert stream.mean[0] < 0.6


# --- workers --------------------------------------------------------------------------------------------------------------------------


def test_a_named_set_pickles_as_its_spec(embedded: ImageData, pets: Path) -> None:
    for data in (embedded, load_data(pets, image_size=12)):
        packed = pickle.dumps(data)
        assert len(packed) < 1000
        assert torch.equal(pickle.loads(packed).probe(4)[0], data.probe(4)[0])
    assert load_data(image_size=12, validation=0.2).sizes["validation"] == 2000


def test_arrays_pickle_with_the_test_split_closed() -> None:
    data = load_data((torch.rand(60, 1, 8, 8), torch.arange(60) % 3))
    assert data.spec.source is None
    with data.final_evaluation() as opened:
        copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy.probe(4)[0], data.probe(4)[0])
    with pytest.raises(UsageError, match="closed while searching"):
        copy.batches("test", 4)


def checksum(data: ImageData) -> float:
    return float(next(data.batches("train", 64, seed=1))[0].double().sum())


def test_spawned_workers_load_the_same_data(embedded: ImageData) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(checksum, (embedded,)) == checksum(embedded)


# --- real images ----------------------------------------------------------------------------------------------------------------------


def test_real_photographs(shared: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shared / "data" / "clothing_small_160.zip") as archive:
        names = [n for i, n in enumerate(sorted(archive.namelist())) if n.endswith(".jpg") and i % 12 == 0]
        archive.extractall(tmp_path, names)
    data = load_data(tmp_path, image_size=40)
    assert data.num_classes == 10
    assert sum(data.sizes.values()) == len(names)
    assert data.sizes["validation"] > 10  # the folder's own validation/
    x, _ = data.probe(100)
    assert x.mean((0, 2, 3)).abs().max() < 0.4


class OpenedBefore(torch.utils.data.Dataset):
    """Images that a Dataset opened once and gives again and again; its ``reader`` is none of timm's."""

    def __init__(self, folder: Path, count: int) -> None:
        for i in range(count):
            Image.fromarray(np.full((9, 9), 5 * i, dtype=np.uint8)).save(folder / f"{i}.png")
        self.images = [Image.open(folder / f"{i}.png") for i in range(count)]
        self.reader = iter("csv")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], index % 2


def test_images_that_a_dataset_holds_open_stay_its_own(tmp_path: Path) -> None:
    mine = OpenedBefore(tmp_path, 40)
    data = load_data(mine)
    assert sum(data.sizes.values()) == 40
    assert [np.asarray(image).mean() for image in mine.images] == [5 * i for i in range(40)]


def test_a_probe_of_streamed_images_takes_the_next_where_one_cannot_be_read(tmp_path: Path) -> None:
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        for i in range(20):
            Image.fromarray(np.full((64, 64), 100 * label + i, dtype=np.uint8)).save(tmp_path / str(label) / f"{i:02}.bmp")
    data = load_data(tmp_path, memory_limit=0, workers=0, mean=[0.0], std=[1.0])
    path = tmp_path / "0" / "03.bmp"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    x, y = data.probe(len(data.index["train"]))
    assert len(x) == len(y) == len(data.index["train"])
    torch.testing.assert_close((x.flatten(1).mean(1) * 255 >= 100).long(), y)
    for image in (tmp_path / "1").iterdir():
        image.write_bytes(b"BM")
    for image in (tmp_path / "0").iterdir():
        image.write_bytes(b"BM")
    with pytest.raises(DataError, match="100 images in a row cannot be read"):
        data.probe(4)
